"""LibriSpeech, or any folder in its layout, to SpeechBrain manifests.

The layout is ``SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac`` with the
lines ``SPEAKER-CHAPTER-NNNN TRANSCRIPT`` in ``SPEAKER-CHAPTER.trans.txt``. The
audio may be of any format that soundfile reads. Hidden files are ignored.

A wrong call, a missing folder or split, and a split without any usable
utterance are errors. Damage to single utterances is skipped, counted and
listed, so that the preparation of 960 hours ends; too much of it is an error
once all is scanned.
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
import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

from speechbrain.dataio.dataio import load_data_csv
from tqdm import tqdm

from tutornet_sb.corpora.audio import SUFFIXES, read_header
from tutornet_sb.util.errors import InputError
from tutornet_sb.util.files import write_atomically, write_json

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

Skip = collections.namedtuple("Skip", "id file reason")


class CorpusError(InputError):
    """A corpus cannot be used or made as asked; the message says why."""


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

    ``inputs``, as in JSON, determine it; ``collect(group)`` yields the
    candidates of each of ``groups``, in threads.
    """

    split: str
    name: str
    inputs: list
    groups: list
    collect: Callable


def find_librispeech(data_folder):
    """Find the folder that directly contains the splits.

    It is `data_folder` or, below it, ``LibriSpeech``. The result is absolute:
    what ``$data_root`` stands for in the manifests.
    """
    folder = pathlib.Path(data_folder).expanduser().resolve()
    if not folder.is_dir():
        raise CorpusError(f"There is no folder {folder}.")
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
    workers=None,
    untranscribed=(),
    max_seconds=120.0,
):
    """Write one manifest a split, in the order of the utterance ids.

    The columns are ``ID, duration, wav, spk_id, wrd``: seconds, read from
    the header of the audio alone, and a path that starts with ``$data_root``,
    to be read by `read_manifest` with the root from `find_librispeech`. Audio
    at another sample rate, or of several channels, is converted by
    `audio.read_utterance` when it is read, and counted in the log. A rerun does
    nothing for a split whose files (names, sizes, modification times) and
    options are as before.

    ``skipped_SPLIT.csv`` holds ``id, file, reason`` of each utterance left
    out: transcript without audio or the reverse; audio that is empty,
    unreadable, at a sample rate outside 8 to 48 kHz, shorter than 0.04 s or
    longer than `max_seconds`; a transcript that is empty, not UTF-8, named for
    another chapter, given twice, or with a ``$``, which SpeechBrain would
    take for a placeholder. Letters outside A-Z, apostrophe and space stay, with
    one line a split in the log. Audio cut off behind an intact header is not
    noticed before `read_utterance`.

    Arguments
    ---------
    data_folder : str or pathlib.Path
        LibriSpeech, or its parent folder.
    save_folder : str or pathlib.Path
        Where the manifests go.
    splits : list of str, optional
        By default, those of the seven standard ones that exist.
    sample_rate : int
        Sample rate that audio will be converted to (Hz).
    max_skipped : float
        Greatest part of a split's utterances that may be skipped, 0 to 1.
    workers : int, optional
        Threads that read headers.
    untranscribed : list of str, optional
        Splits, of `splits` or others, prepared without their transcripts. Their
        files are ``untranscribed_SPLIT.csv`` and
        ``skipped_untranscribed_SPLIT.csv``, and ``wrd`` is empty.
    max_seconds : float
        The longest utterance; LibriSpeech's has 35 s. A step of training holds
        at least one in memory.

    Returns
    -------
    dict of str to pathlib.Path
        The manifest of each split.

    Raises
    ------
    CorpusError
        If the call is wrong or a split damaged beyond `max_skipped`.
    """
    root = find_librispeech(data_folder)
    if isinstance(untranscribed, str):
        untranscribed = [untranscribed]
    untranscribed = list(untranscribed or ())
    splits = _choose_splits(root, splits, untranscribed)

    def list_sources(pool):
        for split in splits:
            silent = split in untranscribed
            chapters = _list_chapters(root / split)
            listings = list(pool.map(_list_files, chapters))
            yield Source(
                split,
                f"untranscribed_{split}" if silent else split,
                listings,
                list(zip(chapters, listings, strict=True)),
                functools.partial(_list_candidates, root, silent),
            )

    limits = sample_rate, max_skipped, max_seconds
    return make_manifests(root, list_sources, save_folder, *limits, workers)


