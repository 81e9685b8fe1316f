"""Features, the model as one module, and the networks of the recipe."""

from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references
from ruamel.yaml import YAML

from tutornet_sb.networks.acoustic_model import (
    AcousticModel,
    LogMelFeatures,
    frame_mask,
)
from tutornet_sb.networks.lstm import LSTMEncoder

MODELS = (
    Path(__file__).parents[2] / "recipes/LibriSpeech/TutorNet/hparams/models"
)
# Published sizes (full) and those of the mini corpus (small).
PARAMETERS = {
    "lstm": (29_792_285, 445_085),
    "jasper_dr": (332_632_349, 1_750_365),
    "jasper_mini": (8_192_733, 399_613),
    "quartznet5x5": (6_713_181, 824_925),
    "quartznet10x5": (12_818_781, 1_479_773),
    "quartznet15x5": (18_924_381, 2_134_621),
}
LENGTHS = torch.tensor([16000, 12345, 8000, 4160, 159])


@pytest.fixture(autouse=True)
def one_thread():
    """Run small networks on one thread: more wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(name, small=False, **overrides):
    """Load a network of the recipe, as its loader does."""
    path = MODELS / f"{name}.yaml"
    if small:
        overrides = {**YAML().load(path)["small"], **overrides}
    with path.open() as file:
        text = resolve_references(file, overrides, overrides_must_match=True)
    return load_hyperpyyaml(text)


def count(model):
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def waves():
    """Waveforms of very different lengths and their relative lengths."""
    wavs = torch.randn(len(LENGTHS), int(LENGTHS.max()))
    wavs[torch.arange(wavs.shape[1]) >= LENGTHS[:, None]] = 0
    return wavs, LENGTHS / LENGTHS.max()


def test_features_are_normalised_over_valid_frames():
    wavs, wav_lens = waves()
    # A level that padding must not move, and another for each utterance.
    features, lengths = LogMelFeatures()(
        wavs * 10 ** -wav_lens[:, None], wav_lens
    )
    assert features.shape == (5, 101, 64)
    assert lengths.tolist() == [101, 78, 51, 27, 1]
    for x, length in zip(features[:4], lengths[:4], strict=True):
        valid = x[:length]
        torch.testing.assert_close(
            valid.mean(0), torch.zeros(64), rtol=0, atol=1e-4
        )
        torch.testing.assert_close(
            valid.std(0), torch.ones(64), rtol=0, atol=0.05
        )
        assert not x[length:].any()


def test_feature_frames_follow_the_hop():
    features = LogMelFeatures(n_mels=40, hop_length=20, sample_rate=8000)
    assert features.frame_period == 0.02
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

    encoder = LSTMEncoder(64, 6, 5, layers=1)
    head = torch.nn.Linear(10, 29)
    model = AcousticModel(LogMelFeatures(), encoder, head, augment)
    wavs, wav_lens = torch.randn(2, 1600), torch.tensor([1.0, 0.5])
    model.eval()(wavs, wav_lens)
    assert not calls
    model.train()(wavs, wav_lens)
    assert calls == [(2, 11, 64)]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    full, small = PARAMETERS[name]
    with torch.device("meta"):
        assert count(load(name)["model"]) == full
        assert count(load(name, small=True)["model"]) == small


def test_parameters_of_jasper_without_dense_residuals():
    with torch.device("meta"):
        model = load("jasper_dr", residual="plain")["model"]
    assert count(model) == 322_286_877


def test_jasper_mini_has_33_separable_layers():
    with torch.device("meta"):
        blocks = load("jasper_mini")["model"].encoder.blocks
    layers = [layer for block in blocks for layer in block.layers]
    assert len(layers) == 33
    assert all(hasattr(layer, "depthwise") for layer in layers)


@pytest.mark.parametrize("name", PARAMETERS)
def test_small_networks_from_waveform_to_logits(name):
    hparams = load(name, small=True)
    model = hparams["model"].eval()
    assert hparams["name"] == name
    assert model.frame_period == 0.02
    wavs, wav_lens = waves()
    with torch.no_grad():
        encoding = model(wavs, wav_lens)
        assert encoding.lengths.tolist() == [51, 39, 26, 14, 1]
        assert encoding.logits.shape == (5, 51, 29)
        assert encoding.hidden.shape == (5, 51, model.encoder.output_size)
        # Where an utterance ends between two hops, the last frame hears the
        # silence after it: padding is compared on the features.
        features, lengths = model.features(wavs, wav_lens)
        for index, length in enumerate(lengths):
            alone, out = model.encoder(
                features[index : index + 1, :length], length[None]
            )
            assert out[0] == encoding.lengths[index]
            torch.testing.assert_close(
                encoding.hidden[index, : out[0]], alone[0], rtol=1e-5, atol=1e-5
            )
            assert not encoding.hidden[index, out[0] :].any()


@pytest.mark.parametrize("name", PARAMETERS)
def test_small_networks_learn_with_every_parameter(name):
    model = load(name, small=True)["model"]
    wavs, wav_lens = waves()
    logits = model(wavs, wav_lens).logits
    (logits * torch.randn_like(logits)).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key


def test_overrides_replace_tables_and_reach_the_head():
    table = [{"channels": 8, "kernel": 3, "stride": 4}]
    with (MODELS / "quartznet15x5.yaml").open() as file:
        overrides = {"blocks": table, "encoder_size": 8}
        model = load_hyperpyyaml(file, overrides)["model"]
    assert len(model.encoder.blocks) == 1
    assert model.frame_period == 0.04
    assert model(*waves()).logits.shape == (5, 26, 29)
    for name in ("lstm", "jasper_mini"):
        key = "directions" if name == "lstm" else "encoder_size"
        model = load(name, small=True, **{key: 1})["model"]
        assert model.head.in_features == model.encoder.output_size
    with pytest.raises(KeyError, match="channel"):
        load("lstm", channel=8)
