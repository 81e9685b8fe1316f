"""Stopping on SIGTERM and SIGINT without losing finished work.

The first signal lets the step at hand be finished and saved, and the process
exits with :data:`EXIT_CODE`: the same command resumes. A second one of the same
kind exits at once, which harms nothing either, since every file gets its name
when it is complete.
"""

import atexit
import multiprocessing.util
import os
import signal
from contextlib import contextmanager

# EX_TEMPFAIL of sysexits.h: a temporary failure, try again
EXIT_CODE = 75

_state = {"owner": None, "received": [], "busy": 0, "resumes": True}


class Stopped(SystemExit):
    """A signal was received, and what was worth it has been saved."""

    def __init__(self):
        super().__init__(EXIT_CODE)


def install(resumes=True):
    """Stop by signals as this module says, from now on; for the main thread.

    ``resumes`` is whether the same command resumes what is stopped. Processes
    forked later are stopped as any other, unless they call
    :func:`leave_to_parent`.
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
    """Whether a signal to stop has been received."""
    return bool(_state["received"])


def check():
    """Raise :class:`Stopped` if a signal has been received."""
    if requested():
        raise Stopped


@contextmanager
def finishing():
    """Let no signal interrupt a block; :class:`Stopped` is raised at its end.

    The block may call :func:`check` where it can be left earlier.
    """
    _state["busy"] += 1
    try:
        yield
    finally:
        _state["busy"] -= 1
    if not _state["busy"]:
        check()


def leave_to_parent(worker=None):
    """Let the parent decide when this process ends: a loader's worker_init_fn.

    A signal that is sent to a whole group of processes must not take its
    workers from a process that has a step to finish. A second SIGTERM ends the
    worker, and so does the end of a parent that has called :func:`install`.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(
        signal.SIGTERM, lambda signum, _: signal.signal(signum, signal.SIG_DFL)
    )


def _handle(signum, frame):
    del frame
    if os.getpid() != _state["owner"]:
        # A fork that is not to finish anything
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
    again = "resumes" if _state["resumes"] else "starts again"
    # Not by print, which the signal may have interrupted.
    os.write(2, f"\n{name}: {then}. The same command {again}\n".encode())
    if not _state["busy"]:
        raise Stopped
