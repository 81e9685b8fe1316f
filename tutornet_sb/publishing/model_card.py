"""The model card of an exported folder, written from what its files say."""

import json
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCardData

from tutornet_sb.experiments.compare import markdown_table
from tutornet_sb.util.errors import InputError

README = "README.md"
UNKNOWN = "unknown"
TASK = "automatic-speech-recognition"
AUDIO = "speech.wav"


class Corpus(NamedTuple):
    """What the name of a corpus stands for.

    Attributes
    ----------
    name : str
        For people.
    license : str
        Licence of a model made of it, as the hub calls it.
    language : str
        As an ISO 639 code.
    dataset : str or None
        Id on the hub.
    """

    name: str
    license: str
    language: str
    dataset: str | None = None


MINILIBRI = Corpus("MiniLibri", "apache-2.0", "en")
LIBRISPEECH = Corpus(
    "LibriSpeech", "cc-by-4.0", "en", "openslr/librispeech_asr"
)
# By the name in its YAML file. Of others, only who trains knows.
CORPORA = {
    "mini": MINILIBRI,
    "mini_20h": MINILIBRI,
    "librispeech100": LIBRISPEECH,
    "librispeech960": LIBRISPEECH,
}
STAGES = {
    "ctc": "CTC on the transcripts.",
    "rkd": "Representation-level distillation (RKD): hidden states learn the "
    "teacher's, frame by frame, through a projector that is dropped "
    "afterwards.",
    "skd": "Softmax-level distillation (SKD): posteriors learn the teacher's, "
    "beside CTC on the transcripts where its weight is not 0.",
    "pseudo": "CTC on the teacher's transcripts.",
}
ONNX = "onnx/model.onnx"
INT8 = "onnx/model.int8.onnx"
SCRIPT = "onnx/transcribe.py"
SHERPA = "sherpa/model.onnx"
TOKENS = "sherpa/tokens.txt"
FILES = {
    "hyperparams.yaml": "what SpeechBrain loads",
    "custom.py": "source of the network and its interface",
    "model.ckpt": "weights, as SpeechBrain loads them",
    "model.safetensors": "the same weights, in a file that cannot hold code",
    "tokenizer.ckpt": "SentencePiece model, as SpeechBrain loads it",
    "tokenizer.model": "the same SentencePiece model",
    "config.json": "all about the model, as plain data",
    ONNX: "the model from waveform to log-probabilities",
    INT8: "the same in 8 bits",
    SCRIPT: "transcribes by it without torch",
    SHERPA: "the model as sherpa-onnx loads it",
    TOKENS: "its symbols",
}
SHERPA_NOTES = {
    "OnlineRecognizer.from_t_one_ctc": " Give it the samples as if they were "
    "at 8000 Hz, whatever the model's rate, and three pieces of 2400 zeros at "
    "the end; times come out for that rate too.",
}
SHERPA_PROGRAMS = {
    "OfflineRecognizer.from_omnilingual_asr_ctc": """\
import sherpa_onnx
import soundfile

recognizer = {making}
samples, rate = soundfile.read("{audio}", dtype="float32", always_2d=True)
stream = recognizer.create_stream()
stream.accept_waveform(rate, samples.mean(axis=1))
recognizer.decode_stream(stream)
print(stream.result.text)
""",
    "OnlineRecognizer.from_t_one_ctc": """\
import numpy
import sherpa_onnx
import soundfile

recognizer = {making}
# At {rate} Hz
samples, rate = soundfile.read("{audio}", dtype="float32", always_2d=True)
end = numpy.zeros(7200, dtype="float32")
stream = recognizer.create_stream()
stream.accept_waveform(8000, numpy.concatenate([samples.mean(axis=1), end]))
stream.input_finished()
while recognizer.is_ready(stream):
    recognizer.decode_stream(stream)
print(recognizer.get_result(stream))
""",
}
DEMONSTRATION = """\
> **A demonstration.** This model was trained on synthetic speech alone:
> MiniLibri, some minutes of sentences of a small grammar, synthesised by
> eSpeak NG. It shows the method at work. It is not made for human voices, and
> its error rates do not apply to them."""
UNTESTED = "This model comes without results: how well it does is not known."
CITATION = """\
```bibtex
@article{tutornet,
  title = {TutorNet: Towards Flexible Knowledge Distillation for End-to-End Speech Recognition},
  author = {Yoon and Lee and Kim and Cho and Kim},
  journal = {IEEE/ACM Transactions on Audio, Speech, and Language Processing},
  year = {2021},
  eprint = {2008.00671},
  archivePrefix = {arXiv}
}
@misc{speechbrain,
  title = {SpeechBrain: A General-Purpose Speech Toolkit},
  author = {Ravanelli, Mirco and Parcollet, Titouan and Plantinga, Peter and others},
  year = {2021},
  eprint = {2106.04624},
  archivePrefix = {arXiv}
}
```"""  # noqa: E501


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
    """Write the model card of an exported folder.

    Arguments
    ---------
    config : dict
        What the folder's ``config.json`` holds.
    folder : str or pathlib.Path
        The folder, for the size of its files.
    source : str
        What the card says to load: an id on the hub, or a folder.
    license : str, optional
        Instead of the one in ``config``.
    language : str, optional
        Instead of the one in ``config``.
    revision : str, optional
        Branch on the hub, if not the main one.
    private : bool
        Whether only those who log in may load it from the hub.

    Returns
    -------
    str
        Markdown with the front matter that the Hugging Face hub reads.

    Raises
    ------
    ValueError
        If ``config`` lacks something.
    """
    try:
        front = _front_matter(config, source, license, language)
        sections = [
            _introduction(config, source),
            _use(config, source, revision, private),
            _results(config),
            _other_runtimes(config, source, revision),
            _training(config),
            _files(folder),
            _limits(config),
            f"## Citation\n\n{CITATION}",
        ]
    except KeyError as error:
        raise InputError(
            f"config.json in {folder} lacks {error}: export the run again"
        ) from None
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{front.to_yaml()}\n---\n\n{body}\n"


