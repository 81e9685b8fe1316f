"""Statistics of hidden states, and what the loss makes of them."""

import numpy
import pytest
import torch

from tutornet_sb.distillation.losses import RepresentationLoss
from tutornet_sb.distillation.standardisation import Standardiser, measure
from tutornet_sb.distillation.targets import TeacherTargets

TAPS = {"encoder.conv": 3, "encoder": 509}


@pytest.fixture
def states():
    """Frames of which one dimension is far from the others and from 0."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(400, sum(TAPS.values()), generator=generator)
    states[:, 7] = 150 + 2 * states[:, 7]
    states[:, 9] *= 1e-3
    return states


def test_statistics_are_those_of_numpy(states):
    found = measure(states, TAPS)
    assert list(found) == list(TAPS)
    assert [len(part["mean"]) for part in found.values()] == [3, 509]
    for name, wanted in (
        ("mean", numpy.mean(states.numpy(), axis=0, dtype="f8")),
        ("deviation", numpy.std(states.numpy(), axis=0, dtype="f8")),
    ):
        values = sum((part[name] for part in found.values()), [])
        assert values == pytest.approx(wanted, rel=1e-6, abs=1e-7)


def test_every_dimension_counts_alike(states):
    """A constant costs 1, where layer normalisation made it 0.02."""
    standard = Standardiser(measure(states, TAPS), TAPS)(states)
    assert standard.mean(0).abs().max() < 1e-4
    torch.testing.assert_close(
        standard.square().mean(0), torch.ones(512), rtol=1e-3, atol=0
    )
    posteriors = torch.full((4, 100, 2), 0.5)
    targets = TeacherTargets(
        standard.view(4, 100, 512), posteriors, torch.full((4,), 100), 0.02
    )
    loss = RepresentationLoss()
    constant = torch.zeros(4, 100, 512)
    assert loss(constant, targets).item() == pytest.approx(1, rel=1e-3)
    # To learn one more dimension is worth as much, whichever it is.
    for dim in (0, 7, 9):
        student = constant.clone()
        student[..., dim] = targets.hidden[..., dim]
        gain = 1 - loss(student, targets).item()
        assert gain == pytest.approx(1 / 512, rel=0.05)


def test_dimensions_are_shifted_and_scaled_away(states):
    twice = 3 * states + torch.arange(512)
    ours, theirs = (
        Standardiser(measure(x, TAPS), TAPS)(x) for x in (states, twice)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4, 1e-30])
def test_a_constant_dimension_becomes_zero(states, value):
    states[:, 5] = value
    standard = Standardiser(measure(states, TAPS), TAPS)
    assert (standard(states)[:, 5] == 0).all()
    assert standard(states + 1).isfinite().all()


def test_fewer_layers_in_another_order(states):
    statistics = measure(states, TAPS)
    whole = Standardiser(statistics, TAPS)(states)
    conv, encoder = states.split([3, 509], dim=1)
    swapped = Standardiser(statistics, ["encoder", "encoder.conv"])
    found = swapped(torch.cat([encoder, conv], dim=1))
    assert torch.equal(found, torch.cat([whole[:, 3:], whole[:, :3]], 1))
    assert torch.equal(
        Standardiser(statistics, ["encoder"])(encoder), whole[:, 3:]
    )


@pytest.mark.parametrize("weighting", ["uniform", "nonblank", "energy"])
def test_no_constant_costs_less_than_the_one_of_the_moments(weighting):
    generator = torch.Generator().manual_seed(1)
    hidden = 1 + torch.randn(3, 20, 4, generator=generator)
    lengths = torch.tensor([20, 3, 11])
    for row, length in enumerate(lengths):
        hidden[row, length:] = 0
    posteriors = torch.randn(3, 20, 5, generator=generator).softmax(-1)
    targets = TeacherTargets(hidden, posteriors, lengths, 0.02)
    loss = RepresentationLoss(weighting)
    mean, square = loss.moments(targets)
    least = (square - mean.square()).mean()
    constant = mean.clone().requires_grad_()
    found = loss(constant.expand(3, 20, 4), targets)
    torch.testing.assert_close(found, least)
    found.backward()
    assert constant.grad.abs().max() < 1e-6
