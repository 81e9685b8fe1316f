"""Finished runs, in groups of those that differ in their seed alone."""

import functools
import json
import statistics
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from tutornet_sb.experiments.labels import options_of, place_of, set_labels
from tutornet_sb.inference.scores import read_alignments
from tutornet_sb.networks import runs
from tutornet_sb.training.stages import STAGES
from tutornet_sb.util.errors import InputError, MissingFileError
from tutornet_sb.util.files import read_json

FIGURES = "seed", "epochs", "parameters", "real_time_factor"
FIGURES = *FIGURES, "train_seconds", "train_audio_seconds"
# Runs that agree in these and in their teacher are one row of a table.
ALIKE = "corpus", "student", "method", "epochs", "parameters"
# Columns of errors.json
RATES = {"wer": 0, "cer": 2}
# What runs are compared with: starts of the names of columns of results.csv
EQUAL_EPOCHS, COMPUTE_MATCHED, FIRST = "", "matched_", "first_"

Figure = Annotated[float, Field(gt=-(2**63), lt=2**63)]


class _Scores(BaseModel):
    wer: Figure
    cer: Figure
    # The median is None for a split in which no word counts.
    latency: dict[str, Figure | None] = {}


class _Stage(BaseModel):
    splits: dict[str, _Scores] = {}


class _Teacher(BaseModel):
    name: str


class _Results(BaseModel):
    student: str
    method: str
    corpus: str
    role: str
    teacher: _Teacher | None
    options: dict
    compute_matched_to: list | None
    seed: Figure
    epochs: Figure
    parameters: Figure
    real_time_factor: Figure
    train_seconds: Figure
    train_audio_seconds: Figure
    stages: Annotated[dict[str, _Stage], Field(min_length=1)]


def read_finished(folder):
    """Read ``results.json`` of a finished run, in the format of this version.

    Raises :class:`InputError` if the folder has none, or one that is damaged or
    of another format.
    """
    results = runs.read_results(folder)
    if not results:
        raise MissingFileError(
            f"{folder} holds no results.json: the run is not finished, the "
            "same command of train.py resumes it"
        )
    if isinstance(results, dict) and results.get("format") != runs.FORMAT:
        raise InputError(
            f"{folder}: format of results.json must be {runs.FORMAT}, got "
            f"{results.get('format')}: another version of TutorNet wrote it, "
            "repeat the run in a new folder"
        )
    try:
        _Results.model_validate(results, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise InputError(
            f"results.json in {folder} is damaged: {where}: {fault['msg']}. "
            "Was it written by train.py?"
        ) from None
    return results


def summarize(folder):
    """Return the figures of a finished run that exports quote.

    These are ``name`` of the network, that of the ``teacher`` (or None),
    ``method``, ``corpus``, ``FIGURES``, and ``splits``: the scores after the
    last stage. Raises as :func:`read_finished` does.
    """
    results = read_finished(folder)
    return {
        "name": results["student"],
        "teacher": results["teacher"] and results["teacher"]["name"],
        "method": results["method"],
        "corpus": results["corpus"],
        **{key: results[key] for key in FIGURES},
        "splits": _splits(results),
    }


def _splits(results):
    return list(results["stages"].values())[-1].get("splits", {})


def read_metrics(folder):
    """Figures of each epoch of a stage, in order; of a repeated one the last.

    Empty if the folder of the stage holds none.
    """
    path, epochs = Path(folder) / runs.METRICS, {}
    if not path.is_file():
        return []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            epoch = json.loads(line)
            epochs[epoch["epoch"]] = epoch
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}, line {number} is damaged ({error}): delete the line"
            ) from None
    return [epochs[number] for number in sorted(epochs)]


