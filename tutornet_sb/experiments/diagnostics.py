"""What a student has taken over from its teacher, seen frame by frame."""

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
from tutornet_sb.networks import runs
from tutornet_sb.networks.acoustic_model import LogMelFeatures
from tutornet_sb.teachers.teacher import Teacher
from tutornet_sb.util.files import read_json, write_json

DIAGNOSTICS = "diagnostics.json"
# Models kept in memory: a teacher, a student alone and a taught one
KEPT = 3


class NotThere(Exception):
    """Why something cannot be seen: it is left out of a report, and said."""


class Spikes(NamedTuple):
    """Counts over utterances.

    Attributes
    ----------
    spikes : int
        Symbols that the student writes.
    same : int
        Those that its teacher writes at the same frame.
    near : int
        Those that its teacher writes there or at a neighbouring frame.
    frames, blanks, teacher_blanks : int
        Frames, and those at which the blank is the likeliest.
    """

    spikes: int = 0
    same: int = 0
    near: int = 0
    frames: int = 0
    blanks: int = 0
    teacher_blanks: int = 0


class Example(NamedTuple):
    """An utterance as a model and its teacher's hear it.

    Attributes
    ----------
    text : str
        What is said.
    features : torch.Tensor
        Log-mel energies, ``(frames, bands)``.
    feature_period : float
        Distance between two of these frames (seconds).
    symbols : list of (float, str)
        Time (seconds) and symbol of the transcript, as the teacher aligns it.
    weights : dict
        By name of the frame weighting, ``(teacher's frames,)``.
    period : float
        Distance between two of the teacher's frames (seconds).
    posteriors : dict
        By name of the model, ``(frames, symbols)`` and the frame period
        (seconds).
    pieces : list of str
        The symbols.
    blank_index : int
        Index of the blank.
    """

    text: str
    features: torch.Tensor
    feature_period: float
    symbols: list
    weights: dict
    period: float
    posteriors: dict
    pieces: list
    blank_index: int


def read_log(folder):
    """Read what a stage has logged of its epochs.

    Arguments
    ---------
    folder : str or pathlib.Path
        Folder of the stage.

    Returns
    -------
    list of dict
        One for each epoch, in order: ``epoch``, ``seconds`` (of training so
        far) and figures such as ``valid WER``; empty if there is no log. Of an
        epoch that was trained again after a stop, the last line counts.
    """
    path = Path(folder) / runs.TRAIN_LOG
    epochs = {}
    if not path.is_file():
        return []
    for line in path.read_text(encoding="utf-8").splitlines():
        items = line.replace(" - ", ", ").split(", ")
        pairs = [item.rpartition(": ")[::2] for item in items]
        figures = {name: float(value) for name, value in pairs if name}
        epochs[int(figures["epoch"])] = figures
    return [epochs[number] for number in sorted(epochs)]


def find_spikes(posteriors, blank_index=0):
    """Find the frames at which a CTC model writes its symbols.

    Arguments
    ---------
    posteriors : torch.Tensor
        ``(frames, symbols)``.
    blank_index : int
        Index of the CTC blank.

    Returns
    -------
    list of (int, int)
        Symbol, and the frame of its run at which it is the likeliest.

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
    """Compare where a student and its teacher write their symbols.

    Arguments
    ---------
    student, teacher : torch.Tensor
        Posteriors on the same frames, ``(frames, symbols)``.
    blank_index : int
        Index of the CTC blank.

    Returns
    -------
    Spikes
        Counts of one utterance.

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


