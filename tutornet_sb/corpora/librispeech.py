"""LibriSpeech, or any folder in its layout, to SpeechBrain manifests.

The layout is ``SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac`` with the
lines ``SPEAKER-CHAPTER-NNNN TRANSCRIPT`` in ``SPEAKER-CHAPTER.trans.txt``. The
audio may be of any format that soundfile reads. Hidden files are ignored.

A missing split, and one without any usable utterance, are errors. Damage to
single utterances is skipped, counted and listed, so that the preparation of 960
hours ends; too much of it is an error once all is scanned.
"""

import codecs
import collections
import concurrent.futures
import csv
import functools
import hashlib
import json
import logging
import os
import pathlib
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

from speechbrain.dataio.dataio import load_data_csv
from tqdm import tqdm

from tutornet_sb.corpora.audio import SUFFIXES, read_header
from tutornet_sb.util.errors import InputError
from tutornet_sb.util.files import read_json, write_atomically, write_json

logger = logging.getLogger(__name__)

SPLITS = (
    "train-clean-100",
    "train-clean-360",
    "train-other-500",
    "dev-clean",
    "dev-other",
    "test-clean",
    "test-other",
)
STATE_FILE = "librispeech.json"
HEADER = "ID", "duration", "wav", "spk_id", "wrd"
_FORMAT = 3  # raise when manifests change, so that old ones are made anew

# What makes SpeechBrain (a placeholder) or csv (of Python 3.10) stumble
_FORBIDDEN = {
    "\N{REPLACEMENT CHARACTER}": "transcript not UTF-8",
    "$": "$ in transcript",
    "\0": "NUL in transcript",
}

Skip = collections.namedtuple("Skip", "id file reason")


class Candidate(NamedTuple):
    """An utterance before its audio is checked.

    ``place`` is its file, or table and line, in the list of skips; ``wav`` its
    audio in the manifest and ``path`` on disk, of ``size`` bytes.
    """

    id: str
    place: str
    fault: str | None
    path: object = None
    size: int = 0
    wav: str = ""
    speaker: str = ""
    text: str = ""


class Source(NamedTuple):
    """What the manifest ``name`` of a split is made from.

    ``inputs``, as in JSON, determine it; each of ``groups``, called in a
    thread, yields candidates.
    """

    split: str
    name: str
    inputs: list
    groups: list[Callable]


def find_librispeech(data_folder):
    """Find the folder that directly contains the splits.

    It is `data_folder` or, below it, ``LibriSpeech``. The result is absolute:
    what ``$data_root`` stands for in the manifests.
    """
    folder = pathlib.Path(data_folder).expanduser().resolve()
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}.")
    nested = folder / "LibriSpeech"
    holds_splits = any((folder / split).is_dir() for split in SPLITS)
    return nested if nested.is_dir() and not holds_splits else folder


def read_manifest(path, root):
    """Read a manifest: by utterance id, ``wav``, ``duration``, ``wrd``, ...

    ``root`` takes the place of ``$data_root``; durations are in seconds.
    """
    return load_data_csv(str(path), {"data_root": str(root)})


def prepare_librispeech(
    data_folder,
    save_folder,
    splits=None,
    sample_rate=16000,
    max_skipped=0.01,
    untranscribed=(),
    max_seconds=120.0,
):
    """Write one manifest a split, in the order of the utterance ids.

    The columns are ``ID, duration, wav, spk_id, wrd``: seconds, read from
    the header of the audio alone, and a path that starts with ``$data_root``,
    to be read by `read_manifest` with the root from `find_librispeech`. A rerun
    does nothing for a split whose files (names, sizes, modification times) and
    options are as before.

    ``skipped_SPLIT.csv`` holds ``id, file, reason`` of each utterance left out.
    Audio cut off behind an intact header is not noticed before
    `read_utterance`.

    Arguments
    ---------
    data_folder, save_folder : str or pathlib.Path
        LibriSpeech or its parent folder, and where the manifests go.
    splits : list of str, optional
        By default, those of the seven standard ones that exist.
    sample_rate : int
        Sample rate that `read_utterance` will convert audio to (Hz).
    max_skipped : float
        Greatest part of a split's utterances that may be skipped, 0 to 1.
    untranscribed : list of str
        Splits, of `splits` or others, prepared without their transcripts as
        ``untranscribed_SPLIT.csv``, where ``wrd`` is empty.
    max_seconds : float
        The longest utterance. A step of training holds at least one in memory.

    Returns the manifest of each split. Raises InputError if a split is missing,
    or damaged beyond `max_skipped`.
    """
    root = find_librispeech(data_folder)
    held = sorted(entry.name for entry in _folders(root))
    if splits is None:
        splits = [split for split in SPLITS if split in held]
    splits = list(dict.fromkeys([*splits, *untranscribed]))
    missing = [split for split in splits if split not in held]
    if missing or not splits:
        wanted = ", ".join(missing) or f"among {', '.join(SPLITS)}"
        holds = ", ".join(held[:12]) + (", ..." if held[12:] else "")
        raise InputError(
            f"{root} has no split {wanted}; it holds {holds or 'no folder'}."
        )

    def make_source(split):
        silent = split in untranscribed
        chapters = _list_chapters(root / split)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            listings = list(pool.map(_list_files, chapters))
        groups = [
            functools.partial(_list_candidates, root, silent, *group)
            for group in zip(chapters, listings, strict=True)
        ]
        name = f"untranscribed_{split}" if silent else split
        return Source(split, name, listings, groups)

    limits = sample_rate, max_skipped, max_seconds
    return make_manifests(map(make_source, splits), save_folder, *limits)


