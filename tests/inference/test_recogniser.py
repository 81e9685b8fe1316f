"""Models of every kind loaded, and folders by people who mean harm."""

import json
import os
import resource
import shutil

import numpy as np
import onnx
import onnx.external_data_helper
import pytest
import safetensors.torch
import torch
from small_runs import (
    BLOCKS,
    CONFORMER,
    DEEPSPEECH2,
    MODELS,
    RATE,
    RECURRENT,
    WAV2VEC2,
    make_speech,
    tidy,
    write_onnx,
    write_run,
)

from tutornet_sb.inference.recogniser import load_recogniser
from tutornet_sb.networks import runs
from tutornet_sb.networks.description import ALLOWED, rebuild
from tutornet_sb.networks.export_folder import read_config
from tutornet_sb.publishing.export import export
from tutornet_sb.teachers import sources
from tutornet_sb.util import files

# What differs from the size `small`, to be quick
TINY = {
    "lstm": RECURRENT,
    "gru": RECURRENT,
    "lstm_streaming": RECURRENT,
    "gru_streaming": RECURRENT,
    "jasper_mini": {"blocks": BLOCKS, "encoder_size": 8},
    "deepspeech2": {**DEEPSPEECH2, "encoder_size": 8},
    "conformer": CONFORMER,
    "wav2vec2": WAV2VEC2,
    "hubert": WAV2VEC2,
}
NETWORKS = sorted(path.stem for path in MODELS.glob("*.yaml"))
SYMBOLS = ["<blank>", "▁", "A", "B"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Runs of all networks and their exports, made when asked for."""
    folder = tmp_path_factory.mktemp("models")

    def get(name, foreign=False):
        run, to = folder / f"{name} run", folder / f"{name} {foreign}"
        if not run.is_dir():
            values = TINY.get(name, {})
            write_run(run, name, values)
        if not to.is_dir():
            export(run, to, foreign)
        return run, to

    return get


@pytest.fixture
def to(world, tmp_path):
    """An export, to be changed."""
    shutil.copytree(world("lstm")[1], tmp_path / "to")
    return tmp_path / "to"


def change(folder, **values):
    config = files.read_json(folder / "config.json") | values
    files.write_json(folder / "config.json", config)


def make_batch(seconds=(0.7, 0.31)):
    wavs = [make_speech(seed, s) for seed, s in enumerate(seconds)]
    lengths = torch.tensor([len(wav) for wav in wavs])
    return torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True), lengths


def check_against(model, recogniser):
    """Each utterance of a padded batch as the model encodes it alone."""
    wavs, lengths = make_batch()
    log_probs, frames = recogniser.encode(wavs, lengths)
    for wav, n, found, count in zip(
        wavs, lengths, log_probs, frames, strict=True
    ):
        with torch.no_grad():
            alone = model(wav[:n].unsqueeze(0), torch.ones(1))
        expected = alone.logits[0].log_softmax(-1)
        assert count == len(expected)
        torch.testing.assert_close(
            found[:count], expected, atol=1e-3, rtol=1e-4
        )


# ----------------------------------------------------------------- all kinds


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_of_the_recipe_is_loaded_from_its_export(world, name):
    run, to = world(name)
    trained, tokenizer = runs.load_run(run)
    recogniser = load_recogniser(to)
    assert recogniser.kind == "export" and recogniser.name == str(to)
    state = recogniser.model.state_dict()
    for key, value in trained.state_dict().items():
        assert torch.equal(state.pop(key), value), key
    assert not state
    assert recogniser.frame_period == trained.frame_period
    assert recogniser.sample_rate == RATE
    assert recogniser.blank_index == 0
    assert recogniser.pieces[:3] == ["<unk>", "A", "B"]
    assert not any(layer.training for layer in recogniser.model.modules())
    check_against(trained.eval(), recogniser)


def test_a_run_is_loaded_with_its_tokenizer(world):
    run, _ = world("lstm")
    recogniser = load_recogniser(run)
    trained, tokenizer = runs.load_run(run)
    assert recogniser.kind == "run"
    ids = [28, 1, 2, 28, 28, 3, 27]
    assert recogniser.decode(ids) == tokenizer.decode(ids)
    check_against(trained.eval(), recogniser)


def test_an_export_spells_as_the_tokenizer_does(world):
    run, to = world("lstm")
    decode, (_, tokenizer) = load_recogniser(to).decode, runs.load_run(run)
    generator = np.random.default_rng(0)
    for length in range(12):
        # Without the blank
        ids = generator.integers(1, 29, length).tolist()
        assert decode(ids) == tidy([tokenizer.decode(ids)])[0]


def test_a_stock_export_is_loaded_by_speechbrain_when_trusted(to, world):
    (to / "config.json").unlink()
    with pytest.raises(ValueError, match="can run any code.*--trust-remote"):
        load_recogniser(to)
    recogniser = load_recogniser(to, trust_remote_code=True)
    assert recogniser.kind == "encoder_asr"
    assert recogniser.pieces == load_recogniser(world("lstm")[1]).pieces
    # Stock parts process the padding, so they are given none.
    check_against(runs.load_run(world("lstm")[0])[0].eval(), recogniser)


def test_an_onnx_file_and_its_folder(tmp_path):
    weights = write_onnx(tmp_path / "model.onnx", SYMBOLS)
    for source in (tmp_path / "model.onnx", tmp_path):
        recogniser = load_recogniser(source)
        assert recogniser.kind == "onnx" and recogniser.model is None
        assert recogniser.pieces == SYMBOLS
        assert recogniser.frame_period == 0.02
        assert recogniser.decode([1, 2, 3, 1, 3]) == "AB B"
        wavs, lengths = make_batch()
        log_probs, frames = recogniser.encode(wavs, lengths)
        assert frames.tolist() == [35, 15]
        expected = torch.nn.functional.conv1d(
            wavs.unsqueeze(1), weights, stride=320
        )
        torch.testing.assert_close(
            log_probs, expected.transpose(1, 2).log_softmax(-1)
        )
    write_onnx(tmp_path / "a.onnx", [*SYMBOLS, "C"])
    assert load_recogniser(tmp_path).pieces == SYMBOLS
    (tmp_path / "model.onnx").rename(tmp_path / "b.onnx")
    with pytest.raises(ValueError, match=r"a\.onnx, b\.onnx: name one"):
        load_recogniser(tmp_path)
    (tmp_path / "a.onnx").unlink()
    assert load_recogniser(tmp_path).pieces == SYMBOLS


def test_the_export_goes_before_the_onnx_file_beside_it(to):
    write_onnx(to / "model.onnx", SYMBOLS)
    assert load_recogniser(to).kind == "export"
    assert load_recogniser(to / "model.onnx").kind == "onnx"


# ------------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one repository, which copies what it is asked for."""
    asked = []

    def download(source, revision, allow_patterns):
        folder = tmp_path / "snapshots" / "c0ffee"
        folder.mkdir(parents=True, exist_ok=True)
        asked.append((source, revision, allow_patterns))
        for path in (tmp_path / "repository").iterdir():
            if allow_patterns is None or path.name in allow_patterns:
                shutil.copy(path, folder)
        return str(folder)

    monkeypatch.setattr(sources, "snapshot_download", download)
    return asked


def test_of_an_export_on_the_hub_only_data_is_downloaded(world, hub, tmp_path):
    run, to = world("jasper_mini")
    shutil.copytree(to, tmp_path / "repository")
    recogniser = load_recogniser("some/model", revision="main")
    assert recogniser.name == "some/model@main"
    assert recogniser.kind == "export"
    # The weights are those of the commit that the description is of.
    assert hub == [
        ("some/model", "main", ["config.json"]),
        ("some/model", "c0ffee", ["config.json", "model.safetensors"]),
    ]
    downloaded = {p.name for p in (tmp_path / "snapshots/c0ffee").iterdir()}
    assert downloaded == {"config.json", "model.safetensors"}
    check_against(runs.load_run(run)[0].eval(), recogniser)


def test_a_yaml_on_the_hub_needs_trust(to, hub, tmp_path):
    (to / "config.json").unlink()
    to.rename(tmp_path / "repository")
    with pytest.raises(ValueError, match="some/model is .*can run any code"):
        load_recogniser("some/model")
    assert not any(files is None for *_, files in hub)
    recogniser = load_recogniser("some/model", trust_remote_code=True)
    assert recogniser.kind == "encoder_asr"


def test_a_run_on_the_hub_is_not_loaded(world, hub, tmp_path):
    shutil.copytree(world("lstm")[0], tmp_path / "repository")
    with pytest.raises(ValueError, match="some/model cannot be loaded"):
        load_recogniser("some/model", trust_remote_code=True)


# ------------------------------------------------------- what cannot be loaded


def test_what_is_not_there(tmp_path, to):
    with pytest.raises(FileNotFoundError, match="neither a folder, a file nor"):
        load_recogniser(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is on this machine"):
        load_recogniser(to, revision="main")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty cannot be loaded: it has"):
        load_recogniser(tmp_path / "empty")
    with pytest.raises(ValueError, match="the device 'cude' cannot be used"):
        load_recogniser(to, device="cude")


@pytest.mark.parametrize(
    "values, match",
    [
        (
            {"format": "tutornet_sb export 1"},
            "of format 'tutornet_sb export 1'",
        ),
        ({"symbols": "ABC"}, "'symbols' is no list of texts"),
        ({"symbols": [1, 2]}, "'symbols' is no list of texts"),
        ({"symbols": ["A", "B"]}, r"for its 2 symbols, got \(1, 51, 29\)"),
        ({"blank_index": 29}, "'blank_index' 29 is none of its 29 symbols"),
        ({"blank_index": -1}, "'blank_index' -1 is none"),
        ({"blank_index": True}, "'blank_index' True is none"),
        ({"sample_rate": 8000}, "features, 16000 Hz, got 8000 Hz"),
        ({"sample_rate": 0}, "'sample_rate' is 0"),
        ({"student": [1]}, "describes no 'student'"),
        ({"student": {}}, "not one of a network"),
    ],
)
def test_a_config_that_is_wrong(to, values, match):
    change(to, **values)
    with pytest.raises(ValueError, match=match):
        load_recogniser(to)


def test_a_config_that_is_damaged_or_a_flood(to):
    path, text = to / "config.json", (to / "config.json").read_text()
    (to / "hyperparams.yaml").unlink()
    for damaged in (text[:-9], "[" * 100_000, "[]", '{"a": NaN}', "\udcff"):
        path.write_text(damaged, errors="surrogateescape")
        with pytest.raises(ValueError):
            load_recogniser(to)
        with pytest.raises(ValueError, match="config.json is damaged"):
            read_config(to)
    path.write_text(text + " " * 2**22)
    with pytest.raises(ValueError, match="bytes, more than"):
        load_recogniser(to)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        read_config(to)


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    change(weights)
    path.write_bytes(safetensors.torch.save(weights))


def test_weights_are_those_of_the_network_or_refused(to):
    original = (to / "model.safetensors").read_bytes()

    def reshape(weights):
        weights["head.bias"] = torch.zeros(30)

    def spoil(weights):
        weights["head.bias"][3] = float("nan")

    for change, match in (
        (lambda weights: weights.pop("head.bias"), r"1 missing: head\.bias"),
        (lambda weights: weights.update(x=torch.ones(1)), "1 unexpected: x"),
        (reshape, r"head\.bias \(30,\) for \(29,\)"),
        (spoil, "is not finite"),
    ):
        (to / "model.safetensors").write_bytes(original)
        change_weights(to, change)
        with pytest.raises(ValueError, match=match):
            load_recogniser(to)
    for damaged in (b"", original[:-1], original[:100], b"\xff" * 99):
        (to / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be read as safetensors"):
            load_recogniser(to)
    (to / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load_recogniser(to)


@pytest.mark.parametrize(
    "metadata, match",
    [
        ({"format": "other"}, "of format 'other'"),
        ({"symbols": SYMBOLS[:3]}, r"for its 3 symbols, got \(1, 50, 4\)"),
        ({"blank_index": 4}, "'blank_index' 4 is none"),
        ({"frame_period": 0}, "'frame_period' is 0"),
    ],
)
def test_an_onnx_file_with_wrong_metadata(tmp_path, metadata, match):
    write_onnx(tmp_path / "x.onnx", SYMBOLS, metadata)
    with pytest.raises(ValueError, match=match):
        load_recogniser(tmp_path / "x.onnx")


def test_onnx_files_that_cannot_be_run(tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"not ONNX")
    with pytest.raises(ValueError, match="cannot be loaded by onnxruntime"):
        load_recogniser(path)
    write_onnx(path, SYMBOLS)
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(ValueError, match="has no metadata 'tutornet'"):
        load_recogniser(path)
    write_onnx(path, SYMBOLS)
    path.write_bytes(path.read_bytes().replace(b"tiny", b"\xff" * 4))
    with pytest.raises(ValueError, match="cannot be loaded by onnxruntime"):
        load_recogniser(path)
    write_onnx(path, SYMBOLS)
    model = onnx.load(path)
    model.graph.output.pop()
    onnx.save(model, path)
    with pytest.raises(ValueError, match="the outputs log_probs and frames"):
        load_recogniser(path)


def test_an_onnx_file_whose_frames_are_none(tmp_path):
    path = tmp_path / "x.onnx"
    write_onnx(path, SYMBOLS)
    model = onnx.load(path)
    # How many samples there are, not how many of each utterance
    model.graph.node[-1].input[0] = "hop"
    onnx.save(model, path)
    with pytest.raises(ValueError, match="must be among its 50 frames"):
        load_recogniser(path)


# ------------------------------------------------------------ meaning harm


def test_code_in_an_export_is_never_run(world, tmp_path, monkeypatch):
    shutil.copytree(world("jasper_mini", foreign=True)[1], tmp_path / "to")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "to" / "custom.py").write_text("open('harm', 'w')\n")
    (tmp_path / "to" / "hyperparams.yaml").write_text(
        "harm: !apply:os.system [touch harm]\n"
    )

    class Harm:
        def __reduce__(self):
            return os.system, ("touch harm",)

    torch.save(Harm(), tmp_path / "to" / "model.ckpt")
    (tmp_path / "to" / "tokenizer.model").write_bytes(b"harm")
    assert load_recogniser("to").kind == "export"
    assert not (tmp_path / "harm").exists()


def linear(inputs, outputs):
    arguments = {"in_features": inputs, "out_features": outputs}
    return {"!new": "torch.nn.Linear", "arguments": arguments}


@pytest.mark.parametrize("tag", ["!new", "!apply", "!name"])
@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.nn.Linear.__init__",
        "torch.nn.modules.module.torch.load",
        "tutornet_sb.networks.runs.load_run",
        "speechbrain.utils.fetching.fetch",
        "Linear",
        "",
        7,
        ["torch.nn.Linear"],
    ],
)
def test_names_outside_the_list_are_refused(to, tag, name, monkeypatch):
    def refuse(name, *_):
        raise AssertionError(f"{name} was looked up")

    student = files.read_json(to / "config.json")["student"]
    student["arguments"]["head"] = {tag: name, "arguments": ["touch harm"]}
    change(to, student=student)
    with monkeypatch.context() as patch:
        if name != "os.system":
            # The parts before it are looked up.
            patch.setattr(os, "system", refuse)
        with pytest.raises(ValueError, match="which is not among the parts"):
            load_recogniser(to)


@pytest.mark.parametrize(
    "head",
    [
        {"!call": "torch.nn.Linear", "arguments": {}},
        {"!new": "torch.nn.Linear", "arguments": "x"},
        {"!new": "torch.nn.Linear", "arguments": {}, "more": 1},
        {"!new": "torch.nn.Linear", "!apply": "os.system", "arguments": {}},
    ],
)
def test_odd_descriptions_are_refused(head):
    with pytest.raises(ValueError, match="has an odd part"):
        rebuild(head)


def test_descriptions_that_cannot_be_built():
    for arguments, match in (
        ({"in_features": 2}, "out_features"),
        ({"in_features": -2, "out_features": 1}, "cannot be built"),
        ({"in_features": "os", "out_features": 1}, "cannot be built"),
        ({"in_features": 2, "out_features": 1e30}, "a number of 1e"),
        ({"in_features": 2, "out_features": -(10**9)}, "a number of -1e"),
    ):
        with pytest.raises(ValueError, match=match):
            rebuild({"!new": "torch.nn.Linear", "arguments": arguments})
    deep = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        rebuild({"!new": "torch.nn.Sequential", "arguments": deep})


@pytest.mark.parametrize(
    "values, match",
    [
        ({"source": "some/model"}, "published weights from some/model"),
        ({"attn_implementation": "a/kernel"}, "attn_implementation, which"),
        ({"_attn_implementation": "a/kernel"}, "_attn_implementation, which"),
        ({"name_or_path": "/etc"}, "name_or_path, which"),
    ],
)
def test_transformers_is_made_to_read_nothing(values, match):
    values = {"model_type": "wav2vec2"} | values
    name = "tutornet_sb.networks.huggingface.make_network"
    with pytest.raises(ValueError, match=match):
        rebuild({"!apply": name, "arguments": values})


def sizes_of_harm():
    """Networks far larger than their weights, by name."""
    layers = {
        "!new": "torch.nn.Sequential",
        "arguments": [{"!new": "torch.nn.Identity", "arguments": {}}] * 20_000,
    }
    recurrent = {"input_size": 20, "channels": 6, "hidden_size": 7}
    table = [{"channels": 6, "kernel": 1, "repeat": 60_000}]
    networks = "tutornet_sb.networks."
    return {
        "wide": {"head": linear(2**16, 2**16)},
        "many": {"head": layers},
        "deep": {
            "encoder": {
                "!new": networks + "recurrent.RecurrentEncoder",
                "arguments": recurrent | {"layers": 60_000},
            }
        },
        "repeated": {
            "encoder": {
                "!new": networks + "jasper.JasperEncoder",
                "arguments": {"input_size": 20, "blocks": table},
            }
        },
    }


@pytest.mark.parametrize("name", sizes_of_harm())
def test_a_network_larger_than_its_weights_takes_no_memory(to, name):
    student = files.read_json(to / "config.json")["student"]
    student["arguments"] |= sizes_of_harm()[name]
    change(to, student=student)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="far larger network than the weights"):
        load_recogniser(to)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes; the matrix of "wide" alone has 16 GiB.
    assert after - before < 300_000


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("acoustic_model.LogMelFeatures", {"n_mels": 60_000}),
        ("acoustic_model.LogMelFeatures", {"n_fft": 10**9}),
        ("acoustic_model.LogMelFeatures", {"win_length": 10**9}),
        ("acoustic_model.LogMelFeatures", {"hop_length": 0}),
        ("acoustic_model.SpectrogramFeatures", {"sample_rate": 10**12}),
        ("huggingface.WhisperFeatures", {"window": 10**6}),
        ("lobes.CRDNNEncoder", {"input_shape": [1, 60_000, 60_000]}),
        ("lobes.CRDNNEncoder", {"input_shape": [1, "x", 80]}),
    ],
)
def test_sizes_of_features_have_limits(name, arguments):
    (key,) = arguments
    with pytest.raises(ValueError, match=f"{key}|a number of"):
        rebuild(
            {"!new": f"tutornet_sb.networks.{name}", "arguments": arguments}
        )


