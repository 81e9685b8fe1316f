"""Runs of a plan, several at a time, with one display of their progress."""

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from tutornet_sb.networks import runs
from tutornet_sb.util import signals
from tutornet_sb.util.files import write_atomically

# The command line that makes a run
COMMAND = "command.txt"
POLL = 0.5  # seconds
PATIENCE = 60.0  # seconds that a run has to end when it is told to


class Outcome(NamedTuple):
    """What became of a job.

    Attributes
    ----------
    job : Job
        The job.
    state : str
        ``made``, ``reused`` (it was finished), ``failed``, or ``left out``
        (for want of a run that failed).
    reason : str
        What is wrong, empty if nothing is.
    """

    job: object
    state: str
    reason: str = ""


def run_jobs(jobs, recipe, at_once=1):
    """Run what is not finished, and go on when one fails.

    A run that was stopped is continued by ``train.py``. What a run prints is
    added to ``SEED.log`` beside its folder, after its command line. The log is
    locked while the run lives, so that a run which has outlived its
    ``tutornet compare`` is waited for instead of being trained twice. A signal
    that stops this process (see :mod:`tutornet_sb.util.signals`) ends the runs.

    Arguments
    ---------
    jobs : list of Job
        In the order in which they start, if what they need is there.
    recipe : pathlib.Path
        Folder in which ``train.py`` is run.
    at_once : int
        How many run at the same time, each with one thread.

    Returns
    -------
    list of Outcome
        One for each job, in the order in which they ended.
    """
    display = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    runner = _Runner(jobs, recipe, at_once, display)
    try:
        with display:
            return runner.run()
    finally:
        # Without the display, which hides the cursor: another signal ends this
        # process at once.
        with signals.finishing():
            runner.end_all()


class _Started(NamedTuple):
    job: object
    process: subprocess.Popen
    task: int
    since: float


class _Runner:
    def __init__(self, jobs, recipe, at_once, display):
        self.waiting = list(jobs)
        self.recipe = recipe
        self.at_once = at_once
        self.display = display
        self.started, self.outcomes = {}, {}
        self.total = display.add_task("all runs", total=len(jobs), unit="runs")

    def run(self):
        while self.waiting or self.started:
            for started in list(self.started.values()):
                self.look_after(*started)
            # No run may start that end_all does not know.
            with signals.finishing():
                self.start_some()
            if self.started or self.waiting:
                time.sleep(POLL)
        return list(self.outcomes.values())

    def start_some(self):
        """Start jobs that are ready, as many as there is room for."""
        for job in list(self.waiting):
            missing = [
                self.outcomes[folder]
                for folder in job.needs
                if folder in self.outcomes and self.outcomes[folder].reason
            ]
            if missing:
                self.finish(
                    job, "left out", f"it needs {missing[0].job.folder}"
                )
            elif all(folder in self.outcomes for folder in job.needs):
                if len(self.started) < self.at_once:
                    self.start(job)

    def start(self, job):
        if is_made(job, self.recipe):
            reason = _taught_by_other(job, self.recipe)
            self.finish(job, "failed" if reason else "reused", reason)
            return
        filled = job.with_epochs(self.recipe)
        folder = self.recipe / filled.folder
        folder.mkdir(parents=True, exist_ok=True)
        with open(log_of(folder), "a", encoding="utf-8") as log:
            try:
                # Held by the run too, for it prints there, until it ends. Not
                # by files.locked, which waits, empties the file and does not
                # hand it on.
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # Another process still makes this run: see again later.
                return
            command = filled.command()
            print(f"$ {shlex.join(command)}", file=log, flush=True)
            if not runs.read_results(folder):
                # Now, for the run may outlive this process and end well.
                _write_command(filled, folder)
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
        task = self.display.add_task(
            _short(job), total=filled.epochs, unit="epochs"
        )
        self.started[job.folder] = _Started(
            filled, process, task, time.monotonic()
        )

    def look_after(self, job, process, task, since):
        """See how far a run is, or how it ended."""
        folder = self.recipe / job.folder
        code = process.poll()
        self.display.update(task, completed=count_epochs(folder))
        if code is None:
            return
        del self.started[job.folder]
        self.display.remove_task(task)
        log = log_of(folder)
        if code:
            # Results that it may have left are not to be reused.
            (folder / COMMAND).unlink(missing_ok=True)
            self.finish(
                job,
                "failed",
                f"{_last_line(log)} (exit code {code}, see {log})",
            )
            return
        if not runs.read_results(folder):
            reason = f"it left no {runs.RESULTS}, see {log}"
            self.finish(job, "failed", reason)
            return
        _write_command(job, folder)
        self.finish(job, "made", seconds=time.monotonic() - since)

    def finish(self, job, state, reason="", seconds=None):
        self.waiting = [
            other for other in self.waiting if other.folder != job.folder
        ]
        self.outcomes[job.folder] = Outcome(job, state, reason)
        told = f"{state}: {job.folder}"
        if seconds is not None:
            told += f" ({seconds:.0f} s)"
        if reason:
            told += f": {reason}"
        self.display.console.print(told, markup=False, highlight=False)
        self.display.advance(self.total)

    def end_all(self):
        """Let no run outlive this process, if it can be helped."""
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
    """Tell whether a run is finished and was told the same, in any order.

    The epochs of one at the cost of others are those that it was made with:
    the same runs, timed again, would say others.

    Arguments
    ---------
    job : Job
        The run.
    recipe : pathlib.Path
        The recipe's folder.

    Returns
    -------
    bool
        False too where the command is not known: ``train.py`` then says
        whether it is the same experiment.
    """
    folder = recipe / job.folder
    path = folder / COMMAND
    if not (path.is_file() and runs.read_results(folder)):
        return False
    made = _told(shlex.split(path.read_text("utf-8")))
    wanted = _told(job.command()[1:])
    if job.cost is not None:
        made.pop("--epochs", None)
    return made == wanted


