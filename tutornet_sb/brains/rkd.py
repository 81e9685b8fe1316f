"""Representation-level distillation, the initialisation of a student."""

from typing import NamedTuple

import torch

from tutornet_sb.brains.stage import StageBrain
from tutornet_sb.networks.acoustic_model import Encoding


class Representation(NamedTuple):
    """A student's encoding and its hidden states in the teacher's space.

    Attributes
    ----------
    encoding : Encoding
        Of the student.
    projected : torch.Tensor
        ``(batch, frames, teacher dim)``.
    """

    encoding: Encoding
    projected: torch.Tensor


class RKDBrain(StageBrain):
    """Teach a student the hidden states of its teacher.

    No transcript is used. The head of the student is not trained here; the
    projector is trained with the student and dropped after the stage.

    ``modules`` holds ``teacher`` and ``projector`` besides ``student``;
    ``hparams`` holds ``representation_loss`` and ``delay`` (seconds).
    """

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
        encoding = self.modules.student(*batch.to(self.device).sig)
        return Representation(encoding, self.modules.projector(encoding.hidden))

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
        loss = self.hparams.representation_loss
        return self.total(rkd=(1.0, loss(representation.projected, targets)))
