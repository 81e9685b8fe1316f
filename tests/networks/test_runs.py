"""The folder of a finished run: what is in it, whole or damaged."""

import csv
from functools import partial

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from tutornet_sb.corpora.tokenizer import train_tokenizer
from tutornet_sb.networks import runs
from tutornet_sb.util import files

MODEL = """
model: !new:tutornet_sb.networks.acoustic_model.AcousticModel
    features: !new:tutornet_sb.networks.acoustic_model.LogMelFeatures
        n_mels: 16
    encoder: !new:tutornet_sb.networks.recurrent.RecurrentEncoder
        input_size: 16
        channels: 4
        hidden_size: {hidden_size}
        layers: 1
    head: !new:torch.nn.Linear
        in_features: {head_size}
        out_features: 29
"""
FILES = runs.MODEL_YAML, runs.WEIGHTS, runs.TOKENIZER, runs.RESULTS


def model_yaml(hidden_size=3):
    return MODEL.format(hidden_size=hidden_size, head_size=2 * hidden_size)


@pytest.fixture
def finished(tmp_path):
    """A run's folder, and the model that was saved in it."""
    folder = tmp_path / "a run"
    folder.mkdir()
    torch.manual_seed(0)
    model = load_hyperpyyaml(model_yaml())["model"].eval()
    # As after training: not the values of a new network.
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor))
    (folder / runs.MODEL_YAML).write_text(model_yaml())
    torch.save(model.state_dict(), folder / runs.WEIGHTS)
    manifest = tmp_path / "train.csv"
    with open(manifest, "w", newline="") as file:
        csv.writer(file).writerows([["ID", "wrd"], ["a", "ONE TWO"]])
    train_tokenizer([manifest], folder / runs.TOKENIZER)
    files.write_json(folder / runs.RESULTS, {"format": 2, "seed": 3})
    return folder, model


def test_a_run_is_finished_when_all_its_files_are_there(finished):
    folder, _ = finished
    assert runs.is_finished(folder)
    assert runs.is_finished(str(folder))


@pytest.mark.parametrize("name", FILES)
def test_a_run_that_lacks_a_file_is_not_finished(finished, name):
    folder, _ = finished
    (folder / name).unlink()
    assert not runs.is_finished(folder)
    with pytest.raises(FileNotFoundError, match="a run holds no finished run"):
        runs.load_run(folder)


def test_no_folder_is_no_finished_run(tmp_path):
    assert not runs.is_finished(tmp_path / "nowhere")
    assert runs.read_results(tmp_path / "nowhere") == {}


def test_a_loaded_model_is_the_saved_one(finished):
    folder, saved = finished
    torch.manual_seed(99)
    model, tokenizer = runs.load_run(folder)
    state = model.state_dict()
    assert state.keys() == saved.state_dict().keys()
    for name, tensor in saved.state_dict().items():
        assert torch.equal(state[name], tensor), name
    wavs, whole = torch.randn(2, 8000), torch.ones(2)
    # In evaluation mode, by default.
    assert torch.equal(model(wavs, whole).logits, saved(wavs, whole).logits)
    assert tokenizer.decode(tokenizer.encode("TWO ONE")) == "TWO ONE"


def test_weights_of_another_size_do_not_fit(finished):
    folder, _ = finished
    (folder / runs.MODEL_YAML).write_text(model_yaml(hidden_size=5))
    with pytest.raises(ValueError, match=r"model\.ckpt"):
        runs.load_run(folder)


@pytest.mark.parametrize("change", ["one less", "one more"])
def test_weights_must_be_all_and_no_others(finished, change):
    folder, model = finished
    state = model.state_dict()
    if change == "one less":
        del state["head.bias"]
    else:
        state["head.extra"] = state["head.bias"]
    torch.save(state, folder / runs.WEIGHTS)
    name = "head.bias" if change == "one less" else "head.extra"
    with pytest.raises(ValueError, match=name):
        runs.load_run(folder)


