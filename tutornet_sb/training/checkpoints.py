"""Checkpoints from which training goes on as if it had never stopped."""

import logging
import os
import random
import shutil
import time
import zlib
from functools import partial
from pathlib import Path

import numpy
import torch
import yaml
from speechbrain.utils.checkpoints import (
    METAFNAME,
    Checkpointer,
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import main_process_only

from tutornet_sb.util import processes
from tutornet_sb.util.errors import InputError
from tutornet_sb.util.files import read_json, sync, write_json

logger = logging.getLogger(__name__)

FILES = "files"


@register_checkpoint_hooks
class Stopwatch:
    """Seconds of training, kept across stops and continuations.

    Example
    -------
    >>> watch = Stopwatch()
    >>> watch.start()
    >>> watch.seconds >= 0
    True
    """

    def __init__(self):
        self.before = 0.0
        self.started = None

    def start(self):
        """Count from now on; what was counted is kept."""
        self.before = self.seconds
        self.started = time.monotonic()

    @property
    def seconds(self):
        """Seconds counted so far."""
        if self.started is None:
            return self.before
        return self.before + time.monotonic() - self.started

    @mark_as_saver
    def _save(self, path):
        write_json(path, self.seconds)

    @mark_as_loader
    def _load(self, path, end_of_epoch=False):
        self.before = read_json(path)


@register_checkpoint_hooks
class StepSize:
    """What decides the size of an optimizer step, which must not change.

    With more processes an epoch has fewer steps: the learning rate would not
    end where it should, and within an epoch some batches would be left out.
    """

    def __init__(self, grad_accumulation_factor):
        self.content = {
            "processes": processes.count(),
            "grad_accumulation_factor": grad_accumulation_factor,
        }

    @mark_as_saver
    def _save(self, path):
        write_json(path, self.content)

    @mark_as_loader
    def _load(self, path, end_of_epoch=False):
        for name, before in read_json(path).items():
            if self.content[name] != before:
                raise InputError(
                    f"this stage was begun with {name}: {before}, and now it "
                    f"is {self.content[name]}: use as many, or begin the stage "
                    f"anew by deleting {Path(path).parent.parent}"
                )


@partial(register_checkpoint_hooks, save_on_main_only=False)
class OfEachProcess:
    """What each process has of its own, in one file."""

    @mark_as_saver
    def _save(self, path):
        contents = processes.gather(self._content())
        if processes.rank() == 0:
            torch.save(contents, path)

    @mark_as_loader
    def _load(self, path, end_of_epoch=False):
        contents = torch.load(path, map_location="cpu")
        self._restore(contents[processes.rank()])


class RunningMeans(OfEachProcess):
    """Means of values that come one by one, kept across continuations.

    Example
    -------
    >>> means = RunningMeans()
    >>> means.add("loss", torch.tensor(1.0), 3)
    >>> means.add("loss", torch.tensor(2.0), 1)
    >>> means.values()
    {'loss': tensor(1.2500)}
    """

    def __init__(self):
        self.sums = {}

    def add(self, name, value, count=1):
        """Take one more value of a name, the mean of `count` values."""
        so_far, total = self.sums.get(name, (0, 0.0))
        self.sums[name] = (so_far + count, total + count * value.detach())

    def values(self):
        """Mean of each name, on the CPU."""
        return {name: (s / n).cpu() for name, (n, s) in self.sums.items()}

    def _content(self):
        return {name: (n, s.cpu()) for name, (n, s) in self.sums.items()}

    def _restore(self, content):
        self.sums = content


class RandomState(OfEachProcess):
    """State of the random generators of the CPU and of a device."""

    def __init__(self, device):
        self.device = torch.device(device)

    def _content(self):
        kind, keys, *rest = numpy.random.get_state()
        state = {
            "python": random.getstate(),
            "numpy": (kind, keys.tolist(), *rest),
            "cpu": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _restore(self, state):
        random.setstate(state["python"])
        kind, keys, *rest = state["numpy"]
        keys = numpy.array(keys, numpy.uint32)
        numpy.random.set_state((kind, keys, *rest))
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)


class AtomicCheckpointer(Checkpointer):
    """A checkpointer that never offers half of a checkpoint.

    SpeechBrain writes ``CKPT.yaml``, by which it knows a checkpoint, before the
    parameters. Here that file gets its name when all others are on the disk,
    and holds their sizes and checksums, which are checked before any is loaded.
    """

    def save_checkpoint(self, *args, **kwargs):
        """Save as SpeechBrain does, then make the checkpoint known."""
        try:
            checkpoint = super().save_checkpoint(*args, **kwargs)
            if checkpoint is not None:
                self._make_known(checkpoint)
        # torch.save on a full disk raises the second.
        except (OSError, RuntimeError):
            self._remove_unfinished()
            raise
        return checkpoint

    def save_and_keep_only(self, *args, importance_keys=(), **kwargs):
        """Save a checkpoint, then delete the least important ones."""
        # SpeechBrain adds to its default list with every call.
        super().save_and_keep_only(
            *args, importance_keys=list(importance_keys), **kwargs
        )

    # The main process decides for all: another may not see its files yet.

    def find_checkpoints(self, *args, **kwargs):
        """Find checkpoints as SpeechBrain does, the same in all processes."""
        return processes.run_on_main(super().find_checkpoints, args, kwargs)

    def delete_checkpoints(self, **kwargs):
        """Delete checkpoints as SpeechBrain does, in the main process."""
        processes.run_on_main(super().delete_checkpoints, kwargs=kwargs)

    def _save_checkpoint_metafile(self, fpath, *args, **kwargs):
        return super()._save_checkpoint_metafile(
            fpath.with_suffix(".unfinished"), *args, **kwargs
        )

    def _make_known(self, checkpoint):
        meta = checkpoint.path / METAFNAME
        unfinished = meta.with_suffix(".unfinished")
        files = {}
        for path in checkpoint.paramfiles.values():
            sync(path)
            files[path.name] = _describe(path)
        with open(unfinished, "a", encoding="utf-8") as file:
            yaml.dump({FILES: files}, file)
        sync(unfinished)
        os.replace(unfinished, meta)
        sync(checkpoint.path)

    def recover_if_possible(self, *args, **kwargs):
        """Go on from the newest checkpoint that is whole."""
        processes.run_on_main(self._tidy_up)
        return super().recover_if_possible(*args, **kwargs)

    def _tidy_up(self):
        """Remove what a killed process left, and set aside what is damaged."""
        self._remove_unfinished()
        for folder in self._list_checkpoint_dirs():
            reason = _find_damage(folder)
            if reason is not None:
                aside = folder.rename(
                    folder.with_name(f"DAMAGED+{folder.name}")
                )
                logger.warning(
                    "The checkpoint %s is damaged (%s) and is not used; it is "
                    "kept as %s",
                    folder,
                    reason,
                    aside.name,
                )

    @main_process_only
    def _remove_unfinished(self):
        for path in self.checkpoints_dir.glob("CKPT+*"):
            if path.is_dir() and not self._is_checkpoint_dir(path):
                shutil.rmtree(path)


def _describe(path):
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            checksum = zlib.crc32(block, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}


def _find_damage(folder):
    """What is wrong with a checkpoint, or None."""
    try:
        text = (folder / METAFNAME).read_text(encoding="utf-8")
        files = dict(yaml.safe_load(text)[FILES])
    # The kinds of damage raise all kinds of errors.
    except (ValueError, TypeError, KeyError, yaml.YAMLError):
        return f"{METAFNAME} is not what was written"
    for name, known in files.items():
        path = folder / Path(name).name
        if not path.is_file():
            return f"{name} is missing"
        if _describe(path) != known:
            return f"{name} is not what was written"
    return None
