"""wav2vec 2.0, HuBERT, WavLM, Whisper: transformers itself as the reference."""

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from tutornet_sb.corpora.tokenizer import train_tokenizer
from tutornet_sb.distillation.taps import find_taps
from tutornet_sb.networks import runs
from tutornet_sb.networks.acoustic_model import AcousticModel
from tutornet_sb.networks.huggingface import (
    Wav2Vec2Encoder,
    Waveform,
    WhisperEncoder,
    WhisperFeatures,
    make_network,
)
from tutornet_sb.teachers.teacher import Teacher
from tutornet_sb.util.composition import include
from tutornet_sb.util.files import write_json

MODELS = (
    Path(__file__).parents[2] / "recipes/LibriSpeech/TutorNet/hparams/models"
)
TYPES = ["wav2vec2", "hubert", "wavlm"]
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
TINY_WHISPER = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "num_mel_bins": 8,
    # Windows of 2 s
    "max_source_positions": 100,
}
NORMS = {
    "group": {},
    "layer": {
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "conv_bias": True,
    },
}
# Samples: the longest, a frame more and less than a half, short, one frame
SAMPLES = torch.tensor([8000, 4240, 4239, 1500, 400])


def noise(samples=SAMPLES):
    """Noise of several lengths and loudnesses, zero on padded samples."""
    wavs = torch.randn(len(samples), int(samples.max()))
    wavs = wavs * torch.linspace(0.05, 1, len(samples)).unsqueeze(1) + 0.1
    wavs[torch.arange(wavs.shape[1]) >= samples.unsqueeze(1)] = 0
    return wavs, samples / samples.max()


