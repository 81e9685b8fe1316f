"""The losses of both distillation steps and of the original task.

All are masked, summed over the valid frames of each utterance and averaged
over the batch, and computed in float32 or wider whatever comes in.
"""

import torch

from tutornet_sb.distillation.frame_weighting import get_frame_weighting
from tutornet_sb.distillation.targets import at_least_float32, require_ctc_head
from tutornet_sb.networks.acoustic_model import frame_mask


def _check_shapes(student_name, student, teacher_name, teacher, last):
    if student.shape != teacher.shape:
        raise ValueError(
            f"{student_name} {tuple(student.shape)} and the teacher's "
            f"{teacher_name} {tuple(teacher.shape)} differ; both must be "
            f"(batch, frames, {last})"
        )


class RepresentationLoss(torch.nn.Module):
    """Representation-level distillation with frame weighting.

    For each utterance, averaged over the batch::

        sum_t w_t * || norm(h_t^T) - P(h_t^S) ||^2 / D_T

    where ``norm`` is layer normalisation without parameters, so that the scale
    of the teacher does not set the scale of the loss, and the weights ``w_t``
    are taken from the teacher before it. TutorNet (arXiv 2008.00671) names
    the step and the weighting; this formula is our reading of it.

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
    >>> hidden = torch.tensor([[[1.0, -1.0], [9.0, -9.0]]])
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
        teacher = torch.nn.functional.layer_norm(teacher, teacher.shape[-1:])
        mask = frame_mask(targets.lengths, teacher.shape[1])
        difference = teacher - at_least_float32(projected)
        # Filling, not multiplying by zero: padding may hold NaN.
        difference = difference.masked_fill(~mask.unsqueeze(-1), 0.0)
        weights = self.weighting(targets, self.blank_index)
        return (weights * difference.square().mean(-1)).sum(1).mean()


class SoftmaxLoss(torch.nn.Module):
    """Softmax-level distillation, frame by frame.

    With ``p = softmax(z / temperature)``, for each utterance, averaged over the
    batch::

        l2:      sum_t || p_t^T - p_t^S ||^2                (arXiv 2211.15075)
        kl:      temperature^2 * sum_t KL(p_t^T || p_t^S)   (arXiv 1503.02531)
        guided:  sum of 1 - p_t^S(k_t) over the frames t where the teacher's
                 best symbol k_t is not blank     (Kurata and Audhkhasi, 2019)

    ``l2`` is the default because CTC posteriors are spiky and nearly all blank:
    the divergence explodes where the two models spike one frame apart.
    ``guided`` asks for the teacher's spikes, and lets others be. With a
    tolerance, each frame of the teacher is compared with that of the student,
    among its own and so many before and after it, to which it is nearest.
    With a selection, the sum is over a part of the frames t alone: those where
    the teacher's best symbol is not blank, and so many on each side of them. 0
    is blank elimination, 1 and more the symmetric selection of arXiv
    2506.01503.

    Arguments
    ---------
    kind : str
        ``l2``, ``kl`` (nats) or ``guided``.
    temperature : float
        Softens both distributions if greater than 1; not for ``guided``.
    tolerance : int
        Frames by which the student may spike earlier or later.
    blank_index : int
        Index of the CTC blank, for ``guided`` and a selection.
    selection : int, optional
        Frames on each side of the teacher's spikes that are learnt too; all
        frames by default. Not for ``guided``, which has one of its own.

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
        if kind not in ("l2", "kl", "guided"):
            raise ValueError(f"kind must be l2, kl or guided, got {kind!r}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if kind == "guided" and temperature != 1:
            raise ValueError(
                f"temperature is not for the guided loss, got {temperature}"
            )
        if kind == "guided" and selection is not None:
            raise ValueError(
                "the guided loss learns the teacher's spikes alone, and takes "
                f"no selection, got {selection}"
            )
        frames_of = {"tolerance": tolerance, "selection": selection or 0}
        for name, frames in frames_of.items():
            if not isinstance(frames, int) or frames < 0:
                raise ValueError(
                    f"{name} must be a number of frames, got {frames!r}"
                )
        self.kind = kind
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
        teacher = self._soften(teacher.masked_fill(padding, 0.0))
        normalise = torch.log_softmax if self.kind == "kl" else torch.softmax
        student = normalise(logits / self.temperature, dim=-1)
        if self.tolerance:
            student = self._nearest(teacher, student, mask)
        terms = self._distance(teacher, student)
        if self.selection is not None:
            mask = mask & self._selected(teacher, mask)
        return terms.masked_fill(~mask, 0.0).sum(1).mean()

    def _selected(self, teacher, mask):
        """Frames of the teacher's spikes, and those beside them."""
        spikes = (teacher.argmax(-1) != self.blank_index) & mask
        if self.selection == 0:
            return spikes
        near = torch.nn.functional.max_pool1d(
            spikes.to(teacher.dtype).unsqueeze(1),
            2 * self.selection + 1,
            stride=1,
            padding=self.selection,
        )
        return near.squeeze(1) > 0

    def _nearest(self, teacher, student, mask):
        """Of the student's frames within the tolerance the nearest ones.

        They are chosen first, so that gradients go through these alone.
        """
        batch, frames = mask.shape
        most = min(self.tolerance, frames - 1)
        distances = teacher.new_full((2 * most + 1, batch, frames), torch.inf)
        with torch.no_grad():
            for shift, found in zip(
                range(-most, most + 1), distances, strict=True
            ):
                here = slice(max(0, -shift), frames - max(0, shift))
                there = slice(max(0, shift), frames - max(0, -shift))
                found[:, here] = self._distance(
                    teacher[:, here], student[:, there]
                )
                if shift > 0:
                    found[:, here].masked_fill_(~mask[:, there], torch.inf)
        index = torch.arange(batch * frames, device=mask.device)
        index += distances.min(0).indices.flatten() - most
        return student.flatten(0, 1).index_select(0, index).view_as(student)

    def _distance(self, teacher, student):
        """Of posteriors (for KL, the student's logarithms), frame by frame."""
        if self.kind == "l2":
            return (teacher - student).square().sum(-1)
        if self.kind == "kl":
            terms = torch.xlogy(teacher, teacher) - teacher * student
            return self.temperature**2 * terms.sum(-1)
        best = teacher.argmax(-1, keepdim=True)
        missed = 1 - student.gather(-1, best)
        return (missed * (best != self.blank_index)).squeeze(-1)

    def _soften(self, posteriors):
        """Turn ``softmax(z)`` into ``softmax(z / temperature)``."""
        if self.temperature == 1:
            return posteriors
        tiny = torch.finfo(posteriors.dtype).tiny
        logs = posteriors.clamp(min=tiny).log()
        return torch.softmax(logs / self.temperature, dim=-1)


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
        find such utterances before training.

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
