"""Teachers that people already have."""

import functools
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx2
import sentencepiece
import torch
from huggingface_hub import errors, snapshot_download
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.encoder import CTCTextEncoder
from speechbrain.utils.checkpoints import (
    DEFAULT_TRANSFER_HOOKS,
    get_default_hook,
    torch_parameter_transfer,
    torch_patched_state_dict_load,
)

from tutornet_sb.corpora.tokenizer import decoder, pieces
from tutornet_sb.networks import runs
from tutornet_sb.networks.acoustic_model import AcousticModel, OneByOneModel
from tutornet_sb.networks.export_folder import SAFETENSORS, load_export
from tutornet_sb.util.errors import InputError, MissingFileError
from tutornet_sb.util.redaction import first_line, hide_secrets

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CONFIG = "config.json"
HYPERPARAMS = "hyperparams.yaml"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
# The format in the config.json of an export, before the version
EXPORT = "tutornet_sb export"
# No honest config.json is longer.
_MOST_BYTES = 2**24
# Lengths of noise (samples) by which a frame period is measured. They differ by
# a multiple of the strides in use, 5, 10, 20, 30, 40 and 80 ms at 8 or 16 kHz.
PROBE_SAMPLES = (16000, 54400)


class TeacherSource(NamedTuple):
    """A teacher's model and what its symbols mean.

    Attributes
    ----------
    name : str
        Folder, or hub id with its revision.
    kind : str
        One of ``KINDS``.
    model : AcousticModel
        In evaluation mode. Without a CTC head, its logits have no symbols,
        ``(batch, frames, 0)``.
    pieces : list of str or None
        Symbols by index, None without a CTC head.
    blank_index : int or None
        Index of the blank of CTC.
    decode : Callable or None
        From a list of symbol indices, repetitions and blanks removed, to text.
    sample_rate : int
        Sample rate that the teacher expects (Hz).
    """

    name: str
    kind: str
    model: AcousticModel
    pieces: list[str] | None
    blank_index: int | None
    decode: Callable[[list[int]], str] | None
    sample_rate: int

    def describe(self):
        """What results and model cards say of it."""
        return {
            "name": Path(self.name.partition("@")[0]).name,
            "source": self.name,
            "kind": self.kind,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }


def load_teacher(source, revision=None, kind=None, trust_remote_code=False):
    """Load a teacher of any kind.

    - ``run``: folder of a finished run of this recipe's ``train.py``;
    - ``encoder_asr``: what SpeechBrain's ``EncoderASR`` loads;
    - ``export``: folder by ``tutornet export`` of any network, or hub id with
      one, of which ``config.json`` and ``model.safetensors`` are read alone;
    - ``ctc``: ``Wav2Vec2ForCTC``, ``HubertForCTC`` or ``WavLMForCTC`` of
      Hugging Face transformers;
    - ``encoder``: Whisper's encoder, or wav2vec 2.0, HuBERT or WavLM without
      (or regardless of) a CTC head, for representations only.

    The YAML of an ``encoder_asr`` can run any code, and that of a ``run`` too
    if it names other parts than the recipe's networks have: both ask for
    `trust_remote_code`.

    Arguments
    ---------
    source : str or pathlib.Path
        Folder, or id on the Hugging Face hub (not of a ``run``).
    revision : str, optional
        Commit, tag or branch of a hub id. Only a commit is the same teacher
        for ever.
    kind : str, optional
        One of the above; by default, recognised by the files.
    trust_remote_code : bool
        Whether code that comes with the model may run.

    Returns
    -------
    TeacherSource
        The teacher.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or a file is missing in it.
    ValueError
        If it is none of these or cannot be loaded whole: damaged, with missing
        or unexpected weights, not to be had from the hub.
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
    if kind is None:
        kind = recognise(source, revision)
    if kind not in KINDS:
        raise InputError(
            f"no kind of teacher is called {kind!r}; there are "
            + ", ".join(KINDS)
        )
    folder = source
    if kind == "run" and not is_folder:
        raise InputError(f"a run must be a folder, and {source} is none")
    if kind == "encoder_asr":
        if not trust_remote_code:
            raise InputError(
                f"{source} is described by a {HYPERPARAMS}, which can run any "
                "code on this machine: read it, then allow it by "
                "trust_remote_code (--trust-remote-code), and from the hub "
                "best with a revision"
            )
        if not is_folder:
            folder = download(source, revision)
    load = KINDS[kind]
    if kind == "run":
        load = functools.partial(load, trust_remote_code=trust_remote_code)
    try:
        model, symbols, blank_index, decode = load(folder, revision)
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
    name = source if revision is None else f"{source}@{revision}"
    return TeacherSource(
        name,
        kind,
        model.eval(),
        symbols,
        blank_index,
        decode,
        model.features.sample_rate,
    )


def download(source, revision, files=None):
    """Download the files of a hub id, or say in one line why not.

    Arguments
    ---------
    source : str
        Hub id, owner/name.
    revision : str or None
        Commit, tag or branch.
    files : list of str, optional
        Which files, those of them that are there; by default, all.

    Returns
    -------
    str
        The folder with the files. It is named after the commit.

    Raises
    ------
    ValueError
        If they cannot be had.
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
    except (
        errors.HfHubHTTPError,
        errors.HFValidationError,
        # A connection that is cut
        httpx2.HTTPError,
    ) as error:
        reason = hide_secrets(str(error).strip().partition("\n")[0])
    raise InputError(
        f"there is no folder {source}, and as a hub id it cannot be loaded: "
        + reason
    )


