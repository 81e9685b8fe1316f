"""Load a model of any kind for inference, code-free where it is published."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from tutornet_sb.corpora.tokenizer import decoder
from tutornet_sb.networks import runs
from tutornet_sb.networks.acoustic_model import AcousticModel
from tutornet_sb.networks.export_folder import (
    CONFIG,
    SAFETENSORS,
    check_symbols,
    is_export,
    load_export,
)
from tutornet_sb.teachers import sources
from tutornet_sb.util.errors import InputError, MissingFileError, first_line

# The one of several in a folder that is meant, where it is not named
ONNX_FILE = "model.onnx"


class Recogniser(NamedTuple):
    """A CTC model, whatever runs it, and what its symbols mean.

    ``kind`` is one of those of :func:`load_recogniser`, ``decode`` makes text
    of a list of symbol indices, repetitions and blanks removed, and ``encode``,
    of waveforms ``(batch, samples)`` and their valid samples ``(batch,)``,
    log-probabilities ``(batch, frames, symbols)`` and their valid frames
    ``(batch,)``, on the CPU, up to ``max_seconds`` long. The model is in
    evaluation mode, and None for ``onnx``.
    """

    name: str
    kind: str
    sample_rate: int
    frame_period: float
    pieces: list[str]
    blank_index: int
    decode: Callable[[list[int]], str]
    encode: Callable
    max_seconds: float = math.inf
    model: AcousticModel | None = None


def load_recogniser(
    source, revision=None, trust_remote_code=False, device="cpu"
):
    """Load a model for inference.

    - ``run``: folder of a finished run of ``train.py``. Without
      `trust_remote_code`, networks of other parts than the recipe's are
      refused, since their ``model.yaml`` could run code.
    - ``export``: folder by ``tutornet export``, or hub id with one. Only
      ``config.json`` and ``model.safetensors`` are read (and downloaded); none
      of its code is run.
    - ``onnx``: a file by ``tutornet export --onnx``, or a folder with
      ``model.onnx`` or one other such file.
    - ``encoder_asr``: what SpeechBrain's ``EncoderASR`` loads, by a
      ``hyperparams.yaml``, which can run any code.
    - ``ctc``: folder or hub id of a ``Wav2Vec2ForCTC``, ``HubertForCTC`` or
      ``WavLMForCTC`` of transformers.

    A ``revision`` is a commit, tag or branch of a hub id. Returns a Recogniser
    that has encoded a second of noise; raises an InputError if the model is
    missing, none of these or damaged, or its parts do not fit.
    """
    source, path = str(source), Path(source)
    is_local = path.exists()
    if is_local and revision is not None:
        raise InputError(
            f"{source} is on this machine; a revision ({revision}) is of a "
            "hub id"
        )
    if not is_local and not sources.HUB_ID.fullmatch(source):
        raise MissingFileError(
            f"{source} is neither a folder, a file nor a hub id (owner/name)"
        )
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"the device {device!r} cannot be used: {first_line(error)}"
        ) from None
    name = source if revision is None else f"{source}@{revision}"
    if not is_local:
        folder = Path(sources.download(source, revision, [CONFIG]))
        if is_export(folder):
            # The folder is named after the commit: weights must be of the same.
            files = [CONFIG, SAFETENSORS]
            path = Path(sources.download(source, folder.name, files))
    is_run = (path / runs.MODEL_YAML).is_file()
    if path.is_file():
        recogniser = _load_onnx(path, device)
    elif not is_run and is_export(path):
        model, *symbols = load_export(path, name)
        recogniser = _by_model(
            name, "export", model, device, *symbols, decoder(symbols[0])
        )
    elif not is_run and (file := _find_onnx(path)):
        recogniser = _load_onnx(file, device)
    else:
        teacher = sources.load_teacher(
            source, revision, trust_remote_code=trust_remote_code
        )
        if teacher.pieces is None:
            raise InputError(
                f"{teacher.source} has no CTC head and cannot transcribe"
            )
        symbols = teacher.pieces, teacher.blank_index, teacher.decode
        recogniser = _by_model(
            teacher.source, teacher.kind, teacher.model, device, *symbols
        )
    _try_out(recogniser)
    return recogniser


def _find_onnx(folder):
    """The ONNX file of a folder, None if it has none."""
    files = sorted(folder.glob("*.onnx"))
    named = [file for file in files if file.name == ONNX_FILE] or files
    if len(named) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(f"{folder} holds {names}: name one of the files")
    return named[0] if named else None


def _by_model(name, kind, model, device, pieces, blank_index, decode):
    """A recogniser around an AcousticModel."""
    model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def encode(wavs, lengths):
        relative = (lengths / wavs.shape[1]).to(device)
        _, logits, frames = model(wavs.to(device), relative)
        return logits.float().log_softmax(dim=-1).cpu(), frames.cpu()

    rate, period = model.features.sample_rate, model.frame_period
    # Of networks that have a table of positions
    longest = period * getattr(model.encoder, "max_length", math.inf)
    symbols = pieces, blank_index, decode
    return Recogniser(
        name, kind, rate, period, *symbols, encode, longest, model
    )


def _load_onnx(path, device):
    # A second to import
    import onnxruntime

    from tutornet_sb.inference.runner import OnnxModel

    provider = "CPUExecutionProvider"
    if torch.device(device).type != "cpu":
        provider = "CUDAExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise InputError(
                f"onnxruntime has no {provider} here: install onnxruntime-gpu, "
                "or use --device cpu"
            )
    try:
        model = OnnxModel(path, torch.get_num_threads(), provider)
    # The runner does not import this package.
    except ValueError as error:
        raise InputError(str(error)) from None
    about = model.about
    check_symbols(about, path)
    period = about["frame_period"]
    if not isinstance(period, int | float) or not 0 < period < 10:
        raise InputError(
            f"{path} is damaged: 'frame_period' is {str(period)[:80]}"
        )
    session = model.session
    inputs = sorted(value.name for value in session.get_inputs())
    outputs = {value.name for value in session.get_outputs()}
    if inputs != ["lengths", "wavs"] or not {"log_probs", "frames"} <= outputs:
        raise InputError(
            f"{path} must have the inputs wavs and lengths and the outputs "
            f"log_probs and frames, got {inputs} and {sorted(outputs)}"
        )

    def encode(wavs, lengths):
        try:
            found = model.encode(wavs.float().numpy(), lengths.numpy())
        # onnxruntime has its own classes.
        except Exception as error:
            raise InputError(
                f"{path} cannot be run: {first_line(error)}"
            ) from None
        return tuple(map(torch.from_numpy, found))

    symbols = model.symbols, model.blank_index, decoder(model.symbols)
    return Recogniser(
        str(path), "onnx", model.sample_rate, float(period), *symbols, encode
    )


def _try_out(recogniser):
    """Refuse a model whose parts do not fit each other."""
    generator = torch.Generator().manual_seed(0)
    wavs = 0.1 * torch.randn(1, recogniser.sample_rate, generator=generator)
    lengths = torch.tensor([wavs.shape[1]])
    try:
        log_probs, frames = recogniser.encode(wavs, lengths)
    except (RuntimeError, ValueError, IndexError) as error:
        raise InputError(
            f"{recogniser.name} cannot encode a second of noise: "
            + first_line(error)
        ) from None
    name, symbols = recogniser.name, len(recogniser.pieces)
    if log_probs.ndim != 3 or log_probs.shape[::2] != (1, symbols):
        raise InputError(
            f"{name}: output must be (batch, frames, symbols) for its "
            f"{symbols} symbols, got {tuple(log_probs.shape)}"
        )
    if frames.shape != (1,) or not 0 <= frames[0] <= log_probs.shape[1]:
        raise InputError(
            f"{name}: valid frames must be among its {log_probs.shape[1]} "
            f"frames, got {frames.tolist()}"
        )
    if not log_probs[:, : frames[0]].isfinite().all():
        raise InputError(
            f"the output of {name} is not finite: are its weights sound?"
        )
