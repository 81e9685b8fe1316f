"""Manifests of LibriSpeech: their values, and every kind of damage."""

import csv
import importlib.util
import logging
import math
import pathlib
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speechbrain.dataio.dataset import DynamicItemDataset

from tutornet_sb.corpora.audio import read_utterance
from tutornet_sb.corpora.librispeech import (
    find_librispeech,
    prepare_librispeech,
    read_transcript,
)
from tutornet_sb.inference.transcription import read_audio
from tutornet_sb.util.errors import InputError

REPOSITORY = pathlib.Path(__file__).parents[2]
SCRIPT = REPOSITORY / "recipes/LibriSpeech/TutorNet/librispeech_prepare.py"


def write_audio(path, samples, sample_rate=16000, channels=1):
    rng = np.random.default_rng(samples)
    wave = 0.1 * rng.standard_normal((samples, channels))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, sample_rate, subtype="PCM_16")


def write_chapter(split, speaker, chapter, texts, **options):
    folder = split / str(speaker) / str(chapter)
    lines = []
    for i, text in enumerate(texts):
        name = f"{speaker}-{chapter}-{i:04d}"
        write_audio(folder / f"{name}.flac", 1600 + 37 * i, **options)
        lines.append(f"{name} {text}\n")
    trans = folder / f"{speaker}-{chapter}.trans.txt"
    trans.write_text("".join(lines))
    return trans


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "data" / "LibriSpeech"
    for split in ("train-clean-100", "dev-clean"):
        # Speaker 100 before 20 as folders and as ids alike.
        write_chapter(root / split, 20, 7, ["IT'S TWO", "A, B"])
        write_chapter(root / split, 100, 3, ["ONE", "TWO", "THREE"])
    return root


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def reasons(save_folder, split="dev-clean"):
    rows = read(save_folder / f"skipped_{split}.csv")
    return {row["id"]: row["reason"] for row in rows}


def test_manifest_matches_the_audio(corpus, tmp_path):
    manifests = prepare_librispeech(corpus.parent, tmp_path / "out")
    assert list(manifests) == ["train-clean-100", "dev-clean"]
    root = find_librispeech(corpus.parent)
    assert root == corpus
    data = DynamicItemDataset.from_csv(
        manifests["dev-clean"], {"data_root": root}
    )
    data.set_output_keys(["id", "wav", "duration", "spk_id", "wrd"])
    items = list(data)
    assert [(item["id"], item["spk_id"], item["wrd"]) for item in items] == [
        ("100-3-0000", "100", "ONE"),
        ("100-3-0001", "100", "TWO"),
        ("100-3-0002", "100", "THREE"),
        ("20-7-0000", "20", "IT'S TWO"),
        ("20-7-0001", "20", "A, B"),
    ]
    for item in items:
        wave, sample_rate = soundfile.read(item["wav"])
        assert item["duration"] == len(wave) / sample_rate
    skipped = (tmp_path / "out" / "skipped_dev-clean.csv").read_text()
    assert skipped == "id,file,reason\n"


