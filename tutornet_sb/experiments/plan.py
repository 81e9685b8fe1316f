"""Plans: which runs of ``train.py`` are compared, read from plain YAML.

A plan names corpora, teachers, students, methods and seeds; each combination
is a run, and each teacher another, which its students share. The recipe's
README describes the keys.
"""

import dataclasses
import itertools
import json
import os
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from speechbrain.utils.run_opts import RunOptions

from tutornet_sb.corpora.tables import KINDS, name_tables
from tutornet_sb.networks import runs
from tutornet_sb.networks.streaming import check_streamable
from tutornet_sb.training.names import name_run
from tutornet_sb.util.composition import read_experiment
from tutornet_sb.util.errors import InputError, MissingFileError, nearest
from tutornet_sb.util.options import write_value

BASE = "hparams/base.yaml"
TEACHER = "hparams/teacher.yaml"
TEACHER_SEED = 1234
METHODS = "ctc", "skd", "pseudo", "rkd", "rkd+ctc", "rkd+skd", "rkd+pseudo"
# Of a teacher that is there already: as --teacher_source and so on
SOURCES = "source", "revision", "kind"
EXPERIMENT = (
    "corpora",
    "teachers",
    "students",
    "methods",
    "seeds",
    "options",
    "vary",
    "ctc_at_cost_of",
)
PLAN = ("title", "recipe", "results_folder", *EXPERIMENT, "experiments")
# SpeechBrain's own, which stand in no YAML file, and their defaults
RUN_OPTIONS = {
    field.name: field.default for field in dataclasses.fields(RunOptions)
}
# What a run is told by its place in the plan
SET_HERE = {
    "seed": "seeds",
    "method": "methods",
    "stages": "methods",
    "student_yaml": "students",
    "corpus_yaml": "corpora",
    "teacher_folder": "teachers",
    "teacher_source": "teachers",
    "teacher_revision": "teachers",
    "teacher_kind": "teachers",
    "teacher_yaml": "teachers",
    "teacher_name": "teachers",
    "run_name": "results_folder",
    "output_folder": "results_folder",
    "results_folder": "results_folder",
    "corpus_folder": "results_folder",
    "recipe_folder": "recipe",
}


class PlanError(InputError):
    """A plan that cannot be carried out, and what to do about it."""


class Cost(NamedTuple):
    """Runs whose seconds say how many epochs another run has.

    Attributes
    ----------
    taught : tuple of str
        Output folders of the runs whose cost is matched, teacher included.
    alone : tuple of str
        Those of runs whose epochs cost as much as the other run's.
    """

    taught: tuple
    alone: tuple


class Job(NamedTuple):
    """One run of ``train.py``.

    Attributes
    ----------
    folder : str
        Its output folder, relative to the recipe's, as all paths here.
    hparams : str
        Main YAML file.
    options : dict
        What ``train.py`` is told besides.
    epochs : int or None
        Of all its stages; None if its cost says it.
    needs : tuple of str
        Output folders of the runs that must be finished before.
    cost : Cost or None
        What it must cost as much as.
    """

    folder: str
    hparams: str
    options: dict
    epochs: int | None
    needs: tuple = ()
    cost: Cost | None = None

    def command(self):
        """Give the command line, to be run in the recipe's folder.

        Returns
        -------
        list of str
            Words.
        """
        words = [sys.executable, "train.py", self.hparams, "--noprogressbar"]
        for key, value in self.options.items():
            if isinstance(RUN_OPTIONS.get(key), bool):
                words += [f"--{key}"] if value else []
                continue
            words += [f"--{key}", write_value(value)]
        return words

    def with_epochs(self, recipe):
        """Fill in the epochs that follow from the cost of finished runs.

        Arguments
        ---------
        recipe : pathlib.Path
            The recipe's folder.

        Returns
        -------
        Job
            With its epochs.
        """
        if self.cost is None:
            return self
        taught = [
            runs.read_results(recipe / folder) for folder in self.cost.taught
        ]
        alone = [
            runs.read_results(recipe / folder) for folder in self.cost.alone
        ]
        seconds = statistics.mean(map(total_seconds, taught))
        epoch = statistics.mean(
            run["train_seconds"] / run["epochs"] for run in alone
        )
        epochs = max(1, round(seconds / epoch))
        return self._replace(
            epochs=epochs, options=self.options | {"epochs": epochs}
        )


