"""Alignment against a plain loop in whole milliseconds and float64."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tutornet_sb.distillation.alignment import align, count_symbols
from tutornet_sb.distillation.targets import TeacherTargets
from tutornet_sb.networks.acoustic_model import frame_mask

BLANK = 0
PERIODS = (10, 20, 30, 40, 80)
PAIRS = list(itertools.product(PERIODS, PERIODS))
SECONDS = (1.03, 0.06, 0.5)


def frames_of(seconds, period):
    """Frames of an utterance, as a centred transform counts them."""
    return [int(s * 1000) // period + 1 for s in seconds]


def random_targets(seed, lengths, period, dim=3, symbols=4, padding=0.0):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + 2)
    hidden = torch.randn(*shape, dim, generator=generator)
    posteriors = torch.randn(*shape, symbols, generator=generator)
    posteriors = (3 * posteriors).softmax(-1)
    for b, length in enumerate(lengths):
        hidden[b, length:] = padding
        posteriors[b, length:] = padding
    return TeacherTargets(
        hidden, posteriors, torch.tensor(lengths), period / 1000
    )


def averaged(hidden, t, theirs, ours):
    """Teacher's hidden states over the window around ``t`` milliseconds."""
    width = max(theirs, ours)
    begin, end = t - Fraction(width, 2), t + Fraction(width, 2)
    total = 0.0
    # Before and after the utterance, its first and last frame stand in.
    for i in range(int(begin // theirs) - 1, int(end // theirs) + 3):
        shared = min(end, (i + Fraction(1, 2)) * theirs) - max(
            begin, (i - Fraction(1, 2)) * theirs
        )
        state = hidden[min(max(i, 0), len(hidden) - 1)]
        total = total + float(max(0, shared) / Fraction(width)) * state
    return total


def window_of(count, t, theirs, ours, delay, is_last):
    """Teacher's frames for the student's frame at ``t`` milliseconds."""
    indices = range(count)
    if ours <= theirs:
        window = [min(indices, key=lambda i: (abs(i * theirs - t), i))]
    else:
        window = [i for i in indices if -ours <= 2 * (i * theirs - t) < ours]
    if is_last and delay == 0:
        window = [i for i in indices if -ours <= 2 * (i * theirs - t)]
    if not window:
        window = [0 if t < 0 else count - 1]
    return window


def place(posteriors, length, theirs, ours, delay):
    """Teacher's posteriors on the student's frames, and which are targets."""
    best = posteriors.argmax(-1).tolist()
    # Frames of each symbol that CTC reads
    symbols, at = {}, 0
    for symbol, group in itertools.groupby(best):
        frames = range(at, at := at + len(list(group)))
        if symbol != BLANK:
            symbols |= dict.fromkeys(frames, frames)
    rows, read, held = [], [], []
    for j in range(length):
        t, is_last = j * ours - delay, j == length - 1
        window = window_of(len(best), t, theirs, ours, delay, is_last)
        spiking = [i for i in window if i in symbols]
        i = min(
            spiking or window,
            key=lambda i: (
                len(symbols.get(i, ())),
                posteriors[i, BLANK].item(),
                i,
            ),
        )
        row = posteriors[i]
        if i in symbols:
            after = 2 * (t - i * theirs)
            on_time = -ours < after <= ours
            if is_last and delay == 0:
                on_time = after <= ours
            next_one = i + (after > 0) - (after < 0)
            if not on_time and (next_one == i or next_one not in symbols[i]):
                row = torch.eye(len(row))[BLANK]
                i = None
        rows.append(row)
        read.append(symbols.get(i))
        held.append({symbols[i] for i in spiking})
    is_target = [
        symbols <= set(read) and j <= length - 1 - delay / ours
        for j, symbols in enumerate(held)
    ]
    for j, (one, other) in enumerate(itertools.pairwise(read)):
        if one and other and one != other and best[one[0]] == best[other[0]]:
            is_target[j] = is_target[j + 1] = False
    return torch.stack(rows), is_target


def reference(targets, theirs, lengths, ours, delay=0, frames=None):
    frames = frames or max(lengths)
    hidden, posteriors = (
        torch.zeros(len(lengths), frames, x.shape[2], dtype=torch.float64)
        for x in targets[:2]
    )
    is_target = torch.zeros(len(lengths), frames, dtype=torch.bool)
    for b, length in enumerate(lengths):
        valid = targets.lengths[b].item()
        states = targets.hidden[b, :valid].double()
        for j in range(length):
            hidden[b, j] = averaged(states, j * ours - delay, theirs, ours)
        rows, known = place(
            targets.posteriors[b, :valid], length, theirs, ours, delay
        )
        posteriors[b, :length] = rows
        is_target[b, :length] = torch.tensor(known)
    # Selected, so the same to the last bit.
    return (
        hidden.to(targets.hidden.dtype),
        posteriors.to(targets.posteriors.dtype),
        is_target,
    )


def targets_of(aligned):
    """Valid frames whose posteriors are a target."""
    valid = frame_mask(aligned.lengths, aligned.posteriors.shape[1])
    if aligned.posterior_mask is None:
        return valid
    return valid & aligned.posterior_mask


PERIOD = st.one_of(st.sampled_from(PERIODS), st.integers(5, 90))
NONE = st.just(0)
DELAY = st.one_of(NONE, st.integers(0, 150))


@st.composite
def meetings(draw, delay=DELAY):
    """Teacher's and student's periods and lengths, which nearly agree."""
    theirs, ours = draw(PERIOD), draw(PERIOD)
    durations = draw(st.lists(st.integers(0, 500), min_size=1, max_size=3))
    counts = [
        [
            max(1, ms // period + 1 + draw(st.integers(-1, 1)))
            for ms in durations
        ]
        for period in (theirs, ours)
    ]
    return theirs, ours, *counts, draw(delay), draw(st.integers(0, 4))


def disagree(theirs, ours, frames, length):
    difference = abs(frames * theirs - length * ours)
    return 2 * difference > 2 * (theirs + ours) + min(theirs, ours)


@settings(max_examples=100)
@given(meetings(), st.integers(0, 10**6))
def test_matches_plain_loop(meeting, seed):
    theirs, ours, counts, lengths, delay, extra = meeting
    targets = random_targets(seed, counts, theirs, padding=math.nan)
    frames = max(lengths) + extra
    options = {"delay": delay / 1000, "frames": frames}
    student = torch.tensor(lengths)
    pairs = zip(counts, lengths, strict=True)
    odd = [i for i, pair in enumerate(pairs) if disagree(theirs, ours, *pair)]
    if odd:
        with pytest.raises(
            ValueError, match=f"utterance {odd[0]} of the batch"
        ):
            align(targets, student, ours / 1000, **options)
        return
    aligned = align(targets, student, ours / 1000, **options)
    hidden, posteriors, is_target = reference(
        targets, theirs, lengths, ours, delay, frames
    )
    torch.testing.assert_close(aligned.hidden, hidden)
    assert torch.equal(aligned.posteriors, posteriors)
    assert torch.equal(targets_of(aligned), is_target)
    assert aligned.lengths.tolist() == lengths
    assert aligned.frame_period == ours / 1000
    # Each utterance is alone what it is in company.
    for b, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        own = TeacherTargets(
            *(x[b : b + 1, :count] for x in targets[:2]),
            targets.lengths[b : b + 1],
            targets.frame_period,
        )
        alone = align(own, student[b : b + 1], ours / 1000, delay / 1000)
        for x, y in zip(alone[:2], aligned[:2], strict=True):
            assert torch.equal(x[0], y[b, :length])
            assert not y[b, length:].any()
        assert torch.equal(
            targets_of(alone)[0], targets_of(aligned)[b, :length]
        )


def test_equal_frames_come_back_as_they_are():
    targets = random_targets(0, [5, 3], 20)
    targets = targets._replace(
        hidden=targets.hidden[:, :5], posteriors=targets.posteriors[:, :5]
    )
    aligned = align(targets, torch.tensor([5, 3]), 0.02)
    assert torch.equal(aligned.hidden, targets.hidden)
    assert torch.equal(aligned.posteriors, targets.posteriors)


def test_nothing_is_copied_where_nothing_changes():
    targets = random_targets(0, [5, 5], 20)
    targets = targets._replace(
        hidden=targets.hidden[:, :5], posteriors=targets.posteriors[:, :5]
    )
    aligned = align(targets, torch.tensor([5, 5]), 0.02)
    assert aligned.hidden is targets.hidden
    assert aligned.posteriors is targets.posteriors


def test_frames_too_few_repeat_the_last_and_frames_too_many_leave_a_spike():
    targets = random_targets(0, [3, 7], 20, padding=math.nan)
    targets.posteriors[0, 2] = torch.tensor([0.9, 0.0, 0.1, 0.0])
    for spike in (4, 5, 6):
        targets.posteriors[1, 4:] = torch.tensor([0.9, 0.0, 0.1, 0.0])
        targets.posteriors[1, spike] = torch.tensor([0.1, 0.2, 0.7, 0.0])
        aligned = align(targets, torch.tensor([5, 5]), 0.02)
        assert torch.equal(aligned.hidden[0, :3], targets.hidden[0, :3])
        for frame in (3, 4):
            for ours, theirs in zip(aligned[:2], targets[:2], strict=True):
                assert torch.equal(ours[0, frame], theirs[0, 2])
        assert torch.equal(aligned.hidden[1], targets.hidden[1, :5])
        expected = targets.posteriors[1, [0, 1, 2, 3, spike]]
        assert torch.equal(aligned.posteriors[1], expected)


@pytest.mark.parametrize("frames", [5, 6, 9])
def test_padding_is_zero_and_as_wide_as_asked(frames):
    targets = random_targets(0, [5, 3], 20, padding=math.nan)
    aligned = align(targets, torch.tensor([5, 3]), 0.02, frames=frames)
    assert aligned.hidden.shape[:2] == aligned.posteriors.shape[:2]
    assert aligned.hidden.shape[:2] == (2, frames)
    assert (aligned.hidden[1, 3:] == 0).all()
    assert (aligned.posteriors[1, 3:] == 0).all()


def test_whatever_the_networks_durations_agree():
    """For all ways in which networks count, however the frames end."""
    samples = torch.arange(1, 9600, 3)
    spectral = samples // 160 + 1
    counts = {
        **{
            f"{10 * s} ms": (10 * s, (spectral - 1) // s + 1)
            for s in range(1, 9)
        },
        "12.5 ms": (12.5, samples // 200 + 1),
        "whisper": (20, ((samples + 159) // 160 + 1) // 2),
        "wav2vec2": (20, (samples.clamp(min=400) - 400) // 320 + 1),
    }
    for theirs, ours in itertools.product(counts, counts):
        (period, lengths), (our_period, our_lengths) = (
            counts[theirs],
            counts[ours],
        )
        none = torch.zeros(len(samples), int(lengths.max()), 0)
        targets = TeacherTargets(none, none, lengths, period / 1000)
        align(targets, our_lengths, our_period / 1000)


def spell(generator, frames, often):
    """Posteriors of a CTC model, and what it writes: symbols, with a mark.

    The marks are the probabilities of the symbols' frames, each other than all
    others. Symbols may last for several frames, follow each other without a
    blank, or be repeated with a blank between.
    """
    others = [symbol for symbol in range(6) if symbol != BLANK]
    posteriors = torch.full((frames, 6), 0.02, dtype=torch.float64)
    posteriors[:, BLANK] = 0.9
    written, before = {}, BLANK
    for frame in range(frames):
        spikes, draw = torch.rand(2, generator=generator).tolist()
        if spikes < often:
            symbol = others[int(draw * 1.99) if draw < 0.9 else 3]
            mark = 0.6 + 0.3 * torch.rand(1, generator=generator).item()
            if symbol == before:
                *_, mark = written
            posteriors[frame] = (1 - mark) / 5
            posteriors[frame, symbol] = mark
            written[mark] = symbol
            before = symbol
        else:
            before = BLANK
    return posteriors, written


def read(posteriors):
    """Symbols that CTC reads."""
    best = posteriors.argmax(-1).tolist()
    return [symbol for symbol, _ in itertools.groupby(best) if symbol != BLANK]


@pytest.mark.parametrize("delay", [0, 40, 130])
@pytest.mark.parametrize("theirs, ours", PAIRS)
def test_targets_leave_out_no_symbol_that_the_teacher_writes(
    theirs, ours, delay
):
    """What stands between two frames without a target is all written there."""
    generator = torch.Generator().manual_seed(theirs + ours)
    found = in_all = 0
    for milliseconds in range(300, 900, 7):
        frames, length = (milliseconds // p + 1 for p in (theirs, ours))
        posteriors, written = spell(generator, frames, min(0.4, theirs / 100))
        targets = TeacherTargets(
            torch.zeros(1, frames, 1),
            posteriors.unsqueeze(0),
            torch.tensor([frames]),
            theirs / 1000,
        )
        aligned = align(
            targets,
            torch.tensor([length]),
            ours / 1000,
            delay / 1000,
        )
        is_target = targets_of(aligned)[0].tolist()
        marks, known = list(written), 0
        is_open = False
        for holds, group in itertools.groupby(
            range(length), key=lambda j: is_target[j]
        ):
            group = list(group)
            if not holds:
                is_open = True
                continue
            rows = aligned.posteriors[0, group]
            tops = [row.max().item() for row in rows if row.argmax() != BLANK]
            numbers = sorted({marks.index(mark) for mark in tops})
            if numbers:
                # Before it, none is missing but where there is no target.
                first = numbers[0]
                assert first == known or (is_open and first >= known - 1)
                assert numbers == list(range(first, numbers[-1] + 1))
                assert read(rows) == [written[marks[n]] for n in numbers]
                known, is_open = numbers[-1] + 1, False
                found += len(numbers)
        assert known == len(marks) or is_open
        in_all += len(marks)
        if delay:
            # Frames less than the delay before the end, and no others
            cut = [not (length - 1 - j) * ours >= delay for j in range(length)]
            assert not any(a and b for a, b in zip(cut, is_target, strict=True))
            ends = [j for j in range(length) if not is_target[j] and not cut[j]]
            assert ours > theirs or ends == []
        elif ours <= theirs:
            assert read(aligned.posteriors[0]) == list(written.values())
    assert found > in_all / 20


def test_a_spike_of_a_slow_teacher_is_no_plateau():
    posteriors = torch.zeros(1, 6, 3)
    posteriors[..., BLANK] = 1.0
    # A, then B at once, then B for two frames
    posteriors[0, 1] = torch.tensor([0.1, 0.9, 0.0])
    for frame in (2, 4, 5):
        posteriors[0, frame] = torch.tensor([0.2, 0.0, 0.8])
    targets = TeacherTargets(
        torch.zeros(1, 6, 1), posteriors, torch.tensor([6]), 0.08
    )
    aligned = align(targets, torch.tensor([24]), 0.02)
    found = aligned.posteriors[0].argmax(-1).tolist()
    text = "".join("_AB"[symbol] for symbol in found)
    assert text == "____A___B_______BBBBB___"
    assert aligned.posterior_mask.all()


def test_symbols_that_share_a_window_have_no_target():
    def symbols(text):
        return torch.eye(3)[["_AB".index(symbol) for symbol in text]]

    # Windows of two frames, the second in the middle
    text = "_ __ A_ _B AB __ A_ A_ __ _A AA __".replace(" ", "")
    targets = TeacherTargets(
        torch.zeros(1, 23, 1), symbols(text).unsqueeze(0), torch.tensor([23]), 1
    )
    aligned = align(targets, torch.tensor([12]), 2)
    found = aligned.posteriors[0].argmax(-1).tolist()
    assert "".join("_AB"[symbol] for symbol in found) == "__ABA_AA_AA_"
    is_target = "".join("01"[one] for one in aligned.posterior_mask[0].int())
    assert is_target == "111101001111"
    assert count_symbols(targets) == 7
    assert count_symbols(aligned) == 3


@given(meetings(NONE), st.data())
def test_no_lone_spike_is_lost(meeting, data):
    theirs, ours, (frames, *_), (length, *_), _, _ = meeting
    assume(not disagree(theirs, ours, frames, length))
    spike = data.draw(st.integers(0, frames - 1))
    posteriors = torch.zeros(1, frames, 3)
    posteriors[..., BLANK] = 1.0
    posteriors[0, spike] = torch.tensor([0.2, 0.0, 0.8])
    targets = TeacherTargets(
        torch.zeros(1, frames, 2),
        posteriors,
        torch.tensor([frames]),
        theirs / 1000,
    )
    aligned = align(targets, torch.tensor([length]), ours / 1000)
    assert (aligned.posteriors[0, :, 2] == 0.8).sum() == 1
    assert aligned.posterior_mask is None or aligned.posterior_mask.all()


@pytest.mark.parametrize("theirs, ours", PAIRS)
def test_delayed_student_gets_no_later_target(theirs, ours):
    """With a delay of half a student frame or more, no target is of later."""
    delay = 40
    lengths = frames_of([1.0], theirs)
    targets = random_targets(0, lengths, theirs)
    # Each frame's posterior tells its own time.
    times = torch.arange(targets.posteriors.shape[1]) * theirs
    targets = targets._replace(
        posteriors=times[None, :, None].expand(-1, -1, 2).float()
    )
    aligned = align(
        targets,
        torch.tensor(frames_of([1.0], ours)),
        ours / 1000,
        delay=delay / 1000,
    )
    found = aligned.posteriors[0, :, 0]
    now = torch.arange(len(found)) * ours
    late = found - now
    slack = max(theirs, ours) / 2 - delay
    assert (late[found > 0] <= max(slack, 0)).all()


def test_integer_delay_shifts_frames():
    targets = random_targets(0, [6], 20)
    targets.posteriors[0, 0] = torch.tensor([0.6, 0.2, 0.2, 0.0])
    aligned = align(targets, torch.tensor([6]), 0.02, delay=0.04)
    expected = targets.posteriors[:, [0, 0, 0, 1, 2, 3]]
    assert torch.equal(aligned.posteriors, expected)
    # What is delayed beyond the end is no target, nor what has taken its place.
    assert aligned.posterior_mask.int().tolist() == [[1, 1, 1, 1, 0, 0]]
    hidden = targets.hidden[:, [0, 0, 0, 1, 2, 3]]
    assert torch.equal(aligned.hidden, hidden)


def test_periods_of_an_odd_sample_rate():
    """220 samples at 22050 Hz against 10 ms: apart, but not by rounding."""
    period = Fraction(220_000, 22050)
    targets = random_targets(0, [203], 10)
    targets = targets._replace(frame_period=220 / 22050)
    aligned = align(targets, torch.tensor([202]), 0.01)
    hidden, posteriors, _ = reference(targets, period, [202], 10)
    torch.testing.assert_close(aligned.hidden, hidden)
    assert torch.equal(aligned.posteriors, posteriors)


@pytest.mark.parametrize("delay", [0, 40])
@pytest.mark.parametrize("theirs, ours", PAIRS)
def test_a_teacher_may_have_no_symbols_or_no_hidden_states(theirs, ours, delay):
    targets = random_targets(0, frames_of(SECONDS, theirs), theirs)
    lengths = torch.tensor(frames_of(SECONDS, ours))
    whole = align(targets, lengths, ours / 1000, delay / 1000)
    for name in ("hidden", "posteriors"):
        none = targets._replace(**{name: getattr(targets, name)[..., :0]})
        aligned = align(none, lengths, ours / 1000, delay / 1000)
        expected = whole._replace(**{name: getattr(whole, name)[..., :0]})
        assert torch.equal(aligned.hidden, expected.hidden)
        assert torch.equal(aligned.posteriors, expected.posteriors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_keeps_the_floating_type(dtype):
    targets = random_targets(0, [6], 20)
    targets = targets._replace(
        hidden=targets.hidden.to(dtype), posteriors=targets.posteriors.to(dtype)
    )
    aligned = align(targets, torch.tensor([4]), 0.03)
    assert aligned.hidden.dtype == aligned.posteriors.dtype == dtype


def test_lengths_that_disagree_name_the_utterance():
    targets = random_targets(0, [50, 50], 20)
    with pytest.raises(ValueError) as raised:
        align(targets, torch.tensor([25, 20]), 0.04)
    message = str(raised.value)
    assert "utterance 1 of the batch" in message
    assert "50 frames (1.000 s)" in message
    assert "student 20 (0.800 s)" in message


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees():
    for theirs, ours in PAIRS:
        targets = random_targets(0, frames_of(SECONDS, theirs), theirs)
        lengths = torch.tensor(frames_of(SECONDS, ours))
        on_gpu = TeacherTargets(
            *(x.cuda() for x in targets[:3]), targets.frame_period
        )
        here = align(targets, lengths, ours / 1000)
        there = align(on_gpu, lengths.cuda(), ours / 1000)
        torch.testing.assert_close(there.hidden.cpu(), here.hidden)
        assert torch.equal(there.posteriors.cpu(), here.posteriors)
