"""Teachers of all kinds, made here with random weights: the originals, run on
each utterance alone, are the reference."""

import functools
import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from huggingface_hub import constants, errors
from hyperpyyaml import load_hyperpyyaml
from safetensors.torch import load_file, save_file
from speechbrain.dataio.encoder import CTCTextEncoder
from speechbrain.inference.ASR import EncoderASR
from transformers import (
    HubertConfig,
    HubertForCTC,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from tutornet_sb.corpora.tokenizer import pieces, train_tokenizer
from tutornet_sb.networks import runs
from tutornet_sb.teachers import sources
from tutornet_sb.teachers.sources import load_teacher
from tutornet_sb.teachers.teacher import Teacher
from tutornet_sb.util.files import write_json

CTC = {
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2ForCTC),
    "hubert": (HubertConfig, HubertForCTC),
    "wavlm": (WavLMConfig, WavLMForCTC),
}
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
# The order of facebook/wav2vec2-base-960h begins so.
VOCAB = ["<pad>", "<s>", "</s>", "<unk>", "|", "E", "T", "A", "'"]
SAMPLES = torch.tensor([9600, 6401, 3000, 700])


load_trusted = functools.partial(load_teacher, trust_remote_code=True)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def noise(samples=SAMPLES):
    wavs = torch.randn(len(samples), int(samples.max())) * 0.3 + 0.05
    wavs[torch.arange(wavs.shape[1]) >= samples.unsqueeze(1)] = 0
    return wavs, samples / samples.max()


