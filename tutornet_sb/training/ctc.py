"""The original task: CTC training, and the scoring of any student."""

import speechbrain as sb
import torch

from tutornet_sb.corpora.tokenizer import greedy_decode, tidy
from tutornet_sb.distillation.losses import ctc_loss
from tutornet_sb.distillation.taps import encode_with_taps
from tutornet_sb.inference.scores import score
from tutornet_sb.training.brain import StageBrain
from tutornet_sb.util import processes


class CTCBrain(StageBrain):
    """Train a student by CTC alone, or score one that is trained.

    ``hparams`` holds besides those of :class:`StageBrain` the ``tokenizer``
    (a ``SentencePieceProcessor``) and optionally ``searcher``, a CTC
    beam search that decodes the test splits a second time. ``modules`` may
    hold ``heads``, :class:`IntermediateHeads` that are trained beside the
    student's own.

    After ``evaluate``, ``references``, ``hypotheses`` and ``beam_hypotheses``
    hold the transcripts by utterance id.
    """

    selected_by = "WER"

    def __init__(self, modules, hparams, **kwargs):
        # Before DDP wraps them
        heads = modules.get("heads")
        self.head_taps = heads.taps if heads else {}
        self.head_weights = heads.weights if heads else []
        super().__init__(modules, hparams, **kwargs)

    def compute_forward(self, batch, stage):
        """Encode a batch."""
        inputs = batch.to(self.device).sig
        if stage != sb.Stage.TRAIN or not self.head_taps:
            return [self.modules.student(*inputs)]
        encoding, hidden = encode_with_taps(
            self.modules.student, self.head_taps, *inputs
        )
        more = self.modules.heads(hidden)
        return [encoding, *(encoding._replace(logits=x) for x in more)]

    def weighted(self, encodings):
        """Give suffix of terms, weight and encoding of each head."""
        yield "", 1.0, encodings[0]
        for index, encoding in enumerate(encodings[1:]):
            # In the log they are numbered in their order from 0.
            yield f"_{index}", self.head_weights[index], encoding

    def compute_objectives(self, encodings, batch, stage):
        """CTC loss, summed over frames, averaged over utterances (nats)."""
        loss = self.total(
            **{
                f"ctc{end}": (weight, self.ctc(encoding, batch))
                for end, weight, encoding in self.weighted(encodings)
            }
        )
        if stage != sb.Stage.TRAIN:
            self.transcribe(encodings[0], batch, stage)
        return loss

    def ctc(self, encoding, batch, rows=slice(None)):
        """CTC loss of rows of a batch (nats per utterance).

        It is 0 for utterances with too few frames for their transcript, which
        training sets do not have.
        """
        tokens, relative = batch.tokens
        token_lengths = (relative * tokens.shape[1]).round().long()
        return ctc_loss(
            encoding.logits[rows],
            tokens[rows],
            encoding.lengths[rows],
            token_lengths[rows],
        )

    def transcribe(self, encoding, batch, stage):
        """Decode a batch and keep the transcripts."""
        # SpeechBrain's decoders read utterance by utterance, and a GPU would
        # stop for each.
        log_probs = torch.log_softmax(encoding.logits.float(), dim=-1).cpu()
        greedy = greedy_decode(log_probs, encoding.lengths)
        self.references.update(zip(batch.id, batch.wrd, strict=True))
        texts = map(tidy, self.hparams.tokenizer.decode(greedy))
        self.hypotheses.update(zip(batch.id, texts, strict=True))
        searcher = getattr(self.hparams, "searcher", None)
        if stage == sb.Stage.TEST and searcher is not None:
            # SpeechBrain rounds relative lengths to frames again.
            relative = encoding.lengths.cpu() / log_probs.shape[1]
            best = [
                tidy(hyps[0].text) for hyps in searcher(log_probs, relative)
            ]
            self.beam_hypotheses.update(zip(batch.id, best, strict=True))

    def on_stage_start(self, stage, epoch=None):
        """Forget the transcripts of the stage before."""
        super().on_stage_start(stage, epoch)
        self.references, self.hypotheses, self.beam_hypotheses = {}, {}, {}

    def figures(self):
        """Mean losses, and WER and CER (%) where there are transcripts."""
        figures = super().figures()
        # Each process has transcribed its share.
        for texts in self.references, self.hypotheses, self.beam_hypotheses:
            for part in processes.gather(texts):
                texts.update(part)
        if self.references:
            scores = score(self.references, self.hypotheses)
            figures.update(WER=scores["wer"], CER=scores["cer"])
        return figures
