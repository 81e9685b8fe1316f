"""Settings are checked, arguments compared with what takes them."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tutornet_sb.training.settings import (
    CorpusSettings,
    Settings,
    check_arguments,
    check_values,
    describe_options,
    find_call_faults,
    print_options,
    resolve_experiment,
)
from tutornet_sb.util.composition import (
    read_experiment,
    read_merged,
    tag_of,
)
from tutornet_sb.util.errors import SettingError
from tutornet_sb.util.mappings import nest

HPARAMS = (
    Path(__file__).parents[2] / "recipes" / "LibriSpeech" / "TutorNet/hparams"
)


def is_call(value):
    return tag_of(value) not in (None, "!ref")


def keys_of(model):
    """All fields, and those that must be there."""
    fields = model.model_fields
    return set(fields), {key for key in fields if fields[key].is_required()}


def test_every_value_of_the_recipe_is_checked():
    values = YAML().load(read_experiment(HPARAMS / "base.yaml"))
    plain = {key for key, value in values.items() if not is_call(value)}
    known, required = keys_of(Settings)
    assert required - {"corpus"} <= plain - {"student"} <= known


@pytest.mark.parametrize(
    "path", sorted((HPARAMS / "corpora").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_corpus_has_values_that_are_allowed(path):
    values = read_merged(path)
    known, required = keys_of(CorpusSettings)
    assert required <= values.keys() <= known
    assert check_values(CorpusSettings, values) == []


@pytest.mark.parametrize(
    "key, allowed, refused",
    [
        ("rkd.share", [0, 0.5, 1], [-0.1, 2, True, "1", None]),
        ("weight_decay", [0, 1e30], [float("inf"), float("nan"), [1]]),
        ("lr", [1e-300, 1], [0, -1, "fast"]),
        ("epochs", [1, 10**9], [0, 1.0, True, "1"]),
        ("targets", ["store"], ["c", ["store"], None, {}]),
        ("augmentation.speeds", [[90], [90, 100], None], [[], 1, [0], "12"]),
        ("rkd.projector_hidden", [None, 1], [0, "null"]),
        ("train_csv", [None, "a.csv", ["a.csv"]], ["", [], [1], 3]),
        ("continue_anyway", [True, False], ["yes", 1, None]),
        ("student_overrides", [{}, {"channels": 4}], ["channels", []]),
        ("rkd.pairs", [1, [{"teacher": "a", "student": "b"}]], [0, "a", 1.5]),
        ("stages", [["rkd", "skd"]], [[], ["sdk"], "skd", [["skd"]]]),
    ],
)
def test_what_values_are_allowed(key, allowed, refused):
    for value in allowed:
        assert check_values(Settings, nest({key: value})) == []
    for value in refused:
        (fault,) = check_values(Settings, nest({key: value}))
        assert fault.startswith(key)


@pytest.mark.parametrize(
    "values, fault",
    [
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"lr": 0}, "lr must be a positive number, got 0"),
        ({"epochs": 1.5}, "epochs must be a whole number, got 1.5"),
        (
            {"augmentation.speeds": [0]},
            "augmentation.speeds[0] must be at least 1, got 0",
        ),
        (
            {"skd.loss": "l3"},
            "skd.loss must be 'l2', 'kl' or 'guided', got 'l3'",
        ),
        (
            {"store.posteriors": "top_k"},
            "store.posteriors must be 'fp16' or 'topk', got "
            "'top_k'; did you mean topk?",
        ),
    ],
)
def test_what_a_fault_says(values, fault):
    assert check_values(Settings, nest(values)) == [fault]


def test_the_keys_of_a_corpus():
    corpus = read_merged(HPARAMS / "corpora" / "small.yaml")
    del corpus["vocab_size"]
    corpus["learning_rate"] = 1
    assert check_values(Settings, {"corpus": corpus}, "own.yaml") == [
        "corpus.vocab_size: own.yaml gives no value for it",
        "corpus.learning_rate: own.yaml gives a value that corpus does not "
        + "have; there are: "
        + ", ".join(CorpusSettings.model_fields),
    ]


def test_all_faults_are_found_at_once(tmp_path):
    main = tmp_path / "main.yaml"
    main.write_text(f"extends: {HPARAMS / 'rkd_lstm.yaml'}\nepcohs: 3\nlr: x\n")
    options = {"sede": 1}
    options |= {"seed": -1, "opt_class": {"learning_rate": 3}}
    with pytest.raises(SettingError) as caught:
        resolve_experiment(main, options, HPARAMS.parent)
    starts = [fault.partition(" ")[0] for fault in caught.value.faults]
    assert starts == [
        f"{main}:",
        "--sede:",
        "seed",
        "lr",
        "opt_class.learning_rate:",
    ]
    # Also beside files that cannot be read
    options["student_overrides"] = {"chanels": 3}
    with pytest.raises(SettingError) as caught:
        resolve_experiment(main, options, HPARAMS.parent)
    text = "\n".join(caught.value.faults)
    for part in "'epcohs'", "--sede", "'chanels'", "seed must", "lr must":
        assert part in text


BASE = """extends: [model.yaml, optim.yaml]
# Of this file
teacher:
    # Where it
    # comes from
    source: null
    kind: run
