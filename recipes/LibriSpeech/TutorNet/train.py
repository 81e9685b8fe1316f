#!/usr/bin/env python3
"""Teach a small speech recogniser of any architecture what a big one knows.

> python train.py hparams/rkd_lstm.yaml
> python train.py hparams/rkd_lstm.yaml --data_folder /path/to/LibriSpeech \
      --corpus_yaml hparams/corpora/librispeech960.yaml
> python train.py hparams/rkd_lstm.yaml \
      --student_yaml hparams/models/jasper_mini.yaml

One experiment from top to bottom: the corpus, the teacher (trained first when
there is none), the stages of the student in order, the evaluation. The same
command continues a stopped run where it stopped.
"""

import hashlib
import io
import logging
import math
import platform
import random
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack, redirect_stderr
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from tutornet_sb.util.environment import check_torchaudio
from tutornet_sb.util.errors import (
    InputError,
    SettingError,
    failing_in_one_line,
)

# Before SpeechBrain loads it
with failing_in_one_line("train.py", "--debug" in sys.argv):
    check_torchaudio()

import speechbrain as sb
import torch
from hyperpyyaml import resolve_references
from ruamel.yaml import YAML
from speechbrain.augment.time_domain import Resample
from speechbrain.dataio.dataloader import make_dataloader
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.decoders.ctc import CTCBeamSearcher
from speechbrain.utils.distributed import infer_device
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.train_logger import FileTrainLogger

from tutornet_sb.corpora import minilibri
from tutornet_sb.corpora.audio import read_utterance
from tutornet_sb.corpora.librispeech import (
    find_librispeech,
    prepare_librispeech,
    read_manifest,
)
from tutornet_sb.corpora.tables import KINDS, name_tables, prepare_tables
from tutornet_sb.corpora.tokenizer import pieces, train_tokenizer
from tutornet_sb.distillation.frame_weighting import name_weighting
from tutornet_sb.distillation.head import fit_head
from tutornet_sb.distillation.intermediate import IntermediateHeads
from tutornet_sb.distillation.pairs import (
    choose_pairs,
    make_projectors,
    teacher_taps,
)
from tutornet_sb.distillation.standardisation import Standardiser
from tutornet_sb.distillation.taps import find_taps, select_taps, trying_out
from tutornet_sb.experiments.compare import short_table, summarize
from tutornet_sb.inference.latency import emission_latency, word_ends
from tutornet_sb.inference.scores import (
    count_errors,
    real_time_factor,
    score,
    write_alignments,
)
from tutornet_sb.inference.transcription import check_language_model
from tutornet_sb.networks import runs
from tutornet_sb.networks.acoustic_model import AcousticModel
from tutornet_sb.networks.streaming import Stream, check_streamable
from tutornet_sb.networks.weights import load_model_weights
from tutornet_sb.targets.encodings import QUANTISERS
from tutornet_sb.targets.extraction import (
    StoredTeacher,
    default_folder,
    describe,
    fill_store,
    measure_hidden,
    weights_hash,
)
from tutornet_sb.targets.store import flatten
from tutornet_sb.teachers.pseudo_labels import (
    letters_of,
    read_pseudo_labels,
    write_pseudo_labels,
)
from tutornet_sb.teachers.sources import load_teacher
from tutornet_sb.teachers.teacher import Teacher
from tutornet_sb.teachers.vocabulary import (
    VocabularyError,
    VocabularyMap,
    match_vocabulary,
)
from tutornet_sb.training.checkpoints import AtomicCheckpointer
from tutornet_sb.training.ctc import CTCBrain
from tutornet_sb.training.rkd import RKDBrain
from tutornet_sb.training.settings import expand_home, load_experiment
from tutornet_sb.training.skd import SKDBrain
from tutornet_sb.util import processes, signals
from tutornet_sb.util.files import (
    locked,
    read_json,
    remove_unfinished,
    write_atomically,
    write_json,
)
from tutornet_sb.util.machine import describe_machine
from tutornet_sb.util.options import Options, read_options
from tutornet_sb.util.processes import main_first, own_share, run_on_main

logger = logging.getLogger(__name__)

# pseudo: CTC on the teacher's transcripts
BRAINS = {
    "ctc": CTCBrain,
    "skd": SKDBrain,
    "rkd": RKDBrain,
    "pseudo": CTCBrain,
}
# Those of them that ask the teacher about every batch
TAUGHT = "rkd", "skd"
HELP = """In this recipe:
  --debug               show the traceback of an error, before its line
  --KEY VALUE           give any value of hparams/base.yaml
Exit codes: 0 done, 1 unexpected error, 2 bad input or command line, 75 stopped
by a signal (the same command goes on)."""
RECIPE_FOLDER = Path(__file__).resolve().parent
STAGE_SUMMARY = "stage.json"
STATISTICS = "hidden_statistics.json"
CORPUS = "corpus.json"
LOCK = "run.lock"
# Options of SpeechBrain's short trial runs. They would leave stages behind that
# look finished.
NOT_OFFERED = "debug_batches", "debug_epochs", "debug_persistently", "test_only"
# What does not make a teacher another one, paths and what they have led to; and
# what of the corpus does
NOT_OF_TEACHER = {
    "corpus",
    "corpus_folder",
    "corpus_overrides",
    "corpus_yaml",
    "output_folder",
    "results_folder",
    "run_name",
    "student_overrides",
    "student_size",
    "student_yaml",
    "trust_remote_code",
}
OF_TEACHER = "minilibri", "train_splits", "tokenizer_type", "vocab_size"
# What may differ when a run is continued or scored again
CHANGEABLE = {
    "baseline_folder",
    "beam_size",
    "ckpt_interval_minutes",
    "continue_anyway",
    "data_folder",
    "kenlm_model_path",
    "max_seconds",
    "max_skipped",
    "num_workers",
    "recipe_folder",
    "rtf_utterances",
    "store_folder",
    "test_csv",
    "train_csv",
    "valid_csv",
}


