"""wav2vec 2.0, HuBERT, WavLM and Whisper encoders, by transformers.

The networks are transformers' own, not SpeechBrain's wrappers of them
(``speechbrain.integrations.huggingface``, version 1.1.2): these need published
weights, load them without a check, and let an utterance's result depend on the
others of its batch.
"""

import json
import math
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, WhisperFeatureExtractor
from transformers.models.whisper import modeling_whisper
from transformers.utils.logging import disable_progress_bar

from tutornet_sb.networks.acoustic_model import frame_mask, valid_counts
from tutornet_sb.util.errors import first_line

WAVEFORM_TYPES = ("wav2vec2", "hubert", "wavlm")
# Keys that decide a network's output, so must be as in the published weights.
# Regularisation, heads and the like may differ.
ARCHITECTURE = (
    # wav2vec 2.0, HuBERT, WavLM
    "hidden_size num_hidden_layers num_attention_heads intermediate_size "
    "hidden_act layer_norm_eps conv_dim conv_stride conv_kernel conv_bias "
    "feat_extract_norm feat_extract_activation feat_proj_layer_norm "
    "num_conv_pos_embeddings num_conv_pos_embedding_groups conv_pos_batch_norm "
    "do_stable_layer_norm num_buckets max_bucket_distance add_adapter "
    "adapter_attn_dim "
    # Whisper
    "d_model encoder_layers encoder_attention_heads encoder_ffn_dim "
    "num_mel_bins max_source_positions activation_function scale_embedding"
).split()
# Heads of CTC and of pretraining, in the files of many published encoders
HEADS = ("lm_head.", "quantizer.", "project_hid.", "project_q.")
# The vector that replaces masked frames in training. A checkpoint may lack it
# (that of facebook/wav2vec2-base-960h does) or have it without use.
MASK_VECTOR = "masked_spec_embed"
# Greatest log10 energy of an utterance, median over LibriSpeech
LOUDEST = 1.1
# Numbers that are added one by one, see _sum
_BLOCK = 1024


def load_published(auto_class, source, revision=None, heads=()):
    """Load published weights in float32, all of them and nothing else.

    By one of transformers' auto classes; weights whose names begin with one of
    ``heads`` are left out. Raises ValueError if the model cannot be read or the
    weights do not fit it.
    """

    def matters(key):
        return not key.startswith(heads) and not key.endswith(MASK_VECTOR)

    _refuse_ways_out(source)
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        code = str(config._attn_implementation)
        if "/" in code:
            raise ValueError(f"its config.json asks for the hub's code {code}")
        model, report = auto_class.from_pretrained(
            source,
            revision=revision,
            dtype=torch.float32,
            output_loading_info=True,
            # Reported like the others below, with names.
            ignore_mismatched_sizes=True,
        )
    # Missing files, damage and the hub raise all kinds of errors.
    except Exception as error:
        raise ValueError(
            f"{source} cannot be loaded by transformers: {first_line(error)}"
        ) from None
    faults = {
        "missing": report["missing_keys"],
        "unexpected": report["unexpected_keys"],
        "of another shape": [key for key, *_ in report["mismatched_keys"]],
    }
    found = "; ".join(
        f"{len(odd)} {fault}: {', '.join(odd[:3])}"
        for fault, keys in faults.items()
        if (odd := sorted(filter(matters, keys)))
    )
    if found:
        raise ValueError(
            f"the weights of {source} are not those of the "
            f"{type(model).__name__} that its config.json describes: {found}"
        )
    return model


def _refuse_ways_out(folder):
    """Refuse an index of weights that names files elsewhere."""
    for path in sorted(Path(folder).glob("*.index.json")):
        try:
            names = set(json.loads(path.read_bytes())["weight_map"].values())
            is_odd = any(name != Path(name).name for name in names)
        except Exception:
            is_odd = True
        if is_odd:
            raise ValueError(
                f"{path} is damaged: it names other files than those of its "
                "folder"
            )


def make_network(model_type, source=None, revision=None, **config):
    """Make an encoder of transformers, by values of its configuration.

    ``model_type`` is one of ``WAVEFORM_TYPES`` or ``whisper``; a folder, or a
    hub id and commit, may name weights to start from. The network is still the
    one of ``config``: a ValueError if it has no such key, or the source has
    another architecture.
    """
    if model_type not in (*WAVEFORM_TYPES, "whisper"):
        raise ValueError(
            f"model_type must be one of {', '.join(WAVEFORM_TYPES)} or "
            f"whisper, got {model_type}"
        )
    default = AutoConfig.for_model(model_type)
    for key in config:
        # transformers itself accepts any key.
        if not hasattr(default, key):
            raise ValueError(
                f"the configuration of {model_type} has no {key!r}"
            )
    config = AutoConfig.for_model(model_type, **config)
    if model_type == "whisper":
        network = modeling_whisper.WhisperEncoder(config)
    else:
        network = AutoModel.from_config(config)
    if source is None:
        return network
    published = load_published(AutoModel, source, revision, heads=HEADS)
    theirs = {
        key: value
        for key in ARCHITECTURE
        if (value := _plain(published.config, key)) != _plain(config, key)
    }
    if published.config.model_type != model_type:
        theirs = {"model_type": published.config.model_type}
    if theirs:
        raise ValueError(
            f"{source} is not the network that the YAML describes; to start "
            "from it, set "
            + ", ".join(f"{key}: {value}" for key, value in theirs.items())
        )
    if model_type == "whisper":
        published = published.encoder
    own, weights = network.state_dict(), published.state_dict()
    if MASK_VECTOR in own:
        weights.setdefault(MASK_VECTOR, own[MASK_VECTOR])
    else:
        weights.pop(MASK_VECTOR, None)
    network.load_state_dict(weights)
    return network


