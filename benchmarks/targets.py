"""Cost of a target store, in time and on disk.

> python benchmarks/targets.py steps
> python benchmarks/targets.py steps --size full --steps 1
> python benchmarks/targets.py profile mini
> python benchmarks/targets.py profile small --data_folder DIGITS
> python benchmarks/targets.py sizes STORE
> python benchmarks/targets.py scale

``steps`` compares the seconds of a training step, loading included, with those
of the same student with CTC only: distilled from a store, from the teacher at
the size of the small corpora, and from Jasper DR 10x5 with random weights; and
with a student of the same size made of SpeechBrain's parts only (plain), whose
layers may receive no padding either (plain_packed). The students train on each
batch one after another in one process, and the median of the ratios to CTC
counts; those of processor time suffer less from other work on the machine.
``profile`` measures the time on a corpus by parts of a step and by torch's
kernels. ``sizes`` takes a store of fp16 targets as exact, trains codebooks on
half of its utterances and measures every encoding on the other half. ``scale``
fills and reads a store of many utterances with small targets. Results go to
``benchmarks/results/targets/``.
"""

import argparse
import collections
import copy
import importlib.util
import multiprocessing
import os
import platform
import random
import resource
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy
import soundfile
import speechbrain as sb
import torch
from speechbrain.dataio.dataloader import make_dataloader
from speechbrain.lobes.features import Fbank
from speechbrain.nnet.CNN import Conv1d
from speechbrain.nnet.normalization import BatchNorm1d
from speechbrain.nnet.RNN import LSTM
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.train_logger import FileTrainLogger

from tutornet_sb.corpora.minilibri import make_minilibri
from tutornet_sb.corpora.tokenizer import pieces, train_tokenizer
from tutornet_sb.distillation.pairs import (
    choose_pairs,
    make_projectors,
    teacher_taps,
)
from tutornet_sb.distillation.targets import TeacherTargets
from tutornet_sb.targets.encodings import (
    QUANTISERS,
    TargetCodec,
    train_codebooks,
)
from tutornet_sb.targets.extraction import StoredTeacher, describe
from tutornet_sb.targets.header import (
    FORMAT,
    codebook_shapes,
    create_store,
    make_codec,
)
from tutornet_sb.targets.store import ShardWriter, TargetStore
from tutornet_sb.teachers.teacher import Teacher
from tutornet_sb.training import brain as brain_stage
from tutornet_sb.util.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "LibriSpeech" / "TutorNet"
RESULTS = ROOT / "benchmarks" / "results" / "targets"
RATE = 16000
DEFAULT = {"posteriors": "topk", "top_k": 4, "hidden": "rq", "code_bytes": 8}


def save(name, result):
    """Add where it was measured, write it down and show it."""
    result |= {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
    }
    write_json(RESULTS / f"{name}.json", result)
    print(f"{RESULTS / name}.json")
    for key, value in result.items():
        print(f"{key}: {value}")


# ----------------------------------------------------------------------- steps


