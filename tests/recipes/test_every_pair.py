"""Every network of the recipe as teacher of every other, tiny, by its YAML."""

import copy
import json
import math
import re
from functools import cache
from pathlib import Path

import pytest
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.epoch_loop import EpochCounter

from tutornet_sb.brains.rkd import RKDBrain
from tutornet_sb.brains.skd import SKDBrain
from tutornet_sb.distillation.losses import RepresentationLoss, SoftmaxLoss
from tutornet_sb.distillation.pairs import make_projectors
from tutornet_sb.distillation.projector import Projector
from tutornet_sb.distillation.teacher import Teacher

MODELS = (
    Path(__file__).parents[2] / "recipes/LibriSpeech/TutorNet/hparams/models"
)
RECURRENT = {"channels": 8, "hidden_size": 8, "layers": 1}
TRANSFORMER = {
    "channels": [2, 2],
    "d_model": 16,
    "nhead": 2,
    "num_encoder_layers": 1,
}
WAV2VEC2 = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}


def blocks(*strides, repeat=1):
    """A table of the Jasper family: a block of each stride, and two more."""
    return [
        *({"channels": 8, "kernel": 5, "stride": stride} for stride in strides),
        {"channels": 8, "kernel": 5, "repeat": repeat, "residual": True},
        {"channels": 16, "kernel": 1},
    ]


# What makes a family's `small` tiny, and frames of all lengths among them.
FAMILIES = {
    "lstm": RECURRENT,
    "gru": {**RECURRENT, "stride": 1},
    "lstm_streaming": {**RECURRENT, "stride": 3},
    "gru_streaming": RECURRENT,
    "deepspeech2": {**RECURRENT, "channels": 2, "encoder_size": 16},
    "jasper_dr": {"encoder_size": 16, "blocks": blocks(2, repeat=2)},
    "jasper_mini": {"encoder_size": 16, "blocks": blocks(2, 2)},
    "quartznet5x5": {"encoder_size": 16, "blocks": blocks(1)},
    "conformer": {**TRANSFORMER, "d_ffn": 16, "strides": [2, 2]},
    "transformer": {**TRANSFORMER, "d_ffn": 16},
    "branchformer": {**TRANSFORMER, "csgu_linear_units": 16},
    "crdnn": {
        "cnn_channels": [2, 2],
        "time_pooling_size": 4,
        "projection_dim": 8,
        "rnn_layers": 1,
        "rnn_neurons": 8,
        "dnn_neurons": 16,
    },
    "contextnet": {
        "encoder_size": 16,
        "num_blocks": 3,
        "conv_channels": [8, 8, 8],
        "strides": [2, 2, 2],
        "num_layers": 1,
    },
    "wav2vec2": WAV2VEC2,
    "hubert": WAV2VEC2,
    "wavlm": WAV2VEC2,
    "whisper": {
        "window": 2,
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
    },
}
# Constants that batch normalisation, or the softmax of attention, takes out
# again: what they get is rounding.
WITHOUT_EFFECT = re.compile(
    r"k_proj\.bias|crdnn\.DNN.*linear\.w\.bias|"
    r"contextnet.*(conv|Convs\.1\.norm)\.bias"
)
PAIRS = [{"teacher": "encoder", "student": "encoder"}]
SECONDS = (0.5, 0.8, 0.65)


@cache
def build(family, seed, **overrides):
    """Build the network of a family's file as a main file does."""
    overrides = {**FAMILIES[family], **overrides}
    torch.manual_seed(seed)
    return load_hyperpyyaml(
        "network: !applyref:tutornet_sb.composition.include\n"
        f"    path: {MODELS / family}.yaml\n"
        "    folder: .\n"
        "    size: small\n"
        f"    overrides: {json.dumps(overrides)}\n"
        "    output_size: 29\n"
    )["network"]["model"]


@cache
def make_teacher(family, taps):
    model = copy.deepcopy(build(family, seed=1))
    with torch.no_grad():
        # Posteriors that are not all alike
        model.head.weight.mul_(8)
    return Teacher(model, taps)


@pytest.fixture(scope="module")
def batch():
    """Tones in noise, of different lengths."""
    generator = torch.Generator().manual_seed(2)
    items = []
    for index, seconds in enumerate(SECONDS):
        time = torch.arange(int(16000 * seconds)) / 16000
        noise = 0.1 * torch.randn(len(time), generator=generator)
        tone = torch.sin(2 * math.pi * 300 * (index + 1) * time)
        tokens = torch.tensor([3, 1, 2][: index + 1])
        items.append({"id": f"u{index}", "sig": noise + tone, "tokens": tokens})
    return PaddedBatch(items)


def make_brain(stage, teacher, student, **hparams):
    modules = {"student": student, "teacher": teacher}
    if stage == "rkd":
        modules["projector"] = make_projectors(
            Projector, PAIRS, teacher, student
        )
    hparams = {
        "blank_index": 0,
        "delay": 0.0,
        "representation_loss": RepresentationLoss(),
        "softmax_loss": SoftmaxLoss(),
        "ctc_weight": 1.0,
        "skd_weight": 1.0,
        "skd_weight_final": 1.0,
        "epoch_counter": EpochCounter(1),
    } | hparams
    brain = {"rkd": RKDBrain, "skd": SKDBrain}[stage](modules, hparams=hparams)
    brain.modules.train()
    brain.on_stage_start(sb.Stage.TRAIN, epoch=1)
    return brain


def step(brain, batch, optimizer):
    """One step as Brain.fit_batch does it."""
    outputs = brain.compute_forward(batch, sb.Stage.TRAIN)
    loss = brain.compute_objectives(outputs, batch, sb.Stage.TRAIN)
    loss.backward()
    optimizer.step()
    return loss.item()


def state(model):
    """Everything a step could change, buffers that are not saved included."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


@pytest.mark.parametrize("student", FAMILIES)
@pytest.mark.parametrize("teacher", FAMILIES)
@pytest.mark.parametrize("stage", ["rkd", "skd"])
def test_one_step(stage, teacher, student, batch):
    teacher = make_teacher(teacher, ("encoder",) if stage == "rkd" else ())
    student = copy.deepcopy(build(student, seed=0))
    brain = make_brain(stage, teacher, student)
    # Also the teacher's, which must be safe by themselves.
    optimizer = torch.optim.SGD(brain.modules.parameters(), lr=1e-3)
    before = state(teacher)
    loss = step(brain, batch, optimizer)
    assert math.isfinite(loss) and loss > 0

    for name, parameter in [
        *student.named_parameters(),
        *(brain.modules.projector.named_parameters() if stage == "rkd" else ()),
    ]:
        gradient = parameter.grad
        if not parameter.requires_grad or (
            stage == "rkd" and name.startswith("head.")
        ):
            assert gradient is None, name
            continue
        assert gradient.isfinite().all(), name
        assert gradient.any() or WITHOUT_EFFECT.search(name), name
    assert not teacher.model.training
    assert all(p.grad is None for p in teacher.parameters())
    after = state(teacher)
    assert [n for n in before if not torch.equal(before[n], after[n])] == []
