"""Throw damaged and hostile files at everything here that reads them.

> nice -n 10 python benchmarks/fuzz.py
> python benchmarks/fuzz.py --only shard --first 1234 --inputs 1

Each input is a sound file with some of it changed: bits flipped, bytes
overwritten with numbers that hurt, cut out, put in, copied from elsewhere, or
the end cut off. For half of them the checksums are made right afterwards, or
the parts are changed before they are put together, so that what lies behind
the checks is reached too. Input N of a target is always the same.

A file may be refused: a ValueError, OSError or KeyError that names it. It may
be read as what was written. Where checksums were made right, or the format has
none, it may be read as what it says now. All else is a crash: another error,
the end of the process, more than TOO_LONG seconds or TOO_MUCH memory, or data
read from under a checksum that are not what was written.

The files are read by processes of their own, one at a time, from memory-mapped
files and from memory. The result goes to
``benchmarks/results/reliability/fuzz.json``.
"""

import argparse
import copy
import io
import itertools
import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy
import onnx
import torch

from tutornet_sb.distillation.targets import TeacherTargets
from tutornet_sb.experiments.compare import table
from tutornet_sb.inference.recogniser import load_recogniser
from tutornet_sb.networks import runs
from tutornet_sb.networks.weights import load_model_weights
from tutornet_sb.publishing.export import export
from tutornet_sb.targets.encodings import HIDDEN, POSTERIORS
from tutornet_sb.targets.extraction import repair_store
from tutornet_sb.targets.header import (
    FORMAT,
    HEADER,
    check_same,
    codebook_shapes,
    create_store,
    make_codec,
)
from tutornet_sb.targets.store import (
    ENTRY,
    FOOTER,
    RECORD,
    TargetStore,
    _hash,
    writing,
)
from tutornet_sb.util.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "reliability" / "fuzz.json"
# Models small enough to be made in a second
sys.path.insert(0, str(ROOT / "tests"))

INPUTS = 1_000_000
# Seconds of work on one file, of which WAIT times as many may pass on a busy
# machine, and bytes that reading it may add to the process
TOO_LONG = 10
WAIT = 12
TOO_MUCH = 2**28
# Refused, as written, as the file says; the rest are crashes.
OUTCOMES = ("refused", "equal", "other", "error", "ended", "hung", "memory")
CRASHES = OUTCOMES[3:]
NUMBERS = (0, 1, 2, 127, 128, 255, 256, 2**15, 2**16, 2**31, 2**32, 2**63)
VALUES = (
    *(None, True, False, "", "x", "../../x", "/dev/zero", "\0", "💥" * 99),
    *(-1, 0, 1, 2**31, 2**62, 10**40, 0.5, -0.0, 1e308, float("nan")),
    *([], {}, [[]], [1], ["a", 2], {"a": 1}, {"": {}}),
)


class WrongData(Exception):
    """What was read is not what was written, and nothing said so."""


# ------------------------------------------------------------------- mutations


def number(generator):
    """An integer at or beside a boundary."""
    return generator.choice(NUMBERS) + generator.randrange(-1, 2)