class Group:
    """Runs that differ in their seed alone.

    Attributes that are lists have an item for each seed; the teacher is the
    one that ``results.json`` describes, or an empty dict.
    """

    def __init__(self, results):
        self.folders, self.results = list(results), list(results.values())
        self.seeds = [run["seed"] for run in self.results]
        self.splits = [_splits(run) for run in self.results]
        first = self.results[0]
        self.corpus, self.network = first["corpus"], first["student"]
        self.method, self.epochs = first["method"], first["epochs"]
        self.role, self.parameters = first["role"], first["parameters"]
        self.teacher = first["teacher"] or {}
        self.options = options_of(first)
        # By which other runs refer to these, and these to other runs
        self.places = set(map(place_of, self.folders))
        self.matched_to = set(map(place_of, first["compute_matched_to"] or []))
        # May be made longer to tell it apart
        self.name = self.label = self.folders[0].parent.name
        # Groups that it is compared with, by kind
        self.references = {}

    @property
    def is_baseline(self):
        """Whether it is compared with others at equal epochs."""
        return self.role == "baseline" and not self.matched_to

    def mean(self, key):
        """Mean over the seeds of a figure of ``results.json``."""
        return statistics.mean(run[key] for run in self.results)

    def rates(self, split, rate):
        """Error rates (percent); None if a seed was not scored."""
        scores = [splits.get(split) for splits in self.splits]
        return None if None in scores else [score[rate] for score in scores]

    def latency(self, split):
        """Mean of the median latencies (ms); None if a seed has none."""
        scores = [splits.get(split, {}) for splits in self.splits]
        medians = [score.get("latency", {}).get("median") for score in scores]
        return None if None in medians else statistics.mean(medians)

    @property
    def _last_stages(self):
        return [
            folder / runs.STAGES / list(results["stages"])[-1]
            for folder, results in zip(self.folders, self.results, strict=True)
        ]

    @functools.cached_property
    def _errors(self):
        paths = [stage / runs.ERRORS for stage in self._last_stages]
        return [read_json(path) if path.is_file() else {} for path in paths]

    def errors(self, split, rate):
        """Errors ``(seeds, utterances)``, units and ids of the utterances.

        None if a seed has not kept them, or was scored on others.
        """
        found = [kept.get(split) for kept in self._errors]
        if None in found or any(f.keys() != found[0].keys() for f in found):
            return None
        ids, column = sorted(found[0]), RATES[rate]
        errors = [[seed[key][column] for key in ids] for seed in found]
        units = [found[0][key][column + 1] for key in ids]
        return np.array(errors), np.array(units), ids

    def texts(self, split):
        """Reference and hypothesis of each utterance, of the first seed.

        None if they were not kept.
        """
        path = self._last_stages[0] / f"wer_{split}.txt"
        return read_alignments(path) if path.is_file() else None

    def steps(self):
        """Steps of the optimizer, all stages; None where not kept."""
        stages = self.results[0]["stages"].values()
        counts = [stage.get("steps") for stage in stages]
        return None if None in counts else sum(counts)

    @functools.cached_property
    def _metrics(self):
        """Figures of the epochs, by stage."""
        return [
            {
                name: read_metrics(folder / runs.STAGES / name)
                for name in results["stages"]
            }
            for folder, results in zip(self.folders, self.results, strict=True)
        ]

    @functools.cached_property
    def curves(self):
        """Epochs, seconds and dev WER, counted from the first stage on."""
        found = []
        for stages in self._metrics:
            before, elapsed, curve = 0, 0.0, []
            for epochs in filter(None, stages.values()):
                curve += [
                    (
                        before + epoch["epoch"],
                        elapsed + epoch["seconds"],
                        epoch["valid"]["WER"],
                    )
                    for epoch in epochs
                    if "WER" in epoch["valid"]
                ]
                before += epochs[-1]["epoch"]
                elapsed += epochs[-1]["seconds"]
            found.append(curve)
        return list(filter(None, found))

    def quarters(self):
        """Best dev WER before the last quarter of the epochs, and in it.

        Means over the seeds; None if not known.
        """
        found = []
        for curve in self.curves:
            early = [wer for n, _, wer in curve if n <= 0.75 * self.epochs]
            late = [wer for n, _, wer in curve if n > 0.75 * self.epochs]
            if early and late:
                found.append((min(early), min(late)))
        return tuple(np.mean(found, axis=0).tolist()) if found else None

    def epochs_to_reach(self, other):
        """Mean epochs until the dev WER is that which others end with.

        ``never`` if a seed does not reach it, None if not known.
        """
        ends = [min(wer for *_, wer in curve) for curve in other.curves]
        if not ends or not self.curves:
            return None
        wanted = statistics.mean(ends)
        first = [
            next((epoch for epoch, _, wer in curve if wer <= wanted), None)
            for curve in self.curves
        ]
        return "never" if None in first else statistics.mean(first)

    def rkd_errors(self):
        """Mean dev loss after the first and last epoch of fitting states.

        None if no stage does that.
        """
        found = [
            (epochs[0]["valid"]["loss"], epochs[-1]["valid"]["loss"])
            for stages in self._metrics
            for name, epochs in stages.items()
            if epochs and name in STAGES and STAGES[name].teacher == "hidden"
        ]
        return tuple(np.mean(found, axis=0).tolist()) if found else None


