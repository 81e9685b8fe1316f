"""A network as plain data, and built from it without running other code."""

import functools
import importlib
import math
import re
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.modules import module as registration

from tutornet_sb.util.composition import tag_of
from tutornet_sb.util.errors import InputError, first_line

# !new:package.module.Class and the like
TAG = re.compile(r"!(new|name|apply):([\w.]+)")
# What a description may name, by module. All of it makes a layer of sizes and
# options, and reads or writes nothing; make_network, with the arguments that
# _check_network lets through.
NETWORKS = {
    "tutornet_sb.networks": [
        "acoustic_model.AcousticModel",
        "acoustic_model.LogMelFeatures",
        "acoustic_model.SpectrogramFeatures",
        "deepspeech2.DeepSpeech2Encoder",
        "huggingface.Wav2Vec2Encoder",
        "huggingface.Waveform",
        "huggingface.WhisperEncoder",
        "huggingface.WhisperFeatures",
        "huggingface.make_network",
        "jasper.JasperEncoder",
        "lobes.CRDNNEncoder",
        "lobes.ContextNetEncoder",
        "recurrent.RecurrentEncoder",
        "transformer.TransformerEncoder",
    ],
    "speechbrain.lobes.models": [
        "CRDNN.CRDNN",
        "ContextNet.ContextNet",
        "convolution.ConvolutionFrontEnd",
        "transformer.TransformerASR.TransformerASR",
    ],
    "speechbrain.nnet": ["RNN.LSTM", "RNN.GRU", "RNN.RNN", "activations.Swish"],
    "torch.nn": (
        "Linear Sequential Identity Dropout LayerNorm BatchNorm1d Conv1d ReLU "
        "LeakyReLU GELU SiLU Tanh"
    ).split(),
}
ALLOWED = frozenset(
    f"{package}.{name}" for package, names in NETWORKS.items() for name in names
)
MAKE_NETWORK = "tutornet_sb.networks.huggingface.make_network"
# Greatest values of features, which have no weights to be compared with
LIMITS = {
    "sample_rate": 768_000,
    "n_mels": 1024,
    "n_bins": 2**14,
    "win_length": 1000,
    "hop_length": 1000,
    "window": 120,
}
# Of any other number
_MOST = 2**16


class NotAllowed(InputError):
    """A description names something that is not in the registry."""


def describe(node):
    """Describe what a HyperPyYAML node would make, as plain data.

    The node is as read by ruamel.yaml, references resolved. Mappings, lists and
    scalars stay; a tagged node becomes a dictionary of its tag and name and of
    its ``arguments``.

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
    tag = TAG.fullmatch(tag_of(node) or "")
    if tag is None:
        return plain
    return {f"!{tag[1]}": tag[2], "arguments": plain or {}}


def describe_strictly(node, most=100_000):
    """Describe an untrusted node, or raise if it has odd tags or is too large.

    ``most`` limits its parts, each counted as often as it is referred to.
    """
    waiting, count = [node], 0
    while waiting:
        part = waiting.pop()
        tag = tag_of(part)
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


def rebuild(description, weights=None):
    """Build the network of a description from ``describe``, and nothing else.

    Only names in ``ALLOWED`` are looked up. With weights, by name, it is first
    built without memory, stopping when it gets far larger than they are. The
    result has random weights.

    Raises NotAllowed if the description names anything else, and InputError if
    it cannot be built.
    """
    try:
        if weights is not None:
            with _budget(weights), torch.device("meta"), _LiteralsStay():
                _make(description)
        network = _make(description)
    except RecursionError:
        raise InputError("the description is nested too deeply") from None
    if not isinstance(network, torch.nn.Module):
        raise InputError("the description is not one of a network")
    return network


class _LiteralsStay(torch.overrides.TorchFunctionMode):
    """Keep the values of tensors that are written out, such as shapes."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


@contextmanager
def _budget(weights):
    """Stop building modules beyond what some weights could fill.

    The factors are generous: layers may be built and dropped again.
    """
    sizes = [tensor.numel() for tensor in weights.values()]
    elements, parts = 4 * sum(sizes) + 10**7, 50 * len(sizes) + 1000

    def use(module, name, part):
        nonlocal elements, parts
        parts -= 1
        if isinstance(part, torch.Tensor):
            elements -= part.numel()
        if min(parts, elements) < 0:
            raise InputError(
                "the description is of a far larger network than the weights"
            )

    with ExitStack() as stack:
        for register in (
            registration.register_module_parameter_registration_hook,
            registration.register_module_buffer_registration_hook,
            registration.register_module_module_registration_hook,
        ):
            stack.callback(register(use).remove)
        yield


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
    # Invented arguments raise all kinds of errors.
    except Exception as error:
        raise InputError(
            f"{name} cannot be built as described: {first_line(error)}"
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

    if isinstance(arguments, list):
        raise InputError(f"{MAKE_NETWORK} needs arguments by name")
    known = {"model_type", "layerdrop", "revision", *ARCHITECTURE}
    for key, value in arguments.items():
        if key == "source":
            if value is not None:
                raise InputError(
                    "the description takes published weights from "
                    f"{str(value)[:80]}; a model must bring its own"
                )
        elif key not in known and not (
            key.endswith("dropout")
            or key.startswith(("mask_time", "mask_feature"))
        ):
            raise InputError(
                f"the description gives {MAKE_NETWORK} the value "
                f"{str(key)[:80]}, which may not be loaded"
            )
