"""Teacher's targets on disk, by utterance.

A store is a folder::

    header.json         what the targets are, and whose
    codebooks.bin       centroids of quantised hidden states, in fp16
    shards/NAME.shard   targets of many utterances

Shards are written once and get their name when they are complete. Each is a
row of records, an index of them, and a footer of a fixed size::

    record   RECORD (sizes and checksums), key, posteriors, hidden states
    index    hash of the key and place of the record, for each record
    footer   FOOTER (store, number of records, place and checksum of the index)

Every byte of a record is under a checksum, which each reading checks. Keys are
strings: ids of utterances, with their speed where that is not 100 %.
"""

import errno
import hashlib
import json
import math
import mmap
import os
import secrets
import struct
import time
import zlib
from collections import OrderedDict
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy
import torch

from tutornet_sb.targets.encodings import (
    QUANTISERS,
    TargetCodec,
    codebook_shape,
)
from tutornet_sb.util.errors import InputError, MissingFileError, OccupiedError
from tutornet_sb.util.files import (
    UNFINISHED,
    locked,
    sync,
    write_atomically,
    write_json,
)

FORMAT = 2
HEADER = "header.json"
CODEBOOKS = "codebooks.bin"
SHARDS = "shards"
LOCK = "filling.lock"

# Bytes of the key, frames, samples of the waveform, CRC-32 of these, the key
# and the posteriors, CRC-32 of the hidden states
RECORD = struct.Struct("<HIIII")
# Of a record: hash of its key, its first byte
ENTRY = numpy.dtype([("hash", "<u8"), ("offset", "<u8")])
# Magic, format, id of the store, records, first byte of the index, CRC-32 of
# the index, CRC-32 of the footer before it
FOOTER = struct.Struct("<8sI8sQQII")
MAGIC = b"TUTORNET"

# A shard is closed when it has so many bytes or is so old (seconds): that much
# work is lost if the process is killed.
SHARD_BYTES = 2**26
SHARD_SECONDS = 300
# Shards that a process has mapped at a time, each of which takes a descriptor
MAPPED = 128
# No honest header is longer (bytes).
HEADER_BYTES = 2**24


class Damage(NamedTuple):
    """What is wrong with a shard.

    Attributes
    ----------
    path : pathlib.Path
        The shard.
    reason : str
        What was found.
    keys : list of str
        Utterances that are lost, as far as their names can be read.
    sound : list of Record
        Records that are not.
    """

    path: Path
    reason: str
    keys: list
    sound: list

    def __str__(self):
        lost = f"{len(self.keys)} utterances are lost"
        if self.keys:
            some = ", ".join(self.keys[:3])
            more = len(self.keys) - 3
            lost += f": {some}" + (f" and {more} more" if more > 0 else "")
        return f"{self.path} is damaged ({self.reason}); {lost}"


class Record(NamedTuple):
    """Place of one utterance in a shard.

    Attributes
    ----------
    key : str
        Of the utterance.
    frames : int
        Teacher's frames.
    samples : int
        Of the waveform that the teacher heard.
    checksums : tuple of int
        CRC-32 of all up to the posteriors, and of the hidden states.
    begin, body, end : int
        First byte of the record and of its posteriors, and the one after it.
    """

    key: str
    frames: int
    samples: int
    checksums: tuple
    begin: int
    body: int
    end: int


def _hash(key):
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


# ----------------------------------------------------------------- the header


def flatten(tree, prefix=""):
    """Lay a tree of mappings out by dotted path.

    Arguments
    ---------
    tree : dict
        Mappings in mappings.
    prefix : str
        Put before each path.

    Returns
    -------
    dict
        Path -> value, without those that are None.

    Example
    -------
    >>> flatten({"a": {"b": 1, "c": [2]}, "d": None})
    {'a.b': 1, 'a.c': [2]}
    """
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def check_same(folder, theirs, ours):
    """Make sure that a store holds what a run wants.

    Layers that the run does not tap may be in the store.

    Arguments
    ---------
    folder : str or pathlib.Path
        The store, for the message.
    theirs, ours : dict
        What the store holds and what the run wants, as described by
        ``extraction.describe``.

    Raises
    ------
    ValueError
        If they differ; it shows both sides.
    """
    theirs, ours = json.loads(json.dumps([theirs, ours]))
    has, wants = theirs["teacher"].pop("taps"), ours["teacher"].pop("taps")
    if any(has.get(path) != size for path, size in wants.items()):
        _differ(folder, "teacher.taps", has, wants)
    if not wants:
        # Hidden states are not wanted: however they are kept will do.
        for side in (theirs, ours):
            for key in ("hidden", "code_bytes"):
                side["encodings"].pop(key, None)
    theirs, ours = flatten(theirs), flatten(ours)
    for key in {**ours, **theirs}:
        there, now = theirs.get(key, "nothing"), ours.get(key, "nothing")
        if there != now:
            _differ(folder, key, there, now)


