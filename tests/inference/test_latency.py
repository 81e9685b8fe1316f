"""Latency of emission, on signals and paths whose times are known."""

import itertools
import math
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.decoders.ctc import ctc_greedy_decode

from tutornet_sb.inference import latency
from tutornet_sb.inference.latency import (
    align_symbols,
    emission_latency,
    split_words,
    symbol_runs,
    word_ends,
)
from tutornet_sb.networks.acoustic_model import Encoding

RATE = 16000
PERIOD = 0.02  # seconds
PIECES = ["_", "▁", "A", "B", "C"]


class Scripted(torch.nn.Module):
    """A model with given logits, one ``(frames, symbols)`` an utterance."""

    frame_period = PERIOD
    features = types.SimpleNamespace(sample_rate=RATE)

    def __init__(self, logits):
        super().__init__()
        self.logits = logits
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def forward(self, wavs, wav_lens):
        lengths = torch.tensor([len(x) for x in self.logits])
        # Frames of padding that say "C", as a network may.
        logits = torch.zeros(len(lengths), int(lengths.max()) + 3, len(PIECES))
        logits[..., PIECES.index("C")] = 9.0
        for row, x in zip(logits, self.logits, strict=True):
            row[: len(x)] = x
        return Encoding(logits, logits, lengths)


def path(letters, frames):
    """Logits of a path: ``{frame: letter}``, a space for a word boundary."""
    logits = torch.zeros(frames, len(PIECES))
    logits[:, 0] = 5.0
    for frame, letter in letters.items():
        logits[frame] = 0.0
        logits[frame, PIECES.index(letter.replace(" ", "▁"))] = 5.0
    return logits


def tones(spans, seconds):
    """Tones of 300 Hz from and to the given times, on a little noise."""
    wav = 1e-3 * np.random.default_rng(0).standard_normal(round(seconds * RATE))
    time = np.arange(len(wav)) / RATE
    for first, last in spans:
        loud = (first <= time) & (time < last)
        wav += 0.3 * loud * np.sin(2 * math.pi * 300 * time)
    return torch.tensor(wav, dtype=torch.float32)


def tokens_of(text):
    return [PIECES.index(c.replace(" ", "▁")) for c in text]


def batch_of(utterances):
    """Utterances of ``(id, wav, text)`` as a SpeechBrain batch."""
    return PaddedBatch(
        [
            {
                "id": key,
                "sig": wav,
                "wrd": text,
                "tokens": torch.tensor(tokens_of(text), dtype=torch.long),
            }
            for key, wav, text in utterances
        ]
    )


SPELLING = ["▁", "A", "BC", "▁D", "▁EF", "G", "|", " ", "H I"]


@given(st.lists(st.integers(0, len(SPELLING) - 1), max_size=30))
def test_words_are_those_of_the_text(symbols):
    text = "".join(SPELLING[i] for i in symbols)
    words = split_words(symbols, SPELLING)
    expected = text.replace("▁", " ").replace("|", " ").split()
    assert [word for word, _, _ in words] == expected
    for word, first, last in words:
        spelled = "".join(SPELLING[i] for i in symbols[first : last + 1])
        assert word in spelled.replace("▁", "")
        assert SPELLING[symbols[last]] not in ("▁", "|", " ")


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(0, 3))
def test_runs_are_those_of_itertools(labels, blank):
    expected, first = [], 0
    for symbol, run in itertools.groupby(labels):
        last = first + len(list(run)) - 1
        if symbol != blank:
            expected.append((symbol, first, last))
        first = last + 1
    assert symbol_runs(torch.tensor(labels), blank) == expected


@given(
    st.integers(1, 6),
    st.lists(st.integers(1, 3), max_size=4),
    st.integers(0, 10**6),
)
def test_alignments_are_the_best_of_all_paths(frames, symbols, seed):
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(frames, 4, generator=generator).log_softmax(-1)
    found = align_symbols(log_probs, symbols)
    scores = {}
    for labels in itertools.product({0, *symbols}, repeat=frames):
        runs = symbol_runs(torch.tensor(labels))
        if [symbol for symbol, _, _ in runs] == symbols:
            score = sum(log_probs[t, k].item() for t, k in enumerate(labels))
            scores[tuple((first, last) for _, first, last in runs)] = score
    if not scores:
        assert found is None
    else:
        assert scores[tuple(found)] == pytest.approx(
            max(scores.values()), abs=1e-5
        )


