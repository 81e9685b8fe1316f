"""Pictures of reports, readable without colour.

Each function returns a matplotlib figure; :func:`to_png` makes a file of it.
"""

from io import BytesIO

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

LINES = "-", "--", "-.", ":"
MARKERS = "o", "s", "^", "D", "v", "P", "X", "*"
GREYS = "0.0", "0.35", "0.6"
# Inches
WIDTH = 9.0
DPI = 110


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
        Two panels.
    """
    figure = Figure(figsize=(WIDTH, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for index, (name, (epochs, seconds, wers)) in enumerate(curves.items()):
        style = _style(index)
        for panel, x in zip(panels, (epochs, seconds), strict=True):
            # Few markers, so that the line can be seen.
            panel.plot(
                x, wers, label=name, markevery=max(1, len(x) // 8), **style
            )
    panels[0].set(xlabel="epochs, all stages", ylabel="dev WER (%)")
    panels[1].set(xlabel="seconds of the student's training")
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in panels:
        panel.set_ylim(0, 105)
        panel.set_xlim(left=0)
        panel.grid(color="0.85", linewidth=0.6)
    figure.suptitle(title)
    _name_lines(figure, panels[0])
    return figure


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
        A panel for each split. Intervals end at 100 % more errors; where all
        of an interval lies on one side of none, its point is filled.
    """
    names = list(dict.fromkeys(name for own in gains.values() for name in own))
    height = 1.2 + 0.2 * len(names)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(1, len(gains), sharey=True, squeeze=False)[0]
    for panel, (split, own) in zip(panels, gains.items(), strict=True):
        for row, name in enumerate(names):
            # Every second row is shaded, to lead the eye to its name.
            if row % 2:
                panel.axhspan(row - 0.5, row + 0.5, color="0.94", linewidth=0)
            if name not in own:
                continue
            saved, low, high = own[name]
            panel.plot((low, high), (row, row), color="black", linewidth=1.2)
            panel.plot(
                saved,
                row,
                marker="o",
                markersize=5,
                color="black",
                markerfacecolor="black" if low > 0 or high < 0 else "white",
            )
        panel.axvline(0, color="0.4", linewidth=1)
        panel.set(xlim=(-105, 105), xlabel="fewer errors (%)")
        panel.set_title(f"{title}, {split}", fontsize="medium")
        panel.set_xticks((-100, -50, 0, 50, 100))
        panel.tick_params(axis="x", labelsize="small")
        panel.grid(axis="x", color="0.8", linewidth=0.6)
    panels[0].set_yticks(range(len(names)), names, fontsize="small")
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


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
    figure = Figure(figsize=(WIDTH, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, column in zip(panels, (0, 1), strict=True):
        for index, (name, point) in enumerate(points.items()):
            style = _style(index) | {"linestyle": "none"}
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
    panels[0].set(xlabel="real-time factor", ylabel=rate)
    panels[1].set(xlabel="size (MB, weights in float32)")
    figure.suptitle(title)
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
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
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
    panel.set(ylabel="mel band", title=title)
    over = panel.twinx()
    for index, (name, weights) in enumerate(example.weights.items()):
        weights = np.asarray(weights)
        over.plot(
            np.arange(len(weights)) * example.period,
            weights * len(weights),
            label=name,
            color="black",
            linestyle=LINES[(index + 2) % 3],
            linewidth=(1.2, 1.8, 1.0)[index % 3],
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
        panel.set(ylim=(0, 1.22), yticks=(0, 0.5, 1), ylabel=_folded(name))
    panels[0].set_title(title)
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
        earliest = time + 0.011 * end
        panel.text(time, height, _sign(symbol), ha="center", va="center")


def _name_lines(figure, panel):
    """A legend below, where it hides nothing."""
    lines, names = panel.get_legend_handles_labels()
    longest = max(map(len, names))
    figure.legend(
        lines,
        names,
        loc="outside lower center",
        ncols=1 if longest > 40 else 2 if longest > 16 else 3,
        handlelength=4,
        frameon=False,
        fontsize="small",
    )


def _sign(piece):
    """A symbol as it is shown; a word boundary is a low line."""
    return piece.replace("▁", "_").replace("|", "_")


def _style(index):
    return {
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
        "color": GREYS[index // len(LINES) % len(GREYS)],
        "markersize": 5,
        "linewidth": 1.3,
        "markerfacecolor": "white" if index % 2 else None,
    }


def _folded(name, width=18):
    """A long name on several lines."""
    lines, line = [], ""
    for part in name.replace("_", "_ ").split(" "):
        if line and len(line) + len(part) > width:
            lines.append(line)
            line = ""
        line += part
    return "\n".join([*lines, line])