def file_sizes(folder):
    """Measure the files of a folder.

    Arguments
    ---------
    folder : str or pathlib.Path
        Any.

    Returns
    -------
    dict
        Bytes by path within the folder, with ``/``, in order.
    """
    folder = Path(folder)
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def license_of(config):
    """Tell the licence of a model.

    Arguments
    ---------
    config : dict
        What ``config.json`` of an export holds.

    Returns
    -------
    str
        The one that the export was given, or that follows from the corpus;
        ``unknown`` if neither tells.
    """
    return _given_or_of_corpus(config, "license") or UNKNOWN


def loading_lines(config, source, revision=None, private=False):
    """Give the lines of Python that load an export.

    Arguments
    ---------
    config : dict
        What ``config.json`` of an export holds.
    source : str
        Folder, or id on the hub.
    revision : str, optional
        Branch on the hub, if not the main one.
    private : bool
        Whether only those who log in may load it from the hub.

    Returns
    -------
    list of str
        Imports first.

    Example
    -------
    >>> config = {"load_with": "speechbrain.inference.interfaces.foreign_class"}
    >>> loading_lines(config, "lstm_mini")[0]
    'from speechbrain.inference.interfaces import foreign_class'
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


def _given_or_of_corpus(config, key):
    if config.get(key):
        return config[key]
    return getattr(_corpus(config), key, None)


def _corpus(config):
    """What is known of the corpus by its name, None if nothing is."""
    return CORPORA.get((config["results"] or {}).get("corpus"))


def _corpus_name(config):
    corpus = _corpus(config)
    return corpus.name if corpus else config["results"]["corpus"]


def _front_matter(config, source, license, language):
    corpus, results = _corpus(config), config["results"]
    teacher = (results or {}).get("teacher") or {}
    tags = ["speechbrain", "pytorch", "ctc", "tutornet"]
    if teacher:
        tags.append("knowledge-distillation")
    tags += [
        tag
        for tag, key in (("onnx", "onnx"), ("sherpa-onnx", "sherpa"))
        if config.get(key)
    ]
    scores = _eval_results(config)
    return ModelCardData(
        language=language or _given_or_of_corpus(config, "language"),
        license=license or license_of(config),
        library_name="speechbrain",
        pipeline_tag=TASK,
        tags=tags,
        # Without base_model_relation: the hub has adapter, finetune, merge and
        # quantized, and none for distillation.
        base_model=_hub_id(teacher),
        datasets=[corpus.dataset] if corpus and corpus.dataset else None,
        metrics=["wer", "cer"] if scores else None,
        model_name=_title(source),
        eval_results=scores or None,
    )


def _title(source):
    return source.rpartition("/")[2]


def _hub_id(teacher):
    """Repository of a teacher on the hub, None of any other."""
    return teacher.get("source", "").partition("@")[0] or None


def _eval_results(config):
    if not config["results"]:
        return []
    corpus = _corpus(config)
    name = _corpus_name(config)
    dataset = corpus and corpus.dataset
    return [
        EvalResult(
            task_type=TASK,
            task_name="Speech recognition",
            dataset_type=dataset or name.lower(),
            dataset_name=f"{name} {split}",
            dataset_split=split,
            metric_type=rate,
            metric_name=rate.upper(),
            metric_value=round(scores[rate], 2),
        )
        for split, scores in config["results"]["splits"].items()
        for rate in ("wer", "cer")
    ]


def _introduction(config, source):
    results = config["results"]
    rate = config["sample_rate"]
    lines = [
        f"A speech recogniser of {_millions(config)} parameters, network "
        f"`{config['name']}` with CTC: speech at {rate} Hz in, text out. "
    ]
    if not results:
        lines.append(UNTESTED)
    elif results["teacher"]:
        method = f"`{results['method']}`"
        if "rkd" in results["method"]:
            method += " after [TutorNet](https://arxiv.org/abs/2008.00671)"
        lines.append(
            f"It was taught by {_teacher(results['teacher'])}, by method "
            f"{method}: see Training."
        )
    else:
        lines.append(
            "It was trained without a teacher, by method "
            f"`{results['method']}`."
        )
    text = f"# {_title(source)}\n\n" + "".join(lines)
    if _is_demonstration(config):
        text += f"\n\n{DEMONSTRATION}"
    return text


def _is_demonstration(config):
    return bool(config["results"]) and config["results"]["corpus"] == "mini"


def _millions(known):
    return f"{known['parameters'] / 1e6:.2f} million"


def _teacher(teacher):
    """A teacher in words: a run of the recipe, or a model from elsewhere."""
    name = f"`{teacher['name']}`"
    if not _is_run(teacher):
        name = f"a model of kind {name}"
    if _hub_id(teacher):
        link = f"https://huggingface.co/{_hub_id(teacher)}"
        name += f", [{teacher['source']}]({link})"
    if "parameters" in teacher:
        name += f" ({_millions(teacher)} parameters)"
    return name


def _is_run(teacher):
    return "method" in teacher


def _use(config, source, revision, private):
    lines = loading_lines(config, source, revision, private)
    # Between the imports and the model, as anyone writes it
    lines.insert(len(lines) - 1, "")
    lines.append(f'print(model.transcribe_file("{AUDIO}"))')
    code = "\n".join(lines)
    needed = "speechbrain"
    if "networks.huggingface" in json.dumps(config["student"]):
        needed += " transformers"
    run = "what `hyperparams.yaml` of this model says"
    if _is_foreign(config):
        run = "`custom.py` and what `hyperparams.yaml` of this model says"
    return (
        f"## Use\n\nAfter `pip install {needed}`:\n\n```python\n{code}\n```"
        "\n\nAny sample rate and any number of channels will do. Loading runs "
        f"{run}: look at them first.\n\nWhere the command `tutornet` of "
        "TutorNet for SpeechBrain is installed, no code of this model is run:"
        f"\n\n```\ntutornet transcribe {source} {AUDIO}"
        + (f" --revision {revision}" if revision else "")
        + "\n```"
    )


def _is_foreign(config):
    return config["load_with"].endswith("foreign_class")


def _results(config):
    results = config["results"]
    if not results:
        return f"## Results\n\n{UNTESTED}"
    models = {"this model": results}
    if results.get("baseline"):
        models["baseline: the same network by CTC alone"] = results["baseline"]
    if results["teacher"]:
        models[f"teacher: `{results['teacher']['name']}`"] = results["teacher"]
    splits = results["splits"]
    head = [f"{s} {rate} (%)" for s in splits for rate in ("WER", "CER")]
    timed = [split for split in splits if "latency" in splits[split]]
    head += [f"{split} latency (ms)" for split in timed]
    rows = [["", *head, "parameters (million)", "real-time factor"]]
    for name, known in models.items():
        theirs = known.get("splits", {})
        row = [
            _number(theirs.get(split, {}).get(rate), 2)
            for split in splits
            for rate in ("wer", "cer")
        ]
        row += [
            _number(theirs.get(s, {}).get("latency", {}).get("median"), 0)
            for s in timed
        ]
        row.append(_number(known.get("parameters"), 2, 1e-6))
        rows.append([name, *row, _number(known.get("real_time_factor"), 4)])
    text = (
        f"## Results\n\nOn {_corpus_name(config)}, greedy decoding without a "
        f"language model, one training (seed {results['seed']}):\n\n"
        + markdown_table(rows)
    )
    baseline = results.get("baseline")
    if baseline:
        text += (
            "\n\nThe baseline was trained for "
            f"{_count(baseline['epochs'], 'epoch')} (seed {baseline['seed']}). "
            "By one training each, how much of the difference is chance is not "
            "known."
        )
    if timed:
        text += (
            "\n\nThe latency is the median time from the end of a word, as "
            "aligned by the teacher, until the model writes it."
        )
    sizes = [
        f"{split} has {_count(scores['utterances'], 'utterance')} of "
        f"{_count(scores['words'], 'word')}"
        for split, scores in splits.items()
        if "words" in scores
    ]
    if sizes:
        text += f"\n\n{'; '.join(sizes)}."
    return text + (
        "\n\nThe real-time factor is seconds of computation for a second of "
        "speech, one utterance at a time, on the machine of the training."
    )


def _number(value, digits, factor=1):
    return "-" if value is None else f"{value * factor:.{digits}f}"


def _count(number, noun):
    """A number of things, as 1 epoch and 2 epochs."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _duration(seconds):
    """About how long something took or is."""
    if seconds >= 3600:
        hours = f"{seconds / 3600:.1f}"
        return f"{hours} {'hour' if hours == '1.0' else 'hours'}"
    if seconds >= 59.5:
        return _count(round(seconds / 60), "minute")
    return _count(round(seconds), "second")


