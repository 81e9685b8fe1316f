"""The networks of the recipe's YAML files, at every size that these have."""

from io import StringIO
from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML

from tutornet_sb.distillation.taps import find_taps
from tutornet_sb.networks.acoustic_model import SpectralFeatures
from tutornet_sb.networks.streaming import Stream
from tutornet_sb.teachers.teacher import Teacher
from tutornet_sb.util.composition import find_sizes, include, read_mapping

MODELS = (
    Path(__file__).parents[2] / "recipes/LibriSpeech/TutorNet/hparams/models"
)
FOUR = "full", "large", "small", "small_teacher"
# Parameters of each size: `full` as published, `small` for the mini corpus
PARAMETERS = {
    "branchformer": {"full": 25_862_973, "small": 463_109},
    "conformer": {
        "full": 28_785_597,
        "medium": 9_305_277,
        "small": 430_277,
        "small_teacher": 1_698_413,
    },
    "contextnet": {"full": 32_336_889, "small": 322_821},
    "crdnn": {"full": 128_339_357, "small": 390_669},
    "deepspeech2": {
        "full": 11_566_333,
        "large": 58_971_133,
        "small": 468_885,
    },
    "gru": dict(
        zip(FOUR, (5_715_997, 22_442_013, 352_157, 1_804_189), strict=True)
    ),
    "gru_streaming": dict(
        zip(FOUR, (2_161_949, 8_256_029, 182_333, 726_109), strict=True)
    ),
    "hubert": {"full": 94_394_013, "small": 429_853},
    "jasper_dr": {
        "full": 332_632_349,
        "medium": 10_235_421,
        "small": 1_070_429,
    },
    "jasper_mini": {"full": 8_192_733, "small": 399_613},
    "lstm": dict(
        zip(FOUR, (7_556_125, 29_792_285, 445_085, 2_371_741), strict=True)
    ),
    "lstm_streaming": dict(
        zip(FOUR, (2_819_869, 10_882_589, 219_581, 936_157), strict=True)
    ),
    "quartznet": {
        "full": 6_713_181,
        "5x5": 6_713_181,
        "10x5": 12_818_781,
        "15x5": 18_924_381,
        "small": 824_925,
    },
    "transformer": {"full": 85_596_093, "small": 435_013},
    "wav2vec2": {"full": 94_394_013, "small": 429_853},
    "wavlm": {"full": 94_404_237, "small": 431_745},
    "whisper": {"full": 20_605_469, "small": 413_117},
}
NETWORKS = sorted(path.stem for path in MODELS.glob("*.yaml"))
SIZES = [(name, size) for name in PARAMETERS for size in PARAMETERS[name]]
# Networks with features of 10 ms; test_huggingface.py has more of the others.
SPECTRAL = sorted({*PARAMETERS} - {"hubert", "wav2vec2", "wavlm", "whisper"})
LENGTHS = torch.tensor([16000, 12345, 8000, 4160, 159])


