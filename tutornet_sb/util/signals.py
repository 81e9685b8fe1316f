"""Stopping on SIGTERM and SIGINT without losing what is done.

The first signal lets the work at hand be finished and saved, and the process
exits with :data:`EXIT_CODE`: the same command goes on. A second one of the same
kind exits at once, which harms nothing either, since every file gets its name
when it is whole.
"""

import atexit
import multiprocessing.util
import os
import signal
from contextlib import contextmanager

# EX_TEMPFAIL of sysexits.h: a failure that passes, try again
EXIT_CODE = 75

_state = {"owner": None, "received": [], "busy": 0, "resumes": True}


class Stopped(SystemExit):
    """A signal came, and what was worth it has been saved.

    Example
    -------
    >>> Stopped().code
    75
    """

    def __init__(self):
        super().__init__(EXIT_CODE)


def install(resumes=True):
    """Stop by signals as this module says, from now on.

    Call it in the main thread. Processes that are forked later are stopped as
    any other, but those that call :func:`leave_to_parent`.

    Arguments
    ---------
    resumes : bool
        Whether the same command resumes what is stopped.
    """
    _state.update(owner=os.getpid(), received=[], busy=0, resumes=resumes)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _handle)
    # Before the one of multiprocessing.util, which waits for children to end:
    # the last that is registered comes first.
    atexit.register(_end_workers)


def _end_workers():
    """End the workers that leave it to this process when they end."""
    if os.getpid() == _state["owner"]:
        # A loader takes the end of a worker for an error.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()


def requested():
    """Tell whether this process has been told to stop.

    Returns
    -------
    bool
        True from the first signal on.
    """
    return bool(_state["received"])


def check():
    """Stop here if this process has been told to.

    Raises
    ------
    Stopped
        If a signal has come.
    """
    if requested():
        raise Stopped


@contextmanager
def finishing():
    """Let no signal interrupt a block.

    The block calls :func:`check` where it can be left; in any case it is left
    at its end.

    Raises
    ------
    Stopped
        At the end of the block, if a signal has come.
    """
    _state["busy"] += 1
    try:
        yield
    finally:
        _state["busy"] -= 1
    if not _state["busy"]:
        check()


def leave_to_parent(worker=None):
    """Let the parent decide when this process ends.

    For the ``worker_init_fn`` of a loader: a signal that is sent to a whole
    group of processes must not take its workers from a process that has a step
    to finish. A second SIGTERM ends the worker, and so does the end of a parent
    that has called :func:`install`.

    Arguments
    ---------
    worker : int, optional
        Its number, unused.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(
        signal.SIGTERM, lambda signum, _: signal.signal(signum, signal.SIG_DFL)
    )


def _handle(signum, frame):
    del frame
    if os.getpid() != _state["owner"]:
        # A fork that has not been told anything
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        return
    if signum in _state["received"]:
        os._exit(128 + signum)
    _state["received"].append(signum)
    name = signal.Signals(signum).name
    then = "stopping"
    if _state["busy"]:
        then = "finishing the step and saving; another one stops at once"
    again = "goes on" if _state["resumes"] else "starts again"
    # Not by print, which the signal may have interrupted.
    os.write(2, f"\n{name}: {then}. The same command {again}\n".encode())
    if not _state["busy"]:
        raise Stopped