def test_the_header_of_weights_cannot_claim_more_than_the_file(to):
    header = {
        "head.bias": {
            "dtype": "F32",
            "shape": [2**40],
            "data_offsets": [0, 2**42],
        }
    }
    text = json.dumps(header).encode()
    (to / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + b"\0" * 64
    )
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_recogniser(to)


def test_the_weights_of_an_onnx_file_lie_in_its_folder(tmp_path):
    folder = tmp_path / "to"
    folder.mkdir()
    symbols = [str(i) for i in range(9)]
    write_onnx(folder / "x.onnx", symbols)
    model = onnx.load(folder / "x.onnx")
    onnx.save(
        model,
        folder / "x.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=100,
    )
    assert load_recogniser(folder).pieces == symbols
    shutil.copy(folder / "weights.bin", tmp_path)
    for location in ("../weights.bin", str(tmp_path / "weights.bin")):
        model = onnx.load(folder / "x.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            if onnx.external_data_helper.uses_external_data(tensor):
                for entry in tensor.external_data:
                    if entry.key == "location":
                        entry.value = location
        (folder / "y.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(ValueError, match="cannot be loaded by onnxruntime"):
            load_recogniser(folder / "y.onnx")


def test_the_list_holds_what_the_recipe_uses_and_it_is_all_there():
    import importlib

    for name in ALLOWED:
        module, _, attribute = name.rpartition(".")
        assert callable(getattr(importlib.import_module(module), attribute))
