"""Teacher frames onto the student's frames, by time and by valid length."""

import math
from fractions import Fraction

import torch

from tutornet_sb.distillation.targets import TeacherTargets
from tutornet_sb.networks.acoustic_model import frame_mask


def align(
    targets, lengths, frame_period, blank_index=0, delay=0.0, frames=None
):
    """Put the teacher's targets on the student's frames.

    Frame ``i`` of a model stands at time ``i * frame_period``: transforms are
    centred and convolutions padded to "same". With equal periods and no delay,
    frame meets frame. Otherwise

    - hidden states are interpolated linearly in time;
    - posteriors are never averaged, for that would flatten the spikes of CTC. A
      student that is no slower takes the nearest teacher frame (of two equally
      near, the earlier). A slower student takes, of the teacher frames in its
      own frame's window ``[(j - 1/2) P, (j + 1/2) P)``, the one least sure of
      blank. Whatever the periods, without a delay an utterance's last frame
      chooses in this way among all that the teacher has left, so that no final
      spike is lost.

    So, without a delay, the student sees every spike of the teacher, but one of
    those that share a window. A symbol repeated in neighbouring windows has
    lost the blank between, and CTC reads it once.

    Before the teacher's first and after its last valid frame, that frame stands
    in; so frames that the student has more than the teacher are repetitions.

    The lengths are read on the host, to check them.

    Arguments
    ---------
    targets : TeacherTargets
        Teacher's targets on its own frames.
    lengths : torch.Tensor
        Student's valid frames, integers of shape ``(batch,)``.
    frame_period : float
        Distance between two of the student's frames (seconds).
    blank_index : int
        Index of the CTC blank.
    delay : float
        How much later the targets arrive (seconds): the student's frame at time
        ``t`` gets the teacher of time ``t - delay``. For students that hear
        only the past.
    frames : int, optional
        Frames of the student's padded batch; by default the greatest length.

    Returns
    -------
    TeacherTargets
        Targets with the student's frames, lengths and frame period, zero on
        padding. Where nothing needs to change, the tensors that came in.

    Raises
    ------
    ValueError
        If teacher and student disagree about the duration of an utterance by
        more than both frames and half of the shorter one, or if an argument is
        out of range.

    Example
    -------
    >>> hidden = torch.tensor([[[0.0], [1.0], [2.0], [3.0]]])
    >>> blank = torch.tensor([[0.9, 0.8, 0.1, 0.9]])
    >>> posteriors = torch.stack([blank, 1 - blank], dim=-1)
    >>> targets = TeacherTargets(hidden, posteriors, torch.tensor([4]), 0.02)
    >>> aligned = align(targets, torch.tensor([2]), 0.04)
    >>> aligned.hidden.flatten().tolist()
    [0.0, 2.0]
    >>> aligned.posteriors[0, :, 1]  # the spike is kept
    tensor([0.1000, 0.9000])
    """
    if delay < 0:
        raise ValueError(f"delay must not be negative, got {delay} seconds")
    if len(lengths) != len(targets.lengths):
        raise ValueError(
            f"the teacher's batch has {len(targets.lengths)} utterances, "
            f"the student's {len(lengths)}"
        )
    # Times in whole ticks, `teacher` of them a teacher frame and `student` a
    # student frame: windows that touch and ties come out exact.
    ratio = Fraction(frame_period / targets.frame_period)
    ratio = ratio.limit_denominator(10_000)
    lag = Fraction(delay / targets.frame_period).limit_denominator(10_000)
    teacher = math.lcm(ratio.denominator, lag.denominator)
    student = int(ratio * teacher)
    lag = int(lag * teacher)

    # Together, since a GPU stops for each reading
    theirs, ours = torch.stack([targets.lengths, lengths]).tolist()
    _check_durations(
        theirs, ours, teacher, student, targets.frame_period, frame_period
    )
    longest = max(ours)
    frames = longest if frames is None else frames
    if frames < longest:
        raise ValueError(f"{frames} frames cannot hold {longest} valid ones")

    hidden, posteriors = targets.hidden, targets.posteriors
    if teacher != student or lag or theirs != ours or hidden.shape[1] != frames:
        last = (targets.lengths.unsqueeze(1) - 1).clamp(min=0)
        index = torch.arange(frames, device=hidden.device)
        ticks = (index * student - lag).expand(len(ours), -1)
        hidden = _interpolate(hidden, ticks, teacher, last)
        # A delayed student must not hear of the end before its time.
        final = (index == lengths.unsqueeze(1) - 1) & (lag == 0)
        first, end = _windows(ticks, teacher, student, last, final)
        # Without a CTC head there is no blank to look at, nor any spike.
        if posteriors.shape[-1] > 0:
            # Three student frames hold the longest final window that the check
            # of durations lets through.
            width = 3 * student // teacher + 2
            blank = posteriors[..., blank_index]
            first = _least_blank(blank, first, end, width)
        posteriors = _take(posteriors, first)
    if min(ours) < frames:
        padding = ~frame_mask(lengths, frames).unsqueeze(-1)
        hidden = hidden.masked_fill(padding, 0.0)
        posteriors = posteriors.masked_fill(padding, 0.0)
    return TeacherTargets(hidden, posteriors, lengths, frame_period)


