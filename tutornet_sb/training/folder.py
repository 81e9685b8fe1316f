"""The folder of a run: one experiment each, described as data."""

import hashlib
import logging
import shutil
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ruamel.yaml import YAML

from tutornet_sb.corpora.tokenizer import pieces
from tutornet_sb.networks import runs
from tutornet_sb.util import processes
from tutornet_sb.util.composition import tag_of
from tutornet_sb.util.errors import InputError, SettingError
from tutornet_sb.util.files import (
    locked,
    read_json,
    remove_unfinished,
    write_atomically,
    write_json,
)
from tutornet_sb.util.mappings import flatten
from tutornet_sb.util.processes import run_on_main

logger = logging.getLogger(__name__)

CORPUS = "corpus.json"
LOCK = "run.lock"
# What may differ when a run is resumed or scored again
CHANGEABLE = {
    "baseline_folder",
    "ckpt_interval_minutes",
    "compute_matched_to",
    "continue_anyway",
    "data_folder",
    "decoding",
    "num_workers",
    "recipe_folder",
    "store.folder",
    "test_csv",
    "train_csv",
    "utterances.max_seconds",
    "utterances.max_skipped",
    "valid_csv",
}
# Paths and what follows from them, which do not make a teacher another one
NOT_OF_TEACHER = {
    "corpus",
    "corpus_folder",
    "corpus_overrides",
    "corpus_yaml",
    "output_folder",
    "results_folder",
    "run_name",
    "student_overrides",
    "student_size",
    "student_yaml",
    "teacher",
    "teacher_name",
}
# What of the corpus makes a teacher another one
OF_TEACHER = (
    "corpus.minilibri",
    "corpus.train_splits",
    "corpus.tokenizer_type",
    "corpus.vocab_size",
)


@contextmanager
def working_in(folder):
    """Keep other processes of another call out of a run's folder."""
    run_on_main(_check_writable, [folder])
    with ExitStack() as stack:
        if processes.rank() == 0:
            lock = locked(folder / LOCK, f"works in {folder}")
            stack.enter_context(lock)
            remove_unfinished(folder)
        processes.wait_for_all()
        yield


def _check_writable(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise InputError(
            f"the output folder {folder} cannot be written to "
            f"({error.strerror}): give another --output_folder"
        ) from None


def save_settings(experiment):
    """Save the settings, and the network alone, with all values filled in."""
    folder, yaml = experiment.folder, YAML()
    _take_over(*compare(experiment), folder, experiment.settings)
    write_atomically(
        folder / runs.HYPERPARAMS,
        lambda file: file.write_text(experiment.text, "utf-8"),
    )
    network = yaml.load(experiment.text)["student"]
    write_atomically(
        folder / runs.MODEL_YAML, lambda path: yaml.dump(network, path)
    )


def save_corpus(experiment):
    """Save the tokenizer of the corpus, and what the corpus consists of."""
    folder, corpus = experiment.folder, experiment.corpus
    now = {"symbols": " ".join(pieces(corpus.tokenizer)), "splits": {}}
    for split in dict.fromkeys(sum(map(list, corpus.splits.values()), [])):
        content = Path(corpus.manifests[split]).read_bytes()
        now["splits"][split] = {
            "utterances": content.count(b"\n") - 1,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    path = folder / CORPUS
    if path.is_file():
        _take_over(read_json(path), now, folder, experiment.settings)
    write_json(path, now)
    write_atomically(
        folder / runs.TOKENIZER,
        lambda path: shutil.copyfile(corpus.tokenizer_file, path),
    )


def compare(experiment):
    """What is compared of the folder's experiment and of this one, flat."""
    path, yaml = experiment.folder / runs.HYPERPARAMS, YAML()
    texts = [experiment.text, experiment.text]
    if path.is_file():
        texts[0] = path.read_text(encoding="utf-8")
    return [
        _without(flatten(_plain(yaml.load(text))), CHANGEABLE) for text in texts
    ]


def _take_over(there, now, folder, settings):
    """Remove what another experiment has left that came to no checkpoint."""
    if refuse_other(there, now, folder, settings):
        shutil.rmtree(folder / runs.STAGES, ignore_errors=True)


def _without(values, groups):
    """Leave out keys and all within them."""
    groups = tuple(f"{group}." for group in groups)
    return {k: v for k, v in values.items() if not f"{k}.".startswith(groups)}


def refuse_other(there, now, folder, settings):
    """Keep a folder from mixing the results of two experiments.

    ``there`` and ``now`` are what the folder holds and what it would hold.
    Before a checkpoint is saved in it, it may hold anything. Returns whether
    that is something else.
    """
    stages = Path(folder) / runs.STAGES
    trained = *stages.glob("*/save/CKPT*"), *stages.glob(f"*/{runs.WEIGHTS}")
    other = _differences(there, now)
    if not trained or not other:
        return bool(other)
    if not settings["continue_anyway"]:
        raise InputError(
            f"{folder} holds another experiment: {other}. Give this one its "
            "own --output_folder, delete that one, or resume it by "
            "--continue_anyway True"
        )
    logger.warning("%s held another experiment: %s", folder, other)
    return False


def refuse_other_teacher(teacher, settings):
    """Keep a finished run from being mistaken for another teacher.

    It may have been trained by another command, so only what made it counts.
    """
    there, now = (
        _without(values, NOT_OF_TEACHER)
        | {k: v for k, v in values.items() if k.startswith(OF_TEACHER)}
        for values in compare(teacher)
    )
    other, folder = _differences(there, now), teacher.folder
    if other and not settings["continue_anyway"]:
        raise SettingError(
            f"{folder} holds another teacher than this command asks for: "
            f"{other}. Use it all the same by --teacher.folder {folder}, or "
            "give another --teacher.folder"
        )
    if other:
        logger.warning("%s holds another teacher: %s", folder, other)


def _differences(there, now):
    there, now = flatten(there), flatten(now)
    other = [
        f"there {key} is {there.get(key)!s:.99}, and now it is "
        f"{now.get(key)!s:.99}"
        for key in {**there, **now}
        if there.get(key) != now.get(key)
    ]
    if len(other) > 5:
        other[5:] = [f"and {len(other) - 5} more"]
    return "; ".join(other)


def _plain(node):
    """A YAML tree in which tags count and comments do not."""
    tag = tag_of(node)
    if hasattr(node, "items"):
        node = {str(key): _plain(value) for key, value in node.items()}
        return node if tag is None else node | {"tag": tag}
    if isinstance(node, list):
        node = [_plain(value) for value in node]
    else:
        node = getattr(node, "value", node)
    return node if tag is None else f"{tag} {node}"
