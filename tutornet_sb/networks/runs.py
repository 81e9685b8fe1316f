"""The folder of a finished run: a model, its tokenizer and results."""

from pathlib import Path

import sentencepiece
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML

from tutornet_sb.networks.acoustic_model import AcousticModel
from tutornet_sb.networks.description import (
    MAKE_NETWORK,
    NotAllowed,
    describe_strictly,
    rebuild,
)
from tutornet_sb.networks.weights import (
    fill_weights,
    read_weights,
    refuse_large,
)
from tutornet_sb.util.composition import dump, read_mapping, tag_of
from tutornet_sb.util.errors import InputError, MissingFileError, explain
from tutornet_sb.util.files import read_json

MODEL_YAML = "model.yaml"
WEIGHTS = "model.ckpt"
TOKENIZER = "tokenizer.model"
RESULTS = "results.json"
HYPERPARAMS = "hyperparams.yaml"
# Within a run's folder, those of its stages, and in each of these:
STAGES = "stages"
ERRORS = "errors.json"
TRAIN_LOG = "train_log.txt"
METRICS = "metrics.jsonl"
# Of results.json; no other is read
FORMAT = 2
# Tokenizers of hundreds of thousands of symbols take some megabytes, all other
# files that are read at once far less.
_MOST_BYTES = 2**26


def is_finished(folder):
    """Whether a folder holds a finished run, to be loaded by ``load_run``."""
    names = MODEL_YAML, WEIGHTS, TOKENIZER, RESULTS
    return all((Path(folder) / name).is_file() for name in names)


def load_run(folder, trust_remote_code=False):
    """Load the model of a finished run, and its SentencePiece tokenizer.

    The model is an ``AcousticModel`` in evaluation mode. ``model.yaml`` is
    HyperPyYAML and so could run code: unless `trust_remote_code`, only networks
    made of the parts that the recipe uses are loaded, no larger than their
    weights.

    Raises MissingFileError if the folder holds no finished run, and InputError
    if the weights do not fit the model, the tokenizer is damaged, or
    ``model.yaml`` names what it may not.
    """
    folder = Path(folder)
    path = folder / MODEL_YAML
    network = read_network(folder)
    weights = read_weights(folder / WEIGHTS)
    try:
        if trust_remote_code:
            model = load_hyperpyyaml(dump(network))["model"]
        else:
            description = describe_strictly(network.get("model"))
            model = rebuild(description, weights)
    except NotAllowed as error:
        raise InputError(
            f"{path}: {error}, and could run any code on this machine: read "
            "it, then allow it by trust_remote_code (--trust-remote-code)"
        ) from None
    # Made-up values raise errors of all kinds.
    except Exception as error:
        raise InputError(
            f"{path} describes no network that can be made: {explain(error)[0]}"
        ) from error
    if not trust_remote_code and not isinstance(model, AcousticModel):
        raise InputError(f"{path} describes no AcousticModel")
    fill_weights(model, weights, folder / WEIGHTS)
    return model.eval(), read_tokenizer(folder / TOKENIZER)


def read_tokenizer(path):
    """Read a SentencePiece model."""
    refuse_large(path, _MOST_BYTES)
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise InputError(
            f"{path} cannot be read as a tokenizer: {error}"
        ) from None


def read_network(folder):
    """Read ``model.yaml`` of a finished run; nothing is made or run.

    Tags are kept; published weights that the training started from are not.
    """
    folder = Path(folder)
    if not is_finished(folder):
        raise MissingFileError(
            f"{folder} holds no finished run of train.py "
            f"({MODEL_YAML}, {WEIGHTS}, {TOKENIZER} and {RESULTS} are needed)"
        )
    path = folder / MODEL_YAML
    refuse_large(path, _MOST_BYTES)
    content = read_mapping(path)
    _forget_sources(content, set())
    return content


def _forget_sources(node, seen):
    """Remove the ``source`` of published weights from a description."""
    if not hasattr(node, "values") or id(node) in seen:
        return
    seen.add(id(node))
    if tag_of(node) == f"!apply:{MAKE_NETWORK}":
        node["source"] = None
    for value in node.values():
        _forget_sources(value, seen)


def read_results(folder):
    """Read ``results.json`` of a run; an empty dict if there is none yet."""
    path = Path(folder) / RESULTS
    if not path.is_file():
        return {}
    refuse_large(path, _MOST_BYTES)
    return read_json(path)


def read_hyperparams(folder):
    """Read the settings of a run, an empty dict if none; nothing is run."""
    path = Path(folder) / HYPERPARAMS
    return YAML().load(path) if path.is_file() else {}
