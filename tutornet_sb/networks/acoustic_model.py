"""Features, encoder and head as one module, from waveform to frames."""

import math
from typing import NamedTuple

import torch
from speechbrain.lobes.features import Fbank
from speechbrain.processing.features import STFT
from speechbrain.utils.autocast import fwd_default_precision

# Values this far below the level of the recording are clipped (dB).
RANGE = 20.0
# Half-life of the weight of a frame in a causal level (seconds)
HALF_LIFE = 2.0
# Least power of a spectrum (digital silence), and less than its logarithm
FLOOR = 1e-20
LOWEST = -47.0


class Encoding(NamedTuple):
    """Output of an acoustic model for a batch of waveforms.

    The encoder's output ``(batch, frames, dim)``, scores before the softmax
    ``(batch, frames, symbols)``, and the valid frames ``(batch,)``, integers.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    lengths: torch.Tensor


def frame_mask(lengths, frames):
    """Mask ``(batch, frames)``, true on the valid frames of a padded batch.

    Example
    -------
    >>> frame_mask(torch.tensor([1, 3]), 3).int().tolist()
    [[1, 0, 0], [1, 1, 1]]
    """
    return torch.arange(frames, device=lengths.device) < lengths.unsqueeze(1)


def valid_counts(padded, relative):
    """Valid samples (or tokens) ``(batch,)`` by lengths relative to all."""
    return (relative * padded.shape[1]).round().long()


def difference(wavs, before=None):
    """First differences ``(batch, samples)``, which remove a constant offset.

    ``before`` are samples before the first, ``(batch, 1)``; by default, equal.
    """
    before = wavs[:, :1] if before is None else before
    return wavs - torch.cat([before, wavs[:, :-1]], dim=1)


class SpectralFeatures(torch.nn.Module):
    """Frames of a log spectrum, independent of offset and recording level.

    First differences of the waveform remove any constant offset. From the log
    spectrum the level of the recording is subtracted, in which loud frames
    count most: ``sum_t softmax_t(m_t) m_t`` with ``m_t`` the mean of frame
    ``t`` over its bins (nepers of power). So a gain changes nothing, and
    silence around the speech next to nothing. Values more than ``RANGE`` below
    the level are clipped. Mean and variance are averages over all training
    batches (buffers, without decay), in training as well: those of a short
    utterance depend on its words.

    A causal level is that of the frames so far, their weights halved every
    ``HALF_LIFE`` seconds, whether the waveform arrives whole or in pieces.

    Called as ``(wavs, wav_lens)``, waveforms ``(batch, samples)`` and their
    valid parts relative to the longest ``(batch,)``, it returns
    ``(features, lengths)``: ``(batch, frames, output_size)``, zero on padded
    frames, and the valid frames ``(batch,)``. A subclass has a centred ``stft``
    and defines ``spectrum(wavs) -> (batch, frames, output_size)``, which rises
    by ``neper`` when the power rises by the factor e.
    """

    def __init__(self, stft, output_size, causal, neper):
        super().__init__()
        self.is_causal = causal
        self.neper = neper
        self.sample_rate = stft.sample_rate
        self.hop_samples = stft.hop_length
        self.frame_period = self.hop_samples / self.sample_rate
        self.output_size = output_size
        self.normalize = torch.nn.BatchNorm1d(
            output_size, affine=False, momentum=None
        )

    def power(self, wavs):
        """Power ``(batch, frames, bins)``, faster than by SpeechBrain."""
        stft = self.stft(wavs)
        return stft[..., 0].square() + stft[..., 1].square()

    def level(self, frames, mask):
        """Level of whole utterances in the spectrum's units, ``(batch, 1)``."""
        means = frames.mean(-1)
        weights = (means / self.neper).masked_fill(~mask, -math.inf).softmax(1)
        return (weights * means).sum(1, keepdim=True)

    @fwd_default_precision(cast_inputs=torch.float32)
    def causal_level(self, frames, sums=None):
        """Level ``(batch, frames)`` from the frames so far, and new ``sums``.

        These, ``(2 * batch, 1)``, are to be given with the frames that follow.
        """
        means = frames.mean(-1) / self.neper
        weights = means.exp()
        # Positive, so that the logarithms of the sums are a state too
        x = torch.cat([weights, weights * (means - LOWEST)])
        decay = 0.5 ** (self.frame_period / HALF_LIFE)
        if sums is not None:
            x = torch.cat([x[:, :1] + decay * sums, x[:, 1:]], dim=1)
        # Sums of 2, 4, 8, ... frames, until nothing is left of a frame
        frames_ago = 1
        while decay**frames_ago > 1e-40:
            before = torch.nn.functional.pad(x, (frames_ago, 0))
            x = x + decay**frames_ago * before[:, : x.shape[1]]
            frames_ago *= 2
        weights, weighted = x.chunk(2)
        return (weighted / weights + LOWEST) * self.neper, x[:, -1:].clone()

    def apply_statistics(self, frames, level, mask=None):
        """Subtract the level and normalise.

        In training, the averages are updated by the valid frames of ``mask``.
        """
        frames = frames - level.unsqueeze(-1)
        frames = frames.clamp(min=-RANGE * math.log(10) / 10 * self.neper)
        norm = self.normalize
        if self.training:
            # Only for its statistics
            norm(frames[mask].detach())
        return torch.nn.functional.batch_norm(
            frames.transpose(1, 2),
            norm.running_mean,
            norm.running_var,
            eps=norm.eps,
        ).transpose(1, 2)

    def forward(self, wavs, wav_lens):
        """Compute features and their lengths, see the class."""
        samples = valid_counts(wavs, wav_lens)
        # The step from the last sample to the padding is not speech.
        inside = frame_mask(samples, wavs.shape[1])
        frames = self.spectrum(difference(wavs) * inside)
        # A frame is centred at every multiple of the hop.
        lengths = samples // self.hop_samples + 1
        mask = frame_mask(lengths, frames.shape[1])
        if self.is_causal:
            level, _ = self.causal_level(frames)
        else:
            level = self.level(frames, mask)
        frames = self.apply_statistics(frames, level, mask)
        return frames.masked_fill(~mask.unsqueeze(-1), 0.0), lengths


