"""The Jasper family: 1-D convolutions in blocks, described by a table."""

from collections import OrderedDict

import torch

from tutornet_sb.networks.acoustic_model import frame_mask

# Keys of a row of the table, and values of those that may be left out
REQUIRED = ("channels", "kernel")
OPTIONAL = {
    "repeat": 1,
    "stack": 1,
    "stride": 1,
    "dilation": 1,
    "dropout": 0.0,
    "residual": False,
}


def _find_fault(row):
    known = (*REQUIRED, *OPTIONAL)
    for key in known:
        if key not in row:
            return f"{key} is missing"
    for key, value in row.items():
        if key not in known:
            return f"no key {key}, only {', '.join(known)}"
        whole = isinstance(value, int) and value > 0
        if key not in ("dropout", "residual") and not whole:
            return f"{key} must be a positive integer, got {value!r}"
    if row["kernel"] % 2 == 0:
        return f"kernel must be odd, got {row['kernel']}"
    if row["residual"] and row["stride"] != 1:
        return f"stride must be 1 where residual is true, got {row['stride']}"
    return None


class DepthwiseConv1d(torch.nn.Conv1d):
    """Depthwise ``torch.nn.Conv1d`` without bias that is faster on CPUs.

    There torch takes wide kernels, and those of one frame, channel by channel;
    as a 2-D convolution in ``channels_last`` it is one operation
    (``benchmarks/layers.py`` measures the difference).
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
        """Convolve each channel separately."""
        stride, dilation = self.stride[0], self.dilation[0]
        if (
            x.device.type != "cpu"
            or torch.jit.is_tracing()
            or (stride > 1 and dilation > 1)
        ):
            return super().forward(x)
        if self.kernel_size[0] == 1 and stride == 1:
            return x * self.weight.to(x.dtype).view(-1, 1)
        # One row for each phase, between which a dilated kernel mixes nothing
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
    """Make a convolution without bias and its batch normalisation."""
    parts, name = OrderedDict(), "conv"
    if separable == "all" or (separable == "wide" and kernel > 1):
        depthwise = DepthwiseConv1d(input_size, kernel, stride, dilation)
        parts["depthwise"], name = depthwise, "pointwise"
        kernel = stride = dilation = 1
    parts[name] = torch.nn.Conv1d(
        input_size,
        output_size,
        kernel,
        stride,
        padding=dilation * (kernel // 2),
        dilation=dilation,
        bias=False,
    )
    # eps is the one both papers' published configurations trained with.
    parts["norm"] = torch.nn.BatchNorm1d(output_size, eps=1e-3)
    return torch.nn.Sequential(parts)


class JasperBlock(torch.nn.Module):
    """A row of the table: layers of one width, with residuals into the last.

    Before its last ReLU, the block adds a 1x1 convolution with batch
    normalisation of each of ``residuals`` (Figure 2 of
    https://arxiv.org/abs/1904.03288), whose channels are ``residual_sizes``.
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
        """Apply the block to ``(batch, input_size, frames)``.

        The output is zero where ``padded``, ``(batch, 1, frames / stride)``.
        """
        for layer in self.layers:
            x = layer(x)
            if layer is self.layers[-1]:
                pairs = zip(self.residuals, residuals, strict=True)
                for project, residual in pairs:
                    x = x + project(residual)
            x = self.dropout(torch.relu(x))
            # Once a layer is enough: every convolution, residuals included,
            # then reads zeros beyond the end, as it would without padding.
            x = x.masked_fill(padded, 0.0)
        return x


class JasperEncoder(torch.nn.Module):
    """A network of the Jasper family, built from a table of blocks.

    Jasper DR (https://arxiv.org/abs/1904.03288), Jasper Mini and QuartzNet
    (https://arxiv.org/abs/1910.10261) are such tables. A row has the keys

    - ``channels``, ``kernel`` (odd): of each layer of the block;
    - ``repeat``: layers of the block (1);
    - ``stack``: number of such blocks in a row (1);
    - ``stride``: of the first layer (1);
    - ``dilation``: of each layer (1);
    - ``dropout``: after each activation (the encoder's);
    - ``residual``: whether the block has residuals (false).

    The blocks are submodules ``blocks.0``, ``blocks.1``, ... (a stack counts
    each of its blocks) with outputs of shape ``(batch, dim, frames)``.

    With ``"dense"`` residuals a block adds the inputs of all residual blocks up
    to itself (Jasper DR), with ``"plain"`` ones its own input only. ``"wide"``
    (QuartzNet) or ``"all"`` (Jasper Mini) are the convolutions, 1x1 ones of
    residuals included, that are split into a depthwise and a pointwise one.
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
        for key, value, known in (
            ("residual", residual, ("dense", "plain")),
            ("separable", separable, ("none", "wide", "all")),
        ):
            if value not in known:
                raise ValueError(f"{key} must be in {known}, got {value!r}")
        if not blocks:
            raise ValueError("blocks is empty: a network needs a block")
        self.dense = residual == "dense"
        self.stride = 1
        self.blocks = torch.nn.ModuleList()
        size, sizes = input_size, []
        for index, row in enumerate(blocks):
            row = {**OPTIONAL, "dropout": dropout, **row}
            if fault := _find_fault(row):
                raise ValueError(f"blocks[{index}]: {fault}")
            for _ in range(row["stack"]):
                inputs = []
                if row["residual"]:
                    inputs = sizes = [*sizes, size] if self.dense else [size]
                block = JasperBlock(size, row, inputs, separable)
                self.blocks.append(block)
                size = row["channels"]
                self.stride *= row["stride"]
                if row["stride"] > 1:
                    # Residuals do not reach over a change of frame rate.
                    sizes = []
        self.output_size = size

    def forward(self, x, lengths):
        """Encode ``(batch, frames, dim)``, see ``AcousticModel``."""
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
