"""The losses of both distillation steps and of the original task.

All are masked, summed over the valid frames of each utterance and averaged
over the batch, and computed in float32 or wider whatever comes in.
"""

from functools import partial

import torch

from tutornet_sb.distillation.frame_weighting import get_frame_weighting
from tutornet_sb.distillation.targets import at_least_float32, require_ctc_head
from tutornet_sb.distillation.warping import around, changes, warped_sum
from tutornet_sb.networks.acoustic_model import frame_mask
from tutornet_sb.util.errors import InputError


def _check_shapes(student_name, student, teacher_name, teacher, last):
    if student.shape != teacher.shape:
        raise InputError(
            f"{student_name} {tuple(student.shape)} and the teacher's "
            f"{teacher_name} {tuple(teacher.shape)} differ; both must be "
            f"(batch, frames, {last})"
        )


class RepresentationLoss(torch.nn.Module):
    """Representation-level distillation with frame weighting.

    For each utterance, averaged over the batch::

        sum_t w_t * || h_t^T - P(h_t^S) ||^2 / D_T

    where ``h_t^T`` is standardised by dimension (see ``standardisation``), so
    that neither the teacher's scale nor its largest dimensions set the loss.
    TutorNet (arXiv 2008.00671) names the step and the weighting; this formula
    is our reading of it.

    Arguments
    ---------
    weighting : str, optional
        Frame weighting, one of ``frame_weighting.FRAME_WEIGHTINGS``; by
        default ``nonblank``, or ``energy`` where the teacher has no CTC head.
    blank_index : int
        Index of the CTC blank, for the weighting.

    Example
    -------
    >>> from tutornet_sb.distillation.targets import TeacherTargets
    >>> hidden = torch.tensor([[[1.0, -1.0], [9.0, 9.0]]])
    >>> p = torch.tensor([[[0.9, 0.1], [0.0, 1.0]]])
    >>> targets = TeacherTargets(hidden, p, torch.tensor([1]), 0.02)
    >>> loss = RepresentationLoss()(torch.zeros(1, 2, 2), targets)
    >>> round(loss.item(), 3)
    1.0
    """

    def __init__(self, weighting=None, blank_index=0):
        super().__init__()
        self.weighting = get_frame_weighting(weighting)
        self.blank_index = blank_index

    def forward(self, projected, targets):
        """Compute the loss.

        Arguments
        ---------
        projected : torch.Tensor
            Student's hidden states after the projector,
            ``(batch, frames, dim)``.
        targets : TeacherTargets
            Teacher's targets on the student's frames.

        Returns
        -------
        torch.Tensor
            Scalar.

        Raises
        ------
        ValueError
            If the shapes of student and teacher differ.
        """
        teacher = at_least_float32(targets.hidden)
        _check_shapes("projected", projected, "hidden", teacher, "dim")
        mask = frame_mask(targets.lengths, teacher.shape[1])
        difference = teacher - at_least_float32(projected)
        # Filling, not multiplying by zero: padding may hold NaN.
        difference = difference.masked_fill(~mask.unsqueeze(-1), 0.0)
        weights = self.weighting(targets, self.blank_index)
        return (weights * difference.square().mean(-1)).sum(1).mean()

    def moments(self, targets):
        """Weighted mean and mean square of the teacher's hidden states.

        Of all constants the mean ``m`` costs least: ``mean_d (s_d - m_d^2)``
        with the mean squares ``s``.

        Arguments
        ---------
        targets : TeacherTargets
            Teacher's targets, zero on padding.

        Returns
        -------
        mean, square : torch.Tensor
            Averaged over the batch, ``(dim,)``.
        """
        weights = self.weighting(targets, self.blank_index).unsqueeze(-1)
        hidden = at_least_float32(targets.hidden)
        return tuple(
            (weights * power).sum(1).mean(0)
            for power in (hidden, hidden.square())
        )


