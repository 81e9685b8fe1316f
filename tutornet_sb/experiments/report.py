"""Reports of runs: figures with their intervals, tests, costs and pictures."""

import base64
import csv
import datetime
import itertools
import re
import shlex
import shutil
import statistics
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np

from tutornet_sb.experiments import plots
from tutornet_sb.experiments.compare import group, markdown_table
from tutornet_sb.experiments.diagnostics import (
    DIAGNOSTICS,
    Ears,
    NotThere,
    find_teacher,
    read_log,
)
from tutornet_sb.experiments.jobs import COMMAND
from tutornet_sb.experiments.labels import (
    BASELINE,
    method_name,
    set_labels,
    teacher_name,
)
from tutornet_sb.experiments.plan import total_seconds
from tutornet_sb.experiments.statistics import (
    SEEDS_FOR_A_CLAIM,
    difference,
    holm,
    interval,
)
from tutornet_sb.inference.scores import read_alignments
from tutornet_sb.networks import runs
from tutornet_sb.util.errors import InputError
from tutornet_sb.util.files import read_json, write_atomically

# Options that say where the data lay
PLACES = "--data_folder", "--train_csv", "--valid_csv", "--test_csv"
# Small files of a run, by which a report can be made again, without pictures of
# what models compute
SMALL = (
    runs.RESULTS,
    DIAGNOSTICS,
    f"{runs.STAGES}/*/{runs.ERRORS}",
    f"{runs.STAGES}/*/{runs.TRAIN_LOG}",
)
# Columns of errors.json
RATES = {"wer": 0, "cer": 2}
# Curves that can be told apart in one picture, and rows that fit on a page
CURVES = 8
ROWS = 10
# Each reference and its columns in results.csv
EQUAL_EPOCHS, EQUAL_COST, FIRST = "at equal epochs", "at equal cost", "first"
REFERENCES = {EQUAL_EPOCHS: "", EQUAL_COST: "at_cost_", FIRST: "first_"}
CAPTIONS = {
    EQUAL_EPOCHS: "against the CTC baseline at equal epochs",
    EQUAL_COST: "against the compute-matched CTC baseline",
    FIRST: "each against the first with the same method, teacher and epochs",
}
HOW_TO_READ = (
    "WER and CER are in percent, after greedy decoding, means over the seeds. "
    "In brackets stands the 95 % interval of a bootstrap over seeds and "
    "utterances (Bisani and Ney 2004, Owen 2007): trainings of each model, and "
    "one test set for all, are drawn anew. After ± stands the standard "
    "deviation over the seeds. With one seed the interval is over utterances "
    "alone and holds for that training; such a row is marked (1 seed) and "
    "never compared with a mean over several.",
    "A distilled student is compared with its baseline, the same network "
    "trained by CTC alone and scored on the same utterances: at equal epochs, "
    "and compute-matched where a plan asks for a baseline with as many epochs "
    "as the student and its teacher took in seconds. Runs of one method and "
    "one teacher that differ in other options are compared with the first of "
    "them. Students of different teachers are not compared with each other, "
    "and all students of a teacher of one name were taught by the same "
    "weights (teacher_sha256 in results.csv).",
    "The p-value is two-sided, of the same bootstrap, paired by utterances. "
    "Holm's correction (1979) makes up for the number of tests in this report: "
    "where the corrected one is below 0.05, the chance of any false finding "
    "among all tests is. A comparison of fewer than "
    f"{SEEDS_FOR_A_CLAIM} seeds on either side is not sufficient for a claim. "
    "'Seeds better' counts the seeds with fewer errors than the same seed of "
    "the others.",
    "Cost is that of one student: its optimizer steps and seconds of training, "
    "and the seconds of its teacher's training. Size is that of the weights in "
    "float32. The real-time factor is seconds of computation for a second of "
    "audio, measured at the end of each run: other runs beside it made it "
    "slower, so that only those of runs made alone can be compared.",
)


