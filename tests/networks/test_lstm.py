"""The LSTM student: packed sequences as the reference, padding, options."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tutornet_sb.networks.lstm import LSTMEncoder

LENGTHS = torch.tensor([12, 17, 9, 2, 1])


def batch():
    """Features of odd and even lengths, zero on padded frames."""
    x = torch.randn(5, 17, 4)
    x[torch.arange(17) >= LENGTHS[:, None]] = 0
    return x


def copy_weights(encoder, reference):
    """Give a torch.nn.LSTM the weights of an encoder's layers."""
    ways = {"": encoder.forward_layers, "_reverse": encoder.backward_layers}
    for suffix, layers in ways.items():
        for index, layer in enumerate(layers):
            for name, value in layer.rnn.named_parameters():
                name = name.replace("l0", f"l{index}") + suffix
                getattr(reference, name).data.copy_(value.data)


@pytest.mark.parametrize("directions", [1, 2])
def test_layers_equal_packed_sequences(directions):
    encoder = LSTMEncoder(4, 6, 5, layers=3, directions=directions).eval()
    reference = torch.nn.LSTM(
        6, 5, 3, batch_first=True, bidirectional=directions == 2
    )
    copy_weights(encoder, reference)
    x = batch()
    hidden, lengths = encoder(x, LENGTHS)
    front = torch.relu(encoder.norm(encoder.conv(x.transpose(1, 2))))
    packed = pack_padded_sequence(
        front.transpose(1, 2), lengths, batch_first=True, enforce_sorted=False
    )
    expected, _ = pad_packed_sequence(reference(packed)[0], batch_first=True)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_padding_does_not_change_a_result(directions, stride):
    encoder = LSTMEncoder(
        4, 6, 5, layers=2, directions=directions, stride=stride
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


def test_one_direction_hears_no_more_than_its_convolution():
    encoder = LSTMEncoder(4, 6, 5, layers=2, directions=1, kernel_size=3)
    x = torch.randn(1, 16, 4)
    changed = x.clone()
    changed[:, 10:] = 0
    lengths = torch.tensor([16])
    a, _ = encoder.eval()(x, lengths)
    b, _ = encoder(changed, lengths)
    # Frame t of the output hears the input up to frame 2t + 1.
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5], b[:, 5])


@pytest.mark.parametrize("directions", [1, 2])
def test_gradients_reach_every_parameter(directions):
    encoder = LSTMEncoder(4, 6, 5, layers=2, directions=directions)
    hidden, _ = encoder(batch(), LENGTHS)
    (hidden * torch.randn_like(hidden)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        LSTMEncoder(4, 6, 5, layers=1, kernel_size=4)
    with pytest.raises(ValueError, match="directions must be 1 or 2, got 3"):
        LSTMEncoder(4, 6, 5, layers=1, directions=3)
