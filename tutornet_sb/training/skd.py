"""Softmax-level distillation combined with the original task."""

import speechbrain as sb
import torch

from tutornet_sb.distillation.alignment import count_symbols
from tutornet_sb.training.ctc import CTCBrain


class SKDBrain(CTCBrain):
    """Train a student by CTC and by its teacher's posteriors.

    The loss is ``ctc_weight * L_CTC + lambda * L_SKD``, both summed over
    the frames of an utterance and averaged over utterances (TutorNet, arXiv
    2008.00671; the form of the sum follows Inter-KD, arXiv 2211.15075). An
    utterance that is not ``transcribed`` has no CTC term, and the weight of its
    SKD term stays that of the first epoch. With intermediate heads, each has
    such a loss of its own, and they are added by their weights (Inter-KD).

    Symbols of the teacher that the student's frames cannot show have no SKD
    term (see ``align``). Where there may be any, their percentage is logged as
    ``skd_left_out``.

    ``modules`` holds ``teacher`` besides ``student``; ``hparams`` holds
    ``softmax_loss``, ``skd`` (``ctc_weight``; with 0, transcripts are not
    needed; ``weight`` of the first epoch and ``weight_final`` of the last,
    linear between them) and ``delay`` (seconds by which the teacher's frames
    are moved back). The teacher needs no taps.
    """

    def __init__(self, modules, hparams, **kwargs):
        super().__init__(modules, hparams, **kwargs)
        self.ctc_weight = self.hparams.skd["ctc_weight"]
        logits = torch.zeros(1, 1, self.modules.teacher.symbols)
        self.try_loss(self.hparams.softmax_loss, logits)

    def compute_objectives(self, encodings, batch, stage):
        """Sum of the CTC and the SKD term; CTC alone outside training.

        Without ``transcribed`` in the batch, all utterances are. In nats per
        utterance.
        """
        if stage != sb.Stage.TRAIN:
            return super().compute_objectives(encodings, batch, stage)
        given = self.modules.teacher.targets(batch)
        targets = self.align(given, encodings[0])
        if targets.posterior_mask is not None:
            known, in_all = map(count_symbols, (targets, given))
            left_out = 100 * (1 - known / in_all.clamp(min=1))
            self.terms.add("skd_left_out", left_out, self.size)
        weights = {
            True: ("skd", self.skd_weight),
            False: ("skd_untranscribed", self.hparams.skd["weight"]),
        }
        size = len(batch.id)
        kinds = getattr(batch, "transcribed", [True] * size)
        terms = {}
        for transcribed, (name, weight) in weights.items():
            rows = [
                row for row, kind in enumerate(kinds) if kind == transcribed
            ]
            if not rows:
                continue
            # As a rule there is one kind: no copy of all rows.
            part = rows if len(rows) < size else slice(None)
            known = targets.rows(part)
            for end, share, encoding in self.weighted(encodings):
                share *= len(rows) / size
                skd = self.hparams.softmax_loss(encoding.logits[part], known)
                terms[f"{name}{end}"] = (share * weight, skd)
                if transcribed and self.ctc_weight:
                    ctc = self.ctc(encoding, batch, part)
                    terms[f"ctc{end}"] = (share * self.ctc_weight, ctc)
        return self.total(**terms)

    @property
    def skd_weight(self):
        """Weight of the SKD term in this epoch."""
        skd = self.hparams.skd
        first, last = skd["weight"], skd["weight_final"]
        epochs = self.hparams.epoch_counter.limit
        return first + (last - first) * (self.epoch - 1) / max(1, epochs - 1)
