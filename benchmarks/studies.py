"""What does distillation gain? Sets of runs, and a table of each.

> python benchmarks/studies.py seeds small --name digits \
      --data_folder /path/to/digits/LibriSpeech
> python benchmarks/studies.py pairs mini
> python benchmarks/studies.py delays mini
> python benchmarks/studies.py targets mini

``seeds`` is the student alone and by TutorNet; ``pairs`` is that for students
and teachers of several topologies; ``delays`` moves the teacher's frames back
for a student that hears only the past, or treats it otherwise; ``targets``
compares a target store with the teacher itself. All students of a study have
the same number of epochs; each teacher is trained once. Finished runs are
reused: a stopped study continues by the same command. The result files are
copied to ``benchmarks/results/NAME`` and their table is written into the
recipe's README between the marks of that name. What is given besides goes to
``train.py``.
"""

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "LibriSpeech" / "TutorNet"
# Epochs of each teacher in the study of pairs
TEACHERS = {"jasper_dr": 40, "conformer": 30}
STUDENTS = ("lstm", "gru", "jasper_mini", "transformer", "conformer")
DELAYS = (0, 4, 8, 12, 20)
FRAME = 0.02  # seconds, of the streaming students
# Without a delay
STREAMING = {
    "0_guided": ("--skd_loss", "guided"),
    "0_tolerance_4": ("--skd_tolerance", "4"),
    "0_lambda_1": ("--skd_weight_final", "1"),
}


class Run(NamedTuple):
    """One experiment: its folder, main file, and what else it is told."""

    folder: str
    hparams: str
    options: tuple = ()


def teacher_run(teacher):
    """The run that a student's run would make if there were no teacher."""
    options = ("--student_yaml", f"hparams/models/{teacher}.yaml")
    return Run(f"teacher_{teacher}", "teacher", options)


def seeds():
    """One student, from one teacher."""
    runs = [Run("ctc_lstm", "ctc_lstm"), Run("rkd+skd_lstm", "rkd_lstm")]
    return [teacher_run("jasper_dr")], runs


def pairs():
    """Every student alone and from every teacher."""
    teachers, runs = [], []
    for teacher, epochs in TEACHERS.items():
        run = teacher_run(teacher)
        values = f"{{teacher_epochs: {epochs}}}"
        options = (*run.options, "--corpus_overrides", values)
        teachers.append(run._replace(options=options))
    for student in STUDENTS:
        options = ("--student_yaml", f"hparams/models/{student}.yaml")
        runs.append(Run(f"ctc_{student}", "ctc_lstm", options))
        for teacher in TEACHERS:
            taught = ("--teacher_yaml", f"hparams/models/{teacher}.yaml")
            folder = f"rkd+skd_{student}_by_{teacher}"
            runs.append(Run(folder, "rkd_lstm", options + taught))
    return teachers, runs


def delays():
    """A streaming student, from one teacher, with several delays."""
    student = ("--student_yaml", "hparams/models/lstm_streaming.yaml")
    runs = [Run("ctc_lstm_streaming", "ctc_lstm", student)]
    # Not rkd_lstm_streaming.yaml, which says what came of this.
    for frames in DELAYS:
        delay = ("--delay", f"{frames * FRAME:.2f}")
        folder = f"rkd+skd_lstm_streaming_{frames}"
        runs.append(Run(folder, "rkd_lstm", (*student, *delay)))
    for name, options in STREAMING.items():
        folder = f"rkd+skd_lstm_streaming_{name}"
        options = (*student, "--delay", "0.00", *options)
        runs.append(Run(folder, "rkd_lstm", options))
    return [teacher_run("jasper_dr")], runs


def targets():
    """A student taught by a teacher, and from what it left on disk."""
    runs = [
        Run(f"rkd+skd_lstm_{kind}", "rkd_lstm", ("--targets", kind))
        for kind in ("online", "store")
    ]
    return [teacher_run("jasper_dr")], runs


STUDIES = {
    "seeds": seeds,
    "pairs": pairs,
    "delays": delays,
    "targets": targets,
}
TEACHER_SEED = 1234  # that of a teacher which train.py trains by itself


def main():
    """Run everything that is not finished and make the table."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("corpus", help="file in hparams/corpora, no .yaml")
    parser.add_argument("--name", help="of the results and their table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--only", nargs="+", help="folders of the study's runs that are made"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    arguments, rest = parser.parse_known_args()
    name = arguments.name or f"{arguments.study}_{arguments.corpus}"
    results = RECIPE / "results" / name
    results.mkdir(parents=True, exist_ok=True)

    def train(run, seed):
        path = f"{arguments.corpus}/{run.folder}/{seed}"
        command = [sys.executable, "train.py", f"hparams/{run.hparams}.yaml"]
        command += ["--corpus_yaml", f"hparams/corpora/{arguments.corpus}.yaml"]
        command += ["--results_folder", f"results/{name}"]
        command += ["--output_folder", f"results/{name}/{path}"]
        command += ["--seed", str(seed), "--noprogressbar", *run.options]
        log = results / f"{run.folder}_{seed}.log"
        # One thread a run: two runs then share two cores without waiting.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(log, "w", encoding="utf-8") as output:
            code = subprocess.call(
                [*command, *rest],
                cwd=RECIPE,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        print(f"{path}: " + (f"failed, see {log}" if code else "ok"))
        return code

    teachers, runs = STUDIES[arguments.study]()
    if arguments.only is not None:
        unknown = set(arguments.only) - {run.folder for run in runs}
        if unknown:
            parser.error(
                f"--only: {', '.join(sorted(unknown))} is not among "
                + ", ".join(run.folder for run in runs)
            )
        runs = [run for run in runs if run.folder in arguments.only]
    if {"--teacher_folder", "--teacher_source"} & set(rest):
        teachers = []
    first = [(run, TEACHER_SEED) for run in teachers]
    then = [(run, seed) for seed in arguments.seeds for run in runs]
    # The first of all makes the corpus, so it goes alone.
    codes = [train(*(first or then).pop(0))]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for jobs in (first, then):
            codes += pool.map(lambda job: train(*job), jobs)
    if any(codes):
        sys.exit(1)

    kept = ROOT / "benchmarks" / "results" / name
    copies = []
    for path in sorted(results.glob("*/*/*/results.json")):
        copy = kept / path.parent.relative_to(results)
        copy.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy / "results.json")
        copies.append(str(copy.relative_to(ROOT)))
    table = ["-m", "tutornet_sb.cli", "compare", *copies]
    table += ["--into", str(RECIPE / "README.md"), "--name", name]
    subprocess.run([sys.executable, *table], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