def test_every_damage_is_named(corpus, tmp_path):
    split = corpus / "dev-clean"
    trans = write_chapter(split, 5, 1, [f"WORD {i}" for i in range(20)])
    folder = trans.parent

    def audio(i):
        return folder / f"5-1-{i:04d}.flac"

    audio(0).unlink()
    audio(1).write_bytes(b"")
    audio(2).write_bytes(b"not a FLAC file")
    write_audio(audio(3), 800, sample_rate=4000)
    write_audio(audio(4), 9600, sample_rate=96000)
    header = bytearray(audio(5).read_bytes())
    header[21] &= 0xF0  # STREAMINFO: 36 bits of length, 0 for unknown
    header[22:26] = bytes(4)
    audio(5).write_bytes(header)
    lines = trans.read_bytes().splitlines()
    lines[6] = b"5-1-0006"
    lines[7] = b"5-1-0007 CAF\xc9"
    lines[8] = b"5-2-0008 OF ANOTHER CHAPTER"
    lines[9] = b"5-1-0009 FIVE $dollars"
    lines.append(b"5-1-0010 SAID AGAIN")
    del lines[11]
    trans.write_bytes(b"\n\n".join(lines))
    audio(12).unlink()
    audio(12).mkdir()
    (folder / "._5-1-0013.flac").write_bytes(b"left by a file manager")
    write_audio(split / "6" / "1" / "6-1-0000.flac", 1600)

    out = tmp_path / "out"
    manifests = prepare_librispeech(
        corpus, out, splits=["dev-clean"], max_skipped=0.6
    )
    assert reasons(out) == {
        "5-1-0000": "transcript without audio",
        "5-1-0001": "empty audio file",
        "5-1-0002": "unreadable audio",
        "5-1-0003": "sample rate of 4000 Hz outside 8000 to 48000",
        "5-1-0004": "sample rate of 96000 Hz outside 8000 to 48000",
        "5-1-0005": "audio of no or unknown length",
        "5-1-0006": "empty transcript",
        "5-1-0007": "transcript not UTF-8",
        "5-2-0008": "id of another chapter",
        "5-1-0008": "audio without transcript",
        "5-1-0009": "$ in transcript",
        "5-1-0010": "duplicate id",
        "5-1-0011": "audio without transcript",
        "5-1-0012": "unreadable audio",
        "6-1-0000": "audio without transcript",
    }
    kept = [row["ID"] for row in read(manifests["dev-clean"])]
    assert kept[-2:] == ["5-1-0018", "5-1-0019"]
    assert len(kept) == 5 + 7
    files = [row["file"] for row in read(out / "skipped_dev-clean.csv")]
    assert "dev-clean/5/1/5-1-0000.flac" in files
    assert "dev-clean/5/1/5-1.trans.txt" in files


# ----------------------------------------------------------- whatever it holds

# What a line, a field of a manifest or SpeechBrain might trip over
LETTERS = st.characters(
    exclude_categories=["Cs"], exclude_characters="$\0\ufffd"
)
WORDS = st.one_of(
    st.text(LETTERS, max_size=8),
    st.sampled_from(['"', "'", ",", '","', "\\", "#", "=", "\t", "a\x85b"]),
)
TEXTS = st.lists(WORDS, max_size=5).map(" ".join)
SPACES = st.sampled_from([" ", "  ", "\t", " \t"])
ENDS = st.sampled_from(["\n", "\r\n", "\r", "\n\n", " \n"])
IDS = st.from_regex("[a-z0-9-]{1,8}", fullmatch=True)


