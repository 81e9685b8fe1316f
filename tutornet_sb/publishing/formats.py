"""Other export formats of a model, tried on the test set of its run."""

import functools
import shutil
import time

import torch
from tqdm import tqdm

from tutornet_sb.corpora.tokenizer import greedy_decode, tidy
from tutornet_sb.inference import runner
from tutornet_sb.inference.runner import OnnxModel
from tutornet_sb.inference.scores import score
from tutornet_sb.publishing.model_card import INT8, ONNX, SCRIPT, SHERPA, TOKENS
from tutornet_sb.publishing.onnx import (
    NoInt8Error,
    compare,
    quantize,
    write_onnx,
)
from tutornet_sb.publishing.sherpa import (
    load_sherpa,
    write_sherpa,
    write_tokens,
)
from tutornet_sb.util.errors import InputError

# Utterances of a padded batch
BATCH = 8
# Of int8 against single precision: points of WER that it may cost, and part of
# the time that it may take. A gain of a few percent is within what times vary.
MOST_LOSS = 0.2
MOST_TIME = 0.95


def add_formats(to, model, tokenizer, config, speech, onnx, int8, sherpa):
    """Write export formats into an export, and what they are into ``config``.

    They are compared with the model on the test set of ``speech``, ONNX on
    noise alone if it is None. One that cannot be written or differs is left
    out: returned are these, each with why.
    """
    decode = functools.partial(_decode, tokenizer, config["blank_index"])
    wanted, own, failed = {}, [], []
    if onnx:
        wanted["onnx"] = functools.partial(_add_onnx, int8=int8)
    if sherpa:
        wanted["sherpa"] = _add_sherpa
    for name, add in wanted.items():
        (to / name).mkdir()
        try:
            config[name] = add(to, model, decode, config, speech, own)
        except InputError as error:
            shutil.rmtree(to / name)
            failed.append(f"{name}: {error}")
    return failed


def _add_onnx(to, model, decode, config, speech, own, int8):
    """Write ONNX graphs; returns ``onnx`` of ``config.json``.

    ``own`` gets the model's own transcripts.
    """
    written = write_onnx(
        model, to / ONNX, {name: config[name] for name in runner.ABOUT}
    )
    shutil.copyfile(runner.__file__, to / SCRIPT)
    about = {
        "model": ONNX,
        "max_difference": None,
        "checked_on": None,
        "int8": None,
        "scores": {},
    }
    if speech is None:
        return about
    differences, texts = [], {"pytorch": [], "onnx": []}
    starts = range(0, len(speech.test), BATCH)
    for start in tqdm(starts, desc="onnx", unit="batch", disable=None):
        wavs = [one.read() for one in speech.test[start : start + BATCH]]
        batch = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
        lengths = torch.tensor([len(wav) for wav in wavs])
        difference, ours, theirs = compare(model, written, batch, lengths)
        differences.append(difference)
        texts["pytorch"] += map(decode, ours)
        texts["onnx"] += map(decode, theirs)
    about["max_difference"] = max(differences)
    about["checked_on"] = {
        "split": speech.split,
        "utterances": len(speech.test),
    }
    if int8:
        about["int8"] = _add_int8(to, speech, texts)
    about["scores"] = {speech.split: _compare_texts(texts, speech)}
    own += texts["pytorch"]
    return about


def _add_int8(to, speech, texts):
    """Write the quantised graph and add its texts, if it is of use."""
    small = to / INT8
    try:
        quantize(to / ONNX, small, (one.read() for one in speech.valid))
        models = [OnnxModel(path, threads=1) for path in (to / ONNX, small)]
        wavs = [one.read().numpy() for one in speech.test]
        ratio = time_ratio(*models, wavs[:: len(wavs) // 20 + 1])
        if ratio > MOST_TIME:
            raise NoInt8Error(
                f"it would take {ratio:.2f} of the time of single precision"
            )
        bar = tqdm(wavs, desc="int8", unit="utterance", disable=None)
        found = [models[1].transcribe(wav) for wav in bar]
        loss = (
            _score(found, speech)["wer"] - _score(texts["onnx"], speech)["wer"]
        )
        if loss > MOST_LOSS:
            raise NoInt8Error(
                f"its WER on {speech.split} would be {loss:.2f} points higher"
            )
    except NoInt8Error as error:
        small.unlink(missing_ok=True)
        return {"model": None, "reason": str(error)}
    texts["int8"] = found
    sizes = [(to / name).stat().st_size for name in (INT8, ONNX)]
    return {
        "model": INT8,
        "size_ratio": sizes[0] / sizes[1],
        "time_ratio": ratio,
    }


def time_ratio(first, second, wavs, turns=5):
    """Processor time of the second model over that of the first.

    Both transcribe each waveform in turns, of which the fastest counts.
    """
    seconds = [0.0, 0.0]
    for wav in wavs:
        taken = [], []
        for _ in range(turns):
            for model, times in zip((first, second), taken, strict=True):
                started = time.process_time()
                model.transcribe(wav)
                times.append(time.process_time() - started)
        seconds = [s + min(t) for s, t in zip(seconds, taken, strict=True)]
    return seconds[1] / seconds[0]


@torch.no_grad()
def _add_sherpa(to, model, decode, config, speech, own):
    """Write the files of sherpa-onnx; returns ``sherpa`` of ``config.json``."""
    constructor = write_sherpa(model, to / SHERPA)
    write_tokens(to / TOKENS, config["symbols"], config["blank_index"])
    transcribe = load_sherpa(constructor, to / SHERPA, to / TOKENS)
    texts = {"pytorch": list(own), "sherpa": []}
    for one in tqdm(speech.test, desc="sherpa", unit="utterance", disable=None):
        wav = one.read()
        texts["sherpa"].append(transcribe(wav.numpy()))
        if not own:
            logits = model(wav.unsqueeze(0), torch.ones(1)).logits
            texts["pytorch"].append(decode(logits[0]))
    return {
        "model": SHERPA,
        "tokens": TOKENS,
        "recognizer": constructor,
        "scores": {speech.split: _compare_texts(texts, speech)},
    }


def _decode(tokenizer, blank, scores):
    (ids,) = greedy_decode(scores.unsqueeze(0), [len(scores)], blank)
    return tidy(tokenizer.decode(ids))


def _score(texts, speech):
    references = dict(enumerate(one.text for one in speech.test))
    return score(references, dict(enumerate(texts)))


def _compare_texts(texts, speech):
    """WER by format, and how often its transcript equals the model's."""
    scores = {name: _score(found, speech) for name, found in texts.items()}
    return {
        "utterances": len(speech.test),
        "words": scores["pytorch"]["words"],
        "wer": {name: figures["wer"] for name, figures in scores.items()},
        "same": {
            name: sum(map(str.__eq__, found, texts["pytorch"]))
            for name, found in texts.items()
            if name != "pytorch"
        },
    }
