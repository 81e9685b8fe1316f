"""Transcripts by a teacher: their text, their confidence, their file."""

import csv
import itertools
import logging
import math
from typing import NamedTuple

import pytest
import torch
from speechbrain.dataio.dataset import DynamicItemDataset

from tutornet_sb.networks.acoustic_model import Encoding
from tutornet_sb.teachers.pseudo_labels import (
    letters_of,
    normalise,
    read_pseudo_labels,
    transcribe,
    write_pseudo_labels,
)

HOP = 10  # samples a frame
PIECES = ["a", "b", "_", "|", "1"]
BLANK = 2
LETTERS = set("AB'")


class Spoken(torch.nn.Module):
    """A model that finds in the samples of a frame which symbol is meant.

    The whole part of a sample is the symbol, the rest how sure it is.
    """

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(20.0))
        self.batches = []

    def forward(self, wavs, wav_lens):
        assert not self.training
        lengths = (wav_lens * wavs.shape[1]).round().long() // HOP
        frames = wavs.shape[1] // HOP
        frame = wavs[:, : frames * HOP].view(len(wavs), frames, HOP)[..., 0]
        symbols = torch.nn.functional.one_hot(frame.long(), len(PIECES))
        logits = self.scale * frame.frac().unsqueeze(-1) * symbols
        self.batches.append(lengths.tolist())
        return Encoding(logits, logits, lengths)


class Source(NamedTuple):
    model: torch.nn.Module
    source: str = "spoken"
    pieces: tuple = tuple(PIECES)
    blank_index: int = BLANK

    def decode(self, ids):
        return "".join(PIECES[i] for i in ids).replace("|", " ")


def speak(text, sure=0.99):
    """A waveform of one frame a letter."""
    frames = [PIECES.index(letter) + sure for letter in text]
    return torch.tensor(frames).repeat_interleave(HOP)


def make_data(spoken):
    data = DynamicItemDataset(
        {
            key: {"wave": wave, "duration": len(wave) / HOP}
            for key, wave in spoken.items()
        }
    )
    data.add_dynamic_item(lambda wave: wave, takes="wave", provides="sig")
    return data


@pytest.fixture
def source():
    return Source(Spoken().eval())


@pytest.fixture
def spoken():
    return {
        "one": speak("_aa_ab|_b|"),
        "two": speak("b1_|a", sure=0.3),
        "none": speak("____"),
        "last": speak("a|1b"),
    }


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return {row["ID"]: row for row in csv.DictReader(file)}


def brute_force(log_probs, symbols):
    """Probability of a transcript by going through all paths (float64)."""
    probabilities = log_probs.double().exp().tolist()
    total = 0.0
    for path in itertools.product(range(len(PIECES)), repeat=len(log_probs)):
        read = [s for s, _ in itertools.groupby(path) if s != BLANK]
        if read == symbols:
            total += math.prod(
                p[s] for p, s in zip(probabilities, path, strict=True)
            )
    return total


def test_text_and_confidence_against_all_paths(source):
    torch.manual_seed(0)
    # Two utterances of different length, so that padding is there to mislead.
    wavs = torch.zeros(3, 5 * HOP)
    symbols = torch.tensor([[0, 0, 2, 0, 1], [3, 1, 1, 9, 9], [2, 2, 2, 2, 9]])
    for b, frames in enumerate((5, 3, 4)):
        for t in range(frames):
            sure = 0.05 + 0.2 * torch.rand(())
            wavs[b, t * HOP : (t + 1) * HOP] = symbols[b, t] + sure
        wavs[b, frames * HOP :] = 0.9
    found = transcribe(source, wavs, torch.tensor([1.0, 0.6, 0.8]))
    assert [text for text, _ in found] == ["aab", " b", ""]
    log_probs = source.model(wavs, torch.ones(3)).logits.log_softmax(-1)
    for b, (frames, ids) in enumerate([(5, [0, 0, 1]), (3, [3, 1]), (4, [])]):
        probability = brute_force(log_probs[b, :frames], ids)
        expected = probability ** (1 / max(len(ids), 1))
        assert found[b][1] == pytest.approx(expected, rel=1e-4)
        assert 0 < found[b][1] < 1


