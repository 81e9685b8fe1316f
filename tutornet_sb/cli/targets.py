"""``tutornet targets``: a teacher's targets for a corpus, in a folder."""

from contextlib import ExitStack
from pathlib import Path

import typer
from typer import Argument, Option

from tutornet_sb.cli.common import running
from tutornet_sb.util import signals
from tutornet_sb.util.errors import InputError


def targets(
    context: typer.Context,
    to: Path = Option(..., metavar="FOLDER", help="The target store."),
    hparams: Path | None = Argument(
        None,
        metavar="HPARAMS",
        help="Main file of a recipe, followed by options as for train.py. "
        "Both can run code: give only what you trust.",
    ),
    check: bool = Option(
        False, "--check", help="Read all of the store, and fill nothing."
    ),
    repair: bool = Option(
        False, "--repair", help="Fill again what is damaged or missing."
    ),
):
    """Store a teacher's targets for a corpus, for runs with --targets store.

    What is in the store already is left alone, and a stopped call resumes.
    Under torchrun each process takes a share.
    """
    with running("targets"), ExitStack() as stack:
        from tutornet_sb.targets.extraction import repair_store
        from tutornet_sb.training.offline import fill_targets_of
        from tutornet_sb.util import processes
        from tutornet_sb.util.options import parse_command_line

        stack.enter_context(processes.ending_together())
        if check and repair:
            raise InputError("give --check or --repair, not both")
        if check:
            _check_store(to)
            return
        if hparams is None:
            raise InputError("HPARAMS is missing: it names the teacher")
        signals.install()
        words = [str(hparams), *context.args]
        file, run_opts, overrides = parse_command_line(words)
        if repair:
            damaged = processes.run_on_main(repair_store, [to])
            _show_damage(damaged if processes.rank() == 0 else [])
        overrides["store.folder"] = str(to)
        store = fill_targets_of(file, run_opts, overrides)
        if processes.rank() == 0:
            size = sum(path.stat().st_size for path in to.rglob("*")) / 1e6
            typer.echo(f"{to} holds {len(store)} utterances, {size:.1f} MB")


def _check_store(folder):
    from tutornet_sb.targets.store import TargetStore

    store = TargetStore(folder, partial=True)
    damaged = store.check()
    _show_damage(damaged)
    if damaged:
        raise InputError(
            f"{len(damaged)} shards of {folder} are damaged: the same command "
            "with HPARAMS and --repair fills them again"
        )
    typer.echo(f"{folder} holds {len(store)} utterances, all sound")


def _show_damage(damaged):
    for damage in damaged:
        typer.echo(str(damage))
        for key in damage.keys:
            typer.echo(f"    {key}")