class Group:
    """Runs that differ in their seed alone, and what they left.

    Arguments
    ---------
    summaries : list of dict
        From :func:`compare.group`.
    """

    def __init__(self, summaries):
        self.folders = [Path(run["folder"]) for run in summaries]
        # By which it is known, and which may be made longer to tell it apart
        self.folder_name = self.name = self.folders[0].parent.name
        self.summaries = summaries
        first = summaries[0]
        self.corpus, self.network = first["corpus"], first["name"]
        self.method, self.epochs = first["method"], first["epochs"]
        self.parameters, self.teacher = first["parameters"], first["teacher"]
        self.label = self.name
        self.splits = list(first["splits"])
        self.seeds = [run["seed"] for run in summaries]
        self.results = [runs.read_results(folder) for folder in self.folders]
        self.taught_by = teacher_name(self.results[0]["teacher"])
        self.stages = [
            [(name, folder / runs.STAGES / name) for name in results["stages"]]
            for folder, results in zip(self.folders, self.results, strict=True)
        ]
        self.logs = [
            [(name, read_log(folder)) for name, folder in stages]
            for stages in self.stages
        ]

    @property
    def is_teacher(self):
        """Whether it was trained to teach, by the name of its folder."""
        return self.folder_name.startswith("teacher_")

    def rates(self, split, rate):
        """Error rate of each seed (percent), None where one was not scored."""
        scores = [run["splits"].get(split) for run in self.summaries]
        return None if None in scores else [score[rate] for score in scores]

    def errors(self, split, rate):
        """Errors ``(seeds, utterances)``, units and ids of the utterances.

        None if a seed has not kept them, or was scored on others.
        """
        found = []
        for stages in self.stages:
            _, last = stages[-1]
            path = last / runs.ERRORS
            kept = read_json(path) if path.is_file() else {}
            found.append(kept.get(split))
        if None in found or any(f.keys() != found[0].keys() for f in found):
            return None
        ids, column = sorted(found[0]), RATES[rate]
        errors = [[seed[key][column] for key in ids] for seed in found]
        units = [found[0][key][column + 1] for key in ids]
        return np.array(errors), np.array(units), ids

    def steps(self):
        """Steps of the optimizer, all stages; None where not kept."""
        counts = [
            stage.get("steps") for stage in self.results[0]["stages"].values()
        ]
        return None if None in counts else sum(counts)

    def curves(self):
        """Epochs, seconds and dev WER of each seed, from its first stage on."""
        for stages in self.logs:
            before, elapsed, curve = 0, 0.0, []
            for _, epochs in stages:
                for line in epochs:
                    if "valid WER" in line:
                        curve.append(
                            (
                                before + line["epoch"],
                                elapsed + line["seconds"],
                                line["valid WER"],
                            )
                        )
                if epochs:
                    before += epochs[-1]["epoch"]
                    elapsed += epochs[-1]["seconds"]
            if curve:
                yield curve

    def quarters(self):
        """Best dev WER before the last quarter of the epochs, and in it.

        Means over the seeds; None if it is not known.
        """
        found = []
        for curve in self.curves():
            early = [wer for n, _, wer in curve if n <= 0.75 * self.epochs]
            late = [wer for n, _, wer in curve if n > 0.75 * self.epochs]
            if early and late:
                found.append((min(early), min(late)))
        if not found:
            return None
        return tuple(map(statistics.mean, zip(*found, strict=True)))

    def rkd_errors(self):
        """RKD loss of the development set after the first and last epoch."""
        for stages in self.logs:
            for name, epochs in stages:
                if name == "rkd" and epochs:
                    yield epochs[0]["valid loss"], epochs[-1]["valid loss"]

    def texts(self, split):
        """Reference and hypothesis of each utterance, of the first seed.

        None if they were not kept.
        """
        _, last = self.stages[0][-1]
        path = last / f"wer_{split}.txt"
        return read_alignments(path) if path.is_file() else None


class Section(NamedTuple):
    """A part of a report.

    Attributes
    ----------
    title : str
        Its heading.
    paragraphs : tuple of str
        Text.
    tables : list of (str, list of list of str)
        Caption and rows, the first of them the head.
    pictures : list of (str, bytes, str)
        Name of the file, the PNG, and what it shows.
    """

    title: str
    paragraphs: tuple = ()
    tables: list = []
    pictures: list = []


def write_report(folders, to, title, told=print):
    """Write ``results.csv``, ``report.md``, ``report.html`` and the pictures.

    Arguments
    ---------
    folders : list of (str or pathlib.Path)
        Output folders of ``train.py``. The parts for which one of them lacks
        something are left out, and the report says what is missing.
    to : str or pathlib.Path
        Folder to write into; other files there are left alone. Pictures of
        posteriors that a report made there before, and that cannot be drawn
        again for want of weights or audio, are taken over.
    title : str
        Heading.
    told : callable
        Called with a line about what takes a while.

    Raises
    ------
    FileNotFoundError
        If a folder holds no result file.
    ValueError
        If a result file lacks a figure, or runs that name the same teacher were
        taught by different weights.
    """
    groups = [Group(summaries) for summaries in group(folders)]
    check_teachers(groups)
    _name_apart(groups)
    set_labels(groups)
    missing, ears = {}, Ears()
    told("comparing what the runs have kept")
    rows = [*_teacher_rows(groups)]
    rows += [row for found in groups for row in _rows(found, groups, missing)]
    tests = _correct(rows)
    told("comparing spikes, and drawing")
    for found in groups:
        figures = _diagnose(found, groups, ears, missing)
        for row in rows:
            if (row["corpus"], row["run"]) == (found.corpus, found.name):
                row.update(figures)
    sections = [
        _summary(groups, rows, tests),
        _gains(rows),
        _against("Against the baseline", rows, (EQUAL_EPOCHS, EQUAL_COST)),
        _against("Choices within a method", rows, (FIRST,)),
        _error_rates(rows),
        _costs(rows),
        _curves(groups, rows),
        _pareto(rows),
        _transcripts(groups, missing),
        *_pictures(groups, ears, missing, _earlier(Path(to))),
        _diagnostics(rows),
        Section("How to read this", HOW_TO_READ),
        _missing(missing),
        _commands(groups),
    ]
    sections = [s for s in sections if s.paragraphs or s.tables or s.pictures]
    _write(Path(to), title, rows, sections)


def copy_small_files(folder, to):
    """Copy what a run has left but weights, checkpoints and logs of screens.

    Arguments
    ---------
    folder : pathlib.Path
        Output folder of ``train.py``.
    to : pathlib.Path
        Folder to write, of which a report can be made again.
    """
    for pattern in SMALL:
        for path in sorted(folder.glob(pattern)):
            copy = to / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    if (folder / COMMAND).is_file():
        (to / COMMAND).write_text(f"{_command_of(folder)}\n", "utf-8")