def scrambled(network, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


# -------------------------------------------------------- CTC of transformers


def save_ctc(folder, model_type="wav2vec2", do_normalize=True, **config):
    config_class, model_class = CTC[model_type]
    config = config_class(vocab_size=len(VOCAB), **TINY, **config)
    model = scrambled(model_class(config))
    model.save_pretrained(folder)
    vocab = {piece: index for index, piece in enumerate(VOCAB)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    extractor = Wav2Vec2FeatureExtractor(do_normalize=do_normalize)
    extractor.save_pretrained(folder)
    return model, extractor


@pytest.mark.parametrize("do_normalize", [True, False])
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("model_type", CTC)
def test_a_ctc_model_gives_the_logits_of_the_original(
    tmp_path, model_type, norm, do_normalize
):
    original, extractor = save_ctc(
        tmp_path, model_type, do_normalize, feat_extract_norm=norm
    )
    source = load_teacher(tmp_path)
    assert source.kind == "ctc"
    assert source.source == str(tmp_path)
    assert source.describe() == {
        "name": model_type,
        "source": str(tmp_path),
        "kind": "ctc",
        "parameters": sum(p.numel() for p in original.parameters()),
    }
    assert source.model.features.sample_rate == 16000
    assert source.pieces == VOCAB
    assert source.blank_index == 0
    assert not any(module.training for module in source.model.modules())
    wavs, wav_lens = noise()
    encoding = source.model(wavs, wav_lens)
    assert encoding.lengths.tolist() == [29, 19, 9, 1]
    for wav, samples, logits, length in zip(
        wavs, SAMPLES, encoding.logits, encoding.lengths, strict=True
    ):
        x = extractor(
            wav[:samples].numpy(), sampling_rate=16000, return_tensors="pt"
        )["input_values"]
        torch.testing.assert_close(
            logits[:length], original(x).logits[0], rtol=1e-4, atol=1e-5
        )
    targets = Teacher(source.model)(wavs, wav_lens)
    assert targets.hidden.shape == (4, 29, 16)
    assert targets.frame_period == 0.02


def test_no_bar_is_drawn_into_a_file(tmp_path, capsys):
    save_ctc(tmp_path)
    capsys.readouterr()
    load_teacher(tmp_path)
    assert capsys.readouterr().err == ""


def test_symbols_of_a_ctc_model_become_text(tmp_path):
    save_ctc(tmp_path)
    source = load_teacher(tmp_path)
    ids = [VOCAB.index(piece) for piece in ["T", "E", "E", "|", "'", "A"]]
    # Repetitions are letters here: CTC's are gone before.
    assert source.decode(ids) == "TEE 'A"
    assert source.decode([]) == ""
    assert source.decode([1, 6, 3, 2]) == "T"


def test_the_blank_is_the_tokenizers(tmp_path):
    save_ctc(tmp_path)
    vocab = {piece: index for index, piece in enumerate(VOCAB[::-1])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    source = load_teacher(tmp_path)
    assert source.blank_index == 8
    assert source.pieces == VOCAB[::-1]


def test_outputs_without_a_symbol_are_named_as_unused(tmp_path):
    save_ctc(tmp_path)
    vocab = {piece: index for index, piece in enumerate(VOCAB[:-1])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    assert load_teacher(tmp_path).pieces == [*VOCAB[:-1], "<unused 8>"]


def test_weights_pickled_long_ago_are_loaded(tmp_path):
    original, _ = save_ctc(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(original.state_dict(), tmp_path / "pytorch_model.bin")
    model = load_teacher(tmp_path).model
    assert torch.equal(model.head.weight, original.lm_head.weight)


def test_a_teacher_stored_in_half_precision_computes_in_float32(tmp_path):
    original, _ = save_ctc(tmp_path)
    original.half().save_pretrained(tmp_path)
    model = load_teacher(tmp_path).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.head.weight, original.lm_head.weight.float())


class Attack:
    def __reduce__(self):
        return print, ("code in a pickle has run",)


def test_a_pickle_does_not_run_code(tmp_path, capsys):
    save_ctc(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"lm_head.bias": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_teacher(tmp_path)
    assert "has run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/x", 7])
def test_an_index_of_weights_leads_to_no_other_folder(tmp_path, name):
    folder = tmp_path / "ctc"
    save_ctc(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names other files than those of its"):
        load_teacher(folder)


# The folder whose files' opening is noted, and those that were opened
_watched, _opened = [], []


def _note(event, arguments):
    if event == "open" and _watched and isinstance(arguments[0], str):
        path = os.path.abspath(arguments[0])
        if path.startswith(_watched[0]):
            _opened.append(path)


@pytest.fixture(scope="module")
def watch():
    """Note what Python opens in a folder. Such a hook cannot be taken off."""
    sys.addaudithook(_note)
    yield _watched
    _watched.clear()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    save_ctc(folder)
    return folder


@pytest.mark.parametrize(
    "file, content",
    [
        *(
            ("tokenizer_config.json", {key: "../outside/vocab.json"})
            for key in (
                *("vocab_file", "tokenizer_file", "added_tokens_file"),
                *("special_tokens_map_file", "tokenizer_config_file"),
                *("name_or_path", "chat_template_file"),
            )
        ),
        ("tokenizer_config.json", {"vocab_file": "/OUTSIDE/vocab.json"}),
        ("tokenizer_config.json", {"init_inputs": ["/OUTSIDE/vocab.json"]}),
        (
            "tokenizer_config.json",
            {"fast_tokenizer_files": ["../outside/tokenizer.4.0.0.json"]},
        ),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["/OUTSIDE--x.Y", None]}},
        ),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["x.Y", None]}}
            | {"tokenizer_class": "Y"},
        ),
        ("special_tokens_map.json", {"vocab_file": "/OUTSIDE/vocab.json"}),
        ("special_tokens_map.json", {"name_or_path": "/OUTSIDE"}),
        ("added_tokens.json", {"../outside/vocab.json": 60}),
        ("config.json", {"transformers_weights": "../outside/a.safetensors"}),
        ("config.json", {"configuration_files": ["../outside/config.4.json"]}),
        (
            "config.json",
            {"configuration_files": ["config.4/../../outside/config.4.json"]},
        ),
        ("config.json", {"_name_or_path": "/OUTSIDE"}),
        ("preprocessor_config.json", {"auto_map": {"AutoFeatureX": "x.Y"}}),
        ("preprocessor_config.json", {"name_or_path": "/OUTSIDE"}),
        ("processor_config.json", {"feature_extractor": {"auto_map": "x.Y"}}),
        ("adapter_config.json", {"base_model_name_or_path": "/OUTSIDE"}),
    ],
)
def test_what_a_file_names_elsewhere_is_left_alone(
    tmp_path, monkeypatch, sound, watch, file, content
):
    monkeypatch.chdir(tmp_path)
    outside = shutil.copytree(sound, tmp_path / "outside")
    content = json.dumps(content).replace("/OUTSIDE", str(outside))
    tokens = {"added_tokens": [{"id": 60, "content": "OUTSIDE"}]}
    for name in ("vocab.json", "tokenizer.4.0.0.json"):
        (outside / name).write_text(json.dumps(tokens | {"OUTSIDE": 0}))
    (outside / "config.json").rename(outside / "config.4.json")
    (outside / "model.safetensors").rename(outside / "a.safetensors")
    folder = shutil.copytree(sound, tmp_path / "teacher")
    for path in (outside, folder):
        (path / "x.py").write_text("open('canary', 'w')\nclass Y: pass\n")
    path = folder / file
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(before | json.loads(content)))
    watch[:], _opened[:] = [str(outside)], []
    try:
        source = load_teacher(folder)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        assert str(error).startswith(str(folder))
    else:
        assert source.pieces == VOCAB
        weights = load_file(folder / "model.safetensors")
        assert torch.equal(source.model.head.weight, weights["lm_head.weight"])
    watch.clear()
    assert _opened == []
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "file, key, value, error",
    [
        *(
            ("config.json", key, "owner/x", "the hub's code owner/x")
            for key in ("attn_implementation", "_attn_implementation")
        ),
        (
            *("tokenizer_config.json", "fast_tokenizer_files", ["a.json"]),
            "its tokenizer names other files .fast_tokenizer_files",
        ),
        (
            *("special_tokens_map.json", "vocab_file", "a.json"),
            "its tokenizer names other files .vocab_file",
        ),
    ],
)
def test_what_a_file_may_not_name(tmp_path, sound, file, key, value, error):
    folder = shutil.copytree(sound, tmp_path / "teacher")
    path = folder / file
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(before | {key: value}))
    with pytest.raises(ValueError, match=error):
        load_teacher(folder)
    put_on_hub(folder, tmp_path)
    with pytest.raises(ValueError, match=error):
        load_teacher("some/model")