def load_recipe():
    """The recipe's train.py as a module."""
    path = RECIPE / "train.py"
    spec = importlib.util.spec_from_file_location("recipe", path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def speak(folder, count, seconds):
    """Utterances of noise that claim to be speech, of up to so many seconds."""
    generator = random.Random(0)
    letters = "ETAONIHSRDLU"
    items = {}
    for index in range(count):
        length = seconds * (0.5 + 0.5 * generator.random())
        wave = 0.1 * numpy.random.default_rng(index).standard_normal(
            round(length * RATE)
        )
        path = folder / f"{index}.flac"
        soundfile.write(path, wave, RATE)
        # Some twelve letters a second, as people speak.
        words = [
            "".join(generator.choices(letters, k=5))
            for _ in range(max(1, round(2 * length)))
        ]
        items[f"u{index}"] = {
            "wav": str(path),
            "duration": len(wave) / RATE,
            "wrd": " ".join(words),
            "split": "train",
            "transcribed": True,
            "speeds": [100],
        }
    return items


def claim_store(recipe, folder, teacher, hparams, items, encodings):
    """A store of random targets: what is in them takes no time."""
    tokenizer = hparams["tokenizer"]
    what = describe(teacher, pieces(tokenizer), encodings)
    books = {
        path: torch.randn(shape)
        for path, shape in codebook_shapes(what).items()
    }
    create_store(folder, what, codebooks=books)
    codec, generator = make_codec(what, books), torch.Generator().manual_seed(0)
    with ShardWriter(folder) as writer:
        for key, item in items.items():
            samples = round(item["duration"] * RATE)
            frames = int(item["duration"] / teacher.frame_period) + 1
            states = sum(teacher.hidden_sizes)
            targets = TeacherTargets(
                torch.randn(1, frames, states, generator=generator),
                torch.randn(1, frames, teacher.symbols, generator=generator)
                .mul(4)
                .softmax(-1),
                torch.tensor([frames]),
                teacher.frame_period,
            )
            parts = [part[0] for part in codec.encode(targets)]
            writer.add(
                recipe.store_key(key, item["split"], 100), *parts, samples
            )
    return TargetStore(folder)


class Variant:
    """One way to train the student, for some steps at a time."""

    def __init__(self, recipe, name, stage, hparams, items, folder, teacher):
        stored = teacher if isinstance(teacher, StoredTeacher) else None
        self.data = recipe.make_dataset(items, hparams, stored=stored)
        self.stored = stored
        self.name, self.hparams, self.recipe = name, hparams, recipe
        student = copy.deepcopy(hparams["student"]["model"])
        student.augment = hparams["augment"]
        modules = {"student": student}
        if teacher is not None:
            modules["teacher"] = teacher
        if stage == "rkd":
            modules["projector"] = make_projectors(
                hparams["projector"], hparams["pairs"], teacher, student
            )
        counter = EpochCounter(1)
        saved = {key: m for key, m in modules.items() if key != "teacher"}
        self.brain = recipe.BRAINS[stage](
            modules,
            hparams=hparams
            | {
                "epoch_counter": counter,
                "log_folder": str(folder / name),
                "train_logger": FileTrainLogger(str(folder / f"{name}.txt")),
            },
            opt_class=hparams["opt_class"],
            run_opts={"device": "cpu"},
            checkpointer=Checkpointer(folder / name, saved),
        )
        self.brain.steps_per_epoch = 10_000
        self.begin()

    def begin(self):
        """What ``fit`` does before the first step."""
        self.brain.on_fit_start()
        self.brain.modules.train()
        self.brain.on_stage_start(sb.Stage.TRAIN, epoch=1)

    def start(self):
        """Begin with the first batch; it is the same for all."""
        sampler = self.recipe.batches(self.hparams, self.data, shuffle=True)
        self.batches = list(sampler)
        self.loader = iter(make_dataloader(self.data, batch_sampler=sampler))

    def audio_seconds(self, step):
        """Audio in a batch, without padding."""
        keys = [self.data.data_ids[index] for index in self.batches[step]]
        return sum(float(self.data.data[key]["duration"]) for key in keys)

    def load(self):
        """Load the next batch."""
        return next(self.loader)

    def step(self):
        """Load and learn a batch; tell the seconds and those of the CPU."""
        began = time.perf_counter(), time.process_time()
        self.brain.fit_batch(self.load())
        return numpy.array(
            [time.perf_counter() - began[0], time.process_time() - began[1]]
        )


class Validation(Variant):
    """The student decoded and scored, as after each epoch."""

    def begin(self):
        """What ``fit`` does before it validates."""
        self.brain.modules.eval()

    def start(self):
        """Begin with the first batch."""
        super().start()
        self.brain.on_stage_start(sb.Stage.VALID, epoch=1)

    def step(self):
        """Load and decode a batch."""
        self.brain.evaluate_batch(self.load(), sb.Stage.VALID)


class PlainBrain(sb.Brain):
    """CTC as SpeechBrain's recipes write it down."""

    def compute_forward(self, batch, stage):
        """Waveforms to log-probabilities."""
        wavs, lengths = batch.sig
        x = self.modules.normalize(self.modules.fbank(wavs), lengths)
        x = self.modules.conv(self.hparams.augment(x))
        x = torch.relu(self.modules.norm(x))
        packed = lengths if self.hparams.packed else None
        x, _ = self.modules.layers(x, lengths=packed)
        return self.modules.head(x).log_softmax(-1)

    def compute_objectives(self, predictions, batch, stage):
        """The CTC loss."""
        tokens, lengths = batch.tokens
        return sb.nnet.losses.ctc_loss(
            predictions, tokens, batch.sig.lengths, lengths, blank_index=0
        )


class Plain(Variant):
    """The LSTM student made of SpeechBrain's own parts alone, by CTC.

    With ``packed`` its layers receive no padding, as ours do not.
    """

    def __init__(self, recipe, name, hparams, items, packed):
        self.data = recipe.make_dataset(items, hparams)
        self.name, self.hparams, self.recipe = name, hparams, recipe
        self.stored = None
        values = hparams["student"]
        size = values["hidden_size"]
        modules = {
            "fbank": Fbank(n_mels=values["n_mels"], n_fft=512, win_length=20),
            "normalize": InputNormalization(norm_type="global"),
            "conv": Conv1d(
                values["channels"],
                values["kernel_size"],
                in_channels=values["n_mels"],
                stride=values["stride"],
                bias=False,
            ),
            "norm": BatchNorm1d(input_size=values["channels"]),
            "layers": LSTM(
                size,
                input_size=values["channels"],
                num_layers=values["layers"],
                bidirectional=values["directions"] == 2,
                dropout=values["dropout"],
            ),
            "head": torch.nn.Linear(
                size * values["directions"], values["output_size"]
            ),
        }
        lr = hparams["lr"]
        self.brain = PlainBrain(
            modules,
            hparams={"augment": hparams["augment"], "packed": packed},
            opt_class=lambda parameters: torch.optim.AdamW(parameters, lr=lr),
            run_opts={"device": "cpu"},
        )
        self.begin()


def steps(arguments):
    """Seconds of a step, relative to that by CTC alone."""
    recipe = load_recipe()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        _, _, hparams = recipe.read_hparams(
            RECIPE / "hparams" / "rkd_lstm.yaml",
            {"student_size": arguments.size},
        )
        if arguments.batch_seconds is not None:
            hparams["batch_seconds"] = arguments.batch_seconds
        batch_seconds = hparams["batch_seconds"]
        longest = min(15.0, batch_seconds / 3)
        items = speak(folder, 8 * arguments.steps + 8, longest)
        transcripts = folder / "train.csv"
        lines = ["wrd", *(item["wrd"] for item in items.values())]
        lines += ["B C F G J K M P Q V W X Y Z '"]
        transcripts.write_text("\n".join(lines) + "\n")
        hparams["tokenizer"] = train_tokenizer(
            [transcripts], folder / "char.model"
        )
        variants = make_variants(recipe, arguments, hparams, items, folder)
        rounds, rates = [], []
        order = random.Random(0)
        # Once without counting, for what is made at the first step
        for turn in range(arguments.repeats + 1):
            for variant in variants:
                variant.start()
            for step in range(arguments.steps):
                seconds = {
                    variant.name: variant.step()
                    for variant in order.sample(variants, len(variants))
                    # It takes so long that a few of its steps must do.
                    if "10x5" not in variant.name
                    or (step == 0 and turn <= arguments.slow_repeats)
                }
                if turn:
                    ctc = seconds.pop("ctc")
                    # Of the same batch, learnt at about the same time
                    rounds.append({k: v / ctc for k, v in seconds.items()})
                    rates.append(variants[0].audio_seconds(step) / ctc[0])
            print(f"turn {turn}", flush=True)
        threads = torch.get_num_threads()
        rate = statistics.median(rates)
        times = summary(rounds, 0)
        save(
            f"steps_{arguments.size}"
            + (f"_{threads}_threads" if threads > 1 else ""),
            {
                "student_parameters": sum(
                    p.numel() for p in hparams["student"]["model"].parameters()
                ),
                "batch_seconds": batch_seconds,
                "steps": arguments.steps,
                "repeats": arguments.repeats,
                # The student by CTC, and the others by the ratios below
                "audio_hours_per_hour": {"ctc": rate}
                | {name: rate / t["median"] for name, t in times.items()},
                "time_over_ctc": times,
                "processor_time_over_ctc": summary(rounds, 1),
            },
        )


def summary(rounds, kind):
    """Median ratio of each variant, and its quartiles."""
    ratios = collections.defaultdict(list)
    for found in rounds:
        for name, value in found.items():
            ratios[name].append(float(value[kind]))
    result = {}
    for name, values in ratios.items():
        low, median, high = statistics.quantiles(
            values, n=4, method="inclusive"
        )
        result[name] = {"median": median, "quartiles": [low, high]}
        result[name]["steps"] = len(values)
    return result


def make_variants(recipe, arguments, hparams, items, folder):
    """All ways to train: by whom, at which stage, from where."""

    def network(size):
        values = {"student_yaml": "hparams/models/jasper_dr.yaml"}
        values["student_size"] = size
        file = RECIPE / "hparams" / "ctc_lstm.yaml"
        return recipe.read_hparams(file, values)[2]["student"]["model"]

    def find_pairs(model):
        student = hparams["student"]["model"]
        return choose_pairs(hparams["pairs"], model, student)

    def make(name, stage, teacher, pairs=None):
        values = hparams | {"pairs": pairs}
        return Variant(recipe, name, stage, values, items, folder, teacher)

    own = network(arguments.size)
    pairs = find_pairs(own)
    taps = teacher_taps(pairs)
    teacher = Teacher(own, taps)
    variants = [make("ctc", "ctc", None)]
    for name, packed in (("plain", False), ("plain_packed", True)):
        variants.append(Plain(recipe, name, hparams, items, packed))
    for encoding in ("rq", "pq"):
        encodings = DEFAULT | {"hidden": encoding}
        store = claim_store(
            recipe, folder / encoding, teacher, hparams, items, encodings
        )
        if encoding == "rq":
            variants.append(make("skd_store", "skd", StoredTeacher(store)))
        stored = StoredTeacher(store, taps)
        variants.append(make(f"rkd_store_{encoding}", "rkd", stored, pairs))
    if arguments.size != "full":
        variants.append(make("skd_online_mini", "skd", Teacher(own, [])))
        variants.append(make("rkd_online_mini", "rkd", teacher, pairs))
        own = network("full")
        pairs = find_pairs(own)
        teacher = Teacher(own, teacher_taps(pairs))
    if arguments.slow_repeats:
        variants.append(
            make("skd_online_jasper_dr_10x5", "skd", Teacher(own, []))
        )
        variants.append(
            make("rkd_online_jasper_dr_10x5", "rkd", teacher, pairs)
        )
    return variants


# --------------------------------------------------------------------- profile

PROFILED = "ctc", "plain", "skd_store", "rkd_store_rq", "skd_online_mini"
# What torch's kernels are for, forward and backward
KERNELS = {
    "LSTM layers": ("rnn_layer",),
    "convolution": ("convolution",),
    "CTC": ("_ctc_loss",),
    "dropout": ("bernoulli",),
    "Fourier transform": ("_fft",),
    "linear layers": ("aten::mm", "aten::addmm", "aten::bmm"),
    "optimizer": ("adamw", "AdamW"),
    "loader": ("DataLoader",),
}


class Clock:
    """Seconds of each part; those of a part within it are not its own."""

    def __init__(self):
        self.seconds = collections.Counter()
        self.within = []

    def timed(self, part, function):
        """The same function, its time counted."""

        def call(*args, **kwargs):
            self.within.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                self.seconds[part] += took - self.within.pop()
                if self.within:
                    self.within[-1] += took

        return call

    def watch(self, variant):
        """Count the parts of a variant's steps, within the block."""
        stack = ExitStack()
        for owner, name, part in parts_of(variant):
            timed = self.timed(part, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, timed))
        return stack


