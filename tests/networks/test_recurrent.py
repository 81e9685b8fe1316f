"""Recurrent students: packed sequences as the reference, padding, options."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tutornet_sb.networks.recurrent import RecurrentEncoder, RecurrentLayers

LENGTHS = torch.tensor([12, 17, 9, 2, 1])
TORCH = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}


def batch():
    """Features of odd and even lengths, zero on padded frames."""
    x = torch.randn(5, 17, 4)
    x[torch.arange(17) >= LENGTHS[:, None]] = 0
    return x


def make_reference(layers, cell, input_size):
    """The same layers as one of torch's, for packed sequences."""
    reference = TORCH[cell](
        input_size,
        layers.output_size // layers.directions,
        len(layers.forward_layers),
        batch_first=True,
        bidirectional=layers.directions == 2,
    )
    ways = {"": layers.forward_layers, "_reverse": layers.backward_layers}
    for suffix, way in ways.items():
        for index, layer in enumerate(way):
            for name, value in layer.rnn.named_parameters():
                name = name.replace("l0", f"l{index}") + suffix
                getattr(reference, name).data.copy_(value.data)
    return reference


def apply_packed(reference, x, lengths):
    packed = pack_padded_sequence(
        x, lengths, batch_first=True, enforce_sorted=False
    )
    y, _ = pad_packed_sequence(
        reference(packed)[0], batch_first=True, total_length=x.shape[1]
    )
    return y


@pytest.mark.parametrize("cell", TORCH)
@pytest.mark.parametrize("directions", [1, 2])
def test_layers_equal_packed_sequences(cell, directions):
    layers = RecurrentLayers(cell, 4, 5, layers=3, directions=directions)
    reference = make_reference(layers, cell, 4)
    # What stands on padded frames is nobody's business.
    x = torch.randn(5, 20, 4)
    torch.testing.assert_close(
        layers(x, LENGTHS),
        apply_packed(reference, x, LENGTHS),
        rtol=1e-5,
        atol=1e-6,
    )


def test_gradients_are_those_of_packed_sequences():
    layers = RecurrentLayers("lstm", 4, 5, layers=2)
    reference = make_reference(layers, "lstm", 4)
    weights = torch.randn(5, 20, 10)
    found, expected = (
        torch.randn(5, 20, 4, generator=torch.Generator().manual_seed(0))
        for _ in range(2)
    )
    found.requires_grad_()
    expected.requires_grad_()
    (weights * layers(found, LENGTHS)).sum().backward()
    (weights * apply_packed(reference, expected, LENGTHS)).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", TORCH)
def test_encoder_is_a_convolution_and_its_layers(cell):
    encoder = RecurrentEncoder(4, 6, 5, layers=2, cell=cell).eval()
    reference = make_reference(encoder.layers, cell, 6)
    x = batch()
    hidden, lengths = encoder(x, LENGTHS)
    front = torch.relu(encoder.norm(encoder.conv(x.transpose(1, 2))))
    expected = apply_packed(reference, front.transpose(1, 2), lengths)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", TORCH)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_padding_does_not_change_a_result(cell, directions, stride):
    encoder = RecurrentEncoder(
        4, 6, 5, layers=2, cell=cell, directions=directions, stride=stride
    ).eval()
    x = batch()
    hidden, out = encoder(x, LENGTHS)
    assert out.tolist() == [-(-n // stride) for n in LENGTHS.tolist()]
    assert hidden.shape == (5, out.max(), encoder.output_size)
    for index, length in enumerate(LENGTHS):
        alone, _ = encoder(x[index : index + 1, :length], length[None])
        valid = hidden[index, : out[index]]
        torch.testing.assert_close(valid, alone[0], rtol=1e-5, atol=1e-5)
        assert not hidden[index, out[index] :].any()


def test_one_direction_looks_ahead_no_further_than_its_convolution():
    encoder = RecurrentEncoder(4, 6, 5, layers=2, directions=1, kernel_size=3)
    x = torch.randn(1, 16, 4)
    changed = x.clone()
    changed[:, 10:] = 0
    lengths = torch.tensor([16])
    a, _ = encoder.eval()(x, lengths)
    b, _ = encoder(changed, lengths)
    # Frame t of the output depends on the input up to frame 2t + 1.
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5], b[:, 5])


@pytest.mark.parametrize("cell", TORCH)
@pytest.mark.parametrize("directions", [1, 2])
def test_gradients_reach_every_parameter(cell, directions):
    encoder = RecurrentEncoder(
        4, 6, 5, layers=2, cell=cell, directions=directions
    )
    hidden, _ = encoder(batch(), LENGTHS)
    (hidden * torch.randn_like(hidden)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_dropout_is_on_the_convolution_and_on_each_layer():
    encoder = RecurrentEncoder(4, 6, 5, layers=2, dropout=0.5)
    seen = []
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(
                lambda _, args, output: seen.append((args[0], output))
            )
    hidden, _ = encoder(batch(), LENGTHS)
    # Convolution, first layer, second layer.
    assert [x.shape[-1] for x, _ in seen] == [6, 10, 10]
    for before, after in seen:
        kept = after != 0
        torch.testing.assert_close(after[kept], 2 * before[kept])
        assert (before[~kept] != 0).any()
    torch.testing.assert_close(hidden, seen[-1][1], rtol=0, atol=0)


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        RecurrentEncoder(4, 6, 5, layers=1, kernel_size=4)
    with pytest.raises(ValueError, match=r"kernel_size \(3\), got 4"):
        RecurrentEncoder(4, 6, 5, layers=1, kernel_size=3, stride=4)
    with pytest.raises(ValueError, match="directions must be 1 or 2, got 3"):
        RecurrentEncoder(4, 6, 5, layers=1, directions=3)
    with pytest.raises(ValueError, match="cell .*lstm.*gru.*got 'rnn'"):
        RecurrentEncoder(4, 6, 5, layers=1, cell="rnn")
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        RecurrentEncoder(4, 6, 5, layers=0)
