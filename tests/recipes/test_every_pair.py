"""Every network of the recipe as teacher of every other, tiny, by its YAML."""

import copy
import csv
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

from tutornet_sb.corpora.tokenizer import train_tokenizer
from tutornet_sb.distillation.losses import RepresentationLoss, SoftmaxLoss
from tutornet_sb.distillation.pairs import Pair, Projectors, choose_pairs
from tutornet_sb.distillation.projector import Projector
from tutornet_sb.distillation.taps import find_stack
from tutornet_sb.teachers.teacher import Teacher
from tutornet_sb.training.rkd import RKDBrain
from tutornet_sb.training.skd import SKDBrain

MODELS = (
    Path(__file__).parents[2] / "recipes/LibriSpeech/TutorNet/hparams/models"
)
RECURRENT = {"channels": 24, "hidden_size": 24, "layers": 1}
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
    "deepspeech2": {
        **RECURRENT,
        "n_bins": 64,
        "channels": 2,
        "encoder_size": 16,
    },
    "jasper_dr": {"encoder_size": 16, "blocks": blocks(2, repeat=2)},
    "jasper_mini": {"encoder_size": 16, "blocks": blocks(2, 2)},
    "quartznet": {"encoder_size": 16, "blocks": blocks(1)},
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
PAIRS = [Pair("encoder", "encoder")]
# Layers that the encoders of size `small` are stacks of: what their names begin
# with, the first and the last
OUTPUTS = "encoder.layers.outputs."
HF = "encoder.model.encoder.layers."
STACKS = {
    "lstm": (OUTPUTS, 0, 1),
    "gru": (OUTPUTS, 0, 1),
    "lstm_streaming": (OUTPUTS, 0, 1),
    "gru_streaming": (OUTPUTS, 0, 1),
    "deepspeech2": (OUTPUTS, 0, 1),
    "jasper_dr": ("encoder.blocks.", 0, 6),
    "jasper_mini": ("encoder.blocks.", 0, 5),
    "quartznet": ("encoder.blocks.", 0, 6),
    "conformer": ("encoder.transformer.encoder.layers.", 0, 3),
    "transformer": ("encoder.transformer.encoder.layers.", 0, 3),
    "branchformer": ("encoder.transformer.encoder.layers.", 0, 3),
    "contextnet": ("encoder.contextnet.block_", 1, 5),
    "wav2vec2": (HF, 0, 2),
    "hubert": (HF, 0, 2),
    "wavlm": (HF, 0, 2),
    "whisper": ("encoder.layers.", 0, 2),
    # One recurrent layer, as one module
    "crdnn": None,
}
SECONDS = (0.5, 0.8, 0.65)

# Speech that is quickly learnt: a tone (Hz) for each symbol, in the middle half
# of its slot (seconds).
HERTZ = dict(
    zip("▁ABCDEF", (250, 400, 600, 900, 1350, 2000, 2900), strict=True)
)
SLOT = 0.16
TEXTS = ["CAB", "ACE", "BED", "DEAF"]


@cache
def build(family, seed=0, **overrides):
    """Build a tiny network of a family."""
    torch.manual_seed(seed)
    return read(family, **{**FAMILIES[family], **overrides})


def read(family, **overrides):
    """Build the network of a family's file as a main file does."""
    return load_hyperpyyaml(
        "network: !applyref:tutornet_sb.util.composition.include\n"
        f"    path: {MODELS / family}.yaml\n"
        "    folder: .\n"
        "    size: small\n"
        f"    overrides: {json.dumps(overrides)}\n"
        "    output_size: 29\n"
    )["network"]["model"]


@cache
def make_teacher(family, taps):
    model = copy.deepcopy(build(family))
    # Posteriors that are not all alike, nor those of a student
    torch.nn.init.normal_(model.head.weight)
    return Teacher(model, taps)


def tone(hertz, seconds):
    return torch.sin(2 * math.pi * hertz * torch.arange(0, seconds, 1 / 16000))


def item(name, parts, tokens, **more):
    wav = torch.cat(parts)
    wav = wav + 0.03 * torch.randn(len(wav))
    return {"id": name, "sig": wav, "tokens": torch.tensor(tokens), **more}


@pytest.fixture(scope="module")
def batch():
    """Tones in noise, of different lengths."""
    torch.manual_seed(2)
    return PaddedBatch(
        [
            item(
                f"u{index}",
                [tone(300 * index, seconds)],
                [3, 1, 2][: 1 + index],
            )
            for index, seconds in enumerate(SECONDS)
        ]
    )


