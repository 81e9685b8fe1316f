"""Which layer of the student learns which layer of the teacher."""

import math
from itertools import accumulate
from typing import NamedTuple

import torch

from tutornet_sb.distillation.taps import find_stack, select_taps
from tutornet_sb.util.errors import InputError


class Pair(NamedTuple):
    """A layer of the teacher and the layer of the student that learns it.

    Attributes
    ----------
    teacher, student : str
        Dotted paths of the two layers.
    weight : float
        Of this pair's loss in the sum of all pairs.
    """

    teacher: str
    student: str
    weight: float = 1.0


def read_pairs(pairs):
    """Check the pairs of an experiment.

    Arguments
    ---------
    pairs : list of dict
        Mappings with the keys ``teacher``, ``student`` and, if it is not 1,
        ``weight``.

    Returns
    -------
    list of Pair
        The same.

    Raises
    ------
    ValueError
        If there is no pair, if one has a key missing or unknown or stands there
        twice, or if a weight is not a number from 0 up, or all are 0.

    Example
    -------
    >>> read_pairs([{"teacher": "encoder", "student": "encoder.conv"}])
    [Pair(teacher='encoder', student='encoder.conv', weight=1.0)]
    """
    example = "{teacher: encoder, student: encoder, weight: 1.0}"
    if not pairs or not isinstance(pairs, (list, tuple)):
        raise InputError(
            "pairs must be a whole number from 1 up, or a list such as "
            f"[{example}], got {pairs!r}"
        )
    checked = read_rows(pairs, "pairs", Pair, example)
    if not any(pair.weight for pair in checked):
        raise InputError("pairs: all weights are 0, there is nothing to learn")
    return checked


def choose_pairs(pairs, teacher, student):
    """Read the pairs of an experiment, or choose so many by depth.

    Of N pairs, the k-th is of the layers at k/N of the depth of either stack
    (see :func:`~tutornet_sb.distillation.taps.find_stack`), rounded up, and the
    last of the whole encoders: the uniform mapping of TinyBERT
    (https://arxiv.org/abs/1909.10351), which reaches the middle of networks
    of different depth. Each has the weight 1/N. A shorter stack leaves fewer
    pairs, an encoder that is no stack one.

    Arguments
    ---------
    pairs : int or list of dict
        How many, or as for :func:`read_pairs`.
    teacher, student : AcousticModel
        In any mode; they are left as they were.

    Returns
    -------
    list of Pair
        From the lowest layers up, or as they were named.

    Raises
    ------
    ValueError
        If named pairs are wrong, or a network cannot be run.

    Example
    -------
    >>> from tutornet_sb.networks.acoustic_model import (
    ...     AcousticModel,
    ...     LogMelFeatures,
    ... )
    >>> from tutornet_sb.networks.recurrent import RecurrentEncoder
    >>> def make(layers):
    ...     encoder = RecurrentEncoder(64, 4, hidden_size=4, layers=layers)
    ...     return AcousticModel(LogMelFeatures(), encoder, torch.nn.Identity())
    >>> for pair in choose_pairs(2, make(3), make(2)):
    ...     print(*pair)
    encoder.layers.outputs.1 encoder.layers.outputs.0 0.5
    encoder encoder 0.5
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

    Arguments
    ---------
    rows : list of dict
        As an experiment has them.
    name : str
        What the list is called there.
    kind : type
        Named tuple of a row: paths of layers, and last ``weight``, which may
        be left out.
    example : str
        A row.

    Returns
    -------
    list
        Of ``kind``.

    Raises
    ------
    ValueError
        If a row has a key missing or unknown, names the layers of another, or
        has a weight that is not a number from 0 up.

    Example
    -------
    >>> read_rows([{"teacher": "head"}], "pairs", Pair, "...")
    Traceback (most recent call last):
    ...
    ValueError: pairs[0]: student is missing
    """
    if not isinstance(rows, (list, tuple)):
        raise InputError(
            f"{name} must be a list such as [{example}], got {rows!r}"
        )
    checked = []
    *layers, _ = kind._fields
    for index, row in enumerate(rows):
        where = f"{name}[{index}]"
        if not hasattr(row, "items"):
            raise InputError(f"{where} must be a mapping, got {row!r}")
        for key in row:
            if key not in kind._fields:
                known = ", ".join(kind._fields)
                raise InputError(f"{where}: no key {key}, only {known}")
        for key in layers:
            if key not in row:
                raise InputError(f"{where}: {key} is missing")
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
        for other, earlier in enumerate(checked):
            if earlier[:-1] == made[:-1]:
                named = ", ".join(f"{key} {row[key]}" for key in layers)
                raise InputError(
                    f"{where} names the layers of {name}[{other}] again: "
                    f"{named}"
                )
        checked.append(made)
    return checked


