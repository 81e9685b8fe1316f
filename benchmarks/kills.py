"""Runs that are killed at random moments, and go on by the same command.

> python benchmarks/kills.py
> python benchmarks/kills.py --signal SIGTERM --kills 10

A small run (teacher, store, RKD, SKD, evaluations; perturbed speed,
SpecAugment, one loader worker, a checkpoint every other step) is first left
alone. Then, in a folder of its own each time, it is killed at a random moment
of one of its parts, part by part in turn, and run again. All weights that it
leaves must be those of the run left alone, bit for bit, and so must its error
rates. The result goes to ``benchmarks/results/reliability/``.

A signal that comes while Python still imports what it needs ends it as any
program; nothing has been begun then.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tutornet_sb.corpora.minilibri import make_minilibri
from tutornet_sb.networks import runs
from tutornet_sb.util import signals
from tutornet_sb.util.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "LibriSpeech" / "TutorNet"
RESULTS = ROOT / "benchmarks" / "results" / "reliability"
TEACHER = Path("results") / "small" / "teacher_jasper_dr" / "1234"
STUDENT = Path("results") / "small" / "rkd+skd_lstm_by_jasper_dr" / "1234"
COMMAND = [
    sys.executable,
    str(RECIPE / "train.py"),
    str(RECIPE / "hparams" / "rkd_lstm.yaml"),
    "--noprogressbar",
    *("--corpus_yaml", "hparams/corpora/small.yaml"),
    *("--data_folder", "corpus"),
    *("--corpus_overrides", "{teacher_epochs: 3, epochs: 6, num_workers: 1}"),
    *("--student_overrides", "{channels: 32, hidden_size: 32}"),
    *("--rkd.share", "0.5"),
    *("--batch_seconds", "6"),
    *("--augmentation.speeds", "[95, 100, 105]"),
    *("--targets", "store"),
    *("--ckpt_interval_steps", "2", "--ckpt_interval_minutes", "0"),
]
# The parts of a run, in their order
PARTS = (
    "corpus",
    "teacher",
    "evaluation of the teacher",
    "store",
    "rkd",
    "evaluation after rkd",
    "skd",
    "evaluation after skd",
)


def part_of(folder):
    """Which part of a run is going on, told by its files."""
    student = folder / STUDENT / "stages"
    ends = (
        folder / TEACHER / "stages" / "ctc" / "save",
        folder / TEACHER / "stages" / "ctc" / "stage.json",
        folder / TEACHER / runs.RESULTS,
        student / "rkd" / "save",
        student / "rkd" / "stage.json",
        student / "skd" / "save",
        student / "skd" / "stage.json",
        folder / STUDENT / runs.RESULTS,
    )
    for part, end in zip(PARTS, ends, strict=True):
        if not end.exists():
            return part
    return None


def start(folder):
    """Start the command, its output in a file."""
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(
            COMMAND,
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def left_alone(folder):
    """Run to the end, and take the seconds of each part."""
    process, seconds = start(folder), dict.fromkeys(PARTS, 0.0)
    before = time.monotonic()
    while process.poll() is None:
        time.sleep(0.02)
        part, now = part_of(folder), time.monotonic()
        if part is not None:
            seconds[part] += now - before
        before = now
    check_end(process, folder)
    return seconds


def stopped(folder, part, wait, signum):
    """Run up to a moment of a part, then stop by a signal.

    Returns the part in which it was, and the exit code.
    """
    process = start(folder)
    while process.poll() is None and part_of(folder) != part:
        time.sleep(0.01)
    time.sleep(wait)
    found = part_of(folder)
    process.send_signal(signum)
    return found, process.wait()


def check_end(process, folder):
    """Show the end of the output of a run that failed."""
    if process.wait() != 0:
        tail = (folder / "output.txt").read_text().splitlines()[-30:]
        sys.exit("\n".join([*tail, f"a run failed in {folder}"]))


def outcome(folder):
    """All weights of a run, and its error rates."""
    weights, rates = {}, {}
    for run in (TEACHER, STUDENT):
        for path in sorted((folder / run).rglob(runs.WEIGHTS)):
            state = torch.load(path, map_location="cpu")
            for name, value in state.items():
                weights[f"{path.relative_to(folder)} {name}"] = value
        stages = read_json(folder / run / runs.RESULTS)["stages"]
        for stage, known in stages.items():
            for split, scores in known["splits"].items():
                rates[f"{run} {stage} {split}"] = (scores["wer"], scores["cer"])
    return weights, rates


def differences(folder, wanted):
    """Names of what is not as in the run left alone."""
    found = outcome(folder)
    names = []
    for ours, theirs, same in zip(
        found, wanted, (torch.equal, lambda a, b: a == b), strict=True
    ):
        names += sorted(ours.keys() ^ theirs.keys())
        names += [
            name
            for name in ours.keys() & theirs.keys()
            if not same(ours[name], theirs[name])
        ]
    return names


def main():
    """Kill and continue as often as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--signal", choices=["SIGKILL", "SIGTERM", "SIGINT"], default="SIGKILL"
    )
    args = parser.parse_args()
    signum, draw = getattr(signal, args.signal), random.Random(args.seed)
    trials = []
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        make_minilibri(
            work / "corpus",
            seed=3,
            train_minutes=1.2,
            dev_minutes=0.15,
            test_minutes=0.15,
            train_speakers=3,
            test_speakers=2,
        )

        def prepare(name):
            folder = work / name
            folder.mkdir()
            (folder / "corpus").symlink_to(work / "corpus")
            return folder

        alone = prepare("left alone")
        seconds = left_alone(alone)
        wanted = outcome(alone)
        print({part: round(value, 1) for part, value in seconds.items()})
        while len(trials) < args.kills:
            folder = prepare(str(len(trials)))
            part = PARTS[len(trials) % len(PARTS)]
            wait = draw.uniform(0, seconds[part])
            found, code = stopped(folder, part, wait, signum)
            if found is None:
                print("too late: that run was finished", flush=True)
                shutil.rmtree(folder)
                continue
            check_end(start(folder), folder)
            trial = {
                "part": found,
                "exit_code": code,
                "different": differences(folder, wanted),
                "left_unfinished": sorted(
                    str(path.relative_to(folder))
                    for path in (folder / "results").rglob("*unfinished*")
                ),
            }
            trials.append(trial)
            print(len(trials), trial, flush=True)
            shutil.rmtree(folder)
    told = {part: {signals.EXIT_CODE} for part in PARTS}
    told["corpus"].add(-signum)
    if signum == signal.SIGKILL:
        told = dict.fromkeys(PARTS, {-signum})
    result = {
        "signal": args.signal,
        "seed": args.seed,
        "seconds_of_parts": seconds,
        "tensors_compared": len(wanted[0]),
        "error_rates_compared": len(wanted[1]),
        "stopped": len(trials),
        "same_end": sum(not trial["different"] for trial in trials),
        "right_exit_code": sum(
            trial["exit_code"] in told[trial["part"]] for trial in trials
        ),
        "left_unfinished": sum(
            bool(trial["left_unfinished"]) for trial in trials
        ),
        "trials": trials,
        "torch": torch.__version__,
    }
    write_json(RESULTS / f"kills_{args.signal.lower()}.json", result)
    if any(trial["different"] for trial in trials):
        sys.exit("some runs ended otherwise than the one left alone")


if __name__ == "__main__":
    main()
