"""Hidden layers of a model: which there are, and their outputs."""

import difflib
import re
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch

from tutornet_sb.networks.acoustic_model import (
    OneByOneModel,
    pad_encodings,
    pad_frames,
    split_batch,
)
from tutornet_sb.util.errors import InputError, one_line

# Number of frames by which one of the two waveforms that a model is probed with
# is longer: layers of twice to six times its rate, or half to a sixth of it,
# then differ by whole frames too.
MORE_FRAMES = 12
SHORT_SECONDS = 0.5


class Tap(NamedTuple):
    """Axis of the frames in a layer's output, and dimension of a frame."""

    time_axis: int
    hidden_size: int


class Layer(NamedTuple):
    """One layer of a model; None stands for what it does not have.

    The shape has ``"batch"`` and ``"frames"`` for these axes, frames are
    ``frame_period`` seconds apart, and parameters include inner ones.
    """

    path: str
    kind: str
    shape: tuple | None
    frame_period: float | None
    parameters: int
    tap: Tap | None


def _first_tensor(output):
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return next((x for x in output if torch.is_tensor(x)), None)
    return output if torch.is_tensor(output) else None


@contextmanager
def trying_out(model):
    """Evaluate a model on its device, and restore modes and random numbers."""
    modes = {layer: layer.training for layer in model.modules()}
    device = next(model.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(cuda), torch.no_grad():
            model.eval()
            yield device
    finally:
        for layer, mode in modes.items():
            layer.training = mode


@contextmanager
def watching(model, paths, keep):
    """Call ``keep(path, inputs, output)`` after each call of some layers."""
    with ExitStack() as stack:
        for path in paths:

            def hook(layer, inputs, output, path=path):
                keep(path, inputs, output)

            layer = model.get_submodule(path)
            stack.enter_context(layer.register_forward_hook(hook))
        yield


def _probe(model, samples):
    """Shapes of all layers' outputs, and the model's frames, on noise."""
    shapes = {}

    def keep(path, inputs, output):
        tensor = _first_tensor(output)
        if tensor is not None:
            shapes[path] = tuple(tensor.shape)

    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    # An own generator: a seed would be that of all devices.
    generator = torch.Generator().manual_seed(0)
    wavs = 0.1 * torch.randn(2, samples, generator=generator)
    # Both at once, or no axis would be that of the batch.
    together = getattr(model, "forward_together", model)
    try:
        with trying_out(model) as device, watching(model, paths, keep):
            encoding = together(wavs.to(device), torch.ones(2, device=device))
    except (RuntimeError, TypeError, IndexError) as error:
        raise InputError(
            f"the network cannot encode: {one_line(error)}. Do the sizes of "
            "its layers match?"
        ) from error
    return shapes, encoding.hidden.shape[1]


def _describe(short, long, frames):
    """Shape and tap of a layer, from its outputs' shapes on two waveforms."""
    growing = [axis for axis, n in enumerate(short) if n != long[axis]]
    shape = ["frames" if a in growing else n for a, n in enumerate(long)]
    if 2 in shape:
        shape[shape.index(2)] = "batch"
    tap = None
    if len(short) == 3 and len(growing) == 1:
        (axis,) = growing
        batch, size = (n for other, n in enumerate(short) if other != axis)
        if (short[axis], long[axis]) == frames and batch == 2 and size:
            tap = Tap(axis, size)
    return tuple(shape), tap


def list_layers(model):
    """Describe all layers of a model by its outputs on two noise waveforms.

    The second of them is the longer: an axis that grows with it is of frames.
    The model, an ``AcousticModel`` in any mode, is not changed.

    Returns a list of ``Layer`` in the model's order.
    """
    rate = model.features.sample_rate
    short_samples = round(SHORT_SECONDS * rate)
    seconds = MORE_FRAMES * model.frame_period
    long_samples = short_samples + round(seconds * rate)
    short, short_frames = _probe(model, short_samples)
    long, long_frames = _probe(model, long_samples)
    layers = []
    for path, layer in model.named_modules(remove_duplicate=False):
        if not path:
            continue
        shape = frame_period = tap = None
        a, b = short.get(path), long.get(path)
        if a is not None and b is not None and len(a) == len(b):
            shape, tap = _describe(a, b, (short_frames, long_frames))
            if shape.count("frames") == 1:
                axis = shape.index("frames")
                frame_period = seconds / (b[axis] - a[axis])
        layers.append(
            Layer(
                path,
                type(layer).__name__,
                shape,
                frame_period,
                sum(p.numel() for p in layer.parameters()),
                tap,
            )
        )
    return layers


def find_taps(model):
    """Path -> ``Tap`` of the layers that have the model's own frames.

    Any order of axes will do. Not detected is a layer that reads the frames
    backwards, as half of a bidirectional one does: do not tap it.
    """
    return {layer.path: layer.tap for layer in list_layers(model) if layer.tap}


def find_stack(model):
    """Paths of the layers an encoder is a stack of, first to last.

    These are the numbered layers (``encoder.blocks.0`` and so on) that can be
    tapped: those nearest the top of the encoder, of several such rows the
    longest, and of these the last. Empty if no two layers are numbered.
    """
    rows = {}
    for path in find_taps(model):
        numbered = re.fullmatch(r"(encoder\.(?:.*[._])?)\d+", path)
        if numbered:
            rows.setdefault(numbered[1], []).append(path)
    # Of equals, max takes the first.
    return max(
        (row for row in reversed(rows.values()) if len(row) > 1),
        key=lambda row: (-row[0].count("."), len(row)),
        default=[],
    )


def select_taps(model, paths, owner):
    """Path -> ``Tap`` of some layers, each named once.

    The model is not changed; `owner` is ``teacher`` or ``student``, for errors.
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    del layers[""]
    paths = list(paths)
    for path in paths:
        if path not in layers:
            raise InputError(
                f"the {owner} has no layer {path!r}; nearest: "
                + _nearest(path, layers)
            )
    found = find_taps(model) if paths else {}
    for path in paths:
        if path not in found:
            raise InputError(
                f"the {owner}'s layer {path!r} cannot be tapped: its output "
                "does not have the model's own frames, those of its logits. "
                f"Of the {len(found)} layers that have, the nearest by name: "
                + _nearest(path, found)
            )
    return {path: found[path] for path in paths}


def _nearest(name, names):
    # Not errors.nearest: paths of several blocks may be near
    close = difflib.get_close_matches(str(name), names, n=5, cutoff=0.0)
    return ", ".join(close)


def encode_with_taps(model, taps, *inputs):
    """Encode a batch and return the outputs of some layers too.

    A hidden layer taken from a model that ``DistributedDataParallel`` wraps
    must be returned by the wrapper, which otherwise waits for gradients that
    never come. So the layers' outputs are made part of the model's own.

    Returns the encoding and copies of the outputs of `taps`, a dictionary from
    :func:`select_taps`, in its order, each ``(batch, frames, dim)``. Of a tuple
    the first tensor is taken; of several calls in one pass, the last.
    """
    root = getattr(model, "module", model)
    if isinstance(root, OneByOneModel) and len(inputs[0]) > 1:
        parts = [
            encode_with_taps(model, taps, *one) for one in split_batch(*inputs)
        ]
        encodings, hidden = zip(*parts, strict=True)
        return (
            pad_encodings(encodings),
            [pad_frames(parts) for parts in zip(*hidden, strict=True)],
        )
    outputs = {}

    def keep(path, inputs, output):
        # A copy, since the next layer may work in place.
        outputs[path] = _first_tensor(output).clone()

    def add(layer, inputs, encoding):
        return encoding, [
            _put_frames_second(path, tap, outputs.get(path), encoding)
            for path, tap in taps.items()
        ]

    # Hooked each time: copies of a model then have their own hooks, and
    # replacing a layer (as SyncBatchNorm does) cannot lose them.
    with watching(root, taps, keep), root.register_forward_hook(add):
        return model(*inputs)


def _put_frames_second(path, tap, output, encoding):
    if output is None:
        raise InputError(
            f"layer {path!r} took no part in this pass, as happens under layer "
            "dropout: set that to 0, or tap another layer"
        )
    hidden = output.movedim(tap.time_axis, 1)
    if hidden.shape[:2] != encoding.hidden.shape[:2]:
        raise InputError(
            f"layer {path!r} has {hidden.shape[1]} frames where the model has "
            f"{encoding.hidden.shape[1]}: tap another layer"
        )
    return hidden
