"""The folder of a finished run: a model, its tokenizer, results and speech."""

import tempfile
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import sentencepiece
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML
from speechbrain.dataio.dataset import DynamicItemDataset

from tutornet_sb.composition import read_mapping
from tutornet_sb.corpora import minilibri
from tutornet_sb.corpora.audio import read_utterance
from tutornet_sb.corpora.librispeech import (
    find_librispeech,
    prepare_librispeech,
)
from tutornet_sb.corpora.tables import KINDS, name_tables, prepare_tables
from tutornet_sb.description import NotAllowed, describe_strictly, rebuild
from tutornet_sb.distillation.teacher import (
    fill_weights,
    load_model_weights,
    read_weights,
)
from tutornet_sb.errors import InputError, explain
from tutornet_sb.files import read_json
from tutornet_sb.networks.acoustic_model import AcousticModel

MODEL_YAML = "model.yaml"
WEIGHTS = "model.ckpt"
TOKENIZER = "tokenizer.model"
RESULTS = "results.json"
HYPERPARAMS = "hyperparams.yaml"
# In a run's folder those of its stages, and in each of these
STAGES = "stages"
ERRORS = "errors.json"
TRAIN_LOG = "train_log.txt"
# Tokenizers of hundreds of thousands of symbols take some megabytes, all other
# files that are read at once far less.
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
        raise ValueError(
            f"{path}: {error}, and could run any code on this machine: read "
            "it, then allow it by trust_remote_code (--trust-remote-code)"
        ) from None
    except ValueError as error:
        if str(folder) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(model, AcousticModel):
        raise ValueError(f"{path} describes no AcousticModel")
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
    ValueError
        If ``model.yaml`` is damaged.
    """
    folder = Path(folder)
    if not is_finished(folder):
        raise FileNotFoundError(
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
        raise ValueError(
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


class Utterance(NamedTuple):
    """One of the corpus that the run was scored on."""

    path: str
    text: str
    seconds: float
    sample_rate: int

    def read(self):
        """Read the waveform at the model's rate, ``(samples,)``."""
        return read_utterance(
            self.path, self.path, self.seconds, self.sample_rate
        )


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
    splits, rate = [valid[0], test[0]], model.features.sample_rate
    tables = known_tables(run)
    if tables:
        files = [tables[split] for split in splits]
        if data is not None:
            files = [Path(data) / file.name for file in files]
        missing = [file for file in files if not file.is_file()]
    else:
        folders = [data] if data is not None else known_data(run)
        there = [folder for folder in folders if Path(folder).is_dir()]
        missing = [] if there else folders
    if missing:
        if data is None and not needed:
            return None
        raise FileNotFoundError(
            f"the corpus of {run} is not in {' or '.join(map(str, missing))}: "
            "say where it lies by --data"
        )
    read = {}
    with tempfile.TemporaryDirectory() as manifests:
        if tables:
            root, paths = prepare_tables(
                dict(zip(splits, files, strict=True)), manifests, rate
            )
        else:
            root = find_librispeech(there[0])
            paths = prepare_librispeech(root, manifests, splits, rate)
        for split, path in paths.items():
            items = DynamicItemDataset.from_csv(
                str(path), replacements={"data_root": str(root)}
            ).data.values()
            # Of like length side by side, as in any batch.
            read[split] = [
                Utterance(
                    item["wav"], item["wrd"], float(item["duration"]), rate
                )
                for item in sorted(
                    items, key=lambda item: float(item["duration"])
                )
            ]
    # Short and long ones
    step = -(-len(read[valid[0]]) // SOME_UTTERANCES)
    return Speech(test[0], read[test[0]], read[valid[0]][::step])


def known_data(run):
    """Say where the corpus lay when a run was made. No code is run.

    Arguments
    ---------
    run : str or pathlib.Path
        Output folder of ``train.py``.

    Returns
    -------
    list of pathlib.Path
        Folders, seen from the working folder and from the recipe's; or tables.
    """
    tables = known_tables(run)
    if tables:
        return list(tables.values())
    content = read_hyperparams(run)
    folder = content.get("data_folder")
    folder = folder or minilibri.find_folder(content.get("corpus") or {})
    folder = Path(folder).expanduser()
    places = [Path("."), Path(str(content.get("recipe_folder") or "."))]
    return list(dict.fromkeys(place / folder for place in places))


def known_tables(run):
    """Say which tables a run was trained and scored on. No code is run.

    Arguments
    ---------
    run : str or pathlib.Path
        Output folder of ``train.py``.

    Returns
    -------
    dict of str to pathlib.Path
        By split, seen from the working folder or the recipe's; empty if the
        corpus is a folder.
    """
    content = read_hyperparams(run)
    recipe = str(content.get("recipe_folder") or ".")
    tables = {}
    for kind in KINDS:
        tables |= name_tables(kind, content.get(f"{kind}_csv"), recipe)
    return tables