def _differ(folder, key, there, now):
    there, now = _shorten(there, now), _shorten(now, there)
    raise InputError(
        f"the target store {folder} holds other targets than this run wants: "
        f"there {key} is {there}, and now it is {now}. Choose another folder, "
        "or delete that one"
    )


def _shorten(value, other, most=120):
    """Show a value, or where a long list begins to differ from another."""
    text = str(value)
    if len(text) <= most:
        return text
    if isinstance(value, list) and isinstance(other, list):
        pairs = enumerate(zip(value, other, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), len(other))
        return f"a list of {len(value)} with {value[at : at + 3]} at {at}"
    return text[:most] + "..."


def read_header(folder):
    """Read and check what a store holds.

    Arguments
    ---------
    folder : str or pathlib.Path
        The store.

    Returns
    -------
    dict
        ``what`` (of the targets) and ``made`` (how, and the store's ``id``).

    Raises
    ------
    FileNotFoundError
        If there is no store.
    ValueError
        If the header is damaged, or of another format.
    """
    path = Path(folder) / HEADER
    if not path.is_file():
        raise MissingFileError(f"{folder} holds no target store: no {HEADER}")
    if path.stat().st_size > HEADER_BYTES:
        raise InputError(f"{path} is damaged: it is longer than any header")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        _check_header(header)
    # The kinds of damage raise all kinds of errors.
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    except RecursionError:
        reason = "nested too deeply"
    else:
        if header["what"]["format"] != FORMAT:
            raise InputError(
                f"{folder} is a target store of format "
                f"{header['what']['format']}, and this version reads {FORMAT}: "
                "delete it and fill it anew"
            )
        return header
    raise InputError(
        f"{path} is damaged ({reason}): delete the folder and fill it anew"
    )


def _check_header(header):
    """Raise if any value that is used has another type or is out of range."""
    _check_depth(header)
    what, made = header["what"], header["made"]
    taps, vocabulary = what["teacher"]["taps"], what["vocabulary"]
    for name, value, low, high in (
        ("format", what["format"], 0, 2**31),
        *((f"taps.{path}", size, 1, 2**20) for path, size in taps.items()),
    ):
        if type(value) is not int or not low <= value <= high:
            raise InputError(f"{name} is {value!r}")
    period = what["frame_period"]
    if type(period) not in (int, float) or not 0 < period < math.inf:
        raise InputError(f"frame_period is {period!r}")
    encodings = what["encodings"]
    for name in ("posteriors", "hidden"):
        if not isinstance(encodings.get(name, ""), str):
            raise InputError(f"{name} is {encodings[name]!r}")
    for name in ("top_k", "code_bytes"):
        value = encodings.get(name, 1)
        if type(value) is not int or not 1 <= value <= 2**20:
            raise InputError(f"{name} is {value!r}")
    if encodings.get("hidden") in QUANTISERS and "code_bytes" not in encodings:
        raise InputError("code_bytes is missing")
    if vocabulary is not None:
        if not isinstance(vocabulary["symbols"], list):
            raise InputError("symbols are no list")
        if type(vocabulary["blank_index"]) is not int:
            raise InputError("blank_index is no number")
    if len(bytes.fromhex(made["id"])) != 8:
        raise InputError(f"id is {made['id']!r}")
    if not isinstance(made["codebooks"], (str, type(None))):
        raise InputError("codebooks has no checksum")
    for name in "errors", "statistics":
        if not isinstance(made.get(name, {}), dict):
            raise InputError(f"{name} is {made[name]!r}")
    numbers = {
        name: value
        for name, value in flatten(made).items()
        if name.partition(".")[0] in ("seconds", "errors", "statistics")
    }
    for name, value in numbers.items():
        for number in value if isinstance(value, list) else [value]:
            if type(number) is not float or not math.isfinite(number):
                raise InputError(f"{name} is {number!r}")
    for path, found in made.get("statistics", {}).items():
        if {*map(len, found.values())} != {taps[path]}:
            raise InputError(f"statistics.{path} are of other dimensions")


