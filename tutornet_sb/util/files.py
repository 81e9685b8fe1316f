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
    """Read a file written by :func:`write_json`.

    Arguments
    ---------
    path : str or pathlib.Path
        File to read.

    Returns
    -------
    dict
        What it holds.

    Raises
    ------
    ValueError
        If the file is damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({error}): delete it and run the same command "
            "again"
        ) from None


def write_atomically(path, write):
    """Write a file so that a reader never sees half of it.

    Arguments
    ---------
    path : str or pathlib.Path
        File to write.
    write : callable
        Called with the path of an unfinished file, which then takes the place
        of ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own, since two experiments may share a corpus, and the
    # final name in it, since torch.save writes that into the file.
    with tempfile.TemporaryDirectory(
        dir=path.parent, prefix=f"{path.name}.", suffix=UNFINISHED
    ) as folder:
        unfinished = Path(folder) / path.name
        write(unfinished)
        sync(unfinished)
        os.replace(unfinished, path)


def remove_unfinished(folder):
    """Remove what a killed process left of files that it was writing.

    Arguments
    ---------
    folder : str or pathlib.Path
        A folder in which no other process is writing; may be missing.
    """
    for path in list(Path(folder).rglob(f"*{UNFINISHED}")):
        if path.is_dir():
            shutil.rmtree(path)


@contextmanager
def locked(path, work):
    """Be the only process that does something, and wait for others to end.

    Arguments
    ---------
    path : str or pathlib.Path
        File that stands for it, which is made and left there.
    work : str
        What a process that waits is told of the other one.
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
    """Have a file, or the names in a folder, written to the disk.

    Arguments
    ---------
    path : str or pathlib.Path
        File or folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_folder_atomically(folder, write):
    """Write a folder so that a reader never sees half of it.

    Arguments
    ---------
    folder : str or pathlib.Path
        Folder to write; one that is there is replaced, with all it holds.
    write : callable
        Called with the path of an unfinished folder, which then takes the
        place of ``folder``.
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


def write_json(path, content, indent=2):
    """Write a JSON file in one piece.

    Arguments
    ---------
    path : str or pathlib.Path
        File to write.
    content : dict
        What it shall hold.
    indent : int, optional
        Blanks before what is within; None puts all on one line.
    """
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
