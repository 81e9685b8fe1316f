"""Intervals and tests over seeds and utterances, against plain loops."""

import random

import numpy as np
import pytest

from tutornet_sb.experiments.statistics import difference, holm, interval


def draw(seed, utterances, rates, seeds=1):
    """Errors of models ``(seeds, utterances)``, and words by utterance."""
    rng = np.random.default_rng(seed)
    words = rng.integers(3, 12, utterances)
    errors = [
        np.array([rng.binomial(words, rate) for _ in range(seeds)])
        for rate in rates
    ]
    return errors, words


def percentiles(values):
    return np.percentile(sorted(values), [2.5, 97.5])


def resample(models, words, count, seed=5):
    """Draw seeds and utterances anew, in plain loops.

    Yields the errors of each model, and the words.
    """
    rng, number = random.Random(seed), len(words)
    for _ in range(count):
        drawn = rng.choices(range(number), k=number)
        made = []
        for errors in models:
            trainings = rng.choices(errors, k=max(1, len(errors) - 1))
            totals = [sum(one[i] for i in drawn) for one in trainings]
            made.append(sum(totals) / len(totals))
        yield made, sum(words[i] for i in drawn)


@pytest.mark.parametrize("seeds", [1, 4])
def test_the_interval_is_that_of_a_plain_loop(seeds):
    (errors,), words = draw(1, 60, [0.2], seeds)
    errors[0] //= 2  # seeds that differ
    rates = [
        100 * made / spoken
        for (made,), spoken in resample([errors], words, 4000)
    ]
    found = interval(errors, words)
    assert found == pytest.approx(percentiles(rates), abs=0.5)
    assert found[0] < 100 * errors.mean(0).sum() / words.sum() < found[1]


def test_the_interval_holds_the_true_rate_as_often_as_it_says():
    held = 0
    for seed in range(200):
        (errors,), words = draw(seed, 80, [0.3])
        low, high = interval(errors, words, resamples=500)
        held += low <= 30 <= high
    # Binomial: 0.95 * 200 = 190, standard deviation 3
    assert 180 <= held <= 199


def test_utterances_are_drawn_with_their_lengths():
    # The rate is 50 % of any draw; errors and words drawn apart would vary.
    words = np.array([2, 4, 20, 6, 8])
    assert interval([words / 2], words) == (50, 50)


def test_more_utterances_make_a_narrower_interval():
    widths = []
    for utterances in (50, 450):
        (errors,), words = draw(3, utterances, [0.2])
        low, high = interval(errors, words)
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(3, rel=0.3)


def test_seeds_that_differ_make_a_wider_interval():
    # The same mean over the seeds, which once are alike
    words = np.full(400, 10)
    alike = np.full((5, 400), 3)
    apart = np.array([[rate] * 400 for rate in (1, 2, 3, 4, 5)])
    assert interval(alike, words) == (30, 30)
    low, high = interval(apart, words)
    # Standard error of the mean of five: 15.8 / sqrt(5) = 7.1 points
    assert (high - low) / (2 * 1.96) == pytest.approx(7.07, rel=0.1)


def test_one_utterance_has_no_interval():
    assert interval([[1]], [4]) == (25, 25)


def test_the_difference_is_that_of_a_plain_loop():
    (ours, theirs), words = draw(2, 40, [0.2, 0.25], seeds=3)
    theirs = np.concatenate([theirs, theirs[:1] // 2])
    points, reductions = [], []
    for (mine, other), spoken in resample([ours, theirs], words, 6000):
        points.append(100 * (mine - other) / spoken)
        reductions.append(100 * (other - mine) / other)
    found = difference(ours, theirs, words)
    mine, other = ours.mean(0).sum(), theirs.mean(0).sum()
    assert found.points == pytest.approx(100 * (mine - other) / words.sum())
    assert found.reduction == pytest.approx(100 * (1 - mine / other))
    assert (found.low, found.high) == pytest.approx(
        percentiles(points), abs=0.5
    )
    assert (found.reduction_low, found.reduction_high) == pytest.approx(
        percentiles(reductions), abs=3
    )
    against = np.mean(np.array(points) >= 0)
    expected = 2 * min(against, 1 - against)
    assert 0.02 < expected < 0.9
    assert found.p_value == pytest.approx(expected, abs=0.03)


def test_seeds_that_differ_alone_are_no_difference():
    # Five trainings each, of one configuration whose seeds differ much: a test
    # over utterances alone finds a difference in most such pairs.
    rejected = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        words = rng.integers(3, 12, 60)
        ours, theirs = (
            np.array(
                [
                    rng.binomial(words, 0.25 * np.exp(rng.normal(0, 0.3)))
                    for _ in range(5)
                ]
            )
            for _ in range(2)
        )
        rejected += (
            difference(ours, theirs, words, resamples=499).p_value < 0.05
        )
    # Binomial: 5, standard deviation 2.2
    assert rejected <= 12


def test_models_that_are_alike_do_not_differ():
    (errors,), words = draw(4, 50, [0.2])
    two = np.concatenate([errors, errors])
    found = difference(two, two, words)
    assert found[:6] == (0, 0, 0, 0, 0, 0)
    assert found.p_value == 1


def test_a_single_seed_says_nothing_of_others():
    (ours, theirs), words = draw(7, 50, [0.1, 0.4], seeds=2)
    assert difference(ours, theirs, words).p_value < 0.01
    assert difference(ours[:1], theirs, words).p_value is None
    assert difference(ours, theirs[:1], words).p_value is None


def test_a_pair_is_compared_on_the_same_utterances():
    # One word better wherever it is: the paired interval has no width, while
    # those of the rates overlap.
    (theirs,), _ = draw(5, 30, [0.5])
    theirs = theirs + 1
    words = np.full(30, 20)
    found = difference(theirs - 1, theirs, words)
    assert (found.low, found.high) == pytest.approx((-5, -5))
    assert interval(theirs - 1, words)[1] > interval(theirs, words)[0]


def test_the_same_call_gives_the_same_figures():
    (ours, theirs), words = draw(6, 30, [0.2, 0.25], seeds=2)
    assert interval(ours, words) == interval(ours, words)
    assert difference(ours, theirs, words) == difference(ours, theirs, words)


def test_holm_is_the_step_down_procedure():
    # By hand: 4 * .005, 3 * .01, 2 * .03, then no less than the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )
    assert holm([0.6, 0.02, 0.9]) == pytest.approx([1, 0.06, 1])
    assert holm([0.03]) == [0.03] and holm([]) == []


def test_holm_rejects_as_its_procedure_does():
    rng = np.random.default_rng(9)
    for _ in range(20):
        p_values = list(rng.uniform(0, 0.06, 7))
        rejected = set()
        # From the least on, until the first that is above its level
        for place, index in enumerate(np.argsort(p_values)):
            if p_values[index] > 0.05 / (7 - place):
                break
            rejected.add(index)
        found = holm(p_values)
        assert {i for i, p in enumerate(found) if p <= 0.05} == rejected