def prepare_corpus(hparams):
    """Find or make the corpus.

    Returns the folder that holds the splits, the manifest of each split, and
    the names of the splits to train on, to select by and to test on, and of
    those to be heard without their transcripts.
    """
    corpus, folder = hparams["corpus"], hparams["data_folder"]
    if any(hparams[f"{kind}_csv"] for kind in KINDS):
        return prepare_own(hparams)
    if folder is None and corpus["minilibri"] is None:
        raise SettingError(
            f"the corpus '{corpus['name']}' is not embedded: say where it lies "
            "by --data_folder /path/to/LibriSpeech"
        )
    if folder is None:
        folder = minilibri.find_folder(corpus)
        values = {**corpus["minilibri"], "folder": folder}
        run_on_main(minilibri.make_minilibri, [], values)
    splits = {kind: corpus[f"{kind}_splits"] for kind in KINDS}
    named = None
    if None not in splits.values():
        named = list(dict.fromkeys(sum(map(list, splits.values()), [])))
    untranscribed = list(corpus["untranscribed_splits"])
    save_folder = Path(hparams["corpus_folder"]) / "manifests"
    manifests = run_on_main(
        prepare_librispeech,
        [folder, save_folder],
        {
            "splits": named,
            "sample_rate": sample_rate(hparams),
            "untranscribed": untranscribed,
            "max_skipped": hparams["max_skipped"],
            "max_seconds": hparams["max_seconds"],
        },
    )
    data_root = find_librispeech(folder)
    for kind, prefix in KINDS.items():
        if splits[kind] is None:
            splits[kind] = [
                name
                for name in manifests
                if name.startswith(prefix) and name not in untranscribed
            ]
        if not splits[kind]:
            raise InputError(
                f"{data_root} has no {prefix} split among "
                f"{', '.join(manifests)}"
            )
        both = [name for name in splits[kind] if name in untranscribed]
        if both:
            raise InputError(
                f"corpus '{corpus['name']}': {both[0]} stands in "
                f"{kind}_splits and in untranscribed_splits"
            )
    return data_root, manifests, splits | {"untranscribed": untranscribed}


def prepare_own(hparams):
    """Prepare a corpus in tables, as ``prepare_corpus`` does a folder."""
    tables = {
        kind: name_tables(kind, hparams[f"{kind}_csv"], RECIPE_FOLDER)
        for kind in KINDS
    }
    missing = [f"--{kind}_csv FILE" for kind in KINDS if not tables[kind]]
    if missing:
        raise SettingError(
            "a corpus in tables has one for training, one to select by and one "
            f"to test on: say {' and '.join(missing)} too"
        )
    embedded = hparams["corpus"]["minilibri"] is not None
    if embedded or hparams["data_folder"] is not None:
        raise SettingError(
            "--train_csv and a folder of recordings are two corpora: leave out "
            "--data_folder, and say --corpus_yaml hparams/corpora/own.yaml"
        )
    every = tables["train"] | tables["valid"] | tables["test"]
    root, manifests = run_on_main(
        prepare_tables,
        [every, Path(hparams["corpus_folder"]) / "manifests"],
        {
            "sample_rate": sample_rate(hparams),
            "max_skipped": hparams["max_skipped"],
            "max_seconds": hparams["max_seconds"],
        },
    )
    splits = {kind: list(named) for kind, named in tables.items()}
    return root, manifests, splits | {"untranscribed": []}


def sample_rate(hparams):
    """Sample rate of the student's input (Hz)."""
    return hparams["student"]["model"].features.sample_rate


def tokenizer_file(hparams):
    """Where the tokenizer of the corpus lies."""
    kind = hparams["corpus"]["tokenizer_type"]
    name = f"{kind}_{hparams['symbols']['count']}.model"
    return Path(hparams["corpus_folder"]) / name


class Data(NamedTuple):
    """The utterances of an experiment.

    Items are dictionaries by utterance id, sets are SpeechBrain's. Transcripts
    of the untranscribed ones are not looked at.
    """

    transcribed: dict
    untranscribed: dict
    valid: DynamicItemDataset
    scored: dict


def read_data(hparams, data_root, manifests, splits):
    """Read the manifests; each scored split is a set of its own."""
    speeds = hparams["speed_perturb"] or [100]

    def items(names, speeds=(100,)):
        found = {}
        for split in names:
            part = read_manifest(manifests[split], data_root)
            for key, item in part.items():
                if key in found:
                    raise InputError(
                        f"utterance {key} stands in {found[key]['split']} and "
                        f"in {split}: utterances that are heard together need "
                        "names of their own"
                    )
                found[key] = item | {
                    "split": split,
                    "transcribed": True,
                    "speeds": speeds,
                }
        return found

    train = items(splits["train"], speeds)
    silent = items(splits["untranscribed"], speeds)
    silent |= keep_share(train, hparams["transcribed_share"])
    for key in silent:
        silent[key] |= {"transcribed": False}
    return Data(
        train,
        silent,
        make_dataset(items(splits["valid"]), hparams),
        {
            split: make_dataset(items([split]), hparams)
            for split in dict.fromkeys([*splits["valid"], *splits["test"]])
        },
    )


def keep_share(items, share):
    """Keep a share of the items, at least one, and return the others.

    By hashes of their ids, so that they are the same in all runs, and those of
    a smaller share among those of a larger one.
    """

    def place(key):
        return hashlib.sha256(key.encode()).digest(), key

    kept = max(1, round(share * len(items)))
    return {key: items.pop(key) for key in sorted(items, key=place)[kept:]}


def check_letters(data, hparams):
    """See that the transcripts are of the tokenizer's letters, nearly all.

    A small training set may lack a letter of a test set, but hardly of most of
    its transcripts.
    """
    tokenizer, limit = hparams["tokenizer"], hparams["max_skipped"]
    letters = {" ", *"".join(pieces(tokenizer))}
    parts = [("the training set", data.transcribed, limit)]
    for split, scored in data.scored.items():
        parts.append((split, scored.data, max(limit, 0.5)))
    for name, items, limit in parts:
        foreign = {
            key: strange
            for key, item in items.items()
            if (strange := set(item["wrd"]) - letters)
            # It may have an own idea of what is the same letter.
            and tokenizer.unk_id() in tokenizer.encode(item["wrd"])
        }
        if len(foreign) > limit * len(items):
            found = sorted(set().union(*foreign.values()))
            raise InputError(
                f"{name}: {len(foreign)} of {len(items)} transcripts have "
                f"letters that the tokenizer lacks ({' '.join(found[:20])}), "
                f"the first is that of {next(iter(foreign))}. Write them in "
                "its letters (of the same case, numbers in words), raise "
                "max_skipped, and such letters are left out, or train on an "
                "alphabet of the corpus' own (docs/own_corpus.md)"
            )


def symbols_of(ids, tokenizer):
    """Leave out what the tokenizer does not know.

    Its index is that of the blank, which must not be learnt from a transcript.
    """
    return [index for index in ids if index != tokenizer.unk_id()]


def store_key(key, split, speed):
    """Key of an utterance in a target store, at a speed in percent.

    Splits may use the same ids.
    """
    return f"{split}/{key}" + ("" if speed == 100 else f"@{speed:g}")


