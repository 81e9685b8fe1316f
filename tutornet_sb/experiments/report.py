"""Reports of runs, as Markdown and as a page: verdicts, tables and pictures."""

import base64
import csv
import datetime
import io
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
from tutornet_sb.experiments.compare import markdown_table
from tutornet_sb.experiments.groups import (
    COMPUTE_MATCHED,
    EQUAL_EPOCHS,
    FIRST,
    RATES,
    read_finished,
    read_groups,
)
from tutornet_sb.experiments.labels import (
    BASELINE,
    hide_data,
    method_name,
    place_of,
)
from tutornet_sb.experiments.plan import option_words
from tutornet_sb.experiments.rows import make_rows, miss
from tutornet_sb.experiments.statistics import SEEDS_FOR_A_CLAIM
from tutornet_sb.networks import runs
from tutornet_sb.util.files import write_atomically, write_json

# Small files of a run, of which a report can be made again
SMALL = [f"{runs.STAGES}/*/{name}" for name in (runs.ERRORS, runs.METRICS)]
# Curves that can be told apart in one picture, and rows that fit on a page
CURVES, ROWS = 8, 10
CAPTIONS = {
    EQUAL_EPOCHS: "against the CTC baseline at equal epochs",
    COMPUTE_MATCHED: "against the compute-matched CTC baseline",
    FIRST: "each against the first with the same method, teacher and epochs",
}
# Heads of columns, and the figures in them with their formats
AGAINST = {
    "run": "label",
    "against": "reference_label",
    "split": "split",
    "fewer errors (%)": "wer_reduction:+.1f",
    "WER difference (points)": "wer_difference:+.1f",
    "p": "p_value:p",
    "p, corrected": "p_value_holm:p",
    "sufficient for a claim": "is_sufficient",
    "seeds better": "seeds_better",
    "epochs to its best dev WER": "epochs_to_reach_it:.1f",
}
COSTS = {
    "run": "label",
    "parameters (M)": "million_parameters:.2f",
    "MB": "mb:.2f",
    "real-time factor": "real_time_factor:.4f",
    "steps": "steps:,.0f",
    "seconds": "seconds:,.0f",
    "teacher's": "teacher_seconds:,.0f",
    "in all": "total_seconds:,.0f",
}
CURVE_ENDS = {
    "run": "label",
    "epochs": "epochs:.0f",
    "best dev WER before the last quarter": "dev_wer_before:.1f",
    "in the last quarter": "dev_wer_last_quarter:.1f",
    "gain (points)": "dev_wer_gain:.1f",
    "RKD error, first epoch": "rkd_error_first:.3f",
    "last epoch": "rkd_error_last:.3f",
}


class Section(NamedTuple):
    """A part of a report."""

    title: str
    paragraphs: tuple = ()
    tables: list = ()  # caption and rows of texts, the first of them the head
    pictures: list = ()  # name of the file, the PNG, and what it shows


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
    missing = {}
    log("comparing the runs")
    rows, tests = make_rows(groups, missing)
    log("drawing")
    sections = [
        _summary(groups, rows, tests),
        _gains(rows),
        _against("Against the baseline", rows, (EQUAL_EPOCHS, COMPUTE_MATCHED)),
        _against("Choices within a method", rows, (FIRST,)),
        _error_rates(rows),
        Section("Size, speed and cost", tables=_tables(_firsts(rows), COSTS)),
        _curves(groups, rows),
        _pareto(rows),
        _transcripts(groups, missing),
        Section(
            "How to read this",
            _prose("how_to_read.jinja", seeds=SEEDS_FOR_A_CLAIM),
        ),
        _missing(missing),
        _commands(groups),
    ]
    sections = [s for s in sections if s.paragraphs or s.tables or s.pictures]
    _write(Path(to), title, rows, sections)


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


# ------------------------------------------------------------------- the tables


def _by_corpus(rows):
    for corpus in dict.fromkeys(row["corpus"] for row in rows):
        yield corpus, [row for row in rows if row["corpus"] == corpus]


def _by_run(rows):
    """Rows of each run by split."""
    found = {}
    for row in rows:
        found.setdefault((row["corpus"], row["run"]), {})[row["split"]] = row
    return list(found.values())


def _firsts(rows):
    return [next(iter(splits.values())) for splits in _by_run(rows)]


