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
        the hidden representation. Of a tuple, the first tensor is taken; of
        several calls in one pass, the last. Without any, the hidden
        representation has dim 0.
    vocabulary : callable, optional
        Maps the posteriors, ``(batch, frames, symbols)``, and the valid
        frames, ``(batch,)``, onto the symbols of the student.
    standardise : Standardiser, optional
        Of the hidden states, for representation-level distillation.

    Attributes
    ----------
    taps : dict
        Path -> ``Tap``, in the order given.
    hidden_sizes : list of int
        Dimension of each layer.
    symbols : int
        Symbols of the targets; 0 for a teacher without a CTC head.
    frame_period : float
        Distance between two frames (seconds).
    errors : dict
        Error of encoded hidden states; none, since they are exact.

    Example
    -------
    >>> from tutornet_sb.networks.acoustic_model import (
    ...     AcousticModel,
    ...     LogMelFeatures,
    ... )
    >>> from tutornet_sb.networks.recurrent import RecurrentEncoder
    >>> encoder = RecurrentEncoder(64, channels=8, hidden_size=4, layers=1)
    >>> head = torch.nn.Linear(encoder.output_size, 29)
    >>> teacher = Teacher(AcousticModel(LogMelFeatures(), encoder, head))
    >>> targets = teacher(torch.randn(2, 16000), torch.tensor([1.0, 0.5]))
    >>> tuple(targets.hidden.shape), tuple(targets.posteriors.shape)
    ((2, 51, 8), (2, 51, 29))
    >>> teacher.hidden_sizes, teacher.symbols, teacher.frame_period
    ([8], 29, 0.02)
    >>> teacher.train().training
    False
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
        self.symbols = self._count_symbols()

    def _count_symbols(self):
        """Symbols of the targets, from half a second of silence."""
        samples = self.model.features.sample_rate // 2
        with trying_out(self.model) as device:
            silence = torch.zeros(1, samples, device=device)
            targets = self(silence, torch.ones(1, device=device))
        return targets.posteriors.shape[-1]

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
