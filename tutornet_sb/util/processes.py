"""Communication between the processes of a run under ``torchrun``.

SpeechBrain joins them, wraps the modules and lets the main one save. Added
here: waits without a time limit, errors that end all, one share of the work
each, and the mean over a joint batch.
"""

import functools
import socket
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from speechbrain.utils.distributed import (
    MainProcessContext,
    ddp_prevent_block,
    get_rank,
    is_distributed_initialized,
)

from tutornet_sb.util.errors import InputError, OtherProcessError, SettingError

# The main process may work alone for days. One that dies is noticed without a
# limit, by its closed connections.
NO_LIMIT = timedelta(days=365)
# An error of the main process may be the same one, or the cause of it.
SECONDS_FOR_MAIN = 3.0
# torchrun ends the others, by SIGTERM, once it sees that one has failed.
SECONDS_FOR_TORCHRUN = 15.0
# What another machine has written may be seen late.
SECONDS_FOR_SHARED_FILES = 30.0
# Key of the processes' common store
MAIN_ENDS = "tutornet_sb main process ends"


def count():
    """Number of processes that share the work, 1 without ``torchrun``."""
    if is_distributed_initialized():
        return torch.distributed.get_world_size()
    return 1


def rank():
    """Number of this process, 0 for the main one."""
    if is_distributed_initialized():
        return torch.distributed.get_rank()
    return 0


@functools.lru_cache(maxsize=1)
def _group(world):
    """The processes of ``world``, waiting for each other without a limit."""
    return torch.distributed.new_group(backend="gloo", timeout=NO_LIMIT)


def _call(collective, *args, **kwargs):
    group = _group(torch.distributed.group.WORLD)
    collective(*args, group=group, **kwargs)


def run_on_main(func, args=(), kwargs=None):
    """Call a function in the main process while the others wait.

    However long it takes; all get the result, which must be picklable. An error
    in the main process raises OtherProcessError in the others. ``func`` may
    call this function in turn.

    Example
    -------
    >>> run_on_main(max, [2, 3])
    3
    """
    kwargs = kwargs or {}
    if ddp_prevent_block():
        return func(*args, **kwargs)
    answer = [None, None]
    try:
        if rank() == 0:
            with MainProcessContext():
                answer[0] = func(*args, **kwargs)
    except BaseException as error:
        answer[1] = f"{type(error).__name__}: {error}"
        raise
    finally:
        _call(torch.distributed.broadcast_object_list, answer, src=0)
    if answer[1] is not None:
        raise OtherProcessError(f"the main process has failed: {answer[1]}")
    return answer[0]


def main_first(func, args=(), kwargs=None):
    """Call a function in all processes, but in the main one before the others.

    What it downloads or makes is then available to the others. Errors are as
    in :func:`run_on_main`; each process gets its own result.
    """
    call, found = functools.partial(func, *args, **(kwargs or {})), []
    run_on_main(lambda: found.append(call()))
    if not found:
        # As in the main process: what it calls waits for nobody.
        with MainProcessContext():
            found.append(call())
    return found[0]


def wait_for_all():
    """Wait, without a time limit, until every process is here."""
    if not ddp_prevent_block():
        _call(torch.distributed.barrier)


def gather(content):
    """Give every process a list, by rank, of what each of them has.

    Example
    -------
    >>> gather("alone")
    ['alone']
    """
    if ddp_prevent_block():
        return [content]
    found = [None] * count()
    _call(torch.distributed.all_gather_object, found, content)
    return found


def own_share(batches):
    """Every n-th of the batches: those of this process, of n processes."""
    return list(batches)[rank() :: count()]


def mean(number, device):
    """Average a number over all processes; a scalar tensor on the device."""
    total = torch.tensor(float(number), device=device)
    if count() > 1:
        torch.distributed.all_reduce(total)
    return total / count()


def check_shared(path):
    """Raise InputError unless all machines see a file of the main process."""
    path = Path(path)
    wanted = run_on_main(path.read_bytes)
    end = time.monotonic() + SECONDS_FOR_SHARED_FILES
    while not (sees := path.is_file() and path.read_bytes() == wanted):
        if time.monotonic() > end:
            break
        time.sleep(1)
    hosts = gather(None if sees else socket.gethostname())
    for number, host in enumerate(hosts):
        if host is not None:
            raise InputError(
                f"process {number} on {host} does not see {path} as the main "
                "process has written it: the machines of a run must share "
                "the corpus and the results, under the same paths"
            )


def is_lost_connection(error):
    """Whether an error of torch or gloo is that another process is gone."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, torch.distributed.DistError)
        or "gloo/transport" in str(error)
    )


@contextmanager
def ending_together():
    """End all processes well, and let the one that failed first be reported.

    When one has failed, ``torchrun`` ends the others. One beside the main
    process leaves the report to that if it fails too, and one whose connection
    is lost leaves it to whichever has failed (OtherProcessError).
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        lost = is_lost_connection(error)
        # Not rank(): they may not have joined yet.
        if get_rank():
            # All find a SettingError alike.
            follows = isinstance(error, (OtherProcessError, SettingError))
            follows = follows or lost or _main_ends()
        else:
            follows = lost
            _announce_end()
        if follows and not isinstance(error, SystemExit):
            time.sleep(SECONDS_FOR_TORCHRUN)
        if lost:
            raise OtherProcessError(
                "the connection to another process is lost: its own message, "
                f"or that of its torchrun, says why ({error})"
            ) from None
        raise
    if is_distributed_initialized():
        # One that leaves while another still sends may abort in gloo's threads.
        wait_for_all()
        torch.distributed.destroy_process_group()


def _announce_end():
    """Let the others know that the main process ends early."""
    if is_distributed_initialized():
        try:
            _store().set(MAIN_ENDS, "1")
        # The others will notice without it.
        except RuntimeError:
            return


def _main_ends():
    """Whether the main process ends early, now or within seconds."""
    end = time.monotonic() + SECONDS_FOR_MAIN
    while time.monotonic() < end:
        try:
            if is_distributed_initialized() and _store().check([MAIN_ENDS]):
                return True
        # The main process keeps the store, and is gone.
        except RuntimeError:
            return True
        time.sleep(0.1)
    return False


def _store():
    return torch.distributed.distributed_c10d._get_default_store()
