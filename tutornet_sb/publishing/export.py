"""A run as a folder that SpeechBrain loads, where this package is not.

A network made of parts that SpeechBrain and torch have is written as such, for
``EncoderASR.from_hparams``. Any other goes with its own source: one file,
``custom.py``, by SpeechBrain's convention of ``foreign_class``.
"""

import ast
import hashlib
import importlib.util
import re
import shutil
from io import StringIO
from pathlib import Path

import safetensors.torch
import torch
from ruamel.yaml import YAML

from tutornet_sb.corpora.tokenizer import pieces
from tutornet_sb.experiments.compare import summarize
from tutornet_sb.networks import runs
from tutornet_sb.networks.acoustic_model import (
    FLOOR,
    RANGE,
    AcousticModel,
    LogMelFeatures,
)
from tutornet_sb.networks.description import TAG, describe
from tutornet_sb.networks.export_folder import CONFIG, FORMAT, SAFETENSORS
from tutornet_sb.networks.recurrent import RecurrentEncoder
from tutornet_sb.publishing.licenses import check_license
from tutornet_sb.publishing.model_card import README, model_card
from tutornet_sb.util.environment import require
from tutornet_sb.util.errors import InputError, OccupiedError
from tutornet_sb.util.files import (
    read_json,
    write_folder_atomically,
    write_json,
)

HYPERPARAMS = "hyperparams.yaml"
# SpeechBrain's Pretrainer names what it loads so.
PRETRAINED_TOKENIZER = "tokenizer.ckpt"
SOURCE = "custom.py"
ENCODER_ASR = "speechbrain.inference.ASR.EncoderASR.from_hparams"
FOREIGN_CLASS = "speechbrain.inference.interfaces.foreign_class"

# Values of the experiment that travel along, all stages' and each one's. The
# others say where things lay, or nothing to those who use the model.
SETTINGS = ("lr", "weight_decay", "batch_seconds", "speed_perturb")
STAGE_SETTINGS = {
    "rkd": ("pairs", "frame_weighting", "delay", "head_frames"),
    "skd": (
        "skd_loss",
        "temperature",
        "skd_tolerance",
        "skd_weight",
        "skd_weight_final",
        "ctc_weight",
        "delay",
    ),
    "pseudo": ("min_confidence",),
}
CORPUS_SETTINGS = ("train_splits", "untranscribed_splits", "minilibri")

PACKAGE = __name__.partition(".")[0]
INTERFACE = f"{PACKAGE}.publishing.interface"
# How train.py names a teacher from the hub
HUB_REVISION = re.compile(r"[\w.-]+/[\w.-]+@\S+")

