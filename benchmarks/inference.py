"""What does a student save? Size, speed and errors in PyTorch, ONNX and int8.

> OMP_NUM_THREADS=1 python benchmarks/inference.py TEACHER RUN... --name mini

Runs are output folders of ``train.py`` that were scored on the same corpus.
Each is exported with ``--int8``, which writes a graph where that is faster;
then every form of every run transcribes the same utterances of the first test
set, one at a time on one thread, in turns, so that whatever else the machine
does befalls all of them alike. The result is
``benchmarks/results/inference_NAME.json``, and its table goes into the
recipe's README between the marks of ``inference_NAME``. Students are given as a
ratio to the teacher, the first run.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tutornet_sb.experiments.compare import insert, markdown_table, summarize
from tutornet_sb.inference.runner import OnnxModel
from tutornet_sb.inference.scores import score
from tutornet_sb.inference.speech import find_speech
from tutornet_sb.networks import runs
from tutornet_sb.networks.export_folder import SAFETENSORS
from tutornet_sb.publishing.export import export
from tutornet_sb.publishing.formats import transcriber
from tutornet_sb.publishing.model_card import INT8, ONNX
from tutornet_sb.util.files import write_json

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "recipes" / "LibriSpeech" / "TutorNet" / "README.md"


def pytorch(folder):
    """A run's model as a function from waveform to transcript."""
    model, tokenizer = runs.load_run(folder)
    return transcriber(model, tokenizer, tokenizer.unk_id())


def onnx(path):
    """The same of an ONNX file."""
    return OnnxModel(path, threads=1).transcribe


def main():
    """Measure, and write the result and its table."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--name", required=True)
    parser.add_argument("--data", help="the corpus, in LibriSpeech's layout")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    forms, results = {}, []
    exports = Path(tempfile.mkdtemp())
    for number, run in enumerate(arguments.runs):
        to = exports / str(number)
        export(run, to, int8=True, data=arguments.data)
        known = summarize(run)
        about = {key: known[key] for key in ("name", "method", "parameters")}
        made = [
            ("PyTorch", to / SAFETENSORS, pytorch(run)),
            ("ONNX", to / ONNX, onnx(to / ONNX)),
        ]
        if (to / INT8).is_file():
            made.append(("ONNX int8", to / INT8, onnx(to / INT8)))
        for form, path, transcribe in made:
            forms[number, form] = transcribe
            results.append(about | {"form": form, "bytes": path.stat().st_size})
    first = arguments.runs[0]
    model, _ = runs.load_run(first)
    speech = find_speech(
        first, arguments.data, summarize(first), model, needed=True
    )
    utterances = [(one.read().numpy(), one.text) for one in speech.test]
    seconds = sum(len(wav) for wav, _ in utterances)
    seconds /= model.features.sample_rate
    references = dict(enumerate(text for _, text in utterances))

    times = {key: [] for key in forms}
    for transcribe in forms.values():
        transcribe(utterances[0][0])
    for _ in range(arguments.repeats):
        for key, transcribe in forms.items():
            started = time.perf_counter()
            texts = [transcribe(wav) for wav, _ in utterances]
            times[key].append(time.perf_counter() - started)
            results[list(forms).index(key)]["wer"] = score(
                references, dict(enumerate(texts))
            )["wer"]
    for result, taken in zip(results, times.values(), strict=True):
        result["real_time_factor"] = statistics.median(taken) / seconds
    teachers = {
        form: row
        for (number, form), row in zip(forms, results, strict=True)
        if number == 0
    }
    for row in results:
        # A teacher without an int8 graph is used as the graph that it has.
        teacher = teachers.get(row["form"], teachers["ONNX"])
        for key in ("bytes", "real_time_factor"):
            row[f"{key}_ratio"] = row[key] / teacher[key]
    shutil.rmtree(exports)

    write_json(
        ROOT / "benchmarks" / "results" / f"inference_{arguments.name}.json",
        {
            "corpus": summarize(first)["corpus"],
            "split": speech.split,
            "utterances": len(utterances),
            "audio_seconds": seconds,
            "repeats": arguments.repeats,
            "threads": 1,
            "results": results,
        },
    )
    rows = [["network", "method", "form", "MB", "of the teacher's"]]
    rows[0] += ["real-time factor", "of the teacher's"]
    rows[0].append(f"{speech.split} WER (%)")
    for row in results:
        rows.append(
            [
                row["name"],
                row["method"],
                row["form"],
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['bytes_ratio']:.2f}",
                f"{row['real_time_factor']:.4f}",
                f"{row['real_time_factor_ratio']:.2f}",
                f"{row['wer']:.2f}",
            ]
        )
    table = markdown_table(rows)
    insert(README, f"inference_{arguments.name}", table)
    print(table)


if __name__ == "__main__":
    main()