def _by_network(groups):
    """Students of one network on one corpus, and their baselines."""
    found = {}
    for one in groups:
        if one.role != "teacher":
            found.setdefault((one.corpus, one.network), []).append(one)
    return found.items()


def _kinds_of(splits):
    """Development and test splits, these the former if there are no others."""
    splits = list(dict.fromkeys(split for split in splits if split))
    dev = [split for split in splits if split.startswith("dev")]
    return dev, [split for split in splits if split not in dev] or dev


def _tables(rows, columns, caption="", prefix=""):
    """A table for each corpus, if any."""
    return [
        (
            corpus + caption,
            [
                list(columns),
                *(
                    [_cell(row, c, prefix) for c in columns.values()]
                    for row in own
                ),
            ],
        )
        for corpus, own in _by_corpus(rows)
    ]


def _cell(row, column, prefix=""):
    """A figure as text, with its interval and its spread if they are known."""
    key, _, style = column.partition(":")
    key = prefix + key if prefix + key in row else key
    value = row.get(key)
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if style == "p":
        return _p_value(value)
    text, plain = f"{value:{style}}".replace(",", " "), style.lstrip("+")
    if f"{key}_low" in row:
        text += f" [{row[f'{key}_low']:{plain}}, {row[f'{key}_high']:{plain}}]"
    if f"{key}_sd" in row:
        text += f" ± {row[f'{key}_sd']:{plain}}"
    return text


def _p_value(value, equal=""):
    return "< 0.001" if value < 0.001 else f"{equal}{value:.3f}"


# ----------------------------------------------------------------- the sections


def _summary(groups, rows, tests):
    """What was found, in a sentence for each network, and where and when."""
    verdicts = [_best_student(*key, rows) for key, _ in _by_network(groups)]
    made_on = {}
    for what, written in ("Machine", _machine), ("Versions", _versions):
        found = [r.get(what.lower()) for one in groups for r in one.results]
        made_on[what] = "; ".join(
            dict.fromkeys(map(written, filter(None, found)))
        )
    prose = _prose(
        "summary.jinja",
        verdicts=list(filter(None, verdicts)),
        today=datetime.date.today(),
        tests=tests,
        seeds=SEEDS_FOR_A_CLAIM,
        made_on=made_on,
    )
    return Section("Summary", prose)


def _machine(machine):
    text = f"{machine['cpu']}, {machine['cores']} cores, of which PyTorch "
    text += f"used {machine['threads']}"
    return text + (f", {machine['gpu']}" if "gpu" in machine else "")


def _versions(versions):
    return ", ".join(map(" ".join, versions.items()))


