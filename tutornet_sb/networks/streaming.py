"""A model that outputs frames while the waveform still arrives."""

import torch

from tutornet_sb.networks.acoustic_model import difference
from tutornet_sb.networks.recurrent import RecurrentEncoder
from tutornet_sb.util.errors import InputError


def check_streamable(model):
    """Raise an InputError that names the part that cannot stream."""
    features, encoder = model.features, model.encoder
    if not getattr(features, "is_causal", False):
        raise InputError(
            f"features: {type(features).__name__} cannot stream; use "
            "LogMelFeatures or SpectrogramFeatures with `causal: true`, whose "
            "level is not that of the whole utterance"
        )
    if not isinstance(encoder, RecurrentEncoder) or (
        encoder.layers.directions != 1
    ):
        raise InputError(
            f"encoder: {type(encoder).__name__} cannot stream; use "
            "RecurrentEncoder with `directions: 1`, which does not read from "
            "the end of the utterance"
        )
    if any(module.training for module in model.modules()):
        raise InputError("model: in training mode; call model.eval() first")


def can_stream(model):
    """Whether a model can stream. It is put into evaluation mode."""
    try:
        check_streamable(model.eval())
    except InputError:
        return False
    return True


class Stream:
    """Encode a waveform piece by piece, as the model would encode the whole.

    Pieces may have any length, down to one sample. Memory does not grow.

    The model, not copied, is in evaluation mode, with causal features, a
    unidirectional ``RecurrentEncoder`` and a head that acts on single frames;
    otherwise an InputError is raised. ``batch_size`` waveforms of equal length
    arrive at the same time. A frame is output once the waveform is known
    ``latency`` seconds beyond the centre of the frame.

    Example
    -------
    >>> from tutornet_sb.networks import acoustic_model
    >>> features = acoustic_model.LogMelFeatures(causal=True)
    >>> encoder = RecurrentEncoder(64, 8, 16, layers=1, directions=1)
    >>> head = torch.nn.Linear(16, 29)
    >>> model = acoustic_model.AcousticModel(features, encoder, head)
    >>> stream = Stream(model.eval())
    >>> stream.latency
    0.06
    >>> tuple(stream.accept(torch.randn(1, 8000)).shape)
    (1, 23, 29)
    >>> tuple(stream.finish().shape)
    (1, 3, 29)
    """

    def __init__(self, model, batch_size=1):
        check_streamable(model)
        self.model = model
        features, conv = model.features, model.encoder.conv
        stft, hop = features.stft, features.hop_samples
        # torch.stft centres the window in the transform. Samples under it
        # before and from the centre of a frame:
        before = stft.n_fft // 2 - (stft.n_fft - stft.win_length) // 2
        self._after = stft.win_length - before
        # In whole hops, so that frames of a piece and of the waveform coincide
        self._history = -(-before // hop)
        reach = conv.kernel_size[0] // 2
        # Before the beginning, window and convolution read zeros.
        zeros = conv.weight.new_zeros
        self._last = None
        # First differences
        self._samples = zeros(batch_size, self._history * hop)
        self._sums = None
        self._frames = zeros(batch_size, reach, features.output_size)
        self._states = [None] * len(model.encoder.layers.forward_layers)
        self._is_finished = False
        self.latency = (self._after + reach * hop) / features.sample_rate

    @torch.no_grad()
    def accept(self, samples):
        """Encode the next piece of the waveform, ``(batch, samples)``.

        Returns log-probabilities ``(batch, frames, symbols)`` of the frames
        that have become final, often of none.
        """
        self._require_open()
        if samples.ndim != 2 or len(samples) != len(self._samples):
            raise InputError(
                f"a piece must have the shape ({len(self._samples)}, samples), "
                f"got {tuple(samples.shape)}"
            )
        if samples.shape[1]:
            samples = samples.to(self._samples)
            steps = difference(samples, self._last)
            self._last = samples[:, -1:].clone()
            self._samples = torch.cat([self._samples, steps], dim=1)
        return self._encode(self._compute_features(self._after))

    @torch.no_grad()
    def finish(self):
        """End the stream and return its remaining frames, as ``accept``."""
        self._require_open()
        self._is_finished = True
        # After the end, window and convolution read zeros.
        features = self._compute_features(0)
        reach = self.model.encoder.conv.kernel_size[0] // 2
        return self._encode(torch.nn.functional.pad(features, (0, 0, 0, reach)))

    def _require_open(self):
        if self._is_finished:
            raise RuntimeError("the stream is finished; make a new Stream")
        check_streamable(self.model)

    def _compute_features(self, after):
        """Frames of which `after` samples from their centre on are known."""
        features = self.model.features
        hop, first = features.hop_samples, self._history
        known = self._samples.shape[1] - first * hop
        count = max(0, (known - after) // hop + 1)
        if not count:
            return self._frames[:, :0]
        x = features.spectrum(self._samples)[:, first : first + count]
        level, self._sums = features.causal_level(x, self._sums)
        # A copy, or a view would keep the whole piece in memory.
        self._samples = self._samples[:, count * hop :].clone()
        return features.apply_statistics(x, level)

    def _encode(self, features):
        encoder, head = self.model.encoder, self.model.head
        conv = encoder.conv
        x = torch.cat([self._frames, features], dim=1)
        count = (x.shape[1] - conv.kernel_size[0]) // encoder.stride + 1
        if count < 1:
            self._frames = x
            return head(x.new_zeros(len(x), 0, encoder.output_size))
        self._frames = x[:, count * encoder.stride :].clone()
        # What precedes the piece is in it: no padding.
        x = torch.nn.functional.conv1d(
            x.transpose(1, 2), conv.weight, conv.bias, conv.stride
        )
        x = torch.relu(encoder.norm(x)).transpose(1, 2)
        for index, layer in enumerate(encoder.layers.forward_layers):
            x, self._states[index] = layer(x, hx=self._states[index])
        return head(x).log_softmax(dim=-1)
