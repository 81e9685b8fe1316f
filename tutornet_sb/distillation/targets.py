"""What a teacher says about a batch, live or from disk."""

from typing import NamedTuple

import torch


class TeacherTargets(NamedTuple):
    """Targets of one batch of utterances.

    Attributes
    ----------
    hidden : torch.Tensor
        Hidden states of the tapped layer, ``(batch, frames, dim)``.
    posteriors : torch.Tensor
        Softmax of the teacher's logits at temperature 1,
        ``(batch, frames, symbols)``.
    lengths : torch.Tensor
        Valid frames of each utterance, integers of shape ``(batch,)``.
    frame_period : float
        Distance between two frames (seconds).
    """

    hidden: torch.Tensor
    posteriors: torch.Tensor
    lengths: torch.Tensor
    frame_period: float


def at_least_float32(x):
    """Widen half precision, in which squares and long sums overflow.

    Arguments
    ---------
    x : torch.Tensor
        Of any floating type.

    Returns
    -------
    torch.Tensor
        ``float32`` for half precision, else ``x`` itself.

    Example
    -------
    >>> at_least_float32(torch.zeros(1, dtype=torch.float16)).dtype
    torch.float32
    >>> at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype
    torch.float64
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))
