"""A model is one module from waveform to frames."""

import math
from typing import NamedTuple

import torch
from speechbrain.lobes.features import Fbank
from speechbrain.processing.features import STFT
from speechbrain.utils.autocast import fwd_default_precision

# Values this far below the level of the recording are clipped (dB).
RANGE = 20.0
# Of the weight of a frame in a causal level (seconds)
HALF_LIFE = 2.0
# Least power of a spectrum, of digital silence, and something below its
# logarithm
FLOOR = 1e-20
LOWEST = -47.0


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


def difference(wavs, before=None):
    """First differences of waveforms, from which an offset is gone.

    Arguments
    ---------
    wavs : torch.Tensor
        ``(batch, samples)``.
    before : torch.Tensor, optional
        The sample before the first, ``(batch, 1)``; by default one like the
        first.

    Returns
    -------
    torch.Tensor
        ``(batch, samples)``.

    Example
    -------
    >>> difference(torch.tensor([[5.0, 6.0, 4.0]])).tolist()
    [[0.0, 1.0, -2.0]]
    """
    before = wavs[:, :1] if before is None else before
    return wavs - torch.cat([before, wavs[:, :-1]], dim=1)


def _power(stft):
    """Power of a transform, ``(batch, frames, bins, 2)``.

    The same sum as ``spectral_magnitude`` makes along an axis of two, which
    takes five times as long.
    """
    return stft[..., 0].square() + stft[..., 1].square()