def test_ends_of_tones_with_gaps(monkeypatch):
    # Spikes lie early in a tone, as those of CTC do, and the last one of a
    # word well before its end.
    spans = [(0.2, 0.5), (0.75, 1.0), (1.08, 1.4)]
    long = tones(spans, 1.7)
    spikes = {11: "A", 14: "B", 19: " ", 38: "B", 54: " ", 55: "A", 58: "C"}
    short = tones([(0.1, 0.3)], 0.6)
    batch = batch_of([("long", long, "AB B AC"), ("short", short, "A")])
    model = Scripted([path(spikes, 86), path({6: "A"}, 31)])
    ends = word_ends(model, [batch], PIECES)
    assert ends["long"] == pytest.approx([0.5, 1.0, 1.4], abs=0.0101)
    assert ends["short"] == pytest.approx([0.3], abs=0.0101)
    monkeypatch.setattr(latency, "_PAUSE", 0.1)
    ends = word_ends(model, [batch], PIECES)
    # The gap of 80 ms counts no more: then the next word's first symbol.
    assert ends["long"] == pytest.approx([0.5, 1.1, 1.4], abs=0.0101)


def test_connected_words_part_at_the_next_symbol():
    # Silence of 40 ms, as of a stop, is within a word.
    wav = tones([(0.1, 0.4), (0.44, 0.9)], 1.2)
    model = Scripted([path({8: "A", 15: "B", 25: " ", 27: "A"}, 61)])
    ends = word_ends(model, [batch_of([("x", wav, "AB A")])], PIECES)
    assert ends["x"] == pytest.approx([0.54, 0.9], abs=0.0101)


def test_last_pause_before_the_next_word_counts():
    # The closure and the burst of a final stop, then the pause.
    wav = tones([(0.1, 0.3), (0.38, 0.4), (0.6, 0.9)], 1.2)
    model = Scripted([path({8: "A", 14: "B", 30: " ", 32: "A"}, 61)])
    ends = word_ends(model, [batch_of([("x", wav, "AB A")])], PIECES)
    assert ends["x"] == pytest.approx([0.4, 0.9], abs=0.0101)


def test_alignment_is_to_the_transcript_not_to_the_greedy_path():
    wav = tones([(0.1, 0.4), (0.7, 0.9)], 1.2)
    logits = path({8: "A", 12: "C", 34: " ", 36: "C"}, 61)
    # Nearly as probable as the letters that win.
    logits[12, PIECES.index("B")] = logits[36, PIECES.index("A")] = 4.0
    ends = word_ends(
        Scripted([logits]), [batch_of([("x", wav, "AB A")])], PIECES
    )
    assert ends["x"] == pytest.approx([0.4, 0.9], abs=0.0101)


def test_threshold_is_below_the_loud_frames(monkeypatch):
    wav = tones([(0.1, 0.3)], 0.6)
    tail = slice(round(0.3 * RATE), round(0.4 * RATE))
    wav[tail] += 0.1 * 0.3 * torch.sin(torch.arange(round(0.1 * RATE)) * 0.1)
    model = Scripted([path({6: "A"}, 31)])
    batch = batch_of([("x", wav, "A")])
    for threshold, end in ((30.0, 0.4), (15.0, 0.3)):
        monkeypatch.setattr(latency, "_THRESHOLD", threshold)
        ends = word_ends(model, [batch], PIECES)
        assert ends["x"] == pytest.approx([end], abs=0.0101)


def test_ends_that_are_not_known():
    cut = tones([(0.1, 0.5)], 0.5)
    silent = torch.zeros(round(0.5 * RATE))
    fine = tones([(0.1, 0.3)], 0.5)
    batch = batch_of(
        [
            ("cut", cut, "A"),
            ("silent", silent, "A"),
            ("too few frames", fine, "AAA"),
            ("odd", fine, "A B"),
            ("no words", fine, ""),
        ]
    )
    # A letter outside the vocabulary, which the tokens leave out.
    batch.wrd[3] = "A B7"
    model = Scripted(
        [path({6: "A"}, 26)] * 2 + [path({1: "A"}, 4)] + [path({}, 26)] * 2
    )
    assert word_ends(model, [batch], PIECES) == {
        "cut": [None],
        "silent": [None],
        "too few frames": [None],
        "odd": [None, None],
        "no words": [],
    }


