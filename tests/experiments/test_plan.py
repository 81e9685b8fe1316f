"""Plans: what they ask for, what is wrong with them, and how they are run."""

import fcntl
import json
import multiprocessing
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from tutornet_sb.cli import app
from tutornet_sb.experiments.compare import short_table, table
from tutornet_sb.experiments.jobs import (
    find_finished,
    is_made,
    log_of,
    run_jobs,
)
from tutornet_sb.experiments.plan import PlanError, read_plan
from tutornet_sb.networks import runs
from tutornet_sb.util import signals
from tutornet_sb.util.files import read_json

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "LibriSpeech" / "TutorNet"
# It takes options as train.py does and leaves what that leaves, for nothing.
TRAIN = """
import json, os, signal, sys, time
from pathlib import Path

from ruamel.yaml import YAML

words = [word for word in sys.argv[1:] if word != "--noprogressbar"]
main_file, words = words[0], words[1:]
options = {
    key[2:]: YAML(typ="safe").load(value)
    for key, value in zip(words[::2], words[1::2])
}
folder = Path(options["output_folder"])
diary = Path("diary.txt")


def note(what):
    with diary.open("a") as file:
        print(what, folder.parent.name, folder.name, file=file)


note("start")
teacher = options.get("teacher.folder")
method = "+".join(options.get("stages", ["ctc"]))
if method != "ctc" and not (Path(teacher) / "results.json").is_file():
    sys.exit("there is no teacher")
assert os.environ["OMP_NUM_THREADS"]
if Path(f"stubborn_{folder.parent.name}").exists():
    signal.signal(
        signal.SIGTERM, lambda *_: Path(f"got_{folder.parent.name}").touch()
    )
epochs = int(options.get("epochs", 8))
stage = folder / "stages" / "ctc"
stage.mkdir(parents=True, exist_ok=True)
log = stage / "metrics.jsonl"
done = len(log.read_text().splitlines()) if log.is_file() else 0
for epoch in range(done + 1, epochs + 1):
    if Path(f"fail_{folder.parent.name}").exists():
        sys.exit("RuntimeError: it was made to fail")
    while Path(f"hang_{folder.parent.name}").exists() and epoch == 3:
        time.sleep(0.05)
    figures = {"epoch": epoch, "seconds": float(epoch), "valid": {"WER": 50.0}}
    with log.open("a") as file:
        print(json.dumps(figures), file=file)
role = "baseline" if method == "ctc" else "student"
results = {
    "format": 2,
    "role": "teacher" if "teacher" in main_file else role,
    "main_file": Path(main_file).name,
    "options": options,
    "compute_matched_to": options.get("compute_matched_to"),
    "method": method,
    "corpus": "mini",
    "student": Path(options["student_yaml"]).stem,
    "seed": options["seed"],
    "parameters": 1000,
    "epochs": epochs,
    "train_audio_seconds": 60.0,
    "train_seconds": 10.0 * epochs,
    "real_time_factor": 0.01,
    "weights_sha256": os.environ.get("WEIGHTS", "0") * 64,
    "stages": {"ctc": {"splits": {"dev-clean": {"wer": 50.0, "cer": 20.0}}}},
    "teacher": None,
}
if method != "ctc":
    found = json.loads((Path(teacher) / "results.json").read_text())
    found |= {"name": found["student"], "source": teacher, "kind": "run"}
    results["teacher"] = found
(folder / "results.json").write_text(json.dumps(results))
note("end")
"""
PLAN = """
recipe: recipe
corpora: [mini]
teachers: {jasper_dr: {epochs: 20, seed: 7}}
students: [lstm]
methods: [ctc, skd, rkd+skd]
seeds: [1, 2]
options: {targets: store}
"""


@pytest.fixture
def recipe(tmp_path):
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "hparams").symlink_to(RECIPE / "hparams")
    (folder / "train.py").write_text(TRAIN)
    return folder


@pytest.fixture
def plan(tmp_path, recipe):
    """Writes a plan, that above with changes, and reads it."""

    def write(data=None, only=None, **changes):
        path = tmp_path / "my plan.yaml"
        content = YAML(typ="safe").load(PLAN) | changes
        content = {k: v for k, v in content.items() if v is not ...}
        # JSON is YAML too.
        path.write_text(json.dumps(content))
        return read_plan(path, data, only)

    return write


