"""``tutornet publish``: an exported model on the Hugging Face hub."""

from pathlib import Path

import typer
from typer import Argument, Option

from tutornet_sb.cli.common import LANGUAGE, LICENSE, running


def publish(
    folder: Path = Argument(metavar="DIR", help="Written by tutornet export."),
    name: str = Argument(
        metavar="NAME", help="OWNER/MODEL on the hub, made if new."
    ),
    private: bool = Option(False, "--private", help="Make it private."),
    revision: str | None = Option(
        None, metavar="BRANCH", help="Branch instead of main, made if new."
    ),
    license: str | None = LICENSE,
    language: str | None = LANGUAGE,
    message: str | None = Option(None, help="Message of the commit."),
    dry_run: bool = Option(
        False, "--dry-run", help="List the files, and send nothing."
    ),
):
    """Put an exported model on the Hugging Face hub, in one commit.

    README.md, the model card, is written from config.json each time. The token
    is the one that `hf auth login` or HF_TOKEN has set. HF_ENDPOINT names
    another hub.
    """
    with running("publish"):
        from tutornet_sb.publishing import hub

        options = {"license": license, "language": language}
        options |= {"private": private, "revision": revision}
        if dry_run:
            upload = hub.prepare(folder, name, **options)
        else:
            upload, commit, changed = hub.publish(
                folder, name, message=message, **options
            )
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