def make_dataset(items, hparams, stored=None, epochs=None):
    """Waveform, tokens and transcript of each item, made when asked for.

    With a stored teacher, its targets of the item too. One of the speeds of
    an item is drawn in each epoch, which the counter `epochs` tells.
    """
    rate, tokenizer = sample_rate(hparams), hparams["tokenizer"]
    speeds = {speed for item in items.values() for speed in item["speeds"]}
    # SpeechBrain's SpeedPerturb does the same, and draws a random number.
    perturb = {speed: Resample(speed, 100) for speed in speeds}

    @sb.utils.data_pipeline.takes("id", "wav", "duration", "speeds")
    @sb.utils.data_pipeline.provides("sig", "speed")
    def audio(key, wav, duration, speeds):
        sig = read_utterance(key, wav, float(duration), rate)
        # Whichever process asks, and after whatever stop, it is the same.
        epoch = epochs.current if epochs else 0
        drawn = random.Random(f"{hparams['seed']} {epoch} {key}")
        speed = drawn.choice(speeds)
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


def count_frames(samples, student):
    """Frames of a student for numbers of samples, at the least."""
    rate, probe = student.features.sample_rate, 100
    hop = round(student.frame_period * rate)
    with trying_out(student) as device:
        wavs = torch.zeros(1, probe * hop, device=device)
        found = student(wavs, torch.ones(1, device=device)).lengths.item()
    return [count // hop + found - probe for count in samples]


def fit_for_ctc(items, hparams, student):
    """Leave out speeds at which an utterance has too few frames for CTC.

    Where no speed is left, the utterance is left out.
    """
    tokenizer, fitting, short, unknown = hparams["tokenizer"], {}, {}, []
    rate = student.features.sample_rate
    spoken = [
        (key, speed) for key, item in items.items() for speed in item["speeds"]
    ]
    # As many as the resampler makes of them
    samples = [
        math.ceil(100 * round(float(items[key]["duration"]) * rate) / speed)
        for key, speed in spoken
    ]
    frames = dict(zip(spoken, count_frames(samples, student), strict=True))
    for key, item in items.items():
        ids = tokenizer.encode(item["wrd"])
        symbols = symbols_of(ids, tokenizer)
        if len(symbols) < len(ids):
            unknown.append(key)
        # CTC needs a frame for every symbol and one between equal neighbours.
        needed = len(symbols) + sum(a == b for a, b in pairwise(symbols))
        speeds = [s for s in item["speeds"] if frames[key, s] >= needed]
        if len(speeds) < len(item["speeds"]):
            short[key] = [s for s in item["speeds"] if s not in speeds]
        if speeds:
            fitting[key] = item | {"speeds": speeds}
    if short:
        lines = [
            key
            if key not in fitting
            else f"{key} at {', '.join(map(str, speeds))} % of its speed"
            for key, speeds in short.items()
        ]
        listing = Path(hparams["output_folder"]) / "too_short_for_ctc.txt"
        run_on_main(listing.write_text, ["\n".join(lines) + "\n"])
        logger.warning(
            "%d of %d training utterances have fewer frames than their "
            "transcript needs and are left out, and %d at some of their "
            "speeds: %s; see %s",
            len(items) - len(fitting),
            len(items),
            len(short) - len(items) + len(fitting),
            "; ".join(lines[:5]) + ("; ..." if lines[5:] else ""),
            listing,
        )
    if unknown:
        logger.warning(
            "%d training transcripts hold letters outside the vocabulary, "
            "which are left out; the first is that of %s",
            len(unknown),
            unknown[0],
        )
    return fitting


def pseudo_label(items, source, hparams):
    """Let the teacher transcribe, and keep what it is sure of."""
    letters = letters_of(pieces(hparams["tokenizer"]), hparams["blank_index"])
    spoken = {key: item | {"speeds": [100]} for key, item in items.items()}
    data = make_dataset(spoken, hparams)
    path = Path(hparams["output_folder"]) / "pseudo_labels.csv"
    run_on_main(
        write_pseudo_labels,
        [source, data, path, letters],
        {"num_workers": hparams["num_workers"]},
    )
    labels = read_pseudo_labels(path, hparams["min_confidence"])
    logger.info(
        "%d utterances are learnt from the transcripts of %s; %d of which it "
        "is too unsure and %d in which it hears nothing are left out: see %s",
        len(labels.transcripts),
        source.name,
        labels.unsure,
        labels.empty,
        path,
    )
    # In the order of the corpus, whatever the teacher heard first
    return {
        key: item | {"wrd": labels.transcripts[key], "transcribed": True}
        for key, item in items.items()
        if key in labels.transcripts
    }


def training_set(name, data, source, student, hparams, epochs=None):
    """What a stage hears: by CTC alone what has transcripts, otherwise all.

    Returns the set and its speech in seconds.
    """
    items, silent = data.transcribed, data.untranscribed
    if name == "pseudo":
        items, silent = pseudo_label(items | silent, source, hparams), {}
    elif name == "ctc" and silent:
        logger.info(
            "Stage ctc needs transcripts: it leaves out %d utterances that "
            "have none",
            len(silent),
        )
        silent = {}
    if name in ("ctc", "pseudo") or (name == "skd" and hparams["ctc_weight"]):
        items = fit_for_ctc(items, hparams, student)
    items = items | silent
    if not items:
        raise InputError(
            f"stage {name}: no training utterance is left, see the log above: "
            "has the audio the length of its transcripts?"
        )
    seconds = sum(float(item["duration"]) for item in items.values())
    return make_dataset(items, hparams, epochs=epochs), seconds


def batches(hparams, data, shuffle):
    """Batch utterances of like length, so many seconds at a time."""
    return DynamicBatchSampler(
        data,
        max_batch_length=hparams["batch_seconds"],
        num_buckets=hparams["num_buckets"],
        length_func=lambda item: float(item["duration"]),
        shuffle=shuffle,
        batch_ordering="random" if shuffle else "descending",
        seed=hparams["seed"],
    )


def teacher_folder(hparams):
    """Where the teacher's run is, or will be."""
    if hparams["teacher_folder"] is not None:
        return hparams["teacher_folder"]
    name = f"teacher_{hparams['teacher_name']}"
    return str(Path(hparams["corpus_folder"]) / name / "1234")


def read_own_teacher(hparams):
    """Read the experiment by which this recipe trains the teacher.

    Returns its main file, its text, the overrides and the values.
    """
    passed_on = (
        "corpus_yaml",
        "corpus_overrides",
        "data_folder",
        "train_csv",
        "valid_csv",
        "test_csv",
        "max_seconds",
        "max_skipped",
        "results_folder",
        "num_workers",
        "rtf_utterances",
    )
    hparams_file = Path(hparams["teacher_hparams"])
    if not hparams_file.is_file():
        hparams_file = RECIPE_FOLDER / hparams_file
    overrides = {key: hparams[key] for key in passed_on}
    overrides["student_yaml"] = hparams["teacher_yaml"]
    overrides["student_size"] = hparams["teacher_size"]
    overrides["output_folder"] = teacher_folder(hparams)
    return hparams_file, *read_hparams(hparams_file, overrides)


def prepare_teacher(hparams, run_opts):
    """Load the teacher, or check the one that is yet to be trained.

    Returns the teacher, or None.
    """
    folder = teacher_folder(hparams)
    is_finished = runs.is_finished(folder)
    is_given = hparams["teacher_source"] or hparams["teacher_folder"]
    if hparams["teacher_source"] is None and not (is_given and is_finished):
        _, text, overrides, theirs = main_first(read_own_teacher, [hparams])
        resolved = resolve_references(text, overrides).read()
        if is_finished:
            refuse_other_teacher(resolved, folder, hparams)
        else:
            refuse_other(*compared(resolved, Path(folder)), folder, theirs)
            # With random weights it can be asked for its layers already.
            model = theirs["student"]["model"]
            check_teacher(folder, model, True, hparams)
            return None
    return find_teacher(hparams, run_opts)


def refuse_other_teacher(resolved, folder, hparams):
    """Keep a teacher from being taken for one of other values.

    It may have been trained by another command, so only what made it counts.
    """
    there, now = (
        {
            key: value
            for key, value in values.items()
            if key not in NOT_OF_TEACHER and not key.startswith("teacher_")
        }
        | {f"corpus.{key}": values["corpus"].get(key) for key in OF_TEACHER}
        for values in compared(resolved, Path(folder))
    )
    other = differences(there, now)
    if other and not hparams["continue_anyway"]:
        raise SettingError(
            f"{folder} holds another teacher than this command asks for: "
            f"{other}. Use it all the same by --teacher_folder {folder}, or "
            "give another --teacher_folder"
        )
    if other:
        logger.warning("%s holds another teacher: %s", folder, other)


def check_teacher(name, model, has_head, hparams):
    """See that a teacher can do what all stages ask of it.

    Returns the pairs of layers.
    """
    wanted = hparams["student"]["model"].features.sample_rate
    if model.features.sample_rate != wanted:
        raise InputError(
            f"teacher {name} expects {model.features.sample_rate} Hz and the "
            f"student {wanted} Hz: choose a teacher of the student's rate"
        )
    stages = hparams["stages"]
    if not has_head:
        learnt = {"skd": "posteriors", "pseudo": "transcripts"}
        for stage in stages:
            if stage in learnt:
                raise InputError(
                    f"teacher {name} has no CTC head, so stage {stage} has no "
                    f"{learnt[stage]} to learn from: choose a teacher with "
                    'one, or --method rkd+ctc --stages "[rkd, ctc]"'
                )
        if "rkd" in stages and hparams["frame_weighting"] == "nonblank":
            raise InputError(
                f"teacher {name} has no CTC head, whose posteriors frame "
                "weighting nonblank needs: leave frame_weighting out, or "
                "choose uniform or energy"
            )
        if "rkd" in stages and hparams["frame_weighting"] is None:
            logger.info(
                "frame_weighting is energy: teacher %s has no CTC head", name
            )
    return choose_layers(model, hparams)


def choose_layers(teacher, hparams):
    """Find the layers that are paired, before all else. Returns the pairs."""
    if "rkd" not in hparams["stages"]:
        return []
    student = hparams["student"]["model"]
    pairs = choose_pairs(hparams["pairs"], teacher, student)
    taps = select_taps(teacher, teacher_taps(pairs), "teacher")
    if hparams["targets"] == "store" and (
        hparams["hidden_encoding"] in QUANTISERS
    ):
        for path, tap in taps.items():
            if hparams["code_bytes"] > tap.hidden_size:
                raise SettingError(
                    f"code_bytes: must be 1 to {tap.hidden_size}, the "
                    f"dimensions of the teacher's layer {path}, and is "
                    f"{hparams['code_bytes']}"
                )
    return pairs


def find_teacher(hparams, run_opts):
    """Load the teacher: a run of this recipe, or a model from elsewhere."""
    source = main_first(
        load_teacher,
        [hparams["teacher_source"] or teacher_folder(hparams)],
        {
            "revision": hparams["teacher_revision"],
            "kind": hparams["teacher_kind"],
            # One's own run may be of any parts.
            "trust_remote_code": hparams["trust_remote_code"]
            or hparams["teacher_source"] is None,
        },
    )
    asked, has_head = hparams["pairs"], source.pieces is not None
    pairs = check_teacher(source.name, source.model, has_head, hparams)
    for pair in pairs:
        logger.info(
            "RKD: %s of the student learns %s of the teacher, weight %g",
            pair.student,
            pair.teacher,
            pair.weight,
        )
    if pairs and isinstance(asked, int) and len(pairs) < asked:
        logger.warning(
            "pairs: %d instead of %d, for an encoder has no more layers in a "
            "row at its frame rate; `tutornet layers` lists what can be named",
            len(pairs),
            asked,
        )
    hparams["pairs"] = pairs
    source.model.to(run_opts.get("device") or infer_device())
    return source


def train_teacher(hparams, run_opts):
    """Run the experiment of a teacher that is missing."""
    logger.info(
        "No finished teacher in %s: training it first", teacher_folder(hparams)
    )
    hparams_file, _, overrides, _ = main_first(read_own_teacher, [hparams])
    run(hparams_file, run_opts, overrides)


def match_symbols(source, transcribed, hparams):
    """Put the teacher's symbols on the student's, one by one."""
    tokenizer, unused = hparams["tokenizer"], set()
    ours = pieces(tokenizer)
    if source.pieces is not None and list(source.pieces) != ours:
        # A symbol in no transcript need not be taught.
        used = {
            index
            for item in transcribed.values()
            for index in tokenizer.encode(item["wrd"])
        }
        unused = {piece for i, piece in enumerate(ours) if i not in used}
    vocabulary = match_vocabulary(
        source.pieces,
        ours,
        source.blank_index,
        hparams["blank_index"],
        unused=unused,
        teacher_name=f"teacher {source.name}",
        student_name=f"corpus {hparams['corpus']['name']}",
    )
    for line in vocabulary.describe():
        logger.info("Vocabulary: %s", line)
    return vocabulary


def match_or_do_without(source, data, hparams):
    """Match the symbols, or let the teacher teach by hidden states alone."""
    try:
        hparams["vocabulary"] = match_symbols(source, data.transcribed, hparams)
    except VocabularyError as error:
        if "skd" in hparams["stages"]:
            raise
        logger.info("No posteriors of the teacher are used: %s", error)
        hparams["vocabulary"] = blank_alone(source, hparams)
        hparams["head_frames"] = 0


def blank_alone(source, hparams):
    """Keep of a foreign vocabulary what frame weighting asks for."""
    if source.pieces is None:
        return None
    blank = hparams["blank_index"]
    targets = [0 if blank else 1] * len(source.pieces)
    targets[source.blank_index] = blank
    return VocabularyMap(targets, len(pieces(hparams["tokenizer"])), blank)


def stage_epochs(hparams):
    """Share the student's epochs out among the stages."""
    stages, epochs = hparams["stages"], hparams["epochs"]
    unknown = [stage for stage in stages if stage not in BRAINS]
    if unknown or not stages:
        raise SettingError(
            f"stages: {stages} must name stages among {', '.join(BRAINS)}"
        )
    if hparams["method"] != "+".join(stages):
        raise SettingError(
            f"method: {hparams['method']} is not what stages: {stages} do; "
            f"say --method {'+'.join(stages)} too"
        )
    if len(stages) == 1:
        return {stages[0]: epochs}
    if len(stages) > 2 or stages[0] != "rkd" or stages[1] == "rkd":
        raise SettingError(f"stages: {stages}: a second stage follows rkd only")
    first = round(epochs * hparams["rkd_share"])
    if not 0 < first < epochs:
        share = hparams["rkd_share"]
        remedy = "a share between, such as --rkd_share 0.5"
        if 0 < share < 1:
            start = math.floor(0.5 / min(share, 1 - share))
            least = next(
                n
                for n in range(max(2, start), start + 3)
                if 0 < round(n * share) < n
            )
            remedy = f"--epochs {least} or more"
            if epochs > 1:
                remedy += ", or --rkd_share 0.5"
        elif epochs == 1:
            remedy += ", and --epochs 2 or more"
        raise SettingError(
            f"rkd_share {share} of {epochs} epochs leaves a stage without any: "
            f"give {remedy}"
        )
    return {stages[0]: first, stages[1]: epochs - first}


def stage_folder(name, hparams):
    """Where a stage keeps its checkpoints, logs and alignments."""
    return Path(hparams["output_folder"]) / runs.STAGES / name


def encodings_of(hparams):
    """How a target store keeps its targets."""
    return {
        "posteriors": hparams["posterior_encoding"],
        "top_k": hparams["top_k"],
        "hidden": hparams["hidden_encoding"],
        "code_bytes": hparams["code_bytes"],
    }


def fill_targets(source, sets, hparams, run_opts):
    """Let the teacher fill the target store with what it lacks.

    `sets` are items, each with the speeds at which the student receives it.
    Returns the store.
    """
    taps = teacher_taps(hparams["pairs"])
    teacher = Teacher(source.model, taps, hparams["vocabulary"])
    what = describe(
        teacher,
        pieces(hparams["tokenizer"]),
        hparams["blank_index"],
        encodings_of(hparams),
    )
    folder = hparams["store_folder"]
    if folder is None:
        folder = default_folder(hparams["corpus_folder"], what)
    for items in sets:
        speeds = [s for item in items.values() for s in item["speeds"]]
        for speed in dict.fromkeys(speeds):
            variants = {
                store_key(key, item["split"], speed): item | {"speeds": [speed]}
                for key, item in items.items()
                if speed in item["speeds"]
            }
            store = fill_store(
                folder,
                what,
                teacher,
                make_dataset(variants, hparams),
                batch_seconds=hparams["batch_seconds"],
                num_workers=hparams["num_workers"],
                precision=run_opts.get("precision", "fp32"),
                made={"teacher": source.name},
                progressbar=not run_opts.get("noprogressbar", False),
            )
    return store


def hidden_statistics(path, teacher, train, hparams):
    """Measure an online teacher's hidden states, once for a stage.

    Returns the statistics and the seconds that they took.
    """
    if not path.is_file():
        started = time.monotonic()
        statistics = measure_hidden(
            teacher, train, hparams["batch_seconds"], hparams["num_workers"]
        )
        seconds = time.monotonic() - started
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"seconds": seconds, "statistics": statistics})
    return read_json(path)


