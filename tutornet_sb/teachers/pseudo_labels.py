"""Pseudo-labels: a teacher's transcripts, on which a student trains by CTC.

They need neither transcripts of the corpus nor common symbols.
"""

import collections
import csv
import logging
import math
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import torch
from speechbrain.dataio.dataloader import make_dataloader
from speechbrain.dataio.dataset import FilteredSortedDynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.decoders.ctc import ctc_greedy_decode
from tqdm import tqdm

from tutornet_sb.corpora.tokenizer import BLANK
from tutornet_sb.util.errors import InputError
from tutornet_sb.util.files import read_json, write_json

logger = logging.getLogger(__name__)

HEADER = ["ID", "confidence", "left_out", "transcript"]
# Symbols that are no text, such as <unk> and [NOISE]
_TAG = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]")
_APOSTROPHES = str.maketrans("\N{RIGHT SINGLE QUOTATION MARK}`", "''")


class PseudoLabels(NamedTuple):
    """Transcripts by id to train on, and counts of what was dropped.

    These are utterances below the required confidence, and without a word.
    """

    transcripts: dict
    unsure: int
    empty: int


@torch.no_grad()
def transcribe(source, wavs, wav_lens):
    """Transcribe a batch greedily, with confidences.

    The confidence of a transcript ``y`` of ``n`` symbols is ``P(y|x)^(1/n)``,
    where CTC's ``P(y|x)`` sums over all alignments: the length-normalised
    log-likelihood by which pseudo-labels were selected in arXiv 1909.09116,
    here as a mean probability of a symbol. It falls when a symbol is doubtful,
    and also when one that was not emitted nearly was. Of an empty transcript
    it is ``P(y|x)`` itself.

    The source is a ``TeacherSource`` with a CTC head, in evaluation mode; the
    waveforms, ``(batch, samples)``, and their relative lengths are as for its
    model. Returns a text and a confidence, 0 to 1, for each.
    """
    _, logits, lengths = source.model(wavs, wav_lens)
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    blank = source.blank_index
    # SpeechBrain rounds relative lengths to frames again.
    relative = lengths / log_probs.shape[1]
    symbols = ctc_greedy_decode(log_probs, relative, blank_id=blank)
    costs = surprise(log_probs, lengths, symbols, blank)
    confidences = [
        mean_probability(cost, len(ids))
        for cost, ids in zip(costs, symbols, strict=True)
    ]
    if not all(map(math.isfinite, confidences)):
        raise InputError(
            f"the output of {source.source} is not finite for an utterance: "
            "are its weights intact, and is the audio at its sample rate?"
        )
    texts = map(source.decode, symbols)
    return list(zip(texts, confidences, strict=True))


def surprise(log_probs, lengths, symbols, blank_index=0):
    """``-log P(y|x)`` of transcripts over all their alignments, in nats.

    From log-probabilities ``(batch, frames, symbols)``, valid frames
    ``(batch,)`` and lists of symbols without blanks.
    """
    counts = torch.tensor([len(ids) for ids in symbols])
    costs = torch.nn.functional.ctc_loss(
        log_probs.transpose(0, 1),
        torch.tensor(sum(symbols, []), dtype=torch.long).to(log_probs.device),
        lengths,
        counts.to(lengths.device),
        blank=blank_index,
        reduction="none",
    )
    return costs.tolist()


def mean_probability(cost, count):
    """Confidence, from :func:`surprise` (nats) and the number of symbols."""
    return min(math.exp(-cost / max(count, 1)), 1.0)


def normalise(text, letters):
    """Write a teacher's text in the style of the corpus.

    In the case of the student's letters, with single spaces; hyphens separate
    words, typographic apostrophes become plain. Characters that then are not
    among the letters, and tags such as ``<unk>``, are removed and returned as a
    ``Counter``.

    Example
    -------
    >>> text, left_out = normalise("Well-known, isn’t it?", set("EIKLNOSTW'"))
    >>> text, dict(left_out)
    ("WELL KNOWN ISN'T IT", {',': 1, '?': 1})
    """
    left_out = collections.Counter(_TAG.findall(text))
    text = _TAG.sub(" ", unicodedata.normalize("NFC", text))
    kept = []
    for character in text.translate(_APOSTROPHES):
        forms = character, character.upper(), character.lower()
        known = next((form for form in forms if form in letters), None)
        if known is not None or character.isspace():
            kept.append(known or " ")
        elif unicodedata.category(character) == "Pd":
            kept.append(" ")
        else:
            left_out[character] += 1
    return " ".join("".join(kept).split()), left_out


def letters_of(pieces):
    """Set of letters that a student's symbols, listed by index, can write."""
    text = [piece for i, piece in enumerate(pieces) if i != BLANK]
    return set("".join(_TAG.sub("", piece) for piece in text)) - set("▁| ")


