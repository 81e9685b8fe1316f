"""Plans: which runs of ``train.py`` are compared, read from plain YAML.

A plan names corpora, teachers, students, methods and seeds; each combination
is a run. The recipe's README describes the keys.
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

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from speechbrain.utils.run_opts import RunOptions

from tutornet_sb.corpora.tables import KINDS, name_tables
from tutornet_sb.networks import runs
from tutornet_sb.networks.streaming import can_stream
from tutornet_sb.training.names import name_run
from tutornet_sb.training.settings import load_experiment
from tutornet_sb.training.stages import list_methods
from tutornet_sb.util import errors
from tutornet_sb.util.composition import list_keys, read_merged
from tutornet_sb.util.errors import InputError, nearest
from tutornet_sb.util.options import write_value

BASE = "hparams/base.yaml"
TEACHER = "hparams/teacher.yaml"
TEACHER_SEED = 1234
MATCHED = "compute_matched_to"
# Of a pretrained teacher: as --teacher.source and so on
SOURCES = "source", "revision", "kind"
LISTS = "corpora", "teachers", "students", "methods", "seeds"
EXPERIMENT = *LISTS, "options", "vary", MATCHED
PLAN = "title", "recipe", "results_folder", *EXPERIMENT, "experiments"
# SpeechBrain's own, which no YAML file has, and their defaults
RUN_OPTIONS = {
    field.name: field.default
    for field in dataclasses.fields(RunOptions)
    if field.name not in ("max_grad_norm", "ckpt_interval_minutes")
}
# Options that follow from a key of a plan, and that key
SET_BY_PLAN = {
    option: key
    for key, options in {
        "seeds": "seed",
        "methods": "stages",
        "students": "student_yaml",
        "corpora": "corpus_yaml",
        "teachers": "teacher.folder teacher.source teacher.revision "
        "teacher.kind teacher.yaml teacher_name",
        "results_folder": "run_name output_folder results_folder corpus_folder",
        "recipe": "recipe_folder",
        MATCHED: MATCHED,
    }.items()
    for option in options.split()
}


class PlanError(InputError):
    """A plan that cannot be carried out; the message has the remedy."""


class Job(NamedTuple):
    """One run of ``train.py``; paths are relative to the recipe's folder."""

    folder: str
    main_file: str
    options: dict
    # None if they follow from the compute of other runs
    epochs: int | None
    # Output folders of the runs that must be finished before
    needs: tuple = ()

    def command(self):
        """Words of the command line, to be run in the recipe's folder."""
        words = [sys.executable, "train.py", self.main_file, "--noprogressbar"]
        return words + option_words(self.options)

    def with_epochs(self, recipe):
        """Fill in the epochs that match the compute of finished runs."""
        matched = self.options.get(MATCHED)
        if matched is None:
            return self
        seconds = statistics.mean(
            total_seconds(runs.read_results(recipe / folder))
            for folder in matched
        )
        # The other runs that it needs are baselines like it.
        baselines = [
            runs.read_results(recipe / folder)
            for folder in self.needs
            if folder not in matched
        ]
        epoch = statistics.mean(
            run["train_seconds"] / run["epochs"] for run in baselines
        )
        epochs = max(1, round(seconds / epoch))
        return self._replace(
            epochs=epochs, options=self.options | {"epochs": epochs}
        )


class Entry(NamedTuple):
    """A corpus, teacher or student of a plan, its YAML file and options."""

    name: str
    file: str
    options: dict


class Plan(NamedTuple):
    """What a plan asks for: runs in the folder ``results``, teachers first."""

    title: str
    recipe: Path
    results: Path
    jobs: list


def option_words(options):
    """Words of a command line that give options of ``train.py``."""
    words = []
    for key, value in options.items():
        if isinstance(RUN_OPTIONS.get(key), bool):
            words += [f"--{key}"] if value else []
        else:
            words += [f"--{key}", write_value(value)]
    return words


