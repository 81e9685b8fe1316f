"""Figures of a finished student: error rates, speed, latency, results.json."""

import logging
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.dataio.dataloader import make_dataloader
from speechbrain.decoders.ctc import CTCBeamSearcher

from tutornet_sb.corpora.tokenizer import BLANK, pieces
from tutornet_sb.inference.latency import emission_latency, word_ends
from tutornet_sb.inference.scores import (
    count_errors,
    real_time_factor,
    score,
    write_alignments,
)
from tutornet_sb.networks import runs
from tutornet_sb.networks.streaming import Stream, can_stream
from tutornet_sb.networks.weights import load_model_weights
from tutornet_sb.targets.extraction import weights_hash
from tutornet_sb.training.ctc import CTCBrain
from tutornet_sb.training.data import make_batches, make_dataset
from tutornet_sb.util.files import read_json, write_atomically, write_json
from tutornet_sb.util.processes import own_share, run_on_main

logger = logging.getLogger(__name__)

STAGE_SUMMARY = "stage.json"
# What is told of a teacher that is a run
OF_TEACHER = (
    "method",
    "corpus",
    "seed",
    "epochs",
    "train_audio_seconds",
    "train_seconds",
    "real_time_factor",
)


def load_stage(stage, experiment):
    """Load a finished stage into the student; return its figures, or None."""
    folder = experiment.stage_folder(stage)
    weights, summary = folder / runs.WEIGHTS, folder / STAGE_SUMMARY
    if not (weights.is_file() and summary.is_file()):
        return None
    logger.info("Stage %s is finished: using %s", stage.name, weights)
    load_model_weights(experiment.student, weights)
    return read_json(summary)


def save_stage(stage, figures, experiment):
    """Save the student and the figures of a stage that is finished."""
    folder = experiment.stage_folder(stage)
    _save_weights(experiment.student, folder / runs.WEIGHTS)
    # The head was fitted in one process.
    load_model_weights(experiment.student, folder / runs.WEIGHTS)
    run_on_main(write_json, [folder / STAGE_SUMMARY, figures])


def _save_weights(model, path):
    state = model.state_dict()
    run_on_main(write_atomically, [path, lambda to: torch.save(state, to)])


def make_searcher(experiment):
    """Make the beam searcher, if one is asked for."""
    decoding = experiment.settings["decoding"]
    if decoding["beam_size"] is None:
        return None
    return CTCBeamSearcher(
        blank_index=BLANK,
        vocab_list=pieces(experiment.corpus.tokenizer),
        **decoding,
    )


def evaluate(stage, figures, experiment, run_opts):
    """Add the scores of each split to the figures of a stage, and save them.

    A split that was scored before with the same decoding is left alone.
    """
    settings, folder = experiment.settings, experiment.stage_folder(stage)
    decoding = dict(settings["decoding"])
    if figures.get("decoding") != decoding:
        figures |= {"decoding": decoding, "splits": {}}
    known, counts = figures["splits"], folder / runs.ERRORS
    errors = read_json(counts) if counts.is_file() else {}
    searcher = make_searcher(experiment)
    tokenizer = experiment.corpus.tokenizer
    brain = CTCBrain(
        {"student": experiment.student},
        hparams={**settings, "tokenizer": tokenizer, "searcher": searcher},
        run_opts=run_opts,
    )
    for split, items in experiment.corpus.scored.items():
        if split in known and split in errors:
            continue
        data = make_dataset(items, experiment)
        batches = own_share(make_batches(data, settings))
        brain.evaluate(make_dataloader(data, batch_sampler=batches))
        errors[split] = count_errors(brain.references, brain.hypotheses)
        known[split] = score(brain.references, brain.hypotheses)
        texts = {"": brain.hypotheses}
        if searcher is not None:
            beam = score(brain.references, brain.beam_hypotheses)
            known[split]["beam"] = {key: beam[key] for key in ("wer", "cer")}
            texts["_beam"] = brain.beam_hypotheses
        for suffix, hypotheses in texts.items():
            path = folder / f"wer_{split}{suffix}.txt"
            run_on_main(write_alignments, [path, brain.references, hypotheses])
        run_on_main(write_json, [counts, errors, None])
        run_on_main(write_json, [folder / STAGE_SUMMARY, figures])


