"""Speed of the students at full size, compared with Jasper DR 10x5.

> OMP_NUM_THREADS=1 python benchmarks/speed.py

Networks with random weights encode the same 10 seconds of noise, one after the
other in turns on one thread, in PyTorch, as ONNX and, of the students that
`tutornet export --int8` writes in int8, so too. Of each the median processor
time counts. The result is ``benchmarks/results/speed.json``, and its table goes
into docs/export.md between the marks of ``speed``. Needs 6 GB of memory.
"""

import statistics
import tempfile
import time
from io import StringIO
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML

from tutornet_sb.experiments.compare import insert, markdown_table
from tutornet_sb.inference.runner import OnnxModel
from tutornet_sb.publishing.onnx import NoInt8Error, quantize, write_onnx
from tutornet_sb.util.composition import include
from tutornet_sb.util.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "LibriSpeech" / "TutorNet"
# The first one is what the others are compared with.
NETWORKS = (
    ("jasper_dr", "full"),
    ("jasper_mini", "full"),
    ("lstm", "full"),
    ("lstm", "large"),
    ("gru", "full"),
    ("lstm_streaming", "full"),
    ("gru_streaming", "full"),
)
SECONDS, TURNS = 10.0, 5


def make_network(name, size):
    """Make a network of the recipe with random weights."""
    content = include(f"hparams/models/{name}.yaml", RECIPE, size)
    text = StringIO()
    YAML().dump(content, text)
    torch.manual_seed(0)
    return load_hyperpyyaml(text.getvalue())["model"].eval()


def find_forms(model, folder, wav):
    """Make functions that encode the waveform, by form, and their sizes."""
    batch, length = wav.unsqueeze(0), [len(wav)]
    parameters = sum(p.numel() for p in model.parameters())
    yield "PyTorch", 4 * parameters, lambda: model(batch, torch.ones(1))
    about = {
        "name": "",
        "sample_rate": model.features.sample_rate,
        "frame_period": model.frame_period,
        "symbols": [],
        "blank_index": 0,
    }
    paths = {"ONNX": folder / "model.onnx", "ONNX int8": folder / "int8.onnx"}
    write_onnx(model, paths["ONNX"], about)
    for form, path in paths.items():
        if form == "ONNX int8":
            # Jasper DR would take too much memory.
            if parameters > 1e8:
                return
            try:
                quantize(paths["ONNX"], path, [wav])
            except NoInt8Error:
                return
        graph = OnnxModel(path, threads=1)
        yield (
            form,
            path.stat().st_size,
            lambda graph=graph: graph.encode(batch, length),
        )


@torch.no_grad()
def main():
    """Measure, and write the result and its table."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    wav = 0.1 * torch.randn(round(16000 * SECONDS), generator=generator)
    results, calls, times = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, size in NETWORKS:
            model = make_network(name, size)
            for form, count, call in find_forms(model, Path(folder), wav):
                known = {"name": name, "size": size, "form": form}
                known["parameters"] = sum(p.numel() for p in model.parameters())
                results.append(known | {"bytes": count})
                calls.append(call)
                times.append([])
    for turn in range(TURNS + 1):
        for call, taken in zip(calls, times, strict=True):
            started = time.process_time()
            call()
            # The first turn warms up.
            if turn:
                taken.append(time.process_time() - started)
    for known, taken in zip(results, times, strict=True):
        known["real_time_factor"] = statistics.median(taken) / SECONDS
    teacher = {
        known["form"]: known["real_time_factor"]
        for known in results
        if (known["name"], known["size"]) == NETWORKS[0]
    }
    for known in results:
        # The teacher's int8 graph is not measured.
        factor = teacher.get(known["form"], teacher["ONNX"])
        known["times_as_fast"] = factor / known["real_time_factor"]
    write_json(
        ROOT / "benchmarks" / "results" / "speed.json",
        {
            "audio_seconds": SECONDS,
            "turns": TURNS,
            "threads": 1,
            "torch": torch.__version__,
            "results": results,
        },
    )
    rows = [["network", "size", "parameters (M)", "form", "MB"]]
    rows[0] += ["real-time factor", "times as fast as Jasper DR 10x5"]
    for known in results:
        rows.append(
            [
                known["name"],
                known["size"],
                f"{known['parameters'] / 1e6:.2f}",
                known["form"],
                f"{known['bytes'] / 1e6:.1f}",
                f"{known['real_time_factor']:.4f}",
                f"{known['times_as_fast']:.1f}",
            ]
        )
    table = markdown_table(rows)
    insert(ROOT / "docs" / "export.md", "speed", table)
    print(table)


if __name__ == "__main__":
    main()
