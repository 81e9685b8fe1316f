"""Losses against plain loops in float64, and what padding must not do."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutornet_sb.distillation.losses import (
    RepresentationLoss,
    SoftmaxLoss,
    ctc_loss,
    frames_needed,
)
from tutornet_sb.distillation.targets import TeacherTargets

LENGTHS = (4, 1, 3)
WEIGHTINGS = ("uniform", "energy", "nonblank")
# Kind, temperature, tolerance, selection
SOFTMAX_LOSSES = [
    ("l2", 1.0, 0),
    ("l2", 2.0, 1),
    ("kl", 1.0, 9),
    ("kl", 3.0, 0),
    ("guided", 1.0, 0),
    ("guided", 1.0, 2),
    ("kl", 1.0, 0, 0),
    ("l2", 1.0, 1, 1),
    ("kl", 2.0, 0, 2),
]
PADDINGS = (0.0, 1e4, float("nan"), float("inf"))


def random_batch(seed, lengths=LENGTHS, dim=3, symbols=4, frames=None):
    """Student's hidden states and logits, teacher's targets, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), frames or max(lengths))

    def randn(size):
        x = torch.randn(*shape, size, generator=generator, dtype=torch.float64)
        return 2 * x

    targets = TeacherTargets(
        randn(dim), randn(symbols).softmax(-1), torch.tensor(lengths), 0.02
    )
    return randn(dim), randn(symbols), targets


def pad(x, lengths, value, extra=0):
    """Overwrite the padding of ``x`` and lengthen it."""
    x = torch.cat([x, x.new_zeros(len(x), extra, x.shape[2])], dim=1)
    for b, length in enumerate(lengths):
        x[b, length:] = value
    return x


def pad_targets(targets, value, extra=0):
    lengths = targets.lengths.tolist()
    return targets._replace(
        hidden=pad(targets.hidden, lengths, value, extra),
        posteriors=pad(targets.posteriors, lengths, value, extra),
    )


def softmax(logits, temperature):
    top = max(logits)
    exps = [math.exp((z - top) / temperature) for z in logits]
    return [e / sum(exps) for e in exps]


def representation_reference(projected, targets, weighting):
    total = 0.0
    for b, length in enumerate(targets.lengths.tolist()):
        raw, errors = [], []
        for t in range(length):
            h = targets.hidden[b, t].tolist()
            dim = len(h)
            if weighting == "uniform":
                raw.append(1.0)
            elif weighting == "energy":
                raw.append(sum(v * v for v in h) / dim)
            else:
                raw.append(1 - targets.posteriors[b, t, 0].item())
            student = projected[b, t].tolist()
            pairs = zip(h, student, strict=True)
            errors.append(sum((v - s) ** 2 for v, s in pairs) / dim)
        pairs = zip(raw, errors, strict=True)
        total += sum(w / sum(raw) * e for w, e in pairs)
    return total / len(targets.lengths)


