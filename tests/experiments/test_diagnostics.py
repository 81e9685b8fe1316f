"""What a student took over from its teacher, on frames written by hand."""

import json
import os
import shutil

import pytest
import torch
from small_runs import (
    RECURRENT,
    add_dev_clean,
    write_corpus,
    write_metrics,
    write_run,
)

from tutornet_sb.corpora.tokenizer import pieces
from tutornet_sb.distillation.alignment import align
from tutornet_sb.distillation.frame_weighting import frame_weights
from tutornet_sb.experiments.diagnostics import (
    DIAGNOSTICS,
    Probe,
    Spikes,
    Unavailable,
    compare_spikes,
    find_spikes,
    find_teacher,
)
from tutornet_sb.experiments.groups import read_metrics
from tutornet_sb.inference.speech import find_speech
from tutornet_sb.networks import runs
from tutornet_sb.teachers.teacher import Teacher
from tutornet_sb.util import files
from tutornet_sb.util.errors import InputError


def path(*labels, symbols=4):
    """Posteriors in which these labels are the likeliest."""
    posteriors = torch.full((len(labels), symbols), 0.1)
    posteriors[range(len(labels)), labels] = 0.7
    return posteriors


def test_a_spike_is_the_likeliest_frame_of_its_run():
    posteriors = path(0, 1, 1, 1, 0, 1, 2, 2)
    posteriors[2, 1] = 0.9
    posteriors[7, 2] = 0.8
    assert find_spikes(posteriors) == [(1, 2), (1, 5), (2, 7)]
    # Another blank
    assert find_spikes(path(1, 0, 1, 3), blank_index=1) == [(0, 1), (3, 3)]


def test_spikes_are_compared_symbol_by_symbol():
    teacher = path(0, 1, 0, 0, 2, 0, 3, 0, 0, 0)
    student = path(0, 1, 0, 2, 0, 0, 2, 0, 1, 0)
    # On the same frame; a frame early; another symbol; not there at all
    assert compare_spikes(student, teacher) == Spikes(4, 1, 2, 10, 6, 7)