def test_latency_by_hand():
    wav = torch.zeros(RATE)
    # A symbol is there from its first frame on, whatever follows it.
    letters = {10: "A", 11: "A", 15: "B", 16: "B", 18: " ", 30: "C", 40: " "}
    first = path(letters | {45: "B"}, 51)
    # The second word is a substitution, the last a deletion.
    second = path({5: "A", 8: " ", 9: "B", 12: " ", 20: "C"}, 26)
    batch = batch_of([("x", wav, "AB C B"), ("y", wav[: RATE // 2], "A C C A")])
    ends = {"x": [0.25, 0.65, 0.8], "y": [None, 0.1, 0.3, 0.5]}
    model = Scripted([first, second])
    figures = emission_latency(model, [batch], PIECES, ends)
    expected = [300 - 250, 600 - 650, 900 - 800, 400 - 300]
    assert figures == {
        "mean": pytest.approx(np.mean(expected)),
        "median": pytest.approx(np.median(expected)),
        "p95": pytest.approx(np.percentile(expected, 95)),
        "words": 4,
        "hits": 5,
        "reference_words": 7,
    }
    ahead = emission_latency(model, [batch], PIECES, ends, look_ahead=0.07)
    for name in ("mean", "median", "p95"):
        assert ahead[name] == pytest.approx(figures[name] + 70)


def test_delayed_paths_are_later_by_the_delay():
    spans = [(0.2, 0.5), (0.75, 1.0)]
    batch = batch_of([("x", tones(spans, 1.6), "AB CA")])
    letters = {11: "A", 20: "B", 22: " ", 38: "C", 44: "A"}
    ends = word_ends(Scripted([path(letters, 81)]), [batch], PIECES)
    means = []
    for delay in (0, 8):
        late = {frame + delay: letter for frame, letter in letters.items()}
        model = Scripted([path(late, 81)])
        figures = emission_latency(model, [batch], PIECES, ends)
        means.append(figures["mean"])
        assert figures["words"] == 2
    assert means[0] == pytest.approx((400 - 500 + 880 - 1000) / 2, abs=10.1)
    assert means[1] - means[0] == pytest.approx(160)


@pytest.mark.parametrize("seed", range(3))
def test_words_are_those_of_the_greedy_decoder(seed):
    torch.manual_seed(seed)
    logits = [torch.randn(n, len(PIECES)) for n in (60, 37)]
    padded = Scripted(logits)(None, None)
    relative = padded.lengths / padded.logits.shape[1]
    decoded = ctc_greedy_decode(padded.logits, relative, blank_id=0)
    texts = [
        "".join(PIECES[i] for i in ids).replace("▁", " ") for ids in decoded
    ]
    texts = [" ".join(text.split()) for text in texts]
    wavs = torch.zeros(RATE), torch.zeros(RATE // 2)
    batch = batch_of(zip("xy", wavs, texts, strict=True))
    ends = {
        key: [0.0] * len(t.split()) for key, t in zip("xy", texts, strict=True)
    }
    figures = emission_latency(Scripted(logits), [batch], PIECES, ends)
    words = sum(len(text.split()) for text in texts)
    assert figures["hits"] == figures["reference_words"] == words > 5


def test_nothing_recognised():
    batch = batch_of([("x", torch.zeros(RATE), "AB"), ("y", torch.ones(9), "")])
    model = Scripted([path({}, 51), path({3: "A"}, 20)])
    figures = emission_latency(model, [batch], PIECES, {"x": [0.1], "y": []})
    assert figures == {
        "mean": None,
        "median": None,
        "p95": None,
        "words": 0,
        "hits": 0,
        "reference_words": 1,
    }


def test_ends_must_be_those_of_the_words():
    batch = batch_of([("x", torch.zeros(RATE), "AB A")])
    model = Scripted([path({}, 51)])
    for ends in ({}, {"x": [0.1]}, {"x": [0.1] * 3}):
        with pytest.raises(
            ValueError, match="x: word ends must be .* 2 words, got [013]"
        ):
            emission_latency(model, [batch], PIECES, ends)
