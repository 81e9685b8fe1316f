"""LibriSpeech, or any folder in its layout, to SpeechBrain manifests.

The layout is ``SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac`` with the
lines ``SPEAKER-CHAPTER-NNNN TRANSCRIPT`` in ``SPEAKER-CHAPTER.trans.txt``. The
audio may be of any format that soundfile reads. Hidden files and folders, whose
names begin with a dot, are left alone.

What says that the *call* is wrong is an error: a missing folder or split, a
split without one usable utterance. Damage to single utterances is skipped,
counted and written down, so that a preparation of 960 hours ends; too much of
it is an error once all is scanned.
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


def find_librispeech(data_folder):
    """Find the folder that directly contains the splits.

    Arguments
    ---------
    data_folder : str or pathlib.Path
        That folder, or the parent of a ``LibriSpeech`` folder.

    Returns
    -------
    pathlib.Path
        What ``$data_root`` stands for in the manifests; absolute.

    Raises
    ------
    CorpusError
        If there is no such folder.

    Example
    -------
    >>> import tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> (folder / "LibriSpeech" / "dev-clean").mkdir(parents=True)
    >>> find_librispeech(folder).name
    'LibriSpeech'
    """
    folder = pathlib.Path(data_folder).expanduser().resolve()
    if not folder.is_dir():
        raise CorpusError(f"There is no folder {folder}.")
    nested = folder / "LibriSpeech"
    holds_splits = any((folder / split).is_dir() for split in SPLITS)
    return nested if nested.is_dir() and not holds_splits else folder


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
    for ``DynamicItemDataset.from_csv(path, {"data_root": root})`` with `root`
    from `find_librispeech`. Audio at another sample rate, or of several
    channels, is converted by `audio.read_utterance` when it is read, and
    counted in one line of the log. A rerun does nothing for a split whose files
    (names, sizes, modification times) and options are as before.

    ``skipped_SPLIT.csv`` holds ``id, file, reason`` of each utterance left
    out: transcript without audio or the reverse; audio that is empty,
    unreadable, at a sample rate outside 8 to 48 kHz, shorter than 0.04 s or
    longer than `max_seconds`; a transcript that is empty, not UTF-8, named for
    another chapter, given twice, or with a ``$``, which SpeechBrain would
    take for a placeholder. Letters outside A-Z, apostrophe and space are
    no damage: they stay, with one line a split in the log. Audio cut off
    behind an intact header is not noticed: only `read_utterance` finds it.

    A split of `untranscribed` audio needs no transcripts; those that are
    there are not read. Its ``wrd`` is empty, and its files are
    ``untranscribed_SPLIT.csv`` and ``skipped_untranscribed_SPLIT.csv``, so
    that the same split may be prepared both ways.

    Arguments
    ---------
    data_folder : str or pathlib.Path
        LibriSpeech, or its parent folder.
    save_folder : str or pathlib.Path
        Where the manifests go.
    splits : list of str, optional
        Which splits; by default, those of the seven standard ones that
        are there.
    sample_rate : int
        In Hz; that audio at other rates will be converted to.
    max_skipped : float
        The greatest part of a split's utterances that may be skipped,
        0 to 1.
    workers : int, optional
        Threads that read headers.
    untranscribed : list of str, optional
        Splits that are prepared without their transcripts, besides those of
        `splits` or instead.
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

    Example
    -------
    >>> manifests = prepare_librispeech(
    ...     "/data/LibriSpeech", "results/manifests", splits=["dev-clean"]
    ... )  # doctest: +SKIP
    """
    root = find_librispeech(data_folder)
    if isinstance(untranscribed, str):
        untranscribed = [untranscribed]
    untranscribed = list(untranscribed or ())
    splits = _choose_splits(root, splits, untranscribed)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:

        def sources():
            for split in splits:
                silent = split in untranscribed
                chapters = _list_chapters(root / split)
                listings = list(pool.map(_list_files, chapters))
                scan = functools.partial(
                    _scan_chapter, root, sample_rate, max_seconds, silent
                )
                yield Source(
                    split,
                    f"untranscribed_{split}" if silent else split,
                    [sample_rate, max_seconds, *listings],
                    functools.partial(
                        _gather, pool, scan, split, chapters, listings
                    ),
                )

        return make_manifests(
            root, sources(), save_folder, sample_rate, max_skipped
        )


