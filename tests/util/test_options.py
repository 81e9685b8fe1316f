"""Values of a command line are those that were typed."""

import pytest

from tutornet_sb.experiments.plan import Job
from tutornet_sb.util.errors import SettingError
from tutornet_sb.util.mappings import nest
from tutornet_sb.util.options import Options, read_options, read_value

# What a shell hands over, and what it is
VALUES = {
    "runs/lr=1": "runs/lr=1",
    "run #2": "run #2",
    "#1=a": "#1=a",
    "a=b=c": "a=b=c",
    "note: done": "note: done",
    "2026-11-28": "2026-11-28",
    "*": "*",
    "3": 3,
    "3 #4": "3 #4",
    "1e-3": 0.001,
    "-0.5": -0.5,
    "True": True,
    "null": None,
    "": None,
    '"3"': "3",
    "[rkd, ctc]": ["rkd", "ctc"],
    "{name: run#2, lr: 1, to: a=b}": {"name": "run#2", "lr": 1, "to": "a=b"},
    "{a: {'b #1': [x, \"y #3\"]}}": {"a": {"b #1": ["x", "y #3"]}},
}


@pytest.mark.parametrize("typed, wanted", VALUES.items(), ids=list(VALUES))
def test_a_value_is_as_it_was_typed(typed, wanted):
    for words in ([f"--key={typed}"], ["--key", typed]):
        more = ["--other", "1"]
        file, _, left = Options.from_command_line_args(
            ["main.yaml", "--device=cpu", *words, *more]
        )
        found = read_options(left)
        assert (file, found) == ("main.yaml", {"key": wanted, "other": 1})
        assert isinstance(found["key"], type(wanted))


def test_a_tag_stays():
    value = read_value("!ref <lr>")
    assert (value.tag.value, value.value) == ("!ref", "<lr>")


def test_dotted_names_are_parts_of_mappings():
    words = ["--a.b=1", "--a.c.d", "x", "--e={f: 2}", "--e.g", "3"]
    wanted = {"a": {"b": 1, "c": {"d": "x"}}, "e": {"f": 2, "g": 3}}
    assert nest(read_options(words)) == wanted


@pytest.mark.parametrize(
    "words, said",
    [
        (["--a.b=1", "--a=2"], "--a: two options give it a value"),
        (["--a=1", "--a.b=2"], "--a.b: two options give it a value"),
        (["--a=1", "--a", "2"], "--a: give each option once"),
        (["a", "--b", "1"], "a: options begin with --"),
        (["--a", "{b: 1"], "--a: {b: 1: .*quote a value"),
        (["--a", "{b: run #2}"], "--a: .*quote a value that has .*#"),
        (["--a", "[b"], "--a: "),
    ],
)
def test_what_makes_no_option(words, said):
    with pytest.raises(SettingError, match=said):
        nest(read_options(words))


@pytest.mark.parametrize(
    "value", ["run #2", "a=b", "1", "[x", "{x", "null", "0.5", 3, None, [1]]
)
def test_a_plan_hands_on_what_it_says(value):
    options = {"key": value, "overrides": {"name": value}}
    words = Job("folder", "main.yaml", options, 1).command()
    assert read_options(words[4:]) == options
