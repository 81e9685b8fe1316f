"""Tables of finished runs."""

import contextlib
import os
import statistics
from pathlib import Path

from tutornet_sb.experiments.groups import group
from tutornet_sb.util.errors import InputError
from tutornet_sb.util.files import write_atomically

# Of a column of scores
SCORES = " WER / CER (%)"
# Columns that a narrow table always keeps, and those that it drops first
NAMES = "network", "method", "teacher"
LEAST = "real-time factor", "size (M)"


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


def _from_here(folder):
    """Path from the working folder, of what is in it."""
    here = Path.cwd()
    if folder.is_relative_to(here):
        folder = folder.relative_to(here)
    return str(folder)


def _columns(groups):
    """Cells of all rows by column, and the folder that holds all runs."""
    columns = {
        "corpus": [found.corpus for found in groups],
        "network": [found.network for found in groups],
        "method": [found.method for found in groups],
        "teacher": [found.teacher.get("name", "-") for found in groups],
        "epochs": [str(found.epochs) for found in groups],
        "seeds": [str(len(found.seeds)) for found in groups],
        "parameters (M)": [f"{found.parameters / 1e6:.2f}" for found in groups],
        "real-time factor": [
            f"{found.mean('real_time_factor'):.3f}" for found in groups
        ],
    }
    splits = [split for g in groups for scored in g.splits for split in scored]
    splits = list(dict.fromkeys(splits))
    for split in splits:
        columns[split + SCORES] = [_rates(found, split) for found in groups]
    # Of streaming students, where a word was recognised
    for split in splits:
        times = [found.latency(split) for found in groups]
        if any(times):
            columns[f"{split} latency (ms)"] = [
                "-" if time is None else f"{time:.0f}" for time in times
            ]
    places = [
        _from_here(first.parent if more else first)
        for first, *more in (found.folders for found in groups)
    ]
    shared = None
    # Some may be relative and others not.
    with contextlib.suppress(ValueError):
        common = os.path.commonpath(places)
        if len(places) > 1 and common not in ("", os.sep, *places):
            shared = common
            places = [os.path.relpath(place, shared) for place in places]
    return columns | {"run": places}, shared


def _rates(found, split):
    """WER and CER of a split, with their spread over the seeds."""
    texts = []
    for rate in ("wer", "cer"):
        values = found.rates(split, rate)
        if values is None:
            return "-"
        text = f"{statistics.mean(values):.1f}"
        if len(values) > 1:
            text += f" ± {statistics.stdev(values):.1f}"
        texts.append(text)
    return " / ".join(texts)


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
