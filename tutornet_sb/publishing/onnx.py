"""A model as an ONNX graph from waveform to log-probabilities, also in int8."""

import copy
import json
import logging
import math
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from tutornet_sb.inference.runner import FORMAT, METADATA, OnnxModel
from tutornet_sb.networks.acoustic_model import SpectralFeatures
from tutornet_sb.util.errors import InputError, first_line

OPSET = 17
# Lengths of noise (seconds) on which a graph is compared with its model. It is
# traced on the first; what the trace took for a constant shows on the others.
TRIALS = ((0.5,), (1.0, 0.6), (2.3, 0.07, 1.1))
# Log-probabilities may differ by rounding alone (nats).
TOLERANCE = 1e-3
# In the names of nodes that make features from the waveform
_FEATURES = "/features/"
# What infinity becomes: attention scores and levels (dB) do not come near it,
# and the quantiser computes with it.
_INFINITE = 1e9
_LAYERS = "Conv", "MatMul", "Gemm"
# Layers that onnxruntime has no int8 kernel for
_WITHOUT_INT8 = "GRU", "RNN"


class NoInt8Error(InputError):
    """int8 would not make the graph faster, or cost too much accuracy."""


class ConvolutionSTFT(torch.nn.Module):
    """SpeechBrain's centred Fourier transform, as one convolution.

    ONNX has no complex numbers, and onnxruntime's own STFT is slower. Without
    ``pad``, the input holds ``before`` more samples at the beginning and
    ``after`` at the end, instead of zeros.
    """

    def __init__(self, stft, pad=True):
        super().__init__()
        self.pad = pad
        if not (stft.center and stft.onesided) or stft.normalized_stft:
            raise InputError("the STFT must be centred, onesided and plain")
        if stft.pad_mode != "constant":
            raise InputError(
                f"pad_mode must be 'constant', got {stft.pad_mode!r}"
            )
        self.hop_length = stft.hop_length
        self.bins = stft.n_fft // 2 + 1
        # torch.stft puts the window into the middle of n_fft samples.
        first = (stft.n_fft - stft.win_length) // 2
        self.before = stft.n_fft // 2 - first
        self.after = stft.win_length - self.before
        times = torch.arange(stft.win_length, dtype=torch.float64) + first
        angles = torch.arange(self.bins, dtype=torch.float64).unsqueeze(1)
        angles = 2 * math.pi / stft.n_fft * angles * times
        basis = torch.cat([angles.cos(), -angles.sin()]) * stft.window.double()
        self.register_buffer("basis", basis.float().unsqueeze(1))

    def forward(self, x):
        """From ``(batch, samples)`` to ``(batch, frames, bins, 2)``."""
        if self.pad:
            x = torch.nn.functional.pad(x, (self.before, self.after))
        y = torch.nn.functional.conv1d(
            x.unsqueeze(1), self.basis, stride=self.hop_length
        ).transpose(1, 2)
        return torch.stack([y[..., : self.bins], y[..., self.bins :]], -1)


class OnnxGraph(torch.nn.Module):
    """A copy of an ``AcousticModel``, with a softmax and lengths in samples."""

    def __init__(self, model):
        super().__init__()
        model = copy.deepcopy(model).eval()
        if isinstance(model.features, SpectralFeatures):
            replace_stft(model.features)
        self.model = model

    def forward(self, wavs, lengths):
        """Log-probabilities ``(batch, frames, symbols)``, and valid frames.

        Of waveforms ``(batch, samples)`` and their valid samples ``(batch,)``.
        """
        # In double precision a product with the samples is exact again.
        encoding = self.model(wavs, lengths.double() / wavs.shape[1])
        return encoding.logits.log_softmax(-1), encoding.lengths


def replace_stft(features, pad=True):
    """Replace the STFT of ``SpectralFeatures`` in place, and return the new."""
    owner, name = features, "stft"
    if hasattr(features, "fbank"):
        owner, name = features.fbank, "compute_STFT"
    stft = ConvolutionSTFT(getattr(owner, name), pad)
    setattr(owner, name, stft)
    return stft


def write_graph(module, inputs, path, names, axes, metadata):
    """Write a module in evaluation mode as ONNX, traced on ``inputs``.

    ``names`` are those of the inputs and of the outputs, ``axes`` the names of
    the axes that vary, by name and position.
    """
    with warnings.catch_warnings():
        # The tracer warns of each Python number, and that it is the older of
        # two exporters. The newer one (torch 2.11) cannot write LSTM layers.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                module,
                inputs,
                str(path),
                input_names=names[0],
                output_names=names[1],
                dynamic_axes=axes,
                opset_version=OPSET,
                dynamo=False,
            )
        # Of many classes, and over many lines
        except Exception as error:
            raise InputError(
                "this network cannot be written as ONNX: "
                + first_line(error)[:200]
            ) from None
    _finish(path, metadata)


