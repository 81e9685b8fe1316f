"""Models as ONNX graphs, in int8 too, and what runs them without torch."""

import json
import re
import shutil
import subprocess
import sys
import warnings
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
    WAV2VEC2,
    add_dev_clean,
    make_speech,
    write_corpus,
    write_run,
)
from speechbrain.decoders.ctc import ctc_greedy_decode
from speechbrain.processing.features import STFT
from typer.testing import CliRunner

from tutornet_sb.cli import app
from tutornet_sb.corpora.tokenizer import greedy_decode, pieces
from tutornet_sb.inference import runner, transcription
from tutornet_sb.inference.recogniser import load_recogniser
from tutornet_sb.inference.runner import OnnxModel
from tutornet_sb.inference.speech import find_speech
from tutornet_sb.inference.transcription import find_pause
from tutornet_sb.networks import runs
from tutornet_sb.publishing import formats
from tutornet_sb.publishing import onnx as graphs
from tutornet_sb.publishing.export import export
from tutornet_sb.publishing.onnx import (
    ConvolutionSTFT,
    NoInt8Error,
    compare,
    find_constants,
    quantize,
    write_onnx,
)
from tutornet_sb.publishing.sherpa import write_sherpa
from tutornet_sb.util import files
from tutornet_sb.util.composition import include

