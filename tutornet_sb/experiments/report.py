"""Reports of runs, as Markdown and as a page: tables, pictures, verdicts."""

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
from tutornet_sb.experiments.compare import (
    group,
    markdown_table,
    read_finished,
)
from tutornet_sb.experiments.diagnostics import (
    DIAGNOSTICS,
    Probe,
    Unavailable,
    find_teacher,
)
from tutornet_sb.experiments.groups import (
    COMPUTE_MATCHED,
    EQUAL_EPOCHS,
    FIRST,
    METRICS,
    RATES,
    Group,
    find_references,
    read_groups,
)
from tutornet_sb.experiments.labels import (
    BASELINE,
    hide_data,
    method_name,
    place_of,
)
from tutornet_sb.experiments.plan import option_words
from tutornet_sb.experiments.rows import (
    REFERENCES,
    anonymous,
    make_rows,
    miss,
    teacher_of,
)
from tutornet_sb.experiments.statistics import SEEDS_FOR_A_CLAIM
from tutornet_sb.networks import runs
from tutornet_sb.util.files import write_atomically, write_json

# Small files of a run, of which a report can be made again
SMALL = (
    DIAGNOSTICS,
    f"{runs.STAGES}/*/{runs.ERRORS}",
    f"{runs.STAGES}/*/{METRICS}",
)
# Curves that can be told apart in one picture, and rows that fit on a page
CURVES = 8
ROWS = 10
CAPTIONS = {
    EQUAL_EPOCHS: "against the CTC baseline at equal epochs",
    COMPUTE_MATCHED: "against the compute-matched CTC baseline",
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
    "trained by CTC only and scored on the same utterances: at equal epochs, "
    "and compute-matched where a plan asks for a baseline with as many epochs "
    "as the student and its teacher took in seconds. Runs of one method and "
    "one teacher that differ in other options are compared with the first of "
    "them. Students of different teachers are not compared with each other, "
    "and all students of a teacher of one name were distilled from the same "
    "weights (teacher_sha256 in results.csv).",
    "The p-value is two-sided, of the same bootstrap, paired by utterances. "
    "Holm's correction (1979) is for the number of tests in this report: where "
    "the corrected one is below 0.05, the chance of any false finding among "
    f"all tests is. A comparison of fewer than {SEEDS_FOR_A_CLAIM} seeds on "
    "either side is not sufficient for a claim. 'Seeds better' counts the "
    "seeds with fewer errors than the same seed of the others.",
    "Cost is that of one student: its optimizer steps and seconds of training, "
    "and the seconds of its teacher's training. Size is that of the weights in "
    "float32. The real-time factor is seconds of computation for a second of "
    "audio, measured at the end of each run: other runs beside it made it "
    "slower, so that only those of runs made one at a time can be compared.",
)


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
    tables: list = ()
    pictures: list = ()


def write_report(folders, to, title, log=print):
    """Write ``results.csv``, ``report.md``, ``report.html`` and the pictures.

    Arguments
    ---------
    folders : list of (str or pathlib.Path)
        Output folders of ``train.py``. The parts for which one of them lacks
        something are left out, and the report says what is missing.
    to : str or pathlib.Path
        Folder to write into; other files there are left alone.
    title : str
        Heading.
    log : callable
        Called with a line about what takes a while.

    Raises
    ------
    InputError
        If a run is not finished, a file of it is damaged, or runs that name the
        same teacher were distilled from different weights.
    """
    groups = read_groups(folders)
    missing, probe = {}, Probe()
    log("comparing the runs")
    rows, tests = make_rows(groups, probe, missing)
    log("drawing")
    parts = [
        _summary(groups, rows, tests),
        _gains(rows),
        _against("Against the baseline", rows, (EQUAL_EPOCHS, COMPUTE_MATCHED)),
        _against("Choices within a method", rows, (FIRST,)),
        _error_rates(rows),
        _costs(rows),
        _curves(groups, rows),
        _pareto(rows),
        _transcripts(groups, missing),
        *_posteriors(groups, probe, missing),
        _diagnostics(rows),
        Section("How to read this", HOW_TO_READ),
        _missing(missing),
        _commands(groups),
    ]
    parts = [p for p in parts if p.paragraphs or p.tables or p.pictures]
    _write(Path(to), title, rows, parts)


def copy_small_files(folder, to):
    """Copy what a report can be made again of, without where data lay."""
    for pattern in SMALL:
        for path in sorted(folder.glob(pattern)):
            copy = to / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    results = read_finished(folder)
    options = hide_data(results["options"])
    write_json(to / runs.RESULTS, results | {"options": options})


# ----------------------------------------------------------------- the sections