def test_results_come_back_as_written(tmp_path):
    content = {"format": 2, "name": "Zoë", "splits": {"dev": {"wer": 1 / 3}}}
    files.write_json(tmp_path / runs.RESULTS, content)
    assert runs.read_results(tmp_path) == content
    assert "Zoë" in (tmp_path / runs.RESULTS).read_text(encoding="utf-8")


@pytest.mark.parametrize("damage", [b"", b'{"seed": 1, ', b"\xff\xfe{}"])
def test_a_damaged_result_file_is_named_with_what_to_do(tmp_path, damage):
    (tmp_path / runs.RESULTS).write_bytes(damage)
    with pytest.raises(ValueError, match=r"results\.json is damaged.*delete"):
        runs.read_results(tmp_path)


def test_a_file_is_replaced_in_one_piece(tmp_path):
    path = tmp_path / "new folder" / "file.txt"

    def write(to):
        # Nothing is to be seen under the name before all is written.
        assert not path.exists()
        to.write_text("new")

    files.write_atomically(path, write)
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def half(to):
        to.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, half)
    assert path.read_text() == "old"
    # What the failure left behind does not stand in the way of the next try.
    files.write_atomically(path, lambda to: to.write_text("new"))
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": torch.ones(1)})
    assert files.read_json(path) == {"a": 1}


def test_a_folder_is_replaced_in_one_piece(tmp_path):
    folder = tmp_path / "new" / "folder"

    def write(to, name):
        # What stands under the name is whole at any time.
        assert not folder.exists() or list(folder.iterdir())
        (to / name).write_text(name)

    for name in ("first", "second"):
        files.write_folder_atomically(folder, partial(write, name=name))
        assert [path.name for path in folder.iterdir()] == [name]
    assert folder.stat().st_mode == tmp_path.joinpath("new").stat().st_mode
    assert list(folder.parent.iterdir()) == [folder]


def test_an_interrupted_writer_leaves_the_old_folder(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    files.write_folder_atomically(folder, lambda to: (to / "old").touch())

    def half(to):
        (to / "ne").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_folder_atomically(folder, half)
    assert [path.name for path in folder.iterdir()] == ["old"]

    # Not even where the new one cannot take the place of the old one
    replace = files.os.replace

    def fail(source, target):
        if target == folder and source.name == "folder":
            raise OSError("in use")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="in use"):
        files.write_folder_atomically(folder, lambda to: (to / "new").touch())
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("content", [b"", b"harm", b"\xff" * 999])
def test_a_tokenizer_that_is_none_is_named(finished, content):
    folder, _ = finished
    path = folder / runs.TOKENIZER
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} cannot be read as a token"):
        runs.load_run(folder)


@pytest.mark.parametrize("name", [runs.TOKENIZER, runs.MODEL_YAML])
def test_a_file_without_end_is_not_read(finished, name):
    folder, _ = finished
    with open(folder / name, "r+b") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=f"{name} has .* more than any such"):
        runs.load_run(folder)


def test_results_without_end_are_not_read(finished):
    folder, _ = finished
    with open(folder / runs.RESULTS, "r+b") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="more than any such file"):
        runs.read_results(folder)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("model: [", "is no valid YAML: line 1"),
        ("\0", "is no valid YAML: .*special characters"),
        ("{a: " * 5000, "is nested too deeply"),
        ("", "is not a mapping"),
        ("model: 7", "not one of a network"),
        ("a: 7", "not one of a network"),
        ("model: !new:torch.nn.Linear {in_features: 2}", "out_features"),
        # A thousand million laughs
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(
                f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 9)
            )
            + "model: *a8\n",
            "too many parts",
        ),
        (
            "a0: &a0 {a: x, b: x}\n"
            + "".join(
                f"a{i}: &a{i} {{a: *a{i - 1}, b: *a{i - 1}, c: *a{i - 1}}}\n"
                for i in range(1, 40)
            )
            + "model: *a39\n",
            "too many parts",
        ),
    ],
)
def test_a_description_that_is_none(finished, text, reason):
    folder, _ = finished
    (folder / runs.MODEL_YAML).write_text(text)
    with pytest.raises(ValueError, match=f"model.yaml.*{reason}"):
        runs.load_run(folder)
