"""Experiments: epochs of stages, and folders that belong to one of them."""

from pathlib import Path

import pytest
import torch

from tutornet_sb.networks import runs
from tutornet_sb.training.experiment import Experiment, share_epochs
from tutornet_sb.training.folder import refuse_other

MAIN_FILE = (
    Path(__file__).parents[2]
    / "recipes/LibriSpeech/TutorNet/hparams/ctc_lstm.yaml"
)


def test_the_weights_of_a_student_follow_from_the_seed():
    def load(seed):
        # Other random numbers have been drawn in the meantime.
        torch.rand(seed)
        student = Experiment.load(MAIN_FILE, {"seed": seed}).student
        return student.head.weight

    assert torch.equal(load(3), load(3))
    assert not torch.equal(load(3), load(4))


def share_out(stages, epochs, share):
    settings = {"stages": stages, "epochs": epochs, "rkd": {"share": share}}
    return {s.name: n for s, n in share_epochs(settings).items()}


@pytest.mark.parametrize(
    "stages, epochs, share, wanted",
    [
        (["ctc"], 7, 0.25, {"ctc": 7}),
        (["skd"], 7, 0.25, {"skd": 7}),
        (["rkd"], 7, 0.25, {"rkd": 7}),
        (["rkd", "skd"], 40, 0.25, {"rkd": 10, "skd": 30}),
        (["rkd", "ctc"], 12, 0.25, {"rkd": 3, "ctc": 9}),
        (["rkd", "skd"], 2, 0.5, {"rkd": 1, "skd": 1}),
    ],
)
def test_the_stages_share_the_epochs(stages, epochs, share, wanted):
    found = share_out(stages, epochs, share)
    assert found == wanted and list(found) == stages


@pytest.mark.parametrize(
    "stages, epochs, share, message",
    [
        (["rkd", "sdk"], 4, 0.5, "'sdk'.*ctc, rkd, skd"),
        ([], 4, 0.5, "must name stages"),
        (["skd", "rkd"], 4, 0.5, "follows rkd only"),
        (["rkd", "rkd"], 4, 0.5, "follows rkd only"),
        (["rkd", "skd", "ctc"], 4, 0.5, "follows rkd only"),
        (["rkd", "skd"], 1, 0.5, "rkd.share 0.5 of 1 epochs"),
        (["rkd", "skd"], 4, 1.0, "rkd.share 1.0 of 4 epochs"),
        (["rkd", "skd"], 4, 0.0, "rkd.share 0.0 of 4 epochs"),
    ],
)
def test_stages_that_make_no_sense_are_errors(stages, epochs, share, message):
    with pytest.raises(ValueError, match=message):
        share_out(stages, epochs, share)


@pytest.mark.parametrize("epochs", [2, 3, 6])
def test_the_remedy_for_a_stage_without_epochs_is_one(epochs):
    with pytest.raises(ValueError, match="--rkd.share 0.5 and --epochs 2"):
        share_out(["rkd", "skd"], epochs, 0.0)
    assert min(share_out(["rkd", "skd"], epochs, 0.5).values()) > 0


def test_a_difference_is_shown_by_its_place_in_the_experiment(tmp_path):
    folder = tmp_path / "run"
    (folder / "stages" / "rkd" / "save" / "CKPT+1").mkdir(parents=True)
    there = {"student": {"model": {"size": 4}}, "seed": 1, "old": 2}
    now = {"student": {"model": {"size": 5}}, "seed": 1, "new": 3}
    told = {"continue_anyway": False}
    with pytest.raises(ValueError, match="another experiment") as error:
        refuse_other(there, now, folder, told)
    for part in (
        str(folder),
        "there student.model.size is 4, and now it is 5",
        "there old is 2, and now it is None",
        "there new is None, and now it is 3",
    ):
        assert part in str(error.value)
    assert "seed" not in str(error.value)
    refuse_other(there, there, folder, told)
    # Nothing has been trained.
    refuse_other(there, now, tmp_path, told)
    (tmp_path / "stages" / "rkd" / "save").mkdir(parents=True)
    refuse_other(there, now, tmp_path, told)
    (tmp_path / "stages" / "rkd" / runs.WEIGHTS).touch()
    with pytest.raises(ValueError, match="another experiment"):
        refuse_other(there, now, tmp_path, told)
