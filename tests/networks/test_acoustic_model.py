"""Features, and the model as one module."""

import math
from pathlib import Path

import numpy
import pytest
import torch

from tutornet_sb.networks.acoustic_model import (
    AcousticModel,
    LogMelFeatures,
    SpectrogramFeatures,
    frame_mask,
)
from tutornet_sb.networks.recurrent import RecurrentEncoder

MODELS = (
    Path(__file__).parents[2] / "recipes/LibriSpeech/TutorNet/hparams/models"
)
LENGTHS = torch.tensor([16000, 12345, 8000, 4160, 159])


@pytest.fixture(autouse=True)
def one_thread():
    """Run small networks on one thread: more wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def waves():
    """Waveforms of very different lengths and their relative lengths."""
    wavs = torch.randn(len(LENGTHS), int(LENGTHS.max()))
    wavs[torch.arange(wavs.shape[1]) >= LENGTHS[:, None]] = 0
    return wavs, LENGTHS / LENGTHS.max()


def normalised(frames, neper, level=None):
    """Frames less a level, clipped 20 dB below it; in double precision."""
    frames = frames.double()
    means = frames.mean(-1)
    if level is None:
        level = ((means / neper).softmax(0) * means).sum()
    return (frames - level).clamp(min=-2 * math.log(10) * neper)


@pytest.mark.parametrize(
    ("make", "neper"),
    [(LogMelFeatures, 10 / math.log(10)), (SpectrogramFeatures, 1.0)],
)
def test_features_are_normalised_by_all_valid_training_frames(make, neper):
    features = make(16)
    means, variances = [], []
    for level in (1.0, 0.1, 0.3):
        wavs, wav_lens = waves()
        # Silence, of which little is to be seen in the level
        wavs[:, :3000] *= 1e-3
        wavs = wavs * level
        steps = torch.diff(wavs, prepend=wavs[:, :1])
        steps[torch.arange(wavs.shape[1]) >= LENGTHS[:, None]] = 0
        # The padding is loud: it must not count.
        wavs[wavs == 0] = 100.0
        x, lengths = features.train()(wavs, wav_lens)
        assert lengths.tolist() == [101, 78, 51, 27, 1]
        valid = torch.cat(
            [
                normalised(f[:n], neper)
                for f, n in zip(features.spectrum(steps), lengths, strict=True)
            ]
        )
        means.append(valid.mean(0))
        variances.append(valid.var(0))
        # Training uses the averages up to now.
        mean, var = sum(means) / len(means), sum(variances) / len(means)
        expected = (valid - mean) / (var + 1e-5).sqrt()
        found = [f[:n] for f, n in zip(x, lengths, strict=True)]
        torch.testing.assert_close(
            torch.cat(found).double(), expected, rtol=1e-3, atol=1e-3
        )
        for utterance, length in zip(x, lengths, strict=True):
            assert not utterance[length:].any()
    # Evaluation uses them too, and leaves them alone.
    again, _ = features.eval()(wavs, wav_lens)
    torch.testing.assert_close(again, x)
    other = make(16).eval()
    assert not torch.allclose(other(wavs, wav_lens)[0], x)
    other.load_state_dict(features.state_dict())
    torch.testing.assert_close(other(wavs, wav_lens)[0], x, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "neper"),
    [(LogMelFeatures, 10 / math.log(10)), (SpectrogramFeatures, 1.0)],
)
def test_a_causal_level_is_that_of_the_frames_so_far(make, neper):
    features = make(16, causal=True).eval()
    wav = torch.randn(1, 16000) * torch.logspace(-3, 0, 16000).flip(0)
    x, _ = features(wav, torch.ones(1))
    frames = features.spectrum(torch.diff(wav, prepend=wav[:, :1]))[0].double()
    energies = (frames.mean(-1) / neper).exp()
    for place in (0, 1, 40, 100):
        # Weights are halved every 2 s, 200 frames.
        ages = torch.arange(place, -1, -1) / 200
        weights = energies[: place + 1] * 0.5**ages
        means = frames[: place + 1].mean(-1)
        level = (weights * means).sum() / weights.sum()
        expected = normalised(frames[place], neper, level)
        torch.testing.assert_close(
            x[0, place].double() * math.sqrt(1 + 1e-5),
            expected,
            rtol=1e-3,
            atol=1e-3,
        )


@pytest.mark.parametrize("make", [LogMelFeatures, SpectrogramFeatures])
def test_causal_features_know_nothing_of_the_rest_of_the_utterance(make):
    quiet = 1e-5 * torch.randn(1, 8000)
    loud = torch.cat([quiet, torch.randn(1, 8000)], dim=1)
    one = torch.ones(1)
    features = make(16, causal=True).eval()
    # Frames whose windows end before the loud part.
    alone, within = features(quiet, one)[0], features(loud, one)[0]
    torch.testing.assert_close(alone[:, :49], within[:, :49])


def test_silence_is_finite():
    for features in (LogMelFeatures(), LogMelFeatures(causal=True)):
        x, _ = features.eval()(torch.zeros(2, 8000), torch.tensor([1.0, 0.0]))
        torch.testing.assert_close(x, torch.zeros_like(x), rtol=0, atol=1e-3)


def test_a_causal_level_lasts_for_hours():
    features = LogMelFeatures(causal=True)
    # 1 h of frames: speech, and a pause of 9 minutes that is 60 dB below
    frames = 5 * torch.randn(1, 360_000, 64) - 20
    frames[:, 300_000:] -= 60
    level, _ = features.causal_level(frames)
    assert level[0, 10_000:300_000].sub(-20).abs().max() < 1
    assert level[0, 300_000 + 1000] > -21
    assert level[0, -1] == pytest.approx(-80, abs=1)


def test_the_spectrogram_is_the_logarithm_of_the_power():
    wavs = torch.randn(2, 1000)
    wavs[1] *= 1e-6
    found = SpectrogramFeatures(160).spectrum(wavs)
    padded = numpy.pad(wavs.double().numpy(), ((0, 0), (160, 160)))
    window = 0.5 - 0.5 * numpy.cos(2 * numpy.pi * numpy.arange(320) / 320)
    assert found.shape == (2, 7, 160)
    for frame in range(7):
        piece = padded[:, 160 * frame : 160 * frame + 320] * window
        power = numpy.abs(numpy.fft.rfft(piece)[:, :160]) ** 2
        expected = torch.from_numpy(numpy.log(numpy.maximum(power, 1e-20)))
        torch.testing.assert_close(
            found[:, frame].double(), expected, rtol=1e-3, atol=1e-2
        )


def test_wrong_options_of_features_are_named():
    with pytest.raises(ValueError, match="at most 161 .*20 ms.*got 162"):
        SpectrogramFeatures(162)


def test_feature_frames_follow_the_hop():
    features = LogMelFeatures(n_mels=40, hop_length=20, sample_rate=8000).eval()
    assert features.frame_period == 0.02
    assert features.sample_rate == 8000
    for samples in (159, 160, 161, 1600):
        x, lengths = features(torch.randn(1, samples), torch.ones(1))
        assert x.shape == (1, samples // 160 + 1, 40)
        assert lengths.tolist() == [samples // 160 + 1]


def test_frame_mask():
    mask = frame_mask(torch.tensor([2, 0, 3]), 3)
    assert mask.tolist() == [[True, True, False], [False] * 3, [True] * 3]


def test_augment_acts_on_features_in_training_only():
    calls = []

    def augment(features):
        calls.append(features.shape)
        return torch.zeros_like(features)

    encoder = RecurrentEncoder(64, 6, 5, layers=1)
    head = torch.nn.Linear(10, 29)
    model = AcousticModel(LogMelFeatures(), encoder, head, augment)
    wavs, wav_lens = torch.randn(2, 1600), torch.tensor([1.0, 0.5])
    model.eval()(wavs, wav_lens)
    assert not calls
    model.train()(wavs, wav_lens)
    assert calls == [(2, 11, 64)]


def test_augment_waveform_acts_in_training_only():
    encoder = RecurrentEncoder(64, 6, 5, layers=1)
    model = AcousticModel(LogMelFeatures(), encoder, torch.nn.Linear(10, 29))
    wavs, wav_lens = torch.randn(2, 1600), torch.tensor([1.0, 0.5])
    expected = model.eval()(wavs, wav_lens).logits
    model.augment_waveform = lambda wavs, wav_lens: wavs.flip(0)
    assert torch.equal(model(wavs, wav_lens).logits, expected)
    model.features.eval(), model.encoder.eval()
    model.training = True
    flipped = model(wavs.flip(0), wav_lens).logits
    torch.testing.assert_close(flipped, expected)