class Ears:
    """Loads runs, and lets them hear utterances of their development set.

    The posteriors of a teacher are kept for its students.
    """

    def __init__(self):
        self.models, self.said, self.speech = {}, {}, {}

    def diagnose(self, folder, teacher):
        """Compare a student with a teacher on its development set.

        The result is kept in the student's folder until its weights change.

        Arguments
        ---------
        folder : str or pathlib.Path
            Run of the student.
        teacher : str or pathlib.Path or None
            That of the teacher; None if there is none to compare with.

        Returns
        -------
        dict
            ``utterances`` (some of the first development split), ``teacher``
            (the end of its folder's path), and of the spikes in percent
            ``same_frame`` and ``within_one_frame``; ``blank_rate`` and
            ``teacher_blank_rate`` are percent of the frames.

        Raises
        ------
        NotThere
            If weights, audio or the teacher are missing.
        """
        folder = Path(folder)
        kept, weights = folder / DIAGNOSTICS, folder / runs.WEIGHTS
        if kept.is_file() and not (
            weights.is_file() and weights.stat().st_mtime > kept.stat().st_mtime
        ):
            return read_json(kept)
        utterances = self._utterances(folder)
        if teacher is None:
            raise NotThere(f"no teacher is there to compare {folder} with")
        counts, blank = Spikes(), _blank(folder)
        for utterance in utterances:
            logits, targets = self._both(folder, teacher, utterance)
            found = compare_spikes(
                torch.softmax(logits, dim=-1), targets.posteriors[0], blank
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
        """Let models and their teacher hear one utterance.

        Arguments
        ---------
        students : dict
            Folders of runs by the names that they shall have.
        teacher : str or pathlib.Path or None
            Run of the teacher.
        seconds : float
            About how long the utterance shall be.

        Returns
        -------
        Example
            The utterance of the development set that is nearest to that.

        Raises
        ------
        NotThere
            If weights, audio or the teacher are missing.
        """
        if teacher is None:
            raise NotThere("no teacher is there")
        model, tokenizer = self._load(teacher)
        # Before the audio is read, which is long when they have no weights.
        loaded = {name: self._load(students[name])[0] for name in students}
        symbols, blank = pieces(tokenizer), _blank(teacher)
        rate, period = model.features.sample_rate, model.frame_period
        utterances = self._utterances(next(iter(students.values())))
        utterance = min(
            utterances, key=lambda u: abs(len(u.read()) / rate - seconds)
        )
        wav = utterance.read().unsqueeze(0)
        said = Teacher(model)(wav, torch.ones(1))
        posteriors = {"teacher": (said.posteriors[0], period)}
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
        frames = align_symbols(said.posteriors[0].log(), ids, blank) or []
        features = LogMelFeatures(sample_rate=rate)
        return Example(
            utterance.text,
            features.spectrum(wav)[0],
            features.frame_period,
            [
                (first * period, symbols[index])
                for index, (first, _) in zip(ids, frames, strict=False)
            ],
            {name: frame_weights(said, name)[0] for name in FRAME_WEIGHTINGS},
            period,
            posteriors,
            symbols,
            blank,
        )

    @torch.no_grad()
    def _both(self, folder, teacher, utterance):
        """A student's logits, and its teacher's targets on its frames."""
        model, tokenizer = self._load(folder)
        key = str(teacher), utterance.path
        if key not in self.said:
            other, theirs = self._load(teacher)
            if pieces(theirs) != pieces(tokenizer):
                raise NotThere(f"{teacher} has other symbols than {folder}")
            self.said[key] = Teacher(other, taps=())(
                utterance.read().unsqueeze(0), torch.ones(1)
            )
        encoding = model(utterance.read().unsqueeze(0), torch.ones(1))
        targets = align(
            self.said[key],
            encoding.lengths,
            model.frame_period,
            delay=float(runs.read_hyperparams(folder).get("delay") or 0),
        )
        return encoding.logits[0].float(), targets

    def _load(self, folder):
        folder = Path(folder)
        if folder not in self.models:
            if not runs.is_finished(folder):
                raise NotThere(f"{folder} holds no weights")
            model, tokenizer = runs.load_run(folder)
            while len(self.models) >= KEPT:
                del self.models[next(iter(self.models))]
            self.models[folder] = model, tokenizer
        return self.models[folder]

    def _utterances(self, folder):
        """Some of the development set that a run was scored on."""
        model, _ = self._load(folder)
        results = runs.read_results(folder)
        *_, last = results["stages"].values()
        key = *runs.known_data(folder), *last["splits"]
        if key not in self.speech:
            self.speech[key] = runs.find_speech(
                Path(folder), None, last, model, needed=False
            )
        if self.speech[key] is None:
            raise NotThere(f"the corpus of {folder} is not there")
        return self.speech[key].valid


def find_teacher(folder):
    """Find the teacher of a run, where it was or beside the run.

    Arguments
    ---------
    folder : str or pathlib.Path
        Output folder of ``train.py``.

    Returns
    -------
    pathlib.Path or None
        Run of the teacher, None if there is none or it is not there.
    """
    folder = Path(folder)
    teacher = runs.read_results(folder).get("teacher") or {}
    if "folder" not in teacher:
        return None
    named = Path(teacher["folder"])
    recipe = Path(
        str(runs.read_hyperparams(folder).get("recipe_folder") or ".")
    )
    beside = folder.parent.parent / named.parent.name / named.name
    for place in (named, recipe / named, beside):
        if runs.is_finished(place):
            return place
    return None


def _blank(folder):
    return int(runs.read_hyperparams(folder).get("blank_index") or 0)


def _percent(part, whole):
    return 100 * part / whole if whole else None
