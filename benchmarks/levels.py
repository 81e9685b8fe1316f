"""WER of a model at other recording levels, with an offset and faint noise.

> OMP_NUM_THREADS=1 python benchmarks/levels.py MODEL... --data LIBRISPEECH \
      --to benchmarks/results/levels/mini.csv

A model is a run, an export, an ONNX graph, or ``sherpa/model.onnx`` of an
export. Each transcribes a test split as recorded and with every change below,
rounded to 16 bits and cut off at full scale as a recording is. The rows of the
table (word error rates in %) are appended to the file.
"""

import argparse
import csv
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from tutornet_sb.corpora.librispeech import (
    find_librispeech,
    prepare_librispeech,
    read_manifest,
)
from tutornet_sb.inference.recogniser import load_recogniser
from tutornet_sb.inference.scores import score
from tutornet_sb.inference.speech import Utterance
from tutornet_sb.publishing.sherpa import load_sherpa
from tutornet_sb.util.files import read_json

GAINS = -30, -20, -12, -6, 0, 6  # dB
OFFSET = 0.05
# Of the corpus and of all models (Hz)
RATE = 16000
SNR = 30  # dB


def changes(wav):
    """Give an utterance in every form, by the name of the column."""
    for gain in GAINS:
        yield f"{gain:+d} dB", wav * 10 ** (gain / 20)
    yield f"offset {OFFSET}", wav + OFFSET
    # The same in every run and for every model
    noise = np.random.default_rng(len(wav)).standard_normal(len(wav))
    noise *= np.sqrt(np.mean(wav**2)) * 10 ** (-SNR / 20)
    yield f"noise {SNR} dB", wav + noise


def record(wav):
    """Round to 16 bits and cut off at full scale."""
    wav = np.clip(np.round(wav * 32768), -32768, 32767) / 32768
    return wav.astype(np.float32)


def load(path):
    """Load a model as a function from samples to a transcript."""
    tokens = path.parent / "tokens.txt"
    if tokens.is_file():
        config = read_json(path.parents[1] / "config.json")
        return load_sherpa(config["sherpa"]["recognizer"], path, tokens)
    model = load_recogniser(path)

    def transcribe(wav):
        wavs = torch.from_numpy(wav).unsqueeze(0)
        log_probs, frames = model.encode(wavs, torch.tensor([len(wav)]))
        best = log_probs[0, : int(frames[0])].argmax(-1).unique_consecutive()
        symbols = [i for i in best.tolist() if i != model.blank_index]
        return " ".join(model.decode(symbols).split())

    return transcribe


def read(data, split):
    """Read the utterances of a split."""
    root = find_librispeech(data)
    with tempfile.TemporaryDirectory() as folder:
        paths = prepare_librispeech(root, folder, splits=[split])
        items = read_manifest(paths[split], root).values()
    return [
        Utterance(item["wav"], item["wrd"], float(item["duration"]), RATE)
        for item in items
    ]


def main():
    """Measure, print the table and append it to the file."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--data", required=True, metavar="LIBRISPEECH")
    parser.add_argument("--split", default="test-clean")
    parser.add_argument("--to", type=Path, required=True, metavar="CSV")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    utterances = read(arguments.data, arguments.split)
    references = dict(enumerate(one.text for one in utterances))
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    rows = []
    for path in arguments.models:
        transcribe, texts = load(path), {}
        for index, one in enumerate(utterances):
            for name, wav in changes(one.read().numpy()):
                texts.setdefault(name, {})[index] = transcribe(record(wav))
        row = {"model": str(path), "split": arguments.split}
        row |= {
            name: f"{score(references, found)['wer']:.2f}"
            for name, found in texts.items()
        }
        command = shlex.join(["benchmarks/levels.py", *sys.argv[1:]])
        rows.append(row | {"version": commit, "command": command})
        print(*row.values(), sep="  ", flush=True)
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    is_new = not arguments.to.exists()
    with open(arguments.to, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
