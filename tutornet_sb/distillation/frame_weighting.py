"""Which frames matter in representation-level distillation.

TutorNet (arXiv 2008.00671) weights the frames "to which the teacher pays more
attention" in its first step only. Each weighting here maps the teacher's
targets to non-negative weights ``(batch, frames)`` that sum to 1 over the valid
frames of each utterance and are 0 on padding. All are called alike, as
``weighting(targets, blank_index)``.
"""

import torch

from tutornet_sb.distillation.targets import at_least_float32, require_ctc_head
from tutornet_sb.networks.acoustic_model import frame_mask
from tutornet_sb.util.errors import InputError


def _normalize(raw, lengths):
    mask = frame_mask(lengths, raw.shape[1])
    raw = raw.masked_fill(~mask, 0.0)
    # Where the teacher points at no frame at all, every frame is as good.
    raw = torch.where(raw.sum(1, keepdim=True) > 0, raw, mask.to(raw.dtype))
    total = raw.sum(1, keepdim=True)
    return raw / total.clamp(min=torch.finfo(raw.dtype).tiny)


def uniform(targets, blank_index=0):
    """Weight all frames alike: ``1``, normalised.

    Arguments
    ---------
    targets : TeacherTargets
        Targets of the batch.
    blank_index : int
        Not used.

    Returns
    -------
    torch.Tensor
        Weights ``(batch, frames)``.

    Example
    -------
    >>> from tutornet_sb.distillation.targets import TeacherTargets
    >>> p = torch.ones(1, 3, 1)
    >>> uniform(TeacherTargets(p, p, torch.tensor([2]), 0.02))
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    # A teacher without a CTC head has no symbol to take the shape from.
    hidden = targets.hidden
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    raw = hidden.new_ones(hidden.shape[:2], dtype=dtype)
    return _normalize(raw, targets.lengths)


def energy(targets, blank_index=0):
    """Weight frames by activity: ``mean_d h_{t,d}^2``, normalised.

    The map of attention transfer (arXiv 1612.03928), over frames. Of
    standardised hidden states, it is the distance from the mean of the corpus.

    Arguments
    ---------
    targets : TeacherTargets
        Targets of the batch.
    blank_index : int
        Not used.

    Returns
    -------
    torch.Tensor
        Weights ``(batch, frames)``.

    Example
    -------
    >>> from tutornet_sb.distillation.targets import TeacherTargets
    >>> h = torch.tensor([[[1.0, 1.0], [3.0, 3.0]]])
    >>> energy(TeacherTargets(h, h, torch.tensor([2]), 0.02))
    tensor([[0.1000, 0.9000]])
    """
    raw = at_least_float32(targets.hidden).square().mean(-1)
    return _normalize(raw, targets.lengths)


def nonblank(targets, blank_index=0):
    """Weight frames by the teacher's symbols: ``1 - p_t(blank)``, normalised.

    Arguments
    ---------
    targets : TeacherTargets
        Targets of the batch.
    blank_index : int
        Index of the CTC blank.

    Returns
    -------
    torch.Tensor
        Weights ``(batch, frames)``.

    Raises
    ------
    ValueError
        If the teacher has no CTC head.

    Example
    -------
    >>> from tutornet_sb.distillation.targets import TeacherTargets
    >>> p = torch.tensor([[[0.75, 0.25], [0.25, 0.75]]])
    >>> nonblank(TeacherTargets(p, p, torch.tensor([2]), 0.02))
    tensor([[0.2500, 0.7500]])
    """
    require_ctc_head(
        targets.posteriors.shape[-1],
        "frame weighting nonblank",
        "choose uniform or energy",
    )
    blank = at_least_float32(targets.posteriors[..., blank_index])
    # A softmax may round to slightly more than 1.
    return _normalize((1 - blank).clamp(min=0), targets.lengths)


FRAME_WEIGHTINGS = {
    "uniform": uniform,
    "energy": energy,
    "nonblank": nonblank,
}


def _default(targets, blank_index=0):
    name = name_weighting(_default, targets.posteriors.shape[-1])
    return FRAME_WEIGHTINGS[name](targets, blank_index)


def name_weighting(weighting, symbols):
    """Name a frame weighting as it is for a teacher.

    Arguments
    ---------
    weighting : callable
        From :func:`get_frame_weighting`.
    symbols : int
        Of the teacher's targets, 0 without a CTC head.

    Returns
    -------
    str
        One of ``FRAME_WEIGHTINGS``.

    Example
    -------
    >>> name_weighting(get_frame_weighting(None), 29)
    'nonblank'
    """
    if weighting is _default:
        return "nonblank" if symbols else "energy"
    return weighting.__name__


def get_frame_weighting(name):
    """Look a frame weighting up by its name.

    Arguments
    ---------
    name : str or None
        One of ``FRAME_WEIGHTINGS``. None is ``nonblank`` by a teacher with a
        CTC head, and ``energy`` by another.

    Returns
    -------
    callable
        Called as ``weighting(targets, blank_index)``.

    Raises
    ------
    ValueError
        If there is no weighting of that name.

    Example
    -------
    >>> get_frame_weighting("energy").__name__
    'energy'
    """
    if name is None:
        return _default
    if name not in FRAME_WEIGHTINGS:
        known = ", ".join(FRAME_WEIGHTINGS)
        raise InputError(f"no frame weighting {name!r}; choose from: {known}")
    return FRAME_WEIGHTINGS[name]
