"""Shards of a target store, written once and read by utterance.

A shard gets its name when it is complete. It is a row of records, an index of
them, and a footer of a fixed size::

    record   RECORD (sizes and checksums), key, posteriors, hidden states
    index    hash of the key and place of the record, for each record
    footer   FOOTER (store, number of records, place and checksum of the index)

Every byte of a record is under a checksum, which is verified at each reading.
Keys are ids of utterances, with their speed where that is not 100 %.
"""

import errno
import hashlib
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

from tutornet_sb.targets.header import (
    FORMAT,
    HEADER,
    LOCK,
    SHARDS,
    make_codec,
    read_codebooks,
    read_header,
)
from tutornet_sb.util.errors import InputError
from tutornet_sb.util.files import UNFINISHED, locked, sync

# Bytes of the key, frames, samples of the waveform, CRC-32 of these, the key
# and the posteriors, CRC-32 of the hidden states
RECORD = struct.Struct("<HIIII")
# Of a record: hash of its key, its first byte
ENTRY = numpy.dtype([("hash", "<u8"), ("offset", "<u8")])
# Magic, format, id of the store, records, first byte of the index, CRC-32 of
# the index, CRC-32 of the footer before it
FOOTER = struct.Struct("<8sI8sQQII")
MAGIC = b"TUTORNET"

# A shard is closed at this size or age (seconds): that much work is lost if the
# process is killed.
SHARD_BYTES = 2**26
SHARD_SECONDS = 300
# Shards that a process has mapped at a time, each of which takes a descriptor
MAPPED = 128


class Record(NamedTuple):
    """Place of one utterance in a shard.

    Samples are of the teacher's input. The checksums are of all up to the
    posteriors, and of the hidden states. The last are the first byte of the
    record and of its posteriors, and the one after it.
    """

    key: str
    frames: int
    samples: int
    checksums: tuple
    begin: int
    body: int
    end: int