@pytest.fixture(autouse=True)
def one_thread():
    """Run small networks on one thread: more wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(name, size="full", **overrides):
    """Load a network of the recipe, as its loader does."""
    overrides.setdefault("output_size", 29)
    content = include(f"{name}.yaml", MODELS, size, overrides)
    text = StringIO()
    YAML().dump(content, text)
    return load_hyperpyyaml(text.getvalue())


def count(model):
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def waves():
    """Waveforms of very different lengths and their relative lengths."""
    wavs = torch.randn(len(LENGTHS), int(LENGTHS.max()))
    wavs[torch.arange(wavs.shape[1]) >= LENGTHS[:, None]] = 0
    return wavs, LENGTHS / LENGTHS.max()


def test_every_size_of_every_file_is_listed():
    assert list(PARAMETERS) == NETWORKS
    for name, sizes in PARAMETERS.items():
        content = read_mapping(MODELS / f"{name}.yaml")
        while "extends" in content:
            content = read_mapping(MODELS / content["extends"])
        assert sizes.keys() == {"full", *find_sizes(content)}


@pytest.mark.parametrize("name, size", SIZES)
def test_parameters(name, size):
    # These two run themselves to infer shapes, the first not without data, the
    # second slowly. Orthogonal weights take seconds and are as many.
    device = "cpu" if name in ("crdnn", "contextnet") else "meta"
    options = {"rnn_re_init": False} if name == "crdnn" else {}
    with torch.device(device):
        hparams = load(name, size, **options)
    assert count(hparams["model"]) == PARAMETERS[name][size]
    text = (MODELS / f"{name}.yaml").read_text()
    assert f"{PARAMETERS[name][size]:,}" in text
    assert hparams["name"].startswith(name)
    assert size in hparams["name"] or hparams["name"] == name


def test_sizes_that_have_names_do_not_share_folders_of_runs():
    names = [load("quartznet", size)["name"] for size in ("full", "5x5")]
    names += [load("quartznet", size)["name"] for size in ("10x5", "15x5")]
    assert names == ["quartznet"] * 2 + ["quartznet10x5", "quartznet15x5"]


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


@pytest.mark.parametrize("name", SPECTRAL)
def test_small_networks_from_waveform_to_logits(name):
    hparams = load(name, "small")
    model = hparams["model"].eval()
    assert model.frame_period == 0.02
    wavs, wav_lens = waves()
    with torch.no_grad():
        encoding = model(wavs, wav_lens)
        assert encoding.lengths.tolist() == [51, 39, 26, 14, 1]
        assert encoding.logits.shape == (5, 51, 29)
        assert encoding.hidden.shape == (5, 51, model.encoder.output_size)
        # Where an utterance ends between two hops, the last frame includes the
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


@pytest.mark.parametrize("name", SPECTRAL)
def test_small_networks_learn_with_every_parameter(name):
    model = load(name, "small")["model"]
    wavs, wav_lens = waves()
    logits = model(wavs, wav_lens).logits
    (logits * torch.randn_like(logits)).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


# Of every network, without its published weights. Features are exact but for
# rounding; those of waveforms have a floor of 1e-7 below the variance.
@pytest.mark.parametrize("name", NETWORKS)
def test_no_network_depends_on_gain_and_offset(name):
    torch.manual_seed(0)
    model = load(name, "small")["model"]
    wavs, wav_lens = waves()
    # 40 dB between loud and quiet parts, as of speech
    wavs *= 0.1 * torch.logspace(0, -2, 8).repeat_interleave(2000)
    with torch.no_grad():
        for _ in range(2):
            model.train()(wavs, wav_lens)
        model.eval()
        expected = model(wavs, wav_lens)
        inside = torch.arange(wavs.shape[1]) < LENGTHS[:, None]
        for gain, offset in ((-30, 0), (-12, 0), (6, 0), (0, 0.05)):
            changed = wavs * 10 ** (gain / 20) + offset * inside
            if isinstance(model.features, SpectralFeatures):
                # Where random weights make little of them
                torch.testing.assert_close(
                    model.features(changed, wav_lens)[0],
                    model.features(wavs, wav_lens)[0],
                    rtol=0,
                    atol=5e-3,
                )
            found = model(changed, wav_lens)
            assert found.lengths.tolist() == expected.lengths.tolist()
            torch.testing.assert_close(
                found.logits.log_softmax(-1),
                expected.logits.log_softmax(-1),
                rtol=0,
                atol=5e-3,
            )


def test_overrides_replace_tables_and_reach_the_head():
    table = [{"channels": 8, "kernel": 3, "stride": 4}]
    model = load("quartznet", "15x5", blocks=table, encoder_size=8)["model"]
    assert len(model.encoder.blocks) == 1
    assert model.frame_period == 0.04
    assert model(*waves()).logits.shape == (5, 26, 29)
    changes = {
        "lstm": {"directions": 1},
        "gru_streaming": {"directions": 2},
        "jasper_mini": {"encoder_size": 1},
        "deepspeech2": {"encoder_size": 24},
    }
    for name, change in changes.items():
        model = load(name, "small", **change)["model"]
        assert model.head.in_features == model.encoder.output_size
    with pytest.raises(ValueError, match=r"lstm\.yaml has no key 'channel'"):
        load("lstm", channel=8)


@pytest.mark.parametrize("name", ["lstm_streaming", "gru_streaming"])
def test_streaming_students_stream(name):
    model = load(name, "small")["model"]
    wavs, wav_lens = waves()
    model.train()(wavs, wav_lens)
    with torch.no_grad():
        whole = model.eval()(wavs, torch.ones(5)).logits.log_softmax(-1)
    stream = Stream(model, 5)
    assert stream.latency == 0.06
    parts = [stream.accept(piece) for piece in wavs.split(1500, dim=1)]
    streamed = torch.cat([*parts, stream.finish()], dim=1)
    torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("conformer", {"strides": [2, 2]}),
        ("branchformer", {"strides": [2, 2]}),
        ("transformer", {"strides": [2, 2]}),
        ("crdnn", {"time_pooling_size": 4}),
        ("contextnet", {"strides": [1, 2, 1, 2, 1, 1]}),
    ],
)
def test_frames_of_40_ms_by_one_key(name, overrides):
    model = load(name, "small", output_size=31, **overrides)["model"].eval()
    assert model.frame_period == 0.04
    with torch.no_grad():
        encoding = model(*waves())
    assert encoding.lengths.tolist() == [26, 20, 13, 7, 1]
    assert encoding.logits.shape == (5, 26, 31)


INNER = {
    "conformer": "encoder.transformer.encoder.layers.1",
    "branchformer": "encoder.transformer.encoder.layers.1",
    "transformer": "encoder.transformer.encoder.layers.1",
    "crdnn": "encoder.crdnn.RNN",
    "contextnet": "encoder.contextnet.block_3",
}


@pytest.mark.parametrize("name", INNER)
def test_inner_layers_can_be_tapped(name):
    model = load(name, "small")["model"].eval()
    taps = find_taps(model)
    assert taps["encoder"] == (1, model.encoder.output_size)
    assert taps[INNER[name]].time_axis == 1
    targets = Teacher(model, [INNER[name]])(*waves())
    assert targets.hidden.shape == (5, 51, taps[INNER[name]].hidden_size)
    assert targets.hidden.isfinite().all()
