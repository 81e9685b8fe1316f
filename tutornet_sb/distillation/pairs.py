"""Pairs of a teacher's and a student's layers, and their projectors."""

import math
from itertools import accumulate
from typing import NamedTuple

import torch

from tutornet_sb.distillation.taps import find_stack, select_taps
from tutornet_sb.util.errors import InputError


class Pair(NamedTuple):
    """Dotted paths of two layers, and the weight of their loss in the sum."""

    teacher: str
    student: str
    weight: float = 1.0


def read_pairs(pairs):
    """Check pairs given as mappings; returns a list of ``Pair``."""
    example = "{teacher: encoder, student: encoder, weight: 1.0}"
    if not pairs or not isinstance(pairs, (list, tuple)):
        raise InputError(
            "rkd.pairs must be a whole number from 1 up, or a list such as "
            f"[{example}], got {pairs!r}"
        )
    checked = read_rows(pairs, "rkd.pairs", Pair, example)
    if not any(pair.weight for pair in checked):
        raise InputError("rkd.pairs: all weights are 0, so there is no loss")
    return checked


def choose_pairs(pairs, teacher, student):
    """Read the pairs of an experiment, or choose a number of them by depth.

    Of N pairs, the k-th is of the layers at k/N of the depth of either stack
    (see :func:`~tutornet_sb.distillation.taps.find_stack`), rounded up, and the
    last of the whole encoders: the uniform mapping of TinyBERT (arXiv
    1909.10351). Each has the weight 1/N. A shorter stack makes fewer pairs, an
    encoder that is no stack one.

    Named pairs are mappings with the keys ``teacher``, ``student`` (dotted
    paths) and, if it is not 1, ``weight``. The models, in any mode, are not
    changed.
    """
    if isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < 1:
        return read_pairs(pairs)
    if pairs == 1:
        return [Pair("encoder", "encoder")]
    stacks = {"teacher": find_stack(teacher), "student": find_stack(student)}
    count = max(1, min(pairs, *map(len, stacks.values())))
    chosen = []
    for k in range(1, count + 1):
        layers = {
            name: "encoder"
            if k == count
            # At k/N of the depth, rounded up; without floats
            else stack[-(-k * len(stack) // count) - 1]
            for name, stack in stacks.items()
        }
        chosen.append(Pair(**layers, weight=1 / count))
    return chosen


def read_rows(rows, name, kind, example):
    """Check a list of mappings, each of which names layers and a weight.

    `name` is that of the list, `kind` a named tuple whose last field is
    ``weight``, and `example` a row, for the messages.
    """
    if not isinstance(rows, (list, tuple)):
        raise InputError(
            f"{name} must be a list such as [{example}], got {rows!r}"
        )
    checked = []
    *layers, _ = kind._fields
    for index, row in enumerate(rows):
        where = f"{name}[{index}]"
        keys = set(row) if hasattr(row, "items") else set()
        if not set(layers) <= keys <= set(kind._fields):
            raise InputError(
                f"{where} must be a mapping such as {example}, got {row!r}"
            )
        made = kind(**row)
        if (
            isinstance(made.weight, bool)
            or not isinstance(made.weight, (int, float))
            or not 0 <= made.weight < math.inf
        ):
            raise InputError(
                f"{where}: weight must be a number from 0 up, "
                f"got {made.weight!r}"
            )
        if made[:-1] in [earlier[:-1] for earlier in checked]:
            raise InputError(f"{where} names layers again: {row!r}")
        checked.append(made)
    return checked


def teacher_taps(pairs):
    """Paths of the teacher's layers, each once, in the order of the pairs."""
    return list(dict.fromkeys(pair.teacher for pair in pairs))


class Projectors(torch.nn.ModuleList):
    """One projector for each pair, by ``factory(student_size, teacher_size)``.

    The teacher must be tapped at the layers of :func:`teacher_taps`, or more.
    ``student_taps`` are those of the student's layers, each once, and ``parts``
    the slices of each pair in the teacher's hidden states along dim.
    """

    def __init__(self, factory, pairs, teacher, student):
        sizes = dict(zip(teacher.taps, teacher.hidden_sizes, strict=True))
        ends = dict(zip(sizes, accumulate(sizes.values()), strict=True))
        paths = dict.fromkeys(pair.student for pair in pairs)
        taps = select_taps(student, paths, "student")
        super().__init__(
            factory(taps[pair.student].hidden_size, sizes[pair.teacher])
            for pair in pairs
        )
        self.pairs = pairs
        self.student_taps = taps
        self.parts = [
            slice(ends[pair.teacher] - sizes[pair.teacher], ends[pair.teacher])
            for pair in pairs
        ]

    def forward(self, hidden):
        """Project hidden states, given one for each of ``student_taps``.

        Returns one for each pair, ``(batch, frames, dim of the teacher's)``.
        """
        hidden = dict(zip(self.student_taps, hidden, strict=True))
        return [
            projector(hidden[pair.student])
            for projector, pair in zip(self, self.pairs, strict=True)
        ]
