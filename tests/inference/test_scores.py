"""Scores against a plain edit distance, and the speed of a model."""

import re
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutornet_sb.inference.scores import (
    count_errors,
    read_alignments,
    real_time_factor,
    score,
    write_alignments,
)
from tutornet_sb.networks.acoustic_model import Encoding


def edits(reference, hypothesis):
    """Levenshtein distance by the textbook's table."""
    row = list(range(len(hypothesis) + 1))
    for i, wanted in enumerate(reference, 1):
        above, row = row, [i]
        for j, found in enumerate(hypothesis, 1):
            change = above[j - 1] + (wanted != found)
            row.append(min(change, above[j] + 1, row[j - 1] + 1))
    return row[-1]


def rate(references, hypotheses, split):
    wrong = total = 0
    for key, text in references.items():
        wrong += edits(split(text), split(hypotheses[key]))
        total += len(split(text))
    return 100 * wrong / total


# Words that share letters, and letters that a corpus may have
WORDS = st.sampled_from(
    ["ONE", "TO", "TWO", "TOO", "A", "IT'S", "ÉTÉ", "ß", "好"]
)
TEXTS = st.lists(WORDS, max_size=6).map(" ".join)
SPOKEN = st.dictionaries(
    st.text(max_size=4), st.tuples(TEXTS, TEXTS), max_size=4
).filter(lambda pairs: any(text for text, _ in pairs.values()))


@given(SPOKEN)
def test_rates_are_those_of_a_plain_edit_distance(pairs):
    references = {key: text for key, (text, _) in pairs.items()}
    hypotheses = {key: text for key, (_, text) in reversed(pairs.items())}
    scores = score(references, hypotheses)
    wer = rate(references, hypotheses, str.split)
    cer = rate(references, hypotheses, list)
    assert scores["wer"] == pytest.approx(wer, rel=1e-12)
    assert scores["cer"] == pytest.approx(cer, rel=1e-12)
    assert scores["utterances"] == len(references)
    words = sum(len(text.split()) for text in references.values())
    assert scores["words"] == words


@given(SPOKEN)
def test_errors_of_each_utterance_are_its_edit_distances(pairs):
    references = {key: text for key, (text, _) in pairs.items()}
    hypotheses = {key: text for key, (_, text) in pairs.items()}
    assert count_errors(references, hypotheses) == {
        key: [
            count
            for split in (str.split, list)
            for count in (
                edits(split(text), split(hypotheses[key])),
                len(split(text)),
            )
        ]
        for key, text in references.items()
    }


def test_an_empty_hypothesis_counts_as_deletions():
    scores = score({"a": "ONE TWO", "b": "SIX"}, {"a": "", "b": "SIX"})
    assert scores["wer"] == pytest.approx(100 * 2 / 3)
    assert scores["cer"] == pytest.approx(100 * 7 / 10)
    assert scores["words"] == 3
    assert score({"a": "ONE TWO"}, {"a": ""})["wer"] == 100


def test_words_that_nobody_said_count():
    assert score({"a": "ONE"}, {"a": "ONE TWO THREE"})["wer"] == 200


def test_one_empty_reference_among_others_counts_its_insertions():
    scores = score({"a": "", "b": "ONE"}, {"a": "TWO", "b": "ONE"})
    assert scores["wer"] == pytest.approx(100)
    assert (scores["utterances"], scores["words"]) == (2, 1)


def test_ids_that_differ_are_named():
    with pytest.raises(ValueError, match="2 utterances .*lost, new"):
        score({"a": "ONE", "lost": "TWO"}, {"a": "ONE", "new": "TWO"})


@pytest.mark.parametrize("references", [{}, {"a": ""}, {"a": " ", "b": ""}])
def test_references_without_a_word_have_no_rate(references):
    with pytest.raises(ValueError, match="no word"):
        score(references, dict.fromkeys(references, "ONE"))


def test_alignments_show_each_utterance_under_its_id(tmp_path):
    references = {"84-121-0001": "ONE TWO", "84-121-0000": "SIX TEN", "7": "A"}
    hypotheses = {"84-121-0001": "ONE TOO", "84-121-0000": "SIX TEN", "7": ""}
    path = tmp_path / "wer.txt"
    write_alignments(path, references, hypotheses)
    text, _, summary = path.read_text().partition("=== SUMMARY ===")
    assert "SENTENCE" not in text
    assert "wer=40.00%" in summary
    blocks = re.split(r"^=== (.+) ===$", text, flags=re.MULTILINE)
    found = dict(zip(blocks[1::2], blocks[2::2], strict=True))
    assert found.keys() == references.keys()
    for key, block in found.items():
        reference = re.search(r"^REF: (.*)$", block, re.MULTILINE)[1]
        hypothesis = re.search(r"^HYP: (.*)$", block, re.MULTILINE)[1]
        assert reference.replace("*", "").split() == references[key].split()
        assert hypothesis.replace("*", "").split() == hypotheses[key].split()


@given(st.lists(st.tuples(*[st.lists(WORDS, max_size=5)] * 2), min_size=1))
def test_alignments_are_read_as_they_were_written(pairs):
    # One that has words, or there is no WER
    pairs = [(["A"], []), *pairs]
    texts = {
        f"1-{number}": tuple(map(" ".join, pair))
        for number, pair in enumerate(pairs)
    }
    references, hypotheses = (
        {key: pair[side] for key, pair in texts.items()} for side in (0, 1)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wer.txt"
        write_alignments(path, references, hypotheses)
        assert read_alignments(path) == texts


def test_alignments_of_many_utterances_keep_their_ids(tmp_path):
    texts = {f"{97 * i % 30}-{i}": "ONE TWO" for i in range(30)}
    write_alignments(tmp_path / "wer.txt", texts, texts)
    text = (tmp_path / "wer.txt").read_text()
    *ids, last = re.findall("=== (.+) ===", text)
    assert ids == sorted(texts)
    assert last == "SUMMARY"


class Clockwork(torch.nn.Module):
    """A model that takes a tenth of the audio's duration, by its own clock."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.calls, self.now = [], 0.0

    def forward(self, wavs, wav_lens):
        assert wavs.shape[0] == 1 and wav_lens.tolist() == [1.0]
        assert not torch.is_grad_enabled()
        self.calls.append(wavs.shape[1])
        # The first passes of a real model are slow, and another program may
        # disturb some later.
        slow = 50 if len(self.calls) in (1, 2, 4, 6, 8) else 1
        self.now += slow * 0.1 * wavs.shape[1] / 16000
        frames = wavs.shape[1] // 320 + 1
        logits = torch.zeros(1, frames, 3)
        return Encoding(logits, logits, torch.tensor([frames]))


def test_the_real_time_factor_is_seconds_for_a_second(monkeypatch):
    model = Clockwork()
    monkeypatch.setattr(
        "tutornet_sb.inference.scores.time.perf_counter", lambda: model.now
    )
    wavs = [torch.zeros(samples) for samples in (16000, 8000, 24000)]
    assert real_time_factor(model, wavs, 16000) == pytest.approx(0.1)
    # Two to warm up, then three times each utterance.
    assert model.calls == [16000, 8000] + 3 * [16000, 8000, 24000]


def test_the_real_time_factor_of_a_real_clock_is_positive():
    assert real_time_factor(Clockwork(), [torch.zeros(1600)], 16000) > 0