def folders(plan):
    prefix = "results/my plan/"
    assert all(job.folder.startswith(prefix) for job in plan.jobs)
    return [job.folder.removeprefix(prefix) for job in plan.jobs]


def options_of(job):
    """The options of a command line."""
    words = job.command()
    assert words[:2] == [sys.executable, "train.py"]
    assert words[3] == "--noprogressbar"
    return dict(zip(words[4::2], words[5::2], strict=True))


def diary(recipe):
    return (recipe / "diary.txt").read_text().splitlines()


def states(outcomes):
    return [
        ("/".join(Path(outcome.job.folder).parts[-2:]), outcome.state)
        for outcome in outcomes
    ]


# ------------------------------------------------------------------- expansion


def test_a_plan_is_the_product_of_its_lists_and_a_teacher(plan):
    assert folders(plan()) == [
        "mini/teacher_jasper_dr/7",
        "mini/ctc_lstm/1",
        "mini/skd_lstm_by_jasper_dr/1",
        "mini/rkd+skd_lstm_by_jasper_dr/1",
        "mini/ctc_lstm/2",
        "mini/skd_lstm_by_jasper_dr/2",
        "mini/rkd+skd_lstm_by_jasper_dr/2",
    ]


def test_command_lines_say_what_the_plan_says(plan):
    teacher, baseline, _, student, *_ = plan().jobs
    shared = {
        "--corpus_yaml": "hparams/corpora/mini.yaml",
        "--results_folder": "results/my plan",
    }
    assert teacher.command()[2] == "hparams/teacher.yaml"
    assert options_of(teacher) == shared | {
        "--student_yaml": "hparams/models/jasper_dr.yaml",
        "--epochs": "20",
        "--seed": "7",
        "--output_folder": "results/my plan/mini/teacher_jasper_dr/7",
    }
    shared |= {
        "--targets": "store",
        "--student_yaml": "hparams/models/lstm.yaml",
        "--seed": "1",
    }
    files = {job.command()[2] for job in (baseline, student)}
    assert files == {"hparams/base.yaml"}
    assert options_of(baseline) == shared | {
        "--stages": '["ctc"]',
        "--output_folder": "results/my plan/mini/ctc_lstm/1",
    }
    assert options_of(student) == shared | {
        "--stages": '["rkd", "skd"]',
        "--teacher.folder": "results/my plan/mini/teacher_jasper_dr/7",
        "--output_folder": "results/my plan/mini/rkd+skd_lstm_by_jasper_dr/1",
    }
    assert student.needs == (teacher.folder,)
    assert baseline.needs == teacher.needs == ()
    # Of base.yaml and of the teacher
    assert (student.epochs, teacher.epochs) == (8, 20)


def test_a_streaming_baseline_is_timed_by_the_teacher(plan):
    found = plan(students=["lstm_streaming"], methods=["ctc"], seeds=[1])
    teacher, baseline = found.jobs
    assert baseline.needs == (teacher.folder,)
    assert options_of(baseline)["--teacher.folder"] == teacher.folder


def test_variations_are_combined_and_named(plan):
    found = plan(
        methods=["rkd+skd"],
        seeds=[1],
        vary={
            "rkd.frame_weighting": ["uniform", "energy"],
            "layers": {
                "last": None,
                "both": {
                    "rkd.pairs": [
                        {"teacher": "encoder", "student": "encoder"},
                        {"teacher": "encoder", "student": "encoder.conv"},
                    ]
                },
            },
        },
    )
    prefix = "mini/rkd+skd_lstm_by_jasper_dr"
    assert folders(found)[1:] == [
        f"{prefix}_rkd.frame_weighting_uniform_last/1",
        f"{prefix}_rkd.frame_weighting_uniform_both/1",
        f"{prefix}_rkd.frame_weighting_energy_last/1",
        f"{prefix}_rkd.frame_weighting_energy_both/1",
    ]
    words = options_of(found.jobs[4])
    assert words["--rkd.frame_weighting"] == "energy"
    pairs = YAML(typ="safe").load(words["--rkd.pairs"])
    assert [pair["student"] for pair in pairs] == ["encoder", "encoder.conv"]
    assert "--rkd.pairs" not in options_of(found.jobs[3])