def l2(p, log_q, temperature=1.0, blank_index=0):
    """Squared distance of posteriors: ``|| p_t - q_t ||^2``.

    The SKD loss of TutorNet (arXiv 2008.00671), as in Inter-KD (arXiv
    2211.15075).

    Arguments
    ---------
    p : torch.Tensor
        Posteriors of the teacher, ``(..., symbols)``.
    log_q : torch.Tensor
        Log-posteriors of the student, ``(..., symbols)``.
    temperature : float
        Not used.
    blank_index : int
        Not used.

    Returns
    -------
    torch.Tensor
        ``(...)``.

    Example
    -------
    >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    >>> l2(p, q.log()).item()
    0.5
    """
    return (p - log_q.exp()).square().sum(-1)


def kl(p, log_q, temperature=1.0, blank_index=0):
    """Divergence ``temperature^2 * KL(p_t || q_t)`` (arXiv 1503.02531).

    Arguments
    ---------
    p : torch.Tensor
        Posteriors of the teacher, ``(..., symbols)``.
    log_q : torch.Tensor
        Log-posteriors of the student, ``(..., symbols)``.
    temperature : float
        By which both were softened.
    blank_index : int
        Not used.

    Returns
    -------
    torch.Tensor
        Nats, ``(...)``.

    Example
    -------
    >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    >>> round(kl(p, q.log()).item(), 4)
    0.6931
    """
    return temperature**2 * (torch.xlogy(p, p) - p * log_q).sum(-1)


def guided(p, log_q, temperature=1.0, blank_index=0):
    """Guided CTC: ``1 - q_t(k_t)`` for spikes ``k_t`` of the teacher, else 0.

    Frames where the teacher's best symbol is blank are left to CTC (Kurata and
    Audhkhasi, Guiding CTC posterior spike timings, Interspeech 2019).

    Arguments
    ---------
    p : torch.Tensor
        Posteriors of the teacher, ``(..., symbols)``.
    log_q : torch.Tensor
        Log-posteriors of the student, ``(..., symbols)``.
    temperature : float
        Not used.
    blank_index : int
        Index of the CTC blank.

    Returns
    -------
    torch.Tensor
        ``(...)``.

    Example
    -------
    >>> p, q = torch.tensor([0.2, 0.8]), torch.tensor([0.5, 0.5])
    >>> guided(p, q.log()).item(), guided(p.flip(0), q.log()).item()
    (0.5, 0.0)
    """
    best = p.argmax(-1, keepdim=True)
    missed = 1 - torch.take_along_dim(log_q, best, -1).exp()
    return missed.masked_fill(best == blank_index, 0.0).squeeze(-1)


SOFTMAX_LOSSES = {"l2": l2, "kl": kl, "guided": guided}


def soften(posteriors, temperature):
    """Turn ``softmax(z)`` into ``softmax(z / temperature)``.

    Arguments
    ---------
    posteriors : torch.Tensor
        ``(..., symbols)``.
    temperature : float
        More than 1 for a flatter distribution.

    Returns
    -------
    torch.Tensor
        Of the same shape.

    Example
    -------
    >>> soften(torch.tensor([0.8, 0.2]), 2.0)
    tensor([0.6667, 0.3333])
    """
    if temperature == 1:
        return posteriors
    tiny = torch.finfo(posteriors.dtype).tiny
    return torch.softmax(posteriors.clamp(min=tiny).log() / temperature, -1)


def select(p, mask, beside, blank_index=0):
    """Select the frames of the teacher's spikes and those beside them.

    With 0, blank elimination; with 1 and more, the symmetric selection of
    arXiv 2506.01503.

    Arguments
    ---------
    p : torch.Tensor
        Posteriors of the teacher, ``(batch, frames, symbols)``.
    mask : torch.Tensor
        Valid frames, ``(batch, frames)``.
    beside : int
        Frames on each side of a spike.
    blank_index : int
        Index of the CTC blank.

    Returns
    -------
    torch.Tensor
        Boolean mask ``(batch, frames)``.

    Example
    -------
    >>> p = torch.eye(2)[[0, 0, 1, 0]].unsqueeze(0)
    >>> select(p, torch.ones(1, 4, dtype=torch.bool), 1).int().tolist()
    [[0, 1, 1, 1]]
    """
    spikes = (p.argmax(-1) != blank_index) & mask
    near = torch.nn.functional.max_pool1d(
        spikes.to(p.dtype).unsqueeze(1), 2 * beside + 1, 1, beside
    )
    return near.squeeze(1).bool() & mask


