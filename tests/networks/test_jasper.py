"""The Jasper family: published sizes, residuals, padding, clear errors."""

import pytest
import torch
import torch.nn.functional as F

from tutornet_sb.networks.jasper import DepthwiseConv1d, JasperEncoder

TABLE = [
    {"channels": 6, "kernel": 5, "stride": 2},
    {"channels": 8, "kernel": 3, "repeat": 2, "stack": 2, "residual": True},
    {"channels": 10, "kernel": 5, "residual": True, "dropout": 0.5},
    {"channels": 12, "kernel": 7, "dilation": 2},
    {"channels": 16, "kernel": 1},
]


def ready(encoder):
    """Put an encoder in eval with statistics as if it had been trained."""
    generator = torch.Generator().manual_seed(0)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return encoder.eval()


def conv_norm(parts, x, dilation=1, stride=1):
    """Reference of a convolution, written with its own weights only."""
    for name in ("depthwise", "pointwise", "conv"):
        if hasattr(parts, name):
            weight = getattr(parts, name).weight
            wide = name != "pointwise"
            x = F.conv1d(
                x,
                weight,
                stride=stride if wide else 1,
                dilation=dilation if wide else 1,
                padding=(weight.shape[2] - 1) // 2 * dilation if wide else 0,
                groups=x.shape[1] if name == "depthwise" else 1,
            )
    norm = parts.norm
    scale = norm.weight / torch.sqrt(norm.running_var + 1e-3)
    shift = norm.bias - norm.running_mean * scale
    return x * scale[:, None] + shift[:, None]


@pytest.mark.parametrize("residual", ["dense", "plain"])
@pytest.mark.parametrize("separable", ["none", "wide", "all"])
def test_forward_is_the_papers_equations(residual, separable):
    encoder = ready(JasperEncoder(4, TABLE, residual, separable)).double()
    x = torch.randn(2, 13, 4, dtype=torch.float64)
    hidden, _ = encoder(x, torch.tensor([13, 13]))

    c1, b1, b2, b3, c2, c3 = encoder.blocks
    y0 = F.relu(conv_norm(c1.layers[0], x.transpose(1, 2), stride=2))
    y = F.relu(conv_norm(b1.layers[0], y0))
    y1 = F.relu(conv_norm(b1.layers[1], y) + conv_norm(b1.residuals[0], y0))
    earlier = [y0, y1] if residual == "dense" else [y1]
    y = conv_norm(b2.layers[1], F.relu(conv_norm(b2.layers[0], y1)))
    for index, tensor in enumerate(earlier):
        y = y + conv_norm(b2.residuals[index], tensor)
    y2 = F.relu(y)
    earlier = [y0, y1, y2] if residual == "dense" else [y2]
    y = conv_norm(b3.layers[0], y2)
    for index, tensor in enumerate(earlier):
        y = y + conv_norm(b3.residuals[index], tensor)
    y = F.relu(conv_norm(c2.layers[0], F.relu(y), dilation=2))
    y = F.relu(conv_norm(c3.layers[0], y))

    assert len(b3.residuals) == len(earlier)
    torch.testing.assert_close(hidden, y.transpose(1, 2))


@pytest.mark.parametrize("residual", ["dense", "plain"])
@pytest.mark.parametrize("separable", ["none", "wide", "all"])
def test_padding_does_not_change_a_result(residual, separable):
    encoder = ready(JasperEncoder(4, TABLE, residual, separable))
    lengths = torch.tensor([17, 12, 9, 2, 1])
    x = torch.randn(5, 17, 4)
    x[torch.arange(17) >= lengths[:, None]] = 0
    hidden, out = encoder(x, lengths)
    assert out.tolist() == [9, 6, 5, 1, 1]
    assert hidden.shape == (5, 9, 16)
    for index, length in enumerate(lengths):
        alone, _ = encoder(x[index : index + 1, :length], length[None])
        valid = hidden[index, : out[index]]
        torch.testing.assert_close(valid, alone[0], rtol=1e-5, atol=1e-5)
        assert not hidden[index, out[index] :].any()


def test_padded_frames_are_zero_after_every_block_in_training():
    encoder = JasperEncoder(4, TABLE, "dense", dropout=0.1)
    outputs = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda *args: outputs.append(args[-1]))
    x = torch.randn(2, 13, 4)
    x[1, 6:] = 0
    encoder(x, torch.tensor([13, 6]))
    assert [y.shape[1] for y in outputs] == [6, 8, 8, 10, 12, 16]
    assert all(not y[1, :, 3:].any() for y in outputs)