def test_code_named_by_a_config_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_ctc(tmp_path / "ctc")
    path = tmp_path / "ctc" / "config.json"
    names = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCTC"), "x.Y")
    config = json.loads(path.read_text()) | {"auto_map": names}
    path.write_text(json.dumps(config))
    (tmp_path / "ctc" / "x.py").write_text("open('canary', 'w')\n")
    assert load_teacher(tmp_path / "ctc").kind == "ctc"
    assert not (tmp_path / "canary").exists()


def test_a_config_without_end_is_not_read(tmp_path):
    save_ctc(tmp_path)
    with open(tmp_path / "config.json", "r+b") as file:
        file.truncate(2**40)
    with pytest.raises(
        ValueError, match="config.json is damaged: it is longer"
    ):
        load_teacher(tmp_path)


@pytest.mark.parametrize("change", ["missing", "unexpected", "another shape"])
def test_ctc_weights_must_be_all_and_no_others(tmp_path, change):
    save_ctc(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    if change == "missing":
        del weights["lm_head.bias"]
    elif change == "unexpected":
        # A head, but not one of CTC
        weights["lm_head.bias2"] = torch.zeros(1)
    else:
        weights["lm_head.bias"] = torch.zeros(3)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 (of )?{change}: lm_head\.bias"):
        load_teacher(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "vocab.json", "preprocessor_config.json"]
)
def test_a_file_that_a_ctc_model_lacks_is_named(tmp_path, name):
    save_ctc(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        load_teacher(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- no CTC head


def save_whisper(folder, seconds=2):
    config = WhisperConfig(
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=24,
        num_mel_bins=8,
        max_source_positions=50 * seconds,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=8,
        vocab_size=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=2,
    )
    model = scrambled(WhisperForConditionalGeneration(config))
    model.save_pretrained(folder)
    return model


def test_whisper_gives_the_hidden_states_of_the_original(tmp_path):
    original = save_whisper(tmp_path).model.encoder
    source = load_teacher(str(tmp_path))
    assert source.kind == "encoder"
    assert source.pieces is source.blank_index is source.decode is None
    assert source.name == "whisper"
    wavs, wav_lens = noise()
    encoding = source.model(wavs, wav_lens)
    # Half the frames that begin in the speech, rounded up
    assert encoding.lengths.tolist() == [30, 21, 10, 3]
    assert encoding.logits.shape == (4, 30, 0)
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    for wav, samples, hidden, length in zip(
        wavs, SAMPLES, encoding.hidden, encoding.lengths, strict=True
    ):
        x = extractor(
            wav[:samples].numpy(), sampling_rate=16000, return_tensors="pt"
        )["input_features"]
        expected = original(x).last_hidden_state[0, :length]
        torch.testing.assert_close(
            hidden[:length], expected, rtol=1e-3, atol=1e-4
        )
    targets = Teacher(source.model, ["encoder", "encoder.layers.0"])(
        wavs, wav_lens
    )
    assert targets.hidden.shape == (4, 30, 32)
    assert targets.posteriors.shape == (4, 30, 0)


@pytest.mark.parametrize("head", [None, "pretraining", "ctc"])
def test_an_encoder_is_loaded_with_and_without_its_head(tmp_path, head):
    if head == "ctc":
        original = save_ctc(tmp_path)[0]
    else:
        cls = Wav2Vec2Model if head is None else Wav2Vec2ForPreTraining
        config = Wav2Vec2Config(**TINY, proj_codevector_dim=4, codevector_dim=4)
        original = scrambled(cls(config))
        original.save_pretrained(tmp_path)
        Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    kind = "encoder" if head == "ctc" else None
    source = load_teacher(tmp_path, kind=kind)
    assert (source.kind, source.pieces) == ("encoder", None)
    wavs, _ = noise()
    x, _ = source.model.features(wavs[:1], torch.ones(1))
    hidden, logits, _ = source.model(wavs[:1], torch.ones(1))
    assert logits.shape == (1, 29, 0)
    expected = original.base_model(x).last_hidden_state
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)


def test_a_model_without_a_ctc_head_is_not_taken_for_one(tmp_path):
    Wav2Vec2Model(Wav2Vec2Config(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"2 missing: lm_head\.bias"):
        load_teacher(tmp_path, kind="ctc")


# ------------------------------------------------------------- a finished run


def save_run(folder):
    folder.mkdir(exist_ok=True)
    manifest = folder / "train.csv"
    manifest.write_text("ID,wrd\na,ONE TWO\n")
    tokenizer = train_tokenizer([manifest], folder / runs.TOKENIZER)
    yaml = """
model: !new:tutornet_sb.networks.acoustic_model.AcousticModel
    features: !new:tutornet_sb.networks.acoustic_model.LogMelFeatures
        n_mels: 16
    encoder: !new:tutornet_sb.networks.recurrent.RecurrentEncoder
        input_size: 16
        channels: 4
        hidden_size: 3
        layers: 1
    head: !new:torch.nn.Linear
        in_features: 6
        out_features: 29
"""
    (folder / runs.MODEL_YAML).write_text(yaml)
    model = scrambled(load_hyperpyyaml(yaml)["model"])
    torch.save(model.state_dict(), folder / runs.WEIGHTS)
    write_json(folder / runs.RESULTS, {"student": "lstm"})
    return model, tokenizer


def test_a_finished_run_is_a_teacher(tmp_path):
    original, tokenizer = save_run(tmp_path)
    # As train.py leaves it there too
    (tmp_path / "hyperparams.yaml").write_text("a: 1\n")
    source = load_teacher(tmp_path)
    assert (source.name, source.kind) == ("lstm", "run")
    assert source.pieces == pieces(tokenizer)
    assert (source.blank_index, source.model.features.sample_rate) == (0, 16000)
    assert source.decode(tokenizer.encode("TWO ONE")) == "TWO ONE"
    wavs, wav_lens = noise()
    assert torch.equal(
        source.model(wavs, wav_lens).logits, original(wavs, wav_lens).logits
    )


def test_an_unfinished_run_is_no_teacher(tmp_path):
    save_run(tmp_path)
    (tmp_path / runs.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="no finished run"):
        load_teacher(tmp_path)


# -------------------------------------------------- EncoderASR of SpeechBrain

HYPERPARAMS = """
sample_rate: {sample_rate}
features: !new:speechbrain.lobes.features.Fbank
    sample_rate: {sample_rate}
    n_mels: 12
normalize: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
enc: !new:speechbrain.nnet.containers.Sequential
    input_shape: [null, null, 12]
    conv: !name:speechbrain.nnet.CNN.Conv1d
        out_channels: 10
        kernel_size: 3
        stride: {stride}
    rnn: !name:speechbrain.nnet.RNN.LSTM
        hidden_size: 7
        bidirectional: True
ctc_lin: !new:speechbrain.nnet.linear.Linear
    input_size: 14
    n_neurons: {outputs}
log_softmax: !new:speechbrain.nnet.activations.Softmax
    apply_log: True
encoder: !new:speechbrain.nnet.containers.LengthsCapableSequential
    features: !ref <features>
    normalize: !ref <normalize>
    enc: !ref <enc>
    ctc_lin: !ref <ctc_lin>
    log_softmax: !ref <log_softmax>
asr: !new:torch.nn.ModuleList
    - [!ref <enc>, !ref <ctc_lin>]
tokenizer: {tokenizer}
modules:
    encoder: !ref <encoder>
decoding_function: {decoding}
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        asr: !ref <asr>
        tokenizer: !ref <tokenizer>
    paths:
        asr: somebody/on-the-hub/asr.ckpt
        tokenizer: !ref {tokenizer_path}
"""
GREEDY = """!name:speechbrain.decoders.ctc_greedy_decode
    blank_id: 0"""
SENTENCE_PIECE = "!new:sentencepiece.SentencePieceProcessor"
TEXT_ENCODER = "!new:speechbrain.dataio.encoder.CTCTextEncoder"


def save_encoder_asr(
    folder,
    tokenizer=SENTENCE_PIECE,
    decoding=GREEDY,
    stride=2,
    sample_rate=16000,
    outputs=29,
):
    folder.mkdir(exist_ok=True)
    file = "tokenizer.model" if "piece" in tokenizer else "labels.txt"
    text = HYPERPARAMS.format(
        sample_rate=sample_rate,
        stride=stride,
        tokenizer=tokenizer,
        decoding=decoding,
        outputs=outputs,
        tokenizer_path=f"somebody/on-the-hub/{file}",
    )
    (folder / "hyperparams.yaml").write_text(text)
    asr = scrambled(load_hyperpyyaml(text)["asr"])
    torch.save(asr.state_dict(), folder / "asr.ckpt")
    if "piece" in tokenizer:
        manifest = folder / "train.csv"
        manifest.write_text("ID,wrd\na,ONE TWO\n")
        train_tokenizer([manifest], folder / file)
    else:
        labels = CTCTextEncoder()
        labels.insert_blank(index=0)
        labels.update_from_iterable(["T", "O", " ", "N"], False)
        labels.save(str(folder / file))
    return folder


def original_asr(folder, work):
    """The folder, loaded as SpeechBrain does it."""
    text = (folder / "hyperparams.yaml").read_text()
    work.mkdir()
    for path in folder.iterdir():
        (work / path.name).write_bytes(path.read_bytes())
    text = text.replace("somebody/on-the-hub", str(work))
    (work / "hyperparams.yaml").write_text(text)
    return EncoderASR.from_hparams(source=str(work), savedir=str(work / "s"))


@pytest.mark.parametrize(
    ("stride", "sample_rate"), [(1, 16000), (2, 16000), (3, 8000), (4, 16000)]
)
def test_an_encoder_asr_gives_the_posteriors_of_the_original(
    tmp_path, stride, sample_rate
):
    folder = save_encoder_asr(
        tmp_path / "asr", stride=stride, sample_rate=sample_rate
    )
    original = original_asr(folder, tmp_path / "copy")
    source = load_trusted(folder)
    assert (source.name, source.kind) == ("Sequential", "encoder_asr")
    assert (source.model.features.sample_rate, source.blank_index) == (
        sample_rate,
        0,
    )
    assert source.model.frame_period == pytest.approx(0.01 * stride)
    wavs, wav_lens = noise()
    wavs = torch.cat([wavs, torch.ones(4, 999)], dim=1)
    wav_lens = SAMPLES / wavs.shape[1]
    teacher = Teacher(source.model, ["encoder", "encoder.pipeline.enc.conv"])
    assert teacher.hidden_sizes == [14, 10]
    # What stands in the padding does not matter.
    targets, encoding = teacher(wavs, wav_lens), source.model(wavs, wav_lens)
    for index, samples in enumerate(SAMPLES):
        alone = wavs[index : index + 1, :samples]
        expected = original.encode_batch(alone, torch.ones(1))[0]
        frames = len(expected)
        assert targets.lengths[index] == encoding.lengths[index] == frames
        torch.testing.assert_close(
            torch.log_softmax(encoding.logits[index, :frames], -1),
            expected,
            rtol=1e-4,
            atol=1e-5,
        )
        torch.testing.assert_close(
            targets.posteriors[index, :frames],
            expected.exp(),
            rtol=1e-4,
            atol=1e-5,
        )
        hidden = targets.hidden[index, :frames]
        # The hidden representation is the input of the CTC head.
        torch.testing.assert_close(
            source.model.head(hidden[:, :14]).softmax(-1),
            expected.exp(),
            rtol=1e-4,
            atol=1e-5,
        )
        torch.testing.assert_close(
            hidden, teacher(alone, torch.ones(1)).hidden[0]
        )
    assert targets.hidden.shape == (4, max(targets.lengths), 24)


def test_the_symbols_of_an_encoder_asr(tmp_path):
    source = load_trusted(save_encoder_asr(tmp_path / "a"))
    tokenizer = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "a" / "tokenizer.model")
    )
    assert source.pieces == pieces(tokenizer)
    assert source.decode(tokenizer.encode("TWO ONE")) == "TWO ONE"

    folder = save_encoder_asr(tmp_path / "b", tokenizer=TEXT_ENCODER, outputs=7)
    source = load_trusted(folder)
    expected = ["<blank>", "T", "O", " ", "N", "<unused 5>", "<unused 6>"]
    assert source.pieces == expected
    assert source.decode([1, 2, 3, 2, 4]) == "TO ON"

    folder = save_encoder_asr(tmp_path / "c", tokenizer=TEXT_ENCODER, outputs=3)
    with pytest.raises(ValueError, match="5 symbols for 3 outputs"):
        load_trusted(folder)


