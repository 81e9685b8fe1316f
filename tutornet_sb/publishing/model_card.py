"""The model card of an exported folder, filled from its ``config.json``."""

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tutornet_sb.experiments.compare import markdown_table
from tutornet_sb.training.stages import STAGES
from tutornet_sb.util.mappings import flatten

README = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
TASK = "automatic-speech-recognition"
AUDIO = "speech.wav"
UNKNOWN = "unknown"
# Ids on the hub of published corpora, by the names in their YAML files
DATASETS = dict.fromkeys(
    ("librispeech100", "librispeech960"), "openslr/librispeech_asr"
)
ONNX = "onnx/model.onnx"
INT8 = "onnx/model.int8.onnx"
SCRIPT = "onnx/transcribe.py"
SHERPA = "sherpa/model.onnx"
TOKENS = "sherpa/tokens.txt"
# All that an export may hold besides the card
FILES = {
    "hyperparams.yaml": "what SpeechBrain loads",
    "custom.py": "source of the network and its interface",
    "model.ckpt": "weights, as SpeechBrain loads them",
    "model.safetensors": "the same weights, in a file that cannot hold code",
    "tokenizer.ckpt": "SentencePiece model, as SpeechBrain loads it",
    "tokenizer.model": "the same SentencePiece model",
    "config.json": "description of the model, as plain data",
    ONNX: "the model from waveform to log-probabilities",
    INT8: "the same in 8 bits",
    SCRIPT: "transcribes by it without torch",
    SHERPA: "the model as sherpa-onnx loads it",
    TOKENS: "its symbols",
}
OPTIONAL = "custom.py", ONNX, INT8, SCRIPT, SHERPA, TOKENS


def model_card(
    config,
    folder,
    source,
    *,
    license=None,
    language=None,
    revision=None,
    private=False,
):
    """Fill the model card of an exported folder from its ``config.json``.

    ``source`` is what the card loads: an id on the hub (``revision``: a branch
    there, ``private``: with a token) or a folder. ``license`` and ``language``
    replace those of ``config``.
    """
    *imports, model = loading_lines(config, source, revision, private)
    use = f'print(model.transcribe_file("{AUDIO}"))'
    card = ModelCard.from_template(
        _metadata(config, source, license, language),
        template_path=TEMPLATE,
        config=config,
        run=config["results"],
        training=config["training"],
        stages=STAGES,
        source=source,
        revision=revision,
        audio=AUDIO,
        script=SCRIPT,
        program="\n".join([*imports, "", model, use]),
        needs_transformers="networks.huggingface" in str(config["student"]),
        results_table=_results_table(config["results"]),
        scores_table=_scores_table,
        files_table=_files_table(folder),
        letters=_letters(config),
        dumps=json.dumps,
    )
    return f"{card}\n"


def loading_lines(config, source, revision=None, private=False):
    """Lines of Python that load an export, imports first.

    Example
    -------
    >>> config = {"load_with": "speechbrain.inference.interfaces.foreign_class"}
    >>> loading_lines(config, "lstm_mini")[1]
    'model = foreign_class(source="lstm_mini")'
    """
    module, _, called = config["load_with"].rpartition(".")
    imported = called
    if called != "foreign_class":
        # A method of a class
        module, _, imported = module.rpartition(".")
        called = f"{imported}.{called}"
    lines = [f"from {module} import {imported}"]
    arguments = [f"source={json.dumps(source)}"]
    how = [f"revision={json.dumps(revision)}"] if revision else []
    how += ["token=True"] if private else []
    if how:
        lines.append("from speechbrain.utils.fetching import FetchConfig")
        arguments.append(f"fetch_config=FetchConfig({', '.join(how)})")
    return [*lines, f"model = {called}({', '.join(arguments)})"]


def _metadata(config, source, license, language):
    run = config["results"]
    corpus, teacher = run["corpus"], run["teacher"]
    tags = ["speechbrain", "pytorch", "ctc", "tutornet"]
    tags += ["knowledge-distillation"] if teacher else []
    tags += ["onnx"] if config.get("onnx") else []
    tags += ["sherpa-onnx"] if config.get("sherpa") else []
    # The hub has languages, without their regions.
    language = (language or config["language"] or "").partition("-")[0].lower()
    base = (teacher or {}).get("source", "").partition("@")[0]
    dataset = DATASETS.get(corpus)
    return ModelCardData(
        language=language or None,
        license=license or config["license"] or UNKNOWN,
        library_name="speechbrain",
        pipeline_tag=TASK,
        tags=tags,
        # Without base_model_relation: the hub has adapter, finetune, merge and
        # quantized, and none for distillation.
        base_model=base or None,
        datasets=[dataset] if dataset else None,
        metrics=["wer", "cer"],
        model_name=source.rpartition("/")[2],
        eval_results=[
            EvalResult(
                task_type=TASK,
                task_name="Speech recognition",
                dataset_type=dataset or corpus.lower(),
                dataset_name=f"{corpus} {split}",
                dataset_split=split,
                metric_type=rate,
                metric_name=rate.upper(),
                metric_value=round(scores[rate], 2),
            )
            for split, scores in run["splits"].items()
            for rate in ("wer", "cer")
        ],
    )


def _results_table(run):
    """A row each for the model, its baseline and its teacher."""
    models = {
        "this model": run,
        "baseline: the same network, CTC only": run.get("baseline"),
    }
    if run["teacher"]:
        models[f"teacher: `{run['teacher']['name']}`"] = run["teacher"]
    # Key, digits and factor of each
    columns = {
        f"{split} {rate.upper()} (%)": (f"splits.{split}.{rate}", 2, 1)
        for split in run["splits"]
        for rate in ("wer", "cer")
    }
    for split, scores in run["splits"].items():
        if "latency" in scores:
            key = f"splits.{split}.latency.median"
            columns[f"{split} latency (ms)"] = key, 0, 1
    columns["parameters (million)"] = "parameters", 2, 1e-6
    columns["real-time factor"] = "real_time_factor", 4, 1
    rows = [["", *columns]]
    for name, known in models.items():
        if known:
            flat = flatten(known)
            rows.append([name])
            for key, digits, factor in columns.values():
                value = flat.get(key)
                rows[-1].append(
                    "-" if value is None else f"{value * factor:.{digits}f}"
                )
    return markdown_table(rows)


def _scores_table(scores):
    """Word error rates by export format, a row for each split."""
    first = next(iter(scores.values()))
    head = ["split", *(f"{name} WER (%)" for name in first["wer"])]
    head += [f"{name}: equal transcripts" for name in first["same"]]
    rows = [[*head, "utterances", "words"]]
    for split, found in scores.items():
        counts = *found["same"].values(), found["utterances"], found["words"]
        rates = [f"{rate:.2f}" for rate in found["wer"].values()]
        rows.append([split, *rates, *map(str, counts)])
    return markdown_table(rows)


def _files_table(folder):
    rows = [["file", "MB", ""]]
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != README:
            size = f"{path.stat().st_size / 1e6:.3g}"
            rows.append([f"`{name}`", size, FILES.get(name, "")])
    return markdown_table(rows)


def _letters(config):
    symbols = list(config["symbols"])
    del symbols[config["blank_index"]]
    # SentencePiece's sign for a space
    return " ".join(sorted({*"".join(symbols)} - {"\u2581"}))
