"""What is installed: extras, and torch with a torchaudio that loads beside it.

To be imported before torch, so that what is missing is found in no time.
"""

import importlib
import importlib.util
from importlib.metadata import version

# Packages of each extra of pyproject.toml, by the names they are imported by
EXTRAS = {
    "huggingface": ("transformers",),
    "export": ("onnx", "onnxruntime", "sherpa_onnx"),
    "experiments": ("matplotlib", "scipy"),
}


def extra_of(package):
    """Find the extra that brings a package.

    Arguments
    ---------
    package : str
        Name that is imported.

    Returns
    -------
    str or None
        Name of the extra, or None if no extra brings it.

    Example
    -------
    >>> extra_of("onnxruntime"), extra_of("torch")
    ('export', None)
    """
    for extra, packages in EXTRAS.items():
        if package in packages:
            return extra
    return None


def require(*extras):
    """Check that the packages of extras are installed, without importing them.

    Arguments
    ---------
    *extras : str
        Names in ``EXTRAS``.

    Raises
    ------
    ModuleNotFoundError
        With the name of the first package that is missing.
    """
    for extra in extras:
        for package in EXTRAS[extra]:
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(
                    f"No module named {package!r}", name=package
                )


def check_torchaudio():
    """Load torchaudio, which must have been built for a torch like this one.

    Raises
    ------
    ImportError
        If it does not load; the message names the pair to install.
    """
    try:
        importlib.import_module("torchaudio")
    except ModuleNotFoundError:
        raise
    # A symbol or a library that is missing, or another CUDA
    except (ImportError, OSError, RuntimeError):
        torch = version("torch").partition("+")[0]
        major, minor = map(int, torch.split(".")[:2])
        fitting = "2.11.0" if (major, minor) < (2, 13) else "2.11.1"
        raise ImportError(
            f"torchaudio {version('torchaudio')} does not load beside torch "
            f"{version('torch')}: pip install torch=={torch} "
            f"torchaudio=={fitting}"
        ) from None
