"""A teacher's targets into a store, and from it into the training."""

import hashlib
import json
import logging
import platform
import time
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from speechbrain.dataio.dataset import FilteredSortedDynamicItemDataset
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.autocast import AMPConfig, TorchAutocast
from speechbrain.utils.distributed import if_main_process
from tqdm import tqdm

from tutornet_sb.distillation.frame_weighting import FRAME_WEIGHTINGS
from tutornet_sb.distillation.losses import RepresentationLoss
from tutornet_sb.distillation.standardisation import Standardiser, measure
from tutornet_sb.distillation.targets import TeacherTargets, zero_padding
from tutornet_sb.networks.acoustic_model import frame_mask
from tutornet_sb.targets.encodings import train_codebooks
from tutornet_sb.targets.header import (
    FORMAT,
    add_seconds,
    check_same,
    create_store,
    make_codec,
    read_header,
)
from tutornet_sb.targets.store import TargetStore, filling, writing
from tutornet_sb.teachers.pseudo_labels import longest_first
from tutornet_sb.teachers.teacher import Teacher
from tutornet_sb.util import processes, signals
from tutornet_sb.util.errors import InputError

logger = logging.getLogger(__name__)

# Frames that hidden states are measured and codebooks trained on, 192 for each
# centroid
SAMPLE_FRAMES = 49_152


def weights_hash(model):
    """SHA-256 of all parameters and buffers of a model, with their names."""
    tensors = dict(model.state_dict())
    # Its statistics are no buffers.
    for path, layer in model.named_modules():
        if isinstance(layer, InputNormalization):
            for name in ("glob_mean", "glob_std"):
                value = getattr(layer, name, None)
                if torch.is_tensor(value):
                    tensors[f"{path}.{name}"] = value
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _settings(features):
    """Numbers and names by which features are computed."""
    return {
        f"{path}.{name}".strip("."): value
        for path, layer in features.named_modules()
        for name, value in vars(layer).items()
        if type(value) in (bool, int, float, str)
        and not name.startswith("_")
        and name not in ("device", "training")
    }


def describe(teacher, pieces, encodings):
    """Describe the targets of a teacher, to be compared with a store's.

    `pieces` are the student's symbols; `encodings` holds ``posteriors``
    (``fp16`` or ``topk``), ``top_k``, ``hidden`` (``fp16`` or ``rq``) and
    ``code_bytes``, those of ``rq`` for each frame and layer.
    """
    taps = dict(zip(teacher.taps, teacher.hidden_sizes, strict=True))
    if not taps and not teacher.symbols:
        raise InputError(
            "a teacher without a CTC head has no targets but hidden states, "
            "and no layer is tapped"
        )
    used = {}
    if teacher.symbols:
        used["posteriors"] = encodings["posteriors"]
        if encodings["posteriors"] == "topk":
            used["top_k"] = encodings["top_k"]
    if taps:
        used["hidden"] = encodings["hidden"]
        if encodings["hidden"] == "rq":
            used["code_bytes"] = encodings["code_bytes"]
    vocabulary = None
    if teacher.symbols:
        mapping = teacher.vocabulary
        vocabulary = {
            "symbols": list(pieces),
            # Student's symbol of each of the teacher's
            "map": None if mapping is None else mapping.index.tolist(),
            "boundary_index": getattr(mapping, "boundary_index", None),
        }
    return {
        "format": FORMAT,
        "library": f"tutornet_sb {version('tutornet-sb')}",
        "teacher": {
            "weights": weights_hash(teacher.model),
            "features": _settings(teacher.model.features),
            "taps": taps,
        },
        "frame_period": teacher.frame_period,
        "vocabulary": vocabulary,
        "encodings": used,
    }


def default_folder(folder, what):
    """Folder of a store, named by a hash of what its targets are."""
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
    return Path(folder) / f"targets_{digest.hexdigest()[:12]}"


class StoredTeacher(torch.nn.Module):
    """A teacher whose targets are read from a store.

    It takes the place of a ``Teacher`` in a stage. Its batches have
    ``targets``, which :meth:`read` returns for each utterance. `taps` are the
    layers wanted, of those in the store; ``errors`` are those of the encoded
    hidden states by layer and frame weighting.
    """

    def __init__(self, store, taps=()):
        super().__init__()
        self.store = store
        self.codec = store.codec
        self.taps = {path: store.taps[path] for path in taps}
        self.hidden_sizes = list(self.taps.values())
        self.symbols = self.codec.symbols
        self.frame_period = self.codec.frame_period
        self.errors = store.made.get("errors", {})

    def read(self, key, samples):
        """Encoded targets ``(frames, bytes)`` for the batch's ``targets``.

        `samples` are those of the student's input.
        """
        return self.store.read(key, samples, hidden=bool(self.taps))

    @torch.no_grad()
    def targets(self, batch):
        """Targets of a ``PaddedBatch`` with ``targets``, standardised."""
        raw, relative = batch.targets
        lengths = (relative * raw.shape[1]).round().long()
        return self.codec.decode(raw, lengths, list(self.taps))


