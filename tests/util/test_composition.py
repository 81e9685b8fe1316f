"""Experiments put together from files, and the files of the recipe."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML
from speechbrain.utils.run_opts import RunOptions

from tutornet_sb.networks.acoustic_model import AcousticModel
from tutornet_sb.util.composition import include, is_mapping, read_experiment

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "LibriSpeech" / "TutorNet"
HPARAMS = RECIPE / "hparams"
MAIN_FILES = sorted(
    path
    for path in HPARAMS.glob("*.yaml")
    if "extends" in path.read_text()
    and path.name not in ("base.yaml", "teacher.yaml")
)
MODELS = sorted((HPARAMS / "models").glob("*.yaml"))
CORPORA = sorted((HPARAMS / "corpora").glob("*.yaml"))
# SpeechBrain's networks that run once to find their shapes need real tensors.
RUN_ONCE = ("contextnet", "crdnn")
STANDARD_SPLITS = {
    "train-clean-100",
    "train-clean-360",
    "train-other-500",
    "dev-clean",
    "dev-other",
    "test-clean",
    "test-other",
}


def named(path):
    return path.stem


def plain(path):
    return YAML(typ="rt").load(path.read_text())


def merged(path):
    return YAML(typ="rt").load(read_experiment(path))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ------------------------------------------------------------ read_experiment


def test_a_chain_of_files_is_merged_and_the_nearest_value_wins(tmp_path):
    write(tmp_path / "base.yaml", "a: 1\nb: 1\nc: 1\nd: !ref <c>\n")
    write(tmp_path / "middle.yaml", "extends: base.yaml\nb: 2\nc: 2\n")
    top = write(
        tmp_path / "top.yaml", "extends: middle.yaml\nc: 3\ne: 4\na: !ref <e>\n"
    )
    values = load_hyperpyyaml(read_experiment(top))
    assert values == {"a": 4, "b": 2, "c": 3, "d": 3, "e": 4}


def test_of_several_files_the_later_win_and_the_own_keys_over_all(tmp_path):
    write(tmp_path / "data.yaml", "a: 1\nb: 1\nc: 1\n")
    write(tmp_path / "optim.yaml", "extends: data.yaml\nb: 2\nc: !ref <d>\n")
    write(tmp_path / "base.yaml", "extends: [data.yaml, optim.yaml]\nd: 4\n")
    top = write(tmp_path / "top.yaml", "extends: base.yaml\nd: 5\n")
    values = load_hyperpyyaml(read_experiment(top))
    assert values == {"a": 1, "b": 2, "c": 5, "d": 5}
    write(tmp_path / "data.yaml", "extends: [top.yaml]\n")
    with pytest.raises(ValueError, match=r"extends .*top.yaml, which extends"):
        read_experiment(top)


def test_a_base_lies_beside_the_file_that_extends_it(tmp_path):
    write(tmp_path / "deep" / "base.yaml", "a: 1\n")
    write(tmp_path / "deep" / "middle.yaml", "extends: base.yaml\na: 2\n")
    top = write(tmp_path / "top.yaml", "extends: deep/middle.yaml\n")
    assert load_hyperpyyaml(read_experiment(top)) == {"a": 2}


def test_mappings_are_merged_and_other_values_replaced(tmp_path):
    base = "box: {a: 1, b: {x: 1}}\nlist: [1, 2, 3]\ncall: !name:dict {a: 1}\n"
    write(tmp_path / "base.yaml", base)
    top = write(
        tmp_path / "top.yaml",
        "extends: base.yaml\nbox: {c: 3, b: {y: 2}}\nlist: [4]\n"
        "call: !name:dict {b: 2}\n",
    )
    values = load_hyperpyyaml(read_experiment(top))
    assert values["box"] == {"a": 1, "b": {"x": 1, "y": 2}, "c": 3}
    assert values["list"] == [4] and values["call"]() == {"b": 2}


def test_tags_and_references_survive_the_merge(tmp_path):
    write(
        tmp_path / "base.yaml",
        "size: 2\n"
        "layer: !new:torch.nn.Linear\n"
        "    in_features: !ref <size>\n"
        "    out_features: !ref <size> * 2\n"
        "same: !ref <layer>\n"
        "make: !name:torch.optim.AdamW\n"
        "    lr: 0.5\n",
    )
    top = write(tmp_path / "top.yaml", "extends: base.yaml\nsize: 3\n")
    values = load_hyperpyyaml(read_experiment(top))
    assert values["layer"].weight.shape == (6, 3)
    assert values["same"] is values["layer"]
    optimizer = values["make"](values["layer"].parameters())
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_overrides_reach_the_values_of_the_base(tmp_path):
    write(tmp_path / "base.yaml", "a: 1\nb: !ref <a> * 10\n")
    top = write(tmp_path / "top.yaml", "extends: base.yaml\n")
    values = load_hyperpyyaml(read_experiment(top), {"a": 7})
    assert values == {"a": 7, "b": 70}


def test_a_missing_base_is_named_with_the_file_that_wants_it(tmp_path):
    top = write(tmp_path / "top.yaml", "extends: bse.yaml\n")
    with pytest.raises(FileNotFoundError, match=r"top\.yaml .*bse\.yaml"):
        read_experiment(top)


def test_a_missing_experiment_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"rkd_lsmt\.yaml"):
        read_experiment(tmp_path / "rkd_lsmt.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "words\n", "", "# nothing\n"])
def test_a_file_that_is_no_mapping_is_named(tmp_path, text):
    bad = write(tmp_path / "bad.yaml", text)
    with pytest.raises(ValueError, match=r"bad\.yaml is not a mapping"):
        read_experiment(bad)
    top = write(tmp_path / "top.yaml", "extends: bad.yaml\na: 1\n")
    with pytest.raises(ValueError, match=r"bad\.yaml is not a mapping"):
        read_experiment(top)


# -------------------------------------------------------------------- include

NETWORK = """
width: 8
depth: 3
shape: {a: 1, b: 2}
blocks: [1, 2, 3]
double: !ref <width> * 2
small:
    width: 4
    blocks: [9]