def _other_runtimes(config, source, revision):
    parts = []
    if config.get("onnx"):
        parts.append(_onnx(config["onnx"], _going_there(source, revision)))
    if config.get("sherpa"):
        parts.append(_sherpa(config, _going_there(source, revision)))
    return "\n\n".join(parts)


def _going_there(source, revision):
    """Commands that bring the files of a model here."""
    if "/" not in source:
        return f"cd {source}\n"
    option = f" --revision {revision}" if revision else ""
    folder = _title(source)
    return f"hf download {source} --local-dir {folder}{option}\ncd {folder}\n"


def _onnx(onnx, going_there):
    text = (
        f"## ONNX\n\n```\n{going_there}pip install onnxruntime numpy soundfile"
        f"\npython {SCRIPT} {AUDIO}\n```\n\n`{onnx['model']}` goes from "
        f"waveform to log-probabilities; `{SCRIPT}` runs it with onnxruntime, "
        "numpy and soundfile alone."
    )
    if onnx["checked_on"] is None:
        text += " It was compared with PyTorch on noise only."
    else:
        text += (
            " The log-probabilities differ from PyTorch's by at most "
            f"{onnx['max_difference']:.1g} nats on "
            f"{_count(onnx['checked_on']['utterances'], 'utterance')} of "
            f"{onnx['checked_on']['split']}."
        )
    if int8 := onnx.get("int8"):
        text += (
            f" `{int8['model']}` has weights of 8 bits."
            if int8["model"]
            else f" There is none in 8 bits: {int8['reason']}."
        )
    return text + _runtime_scores(onnx)