def softmax_reference(
    logits, teacher_logits, lengths, kind, temperature, far, beside=None
):
    blank = 0

    def distance(p, q):
        if kind == "guided":
            best = p.index(max(p))
            return 0.0 if best == blank else 1 - q[best]
        if kind == "l2":
            return sum((x - y) ** 2 for x, y in zip(p, q, strict=True))
        pairs = zip(p, q, strict=True)
        kept = [(x, y) for x, y in pairs if x > 0]
        return temperature**2 * sum(x * math.log(x / y) for x, y in kept)

    def add_up(rows, q):
        """Cheapest way to the end, by plain recursion over pairs of frames."""
        p = [softmax(row, temperature) for row in rows]
        pure = [float(symbol == blank) for symbol in range(len(p[0]))]
        best = [row.index(max(row)) for row in p]
        spikes = [t for t, symbol in enumerate(best) if symbol != blank]
        paired, inserted = {}, {}
        for t, s in itertools.product(range(len(p)), range(len(q))):
            if abs(t - s) > far:
                continue
            before = [best[x] for x in spikes if x <= t][-1:]
            after = [best[x] for x in spikes if x > t][:1]
            cost = distance(p[t], q[s])
            if beside is not None and all(abs(x - t) > beside for x in spikes):
                cost = 0.0

            def so_far(t, s, *ways):
                return min(way.get((t, s), math.inf) for way in ways)

            ways = [
                so_far(t - 1, s - 1, paired, inserted) + cost,
                so_far(t, s - 1, paired) + cost,
            ]
            alone = so_far(t - 1, s, paired, inserted)
            is_dropped = best[t] == blank and before != after
            left_out = distance(pure, p[t]) if is_dropped else math.inf
            ways.append(alone + min(cost, left_out))
            paired[t, s] = min(ways) if t or s else cost
            if before != after:
                ways = so_far(t, s - 1, paired, inserted)
                inserted[t, s] = ways + distance(pure, q[s])
        end = len(p) - 1, len(q) - 1
        return min(way.get(end, math.inf) for way in (paired, inserted))

    total = 0.0
    for b, length in enumerate(lengths):
        rows = [teacher_logits[b, t].tolist() for t in range(length)]
        ours = [logits[b, t].tolist() for t in range(length)]
        total += add_up(rows, [softmax(z, temperature) for z in ours])
    return total / len(lengths)


def ctc_reference(logits, tokens, lengths):
    """Sum over all paths that collapse to the transcript."""
    total = 0.0
    for b, length in enumerate(lengths):
        rows = [softmax(logits[b, t].tolist(), 1.0) for t in range(length)]
        symbols = range(logits.shape[2])
        likelihood = 0.0
        for path in itertools.product(symbols, repeat=length):
            merged = [s for s, _ in itertools.groupby(path)]
            if [s for s in merged if s != 0] == tokens[b]:
                likelihood += math.prod(
                    row[s] for row, s in zip(rows, path, strict=True)
                )
        total -= math.log(likelihood)
    return total / len(lengths)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_representation_matches_plain_loop(weighting, seed):
    projected, _, targets = random_batch(seed)
    loss = RepresentationLoss(weighting)(projected, targets)
    expected = representation_reference(projected, targets, weighting)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", SOFTMAX_LOSSES)
def test_softmax_matches_plain_loop(options, seed):
    _, logits, targets = random_batch(seed)
    _, teacher_logits, _ = random_batch(seed + 100)
    targets = targets._replace(posteriors=teacher_logits.softmax(-1))
    loss = SoftmaxLoss(*options)(logits, targets)
    expected = softmax_reference(logits, teacher_logits, LENGTHS, *options)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_ctc_matches_sum_over_paths(seed):
    _, logits, _ = random_batch(seed, symbols=3, frames=5)
    tokens = [[1, 1, 2], [2], [1, 2]]
    padded = torch.tensor([[1, 1, 2], [2, 2, 2], [1, 2, 2]])
    lengths = torch.tensor(LENGTHS)
    loss = ctc_loss(logits, padded, lengths, torch.tensor([3, 1, 2]))
    expected = ctc_reference(logits, tokens, LENGTHS)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def losses_and_inputs(seed):
    """Every loss as a function of the student's tensor and the targets."""
    projected, logits, targets = random_batch(seed)
    tokens = torch.tensor([[1, 1, 2], [3, 1, 1], [2, 3, 1]])
    token_lengths = torch.tensor([3, 1, 2])

    def ctc(x, targets):
        return ctc_loss(x, tokens, targets.lengths, token_lengths)

    for weighting in WEIGHTINGS:
        yield weighting, RepresentationLoss(weighting), projected, targets
    for options in SOFTMAX_LOSSES:
        name = "-".join(map(str, options))
        yield name, SoftmaxLoss(*options), logits, targets
    yield "ctc", ctc, logits, targets


CASES = [pytest.param(*case[1:], id=case[0]) for case in losses_and_inputs(7)]
# The transcripts of CTC are bound to the whole batch.
DISTILLATION_CASES = CASES[:-1]


@pytest.mark.parametrize("loss, student, targets", CASES)
def test_gradient(loss, student, targets):
    student = student.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), student)


