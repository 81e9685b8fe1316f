"""A teacher's own transcripts, for a student to learn by CTC.

They need no transcript of the corpus and no common symbol: text goes between.
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

from tutornet_sb.util.errors import InputError
from tutornet_sb.util.files import read_json, write_json

logger = logging.getLogger(__name__)

HEADER = ["ID", "confidence", "left_out", "transcript"]
# What decoders write for symbols that are no text, such as <unk> and [NOISE]
_TAG = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]")
_APOSTROPHES = str.maketrans("\N{RIGHT SINGLE QUOTATION MARK}`", "''")


class Hypothesis(NamedTuple):
    """What a teacher hears in one utterance.

    Attributes
    ----------
    text : str
        As the teacher writes it.
    confidence : float
        0 to 1.
    """

    text: str
    confidence: float


class PseudoLabels(NamedTuple):
    """Transcripts to train on, and what was left out.

    Attributes
    ----------
    transcripts : dict
        Transcript of each utterance by id.
    unsure : int
        Utterances dropped, as the teacher is too unsure of them.
    empty : int
        Utterances dropped, as the teacher heard no word.
    left_out : int
        Characters outside the student's vocabulary that are missing in the
        transcripts.
    """

    transcripts: dict
    unsure: int
    empty: int
    left_out: int


@torch.no_grad()
def transcribe(source, wavs, wav_lens):
    """Transcribe a batch greedily and tell how sure the teacher is.

    The confidence of a transcript ``y`` of ``n`` symbols is ``P(y|x)^(1/n)``,
    where CTC's ``P(y|x)`` sums over all alignments: the length-normalised
    log-likelihood by which pseudo-labels were selected in arXiv 1909.09116,
    here as a mean probability of a symbol. It falls when a symbol is doubtful,
    and also when one that was not emitted nearly was. Of an empty transcript
    it is ``P(y|x)`` itself.

    Arguments
    ---------
    source : TeacherSource
        With ``name``, ``model`` (an ``AcousticModel`` in evaluation mode),
        ``blank_index`` and ``decode`` (symbol indices to text).
    wavs : torch.Tensor
        Waveforms, ``(batch, samples)``.
    wav_lens : torch.Tensor
        Valid part of each waveform relative to the longest, ``(batch,)``.

    Returns
    -------
    list of Hypothesis
        One for each utterance.

    Raises
    ------
    ValueError
        If the teacher's output is not finite.
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
            f"the output of {source.name} is not finite for an utterance: are "
            "its weights sound, and is the audio at its sample rate?"
        )
    return [
        Hypothesis(source.decode(ids), confidence)
        for ids, confidence in zip(symbols, confidences, strict=True)
    ]


def surprise(log_probs, lengths, symbols, blank_index=0):
    """Compute ``-log P(y|x)`` of transcripts, over all their alignments.

    Arguments
    ---------
    log_probs : torch.Tensor
        ``(batch, frames, symbols)``.
    lengths : torch.Tensor
        Valid frames, integers of shape ``(batch,)``.
    symbols : list of list of int
        The transcripts, without blanks.
    blank_index : int
        Index of the CTC blank.

    Returns
    -------
    list of float
        Nats, one for each transcript.

    Example
    -------
    >>> log_probs = torch.full((1, 2, 2), 0.5).log()
    >>> costs = surprise(log_probs, torch.tensor([2]), [[1]])
    >>> round(mean_probability(costs[0], 1), 4)  # three of the four paths
    0.75
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
    """Confidence in a transcript, as :func:`transcribe` defines it.

    Arguments
    ---------
    cost : float
        From :func:`surprise` (nats).
    count : int
        Symbols of the transcript.

    Returns
    -------
    float
        0 to 1.
    """
    return min(math.exp(-cost / max(count, 1)), 1.0)


def normalise(text, letters):
    """Write a teacher's text in the style of the corpus.

    In the case of the student's letters, with single spaces; hyphens part
    words, typographic apostrophes become plain. What then is no letter of the
    student's, and tags such as ``<unk>``, are left out and counted.

    Arguments
    ---------
    text : str
        As the teacher writes it.
    letters : set of str
        The student's letters; see :func:`letters_of`.

    Returns
    -------
    text : str
        Words of these letters.
    left_out : collections.Counter
        Characters and tags left out, with their counts.

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


def letters_of(pieces, blank_index=0):
    """Letters that a vocabulary can write.

    Arguments
    ---------
    pieces : list of str
        Symbols by index, each of one or several letters.
    blank_index : int
        Index of the CTC blank.

    Returns
    -------
    set of str
        Single characters, without the sign of the word boundary.

    Example
    -------
    >>> sorted(letters_of(["<unk>", "▁", "▁AN", "D", "'"]))
    ["'", 'A', 'D', 'N']
    """
    text = [p for i, p in enumerate(pieces) if i != blank_index]
    return set("".join(_TAG.sub("", piece) for piece in text)) - set("▁| ")


