"""Frame weighting of representation-level distillation.

TutorNet (arXiv 2008.00671) weights the frames "to which the teacher pays more
attention". A weighting maps targets to raw weights ``(batch, frames)`` from 0
up; :func:`frame_weights` normalises them.
"""

import torch

from tutornet_sb.corpora.tokenizer import BLANK
from tutornet_sb.distillation.targets import at_least_float32, require_ctc_head
from tutornet_sb.networks.acoustic_model import frame_mask


def uniform(targets):
    """``1``: all frames alike."""
    # Of the hidden states' shape, since there may be no posteriors
    hidden = at_least_float32(targets.hidden)
    return hidden.new_ones(hidden.shape[:2])


def energy(targets):
    """``mean_d h_{t,d}^2``, the map of attention transfer (arXiv 1612.03928).

    Of standardised hidden states, it is the distance from the corpus mean.
    """
    return at_least_float32(targets.hidden).square().mean(-1)


def nonblank(targets):
    """``1 - p_t(blank)``; needs a CTC head."""
    require_ctc_head(
        targets.posteriors.shape[-1],
        "frame weighting nonblank",
        "choose uniform or energy",
    )
    # A softmax may round to slightly more than 1.
    return (1 - at_least_float32(targets.posteriors[..., BLANK])).clamp(min=0)


FRAME_WEIGHTINGS = {"uniform": uniform, "energy": energy, "nonblank": nonblank}


def name_weighting(name, symbols):
    """Resolve None: nonblank, or energy for a teacher without symbols."""
    return name or ("nonblank" if symbols else "energy")


def frame_weights(targets, name=None):
    """Weights ``w_t`` that sum to 1 over the valid frames of each utterance.

    `name` is one of ``FRAME_WEIGHTINGS``, or None, see :func:`name_weighting`.
    The weights are ``(batch, frames)``, 0 on padding.

    Example
    -------
    >>> from tutornet_sb.distillation.targets import TeacherTargets
    >>> p = torch.tensor([[[0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]])
    >>> frame_weights(TeacherTargets(p, p, torch.tensor([2]), 0.02))
    tensor([[0.2500, 0.7500, 0.0000]])
    """
    name = name_weighting(name, targets.posteriors.shape[-1])
    raw = FRAME_WEIGHTINGS[name](targets)
    mask = frame_mask(targets.lengths, raw.shape[1])
    raw = raw.masked_fill(~mask, 0.0)
    # Uniform where all raw weights are 0
    raw = torch.where(raw.sum(1, keepdim=True) > 0, raw, mask.to(raw.dtype))
    total = raw.sum(1, keepdim=True)
    return raw / total.clamp(min=torch.finfo(raw.dtype).tiny)
