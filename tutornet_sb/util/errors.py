"""Errors as a user sees them: one line with the remedy, and an exit code."""

import difflib
import errno
import logging
import os
import sys
import traceback
from contextlib import contextmanager

from tutornet_sb.util.redaction import hide_secrets, mute_http_clients

# Exit codes
UNEXPECTED, BAD_INPUT = 1, 2
# No space, quota reached, file too large; torch.save's words for such a disk
FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
FULL_IN_TORCH = "PytorchStreamWriter failed", "unexpected pos"
# Names that are listed when none is near
MANY = 40
WORKER = "in DataLoader worker process"


class InputError(ValueError):
    """Input of the user that cannot be used; the message names the remedy."""


class SettingError(InputError):
    """Wrong values or files of an experiment, which all processes find alike.

    ``faults`` has a line for each; the message is the first of them.
    """

    def __init__(self, fault, *more):
        super().__init__(fault)
        self.faults = (fault, *more)


class MissingFileError(SettingError, FileNotFoundError):
    """An experiment names a file that does not exist."""


class OccupiedError(InputError, FileExistsError):
    """A folder or file that would be written holds something else."""


class FullDiskError(InputError, OSError):
    """Nothing more can be written; the message says what stays."""


class OtherProcessError(RuntimeError):
    """Another process has failed, and this one cannot continue without it."""


def nearest(name, names):
    """Suggest the nearest of some names, or list them if none is near.

    Example
    -------
    >>> nearest("hiden_size", ["layers", "hidden_size"])
    'did you mean hidden_size?'
    >>> nearest("x", ["layers", "hidden_size"])
    'there are: layers, hidden_size'
    """
    names = list(map(str, names))
    close = [other for other in names if other.lower() == str(name).lower()]
    close += difflib.get_close_matches(str(name), names, n=1)
    if close:
        return f"did you mean {close[0]}?"
    more = ", ..." if len(names) > MANY else ""
    return f"there are: {', '.join(names[:MANY]) or 'none'}{more}"


def explain(error):
    """Describe an error in one line; returns the line and the exit code.

    The message of an :class:`InputError` was written for the user, and so was
    the system's about files. Anything else is unexpected.

    Example
    -------
    >>> explain(InputError("lr must be a number, got 'fast'"))
    ("lr must be a number, got 'fast'", 2)
    >>> explain(ZeroDivisionError("division by zero"))
    ('ZeroDivisionError: division by zero', 1)
    """
    text, kind = one_line(error), type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name:
        from tutornet_sb.util.environment import extra_of

        package = error.name.partition(".")[0]
        extra = extra_of(package)
        wanted = f"'tutornet-sb[{extra}]'" if extra else package
        return (
            f"the package {package} is needed and not installed: pip install "
            + wanted.replace("_", "-")
        ), BAD_INPUT
    if isinstance(error, InputError):
        if more := len(getattr(error, "faults", [text])) - 1:
            text += f" (and {more} more: tutornet config validate lists them)"
        return text, BAD_INPUT
    if getattr(error, "errno", None) in FULL or (
        isinstance(error, RuntimeError)
        and any(words in text for words in FULL_IN_TORCH)
    ):
        return (
            f"no space is left to write to ({text}). What was saved before "
            "stays: make room, and give the same command again"
        ), BAD_INPUT
    # The second is torch's, which is not imported for this.
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        return (
            f"no memory is left ({text}): lower batch_seconds, and give the "
            "same command again"
        ), BAD_INPUT
    if type(error).__module__.startswith("ruamel.yaml"):
        return f"invalid YAML: {yaml_problem(error)}", BAD_INPUT
    if isinstance(error, OSError) and error.strerror:
        return text, BAD_INPUT
    return f"{kind}: {text}", UNEXPECTED


def one_line(error):
    """The message of an error in one line, or its type if it has none.

    Example
    -------
    >>> one_line(KeyError("the store has no x"))
    'the store has no x'
    """
    text = ": ".join(map(str, error.args)) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        where = error.filename2 or error.filename
        text = f"{where}: {error.strerror}" if where else error.strerror
    if WORKER in text.partition("\n")[0]:
        # A data loader passes on the traceback, which ends with the message.
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def first_line(error):
    r"""First line of the message of an error of a library, without secrets.

    Example
    -------
    >>> first_line(ValueError("too long. Details:\n..."))
    'too long. Details:'
    """
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return hide_secrets(line)


def yaml_problem(error):
    """One line on what is wrong with a YAML text, and in which line."""
    mark = getattr(error, "problem_mark", None)
    context = getattr(error, "context_mark", None)
    # What is not closed is missed far behind it.
    if (getattr(error, "context", None) or "").startswith("while parsing"):
        mark = context or mark
    mark = mark or context
    where = f"line {mark.line + 1}: " if mark else ""
    problem = getattr(error, "problem", None) or getattr(error, "context", None)
    return where + " ".join((problem or one_line(error)).split())


@contextmanager
def failing_in_one_line(program, debug=False):
    """Turn an error into a line on standard error and an exit code.

    The traceback goes to the log file of the run, if there is one, and with
    ``debug`` to standard error too. An error that all processes find alike is
    printed by the main one.
    """
    mute_http_clients()
    try:
        yield
    except Exception as error:
        line, code = explain(error)
        log = _write_traceback(error)
        if code == UNEXPECTED:
            where = (
                f"the traceback is in {log}" if log else "--debug shows more"
            )
            line += f". This was not foreseen: {where}"
        # As torchrun sets it
        rank = int(os.environ.get("RANK", 0))
        if not (rank and isinstance(error, SettingError)):
            if debug:
                traceback.print_exception(error)
            from tqdm import tqdm

            where = f"[rank: {rank}] " if rank else ""
            # Makes way for progress bars
            tqdm.write(f"{where}{program}: {line}", file=sys.stderr)
        raise SystemExit(code) from None


def _write_traceback(error):
    """Write a traceback into the log file of the run; returns its name."""
    logger = logging.getLogger()
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            info = type(error), error, error.__traceback__
            handler.handle(
                logger.makeRecord(
                    __name__, logging.ERROR, "", 0, "Stopped by:", (), info
                )
            )
            return handler.baseFilename
    return None