def _find(source, name, revision):
    """Path of a small file of a teacher, or None."""
    folder = source
    if not Path(source).is_dir():
        folder = download(
            source,
            revision,
            [CONFIG, HYPERPARAMS, TOKENIZER_CONFIG, SPECIAL_TOKENS],
        )
    path = Path(folder) / name
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
    """Tell by its files of which kind a teacher is.

    Arguments
    ---------
    source : str
        Folder or hub id.
    revision : str, optional
        Of a hub id.

    Returns
    -------
    str
        One of ``KINDS``.

    Raises
    ------
    ValueError
        If it is of none, or cannot be had.
    """
    if (Path(source) / runs.MODEL_YAML).is_file():
        return "run"
    config = _config(source, revision)
    if str(config.get("format")).startswith(EXPORT):
        return "export"
    model_type = config.get("model_type")
    if model_type is None:
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
    # It refuses the types that it cannot load.
    return "ctc" if is_ctc else "encoder"


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


def _load_run(folder, revision, trust_remote_code):
    model, tokenizer = runs.load_run(folder, trust_remote_code)
    return model, pieces(tokenizer), 0, tokenizer.decode


# transformers takes seconds to import, so it is where it is needed.


def _read(cls, source, revision, file):
    """Load a tokenizer or the like, with one clear line if it fails."""
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

    transformers opens what these keys name, wherever it lies.
    """
    config = _config(source, revision, TOKENIZER_CONFIG)
    special = _config(source, revision, SPECIAL_TOKENS)
    found = [key for key in config if key == "fast_tokenizer_files"]
    found += [key for key in special if key.endswith("_file")]
    if found:
        raise InputError(
            f"{source}: its tokenizer names other files ({', '.join(found)} in "
            f"{TOKENIZER_CONFIG} or {SPECIAL_TOKENS}): one like it needs none, "
            "so take that out"
        )


def _load_ctc(source, revision):
    from transformers import AutoModelForCTC, Wav2Vec2CTCTokenizer

    from tutornet_sb.networks import huggingface

    _check_type(source, revision, huggingface.WAVEFORM_TYPES)
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

    return model, symbols, tokenizer.pad_token_id, decode


class NoHead(torch.nn.Module):
    """The head of a model without symbols.

    Example
    -------
    >>> tuple(NoHead()(torch.zeros(2, 5, 8)).shape)
    (2, 5, 0)
    """

    def forward(self, hidden):
        """Give no logits.

        Arguments
        ---------
        hidden : torch.Tensor
            ``(batch, frames, dim)``.

        Returns
        -------
        torch.Tensor
            ``(batch, frames, 0)``.
        """
        return hidden[..., :0]


def _load_encoder(source, revision):
    from transformers import AutoModel

    from tutornet_sb.networks import huggingface

    known = (*huggingface.WAVEFORM_TYPES, "whisper")
    model_type = _check_type(source, revision, known)
    network = huggingface.load_published(
        AutoModel, source, revision, heads=huggingface.HEADS
    )
    if model_type == "whisper":
        encoder = huggingface.WhisperEncoder(network.encoder)
        features = huggingface.WhisperFeatures(network.config.num_mel_bins)
        # 30 s in all published models
        features.window_samples = encoder.window_frames * features.hop_samples
    else:
        encoder = huggingface.Wav2Vec2Encoder(network)
        features = _waveform(source, revision)
    return AcousticModel(features, encoder, NoHead()), None, None, None


class PipelineEncoder(torch.nn.Module):
    """The pipeline of an ``EncoderASR`` up to its CTC head.

    SpeechBrain's pipelines go from waveform to log-probabilities in one. The
    hidden representation is the input of the last linear layer, found by a
    trial on noise, which also measures the frame period. Padding would change
    the output, for SpeechBrain's own containers drop the lengths.

    Arguments
    ---------
    pipeline : torch.nn.Module
        Called as ``(wavs, wav_lens)``, in evaluation mode.

    Raises
    ------
    ValueError
        If it is no such pipeline.

    Example
    -------
    >>> from speechbrain.lobes.features import Fbank
    >>> from speechbrain.nnet.containers import LengthsCapableSequential
    >>> linear = torch.nn.Linear(40, 5)
    >>> pipeline = LengthsCapableSequential(
    ...     Fbank(n_mels=40), torch.nn.ReLU(), linear, torch.nn.LogSoftmax(-1)
    ... )
    >>> encoder = PipelineEncoder(pipeline)
    >>> encoder.stride, encoder.output_size, encoder.head is linear
    (160.0, 40, True)
    """

    def __init__(self, pipeline):
        super().__init__()
        self.pipeline = pipeline
        generator = torch.Generator().manual_seed(0)
        outputs = []
        for samples in PROBE_SAMPLES:
            wavs = 0.1 * torch.randn(1, samples, generator=generator)
            calls, output = self._trial(wavs)
            outputs.append(output)
        shapes = [tuple(output.shape) for output in outputs]
        if any(len(shape) != 3 for shape in shapes):
            raise InputError(
                "the encoder must give (batch, frames, symbols), and gives "
                f"{shapes[0]}"
            )
        self.stride = (PROBE_SAMPLES[1] - PROBE_SAMPLES[0]) / (
            shapes[1][1] - shapes[0][1]
        )
        # The last layer from which the output follows by a softmax
        wanted = torch.log_softmax(output, -1)
        self._head = None
        for path, layer, hidden in reversed(calls):
            if layer.out_features == wanted.shape[-1]:
                found = torch.log_softmax(layer(hidden), -1)
                if found.shape == wanted.shape and torch.allclose(
                    found, wanted, atol=1e-4
                ):
                    self._head = path
                    self.output_size = layer.in_features
                    break
        if self._head is None:
            raise InputError(
                "the encoder has no linear layer whose softmax is its output"
            )

    @property
    def head(self):
        """The CTC head, a layer of the pipeline."""
        return self.pipeline.get_submodule(self._head)

    @torch.no_grad()
    def _trial(self, wavs):
        calls, handles = [], []
        for path, layer in self.pipeline.named_modules():
            if isinstance(layer, torch.nn.Linear):

                def keep(layer, inputs, path=path):
                    calls.append((path, layer, inputs[0]))

                handles.append(layer.register_forward_pre_hook(keep))
        try:
            output = self.pipeline(wavs, torch.ones(1))
        finally:
            for handle in handles:
                handle.remove()
        return calls, output

    def forward(self, x, lengths):
        """Encode a batch of waveforms of one length.

        Arguments
        ---------
        x : torch.Tensor
            Waveforms, ``(batch, samples)``, without padding.
        lengths : torch.Tensor
            Not used.

        Returns
        -------
        hidden : torch.Tensor
            ``(batch, frames, output_size)``.
        lengths : torch.Tensor
            Frames of ``hidden``, ``(batch,)``.
        """
        hidden = None

        def keep(layer, inputs):
            nonlocal hidden
            hidden = inputs[0]

        handle = self.head.register_forward_pre_hook(keep)
        try:
            self.pipeline(x, torch.ones(len(x), device=x.device))
        finally:
            handle.remove()
        return hidden, torch.full_like(lengths, hidden.shape[1])


def _load_encoder_asr(folder, revision):
    from tutornet_sb.networks.huggingface import Waveform

    folder = Path(folder)
    if not (folder / HYPERPARAMS).is_file():
        raise MissingFileError(f"{folder} has no {HYPERPARAMS}")
    try:
        with open(folder / HYPERPARAMS, encoding="utf-8") as file:
            hparams = load_hyperpyyaml(file)
    # It can hold anything.
    except Exception as error:
        raise InputError(
            f"{folder / HYPERPARAMS} cannot be loaded "
            f"({type(error).__name__}: {first_line(error)})"
        ) from None
    for key in ("modules", "pretrainer", "tokenizer", "decoding_function"):
        if key not in hparams:
            raise InputError(
                f"{folder / HYPERPARAMS} has no {key!r}, so it is not that of "
                "an EncoderASR"
            )
    if "encoder" not in hparams["modules"]:
        raise InputError(f"{folder / HYPERPARAMS}: modules has no 'encoder'")
    pipeline = hparams["modules"]["encoder"].eval()
    _collect(hparams["pretrainer"], pipeline, folder)

    tokenizer = hparams["tokenizer"]
    if isinstance(tokenizer, CTCTextEncoder):
        symbols = [tokenizer.ind2lab[i] for i in range(len(tokenizer))]

        def decode(ids):
            return "".join(tokenizer.decode_ndim(ids))

    elif isinstance(tokenizer, sentencepiece.SentencePieceProcessor):
        symbols, decode = pieces(tokenizer), tokenizer.decode
    else:
        raise InputError(
            f"{folder}: the tokenizer is a {type(tokenizer).__name__}; a "
            "SentencePieceProcessor or a CTCTextEncoder is needed"
        )
    try:
        encoder = PipelineEncoder(pipeline)
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from None
    sample_rate = hparams.get("sample_rate")
    if sample_rate is None:
        normalizer = hparams.get("audio_normalizer")
        # EncoderASR's own default
        sample_rate = getattr(normalizer, "sample_rate", 16000)
    features = Waveform(sample_rate, normalize=False)
    # Its layers may read the padding of a batch.
    model = OneByOneModel(features, encoder, encoder.head)
    blank_index = _blank_index(hparams, folder) % encoder.head.out_features
    return model, symbols, blank_index, decode


def _collect(pretrainer, pipeline, folder):
    """Load the files of a Pretrainer, strictly and from the folder."""
    for name in pretrainer.loadables:
        # Paths often begin with a hub id, so without its revision.
        file = Path(str(pretrainer.paths.get(name, f"{name}.ckpt"))).name
        if (folder / file).is_file():
            pretrainer.paths[name] = str(folder / file)
        elif name not in pretrainer.paths:
            raise MissingFileError(f"{folder} has no {file}")
    loaded = set()
    for name, thing in pretrainer.loadables.items():
        if isinstance(thing, torch.nn.Module):
            loaded.update(thing.parameters())
            hook = get_default_hook(thing, DEFAULT_TRANSFER_HOOKS)
            if hook is torch_parameter_transfer:
                pretrainer.custom_hooks.setdefault(name, _load_strictly)
    forgotten = [
        name
        for name, parameter in pipeline.named_parameters()
        if parameter not in loaded and not _is_published(pipeline, name)
    ]
    if forgotten:
        raise InputError(
            f"{folder / HYPERPARAMS}: the pretrainer does not load "
            f"{len(forgotten)} parameters of the encoder, such as "
            + forgotten[0]
        )
    pretrainer.set_collect_in(None)
    pretrainer.collect_files()
    pretrainer.load_collected()


def _is_published(pipeline, name):
    # Loaded from the hub when it was made.
    from speechbrain.integrations.huggingface.huggingface import (
        HFTransformersInterface,
    )

    path, layers = "", [pipeline]
    for part in name.split(".")[:-1]:
        path = f"{path}.{part}" if path else part
        layers.append(pipeline.get_submodule(path))
    return any(isinstance(layer, HFTransformersInterface) for layer in layers)


def _load_strictly(module, path):
    try:
        weights = torch_patched_state_dict_load(path)
    # The kinds of damage raise all kinds of errors.
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as model weights "
            f"({type(error).__name__}: {first_line(error)})"
        ) from None
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        faults = " ".join(str(error).split()[:40])
        raise InputError(
            f"{path} holds the weights of another network: {faults}"
        ) from None


def _load_export(source, revision):
    folder = source
    if not Path(source).is_dir():
        folder = download(source, revision, [CONFIG, SAFETENSORS])
    model, symbols, blank_index = load_export(Path(folder), source)
    return model, symbols, blank_index, decoder(symbols)


def _blank_index(hparams, folder):
    function = hparams["decoding_function"]
    parameters = inspect.signature(function).parameters
    options = hparams.get("test_beam_search") or {}
    for name in ("blank_id", "blank_index"):
        # A beam searcher's class has it in the options beside it.
        if name in options and not isinstance(function, functools.partial):
            return options[name]
        default = getattr(parameters.get(name), "default", inspect._empty)
        if default is not inspect._empty:
            return default
    raise InputError(
        f"{folder / HYPERPARAMS} names no blank: decoding_function has neither "
        "blank_id nor blank_index"
    )


# Kinds of teachers, and what loads each from a folder or hub id and revision
KINDS = {
    "run": _load_run,
    "export": _load_export,
    "encoder_asr": _load_encoder_asr,
    "ctc": _load_ctc,
    "encoder": _load_encoder,
}
