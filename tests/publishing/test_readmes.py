"""Every command of READMEs and pages, in order, from the state of `make demo`.

Corpora, plans and networks of the hub are tiny here; the commands are those of
the pages, but for what stands in ``REPLACED``.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jiwer
import pytest
from hub_server import Blob
from small_runs import ELSEWHERE, WAV2VEC2_SYMBOLS, save_wav2vec2

ROOT = Path(__file__).parents[2]
RECIPE = Path("recipes/LibriSpeech/TutorNet")
TOKEN = "hf_WriterWriterWriterWriter"
REPLACED = {
    "YOU/": "me/",
    "facebook/wav2vec2-large-960h": "me/wav2vec2",
    "/path/to/LibriSpeech": "data/MiniLibri",
    "OWNER/NAME": "me/lstm_mini",
    # Two processes on two cores, and no GPU
    "--nproc_per_node=4": "--nproc_per_node=2",
    "HOST:29500": "localhost:29511",
    "train.py hparams/rkd_lstm.yaml ...": "train.py hparams/rkd_lstm.yaml "
    "--output_folder several",
}
DOCS = "docs/target_store.md", "docs/several_gpus.md", "docs/comparing.md"
SET_UP = "git clone", "cd ", "make ", "source "


def blocks(page):
    """Code blocks of a page, each with its language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(page):
    """Shell commands of a page, in order."""
    text = "".join(block for kind, block in blocks(page) if kind == "")
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith(SET_UP):
            yield line


def shrink(folder):
    """Corpora and plans of some seconds in place of those of minutes."""
    hparams = folder / RECIPE / "hparams"
    tiny = {
        "train_minutes": 0.6,
        "dev_minutes": 0.15,
        "test_minutes": 0.15,
        "train_speakers": 3,
        "test_speakers": 2,
        "teacher_epochs": 1,
        "epochs": 4,
        "model_size": "small",
        "batch_seconds": 12,
        "num_workers": 0,
        "train_splits": "[train-clean-100]",
        "valid_splits": "[dev-clean]",
        "test_splits": "[test-clean]",
    }
    for path in hparams.glob("[cp][or]*/*.yaml"):
        text = path.read_text(encoding="utf-8")
        for key, value in tiny.items():
            text = re.sub(rf"(?m)^( *{key}:) .*", rf"\1 {value}", text)
        path.write_text(text, encoding="utf-8")
    # A teacher of one epoch is sure of nothing.
    base = folder / RECIPE / "hparams" / "distill.yaml"
    text = base.read_text(encoding="utf-8")
    assert "min_confidence: 0.9" in text
    base.write_text(text.replace("min_confidence: 0.9", "min_confidence: 0.0"))
    for path in (folder / "benchmarks" / "plans").glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"(?m)^seeds: .*", "seeds: [1]", text)
        path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a clone holds, with small corpora, after `make demo`."""
    folder = tmp_path_factory.mktemp("clone")
    for part in (RECIPE, "benchmarks/plans"):
        shutil.copytree(
            ROOT / part,
            folder / part,
            ignore=shutil.ignore_patterns("results", "data", "__pycache__"),
        )
    shrink(folder)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    demo = re.findall(r"\$\(BIN\)/(python train.py \S+)", makefile)
    assert len(demo) == 2
    for command in demo:
        call(command, folder / RECIPE)
    return folder / RECIPE


def call(command, folder, **variables):
    """Run a line in the shell of somebody who has activated `.venv`."""
    bin = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ
        | {
            "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "LOGLEVEL": "WARNING",
        }
        | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_commands_of_both_pages(clone, hub, tmp_path):
    hub.users = {TOKEN: ("me", True)}
    save_wav2vec2(tmp_path / "model", WAV2VEC2_SYMBOLS)
    hub.create("me/wav2vec2")
    files = {
        path.name: Blob(path.read_bytes(), path.suffix == ".safetensors")
        for path in (tmp_path / "model").iterdir()
    }
    commit = hub.repositories["me/wav2vec2"].commit("main", "model", files)
    shutil.copy(
        next((clone / "data/MiniLibri/test-clean").glob("*/*/*.flac")),
        clone / "speech.wav",
    )
    variables = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }
    printed, assigned = {}, ""
    pages = ["README.md", str(RECIPE / "README.md"), *DOCS]
    for command in [line for page in pages for line in commands(page)]:
        for old, new in REPLACED.items():
            command = command.replace(old, new)
        command = command.replace("COMMIT", commit)
        if re.match(r"[A-Z]+=", command):
            assigned += command + "\n"
            continue
        if "torchrun" in command:
            for option in ("--distributed_backend gloo", "--device cpu"):
                command += "" if option in command else f" {option}"
        if "--nnodes=2" in command:
            # Both machines at once
            other = command.replace("--node_rank=0", "--node_rank=1")
            command = f"{{ {other} & }}; {command} && wait $!"
        printed[command] = call(assigned + command, clone, **variables)
        if "--dry-run" in command:
            assert set(hub.repositories) == {"me/wav2vec2"}

    (test_set,) = [c for c in printed if "--score" in c]
    references, texts = {}, {}
    for listing in (clone / "data/MiniLibri/test-clean").glob(
        "*/*/*.trans.txt"
    ):
        for line in listing.read_text().splitlines():
            key, _, references[key] = line.partition(" ")
    for line in printed[test_set].splitlines():
        file, tab, text = line.partition("\t")
        if tab:
            texts[Path(file).stem] = text
    assert texts.keys() == references.keys()
    keys = sorted(texts)
    wer = jiwer.wer([references[k] for k in keys], [texts[k] for k in keys])
    assert f"{100 * wer:.2f}" in printed[test_set]
    (by_json,) = [c for c in printed if "--json" in c]
    assert json.loads(printed[by_json])["file"] == "speech.wav"
    assert {"onnx/model.onnx", "sherpa/tokens.txt"} <= set(
        hub.files("me/lstm_mini")
    )
    (fetched,) = [c for c in printed if "transcribe me/" in c]
    # In SpeechBrain, where this package is not installed
    (program,) = [text for kind, text in blocks(pages[0]) if kind == "python"]
    (clone / "user.py").write_text(ELSEWHERE + program.replace("YOU/", "me/"))
    text = call("python user.py", clone, **variables).strip()
    assert printed[fetched].strip().partition("\t")[2] == text
