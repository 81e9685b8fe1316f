"""The table of runs."""

import statistics

import pytest
from small_runs import write_results

from tutornet_sb.experiments.compare import short_table, table
from tutornet_sb.experiments.groups import read_finished, summarize
from tutornet_sb.util.errors import InputError


def scores(wer, cer=None):
    cer = wer / 2 if cer is None else cer
    return {"wer": wer, "cer": cer, "utterances": 3, "words": 30}


def save(folder, splits, **changes):
    return write_results(
        folder, splits, **{"corpus": "small", "epochs": 40} | changes
    )


def cells(text):
    """The table as a list of dictionaries."""
    head, rule, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.partition("\n\n")[0].splitlines()
    ]
    assert all(set(cell) == {"-"} for cell in rule)
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_a_summary_quotes_the_last_stage(tmp_path):
    stages = {
        "rkd": {"splits": {"test": scores(99.0)}},
        "skd": {"splits": {"test": scores(12.0)}},
    }
    changes = {"stages": stages, "method": "rkd+skd", "seed": 7}
    folder = save(tmp_path / "run", {}, **changes)
    summary = summarize(folder)
    assert summary["splits"] == {"test": scores(12.0)}
    assert summary["name"] == "lstm"
    assert summary["method"] == "rkd+skd"
    assert (summary["seed"], summary["epochs"]) == (7, 40)
    assert summary["parameters"] == 1_234_567
    assert summary["real_time_factor"] == 0.02


def test_a_folder_without_results_is_named(tmp_path):
    for function in (summarize, lambda folder: table([folder])):
        with pytest.raises(FileNotFoundError, match="empty holds no results"):
            function(tmp_path / "empty")


@pytest.mark.parametrize(
    "change",
    [
        {"stages": []},
        {"stages": {}},
        {"stages": {"ctc": 1}},
        {"stages": {"ctc": {"splits": [1]}}},
        {"stages": {"ctc": {"splits": {"test": 9.0}}}},
        {"stages": {"ctc": {"splits": {"test": {"wer": "9", "cer": 1}}}}},
        {"stages": {"ctc": {"splits": {"test": {"wer": 9.0}}}}},
        {"stages": {"ctc": {"splits": {"test": scores(9.0) | {"latency": 1}}}}},
        {"student": ["lstm"]},
        {"teacher": "jasper_dr"},
        {"teacher": {"name": 1}},
        {"parameters": 10**400},
        {"real_time_factor": None},
        {"epochs": {}},
    ],
    ids=str,
)
def test_figures_of_another_kind_are_refused(tmp_path, change):
    folder = save(tmp_path / "run", {"test": scores(9.0)}, **change)
    with pytest.raises(ValueError, match="results.json in .*run is damaged"):
        table([folder])