def _name_apart(groups):
    """Give groups of one corpus and name that of the folder above too."""
    for depth in (2, 3, 4):
        names = [(found.corpus, found.name) for found in groups]
        for found in groups:
            if names.count((found.corpus, found.name)) > 1:
                parts = found.folders[0].parts[-1 - depth : -1]
                found.name = "/".join(parts)


def check_teachers(groups):
    """Refuse runs whose teachers of one name are not the same.

    Students on one corpus are compared as if one teacher had taught all that
    name it, so what differs must not be the teacher.

    Arguments
    ---------
    groups : list of Group
        All of a report.

    Raises
    ------
    ValueError
        If two runs name the same teacher and were taught by other weights.
    """
    seen = {}
    for found in groups:
        for folder, results in zip(found.folders, found.results, strict=True):
            teacher = results["teacher"] or {}
            digest = teacher.get("weights_sha256")
            if digest is None:
                continue
            key = found.corpus, found.taught_by
            other, theirs = seen.setdefault(key, (folder, digest))
            if theirs != digest:
                raise InputError(
                    f"{other} and {folder} were taught by different teachers "
                    f"of the same name, {found.taught_by} (SHA-256 of the "
                    f"weights {theirs[:12]} and {digest[:12]}): train both "
                    "from one teacher, give one of the teachers another name, "
                    "or report on them apart"
                )


# ------------------------------------------------------------------ the figures


def find_references(found, groups):
    """Find what a student's runs are compared with.

    Arguments
    ---------
    found : Group
        Runs of a student.
    groups : list of Group
        All of a report.

    Returns
    -------
    dict
        By ``at equal epochs`` and ``at equal cost`` the runs of the same
        network on the same corpus by CTC alone; of several with as many epochs,
        those whose name says most of the same options and no others, else the
        first. By ``first`` the first of those that have the method, the teacher
        and the epochs in common too, so that they differ in other options. What
        there is none of is left out. A run of one seed is compared with such
        runs alone, and a mean over seeds with means. Compute-matched runs are
        compared with none, whatever epochs they came to.
    """
    if found.is_teacher or _is_bought(found):
        return {}
    alike = [
        other
        for other in groups
        if not other.is_teacher
        and (other.corpus, other.network, other.parameters)
        == (found.corpus, found.network, found.parameters)
        and (len(other.seeds) > 1) == (len(found.seeds) > 1)
    ]
    first = next(
        other
        for other in alike
        if (other.method, other.taught_by, other.epochs)
        == (found.method, found.taught_by, found.epochs)
        and not _is_bought(other)
    )
    references = {} if first is found else {FIRST: first}
    if found.method == "ctc":
        return references
    alone = [other for other in alike if other.method == "ctc"]
    ours = found.folder_name
    bought = [
        other
        for other in alone
        if other.folder_name.endswith(f"_at_cost_of_{ours}")
    ]
    equal = [
        other
        for other in alone
        if other.epochs == found.epochs and not _is_bought(other)
    ]
    if equal:
        references[EQUAL_EPOCHS] = max(
            equal, key=lambda other: _same_options(found, other)
        )
    if bought:
        references[EQUAL_COST] = bought[0]
    return references


def _is_bought(found):
    """Whether these are runs at the cost of others."""
    return "_at_cost_of_" in found.folder_name


def _same_options(found, alone):
    """How much of a student's name that of CTC alone has, 0 if it has more."""
    ours = found.folder_name.removeprefix(found.method)
    ours = ours.replace(f"_by_{found.teacher}", "").split("_")
    theirs = alone.folder_name.removeprefix("ctc").split("_")
    both = itertools.takewhile(
        lambda words: words[0] == words[1], zip(ours, theirs, strict=False)
    )
    shared = len(list(both))
    # What CTC has no use for, as pairs of layers, may stand between.
    rest, longer = theirs[shared:], ours[shared:]
    ends_alike = longer[len(longer) - len(rest) :] == rest
    return len(theirs) if ends_alike else 0


def _rows(found, groups, missing):
    """Lines of results.csv, one for each split."""
    seconds = [run["train_seconds"] for run in found.results]
    total = [total_seconds(run) for run in found.results]
    shared = {
        "corpus": found.corpus,
        "run": found.name,
        "label": found.label + " (1 seed)" * (len(found.seeds) == 1),
        "network": found.network,
        "method": found.method,
        "teacher": found.taught_by,
        "teacher_sha256": (found.results[0]["teacher"] or {}).get(
            "weights_sha256"
        ),
        "epochs": found.epochs,
        "seeds": " ".join(map(str, found.seeds)),
        "parameters": found.parameters,
        "mb": 4 * found.parameters / 1e6,
        "real_time_factor": statistics.mean(
            run["real_time_factor"] for run in found.results
        ),
        "steps": found.steps(),
        "seconds": statistics.mean(seconds),
        "total_seconds": statistics.mean(total),
    }
    quarters = found.quarters()
    if quarters:
        shared["dev_wer_before"], shared["dev_wer_last_quarter"] = quarters
    if shared["steps"] is None:
        _miss(missing, "steps of the optimizer", found)
    references = find_references(found, groups)
    if found.method != "ctc" and EQUAL_EPOCHS not in references:
        what = "CTC baseline with as many epochs"
        what += " and seeds (one, or several)"
        _miss(missing, what, found)
    if found.taught_by and shared["teacher_sha256"] is None:
        _miss(missing, "SHA-256 of the teacher's weights", found)
    for split in found.splits:
        row = dict(shared, split=split)
        for rate in RATES:
            row |= _rate(found, split, rate, missing)
        for kind, reference in references.items():
            against = _gain(found, reference, split)
            prefix = REFERENCES[kind]
            row |= {f"{prefix}{key}": value for key, value in against.items()}
        yield row