def scrambled(network):
    """The network with values unlike those that it starts with."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


# ------------------------------------------------------------------- waveform


def test_the_waveform_is_normalised_as_the_extractor_does():
    wavs, wav_lens = noise()
    features, lengths = Waveform()(wavs, wav_lens)
    assert lengths.tolist() == SAMPLES.tolist()
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    for wav, row, length in zip(wavs, features, lengths, strict=True):
        alone = extractor(wav[:length].double().numpy(), sampling_rate=16000)
        expected = torch.tensor(np.array(alone["input_values"][0]))
        torch.testing.assert_close(
            row[:length].double(), expected.double(), rtol=1e-4, atol=1e-5
        )
        assert not row[length:].any()


def test_the_waveform_stays_as_it_is_unless_normalised():
    wavs, wav_lens = noise()
    wavs[3, -1] = 5.0  # Padding that is not zero
    features, _ = Waveform(8000, normalize=False)(wavs, wav_lens)
    assert torch.equal(features[0], wavs[0])
    assert features[3, 1500:].abs().max() == 0
    assert Waveform(8000).frame_period == 1 / 8000


def test_silence_stays_finite():
    features, _ = Waveform()(torch.zeros(2, 500), torch.tensor([1.0, 0.0]))
    assert torch.equal(features, torch.zeros(2, 500))


# ------------------------------------------------- wav2vec 2.0, HuBERT, WavLM


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model_type", TYPES)
def test_an_utterance_comes_out_as_from_transformers_alone(model_type, norm):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **TINY, **NORMS[norm])
    reference = scrambled(AutoModel.from_config(config)).eval()
    network = make_network(model_type, **TINY, **NORMS[norm])
    network.load_state_dict(reference.state_dict())
    encoder = Wav2Vec2Encoder(network).eval()
    assert (encoder.stride, encoder.output_size) == (320, 16)
    x, lengths = Waveform()(*noise())
    hidden, out = encoder(x, lengths)
    # The arithmetic of seven convolutions without padding
    expected_out = lengths
    for kernel, stride in zip(
        [10, 3, 3, 3, 3, 2, 2], [5, 2, 2, 2, 2, 2, 2], strict=True
    ):
        expected_out = (expected_out - kernel) // stride + 1
    assert out.tolist() == expected_out.tolist() == [24, 13, 12, 4, 1]
    for index, (length, frames) in enumerate(zip(lengths, out, strict=True)):
        alone = reference(x[index : index + 1, :length]).last_hidden_state
        valid = hidden[index, :frames]
        torch.testing.assert_close(valid, alone[0], rtol=1e-4, atol=1e-5)
        assert not hidden[index, frames:].any()


def test_transformers_lets_padding_change_the_base_networks():
    """What Wav2Vec2Encoder deviates for, measured."""
    torch.manual_seed(0)
    network = scrambled(make_network("wav2vec2", **TINY)).eval()
    x, lengths = Waveform()(*noise(torch.tensor([16000, 8000])))
    alone = network(x[1:, :8000]).last_hidden_state[0]
    # As its documentation says: padded with zeros, no attention mask.
    batched = network(x).last_hidden_state[1, : len(alone)]
    ours = Wav2Vec2Encoder(network).eval()(x, lengths)[0][1, : len(alone)]

    def change(hidden):
        return ((hidden - alone).norm() / alone.norm()).item()

    assert change(batched) > 0.02
    assert change(ours) < 1e-5


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("samples", [0, 1, 250, 399, 400])
def test_audio_too_short_for_a_frame_gives_one(norm, samples):
    encoder = Wav2Vec2Encoder(make_network("wav2vec2", **TINY, **NORMS[norm]))
    encoder.eval()
    x = torch.randn(1, samples)
    hidden, lengths = encoder(x, torch.tensor([samples]))
    assert hidden.shape == (1, 1, 16)
    assert lengths.tolist() == [1]
    padded = torch.nn.functional.pad(x, (0, 400 - samples))
    expected = encoder(padded, torch.tensor([400]))[0]
    torch.testing.assert_close(hidden, expected)
    # Beside a longer one as well
    both = torch.cat([padded, torch.zeros(1, 600)], 1).repeat(2, 1)
    hidden, lengths = encoder(both, torch.tensor([samples, 1000]))
    assert lengths.tolist() == [1, 2]
    torch.testing.assert_close(hidden[:1, :1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_student_learns_in_every_parameter(model_type):
    torch.manual_seed(0)
    network = make_network(
        model_type, **TINY, layerdrop=0.0, mask_time_prob=0.2
    )
    encoder = Wav2Vec2Encoder(network)
    assert all(module.training for module in encoder.modules())
    x, lengths = Waveform()(*noise())
    hidden, _ = encoder(x, lengths)
    (hidden * torch.randn_like(hidden)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A key's bias shifts all scores of a query alike.
        assert parameter.grad.any() or "k_proj.bias" in name, name


def test_padding_does_not_change_a_gradient():
    torch.manual_seed(0)
    options = {"hidden_dropout": 0.0, "activation_dropout": 0.0}
    options |= {"attention_dropout": 0.0, "mask_time_prob": 0.0}
    network = make_network("wav2vec2", **TINY, **options, layerdrop=0.0)
    encoder = Wav2Vec2Encoder(network.double())
    x, lengths = Waveform()(*noise())
    weights = torch.randn(5, 24, 16, dtype=torch.float64)

    def gradients(loss):
        encoder.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in encoder.parameters()])

    hidden, _ = encoder(x.double(), lengths)
    together = gradients((hidden * weights[:, : hidden.shape[1]]).sum())
    loss = 0
    for index, length in enumerate(lengths):
        row = x[index : index + 1, :length].double()
        hidden, _ = encoder(row, length[None])
        loss = loss + (hidden[0] * weights[index, : hidden.shape[1]]).sum()
    torch.testing.assert_close(together, gradients(loss))


def test_an_adapter_is_refused():
    network = make_network("wav2vec2", **TINY, add_adapter=True)
    with pytest.raises(ValueError, match="add_adapter"):
        Wav2Vec2Encoder(network)


# -------------------------------------------------------------------- Whisper


@pytest.mark.parametrize("n_mels", [80, 128])
def test_log_mel_energies_are_those_of_whisper(n_mels):
    wavs, wav_lens = noise()
    features, lengths = WhisperFeatures(n_mels)(wavs, wav_lens)
    assert features.shape == (5, 3000, n_mels)
    # Frames begin every 160 samples.
    assert lengths.tolist() == [50, 27, 27, 10, 3]
    extractor = WhisperFeatureExtractor(feature_size=n_mels)
    for wav, row, samples in zip(wavs, features, SAMPLES, strict=True):
        expected = extractor(wav[:samples].numpy(), sampling_rate=16000)
        torch.testing.assert_close(
            row.T,
            torch.tensor(expected["input_features"][0]),
            rtol=1e-4,
            atol=1e-4,
        )


def test_whisper_sees_no_padding_that_is_not_silent():
    wavs, wav_lens = noise()
    expected, _ = WhisperFeatures(8, window=1)(wavs, wav_lens)
    wavs[3, 1500:] = 9.0
    features, _ = WhisperFeatures(8, window=1)(wavs, wav_lens)
    assert torch.equal(features, expected)


def whisper(seed=0):
    torch.manual_seed(seed)
    network = scrambled(make_network("whisper", **TINY_WHISPER))
    return network, AcousticModel(
        WhisperFeatures(8, window=2),
        WhisperEncoder(network),
        torch.nn.Linear(16, 5),
    ).eval()


def test_whisper_gives_the_frames_of_the_speech():
    network, model = whisper()
    assert model.frame_period == 0.02
    wavs, wav_lens = noise()
    hidden, logits, lengths = model(wavs, wav_lens)
    assert lengths.tolist() == [25, 14, 14, 5, 2]
    assert hidden.shape == (5, 25, 16)
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    for wav, row, length, samples in zip(
        wavs, hidden, lengths, SAMPLES, strict=True
    ):
        x = extractor(
            wav[:samples].numpy(), sampling_rate=16000, return_tensors="pt"
        )["input_features"]
        expected = network(x).last_hidden_state[0, :length]
        torch.testing.assert_close(row[:length], expected, rtol=1e-3, atol=1e-4)
        assert not row[length:].any()


def test_audio_longer_than_a_window_is_encoded_window_by_window():
    network, model = whisper()
    # 2 s are a window: exactly two, two and a bit, one and a bit, a bit
    samples = torch.tensor([80000, 64000, 32160, 160])
    wavs, wav_lens = noise(samples)
    hidden, _, lengths = model(wavs, wav_lens)
    assert lengths.tolist() == [250, 200, 101, 1]
    features, _ = model.features(wavs, wav_lens)
    assert features.shape == (4, 600, 8)
    for index, length in enumerate(lengths):
        windows = [
            network(part.T[None]).last_hidden_state[0]
            for part in features[index].split(200)
        ]
        expected = torch.cat(windows)[:length]
        torch.testing.assert_close(
            hidden[index, :length], expected, rtol=1e-3, atol=1e-4
        )


def test_other_utterances_do_not_change_whisper():
    _, model = whisper()
    samples = torch.tensor([70000, 32000, 31900, 900])
    wavs, wav_lens = noise(samples)
    features, _ = model.features(wavs, wav_lens)
    hidden, _, lengths = model(wavs, wav_lens)
    for index, count in enumerate(samples):
        wav = wavs[index : index + 1, :count]
        # Also where speech ends with its window
        x, _ = model.features(wav, torch.ones(1))
        torch.testing.assert_close(
            features[index, : x.shape[1]], x[0], rtol=1e-5, atol=1e-5
        )
        alone = model(wav, torch.ones(1))
        assert alone.lengths.item() == lengths[index]
        torch.testing.assert_close(
            hidden[index, : lengths[index]],
            alone.hidden[0],
            rtol=1e-4,
            atol=1e-5,
        )


def test_a_window_that_does_not_fit_is_named():
    network, _ = whisper()
    with pytest.raises(ValueError, match="150 frames, not a multiple of.*200"):
        WhisperEncoder(network)(torch.randn(1, 150, 8), torch.tensor([150]))


def test_whisper_learns_except_in_its_positions():
    network, model = whisper()
    hidden, logits, _ = model.train()(*noise())
    (logits * torch.randn_like(logits)).sum().backward()
    still = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or (not p.grad.any() and "k_proj" not in name)
    ]
    assert still == ["encoder.model.embed_positions.weight"]
    assert not network.embed_positions.weight.requires_grad


# ------------------------------------------------------------- hidden layers


@pytest.mark.parametrize("model_type", TYPES)
def test_every_layer_can_be_tapped(model_type):
    network = make_network(model_type, **TINY)
    model = AcousticModel(
        Waveform(), Wav2Vec2Encoder(network), torch.nn.Linear(16, 5)
    )
    taps = find_taps(model.eval())
    assert taps["encoder"] == (1, 16)
    assert taps["encoder.model.encoder.layers.0"] == (1, 16)
    assert taps["encoder.model.encoder.layers.1"] == (1, 16)
    assert taps["encoder.model.feature_extractor"] == (2, 8)
    teacher = Teacher(model, ["encoder.model.encoder.layers.0"])
    targets = teacher(*noise())
    assert targets.hidden.shape == (5, 24, 16)
    assert targets.frame_period == 0.02
    assert not any(p.requires_grad for p in teacher.parameters())


def test_every_layer_of_whisper_can_be_tapped():
    network, model = whisper()
    taps = find_taps(model)
    assert taps["encoder"] == taps["encoder.layers.0"] == (1, 16)
    assert taps["encoder.layers.1"] == (1, 16)
    # The network's own always have the frames of a window.
    assert "encoder.model.layers.0" not in taps
    wavs, wav_lens = noise()
    seen = []
    network.layers[0].register_forward_hook(lambda *args: seen.append(args[2]))
    targets = Teacher(model, ["encoder.layers.0"])(wavs, wav_lens)
    assert torch.equal(targets.hidden[0], seen[-1][0, :25])
    assert not targets.hidden[1, 14:].any()


# ------------------------------------------------------------ published weights


def save_ctc(folder, rename=lambda key: key, **config):
    """A CTC model's folder, as Wav2Vec2ForCTC saves it."""
    torch.manual_seed(1)
    config = Wav2Vec2Config(**TINY, vocab_size=6, **config)
    model = scrambled(Wav2Vec2ForCTC(config)).eval()
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    weights = {rename(k): v for k, v in load_file(path).items()}
    weights.pop(None, None)
    save_file(weights, path, metadata={"format": "pt"})
    return model


