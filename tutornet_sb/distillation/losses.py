"""The losses of both distillation steps and of CTC, one function a formula.

Each formula is a cost per frame. :class:`RepresentationLoss` and
:class:`SoftmaxLoss` compose them with masking, temperature, selection and
tolerance, sum over the valid frames of an utterance and average over the batch,
in float32 or wider.
"""

from functools import partial
from itertools import pairwise

import torch

from tutornet_sb.corpora.tokenizer import BLANK
from tutornet_sb.distillation.frame_weighting import frame_weights
from tutornet_sb.distillation.targets import (
    at_least_float32,
    require_ctc_head,
    zero_padding,
)
from tutornet_sb.distillation.warping import warped_loss
from tutornet_sb.networks.acoustic_model import frame_mask
from tutornet_sb.util.errors import InputError


def representation_loss(h_teacher, h_student, weights):
    """RKD: ``w_t * || h_t^T - P(h_t^S) ||^2 / D_T``.

    TutorNet (arXiv 2008.00671) names the step and the frame weighting; this
    formula is our reading of it. Hidden states, the student's projected, are
    ``(batch, frames, dim)``, weights and the cost ``(batch, frames)``.
    """
    return weights * (h_teacher - h_student).square().mean(-1)


def l2(p, log_q):
    """SKD of TutorNet: ``|| p_t - q_t ||^2``.

    arXiv 2008.00671, as in Inter-KD (arXiv 2211.15075). As for all softmax
    losses, `p` are posteriors of the teacher and `log_q` log-posteriors of the
    student, both ``(..., symbols)``; the cost is ``(...)``.
    """
    return (p - log_q.exp()).square().sum(-1)


def kl(p, log_q, temperature=1.0):
    """``temperature^2 * KL(p_t || q_t)`` in nats (arXiv 1503.02531)."""
    return temperature**2 * (torch.xlogy(p, p) - p * log_q).sum(-1)


def guided(p, log_q, blank=BLANK):
    """Guided CTC: ``1 - q_t(k_t)`` for spikes ``k_t`` of the teacher, else 0.

    Frames where the teacher's best symbol is blank are left to CTC (Kurata and
    Audhkhasi, Guiding CTC posterior spike timings, Interspeech 2019).
    """
    best = p.argmax(-1, keepdim=True)
    missed = 1 - torch.take_along_dim(log_q, best, -1).exp()
    return missed.masked_fill(best == blank, 0.0).squeeze(-1)


# What `skd.loss` names
SOFTMAX_LOSSES = {"l2": l2, "kl": kl, "guided": guided}


def soften(posteriors, temperature):
    """Turn ``softmax(z)`` into ``softmax(z / temperature)``."""
    if temperature == 1:
        return posteriors
    tiny = torch.finfo(posteriors.dtype).tiny
    return torch.softmax(posteriors.clamp(min=tiny).log() / temperature, -1)


def select_frames(p, mask, beside=None):
    """Valid frames within `beside` frames of the teacher's spikes; None: all.

    0 is blank elimination, 1 and more the symmetric selection of arXiv
    2506.01503. `p` is ``(batch, frames, symbols)``, the masks are
    ``(batch, frames)``.
    """
    if beside is None:
        return mask
    spikes = (p.argmax(-1) != BLANK) & mask
    near = torch.nn.functional.max_pool1d(
        spikes.to(p.dtype).unsqueeze(1), 2 * beside + 1, 1, beside
    )
    return near.squeeze(1).bool() & mask


class RepresentationLoss(torch.nn.Module):
    """Representation-level distillation with frame weighting.

    For each utterance, averaged over the batch::

        sum_t w_t * || h_t^T - P(h_t^S) ||^2 / D_T        with sum_t w_t = 1

    where ``h_t^T`` is standardised by dimension (see ``standardisation``), so
    that neither the teacher's scale nor its largest dimensions dominate.

    `weighting` is one of ``FRAME_WEIGHTINGS``; by default ``nonblank``, or
    ``energy`` for a teacher without a CTC head.
    """

    def __init__(self, weighting=None):
        super().__init__()
        self.weighting = weighting

    def forward(self, projected, targets):
        """Loss of projected hidden states, ``(batch, frames, dim)``.

        The ``TeacherTargets`` must be on the student's frames.
        """
        _check_shapes("projected", projected, "hidden", targets.hidden, "dim")
        mask = frame_mask(targets.lengths, projected.shape[1])
        h_teacher = zero_padding(at_least_float32(targets.hidden), mask)
        h_student = zero_padding(at_least_float32(projected), mask)
        weights = frame_weights(targets, self.weighting)
        costs = representation_loss(h_teacher, h_student, weights)
        return costs.sum(1).mean()

    def moments(self, targets):
        """Weighted mean and mean square of the hidden states, ``(dim,)`` each.

        Of all constants the mean ``m`` has the lowest loss,
        ``mean_d (s_d - m_d^2)`` with the mean squares ``s``. Targets must be
        zero on padding.
        """
        weights = frame_weights(targets, self.weighting).unsqueeze(-1)
        hidden = at_least_float32(targets.hidden)
        return tuple(
            (weights * power).sum(1).mean(0)
            for power in (hidden, hidden.square())
        )