def _by_corpus(rows):
    for corpus in dict.fromkeys(row["corpus"] for row in rows):
        yield corpus, [row for row in rows if row["corpus"] == corpus]


def _by_run(rows):
    """Rows of each run by split."""
    found = {}
    for row in rows:
        found.setdefault((row["corpus"], row["run"]), {})[row["split"]] = row
    return list(found.values())


def _first_rows(rows):
    return [next(iter(splits.values())) for splits in _by_run(rows)]


def _by_network(groups):
    """Students of one network on one corpus, and their baselines."""
    found = {}
    for one in groups:
        if one.role != "teacher":
            found.setdefault((one.corpus, one.network), []).append(one)
    return found.items()


def _tables(rows, head, cells, caption=""):
    """A table for each corpus of what ``cells`` makes of its rows, if any."""
    tables = []
    for corpus, own in _by_corpus(rows):
        body = list(filter(None, map(cells, own)))
        if body:
            tables.append((corpus + caption, [head, *body]))
    return tables


def _kinds_of(splits):
    """Development and test splits, these the former if there are no others."""
    splits = list(dict.fromkeys(split for split in splits if split))
    dev = [split for split in splits if split.startswith("dev")]
    return dev, [split for split in splits if split not in dev] or dev


def _summary(groups, rows, tests):
    """What was found, in a sentence for each network, and where and when."""
    verdicts = [
        _verdict(corpus, network, rows)
        for (corpus, network), _ in _by_network(groups)
    ]
    verdicts = list(filter(None, verdicts)) or [
        "No distilled student has a baseline to be compared with here "
        "(same network, corpus and epochs, one seed each or several each)."
    ]
    text = f"Report of {datetime.date.today():%Y-%m-%d}. "
    if tests:
        text += (
            f"{tests} tests were made, for whose number p-values are corrected "
            "by Holm's method. "
        )
    text += f"A claim needs at least {SEEDS_FOR_A_CLAIM} seeds of each side."
    results = [run for found in groups for run in found.results]
    made = [
        _distinct("Machine", results, "machine", _machine),
        _distinct("Versions", results, "versions", _versions),
    ]
    return Section("Summary", (*verdicts, text, *made))


def _verdict(corpus, network, rows):
    """Whether the students of a network are better than their baseline.

    It is of the method that does best on the development set, by the first
    test set; None if none is compared.
    """
    compared = [
        row
        for row in rows
        if (row["corpus"], row["network"]) == (corpus, network)
        and row["role"] == "student"
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
        "than its baseline, the same network trained by CTC only with as many "
        f"epochs (WER {row['wer']:.1f} against {theirs:.1f} %"
    )
    if row["teacher_wer"] is not None:
        text += f", the teacher's {row['teacher_wer']:.1f} %"
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
        for number, some in _parts(_by_run(own), ROWS):
            gains = {}
            for split, row in (item for run in some for item in run.items()):
                gains.setdefault(split, {})[row["label"]] = [
                    row[f"{saved}{end}"] for end in ("", "_low", "_high")
                ]
            text = (
                f"Errors that runs on {corpus} save, {CAPTIONS[kind]}, with "
                "the 95 % interval. Filled where all of it lies on one side of "
                "none. A point beyond 100 % more errors stands at the edge as "
                "an arrow, with its value."
            )
            figure = plots.gains(gains, corpus)
            pictures.append(
                _draw(f"{prefix}gains_{corpus}{number}", figure, text)
            )
    return Section("At a glance", pictures=pictures)


def _parts(items, size):
    """Items in parts, each with what tells it apart in the name of a file."""
    for begin in range(0, len(items), size):
        number = f"_{begin // size + 1}" if len(items) > size else ""
        yield number, items[begin : begin + size]


def _against(title, rows, kinds):
    head = ["run", "against", "split", "fewer errors (%)"]
    head += ["WER difference (points)", "p", "p, corrected"]
    head += ["sufficient for a claim", "seeds better"]
    head += ["epochs to its best dev WER"]
    tables = []
    for kind in kinds:
        prefix = REFERENCES[kind]

        def cells(row, prefix=prefix):
            if f"{prefix}reference" not in row:
                return None
            return [
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

        tables += _tables(rows, head, cells, f", {CAPTIONS[kind]}")
    return Section(title, tables=tables)


def _error_rates(rows):
    tables = []
    for (corpus, own), rate in itertools.product(_by_corpus(rows), RATES):
        splits = dict.fromkeys(row["split"] for row in own if row["split"])
        body = []
        for run in _by_run(own):
            first = next(iter(run.values()))
            seeds = str(len(first["seeds"].split()) or "-")
            epochs = _number(first["epochs"], 0)
            figures = [_figure(run.get(s, {}), rate, 1, True) for s in splits]
            body.append([first["label"], epochs, seeds, *figures])
        head = ["run", "epochs", "seeds", *splits]
        tables.append((f"{corpus}, {rate.upper()} (%)", [head, *body]))
    return Section("Error rates", tables=tables)


def _costs(rows):
    head = ["run", "parameters (M)", "MB", "real-time factor", "steps"]
    head += ["seconds", "teacher's", "in all"]

    def cells(row):
        return [
            row["label"],
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['mb']:.2f}",
            _number(row["real_time_factor"], 4),
            _number(row.get("steps"), 0),
            _number(row["seconds"], 0),
            _number((row["total_seconds"] or 0) - (row["seconds"] or 0), 0),
            _number(row["total_seconds"], 0),
        ]

    tables = _tables(_first_rows(rows), head, cells)
    return Section("Size, speed and cost", tables=tables)


