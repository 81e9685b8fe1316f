"""Reports of runs whose errors are written by hand."""

import csv
import datetime
import re
import shutil
import statistics

import numpy as np
import pytest
from small_runs import write_metrics, write_results
from typer.testing import CliRunner

from tutornet_sb.cli import app
from tutornet_sb.experiments.groups import (
    COMPUTE_MATCHED,
    EQUAL_EPOCHS,
    FIRST,
    check_teachers,
    find_references,
    group,
    read_metrics,
)
from tutornet_sb.experiments.report import copy_small_files, write_report
from tutornet_sb.experiments.statistics import difference, holm, interval
from tutornet_sb.inference.scores import write_alignments
from tutornet_sb.networks import runs
from tutornet_sb.util import files
from tutornet_sb.util.errors import InputError

TEACHER = {
    "name": "jasper_dr",
    "source": "results/mini/teacher_jasper_dr/1234",
    "kind": "run",
    "method": "ctc",
    "seed": 1234,
    "epochs": 9,
    "parameters": 1_000_000,
    "real_time_factor": 0.05,
    "train_seconds": 500.0,
    "splits": {
        split: {"wer": 9.75, "cer": 3.25}
        for split in ("dev-clean", "test-clean")
    },
    "weights_sha256": "5e" * 32,
}
KEYS = [f"1-2-{number:04d}" for number in range(30)]
PARTS = [
    "Summary",
    "At a glance",
    "Against the baseline",
    "Error rates",
    "Size, speed and cost",
    "Learning curves",
    "Speed and size",
    "Transcripts",
    "How to read this",
    "Runs",
]


def errors_of(seed, rate):
    """Errors of each utterance: words, then characters."""
    rng = np.random.default_rng(seed)
    # The same words for all
    words = 4 + np.arange(len(KEYS)) % 5
    wrong = rng.binomial(words, rate)
    letters = rng.binomial(5 * words, rate / 3)
    rows = zip(wrong, words, letters, 5 * words, strict=True)
    return {
        key: list(map(int, row)) for key, row in zip(KEYS, rows, strict=True)
    }


def rates(errors):
    wrong, words, letters, written = np.array(list(errors.values())).sum(0)
    return {
        "wer": float(100 * wrong / words),
        "cer": float(100 * letters / written),
        "utterances": len(errors),
        "words": int(words),
    }


def save(folder, rate, method="ctc", epochs=4, **changes):
    """A run that left all but its weights."""
    seed = int(folder.name)
    errors = {
        split: errors_of(seed + 100 * number, rate)
        for number, split in enumerate(("dev-clean", "test-clean"))
    }
    stages = {name: {"steps": 50} for name in method.split("+")}
    *_, last = stages
    stages[last]["splits"] = {split: rates(e) for split, e in errors.items()}
    results = {
        "seed": seed,
        "parameters": 250_000,
        "epochs": epochs,
        "train_seconds": 100.0 + seed,
        "real_time_factor": 0.01,
        "stages": stages,
        "teacher": None if method == "ctc" else TEACHER,
    }
    write_results(folder, method=method, **(results | changes))
    files.write_json(folder / "stages" / last / "errors.json", errors)
    references = {key: "ONE TWO THREE" for key in KEYS}
    hypotheses = {key: f"ONE {method.upper()}" for key in KEYS}
    path = folder / "stages" / last / "wer_test-clean.txt"
    write_alignments(path, references, hypotheses)
    wer = results["stages"][last]["splits"]["dev-clean"]["wer"]
    for stage in stages:
        scores = [{"loss": 5.0 - epoch} for epoch in (1, 2)]
        if stage != "rkd":
            for epoch, valid in enumerate(scores, 1):
                valid["WER"] = wer + 20 - 10 * epoch
        epochs = [
            {"epoch": epoch, "seconds": 10.0 * epoch, "valid": valid}
            for epoch, valid in enumerate(scores, 1)
        ]
        write_metrics(folder, stage, epochs)
    return folder


