"""train.py as a user runs it, on a minute of synthetic speech."""

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jiwer
import pytest
import torch
from small_runs import WAV2VEC2_SYMBOLS, save_wav2vec2, write_minilibri
from typer.testing import CliRunner

from tutornet_sb.cli import app
from tutornet_sb.networks import runs
from tutornet_sb.networks.acoustic_model import (
    AcousticModel,
)
from tutornet_sb.targets.store import TargetStore, _read_index
from tutornet_sb.util.files import read_json

RECIPE = Path(__file__).parents[2] / "recipes" / "LibriSpeech" / "TutorNet"
SPLITS = ["dev-clean", "test-clean", "test-other"]
TEACHER = Path("results") / "small" / "teacher_jasper_dr" / "1234"
STUDENT = Path("results") / "small" / "rkd+skd_lstm_by_jasper_dr" / "1234"
TINY_JASPER = (
    "{encoder_size: 16, blocks: [{channels: 8, kernel: 5, stride: 2}, "
    "{channels: 16, kernel: 1}]}"
)


def command(file="rkd_lstm.yaml", **options):
    options = {
        "data_folder": "mini libri",
        "corpus_yaml": "hparams/corpora/small.yaml",
        "corpus_overrides": "{teacher_epochs: 1, epochs: 2}",
        "student_overrides": "{channels: 16, hidden_size: 16}",
        "rkd.share": 0.5,
        "results_folder": "results",
    } | options
    words = [str(RECIPE / "hparams" / file)]
    for key, value in options.items():
        if value is not None:
            words += [f"--{key}", str(value)]
    return words