def _finish(path, metadata, int8=False):
    """Make a graph finite and smaller, and add its metadata."""
    model = onnx.load(path)
    for tensor in find_constants(model.graph):
        _make_finite(tensor)
    _compute_bases(model.graph)
    if int8:
        _shrink_weights(model.graph)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


def find_constants(graph):
    """All initialisers and constants of a graph and its subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from find_constants(attribute.g)


def _make_finite(tensor):
    """Replace infinities, which stand for masked scores and for no limit."""
    array = onnx.numpy_helper.to_array(tensor)
    if array.dtype.kind == "f" and np.isinf(array).any():
        finite = np.clip(array, -_INFINITE, _INFINITE)
        tensor.CopyFrom(onnx.numpy_helper.from_array(finite, tensor.name))


def _compute_bases(graph):
    """Let graphs compute the basis of a ``ConvolutionSTFT`` when loaded.

    Stored, it would take more room than a small student in int8.
    """
    for tensor in list(graph.initializer):
        if tensor.name.rpartition(".")[2] != "basis":
            continue
        basis = onnx.numpy_helper.to_array(tensor)
        window = basis[0]
        bins, length = len(basis) // 2, window.shape[1]
        n_fft = 2 * (bins - 1)
        rows = np.tile(np.arange(bins), 2)[:, None, None]
        times = np.arange(length) + (n_fft - length) // 2
        # -sin(x) is cos(x + pi / 2).
        quarters = np.repeat([0, n_fft // 4], bins)[:, None, None]
        # Products are taken modulo n_fft as integers: of a large angle, single
        # precision would leave little.
        turns = (rows * times + quarters) % n_fft
        angle = 2 * np.pi / n_fft
        if not np.allclose(np.cos(angle * turns) * window, basis, atol=1e-5):
            # Another n_fft than a multiple of 4
            continue
        constants = {
            "rows": rows,
            "times": times,
            "quarters": quarters,
            "n_fft": np.array(n_fft),
            "angle": np.array(angle, dtype=np.float32),
            "window": window,
        }
        steps = (
            ("Mul", ("rows", "times"), "products"),
            ("Add", ("products", "quarters"), "sums"),
            ("Mod", ("sums", "n_fft"), "turns"),
            ("Cast", ("turns",), "whole"),
            ("Mul", ("whole", "angle"), "angles"),
            ("Cos", ("angles",), "waves"),
            ("Mul", ("waves", "window"), None),
        )
        _replace_constant(graph, tensor, constants, steps)


def _replace_constant(graph, tensor, constants, steps):
    """Let nodes compute a constant from others: (kind, inputs, output)."""
    name = tensor.name
    graph.initializer.remove(tensor)
    graph.initializer.extend(
        onnx.numpy_helper.from_array(value, f"{name}/{part}")
        for part, value in constants.items()
    )
    # Before the nodes that read it
    for place, (kind, inputs, output) in enumerate(steps):
        node = onnx.helper.make_node(
            kind,
            [f"{name}/{part}" for part in inputs],
            [f"{name}/{output}" if output else name],
            f"{name}/{place}",
            **({"to": onnx.TensorProto.FLOAT} if kind == "Cast" else {}),
        )
        graph.node.insert(place, node)


def write_onnx(model, path, about):
    """Write a model as an ONNX graph and compare the two on noise.

    Inputs are ``wavs`` ``(batch, samples)`` and ``lengths`` ``(batch,)`` in
    samples, outputs ``log_probs`` ``(batch, frames, symbols)`` and ``frames``
    ``(batch,)``; batch and time are free. ``about`` has the keys of
    ``runner.ABOUT``. Returns the written ``OnnxModel``.
    """
    # Traced on a batch of one, which broadcasts to any.
    wavs, lengths = _noise(model, TRIALS[0])
    write_graph(
        OnnxGraph(model),
        (wavs, lengths),
        path,
        (["wavs", "lengths"], ["log_probs", "frames"]),
        {
            "wavs": {0: "batch", 1: "samples"},
            "lengths": {0: "batch"},
            "log_probs": {0: "batch", 1: "frames"},
            "frames": {0: "batch"},
        },
        {METADATA: json.dumps({"format": FORMAT, **about})},
    )
    written = OnnxModel(path)
    for seconds in TRIALS:
        try:
            compare(model, written, *_noise(model, seconds))
        # onnxruntime has its own classes.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"this network cannot be written as ONNX: {reason}"
            ) from None
    return written


def _noise(model, seconds):
    generator = torch.Generator().manual_seed(0)
    lengths = [round(s * model.features.sample_rate) for s in seconds]
    wavs = 0.1 * torch.randn(len(lengths), max(lengths), generator=generator)
    for wav, length in zip(wavs, lengths, strict=True):
        wav[length:] = 0
    return wavs, torch.tensor(lengths)


@torch.no_grad()
def compare(model, written, wavs, lengths):
    """Compare a model and its ONNX graph on a batch with lengths in samples.

    Returns the greatest difference between log-probabilities of valid frames
    (nats), and those of the model and of the graph, ``(frames, symbols)`` each.
    Raises ``InputError`` if it exceeds ``TOLERANCE``.
    """
    encoding = model(wavs, lengths.double() / wavs.shape[1])
    log_probs, frames = written.encode(wavs.numpy(), lengths.numpy())
    if frames.tolist() != encoding.lengths.tolist():
        raise InputError(
            f"{encoding.lengths.tolist()} frames became {frames.tolist()}"
        )
    expected, found = (
        [row[:count] for row, count in zip(rows, frames, strict=True)]
        for rows in (
            encoding.logits.log_softmax(-1),
            torch.from_numpy(log_probs),
        )
    )
    difference = max(
        float((ours - theirs).abs().max())
        for ours, theirs in zip(expected, found, strict=True)
    )
    if not difference <= TOLERANCE:
        raise InputError(f"log-probabilities differ by {difference:.3g} nats")
    return difference, expected, found


class _Speech(CalibrationDataReader):
    """Utterances one by one, as the quantiser asks for them."""

    def __init__(self, wavs):
        self.inputs = (
            {"wavs": wav[None].numpy(), "lengths": np.array([len(wav)])}
            for wav in wavs
        )

    def get_next(self):
        return next(self.inputs, None)


def quantize(path, to, wavs):
    """Quantise a graph by ``write_onnx`` to int8, if that makes it faster.

    Convolutions and linear layers are computed in int8: weights by channel,
    inputs by their range on some speech (``wavs``, ``(samples,)`` each). In the
    first layer and in the head that costs accuracy, and only their weights are
    in int8. LSTM layers become onnxruntime's DynamicQuantizeLSTM. The features
    stay as they are. Raises ``NoInt8Error`` if there is no int8 kernel, as for
    GRU layers, whose weights would be expanded again.
    """
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    if found := sorted(kinds.intersection(_WITHOUT_INT8)):
        raise NoInt8Error(
            f"onnxruntime has no int8 kernel for {found[0]} layers, which "
            "would be slower than in single precision"
        )
    with tempfile.TemporaryDirectory() as folder, _quiet():
        ready = Path(folder) / "ready.onnx"
        quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
        nodes = onnx.load(ready).graph.node
        layers = [
            node.name
            for node in nodes
            if node.op_type in _LAYERS and _FEATURES not in node.name
        ]
        # To the quantiser, none would mean all.
        if inner := layers[1:-1]:
            inner_ready, ready = ready, Path(folder) / "inner.onnx"
            quantize_static(
                str(inner_ready),
                str(ready),
                _Speech(wavs),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=_LAYERS,
                nodes_to_quantize=inner,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                # 7 bits: sums of 8-bit products saturate without VNNI.
                reduce_range=True,
            )
        quantize_dynamic(
            str(ready),
            str(to),
            op_types_to_quantize=["LSTM"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            reduce_range=True,
        )
    # The quantiser drops the metadata, and folds the computed bases.
    metadata = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    _finish(to, metadata, int8=True)


def _shrink_weights(graph):
    """Store all other weights of layers in int8 too.

    They are expanded by a product, which onnxruntime computes once, when it
    loads the graph, and not by DequantizeLinear, computed for each utterance.
    """
    weights = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    }
    # By the axis of the channels
    axes = {
        node.input[1]: 0 if node.op_type == "Conv" else 1
        for node in graph.node
        if node.op_type in _LAYERS and _FEATURES not in node.name
    }
    for name in sorted(axes.keys() & weights.keys()):
        array = onnx.numpy_helper.to_array(weights[name])
        rest = tuple(i for i in range(array.ndim) if i != axes[name])
        scale = np.abs(array).max(axis=rest, keepdims=True) / 127
        scale = np.where(scale > 0, scale, 1).astype(np.float32)
        constants = {
            "quantized": np.rint(array / scale).astype(np.int8),
            "scale": scale,
        }
        steps = (
            ("Cast", ("quantized",), "whole"),
            ("Mul", ("whole", "scale"), None),
        )
        _replace_constant(graph, weights[name], constants, steps)


@contextmanager
def _quiet():
    """Silence the quantiser's advice, which was followed."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