def _best_student(corpus, network, rows):
    """Row of the student that does best on the development set.

    It is of the first test set; None if none is compared with a baseline.
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
    on_dev = [row for row in compared if row["split"] == (dev or test)[0]]
    best = min(on_dev, key=lambda row: row["wer"])["run"]
    return next(
        row for row in compared if (row["run"], row["split"]) == (best, test[0])
    )


def _gains(rows):
    """Pictures of what runs gain over each kind of reference."""
    pictures = []
    for (kind, caption), (corpus, own) in itertools.product(
        CAPTIONS.items(), _by_corpus(rows)
    ):
        saved = f"{kind}wer_reduction"
        own = [row for row in own if f"{saved}_low" in row]
        for number, some in _parts(_by_run(own), ROWS):
            gains = {}
            for split, row in (item for run in some for item in run.items()):
                gains.setdefault(split, {})[row["label"]] = [
                    row[f"{saved}{end}"] for end in ("", "_low", "_high")
                ]
            text = (
                f"Errors that runs on {corpus} save, {caption}, with "
                "the 95 % interval. Filled where all of it lies on one side of "
                "none. A point beyond 100 % more errors stands at the edge as "
                "an arrow, with its value."
            )
            name = f"{kind}gains_{corpus}{number}"
            pictures.append(_draw(name, plots.gains(gains, corpus), text))
    return Section("At a glance", pictures=pictures)


def _parts(items, size):
    """Items in parts, each with what tells it apart in the name of a file."""
    for begin in range(0, len(items), size):
        number = f"_{begin // size + 1}" if len(items) > size else ""
        yield number, items[begin : begin + size]


def _against(title, rows, kinds):
    tables = []
    for kind in kinds:
        compared = [row for row in rows if f"{kind}reference" in row]
        tables += _tables(compared, AGAINST, f", {CAPTIONS[kind]}", kind)
    return Section(title, tables=tables)


def _error_rates(rows):
    tables = []
    for (corpus, own), rate in itertools.product(_by_corpus(rows), RATES):
        splits = dict.fromkeys(row["split"] for row in own if row["split"])
        body = []
        for run in _by_run(own):
            first = next(iter(run.values()))
            seeds = str(len(first["seeds"].split()) or "-")
            figures = [_cell(run.get(s, {}), f"{rate}:.1f") for s in splits]
            epochs = _cell(first, "epochs:.0f")
            body.append([first["label"], epochs, seeds, *figures])
        head = ["run", "epochs", "seeds", *splits]
        tables.append((f"{corpus}, {rate.upper()} (%)", [head, *body]))
    return Section("Error rates", tables=tables)


def _curves(groups, rows):
    pictures = []
    for (corpus, network), own in _by_network(groups):
        curves = []
        for found in own:
            if len(set(map(len, found.curves))) == 1:
                name = found.label.removeprefix(f"{network}: ")
                curves.append((name, np.mean(found.curves, axis=0).T))
        for number, some in _parts(curves, CURVES):
            title = f"{network} on {corpus}"
            text = (
                f"Learning curves: {title}. Means over the seeds; stages "
                "without transcripts have no WER."
            )
            figure = plots.learning_curves(dict(some), title)
            name = f"learning_{corpus}_{network}{number}"
            pictures.append(_draw(name, figure, text))
    rows = [
        row
        for row in _firsts(rows)
        if "dev_wer_gain" in row or "rkd_error_first" in row
    ]
    tables = _tables(rows, CURVE_ENDS)
    text = (
        "Dev WER after each epoch (percent, logarithmic). A baseline that "
        "still gains in the last quarter of its epochs has not converged, and "
        "more epochs would leave a teacher less to add. The RKD error is that "
        "of the development set, per hidden unit and frame.",
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
        pairs = [
            (one, one.references[EQUAL_EPOCHS])
            for one in own
            if EQUAL_EPOCHS in one.references
        ]
        if not pairs:
            continue
        _, (split, *_) = _kinds_of(pairs[0][0].splits[0])
        student, baseline = min(
            pairs, key=lambda pair: statistics.mean(pair[0].rates(split, "wer"))
        )
        source = place_of(student.teacher["source"])
        teachers = [
            found.texts(split)
            for found in groups
            if found.corpus == corpus and source in found.places
        ]
        written = {
            f"teacher {student.teacher['name']}": next(iter(teachers), None),
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
        line = shlex.join(command)
        body.append([found.corpus, found.label, str(where), line])
    text = "Command lines are those of the first seed, in the recipe's folder."
    return Section("Runs", (text,), [("", [head, *body])])


def _draw(name, figure, text):
    name = re.sub(r"[^\w.+-]", "_", name) + ".png"
    return name, plots.to_png(figure), text


# -------------------------------------------------------------------- the files


def _write(to, title, rows, sections):
    pictures = to / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for name, png, _ in section.pictures:
            (pictures / name).write_bytes(png)
    table = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(table, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    page = _template("report.html.jinja")
    for name, text in (
        ("results.csv", table.getvalue()),
        ("report.md", _markdown(title, sections)),
        ("report.html", page.render(title=title, sections=sections)),
    ):
        write_atomically(
            to / name, lambda path, text=text: path.write_text(text, "utf-8")
        )


def _prose(name, **values):
    """Paragraphs of a template."""
    text = _template(name).render(values)
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    return tuple(filter(None, paragraphs))


def _template(name):
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tutornet_sb.experiments", ""),
        autoescape=jinja2.select_autoescape(("html.jinja",)),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["data"] = lambda png: (
        f"data:image/png;base64,{base64.b64encode(png).decode()}"
    )
    environment.filters |= {"method": method_name, "p_value": _p_value}
    return environment.get_template(name)


def _markdown(title, sections):
    text = [f"# {title}"]
    for section in sections:
        text += [f"## {section.title}", *section.paragraphs]
        for caption, rows in section.tables:
            text += [f"**{caption}**"] if caption else []
            text.append(markdown_table(rows))
        for name, _, caption in section.pictures:
            text.append(f"![{caption}](pictures/{name})\n\n{caption}")
    return "\n\n".join(text) + "\n"