def _check_depth(tree, most=50):
    """Raise where a tree is deeper than headers are, and comparing it hard."""
    if most < 0:
        raise RecursionError
    values = tree.values() if isinstance(tree, dict) else tree
    for value in values:
        if isinstance(value, (dict, list)):
            _check_depth(value, most - 1)


def make_codec(what, codebooks=None):
    """Make what turns the targets of a store into bytes and back.

    Arguments
    ---------
    what : dict
        As described by ``extraction.describe``.
    codebooks : dict, optional
        Centroids of each layer by its path, for quantised hidden states.

    Returns
    -------
    TargetCodec
        For these targets.
    """
    vocabulary = what["vocabulary"]
    symbols, blank_index = 0, 0
    if vocabulary is not None:
        symbols = len(vocabulary["symbols"])
        blank_index = vocabulary["blank_index"]
    return TargetCodec(
        symbols,
        blank_index,
        what["teacher"]["taps"],
        what["frame_period"],
        codebooks=codebooks,
        **what["encodings"],
    )


def codebook_shapes(what):
    """Shapes of the codebooks that targets need.

    Arguments
    ---------
    what : dict
        As described by ``extraction.describe``.

    Returns
    -------
    dict
        Of each layer by its path; none if hidden states are not quantised.
    """
    kind = what["encodings"].get("hidden")
    if kind not in QUANTISERS:
        return {}
    code_bytes = what["encodings"]["code_bytes"]
    return {
        path: codebook_shape(kind, size, code_bytes)
        for path, size in what["teacher"]["taps"].items()
    }


def create_store(folder, what, made=None, codebooks=None):
    """Make an empty store.

    Arguments
    ---------
    folder : str or pathlib.Path
        New, or empty.
    what : dict
        What the targets are, as described by ``extraction.describe``.
    made : dict, optional
        How they are made; is not compared with any run.
    codebooks : dict, optional
        Centroids of each layer by its path, for quantised hidden states.

    Raises
    ------
    FileExistsError
        If the folder holds anything else.
    ValueError
        If the encodings do not fit the targets.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ours = {SHARDS, LOCK, CODEBOOKS}
    for path in folder.iterdir():
        if path.name not in ours and not path.name.endswith(UNFINISHED):
            raise OccupiedError(
                f"{folder} holds {path.name} and no target store: choose "
                "another folder"
            )
    make_codec(what, codebooks)
    content = b"".join(
        numpy.ascontiguousarray(codebooks[path].cpu().numpy(), "<f2").tobytes()
        for path in codebook_shapes(what)
    )
    checksum = None
    if content:
        checksum = hashlib.sha256(content).hexdigest()
        write_atomically(
            folder / CODEBOOKS, lambda file: file.write_bytes(content)
        )
    (folder / SHARDS).mkdir(exist_ok=True)
    made = {"id": secrets.token_hex(8), **(made or {}), "codebooks": checksum}
    # The last, since it makes the folder a store.
    write_json(folder / HEADER, {"what": what, "made": made})


def add_seconds(folder, seconds):
    """Add to the time that a store took to be filled.

    Call it under :func:`filling`.

    Arguments
    ---------
    folder : str or pathlib.Path
        The store.
    seconds : float
        Time to add (seconds).
    """
    header = read_header(folder)
    made = header["made"]
    made["seconds"] = made.get("seconds", 0.0) + seconds
    write_json(Path(folder) / HEADER, header)


def _read_codebooks(folder, header):
    shapes = codebook_shapes(header["what"])
    if not shapes:
        return {}
    path = folder / CODEBOOKS
    wanted = sum(2 * math.prod(shape) for shape in shapes.values())
    found = path.stat().st_size if path.is_file() else 0
    content = path.read_bytes() if found == wanted else b""
    if hashlib.sha256(content).hexdigest() != header["made"]["codebooks"]:
        raise InputError(
            f"{path} is missing or damaged, and without it no hidden state can "
            "be read: delete the folder and fill it anew"
        )
    values = torch.frombuffer(bytearray(content), dtype=torch.float16).float()
    parts = values.split([math.prod(shape) for shape in shapes.values()])
    return {
        path: part.view(shape).clone()
        for part, (path, shape) in zip(parts, shapes.items(), strict=True)
    }


# ----------------------------------------------------------------- the shards


class ShardDamage(ValueError):
    """A shard whose records cannot be found by its index."""


def _read_index(path, store):
    """Index of a shard, checked.

    Returns the entries, and the first byte after the last record.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size < FOOTER.size:
            raise ShardDamage("it is too short")
        file.seek(size - FOOTER.size)
        footer = file.read(FOOTER.size)
        magic, version, owner, count, begin, checksum, own = FOOTER.unpack(
            footer
        )
        if magic != MAGIC or own != zlib.crc32(footer[:-4]):
            raise ShardDamage("its end is missing or damaged")
        if version != FORMAT:
            raise ShardDamage(f"its format is {version}, not {FORMAT}")
        if owner != store:
            raise ShardDamage("it belongs to another store")
        if begin + count * ENTRY.itemsize != size - FOOTER.size:
            raise ShardDamage("its sizes do not add up")
        file.seek(begin)
        content = file.read(count * ENTRY.itemsize)
    if zlib.crc32(content) != checksum:
        raise ShardDamage("its index is damaged")
    return numpy.frombuffer(content, ENTRY), begin


