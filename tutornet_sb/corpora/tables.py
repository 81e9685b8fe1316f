"""A corpus in tables: each row names an audio file and its transcript.

Tables are CSV, TSV or JSON lines, by the suffix of their name, with columns or
keys ``path`` (or ``wav``) and ``text``, and optionally ``id``. Paths are
relative to the table. Rows that cannot be used are skipped, counted and listed,
as in a corpus of LibriSpeech's layout.
"""

import collections
import csv
import functools
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tutornet_sb.corpora.librispeech import (
    Candidate,
    Source,
    fault_of,
    make_manifests,
    tidy_text,
)
from tutornet_sb.util.errors import InputError

# Prefixes of the names of the splits of each kind
KINDS = {"train": "train", "valid": "dev", "test": "test"}
ENDINGS = ".csv", ".tsv", ".jsonl", ".json"
# Rows whose audio is checked by one thread at a time
_GROUP = 100


class Row(NamedTuple):
    """A row of a table from `line` on, its audio file as written.

    The id is by default the path without its suffix.
    """

    line: int
    id: str
    wav: str
    text: str
    fault: str | None = None


def name_tables(kind, paths, folder="."):
    """Name the split that each table is; return tables by these names.

    ``kind`` is ``train``, ``valid`` or ``test``; paths, one or a list, are
    relative to the working folder or to ``folder``, the recipe's. Raises
    InputError if two tables have the same name.

    Example
    -------
    >>> list(name_tables("test", ["test.csv", "de/Noisy.tsv"]))
    ['test', 'test-Noisy']
    """
    prefix, named = KINDS[kind], {}
    for path in [paths] if isinstance(paths, str) else paths or []:
        path = Path(path).expanduser()
        stem = path.stem
        split = stem if stem.startswith(prefix) else f"{prefix}-{stem}"
        if split in named:
            raise InputError(
                f"{named[split]} and {path} have the same name: rename one, or "
                "join them"
            )
        named[split] = path
        if not path.is_file() and (Path(folder) / path).is_file():
            named[split] = Path(folder) / path
    return named


def prepare_tables(
    tables, save_folder, sample_rate=16000, max_skipped=0.01, max_seconds=120.0
):
    """Write one manifest a table, as `librispeech.prepare_librispeech` does.

    ``tables`` are by the names of their splits. Returns the folder that
    ``$data_root`` stands for and the manifest of each split.

    ``skipped_SPLIT.csv`` holds the rows that are left out, with table and line:
    rows that are damaged, of duplicate ids or without audio, and the faults of
    audio and transcripts that a corpus of LibriSpeech's layout may have. Raises
    InputError if a table is missing or none, or damaged beyond `max_skipped`.
    """
    folders = {split: path.resolve().parent for split, path in tables.items()}
    root = Path(os.path.commonpath(folders.values()))

    def make_source(split):
        table, folder = tables[split], folders[split]
        rows = read_table(table)
        files = [os.path.join(folder, row.wav) for row in rows]
        with ThreadPoolExecutor() as pool:
            stamps = list(pool.map(_stamp, files))
        folder = folder.relative_to(root)
        parts = list(zip(rows, files, stamps, strict=True))
        groups = [
            functools.partial(
                _list_candidates, table.name, folder, parts[i : i + _GROUP]
            )
            for i in range(0, len(parts), _GROUP)
        ]
        return Source(split, split, [str(folder), rows, stamps], groups)

    limits = sample_rate, max_skipped, max_seconds
    return root, make_manifests(map(make_source, tables), save_folder, *limits)


def _list_candidates(table, folder, group):
    """Yield the utterances of some rows, given with their files and stamps."""
    for row, file, stamp in group:
        wav = folder / row.wav
        yield Candidate(
            row.id,
            f"{table}:{row.line}",
            row.fault or (None if stamp else "no such audio file"),
            file,
            stamp and stamp[0],
            str(wav) if wav.is_absolute() else f"$data_root/{wav}",
            "",
            row.text,
        )


def _stamp(file):
    """Size (bytes) and modification time of a file, None without one."""
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def read_table(path):
    """Read the rows of a table in their order, those at fault too.

    Quotes have no meaning in TSV. Raises InputError if its ending is another,
    or its first line does not name the columns.
    """
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise InputError(
            f"{path}: the name of a table must end in {', '.join(ENDINGS)}"
        )
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    read = _read_json if ending.startswith(".json") else _read_csv
    rows = list(read(path, text))
    counts = collections.Counter(row.id for row in rows)
    # Which of two transcripts is right cannot be known.
    return [
        row._replace(fault="duplicate id")
        if counts[row.id] > 1 and row.fault is None
        else row
        for row in rows
    ]


def _read_csv(path, text):
    """Yield the rows of a CSV or TSV."""
    if path.suffix.lower() == ".tsv":
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    else:
        options = {"skipinitialspace": True, "strict": True}
    reader = csv.reader(io.StringIO(text, newline=""), **options)
    header = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            yield Row(line, f"line {line}", "", "", f"no CSV: {error}")
            continue
        if header is None:
            header = [name.strip().lower() for name in fields]
            if "text" not in header or not {"path", "wav"} & {*header}:
                raise InputError(
                    f"{path}: its first line must name the columns path (or "
                    f"wav) and text, got {', '.join(fields)!r}"
                )
        elif not fields:
            continue
        elif len(fields) != len(header):
            fault = f"{len(fields)} columns instead of {len(header)}"
            yield Row(line, f"line {line}", "", "", fault)
        # After a quote that is not closed
        elif any("\n" in field or "\r" in field for field in fields):
            yield Row(line, f"line {line}", "", "", "line break in a field")
        else:
            yield _make_row(line, dict(zip(header, fields, strict=True)))


def _read_json(path, text):
    """Yield the rows of JSON lines, or of a list."""
    if text.lstrip().startswith("["):
        try:
            contents = enumerate(json.loads(text), 1)
        except ValueError as error:
            raise InputError(f"{path} is no JSON: {error}") from None
    else:
        contents = (
            (number, _parse(line))
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        )
    for line, content in contents:
        if not isinstance(content, dict) or not (
            isinstance(content.get("text"), str)
            and isinstance(content.get("path", content.get("wav")), str)
        ):
            fault = "no JSON with texts under the keys path (or wav) and text"
            yield Row(line, f"line {line}", "", "", fault)
        else:
            yield _make_row(line, content)


def _parse(line):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _make_row(line, values):
    """Make a row of its fields by name."""
    wav = values.get("path", values.get("wav")).strip()
    text = tidy_text(values["text"])
    name = str(values.get("id") or os.path.splitext(wav)[0]).strip()
    fault = fault_of(name + wav, text) if wav else "no audio file is named"
    return Row(line, name or f"line {line}", wav, text, fault)