def tidy(text):
    """Words as the reader parts them, where lines end as those of bytes do."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@given(st.dictionaries(IDS, st.tuples(SPACES, TEXTS, ENDS)))
def test_transcripts_are_read_as_they_were_written(scratch, lines):
    path = scratch / "x.trans.txt"
    lines = {
        key: (space, text.replace("\n", "").replace("\r", ""), end)
        for key, (space, text, end) in lines.items()
    }
    path.write_bytes(
        "".join(
            f"{key}{space}{text}{end}"
            for key, (space, text, end) in lines.items()
        ).encode()
    )
    texts, faults = read_transcript(path)
    expected = {key: tidy(text) for key, (_, text, _) in lines.items()}
    assert texts == {key: text for key, text in expected.items() if text}
    empty = [key for key, text in expected.items() if not text]
    assert faults == dict.fromkeys(empty, "empty transcript")


@given(st.binary(max_size=80), st.sampled_from(["", "1-", "a"]))
def test_any_bytes_are_transcripts_or_faults(scratch, content, prefix):
    path = scratch / "x.trans.txt"
    path.write_bytes(content)
    texts, faults = read_transcript(path, prefix)
    content = content.removeprefix(b"\xef\xbb\xbf")
    words = [
        line.decode(errors="replace").split() for line in content.splitlines()
    ]
    names = {line[0] for line in words if line}
    assert texts.keys() | faults.keys() == names
    assert not texts.keys() & faults.keys()
    for name, text in texts.items():
        assert name.startswith(prefix)
        assert text and text == tidy(text) and "$" not in name + text
        assert (name, text) in [
            (line[0], tidy(" ".join(line[1:]))) for line in words if line
        ]


STATES = {
    "sound": None,
    "no audio": "transcript without audio",
    "no text": "audio without transcript",
    "empty text": "empty transcript",
    "dollar": "$ in transcript",
    "NUL": "NUL in transcript",
    "not UTF-8": "transcript not UTF-8",
    "twice": "duplicate id",
    "empty audio": "empty audio file",
    "other audio": "unreadable audio",
    "4 kHz": "sample rate of 4000 Hz outside 8000 to 48000",
}


@settings(max_examples=25)
@given(
    st.dictionaries(
        st.tuples(*[st.integers(0, 10**6)] * 3),
        st.tuples(st.sampled_from([*STATES, "sound", "sound"]), TEXTS),
        min_size=1,
        max_size=8,
    )
)
def test_a_manifest_holds_each_sound_utterance_and_the_rest_is_listed(
    scratch, utterances
):
    root = scratch / "LibriSpeech"
    shutil.rmtree(root, ignore_errors=True)
    expected, skipped = {}, {}
    for (speaker, chapter, number), (state, text) in utterances.items():
        folder = root / "dev-clean" / str(speaker) / str(chapter)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{speaker}-{chapter}-{number:04d}"
        audio = folder / f"{name}.flac"
        text = "A" + text.replace("\n", "").replace("\r", "")
        if state == "empty audio":
            audio.touch()
        elif state == "other audio":
            audio.write_bytes(b"fLaC and nothing else")
        elif state != "no audio":
            rate = 4000 if state == "4 kHz" else 16000
            write_audio(audio, 640 + number % 100, sample_rate=rate)
        line = f"{name} {text}\n".encode()
        if state == "empty text":
            line = f"{name}\n".encode()
        elif state == "not UTF-8":
            line = f"{name} CAF".encode() + b"\xc9\n"
        elif state == "NUL":
            line = f"{name} {text} \0\n".encode()
        elif state == "dollar":
            line = f"{name} $data_root {text}\n".encode()
        elif state == "twice":
            line *= 2
        if state != "no text":
            with open(folder / f"{speaker}-{chapter}.trans.txt", "ab") as file:
                file.write(line)
        if state == "sound":
            expected[name] = (tidy(text), (640 + number % 100) / 16000)
        else:
            skipped[name] = STATES[state]
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        (manifest,) = prepare_librispeech(root, out, max_skipped=1).values()
    except InputError as error:
        assert not expected and "cannot be used: " in str(error)
    else:
        items = read_with_speechbrain(manifest, root)
        assert {
            item["id"]: (item["wrd"], item["duration"]) for item in items
        } == expected
        for item in items:
            assert pathlib.Path(item["wav"]).is_file()
    assert reasons(out) == skipped


def test_hidden_files_and_byte_order_marks_are_ignored(corpus, tmp_path):
    split = corpus / "dev-clean"
    wanted = prepare_librispeech(corpus, tmp_path / "before", ["dev-clean"])
    wanted = read(wanted["dev-clean"])
    for trans in sorted(split.rglob("*.trans.txt")):
        trans.write_bytes(b"\xef\xbb\xbf" + trans.read_bytes())
        hidden = trans.with_name(f"._{trans.name}")
        hidden.write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X")
    shutil.copytree(split / "20" / "7", split / ".20" / "7")
    shutil.copytree(split / "20" / "7", split / "20" / ".7")
    shutil.copytree(split, corpus / ".Trashes" / "dev-clean")
    shutil.copytree(split / "20", corpus / ".train-other-500" / "20")
    found = prepare_librispeech(corpus, tmp_path / "after", ["dev-clean"])
    assert read(found["dev-clean"]) == wanted
    assert reasons(tmp_path / "after") == {}
    with pytest.raises(InputError, match="holds dev-clean, train-clean-100."):
        prepare_librispeech(corpus, tmp_path / "out", [".Trashes"])


def test_letters_are_composed(tmp_path):
    path = tmp_path / "x.trans.txt"
    path.write_text("a cafe\u0301\u00a0noir\nb ça\n", encoding="utf-8-sig")
    assert read_transcript(path) == ({"a": "café noir", "b": "ça"}, {})


FORMATS = {
    "7-1-0000.WAV": (16000, 1, {}),
    "7-1-0001.FLAC": (16000, 1, {}),
    "7-1-0002.wav": (8000, 1, {}),
    "7-1-0003.ogg": (16000, 1, {}),
    "7-1-0004.Mp3": (44100, 2, {}),
    "7-1-0005.flac": (48000, 3, {}),
    "7-1-0006.aiff": (22050, 2, {}),
    "7-1-0007.opus": (48000, 2, {"format": "OGG", "subtype": "OPUS"}),
}


def test_any_format_rate_and_number_of_channels(tmp_path):
    root = tmp_path / "LibriSpeech"
    chapter = root / "dev-clean" / "7" / "1"
    chapter.mkdir(parents=True)
    waves, lines = {}, []
    for name, (rate, channels, options) in FORMATS.items():
        key = name.partition(".")[0]
        # Tones that both rates can hold, at other levels in each channel
        time = np.arange(round(0.731 * rate)) / rate
        window = np.hanning(len(time))
        tone = window * np.sin(2 * np.pi * 440 * time)
        levels = np.linspace(0.1, 0.5, channels)
        soundfile.write(chapter / name, tone[:, None] * levels, rate, **options)
        waves[key] = levels.mean() * tone
        lines.append(f"{key} TONE\n")
    # Of two recordings the better one is read.
    soundfile.write(chapter / "7-1-0005.mp3", np.zeros(9000), 16000)
    (chapter / "7-1.trans.txt").write_text("".join(lines))
    out = tmp_path / "out"
    manifests = prepare_librispeech(root, out)
    assert reasons(out) == {}
    items = read_with_speechbrain(manifests["dev-clean"], root)
    assert [item["id"] for item in items] == sorted(waves)
    silent = prepare_librispeech(root, out, untranscribed=["dev-clean"])
    assert [(row["wav"], row["wrd"]) for row in read(silent["dev-clean"])] == [
        (row["wav"], "") for row in read(manifests["dev-clean"])
    ]
    for item in items:
        name = pathlib.Path(item["wav"]).name
        assert name in FORMATS
        rate = FORMATS[name][0]
        wave = waves[item["id"]]
        # Seconds of the recording itself
        assert item["duration"] == len(wave) / rate
        found = read_utterance(item["id"], item["wav"], item["duration"])
        assert found.dtype == torch.float32
        assert len(found) == math.ceil(len(wave) * 16000 / rate)
        expected = scipy.signal.resample(wave, len(found))
        # Some of the formats are lossy.
        assert np.abs(found.numpy() - expected).max() < 0.02, name
        torch.testing.assert_close(
            found, torch.cat(list(read_audio(item["wav"], 16000)))
        )


def test_a_model_of_another_rate_gets_its_own(corpus, tmp_path):
    manifests = prepare_librispeech(corpus, tmp_path, sample_rate=8000)
    items = read_with_speechbrain(manifests["dev-clean"], corpus)
    assert len(items) == 5
    for item in items:
        wave, rate = soundfile.read(item["wav"])
        assert item["duration"] == len(wave) / rate
        found = read_utterance("x", item["wav"], item["duration"], 8000)
        assert len(found) == math.ceil(len(wave) / 2)


def test_too_much_damage_is_an_error_at_the_end(corpus, tmp_path):
    out = tmp_path / "out"
    for split in ("train-clean-100", "dev-clean"):
        (corpus / split / "20" / "7" / "20-7-0000.flac").unlink()
    with pytest.raises(InputError, match=r"1 of 5 .*20.00%.*max_skipped"):
        prepare_librispeech(corpus, out)
    for split in ("train-clean-100", "dev-clean"):
        assert reasons(out, split) == {"20-7-0000": "transcript without audio"}
        assert not (out / f"{split}.csv").exists()
    manifests = prepare_librispeech(corpus, out, max_skipped=0.2)
    assert len(read(manifests["dev-clean"])) == 4
    # A stricter rerun over the same files is judged anew.
    with pytest.raises(InputError, match="max_skipped"):
        prepare_librispeech(corpus, out)


def test_skips_are_logged(corpus, tmp_path, caplog):
    (corpus / "dev-clean" / "20" / "7" / "20-7-0000.flac").unlink()
    with caplog.at_level(logging.WARNING):
        prepare_librispeech(corpus, tmp_path, ["dev-clean"], max_skipped=0.5)
    assert (
        "1 of 5 utterances (20.00%) cannot be used: transcript without audio"
        in caplog.text
    )


def test_unusual_letters_stay(corpus, tmp_path):
    write_chapter(corpus / "dev-clean", 8, 1, ["Żółw n"])
    manifest = prepare_librispeech(corpus, tmp_path, ["dev-clean"])
    assert read(manifest["dev-clean"])[-1]["wrd"] == "Żółw n"


def test_rerun_does_nothing_until_something_changes(corpus, tmp_path):
    def prepare(**options):
        manifest = prepare_librispeech(corpus, tmp_path / "out", **options)
        return manifest["dev-clean"].stat().st_mtime_ns

    first = prepare()
    assert prepare() == first
    trans = corpus / "dev-clean" / "20" / "7" / "20-7.trans.txt"
    trans.write_text(trans.read_text().replace("TWO", "THREE"))
    second = prepare()
    assert second > first
    manifest = tmp_path / "out" / "dev-clean.csv"
    assert "IT'S THREE" in manifest.read_text()
    write_chapter(corpus / "dev-clean", 9, 1, ["NEW"])
    third = prepare()
    assert third > second
    manifest.write_text("edited")
    prepare()
    assert read(manifest)[-1]["ID"] == "9-1-0000"
    state = tmp_path / "out" / "librispeech.json"
    state.write_text("[")
    with pytest.raises(InputError, match=r"librispeech\.json .* delete it"):
        prepare()
    state.unlink()
    prepare()
    shutil.rmtree(corpus / "train-clean-100")
    prepare(splits=["dev-clean"])


def read_with_speechbrain(manifest, root):
    data = DynamicItemDataset.from_csv(manifest, {"data_root": root})
    data.set_output_keys(["id", "wav", "duration", "wrd"])
    return list(data)


def test_untranscribed_split(corpus, tmp_path):
    out = tmp_path / "out"
    with_text = prepare_librispeech(corpus, out)
    transcribed = read(with_text["train-clean-100"])
    for trans in (corpus / "train-clean-100").rglob("*.trans.txt"):
        trans.unlink()
    manifests = prepare_librispeech(
        corpus, out, ["dev-clean"], untranscribed=["train-clean-100"]
    )
    assert list(manifests) == ["dev-clean", "train-clean-100"]
    items = read_with_speechbrain(manifests["train-clean-100"], corpus)
    assert len(items) == 5
    for item, row in zip(items, transcribed, strict=True):
        assert item["id"] == row["ID"]
        assert item["duration"] == float(row["duration"])
        assert item["wav"] == row["wav"].replace("$data_root", str(corpus))
        assert item["wrd"] == ""
    # Made before, of the same audio, with its transcripts: still there.
    assert read(with_text["train-clean-100"]) == transcribed
    assert [row["wrd"] for row in read(manifests["dev-clean"])][0] == "ONE"


def test_transcripts_of_an_untranscribed_split_are_not_read(corpus, tmp_path):
    for trans in (corpus / "dev-clean").rglob("*.trans.txt"):
        trans.write_bytes(b"20-7-0000\n20-7-0000 \xff $\n")
    manifest = prepare_librispeech(
        corpus, tmp_path / "out", untranscribed=["dev-clean"]
    )["dev-clean"]
    assert manifest.name == "untranscribed_dev-clean.csv"
    assert [row["wrd"] for row in read(manifest)] == [""] * 5
    assert reasons(tmp_path / "out", "untranscribed_dev-clean") == {}


def test_untranscribed_audio_is_checked(corpus, tmp_path):
    folder = corpus / "dev-clean" / "20" / "7"
    (folder / "20-7-0000.flac").write_bytes(b"")
    (folder / "20-7-0001.flac").write_bytes(b"not a FLAC file")
    write_audio(folder / "20-7-0002.flac", 800, sample_rate=4000)
    write_audio(folder / "20-8-0003.flac", 800)
    write_audio(folder / "20-7-$x.flac", 800)
    options = {"splits": ["dev-clean"], "untranscribed": ["dev-clean"]}
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"5 of 8 .*max_skipped"):
        prepare_librispeech(corpus, out, **options)
    manifest = prepare_librispeech(corpus, out, max_skipped=0.7, **options)
    assert reasons(out, "untranscribed_dev-clean") == {
        "20-7-$x": "$ in id",
        "20-7-0000": "empty audio file",
        "20-7-0001": "unreadable audio",
        "20-7-0002": "sample rate of 4000 Hz outside 8000 to 48000",
        "20-8-0003": "id of another chapter",
    }
    kept = [row["ID"] for row in read(manifest["dev-clean"])]
    assert kept == ["100-3-0000", "100-3-0001", "100-3-0002"]


def test_untranscribed_rerun_does_nothing_until_something_changes(
    corpus, tmp_path
):
    def prepare(**options):
        manifests = prepare_librispeech(corpus, tmp_path / "out", **options)
        return {k: v.stat().st_mtime_ns for k, v in manifests.items()}

    untranscribed = {"untranscribed": ["train-clean-100"]}
    first = prepare(**untranscribed)
    assert prepare(**untranscribed) == first
    # In turn with and without transcripts, neither is made anew.
    both = prepare()
    assert both["dev-clean"] == first["dev-clean"]
    assert both["train-clean-100"] != first["train-clean-100"]
    assert prepare(**untranscribed) == first
    assert prepare() == both
    write_audio(corpus / "train-clean-100" / "20" / "7" / "20-7-0009.flac", 900)
    second = prepare(**untranscribed)
    assert second["train-clean-100"] > first["train-clean-100"]
    assert second["dev-clean"] == first["dev-clean"]


def test_own_split_alone_may_be_untranscribed(corpus, tmp_path):
    for split in ("dev-clean", "train-clean-100"):
        (corpus / split).rename(corpus / f"own-{split}")
    manifests = prepare_librispeech(
        corpus, tmp_path / "out", untranscribed=["own-dev-clean"]
    )
    assert list(manifests) == ["own-dev-clean"]
    with pytest.raises(InputError, match="no split unlab.*holds own-dev"):
        prepare_librispeech(corpus, tmp_path, untranscribed=["unlab"])


def test_wrong_calls(corpus, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="no folder .*nowhere"):
        prepare_librispeech(tmp_path / "nowhere", out)
    with pytest.raises(InputError, match="dev-other.*holds dev-clean, train"):
        prepare_librispeech(corpus, out, ["dev-clean", "dev-other"])
    with pytest.raises(InputError, match="no split among train.*holds 100, 20"):
        prepare_librispeech(corpus / "dev-clean", out)
    with pytest.raises(InputError, match="no split among"):
        prepare_librispeech(corpus, out, [])
    with pytest.raises(InputError, match="max_skipped"):
        prepare_librispeech(corpus, out, max_skipped=5)
    (corpus / "test-clean").mkdir()
    with pytest.raises(InputError, match="test-clean holds no utterance"):
        prepare_librispeech(corpus, out, ["test-clean"])
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        prepare_librispeech(corpus, tmp_path / "file")


def test_any_folder_in_the_layout(corpus, tmp_path):
    (corpus / "dev-clean").rename(corpus / "own-split")
    manifests = prepare_librispeech(corpus, tmp_path / "out", ["own-split"])
    assert len(read(manifests["own-split"])) == 5


def test_script(corpus, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, SCRIPT, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PYTHONPATH": str(REPOSITORY)},
        )

    done = run(corpus, "--save_folder", "out", "--splits", "dev-clean")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out/dev-clean.csv\n"
    failed = run(tmp_path / "nowhere")
    assert failed.returncode == 2
    assert failed.stderr.startswith(
        "librispeech_prepare.py: There is no folder"
    )
    spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.prepare_librispeech is prepare_librispeech
