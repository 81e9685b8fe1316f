"""Weights of a network: read strictly, compared with the network, filled in."""

import zipfile
from pathlib import Path

import torch

from tutornet_sb.util.errors import InputError, MissingFileError

# The flag of a folder in a zip file
_FOLDER = 0x10


def _some(items, most=3):
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


def load_model_weights(model, path):
    """Load a model's weights, all of them and nothing else.

    Arguments
    ---------
    model : torch.nn.Module
        The model to fill. Left as it was if the file does not fit.
    path : str or pathlib.Path
        File written by ``torch.save(model.state_dict(), path)``.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file cannot be read as weights, or if they are those of another
        network.

    Example
    -------
    >>> path = getfixture("tmp_path") / "layer.ckpt"
    >>> torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    >>> load_model_weights(torch.nn.Linear(2, 2), path)
    Linear(in_features=2, out_features=2, bias=True)
    """
    return fill_weights(model, read_weights(path), path)


def read_weights(path):
    """Read a model's weights, and run nothing that may stand there instead.

    Arguments
    ---------
    path : str or pathlib.Path
        File written by ``torch.save(model.state_dict(), path)``.

    Returns
    -------
    dict
        Weights by name.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file cannot be read as weights.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"no file of model weights at {path}")
    try:
        _check_archive(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    # The kinds of damage raise all kinds of errors.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{path} cannot be read as model weights ({type(error).__name__}: "
            f"{reason}). Is it cut short, or not written by "
            "torch.save(model.state_dict(), path)?"
        ) from None
    if not isinstance(weights, dict):
        raise InputError(
            f"{path} holds a {type(weights).__name__}, not model weights; "
            "write it by torch.save(model.state_dict(), path)"
        )
    return weights


def _check_archive(path):
    """Raise where a file of ``torch.save`` is not what was written.

    ``torch.load`` looks at no checksum, unpacks whatever is packed, and gives
    what the memory held for an entry that says it is a folder.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        total = sum(entry.file_size for entry in entries)
        if total > Path(path).stat().st_size or any(
            entry.compress_type or entry.external_attr & _FOLDER
            for entry in entries
        ):
            raise InputError("it is packed as torch.save never does")
        # Some versions of Python look at this too.
        end = 0
        for entry in sorted(entries, key=lambda entry: entry.header_offset):
            if entry.header_offset < end:
                raise InputError("its entries overlap")
            end = entry.header_offset + zipfile.sizeFileHeader + entry.file_size
        for entry in entries:
            with archive.open(entry) as file:
                while file.read(2**20):
                    pass


def fill_weights(model, weights, path):
    """Give a model the weights that were read from a file, or none of them.

    Arguments
    ---------
    model : torch.nn.Module
        The model to fill.
    weights : dict
        All its weights by name.
    path : str or pathlib.Path
        The file, named in the error.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    ValueError
        If they are those of another network, or no plain numbers.
    """
    own = model.state_dict()
    refuse_other_weights(own, weights, path)
    odd = [key for key in own if _kind(weights[key]) != _kind(own[key])]
    if odd:
        raise InputError(
            f"{path} holds something else than the numbers of a layer under "
            f"{len(odd)} names: {_some(odd)}"
        )
    model.load_state_dict(weights, strict=True)
    return model


def _kind(value):
    """What may take a value's place without a loss of its meaning."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return type(value).__name__
    kinds = value.is_meta, value.is_complex(), value.is_floating_point()
    return (*kinds, value.dtype == torch.bool)


def refuse_other_weights(own, weights, path):
    """Compare names and shapes of a model's weights to those of a file.

    Arguments
    ---------
    own : dict
        The model's, by name.
    weights : dict
        The file's, by name.
    path : str or pathlib.Path
        The file, named in the error.

    Raises
    ------
    ValueError
        If they differ.
    """
    faults = {
        "missing": [key for key in own if key not in weights],
        "unexpected": [key for key in weights if key not in own],
        "of another shape": [
            f"{key} {_shape(weights[key])} for {_shape(own[key])}"
            for key in own
            if key in weights and _shape(weights[key]) != _shape(own[key])
        ],
    }
    if any(faults.values()):
        found = "; ".join(
            f"{len(keys)} {fault}: {_some(keys)}"
            for fault, keys in faults.items()
            if keys
        )
        raise InputError(
            f"{path} holds the weights of another network: {found} (of "
            f"{len(own)} entries). Build the network that was saved there, or "
            "give the file that belongs to this one."
        )


def _shape(value):
    return tuple(getattr(value, "shape", ()))
