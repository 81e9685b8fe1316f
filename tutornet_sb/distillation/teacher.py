"""The frozen teacher and the checks around it."""

import difflib
from pathlib import Path
from typing import NamedTuple

import torch

from tutornet_sb.distillation.targets import TeacherTargets

# Long enough for any stride in use, and different in frames at all of them.
PROBE_SAMPLES = (8000, 12800)


class Tap(NamedTuple):
    """Where a layer's output keeps what.

    Attributes
    ----------
    time_axis : int
        Axis of the frames in the layer's output.
    hidden_size : int
        Dimension of one frame.
    """

    time_axis: int
    hidden_size: int


def _first_tensor(output):
    if isinstance(output, (tuple, list)):
        return next((x for x in output if torch.is_tensor(x)), None)
    return output if torch.is_tensor(output) else None


@torch.no_grad()
def _probe(model, samples):
    """Shapes of all layers' outputs, and the model's frames, on noise."""
    shapes, handles = {}, []

    def watch(path, layer):
        def hook(layer, inputs, output):
            tensor = _first_tensor(output)
            if tensor is not None:
                shapes[path] = tuple(tensor.shape)

        handles.append(layer.register_forward_hook(hook))

    for path, layer in model.named_modules(remove_duplicate=False):
        watch(path, layer)
    device = next(model.parameters()).device
    # An own generator: the probe must not move the seed of an experiment.
    generator = torch.Generator().manual_seed(0)
    wavs = 0.1 * torch.randn(2, samples, generator=generator)
    try:
        encoding = model(wavs.to(device), torch.ones(2, device=device))
    finally:
        for handle in handles:
            handle.remove()
    return shapes, encoding.logits.shape[1]


def _find_tap(short, long, frames):
    """The only axis that changes with time, as the model's frames do."""
    if len(short) != 3 or len(long) != 3:
        return None
    changing = [axis for axis in range(3) if short[axis] != long[axis]]
    if len(changing) != 1:
        return None
    axis = changing[0]
    batch, size = (n for other, n in enumerate(short) if other != axis)
    if (short[axis], long[axis]) != frames or batch != 2:
        return None
    return Tap(axis, size)


def find_taps(model):
    """Find the layers a teacher can be tapped at.

    These are the layers with one output frame for each of the model's own, as
    seen on two waveforms of different length. Any order of axes will do.

    Arguments
    ---------
    model : AcousticModel
        In evaluation mode.

    Returns
    -------
    dict
        Dotted path of each such layer -> ``Tap``, in the model's order.

    Example
    -------
    >>> from tutornet_sb.networks.acoustic_model import (
    ...     AcousticModel,
    ...     LogMelFeatures,
    ... )
    >>> from tutornet_sb.networks.lstm import LSTMEncoder
    >>> encoder = LSTMEncoder(64, channels=8, hidden_size=4, layers=1)
    >>> head = torch.nn.Linear(encoder.output_size, 29)
    >>> taps = find_taps(AcousticModel(LogMelFeatures(), encoder, head).eval())
    >>> taps["encoder"], taps["encoder.conv"]
    (Tap(time_axis=1, hidden_size=8), Tap(time_axis=2, hidden_size=8))
    """
    short, long = (_probe(model, samples) for samples in PROBE_SAMPLES)
    frames = (short[1], long[1])
    taps = {}
    for path, _ in model.named_modules(remove_duplicate=False):
        if path and path in short[0] and path in long[0]:
            tap = _find_tap(short[0][path], long[0][path], frames)
            if tap is not None:
                taps[path] = tap
    return taps


class Teacher(torch.nn.Module):
    """A trained model, frozen for good, with one hidden layer laid open.

    It stays in evaluation mode whatever ``train()`` is called on it or around
    it, needs no gradients and so takes part in no optimizer.

    Arguments
    ---------
    model : AcousticModel
        The trained model. It is frozen in place.
    tap : str
        Dotted path of the layer whose output is the hidden representation, for
        instance ``encoder``. Of a tuple, the first tensor is taken; of several
        calls in one pass, the last.

    Raises
    ------
    ValueError
        If there is no such layer, or if its output does not have the model's
        own frames.

    Example
    -------
    >>> from tutornet_sb.networks.acoustic_model import (
    ...     AcousticModel,
    ...     LogMelFeatures,
    ... )
    >>> from tutornet_sb.networks.lstm import LSTMEncoder
    >>> encoder = LSTMEncoder(64, channels=8, hidden_size=4, layers=1)
    >>> head = torch.nn.Linear(encoder.output_size, 29)
    >>> teacher = Teacher(AcousticModel(LogMelFeatures(), encoder, head))
    >>> targets = teacher(torch.randn(2, 16000), torch.tensor([1.0, 0.5]))
    >>> tuple(targets.hidden.shape), tuple(targets.posteriors.shape)
    ((2, 51, 8), (2, 51, 29))
    >>> teacher.hidden_size, teacher.frame_period
    (8, 0.02)
    >>> teacher.train().training
    False
    """

    def __init__(self, model, tap="encoder"):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.tap = tap
        self.eval()
        layers = dict(model.named_modules(remove_duplicate=False))
        del layers[""]
        if tap not in layers:
            raise ValueError(
                f"the teacher has no layer {tap!r}; nearest: "
                + _nearest(tap, layers)
            )
        taps = find_taps(model)
        if tap not in taps:
            raise ValueError(
                f"the teacher's layer {tap!r} cannot be tapped: its output "
                "does not have the model's own frames, those of its logits. "
                f"Of the {len(taps)} layers that have, the nearest by name: "
                + _nearest(tap, taps)
            )
        self.time_axis, self.hidden_size = taps[tap]

    @property
    def frame_period(self):
        """Distance between two output frames (seconds)."""
        return self.model.frame_period

    def train(self, mode=True):
        """Stay in evaluation mode.

        ``Brain`` puts all its modules in training mode when a stage starts, and
        a teacher's batch statistics would drift.

        Arguments
        ---------
        mode : bool
            Not used.

        Returns
        -------
        Teacher
            Itself.
        """
        return super().train(False)

    # Not inference mode: what it returns takes part in the student's graph.
    @torch.no_grad()
    def forward(self, wavs, wav_lens):
        """Teach a batch of waveforms.

        Arguments
        ---------
        wavs : torch.Tensor
            Waveforms, ``(batch, samples)``.
        wav_lens : torch.Tensor
            Valid part of each waveform relative to the longest, ``(batch,)``.

        Returns
        -------
        TeacherTargets
            Hidden states and posteriors in float32.
        """
        hidden = None

        def keep(layer, inputs, output):
            nonlocal hidden
            # A copy, since the next layer may work in place.
            hidden = _first_tensor(output).to(torch.float32, copy=True)

        # Hooked anew each time: copies of this module then have their own hook,
        # and replacing the layer (as SyncBatchNorm does) cannot lose it.
        handle = self.model.get_submodule(self.tap).register_forward_hook(keep)
        try:
            encoding = self.model(wavs, wav_lens)
        finally:
            handle.remove()
        posteriors = torch.softmax(encoding.logits.float(), dim=-1)
        return TeacherTargets(
            hidden.movedim(self.time_axis, 1),
            posteriors,
            encoding.lengths,
            self.frame_period,
        )