def mutate(content, generator):
    """Change a file in one to three places."""
    content = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 3))):
        size = len(content)
        at = generator.randrange(size + 1)
        length = generator.choice((1, 2, 4, 8, 16, 64, size // 2 + 1))
        kind = generator.randrange(9)
        if kind == 0 and at < size:
            content[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            content[at : at + length] = generator.randbytes(length)
        elif kind == 2:
            del content[at:]
        elif kind == 3:
            del content[at : at + length]
        elif kind == 4:
            content[at:at] = generator.randbytes(length)
        elif kind == 5:
            other = generator.randrange(size + 1)
            content[at : at + length] = content[other : other + length]
        elif kind == 6:
            other = generator.randrange(size + 1)
            content[at:at] = content[other : other + length]
        elif kind == 7:
            width = generator.choice((1, 2, 4, 8))
            order = generator.choice(("little", "big"))
            value = number(generator) % 256**width
            content[at : at + width] = value.to_bytes(width, order)
        else:
            byte = generator.choice((0, 0x20, 0x7F, 0xFF))
            content[at : at + length] = bytes([byte]) * length
    return bytes(content)


def mutate_tree(tree, generator):
    """Change one to three values of a tree of JSON, or where they stand."""
    tree = copy.deepcopy(tree)
    for _ in range(generator.choice((1, 1, 2, 3))):
        places = list(places_of(tree))
        if not places:
            break
        node, key = generator.choice(places)
        kind = generator.randrange(8)
        # Later changes must not reach the list.
        value = copy.deepcopy(generator.choice(VALUES))
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[str(value)[:9]] = node.pop(key)
        elif kind == 2:
            other, name = generator.choice(places)
            node[key] = copy.deepcopy(other[name])
        elif kind == 3 and isinstance(node[key], int | float):
            node[key] = number(generator) * generator.choice((1, -1, 0.5))
        elif kind == 4:
            for _ in range(generator.choice((2, 30, 90))):
                value = generator.choice(([value], {"a": value}))
            node[key] = value
        elif kind == 5 and isinstance(node[key], str | list):
            node[key] = node[key] * generator.choice((0, 2, 50))
        else:
            node[key] = value
    return tree


def places_of(tree):
    """Every value of a tree, as what holds it and its key there."""
    keys = tree if isinstance(tree, dict) else range(len(tree))
    for key in list(keys):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from places_of(tree[key])


def write_tree(tree, generator):
    """A tree as JSON text, which may itself be damaged a little."""
    text = json.dumps(tree, ensure_ascii=generator.random() < 0.5).encode()
    kind = generator.randrange(10)
    if kind == 0:
        deep = generator.choice((100, 2_000, 50_000))
        text = b'{"a":' * deep + text + b"}" * deep
    elif kind == 1:
        text = mutate(text, generator)
    return text


# --------------------------------------------------------------------- targets


class Target:
    """Something that reads files.

    A target writes sound files once, then for each input a changed one, and has
    it read. ``share`` says how many of all inputs it gets: fewer where each
    takes longer.
    """

    share = 1

    def __init__(self, folder):
        self.folder = folder / type(self).__name__.lower()
        self.folder.mkdir()

    @classmethod
    def name(cls):
        """Name on the command line and in the result."""
        return cls.__name__.lower()

    def read(self, generator):
        """Have one input read; returns ``equal`` or ``other``."""
        raise NotImplementedError


ENCODINGS = list(itertools.product(POSTERIORS, HIDDEN))
KEYS = ("84-121123-0000", "dev-clean/ü@90", "", "x")
SYMBOLS, TAPS = 7, {"encoder": 6, "encoder.conv": 3}


def describe(posteriors, hidden):
    """What a store of these encodings holds, as extraction.describe does."""
    symbols = [f"s{i}" for i in range(SYMBOLS)]
    return {
        "format": FORMAT,
        "library": "tutornet_sb 0.1.0",
        "teacher": {
            "weights": "abc",
            "features": {"n_mels": 64, "normalize": None},
            "taps": TAPS,
        },
        "frame_period": 0.02,
        "vocabulary": {"symbols": symbols, "map": None},
        "encodings": {
            "posteriors": posteriors,
            "top_k": 3,
            "hidden": hidden,
            "code_bytes": 2,
        },
    }


class Stored(Target):
    """A store of every encoding."""

    def __init__(self, folder):
        super().__init__(folder)
        self.spoilt = []
        self.stores = [
            self.fill(self.folder / f"{index}", *encoding)
            for index, encoding in enumerate(ENCODINGS)
        ]

    def fill(self, folder, posteriors, hidden):
        """Make a store; returns its folder, files and targets by key."""
        what = describe(posteriors, hidden)
        generator = torch.Generator().manual_seed(0)
        books = {
            path: torch.randn(shape, generator=generator)
            for path, shape in codebook_shapes(what).items()
        }
        made = {
            "id": "0123456789abcdef",
            "statistics": {
                path: {"mean": [0.5] * size, "deviation": [1.5] * size}
                for path, size in TAPS.items()
            },
            "errors": {path: {"uniform": 0.25} for path in TAPS},
            "seconds": 1.5,
        }
        create_store(folder, what, made, books)
        codec, wanted, parts = make_codec(what, books), {}, {}
        with writing(folder) as writer:
            for index, key in enumerate(KEYS):
                frames = 1 + 3 * index
                size = sum(TAPS.values())
                targets = TeacherTargets(
                    torch.randn(1, frames, size, generator=generator),
                    torch.randn(
                        1, frames, SYMBOLS, generator=generator
                    ).softmax(-1),
                    torch.tensor([frames]),
                    0.02,
                )
                raw = [part[0] for part in codec.encode(targets)]
                writer.add(key, *raw, 320 * frames)
                wanted[key] = torch.cat(raw, 1)
                parts[key] = [x.numpy().tobytes() for x in raw]
        (shard,) = (folder / "shards").iterdir()
        shard = shard.rename(folder / "shards" / "a.shard")
        files = {path: path.read_bytes() for path in folder.glob("*.*")}
        files[shard] = shard.read_bytes()
        return folder, what, files, wanted, parts

    def choose(self, generator):
        """One of the stores, as it was written but for what is written next."""
        for path, content in self.spoilt:
            path.write_bytes(content)
        self.spoilt.clear()
        store = generator.choice(self.stores)
        shards = list((store[0] / "shards").iterdir())
        for path in shards:
            if path not in store[2]:
                path.unlink()
        return store

    def spoil(self, files, path, content):
        """Write a file, which is restored before the next input."""
        self.spoilt.append((path, files[path]))
        path.write_bytes(content)

    def read_all(self, store, wanted, forged):
        """Read all there is; what is no longer there is left out."""
        refused, outcome = None, "equal"
        for key in wanted:
            try:
                raw = store.read(key)
            except (ValueError, KeyError) as error:
                # Not all keys are put into a forged shard.
                if not (forged and isinstance(error, KeyError)):
                    refused = error
                continue
            if key not in wanted or not torch.equal(raw, wanted[key]):
                if not forged:
                    raise WrongData(f"{key} of {store.folder}")
                outcome = "other"
            frames = torch.tensor([len(raw)])
            found = store.codec.decode(
                raw.unsqueeze(0), frames, list(store.taps)
            )
            size = store.codec.symbols
            if found.posteriors.shape != (1, len(raw), size):
                raise WrongData(f"shape {tuple(found.posteriors.shape)}")
        if refused is not None:
            raise refused
        return outcome


class Shard(Stored):
    """A shard: records, index and footer."""

    share = 15

    def read(self, generator):
        """Read, check and now and then repair a store with such a shard."""
        folder, _, files, wanted, parts = self.choose(generator)
        path = folder / "shards" / "a.shard"
        forged = generator.random() < 0.5
        content = (
            forge(folder, parts, generator)
            if forged
            else mutate(files[path], generator)
        )
        self.spoil(files, path, content)
        store = TargetStore(folder, partial=True)
        if generator.random() < 0.05:
            self.repair(store)
        if generator.random() < 0.5:
            store.check()
            store = TargetStore(folder)
        return self.read_all(store, wanted, forged)

    def repair(self, store):
        """Throw out what is damaged; what is left must be sound."""
        repair_store(store.folder)
        store = TargetStore(store.folder)
        if store.check():
            raise WrongData("damage is left after the repair")


def forge(folder, parts, generator):
    """A shard of hostile numbers under checksums that are right."""
    store_id = bytes.fromhex(read_json(folder / HEADER)["made"]["id"])
    content, begins = bytearray(), []
    # The first utterance has one frame.
    sizes = [len(raw) for raw in parts[KEYS[0]]]
    for key in generator.choices(KEYS, k=generator.randrange(5)):
        name = key.encode()
        body = b"".join(parts[key])
        frames = len(parts[key][0]) // sizes[0]
        fields = [len(name), frames, generator.randrange(9999)]
        if generator.random() < 0.3:
            fields[generator.randrange(3)] = number(generator)
        if generator.random() < 0.3:
            name = mutate(name + b"\xff\0", generator)
        if generator.random() < 0.3:
            body = mutate(body, generator)
        limits = 2**16, 2**32, 2**32
        fields = [
            value % limit for value, limit in zip(fields, limits, strict=True)
        ]
        begins.append(len(content))
        content += RECORD.pack(*fields, 0, 0) + name + body
    content += generator.randbytes(generator.choice((0, 0, 0, 1, 99)))
    entries = numpy.zeros(len(begins), ENTRY)
    for i, begin in enumerate(begins):
        claimed = seal(content, begin, sizes)
        entries[i] = _hash(claimed), begin
        if generator.random() < 0.1:
            entries[i]["offset"] = number(generator) % 2**64
    if generator.random() < 0.1 and len(entries):
        entries = numpy.repeat(entries, generator.choice((2, 50)))
    index, begin, count = entries.tobytes(), len(content), len(entries)
    if generator.random() < 0.1:
        index = mutate(index + bytes(16), generator)
    if generator.random() < 0.1:
        begin = number(generator) % 2**64
    if generator.random() < 0.1:
        count = number(generator) % 2**64
    content += index
    # What a reader takes for the index
    read = bytes(content[begin : begin + count * ENTRY.itemsize])
    footer = FOOTER.pack(
        b"TUTORNET", FORMAT, store_id, count, begin, zlib.crc32(read), 0
    )[:-4]
    return bytes(content + footer + struct.pack("<I", zlib.crc32(footer)))


def seal(content, begin, sizes):
    """Put a record's checksums right, and return its key."""
    length, frames, samples, *_ = RECORD.unpack_from(content, begin)
    body = begin + RECORD.size + length
    name = bytes(content[begin + RECORD.size : body])
    head = zlib.crc32(RECORD.pack(length, frames, samples, 0, 0) + name)
    end = body + frames * sizes[0]
    checksums = (
        zlib.crc32(content[body:end], head),
        zlib.crc32(content[end : end + frames * sizes[1]]),
    )
    RECORD.pack_into(content, begin, length, frames, samples, *checksums)
    return name.decode(errors="replace")


class Records(Stored):
    """Records in memory."""

    share = 300

    def __init__(self, folder):
        super().__init__(folder)
        self.readers = [
            (TargetStore(folder), files[folder / "shards" / "a.shard"], wanted)
            for folder, _, files, wanted, _ in self.stores
        ]

    def read(self, generator):
        """Read records where they were before a change."""
        store, content, wanted = generator.choice(self.readers)
        content, found = mutate(content, generator), 0
        for begin in store._offsets.tolist():
            name, _, parts = store._read_record(content, begin, len(content))
            if parts is None:
                continue
            found += 1
            key = name.decode()
            raw = torch.from_numpy(numpy.concatenate(parts, axis=1))
            if key not in wanted or not torch.equal(raw, wanted[key]):
                raise WrongData(f"{key!r} of {store.folder}")
        if found < len(KEYS):
            raise ValueError(f"{store.folder}: records are missing")
        return "equal"


class Header(Stored):
    """header.json of a store."""

    share = 35

    def read(self, generator):
        """Open a store with such a header, for a run that knows the true one.

        A header has no checksum; whoever reads it says what it must hold.
        """
        folder, what, files, wanted, _ = self.choose(generator)
        path = folder / HEADER
        if generator.random() < 0.5:
            tree = mutate_tree(json.loads(files[path]), generator)
            content = write_tree(tree, generator)
        else:
            content = mutate(files[path], generator)
        self.spoil(files, path, content)
        store = TargetStore(folder, partial=generator.random() < 0.5)
        check_same(folder, store.what, what)
        return self.read_all(store, wanted, False)


class Codebooks(Stored):
    """codebooks.bin of a store."""

    share = 20

    def read(self, generator):
        """Open a store with such codebooks, with or without its checksum."""
        folder, _, files, wanted, _ = self.choose(generator)
        path = folder / "codebooks.bin"
        if path not in files:
            path = folder / HEADER
        self.spoil(files, path, mutate(files[path], generator))
        store = TargetStore(folder)
        outcome = self.read_all(store, wanted, False)
        if path.name == HEADER:
            return outcome
        if path.read_bytes() != files[path]:
            raise WrongData(f"{path} was read")
        return outcome


def make_layers():
    """A network of the kinds of weights there are."""
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


class Weights(Target):
    """A checkpoint by torch.save."""

    share = 4

    def __init__(self, folder):
        super().__init__(folder)
        torch.manual_seed(0)
        self.network, self.path = make_layers(), self.folder / "model.ckpt"
        torch.save(self.network.state_dict(), self.path)
        self.content = self.path.read_bytes()

    def read(self, generator):
        """Load such weights, which fill the model or leave it alone."""
        forged = generator.random() < 0.5
        if forged:
            content = repack(self.content, generator)
        else:
            content = mutate(self.content, generator)
        self.path.write_bytes(content)
        model = make_layers()
        before = {k: value.clone() for k, value in model.state_dict().items()}
        try:
            load_model_weights(model, self.path)
        except ValueError:
            if not same(model.state_dict(), before):
                raise WrongData("refused weights were filled in") from None
            raise
        if same(model.state_dict(), self.network.state_dict()):
            return "equal"
        if not forged:
            raise WrongData("weights are not what was written")
        return "other"


def same(state, other):
    """Whether two states are alike to the last bit."""
    return all(
        value.shape == other[key].shape
        and value.numpy().tobytes() == other[key].numpy().tobytes()
        for key, value in state.items()
    )


def repack(content, generator):
    """A zip file with one entry changed, and checksums that are right."""
    changed, to = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    names = changed.namelist()
    # The pickle is the more delicate.
    which = generator.choice([*names, names[0], names[0], names[0]])
    with zipfile.ZipFile(to, "w") as archive:
        for name in names:
            entry = changed.read(name)
            if name == which:
                entry = mutate(entry, generator)
                if generator.random() < 0.1:
                    entry = entry * generator.choice((0, 2, 100))
            packed = generator.choice([zipfile.ZIP_STORED] * 49 + [8])
            if generator.random() < 0.01:
                name = generator.choice(["../x", "/x", names[-1], "m/x"])
            with warnings.catch_warnings():
                # Names given twice are meant.
                warnings.simplefilter("ignore")
                archive.writestr(zipfile.ZipInfo(name), entry, packed)
    return to.getvalue()


class Export(Target):
    """An exported folder: config.json and model.safetensors."""

    share = 1

    def __init__(self, folder):
        super().__init__(folder)
        from small_runs import RECURRENT, write_run

        write_run(self.folder / "run", "lstm", RECURRENT)
        export(self.folder / "run", self.folder / "to")
        self.to = self.folder / "to"
        self.files = {
            path: path.read_bytes()
            for path in (self.to / "config.json", self.to / "model.safetensors")
        }
        self.state = load_recogniser(self.to).model.state_dict()

    def read(self, generator):
        """Load a folder with one of the files changed.

        Neither is under a checksum: what is sound is read as it stands.
        """
        config, weights = self.files
        for path, content in self.files.items():
            path.write_bytes(content)
        kind = generator.randrange(4)
        if kind == 0:
            config.write_bytes(mutate(self.files[config], generator))
        elif kind == 1:
            tree = mutate_tree(json.loads(self.files[config]), generator)
            config.write_bytes(write_tree(tree, generator))
        elif kind == 2:
            weights.write_bytes(mutate(self.files[weights], generator))
        else:
            content = self.files[weights]
            size = int.from_bytes(content[:8], "little")
            tree = mutate_tree(json.loads(content[8 : 8 + size]), generator)
            text = write_tree(tree, generator)
            content = (
                len(text).to_bytes(8, "little") + text + content[8 + size :]
            )
            weights.write_bytes(content)
        state = load_recogniser(self.to).model.state_dict()
        if state.keys() == self.state.keys() and same(state, self.state):
            return "equal"
        return "other"


class Onnx(Target):
    """An ONNX file with its metadata."""

    share = 4

    def __init__(self, folder):
        super().__init__(folder)
        from small_runs import write_onnx

        self.path = self.folder / "x.onnx"
        write_onnx(self.path, ["<blank>", "▁", "A", "B"])
        self.content = self.path.read_bytes()

    def read(self, generator):
        """Load such a graph and run it on a second of noise.

        The format has no checksum.
        """
        if generator.random() < 0.5:
            content = mutate(self.content, generator)
        else:
            model = onnx.load_from_string(self.content)
            mutate_graph(model, generator)
            content = model.SerializeToString()
        self.path.write_bytes(content)
        load_recogniser(self.path)
        return "equal" if content == self.content else "other"


def mutate_graph(model, generator):
    """Change what an ONNX graph says, as protocol buffers allow."""
    graph = model.graph
    kind = generator.randrange(7)
    tensor = generator.choice(graph.initializer)
    node = generator.choice(graph.node)
    if kind < 3:
        told = json.loads(model.metadata_props[0].value)
        text = write_tree(mutate_tree(told, generator), generator)
        model.metadata_props[0].value = text.decode(errors="replace")
    elif kind == 3:
        tensor.raw_data = mutate(tensor.raw_data, generator)
    elif kind == 4:
        size = number(generator) % 2**63 * generator.choice((1, -1))
        if tensor.dims:
            tensor.dims[generator.randrange(len(tensor.dims))] = size
        else:
            tensor.dims.append(size)
    elif kind == 5:
        names = [*node.input, *node.output, "x", ""]
        names = generator.choices(names, k=len(node.input))
        del node.input[:]
        node.input.extend(names)
    else:
        for attribute in node.attribute:
            attribute.i = number(generator) % 2**63
            for at in range(len(attribute.ints)):
                attribute.ints[at] = number(generator) % 2**63


class Tokenizer(Target):
    """A SentencePiece model."""

    share = 6

    def __init__(self, folder):
        super().__init__(folder)
        from small_runs import RECURRENT, write_run

        write_run(self.folder / "run", "lstm", RECURRENT)
        self.path = self.folder / "run" / runs.TOKENIZER
        self.content = self.path.read_bytes()
        self.pieces = self.list_pieces()

    def list_pieces(self):
        """Symbols of the model, after it has spelled some words."""
        tokenizer = runs.read_tokenizer(self.path)
        tokenizer.decode(tokenizer.encode("ONE TWO é"))
        return [
            tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())
        ]

    def read(self, generator):
        """Load such a model; the format has no checksum."""
        self.path.write_bytes(mutate(self.content, generator))
        return "equal" if self.list_pieces() == self.pieces else "other"


class Results(Target):
    """results.json of a run, which tables are made of."""

    share = 25

    def __init__(self, folder):
        super().__init__(folder)
        from small_runs import RECURRENT, write_run

        write_run(self.folder / "run", "lstm", RECURRENT)
        self.run = self.folder / "run"
        self.path = self.run / runs.RESULTS
        self.content = self.path.read_bytes()
        self.table = table([self.run])

    def read(self, generator):
        """Lay such a run out in a table; the format has no checksum."""
        if generator.random() < 0.5:
            self.path.write_bytes(mutate(self.content, generator))
        else:
            tree = mutate_tree(json.loads(self.content), generator)
            self.path.write_bytes(write_tree(tree, generator))
        return "equal" if table([self.run]) == self.table else "other"


TARGETS = {
    target.name(): target
    for target in (
        *(Weights, Export, Onnx, Tokenizer, Results),
        *(Shard, Records, Header, Codebooks),
    )
}


# ------------------------------------------------------------------- processes


def draw(target, seed, index):
    """What all that is random in an input comes from."""
    return random.Random(f"{seed} {target.name()} {index}")


def judge(target, generator):
    """What becomes of one input, and the error if it is a crash."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        outcome, error = target.read(generator), None
    except (ValueError, OSError, KeyError) as caught:
        outcome, error = "refused", None
        # Ours name the file or its folder.
        if target.folder.name not in str(caught):
            outcome, error = "error", caught
    except Exception as caught:
        outcome, error = "error", caught
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if 1024 * (after - before) > TOO_MUCH:
        outcome, error = "memory", f"{(after - before) // 1024} MiB"
    return outcome, error


def work(target, seed, indices, state, report):
    """Read inputs, in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Beyond it is no honest file of these.
    resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
    # Libraries in C complain here too.
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    for index in indices:
        state[0], state[1] = index, int(time.monotonic())
        outcome, error = judge(target, draw(target, seed, index))
        state[2 + OUTCOMES.index(outcome)] += 1
        if error is not None:
            report.put((target.name(), index, outcome, tell(error)))
    state[0] = -1


def tell(error):
    """An error with the place that it comes from."""
    if not isinstance(error, Exception):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {error}"[:300]
    return f"{text} ({Path(place.filename).name}:{place.lineno})"


def fuzz_target(target, inputs, first=0, seed=0):
    """Have so many inputs read, whatever becomes of the reader.

    Returns the number of inputs by outcome, and the crashes as (index, outcome,
    error).
    """
    context = multiprocessing.get_context("fork")
    state = context.Array("q", 2 + len(OUTCOMES), lock=False)
    report, crashes = context.SimpleQueue(), []
    last = first + inputs
    while first < last:
        state[0], state[1] = first, int(time.monotonic())
        reader = context.Process(
            target=work,
            args=(target, seed, range(first, last), state, report),
        )
        reader.start()
        outcome = wait(reader, state, report, crashes)
        if outcome is None:
            break
        index = state[0]
        state[2 + OUTCOMES.index(outcome)] += 1
        reason = f"exit code {reader.exitcode}"
        crashes.append((target.name(), index, outcome, reason))
        first = index + 1
    return dict(zip(OUTCOMES, state[2:], strict=True)), crashes


def wait(reader, state, report, crashes):
    """Wait for a reader's end; returns how it failed, or None."""
    hung, at, before = False, None, 0.0
    while reader.is_alive():
        reader.join(0.2)
        while not report.empty():
            crashes.append(report.get())
        if not reader.is_alive():
            break
        if at != state[0]:
            at, before = state[0], seconds_of(reader)
        elif not hung and (
            seconds_of(reader) - before > TOO_LONG
            or time.monotonic() - state[1] > WAIT * TOO_LONG
        ):
            hung = True
            reader.kill()
    while not report.empty():
        crashes.append(report.get())
    if state[0] < 0:
        return None
    return "hung" if hung else "ended"


def seconds_of(process):
    """Processor time of a process (seconds)."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2]
    # Those of the user and of the system are the 14th and 15th.
    ticks = sum(map(int, fields.split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def fuzz(inputs=INPUTS, only=None, first=0, seed=0):
    """Share the inputs out among the targets, and have all read.

    Returns the figures by target and the crashes.
    """
    chosen = {name: TARGETS[name] for name in only or TARGETS}
    total = sum(target.share for target in chosen.values())
    figures, crashes = {}, []
    parent = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        for name, target in chosen.items():
            share = -(-inputs * target.share // total)
            started = time.monotonic()
            made = target(Path(folder))
            counts, found = fuzz_target(made, share, first, seed)
            shutil.rmtree(made.folder)
            crashes += found
            figures[name] = {
                "inputs": sum(counts.values()),
                **counts,
                "seconds": round(time.monotonic() - started, 1),
            }
            print(f"{name}: {figures[name]}", flush=True)
            for crash in found[:20]:
                print(f"    {crash}", flush=True)
    return figures, crashes


def main():
    """Read the command line, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--inputs", type=int, default=INPUTS)
    parser.add_argument("--only", nargs="+", choices=TARGETS)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    figures, crashes = fuzz(**vars(arguments))
    total = {
        key: sum(row[key] for row in figures.values())
        for key in ("inputs", *OUTCOMES)
    }
    print(f"all: {total}")
    if arguments.only or arguments.first:
        return
    result = {
        "seed": arguments.seed,
        "inputs": total["inputs"],
        "refused": total["refused"],
        "read_as_written": total["equal"],
        "read_as_it_says_now": total["other"],
        "crashes": sum(total[key] for key in CRASHES),
        "by_target": figures,
        "first_crashes": [list(crash) for crash in crashes[:50]],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    write_json(RESULT, result)
    print(RESULT)


if __name__ == "__main__":
    main()
