"""What the processes of a run under ``torchrun`` say to each other.

SpeechBrain joins them, wraps the modules and lets the main one save. Here is
what it leaves open: waits without a time limit, errors that end all, one share
of the work each, and the mean over a joint batch.
"""

import functools
import socket
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import (
    MainProcessContext,
    ddp_prevent_block,
    get_rank,
    is_distributed_initialized,
)

from tutornet_sb.util.errors import InputError
from tutornet_sb.util.files import read_json, write_json

# The main process may have days of work to do alone. One that dies is noticed
# without a limit, by its closed connections.
NO_LIMIT = timedelta(days=365)
# torchrun ends the others as soon as one that has failed is gone, which takes
# seconds on a busy machine.
SECONDS_FOR_THE_ONE_THAT_FAILED = 15.0
# What another machine has written may be seen late.
SECONDS_FOR_SHARED_FILES = 30.0


class OtherProcessError(RuntimeError):
    """Another process has failed, and this one cannot go on alone."""


def count():
    """Tell how many processes share the work.

    Returns
    -------
    int
        1 without ``torchrun``.
    """
    if is_distributed_initialized():
        return torch.distributed.get_world_size()
    return 1


def rank():
    """Tell which of the processes this is.

    Returns
    -------
    int
        0 for the main one.
    """
    if is_distributed_initialized():
        return torch.distributed.get_rank()
    return 0


@functools.lru_cache(maxsize=1)
def _group(world):
    """Processes of a group that wait for each other without a time limit."""
    del world  # Asked for anew when that is another.
    return torch.distributed.new_group(backend="gloo", timeout=NO_LIMIT)


def _talk(collective, *args, **kwargs):
    group = _group(torch.distributed.group.WORLD)
    collective(*args, group=group, **kwargs)


def run_on_main(func, args=(), kwargs=None):
    """Call a function in the main process while the others wait.

    As SpeechBrain's, but however long it takes, and what it raises ends all.

    Arguments
    ---------
    func : callable
        What to call. It may call this function in turn.
    args : sequence
        Its arguments.
    kwargs : dict
        Its arguments by name.

    Returns
    -------
    object
        What it returned, in every process; must be picklable.

    Raises
    ------
    OtherProcessError
        In the others, if it raised in the main process.

    Example
    -------
    >>> run_on_main(max, [2, 3])
    3
    """
    kwargs = kwargs or {}
    if ddp_prevent_block():
        return func(*args, **kwargs)
    answer = [None, None]
    if rank() == 0:
        try:
            with MainProcessContext():
                answer[0] = func(*args, **kwargs)
        except BaseException as error:
            answer[1] = f"{type(error).__name__}: {error}"
            _talk(torch.distributed.broadcast_object_list, answer, src=0)
            raise
    _talk(torch.distributed.broadcast_object_list, answer, src=0)
    if answer[1] is not None:
        raise OtherProcessError(f"the main process has failed: {answer[1]}")
    return answer[0]