class Damage(NamedTuple):
    """A damaged shard: what was found, lost utterances, and sound records.

    Utterances are listed as far as their names can be read.
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


class ShardDamage(ValueError):
    """A shard whose records cannot be found by its index."""


def _hash(key):
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _map_file(path):
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_index(path, store):
    """Checked index of a shard, and the first byte after the last record."""
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


@contextmanager
def filling(folder):
    """Fill a store, made if it is missing, after other processes are done.

    Files that a killed process left unfinished are removed.
    """
    folder = Path(folder)
    with locked(folder / LOCK, f"fills {folder}"):
        for path in (folder / SHARDS).glob(f"*{UNFINISHED}"):
            path.unlink()
        yield


class ShardWriter:
    """Write shards of a store, one after another.

    For use in a ``with`` block: the current shard is finished at its end, and
    removed if the block raises. A shard is closed at `limit_bytes`, or when it
    is `limit_seconds` old.
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
            with self._explaining():
                self.finish()
        else:
            self._drop()

    def add(self, key, posteriors, hidden, samples):
        """Add an utterance; shards before the current one are never lost.

        Posteriors and hidden states are from ``TargetCodec.encode``,
        ``(frames, bytes)``, on the CPU; samples are of the waveform.
        """
        name = key.encode()
        if len(name) >= 2**16:
            raise InputError(f"the id {key[:40]}... is too long")
        parts = [x.contiguous().numpy().tobytes() for x in (posteriors, hidden)]
        sizes = len(name), len(posteriors), samples
        # The first checksum is also of what is before the posteriors.
        head = zlib.crc32(RECORD.pack(*sizes, 0, 0) + name)
        checksums = zlib.crc32(parts[0], head), zlib.crc32(parts[1])
        head = RECORD.pack(*sizes, *checksums)
        record = b"".join([head, name, *parts])
        with self._explaining():
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
        """Complete the current shard, if there is one."""
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
    def _explaining(self):
        """Say what a full disk means for the store."""
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
    mapped files it takes 20 bytes for each utterance.

    Damaged shards are left out if `partial`; otherwise they raise. ``what`` and
    ``made`` are from the header, ``codec`` turns bytes into targets.
    """

    def __init__(self, folder, partial=False):
        self.folder = Path(folder)
        header = read_header(folder)
        self.what, self.made = header["what"], header["made"]
        self.partial = partial
        codebooks = read_codebooks(self.folder, header)
        try:
            self.codec = make_codec(self.what, codebooks)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{self.folder / HEADER} is damaged ({error}): delete the "
                "folder and fill it again"
            ) from None
        self.taps = self.codec.taps
        self._store = bytes.fromhex(self.made["id"])
        self._maps = OrderedDict()
        self._shards, self._ends = [], []
        entries, shards = [numpy.zeros(0, ENTRY)], [numpy.zeros(0, "<u4")]
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
            entries.append(index)
            shards.append(numpy.full(len(index), len(self._shards), "<u4"))
            self._shards.append(path)
            self._ends.append(end)
        entries = numpy.concatenate(entries)
        # Sorted; of equal ones the first
        self._hashes, order = numpy.unique(entries["hash"], return_index=True)
        self._offsets = entries["offset"][order]
        self._shard_of = numpy.concatenate(shards)[order]

    def __reduce__(self):
        return type(self), (self.folder, self.partial)

    def __len__(self):
        return len(self._hashes)

    def __contains__(self, key):
        return self._find(key) is not None

    def keys(self):
        """Yield the key of every utterance, in no particular order."""
        for shard, begin in zip(
            self._shard_of.tolist(), self._offsets.tolist(), strict=True
        ):
            mapped = self._map(self._shards[shard])
            record = self._record(mapped, begin, self._ends[shard])
            if record is not None:
                yield record.key

    def _find(self, key):
        wanted = numpy.uint64(_hash(key))
        at = numpy.searchsorted(self._hashes, wanted)
        if at == len(self._hashes) or self._hashes[at] != wanted:
            return None
        return int(self._shard_of[at]), int(self._offsets[at])

    def _map(self, path):
        if path not in self._maps:
            self._maps[path] = _map_file(path)
            if len(self._maps) > MAPPED:
                self._maps.popitem(last=False)
        self._maps.move_to_end(path)
        return self._maps[path]

    def _record(self, mapped, begin, end):
        """Read where a record is, or None where there cannot be one."""
        if begin + RECORD.size > end:
            return None
        length, frames, samples, *checksums = RECORD.unpack_from(mapped, begin)
        body = begin + RECORD.size + length
        frame_bytes = self.codec.posterior_bytes + self.codec.hidden_bytes
        finish = body + frames * frame_bytes
        if finish > end:
            return None
        try:
            key = mapped[begin + RECORD.size : body].decode()
        except UnicodeDecodeError:
            return None
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
        """Read encoded targets ``(frames, bytes)``, for ``TargetCodec.decode``.

        Samples, if given, are of the student's input, which must be that of the
        teacher. Without `hidden`, only posteriors are read. An utterance that
        is missing raises a ``KeyError``.
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
                f"utterance {key}: the teacher received {record.samples} "
                f"samples when {self.folder} was filled, and now it has "
                f"{samples}. Has the corpus changed, or is the waveform "
                "changed before it reaches the student? Delete that store, or "
                "use --targets online"
            )
        # A copy, since the file must not be written to.
        return torch.from_numpy(numpy.concatenate(parts, axis=1))

    def check(self):
        """Read everything; a list with a ``Damage`` for each damaged shard."""
        shards = sorted((self.folder / SHARDS).glob("*.shard"))
        return [found for found in map(self._diagnose, shards) if found]

    def _diagnose(self, path):
        """Damage of a shard, or None."""
        try:
            index, end = _read_index(path, self._store)
            reason = "its records are not what was written"
        except ShardDamage as error:
            index, end, reason = None, path.stat().st_size, str(error)
        if reason == "it belongs to another store":
            return Damage(path, reason, [], [])
        sound, lost, nameless = [], [], 0
        if end:
            mapped = _map_file(path)
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
        """First bytes of the records one after another, without an index."""
        begin = 0
        while (record := self._record(mapped, begin, end)) is not None:
            if not record.frames:
                return
            yield begin
            begin = record.end

    def drop(self, damage):
        """Remove a damaged shard, keeping the records that are sound.

        Call it under :func:`filling`, and open the store again after it.
        """
        if damage.sound:
            mapped = self._map(damage.path)
            with ShardWriter(self.folder, math.inf, math.inf) as writer:
                for record in damage.sound:
                    parts = self._parts(mapped, record)
                    parts = [torch.from_numpy(part.copy()) for part in parts]
                    writer.add(record.key, *parts, record.samples)
        damage.path.unlink()
