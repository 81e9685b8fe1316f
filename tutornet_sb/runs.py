"""The folder of a finished run: a model, its tokenizer, results and speech."""

import tempfile
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML
from speechbrain.dataio.dataset import DynamicItemDataset

from tutornet_sb.corpora.librispeech import (
    find_librispeech,
    prepare_librispeech,
)
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
# Tokenizers of hundreds of thousands of symbols take some megabytes.
_MOST_BYTES = 2**26
# The tag of a network that may start from published weights
MAKE_NETWORK = "!apply:tutornet_sb.networks.huggingface.make_network"
# Of a development set where not all of it is needed
SOME_UTTERANCES = 50


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
        If the weights do not fit the model, or the tokenizer is damaged.
    """
    folder = Path(folder)
    text = StringIO()
    YAML().dump(read_network(folder), text)
    model = load_hyperpyyaml(text.getvalue())["model"]
    load_model_weights(model, folder / WEIGHTS)
    return model, read_tokenizer(folder / TOKENIZER)


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
    size = Path(path).stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(
            f"{path} has {size} bytes, which no tokenizer has: it is not read"
        )
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise ValueError(
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


class Utterance(NamedTuple):
    """One of the corpus that the run was scored on."""

    path: str
    text: str

    def read(self):
        """Read the waveform, ``(samples,)``."""
        return torch.from_numpy(soundfile.read(self.path, dtype="float32")[0])


class Speech(NamedTuple):
    """What a finished run, or another form of its model, is tried on.

    Attributes
    ----------
    split : str
        Name of the test split.
    test : list of Utterance
        All of it.
    valid : list of Utterance
        Some of the development set.
    """

    split: str
    test: list
    valid: list


def find_speech(run, data, results, model, needed):
    """Find the first test set that a run was scored on, and some of dev.

    Arguments
    ---------
    run : pathlib.Path
        Output folder of ``train.py``.
    data : str or pathlib.Path or None
        Where the corpus lies, by default where it lay then.
    results : dict or None
        As from ``reporting.compare.summarize``.
    model : AcousticModel
        That of the run.
    needed : bool
        Whether it is an error if there is none.

    Returns
    -------
    Speech or None
        What was found.

    Raises
    ------
    FileNotFoundError
        If the corpus is named or needed and not there.
    ValueError
        If the run was scored on no such splits, and they are needed.
    """
    scored = (results or {"splits": {}})["splits"]
    valid = [split for split in scored if split.startswith("dev")]
    test = [split for split in scored if split not in valid]
    if not (valid and test):
        if needed:
            raise ValueError(
                f"{run} was scored on no dev and test split, and one of each "
                "is needed"
            )
        return None
    folders = [data] if data is not None else _known_data(run)
    there = [folder for folder in folders if Path(folder).is_dir()]
    if not there:
        if data is None and not needed:
            return None
        raise FileNotFoundError(
            f"the corpus of {run} is not in {' or '.join(map(str, folders))}: "
            "say where it lies by --data"
        )
    read = {}
    with tempfile.TemporaryDirectory() as manifests:
        root = find_librispeech(there[0])
        paths = prepare_librispeech(
            root,
            manifests,
            splits=[valid[0], test[0]],
            sample_rate=model.features.sample_rate,
        )
        for split, path in paths.items():
            items = DynamicItemDataset.from_csv(
                str(path), replacements={"data_root": str(root)}
            ).data.values()
            # Of like length side by side, as in any batch.
            read[split] = [
                Utterance(item["wav"], item["wrd"])
                for item in sorted(
                    items, key=lambda item: float(item["duration"])
                )
            ]
    # Short and long ones
    step = -(-len(read[valid[0]]) // SOME_UTTERANCES)
    return Speech(test[0], read[test[0]], read[valid[0]][::step])


def _known_data(run):
    """Where the corpus lay when the run was made. No code is run."""
    path = run / HYPERPARAMS
    content = YAML().load(path) if path.is_file() else {}
    folder = Path(content.get("data_folder") or Path("data") / "MiniLibri")
    places = [Path("."), Path(str(content.get("recipe_folder") or "."))]
    return list(dict.fromkeys(place / folder for place in places))
