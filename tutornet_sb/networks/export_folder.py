"""The folder that ``tutornet export`` writes, read without running its code."""

import json
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch

from tutornet_sb.networks.acoustic_model import AcousticModel
from tutornet_sb.networks.description import LIMITS, rebuild
from tutornet_sb.networks.weights import fill_weights
from tutornet_sb.util.errors import InputError, MissingFileError, first_line

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
# "format" in config.json, before and with the version
EXPORT = "tutornet_sb export"
FORMAT = f"{EXPORT} 2"
# A vocabulary of 65536 symbols takes a megabyte.
_MOST_BYTES = 4 * 2**20


class ExportedModel(NamedTuple):
    """The network of an export, its symbols by index, and the CTC blank."""

    model: AcousticModel
    pieces: list[str]
    blank_index: int


def is_export(folder):
    """Whether a folder has the ``config.json`` of an export, of any version."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        return False
    text = _read(path)
    try:
        return str(_parse(text, path).get("format")).startswith(EXPORT)
    except InputError:
        return False


def read_config(folder):
    """Read ``config.json`` of an export; what loading needs is checked."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise MissingFileError(f"{folder} has no {CONFIG}")
    config = _parse(_read(path), path)
    if config.get("format") != FORMAT:
        raise InputError(
            f"{path} is of format {config.get('format')!r}, and this version "
            f"reads {FORMAT!r}: export the run again"
        )
    check_symbols(config, path)
    if not isinstance(config.get("student"), dict):
        raise InputError(f"{path} is damaged: it describes no 'student'")
    return config


def _read(path):
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise InputError(
            f"{path} has {size} bytes, more than the {_MOST_BYTES} that a "
            "description may take: it is not read"
        )
    return path.read_bytes()


def _parse(text, path):
    """Parse a JSON object from an untrusted source."""
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it holds no object")
    return content


def _refuse_constant(name):
    raise InputError(f"{name} is no number")


def check_symbols(content, path):
    """Refuse invalid ``symbols``, ``blank_index`` or ``sample_rate``."""
    symbols, blank = content.get("symbols"), content.get("blank_index")
    if not isinstance(symbols, list) or not all(
        isinstance(symbol, str) for symbol in symbols
    ):
        raise InputError(f"{path} is damaged: 'symbols' is no list of texts")
    if type(blank) is not int or not 0 <= blank < len(symbols):
        raise InputError(
            f"{path} is damaged: 'blank_index' {str(blank)[:80]} is none of "
            f"its {len(symbols)} symbols"
        )
    rate = content.get("sample_rate")
    if type(rate) is not int or not 0 < rate <= LIMITS["sample_rate"]:
        raise InputError(
            f"{path} is damaged: 'sample_rate' is {str(rate)[:80]}"
        )


def load_export(folder, name):
    """Load an ``ExportedModel`` from its description and safetensors.

    No code of the folder is run; ``name`` is for error messages.
    """
    config = read_config(folder)
    path = folder / SAFETENSORS
    if not path.is_file():
        raise MissingFileError(f"{name} has no {SAFETENSORS}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            shapes = {
                key: torch.empty(file.get_slice(key).get_shape(), device="meta")
                for key in file.keys()  # noqa: SIM118 (no mapping)
            }
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        raise InputError(
            f"{path} cannot be read as safetensors: {first_line(error)}"
        ) from None
    try:
        model = rebuild(config["student"], shapes, SAFETENSORS)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    if not isinstance(model, AcousticModel):
        raise InputError(f"{name}: the description is not an AcousticModel's")
    fill_weights(model, safetensors.torch.load_file(path), path)
    if model.features.sample_rate != config["sample_rate"]:
        raise InputError(
            f"{name}: 'sample_rate' in {CONFIG} must be that of its features, "
            f"{model.features.sample_rate} Hz, got {config['sample_rate']} Hz"
        )
    return ExportedModel(model, config["symbols"], config["blank_index"])
