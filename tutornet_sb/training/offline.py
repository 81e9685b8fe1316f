"""What a stage needs of its teacher: online, or from a store filled first."""

import logging
import time

from speechbrain.dataio.dataloader import make_dataloader

from tutornet_sb.corpora.tokenizer import pieces
from tutornet_sb.distillation.head import fit_head
from tutornet_sb.distillation.pairs import teacher_taps
from tutornet_sb.distillation.standardisation import Standardiser
from tutornet_sb.targets.extraction import (
    StoredTeacher,
    default_folder,
    describe,
    fill_store,
    measure_hidden,
)
from tutornet_sb.teachers.teacher import Teacher
from tutornet_sb.training.corpus import prepare_corpus
from tutornet_sb.training.data import make_batches, make_dataset, store_key
from tutornet_sb.training.experiment import Experiment
from tutornet_sb.training.teacher import find_teacher, match_symbols
from tutornet_sb.util.errors import InputError, SettingError
from tutornet_sb.util.files import read_json, write_json
from tutornet_sb.util.processes import main_first, run_on_main

logger = logging.getLogger(__name__)

STATISTICS = "hidden_statistics.json"
ENCODINGS = "posteriors", "top_k", "hidden", "code_bytes"


def fill_targets(experiment, items, with_valid, run_opts):
    """Fill the target store with what it lacks, and return it.

    ``items`` are by id, each with the speeds that the student is trained at.
    RKD needs the development set too, for it selects by its loss.
    """
    settings = experiment.settings
    sets = [items, experiment.corpus.valid] if with_valid else [items]
    teacher = Teacher(
        experiment.teacher.model,
        teacher_taps(experiment.pairs),
        experiment.vocabulary,
    )
    what = describe(
        teacher,
        pieces(experiment.corpus.tokenizer),
        {key: settings["store"][key] for key in ENCODINGS},
    )
    folder = settings["store"]["folder"]
    if folder is None:
        folder = default_folder(settings["corpus_folder"], what)
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
                make_dataset(variants, experiment),
                batch_seconds=settings["batch_seconds"],
                num_workers=settings["num_workers"],
                precision=run_opts.get("precision", "fp32"),
                made={"teacher": experiment.teacher.source},
                progressbar=not run_opts.get("noprogressbar", False),
            )
    return store


def fill_targets_of(main_file, run_opts, options):
    """Fill the target store of an experiment, without training."""
    experiment = main_first(Experiment.load, [main_file, options])
    if not any(stage.asks_teacher for stage in experiment.epochs):
        raise SettingError(
            f"method {experiment.method} uses no targets of a teacher: give a "
            "main file with rkd or skd"
        )
    untrained = find_teacher(experiment, run_opts)
    if untrained is not None:
        raise InputError(
            f"the teacher in {untrained.folder} is not trained yet: train it "
            f"by train.py {untrained.main_file}, or start train.py "
            f"{main_file}, which does that first"
        )
    experiment.corpus = prepare_corpus(experiment.settings)
    match_symbols(experiment)
    items, with_valid = experiment.corpus.train, experiment.needs("hidden")
    return fill_targets(experiment, items, with_valid, run_opts)


def make_teacher(stage, experiment, items, train, run_opts):
    """Give a stage its teacher, and the seconds that its preparation took."""
    settings = experiment.settings
    is_hidden = stage.teacher == "hidden"
    taps = teacher_taps(experiment.pairs) if is_hidden else ()
    if settings["targets"] == "store":
        store = fill_targets(experiment, items, is_hidden, run_opts)
        return StoredTeacher(store, taps), store.made["seconds"]
    teacher = Teacher(experiment.teacher.model, taps, experiment.vocabulary)
    if not is_hidden:
        return teacher, None
    found = run_on_main(
        _hidden_statistics,
        [experiment.stage_folder(stage) / STATISTICS, teacher, train, settings],
    )
    teacher.standardise = Standardiser(found["statistics"], teacher.taps)
    return teacher, found["seconds"]


def _hidden_statistics(path, teacher, train, settings):
    """Measure an online teacher's hidden states, once for a stage."""
    if not path.is_file():
        started = time.monotonic()
        statistics = measure_hidden(
            teacher, train, settings["batch_seconds"], settings["num_workers"]
        )
        seconds = time.monotonic() - started
        write_json(path, {"seconds": seconds, "statistics": statistics})
    return read_json(path)


def prepare_head(experiment, teacher, train):
    """Fit the head of an encoder after RKD to the teacher's posteriors."""
    settings = experiment.settings
    if not experiment.head_frames:
        logger.info("The head of the student starts from random weights")
        return
    # In the order of training, so that any part is a fair sample.
    loader = make_dataloader(
        train, batch_sampler=make_batches(train, settings, shuffle=True)
    )
    loss = run_on_main(
        fit_head,
        [experiment.student, teacher, loader],
        {"frames": experiment.head_frames, "delay": settings["delay"]},
    )
    logger.info("The head was fitted to the teacher: %.3f nats a frame", loss)
