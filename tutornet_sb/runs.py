"""The folder of a finished run: a model, its tokenizer and its results."""

from pathlib import Path

import sentencepiece
from hyperpyyaml import load_hyperpyyaml

from tutornet_sb.distillation.teacher import load_model_weights
from tutornet_sb.files import read_json

MODEL_YAML = "model.yaml"
WEIGHTS = "model.ckpt"
TOKENIZER = "tokenizer.model"
RESULTS = "results.json"


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
    if not is_finished(folder):
        raise FileNotFoundError(
            f"{folder} holds no finished run of train.py "
            f"({MODEL_YAML}, {WEIGHTS}, {TOKENIZER} and {RESULTS} are needed)"
        )
    with open(folder / MODEL_YAML, encoding="utf-8") as file:
        model = load_hyperpyyaml(file)["model"]
    load_model_weights(model, folder / WEIGHTS)
    tokenizer = sentencepiece.SentencePieceProcessor(
        model_file=str(folder / TOKENIZER)
    )
    return model, tokenizer


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