def parts_of(variant):
    """Owner and name of every function of a step, and which part it is."""
    brain, modules = variant.brain, variant.brain.modules
    yield variant, "load", "loader"
    yield variant, "step", "rest"
    yield torch.Tensor, "backward", "backward"
    yield brain, "optimizers_step", "optimizer"
    yield brain, "on_fit_batch_end", "optimizer"
    yield brain.hparams.augment, "forward", "SpecAugment"
    if isinstance(variant, Plain):
        for name in ("fbank", "normalize"):
            yield modules[name], "forward", "features"
        for name in ("conv", "norm", "layers", "head"):
            yield modules[name], "forward", "network"
        yield brain, "compute_objectives", "CTC loss"
        return
    yield modules.student.features, "forward", "features"
    # Where the teacher receives the same
    yield modules.student.features, "spectrum", "features"
    yield modules.student.encoder, "forward", "network"
    yield modules.student.head, "forward", "network"
    if hasattr(brain, "ctc"):
        yield brain, "ctc", "CTC loss"
        yield brain, "transcribe", "decoding"
        yield brain, "figures", "scoring"
    if "teacher" in modules:
        yield modules.teacher, "targets", "teacher"
        yield brain_stage, "align", "alignment"
    if variant.stored is not None:
        yield variant.stored, "read", "store"
    if "projector" in modules:
        yield modules.projector, "forward", "projector"
        yield brain.hparams.representation_loss, "forward", "RKD loss"
    elif "teacher" in modules:
        yield brain.hparams.softmax_loss, "forward", "SKD loss"