class SoftmaxLoss(torch.nn.Module):
    """Softmax-level distillation, frame by frame.

    With ``p = softmax(z / temperature)``, for each utterance, averaged over the
    batch::

        sum_t loss(p_t^T, p_t^S)

    where the loss is one of ``SOFTMAX_LOSSES``. ``l2`` is the default because
    CTC posteriors are spiky and nearly all blank: the divergence explodes where
    the two models spike one frame apart. With a tolerance, the sum is over the
    pairs of frames of the cheapest monotone alignment of teacher and student
    that pairs no frames further apart, see :func:`warped_sum`: a student may
    spike that much earlier or later, but may neither leave a spike out nor
    insert one. Frames without a target, and with a selection those outside it,
    cost nothing with any frame of the student.

    Arguments
    ---------
    kind : str
        One of ``SOFTMAX_LOSSES``.
    temperature : float
        Softens both distributions if greater than 1; not for ``guided``.
    tolerance : int
        Frames by which the student may spike earlier or later.
    blank_index : int
        Index of the CTC blank, for ``guided`` and a selection.
    selection : int, optional
        Frames on each side of the teacher's spikes that are learnt too, see
        :func:`select`; all frames by default. Not for ``guided``, which has one
        of its own.

    Example
    -------
    >>> from tutornet_sb.distillation.targets import TeacherTargets
    >>> p = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    >>> targets = TeacherTargets(p, p, torch.tensor([2]), 0.02)
    >>> SoftmaxLoss()(torch.zeros(1, 2, 2), targets).item()
    1.0
    >>> round(SoftmaxLoss("kl")(torch.zeros(1, 2, 2), targets).item(), 4)
    1.3863
    """

    def __init__(
        self,
        kind="l2",
        temperature=1.0,
        tolerance=0,
        blank_index=0,
        selection=None,
    ):
        super().__init__()
        if kind not in SOFTMAX_LOSSES:
            raise InputError(
                f"kind must be one of {', '.join(SOFTMAX_LOSSES)}, got {kind!r}"
            )
        if temperature <= 0:
            raise InputError(f"temperature must be positive, got {temperature}")
        if kind == "guided" and temperature != 1:
            raise InputError(
                f"temperature is not for the guided loss, got {temperature}"
            )
        if kind == "guided" and selection is not None:
            raise InputError(
                "the guided loss learns the teacher's spikes alone, and takes "
                f"no selection, got {selection}"
            )
        frames_of = {"tolerance": tolerance, "selection": selection or 0}
        for name, frames in frames_of.items():
            if not isinstance(frames, int) or frames < 0:
                raise InputError(
                    f"{name} must be a number of frames, got {frames!r}"
                )
        self.frame_loss = partial(
            SOFTMAX_LOSSES[kind],
            temperature=temperature,
            blank_index=blank_index,
        )
        self.temperature = temperature
        self.tolerance = tolerance
        self.blank_index = blank_index
        self.selection = selection

    def forward(self, logits, targets):
        """Compute the loss.

        Arguments
        ---------
        logits : torch.Tensor
            Student's scores before the softmax, ``(batch, frames, symbols)``.
        targets : TeacherTargets
            Teacher's targets on the student's frames.

        Returns
        -------
        torch.Tensor
            Scalar.

        Raises
        ------
        ValueError
            If the teacher has no CTC head, or if the shapes of student and
            teacher differ.
        """
        teacher = at_least_float32(targets.posteriors)
        require_ctc_head(
            teacher.shape[-1],
            "softmax-level distillation",
            "let it teach by rkd alone, with stages: [rkd, ctc]",
        )
        _check_shapes("logits", logits, "posteriors", teacher, "symbols")
        mask = frame_mask(targets.lengths, teacher.shape[1])
        padding = ~mask.unsqueeze(-1)
        # Filled before the softmax too: the gradient of a softmax of NaN is
        # NaN even where nothing comes back to it.
        logits = at_least_float32(logits).masked_fill(padding, 0.0)
        teacher = teacher.masked_fill(padding, 0.0)

        p = soften(teacher, self.temperature)
        log_q = torch.log_softmax(logits / self.temperature, dim=-1)
        # Each teacher frame against the student's frames around it
        costs = self.frame_loss(p.unsqueeze(2), around(log_q, self.tolerance))
        there = around(mask, self.tolerance)
        # Blanks that are optional, each compared with a sure one
        optional = changes(p, mask, self.blank_index)
        blank = torch.zeros_like(p[:1, :1])
        blank[..., self.blank_index] = 1.0
        inserted = around(self.frame_loss(blank, log_q), self.tolerance)
        inserted = inserted.masked_fill(~optional.unsqueeze(-1), torch.inf)
        tiny = torch.finfo(p.dtype).tiny
        dropped = self.frame_loss(blank, p.clamp(min=tiny).log())
        optional &= p.argmax(-1) == self.blank_index
        dropped = dropped.masked_fill(~optional, torch.inf)

        learnt = mask
        if targets.posterior_mask is not None:
            learnt = learnt & targets.posterior_mask
        if self.selection is not None:
            spikes = select(p, mask, self.selection, self.blank_index)
            learnt = learnt & spikes
        costs = costs.masked_fill(~learnt.unsqueeze(-1), 0.0)
        return warped_sum(
            costs.masked_fill(~there, torch.inf),
            inserted.masked_fill(~there, torch.inf),
            dropped,
            mask,
        ).mean()


