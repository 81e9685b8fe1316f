"""Recurrent students: a strided convolution and stacked LSTM or GRU layers."""

import torch
from speechbrain.nnet.RNN import GRU, LSTM

from tutornet_sb.networks.acoustic_model import frame_mask

CELLS = {"lstm": LSTM, "gru": GRU}


class RecurrentLayers(torch.nn.Module):
    """Stacked recurrent layers for padded batches.

    A bidirectional layer is two one-directional ones, the second of which
    reads each utterance from its own last valid frame. The result is that of
    packed sequences, without leaving the kernels for padded batches
    (``benchmarks/layers.py`` measures the difference).

    Called as ``(x, lengths)``, ``(batch, frames, input_size)`` and
    ``(batch,)``, it returns ``(batch, frames, output_size)``, zero on padded
    frames. ``hidden_size`` is that of each direction; dropout is between
    layers.
    """

    def __init__(
        self, cell, input_size, hidden_size, layers, directions=2, dropout=0.0
    ):
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"cell must be in {tuple(CELLS)}, got {cell!r}")
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        if directions not in (1, 2):
            raise ValueError(f"directions must be 1 or 2, got {directions}")
        self.directions = directions
        self.output_size = directions * hidden_size
        self.dropout = torch.nn.Dropout(dropout)
        sizes = [input_size] + [self.output_size] * (layers - 1)
        self.forward_layers, self.backward_layers = (
            torch.nn.ModuleList(
                CELLS[cell](hidden_size, input_size=size) for size in way
            )
            for way in (sizes, sizes if directions == 2 else [])
        )
        # Where both directions of a layer can be tapped together
        self.outputs = torch.nn.ModuleList(torch.nn.Identity() for _ in sizes)

    def forward(self, x, lengths):
        """Apply the layers, see the class."""
        frames = x.shape[1]
        mask = frame_mask(lengths, frames)
        # Position t of the reversed utterance is position length - 1 - t;
        # padding stays where it is, so one index serves both ways.
        forth = torch.arange(frames, device=x.device).expand(x.shape[0], -1)
        back = torch.where(mask, lengths.unsqueeze(1) - 1 - forth, forth)
        first = frames * torch.arange(x.shape[0], device=x.device)
        rows = (back + first.unsqueeze(1)).flatten()
        for index, layer in enumerate(self.forward_layers):
            if index:
                x = self.dropout(x)
            y, _ = layer(x)
            if self.backward_layers:
                z, _ = self.backward_layers[index](_reorder(x, rows))
                y = torch.cat([y, _reorder(z, rows)], dim=-1)
            x = self.outputs[index](y)
        return x.masked_fill(~mask.unsqueeze(-1), 0.0)


def _reorder(x, rows):
    """Permute frames row by row, ten times as fast as ``gather`` backward."""
    return x.flatten(0, 1).index_select(0, rows).view(x.shape)


class RecurrentEncoder(torch.nn.Module):
    """A strided convolution of odd ``kernel_size``, then recurrent layers.

    With one direction it looks ahead no further than the convolution reaches.
    Dropout is on the output of the convolution and of each layer.
    """

    def __init__(
        self,
        input_size,
        channels,
        hidden_size,
        layers,
        cell="lstm",
        directions=2,
        kernel_size=11,
        stride=2,
        dropout=0.0,
    ):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if not 1 <= stride <= kernel_size:
            raise ValueError(
                f"stride must be from 1 to kernel_size ({kernel_size}), "
                f"got {stride}"
            )
        self.stride = stride
        self.conv = torch.nn.Conv1d(
            input_size,
            channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            bias=False,
        )
        self.norm = torch.nn.BatchNorm1d(channels)
        self.dropout = torch.nn.Dropout(dropout)
        self.layers = RecurrentLayers(
            cell, channels, hidden_size, layers, directions, dropout
        )
        self.output_size = self.layers.output_size

    def forward(self, x, lengths):
        """Encode ``(batch, frames, dim)``, see ``AcousticModel``."""
        x = torch.relu(self.norm(self.conv(x.transpose(1, 2))))
        lengths = (lengths - 1) // self.stride + 1
        x = self.layers(self.dropout(x.transpose(1, 2)), lengths)
        return self.dropout(x), lengths
