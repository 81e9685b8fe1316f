"""A little of benchmarks/fuzz.py, and that it tells every kind of crash."""

import importlib.util
import os
import signal
import time
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"
spec = importlib.util.spec_from_file_location("fuzz", FILE)
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)


def test_two_thousand_files_are_refused_or_read_as_they_are():
    figures, crashes = fuzz.fuzz(2000)
    assert crashes == []
    assert sum(row["inputs"] for row in figures.values()) >= 2000
    assert sum(row["equal"] + row["other"] for row in figures.values()) > 100
    for row in figures.values():
        assert row["refused"] > 0
        assert sum(row[name] for name in fuzz.CRASHES) == 0


class Reader(fuzz.Target):
    """Input 3 is the end of it, one way or another."""

    def __init__(self, folder, how):
        self.folder, self.how = folder, how

    def read(self, generator):
        first = generator.random()
        if first == self.how[1]:
            self.how[0]()
        if first < 0.5:
            raise ValueError(f"{self.folder} is damaged")
        return "equal"


def take_memory():
    b"x" * (2 * fuzz.TOO_MUCH)


def complain_of_nothing():
    raise ValueError("damaged")


def divide():
    raise ZeroDivisionError("by nothing")


def mislead():
    raise fuzz.WrongData("not what was written")


@pytest.mark.parametrize(
    "harm, outcome, said",
    [
        (divide, "error", "ZeroDivisionError: by nothing (test_fuzz.py:"),
        (complain_of_nothing, "error", "ValueError: damaged"),
        (mislead, "error", "WrongData: not what was written"),
        (take_memory, "memory", "MiB"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "ended", "code -9"),
        (lambda: time.sleep(60), "hung", "exit code -9"),
    ],
)
def test_every_kind_of_crash_is_told(
    tmp_path, monkeypatch, harm, outcome, said
):
    if outcome == "hung":
        monkeypatch.setattr(fuzz, "WAIT", 0.1)
    third = fuzz.draw(Reader, 0, 3).random()
    counts, crashes = fuzz.fuzz_target(Reader(tmp_path, (harm, third)), 20)
    assert sum(counts.values()) == 20
    assert counts[outcome] == 1
    assert counts["refused"] > 3 and counts["equal"] > 3
    ((name, index, how, reason),) = crashes
    assert (name, index, how) == ("reader", 3, outcome)
    assert said in reason