def differing(ours, theirs):
    """Names of the options in which two runs differ.

    Example
    -------
    >>> differing({"lr": 1, "seed": 2}, {"lr": 1.0, "seed": 3, "delay": None})
    ['seed', 'delay']
    """
    ours, theirs = ({k: (v,) for k, v in o.items()} for o in (ours, theirs))
    return [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]


def total_seconds(results):
    """Seconds of training of a run and of its teacher, by its results."""
    teacher = results["teacher"] or {}
    return results["train_seconds"] + teacher.get("train_seconds", 0.0)


def read_plan(path, data=None, only=None):
    """Read a :class:`Plan` and check all of it, before anything is run.

    ``data`` has folders of corpora by their names in the plan, ``only`` names
    of the corpora to use. The recipe's YAML files, which can run code, are
    loaded to check the options; the plan itself is plain YAML. Raises
    :class:`PlanError` for what cannot be carried out.
    """
    path = Path(path)
    if not path.is_file():
        raise errors.MissingFileError(f"there is no plan {path}")
    try:
        content = YAML(typ="safe", pure=True).load(path)
    except YAMLError as error:
        reason = errors.yaml_problem(error)
        raise PlanError(f"{path} is no plain YAML: {reason}") from None
    try:
        return _Reader(path, content, data or {}, only).read()
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


