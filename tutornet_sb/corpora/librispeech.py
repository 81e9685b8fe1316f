"""LibriSpeech, or any folder in its layout, to SpeechBrain manifests.

The layout is ``SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac`` with the
lines ``SPEAKER-CHAPTER-NNNN TRANSCRIPT`` in ``SPEAKER-CHAPTER.trans.txt``.

What says that the *call* is wrong is an error: a missing folder or split, a
split without one usable utterance, all its audio at another sample rate.
Damage to single utterances is skipped, counted and written down, so that a
preparation of 960 hours ends; too much of it is an error once all is scanned.
"""

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

import soundfile
from speechbrain.dataio.dataio import read_audio
from tqdm import tqdm

from tutornet_sb.errors import InputError
from tutornet_sb.files import write_atomically, write_json

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
_FORMAT = 2  # raise when manifests change, so that old ones are made anew
# STREAMINFO counts in 36 bits; libsndfile reports more for "unknown".
_MOST_SAMPLES = 2**36
# What every network can hear, spoken faster by half (seconds)
_LEAST_SECONDS = 0.04

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
    the FLAC header alone, and a path that starts with ``$data_root``, for
    ``DynamicItemDataset.from_csv(path, {"data_root": root})`` with `root`
    from `find_librispeech`. A rerun does nothing for a split whose files
    (names, sizes, modification times) and options are as before.

    ``skipped_SPLIT.csv`` holds ``id, file, reason`` of each utterance left
    out: transcript without audio or the reverse; audio that is empty,
    unreadable, not mono, at another sample rate, shorter than 0.04 s or longer
    than `max_seconds`; a transcript that is empty, not UTF-8, named for
    another chapter, given twice, or with a ``$``, which SpeechBrain would
    take for a placeholder. Letters outside A-Z, apostrophe and space are
    no damage: they stay, with one warning a split. Audio cut off behind an
    intact header is not noticed: only `read_utterance` finds it.

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
        In Hz; audio at any other rate is skipped.
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
    if not 0 <= max_skipped <= 1:
        raise CorpusError(f"max_skipped is {max_skipped}, not in 0 to 1.")
    save_folder = pathlib.Path(save_folder).expanduser()
    try:
        save_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CorpusError(f"Cannot make {save_folder}: {error}") from error

    options = [_FORMAT, sample_rate, max_skipped, max_seconds]
    state = _read_state(save_folder)
    manifests, problems = {}, []
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for split in splits:
            silent = split in untranscribed
            name = f"untranscribed_{split}" if silent else split
            outputs = (
                save_folder / f"{name}.csv",
                save_folder / f"skipped_{name}.csv",
            )
            manifests[split] = outputs[0]
            chapters = _list_chapters(root / split)
            listings = list(pool.map(_list_files, chapters))
            inputs = _fingerprint([options, *listings])
            if state.get(name) == [inputs, *map(_stamp, outputs)]:
                logger.info("%s is prepared already.", outputs[0])
                continue
            state.pop(name, None)
            scan = functools.partial(
                _scan_chapter, root, sample_rate, max_seconds, silent
            )
            rows, skips = _gather(
                tqdm(
                    pool.map(scan, chapters, listings),
                    desc=split,
                    total=len(chapters),
                    unit="chapter",
                    disable=None,
                )
            )
            problem = _judge(split, rows, skips, sample_rate, max_skipped)
            _write_csv(outputs[1], Skip._fields, skips)
            if problem:
                problems.append(f"{problem} See {outputs[1]}.")
                continue
            _warn(split, rows, skips, outputs[1])
            header = ("ID", "duration", "wav", "spk_id", "wrd")
            _write_csv(outputs[0], header, rows)
            state[name] = [inputs, *map(_stamp, outputs)]
            write_json(save_folder / STATE_FILE, state)
    if problems:
        raise CorpusError("\n".join(problems))
    return manifests


def _choose_splits(root, splits, untranscribed):
    """The asked splits, or the standard ones there; all of them exist."""
    try:
        held = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
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