class SpectralFeatures(torch.nn.Module):
    """Frames of a log spectrum, free of offset and recording level.

    First differences of the waveform take off any constant offset. From the
    log spectrum the level of the recording is subtracted, in which loud frames
    count most::

        level = sum_t softmax_t(m_t) m_t

    with ``m_t`` the mean of frame ``t`` over its bins (nepers of power). So a
    gain changes nothing, and silence before or after the speech next to
    nothing. Values below ``-RANGE`` relative to the level are clipped. Mean
    and variance are then those of the training data, averaged over all batches
    seen in training (as buffers, so that they are saved with the weights), not
    those of the utterance, which depend on its words where it is short.
    Training uses the same averages, not those of its batch. The average has no
    decay: the longer the training, the less the features still move.

    A causal level is that of the frames so far, their weights halved every
    ``HALF_LIFE`` seconds. It is the same whether a waveform comes whole or in
    pieces.

    A subclass computes its spectrum in ``spectrum``.

    Arguments
    ---------
    stft : speechbrain.processing.features.STFT
        The Fourier transform, centred.
    output_size : int
        Dimension of a frame.
    causal : bool
        Whether the level is that of the frames so far, for streaming, instead
        of the whole utterance.
    neper : float
        How much the spectrum rises when the power rises by the factor e.
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

    def spectrum(self, wavs):
        """Compute the frames before normalisation.

        Arguments
        ---------
        wavs : torch.Tensor
            Waveforms, ``(batch, samples)``.

        Returns
        -------
        torch.Tensor
            ``(batch, frames, output_size)``.
        """
        raise NotImplementedError

    def level(self, frames, mask):
        """Estimate the level of whole utterances.

        Arguments
        ---------
        frames : torch.Tensor
            From ``spectrum``, ``(batch, frames, output_size)``.
        mask : torch.Tensor
            True where a frame is valid, ``(batch, frames)``.

        Returns
        -------
        torch.Tensor
            In the units of the spectrum, ``(batch, 1)``.
        """
        means = frames.mean(-1)
        weights = (means / self.neper).masked_fill(~mask, -math.inf).softmax(1)
        return (weights * means).sum(1, keepdim=True)

    @fwd_default_precision(cast_inputs=torch.float32)
    def causal_level(self, frames, sums=None):
        """Estimate the level at every frame from the frames up to it.

        Arguments
        ---------
        frames : torch.Tensor
            From ``spectrum``, ``(batch, frames, output_size)``.
        sums : torch.Tensor, optional
            What the last call returned for the frames before these.

        Returns
        -------
        level : torch.Tensor
            In the units of the spectrum, ``(batch, frames)``.
        sums : torch.Tensor
            Decaying sums of the weights and of weighted means,
            ``(2 * batch, 1)``.
        """
        means = frames.mean(-1) / self.neper
        weights = means.exp()
        # Positive, so that the logarithms of the sums are a state too
        x = torch.cat([weights, weights * (means - LOWEST)])
        decay = 0.5 ** (self.frame_period / HALF_LIFE)
        if sums is not None:
            first = x[:, :1] + decay * sums
            x = torch.cat([first, x[:, 1:]], dim=1)
        # Sums of 2, 4, 8, ... frames, until nothing is left of a frame
        frames_ago = 1
        while decay**frames_ago > 1e-40:
            before = torch.nn.functional.pad(x, (frames_ago, 0))
            x = x + decay**frames_ago * before[:, : x.shape[1]]
            frames_ago *= 2
        weights, weighted = x.chunk(2)
        return (weighted / weights + LOWEST) * self.neper, x[:, -1:].clone()

    def apply_statistics(self, frames, level, mask=None):
        """Subtract the level, and normalise by the training data.

        Arguments
        ---------
        frames : torch.Tensor
            From ``spectrum``, ``(batch, frames, output_size)``.
        level : torch.Tensor
            ``(batch, frames)`` or ``(batch, 1)``.
        mask : torch.Tensor, optional
            In training: true where a frame is valid, ``(batch, frames)``.

        Returns
        -------
        torch.Tensor
            ``(batch, frames, output_size)``.
        """
        frames = frames - level.unsqueeze(-1)
        frames = frames.clamp(min=-RANGE * math.log(10) / 10 * self.neper)
        norm = self.normalize
        if self.training:
            # For its statistics alone.
            norm(frames[mask].detach())
        return torch.nn.functional.batch_norm(
            frames.transpose(1, 2),
            norm.running_mean,
            norm.running_var,
            eps=norm.eps,
        ).transpose(1, 2)

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
            ``(batch, frames, output_size)``, zero on padded frames.
        lengths : torch.Tensor
            Valid frames, integers of shape ``(batch,)``.
        """
        samples = (wav_lens * wavs.shape[1]).round().long()
        # The step from the last sample to the padding is none of the speech.
        inside = frame_mask(samples, wavs.shape[1])
        frames = self.spectrum(difference(wavs) * inside)
        # The transform is centred: a frame stands at every multiple of the hop.
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
    causal : bool
        Whether the level is that of the frames so far, for streaming.

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
        # Fbank's constructor does not hand these on.
        fbank.compute_fbanks.top_db = math.inf
        fbank.compute_fbanks.amin = FLOOR

    @property
    def stft(self):
        """The Fourier transform."""
        return self.fbank.compute_STFT

    @fwd_default_precision(cast_inputs=torch.float32)
    def spectrum(self, wavs):
        """Compute the frames before normalisation.

        Arguments
        ---------
        wavs : torch.Tensor
            Waveforms, ``(batch, samples)``.

        Returns
        -------
        torch.Tensor
            ``(batch, frames, n_mels)``.
        """
        return self.fbank.compute_fbanks(_power(self.stft(wavs)))