def main_first(func, args=(), kwargs=None):
    """Call a function in all processes, but in the main one before the others.

    What it downloads or makes is then there for the others.

    Arguments
    ---------
    func : callable
        What to call.
    args : sequence
        Its arguments.
    kwargs : dict
        Its arguments by name.

    Returns
    -------
    object
        What it returned in this process.

    Raises
    ------
    OtherProcessError
        In the others, if it raised in the main process.

    Example
    -------
    >>> main_first(max, [2, 3])
    3
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
        _talk(torch.distributed.barrier)


def gather(content):
    """Give every process what each of them has.

    Arguments
    ---------
    content : object
        Of this process; must be picklable.

    Returns
    -------
    list
        By rank.

    Example
    -------
    >>> gather("alone")
    ['alone']
    """
    if ddp_prevent_block():
        return [content]
    found = [None] * count()
    _talk(torch.distributed.all_gather_object, found, content)
    return found


def own_share(batches):
    """Choose every so-manieth batch, so that each process has others.

    Arguments
    ---------
    batches : iterable
        The same in every process.

    Returns
    -------
    list
        Those of this process; all of them together are all batches.

    Example
    -------
    >>> own_share([[0, 1], [2]])
    [[0, 1], [2]]
    """
    return list(batches)[rank() :: count()]


def mean(number, device):
    """Average a number over all processes.

    Arguments
    ---------
    number : float
        Of this process.
    device : str or torch.device
        Where to compute the mean.

    Returns
    -------
    torch.Tensor
        Scalar, the same in every process.

    Example
    -------
    >>> mean(5, "cpu")
    tensor(5.)
    """
    total = torch.tensor(float(number), device=device)
    if count() > 1:
        torch.distributed.all_reduce(total)
    return total / count()


def check_shared(path):
    """Make sure that all machines of a run see the same folders.

    Arguments
    ---------
    path : str or pathlib.Path
        A file that the main process has written.

    Raises
    ------
    ValueError
        If another process does not see it as it was written.
    """
    path = Path(path)
    wanted = run_on_main(path.read_bytes)
    end = time.monotonic() + SECONDS_FOR_SHARED_FILES
    while not (sees := path.is_file() and path.read_bytes() == wanted):
        if time.monotonic() > end:
            break
        time.sleep(1)
    for number, host in enumerate(gather(None if sees else _host())):
        if host is not None:
            raise InputError(
                f"process {number} on {host} does not see {path} as the main "
                "process has written it: the machines of a run must share "
                "the corpus and the results, under the same paths"
            )


def _host():
    return socket.gethostname()


def is_lost_connection(error):
    """Tell whether an error says that another process cannot be reached.

    Arguments
    ---------
    error : BaseException
        As caught.

    Returns
    -------
    bool
        True for those of torch.distributed and of gloo.

    Example
    -------
    >>> is_lost_connection(RuntimeError("a disk is full"))
    False
    """
    return isinstance(error, RuntimeError) and (
        isinstance(error, torch.distributed.DistError)
        or "gloo/transport" in str(error)
    )


@contextmanager
def ending_together():
    """Let one process tell what has gone wrong in all, and end all well.

    ``torchrun`` ends the others when one has failed. So those beside the main
    one wait a little before they say what they have met: it may be the same, or
    but follow from it. So does one that has lost the connection to another.

    Raises
    ------
    OtherProcessError
        If the connection to another process is lost.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        lost = is_lost_connection(error)
        # Not rank(): they may not have joined yet.
        if get_rank() or lost:
            time.sleep(SECONDS_FOR_THE_ONE_THAT_FAILED)
        if lost:
            raise OtherProcessError(
                "the connection to another process is lost: what it says, or "
                f"its torchrun, tells why ({error})"
            ) from None
        raise
    if is_distributed_initialized():
        # One that leaves while another still talks may abort in gloo's threads.
        wait_for_all()
        torch.distributed.destroy_process_group()


@register_checkpoint_hooks
class StepSize:
    """What goes into a step of the optimizer, which must not change.

    With more processes an epoch has fewer steps: the learning rate would not
    end where it should, and within an epoch some batches would be left out.

    Arguments
    ---------
    grad_accumulation_factor : int
        Batches of each process.

    Example
    -------
    >>> StepSize(1).content
    {'processes': 1, 'grad_accumulation_factor': 1}
    """

    def __init__(self, grad_accumulation_factor):
        self.content = {
            "processes": count(),
            "grad_accumulation_factor": grad_accumulation_factor,
        }

    @mark_as_saver
    def _save(self, path):
        write_json(path, self.content)

    @mark_as_loader
    def _load(self, path, end_of_epoch=False):
        del end_of_epoch
        for name, before in read_json(path).items():
            if self.content[name] != before:
                raise InputError(
                    f"this stage was begun with {name}: {before}, and now it "
                    f"is {self.content[name]}: use as many, or begin the stage "
                    f"anew by deleting {Path(path).parent.parent}"
                )
