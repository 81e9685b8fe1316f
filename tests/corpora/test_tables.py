"""Corpora in tables: their rows, every kind of damage, and their alphabet."""

import csv
import json
import logging
import unicodedata

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from speechbrain.dataio.dataset import DynamicItemDataset

from tutornet_sb.corpora.alphabet import choose_symbols
from tutornet_sb.corpora.librispeech import read_manifest
from tutornet_sb.corpora.tables import name_tables, prepare_tables, read_table
from tutornet_sb.corpora.tokenizer import pieces, train_tokenizer
from tutornet_sb.util.errors import InputError, SettingError

ROWS = [
    ("a/eins.wav", "Größe, ja"),
    ("a/zwei.FLAC", "zwei"),
    ("b/eins.ogg", "das ist über uns"),
]


def write_audio(path, seconds=0.2, rate=16000, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    wave = 0.1 * rng.standard_normal((round(seconds * rate), channels))
    soundfile.write(path, wave, rate)
    return path


def write_table(path, rows, header=("path", "text"), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.startswith(".json"):
        rows = [dict(zip(header, row, strict=True)) for row in rows]
        text = "\n".join(json.dumps(row) for row in rows) + "\n"
        if path.suffix == ".json":
            text = json.dumps(rows, indent=1)
        path.write_text(text, **{"encoding": "utf-8"} | options)
        return path
    with open(path, "w", newline="", **{"encoding": "utf-8"} | options) as file:
        dialect = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
        writer = csv.writer(file, **dialect)
        writer.writerow(header)
        writer.writerows(rows)
    return path


@pytest.fixture
def audio(tmp_path):
    for wav, _ in ROWS:
        write_audio(tmp_path / "data" / wav)
    return tmp_path / "data"


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "CSV"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("columns", [("path", "text"), ("wav", "TEXT")])
def test_manifest_of_a_table(audio, tmp_path, ending, encoding, columns):
    if ending.startswith("json"):
        columns = columns[0], "text"
    table = write_table(
        audio / f"train.{ending}", ROWS, columns, encoding=encoding
    )
    root, manifests = prepare_tables({"train": table}, tmp_path / "out")
    assert root == audio and list(manifests) == ["train"]
    data = DynamicItemDataset.from_csv(manifests["train"], {"data_root": root})
    data.set_output_keys(["id", "wav", "duration", "wrd"])
    items = list(data)
    assert [(item["id"], item["wrd"]) for item in items] == [
        ("a/eins", "Größe, ja"),
        ("a/zwei", "zwei"),
        ("b/eins", "das ist über uns"),
    ]
    for item, (wav, _) in zip(items, ROWS, strict=True):
        assert item["wav"] == str(audio / wav)
        assert item["duration"] == 0.2
    assert read(tmp_path / "out" / "skipped_train.csv") == []


def test_paths_are_relative_to_their_table(audio, tmp_path):
    outside = write_audio(tmp_path / "elsewhere" / "x.wav")
    first = [("b/eins.ogg", "eins", 7), (str(outside), "zwei", "x")]
    second = [("../a/eins.wav", "drei", "y"), ("eins.ogg", "vier", "")]
    tables = {
        "train": write_table(audio / "t.csv", first, ("path", "text", "id")),
        "dev-b": write_table(
            audio / "b" / "b.jsonl", second, ("wav", "text", "id")
        ),
    }
    root, manifests = prepare_tables(tables, tmp_path / "out")
    items = {
        key: item["wav"]
        for path in manifests.values()
        for key, item in read_manifest(path, root).items()
    }
    assert items == {
        "7": str(audio / "b" / "eins.ogg"),
        "x": str(outside),
        "y": str(audio / "b" / ".." / "a" / "eins.wav"),
        "eins": str(audio / "b" / "eins.ogg"),
    }


def test_durations_are_those_of_audio_of_any_rate(tmp_path):
    write_audio(tmp_path / "1.wav", rate=8000)
    write_audio(tmp_path / "2.mp3", rate=44100, channels=2)
    tables = {
        split: write_table(tmp_path / f"{split}.csv", [(wav, "a")])
        for split, wav in {"train": "1.wav", "dev": "2.mp3"}.items()
    }
    _, manifests = prepare_tables(tables, tmp_path / "out")
    assert float(read(manifests["train"])[0]["duration"]) == 0.2


def test_every_damaged_row_is_named(audio, tmp_path, caplog):
    (audio / "empty.wav").touch()
    (audio / "none.wav").write_bytes(b"no audio")
    write_audio(audio / "4kHz.wav", rate=4000)
    write_audio(audio / "short.wav", seconds=0.01)
    lines = [
        b"path,text,id,more",
        b"a/eins.wav,eins,good,",
        b"a/eins.wav,eins",
        b"missing.wav,eins,,",
        b"empty.wav,eins,,",
        b"none.wav,eins,,",
        b"4kHz.wav,eins,,",
        b"short.wav,eins,,",
        b"a/zwei.FLAC,,,",
        b"",
        b"a/zwei.FLAC,caf\xe9,latin,",
        b"a/zwei.FLAC,5 $,dollar,",
        b",eins,,",
        b"a/eins.wav,eins,twice,",
        b"a/zwei.FLAC,zwei,twice,",
        b'a/eins.wav,"two',
        b'lines",lines,',
        b'a/eins.wav,"open"quote,open,',
        b"b/eins.ogg,drei,also good,",
    ]
    table = audio / "train.csv"
    table.write_bytes(b"\r\n".join(lines))
    out = tmp_path / "out"
    with pytest.raises(InputError, match="train: 14 of 16 .*max_skipped"):
        prepare_tables({"train": table}, out)
    with caplog.at_level(logging.WARNING):
        _, manifests = prepare_tables({"train": table}, out, max_skipped=0.9)
    assert "train: 14 of 16 utterances (87.50%) cannot be used: " in caplog.text
    found = {
        (row["id"], row["file"]): row["reason"]
        for row in read(out / "skipped_train.csv")
    }
    assert found == {
        ("line 3", "train.csv:3"): "2 columns instead of 4",
        ("missing", "train.csv:4"): "no such audio file",
        ("empty", "train.csv:5"): "empty audio file",
        ("none", "train.csv:6"): "unreadable audio",
        ("4kHz", "train.csv:7"): "sample rate of 4000 Hz outside 8000 to 48000",
        ("short", "train.csv:8"): "audio shorter than 0.04 s",
        ("a/zwei", "train.csv:9"): "empty transcript",
        ("latin", "train.csv:11"): "transcript not UTF-8",
        ("dollar", "train.csv:12"): "$ in transcript",
        ("line 13", "train.csv:13"): "no audio file is named",
        ("twice", "train.csv:14"): "duplicate id",
        ("twice", "train.csv:15"): "duplicate id",
        ("line 16", "train.csv:16"): "line break in a field",
        ("line 18", "train.csv:18"): "no CSV: ',' expected after '\"'",
    }
    assert [row["ID"] for row in read(manifests["train"])] == [
        "also good",
        "good",
    ]


def test_every_damaged_line_of_json_is_named(audio, tmp_path):
    lines = [
        '{"path": "a/eins.wav", "text": "eins", "id": 3}',
        '{"path": "a/eins.wav", "text": "eins"',
        '["a/eins.wav", "eins"]',
        '{"path": "a/eins.wav"}',
        '{"path": "a/eins.wav", "text": 3}',
        "",
        '{"path": null, "text": "eins"}',
    ]
    table = audio / "dev.jsonl"
    table.write_text("\n".join(lines))
    out = tmp_path / "out"
    _, manifests = prepare_tables({"dev": table}, out, max_skipped=1)
    skipped = read(out / "skipped_dev.csv")
    assert [row["file"] for row in skipped] == [
        f"dev.jsonl:{line}" for line in (2, 3, 4, 5, 7)
    ]
    assert {row["reason"] for row in skipped} == {
        "no JSON with texts under the keys path (or wav) and text"
    }
    assert [row["ID"] for row in read(manifests["dev"])] == ["3"]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("x.csv", "wav;text\na;b\n", "must name the columns.*'wav;text'"),
        ("x.csv", "", "holds no utterance"),
        ("x.tsv", "path,text\n", "must name the columns"),
        ("x.json", "[1, 2", "x.json is no JSON"),
        ("x.jsonl", "{}", "1 of 1 .* cannot be used: no JSON"),
        ("x.txt", "path,text\n", r"must end in \.csv, \.tsv"),
    ],
)
def test_a_file_that_is_no_table_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said):
        prepare_tables({"train": tmp_path / name}, tmp_path / "out")


