"""A token reaches the hub and nothing else: no log, no error, no file."""

import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from hub_server import Blob, HubServer
from huggingface_hub import constants
from small_runs import (
    WAV2VEC2_SYMBOLS,
    save_wav2vec2,
    write_corpus,
    write_export,
)

from tutornet_sb.inference.recogniser import load_recogniser
from tutornet_sb.networks import runs
from tutornet_sb.teachers.sources import load_teacher

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "LibriSpeech" / "TutorNet"
# Whether the token is in its file, or in the environment
PLACES = False, pytest.param(True, marks=pytest.mark.slow)
# A port of this machine that nobody listens to
NOWHERE = "http://127.0.0.1:9"
TOKEN, PASSWORD = "hf_CanaryCanaryCanary", "SwordFishSwordFish"
# Before any command: no waiting, and all that the libraries log, if wanted
BEFORE = """
import http.client, logging, os, runpy, sys, time
time.sleep = lambda seconds: None
if os.environ["LOUD"]:
    logging.basicConfig(level=1, stream=sys.stderr)
    http.client.HTTPConnection.debuglevel = 1
    from huggingface_hub import logging as hub
    hub.set_verbosity_debug()
sys.argv = sys.argv[1:]
if sys.argv[0] == "-m":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("secrets"))


@pytest.fixture
def hub():
    with HubServer().running() as server:
        server.users = {TOKEN: ("me", True)}
        yield server


def call(hub, folder, *arguments, stored=False, loud=True, **environment):
    """Run a command in a process of its own, and search all that it leaves."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "LOUD": "1" if loud else "",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "TMPDIR": str(folder),
    } | environment
    token = home / "token"
    if stored:
        token.write_text(TOKEN)
    else:
        environment["HF_TOKEN"] = TOKEN
    (folder / "before.py").write_text(BEFORE)
    done = subprocess.run(
        [sys.executable, folder / "before.py", *map(str, arguments)],
        env={
            name: value
            for name, value in os.environ.items()
            if not name.startswith("HF_")
        }
        | environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    token.unlink(missing_ok=True)
    for secret in (TOKEN, PASSWORD):
        assert secret not in done.stdout
        assert secret not in done.stderr, lines_with(secret, done.stderr)
        for path in folder.rglob("*"):
            assert secret not in str(path)
            if path.is_file():
                assert secret.encode() not in path.read_bytes(), path
    return done


def lines_with(secret, text):
    return [line for line in text.splitlines() if secret in line][:3]


CLI = "-m", "tutornet_sb.cli"


@pytest.mark.parametrize("how", [None, 403])
def test_publishing(exported, hub, tmp_path, how):
    if how is not None:
        hub.fail("POST /api/repos/create", how, message=f"Not {TOKEN}, no")
    done = call(
        *(hub, tmp_path, *CLI, "publish", exported / "to", "me/model"),
        # Either place of the token, in turn. What a server repeats stands in
        # the log of the HTTP client at its lowest level.
        stored=how == 403,
        loud=how is None,
    )
    assert done.returncode == (0 if how is None else 2), done.stderr
    assert any(hub.authorized)
    assert how is None or f"({how}) (Not <token>, no)" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stored", PLACES)
def test_publishing_where_nobody_answers(exported, hub, tmp_path, stored):
    done = call(
        *(hub, tmp_path, *CLI, "publish", exported / "to", "me/model"),
        stored=stored,
        HF_ENDPOINT=NOWHERE,
    )
    assert done.returncode == 2
    assert "cannot be reached" in done.stderr.strip().splitlines()[-1]


def train(hub, folder, **options):
    """Train by a teacher of the hub, and search all that the run leaves."""
    write_corpus(
        folder / "corpus", ("dev-clean", "test-clean", "train-clean-100"), 4
    )
    words = [RECIPE / "train.py", RECIPE / "hparams" / "rkd_lstm.yaml"]
    for key, value in {
        "teacher.source": "me/other",
        "data_folder": "corpus",
        "corpus_yaml": "hparams/corpora/small.yaml",
        "corpus_overrides": "{epochs: 2}",
        "student_overrides": "{channels: 4, hidden_size: 4, n_mels: 16}",
        "rkd.share": 0.5,
        "output_folder": "run",
    }.items():
        words += [f"--{key}", value]
    return call(hub, folder, *words, **options)


@pytest.mark.parametrize("stored", PLACES)
@pytest.mark.slow
def test_a_run_by_a_teacher_of_the_hub(hub, tmp_path, stored):
    source = save_wav2vec2(tmp_path / "source", WAV2VEC2_SYMBOLS)
    hub.create("me/other", private=True)
    hub.repositories["me/other"].commit(
        "main",
        "a teacher",
        {
            path.name: Blob(path.read_bytes(), path.suffix == ".safetensors")
            for path in source.iterdir()
        },
    )
    done = train(hub, tmp_path, stored=stored)
    assert done.returncode == 0, done.stderr[-2000:]
    assert any(hub.authorized)
    teacher = runs.read_results(tmp_path / "run")["teacher"]
    assert teacher["source"] == "me/other"


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [403, NOWHERE, pytest.param("cut", marks=pytest.mark.slow)]
)
def test_a_run_whose_teacher_the_hub_keeps(hub, tmp_path, how):
    """What a server repeats would stand in the log of the HTTP client."""
    hub.fail("/me/other", how, message=f"Not {TOKEN}, no")
    done = train(
        *(hub, tmp_path),
        stored=how == "cut",
        loud=how != 403,
        HF_ENDPOINT=how if how == NOWHERE else hub.url,
    )
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("train.py: ") and "me/other" in line
    assert any(hub.authorized) != (how == NOWHERE)
    assert (tmp_path / "run" / "log.txt").is_file()


@pytest.mark.slow
def test_an_endpoint_with_a_password(exported, hub, tmp_path):
    done = call(
        *(hub, tmp_path, *CLI, "publish", exported / "to", "me/model"),
        loud=False,
        HF_ENDPOINT=hub.url.replace("//", f"//user:{PASSWORD}@"),
    )
    assert done.returncode == 2 and "(401)" in done.stderr


@pytest.mark.parametrize("how", [401, 403, 500, "cut"])
@pytest.mark.parametrize("load", [load_teacher, load_recogniser])
def test_loading_from_the_hub(hub, monkeypatch, tmp_path, caplog, how, load):
    """As train.py and the commands do, which show such errors in one line."""
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fail("/me/other", how, message=f"Not {TOKEN}, no")
    with pytest.raises(
        ValueError, match="me/other.*cannot be loaded"
    ) as caught:
        load("me/other")
    assert any(hub.authorized)
    shown = "".join(traceback.format_exception(caught.value))
    assert TOKEN not in shown + caplog.text
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_programs_mute_http_clients_and_imports_do_not():
    program = """
import logging
import tutornet_sb.publishing.hub
from tutornet_sb.util.errors import failing_in_one_line
from tutornet_sb.util.redaction import HTTP_CLIENTS
levels = lambda: {logging.getLogger(name).level for name in HTTP_CLIENTS}
assert levels() == {logging.NOTSET}, levels()
with failing_in_one_line("program"):
    assert levels() == {logging.INFO}
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