NETWORKS = sorted(
    path.stem
    for path in MODELS.glob("*.yaml")
    # Of one kind with others that are here
    if path.stem != "whisper"
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

sys.exit(transcribe.main(sys.argv[2:]))
"""
# The same, and the most memory that it took (KiB)
MEASURED = USER.replace("sys.exit(", "import resource\ncode = ").replace(
    "[2:]))",
    """[2:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
sys.exit(code)""",
)


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


def assert_finite(path):
    """See that a graph holds numbers, and no other."""
    found = list(find_constants(onnx.load(path).graph))
    assert len(found) > 10
    for tensor in found:
        assert np.isfinite(onnx.numpy_helper.to_array(tensor)).all(), tensor


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
    with pytest.raises(ValueError, match="centred, onesided, plain and padded"):
        ConvolutionSTFT(STFT(sample_rate=RATE, **options))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_as_a_graph(name, tmp_path):
    model = make_network(name)
    written = write_onnx(model, tmp_path / "model.onnx", ABOUT)
    assert_finite(tmp_path / "model.onnx")
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


@pytest.mark.parametrize("name", ["lstm_streaming", "transformer"])
def test_graphs_for_sherpa_are_finite(name, tmp_path):
    write_sherpa(make_network(name), tmp_path / "model.onnx")
    assert_finite(tmp_path / "model.onnx")


def test_constants_within_conditions_are_found():
    def constant(value):
        tensor = onnx.numpy_helper.from_array(np.array([value], np.float32))
        node = onnx.helper.make_node("Constant", [], ["y"], value=tensor)
        y = onnx.helper.make_tensor_value_info("y", tensor.data_type, [1])
        return onnx.helper.make_graph([node], "g", [], [y])

    node = onnx.helper.make_node(
        "If",
        ["x"],
        ["y"],
        then_branch=constant(1),
        else_branch=constant(-np.inf),
    )
    graph = onnx.helper.make_graph([node], "g", [], [])
    found = list(find_constants(graph))
    for tensor in found:
        graphs._make_finite(tensor)
    values = [float(onnx.numpy_helper.to_array(x)[0]) for x in found]
    assert sorted(values) == [-1e9, 1]


def test_a_graph_is_as_exact_of_two_minutes(tmp_path):
    values = WAV2VEC2 | {"source": None, "num_attention_heads": 1}
    model = make_network("wav2vec2", **values)
    written = write_onnx(model, tmp_path / "model.onnx", ABOUT)
    # 384,000 frames of its group normalisation, 1,920,000 samples
    difference, _, _ = compare(model, written, *batch_of(120))
    assert difference < 5e-5


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
        assert written.decode(log_probs.argmax(-1).numpy()) == expected
        assert greedy_decode(log_probs.unsqueeze(0), [80]) == [ids]
    silence = np.zeros((9, 29))
    silence[:, 0] = 1
    assert written.decode(silence.argmax(-1)) == ""
    assert written.decode(np.zeros(0, int)) == ""


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
    with pytest.raises(ValueError, match="has no metadata 'tutornet'"):
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
    with pytest.MonkeyPatch.context() as patch:
        # So small a network gains nothing by int8, and an untrained one may
        # lose anything.
        patch.setattr(formats, "time_ratio", lambda *models: 0.5)
        patch.setattr(formats, "MOST_LOSS", 100.0)
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
    sizes = [
        (to / "onnx" / name).stat().st_size
        for name in ("model.int8.onnx", "model.onnx")
    ]
    assert known["int8"] == {
        "model": "onnx/model.int8.onnx",
        "size_ratio": sizes[0] / sizes[1],
        "time_ratio": 0.5,
    }
    assert known["checked_on"] == {"split": "test-clean", "utterances": 11}
    assert 0 < known["max_difference"] < 1e-4
    assert files.read_json(to / "config.json")["onnx"] == known
    scores = known["scores"]["test-clean"]
    assert (scores["utterances"], scores["words"]) == (11, 21)
    # Once more, one by one
    model, tokenizer = runs.load_run(run)
    transcripts = {"pytorch": [], "onnx": [], "int8": []}
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
        transcripts["pytorch"].append(" ".join(tokenizer.decode(ids).split()))
        for name, form in forms.items():
            transcripts[name].append(form.transcribe(wav))
    assert transcripts["onnx"] == transcripts["pytorch"]
    assert len(set(transcripts["pytorch"])) > 8
    for name, texts in transcripts.items():
        assert scores["wer"][name] == 100 * jiwer.wer(references, texts)
    same = sum(map(str.__eq__, transcripts["int8"], transcripts["pytorch"]))
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


def run_script(script, *arguments):
    return subprocess.run(
        [sys.executable, *map(str, (*script, *arguments))],
        capture_output=True,
        text=True,
    )


def test_the_script_tries_every_file(exported, corpus, tmp_path):
    to, _ = exported
    good = next(corpus.glob("test-clean/*/*/*.flac"))
    bad, empty, slow = (tmp_path / f"{n}.wav" for n in ("bad", "empty", "slow"))
    bad.write_bytes(b"noise")
    soundfile.write(empty, np.zeros(0), RATE)
    soundfile.write(slow, make_speech(1, 2)[::2].numpy(), 8000)
    user = "-c", USER, to / "onnx"
    done = run_script(user, bad, tmp_path / "no", slow, empty, tmp_path, good)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"{bad}: it cannot be read as audio: Format not recognised.",
        f"{tmp_path / 'no'}: there is no such file",
        f"{empty}: it holds no audio",
        f"{tmp_path}: there is no such file",
    ]
    found = [line.split("\t") for line in done.stdout.splitlines()]
    assert [path for path, _ in found] == [str(slow), str(good)]
    assert run_script(user, good).returncode == 0


def test_the_script_has_help(exported):
    script = [exported[0] / "onnx" / "transcribe.py"]
    done = run_script(script, "--help")
    assert done.returncode == 0 and not done.stderr
    assert "AUDIO" in done.stdout and "onnxruntime" in done.stdout
    done = run_script(script)
    assert done.returncode == 2 and "required: AUDIO" in done.stderr


def test_without_its_model_the_script_says_so(tmp_path):
    shutil.copyfile(runner.__file__, tmp_path / "transcribe.py")
    done = run_script([tmp_path / "transcribe.py"], "a.wav")
    assert done.returncode == 2
    assert "model.onnx cannot be loaded" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 48000, 192000])
def test_the_script_reads_what_tutornet_transcribe_reads(
    rate, tmp_path, monkeypatch
):
    path = tmp_path / "a.wav"
    generator = np.random.default_rng(rate)
    wav = 0.1 * generator.standard_normal((rate + 7, 3))
    soundfile.write(path, wav, rate, subtype="FLOAT")
    # By torchaudio's filters
    expected = torch.cat(list(transcription.read_audio(path, RATE))).numpy()
    for block in (60, 1000, runner.BLOCK):
        monkeypatch.setattr(runner, "BLOCK", block)
        found = np.concatenate(list(runner.read_audio(path, RATE)))
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_samples_that_are_no_numbers_are_refused(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.array([0, np.nan]), RATE, subtype="FLOAT")
    with pytest.raises(ValueError, match="not finite"):
        list(runner.read_audio(path, RATE))
    with pytest.raises(ValueError, match="sample rate of 500 Hz"):
        soundfile.write(path, np.zeros(9), 500)
        list(runner.read_audio(path, RATE))


@pytest.mark.parametrize("marks, cut", [([1, 1, 0], 1), ([0, 0, 0, 0], 2)])
def test_audio_is_cut_in_a_pause(marks, cut):
    assert runner.find_pause(np.array(marks) == 1) == cut
    assert find_pause(torch.tensor(marks) == 1) == cut


def test_long_audio_is_transcribed_as_by_tutornet_transcribe(
    exported, tmp_path
):
    assert runner.WINDOW == transcription.WINDOW
    path = exported[0] / "onnx" / "model.onnx"
    long, exact = tmp_path / "long.wav", tmp_path / "exact.wav"
    # Windows end within it, and where it does
    soundfile.write(long, make_speech(3, 131.7).numpy(), RATE)
    soundfile.write(exact, make_speech(4, 40).numpy(), RATE)
    recogniser = load_recogniser(path)
    done = run_script(("-c", USER, path.parent), long, exact)
    assert done.returncode == 0, done.stderr
    expected = list(transcription.transcribe(recogniser, [long, exact]))
    assert len(expected[0].text) > 200
    lines = [f"{one.file}\t{one.text}" for one in expected]
    assert done.stdout.splitlines() == lines


def test_a_transformer_transcribes_more_than_it_has_positions_for(tmp_path):
    model = make_network("transformer")
    written = write_onnx(model, tmp_path / "m.onnx", ABOUT)
    wav = make_speech(5, 61).numpy()
    with pytest.raises(Exception, match="Add|broadcast|shape"):
        written.encode(wav[None], [len(wav)])
    soundfile.write(tmp_path / "a.wav", wav, RATE, subtype="FLOAT")
    recogniser = load_recogniser(tmp_path / "m.onnx")
    (found,) = transcription.transcribe(recogniser, [tmp_path / "a.wav"])
    assert written.transcribe(wav) == found.text != ""


@pytest.mark.slow
def test_an_hour_takes_no_more_memory_than_two_minutes(exported, tmp_path):
    peaks = []
    for minutes in (2, 60):
        path = tmp_path / f"{minutes}.flac"
        with soundfile.SoundFile(path, "w", 44100, 1) as file:
            minute = make_speech(1, 60).numpy()
            for _ in range(minutes):
                file.write(
                    np.interp(
                        np.arange(60 * 44100) / 44100 * RATE,
                        np.arange(60 * RATE),
                        minute,
                    )
                )
        done = run_script(("-c", MEASURED, exported[0] / "onnx"), path)
        assert done.returncode == 0 and len(done.stdout) > 100 * minutes
        peaks.append(int(done.stderr))
    assert peaks[1] < peaks[0] + 50_000


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
    # of convolution, LSTM (by input and state) and head are in int8.
    assert (1, 320) in shapes[np.float32]
    assert (514, 1, 320) not in shapes[np.float32]
    matrices = {(6, 20, 11), (1, 6, 28), (1, 7, 28), (14, 29)}
    assert matrices <= shapes[np.int8]
    assert not {(6, 20, 11), (1, 28, 6), (1, 28, 7), (14, 29)} & (
        shapes[np.float32] | shapes[np.int8] - matrices
    )
    # A scale for each gate of each cell
    assert (1, 28) in shapes[np.float32]
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("DynamicQuantizeLSTM") == 4 and "LSTM" not in kinds
    assert "DequantizeLinear" not in kinds


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


@pytest.mark.parametrize("name", ["crdnn", "lstm_streaming"])
def test_int8_of_recurrent_layers_is_near(name, tmp_path):
    written = write_onnx(make_network(name), tmp_path / "m.onnx", ABOUT)
    speech = [make_speech(seed, 0.8) for seed in range(4)]
    quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", iter(speech[1:]))
    small = OnnxModel(tmp_path / "q.onnx")
    wavs, lengths = batch_of(1.2, 0.8)
    ours, _ = written.encode(wavs.numpy(), lengths.numpy())
    theirs, _ = small.encode(wavs.numpy(), lengths.numpy())
    # Beside how much a symbol varies from frame to frame. With 8-bit weights
    # it was 0.65 of that on a CPU without VNNI, where their products saturate.
    error = np.square(ours - theirs)[0].mean() ** 0.5
    assert 0 < error < 0.2 * ours[0].std(axis=0).mean()
    sizes = [(tmp_path / f"{n}.onnx").stat().st_size for n in "qm"]
    assert sizes[0] < 0.4 * sizes[1]


@pytest.mark.parametrize("name", ["gru", "deepspeech2"])
def test_networks_that_int8_would_slow_down_have_none(name, tmp_path):
    write_onnx(make_network(name), tmp_path / "m.onnx", ABOUT)
    with pytest.raises(NoInt8Error, match="no int8 kernel for GRU layers"):
        quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", [])


@pytest.mark.slow
def test_int8_of_the_lstm_is_faster(tmp_path):
    content = include(MODELS / "lstm.yaml", ".", "full")
    text = StringIO()
    YAML().dump(content, text)
    model = load_hyperpyyaml(text.getvalue())["model"].eval()
    paths = tmp_path / "m.onnx", tmp_path / "q.onnx"
    write_onnx(model, paths[0], ABOUT)
    wav = make_speech(1, 4)
    quantize(*paths, [wav])
    both = [OnnxModel(path, threads=1) for path in paths]
    assert formats.time_ratio(*both, [wav.numpy()]) < 0.8
    assert paths[1].stat().st_size < 0.3 * paths[0].stat().st_size


def test_time_is_the_least_of_the_turns_of_each_utterance(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(formats.time, "process_time", lambda: clock[0])

    class Model:
        def __init__(self, *seconds):
            self.seconds = iter(seconds)

        def transcribe(self, wav):
            clock[0] += next(self.seconds)

    first, second = Model(2, 3, 5, 9), Model(8, 1, 1, 7)
    # 2 + 5 against 1 + 1
    ratio = formats.time_ratio(first, second, ["a", "b"], turns=2)
    assert ratio == pytest.approx(2 / 7)


@pytest.mark.parametrize("name", ["jasper_mini", "lstm"])
def test_quantising_warns_of_nothing(name, tmp_path):
    model = make_network(name)
    write_onnx(model, tmp_path / "m.onnx", ABOUT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        speech = iter([make_speech(1, 0.8)])
        quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", speech)
    assert_finite(tmp_path / "q.onnx")


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


@pytest.mark.parametrize(
    ("ratio", "loss", "reason"),
    [
        (0.97, 100.0, "it would take 0.97 of the time of single precision"),
        (
            0.5,
            -1e9,
            r"its WER on test-clean would be -?\d+\.\d\d points higher",
        ),
    ],
)
def test_int8_that_does_not_pay_is_not_written(
    run, corpus, tmp_path, monkeypatch, ratio, loss, reason
):
    monkeypatch.setattr(formats, "time_ratio", lambda *models: ratio)
    monkeypatch.setattr(formats, "MOST_LOSS", loss)
    result = invoke(run, tmp_path / "to", "--int8", "--data", corpus.parent)
    assert result.exit_code == 0, result.stderr
    (line,) = re.findall("    no int8 graph: (.*)", result.stdout)
    assert re.fullmatch(reason, line)
    known = files.read_json(tmp_path / "to" / "config.json")["onnx"]
    assert known["int8"] == {"model": None, "reason": line}
    assert "int8" not in known["scores"]["test-clean"]["wer"]
    assert not (tmp_path / "to" / "onnx" / "model.int8.onnx").exists()
    card = (tmp_path / "to" / "README.md").read_text()
    assert f"There is none in 8 bits: {line}." in card


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
    assert "MiniLibri: name its folder by --data" in line
    assert not (tmp_path / "to").exists()


def test_a_corpus_that_is_not_there_is_named(run, tmp_path):
    result = invoke(run, tmp_path / "to", "--onnx", "--data", tmp_path / "no")
    assert result.exit_code == 2 and "no: name its" in result.stderr


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
    speech = find_speech(copy, None, results, model, needed=True)
    assert speech.split == "test-clean"
    assert len(speech.test) == 11 and len(speech.valid) == 11
    lengths = [len(one.read()) for one in speech.test]
    assert lengths == sorted(lengths)
    results = {"splits": {"test-clean": {}}}
    assert find_speech(copy, None, results, model, needed=False) is None
    with pytest.raises(ValueError, match="no dev and test split"):
        find_speech(copy, None, results, model, needed=True)


def test_the_runner_is_a_file_of_its_own(exported):
    to, _ = exported
    copy = (to / "onnx" / "transcribe.py").read_text()
    assert copy == open(runner.__file__, encoding="utf-8").read()
    assert graphs.METADATA == runner.METADATA