def _plain(config, key):
    # JSON gives lists where the defaults are tuples.
    value = getattr(config, key, None)
    return list(value) if isinstance(value, tuple) else value


class Waveform(torch.nn.Module):
    """The waveform itself as features, ``(batch, samples)``.

    Normalised, it has zero mean and unit variance over the valid samples of
    each utterance, as by ``Wav2Vec2FeatureExtractor``: ``do_normalize`` in the
    preprocessor_config.json of published models.
    """

    output_size = 1

    def __init__(self, sample_rate=16000, normalize=True):
        super().__init__()
        self.sample_rate = sample_rate
        self.frame_period = 1 / sample_rate
        self.normalize = normalize

    def forward(self, wavs, wav_lens):
        """Return the waveforms, zero on padded samples, and their lengths."""
        wavs, lengths, padded = _cut(wavs, wav_lens)
        if self.normalize:
            wavs = _centre(wavs, lengths, padded)
            count = lengths.clamp(min=1).unsqueeze(1)
            variance = _sum(wavs.square()) / count
            wavs = wavs / torch.sqrt(variance + 1e-7)
        return wavs, lengths


def _cut(wavs, wav_lens):
    lengths = valid_counts(wavs, wav_lens)
    padded = ~frame_mask(lengths, wavs.shape[1])
    return wavs.masked_fill(padded, 0.0), lengths, padded


def _centre(wavs, lengths, padded):
    """Subtract the mean of the valid samples of each waveform."""
    mean = _sum(wavs) / lengths.clamp(min=1).unsqueeze(1)
    return (wavs - mean).masked_fill(padded, 0.0)


def _sum(x):
    """Sum over the last axis, kept, in blocks.

    onnxruntime adds one by one: of millions, four digits would be left.
    """
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % _BLOCK))
    return x.unflatten(-1, (-1, _BLOCK)).sum(-1).sum(-1, keepdim=True)


class _ValidGroupNorm(torch.nn.GroupNorm):
    """Group normalisation with statistics of the valid frames only."""

    # Valid frames of each utterance, ``(batch,)``; None: without padding
    lengths = None

    def __init__(self, norm):
        super().__init__(norm.num_groups, norm.num_channels, norm.eps)
        self._parameters = norm._parameters

    def forward(self, x):
        if self.lengths is None:
            return super().forward(x)
        valid = frame_mask(self.lengths, x.shape[-1])[:, None, None]
        grouped = x.unflatten(1, (self.num_groups, -1))
        count = self.lengths.clamp(min=1).view(-1, 1, 1, 1) * grouped.shape[2]
        mean = _sum(grouped * valid).sum(2, keepdim=True) / count
        centred = (grouped - mean) * valid
        variance = _sum(centred.square()).sum(2, keepdim=True) / count
        y = (centred * (variance + self.eps).rsqrt()).flatten(1, 2)
        y = y * self.weight.unsqueeze(1) + self.bias.unsqueeze(1)
        return y * valid.squeeze(1)


class Wav2Vec2Encoder(torch.nn.Module):
    """Encoder of the wav2vec 2.0 family, from waveform to 20 ms frames.

    Padding does not change a result. That takes an attention mask, and in
    networks with group normalisation (``feat_extract_norm: group``, the base
    sizes) statistics over the valid samples of each utterance, where
    transformers includes the padding and advises against attention masks.
    Audio shorter than one frame (400 samples, 25 ms) is padded to one.

    ``model`` is as from ``make_network``, without convolutional adapter.
    """

    def __init__(self, model):
        super().__init__()
        config = model.config
        if getattr(config, "add_adapter", False):
            raise ValueError(
                "networks with a convolutional adapter (add_adapter: true) are "
                "not supported: its last frames depend on the padding"
            )
        self.model = model.train()
        self.stride = math.prod(config.conv_stride)
        self.output_size = config.hidden_size
        # Samples under one frame
        self.window = 1
        for kernel, stride in zip(
            config.conv_kernel[::-1], config.conv_stride[::-1], strict=True
        ):
            self.window = (self.window - 1) * stride + kernel
        if config.feat_extract_norm == "group":
            first = model.feature_extractor.conv_layers[0]
            first.layer_norm = _ValidGroupNorm(first.layer_norm)

    def forward(self, x, lengths):
        """Encode ``(batch, samples)``, see ``AcousticModel``."""
        x = torch.nn.functional.pad(x, (0, max(0, self.window - x.shape[1])))
        lengths = lengths.clamp(min=self.window)
        config = self.model.config
        if config.feat_extract_norm == "group":
            norm = self.model.feature_extractor.conv_layers[0].layer_norm
            kernel, stride = config.conv_kernel[0], config.conv_stride[0]
            after = (lengths - kernel) // stride + 1
            # A graph that is traced is for any batch.
            is_padded = torch.jit.is_tracing() or (lengths < x.shape[1]).any()
            norm.lengths = after if is_padded else None
        mask = frame_mask(lengths, x.shape[1]).long()
        hidden = self.model(x, attention_mask=mask).last_hidden_state
        lengths = self.model._get_feat_extract_output_lengths(lengths)
        mask = frame_mask(lengths, hidden.shape[1])
        return hidden.masked_fill(~mask.unsqueeze(-1), 0.0), lengths


