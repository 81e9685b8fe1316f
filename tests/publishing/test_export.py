"""A run exported, and loaded where tutornet_sb cannot be imported."""

import errno
import importlib
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import soundfile
import torch
from small_runs import (
    BLOCKS,
    CONFORMER,
    DEEPSPEECH2,
    ELSEWHERE,
    RATE,
    RECURRENT,
    WAV2VEC2,
    make_speech,
    tidy,
    write_run,
)
from speechbrain.dataio.preprocess import AudioNormalizer
from speechbrain.decoders.ctc import ctc_greedy_decode
from typer.testing import CliRunner

from tutornet_sb.cli import app
from tutornet_sb.corpora.tokenizer import pieces
from tutornet_sb.networks import runs
from tutornet_sb.networks.export_folder import FORMAT, is_export
from tutornet_sb.publishing import export as exporting
from tutornet_sb.publishing.export import export
from tutornet_sb.teachers.sources import load_teacher
from tutornet_sb.teachers.teacher import Teacher
from tutornet_sb.util import files

# Name of the export: network and what differs from its size `small`
STOCK = {
    "lstm": ("lstm", {**RECURRENT, "kernel_size": 5, "stride": 3}),
    "gru": ("gru", {**RECURRENT, "layers": 3}),
    "gru_past": ("gru", {**RECURRENT, "directions": 1}),
    "lstm_8k": ("lstm", RECURRENT),
}
FOREIGN = {
    "jasper": ("jasper_mini", {"blocks": BLOCKS, "encoder_size": 8}),
    "deepspeech2": ("deepspeech2", {**DEEPSPEECH2, "encoder_size": 8}),
    "conformer": ("conformer", CONFORMER),
    "wav2vec2": ("wav2vec2", WAV2VEC2),
    # Stock parts could do, but for padded batches.
    "lstm_foreign": ("lstm", RECURRENT),
    "gru_foreign": ("gru", RECURRENT),
    # No stock part estimates a level as the speech goes on.
    "lstm_streaming": ("lstm_streaming", RECURRENT),
    "gru_streaming": ("gru_streaming", RECURRENT),
}
NETWORKS = STOCK | FOREIGN
# What a user does there
USER = (
    ELSEWHERE
    + """
import json
import torch
from speechbrain.inference.ASR import EncoderASR
from speechbrain.inference.interfaces import foreign_class

torch.set_num_threads(1)
task = json.load(open(sys.argv[1]))
batches, found = torch.load(task["batches"]), {}
for name, (folder, is_stock) in task["exports"].items():
    load = EncoderASR.from_hparams if is_stock else foreign_class
    model = load(source=folder, savedir=f"{task['cache']}/{name}")
    found[name] = {
        "files": [model.transcribe_file(path) for path in task["files"]],
        "batches": [
            (model.encode_batch(*batch), model.transcribe_batch(*batch))
            for batch in batches
        ],
    }
assert not [name for name in sys.modules if name.startswith("tutornet_sb")]
torch.save(found, task["found"])
"""
)