def repair_store(folder):
    """Remove the damaged shards of a store; returns a list of ``Damage``."""
    read_header(folder)
    with filling(folder):
        damaged = TargetStore(folder, partial=True).check()
        for damage in damaged:
            damage.path.unlink()
    return damaged


def fill_store(
    folder,
    what,
    teacher,
    data,
    batch_seconds=60.0,
    num_workers=0,
    precision="fp32",
    made=None,
    progressbar=True,
):
    """Fill a store with the targets that it lacks, and return it.

    Under DDP all processes call it, and each writes its part. A call after a
    killed one resumes. Random numbers are left as found.

    `what` the targets are is from :func:`describe`, `made` is noted beside it.
    The data set, a ``DynamicItemDataset``, provides ``id`` (the key in the
    store), ``sig`` (at the teacher's sample rate) and ``duration`` (seconds).
    A batch holds up to `batch_seconds`, padding included.
    """
    extract = partial(_extract, data, batch_seconds, num_workers, precision)
    made = {"precision": precision, **(made or {})}
    is_main = if_main_process()
    with (
        _same_random_numbers(teacher),
        filling(folder) if is_main else nullcontext(),
    ):
        processes.run_on_main(
            _create, [folder, what, teacher, extract, data.data_ids, made]
        )
        store = TargetStore(folder)
        check_same(folder, store.what, what)
        # All must have seen what is missing before one writes.
        processes.wait_for_all()
        _fill(store, teacher, extract, data, progressbar)
        processes.wait_for_all()
    return TargetStore(folder)


def _same_random_numbers(teacher):
    device = next(teacher.parameters()).device
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _extract(
    data, batch_seconds, num_workers, precision, teacher, keys, done=()
):
    """Yield batches, their targets, and masks of the valid frames.

    Batches of utterances that are all done are left out.
    """
    part = FilteredSortedDynamicItemDataset(data, keys)
    part.set_output_keys(["id", "sig"])
    device = next(teacher.parameters()).device
    dtype = AMPConfig.from_name(precision).dtype
    for batch in longest_first(part, batch_seconds, num_workers, done):
        with TorchAutocast(device_type=device.type, dtype=dtype):
            targets = teacher.targets(batch.to(device))
        mask = frame_mask(targets.lengths, targets.hidden.shape[1])
        finite = [x.isfinite().all(-1) for x in targets[:2]]
        finite = (finite[0] & finite[1] | ~mask).all(-1)
        for key, is_finite in zip(batch.id, finite.tolist(), strict=True):
            if not is_finite:
                raise InputError(
                    f"utterance {key}: targets of the teacher are not finite"
                )
        yield batch, targets, mask


def _create(folder, what, teacher, extract, keys, made):
    """Make the store, if it is new."""
    try:
        read_header(folder)
        return
    except FileNotFoundError:
        pass
    started = time.monotonic()
    made = {
        "device": next(teacher.parameters()).device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **made,
    }
    codebooks, sizes = {}, what["teacher"]["taps"]
    if sizes:
        sample = _sample(extract, teacher, keys)
        made["statistics"] = measure(_states(sample), sizes)
        standardise = Standardiser(made["statistics"], sizes)
        sample = [t._replace(hidden=standardise(t.hidden)) for t in sample]
        if what["encodings"]["hidden"] == "rq":
            states = _states(sample)
            logger.info("Codebooks are trained on %d frames", len(states))
            code_bytes = what["encodings"]["code_bytes"]
            codebooks = {
                path: train_codebooks(part, code_bytes)
                for path, part in zip(
                    sizes, states.split([*sizes.values()], -1), strict=True
                )
            }
        made["errors"] = _errors(make_codec(what, codebooks), sample)
    made["seconds"] = time.monotonic() - started
    create_store(folder, what, made, codebooks)


