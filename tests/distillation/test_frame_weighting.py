"""Frame weightings against a plain loop in float64."""

import pytest
import torch

from tutornet_sb.distillation.frame_weighting import (
    FRAME_WEIGHTINGS,
    frame_weights,
)
from tutornet_sb.distillation.targets import TeacherTargets


def random_targets(seed, lengths=(7, 1, 4), dim=5, symbols=6, padding=1e30):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    hidden = torch.randn(*shape, dim, generator=generator)
    posteriors = torch.randn(*shape, symbols, generator=generator).softmax(-1)
    for b, length in enumerate(lengths):
        hidden[b, length:] = padding
        posteriors[b, length:] = padding
    return TeacherTargets(hidden, posteriors, torch.tensor(lengths), 0.02)


def reference(name, targets):
    weights = torch.zeros(targets.posteriors.shape[:2], dtype=torch.float64)
    for b, length in enumerate(targets.lengths.tolist()):
        raw = []
        for t in range(length):
            if name == "uniform":
                raw.append(1.0)
            elif name == "energy":
                values = [h**2 for h in targets.hidden[b, t].tolist()]
                raw.append(sum(values) / len(values))
            else:
                raw.append(1 - targets.posteriors[b, t, 0].item())
        for t in range(length):
            weights[b, t] = raw[t] / sum(raw)
    return weights


@pytest.mark.parametrize("padding", [0.0, 1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FRAME_WEIGHTINGS)
def test_matches_plain_loop_whatever_the_padding(name, seed, padding):
    targets = random_targets(seed, padding=padding)
    weights = frame_weights(targets, name)
    expected = reference(name, targets).float()
    torch.testing.assert_close(weights, expected)
    assert (weights[1, 1:] == 0).all()


@pytest.mark.parametrize("name", FRAME_WEIGHTINGS)
def test_teacher_that_points_nowhere_means_uniform(name):
    targets = random_targets(0)
    targets.hidden[0] = 0.0
    targets.posteriors[0] = torch.eye(6)[0]
    weights = frame_weights(targets, name)
    torch.testing.assert_close(weights[0], torch.full((7,), 1 / 7))
    torch.testing.assert_close(weights.sum(1), torch.ones(3))


@pytest.mark.parametrize("name", FRAME_WEIGHTINGS)
def test_posterior_of_blank_rounded_above_one_gives_no_negative(name):
    targets = random_targets(0)
    targets.posteriors[0, 0, 0] = 1 + 1e-6
    assert (frame_weights(targets, name) >= 0).all()


@pytest.mark.parametrize("name", FRAME_WEIGHTINGS)
def test_half_precision_does_not_overflow(name):
    targets = random_targets(0, padding=0.0)
    half = targets._replace(
        hidden=(1000 * targets.hidden).half(),
        posteriors=targets.posteriors.half(),
    )
    weights = frame_weights(half, name)
    assert weights.dtype == torch.float32
    expected = reference(name, half).float()
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("name", FRAME_WEIGHTINGS)
def test_empty_utterance_gets_no_weight(name):
    targets = random_targets(0)
    targets = targets._replace(lengths=torch.tensor([7, 0, 4]))
    weights = frame_weights(targets, name)
    assert (weights[1] == 0).all()


@pytest.mark.parametrize("symbols, name", [(6, "nonblank"), (0, "energy")])
def test_the_default_is_one_that_the_teacher_can_do(symbols, name):
    targets = random_targets(2, symbols=symbols)
    weights = frame_weights(targets)
    torch.testing.assert_close(
        weights.double(), reference(name, targets), rtol=1e-5, atol=1e-7
    )
