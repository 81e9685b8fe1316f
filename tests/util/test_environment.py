"""What is installed: torch and its torchaudio, extras, the lock."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from typer.testing import CliRunner

from tutornet_sb import __version__
from tutornet_sb.cli import app
from tutornet_sb.util import environment
from tutornet_sb.util.errors import InputError

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/LibriSpeech/TutorNet"
TUTORNET = [sys.executable, "-m", "tutornet_sb.cli"]


def call(*words, **variables):
    return subprocess.run(
        words,
        env=os.environ | variables,
        cwd=RECIPE,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "train.py", "hparams/rkd_lstm.yaml"],
        [sys.executable, "librispeech_prepare.py", "LibriSpeech"],
        [*TUTORNET, "compare", "run"],
        [*TUTORNET, "transcribe", "run", "speech.wav"],
        [*TUTORNET, "export", "run", "export"],
        [*TUTORNET, "publish", "export", "me/model"],
        [*TUTORNET, "targets", "hparams/rkd_lstm.yaml", "--to", "store"],
        [*TUTORNET, "layers", "hparams/models/lstm.yaml"],
        [*TUTORNET, "config", "validate", "hparams/rkd_lstm.yaml"],
    ],
)
def test_a_torchaudio_for_another_torch_is_one_line(command, tmp_path):
    # As it fails where it was built for another torch
    broken = tmp_path / "torchaudio.py"
    broken.write_text("raise OSError('undefined symbol: torch_exception')")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = call(*command, PYTHONPATH=paths)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert f"torchaudio {version('torchaudio')} does not load" in line
    torch = version("torch").partition("+")[0]
    assert re.search(
        rf"pip install torch=={torch} torchaudio==2\.11\.[01]$", line
    )


@pytest.mark.parametrize(
    ("torch", "fitting"),
    [
        ("2.11.0", "2.11.0"),
        ("2.12.1+cu130", "2.11.0"),
        ("2.13.0", "2.11.1"),
        ("2.15.0+cu132", "2.11.1"),
    ],
)
def test_the_torchaudio_that_fits(torch, fitting, monkeypatch):
    def fail(name):
        raise RuntimeError("compiled with different CUDA versions")

    monkeypatch.setattr(environment.importlib, "import_module", fail)
    monkeypatch.setattr(environment, "version", lambda _: torch)
    with pytest.raises(InputError, match=f"torchaudio=={fitting}$"):
        environment.check_torchaudio()


@pytest.mark.parametrize(
    "words, variables",
    [
        (["-h"], {}),
        (["config", "-h"], {}),
        ([], {"COMP_WORDS": "tutornet tr", "COMP_CWORD": "1"}),
    ],
)
def test_help_and_completion_take_no_time(words, variables):
    if variables:
        variables = variables | {"_TUTORNET_COMPLETE": "complete_bash"}
    start = [sys.executable, "-X", "importtime", "-m", "tutornet_sb.cli"]
    done = call(*start, *words, **variables)
    assert done.returncode == 0
    assert ("validate" if "config" in words else "transcribe") in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.split("\n")}
    assert "typer" in imported
    slow = {"torch", "speechbrain", "rich.console", "ruamel.yaml"}
    assert not imported & slow


def test_the_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.strip() == f"tutornet {__version__}"
    assert version("tutornet-sb") == __version__


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", [[], ["export"], ["config"]])
def test_help(command, flag):
    result = CliRunner().invoke(app, [*command, flag])
    assert result.exit_code == 0 and "Usage: " in result.stdout


def read_extras():
    """Requirements by extra, of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    text = text.partition("[project.optional-dependencies]")[2]
    text = text.partition("\n[")[0]
    return {
        name: [Requirement(r) for r in re.findall(r'"(.*?)"', listed)]
        for name, listed in re.findall(r"(\w+) = \[(.*?)\]\n", text, re.DOTALL)
    }


def test_the_packages_of_extras():
    extras = read_extras()
    assert extras.keys() == environment.EXTRAS.keys() | {"all", "dev"}
    for extra, packages in environment.EXTRAS.items():
        names = {r.name.replace("-", "_") for r in extras[extra]}
        assert names == set(packages)
    (everything,) = extras["all"]
    assert everything.extras == set(environment.EXTRAS)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_lock_is_within_the_ranges(python, machine):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [Requirement(r) for r in lines if r and not r.startswith("#")]
    for extra, requirements in read_extras().items():
        wanted += requirements if extra != "all" else []
    values = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": "linux",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    locked = {}
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    for line in re.findall(r"^\w\S*==.*(?= \\$)", text, re.MULTILINE):
        pinned = Requirement(line)
        if pinned.marker is None or pinned.marker.evaluate(values):
            assert pinned.name not in locked
            (only,) = pinned.specifier
            locked[pinned.name] = Version(only.version)
    for requirement in wanted:
        name = re.sub(r"[._]", "-", requirement.name)
        assert locked[name] in requirement.specifier, requirement
    # Each has the digests of its files.
    assert len(re.findall(r"^\S+==.*\n +--hash=", text, re.MULTILINE)) == len(
        re.findall(r"^\S+==", text, re.MULTILINE)
    )