"""


@pytest.fixture
def network(tmp_path):
    return write(tmp_path / "network.yaml", NETWORK)


def test_the_full_size_is_what_stands_at_the_top(network):
    content = include(network, ".")
    assert (content["width"], content["depth"]) == (8, 3)
    assert content["double"] == 16
    assert list(content["blocks"]) == [1, 2, 3]


def test_a_size_replaces_its_values_and_what_refers_to_them(network):
    content = include(network, ".", "small")
    assert (content["width"], content["depth"]) == (4, 3)
    assert content["double"] == 8
    assert list(content["blocks"]) == [9]


def test_overrides_win_over_the_size_and_fixed_values_over_both(network):
    content = include(network, ".", "small", {"width": 5, "depth": 6}, depth=7)
    assert (content["width"], content["depth"], content["double"]) == (5, 7, 10)


def test_an_overridden_mapping_is_replaced_not_merged(network):
    content = include(network, ".", overrides={"shape": {"c": 3}})
    assert dict(content["shape"]) == {"c": 3}


def test_the_file_itself_stays_as_it_is(network):
    include(network, ".", "small", {"depth": 9})
    assert network.read_text() == NETWORK


def test_a_network_may_extend_another(network, tmp_path):
    write(tmp_path / "deep" / "a.yaml", "extends: ../network.yaml\nwidth: 6\n")
    top = write(tmp_path / "top.yaml", "extends: deep/a.yaml\nblocks: [7]\n")
    content = include(top, ".")
    assert "extends" not in content
    assert (content["width"], content["depth"]) == (6, 3)
    assert content["double"] == 12
    assert list(content["blocks"]) == [7]
    # The sizes are those of the base, and still win.
    content = include(top, ".", "small", depth=5)
    assert (content["width"], content["double"]) == (4, 8)
    assert (content["depth"], list(content["blocks"])) == (5, [9])
    # The file's own values of a size are merged into it.
    top.write_text("extends: deep/a.yaml\nsmall: {width: 3}\n")
    content = include(top, ".", "small")
    assert (content["width"], list(content["blocks"])) == (3, [9])


def test_a_network_that_extends_what_it_cannot_is_named(tmp_path):
    top = write(tmp_path / "top.yaml", "extends: bse.yaml\na: 1\n")
    with pytest.raises(FileNotFoundError, match=r"top\.yaml .*bse\.yaml"):
        include(top, ".")
    write(tmp_path / "bse.yaml", "extends: top.yaml\n")
    with pytest.raises(ValueError, match=r"bse\.yaml.*top\.yaml"):
        include(top, ".")


# `depth` is in the file but is no size.
@pytest.mark.parametrize("size", ["smal", "depth"])
def test_an_unknown_size_is_named(network, size):
    with pytest.raises(ValueError, match=rf"network\.yaml.*size '{size}'"):
        include(network, ".", size)


def test_an_unknown_override_is_named_with_what_there_is(network):
    with pytest.raises(ValueError, match=r"network\.yaml.*'widht'.*width"):
        include(network, ".", overrides={"widht": 3})
    with pytest.raises(ValueError, match=r"network\.yaml.*'output_size'"):
        include(network, ".", output_size=29)


def test_an_unknown_key_in_a_size_is_named(tmp_path):
    file = write(tmp_path / "n.yaml", "width: 1\nsmall: {widht: 2}\n")
    with pytest.raises(ValueError, match=r"n\.yaml.*'widht'"):
        include(file, ".", "small")


def test_the_working_folder_comes_before_the_recipe(tmp_path, monkeypatch):
    here, recipe = tmp_path / "here", tmp_path / "recipe"
    write(recipe / "models" / "a.yaml", "from: recipe\n")
    here.mkdir()
    monkeypatch.chdir(here)
    assert include("models/a.yaml", recipe)["from"] == "recipe"
    write(here / "models" / "a.yaml", "from: here\n")
    assert include("models/a.yaml", recipe)["from"] == "here"


def test_a_file_in_neither_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"recipe/models/lsmt\.yaml"):
        include("models/lsmt.yaml", tmp_path / "recipe")


def test_an_object_referred_to_twice_stays_one_object(tmp_path):
    file = write(
        tmp_path / "n.yaml",
        "size: 2\n"
        "layer: !new:torch.nn.Linear\n"
        "    in_features: !ref <size>\n"
        "    out_features: !ref <size>\n"
        "model: !new:torch.nn.Sequential\n"
        "    - !ref <layer>\n"
        "    - !ref <layer>\n",
    )
    text = (
        "net: !applyref:tutornet_sb.util.composition.include\n"
        f"    path: {file}\n"
        "    folder: .\n"
        "    overrides: {size: 3}\n"
        "again: !ref <net[model]>\n"
        "other: !ref <net[layer]>\n"
    )
    values = load_hyperpyyaml(text)
    model, layer = values["net"]["model"], values["net"]["layer"]
    assert layer.weight.shape == (3, 3)
    assert model[0] is model[1] is layer
    assert values["again"] is model and values["other"] is layer


# ------------------------------------------------------- the recipe's own YAML


def device_for(network):
    """Device to build a network of any size on: without memory, if it can."""
    return torch.device("cpu" if network.stem in RUN_ONCE else "meta")


def load(path, device="meta", **overrides):
    overrides["recipe_folder"] = str(RECIPE)
    with torch.device(device):
        return load_hyperpyyaml(read_experiment(path), overrides)


def test_there_is_an_experiment_for_each_method():
    names = {path.name for path in MAIN_FILES}
    assert {"ctc_lstm.yaml", "skd_lstm.yaml", "rkd_lstm.yaml"} <= names
    assert any(name.startswith("teacher_") for name in names)


@pytest.mark.parametrize(
    "path, corpus",
    [(path, HPARAMS / "corpora" / "mini.yaml") for path in MAIN_FILES]
    + [(HPARAMS / "rkd_lstm.yaml", corpus) for corpus in CORPORA],
    ids=named,
)
def test_every_experiment_and_every_corpus_load(
    path, corpus, monkeypatch, tmp_path
):
    monkeypatch.chdir("/")
    said = merged(corpus)
    own, count = {}, said["vocab_size"]
    if count is None:
        table = tmp_path / "train.csv"
        table.write_text("path,text\n1.wav,größer\n", encoding="utf-8")
        own, count = {"train_csv": str(table)}, len("größe") + 2
    hparams = load(path, corpus_yaml=f"hparams/corpora/{corpus.name}", **own)
    assert hparams["corpus"]["name"] == said["name"]
    student = hparams["student"]
    assert isinstance(student["model"], AcousticModel)
    assert student["model"].head.out_features == count
    is_teacher = path.name.startswith("teacher_")
    assert (
        hparams["epochs"] == said["teacher_epochs" if is_teacher else "epochs"]
    )
    if is_teacher:
        assert path.stem in hparams["output_folder"]


@pytest.mark.parametrize("model", MODELS, ids=named)
def test_a_teacher_is_where_the_students_look_for_it(model):
    name = plain(model)["name"]
    assert name == model.stem
    teacher = load(
        HPARAMS / "teacher.yaml",
        device=device_for(model),
        student_yaml=f"hparams/models/{model.name}",
    )
    # As train.py's own default.
    assert Path(teacher["output_folder"]).parent.name == f"teacher_{name}"


@pytest.mark.parametrize("path", MAIN_FILES, ids=named)
def test_every_experiment_names_a_student_that_exists(path):
    content = YAML().load(read_experiment(path))
    assert (RECIPE / content["student_yaml"]).is_file()


def test_two_experiments_of_a_corpus_never_share_a_folder():
    folders = [load(path)["output_folder"] for path in MAIN_FILES]
    assert len(set(folders)) == len(folders)


def test_the_baseline_of_an_experiment_is_where_ctc_puts_it():
    alone = load(HPARAMS / "ctc_lstm.yaml", seed=5)
    taught = load(HPARAMS / "rkd_lstm.yaml", seed=5)
    assert taught["baseline_folder"] == alone["output_folder"]


def test_corpora_differ_in_values_not_in_keys():
    keys = {path.name: set(merged(path)) for path in CORPORA}
    assert len(set(map(frozenset, keys.values()))) == 1, keys


@pytest.mark.parametrize("path", CORPORA, ids=named)
def test_every_corpus_names_what_there_is(path):
    corpus = merged(path)
    assert corpus["name"] == path.stem
    for kind, prefix in {"train": "train", "valid": "dev"}.items():
        splits = corpus[f"{kind}_splits"] or []
        assert all(split.startswith(prefix) for split in splits)
        assert set(splits) <= STANDARD_SPLITS
    assert set(corpus["test_splits"] or []) <= STANDARD_SPLITS
    size = corpus["model_size"]
    for model in MODELS:
        assert size == "full" or size in merged(model), model


def read_code():
    """What uses the settings: train.py and the stages."""
    training = sorted((ROOT / "tutornet_sb" / "training").glob("*.py"))
    return "\n".join(
        path.read_text() for path in [RECIPE / "train.py", *training]
    )


def test_every_key_of_the_base_is_used():
    code = read_code()
    yaml = "\n".join(path.read_text() for path in HPARAMS.rglob("*.yaml"))
    options = {field.name for field in fields(RunOptions)}

    def is_used(key):
        group, _, name = key.partition(".")
        return (
            re.search(rf'"{name or group}"(,|\)|\])', code)
            or re.search(rf"hparams\.{key}\b", code)
            or f"<{group}[{name}]>" in yaml
            or f"<{key}>" in yaml
            or f"<{key}[" in yaml
            # All of them are the searcher's.
            or group == "decoding"
            or key in options
        )

    base = merged(HPARAMS / "base.yaml")
    assert len(base) <= 50
    keys = [key for key in base if key[:2] != "__"]
    keys += [f"{k}.{n}" for k in keys if is_mapping(base[k]) for n in base[k]]
    assert {"lr", "skd", "skd.loss"} <= set(keys)
    assert [key for key in keys if not is_used(key)] == []


def test_the_keys_of_a_corpus_are_used():
    code = read_code()
    # f"{kind}_splits"
    kinds = {"train_splits", "valid_splits", "test_splits"}
    yaml = "".join(path.read_text() for path in HPARAMS.glob("*.yaml"))
    for key in set(merged(CORPORA[0])) - kinds:
        assert f'corpus["{key}"]' in code or f"corpus[{key}]" in yaml, key