def make_manifests(sources, save_folder, sample_rate, max_skipped, max_seconds):
    """Write the manifest of each source, and a list of what it leaves out.

    Nothing is done where both exist and are of the same inputs. Returns the
    manifests by split. Raises InputError if more than `max_skipped` of a split,
    or all of it, is left out.
    """
    if not 0 <= max_skipped <= 1:
        raise InputError(f"max_skipped must be 0 to 1, got {max_skipped}")
    save_folder = pathlib.Path(save_folder).expanduser()
    state_file = save_folder / STATE_FILE
    state = read_json(state_file) if state_file.is_file() else {}
    manifests, problems = {}, []
    for source in sources:
        manifest = save_folder / f"{source.name}.csv"
        skipped = save_folder / f"skipped_{source.name}.csv"
        manifests[source.split] = manifest
        inputs = [max_skipped, sample_rate, max_seconds, *source.inputs]
        inputs = _digest(json.dumps([_FORMAT, *inputs]).encode())
        known = state.get(source.name, [])
        if known[:3] == [inputs, _stamp(manifest), _stamp(skipped)]:
            logger.info("%s is prepared already.", manifest)
            continue
        rows, skips = _check_audio(source, sample_rate, max_seconds)
        _write_csv(skipped, Skip._fields, skips)
        total = len(rows) + len(skips)
        if not total:
            problems.append(f"{source.split} holds no utterance.")
            continue
        reasons = collections.Counter(skip.reason for skip in skips)
        reasons = ", ".join(f"{why} ({n})" for why, n in reasons.most_common())
        left_out = (
            f"{source.split}: {len(skips)} of {total} utterances "
            f"({len(skips) / total:.2%}) cannot be used: {reasons}"
        )
        if not rows or len(skips) > max_skipped * total:
            problems.append(
                f"{left_out}; the first is {skips[0].id}. Repair them, or "
                f"raise max_skipped ({max_skipped:g}). See {skipped}."
            )
            continue
        if skips:
            logger.warning("%s. See %s.", left_out, skipped)
        hours = sum(row[1] for row in rows) / 3600
        logger.info("%s: %d utterances, %.2f h.", manifest, len(rows), hours)
        _write_csv(manifest, HEADER, rows)
        state[source.name] = [inputs, _stamp(manifest), _stamp(skipped)]
        write_json(state_file, state)
    if problems:
        raise InputError("\n".join(problems))
    return manifests


def _check_audio(source, sample_rate, max_seconds):
    """Rows of the manifest, and skips."""

    def check(group):
        return [
            (one, (None, one.fault))
            if one.fault
            else (
                one,
                read_header(one.path, one.size, sample_rate, max_seconds),
            )
            for one in group()
        ]

    rows, skips = [], []
    bar = {"desc": source.split, "total": len(source.groups), "disable": None}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for group in tqdm(pool.map(check, source.groups), **bar):
            for one, (seconds, fault) in group:
                if fault:
                    skips.append(Skip(one.id, one.place, fault))
                else:
                    row = one.id, seconds, one.wav, one.speaker, one.text
                    rows.append(row)
    return sorted(rows), sorted(skips)


def _folders(folder):
    """Folders in a folder, but for the hidden ones."""
    return [
        entry
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    ]


def _list_chapters(folder):
    """Chapter folders of a split, sorted."""
    return sorted(
        chapter for speaker in _folders(folder) for chapter in _folders(speaker)
    )


