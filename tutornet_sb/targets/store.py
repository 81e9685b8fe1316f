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
    LOCK,
    SHARDS,
    make_codec,
    read_codebooks,
    read_header,
)
from tutornet_sb.util.errors import FullDiskError, InputError
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

REMEDY = "`tutornet targets` with --repair fills it again"


class Damage(NamedTuple):
    """A damaged shard: what was found, and the keys of damaged records.

    Keys are listed as far as they can be read.
    """

    path: Path
    reason: str
    keys: list

    def __str__(self):
        return f"{self.path} is damaged ({self.reason})"


class ShardDamage(ValueError):
    """A shard whose records cannot be found by its index."""


def _hash(key):
    return _to_int(hashlib.blake2b(key.encode(), digest_size=8).digest())


def _to_int(content):
    return int.from_bytes(content, "little")


def _map_file(path):
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_index(path, store):
    """Checked index of a shard, and the first byte after the last record."""
    end = path.stat().st_size - FOOTER.size
    with open(path, "rb") as file:
        file.seek(max(end, 0))
        footer = file.read()
        if end < 0 or zlib.crc32(footer[:-4]) != _to_int(footer[-4:]):
            raise ShardDamage("its end is missing or damaged")
        *owner, count, begin, checksum, _ = FOOTER.unpack(footer)
        if owner != [MAGIC, FORMAT, store]:
            raise ShardDamage("it belongs to another store")
        content = b""
        # No more than there is, whatever the numbers claim
        if begin + count * ENTRY.itemsize == end:
            file.seek(begin)
            content = file.read(count * ENTRY.itemsize)
        if begin + len(content) != end or zlib.crc32(content) != checksum:
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

    From :func:`writing`. A shard is closed at `limit_bytes`, or when it is
    ``SHARD_SECONDS`` old.
    """

    def __init__(self, folder, limit_bytes):
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes
        self.store = bytes.fromhex(read_header(folder)["made"]["id"])
        self.file = None
        self.written = 0

    def add(self, key, posteriors, hidden, samples):
        """Add an utterance.

        Posteriors and hidden states are from ``TargetCodec.encode``,
        ``(frames, bytes)``, on the CPU; samples are of the waveform.
        """
        name = key.encode()
        parts = [x.contiguous().numpy().tobytes() for x in (posteriors, hidden)]
        sizes = len(name), len(posteriors), samples
        # The first checksum is also of what is before the posteriors.
        head = zlib.crc32(RECORD.pack(*sizes, 0, 0) + name)
        checksums = zlib.crc32(parts[0], head), zlib.crc32(parts[1])
        record = b"".join([RECORD.pack(*sizes, *checksums), name, *parts])
        if self.file is None:
            self.path = self.folder / SHARDS / f"{secrets.token_hex(8)}.shard"
            self.file = open(self.path.with_suffix(UNFINISHED), "wb")
            self.index, self.end = [], 0
            self.started = time.monotonic()
        self.file.write(record)
        self.index.append((_hash(key), self.end))
        self.end += len(record)
        age = time.monotonic() - self.started
        if self.end >= self.limit_bytes or age >= SHARD_SECONDS:
            self.finish()

    def finish(self):
        """Complete the current shard, if there is one."""
        if self.file is None:
            return
        count, index = len(self.index), numpy.array(self.index, ENTRY).tobytes()
        numbers = self.store, count, self.end, zlib.crc32(index), 0
        footer = FOOTER.pack(MAGIC, FORMAT, *numbers)[:-4]
        checksum = struct.pack("<I", zlib.crc32(footer))
        self.file.write(index + footer + checksum)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.file.name, self.path)
        sync(self.path.parent)
        self.written += count
        self.file = None

    def drop(self):
        """Remove the current shard, if there is one."""
        if self.file is not None:
            # What is in its buffer of a full disk cannot be written either.
            with suppress(OSError):
                self.file.close()
            Path(self.file.name).unlink(missing_ok=True)
            self.file = None


@contextmanager
def writing(folder, limit_bytes=SHARD_BYTES):
    """Open a ``ShardWriter`` for a ``with`` block.

    The current shard is finished at its end, and removed if the block raises.
    Shards before it are never lost.
    """
    writer = ShardWriter(folder, limit_bytes)
    try:
        yield writer
        writer.finish()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise FullDiskError(
            f"the disk of the target store {folder} is full. The "
            f"{writer.written} utterances written before stay: make room, and "
            "run the same command again"
        ) from None
    finally:
        writer.drop()


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
        self.codec = make_codec(self.what, read_codebooks(folder, header))
        self.taps = self.codec.taps
        self._store = bytes.fromhex(self.made["id"])
        self._maps = OrderedDict()
        self._shards, self._ends, self._damaged = [], [], []
        entries, shards = [numpy.zeros(0, ENTRY)], [numpy.zeros(0, "<u4")]
        for path in sorted((self.folder / SHARDS).glob("*.shard")):
            try:
                index, end = _read_index(path, self._store)
            except ShardDamage as error:
                damage = Damage(path, str(error), [])
                if not partial:
                    raise InputError(f"{damage}. {REMEDY}") from None
                self._damaged.append(damage)
                continue
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

    def _find(self, key):
        """Shard of an utterance, and the first byte of its record."""
        wanted = numpy.uint64(_hash(key))
        at = numpy.searchsorted(self._hashes, wanted)
        if at == len(self._hashes) or self._hashes[at] != wanted:
            return None
        return int(self._shard_of[at]), int(self._offsets[at])

    def _map(self, path):
        if path not in self._maps:
            with open(path, "rb") as file:
                self._maps[path] = mmap.mmap(
                    file.fileno(), 0, access=mmap.ACCESS_READ
                )
            if len(self._maps) > MAPPED:
                self._maps.popitem(last=False)
        self._maps.move_to_end(path)
        return self._maps[path]

    def _read_record(self, mapped, begin, end, hidden=True):
        """Key (bytes), samples, and parts, which are None if damaged."""
        if begin + RECORD.size > end:
            return b"", 0, None
        length, frames, samples, *checksums = RECORD.unpack_from(mapped, begin)
        at = begin + RECORD.size + length
        name = mapped[begin + RECORD.size : at]
        sizes = [self.codec.posterior_bytes, self.codec.hidden_bytes]
        if at + frames * sum(sizes) > end:
            return name, samples, None
        found = zlib.crc32(RECORD.pack(length, frames, samples, 0, 0) + name)
        parts = []
        for size, checksum in zip(sizes, checksums, strict=True):
            part = numpy.frombuffer(mapped, numpy.uint8, frames * size, at)
            if zlib.crc32(part, found) != checksum:
                return name, samples, None
            parts.append(part.reshape(frames, size))
            at, found = at + len(part), 0
            if not hidden:
                break
        return name, samples, parts

    def read(self, key, samples=None, hidden=True):
        """Read encoded targets ``(frames, bytes)``, for ``TargetCodec.decode``.

        Samples, if given, are of the student's input, which must be that of the
        teacher. Without `hidden`, only posteriors are read. An utterance that
        is missing raises a ``KeyError``.
        """
        place = self._find(key)
        if place is None:
            raise KeyError(f"the target store {self.folder} has no {key}")
        shard, begin = place
        path, end = self._shards[shard], self._ends[shard]
        name, received, parts = self._read_record(
            self._map(path), begin, end, hidden
        )
        if parts is None or name != key.encode():
            raise InputError(
                f"{path} is damaged: the targets of {key} are not what was "
                f"written. {REMEDY}"
            )
        if samples is not None and samples != received:
            raise InputError(
                f"utterance {key}: the teacher received {received} samples "
                f"when {self.folder} was filled, and now it has {samples}. Has "
                "the corpus changed, or is the waveform changed before it "
                "reaches the student? Delete that store, or use --targets "
                "online"
            )
        # A copy, since the file must not be written to.
        return torch.from_numpy(numpy.concatenate(parts, axis=1))

    def check(self):
        """Read everything; a list with a ``Damage`` for each damaged shard."""
        damaged = list(self._damaged)
        for path in self._shards:
            index, end = _read_index(path, self._store)
            lost = []
            for wanted, begin in index.tolist():
                name, _, parts = self._read_record(self._map(path), begin, end)
                key = name.decode(errors="replace")
                if parts is None or _hash(key) != wanted:
                    lost.append(key)
            if lost:
                reason = f"{len(lost)} of its {len(index)} utterances"
                damaged.append(Damage(path, reason, lost))
        return damaged
