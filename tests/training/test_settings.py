"""Rules of values, and arguments compared with what takes them."""

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tutornet_sb.training.settings import (
    CORPUS_RULES,
    RULES,
    check_arguments,
    check_calls,
    check_values,
    maybe,
    number,
    one_of,
    several,
    whole,
)
from tutornet_sb.util.composition import read_experiment, tag_of
from tutornet_sb.util.errors import SettingError

HPARAMS = (
    Path(__file__).parents[2] / "recipes" / "LibriSpeech" / "TutorNet/hparams"
)
# Values that are checked by what they call, or by more than a rule
OTHERS = {"corpus", "student", "pairs", "intermediate"}


def test_every_value_of_the_recipe_has_a_rule():
    values = YAML().load(read_experiment(HPARAMS / "base.yaml"))
    plain = {
        key
        for key, value in values.items()
        if tag_of(value) in (None, "!ref") and key not in OTHERS
    }
    assert plain == RULES.keys()


@pytest.mark.parametrize(
    "path", sorted((HPARAMS / "corpora").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_value_of_a_corpus_has_a_rule_that_allows_it(path):
    values = YAML().load(path.read_text())
    assert values.keys() == CORPUS_RULES.keys()
    check_values(values, CORPUS_RULES)


@pytest.mark.parametrize(
    "rule, allowed, refused",
    [
        (number(low=0, high=1), [0, 0.5, 1], [-0.1, 2, True, "1", None]),
        (number(), [-3, 1e30], [float("inf"), float("nan"), [1]]),
        (whole(1), [1, 10**9], [0, 1.0, True, "1"]),
        (one_of("a", "b"), ["a"], ["c", ["a"], None, {}]),
        (several(whole(1)), [[1], [1, 2]], [[], 1, [0], "12"]),
        (maybe(whole(1)), [None, 1], [0, "null"]),
    ],
)
def test_what_rules_allow(rule, allowed, refused):
    assert all(map(rule.allows, allowed))
    assert not any(map(rule.allows, refused))


@pytest.mark.parametrize("key", ["lr", "temperature", "batch_seconds"])
def test_zero_is_not_above_zero(key):
    check_values({key: 1e-300}, RULES)
    with pytest.raises(SettingError, match=f"{key}: .*above 0, and is 0"):
        check_values({key: 0}, RULES)


def test_arguments_in_order_and_of_any_name():
    node = YAML().load(
        "a: !new:torch.nn.Sequential\n"
        "    - !new:torch.nn.Linear [2, 3]\n"
        "    - !new:torch.nn.Linear [2, 3, True, cpu, null, 7]\n"
    )
    with pytest.raises(SettingError, match=r"^a\[1\]: .*too many positional"):
        check_calls(node)
    check_arguments(lambda **_: None, {"anything": 1}, "here", "f")
    # What tells nothing of its parameters
    check_arguments(getattr, {"anything": 1}, "here")


def test_a_partial_call_may_leave_arguments_open():
    text = "a: {tag}:torch.nn.Linear {{in_features: 2}}"
    check_calls(YAML().load(text.format(tag="!name")))
    with pytest.raises(SettingError, match="missing .*'out_features'"):
        check_calls(YAML().load(text.format(tag="!new")))


def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import nothing_of_the_kind\n")
    monkeypatch.syspath_prepend(tmp_path)
    node = YAML().load("a: {b: !name:broken_module.Thing {}}")
    with pytest.raises(SettingError, match="a.b: broken_module.Thing cannot"):
        check_calls(node)
