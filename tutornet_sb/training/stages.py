"""The stages of training a student, as data; nothing else lists them."""

from dataclasses import dataclass

from tutornet_sb.training.brain import StageBrain
from tutornet_sb.training.ctc import CTCBrain
from tutornet_sb.training.rkd import RKDBrain
from tutornet_sb.training.skd import SKDBrain
from tutornet_sb.util.errors import SettingError


@dataclass(frozen=True)
class Stage:
    """One stage of training a student.

    Attributes
    ----------
    name : str
        In ``stages`` of an experiment and in the names of folders.
    title : str
        In tables and reports.
    summary : str
        One line for logs and model cards.
    brain : type
        Computes the loss.
    teacher : str or None
        What the teacher gives: ``hidden`` (states) or ``posteriors`` of every
        batch, ``transcripts`` (pseudo-labels, once), or nothing.
    transcripts : bool
        Whether utterances without a transcript are left out.
    initialises : bool
        Whether another stage may follow, and the head is fitted for it.
    settings : tuple of str
        What the hyperparameters of this stage alone start with, which model
        cards list.
    """

    name: str
    title: str
    summary: str
    brain: type[StageBrain]
    teacher: str | None = None
    transcripts: bool = False
    initialises: bool = False
    settings: tuple[str, ...] = ()

    @property
    def asks_teacher(self):
        """Whether the teacher encodes every batch, or a store has."""
        return self.teacher in ("hidden", "posteriors")


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "ctc", "CTC", "CTC on the transcripts.", CTCBrain, transcripts=True
        ),
        Stage(
            "rkd",
            "RKD",
            "Representation-level distillation (RKD): hidden states are fitted "
            "to the teacher's, frame by frame, through a projector that is "
            "dropped afterwards.",
            RKDBrain,
            teacher="hidden",
            initialises=True,
            settings=("rkd.", "delay"),
        ),
        Stage(
            "skd",
            "SKD",
            "Softmax-level distillation (SKD): posteriors are fitted to the "
            "teacher's, beside CTC on the transcripts where its weight is not "
            "0.",
            SKDBrain,
            teacher="posteriors",
            settings=("skd.", "delay"),
        ),
        Stage(
            "pseudo",
            "pseudo-labels",
            "CTC on the teacher's transcripts.",
            CTCBrain,
            teacher="transcripts",
            settings=("min_confidence",),
        ),
    )
}


def find_stages(names):
    """Give the stages of an experiment, in order.

    Raises SettingError if one does not exist, or cannot follow another.
    """
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        raise SettingError(
            f"stages: {names} must name stages among {', '.join(STAGES)}"
        )
    first, *following = [STAGES[name] for name in names]
    if len(following) > 1 or (
        following and (not first.initialises or following[0].initialises)
    ):
        starts = ", ".join(s.name for s in STAGES.values() if s.initialises)
        raise SettingError(
            f"stages: {names}: a second stage follows {starts} only"
        )
    return [first, *following]


def list_methods():
    """All methods there are: names of stages, joined by ``+``."""
    return list(STAGES) + [
        f"{first.name}+{second.name}"
        for first in STAGES.values()
        for second in STAGES.values()
        if first.initialises and not second.initialises
    ]
