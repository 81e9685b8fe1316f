"""Names of runs: method, network, teacher and the options that differ."""

import pytest
from small_runs import write_results

from tutornet_sb.experiments.groups import read_groups
from tutornet_sb.experiments.labels import hide_data, options_of

TEACHER = {
    "name": "lstm",
    "source": "results/mini/teacher_lstm/1234",
    "kind": "run",
    "method": "ctc",
}


def save(folder, method, options=None, **changes):
    splits = {"test-clean": {"wer": 20.0, "cer": 5.0}}
    changes = {"teacher": None if method == "ctc" else TEACHER} | changes
    return write_results(
        folder, splits, method, options=options or {}, **changes
    )


def labels(folders):
    return [found.label for found in read_groups(folders)]


def test_runs_are_named_by_network_method_and_teacher(tmp_path):
    hub = {"name": "wav2vec2-base", "source": "a/wav2vec2@1", "kind": "ctc"}
    made = [
        save(tmp_path / "a" / "1", "ctc", {"seed": 1, "stages": ["ctc"]}),
        save(tmp_path / "b" / "1", "rkd+ctc", {"seed": 1, "stages": "x"}),
        save(tmp_path / "c" / "1", "pseudo", student="gru"),
        save(tmp_path / "d" / "1", "ctc", epochs=9, role="teacher"),
        save(tmp_path / "e" / "1", "skd", student="wide", teacher=hub),
    ]
    assert labels(made) == [
        "lstm: CTC baseline",
        "lstm: RKD then CTC from lstm",
        "gru: pseudo-labels from lstm",
        "teacher lstm",
        "wide: SKD from wav2vec2-base",
    ]


def test_options_that_differ_are_named_and_no_others(tmp_path):
    pairs = [
        {"teacher": "encoder.blocks.3", "student": "encoder", "weight": 0.5}
    ]
    shared = {"targets": "store", "data_folder": "/data"}
    overrides = {"student_overrides": {"name": "wide"}}
    made = [
        save(tmp_path / "a" / "1", "skd", shared | {"epochs": 8}),
        save(tmp_path / "b" / "1", "skd", shared | {"skd.loss": "kl"}),
        save(tmp_path / "c" / "1", "skd", shared | {"rkd.pairs": pairs}),
        save(tmp_path / "d" / "1", "skd", shared | {"lr": 0.01}, epochs=32),
        # Named by its own name, as options of its network are
        save(tmp_path / "e" / "1", "skd", shared | overrides, student="wide"),
    ]
    assert labels(made) == [
        "lstm: SKD from lstm, 8 epochs",
        "lstm: SKD from lstm, 8 epochs, skd.loss kl",
        "lstm: SKD from lstm, 8 epochs, rkd.pairs encoder.blocks.3>encoder>0.5",
        "lstm: SKD from lstm, 32 epochs, lr 0.01",
        "wide: SKD from lstm",
    ]


def test_options_that_say_where_and_which_seed_are_left_out():
    options = {
        "seed": 2,
        "output_folder": "results/2",
        "train_csv": ["a.csv"],
        "lr": 0.1,
        "rkd.pairs": [{"teacher": "encoder", "student": "encoder.conv"}],
    }
    assert options_of({"options": options}) == {
        "lr": "0.1",
        "rkd.pairs": "encoder>encoder.conv",
    }
    hidden = hide_data(options)
    assert hidden == options | {"train_csv": "DATA"}


def test_a_compute_matched_baseline_names_its_student(tmp_path):
    made = [
        save(tmp_path / "skd_lstm" / "1", "skd"),
        save(
            tmp_path / "matched" / "1",
            "ctc",
            epochs=20,
            compute_matched_to=["elsewhere/skd_lstm/1"],
        ),
    ]
    assert labels(made)[1] == (
        "lstm: CTC baseline, 20 epochs, compute-matched to SKD from lstm, "
        "8 epochs"
    )


@pytest.mark.parametrize("options", [None, {"lr": 0.1}])
def test_runs_that_nothing_tells_apart_are_named_by_their_place(
    tmp_path, options
):
    made = [
        save(tmp_path / name / "1", "skd", options) for name in ("one", "two")
    ]
    assert labels(made) == [
        "lstm: SKD from lstm (one)",
        "lstm: SKD from lstm (two)",
    ]