def test_a_symbol_nearly_emitted_lowers_the_confidence(source):
    sure = speak("a__b")
    doubtful = sure.clone()
    doubtful[HOP : 2 * HOP] = BLANK + 0.1
    confidences = [
        transcribe(source, wav.unsqueeze(0), torch.ones(1))[0][1]
        for wav in (sure, doubtful)
    ]
    assert confidences[0] > 0.99 > 0.9 > confidences[1]


def test_output_that_is_not_finite(source):
    source.model.scale.data.fill_(math.nan)
    with pytest.raises(ValueError, match="output of spoken is not finite"):
        transcribe(source, speak("ab").unsqueeze(0), torch.ones(1))


@pytest.mark.parametrize(
    "text, letters, expected, left_out",
    [
        ("Hello  World\n", "HELOWRD", "HELLO WORLD", {}),
        ("HELLO", "helo", "hello", {}),
        ("HeLLo", "helo" + "HL", "HeLLo", {}),
        ("isn\u2019t it`s", "ISNT'", "ISN'T IT'S", {}),
        ("twenty-one \u2014 two", "TWENYO", "TWENTY ONE TWO", {}),
        (
            "<s>oh <unk> [NOISE] no</s>",
            "OHN",
            "OH NO",
            {"<s>": 1, "<unk>": 1, "[NOISE]": 1, "</s>": 1},
        ),
        ("cafe\u0301, 33", "CAF\u00c9", "CAF\u00c9", {",": 1, "3": 2}),
        ("na\u00efve", "NAVE", "NAVE", {"\u00ef": 1}),
        ("?!", "A", "", {"?": 1, "!": 1}),
    ],
)
def test_style_of_the_corpus(text, letters, expected, left_out):
    written, lost = normalise(text, set(letters))
    assert (written, dict(lost)) == (expected, left_out)


def test_letters_of_a_vocabulary():
    pieces = ["<unk>", "<s>", "|", "\u2581TH", "E", "'"]
    assert letters_of(pieces) == set("THE'")


def test_file_holds_the_transcripts_of_the_teacher(
    source, spoken, tmp_path, caplog
):
    path = tmp_path / "labels.csv"
    with caplog.at_level(logging.WARNING):
        write_pseudo_labels(source, make_data(spoken), path, LETTERS)
    assert "2 transcripts by spoken hold" in caplog.text
    assert "'1' (2)" in caplog.text
    rows = read(path)
    assert {key: row["transcript"] for key, row in rows.items()} == {
        "one": "AAB B",
        "two": "B A",
        "none": "",
        "last": "A B",
    }
    for key, wave in spoken.items():
        alone = transcribe(source, wave.unsqueeze(0), torch.ones(1))[0]
        assert float(rows[key]["confidence"]) == pytest.approx(
            alone[1], abs=2e-6
        )
    labels = read_pseudo_labels(path)
    assert labels.transcripts == {"one": "AAB B", "two": "B A", "last": "A B"}
    assert labels[1:] == (0, 1)
    labels = read_pseudo_labels(path, min_confidence=0.99)
    assert labels.transcripts == {"one": "AAB B", "last": "A B"}
    assert labels[1:] == (1, 1)


def test_batches_hold_so_many_seconds(source, tmp_path):
    spoken = {f"{i:03d}": speak("ab" * (2 + i % 7)) for i in range(40)}
    data = make_data(spoken)
    write_pseudo_labels(source, data, tmp_path / "x.csv", LETTERS, 60.0)
    frames = [len(b) * max(b) for b in source.model.batches]
    assert len(frames) < 20 and max(frames) <= 60
    assert len(read(tmp_path / "x.csv")) == 40


class Killed(Exception):
    pass


def kill_after(source, batches):
    def stop(*_):
        if len(source.model.batches) == batches:
            raise Killed

    return source.model.register_forward_pre_hook(stop)


