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
from tutornet_sb.networks.weights import fill_weights
from tutornet_sb.util.errors import InputError, MissingFileError, first_line

HYPERPARAMS = "hyperparams.yaml"
# Lengths of noise (samples) by which a frame period is measured. They differ by
# a multiple of the strides in use, 5, 10, 20, 30, 40 and 80 ms at 8 or 16 kHz.
PROBE_SAMPLES = (16000, 54400)


class PipelineEncoder(torch.nn.Module):
    """The pipeline of an ``EncoderASR`` up to its CTC head.

    SpeechBrain's pipelines go from waveform to log-probabilities at once. The
    hidden representation is the input of the last linear layer from which the
    output follows by a softmax. It is found by a trial on noise, which also
    measures the frame period. Padding would change the output, since
    SpeechBrain's containers drop the lengths.

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
        frames = []
        for samples in PROBE_SAMPLES:
            wavs = 0.1 * torch.randn(1, samples, generator=generator)
            with torch.no_grad():
                calls, output = self._run(wavs, linear)
            if output.dim() != 3:
                raise InputError(
                    "the encoder must return (batch, frames, symbols), got "
                    f"{tuple(output.shape)}"
                )
            frames.append(output.shape[1])
        self.stride = (PROBE_SAMPLES[1] - PROBE_SAMPLES[0]) / (
            frames[1] - frames[0]
        )
        wanted = torch.log_softmax(output, -1)
        for path, hidden in reversed(calls):
            found = torch.log_softmax(linear[path](hidden), -1)
            if found.shape == wanted.shape and torch.allclose(
                found, wanted, atol=1e-4
            ):
                self._head = path
                self.output_size = linear[path].in_features
                return
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

        lengths = torch.ones(len(wavs), device=wavs.device)
        with watching(self.pipeline, layers, keep):
            return calls, self.pipeline(wavs, lengths)

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
    file = folder / HYPERPARAMS
    if not file.is_file():
        raise MissingFileError(f"{folder} has no {HYPERPARAMS}")
    try:
        with open(file, encoding="utf-8") as text:
            hparams = load_hyperpyyaml(text)
    # It can raise anything.
    except Exception as error:
        raise InputError(
            f"{file} cannot be loaded ({type(error).__name__}: "
            f"{first_line(error)})"
        ) from None
    for key in ("modules", "pretrainer", "tokenizer", "decoding_function"):
        if key not in hparams:
            raise InputError(
                f"{file} has no {key!r}, so it is not that of an EncoderASR"
            )
    if "encoder" not in hparams["modules"]:
        raise InputError(f"{file}: modules has no 'encoder'")
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
        # EncoderASR's own default
        normalizer = hparams.get("audio_normalizer")
        sample_rate = getattr(normalizer, "sample_rate", 16000)
    features = Waveform(sample_rate, normalize=False)
    # Its layers may read the padding of a batch.
    model = OneByOneModel(features, encoder, encoder.head)
    blank_index = _blank_index(hparams)
    if blank_index is None:
        raise InputError(
            f"{file} names no blank: decoding_function has neither blank_id "
            "nor blank_index"
        )
    largest = max(
        pipeline.children(),
        key=lambda part: sum(p.numel() for p in part.parameters()),
    )
    name, outputs = type(largest).__name__, encoder.head.out_features
    return name, model, symbols, blank_index % outputs, decode


def _collect(pretrainer, pipeline, folder):
    """Load the files of a Pretrainer, strictly and from the folder."""
    loaded = set()
    for name, thing in pretrainer.loadables.items():
        # Paths often begin with a hub id, so without its revision.
        path = Path(str(pretrainer.paths.get(name, f"{name}.ckpt"))).name
        if (folder / path).is_file():
            pretrainer.paths[name] = str(folder / path)
        elif name not in pretrainer.paths:
            raise MissingFileError(f"{folder} has no {path}")
        if isinstance(thing, torch.nn.Module):
            loaded.update(thing.parameters())
            hook = get_default_hook(thing, DEFAULT_TRANSFER_HOOKS)
            if hook is torch_parameter_transfer:
                pretrainer.custom_hooks.setdefault(name, _load_strictly)
    left = dict(pipeline.named_parameters())
    if not loaded.issuperset(left.values()):
        from speechbrain.integrations.huggingface.huggingface import (
            HFTransformersInterface,
        )

        # From the hub, when the pipeline was made
        for layer in pipeline.modules():
            if isinstance(layer, HFTransformersInterface):
                loaded.update(layer.parameters())
    left = [name for name, p in left.items() if p not in loaded]
    if left:
        raise InputError(
            f"{folder / HYPERPARAMS}: the pretrainer does not load {len(left)} "
            f"parameters of the encoder, such as {left[0]}"
        )
    pretrainer.set_collect_in(None)
    pretrainer.collect_files()
    pretrainer.load_collected()


def _load_strictly(module, path):
    try:
        weights = torch_patched_state_dict_load(path)
    # The kinds of damage raise all kinds of errors.
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as model weights "
            f"({type(error).__name__}: {first_line(error)})"
        ) from None
    fill_weights(module, weights, path)


def _blank_index(hparams):
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
    return None