def test_stride_inside_the_network_starts_dense_residuals_anew():
    table = [
        {"channels": 6, "kernel": 3, "residual": True},
        {"channels": 6, "kernel": 3, "stride": 3},
        {"channels": 6, "kernel": 3, "stack": 2, "residual": True},
    ]
    encoder = JasperEncoder(4, table, "dense")
    hidden, lengths = encoder(torch.randn(2, 10, 4), torch.tensor([10, 3]))
    assert encoder.stride == 3
    assert [len(block.residuals) for block in encoder.blocks] == [1, 0, 1, 2]
    assert hidden.shape == (2, 4, 6)
    assert lengths.tolist() == [4, 1]


@pytest.mark.parametrize("residual", ["dense", "plain"])
def test_gradients_reach_every_parameter(residual):
    encoder = JasperEncoder(4, TABLE, residual, "all", dropout=0.1)
    hidden, _ = encoder(torch.randn(3, 20, 4), torch.tensor([20, 13, 8]))
    (hidden * torch.randn_like(hidden)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_dropout_of_a_row_goes_before_the_encoders():
    encoder = JasperEncoder(4, TABLE, dropout=0.1)
    found = [block.dropout.p for block in encoder.blocks]
    assert found == [0.1, 0.1, 0.1, 0.5, 0.1, 0.1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kernel": 4}, r"blocks\[1\]: kernel must be odd, got 4"),
        ({"kernel": 0}, r"blocks\[1\]: kernel must be a positive integer"),
        ({"channels": 1.5}, r"blocks\[1\]: channels must be a positive"),
        ({"repeat": 0}, r"blocks\[1\]: repeat must be a positive integer"),
        ({"stride": 2}, r"blocks\[1\]: stride must be 1 where residual"),
        ({"dilatation": 2}, r"blocks\[1\]: no key dilatation, only channels"),
    ],
)
def test_a_wrong_row_is_named(change, message):
    row = {"channels": 8, "kernel": 3, "residual": True, **change}
    with pytest.raises(ValueError, match=message):
        JasperEncoder(4, [TABLE[0], row])


@pytest.mark.parametrize("key", ["channels", "kernel"])
def test_a_missing_key_is_named(key):
    row = {"channels": 8, "kernel": 3}
    del row[key]
    with pytest.raises(ValueError, match=rf"blocks\[2\]: {key} is missing"):
        JasperEncoder(4, [*TABLE[:2], row])


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="blocks is empty"):
        JasperEncoder(4, [])
    with pytest.raises(ValueError, match="residual must be in .*'none'"):
        JasperEncoder(4, TABLE, residual="none")
    with pytest.raises(ValueError, match="separable must be in .*True"):
        JasperEncoder(4, TABLE, separable=True)


@pytest.mark.parametrize("frames", [1, 5, 24, 25])
@pytest.mark.parametrize(
    "kernel, stride, dilation",
    [(1, 1, 1), (1, 2, 1), (5, 1, 1), (5, 2, 1), (21, 1, 1), (21, 1, 2)]
    + [(5, 1, 3), (5, 2, 2)],
)
def test_the_depthwise_convolution_is_that_of_torch(
    kernel, stride, dilation, frames
):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(
        3, 6, frames, dtype=torch.float64, generator=generator
    ).requires_grad_()
    torch.manual_seed(0)
    plain = torch.nn.Conv1d(
        6,
        6,
        kernel,
        stride,
        padding=dilation * (kernel // 2),
        dilation=dilation,
        groups=6,
        bias=False,
    ).double()
    ours = DepthwiseConv1d(6, kernel, stride, dilation).double()
    ours.load_state_dict(plain.state_dict())
    results = []
    for layer in (plain, ours):
        x.grad = None
        y = layer(x)
        (y * torch.linspace(-1, 1, y.shape[2])).square().sum().backward()
        results.append((y, x.grad, layer.weight.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_an_exported_depthwise_convolution_is_a_plain_one():
    layer = DepthwiseConv1d(6, 5, dilation=2)
    traced = torch.jit.trace(layer, torch.randn(1, 6, 20))
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert kinds.count("aten::_convolution") == 1
    assert not {"aten::pad", "aten::transpose", "aten::mul"} & set(kinds)