def old_names(key):
    # Of nearly all that is on the hub
    key = key.replace("parametrizations.weight.original0", "weight_g")
    return key.replace("parametrizations.weight.original1", "weight_v")


@pytest.mark.parametrize("rename", [str, old_names])
def test_a_student_starts_from_published_weights(tmp_path, rename):
    published = save_ctc(tmp_path, rename)
    network = make_network("wav2vec2", str(tmp_path), **TINY)
    for name, tensor in published.wav2vec2.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("mask_time_prob", [0.0, 0.1])
def test_the_mask_vector_need_not_be_published(tmp_path, mask_time_prob):
    def rename(key):
        return None if "masked_spec_embed" in key else key

    save_ctc(tmp_path, rename)
    network = make_network(
        "wav2vec2", str(tmp_path), **TINY, mask_time_prob=mask_time_prob
    )
    has_vector = "masked_spec_embed" in network.state_dict()
    assert has_vector == (mask_time_prob > 0)


def test_whisper_starts_from_published_weights(tmp_path):
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2}
    decoder |= {"decoder_ffn_dim": 8, "vocab_size": 20, "pad_token_id": 0}
    decoder |= {"bos_token_id": 1, "eos_token_id": 1}
    decoder |= {"decoder_start_token_id": 2}
    published = scrambled(
        WhisperForConditionalGeneration(
            WhisperConfig(**TINY_WHISPER, **decoder)
        )
    )
    # In half precision, as the large ones are stored
    published.half().save_pretrained(tmp_path)
    network = make_network("whisper", str(tmp_path), **TINY_WHISPER)
    own = network.state_dict()
    for name, tensor in published.model.encoder.state_dict().items():
        assert own[name].dtype == torch.float32
        assert torch.equal(own[name], tensor.float()), name