class SpectrogramFeatures(SpectralFeatures):
    """Log power spectrogram, the features of DeepSpeech2.

    As OpenSeq2Seq computes them (``get_speech_features`` in
    ``open_seq2seq/data/speech2text/speech_utils.py``): Hann window, a transform
    as long as the window, the lowest bins. Unlike there, they are
    normalised as log-mel features are, see ``SpectralFeatures``.

    Arguments
    ---------
    n_bins : int
        Frequency bins from 0 Hz up, the dimension of a frame.
    sample_rate : int
        Sample rate of the waveforms (Hz).
    win_length : float
        Window of one frame (milliseconds).
    hop_length : float
        Distance between frames (milliseconds).
    causal : bool
        Whether the level is that of the frames so far, for streaming.

    Raises
    ------
    ValueError
        If the transform has fewer bins.

    Example
    -------
    >>> features = SpectrogramFeatures()
    >>> x, lengths = features(torch.randn(2, 16000), torch.tensor([1.0, 0.5]))
    >>> tuple(x.shape), lengths.tolist()
    ((2, 101, 160), [101, 51])
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
        """Compute the frames before normalisation.

        Arguments
        ---------
        wavs : torch.Tensor
            Waveforms, ``(batch, samples)``.

        Returns
        -------
        torch.Tensor
            Natural logarithm of the power, ``(batch, frames, n_bins)``.
        """
        stft = self.stft(wavs)[:, :, : self.output_size]
        return torch.log(_power(stft).clamp(min=FLOOR))


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
        Applied as ``augment(features)`` to this model's features in training
        only, so that a teacher always receives the clean utterance. May be set
        after construction.
    augment_waveform : callable, optional
        Applied as ``augment_waveform(wavs, wav_lens)`` to the waveforms, in
        training only as well.

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
        if self.training and self.augment_waveform is not None:
            wavs = self.augment_waveform(wavs, wav_lens)
        features, lengths = self.features(wavs, wav_lens)
        if self.training and self.augment is not None:
            features = self.augment(features)
        hidden, lengths = self.encoder(features, lengths)
        return Encoding(hidden, self.head(hidden), lengths)


class OneByOneModel(AcousticModel):
    """An ``AcousticModel`` that encodes each utterance of a batch by itself.

    For networks whose layers read the padding of a batch: what comes out for an
    utterance does not depend on the others.

    Example
    -------
    >>> from tutornet_sb.networks.recurrent import RecurrentEncoder
    >>> encoder = RecurrentEncoder(64, channels=8, hidden_size=8, layers=1)
    >>> head = torch.nn.Linear(encoder.output_size, 29)
    >>> model = OneByOneModel(LogMelFeatures(), encoder, head)
    >>> encoding = model(torch.randn(2, 16000), torch.tensor([1.0, 0.5]))
    >>> tuple(encoding.logits.shape), encoding.lengths.tolist()
    ((2, 51, 29), [51, 26])
    """

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
        return pad_encodings(
            self.forward_together(*one) for one in split_batch(wavs, wav_lens)
        )

    def forward_together(self, wavs, wav_lens):
        """Encode a batch at once, whatever its padding does."""
        return super().forward(wavs, wav_lens)


def split_batch(wavs, wav_lens):
    """Give each utterance of a batch as a batch of one, without padding.

    Arguments
    ---------
    wavs : torch.Tensor
        Waveforms, ``(batch, samples)``.
    wav_lens : torch.Tensor
        Valid part of each waveform relative to the longest, ``(batch,)``.

    Yields
    ------
    tuple of torch.Tensor
        Waveform, ``(1, samples)``, and ``[1.0]``.
    """
    samples = (wav_lens * wavs.shape[1]).round().long().tolist()
    for wav, count in zip(wavs, samples, strict=True):
        yield wav[None, :count], torch.ones(1, device=wavs.device)


def pad_encodings(encodings):
    """Make a batch of the encodings of single utterances.

    Arguments
    ---------
    encodings : iterable of Encoding
        Each of a batch of one.

    Returns
    -------
    Encoding
        Padded with zeros.
    """
    hidden, logits, lengths = zip(*encodings, strict=True)
    return Encoding(pad_frames(hidden), pad_frames(logits), torch.cat(lengths))


def pad_frames(parts):
    """Make a batch of tensors of several lengths, ``(1, frames, dim)`` each.

    Arguments
    ---------
    parts : iterable of torch.Tensor
        Of single utterances.

    Returns
    -------
    torch.Tensor
        Padded with zeros, ``(batch, frames, dim)``.
    """
    return torch.nn.utils.rnn.pad_sequence(
        [part[0] for part in parts], batch_first=True
    )