def add_latency(splits, experiment):
    """Measure how long after its end a streaming student emits a word.

    The ends are found by the teacher, which must have the student's symbols.
    """
    student, source = experiment.student, experiment.teacher
    symbols = pieces(experiment.corpus.tokenizer)
    if source is None or source.pieces != symbols or not can_stream(student):
        return
    for split, items in experiment.corpus.scored.items():
        if "latency" in splits[split]:
            continue
        data = make_dataset(items, experiment)
        batches = make_batches(data, experiment.settings)
        loader = make_dataloader(data, batch_sampler=batches)
        ends = word_ends(source.model, loader, symbols, BLANK)
        splits[split]["latency"] = emission_latency(
            student,
            loader,
            symbols,
            ends,
            BLANK,
            look_ahead=Stream(student).latency,
        )


def _measure_speed(experiment):
    """Real-time factor on 20 utterances of the first test split."""
    split = experiment.corpus.splits["test"][0]
    data = make_dataset(experiment.corpus.scored[split], experiment)
    return real_time_factor(
        experiment.student.eval(),
        [data[index]["sig"] for index in range(min(len(data), 20))],
        experiment.student.features.sample_rate,
        BLANK,
    )


def _describe(teacher):
    """What results say of a teacher; of a run its figures too."""
    found = teacher.describe() | {"weights_sha256": weights_hash(teacher.model)}
    if teacher.kind == "run":
        results = runs.read_results(teacher.source)
        *_, last = results["stages"].values()
        found |= {"name": results["student"], "splits": last["splits"]}
        found |= {key: results[key] for key in OF_TEACHER}
    return found


def _describe_machine(device):
    """What decides the speed of a run."""
    info = Path("/proc/cpuinfo")
    text = info.read_text("utf-8") if info.is_file() else ""
    # Only x86 processors have it.
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    other = platform.processor() or platform.machine()
    machine = {
        "cpu": model[1].strip() if model else other,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def save_results(stages, experiment):
    """Save the student, and what the run is with all its figures.

    ``stages`` holds the figures of each stage by name.
    """
    settings, student = experiment.settings, experiment.student
    corpus, last = settings["corpus"], list(stages.values())[-1]
    run_on_main(add_latency, [last["splits"], experiment])
    _save_weights(student, experiment.folder / runs.WEIGHTS)
    results = {
        "format": runs.FORMAT,
        "role": experiment.role,
        "main_file": experiment.main_file.name,
        "options": experiment.options,
        "compute_matched_to": settings["compute_matched_to"],
        "baseline": settings["baseline_folder"],
        "method": experiment.method,
        "corpus": corpus["name"],
        "corpus_license": corpus["license"],
        "language": corpus["language"],
        "synthetic": corpus["synthetic"],
        "student": settings["student"]["name"],
        "seed": settings["seed"],
        "parameters": sum(p.numel() for p in student.parameters()),
        "weights_sha256": weights_hash(student),
        "epochs": settings["epochs"],
        "train_audio_seconds": last["train_audio_seconds"],
        # All stages read the same targets.
        "train_seconds": sum(s["train_seconds"] for s in stages.values())
        + max(s.get("extraction_seconds", 0.0) for s in stages.values()),
        "real_time_factor": run_on_main(_measure_speed, [experiment]),
        "stages": stages,
        "teacher": _describe(experiment.teacher)
        if experiment.distils
        else None,
        "versions": {
            "tutornet_sb": version("tutornet-sb"),
            "speechbrain": sb.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": _describe_machine(next(student.parameters()).device),
    }
    run_on_main(write_json, [experiment.folder / runs.RESULTS, results])
