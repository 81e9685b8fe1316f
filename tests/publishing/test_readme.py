"""The page "After training" of README.md, command by command."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jiwer
import pytest
from small_runs import (
    ELSEWHERE,
    RECURRENT,
    add_dev_clean,
    write_corpus,
    write_run,
)

TOKEN = "hf_WriterWriterWriterWriter"
README = Path(__file__).parents[2] / "README.md"


def page():
    """The commands and the program of the page."""
    text = README.read_text(encoding="utf-8")
    text = text.partition("## After training\n")[2].partition("\n## ")[0]
    (commands,) = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return (
        [
            line.replace("YOU/", "me/")
            for line in commands.splitlines()
            if line.strip()
        ],
        program.replace("YOU/", "me/"),
    )


@pytest.fixture
def user(tmp_path, hub):
    """Somebody in the recipe's folder after the demo, and a hub."""
    hub.users = {TOKEN: ("me", True)}
    run = tmp_path / "results/mini/rkd+skd_lstm_by_jasper_dr/1234"
    write_run(run, "lstm", RECURRENT)
    add_dev_clean(run)
    write_corpus(tmp_path / "data" / "MiniLibri")
    speech = sorted((tmp_path / "data").glob("*/test-clean/1/1/*.flac"))[-1]
    shutil.copy(speech, tmp_path / "speech.wav")

    def call(command):
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ
            | {
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_DISABLE_XET": "1",
                "HF_TOKEN": TOKEN,
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


@pytest.mark.slow
def test_the_page_works_as_it_stands(user, hub, tmp_path):
    pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is not installed")
    commands, program = page()
    assert len(commands) > 5
    printed = {}
    for command in commands:
        name, *arguments = shlex.split(command)
        assert name == "tutornet"
        printed[command] = user(
            [sys.executable, "-m", "tutornet_sb.cli", *arguments]
        )
        if "--dry-run" in command:
            assert not hub.repositories
    export, test_set, onnx, _, publish, fetched = commands
    assert "int8" in printed[export] and "sherpa" in printed[export]
    lines = printed[test_set].splitlines()
    texts = [line.partition("\t")[2] for line in lines if ".flac\t" in line]
    assert len(texts) == 11
    listing = tmp_path / "data/MiniLibri/test-clean/1/1/1-1.trans.txt"
    references = [
        line.partition(" ")[2] for line in listing.read_text().splitlines()
    ]
    assert f"{100 * jiwer.wer(references, texts):.2f}" in printed[test_set]
    assert '"words"' in printed[onnx] and '"text"' in printed[onnx]
    assert "me/lstm_mini holds now" in printed[publish]
    sent = set(hub.files("me/lstm_mini"))
    assert {"onnx/model.onnx", "sherpa/tokens.txt"} <= sent
    # The last utterance, by three ways
    last = fetched.split()[-1]
    assert printed[fetched] == f"{last}\t{texts[-1]}\n"
    (tmp_path / "user.py").write_text(ELSEWHERE + program)
    assert user([sys.executable, "user.py"]).strip() == texts[-1]
