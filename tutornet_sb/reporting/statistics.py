"""How sure an error rate is, and whether two models differ.

Utterances are drawn anew, with their errors and their lengths, as in M. Bisani
and H. Ney, "Bootstrap estimates for confidence intervals in ASR performance
evaluation", ICASSP 2004. Two models are compared on the same utterances: by the
same bootstrap, and by approximate randomisation (E. Noreen, "Computer-intensive
methods for testing hypotheses", 1989), in which the two models' errors of an
utterance change places at random.

Of a model trained with several seeds, the errors of an utterance are the mean
over the seeds. What is said then holds for those seeds and for other utterances
of this kind, not for other seeds: the spread over the seeds stands beside it.
Utterances of one speaker are taken to be independent of each other, which makes
intervals somewhat too narrow (arXiv 1912.09508).
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 9999
# Resamples computed at a time, by the memory that they take
_BATCH_ELEMENTS = 2_000_000


class Difference(NamedTuple):
    """How a model differs from another on the same utterances.

    Attributes
    ----------
    points : float
        Error rate less that of the other (percent of the units).
    low, high : float
        95 % interval of that.
    reduction : float
        Errors saved, of those of the other (percent).
    reduction_low, reduction_high : float
        95 % interval of that.
    p_value : float
        Probability of a difference at least as great, either way, if the two
        were as good.
    """

    points: float
    low: float
    high: float
    reduction: float
    reduction_low: float
    reduction_high: float
    p_value: float


def rate(errors, units, axis=-1):
    """Error rate over utterances.

    Arguments
    ---------
    errors : numpy.ndarray
        Errors of each utterance.
    units : numpy.ndarray
        Words (or characters) of each.
    axis : int
        The utterances.

    Returns
    -------
    numpy.ndarray
        Percent.

    Example
    -------
    >>> float(rate(np.array([1, 0]), np.array([2, 2])))
    25.0
    """
    return 100 * np.sum(errors, axis=axis) / np.sum(units, axis=axis)


def interval(errors, units, resamples=RESAMPLES):
    """95 % interval of an error rate, by the bootstrap over utterances.

    Arguments
    ---------
    errors : sequence of float
        Errors of each utterance.
    units : sequence of float
        Words (or characters) of each.
    resamples : int
        How often utterances are drawn.

    Returns
    -------
    tuple of float
        Lower and upper bound (percent).

    Example
    -------
    >>> interval([1, 1, 1], [4, 4, 4])
    (25.0, 25.0)
    """
    return _bootstrap(rate, (errors, units), resamples)


def difference(errors, reference, units, resamples=RESAMPLES):
    """Compare two models that have heard the same utterances.

    Arguments
    ---------
    errors : sequence of float
        Errors of each utterance.
    reference : sequence of float
        Those of the other model, in the same order.
    units : sequence of float
        Words (or characters) of each utterance.
    resamples : int
        How often utterances are drawn, and how often places are changed.

    Returns
    -------
    Difference
        Intervals by the paired bootstrap, the p-value by approximate
        randomisation.

    Raises
    ------
    ValueError
        If the lengths differ, or the other model has made no error.
    """
    errors, reference, units = map(np.asarray, (errors, reference, units))
    if not len(errors) == len(reference) == len(units):
        raise ValueError(
            f"{len(errors)} and {len(reference)} utterances with {len(units)} "
            "lengths cannot be compared"
        )
    if not reference.sum():
        raise ValueError("the reference has no error, so none can be saved")

    def points(ours, theirs, lengths, axis=-1):
        return rate(ours, lengths, axis) - rate(theirs, lengths, axis)

    def reduction(ours, theirs, axis=-1):
        made = np.sum(theirs, axis=axis)
        saved = made - np.sum(ours, axis=axis)
        # Where nothing is left to save, nothing is saved.
        return 100 * np.divide(
            saved, made, out=np.zeros_like(saved, float), where=made > 0
        )

    test = stats.permutation_test(
        (errors, reference),
        lambda ours, theirs, axis: points(ours, theirs, units, axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=_batch(len(errors)),
        rng=np.random.default_rng(0),
    )
    return Difference(
        float(points(errors, reference, units)),
        *_bootstrap(points, (errors, reference, units), resamples),
        float(reduction(errors, reference)),
        *_bootstrap(reduction, (errors, reference), resamples),
        float(test.pvalue),
    )


def _bootstrap(statistic, data, resamples):
    data = [np.asarray(part, dtype=float) for part in data]
    if len(data[0]) < 2:
        # Of one utterance there is nothing to draw.
        value = float(statistic(*data))
        return value, value
    result = stats.bootstrap(
        data,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        method="percentile",
        batch=_batch(len(data[0])),
        rng=np.random.default_rng(0),
    )
    low, high = result.confidence_interval
    return float(low), float(high)


def _batch(utterances):
    return max(1, _BATCH_ELEMENTS // utterances)
