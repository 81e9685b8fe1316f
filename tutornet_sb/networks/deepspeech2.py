"""DeepSpeech2: 2-D convolutions over a spectrogram, then recurrent layers."""

import torch

from tutornet_sb.networks.acoustic_model import frame_mask
from tutornet_sb.networks.recurrent import RecurrentLayers

# Kernel and stride of each convolution: frames, frequency bins.
CONVOLUTIONS = (((11, 41), (2, 2)), ((11, 21), (1, 2)))


class DeepSpeech2Encoder(torch.nn.Module):
    """Two 2-D convolutions, recurrent layers and a fully connected one.

    The network of https://arxiv.org/abs/1512.02595 as OpenSeq2Seq published it
    for LibriSpeech (``example_configs/speech2text/ds2_large_8gpus_mp.py`` and
    ``open_seq2seq/encoders/ds2_encoder.py``), with 58.97 M (large) and 11.57 M
    parameters (small). These numbers fix what the configurations leave open:
    convolutions have batch normalisation and no bias, recurrent layers two bias
    vectors a gate and no normalisation. ``channels`` are those of each
    convolution; dropout is between recurrent layers and on the output.
    """

    def __init__(
        self,
        input_size,
        channels,
        hidden_size,
        layers,
        output_size,
        cell="gru",
        directions=2,
        dropout=0.0,
    ):
        super().__init__()
        self.output_size = output_size
        self.stride = 1
        self.convs = torch.nn.ModuleList()
        self.norms = torch.nn.ModuleList()
        size, bins = 1, input_size
        for kernel, stride in CONVOLUTIONS:
            padding = tuple(width // 2 for width in kernel)
            self.convs.append(
                torch.nn.Conv2d(
                    size, channels, kernel, stride, padding, bias=False
                )
            )
            # eps of the published configuration
            self.norms.append(torch.nn.BatchNorm2d(channels, eps=1e-3))
            size, bins = channels, (bins - 1) // stride[1] + 1
            self.stride *= stride[0]
        self.layers = RecurrentLayers(
            cell, channels * bins, hidden_size, layers, directions, dropout
        )
        self.linear = torch.nn.Linear(self.layers.output_size, output_size)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x, lengths):
        """Encode ``(batch, frames, dim)``, see ``AcousticModel``."""
        x = x.unsqueeze(1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
            lengths = (lengths - 1) // conv.stride[0] + 1
            padded = ~frame_mask(lengths, x.shape[2])
            # The next convolution reads zeros beyond the end, as it would
            # without padding.
            x = x.masked_fill(padded[:, None, :, None], 0.0)
        x = self.layers(x.transpose(1, 2).flatten(2), lengths)
        x = self.dropout(torch.relu(self.linear(x)))
        return x.masked_fill(padded.unsqueeze(-1), 0.0), lengths
