"""What is installed: extras, and torch with a torchaudio that loads beside it.

Imported before torch, so that what is missing is found at once.
"""

import importlib
import importlib.util
from importlib.metadata import version

from tutornet_sb.util.errors import InputError

# Packages of each extra of pyproject.toml, by the names they are imported by
EXTRAS = {
    "huggingface": ("transformers",),
    "export": ("onnx", "onnxruntime", "sherpa_onnx"),
    "experiments": ("matplotlib",),
}


def extra_of(package):
    """The extra that installs a package, or None.

    Example
    -------
    >>> extra_of("onnxruntime"), extra_of("torch")
    ('export', None)
    """
    owners = {name: extra for extra, names in EXTRAS.items() for name in names}
    return owners.get(package)


def require(*extras):
    """Raise ModuleNotFoundError if a package of these extras is missing."""
    for extra in extras:
        for package in EXTRAS[extra]:
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(
                    f"No module named {package!r}", name=package
                )


def check_torchaudio():
    """Load torchaudio; an InputError names the pair with torch to install."""
    try:
        importlib.import_module("torchaudio")
    except ModuleNotFoundError:
        raise
    # A symbol or a library that is missing, or another CUDA
    except (ImportError, OSError, RuntimeError):
        torch = version("torch").partition("+")[0]
        major, minor = map(int, torch.split(".")[:2])
        fitting = "2.11.0" if (major, minor) < (2, 13) else "2.11.1"
        raise InputError(
            f"torchaudio {version('torchaudio')} does not load beside torch "
            f"{version('torch')}: pip install torch=={torch} "
            f"torchaudio=={fitting}"
        ) from None
