"""Weights of a network: read strictly, compared with the network, filled in."""

import zipfile
from pathlib import Path

import torch

from tutornet_sb.util.errors import InputError, MissingFileError, first_line

# The flag of a folder in a zip file
_FOLDER = 0x10


def refuse_large(path, most):
    """Raise an InputError if a file to be read at once has too many bytes."""
    size = Path(path).stat().st_size
    if size > most:
        raise InputError(
            f"{path} has {size} bytes, more than any such file ({most}): it is "
            "not read"
        )


def load_model_weights(model, path):
    """Load all weights of a model from a file by ``torch.save``; return it.

    Raises MissingFileError or InputError, and leaves the model as it was, if
    the file is missing, damaged or another network's.
    """
    return fill_weights(model, read_weights(path), path)


def read_weights(path):
    """Read weights by name from a file by ``torch.save``, without running code.

    Raises MissingFileError if there is none, InputError if it is damaged.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"no file of model weights at {path}")
    try:
        _check_archive(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    # Damage raises all kinds of errors.
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as model weights ({type(error).__name__}: "
            f"{first_line(error)}). Is it cut short, or not written by "
            "torch.save(model.state_dict(), path)?"
        ) from None
    if not isinstance(weights, dict):
        raise InputError(
            f"{path} holds a {type(weights).__name__}, not model weights; "
            "write it by torch.save(model.state_dict(), path)"
        )
    return weights


def _check_archive(path):
    """Raise where a zip file is none of ``torch.save``, or is damaged.

    ``torch.load`` ignores checksums, unpacks compressed entries, and gives
    uninitialised memory for an entry that claims to be a folder.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        total = sum(entry.file_size for entry in entries)
        if total > Path(path).stat().st_size or any(
            entry.compress_type or entry.external_attr & _FOLDER
            for entry in entries
        ):
            raise InputError("it is packed as torch.save never does")
        # Some versions of Python check this too.
        end = 0
        for entry in sorted(entries, key=lambda entry: entry.header_offset):
            if entry.header_offset < end:
                raise InputError("its entries overlap")
            end = entry.header_offset + zipfile.sizeFileHeader + entry.file_size
        if damaged := archive.testzip():
            raise InputError(f"the checksum of {damaged} is another")


def fill_weights(model, weights, path):
    """Give a model the weights read from `path`, or raise an InputError."""
    own = model.state_dict()
    shapes, found = (
        {key: tuple(getattr(value, "shape", ())) for key, value in part.items()}
        for part in (own, weights)
    )
    faults = {
        "missing": [key for key in shapes if key not in found],
        "unexpected": [key for key in found if key not in shapes],
        "of another shape": [
            f"{key} {found[key]} for {shape}"
            for key, shape in shapes.items()
            if found.get(key, shape) != shape
        ],
    }
    listed = "; ".join(
        f"{len(keys)} {fault}: {_some(keys)}"
        for fault, keys in faults.items()
        if keys
    )
    if listed:
        raise InputError(
            f"{path} holds the weights of another network: {listed} (of "
            f"{len(own)} entries). Build the network that was saved there, or "
            "give the file that belongs to this one."
        )
    odd = [key for key in own if _kind(weights[key]) != _kind(own[key])]
    if odd:
        raise InputError(
            f"{path} holds something else than the numbers of a layer under "
            f"{len(odd)} names: {_some(odd)}"
        )
    model.load_state_dict(weights)
    return model


def _kind(value):
    """Kind of a value, equal for those that may take each other's place."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return type(value).__name__
    kinds = value.is_meta, value.is_complex(), value.is_floating_point()
    return (*kinds, value.dtype == torch.bool)


def _some(items, most=3):
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
