"""Folders made to harm who loads them: nothing outside is touched by default.

What an export's description may hold is tested in publishing/test_loading.py.
"""

import os
import resource
import shutil
import time

import pytest
import torch
from small_runs import make_speech, write_export
from typer.testing import CliRunner

from tutornet_sb import runs
from tutornet_sb.cli import app
from tutornet_sb.distillation.sources import load_teacher
from tutornet_sb.publishing.loading import load_recogniser

# What loading a small model takes at the most
SECONDS, KILOBYTES = 30, 400_000


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A run and its export."""
    return write_export(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def run(sound, tmp_path):
    return shutil.copytree(sound / "run", tmp_path / "run")


@pytest.fixture
def to(sound, tmp_path):
    return shutil.copytree(sound / "to", tmp_path / "to")


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """What code in a folder would make."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code was run"


class Harm:
    def __reduce__(self):
        return os.system, ("touch canary",)


def save_long_ago(thing, path):
    torch.save(thing, path, _use_new_zipfile_serialization=False)


def call(*arguments):
    return CliRunner().invoke(app, [str(word) for word in arguments])


def speak(folder):
    import soundfile

    path = folder / "speech.wav"
    soundfile.write(path, make_speech(0, 0.5).numpy(), 16000)
    return path


def everything_refuses(folder, match):
    """All that loads a model says one line about it, soon, in little space."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    for load in (load_recogniser, load_teacher):
        with pytest.raises((ValueError, OSError), match=match):
            load(folder)
    commands = [("transcribe", folder, speak(folder.parent))]
    if (folder / runs.MODEL_YAML).exists():
        commands.append(("layers", folder))
    for command in commands:
        result = call(*command)
        assert result.exit_code == 2 and result.stdout == ""
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith(f"tutornet {command[0]}: ")
    assert time.monotonic() - started < SECONDS
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < KILOBYTES


# --------------------------------------------------------------- code in a run


@pytest.mark.parametrize(
    "network",
    [
        "model: !apply:os.system [touch canary]",
        "model: !new:subprocess.Popen [[touch, canary]]",
        "model: !!python/object/apply:os.system [touch canary]",
        "model: !applyref:os.system [touch canary]",
        "model: !include:harm.yaml",
        "model: !new:torch.nn.Sequential\n    - !name:os.system [touch canary]",
        "model: !apply:torch.load {f: model.ckpt, weights_only: False}",
        "model: !ref <harm>\nharm: !apply:os.system [touch canary]",
    ],
)
def test_a_run_with_code_in_its_yaml(run, canary, network):
    (run / runs.MODEL_YAML).write_text(network)
    (run / "harm.yaml").write_text("a: !apply:os.system [touch canary]\n")
    everything_refuses(run, "model.yaml")
    # Nor is there a pickle that runs, of today or of old.
    for save in (torch.save, save_long_ago):
        save(Harm(), run / runs.WEIGHTS)
        everything_refuses(run, "cannot be read as model weights")


def test_code_beside_a_sound_network_of_a_run_is_not_run(run, canary):
    with open(run / runs.MODEL_YAML, "a") as file:
        file.write("harm: !apply:os.system [touch canary]\n")
    assert load_recogniser(run).kind == "run"
    assert load_teacher(run).kind == "run"
    assert call("layers", run).exit_code == 0


def test_a_run_of_other_parts_is_loaded_when_trusted(run, canary):
    path = run / runs.MODEL_YAML
    path.write_text(
        path.read_text()
        .replace("!new:torch.nn.Linear", "!new:torch.nn.LazyLinear")
        .replace("in_features", "# in_features")
    )
    everything_refuses(run, "names torch.nn.LazyLinear.*trust_remote_code")
