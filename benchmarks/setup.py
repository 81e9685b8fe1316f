"""What the set-up and the demo of a fresh clone cost on this machine.

> python benchmarks/setup.py

Processor time counts all processes and depends less than elapsed time on what
else the machine does. The result is ``results/setup.json``.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TO = ROOT / "benchmarks" / "results" / "setup.json"


def measure(folder, target):
    """Run a target of the Makefile; give its cost and its last lines."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    command = ["make", target, f"PYTHON={sys.executable}"]
    done = subprocess.run(
        command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    )
    cost = {
        "elapsed_seconds": round(time.monotonic() - started),
        "processor_seconds": round(seconds),
    }
    return cost, done.stdout.splitlines()[-12:]


def main():
    """Clone the last commit, measure, and write the result."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True)
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
        setup, _ = measure(clone, ".venv/ready")
        used = subprocess.check_output(
            ["du", "-sb", clone / ".venv"], text=True
        )
        demo, table = measure(clone, "demo")
    result = {
        "commit": commit.strip(),
        "python": sys.version.split()[0],
        "setup": setup | {"gigabytes": round(int(used.split()[0]) / 1e9, 1)},
        "demo": demo,
        "table": table,
    }
    TO.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(TO.read_text())


if __name__ == "__main__":
    main()