def _teacher_rows(groups):
    """Lines for teachers whose runs are not among those of the report."""
    known = {
        (found.corpus, folder.parts[-2:])
        for found in groups
        for folder in found.folders
    }
    for found in groups:
        teacher = found.results[0]["teacher"]
        if teacher is None:
            continue
        key = found.corpus, Path(teacher["folder"]).parts[-2:]
        if key in known:
            continue
        known.add(key)
        is_run = "method" in teacher
        yield from (
            {
                "corpus": found.corpus,
                "run": "/".join(key[1]) if is_run else found.taught_by,
                "label": f"teacher {found.taught_by}" + " (1 seed)" * is_run,
                "network": teacher["name"],
                "method": teacher.get("method"),
                "teacher": None,
                "epochs": teacher.get("epochs"),
                "seeds": str(teacher.get("seed", "")),
                "parameters": teacher["parameters"],
                "mb": 4 * teacher["parameters"] / 1e6,
                "real_time_factor": teacher.get("real_time_factor"),
                "steps": None,
                "seconds": teacher.get("train_seconds"),
                "total_seconds": teacher.get("train_seconds"),
                "split": split,
                **{rate: scores.get(rate) for rate in RATES},
            }
            # Of a model that is no run nothing is known but its size.
            for split, scores in teacher.get("splits", {"": {}}).items()
        )


def _rate(found, split, rate, missing):
    """An error rate, its interval and its spread."""
    values, kept = found.rates(split, rate), found.errors(split, rate)
    if values is None:
        return {rate: None}
    row = {rate: statistics.mean(values)}
    row[f"{rate}_by_seed"] = " ".join(f"{value:.2f}" for value in values)
    if len(values) > 1:
        row[f"{rate}_sd"] = statistics.stdev(values)
    if kept is None:
        _miss(missing, "errors of each utterance (errors.json)", found)
        return row
    errors, units, ids = kept
    low, high = interval(errors, units)
    row |= {f"{rate}_low": low, f"{rate}_high": high}
    return row | {"utterances": len(ids)}


def _gain(found, reference, split):
    """What runs gain over others on the same utterances."""
    ours, theirs = found.rates(split, "wer"), reference.rates(split, "wer")
    seeds = min(len(found.seeds), len(reference.seeds))
    row = {
        "reference": reference.name,
        "reference_label": reference.label,
        "seeds_compared": seeds,
        "is_sufficient": seeds >= SEEDS_FOR_A_CLAIM,
    }
    if ours is None or theirs is None:
        return row
    made = statistics.mean(theirs)
    row["wer_difference"] = statistics.mean(ours) - made
    if made:
        row["wer_reduction"] = 100 * (1 - statistics.mean(ours) / made)
    pairs = [
        (mine, theirs[reference.seeds.index(seed)])
        for seed, mine in zip(found.seeds, ours, strict=True)
        if seed in reference.seeds
    ]
    if pairs:
        better = sum(mine < other for mine, other in pairs)
        row["seeds_better"] = f"{better} of {len(pairs)}"
    kept, others = found.errors(split, "wer"), reference.errors(split, "wer")
    if kept and others and kept[2] == others[2] and made:
        test = difference(kept[0], others[0], kept[1])
        row |= {
            "wer_difference_low": test.low,
            "wer_difference_high": test.high,
            "wer_reduction_low": test.reduction_low,
            "wer_reduction_high": test.reduction_high,
            "p_value": test.p_value,
        }
    row["epochs_to_reach_it"] = _epochs_to_reach(found, reference)
    return row


def _correct(rows):
    """Correct all p-values of a report together; gives their number."""
    keys = [f"{prefix}p_value" for prefix in REFERENCES.values()]
    tests = [
        (row, key) for row in rows for key in keys if row.get(key) is not None
    ]
    corrected = holm([row[key] for row, key in tests])
    for (row, key), value in zip(tests, corrected, strict=True):
        row[f"{key}_holm"] = value
    return len(tests)


def _epochs_to_reach(found, reference):
    """Mean epochs until the dev WER is that which the reference ends with."""
    ends = [min(w for *_, w in curve) for curve in reference.curves()]
    curves = list(found.curves())
    if not ends or not curves:
        return None
    wanted = statistics.mean(ends)
    first = [
        next((epoch for epoch, _, wer in curve if wer <= wanted), None)
        for curve in curves
    ]
    return "never" if None in first else statistics.mean(first)


def _diagnose(found, groups, ears, missing):
    """Spikes, blanks and RKD errors, means over the seeds."""
    figures = {}
    errors = list(found.rkd_errors())
    if errors:
        first, last = map(statistics.mean, zip(*errors, strict=True))
        figures |= {"rkd_error_first": first, "rkd_error_last": last}
    if found.is_teacher:
        return figures
    teacher, kept = _teacher_of(found, groups), []
    for folder in found.folders:
        try:
            kept.append(ears.diagnose(folder, teacher))
        except NotThere as reason:
            _miss(missing, f"spikes: {_anonymous(reason, folder)}", found)
    for key in ("same_frame", "within_one_frame", "blank_rate"):
        values = [k[key] for k in kept if k[key] is not None]
        if values:
            figures[key] = statistics.mean(values)
    return figures


