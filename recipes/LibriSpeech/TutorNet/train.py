#!/usr/bin/env python3
"""Distil a strong speech recogniser into a small one of any architecture.

> python train.py hparams/rkd_lstm.yaml
> python train.py hparams/rkd_lstm.yaml --data_folder /path/to/LibriSpeech \
      --corpus_yaml hparams/corpora/librispeech960.yaml
> python train.py hparams/rkd_lstm.yaml \
      --student_yaml hparams/models/jasper_mini.yaml

The same command resumes an interrupted run.
"""

import logging
import sys
from functools import partial
from pathlib import Path

from tutornet_sb.util.environment import check_torchaudio
from tutornet_sb.util.errors import failing_in_one_line

# Before SpeechBrain loads it
with failing_in_one_line("train.py", "--debug" in sys.argv):
    check_torchaudio()

import speechbrain as sb
import torch
from speechbrain.dataio.dataloader import make_dataloader
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.train_logger import FileTrainLogger

from tutornet_sb.corpora.tokenizer import pieces
from tutornet_sb.distillation.intermediate import IntermediateHeads
from tutornet_sb.distillation.pairs import Projectors
from tutornet_sb.experiments.compare import short_table
from tutornet_sb.networks import runs
from tutornet_sb.training import folder
from tutornet_sb.training.checkpoints import AtomicCheckpointer
from tutornet_sb.training.corpus import check_longest, prepare_corpus
from tutornet_sb.training.data import (
    make_batches,
    make_dataset,
    training_items,
)
from tutornet_sb.training.evaluation import (
    evaluate,
    load_stage,
    make_searcher,
    save_results,
    save_stage,
)
from tutornet_sb.training.experiment import Experiment
from tutornet_sb.training.offline import make_teacher, prepare_head
from tutornet_sb.training.settings import print_options
from tutornet_sb.training.teacher import (
    find_teacher,
    match_symbols,
    set_teacher,
    teacher_folder,
)
from tutornet_sb.util import processes, signals
from tutornet_sb.util.options import parse_command_line
from tutornet_sb.util.processes import main_first, own_share, run_on_main

logger = logging.getLogger(__name__)

RECIPE = Path(__file__).resolve().parent


# ------------------------------------------------------------------------ data
def dataio_prepare(stage, experiment, counter, run_opts):
    """Training and development set of a stage, and its teacher if it asks one.

    Returns the sets, the teacher, the seconds of its preparation, and the
    seconds of speech in the training set.
    """
    items = training_items(stage, experiment)
    valid_items = experiment.corpus.valid
    seconds = sum(float(item["duration"]) for item in items.values())
    make = partial(make_dataset, experiment=experiment)
    train, valid = make(items, epochs=counter), make(valid_items)
    teacher = extraction = None
    if stage.asks_teacher:
        teacher, extraction = make_teacher(
            stage, experiment, items, train, run_opts
        )
        if experiment.settings["targets"] == "store":
            train = make(items, stored=teacher, epochs=counter)
            if stage.teacher == "hidden":
                valid = make(valid_items, stored=teacher)
    return train, valid, teacher, extraction, seconds


# ---------------------------------------------------------------------- stages
def train_stage(stage, epochs, experiment, run_opts):
    """Train a stage, load its best weights, and return its figures."""
    settings, student = experiment.settings, experiment.student
    where = experiment.stage_folder(stage)
    finished = load_stage(stage, experiment)
    if finished is not None:
        return finished

    # The same whether the stages before it were run now or long ago, but not
    # the same masks of dropout and augmentation in all processes
    sb.utils.seed.seed_everything(settings["seed"] + processes.rank())
    counter = EpochCounter(epochs)
    train, valid, teacher, extraction, seconds = dataio_prepare(
        stage, experiment, counter, run_opts
    )
    # Loaders have generators of their own, or the next random number would
    # depend on how often the training was stopped.
    valid_loader = make_dataloader(
        valid,
        batch_sampler=own_share(make_batches(valid, settings)),
        generator=torch.Generator(),
    )
    modules = {"student": student}
    if stage.teacher == "hidden":
        modules["projector"] = Projectors(
            settings["projector"], experiment.pairs, teacher, student
        )
    elif settings["intermediate"]:
        symbols = len(pieces(experiment.corpus.tokenizer))
        modules["heads"] = IntermediateHeads(
            settings["intermediate"], student, symbols
        )
    checkpointer = AtomicCheckpointer(
        where / "save", modules | {"counter": counter}
    )
    if teacher is not None:
        modules["teacher"] = teacher
    brain = stage.brain(
        modules,
        hparams={
            **settings,
            "tokenizer": experiment.corpus.tokenizer,
            "epoch_counter": counter,
            "train_logger": FileTrainLogger(str(where / runs.TRAIN_LOG)),
            "metrics_file": where / runs.METRICS,
            "log_folder": str(where / "tensorboard"),
            # The head takes no part in RKD.
            "find_unused_parameters": stage.teacher == "hidden",
        },
        opt_class=settings["opt_class"],
        run_opts=run_opts,
        checkpointer=checkpointer,
    )
    logger.info("Stage %s: %d epochs in %s", stage.name, epochs, where)
    brain.fit(
        counter,
        train,
        valid_loader,
        train_loader_kwargs={
            "batch_sampler": make_batches(train, settings, shuffle=True),
            "num_workers": settings["num_workers"],
            "worker_init_fn": signals.leave_to_parent,
            "generator": torch.Generator(),
        },
    )
    figures = {"epochs": epochs, "train_audio_seconds": seconds}
    figures |= brain.finish(valid_loader)
    if extraction is not None:
        figures["extraction_seconds"] = extraction
    if stage.initialises:
        prepare_head(experiment, teacher, train)
    save_stage(stage, figures, experiment)
    return figures