class Source(NamedTuple):
    """What the manifest of a split is made from.

    Attributes
    ----------
    split : str
        Its name.
    name : str
        That of the manifest, without its ending.
    inputs : list
        What the manifest follows from, as JSON holds it.
    scan : callable
        Gives its rows, the skips, and how often each conversion is needed.
    """

    split: str
    name: str
    inputs: list
    scan: Callable[[], tuple]


def make_manifests(corpus, sources, save_folder, sample_rate, max_skipped):
    """Write the manifests of splits, and the lists of what they leave out.

    Nothing is done for a split where both are there and of the same inputs.

    Arguments
    ---------
    corpus : object
        Name of the corpus, for the log.
    sources : iterable of Source
        One for each split.
    save_folder : str or pathlib.Path
        Where they go.
    sample_rate : int
        Sample rate that audio will be converted to (Hz).
    max_skipped : float
        The greatest part of a split's utterances that may be skipped, 0 to 1.

    Returns
    -------
    dict of str to pathlib.Path
        The manifest of each split.

    Raises
    ------
    CorpusError
        If they cannot be written, or a split is damaged beyond `max_skipped`.
    """
    if not 0 <= max_skipped <= 1:
        raise CorpusError(f"max_skipped is {max_skipped}, not in 0 to 1.")
    save_folder = pathlib.Path(save_folder).expanduser()
    try:
        save_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CorpusError(f"Cannot make {save_folder}: {error}") from error
    state = _read_state(save_folder)
    manifests, problems, converted = {}, [], collections.Counter()
    for split, name, inputs, scan in sources:
        manifest = save_folder / f"{name}.csv"
        skipped = save_folder / f"skipped_{name}.csv"
        manifests[split] = manifest
        inputs = _fingerprint([_FORMAT, max_skipped, *inputs])
        known = state.pop(name, [])
        if known[:3] == [inputs, _stamp(manifest), _stamp(skipped)]:
            logger.info("%s is prepared already.", manifest)
            state[name] = known
        else:
            rows, skips, conversions = scan()
            problem = _judge(split, rows, skips, max_skipped)
            _write_csv(skipped, Skip._fields, skips)
            if problem:
                problems.append(f"{problem} See {skipped}.")
                continue
            _warn(split, rows, skips, skipped)
            _write_csv(manifest, HEADER, rows)
            known = [inputs, _stamp(manifest), _stamp(skipped), conversions]
            state[name] = known
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


def _choose_splits(root, splits, untranscribed):
    """The asked splits, or the standard ones there; all of them exist."""
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


