"""Cost of a target store, in time and on disk.

> python benchmarks/targets.py steps
> python benchmarks/targets.py steps --size full --steps 1
> python benchmarks/targets.py sizes STORE
> python benchmarks/targets.py scale

``steps`` compares the seconds of a training step, loading included, with those
of the same student by CTC alone: taught from a store, by the teacher at the
size of the small corpora, and by Jasper DR 10x5 with random weights; and with a
student of the same size made of SpeechBrain's parts alone (plain), whose layers
hear no padding either (plain_packed).
The students take their steps in turns in one process; ratios are within each
turn, and their median counts; those of processor time suffer less from other
work on the machine. ``sizes`` takes what a store of fp16 targets holds for the
truth, learns codebooks on half of its utterances and measures every encoding on
the other half. ``scale`` fills and reads a store of many utterances with small
targets. Results go to ``benchmarks/results/targets/``.
"""

import argparse
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
from pathlib import Path

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

from tutornet_sb.corpora.tokenizer import pieces, train_tokenizer
from tutornet_sb.distillation.encodings import (
    QUANTISERS,
    TargetCodec,
    train_codebooks,
)
from tutornet_sb.distillation.extraction import StoredTeacher, describe
from tutornet_sb.distillation.pairs import make_projectors, teacher_taps
from tutornet_sb.distillation.store import (
    ShardWriter,
    TargetStore,
    codebook_shapes,
    create_store,
    make_codec,
)
from tutornet_sb.distillation.targets import TeacherTargets
from tutornet_sb.distillation.teacher import Teacher
from tutornet_sb.files import write_json

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
        }
    return items


def claim_store(recipe, folder, teacher, hparams, items, encodings):
    """A store of random targets: what is in them takes no time."""
    tokenizer = hparams["tokenizer"]
    what = describe(teacher, pieces(tokenizer), 0, encodings)
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
            | {"epoch_counter": counter, "log_folder": str(folder / name)},
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
        sampler = self.recipe.batches(self.hparams, self.data, shuffle=False)
        self.loader = iter(make_dataloader(self.data, batch_sampler=sampler))

    def step(self):
        """Load and learn a batch; tell the seconds and those of the CPU."""
        began = time.perf_counter(), time.process_time()
        self.brain.fit_batch(next(self.loader))
        return numpy.array(
            [time.perf_counter() - began[0], time.process_time() - began[1]]
        )


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

    With ``packed`` its layers hear no padding, as ours do not.
    """

    def __init__(self, recipe, name, hparams, items, packed):
        self.data = recipe.make_dataset(items, hparams)
        self.name, self.hparams, self.recipe = name, hparams, recipe
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
        taps = teacher_taps(hparams["pairs"])
        variants = make_variants(
            recipe, arguments, hparams, items, folder, taps
        )
        turns = []
        order = random.Random(0)
        # Once without counting, for what is made at the first step
        for turn in range(arguments.repeats + 1):
            for variant in variants:
                variant.start()
            seconds = {variant.name: numpy.zeros(2) for variant in variants}
            for step in range(arguments.steps):
                for variant in order.sample(variants, len(variants)):
                    # It takes so long that a few of its steps must do.
                    if "10x5" in variant.name and (
                        step or turn > arguments.slow_repeats
                    ):
                        continue
                    seconds[variant.name] += variant.step()
                if step == 0:
                    first = {
                        key: value.copy() for key, value in seconds.items()
                    }
            ctc = seconds.pop("ctc")
            for name, value in seconds.items():
                # Of the same batches
                value /= first["ctc"] if "10x5" in name else ctc
            seconds["ctc"] = ctc / arguments.steps
            if turn:
                turns.append(seconds)
            print(f"turn {turn}: {seconds}", flush=True)
        save(
            f"steps_{arguments.size}",
            {
                "student_parameters": sum(
                    p.numel() for p in hparams["student"]["model"].parameters()
                ),
                "batch_seconds": batch_seconds,
                "steps": arguments.steps,
                "seconds_of_a_ctc_step": statistics.median(
                    float(turn["ctc"][0]) for turn in turns
                ),
                "time_over_ctc": summary(turns, 0),
                "processor_time_over_ctc": summary(turns, 1),
            },
        )


def summary(turns, kind):
    """Median ratio of each variant, and its least and greatest."""
    ratios = {}
    for turn in turns:
        for name, value in turn.items():
            if name != "ctc" and value[kind]:
                ratios.setdefault(name, []).append(float(value[kind]))
    return {
        name: {
            "median": statistics.median(values),
            "least": min(values),
            "greatest": max(values),
            "repeats": len(values),
        }
        for name, values in ratios.items()
    }


def make_variants(recipe, arguments, hparams, items, folder, taps):
    """All ways to train: by whom, at which stage, from where."""

    def network(size):
        values = {"student_yaml": "hparams/models/jasper_dr.yaml"}
        values["student_size"] = size
        file = RECIPE / "hparams" / "ctc_lstm.yaml"
        return recipe.read_hparams(file, values)[2]["student"]["model"]

    def make(name, stage, teacher):
        return Variant(recipe, name, stage, hparams, items, folder, teacher)

    own = network(arguments.size)
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
        variants.append(make(f"rkd_store_{encoding}", "rkd", stored))
    if arguments.size != "full":
        variants.append(make("skd_online_mini", "skd", Teacher(own, [])))
        variants.append(make("rkd_online_mini", "rkd", teacher))
        own = network("full")
        teacher = Teacher(own, taps)
    if arguments.slow_repeats:
        variants.append(
            make("skd_online_jasper_dr_10x5", "skd", Teacher(own, []))
        )
        variants.append(make("rkd_online_jasper_dr_10x5", "rkd", teacher))
    return variants


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
        for count in (4, 8, 16, 32)
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
                store.codec.blank_index,
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
            pair = [
                torch.nn.functional.layer_norm(x[:, at : at + size], (size,))
                for x in (found, hidden)
            ]
            errors.append((pair[0] - pair[1]).square().mean().item())
            at += size
        # Of the states as RKD's loss normalises them: 1 is all of them.
        row["normalised_squared_error"] = statistics.mean(errors)
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
            "format": 1,
            "library": "benchmark",
            "teacher": {"weights": "", "features": {}, "taps": {"encoder": 8}},
            "frame_period": 0.02,
            "vocabulary": {
                "symbols": [str(i) for i in range(29)],
                "blank_index": 0,
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
    part.add_argument("--repeats", type=int, default=7)
    part.add_argument("--steps", type=int, default=8, help="in each turn")
    part.add_argument("--batch_seconds", type=float, help="else the corpus'")
    part.add_argument(
        "--slow_repeats", type=int, default=3, help="of Jasper DR 10x5"
    )
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
    {"steps": steps, "sizes": sizes, "scale": scale}[arguments.command](
        arguments
    )


if __name__ == "__main__":
    main()
