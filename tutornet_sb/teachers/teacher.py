"""The frozen teacher."""

import torch

from tutornet_sb.distillation.taps import (
    encode_with_taps,
    select_taps,
    trying_out,
)
from tutornet_sb.distillation.targets import TeacherTargets


class Teacher(torch.nn.Module):
    """A trained model, frozen, exposing selected hidden layers.

    It stays in evaluation mode whatever ``train()`` is called on it or around
    it, and needs no gradients. A ``StoredTeacher`` has the same attributes and
    ``targets(batch)``, and takes its place in a stage.

    Arguments
    ---------
    model : AcousticModel
        The trained model. It is frozen in place.
    taps : list of str
        Dotted paths of the layers whose outputs, concatenated along dim, are
        the hidden representation, see ``encode_with_taps``.
    vocabulary : VocabularyMap, optional
        From the teacher's symbols to those of the student.
    standardise : Standardiser, optional
        Of the hidden states, for representation-level distillation.

    Attributes
    ----------
    taps : dict
        Path -> ``Tap``, in the order given; ``hidden_sizes`` lists their
        dimensions.
    symbols : int
        Symbols of the targets; 0 for a teacher without a CTC head.
    frame_period : float
        Distance between two frames (seconds).
    errors : dict
        Error of encoded hidden states; none, since they are exact.
    """

    def __init__(
        self, model, taps=("encoder",), vocabulary=None, standardise=None
    ):
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary
        self.standardise = standardise
        self.requires_grad_(False)
        self.eval()
        self.taps = select_taps(model, taps, "teacher")
        self.hidden_sizes = [tap.hidden_size for tap in self.taps.values()]
        self.frame_period = model.frame_period
        self.errors = {}
        self.to(next(model.parameters()).device)
        # From half a second of silence
        samples = model.features.sample_rate // 2
        with trying_out(model) as device:
            silence = torch.zeros(1, samples, device=device)
            targets = self(silence, torch.ones(1, device=device))
        self.symbols = targets.posteriors.shape[-1]

    def train(self, mode=True):
        """Stay in evaluation mode, in which batch statistics do not drift."""
        return super().train(False)

    # Not inference mode: what it returns takes part in the student's graph.
    @torch.no_grad()
    def forward(self, wavs, wav_lens):
        """``TeacherTargets`` of waveforms, in float32, on the teacher's frames.

        As of an ``AcousticModel``: waveforms ``(batch, samples)``, and their
        valid parts relative to the longest, ``(batch,)``.
        """
        encoding, hidden = encode_with_taps(
            self.model, self.taps, wavs, wav_lens
        )
        hidden = hidden or [encoding.hidden[..., :0]]
        hidden = torch.cat([part.float() for part in hidden], dim=-1)
        if self.standardise is not None:
            hidden = self.standardise(hidden)
        posteriors = torch.softmax(encoding.logits.float(), dim=-1)
        if self.vocabulary is not None:
            posteriors = self.vocabulary(posteriors, encoding.lengths)
        return TeacherTargets(
            hidden, posteriors, encoding.lengths, self.frame_period
        )

    def targets(self, batch):
        """Targets of a ``PaddedBatch`` with ``sig``."""
        return self(*batch.sig)