class LogMelFeatures(SpectralFeatures):
    """Log-mel energies (dB), see ``SpectralFeatures``.

    Window and hop are in milliseconds. ``causal``, for streaming: the level is
    that of the frames so far.
    """

    def __init__(
        self,
        n_mels=64,
        sample_rate=16000,
        win_length=20,
        hop_length=10,
        n_fft=512,
        causal=False,
    ):
        fbank = Fbank(
            sample_rate=sample_rate,
            n_fft=n_fft,
            n_mels=n_mels,
            win_length=win_length,
            hop_length=hop_length,
        )
        super().__init__(fbank.compute_STFT, n_mels, causal, 10 / math.log(10))
        self.fbank = fbank
        # Not arguments of Fbank's constructor
        fbank.compute_fbanks.top_db = math.inf
        fbank.compute_fbanks.amin = FLOOR

    @property
    def stft(self):
        """The Fourier transform."""
        return self.fbank.compute_STFT

    @fwd_default_precision(cast_inputs=torch.float32)
    def spectrum(self, wavs):
        """Compute the frames before normalisation (dB)."""
        return self.fbank.compute_fbanks(self.power(wavs))


class SpectrogramFeatures(SpectralFeatures):
    """Log power spectrogram (nepers), the features of DeepSpeech2.

    As OpenSeq2Seq computes them (``get_speech_features`` in
    ``open_seq2seq/data/speech2text/speech_utils.py``): Hann window, a transform
    as long as the window, its ``n_bins`` lowest bins (a ValueError if it has
    fewer); but normalised like log-mel features. For the other arguments see
    ``LogMelFeatures``.
    """

    def __init__(
        self,
        n_bins=160,
        sample_rate=16000,
        win_length=20,
        hop_length=10,
        causal=False,
    ):
        n_fft = round(sample_rate * win_length / 1000)
        if n_bins > n_fft // 2 + 1:
            raise ValueError(
                f"n_bins must be at most {n_fft // 2 + 1} with a window of "
                f"{win_length} ms at {sample_rate} Hz, got {n_bins}"
            )
        stft = STFT(
            sample_rate=sample_rate,
            win_length=win_length,
            hop_length=hop_length,
            n_fft=n_fft,
            window_fn=torch.hann_window,
        )
        super().__init__(stft, n_bins, causal, 1.0)
        self.stft = stft

    @fwd_default_precision(cast_inputs=torch.float32)
    def spectrum(self, wavs):
        """Compute the frames before normalisation (nepers)."""
        power = self.power(wavs)[:, :, : self.output_size]
        return torch.log(power.clamp(min=FLOOR))