def test_experiments_share_runs_and_differ_in_what_they_say(plan):
    found = plan(
        experiments=[
            {"seeds": [1]},
            {"methods": ["rkd+skd"], "vary": {"epochs": [4]}, "seeds": [1]},
            {"methods": ["ctc"], "seeds": [1, 5], "options": {}},
        ]
    )
    assert folders(found) == [
        "mini/teacher_jasper_dr/7",
        "mini/ctc_lstm/1",
        "mini/skd_lstm_by_jasper_dr/1",
        "mini/rkd+skd_lstm_by_jasper_dr/1",
        "mini/rkd+skd_lstm_by_jasper_dr_epochs_4/1",
        "mini/ctc_lstm/5",
    ]
    assert [job.epochs for job in found.jobs] == [20, 8, 8, 8, 4, 8]


def test_corpora_students_and_teachers_have_names_and_options(plan, tmp_path):
    (tmp_path / "speech").mkdir()
    found = plan(
        data={"digits": tmp_path / "speech"},
        corpora={
            "mini": None,
            "digits": {"file": "small", "corpus_overrides": {"epochs": 3}},
        },
        students={
            "wide": {
                "file": "lstm",
                "student_overrides": {"hidden_size": 128},
            }
        },
        teachers={"jasper_dr": None, "conformer": {"epochs": 9}},
        methods=["rkd+skd"],
        seeds=[1],
        options=...,
    )
    assert folders(found) == [
        "mini/teacher_jasper_dr/1234",
        "mini/teacher_conformer/1234",
        "digits/teacher_jasper_dr/1234",
        "digits/teacher_conformer/1234",
        "mini/rkd+skd_wide_by_jasper_dr/1",
        "mini/rkd+skd_wide_by_conformer/1",
        "digits/rkd+skd_wide_by_jasper_dr/1",
        "digits/rkd+skd_wide_by_conformer/1",
    ]
    words = options_of(found.jobs[-1])
    assert words["--student_yaml"] == "hparams/models/lstm.yaml"
    assert YAML(typ="safe").load(words["--student_overrides"]) == {
        "hidden_size": 128,
        "name": "wide",
    }
    assert words["--corpus_yaml"] == "hparams/corpora/small.yaml"
    overrides = YAML(typ="safe").load(words["--corpus_overrides"])
    assert overrides == {"epochs": 3, "name": "digits"}
    assert words["--data_folder"] == str(tmp_path / "speech")
    assert found.jobs[-1].epochs == 3
    # As many as the corpus has for its teacher, and as the plan has
    assert [job.epochs for job in found.jobs[:4]] == [14, 9, 70, 9]


def test_a_corpus_in_tables(plan, recipe):
    tables = {f"{kind}_csv": f"{kind}.csv" for kind in ("train", "valid")}
    tables["test_csv"] = "test.csv"
    for name in tables.values():
        (recipe / name).write_text("path,text\n1.wav,größer\n", "utf-8")
    corpora = {"german": {"file": "own", **tables}}
    found = plan(corpora=corpora, methods=["ctc"], seeds=[1])
    assert folders(found) == ["german/ctc_lstm/1"]
    for key, name in tables.items():
        assert options_of(found.jobs[0])[f"--{key}"] == name
    (recipe / "test.csv").unlink()
    with pytest.raises(PlanError, match=r"german: there is no .*test\."):
        plan(corpora=corpora, methods=["ctc"], seeds=[1])
    with pytest.raises(PlanError, match="say where they lie by --train_csv"):
        plan(corpora=["own"], methods=["ctc"], seeds=[1])


def test_one_corpus_of_a_plan(plan):
    # The other one need not be there.
    found = plan(only=["mini"], corpora=["mini", "small"], seeds=[1])
    assert {job.folder.split("/")[2] for job in found.jobs} == {"mini"}
    with pytest.raises(PlanError, match="--corpus: .* did you mean mini"):
        plan(only=["mimi"])