def group(folders):
    """Group finished runs by all but their seed.

    Runs of a group lie side by side in one folder. Each run counts once.
    """
    groups = {}
    for folder in dict.fromkeys(map(Path, folders)):
        results = read_finished(folder)
        teacher = results["teacher"] and results["teacher"]["name"]
        key = *(results[name] for name in ALIKE), teacher, folder.parent
        groups.setdefault(key, {})[folder] = results
    return list(map(Group, groups.values()))


def read_groups(folders):
    """Groups of finished runs with labels, names of their own and references.

    Raises :class:`InputError` as :func:`read_finished` and
    :func:`check_teachers` do.
    """
    groups = group(folders)
    check_teachers(groups)
    for depth in (2, 3, 4):
        names = [(found.corpus, found.name) for found in groups]
        for found in groups:
            if names.count((found.corpus, found.name)) > 1:
                parts = found.folders[0].parts[-1 - depth : -1]
                found.name = "/".join(parts)
    set_labels(groups)
    for found in groups:
        found.references = find_references(found, groups)
    return groups


def check_teachers(groups):
    """Refuse runs whose teachers have the same name and other weights.

    Students of one corpus and teacher are compared with each other, so what
    differs must not be the teacher.
    """
    seen = {}
    for found in groups:
        for folder, results in zip(found.folders, found.results, strict=True):
            teacher = results["teacher"] or {}
            digest = teacher.get("weights_sha256")
            if digest is None:
                continue
            key = found.corpus, teacher["name"]
            other, theirs = seen.setdefault(key, (folder, digest))
            if theirs != digest:
                raise InputError(
                    f"{other} and {folder} were distilled from different "
                    f"teachers of the same name, {teacher['name']} (SHA-256 of "
                    f"the weights {theirs[:12]} and {digest[:12]}): train both "
                    "from one teacher, give one of the teachers another name, "
                    "or report on them apart"
                )


def find_references(found, groups):
    """Find what a student's runs are compared with, by kind of reference.

    ``EQUAL_EPOCHS`` and ``COMPUTE_MATCHED`` are baselines of the same network
    on the same corpus. Of several with as many epochs, the one with most of the
    student's options and no others counts, else the first. ``FIRST`` is the
    first run with the same method, teacher and epochs, which differs in other
    options. A run of one seed is compared with such runs alone, and a mean over
    seeds with means; compute-matched baselines and teachers with none.
    """
    if found.role == "teacher" or found.matched_to:
        return {}
    alike = [
        other
        for other in groups
        if other.role != "teacher"
        and (other.corpus, other.network, other.parameters)
        == (found.corpus, found.network, found.parameters)
        and (len(other.seeds) > 1) == (len(found.seeds) > 1)
    ]
    first = next(
        other
        for other in alike
        if not other.matched_to
        and (other.method, other.teacher.get("name"), other.epochs)
        == (found.method, found.teacher.get("name"), found.epochs)
    )
    references = {} if first is found else {FIRST: first}
    if found.is_baseline:
        return references
    equal = [o for o in alike if o.is_baseline and o.epochs == found.epochs]
    if equal:
        references[EQUAL_EPOCHS] = max(
            equal, key=lambda other: _shared_options(found, other)
        )
    for other in alike:
        if found.places & other.matched_to:
            references.setdefault(COMPUTE_MATCHED, other)
    return references


def _shared_options(student, baseline):
    """How many options they share, 0 if the baseline has another."""
    ours, theirs = student.options.items(), baseline.options.items()
    return len(theirs) if theirs <= ours else 0