def _sherpa(config, going_there):
    sherpa = config["sherpa"]
    cls, _, method = sherpa["recognizer"].partition(".")
    program = SHERPA_PROGRAMS[sherpa["recognizer"]].format(
        audio=AUDIO,
        rate=config["sample_rate"],
        making=f"sherpa_onnx.{cls}.{method}(\n"
        f'    model="{sherpa["model"]}", tokens="{sherpa["tokens"]}"\n)',
    )
    return (
        f"## sherpa-onnx\n\n```\n{going_there}pip install sherpa-onnx soundfile"
        f"\n```\n\n```python\n{program}```\n\n`{sherpa['model']}` and "
        f"`{sherpa['tokens']}` are for `{sherpa['recognizer']}` of sherpa-onnx."
        + SHERPA_NOTES.get(sherpa["recognizer"], "")
        + _runtime_scores(sherpa)
    )


def _runtime_scores(runtime):
    """Word error rates by runtime, a row for each split."""
    scores = runtime["scores"]
    if not scores:
        return ""
    names, others = (
        list(next(iter(scores.values()))[key]) for key in ("wer", "same")
    )
    rows = [["split"] + [f"{name} WER (%)" for name in names]]
    rows[0] += [f"{name}: equal transcripts" for name in others]
    rows[0] += ["utterances", "words"]
    for split, found in scores.items():
        rates = [f"{found['wer'][name]:.2f}" for name in names]
        rows.append(
            [
                split,
                *rates,
                *(str(found["same"][name]) for name in others),
                str(found["utterances"]),
                str(found["words"]),
            ]
        )
    return f"\n\n{markdown_table(rows)}"


