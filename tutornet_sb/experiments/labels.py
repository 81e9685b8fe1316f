"""Names of runs for people: network, method, teacher, and what else differs."""

import json
import shlex
from pathlib import Path

from tutornet_sb.experiments.jobs import COMMAND
from tutornet_sb.experiments.plan import SET_HERE
from tutornet_sb.networks import runs
from tutornet_sb.networks.description import describe
from tutornet_sb.targets.header import flatten

STAGES = {"ctc": "CTC", "rkd": "RKD", "skd": "SKD", "pseudo": "pseudo-labels"}
BASELINE = "CTC baseline"
# In every name, of no meaning to what a run learns, or implied by the network's
LEFT_OUT = {
    *SET_HERE,
    "baseline_folder",
    "ckpt_interval_minutes",
    "continue_anyway",
    "corpus",
    "corpus_overrides",
    "data_folder",
    "noprogressbar",
    "num_workers",
    "rtf_utterances",
    "store_folder",
    "student",
    "student_overrides",
    "teacher_hparams",
    "test_csv",
    "train_csv",
    "valid_csv",
}


def method_name(method):
    """Name a method.

    Arguments
    ---------
    method : str
        As in the YAML files.

    Returns
    -------
    str
        For people.

    Example
    -------
    >>> method_name("rkd+skd"), method_name("ctc")
    ('RKD then SKD', 'CTC baseline')
    """
    if method == "ctc":
        return BASELINE
    return " then ".join(STAGES.get(s, s) for s in method.split("+"))


def teacher_name(teacher):
    """Name a teacher: by its network, or by where it comes from.

    Arguments
    ---------
    teacher : dict or None
        As in ``results.json``.

    Returns
    -------
    str or None
        None if there is no teacher.

    Example
    -------
    >>> teacher_name({"name": "ctc", "folder": "facebook/wav2vec2-base@1a2b"})
    'wav2vec2-base'
    >>> teacher_name({"name": "lstm", "folder": "a/1", "method": "ctc"})
    'lstm'
    """
    if teacher is None:
        return None
    if "method" in teacher:
        return teacher["name"]
    # A model that is no run is of a kind as its name.
    return Path(teacher["folder"]).name.partition("@")[0]


def set_labels(groups):
    """Give each group of runs a ``label``, unlike the others of its corpus.

    It names the network, the method and the teacher, and the epochs and the
    options in which runs of one network on one corpus differ.

    Arguments
    ---------
    groups : list of report.Group
        All of a report.
    """
    for found in groups:
        alike = [
            other
            for other in groups
            if not other.is_teacher
            and (other.corpus, other.network) == (found.corpus, found.network)
        ]
        found.label = _label(found, alike)
    by_folder = {(found.corpus, found.folder_name): found for found in groups}
    for found in groups:
        _, bought, matched = found.folder_name.partition("_at_cost_of_")
        other = by_folder.get((found.corpus, matched))
        if bought and other is not None:
            what = other.label.removeprefix(f"{other.network}: ")
            found.label += f", compute-matched to {what}"
    names = [(found.corpus, found.label) for found in groups]
    for found in groups:
        if names.count((found.corpus, found.label)) > 1:
            found.label += f" ({found.name})"


def _label(found, alike):
    if found.is_teacher:
        return f"teacher {found.network}"
    label = f"{found.network}: {method_name(found.method)}"
    if found.taught_by:
        label += f" from {found.taught_by}"
    if len({other.epochs for other in alike}) > 1:
        label += f", {found.epochs} epochs"
    theirs = [options_of(other.folders[0]) for other in alike]
    ours = options_of(found.folders[0])
    for key, value in ours.items():
        if len({options.get(key) for options in theirs}) > 1:
            label += f", {key} {value}"
    return label


def options_of(folder):
    """Read which options a run had, those of its place in a plan left out.

    Arguments
    ---------
    folder : pathlib.Path
        Output folder of ``train.py``.

    Returns
    -------
    dict
        Text by name. Of a plan's run those of its command line, which travels
        with the small files; of another all values.
    """
    path = folder / COMMAND
    if path.is_file():
        values = _read_command(path.read_text(encoding="utf-8"))
    else:
        values = {
            key: value
            for key, value in describe(runs.read_hyperparams(folder)).items()
            if not _is_made(value)
        }
    kept = {k: v for k, v in values.items() if k not in LEFT_OUT}
    kept.pop("epochs", None)
    return {key: _text(value) for key, value in flatten(kept).items()}


def _read_command(line):
    values, key = {}, None
    for word in shlex.split(line):
        if word.startswith("--"):
            key = word[2:]
            values[key] = "True"
        elif key is not None:
            values[key] = word
    for key, word in values.items():
        try:
            values[key] = json.loads(word)
        except ValueError:
            # A text, which a plan writes as it is
            continue
    return values


def _is_made(value):
    """Whether a value is an object that the YAML file makes."""
    return isinstance(value, dict) and any(k.startswith("!") for k in value)


def _text(value):
    """A value in few letters; a pair of layers as TEACHER>STUDENT."""
    if isinstance(value, list):
        return " + ".join(map(_text, value))
    if isinstance(value, dict):
        return ">".join(map(str, value.values()))
    return str(value)
