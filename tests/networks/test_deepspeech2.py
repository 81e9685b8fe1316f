"""DeepSpeech2: unfolded sums and torch's GRU as the reference, padding."""

import pytest
import torch
from torch.nn.functional import pad

from tutornet_sb.networks.deepspeech2 import DeepSpeech2Encoder

LENGTHS = torch.tensor([13, 24, 7, 2, 1])
BINS = 10


def make_encoder(**options):
    options = {"hidden_size": 5, "layers": 2, "output_size": 7, **options}
    encoder = DeepSpeech2Encoder(BINS, channels=3, **options)
    # As after training: what the norms make of a zero is not zero.
    with torch.no_grad():
        for norm in encoder.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
    return encoder.eval()


def batch():
    x = torch.randn(5, 24, BINS)
    x[torch.arange(24) >= LENGTHS[:, None]] = 0
    return x


def convolve(x, conv, norm, kernel, stride):
    """Sum of products over unfolded patches, then the normalisation."""
    x = pad(x, (kernel[1] // 2,) * 2 + (kernel[0] // 2,) * 2)
    patches = x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
    x = torch.einsum("bitfkl,oikl->botf", patches, conv.weight.double())
    values = norm.running_mean, norm.running_var, norm.weight, norm.bias
    mean, var, weight, bias = (v.double()[:, None, None] for v in values)
    return torch.relu((x - mean) / (var + 1e-3).sqrt() * weight + bias)


def test_an_utterance_goes_through_the_published_layers():
    encoder = make_encoder()
    x = torch.randn(1, 19, BINS)
    hidden, lengths = encoder(x, torch.tensor([19]))
    y = x.double().unsqueeze(1)
    y = convolve(y, encoder.convs[0], encoder.norms[0], (11, 41), (2, 2))
    y = convolve(y, encoder.convs[1], encoder.norms[1], (11, 21), (1, 2))
    assert y.shape == (1, 3, 10, 3)
    gru = torch.nn.GRU(9, 5, 2, batch_first=True, bidirectional=True).double()
    layers = encoder.layers
    for suffix, way in (
        ("", layers.forward_layers),
        ("_reverse", layers.backward_layers),
    ):
        for index, layer in enumerate(way):
            for name, value in layer.rnn.named_parameters():
                twin = name.replace("l0", f"l{index}") + suffix
                getattr(gru, twin).data.copy_(value.data)
    # Channels outside, frequency inside, as they come of the convolution.
    frames = torch.stack([y[0, :, t].reshape(-1) for t in range(10)])
    y = gru(frames.unsqueeze(0))[0] @ encoder.linear.weight.double().T
    y = torch.relu(y + encoder.linear.bias.double())
    assert lengths.tolist() == [10]
    torch.testing.assert_close(hidden.double(), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("directions", [1, 2])
def test_padding_does_not_change_a_result(directions):
    encoder = make_encoder(directions=directions)
    x = batch()
    hidden, out = encoder(x, LENGTHS)
    assert out.tolist() == [7, 12, 4, 1, 1]
    assert hidden.shape == (5, 12, 7)
    for index, length in enumerate(LENGTHS):
        alone, _ = encoder(x[index : index + 1, :length], length[None])
        valid = hidden[index, : out[index]]
        torch.testing.assert_close(valid, alone[0], rtol=1e-5, atol=1e-5)
        assert not hidden[index, out[index] :].any()


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_gradients_reach_every_parameter(cell):
    encoder = make_encoder(cell=cell).train()
    hidden, _ = encoder(batch(), LENGTHS)
    (hidden * torch.randn_like(hidden)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        make_encoder(layers=0)
