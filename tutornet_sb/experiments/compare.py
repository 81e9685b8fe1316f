"""Tables made from the result files of runs."""

import contextlib
import os
import statistics
from pathlib import Path

from tutornet_sb.networks.runs import read_results
from tutornet_sb.util.errors import InputError, MissingFileError
from tutornet_sb.util.files import write_atomically

# Runs that agree in these are one row of a table.
ALIKE = ("corpus", "name", "method", "teacher", "epochs", "parameters")
# Of a column of scores
SCORES = " WER / CER (%)"
# Columns that a terminal has always room for, and those it misses least
NAMES = "network", "method", "teacher"
LEAST = "real-time factor", "size (M)"


def summarize(folder):
    """Give the figures of a run that other runs and tables quote.

    Arguments
    ---------
    folder : str or pathlib.Path
        Output folder of ``train.py``, or a folder with its ``results.json``.

    Returns
    -------
    dict
        ``folder``, ``name`` of the network, ``teacher`` (the name of its
        network, or None), ``method``, ``corpus``, ``seed``, ``epochs``,
        ``parameters``, ``train_audio_seconds``, ``train_seconds``,
        ``real_time_factor`` and ``splits``: the scores after the last stage.

    Raises
    ------
    FileNotFoundError
        If the folder holds no result file.
    ValueError
        If the file lacks a figure, or has something else in its place.
    """
    results = read_results(folder)
    if not results:
        raise MissingFileError(
            f"{folder} holds no results.json: the run is not finished, the "
            "same command of train.py goes on with it"
        )
    same = (
        "method",
        "corpus",
        "seed",
        "epochs",
        "parameters",
        "train_audio_seconds",
        "train_seconds",
        "real_time_factor",
    )
    try:
        *_, last = results["stages"].values()
        summary = {
            "folder": str(folder),
            "name": results["student"],
            "teacher": results["teacher"] and results["teacher"]["name"],
            **{key: results[key] for key in same},
            "splits": last["splits"],
        }
    except KeyError as error:
        raise InputError(
            f"results.json in {folder} lacks {error}: was it written by "
            "train.py?"
        ) from None
    except (TypeError, AttributeError, ValueError):
        summary = {}
    if not _is_sound(summary):
        raise InputError(
            f"results.json in {folder} is damaged: it has a text for a figure, "
            "or the reverse. Was it written by train.py?"
        )
    return summary


def _is_sound(summary):
    """Tell whether the figures of a run are figures, and its names texts."""
    kinds = {"teacher": str | None, "splits": dict}
    kinds |= dict.fromkeys(("name", "method", "corpus", "folder"), str)
    splits = summary.get("splits")
    return (
        isinstance(splits, dict)
        and all(map(_is_scored, splits.values()))
        and all(
            isinstance(value, kinds[key]) if key in kinds else _is_number(value)
            for key, value in summary.items()
        )
    )


def _is_scored(scores):
    latency = scores.get("latency", {}) if isinstance(scores, dict) else None
    if not isinstance(latency, dict):
        return False
    # None is that of a split in which no word counts.
    median = latency.get("median")
    figures = [scores.get("wer"), scores.get("cer"), median or 0]
    return all(map(_is_number, figures))


def _is_number(value):
    return isinstance(value, int | float) and abs(value) < 2**63


def group(folders):
    """Put runs together that differ in their seed alone.

    These lie side by side in one folder.

    Arguments
    ---------
    folders : list of (str or pathlib.Path)
        Output folders of ``train.py``.

    Returns
    -------
    list of list of dict
        From :func:`summarize`; each run once.

    Raises
    ------
    FileNotFoundError
        If a folder holds no result file.
    """
    groups = {}
    for folder in dict.fromkeys(map(str, folders)):
        run = summarize(folder)
        key = tuple(run[name] for name in ALIKE) + (Path(folder).parent,)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def table(folders):
    """Lay runs out in a Markdown table, one row for each network and method.

    Runs that differ in their seed alone share a row, which gives the mean and
    the standard deviation of the sample.

    Arguments
    ---------
    folders : list of (str or pathlib.Path)
        Output folders of ``train.py``.

    Returns
    -------
    str
        The table. Below several rows stands the folder that all runs are in,
        which their column leaves out.

    Raises
    ------
    FileNotFoundError
        If a folder holds no result file.
    """
    rows, shared = _lay_out(group(folders))
    text = markdown_table(rows)
    return text if shared is None else f"{text}\n\nRuns are in `{shared}`."