def transcribe(tokenizer, logits, lengths):
    greedy = ctc_greedy_decode(logits, lengths / logits.shape[1], blank_id=0)
    return tidy(tokenizer.decode(greedy))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Runs, their exports and what a process without this package found."""
    folder = tmp_path_factory.mktemp("exports")
    models = {}
    for name, (network, values) in NETWORKS.items():
        rate = 8000 if name.endswith("8k") else RATE
        models[name] = write_run(folder / "runs" / name, network, values, rate)
        export(
            folder / "runs" / name,
            folder / "exports" / name,
            foreign=name in FOREIGN,
        )
    # A test split of its own, in a folder of its own
    seconds = [0.7, 1.13, 0.42, 0.9, 0.055]
    speech = [make_speech(seed, s) for seed, s in enumerate(seconds)]
    # Another level, and an offset
    speech[1] = 0.03 * speech[1] + 0.05
    paths = []
    for index, wav in enumerate(speech):
        path = folder / f"{index}.wav"
        soundfile.write(path, wav.numpy(), RATE, subtype="FLOAT")
        paths.append(str(path))
    padded = torch.nn.utils.rnn.pad_sequence(speech, batch_first=True)
    lengths = torch.tensor([len(wav) for wav in speech])
    equal = padded[:4, : lengths[2]]
    batches = [(wav.unsqueeze(0), torch.ones(1)) for wav in speech]
    batches += [(equal, torch.ones(4)), (padded, lengths / lengths.max())]
    torch.save(batches, folder / "batches.pt")
    task = {
        "exports": {
            name: (str(folder / "exports" / name), name in STOCK)
            for name in NETWORKS
        },
        "cache": str(folder / "cache"),
        "files": paths,
        "batches": str(folder / "batches.pt"),
        "found": str(folder / "found.pt"),
    }
    (folder / "task.json").write_text(json.dumps(task))
    (folder / "user.py").write_text(USER)
    done = subprocess.run(
        [sys.executable, "user.py", "task.json"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(folder / "found.pt", weights_only=True)
    return folder, models, speech, batches, found


def load_tokenizer(folder, name):
    return runs.load_run(folder / "runs" / name)[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_files_are_transcribed_as_by_the_model_of_the_run(world, name):
    folder, models, speech, _, found = world
    model, tokenizer = models[name], load_tokenizer(folder, name)
    normalizer = AudioNormalizer(model.features.sample_rate)
    expected = []
    for wav in speech:
        wav = normalizer(wav, RATE).unsqueeze(0)
        with torch.no_grad():
            encoding = model(wav, torch.ones(1))
        expected += transcribe(tokenizer, encoding.logits, encoding.lengths)
    assert all(len(set(text)) > 2 for text in expected[:4]), expected
    assert len(set(expected)) == len(expected)
    assert tidy(found[name]["files"]) == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_log_probabilities_are_those_of_the_model(world, name):
    folder, models, _, batches, found = world
    model, tokenizer = models[name], load_tokenizer(folder, name)
    # Stock parts process the padding of the last batch.
    count = len(batches) - (name in STOCK)
    for batch, (log_probs, (texts, _)) in list(
        zip(batches, found[name]["batches"], strict=True)
    )[:count]:
        with torch.no_grad():
            encoding = model(*batch)
        expected = encoding.logits.log_softmax(dim=-1)
        assert log_probs.shape == expected.shape
        for ours, theirs, length in zip(
            expected, log_probs, encoding.lengths, strict=True
        ):
            torch.testing.assert_close(
                theirs[:length], ours[:length], atol=1e-4, rtol=0
            )
        assert tidy(texts) == transcribe(
            tokenizer, encoding.logits, encoding.lengths
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_an_export_is_a_teacher_without_running_its_code(world, name):
    folder, models, _, batches, _ = world
    source = load_teacher(folder / "exports" / name)
    assert source.kind == "export"
    assert source.blank_index == 0
    rate = source.model.features.sample_rate
    assert rate == models[name].features.sample_rate
    tokenizer = load_tokenizer(folder, name)
    assert source.pieces == pieces(tokenizer)
    ids = tokenizer.encode("TWO ONE")
    assert source.decode(ids) == tokenizer.decode(ids)
    teacher = Teacher(source.model)
    with torch.no_grad():
        for wavs, wav_lens in batches:
            expected = models[name](wavs, wav_lens)
            found = teacher(wavs, wav_lens)
            assert torch.equal(found.lengths, expected.lengths)
            torch.testing.assert_close(
                found.posteriors, expected.logits.softmax(-1)
            )


@pytest.mark.parametrize("name", ["gru", "conformer", "wav2vec2"])
def test_what_is_in_the_folder(world, name):
    folder, models, *_ = world
    to = folder / "exports" / name
    expected = {
        "README.md",
        "config.json",
        "hyperparams.yaml",
        "model.ckpt",
        "model.safetensors",
        "tokenizer.ckpt",
        "tokenizer.model",
    }
    if name in FOREIGN:
        expected.add("custom.py")
    assert {path.name for path in to.iterdir()} == expected
    state = models[name].state_dict()
    saved = safetensors.torch.load_file(to / "model.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], state[key]) for key in state)
    tokenizer = (folder / "runs" / name / runs.TOKENIZER).read_bytes()
    assert (to / "tokenizer.model").read_bytes() == tokenizer
    for path in to.iterdir():
        content = path.read_bytes()
        assert str(folder).encode() not in content, path
        assert str(Path(__file__).parents[2]).encode() not in content, path
        assert b"/somewhere/else" not in content, path


def test_config_tells_what_the_model_is(world):
    folder, models, *_ = world
    config = files.read_json(folder / "exports" / "lstm_8k" / "config.json")
    symbols = config.pop("symbols")
    assert len(symbols) == 29 and symbols[1:4] == ["A", "B", "C"]
    results = config.pop("results")
    assert results["splits"]["test-clean"]["wer"] == 50
    assert results["teacher"]["name"] == "jasper_dr"
    assert "folder" not in results and "source" not in results["teacher"]
    assert results["baseline"] is None
    assert config.pop("student")["!new"].endswith(".AcousticModel")
    training = config.pop("training")
    assert training["stages"].keys() == {"rkd", "skd"}
    assert config == {
        "format": "tutornet_sb export 2",
        "name": "lstm",
        "load_with": "speechbrain.inference.ASR.EncoderASR.from_hparams",
        "sample_rate": 8000,
        "frame_period": 0.02,
        "parameters": sum(p.numel() for p in models["lstm_8k"].parameters()),
        "blank_index": 0,
        "license": "apache-2.0",
        "language": "en",
        "synthetic": True,
        "speechbrain_interface": "EncoderASR",
    }


def rebuild(plain):
    """Make what a description says."""
    if isinstance(plain, list):
        return [rebuild(value) for value in plain]
    if not isinstance(plain, dict):
        return plain
    tags = [key for key in plain if key.startswith("!")]
    if not tags:
        return {key: rebuild(value) for key, value in plain.items()}
    module, _, name = plain[tags[0]].rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    arguments = rebuild(plain["arguments"])
    return partial(cls, **arguments) if "!name" in tags else cls(**arguments)


@pytest.mark.parametrize("name", ["lstm", "jasper", "deepspeech2", "conformer"])
def test_description_and_safetensors_are_the_whole_model(world, name):
    folder, models, _, batches, _ = world
    to = folder / "exports" / name
    model = rebuild(files.read_json(to / "config.json")["student"]).eval()
    model.load_state_dict(safetensors.torch.load_file(to / "model.safetensors"))
    with torch.no_grad():
        expected = models[name](*batches[-1])
        assert torch.equal(model(*batches[-1]).logits, expected.logits)


def test_sources_of_other_networks_stay_at_home(world):
    folder, *_ = world
    source = (folder / "exports" / "jasper" / "custom.py").read_text()
    assert "class JasperEncoder" in source
    for name in (
        "class RecurrentEncoder",
        "Brain)",
        "tutornet_sb.networks import",
    ):
        assert name not in source


# --------------------------------------------------------------------- failures


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "a run", "lstm", RECURRENT)
    return tmp_path / "a run"


def invoke(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def refused(*arguments):
    """The only line of standard error."""
    result = invoke(*arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("tutornet export: ")
    assert result.stdout == ""
    return line


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_command_says_how_to_load_the_export(run, tmp_path):
    result = invoke(run, tmp_path / "new" / "to")
    assert result.exit_code == 0, result.stderr
    assert "EncoderASR.from_hparams(source=" in result.stdout
    assert "custom.py" not in listing(tmp_path / "new" / "to")
    result = invoke(run, tmp_path / "new" / "to", "--foreign")
    assert "foreign_class(source=" in result.stdout
    assert "custom.py" in listing(tmp_path / "new" / "to")
    assert listing(tmp_path / "new") == ["to"]


@pytest.mark.parametrize(
    "name", [runs.MODEL_YAML, runs.WEIGHTS, runs.TOKENIZER, runs.RESULTS]
)
def test_an_unfinished_run_is_refused(run, tmp_path, name):
    (run / name).unlink()
    assert "a run holds no finished run" in refused(run, tmp_path / "to")
    assert listing(tmp_path) == ["a run"]


@pytest.mark.parametrize("name", [runs.MODEL_YAML, runs.WEIGHTS, runs.RESULTS])
def test_a_damaged_run_is_refused(run, tmp_path, name):
    (run / name).write_bytes(b'{"model": ')
    line = refused(run, tmp_path / "to")
    assert name in line or name == runs.MODEL_YAML
    assert listing(tmp_path) == ["a run"]


def test_a_run_of_another_version_is_refused(run, tmp_path):
    results = files.read_json(run / runs.RESULTS)
    files.write_json(run / runs.RESULTS, results | {"format": 1})
    line = refused(run, tmp_path / "to")
    assert "format of results.json must be 2, got 1" in line
    assert listing(tmp_path) == ["a run"]


def test_a_folder_that_is_no_export_is_left_alone(run, tmp_path):
    to = tmp_path / "to"
    to.mkdir()
    (to / "config.json").write_text('{"model_type": "wav2vec2"}')
    assert "to holds the run itself, or is no earlier export" in refused(
        run, to
    )
    (to / "config.json").write_text("[half of")
    assert "to holds the run itself, or is no earlier export" in refused(
        run, to
    )
    assert listing(to) == ["config.json"]
    assert "or is no earlier export" in refused(run, to / "config.json")


def test_the_run_itself_is_left_alone(run, tmp_path):
    before = listing(run)
    assert "holds the run itself" in refused(run, run)
    # Not even where it lies in what looks like an export
    files.write_json(tmp_path / "config.json", {"format": FORMAT})
    assert "holds the run itself" in refused(run, tmp_path)
    assert listing(run) == before


def test_an_empty_folder_is_filled(run, tmp_path):
    (tmp_path / "to").mkdir()
    assert not is_export(tmp_path / "to")
    export(run, tmp_path / "to")
    assert is_export(tmp_path / "to")


def test_an_earlier_export_is_replaced(run, tmp_path):
    to = tmp_path / "to"
    export(run, to, foreign=True)
    shutil.rmtree(run)
    model = write_run(run, "gru", {**RECURRENT, "hidden_size": 3})
    config = export(run, to)
    assert "custom.py" not in listing(to)
    assert files.read_json(to / "config.json") == config
    saved = safetensors.torch.load_file(to / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()


def test_a_failure_half_way_leaves_what_was_there(run, tmp_path, monkeypatch):
    to = tmp_path / "to"

    def full(*_):
        raise OSError(errno.ENOSPC, "disk full")

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "write_json", full)
        assert "disk full" in refused(run, to)
    assert listing(tmp_path) == ["a run"]
    export(run, to)
    before = {path.name: path.read_bytes() for path in to.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "write_json", full)
        assert "disk full" in refused(run, to, "--foreign")
    assert {path.name: path.read_bytes() for path in to.iterdir()} == before
    assert listing(tmp_path) == ["a run", "to"]


def test_weights_that_do_not_fit_are_refused_by_the_export(run, tmp_path):
    from speechbrain.inference.ASR import EncoderASR

    to = tmp_path / "to"
    export(run, to)
    weights = torch.load(to / "model.ckpt", weights_only=True)
    del weights["head.bias"]
    torch.save(weights, to / "model.ckpt")
    with pytest.raises(RuntimeError, match=r"head\.bias"):
        EncoderASR.from_hparams(source=str(to), savedir=str(tmp_path / "c"))