open: {}
recipe_folder: null
call: !new:torch.nn.Linear {in_features: 2, out_features: !ref <size>}
"""


@pytest.fixture
def recipe(tmp_path):
    folder = tmp_path / "hparams"
    folder.mkdir()
    (folder / "base.yaml").write_text(BASE)
    (folder / "model.yaml").write_text("# Units. Many.\nsize: 3\n")
    (folder / "optim.yaml").write_text(
        "# ---- optimiser\n# Lost\n\nlr: !ref <size> / 2\n\n# Home\na: [x]\n"
    )
    return folder / "base.yaml"


def test_options_are_described_by_their_comments(recipe, capsys):
    assert describe_options(recipe) == [
        ("size", "3", "Units. Many."),
        ("lr", "<size> / 2", ""),
        ("a", '["x"]', "Home"),
        ("teacher.source", "null", "Where it comes from"),
        ("teacher.kind", "run", ""),
        ("open", "{}", ""),
        ("recipe_folder", "null", ""),
    ]
    print_options(recipe)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["--size", "Units", "[3]"]
    # Those and --debug
    assert sum(line.startswith("  --") for line in lines) == 8
    known = {name for name, _, _ in describe_options(HPARAMS / "base.yaml")}
    assert {"lr", "stages", "skd.loss"} <= known and "corpus" not in known


def test_parts_of_a_mapping_are_merged_into_it(recipe):
    folder = recipe.parent.parent

    def resolve(**options):
        return YAML().load(resolve_experiment(recipe, options, folder))

    found = resolve(teacher={"source": "me/x"}, open={"any": 1})
    assert found["teacher"] == {"source": "me/x", "kind": "run"}
    assert found["open"] == {"any": 1}
    assert resolve(call={"out_features": 5})["call"]["out_features"] == 5
    for options, fault in (
        ({"teacher": {"sorce": 1}}, "--teacher.sorce: .*did you mean source?"),
        ({"a": {"b": 1}}, "--a must be a single value or a list, got"),
    ):
        with pytest.raises(SettingError, match=fault):
            resolve(**options)


def test_arguments_in_order_and_of_any_name():
    node = YAML().load(
        "a: !new:torch.nn.Sequential\n"
        "    - !new:torch.nn.Linear [2, 3]\n"
        "    - !new:torch.nn.Linear [2, 3, True, cpu, null, 7]\n"
    )
    (fault,) = find_call_faults(node)
    assert re.match(r"a\[1\]: .*too many positional", fault)
    check_arguments(lambda **_: None, {"anything": 1}, "here", "f")
    # Without a signature
    check_arguments(getattr, {"anything": 1}, "here")


def test_a_partial_call_may_leave_arguments_open():
    text = "a: {tag}:torch.nn.Linear {{in_features: 2}}"
    assert not list(find_call_faults(YAML().load(text.format(tag="!name"))))
    (fault,) = find_call_faults(YAML().load(text.format(tag="!new")))
    assert re.search("missing .*'out_features'", fault)


def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import nothing_of_the_kind\n")
    monkeypatch.syspath_prepend(tmp_path)
    node = YAML().load("a: {b: !name:broken_module.Thing {}}")
    (fault,) = find_call_faults(node)
    assert fault.startswith("a.b: broken_module.Thing cannot")
