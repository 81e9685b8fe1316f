"""Teacher frames onto the student's frames, by time and by valid length."""

import math
from fractions import Fraction

import torch

from tutornet_sb.corpora.tokenizer import BLANK
from tutornet_sb.distillation.targets import TeacherTargets, zero_padding
from tutornet_sb.networks.acoustic_model import frame_mask
from tutornet_sb.util.errors import InputError


def align(targets, lengths, frame_period, delay=0.0, frames=None):
    """Put the teacher's targets on the student's frames.

    Frame ``i`` of a model is at time ``i * frame_period``: transforms are
    centred and convolutions padded to "same". With equal periods and no delay,
    frame meets frame. Otherwise

    - hidden states are averaged over the window of the student's frame,
      ``[(j - 1/2) P, (j + 1/2) P)``, each teacher frame by its overlap; for a
      student that is no slower, the window is as wide as a teacher frame, which
      interpolates linearly;
    - posteriors are never averaged, since that would flatten the spikes of CTC.
      A slower student takes, of the teacher frames in its window, one of the
      symbol that lasts for the fewest frames, and of these the one with the
      lowest p(blank). A student that is no slower takes the nearest teacher
      frame (of two, the earlier), but its spike only within half of ``P`` of
      its time, or if the next teacher frame on that side has the same symbol;
      pure blank otherwise. Without a delay, an utterance's last frame chooses
      among all that the teacher has left.

    Posteriors are a target wherever CTC reads from them what it reads from the
    teacher's. ``posterior_mask`` excludes

    - windows with a symbol of the teacher that no frame shows, since another
      one is in its window too, and neighbouring windows of a symbol that the
      teacher repeats, between which there is no frame for a blank;
    - with a delay, the frames of the last ``delay`` seconds: the last symbols
      would lie behind the end, where the student must have emitted them.

    Before the teacher's first and after its last valid frame, that frame is
    repeated, without its spike. Utterances whose durations differ by more than
    both frames and half of the shorter one are an error.

    The lengths are the student's valid frames, ``(batch,)``, `frames` those of
    its padded batch (by default the greatest length), and periods and `delay`
    are in seconds. The targets of a unidirectional student arrive that much
    later: its frame at time ``t`` gets the teacher of ``t - delay``.

    Returns targets on the student's frames, zero on padding. Where nothing
    needs to change, these are the tensors that came in, and no
    ``posterior_mask``.

    Example
    -------
    >>> hidden = torch.tensor([[[0.0], [1.0], [2.0], [3.0]]])
    >>> blank = torch.tensor([[0.9, 0.8, 0.1, 0.9]])
    >>> posteriors = torch.stack([blank, 1 - blank], dim=-1)
    >>> targets = TeacherTargets(hidden, posteriors, torch.tensor([4]), 0.02)
    >>> aligned = align(targets, torch.tensor([2]), 0.04)
    >>> aligned.hidden.flatten().tolist()
    [0.25, 2.0]
    >>> aligned.posteriors[0, :, 1]  # the spike is kept
    tensor([0.1000, 0.9000])
    """
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
    frames = frames or max(ours)
    hidden, posteriors = targets.hidden, targets.posteriors
    is_target = None
    if teacher != student or lag or theirs != ours or hidden.shape[1] != frames:
        last = (targets.lengths.unsqueeze(1) - 1).clamp(min=0)
        index = torch.arange(frames, device=hidden.device)
        ticks = (index * student - lag).expand(len(ours), -1)
        hidden = _average(hidden, ticks, teacher, student, last)
        # Without a CTC head there is no blank, nor any spike.
        if posteriors.shape[-1] > 0:
            # A delayed student must not get the end before its time.
            final = index == lengths.unsqueeze(1) - 1
            posteriors, is_target = _place_spikes(
                posteriors,
                ticks,
                teacher,
                student,
                last,
                index < lengths.unsqueeze(1),
                final & (lag == 0),
            )
            left = (lengths.unsqueeze(1) - 1 - index) * student
            is_target = is_target & (left >= lag)
        else:
            posteriors = posteriors.new_zeros(len(ours), frames, 0)
    if min(ours) < frames:
        mask = frame_mask(lengths, frames)
        hidden = zero_padding(hidden, mask)
        posteriors = zero_padding(posteriors, mask)
    return TeacherTargets(hidden, posteriors, lengths, frame_period, is_target)


def count_symbols(targets):
    """Number of symbols that CTC reads from posteriors that are targets."""
    best = targets.posteriors.argmax(-1)
    mask = frame_mask(targets.lengths, best.shape[1])
    if targets.posterior_mask is not None:
        mask = mask & targets.posterior_mask
    return _starts(best.masked_fill(~mask, BLANK)).sum()


def _check_durations(theirs, ours, teacher, student, their_period, our_period):
    """Refuse utterances whose durations disagree.

    Centred transforms count up to a frame too many, the convolutions of wav2vec
    2.0 up to a frame and 5 ms too few. Half a frame is slack.
    """
    most = 2 * (teacher + student) + min(teacher, student)
    for position, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        difference = abs(their * teacher - our * student)
        if 2 * difference > most:
            raise InputError(
                f"utterance {position} of the batch: the teacher has {their} "
                f"frames ({their * their_period:.3f} s), the student {our} "
                f"({our * our_period:.3f} s). Do both receive the same audio, "
                "and are both frame periods right?"
            )


