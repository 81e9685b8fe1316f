"""Intervals and tests over utterances, against plain loops and known cases."""

import itertools
import random

import numpy as np
import pytest
from scipy import stats

from tutornet_sb.reporting.statistics import difference, interval


def draw(seed, utterances, rates):
    """Errors of models with these error rates, and words, by utterance."""
    rng = np.random.default_rng(seed)
    words = rng.integers(3, 12, utterances)
    return [rng.binomial(words, rate) for rate in rates], words


def percentiles(values):
    values = sorted(values)
    return np.percentile(values, [2.5, 97.5])


def test_the_interval_is_that_of_a_plain_loop():
    (errors,), words = draw(1, 60, [0.2])
    rng = random.Random(5)
    rates = []
    for _ in range(4000):
        chosen = rng.choices(range(60), k=60)
        wrong = sum(errors[i] for i in chosen)
        rates.append(100 * wrong / sum(words[i] for i in chosen))
    assert interval(errors, words) == pytest.approx(
        percentiles(rates), abs=0.35
    )
    low, high = interval(errors, words)
    assert low < 100 * errors.sum() / words.sum() < high


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
    assert interval(words / 2, words) == (50, 50)


def test_more_utterances_make_a_narrower_interval():
    widths = []
    for utterances in (50, 450):
        (errors,), words = draw(3, utterances, [0.2])
        low, high = interval(errors, words)
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(3, rel=0.3)


def test_one_utterance_has_no_interval():
    assert interval([1], [4]) == (25, 25)


def test_the_difference_is_that_of_a_plain_loop():
    (ours, theirs), words = draw(2, 40, [0.15, 0.25])
    rng = random.Random(6)
    points, reductions = [], []
    for _ in range(4000):
        chosen = rng.choices(range(40), k=40)
        mine, other, spoken = (
            sum(part[i] for i in chosen) for part in (ours, theirs, words)
        )
        points.append(100 * (mine - other) / spoken)
        reductions.append(100 * (other - mine) / other)
    found = difference(ours, theirs, words)
    assert found.points == pytest.approx(
        100 * (ours.sum() - theirs.sum()) / words.sum()
    )
    assert found.reduction == pytest.approx(
        100 * (1 - ours.sum() / theirs.sum())
    )
    assert (found.low, found.high) == pytest.approx(
        percentiles(points), abs=0.5
    )
    assert (found.reduction_low, found.reduction_high) == pytest.approx(
        percentiles(reductions), abs=1.5
    )


def test_the_p_value_of_few_utterances_is_exact():
    # All changes of places are tried.
    ours, theirs = [0, 1, 0, 2, 1, 0, 1], [2, 1, 1, 3, 0, 2, 2]
    gains = np.subtract(ours, theirs)
    extreme = [
        abs(np.dot(signs, gains)) >= abs(gains.sum())
        for signs in itertools.product((1, -1), repeat=len(gains))
    ]
    found = difference(ours, theirs, [5] * len(ours))
    assert found.p_value == pytest.approx(np.mean(extreme))


def test_the_p_value_of_many_agrees_with_the_t_test():
    # With so many utterances of one length the two are nearly one test.
    rng = np.random.default_rng(8)
    theirs = rng.binomial(10, 0.3, 400)
    ours = rng.binomial(10, 0.285, 400)
    expected = stats.ttest_rel(ours, theirs).pvalue
    assert 0.01 < expected < 0.5
    found = difference(ours, theirs, [10] * 400)
    assert found.p_value == pytest.approx(expected, abs=0.03)


def test_models_that_are_alike_do_not_differ():
    (errors,), words = draw(4, 50, [0.2])
    found = difference(errors, errors, words)
    assert found[:6] == (0, 0, 0, 0, 0, 0)
    assert found.p_value == 1


def test_a_pair_is_compared_on_the_same_utterances():
    # One word better wherever it is: the paired interval has no width, while
    # those of the rates overlap.
    (theirs,), _ = draw(5, 30, [0.5])
    theirs = theirs + 1
    words = np.full(30, 20)
    found = difference(theirs - 1, theirs, words)
    assert (found.low, found.high) == pytest.approx((-5, -5))
    assert found.p_value < 0.001
    assert interval(theirs - 1, words)[1] > interval(theirs, words)[0]


def test_the_same_call_gives_the_same_figures():
    (ours, theirs), words = draw(6, 30, [0.2, 0.25])
    assert interval(ours, words) == interval(ours, words)
    assert difference(ours, theirs, words) == difference(ours, theirs, words)


def test_what_cannot_be_compared_is_said():
    with pytest.raises(ValueError, match="2 and 3 utterances"):
        difference([1, 2], [1, 2, 3], [5, 5])
    with pytest.raises(ValueError, match="no error"):
        difference([1, 2], [0, 0], [5, 5])
