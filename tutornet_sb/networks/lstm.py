"""Recurrent students: a strided convolutional front end and stacked LSTMs."""

import torch
from speechbrain.nnet.RNN import LSTM

from tutornet_sb.networks.acoustic_model import frame_mask


class LSTMEncoder(torch.nn.Module):
    """A strided convolution, then LSTM layers.

    A bidirectional layer is two one-directional ones, the second of which
    reads each utterance from its own last valid frame. The result is that of
    packed sequences, without leaving the kernels for padded batches
    (``benchmarks/lstm_packing.py`` measures the difference).

    Arguments
    ---------
    input_size : int
        Dimension of the features.
    channels : int
        Channels of the convolution.
    hidden_size : int
        Cells of each layer and direction.
    layers : int
        LSTM layers.
    directions : int
        2, or 1 for a network that hears nothing of what comes later than
        its convolution reaches.
    kernel_size : int
        Frames under the convolution, odd.
    stride : int
        Input frames for one output frame.
    dropout : float
        Dropout on the output of the convolution and of each layer.

    Example
    -------
    >>> encoder = LSTMEncoder(64, channels=8, hidden_size=16, layers=2)
    >>> hidden, lengths = encoder(torch.randn(2, 9, 64), torch.tensor([9, 4]))
    >>> tuple(hidden.shape), lengths.tolist()
    ((2, 5, 32), [5, 2])
    """

    def __init__(
        self,
        input_size,
        channels,
        hidden_size,
        layers,
        directions=2,
        kernel_size=11,
        stride=2,
        dropout=0.0,
    ):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if directions not in (1, 2):
            raise ValueError(f"directions must be 1 or 2, got {directions}")
        self.stride = stride
        self.output_size = directions * hidden_size
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
        sizes = [channels] + [self.output_size] * (layers - 1)
        self.forward_layers = torch.nn.ModuleList(
            LSTM(hidden_size, input_size=size) for size in sizes
        )
        self.backward_layers = torch.nn.ModuleList(
            LSTM(hidden_size, input_size=size)
            for size in sizes
            if directions == 2
        )

    def forward(self, x, lengths):
        """Encode a padded batch of features.

        Arguments
        ---------
        x : torch.Tensor
            Features, ``(batch, frames, dim)``, zero on padded frames.
        lengths : torch.Tensor
            Valid frames, integers of shape ``(batch,)``.

        Returns
        -------
        hidden : torch.Tensor
            ``(batch, frames / stride, output_size)``, zero on padded frames.
        lengths : torch.Tensor
            Valid frames of ``hidden``.
        """
        x = torch.relu(self.norm(self.conv(x.transpose(1, 2))))
        x = self.dropout(x.transpose(1, 2))
        lengths = (lengths - 1) // self.stride + 1
        frames = x.shape[1]
        mask = frame_mask(lengths, frames)
        # Position t of the reversed utterance is position length - 1 - t;
        # padding stays where it is, so one index serves both ways.
        forth = torch.arange(frames, device=x.device).expand(len(x), -1)
        back = torch.where(mask, lengths.unsqueeze(1) - 1 - forth, forth)
        back = back.unsqueeze(-1)
        for index, layer in enumerate(self.forward_layers):
            y, _ = layer(x)
            if self.backward_layers:
                reverse = x.gather(1, back.expand_as(x))
                z, _ = self.backward_layers[index](reverse)
                y = torch.cat([y, z.gather(1, back.expand_as(z))], dim=-1)
            x = self.dropout(y)
        return x.masked_fill(~mask.unsqueeze(-1), 0.0), lengths