def kernels_of(variant, count):
    """Time of each kind of torch's kernels in some steps."""
    variant.start()
    with torch.profiler.profile() as profiler:
        for _ in variant.batches[:count]:
            variant.step()
    found = collections.Counter()
    for event in profiler.key_averages():
        kinds = (
            kind
            for kind, names in KERNELS.items()
            if any(name in event.key for name in names)
        )
        found[next(kinds, "others")] += event.self_cpu_time_total
    return found


def profile(arguments):
    """Where the time of a step goes."""
    recipe = load_recipe()
    file = RECIPE / "hparams" / "corpora" / f"{arguments.corpus}.yaml"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        overrides = {
            "corpus_yaml": str(file),
            "data_folder": arguments.data_folder,
            "results_folder": str(folder),
        }
        main_file = RECIPE / "hparams" / "rkd_lstm.yaml"
        _, _, hparams = recipe.read_hparams(main_file, overrides)
        if arguments.data_folder is None:
            values = hparams["corpus"]["minilibri"]
            hparams["data_folder"] = make_minilibri(
                folder / "MiniLibri", **values
            )
        data, *_ = recipe.find_data(hparams)
        arguments.size = hparams["student_size"]
        arguments.slow_repeats = 0
        items, valid = data.transcribed, data.valid.data
        made = make_variants(recipe, arguments, hparams, items, folder)
        variants = [variant for variant in made if variant.name in PROFILED]
        variants.append(
            Validation(
                recipe, "validation", "ctc", hparams, valid, folder, None
            )
        )
        turns, order = collections.defaultdict(list), random.Random(0)
        for turn in range(arguments.repeats + 1):
            for variant in order.sample(variants, len(variants)):
                clock = Clock()
                with clock.watch(variant):
                    variant.start()
                    for _ in variant.batches[: arguments.steps]:
                        variant.step()
                    if variant.name == "validation":
                        variant.brain.figures(0.0)
                if turn:
                    turns[variant.name].append(clock.seconds)
            print(f"turn {turn}", flush=True)
        save(
            f"profile_{arguments.corpus}",
            {
                "batch_seconds": hparams["batch_seconds"],
                "steps": arguments.steps,
                "repeats": arguments.repeats,
                "share_of_time": {
                    name: shares(found) for name, found in turns.items()
                },
                "share_of_kernels": {
                    variant.name: shares(
                        [
                            kernels_of(variant, arguments.steps)
                            for _ in range(arguments.repeats)
                        ]
                    )
                    for variant in variants
                    if variant.name in ("ctc", "plain")
                },
            },
        )