@pytest.fixture(scope="module")
def runs_made(tmp_path_factory):
    """A baseline and a student, two seeds each, and their teacher."""
    root = tmp_path_factory.mktemp("made") / "mini"
    options = {
        "data_folder": "/home/me/my data",
        "seed": 1,
        "train_csv": ["/home/me/my data/train.csv"],
    }
    made = [
        save(root / "ctc_lstm" / str(s), 0.4, options=options) for s in (1, 2)
    ]
    made += [
        save(root / "rkd+skd_lstm" / str(s), 0.2, "rkd+skd") for s in (1, 2)
    ]
    made += [
        save(
            root / "teacher_jasper_dr" / "1234",
            0.1,
            role="teacher",
            student="jasper_dr",
            parameters=1_000_000,
            epochs=9,
        )
    ]
    return made


@pytest.fixture(scope="module")
def report(runs_made, tmp_path_factory):
    to = tmp_path_factory.mktemp("report") / "deep" / "report"
    write_report(runs_made, to, "Does <it> work?", log=str)
    return to


@pytest.fixture(scope="module")
def rows(report):
    with open(report / "results.csv", newline="") as file:
        found = list(csv.DictReader(file))
    return {(row["run"], row["split"]): row for row in found}


def errors_by_seed(number, rate, column):
    """Errors ``(seeds, utterances)`` of two seeds, and units."""
    both = [errors_of(s + 100 * number, rate) for s in (1, 2)]
    wrong = [[e[key][column] for key in KEYS] for e in both]
    return wrong, [both[0][key][column + 1] for key in KEYS]


def test_there_is_a_line_for_each_run_and_split(rows):
    assert list(rows) == [
        (run, split)
        for run in ("ctc_lstm", "rkd+skd_lstm", "teacher_jasper_dr")
        for split in ("dev-clean", "test-clean")
    ]


@pytest.mark.parametrize("split", ["dev-clean", "test-clean"])
@pytest.mark.parametrize(("name", "column"), [("wer", 0), ("cer", 2)])
def test_rates_have_intervals_and_the_spread_of_the_seeds(
    rows, split, name, column
):
    row, number = rows["ctc_lstm", split], split == "test-clean"
    values = [rates(errors_of(s + 100 * number, 0.4))[name] for s in (1, 2)]
    assert float(row[name]) == pytest.approx(statistics.mean(values))
    assert float(row[f"{name}_sd"]) == pytest.approx(statistics.stdev(values))
    assert row[f"{name}_by_seed"] == " ".join(f"{v:.2f}" for v in values)
    errors, units = errors_by_seed(number, 0.4, column)
    found = float(row[f"{name}_low"]), float(row[f"{name}_high"])
    assert found == pytest.approx(interval(errors, units))
    assert (row["utterances"], row["seeds"]) == ("30", "1 2")


def test_a_single_seed_has_no_spread(rows):
    row = rows["teacher_jasper_dr", "dev-clean"]
    assert row["wer_sd"] == "" and row["wer_low"] != ""


def test_students_are_compared_with_their_baseline(rows):
    row = rows["rkd+skd_lstm", "test-clean"]
    ours, words = errors_by_seed(1, 0.2, 0)
    theirs, _ = errors_by_seed(1, 0.4, 0)
    expected = difference(ours, theirs, words)
    assert row["reference"] == "ctc_lstm"
    # Both splits are tests of this report.
    other = difference(
        errors_by_seed(0, 0.2, 0)[0], errors_by_seed(0, 0.4, 0)[0], words
    )
    corrected, _ = holm([expected.p_value, other.p_value])
    for key, value in {
        "wer_difference": expected.points,
        "wer_difference_low": expected.low,
        "wer_difference_high": expected.high,
        "wer_reduction": expected.reduction,
        "wer_reduction_low": expected.reduction_low,
        "wer_reduction_high": expected.reduction_high,
        "p_value": expected.p_value,
        "p_value_holm": corrected,
    }.items():
        assert float(row[key]) == pytest.approx(value), key
    assert row["seeds_better"] == "2 of 2"
    assert (row["seeds_compared"], row["is_sufficient"]) == ("2", "False")
    assert row["teacher_sha256"] == TEACHER["weights_sha256"]
    for run in ("ctc_lstm", "teacher_jasper_dr"):
        assert rows[run, "test-clean"]["reference"] == ""


