"""Errors as a user sees them: one line that says what to do, and a code."""

import difflib
import errno
import logging
import os
import sys
import traceback
from contextlib import contextmanager

from ruamel.yaml.error import MarkedYAMLError, YAMLError

from tutornet_sb.util.environment import extra_of

# Exit codes
UNEXPECTED, BAD_INPUT = 1, 2
# No space, quota reached, file too large
FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
# What torch.save says of such a disk
FULL_IN_TORCH = "PytorchStreamWriter failed", "unexpected pos"
# Names that are listed when none is near
MANY = 40
WORKER = "in DataLoader worker process"


class InputError(ValueError):
    """What a user gave cannot be used; the message names it and the remedy."""


class SettingError(InputError):
    """A wrong value or file of an experiment, which all processes see alike."""


class MissingFileError(SettingError, FileNotFoundError):
    """An experiment names a file that is not there."""


class OccupiedError(InputError, FileExistsError):
    """A folder or file that would be written holds something else."""


def nearest(name, names):
    """Suggest what a mistyped name was to be.

    Arguments
    ---------
    name : str
        As given.
    names : list of str
        Those there are.

    Returns
    -------
    str
        A question with the nearest, or the first of them if none is near.

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
    """Say in one line what went wrong, and tell whose fault it is.

    The message of an :class:`InputError` was written for the user, and so was
    that of the system about files. Anything else was not foreseen.

    Arguments
    ---------
    error : Exception
        As caught.

    Returns
    -------
    line : str
        What to print.
    code : int
        ``BAD_INPUT`` or ``UNEXPECTED``.

    Example
    -------
    >>> explain(InputError("lr is fast: give a number"))
    ('lr is fast: give a number', 2)
    >>> explain(ZeroDivisionError("division by zero"))
    ('ZeroDivisionError: division by zero', 1)
    """
    text = one_line(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        extra = extra_of(package)
        wanted = f"'tutornet-sb[{extra}]'" if extra else package
        return (
            f"the package {package} is needed and not installed: pip install "
            + wanted.replace("_", "-")
        ), BAD_INPUT
    if isinstance(error, InputError):
        return text, BAD_INPUT
    if getattr(error, "errno", None) in FULL or (
        isinstance(error, RuntimeError)
        and any(words in text for words in FULL_IN_TORCH)
    ):
        return (
            f"no space is left to write to ({text}). What was saved before "
            "stays: make room, and give the same command again"
        ), BAD_INPUT
    # That of torch, which is not imported for this
    if isinstance(error, MemoryError) or (
        type(error).__name__ == "OutOfMemoryError"
    ):
        return (
            f"no memory is left ({text}): lower batch_seconds, and give the "
            "same command again"
        ), BAD_INPUT
    if isinstance(error, YAMLError):
        return f"invalid YAML: {yaml_problem(error)}", BAD_INPUT
    if isinstance(error, OSError) and error.strerror:
        return text, BAD_INPUT
    return f"{type(error).__name__}: {text}", UNEXPECTED


def one_line(error):
    """Give the message of an error in one line.

    Arguments
    ---------
    error : Exception
        Also one that a process of a data loader hands on with a traceback.

    Returns
    -------
    str
        The message alone.

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
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def yaml_problem(error):
    """Say what is wrong with a YAML text, and in which line.

    Arguments
    ---------
    error : ruamel.yaml.error.YAMLError
        As caught.

    Returns
    -------
    str
        In one line.
    """
    if not isinstance(error, MarkedYAMLError):
        return one_line(error)
    mark = error.problem_mark or error.context_mark
    # What is not closed is missed far behind it.
    if (error.context or "").startswith("while parsing"):
        mark = error.context_mark or mark
    where = f"line {mark.line + 1}: " if mark else ""
    return where + " ".join((error.problem or error.context or "").split())


@contextmanager
def failing_in_one_line(program, debug=False):
    """Turn an error into one line on standard error and an exit code.

    A traceback goes to the log file of the run, if there is one. Of an error
    that all processes make alike only the main one speaks.

    Arguments
    ---------
    program : str
        What the line begins with.
    debug : bool
        Whether to show the traceback before it.

    Raises
    ------
    SystemExit
        With code ``BAD_INPUT`` or ``UNEXPECTED``.
    """
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
        _say(f"{program}: {line}", error, debug)
        raise SystemExit(code) from None


def _say(line, error, debug):
    # As torchrun sets it
    rank = int(os.environ.get("RANK", 0))
    if rank and isinstance(error, SettingError):
        return
    if rank:
        line = f"[rank: {rank}] {line}"
    if debug:
        traceback.print_exception(error)
    from tqdm import tqdm

    # Makes way for progress bars
    tqdm.write(line, file=sys.stderr)


def _write_traceback(error):
    """Write a traceback into the log file, and tell which that is."""
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
