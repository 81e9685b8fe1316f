"""Other forms of an exported model, tried on the test set of its run."""

import shutil
import time

import torch
from speechbrain.decoders.ctc import ctc_greedy_decode
from tqdm import tqdm

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

# Utterances of a padded batch
BATCH = 8
# Of int8 against single precision: points of WER that it may cost, and part of
# the time that it may take. A gain of a few percent is within what times vary.
MOST_LOSS = 0.2
MOST_TIME = 0.95


def add_onnx(to, model, tokenizer, config, speech, int8):
    """Write ONNX graphs into an export, and compare them with the model.

    Arguments
    ---------
    to : pathlib.Path
        The export.
    model : AcousticModel
        In evaluation mode, on the CPU.
    tokenizer : sentencepiece.SentencePieceProcessor
        Its symbols.
    config : dict
        What is known of the export.
    speech : Speech or None
        What the graphs are tried on; noise alone if None.
    int8 : bool
        Whether a quantised graph is written too.

    Returns
    -------
    known : dict
        What ``config.json`` shall say of them.
    said : list of str
        Transcripts of the test set by the model itself.

    Raises
    ------
    ValueError
        If the network cannot be written, or a graph differs from it.
    """
    (to / ONNX).parent.mkdir()
    about = {name: config[name] for name in runner.ABOUT}
    written = write_onnx(model, to / ONNX, about)
    shutil.copyfile(runner.__file__, to / SCRIPT)
    known = {
        "model": ONNX,
        "max_difference": None,
        "checked_on": None,
        "int8": None,
        "scores": {},
    }
    if speech is None:
        return known, []
    blank, differences = config["blank_index"], []
    texts = {"pytorch": [], "onnx": []}
    starts = range(0, len(speech.test), BATCH)
    for start in tqdm(starts, desc="onnx", unit="batch", disable=None):
        wavs = [one.read() for one in speech.test[start : start + BATCH]]
        batch = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
        lengths = torch.tensor([len(wav) for wav in wavs])
        difference, *both = compare(model, written, batch, lengths)
        differences.append(difference)
        for form, rows in zip(texts, both, strict=True):
            texts[form] += [_greedy(row, tokenizer, blank) for row in rows]
    known["max_difference"] = max(differences)
    known["checked_on"] = {
        "split": speech.split,
        "utterances": len(speech.test),
    }
    if int8:
        said, known["int8"] = _add_int8(to, speech, texts["onnx"])
        if said is not None:
            texts["int8"] = said
    known["scores"] = {speech.split: _score_forms(texts, speech)}
    return known, texts["pytorch"]


def _add_int8(to, speech, said):
    """Write the quantised graph, if it is of use.

    Returns its transcripts of the test set, None if there is no such graph, and
    what ``config.json`` shall say of it.
    """
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
        texts = [
            models[1].transcribe(wav)
            for wav in tqdm(wavs, desc="int8", unit="utterance", disable=None)
        ]
        loss = _error_rate(texts, speech) - _error_rate(said, speech)
        if loss > MOST_LOSS:
            raise NoInt8Error(
                f"its WER on {speech.split} would be {loss:.2f} points higher"
            )
    except NoInt8Error as error:
        small.unlink(missing_ok=True)
        return None, {"model": None, "reason": str(error)}
    sizes = [(to / name).stat().st_size for name in (INT8, ONNX)]
    return texts, {
        "model": INT8,
        "size_ratio": sizes[0] / sizes[1],
        "time_ratio": ratio,
    }


def time_ratio(first, second, wavs, turns=5):
    """Compare the speed of two models on one thread.

    Arguments
    ---------
    first, second : OnnxModel
        The models, of one thread each.
    wavs : list of numpy.ndarray
        Utterances, ``(samples,)`` each, which both transcribe in turns.
    turns : int
        Of which the fastest counts.

    Returns
    -------
    float
        Processor time of the second over that of the first.
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


def add_sherpa(to, model, tokenizer, config, speech, said=None):
    """Write what sherpa-onnx loads into an export, and try it.

    Arguments
    ---------
    to : pathlib.Path
        The export.
    model : AcousticModel
        In evaluation mode, on the CPU.
    tokenizer : sentencepiece.SentencePieceProcessor
        Its symbols.
    config : dict
        What is known of the export.
    speech : Speech
        What it is tried on.
    said : list of str, optional
        Transcripts of the test set by the model itself, where they are known.

    Returns
    -------
    dict
        What ``config.json`` shall say of it.

    Raises
    ------
    ValueError
        If sherpa-onnx has no recogniser for such a model.
    """
    (to / SHERPA).parent.mkdir()
    blank = config["blank_index"]
    constructor = write_sherpa(model, to / SHERPA)
    write_tokens(to / TOKENS, config["symbols"], blank)
    forms = {"sherpa": load_sherpa(constructor, to / SHERPA, to / TOKENS)}
    if not said:
        forms["pytorch"] = transcriber(model, tokenizer, blank)
    texts = {"pytorch": said, **{form: [] for form in forms}}
    for one in tqdm(speech.test, desc="sherpa", unit="utterance", disable=None):
        wav = one.read().numpy()
        for form, transcribe in forms.items():
            texts[form].append(transcribe(wav))
    return {
        "model": SHERPA,
        "tokens": TOKENS,
        "recognizer": constructor,
        "scores": {speech.split: _score_forms(texts, speech)},
    }


def transcriber(model, tokenizer, blank):
    """Make a function from a model, as the other forms are.

    Arguments
    ---------
    model : AcousticModel
        In evaluation mode, on the CPU.
    tokenizer : sentencepiece.SentencePieceProcessor
        Its symbols.
    blank : int
        Index of the CTC blank.

    Returns
    -------
    callable
        From a waveform, a NumPy array of shape ``(samples,)``, to its
        transcript.
    """

    @torch.no_grad()
    def transcribe(wav):
        wavs = torch.from_numpy(wav).unsqueeze(0)
        return _greedy(model(wavs, torch.ones(1)).logits[0], tokenizer, blank)

    return transcribe


def _greedy(scores, tokenizer, blank):
    ids = ctc_greedy_decode(scores.unsqueeze(0), torch.ones(1), blank)[0]
    return " ".join(tokenizer.decode(ids).split())


def _error_rate(texts, speech):
    """Word error rate of transcripts of the test set (%)."""
    references = dict(enumerate(one.text for one in speech.test))
    return score(references, dict(enumerate(texts)))["wer"]


def _score_forms(texts, speech):
    """Word error rates of each form, and how often it says the same."""
    references = dict(enumerate(one.text for one in speech.test))
    scores = {
        form: score(references, dict(enumerate(said)))
        for form, said in texts.items()
    }
    return {
        "utterances": len(references),
        "words": scores["pytorch"]["words"],
        "wer": {form: figures["wer"] for form, figures in scores.items()},
        "same": {
            form: sum(map(str.__eq__, said, texts["pytorch"]))
            for form, said in texts.items()
            if form != "pytorch"
        },
    }
