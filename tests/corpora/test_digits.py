"""Connected digits made of tones that are named like the recordings."""

import importlib.util
import os
import re

import numpy as np
import pytest
import soundfile
from conftest import DIGITS
from typer.testing import CliRunner

from tutornet_sb.cli import app
from tutornet_sb.corpora import digits as corpus
from tutornet_sb.corpora.librispeech import CorpusError, prepare_librispeech
from tutornet_sb.files import read_json

SPEAKERS = ["george", "jackson", "lucas", "nicolas", "yweweler"]
# The recipe by which the shared corpus was made
REFERENCE = DIGITS.parents[1] / "make_digits.py"


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Tones, one pitch a digit, of 50 to 100 ms."""
    folder = tmp_path_factory.mktemp("fsdd") / "recordings"
    folder.mkdir()
    for digit in range(10):
        for number, speaker in enumerate(SPEAKERS):
            for take in range(50):
                path = folder / f"{digit}_{speaker}_{take}.wav"
                if take >= 5:
                    # As many files, in less time
                    os.link(
                        path.with_stem(f"{digit}_{speaker}_{take % 5}"), path
                    )
                    continue
                time = np.arange(400 + 80 * take) / 8000
                wav = 0.1 * np.sin(2 * np.pi * (300 + 200 * digit) * time)
                if number == 0:
                    # One speaker was recorded in stereo.
                    wav = np.stack([wav, wav / 2], axis=1)
                soundfile.write(path, wav, 8000)
    return folder


@pytest.fixture(scope="module")
def made(recordings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "digits"
    return folder, corpus.make_digits(recordings, folder)


def contents(folder, pattern):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob(pattern))
    }


def test_transcripts_are_those_of_the_shared_corpus(made, digits):
    # Order and lengths do not depend on the audio.
    folder, _ = made
    assert contents(folder, "*.txt") == contents(digits, "*.txt")
    ours = [p.relative_to(folder) for p in sorted(folder.rglob("*.flac"))]
    theirs = [p.relative_to(digits) for p in sorted(digits.rglob("*.flac"))]
    assert ours == theirs


def test_the_audio_is_that_of_the_shared_recipe(made, recordings, tmp_path):
    if not REFERENCE.is_file():
        pytest.skip(f"{REFERENCE} is not there")
    spec = importlib.util.spec_from_file_location("reference", REFERENCE)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    name = "test-clean"
    reference.build(recordings, tmp_path, name, *reference.PLANS["dev"][name])
    theirs = contents(tmp_path / name, "*.flac")
    assert theirs and contents(made[0] / name, "*.flac") == theirs


def test_an_utterance_is_a_string_of_its_digits(made):
    folder, _ = made
    listing = folder / "dev-clean" / "1003" / "1" / "1003-1.trans.txt"
    key, *words = listing.read_text().splitlines()[4].split()
    wav, rate = soundfile.read(listing.parent / f"{key}.flac")
    assert rate == 16000 and wav.ndim == 1
    assert 3 <= len(words) <= 7
    # The pitch of each loud stretch tells its digit.
    loud = np.abs(wav) > 0.03
    edges = np.flatnonzero(np.diff(loud.astype(int)))
    groups = np.split(edges, np.flatnonzero(np.diff(edges) > 300) + 1)
    heard = []
    for group in groups:
        part = wav[group[0] : group[-1]]
        spectrum = np.abs(np.fft.rfft(part, 16000))
        heard.append(corpus.WORDS[round((spectrum.argmax() - 300) / 200)])
    assert heard == words


def test_each_recording_is_heard_in_one_split_as_often_as_said(made):
    folder, sizes = made
    for name, takes, uses in (
        ("train-clean-100", 40, 2),
        ("dev-clean", 3, 3),
        ("test-clean", 2, 3),
    ):
        texts = contents(folder / name, "*.txt").values()
        words = re.findall(r" ([A-Z]+)", b"".join(texts).decode())
        said = 5 * 10 * takes * uses
        # What is left at the end is too little for an utterance.
        assert said - 5 * 2 <= len(words) <= said
        lines = sum(text.count(b"\n") for text in texts)
        assert sizes[name]["utterances"] == lines
    numbers = [set(split.recordings) for split in corpus.SPLITS.values()]
    assert sum(map(len, numbers)) == len(set.union(*numbers))


def test_the_corpus_can_be_prepared(made, tmp_path):
    folder, sizes = made
    manifests = prepare_librispeech(folder, tmp_path)
    for name, size in sizes.items():
        lines = manifests[name].read_text().splitlines()
        assert len(lines) - 1 == size["utterances"]
        seconds = sum(float(line.split(",")[1]) for line in lines[1:])
        assert seconds == pytest.approx(size["seconds"])
    assert read_json(folder / "digits.json") == {"splits": sizes}


def command(*words):
    return CliRunner().invoke(app, ["corpus", "digits", *map(str, words)])


def test_the_command_makes_it_and_says_how_much(
    recordings, tmp_path, monkeypatch
):
    # A split is enough.
    splits = {"test-clean": corpus.SPLITS["test-clean"]}
    monkeypatch.setattr(corpus, "SPLITS", splits)
    to = tmp_path / "digits"
    done = command("--recordings", recordings, "--to", to)
    assert done.exit_code == 0, done.stderr
    count = len(list(to.rglob("*.flac")))
    assert f"test-clean: {count} utterances" in done.stdout
    again = command("--recordings", recordings, "--to", to)
    assert again.exit_code == 2 and "is there already" in again.stderr


def test_what_is_no_clone_of_the_data_set_is_refused(
    recordings, tmp_path, monkeypatch
):
    with pytest.raises(CorpusError, match="lacks .*first of them 0_george_10"):
        corpus.make_digits(tmp_path, tmp_path / "to")
    splits = {"test-clean": corpus.SPLITS["test-clean"]}
    monkeypatch.setattr(corpus, "SPLITS", splits)
    broken = tmp_path / "recordings"
    broken.mkdir()
    for path in recordings.glob("*_[56].wav"):
        (broken / path.name).symlink_to(path)
    victim = broken / "3_lucas_5.wav"
    for content, message in (
        (lambda: victim.write_bytes(b"noise"), "3_lucas_5.wav cannot be read"),
        (
            lambda: soundfile.write(victim, np.zeros(9), 16000),
            "9 samples at 16000 Hz",
        ),
    ):
        victim.unlink()
        content()
        with pytest.raises(CorpusError, match=message):
            corpus.make_digits(broken, tmp_path / "to")
        assert not (tmp_path / "to").exists()
