"""Write a run as a folder that SpeechBrain loads without this package.

Networks of parts that SpeechBrain and torch have are written as such, for
``EncoderASR.from_hparams``. Others bring their source in ``custom.py``, by
SpeechBrain's convention of ``foreign_class``.
"""

import ast
import hashlib
import importlib.util
import re
import shutil
from io import StringIO
from pathlib import Path

import jinja2
import safetensors.torch
import torch
from ruamel.yaml import YAML

from tutornet_sb.corpora.tokenizer import pieces
from tutornet_sb.experiments.groups import read_finished, summarize
from tutornet_sb.inference.speech import find_speech
from tutornet_sb.networks import runs
from tutornet_sb.networks.acoustic_model import (
    FLOOR,
    RANGE,
    AcousticModel,
    LogMelFeatures,
)
from tutornet_sb.networks.description import TAG, describe
from tutornet_sb.networks.export_folder import (
    CONFIG,
    FORMAT,
    SAFETENSORS,
    is_export,
)
from tutornet_sb.networks.recurrent import RecurrentEncoder
from tutornet_sb.publishing.model_card import README, model_card
from tutornet_sb.training.stages import STAGES
from tutornet_sb.util.errors import InputError, OccupiedError
from tutornet_sb.util.files import write_folder_atomically, write_json
from tutornet_sb.util.mappings import flatten

HYPERPARAMS = "hyperparams.yaml"
# SpeechBrain's Pretrainer names what it loads so.
PRETRAINED_TOKENIZER = "tokenizer.ckpt"
SOURCE = "custom.py"
ENCODER_ASR = "speechbrain.inference.ASR.EncoderASR.from_hparams"
FOREIGN_CLASS = "speechbrain.inference.interfaces.foreign_class"

# Settings of the experiment that are published, besides those of its stages.
# The others are paths, or of no use to users of the model.
SETTINGS = ("lr", "weight_decay", "batch_seconds", "augmentation.speeds")
CORPUS_SETTINGS = ("train_splits", "untranscribed_splits", "minilibri")

