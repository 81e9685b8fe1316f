"""The projector's shapes and its two forms."""

import pytest
import torch

from tutornet_sb.distillation.projector import Projector


@pytest.mark.parametrize("hidden_size", [None, 7])
def test_maps_student_to_teacher(hidden_size):
    projector = Projector(4, 6, hidden_size)
    projected = projector(torch.randn(2, 5, 4))
    assert projected.shape == (2, 5, 6)
    projected.sum().backward()
    assert all(p.grad is not None for p in projector.parameters())


def test_linear_by_default():
    projector = Projector(4, 6)
    weight, bias = projector.parameters()
    hidden = torch.randn(2, 5, 4)
    torch.testing.assert_close(projector(hidden), hidden @ weight.T + bias)


def test_hidden_layer_is_not_linear():
    torch.manual_seed(0)
    projector = Projector(4, 6, hidden_size=8)
    hidden = torch.randn(2, 5, 4)
    ends = projector(hidden) + projector(-hidden)
    assert not torch.allclose(ends / 2, projector(torch.zeros(2, 5, 4)))


@pytest.mark.parametrize("hidden_size", [None, 7])
def test_frames_do_not_mix(hidden_size):
    projector = Projector(4, 6, hidden_size)
    hidden = torch.randn(2, 5, 4)
    alone = projector(hidden[:, 2:3])
    torch.testing.assert_close(projector(hidden)[:, 2:3], alone)
