"""Streams: frame by frame what the model makes of the whole waveform."""

import pytest
import torch

from tutornet_sb.networks.acoustic_model import (
    AcousticModel,
    LogMelFeatures,
    SpectrogramFeatures,
)
from tutornet_sb.networks.deepspeech2 import DeepSpeech2Encoder
from tutornet_sb.networks.recurrent import RecurrentEncoder
from tutornet_sb.networks.streaming import Stream, can_stream

N_MELS = 8


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_model(features=None, **options):
    if features is None:
        features = LogMelFeatures(N_MELS, causal=True)
    options = {"layers": 2, "directions": 1, **options}
    encoder = RecurrentEncoder(features.output_size, 6, 7, **options)
    head = torch.nn.Linear(encoder.output_size, 5)
    model = AcousticModel(features, encoder, head)
    # As after training: on features of unlike means, with norms that matter.
    for _ in range(2):
        model.train()(0.3 * torch.randn(2, 8000), torch.tensor([1.0, 0.7]))
    with torch.no_grad():
        encoder.norm.bias.normal_()
        head.weight.mul_(4)
    return model.eval()


def noise(samples, batch=1):
    """Noise with an offset, some of it loud, some of it 100 dB below."""
    level = torch.logspace(0, -5, 10).repeat_interleave(samples // 10 + 1)
    level = level[:samples].roll(samples // 2)
    return 0.3 * torch.randn(batch, samples) * level + 0.05


def encode_whole(model, wavs):
    with torch.no_grad():
        return model(wavs, torch.ones(len(wavs))).logits.log_softmax(dim=-1)


def encode_pieces(stream, wavs, sizes):
    """Feed pieces of the given sizes, again and again; then finish."""
    parts, start, index = [], 0, 0
    while start < wavs.shape[1]:
        size = sizes[index % len(sizes)]
        parts.append(stream.accept(wavs[:, start : start + size]))
        start, index = start + size, index + 1
    return torch.cat([*parts, stream.finish()], dim=1)


def assert_same(streamed, whole):
    assert streamed.shape == whole.shape
    torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(
    "sizes",
    [[1], [7], [159], [160], [161], [320, 1, 640], [0, 999], [3000], [10**6]],
    ids=str,
)
def test_pieces_give_what_the_whole_gives(cell, sizes):
    model = make_model(cell=cell)
    samples = 2003 if sizes == [1] else 8003
    wavs = noise(samples, batch=2)
    whole = encode_whole(model, wavs)
    # Frames that differ from each other, or the test would prove nothing.
    assert (whole[:, 1:] - whole[:, :-1]).abs().amax(-1).median() > 1e-3
    assert_same(encode_pieces(Stream(model, 2), wavs, sizes), whole)


# Less than a window, and an end before, on and after a hop.
@pytest.mark.parametrize(
    "samples", [1, 2, 100, 159, 160, 161, 319, 320, 321, 1599, 1600, 1601]
)
def test_any_length_down_to_one_sample(samples):
    model = make_model()
    wavs = noise(samples)
    for sizes in ([50], [10**6]):
        assert_same(
            encode_pieces(Stream(model), wavs, sizes),
            encode_whole(model, wavs),
        )


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1, "stride": 1},
        {"kernel_size": 3, "stride": 3},
        {"kernel_size": 5, "stride": 4, "layers": 1},
    ],
    ids=str,
)
def test_any_convolution(options):
    model = make_model(**options)
    wavs = noise(5000)
    for sizes in ([123], [1700]):
        assert_same(
            encode_pieces(Stream(model), wavs, sizes),
            encode_whole(model, wavs),
        )


# Windows of several hops, with odd samples, shorter than a hop.
@pytest.mark.parametrize(
    "features",
    [
        LogMelFeatures(N_MELS, win_length=32, causal=True),
        LogMelFeatures(N_MELS, 11025, win_length=25, n_fft=400, causal=True),
        LogMelFeatures(
            N_MELS, win_length=5, hop_length=20, n_fft=128, causal=True
        ),
        SpectrogramFeatures(40, causal=True),
    ],
    ids=["32_ms", "11025_Hz", "5_of_20_ms", "spectrogram"],
)
def test_any_window(features):
    model = make_model(features)
    wavs = noise(6000)
    for sizes in ([77], [500, 3]):
        assert_same(
            encode_pieces(Stream(model), wavs, sizes),
            encode_whole(model, wavs),
        )


