"""Summaries of finished runs, and tables of them; needs no extra."""

import contextlib
import os
import statistics
from pathlib import Path

from tutornet_sb.networks.runs import FORMAT, read_results
from tutornet_sb.util.errors import InputError, MissingFileError
from tutornet_sb.util.files import write_atomically

FIGURES = "seed", "epochs", "parameters", "real_time_factor"
FIGURES = *FIGURES, "train_seconds", "train_audio_seconds"
# Of a summary; all else in it is a number
KINDS = {"teacher": str | None, "splits": dict}
KINDS |= dict.fromkeys(("folder", "name", "method", "corpus"), str)
# Runs that agree in these are one row of a table.
ALIKE = ("corpus", "name", "method", "teacher", "epochs", "parameters")
# Of a column of scores
SCORES = " WER / CER (%)"
# Columns that a narrow table always keeps, and those that it drops first
NAMES = "network", "method", "teacher"
LEAST = "real-time factor", "size (M)"


def read_finished(folder):
    """Read ``results.json`` of a finished run, in the format of this version.

    Raises :class:`InputError` if the folder has none, or one that is damaged or
    of another format.
    """
    results = read_results(folder)
    if not results:
        raise MissingFileError(
            f"{folder} holds no results.json: the run is not finished, the "
            "same command of train.py resumes it"
        )
    if not isinstance(results, dict):
        raise _damaged(folder)
    if results.get("format") != FORMAT:
        raise InputError(
            f"{folder}: format of results.json must be {FORMAT}, got "
            f"{results.get('format')}: another version of TutorNet wrote it, "
            "repeat the run in a new folder"
        )
    return results


def summarize(folder):
    """Return the figures of a finished run that tables and exports quote.

    These are ``folder``, ``name`` of the network, that of the ``teacher`` (or
    None), ``method``, ``corpus``, ``FIGURES``, and ``splits``: the scores after
    the last stage. Raises :class:`InputError` if one is missing or damaged.
    """
    results = read_finished(folder)
    try:
        *_, last = results["stages"].values()
        summary = {
            "folder": str(folder),
            "name": results["student"],
            "teacher": results["teacher"] and results["teacher"]["name"],
            "method": results["method"],
            "corpus": results["corpus"],
            **{key: results[key] for key in FIGURES},
            "splits": last["splits"],
        }
        is_sound = all(
            isinstance(value, KINDS[key]) if key in KINDS else _is_number(value)
            for key, value in summary.items()
        ) and all(map(_is_scored, summary["splits"].values()))
    except KeyError as error:
        raise InputError(
            f"results.json in {folder} lacks {error}: was it written by "
            "train.py?"
        ) from None
    except (TypeError, AttributeError, ValueError):
        is_sound = False
    if not is_sound:
        raise _damaged(folder)
    return summary


def _damaged(folder):
    return InputError(
        f"results.json in {folder} is damaged: it has a text in place of a "
        "figure, or the reverse. Was it written by train.py?"
    )


def _is_scored(scores):
    # The median is None for a split in which no word counts.
    median = scores.get("latency", {}).get("median") or 0
    return all(map(_is_number, (scores.get("wer"), scores.get("cer"), median)))


def _is_number(value):
    return isinstance(value, int | float) and abs(value) < 2**63


def group(folders):
    """Summaries of runs, in lists of those that differ in their seed alone.

    Such runs lie side by side in one folder. Each run counts once.
    """
    groups = {}
    for folder in dict.fromkeys(map(str, folders)):
        run = summarize(folder)
        key = tuple(run[name] for name in ALIKE) + (Path(folder).parent,)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def differing(ours, theirs):
    """Names of the options in which two runs differ.

    Example
    -------
    >>> differing({"lr": 1, "seed": 2}, {"lr": 1.0, "seed": 3, "delay": None})
    ['seed', 'delay']
    """
    ours, theirs = ({k: (v,) for k, v in o.items()} for o in (ours, theirs))
    return [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]


def table(folders):
    """Markdown table of runs, with one row for each network and method.

    Runs that differ in their seed alone share a row, which has the mean and
    the standard deviation of the sample. Where all runs are in one folder, it
    is named below the table and left out of their column.
    """
    columns, shared = _columns(group(folders))
    text = _markdown(columns)
    return text if shared is None else f"{text}\n\nRuns are in `{shared}`."