@pytest.mark.parametrize("text", ["", "[" * 10**5, "[1]", "7", '"x"', "\xff"])
def test_results_that_are_none(tmp_path, text):
    folder = save(tmp_path / "run", {})
    (folder / "results.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="run.*is damaged"):
        table([folder])


@pytest.mark.parametrize("found", [1, None, "2"])
def test_results_of_another_format_are_refused(tmp_path, found):
    folder = save(tmp_path / "run", {}, format=found)
    expected = f"run: format of results.json must be 2, got {found}: .*repeat"
    with pytest.raises(InputError, match=expected):
        read_finished(folder)
    with pytest.raises(InputError, match=expected):
        table([folder])


def test_one_run_is_one_row(tmp_path):
    folder = save(tmp_path / "run", {"test-clean": scores(12.34, 5.67)})
    (row,) = cells(table([folder]))
    assert row == {
        "corpus": "small",
        "network": "lstm",
        "method": "ctc",
        "teacher": "-",
        "epochs": "40",
        "seeds": "1",
        "parameters (M)": "1.23",
        "real-time factor": "0.020",
        "test-clean WER / CER (%)": "12.3 / 5.7",
        "run": str(folder),
    }


def test_seeds_share_a_row_of_mean_and_standard_deviation(tmp_path):
    wers, cers, speeds = [10.0, 13.0, 11.5], [4.0, 4.5, 8.0], [0.01, 0.02, 0.06]
    folders = [
        save(
            tmp_path / "ctc_lstm" / str(seed),
            {"test": scores(wers[seed], cers[seed])},
            seed=seed,
            real_time_factor=speeds[seed],
        )
        for seed in range(3)
    ]
    (row,) = cells(table(folders))
    assert row["seeds"] == "3"
    spread = [
        f"{statistics.mean(rates):.1f} ± {statistics.stdev(rates):.1f}"
        for rates in (wers, cers)
    ]
    assert spread == ["11.5 ± 1.5", "5.5 ± 2.2"]
    assert row["test WER / CER (%)"] == " / ".join(spread)
    assert row["real-time factor"] == "0.030"
    assert row["run"] == str(tmp_path / "ctc_lstm")


# A seed apart, they would be one row.
@pytest.mark.parametrize(
    "change",
    [
        {"method": "skd"},
        {"corpus": "mini"},
        {"student": "jasper_mini"},
        {"teacher": {"name": "conformer"}},
        {"epochs": 20},
        # The same file with --student_overrides
        {"parameters": 2_345_678},
    ],
    ids=lambda change: next(iter(change)),
)
def test_runs_that_differ_otherwise_keep_rows_of_their_own(tmp_path, change):
    first = save(tmp_path / "1", {"test": scores(10.0)})
    other = save(tmp_path / "2", {"test": scores(20.0)}, seed=2, **change)
    rows = cells(table([first, other]))
    column = "test WER / CER (%)"
    assert [row[column] for row in rows] == ["10.0 / 5.0", "20.0 / 10.0"]
    assert [row["seeds"] for row in rows] == ["1", "1"]


def test_the_rows_keep_the_order_of_the_runs(tmp_path):
    names = ["zebra", "ant", "moth"]
    folders = [
        save(tmp_path / name, {"test": scores(1.0)}, student=name)
        for name in names
    ]
    assert [row["network"] for row in cells(table(folders))] == names


def test_the_folder_of_several_runs_is_named_once(tmp_path, monkeypatch):
    names = ["mini/ctc_lstm/1", "mini/skd_lstm/1", "digits/ctc_lstm/1"]
    for name in names:
        corpus, student, _ = name.split("/")
        save(tmp_path / name, {}, corpus=corpus, student=student)
    text = table([tmp_path / name for name in names])
    assert [row["run"] for row in cells(text)] == names
    assert text.endswith(f"|\n\nRuns are in `{tmp_path}`.")
    # What is in the working folder is named from there.
    monkeypatch.chdir(tmp_path)
    text = table([names[0], tmp_path / names[1]])
    assert [row["run"] for row in cells(text)] == ["ctc_lstm/1", "skd_lstm/1"]
    assert text.endswith("|\n\nRuns are in `mini`.")
    # One folder in another
    save(tmp_path / "one", {})
    save(tmp_path / "one" / "in", {}, student="other")
    some = ["one", "one/in"]
    assert [row["run"] for row in cells(table(some))] == some


def test_the_teacher_of_a_student_is_named(tmp_path):
    folders = [
        save(tmp_path / name, {}, teacher={"name": name}, method="skd")
        for name in ("jasper_dr", "conformer")
    ]
    rows = cells(table([*folders, save(tmp_path / "baseline", {})]))
    assert [row["teacher"] for row in rows] == ["jasper_dr", "conformer", "-"]


def test_a_run_given_twice_counts_once(tmp_path):
    folder = save(tmp_path / "1", {"test": scores(10.0)})
    (row,) = cells(table([folder, folder]))
    assert row["seeds"] == "1"
    assert row["test WER / CER (%)"] == "10.0 / 5.0"


def test_a_split_that_a_run_lacks_is_a_dash(tmp_path):
    folders = [
        save(tmp_path / "1", {"clean": scores(10.0)}),
        save(
            tmp_path / "2",
            {"clean": scores(8.0), "other": scores(16.0)},
            method="skd",
        ),
    ]
    first, second = cells(table(folders))
    assert first["clean WER / CER (%)"] == "10.0 / 5.0"
    assert first["other WER / CER (%)"] == "-"
    assert second["other WER / CER (%)"] == "16.0 / 8.0"


def test_a_split_that_one_seed_lacks_has_no_mean(tmp_path):
    folders = [
        save(tmp_path / "1", {"clean": scores(10.0), "other": scores(9.0)}),
        save(tmp_path / "2", {"clean": scores(12.0)}, seed=2),
    ]
    (row,) = cells(table(folders))
    assert row["clean WER / CER (%)"] == "11.0 ± 1.4 / 5.5 ± 0.7"
    assert row["other WER / CER (%)"] == "-"


def test_the_columns_stand_under_each_other(tmp_path):
    folders = [
        save(tmp_path / "1", {"clean": scores(1.0)}, student="a"),
        save(tmp_path / "two", {"clean": scores(100.0)}, student="longer"),
    ]
    *lines, blank, _ = table(folders).splitlines()
    assert len(lines) == 4 and not blank
    bars = [[i for i, c in enumerate(line) if c == "|"] for line in lines]
    assert bars[0] == bars[1] == bars[2] == bars[3]
    assert all(line[0] == line[-1] == "|" for line in lines)


def test_the_latency_of_streaming_students_has_a_column(tmp_path):
    def timed(median):
        return {"test": scores(9.0) | {"latency": {"median": median}}}

    runs = [
        save(tmp_path / "a" / str(seed), timed(median), seed=seed)
        for seed, median in ((1, 100.0), (2, 131.0))
    ]
    offline = save(tmp_path / "b" / "1", {"test": scores(8.0)}, student="gru")
    # No word was recognised.
    silent = save(tmp_path / "c" / "1", timed(None), student="x")
    rows = cells(table([*runs, offline, silent]))
    column = [row["test latency (ms)"] for row in rows]
    assert column == ["116", "-", "-"]
    assert "test latency (ms)" not in table([offline])


def test_the_short_table_fits_a_terminal(tmp_path):
    """The demo's is 202 characters wide."""
    splits = {name: scores(104.2) for name in ("dev-clean", "test-clean")}
    splits["test-other"] = scores(99.0)
    names = "teacher_jasper_dr", "ctc_lstm", "rkd+skd_lstm_by_jasper_dr"
    folders = []
    for epochs, name in enumerate(names, 8):
        method, student = "ctc", "lstm"
        if name.startswith("rkd"):
            method = "rkd+skd"
        if name.startswith("teacher"):
            student = "jasper_dr"
        teacher = {"name": "jasper_dr"} if method != "ctc" else None
        folders.append(
            save(
                tmp_path / "results" / "mini" / name / "1234",
                splits,
                student=student,
                method=method,
                teacher=teacher,
                epochs=epochs,
            )
        )
    assert len(table(folders).splitlines()[0]) > 160
    text = short_table(folders)
    lines, _, below = text.partition("\n\n")
    assert max(map(len, lines.splitlines())) <= 100
    wide, short = cells(table(folders)), cells(lines)
    for full, row in zip(wide, short, strict=True):
        for key in ("network", "method", "teacher", "epochs"):
            assert row[key] == full[key]
        for split in splits:
            assert row[split] == full[f"{split} WER / CER (%)"]
    assert below.splitlines() == [
        "WER / CER (%) by split; all: corpus small, seeds 1",
        f"Runs in `{tmp_path / 'results' / 'mini'}`, row by row:",
        *(f"    {name}/1234" for name in names),
    ]


def test_the_short_table_of_many_seeds_and_splits(tmp_path):
    splits = "dev-clean", "dev-other", "test-clean", "test-other"
    folders = [
        save(
            tmp_path / name / str(seed),
            {split: scores(10.0 + seed) for split in splits},
            seed=seed,
            student=name,
            method="rkd+skd",
            teacher={"name": "jasper_dr"},
        )
        for name in ("jasper_mini", "deepspeech2")
        for seed in (1, 2, 3)
    ]
    text = short_table(folders)
    lines, _, below = text.partition("\n\n")
    assert max(map(len, lines.splitlines())) <= 100
    for row in cells(lines):
        assert [row[split] for split in splits] == ["12.0 ± 1.0"] * 4
    assert below.startswith("WER (%) by split; all: corpus ")
