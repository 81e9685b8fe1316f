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
from tutornet_sb.util.errors import InputError, MissingFileError
from tutornet_sb.util.redaction import first_line

# The one of several in a folder that is meant, where it is not named
ONNX_FILE = "model.onnx"


class Recogniser(NamedTuple):
    """A CTC model, whatever runs it, and what its symbols mean.

    Attributes
    ----------
    name : str
        Folder or file, or hub id with its revision.
    kind : str
        ``run``, ``export``, ``onnx``, or one of ``load_teacher``'s kinds with a
        CTC head: ``encoder_asr``, ``ctc``.
    sample_rate : int
        Sample rate that it expects (Hz).
    frame_period : float
        Distance between two frames (seconds).
    pieces : list of str
        Symbols by index.
    blank_index : int
        Index of the blank of CTC.
    decode : Callable
        From a list of symbol indices, repetitions and blanks removed, to text.
    encode : Callable
        From waveforms, ``(batch, samples)``, and their valid samples,
        ``(batch,)``, to log-probabilities, ``(batch, frames, symbols)``, and
        their valid frames, ``(batch,)``, on the CPU. What stands on padded
        frames means nothing.
    max_seconds : float
        The longest waveform that can be encoded (seconds).
    model : AcousticModel or None
        In evaluation mode, for those who need its parts. None of an ``onnx``.
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
      `trust_remote_code`, a network of other parts than those of the recipe is
      refused, since its ``model.yaml`` could run code.
    - ``export``: folder by ``tutornet export``, or hub id with one. Only
      ``config.json`` and ``model.safetensors`` are read (and downloaded); no
      code that comes with them runs.
    - ``onnx``: a file that says in its metadata what it is, as ``tutornet
      export --onnx`` writes it, or a folder with ``model.onnx`` or one other
      such file.
    - ``encoder_asr``: what SpeechBrain's ``EncoderASR`` loads, by a
      ``hyperparams.yaml``, which can run any code.
    - ``ctc``: folder or hub id of a ``Wav2Vec2ForCTC``, ``HubertForCTC`` or
      ``WavLMForCTC`` of transformers.

    Arguments
    ---------
    source : str or pathlib.Path
        Folder, file or hub id.
    revision : str, optional
        Commit, tag or branch of a hub id. Only a commit is the same model for
        ever.
    trust_remote_code : bool
        Whether a ``hyperparams.yaml`` may be loaded, or a ``model.yaml`` that
        names other parts.
    device : str
        Where it runs, ``cpu`` or ``cuda``.

    Returns
    -------
    Recogniser
        The model. It has encoded a second of noise.

    Raises
    ------
    FileNotFoundError
        If there is no such folder or file, or no hub id of this form.
    ValueError
        If it is none of these, is damaged, or does not go together.
    """
    source, path = str(source), Path(source)
    is_here = path.exists()
    if is_here and revision is not None:
        raise InputError(
            f"{source} is on this machine; a revision ({revision}) is of a "
            "hub id"
        )
    if not is_here and not sources.HUB_ID.fullmatch(source):
        raise MissingFileError(
            f"{source} is neither a folder, a file nor a hub id (owner/name)"
        )
    _check_device(device)
    name = source if revision is None else f"{source}@{revision}"
    if path.is_file():
        recogniser = _load_onnx(path, device)
    elif not is_here:
        recogniser = _load_from_hub(
            source, name, revision, trust_remote_code, device
        )
    elif (path / runs.MODEL_YAML).is_file():
        recogniser = _load_other(source, None, trust_remote_code, device)
    elif is_export(path):
        recogniser = _load_export(path, name, device)
    elif files := sorted(path.glob("*.onnx")):
        named = [file for file in files if file.name == ONNX_FILE] or files
        if len(named) > 1:
            names = ", ".join(file.name for file in files)
            raise InputError(f"{source} holds {names}: name one of the files")
        recogniser = _load_onnx(named[0], device)
    else:
        recogniser = _load_other(source, None, trust_remote_code, device)
    _try_out(recogniser)
    return recogniser


def _check_device(device):
    try:
        # Nothing but a try tells whether it is there.
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"the device {device!r} cannot be used: {first_line(error)}"
        ) from None