def _teacher_of(found, groups):
    """Their teacher; of CTC alone, the first that teaches on that corpus."""
    for other in (found, *groups):
        if other.corpus == found.corpus:
            for folder in other.folders:
                teacher = find_teacher(folder)
                if teacher is not None:
                    return teacher
    return None


def _miss(missing, what, found):
    missing.setdefault(what, {})[f"{found.label} on {found.corpus}"] = None


def _anonymous(reason, folder):
    """A reason that is the same for all runs."""
    return (
        str(reason)
        .replace(f" {folder}", " the run")
        .replace(str(folder), "the run")
    )


# ----------------------------------------------------------------- the sections


def _by_corpus(rows):
    for corpus in dict.fromkeys(row["corpus"] for row in rows):
        yield corpus, [row for row in rows if row["corpus"] == corpus]


def _summary(groups, rows, tests):
    """What was found, in a sentence for each network, and where and when."""
    verdicts = [
        _verdict(corpus, network, own, rows)
        for (corpus, network), own in _by_network(groups)
    ]
    if not any(verdicts):
        verdicts = [
            "No distilled student has a baseline to be compared with here "
            "(same network, corpus and epochs, one seed each or several each)."
        ]
    text = f"Report of {datetime.date.today():%Y-%m-%d}. "
    if tests:
        text += (
            f"{tests} tests were made, for whose number Holm's correction of "
            "the p-values makes up. "
        )
    text += f"A claim needs at least {SEEDS_FOR_A_CLAIM} seeds of each side."
    results = [run for found in groups for run in found.results]
    made = [
        _distinct("Machine", results, "machine", _machine),
        _distinct("Versions", results, "versions", _versions),
    ]
    return Section("Summary", (*filter(None, verdicts), text, *made))


def _verdict(corpus, network, own, rows):
    """Whether the students of a network are better than their baseline.

    It is told of the method that does best on the development set, by the
    first test set.
    """
    names = {found.name for found in own}
    compared = [
        row
        for row in rows
        if row["corpus"] == corpus
        and row["run"] in names
        and row["method"] != "ctc"
        and "wer_reduction" in row
    ]
    if not compared:
        return None
    dev, test = _kinds_of(row["split"] for row in compared)
    best = min(
        (row for row in compared if row["split"] == (dev or test)[0]),
        key=lambda row: row["wer"],
    )
    row = next(
        row
        for row in compared
        if row["run"] == best["run"] and row["split"] == test[0]
    )
    saved, theirs = row["wer_reduction"], row["wer"] - row["wer_difference"]
    low, high = (row.get(f"wer_reduction_{end}") for end in ("low", "high"))
    seeds = row["seeds_compared"]
    text = (
        f"On {row['split']} of {corpus}, {network} distilled by "
        f"{method_name(row['method'])} from {row['teacher']} makes "
        f"{abs(saved):.1f} % {'fewer' if saved >= 0 else 'more'} word errors "
        "than its baseline, the same network by CTC alone with as many epochs "
        f"(WER {row['wer']:.1f} against {theirs:.1f} %"
    )
    taught = _wer_of_teacher(row, own)
    if taught is not None:
        text += f", the teacher's {taught:.1f} %"
    if low is not None:
        text += f"; 95 % interval of the errors saved {low:.1f} to {high:.1f} %"
    if row.get("p_value") is not None:
        text += f"; p {_p_value(row['p_value'], '= ')}"
        text += f", corrected {_p_value(row['p_value_holm'])}"
    text += "). "
    if low is None:
        text += "Whether that is by chance is not known."
    elif low <= 0 <= high or row.get("p_value_holm", 0) >= 0.05:
        text += "That may be by chance: no difference is shown."
    elif row["is_sufficient"]:
        text += f"That is more than chance, by {seeds} seeds of each."
    else:
        text += "That is more than chance on these utterances."
    if not row["is_sufficient"]:
        count = "one seed" if seeds == 1 else f"{seeds} seeds"
        text += f" With {count} of each it is not sufficient for a claim."
    return text


def _wer_of_teacher(row, own):
    """What the teacher of a student had on the same split."""
    (found,) = [found for found in own if found.name == row["run"]]
    teacher = found.results[0]["teacher"]
    return teacher.get("splits", {}).get(row["split"], {}).get("wer")


def _kinds_of(splits):
    """Development and test splits, these the former if there are no others."""
    splits = list(dict.fromkeys(split for split in splits if split))
    dev = [split for split in splits if split.startswith("dev")]
    return dev, [split for split in splits if split not in dev] or dev


def _distinct(title, results, key, written):
    """What runs were made on or with, each once."""
    found = dict.fromkeys(written(r[key]) for r in results if r.get(key))
    return f"{title} of the runs: {'; '.join(found) or 'not recorded'}."


def _machine(machine):
    text = f"{machine['cpu']}, {machine['cores']} cores, of which PyTorch "
    text += f"used {machine['threads']}"
    return text + (f", {machine['gpu']}" if "gpu" in machine else "")