def short_table(folders, width=100):
    """Lay runs out as :func:`table` does, for a terminal.

    Columns that are alike in all rows, and if need be further ones, are left
    out, and the folders of the runs stand below.

    Arguments
    ---------
    folders : list of (str or pathlib.Path)
        Output folders of ``train.py``.
    width : int
        Of the table (characters).

    Returns
    -------
    str
        The table, and in the order of its rows the folders.

    Raises
    ------
    FileNotFoundError
        If a folder holds no result file.
    """
    groups = group(folders)
    (head, *rows), shared = _lay_out(groups)
    columns = dict(zip(head, zip(*rows, strict=True), strict=True))
    runs = columns.pop("run")
    alike = {
        name: columns.pop(name)[0]
        for name in ("corpus", "epochs", "seeds")
        if len(set(columns[name])) == 1
    }
    columns = {
        name.removesuffix(SCORES).replace("parameters", "size"): cells
        for name, cells in columns.items()
    }
    splits = [name.removesuffix(SCORES) for name in head if SCORES in name]

    def lay_out():
        lines = zip(*columns.values(), strict=True)
        return markdown_table([list(columns), *map(list, lines)])

    shown = "WER / CER (%)"
    for name in (*LEAST, "WER", *head):
        if len(lay_out().partition("\n")[0]) <= width:
            break
        if name == "WER":
            shown = "WER (%)"
            for split in splits:
                columns[split] = [
                    cell.partition(" / ")[0] for cell in columns[split]
                ]
        elif name not in NAMES and name not in splits:
            columns.pop(name, None)
    same = ", ".join(f"{name} {value}" for name, value in alike.items())
    where = f" in `{shared}`" if shared is not None else ""
    return "\n".join(
        [
            lay_out(),
            "",
            f"{shown} by split" + (f"; all: {same}" if same else ""),
            f"Runs{where}, row by row:",
            *(f"    {run}" for run in runs),
        ]
    )


def _lay_out(groups):
    """Rows of all columns below their head, and the folder they are in."""
    splits = list(
        dict.fromkeys(
            split for runs in groups for run in runs for split in run["splits"]
        )
    )
    head = ["corpus", "network", "method", "teacher", "epochs", "seeds"]
    head += ["parameters (M)", "real-time factor"]
    head += [split + SCORES for split in splits]
    timed = [
        split
        for split in splits
        if any(_latency(run, split) for runs in groups for run in runs)
    ]
    head += [f"{split} latency (ms)" for split in timed]
    rows = [head + ["run"]]
    for alike in groups:
        *names, parameters = (alike[0][name] for name in ALIKE)
        speed = statistics.mean(run["real_time_factor"] for run in alike)
        row = [str(name or "-") for name in names] + [str(len(alike))]
        row += [f"{parameters / 1e6:.2f}", f"{speed:.3f}"]
        for split in splits:
            scores = [run["splits"].get(split) for run in alike]
            if None in scores:
                row.append("-")
                continue
            rates = (
                _spread([score[rate] for score in scores])
                for rate in ("wer", "cer")
            )
            row.append(" / ".join(rates))
        for split in timed:
            times = [_latency(run, split) for run in alike]
            row.append(
                "-" if None in times else f"{statistics.mean(times):.0f}"
            )
        where = alike[0]["folder"]
        if len(alike) > 1:
            where = str(Path(where).parent)
        rows.append([*row, where])
    places = [where for *_, where in rows[1:]]
    # None where some are relative and others are not.
    with contextlib.suppress(ValueError):
        shared = os.path.commonpath(places)
        if len(places) > 1 and shared not in ("", os.sep, *places):
            for row in rows[1:]:
                row[-1] = os.path.relpath(row[-1], shared)
            return rows, shared
    return rows, None


def insert(path, name, text):
    """Put a text between two marks of a file, instead of what is there.

    Arguments
    ---------
    path : pathlib.Path
        The file; the marks are the lines ``<!-- NAME -->`` and
        ``<!-- end NAME -->``.
    name : str
        Name of the marks.
    text : str
        What shall stand between them.

    Raises
    ------
    ValueError
        If the file has no such marks.
    """
    content = path.read_text(encoding="utf-8")
    first, last = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    if first not in content or last not in content.partition(first)[2]:
        raise InputError(
            f"{path} has no lines '{first.strip()}' and '{last}' to write "
            "between"
        )
    before, _, rest = content.partition(first)
    after = rest[rest.index(last) :]
    content = f"{before}{first}{text}\n{after}"
    write_atomically(
        path, lambda file: file.write_text(content, encoding="utf-8")
    )


def _latency(run, split):
    """Median latency of a streaming student (ms), None where not measured."""
    return run["splits"].get(split, {}).get("latency", {}).get("median")


def _spread(values):
    text = f"{statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.1f}"
    return text


def markdown_table(rows):
    """Lay rows out as a Markdown table.

    Arguments
    ---------
    rows : list of list of str
        The first is the head.

    Returns
    -------
    str
        The table.

    Example
    -------
    >>> print(markdown_table([["a", "b"], ["1", "23"]]))
    | a | b  |
    |---|----|
    | 1 | 23 |
    """
    widths = [
        max(len(row[column]) for row in rows) for column in range(len(rows[0]))
    ]
    lines = [
        "| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