def shares(turns):
    """Median share of each part, the greatest first."""
    totals = [sum(turn.values()) for turn in turns]
    medians = {
        part: statistics.median(
            turn[part] / total
            for turn, total in zip(turns, totals, strict=True)
        )
        for part in set().union(*turns)
    }
    return dict(sorted(medians.items(), key=lambda pair: -pair[1]))


# ----------------------------------------------------------------------- sizes

POSTERIORS = [
    {"posteriors": "fp16"},
    {"posteriors": "uint8"},
    *({"posteriors": "topk", "top_k": k} for k in (1, 2, 3, 4, 6, 8)),
]
HIDDEN = [
    {"hidden": "fp16"},
    {"hidden": "int8"},
    *(
        {"hidden": kind, "code_bytes": count}
        for kind in ("pq", "rq")
        for count in (4, 8, 12, 16, 32)
    ),
]


def read_half(store, keys):
    """Frames of some utterances, and their seconds."""
    hidden, posteriors, samples = [], [], 0
    for key in keys:
        raw = store.read(key).unsqueeze(0)
        length = torch.tensor([raw.shape[1]])
        targets = store.codec.decode(raw, length, list(store.taps))
        hidden.append(targets.hidden[0])
        posteriors.append(targets.posteriors[0])
        samples += raw.shape[1]
    return (
        torch.cat(hidden),
        torch.cat(posteriors),
        samples * store.codec.frame_period,
    )


