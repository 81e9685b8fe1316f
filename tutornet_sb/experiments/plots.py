"""Pictures of reports, readable in a narrow window and without colour.

Each function returns a matplotlib figure; :func:`to_png` makes a file of it.
"""

import textwrap
from io import BytesIO

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

LINES = "-", "--", "-.", ":"
MARKERS = "o", "s", "^", "D", "v", "P", "X", "*"
# Of Okabe and Ito's palette, told apart by the colour-blind, and brown for its
# yellow, which is hard to see on white
COLOURS = "#000000", "#0072B2", "#D55E00", "#009E73"
COLOURS = *COLOURS, "#CC79A7", "#E69F00", "#56B4E9", "#7F4F24"
# Inches: no wider, so that letters can be read on the screen of a phone
WIDTH = 4.2
DPI = 200
# Letters in a line of a picture, and of its legend
COLUMNS, LEGEND_COLUMNS = 54, 50
# Least error rate of a logarithmic axis (percent)
LEAST = 0.1
# Errors saved beyond which a point stands at the edge (percent)
EDGE = 100


def to_png(figure):
    """PNG file of a figure, as bytes; the same for figures of the same data."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight")
    return file.getvalue()


def learning_curves(curves, title):
    """Draw the WER of the development set against epochs and seconds.

    ``curves`` are ``(epochs, seconds, wers)`` by name, counted from the start
    of the first stage.
    """
    figure = _figure(5.4, curves)
    panels = figure.subplots(2, 1, sharey=True)
    for index, (name, (*axes, wers)) in enumerate(curves.items()):
        for panel, x in zip(panels, axes, strict=True):
            # Few markers, so that the line can be seen.
            every = max(1, len(x) // 8)
            panel.plot(x, wers, label=name, markevery=every, **_style(index))
    panels[0].set_xlabel("epochs, all stages")
    panels[1].set_xlabel("seconds of the student's training")
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    # At the end, curves differ by little of what they have in common.
    least = min(min(wers) for _, _, wers in curves.values())
    bottom = min(50.0, max(LEAST, 0.7 * least))
    for panel in panels:
        panel.set(yscale="log", ylim=(bottom, 110), ylabel="dev WER (%)")
        subs = (1, 2, 5) if bottom < 10 else (1, 2, 3, 4, 6, 8)
        panel.yaxis.set_major_locator(LogLocator(subs=subs))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(NullLocator())
        panel.set_xlim(left=0)
        panel.grid(color="0.85", linewidth=0.6)
    figure.suptitle(title, fontsize="medium")
    _add_legend(figure, panels[0])
    return figure


def gains(gains, title):
    """Draw the errors that runs save, with their intervals, a panel a split.

    ``gains`` are ``(saved, low, high)`` in percent by split and name, the first
    name on top. Points beyond 100 % more errors stand at the edge as an arrow
    with their value; where all of an interval lies on one side of none, its
    point is filled.
    """
    names = list(dict.fromkeys(name for own in gains.values() for name in own))
    rows = sum(map(len, gains.values()))
    lines = 1 + (max(map(len, names)) > COLUMNS)
    figure = _figure(0.7 * len(gains) + (0.3 + 0.15 * lines) * rows)
    heights = [len(own) + 0.8 for own in gains.values()]
    panels = figure.subplots(
        len(gains), 1, squeeze=False, height_ratios=heights
    )[:, 0]
    for panel, (split, own) in zip(panels, gains.items(), strict=True):
        shown = [name for name in names if name in own]
        for row, name in enumerate(shown):
            _draw_gain(panel, row, name, *own[name])
        panel.axvline(0, color="0.4", linewidth=1, zorder=0)
        panel.set(xlim=(-EDGE - 5, EDGE + 5), ylim=(len(shown) - 0.4, -0.6))
        panel.set(yticks=(), xticks=(-100, -50, 0, 50, 100))
        panel.set_title(f"{title}, {split}", fontsize="medium")
        panel.tick_params(axis="x", labelsize="small")
        panel.grid(axis="x", color="0.85", linewidth=0.6)
    panels[-1].set_xlabel("fewer errors (%)")
    return figure


def _draw_gain(panel, row, label, saved, low, high):
    """A name, and below it an interval and its point."""
    colour = COLOURS[1] if saved >= 0 else COLOURS[2]
    if row % 2:
        panel.axhspan(
            row - 0.55, row + 0.45, color="0.95", linewidth=0, zorder=-1
        )
    name = textwrap.fill(label, COLUMNS, max_lines=2, placeholder=" ...")
    panel.text(-EDGE - 3, row - 0.48, name, fontsize="small", va="top")
    panel.plot((low, high), (row + 0.2,) * 2, color=colour, linewidth=1.4)
    is_clear, is_beyond = low > 0 or high < 0, saved < -EDGE
    style = {"color": colour, "marker": "<" if is_beyond else "o"}
    style["markerfacecolor"] = colour if is_clear else "white"
    panel.plot(max(saved, -EDGE), row + 0.2, label=label, **style)
    if is_beyond:
        value = f"{saved:.0f} %".replace("-", "\N{MINUS SIGN}")
        style = {"va": "center", "fontsize": "small", "color": colour}
        panel.text(-EDGE + 8, row + 0.2, value, backgroundcolor="w", **style)


def pareto(points, title, rate="WER (%)"):
    """Draw error rate against real-time factor and against size.

    ``points`` are ``(real-time factor, MB, error rate in percent)`` by name;
    those that no other beats in both are joined.
    """
    figure = _figure(4.8, points)
    panels = figure.subplots(2, 1, sharey=True)
    for column, panel in enumerate(panels):
        for index, (name, point) in enumerate(points.items()):
            style = _style(index) | {"linestyle": "none", "markersize": 7}
            panel.plot(point[column], point[2], label=name, **style)
        front = pareto_front([(p[column], p[2]) for p in points.values()])
        style = {"color": "0.5", "linewidth": 1, "linestyle": ":"}
        panel.step(*zip(*front, strict=True), where="post", zorder=0, **style)
        panel.grid(color="0.85", linewidth=0.6)
        panel.margins(0.12)
        # Few, so that none lies on another.
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.set_ylabel(rate)
    panels[0].set_xlabel("real-time factor")
    panels[1].set_xlabel("size (MB, weights in float32)")
    figure.suptitle(title, fontsize="medium")
    _add_legend(figure, panels[0])
    return figure


def pareto_front(points):
    """Points (cost, error) that no other beats in both, the cheapest first.

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


def _figure(height, names=()):
    """A figure of this height (inches) above a legend of these names."""
    lines = sum(len(textwrap.wrap(name, LEGEND_COLUMNS)) for name in names)
    size = WIDTH, height + 0.18 * lines
    return Figure(figsize=size, layout="constrained")


def _add_legend(figure, panel):
    """A legend below, where it hides nothing."""
    lines, names = panel.get_legend_handles_labels()
    figure.legend(
        lines,
        [textwrap.fill(name, LEGEND_COLUMNS) for name in names],
        loc="outside lower center",
        ncols=1 if max(map(len, names)) > 12 else 3,
        handlelength=3.5,
        frameon=False,
        fontsize="small",
    )


def _style(index):
    return {
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
        "color": COLOURS[index % len(COLOURS)],
        "markersize": 4.5,
        "markerfacecolor": "white" if index % 2 else None,
    }