class Plan(NamedTuple):
    """What a plan asks for.

    Attributes
    ----------
    title : str
        What is asked, for the reader of the report.
    recipe : pathlib.Path
        Folder with ``train.py`` and ``hparams``.
    results : pathlib.Path
        Folder of all its runs.
    jobs : list of Job
        Teachers first.
    """

    title: str
    recipe: Path
    results: Path
    jobs: list


def total_seconds(results):
    """Seconds of training that a run has cost, those of its teacher included.

    Arguments
    ---------
    results : dict
        As ``results.json`` has them.

    Returns
    -------
    float
        Seconds.
    """
    teacher = results["teacher"] or {}
    return results["train_seconds"] + teacher.get("train_seconds", 0.0)


def read_plan(path, data=None, only=None):
    """Read a plan and check all of it, before anything is run.

    The recipe's own YAML files are loaded to check the options, which can run
    code as any HyperPyYAML; the plan itself cannot.

    Arguments
    ---------
    path : str or pathlib.Path
        The plan.
    data : dict, optional
        Where corpora lie, by the name that the plan gives them.
    only : list of str, optional
        Names of those corpora that are wanted, all by default.

    Returns
    -------
    Plan
        What it asks for.

    Raises
    ------
    FileNotFoundError
        If the plan is not there.
    PlanError
        If it asks for something that is not there or makes no sense.
    """
    path = Path(path)
    content = _read_yaml(path)
    try:
        return _Reader(path, content, data or {}, only).read()
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def _read_yaml(path):
    if not path.is_file():
        raise MissingFileError(f"there is no plan {path}")
    try:
        content = YAML(typ="safe", pure=True).load(path)
    except YAMLError as error:
        reason = " ".join(str(error).split())
        raise PlanError(f"{path} is no plain YAML: {reason}") from None
    if not isinstance(content, dict):
        raise PlanError(f"{path} is not a mapping of names to values")
    return content


