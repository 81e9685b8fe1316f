"""Models as ONNX graphs, in int8 too, and what runs them without torch."""

import json
import shutil
import subprocess
import sys
from io import StringIO

import jiwer
import numpy as np
import onnx
import pytest
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML
from small_runs import (
    MODELS,
    RATE,
    RECURRENT,
    add_dev_clean,
    make_speech,
    write_corpus,
    write_run,
)
from speechbrain.decoders.ctc import ctc_greedy_decode
from speechbrain.processing.features import STFT
from typer.testing import CliRunner

from tutornet_sb import files, runs
from tutornet_sb.cli import app
from tutornet_sb.composition import include
from tutornet_sb.corpora.tokenizer import pieces
from tutornet_sb.publishing import onnx as graphs
from tutornet_sb.publishing import runner
from tutornet_sb.publishing.export import export
from tutornet_sb.publishing.onnx import (
    ConvolutionSTFT,
    compare,
    quantize,
    write_onnx,
)
from tutornet_sb.publishing.runner import OnnxModel

NETWORKS = sorted(
    path.stem
    for path in MODELS.glob("*.yaml")
    # Of one kind with others that are here
    if path.stem not in ("whisper", "quartznet10x5", "quartznet15x5")
)
ABOUT = {
    "name": "a model",
    "sample_rate": RATE,
    "frame_period": 0.02,
    "symbols": ["<unk>", *"▁ABCDEFGHIJKLMNOPQRSTUVWXYZ'"],
    "blank_index": 0,
}
# A user's machine, where nothing else can be imported
USER = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in (
            "torch", "torchaudio", "speechbrain", "tutornet_sb", "transformers",
            "sentencepiece", "onnx", "scipy", "librosa",
        ):
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[1])
import transcribe

