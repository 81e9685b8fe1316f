"""An experiment: its settings, and what a run has found out so far."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import MappingProxyType

from tutornet_sb.distillation.pairs import Pair
from tutornet_sb.distillation.taps import find_taps, select_taps
from tutornet_sb.inference.transcription import check_language_model
from tutornet_sb.networks import runs
from tutornet_sb.networks.acoustic_model import AcousticModel
from tutornet_sb.teachers.sources import TeacherSource
from tutornet_sb.teachers.vocabulary import VocabularyMap
from tutornet_sb.training.corpus import Corpus
from tutornet_sb.training.settings import load_experiment
from tutornet_sb.training.stages import Stage, find_stages
from tutornet_sb.util.errors import SettingError


@dataclass
class Experiment:
    """Settings of a run, which are read-only, and what it has found out."""

    main_file: Path
    # Those of the command line
    options: dict
    # The settings as HyperPyYAML, references resolved
    text: str
    settings: Mapping
    # In the order of the stages
    epochs: dict[Stage, int]
    corpus: Corpus | None = None
    # A finished run, or a pretrained model
    teacher: TeacherSource | None = None
    # From the teacher's symbols to the student's
    vocabulary: VocabularyMap | None = None
    # Layers that are matched by RKD
    pairs: list[Pair] = field(default_factory=list)
    # On which the head is fitted after RKD
    head_frames: int = 0

    @classmethod
    def load(cls, main_file, options, recipe=None):
        """Read an experiment and check all that can be checked at once.

        Files are looked for in the working folder, then in the recipe's.
        """
        recipe = find_recipe(main_file) if recipe is None else Path(recipe)
        main_file = Path(main_file)
        if not main_file.is_file() and (recipe / main_file).is_file():
            main_file = recipe / main_file
        text, settings = load_experiment(main_file, options, recipe)
        return cls(
            main_file,
            dict(options),
            text,
            MappingProxyType(settings),
            share_epochs(settings),
            head_frames=settings["rkd"]["head_frames"],
        )._check()

    @property
    def student(self):
        """Its network, an ``AcousticModel``."""
        return self.settings["student"]["model"]

    @property
    def folder(self):
        """Where the run is, a ``pathlib.Path``."""
        return Path(self.settings["output_folder"])

    def stage_folder(self, stage):
        """Where a stage keeps its checkpoints, logs and alignments."""
        return self.folder / runs.STAGES / stage.name

    @property
    def method(self):
        """Its stages, joined, such as ``rkd+skd``."""
        return "+".join(stage.name for stage in self.epochs)

    @property
    def distils(self):
        """Whether any stage needs a teacher."""
        return any(stage.teacher for stage in self.epochs)

    @property
    def role(self):
        """``teacher``, ``baseline`` or ``student``."""
        usual = "student" if self.distils else "baseline"
        return self.settings["role"] or usual

    def needs(self, what):
        """Whether a stage needs this of the teacher (see ``Stage``)."""
        return any(stage.teacher == what for stage in self.epochs)

    def _check(self):
        """See that values go together which are used by stages far apart."""
        settings, student = self.settings, self.settings["student"].get("model")
        if not isinstance(student, AcousticModel):
            raise SettingError(
                f"{settings['student_yaml']} has no AcousticModel under the "
                "key 'model'"
            )
        if self.needs("posteriors") and not (
            settings["skd"]["ctc_weight"] or settings["skd"]["weight_final"]
        ):
            raise SettingError(
                "skd.ctc_weight and skd.weight_final are both 0, so the last "
                "epoch would have no loss: give --skd.weight_final 1 too"
            )
        language_model = settings["decoding"]["kenlm_model_path"]
        if language_model is not None:
            if settings["decoding"]["beam_size"] is None:
                raise SettingError(
                    "decoding.kenlm_model_path is of beam search: give "
                    "--decoding.beam_size 100 too"
                )
            check_language_model(language_model)
        is_coded = settings["store"]["hidden"] == "rq"
        if self.needs("hidden") and settings["targets"] == "store" and is_coded:
            # It makes the codebooks.
            import_module("faiss")
        layers = [row["student"] for row in settings["intermediate"]]
        pairs = settings["rkd"]["pairs"]
        if self.needs("hidden") and not isinstance(pairs, int):
            layers += [pair["student"] for pair in pairs]
        # Either tries out whether the student can encode, too.
        if layers:
            select_taps(student, dict.fromkeys(layers), "student")
        else:
            find_taps(student)
        return self


def find_recipe(main_file):
    """Find the recipe folder that a main file belongs to."""
    for folder in [*Path(main_file).resolve().parents, Path.cwd()]:
        if (folder / "hparams" / "base.yaml").is_file():
            return folder
    raise SettingError(
        f"{main_file} lies in no recipe: there is no hparams/base.yaml in a "
        "folder above it, nor in the working folder"
    )


def share_epochs(settings):
    """Share the student's epochs out among the stages, a dict by stage."""
    stages, epochs = find_stages(settings["stages"]), settings["epochs"]
    if len(stages) == 1:
        return {stages[0]: epochs}
    share = settings["rkd"]["share"]
    first = round(epochs * share)
    if not 0 < first < epochs:
        raise SettingError(
            f"rkd.share {share} of {epochs} epochs leaves a stage without any: "
            "give --rkd.share 0.5 and --epochs 2 or more"
        )
    return {stages[0]: first, stages[1]: epochs - first}