class _Reader:
    """Makes jobs of a plan's content."""

    def __init__(self, path, content, data, only):
        _check_keys(content, PLAN, "the plan")
        self.content = content
        recipe = content.get("recipe", Path.cwd())
        recipe = path.parent / Path(recipe).expanduser()
        self.recipe = recipe.resolve()
        if not (self.recipe / "train.py").is_file():
            raise PlanError(
                f"recipe: there is no {self.recipe / 'train.py'}; name the "
                "recipe's folder, relative to the plan's own"
            )
        self.title = str(content.get("title", path.stem))
        self.results = os.path.expanduser(
            str(content.get("results_folder", f"results/{path.stem}"))
        )
        self.jobs, self.loaded = {}, {}
        self.texts = {
            main: read_experiment(self.recipe / main)
            for main in (BASE, TEACHER)
        }
        self.base = YAML().load(self.texts[BASE])
        self.known = [*self.base, *RUN_OPTIONS]
        self.corpora = self._entries(content, "corpora", "corpora")
        self.only = list(self.corpora) if only is None else only
        for option, names in (("--data", data), ("--corpus", self.only)):
            for name in names:
                _choose(name, self.corpora, option, "corpus")
        for name, (_, options) in self.corpora.items():
            if name in data:
                options["data_folder"] = str(
                    Path(data[name]).expanduser().resolve()
                )
        self.teachers = self._entries(
            content, "teachers", "models", ("folder", *SOURCES)
        )

    def read(self):
        """Make the jobs of all experiments."""
        shared = {key: self.content.get(key) for key in EXPERIMENT}
        blocks = self.content.get("experiments", [{}])
        if not isinstance(blocks, list):
            raise PlanError("experiments: must be a list of mappings")
        for number, block in enumerate(blocks, 1):
            where = f"experiments, number {number}"
            _check_keys(block, EXPERIMENT, where)
            options = {
                **_mapping(shared["options"], "options"),
                **_mapping(block.get("options"), f"{where}, options"),
            }
            self._experiment({**shared, **block, "options": options})
        return Plan(
            self.title,
            self.recipe,
            self.recipe / self.results,
            # Students wait for them.
            sorted(self.jobs.values(), key=lambda job: job.hparams != TEACHER),
        )

    def _experiment(self, block):
        self._check_options(block["options"], "options")
        corpora = [
            name
            for name in _names(block, "corpora", self.corpora)
            if name in self.only
        ]
        teachers = _names(block, "teachers", self.teachers)
        students = self._entries(block, "students", "models")
        methods = _list(block, "methods")
        for method in methods:
            _choose(method, METHODS, "methods", "method")
        seeds = _list(block, "seeds")
        for seed in seeds:
            if not isinstance(seed, int):
                raise PlanError(f"seeds: {seed!r} is no whole number")
        cost_of = block["ctc_at_cost_of"]
        if cost_of is not None:
            _choose(cost_of, methods, "ctc_at_cost_of", "method of its own")
            _choose("ctc", methods, "ctc_at_cost_of needs ctc too", "method")
        for (corpus, student), variation in itertools.product(
            itertools.product(corpora, students.items()), self._vary(block)
        ):
            label, options = variation
            options = {**block["options"], **options}
            made = {}
            for seed, method in itertools.product(seeds, methods):
                # Alone, a streaming student is timed by the first teacher.
                asked = teachers or [None]
                for teacher in asked if method != "ctc" else asked[:1]:
                    job = self._student(
                        corpus, student, method, teacher, label, options, seed
                    )
                    made.setdefault((method, teacher), []).append(job)
            if cost_of is not None:
                self._at_cost(made, cost_of, student[0])

    def _student(self, corpus, student, method, teacher, label, options, seed):
        """Add a run of a student, and its teacher's if it is not there."""
        name, (file, own) = student
        options = self._told(corpus, options) | {
            "student_yaml": f"hparams/models/{file}.yaml",
            "method": method,
            "stages": method.split("+"),
        }
        options = _named(_merged(options, own), "student", name, file)
        hparams = self._load(BASE, options)
        needs = ()
        if method != "ctc" or _can_stream(hparams["student"]["model"]):
            teacher = teacher or hparams["corpus"]["teacher"]
            told, needs = self._teacher(corpus, teacher)
            options |= told
        # As train.py calls it by itself
        folder = f"{corpus}/{name_run(method, name, teacher)}{label}"
        return self._add(folder, BASE, options, seed, hparams, needs)

    def _told(self, corpus, options):
        """What the runs on a corpus are told, by it and otherwise."""
        file, own = self.corpora[corpus]
        told = {"corpus_yaml": f"hparams/corpora/{file}.yaml"}
        return _named(
            _merged(_merged(told, own), options), "corpus", corpus, file
        )

    def _teacher(self, corpus, name):
        """What a student is told of its teacher, and which run it needs."""
        if name not in self.teachers:
            # That of the corpus, where the plan names none.
            self.teachers |= self._entries(
                {"teachers": [name]}, "teachers", "models"
            )
        file, own = self.teachers[name]
        own = dict(own)
        if "folder" in own:
            folder = os.path.expanduser(own.pop("folder"))
            if not runs.is_finished(self.recipe / folder):
                raise PlanError(
                    f"teachers: {name}: there is no finished run in {folder}"
                )
            return {"teacher_folder": folder}, ()
        if "source" in own:
            return {f"teacher_{key}": value for key, value in own.items()}, ()
        seed = own.pop("seed", TEACHER_SEED)
        shared = {
            key: value
            for key, value in _mapping(
                self.content.get("options"), "options"
            ).items()
            if key in RUN_OPTIONS and key not in self.base
        }
        options = self._told(corpus, shared) | {
            "student_yaml": f"hparams/models/{file}.yaml"
        }
        options = _named(_merged(options, own), "student", name, file)
        hparams = self._load(TEACHER, options)
        folder = f"{corpus}/teacher_{name}"
        job = self._add(folder, TEACHER, options, seed, hparams)
        return {"teacher_folder": job.folder}, (job.folder,)

    def _add(self, folder, main, options, seed, hparams, needs=(), cost=None):
        """Add a run, unless another experiment has it already."""
        data, corpus = hparams["data_folder"], folder.partition("/")[0]
        tables = {}
        for kind in KINDS:
            paths = hparams[f"{kind}_csv"]
            tables |= name_tables(kind, paths, self.recipe)
        embedded = hparams["corpus"]["minilibri"] is not None
        if data is None and not tables and not embedded:
            raise PlanError(
                f"corpora: {corpus}: it is not embedded; say where it lies by "
                f"--data {corpus}=FOLDER, or name its train_csv, valid_csv and "
                "test_csv"
            )
        for path in tables.values():
            if not path.is_file():
                raise PlanError(f"corpora: {corpus}: there is no table {path}")
        if (
            data is not None
            and not (self.recipe / Path(data).expanduser()).is_dir()
        ):
            raise PlanError(f"corpora: {corpus}: there is no folder {data}")
        folder = f"{self.results}/{folder}/{seed}"
        options = options | {
            "results_folder": self.results,
            "output_folder": folder,
            "seed": seed,
        }
        epochs = None if cost else hparams["epochs"]
        job = Job(folder, main, options, epochs, needs, cost)
        other = self.jobs.setdefault(folder, job)
        if other != job:
            keys = [
                key
                for key in {**other.options, **options}
                if other.options.get(key) != options.get(key)
            ]
            raise PlanError(
                f"{folder} would be two runs, which differ in "
                f"{', '.join(keys) or 'their cost'}: put that under vary"
            )
        return other

    def _at_cost(self, made, method, student):
        """Add CTC alone with as many epochs as a taught run costs."""
        ((_, alone),) = [
            (key, jobs) for key, jobs in made.items() if key[0] == "ctc"
        ]
        for (other, _), taught in made.items():
            if other != method or method == "ctc":
                continue
            cost = Cost(
                tuple(job.folder for job in taught),
                tuple(job.folder for job in alone),
            )
            *_, corpus, name, _ = taught[0].folder.split("/")
            for job in alone:
                own = {
                    key: value
                    for key, value in job.options.items()
                    if key not in ("epochs", "output_folder")
                }
                self._add(
                    f"{corpus}/ctc_{student}_at_cost_of_{name}",
                    BASE,
                    own,
                    own["seed"],
                    self._load(BASE, own),
                    cost.taught + cost.alone,
                    cost,
                )

    def _vary(self, block):
        """Label and options of each variation, all combined."""
        axes = []
        for axis, choices in _mapping(block["vary"], "vary").items():
            where = f"vary: {axis}"
            if isinstance(choices, list):
                self._check_options({axis: None}, "vary")
                sets = {
                    _label(f"{axis}_{value}", where): {axis: value}
                    for value in choices
                }
            else:
                sets = {
                    _label(name, where): _mapping(options, f"{where}: {name}")
                    for name, options in _mapping(choices, where).items()
                }
                for name, options in sets.items():
                    self._check_options(options, f"{where}: {name}")
            if not sets:
                raise PlanError(f"{where}: names nothing")
            axes.append(sets.items())
        for combined in itertools.product(*axes):
            label = "".join(f"_{name}" for name, _ in combined)
            options = {}
            for _, more in combined:
                options = _merged(options, more)
            yield label, options

    def _entries(self, block, key, folder, more=()):
        """Read names of YAML files, each with options of its own."""
        named = block.get(key)
        if isinstance(named, list):
            named = dict.fromkeys(named)
        found = {}
        files = sorted(
            path.stem for path in (self.recipe / "hparams" / folder).iterdir()
        )
        for name, own in _mapping(named, key).items():
            where = f"{key}: {name}"
            own = dict(_mapping(own, where))
            file = own.pop("file", name)
            is_there = {"folder", "source"} & set(own) & set(more)
            if is_there:
                _check_keys(own, more, where)
            else:
                _choose(file, files, key, f"file in hparams/{folder}")
                seed = own.get("seed")
                without = {k: v for k, v in own.items() if k != "seed"}
                self._check_options(without if more else own, where)
                if more and not isinstance(seed, int | None):
                    raise PlanError(f"{where}: seed {seed!r} is no number")
            found[_label(name, key)] = (file, own)
        if not found and key != "teachers":
            raise PlanError(f"{key}: names nothing")
        return found

    def _check_options(self, options, where):
        for key in options:
            if key in SET_HERE:
                raise PlanError(
                    f"{where}: {key} follows from the plan's {SET_HERE[key]}"
                )
            _choose(key, self.known, where, "option of train.py")

    def _load(self, main, options):
        """Read what the run will read, to find what is wrong with it."""
        own = {
            key: value
            for key, value in options.items()
            if key in self.base or key not in RUN_OPTIONS
        } | {"recipe_folder": str(self.recipe)}
        # These do not matter to it.
        for key in ("seed", "method", "stages"):
            own.pop(key, None)
        key = json.dumps([main, own], sort_keys=True)
        if key not in self.loaded:
            try:
                self.loaded[key] = load_hyperpyyaml(self.texts[main], own)
            # What a wrong value raises depends on what it is given to.
            except Exception as error:
                reason = " ".join(str(error).split())
                told = ", ".join(
                    f"{key} {value}"
                    for key, value in own.items()
                    if key != "recipe_folder"
                )
                raise PlanError(f"a run with {told}: {reason}") from None
        return self.loaded[key]


