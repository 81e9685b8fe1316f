"""A network as plain data, and made from it without running other code."""

import functools
import importlib
import math
import re

import torch
from torch.nn.modules import module as registration

from tutornet_sb.networks.weights import refuse_other_weights
from tutornet_sb.util.errors import InputError

# !new:package.module.Class and the like
TAG = re.compile(r"!(new|name|apply):([\w.]+)")
# What a description may name. All of it makes a layer from sizes and options
# and reads or writes nothing; see _check_arguments for the rest.
ALLOWED = frozenset(
    f"{module}.{name}"
    for module, names in {
        "tutornet_sb.networks.acoustic_model": (
            "AcousticModel LogMelFeatures SpectrogramFeatures"
        ),
        "tutornet_sb.networks.deepspeech2": "DeepSpeech2Encoder",
        "tutornet_sb.networks.huggingface": (
            "Waveform WhisperFeatures Wav2Vec2Encoder WhisperEncoder "
            "make_network"
        ),
        "tutornet_sb.networks.jasper": "JasperEncoder",
        "tutornet_sb.networks.lobes": "CRDNNEncoder ContextNetEncoder",
        "tutornet_sb.networks.recurrent": "RecurrentEncoder",
        "tutornet_sb.networks.transformer": "TransformerEncoder",
        "speechbrain.lobes.models.CRDNN": "CRDNN",
        "speechbrain.lobes.models.ContextNet": "ContextNet",
        "speechbrain.lobes.models.convolution": "ConvolutionFrontEnd",
        "speechbrain.lobes.models.transformer.TransformerASR": "TransformerASR",
        "speechbrain.nnet.RNN": "LSTM GRU RNN",
        "speechbrain.nnet.activations": "Swish",
        "torch.nn": (
            "Linear Sequential Identity Dropout LayerNorm BatchNorm1d Conv1d "
            "ReLU LeakyReLU GELU SiLU Tanh"
        ),
    }.items()
    for name in names.split()
)
MAKE_NETWORK = "tutornet_sb.networks.huggingface.make_network"
# Sizes above these are no speech recogniser's, and features, which have no
# weights to compare them to, would fill the memory.
_MOST = 2**16
LIMITS = {
    "sample_rate": 768_000,
    "n_mels": 1024,
    "n_bins": 2**14,
    "win_length": 1000,
    "hop_length": 1000,
    "window": 120,
}


class NotAllowed(InputError):
    """A description asks for more than a network of known parts."""


def describe(node):
    """Describe what a HyperPyYAML node would make, as plain data.

    Arguments
    ---------
    node : object
        As read by ruamel.yaml, references resolved.

    Returns
    -------
    object
        Mappings, lists and scalars as they are; a tagged node as a dictionary
        of its tag and name and of its ``arguments``.

    Example
    -------
    >>> from ruamel.yaml import YAML
    >>> node = YAML().load("layer: !new:torch.nn.Linear {in_features: 2}")
    >>> describe(node)["layer"]
    {'!new': 'torch.nn.Linear', 'arguments': {'in_features': 2}}
    """
    if hasattr(node, "items"):
        plain = {key: describe(value) for key, value in node.items()}
    elif isinstance(node, list):
        plain = [describe(value) for value in node]
    else:
        plain = getattr(node, "value", node)
    tag = TAG.fullmatch(
        getattr(getattr(node, "tag", None), "value", None) or ""
    )
    if tag is None:
        return plain
    return {f"!{tag[1]}": tag[2], "arguments": plain or {}}


def describe_strictly(node, most=100_000):
    """Describe a node by somebody else, of which nothing may get lost.

    Arguments
    ---------
    node : object
        As read by ruamel.yaml, references resolved.
    most : int
        Nodes that it may have, each counted as often as it is referred to.

    Returns
    -------
    object
        As from :func:`describe`.

    Raises
    ------
    NotAllowed
        If there are other tags than those of HyperPyYAML that make objects.
    ValueError
        If there is too much.
    """
    waiting, count = [node], 0
    while waiting:
        part = waiting.pop()
        tag = getattr(getattr(part, "tag", None), "value", None)
        if tag is not None and not TAG.fullmatch(tag):
            raise NotAllowed(f"the description has the tag {str(tag)[:80]}")
        count += 1
        if hasattr(part, "items"):
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
        if count + len(waiting) > most:
            raise InputError("the description has too many parts")
    try:
        return describe(node)
    except RecursionError:
        raise InputError("the description is nested too deeply") from None


