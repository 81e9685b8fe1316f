"""Recordings of one's own, as docs/own_corpus.md says: German, in tables."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from small_runs import make_speech

from tutornet_sb.corpora.tokenizer import pieces
from tutornet_sb.inference.recogniser import load_recogniser
from tutornet_sb.inference.speech import find_speech
from tutornet_sb.inference.transcription import find_audio, transcribe
from tutornet_sb.networks import runs
from tutornet_sb.publishing.export import export
from tutornet_sb.util.files import read_json

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "LibriSpeech" / "TutorNet"
PAGE = (ROOT / "docs" / "own_corpus.md").read_text(encoding="utf-8")
LETTERS = sorted(
    {*"Übung macht den Meister drei Größen sind zu groß wer will der kann"}
    - {" "}
)
SMALL = [
    *("--corpus_overrides", "{teacher_epochs: 1, epochs: 2, batch_seconds: 4}"),
    *("--student_overrides", "{channels: 4, hidden_size: 4, n_mels: 16}"),
    *("--teacher.yaml", "hparams/models/jasper_mini.yaml"),
    *("--rkd.share", "0.5", "--rkd.head_frames", "50", "--noprogressbar"),
    *("--targets", "store", "--augmentation.speeds", "[90, 100, 300]"),
    *("--utterances.max_skipped", "0.3"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the command of the page has run once, made small."""
    folder = tmp_path_factory.mktemp("own corpus")
    (rows,) = re.findall(r"```csv\n(.*?)```", PAGE, re.DOTALL)
    recordings = folder / "recordings"
    for index, name in enumerate(re.findall(r"^(clips/.*?),", rows, re.M)):
        path = recordings / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rate = (8000, 44100, 16000)[index]
        wave = make_speech(index, 1.2 * rate / 16000)
        soundfile.write(path, wave.numpy(), rate)
    for split in ("train", "valid", "test"):
        text = rows + "clips/none.wav,wer\n" * (split == "train")
        # As an editor on Windows writes it
        (recordings / f"{split}.csv").write_text(text, "utf-8-sig")
    (line,) = [
        line
        for line in PAGE.splitlines()
        if line.startswith("python train.py") and "--train_csv" in line
    ]
    _, _, hparams, *words = shlex.split(line)
    done = subprocess.run(
        [sys.executable, RECIPE / "train.py", RECIPE / hparams, *words, *SMALL],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stderr + done.stdout)[-3000:]
    return folder


@pytest.fixture
def student(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return Path("results/own/rkd+skd_lstm_by_jasper_mini/1234")


def test_the_alphabet_is_that_of_the_corpus(student):
    model, tokenizer = runs.load_run(student)
    assert pieces(tokenizer) == ["<unk>", *LETTERS, "▁"]
    assert model.head.out_features == len(LETTERS) + 2
    teacher, _ = runs.load_run("results/own/teacher_jasper_mini/1234")
    assert teacher.head.out_features == len(LETTERS) + 2
    results = runs.read_results(student)
    splits = results["stages"]["skd"]["splits"]
    assert list(splits) == ["dev-valid", "test"]
    assert splits["test"]["words"] == 13
    assert results["teacher"]["method"] == "ctc"


def test_what_is_left_out_is_told(student):
    log = (student / "log.txt").read_text()
    skipped = Path("results/own/manifests/skipped_train.csv").read_text()
    assert skipped.splitlines()[1:] == [
        "clips/none,train.csv:5,no such audio file"
    ]
    # 1.2 s at three times the speed are 20 frames of 20 ms, or one more.
    short = (student / "too_short_for_ctc.txt").read_text().splitlines()
    assert short == [
        f"clips/{name} at 300 % of its speed" for name in ("0001", "0002")
    ]
    assert "0 of 3 training utterances have fewer frames" in log
    assert "no CTC loss" not in log
    corpus = read_json(student / "corpus.json")
    assert corpus["splits"]["train"]["utterances"] == 3


def test_an_export_is_tried_on_its_test_set(student, tmp_path):
    export(student, tmp_path / "to", onnx=True)
    config = read_json(tmp_path / "to" / "config.json")
    assert list(config["onnx"]["scores"]) == ["test"]
    moved = tmp_path / "moved"
    shutil.copytree("recordings", moved)
    speech = find_speech(
        student,
        moved,
        {"splits": {"dev-valid": {}, "test": {}}},
        runs.load_run(student)[0],
        needed=True,
    )
    assert {one.text.split()[0] for one in speech.test} == {
        "Übung",
        "drei",
        "wer",
    }
    for one in speech.test:
        assert Path(one.path).is_relative_to(moved)
        assert len(one.read()) == 19200
    recogniser = load_recogniser(str(tmp_path / "to"))
    files = find_audio([moved])
    assert len(files) == 3
    for found in transcribe(recogniser, files):
        assert set(found.text) <= {*LETTERS, " "}
