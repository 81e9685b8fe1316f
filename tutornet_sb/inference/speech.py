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
    """One utterance; ``sample_rate`` is the model's."""

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
    """Name and utterances of a test split, and some of a development set."""

    split: str
    test: list[Utterance]
    valid: list[Utterance]


def find_speech(run, data, results, model, needed):
    """Find the first test set that a run was scored on, and some of dev.

    ``data`` is the folder of the corpus, by default that of the training, and
    ``results`` has ``splits``. If there is none, it is None, or an
    ``InputError`` if it is named or needed.
    """
    valid = [name for name in results["splits"] if name.startswith("dev")]
    test = [name for name in results["splits"] if name not in valid]
    if not (valid and test):
        if needed:
            raise InputError(
                f"{run} was scored on no dev and test split, and one of each "
                "is needed"
            )
        return None
    splits, rate = [valid[0], test[0]], model.features.sample_rate
    tables = _known_tables(run)
    if tables:
        files = [tables[split] for split in splits]
        if data is not None:
            files = [Path(data) / file.name for file in files]
        missing = [file for file in files if not file.is_file()]
    else:
        folders = [data] if data is not None else known_data(run)
        found = [folder for folder in folders if Path(folder).is_dir()]
        missing = [] if found else folders
    if missing:
        if data is None and not needed:
            return None
        raise MissingFileError(
            f"the corpus of {run} is not in {' or '.join(map(str, missing))}: "
            "name its folder by --data"
        )
    with tempfile.TemporaryDirectory() as manifests:
        if tables:
            root, paths = prepare_tables(
                dict(zip(splits, files, strict=True)), manifests, rate
            )
        else:
            root = find_librispeech(found[0])
            paths = prepare_librispeech(root, manifests, splits, rate)
        dev, test = (_read_split(paths[split], root, rate) for split in splits)
    # Short and long ones
    return Speech(splits[1], test, dev[:: -(-len(dev) // SOME_UTTERANCES)])


def _read_split(manifest, root, rate):
    """Utterances of a manifest in the order of their length."""
    utterances = [
        Utterance(item["wav"], item["wrd"], item["duration"], rate)
        for item in read_manifest(manifest, root).values()
    ]
    return sorted(utterances, key=lambda one: one.seconds)


def known_data(run):
    """Folders (or tables) where a run found its corpus; no code is run."""
    tables = _known_tables(run)
    if tables:
        return list(tables.values())
    content = read_hyperparams(run)
    folder = content.get("data_folder")
    folder = folder or minilibri.find_folder(content.get("corpus") or {})
    folder = Path(folder).expanduser()
    # Seen from the working folder and from the recipe's
    places = [Path("."), Path(str(content.get("recipe_folder") or "."))]
    return list(dict.fromkeys(place / folder for place in places))


def _known_tables(run):
    """Tables of a run's corpus by split, empty if the corpus is a folder."""
    content = read_hyperparams(run)
    recipe = str(content.get("recipe_folder") or ".")
    tables = {}
    for kind in KINDS:
        tables |= name_tables(kind, content.get(f"{kind}_csv"), recipe)
    return tables