def _by_model(name, kind, model, device, pieces, blank_index, decode):
    """A recogniser around an AcousticModel."""
    model = model.eval().to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    @torch.no_grad()
    def encode(wavs, lengths):
        relative = (lengths / wavs.shape[1]).to(device)
        _, logits, frames = model(wavs.to(device), relative)
        return logits.float().log_softmax(dim=-1).cpu(), frames.cpu()

    # Of networks that have a table of positions
    most_frames = getattr(model.encoder, "max_length", math.inf)
    return Recogniser(
        name,
        kind,
        model.features.sample_rate,
        model.frame_period,
        pieces,
        blank_index,
        decode,
        encode,
        most_frames * model.frame_period,
        model,
    )


def _by_source(source, device):
    if source.pieces is None:
        raise InputError(
            f"{source.source} has no CTC head and cannot transcribe"
        )
    return _by_model(
        source.source,
        source.kind,
        source.model,
        device,
        source.pieces,
        source.blank_index,
        source.decode,
    )


def _load_from_hub(source, name, revision, trust_remote_code, device):
    folder = sources.download(source, revision, [CONFIG])
    if not is_export(folder):
        return _load_other(source, revision, trust_remote_code, device)
    # That folder is named after the commit: the weights must be of the same.
    commit = Path(folder).name
    folder = sources.download(source, commit, [CONFIG, SAFETENSORS])
    return _load_export(Path(folder), name, device)


def _load_export(folder, name, device):
    model, pieces, blank_index = load_export(folder, name)
    return _by_model(
        name, "export", model, device, pieces, blank_index, decoder(pieces)
    )


def _load_other(source, revision, trust_remote_code, device):
    """What teachers are made of too."""
    teacher = sources.load_teacher(
        source, revision, trust_remote_code=trust_remote_code
    )
    return _by_source(teacher, device)


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
    model = OnnxModel(path, torch.get_num_threads(), provider)
    session, told = model.session, model.about
    check_symbols(told, path)
    period = told.get("frame_period")
    if not isinstance(period, int | float) or not 0 < period < 10:
        raise InputError(
            f"{path} is damaged: 'frame_period' is {str(period)[:80]}"
        )
    inputs = {value.name for value in session.get_inputs()}
    outputs = {value.name for value in session.get_outputs()}
    if inputs != {"wavs", "lengths"} or not {"log_probs", "frames"} <= outputs:
        raise InputError(
            f"{path} must have the inputs wavs and lengths and the outputs "
            f"log_probs and frames; it has {', '.join(sorted(inputs))} and "
            + ", ".join(sorted(outputs))
        )

    def encode(wavs, lengths):
        try:
            found = model.encode(wavs.float().numpy(), lengths.numpy())
        except Exception as error:
            raise InputError(
                f"{path} cannot be run: {first_line(error)}"
            ) from None
        log_probs, frames = map(torch.from_numpy, found)
        return log_probs, frames

    return Recogniser(
        str(path),
        "onnx",
        told["sample_rate"],
        float(period),
        told["symbols"],
        told["blank_index"],
        decoder(told["symbols"]),
        encode,
    )


def _try_out(recogniser):
    """Refuse a model whose parts do not go together."""
    generator = torch.Generator().manual_seed(0)
    wavs = 0.1 * torch.randn(1, recogniser.sample_rate, generator=generator)
    try:
        log_probs, frames = recogniser.encode(
            wavs, torch.tensor([wavs.shape[1]])
        )
    except (RuntimeError, ValueError, IndexError) as error:
        raise InputError(
            f"{recogniser.name} cannot encode a second of noise: "
            + first_line(error)
        ) from None
    symbols = len(recogniser.pieces)
    if log_probs.ndim != 3 or log_probs.shape[::2] != (1, symbols):
        raise InputError(
            f"{recogniser.name} gives {tuple(log_probs.shape)} for its "
            f"{symbols} symbols; (batch, frames, symbols) is needed"
        )
    if frames.shape != (1,) or not 0 <= frames[0] <= log_probs.shape[1]:
        raise InputError(
            f"{recogniser.name} gives {frames.tolist()} for the valid ones of "
            f"its {log_probs.shape[1]} frames"
        )
    if not log_probs[:, : frames[0]].isfinite().all():
        raise InputError(
            f"the output of {recogniser.name} is not finite: are its weights "
            "sound?"
        )
