"""The frozen teacher and the checks around it."""

import zipfile
from pathlib import Path

import torch

from tutornet_sb.distillation.taps import (
    encode_with_taps,
    select_taps,
    trying_out,
)
from tutornet_sb.distillation.targets import TeacherTargets


class Teacher(torch.nn.Module):
    """A trained model, frozen for good, with hidden layers laid open.

    It stays in evaluation mode whatever ``train()`` is called on it or around
    it, needs no gradients and so takes part in no optimizer.

    Arguments
    ---------
    model : AcousticModel
        The trained model. It is frozen in place.
    taps : list of str
        Dotted paths of the layers whose outputs, one after another along dim,
        are the hidden representation. Of a tuple, the first tensor is taken; of
        several calls in one pass, the last. Without any, the hidden
        representation has dim 0.
    vocabulary : callable, optional
        Maps the posteriors, ``(batch, frames, symbols)``, and the valid
        frames, ``(batch,)``, onto the symbols of the student.
    standardise : Standardiser, optional
        Of the hidden states, for representation-level distillation.

    Attributes
    ----------
    taps : dict
        Path -> ``Tap``, in the order given.
    hidden_sizes : list of int
        Dimension of each layer.
    symbols : int
        Symbols of the targets; 0 for a teacher without a CTC head.

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
    >>> from tutornet_sb.networks.recurrent import RecurrentEncoder
    >>> encoder = RecurrentEncoder(64, channels=8, hidden_size=4, layers=1)
    >>> head = torch.nn.Linear(encoder.output_size, 29)
    >>> teacher = Teacher(AcousticModel(LogMelFeatures(), encoder, head))
    >>> targets = teacher(torch.randn(2, 16000), torch.tensor([1.0, 0.5]))
    >>> tuple(targets.hidden.shape), tuple(targets.posteriors.shape)
    ((2, 51, 8), (2, 51, 29))
    >>> teacher.hidden_sizes, teacher.symbols, teacher.frame_period
    ([8], 29, 0.02)
    >>> teacher.train().training
    False
    """

    def __init__(
        self, model, taps=("encoder",), vocabulary=None, standardise=None
    ):
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary
        self.standardise = standardise
        self.requires_grad_(False)
        self.eval()
        self.taps = select_taps(model, taps, "teacher")
        self.hidden_sizes = [tap.hidden_size for tap in self.taps.values()]
        self.to(next(model.parameters()).device)
        self.symbols = self._count_symbols()

    def _count_symbols(self):
        """Symbols of the targets, as seen on half a second of silence."""
        samples = self.model.features.sample_rate // 2
        with trying_out(self.model) as device:
            silence = torch.zeros(1, samples, device=device)
            targets = self(silence, torch.ones(1, device=device))
        return targets.posteriors.shape[-1]

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
        encoding, hidden = encode_with_taps(
            self.model, self.taps, wavs, wav_lens
        )
        # What dim 0 is taken from does not matter.
        hidden = hidden or [encoding.hidden[..., :0]]
        hidden = torch.cat([part.float() for part in hidden], dim=-1)
        if self.standardise is not None:
            hidden = self.standardise(hidden)
        posteriors = torch.softmax(encoding.logits.float(), dim=-1)
        if self.vocabulary is not None:
            posteriors = self.vocabulary(posteriors, encoding.lengths)
        return TeacherTargets(
            hidden,
            posteriors,
            encoding.lengths,
            self.frame_period,
        )

    def teach(self, batch):
        """Teach a batch, as a ``StoredTeacher`` does too.

        Arguments
        ---------
        batch : speechbrain.dataio.batch.PaddedBatch
            With ``sig``.

        Returns
        -------
        TeacherTargets
            Hidden states and posteriors in float32.
        """
        return self(*batch.sig)


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
    return fill_weights(model, read_weights(path), path)


def read_weights(path):
    """Read a model's weights, and run nothing that may stand there instead.

    Arguments
    ---------
    path : str or pathlib.Path
        File written by ``torch.save(model.state_dict(), path)``.

    Returns
    -------
    dict
        Weights by name.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file cannot be read as weights.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file of model weights at {path}")
    try:
        _check_archive(path)
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
    return weights


# The flag of a folder in a zip file
_FOLDER = 0x10


def _check_archive(path):
    """Raise where a file of ``torch.save`` is not what was written.

    ``torch.load`` looks at no checksum, unpacks whatever is packed, and gives
    what the memory held for an entry that says it is a folder.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        total = sum(entry.file_size for entry in entries)
        if total > Path(path).stat().st_size or any(
            entry.compress_type or entry.external_attr & _FOLDER
            for entry in entries
        ):
            raise ValueError("it is packed as torch.save never does")
        # Some versions of Python look at this too.
        end = 0
        for entry in sorted(entries, key=lambda entry: entry.header_offset):
            if entry.header_offset < end:
                raise ValueError("its entries overlap")
            end = entry.header_offset + zipfile.sizeFileHeader + entry.file_size
        for entry in entries:
            with archive.open(entry) as file:
                while file.read(2**20):
                    pass


def fill_weights(model, weights, path):
    """Give a model the weights that were read from a file, or none of them.

    Arguments
    ---------
    model : torch.nn.Module
        The model to fill.
    weights : dict
        All its weights by name.
    path : str or pathlib.Path
        The file, named in the error.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    ValueError
        If they are those of another network, or no plain numbers.
    """
    own = model.state_dict()
    refuse_other_weights(own, weights, path)
    odd = [key for key in own if _kind(weights[key]) != _kind(own[key])]
    if odd:
        raise ValueError(
            f"{path} holds something else than the numbers of a layer under "
            f"{len(odd)} names: {_some(odd)}"
        )
    model.load_state_dict(weights, strict=True)
    return model


def _kind(value):
    """What may take a value's place without a loss of its meaning."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return type(value).__name__
    kinds = value.is_meta, value.is_complex(), value.is_floating_point()
    return (*kinds, value.dtype == torch.bool)


def refuse_other_weights(own, weights, path):
    """Compare names and shapes of a model's weights to those of a file.

    Arguments
    ---------
    own : dict
        The model's, by name.
    weights : dict
        The file's, by name.
    path : str or pathlib.Path
        The file, named in the error.

    Raises
    ------
    ValueError
        If they differ.
    """
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


def _shape(value):
    return tuple(getattr(value, "shape", ()))