def test_an_utterance_without_spikes_counts_its_frames():
    assert compare_spikes(path(0, 0), path(0, 1)) == Spikes(0, 0, 0, 2, 2, 1)


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


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two students and a teacher with random weights, and a corpus."""
    root = tmp_path_factory.mktemp("runs")
    write_corpus(root / "LibriSpeech")
    for name, values in (
        ("teacher", {"channels": 8}),
        ("student", {}),
        ("baseline", {"hidden_size": 9}),
    ):
        folder = root / "mini" / name / "1"
        write_run(folder, "lstm", RECURRENT | values)
        add_dev_clean(folder)
        (folder / runs.HYPERPARAMS).write_text(
            f"data_folder: {root / 'LibriSpeech'}\nblank_index: 0\ndelay: 0.0\n"
        )
    results = files.read_json(root / "mini" / "student" / "1" / runs.RESULTS)
    results["teacher"]["source"] = "results/mini/teacher/1"
    files.write_json(root / "mini" / "student" / "1" / runs.RESULTS, results)
    return root / "mini"


def test_a_student_is_compared_with_its_teacher_on_dev(world):
    folder, teacher = world / "student" / "1", world / "teacher" / "1"
    found = Probe().diagnose(folder, teacher)
    model, _ = runs.load_run(folder)
    other, _ = runs.load_run(teacher)
    model.eval()
    speech = find_speech(
        folder, None, {"splits": {"dev-clean": 0, "test-clean": 0}}, model, True
    )
    spikes = same = near = frames = blanks = 0
    for utterance in speech.valid:
        wav, one = utterance.read().unsqueeze(0), torch.ones(1)
        with torch.no_grad():
            ours = model(wav, one)
        targets = align(Teacher(other)(wav, one), ours.lengths, 0.02)
        theirs = find_spikes(targets.posteriors[0])
        for symbol, frame in find_spikes(ours.logits[0].softmax(-1)):
            distances = [abs(f - frame) for s, f in theirs if s == symbol]
            spikes += 1
            same += 0 in distances
            near += min(distances, default=9) <= 1
        frames += len(ours.logits[0])
        blanks += int((ours.logits[0].argmax(-1) == 0).sum())
    assert spikes > 0 and near > 0
    assert found["utterances"] == len(speech.valid) == 11
    assert found["same_frame"] == pytest.approx(100 * same / spikes)
    assert found["within_one_frame"] == pytest.approx(100 * near / spikes)
    assert found["blank_rate"] == pytest.approx(100 * blanks / frames)
    assert found["teacher"] == "teacher/1"


def test_a_model_agrees_with_itself(world):
    folder = world / "baseline" / "1"
    found = Probe().diagnose(folder, folder)
    assert found["same_frame"] == found["within_one_frame"] == 100
    assert found["blank_rate"] == found["teacher_blank_rate"]
    (folder / DIAGNOSTICS).unlink()


def test_diagnostics_are_kept_until_the_weights_change(world):
    folder, teacher = world / "student" / "1", world / "teacher" / "1"
    found = Probe().diagnose(folder, teacher)
    (folder / DIAGNOSTICS).write_text(json.dumps(found | {"same_frame": -1}))
    assert Probe().diagnose(folder, teacher)["same_frame"] == -1
    later = (folder / DIAGNOSTICS).stat().st_mtime + 10
    os.utime(folder / runs.WEIGHTS, (later, later))
    assert Probe().diagnose(folder, teacher) == found


def test_each_run_is_run_on_the_corpus_that_it_was_scored_on(world, tmp_path):
    places = {"small": tmp_path / "gone", "large": world.parent / "LibriSpeech"}
    for name, folder in places.items():
        run = shutil.copytree(world / "student" / "1", tmp_path / name)
        (run / DIAGNOSTICS).unlink(missing_ok=True)
        (run / runs.HYPERPARAMS).write_text(
            f"data_folder:\ncorpus: {{minilibri: {{folder: {folder}}}}}\n"
            "blank_index: 0\ndelay: 0.0\n"
        )
    probe = Probe()
    with pytest.raises(Unavailable, match="the corpus of .*small is missing"):
        probe.diagnose(tmp_path / "small", world / "teacher" / "1")
    found = probe.diagnose(tmp_path / "large", world / "teacher" / "1")
    assert found["utterances"] == 11


def test_an_example_holds_the_posteriors_of_all_models(world):
    folders = {
        "baseline": world / "baseline" / "1",
        "ours": world / "student" / "1",
    }
    example = Probe().example(folders, world / "teacher" / "1", seconds=0.8)
    other, tokenizer = runs.load_run(world / "teacher" / "1")
    # The one of 0.8 s: see write_corpus.
    assert example.text == "ONE TWO"
    assert len(example.features) * example.feature_period == pytest.approx(
        0.8, abs=0.02
    )
    assert list(example.posteriors) == ["teacher", "baseline", "ours"]
    for posteriors, period in example.posteriors.values():
        assert period == 0.02
        assert len(posteriors) == pytest.approx(40, abs=1)
        torch.testing.assert_close(
            posteriors.sum(1), torch.ones(len(posteriors))
        )
    assert example.pieces == pieces(tokenizer)
    assert "".join(sign for _, sign in example.symbols) == "▁ONE▁TWO"
    times = [time for time, _ in example.symbols]
    assert times == sorted(times) and 0 <= times[0] <= times[-1] <= 0.8
    wav = next(
        u.read().unsqueeze(0)
        for u in Probe()._utterances(folders["ours"])
        if u.text == "ONE TWO" and abs(len(u.read()) - 12800) < 2
    )
    targets = Teacher(other.eval())(wav, torch.ones(1))
    torch.testing.assert_close(
        example.weights["nonblank"], frame_weights(targets, "nonblank")[0]
    )
    assert list(example.weights) == ["uniform", "energy", "nonblank"]


def test_the_teacher_is_found_beside_the_run(world):
    assert find_teacher(world / "student" / "1") == world / "teacher" / "1"
    # write_run names a folder that does not exist.
    assert find_teacher(world / "baseline" / "1") is None


def test_what_is_missing_is_named(world, tmp_path):
    student, teacher = world / "baseline" / "1", world / "teacher" / "1"
    with pytest.raises(Unavailable, match="there is no teacher to compare"):
        Probe().diagnose(student, None)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in (runs.RESULTS, runs.MODEL_YAML, runs.TOKENIZER):
        (copy / name).write_bytes((student / name).read_bytes())
    with pytest.raises(Unavailable, match="copy holds no weights"):
        Probe().diagnose(copy, teacher)
    (copy / runs.WEIGHTS).write_bytes((student / runs.WEIGHTS).read_bytes())
    (copy / runs.HYPERPARAMS).write_text("data_folder: nowhere\n")
    with pytest.raises(Unavailable, match="the corpus of .*copy is missing"):
        Probe().diagnose(copy, teacher)
    with pytest.raises(Unavailable, match="no teacher"):
        Probe().example({"x": student}, None)
