"""The worked examples of docs/: a network, a loss and a stage of one's own."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tutornet_sb.networks import runs

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "LibriSpeech" / "TutorNet"
TINY = (
    "{epochs: 2, teacher_epochs: 1, minilibri: {seed: 1, train_minutes: 0.5, "
    "dev_minutes: 0.1, test_minutes: 0.1, train_speakers: 2, test_speakers: 1}}"
)


def blocks(page, language):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    return [block for kind, block in found if kind == language]


@pytest.mark.slow
def test_a_network_a_loss_and_a_stage_of_ones_own(tmp_path):
    shutil.copytree(RECIPE / "hparams", tmp_path / "hparams")
    shutil.copy(RECIPE / "train.py", tmp_path)
    (network,) = blocks("own_network.md", "python")
    (yaml,) = blocks("own_network.md", "yaml")
    (script,) = blocks("own_loss_and_stage.md", "python")
    (tmp_path / "my_networks.py").write_text(network)
    (tmp_path / "hparams" / "models" / "gated.yaml").write_text(yaml)
    (tmp_path / "my_train.py").write_text(script)
    commands = [
        line
        for page in ("own_loss_and_stage.md", "own_network.md")
        for block in blocks(page, "")
        for line in block.splitlines()
    ]
    assert len(commands) == 3
    found = []
    for index, line in enumerate(commands):
        _, *words = re.findall(r'"[^"]*"|\S+', line)
        options = ["--corpus_overrides", TINY, "--rkd.share", "0.5"]
        options += ["--output_folder", f"run{index}", "--noprogressbar"]
        done = subprocess.run(
            [sys.executable, *(w.strip('"') for w in words), *options],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(runs.read_results(tmp_path / f"run{index}"))
    assert [results["method"] for results in found] == [
        "skd",
        "rkd+entropy",
        "rkd+skd",
    ]
    assert found[0]["options"]["skd.loss"] == "tv"
    metrics = tmp_path / "run1" / "stages" / "entropy" / runs.METRICS
    assert '"entropy": ' in metrics.read_text()
    assert found[2]["student"] == "gated"