def test_cost_counts_steps_seconds_and_the_teacher(rows):
    row = rows["rkd+skd_lstm", "dev-clean"]
    assert float(row["steps"]) == 100
    assert float(row["seconds"]) == 101.5
    assert float(row["total_seconds"]) == 601.5
    assert float(row["mb"]) == 1
    baseline = rows["ctc_lstm", "dev-clean"]
    assert baseline["total_seconds"] == baseline["seconds"] == "101.5"
    assert float(baseline["steps"]) == 50


def test_rkd_errors_are_means_over_the_seeds(rows):
    row = rows["rkd+skd_lstm", "dev-clean"]
    assert float(row["rkd_error_first"]) == 4
    assert float(row["rkd_error_last"]) == 3
    assert rows["ctc_lstm", "dev-clean"]["rkd_error_first"] == ""


def test_epochs_until_the_baseline_is_reached(rows, runs_made):
    # The student is below what the baseline ends with at its first figure,
    # which follows two epochs of RKD.
    row = rows["rkd+skd_lstm", "dev-clean"]
    assert float(row["epochs_to_reach_it"]) == 3


def test_the_gain_of_the_last_quarter_tells_convergence(rows, report):
    # Two epochs of RKD, which have no WER, one 10 points above the last
    row = rows["rkd+skd_lstm", "dev-clean"]
    before, last = (
        float(row[f"dev_wer_{part}"]) for part in ("before", "last_quarter")
    )
    assert last == pytest.approx(float(row["wer"]))
    assert before == pytest.approx(last + 10)
    text = (report / "report.md").read_text()
    table = text.partition("## Learning curves")[2].partition("![")[0]
    line = next(t for t in table.split("\n") if "RKD then SKD" in t)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    gained = ["4", f"{before:.1f}", f"{last:.1f}", "10.0"]
    assert cells[1:] == [*gained, "4.000", "3.000"]
    # Of this one no epoch after three quarters of them is known.
    assert rows["ctc_lstm", "dev-clean"]["dev_wer_before"] == ""
    assert "CTC baseline" not in table


def test_the_report_has_all_parts_and_figures(report, rows):
    text = (report / "report.md").read_text()
    page = (report / "report.html").read_text()
    assert re.findall("^## (.+)$", text, re.MULTILINE) == PARTS
    assert re.findall("<h2>(.+?)</h2>", page) == PARTS
    assert text.startswith("# Does <it> work?\n")
    assert "<h1>Does &lt;it&gt; work?</h1>" in page
    row = rows["rkd+skd_lstm", "test-clean"]
    figure = "{:.1f} [{:.1f}, {:.1f}]".format(
        *(float(row[f"wer{part}"]) for part in ("", "_low", "_high"))
    )
    reduction = "{:+.1f} [{:.1f}, {:.1f}]".format(
        *(float(row[f"wer_reduction{part}"]) for part in ("", "_low", "_high"))
    )
    for written in (text, page):
        assert f"{figure} ± " in written
        assert reduction in written
        assert "train.py hparams/base.yaml --data_folder DATA" in written
        assert "Bisani and Ney 2004" in written


def test_the_page_stands_alone(report):
    page = (report / "report.html").read_text()
    # No address of anything, no script, no file beside it
    assert "http" not in re.sub('data:image/png;base64,[^"]+', "", page)
    assert "<script" not in page and "@import" not in page
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert all(
        source.startswith(("data:image/png;base64,", "#")) for source in sources
    )
    assert sum(source.startswith("data:") for source in sources) == 3
    assert len(page.encode()) > 20_000


def test_pictures_lie_beside_the_markdown(report):
    text = (report / "report.md").read_text()
    named = re.findall(r"\]\((pictures/[^)]+)\)", text)
    assert named == [
        "pictures/gains_mini.png",
        "pictures/learning_mini_lstm.png",
        "pictures/pareto_mini.png",
    ]
    for name in named:
        assert (report / name).read_bytes().startswith(b"\x89PNG")


