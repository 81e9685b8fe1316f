"""The command line of train.py."""

import io
import sys
from contextlib import redirect_stderr

import speechbrain as sb

from tutornet_sb.util.errors import SettingError
from tutornet_sb.util.options import Options, read_options

HELP = """In this recipe:
  --debug               show the traceback of an error, before its line
  --KEY VALUE           give any value of hparams/base.yaml
Exit codes: 0 done, 1 unexpected error, 2 bad input or command line, 75 stopped
by a signal (the same command resumes)."""
# Options of SpeechBrain's short trial runs. They would leave stages behind that
# look finished.
NOT_OFFERED = "debug_batches", "debug_epochs", "debug_persistently", "test_only"


def parse_arguments(words):
    """Read a command line, and join the other processes if there are any.

    Returns the main file, the options of SpeechBrain and those of the recipe.
    """
    if not sys.stderr.isatty():
        # In a file each state of a bar would stay.
        words = [*words, "--noprogressbar"]
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            main_file, run_opts, typed = Options.from_command_line_args(words)
    except SystemExit as stop:
        if not stop.code:
            print(f"\n{HELP}")
            raise
        raise SettingError(
            printed.getvalue().strip().rpartition("error: ")[2]
            + ", see --help for the options"
        ) from None
    for name in NOT_OFFERED:
        if getattr(run_opts, name) != getattr(type(run_opts), name):
            raise SettingError(
                f"--{name} is not offered: a run of few batches would look "
                "like a finished one. Give a small corpus instead"
            )
    sb.utils.distributed.ddp_init_group(run_opts)
    return main_file, run_opts, read_options(typed)