@pytest.mark.parametrize(
    ("decoding", "expected"),
    [
        # SpeechBrain's own default: the last
        ("!name:speechbrain.decoders.ctc_greedy_decode", 28),
        (GREEDY.replace("0", "3"), 3),
        (
            "!name:speechbrain.decoders.ctc.CTCBeamSearcher\n"
            "test_beam_search: {blank_index: 4}",
            4,
        ),
        ("!name:speechbrain.decoders.ctc.CTCBeamSearcher", None),
    ],
)
def test_the_blank_is_that_of_the_decoding(tmp_path, decoding, expected):
    folder = save_encoder_asr(tmp_path / "asr", decoding=decoding)
    if expected is None:
        with pytest.raises(ValueError, match="names no blank"):
            load_trusted(folder)
    else:
        assert load_trusted(folder).blank_index == expected


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_the_weights_of_an_encoder_asr_must_be_all_and_no_others(
    tmp_path, change
):
    folder = save_encoder_asr(tmp_path / "asr")
    weights = torch.load(folder / "asr.ckpt")
    if change == "missing":
        del weights["1.w.bias"]
    elif change == "unexpected":
        weights["1.w.bias2"] = torch.zeros(1)
    else:
        weights["1.w.bias"] = torch.zeros(3)
    torch.save(weights, folder / "asr.ckpt")
    match = r"asr\.ckpt holds the weights of another network.*1\.w\.bias"
    with pytest.raises(ValueError, match=match):
        load_trusted(folder)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("        asr: !ref <asr>\n", "", "does not load .* parameters .* enc"),
        ("decoding_function:", "decoding:", "has no 'decoding_function'"),
        ("    encoder: !ref <encoder>", "    a: 1", "has no 'encoder'"),
        ("!ref <asr>", "!ref <bsr>", "cannot be loaded .*bsr"),
        ("    log_softmax: !ref <log_softmax>\n", "", None),
        (
            "    log_softmax: !ref <log_softmax>\n",
            "    more: !new:torch.nn.Tanh\n",
            "no linear layer whose softmax",
        ),
    ],
)
def test_a_description_that_is_not_of_an_encoder_asr(tmp_path, old, new, error):
    folder = save_encoder_asr(tmp_path / "asr")
    path = folder / "hyperparams.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    if error is None:
        # Logits instead of log-probabilities do as well.
        assert load_trusted(folder).model.head.out_features == 29
    else:
        with pytest.raises(ValueError, match=error):
            load_trusted(folder)


