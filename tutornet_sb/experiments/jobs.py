"""Runs of a plan, several at a time, with one display of their progress."""

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from tutornet_sb.experiments.plan import MATCHED, RUN_OPTIONS, Job, differing
from tutornet_sb.networks import runs
from tutornet_sb.util import signals

POLL = 0.5  # seconds
PATIENCE = 60.0  # seconds that a run has to end after SIGTERM


class Outcome(NamedTuple):
    """What became of a job, and what is wrong if anything is.

    Its state is ``made``, ``reused`` (it was finished), ``failed``, or ``left
    out`` (a run that it needs has failed).
    """

    job: Job
    state: str
    reason: str = ""


def run_jobs(jobs, recipe, at_once=1):
    """Run what is not finished, each with one thread; a failure stops no other.

    ``train.py`` resumes a run that was stopped. What a run prints is added to
    ``SEED.log`` beside its folder, after its command line. The log is locked
    while the run lives, so that a run which has outlived its ``tutornet
    compare`` is waited for instead of being trained twice. A signal that stops
    this process ends the runs. Returns an :class:`Outcome` for each job, in the
    order in which they ended.
    """
    # In a file each state of the bar would stay.
    with tqdm(total=len(jobs), unit="run", disable=None) as bar:
        runner = _Runner(jobs, recipe, at_once, bar)
        try:
            return runner.run()
        finally:
            # Another signal ends this process at once.
            with signals.finishing():
                runner.end_all()


class _Started(NamedTuple):
    job: Job
    process: subprocess.Popen
    since: float


class _Runner:
    def __init__(self, jobs, recipe, at_once, bar):
        self.waiting = list(jobs)
        self.recipe, self.at_once, self.bar = recipe, at_once, bar
        self.started, self.outcomes = {}, {}

    def run(self):
        while self.waiting or self.started:
            for started in list(self.started.values()):
                self.look_after(*started)
            # No run may start that end_all would miss.
            with signals.finishing():
                self.start_some()
            self.bar.set_postfix_str(
                ", ".join(map(self.describe, self.started.values()))
            )
            if self.started or self.waiting:
                time.sleep(POLL)
        return list(self.outcomes.values())

    def describe(self, started):
        """Run and seed, and how many of its epochs are finished."""
        folder = self.recipe / started.job.folder
        epochs = sum(
            len(path.read_bytes().splitlines())
            for path in (folder / runs.STAGES).glob(f"*/{runs.METRICS}")
        )
        name = "/".join(folder.parts[-2:])
        return f"{name}: epoch {epochs} of {started.job.epochs}"

    def start_some(self):
        """Start jobs that are ready, as many as there is room for."""
        for job in list(self.waiting):
            ended = [self.outcomes.get(folder) for folder in job.needs]
            failed = [o.job.folder for o in ended if o and o.reason]
            if failed:
                self.finish(job, "left out", f"it needs {failed[0]}")
            elif None not in ended and len(self.started) < self.at_once:
                self.start(job)

    def start(self, job):
        if is_made(job, self.recipe):
            reason = _other_teacher(job, self.recipe)
            self.finish(job, "failed" if reason else "reused", reason)
            return
        filled = job.with_epochs(self.recipe)
        folder = self.recipe / filled.folder
        folder.mkdir(parents=True, exist_ok=True)
        with open(log_of(folder), "a", encoding="utf-8") as log:
            try:
                # Held by the run too, which prints there, until it ends. Not by
                # files.locked, which waits, empties the file and does not hand
                # it on.
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # Another process still makes this run: look again later.
                return
            command = filled.command()
            print(f"$ {shlex.join(command)}", file=log, flush=True)
            process = subprocess.Popen(
                command,
                cwd=self.recipe,
                env={"OMP_NUM_THREADS": "1"} | os.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for this process, which then ends the runs.
                start_new_session=True,
            )
        self.waiting.remove(job)
        self.started[job.folder] = _Started(filled, process, time.monotonic())

    def look_after(self, job, process, since):
        """See whether a run has ended, and how."""
        code = process.poll()
        if code is None:
            return
        del self.started[job.folder]
        folder = self.recipe / job.folder
        log = log_of(folder)
        if code:
            lines = log.read_text("utf-8", errors="replace").split("\n")
            last = next(filter(str.strip, reversed(lines)), "")
            reason = f"{last} (exit code {code}, see {log})"
            self.finish(job, "failed", reason)
        elif not runs.read_results(folder):
            reason = f"it left no {runs.RESULTS}, see {log}"
            self.finish(job, "failed", reason)
        else:
            self.finish(job, "made", seconds=time.monotonic() - since)

    def finish(self, job, state, reason="", seconds=None):
        self.waiting = [
            other for other in self.waiting if other.folder != job.folder
        ]
        self.outcomes[job.folder] = Outcome(job, state, reason)
        line = f"{state}: {job.folder}"
        if seconds is not None:
            line += f" ({seconds:.0f} s)"
        if reason:
            line += f": {reason}"
        tqdm.write(line, file=sys.stderr)
        self.bar.update()

    def end_all(self):
        """Let no run outlive this process, if possible."""
        processes = [started.process for started in self.started.values()]
        for process in processes:
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)
                process.wait()


def is_made(job, recipe):
    """Whether a run is finished and had the same options.

    A compute-matched baseline keeps the epochs that it was made with: the same
    runs, timed again, would give others. Of other runs ``train.py`` decides
    whether they are the same experiment.
    """
    results = runs.read_results(recipe / job.folder)
    if results.get("format") != runs.FORMAT:
        return False
    made = dict(results["options"])
    if MATCHED in job.options:
        made.pop("epochs", None)
    # SpeechBrain's own options make no other experiment.
    other = set(differing(made, job.options)) - RUN_OPTIONS.keys()
    same_file = results["main_file"] == Path(job.main_file).name
    return same_file and not other


def find_finished(jobs, recipe):
    """Outcomes of the runs that are finished; none is started."""
    return [Outcome(job, "reused") for job in jobs if is_made(job, recipe)]


def log_of(folder):
    """Name the file beside a run's folder that holds what it has printed.

    Example
    -------
    >>> log_of(Path("results/mini/ctc_lstm/1")).name
    '1.log'
    """
    return folder.with_name(f"{folder.name}.log")


def _other_teacher(job, recipe):
    """Why a finished run is not to be reused, if its teacher is another now.

    Runs of a plan share their teacher, so that they differ by their options
    alone.
    """
    teacher = runs.read_results(recipe / job.folder)["teacher"]
    folder = job.options.get("teacher.folder")
    if teacher is None or folder is None:
        return ""
    now = runs.read_results(recipe / folder).get("weights_sha256")
    if teacher.get("weights_sha256") == now:
        return ""
    return (
        f"it was distilled from other weights than those of {folder} now: "
        "delete that run to make it again, or give the plan another "
        "results_folder"
    )


def _signal(process, number):
    # It leads a group of its own, with the processes that load data.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