class AcousticModel(torch.nn.Module):
    """Features, encoder and CTC head as one module from waveform to frames.

    Teacher and student may differ in features, network and frame rate, because
    each is one, called as ``(wavs, wav_lens)`` and returning an ``Encoding``.

    Arguments
    ---------
    features : torch.nn.Module
        ``(wavs, wav_lens) -> (features, lengths)``, with ``frame_period``.
    encoder : torch.nn.Module
        ``(features, lengths) -> (hidden, lengths)``: ``(batch, frames, dim)``
        to ``(batch, frames / stride, output_size)``, zero on padded frames, and
        their valid frames; with ``stride`` and ``output_size``.
    head : torch.nn.Module
        ``hidden -> logits``.
    augment, augment_waveform : callable, optional
        ``features -> features`` and ``(wavs, wav_lens) -> wavs``, in training
        only, so that a teacher always receives the clean utterance.

    Example
    -------
    >>> from tutornet_sb.networks.recurrent import RecurrentEncoder
    >>> encoder = RecurrentEncoder(64, channels=8, hidden_size=8, layers=1)
    >>> head = torch.nn.Linear(encoder.output_size, 29)
    >>> model = AcousticModel(LogMelFeatures(), encoder, head)
    >>> encoding = model(torch.randn(2, 16000), torch.tensor([1.0, 0.5]))
    >>> tuple(encoding.logits.shape), encoding.lengths.tolist()
    ((2, 51, 29), [51, 26])
    >>> model.frame_period
    0.02
    """

    def __init__(
        self, features, encoder, head, augment=None, augment_waveform=None
    ):
        super().__init__()
        self.features = features
        self.encoder = encoder
        self.head = head
        self.augment = augment
        self.augment_waveform = augment_waveform

    @property
    def frame_period(self):
        """Distance between two output frames (seconds)."""
        return self.features.frame_period * self.encoder.stride

    def forward(self, wavs, wav_lens):
        """Encode waveforms ``(batch, samples)`` with lengths ``(batch,)``."""
        if self.training and self.augment_waveform is not None:
            wavs = self.augment_waveform(wavs, wav_lens)
        features, lengths = self.features(wavs, wav_lens)
        if self.training and self.augment is not None:
            features = self.augment(features)
        hidden, lengths = self.encoder(features, lengths)
        return Encoding(hidden, self.head(hidden), lengths)


class OneByOneModel(AcousticModel):
    """An ``AcousticModel`` for networks whose layers read padding."""

    def forward(self, wavs, wav_lens):
        """Encode each utterance of a batch separately."""
        return pad_encodings(
            self.forward_together(*one) for one in split_batch(wavs, wav_lens)
        )

    def forward_together(self, wavs, wav_lens):
        """Encode a batch at once, whatever its padding does."""
        return super().forward(wavs, wav_lens)


def split_batch(wavs, wav_lens):
    """Yield each utterance without padding as a batch of one, with length."""
    samples = valid_counts(wavs, wav_lens).tolist()
    for wav, count in zip(wavs, samples, strict=True):
        yield wav[None, :count], torch.ones(1, device=wavs.device)


def pad_encodings(encodings):
    """Join encodings of single utterances to a batch padded with zeros."""
    hidden, logits, lengths = zip(*encodings, strict=True)
    return Encoding(pad_frames(hidden), pad_frames(logits), torch.cat(lengths))


def pad_frames(parts):
    """Join tensors ``(1, frames, dim)`` to a batch padded with zeros."""
    rows = [part[0] for part in parts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
