"""Pairs of layers: how they are written, and the projectors between them."""

import pytest
import torch

from tutornet_sb.distillation.pairs import (
    Pair,
    Projectors,
    choose_pairs,
    read_pairs,
    teacher_taps,
)
from tutornet_sb.distillation.projector import Projector
from tutornet_sb.networks.acoustic_model import AcousticModel, LogMelFeatures
from tutornet_sb.networks.jasper import JasperEncoder
from tutornet_sb.networks.recurrent import RecurrentEncoder
from tutornet_sb.teachers.teacher import Teacher

DEFAULT = {"teacher": "encoder", "student": "encoder", "weight": 1.0}
ROWS = [
    {"teacher": "encoder.blocks.1", "student": "encoder.conv"},
    {"teacher": "encoder", "student": "encoder", "weight": 2},
    {"teacher": "encoder.blocks.1", "student": "encoder", "weight": 0.5},
]
PAIRS = [
    Pair("encoder.blocks.1", "encoder.conv", 1.0),
    Pair("encoder", "encoder", 2),
    Pair("encoder.blocks.1", "encoder", 0.5),
]


def make_teacher_model(channels=(4, 5, 6)):
    table = [{"channels": n, "kernel": 3} for n in channels]
    table[0]["stride"] = 2
    head = torch.nn.Linear(channels[-1], 9)
    encoder = JasperEncoder(8, table)
    return AcousticModel(LogMelFeatures(n_mels=8), encoder, head)


def make_student(layers=1):
    encoder = RecurrentEncoder(8, channels=3, hidden_size=4, layers=layers)
    head = torch.nn.Linear(8, 9)
    return AcousticModel(LogMelFeatures(n_mels=8), encoder, head)


def test_pairs_are_read_as_written_with_a_weight_of_one():
    assert read_pairs(ROWS) == PAIRS
    assert choose_pairs(ROWS, None, None) == PAIRS
    assert teacher_taps(PAIRS) == ["encoder.blocks.1", "encoder"]


@pytest.mark.parametrize(
    "pairs, words",
    [
        ([], "pairs must be a whole number from 1 up, or a list"),
        (DEFAULT, "pairs must be a whole number from 1 up, or a list"),
        ("encoder", "pairs must be a whole number from 1 up, or a list"),
        (0, "pairs must be a whole number from 1 up, or a list"),
        (-2, "pairs must be a whole number from 1 up, or a list"),
        (2.0, "pairs must be a whole number from 1 up, or a list"),
        (True, "pairs must be a whole number from 1 up, or a list"),
        (None, "pairs must be a whole number from 1 up, or a list"),
        (["encoder"], r"pairs\[0\] must be a mapping .*, got 'encoder'"),
        ([DEFAULT, {"teacher": "head"}], r"pairs\[1\] must be .*: 'head'"),
        ([{"student": "head"}], r"pairs\[0\] must be .*such as {teacher: enc"),
        ([DEFAULT | {"wieght": 2}], r"pairs\[0\] must be .*'wieght': 2"),
        (
            [DEFAULT, ROWS[0], DEFAULT | {"weight": 2}],
            r"pairs\[2\] names layers again: {'teacher': 'enc",
        ),
        ([DEFAULT | {"weight": 0.0}], "all weights are 0"),
    ],
)
def test_pairs_that_are_wrong(pairs, words):
    for read in (read_pairs, lambda it: choose_pairs(it, None, None)):
        with pytest.raises(ValueError, match=words):
            read(pairs)


@pytest.mark.parametrize(
    "weight", [-0.5, "1", None, True, float("nan"), float("inf")]
)
def test_weights_that_are_none(weight):
    with pytest.raises(ValueError, match=r"pairs\[0\]: weight must be a numb"):
        read_pairs([DEFAULT | {"weight": weight}])


