"""Softmax-level distillation combined with the original task."""

import speechbrain as sb

from tutornet_sb.brains.ctc import CTCBrain


class SKDBrain(CTCBrain):
    """Train a student by CTC and by its teacher's posteriors.

    The loss is ``L_CTC + weight * L_SKD``, both summed over the frames of an
    utterance and averaged over utterances (TutorNet, arXiv 2008.00671; the
    form of the sum follows Inter-KD, arXiv 2211.15075).

    ``modules`` holds ``teacher`` besides ``student``; ``hparams`` holds
    ``softmax_loss``, ``skd_weight`` (of the first epoch), ``skd_weight_final``
    (of the last, linear between them) and ``delay`` (seconds by which the
    teacher's frames are moved back).
    """

    def compute_objectives(self, encoding, batch, stage):
        """Sum of the CTC and the SKD term; CTC alone outside training.

        Arguments
        ---------
        encoding : Encoding
            From ``compute_forward``.
        batch : speechbrain.dataio.batch.PaddedBatch
            With ``sig`` and ``tokens``.
        stage : speechbrain.Stage
            The teacher is asked in training only.

        Returns
        -------
        torch.Tensor
            Scalar (nats per utterance).
        """
        if stage != sb.Stage.TRAIN:
            return super().compute_objectives(encoding, batch, stage)
        targets = self.teacher_targets(batch, encoding)
        return self.total(
            ctc=(1.0, self.ctc(encoding, batch)),
            skd=(
                self.skd_weight,
                self.hparams.softmax_loss(encoding.logits, targets),
            ),
        )

    @property
    def skd_weight(self):
        """Weight of the SKD term in this epoch."""
        first, last = self.hparams.skd_weight, self.hparams.skd_weight_final
        epochs = self.hparams.epoch_counter.limit
        return first + (last - first) * (self.epoch - 1) / max(1, epochs - 1)