def sizes(arguments):
    """Bytes, error and speed of every encoding."""
    store = TargetStore(arguments.store)
    if set(store.what["encodings"].values()) != {"fp16"}:
        raise SystemExit(
            f"{arguments.store} must hold fp16 targets, of posteriors and of "
            "hidden states"
        )
    keys = sorted(store.keys())
    random.Random(0).shuffle(keys)
    half = len(keys) // 2
    learnt, _, _ = read_half(store, keys[:half])
    hidden, posteriors, seconds = read_half(store, keys[half:])
    lengths = torch.tensor([len(hidden)])
    given = TeacherTargets(
        hidden.unsqueeze(0),
        posteriors.unsqueeze(0),
        lengths,
        store.codec.frame_period,
    )
    rows = []
    for encodings in POSTERIORS:
        row = measure(
            TargetCodec(
                store.codec.symbols,
                {},
                store.codec.frame_period,
                **encodings,
            ),
            given._replace(hidden=given.hidden[..., :0]),
            seconds,
        )
        found = row.pop("decoded").posteriors[0]
        error = (found - posteriors).square().sum(-1)
        logs = (posteriors / found.clamp(min=1e-30)).clamp(min=1e-30).log()
        row["mean_squared_distance"] = error.mean().item()
        row["nats"] = (posteriors * logs).sum(-1).mean().item()
        rows.append(encodings | row)
    for encodings in HIDDEN:
        kind, count = encodings["hidden"], encodings.get("code_bytes", 1)
        books, started = {}, time.perf_counter()
        at = 0
        for path, size in store.taps.items():
            if kind in QUANTISERS:
                part = learnt[: arguments.frames, at : at + size]
                books[path] = train_codebooks(kind, part, count)
            at += size
        training = time.perf_counter() - started
        codec = TargetCodec(
            0,
            store.taps,
            store.codec.frame_period,
            codebooks=books,
            **encodings,
        )
        row = measure(
            codec, given._replace(posteriors=posteriors[None, :, :0]), seconds
        )
        found = row.pop("decoded").hidden[0]
        errors, at = [], 0
        for size in store.taps.values():
            difference = (found - hidden)[:, at : at + size]
            errors.append(difference.square().mean().item())
            at += size
        # Of standardised states, as RKD's loss has them: 1 is all of them.
        row["squared_error"] = dict(zip(store.taps, errors, strict=True))
        if kind in QUANTISERS:
            row["training_seconds"] = training
        rows.append(encodings | row)
        print(rows[-1], flush=True)
    default = DEFAULT | {"utterances": whole(store, keys, learnt, arguments)}
    result = {
        "layers": store.taps,
        "frames": len(hidden),
        "frames_learnt_from": min(len(learnt), arguments.frames),
        "default_on_disk": default,
        "encodings": rows,
    }
    save(arguments.name, result)


