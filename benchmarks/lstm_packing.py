"""Cost of a bidirectional LSTM layer: packed against reversed by index.

> python benchmarks/lstm_packing.py

Both compute the same from the same weights, in turns in one process; the
median ratio of their times is written to benchmarks/results/lstm_packing.json.
"""

import statistics
import time
from pathlib import Path

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tutornet_sb.files import write_json
from tutornet_sb.networks.recurrent import RecurrentEncoder

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


def main():
    """Measure and write the result."""
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
    ratios = []
    for _ in range(REPEATS):
        seconds = []
        for encode in (packed, reversed_by_index):
            started = time.perf_counter()
            encode().sum().backward()
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[0] / seconds[1])
    result = {
        "largest_difference": difference,
        "packed_time_over_reversed_time": statistics.median(ratios),
        "repeats": REPEATS,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    path = Path(__file__).parent / "results" / "lstm_packing.json"
    write_json(path, result)
    print(result)


if __name__ == "__main__":
    main()
