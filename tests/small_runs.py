"""Runs with random weights, and audio, for tests all over."""

import csv
import json
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML
from speechbrain.utils.train_logger import FileTrainLogger

from tutornet_sb.corpora.minilibri import make_minilibri
from tutornet_sb.corpora.tokenizer import train_tokenizer
from tutornet_sb.distillation.losses import RepresentationLoss, SoftmaxLoss
from tutornet_sb.networks import runs
from tutornet_sb.networks.acoustic_model import SpectralFeatures
from tutornet_sb.publishing.export import export
from tutornet_sb.util import files
from tutornet_sb.util.composition import include

MODELS = (
    Path(__file__).parents[1] / "recipes/LibriSpeech/TutorNet/hparams/models"
)
RATE = 16000
BLOCKS = [
    {"channels": 6, "kernel": 5, "stride": 2},
    {"channels": 6, "kernel": 3, "repeat": 2, "residual": True},
    {"channels": 8, "kernel": 1},
]
RECURRENT = {"n_mels": 20, "channels": 6, "hidden_size": 7}
DEEPSPEECH2 = {"n_bins": 30, "channels": 2, "hidden_size": 5, "layers": 1}
CONFORMER = {"channels": [2, 2], "d_model": 8, "nhead": 2, "d_ffn": 8}
CONFORMER["num_encoder_layers"] = 1
WAV2VEC2 = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
WAV2VEC2 |= {"conv_dim": [4] * 7, "num_conv_pos_embedding_groups": 2}
# Training had started from published weights, which lay somewhere.
WAV2VEC2["source"] = "/somewhere/else"
# The order of facebook/wav2vec2-base-960h
WAV2VEC2_SYMBOLS = ["<pad>", "<s>", "</s>", "<unk>", "|"]
WAV2VEC2_SYMBOLS += "ETAONIHSRDLUMWCFGYPBVK'XJQZ"

# Put before a program, a machine on which this package is not installed
ELSEWHERE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tutornet_sb":
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
try:
    import tutornet_sb
except ModuleNotFoundError:
    pass
else:
    sys.exit("tutornet_sb can be imported")
