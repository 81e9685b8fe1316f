"""Names of runs for people: network, method, teacher, and what else differs."""

from pathlib import Path

from tutornet_sb.experiments.plan import SET_BY_PLAN
from tutornet_sb.training.stages import STAGES

BASELINE = "CTC baseline"
# Options that say where the data lay
DATA = "data_folder", "train_csv", "valid_csv", "test_csv"
# In every name, without effect on what is learnt, or part of the network's name
LEFT_OUT = {*SET_BY_PLAN, *DATA, "epochs", "noprogressbar", "num_workers"}
LEFT_OUT |= {"baseline_folder", "store.folder", "continue_anyway"}
LEFT_OUT |= {"corpus_overrides", "student_overrides", "teacher.main_file"}
LEFT_OUT |= {"ckpt_interval_minutes"}


def method_name(method):
    """Name a method for people.

    Example
    -------
    >>> method_name("rkd+skd"), method_name("ctc")
    ('RKD then SKD', 'CTC baseline')
    """
    if method == "ctc":
        return BASELINE
    stages = method.split("+")
    return " then ".join(STAGES[s].title if s in STAGES else s for s in stages)


def options_of(results):
    """Options of a run as texts, without those that every name has."""
    options = results["options"].items()
    return {key: _text(value) for key, value in options if key not in LEFT_OUT}


def _text(value):
    """A value in few letters; a pair of layers as TEACHER>STUDENT."""
    if isinstance(value, list):
        return " + ".join(map(_text, value))
    if isinstance(value, dict):
        return ">".join(map(str, value.values()))
    return str(value)


def place_of(folder):
    """End of a run's path, which stays when results are copied elsewhere."""
    return Path(folder).parts[-2:]


def set_labels(groups):
    """Give each group of runs a ``label`` unlike the others of its corpus.

    It names network, method and teacher, and the epochs and options in which
    runs of one network on one corpus differ.
    """
    for found in groups:
        alike = [
            other
            for other in groups
            if other.role != "teacher"
            and (other.corpus, other.network) == (found.corpus, found.network)
        ]
        found.label = _label(found, alike)
    for found in groups:
        for other in groups:
            if other.corpus == found.corpus and found.matched_to & other.places:
                what = other.label.removeprefix(f"{other.network}: ")
                found.label += f", compute-matched to {what}"
    names = [(found.corpus, found.label) for found in groups]
    for found in groups:
        if names.count((found.corpus, found.label)) > 1:
            found.label += f" ({found.name})"


def _label(found, alike):
    if found.role == "teacher":
        return f"teacher {found.network}"
    label = f"{found.network}: {method_name(found.method)}"
    if found.teacher:
        label += f" from {found.teacher['name']}"
    if len({other.epochs for other in alike}) > 1:
        label += f", {found.epochs} epochs"
    for key, value in found.options.items():
        if len({other.options.get(key) for other in alike}) > 1:
            label += f", {key} {value}"
    return label


def hide_data(options):
    """Options of a run without where the data lay on its machine."""
    return {k: "DATA" if k in DATA else v for k, v in options.items()}
