"""Pictures hold the data that they are given, and are PNG files."""

from io import BytesIO

import matplotlib.image
import numpy as np
import pytest
import torch

from tutornet_sb.reporting.diagnostics import Example
from tutornet_sb.reporting.plots import (
    frame_weights,
    gains,
    learning_curves,
    pareto,
    pareto_front,
    posterior_spikes,
    to_png,
)


def texts(panel):
    return [(t.get_position()[0], t.get_text()) for t in panel.texts]


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
        "alone": ([1, 2, 3], [10.0, 21.0, 30.0], [90.0, 60.0, 50.0]),
        "taught": ([3, 4], [25.0, 33.0], [40.0, 30.0]),
    }
    figure = learning_curves(curves, "lstm on mini")
    left, right = figure.axes
    for name, (epochs, seconds, wers) in curves.items():
        for panel, x in ((left, epochs), (right, seconds)):
            found = lines(panel)[name]
            assert list(found.get_xdata()) == x
            assert list(found.get_ydata()) == wers
    assert left.get_xlabel().startswith("epochs")
    assert right.get_xlabel().startswith("seconds")
    assert figure.get_suptitle() == "lstm on mini"


def test_no_two_curves_look_alike_without_colour():
    curves = {str(i): ([1, 2], [1, 2], [i, i]) for i in range(8)}
    seen = looks(learning_curves(curves, "").axes[0])
    assert len(set(seen)) == 8
    # Greys alone, as what is written in a shop for copies
    assert all(0 <= float(colour) <= 0.6 for _, _, colour in seen)
    assert len({(line, marker) for line, marker, _ in seen}) == 8


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
    names = [label.get_text() for label in dev.get_yticklabels()]
    assert names == ["a", "b", "c"]

    def drawn(panel):
        """Per row the interval, the point, and whether that is filled."""
        found = {}
        for line in panel.lines:
            x, y = map(list, line.get_data())
            if line.get_marker() == "o":
                filled = line.get_markerfacecolor() == line.get_color()
                found[names[int(y[0])]] += (x[0], filled)
            # Not the line at none, which runs from edge to edge
            elif x[0] != x[-1]:
                found[names[int(y[0])]] = tuple(x)
        return found

    assert drawn(dev) == {
        "a": (20, 55, 40, True),
        "b": (-30, 31, 5, False),
    }
    assert drawn(test) == {
        "b": (-240, -8, -60, True),
        "c": (-1, 1, 0, False),
    }
    # The first on top
    bottom, top = dev.get_ylim()
    assert bottom > top


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


@pytest.fixture
def example():
    """Ten frames of 20 ms, in which two letters are said."""
    teacher = torch.full((10, 3), 0.02)
    teacher[:, 0] = 0.96
    teacher[2] = torch.tensor([0.1, 0.8, 0.1])
    teacher[7] = torch.tensor([0.2, 0.1, 0.7])
    # Half as many frames, and a run of two
    student = torch.tensor(
        [[0.9, 0.1, 0], [0.4, 0.6, 0], [0.1, 0.9, 0], [0.9, 0, 0.1], [0, 0, 1]]
    )
    return Example(
        text="A",
        features=torch.arange(60.0).view(20, 3),
        feature_period=0.01,
        symbols=[(0.04, "▁"), (0.14, "A")],
        weights={
            "uniform": torch.full((10,), 0.1),
            "energy": torch.arange(10) / 45,
            "nonblank": 1 - teacher[:, 0],
        },
        period=0.02,
        posteriors={"teacher": (teacher, 0.02), "student": (student, 0.04)},
        pieces=["<blank>", "▁", "A"],
        blank_index=0,
    )


def test_weights_lie_over_the_spectrogram(example):
    figure = frame_weights(example, "a teacher")
    spectrogram, transcript, over = figure.axes
    (image,) = spectrogram.images
    assert np.array_equal(image.get_array(), np.asarray(example.features).T)
    assert list(image.get_extent()) == pytest.approx([0, 0.2, 0, 3])
    for name, weights in example.weights.items():
        found = lines(over)[name]
        assert found.get_xdata() == pytest.approx(np.arange(10) * 0.02)
        assert found.get_ydata() == pytest.approx(np.asarray(weights) * 10)
    assert len({line.get_linestyle() for line in over.lines}) == 3
    assert texts(transcript) == [(0.04, "_"), (0.14, "A")]


def test_spikes_of_all_models_stand_above_each_other(example):
    figure = posterior_spikes(example, "an utterance")
    teacher, student, transcript = figure.axes
    assert texts(teacher) == [(0.04, "_"), (0.14, "A")]
    # The likeliest frame of a run
    assert texts(student) == [(0.08, "_"), (0.16, "A")]
    assert texts(transcript) == [(0.04, "_"), (0.14, "A")]
    for panel, (posteriors, period) in zip(
        (teacher, student), example.posteriors.values(), strict=True
    ):
        blank, letters = panel.lines
        assert blank.get_ydata() == pytest.approx(np.asarray(posteriors[:, 0]))
        assert letters.get_ydata() == pytest.approx(
            np.asarray(posteriors[:, 1:].max(1).values)
        )
        assert blank.get_xdata() == pytest.approx(
            np.arange(len(posteriors)) * period
        )
        assert blank.get_linestyle() != letters.get_linestyle()
    assert (teacher.get_ylabel(), student.get_ylabel()) == (
        "teacher",
        "student",
    )


def test_symbols_do_not_lie_on_each_other(example):
    crowd = example._replace(
        symbols=[(0.1, "A"), (0.1, "B"), (0.101, "C"), (0.15, "D")]
    )
    written = texts(frame_weights(crowd, "").axes[1])
    assert [symbol for _, symbol in written] == list("ABCD")
    times = np.array([time for time, _ in written])
    # A letter is a hundredth of the picture wide.
    assert np.diff(times).min() > 0.002
    assert times[0] == 0.1 and times[3] == 0.15


def test_pictures_are_png_files(example):
    def draw():
        yield learning_curves({"a": ([1, 2], [3, 4], [50, 40])}, "t")
        yield pareto({"a": (1, 2, 3)}, "t")
        yield frame_weights(example, "t")
        yield posterior_spikes(example, "t")

    for figure, again in zip(draw(), draw(), strict=True):
        png = to_png(figure)
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        image = matplotlib.image.imread(BytesIO(png), format="png")
        assert image.shape[0] > 200 and image.shape[1] > 500
        # Something is drawn, and nothing in colour.
        assert image[..., :3].min() < 0.2
        assert np.ptp(image[..., :3], axis=2).max() < 1e-6
        assert to_png(again) == png