"""


def write_run(folder, name, values, sample_rate=RATE):
    """A finished run of a small network with random weights."""
    folder.mkdir(parents=True)
    content = include(MODELS / f"{name}.yaml", ".", "small", values)
    features = content["model"]["features"]
    if sample_rate != RATE:
        features.update(sample_rate=sample_rate, n_fft=300, win_length=25)
    text = StringIO()
    YAML().dump(content, text)
    (folder / runs.MODEL_YAML).write_text(text.getvalue())
    torch.manual_seed(1)
    network = text.getvalue().replace("source: /somewhere/else", "source:")
    model = load_hyperpyyaml(network)["model"].eval()
    # As after training: not the values of a new network.
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(7)
    if isinstance(model.features, SpectralFeatures):
        norm = model.features.normalize
        norm.running_mean.sub_(20)
        norm.running_var.mul_(100)
    with torch.no_grad():
        # Letters of all kinds, where a random network emits one over and over.
        hidden = model(make_speech(99, 1.5).unsqueeze(0), torch.ones(1)).hidden
        spread = hidden.std(dim=(0, 1)).clamp(min=0.02)
        model.head.weight.normal_().div_(spread)
        model.head.bias.copy_(-model.head.weight @ hidden.mean(dim=(0, 1)))
    torch.save(model.state_dict(), folder / runs.WEIGHTS)
    manifest = folder / "train.csv"
    with open(manifest, "w", newline="") as file:
        csv.writer(file).writerows([["ID", "wrd"], ["a", "ONE TWO"]])
    train_tokenizer([manifest], folder / runs.TOKENIZER)
    figures = dict.fromkeys(
        ("train_audio_seconds", "train_seconds", "real_time_factor"), 1.5
    )
    splits = {"test-clean": {"wer": 50.0, "cer": 25.0}}
    write_results(
        folder,
        **figures,
        method="skd",
        student=name,
        seed=3,
        parameters=sum(p.numel() for p in model.parameters()),
        epochs=2,
        stages={"rkd": {"splits": {}}, "skd": {"splits": splits}},
        teacher={
            "name": "jasper_dr",
            "source": str(folder.parent / "teacher"),
            "kind": "run",
            "method": "ctc",
            "epochs": 40,
            "parameters": 1_070_429,
            "splits": splits,
        },
    )
    return model


def write_results(folder, splits=None, method="ctc", **changes):
    """The results.json of a run, by default a baseline's, as train.py's."""
    *before, last = method.split("+")
    stages = {name: {"splits": {}} for name in before}
    results = {
        "format": 2,
        "role": "baseline" if method == "ctc" else "student",
        "main_file": "base.yaml",
        "options": {},
        "compute_matched_to": None,
        "baseline": None,
        "corpus_license": "apache-2.0",
        "language": "en",
        "synthetic": True,
        "method": method,
        "corpus": "mini",
        "student": "lstm",
        "seed": 1,
        "parameters": 1_234_567,
        "weights_sha256": "0a" * 32,
        "epochs": 8,
        "train_audio_seconds": 60.0,
        "train_seconds": 100.0,
        "real_time_factor": 0.02,
        "stages": stages | {last: {"splits": splits or {}}},
        "teacher": None,
        "versions": {"torch": "2.15.0", "python": "3.11.7"},
        "machine": {"cpu": "Abacus 3000", "cores": 4, "threads": 1},
    }
    files.write_json(folder / runs.RESULTS, results | changes)
    return folder


def write_metrics(run, stage, epochs):
    """The metrics.jsonl of a stage, of a mapping of figures for each epoch."""
    path = run / runs.STAGES / stage / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = {"step": 100, "lr": 0.001, "train": {"loss": 2.0}}
    lines = [json.dumps(shared | epoch) + "\n" for epoch in epochs]
    path.write_text("".join(lines), encoding="utf-8")


def tidy(texts):
    """Two signs of a word boundary in a row are one boundary."""
    return [" ".join(text.split()) for text in texts]


@torch.no_grad()
def make_speech(seed, seconds):
    """Tones that come and go, so that no two frames are alike, and silence."""
    generator = torch.Generator().manual_seed(seed)
    rand = partial(torch.rand, generator=generator)
    time = torch.arange(round(seconds * RATE)) / RATE
    tones = [
        torch.sin(time * 400 * (1 + 20 * rand(1)) + 9 * rand(1))
        * torch.sin(time * 20 * rand(1) + 9 * rand(1)).clamp(min=0) ** 2
        for _ in range(6)
    ]
    speech = sum(tones) / 8 + 1e-3 * (rand(len(time)) - 0.5)
    # More than 80 dB below the rest: clipped only within a sentence
    speech[RATE // 10 : RATE // 5] = 0
    return speech


def write_onnx(path, symbols, metadata=None, hop=320):
    """A convolution over frames of the waveform as an ONNX file.

    Returns its weights, ``(symbols, 1, hop)``.
    """
    weights = torch.randn(
        len(symbols), 1, hop, generator=torch.Generator().manual_seed(5)
    )
    node = onnx.helper.make_node
    tensor = onnx.helper.make_tensor_value_info
    floats, ints = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    graph = onnx.helper.make_graph(
        [
            node("Unsqueeze", ["wavs", "one"], ["x"]),
            node("Conv", ["x", "weights"], ["y"], strides=[hop]),
            node("Transpose", ["y"], ["logits"], perm=[0, 2, 1]),
            node("LogSoftmax", ["logits"], ["log_probs"], axis=-1),
            node("Div", ["lengths", "hop"], ["frames"]),
        ],
        "recogniser",
        [
            tensor("wavs", floats, ["batch", "samples"]),
            tensor("lengths", ints, ["batch"]),
        ],
        [
            tensor("log_probs", floats, ["batch", "frames", len(symbols)]),
            tensor("frames", ints, ["batch"]),
        ],
        [
            onnx.numpy_helper.from_array(weights.numpy(), "weights"),
            onnx.numpy_helper.from_array(np.array([1]), "one"),
            onnx.numpy_helper.from_array(np.array(hop), "hop"),
        ],
    )
    model = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.checker.check_model(model)
    content = {
        "format": "tutornet_sb onnx 1",
        "name": "tiny",
        "sample_rate": RATE,
        "frame_period": hop / RATE,
        "symbols": symbols,
        "blank_index": 0,
    }
    onnx.helper.set_model_props(
        model, {"tutornet": json.dumps(content | (metadata or {}))}
    )
    onnx.save(model, path)
    return weights


def write_corpus(root, splits=("dev-clean", "test-clean"), count=11):
    """Splits of so many utterances in LibriSpeech's layout, of tones."""
    words = ["ONE", "TWO", "THREE"]
    for number, split in enumerate(splits):
        chapter = root / split / "1" / str(number)
        chapter.mkdir(parents=True)
        lines = []
        for index in range(count):
            key = f"1-{number}-{index:04d}"
            wav = make_speech(20 * number + index, 0.4 + 0.1 * index)
            soundfile.write(chapter / f"{key}.flac", wav.numpy(), RATE)
            lines.append(f"{key} {' '.join(words[: 1 + index % 3])}\n")
        (chapter / f"1-{number}.trans.txt").write_text("".join(lines))


def save_wav2vec2(folder, symbols):
    """A teacher as transformers writes it, with random weights."""
    # Seconds to import
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
    )

    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=len(symbols),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


def write_minilibri(folder):
    """A minute of synthetic speech in LibriSpeech's layout."""
    make_minilibri(
        folder,
        seed=3,
        train_minutes=0.6,
        dev_minutes=0.15,
        test_minutes=0.15,
        train_speakers=3,
        test_speakers=2,
    )


def write_export(folder):
    """A run of a small LSTM in `run`, and its export in `to`."""
    write_run(folder / "run", "lstm", RECURRENT)
    export(folder / "run", folder / "to")
    return folder


def stage_hparams(folder, counter, tokenizer, max_lr):
    """All that a stage's Brain asks of its hparams."""
    return {
        "epoch_counter": counter,
        "train_logger": FileTrainLogger(str(folder / "train_log.txt")),
        "log_folder": str(folder / "tensorboard"),
        "lr_schedule": partial(
            torch.optim.lr_scheduler.OneCycleLR,
            max_lr=max_lr,
            cycle_momentum=False,
        ),
        "avg_checkpoints": 1,
        "tokenizer": tokenizer,
        "metrics_file": folder / runs.METRICS,
        "delay": 0.0,
        "representation_loss": RepresentationLoss("uniform"),
        "softmax_loss": SoftmaxLoss(),
        "skd": {"ctc_weight": 1.0, "weight": 1.0, "weight_final": 1.0},
        "noprogressbar": True,
    }


def add_dev_clean(run):
    """Let a run have been scored on a development set too."""
    results = files.read_json(run / runs.RESULTS)
    splits = list(results["stages"].values())[-1]["splits"]
    splits["dev-clean"] = splits["test-clean"]
    files.write_json(run / runs.RESULTS, results)