def _list_chapters(folder):
    """Chapter folders of a split, sorted."""
    try:
        return sorted(
            chapter
            for speaker in folder.iterdir()
            if speaker.is_dir()
            for chapter in speaker.iterdir()
            if chapter.is_dir()
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
    """
    speaker = chapter.parent.name
    folder = chapter.relative_to(root).as_posix()
    sizes = {path.rpartition("/")[2]: size for path, size, _ in listing}
    audio = {name[:-5] for name in sizes if name.endswith(".flac")}
    if untranscribed:
        texts, skips = _check_names(audio, f"{speaker}-{chapter.name}-", folder)
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
    rows = []
    for name in sorted(audio | texts.keys()):
        file = f"{folder}/{name}.flac"
        if name not in audio:
            skips.append(Skip(name, file, "transcript without audio"))
        elif name not in texts:
            # A damaged line has told its own reason already.
            if name not in {skip.id for skip in skips}:
                skips.append(Skip(name, file, "audio without transcript"))
        else:
            path = chapter / f"{name}.flac"
            size = sizes[path.name]
            duration, reason = _read_header(
                path, size, sample_rate, max_seconds
            )
            if reason:
                skips.append(Skip(name, file, reason))
            else:
                wav = f"$data_root/{file}"
                rows.append((name, duration, wav, speaker, texts[name]))
    return rows, skips


def read_transcript(path, prefix=""):
    """Read a file of lines ``ID TRANSCRIPT``.

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
    for line in filter(None, map(bytes.strip, path.read_bytes().splitlines())):
        words = line.decode(errors="replace").split()
        name, text = words[0], " ".join(words[1:])
        seen[name] += 1
        if not name.startswith(prefix):
            faults[name] = "id of another chapter"
        elif "\N{REPLACEMENT CHARACTER}" in name + text:
            faults[name] = "transcript not UTF-8"
        elif "$" in name + text:
            faults[name] = "$ in transcript"
        elif not text:
            faults[name] = "empty transcript"
        texts[name] = text
    # Which of two transcripts is right cannot be known.
    faults.update({name: "duplicate id" for name in seen if seen[name] > 1})
    for name in faults:
        del texts[name]
    return texts, faults


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
        skips.append(Skip(name, f"{folder}/{name}.flac", reason))
    return texts, skips


def _read_header(path, size, sample_rate, max_seconds):
    """Duration in seconds from the header, or the reason to skip."""
    if size == 0:
        return None, "empty audio file"
    try:
        info = soundfile.info(path)
    except (OSError, soundfile.LibsndfileError):
        return None, "unreadable audio"
    if info.samplerate != sample_rate:
        return None, f"sample rate of {info.samplerate} Hz"
    if info.channels != 1:
        return None, f"{info.channels} channels"
    if not 0 < info.frames < _MOST_SAMPLES:
        return None, "audio of no or unknown length"
    seconds = info.frames / info.samplerate
    if seconds < _LEAST_SECONDS:
        return None, f"audio shorter than {_LEAST_SECONDS:g} s"
    if seconds > max_seconds:
        return None, f"audio longer than max_seconds={max_seconds:g} allows"
    return seconds, None


def read_utterance(key, path, seconds, sample_rate=16000):
    """Read the waveform of an utterance as its manifest describes it.

    Arguments
    ---------
    key : str
        Its id.
    path : str
        Its audio file.
    seconds : float
        Its duration.
    sample_rate : int
        In Hz.

    Returns
    -------
    torch.Tensor
        The waveform, ``(samples,)``.

    Raises
    ------
    InputError
        If the file is missing, damaged or of another length, or holds what is
        no number.
    """
    try:
        waveform = read_audio(path)
    # SpeechBrain raises it, whatever is wrong.
    except (RuntimeError, OSError) as error:
        reason = f"cannot be read as audio ({error})"
    else:
        samples = round(seconds * sample_rate)
        if waveform.shape != (samples,):
            reason = (
                f"has the shape {tuple(waveform.shape)}, and its header "
                f"promised {samples} samples"
            )
        elif not waveform.isfinite().all():
            reason = "holds samples that are not finite"
        else:
            return waveform
    raise InputError(
        f"utterance {key}: {path} {reason}. Repair the file, or take it out of "
        "the corpus with its transcript, and give the same command again: what "
        "has been computed stays"
    )


def _gather(scans):
    """Join the chapters, in the order of the ids."""
    rows, skips = [], []
    for chapter_rows, chapter_skips in scans:
        rows += chapter_rows
        skips += chapter_skips
    return sorted(rows), sorted(skips)


def _judge(split, rows, skips, sample_rate, max_skipped):
    """What makes the split unusable, or None."""
    total = len(rows) + len(skips)
    if not total:
        return f"{split} holds no utterance in LibriSpeech's layout."
    reasons = _count(skips)
    if not rows:
        message = (
            f"{split} has no usable utterance: {reasons}; the first is "
            f"{skips[0].id}. Repair them."
        )
        if all(skip.reason.startswith("sample rate") for skip in skips):
            message += (
                f" All its audio is at another sample rate than the "
                f"{sample_rate} Hz asked for: resample it, or set "
                "sample_rate."
            )
        return message
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
    if any(unusual):
        logger.warning(
            "%s: %d transcripts have letters outside A-Z, apostrophe and "
            "space; they stay as they are: %s",
            split,
            sum(map(bool, unusual)),
            " ".join(sorted(set().union(*unusual))[:40]),
        )
    hours = sum(row[1] for row in rows) / 3600
    logger.info("%s: %d utterances, %.2f hours.", split, len(rows), hours)


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
