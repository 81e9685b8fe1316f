"""Where teachers come from: own runs, exports, SpeechBrain, Hugging Face."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx2
import torch
from huggingface_hub import errors, snapshot_download

from tutornet_sb.corpora.tokenizer import BLANK, decoder, pieces
from tutornet_sb.networks import runs
from tutornet_sb.networks.acoustic_model import AcousticModel
from tutornet_sb.networks.export_folder import (
    CONFIG,
    EXPORT,
    SAFETENSORS,
    load_export,
)
from tutornet_sb.teachers.encoder_asr import HYPERPARAMS, load_encoder_asr
from tutornet_sb.util.errors import InputError, MissingFileError, first_line

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
# No honest config.json is longer.
_MOST_BYTES = 2**24


class TeacherSource(NamedTuple):
    """A teacher's model and its symbols.

    ``name`` is the network: the student's name of a run or an export, the model
    type of Hugging Face (``wav2vec2``), or the class of its largest part.
    ``source`` is a folder, or a hub id with its revision, and ``kind`` one of
    ``KINDS``. The model is in evaluation mode. ``pieces`` are the symbols by
    index, ``blank_index`` is that of CTC, and ``decode`` turns symbol indices,
    repetitions and blanks removed, into text; without a CTC head these three
    are None, and logits have no symbols, ``(batch, frames, 0)``.
    """

    name: str
    source: str
    kind: str
    model: AcousticModel
    pieces: list[str] | None
    blank_index: int | None
    decode: Callable[[list[int]], str] | None

    def describe(self):
        """What ``results.json`` holds of a teacher that is no run."""
        return {
            "name": self.name,
            "source": self.source,
            "kind": self.kind,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }


def load_teacher(source, revision=None, kind=None, trust_remote_code=False):
    """Load a teacher of any kind.

    - ``run``: folder of a finished run of this recipe's ``train.py``;
    - ``export``: folder by ``tutornet export`` of any network, or hub id with
      one, of which only ``config.json`` and ``model.safetensors`` are read;
    - ``encoder_asr``: what SpeechBrain's ``EncoderASR`` loads;
    - ``ctc``: ``Wav2Vec2ForCTC``, ``HubertForCTC`` or ``WavLMForCTC`` of
      Hugging Face transformers;
    - ``encoder``: Whisper's encoder, or wav2vec 2.0, HuBERT or WavLM without
      (or regardless of) a CTC head, for representations only.

    The YAML of an ``encoder_asr`` can run any code, and that of a ``run`` too
    if it names other parts than the recipe's networks have: both require
    `trust_remote_code`.

    The source is a folder, or an id on the Hugging Face hub (not of a ``run``)
    with a revision, of which only a commit never changes. Without `kind`, it is
    recognised by the files. Missing and unexpected weights are errors.
    """
    source = str(source)
    is_folder = Path(source).is_dir()
    if is_folder and revision is not None:
        raise InputError(
            f"{source} is a folder; a revision ({revision}) is of a hub id"
        )
    if not is_folder and not HUB_ID.fullmatch(source):
        raise MissingFileError(
            f"{source} is neither a folder nor a hub id (owner/name)"
        )
    kind = kind or recognise(source, revision)
    try:
        name, model, symbols, blank_index, decode = KINDS[kind](
            source, revision, trust_remote_code
        )
    except InputError:
        raise
    # Of the networks, whose modules also run where this package is not
    except ValueError as error:
        raise InputError(str(error)) from error
    if symbols is not None:
        outputs = model.head.out_features
        if len(symbols) > outputs:
            raise InputError(
                f"{source} has {len(symbols)} symbols for {outputs} outputs"
            )
        # Outputs that no symbol was ever trained on.
        symbols += [f"<unused {i}>" for i in range(len(symbols), outputs)]
    return TeacherSource(
        str(name),
        source if revision is None else f"{source}@{revision}",
        kind,
        model.eval(),
        symbols,
        blank_index,
        decode,
    )


def download(source, revision, files=None):
    """Download a hub id, or those of some files it has; returns the folder.

    It is named after the commit.
    """
    try:
        return snapshot_download(
            source, revision=revision, allow_patterns=files
        )
    except errors.GatedRepoError:
        reason = "access is restricted: ask for it on its page and log in"
    except errors.RepositoryNotFoundError:
        reason = "the hub has no such repository, or it is private: log in"
    except errors.RevisionNotFoundError:
        reason = f"it has no revision {revision}"
    except errors.LocalEntryNotFoundError:
        reason = "the hub cannot be reached, and it is not in the local cache"
    # The last is a connection that is cut.
    except (
        errors.HfHubHTTPError,
        errors.HFValidationError,
        httpx2.HTTPError,
    ) as error:
        reason = first_line(error)
    raise InputError(
        f"there is no folder {source}, and as a hub id it cannot be loaded: "
        + reason
    )


def _folder(source, revision, files=None):
    return Path(
        source if Path(source).is_dir() else download(source, revision, files)
    )


def _find(source, name, revision):
    """Path of a small file of a teacher, or None."""
    small = [CONFIG, HYPERPARAMS, TOKENIZER_CONFIG, SPECIAL_TOKENS]
    path = _folder(source, revision, small) / name
    return path if path.is_file() else None


def _config(source, revision, name=CONFIG):
    path = _find(source, name, revision)
    if path is None:
        return {}
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(f"it is longer than {_MOST_BYTES} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: {name} is damaged: {error}") from None
    return config if isinstance(config, dict) else {}


def recognise(source, revision=None):
    """Kind of a teacher, one of ``KINDS``, by its files."""
    if (Path(source) / runs.MODEL_YAML).is_file():
        return "run"
    config = _config(source, revision)
    if str(config.get("format")).startswith(EXPORT):
        return "export"
    if config.get("model_type") is None:
        if _find(source, HYPERPARAMS, revision) is not None:
            return "encoder_asr"
        raise InputError(
            f"{source} cannot be loaded: it has neither {runs.MODEL_YAML} "
            f"(a run of train.py), {HYPERPARAMS} (EncoderASR of SpeechBrain) "
            f"nor {CONFIG} with a model_type (Hugging Face transformers) or "
            f"the format {EXPORT} (tutornet export)"
        )
    names = config.get("architectures") or []
    is_ctc = any(str(name).endswith("ForCTC") for name in names)
    # Its loader refuses the types that it cannot load.
    return "ctc" if is_ctc else "encoder"


def _load_run(source, revision, trust_remote_code):
    if not Path(source).is_dir():
        raise InputError(f"a run must be a folder, got {source}")
    model, tokenizer = runs.load_run(source, trust_remote_code)
    name = runs.read_results(source).get("student", Path(source).name)
    return name, model, pieces(tokenizer), BLANK, tokenizer.decode


def _load_export(source, revision, trust_remote_code):
    folder = _folder(source, revision, [CONFIG, SAFETENSORS])
    model, symbols, blank_index = load_export(folder, source)
    name = _config(str(folder), None).get("name", Path(source).name)
    return name, model, symbols, blank_index, decoder(symbols)


def _load_encoder_asr(source, revision, trust_remote_code):
    if not trust_remote_code:
        raise InputError(
            f"{source} is described by a {HYPERPARAMS}, which can run any "
            "code on this machine: read it, then allow it by "
            "trust_remote_code (--trust-remote-code), and from the hub "
            "best with a revision"
        )
    return load_encoder_asr(_folder(source, revision))


# transformers takes seconds to import, so it is imported where it is needed.


def _check_type(source, revision, known):
    if _find(source, CONFIG, revision) is None:
        raise MissingFileError(f"{source} has no {CONFIG}")
    model_type = _config(source, revision).get("model_type")
    if model_type not in known:
        raise InputError(
            f"{source} is of type {model_type}; of this kind, these can be "
            "teachers: " + ", ".join(known)
        )
    return model_type


def _read(cls, source, revision, file):
    """Load a tokenizer or the like, with a clear error if it fails."""
    try:
        return cls.from_pretrained(source, revision=revision)
    # A missing file raises all kinds of errors.
    except Exception as error:
        raise InputError(
            f"{source} has no readable {file}: {first_line(error)}"
        ) from None


def _waveform(source, revision):
    from transformers import Wav2Vec2FeatureExtractor

    from tutornet_sb.networks.huggingface import Waveform

    extractor = _read(
        Wav2Vec2FeatureExtractor, source, revision, "preprocessor_config.json"
    )
    return Waveform(extractor.sampling_rate, extractor.do_normalize)


def _refuse_ways_out(source, revision):
    """Refuse files of a tokenizer that may lead to others elsewhere.

    transformers opens whatever these keys name.
    """
    config = _config(source, revision, TOKENIZER_CONFIG)
    special = _config(source, revision, SPECIAL_TOKENS)
    found = [key for key in config if key == "fast_tokenizer_files"]
    found += [key for key in special if key.endswith("_file")]
    if found:
        raise InputError(
            f"{source}: its tokenizer names other files ({', '.join(found)} in "
            f"{TOKENIZER_CONFIG} or {SPECIAL_TOKENS}), which it does not need: "
            "remove that"
        )


def _load_ctc(source, revision, trust_remote_code):
    from transformers import AutoModelForCTC, Wav2Vec2CTCTokenizer

    from tutornet_sb.networks import huggingface

    name = _check_type(source, revision, huggingface.WAVEFORM_TYPES)
    _refuse_ways_out(source, revision)
    network = huggingface.load_published(AutoModelForCTC, source, revision)
    tokenizer = _read(Wav2Vec2CTCTokenizer, source, revision, "vocab.json")
    if tokenizer.pad_token_id is None:
        raise InputError(
            f"the tokenizer of {source} names no pad_token, which is the blank"
        )
    outputs = network.lm_head.out_features
    by_index = {index: piece for piece, index in tokenizer.get_vocab().items()}
    symbols = [by_index.get(i, f"<unused {i}>") for i in range(outputs)]
    model = AcousticModel(
        _waveform(source, revision),
        huggingface.Wav2Vec2Encoder(network.base_model),
        network.lm_head,
    )

    def decode(ids):
        return tokenizer.decode(
            ids,
            group_tokens=False,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    return name, model, symbols, tokenizer.pad_token_id, decode


class NoHead(torch.nn.Module):
    """The head of a model without symbols, ``(..., dim)`` to ``(..., 0)``."""

    def forward(self, hidden):
        """Return no logits."""
        return hidden[..., :0]


def _load_encoder(source, revision, trust_remote_code):
    from transformers import AutoModel

    from tutornet_sb.networks import huggingface

    known = (*huggingface.WAVEFORM_TYPES, "whisper")
    name = _check_type(source, revision, known)
    network = huggingface.load_published(
        AutoModel, source, revision, heads=huggingface.HEADS
    )
    if name == "whisper":
        encoder = huggingface.WhisperEncoder(network.encoder)
        features = huggingface.WhisperFeatures(network.config.num_mel_bins)
        # 30 s in all published models
        features.window_samples = encoder.window_frames * features.hop_samples
    else:
        encoder = huggingface.Wav2Vec2Encoder(network)
        features = _waveform(source, revision)
    return name, AcousticModel(features, encoder, NoHead()), None, None, None


# What loads each kind, called with a folder or hub id, its revision and whether
# code may run. Returns name, model, symbols, blank and decode of a teacher.
KINDS = {
    "run": _load_run,
    "export": _load_export,
    "encoder_asr": _load_encoder_asr,
    "ctc": _load_ctc,
    "encoder": _load_encoder,
}
