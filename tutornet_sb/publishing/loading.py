"""Load a model of any kind for inference, code-free where it is published."""

import functools
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch.nn.modules import module as registration

from tutornet_sb import runs
from tutornet_sb.distillation import sources
from tutornet_sb.distillation.teacher import (
    fill_weights,
    refuse_other_weights,
)
from tutornet_sb.networks.acoustic_model import AcousticModel
from tutornet_sb.publishing.export import (
    CONFIG,
    FORMAT,
    HYPERPARAMS,
    SAFETENSORS,
)
from tutornet_sb.reporting.latency import split_words

# The one of several in a folder that is meant, where it is not named
ONNX_FILE = "model.onnx"
# In an ONNX file's metadata: the key, and what it says there
# A vocabulary of 65536 symbols takes a megabyte.
_MOST_BYTES = 4 * 2**20
# What a description may name. All of it makes a layer from sizes and options
# and reads or writes nothing; see _check_arguments for the rest.
ALLOWED = frozenset(
    f"{module}.{name}"
    for module, names in {
        "tutornet_sb.networks.acoustic_model": (
            "AcousticModel LogMelFeatures SpectrogramFeatures"
        ),
        "tutornet_sb.networks.deepspeech2": "DeepSpeech2Encoder",
        "tutornet_sb.networks.huggingface": (
            "Waveform WhisperFeatures Wav2Vec2Encoder WhisperEncoder "
            "make_network"
        ),
        "tutornet_sb.networks.jasper": "JasperEncoder",
        "tutornet_sb.networks.lobes": "CRDNNEncoder ContextNetEncoder",
        "tutornet_sb.networks.recurrent": "RecurrentEncoder",
        "tutornet_sb.networks.transformer": "TransformerEncoder",
        "speechbrain.lobes.models.CRDNN": "CRDNN",
        "speechbrain.lobes.models.ContextNet": "ContextNet",
        "speechbrain.lobes.models.convolution": "ConvolutionFrontEnd",
        "speechbrain.lobes.models.transformer.TransformerASR": "TransformerASR",
        "speechbrain.nnet.RNN": "LSTM GRU RNN",
        "speechbrain.nnet.activations": "Swish",
        "torch.nn": (
            "Linear Sequential Identity Dropout LayerNorm BatchNorm1d Conv1d "
            "ReLU LeakyReLU GELU SiLU Tanh"
        ),
    }.items()
    for name in names.split()
)
MAKE_NETWORK = "tutornet_sb.networks.huggingface.make_network"
# Sizes above these are no speech recogniser's, and features, which have no
# weights to compare them to, would fill the memory.
_MOST = 2**16
_LIMITS = {
    "sample_rate": 768_000,
    "n_mels": 1024,
    "n_bins": 2**14,
    "win_length": 1000,
    "hop_length": 1000,
    "window": 120,
}


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

    - ``run``: folder of a finished run of ``train.py``. Its ``model.yaml`` can
      run code: it should be your own.
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
        Whether a ``hyperparams.yaml`` may be loaded.
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
        raise ValueError(
            f"{source} is on this machine; a revision ({revision}) is of a "
            "hub id"
        )
    if not is_here and not sources.HUB_ID.fullmatch(source):
        raise FileNotFoundError(
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
        recogniser = _load_run(path, device)
    elif _says_export(path):
        recogniser = _load_export(path, name, device)
    elif files := sorted(path.glob("*.onnx")):
        named = [file for file in files if file.name == ONNX_FILE] or files
        if len(named) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{source} holds {names}: name one of the files")
        recogniser = _load_onnx(named[0], device)
    else:
        recogniser = _load_other(source, None, trust_remote_code, device)
    _try_out(recogniser)
    return recogniser


def read_config(folder):
    """Read and check ``config.json`` of an export.

    Arguments
    ---------
    folder : str or pathlib.Path
        A folder by ``tutornet export``, somebody else's maybe.

    Returns
    -------
    dict
        What it holds. ``symbols``, ``blank_index``, ``sample_rate`` and
        ``student`` are there and of their types.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it is too large, damaged or of another format.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}")
    config = _parse(_read(path), path)
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{path} is of format {config.get('format')!r}, and this version "
            f"reads {FORMAT!r}: export the run again"
        )
    _check_symbols(config, path)
    if not isinstance(config.get("student"), dict):
        raise ValueError(f"{path} is damaged: it describes no 'student'")
    return config


def rebuild(description, weights=None):
    """Make the network of a description, and nothing else.

    A description is what ``export.describe`` gives: plain data that names
    layers. Only names of ``ALLOWED`` are looked up.

    It is made twice. The first time it takes no memory, and stops when it has
    far more parts than the weights that are there for it; the second time it
    is known to fit them.

    Arguments
    ---------
    description : dict
        From ``config.json``.
    weights : dict, optional
        The shapes of the weights by name, as tensors on the device ``meta``.

    Returns
    -------
    torch.nn.Module
        With random weights.

    Raises
    ------
    ValueError
        If the description names what is not allowed or cannot be built, or
        builds a network with other weights.

    Example
    -------
    >>> layer = {"!new": "torch.nn.Linear"}
    >>> layer["arguments"] = {"in_features": 2, "out_features": 3}
    >>> rebuild(layer)
    Linear(in_features=2, out_features=3, bias=True)
    >>> rebuild({"!apply": "os.system", "arguments": ["ls"]})
    Traceback (most recent call last):
    ...
    ValueError: the description names os.system, which is not among the parts \
of a network that may be loaded
    """
    try:
        if weights is not None:
            with _Budget(weights), torch.device("meta"), _LiteralsStay():
                planned = _make_network(description)
            refuse_other_weights(planned.state_dict(), weights, SAFETENSORS)
        return _make_network(description)
    except RecursionError:
        raise ValueError("the description is nested too deeply") from None


class _LiteralsStay(torch.overrides.TorchFunctionMode):
    """Keep the values of tensors that are written out, such as shapes."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


class _Budget:
    """Stop the making of modules beyond what some weights could fill.

    Layers may be made and dropped again, hence the generous factors.
    """

    def __init__(self, weights):
        sizes = [tensor.numel() for tensor in weights.values()]
        self._elements = 4 * sum(sizes) + 10**7
        self._parts = 50 * len(sizes) + 1000

    def __enter__(self):
        self._handles = [
            registration.register_module_parameter_registration_hook(self._use),
            registration.register_module_buffer_registration_hook(self._use),
            registration.register_module_module_registration_hook(self._use),
        ]

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()

    def _use(self, module, name, part):
        self._parts -= 1
        if isinstance(part, torch.Tensor):
            self._elements -= part.numel()
        if self._parts < 0 or self._elements < 0:
            raise ValueError(
                "the description is of a far larger network than the weights"
            )


def _make_network(description):
    network = _make(description)
    if not isinstance(network, torch.nn.Module):
        raise ValueError("the description is not one of a network")
    return network


def _make(node):
    if isinstance(node, list):
        return [_make(value) for value in node]
    if isinstance(node, float | int) and not abs(node) <= _MOST:
        raise ValueError(f"the description holds a number of {node:g}")
    if not isinstance(node, dict):
        return node
    tag = next((key for key in node if key.startswith("!")), None)
    if tag is None:
        return {key: _make_value(key, node[key]) for key in node}
    name, arguments = node[tag], node.get("arguments", {})
    if (
        tag not in ("!new", "!name", "!apply")
        or node.keys() - {tag, "arguments"}
        or not isinstance(arguments, dict | list)
    ):
        raise ValueError(f"the description has an odd part: {str(node)[:80]}")
    if not isinstance(name, str) or name not in ALLOWED:
        raise ValueError(
            f"the description names {str(name)[:80]}, which is not among the "
            "parts of a network that may be loaded"
        )
    if name == MAKE_NETWORK:
        _check_network(arguments)
    module, _, attribute = name.rpartition(".")
    called = getattr(importlib.import_module(module), attribute)
    arguments = _make(arguments)
    if isinstance(arguments, list):
        called = functools.partial(called, *arguments)
    else:
        called = functools.partial(called, **arguments)
    if tag == "!name":
        return called
    try:
        return called()
    # Of arguments that somebody made up, all kinds of errors
    except Exception as error:
        raise ValueError(
            f"{name} cannot be built as described: {_first_line(error)}"
        ) from None


def _make_value(key, value):
    if key == "input_shape" and isinstance(value, list):
        # A network is run on such a batch to infer shapes.
        sizes = [size for size in value if size is not None]
        if not all(isinstance(size, int) for size in sizes) or (
            math.prod(sizes) > _MOST
        ):
            raise ValueError(f"the description has an {key} of {value}")
    limit = _LIMITS.get(key)
    if limit is None:
        return _make(value)
    if not isinstance(value, int | float) or not 0 < value <= limit:
        raise ValueError(
            f"the description has a {key} of {str(value)[:80]}; it must be "
            f"above 0 and at most {limit}"
        )
    return value


def _check_network(arguments):
    """Refuse what makes transformers read files, or load code."""
    from tutornet_sb.networks.huggingface import ARCHITECTURE

    known = {"model_type", "layerdrop", *ARCHITECTURE}
    for key in arguments:
        if key in ("source", "revision"):
            if arguments[key] is not None and key == "source":
                raise ValueError(
                    "the description takes published weights from "
                    f"{str(arguments[key])[:80]}; a model must bring its own"
                )
        elif key not in known and not key.endswith("dropout"):
            if not key.startswith(("mask_time", "mask_feature")):
                raise ValueError(
                    f"the description gives {MAKE_NETWORK} the value "
                    f"{str(key)[:80]}, which may not be loaded"
                )


def _first_line(error):
    from tutornet_sb.networks.huggingface import first_line

    return first_line(error)


def _says_export(folder):
    """Tell whether a folder has the config.json of an export, of any version.

    Damage is left to the loader that reads the file again.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        return False
    text = _read(path)
    try:
        return str(_parse(text, path).get("format")).startswith(
            FORMAT.rpartition(" ")[0]
        )
    except ValueError:
        return False


def _read(path):
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(
            f"{path} has {size} bytes, more than the {_MOST_BYTES} that a "
            "description may take: it is not read"
        )
    return path.read_bytes()


def _parse(text, path):
    """Read JSON by somebody else, an object."""
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {_first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return content


def _refuse_constant(name):
    raise ValueError(f"{name} is no number")


def _check_symbols(content, path):
    symbols, blank = content.get("symbols"), content.get("blank_index")
    if not isinstance(symbols, list) or not all(
        isinstance(symbol, str) for symbol in symbols
    ):
        raise ValueError(f"{path} is damaged: 'symbols' is no list of texts")
    if type(blank) is not int or not 0 <= blank < len(symbols):
        raise ValueError(
            f"{path} is damaged: 'blank_index' {str(blank)[:80]} is none of "
            f"its {len(symbols)} symbols"
        )
    rate = content.get("sample_rate")
    if type(rate) is not int or not 0 < rate <= _LIMITS["sample_rate"]:
        raise ValueError(
            f"{path} is damaged: 'sample_rate' is {str(rate)[:80]}"
        )


def _check_device(device):
    try:
        # Nothing but a try tells whether it is there.
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"the device {device!r} cannot be used: {_first_line(error)}"
        ) from None


def _spell(pieces):
    """Decode by the symbols alone, for want of a tokenizer."""

    def decode(ids):
        return " ".join(word for word, _, _ in split_words(ids, pieces))

    return decode


def _by_model(
    name, kind, model, device, pieces, blank_index, decode, is_exact=True
):
    """A recogniser around an AcousticModel."""
    model = model.eval().to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    @torch.no_grad()
    def encode(wavs, lengths):
        if not is_exact and len(set(lengths.tolist())) > 1:
            # Its layers would read the padding.
            parts = [
                encode(wav[:n].unsqueeze(0), n.unsqueeze(0))
                for wav, n in zip(wavs, lengths, strict=True)
            ]
            rows = [log_probs[0] for log_probs, _ in parts]
            padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            return padded, torch.cat([frames for _, frames in parts])
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


def _load_run(folder, device):
    source = sources.load_teacher(folder, kind="run")
    return _by_source(source, device)


def _by_source(source, device):
    if source.pieces is None:
        raise ValueError(f"{source.name} has no CTC head and cannot transcribe")
    return _by_model(
        source.name,
        source.kind,
        source.model,
        device,
        source.pieces,
        source.blank_index,
        source.decode,
        # SpeechBrain's pipelines may or may not read the padding.
        is_exact=source.kind != "encoder_asr",
    )


def _load_from_hub(source, name, revision, trust_remote_code, device):
    folder = sources.download(source, revision, [CONFIG])
    if not _says_export(folder):
        return _load_other(source, revision, trust_remote_code, device)
    # That folder is named after the commit: the weights must be of the same.
    commit = Path(folder).name
    folder = sources.download(source, commit, [CONFIG, SAFETENSORS])
    return _load_export(Path(folder), name, device)


def _load_other(source, revision, trust_remote_code, device):
    """What teachers are made of too."""
    kind = sources.recognise(source, revision)
    if kind == "encoder_asr" and not trust_remote_code:
        raise ValueError(
            f"{source} is described by a {HYPERPARAMS}, which can run any code "
            "on this machine: read it, then allow it by --trust-remote-code, "
            "and from the hub best with a --revision"
        )
    teacher = sources.load_teacher(source, revision, kind, trust_remote_code)
    return _by_source(teacher, device)


def _load_export(folder, name, device):
    config = read_config(folder)
    path = folder / SAFETENSORS
    if not path.is_file():
        raise FileNotFoundError(f"{name} has no {SAFETENSORS}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            shapes = {
                key: torch.empty(file.get_slice(key).get_shape(), device="meta")
                for key in file.keys()  # noqa: SIM118 (no mapping)
            }
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors: {_first_line(error)}"
        ) from None
    try:
        model = rebuild(config["student"], shapes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not isinstance(model, AcousticModel):
        raise ValueError(f"{name}: the description is not an AcousticModel's")
    fill_weights(model, safetensors.torch.load_file(path), path)
    if model.features.sample_rate != config["sample_rate"]:
        raise ValueError(
            f"{name} says that it hears {config['sample_rate']} Hz, and its "
            f"features are made for {model.features.sample_rate} Hz"
        )
    symbols = config["symbols"]
    return _by_model(
        name,
        "export",
        model,
        device,
        symbols,
        config["blank_index"],
        _spell(symbols),
    )


def _load_onnx(path, device):
    # A second to import
    import onnxruntime

    from tutornet_sb.publishing.runner import OnnxModel

    provider = "CPUExecutionProvider"
    if torch.device(device).type != "cpu":
        provider = "CUDAExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise ValueError(
                f"onnxruntime has no {provider} here: install onnxruntime-gpu, "
                "or use --device cpu"
            )
    model = OnnxModel(path, torch.get_num_threads(), provider)
    session, told = model.session, model.about
    _check_symbols(told, path)
    period = told.get("frame_period")
    if not isinstance(period, int | float) or not 0 < period < 10:
        raise ValueError(
            f"{path} is damaged: 'frame_period' is {str(period)[:80]}"
        )
    inputs = {value.name for value in session.get_inputs()}
    outputs = {value.name for value in session.get_outputs()}
    if inputs != {"wavs", "lengths"} or not {"log_probs", "frames"} <= outputs:
        raise ValueError(
            f"{path} must have the inputs wavs and lengths and the outputs "
            f"log_probs and frames; it has {', '.join(sorted(inputs))} and "
            + ", ".join(sorted(outputs))
        )

    def encode(wavs, lengths):
        try:
            found = model.encode(wavs.float().numpy(), lengths.numpy())
        except Exception as error:
            raise ValueError(
                f"{path} cannot be run: {_first_line(error)}"
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
        _spell(told["symbols"]),
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
        raise ValueError(
            f"{recogniser.name} cannot encode a second of noise: "
            + _first_line(error)
        ) from None
    symbols = len(recogniser.pieces)
    if log_probs.ndim != 3 or log_probs.shape[::2] != (1, symbols):
        raise ValueError(
            f"{recogniser.name} gives {tuple(log_probs.shape)} for its "
            f"{symbols} symbols; (batch, frames, symbols) is needed"
        )
    if frames.shape != (1,) or not 0 <= frames[0] <= log_probs.shape[1]:
        raise ValueError(
            f"{recogniser.name} gives {frames.tolist()} for the valid ones of "
            f"its {log_probs.shape[1]} frames"
        )
    if not log_probs[:, : frames[0]].isfinite().all():
        raise ValueError(
            f"the output of {recogniser.name} is not finite: are its weights "
            "sound?"
        )
