"""The ``tutornet`` command."""

from pathlib import Path
from typing import Annotated

import typer

from tutornet_sb.files import write_atomically
from tutornet_sb.reporting.compare import table

app = typer.Typer(
    help="Tools around TutorNet runs; the recipe's train.py trains.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def tutornet():
    """Tools around TutorNet runs."""


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Output folders of train.py.")
    ],
    into: Annotated[
        Path | None,
        typer.Option(
            help="Write the table into this Markdown file too, between the "
            "lines '<!-- NAME -->' and '<!-- end NAME -->'."
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(help="NAME of the place in that file.")
    ] = "results",
):
    """Lay runs out in a table; runs that differ in their seed share a row."""
    try:
        text = table(runs)
        if into is not None:
            _insert(into, name, text)
    except (OSError, ValueError) as error:
        typer.echo(f"tutornet compare: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(text)


def _insert(path, name, text):
    """Put a text between two marks of a file."""
    content = path.read_text(encoding="utf-8")
    first, last = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    if first not in content or last not in content.partition(first)[2]:
        raise ValueError(
            f"{path} has no lines '{first.strip()}' and '{last}' to write "
            "between"
        )
    before, _, rest = content.partition(first)
    after = rest[rest.index(last) :]
    content = f"{before}{first}{text}\n{after}"
    write_atomically(
        path, lambda file: file.write_text(content, encoding="utf-8")
    )


if __name__ == "__main__":
    app()