STOCK = """\
# Exact for a waveform alone and for a batch of one length, which needs no
# padding. In any other batch the layers read the padding as silence: backward
# layers read it first, and the frames of shorter waveforms change.
fbank: !new:speechbrain.lobes.features.Fbank
    sample_rate: !ref <sample_rate>
    n_fft: {n_fft}
    n_mels: {n_mels}
    win_length: {win_length:g}
    hop_length: {hop_length:g}
unclipped: !apply:setattr [!ref <fbank.compute_fbanks>, top_db, .inf]
floor: !apply:setattr [!ref <fbank.compute_fbanks>, amin, {floor}]
# From each frame the mean over all frames and bins, loud frames counting most
level: !new:speechbrain.nnet.containers.ConnectBlocks
    input_shape: [1, 1, {n_mels}]
    shortcut_combine_fn: !name:torch.sub
subtracted:
    - !apply:speechbrain.nnet.containers.ConnectBlocks.append
        - !ref <level>
        - !new:speechbrain.nnet.pooling.AttentionPooling
            input_dim: {n_mels}
    - !apply:speechbrain.nnet.containers.ConnectBlocks.append
        - !ref <level>
        - !new:torch.nn.Linear
            in_features: {n_mels}
            out_features: 1
    - !apply:speechbrain.nnet.containers.ConnectBlocks.append
        - !ref <level>
        - !new:torch.nn.Unflatten
            dim: 1
            unflattened_size: [1, 1]
encoder: !new:speechbrain.nnet.containers.LengthsCapableSequential
    difference: !new:speechbrain.nnet.CNN.Conv1d
        out_channels: 1
        kernel_size: 3
        input_shape: [null, null]
        bias: False
        padding_mode: replicate
    fbank: !ref <fbank>
    level: !ref <level>
    clip: !new:torch.nn.Threshold
        threshold: {lowest}
        value: {lowest}
    normalize: !new:speechbrain.nnet.normalization.BatchNorm1d
        input_size: {n_mels}
        affine: False
    conv: !new:speechbrain.nnet.CNN.Conv1d
        in_channels: {n_mels}
        out_channels: {channels}
        kernel_size: {kernel_size}
        stride: {stride}
        bias: False
        padding_mode: constant
    norm: !new:speechbrain.nnet.normalization.BatchNorm1d
        input_size: {channels}
    activation: !new:torch.nn.ReLU
    layers: !new:torch.nn.{cell}
        input_size: {channels}
        hidden_size: {hidden_size}
        num_layers: {layers}
        bidirectional: {bidirectional}
        batch_first: True
    head: !new:torch.nn.Linear
        in_features: {head_size}
        out_features: {output_size}
        bias: {head_bias}
    log_softmax: !new:torch.nn.LogSoftmax
        dim: -1
"""
# From an AcousticModel's names of weights to those of the parts above
RENAMED = (
    (r"features\.fbank\.", "fbank."),
    (r"features\.normalize\.", "normalize.norm."),
    (r"encoder\.conv\.", "conv.conv."),
    (r"encoder\.norm\.", "norm.norm."),
    (
        r"encoder\.layers\.forward_layers\.(\d+)\.rnn\.(\w+)_l0",
        r"layers.\2_l\1",
    ),
    (
        r"encoder\.layers\.backward_layers\.(\d+)\.rnn\.(\w+)_l0",
        r"layers.\2_l\1_reverse",
    ),
)
INTERFACE_YAML = """\
audio_normalizer: !new:speechbrain.dataio.preprocess.AudioNormalizer
    sample_rate: !ref <sample_rate>
tokenizer: !new:sentencepiece.SentencePieceProcessor
decoding_function: !name:speechbrain.decoders.ctc.ctc_greedy_decode
    blank_id: !ref <blank_index>
modules:
    encoder: !ref <encoder>
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        model: !ref <encoder>
        tokenizer: !ref <tokenizer>
    # All weights and no others; otherwise what does not fit is left out.
    custom_hooks:
        model: !name:speechbrain.utils.checkpoints.torch_recovery
            end_of_epoch: True
"""
SOURCE_FILE = '''\
"""The network of this model and its interface, for SpeechBrain's foreign_class.

Written by `tutornet export`. The modules below are imported from this file as
the package {package}, named after what they hold, so that models of
other versions can be loaded beside this one.
"""

import importlib.abc
import importlib.util
import sys

SOURCES = {{
{sources}}}


class Finder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds the modules above."""

    def find_spec(self, name, path=None, target=None):
        if name in SOURCES:
            return importlib.util.spec_from_loader(name, self)

    def is_package(self, name):
        return any(other.startswith(name + ".") for other in SOURCES)

    def get_source(self, name):
        return SOURCES[name]


if "{package}" not in sys.modules:
    sys.meta_path.append(Finder())

from {interface} import CustomInterface  # noqa
'''