def write_pseudo_labels(
    source, data, path, letters, batch_seconds=60.0, num_workers=0
):
    """Transcribe a data set by a teacher into a CSV file.

    The columns are ``ID, confidence, left_out, transcript``; see
    :func:`transcribe` and :func:`normalise`. Rows are written batch by batch,
    in one process: a call after a killed one resumes, and one for a data set
    that has grown adds what is new. Beside the file, ``PATH.json`` holds the
    teacher, the letters (from :func:`letters_of`) and whether the labels are
    complete. Labels by another teacher or in other letters are an error.

    The data set, a ``DynamicItemDataset``, provides ``id``, ``sig`` (at the
    teacher's sample rate) and ``duration`` (seconds).
    """
    path = Path(path)
    if source.pieces is None:
        raise InputError(
            f"{source.source} has no CTC head and cannot transcribe"
        )
    made = {"teacher": source.source, "letters": "".join(sorted(letters))}
    done = _resume(path, made)
    todo = {key for key in data.data_ids if key not in done}
    logger.info("%s transcribes %d utterances", source.source, len(todo))
    write_json(_state(path), made | {"complete": False})
    everything = FilteredSortedDynamicItemDataset(data, data.data_ids)
    everything.set_output_keys(["id", "sig"])
    source.model.eval()
    device = next(source.model.parameters()).device
    left_out, touched = collections.Counter(), 0
    with (
        open(path, "a", newline="", encoding="utf-8") as file,
        tqdm(
            desc="pseudo-labels", total=len(todo), unit="utt", disable=None
        ) as bar,
    ):
        writer = csv.writer(file, lineterminator="\n")
        if not file.tell():
            writer.writerow(HEADER)
        for batch in longest_first(
            everything, batch_seconds, num_workers, done
        ):
            found = transcribe(source, *batch.to(device).sig)
            for key, (text, confidence) in zip(batch.id, found, strict=True):
                if key not in todo:
                    continue
                text, lost = normalise(text, letters)
                left_out += lost
                touched += bool(lost)
                row = [key, f"{confidence:.6f}", lost.total(), text]
                writer.writerow(row)
            file.flush()
            bar.update(len(todo.intersection(batch.id)))
    if left_out:
        most = ", ".join(f"{c!r} ({n})" for c, n in left_out.most_common(20))
        logger.warning(
            "%d transcripts by %s hold characters outside the student's "
            "vocabulary, which are removed: %s",
            touched,
            source.source,
            most,
        )
    write_json(_state(path), made | {"complete": True})


def read_pseudo_labels(path, min_confidence=0.0):
    """Read the transcripts of a file by :func:`write_pseudo_labels`.

    Utterances whose confidence is below `min_confidence`, 0 to 1, are dropped.
    """
    path = Path(path)
    state = _state(path)
    if not (
        path.is_file() and state.is_file() and read_json(state)["complete"]
    ):
        raise InputError(
            f"{path} is missing or incomplete: run the same command again, "
            "which resumes it"
        )
    rows = _read(path)
    sure = [row for row in rows if float(row["confidence"]) >= min_confidence]
    kept = [row for row in sure if row["transcript"]]
    if not kept:
        raise InputError(
            f"no transcript of {path} is left: of {len(rows)}, "
            f"{len(rows) - len(sure)} are below min_confidence "
            f"{min_confidence:g} and {len(sure)} are empty"
        )
    return PseudoLabels(
        transcripts={row["ID"]: row["transcript"] for row in kept},
        unsure=len(rows) - len(sure),
        empty=len(sure) - len(kept),
    )


def _state(path):
    return path.with_name(path.name + ".json")


def _resume(path, made):
    """Ids that are labelled; a half-written last line is dropped."""
    if not path.is_file():
        return set()
    state = _state(path)
    known = read_json(state) if state.is_file() else {}
    for key, value in made.items():
        if known.get(key) != value:
            raise InputError(
                f"{path} holds other pseudo-labels: there {key} is "
                f"{known.get(key, 'not known')}, and now it is {value}. Delete "
                "it, or choose another file"
            )
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with open(path, "r+b") as file:
            file.truncate(whole)
    return {row["ID"] for row in _read(path)} if whole else set()


def _read(path):
    """Rows of a file of pseudo-labels, checked."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        try:
            if next(reader, None) != HEADER:
                raise ValueError
            return [_check_row(fields) for fields in reader]
        except (ValueError, csv.Error):
            raise InputError(
                f"{path} is damaged at line {reader.line_num}: delete it and "
                "run the same command again"
            ) from None


def _check_row(fields):
    row = dict(zip(HEADER, fields, strict=True))
    is_share = 0 <= float(row["confidence"]) <= 1
    if not (is_share and row["left_out"].isdecimal()):
        raise ValueError
    return row


def longest_first(data, batch_seconds, num_workers=0, done=()):
    """Loader of batches of similar length, the longest utterances first.

    `batch_seconds` limits a batch, padding included. Padding may change a
    model's output in the last bit: so that an interrupted run resumes to the
    same result, utterances in `done` stay in their batch as long as that holds
    any other.
    """
    sampler = DynamicBatchSampler(
        data,
        max_batch_length=batch_seconds,
        num_buckets=10,
        length_func=lambda item: float(item["duration"]),
        shuffle=False,
        batch_ordering="descending",
    )
    batches = [
        batch
        for batch in sampler
        if any(data.data_ids[index] not in done for index in batch)
    ]
    return make_dataloader(data, batch_sampler=batches, num_workers=num_workers)