def test_the_summary_gives_the_verdict_and_where_and_when(report, rows):
    text = (report / "report.md").read_text()
    summary = text.partition("## Summary")[2].partition("##")[0]
    row = rows["rkd+skd_lstm", "test-clean"]
    ours, gain = float(row["wer"]), float(row["wer_reduction"])
    theirs = float(rows["ctc_lstm", "test-clean"]["wer"])
    assert gain > 0
    assert (
        "On test-clean of mini, lstm distilled by RKD then SKD from jasper_dr "
        f"makes {gain:.1f} % fewer word errors than its baseline"
    ) in summary
    assert (
        f"(WER {ours:.1f} against {theirs:.1f} %, the teacher's 9.8 %; 95 % "
        "interval"
    ) in summary
    assert "With 2 seeds of each it is not sufficient for a claim." in summary
    assert "2 tests were made" in summary
    assert f"Report of {datetime.date.today()}." in summary
    assert "Abacus 3000, 4 cores" in summary
    assert "torch 2.15.0, python 3.11.7" in summary


@pytest.mark.parametrize(
    "rate, seeds, expected",
    [
        (0.2, 5, "fewer word errors.+more than chance, by 5 seeds of each.$"),
        (0.4, 5, "word errors.+may be by chance: no difference is shown.$"),
        (0.8, 5, "more word errors.+more than chance, by 5 seeds of each.$"),
        (0.2, 1, "With one seed of each it is not sufficient for a claim.$"),
    ],
)
def test_a_verdict_goes_by_its_interval_and_its_seeds(
    tmp_path, rate, seeds, expected
):
    made = []
    for seed in range(seeds):
        folder = tmp_path / "mini" / "ctc_lstm" / str(seed)
        made.append(save(folder, 0.4))
        folder = tmp_path / "mini" / "skd_lstm" / str(seed + 50)
        made.append(save(folder, rate, "skd"))
    write_report(made, tmp_path / "to", "Verdict", log=str)
    text = (tmp_path / "to" / "report.md").read_text()
    verdict = text.partition("## Summary\n\n")[2].partition("\n")[0]
    assert re.search(expected, verdict), verdict


def test_rows_are_named_for_people(report):
    text = (report / "report.md").read_text()
    head, _, *body = text.partition("**mini, WER (%)**")[2].split("\n")[2:7]
    assert [line.split("|")[1].strip() for line in body] == [
        "lstm: CTC baseline",
        "lstm: RKD then SKD from jasper_dr",
        "teacher jasper_dr (1 seed)",
    ]


