"""Representation-level distillation, the initialisation of a student."""

import torch

from tutornet_sb.distillation.frame_weighting import name_weighting
from tutornet_sb.distillation.taps import encode_with_taps
from tutornet_sb.training.brain import StageBrain


class RKDBrain(StageBrain):
    """Fit a student's hidden states to its teacher's.

    The loss is the sum over the pairs of layers of each pair's weight times
    its representation loss, frames weighted by the pair's own hidden states.

    Besides each pair's loss ``rkd``, the log has ``rkd_relative``, this loss
    divided by that of the best constant, and with targets from a store
    ``rkd_codes``, the squared error of their codes by the same weights.

    No transcript is used. The head of the student is not trained here; the
    projectors are trained with the student and dropped after the stage.

    ``modules`` holds ``teacher`` and ``projector`` (from ``Projectors``)
    besides ``student``; ``hparams`` holds ``representation_loss`` and ``delay``
    (seconds).
    """

    def __init__(self, modules, hparams, **kwargs):
        # Before DDP wraps it
        projectors = modules["projector"]
        self.pairs = projectors.pairs
        self.parts = projectors.parts
        self.student_taps = projectors.student_taps
        # In the log the pairs are numbered in their order from 0.
        self.names = ["rkd"]
        if len(self.pairs) > 1:
            self.names = [f"rkd_{index}" for index in range(len(self.pairs))]
        super().__init__(modules, hparams, **kwargs)
        self.try_loss(self.hparams.representation_loss, torch.zeros(1, 1, 1))

    def compute_forward(self, batch, stage):
        """Encode a batch, and project its hidden states for each pair.

        Returns an Encoding, and a list of tensors of shape ``(batch, frames,
        dim of the teacher's layer)``.
        """
        encoding, hidden = encode_with_taps(
            self.modules.student,
            self.student_taps,
            *batch.to(self.device).sig,
        )
        return encoding, self.modules.projector(hidden)

    def compute_objectives(self, outputs, batch, stage):
        """Weighted squared error to the teacher's hidden states."""
        encoding, projections = outputs
        targets = self.align(self.modules.teacher.targets(batch), encoding)
        representation_loss, terms = self.hparams.representation_loss, {}
        for name, pair, part, projected in zip(
            self.names, self.pairs, self.parts, projections, strict=True
        ):
            own = targets._replace(hidden=targets.hidden[..., part])
            terms[name] = (pair.weight, representation_loss(projected, own))
            mean, square = representation_loss.moments(own)
            self.terms.add(f"{name}_mean", mean, self.size)
            self.terms.add(f"{name}_square", square, self.size)
        return self.total(**terms)

    @property
    def frame_weighting(self):
        """Name of the frame weighting."""
        weighting = self.hparams.representation_loss.weighting
        return name_weighting(weighting, self.modules.teacher.symbols)

    def figures(self):
        """Mean losses, relative ones, and errors of the codes of a store."""
        figures = super().figures()
        errors = self.modules.teacher.errors
        for name, pair in zip(self.names, self.pairs, strict=True):
            mean = figures.pop(f"{name}_mean")
            square = figures.pop(f"{name}_square")
            constant = (square - mean.square()).mean().item()
            figures[f"{name}_relative"] = figures[name] / constant
            if pair.teacher in errors:
                by_weighting = errors[pair.teacher]
                figures[f"{name}_codes"] = by_weighting[self.frame_weighting]
        return figures

    def finish(self, valid_set):
        """Give which layers were matched, and by which frame weighting, too."""
        return super().finish(valid_set) | {
            "pairs": [pair._asdict() for pair in self.pairs],
            "frame_weighting": self.frame_weighting,
        }