def train(folder, patch=None, **options):
    """Run train.py in a folder, with some code before it if given."""
    words = command(**options)
    script = str(RECIPE / "train.py")
    if patch is None:
        start = [sys.executable, script]
    else:
        code = (
            f"{patch}\nimport runpy, sys\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        )
        code = f"import sys; sys.argv.pop(0)\n{code}"
        start = [sys.executable, "-c", code, script]
    return subprocess.run(
        [*start, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def succeed(folder, **options):
    done = train(folder, **options)
    assert done.returncode == 0, (done.stderr + done.stdout)[-3000:]
    return done


def error_of(done):
    """The last line that a failed run prints."""
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def content(folder, *patterns):
    """Bytes of the files of a folder that match a pattern."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for pattern in patterns
        for path in sorted(folder.rglob(pattern))
        if path.is_file()
    }


def epochs_of(stage):
    """Epoch and learning rate of each line of a stage's log."""
    text = (stage / "train_log.txt").read_text()
    return re.findall(r"^epoch: (\d+), lr: (\S+),", text, re.MULTILINE)


def transcripts(path):
    """References and hypotheses as an alignment file shows them."""

    def lines(kind):
        found = re.findall(rf"^{kind}:(.*)$", path.read_text(), re.MULTILINE)
        return [" ".join(line.replace("*", "").split()) for line in found]

    return lines("REF"), lines("HYP")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder in which the experiment has run once."""
    folder = tmp_path_factory.mktemp("recipe") / "a user's folder"
    folder.mkdir()
    write_minilibri(folder / "mini libri")
    done = succeed(folder)
    (folder / "stdout.txt").write_text(done.stdout)
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


@pytest.fixture(scope="module")
def results(work):
    return runs.read_results(work / STUDENT)


@pytest.fixture
def finished(work, tmp_path):
    """A copy of that folder to spoil."""
    folder = tmp_path / "copy"
    shutil.copytree(work, folder)
    return folder


# --------------------------------------------------------------- the first run


def test_the_table_shows_teacher_and_student_and_names_the_folder(work):
    lines = (work / "stdout.txt").read_text().strip().splitlines()
    head, _, *rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2
    assert "| jasper_dr " in rows[0] and "| ctc " in rows[0]
    assert "| lstm " in rows[1] and "| rkd+skd " in rows[1]
    shared = Path(os.path.commonpath([TEACHER, STUDENT]))
    below = lines.index(f"Runs in `{shared}`, row by row:") + 1
    assert lines[below : below + 2] == [
        f"    {folder.relative_to(shared)}" for folder in (TEACHER, STUDENT)
    ]
    assert max(map(len, [head, *rows])) <= 100
    assert all(f" {split} " in head for split in SPLITS)
    assert lines[-1] == f"The run is in {STUDENT}"


def test_bars_are_not_drawn_into_files_and_each_epoch_has_a_line(work):
    error = (work / "stderr.txt").read_text()
    assert "it/s" not in error and "%|" not in error
    said = error + (work / "stdout.txt").read_text()
    assert len(re.findall("epoch: 1, lr: .* valid ", said)) == 3


def test_the_results_hold_all_that_is_promised(work, results):
    assert results["method"] == "rkd+skd"
    assert results["corpus"] == "small"
    assert results["student"] == "lstm"
    assert (results["seed"], results["epochs"]) == (1234, 2)
    assert list(results["stages"]) == ["rkd", "skd"]
    assert sum(s["epochs"] for s in results["stages"].values()) == 2
    libri = json.loads((work / "mini libri" / "minilibri.json").read_text())
    seconds = libri["splits"]["train-clean-100"]["seconds"]
    assert results["train_audio_seconds"] == pytest.approx(seconds, abs=0.1)
    # By default the middle layers are paired and the last ones, by their depth.
    log = (work / STUDENT / "log.txt").read_text()
    pairs = results["stages"]["rkd"]["pairs"]
    assert [(p["teacher"], p["student"], p["weight"]) for p in pairs] == [
        ("encoder.blocks.3", "encoder.layers.outputs.0", 0.5),
        ("encoder", "encoder", 0.5),
    ]
    for pair in pairs:
        words = "{student} of the student is fitted to {teacher} of the teacher"
        assert words.format(**pair) in log
    assert "pairs" not in results["stages"]["skd"]
    # Batches of an epoch, one epoch a stage
    steps = [s["steps"] for s in results["stages"].values()]
    schedules = [
        torch.load(path, weights_only=False)["last_epoch"]
        for path in sorted((work / STUDENT).rglob("lr_schedule.ckpt"))
    ]
    # The schedule never steps past its end.
    assert [count - 1 for count in steps] == schedules
    parts = [s["train_seconds"] for s in results["stages"].values()]
    assert min(parts) > 0
    # The teacher is measured once, for RKD.
    assert "extraction_seconds" not in results["stages"]["skd"]
    rkd = work / STUDENT / "stages" / "rkd"
    measured = read_json(rkd / "hidden_statistics.json")
    extraction = results["stages"]["rkd"]["extraction_seconds"]
    assert measured["seconds"] == extraction > 0
    assert set(measured["statistics"]) == {p["teacher"] for p in pairs}
    assert results["train_seconds"] == pytest.approx(sum(parts) + extraction)
    # Of a student that has learnt next to nothing in one epoch
    valid = results["stages"]["rkd"]["valid"]
    assert valid["loss"] == results["stages"]["rkd"]["best"]
    for name in "rkd_0", "rkd_1":
        assert valid[f"{name}_relative"] == pytest.approx(1, abs=0.05)
    assert 0 < results["real_time_factor"] < 1
    assert set(results["versions"]) >= {"torch", "speechbrain", "tutornet_sb"}
    assert results["versions"]["torch"] == torch.__version__
    model, _ = runs.load_run(work / STUDENT)
    count = sum(p.numel() for p in model.parameters())
    assert results["parameters"] == count
    assert results["machine"]["cpu"] and results["machine"]["cores"] > 0


def hash_of(path):
    """SHA-256 of names, types, shapes and values of saved weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(torch.load(path, weights_only=True).items()):
        head = f"{name} {tensor.dtype} {tuple(tensor.shape)}\n"
        digest.update(head.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_the_results_quote_the_teacher(work, results):
    own = runs.read_results(work / TEACHER)
    quoted = results["teacher"]
    # Which weights taught, whatever lies in that folder later
    assert quoted["weights_sha256"] == hash_of(work / TEACHER / "model.ckpt")
    assert results["weights_sha256"] == hash_of(work / STUDENT / "model.ckpt")
    same = "method", "corpus", "seed", "epochs", "parameters", "weights_sha256"
    for key in (*same, "train_seconds", "real_time_factor"):
        assert quoted[key] == own[key], key
    assert quoted["splits"] == own["stages"]["ctc"]["splits"]
    assert quoted["name"] == own["student"] == "jasper_dr"
    assert own["method"] == "ctc"
    assert own["teacher"] is None


@pytest.mark.parametrize("stage", ["rkd", "skd"])
@pytest.mark.parametrize("split", SPLITS)
def test_rates_are_those_of_the_alignment_file(work, results, stage, split):
    found = results["stages"][stage]["splits"][split]
    file = work / STUDENT / "stages" / stage / f"wer_{split}.txt"
    references, hypotheses = transcripts(file)
    corpus = work / "mini libri" / split
    lines = [
        line.split(" ", 1)
        for path in corpus.rglob("*.trans.txt")
        for line in path.read_text().splitlines()
    ]
    assert references == [text for _, text in sorted(lines)]
    assert re.findall("=== (.+) ===", file.read_text())[:-1] == [
        key for key, _ in sorted(lines)
    ]
    assert found["utterances"] == len(references)
    assert found["words"] == sum(len(text.split()) for text in references)
    wer, cer = (f(references, hypotheses) for f in (jiwer.wer, jiwer.cer))
    assert found["wer"] == pytest.approx(100 * wer)
    assert found["cer"] == pytest.approx(100 * cer)
    # Those that confidence intervals are made of
    errors = read_json(file.with_name(runs.ERRORS))[split]
    assert list(errors) == [key for key, _ in sorted(lines)]
    words, spoken, characters, written = map(
        sum, zip(*errors.values(), strict=True)
    )
    assert found["wer"] == pytest.approx(100 * words / spoken)
    assert found["cer"] == pytest.approx(100 * characters / written)


def test_each_stage_leaves_the_weights_of_its_best_checkpoint(work):
    for stage in ("rkd", "skd"):
        folder = work / STUDENT / "stages" / stage
        (saved,) = (folder / "save").glob("CKPT*/student.ckpt")
        best, left = torch.load(saved), torch.load(folder / runs.WEIGHTS)
        assert best.keys() == left.keys()
        for name in best:
            # The head is fitted to the teacher after RKD.
            is_fitted = stage == "rkd" and name.startswith("head.")
            alike = torch.allclose(left[name], best[name])
            assert alike != is_fitted, name
    final, last = (
        torch.load(path / runs.WEIGHTS)
        for path in (work / STUDENT, work / STUDENT / "stages" / "skd")
    )
    assert all(torch.equal(final[name], last[name]) for name in last)


@pytest.mark.slow
def test_averaged_weights_have_the_figure_that_is_recorded(finished):
    succeed(
        finished,
        file="ctc_lstm.yaml",
        output_folder="averaged",
        epochs=4,
        lr=0.02,
        avg_checkpoints=4,
    )
    (stage,) = runs.read_results(finished / "averaged")["stages"].values()
    wer = stage["splits"]["dev-clean"]["wer"]
    assert stage["selected_by"] == "WER" and stage["averaged"] in (1, 4)
    assert stage["best"] == stage["valid"]["WER"] == pytest.approx(wer)


def test_the_run_can_be_loaded_without_the_recipe(work):
    model, tokenizer = runs.load_run(work / STUDENT)
    assert isinstance(model, AcousticModel)
    assert model.encoder.output_size == 32
    assert tokenizer.get_piece_size() == 29


def test_every_stage_has_logs_for_people_and_for_tensorboard(work):
    for run, stages in ((STUDENT, ("rkd", "skd")), (TEACHER, ("ctc",))):
        assert (work / run / "log.txt").stat().st_size
        for stage in stages:
            folder = work / run / "stages" / stage
            assert [epoch for epoch, _ in epochs_of(folder)] == ["1"]
            (events,) = (folder / "tensorboard").glob("events.out.tfevents.*")
            assert events.stat().st_size


def test_nothing_half_written_is_left(work):
    assert not list(work.rglob("*unfinished*"))


# ------------------------------------------------------------------ again


def test_the_same_command_again_trains_nothing_more(work, results):
    kept = "*.ckpt", "train_log.txt", "wer_*.txt", "*.model", "stage.json"
    before = content(work / "results", *kept)
    done = succeed(work)
    assert "Going into epoch" not in done.stderr + done.stdout
    assert content(work / "results", *kept) == before
    again = runs.read_results(work / STUDENT)
    again["real_time_factor"] = results["real_time_factor"]
    assert again == results
    assert f"The run is in {STUDENT}" in done.stdout


@pytest.mark.slow
def test_beam_search_on_a_finished_run_adds_scores_without_training(
    finished, results
):
    weights = content(finished / "results", "*.ckpt", "train_log.txt")
    done = succeed(finished, **{"decoding.beam_size": 5})
    assert "Going into epoch" not in done.stderr + done.stdout
    assert content(finished / "results", "*.ckpt", "train_log.txt") == weights
    after = runs.read_results(finished / STUDENT)
    for stage, split in ((s, p) for s in ("rkd", "skd") for p in SPLITS):
        found = dict(after["stages"][stage]["splits"][split])
        beam = found.pop("beam")
        assert found == results["stages"][stage]["splits"][split]
        folder = finished / STUDENT / "stages" / stage
        greedy = transcripts(folder / f"wer_{split}.txt")
        searched = transcripts(folder / f"wer_{split}_beam.txt")
        assert searched[0] == greedy[0]
        cer = 100 * jiwer.cer(*searched)
        assert beam["cer"] == pytest.approx(cer)
        assert beam["wer"] == pytest.approx(100 * jiwer.wer(*searched))


def test_another_student_needs_no_other_change_and_no_other_teacher(finished):
    teacher = content(finished / TEACHER, "*")
    succeed(
        finished,
        student_yaml="hparams/models/jasper_mini.yaml",
        student_overrides=TINY_JASPER,
    )
    folder = finished / STUDENT.parents[1] / "rkd+skd_jasper_mini_by_jasper_dr"
    folder = folder / "1234"
    found = runs.read_results(folder)
    assert found["student"] == "jasper_mini"
    assert set(found["stages"]["skd"]["splits"]) == set(SPLITS)
    assert content(finished / TEACHER, "*") == teacher
    model, _ = runs.load_run(folder)
    assert model.encoder.output_size == 16


@pytest.mark.slow
def test_as_many_pairs_are_made_as_there_are_layers(finished):
    """The tiny Jasper Mini has two blocks, of which the second is the last."""
    done = succeed(
        finished,
        student_yaml="hparams/models/jasper_mini.yaml",
        student_overrides=TINY_JASPER,
        output_folder="three pairs",
        **{"rkd.pairs": 3},
        stages="[rkd]",
    )
    assert "pairs: 2 instead of 3" in done.stderr + done.stdout
    (stage,) = runs.read_results(finished / "three pairs")["stages"].values()
    assert [(p["teacher"], p["student"]) for p in stage["pairs"]] == [
        ("encoder.blocks.3", "encoder.blocks.0"),
        ("encoder", "encoder"),
    ]


@pytest.mark.slow
def test_a_finished_run_is_never_said_to_have_had_other_epochs(finished):
    train(finished, corpus_overrides="{teacher_epochs: 1, epochs: 4}")
    found = runs.read_results(finished / STUDENT)
    trained = sum(stage["epochs"] for stage in found["stages"].values())
    logged = sum(
        len(epochs_of(finished / STUDENT / "stages" / stage))
        for stage in found["stages"]
    )
    assert found["epochs"] == trained == logged


@pytest.mark.slow
def test_a_teacher_of_other_values_is_not_taken_for_the_one_asked_for(finished):
    before = content(finished / "results", "*.ckpt", "results.json")
    options = {"corpus_overrides": "{teacher_epochs: 2, epochs: 2}"}
    options["output_folder"] = "new"
    error = error_of(train(finished, **options))
    assert f"{TEACHER} holds another teacher than this command asks" in error
    assert "there epochs is 1, and now it is 2. " in error
    assert f"--teacher.folder {TEACHER}" in error
    assert content(finished / "results", "*.ckpt", "results.json") == before


# ------------------------------------------- teachers and students of all kinds


@pytest.mark.slow
def test_a_teacher_from_elsewhere_with_symbols_in_another_order(finished):
    source = save_wav2vec2(finished / "wav2vec2", WAV2VEC2_SYMBOLS)
    done = succeed(
        finished, **{"teacher.source": source}, output_folder="taught"
    )
    assert "only in teacher, counted as blank" in done.stdout
    assert "The teacher is trained first" not in done.stdout
    results = runs.read_results(finished / "taught")
    assert results["teacher"]["source"] == str(source)
    assert results["teacher"]["kind"] == "ctc"
    assert len(results["teacher"]["weights_sha256"]) == 64
    assert list(results["stages"]) == ["rkd", "skd"]


@pytest.mark.slow
def test_a_teacher_without_some_symbols_says_what_can_be_done(finished):
    source = save_wav2vec2(finished / "wav2vec2", WAV2VEC2_SYMBOLS[:-12])
    options = {"teacher.source": source, "output_folder": "taught"}
    error = error_of(train(finished, **options))
    assert str(source) in error and "9 of the 29 symbols" in error
    assert "stages: [rkd, ctc]" in error and "stages: [pseudo]" in error
    # It does what it says.
    options |= {"stages": "[rkd, ctc]"}
    options["output_folder"] = "by representations"
    done = succeed(finished, **options)
    assert "No posteriors of the teacher are used" in done.stdout
    assert "random weights" in done.stdout
    results = runs.read_results(finished / "by representations")
    assert list(results["stages"]) == ["rkd", "ctc"]


@pytest.mark.slow
def test_a_student_of_its_teachers_transcripts(finished):
    source = save_wav2vec2(finished / "wav2vec2", WAV2VEC2_SYMBOLS[:-12])
    shutil.copytree(
        finished / "mini libri" / "train-clean-100",
        finished / "mini libri" / "train-other-500",
    )
    # Utterances are known by their ids, which no two may share.
    for path in sorted((finished / "mini libri").glob("train-o*/*")):
        for file in path.rglob("*.*"):
            file.rename(file.with_name(f"9{file.name}"))
        path.rename(path.with_name(f"9{path.name}"))
    for path in (finished / "mini libri" / "train-other-500").rglob("*.txt"):
        path.unlink()
    done = succeed(
        finished,
        file="pseudo_lstm.yaml",
        **{"teacher.source": source},
        min_confidence=0,
        corpus_overrides="{epochs: 1, untranscribed_splits: [train-other-500], "
        "train_splits: [train-clean-100], valid_splits: [dev-clean], "
        "test_splits: [test-clean]}",
        output_folder="taught",
    )
    assert "have pseudo-labels of" in done.stdout
    with open(finished / "taught" / "pseudo_labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    heard = {row["ID"] for row in rows}
    assert {f"9{key}" for key in heard if key[0] != "9"} <= heard
    results = runs.read_results(finished / "taught")
    assert results["method"] == "pseudo"
    transcribed = runs.read_results(finished / TEACHER)["train_audio_seconds"]
    assert results["train_audio_seconds"] > 1.2 * transcribed


@pytest.mark.slow
def test_a_streaming_student_is_timed(finished):
    done = succeed(finished, file="rkd_lstm_streaming.yaml")
    name = "rkd+skd_lstm_streaming_by_jasper_dr"
    results = runs.read_results(finished / STUDENT.parents[1] / name / "1234")
    for split, scores in results["stages"]["skd"]["splits"].items():
        timed = scores["latency"]
        assert timed["reference_words"] == scores["words"], split
        assert timed["words"] <= timed["hits"] <= scores["words"]
    assert "latency" not in results["stages"]["rkd"]["splits"]["test-clean"]
    assert results["teacher"]["source"] == str(TEACHER)
    assert done.returncode == 0


# --------------------------------------------------------- targets from a store

STORE = {
    "targets": "store",
    "store.folder": "a store",
    "output_folder": "stored",
    "store.posteriors": "fp16",
    "store.hidden": "fp16",
}


def losses_of(stage):
    """The losses in a stage's log, by name."""
    text = (stage / "train_log.txt").read_text()
    pairs = re.findall(r"(\w+ (?:loss|rkd_\d|skd|ctc)): ([\d.e+-]+)", text)
    return {name: float(value) for name, value in pairs}


def command_line(folder, *words, **options):
    """Run `tutornet targets` in a folder."""
    start = [sys.executable, "-m", "tutornet_sb.cli", "targets"]
    return subprocess.run(
        [*start, *command(**options), *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def filled(work):
    """A folder in which the experiment has run again, from a store."""
    folder = work.parent / "filled"
    shutil.copytree(work, folder)
    done = succeed(folder, **STORE)
    assert done.stdout.count("The teacher fills") == 2  # training, development
    return folder


@pytest.fixture
def taught(filled, tmp_path):
    """A copy of that folder to spoil."""
    folder = tmp_path / "copy"
    shutil.copytree(filled, folder)
    return folder


def test_a_store_takes_the_place_of_the_teacher(filled):
    found = runs.read_results(filled / "stored")
    online = runs.read_results(filled / STUDENT)
    for stage in ("rkd", "skd"):
        ours = losses_of(filled / "stored" / "stages" / stage)
        wanted = losses_of(filled / STUDENT / "stages" / stage)
        assert len(wanted) >= 4 and ours == pytest.approx(wanted, rel=0.03)
        for split in SPLITS:
            pair = [
                run["stages"][stage]["splits"][split] for run in (found, online)
            ]
            assert pair[0]["cer"] == pytest.approx(pair[1]["cer"], abs=15)


def test_the_time_of_filling_a_store_is_part_of_the_cost(filled):
    seconds = TargetStore(filled / "a store").made["seconds"]
    found = runs.read_results(filled / "stored")
    stages = found["stages"].values()
    assert [stage["extraction_seconds"] for stage in stages] == [seconds] * 2
    training = sum(stage["train_seconds"] for stage in stages)
    assert found["train_seconds"] == pytest.approx(training + seconds)
    assert seconds > 0


def test_the_log_of_rkd_has_the_error_of_the_codes(filled):
    errors = TargetStore(filled / "a store").made["errors"]
    stage = runs.read_results(filled / "stored")["stages"]["rkd"]
    log = (filled / "stored" / "stages" / "rkd" / "train_log.txt").read_text()
    for index, pair in enumerate(stage["pairs"]):
        error = errors[pair["teacher"]]["nonblank"]
        name = f"rkd_{index}_codes"
        assert stage["valid"][name] == error > 0
        logged = re.findall(rf"{name}: ([\d.e+-]+)", log)
        assert [float(x) for x in logged] == pytest.approx(
            [error] * 2, rel=0.01
        )
    online = runs.read_results(filled / STUDENT)["stages"]["rkd"]["valid"]
    assert not any("codes" in name for name in online)


@pytest.mark.slow
def test_a_filled_store_makes_the_same_run(taught):
    again = succeed(taught, **STORE | {"output_folder": "again"})
    assert "The teacher fills" not in again.stdout
    seconds = TargetStore(taught / "a store").made["seconds"]
    stages = runs.read_results(taught / "again")["stages"].values()
    assert [stage["extraction_seconds"] for stage in stages] == [seconds] * 2
    paths = [taught / name / runs.WEIGHTS for name in ("stored", "again")]
    first, second = map(torch.load, paths)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_each_speed_has_its_own_targets_in_the_default_store(finished):
    corpus = finished / "results" / "small"
    succeed(
        finished,
        **{"augmentation.speeds": "[90, 100]"},
        num_workers=2,
        targets="store",
        output_folder="stored",
    )
    for stage in runs.read_results(finished / "stored")["stages"].values():
        assert 0 < stage["best"] < float("inf")
    (folder,) = corpus.glob("targets_*")
    store = TargetStore(folder)
    assert store.check() == []
    manifests = corpus / "manifests"
    with open(manifests / "train-clean-100.csv", newline="") as file:
        keys = [row["ID"] for row in csv.DictReader(file)]
    for key in keys:
        key = f"train-clean-100/{key}"
        plain, slow = store.read(key), store.read(f"{key}@90")
        assert len(slow) == pytest.approx(len(plain) / 0.9, abs=2)
    # Those of the development set are used as they are.
    with open(manifests / "dev-clean.csv", newline="") as file:
        dev = list(csv.DictReader(file))
    assert keys and len(store) == 2 * len(keys) + len(dev)


KILL_WHILE_FILLING = """
import os, signal
from tutornet_sb.targets import extraction
write, written = extraction._write, []
def kill(writer, *args):
    write(writer, *args)
    written.append(1)
    if len(written) == 2:
        writer.finish()
    if len(written) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
extraction._write = kill
"""


@pytest.mark.slow
def test_a_run_killed_while_it_fills_its_store_goes_on(finished):
    options = STORE | {"batch_seconds": 8, "store.hidden": "rq"}
    assert train(finished, KILL_WHILE_FILLING, **options).returncode == -9
    folder = finished / "a store"
    before = content(folder, "*.shard")
    assert len(TargetStore(folder)) > 0
    done = succeed(finished, **options)
    assert "Codebooks" not in done.stdout
    after = content(folder, "*.shard")
    assert before.items() < after.items()
    store = TargetStore(folder)
    assert store.check() == [] and not content(folder, "*unfinished*")
    # Nothing is there twice.
    records = [_read_index(path, store._store)[0] for path in store._shards]
    assert sum(map(len, records)) == len(store)


@pytest.mark.slow
def test_posteriors_alone_are_taken_from_a_store_with_more(taught):
    options = STORE | {"output_folder": "skd", "store.hidden": "rq"}
    done = succeed(taught, file="skd_lstm.yaml", **options)
    assert "The teacher fills" not in done.stdout


@pytest.mark.slow
def test_splits_may_use_the_same_ids(taught):
    corpus = taught / "mini libri"
    ours = sorted((corpus / "train-clean-100").rglob("*.trans.txt"))[0].parent
    theirs = sorted((corpus / "dev-clean").rglob("*.trans.txt"))[0].parent
    # The development set has a chapter of the training set's name.
    there = corpus / "dev-clean" / ours.parent.name / ours.name
    there.parent.mkdir(exist_ok=True)
    theirs.rename(there)
    for path in sorted(there.rglob("*")):
        name = path.name.replace(
            f"{theirs.parent.name}-{theirs.name}",
            f"{ours.parent.name}-{ours.name}",
        )
        if path.suffix == ".txt":
            text = path.read_text().replace(
                f"{theirs.parent.name}-{theirs.name}-",
                f"{ours.parent.name}-{ours.name}-",
            )
            path.write_text(text)
        path.rename(path.with_name(name))
    both = [
        {path.stem for path in folder.glob("*.flac")}
        for folder in (ours, there)
    ]
    assert both[0] & both[1]
    succeed(taught, **STORE | {"output_folder": "later", "store.folder": "new"})
    # Utterances of one set must not.
    error = error_of(
        train(
            taught,
            output_folder="mixed",
            **{"teacher.folder": TEACHER},
            corpus_overrides="{teacher_epochs: 1, epochs: 2, "
            "train_splits: [train-clean-100, dev-clean]}",
        )
    )
    assert "is in train-clean-100 and in dev-clean" in error


def check_store(folder):
    words = ["targets", "--to", str(folder), "--check"]
    return CliRunner().invoke(app, words)


@pytest.mark.slow
def test_the_command_fills_checks_and_repairs(taught):
    folder = taught / "another"
    options = {key: STORE[key] for key in ("store.posteriors", "store.hidden")}
    done = command_line(taught, "--to", "another", **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"another holds \d+ utterances, [\d.]+ MB", done.stdout)
    store, run = TargetStore(folder), TargetStore(taught / "a store")
    assert store.what == run.what
    # All that a run needed
    assert set(run._hashes.tolist()) <= set(store._hashes.tolist())
    assert check_store(folder).exit_code == 0

    spoilt = bytearray(store._shards[0].read_bytes())
    spoilt[100] ^= 1
    store._shards[0].write_bytes(spoilt)
    checked = check_store(folder)
    assert checked.exit_code == 2
    assert "1 shards of" in checked.stderr and "--repair" in checked.stderr
    (lost,) = re.findall(r"^    (.+)$", checked.stdout, re.MULTILINE)
    assert lost in store

    done = command_line(taught, "--to", "another", "--repair", **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"    {lost}\n" in done.stdout
    checked = check_store(folder)
    assert checked.exit_code == 0
    assert f"{len(store)} utterances, all sound" in checked.stdout
    parts = [s.read(lost) for s in (TargetStore(folder), run)]
    torch.testing.assert_close(
        *(part.view(torch.float16) for part in parts), rtol=2e-3, atol=2e-4
    )


# ------------------------------------------------------------- kill -9, go on

KILL = """
import os, signal
from tutornet_sb.training.brain import StageBrain
end, steps = StageBrain.on_fit_batch_end, []
def kill(self, *args, **kwargs):
    end(self, *args, **kwargs)
    if type(self).__name__ == {brain!r}:
        steps.append(1)
        if len(steps) == {steps}:
            os.kill(os.getpid(), signal.{signal})
StageBrain.on_fit_batch_end = kill
"""
STOP_WHILE_VALIDATING = """
import os, signal, speechbrain
from tutornet_sb.training.skd import SKDBrain
evaluate = SKDBrain.evaluate_batch
def stop(self, batch, stage):
    loss = evaluate(self, batch, stage)
    if stage == speechbrain.Stage.VALID and self.epoch == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return loss
SKDBrain.evaluate_batch = stop
"""
KILL_WHILE_SAVING = """
import os, signal, torch
save, saved = torch.save, []
def kill(content, path, *args, **kwargs):
    if str(path).endswith("optimizer.ckpt") and "/rkd/" in str(path):
        saved.append(1)
        if len(saved) == 3:
            open(path, "wb").write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    save(content, path, *args, **kwargs)
torch.save = kill
"""
# The first epoch of RKD is the best. What does SKD start from?
WATCH = """
import torch
from tutornet_sb.training.rkd import RKDBrain
from tutornet_sb.training.skd import SKDBrain
figures, fit = RKDBrain.figures, SKDBrain.fit
RKDBrain.figures = lambda self: (
    figures(self) | {"loss": float(self.epoch)}
)
def watched(self, *args, **kwargs):
    torch.save(self.student.state_dict(), "start of skd.pt")
    fit(self, *args, **kwargs)
SKDBrain.fit = watched
"""
LONGER = {
    "corpus_overrides": "{teacher_epochs: 1, epochs: 5}",
    "rkd.share": 0.4,
    "batch_seconds": 8,
    "ckpt_interval_steps": 1,
    "ckpt_interval_minutes": 0,
    "num_workers": 1,
    "augmentation.speeds": "[95, 100, 105]",
}


def assert_same_end(folder, other):
    """All weights and scores of two runs are equal, bit for bit."""
    paths = [runs.WEIGHTS, *(f"stages/{s}/{runs.WEIGHTS}" for s in STAGES)]
    for path in paths:
        ours, theirs = (torch.load(run / path) for run in (folder, other))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), f"{path} {name}"
    ours, theirs = (runs.read_results(run)["stages"] for run in (folder, other))
    for stage in STAGES:
        assert ours[stage]["splits"] == theirs[stage]["splits"]


STAGES = {"rkd": 2, "skd": 3}


@pytest.fixture(scope="module")
def whole(work):
    """Two epochs of RKD and three of SKD that nobody stops."""
    folder = work.parent / "whole"
    shutil.copytree(work, folder)
    succeed(folder, patch=WATCH, output_folder="run", **LONGER)
    return folder


def test_skd_starts_from_the_best_weights_of_rkd(whole):
    start = torch.load(whole / "start of skd.pt")
    states = {}
    for path in (whole / "run" / "stages" / "rkd" / "save").glob("CKPT*"):
        meta = (path / "CKPT.yaml").read_text()
        if "end-of-epoch: true" in meta:
            epoch = re.search(r"^epoch: (\d)", meta, re.MULTILINE)[1]
            states[epoch] = torch.load(path / "student.ckpt")
    assert states.keys() == {"1", "2"}

    def is_start(state):
        return all(
            torch.allclose(start[name], state[name])
            for name in start
            # That is fitted to the teacher in between.
            if not name.startswith("head.")
        )

    left = torch.load(whole / "run" / "stages" / "rkd" / runs.WEIGHTS)
    assert all(torch.equal(start[name], left[name]) for name in start)
    assert is_start(states["1"]) and not is_start(states["2"])
    stage = read_json(whole / "run" / "stages" / "rkd" / "stage.json")
    assert stage["best_epoch"] == 1


@pytest.mark.slow
def test_a_run_killed_in_each_stage_goes_on_to_the_same_end(whole, finished):
    options = LONGER | {"output_folder": "run"}
    for brain, steps in (("RKDBrain", 4), ("SKDBrain", 9)):
        kill = KILL.format(brain=brain, steps=steps, signal="SIGKILL")
        kill = WATCH + kill
        assert train(finished, patch=kill, **options).returncode == -9
        assert not runs.is_finished(finished / "run")
    done = succeed(finished, patch=WATCH, **options)
    assert "Going into epoch 1" not in done.stdout + done.stderr
    assert_same_end(finished / "run", whole / "run")
    for stage, epochs in STAGES.items():
        ours = epochs_of(finished / "run" / "stages" / stage)
        wanted = epochs_of(whole / "run" / "stages" / stage)
        assert [int(epoch) for epoch, _ in wanted] == [*range(1, epochs + 1)]
        # Each epoch once, with the learning rate of the run nobody stopped
        assert ours == wanted
    found = runs.read_results(finished / "run")
    assert set(found["stages"]["skd"]["splits"]) == set(SPLITS)


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_saves_and_goes_on_to_the_same_end(
    whole, finished
):
    rare = {"ckpt_interval_steps": 0, "ckpt_interval_minutes": 15}
    options = LONGER | rare | {"output_folder": "run"}
    stop = KILL.format(brain="RKDBrain", steps=4, signal="SIGTERM")
    saves = finished / "run" / "stages"
    for patch, name, stage in (
        (stop, "SIGTERM", "rkd"),
        (STOP_WHILE_VALIDATING, "SIGINT", "skd"),
    ):
        done = train(finished, patch=WATCH + patch, **options)
        assert done.returncode == 75
        assert f"{name}: finishing the step and saving" in done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        # By time: the number that ends a name may be that of one deleted.
        newest = max(
            (saves / stage / "save").iterdir(),
            key=lambda path: (path / "CKPT.yaml").stat().st_mtime,
        )
        assert "end-of-epoch: false" in (newest / "CKPT.yaml").read_text()
    # Not a step is taken twice.
    assert (newest / "counter.ckpt").read_text() == "2"
    succeed(finished, patch=WATCH, **options)
    assert_same_end(finished / "run", whole / "run")


@pytest.mark.slow
def test_a_run_killed_while_it_saves_goes_on(whole, finished):
    options = LONGER | {"output_folder": "run"}
    kill = WATCH + KILL_WHILE_SAVING
    assert train(finished, kill, **options).returncode == -9
    half = [
        path.parent
        for path in (finished / "run").rglob("optimizer.ckpt")
        if path.read_bytes() == b"half"
    ]
    assert len(half) == 1
    succeed(finished, patch=WATCH, **options)
    assert_same_end(finished / "run", whole / "run")
    assert not half[0].exists()


# --------------------------------------------------------- mistakes of the user


@pytest.mark.slow
def test_a_folder_of_another_experiment_is_refused_unless_told(finished):
    train_folder = next((finished / "mini libri").rglob("train-clean-100"))
    listing = sorted(train_folder.rglob("*.trans.txt"))[0]
    lines = listing.read_text().splitlines(keepends=True)
    key = lines[-1].split()[0]
    (listing.parent / f"{key}.flac").unlink()
    listing.write_text("".join(lines[:-1]))
    before = content(finished / STUDENT, "*")
    error = error_of(train(finished, data_folder="mini libri"))
    with open(finished / "results/small/manifests/train-clean-100.csv") as file:
        now = len(file.readlines()) - 1
    assert f"{STUDENT} holds another experiment" in error
    assert f"utterances is {now + 1}, and now it is {now}" in error
    assert "--continue_anyway True" in error
    same = {name: before[name] for name in before if name.endswith("ckpt")}
    assert same.items() <= content(finished / STUDENT, "*").items()
    done = succeed(finished, lr=0.5, continue_anyway=True)
    assert "there lr is" in done.stdout and "and now it is 0.5" in done.stdout
    assert f"utterances is {now + 1}, and now it is {now}" in done.stdout


@pytest.mark.slow
def test_intermediate_heads_are_trained_and_dropped(finished, results):
    heads = "[{student: encoder.layers.outputs.0, weight: 0.5}]"
    options = {"stages": "[skd]", "intermediate": heads}
    succeed(finished, output_folder="with heads", **options)
    found = runs.read_results(finished / "with heads")
    assert found["parameters"] == results["parameters"]
    folder = finished / "with heads" / "stages" / "skd"
    log = (folder / "train_log.txt").read_text().splitlines()
    for line in log:
        trained, scored = line.split(" - valid ")
        assert "skd_0: " in trained and "ctc_0: " in trained
        assert "_0: " not in scored
    assert list(folder.rglob("heads.ckpt"))
