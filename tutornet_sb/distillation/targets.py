"""What a teacher says about a batch, live or from disk."""

from typing import NamedTuple

import torch

from tutornet_sb.util.errors import InputError


class TeacherTargets(NamedTuple):
    """Targets of one batch of utterances.

    Attributes
    ----------
    hidden : torch.Tensor
        Hidden states of the tapped layers, one after another along dim,
        standardised for representation-level distillation,
        ``(batch, frames, dim)``; dim is 0 if none is tapped.
    posteriors : torch.Tensor
        Softmax of the teacher's logits at temperature 1,
        ``(batch, frames, symbols)``; without a CTC head there are 0 symbols.
    lengths : torch.Tensor
        Valid frames of each utterance, integers of shape ``(batch,)``.
    frame_period : float
        Distance between two frames (seconds).
    posterior_mask : torch.Tensor or None
        Frames whose posteriors are a target, boolean ``(batch, frames)``; None
        if all are.
    """

    hidden: torch.Tensor
    posteriors: torch.Tensor
    lengths: torch.Tensor
    frame_period: float
    posterior_mask: torch.Tensor | None = None

    def rows(self, rows):
        """Keep some utterances of the batch.

        Arguments
        ---------
        rows : list of int or slice
            Which.

        Returns
        -------
        TeacherTargets
            Theirs.
        """
        mask = self.posterior_mask
        return self._replace(
            hidden=self.hidden[rows],
            posteriors=self.posteriors[rows],
            lengths=self.lengths[rows],
            posterior_mask=None if mask is None else mask[rows],
        )


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


def require_ctc_head(symbols, who, instead):
    """Refuse a teacher without a CTC head where its posteriors are needed.

    Arguments
    ---------
    symbols : int
        Symbols of the teacher's posteriors.
    who : str
        What needs them.
    instead : str
        What to do.

    Raises
    ------
    ValueError
        If there are no symbols.

    Example
    -------
    >>> require_ctc_head(29, "SKD", "use RKD")
    """
    if symbols == 0:
        raise InputError(
            f"the teacher has no CTC head, whose posteriors {who} needs: "
            f"{instead}"
        )
