"""The model card of an export, against the files that it is written from."""

import re
import shlex
import subprocess
import sys

import pytest
import soundfile
import yaml
from huggingface_hub import ModelCard, ModelCardData
from small_runs import (
    RATE,
    RECURRENT,
    WAV2VEC2,
    add_dev_clean,
    make_speech,
    write_corpus,
    write_run,
)
from typer.testing import CliRunner

from tutornet_sb.cli import app
from tutornet_sb.networks import runs
from tutornet_sb.publishing.export import export
from tutornet_sb.publishing.model_card import model_card
from tutornet_sb.publishing.sherpa import load_sherpa
from tutornet_sb.util import files

SCORES = {
    "dev-clean": (32.6633, 7.7455, 18.5930, 37, 398),
    "test-clean": (30.0855, 6.5789, 13.1624, 56, 585),
}
HYPERPARAMS = """
seed: 1
lr: 0.003
weight_decay: 0.001
augmentation: {speeds: }
corpus:
  name: mini
  data_folder: /home/me/secret
  train_splits: [train-clean-100]
  untranscribed_splits: [train-other-500]
  minilibri: {seed: 1, train_minutes: 20}
opt_class: !name:torch.optim.AdamW
  lr: 0.003
rkd:
  pairs:
  - {teacher: encoder, student: encoder, weight: 1.0}
  frame_weighting: nonblank
skd: {loss: l2, weight: 1.0}
teacher: {folder: /home/me/secret/teacher}
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
            "source": "/home/me/secret/teacher",
            "kind": "run",
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
        assert result.dataset_name == f"mini {split}"


def test_student_baseline_and_teacher_have_a_row_each(card_of, baseline):
    text = card_of().text
    head, _, *body = rows(text)[:5]
    assert head == [
        "",
        "dev-clean WER (%)",
        "dev-clean CER (%)",
        "test-clean WER (%)",
        "test-clean CER (%)",
        "parameters (million)",
        "real-time factor",
    ]
    dev, test = SCORES.values()
    for row, (name, column, *others) in zip(
        body,
        [
            ("this model", 0, "0.45", "0.0024"),
            ("baseline: the same network, CTC only", 3, "0.45", "0.0025"),
            ("teacher: `jasper_dr`", 2, "1.07", "0.0044"),
        ],
        strict=True,
    ):
        figures = [
            figure
            for split in (dev, test)
            for figure in (
                split[column] if column != 3 else split[0] + 20,
                split[1] + column,
            )
        ]
        assert row == [name, *(f"{f:.2f}" for f in figures), *others]
    assert "baseline was trained for 1 epoch (seed 5)" in text
    assert "dev-clean has 37 utterances of 398 words" in text
    assert "seed 17" in text
    assert "distilled from `jasper_dr` (1.07 million parameters)" in text
    assert "trained by method `ctc` for 40 epochs" in text


@pytest.fixture
def baseline(run):
    """The same network by CTC only, named by the run as train.py does."""
    folder = run.parent / "results" / "ctc_lstm" / "17"
    results = runs.read_results(run)
    files.write_json(
        run / runs.RESULTS, results | {"baseline": "results/ctc_lstm/17"}
    )
    results |= {"method": "ctc", "teacher": None, "role": "baseline"}
    scored = splits(0)
    for scores in scored.values():
        scores["wer"] += 20
        scores["cer"] += 3
    results |= {"stages": {"ctc": {"splits": scored}}, "epochs": 1, "seed": 5}
    results["real_time_factor"] = 0.0025
    files.write_json(folder / runs.RESULTS, results)
    with open(run / "hyperparams.yaml", "a") as file:
        file.write(f"recipe_folder: {run.parent}\n")
    return folder


@pytest.mark.parametrize(
    "missing", ["results.json", "network", "corpus", "role"]
)
def test_without_its_baseline_a_card_has_no_row(card_of, baseline, missing):
    path = baseline / runs.RESULTS
    if missing == "results.json":
        path.unlink()
    else:
        key = {"network": "student"}.get(missing, missing)
        files.write_json(path, files.read_json(path) | {key: "other"})
    assert "baseline" not in card_of().text


@pytest.mark.parametrize(
    "epochs, seconds, audio, duration, length",
    [
        (1, 64.0, 61.0, "1 epoch in 1 minute", "On 1 minute of"),
        (8, 29.0, 1.0, "8 epochs in 29 seconds", "On 1 second of"),
        (2, 1.2, 3600.0, "2 epochs in 1 second", "On 1.0 hour of"),
        (16, 163.9, 1200.2, "16 epochs in 3 minutes", "On 20 minutes of"),
        (16, 9000, 59.8, "16 epochs in 2.5 hours", "On 1 minute of"),
    ],
)
def test_one_is_singular(card_of, epochs, seconds, audio, duration, length):
    stages = {"skd": {"epochs": epochs, "splits": splits(0)}}
    text = card_of(
        epochs=epochs,
        train_seconds=seconds,
        train_audio_seconds=audio,
        stages=stages,
    ).text
    assert f", {duration}:" in text and length in text
    counted = duration.partition(" in ")[0]
    assert f" {counted}." in re.search(r"^1\. .*SKD.*$", text, re.MULTILINE)[0]
    assert not re.search(r"\b1 (epoch|minute|second|utterance|word)s", text)


def test_the_title_is_the_name_of_the_repository(config, tmp_path):
    card = ModelCard(model_card(config, tmp_path / "model", "me/great"))
    assert card.text.strip().startswith("# great\n")
    assert card.data.model_name == "great"


def test_the_training_is_described_with_its_settings(card_of):
    text = card_of().text
    assert "On 20 minutes of `mini` (`train-clean-100`)" in text
    assert "without transcripts, `train-other-500`" in text
    first = re.search(r"^1\. .*RKD.*$", text, re.MULTILINE)[0]
    assert (
        " 4 epochs." in first and '`rkd.frame_weighting: "nonblank"`' in first
    )
    second = re.search(r"^2\. .*SKD.*$", text, re.MULTILINE)[0]
    assert " 12 epochs." in second and "`skd.weight: 1.0`" in second
    assert "frame_weighting" not in second
    assert "`lr: 0.003`" in text and "speeds" not in text
    assert "Trained with speechbrain 1.1.2, torch 2.11.0." in text


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


@pytest.mark.parametrize("corpus", ["mini", "mini_20h"])
def test_synthetic_speech_is_called_so(card_of, corpus):
    assert "**A demonstration.** This model was trained on synthetic" in (
        card_of(corpus=corpus).text
    )


def test_librispeech_is_no_demonstration(card_of):
    card = card_of(
        corpus="librispeech100",
        corpus_license="cc-by-4.0",
        synthetic=False,
        train_audio_seconds=362_160,
    )
    assert "demonstration" not in card.text
    assert "synthetic" not in card.text
    assert "On 100.6 hours of `librispeech100`" in card.text
    assert card.data.license == "cc-by-4.0"
    assert card.data.datasets == ["openslr/librispeech_asr"]
    types = {result.dataset_type for result in card.data.eval_results}
    assert types == {"openslr/librispeech_asr"}


def test_of_another_corpus_nothing_is_invented(card_of):
    card = card_of(
        corpus="small", corpus_license=None, language=None, synthetic=False
    )
    assert "demonstration" not in card.text
    assert card.data.license == "unknown"
    assert card.data.language is None and card.data.datasets is None
    assert card.data.eval_results[0].dataset_name == "small dev-clean"


def test_a_card_has_a_language_without_its_region(card_of):
    assert card_of(language="pt-BR").data.language == "pt"


@pytest.mark.parametrize(
    "method, is_named",
    [("skd", False), ("pseudo", False), ("rkd", True), ("rkd+pseudo", True)],
)
def test_tutornet_is_named_for_its_first_step(card_of, method, is_named):
    stage = {"epochs": 4, "splits": splits(0)}
    stages = dict.fromkeys(method.split("+"), stage)
    text = card_of(method=method, stages=stages).text
    assert ("after [TutorNet]" in text) == is_named
    assert "None" not in text and "Undefined" not in text


def test_a_baseline(card_of):
    card = card_of(teacher=None, method="ctc")
    assert "trained without a teacher, by method `ctc`" in card.text
    assert "knowledge-distillation" not in card.data.tags
    assert (
        "teacher"
        not in card.text.partition("## Results")[2].partition("## Training")[0]
    )
    assert [row[0] for row in rows(card.text)[2:4]] == ["this model", "file"]
    assert card.data.base_model is None


def test_a_teacher_from_the_hub_is_named(card_of):
    teacher = {"name": "big", "kind": "ctc", "parameters": 94_400_000}
    card = card_of(teacher=teacher | {"source": "they/wav2vec2@abc"})
    assert card.data.base_model == "they/wav2vec2"
    text = card.text
    assert (
        "distilled from `big`, [they/wav2vec2@abc]"
        "(https://huggingface.co/they/wav2vec2) (94.40 million parameters)"
    ) in text
    card = card_of(teacher=teacher | {"source": "/home/secret@x/model"})
    assert card.data.base_model is None
    text = card.text
    assert "distilled from `big` (94.40 million parameters)" in text
    assert "secret" not in text


def test_latency_of_a_streaming_student(card_of):
    scored = splits(0)
    scored["test-clean"]["latency"] = {"median": 39.6}
    stages = {"skd": {"epochs": 1, "splits": scored}}
    table = rows(card_of(stages=stages).text)
    assert not any("dev-clean latency" in cell for cell in table[0])
    column = table[0].index("test-clean latency (ms)")
    assert [row[column] for row in table[2:4]] == ["40", "-"]


def test_what_it_writes_and_does_not(card_of):
    text = card_of().text
    assert "- It outputs ' A B C " in text and " Z and spaces, and" in text
    assert "process the padding as silence" in text


def test_a_foreign_model_says_what_it_needs_and_runs(tmp_path):
    write_run(tmp_path / "run", "wav2vec2", WAV2VEC2)
    export(tmp_path / "run", tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    assert "pip install speechbrain transformers" in text
    assert "Loading runs `custom.py` and what `hyperparams.yaml`" in text
    assert "process the padding as silence" not in text
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
    assert "at most 2e-05 nats on 50 utterances of test-clean" in card.text
    assert (
        "hf download me/model --local-dir model\ncd model\n"
        "pip install onnxruntime numpy soundfile\n"
        "python onnx/transcribe.py speech.wav\n"
    ) in card.text
    assert "sherpa_onnx.OnlineRecognizer.from_t_one_ctc(" in card.text
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
    assert (config["license"], config["language"]) == ("mit", "de")
    card = ModelCard((to / "README.md").read_text())
    assert (card.data.license, card.data.language) == ("mit", "de")
    text = model_card(config, to, "me/x", license="other", language="fr")
    card = ModelCard(text)
    assert (card.data.license, card.data.language) == ("other", "fr")


@pytest.mark.slow
@pytest.mark.parametrize("network", ["lstm", "lstm_streaming"])
def test_the_commands_of_a_card_run(tmp_path, network):
    pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is not installed")
    write_run(tmp_path / "run", network, RECURRENT)
    add_dev_clean(tmp_path / "run")
    write_corpus(tmp_path / "data", count=2)
    to = tmp_path / "model"
    export(tmp_path / "run", to, onnx=True, sherpa=True, data=tmp_path / "data")
    wav = make_speech(3, 1.5).numpy()
    for folder in (to, tmp_path):
        soundfile.write(folder / "speech.wav", wav, RATE)
    text = ModelCard((to / "README.md").read_text()).text
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
    printed = []
    for language, code in blocks:
        # From the first line on that is for the folder of the model
        folder = to if "cd model" in code or "sherpa" in code else tmp_path
        lines = [
            line
            for line in code.splitlines()
            if not line.startswith(("cd ", "pip "))
        ]
        if language == "python":
            command = [sys.executable, "-c", "\n".join(lines)]
        elif language == "" and lines:
            (line,) = lines
            program, *arguments = shlex.split(line)
            command = [
                sys.executable,
                *{"python": [], "tutornet": ["-m", "tutornet_sb.cli"]}[program],
                *arguments,
            ]
        else:
            continue
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.strip().rpartition("\t")[2])
    stock, transcribe, onnx, sherpa = printed
    assert stock == transcribe == onnx
    recognizer = files.read_json(to / "config.json")["sherpa"]["recognizer"]
    files_of_sherpa = to / "sherpa/model.onnx", to / "sherpa/tokens.txt"
    transcribe_by_sherpa = load_sherpa(recognizer, *files_of_sherpa)
    samples, _ = soundfile.read(to / "speech.wav", dtype="float32")
    assert " ".join(sherpa.split()) == transcribe_by_sherpa(samples) != ""