def prepare_head(student, teacher, train, hparams):
    """Give an encoder fresh from RKD a head that knows the symbols."""
    if not hparams["head_frames"]:
        logger.info("The head of the student starts from random weights")
        return
    # In the order of training, so that any part is a fair sample.
    loader = make_dataloader(
        train, batch_sampler=batches(hparams, train, shuffle=True)
    )
    loss = run_on_main(
        fit_head,
        [student, teacher, loader],
        {
            "frames": hparams["head_frames"],
            "delay": hparams["delay"],
            "blank_index": hparams["blank_index"],
        },
    )
    logger.info("The head was fitted to the teacher: %.3f nats a frame", loss)


def train_stage(name, epochs, student, source, data, hparams, run_opts):
    """Train one stage and leave its best weights in the student.

    Returns what is known of the stage: epochs, seconds, figure of the best.
    """
    folder = stage_folder(name, hparams)
    weights, summary = folder / runs.WEIGHTS, folder / STAGE_SUMMARY
    if weights.is_file() and summary.is_file():
        logger.info("Stage %s is finished: using %s", name, weights)
        load_model_weights(student, weights)
        return read_json(summary)

    # The same whether the stages before it were run now or long ago, but not
    # the same masks of dropout and augmentation in all processes
    sb.utils.seed.seed_everything(hparams["seed"] + processes.rank())
    counter = EpochCounter(epochs)
    train, seconds = training_set(name, data, source, student, hparams, counter)
    valid = data.valid
    modules, extraction = {"student": student}, {}
    if name in TAUGHT:
        taps = teacher_taps(hparams["pairs"]) if name == "rkd" else ()
        if hparams["targets"] == "online":
            teacher = Teacher(source.model, taps, hparams["vocabulary"])
            if name == "rkd":
                extraction = run_on_main(
                    hidden_statistics,
                    [folder / STATISTICS, teacher, train, hparams],
                )
                teacher.standardise = Standardiser(
                    extraction["statistics"], teacher.taps
                )
        else:
            sets = [train.data]
            # RKD has no other figure to select by than its loss.
            if name == "rkd":
                sets.append(valid.data)
            store = fill_targets(source, sets, hparams, run_opts)
            extraction = store.made
            teacher = StoredTeacher(store, taps)
            train = make_dataset(train.data, hparams, teacher, counter)
            if name == "rkd":
                valid = make_dataset(valid.data, hparams, stored=teacher)
        modules["teacher"] = teacher
    # Loaders have generators of their own, or the next random number would
    # depend on how often the training was stopped.
    valid_loader = make_dataloader(
        valid,
        batch_sampler=own_share(batches(hparams, valid, shuffle=False)),
        generator=torch.Generator(),
    )
    if name == "rkd":
        modules["projector"] = make_projectors(
            hparams["projector"], hparams["pairs"], modules["teacher"], student
        )
    elif hparams["intermediate"]:
        modules["heads"] = IntermediateHeads(
            hparams["intermediate"], student, len(pieces(hparams["tokenizer"]))
        )
    checkpointer = AtomicCheckpointer(
        folder / "save",
        {key: m for key, m in modules.items() if key != "teacher"}
        | {"counter": counter},
    )
    brain = BRAINS[name](
        modules,
        hparams=hparams
        | {
            "epoch_counter": counter,
            "train_logger": FileTrainLogger(str(folder / runs.TRAIN_LOG)),
            "log_folder": str(folder / "tensorboard"),
            # The head takes no part in RKD.
            "find_unused_parameters": name == "rkd",
        },
        opt_class=hparams["opt_class"],
        run_opts=run_opts,
        checkpointer=checkpointer,
    )
    logger.info("Stage %s: %d epochs in %s", name, epochs, folder)
    brain.fit(
        counter,
        train,
        valid_loader,
        train_loader_kwargs={
            "batch_sampler": batches(hparams, train, shuffle=True),
            "num_workers": hparams["num_workers"],
            "worker_init_fn": signals.leave_to_parent,
            "generator": torch.Generator(),
        },
    )
    best = brain.load_best(valid_loader)
    if name == "rkd":
        prepare_head(student, modules["teacher"], train, hparams)
    figures = {
        "epochs": epochs,
        "steps": brain.steps_per_epoch * epochs,
        "train_audio_seconds": seconds,
        "train_seconds": brain.watch.seconds,
        **best,
        "processes": processes.count(),
    }
    if extraction:
        figures["extraction_seconds"] = extraction["seconds"]
    if name == "rkd":
        figures["pairs"] = [pair._asdict() for pair in hparams["pairs"]]
        figures["frame_weighting"] = name_weighting(
            hparams["representation_loss"].weighting, modules["teacher"].symbols
        )
    state = student.state_dict()
    run_on_main(write_atomically, [weights, lambda p: torch.save(state, p)])
    # The head was fitted in one process.
    load_model_weights(student, weights)
    run_on_main(write_json, [summary, figures])
    return figures