def test_the_teacher_of_the_corpus_is_the_default(plan):
    found = plan(teachers=..., methods=["skd"], seeds=[1])
    assert folders(found) == [
        "mini/teacher_jasper_dr/1234",
        "mini/skd_lstm_by_jasper_dr/1",
    ]


def test_a_pretrained_teacher_is_not_trained(plan, recipe):
    there = recipe / "old"
    there.mkdir()
    for name in ("model.yaml", "model.ckpt", "tokenizer.model", "results.json"):
        (there / name).write_text("{}")
    (job,) = plan(
        teachers={"old": {"folder": "old"}}, methods=["skd"], seeds=[1]
    ).jobs
    assert options_of(job)["--teacher.folder"] == "old"
    assert job.needs == ()
    (job,) = plan(
        teachers={"w2v": {"source": "a/b", "revision": "c0ffee"}},
        methods=["skd"],
        seeds=[1],
    ).jobs
    words = options_of(job)
    assert words["--teacher.source"] == "a/b"
    assert words["--teacher.revision"] == "c0ffee"
    assert "--teacher.folder" not in words


def test_options_of_speechbrain_reach_students_and_teachers(plan):
    found = plan(options={"device": "cpu", "jit": True}, seeds=[1])
    for job in found.jobs:
        words = job.command()
        assert "--jit" in words and "True" not in words
        assert words[words.index("--device") + 1] == "cpu"


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"method": ["ctc"]}, "'method'; did you mean methods"),
        ({"methods": ["ctc", "rdk+skd"]}, "'rdk.skd'; did you mean rkd.skd"),
        ({"methods": []}, "methods: must be a list"),
        ({"students": ["lsmt"]}, "'lsmt'; did you mean lstm"),
        ({"students": ...}, "students: names nothing"),
        ({"corpora": ["mimi"]}, "'mimi'; did you mean mini"),
        ({"teachers": ["jasper"]}, "'jasper'; did you mean jasper_"),
        ({"teachers": {"jasper_dr": {"epoch": 3}}}, "did you mean epochs"),
        ({"teachers": {"x": {"folder": "none"}}}, "no finished run in none"),
        ({"seeds": [1, "two"]}, "'two' is no whole number"),
        ({"seeds": ...}, "seeds: must be a list"),
        (
            {"options": {"rkd.frame_weigthing": "x"}},
            "did you mean rkd.frame_weighting",
        ),
        ({"options": {"seed": 3}}, "seed follows from the plan's seeds"),
        ({"vary": {"skd.los": ["kl"]}}, "did you mean skd.loss"),
        ({"vary": {"a": {"b": {"lambda": 1}}}}, "vary: a: b: no option"),
        ({"vary": {"rkd.pairs": [[1]]}}, "give it a name"),
        ({"vary": {"lr": []}}, "vary: lr: names nothing"),
        ({"vary": ["lr"]}, "vary: must be a mapping"),
        ({"experiments": [{"student": []}]}, "number 1: .* mean students"),
        (
            {"experiments": [{"corpora": ["x"]}]},
            "no entry of the plan",
        ),
        ({"compute_matched_to": "rkd+ctc"}, "compute_matched_to: no method of"),
        ({"recipe": "."}, "there is no .*train.py"),
        ({"corpora": ["small"]}, "--data small=FOLDER"),
        # What only the run would have found
        ({"options": {"lr": "fast"}}, "lr must be"),
        ({"options": {"intermediate": [{"weight": 1}]}}, "intermediate"),
        ({"options": {"skd.loss": "kll"}}, "kll"),
        ({"options": {"rkd.frame_weighting": "enrgy"}}, "enrgy"),
        (
            {"options": {"student_overrides": {"hiden_size": 3}}},
            "no key 'hiden_size'",
        ),
        (
            {
                "experiments": [
                    {"options": {"lr": 0.1}},
                    {"options": {"lr": 0.2}},
                ]
            },
            "would be two runs, which differ in lr: put that under vary",
        ),
    ],
)
def test_a_mistake_is_one_clear_error(plan, recipe, changes, found):
    with pytest.raises(PlanError, match=found) as error:
        plan(**changes)
    assert "my plan.yaml: " in str(error.value)
    assert "\n" not in str(error.value)
    assert not (recipe / "diary.txt").exists()


