"""SpeechBrain's lobes as encoders, with padding kept out of the results.

The wrappers here hook the few modules in which one frame meets another, so that
an utterance is encoded as it would be without padding: convolutions read zeros
beyond its end; attention, pooling and recurrent layers read valid frames only.

Convolutions read zeros in time and frequency where SpeechBrain's reflect their
input, so weights trained with SpeechBrain's recipes would not fit.

Batch normalisation (CRDNN, ContextNet) averages in training over all frames of
the batch, padded ones too, as everywhere in SpeechBrain and in this package.
"""

import math
from functools import partial

import torch
from speechbrain.lobes.models.ContextNet import ContextNetBlock
from speechbrain.lobes.models.transformer.Conformer import ConvolutionModule
from speechbrain.nnet.CNN import Conv1d, Conv2d, DepthwiseSeparableConv1d
from speechbrain.nnet.pooling import Pooling2d
from speechbrain.nnet.RNN import GRU, LSTM, RNN

from tutornet_sb.networks.acoustic_model import frame_mask


class LobeEncoder(torch.nn.Module):
    """Base of the wrappers: lengths, and hooks that hide padding.

    Frames at a stride ``s`` are those at multiples of ``s`` input frames, so
    ``n`` valid ones become ``(n - 1) // s + 1``. A subclass sets ``stride`` and
    ``output_size`` and defines ``encode``, ``(batch, frames, dim)`` to
    ``(batch, frames / stride, output_size)``.
    """

    def __init__(self):
        super().__init__()
        # Of the current batch, for the hooks; None: there is no padding.
        self._lengths = None

    def forward(self, x, lengths):
        """Encode ``(batch, frames, dim)``, see ``AcousticModel``."""
        self._lengths = lengths
        try:
            hidden = self.encode(x)
            hidden = hidden.masked_fill(self._padding(hidden, self.stride), 0.0)
            return hidden, self._valid(self.stride)
        finally:
            self._lengths = None

    def _valid(self, stride):
        return (self._lengths - 1) // stride + 1

    def _padding(self, x, stride, axis=1):
        """True on padded frames, in a shape that broadcasts to ``x``."""
        padding = ~frame_mask(self._valid(stride), x.shape[axis])
        shape = [1] * x.ndim
        shape[0], shape[axis] = padding.shape
        return padding.view(shape)

    def _hide(self, stride, axis, value, module, args):
        """Fill the padded frames of a module's input."""
        if self._lengths is None:
            return None
        return args[0].masked_fill(self._padding(args[0], stride, axis), value)

    def _hide_after(self, stride, module, args, output):
        """Zero the padded frames of a module's output."""
        if self._lengths is None:
            return None
        return output.masked_fill(self._padding(output, stride), 0.0)

    def _guard(self, module, stride=1):
        """Make the convolutions in a module, all at one stride, read zeros."""
        for name, layer in module.named_modules():
            if isinstance(layer, ConvolutionModule):
                # The Conformer's own, (batch, dim, frames) and with padding.
                hide = partial(self._hide, stride, 2, 0.0)
                layer.conv.register_forward_pre_hook(hide)
            elif isinstance(layer, (Conv1d, Conv2d)):
                # The last axis of both is time.
                conv = layer.conv
                dilated = conv.stride[-1] > 1 and conv.dilation[-1] > 1
                if layer.padding != "same" or dilated:
                    raise ValueError(
                        f"{name or type(module).__name__}: padding must be "
                        f"'same', got '{layer.padding}', and a convolution "
                        "with a stride must have no dilation, or frames do "
                        "not stand at multiples of the stride"
                    )
                layer.padding_mode = "constant"
                if conv.kernel_size[-1] > 1:
                    hide = partial(self._hide, stride, 1, 0.0)
                    layer.register_forward_pre_hook(hide)

    def _forget_dummies(self):
        """Undo the effect of shape inference on statistics."""
        for module in self.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()


class CRDNNEncoder(LobeEncoder):
    """Convolutions, recurrent layers and linear layers (``CRDNN``).

    The frame rate falls in ``time_pooling``, the maximum over every
    ``time_pooling_size`` frames, of which the last may be fewer. The centre of
    frame 0 lies ``(time_pooling_size - 1) / 2`` input frames after that of
    input frame 0: 15 ms for windows of 4 frames of 10 ms.
    """

    def __init__(self, crdnn):
        super().__init__()
        self.crdnn = crdnn
        self.output_size = crdnn.get_output_shape()[-1]
        self._forget_dummies()
        self._guard(crdnn)
        if any(isinstance(layer, Pooling2d) for layer in crdnn.modules()):
            raise ValueError(
                "using_2d_pooling must be false: give time_pooling and "
                "time_pooling_size instead"
            )
        self.stride = 1
        if "time_pooling" in crdnn:
            pooling = crdnn["time_pooling"]
            pooling.pool_layer.ceil_mode = True
            self.stride = pooling.pool_layer.kernel_size[-1]
            pooling.register_forward_pre_hook(
                partial(self._hide, 1, 1, -math.inf)
            )
            pooling.register_forward_hook(
                partial(self._hide_after, self.stride)
            )
        if "RNN" in crdnn:
            if not isinstance(crdnn["RNN"], (LSTM, GRU, RNN)):
                raise ValueError(
                    "rnn_class must be speechbrain.nnet.RNN.LSTM, GRU or RNN, "
                    f"got {type(crdnn['RNN']).__name__}: others take no "
                    "lengths and would read the padding (use_rnnp: false)"
                )
            crdnn["RNN"].register_forward_pre_hook(self._pack, with_kwargs=True)
            crdnn["RNN"].register_forward_hook(self._unpack)

    def _pack(self, module, args, kwargs):
        if self._lengths is None:
            return None
        lengths = self._valid(self.stride).clamp(min=1)
        # Half a frame more: SpeechBrain multiplies by the frames and truncates.
        return args, {"lengths": (lengths + 0.5) / args[0].shape[1], **kwargs}

    def _unpack(self, module, args, output):
        output, state = output
        # Packing drops the frames that are padding in all utterances.
        missing = args[0].shape[1] - output.shape[1]
        return torch.nn.functional.pad(output, (0, 0, 0, missing)), state

    def encode(self, x):
        """Apply the network."""
        return self.crdnn(x)


class ContextNetEncoder(LobeEncoder):
    """Separable convolutions with squeeze-and-excitation (``ContextNet``).

    The blocks are ``contextnet.block_0``, ``contextnet.block_1``, ... Each
    averages over the valid frames of the whole utterance. The centre of frame 0
    is that of input frame 0.
    """

    def __init__(self, contextnet):
        super().__init__()
        self.contextnet = contextnet
        self.output_size = contextnet.get_output_shape()[-1]
        self._forget_dummies()
        self.stride = 1
        for layer in contextnet.values():
            self._guard(layer, self.stride)
            if isinstance(layer, ContextNetBlock):
                *_, last = (
                    part
                    for part in layer.Convs.modules()
                    if isinstance(part, DepthwiseSeparableConv1d)
                )
                self.stride *= last.depthwise.stride
                pool = layer.SE.avg_pool
                pool.register_forward_pre_hook(
                    partial(self._hide, self.stride, 1, 0.0)
                )
                pool.register_forward_hook(partial(self._average, self.stride))

    def _average(self, stride, module, args, output):
        """Turn an average over all frames into one over the valid frames."""
        if self._lengths is None:
            return None
        share = args[0].shape[1] / self._valid(stride).clamp(min=1)
        return (output * share.view(-1, 1, 1)).to(output.dtype)

    def encode(self, x):
        """Apply the network."""
        return self.contextnet(x)