def make_manifests(
    corpus,
    list_sources,
    save_folder,
    sample_rate,
    max_skipped,
    max_seconds,
    workers=None,
):
    """Write manifests, and lists of what they leave out; return them by split.

    ``list_sources`` is called with a pool of threads and yields a Source for
    each split; nothing is done for one whose files exist and are of the same
    inputs. ``corpus`` names it in the log.
    """
    if not 0 <= max_skipped <= 1:
        raise CorpusError(f"max_skipped must be 0 to 1, got {max_skipped}")
    save_folder = pathlib.Path(save_folder).expanduser()
    try:
        save_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CorpusError(f"Cannot make {save_folder}: {error}") from error
    state = _read_state(save_folder)
    manifests, problems, converted = {}, [], collections.Counter()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for source in list_sources(pool):
            manifest = save_folder / f"{source.name}.csv"
            skipped = save_folder / f"skipped_{source.name}.csv"
            manifests[source.split] = manifest
            inputs = [max_skipped, sample_rate, max_seconds, *source.inputs]
            inputs = _digest(json.dumps([_FORMAT, *inputs]).encode())
            known = state.pop(source.name, [])
            if known[:3] == [inputs, _stamp(manifest), _stamp(skipped)]:
                logger.info("%s is prepared already.", manifest)
                state[source.name] = known
            else:
                rows, skips, conversions = _check_audio(
                    pool, source, sample_rate, max_seconds
                )
                problem = _judge(source.split, rows, skips, max_skipped)
                _write_csv(skipped, Skip._fields, skips)
                if problem:
                    problems.append(f"{problem} See {skipped}.")
                    continue
                _warn(source.split, rows, skips, skipped)
                _write_csv(manifest, HEADER, rows)
                known = [inputs, _stamp(manifest), _stamp(skipped), conversions]
                state[source.name] = known
                write_json(save_folder / STATE_FILE, state)
            converted.update(known[3])
    if problems:
        raise CorpusError("\n".join(problems))
    if converted:
        logger.info(
            "%s: converted to %d Hz and one channel when it is read: %s.",
            corpus,
            sample_rate,
            ", ".join(
                f"{count} utterances of {what}"
                for what, count in converted.most_common()
            ),
        )
    return manifests


def _check_audio(pool, source, sample_rate, max_seconds):
    """Rows of a manifest, skips, and how often each conversion is needed."""

    def check(one):
        if one.fault:
            return one, (None, "", one.fault)
        limits = sample_rate, max_seconds
        return one, read_header(one.path, one.size, *limits)

    checked = pool.map(
        lambda group: list(map(check, source.collect(group))), source.groups
    )
    rows, skips, conversions = [], [], collections.Counter()
    bar = {"desc": source.split, "total": len(source.groups), "disable": None}
    for group in tqdm(checked, **bar):
        for one, (seconds, conversion, fault) in group:
            if fault:
                skips.append(Skip(one.id, one.place, fault))
                continue
            rows.append((one.id, seconds, one.wav, one.speaker, one.text))
            if conversion:
                conversions[conversion] += 1
    return sorted(rows), sorted(skips), conversions


def _choose_splits(root, splits, untranscribed):
    """The given splits, or the standard ones; all of them exist."""
    try:
        held = sorted(entry.name for entry in _folders(root))
    except OSError as error:
        raise CorpusError(f"Cannot read {root}: {error}") from error
    holds = ", ".join(held[:12]) + (", ..." if held[12:] else "") or "no folder"
    if splits is None:
        splits = [split for split in SPLITS if split in held]
        if not splits and not untranscribed:
            raise CorpusError(
                f"{root} holds none of LibriSpeech's splits "
                f"({', '.join(SPLITS)}); it holds {holds}."
            )
    splits = [splits] if isinstance(splits, str) else list(splits)
    splits += untranscribed
    if not splits:
        raise CorpusError("The list of splits is empty.")
    missing = [split for split in splits if split not in held]
    if missing:
        raise CorpusError(
            f"{root} has no split {', '.join(missing)}; it holds {holds}."
        )
    return list(dict.fromkeys(splits))


def _folders(folder):
    """Folders in a folder, but for the hidden ones."""
    return [
        entry
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    ]


def _list_chapters(folder):
    """Chapter folders of a split, sorted."""
    try:
        return sorted(
            chapter
            for speaker in _folders(folder)
            for chapter in _folders(speaker)
        )
    except OSError as error:
        raise CorpusError(f"Cannot read {folder}: {error}") from error


