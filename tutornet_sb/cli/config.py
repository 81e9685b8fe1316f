"""``tutornet config``: the settings of experiments, without running them."""

import re
from pathlib import Path

import typer
from typer import Argument

from tutornet_sb.cli.common import DEBUG, RECIPE_OPTIONS, running
from tutornet_sb.util.errors import (
    BAD_INPUT,
    InputError,
    SettingError,
    failing_in_one_line,
)

app = typer.Typer(
    help="List, show and check the YAML files of a recipe.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
MAIN_FILE = Argument(
    metavar="MAIN_YAML",
    help="Main file of a recipe, followed by options as for train.py. Both can "
    "run code: give only what you trust.",
)


@app.command("ls")
def list_files(
    where: Path = Argument(
        Path(),
        metavar="FOLDER|MAIN_YAML",
        help="A recipe folder, or a main file in one.",
    ),
):
    """List a recipe's networks with their sizes, corpora, and presets."""
    with failing_in_one_line("tutornet config ls", DEBUG.get()):
        for folder in (where.resolve(), *where.resolve().parents):
            if (folder / "hparams" / "base.yaml").is_file():
                break
        else:
            raise InputError(
                f"{where} lies in no recipe: there is no hparams/base.yaml in "
                "it or above it"
            )
        for kind, describe in (
            ("models", _describe_network),
            ("corpora", _describe_file),
            ("presets", _describe_file),
        ):
            files = sorted((folder / "hparams" / kind).glob("*.yaml"))
            width = max((len(file.stem) for file in files), default=0)
            typer.echo(f"{kind}:")
            for file in files:
                typer.echo(f"  {file.stem:{width}}  {describe(file)}".rstrip())


def _describe_network(path):
    """Parameters by size, as comments state them."""
    from tutornet_sb.util.composition import read_comments

    counts = {}
    for key, text in read_comments(path).items():
        # The first comment is that of the file, and may state all sizes.
        found = re.findall(
            r"(?:`(\w+)`|(mini) corpus:?)? ?([\d,]+) param", text
        )
        for size, small, count in found:
            size = size or ("small" if small else key if counts else "full")
            counts.setdefault(size, count)
    return ", ".join(f"{size} {count}" for size, count in counts.items())


def _describe_file(path):
    """First sentence of its comment."""
    from tutornet_sb.util.composition import read_comments

    return next(iter(read_comments(path).values()), "").partition(". ")[0]


@app.command("show", context_settings=RECIPE_OPTIONS)
def show(context: typer.Context, main: Path = MAIN_FILE):
    """Print the YAML of an experiment with all references resolved."""
    with running("config show"):
        from tutornet_sb.training.experiment import find_recipe
        from tutornet_sb.training.settings import resolve_experiment
        from tutornet_sb.util.options import parse_command_line

        file, _, options = parse_command_line([str(main), *context.args])
        resolved = resolve_experiment(file, options, find_recipe(file))
    typer.echo(resolved.rstrip())


@app.command("validate", context_settings=RECIPE_OPTIONS)
def validate(context: typer.Context, main: Path = MAIN_FILE):
    """Check an experiment without starting it: all faults, one line each.

    The exit code is 0 if there is none, otherwise 2.
    """
    faults = []
    with running("config validate"):
        from tutornet_sb.training.experiment import Experiment
        from tutornet_sb.util.options import parse_command_line

        try:
            words = [str(main), *context.args]
            file, _, options = parse_command_line(words)
            Experiment.load(file, options)
        except SettingError as error:
            faults = error.faults
    for fault in faults:
        typer.echo(f"tutornet config validate: {fault}", err=True)
    if faults:
        raise typer.Exit(BAD_INPUT)
    typer.echo(f"{main}: no fault found")