def _versions(versions):
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _gains(rows):
    """Pictures of what runs gain over each kind of reference."""
    pictures = []
    for (kind, prefix), (corpus, own) in itertools.product(
        REFERENCES.items(), _by_corpus(rows)
    ):
        saved = f"{prefix}wer_reduction"
        own = [row for row in own if f"{saved}_low" in row]
        names = list(dict.fromkeys(row["run"] for row in own))
        for number, some in _parts(names, ROWS):
            gains = {}
            for row in own:
                if row["run"] in some:
                    gains.setdefault(row["split"], {})[row["label"]] = [
                        row[f"{saved}{end}"] for end in ("", "_low", "_high")
                    ]
            text = (
                f"Errors that runs on {corpus} save, {CAPTIONS[kind]}, with "
                "the 95 % interval. Filled where all of it lies on one side of "
                "none. A point beyond 100 % more errors stands at the edge as "
                "an arrow, with its value."
            )
            figure = plots.gains(gains, corpus)
            pictures.append((f"{prefix}gains_{corpus}{number}", figure, text))
    return Section("At a glance", (), [], _drawn(pictures))


def _parts(names, size):
    """Names in parts, each with what tells it apart in the name of a file."""
    for begin in range(0, len(names), size):
        number = f"_{begin // size + 1}" if len(names) > size else ""
        yield number, names[begin : begin + size]


def _against(title, rows, kinds):
    tables = []
    for kind in kinds:
        prefix = REFERENCES[kind]
        for corpus, own in _by_corpus(rows):
            body = [
                [
                    row["label"],
                    row[f"{prefix}reference_label"],
                    row["split"],
                    _figure(row, f"{prefix}wer_reduction", 1, signed=True),
                    _figure(row, f"{prefix}wer_difference", 1, signed=True),
                    _p_value(row.get(f"{prefix}p_value")),
                    _p_value(row.get(f"{prefix}p_value_holm")),
                    "yes" if row[f"{prefix}is_sufficient"] else "no",
                    row.get(f"{prefix}seeds_better", "-"),
                    _number(row.get(f"{prefix}epochs_to_reach_it"), 1),
                ]
                for row in own
                if row.get(f"{prefix}reference")
            ]
            if body:
                head = ["run", "against", "split", "fewer errors (%)"]
                head += ["WER difference (points)", "p", "p, corrected"]
                head += ["sufficient for a claim", "seeds better"]
                head += ["epochs to its best dev WER"]
                caption = f"{corpus}, {CAPTIONS[kind]}"
                tables.append((caption, [head, *body]))
    return Section(title, (), tables)


def _error_rates(rows):
    tables = []
    for (corpus, own), rate in itertools.product(_by_corpus(rows), RATES):
        splits = list(
            dict.fromkeys(row["split"] for row in own if row["split"])
        )
        body = []
        for name in dict.fromkeys(row["run"] for row in own):
            found = {row["split"]: row for row in own if row["run"] == name}
            first = next(iter(found.values()))
            figures = [
                _figure(found.get(split, {}), rate, 1, spread=True)
                for split in splits
            ]
            seeds = str(len(first["seeds"].split()) or "-")
            epochs = _number(first["epochs"], 0)
            body.append([first["label"], epochs, seeds, *figures])
        head = ["run", "epochs", "seeds", *splits]
        tables.append((f"{corpus}, {rate.upper()} (%)", [head, *body]))
    return Section("Error rates", (), tables)


def _first_rows(rows):
    """One line for each run."""
    first = {}
    for row in rows:
        first.setdefault((row["corpus"], row["run"]), row)
    return list(first.values())


def _costs(rows):
    head = ["run", "parameters (M)", "MB", "real-time factor", "steps"]
    head += ["seconds", "teacher's", "in all"]
    tables = []
    for corpus, own in _by_corpus(_first_rows(rows)):
        body = [
            [
                row["label"],
                f"{row['parameters'] / 1e6:.2f}",
                f"{row['mb']:.2f}",
                _number(row["real_time_factor"], 4),
                _number(row["steps"], 0),
                _number(row["seconds"], 0),
                _number((row["total_seconds"] or 0) - (row["seconds"] or 0), 0),
                _number(row["total_seconds"], 0),
            ]
            for row in own
        ]
        tables.append((corpus, [head, *body]))
    return Section("Size, speed and cost", (), tables)


def _diagnostics(rows):
    head = ["run", "on the teacher's frame (%)", "within one frame (%)"]
    head += ["blank frames (%)", "RKD error, first epoch", "last epoch"]
    keys = {"same_frame": 1, "within_one_frame": 1, "blank_rate": 1}
    keys |= {"rkd_error_first": 3, "rkd_error_last": 3}
    tables = []
    for corpus, own in _by_corpus(_first_rows(rows)):
        body = [
            [row["label"], *(_number(row.get(k), n) for k, n in keys.items())]
            for row in own
            if any(row.get(key) is not None for key in keys)
        ]
        if body:
            tables.append((corpus, [head, *body]))
    text = (
        "How many of the student's symbols the teacher writes too, at the same "
        "frame and at most one frame off; how many frames are blank. Some "
        "utterances of the development set. A baseline is compared with the "
        "teacher of the others. The RKD error is that of the development set, "
        "per hidden unit and frame.",
    )
    return Section("What the student took over", text if tables else (), tables)


