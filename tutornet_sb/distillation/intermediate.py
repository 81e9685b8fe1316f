"""CTC heads on intermediate layers of a student, for training only."""

from typing import NamedTuple

import torch

from tutornet_sb.distillation.pairs import read_rows
from tutornet_sb.distillation.taps import select_taps


class Intermediate(NamedTuple):
    """A layer of the student with a head, and the weight of its losses."""

    student: str
    weight: float = 1.0


def read_intermediate(rows):
    """Check the intermediate heads of an experiment, given as mappings."""
    example = "{student: encoder.conv, weight: 0.5}"
    return read_rows(rows, "intermediate", Intermediate, example)


class IntermediateHeads(torch.nn.ModuleList):
    """A linear head for each of some layers of a student.

    Each is trained as the student's own head is, by CTC (arXiv 2102.03216) and
    by the teacher's posteriors (Inter-KD, arXiv 2211.15075), so that the layers
    below it get a loss nearby. As projectors, they are dropped afterwards.

    The rows are mappings as of :func:`read_intermediate`, the symbols those of
    the student's own head. The student is not changed.
    """

    def __init__(self, rows, student, symbols):
        rows = read_intermediate(rows)
        taps = select_taps(student, [row.student for row in rows], "student")
        super().__init__(
            torch.nn.Linear(tap.hidden_size, symbols) for tap in taps.values()
        )
        self.taps = taps
        self.weights = [row.weight for row in rows]

    def forward(self, hidden):
        """Logits ``(batch, frames, symbols)`` from each layer's outputs."""
        return [head(x) for head, x in zip(self, hidden, strict=True)]
