"""``tutornet publish``: an exported model on the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer

from tutornet_sb.cli.common import Language, License, running


def publish(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Written by tutornet export."),
    ],
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Repository on the hub, OWNER/MODEL; made if there is none.",
        ),
    ],
    private: Annotated[
        bool,
        typer.Option("--private", help="Make it visible to its owner only."),
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="BRANCH",
            help="Branch instead of the main one; made if there is none.",
        ),
    ] = None,
    license: License = None,
    language: Language = None,
    message: Annotated[
        str | None, typer.Option(help="Message of the commit.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="List what would be sent; send nothing."
        ),
    ] = False,
):
    """Put an exported model on the Hugging Face hub, in one commit.

    README.md, the model card, is written from config.json each time. The token
    is the one that `hf auth login` or HF_TOKEN has set. HF_ENDPOINT names
    another hub.
    """
    with running("publish"):
        from tutornet_sb.publishing import hub

        options = folder, name, private, revision, license, language
        if dry_run:
            upload = hub.prepare(*options)
        else:
            upload, commit, changed = hub.publish(*options, message)
    sizes = upload.sizes
    if dry_run:
        typer.echo(f"To {upload.url}, branch {upload.branch}, would go:")
        width = len(f"{sum(sizes.values()):,}")
        for path, size in sizes.items():
            typer.echo(f"    {size:{width},}  {path}")
    else:
        state = "holds now" if changed else "held all this already"
        typer.echo(f"{upload.url} {state}, commit {commit}:")
    typer.echo(f"{len(sizes)} files, {sum(sizes.values()):,} bytes")