def export(
    run,
    folder,
    foreign=False,
    onnx=False,
    int8=False,
    sherpa=False,
    data=None,
    license=None,
    language=None,
):
    """Write a finished run as a folder that stock SpeechBrain loads.

    The folder holds ``hyperparams.yaml`` with the weights and the tokenizer
    that it loads, the run's weights under the model's own names as
    ``model.safetensors``, the tokenizer, and ``config.json``, which describes
    all of it as plain data. ``custom.py`` is there if the network needs it.
    ``README.md`` is the model card.

    Arguments
    ---------
    run : str or pathlib.Path
        Output folder of ``train.py``. Its ``model.yaml`` can run code.
    folder : str or pathlib.Path
        Folder to write. An earlier export there is replaced.
    foreign : bool
        Write ``custom.py`` for a network of stock parts too. In padded batches
        it is exact, which stock parts are not.
    onnx : bool
        Write an ONNX graph too, and what runs it without torch.
    int8 : bool
        That, and the graph quantised.
    sherpa : bool
        Write what sherpa-onnx loads too.
    data : str or pathlib.Path, optional
        The corpus, in LibriSpeech's layout, whose test set these forms are
        compared on; by default the run's own, where it still lies.
    license : str, optional
        Licence of the model, as the Hugging Face hub calls it. By default what
        follows from the corpus, where that is known.
    language : str, optional
        Language of the speech, as an ISO 639 code. By default that of the
        corpus, where it is known.

    Returns
    -------
    dict
        What ``config.json`` holds.

    Raises
    ------
    FileNotFoundError
        If there is no finished run.
    FileExistsError
        If ``folder`` is something else than an earlier export.
    ValueError
        If the run is damaged, the corpus is needed and not there, or the hub
        does not know the licence. If a form cannot be had of this network or
        differs from it: the folder is there then, without that form.
    """
    if onnx or int8 or sherpa:
        require("export")
    run, folder = Path(run), Path(folder)
    if license is not None:
        check_license(license)
    _refuse_to_overwrite(folder, run)
    onnx = onnx or int8
    network = runs.read_network(run)
    model, tokenizer = runs.load_run(run, trust_remote_code=True)
    is_stock = not foreign and _is_stock(model)
    config = {
        "format": FORMAT,
        "name": network.get("name", type(model.encoder).__name__),
        "load_with": ENCODER_ASR if is_stock else FOREIGN_CLASS,
        "sample_rate": model.features.sample_rate,
        "frame_period": model.frame_period,
        "parameters": sum(p.numel() for p in model.parameters()),
        "symbols": pieces(tokenizer),
        # The unknown symbol doubles as the blank: see train_tokenizer.
        "blank_index": tokenizer.unk_id(),
        "student": describe(network["model"]),
        "results": _summary(run),
        "training": _training(run),
        "license": license,
        "language": language,
    }
    speech = None
    if onnx or sherpa:
        # Neither int8 nor what sherpa-onnx makes of a model is exact.
        speech = runs.find_speech(
            run, data, config["results"], model, needed=int8 or sherpa
        )
    if is_stock:
        # The hub's own inference asks for it.
        config["speechbrain_interface"] = "EncoderASR"
    state = {
        name: tensor.detach().clone().contiguous()
        for name, tensor in model.state_dict().items()
    }

    forms, failed = {}, []
    if onnx:
        forms["onnx"] = {"speech": speech, "int8": int8}
    if sherpa:
        forms["sherpa"] = {"speech": speech}

    def write(to):
        # Not by save_file, whose files nobody else may read.
        (to / SAFETENSORS).write_bytes(
            safetensors.torch.save(state, {"format": "pt"})
        )
        for name in (runs.TOKENIZER, PRETRAINED_TOKENIZER):
            shutil.copyfile(run / runs.TOKENIZER, to / name)
        if is_stock:
            text, weights = _stock_yaml(model), _stock_weights(model, state)
        else:
            sources, text = _foreign(network["model"])
            (to / SOURCE).write_text(sources, encoding="utf-8")
            weights = state
        torch.save(weights, to / runs.WEIGHTS)
        (to / HYPERPARAMS).write_text(
            f"# {config['name']}: load with {config['load_with']}\n"
            f"sample_rate: {config['sample_rate']}\n"
            f"blank_index: {config['blank_index']}\n"
            f"{text}{INTERFACE_YAML}",
            encoding="utf-8",
        )
        if forms:
            failed.extend(_add_forms(to, forms, model, tokenizer, config))
        write_json(to / CONFIG, config)
        # Last: it lists the files.
        (to / README).write_text(
            model_card(config, to, folder.resolve().name), encoding="utf-8"
        )

    write_folder_atomically(folder, write)
    if failed:
        raise InputError(f"{folder} is written, but for {'; '.join(failed)}")
    return config


