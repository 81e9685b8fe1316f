"""Pictures of reports, readable in a narrow window and without colour.

Each function returns a matplotlib figure; :func:`to_png` makes a file of it.
"""

import string
import textwrap
from io import BytesIO

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

LINES = "-", "--", "-.", ":"
MARKERS = "o", "s", "^", "D", "v", "P", "X", "*"
# Of Okabe and Ito's palette, told apart by the colour-blind, and brown for its
# yellow, which white paper swallows
COLOURS = (
    "#000000",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F4F24",
)
# Inches: no wider, so that letters can be read on the screen of a phone
WIDTH = 4.2
DPI = 200
# Letters in a line of a picture
COLUMNS = 54
# Least error rate of a logarithmic axis (percent)
LEAST = 0.1
# Errors saved beyond which a point stands at the edge (percent)
EDGE = 100


def to_png(figure):
    """Draw a figure.

    Arguments
    ---------
    figure : matplotlib.figure.Figure
        What to draw.

    Returns
    -------
    bytes
        A PNG file, the same for figures of the same data.
    """
    file = BytesIO()
    figure.savefig(
        file, format="png", dpi=DPI, bbox_inches="tight", metadata={}
    )
    return file.getvalue()


def learning_curves(curves, title):
    """Draw the WER of the development set against epochs and seconds.

    Arguments
    ---------
    curves : dict
        By name ``(epochs, seconds, wers)``, of equal length, from the start of
        the first stage.
    title : str
        What they have in common.

    Returns
    -------
    matplotlib.figure.Figure
        Two panels. A letter at the end of each curve leads to its name.
    """
    names = [
        f"{string.ascii_uppercase[index]}  {name}"
        for index, name in enumerate(curves)
    ]
    figure = Figure(
        figsize=(WIDTH, 5.4 + 0.18 * sum(map(_lines_of, names))),
        layout="constrained",
    )
    panels = figure.subplots(2, 1, sharey=True)
    for index, (epochs, seconds, wers) in enumerate(curves.values()):
        for panel, x in zip(panels, (epochs, seconds), strict=True):
            # Few markers, so that the line can be seen.
            panel.plot(
                x,
                wers,
                label=names[index],
                markevery=max(1, len(x) // 8),
                **_style(index),
            )
    panels[0].set(xlabel="epochs, all stages", ylabel="dev WER (%)")
    panels[1].set(
        xlabel="seconds of the student's training", ylabel="dev WER (%)"
    )
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    # What has converged differs by little, of much that all have in common.
    least = min(min(wers) for _, _, wers in curves.values())
    bottom = min(50.0, max(LEAST, 0.7 * least))
    for panel in panels:
        panel.set_yscale("log")
        panel.set_ylim(bottom, 110)
        subs = (1, 2, 5) if bottom < 10 else (1, 2, 3, 4, 6, 8)
        panel.yaxis.set_major_locator(LogLocator(subs=subs))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(NullLocator())
        panel.set_xlim(left=0, right=1.06 * panel.dataLim.xmax)
        panel.grid(color="0.85", linewidth=0.6)
        _letter_ends(panel)
    figure.suptitle(title, fontsize="medium")
    _name_lines(figure, panels[0])
    return figure


def _letter_ends(panel):
    """The letter of each curve beside its end, none on another."""
    to_axes = panel.transData + panel.transAxes.inverted()
    placed = []
    ends = [
        (*to_axes.transform(line.get_xydata()[-1]), line)
        for line in panel.lines
    ]
    for x, y, line in sorted(ends, key=lambda end: end[1]):
        y = max(y, 0.03)
        for other_x, other_y in placed:
            if abs(x - other_x) < 0.04 and y - other_y < 0.075:
                y = other_y + 0.075
        placed.append((x, y))
        panel.text(
            x + 0.015,
            y,
            line.get_label()[0],
            transform=panel.transAxes,
            color=line.get_color(),
            va="center",
            fontsize="small",
            fontweight="bold",
        )


def gains(gains, title):
    """Draw the errors that runs save, with their intervals.

    Arguments
    ---------
    gains : dict
        By split and by name ``(saved, low, high)``, the errors that are saved
        in percent and the interval of that, from the first name on top. Names
        that a split lacks have no point there.
    title : str
        What they have in common.

    Returns
    -------
    matplotlib.figure.Figure
        A panel for each split. Intervals end at 100 % more errors, where a
        point beyond it stands as an arrow with its value; where all of an
        interval lies on one side of none, its point is filled.
    """
    names = list(dict.fromkeys(name for own in gains.values() for name in own))
    rows = sum(map(len, gains.values()))
    lines = 1 + (max(map(len, names)) > COLUMNS)
    figure = Figure(
        figsize=(WIDTH, 0.7 * len(gains) + (0.3 + 0.15 * lines) * rows),
        layout="constrained",
    )
    panels = figure.subplots(
        len(gains),
        1,
        squeeze=False,
        height_ratios=[len(own) + 0.8 for own in gains.values()],
    )[:, 0]
    for panel, (split, own) in zip(panels, gains.items(), strict=True):
        shown = [name for name in names if name in own]
        for row, name in enumerate(shown):
            _draw_gain(panel, row, name, *own[name])
        panel.axvline(0, color="0.4", linewidth=1, zorder=0)
        panel.set(xlim=(-EDGE - 5, EDGE + 5), ylim=(len(shown) - 0.4, -0.6))
        panel.set_yticks(())
        panel.set_title(f"{title}, {split}", fontsize="medium")
        panel.set_xticks((-100, -50, 0, 50, 100))
        panel.tick_params(axis="x", labelsize="small")
        panel.grid(axis="x", color="0.85", linewidth=0.6)
    panels[-1].set_xlabel("fewer errors (%)")
    return figure


def _draw_gain(panel, row, name, saved, low, high):
    """A name, and below it an interval and its point."""
    colour = COLOURS[1] if saved >= 0 else COLOURS[2]
    if row % 2:
        panel.axhspan(row - 0.55, row + 0.45, color="0.95", linewidth=0)
    panel.text(
        -EDGE - 3,
        row - 0.48,
        textwrap.fill(name, COLUMNS, max_lines=2, placeholder=" ..."),
        fontsize="small",
        va="top",
    )
    panel.plot((low, high), (row + 0.2,) * 2, color=colour, linewidth=1.4)
    is_clear = low > 0 or high < 0
    is_beyond = saved < -EDGE
    panel.plot(
        max(saved, -EDGE),
        row + 0.2,
        label=name,
        marker="<" if is_beyond else "o",
        markersize=7 if is_beyond else 5,
        color=colour,
        markerfacecolor=colour if is_clear else "white",
    )
    if is_beyond:
        panel.annotate(
            f"{saved:.0f} %".replace("-", "\N{MINUS SIGN}"),
            (-EDGE, row + 0.2),
            (7, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )


def pareto(points, title, rate="WER (%)"):
    """Draw error rate against real-time factor and against size.

    Arguments
    ---------
    points : dict
        By name ``(real-time factor, MB, error rate in percent)``.
    title : str
        What they have in common.
    rate : str
        Name of the error rate.

    Returns
    -------
    matplotlib.figure.Figure
        Two panels; the points that no other beats in both are joined.
    """
    figure = Figure(
        figsize=(WIDTH, 4.8 + 0.18 * sum(map(_lines_of, points))),
        layout="constrained",
    )
    panels = figure.subplots(2, 1, sharey=True)
    for panel, column in zip(panels, (0, 1), strict=True):
        for index, (name, point) in enumerate(points.items()):
            style = _style(index) | {"linestyle": "none", "markersize": 7}
            panel.plot(point[column], point[2], label=name, **style)
        front = pareto_front([(p[column], p[2]) for p in points.values()])
        x, y = zip(*front, strict=True)
        panel.step(
            x,
            y,
            where="post",
            color="0.5",
            linewidth=1,
            linestyle=":",
            zorder=0,
        )
        panel.grid(color="0.85", linewidth=0.6)
        panel.margins(0.12)
        # Few, so that none lies on another.
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.set_ylabel(rate)
    panels[0].set_xlabel("real-time factor")
    panels[1].set_xlabel("size (MB, weights in float32)")
    figure.suptitle(title, fontsize="medium")
    _name_lines(figure, panels[0])
    return figure


def pareto_front(points):
    """Find the points that no other beats in both values.

    Arguments
    ---------
    points : list of (float, float)
        Cost and error, lower is better.

    Returns
    -------
    list of (float, float)
        The front, from the cheapest on.

    Example
    -------
    >>> pareto_front([(3, 1), (1, 5), (2, 6), (2, 4)])
    [(1, 5), (2, 4), (3, 1)]
    """
    front = []
    for cost, error in sorted(points):
        if not front or error < front[-1][1]:
            front.append((cost, error))
    return front


def frame_weights(example, title):
    """Draw frame weights over the spectrogram, the transcript under it.

    Arguments
    ---------
    example : diagnostics.Example
        An utterance.
    title : str
        Above the picture.

    Returns
    -------
    matplotlib.figure.Figure
        One panel for the spectrogram and the weights, one for the symbols.
    """
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    panel, text = figure.subplots(
        2, 1, sharex=True, height_ratios=(12, 1), squeeze=True
    )
    features = np.asarray(example.features)
    end = len(features) * example.feature_period
    # Light, so that the lines are seen over the loudest sound too.
    panel.imshow(
        features.T,
        origin="lower",
        aspect="auto",
        cmap="Greys",
        vmin=np.percentile(features, 20),
        vmax=features.max() + 0.6 * np.ptp(features),
        extent=(0, end, 0, features.shape[1]),
    )
    panel.set_ylabel("mel band")
    panel.set_title(title, fontsize="medium")
    over = panel.twinx()
    for index, (name, weights) in enumerate(example.weights.items()):
        weights = np.asarray(weights)
        over.plot(
            np.arange(len(weights)) * example.period,
            weights * len(weights),
            label=name,
            color=COLOURS[index],
            linestyle=LINES[(index + 2) % 3],
            linewidth=1.5,
        )
    over.set(ylabel="weight, 1 on average", ylim=(0, None), xlim=(0, end))
    _write_symbols(text, example.symbols, end)
    _name_lines(figure, over)
    return figure


def posterior_spikes(example, title):
    """Draw the posteriors of several models on one utterance.

    Arguments
    ---------
    example : diagnostics.Example
        An utterance.
    title : str
        Above the picture.

    Returns
    -------
    matplotlib.figure.Figure
        A panel for each model, and one for the transcript.
    """
    models = example.posteriors
    end = len(example.features) * example.feature_period
    figure = Figure(
        figsize=(WIDTH, 0.8 + 1.5 * len(models)), layout="constrained"
    )
    *panels, text = figure.subplots(
        len(models) + 1,
        1,
        sharex=True,
        height_ratios=[6] * len(models) + [1],
    )
    for panel, (name, (posteriors, period)) in zip(
        panels, models.items(), strict=True
    ):
        posteriors = np.asarray(posteriors)
        times = np.arange(len(posteriors)) * period
        blank = example.blank_index
        panel.plot(
            times,
            posteriors[:, blank],
            color="0.6",
            linestyle=":",
            linewidth=1,
            label="blank",
        )
        letters = np.delete(posteriors, blank, axis=1).max(1)
        panel.fill_between(times, letters, color="0.85", linewidth=0)
        panel.plot(
            times, letters, color="black", linewidth=1, label="likeliest symbol"
        )
        _write_in_a_row(
            panel,
            1.1,
            [
                (times[frame], example.pieces[int(posteriors[frame].argmax())])
                for frame in _peaks(posteriors, blank)
            ],
            end,
        )
        panel.set(
            ylim=(0, 1.22), yticks=(0, 0.5, 1), ylabel=textwrap.fill(name, 18)
        )
    panels[0].set_title(title, fontsize="medium")
    _write_symbols(text, example.symbols, end)
    _name_lines(figure, panels[0])
    return figure


def _peaks(posteriors, blank):
    """Frames at which a symbol is written, the likeliest of its run."""
    best = posteriors.argmax(1)
    starts = np.flatnonzero(np.diff(best, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(best)], strict=True):
        symbol = best[start]
        if symbol != blank:
            yield start + int(posteriors[start:end, symbol].argmax())


def _write_symbols(panel, symbols, end):
    """The transcript, each symbol at its time; the panel ends with it."""
    panel.set(ylim=(0, 1), xlim=(0, end), yticks=(), xlabel="seconds")
    for side in ("top", "left", "right"):
        panel.spines[side].set_visible(False)
    _write_in_a_row(panel, 0.4, symbols, end)


def _write_in_a_row(panel, height, symbols, end):
    """Symbols at their times, moved on where they would lie on each other."""
    earliest = 0.0
    for time, symbol in symbols:
        time = max(time, earliest)
        earliest = time + 0.022 * end
        panel.text(
            time,
            height,
            _sign(symbol),
            ha="center",
            va="center",
            fontsize="small",
        )


def _name_lines(figure, panel):
    """A legend below, where it hides nothing."""
    lines, names = panel.get_legend_handles_labels()
    figure.legend(
        lines,
        [textwrap.fill(name, COLUMNS - 4) for name in names],
        loc="outside lower center",
        ncols=1 if max(map(len, names)) > 12 else 3,
        handlelength=3.5,
        frameon=False,
        fontsize="small",
    )


def _lines_of(name):
    """How many lines a name takes in a legend."""
    return len(textwrap.wrap(name, COLUMNS - 4))


def _sign(piece):
    """A symbol as it is shown; a word boundary is a low line."""
    return piece.replace("▁", "_").replace("|", "_")


def _style(index):
    return {
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
        "color": COLOURS[index % len(COLOURS)],
        "markersize": 4.5,
        "linewidth": 1.4,
        "markerfacecolor": "white" if index % 2 else None,
    }