def _list_files(chapter):
    """Sorted ``[path, size, modification time]``; size -1: not a file."""
    files = []
    with os.scandir(chapter) as entries:
        for entry in entries:
            if entry.name.startswith("."):  # file managers leave these
                continue
            # Names that are not UTF-8 could not be written to a CSV.
            name = os.fsencode(entry.name).decode(errors="replace")
            size, changed = -1, 0
            if entry.is_file():
                status = entry.stat()
                size, changed = status.st_size, status.st_mtime_ns
            path = f"{chapter.parent.name}/{chapter.name}/{name}"
            files.append([path, size, changed])
    return sorted(files)


def _list_candidates(root, untranscribed, chapter, listing):
    """Yield the utterances of a chapter, given with its listing."""
    speaker = chapter.parent.name
    folder = chapter.relative_to(root).as_posix()
    sizes = {path.rpartition("/")[2]: size for path, size, _ in listing}
    audio = _find_audio(sizes)
    if untranscribed:
        prefix = f"{speaker}-{chapter.name}-"
        texts, faults = dict.fromkeys(audio, ""), {}
        for name in audio:
            if not name.startswith(prefix):
                faults[name] = "id of another chapter"
            elif "$" in name:
                faults[name] = "$ in id"
    else:
        texts, faults = _read_chapter(chapter)
    for name in sorted(audio.keys() | texts.keys() | faults.keys()):
        fault = faults.get(name)
        file = audio.get(name, f"{name}.flac")
        if fault is None and name not in audio:
            fault = "transcript without audio"
        elif fault is None and name not in texts:
            fault = "audio without transcript"
        elif fault and not untranscribed:
            file = f"{speaker}-{chapter.name}.trans.txt"
        place = f"{folder}/{file}"
        yield Candidate(
            name,
            place,
            fault,
            chapter / file,
            sizes.get(file, 0),
            f"$data_root/{place}",
            speaker,
            texts.get(name, ""),
        )


def _find_audio(names):
    """Audio files among those of a chapter, by utterance id."""
    found = {}
    # Those of the first ending are entered last, and stay.
    for suffix in reversed(SUFFIXES):
        for name in sorted(names):
            if name.lower().endswith(suffix):
                found[name[: -len(suffix)]] = name
    return found


def _read_chapter(chapter):
    """Read the transcripts of a chapter, none if there is no such file."""
    prefix = f"{chapter.parent.name}-{chapter.name}"
    path = chapter / f"{prefix}.trans.txt"
    return read_transcript(path, f"{prefix}-") if path.exists() else ({}, {})


def read_transcript(path, prefix=""):
    """Read a file of lines ``ID TRANSCRIPT``, whose ids begin with `prefix`.

    Returns transcripts by id, and the faults of the other lines by id. Raises
    OSError if the file cannot be read.
    """
    texts, faults = {}, {}
    seen = collections.Counter()
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    for line in content.splitlines():
        words = line.decode(errors="replace").split(maxsplit=1)
        if not words:
            continue
        name, text = words[0], tidy_text("".join(words[1:]))
        seen[name] += 1
        if not name.startswith(prefix):
            faults[name] = "id of another chapter"
        elif fault := fault_of(name, text):
            faults[name] = fault
        texts[name] = text
    # Which of two transcripts is right cannot be known.
    faults.update({name: "duplicate id" for name in seen if seen[name] > 1})
    for name in faults:
        del texts[name]
    return texts, faults


def read_texts(data_folder, splits=None):
    """List the sound transcripts of splits, without looking at their audio.

    By default, those of the standard training splits that exist.
    """
    root = find_librispeech(data_folder)
    if splits is None:
        splits = [
            split
            for split in SPLITS
            if split.startswith("train") and (root / split).is_dir()
        ]
    return [
        text
        for split in splits
        for chapter in _list_chapters(root / split)
        for text in _read_chapter(chapter)[0].values()
    ]


def tidy_text(text):
    r"""Separate words by single spaces and compose accented letters (NFC).

    Example
    -------
    >>> tidy_text("  cafe\N{COMBINING ACUTE ACCENT}\tau lait ")
    'café au lait'
    """
    return unicodedata.normalize("NFC", " ".join(text.split()))


def fault_of(name, text):
    """Return what is wrong with a decoded id or transcript, or None."""
    for character, fault in _FORBIDDEN.items():
        if character in name + text:
            return fault
    return None if text else "empty transcript"


def _write_csv(path, header, rows):
    def write(partial):
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)

    write_atomically(path, write)


def _digest(content):
    return hashlib.sha256(content).hexdigest()


def _stamp(path):
    """Digest of a written file, None if it does not exist."""
    return _digest(path.read_bytes()) if path.is_file() else None