def _diagnostics(rows):
    head = ["run", "on the teacher's frame (%)", "within one frame (%)"]
    head += ["blank frames (%)", "RKD error, first epoch", "last epoch"]
    digits = {"same_frame": 1, "within_one_frame": 1, "blank_rate": 1}
    digits |= {"rkd_error_first": 3, "rkd_error_last": 3}

    def cells(row):
        if all(row.get(key) is None for key in digits):
            return None
        return [row["label"], *(_number(row.get(k), digits[k]) for k in digits)]

    tables = _tables(_first_rows(rows), head, cells)
    text = (
        "How many of the student's symbols the teacher writes too, at the same "
        "frame and at most one frame off; how many frames are blank. Some "
        "utterances of the development set. A baseline is compared with the "
        "teacher of the others. The RKD error is that of the development set, "
        "per hidden unit and frame.",
    )
    return Section("Student and teacher", text if tables else (), tables)


def _curves(groups, rows):
    head = ["run", "epochs", "best dev WER before the last quarter"]
    head += ["in the last quarter", "gain (points)"]

    def cells(row):
        before, last = map(row.get, ("dev_wer_before", "dev_wer_last_quarter"))
        if last is None:
            return None
        figures = [_number(n, 1) for n in (before, last, before - last)]
        return [row["label"], str(row["epochs"]), *figures]

    pictures = []
    for (corpus, network), own in _by_network(groups):
        curves = []
        for found in own:
            seeds = found.curves()
            if seeds and len(set(map(len, seeds))) == 1:
                name = found.label.removeprefix(f"{network}: ")
                curves.append((name, np.mean(seeds, axis=0).T))
        for number, some in _parts(curves, CURVES):
            title = f"{network} on {corpus}"
            pictures.append(
                _draw(
                    f"learning_{corpus}_{network}{number}",
                    plots.learning_curves(dict(some), title),
                    f"Learning curves: {title}. Means over the seeds; stages "
                    "without transcripts have no WER.",
                )
            )
    tables = _tables(_first_rows(rows), head, cells)
    text = (
        "Dev WER after each epoch (percent, logarithmic). A baseline that "
        "still gains in the last quarter of its epochs has not converged, and "
        "more epochs would leave a teacher less to add.",
    )
    return Section("Learning curves", text if tables else (), tables, pictures)


def _pareto(rows):
    """Errors against speed and size, and the teachers among the students."""
    pictures = []
    for corpus, own in _by_corpus(rows):
        dev, test = _kinds_of(row["split"] for row in own)
        best = {}
        for run in _by_run(own):
            first = next(iter(run.values()))
            chosen, shown = (
                run.get(kind[0], {}).get("wer") for kind in (dev or test, test)
            )
            if chosen is None or shown is None:
                continue
            key = f"{first['network']}: {method_name(first['method'])}"
            if first["role"] == "teacher":
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
            pictures.append(_draw(f"pareto_{corpus}", figure, text))
    return Section("Speed and size", pictures=pictures)


def _transcripts(groups, missing):
    """Two utterances as the teacher, a baseline and its student write them."""
    tables = []
    for (corpus, network), own in _by_network(groups):
        pairs = []
        for one in own:
            baseline = find_references(one, groups).get(EQUAL_EPOCHS)
            if baseline is not None:
                pairs.append((one, baseline))
        if not pairs:
            continue
        _, (split, *_) = _kinds_of(pairs[0][0].splits)
        student, baseline = min(
            pairs, key=lambda pair: statistics.mean(pair[0].rates(split, "wer"))
        )
        written = {
            f"teacher {student.teacher['name']}": _texts_of_teacher(
                student, groups, split
            ),
            BASELINE: baseline.texts(split),
            method_name(student.method): student.texts(split),
        }
        kept = baseline.errors(split, "wer")
        if None in list(written.values())[1:] or kept is None:
            miss(missing, f"transcripts (wer_{split}.txt)", student)
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
            caption = f"{network} on {corpus}, {split}, utterance {key}"
            tables.append((caption, [["", "transcript"], *body]))
    text = (
        "The two utterances at which half and three quarters of all have no "
        "more errors by the baseline; first seeds.",
    )
    return Section("Transcripts", text if tables else (), tables)