def make_brain(stage, teacher, student, ctc_weight=1.0, **hparams):
    modules = {"student": student, "teacher": teacher}
    if stage == "rkd":
        modules["projector"] = Projectors(Projector, PAIRS, teacher, student)
    hparams = {
        "blank_index": 0,
        "delay": 0.0,
        "representation_loss": RepresentationLoss(),
        "softmax_loss": SoftmaxLoss(),
        "skd": {"ctc_weight": ctc_weight, "weight": 1.0, "weight_final": 1.0},
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
    optimizer.zero_grad()
    loss.backward()
    trained = optimizer.param_groups[0]["params"]
    torch.nn.utils.clip_grad_norm_(trained, max_norm=5.0)
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
    student = copy.deepcopy(build(student))
    # Without CTC: all that is learnt comes from the teacher.
    brain = make_brain(stage, teacher, student, ctc_weight=0.0)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_paired_by_depth(family):
    """The middle layers and the last, where a network is a stack of layers."""
    network = read(family)
    pairs = choose_pairs(2, network, network)
    if STACKS[family] is None:
        assert pairs == PAIRS
        return
    prefix, first, last = STACKS[family]
    stack = [f"{prefix}{index}" for index in range(first, last + 1)]
    assert find_stack(network) == stack
    middle = stack[(len(stack) - 1) // 2]
    assert pairs == [
        Pair(middle, middle, 0.5),
        Pair("encoder", "encoder", 0.5),
    ]


# -------------------------------------------------------------------- learning


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    with open(folder / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([["wrd"], *([text] for text in TEXTS)])
    return train_tokenizer([folder / "train.csv"], folder / "char.model")


@pytest.fixture(scope="module")
def speech(tokenizer):
    """Four utterances of tones."""
    torch.manual_seed(3)
    pause = torch.zeros(int(16000 * SLOT / 4))
    items = []
    for text in TEXTS:
        parts = []
        for symbol in tokenizer.encode(text, out_type=str):
            parts += [pause, tone(HERTZ[symbol], SLOT / 2), pause]
        tokens = tokenizer.encode(text)
        items.append(item(text, [*parts, pause], tokens, wrd=text))
    return PaddedBatch(items)


@pytest.fixture(scope="module")
def tutors(speech):
    """Teachers of two families that spike where the tones are.

    Taught frame by frame: by CTC alone on so little speech they would hold a
    symbol until the next one comes.
    """

    def teach(family):
        model = copy.deepcopy(build(family, seed=1, dropout=0.0)).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
        tokens = torch.nn.functional.pad(speech.tokens.data, (0, 1))
        for _ in range(40):
            logits = model(*speech.sig).logits
            slots = torch.arange(logits.shape[1]) * model.frame_period / SLOT
            inside = (slots % 1 - 0.5).abs() < 0.15
            slot = slots.long().clamp(max=tokens.shape[1] - 1)
            labels = tokens[:, slot].masked_fill(~inside, 0)
            loss = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), labels, reduction="sum"
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return Teacher(model, ())

    return {family: teach(family) for family in ("jasper_dr", "lstm")}


def transcripts(brain, batch):
    """What a brain's student understands, and what was said."""
    brain.modules.eval()
    brain.on_stage_start(sb.Stage.VALID, epoch=1)
    with torch.no_grad():
        outputs = brain.compute_forward(batch, sb.Stage.VALID)
        brain.compute_objectives(outputs, batch, sb.Stage.VALID)
    brain.modules.train()
    return brain.hypotheses, brain.references


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_learns_from_another_family(
    family, speech, tokenizer, tutors
):
    """Until it understands all, and says it when the teacher does.

    By CTC alone it would spike elsewhere: the distance stays above a half.
    """
    tutor = tutors["lstm" if "blocks" in FAMILIES[family] else "jasper_dr"]
    plain = {"dropout": 0.0}
    if "conv_dim" in FAMILIES[family]:
        plain["mask_time_prob"] = 0.0
    student = copy.deepcopy(build(family, **plain))
    delay = 0.06 if family.endswith("_streaming") else 0.0
    brain = make_brain("skd", tutor, student, tokenizer=tokenizer, delay=delay)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    distances = []
    for _ in range(30):
        brain.on_stage_start(sb.Stage.TRAIN, epoch=1)
        for _ in range(10):
            step(brain, speech, optimizer)
        distances.append(brain.figures()["skd"])
        understood, said = transcripts(brain, speech)
        if understood == said and distances[-1] < 0.2 * distances[0]:
            return
    pytest.fail(f"{understood} after {distances}")