def evaluate(name, figures, student, scored, hparams, run_opts):
    """Add the scores of each split to the figures of a stage, and save them.

    A split that was scored before with the same decoding is left alone.
    """
    folder = stage_folder(name, hparams)
    decoding = {key: hparams[key] for key in ("beam_size", "kenlm_model_path")}
    if figures.get("decoding") != decoding:
        figures |= {"decoding": decoding, "splits": {}}
    known, counts = figures["splits"], folder / runs.ERRORS
    errors = read_json(counts) if counts.is_file() else {}
    searcher = make_searcher(hparams)
    brain = CTCBrain(
        {"student": student},
        hparams=hparams | {"searcher": searcher},
        run_opts=run_opts,
    )
    for split, data in scored.items():
        if split in known and split in errors:
            continue
        loader = make_dataloader(
            data, batch_sampler=own_share(batches(hparams, data, shuffle=False))
        )
        brain.evaluate(loader)
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


def make_searcher(hparams):
    """Make the beam searcher, if one is asked for."""
    if hparams["beam_size"] is None:
        return None
    return CTCBeamSearcher(
        blank_index=hparams["blank_index"],
        vocab_list=pieces(hparams["tokenizer"]),
        beam_size=hparams["beam_size"],
        kenlm_model_path=hparams["kenlm_model_path"],
    )


