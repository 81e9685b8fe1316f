"""A model is one module from waveform to frames."""

import math
from typing import NamedTuple

import torch
from speechbrain.lobes.features import Fbank
from speechbrain.processing.features import (
    STFT,
    InputNormalization,
)
from speechbrain.utils.autocast import fwd_default_precision

NORMALIZE = ("sentence", "running")


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


def _power(stft):
    """Power of a transform, ``(batch, frames, bins, 2)``.

    The same sum as ``spectral_magnitude`` makes along an axis of two, which
    takes five times as long.
    """
    return stft[..., 0].square() + stft[..., 1].square()


class SpectralFeatures(torch.nn.Module):
    """Frames of a spectrum, normalised: the base of the features below.

    A subclass computes its spectrum in ``spectrum``. With
    ``normalize: sentence`` a frame depends on the whole utterance. With
    ``running`` it does not: mean and variance are those of the training data,
    averaged over all batches seen in training (as buffers, so that they are
    saved with the weights). Training uses the same averages, not those of its
    batch, so that it sees what a stream will see. The average has no decay:
    the longer the training, the less the features still move.

    Arguments
    ---------
    stft : speechbrain.processing.features.STFT
        The Fourier transform, centred.
    output_size : int
        Dimension of a frame.
    normalize : str
        ``"sentence"`` or ``"running"``.

    Raises
    ------
    ValueError
        If ``normalize`` is neither.
    """

    def __init__(self, stft, output_size, normalize):
        super().__init__()
        if normalize not in NORMALIZE:
            raise ValueError(
                f"normalize must be in {NORMALIZE}, got {normalize!r}"
            )
        self.is_running = normalize == "running"
        self.sample_rate = stft.sample_rate
        self.hop_samples = stft.hop_length
        self.frame_period = self.hop_samples / self.sample_rate
        self.output_size = output_size
        if self.is_running:
            self.normalize = torch.nn.BatchNorm1d(
                output_size, affine=False, momentum=None
            )
        else:
            self.normalize = InputNormalization(norm_type="sentence")

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

    def apply_statistics(self, features):
        """Normalise by the statistics of the training data.

        Arguments
        ---------
        features : torch.Tensor
            ``(batch, frames, output_size)``.

        Returns
        -------
        torch.Tensor
            The same, normalised.
        """
        norm = self.normalize
        return torch.nn.functional.batch_norm(
            features.transpose(1, 2),
            norm.running_mean,
            norm.running_var,
            eps=norm.eps,
        ).transpose(1, 2)

    def forward(self, wavs, wav_lens, spectrum=None):
        """Compute features.

        Arguments
        ---------
        wavs : torch.Tensor
            Waveforms, ``(batch, samples)``.
        wav_lens : torch.Tensor
            Valid part of each waveform relative to the longest, ``(batch,)``.
        spectrum : torch.Tensor, optional
            From ``spectrum(wavs)``, where that has been computed already.

        Returns
        -------
        features : torch.Tensor
            ``(batch, frames, output_size)``, zero on padded frames.
        lengths : torch.Tensor
            Valid frames, integers of shape ``(batch,)``.
        """
        features = self.spectrum(wavs) if spectrum is None else spectrum
        samples = (wav_lens * wavs.shape[1]).round().long()
        # The transform is centred: a frame stands at every multiple of the hop.
        lengths = samples // self.hop_samples + 1
        frames = features.shape[1]
        mask = frame_mask(lengths, frames)
        if self.is_running:
            if self.training:
                # For its statistics alone.
                self.normalize(features[mask].detach())
            features = self.apply_statistics(features)
        else:
            # Half a frame below the true length: SpeechBrain multiplies it by
            # the frames again, and rounding there must not let a padded frame
            # in.
            features = self.normalize(features, (lengths - 0.5) / frames)
        return features.masked_fill(~mask.unsqueeze(-1), 0.0), lengths


class LogMelFeatures(SpectralFeatures):
    """Log-mel energies (dB).

    Normalised over each utterance, energies are clipped at 80 dB below the
    utterance's loudest, as SpeechBrain does. With ``normalize: running`` that
    would again depend on the whole utterance, and only the fixed floor of
    -100 dB remains. (On recorded digits the clip concerns one value in a
    hundred, in nine of ten utterances.)

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
    normalize : str
        ``"sentence"``: over each utterance; ``"running"``: by the statistics
        of the training data, for streaming (see ``SpectralFeatures``).

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
        normalize="sentence",
    ):
        fbank = Fbank(
            sample_rate=sample_rate,
            n_fft=n_fft,
            n_mels=n_mels,
            win_length=win_length,
            hop_length=hop_length,
        )
        super().__init__(fbank.compute_STFT, n_mels, normalize)
        self.fbank = fbank
        if self.is_running:
            # Fbank's constructor does not hand this on.
            fbank.compute_fbanks.top_db = math.inf

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
    as long as the window, the lowest bins. Unlike there, each bin is
    normalised by its own mean and deviation, as log-mel features are.

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
    normalize : str
        ``"sentence"`` or ``"running"``, as in ``LogMelFeatures``.

    Raises
    ------
    ValueError
        If the transform has fewer bins, or ``normalize`` is unknown.

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
        normalize="sentence",
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
        super().__init__(stft, n_bins, normalize)
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
        # The floor is that of Fbank.
        return torch.log(_power(stft) + 1e-10)


@torch.no_grad()
def same_spectrum(first, second, device="cpu"):
    """Tell whether two kinds of features are the same before normalisation.

    They are tried out on noise that fades by 120 dB, so that floors and clips
    show.

    Arguments
    ---------
    first, second : torch.nn.Module
        Features of two models, of any kind.
    device : str or torch.device
        Where they are.

    Returns
    -------
    bool
        Whether ``spectrum`` gives the same bits.

    Example
    -------
    >>> features = LogMelFeatures(normalize="running")
    >>> same_spectrum(features, LogMelFeatures(normalize="running"))
    True
    >>> same_spectrum(features, LogMelFeatures(normalize="sentence"))
    False
    """
    both = first, second
    if not all(isinstance(f, SpectralFeatures) for f in both):
        return False
    generator = torch.Generator().manual_seed(0)
    wavs = torch.randn(1, 16000, generator=generator)
    wavs = (wavs * torch.logspace(0, -6, 16000)).to(device)
    return torch.equal(*(f.spectrum(wavs) for f in both))


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

    def forward(self, wavs, wav_lens, *spectrum):
        """Encode a batch of waveforms.

        Arguments
        ---------
        wavs : torch.Tensor
            Waveforms, ``(batch, samples)``.
        wav_lens : torch.Tensor
            Valid part of each waveform relative to the longest, ``(batch,)``.
        *spectrum : torch.Tensor
            None, or for ``SpectralFeatures`` their spectrum, where that has
            been computed already.

        Returns
        -------
        Encoding
            Hidden states, logits and valid lengths.
        """
        features, lengths = self.features(wavs, wav_lens, *spectrum)
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
