"""The model card of an export, against the files that it is written from."""

import copy
import re

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from small_runs import RECURRENT, WAV2VEC2, write_run
from typer.testing import CliRunner

from tutornet_sb import files, runs
from tutornet_sb.cli import app
from tutornet_sb.publishing.export import export
from tutornet_sb.publishing.model_card import license_of, model_card

SCORES = {
    "dev-clean": (32.6633, 7.7455, 18.5930, 37, 398),
    "test-clean": (30.0855, 6.5789, 13.1624, 56, 585),
}
HYPERPARAMS = """
seed: 1
lr: 0.003
weight_decay: 0.001
speed_perturb:
corpus:
  name: mini
  data_folder: /home/me/secret
  train_splits: [train-clean-100]
  untranscribed_splits: [train-other-500]
  minilibri: {seed: 1, train_minutes: 20}
opt_class: !name:torch.optim.AdamW
  lr: 0.003
pairs:
- {teacher: encoder, student: encoder, weight: 1.0}
frame_weighting: nonblank
skd_loss: l2
skd_weight: 1.0
teacher_folder: /home/me/secret/teacher
"""


def splits(column):
    return {
        split: {
            "wer": row[column],
            "cer": row[1] + column,
            "utterances": row[3],
            "words": row[4],
        }
        for split, row in SCORES.items()
    }


@pytest.fixture
def run(tmp_path):
    """A run with the results of a real one."""
    folder = tmp_path / "run"
    write_run(folder, "lstm", RECURRENT)
    stage = {"epochs": 4, "splits": splits(0)}
    results = runs.read_results(folder) | {
        "method": "rkd+skd",
        "seed": 17,
        "parameters": 445_085,
        "epochs": 16,
        "train_audio_seconds": 1200.2,
        "train_seconds": 163.9,
        "real_time_factor": 0.00238,
        "stages": {"rkd": stage, "skd": stage | {"epochs": 12}},
        "versions": {"speechbrain": "1.1.2", "torch": "2.11.0"},
        "teacher": {
            "folder": "/home/me/secret/teacher",
            "name": "jasper_dr",
            "method": "ctc",
            "corpus": "mini",
            "epochs": 40,
            "parameters": 1_070_429,
            "real_time_factor": 0.00444,
            "splits": splits(2),
        },
    }
    files.write_json(folder / runs.RESULTS, results)
    (folder / "hyperparams.yaml").write_text(HYPERPARAMS)
    return folder


@pytest.fixture
def card_of(run, tmp_path):
    """Export with other results, and read the card."""

    def make(**changes):
        results = runs.read_results(run) | changes
        files.write_json(run / runs.RESULTS, results)
        export(run, tmp_path / "model")
        return ModelCard((tmp_path / "model" / "README.md").read_text())

    return make


@pytest.fixture
def config(run, tmp_path):
    return export(run, tmp_path / "model")