class _Reader:
    """Makes the jobs that the content of a plan describes."""

    def __init__(self, path, content, data, only):
        _check_keys(content, PLAN, "the plan")
        self.content = content
        recipe = Path(content.get("recipe", Path.cwd())).expanduser()
        self.recipe = (path.parent / recipe).resolve()
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
        base = read_merged(self.recipe / BASE)
        self.known = [*list_keys(base), *RUN_OPTIONS]
        self.corpora = self._entries("corpora", content.get("corpora"))
        self.only = list(self.corpora) if only is None else only
        for option, names in (("--data", data), ("--corpus", self.only)):
            _choose(names, self.corpora, option, "corpus")
        for name, folder in data.items():
            folder = str(Path(folder).expanduser().resolve())
            self.corpora[name].options["data_folder"] = folder
        self.teachers = self._entries("teachers", content.get("teachers"))

    def read(self):
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
        # Students wait for their teachers.
        jobs = sorted(
            self.jobs.values(), key=lambda job: job.main_file != TEACHER
        )
        return Plan(self.title, self.recipe, self.recipe / self.results, jobs)

    def _experiment(self, block):
        self._check_options(block["options"], "options")
        corpora = _names(block, "corpora", self.corpora)
        teachers = _names(block, "teachers", self.teachers) or [None]
        students = self._entries("students", block["students"])
        methods, seeds = _list(block, "methods"), _list(block, "seeds")
        _choose(methods, list_methods(), "methods", "method")
        for seed in seeds:
            _check_seed(seed, "seeds")
        matched = block[MATCHED]
        if matched is not None:
            _choose([matched], methods, MATCHED, "method of the experiment")
            _choose(["ctc"], methods, f"{MATCHED} needs ctc too", "method")
        for corpus, student, (label, options) in itertools.product(
            [name for name in corpora if name in self.only],
            students.values(),
            self._vary(block),
        ):
            options, made = {**block["options"], **options}, {}
            for seed, method in itertools.product(seeds, methods):
                # The first teacher is what a streaming baseline is timed by.
                for teacher in teachers if method != "ctc" else teachers[:1]:
                    job = self._student(
                        corpus, student, method, teacher, label, options, seed
                    )
                    made.setdefault((method, teacher), []).append(job)
            baselines = made.get(("ctc", teachers[0]), [])
            for (method, _), jobs in made.items():
                if method == matched != "ctc":
                    self._match(corpus, student.name, baselines, jobs)

    def _student(self, corpus, student, method, teacher, label, options, seed):
        """Add a run of a student, and that of its teacher if there is one."""
        stages = method.split("+")
        options = self._options(corpus, student, options)
        hparams, needs = self._load(BASE, options), ()
        options["stages"] = stages
        if method != "ctc" or can_stream(hparams["student"]["model"]):
            teacher = teacher or Path(hparams["teacher"]["yaml"]).stem
            of_teacher, needs = self._teacher(corpus, teacher)
            options |= of_teacher
        # The name that train.py gives by itself
        run = name_run(stages, student.name, teacher)
        folder = f"{corpus}/{run}{label}"
        return self._add(folder, BASE, options, seed, hparams, needs)

    def _teacher(self, corpus, name):
        """Options that give a student its teacher, and the run it needs."""
        if name not in self.teachers:
            # That of the corpus, where the plan names none.
            self.teachers |= self._entries("teachers", [name])
        entry = self.teachers[name]
        if "folder" in entry.options:
            folder = os.path.expanduser(entry.options["folder"])
            if not runs.is_finished(self.recipe / folder):
                raise PlanError(
                    f"teachers: {name}: there is no finished run in {folder}"
                )
            return {"teacher.folder": folder}, ()
        if "source" in entry.options:
            own = entry.options.items()
            return {f"teacher.{key}": value for key, value in own}, ()
        shared = _mapping(self.content.get("options"), "options")
        shared = {k: v for k, v in shared.items() if k in RUN_OPTIONS}
        options = self._options(corpus, entry, shared)
        seed = options.pop("seed", TEACHER_SEED)
        hparams = self._load(TEACHER, options)
        folder = f"{corpus}/teacher_{name}"
        job = self._add(folder, TEACHER, options, seed, hparams)
        return {"teacher.folder": job.folder}, (job.folder,)

    def _options(self, corpus, network, options):
        """Options of runs of a network on a corpus, with its own over them."""
        corpus = self.corpora[corpus]
        options = _merged(corpus.options, options)
        files = {
            "corpus_yaml": f"hparams/corpora/{corpus.file}.yaml",
            "student_yaml": f"hparams/models/{network.file}.yaml",
        }
        merged = files | _merged(options, network.options)
        for kind, entry in ("corpus", corpus), ("student", network):
            # It is called as in the plan.
            if entry.name != entry.file:
                name = {f"{kind}_overrides": {"name": entry.name}}
                merged = _merged(merged, name)
        return merged

    def _match(self, corpus, student, baselines, students):
        """Add a baseline with as many epochs as runs of a method cost."""
        folders = [job.folder for job in students]
        name = f"ctc_{student}_{MATCHED}_{Path(folders[0]).parent.name}"
        needs = *folders, *(job.folder for job in baselines)
        for job in baselines:
            options = {k: v for k, v in job.options.items() if k != "epochs"}
            options[MATCHED] = folders
            seed = options["seed"]
            self._add(f"{corpus}/{name}", BASE, options, seed, None, needs)

    def _add(self, folder, main_file, options, seed, hparams, needs=()):
        """Add a run, unless another experiment has it already.

        Without ``hparams`` its epochs follow from the runs that it needs.
        """
        if hparams is not None:
            self._check_data(folder.partition("/")[0], hparams)
        folder = f"{self.results}/{folder}/{seed}"
        options = options | {
            "results_folder": self.results,
            "output_folder": folder,
            "seed": seed,
        }
        epochs = None if hparams is None else hparams["epochs"]
        job = Job(folder, main_file, options, epochs, needs)
        other = self.jobs.setdefault(folder, job)
        if other != job:
            keys = differing(other.options, options) or ["their needs"]
            raise PlanError(
                f"{folder} would be two runs, which differ in "
                f"{', '.join(keys)}: put that under vary"
            )
        return other

    def _check_data(self, corpus, hparams):
        """Refuse a corpus that cannot be found."""
        data, paths = hparams["data_folder"], []
        for kind in KINDS:
            tables = name_tables(kind, hparams[f"{kind}_csv"], self.recipe)
            paths += tables.values()
        if data is not None:
            paths.append(self.recipe / Path(data).expanduser())
        if not paths and hparams["corpus"]["minilibri"] is None:
            raise PlanError(
                f"corpora: {corpus}: it is not embedded; name its folder by "
                f"--data {corpus}=FOLDER, or name its train_csv, valid_csv and "
                "test_csv"
            )
        for path in paths:
            if not path.exists():
                raise PlanError(f"corpora: {corpus}: there is no {path}")

    def _vary(self, block):
        """Label and options of each variation, all combined."""
        axes = []
        for axis, choices in _mapping(block["vary"], "vary").items():
            where = f"vary: {axis}"
            if isinstance(choices, list):
                self._check_options([axis], "vary")
                choices = {f"{axis}_{v}": {axis: v} for v in choices}
            sets = {}
            for name, options in _mapping(choices, where).items():
                sets[_label(name, where)] = _mapping(options, where)
                self._check_options(options or {}, f"{where}: {name}")
            if not sets:
                raise PlanError(f"{where}: names nothing")
            axes.append(sets.items())
        for combined in itertools.product(*axes):
            label, options = "", {}
            for name, more in combined:
                label, options = f"{label}_{name}", _merged(options, more)
            yield label, options

    def _entries(self, key, named):
        """Read the corpora, teachers or students that a plan names."""
        if isinstance(named, list):
            named = dict.fromkeys(named)
        kind = "corpora" if key == "corpora" else "models"
        files = sorted((self.recipe / "hparams" / kind).glob("*.yaml"))
        found = {}
        for name, own in _mapping(named, key).items():
            where = f"{key}: {name}"
            own = dict(_mapping(own, where))
            file = own.pop("file", name)
            if key == "teachers" and ("folder" in own or "source" in own):
                _check_keys(own, ("folder", *SOURCES), where)
            else:
                stems = [path.stem for path in files]
                _choose([file], stems, key, f"file in hparams/{kind}")
                options = set(own)
                if key == "teachers" and "seed" in own:
                    _check_seed(own["seed"], where)
                    options.remove("seed")
                self._check_options(options, where)
            found[name] = Entry(_label(name, key), file, own)
        if not found and key != "teachers":
            raise PlanError(f"{key}: names nothing")
        return found

    def _check_options(self, options, where):
        for key in options:
            if key in SET_BY_PLAN:
                raise PlanError(
                    f"{where}: {key} follows from the plan's {SET_BY_PLAN[key]}"
                )
        _choose(options, self.known, where, "option of train.py")

    def _load(self, main_file, options):
        """Load what the run will load, to find what is wrong with it."""
        own = {k: v for k, v in options.items() if k not in RUN_OPTIONS}
        key = json.dumps([main_file, own], sort_keys=True)
        if key not in self.loaded:
            try:
                _, self.loaded[key] = load_experiment(
                    self.recipe / main_file,
                    own,
                    self.recipe,
                )
            except InputError as error:
                given = ", ".join(f"{k} {v}" for k, v in own.items())
                raise PlanError(f"a run with {given}: {error}") from None
        return self.loaded[key]


def _check_keys(content, known, where):
    _choose(_mapping(content, where), known, where, "key")


def _choose(names, known, where, kind):
    """Refuse an unknown name and suggest the nearest."""
    for name in names:
        if name not in known:
            raise PlanError(
                f"{where}: no {kind} is called {name!r}; {nearest(name, known)}"
            )


def _names(block, key, known):
    """Those of the plan's that an experiment names, all by default."""
    names = list(known if block[key] is None else block[key])
    _choose(names, known, key, "entry of the plan")
    return names


def _check_seed(seed, where):
    if not isinstance(seed, int):
        raise PlanError(f"{where}: {seed!r} is no whole number")


def _mapping(value, where):
    if not isinstance(value, dict | None):
        raise PlanError(f"{where}: must be a mapping of names to values")
    return value or {}


def _list(block, key):
    value = block.get(key)
    if not isinstance(value, list) or not value:
        raise PlanError(f"{key}: must be a list with something in it")
    return value


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