def test_a_rerun_does_nothing_until_something_changes(audio, tmp_path):
    table = write_table(audio / "train.csv", ROWS)

    def prepare():
        _, manifests = prepare_tables({"train": table}, tmp_path / "out")
        return manifests["train"].stat().st_mtime_ns

    first = prepare()
    assert prepare() == first
    write_audio(audio / "a" / "eins.wav", seconds=0.3)
    second = prepare()
    assert second > first
    write_table(table, [*ROWS[:2], ("b/eins.ogg", "neu")])
    assert prepare() > second


def test_splits_are_named_after_their_tables(tmp_path):
    assert list(name_tables("train", "x/train.csv")) == ["train"]
    assert list(name_tables("valid", ["dev-1.csv", "valid.tsv"])) == [
        "dev-1",
        "dev-valid",
    ]
    assert name_tables("test", None) == {}
    with pytest.raises(InputError, match=r"a/x\.csv and b/x\.tsv have the"):
        name_tables("test", ["a/x.csv", "b/x.tsv"])
    # As the files of networks: of the working folder, or of the recipe's.
    (tmp_path / "t.csv").touch()
    found = name_tables("train", "t.csv", tmp_path)
    assert found == {"train-t": tmp_path / "t.csv"}


# --------------------------------------------------------------- the alphabet