def short_table(folders, width=100):
    """Lay runs out as :func:`table` does, for a terminal of ``width`` columns.

    Columns that are alike in all rows, and if need be others, are left out;
    the folders are listed below, in the order of the rows.
    """
    columns, shared = _columns(group(folders))
    splits = [
        name.removesuffix(SCORES) for name in columns if name.endswith(SCORES)
    ]
    places = columns.pop("run")
    alike = ", ".join(
        f"{name} {columns.pop(name)[0]}"
        for name in ("corpus", "epochs", "seeds")
        if len(set(columns[name])) == 1
    )
    columns = {
        name.removesuffix(SCORES).replace("parameters", "size"): cells
        for name, cells in columns.items()
    }
    shown = "WER / CER (%)"
    for name in (*LEAST, "WER", *columns):
        if len(_markdown(columns).partition("\n")[0]) <= width:
            break
        if name == "WER":
            shown = "WER (%)"
            for split in splits:
                columns[split] = [
                    cell.partition(" / ")[0] for cell in columns[split]
                ]
        elif name not in NAMES and name not in splits:
            columns.pop(name, None)
    where = f" in `{shared}`" if shared is not None else ""
    return "\n".join(
        [
            _markdown(columns),
            "",
            f"{shown} by split" + (f"; all: {alike}" if alike else ""),
            f"Runs{where}, row by row:",
            *(f"    {place}" for place in places),
        ]
    )


def _columns(groups):
    """Cells of all rows by column, and the folder that holds all runs."""
    firsts = [alike[0] for alike in groups]
    columns = {
        "corpus": [run["corpus"] for run in firsts],
        "network": [run["name"] for run in firsts],
        "method": [run["method"] for run in firsts],
        "teacher": [run["teacher"] or "-" for run in firsts],
        "epochs": [str(run["epochs"]) for run in firsts],
        "seeds": [str(len(alike)) for alike in groups],
        "parameters (M)": [f"{run['parameters'] / 1e6:.2f}" for run in firsts],
        "real-time factor": [
            f"{statistics.mean(run['real_time_factor'] for run in alike):.3f}"
            for alike in groups
        ],
    }
    latencies = {}
    splits = [s for alike in groups for run in alike for s in run["splits"]]
    for split in dict.fromkeys(splits):
        rows = [[run["splits"].get(split) for run in a] for a in groups]
        columns[split + SCORES] = [
            "-"
            if None in scores
            else " / ".join(_spread(scores, rate) for rate in ("wer", "cer"))
            for scores in rows
        ]
        # Of streaming students, where a word was recognised
        times = [
            [(s or {}).get("latency", {}).get("median") for s in scores]
            for scores in rows
        ]
        if any(map(any, times)):
            latencies[f"{split} latency (ms)"] = [
                "-" if None in some else f"{statistics.mean(some):.0f}"
                for some in times
            ]
    places = [
        str(Path(alike[0]["folder"]).parent)
        if len(alike) > 1
        else alike[0]["folder"]
        for alike in groups
    ]
    shared = None
    # Some may be relative and others not.
    with contextlib.suppress(ValueError):
        common = os.path.commonpath(places)
        if len(places) > 1 and common not in ("", os.sep, *places):
            shared = common
            places = [os.path.relpath(place, shared) for place in places]
    return columns | latencies | {"run": places}, shared


def _spread(scores, rate):
    values = [score[rate] for score in scores]
    text = f"{statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.1f}"
    return text


def insert(path, name, text):
    """Replace what stands between two marks of a file by a text.

    The marks are the lines ``<!-- NAME -->`` and ``<!-- end NAME -->``; raises
    :class:`InputError` if the file lacks them.
    """
    content = path.read_text(encoding="utf-8")
    first, last = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    before, _, rest = content.partition(first)
    if last not in rest:
        raise InputError(
            f"{path} has no lines '{first.strip()}' and '{last}' to write "
            "between"
        )
    content = f"{before}{first}{text}\n{rest[rest.index(last) :]}"
    write_atomically(
        path, lambda file: file.write_text(content, encoding="utf-8")
    )


def markdown_table(rows):
    """Lay rows of texts out as a Markdown table; the first is the head.

    Example
    -------
    >>> print(markdown_table([["a", "b"], ["1", "23"]]))
    | a | b  |
    |---|----|
    | 1 | 23 |
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _markdown(columns):
    rows = zip(*columns.values(), strict=True)
    return markdown_table([list(columns), *map(list, rows)])
