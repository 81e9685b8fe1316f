"""Reports of runs: figures with their intervals, tests, costs and pictures."""

import base64
import csv
import itertools
import re
import shlex
import shutil
import statistics
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np

from tutornet_sb import runs
from tutornet_sb.files import read_json, write_atomically
from tutornet_sb.reporting import plots
from tutornet_sb.reporting.compare import group, markdown_table
from tutornet_sb.reporting.diagnostics import (
    DIAGNOSTICS,
    Ears,
    NotThere,
    find_teacher,
    read_log,
)
from tutornet_sb.reporting.jobs import COMMAND
from tutornet_sb.reporting.plan import total_seconds
from tutornet_sb.reporting.statistics import difference, interval

# Options that say where the data lay
PLACES = "--data_folder", "--train_csv", "--valid_csv", "--test_csv"
# Small files of a run, by which a report can be made again, without pictures of
# what models hear
SMALL = (
    runs.RESULTS,
    DIAGNOSTICS,
    f"{runs.STAGES}/*/{runs.ERRORS}",
    f"{runs.STAGES}/*/{runs.TRAIN_LOG}",
)
# Columns of errors.json
RATES = {"wer": 0, "cer": 2}
# Curves that can be told apart in one picture
CURVES = 8
# Each reference and its columns in results.csv
EQUAL_EPOCHS, EQUAL_COST, FIRST = "at equal epochs", "at equal cost", "first"
REFERENCES = {EQUAL_EPOCHS: "", EQUAL_COST: "at_cost_", FIRST: "first_"}
CAPTIONS = {
    EQUAL_EPOCHS: EQUAL_EPOCHS,
    EQUAL_COST: EQUAL_COST,
    FIRST: "each against the first with the same method, teacher and epochs",
}
HOW_TO_READ = (
    "WER and CER are in percent, after greedy decoding, means over the seeds. "
    "In brackets stands the 95 % interval by the bootstrap over utterances "
    "(Bisani and Ney 2004), after ± the standard deviation over the seeds. The "
    "interval says how much other utterances might change the figure, the "
    "deviation how much other seeds might.",
    "A student is compared with the same network trained by CTC alone, on the "
    "same utterances: at equal epochs, and at equal cost where a plan asks for "
    "CTC alone with as many epochs as the taught student and its teacher took "
    "in seconds. Runs of one method that differ in other options are compared "
    "with the first of them. The intervals of the differences are by the "
    "paired bootstrap, the p-value by approximate randomisation (Noreen 1989): "
    "errors of an utterance change places between the two at random. Of twenty "
    "tests of equals, one is below 0.05. 'Seeds better' counts the seeds with "
    "fewer errors than the same seed of the others.",
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
        self.splits = list(first["splits"])
        self.seeds = [run["seed"] for run in summaries]
        self.results = [runs.read_results(folder) for folder in self.folders]
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
        """Errors of each utterance, means over the seeds, and its units.

        None if a seed has not kept them, or has heard others.
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
        return np.mean(errors, axis=0), np.array(units), ids

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
        Folder to write into; other files there are left alone. Pictures of what
        models hear that a report made there before, and that cannot be drawn
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
        If a result file lacks a figure.
    """
    groups = [Group(summaries) for summaries in group(folders)]
    _name_apart(groups)
    missing, ears = {}, Ears()
    told("comparing what the runs have kept")
    rows = [row for found in groups for row in _rows(found, groups, missing)]
    told("comparing spikes, and drawing")
    for found in groups:
        figures = _diagnose(found, groups, ears, missing)
        for row in rows:
            if (row["corpus"], row["run"]) == (found.corpus, found.name):
                row.update(figures)
    sections = [
        _gains(rows),
        _against("Against CTC alone", rows, (EQUAL_EPOCHS, EQUAL_COST)),
        _against("Choices within a method", rows, (FIRST,)),
        _error_rates(rows),
        _costs(rows),
        _curves(groups, rows),
        _pareto(groups),
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
        there is none of is left out. Runs at the cost of others are compared
        with none, whatever epochs they came to.
    """
    if found.is_teacher or _is_bought(found):
        return {}
    alike = [
        other
        for other in groups
        if not other.is_teacher
        and (other.corpus, other.network, other.parameters)
        == (found.corpus, found.network, found.parameters)
    ]
    first = next(
        other
        for other in alike
        if (other.method, other.teacher, other.epochs)
        == (found.method, found.teacher, found.epochs)
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
        "network": found.network,
        "method": found.method,
        "teacher": found.teacher,
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
        _miss(missing, "runs of CTC alone with as many epochs", found)
    for split in found.splits:
        row = dict(shared, split=split)
        for rate in RATES:
            row |= _rate(found, split, rate, missing)
        for kind, reference in references.items():
            against = _gain(found, reference, split)
            prefix = REFERENCES[kind]
            row |= {f"{prefix}{key}": value for key, value in against.items()}
        yield row


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
    row = {"reference": reference.name}
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
    missing.setdefault(what, {})[f"{found.corpus}/{found.name}"] = None


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


def _gains(rows):
    """Pictures of what runs gain over each kind of reference."""
    pictures = []
    for (kind, prefix), (corpus, own) in itertools.product(
        REFERENCES.items(), _by_corpus(rows)
    ):
        saved = f"{prefix}wer_reduction"
        gains = {}
        for row in own:
            if f"{saved}_low" in row:
                seeds = len(row["seeds"].split())
                name = f"{row['run']} ({seeds} seed{'s' * (seeds > 1)})"
                gains.setdefault(row["split"], {})[name] = [
                    row[f"{saved}{end}"] for end in ("", "_low", "_high")
                ]
        if gains:
            against = CAPTIONS[kind]
            if kind != FIRST:
                against = f"against the same network by CTC alone, {against}"
            text = (
                f"Errors that runs on {corpus} save, {against}, with the 95 % "
                "interval over utterances. Filled where all of it lies on one "
                "side of none; cut at 100 % more errors."
            )
            figure = plots.gains(gains, corpus)
            pictures.append((f"{prefix}gains_{corpus}", figure, text))
    return Section("At a glance", (), [], _drawn(pictures))


def _against(title, rows, kinds):
    tables = []
    for kind in kinds:
        prefix = REFERENCES[kind]
        for corpus, own in _by_corpus(rows):
            body = [
                [
                    row["run"],
                    row["split"],
                    _figure(row, f"{prefix}wer_reduction", 1, signed=True),
                    _figure(row, f"{prefix}wer_difference", 1, signed=True),
                    _p_value(row.get(f"{prefix}p_value")),
                    row.get(f"{prefix}seeds_better", "-"),
                    _number(row.get(f"{prefix}epochs_to_reach_it"), 1),
                    row[f"{prefix}reference"],
                ]
                for row in own
                if row.get(f"{prefix}reference")
            ]
            if body:
                head = ["run", "split", "fewer errors (%)"]
                head += ["WER difference (points)", "p", "seeds better"]
                head += ["epochs to its best dev WER", "against"]
                caption = f"{corpus}, {CAPTIONS[kind]}"
                tables.append((caption, [head, *body]))
    return Section(title, (), tables)


def _error_rates(rows):
    tables = []
    for (corpus, own), rate in itertools.product(_by_corpus(rows), RATES):
        splits = list(dict.fromkeys(row["split"] for row in own))
        body = []
        for name in dict.fromkeys(row["run"] for row in own):
            found = {row["split"]: row for row in own if row["run"] == name}
            first = next(iter(found.values()))
            figures = [
                _figure(found.get(split, {}), rate, 1, spread=True)
                for split in splits
            ]
            seeds = str(len(first["seeds"].split()))
            body.append([name, str(first["epochs"]), seeds, *figures])
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
    head = ["run", "network", "method", "teacher", "parameters (M)", "MB"]
    head += ["real-time factor", "steps", "seconds", "teacher's", "in all"]
    tables = []
    for corpus, own in _by_corpus(_first_rows(rows)):
        body = [
            [
                row["run"],
                row["network"],
                row["method"],
                row["teacher"] or "-",
                f"{row['parameters'] / 1e6:.2f}",
                f"{row['mb']:.2f}",
                f"{row['real_time_factor']:.4f}",
                _number(row["steps"], 0),
                _number(row["seconds"], 0),
                _number(row["total_seconds"] - row["seconds"], 0),
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
            [row["run"], *(_number(row.get(k), n) for k, n in keys.items())]
            for row in own
            if any(row.get(key) is not None for key in keys)
        ]
        if body:
            tables.append((corpus, [head, *body]))
    text = (
        "How many of the student's symbols the teacher writes too, at the same "
        "frame and at most one frame off; how many frames are blank. Some "
        "utterances of the development set. CTC alone is compared with the "
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
                    [row["run"], str(row["epochs"])]
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
            curves[found.name] = tuple(mean.T)
        names = list(curves)
        for part in range(0, len(names), CURVES):
            number = f"_{part // CURVES + 1}" if len(names) > CURVES else ""
            some = {n: curves[n] for n in names[part : part + CURVES]}
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
        "Dev WER after each epoch (percent). CTC alone that still gains in the "
        "last quarter of its epochs has not converged, and more epochs would "
        "leave a teacher less to add.",
    )
    return Section(
        "Learning curves", text if tables else (), tables, _drawn(pictures)
    )


def _pareto(groups):
    pictures = []
    for corpus in dict.fromkeys(found.corpus for found in groups):
        own = [found for found in groups if found.corpus == corpus]
        splits = [split for found in own for split in found.splits]
        dev = [split for split in splits if split.startswith("dev")]
        test = [split for split in splits if split not in dev] or dev
        best = {}
        for found in own:
            chosen = found.rates((dev or test)[0], "wer")
            shown = found.rates(test[0], "wer")
            if chosen is None or shown is None:
                continue
            key = f"{found.network}, {found.method}"
            if found.is_teacher:
                key = f"{found.network}, teacher"
            point = (
                statistics.mean(
                    run["real_time_factor"] for run in found.results
                ),
                4 * found.parameters / 1e6,
                statistics.mean(shown),
            )
            worst = statistics.mean(chosen), point
            best[key] = min(best.get(key, worst), worst)
        if len(best) > 1:
            points = {key: point for key, (_, point) in best.items()}
            figure = plots.pareto(points, corpus, f"{test[0]} WER (%)")
            text = (
                f"Speed, size and errors on {corpus}: of each network and "
                "method the runs that do best on the development set."
            )
            pictures.append((f"pareto_{corpus}", figure, text))
    return Section("Speed and size", (), [], _drawn(pictures))


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
    """What models hear: frame weights and spikes."""
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
            what = "pictures of what it hears"
            if kept is not None:
                what = f"new {what}, those of the report before are shown"
            _miss(missing, f"{what}: {reason}", taught[0])
            if kept is None:
                continue
            spikes.append(kept)
            name = _picture(f"weights_{corpus}_{taught[0].teacher}")
            if name in earlier:
                weights.setdefault(name, earlier[name])
            continue
        name = f"weights_{corpus}_{found.teacher}"
        if _picture(name) not in weights:
            weights[_picture(name)] = _draw(
                name,
                plots.frame_weights(example, f"{found.teacher} on {corpus}"),
                "Which frames the teacher points at: the frame weights of "
                f"'{example.text}'.",
            )
        both = len(shown) > 1
        spikes.append(
            _draw(
                f"spikes_{corpus}_{network}",
                plots.posterior_spikes(example, f"{network} on {corpus}"),
                f"Posteriors of the teacher{', the student alone' * both} and "
                f"the taught {'one' if both else 'student'} ({found.name}), "
                f"first seed: '{example.text}'.",
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
            runs = {one.name: one.folders[0] for one in shown}
            try:
                return found, shown, ears.example(runs, teacher)
            except NotThere as reason:
                first = first or _anonymous(reason, shown[0].folders[0])
    raise NotThere(first)


def _missing(missing):
    """Say what the report lacks."""
    text = []
    for what, names in missing.items():
        some = ", ".join(list(names)[:5])
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
        body.append([found.corpus, found.name, str(where), line])
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
        loader=jinja2.PackageLoader("tutornet_sb.reporting", ""),
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


def _p_value(value):
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