def value_and_gradient(loss, student, targets):
    student = student.clone().requires_grad_()
    value = loss(student, targets)
    value.backward()
    return value.detach(), student.grad


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("loss, student, targets", CASES)
def test_padding_does_not_leak(loss, student, targets, padding, extra):
    clean, clean_grad = value_and_gradient(
        loss, pad(student, LENGTHS, 0.0), pad_targets(targets, 0.0)
    )
    value, grad = value_and_gradient(
        loss,
        pad(student, LENGTHS, padding, extra),
        pad_targets(targets, padding, extra),
    )
    frames = student.shape[1]
    torch.testing.assert_close(value, clean)
    torch.testing.assert_close(grad[:, :frames], clean_grad)
    for b, length in enumerate(LENGTHS):
        assert (grad[b, length:] == 0).all()


@pytest.mark.parametrize("loss, student, targets", DISTILLATION_CASES)
def test_batch_is_the_mean_of_its_utterances(loss, student, targets):
    alone = [
        loss(
            student[b : b + 1, :length],
            TeacherTargets(
                targets.hidden[b : b + 1, :length],
                targets.posteriors[b : b + 1, :length],
                targets.lengths[b : b + 1],
                targets.frame_period,
            ),
        )
        for b, length in enumerate(LENGTHS)
    ]
    torch.testing.assert_close(
        loss(student, targets), torch.stack(alone).mean()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss, student, targets", CASES)
def test_half_precision_is_computed_in_float32(loss, student, targets, dtype):
    # Hidden states of a size that float16 cannot square.
    targets = targets._replace(
        hidden=(300 * targets.hidden).to(dtype),
        posteriors=targets.posteriors.to(dtype),
    )
    student = student.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, targets)
    wide = targets._replace(
        hidden=targets.hidden.double(), posteriors=targets.posteriors.double()
    )
    assert value.dtype == torch.float32
    expected = loss(student.double(), wide)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", SOFTMAX_LOSSES)
def test_agreement_costs_nothing(options):
    _, logits, targets = random_batch(4)
    # Sure of each symbol, for the guided loss asks for certainty.
    logits = 1000 * logits
    targets = targets._replace(posteriors=logits.softmax(-1))
    loss = SoftmaxLoss(*options)(logits, targets)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("options", SOFTMAX_LOSSES)
def test_sure_teacher_stays_finite(options):
    _, logits, targets = random_batch(5)
    onehot = torch.nn.functional.one_hot(logits.argmin(-1), 4).float()
    value, grad = value_and_gradient(
        SoftmaxLoss(*options),
        50 * logits.float(),
        targets._replace(posteriors=onehot),
    )
    assert value.isfinite() and grad.isfinite().all()


def spelt(text):
    """Logits of frames, sure to .999: ``_`` is blank."""
    likely = math.log(0.999 / 0.0005)
    rows = torch.eye(3, dtype=torch.float64)["_AB".index(text[0]), None]
    for symbol in text[1:]:
        row = torch.eye(3, dtype=torch.float64)["_AB".index(symbol), None]
        rows = torch.cat([rows, row])
    return likely * rows.unsqueeze(0)


def cost_of(teacher, student, tolerance, kind="l2"):
    """Loss of one utterance, and the greatest gradient."""
    logits = spelt(student)
    posteriors = spelt(teacher).softmax(-1)
    lengths = torch.tensor([len(teacher)])
    targets = TeacherTargets(posteriors, posteriors, lengths, 0.02)
    loss = SoftmaxLoss(kind, tolerance=tolerance)
    value, grad = value_and_gradient(loss, logits, targets)
    return value.item(), grad.abs().max().item()


# || p - q ||^2 of two frames that are sure of different symbols
APART = 2 * 0.9985**2


