"""Does the taught student beat the same student alone? Several seeds of each.

> python benchmarks/seeds.py digits --data_folder /path/to/digits/LibriSpeech \
      --corpus_yaml hparams/corpora/small.yaml
> python benchmarks/seeds.py mini

Runs ``train.py`` for the student alone and by TutorNet with each seed, at equal
student epochs and from one teacher; finished runs are reused. The result files
are copied to ``benchmarks/results/NAME`` and their table is written into the
recipe's README. What is given besides goes to ``train.py``.
"""

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "LibriSpeech" / "TutorNet"
METHODS = ("ctc_lstm", "rkd_lstm")


def main():
    """Run everything that is not finished and make the table."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("name", help="of the results and their table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    arguments, rest = parser.parse_known_args()
    results = RECIPE / "results" / arguments.name

    def train(method, seed):
        command = [sys.executable, "train.py", f"hparams/{method}.yaml"]
        command += ["--seed", str(seed), "--results_folder", str(results)]
        log = results / f"{method}_{seed}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        # One thread a run: two runs then share two cores without waiting.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(log, "w", encoding="utf-8") as output:
            code = subprocess.call(
                [*command, "--noprogressbar", *rest],
                cwd=RECIPE,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        print(
            f"{method} seed {seed}: " + (f"failed, see {log}" if code else "ok")
        )
        return code

    # The first run with a teacher trains it, so it goes ahead of the others.
    jobs = [(method, seed) for seed in arguments.seeds for method in METHODS]
    first = ("rkd_lstm", arguments.seeds[0])
    jobs.remove(first)
    codes = [train(*first)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        codes += pool.map(lambda job: train(*job), jobs)
    if any(codes):
        sys.exit(1)

    kept = ROOT / "benchmarks" / "results" / arguments.name
    copies = []
    for path in sorted(results.glob("*/*/*/results.json")):
        copy = kept / path.parent.relative_to(results)
        copy.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy / "results.json")
        copies.append(str(copy.relative_to(ROOT)))
    table = ["-m", "tutornet_sb.cli", "compare", *copies]
    table += ["--into", str(RECIPE / "README.md"), "--name", arguments.name]
    subprocess.run([sys.executable, *table], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
