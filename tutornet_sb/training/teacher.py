"""The teacher of an experiment: found or to be trained, checked and matched."""

import logging
from pathlib import Path

from speechbrain.utils.distributed import infer_device

from tutornet_sb.corpora.tokenizer import BLANK, pieces
from tutornet_sb.distillation.pairs import choose_pairs, teacher_taps
from tutornet_sb.distillation.taps import select_taps
from tutornet_sb.networks import runs
from tutornet_sb.networks.streaming import can_stream
from tutornet_sb.teachers.sources import load_teacher
from tutornet_sb.teachers.vocabulary import (
    VocabularyError,
    VocabularyMap,
    match_vocabulary,
)
from tutornet_sb.training.experiment import Experiment
from tutornet_sb.training.folder import (
    compare,
    refuse_other,
    refuse_other_teacher,
)
from tutornet_sb.util.errors import InputError, SettingError
from tutornet_sb.util.processes import main_first

logger = logging.getLogger(__name__)

# Settings of a student that hold for a teacher trained for it, too
PASSED_ON = (
    "corpus_folder",
    "corpus_overrides",
    "corpus_yaml",
    "data_folder",
    "num_workers",
    "results_folder",
    "test_csv",
    "train_csv",
    "valid_csv",
)


def teacher_folder(settings):
    """Where the teacher's run is, or will be."""
    if settings["teacher"]["folder"] is not None:
        return settings["teacher"]["folder"]
    name = f"teacher_{settings['teacher_name']}"
    return str(Path(settings["corpus_folder"]) / name / "1234")


def load_teacher_experiment(experiment):
    """Read the experiment by which this recipe trains the teacher."""
    settings = experiment.settings
    teacher, utterances = settings["teacher"], settings["utterances"]
    options = {key: settings[key] for key in PASSED_ON} | {
        "utterances.max_seconds": utterances["max_seconds"],
        "utterances.max_skipped": utterances["max_skipped"],
        "student_yaml": teacher["yaml"],
        "student_size": teacher["size"],
        "output_folder": teacher_folder(settings),
    }
    recipe = settings["recipe_folder"]
    return main_first(Experiment.load, [teacher["main_file"], options, recipe])


def find_teacher(experiment, run_opts):
    """Give the experiment its teacher, if that is trained.

    Returns the experiment of a teacher that is yet to be trained, or None.
    """
    settings = experiment.settings
    folder = teacher_folder(settings)
    finished = runs.is_finished(folder)
    if not experiment.distils:
        # It times the words of a streaming baseline.
        if finished and can_stream(experiment.student):
            set_teacher(experiment, run_opts)
        return None
    given = settings["teacher"]["folder"] is not None and finished
    if settings["teacher"]["source"] is None and not given:
        teacher = load_teacher_experiment(experiment)
        if not finished:
            refuse_other(*compare(teacher), folder, teacher.settings)
            # With random weights it can be asked for its layers already.
            check_teacher(folder, teacher.student, True, experiment)
            return teacher
        refuse_other_teacher(teacher, settings)
    set_teacher(experiment, run_opts)
    return None


def set_teacher(experiment, run_opts):
    """Load the teacher: a run of this recipe, or a pretrained model."""
    settings, teacher = experiment.settings, experiment.settings["teacher"]
    source = main_first(
        load_teacher,
        [teacher["source"] or teacher_folder(settings)],
        {
            "revision": teacher["revision"],
            "kind": teacher["kind"],
            # One's own run may be of any parts.
            "trust_remote_code": teacher["trust_remote_code"]
            or teacher["source"] is None,
        },
    )
    asked, has_head = settings["rkd"]["pairs"], source.pieces is not None
    pairs = check_teacher(source.source, source.model, has_head, experiment)
    for pair in pairs:
        logger.info(
            "RKD: %s of the student is fitted to %s of the teacher, weight %g",
            pair.student,
            pair.teacher,
            pair.weight,
        )
    if pairs and isinstance(asked, int) and len(pairs) < asked:
        logger.warning(
            "rkd.pairs: %d instead of %d, for an encoder has no more layers in "
            "a row at its frame rate; `tutornet layers` lists them",
            len(pairs),
            asked,
        )
    source.model.to(run_opts.get("device") or infer_device())
    experiment.teacher, experiment.pairs = source, pairs


def check_teacher(name, model, has_head, experiment):
    """See that a teacher provides what all stages need; give the pairs."""
    settings, student = experiment.settings, experiment.student
    rate, wanted = model.features.sample_rate, student.features.sample_rate
    if rate != wanted:
        raise InputError(
            f"teacher {name} expects {rate} Hz and the student {wanted} Hz: "
            "choose a teacher of the student's rate"
        )
    if not has_head:
        for stage in experiment.epochs:
            if stage.teacher in ("posteriors", "transcripts"):
                raise InputError(
                    f"teacher {name} has no CTC head, so stage {stage.name} "
                    f"has no {stage.teacher} to learn from: choose a teacher "
                    'with one, or --stages "[rkd, ctc]"'
                )
    if not experiment.needs("hidden"):
        return []
    weighting = settings["rkd"]["frame_weighting"]
    if not has_head and weighting == "nonblank":
        raise InputError(
            f"teacher {name} has no CTC head, whose posteriors frame weighting "
            "nonblank needs: leave rkd.frame_weighting out, or choose uniform "
            "or energy"
        )
    if not has_head and weighting is None:
        logger.info(
            "rkd.frame_weighting is energy: teacher %s has no CTC head", name
        )
    pairs = choose_pairs(settings["rkd"]["pairs"], model, student)
    taps = select_taps(model, teacher_taps(pairs), "teacher")
    store = settings["store"]
    if settings["targets"] == "store" and store["hidden"] == "rq":
        for path, tap in taps.items():
            if store["code_bytes"] > tap.hidden_size:
                raise SettingError(
                    f"store.code_bytes must be 1 to {tap.hidden_size}, the "
                    f"dimensions of the teacher's layer {path}, got "
                    f"{store['code_bytes']}"
                )
    return pairs


def match_symbols(experiment):
    """Map the teacher's symbols to the student's, or use its hidden states.

    Without a match there are no posteriors, and the head is not fitted.
    """
    source, ours = experiment.teacher, pieces(experiment.corpus.tokenizer)
    unused = set()
    if source.pieces is not None and list(source.pieces) != ours:
        # A symbol in no transcript need not be matched.
        used = {
            index
            for item in experiment.corpus.transcribed.values()
            for index in experiment.corpus.tokenizer.encode(item["wrd"])
        }
        unused = {piece for i, piece in enumerate(ours) if i not in used}
    try:
        vocabulary = match_vocabulary(
            source.pieces,
            ours,
            source.blank_index,
            unused=unused,
            teacher_name=f"teacher {source.source}",
            student_name=f"corpus {experiment.settings['corpus']['name']}",
        )
        for line in vocabulary.lines:
            logger.info("Vocabulary: %s", line)
    except VocabularyError as error:
        if experiment.needs("posteriors"):
            raise
        logger.info("No posteriors of the teacher are used: %s", error)
        vocabulary = _blank_alone(source, len(ours))
        experiment.head_frames = 0
    experiment.vocabulary = vocabulary


def _blank_alone(source, symbols):
    """Keep of a foreign vocabulary what frame weighting needs."""
    if source.pieces is None:
        return None
    targets = [1] * len(source.pieces)
    targets[source.blank_index] = BLANK
    return VocabularyMap(targets, symbols)