def measure(codec, given, seconds):
    """Bytes of an hour of audio, speeds, and what comes back."""
    started = time.perf_counter()
    parts = codec.encode(given)
    encoding = time.perf_counter() - started
    raw = torch.cat(parts, -1)
    # As batches come, of some utterances
    batches = raw.squeeze(0).split(4000)
    codec.decode(batches[0].unsqueeze(0), given.lengths, list(codec.taps))
    started = time.perf_counter()
    found = [
        codec.decode(part.unsqueeze(0), given.lengths, list(codec.taps))
        for part in batches
    ]
    decoding = time.perf_counter() - started
    decoded = TeacherTargets(
        torch.cat([part.hidden for part in found], dim=1),
        torch.cat([part.posteriors for part in found], dim=1),
        given.lengths,
        given.frame_period,
    )
    frame_bytes = raw.shape[-1]
    return {
        "bytes_per_frame": frame_bytes,
        "megabytes_per_hour_at_50_frames_a_second": frame_bytes * 0.18,
        "encoded_audio_hours_per_hour": seconds / encoding,
        "decoded_audio_hours_per_hour": seconds / decoding,
        "decoded": decoded,
    }


def whole(store, keys, learnt, arguments):
    """Fill a store by the default encodings: its size, all things included."""
    books, at = {}, 0
    for path, size in store.taps.items():
        part = learnt[: arguments.frames, at : at + size]
        books[path] = train_codebooks(
            DEFAULT["hidden"], part, DEFAULT["code_bytes"]
        )
        at += size
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "store"
        create_store(
            folder, store.what | {"encodings": DEFAULT}, codebooks=books
        )
        codec = make_codec(store.what | {"encodings": DEFAULT}, books)
        frames = 0
        with ShardWriter(folder) as writer:
            for key in keys:
                raw = store.read(key).unsqueeze(0)
                length = torch.tensor([raw.shape[1]])
                targets = store.codec.decode(raw, length, list(store.taps))
                parts = [part[0] for part in codec.encode(targets)]
                writer.add(key, *parts, 0)
                frames += raw.shape[1]
        shards = sum(f.stat().st_size for f in folder.glob("shards/*"))
        fixed = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
    hours = frames / 50 / 3600
    return {
        "count": len(keys),
        "megabytes_per_hour_at_50_frames_a_second": shards / 1e6 / hours,
        "header_and_codebooks_megabytes": fixed / 1e6,
    }


# ----------------------------------------------------------------------- scale


def private_kilobytes():
    """Memory that this process shares with no other."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(
        int(line.split()[1])
        for line in text.splitlines()
        if line.startswith(("Private_Clean", "Private_Dirty"))
    )


def read_some(job):
    """What a loader's worker does: read at random."""
    store, keys, seed = job
    generator = random.Random(seed)
    before = private_kilobytes()
    order = generator.choices(keys, k=20_000)
    started = time.perf_counter()
    for key in order:
        store.read(key)
    seconds = time.perf_counter() - started
    return len(order) / seconds, private_kilobytes() - before


def worker(store, keys, seed, results):
    """Read in a process of its own."""
    results.put(read_some((store, keys, seed)))


def open_alone(folder, results):
    """Open in a process of its own: time and memory."""
    before = private_kilobytes()
    started = time.perf_counter()
    store = TargetStore(folder)
    seconds = time.perf_counter() - started
    kept = private_kilobytes() - before
    results.put((seconds, kept, len(store)))