def _sample(extract, teacher, keys):
    """Targets of some utterances, on the CPU, in batches."""
    logger.info(
        "The teacher encodes up to %d frames, to measure its hidden states",
        SAMPLE_FRAMES,
    )
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(keys), generator=generator).tolist()
    # Few at a time: the sample is a small part of most corpora.
    found, frames = [], 0
    for begin in range(0, len(order), 64):
        few = [keys[i] for i in order[begin : begin + 64]]
        for _, targets, mask in extract(teacher, few):
            found.append(
                TeacherTargets(
                    zero_padding(targets.hidden, mask).cpu(),
                    targets.posteriors.cpu(),
                    targets.lengths.cpu(),
                    targets.frame_period,
                )
            )
            frames += int(mask.sum())
        if frames >= SAMPLE_FRAMES:
            break
    return found


def _states(sample):
    """Hidden states of the valid frames of a sample, ``(frames, dim)``."""
    return torch.cat(
        [
            targets.hidden[frame_mask(targets.lengths, targets.hidden.shape[1])]
            for targets in sample
        ]
    )[:SAMPLE_FRAMES]


def measure_hidden(teacher, data, batch_seconds=60.0, num_workers=0):
    """Measure the hidden states of a teacher on a sample of utterances.

    The teacher is not standardised, the data as for :func:`fill_store`; random
    numbers are left as found. Returns the statistics that
    :func:`~tutornet_sb.distillation.standardisation.measure` does.
    """
    extract = partial(_extract, data, batch_seconds, num_workers, "fp32")
    sizes = dict(zip(teacher.taps, teacher.hidden_sizes, strict=True))
    with _same_random_numbers(teacher):
        return measure(_states(_sample(extract, teacher, data.data_ids)), sizes)


def _errors(codec, sample):
    """Representation loss of encoded states, by layer and frame weighting."""
    sizes = list(codec.taps.values())
    losses = {
        name: RepresentationLoss(name)
        for name in FRAME_WEIGHTINGS
        if codec.symbols or name != "nonblank"
    }
    errors = {path: dict.fromkeys(losses, 0.0) for path in codec.taps}
    utterances = sum(len(targets.lengths) for targets in sample)
    for targets in sample:
        share = len(targets.lengths) / utterances
        parts = targets.hidden.split(sizes, dim=-1)
        for path, exact in zip(codec.taps, parts, strict=True):
            states = codec.states[path]
            decoded = states.decode(states.encode(exact))
            own = targets._replace(hidden=exact)
            for name, loss in losses.items():
                errors[path][name] += share * loss(decoded, own).item()
    return errors


def _fill(store, teacher, extract, data, progressbar):
    """Write this process' part of what is missing."""
    missing = {key for key in data.data_ids if key not in store}
    if not missing:
        return
    standardise = None
    if store.taps:
        standardise = Standardiser(store.made["statistics"], store.taps)
    teacher = Teacher(
        teacher.model, store.taps, teacher.vocabulary, standardise
    )
    codec = store.codec.to(next(teacher.parameters()).device)
    # Of utterances of similar length, each process takes one.
    keys = sorted(
        data.data_ids,
        key=lambda key: (float(data.data[key]["duration"]), key),
    )
    keys = processes.own_share(keys)
    if if_main_process():
        logger.info(
            "The teacher fills %s: %d of %d utterances are missing",
            store.folder,
            len(missing),
            len(data),
        )
    with (
        signals.finishing(),
        tqdm(
            desc="targets",
            total=len(missing.intersection(keys)),
            unit="utt",
            disable=None if progressbar and if_main_process() else True,
        ) as bar,
        _counting_time(store.folder),
        writing(store.folder) as writer,
    ):
        for batch, targets, mask in extract(teacher, keys, store):
            _write(writer, codec, batch, targets, mask, missing)
            if signals.requested():
                writer.finish()
                signals.check()
            bar.update(len(missing.intersection(batch.id)))


@contextmanager
def _counting_time(folder):
    """Note the time of a filling, also of one that is stopped."""
    started = time.monotonic()
    try:
        yield
    finally:
        if if_main_process():
            # The writer reports the error of a full disk.
            with suppress(OSError):
                add_seconds(folder, time.monotonic() - started)


def _write(writer, codec, batch, targets, mask, missing):
    """Write what is missing of a batch, without its padding."""
    valid = targets._replace(
        hidden=targets.hidden[mask].unsqueeze(0),
        posteriors=targets.posteriors[mask].unsqueeze(0),
    )
    parts = [part[0].cpu() for part in codec.encode(valid)]
    lengths = targets.lengths.tolist()
    wavs, relative = batch.sig
    samples = (relative * wavs.shape[1]).round().long().tolist()
    for key, count, *both in zip(
        batch.id, samples, *(part.split(lengths) for part in parts), strict=True
    ):
        if key in missing:
            writer.add(key, *both, count)
