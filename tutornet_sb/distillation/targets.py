"""What a teacher returns for a batch, online or from a store."""

from typing import NamedTuple

import torch

from tutornet_sb.util.errors import InputError


class TeacherTargets(NamedTuple):
    """Targets of one batch of utterances.

    ``hidden`` are the hidden states of the tapped layers, concatenated along
    dim and standardised for representation-level distillation,
    ``(batch, frames, dim)``; dim is 0 if none is tapped. ``posteriors`` are the
    softmax of the teacher's logits at temperature 1,
    ``(batch, frames, symbols)``; without a CTC head there are 0 symbols.
    ``lengths`` are valid frames, integers ``(batch,)``; ``frame_period`` is the
    distance between two (seconds). ``posterior_mask``, boolean
    ``(batch, frames)``, marks frames whose posteriors are a target; None if all
    are.
    """

    hidden: torch.Tensor
    posteriors: torch.Tensor
    lengths: torch.Tensor
    frame_period: float
    posterior_mask: torch.Tensor | None = None

    def rows(self, rows):
        """Targets of some utterances, given as a list of indices or a slice."""
        mask = self.posterior_mask
        return self._replace(
            hidden=self.hidden[rows],
            posteriors=self.posteriors[rows],
            lengths=self.lengths[rows],
            posterior_mask=None if mask is None else mask[rows],
        )


def at_least_float32(x):
    """Widen half precision, in which squares and long sums overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def zero_padding(x, mask):
    """Set frames outside a mask to 0, also those that hold NaN."""
    return x.masked_fill(~mask.unsqueeze(-1), 0.0)


def require_ctc_head(symbols, what, remedy):
    """Refuse a teacher without symbols where `what` needs its posteriors."""
    if symbols == 0:
        raise InputError(
            f"the teacher has no CTC head, whose posteriors {what} needs: "
            f"{remedy}"
        )