PACKAGE = __name__.partition(".")[0]
INTERFACE = f"{PACKAGE}.publishing.interface"
# How train.py names a teacher from the hub
HUB_REVISION = re.compile(r"[\w.-]+/[\w.-]+@\S+")
# From an AcousticModel's names of weights to those of the stock network
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
    that it loads, ``model.safetensors`` with the weights under the model's own
    names, ``config.json``, which describes the model as plain data, and
    ``README.md``, the model card; ``custom.py`` if the network needs it.

    ``run`` is an output folder of ``train.py``, whose ``model.yaml`` can run
    code. An earlier export in ``folder`` is replaced. What the other arguments
    do is in the help of ``tutornet export``, whose options they are.

    Returns the content of ``config.json``. Raises InputError if there is no
    finished run or it is damaged, `folder` holds something else, or the corpus
    is needed and missing. If an export format is impossible for this network or
    differs from it, the folder is written without it.
    """
    run, folder = Path(run), Path(folder)
    _refuse_to_overwrite(folder, run)
    network = runs.read_network(run)
    model, tokenizer = runs.load_run(run, trust_remote_code=True)
    results = read_finished(run)
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
        "results": _summary(run, results),
        "training": _training(run, results),
        "license": license or results.get("corpus_license"),
        "language": language or results.get("language"),
        "synthetic": results.get("synthetic", False),
    }
    if is_stock:
        # The hub's own inference asks for it.
        config["speechbrain_interface"] = "EncoderASR"
    formats = {"onnx": onnx or int8, "int8": int8, "sherpa": sherpa}
    speech = None
    if any(formats.values()):
        # Neither int8 nor sherpa-onnx computes exactly the same.
        speech = find_speech(
            run, data, config["results"], model, needed=int8 or sherpa
        )
    failed = []

    def write(to):
        state = {
            name: tensor.detach().clone().contiguous()
            for name, tensor in model.state_dict().items()
        }
        # Not by save_file, whose files only their owner may read
        (to / SAFETENSORS).write_bytes(
            safetensors.torch.save(state, {"format": "pt"})
        )
        for name in (runs.TOKENIZER, PRETRAINED_TOKENIZER):
            shutil.copyfile(run / runs.TOKENIZER, to / name)
        values, weights = {"network": None, "model": model}, state
        if is_stock:
            values |= {"floor": FLOOR, "lowest": -RANGE}
            weights = _stock_weights(model, state)
        else:
            source, values["network"] = _foreign(network["model"])
            (to / SOURCE).write_text(source, encoding="utf-8")
        torch.save(weights, to / runs.WEIGHTS)
        (to / HYPERPARAMS).write_text(
            _render("hyperparams.yaml.jinja", config | values),
            encoding="utf-8",
        )
        if any(formats.values()):
            # It needs packages that an export alone does not.
            from tutornet_sb.publishing.formats import add_formats

            failed.extend(
                add_formats(to, model, tokenizer, config, speech, **formats)
            )
        write_json(to / CONFIG, config)
        # Last: it lists the files.
        (to / README).write_text(
            model_card(config, to, folder.resolve().name), encoding="utf-8"
        )

    write_folder_atomically(folder, write)
    if failed:
        raise InputError(f"{folder} is written, but for {'; '.join(failed)}")
    return config


def _render(template, values):
    """Fill a template of this folder."""
    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    return jinja2.Template(
        text,
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    ).render(values)


def _refuse_to_overwrite(folder, run):
    is_occupied = folder.exists() and not is_export(folder)
    if is_occupied and folder.is_dir():
        is_occupied = any(folder.iterdir())
    if is_occupied or folder.resolve() in (
        run.resolve(),
        *run.resolve().parents,
    ):
        raise OccupiedError(
            f"{folder} holds the run itself, or is no earlier export (its "
            f"{CONFIG} would say so): name another folder"
        )


def _summary(run, results):
    """Figures of a run, its baseline and its teacher, without local paths."""
    summary = summarize(run)
    teacher = summary["teacher"] = results["teacher"] and dict(
        results["teacher"]
    )
    if teacher:
        source = teacher.pop("source", "")
        if teacher.get("kind") != "run" and HUB_REVISION.fullmatch(source):
            teacher["source"] = source
    return summary | {"baseline": _find_baseline(run, results)}


def _find_baseline(run, results):
    """Figures of the student's baseline, if it is there and finished."""
    folder = results.get("baseline")
    if results["teacher"] is None or folder is None:
        return None
    recipe = Path(str(runs.read_hyperparams(run).get("recipe_folder") or "."))
    for place in (Path(folder), recipe / folder):
        found = runs.read_results(place)
        same = "corpus", "student", "parameters"
        if found.get("role") == "baseline" and all(
            found[key] == results[key] for key in same
        ):
            return summarize(place)
    return None


def _training(run, results):
    """Settings of a run and its stages, without local paths."""
    values = describe(runs.read_hyperparams(run))
    flat, stages = flatten(values), {}
    for name, figures in results["stages"].items():
        stages[name] = {"epochs": figures.get("epochs")} | {
            key: value
            for key, value in flat.items()
            if key.startswith(STAGES[name].settings)
        }
        if "frame_weighting" in figures:
            # As it was resolved for the kind of teacher
            stages[name]["rkd.frame_weighting"] = figures["frame_weighting"]
    return {
        "stages": stages,
        **_pick(flat, SETTINGS),
        **_pick(values.get("corpus", {}), CORPUS_SETTINGS),
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
    """Text of ``custom.py``, and the YAML that makes a network of it."""
    text = StringIO()
    YAML().dump({"encoder": node}, text)
    text = text.getvalue()
    sources = _gather([INTERFACE, *(name for _, name in TAG.findall(text))])
    digest = hashlib.sha256(repr(sorted(sources.items())).encode())
    package = f"_tutornet_{digest.hexdigest()[:12]}"
    renamed = {
        _rename(name, package): re.sub(
            rf"^(\s*(?:from|import) ){PACKAGE}\b",
            rf"\1{package}",
            source,
            flags=re.MULTILINE,
        )
        for name, source in sources.items()
    }
    values = {"package": package, "sources": renamed}
    values["interface"] = _rename(INTERFACE, package)
    return _render("custom.py.jinja", values), TAG.sub(
        lambda tag: f"!{tag[1]}:{_rename(tag[2], package)}", text
    )


def _rename(name, package):
    return re.sub(rf"^{PACKAGE}\b", package, name)


def _gather(names):
    """Sources of this package's modules among the names, and their imports."""
    sources, names = {}, list(names)
    while names:
        name = names.pop()
        if name.partition(".")[0] != PACKAGE or name in sources:
            continue
        names.append(name.rpartition(".")[0])
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
