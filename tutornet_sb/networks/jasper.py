"""The Jasper family: 1-D convolutions in blocks, described by a table.

Jasper DR (https://arxiv.org/abs/1904.03288), Jasper Mini and QuartzNet
(https://arxiv.org/abs/1910.10261) are tables of one implementation; they
stand in ``recipes/LibriSpeech/TutorNet/hparams/models``.
"""

from collections import OrderedDict

import torch

from tutornet_sb.networks.acoustic_model import frame_mask

REQUIRED = ("channels", "kernel")
OPTIONAL = {
    "repeat": 1,
    "stack": 1,
    "stride": 1,
    "dilation": 1,
    "dropout": None,
    "residual": False,
}
SEPARABLE = ("none", "wide", "all")
RESIDUAL = ("dense", "plain")


def read_row(index, row):
    """Check one row of a block table and fill in what it leaves out.

    Arguments
    ---------
    index : int
        Position of the row, named in errors.
    row : dict
        The row as written, see ``JasperEncoder``.

    Returns
    -------
    dict
        The row with all keys.

    Raises
    ------
    ValueError
        If a key is missing or unknown, or has an impossible value.

    Example
    -------
    >>> read_row(0, {"channels": 256, "kernel": 12})
    Traceback (most recent call last):
    ...
    ValueError: blocks[0]: kernel must be odd, got 12
    """
    for key in REQUIRED:
        if key not in row:
            raise ValueError(f"blocks[{index}]: {key} is missing")
    for key in row:
        if key not in (*REQUIRED, *OPTIONAL):
            known = ", ".join((*REQUIRED, *OPTIONAL))
            raise ValueError(f"blocks[{index}]: no key {key}, only {known}")
    row = {**OPTIONAL, **row}
    for key in ("channels", "kernel", "repeat", "stack", "stride", "dilation"):
        if not isinstance(row[key], int) or row[key] < 1:
            raise ValueError(
                f"blocks[{index}]: {key} must be a positive integer, "
                f"got {row[key]!r}"
            )
    if row["kernel"] % 2 == 0:
        raise ValueError(
            f"blocks[{index}]: kernel must be odd, got {row['kernel']}"
        )
    if row["residual"] and row["stride"] != 1:
        raise ValueError(
            f"blocks[{index}]: stride must be 1 where residual is true, "
            f"got {row['stride']}"
        )
    return row