def prepare(experiment, run_opts):
    """Find all that a run needs; return a teacher that is yet to be trained."""
    sb.create_experiment_directory(str(experiment.folder))
    run_on_main(folder.save_settings, [experiment])
    processes.check_shared(experiment.folder / runs.HYPERPARAMS)
    untrained = find_teacher(experiment, run_opts)
    experiment.corpus = prepare_corpus(experiment.settings)
    run_on_main(folder.save_corpus, [experiment])
    make_searcher(experiment)
    models = {"student": experiment.student}
    if experiment.distils and experiment.teacher:
        models["teacher"] = experiment.teacher.model
    slowest = min(experiment.settings["augmentation"]["speeds"] or [100])
    check_longest(experiment.corpus, models, slowest)
    return untrained


def train(experiment, run_opts):
    """Run the stages in order, and save the student and its figures."""
    settings, student = experiment.settings, experiment.student
    # Networks of waveforms mask their frames themselves.
    if student.features.output_size > 1:
        student.augment = settings["augmentation"]["features"]
    student.augment_waveform = settings["augmentation"]["waveform"]
    if experiment.distils:
        # The same whether the teacher was trained just now or long ago
        sb.utils.seed.seed_everything(settings["seed"])
        match_symbols(experiment)
    stages = {}
    for stage, epochs in experiment.epochs.items():
        figures = train_stage(stage, epochs, experiment, run_opts)
        evaluate(stage, figures, experiment, run_opts)
        stages[stage.name] = figures
    save_results(stages, experiment)


# ------------------------------------------------------------------------ main
def run(main_file, run_opts, options):
    """Run one experiment, its teacher's first if that is not trained."""
    experiment = main_first(Experiment.load, [main_file, options, RECIPE])
    with folder.working_in(experiment.folder):
        teacher = prepare(experiment, run_opts)
        if teacher is not None:
            logger.info("The teacher is trained first, in %s", teacher.folder)
            with folder.working_in(teacher.folder):
                prepare(teacher, run_opts)
                train(teacher, run_opts)
            sb.create_experiment_directory(str(experiment.folder))
            set_teacher(experiment, run_opts)
        train(experiment, run_opts)
    return experiment


def show(experiment):
    """Print the table of a run beside its teacher and its baseline."""
    settings, shown = experiment.settings, [experiment.folder]
    if experiment.distils:
        shown = [settings["baseline_folder"], *shown]
        # A pretrained teacher is no run and has no row.
        if settings["teacher"]["source"] is None:
            shown = [teacher_folder(settings), *shown]
    finished = filter(runs.is_finished, dict.fromkeys(map(str, shown)))
    if sb.utils.distributed.if_main_process():
        print(short_table(list(finished)))
        print(f"\nThe run is in {experiment.folder}")


def main():
    """Run the experiment that the command line describes and show its table."""
    signals.install()
    words = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(words) < len(sys.argv[1:])
    # Logging shows tracebacks of its own when the disk is full.
    logging.raiseExceptions = debug
    with failing_in_one_line("train.py", debug), processes.ending_together():
        if {"-h", "--help"} & set(words):
            print_options(RECIPE / "hparams" / "base.yaml")
        show(run(*parse_command_line(words)))


if __name__ == "__main__":
    main()