class ShardWriter:
    """Write shards of a store, one after another.

    For use in a ``with`` block: the shard at hand is finished at its end, and
    thrown away if the block raises.

    Arguments
    ---------
    folder : str or pathlib.Path
        The store.
    limit_bytes : int
        A shard is closed when it has so many.
    limit_seconds : float
        Or when it is so old.
    """

    def __init__(
        self, folder, limit_bytes=SHARD_BYTES, limit_seconds=SHARD_SECONDS
    ):
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes
        self.limit_seconds = limit_seconds
        self.store = bytes.fromhex(read_header(folder)["made"]["id"])
        self.file = None
        self.written = 0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None:
            with self._telling():
                self.finish()
        else:
            self._drop()

    def add(self, key, posteriors, hidden, samples):
        """Add an utterance.

        Arguments
        ---------
        key : str
            Of the utterance.
        posteriors, hidden : torch.Tensor
            From ``TargetCodec.encode``, ``(frames, bytes)``, on the CPU.
        samples : int
            Of the waveform.

        Raises
        ------
        OSError
            If it cannot be written; the shards written before are whole.
        """
        name = key.encode()
        if len(name) >= 2**16:
            raise InputError(f"the id {key[:40]}... is too long")
        parts = [x.contiguous().numpy().tobytes() for x in (posteriors, hidden)]
        sizes = len(name), len(posteriors), samples
        # What stands before the posteriors is under their checksum.
        head = zlib.crc32(RECORD.pack(*sizes, 0, 0) + name)
        checksums = zlib.crc32(parts[0], head), zlib.crc32(parts[1])
        head = RECORD.pack(*sizes, *checksums)
        record = b"".join([head, name, *parts])
        with self._telling():
            if self.file is None:
                shards = self.folder / SHARDS
                self.path = shards / f"{secrets.token_hex(8)}.shard"
                self.file = open(self.path.with_suffix(UNFINISHED), "wb")
                self.index, self.end = [], 0
                self.started = time.monotonic()
            self.file.write(record)
            self.index.append((_hash(key), self.end))
            self.end += len(record)
            age = time.monotonic() - self.started
            if self.end >= self.limit_bytes or age >= self.limit_seconds:
                self.finish()

    def finish(self):
        """Complete the shard at hand, if there is one."""
        if self.file is None:
            return
        index = numpy.array(self.index, ENTRY).tobytes()
        footer = FOOTER.pack(
            MAGIC,
            FORMAT,
            self.store,
            len(self.index),
            self.end,
            zlib.crc32(index),
            0,
        )[:-4]
        checksum = struct.pack("<I", zlib.crc32(footer))
        self.file.write(index + footer + checksum)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.file.name, self.path)
        sync(self.path.parent)
        self.written += len(self.index)
        self.file = None

    def _drop(self):
        if self.file is not None:
            # What is in its buffer cannot be written either.
            with suppress(OSError):
                self.file.close()
            Path(self.file.name).unlink(missing_ok=True)
            self.file = None

    @contextmanager
    def _telling(self):
        try:
            yield
        except OSError as error:
            self._drop()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                error.errno,
                f"the disk of the target store {self.folder} is full. The "
                f"{self.written} utterances written before stay: make room, "
                "and run the same command again",
            ) from None


