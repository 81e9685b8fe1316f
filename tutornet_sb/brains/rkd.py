"""Representation-level distillation, the initialisation of a student."""

from typing import NamedTuple

import torch

from tutornet_sb.brains.stage import StageBrain
from tutornet_sb.distillation.taps import encode_with_taps
from tutornet_sb.networks.acoustic_model import Encoding


class Representation(NamedTuple):
    """A student's encoding and its hidden states in the teacher's space.

    Attributes
    ----------
    encoding : Encoding
        Of the student.
    projected : list of torch.Tensor
        One for each pair, ``(batch, frames, dim of the teacher's layer)``.
    """

    encoding: Encoding
    projected: list


class RKDBrain(StageBrain):
    """Teach a student the hidden states of its teacher.

    The loss is the sum over the pairs of layers of each pair's weight times
    its representation loss, frames weighted by the pair's own hidden states.

    No transcript is used. The head of the student is not trained here; the
    projectors are trained with the student and dropped after the stage.

    ``modules`` holds ``teacher`` and ``projector`` (from ``make_projectors``)
    besides ``student``; ``hparams`` holds ``representation_loss`` and ``delay``
    (seconds).
    """

    def __init__(self, modules, hparams, **kwargs):
        # Before DDP wraps it
        projectors = modules["projector"]
        self.pairs = projectors.pairs
        self.parts = projectors.parts
        self.student_taps = projectors.student_taps
        super().__init__(modules, hparams, **kwargs)
        self.try_loss(self.hparams.representation_loss, torch.zeros(1, 1, 1))

    def compute_forward(self, batch, stage):
        """Encode a batch and project it onto the teacher's hidden states.

        Arguments
        ---------
        batch : speechbrain.dataio.batch.PaddedBatch
            With ``sig``.
        stage : speechbrain.Stage
            Unused: the student's own mode switches its augmentation.

        Returns
        -------
        Representation
            The encoding and its projection.
        """
        encoding, hidden = encode_with_taps(
            self.modules.student,
            self.student_taps,
            *batch.to(self.device).sig,
        )
        return Representation(encoding, self.modules.projector(hidden))

    def compute_objectives(self, representation, batch, stage):
        """Weighted squared error to the teacher's normalised hidden states.

        Arguments
        ---------
        representation : Representation
            From ``compute_forward``.
        batch : speechbrain.dataio.batch.PaddedBatch
            With ``sig``.
        stage : speechbrain.Stage
            Unused.

        Returns
        -------
        torch.Tensor
            Scalar, per hidden unit and frame.
        """
        targets = self.teacher_targets(batch, representation.encoding)
        terms = {}
        for index, projected in enumerate(representation.projected):
            # In the log the pairs are numbered in their order from 0.
            name = "rkd" if len(self.pairs) == 1 else f"rkd_{index}"
            own = targets.hidden[..., self.parts[index]]
            loss = self.hparams.representation_loss(
                projected, targets._replace(hidden=own)
            )
            terms[name] = (self.pairs[index].weight, loss)
        return self.total(**terms)