def frames_needed(tokens, token_lengths):
    """Count the frames that CTC needs for transcripts.

    One for every symbol and one for the blank between equal neighbours (Graves
    et al., ICML 2006).

    Arguments
    ---------
    tokens : torch.Tensor
        Transcripts, padded integers of shape ``(batch, tokens)``.
    token_lengths : torch.Tensor
        Valid tokens of each transcript, integers of shape ``(batch,)``.

    Returns
    -------
    torch.Tensor
        Frames, integers of shape ``(batch,)``.

    Example
    -------
    >>> frames_needed(torch.tensor([[2, 2, 3, 3]]), torch.tensor([3]))
    tensor([4])
    """
    equal = tokens[:, 1:] == tokens[:, :-1]
    mask = frame_mask(token_lengths, tokens.shape[1])[:, 1:]
    return token_lengths + (equal & mask).sum(dim=1)


def ctc_loss(logits, tokens, lengths, token_lengths, blank_index=0):
    """Compute the CTC loss of the original task.

    Arguments
    ---------
    logits : torch.Tensor
        Student's scores before the softmax, ``(batch, frames, symbols)``.
    tokens : torch.Tensor
        Transcripts, padded integers of shape ``(batch, tokens)``.
    lengths : torch.Tensor
        Valid frames of each utterance, integers of shape ``(batch,)``.
    token_lengths : torch.Tensor
        Valid tokens of each transcript, integers of shape ``(batch,)``.
    blank_index : int
        Index of the blank.

    Returns
    -------
    torch.Tensor
        Scalar: nats of an utterance, averaged over the batch. An utterance
        with too few frames for its transcript counts as 0, as in SpeechBrain;
        :func:`frames_needed` tells which those are.

    Example
    -------
    >>> logits = torch.zeros(1, 2, 2)
    >>> one = torch.tensor([1])
    >>> loss = ctc_loss(logits, one.unsqueeze(0), 2 * one, one)
    >>> round(loss.exp().item(), 4)  # three of the four paths
    1.3333
    """
    mask = frame_mask(lengths, logits.shape[1]).unsqueeze(-1)
    logits = at_least_float32(logits).masked_fill(~mask, 0.0)
    losses = torch.nn.functional.ctc_loss(
        torch.log_softmax(logits, dim=-1).transpose(0, 1),
        tokens,
        lengths,
        token_lengths,
        blank=blank_index,
        reduction="none",
        zero_infinity=True,
    )
    return losses.mean()