def _list_files(chapter):
    """Sorted ``[path, size, modification time]``; size -1: not a file."""
    files = []
    try:
        with os.scandir(chapter) as entries:
            for entry in entries:
                if entry.name.startswith("."):  # file managers leave these
                    continue
                # Names that are not UTF-8 could not be written to a CSV.
                name = os.fsencode(entry.name).decode(errors="replace")
                path = f"{chapter.parent.name}/{chapter.name}/{name}"
                size, changed = -1, 0
                if entry.is_file():
                    status = entry.stat()
                    size, changed = status.st_size, status.st_mtime_ns
                files.append([path, size, changed])
    except OSError as error:
        raise CorpusError(f"Cannot read {chapter}: {error}") from error
    return sorted(files)


def _list_candidates(root, untranscribed, group):
    """Yield the utterances of a chapter, given with its listing."""
    chapter, listing = group
    speaker = chapter.parent.name
    folder = chapter.relative_to(root).as_posix()
    sizes = {path.rpartition("/")[2]: size for path, size, _ in listing}
    audio = _find_audio(sizes)
    prefix = f"{speaker}-{chapter.name}"
    file = f"{prefix}.trans.txt"
    texts, faults = dict.fromkeys(audio, ""), {}
    if not untranscribed:
        try:
            texts, faults = read_transcript(chapter / file, f"{prefix}-")
        except FileNotFoundError:
            texts = {}
        except OSError:
            texts = {}
            faults = {f"{prefix}.trans": "unreadable transcript file"}
    for name, fault in faults.items():
        yield Candidate(name, f"{folder}/{file}", fault)
    for name in sorted((audio.keys() | texts.keys()) - faults.keys()):
        fault = None
        if name not in audio:
            fault = "transcript without audio"
        elif name not in texts:
            fault = "audio without transcript"
        elif untranscribed and not name.startswith(f"{prefix}-"):
            fault = "id of another chapter"
        elif untranscribed and "$" in name:
            fault = "$ in id"
        file = audio.get(name, f"{name}.flac")
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
    texts = []
    for split in splits:
        for chapter in _list_chapters(root / split):
            prefix = f"{chapter.parent.name}-{chapter.name}"
            path = chapter / f"{prefix}.trans.txt"
            if path.is_file():
                texts += read_transcript(path, f"{prefix}-")[0].values()
    return texts


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
    if "\N{REPLACEMENT CHARACTER}" in name + text:
        return "transcript not UTF-8"
    # SpeechBrain would take it for a placeholder.
    if "$" in name + text:
        return "$ in transcript"
    # The csv module of Python 3.10 cannot read it.
    if "\0" in name + text:
        return "NUL in transcript"
    return None if text else "empty transcript"


def _judge(split, rows, skips, max_skipped):
    """Why the split is unusable, or None."""
    total = len(rows) + len(skips)
    if not total:
        return f"{split} holds no utterance."
    reasons = _count(skips)
    if not rows:
        return (
            f"{split} has no usable utterance: {reasons}; the first is "
            f"{skips[0].id}. Repair them."
        )
    if len(skips) > max_skipped * total:
        return (
            f"{split}: {len(skips)} of {total} utterances "
            f"({len(skips) / total:.2%}) cannot be used, more than "
            f"max_skipped={max_skipped:g} allows: {reasons}; the first is "
            f"{skips[0].id}. Repair them or raise max_skipped."
        )
    return None


def _count(skips):
    """Reasons with their counts, the most frequent first."""
    counts = collections.Counter(skip.reason for skip in skips)
    return ", ".join(f"{reason} ({n})" for reason, n in counts.most_common())


def _warn(split, rows, skips, file):
    """Log skips and unusual letters."""
    if skips:
        logger.warning(
            "%s: %d of %d utterances skipped: %s; see %s.",
            split,
            len(skips),
            len(rows) + len(skips),
            _count(skips),
            file,
        )
    unusual = [set(re.sub("[A-Z' ]", "", row[-1])) for row in rows]
    letters = ""
    if any(unusual):
        letters = (
            f" {sum(map(bool, unusual))} transcripts have letters outside A-Z, "
            "apostrophe and space; they stay as they are: "
            + " ".join(sorted(set().union(*unusual))[:40])
        )
    hours = sum(row[1] for row in rows) / 3600
    logger.info(
        "%s: %d utterances, %.2f hours.%s", split, len(rows), hours, letters
    )


def _write_csv(path, header, rows):
    def write(partial):
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)

    write_atomically(path, write)


def _read_state(save_folder):
    """State of the manifests by name; empty if it cannot be read."""
    try:
        state = json.loads((save_folder / STATE_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _digest(content):
    return hashlib.sha256(content).hexdigest()


def _stamp(path):
    """Digest of a written file, None if it does not exist."""
    return _digest(path.read_bytes()) if path.is_file() else None
