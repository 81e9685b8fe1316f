"""The ``tutornet`` command, a module for each of its commands.

They import what they need when they run: torch takes seconds, which help and
tab completion must not.
"""

import typer
from typer import Option

from tutornet_sb import __version__
from tutornet_sb.cli import (
    compare,
    config,
    export,
    layers,
    publish,
    targets,
    transcribe,
)
from tutornet_sb.cli.common import DEBUG, RECIPE_OPTIONS

app = typer.Typer(
    help="Tools around TutorNet runs; the recipe's train.py trains. Exit "
    "codes: 0 done, 1 unexpected error, 2 bad input or command line, 75 "
    "stopped by a signal.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Rich would take most of the time of --help.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted):
    if wanted:
        typer.echo(f"tutornet {__version__}")
        raise typer.Exit


@app.callback()
def tutornet(
    version: bool = Option(
        False,
        "--version",
        callback=_show_version,
        is_eager=True,
        help="Show the version and exit.",
    ),
    debug: bool = Option(
        False,
        "--debug",
        help="Show the traceback of an error, before its line.",
    ),
):
    """Tools around TutorNet runs."""
    DEBUG.set(debug)


app.command()(compare.compare)
app.command()(layers.layers)
app.command()(export.export)
app.command()(transcribe.transcribe)
app.command()(publish.publish)
app.command(context_settings=RECIPE_OPTIONS)(targets.targets)
app.add_typer(config.app, name="config")
