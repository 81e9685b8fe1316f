"""Checkpoints: whole or not at all, and all that a training needs."""

import logging
import random
import resource

import numpy
import pytest
import torch
import yaml
from speechbrain.utils.epoch_loop import EpochCounter

from tutornet_sb.training.checkpoints import (
    AtomicCheckpointer,
    RandomState,
    RunningMeans,
)
from tutornet_sb.util.errors import explain


def make(folder):
    """A checkpointer, and a module whose weights tell the checkpoint."""
    module = torch.nn.Linear(100, 100)
    counter = EpochCounter(9)
    return module, AtomicCheckpointer(
        folder, {"module": module, "counter": counter}
    )


def save(folder, *values):
    """Save a checkpoint for each value, and return their folders."""
    module, checkpointer = make(folder)
    saved = []
    for number, value in enumerate(values):
        module.weight.data.fill_(value)
        saved.append(checkpointer.save_checkpoint({"unixtime": number}).path)
    return saved


def recover(folder):
    """The value of the checkpoint that is gone on from, None without one."""
    module, checkpointer = make(folder)
    if checkpointer.recover_if_possible() is None:
        return None
    assert len(module.weight.unique()) == 1
    return module.weight[0, 0].item()


def test_the_newest_of_sound_checkpoints_is_loaded(tmp_path):
    save(tmp_path, 1.0, 2.0)
    assert recover(tmp_path) == 2.0
    assert len(list(tmp_path.iterdir())) == 2


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "parameters cut short": ("module.ckpt", cut, "module.ckpt is not"),
    "a bit of the parameters": ("module.ckpt", flip, "module.ckpt is not"),
    "no parameters": (
        "module.ckpt",
        lambda path: path.unlink(),
        "module.ckpt is missing",
    ),
    "another number": (
        "counter.ckpt",
        lambda path: path.write_text("7"),
        "counter.ckpt is not",
    ),
    "an empty description": (
        "CKPT.yaml",
        lambda path: path.write_text(""),
        "CKPT.yaml is not",
    ),
    "half a description": ("CKPT.yaml", cut, "CKPT.yaml is not"),
    "no YAML": (
        "CKPT.yaml",
        lambda path: path.write_bytes(b"\xff: [\x00"),
        "CKPT.yaml is not",
    ),
    "no checksums": (
        "CKPT.yaml",
        lambda path: path.write_text("{end-of-epoch: true, unixtime: 9}"),
        "CKPT.yaml is not",
    ),
    "odd checksums": (
        "CKPT.yaml",
        lambda path: path.write_text("{unixtime: 9, files: {module.ckpt: 3}}"),
        "module.ckpt is not",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path, kind, caplog
):
    name, damage, reason = DAMAGES[kind]
    before, newest = save(tmp_path, 1.0, 2.0)
    damage(newest / name)
    with caplog.at_level(logging.WARNING):
        assert recover(tmp_path) == 1.0
    assert f"{newest} is damaged ({reason}" in caplog.text
    assert before.is_dir() and not newest.exists()
    # Nothing is thrown away, and it is told once.
    assert (tmp_path / f"DAMAGED+{newest.name}").is_dir()
    caplog.clear()
    assert recover(tmp_path) == 1.0
    assert "is damaged" not in caplog.text


def test_without_a_sound_checkpoint_training_begins_anew(tmp_path):
    (path,) = save(tmp_path, 1.0)
    cut(path / "module.ckpt")
    assert recover(tmp_path) is None


def test_what_a_killed_process_was_saving_is_removed(tmp_path):
    _, newest = save(tmp_path, 1.0, 2.0)
    # As it looks until the last moment
    (newest / "CKPT.yaml").rename(newest / "CKPT.unfinished")
    assert recover(tmp_path) == 1.0
    assert not newest.exists()


@pytest.fixture
def full_disk():
    """No file may become longer than 20 kB, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_what_was_saved_before(tmp_path, request):
    (before,) = save(tmp_path, 1.0)
    request.getfixturevalue("full_disk")
    with pytest.raises((OSError, RuntimeError)) as caught:
        save(tmp_path, 2.0)
    line, code = explain(caught.value)
    assert "What was saved before stays: make room" in line and code == 2
    assert [*tmp_path.iterdir()] == [before]
    assert recover(tmp_path) == 1.0


def test_the_description_says_what_speechbrain_wants(tmp_path):
    (path,) = save(tmp_path, 1.0)
    told = yaml.safe_load((path / "CKPT.yaml").read_text())
    assert told["end-of-epoch"] is True and told["unixtime"] == 0
    assert told["files"].keys() == {"module.ckpt", "counter.ckpt"}
    size = (path / "module.ckpt").stat().st_size
    assert told["files"]["module.ckpt"]["bytes"] == size


def test_the_list_of_what_to_keep_does_not_grow(tmp_path):
    _, checkpointer = make(tmp_path)
    orders = []
    delete = checkpointer.delete_checkpoints
    checkpointer.delete_checkpoints = lambda **options: (
        orders.append(len(options["importance_keys"])),
        delete(**options),
    )
    for _ in range(3):
        checkpointer.save_and_keep_only()
    assert orders == [1, 1, 1]


def draw():
    """Next numbers of all generators."""
    return (
        random.random(),
        numpy.random.rand(3).tolist(),
        torch.rand(3).tolist(),
        torch.randint(9, (5,)).tolist(),
    )


def test_random_numbers_go_on_where_they_were(tmp_path):
    state = RandomState("cpu")
    draw()
    # Half of a pair of normal numbers is kept for the next call.
    numpy.random.randn()
    state._save(tmp_path / "state")
    wanted = draw(), numpy.random.randn()
    draw()
    state._load(tmp_path / "state")
    assert (draw(), numpy.random.randn()) == wanted


def test_means_go_on_where_they_were(tmp_path):
    means, other = RunningMeans(), RunningMeans()
    for value in (1.0, 2.0):
        means.add("a", torch.tensor(value, requires_grad=True))
    means._save(tmp_path / "means")
    other._load(tmp_path / "means")
    other.add("a", torch.tensor(6.0))
    other.add("b", torch.tensor(1.0))
    assert other.values() == {"a": 3.0, "b": 1.0}