def test_data_of_a_corpus_that_the_plan_does_not_name(plan, tmp_path):
    with pytest.raises(PlanError, match="'mimi'; did you mean mini"):
        plan(data={"mimi": tmp_path})
    with pytest.raises(PlanError, match="there is no .*nowhere"):
        plan(data={"mini": tmp_path / "nowhere"})


@pytest.mark.parametrize(
    "text", ["methods: [ctc", "- a list", "seeds: !apply:os.getcwd []"]
)
def test_a_plan_that_is_no_plain_yaml(tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(PlanError, match="plan.yaml"):
        read_plan(path)
    with pytest.raises(FileNotFoundError, match="no plan .*none.yaml"):
        read_plan(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "benchmarks" / "plans").glob("*.yaml")),
    ids=lambda path: path.stem,
)
def test_the_plans_of_the_benchmarks_can_be_read(path):
    embedded = "mini_20h" if path.stem == "large" else "mini"
    found = read_plan(path, only=[embedded])
    assert found.recipe == RECIPE
    # Its teacher, and students of it
    stages = [job.options.get("stages") for job in found.jobs]
    assert None in stages and ["rkd", "skd"] in stages


# --------------------------------------------------------------------- running


def test_the_teacher_is_trained_once_and_first(plan, recipe):
    found = plan()
    outcomes = run_jobs(found.jobs, found.recipe, at_once=3)
    assert [outcome.state for outcome in outcomes] == ["made"] * 7
    lines = diary(recipe)
    assert sum("teacher" in line for line in lines) == 2
    students = [i for i, line in enumerate(lines) if line.startswith("start")]
    students = [i for i in students if "_by_" in lines[i]]
    assert len(students) == 4
    assert min(students) > lines.index("end teacher_jasper_dr 7")
    for job in found.jobs:
        log = log_of(recipe / job.folder).read_text()
        assert log.splitlines()[0] == f"$ {shlex.join(job.command())}"


@pytest.mark.slow
def test_finished_runs_are_reused(plan, recipe):
    found = plan(seeds=[1])
    run_jobs(found.jobs, found.recipe)
    before = diary(recipe)
    more = plan(seeds=[1, 3], methods=["ctc"])
    outcomes = run_jobs(more.jobs, more.recipe)
    assert states(outcomes) == [
        ("ctc_lstm/1", "reused"),
        ("ctc_lstm/3", "made"),
    ]
    assert diary(recipe) == [*before, "start ctc_lstm 3", "end ctc_lstm 3"]


def test_a_run_by_another_teacher_than_that_of_now_is_refused(
    plan, recipe, tmp_path, monkeypatch
):
    found = plan(seeds=[1], methods=["ctc", "skd"])
    run_jobs(found.jobs, found.recipe)
    teacher, _, student = (job.folder for job in found.jobs)
    # Trained again, it has become another.
    (recipe / teacher / "results.json").unlink()
    monkeypatch.setenv("WEIGHTS", "1")
    result = compare(tmp_path)
    assert result.exit_code == 1
    failed = result.stderr.strip().splitlines()[-1]
    assert f"{student} failed: it was distilled from other weights" in failed
    assert teacher in failed
    # The others are made, and compared.
    assert "2 of 3" not in result.stderr and "1 of 3 runs" in result.stderr
    assert "skd" not in result.stdout and "| ctc " in result.stdout


def test_a_plan_that_says_the_same_in_another_order_reuses_its_runs(
    plan, recipe
):
    options = {"lr": 0.1, "skd.weight": 0.2}
    found = plan(methods=["ctc"], seeds=[1], options=options)
    run_jobs(found.jobs, found.recipe)
    turned = dict(reversed(options.items()))
    other = plan(methods=["ctc"], seeds=[1], options=turned)
    assert other.jobs[0].command() != found.jobs[0].command()
    (outcome,) = run_jobs(other.jobs, other.recipe)
    assert outcome.state == "reused"
    # Values that change places are another run.
    swapped = dict(zip(options, reversed(options.values()), strict=True))
    other = plan(methods=["ctc"], seeds=[1], options=swapped)
    assert find_finished(other.jobs, other.recipe) == []