def _ceil_divide(dividend, divisor):
    return -torch.div(-dividend, divisor, rounding_mode="floor")


def _take(x, index):
    """Pick frames: ``x[b, index[b, j]]``."""
    rows = torch.arange(len(x), device=x.device).unsqueeze(1)
    return x[rows, index]


def _average(hidden, ticks, teacher, student, last):
    """Average over windows, each frame weighted by its overlap.

    A window as wide as a teacher frame interpolates linearly.
    """
    width = max(teacher, student)
    # In halves of a tick. Frame i reaches from (2 i - 1) to (2 i + 1) teacher.
    begin, end = 2 * ticks - width, 2 * ticks + width
    first = torch.div(begin + teacher, 2 * teacher, rounding_mode="floor")
    averaged = 0.0
    for frame in range(-(-width // teacher) + 1):
        index = first + frame
        shared = torch.minimum(end, (2 * index + 1) * teacher)
        shared = shared - torch.maximum(begin, (2 * index - 1) * teacher)
        weight = shared.clamp(min=0).to(hidden.dtype) / (2 * width)
        states = _take(hidden, torch.minimum(index.clamp(min=0), last))
        averaged = averaged + weight.unsqueeze(-1) * states
    return averaged


def _starts(best):
    """Frames at which CTC begins to read a symbol, from the best of each."""
    before = torch.nn.functional.pad(best[:, :-1], (1, 0), value=BLANK)
    return (best != BLANK) & (best != before)


def _place_spikes(posteriors, ticks, teacher, student, last, inside, final):
    """Posteriors on the student's frames, and the frames that are targets.

    ``last`` is each utterance's last teacher frame; ``inside`` and ``final``
    mark valid frames of the student and those that choose among all the rest.
    """
    first, end = _windows(ticks, teacher, student, last, final)
    # Symbols as CTC reads them, numbered from 1, and their frames
    valid = torch.arange(posteriors.shape[1], device=last.device) <= last
    best = posteriors.argmax(-1).masked_fill(~valid, BLANK)
    number = _starts(best).cumsum(1) * (best != BLANK)
    none = torch.nn.functional.pad(torch.zeros_like(number), (0, 1))
    lasting = none.scatter_add(1, number, torch.ones_like(number))
    # A symbol that lasts long may be shown by other windows too.
    rank = torch.where(number > 0, lasting.gather(1, number), valid.shape[1])
    rank = 2 * rank + posteriors[..., BLANK].double()
    # Three student frames hold the longest final window that the check of
    # durations lets through.
    chosen = _least(rank, first, end, 3 * student // teacher + 2)

    # Where a spike is not of the frame's own time, nor on the way to the next
    # frame of the same symbol, there is none.
    symbol, shown = _take(best, chosen), _take(number, chosen)
    late = 2 * (ticks - chosen * teacher)
    beside = torch.minimum((chosen + late.sign()).clamp(min=0), last)
    is_own = (late <= student) & ((late > -student) | final)
    is_own |= (beside != chosen) & (_take(number, beside) == shown)
    blank = torch.zeros_like(posteriors[:1, :1])
    blank[..., BLANK] = 1.0
    placed = _take(posteriors, chosen)
    placed = torch.where(((shown > 0) & ~is_own).unsqueeze(-1), blank, placed)

    # Windows that hold a symbol which none of them shows
    shown = shown * is_own * inside
    is_shown = none.scatter(1, shown, 1).gather(1, number)
    lost = (number > 0) * (1 - is_shown)
    before = lost.cumsum(1) - lost
    crowded = _take(before + lost, end - 1) > _take(before, first)
    # Neighbours that show two symbols as one
    merged = (symbol[:, 1:] == symbol[:, :-1]) & (shown[:, 1:] > shown[:, :-1])
    merged &= shown[:, :-1] > 0
    crowded[:, 1:] |= merged
    crowded[:, :-1] |= merged
    return placed, ~crowded


def _windows(ticks, teacher, student, last, final):
    """First frame of each student frame's window and the one after its end.

    A window as wide as a teacher frame, or less, holds only the nearest.
    """
    width = max(teacher, student)
    # Earlier teacher frames belong to the frame before the last.
    before = torch.where(final, student, width)
    first = _ceil_divide(2 * ticks - before, 2 * teacher)
    end = _ceil_divide(2 * ticks + width, 2 * teacher)
    end = torch.where(final, last + 1, torch.minimum(end, last + 1))
    first = torch.minimum(first.clamp(min=0), last)
    return first, torch.maximum(end, first + 1)


def _least(values, first, end, width):
    """Index of the least value in each window of frames."""
    first, end = first.unsqueeze(-1), end.unsqueeze(-1)
    candidates = first + torch.arange(width, device=values.device)
    outside = candidates >= end
    candidates = torch.where(outside, first, candidates)
    found = _take(values, candidates.flatten(1)).view(candidates.shape)
    best = found.masked_fill(outside, math.inf).argmin(-1, keepdim=True)
    return candidates.gather(-1, best).squeeze(-1)