def _texts_of_teacher(student, groups, split):
    """Transcripts by a teacher that is a run, if it kept them."""
    source = place_of(student.teacher["source"])
    for found in groups:
        if found.corpus == student.corpus and source in found.places:
            return found.texts(split)
    folder = find_teacher(student.folders[0])
    return folder and Group(*group([folder])).texts(split)


def _posteriors(groups, probe, missing):
    """Frame weights, and spikes of posteriors."""
    # Students of one teacher share its frame weights.
    weights, spikes = {}, []
    for (corpus, network), own in _by_network(groups):
        students = [found for found in own if found.role == "student"]
        students.sort(key=lambda found: found.method != "rkd+skd")
        if not students:
            continue
        try:
            found, both, example = _example(students, groups, probe)
        except Unavailable as reason:
            what = f"pictures of its posteriors: {reason}"
            miss(missing, what, students[0])
            continue
        teacher = found.teacher["name"]
        name = f"weights_{corpus}_{teacher}"
        if name not in weights:
            weights[name] = _draw(
                name,
                plots.frame_weights(example, f"{teacher} on {corpus}"),
                "Weight of each frame, by the teacher: the frame weightings of "
                f"'{example.text}'.",
            )
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
        Section("Frame weights", pictures=list(weights.values())),
        Section("Spikes", pictures=spikes),
    )


def _example(students, groups, probe):
    """Posteriors of the first student that has its weights.

    Returns the student, whether its baseline is shown too, and the example.
    """
    first = None
    for found in students:
        baseline = find_references(found, groups).get(EQUAL_EPOCHS)
        teacher = teacher_of(found, groups)
        for shown in ([baseline, found], [found])[baseline is None :]:
            folders = {
                one.label.removeprefix(f"{one.network}: "): one.folders[0]
                for one in shown
            }
            try:
                example = probe.example(folders, teacher)
                return found, len(shown) > 1, example
            except Unavailable as reason:
                first = first or anonymous(reason, shown[0].folders[0])
    raise Unavailable(first)


def _missing(missing):
    """What the report lacks."""
    text = []
    for what, names in missing.items():
        some = "; ".join(list(names)[:5])
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        text.append(f"No {what}: {some}{more}.")
    return Section("What is missing", tuple(text))


def _commands(groups):
    head, body = ["corpus", "run", "folders", "command"], []
    for found in groups:
        results = found.results[0]
        words = option_words(hide_data(results["options"]))
        command = ["train.py", f"hparams/{results['main_file']}", *words]
        where = found.folders[0]
        if len(found.folders) > 1:
            names = ",".join(folder.name for folder in found.folders)
            where = where.parent / f"{{{names}}}"
        if where.is_relative_to(Path.cwd()):
            where = where.relative_to(Path.cwd())
        body.append(
            [found.corpus, found.label, str(where), shlex.join(command)]
        )
    text = "Command lines are those of the first seed, in the recipe's folder."
    return Section("Runs", (text,), [("", [head, *body])])


def _draw(name, figure, text):
    name = re.sub(r"[^\w.+-]", "_", name) + ".png"
    return name, plots.to_png(figure), text


# -------------------------------------------------------------------- the files


def _write(to, title, rows, parts):
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
    for part in parts:
        for name, png, _ in part.pictures:
            (pictures / name).write_bytes(png)
    for name, text in (
        ("report.md", _markdown(title, parts)),
        ("report.html", _html(title, parts)),
    ):
        write_atomically(
            to / name,
            lambda path, text=text: path.write_text(text, encoding="utf-8"),
        )


def _markdown(title, parts):
    text = [f"# {title}"]
    for part in parts:
        text.append(f"## {part.title}")
        text += part.paragraphs
        for caption, rows in part.tables:
            text += [f"**{caption}**"] if caption else []
            text.append(markdown_table(rows))
        for name, _, caption in part.pictures:
            text.append(f"![{caption}](pictures/{name})\n\n{caption}")
    return "\n\n".join(text) + "\n"


def _html(title, parts):
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
    return template.render(title=title, sections=parts)


def _number(value, digits):
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,.{digits}f}".replace(",", " ")


def _figure(row, key, digits, spread=False, signed=False):
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