class SoftmaxLoss(torch.nn.Module):
    """Softmax-level distillation, frame by frame.

    With ``p = softmax(z / temperature)``, for each utterance, averaged over the
    batch::

        sum_t loss(p_t^T, p_t^S)

    where the loss is one of ``SOFTMAX_LOSSES``. ``l2`` is the default because
    CTC posteriors are spiky and nearly all blank: the divergence explodes where
    the two models spike one frame apart. With a `tolerance` in frames, the sum
    is over the pairs of frames of the cheapest monotone alignment of teacher
    and student that pairs no frames further apart, see :func:`warped_loss`: a
    student may spike that much earlier or later, but may neither omit nor
    insert a spike. With a `selection`, only frames within that distance of the
    teacher's spikes have a cost, see :func:`select_frames`. The guided loss has
    a selection of its own, and no temperature.

    Example
    -------
    >>> from tutornet_sb.distillation.targets import TeacherTargets
    >>> p = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    >>> targets = TeacherTargets(p, p, torch.tensor([2]), 0.02)
    >>> SoftmaxLoss()(torch.zeros(1, 2, 2), targets).item()
    1.0
    """

    def __init__(self, kind="l2", temperature=1.0, tolerance=0, selection=None):
        super().__init__()
        if kind == "guided" and (temperature != 1 or selection is not None):
            raise InputError(
                "the guided loss has only the teacher's spikes, and takes no "
                "temperature and no selection"
            )
        self.frame_loss = SOFTMAX_LOSSES[kind]
        if kind == "kl":
            self.frame_loss = partial(kl, temperature=temperature)
        self.temperature = temperature
        self.tolerance = tolerance
        self.selection = selection

    def forward(self, logits, targets):
        """Loss of the student's logits, ``(batch, frames, symbols)``.

        The ``TeacherTargets`` must be on the student's frames.
        """
        teacher = at_least_float32(targets.posteriors)
        require_ctc_head(
            teacher.shape[-1],
            "softmax-level distillation",
            "distil by rkd only, with stages: [rkd, ctc]",
        )
        _check_shapes("logits", logits, "posteriors", teacher, "symbols")
        mask = frame_mask(targets.lengths, teacher.shape[1])
        # Before the softmax, whose gradient at NaN is NaN whatever comes back
        logits = zero_padding(at_least_float32(logits), mask)
        p = soften(zero_padding(teacher, mask), self.temperature)
        log_q = torch.log_softmax(logits / self.temperature, dim=-1)
        selected = select_frames(p, mask, self.selection)
        if targets.posterior_mask is not None:
            selected = selected & targets.posterior_mask
        costs = warped_loss(
            self.frame_loss, p, log_q, mask, selected, self.tolerance
        )
        return costs.mean()


def _check_shapes(student_name, student, teacher_name, teacher, last):
    if student.shape != teacher.shape:
        raise InputError(
            f"{student_name} {tuple(student.shape)} and the teacher's "
            f"{teacher_name} {tuple(teacher.shape)} differ; both must be "
            f"(batch, frames, {last})"
        )


def frames_needed(tokens):
    """Frames that CTC needs for a transcript, a list of symbols.

    One for every symbol and one for the blank between equal neighbours (Graves
    et al., ICML 2006).

    Example
    -------
    >>> frames_needed([2, 2, 3, 3])
    6
    """
    return len(tokens) + sum(a == b for a, b in pairwise(tokens))


def ctc_loss(logits, tokens, lengths, token_lengths):
    """CTC loss ``-log P(y|x)`` (Graves et al., ICML 2006), mean of utterances.

    One with fewer frames than :func:`frames_needed` counts as 0, as in
    SpeechBrain. Logits of the student are ``(batch, frames, symbols)``, tokens
    padded, ``(batch, tokens)``; lengths are the valid frames and tokens of
    each utterance, integers ``(batch,)``.
    """
    mask = frame_mask(lengths, logits.shape[1])
    logits = zero_padding(at_least_float32(logits), mask)
    losses = torch.nn.functional.ctc_loss(
        torch.log_softmax(logits, dim=-1).transpose(0, 1),
        tokens,
        lengths,
        token_lengths,
        blank=BLANK,
        reduction="none",
        zero_infinity=True,
    )
    return losses.mean()
