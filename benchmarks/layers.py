"""Cost of layers that compute what torch's do, in another way.

> python benchmarks/layers.py

Of bidirectional LSTM layers (packed sequences against reversing by index) and
of the depthwise convolutions of Jasper Mini (torch's against ours), both ways
compute the same from the same weights, in turns in one process; the median
ratios of their times are written to benchmarks/results/lstm_packing.json and
depthwise.json.
"""

import copy
import functools
import statistics
import time
from pathlib import Path

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tutornet_sb.networks.jasper import DepthwiseConv1d, JasperEncoder
from tutornet_sb.networks.recurrent import RecurrentEncoder
from tutornet_sb.util.composition import include
from tutornet_sb.util.files import write_json

RECIPE = Path(__file__).parents[1] / "recipes" / "LibriSpeech" / "TutorNet"
BATCH, FRAMES, SIZE, LAYERS, REPEATS = 8, 300, 96, 2, 7


def packed_twin(encoder):
    """The same layers as one torch LSTM for packed sequences."""
    lstm = torch.nn.LSTM(
        SIZE, SIZE, LAYERS, bidirectional=True, batch_first=True
    )
    pairs = (
        ("", encoder.layers.forward_layers),
        ("_reverse", encoder.layers.backward_layers),
    )
    with torch.no_grad():
        for suffix, layers in pairs:
            for index, layer in enumerate(layers):
                for name, value in layer.rnn.named_parameters():
                    twin = name.replace("l0", f"l{index}") + suffix
                    getattr(lstm, twin).copy_(value)
    return lstm


def lstm():
    """Measure bidirectional LSTM layers both ways."""
    torch.manual_seed(0)
    encoder = RecurrentEncoder(64, SIZE, SIZE, LAYERS).eval()
    lstm = packed_twin(encoder)
    lengths = torch.linspace(FRAMES // 2, FRAMES, BATCH).long()
    features = torch.randn(BATCH, FRAMES, 64)

    def reversed_by_index():
        return encoder(features, lengths)[0]

    def packed():
        x = torch.relu(encoder.norm(encoder.conv(features.transpose(1, 2))))
        halved = (lengths - 1) // 2 + 1
        x = pack_padded_sequence(x.transpose(1, 2), halved, True, False)
        return pad_packed_sequence(lstm(x)[0], batch_first=True)[0]

    difference = (reversed_by_index() - packed()).abs().max().item()
    ratio = ratio_of_times(
        lambda: packed().sum().backward(),
        lambda: reversed_by_index().sum().backward(),
    )
    write(
        "lstm_packing",
        largest_difference=difference,
        packed_time_over_reversed_time=ratio,
    )


def depthwise():
    """Measure Jasper Mini with torch's depthwise convolutions and with ours."""
    ratios = {}
    for size in ("small", "full"):
        torch.manual_seed(0)
        network = include("hparams/models/jasper_mini.yaml", RECIPE, size)
        options = {
            key: network[key] for key in ("blocks", "residual", "separable")
        }
        ours = JasperEncoder(network["n_mels"], **options)
        plain = copy.deepcopy(ours)
        for layer in plain.modules():
            if isinstance(layer, DepthwiseConv1d):
                layer.forward = functools.partial(
                    torch.nn.Conv1d.forward, layer
                )
        x = torch.randn(BATCH, FRAMES, network["n_mels"])
        lengths = torch.full((BATCH,), FRAMES)
        ratios[size] = compare_encoders(plain, ours, x, lengths)
    write("depthwise", torch_time_over_ours=ratios)


def compare_encoders(plain, ours, *inputs):
    """Ratios of times, of a training step and of inference."""

    def step(encoder):
        encoder(*inputs)[0].square().mean().backward()

    found = {"step": ratio_of_times(lambda: step(plain), lambda: step(ours))}
    with torch.no_grad():
        plain.eval(), ours.eval()
        found["inference"] = ratio_of_times(
            lambda: plain(*inputs), lambda: ours(*inputs)
        )
        expected, result = plain(*inputs)[0], ours(*inputs)[0]
    found["largest_difference"] = (expected - result).abs().max().item()
    return found


def ratio_of_times(first, second):
    """Median ratio of the times of two calls, in turns."""
    ratios = []
    for _ in range(REPEATS):
        seconds = []
        for call in (first, second):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def write(name, **result):
    """Write a result file and show it."""
    result |= {
        "repeats": REPEATS,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    path = Path(__file__).parent / "results" / f"{name}.json"
    write_json(path, result)
    print(name, result)


if __name__ == "__main__":
    lstm()
    depthwise()
