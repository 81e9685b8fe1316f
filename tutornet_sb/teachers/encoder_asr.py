"""Teachers that SpeechBrain's ``EncoderASR`` loads: pipelines with CTC."""

import functools
import inspect
from pathlib import Path

import sentencepiece
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.encoder import CTCTextEncoder
from speechbrain.utils.checkpoints import (
    DEFAULT_TRANSFER_HOOKS,
    get_default_hook,
    torch_parameter_transfer,
    torch_patched_state_dict_load,
)

from tutornet_sb.corpora.tokenizer import pieces
from tutornet_sb.distillation.taps import watching
from tutornet_sb.networks.acoustic_model import OneByOneModel
from tutornet_sb.util.errors import InputError, MissingFileError, first_line

HYPERPARAMS = "hyperparams.yaml"
# Lengths of noise (samples) by which a frame period is measured. They differ by
# a multiple of the strides in use, 5, 10, 20, 30, 40 and 80 ms at 8 or 16 kHz.
PROBE_SAMPLES = (16000, 54400)


class PipelineEncoder(torch.nn.Module):
    """The pipeline of an ``EncoderASR`` up to its CTC head.

    SpeechBrain's pipelines go from waveform to log-probabilities at once. The
    hidden representation is the input of the last linear layer, found by a
    trial on noise, which also measures the frame period. Padding would change
    the output, since SpeechBrain's containers drop the lengths.

    The pipeline is called as ``(wavs, wav_lens)``, in evaluation mode.
    """

    def __init__(self, pipeline):
        super().__init__()
        self.pipeline = pipeline
        linear = {
            path: layer
            for path, layer in pipeline.named_modules()
            if isinstance(layer, torch.nn.Linear)
        }
        generator = torch.Generator().manual_seed(0)
        shapes = []
        with torch.no_grad():
            for samples in PROBE_SAMPLES:
                wavs = 0.1 * torch.randn(1, samples, generator=generator)
                calls, output = self._run(wavs, linear)
                shapes.append(tuple(output.shape))
        if any(len(shape) != 3 for shape in shapes):
            raise InputError(
                "the encoder must return (batch, frames, symbols), got "
                f"{shapes[0]}"
            )
        self.stride = (PROBE_SAMPLES[1] - PROBE_SAMPLES[0]) / (
            shapes[1][1] - shapes[0][1]
        )
        # The last layer from which the output follows by a softmax
        wanted = torch.log_softmax(output, -1)
        for path, hidden in reversed(calls):
            found = torch.log_softmax(linear[path](hidden), -1)
            if found.shape == wanted.shape and torch.allclose(
                found, wanted, atol=1e-4
            ):
                self._head = path
                self.output_size = linear[path].in_features
                break
        else:
            raise InputError(
                "the encoder has no linear layer whose softmax is its output"
            )

    @property
    def head(self):
        """The CTC head, a layer of the pipeline."""
        return self.pipeline.get_submodule(self._head)

    def _run(self, wavs, layers):
        """Inputs of some layers, in the order of calls, and the output."""
        calls = []

        def keep(path, inputs, output):
            calls.append((path, inputs[0]))

        with watching(self.pipeline, layers, keep):
            output = self.pipeline(
                wavs, torch.ones(len(wavs), device=wavs.device)
            )
        return calls, output

    def forward(self, x, lengths):
        """Encode ``(batch, samples)`` without padding.

        Returns ``(batch, frames, output_size)`` and its frames, ``(batch,)``.
        """
        calls, _ = self._run(x, [self._head])
        hidden = calls[-1][1]
        return hidden, torch.full_like(lengths, hidden.shape[1])


