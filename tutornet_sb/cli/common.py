"""What the commands share."""

from contextlib import contextmanager
from contextvars import ContextVar

from typer import Option

from tutornet_sb.util import signals
from tutornet_sb.util.environment import check_torchaudio, require
from tutornet_sb.util.errors import failing_in_one_line

# Whether the command that runs shows tracebacks
DEBUG = ContextVar("debug", default=False)
# Of commands that take options of the recipe after their own
RECIPE_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}

LICENSE = Option(
    None, help="Licence as the hub calls it; by default from the corpus."
)
LANGUAGE = Option(
    None, help="Language, such as en; by default that of the corpus."
)
TRUST_REMOTE_CODE = Option(
    False,
    "--trust-remote-code",
    help="Load a model that is described by a hyperparams.yaml, or a run "
    "with other parts than the recipe's networks: both can run any code.",
)


@contextmanager
def running(command, *extras):
    """Run a command that needs extras, its errors and signals in one line."""
    with failing_in_one_line(f"tutornet {command}", DEBUG.get()):
        require(*extras)
        signals.install(resumes=False)
        check_torchaudio()
        yield
