"""The folder of a finished run: a model, its tokenizer, results and speech."""

from io import StringIO
from pathlib import Path

import sentencepiece
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML

from tutornet_sb.networks.acoustic_model import AcousticModel
from tutornet_sb.networks.description import (
    NotAllowed,
    describe_strictly,
    rebuild,
)
from tutornet_sb.networks.weights import (
    fill_weights,
    load_model_weights,
    read_weights,
)
from tutornet_sb.util.composition import read_mapping
from tutornet_sb.util.errors import InputError, MissingFileError, explain
from tutornet_sb.util.files import read_json

MODEL_YAML = "model.yaml"
WEIGHTS = "model.ckpt"
TOKENIZER = "tokenizer.model"
RESULTS = "results.json"
HYPERPARAMS = "hyperparams.yaml"
# In a run's folder those of its stages, and in each of these
STAGES = "stages"
ERRORS = "errors.json"
TRAIN_LOG = "train_log.txt"
METRICS = "metrics.jsonl"
# Of results.json; no other is read
FORMAT = 2
# Tokenizers of hundreds of thousands of symbols take some megabytes, all other
# files that are read at once far less.
_MOST_BYTES = 2**26
# The tag of a network that may start from published weights
MAKE_NETWORK = "!apply:tutornet_sb.networks.huggingface.make_network"


def is_finished(folder):
    """Tell whether a folder holds a finished run.

    Arguments
    ---------
    folder : str or pathlib.Path
        Output folder of ``train.py``.

    Returns
    -------
    bool
        True if it can be loaded by :func:`load_run`.
    """
    names = MODEL_YAML, WEIGHTS, TOKENIZER, RESULTS
    return all((Path(folder) / name).is_file() for name in names)


def load_run(folder, trust_remote_code=False):
    """Load the model of a finished run and its tokenizer.

    ``model.yaml`` is HyperPyYAML and so could run code. By default, only a
    network made of the parts that the recipe's networks are made of is loaded.

    Arguments
    ---------
    folder : str or pathlib.Path
        Output folder of ``train.py``.
    trust_remote_code : bool
        Whether ``model.yaml`` may name anything.

    Returns
    -------
    model : AcousticModel
        With its trained weights, in evaluation mode.
    tokenizer : sentencepiece.SentencePieceProcessor
        Its symbols.

    Raises
    ------
    FileNotFoundError
        If the folder holds no finished run.
    ValueError
        If the weights do not fit the model, the tokenizer is damaged, or
        ``model.yaml`` names what it may not.
    """
    folder = Path(folder)
    network = read_network(folder)
    if trust_remote_code:
        text = StringIO()
        YAML().dump(network, text)
        try:
            model = load_hyperpyyaml(text.getvalue())["model"]
        # Of values that somebody made up, all kinds of errors
        except Exception as error:
            raise InputError(
                f"{folder / MODEL_YAML} describes no network that can be made: "
                + explain(error)[0]
            ) from error
        load_model_weights(model, folder / WEIGHTS)
    else:
        model = _rebuild(network, folder)
    return model.eval(), read_tokenizer(folder / TOKENIZER)


def _rebuild(network, folder):
    """Make a network of known parts alone, no larger than its weights."""
    path = folder / MODEL_YAML
    weights = read_weights(folder / WEIGHTS)
    try:
        description = describe_strictly(network.get("model"))
        model = rebuild(description, weights, folder / WEIGHTS)
    except NotAllowed as error:
        raise InputError(
            f"{path}: {error}, and could run any code on this machine: read "
            "it, then allow it by trust_remote_code (--trust-remote-code)"
        ) from None
    except ValueError as error:
        if str(folder) in str(error):
            raise
        raise InputError(f"{path}: {error}") from None
    if not isinstance(model, AcousticModel):
        raise InputError(f"{path} describes no AcousticModel")
    return fill_weights(model, weights, folder / WEIGHTS)


def read_tokenizer(path):
    """Read a tokenizer's model.

    Arguments
    ---------
    path : str or pathlib.Path
        File by SentencePiece.

    Returns
    -------
    sentencepiece.SentencePieceProcessor
        Its symbols.

    Raises
    ------
    ValueError
        If it is no such file.
    """
    _refuse_floods(path)
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise InputError(
            f"{path} cannot be read as a tokenizer: {error}"
        ) from None


def read_network(folder):
    """Read the description of a finished run's network.

    Nothing is made or run.

    Arguments
    ---------
    folder : str or pathlib.Path
        Output folder of ``train.py``.

    Returns
    -------
    ruamel.yaml.comments.CommentedMap
        ``model.yaml`` with its tags kept, without the published weights that
        the training may have started from.

    Raises
    ------
    FileNotFoundError
        If the folder holds no finished run.
    ValueError
        If ``model.yaml`` is damaged.
    """
    folder = Path(folder)
    if not is_finished(folder):
        raise MissingFileError(
            f"{folder} holds no finished run of train.py "
            f"({MODEL_YAML}, {WEIGHTS}, {TOKENIZER} and {RESULTS} are needed)"
        )
    path = folder / MODEL_YAML
    _refuse_floods(path)
    content = read_mapping(path)
    _forget_sources(content, set())
    return content


def _refuse_floods(path):
    size = Path(path).stat().st_size
    if size > _MOST_BYTES:
        raise InputError(
            f"{path} has {size} bytes, more than any such file: it is not read"
        )


def _forget_sources(node, seen):
    """Do without the published weights that the training started from."""
    if not hasattr(node, "values") or id(node) in seen:
        return
    seen.add(id(node))
    if getattr(getattr(node, "tag", None), "value", None) == MAKE_NETWORK:
        node["source"] = None
    for value in node.values():
        _forget_sources(value, seen)


def read_results(folder):
    """Read ``results.json`` of a run.

    Arguments
    ---------
    folder : str or pathlib.Path
        Output folder of ``train.py``.

    Returns
    -------
    dict
        As described in the recipe's README; empty if there is none yet.

    Raises
    ------
    ValueError
        If the file is damaged.
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        return {}
    _refuse_floods(path)
    return read_json(path)


def read_hyperparams(folder):
    """Read the values of a run's experiment; nothing is made or run.

    Arguments
    ---------
    folder : str or pathlib.Path
        Output folder of ``train.py``.

    Returns
    -------
    dict
        Empty if there are none.
    """
    path = Path(folder) / HYPERPARAMS
    return YAML().load(path) if path.is_file() else {}