def test_what_else_makes_another_run(plan, recipe):
    (job,) = plan(methods=["ctc"], seeds=[1], options={"delay": 0.1}).jobs
    run_jobs([job], recipe)
    assert is_made(job, recipe)
    # As null it is another value than left out, on another device the same.
    for key, value, same in (("lr", None, False), ("device", "cuda", True)):
        other = job._replace(options=job.options | {key: value})
        assert is_made(other, recipe) == same
    other = job._replace(main_file="hparams/other.yaml")
    assert not is_made(other, recipe)
    path = recipe / job.folder / "results.json"
    path.write_text(json.dumps(read_json(path) | {"format": 1}))
    assert not is_made(job, recipe)


@pytest.mark.slow
def test_a_finished_run_of_another_command_is_not_taken_for_this(plan, recipe):
    found = plan(methods=["ctc"], seeds=[1])
    run_jobs(found.jobs, found.recipe)
    other = plan(methods=["ctc"], seeds=[1], options={"lr": 0.1})
    # It is for train.py to decide whether that is the same experiment.
    (outcome,) = run_jobs(other.jobs, other.recipe)
    assert outcome.state == "made"
    assert diary(recipe).count("start ctc_lstm 1") == 2


@pytest.mark.slow
def test_a_failed_run_is_named_and_the_others_go_on(plan, recipe):
    (recipe / "fail_skd_lstm_by_jasper_dr").touch()
    found = plan(seeds=[1])
    outcomes = run_jobs(found.jobs, found.recipe)
    assert states(outcomes) == [
        ("teacher_jasper_dr/7", "made"),
        ("ctc_lstm/1", "made"),
        ("skd_lstm_by_jasper_dr/1", "failed"),
        ("rkd+skd_lstm_by_jasper_dr/1", "made"),
    ]
    (failed,) = [outcome for outcome in outcomes if outcome.reason]
    assert "RuntimeError: it was made to fail (exit code 1" in failed.reason
    assert str(log_of(recipe / failed.job.folder)) in failed.reason
    # Put right, the plan makes what is missing.
    (recipe / "fail_skd_lstm_by_jasper_dr").unlink()
    outcomes = run_jobs(found.jobs, found.recipe)
    assert [outcome.state for outcome in outcomes] == [
        "reused",
        "reused",
        "made",
        "reused",
    ]


def test_without_its_teacher_a_student_is_left_out(plan, recipe):
    (recipe / "fail_teacher_jasper_dr").touch()
    found = plan(seeds=[1], methods=["skd", "ctc"])
    outcomes = run_jobs(found.jobs, found.recipe)
    assert sorted(states(outcomes)) == [
        ("ctc_lstm/1", "made"),
        ("skd_lstm_by_jasper_dr/1", "left out"),
        ("teacher_jasper_dr/7", "failed"),
    ]
    assert not any("skd" in line for line in diary(recipe))


def test_no_more_runs_than_asked_for_at_a_time(plan, recipe):
    found = plan(methods=["ctc"], seeds=[1, 2, 3, 4])
    run_jobs(found.jobs, found.recipe, at_once=2)
    running, most = 0, 0
    for line in diary(recipe):
        running += 1 if line.startswith("start") else -1
        most = max(most, running)
    assert most <= 2