@pytest.mark.parametrize("content", [None, b"damaged"])
def test_a_file_of_an_encoder_asr_is_missing_or_damaged(tmp_path, content):
    folder = save_encoder_asr(tmp_path / "asr")
    path = folder / "hyperparams.yaml"
    # Else it would be looked for on the hub.
    text = path.read_text().replace("asr: somebody/on-the-hub/asr.ckpt", "{}")
    path.write_text(text.replace("        {}\n", ""))
    (folder / "asr.ckpt").unlink()
    if content is None:
        with pytest.raises(FileNotFoundError, match=r"has no asr\.ckpt"):
            load_trusted(folder)
    else:
        (folder / "asr.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=r"asr\.ckpt cannot be read"):
            load_trusted(folder)


# ----------------------------------------------------------- what is no teacher


def test_what_is_no_teacher_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub"):
        load_teacher(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot be loaded: it has neither"):
        load_teacher(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="type bert; .*teachers: wav2vec2"):
        load_teacher(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_teacher(tmp_path)


def test_a_wrong_kind_is_refused(tmp_path):
    save_whisper(tmp_path)
    with pytest.raises(ValueError, match="type whisper; .*: wav2vec2, hubert"):
        load_teacher(tmp_path, kind="ctc")
    with pytest.raises(FileNotFoundError, match="no finished run"):
        load_teacher(tmp_path, kind="run")
    with pytest.raises(FileNotFoundError, match=r"has no hyperparams\.yaml"):
        load_trusted(tmp_path, kind="encoder_asr")
    with pytest.raises(ValueError, match="a revision .main. is of a hub id"):
        load_teacher(tmp_path, revision="main")


# ------------------------------------------------------------------------- hub


def put_on_hub(folder, tmp_path, name="some/model", commit="c" * 40):
    """Lay a folder where a download from the hub would lie."""
    repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir(exist_ok=True)
    folder.rename(repository / "snapshots" / commit)


def test_a_hub_id_is_loaded_at_its_revision(tmp_path):
    commits = ["a" * 40, "b" * 40]
    originals = []
    for seed, commit in enumerate(commits):
        folder = tmp_path / commit
        original, _ = save_ctc(folder)
        scrambled(original, seed + 1).save_pretrained(folder)
        originals.append(original)
        put_on_hub(folder, tmp_path, commit=commit)
    for commit, original in zip(commits, originals, strict=True):
        source = load_teacher("some/model", revision=commit)
        assert source.source == f"some/model@{commit}"
        assert torch.equal(source.model.head.weight, original.lm_head.weight)
    source = load_teacher("some/model")
    assert source.source == "some/model"
    assert torch.equal(source.model.head.weight, originals[1].lm_head.weight)


def test_code_of_an_encoder_asr_runs_only_if_trusted(tmp_path):
    folder = save_encoder_asr(tmp_path / "asr")
    with pytest.raises(ValueError, match="asr is .* run any code.*trust_remo"):
        load_teacher(folder)
    expected = load_trusted(folder).model.head.weight
    put_on_hub(folder, tmp_path)
    with pytest.raises(ValueError, match="can run any code.*trust_remote_code"):
        load_teacher("some/model")
    source = load_teacher("some/model", "c" * 40, trust_remote_code=True)
    assert source.source == "some/model@" + "c" * 40
    assert torch.equal(source.model.head.weight, expected)


def test_a_hub_id_offline_is_one_line():
    for kind in (None, "ctc", "encoder"):
        with pytest.raises(
            ValueError, match="no folder some/model.*cannot be r"
        ):
            load_teacher("some/model", kind=kind)
    with pytest.raises(ValueError, match="no folder some/model.*cannot be r"):
        load_teacher("some/model", kind="encoder_asr", trust_remote_code=True)
    with pytest.raises(ValueError, match="a run must be a folder"):
        load_teacher("some/model", kind="run")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.RepositoryNotFoundError, "no such repository"),
        (errors.GatedRepoError, "access is restricted"),
        (errors.RevisionNotFoundError, "no revision v9"),
        (errors.HfHubHTTPError, "503 Service Unavailable"),
    ],
)
def test_what_the_hub_refuses_is_one_line(monkeypatch, error, reason):
    def refuse(*args, **kwargs):
        response = SimpleNamespace(headers={}, request=None)
        raise error("503 Service Unavailable\nMore", response=response)

    monkeypatch.setattr(sources, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=f"some/model.*{reason}") as caught:
        load_teacher("some/model", revision="v9")
    assert "\n" not in str(caught.value)


def test_a_hub_id_that_is_no_teacher(tmp_path):
    folder = tmp_path / "readme"
    folder.mkdir()
    (folder / "README.md").write_text("A data set")
    put_on_hub(folder, tmp_path)
    with pytest.raises(ValueError, match="some/model cannot be loaded"):
        load_teacher("some/model")