def load_encoder_asr(folder):
    """Load a folder; returns name, model, symbols, blank and ``decode``."""
    from tutornet_sb.networks.huggingface import Waveform

    folder = Path(folder)
    if not (folder / HYPERPARAMS).is_file():
        raise MissingFileError(f"{folder} has no {HYPERPARAMS}")
    try:
        with open(folder / HYPERPARAMS, encoding="utf-8") as file:
            hparams = load_hyperpyyaml(file)
    # It can raise anything.
    except Exception as error:
        raise InputError(
            f"{folder / HYPERPARAMS} cannot be loaded "
            f"({type(error).__name__}: {first_line(error)})"
        ) from None
    for key in ("modules", "pretrainer", "tokenizer", "decoding_function"):
        if key not in hparams:
            raise InputError(
                f"{folder / HYPERPARAMS} has no {key!r}, so it is not that of "
                "an EncoderASR"
            )
    if "encoder" not in hparams["modules"]:
        raise InputError(f"{folder / HYPERPARAMS}: modules has no 'encoder'")
    pipeline = hparams["modules"]["encoder"].eval()
    _collect(hparams["pretrainer"], pipeline, folder)

    tokenizer = hparams["tokenizer"]
    if isinstance(tokenizer, CTCTextEncoder):
        symbols = [tokenizer.ind2lab[i] for i in range(len(tokenizer))]

        def decode(ids):
            return "".join(tokenizer.decode_ndim(ids))

    elif isinstance(tokenizer, sentencepiece.SentencePieceProcessor):
        symbols, decode = pieces(tokenizer), tokenizer.decode
    else:
        raise InputError(
            f"{folder}: the tokenizer must be a SentencePieceProcessor or a "
            f"CTCTextEncoder, got {type(tokenizer).__name__}"
        )
    try:
        encoder = PipelineEncoder(pipeline)
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from None
    sample_rate = hparams.get("sample_rate")
    if sample_rate is None:
        normalizer = hparams.get("audio_normalizer")
        # EncoderASR's own default
        sample_rate = getattr(normalizer, "sample_rate", 16000)
    features = Waveform(sample_rate, normalize=False)
    # Its layers may read the padding of a batch.
    model = OneByOneModel(features, encoder, encoder.head)
    blank_index = _blank_index(hparams, folder) % encoder.head.out_features
    largest = max(
        pipeline.children(),
        key=lambda part: sum(p.numel() for p in part.parameters()),
    )
    name = type(largest).__name__
    return name, model, symbols, blank_index, decode


def _collect(pretrainer, pipeline, folder):
    """Load the files of a Pretrainer, strictly and from the folder."""
    for name in pretrainer.loadables:
        # Paths often begin with a hub id, so without its revision.
        file = Path(str(pretrainer.paths.get(name, f"{name}.ckpt"))).name
        if (folder / file).is_file():
            pretrainer.paths[name] = str(folder / file)
        elif name not in pretrainer.paths:
            raise MissingFileError(f"{folder} has no {file}")
    loaded = set()
    for name, thing in pretrainer.loadables.items():
        if isinstance(thing, torch.nn.Module):
            loaded.update(thing.parameters())
            hook = get_default_hook(thing, DEFAULT_TRANSFER_HOOKS)
            if hook is torch_parameter_transfer:
                pretrainer.custom_hooks.setdefault(name, _load_strictly)
    left = {
        name: parameter
        for name, parameter in pipeline.named_parameters()
        if parameter not in loaded
    }
    if left:
        published = _published(pipeline)
        left = [name for name, p in left.items() if p not in published]
    if left:
        raise InputError(
            f"{folder / HYPERPARAMS}: the pretrainer does not load {len(left)} "
            f"parameters of the encoder, such as {left[0]}"
        )
    pretrainer.set_collect_in(None)
    pretrainer.collect_files()
    pretrainer.load_collected()


def _published(pipeline):
    """Parameters that were loaded from the hub when the pipeline was made."""
    from speechbrain.integrations.huggingface.huggingface import (
        HFTransformersInterface,
    )

    return {
        parameter
        for layer in pipeline.modules()
        if isinstance(layer, HFTransformersInterface)
        for parameter in layer.parameters()
    }


def _load_strictly(module, path):
    try:
        weights = torch_patched_state_dict_load(path)
    # The kinds of damage raise all kinds of errors.
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as model weights "
            f"({type(error).__name__}: {first_line(error)})"
        ) from None
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        faults = " ".join(str(error).split()[:40])
        raise InputError(
            f"{path} holds the weights of another network: {faults}"
        ) from None


def _blank_index(hparams, folder):
    function = hparams["decoding_function"]
    parameters = inspect.signature(function).parameters
    options = hparams.get("test_beam_search") or {}
    for name in ("blank_id", "blank_index"):
        # A beam searcher's class has it in the options beside it.
        if name in options and not isinstance(function, functools.partial):
            return options[name]
        default = getattr(parameters.get(name), "default", inspect._empty)
        if default is not inspect._empty:
            return default
    raise InputError(
        f"{folder / HYPERPARAMS} names no blank: decoding_function has neither "
        "blank_id nor blank_index"
    )