class DepthwiseConv1d(torch.nn.Conv1d):
    """Depthwise convolution without bias that is faster on CPUs than torch's.

    There torch takes wide kernels, and those of one frame, channel by channel.
    As a picture whose channels stand together it is one operation
    (``benchmarks/layers.py`` measures the difference). Weights and results are
    those of ``torch.nn.Conv1d``, and so is what is exported.

    Arguments
    ---------
    channels : int
        Channels, before and after.
    kernel : int
        Frames under the convolution, odd.
    stride : int
        Input frames for one output frame.
    dilation : int
        Distance between two frames under the convolution.

    Example
    -------
    >>> conv = DepthwiseConv1d(8, 5)
    >>> tuple(conv(torch.randn(1, 8, 7)).shape)
    (1, 8, 7)
    """

    def __init__(self, channels, kernel, stride=1, dilation=1):
        super().__init__(
            channels,
            channels,
            kernel,
            stride,
            padding=dilation * (kernel // 2),
            dilation=dilation,
            groups=channels,
            bias=False,
        )

    def forward(self, x):
        """Convolve each channel by itself.

        Arguments
        ---------
        x : torch.Tensor
            Input, ``(batch, channels, frames)``.

        Returns
        -------
        torch.Tensor
            ``(batch, channels, frames')``.
        """
        stride, dilation = self.stride[0], self.dilation[0]
        if (
            x.device.type != "cpu"
            or torch.jit.is_tracing()
            or (stride > 1 and dilation > 1)
        ):
            return super().forward(x)
        if self.kernel_size[0] == 1 and stride == 1:
            return x * self.weight.to(x.dtype).view(-1, 1)
        # One row for each of the frames that a dilated kernel does not mix
        frames = x.shape[2]
        rows = torch.nn.functional.pad(x, (0, -frames % dilation))
        rows = rows.unflatten(2, (-1, dilation)).transpose(2, 3)
        y = torch.nn.functional.conv2d(
            rows.contiguous(memory_format=torch.channels_last),
            self.weight.unsqueeze(2),
            stride=(1, stride),
            padding=(0, self.padding[0] // dilation),
            groups=self.groups,
        )
        return y.transpose(2, 3).flatten(2)[..., : -(-frames // stride)]


def conv_norm(
    input_size, output_size, kernel=1, stride=1, dilation=1, separable="none"
):
    """Make a convolution without bias and its batch normalisation.

    Arguments
    ---------
    input_size, output_size : int
        Channels before and after.
    kernel : int
        Frames under the convolution, odd.
    stride : int
        Input frames for one output frame.
    dilation : int
        Distance between two frames under the convolution.
    separable : str
        Which convolutions are a depthwise and a pointwise one: ``"none"``,
        those ``"wide"``r than one frame, or ``"all"``.

    Returns
    -------
    torch.nn.Sequential
        ``(batch, input_size, frames)`` -> ``(batch, output_size, frames')``.
    """
    if separable == "all" or (separable == "wide" and kernel > 1):
        parts = {
            "depthwise": DepthwiseConv1d(input_size, kernel, stride, dilation),
            "pointwise": torch.nn.Conv1d(
                input_size, output_size, 1, bias=False
            ),
        }
    else:
        parts = {
            "conv": torch.nn.Conv1d(
                input_size,
                output_size,
                kernel,
                stride,
                padding=dilation * (kernel // 2),
                dilation=dilation,
                bias=False,
            )
        }
    # eps is the one both papers' published configurations trained with.
    parts["norm"] = torch.nn.BatchNorm1d(output_size, eps=1e-3)
    return torch.nn.Sequential(OrderedDict(parts))


class JasperBlock(torch.nn.Module):
    """Convolutional layers of one width, with residuals into the last.

    Before its last ReLU, the block adds a 1x1 convolution with batch
    normalisation, one each, of the tensors it is given as ``residuals``
    (Figure 2 of https://arxiv.org/abs/1904.03288).

    Arguments
    ---------
    input_size : int
        Channels of the input.
    row : dict
        A full row of the table, see ``read_row``.
    residual_sizes : list
        Channels of each residual.
    separable : str
        See ``conv_norm``.

    Example
    -------
    >>> row = read_row(0, {"channels": 8, "kernel": 5, "repeat": 2})
    >>> block = JasperBlock(4, {**row, "dropout": 0.0}, [4], "none")
    >>> x = torch.randn(1, 4, 7)
    >>> padded = torch.zeros(1, 1, 7, dtype=torch.bool)
    >>> tuple(block(x, padded, [x]).shape)
    (1, 8, 7)
    """

    def __init__(self, input_size, row, residual_sizes, separable):
        super().__init__()
        channels = row["channels"]
        self.stride = row["stride"]
        self.layers = torch.nn.ModuleList(
            conv_norm(
                channels if index else input_size,
                channels,
                row["kernel"],
                # All layers after the first are at the block's frame rate.
                1 if index else row["stride"],
                row["dilation"],
                separable,
            )
            for index in range(row["repeat"])
        )
        self.residuals = torch.nn.ModuleList(
            conv_norm(size, channels, separable=separable)
            for size in residual_sizes
        )
        self.dropout = torch.nn.Dropout(row["dropout"])

    def forward(self, x, padded, residuals):
        """Apply the block.

        Arguments
        ---------
        x : torch.Tensor
            Input, ``(batch, input_size, frames)``, zero on padded frames.
        padded : torch.Tensor
            True on padded frames of the output, ``(batch, 1, frames')``.
        residuals : list
            Tensors ``(batch, size, frames)``, one for each of
            ``residual_sizes``.

        Returns
        -------
        torch.Tensor
            ``(batch, channels, frames')``, zero on padded frames.
        """
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == last:
                for project, residual in zip(
                    self.residuals, residuals, strict=True
                ):
                    x = x + project(residual)
            x = self.dropout(torch.relu(x))
            # Once a layer is enough: every convolution, residuals included,
            # then reads zeros beyond the end, as it would without padding.
            x = x.masked_fill(padded, 0.0)
        return x


class JasperEncoder(torch.nn.Module):
    """A network of the Jasper family, built from a table of blocks.

    A row of the table is a mapping with the keys

    - ``channels``, ``kernel`` (odd): of each layer of the block;
    - ``repeat``: layers of the block (1);
    - ``stack``: how many such blocks follow one another (1);
    - ``stride``: of the first layer (1);
    - ``dilation``: of each layer (1);
    - ``dropout``: after each activation (the encoder's);
    - ``residual``: whether the block has residuals (false).

    The blocks are submodules ``blocks.0``, ``blocks.1``, ... (a stack counts
    each of its blocks) with outputs of shape ``(batch, dim, frames)``.

    Arguments
    ---------
    input_size : int
        Dimension of the features.
    blocks : list
        The table.
    residual : str
        ``"dense"``: a residual block adds the inputs of all residual blocks
        up to itself (Jasper DR); ``"plain"``: its own input only.
    separable : str
        Which convolutions are a depthwise and a pointwise one: ``"none"``
        (Jasper), those ``"wide"``r than one frame (QuartzNet), or ``"all"``,
        the 1x1 ones of residuals included (Jasper Mini).
    dropout : float
        Dropout of the rows that give none.

    Raises
    ------
    ValueError
        If the table is empty or a row is wrong, or an option unknown.

    Example
    -------
    >>> table = [
    ...     {"channels": 8, "kernel": 11, "stride": 2},
    ...     {"channels": 8, "kernel": 11, "repeat": 2, "residual": True},
    ...     {"channels": 16, "kernel": 1},
    ... ]
    >>> encoder = JasperEncoder(64, table)
    >>> hidden, lengths = encoder(torch.randn(2, 9, 64), torch.tensor([9, 4]))
    >>> tuple(hidden.shape), lengths.tolist()
    ((2, 5, 16), [5, 2])
    """

    def __init__(
        self,
        input_size,
        blocks,
        residual="plain",
        separable="none",
        dropout=0.0,
    ):
        super().__init__()
        if residual not in RESIDUAL:
            raise ValueError(f"residual must be in {RESIDUAL}: {residual!r}")
        if separable not in SEPARABLE:
            raise ValueError(f"separable must be in {SEPARABLE}: {separable!r}")
        if not blocks:
            raise ValueError("blocks is empty: a network needs a block")
        self.dense = residual == "dense"
        self.stride = 1
        self.blocks = torch.nn.ModuleList()
        size, sizes = input_size, []
        for index, row in enumerate(blocks):
            row = read_row(index, row)
            if row["dropout"] is None:
                row["dropout"] = dropout
            for _ in range(row["stack"]):
                if row["residual"]:
                    sizes = [*sizes, size] if self.dense else [size]
                self.blocks.append(
                    JasperBlock(
                        size,
                        row,
                        sizes if row["residual"] else [],
                        separable,
                    )
                )
                size = row["channels"]
                self.stride *= row["stride"]
                if row["stride"] > 1:
                    # Residuals do not reach over a change of frame rate.
                    sizes = []
        self.output_size = size

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
        x = x.transpose(1, 2)
        padded = ~frame_mask(lengths, x.shape[2]).unsqueeze(1)
        inputs = []
        for block in self.blocks:
            if block.stride > 1:
                lengths = (lengths - 1) // block.stride + 1
                padded = padded[:, :, :: block.stride]
                inputs = []
            if block.residuals:
                inputs = [*inputs, x] if self.dense else [x]
            x = block(x, padded, inputs if block.residuals else [])
        return x.transpose(1, 2), lengths