def _check_durations(theirs, ours, teacher, student, their_period, our_period):
    """Refuse utterances whose durations disagree.

    Centred transforms count a frame that begins before the end (up to a frame
    too many), the convolutions of wav2vec 2.0 only those they hear to their end
    (up to a frame and 5 ms too few). Half a frame is slack.
    """
    most = 2 * (teacher + student) + min(teacher, student)
    for position, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        difference = abs(their * teacher - our * student)
        if 2 * difference > most:
            raise ValueError(
                f"utterance {position} of the batch: the teacher has {their} "
                f"frames ({their * their_period:.3f} s), the student {our} "
                f"({our * our_period:.3f} s). Do both hear the same audio, and "
                "are both frame periods right?"
            )


def _ceil_divide(dividend, divisor):
    return -torch.div(-dividend, divisor, rounding_mode="floor")


def _take(x, index):
    """Pick frames: ``x[b, index[b, j]]``."""
    rows = torch.arange(len(x), device=x.device).unsqueeze(1)
    return x[rows, index]


def _interpolate(hidden, ticks, teacher, last):
    ticks = torch.minimum(ticks.clamp(min=0), last * teacher)
    before = torch.div(ticks, teacher, rounding_mode="floor")
    weight = (ticks - before * teacher).to(hidden.dtype) / teacher
    left = _take(hidden, before)
    right = _take(hidden, torch.minimum(before + 1, last))
    return left.lerp(right, weight.unsqueeze(-1))


def _windows(ticks, teacher, student, last, final):
    """First frame of each student frame's window and the one after its end.

    A window as wide as a teacher frame, or less, holds the nearest alone.
    """
    width = max(teacher, student)
    first = _ceil_divide(2 * ticks - width, 2 * teacher)
    end = _ceil_divide(2 * ticks + width, 2 * teacher)
    end = torch.where(final, last + 1, torch.minimum(end, last + 1))
    first = torch.minimum(first.clamp(min=0), last)
    return first, torch.maximum(end, first + 1)


def _least_blank(blank, first, end, width):
    """Index of the frame least sure of blank in each window of frames."""
    first, end = first.unsqueeze(-1), end.unsqueeze(-1)
    candidates = first + torch.arange(width, device=blank.device)
    outside = candidates >= end
    candidates = torch.where(outside, first, candidates)
    values = _take(blank, candidates.flatten(1)).view(candidates.shape)
    best = values.masked_fill(outside, math.inf).argmin(-1, keepdim=True)
    return candidates.gather(-1, best).squeeze(-1)