@pytest.mark.parametrize(
    ("window", "kernel_size", "stride"), [(20, 11, 2), (25, 5, 3), (5, 1, 1)]
)
def test_a_frame_comes_when_the_latency_is_over(window, kernel_size, stride):
    features = LogMelFeatures(N_MELS, win_length=window, causal=True)
    model = make_model(features, kernel_size=kernel_size, stride=stride)
    stream = Stream(model)
    hops = kernel_size // 2
    assert stream.latency == pytest.approx(window / 2000 + hops * 0.01)
    wavs = noise(2500)
    due = []
    for samples in range(1, 2501):
        frames = stream.accept(wavs[:, samples - 1 : samples]).shape[1]
        due += [samples] * frames
    assert len(due) > 3
    # The middle of a frame, and the latency.
    assert due == [
        frame * stride * 160 + round(stream.latency * 16000)
        for frame in range(len(due))
    ]


def count_bytes(stream):
    """Memory behind all that a stream keeps, whole storages."""
    kept = []
    for value in vars(stream).values():
        for item in value if isinstance(value, list) else [value]:
            for tensor in item if isinstance(item, tuple) else [item]:
                if isinstance(tensor, torch.Tensor):
                    kept.append(tensor.untyped_storage())
    return sum({s.data_ptr(): s.nbytes() for s in kept}.values())


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_memory_does_not_grow_with_the_waveform(cell):
    model = make_model(cell=cell)
    stream = Stream(model)
    sizes = []
    for _ in range(30):
        stream.accept(noise(3200))
        sizes.append(count_bytes(stream))
    assert len(set(sizes)) == 1
    # Less than 2 windows, 2 kernels, and the states.
    assert sizes[0] < 4 * (2 * 320 + 2 * 11 * N_MELS + 2 * 2 * 7 + 1)
    # Nor is a long piece kept.
    stream.accept(noise(320_000))
    assert count_bytes(stream) == sizes[0]


def test_streams_of_one_model_do_not_touch_each_other_or_it():
    model = make_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wavs = noise(4000, batch=2)
    streams = [Stream(model), Stream(model)]
    parts = [[], []]
    for start in range(0, 4000, 400):
        for index, stream in enumerate(streams):
            piece = wavs[index : index + 1, start : start + 400]
            parts[index].append(stream.accept(piece))
    for index, stream in enumerate(streams):
        parts[index].append(stream.finish())
    streamed = torch.cat([torch.cat(part, dim=1) for part in parts])
    assert_same(streamed, encode_whole(model, wavs))
    assert not streamed.requires_grad
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_an_empty_stream_has_the_frame_of_the_empty_waveform():
    model = make_model()
    whole = encode_whole(model, torch.zeros(1, 0))
    assert_same(Stream(model).finish(), whole)


def test_a_finished_stream_is_used_up():
    stream = Stream(make_model())
    stream.finish()
    with pytest.raises(RuntimeError, match="finished; make a new Stream"):
        stream.accept(noise(100))
    with pytest.raises(RuntimeError, match="finished; make a new Stream"):
        stream.finish()


@pytest.mark.parametrize("shape", [(100,), (1, 100), (2, 100, 1)])
def test_a_piece_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"\(2, samples\), got \("):
        Stream(make_model(), 2).accept(torch.zeros(shape))


class Waveform(torch.nn.Module):
    sample_rate, frame_period, output_size = 16000, 0.01, N_MELS


def test_a_model_that_cannot_stream_is_refused_with_the_reason():
    def assert_refused(pattern, **parts):
        model = make_model()
        for name, part in parts.items():
            setattr(model, name, part)
        with pytest.raises(ValueError, match=pattern):
            Stream(model.eval())
        assert not can_stream(model)

    assert_refused(
        "^features: LogMelFeatures cannot stream.*`causal: true`",
        features=LogMelFeatures(N_MELS),
    )
    assert_refused(
        "^features: Waveform cannot stream.*LogMelFeatures",
        features=Waveform(),
    )
    assert_refused(
        "^encoder: RecurrentEncoder cannot stream.*`directions: 1`",
        encoder=RecurrentEncoder(N_MELS, 6, 7, layers=1),
    )
    assert_refused(
        "^encoder: DeepSpeech2Encoder cannot stream.*RecurrentEncoder",
        encoder=DeepSpeech2Encoder(N_MELS, 2, 3, 1, 7, directions=1),
    )


def test_a_model_in_training_mode_is_refused():
    model = make_model()
    stream = Stream(model)
    model.encoder.norm.train()
    for refused in (
        lambda: Stream(model),
        lambda: stream.accept(noise(100)),
        stream.finish,
    ):
        with pytest.raises(ValueError, match=r"^model: .*model\.eval\(\)"):
            refused()
    assert can_stream(model)
    assert not any(module.training for module in model.modules())
    assert_same(stream.finish(), encode_whole(model, torch.zeros(1, 0)))