def _curves(groups, rows):
    head = ["run", "epochs", "best dev WER before the last quarter"]
    head += ["in the last quarter", "gain (points)"]
    tables, pictures = [], []
    for corpus, own in _by_corpus(_first_rows(rows)):
        body = []
        for row in own:
            before, last = map(
                row.get, ("dev_wer_before", "dev_wer_last_quarter")
            )
            if last is not None:
                figures = (before, last, before - last)
                body.append(
                    [row["label"], str(row["epochs"])]
                    + [_number(figure, 1) for figure in figures]
                )
        if body:
            tables.append((corpus, [head, *body]))
    for (corpus, network), own in _by_network(groups):
        curves = {}
        for found in own:
            seeds = list(found.curves())
            if not seeds or len({len(curve) for curve in seeds}) > 1:
                continue
            mean = np.mean(seeds, axis=0)
            name = found.label.removeprefix(f"{network}: ")
            curves[name] = tuple(mean.T)
        for number, part in _parts(list(curves), CURVES):
            some = {name: curves[name] for name in part}
            title = f"{network} on {corpus}"
            pictures.append(
                (
                    f"learning_{corpus}_{network}{number}",
                    plots.learning_curves(some, title),
                    f"Learning curves: {title}. Means over the seeds; stages "
                    "without transcripts have no WER.",
                )
            )
    text = (
        "Dev WER after each epoch (percent, logarithmic). A baseline that "
        "still gains in the last quarter of its epochs has not converged, and "
        "more epochs would leave a teacher less to add.",
    )
    return Section(
        "Learning curves", text if tables else (), tables, _drawn(pictures)
    )


def _pareto(rows):
    """Errors against speed and size, and the teachers among the students."""
    pictures = []
    for corpus, own in _by_corpus(rows):
        dev, test = _kinds_of(row["split"] for row in own)
        best = {}
        for name in dict.fromkeys(row["run"] for row in own):
            found = {row["split"]: row for row in own if row["run"] == name}
            first = next(iter(found.values()))
            chosen, shown = (
                found.get(kind[0], {}).get("wer")
                for kind in (dev or test, test)
            )
            if chosen is None or shown is None:
                continue
            key = f"{first['network']}: {method_name(first['method'])}"
            if first["label"].startswith("teacher "):
                key = f"teacher {first['network']}"
            point = first["real_time_factor"], first["mb"], shown
            best[key] = min(best.get(key, (chosen, point)), (chosen, point))
        if len(best) > 1:
            points = {key: point for key, (_, point) in best.items()}
            figure = plots.pareto(points, corpus, f"{test[0]} WER (%)")
            text = (
                f"Speed, size and errors on {corpus}: of each network and "
                "method the runs that do best on the development set."
            )
            pictures.append((f"pareto_{corpus}", figure, text))
    return Section("Speed and size", (), [], _drawn(pictures))