class TargetStore:
    """Read the targets of utterances by their keys.

    Every process opens its own, and so does a copy by ``pickle``. Beside the
    mapped files it holds 24 bytes for each utterance.

    Arguments
    ---------
    folder : str or pathlib.Path
        The store.
    partial : bool
        Whether damaged shards are left out; otherwise they raise.

    Attributes
    ----------
    what, made : dict
        From the header.
    codec : TargetCodec
        Turns bytes into targets.

    Raises
    ------
    FileNotFoundError
        If there is no store.
    ValueError
        If it is damaged.
    """

    def __init__(self, folder, partial=False):
        self.folder = Path(folder)
        header = read_header(folder)
        self.what, self.made = header["what"], header["made"]
        self.partial = partial
        codebooks = _read_codebooks(self.folder, header)
        try:
            self.codec = make_codec(self.what, codebooks)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{self.folder / HEADER} is damaged ({error}): delete the "
                "folder and fill it anew"
            ) from None
        self._store = bytes.fromhex(self.made["id"])
        self._maps = OrderedDict()
        self._shards, self._ends = [], []
        hashes, offsets, shards = [], [], []
        for path in sorted((self.folder / SHARDS).glob("*.shard")):
            try:
                index, end = _read_index(path, self._store)
            except ShardDamage:
                if partial:
                    continue
                raise InputError(
                    f"{self._diagnose(path)}. `tutornet targets` with --repair "
                    "fills them again"
                ) from None
            hashes.append(index["hash"])
            offsets.append(index["offset"])
            shards.append(numpy.full(len(index), len(self._shards), "<u4"))
            self._shards.append(path)
            self._ends.append(end)
        self._index(hashes, offsets, shards)

    def _index(self, hashes, offsets, shards):
        """Sort all entries by hash, with the place of each leading part."""
        hashes = numpy.concatenate([numpy.zeros(0, "<u8"), *hashes])
        # Of equal ones the first
        self._hashes, order = numpy.unique(hashes, return_index=True)
        offsets = numpy.concatenate([numpy.zeros(0, "<u8"), *offsets])
        shards = numpy.concatenate([numpy.zeros(0, "<u4"), *shards])
        self._offsets, self._shard_of = offsets[order], shards[order]
        # As many leading parts as entries, or twice as many: looking one up
        # takes the same time however many there are.
        bits = max(len(order).bit_length(), 1)
        self._shift = 64 - bits
        leading = self._hashes >> numpy.uint64(self._shift)
        self._starts = numpy.searchsorted(
            leading, numpy.arange(2**bits + 1, dtype="<u8")
        ).astype("<u4")

    def __reduce__(self):
        return type(self), (self.folder, self.partial)

    def __len__(self):
        return len(self._hashes)

    def __contains__(self, key):
        return self._find(key) is not None

    @property
    def taps(self):
        """Dimension of each layer by its path."""
        return self.codec.taps

    def keys(self):
        """Give the key of every utterance, as its record has it.

        Yields
        ------
        str
            In no order that means anything.
        """
        for shard, begin in zip(
            self._shard_of.tolist(), self._offsets.tolist(), strict=True
        ):
            mapped = self._map(self._shards[shard])
            record = self._record(mapped, begin, self._ends[shard])
            if record is not None:
                yield record.key

    def _find(self, key):
        wanted = _hash(key)
        part = wanted >> self._shift
        for i in range(self._starts[part], self._starts[part + 1]):
            if self._hashes[i] == wanted:
                return int(self._shard_of[i]), int(self._offsets[i])
        return None

    def _map(self, path):
        mapped = self._maps.get(path)
        if mapped is None:
            with open(path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[path] = mapped
            if len(self._maps) > MAPPED:
                self._maps.popitem(last=False)
        else:
            self._maps.move_to_end(path)
        return mapped

    def _record(self, mapped, begin, end):
        """Read where a record is, or None where there cannot be one."""
        if begin + RECORD.size > end:
            return None
        length, frames, samples, *checksums = RECORD.unpack_from(mapped, begin)
        body = begin + RECORD.size + length
        codec = self.codec
        frame_bytes = codec.posterior_bytes + codec.hidden_bytes
        if body + frames * frame_bytes > end:
            return None
        try:
            key = mapped[begin + RECORD.size : body].decode()
        except UnicodeDecodeError:
            return None
        finish = body + frames * frame_bytes
        return Record(
            key, frames, samples, tuple(checksums), begin, body, finish
        )

    def _parts(self, mapped, record, hidden=True):
        """Bytes of a record, or None if their checksums are wrong."""
        codec, at, parts = self.codec, record.body, []
        sizes = [codec.posterior_bytes, codec.hidden_bytes]
        key = record.key.encode()
        head = RECORD.pack(len(key), record.frames, record.samples, 0, 0)
        head = zlib.crc32(head + key)
        for size, checksum in zip(
            sizes[: 1 + hidden], record.checksums, strict=False
        ):
            count = record.frames * size
            part = numpy.frombuffer(mapped, numpy.uint8, count, at)
            if zlib.crc32(part, head) != checksum:
                return None
            parts.append(part.reshape(record.frames, size))
            at += count
            head = 0
        return parts

    def read(self, key, samples=None, hidden=True):
        """Read the targets of an utterance, as bytes.

        Arguments
        ---------
        key : str
            Of the utterance.
        samples : int, optional
            Of the waveform that the student hears.
        hidden : bool
            Whether hidden states are wanted too.

        Returns
        -------
        torch.Tensor
            For ``TargetCodec.decode``, ``(frames, bytes)``, uint8.

        Raises
        ------
        KeyError
            If the store does not have it.
        ValueError
            If it is damaged, or of another waveform.
        """
        place = self._find(key)
        if place is None:
            raise KeyError(f"the target store {self.folder} has no {key}")
        path = self._shards[place[0]]
        mapped = self._map(path)
        record = self._record(mapped, place[1], self._ends[place[0]])
        parts = None
        if record is not None and record.key == key:
            parts = self._parts(mapped, record, hidden)
        if parts is None:
            raise InputError(
                f"{path} is damaged: the targets of {key} are not what was "
                "written. `tutornet targets` with --repair fills them again"
            )
        if samples is not None and samples != record.samples:
            raise InputError(
                f"utterance {key}: the teacher heard {record.samples} samples "
                f"when {self.folder} was filled, and now it has {samples}. "
                "Has the corpus changed, or is the waveform changed before the "
                "student hears it? Delete that store, or teach by --targets "
                "online"
            )
        # A copy, since the file must not be written to.
        return torch.from_numpy(numpy.concatenate(parts, axis=1))

    def check(self):
        """Read everything, and report what is damaged.

        Returns
        -------
        list of Damage
            One for each damaged shard; none if all is well.
        """
        damaged = []
        for path in sorted((self.folder / SHARDS).glob("*.shard")):
            found = self._diagnose(path)
            if found is not None:
                damaged.append(found)
        return damaged

    def _diagnose(self, path):
        """What is wrong with a shard, or None."""
        try:
            index, end = _read_index(path, self._store)
            reason = "its records are not what was written"
        except ShardDamage as error:
            index, end, reason = None, path.stat().st_size, str(error)
        if reason == "it belongs to another store":
            return Damage(path, reason, [], [])
        sound, lost, nameless = [], [], 0
        if end:
            with open(path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if index is None:
                begins = self._walk(mapped, end)
            else:
                begins = index["offset"].tolist()
            for position, begin in enumerate(begins):
                record = self._record(mapped, begin, end)
                if index is not None and record is not None:
                    if _hash(record.key) != index["hash"][position]:
                        record = None
                if record is None:
                    nameless += 1
                elif self._parts(mapped, record) is None:
                    lost.append(record.key)
                else:
                    sound.append(record)
        if index is not None and not lost and not nameless:
            return None
        if nameless:
            reason += f", the names of {nameless} too"
        elif index is None:
            reason += ", and more may have followed"
        return Damage(path, reason, lost, sound)

    def _walk(self, mapped, end):
        """Where the records begin, one after another, without an index."""
        begin = 0
        while (record := self._record(mapped, begin, end)) is not None:
            if not record.frames:
                return
            yield begin
            begin = record.end

    def drop(self, damage):
        """Throw a damaged shard away, but for the records that are sound.

        Call it under :func:`filling`, and open the store anew after it.

        Arguments
        ---------
        damage : Damage
            From ``check``.
        """
        if damage.sound:
            mapped = self._map(damage.path)
            with ShardWriter(self.folder, math.inf, math.inf) as writer:
                for record in damage.sound:
                    parts = self._parts(mapped, record)
                    parts = [torch.from_numpy(part.copy()) for part in parts]
                    writer.add(record.key, *parts, record.samples)
        damage.path.unlink()


@contextmanager
def filling(folder):
    """Be the only one that fills a store, and wait for others to end.

    What a killed process left unfinished is thrown away.

    Arguments
    ---------
    folder : str or pathlib.Path
        The store, which is made if it is not there.
    """
    folder = Path(folder)
    with locked(folder / LOCK, f"fills {folder}"):
        for path in (folder / SHARDS).glob(f"*{UNFINISHED}"):
            path.unlink()
        yield
