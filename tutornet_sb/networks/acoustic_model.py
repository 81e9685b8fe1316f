"""A model is one module from waveform to frames."""

from typing import NamedTuple

import torch
from speechbrain.lobes.features import Fbank
from speechbrain.processing.features import InputNormalization


class Encoding(NamedTuple):
    """What every acoustic model returns for a batch of waveforms.

    Attributes
    ----------
    hidden : torch.Tensor
        Output of the encoder, ``(batch, frames, dim)``.
    logits : torch.Tensor
        Scores of the symbols before the softmax, ``(batch, frames, symbols)``.
    lengths : torch.Tensor
        Valid frames of each utterance, integers of shape ``(batch,)``.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    lengths: torch.Tensor


def frame_mask(lengths, frames):
    """Mark the valid frames of a padded batch.

    Arguments
    ---------
    lengths : torch.Tensor
        Valid frames of each utterance, integers of shape ``(batch,)``.
    frames : int
        Frames of the padded batch.

    Returns
    -------
    torch.Tensor
        Boolean mask ``(batch, frames)``, true where a frame is valid.

    Example
    -------
    >>> frame_mask(torch.tensor([1, 3]), 3).int().tolist()
    [[1, 0, 0], [1, 1, 1]]
    """
    return torch.arange(frames, device=lengths.device) < lengths.unsqueeze(1)


class LogMelFeatures(torch.nn.Module):
    """Log-mel energies, normalised over each utterance.

    Arguments
    ---------
    n_mels : int
        Mel filters, the dimension of a frame.
    sample_rate : int
        Sample rate of the waveforms (Hz).
    win_length : float
        Window of one frame (milliseconds).
    hop_length : float
        Distance between frames (milliseconds).
    n_fft : int
        Points of the Fourier transform.

    Example
    -------
    >>> features = LogMelFeatures()
    >>> x, lengths = features(torch.randn(2, 16000), torch.tensor([1.0, 0.5]))
    >>> tuple(x.shape), lengths.tolist()
    ((2, 101, 64), [101, 51])
    """

    def __init__(
        self,
        n_mels=64,
        sample_rate=16000,
        win_length=20,
        hop_length=10,
        n_fft=512,
    ):
        super().__init__()
        self.sample_rate = sample_rate
        self.hop_samples = round(sample_rate * hop_length / 1000)
        self.frame_period = self.hop_samples / sample_rate
        self.output_size = n_mels
        self.fbank = Fbank(
            sample_rate=sample_rate,
            n_fft=n_fft,
            n_mels=n_mels,
            win_length=win_length,
            hop_length=hop_length,
        )
        self.normalize = InputNormalization(norm_type="sentence")

    def forward(self, wavs, wav_lens):
        """Compute features.

        Arguments
        ---------
        wavs : torch.Tensor
            Waveforms, ``(batch, samples)``.
        wav_lens : torch.Tensor
            Valid part of each waveform relative to the longest, ``(batch,)``.

        Returns
        -------
        features : torch.Tensor
            ``(batch, frames, n_mels)``, zero on padded frames.
        lengths : torch.Tensor
            Valid frames, integers of shape ``(batch,)``.
        """
        features = self.fbank(wavs)
        samples = (wav_lens * wavs.shape[1]).round().long()
        # The transform is centred: a frame stands at every multiple of the hop.
        lengths = samples // self.hop_samples + 1
        frames = features.shape[1]
        # Half a frame below the true length: SpeechBrain multiplies it by the
        # frames again, and rounding there must not let a padded frame in.
        features = self.normalize(features, (lengths - 0.5) / frames)
        mask = frame_mask(lengths, frames).unsqueeze(-1)
        return features.masked_fill(~mask, 0.0), lengths


class AcousticModel(torch.nn.Module):
    """Features, encoder and CTC head as one module from waveform to frames.

    Teacher and student may differ in features, network and frame rate, and
    still meet, because each is an ``AcousticModel``. The same module is
    trained, frozen as a teacher, exported and published.

    Arguments
    ---------
    features : torch.nn.Module
        Called as ``(wavs, wav_lens)``, returns ``(features, lengths)``; has
        ``frame_period`` (seconds).
    encoder : torch.nn.Module
        Called as ``(features, lengths)``, returns ``(hidden, lengths)``; has
        ``stride`` (input frames for one output frame) and ``output_size``.
    head : torch.nn.Module
        Called as ``hidden``, returns logits.
    augment : callable, optional
        Applied as ``augment(features)`` to this model's
        features in training only, so that a teacher always hears the clean
        utterance. May be set after construction.

    Example
    -------
    >>> from tutornet_sb.networks.lstm import LSTMEncoder
    >>> encoder = LSTMEncoder(64, channels=8, hidden_size=8, layers=1)
    >>> head = torch.nn.Linear(encoder.output_size, 29)
    >>> model = AcousticModel(LogMelFeatures(), encoder, head)
    >>> encoding = model(torch.randn(2, 16000), torch.tensor([1.0, 0.5]))
    >>> tuple(encoding.logits.shape), encoding.lengths.tolist()
    ((2, 51, 29), [51, 26])
    >>> model.frame_period
    0.02
    """

    def __init__(self, features, encoder, head, augment=None):
        super().__init__()
        self.features = features
        self.encoder = encoder
        self.head = head
        self.augment = augment

    @property
    def frame_period(self):
        """Distance between two output frames (seconds)."""
        return self.features.frame_period * self.encoder.stride

    def forward(self, wavs, wav_lens):
        """Encode a batch of waveforms.

        Arguments
        ---------
        wavs : torch.Tensor
            Waveforms, ``(batch, samples)``.
        wav_lens : torch.Tensor
            Valid part of each waveform relative to the longest, ``(batch,)``.

        Returns
        -------
        Encoding
            Hidden states, logits and valid lengths.
        """
        features, lengths = self.features(wavs, wav_lens)
        if self.training and self.augment is not None:
            features = self.augment(features)
        hidden, lengths = self.encoder(features, lengths)
        return Encoding(hidden, self.head(hidden), lengths)