@pytest.mark.parametrize(
    "teacher, student, frames_apart, symbols_apart",
    [
        # As it is, early, late
        ("__A___", "__A___", 0, 0),
        ("__A___", "_A____", 2, 0),
        ("__A___", "___A__", 2, 0),
        ("_A__B__", "__A__B_", 4, 0),
        ("_A__B__", "__A_B__", 2, 0),
        # Longer or shorter, which CTC reads alike
        ("__AA__", "__A___", 1, 0),
        ("__A___", "_AAA__", 2, 0),
        # Inserted, deleted, another
        ("______", "__A___", 1, 1),
        ("__A___", "______", 1, 1),
        ("__A___", "__B___", 1, 1),
        # Two for one, and a double letter that is merged
        ("__A___", "_A_A__", 3, 1),
        ("_A_A__", "__A___", 3, 1),
        ("_A_A__", "_AA___", 2, 1),
        ("_AA___", "_A_A__", 2, 1),
        # A blank more or less between different symbols
        ("_AB___", "_A_B__", 2, 0),
        ("_A_B__", "_AB___", 2, 0),
        ("_A__B_", "__AB__", 4, 0),
        ("__AB__", "_A__B_", 4, 0),
        # Swapped
        ("_AB___", "_BA___", 2, 2),
        # Too late by one frame
        ("__A___", "____A_", 2, 2),
    ],
)
def test_insertions_and_deletions_cost_alike(
    teacher, student, frames_apart, symbols_apart
):
    for tolerance, apart in ((0, frames_apart), (1, symbols_apart)):
        value, grad = cost_of(teacher, student, tolerance)
        assert value == pytest.approx(APART * apart, abs=1e-5)
        # d |p - q|^2 / d logits of a frame that is sure of the wrong symbol
        slope = 2 * 0.9985 * 2 * 0.999 * 0.0005
        assert grad == pytest.approx(slope, rel=0.51) if apart else grad < 1e-5


@pytest.mark.parametrize("tolerance", [1, 2])
def test_what_costs_nothing_reads_the_same(tolerance):
    """All strings of six frames against some of them."""
    strings = ["".join(s) for s in itertools.product("_AB", repeat=6)]
    students = torch.cat([spelt(text) for text in strings]).float()
    lengths = torch.full((len(strings),), 6)

    def read(text):
        return [s for s, _ in itertools.groupby(text) if s != "_"]

    for teacher in ("_A_B__", "_AAB__", "_A_A__", "_AA_B_", "AB_BA_", "A__A_B"):
        p = spelt(teacher).softmax(-1).float().expand(len(strings), -1, -1)
        targets = TeacherTargets(p, p, lengths, 0.02)
        loss = SoftmaxLoss(tolerance=tolerance)
        logits = students.clone().requires_grad_()
        loss(logits, targets).backward()
        # Only those that are right have no gradient.
        slopes = logits.grad.abs().amax((1, 2)) * len(strings)
        free = {
            text
            for text, slope in zip(strings, slopes.tolist(), strict=True)
            if slope < 1e-4
        }
        assert teacher in free and len(free) > 4
        assert all(read(text) == read(teacher) for text in free)


def test_tolerance_lets_a_student_spike_later_but_not_too_late():
    blank, spike = [9.0, 0.0, 0.0], [0.0, 9.0, 0.0]
    teacher = torch.tensor([[blank, spike, blank, blank, blank, blank]])
    targets = TeacherTargets(
        teacher, (10 * teacher).softmax(-1), torch.tensor([6]), 0.02
    )
    for late, costs in ((2, False), (3, True)):
        rows = [blank] * 6
        rows[1 + late] = spike
        for kind in ("l2", "kl", "guided"):
            loss = SoftmaxLoss(kind, tolerance=2)(
                10 * torch.tensor([rows]), targets
            )
            assert (loss.item() > 0.9) == costs