def _scan_chapter(
    root, sample_rate, max_seconds, untranscribed, chapter, listing
):
    """Rows and skips of one chapter.

    Arguments
    ---------
    root : pathlib.Path
        Folder of the splits.
    sample_rate : int
        In Hz.
    max_seconds : float
        Of an utterance.
    untranscribed : bool
        Whether to leave the transcripts unread and the rows' empty.
    chapter : pathlib.Path
        Its folder.
    listing : list
        From `_list_files`.

    Returns
    -------
    rows : list of tuple
        Of the manifest.
    skips : list of Skip
        What was left out.
    conversions : list of str
        What has to be converted, one for each such utterance.
    """
    speaker = chapter.parent.name
    folder = chapter.relative_to(root).as_posix()
    sizes = {path.rpartition("/")[2]: size for path, size, _ in listing}
    audio = _find_audio(sizes)
    if untranscribed:
        prefix = f"{speaker}-{chapter.name}-"
        texts, skips = _check_names(audio, prefix, folder)
    else:
        prefix = f"{speaker}-{chapter.name}"
        file = f"{folder}/{prefix}.trans.txt"
        try:
            texts, faults = read_transcript(
                chapter / f"{prefix}.trans.txt", f"{prefix}-"
            )
        except FileNotFoundError:
            texts, faults = {}, {}
        except OSError:
            texts, faults = (
                {},
                {pathlib.Path(file).stem: "unreadable transcript file"},
            )
        skips = [Skip(name, file, reason) for name, reason in faults.items()]
    rows, conversions = [], []
    for name in sorted(audio.keys() | texts.keys()):
        file = f"{folder}/{audio.get(name, f'{name}.flac')}"
        if name not in audio:
            skips.append(Skip(name, file, "transcript without audio"))
        elif name not in texts:
            # A damaged line has told its own reason already.
            if name not in {skip.id for skip in skips}:
                skips.append(Skip(name, file, "audio without transcript"))
        else:
            path = chapter / audio[name]
            duration, conversion, reason = read_header(
                path, sizes[path.name], sample_rate, max_seconds
            )
            if reason:
                skips.append(Skip(name, file, reason))
                continue
            wav = f"$data_root/{file}"
            rows.append((name, duration, wav, speaker, texts[name]))
            if conversion:
                conversions.append(conversion)
    return rows, skips, conversions


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
    """Read a file of lines ``ID TRANSCRIPT``.

    A byte order mark is ignored, and letters with accents are composed (NFC).

    Arguments
    ---------
    path : pathlib.Path
        The file.
    prefix : str
        What all ids must begin with.

    Returns
    -------
    texts : dict
        Transcript by id, of the sound lines.
    faults : dict
        What is wrong with the others, by id.

    Raises
    ------
    OSError
        If the file cannot be read.
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
    """Read the transcripts of splits, without looking at their audio.

    Arguments
    ---------
    data_folder : str or pathlib.Path
        LibriSpeech, or its parent folder.
    splits : list of str, optional
        By default, the standard training splits that are there.

    Returns
    -------
    list of str
        The sound ones.

    Raises
    ------
    CorpusError
        If there is no such folder or split.
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
    r"""Part words by single spaces and compose letters with accents.

    Arguments
    ---------
    text : str
        As written.

    Returns
    -------
    str
        In Unicode's normal form C, as recognisers write it.

    Example
    -------
    >>> tidy_text("  cafe\N{COMBINING ACUTE ACCENT}\tau lait ")
    'café au lait'
    """
    return unicodedata.normalize("NFC", " ".join(text.split()))


def fault_of(name, text):
    """Tell what is wrong with an id or a transcript.

    Arguments
    ---------
    name, text : str
        As decoded, with replacement characters for what is not UTF-8.

    Returns
    -------
    str or None
        The fault.
    """
    if "\N{REPLACEMENT CHARACTER}" in name + text:
        return "transcript not UTF-8"
    # SpeechBrain would take it for a placeholder.
    if "$" in name + text:
        return "$ in transcript"
    # A table of Python 3.10 cannot hold it.
    if "\0" in name + text:
        return "NUL in transcript"
    return None if text else "empty transcript"


def _check_names(audio, prefix, folder):
    """Empty transcripts by utterance id, and skips for the ids at fault."""
    texts, skips = {}, []
    for name in audio:
        if not name.startswith(prefix):
            reason = "id of another chapter"
        elif "$" in name:
            reason = "$ in id"
        else:
            texts[name] = ""
            continue
        skips.append(Skip(name, f"{folder}/{audio[name]}", reason))
    return texts, skips


def _gather(pool, scan, split, chapters, listings):
    """Scan the chapters and join them, in the order of the ids."""
    rows, skips, conversions = [], [], collections.Counter()
    scans = pool.map(scan, chapters, listings)
    bar = tqdm(
        scans, desc=split, total=len(chapters), unit="chapter", disable=None
    )
    for part in bar:
        rows += part[0]
        skips += part[1]
        conversions.update(part[2])
    return sorted(rows), sorted(skips), conversions


def _judge(split, rows, skips, max_skipped):
    """What makes the split unusable, or None."""
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
    """Log what was skipped and which letters are unusual."""
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
    """Fingerprints by split; empty if there are none that can be read."""
    try:
        state = json.loads((save_folder / STATE_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _fingerprint(listing):
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _stamp(path):
    """Digest of a written file, None if it is not there."""
    if not path.is_file():
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()