def write_pseudo_labels(
    source, data, path, letters, batch_seconds=60.0, num_workers=0
):
    """Transcribe a data set by a teacher into a CSV file.

    The columns are ``ID, confidence, left_out, transcript``; see
    :func:`transcribe` and :func:`normalise`. Rows are written batch by batch:
    a call after a killed one goes on where that stopped, and one for a data set
    that has grown adds what is new. Beside the file, ``PATH.json`` says whose
    labels they are, and whether they are complete.

    For one process: under DDP call it in the main process only.

    Arguments
    ---------
    source : TeacherSource
        The teacher; see :func:`transcribe`. Its model is put in evaluation
        mode and stays on its device.
    data : speechbrain.dataio.dataset.DynamicItemDataset
        Provides ``id``, ``sig`` (the waveform at the teacher's sample rate) and
        ``duration`` (seconds).
    path : str or pathlib.Path
        File to write.
    letters : set of str
        The student's letters; see :func:`letters_of`.
    batch_seconds : float
        Audio transcribed at a time, padding included (seconds).
    num_workers : int
        Processes that read audio.

    Raises
    ------
    ValueError
        If the file holds labels by another teacher or in other letters, or is
        damaged, or if the teacher has no CTC head.
    """
    path = Path(path)
    if source.pieces is None:
        raise InputError(f"{source.name} has no CTC head and cannot transcribe")
    told = {"teacher": source.name, "letters": "".join(sorted(letters))}
    done = _resume(path, told)
    todo = {key for key in data.data_ids if key not in done}
    if not todo and path.is_file():
        write_json(_state(path), told | {"complete": True})
        return
    logger.info("%s transcribes %d utterances", source.name, len(todo))
    write_json(_state(path), told | {"complete": False})
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
            heard = transcribe(source, *batch.to(device).sig)
            for key, hypothesis in zip(batch.id, heard, strict=True):
                if key not in todo:
                    continue
                text, lost = normalise(hypothesis.text, letters)
                left_out += lost
                touched += bool(lost)
                confidence = f"{hypothesis.confidence:.6f}"
                writer.writerow([key, confidence, lost.total(), text])
            file.flush()
            bar.update(len(todo.intersection(batch.id)))
    if left_out:
        most = ", ".join(f"{c!r} ({n})" for c, n in left_out.most_common(20))
        logger.warning(
            "%d transcripts by %s hold what the student cannot write; it is "
            "left out: %s",
            touched,
            source.name,
            most,
        )
    write_json(_state(path), told | {"complete": True})


def read_pseudo_labels(path, min_confidence=0.0):
    """Read the transcripts that a student shall learn.

    Arguments
    ---------
    path : str or pathlib.Path
        File by :func:`write_pseudo_labels`.
    min_confidence : float
        Utterances of which the teacher is less sure are dropped, 0 to 1.

    Returns
    -------
    PseudoLabels
        Transcripts by id, and counts of what was dropped.

    Raises
    ------
    ValueError
        If the file is missing, unfinished or damaged, if `min_confidence` is
        not in 0 to 1, or if nothing is left.
    """
    path = Path(path)
    if not 0 <= min_confidence <= 1:
        raise InputError(f"min_confidence is {min_confidence}, not in 0 to 1")
    state = _state(path)
    if not (
        path.is_file() and state.is_file() and read_json(state)["complete"]
    ):
        raise InputError(
            f"{path} is not there or not complete: run write_pseudo_labels, "
            "which goes on where it stopped"
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
        left_out=sum(int(row["left_out"]) for row in kept),
    )


def _state(path):
    return path.with_name(path.name + ".json")


def _resume(path, told):
    """Ids that are labelled already; a half-written last line is dropped."""
    if not path.is_file():
        return set()
    state = _state(path)
    known = read_json(state) if state.is_file() else {}
    for key, value in told.items():
        if known.get(key) != value:
            raise InputError(
                f"{path} holds pseudo-labels of another kind: there {key} is "
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
    rows = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        try:
            sound = next(reader, None) == HEADER
            for fields in reader if sound else ():
                row = dict(zip(HEADER, fields, strict=True))
                sound = 0 <= float(row["confidence"]) <= 1
                sound = sound and row["left_out"].isdecimal()
                if not sound:
                    break
                rows.append(row)
        except (ValueError, csv.Error):
            sound = False
        if not sound:
            raise InputError(
                f"{path} is damaged at line {reader.line_num}: delete it and "
                "run the same command again"
            )
    return rows


def longest_first(data, batch_seconds, num_workers=0, done=()):
    """Batch utterances of like length, the longest first.

    Padding may change a model's output in the last bit. So that a stopped work
    goes on to the same end, what is done stays in its batch as long as that
    holds anything else.

    Arguments
    ---------
    data : speechbrain.dataio.dataset.DynamicItemDataset
        Has ``duration`` (seconds).
    batch_seconds : float
        Audio of a batch, padding included (seconds).
    num_workers : int
        Processes that read audio.
    done : container of str
        Ids of the utterances that need not be batched.

    Returns
    -------
    torch.utils.data.DataLoader
        Of ``PaddedBatch``.
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