@pytest.mark.parametrize(
    "count, blocks, layers, expected",
    [
        (1, 3, 2, [(None, None)]),
        (2, 3, 2, [(1, 0), (None, None)]),
        (2, 2, 3, [(0, 1), (None, None)]),
        (2, 7, 2, [(3, 0), (None, None)]),
        (2, 6, 5, [(2, 2), (None, None)]),
        (3, 7, 3, [(2, 0), (4, 1), (None, None)]),
        # At thirds, 0.33 * 3 and its like must not round up.
        (3, 3, 3, [(0, 0), (1, 1), (None, None)]),
        # No more than either has
        (4, 3, 2, [(1, 0), (None, None)]),
        (3, 2, 9, [(0, 4), (None, None)]),
        (2, 7, 1, [(None, None)]),
        (2, 1, 4, [(None, None)]),
    ],
)
def test_pairs_are_chosen_by_depth(count, blocks, layers, expected):
    teacher = make_teacher_model([4] * blocks)
    student = make_student(layers)
    state = torch.get_rng_state()
    pairs = choose_pairs(count, teacher, student)
    assert torch.equal(torch.get_rng_state(), state)
    assert teacher.training and student.training
    names = [
        (
            "encoder" if theirs is None else f"encoder.blocks.{theirs}",
            "encoder" if ours is None else f"encoder.layers.outputs.{ours}",
        )
        for theirs, ours in expected
    ]
    assert [pair[:2] for pair in pairs] == names
    weights = [pair.weight for pair in pairs]
    assert weights == pytest.approx([1 / len(expected)] * len(expected))
    # As they are used
    made = Projectors(
        Projector, pairs, Teacher(teacher, teacher_taps(pairs)), student
    )
    assert [p.map.out_features for p in made] == [4] * len(expected)


def test_a_student_whose_frames_are_longer_lower_down_is_paired_above():
    """Blocks before the last stride have other frames and are passed over."""
    table = [{"channels": 4, "kernel": 3, "stride": s} for s in (1, 2, 1, 1)]
    encoder = JasperEncoder(8, table)
    student = AcousticModel(
        LogMelFeatures(n_mels=8), encoder, torch.nn.Linear(4, 9)
    )
    pairs = choose_pairs(2, make_teacher_model(), student)
    # Of the blocks 1, 2 and 3
    assert [pair.student for pair in pairs] == ["encoder.blocks.2", "encoder"]


def test_each_pair_has_a_projector_of_its_layers_sizes():
    teacher = Teacher(make_teacher_model(), teacher_taps(PAIRS))
    projectors = Projectors(Projector, PAIRS, teacher, make_student())
    sizes = [(p.map.in_features, p.map.out_features) for p in projectors]
    assert sizes == [(3, 5), (8, 6), (8, 5)]
    assert projectors.parts == [slice(0, 5), slice(5, 11), slice(0, 5)]
    assert list(projectors.student_taps) == ["encoder.conv", "encoder"]
    conv, encoder = torch.randn(2, 7, 3), torch.randn(2, 7, 8)
    projected = projectors([conv, encoder])
    for index, hidden in enumerate([conv, encoder, encoder]):
        layer = projectors[index].map
        expected = hidden @ layer.weight.T + layer.bias
        torch.testing.assert_close(projected[index], expected)


def test_each_projector_starts_as_if_it_were_alone():
    """Looking at the networks must not move the seed."""
    teacher = Teacher(make_teacher_model())
    student = make_student()
    torch.manual_seed(5)
    expected = Projector(8, 6).state_dict()
    torch.manual_seed(5)
    (projector,) = Projectors(
        Projector, read_pairs([DEFAULT]), teacher, student
    )
    for key, value in projector.state_dict().items():
        assert torch.equal(value, expected[key])
    assert student.training


def test_the_message_on_a_wrong_layer_says_whose_it_is():
    teacher, student = Teacher(make_teacher_model()), make_student()
    wrong = [Pair("encoder", "encoder.blocks.1")]
    with pytest.raises(ValueError, match="the student has no layer 'encoder.b"):
        Projectors(Projector, wrong, teacher, student)
    with pytest.raises(ValueError, match="student's layer 'features' cannot"):
        wrong = [Pair("encoder", "features")]
        Projectors(Projector, wrong, teacher, student)
    with pytest.raises(ValueError, match="the teacher has no layer 'encoder.c"):
        wrong = [Pair("encoder.conv", "encoder")]
        Teacher(make_teacher_model(), teacher_taps(wrong))