def test_a_teacher_that_is_not_compared_has_its_row(runs_made, tmp_path):
    write_report(runs_made[:4], tmp_path / "to", "No teacher", log=str)
    with open(tmp_path / "to" / "results.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if "teacher" in row["run"]]
    assert [row["split"] for row in rows] == ["dev-clean", "test-clean"]
    for row in rows:
        assert row["label"] == "teacher jasper_dr (1 seed)"
        assert (row["wer"], row["cer"]) == ("9.75", "3.25")
        assert (row["mb"], row["real_time_factor"]) == ("4.0", "0.05")
    text = (tmp_path / "to" / "report.md").read_text()
    assert re.search(r"teacher jasper_dr \(1 seed\) +\| 9 +\| 1 +\| 9.8", text)


def test_a_teacher_from_elsewhere_has_its_row(tmp_path):
    teacher = {"name": "wav2vec2", "source": "they/wav2vec2@abc"}
    teacher |= {"kind": "ctc"}
    teacher |= {"parameters": 94_400_000, "weights_sha256": "1f" * 32}
    made = [
        save(tmp_path / "mini" / "ctc_lstm" / "1", 0.4),
        save(tmp_path / "mini" / "skd_lstm" / "1", 0.2, "skd", teacher=teacher),
    ]
    write_report(made, tmp_path / "to", "Elsewhere", log=str)
    text = (tmp_path / "to" / "report.md").read_text()
    assert re.search(r"teacher wav2vec2 +\| 94.40 +\| 377.60 +\| - ", text)
    assert "lstm: SKD from wav2vec2 (1 seed)" in text


def test_transcripts_of_all_three_are_shown(report):
    text = (report / "report.md").read_text().partition("## Transcripts")[2]
    # By the baseline's errors, the 16th and the 23rd of 30 utterances
    errors = errors_of(101, 0.4)
    order = sorted(KEYS, key=lambda key: errors[key][0])
    for key in (order[15], order[22]):
        table = text.partition(f"test-clean, utterance {key}**")[2]
        lines = table.split("\n")[4:8]
        assert [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in lines
        ] == [
            ["reference", "ONE TWO THREE"],
            ["teacher jasper_dr", "ONE CTC"],
            ["CTC baseline", "ONE CTC"],
            ["RKD then SKD", "ONE RKD+SKD"],
        ]


def test_a_single_seed_is_marked_and_compared_with_no_mean(runs_made, tmp_path):
    one = save(tmp_path / "mini" / "skd_lstm" / "1", 0.2, "skd")
    write_report([*runs_made, one], tmp_path / "to", "One", log=str)
    with open(tmp_path / "to" / "results.csv", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert rows["skd_lstm"]["label"].endswith(" (1 seed)")
    assert rows["skd_lstm"]["reference"] == ""
    assert rows["rkd+skd_lstm"]["reference"] == "ctc_lstm"
    text = (tmp_path / "to" / "report.md").read_text()
    assert (
        "No CTC baseline with as many epochs and seeds (one, or several): "
        "lstm: SKD from jasper_dr on mini."
    ) in text
    # With one seed each there is an interval, and no test.
    baseline = save(tmp_path / "other" / "ctc_lstm" / "1", 0.4)
    write_report([baseline, one], tmp_path / "to", "One each", log=str)
    with open(tmp_path / "to" / "results.csv", newline="") as file:
        (row,) = [
            row
            for row in csv.DictReader(file)
            if (row["run"], row["split"]) == ("skd_lstm", "test-clean")
        ]
    assert row["reference"] == "ctc_lstm" and row["wer_reduction_low"] != ""
    assert row["p_value"] == "" and row["is_sufficient"] == "False"


def test_runs_are_compared_by_what_they_have_kept(runs_made, tmp_path):
    some = []
    for folder in runs_made:
        copy = tmp_path / folder.parent.name / folder.name
        results = files.read_json(folder / "results.json")
        for stage in results["stages"].values():
            del stage["steps"]
        files.write_json(copy / "results.json", results)
        some.append(copy)
    write_report(some, tmp_path / "report", "Some files", log=str)
    with open(tmp_path / "report" / "results.csv", newline="") as file:
        row = list(csv.DictReader(file))[2]
    assert row["run"] == "rkd+skd_lstm"
    assert "wer_low" not in row and "p_value" not in row
    assert float(row["wer_reduction"]) > 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "No errors of each utterance (errors.json): lstm: CTC base" in text
    assert "No steps of the optimizer: lstm: CTC baseline on mini; ls" in text
    assert "Learning curves" not in text


def test_a_report_can_be_made_again_of_the_small_files(
    runs_made, report, tmp_path
):
    copies = []
    for folder in runs_made:
        copies.append(tmp_path / "mini" / folder.parent.name / folder.name)
        (folder / "model.ckpt").write_text("large")
        copy_small_files(folder, copies[-1])
        (folder / "model.ckpt").unlink()
        assert not (copies[-1] / "model.ckpt").exists()
    write_report(copies, tmp_path / "again", "Does <it> work?", str)
    for name in ("results.csv",):
        assert (tmp_path / "again" / name).read_text() == (
            report / name
        ).read_text()
    # Where data lay is nobody's business.
    text = (report / "report.md").read_text()
    assert "base.yaml --data_folder DATA --seed 1 --train_csv DATA" in text
    for path in (copies[0] / "results.json", report / "report.md"):
        assert "my data" not in path.read_text()


def test_the_metrics_of_a_stage_are_read_epoch_by_epoch(tmp_path):
    write_metrics(
        tmp_path,
        "skd",
        [
            {"epoch": 1, "seconds": 25.7, "valid": {"loss": 183, "WER": 100}},
            {"epoch": 2, "seconds": 102.0, "valid": {"loss": 115, "WER": 86}},
            {"epoch": 2, "seconds": 113.0, "valid": {"loss": 115, "WER": 80}},
        ],
    )
    first, second = read_metrics(tmp_path / "stages" / "skd")
    assert (first["epoch"], first["seconds"]) == (1, 25.7)
    assert first["valid"] == {"loss": 183, "WER": 100}
    # Trained again after a stop
    assert (second["seconds"], second["valid"]["WER"]) == (113, 80)
    assert read_metrics(tmp_path / "none") == []
    path = tmp_path / "stages" / "skd" / runs.METRICS
    path.write_text('{"epoch": 1}\n{"epo')
    with pytest.raises(InputError, match="metrics.jsonl, line 2 is damaged"):
        read_metrics(path.parent)


# -------------------------------------------------------------------- teachers


def test_teachers_of_one_name_must_be_the_same(tmp_path):
    other = TEACHER | {"weights_sha256": "0a" * 32}
    made = [
        save(tmp_path / "mini" / "skd_lstm" / "1", 0.2, "skd"),
        save(
            tmp_path / "mini" / "skd_lstm_one" / "1", 0.2, "skd", teacher=other
        ),
    ]
    done = CliRunner().invoke(
        app, ["compare", *map(str, made), "--to", str(tmp_path / "to")]
    )
    assert done.exit_code == 2
    (line,) = done.stderr.strip().splitlines()[-1:]
    assert (
        f"{made[0]} and {made[1]} were distilled from different teachers"
        in line
    )
    assert "jasper_dr (SHA-256 of the weights 5e5e5e5e5e5e and 0a0a0a0a" in line
    assert not (tmp_path / "to").exists()
    # The seeds of one row as well
    made[1] = save(
        tmp_path / "mini" / "skd_lstm" / "2", 0.2, "skd", teacher=other
    )
    with pytest.raises(ValueError, match="different teachers"):
        check_teachers(groups_of(made).values())
    # On another corpus it is another teacher.
    made[1] = save(
        tmp_path / "b" / "skd_lstm" / "1",
        0.2,
        "skd",
        teacher=other,
        corpus="digits",
    )
    check_teachers(group(made))


def test_students_of_other_teachers_are_not_compared(tmp_path):
    other = TEACHER | {"name": "lstm", "weights_sha256": "0a" * 32}
    other["source"] = "results/mini/teacher_lstm/1234"
    wav2vec2 = {"name": "wav2vec2", "source": "they/wav2vec2@1", "kind": "ctc"}
    wav2vec2 |= {"parameters": 9, "weights_sha256": "0b" * 32}
    hubert = wav2vec2 | {"name": "hubert", "source": "they/hubert@1"}
    found = groups_of(
        [
            save(tmp_path / name / "1", 0.2, "skd", teacher=teacher)
            for name, teacher in (
                ("skd_by_jasper_dr", TEACHER),
                ("skd_by_lstm", other),
                ("skd_by_wav2vec2", wav2vec2),
                ("skd_by_hubert", hubert),
                ("skd_by_hubert_kl", hubert),
            )
        ]
    )
    check_teachers(found.values())
    references = {
        name: [
            r.name for r in find_references(one, list(found.values())).values()
        ]
        for name, one in found.items()
    }
    assert references.pop("skd_by_hubert_kl") == ["skd_by_hubert"]
    assert not any(references.values())


# ------------------------------------------------------------------ references


def groups_of(folders):
    return {found.name: found for found in group(folders)}


def test_references_are_of_the_same_network_corpus_and_epochs(tmp_path):
    def add(name, method="ctc", **changes):
        return save(tmp_path / name / "1", 0.3, method, **changes)

    found = groups_of(
        [
            add("ctc_lstm"),
            add("ctc_lstm_epochs_8", epochs=8),
            add("ctc_wide", parameters=300_000),
            add("ctc_gru", student="gru"),
            add("ctc_digits", corpus="digits"),
            add("teacher_lstm", role="teacher"),
            add("skd_lstm", "skd"),
            add("rkd+skd_lstm_epochs_8", "rkd+skd", epochs=8),
            add("matched", epochs=8, compute_matched_to=["x/skd_lstm/1"]),
            add("skd_crdnn", "skd", student="crdnn"),
            add("skd_lstm_kl", "skd"),
            add("ctc_lstm_lr_0.1"),
        ]
    )

    def references(name):
        chosen = find_references(found[name], list(found.values()))
        return {kind: reference.name for kind, reference in chosen.items()}

    assert references("skd_lstm") == {
        EQUAL_EPOCHS: "ctc_lstm",
        COMPUTE_MATCHED: "matched",
    }
    assert references("rkd+skd_lstm_epochs_8") == {
        EQUAL_EPOCHS: "ctc_lstm_epochs_8"
    }
    assert references("skd_crdnn") == references("ctc_lstm") == {}
    # What differs in other options, and nothing else
    assert references("skd_lstm_kl") == {
        FIRST: "skd_lstm",
        EQUAL_EPOCHS: "ctc_lstm",
    }
    assert references("ctc_lstm_lr_0.1") == {FIRST: "ctc_lstm"}
    assert references("ctc_wide") == references("teacher_lstm") == {}


@pytest.mark.parametrize("is_first", [False, True])
def test_compute_matched_baselines_are_no_choice(tmp_path, is_first):
    # As many epochs by chance, in either order
    matched = {"compute_matched_to": ["results/mini/skd_lstm/1"]}
    made = [
        save(tmp_path / "matched" / "1", 0.4, **matched),
        save(tmp_path / "ctc_lstm" / "1", 0.4),
    ]
    found = groups_of(made if is_first else made[::-1])
    for name in ("ctc_lstm", "matched"):
        assert find_references(found[name], list(found.values())) == {}


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"lr": 0.2}, "b"),
        # An option that the baseline has none of
        ({"pairs": 1, "lr": 0.2}, "b"),
        ({"lr": 0.2, "weight_decay": 32}, "c"),
        # No other: the first, and not one with the value of another option
        ({"kl": 0.2}, "a"),
        ({}, "a"),
    ],
)
def test_of_several_references_the_one_with_the_same_options_counts(
    options, expected, tmp_path
):
    lr = {"lr": 0.2}
    baselines = {"a": {"lr": 0.1}, "b": lr, "c": lr | {"weight_decay": 32}}
    made = [
        save(tmp_path / name / "1", 0.3, options=own)
        for name, own in baselines.items()
    ]
    made.append(save(tmp_path / "skd" / "1", 0.3, "skd", options=options))
    found = groups_of(made)
    (reference,) = find_references(found["skd"], list(found.values())).values()
    assert reference.name == expected


