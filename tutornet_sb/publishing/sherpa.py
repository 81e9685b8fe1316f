"""A model for sherpa-onnx, the runtime of phones, small boards and browsers.

sherpa-onnx computes its own features. Two of its model types take the waveform
instead:

- ``from_omnilingual_asr_ctc`` for whole utterances, which it normalises to mean
  0 and variance 1; our features do not depend on offset and level.
- ``from_t_one_ctc`` for a streaming student. It passes pieces of 2400 samples,
  rounded to 16 bits, and takes them to be at 8000 Hz whatever the model's rate.
  Its state is one vector in half precision: each number is kept as two of them.
  Where a piece completes one frame too few, the last one is repeated, which CTC
  ignores.
"""

import copy

import numpy as np
import torch

from tutornet_sb.corpora.tokenizer import tidy
from tutornet_sb.networks.acoustic_model import difference
from tutornet_sb.networks.streaming import check_streamable
from tutornet_sb.publishing.onnx import OnnxGraph, replace_stft, write_graph
from tutornet_sb.util.errors import InputError

OFFLINE = "from_omnilingual_asr_ctc"
ONLINE = "from_t_one_ctc"
# What the recognisers take the audio for (Hz), and samples of a piece
OFFLINE_RATE = 16000
ONLINE_RATE = 8000
PIECE = 2400
# The recogniser keeps one piece back and leaves out the rest of one.
TAIL = 3
# Of the half that half precision leaves over
_REST = 2048.0
_FULL_SCALE = 32768.0
BLANK = "<blk>"


class OfflineGraph(torch.nn.Module):
    """From utterances as sherpa-onnx scales them to log-probabilities.

    Of a copy of an ``AcousticModel``: ``(batch, samples)`` to ``(batch, frames,
    symbols)``.
    """

    def __init__(self, model):
        super().__init__()
        self.graph = OnnxGraph(model)

    def forward(self, x):
        """Compute log-probabilities."""
        whole = torch.zeros_like(x[:, 0]).long() + x.shape[1]
        return self.graph(x, whole)[0]