def can_stream(student):
    """Tell whether a student may write while it listens."""
    try:
        check_streamable(student.eval())
    except ValueError:
        return False
    return True


def add_latency(splits, student, source, scored, hparams):
    """Measure how long after its end a streaming student writes a word.

    The ends are found by the teacher, which must have the student's symbols.
    """
    ours, blank = pieces(hparams["tokenizer"]), hparams["blank_index"]
    if source is None or source.pieces != ours or not can_stream(student):
        return
    for split, data in scored.items():
        if "latency" in splits[split]:
            continue
        loader = make_dataloader(
            data, batch_sampler=batches(hparams, data, shuffle=False)
        )
        ends = word_ends(source.model, loader, ours, blank)
        splits[split]["latency"] = emission_latency(
            student,
            loader,
            ours,
            ends,
            blank,
            look_ahead=Stream(student).latency,
        )


def describe_source(source):
    """What can be told of a teacher that is no run of this recipe."""
    return {
        "folder": source.name,
        "name": source.kind,
        "parameters": sum(p.numel() for p in source.model.parameters()),
    }


def measure_speed(student, data, hparams):
    """Real-time factor on a few utterances of a test split."""
    some = [
        data[i]["sig"] for i in range(min(len(data), hparams["rtf_utterances"]))
    ]
    return real_time_factor(
        student.eval(),
        some,
        student.features.sample_rate,
        hparams["blank_index"],
    )


def refuse_other(there, now, folder, hparams):
    """Keep a folder from mixing the results of two experiments.

    `there` and `now` are what the folder holds and what it would hold. Before
    a checkpoint is saved in it, it may hold anything. Returns whether that is
    something else.
    """
    stages = Path(folder) / runs.STAGES
    trained = *stages.glob("*/save/CKPT*"), *stages.glob(f"*/{runs.WEIGHTS}")
    other = differences(there, now)
    if not trained or not other:
        return bool(other)
    if not hparams["continue_anyway"]:
        raise InputError(
            f"{folder} holds another experiment: {other}. Give this one its "
            "own --output_folder, delete that one, or go on in it by "
            "--continue_anyway True"
        )
    logger.warning("%s held another experiment: %s", folder, other)
    return False


def differences(there, now):
    """Say in what two experiments differ, by key; an empty text if in none."""
    there, now = flatten(there), flatten(now)
    other = [
        f"there {key} is {there.get(key)!s:.99}, and now it is "
        f"{now.get(key)!s:.99}"
        for key in {**there, **now}
        if there.get(key) != now.get(key)
    ]
    if len(other) > 5:
        other[5:] = [f"and {len(other) - 5} more"]
    return "; ".join(other)