def teacher_taps(pairs):
    """List the layers to tap a teacher at.

    Arguments
    ---------
    pairs : list of Pair
        From :func:`choose_pairs`.

    Returns
    -------
    list of str
        Each layer once, in the order of the pairs.

    Example
    -------
    >>> teacher_taps([Pair("head", layer) for layer in ("conv", "encoder")])
    ['head']
    """
    return list(dict.fromkeys(pair.teacher for pair in pairs))


class Projectors(torch.nn.ModuleList):
    """One projector for each pair, and where each pair's layers are found.

    Arguments
    ---------
    projectors : list of torch.nn.Module
        One for each pair.
    pairs : list of Pair
        The pairs.
    student_taps : dict
        Path -> ``Tap`` of the student's layers, each once.
    parts : list of slice
        Each pair's part of the teacher's hidden states along dim.
    """

    def __init__(self, projectors, pairs, student_taps, parts):
        super().__init__(projectors)
        self.pairs = pairs
        self.student_taps = student_taps
        self.parts = parts

    def forward(self, hidden):
        """Project the student's hidden states of each pair.

        Arguments
        ---------
        hidden : list of torch.Tensor
            One for each of ``student_taps``, ``(batch, frames, dim)``.

        Returns
        -------
        list of torch.Tensor
            One for each pair, ``(batch, frames, dim of the teacher's layer)``.
        """
        hidden = dict(zip(self.student_taps, hidden, strict=True))
        return [
            projector(hidden[pair.student])
            for projector, pair in zip(self, self.pairs, strict=True)
        ]


def make_projectors(factory, pairs, teacher, student):
    """Make a projector for each pair, of the sizes of its layers.

    Arguments
    ---------
    factory : callable
        Called as ``factory(student_size, teacher_size)`` for each pair, for
        instance ``Projector``.
    pairs : list of Pair
        From :func:`choose_pairs`.
    teacher : Teacher
        Tapped at the layers of :func:`teacher_taps`, or at more.
    student : AcousticModel
        In any mode; it is left as it was.

    Returns
    -------
    Projectors
        For the module ``projector`` of an ``RKDBrain``.

    Raises
    ------
    ValueError
        If a layer cannot be tapped.

    Example
    -------
    >>> from tutornet_sb.distillation.projector import Projector
    >>> from tutornet_sb.teachers.teacher import Teacher
    >>> from tutornet_sb.networks.acoustic_model import (
    ...     AcousticModel,
    ...     LogMelFeatures,
    ... )
    >>> from tutornet_sb.networks.recurrent import RecurrentEncoder
    >>> def make(size):
    ...     encoder = RecurrentEncoder(64, 7, hidden_size=size, layers=1)
    ...     head = torch.nn.Linear(2 * size, 29)
    ...     return AcousticModel(LogMelFeatures(), encoder, head)
    >>> pairs = [Pair("encoder", "encoder"), Pair("encoder", "encoder.conv")]
    >>> teacher = Teacher(make(6), teacher_taps(pairs))
    >>> projectors = make_projectors(Projector, pairs, teacher, make(4))
    >>> projectors[1].map
    Linear(in_features=7, out_features=12, bias=True)
    """
    ends = accumulate(teacher.hidden_sizes)
    sizes = dict(zip(teacher.taps, teacher.hidden_sizes, strict=True))
    parts = {
        path: slice(end - sizes[path], end)
        for path, end in zip(sizes, ends, strict=True)
    }
    for pair in pairs:
        if pair.teacher not in parts:
            raise InputError(
                f"the teacher is not tapped at {pair.teacher}, only at: "
                f"{', '.join(parts) or 'no layer'}; make it by "
                "Teacher(model, taps=teacher_taps(pairs))"
            )
    paths = dict.fromkeys(pair.student for pair in pairs)
    taps = select_taps(student, paths, "student")
    return Projectors(
        [
            factory(taps[pair.student].hidden_size, sizes[pair.teacher])
            for pair in pairs
        ],
        pairs,
        taps,
        [parts[pair.teacher] for pair in pairs],
    )