def _nearest(name, names):
    return ", ".join(difflib.get_close_matches(name, names, n=5, cutoff=0.0))


def _some(items, most=3):
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


def load_model_weights(model, path):
    """Load a model's weights, all of them and nothing else.

    Arguments
    ---------
    model : torch.nn.Module
        The model to fill. Left as it was if the file does not fit.
    path : str or pathlib.Path
        File written by ``torch.save(model.state_dict(), path)``.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file cannot be read as weights, or if they are those of another
        network.

    Example
    -------
    >>> path = getfixture("tmp_path") / "layer.ckpt"
    >>> torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    >>> load_model_weights(torch.nn.Linear(2, 2), path)
    Linear(in_features=2, out_features=2, bias=True)
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file of model weights at {path}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    # The kinds of damage raise all kinds of errors.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read as model weights ({type(error).__name__}: "
            f"{reason}). Is it cut short, or not written by "
            "torch.save(model.state_dict(), path)?"
        ) from None
    if not isinstance(weights, dict):
        raise ValueError(
            f"{path} holds a {type(weights).__name__}, not model weights; "
            "write it by torch.save(model.state_dict(), path)"
        )
    own = model.state_dict()
    faults = {
        "missing": [key for key in own if key not in weights],
        "unexpected": [key for key in weights if key not in own],
        "of another shape": [
            f"{key} {_shape(weights[key])} for {_shape(own[key])}"
            for key in own
            if key in weights and _shape(weights[key]) != _shape(own[key])
        ],
    }
    if any(faults.values()):
        found = "; ".join(
            f"{len(keys)} {fault}: {_some(keys)}"
            for fault, keys in faults.items()
            if keys
        )
        raise ValueError(
            f"{path} holds the weights of another network: {found} (of "
            f"{len(own)} entries). Build the network that was saved there, or "
            "give the file that belongs to this one."
        )
    model.load_state_dict(weights, strict=True)
    return model


def _shape(value):
    return tuple(getattr(value, "shape", ()))


def check_vocabulary(
    teacher_pieces,
    student_pieces,
    teacher_name="teacher",
    student_name="student",
):
    """Make sure teacher and student mean the same by each index.

    Arguments
    ---------
    teacher_pieces : list of str
        Teacher's symbols by index.
    student_pieces : list of str
        Student's symbols by index.
    teacher_name : str
        How to call the teacher's vocabulary in an error.
    student_name : str
        How to call the student's vocabulary in an error.

    Raises
    ------
    ValueError
        If the two lists differ.

    Example
    -------
    >>> check_vocabulary(["<blank>", "a"], ["<blank>", "a"])
    >>> try:
    ...     check_vocabulary(["<blank>", "a"], ["<blank>", "b"])
    ... except ValueError as error:
    ...     print(str(error).split(", ")[1])
    first at index 1: 'a' and 'b'; only in teacher: 'a'; only in student: 'b'
    """
    teacher_pieces, student_pieces = list(teacher_pieces), list(student_pieces)
    if teacher_pieces == student_pieces:
        return
    pairs = enumerate(zip(teacher_pieces, student_pieces, strict=False))
    first = next(
        (index for index, (theirs, ours) in pairs if theirs != ours),
        min(len(teacher_pieces), len(student_pieces)),
    )
    message = (
        f"the vocabularies of {teacher_name} ({len(teacher_pieces)} symbols) "
        f"and {student_name} ({len(student_pieces)} symbols) differ, first at "
        f"index {first}: {_at(teacher_pieces, first)} and "
        f"{_at(student_pieces, first)}"
    )
    for name, mine, others in (
        (teacher_name, teacher_pieces, student_pieces),
        (student_name, student_pieces, teacher_pieces),
    ):
        only = [repr(piece) for piece in mine if piece not in set(others)]
        if only:
            message += f"; only in {name}: {_some(only, most=5)}"
    raise ValueError(message)


def _at(pieces, index):
    return repr(pieces[index]) if index < len(pieces) else "nothing"