def find_finished(jobs, recipe):
    """Find the runs that are finished, and start none.

    Arguments
    ---------
    jobs : list of Job
        Any.
    recipe : pathlib.Path
        The recipe's folder.

    Returns
    -------
    list of Outcome
        One for each that is finished.
    """
    return [Outcome(job, "reused") for job in jobs if is_made(job, recipe)]


def log_of(folder):
    """Name the file that holds what a run has printed.

    Arguments
    ---------
    folder : pathlib.Path
        Output folder of the run.

    Returns
    -------
    pathlib.Path
        Beside it.

    Example
    -------
    >>> log_of(Path("results/mini/ctc_lstm/1")).name
    '1.log'
    """
    return folder.with_name(f"{folder.name}.log")


def count_epochs(folder):
    """Count the epochs that a run has behind it, all stages together.

    Arguments
    ---------
    folder : pathlib.Path
        Output folder of the run.

    Returns
    -------
    int
        Epochs.
    """
    return sum(
        len(path.read_bytes().splitlines())
        for path in (folder / runs.STAGES).glob(f"*/{runs.TRAIN_LOG}")
    )


def _taught_by_other(job, recipe):
    """Say what is wrong if a finished run's teacher is no longer that of now.

    Runs of a plan share their teacher, so that they differ by what the plan
    says and by nothing else.
    """
    teacher = runs.read_results(recipe / job.folder)["teacher"]
    folder = job.options.get("teacher_folder")
    if teacher is None or folder is None:
        return ""
    now = runs.read_results(recipe / folder).get("weights_sha256")
    if teacher.get("weights_sha256") == now:
        return ""
    return (
        f"it was taught by other weights than those of {folder} now: delete "
        "that run to make it again, or give the plan another results_folder"
    )


def _write_command(job, folder):
    line = shlex.join(job.command()[1:]) + "\n"
    write_atomically(
        folder / COMMAND, lambda path: path.write_text(line, "utf-8")
    )


def _told(words):
    """What a command line says, by option, for their order does not matter."""
    told, option = {}, ""
    for word in words:
        if word.startswith("--"):
            option = word
        told.setdefault(option, []).append(word)
    return told


def _short(job):
    """Corpus, run and seed."""
    return "/".join(Path(job.folder).parts[-3:])


def _last_line(log):
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "")


def _signal(process, number):
    # It leads a group of its own, with the processes that load data.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