def test_a_compute_matched_baseline(plan, recipe):
    found = plan(
        methods=["ctc", "rkd+skd"],
        compute_matched_to="rkd+skd",
        vary={"epochs": [2]},
    )
    *_, last = found.jobs
    assert last.epochs is None
    assert Path(last.folder).parent.name == (
        "ctc_lstm_compute_matched_to_rkd+skd_lstm_by_jasper_dr_epochs_2"
    )
    students = last.options["compute_matched_to"]
    folder = "results/my plan/mini/rkd+skd_lstm_by_jasper_dr_epochs_2"
    assert students == [f"{folder}/1", f"{folder}/2"]
    assert set(last.needs) > set(students)
    outcomes = run_jobs(found.jobs, found.recipe, at_once=2)
    # 10 s an epoch: 20 of the teacher's and 2 of the student's
    for seed in (1, 2):
        results = runs.read_results(
            Path(recipe / last.folder).parent / str(seed)
        )
        assert results["epochs"] == 22
        assert results["compute_matched_to"] == students
    assert {outcome.state for outcome in outcomes} == {"made"}
    # Its epochs stay when the others take another time.
    for folder in students:
        path = recipe / folder / "results.json"
        path.write_text(json.dumps(read_json(path) | {"train_seconds": 90.0}))
    again = run_jobs(found.jobs, found.recipe)
    assert {outcome.state for outcome in again} == {"reused"}
    assert len(find_finished(found.jobs, found.recipe)) == len(found.jobs)
    # But it is no run with other options.
    path = recipe / last.folder / "results.json"
    path.write_text(path.read_text().replace('"store"', '"online"'))
    other = [job for job in found.jobs if not is_made(job, found.recipe)]
    assert other == [last]


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def start_and_hang(found, recipe):
    """Start the command, whose only run hangs in its third epoch."""
    (job,) = found.jobs
    (recipe / "hang_ctc_lstm").touch()
    words = ["compare", str(recipe.parent / "my plan.yaml")]
    process = multiprocessing.get_context("fork").Process(
        target=app, args=(words,)
    )
    process.start()
    epochs = recipe / job.folder / "stages" / "ctc" / "metrics.jsonl"
    wait_until(
        lambda: epochs.is_file() and len(epochs.read_text().split("\n")) > 2
    )
    return process, recipe / job.folder, epochs


def is_locked(path):
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL]
)
def test_a_killed_plan_continues(plan, recipe, capfd, number):
    found = plan(methods=["ctc"], seeds=[1])
    process, folder, epochs = start_and_hang(found, recipe)
    os.kill(process.pid, number)
    process.join()
    is_killed = number == signal.SIGKILL
    assert process.exitcode == (-number if is_killed else signals.EXIT_CODE)
    assert is_killed or "The same command resumes" in capfd.readouterr().err
    assert not (folder / "results.json").exists()
    # A run that has outlived it is not trained a second time beside.
    assert is_locked(log_of(folder)) == is_killed
    (recipe / "hang_ctc_lstm").unlink()
    (outcome,) = run_jobs(found.jobs, found.recipe)
    # The one that has outlived it was waited for and needs nothing more.
    assert outcome.state == ("reused" if is_killed else "made")
    assert len(epochs.read_text().splitlines()) == 8
    assert read_json(folder / "results.json")["epochs"] == 8


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait_for_the_runs(plan, recipe, second):
    found = plan(methods=["ctc"], seeds=[1])
    (recipe / "stubborn_ctc_lstm").touch()
    process, folder, _ = start_and_hang(found, recipe)
    os.kill(process.pid, signal.SIGTERM)
    wait_until((recipe / "got_ctc_lstm").exists)
    assert is_locked(log_of(folder)) and process.is_alive()
    os.kill(process.pid, second)
    if second == signal.SIGTERM:
        process.join()
        assert is_locked(log_of(folder))
    # Then the run itself ends, which one of another kind has waited for.
    (recipe / "hang_ctc_lstm").unlink()
    process.join()
    at_once = 128 + second
    code = at_once if second == signal.SIGTERM else signals.EXIT_CODE
    assert process.exitcode == code
    wait_until(lambda: not is_locked(log_of(folder)))
    assert (folder / "results.json").is_file()


# ---------------------------------------------------------------- the command