def _training(config):
    results, training = config["results"], config.get("training") or {}
    if not results:
        return "## Training\n\nNothing is known of it."
    data = _duration(results["train_audio_seconds"])
    text = f"## Training\n\nOn {data} of {_corpus_name(config)}"
    text += _listed(" (", training.get("train_splits"), ")")
    text += _listed(
        " and, without transcripts, ", training.get("untranscribed_splits")
    )
    text += ". "
    if results["teacher"]:
        teacher = results["teacher"]
        text += f"The teacher is {_teacher(teacher)}"
        if _is_run(teacher):
            text += (
                f", trained by method `{teacher['method']}` for "
                f"{_count(teacher['epochs'], 'epoch')}"
            )
        text += ". "
    text += (
        f"Method `{results['method']}`, {_count(results['epochs'], 'epoch')} "
        f"in {_duration(results['train_seconds'])}:\n"
    )
    stages = training.get("stages") or {}
    for number, (name, values) in enumerate(stages.items(), 1):
        values = dict(values)
        epochs = values.pop("epochs", None)
        text += f"\n{number}. {STAGES.get(name, f'`{name}`.')}"
        text += f" {_count(epochs, 'epoch')}." if epochs else ""
        text += _settings(values)
    common = {
        key: value
        for key, value in training.items()
        if key not in ("stages", "versions") and not key.endswith("_splits")
    }
    if common:
        text += f"\n\nOf all stages:{_settings(common)}"
    versions = training.get("versions")
    if versions:
        named = [f"{name} {version}" for name, version in versions.items()]
        text += f"\n\nMade with {', '.join(named)}."
    return text


def _listed(before, names, after=""):
    if not names:
        return ""
    return before + ", ".join(f"`{name}`" for name in names) + after


def _settings(values):
    """Values as in the YAML files, those that are off left out."""
    shown = [
        f"`{name}: {json.dumps(value)}`"
        for name, value in values.items()
        if value is not None
    ]
    return f" {', '.join(shown)}." if shown else ""


def _files(folder):
    rows = [["file", "MB", ""]]
    for name, size in file_sizes(folder).items():
        if name != README:
            rows.append([f"`{name}`", f"{size / 1e6:.3g}", FILES.get(name, "")])
    return f"## Files\n\n{markdown_table(rows)}"


def _limits(config):
    blank, symbols = config["blank_index"], config["symbols"]
    # SentencePiece's sign for a blank
    letters = {
        letter
        for index, piece in enumerate(symbols)
        if index != blank
        for letter in piece.replace("\u2581", "")
    }
    lines = [
        f"It writes {' '.join(sorted(letters))} and blanks, and nothing else.",
    ]
    if config["results"]:
        lines.append(
            f"Its error rates hold for the splits of {_corpus_name(config)} "
            "above. Those of other voices, microphones, rooms, accents and "
            "subjects are likely to be higher, and were not measured."
        )
    if not _is_foreign(config):
        lines.append(
            "In a batch of several lengths its layers process the padding as "
            "silence, and the text of the shorter ones may differ from what it "
            "is for each alone."
        )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)
