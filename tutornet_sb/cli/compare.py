"""``tutornet compare``: tables and reports of runs, and the runs of a plan."""

import os
from pathlib import Path

import typer
from typer import Argument, Option

from tutornet_sb.cli.common import running
from tutornet_sb.util import signals
from tutornet_sb.util.errors import InputError


def compare(
    what: list[Path] = Argument(
        metavar="PLAN|RUNS...",
        help="A plan (YAML) of runs, which are made first, or runs of "
        "train.py. A plan's recipe can run code: give only what you trust.",
    ),
    to: Path | None = Option(
        None,
        metavar="FOLDER",
        help="Write a report there (by default of a plan: report beside "
        "its runs), and of a plan the small files of its runs.",
    ),
    jobs: int | None = Option(
        None,
        min=1,
        help="Runs of a plan at a time; by default one a CPU, or 1 on GPU.",
    ),
    corpus: list[str] | None = Option(
        None, metavar="CORPUS", help="Only this corpus of a plan; repeatable."
    ),
    data: list[str] | None = Option(
        None, metavar="CORPUS=FOLDER", help="Where it is; repeatable."
    ),
    finished: bool = Option(
        False,
        "--finished",
        help="Report on the finished runs of a plan, and make none.",
    ),
    into: Path | None = Option(
        None,
        help="Markdown file to write the table into too, between the lines "
        "'<!-- NAME -->' and '<!-- end NAME -->'.",
    ),
    name: str = Option("results", help="NAME of the place in that file."),
):
    """Lay runs out in a table, and report on them; or make them by a plan.

    Runs that differ in their seed share a row. Finished runs of a plan are
    reused, and stopped ones resume. If a run fails the others continue, and
    the exit code is 1.
    """
    failed = 0
    is_plan = len(what) == 1 and what[0].suffix in (".yaml", ".yml")
    extras = ["experiments"] if is_plan or to is not None else []
    with running("compare", *extras):
        from tutornet_sb.experiments.compare import insert, short_table, table

        if is_plan:
            from tutornet_sb.experiments.plan import read_plan

            places = {}
            for word in data or []:
                key, _, folder = word.partition("=")
                if not folder:
                    raise InputError(
                        f"--data must be CORPUS=FOLDER, got {word}"
                    )
                places[key] = folder
            plan = read_plan(what[0], places, corpus or None)
            folders, failed = _carry_out(plan, to, jobs, finished)
            if not folders:
                remedy = "mend what failed, and give the same command again"
                if not failed:
                    remedy = f"`tutornet compare {what[0]}` makes the runs"
                _log(f"no run is finished, so no report is written: {remedy}")
        elif jobs is not None or corpus or data or finished:
            raise InputError(
                "--jobs, --corpus, --data and --finished are for a plan, a "
                ".yaml file"
            )
        else:
            # The logs of a plan's runs lie beside their folders.
            folders = [path for path in what if path.suffix != ".log"]
        text = short_table(folders) if folders else ""
        # A run that cannot be read is found before the report is written.
        if not is_plan and to is not None:
            _report(folders, to, "Comparison of runs")
        if into is not None and folders:
            insert(into, name, table(folders))
    if folders:
        typer.echo(text)
    if failed:
        raise typer.Exit(1)


def _carry_out(plan, to, jobs, finished):
    """Make the runs of a plan, unless it is for the finished ones, and report.

    Returns the folders with the small files of its finished runs, and how many
    failed.
    """
    import torch

    from tutornet_sb.experiments.jobs import find_finished, run_jobs
    from tutornet_sb.experiments.report import copy_small_files

    signals.install()
    to = plan.results / "report" if to is None else to
    if jobs is None:
        jobs = 1 if torch.cuda.is_available() else os.cpu_count()
    if finished:
        outcomes = find_finished(plan.jobs, plan.recipe)
        _log(f"{len(outcomes)} of {len(plan.jobs)} runs are finished")
    else:
        outcomes = run_jobs(plan.jobs, plan.recipe, jobs)
    failures = [outcome for outcome in outcomes if outcome.reason]
    made = {outcome.job.folder for outcome in outcomes if not outcome.reason}
    folders = [
        plan.recipe / job.folder for job in plan.jobs if job.folder in made
    ]
    copies = []
    if folders:
        _report(folders, to, plan.title)
        for folder in folders:
            copies.append(to / "runs" / folder.relative_to(plan.results))
            copy_small_files(folder, copies[-1])
    if failures:
        _log(f"{len(failures)} of {len(outcomes)} runs are missing:")
    for outcome in failures:
        _log(f"{outcome.job.folder} {outcome.state}: {outcome.reason}")
    return copies, len(failures)


def _report(folders, to, title):
    from tutornet_sb.experiments.report import write_report

    write_report(folders, to, title, _log)
    _log(f"the report is {to / 'report.html'}")


def _log(text):
    typer.echo(f"tutornet compare: {text}", err=True)
