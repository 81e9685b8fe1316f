"""Names of runs: method, network, teacher and the options that differ."""

import json

import pytest

from tutornet_sb.experiments.compare import group
from tutornet_sb.experiments.labels import options_of, set_labels
from tutornet_sb.experiments.report import Group
from tutornet_sb.util import files

TEACHER = {
    "name": "lstm",
    "folder": "results/mini/teacher_lstm/1234",
    "method": "ctc",
}


def save(folder, method, command=None, hyperparams=None, **changes):
    """A run that says what it was told."""
    last = method.split("+")[-1]
    splits = {"test-clean": {"wer": 20.0, "cer": 5.0}}
    results = {
        "method": method,
        "corpus": "mini",
        "student": "lstm",
        "seed": 1,
        "parameters": 1000,
        "epochs": 8,
        "train_audio_seconds": 60.0,
        "train_seconds": 100.0,
        "real_time_factor": 0.01,
        "stages": {last: {"splits": splits}},
        "teacher": None if method == "ctc" else TEACHER,
    }
    files.write_json(folder / "results.json", results | changes)
    if command is not None:
        (folder / "command.txt").write_text(f"train.py base.yaml {command}\n")
    if hyperparams is not None:
        (folder / "hyperparams.yaml").write_text(hyperparams)
    return folder


def labels(folders):
    groups = [Group(summaries) for summaries in group(folders)]
    set_labels(groups)
    return [found.label for found in groups]


def test_runs_are_named_by_network_method_and_teacher(tmp_path):
    made = [
        save(tmp_path / "ctc_lstm" / "1", "ctc", "--seed 1 --method ctc"),
        save(tmp_path / "rkd_ctc" / "1", "rkd+ctc", "--seed 1 --method x"),
        save(tmp_path / "pseudo_gru" / "1", "pseudo", "", student="gru"),
        save(tmp_path / "teacher_lstm" / "1", "ctc", "--epochs 9", epochs=9),
    ]
    assert labels(made) == [
        "lstm: CTC baseline",
        "lstm: RKD then CTC from lstm",
        "gru: pseudo-labels from lstm",
        "teacher lstm",
    ]


def test_options_that_differ_are_named_and_no_others(tmp_path):
    pairs = json.dumps(
        [{"teacher": "encoder.blocks.3", "student": "encoder", "weight": 0.5}]
    )
    shared = "--targets store --noprogressbar --data_folder DATA"
    made = [
        save(tmp_path / "a" / "1", "skd", f"{shared} --epochs 8"),
        save(tmp_path / "b" / "1", "skd", f"{shared} --skd_loss kl"),
        save(tmp_path / "c" / "1", "skd", f"{shared} --pairs '{pairs}'"),
        save(tmp_path / "d" / "1", "skd", f"{shared} --lr 0.01", epochs=32),
        # Told by its own name, as options of its network are
        save(
            tmp_path / "e" / "1",
            "skd",
            f"""{shared} --student_overrides '{{"name": "wide"}}'""",
            student="wide",
        ),
    ]
    assert labels(made) == [
        "lstm: SKD from lstm, 8 epochs",
        "lstm: SKD from lstm, 8 epochs, skd_loss kl",
        "lstm: SKD from lstm, 8 epochs, pairs encoder.blocks.3>encoder>0.5",
        "lstm: SKD from lstm, 32 epochs, lr 0.01",
        "wide: SKD from lstm",
    ]


def test_runs_of_no_plan_are_known_by_their_values(tmp_path):
    text = """
seed: {seed}
lr: {lr}
output_folder: results/{seed}
data_folder:
corpus:
  name: mini
opt_class: !name:torch.optim.AdamW
  lr: {lr}
pairs:
- teacher: encoder
  student: encoder
"""
    made = [
        save(
            tmp_path / f"skd_{lr}" / "1",
            "skd",
            hyperparams=text.format(seed=seed, lr=lr),
        )
        for seed, lr in ((1, 0.1), (2, 0.2))
    ]
    assert options_of(made[0]) == {"lr": "0.1", "pairs": "encoder>encoder"}
    assert labels(made) == [
        "lstm: SKD from lstm, lr 0.1",
        "lstm: SKD from lstm, lr 0.2",
    ]


def test_a_compute_matched_baseline_names_its_student(tmp_path):
    made = [
        save(tmp_path / "skd_lstm" / "1", "skd", "--epochs 8"),
        save(
            tmp_path / "ctc_lstm_at_cost_of_skd_lstm" / "1",
            "ctc",
            "--epochs 20",
            epochs=20,
        ),
    ]
    assert labels(made)[1] == (
        "lstm: CTC baseline, 20 epochs, compute-matched to SKD from lstm, "
        "8 epochs"
    )


@pytest.mark.parametrize("command", [None, "--lr 0.1"])
def test_runs_that_nothing_tells_apart_are_named_by_their_place(
    tmp_path, command
):
    made = [
        save(tmp_path / name / "1", "skd", command) for name in ("one", "two")
    ]
    assert labels(made) == [
        "lstm: SKD from lstm (one)",
        "lstm: SKD from lstm (two)",
    ]