def plain(node):
    """A YAML tree in which tags count and comments do not."""
    tag = getattr(getattr(node, "tag", None), "value", None)
    if hasattr(node, "items"):
        node = {str(key): plain(value) for key, value in node.items()}
        return node if tag is None else node | {"tag": tag}
    if isinstance(node, list):
        node = [plain(value) for value in node]
    else:
        node = getattr(node, "value", node)
    return node if tag is None else f"{tag} {node}"


def compared(resolved, folder):
    """Give what is compared of the experiment of a folder, and of one now."""
    path, yaml = folder / runs.HYPERPARAMS, YAML()
    texts = [resolved, resolved]
    if path.is_file():
        texts[0] = path.read_text(encoding="utf-8")
    return [
        {k: plain(v) for k, v in yaml.load(text).items() if k not in CHANGEABLE}
        for text in texts
    ]


def save_yaml(text, overrides, folder, hparams):
    """Save the experiment, and its network alone, with all values filled in."""
    resolved = resolve_references(text, overrides).read()
    if refuse_other(*compared(resolved, folder), folder, hparams):
        # What an experiment has left that came to no checkpoint
        shutil.rmtree(folder / runs.STAGES, ignore_errors=True)
    yaml, path = YAML(), folder / runs.HYPERPARAMS
    write_atomically(path, lambda file: file.write_text(resolved, "utf-8"))
    network = yaml.load(resolved)["student"]
    write_atomically(
        folder / runs.MODEL_YAML, lambda path: yaml.dump(network, path)
    )