def test_two_corpora_have_runs_of_the_same_names(tmp_path):
    made, matched = [], ["results/x/skd_lstm/1"]
    for corpus, rate in (("a", 0.4), ("b", 0.3)):
        for name, method, changes in (
            ("teacher_lstm", "ctc", {"role": "teacher"}),
            ("ctc_lstm", "ctc", {}),
            ("skd_lstm", "skd", {}),
            ("matched", "ctc", {"epochs": 9, "compute_matched_to": matched}),
        ):
            folder = tmp_path / corpus / name / "1"
            made.append(save(folder, rate, method, corpus=corpus, **changes))
            *_, stage = method.split("+")
            (folder / "stages" / stage / "errors.json").unlink()
    write_report(made, tmp_path / "report", "Two", log=str)
    with open(tmp_path / "report" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # Two splits of the four and of their teacher
    assert len(rows) == 20
    for corpus in ("a", "b"):
        own = [row for row in rows if row["corpus"] == corpus]
        (row,) = [
            row
            for row in own
            if (row["run"], row["split"]) == ("skd_lstm", "test-clean")
        ]
        assert row["reference"] == "ctc_lstm"
        assert row["matched_reference"] == "matched"
    text = (tmp_path / "report" / "report.md").read_text()
    (names,) = re.findall(r"No errors of each .+ \(errors.json\): (.+)\.", text)
    assert names.split("; ") == [
        "teacher lstm on a",
        "lstm: CTC baseline, 4 epochs on a",
        "lstm: SKD from jasper_dr, 4 epochs on a",
        "lstm: CTC baseline, 9 epochs, compute-matched to SKD from jasper_dr, "
        "4 epochs on a",
        "teacher lstm on b and 3 more",
    ]


def test_runs_of_the_same_name_are_distinguished(tmp_path):
    for corpus, rate in (("a", 0.3), ("b", 0.2)):
        save(tmp_path / corpus / "ctc_lstm" / "1", rate)
    write_report(
        [tmp_path / "a/ctc_lstm/1", tmp_path / "b/ctc_lstm/1"],
        tmp_path / "report",
        "Two",
        log=str,
    )
    with open(tmp_path / "report" / "results.csv", newline="") as file:
        names = {row["run"] for row in csv.DictReader(file)}
    assert names == {"a/ctc_lstm", "b/ctc_lstm"}
    shutil.rmtree(tmp_path / "report")
