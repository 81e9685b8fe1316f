"""Utterances of the corpus that a run was scored on."""

import tempfile
from pathlib import Path
from typing import NamedTuple

from tutornet_sb.corpora import minilibri
from tutornet_sb.corpora.audio import read_utterance
from tutornet_sb.corpora.librispeech import (
    find_librispeech,
    prepare_librispeech,
    read_manifest,
)
from tutornet_sb.corpora.tables import KINDS, name_tables, prepare_tables
from tutornet_sb.networks.runs import read_hyperparams
from tutornet_sb.util.errors import InputError, MissingFileError

# Of a development set where not all of it is needed
SOME_UTTERANCES = 50


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
        As from ``experiments.compare.summarize``.
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
            raise InputError(
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
        raise MissingFileError(
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
            items = read_manifest(path, root).values()
            # Of like length side by side, as in any batch.
            read[split] = [
                Utterance(item["wav"], item["wrd"], item["duration"], rate)
                for item in sorted(items, key=lambda item: item["duration"])
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