def compare(tmp_path, *arguments):
    words = ["compare", tmp_path / "my plan.yaml", *arguments]
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_makes_runs_and_reports(plan, recipe, tmp_path):
    plan(seeds=[1], title="A question")
    document = tmp_path / "doc.md"
    document.write_text("<!-- here -->\n<!-- end here -->\n")
    to = tmp_path / "out"
    options = ("--to", to, "--into", document, "--name", "here")
    result = compare(tmp_path, "--jobs", 2, *options)
    assert result.exit_code == 0, result.stderr
    assert "# A question" in (to / "report.md").read_text()
    assert (to / "report.html").is_file() and (to / "results.csv").is_file()
    copies = [
        to / "runs" / "mini" / name
        for name in (
            "teacher_jasper_dr/7",
            "ctc_lstm/1",
            "skd_lstm_by_jasper_dr/1",
            "rkd+skd_lstm_by_jasper_dr/1",
        )
    ]
    assert result.stdout == short_table(copies) + "\n"
    assert f"the report is {to / 'report.html'}" in result.stderr
    assert table(copies) in document.read_text()
    # The same report of what was kept
    again = CliRunner().invoke(
        app, ["compare", *map(str, copies), "--to", str(tmp_path / "again")]
    )
    assert again.exit_code == 0 and again.stdout == result.stdout
    html = tmp_path / "again" / "report.html"
    assert html.is_file() and f"the report is {html}" in again.stderr
    assert (tmp_path / "again" / "results.csv").read_text() == (
        to / "results.csv"
    ).read_text()


@pytest.mark.slow
def test_the_command_names_what_failed_and_reports_the_rest(
    plan, recipe, tmp_path
):
    (recipe / "fail_skd_lstm_by_jasper_dr").touch()
    found = plan(seeds=[1])
    result = compare(tmp_path)
    assert result.exit_code == 1
    assert "1 of 4 runs are missing" in result.stderr
    failed = result.stderr.strip().splitlines()[-1]
    assert "skd_lstm_by_jasper_dr/1 failed: RuntimeError" in failed
    assert str(log_of(recipe / found.jobs[2].folder)) in failed
    assert "rkd+skd_lstm_by_jasper_dr" in result.stdout
    report = recipe / "results" / "my plan" / "report" / "report.md"
    assert "rkd+skd_lstm_by_jasper_dr" in report.read_text()


@pytest.mark.slow
def test_the_command_reports_on_what_is_finished(plan, recipe, tmp_path):
    plan(methods=["ctc"], seeds=[1])
    # None is finished.
    result = compare(tmp_path, "--finished", "--to", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "0 of 1 runs are finished" in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.endswith(
        "no run is finished, so no report is written: `tutornet compare "
        f"{tmp_path / 'my plan.yaml'}` makes the runs"
    )
    assert not (tmp_path / "out").exists()
    assert compare(tmp_path).exit_code == 0
    # One finished, the rest not there, the compute to match not known yet
    options = {"vary": {"epochs": [2, 8]}, "compute_matched_to": "rkd+skd"}
    shared = {"methods": ["ctc", "rkd+skd"], "seeds": [1]}
    experiments = [{"methods": ["ctc"], "seeds": [1]}, shared | options]
    plan(experiments=experiments)
    folders = {path.parent for path in recipe.rglob("results.json")}
    result = compare(tmp_path, "--finished", "--to", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "1 of 8 runs are finished" in result.stderr
    assert folders == {path.parent for path in recipe.rglob("results.json")}
    assert "ctc_lstm" in (tmp_path / "out" / "report.md").read_text()
    # All of it, so that this is known
    assert compare(tmp_path).exit_code == 0
    result = compare(tmp_path, "--finished")
    assert "8 of 8 runs are finished" in result.stderr


def test_the_command_refuses_a_mistake_in_one_line(plan, recipe, tmp_path):
    with pytest.raises(PlanError):
        plan(methods=["ctc", "sdk"])
    result = compare(tmp_path)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("tutornet compare: ")
    assert "did you mean skd" in line
    assert not (recipe / "results").exists()
    assert "CORPUS=FOLDER" in compare(tmp_path, "--data", "mini").stderr
    result = CliRunner().invoke(app, ["compare", "a", "b", "--jobs", "2"])
    assert result.exit_code == 2 and "are for a plan" in result.stderr
    result = CliRunner().invoke(app, ["compare", "a", "--finished"])
    assert result.exit_code == 2 and "are for a plan" in result.stderr
