"""Folders made to harm who loads them: nothing outside is touched by default.

What an export's description may hold is tested in publishing/test_loading.py.
"""

import copy
import io
import json
import os
import re
import resource
import shutil
import time
import zipfile
from contextlib import contextmanager

import onnx
import pytest
import torch
from small_runs import make_speech, write_export
from typer.testing import CliRunner

from tutornet_sb.cli import app
from tutornet_sb.corpora.tokenizer import pieces
from tutornet_sb.inference.recogniser import load_recogniser
from tutornet_sb.networks import runs
from tutornet_sb.networks.export_folder import SAFETENSORS
from tutornet_sb.publishing.onnx import write_onnx
from tutornet_sb.teachers.sources import load_teacher

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


@contextmanager
def soon_and_in_little_space():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    yield
    assert time.monotonic() - started < SECONDS
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < KILOBYTES


def refuses(match, *command):
    """A command says one line about it."""
    result = call(*command)
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"tutornet {command[0]}: ")
    assert re.search(match, line), line


def everything_refuses(folder, match):
    """All that loads a model says one line about it, soon, in little space."""
    with soon_and_in_little_space():
        for load in (load_recogniser, load_teacher):
            with pytest.raises((ValueError, OSError), match=match):
                load(folder)
        refuses(match, "transcribe", folder, speak(folder.parent))
        if (folder / runs.MODEL_YAML).exists():
            refuses(match, "layers", folder)


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


# ------------------------------------------------------- files that are no such


def same_place_twice(archive, name, content):
    """Two names in the directory for one place."""
    archive.writestr(name, content)
    again = copy.copy(archive.getinfo(name))
    again.filename = again.orig_filename = f"{name}0"
    archive.filelist.append(again)


def one_within_another(archive, name, content, depth=1):
    """Entries that hold all which follow, headers and all; the last is real."""
    held, infos = content, []
    for level in range(depth + 1):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as alone:
            alone.writestr(f"{name}0{level}" if level else name, held)
            (info,), end = alone.infolist(), alone.start_dir
        for inner in infos:
            inner.header_offset += end - len(held)
        infos.append(info)
        held = file.getvalue()[:end]
    start = archive.fp.tell()
    archive.fp.write(held)
    archive.start_dir = archive.fp.tell()
    for info in infos:
        info.header_offset += start
        archive.filelist.append(info)


def thousands_within_one_another(archive, name, content):
    one_within_another(archive, name, content, depth=1000)


@pytest.mark.parametrize(
    "add, match",
    [
        (same_place_twice, "its entries overlap"),
        (one_within_another, "its entries overlap"),
        (thousands_within_one_another, "packed as torch.save never does"),
    ],
)
def test_a_checkpoint_whose_entries_overlap(run, add, match):
    path = run / runs.WEIGHTS
    with zipfile.ZipFile(path) as archive:
        contents = {info: archive.read(info) for info in archive.infolist()}
    largest = max(contents, key=lambda info: info.file_size).filename
    with zipfile.ZipFile(path, "w") as archive:
        for info, content in contents.items():
            if info.filename == largest:
                add(archive, largest, content)
            else:
                archive.writestr(info.filename, content)
        # Within what all entries may have in sum
        archive.comment = bytes(60_000)
    # It is an archive that torch reads.
    assert isinstance(torch.load(path), dict)
    everything_refuses(run, match)


def claim(length):
    """Let a header of safetensors say that it is so long."""
    return lambda content: length.to_bytes(8, "little") + content[8:]


def claim_weights(size):
    """Let a header of safetensors say that the weights take so many bytes."""

    def change(content):
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        last = max(
            (value for key, value in header.items() if key[0] != "_"),
            key=lambda value: value["data_offsets"],
        )
        last["shape"] = [size // 4]
        last["data_offsets"][1] = last["data_offsets"][0] + size
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(claim(length) for length in (0, 10**5, 2**27, 2**40, 2**64 - 1)),
        *(claim_weights(size) for size in (2**20, 2**40, 2**62)),
        lambda content: content[:7],
    ],
)
def test_safetensors_that_claim_to_be_longer(to, change):
    path = to / SAFETENSORS
    path.write_bytes(change(path.read_bytes()))
    with soon_and_in_little_space():
        refuses(SAFETENSORS, "transcribe", to, speak(to.parent))


@pytest.fixture(scope="module")
def graph(sound, tmp_path_factory):
    """An ONNX graph of the run, and its bytes."""
    model, tokenizer = runs.load_run(sound / "run")
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    about = {"name": "lstm", "sample_rate": 16000, "blank_index": 0}
    about |= {"frame_period": model.frame_period, "symbols": pieces(tokenizer)}
    write_onnx(model.eval(), path, about)
    assert call("transcribe", path, speak(path.parent)).exit_code == 0
    return path.read_bytes()


def claim_message(size):
    """A graph (field 7 of the message) that is said to be so long."""

    def change(content):
        length, size_left = b"", size
        while size_left > 127:
            length += bytes([size_left & 127 | 128])
            size_left >>= 7
        return b"\x3a" + length + bytes([size_left]) + content

    return change


def claim_tensor(size):
    """Let a graph say that one of its tensors has so many numbers."""

    def change(content):
        model = onnx.load_from_string(content)
        tensor = max(model.graph.initializer, key=lambda one: one.ByteSize())
        tensor.dims[:] = [size]
        return model.SerializeToString()

    return change


def claim_elsewhere(location, **place):
    """Let a graph say that a tensor lies in another file."""

    def change(content):
        model = onnx.load_from_string(content)
        tensor = max(model.graph.initializer, key=lambda one: one.ByteSize())
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": location, **place}.items():
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
        return model.SerializeToString()

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(claim_message(size) for size in (10**6, 2**31 - 1, 2**62)),
        *(claim_tensor(size) for size in (2**20, 2**40, 2**62)),
        claim_elsewhere("../outside"),
        claim_elsewhere("model.onnx", offset=2**20, length=2**30),
        lambda content: content[: len(content) // 2],
    ],
)
def test_an_onnx_graph_that_claims_to_be_longer(tmp_path, graph, change):
    folder = tmp_path / "graph"
    folder.mkdir()
    # Enough for any tensor
    (tmp_path / "outside").write_bytes(bytes(2**20))
    (folder / "model.onnx").write_bytes(change(graph))
    with soon_and_in_little_space():
        refuses(
            "model.onnx", "transcribe", folder / "model.onnx", speak(tmp_path)
        )
