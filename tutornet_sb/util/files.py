"""Files that are written in one piece and read with a clear error."""

import fcntl
import json
import logging
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from tutornet_sb.util.errors import InputError

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"


def read_json(path):
    """Read a JSON file; InputError if it is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({error}): delete it and run the same command "
            "again"
        ) from None


def write_json(path, content, indent=2):
    """Write a JSON file in one piece; without ``indent`` on one line."""
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_atomically(path, write):
    """Write a file such that a reader never sees half of it.

    ``write`` is called with the path of an unfinished file, which then takes
    the place of ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own, since two experiments may share a corpus, under
    # the final name, since torch.save writes that into the file.
    with tempfile.TemporaryDirectory(
        dir=path.parent, prefix=f"{path.name}.", suffix=UNFINISHED
    ) as folder:
        unfinished = Path(folder) / path.name
        write(unfinished)
        sync(unfinished)
        os.replace(unfinished, path)


def write_folder_atomically(folder, write):
    """Write a folder such that a reader never sees half of it.

    ``write`` is called with the path of an unfinished folder, which then
    replaces ``folder`` with all that it holds.
    """
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f"{folder.name}.", suffix=UNFINISHED
    ) as beside:
        # Made here, with the permissions of any new folder.
        unfinished, old = Path(beside) / folder.name, Path(beside) / "old"
        unfinished.mkdir()
        write(unfinished)
        if not folder.exists():
            os.replace(unfinished, folder)
            return
        os.replace(folder, old)
        try:
            os.replace(unfinished, folder)
        except OSError:
            os.replace(old, folder)
            raise


def remove_unfinished(folder):
    """Remove unfinished files of killed processes; no other may be writing."""
    for path in list(Path(folder).rglob(f"*{UNFINISHED}")):
        if path.is_dir():
            shutil.rmtree(path)


@contextmanager
def locked(path, work):
    """Hold a lock file, which is made and stays; wait for its holder.

    ``work`` completes the message "Another process ...: waiting for it".
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Another process %s: waiting for it", work)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sync(path):
    """Have a file, or the names in a folder, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