transcribe.main(sys.argv[2:])
"""


def make_network(name, **values):
    content = include(MODELS / f"{name}.yaml", ".", "small", values)
    text = StringIO()
    YAML().dump(content, text)
    torch.manual_seed(3)
    model = load_hyperpyyaml(text.getvalue())["model"].eval()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_var.uniform_(0.5, 2)
    return model


def batch_of(*seconds):
    speech = [make_speech(seed, s) for seed, s in enumerate(seconds)]
    lengths = torch.tensor([len(wav) for wav in speech])
    return torch.nn.utils.rnn.pad_sequence(speech, batch_first=True), lengths


# ------------------------------------------------------------------ the graph


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"win_length": 20, "n_fft": 512},
        {"hop_length": 5, "win_length": 16, "n_fft": 300},
        {"window_fn": torch.hann_window, "win_length": 20, "n_fft": 320},
    ],
)
@pytest.mark.parametrize("samples", [1, 159, 160, 161, 3001])
def test_the_convolution_is_the_fourier_transform(options, samples):
    stft = STFT(sample_rate=RATE, **options)
    wavs = torch.randn(2, samples, generator=torch.Generator().manual_seed(1))
    expected = stft(wavs)
    found = ConvolutionSTFT(stft)(wavs)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_without_padding_it_is_the_same_of_a_padded_waveform():
    stft = STFT(sample_rate=RATE, win_length=20, n_fft=512)
    plain, bare = ConvolutionSTFT(stft), ConvolutionSTFT(stft, pad=False)
    wavs = torch.randn(1, 1000)
    padded = torch.nn.functional.pad(wavs, (plain.before, plain.after))
    assert torch.equal(bare(padded), plain(wavs))


@pytest.mark.parametrize(
    "options", [{"center": False}, {"pad_mode": "reflect"}]
)
def test_other_transforms_are_refused(options):
    with pytest.raises(ValueError, match="centred|pad_mode"):
        ConvolutionSTFT(STFT(sample_rate=RATE, **options))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_as_a_graph(name, tmp_path):
    model = make_network(name)
    written = write_onnx(model, tmp_path / "model.onnx", ABOUT)
    # Other batches and lengths than it was tried on
    for seconds in ((0.31,), (1.7, 0.4, 0.9, 0.08, 1.2)):
        wavs, lengths = batch_of(*seconds)
        difference, _, theirs = compare(model, written, wavs, lengths)
        assert 0 <= difference < 1e-4
        # By another way, in doubles
        with torch.no_grad():
            encoding = model(wavs, lengths / wavs.shape[1])
        expected = encoding.logits.double().softmax(-1).log()
        for row, count, graph in zip(
            expected, encoding.lengths, theirs, strict=True
        ):
            assert len(graph) == count
            torch.testing.assert_close(
                graph.double(), row[:count], atol=1e-3, rtol=0
            )


@pytest.mark.parametrize("name", ["lstm", "lstm_streaming", "deepspeech2"])
def test_a_graph_does_not_depend_on_gain_and_offset(name, tmp_path):
    model = make_network(name)
    written = write_onnx(model, tmp_path / "model.onnx", ABOUT)
    wavs, lengths = batch_of(1.1, 0.6)
    inside = torch.arange(wavs.shape[1]) < lengths[:, None]
    with torch.no_grad():
        encoding = model(wavs, lengths / wavs.shape[1])
    expected = encoding.logits.log_softmax(-1).numpy()
    for gain, offset in ((-30, 0), (6, 0), (0, 0.05)):
        changed = wavs * 10 ** (gain / 20) + offset * inside
        found, frames = written.encode(changed.numpy(), lengths.numpy())
        for ours, theirs, count in zip(expected, found, frames, strict=True):
            np.testing.assert_allclose(
                theirs[:count], ours[:count], atol=1e-3, rtol=0
            )


def test_the_graph_says_what_it_is(tmp_path):
    write_onnx(make_network("gru", **RECURRENT), tmp_path / "m.onnx", ABOUT)
    model = OnnxModel(tmp_path / "m.onnx", threads=1)
    assert (model.name, model.sample_rate) == ("a model", RATE)
    assert (model.frame_period, model.blank_index) == (0.02, 0)
    assert model.symbols == ABOUT["symbols"]
    graph = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(graph)
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in tensor.shape.dim]
        for value in (*graph.graph.input, *graph.graph.output)
        for tensor in [value.type.tensor_type]
    }
    assert shapes == {
        "wavs": ["batch", "samples"],
        "lengths": ["batch"],
        "log_probs": ["batch", "frames", 29],
        "frames": ["batch"],
    }


def test_a_network_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be written as ONNX"):
        write_onnx(make_network("whisper"), tmp_path / "m.onnx", ABOUT)


def test_a_graph_that_differs_is_refused(tmp_path, monkeypatch):
    class Forgetful(torch.nn.Module):
        """A head of which the trace takes a number for a constant."""

        out_features = 29

        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, x):
            return self.head(x) * int(x.shape[1])

    model = make_network("gru", **RECURRENT)
    model.head = Forgetful(model.head)
    with pytest.raises(ValueError, match=r"differ by .* nats"):
        write_onnx(model, tmp_path / "m.onnx", ABOUT)


# ----------------------------------------------------------------- the runner


def test_the_runner_decodes_as_speechbrain_does(tmp_path):
    write_run(tmp_path / "run", "gru", RECURRENT)
    model, tokenizer = runs.load_run(tmp_path / "run")
    about = ABOUT | {"symbols": pieces(tokenizer)}
    written = write_onnx(model.eval(), tmp_path / "m.onnx", about)
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        log_probs = torch.randn(40, 29, generator=generator)
        # Repetitions, blanks and spaces
        log_probs[:, :2] += 1
        log_probs = log_probs.repeat_interleave(2, 0).log_softmax(-1)
        ids = ctc_greedy_decode(
            log_probs.unsqueeze(0), torch.ones(1), blank_id=0
        )[0]
        expected = " ".join(tokenizer.decode(ids).split())
        assert written.decode(log_probs.numpy()) == expected
    silence = np.zeros((9, 29))
    silence[:, 0] = 1
    assert written.decode(silence) == ""
    assert written.decode(np.zeros((0, 29))) == ""


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(ValueError, match="cannot be loaded by onnxruntime"):
        OnnxModel(path)
    one = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    two = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [one], [two])
    opset = [onnx.helper.make_opsetid("", 17)]
    made = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    onnx.save(made, path)
    with pytest.raises(ValueError, match="does not say what it is"):
        OnnxModel(path)
    made.metadata_props.add(key="tutornet", value='{"format": "another"}')
    onnx.save(made, path)
    with pytest.raises(ValueError, match="is of format 'another'"):
        OnnxModel(path)
    made.metadata_props[0].value = json.dumps({"format": runner.FORMAT})
    onnx.save(made, path)
    with pytest.raises(ValueError, match="lacks 'name'"):
        OnnxModel(path)


# --------------------------------------------------------------- the export


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus") / "LibriSpeech"
    write_corpus(root)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_run(folder, "lstm", RECURRENT)
    add_dev_clean(folder)
    return folder


@pytest.fixture(scope="module")
def exported(run, corpus, tmp_path_factory):
    to = tmp_path_factory.mktemp("exports") / "to"
    return to, export(run, to, int8=True, data=corpus)


def read_split(corpus, split):
    """Waveforms and transcripts, in the order of their ids."""
    (listing,) = (corpus / split).glob("*/*/*.trans.txt")
    rows = [line.split(" ", 1) for line in listing.read_text().splitlines()]
    return [
        (soundfile.read(listing.parent / f"{key}.flac", dtype="float32")[0], t)
        for key, t in rows
    ]


def test_the_export_says_how_its_graphs_do(exported, run, corpus):
    to, config = exported
    known = config["onnx"]
    assert known["model"] == "onnx/model.onnx"
    assert known["int8"] == {"model": "onnx/model.int8.onnx"}
    assert known["checked_on"] == {"split": "test-clean", "utterances": 11}
    assert 0 < known["max_difference"] < 1e-4
    assert files.read_json(to / "config.json")["onnx"] == known
    scores = known["scores"]["test-clean"]
    assert (scores["utterances"], scores["words"]) == (11, 21)
    # Once more, one by one
    model, tokenizer = runs.load_run(run)
    said = {"pytorch": [], "onnx": [], "int8": []}
    forms = {
        "onnx": OnnxModel(to / "onnx/model.onnx"),
        "int8": OnnxModel(to / "onnx/model.int8.onnx"),
    }
    references = []
    for wav, text in read_split(corpus, "test-clean"):
        references.append(text)
        with torch.no_grad():
            encoding = model.eval()(torch.from_numpy(wav[None]), torch.ones(1))
        ids = ctc_greedy_decode(encoding.logits, torch.ones(1), blank_id=0)[0]
        said["pytorch"].append(" ".join(tokenizer.decode(ids).split()))
        for name, form in forms.items():
            said[name].append(form.transcribe(wav))
    assert said["onnx"] == said["pytorch"]
    assert len(set(said["pytorch"])) > 8
    for name, texts in said.items():
        assert scores["wer"][name] == 100 * jiwer.wer(references, texts)
    same = sum(
        a == b for a, b in zip(said["int8"], said["pytorch"], strict=True)
    )
    assert scores["same"] == {"onnx": 11, "int8": same}


def test_the_folder_of_the_graph_needs_no_torch(exported, run, corpus):
    to, _ = exported
    paths = sorted(map(str, corpus.glob("test-clean/*/*/*.flac")))
    user = [sys.executable, "-c", USER, str(to / "onnx")]
    done = subprocess.run([*user, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, tokenizer = runs.load_run(run)
    expected = []
    for path in paths:
        wav = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        with torch.no_grad():
            logits = model.eval()(wav.unsqueeze(0), torch.ones(1)).logits
        ids = ctc_greedy_decode(logits, torch.ones(1), blank_id=0)[0]
        expected.append(f"{path}\t{' '.join(tokenizer.decode(ids).split())}")
    assert done.stdout.splitlines() == expected


def test_the_runner_names_what_it_cannot_read(exported, corpus, tmp_path):
    to, _ = exported
    good = next(corpus.glob("test-clean/*/*/*.flac"))
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"noise")
    slow = tmp_path / "slow.wav"
    soundfile.write(slow, np.zeros((100, 2)), 8000)
    user = [sys.executable, str(to / "onnx" / "transcribe.py")]
    done = subprocess.run(
        [*user, bad, slow, good], capture_output=True, text=True
    )
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert "bad.wav" in first and "slow.wav: 100 samples at 8000 Hz" in second
    assert done.stdout.startswith(f"{good}\t")


def test_int8_keeps_the_features_and_the_symbols(exported):
    to, _ = exported
    graph = onnx.load(to / "onnx/model.int8.onnx")
    whole = onnx.load(to / "onnx/model.onnx")
    known = {p.key: p.value for p in graph.metadata_props}
    assert json.loads(known["tutornet"])["symbols"][1:4] == ["A", "B", "C"]
    assert known == {p.key: p.value for p in whole.metadata_props}
    onnx.checker.check_model(graph)
    weights = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in graph.graph.initializer
    }
    shapes = {
        kind: {a.shape for a in weights.values() if a.dtype == kind}
        for kind in (np.float32, np.int8)
    }
    # The transform's window stays, its basis is computed from it; the weights
    # of convolution, LSTM and head are in int8.
    assert (1, 320) in shapes[np.float32]
    assert (514, 1, 320) not in shapes[np.float32]
    assert {(6, 20, 11), (1, 28, 7), (14, 29)} <= shapes[np.int8]
    assert not {(6, 20, 11), (1, 28, 7), (14, 29)} & shapes[np.float32]


def test_int8_of_convolutions_is_near(tmp_path):
    model = make_network("jasper_mini")
    written = write_onnx(model, tmp_path / "m.onnx", ABOUT)
    speech = [make_speech(seed, 0.8) for seed in range(9)]
    quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", iter(speech[1:]))
    small = OnnxModel(tmp_path / "q.onnx")
    ours, frames = written.encode(speech[0][None], [len(speech[0])])
    theirs, others = small.encode(speech[0][None], [len(speech[0])])
    assert frames.tolist() == others.tolist()
    error = np.abs(np.exp(ours) - np.exp(theirs)).max()
    assert 0 < error < 0.05
    sizes = [(tmp_path / f"{n}.onnx").stat().st_size for n in "mq"]
    assert sizes[1] < sizes[0] - 0.7 * 3 * 390_000


# ---------------------------------------------------------------- the command


def invoke(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_the_command_says_how_they_do(run, corpus, tmp_path):
    result = invoke(run, tmp_path / "to", "--onnx", "--data", corpus.parent)
    assert result.exit_code == 0, result.stderr
    assert "onnx/model.onnx, for onnxruntime" in result.stdout
    assert "WER on test-clean: pytorch" in result.stdout
    assert "the same transcript in 11: onnx 11" in result.stdout
    assert not (tmp_path / "to" / "onnx" / "model.int8.onnx").exists()


def test_without_its_corpus_a_graph_is_compared_on_noise(
    run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    result = invoke(run, "to", "--onnx")
    assert result.exit_code == 0, result.stderr
    assert "compared on noise alone" in result.stdout
    known = files.read_json("to/config.json")["onnx"]
    assert known["checked_on"] is None and known["scores"] == {}
    card = (tmp_path / "to" / "README.md").read_text()
    assert "on noise only" in card


@pytest.mark.parametrize("form", ["--int8", "--sherpa"])
def test_the_corpus_is_asked_for_where_it_is_needed(
    run, tmp_path, monkeypatch, form
):
    monkeypatch.chdir(tmp_path)
    result = invoke(run, "to", form)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert "MiniLibri: say where it lies by --data" in line
    assert not (tmp_path / "to").exists()


def test_a_corpus_that_is_not_there_is_named(run, tmp_path):
    result = invoke(run, tmp_path / "to", "--onnx", "--data", tmp_path / "no")
    assert result.exit_code == 2 and "no: say where" in result.stderr


def test_the_corpus_of_the_run_is_found(run, corpus, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / runs.HYPERPARAMS).write_text(
        # Read, not run
        f"data_folder: here\nrecipe_folder: {corpus.parent}\n"
        "danger: !apply:os.abort\n"
    )
    (corpus.parent / "here").mkdir(exist_ok=True)
    shutil.copytree(
        corpus, corpus.parent / "here" / "LibriSpeech", dirs_exist_ok=True
    )
    monkeypatch.chdir(tmp_path)
    model, _ = runs.load_run(copy)
    results = {"splits": {"dev-clean": {}, "test-clean": {}}}
    speech = runs.find_speech(copy, None, results, model, needed=True)
    assert speech.split == "test-clean"
    assert len(speech.test) == 11 and len(speech.valid) == 11
    lengths = [len(one.read()) for one in speech.test]
    assert lengths == sorted(lengths)
    assert runs.find_speech(copy, None, None, model, needed=False) is None
    with pytest.raises(ValueError, match="no dev and test split"):
        runs.find_speech(copy, None, None, model, needed=True)


def test_the_runner_is_a_file_of_its_own(exported):
    to, _ = exported
    copy = (to / "onnx" / "transcribe.py").read_text()
    assert copy == open(runner.__file__, encoding="utf-8").read()
    assert graphs.METADATA == runner.METADATA