@pytest.mark.parametrize("torn", [b"", b"0", b'099,0.9,0,"A', b"099,0.99"])
def test_resumes_where_it_was_killed(source, tmp_path, torn):
    spoken = {f"{i:03d}": speak("ab" * (2 + i % 7)) for i in range(20)}
    data, path = make_data(spoken), tmp_path / "labels.csv"
    hook = kill_after(source, 2)
    with pytest.raises(Killed):
        write_pseudo_labels(source, data, path, LETTERS, 30.0)
    hook.remove()
    with pytest.raises(ValueError, match="missing or incomplete"):
        read_pseudo_labels(path)
    before = path.read_bytes()
    done = set(read(path))
    assert len(done) == sum(map(len, source.model.batches)) > 0
    with open(path, "ab") as file:
        file.write(torn)
    source.model.batches.clear()
    write_pseudo_labels(source, data, path, LETTERS, 30.0)
    assert sum(map(len, source.model.batches)) == 20 - len(done)
    assert path.read_bytes().startswith(before)
    assert set(read_pseudo_labels(path).transcripts) == set(spoken)
    # Finished: nothing more to do.
    before = path.read_bytes()
    source.model.batches.clear()
    write_pseudo_labels(source, data, path, LETTERS)
    assert not source.model.batches and path.read_bytes() == before


@pytest.mark.parametrize("start", [b"", b"ID,conf"])
def test_killed_before_the_first_batch(source, spoken, tmp_path, start):
    path, data = tmp_path / "labels.csv", make_data(spoken)
    hook = kill_after(source, 0)
    with pytest.raises(Killed):
        write_pseudo_labels(source, data, path, LETTERS)
    hook.remove()
    path.write_bytes(start)
    write_pseudo_labels(source, data, path, LETTERS)
    assert len(read(path)) == 4


def test_new_utterances_are_added(source, spoken, tmp_path):
    path = tmp_path / "labels.csv"
    write_pseudo_labels(source, make_data(spoken), path, LETTERS)
    more = spoken | {"new": speak("bb_b")}
    write_pseudo_labels(source, make_data(more), path, LETTERS)
    assert read_pseudo_labels(path).transcripts["new"] == "BB"
    assert len(read(path)) == 5


def test_labels_of_another_kind_are_refused(source, spoken, tmp_path):
    path, data = tmp_path / "labels.csv", make_data(spoken)
    write_pseudo_labels(source, data, path, LETTERS)
    other = source._replace(source="other")
    with pytest.raises(ValueError, match="there teacher is spoken.*now.*other"):
        write_pseudo_labels(other, data, path, LETTERS)
    with pytest.raises(ValueError, match="there letters is 'AB.*now it is ABC"):
        write_pseudo_labels(source, data, path, set("ABC"))
    (tmp_path / "labels.csv.json").unlink()
    with pytest.raises(ValueError, match="teacher is not known"):
        write_pseudo_labels(source, data, path, LETTERS)


@pytest.mark.parametrize(
    "line",
    [
        "x,0.5,0",
        "x,0.5,0,A,B",
        "x,half,0,A",
        "x,nan,0,A",
        "x,1.5,0,A",
        "x,0.5,-1,A",
    ],
)
def test_damaged_file(source, spoken, tmp_path, line):
    path = tmp_path / "labels.csv"
    write_pseudo_labels(source, make_data(spoken), path, LETTERS)
    with open(path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match="labels.csv is damaged at line 6"):
        read_pseudo_labels(path)
    path.write_text("ID,text\n")
    with pytest.raises(ValueError, match="damaged at line 1"):
        write_pseudo_labels(source, make_data(spoken), path, LETTERS)


def test_wrong_calls(source, spoken, tmp_path):
    path = tmp_path / "labels.csv"
    with pytest.raises(ValueError, match="labels.csv is missing"):
        read_pseudo_labels(path)
    with pytest.raises(ValueError, match="spoken has no CTC head"):
        headless = source._replace(pieces=None)
        write_pseudo_labels(headless, make_data(spoken), path, LETTERS)
    spoken = {key: spoken[key] for key in ("two", "none")}
    write_pseudo_labels(source, make_data(spoken), path, LETTERS)
    with pytest.raises(
        ValueError, match="of 2, 1 are below .* and 1 are empty"
    ):
        read_pseudo_labels(path, 0.99)