def symbols(table, kind="char", size=None):
    return choose_symbols(kind, size, table, None, None, ".")


def test_the_letters_are_those_of_the_training_transcripts(audio, tmp_path):
    table = write_table(audio / "train.csv", ROWS)
    found = symbols(str(table))
    texts = [unicodedata.normalize("NFC", text) for _, text in ROWS]
    assert found["letters"] == "".join(sorted({*"".join(texts)} - {" "}))
    assert "Gößü," == "".join(c for c in "Gößü," if c in found["letters"])
    assert found["count"] == len(found["letters"]) + 2
    _, manifests = prepare_tables({"train": table}, tmp_path / "out")
    path = tmp_path / "char.model"
    tokenizer = train_tokenizer(
        list(manifests.values()), path, "char", *found.values()
    )
    assert tokenizer.get_piece_size() == found["count"]
    assert pieces(tokenizer)[1:] == [*found["letters"], "▁"]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # The corpus has changed behind it, to as many letters.
    others = found["letters"].replace("ß", "ẞ")
    with pytest.raises(ValueError, match="lacks ẞ, which .* name of its own"):
        train_tokenizer([], path, "char", found["count"], others)


def test_the_letters_of_a_folder_are_those_of_its_training_splits(tmp_path):
    for split, text in {
        "train-clean-100": "où ça",
        "train-other-500": "l’été",
        "dev-clean": "x",
        "own": "Ω",
    }.items():
        chapter = tmp_path / split / "1" / "2"
        chapter.mkdir(parents=True)
        (chapter / "1-2.trans.txt").write_text(
            f"1-2-0000 {unicodedata.normalize('NFD', text)}\n1-2-0001\n"
        )
    found = choose_symbols("char", None, None, tmp_path, None, ".")
    assert found["letters"] == "".join(sorted("oùçal’ét"))
    found = choose_symbols("char", None, None, tmp_path, ["own"], ".")
    assert found == {"count": 3, "letters": "Ω"}


def test_a_number_of_symbols_stays(tmp_path):
    nowhere = str(tmp_path / "none.csv")
    for kind, size in (("char", 29), ("bpe", 500)):
        expected = {"count": size, "letters": None}
        assert symbols(nowhere, kind, size) == expected


def test_an_alphabet_that_cannot_be_found_is_an_error(tmp_path):
    with pytest.raises(SettingError, match="bpe tokenizer needs a number"):
        symbols("x.csv", "bpe")
    with pytest.raises(SettingError, match="say where they lie by --train_csv"):
        symbols(None)
    table = write_table(tmp_path / "x.csv", [("a.wav", "")])
    with pytest.raises(SettingError, match=r"x\.csv has no training transcr"):
        symbols(str(table))


LETTERS = st.characters(
    exclude_categories=["Cs"], exclude_characters="$\ufffd\0"
)


@given(st.lists(st.text(LETTERS, max_size=9), min_size=1, max_size=5))
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_whatever_is_written_is_encoded_and_decoded(
    tmp_path_factory, ending, texts
):
    folder = tmp_path_factory.mktemp("letters")
    texts = [" ".join(["a", *text.split()]) for text in texts]
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    texts = [text.replace("▁", "") for text in texts]
    rows = [(f"{index}.wav", text) for index, text in enumerate(texts)]
    table = write_table(folder / f"t.{ending}", rows)
    assert [row.text for row in read_table(table)] == texts
    found = symbols(str(table))
    manifest = write_table(folder / "m.csv", rows, ("ID", "wrd"))
    tokenizer = train_tokenizer(
        [manifest], folder / "t.model", "char", *found.values()
    )
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.unk_id() not in ids
        assert tokenizer.decode(ids) == text
