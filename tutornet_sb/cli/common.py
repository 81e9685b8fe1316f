"""What the commands share."""

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated

import typer

from tutornet_sb.util import signals
from tutornet_sb.util.environment import check_torchaudio, require
from tutornet_sb.util.errors import failing_in_one_line

# Whether the command that runs shows tracebacks
DEBUG = ContextVar("debug", default=False)
# Of commands that take options of the recipe after their own
RECIPE_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}

License = Annotated[
    str | None,
    typer.Option(
        help="Licence of the model as the hub calls it, such as cc-by-4.0; by "
        "default that of the corpus, if known."
    ),
]
Language = Annotated[
    str | None,
    typer.Option(
        help="Language of the speech, such as en; by default that of the "
        "corpus, if known."
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Load a model that is described by a hyperparams.yaml, or a run "
        "of other parts than the recipe's networks have; either can run any "
        "code.",
    ),
]


@contextmanager
def running(command, *extras):
    """Run a command that needs extras, its errors and signals in one line."""
    with failing_in_one_line(f"tutornet {command}", DEBUG.get()):
        require(*extras)
        signals.install(resumes=False)
        check_torchaudio()
        yield
