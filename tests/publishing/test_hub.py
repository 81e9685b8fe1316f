"""The real client of the Hugging Face hub, against a hub on loopback."""

import hashlib
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import traceback

import pytest
import soundfile
from huggingface_hub import ModelCard, constants
from small_runs import (
    BLOCKS,
    ELSEWHERE,
    RATE,
    RECURRENT,
    make_speech,
    write_run,
)
from typer.testing import CliRunner

from tutornet_sb.cli import app
from tutornet_sb.publishing import hub as publishing
from tutornet_sb.publishing.export import export
from tutornet_sb.util import files
from tutornet_sb.util.errors import InputError

CANARY = "hf_CanaryCanaryCanaryCanary"
READER = "hf_ReaderReaderReaderReader"
NAME = "me/lstm_mini"
FILES = {
    ".gitattributes",
    "README.md",
    "config.json",
    "hyperparams.yaml",
    "model.ckpt",
    "model.safetensors",
    "tokenizer.ckpt",
    "tokenizer.model",
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Exports of a network of stock parts and of one with its source."""
    folder = tmp_path_factory.mktemp("exported")
    jasper = {"blocks": BLOCKS, "encoder_size": 8}
    for name, network, values in (
        ("stock", "lstm", RECURRENT),
        ("foreign", "jasper_mini", jasper),
    ):
        write_run(folder / "runs" / name, network, values)
        export(folder / "runs" / name, folder / name)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    """An export that a test may change."""
    return shutil.copytree(exported / "stock", tmp_path / "lstm_mini")


@pytest.fixture
def waits(monkeypatch):
    """Seconds waited, in no time."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


@pytest.fixture
def hub(hub, monkeypatch, waits, tmp_path):
    """The hub, where one may write and another may not."""
    hub.users = {CANARY: ("me", True), READER: ("me", False)}
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", CANARY)
    return hub


def publish(*arguments):
    return CliRunner().invoke(app, ["publish", *map(str, arguments)])


def published(*arguments):
    """Standard output of a success."""
    result = publish(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def refused(*arguments):
    """The only line of standard error."""
    result = publish(*arguments)
    assert result.exit_code == 2, result.stdout
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("tutornet publish: ")
    assert result.stdout == ""
    return line


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------- success


def test_all_files_come_in_one_commit(hub, folder):
    before = contents(folder)
    output = published(folder, NAME)
    assert contents(folder) == before
    there = hub.files(NAME)
    assert there.keys() == FILES
    for name in FILES - {".gitattributes", "README.md"}:
        assert there[name] == before[name]
    assert hub.history(NAME) == ["initial commit", "Publish lstm_mini"]
    assert not hub.repositories[NAME].private
    sha = hub.repositories[NAME].branches["main"]
    size = sum(map(len, there.values())) - len(there[".gitattributes"])
    assert output.splitlines() == [
        f"{hub.url}/{NAME} holds now, commit {sha}:",
        f"{len(FILES) - 1} files, {size:,} bytes",
    ]


def test_the_card_says_to_load_it_from_the_hub(hub, folder):
    published(folder, NAME, "--license", "mit", "--language", "de")
    card = ModelCard(hub.files(NAME)["README.md"].decode())
    assert (card.data.license, card.data.language) == ("mit", "de")
    assert f'from_hparams(source="{NAME}")' in card.text
    assert 'from_hparams(source="stock")' in (folder / "README.md").read_text()
    assert card.text.strip().startswith("# lstm_mini\n")
    assert f"tutornet transcribe {NAME} speech.wav" in card.text


def test_large_files_go_to_the_store_without_the_token(hub, folder):
    published(folder, NAME)
    stored = [
        authorized
        for request, authorized in zip(
            hub.requests, hub.authorized, strict=True
        )
        if request.startswith("PUT /store/")
    ]
    assert stored == [False] * 4
    assert set(hub.stored.values()) == {
        (folder / name).read_bytes()
        for name in ("model.ckpt", "model.safetensors", "tokenizer.model")
    }


def test_nothing_new_makes_no_commit(hub, folder):
    published(folder, NAME)
    sha = hub.repositories[NAME].branches["main"]
    output = published(folder, NAME, "--message", "again")
    assert f"held all this already, commit {sha}" in output
    assert len(hub.history(NAME)) == 2


def test_what_changed_comes_in_one_commit(hub, folder, exported):
    published(folder, NAME)
    hub.requests.clear()
    config = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", config | {"name": "better"})
    output = published(folder, NAME, "--message", "Say it better")
    assert "holds now" in output
    assert hub.history(NAME)[2:] == ["Say it better"]
    assert b"network `better`" in hub.files(NAME)["README.md"]
    assert not [r for r in hub.requests if r.startswith("PUT")]


def test_files_of_an_earlier_model_go_and_those_of_others_stay(hub, exported):
    published(exported / "foreign", NAME)
    repository = hub.repositories[NAME]
    there = repository.at("main").files
    others = {
        "photo.png": there["README.md"],
        "onnx/photo.onnx": there["custom.py"],
    }
    ours = {"onnx/model.onnx": there["custom.py"]}
    repository.commit("main", "By hand", there | others | ours)
    published(exported / "stock", NAME)
    assert hub.files(NAME).keys() == FILES | others.keys()
    assert len(hub.history(NAME)) == 4


def test_a_private_repository_is_made_and_its_card_knows(hub, folder):
    published(folder, NAME, "--private")
    assert hub.repositories[NAME].private
    text = hub.files(NAME)["README.md"].decode()
    assert "fetch_config=FetchConfig(token=True)" in text
    # Not needed once it is made.
    assert "held all this already" in published(folder, NAME)


def test_private_is_not_for_what_is_public(hub, folder):
    hub.create(NAME)
    line = refused(folder, NAME, "--private")
    assert f"{NAME} exists and is public" in line
    assert hub.history(NAME) == ["initial commit"]


def test_a_branch_is_made_and_the_main_one_left_alone(hub, folder):
    published(folder, NAME)
    main = hub.repositories[NAME].branches["main"]
    (folder / "custom.py").write_text("# new\n")
    published(folder, NAME, "--revision", "try/1")
    assert hub.repositories[NAME].branches["main"] == main
    there = hub.files(NAME, "try/1")
    assert there["custom.py"] == b"# new\n"
    assert b'FetchConfig(revision="try/1")' in there["README.md"]
    # At once where there is nothing
    published(folder, "me/other", "--revision", "first")
    assert hub.files("me/other").keys() == {".gitattributes"}
    assert hub.files("me/other", "first").keys() == FILES | {"custom.py"}
    # The main branch by its name is no other one.
    published(folder, NAME, "--revision", "main")
    assert b"FetchConfig" not in hub.files(NAME)["README.md"]


def test_other_runtimes_come_along(hub, folder):
    for name in ("onnx/model.onnx", "sherpa/tokens.txt"):
        (folder / name).parent.mkdir()
        (folder / name).write_text(name)
    published(folder, NAME)
    there = hub.files(NAME)
    assert there["onnx/model.onnx"] == b"onnx/model.onnx"
    assert there["sherpa/tokens.txt"] == b"sherpa/tokens.txt"


def test_a_dry_run_lists_what_then_goes(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    output = published(folder, NAME, "--dry-run", "--revision", "dev")
    assert hub.requests == []
    first, *rows, last = output.splitlines()
    assert first == f"To {hub.url}/{NAME}, branch dev, would go:"
    listed = {
        name: int(size.replace(",", ""))
        for size, name in (row.split() for row in rows)
    }
    assert last == f"{len(rows)} files, {sum(listed.values()):,} bytes"
    monkeypatch.setenv("HF_TOKEN", CANARY)
    published(folder, NAME, "--revision", "dev")
    there = hub.files(NAME, "dev")
    del there[".gitattributes"]
    assert listed == {name: len(content) for name, content in there.items()}


# ----------------------------------------------------------------- what is sent


def test_what_is_no_export_is_refused(hub, tmp_path, folder):
    assert "has no config.json" in refused(tmp_path, NAME)
    (folder / "config.json").write_text('{"model_type": "wav2vec2"}')
    assert "config.json is of format None" in refused(folder, NAME)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["token", ".cache/huggingface/x", "onnx.bak"])
def test_stray_files_are_named(hub, folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(CANARY)
    line = refused(folder, NAME)
    assert f"lstm_mini holds what no export writes: {name}" in line
    assert CANARY not in line
    assert refused(folder, NAME, "--dry-run") == line
    assert hub.requests == []


def test_links_are_refused(hub, folder, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.onnx").write_text("key")
    (folder / "onnx").symlink_to(tmp_path / "secret")
    assert "no export writes: onnx" in refused(folder, NAME)
    (folder / "onnx").unlink()
    (folder / "custom.py").symlink_to(tmp_path / "secret" / "key.onnx")
    assert "no export writes: custom.py" in refused(folder, NAME)
    (folder / "custom.py").unlink()
    (folder / "custom.py").symlink_to(tmp_path / "nothing")
    assert "no export writes: custom.py" in refused(folder, NAME)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["model.ckpt", "hyperparams.yaml"])
def test_a_missing_file_is_named(hub, folder, name):
    (folder / name).unlink()
    assert f"lstm_mini lacks {name}" in refused(folder, NAME)
    assert hub.requests == []


@pytest.mark.parametrize(
    "name, reason",
    [
        ("lstm", "give OWNER/lstm"),
        ("me/l/stm", "me/l/stm"),
        ("me/-lstm", "-lstm"),
        ("../lstm", "../lstm"),
    ],
)
def test_names_that_will_not_do(hub, folder, name, reason):
    assert reason in refused(folder, name)
    assert hub.requests == []


def test_a_commit_is_no_branch(hub, folder):
    line = refused(folder, NAME, "--revision", "a" * 40)
    assert "is a commit: name a branch" in line
    assert hub.requests == []


def test_the_licence_of_another_corpus_must_be_given(hub, folder):
    config = files.read_json(folder / "config.json")
    config["license"] = None
    files.write_json(folder / "config.json", config)
    assert "give --license" in refused(folder, NAME)
    assert hub.requests == []
    published(folder, NAME, "--license", "unknown")
    card = ModelCard(hub.files(NAME)["README.md"].decode())
    assert card.data.license == "unknown"


@pytest.mark.parametrize("key", ["load_with", "results"])
def test_a_config_that_lacks_something_is_named(hub, folder, key):
    config = files.read_json(folder / "config.json")
    del config[key]
    files.write_json(folder / "config.json", config)
    line = refused(folder, NAME)
    assert "config.json is damaged" in line and f"'{key}'" in line
    assert line.endswith("export the run again")


def test_an_export_of_an_old_format_is_refused(hub, folder):
    config = files.read_json(folder / "config.json")
    config["format"] = "tutornet_sb export 1"
    files.write_json(folder / "config.json", config)
    line = refused(folder, NAME)
    assert "of format 'tutornet_sb export 1'" in line
    assert line.endswith("export the run again")


def test_a_licence_that_the_hub_itself_refuses_uploads_nothing(hub, folder):
    line = refused(folder, NAME, "--license", "gpl-3.0")
    assert '"license" must be one of' in line
    assert hub.history(NAME) == ["initial commit"] and not hub.stored
    published(folder, NAME, "--license", "mit")


# --------------------------------------------------------------------- failures

INFO = "GET /api/models/me/lstm_mini/revision"
MAKE = "POST /api/repos/create"
BRANCH = "POST /api/models/me/lstm_mini/branch"
PREUPLOAD = "POST /api/models/me/lstm_mini/preupload"
BATCH = "POST /me/lstm_mini.git/info/lfs/objects/batch"
STORE = "PUT /store/"
VERIFY = "POST /me/lstm_mini/verify"
VALIDATE = "POST /api/validate-yaml"
COMMIT = "POST /api/models/me/lstm_mini/commit"
STEPS = [INFO, MAKE, BRANCH, PREUPLOAD, BATCH, STORE, VERIFY, VALIDATE, COMMIT]
MEANT = {
    401: "does not accept the token (401): log in again by `hf auth login`",
    403: "(403) (refused): me/lstm_mini needs a token with write access",
    404: "publishing failed (404): refused",
    500: "publishing failed (500): refused",
    "cut": "cannot be reached, or is no hub (Server disconnected",
    "page": "cannot be reached, or is no hub",
}


@pytest.mark.parametrize("how", [401, 403, 404, 500, "cut"])
@pytest.mark.parametrize("step", STEPS)
def test_after_a_failure_the_same_command_continues(
    hub, folder, caplog, step, how
):
    arguments = folder, "--revision", "dev"
    line = refused_without_the_token(hub, caplog, [(step, how)], *arguments)
    assert MEANT[how] in line
    # Nothing half-way
    if NAME in hub.repositories:
        assert hub.history(NAME) == ["initial commit"]
    hub.faults.clear()
    published(folder, NAME, "--revision", "dev")
    assert hub.files(NAME, "dev").keys() == FILES
    assert hub.history(NAME) == ["initial commit", "Publish lstm_mini"]


def test_what_is_uploaded_is_not_sent_again(hub, folder):
    content = (folder / "model.safetensors").read_bytes()
    missing = f"{STORE}{hashlib.sha256(content).hexdigest()}"
    hub.fail(missing, 500)
    assert "are not sent again" in refused(folder, NAME)
    assert len(hub.stored) == 2
    hub.faults.clear()
    hub.requests.clear()
    published(folder, NAME)
    assert [r for r in hub.requests if r.startswith(STORE)] == [missing]


def refused_without_the_token(hub, caplog, faults, folder, *arguments):
    """The only line of a failure, in which no way shows the token."""
    caplog.set_level(logging.DEBUG)
    before = contents(folder)
    for pattern, how in faults:
        hub.fail(pattern, how)
    line = refused(folder, NAME, *arguments)
    found = [line, *(record.getMessage() for record in caplog.records)]
    assert not [text for text in found if CANARY in text]
    assert contents(folder) == before
    return line


def test_nobody_sees_the_token(hub, folder, caplog, capfd, tmp_path):
    # As in the log file of a run
    caplog.set_level(logging.DEBUG)
    for how in (401, 403, 500, "cut", "page"):
        for step in (INFO, STORE, COMMIT):
            hub.faults.clear()
            hub.repositories.clear()
            hub.stored.clear()
            hub.fail(step, how, message=f"Not with {CANARY}, no")
            with pytest.raises(InputError) as caught:
                publishing.publish(folder, NAME)
            error = caught.value
            shown = [str(error), repr(error)]
            shown += traceback.format_exception(error)
            assert not [text for text in shown if CANARY in text]
            if how == 403:
                assert "Not with <token>, no" in str(error)
    out, err = capfd.readouterr()
    assert CANARY not in out + err
    assert not [r for r in caplog.records if CANARY in r.getMessage()]
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes()


@pytest.mark.parametrize("how", [429, 503, "cut"])
def test_the_client_tries_uploads_again(hub, folder, waits, how):
    hub.fail(STORE, how, times=2)
    published(folder, NAME)
    assert hub.files(NAME).keys() == FILES and waits


@pytest.mark.parametrize("step", [MAKE, BRANCH, COMMIT])
def test_what_was_done_is_not_done_twice(hub, folder, step):
    hub.fail(step, "cut after", times=1)
    assert "cannot be reached, or is no hub" in refused(
        folder, NAME, "--revision", "dev"
    )
    output = published(folder, NAME, "--revision", "dev")
    assert ("held all this already" in output) == (step == COMMIT)
    assert hub.files(NAME, "dev").keys() == FILES
    assert hub.history(NAME) == ["initial commit", "Publish lstm_mini"]


def test_somebody_else_was_faster(hub, folder, caplog):
    hub.create(NAME)

    def commit():
        repository = hub.repositories[NAME]
        there = repository.at("main").files
        theirs = {"theirs.txt": there[".gitattributes"]}
        repository.commit("main", "Theirs", there | theirs)

    line = refused_without_the_token(hub, caplog, [(COMMIT, commit)], folder)
    assert "(412): A commit has happened since" in line
    assert hub.history(NAME) == ["initial commit", "Theirs"]


def test_no_repository_is_made_without_the_right_to(hub, folder, monkeypatch):
    line = refused(folder, "they/lstm_mini")
    assert "(403)" in line and "of they or a member" in line
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "(403)" in refused(folder, NAME)
    assert hub.repositories == {}
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    line = refused(folder, NAME)
    assert "(401)" in line and "hf_old" not in line


@pytest.mark.parametrize("token", ["hf_Ca\x0bnary", "hf_Ca nary", "hf_Canäry"])
def test_a_token_that_is_none_is_not_shown(hub, folder, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    line = refused(folder, NAME)
    assert "needs a token, and one without spaces" in line
    assert "hf_" not in line.replace("hf auth", "")
    assert hub.requests == []


def test_without_a_token_nothing_is_asked(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    line = refused(folder, NAME)
    assert "log in by `hf auth login`, or set HF_TOKEN" in line
    assert hub.requests == []


def test_offline(hub, folder, monkeypatch, waits):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(folder, NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for endpoint in (f"http://127.0.0.1:{port}", "hub.example", "http://[::"):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        line = refused(folder, NAME)
        assert f"{endpoint} cannot be reached, or is no hub" in line
    assert hub.requests == waits == []


def test_a_hub_that_does_not_answer(hub, folder, monkeypatch):
    monkeypatch.setattr(publishing, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        assert "cannot be reached, or is no hub (timed out)" in refused(
            folder, NAME
        )


def test_a_web_page_is_no_hub(hub, folder):
    hub.fail("GET", "page")
    assert "cannot be reached, or is no hub" in refused(folder, NAME)


# ------------------------------------------------------------------- round trip

USER = """
import contextlib, io, json, torch
from pathlib import Path
from huggingface_hub import snapshot_download
from speechbrain.inference.ASR import EncoderASR
from speechbrain.inference.interfaces import foreign_class

torch.set_num_threads(1)
task = json.loads(Path("task.json").read_text())
load = EncoderASR.from_hparams if task["is_stock"] else foreign_class
texts, printed = [], []
for source in task["sources"]:
    model = load(source=source)
    texts.append([model.transcribe_file(path) for path in task["paths"]])
for code in task["snippets"]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    printed.append(out.getvalue())
folder = Path(snapshot_download(task["sources"][-1]))
files = {path.name: path.read_bytes().hex() for path in folder.iterdir()}
Path("found.json").write_text(json.dumps([texts, printed, files]))
"""


def in_a_process(hub, home, *arguments, **named):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ
        | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_TOKEN": CANARY,
            "HF_HUB_DISABLE_XET": "1",
        }
        | named,
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert CANARY not in done.stdout + done.stderr
    return done


def snippet(card):
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    return code


@pytest.mark.parametrize("kind", ["stock", "foreign"])
def test_a_model_comes_back_from_the_hub(hub, exported, tmp_path, kind):
    paths = []
    for seed, seconds in enumerate((0.7, 1.1)):
        paths.append(str(tmp_path / f"{seed}.wav"))
        wav = make_speech(seed, seconds).numpy()
        soundfile.write(paths[-1], wav, RATE, subtype="FLOAT")
    shutil.copy(paths[1], tmp_path / "speech.wav")
    # The snippet of the folder's own card is for where the folder lies.
    shutil.copytree(exported / kind, tmp_path / kind)
    # The command in a process of its own, as from a shell
    done = in_a_process(
        hub, tmp_path, "-m", "tutornet_sb.cli", "publish", kind, "me/public"
    )
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/me/public holds now" in done.stdout
    published(exported / kind, "me/secret", "--private", "--revision", "dev")
    cards = [
        (tmp_path / kind / "README.md").read_text(),
        hub.files("me/public")["README.md"].decode(),
        hub.files("me/secret", "dev")["README.md"].decode(),
    ]
    task = {
        "is_stock": kind == "stock",
        "sources": [str(exported / kind), "me/public"],
        "paths": paths,
        "snippets": [snippet(card) for card in cards],
    }
    (tmp_path / "task.json").write_text(json.dumps(task))
    (tmp_path / "user.py").write_text(ELSEWHERE + USER)
    done = in_a_process(hub, tmp_path, "user.py")
    assert done.returncode == 0, done.stderr
    (here, there), printed, files = json.loads(
        (tmp_path / "found.json").read_text()
    )
    assert here == there
    assert all(len(set(text)) > 2 for text in here)
    assert printed == [here[1] + "\n"] * 3
    assert {name: bytes.fromhex(text) for name, text in files.items()} == (
        hub.files("me/public")
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", [403, "cut"])
def test_xet_fails_in_one_line(hub, folder, how):
    """By the real client of the hub's other store."""
    hub.fail("GET /api/models/me/lstm_mini/xet-write-token", how)
    done = in_a_process(
        hub,
        folder.parent,
        *("-m", "tutornet_sb.cli", "publish", folder, NAME),
        HF_HUB_DISABLE_XET="0",
        HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="1",
        HF_XET_CLIENT_RETRY_BASE_DELAY="10ms",
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("tutornet publish: ")
    assert "403" in line or how != 403
    assert hub.history(NAME) == ["initial commit"]
