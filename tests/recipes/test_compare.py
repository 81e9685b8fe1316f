"""A real plan from nothing to its report, on a minute of synthetic speech."""

import csv
import json
from pathlib import Path

import pytest
from small_runs import write_minilibri
from typer.testing import CliRunner

from tutornet_sb.cli import app
from tutornet_sb.experiments.plan import total_seconds
from tutornet_sb.networks import runs

RECIPE = Path(__file__).parents[2] / "recipes" / "LibriSpeech" / "TutorNet"


def compare(*words):
    return CliRunner().invoke(app, ["compare", *map(str, words)])


@pytest.mark.slow
def test_a_plan_is_made_reported_and_not_made_again(tmp_path):
    write_minilibri(tmp_path / "speech")
    results = tmp_path / "results"
    plan = {
        "title": "A tiny plan",
        "recipe": str(RECIPE),
        "results_folder": str(results),
        "corpora": {"tiny": {"file": "small"}},
        "teachers": {"jasper_dr": {"epochs": 1, "augmentation.speeds": None}},
        "students": {
            "small_lstm": {
                "file": "lstm",
                "student_overrides": {"channels": 16, "hidden_size": 16},
            }
        },
        "methods": ["ctc", "rkd+skd"],
        "seeds": [1, 2],
        "options": {"epochs": 2, "rkd.share": 0.5, "targets": "store"},
        "compute_matched_to": "rkd+skd",
    }
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps(plan))
    words = path, "--data", f"tiny={tmp_path / 'speech'}"
    words = *words, "--jobs", 2, "--to", tmp_path / "report"
    done = compare(*words)
    assert done.exit_code == 0, done.stderr

    students = [
        results / "tiny" / "rkd+skd_small_lstm_by_jasper_dr" / str(seed)
        for seed in (1, 2)
    ]
    baselines = [
        results / "tiny" / "ctc_small_lstm" / str(seed) for seed in (1, 2)
    ]
    name = "ctc_small_lstm_compute_matched_to_rkd+skd_small_lstm_by_jasper_dr"
    matched = [results / "tiny" / name / str(seed) for seed in (1, 2)]
    assert all(map(runs.is_finished, students + baselines + matched))
    cost = sum(total_seconds(runs.read_results(run)) for run in students)
    epoch = (
        sum(runs.read_results(run)["train_seconds"] for run in baselines) / 2
    )
    epochs = {runs.read_results(run)["epochs"] for run in matched}
    assert epochs == {round(cost / epoch)}
    # One teacher, and one store of its targets
    (teacher,) = (results / "tiny").glob("teacher_*/*/results.json")
    (store,) = (results / "tiny").glob("targets_*")
    for run in students:
        source = runs.read_results(run)["teacher"]["source"]
        assert source == str(teacher.parent)

    report = tmp_path / "report"
    pictures = {p.stem for p in (report / "pictures").iterdir()}
    assert pictures == {
        "gains_tiny",
        "matched_gains_tiny",
        "learning_tiny_small_lstm",
        "pareto_tiny",
    }
    text = (report / "report.md").read_text()
    assert "What is missing" not in text
    with open(report / "results.csv", newline="") as file:
        rows = {(row["run"], row["split"]): row for row in csv.DictReader(file)}
    row = rows[students[0].parent.name, "test-clean"]
    assert row["reference"] == "ctc_small_lstm"
    assert row["matched_reference"] == name
    for key in ("wer_low", "cer_high", "wer_sd", "p_value", "steps"):
        assert row[key] != "", key
    assert 0 <= float(row["rkd_error_first"]) <= 100
    wers = [
        runs.read_results(run)["stages"]["skd"]["splits"]["test-clean"]["wer"]
        for run in students
    ]
    assert float(row["wer"]) == pytest.approx(sum(wers) / 2)

    before = {p: p.stat().st_mtime_ns for p in results.rglob("results.json")}
    again = compare(*words)
    assert again.exit_code == 0 and again.stdout == done.stdout
    after = {p: p.stat().st_mtime_ns for p in results.rglob("results.json")}
    assert after == before
    assert again.stderr.count("reused: ") == 7
