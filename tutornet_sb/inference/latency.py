"""Emission latency: how long after its end a word is emitted by a CTC model.

It is the time of the last symbol of a word in the greedy transcript, less the
time at which its pronunciation ends (it can be negative), without computation.
"""

import jiwer
import numpy as np
import torch
from torchaudio.functional import forced_align

from tutornet_sb.corpora.tokenizer import split_words
from tutornet_sb.networks.acoustic_model import valid_counts
from tutornet_sb.util.errors import InputError

# Energy is measured over frames of this length (seconds); those so far below
# the loud ones (dB) are silence, which is a pause from a length on (seconds).
_ENERGY_FRAME, _THRESHOLD, _PAUSE = 0.01, 30.0, 0.06


def symbol_runs(path, blank_index=0):
    """Symbol, first and last frame of each run in a path, ``(frames,)``.

    >>> symbol_runs(torch.tensor([0, 1, 1, 0, 1, 2]))
    [(1, 1, 2), (1, 4, 4), (2, 5, 5)]
    """
    symbols, counts = path.cpu().unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    return [
        (symbol, end - count, end - 1)
        for symbol, count, end in zip(
            symbols.tolist(), counts.tolist(), ends.tolist(), strict=True
        )
        if symbol != blank_index
    ]


def align_symbols(log_probs, symbols, blank_index=0):
    """First and last frame of each symbol on CTC's most probable path.

    Of log-probabilities ``(frames, symbols)``; None if frames are too few.
    """
    repeated = sum(a == b for a, b in zip(symbols, symbols[1:], strict=False))
    if len(symbols) + repeated > len(log_probs):
        return None
    if not symbols:
        return []
    path, _ = forced_align(
        log_probs.unsqueeze(0),
        torch.tensor([symbols], device=log_probs.device),
        blank=blank_index,
    )
    return [
        (first, last) for _, first, last in symbol_runs(path[0], blank_index)
    ]


def _encode(model, batches):
    """Yield index in the batch, id, words, batch and logits of utterances."""
    device = next(model.parameters()).device
    for batch in batches:
        wavs, wav_lens = batch.sig
        _, logits, lengths = model(wavs.to(device), wav_lens.to(device))
        for i, (key, text) in enumerate(zip(batch.id, batch.wrd, strict=True)):
            yield i, key, text.split(), batch, logits[i, : lengths[i]]


@torch.no_grad()
def word_ends(model, batches, pieces, blank_index=0):
    """Estimate when the words of transcribed utterances end (seconds).

    A model that receives the whole utterance (as the teacher) is aligned to the
    transcript. Its spike for a word's last symbol precedes the word's end,
    which lies between there and the first symbol of the next word: at the start
    of the last pause between the two, if one of at least ``_PAUSE`` seconds
    (shorter silence may be the closure of a stop), else at that symbol. The
    last word ends with the last frame of speech; if that is the last of the
    recording, its end is unknown. Compare latencies by the same word ends only.

    Batches have ``id``, ``sig``, ``wrd`` and ``tokens`` (symbols of the model).
    Returned are, by utterance id, the end of each word of ``wrd``, None where
    unknown: all, if the tokens do not spell the transcript or frames are too
    few.
    """
    ends = {}
    for i, key, words, batch, logits in _encode(model, batches):
        wav, tokens = (
            padded[i, : valid_counts(padded, lengths)[i]].cpu()
            for padded, lengths in (batch.sig, batch.tokens)
        )
        log_probs = logits.float().log_softmax(-1).cpu()
        starts = _align(log_probs, tokens.tolist(), words, pieces, blank_index)
        ends[key] = [None] * len(words)
        if starts is not None:
            period = model.frame_period
            ends[key] = _find_ends(
                [[frame * period for frame in word] for word in starts],
                _is_speech(wav, model.features.sample_rate),
            )
    return ends


def _align(log_probs, tokens, words, pieces, blank_index):
    """First and last symbol's frame of each word, or None."""
    spelled = split_words(tokens, pieces)
    if [word for word, _, _ in spelled] != words:
        return None
    frames = align_symbols(log_probs, tokens, blank_index)
    if frames is None:
        return None
    return [(frames[first][0], frames[last][0]) for _, first, last in spelled]


def _is_speech(wav, sample_rate):
    """Which frames of 10 ms are loud, ``(frames,)``."""
    size = round(_ENERGY_FRAME * sample_rate)
    frames = wav[: len(wav) // size * size].view(-1, size)
    power = frames.double().square().mean(1).numpy()
    if not len(power):
        return np.zeros(0, dtype=bool)
    return power > np.percentile(power, 95) / 10 ** (_THRESHOLD / 10)


def _find_ends(words, speech):
    """Ends of words (seconds) from their first and last symbol's times."""
    ends, shortest_pause = [], round(_PAUSE / _ENERGY_FRAME)
    for (_, last), (following, _) in zip(words, words[1:], strict=False):
        between = range(
            min(round(last / _ENERGY_FRAME), len(speech)),
            min(round(following / _ENERGY_FRAME), len(speech)),
        )
        end, silence = following, 0
        for frame in between:
            silence = 0 if speech[frame] else silence + 1
            if silence >= shortest_pause:
                end = (frame + 1 - silence) * _ENERGY_FRAME
        ends.append(end)
    if words:
        loud = speech.nonzero()[0]
        known = len(loud) and loud[-1] + 1 < len(speech)
        end = (int(loud[-1]) + 1) * _ENERGY_FRAME if known else None
        ends.append(end)
    return ends


@torch.no_grad()
def emission_latency(
    model, batches, pieces, ends, blank_index=0, look_ahead=0.0
):
    """Measure how long after its end a word is emitted (milliseconds).

    Words count that are recognised (hits of jiwer's alignment) and whose end is
    known, from ``word_ends`` or the truth. A symbol is emitted at the first
    frame at which it is the most probable; frame ``i`` is at ``i *
    frame_period``, plus the ``look_ahead`` of the model (seconds).

    Returns ``mean``, ``median`` and ``p95`` (None if no word counts), ``words``
    (that count), ``hits`` and ``reference_words``.
    """
    latencies, hits, reference_words = [], 0, 0
    for _, key, reference, _, logits in _encode(model, batches):
        if len(ends.get(key, ())) != len(reference):
            raise InputError(
                f"{key}: word ends must be as many as its {len(reference)} "
                f"words, got {len(ends.get(key, ()))}"
            )
        runs = symbol_runs(logits.argmax(-1), blank_index)
        written = split_words([symbol for symbol, _, _ in runs], pieces)
        reference_words += len(reference)
        for theirs, ours in _hits(reference, [word for word, _, _ in written]):
            hits += 1
            if ends[key][theirs] is not None:
                _, frame, _ = runs[written[ours][2]]
                time = frame * model.frame_period + look_ahead
                latencies.append(1000 * (time - ends[key][theirs]))
    return {
        "mean": float(np.mean(latencies)) if latencies else None,
        "median": float(np.median(latencies)) if latencies else None,
        "p95": float(np.percentile(latencies, 95)) if latencies else None,
        "words": len(latencies),
        "hits": hits,
        "reference_words": reference_words,
    }


def _hits(reference, hypothesis):
    """Positions of the words that are recognised, in both."""
    if not reference or not hypothesis:
        return
    aligned = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
    for chunk in aligned.alignments[0]:
        if chunk.type == "equal":
            yield from zip(
                range(chunk.ref_start_idx, chunk.ref_end_idx),
                range(chunk.hyp_start_idx, chunk.hyp_end_idx),
                strict=True,
            )
