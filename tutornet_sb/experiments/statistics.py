"""Bootstrap intervals of error rates, and tests whether two models differ.

Each resample draws trainings (seeds) of each model and one set of utterances,
with their errors and their lengths, for all of them (Owen, "The pigeonhole
bootstrap", Annals of Applied Statistics 2007; for utterances alone, Bisani and
Ney, "Bootstrap estimates for confidence intervals in ASR performance
evaluation", ICASSP 2004). So the figures hold for other seeds and utterances of
this kind; with one seed, for that training alone. Of n seeds n - 1 are drawn,
which makes the variance of their mean unbiased (Rao and Wu, "Resampling
inference with complex survey data", JASA 1988). With few seeds intervals are
somewhat too narrow all the same: hence ``SEEDS_FOR_A_CLAIM``. So they are
because utterances of one speaker count as independent (arXiv 1912.09508).
"""

from typing import NamedTuple

import numpy as np

RESAMPLES = 9999
# Seeds of each model, without which a difference is no ground for a claim
SEEDS_FOR_A_CLAIM = 5
# Utterances times resamples computed at a time, by the memory that they take
_BATCH_ELEMENTS = 2_000_000


class Difference(NamedTuple):
    """How a model differs from another on the same utterances."""

    # Error rate less that of the other (percent), and its 95 % interval
    points: float
    low: float
    high: float
    # Errors saved, of those of the other (percent), and their 95 % interval
    reduction: float
    reduction_low: float
    reduction_high: float
    # Twice the share of resamples in which the difference has the other sign or
    # is none; None if a model has one seed
    p_value: float | None


def interval(errors, units, resamples=RESAMPLES):
    """95 % interval of an error rate (percent), over seeds and utterances.

    ``errors`` are of shape ``(seeds, utterances)``, ``units``, the words or
    characters of each utterance, ``(utterances,)``.

    Example
    -------
    >>> interval([[1, 1, 1]], [4, 4, 4])
    (25.0, 25.0)
    """
    made, spoken = _resample([errors], units, resamples)
    return _percentiles(100 * made[0] / spoken)


def difference(errors, reference, units, resamples=RESAMPLES):
    """Compare errors of two models, each ``(its seeds, utterances)``.

    Both were scored on the same utterances, which have ``units`` words each;
    the reference has errors.

    Example
    -------
    >>> found = difference([[0, 1], [1, 0]], [[2, 1], [1, 2]], [4, 4])
    >>> found.points, found.reduction
    (-25.0, 66.66666666666667)
    """
    errors, reference, units = (
        np.asarray(part, dtype=float) for part in (errors, reference, units)
    )
    ours, theirs = errors.mean(0).sum(), reference.mean(0).sum()
    (made, others), spoken = _resample([errors, reference], units, resamples)
    points = 100 * (made - others) / spoken
    # Where nothing is left to save, nothing is saved.
    saved = 100 * np.divide(
        others - made, others, out=np.zeros_like(made), where=others > 0
    )
    return Difference(
        float(100 * (ours - theirs) / units.sum()),
        *_percentiles(points),
        float(100 * (theirs - ours) / theirs),
        *_percentiles(saved),
        _p_value(points) if min(len(errors), len(reference)) > 1 else None,
    )


def holm(p_values):
    """P-values corrected for their number (Holm 1979), in the same order.

    Each is the least level of all tests together at which this one rejects.

    Example
    -------
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, greatest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for place, index in enumerate(order):
        value = (len(p_values) - place) * p_values[index]
        greatest = max(greatest, min(1.0, value))
        corrected[index] = greatest
    return corrected


def _resample(models, units, resamples):
    """Errors of each model, and units, of each resample."""
    models = [np.asarray(errors, dtype=float) for errors in models]
    units = np.asarray(units, dtype=float)
    rng = np.random.default_rng(0)
    number = len(units)
    made = [[] for _ in models]
    spoken = []
    batch = max(1, _BATCH_ELEMENTS // number)
    for begin in range(0, resamples, batch):
        size = min(batch, resamples - begin)
        times = rng.multinomial(number, np.full(number, 1 / number), size)
        times = times.astype(float)
        spoken.append(times @ units)
        for errors, found in zip(models, made, strict=True):
            seeds = len(errors)
            drawn = max(1, seeds - 1)
            share = rng.multinomial(drawn, np.full(seeds, 1 / seeds), size)
            found.append((times @ errors.T * share).sum(1) / drawn)
    return [np.concatenate(found) for found in made], np.concatenate(spoken)


def _percentiles(values):
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def _p_value(differences):
    """Of the bootstrap, two-sided; never 0 (Davison and Hinkley 1997)."""
    worse, better = (differences >= 0).sum(), (differences <= 0).sum()
    one_sided = (1 + min(worse, better)) / (1 + len(differences))
    return float(min(1.0, 2 * one_sided))
