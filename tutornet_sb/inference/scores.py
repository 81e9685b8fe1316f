"""Word and character error rates by jiwer, and the real-time factor."""

import re
import time
from pathlib import Path

import jiwer
import torch

from tutornet_sb.corpora.tokenizer import greedy_decode
from tutornet_sb.util.errors import InputError


def score(references, hypotheses):
    """Word and character error rate over a set of utterances.

    From transcripts by id: ``wer`` and ``cer`` (percent), ``utterances``,
    ``words`` (of the references). Raises ``InputError`` if the ids differ or
    the references hold no word.

    >>> score({"a": "ONE TWO"}, {"a": "ONE TOO"})["wer"]
    50.0
    """
    words, characters = _compare(references, hypotheses)
    return {
        "wer": 100 * words.wer,
        "cer": 100 * characters.cer,
        "utterances": len(references),
        "words": words.hits + words.substitutions + words.deletions,
    }


def count_errors(references, hypotheses):
    """``[word errors, words, character errors, characters]`` by utterance id.

    >>> count_errors({"a": "ONE TWO"}, {"a": "ONE TOO"})
    {'a': [1, 2, 1, 7]}
    """
    both = _compare(references, hypotheses)
    errors = {}
    for index, key in enumerate(sorted(references)):
        errors[key] = []
        for result in both:
            wrong = sum(
                max(
                    chunk.ref_end_idx - chunk.ref_start_idx,
                    chunk.hyp_end_idx - chunk.hyp_start_idx,
                )
                for chunk in result.alignments[index]
                if chunk.type != "equal"
            )
            errors[key] += [wrong, len(result.references[index])]
    return errors


def write_alignments(path, references, hypotheses):
    """Write the alignment of every utterance under its id, to be read."""
    words, _ = _compare(references, hypotheses)
    ids = sorted(references)
    text = re.sub(
        r"=== SENTENCE (\d+) ===",
        lambda found: f"=== {ids[int(found[1]) - 1]} ===",
        jiwer.visualize_alignment(words, skip_correct=False),
    )
    Path(path).write_text(text, encoding="utf-8")


def read_alignments(path):
    """Reference and hypothesis by id, of a file by ``write_alignments``."""
    text = Path(path).read_text(encoding="utf-8")
    found = re.findall(
        r"^=== (.+) ===\n\nREF:(.*)\nHYP:(.*)$", text, re.MULTILINE
    )
    # Stars stand for deleted and inserted words.
    return {
        key: tuple(" ".join(re.sub(r"\*+", "", t).split()) for t in both)
        for key, *both in found
    }


def _compare(references, hypotheses):
    if references.keys() != hypotheses.keys():
        odd = sorted(references.keys() ^ hypotheses.keys())
        raise InputError(
            f"{len(odd)} utterances have a reference or a hypothesis only: "
            f"{', '.join(odd[:5])}"
        )
    if not any(text.strip() for text in references.values()):
        raise InputError("the references hold no word, so there is no WER")
    ids = sorted(references)
    pair = [references[key] for key in ids], [hypotheses[key] for key in ids]
    return jiwer.process_words(*pair), jiwer.process_characters(*pair)


@torch.no_grad()
def real_time_factor(model, wavs, sample_rate, blank_index=0):
    """Seconds of computation for a second of audio, one utterance at a time.

    From waveform, ``(samples,)``, to greedy transcript, after two utterances to
    warm up. The fastest of three passes counts for each utterance.
    """
    device = next(model.parameters()).device
    whole = torch.ones(1, device=device)

    def seconds_of(wav):
        started = time.perf_counter()
        encoding = model(wav.unsqueeze(0).to(device), whole)
        # Decoding reads the result, so the device has finished by then.
        greedy_decode(encoding.logits, encoding.lengths, blank_index)
        return time.perf_counter() - started

    for wav in wavs[:2]:
        seconds_of(wav)
    # Whole passes, since a disturbance may last for some utterances
    passes = [[seconds_of(wav) for wav in wavs] for _ in range(3)]
    seconds = sum(map(min, zip(*passes, strict=True)))
    return seconds / (sum(len(wav) for wav in wavs) / sample_rate)
