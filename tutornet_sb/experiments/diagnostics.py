"""How a student's posteriors compare with its teacher's, frame by frame."""

from pathlib import Path
from typing import NamedTuple

import torch

from tutornet_sb.corpora.tokenizer import pieces
from tutornet_sb.distillation.alignment import align
from tutornet_sb.distillation.frame_weighting import (
    FRAME_WEIGHTINGS,
    frame_weights,
)
from tutornet_sb.inference.latency import align_symbols, symbol_runs
from tutornet_sb.inference.speech import find_speech, known_data
from tutornet_sb.networks import runs
from tutornet_sb.networks.acoustic_model import LogMelFeatures
from tutornet_sb.teachers.teacher import Teacher
from tutornet_sb.util.files import read_json, write_json

DIAGNOSTICS = "diagnostics.json"
# Models kept in memory: a teacher, a baseline and a distilled student
KEPT = 3


class Unavailable(Exception):
    """Why something is left out of a report."""


class Spikes(NamedTuple):
    """Counts over utterances."""

    # Symbols that the student writes, and those of them that its teacher writes
    # at the same frame, and at most a frame off; frames, and those at which the
    # blank is the likeliest
    spikes: int = 0
    same: int = 0
    near: int = 0
    frames: int = 0
    blanks: int = 0
    teacher_blanks: int = 0


class Example(NamedTuple):
    """Posteriors of several models on one utterance; periods in seconds."""

    text: str  # its transcript
    features: torch.Tensor  # log-mel energies (frames, bands)
    feature_period: float
    symbols: list  # (time, symbol) of the transcript, as the teacher aligns it
    weights: dict  # (teacher's frames,) by name of the frame weighting
    period: float  # of the teacher's frames
    posteriors: dict  # (frames, symbols) and their period, by name of the model
    pieces: list


def find_spikes(posteriors, blank_index=0):
    """Symbols that a CTC model writes, each with its likeliest frame.

    ``posteriors`` are of shape ``(frames, symbols)``.

    Example
    -------
    >>> find_spikes(torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.1, 0.9]]))
    [(1, 2)]
    """
    best = posteriors.argmax(-1)
    return [
        (symbol, first + int(posteriors[first : last + 1, symbol].argmax()))
        for symbol, first, last in symbol_runs(best, blank_index)
    ]


def compare_spikes(student, teacher, blank_index=0):
    """Count the symbols that a student writes where its teacher does.

    Both posteriors are of shape ``(frames, symbols)``.

    Example
    -------
    >>> a = torch.eye(3)[[0, 1, 0, 2, 0]]
    >>> b = torch.eye(3)[[0, 1, 0, 0, 2]]
    >>> compare_spikes(a, b)
    Spikes(spikes=2, same=1, near=2, frames=5, blanks=3, teacher_blanks=3)
    """
    theirs = set(find_spikes(teacher, blank_index))
    ours = find_spikes(student, blank_index)
    near = [
        any((symbol, frame + shift) in theirs for shift in (-1, 0, 1))
        for symbol, frame in ours
    ]
    return Spikes(
        len(ours),
        sum(spike in theirs for spike in ours),
        sum(near),
        len(student),
        int((student.argmax(-1) == blank_index).sum()),
        int((teacher.argmax(-1) == blank_index).sum()),
    )