def rebuild(description, weights=None, path="the file of its weights"):
    """Make the network of a description, and nothing else.

    A description is what ``export.describe`` gives: plain data that names
    layers. Only names of ``ALLOWED`` are looked up.

    It is made twice. The first time it takes no memory, and stops when it has
    far more parts than the weights that are there for it; the second time it
    is known to fit them.

    Arguments
    ---------
    description : dict
        From ``config.json``.
    weights : dict, optional
        The weights by name, or tensors of their shapes on the device ``meta``.
    path : str or pathlib.Path
        Where they are, for errors.

    Returns
    -------
    torch.nn.Module
        With random weights.

    Raises
    ------
    NotAllowed
        If the description names what is not allowed.
    ValueError
        If it cannot be built, or builds a network with other weights.

    Example
    -------
    >>> layer = {"!new": "torch.nn.Linear"}
    >>> layer["arguments"] = {"in_features": 2, "out_features": 3}
    >>> rebuild(layer)
    Linear(in_features=2, out_features=3, bias=True)
    >>> rebuild({"!apply": "os.system", "arguments": ["ls"]})
    Traceback (most recent call last):
    ...
    tutornet_sb.networks.description.NotAllowed: the description names \
os.system, which is not among the parts of a network that may be loaded
    """
    try:
        if weights is not None:
            with _Budget(weights), torch.device("meta"), _LiteralsStay():
                planned = _make_network(description)
            refuse_other_weights(planned.state_dict(), weights, path)
        return _make_network(description)
    except RecursionError:
        raise InputError("the description is nested too deeply") from None


class _LiteralsStay(torch.overrides.TorchFunctionMode):
    """Keep the values of tensors that are written out, such as shapes."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


class _Budget:
    """Stop the making of modules beyond what some weights could fill.

    Layers may be made and dropped again, hence the generous factors.
    """

    def __init__(self, weights):
        sizes = [tensor.numel() for tensor in weights.values()]
        self._elements = 4 * sum(sizes) + 10**7
        self._parts = 50 * len(sizes) + 1000

    def __enter__(self):
        self._handles = [
            registration.register_module_parameter_registration_hook(self._use),
            registration.register_module_buffer_registration_hook(self._use),
            registration.register_module_module_registration_hook(self._use),
        ]

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()

    def _use(self, module, name, part):
        self._parts -= 1
        if isinstance(part, torch.Tensor):
            self._elements -= part.numel()
        if self._parts < 0 or self._elements < 0:
            raise InputError(
                "the description is of a far larger network than the weights"
            )


def _make_network(description):
    network = _make(description)
    if not isinstance(network, torch.nn.Module):
        raise InputError("the description is not one of a network")
    return network


def _make(node):
    if isinstance(node, list):
        return [_make(value) for value in node]
    if isinstance(node, float | int) and not abs(node) <= _MOST:
        raise InputError(f"the description holds a number of {node:g}")
    if not isinstance(node, dict):
        return node
    tag = next((key for key in node if key.startswith("!")), None)
    if tag is None:
        return {key: _make_value(key, node[key]) for key in node}
    name, arguments = node[tag], node.get("arguments", {})
    if (
        tag not in ("!new", "!name", "!apply")
        or node.keys() - {tag, "arguments"}
        or not isinstance(arguments, dict | list)
    ):
        raise InputError(f"the description has an odd part: {str(node)[:80]}")
    if not isinstance(name, str) or name not in ALLOWED:
        raise NotAllowed(
            f"the description names {str(name)[:80]}, which is not among the "
            "parts of a network that may be loaded"
        )
    if name == MAKE_NETWORK:
        _check_network(arguments)
    module, _, attribute = name.rpartition(".")
    called = getattr(importlib.import_module(module), attribute)
    arguments = _make(arguments)
    if isinstance(arguments, list):
        called = functools.partial(called, *arguments)
    else:
        called = functools.partial(called, **arguments)
    if tag == "!name":
        return called
    try:
        return called()
    # Of arguments that somebody made up, all kinds of errors
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{name} cannot be built as described: {reason}"
        ) from None


def _make_value(key, value):
    if key == "input_shape" and isinstance(value, list):
        # A network is run on such a batch to infer shapes.
        sizes = [size for size in value if size is not None]
        if not all(isinstance(size, int) for size in sizes) or (
            math.prod(sizes) > _MOST
        ):
            raise InputError(f"the description has an {key} of {value}")
    limit = LIMITS.get(key)
    if limit is None:
        return _make(value)
    if not isinstance(value, int | float) or not 0 < value <= limit:
        raise InputError(
            f"the description has a {key} of {str(value)[:80]}; it must be "
            f"above 0 and at most {limit}"
        )
    return value


def _check_network(arguments):
    """Refuse what makes transformers read files, or load code."""
    from tutornet_sb.networks.huggingface import ARCHITECTURE

    known = {"model_type", "layerdrop", *ARCHITECTURE}
    for key in arguments:
        if key in ("source", "revision"):
            if arguments[key] is not None and key == "source":
                raise InputError(
                    "the description takes published weights from "
                    f"{str(arguments[key])[:80]}; a model must bring its own"
                )
        elif key not in known and not key.endswith("dropout"):
            if not key.startswith(("mask_time", "mask_feature")):
                raise InputError(
                    f"the description gives {MAKE_NETWORK} the value "
                    f"{str(key)[:80]}, which may not be loaded"
                )