class WhisperFeatures(torch.nn.Module):
    """Log-mel energies as Whisper was trained on, in whole windows.

    The values are those of transformers' ``WhisperFeatureExtractor`` (log10,
    clipped 8 below the greatest of the utterance, then scaled), which depend on
    the recording level; normalised, they are those of a recording without
    offset whose greatest value is ``LOUDEST``.

    Called as ``(wavs, wav_lens)``, it returns ``(batch, frames, n_mels)``,
    padded with silence to whole windows of ``window`` seconds, and the frames
    that begin within the speech, ``(batch,)``.
    """

    def __init__(self, n_mels=80, window=30, normalize=False):
        super().__init__()
        self.normalize = normalize
        extractor = WhisperFeatureExtractor(feature_size=n_mels)
        self.sample_rate = extractor.sampling_rate
        self.hop_samples = extractor.hop_length
        self.n_fft = extractor.n_fft
        self.frame_period = self.hop_samples / self.sample_rate
        self.output_size = n_mels
        self.window_samples = round(window * self.sample_rate)
        filters = torch.as_tensor(extractor.mel_filters, dtype=torch.float32)
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, wavs, wav_lens):
        """Compute features and their lengths, see the class."""
        wavs, samples, padded = _cut(wavs, wav_lens)
        if self.normalize:
            wavs = _centre(wavs, samples, padded)
        windows = max(1, -(-wavs.shape[1] // self.window_samples))
        total = windows * self.window_samples
        # Half a transform more, so that the transform mirrors only silence
        padding = total + self.n_fft // 2 - wavs.shape[1]
        wavs = torch.nn.functional.pad(wavs, (0, padding))
        with torch.autocast(wavs.device.type, enabled=False):
            spectrum = torch.stft(
                wavs.float(),
                self.n_fft,
                self.hop_samples,
                window=torch.hann_window(self.n_fft, device=wavs.device),
                return_complex=True,
            )[..., : total // self.hop_samples]
            power = spectrum.abs().square().transpose(1, 2) @ self.filters
            if self.normalize:
                loudest = power.amax(dim=(1, 2), keepdim=True)
                power = power * (10**LOUDEST / loudest.clamp(min=1e-20))
            features = power.clamp(min=1e-10).log10()
        loudest = features.amax(dim=(1, 2), keepdim=True)
        features = (torch.maximum(features, loudest - 8) + 4) / 4
        lengths = (samples + self.hop_samples - 1) // self.hop_samples
        return features, lengths.clamp(min=1)


class WhisperEncoder(torch.nn.Module):
    """Whisper's encoder, from log-mel energies to 20 ms frames.

    Whisper receives windows of 30 s, padded with silence. Longer audio is
    encoded window by window, without overlap. The network's own layers always
    output whole windows: a hidden layer of the length of the speech is
    ``encoder.layers.3`` rather than ``encoder.model.layers.3`` (the last one is
    after the final norm). ``model`` is as from ``make_network``.
    """

    stride = 2

    def __init__(self, model):
        super().__init__()
        self.model = model.train()
        self.output_size = model.config.d_model
        self.window_frames = self.stride * model.config.max_source_positions
        self.layers = torch.nn.ModuleList(
            torch.nn.Identity() for _ in range(model.config.encoder_layers)
        )

    def forward(self, x, lengths):
        """Encode ``(batch, frames, n_mels)``, frames of whole windows."""
        batch, frames, n_mels = x.shape
        if frames % self.window_frames:
            raise ValueError(
                f"the features have {frames} frames, not a multiple of this "
                f"network's {self.window_frames}: window must be "
                "max_source_positions * 0.02 seconds"
            )
        windows = x.reshape(-1, self.window_frames, n_mels).transpose(1, 2)
        hidden_states = self.model(
            windows, output_hidden_states=True
        ).hidden_states
        lengths = (lengths + 1) // self.stride
        longest = int(lengths.max())
        padded = ~frame_mask(lengths, longest).unsqueeze(-1)
        # The first is the input of the first layer.
        for layer, hidden in zip(self.layers, hidden_states[1:], strict=True):
            hidden = hidden.reshape(batch, -1, self.output_size)
            hidden = layer(hidden[:, :longest].masked_fill(padded, 0.0))
        return hidden, lengths