class Probe:
    """Runs models on utterances of their development set.

    Posteriors of a teacher are kept for all its students.
    """

    def __init__(self):
        self.models, self.targets, self.speech = {}, {}, {}

    def diagnose(self, folder, teacher):
        """Compare the spikes of a student's run with those of a teacher's.

        Figures are in percent of the spikes, blank rates of the frames. They
        are kept in the student's folder until its weights change. Raises
        :class:`Unavailable` if weights, audio or the teacher are missing.
        """
        folder = Path(folder)
        kept, weights = folder / DIAGNOSTICS, folder / runs.WEIGHTS
        if kept.is_file() and not (
            weights.is_file() and weights.stat().st_mtime > kept.stat().st_mtime
        ):
            return read_json(kept)
        utterances = self._utterances(folder)
        if teacher is None:
            raise Unavailable(f"there is no teacher to compare {folder} with")
        counts = Spikes()
        for utterance in utterances:
            logits, targets = self._both(folder, teacher, utterance)
            found = compare_spikes(
                torch.softmax(logits, dim=-1), targets.posteriors[0]
            )
            counts = Spikes(*map(sum, zip(counts, found, strict=True)))
        figures = {
            "utterances": len(utterances),
            "teacher": "/".join(Path(teacher).parts[-2:]),
            "same_frame": _percent(counts.same, counts.spikes),
            "within_one_frame": _percent(counts.near, counts.spikes),
            "blank_rate": _percent(counts.blanks, counts.frames),
            "teacher_blank_rate": _percent(
                counts.teacher_blanks, counts.frames
            ),
        }
        write_json(kept, figures)
        return figures

    def example(self, students, teacher, seconds=1.5):
        """Posteriors of a teacher and of runs, given by name, on one utterance.

        The :class:`Example` is of the utterance of the development set whose
        length is nearest to ``seconds``. Raises :class:`Unavailable` if
        weights, audio or the teacher are missing.
        """
        if teacher is None:
            raise Unavailable("there is no teacher")
        model, tokenizer = self._load(teacher)
        # Before the audio is read, which is long when they have no weights.
        loaded = {name: self._load(students[name])[0] for name in students}
        symbols = pieces(tokenizer)
        rate, period = model.features.sample_rate, model.frame_period
        utterances = self._utterances(next(iter(students.values())))
        utterance = min(
            utterances, key=lambda u: abs(len(u.read()) / rate - seconds)
        )
        wav = utterance.read().unsqueeze(0)
        targets = Teacher(model)(wav, torch.ones(1))
        posteriors = {"teacher": (targets.posteriors[0], period)}
        for name, folder in students.items():
            logits, _ = self._both(folder, teacher, utterance)
            posteriors[name] = (
                torch.softmax(logits, dim=-1),
                loaded[name].frame_period,
            )
        ids = [
            index
            for index in tokenizer.encode(utterance.text)
            if index != tokenizer.unk_id()
        ]
        log_posteriors = targets.posteriors[0].log()
        frames = align_symbols(log_posteriors, ids) or []
        features = LogMelFeatures(sample_rate=rate)
        return Example(
            text=utterance.text,
            features=features.spectrum(wav)[0],
            feature_period=features.frame_period,
            symbols=[
                (first * period, symbols[index])
                for index, (first, _) in zip(ids, frames, strict=False)
            ],
            weights={
                name: frame_weights(targets, name)[0]
                for name in FRAME_WEIGHTINGS
            },
            period=period,
            posteriors=posteriors,
            pieces=symbols,
        )

    @torch.no_grad()
    def _both(self, folder, teacher, utterance):
        """A student's logits, and its teacher's targets on its frames."""
        model, tokenizer = self._load(folder)
        wav, key = utterance.read().unsqueeze(0), (str(teacher), utterance.path)
        if key not in self.targets:
            other, theirs = self._load(teacher)
            if pieces(theirs) != pieces(tokenizer):
                raise Unavailable(f"{teacher} has other symbols than {folder}")
            self.targets[key] = Teacher(other, taps=())(wav, torch.ones(1))
        encoding = model(wav, torch.ones(1))
        targets = align(
            self.targets[key],
            encoding.lengths,
            model.frame_period,
            delay=float(runs.read_hyperparams(folder).get("delay") or 0),
        )
        return encoding.logits[0].float(), targets

    def _load(self, folder):
        folder = Path(folder)
        if folder not in self.models:
            if not runs.is_finished(folder):
                raise Unavailable(f"{folder} holds no weights")
            loaded = runs.load_run(folder)
            while len(self.models) >= KEPT:
                del self.models[next(iter(self.models))]
            self.models[folder] = loaded
        return self.models[folder]

    def _utterances(self, folder):
        """Some of the development set that a run was scored on."""
        model, _ = self._load(folder)
        *_, last = runs.read_results(folder)["stages"].values()
        key = *known_data(folder), *last["splits"]
        if key not in self.speech:
            self.speech[key] = find_speech(
                Path(folder), None, last, model, needed=False
            )
        if self.speech[key] is None:
            raise Unavailable(f"the corpus of {folder} is missing")
        return self.speech[key].valid


def find_teacher(folder):
    """Run of a run's teacher, where it was or beside the run, or None."""
    folder = Path(folder)
    teacher = runs.read_results(folder).get("teacher")
    if teacher is None or teacher["kind"] != "run":
        return None
    named = Path(teacher["source"])
    recipe = runs.read_hyperparams(folder).get("recipe_folder") or "."
    beside = folder.parent.parent / named.parent.name / named.name
    for place in (named, recipe / named, beside):
        if runs.is_finished(place):
            return place
    return None


def _percent(part, whole):
    return 100 * part / whole if whole else None
