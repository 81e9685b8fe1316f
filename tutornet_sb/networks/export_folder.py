"""The folder that ``tutornet export`` writes, read without running its code."""

import json
from pathlib import Path

import safetensors
import safetensors.torch

from tutornet_sb.networks.acoustic_model import AcousticModel
from tutornet_sb.networks.description import LIMITS, rebuild
from tutornet_sb.networks.weights import fill_weights, refuse_large
from tutornet_sb.util.errors import InputError, MissingFileError, first_line

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
# "format" in config.json, before and with the version
EXPORT = "tutornet_sb export"
FORMAT = f"{EXPORT} 2"
# A vocabulary of 65536 symbols takes a megabyte.
_MOST_BYTES = 4 * 2**20


def is_export(folder):
    """Whether a folder has the ``config.json`` of an export, of any version."""
    try:
        config = _read(Path(folder) / CONFIG)
    except InputError:
        return False
    return str(config.get("format")).startswith(EXPORT)


def read_config(folder):
    """Read ``config.json`` of an export; what loading needs is checked."""
    path = Path(folder) / CONFIG
    config = _read(path)
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
    """Read a JSON object from an untrusted source."""
    if not path.is_file():
        raise MissingFileError(f"{path.parent} has no {path.name}")
    refuse_large(path, _MOST_BYTES)
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it holds no object")
    return content


def _refuse_constant(name):
    raise InputError(f"{name} is no number")


def check_symbols(content, path):
    """Refuse symbols, the blank's index or a sample rate that are damaged."""
    symbols, blank = content.get("symbols"), content.get("blank_index")
    rate, fault = content.get("sample_rate"), None
    if not isinstance(symbols, list) or not all(
        isinstance(symbol, str) for symbol in symbols
    ):
        fault = "'symbols' is no list of texts"
    elif type(blank) is not int or not 0 <= blank < len(symbols):
        fault = (
            f"'blank_index' {str(blank)[:80]} is none of its {len(symbols)} "
            "symbols"
        )
    elif type(rate) is not int or not 0 < rate <= LIMITS["sample_rate"]:
        fault = f"'sample_rate' is {str(rate)[:80]}"
    if fault:
        raise InputError(f"{path} is damaged: {fault}")


def load_export(folder, name):
    """Load an export's model, its symbols by index, and the CTC blank.

    No code of the folder is run; ``name`` is for error messages.
    """
    config = read_config(folder)
    path = folder / SAFETENSORS
    if not path.is_file():
        raise MissingFileError(f"{name} has no {SAFETENSORS}")
    try:
        weights = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        raise InputError(
            f"{path} cannot be read as safetensors: {first_line(error)}"
        ) from None
    try:
        model = rebuild(config["student"], weights)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    if not isinstance(model, AcousticModel):
        raise InputError(f"{name}: the description is not an AcousticModel's")
    fill_weights(model, weights, path)
    if model.features.sample_rate != config["sample_rate"]:
        raise InputError(
            f"{name}: 'sample_rate' in {CONFIG} must be that of its features, "
            f"{model.features.sample_rate} Hz, got {config['sample_rate']} Hz"
        )
    return model, config["symbols"], config["blank_index"]
