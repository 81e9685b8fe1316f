"""Header of a target store: what its targets are, and how they were made.

A store is a folder::

    header.json         ``what`` (compared with what a run wants) and ``made``
    codebooks.bin       centroids of quantised hidden states, in fp16
    shards/NAME.shard   targets of many utterances, see ``store``
"""

import hashlib
import json
import math
import secrets
from itertools import zip_longest
from pathlib import Path

import numpy
import torch

from tutornet_sb.targets.encodings import (
    CENTROIDS,
    HIDDEN,
    POSTERIORS,
    TargetCodec,
)
from tutornet_sb.util.errors import InputError, MissingFileError, OccupiedError
from tutornet_sb.util.files import UNFINISHED, write_atomically, write_json
from tutornet_sb.util.mappings import flatten

FORMAT = 3
HEADER = "header.json"
CODEBOOKS = "codebooks.bin"
SHARDS = "shards"
LOCK = "filling.lock"

# No honest header is longer (bytes).
HEADER_BYTES = 2**24


def check_same(folder, theirs, ours):
    """Refuse a store whose targets are not those that a run wants.

    Both as described by ``extraction.describe``. Layers that the run does not
    tap may be in the store.
    """
    theirs, ours = json.loads(json.dumps([theirs, ours]))
    has, wants = theirs["teacher"].pop("taps"), ours["teacher"].pop("taps")
    if not wants:
        # The encoding of hidden states does not matter.
        for side in (theirs, ours):
            for key in ("hidden", "code_bytes"):
                side["encodings"].pop(key, None)
    theirs, ours = flatten(theirs), flatten(ours)
    if any(has.get(path) != size for path, size in wants.items()):
        theirs["teacher.taps"], ours["teacher.taps"] = has, wants
    for key in {**ours, **theirs}:
        there, now = theirs.get(key, "nothing"), ours.get(key, "nothing")
        if there == now:
            continue
        if isinstance(there, list) and isinstance(now, list):
            pairs = enumerate(zip_longest(there, now, fillvalue="nothing"))
            at, (there, now) = next((i, p) for i, p in pairs if p[0] != p[1])
            key += f"[{at}]"
        raise InputError(
            f"the target store {folder} holds other targets than this run "
            f"wants: there {key} is {str(there)[:120]}, and now it is "
            f"{str(now)[:120]}. Choose another folder, or delete that one"
        )


def read_header(folder):
    """Read and check a header: a dictionary of ``what`` and ``made``."""
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
        found = header["what"]["format"]
        if found != FORMAT:
            raise InputError(
                f"{folder} is a target store of format {found}, and this "
                f"version reads {FORMAT}: delete it and fill it again"
            )
        return header
    raise InputError(
        f"{path} is damaged ({reason}): delete the folder and fill it again"
    )


def _check_header(header):
    """Raise if any value that is used has another type or is out of range."""

    def check(name, value, is_right):
        if not is_right:
            raise InputError(f"{name} is {value!r}")

    def check_whole(name, value, low=1, high=2**20):
        check(name, value, type(value) is int and low <= value <= high)

    what, made = header["what"], header["made"]
    taps, encodings = what["teacher"]["taps"], what["encodings"]
    check_whole("format", what["format"], 0, 2**31)
    for path, size in taps.items():
        check_whole(f"taps.{path}", size)
    period = what["frame_period"]
    is_number = type(period) in (int, float)
    check("frame_period", period, is_number and 0 < period < math.inf)
    if taps:
        check("hidden", encodings["hidden"], encodings["hidden"] in HIDDEN)
        if encodings["hidden"] == "rq":
            check_whole("code_bytes", encodings["code_bytes"])
    if what["vocabulary"] is not None:
        symbols, kind = what["vocabulary"]["symbols"], encodings["posteriors"]
        check("symbols", symbols, type(symbols) is list and len(symbols) > 1)
        check("posteriors", kind, kind in POSTERIORS)
        if kind == "topk":
            check_whole("top_k", encodings["top_k"])
    check("id", made["id"], len(bytes.fromhex(made["id"])) == 8)
    checksum = made["codebooks"]
    check("codebooks", checksum, isinstance(checksum, (str, type(None))))
    for name in ("errors", "statistics"):
        value = made.get(name, {})
        check(name, value, isinstance(value, dict))
    for name, value in flatten(made).items():
        if name.partition(".")[0] in ("seconds", "errors", "statistics"):
            for x in value if isinstance(value, list) else [value]:
                check(name, x, type(x) is float and math.isfinite(x))
    for path, found in made.get("statistics", {}).items():
        if {*map(len, found.values())} != {taps[path]}:
            raise InputError(f"statistics.{path} are of other dimensions")


def make_codec(what, codebooks=None):
    """``TargetCodec`` of a store; `codebooks` are the centroids by layer."""
    vocabulary, encodings = what["vocabulary"], what["encodings"]
    is_top = encodings.get("posteriors") == "topk"
    return TargetCodec(
        0 if vocabulary is None else len(vocabulary["symbols"]),
        what["teacher"]["taps"],
        what["frame_period"],
        encodings["top_k"] if is_top else None,
        codebooks,
    )


def codebook_shapes(what):
    """Shapes of the codebooks by layer; none without quantisation."""
    if what["encodings"].get("hidden") != "rq":
        return {}
    return {
        path: (what["encodings"]["code_bytes"], CENTROIDS, size)
        for path, size in what["teacher"]["taps"].items()
    }


def create_store(folder, what, made=None, codebooks=None):
    """Make an empty store in a folder that is new or empty.

    `what` is from ``extraction.describe``, `made` notes how the targets are
    made, and `codebooks` are the centroids by layer.
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
    """Add to the time that filling took; call it under ``store.filling``."""
    header = read_header(folder)
    made = header["made"]
    made["seconds"] = made.get("seconds", 0.0) + seconds
    write_json(Path(folder) / HEADER, header)


def read_codebooks(folder, header):
    """Centroids by layer, in float32; none without quantisation."""
    shapes = codebook_shapes(header["what"])
    if not shapes:
        return {}
    path = Path(folder) / CODEBOOKS
    wanted = sum(2 * math.prod(shape) for shape in shapes.values())
    found = path.stat().st_size if path.is_file() else 0
    content = path.read_bytes() if found == wanted else b""
    if hashlib.sha256(content).hexdigest() != header["made"]["codebooks"]:
        raise InputError(
            f"{path} is missing or damaged, and without it no hidden state can "
            "be read: delete the folder and fill it again"
        )
    values = torch.frombuffer(bytearray(content), dtype=torch.float16).float()
    parts = values.split([math.prod(shape) for shape in shapes.values()])
    return {
        path: part.view(shape).clone()
        for part, (path, shape) in zip(parts, shapes.items(), strict=True)
    }