def save_corpus(manifests, splits, folder, hparams):
    """Save what the corpus is: its symbols, and what is in its splits."""
    now = {"symbols": " ".join(pieces(hparams["tokenizer"])), "splits": {}}
    for split in dict.fromkeys(sum(map(list, splits.values()), [])):
        content = Path(manifests[split]).read_bytes()
        now["splits"][split] = {
            "utterances": content.count(b"\n") - 1,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    path = folder / CORPUS
    if path.is_file() and refuse_other(read_json(path), now, folder, hparams):
        shutil.rmtree(folder / runs.STAGES, ignore_errors=True)
    write_json(path, now)


def read_hparams(hparams_file, overrides):
    """Read an experiment and check all that can be checked at once.

    Returns its text, the overrides and the values.
    """
    overrides = expand_home(overrides) | {"recipe_folder": str(RECIPE_FOLDER)}
    text, hparams = load_experiment(
        hparams_file, overrides, RECIPE_FOLDER / "hparams" / "base.yaml"
    )
    check_together(hparams)
    return text, overrides, hparams


def check_together(hparams):
    """See that values go together which are used by stages far apart."""
    stages, student = stage_epochs(hparams), hparams["student"].get("model")
    if not isinstance(student, AcousticModel):
        raise SettingError(
            f"{hparams['student_yaml']} has no AcousticModel under the key "
            "'model'"
        )
    symbols = hparams["symbols"]["count"]
    if hparams["blank_index"] >= symbols:
        raise SettingError(
            f"blank_index: must be one of {symbols} symbols, 0 to "
            f"{symbols - 1}, and is {hparams['blank_index']}"
        )
    if "skd" in stages and not (
        hparams["ctc_weight"] or hparams["skd_weight_final"]
    ):
        raise SettingError(
            "ctc_weight and skd_weight_final are both 0, so nothing would be "
            "learnt in the end: say --skd_weight_final 1 too"
        )
    if hparams["kenlm_model_path"] is not None:
        if hparams["beam_size"] is None:
            raise SettingError(
                "kenlm_model_path is of beam search: say --beam_size 100 too"
            )
        check_language_model(hparams["kenlm_model_path"])
    is_coded = hparams["hidden_encoding"] in QUANTISERS
    if "rkd" in stages and hparams["targets"] == "store" and is_coded:
        # It makes the codebooks.
        import_module("faiss")
    layers = [row["student"] for row in hparams["intermediate"]]
    if "rkd" in stages and not isinstance(hparams["pairs"], int):
        layers += [pair["student"] for pair in hparams["pairs"]]
    # Either tries out whether it can encode, too.
    if layers:
        select_taps(student, dict.fromkeys(layers), "student")
    else:
        find_taps(student)


def check_longest(models, data, hparams):
    """See that student and teacher can encode the longest utterance.

    A Transformer has a table of positions.
    """
    slowest = min(hparams["speed_perturb"] or [100]) / 100
    seconds = {
        key: float(item["duration"]) / share
        for items, share in (
            (data.transcribed | data.untranscribed, slowest),
            *((scored.data, 1.0) for scored in data.scored.values()),
        )
        for key, item in items.items()
    }
    longest = max(seconds, key=seconds.get)
    for name, model in models.items():
        frames = getattr(model.encoder, "max_length", math.inf)
        most = frames * model.frame_period
        if seconds[longest] > most:
            raise InputError(
                f"utterance {longest} has {seconds[longest]:.1f} s, and the "
                f"{name} can encode {most:.1f} s: raise max_length of its "
                "network, or lower max_seconds"
            )


def check_writable(folder):
    """Make a folder and see that something can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise InputError(
            f"the output folder {folder} cannot be written to "
            f"({error.strerror}): give another --output_folder"
        ) from None


def find_data(hparams):
    """Find the corpus and its tokenizer, which is trained if there is none.

    Returns the utterances, the manifest of each split and the names of those
    to train on, to select by and to test on.
    """
    data_root, manifests, splits = prepare_corpus(hparams)
    corpus = hparams["corpus"]
    hparams["tokenizer"] = run_on_main(
        train_tokenizer,
        [
            [manifests[split] for split in splits["train"]],
            tokenizer_file(hparams),
            corpus["tokenizer_type"],
            hparams["symbols"]["count"],
            hparams["symbols"]["letters"],
        ],
    )
    data = read_data(hparams, data_root, manifests, splits)
    check_letters(data, hparams)
    return data, manifests, splits


def fill(hparams_file, run_opts, overrides):
    """Fill the target store of an experiment, without training a student.

    Returns the store.
    """
    _, _, hparams = main_first(read_hparams, [hparams_file, overrides])
    stages = [name for name in stage_epochs(hparams) if name in TAUGHT]
    if not stages:
        raise SettingError(
            f"method {hparams['method']} asks no teacher for targets: give a "
            "main file with rkd or skd"
        )
    source = prepare_teacher(hparams, run_opts)
    data, *_ = find_data(hparams)
    if source is None:
        train_teacher(hparams, run_opts)
        source = find_teacher(hparams, run_opts)
    match_or_do_without(source, data, hparams)
    sets = [data.transcribed | data.untranscribed]
    if "rkd" in stages:
        sets.append(data.valid.data)
    return fill_targets(source, sets, hparams, run_opts)


def run(hparams_file, run_opts, overrides):
    """Run one experiment, or continue it where it stopped.

    Of two calls with the same output folder, one waits for the other.
    """
    text, overrides, hparams = main_first(
        read_hparams, [hparams_file, overrides]
    )
    folder = Path(hparams["output_folder"])
    run_on_main(check_writable, [folder])
    with ExitStack() as stack:
        if processes.rank() == 0:
            stack.enter_context(locked(folder / LOCK, f"works in {folder}"))
            remove_unfinished(folder)
        processes.wait_for_all()
        run_alone(text, run_opts, overrides, hparams)
    return hparams


def run_alone(text, run_opts, overrides, hparams):
    """Run one experiment in a folder that nobody else works in."""
    output_folder = Path(hparams["output_folder"])
    corpus, student = hparams["corpus"], hparams["student"]["model"]
    # Networks that hear the waveform itself mask their frames themselves.
    if student.features.output_size > 1:
        student.augment = hparams["augment"]
    student.augment_waveform = hparams["augment_waveform"]
    epochs = stage_epochs(hparams)
    taught = any(stage != "ctc" for stage in epochs)
    sb.create_experiment_directory(str(output_folder))
    run_on_main(save_yaml, [text, overrides, output_folder, hparams])
    processes.check_shared(output_folder / runs.HYPERPARAMS)

    # The teacher, the corpus, its tokenizer, and how their symbols match. All
    # that may be wrong is found before a teacher is trained.
    source = None
    if taught:
        source = prepare_teacher(hparams, run_opts)
    elif runs.is_finished(teacher_folder(hparams)) and can_stream(student):
        # A streaming student alone is timed by the teacher, if there is one.
        source = find_teacher(hparams, run_opts)
    data, manifests, splits = find_data(hparams)
    run_on_main(save_corpus, [manifests, splits, output_folder, hparams])
    tokenizer = tokenizer_file(hparams)
    run_on_main(
        write_atomically,
        [
            output_folder / runs.TOKENIZER,
            lambda path: shutil.copyfile(tokenizer, path),
        ],
    )
    make_searcher(hparams)
    models = {"student": student}
    if taught and source is not None:
        models["teacher"] = source.model
    check_longest(models, data, hparams)
    if taught and source is None:
        train_teacher(hparams, run_opts)
        # Whose log was its own
        sb.create_experiment_directory(str(output_folder))
        source = find_teacher(hparams, run_opts)
    if taught:
        # Whether the teacher was there already makes no difference from here.
        sb.utils.seed.seed_everything(hparams["seed"])
        match_or_do_without(source, data, hparams)

    # The stages, each from the best weights of the one before it
    stages = {}
    for name, count in epochs.items():
        stages[name] = train_stage(
            name, count, student, source, data, hparams, run_opts
        )
        evaluate(name, stages[name], student, data.scored, hparams, run_opts)
    last = list(stages.values())[-1]
    run_on_main(
        add_latency, [last["splits"], student, source, data.scored, hparams]
    )

    # The student and what is known of it
    state = student.state_dict()
    run_on_main(
        write_atomically,
        [output_folder / runs.WEIGHTS, lambda path: torch.save(state, path)],
    )
    results = {
        "method": hparams["method"],
        "corpus": corpus["name"],
        "student": hparams["student"]["name"],
        "seed": hparams["seed"],
        "parameters": sum(p.numel() for p in student.parameters()),
        "weights_sha256": weights_hash(student),
        "epochs": hparams["epochs"],
        "train_audio_seconds": last["train_audio_seconds"],
        # All stages read the same targets.
        "train_seconds": sum(
            stage["train_seconds"] for stage in stages.values()
        )
        + max(
            stage.get("extraction_seconds", 0.0) for stage in stages.values()
        ),
        "real_time_factor": run_on_main(
            measure_speed, [student, data.scored[splits["test"][0]], hparams]
        ),
        "stages": stages,
        "teacher": None,
        "versions": {
            "tutornet_sb": version("tutornet-sb"),
            "speechbrain": sb.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": describe_machine(next(student.parameters()).device),
    }
    if taught:
        results["teacher"] = (
            summarize(source.name)
            if source.kind == "run"
            else describe_source(source)
        ) | {"weights_sha256": weights_hash(source.model)}
    run_on_main(write_json, [output_folder / runs.RESULTS, results])


def parse(words):
    """Read a command line and join the other processes, if there are any.

    Returns the main file, the options of SpeechBrain and the overrides.
    """
    if not sys.stderr.isatty():
        # In a file each state of a bar would stay.
        words = [*words, "--noprogressbar"]
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            hparams_file, run_opts, typed = Options.from_command_line_args(
                words
            )
    except SystemExit as stop:
        if not stop.code:
            print(f"\n{HELP}")
            raise
        raise SettingError(
            said.getvalue().strip().rpartition("error: ")[2]
            + ", see --help for the options"
        ) from None
    for name in NOT_OFFERED:
        if getattr(run_opts, name) != getattr(type(run_opts), name):
            raise SettingError(
                f"--{name} is not offered: a run of few batches would look "
                "like a finished one. Give a small corpus instead"
            )
    sb.utils.distributed.ddp_init_group(run_opts)
    return hparams_file, run_opts, read_options(typed)


def main():
    """Run the experiment that the command line describes and show its table."""
    signals.install()
    words = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(words) < len(sys.argv[1:])
    # Logging shows tracebacks of its own when the disk is full.
    logging.raiseExceptions = debug
    with failing_in_one_line("train.py", debug), processes.ending_together():
        hparams_file, run_opts, overrides = parse(words)
        hparams = run(hparams_file, run_opts, overrides)
        show(hparams)


def show(hparams):
    """Print the table of a run beside its teacher and its baseline."""
    shown = [hparams["output_folder"]]
    if hparams["stages"] != ["ctc"]:
        shown = [hparams["baseline_folder"], *shown]
        # A teacher from elsewhere is no run and has no row.
        if hparams["teacher_source"] is None:
            shown = [teacher_folder(hparams), *shown]
    folders = dict.fromkeys(map(str, shown))
    finished = [folder for folder in folders if runs.is_finished(folder)]
    if sb.utils.distributed.if_main_process():
        print(short_table(finished))
        print(f"\nThe run is in {hparams['output_folder']}")


if __name__ == "__main__":
    main()