def test_another_architecture_is_told_with_what_to_set(tmp_path):
    save_ctc(tmp_path, do_stable_layer_norm=True)
    config = TINY | {"num_hidden_layers": 1}
    expected = "set num_hidden_layers: 2, do_stable_layer_norm: True"
    with pytest.raises(ValueError, match=expected):
        make_network("wav2vec2", str(tmp_path), **config)
    with pytest.raises(ValueError, match="set model_type: wav2vec2"):
        make_network("hubert", str(tmp_path), **TINY)


@pytest.mark.parametrize("change", ["missing", "unexpected", "another shape"])
def test_published_weights_must_be_all_and_no_others(tmp_path, change):
    save_ctc(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    key = "wav2vec2.encoder.layer_norm.bias"
    if change == "missing":
        del weights[key]
    elif change == "unexpected":
        weights[key + "2"] = weights[key].clone()
    else:
        weights[key] = torch.zeros(3)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"1 (of )?{change}: .*encoder\.layer_norm\.bias"
    ):
        make_network("wav2vec2", str(tmp_path), **TINY)


def test_what_cannot_be_loaded_is_told_in_a_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        make_network("wav2vec2", str(tmp_path), **TINY)
    assert str(tmp_path) in str(caught.value)
    save_ctc(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        make_network("wav2vec2", str(tmp_path), **TINY)
    assert "\n" not in str(caught.value)


def test_a_mistyped_key_is_named():
    with pytest.raises(ValueError, match="has no 'hiden_size'"):
        make_network("hubert", hiden_size=3)
    with pytest.raises(ValueError, match="model_type must be one of.*got bert"):
        make_network("bert")


# ----------------------------------------------------------------- YAML files


def load(content):
    text = StringIO()
    YAML().dump(content, text)
    return load_hyperpyyaml(text.getvalue())["model"]


@pytest.mark.parametrize("name", [*TYPES, "whisper"])
def test_yaml_makes_a_model_that_runs(name):
    content = include(MODELS / f"{name}.yaml", ".", "small")
    model = load(content)
    assert model.frame_period == pytest.approx(0.02)
    encoding = model.eval()(*noise())
    frames = 25 if name == "whisper" else 24
    assert encoding.logits.shape == (5, frames, 29)
    assert encoding.logits.isfinite().all()


@pytest.mark.parametrize("name", TYPES)
def test_yaml_has_the_architecture_of_the_published_base(name):
    # transformers' own defaults are those of the base networks.
    content = include(MODELS / f"{name}.yaml", ".")
    with torch.device("meta"):
        model = load(content)
    # As JSON, where lists and tuples are the same
    config = json.loads(model.encoder.model.config.to_json_string(False))
    default = json.loads(AutoConfig.for_model(name).to_json_string(False))
    for key in default.keys() - {"architectures", "dtype", "layerdrop"}:
        assert config[key] == default[key], key


def test_a_run_that_started_from_published_weights_does_without_them(tmp_path):
    source, folder = tmp_path / "published", tmp_path / "run"
    save_ctc(source)
    overrides = {"source": str(source), **TINY}
    content = include(MODELS / "wav2vec2.yaml", ".", "small", overrides)
    model = load(content).eval()
    folder.mkdir()
    YAML().dump(content, folder / runs.MODEL_YAML)
    assert str(source) in (folder / runs.MODEL_YAML).read_text()
    torch.save(model.state_dict(), folder / runs.WEIGHTS)
    manifest = tmp_path / "train.csv"
    manifest.write_text("ID,wrd\na,ONE TWO\n")
    train_tokenizer([manifest], folder / runs.TOKENIZER)
    write_json(folder / runs.RESULTS, {})
    source.rename(tmp_path / "gone")
    loaded, _ = runs.load_run(folder)
    wavs, wav_lens = noise()
    assert torch.equal(
        loaded.eval()(wavs, wav_lens).logits, model(wavs, wav_lens).logits
    )
