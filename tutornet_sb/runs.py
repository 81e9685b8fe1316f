"""The folder of a finished run: a model, its tokenizer and its results."""

from io import StringIO
from pathlib import Path

import sentencepiece
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML

from tutornet_sb.distillation.teacher import load_model_weights
from tutornet_sb.files import read_json

MODEL_YAML = "model.yaml"
WEIGHTS = "model.ckpt"
TOKENIZER = "tokenizer.model"
RESULTS = "results.json"
HYPERPARAMS = "hyperparams.yaml"
# In a run's folder those of its stages, and in each of these
STAGES = "stages"
ERRORS = "errors.json"
TRAIN_LOG = "train_log.txt"
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


def load_run(folder):
    """Load the model of a finished run and its tokenizer.

    ``model.yaml`` is HyperPyYAML and so can run code: load only runs that you
    trust.

    Arguments
    ---------
    folder : str or pathlib.Path
        Output folder of ``train.py``.

    Returns
    -------
    model : AcousticModel
        With its trained weights.
    tokenizer : sentencepiece.SentencePieceProcessor
        Its symbols.

    Raises
    ------
    FileNotFoundError
        If the folder holds no finished run.
    ValueError
        If the weights do not fit the model.
    """
    folder = Path(folder)
    text = StringIO()
    YAML().dump(read_network(folder), text)
    model = load_hyperpyyaml(text.getvalue())["model"]
    load_model_weights(model, folder / WEIGHTS)
    tokenizer = sentencepiece.SentencePieceProcessor(
        model_file=str(folder / TOKENIZER)
    )
    return model, tokenizer


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
    """
    folder = Path(folder)
    if not is_finished(folder):
        raise FileNotFoundError(
            f"{folder} holds no finished run of train.py "
            f"({MODEL_YAML}, {WEIGHTS}, {TOKENIZER} and {RESULTS} are needed)"
        )
    content = YAML().load(folder / MODEL_YAML)
    _forget_sources(content)
    return content


def _forget_sources(node):
    """Do without the published weights that the training started from."""
    if getattr(getattr(node, "tag", None), "value", None) == MAKE_NETWORK:
        node["source"] = None
    for value in node.values() if hasattr(node, "values") else ():
        _forget_sources(value)


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
    return read_json(path) if path.is_file() else {}
