"""CTC heads on intermediate layers of a student, for its training alone."""

from typing import NamedTuple

import torch

from tutornet_sb.distillation.pairs import read_rows
from tutornet_sb.distillation.taps import select_taps


class Intermediate(NamedTuple):
    """A layer of the student that gets a head of its own.

    Attributes
    ----------
    student : str
        Dotted path of the layer.
    weight : float
        Of this head's losses beside those of the student's own head.
    """

    student: str
    weight: float = 1.0


def read_intermediate(rows):
    """Check the intermediate heads of an experiment.

    Arguments
    ---------
    rows : list of dict
        Mappings with the key ``student`` and, if it is not 1, ``weight``.

    Returns
    -------
    list of Intermediate
        The same.

    Raises
    ------
    ValueError
        If one has a key missing or unknown or stands there twice, or if a
        weight is not a number from 0 up.

    Example
    -------
    >>> read_intermediate([{"student": "encoder.conv", "weight": 0.5}])
    [Intermediate(student='encoder.conv', weight=0.5)]
    """
    example = "{student: encoder.conv, weight: 0.5}"
    return read_rows(rows, "intermediate", Intermediate, example)


class IntermediateHeads(torch.nn.ModuleList):
    """A linear head for each of some layers of a student.

    Each is trained as the student's own head is, by CTC (arXiv 2102.03216) and
    by the teacher's posteriors (Inter-KD, arXiv 2211.15075), so that the layers
    below it learn from nearby. As projectors, they are dropped afterwards.

    Arguments
    ---------
    rows : list of dict
        As for :func:`read_intermediate`.
    student : AcousticModel
        In any mode; it is left as it was.
    symbols : int
        Of the student's own head.

    Raises
    ------
    ValueError
        If the rows are wrong, or a layer cannot be tapped.

    Example
    -------
    >>> from tutornet_sb.networks.acoustic_model import (
    ...     AcousticModel,
    ...     LogMelFeatures,
    ... )
    >>> from tutornet_sb.networks.recurrent import RecurrentEncoder
    >>> encoder = RecurrentEncoder(64, channels=8, hidden_size=4, layers=2)
    >>> head = torch.nn.Linear(encoder.output_size, 29)
    >>> student = AcousticModel(LogMelFeatures(), encoder, head)
    >>> path = "encoder.layers.outputs.0"
    >>> IntermediateHeads([{"student": path}], student, 29)
    IntermediateHeads(
      (0): Linear(in_features=8, out_features=29, bias=True)
    )
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
        """Compute the scores of each head.

        Arguments
        ---------
        hidden : list of torch.Tensor
            Outputs of the layers, ``(batch, frames, dim)`` each.

        Returns
        -------
        list of torch.Tensor
            Scores before the softmax, ``(batch, frames, symbols)`` each.
        """
        return [head(x) for head, x in zip(self, hidden, strict=True)]
