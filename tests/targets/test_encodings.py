"""Targets as bytes: what comes back, against plain references."""

import functools
import itertools

import faiss
import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutornet_sb.distillation.frame_weighting import frame_weights
from tutornet_sb.distillation.targets import TeacherTargets
from tutornet_sb.targets.encodings import (
    HIDDEN,
    POSTERIORS,
    TargetCodec,
    train_codebooks,
)

SYMBOLS, BLANK = 29, 0
TAPS = {"encoder.conv": 10, "encoder": 24}
LENGTHS = torch.tensor([40, 25, 1])


def draw(utterances, frames):
    """Spiky posteriors, and states of very different scale."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(34, 34, generator=generator)
    shape = utterances, frames
    logits = 4 * torch.randn(*shape, SYMBOLS, generator=generator)
    logits[..., BLANK] += 8
    scale = 10 ** (3 * torch.rand(*shape, 1, generator=generator) - 2)
    hidden = torch.randn(*shape, 34, generator=generator) @ mixing
    return TeacherTargets(scale * hidden, logits.softmax(-1), LENGTHS, 0.02)


@pytest.fixture(scope="module")
def targets():
    return draw(3, 40)


@functools.cache
def codebooks(code_bytes):
    parts = draw(50, 60).hidden.flatten(0, 1).split(list(TAPS.values()), -1)
    return {
        path: train_codebooks(part, code_bytes)
        for path, part in zip(TAPS, parts, strict=True)
    }


def make_codec(
    taps=TAPS, symbols=SYMBOLS, top_k=4, posteriors="topk", **hidden
):
    """Codec of encodings named as in the settings."""
    books, top_k = None, top_k if posteriors == "topk" else None
    if taps and hidden.get("hidden", "rq") == "rq":
        books = codebooks(hidden.get("code_bytes", 4))
    return TargetCodec(symbols, taps, 0.02, top_k, books)


def there_and_back(codec, targets, taps=tuple(TAPS)):
    parts = codec.encode(targets)
    sizes = [part.shape[-1] for part in parts]
    assert sizes == [codec.posterior_bytes, codec.hidden_bytes]
    assert all(part.dtype == torch.uint8 for part in parts)
    decoded = codec.decode(torch.cat(parts, -1), targets.lengths, taps)
    assert decoded.hidden.dtype == decoded.posteriors.dtype == torch.float32
    assert decoded.frame_period == targets.frame_period
    return decoded


# ---------------------------------------------------------------- posteriors


@given(
    st.sampled_from(sorted(POSTERIORS)),
    st.sampled_from(sorted(HIDDEN)),
    st.integers(1, 3),
    st.integers(1, 5),
    st.floats(0, 12),
    st.integers(0, 10**6),
)
def test_any_targets_come_back_frame_by_frame(
    posteriors, hidden, utterances, frames, sharpness, seed
):
    generator = torch.Generator().manual_seed(seed)
    shape = utterances, frames
    logits = torch.randn(*shape, SYMBOLS, generator=generator)
    logits[..., BLANK] += 2 * torch.randn(*shape, generator=generator)
    scale = 10 ** torch.empty(*shape, 1).uniform_(-3, 3, generator=generator)
    states = torch.randn(*shape, sum(TAPS.values()), generator=generator)
    drawn = TeacherTargets(
        scale * states,
        (sharpness * logits).softmax(-1),
        torch.full((utterances,), frames),
        0.02,
    )
    codec = make_codec(posteriors=posteriors, hidden=hidden)
    found = there_and_back(codec, drawn)
    assert found.posteriors.min() >= 0
    torch.testing.assert_close(
        found.posteriors.sum(-1), torch.ones(shape), rtol=0, atol=1e-6
    )
    blank = drawn.posteriors[..., BLANK]
    # fp16 of the smaller side: eleven bits
    bound = torch.minimum(blank, 1 - blank) * 2**-11 + 2**-23
    assert ((found.posteriors[..., BLANK] - blank).abs() <= bound).all()
    pair = [frame_weights(x, "nonblank") for x in (found, drawn)]
    torch.testing.assert_close(*pair, rtol=2e-3, atol=1e-6)
    for own in (slice(0, 10), slice(10, 34)):
        pair = [
            frame_weights(x._replace(hidden=x.hidden[..., own]), "energy")
            for x in (found, drawn)
        ]
        torch.testing.assert_close(*pair, rtol=2e-3, atol=1e-6)
    # A frame is alone what it is in company.
    raw = torch.cat(codec.encode(drawn), -1)
    for b, t in itertools.product(range(utterances), range(frames)):
        alone = codec.decode(
            raw[b : b + 1, t : t + 1], torch.ones(1).long(), list(TAPS)
        )
        for x, y in zip(alone[:2], found[:2], strict=True):
            torch.testing.assert_close(x[0, 0], y[b, t])


def test_fp16_posteriors_are_within_its_precision(targets):
    codec = make_codec(posteriors="fp16", hidden="fp16")
    found = there_and_back(codec, targets).posteriors
    torch.testing.assert_close(
        found, targets.posteriors, rtol=3 * 2**-11, atol=1e-7
    )


def by_hand(posteriors, k):
    """What top-k makes of one frame, in plain Python."""
    others = [p for i, p in enumerate(posteriors) if i != BLANK]
    nonblank = sum(others)
    if nonblank <= 0.5:
        nonblank = float(numpy.float16(nonblank))
    else:
        nonblank = 1 - float(numpy.float16(posteriors[BLANK]))
    shares = [p / sum(others) for p in others]
    coded = [(round(255 * share**0.5) / 255) ** 2 for share in shares]
    if k < len(others):
        kept = sorted(range(len(others)), key=lambda i: -shares[i])[:k]
        total = sum(coded[i] for i in kept)
        left = max(0.0, 1 - total) / (len(others) - k)
        coded = [
            coded[i] / max(1.0, total) if i in kept else left
            for i in range(len(others))
        ]
    decoded = [nonblank * share / sum(coded) for share in coded]
    return [*decoded[:BLANK], 1 - nonblank, *decoded[BLANK:]]


@pytest.mark.parametrize("k", [1, 4, 27, 28, 100])
def test_bytes_of_posteriors_against_plain_python(targets, k):
    codec = make_codec(hidden="fp16", top_k=k)
    found = there_and_back(codec, targets).posteriors
    for b, t in ((0, 0), (0, 39), (1, 7), (2, 0)):
        wanted = by_hand(targets.posteriors[b, t].tolist(), k)
        torch.testing.assert_close(
            found[b, t], torch.tensor(wanted), rtol=1e-4, atol=1e-6
        )


def test_what_topk_drops_is_spread_evenly(targets):
    codec = make_codec(posteriors="topk", top_k=2, hidden="fp16")
    assert codec.posterior_bytes == 2 + 2 * 2
    found = there_and_back(codec, targets).posteriors
    others = torch.cat([found[..., :BLANK], found[..., BLANK + 1 :]], -1)
    left = others.sort(-1, descending=True).values[..., 2:]
    torch.testing.assert_close(left, left[..., :1].expand_as(left))
    assert (left > 0).any()


@pytest.mark.parametrize("symbols, bytes_", [(257, 2), (258, 3), (40000, 5)])
def test_vocabularies_beyond_a_byte(symbols, bytes_):
    torch.manual_seed(0)
    posteriors = torch.softmax(5 * torch.randn(1, 6, symbols), -1)
    posteriors = 0.2 * posteriors
    posteriors[0, :, symbols - 1] += 0.8
    given = TeacherTargets(
        torch.zeros(1, 6, 0), posteriors, torch.tensor([6]), 0.02
    )
    codec = make_codec({}, symbols, posteriors="topk", top_k=3)
    assert codec.posterior_bytes == 2 + 3 * bytes_
    found = there_and_back(codec, given, ()).posteriors
    assert found.shape == posteriors.shape
    assert (found.argmax(-1) == symbols - 1).all()
    torch.testing.assert_close(
        found[..., -1], posteriors[..., -1], rtol=0, atol=5e-3
    )


@pytest.mark.parametrize("kind", POSTERIORS)
def test_nothing_but_blank(targets, kind):
    sure = torch.zeros(1, 2, SYMBOLS)
    sure[..., BLANK] = 1
    given = TeacherTargets(torch.zeros(1, 2, 0), sure, torch.tensor([2]), 0.02)
    codec = make_codec({}, posteriors=kind)
    assert torch.equal(there_and_back(codec, given, ()).posteriors, sure)


# ------------------------------------------------------------- hidden states


def test_fp16_states(targets):
    found = there_and_back(make_codec(hidden="fp16"), targets).hidden
    torch.testing.assert_close(found, targets.hidden, rtol=2**-11, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_residual_quantisation_against_faiss(targets, steps):
    given = targets._replace(hidden=targets.hidden[..., 10:])
    taps = {"encoder": 24}
    codec = make_codec(taps, hidden="rq", code_bytes=steps)
    assert codec.hidden_bytes == 2 + steps
    found = there_and_back(codec, given, ("encoder",)).hidden

    book = codec.states["encoder"].codebooks
    reference = faiss.ResidualQuantizer(24, steps, 8)
    faiss.copy_array_to_vector(book.numpy().ravel(), reference.codebooks)
    reference.is_trained = True
    reference.max_beam_size = 8
    rms = given.hidden.square().mean(-1, keepdim=True).sqrt()
    unit = (given.hidden / rms.clamp(min=1e-30)).flatten(0, 1)
    own = codec.encode(given)[1][..., 2:].flatten(0, 1)
    wanted = torch.from_numpy(reference.decode(own.numpy().copy()))
    # Its length is the true one.
    scale = rms.flatten(0, 1) / wanted.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(
        found.flatten(0, 1), wanted * scale, rtol=2e-3, atol=1e-5
    )
    # The search is as good as its own.
    codes = reference.compute_codes(unit.numpy())
    theirs = torch.from_numpy(reference.decode(codes)) - unit
    ours = wanted - unit
    assert ours.square().sum() <= 1.001 * theirs.square().sum()
    assert (own.numpy() == codes).mean() > 0.95


def distance(targets, code_bytes):
    codec = make_codec(code_bytes=code_bytes)
    found = there_and_back(codec, targets).hidden
    normal = torch.nn.functional.layer_norm
    pair = normal(found, (34,)), normal(targets.hidden, (34,))
    return (pair[0] - pair[1]).square().mean().item()


def test_more_bytes_are_nearer():
    fresh = draw(20, 40)
    errors = [distance(fresh, n) for n in (1, 2, 6)]
    assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize("hidden", HIDDEN)
def test_layers_are_given_as_asked_for(targets, hidden):
    codec = make_codec(hidden=hidden)
    raw = torch.cat(codec.encode(targets), -1)
    both = codec.decode(raw, LENGTHS, ["encoder.conv", "encoder"]).hidden
    last = codec.decode(raw, LENGTHS, ["encoder"]).hidden
    swapped = codec.decode(raw, LENGTHS, ["encoder", "encoder.conv"]).hidden
    assert torch.equal(last, both[..., 10:])
    assert torch.equal(swapped, torch.cat([last, both[..., :10]], -1))
    # Without any, the hidden states need not be there.
    part = raw[..., : codec.posterior_bytes]
    alone = codec.decode(part, LENGTHS)
    assert alone.hidden.shape == (3, 40, 0)
    assert torch.equal(alone.posteriors, codec.decode(raw, LENGTHS).posteriors)


def test_silent_frames(targets):
    still = targets._replace(hidden=torch.zeros_like(targets.hidden))
    for hidden in HIDDEN:
        codec = make_codec(hidden=hidden)
        assert torch.equal(there_and_back(codec, still).hidden, still.hidden)


def test_a_teacher_without_a_head(targets):
    headless = targets._replace(posteriors=torch.zeros(3, 40, 0))
    codec = make_codec(symbols=0, hidden="fp16")
    assert codec.posterior_bytes == 0
    found = there_and_back(codec, headless)
    assert found.posteriors.shape == (3, 40, 0)


def test_few_frames_make_codebooks():
    states = torch.randn(7, 6)
    books = train_codebooks(states, 2)
    assert books.isfinite().all()
    given = TeacherTargets(
        states.unsqueeze(0), torch.zeros(1, 7, 0), torch.tensor([7]), 0.02
    )
    codec = TargetCodec(0, {"x": 6}, 0.02, codebooks={"x": books})
    found = there_and_back(codec, given, ("x",)).hidden
    torch.testing.assert_close(found[0], states, rtol=3e-3, atol=1e-3)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_states_too_large_for_fp16(targets, hidden):
    huge = targets._replace(hidden=1e6 * targets.hidden)
    with pytest.raises(ValueError, match="more than fp16 holds"):
        make_codec(hidden=hidden).encode(huge)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_reads_what_the_cpu_wrote(targets):
    codec = make_codec()
    raw = torch.cat(codec.encode(targets), -1)
    here = codec.decode(raw, LENGTHS, list(TAPS))
    there = codec.cuda().decode(raw.cuda(), LENGTHS.cuda(), list(TAPS))
    for name in ("hidden", "posteriors"):
        torch.testing.assert_close(
            getattr(there, name).cpu(), getattr(here, name)
        )
