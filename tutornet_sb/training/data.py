"""Data sets and batches of SpeechBrain's, for training, scoring and stores."""

import logging
import random

import speechbrain as sb
import torch
from speechbrain.augment.time_domain import Resample
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler

from tutornet_sb.corpora.audio import read_utterance
from tutornet_sb.corpora.tokenizer import pieces
from tutornet_sb.teachers.pseudo_labels import (
    letters_of,
    read_pseudo_labels,
    write_pseudo_labels,
)
from tutornet_sb.training.corpus import fit_for_ctc, symbols_of
from tutornet_sb.util.errors import InputError
from tutornet_sb.util.processes import run_on_main

logger = logging.getLogger(__name__)


def store_key(key, split, speed):
    """Key of an utterance in a target store, at a speed in percent.

    Splits may use the same ids.
    """
    return f"{split}/{key}" + ("" if speed == 100 else f"@{speed:g}")


def make_dataset(items, experiment, stored=None, epochs=None):
    """Waveform, tokens and transcript of each item, made when asked for.

    With a stored teacher, its targets of the item too. One of the speeds of
    an item is drawn in each epoch, which the counter ``epochs`` gives.
    """
    rate = experiment.student.features.sample_rate
    tokenizer, seed = experiment.corpus.tokenizer, experiment.settings["seed"]
    speeds = {speed for item in items.values() for speed in item["speeds"]}
    # SpeechBrain's SpeedPerturb does the same, and draws a random number.
    perturb = {speed: Resample(speed, 100) for speed in speeds}

    @sb.utils.data_pipeline.takes("id", "wav", "duration", "speeds")
    @sb.utils.data_pipeline.provides("sig", "speed")
    def audio(key, wav, duration, speeds):
        sig = read_utterance(key, wav, float(duration), rate)
        # The same in any process, and after any interruption.
        epoch = epochs.current if epochs else 0
        speed = random.Random(f"{seed} {epoch} {key}").choice(speeds)
        # Before teacher and student part: both receive the same speech.
        return perturb[speed](sig.unsqueeze(0)).squeeze(0), speed

    @sb.utils.data_pipeline.takes("id", "split", "sig", "speed")
    @sb.utils.data_pipeline.provides("targets")
    def targets(key, split, sig, speed):
        return stored.read(store_key(key, split, speed), len(sig))

    @sb.utils.data_pipeline.takes("wrd")
    @sb.utils.data_pipeline.provides("tokens")
    def text(wrd):
        ids = symbols_of(tokenizer.encode(wrd), tokenizer)
        return torch.tensor(ids, dtype=torch.long)

    return DynamicItemDataset(
        items,
        dynamic_items=[audio, text, *([targets] if stored else [])],
        output_keys=[
            *("id", "sig", "wrd", "tokens", "transcribed"),
            *(["targets"] if stored else []),
        ],
    )


def make_batches(data, settings, shuffle=False):
    """Batch utterances of similar length, ``batch_seconds`` at a time."""
    return DynamicBatchSampler(
        data,
        max_batch_length=settings["batch_seconds"],
        num_buckets=settings["num_buckets"],
        length_func=lambda item: float(item["duration"]),
        shuffle=shuffle,
        batch_ordering="random" if shuffle else "descending",
        seed=settings["seed"],
    )


def _pseudo_label(items, experiment):
    """Transcribe by the teacher, and keep what it is confident of."""
    settings, source = experiment.settings, experiment.teacher
    letters = letters_of(pieces(experiment.corpus.tokenizer))
    unchanged = {key: item | {"speeds": [100]} for key, item in items.items()}
    path = experiment.folder / "pseudo_labels.csv"
    run_on_main(
        write_pseudo_labels,
        [source, make_dataset(unchanged, experiment), path, letters],
        {"num_workers": settings["num_workers"]},
    )
    labels = read_pseudo_labels(path, settings["min_confidence"])
    logger.info(
        "%d utterances have pseudo-labels of %s; %d whose confidence is below "
        "min_confidence and %d with empty ones are left out: see %s",
        len(labels.transcripts),
        source.source,
        labels.unsure,
        labels.empty,
        path,
    )
    # In the order of the corpus, not in that of the teacher's batches
    return {
        key: item | {"wrd": labels.transcripts[key], "transcribed": True}
        for key, item in items.items()
        if key in labels.transcripts
    }


def training_items(stage, experiment):
    """Utterances that a stage is trained on, as items of a data set."""
    corpus, settings = experiment.corpus, experiment.settings
    items, silent = corpus.transcribed, corpus.untranscribed
    if stage.teacher == "transcripts":
        items, silent = _pseudo_label(items | silent, experiment), {}
    elif stage.transcripts and silent:
        logger.info(
            "Stage %s needs transcripts: it leaves out %d utterances that "
            "have none",
            stage.name,
            len(silent),
        )
        silent = {}
    if stage.teacher != "hidden" and (
        stage.teacher != "posteriors" or settings["skd"]["ctc_weight"]
    ):
        items = fit_for_ctc(
            items,
            corpus.tokenizer,
            experiment.student,
            experiment.folder / "too_short_for_ctc.txt",
        )
    if not items | silent:
        raise InputError(
            f"stage {stage.name}: no training utterance is left, see the log "
            "above: does the audio have the length of its transcripts?"
        )
    return items | silent