def scale(arguments):
    """Fill and read a store of many utterances."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        folder = Path(folder) / "store"
        what = {
            "format": FORMAT,
            "library": "benchmark",
            "teacher": {"weights": "", "features": {}, "taps": {"encoder": 8}},
            "frame_period": 0.02,
            "vocabulary": {
                "symbols": [str(i) for i in range(29)],
                "map": None,
            },
            "encodings": DEFAULT,
        }
        books = {"encoder": torch.randn(8, 256, 8)}
        create_store(folder, what, codebooks=books)
        codec = make_codec(what, books)
        keys = [
            f"{i % 2500}-{i // 2500}-{i:06d}" for i in range(arguments.count)
        ]
        started = time.perf_counter()
        with ShardWriter(folder, arguments.shard_megabytes * 10**6) as writer:
            for index, key in enumerate(keys):
                frames = 10 + index % 20
                parts = [
                    torch.full((frames, size), index % 251, dtype=torch.uint8)
                    for size in (codec.posterior_bytes, codec.hidden_bytes)
                ]
                writer.add(key, *parts, 320 * frames)
        filling = time.perf_counter() - started
        shards = list((folder / "shards").iterdir())
        size = sum(path.stat().st_size for path in shards)

        openings = []
        for _ in range(arguments.repeats):
            process = context.Process(target=open_alone, args=(folder, results))
            process.start()
            openings.append(results.get())
            process.join()
        store = TargetStore(folder)
        assert len(store) == openings[0][2] == arguments.count
        alone = statistics.median(
            read_some((store, keys, seed))[0]
            for seed in range(arguments.repeats)
        )
        processes = [
            context.Process(target=worker, args=(store, keys, seed, results))
            for seed in range(arguments.workers)
        ]
        for process in processes:
            process.start()
        read = [results.get() for _ in processes]
        for process in processes:
            process.join()
        started = time.perf_counter()
        damaged = store.check()
        checking = time.perf_counter() - started
        assert damaged == []
        save(
            "scale",
            {
                "utterances": arguments.count,
                "megabytes": size / 1e6,
                "shards": len(shards),
                "filled_utterances_per_second": arguments.count / filling,
                "open_seconds": statistics.median(o[0] for o in openings),
                "open_megabytes": statistics.median(o[1] for o in openings)
                / 1e3,
                "read_utterances_per_second": alone,
                "workers": arguments.workers,
                "read_utterances_per_second_by_all_workers": sum(
                    r[0] for r in read
                ),
                "megabytes_of_a_worker_beyond_what_it_shares": max(
                    r[1] for r in read
                )
                / 1e3,
                "check_seconds": checking,
                "greatest_memory_megabytes": resource.getrusage(
                    resource.RUSAGE_SELF
                ).ru_maxrss
                / 1e3,
            },
        )


def main():
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("steps", help="cost of a training step")
    part.add_argument("--size", default="small", help="of the student")
    part.add_argument("--repeats", type=int, default=9)
    part.add_argument("--steps", type=int, default=16, help="in each turn")
    part.add_argument("--batch_seconds", type=float, help="else the corpus'")
    part.add_argument(
        "--slow_repeats", type=int, default=3, help="of Jasper DR 10x5"
    )
    part = commands.add_parser("profile", help="parts of a training step")
    part.add_argument("corpus", help="its file in the recipe: mini, small, ...")
    part.add_argument("--data_folder", help="of a corpus not embedded")
    part.add_argument("--repeats", type=int, default=5)
    part.add_argument("--steps", type=int, default=16, help="in each turn")
    part = commands.add_parser("sizes", help="bytes, error, throughput")
    part.add_argument("store", help="of fp16 targets")
    part.add_argument("--name", default="sizes", help="of the result")
    part.add_argument(
        "--frames", type=int, default=49_152, help="for codebooks"
    )
    part = commands.add_parser("scale", help="a store of many utterances")
    part.add_argument("--count", type=int, default=300_000)
    part.add_argument("--repeats", type=int, default=5)
    part.add_argument("--workers", type=int, default=4)
    part.add_argument("--shard_megabytes", type=int, default=4)
    part.add_argument("--folder", help="where to make it")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    {"steps": steps, "profile": profile, "sizes": sizes, "scale": scale}[
        arguments.command
    ](arguments)


if __name__ == "__main__":
    main()