class OnlineGraph(torch.nn.Module):
    """One piece of many streams, from samples to log-probabilities.

    It computes what ``networks.streaming.Stream`` does: the samples under the
    next window, the level, the frames under the next convolution and the
    recurrent states are the state, which begins as zeros. Raises ``InputError``
    if a model cannot stream, or not in pieces of 2400 samples.
    """

    def __init__(self, model):
        check_streamable(model)
        super().__init__()
        model = copy.deepcopy(model)
        self.stft = replace_stft(model.features, pad=False)
        self.model = model
        encoder = model.encoder
        hop = self.stft.hop_length
        if PIECE % hop or self.stft.after > hop:
            raise InputError(
                f"frames of {hop} samples, with windows that reach "
                f"{self.stft.after} samples past their middle, do not fit "
                f"sherpa's pieces of {PIECE} samples"
            )
        self.frames = PIECE // hop
        self.kernel = encoder.conv.kernel_size[0]
        # Frames that one piece can complete, at the most
        self.steps = -(-self.frames // encoder.stride)
        recurrent = [layer.rnn for layer in encoder.layers.forward_layers]
        is_lstm = isinstance(recurrent[0], torch.nn.LSTM)
        # Whether there was a piece before; its last sample; differences of
        # samples, logarithms of the sums of the level and frames before the
        # piece; where the next window of the convolution begins; the last
        # log-probabilities; recurrent states.
        self.sizes = [
            1,
            1,
            self.stft.before,
            2,
            (self.kernel - 1) * model.features.output_size,
            1,
            model.head.out_features,
        ]
        self.sizes += [rnn.hidden_size for rnn in recurrent] * (1 + is_lstm)
        self.is_lstm = is_lstm

    @property
    def state_size(self):
        """Half-precision numbers of a state."""
        return 2 * sum(self.sizes)

    def forward(self, samples, state):
        """Log-probabilities of a piece, and the state for the next.

        From 16-bit integers ``(batch, 2400, 1)`` and a state ``(batch,
        state_size)`` in half precision, zeros at the beginning, to ``(batch,
        steps, symbols)``: the frames that are final, the last one repeated.
        """
        features, encoder = self.model.features, self.model.encoder
        begun, sample, before, sums, known, start, last, *recurrent = (
            self._unpack(state)
        )
        is_new = begun < 0.5
        # sherpa-onnx multiplies by 32767 and cuts off: one less than was.
        samples = samples.squeeze(2)
        samples = (samples + samples.sign()).float() / _FULL_SCALE
        sample = torch.where(is_new, samples[:, :1], sample)
        steps = torch.cat([before, difference(samples, sample)], dim=1)
        sample = samples[:, PIECE - 1 :]
        before = steps[:, steps.shape[1] - self.stft.before :]
        frames = features.spectrum(steps)
        # One below the other, as features keep them, and back
        sums = sums.exp().masked_fill(is_new, 0.0).t().reshape(-1, 1)
        level, sums = features.causal_level(frames, sums)
        sums = sums.reshape(2, -1).t().log()
        known = known.unflatten(1, (self.kernel - 1, features.output_size))
        known = torch.cat(
            [known, features.apply_statistics(frames, level)], dim=1
        )

        # The convolution everywhere; wanted is every stride-th from `start`.
        x = torch.nn.functional.conv1d(
            known.transpose(1, 2), encoder.conv.weight, encoder.conv.bias
        )
        x = torch.relu(encoder.norm(x)).transpose(1, 2)
        start = start.round().long()
        # `start` counts from the middle of the first window, in zeros.
        first = start + self.kernel // 2
        places = first + encoder.stride * torch.arange(self.steps)
        final = places < x.shape[1]
        index = places.clamp(max=x.shape[1] - 1).unsqueeze(-1)
        x = x.gather(1, index.expand(-1, -1, x.shape[2]))
        start = start + encoder.stride * final.sum(1, keepdim=True)
        start = (start - self.frames).float()

        outputs = []
        for step in range(self.steps):
            is_final = final[:, step : step + 1]
            y, states = self._step(x[:, step : step + 1], recurrent)
            recurrent = [
                torch.where(is_final, new, old)
                for new, old in zip(states, recurrent, strict=True)
            ]
            y = self.model.head(y).log_softmax(dim=-1).squeeze(1)
            last = torch.where(is_final, y, last)
            outputs.append(last)
        known = known[:, self.frames :].flatten(1)
        begun = torch.ones_like(begun)
        packed = self._pack(
            [begun, sample, before, sums, known, start, last, *recurrent]
        )
        return torch.stack(outputs, dim=1), packed

    def _step(self, x, states):
        """One frame through the recurrent layers."""
        new, count = [], len(self.model.encoder.layers.forward_layers)
        cells = []
        for index, layer in enumerate(self.model.encoder.layers.forward_layers):
            hx = states[index].unsqueeze(0)
            if self.is_lstm:
                hx = (hx, states[count + index].unsqueeze(0))
            x, hx = layer(x, hx=hx)
            if self.is_lstm:
                hx, cell = hx
                cells.append(cell.squeeze(0))
            new.append(hx.squeeze(0))
        return x, new + cells

    def _pack(self, parts):
        whole = torch.cat(parts, dim=1)
        half = whole.half()
        rest = ((whole - half.float()) * _REST).half()
        return torch.cat([half, rest], dim=1)

    def _unpack(self, state):
        half, rest = state.float().chunk(2, dim=1)
        return (half + rest / _REST).split(self.sizes, dim=1)


def write_sherpa(model, path):
    """Write an ``AcousticModel`` on the CPU as a graph for sherpa-onnx.

    Returns the constructor of the recogniser that loads it:
    ``OnlineRecognizer.from_t_one_ctc`` for a streaming student, else
    ``OfflineRecognizer.from_omnilingual_asr_ctc``.
    """
    rate = model.features.sample_rate
    try:
        graph = OnlineGraph(model)
    except InputError:
        return _write_offline(model, path)
    state = torch.zeros(1, graph.state_size, dtype=torch.half)
    samples = torch.zeros(1, PIECE, 1, dtype=torch.int32)
    axes = {
        name: {0: "batch"}
        for name in ("samples", "state", "log_probs", "next_state")
    }
    write_graph(
        graph.eval(),
        (samples, state),
        path,
        (["samples", "state"], ["log_probs", "next_state"]),
        axes,
        {
            "frame_length_ms": str(1000 * PIECE // ONLINE_RATE),
            "state_dim": str(graph.state_size),
            "sample_rate": str(rate),
        },
    )
    return f"OnlineRecognizer.{ONLINE}"


def _write_offline(model, path):
    rate = model.features.sample_rate
    if rate != OFFLINE_RATE:
        raise InputError(
            f"the sample rate must be {OFFLINE_RATE} Hz for sherpa-onnx to "
            f"decode whole utterances, got {rate} Hz"
        )
    write_graph(
        OfflineGraph(model),
        (0.1 * torch.randn(1, rate),),
        path,
        (["x"], ["log_probs"]),
        {"x": {0: "batch", 1: "samples"}, "log_probs": {0: "batch", 1: "time"}},
        {},
    )
    return f"OfflineRecognizer.{OFFLINE}"


def write_tokens(path, symbols, blank_index):
    """Write the symbols, a list by index, as sherpa-onnx reads them."""
    names = [
        BLANK if index == blank_index else symbol
        for index, symbol in enumerate(symbols)
    ]
    lines = (f"{name} {index}\n" for index, name in enumerate(names))
    path.write_text("".join(lines), encoding="utf-8")


def load_sherpa(constructor, model, tokens):
    """Load the written files by sherpa-onnx itself.

    ``constructor`` is what :func:`write_sherpa` returned. Returns a function
    from the samples of an utterance, ``(samples,)``, to its transcript.
    """
    import sherpa_onnx

    cls, _, method = constructor.partition(".")
    recogniser = getattr(getattr(sherpa_onnx, cls), method)(
        model=str(model), tokens=str(tokens), num_threads=1
    )

    def offline(wav):
        stream = recogniser.create_stream()
        stream.accept_waveform(OFFLINE_RATE, wav)
        recogniser.decode_stream(stream)
        return tidy(stream.result.text)

    def online(wav):
        stream = recogniser.create_stream()
        # Silence until the last piece of the speech is through.
        silence = np.zeros(TAIL * PIECE, dtype=np.float32)
        stream.accept_waveform(ONLINE_RATE, np.concatenate([wav, silence]))
        stream.input_finished()
        while recogniser.is_ready(stream):
            recogniser.decode_stream(stream)
        return tidy(recogniser.get_result(stream))

    return online if method == ONLINE else offline