def rows(text):
    """Cells of the rows of all tables."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_the_front_matter_is_as_the_hub_reads_it(card_of):
    card = card_of()
    front = card.data
    assert isinstance(front, ModelCardData)
    assert front.library_name == "speechbrain"
    assert front.pipeline_tag == "automatic-speech-recognition"
    assert (front.language, front.license) == ("en", "apache-2.0")
    assert front.metrics == ["wer", "cer"]
    assert front.datasets is None
    assert {"ctc", "knowledge-distillation"} <= set(front.tags)
    # Written and read again it is the same.
    assert ModelCard(str(card)).data.to_dict() == front.to_dict()
    block = yaml.safe_load(str(card).split("---\n")[1])
    assert block == front.to_dict()


def test_the_model_index_holds_the_results(card_of, run):
    found = {
        (result.dataset_split, result.metric_type): result
        for result in card_of().data.eval_results
    }
    scored = runs.read_results(run)["stages"]["skd"]["splits"]
    assert found.keys() == {
        (s, rate) for s in scored for rate in ("wer", "cer")
    }
    for (split, rate), result in found.items():
        assert result.metric_value == round(scored[split][rate], 2)
        assert result.task_type == "automatic-speech-recognition"
        assert result.dataset_name == f"MiniLibri {split}"


def test_the_tables_hold_the_results_of_both(card_of):
    text = card_of().text
    table = rows(text)
    assert table[0][:5] == [
        "split",
        "WER (%)",
        "CER (%)",
        "teacher's WER (%)",
        "teacher's CER (%)",
    ]
    for split, (wer, cer, theirs, utterances, words) in SCORES.items():
        expected = [f"{v:.2f}" for v in (wer, cer, theirs, cer + 2)]
        assert [split, *expected, str(utterances), str(words)] in table
    assert ["parameters (million)", "0.45", "1.07"] in table
    assert ["real-time factor", "0.0024", "0.0044"] in table
    assert "seed 17" in text
    assert "taught by `jasper_dr` (1.07 million parameters)" in text
    assert "trained by method `ctc` for 40 epochs" in text


def test_the_training_is_told_with_its_values(card_of):
    text = card_of().text
    assert "On 20 minutes of MiniLibri (`train-clean-100`)" in text
    assert "without transcripts, `train-other-500`" in text
    first = re.search(r"^1\. .*RKD.*$", text, re.MULTILINE)[0]
    assert " 4 epochs." in first and '`frame_weighting: "nonblank"`' in first
    second = re.search(r"^2\. .*SKD.*$", text, re.MULTILINE)[0]
    assert " 12 epochs." in second and "`skd_weight: 1.0`" in second
    assert "frame_weighting" not in second
    assert "`lr: 0.003`" in text and "speed_perturb" not in text
    assert "Made with speechbrain 1.1.2, torch 2.11.0." in text


def test_nothing_says_where_things_lay(card_of, tmp_path):
    card_of()
    for name in ("README.md", "config.json"):
        text = (tmp_path / "model" / name).read_text()
        assert "secret" not in text and str(tmp_path) not in text


def test_sizes_are_those_of_the_files(card_of, tmp_path):
    table = rows(card_of().text)
    listed = {row[0].strip("`"): row[1] for row in table if "." in row[0]}
    expected = {
        path.name: f"{path.stat().st_size / 1e6:.3g}"
        for path in (tmp_path / "model").iterdir()
        if path.name != "README.md"
    }
    assert listed == expected


def test_synthetic_speech_is_called_so(card_of):
    assert "**A demonstration.** This model has heard synthetic" in (
        card_of().text
    )


def test_librispeech_is_no_demonstration(card_of):
    card = card_of(corpus="librispeech100", train_audio_seconds=362_160)
    assert "demonstration" not in card.text
    assert "synthetic" not in card.text
    assert "On 100.6 hours of LibriSpeech" in card.text
    assert card.data.license == "cc-by-4.0"
    assert card.data.datasets == ["openslr/librispeech_asr"]
    types = {result.dataset_type for result in card.data.eval_results}
    assert types == {"openslr/librispeech_asr"}


def test_of_another_corpus_nothing_is_invented(card_of):
    card = card_of(corpus="small")
    assert "demonstration" not in card.text
    assert card.data.license == "unknown"
    assert card.data.language is None and card.data.datasets is None
    assert card.data.eval_results[0].dataset_name == "small dev-clean"


def test_a_run_without_results_says_so(run, tmp_path):
    files.write_json(run / runs.RESULTS, {})
    export(run, tmp_path / "model")
    card = ModelCard((tmp_path / "model" / "README.md").read_text())
    assert card.text.count("This model comes without results") == 2
    assert card.data.eval_results is None and card.data.metrics is None
    assert "model-index" not in card.data.to_dict()
    assert "WER" not in card.text and "real-time factor" not in card.text
    assert card.data.license == "unknown"


def test_a_student_alone(card_of):
    card = card_of(teacher=None, method="ctc")
    assert "trained without a teacher, by method `ctc`" in card.text
    assert "knowledge-distillation" not in card.data.tags
    assert "teacher's" not in card.text.partition("## Training")[0]
    assert ["parameters (million)", "0.45"] in rows(card.text)


def test_a_teacher_from_the_hub_is_named(card_of):
    teacher = {"name": "ctc", "parameters": 94_400_000}
    text = card_of(teacher=teacher | {"folder": "they/wav2vec2@abc"}).text
    assert (
        "taught by a model of kind `ctc`, [they/wav2vec2@abc]"
        "(https://huggingface.co/they/wav2vec2) (94.40 million parameters)"
    ) in text
    text = card_of(teacher=teacher | {"folder": "/home/secret@x/model"}).text
    assert "a model of kind `ctc` (94.40 million parameters)" in text
    assert "secret" not in text


def test_latency_of_a_streaming_student(card_of):
    scored = splits(0)
    scored["test-clean"]["latency"] = {"median": 39.6}
    stages = {"skd": {"epochs": 1, "splits": scored}}
    table = rows(card_of(stages=stages).text)
    column = table[0].index("latency (ms)")
    found = {row[0]: row[column] for row in table[2:4]}
    assert found == {"dev-clean": "-", "test-clean": "40"}


def test_what_it_writes_and_does_not(card_of):
    text = card_of().text
    assert "- It writes ' A B C " in text and " Z and blanks, and" in text
    assert "hear the padding as silence" in text


def test_a_foreign_model_says_what_it_needs_and_runs(tmp_path):
    write_run(tmp_path / "run", "wav2vec2", WAV2VEC2)
    export(tmp_path / "run", tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    assert "pip install speechbrain transformers" in text
    assert "Loading runs `custom.py` and what `hyperparams.yaml`" in text
    assert "hear the padding as silence" not in text
    assert 'foreign_class(source="model")' in text


def test_other_runtimes_are_shown(config, tmp_path):
    folder = tmp_path / "model"
    assert "ONNX" not in model_card(config, folder, "me/model")
    scored = {"utterances": 56, "words": 585}
    config["onnx"] = {
        "model": "onnx/model.onnx",
        "max_difference": 2.345e-5,
        "checked_on": {"split": "test-clean", "utterances": 50},
        "int8": {"model": "onnx/model.int8.onnx"},
        "scores": {
            "test-clean": scored
            | {"wer": {"pytorch": 30.09, "onnx": 30.09, "int8": 30.26}}
            | {"same": {"onnx": 56, "int8": 54}}
        },
    }
    config["sherpa"] = {
        "model": "sherpa/model.onnx",
        "tokens": "sherpa/tokens.txt",
        "recognizer": "OnlineRecognizer.from_t_one_ctc",
        "scores": {
            "test-clean": scored
            | {"wer": {"pytorch": 30.09, "sherpa": 30.6}}
            | {"same": {"sherpa": 55}}
        },
    }
    card = ModelCard(model_card(config, folder, "me/model"))
    assert {"onnx", "sherpa-onnx"} <= set(card.data.tags)
    assert "at most 2e-05 nats on the 50 utterances of test-clean" in card.text
    assert "`onnx/model.int8.onnx` has weights of 8 bits" in card.text
    assert "`OnlineRecognizer.from_t_one_ctc`" in card.text
    assert "at 8000 Hz" in card.text
    table = rows(card.text)
    assert [
        "test-clean",
        "30.09",
        "30.09",
        "30.26",
        "56",
        "54",
        "56",
        "585",
    ] in table
    assert ["test-clean", "30.09", "30.60", "55", "56", "585"] in table
    config["onnx"]["int8"] = {"model": None, "reason": "it would be slow"}
    text = model_card(config, folder, "me/model")
    assert "There is none in 8 bits: it would be slow." in text
    # As the exporter may leave them out
    config["onnx"] |= {"int8": None, "scores": {}}
    del config["sherpa"]
    text = model_card(config, folder, "me/model")
    assert "8 bits" not in text and "sherpa" not in text


def test_the_licence_goes_by_what_was_given(run, tmp_path):
    to = tmp_path / "model"
    result = CliRunner().invoke(
        app,
        ["export", str(run), str(to), "--license", "mit", "--language", "de"],
    )
    assert result.exit_code == 0, result.stderr
    assert f'EncoderASR.from_hparams(source="{to}")' in result.stdout
    config = files.read_json(to / "config.json")
    assert license_of(config) == "mit"
    card = ModelCard((to / "README.md").read_text())
    assert (card.data.license, card.data.language) == ("mit", "de")
    text = model_card(config, to, "me/x", license="other", language="fr")
    card = ModelCard(text)
    assert (card.data.license, card.data.language) == ("other", "fr")


@pytest.mark.parametrize("key", ["load_with", "symbols", "results"])
def test_a_config_that_lacks_something_is_named(config, tmp_path, key):
    incomplete = copy.deepcopy(config)
    del incomplete[key]
    with pytest.raises(ValueError, match=f"lacks '{key}': export the run"):
        model_card(incomplete, tmp_path / "model", "me/model")