def _transcripts(groups, missing):
    """Two utterances as the teacher, a baseline and its student write them.

    Those in the middle and at three quarters of all, by the baseline's errors.
    """
    tables = []
    for (corpus, network), own in _by_network(groups):
        pairs = [(one, find_references(one, groups)) for one in own]
        pairs = [
            (one, found[EQUAL_EPOCHS])
            for one, found in pairs
            if EQUAL_EPOCHS in found
        ]
        if not pairs:
            continue
        _, test = _kinds_of(pairs[0][0].splits)
        student, baseline = min(
            pairs,
            key=lambda pair: statistics.mean(pair[0].rates(test[0], "wer")),
        )
        written = {
            f"teacher {student.taught_by}": _texts_of_teacher(
                student, groups, test[0]
            ),
            BASELINE: baseline.texts(test[0]),
            method_name(student.method): student.texts(test[0]),
        }
        kept = baseline.errors(test[0], "wer")
        if None in list(written.values())[1:] or kept is None:
            _miss(missing, f"transcripts (wer_{test[0]}.txt)", student)
            continue
        errors, _, ids = kept
        order = np.argsort(errors[0], kind="stable")
        for place in (len(ids) // 2, 3 * len(ids) // 4):
            key = ids[order[place]]
            body = [["reference", written[BASELINE][key][0]]]
            body += [
                [name, texts[key][1] or "(nothing)"]
                for name, texts in written.items()
                if texts and key in texts
            ]
            caption = f"{network} on {corpus}, {test[0]}, utterance {key}"
            tables.append((caption, [["", "transcript"], *body]))
    text = (
        "The two utterances at which half and three quarters of all have no "
        "more errors by the baseline; first seeds.",
    )
    return Section("Transcripts", text if tables else (), tables)


def _texts_of_teacher(student, groups, split):
    """What a teacher wrote, if it is a run that kept it."""
    for found in groups:
        if found.corpus == student.corpus and any(
            folder.parts[-2:]
            == Path(student.results[0]["teacher"]["folder"]).parts[-2:]
            for folder in found.folders
        ):
            return found.texts(split)
    folder = find_teacher(student.folders[0])
    if folder is None:
        return None
    (teacher,) = group([folder])
    return Group(teacher).texts(split)


def _earlier(to):
    """Pictures of a report made there before, by their names."""
    path = to / "report.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.findall(r"^!\[(.*)\]\(pictures/(.+\.png)\)$", text, re.MULTILINE)
    return {
        name: (name, (to / "pictures" / name).read_bytes(), caption)
        for caption, name in found
        if (to / "pictures" / name).is_file()
    }


def _pictures(groups, ears, missing, earlier):
    """Frame weights, and spikes of posteriors."""
    # Frame weights by file: students of one teacher share them.
    weights, spikes = {}, []
    for (corpus, network), own in _by_network(groups):
        taught = [found for found in own if found.method != "ctc"]
        taught.sort(key=lambda found: found.method != "rkd+skd")
        if not taught:
            continue
        try:
            found, shown, example = _heard(taught, groups, ears)
        except NotThere as reason:
            kept = earlier.get(_picture(f"spikes_{corpus}_{network}"))
            what = "pictures of its posteriors"
            if kept is not None:
                what = f"new {what}, those of the report before are shown"
            _miss(missing, f"{what}: {reason}", taught[0])
            if kept is None:
                continue
            spikes.append(kept)
            name = _picture(f"weights_{corpus}_{taught[0].taught_by}")
            if name in earlier:
                weights.setdefault(name, earlier[name])
            continue
        name = f"weights_{corpus}_{found.taught_by}"
        if _picture(name) not in weights:
            weights[_picture(name)] = _draw(
                name,
                plots.frame_weights(example, f"{found.taught_by} on {corpus}"),
                "Which frames count, by the teacher: the frame weights of "
                f"'{example.text}'.",
            )
        both = len(shown) > 1
        spikes.append(
            _draw(
                f"spikes_{corpus}_{network}",
                plots.posterior_spikes(example, f"{network} on {corpus}"),
                f"Posteriors of the teacher{', the baseline' * both} and the "
                f"distilled student ({found.label}), first seed: "
                f"'{example.text}'.",
            )
        )
    return (
        Section("Frame weights", (), [], list(weights.values())),
        Section("Spikes", (), [], spikes),
    )


def _heard(taught, groups, ears):
    """What one of the taught students hears, if it can be, and that alone.

    The first that still has its weights. Returns it, what is shown, and the
    example.
    """
    first = None
    for found in taught:
        alone = find_references(found, groups).get(EQUAL_EPOCHS)
        teacher = _teacher_of(found, groups)
        for shown in ([alone, found], [found])[alone is None :]:
            runs = {
                one.label.removeprefix(f"{one.network}: "): one.folders[0]
                for one in shown
            }
            try:
                return found, shown, ears.example(runs, teacher)
            except NotThere as reason:
                first = first or _anonymous(reason, shown[0].folders[0])
    raise NotThere(first)


def _missing(missing):
    """Say what the report lacks."""
    text = []
    for what, names in missing.items():
        some = "; ".join(list(names)[:5])
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        text.append(f"No {what}: {some}{more}.")
    return Section("What is missing", tuple(text))


def _command_of(folder):
    """Command line of a run, without where the data lay on its machine."""
    path = folder / COMMAND
    if not path.is_file():
        return "-"
    words = shlex.split(path.read_text(encoding="utf-8"))
    for index, word in enumerate(words[:-1]):
        if word in PLACES:
            words[index + 1] = "DATA"
    return shlex.join(words)


def _commands(groups):
    head, body = ["corpus", "run", "folders", "command"], []
    for found in groups:
        line = _command_of(found.folders[0])
        seeds = "{" + ",".join(folder.name for folder in found.folders) + "}"
        one = len(found.folders) == 1
        where = found.folders[0] if one else found.folders[0].parent / seeds
        if where.is_relative_to(Path.cwd()):
            where = where.relative_to(Path.cwd())
        body.append([found.corpus, found.label, str(where), line])
    text = "Command lines are those of the first seed, in the recipe's folder."
    return Section("Runs", (text,), [("", [head, *body])])


def _by_network(groups):
    """Students of one network on one corpus."""
    found = {}
    for one in groups:
        if not one.is_teacher:
            found.setdefault((one.corpus, one.network), []).append(one)
    return found.items()


def _drawn(pictures):
    return [_draw(*picture) for picture in pictures]


def _draw(name, figure, text):
    return _picture(name), plots.to_png(figure), text


def _picture(name):
    """Name of a picture's file."""
    return re.sub(r"[^\w.+-]", "_", name) + ".png"


# -------------------------------------------------------------------- the files


def _write(to, title, rows, sections):
    to.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def write_csv(path):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(to / "results.csv", write_csv)
    pictures = to / "pictures"
    pictures.mkdir(exist_ok=True)
    for section in sections:
        for name, png, _ in section.pictures:
            (pictures / name).write_bytes(png)
    text = _markdown(title, sections)
    write_atomically(
        to / "report.md", lambda path: path.write_text(text, encoding="utf-8")
    )
    page = _html(title, sections)
    write_atomically(
        to / "report.html", lambda path: path.write_text(page, encoding="utf-8")
    )


def _markdown(title, sections):
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += section.paragraphs
        for caption, rows in section.tables:
            parts += [f"**{caption}**"] if caption else []
            parts.append(markdown_table(rows))
        for name, _, text in section.pictures:
            parts.append(f"![{text}](pictures/{name})\n\n{text}")
    return "\n\n".join(parts) + "\n"


def _html(title, sections):
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tutornet_sb.experiments", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["data"] = lambda png: (
        f"data:image/png;base64,{base64.b64encode(png).decode()}"
    )
    template = environment.get_template("report.html.jinja")
    return template.render(title=title, sections=sections)


def _number(value, digits):
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,.{digits}f}".replace(",", " ")


def _figure(row, key, digits, signed=False, spread=False):
    """A figure with its interval and its spread, as far as they are known."""
    value = row.get(key)
    if value is None:
        return "-"
    plus = "+" if signed else ""
    text = f"{value:{plus}.{digits}f}"
    if f"{key}_low" in row:
        low, high = row[f"{key}_low"], row[f"{key}_high"]
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    if spread and f"{key}_sd" in row:
        text += f" ± {row[f'{key}_sd']:.{digits}f}"
    return text


def _p_value(value, equal=""):
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{equal}{value:.3f}"
