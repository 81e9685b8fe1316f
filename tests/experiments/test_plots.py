"""Pictures hold the data that they are given, and are PNG files."""

from io import BytesIO

import matplotlib.image
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from tutornet_sb.experiments.plots import (
    DPI,
    gains,
    learning_curves,
    pareto,
    pareto_front,
    to_png,
)


def lines(panel):
    return {line.get_label(): line for line in panel.lines}


def looks(panel):
    """How lines differ for one who sees no colour."""
    return [
        (line.get_linestyle(), line.get_marker(), line.get_color())
        for line in panel.lines
    ]


def test_curves_are_drawn_against_epochs_and_seconds():
    curves = {
        "baseline": ([1, 2, 3], [10.0, 21.0, 30.0], [90.0, 60.0, 50.0]),
        "student": ([3, 4], [25.0, 33.0], [40.0, 30.0]),
    }
    figure = learning_curves(curves, "lstm on mini")
    left, right = figure.axes
    for name, (epochs, seconds, wers) in zip(
        curves, curves.values(), strict=True
    ):
        for panel, x in ((left, epochs), (right, seconds)):
            found = lines(panel)[name]
            assert list(found.get_xdata()) == x
            assert list(found.get_ydata()) == wers
    assert left.get_xlabel().startswith("epochs")
    assert right.get_xlabel().startswith("seconds")
    assert figure.get_suptitle() == "lstm on mini"


def test_no_two_curves_look_alike_in_colour_or_without():
    curves = {str(i): ([1, 2], [1, 2], [i + 1, i + 1]) for i in range(8)}
    seen = looks(learning_curves(curves, "").axes[0])
    assert len({colour for *_, colour in seen}) == 8
    assert len({(line, marker) for line, marker, _ in seen}) == 8


def boxes(figure, texts):
    """Where texts stand in a drawn figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    return [text.get_window_extent(renderer) for text in texts]


def overlaps(boxes):
    return [
        (a, b)
        for index, a in enumerate(boxes)
        for b in boxes[index + 1 :]
        if a.overlaps(b)
    ]


def test_curves_without_errors_are_drawn():
    figure = learning_curves({"a": ([1, 2], [1, 2], [1.0, 0.0])}, "")
    boxes(figure, [])
    assert figure.axes[0].get_ylim()[0] > 0


def drawn(panel):
    """Per row the interval, the point, its marker, and whether it is filled."""
    named = [line for line in panel.lines if line.get_marker() != "None"]
    found = {}
    for line in named:
        (x,), (y,) = line.get_data()
        filled = line.get_markerfacecolor() == line.get_color()
        (interval,) = [
            tuple(other.get_xdata())
            for other in panel.lines
            if other not in named and list(other.get_ydata()) == [y, y]
        ]
        marker = line.get_marker()
        found[line.get_label()] = (*interval, x, marker, filled)
    return found


def test_what_is_saved_is_drawn_with_its_interval():
    figure = gains(
        {
            "dev": {"a": (40.0, 20.0, 55.0), "b": (5.0, -30.0, 31.0)},
            "test": {"b": (-60.0, -240.0, -8.0), "c": (0.0, -1.0, 1.0)},
        },
        "mini",
    )
    dev, test = figure.axes
    assert [panel.get_title() for panel in figure.axes] == [
        "mini, dev",
        "mini, test",
    ]
    assert drawn(dev) == {
        "a": (20, 55, 40, "o", True),
        "b": (-30, 31, 5, "o", False),
    }
    assert drawn(test) == {
        "b": (-240, -8, -60, "o", True),
        "c": (-1, 1, 0, "o", False),
    }
    # Each name stands above its own interval, the first on top.
    for panel in figure.axes:
        rows = {
            line.get_label(): line.get_ydata()[0]
            for line in panel.lines
            if line.get_marker() == "o"
        }
        for text in panel.texts:
            assert 0 < rows[text.get_text()] - text.get_position()[1] < 1
        bottom, top = panel.get_ylim()
        assert bottom > top


def test_what_is_far_worse_stands_at_the_edge_with_its_value():
    figure = gains({"dev": {"a": (-216.7, -1100.0, -120.0)}}, "digits")
    (panel,) = figure.axes
    assert drawn(panel) == {"a": (-1100, -120, -100, "<", True)}
    left, right = panel.get_xlim()
    assert left < -100 < right
    written = [text.get_text() for text in panel.texts]
    assert written == ["a", "\N{MINUS SIGN}217 %"]


def test_the_front_holds_what_no_other_beats():
    rng = np.random.default_rng(1)
    points = [tuple(pair) for pair in rng.integers(0, 12, (40, 2)).tolist()]
    expected = {
        (x, y)
        for x, y in points
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
    }
    front = pareto_front(points)
    assert front == sorted(expected)


def test_errors_are_drawn_against_speed_and_size():
    points = {
        "a": (0.01, 1.8, 30.0),
        "b": (0.02, 4.0, 20.0),
        "c": (0.03, 2, 50),
    }
    figure = pareto(points, "mini", "test WER (%)")
    for panel, column in zip(figure.axes, (0, 1), strict=True):
        found = lines(panel)
        for name, point in points.items():
            (x,), (y,) = found[name].get_data()
            assert (x, y) == (point[column], point[2])
    # c is slower than b, and larger than a; none of the front
    (front,) = [
        line
        for name, line in lines(figure.axes[0]).items()
        if name not in points
    ]
    assert list(front.get_xdata()) == [0.01, 0.02]
    assert list(front.get_ydata()) == [30, 20]
    assert figure.axes[0].get_ylabel() == "test WER (%)"


def test_no_figure_of_an_axis_lies_on_another():
    # As of small networks on a fast machine
    points = {
        str(index): (0.0011 + 0.0003 * index, 1.78 + 0.9 * index, 10 + index)
        for index in range(6)
    }
    figure = pareto(points, "mini")
    for panel in figure.axes:
        figure.draw_without_rendering()
        left, right = panel.get_xlim()
        shown = [
            label
            for place, label in zip(
                panel.get_xticks(), panel.get_xticklabels(), strict=True
            )
            if left <= place <= right
        ]
        assert len(shown) >= 3
        assert not overlaps(boxes(figure, shown))


def test_pictures_are_png_files():
    def draw():
        yield learning_curves({"a": ([1, 2], [3, 4], [50, 40])}, "t")
        yield pareto({"a": (1, 2, 3)}, "t")

    for figure, again in zip(draw(), draw(), strict=True):
        png = to_png(figure)
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        image = matplotlib.image.imread(BytesIO(png), format="png")
        assert image.shape[0] > 200 and image.shape[1] > 500
        # Something is drawn, in letters for the screen of a phone: 10 points
        # are 12 pixels of a picture 400 pixels wide.
        assert image[..., :3].min() < 0.2
        assert 400 * 10 / 72 * DPI / image.shape[1] > 12
        assert to_png(again) == png