@pytest.mark.parametrize("tolerance", [0, 1])
@pytest.mark.parametrize("kind", ["l2", "kl", "guided"])
def test_frames_without_a_target_have_no_term(kind, tolerance):
    _, logits, targets = random_batch(10, lengths=(6, 4))
    known = torch.tensor([[1, 1, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0]]).bool()
    loss = SoftmaxLoss(kind, tolerance=tolerance)
    value, grad = value_and_gradient(
        loss, logits, targets._replace(posterior_mask=known)
    )
    wild = targets.posteriors.clone()
    wild[~known] = 0.25
    other, _ = value_and_gradient(
        loss, logits, targets._replace(posteriors=wild, posterior_mask=known)
    )
    assert value == other
    if tolerance == 0:
        assert (grad[~known] == 0).all()
        parts = [
            loss(
                logits[b : b + 1, known[b]],
                TeacherTargets(
                    targets.hidden[b : b + 1, known[b]],
                    targets.posteriors[b : b + 1, known[b]],
                    known[b : b + 1].sum(1),
                    0.02,
                ),
            )
            for b in range(2)
        ]
        torch.testing.assert_close(value, torch.stack(parts).mean())
    rows = targets._replace(posterior_mask=known).rows([1])
    assert torch.equal(rows.posterior_mask, known[1:])


def test_guided_lets_other_spikes_be():
    _, logits, targets = random_batch(6)
    teacher = targets.posteriors.clone()
    teacher[1:, :, 0] = 2.0  # the best is blank
    targets = targets._replace(posteriors=teacher)
    _, grad = value_and_gradient(SoftmaxLoss("guided"), logits, targets)
    assert (grad[1:] == 0).all()
    assert (grad[0] != 0).any()


@pytest.mark.parametrize("selection, wanted", [(0, [2]), (1, [1, 2, 3])])
def test_selection_is_of_spikes_and_frames_beside_them(selection, wanted):
    _, logits, targets = random_batch(6, lengths=(6,))
    teacher = torch.zeros(1, 6, 4, dtype=torch.float64)
    teacher[..., 0] = 1.0
    teacher[0, 2] = torch.tensor([0.2, 0.0, 0.8, 0.0])
    for length in (6, 5):
        targets = targets._replace(
            posteriors=teacher, lengths=torch.tensor([length])
        )
        loss = SoftmaxLoss("kl", selection=selection)
        _, grad = value_and_gradient(loss, logits, targets)
        assert (grad[0] != 0).any(-1).nonzero().flatten().tolist() == wanted


def test_transcript_too_long_counts_as_zero():
    logits = torch.randn(2, 2, 3, requires_grad=True)
    tokens = torch.tensor([[1, 2, 1], [1, 0, 0]])
    both = ctc_loss(logits, tokens, torch.tensor([2, 2]), torch.tensor([3, 1]))
    fits = ctc_loss(
        logits[1:], tokens[1:], torch.tensor([2]), torch.tensor([1])
    )
    torch.testing.assert_close(both, fits / 2)
    both.backward()
    assert (logits.grad[0] == 0).all()


@given(st.lists(st.integers(1, 3), max_size=6))
def test_ctc_has_a_finite_loss_from_the_frames_that_it_needs(tokens):
    frames = frames_needed(tokens)
    for count in range(max(1, frames - 1), frames + 2):
        loss = torch.nn.functional.ctc_loss(
            torch.zeros(count, 4).log_softmax(-1),
            torch.tensor(tokens, dtype=torch.long),
            torch.tensor(count),
            torch.tensor(len(tokens)),
            reduction="sum",
        )
        assert loss.isfinite() == (count >= frames)


@pytest.mark.parametrize("axis", range(3))
def test_shapes_that_differ_are_both_named(axis):
    projected, logits, targets = random_batch(0)
    for loss, student, teacher in (
        (RepresentationLoss(), projected, targets.hidden),
        (SoftmaxLoss(), logits, targets.posteriors),
    ):
        student = student.narrow(axis, 0, student.shape[axis] - 1)
        with pytest.raises(ValueError) as raised:
            loss(student, targets)
        assert str(tuple(student.shape)) in str(raised.value)
        assert str(tuple(teacher.shape)) in str(raised.value)


@pytest.mark.parametrize("option", [{"temperature": 2.0}, {"selection": 0}])
def test_options_that_are_not_for_the_guided_loss(option):
    with pytest.raises(ValueError, match="no temperature and no selection"):
        SoftmaxLoss("guided", **option)