def _add_forms(to, forms, model, tokenizer, config):
    """Add other forms to an export, and tell which failed and why."""
    # They need packages that an export alone does not.
    from tutornet_sb.publishing.formats import add_onnx, add_sherpa

    said, failed = [], []
    for form, options in forms.items():
        try:
            if form == "onnx":
                config[form], said = add_onnx(
                    to, model, tokenizer, config, **options
                )
            else:
                config[form] = add_sherpa(
                    to, model, tokenizer, config, **options, said=said
                )
        except ValueError as error:
            shutil.rmtree(to / form, ignore_errors=True)
            failed.append(f"{form}: {error}")
    return failed


def is_export(folder):
    """Tell whether a folder was written by :func:`export`.

    Arguments
    ---------
    folder : str or pathlib.Path
        Any.

    Returns
    -------
    bool
        True if its ``config.json`` says so.
    """
    path = Path(folder) / CONFIG
    # Not one of any length, from whoever wrote it
    if not path.is_file() or path.stat().st_size > 2**26:
        return False
    try:
        content = read_json(path)
    except ValueError:
        # Of whoever wrote it
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def _refuse_to_overwrite(folder, run):
    if folder.resolve() in (run.resolve(), *run.resolve().parents):
        raise OccupiedError(f"{folder} holds the run itself: name another")
    if folder.exists() and not folder.is_dir():
        raise OccupiedError(f"{folder} is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not is_export(folder):
        raise OccupiedError(
            f"{folder} is not empty and no earlier export (its {CONFIG} would "
            "say so): name another folder"
        )


def _summary(run):
    """What the results say, without where things lay on this machine."""
    results = runs.read_results(run)
    if "stages" not in results:
        return None
    summary = summarize(run) | {"teacher": results["teacher"]}
    del summary["folder"]
    teacher = summary["teacher"] or {}
    where = teacher.pop("folder", "")
    if "method" not in teacher and HUB_REVISION.fullmatch(where):
        # No run of the recipe, and to be had by anybody
        teacher["source"] = where
    return summary | {"baseline": _baseline(run, summary)}


def _baseline(run, summary):
    """The same network by CTC alone, if a distilled student's is finished."""
    values = runs.read_hyperparams(run)
    folder = values.get("baseline_folder")
    if summary["teacher"] is None or folder is None:
        return None
    recipe = Path(str(values.get("recipe_folder") or "."))
    for place in (Path(folder), recipe / folder):
        if runs.read_results(place):
            found = summarize(place)
            same = "corpus", "name", "parameters"
            if found["teacher"] is None and all(
                found[key] == summary[key] for key in same
            ):
                return {k: v for k, v in found.items() if k != "folder"}
    return None


def _training(run):
    """How the run was made, without where things lay on this machine."""
    results = runs.read_results(run)
    path = run / "hyperparams.yaml"
    values = describe(YAML().load(path)) if path.is_file() else {}
    corpus = values.get("corpus", {})
    return {
        "stages": {
            name: {"epochs": figures.get("epochs")}
            | _pick(values, STAGE_SETTINGS.get(name, ()))
            # Null is another by another kind of teacher.
            | _pick(figures, ("frame_weighting",))
            for name, figures in results.get("stages", {}).items()
        },
        **_pick(values, SETTINGS),
        **_pick(corpus, CORPUS_SETTINGS),
        "versions": results.get("versions"),
    }


def _pick(values, names):
    return {name: values[name] for name in names if name in values}


def _is_stock(model):
    return (
        type(model) is AcousticModel
        and type(model.features) is LogMelFeatures
        and not model.features.is_causal
        and type(model.encoder) is RecurrentEncoder
        and type(model.head) is torch.nn.Linear
    )


def _stock_yaml(model):
    features, encoder, head = model.features, model.encoder, model.head
    layers = encoder.layers.forward_layers
    stft, conv, rnn = features.stft, encoder.conv, layers[0].rnn
    n_mels = features.output_size
    return STOCK.format(
        n_fft=stft.n_fft,
        n_mels=n_mels,
        win_length=1000 * stft.win_length / stft.sample_rate,
        hop_length=1000 * stft.hop_length / stft.sample_rate,
        floor=FLOOR,
        lowest=-RANGE,
        channels=conv.out_channels,
        kernel_size=conv.kernel_size[0],
        stride=encoder.stride,
        cell=type(rnn).__name__,
        hidden_size=rnn.hidden_size,
        layers=len(layers),
        bidirectional=encoder.layers.directions == 2,
        head_size=head.in_features,
        output_size=head.out_features,
        head_bias=head.bias is not None,
    )


def _stock_weights(model, state):
    n_mels, neper = model.features.output_size, model.features.neper
    renamed = {
        "difference.conv.weight": torch.tensor([[[-1.0, 1.0, 0.0]]]),
        "level.blocks.0.0.attn_pooling_w.weight": torch.full(
            (1, n_mels), 1 / (n_mels * neper)
        ),
        "level.blocks.0.0.attn_pooling_w.bias": torch.zeros(1),
        "level.blocks.0.1.weight": torch.full((1, n_mels), 1 / n_mels),
        "level.blocks.0.1.bias": torch.zeros(1),
    }
    for name, tensor in state.items():
        for pattern, replacement in RENAMED:
            name = re.sub(f"^{pattern}", replacement, name)
        renamed[name] = tensor
    return renamed


def _foreign(node):
    """The file of sources and the YAML that makes a network of them."""
    text = StringIO()
    YAML().dump({"encoder": node}, text)
    text = text.getvalue()
    sources = _gather([INTERFACE, *(name for _, name in TAG.findall(text))])
    digest = hashlib.sha256(repr(sorted(sources.items())).encode())
    package = f"_tutornet_{digest.hexdigest()[:12]}"

    def rename(name):
        return package + name.removeprefix(PACKAGE) if _is_ours(name) else name

    entries = []
    for name, source in sorted(sources.items()):
        source = re.sub(
            rf"^(\s*(?:from|import) ){PACKAGE}\b",
            rf"\1{package}",
            source,
            flags=re.MULTILINE,
        )
        lines = source.splitlines(keepends=True) or [""]
        entries.append(f"    {rename(name)!r}: (\n")
        entries += [f"        {line!r}\n" for line in lines]
        entries.append("    ),\n")
    file = SOURCE_FILE.format(
        package=package,
        sources="".join(entries),
        interface=rename(INTERFACE),
    )
    return file, TAG.sub(lambda tag: f"!{tag[1]}:{rename(tag[2])}", text)


def _is_ours(name):
    return name.partition(".")[0] == PACKAGE


def _gather(names):
    """Sources of this package's modules among the names, and their imports."""
    sources, names = {}, list(names)
    while names:
        name = names.pop()
        if not _is_ours(name) or name in sources:
            continue
        parent = name.rpartition(".")[0]
        if parent:
            names.append(parent)
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            # A name within a module
            continue
        if spec is None:
            continue
        sources[name] = Path(spec.origin).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(sources[name])):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names.append(node.module)
                names += [f"{node.module}.{alias.name}" for alias in node.names]
    return sources