def _check_keys(content, known, where):
    for key in _mapping(content, where):
        _choose(key, known, where, "key")


def _choose(name, known, where, kind):
    """Refuse a name that is not known, and say what is near."""
    if name not in known:
        raise PlanError(
            f"{where}: no {kind} is called {name!r}; {nearest(name, known)}"
        )


def _mapping(value, where):
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise PlanError(f"{where}: must be a mapping of names to values")
    return value


def _list(block, key):
    value = block.get(key)
    if not isinstance(value, list) or not value:
        raise PlanError(f"{key}: must be a list with something in it")
    return value


def _names(block, key, known):
    """Those of the plan's that an experiment names, all by default."""
    named = block.get(key)
    names = list(known if named is None else named)
    for name in names:
        kind = "corpus" if key == "corpora" else "teacher"
        _choose(name, known, key, f"{kind} of the plan")
    return names


def _label(name, where):
    """Refuse what cannot be part of a folder's name."""
    if not re.fullmatch(r"[\w.+=-]+", str(name)):
        raise PlanError(
            f"{where}: {name} cannot be part of a folder's name; give it a "
            "name: a mapping of names to options"
        )
    return str(name)


def _merged(options, more):
    """Options with others over them, mappings merged."""
    merged = dict(options)
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            value = merged[key] | value
        merged[key] = value
    return merged


def _named(options, kind, name, file):
    """Options by which a corpus or a network is called as in the plan."""
    if name == file:
        return options
    return _merged(options, {f"{kind}_overrides": {"name": name}})


def _can_stream(model):
    try:
        check_streamable(model.eval())
    except ValueError:
        return False
    return True
