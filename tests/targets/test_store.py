"""The files of a target store: what is read was written, or is an error."""

import errno
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import struct
import time
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from speechbrain.dataio.dataloader import make_dataloader
from speechbrain.dataio.dataset import DynamicItemDataset

from tutornet_sb.targets import store as store_module
from tutornet_sb.targets.encodings import train_codebooks
from tutornet_sb.targets.extraction import repair_store
from tutornet_sb.targets.header import (
    FORMAT,
    add_seconds,
    check_same,
    create_store,
    make_codec,
    read_header,
)
from tutornet_sb.targets.store import (
    FOOTER,
    RECORD,
    TargetStore,
    filling,
    writing,
)
from tutornet_sb.util.errors import InputError

POSTERIOR_BYTES, HIDDEN_BYTES = 10, 6


def describe(**changes):
    """What a store holds, as from extraction.describe."""
    what = {
        "format": FORMAT,
        "library": "tutornet_sb 0.1.0",
        "teacher": {
            "weights": "abc",
            "features": {"n_mels": 64},
            "taps": {"encoder": 6},
        },
        "frame_period": 0.02,
        "vocabulary": {
            "symbols": [f"s{i}" for i in range(29)],
            "map": None,
        },
        "encodings": {
            "posteriors": "topk",
            "top_k": 4,
            "hidden": "rq",
            "code_bytes": 4,
        },
    }
    for path, value in changes.items():
        *way, last = path.split("__")
        inner = what
        for key in way:
            inner = inner[key]
        inner[last] = value
    return what


MADE = {
    "teacher": "run",
    "statistics": {"encoder": {"mean": [0.5] * 6, "deviation": [1.5] * 6}},
    "errors": {"encoder": {"uniform": 0.125}},
    "seconds": 3.5,
}
CODEBOOKS = {"encoder": train_codebooks(torch.randn(300, 6), 4)}


def content(index):
    """Bytes of an utterance, and its samples."""
    generator = torch.Generator().manual_seed(index)
    frames = 1 + 7 * index % 50
    parts = [
        torch.randint(
            0, 256, (frames, size), generator=generator, dtype=torch.uint8
        )
        for size in (POSTERIOR_BYTES, HIDDEN_BYTES)
    ]
    return parts, 320 * frames + index


def key_of(index):
    return f"84-121123-{index:04d}"


def fill(folder, indices, limit_bytes=2000):
    with writing(folder, limit_bytes) as writer:
        for index in indices:
            parts, samples = content(index)
            writer.add(key_of(index), *parts, samples)
    return writer.written


def is_sound(store, indices):
    for index in indices:
        parts, samples = content(index)
        found = store.read(key_of(index), samples)
        assert torch.equal(found, torch.cat(parts, dim=1)), index
    return True


@pytest.fixture
def folder(tmp_path):
    """A store of forty utterances in several shards."""
    path = tmp_path / "a store"
    create_store(path, describe(), MADE, CODEBOOKS)
    assert fill(path, range(40)) == 40
    return path


def shards(folder):
    return sorted((folder / "shards").iterdir())


# -------------------------------------------------------------- what is there


def test_every_utterance_is_read_as_it_was_written(folder):
    assert len(shards(folder)) > 3
    store = TargetStore(folder)
    assert len(store) == 40 and store.check() == []
    order = list(range(40))
    random.Random(0).shuffle(order)
    assert is_sound(store, order)
    assert store.what == describe()
    assert store.made["teacher"] == "run"
    assert torch.equal(
        store.codec.states["encoder"].codebooks,
        CODEBOOKS["encoder"].half().float(),
    )


def test_codebooks_take_two_bytes_a_number_and_lose_nothing(tmp_path):
    # States of 40 dimensions that hang together, as those of a network do
    torch.manual_seed(2)
    mixing = torch.randn(6, 40)
    states = torch.tanh(torch.randn(3000, 6) @ mixing) + 3
    books = {"encoder": train_codebooks(states, 4)}
    what = describe(teacher__taps={"encoder": 40})
    create_store(tmp_path / "s", what, codebooks=books)
    path = tmp_path / "s" / "codebooks.bin"
    assert path.stat().st_size == 2 * books["encoder"].numel()
    errors = []
    for codec in (TargetStore(tmp_path / "s").codec, make_codec(what, books)):
        quantiser = codec.states["encoder"]
        found = quantiser.decode(quantiser.encode(states))
        errors.append((found - states).square().mean())
    stored, exact = errors
    assert exact > 0 and stored < 1.001 * exact


def test_posteriors_can_be_read_alone(folder):
    found = TargetStore(folder).read(key_of(3), hidden=False)
    assert torch.equal(found, content(3)[0][0])


def test_what_is_not_there(folder):
    store = TargetStore(folder)
    assert key_of(39) in store and key_of(40) not in store
    with pytest.raises(KeyError, match=f"{folder} has no 84-121123-0040"):
        store.read(key_of(40))


def test_an_empty_store(tmp_path):
    create_store(tmp_path / "s", describe(), codebooks=CODEBOOKS)
    store = TargetStore(tmp_path / "s")
    assert len(store) == 0 and "x" not in store and store.check() == []


def test_a_waveform_of_another_length_is_named(folder):
    store = TargetStore(folder)
    samples = content(7)[1]
    with pytest.raises(
        ValueError,
        match=f"84-121123-0007: the teacher received {samples} samples.* now "
        f"it has {samples + 1}",
    ):
        store.read(key_of(7), samples + 1)


def test_a_read_copy_may_be_written_to(folder):
    store = TargetStore(folder)
    store.read(key_of(0)).zero_()
    assert is_sound(store, [0])


def test_many_shards_take_few_descriptors(folder, monkeypatch):
    monkeypatch.setattr(store_module, "MAPPED", 2)
    store = TargetStore(folder)
    before = len(os.listdir("/proc/self/fd"))
    assert is_sound(store, list(range(40)) * 2)
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_keys_of_all_kinds(tmp_path):
    create_store(tmp_path / "s", describe(), codebooks=CODEBOOKS)
    keys = ["", "ü 1", "a/b", "x" * 65535, "84-1@90"]
    with writing(tmp_path / "s") as writer:
        for index, key in enumerate(keys):
            parts, samples = content(index)
            writer.add(key, *parts, samples)
    store = TargetStore(tmp_path / "s")
    assert store.check() == []
    for index, key in enumerate(keys):
        assert torch.equal(store.read(key), torch.cat(content(index)[0], 1))


UTTERANCES = st.dictionaries(
    st.one_of(st.text(max_size=12), st.from_regex("[0-9-]{1,9}")),
    st.tuples(
        st.integers(0, 30), st.integers(0, 2**32 - 1), st.binary(min_size=1)
    ),
    max_size=8,
)


def bytes_of(frames, pattern):
    """Bytes of an utterance, a pattern over and over."""
    sizes = frames * POSTERIOR_BYTES, frames * HIDDEN_BYTES
    raw = torch.frombuffer(
        bytearray(pattern * (sum(sizes) // len(pattern) + 1)), dtype=torch.uint8
    )
    posteriors, hidden, _ = raw.split([*sizes, len(raw) - sum(sizes)])
    return (
        posteriors.view(frames, POSTERIOR_BYTES),
        hidden.view(frames, HIDDEN_BYTES),
    )


@given(UTTERANCES, st.integers(1, 3000), st.randoms(use_true_random=False))
def test_any_utterances_are_read_as_they_were_written(
    tmp_path_factory, utterances, limit, random
):
    folder = tmp_path_factory.mktemp("any") / "s"
    create_store(folder, describe(), codebooks=CODEBOOKS)
    wanted = {}
    with writing(folder, limit) as writer:
        for key, (frames, samples, pattern) in utterances.items():
            parts = bytes_of(frames, pattern)
            writer.add(key, *parts, samples)
            wanted[key] = torch.cat(parts, 1)
    store = TargetStore(folder)
    assert store.check() == [] and len(store) == len(wanted)
    assert all(key in store for key in wanted)
    for key, raw in wanted.items():
        assert torch.equal(store.read(key, utterances[key][1]), raw)
        alone = store.read(key, hidden=False)
        assert torch.equal(alone, raw[:, :POSTERIOR_BYTES])
    if not wanted:
        return
    # A bit that flips, or an end that is lost: never other data.
    path = random.choice(shards(folder))
    changed = bytearray(path.read_bytes())
    at = random.randrange(len(changed))
    if random.random() < 0.8:
        changed[at] ^= 1 << random.randrange(8)
    else:
        del changed[at:]
    path.write_bytes(changed)
    store = TargetStore(folder, partial=True)
    (damage,) = store.check()
    assert damage.path == path
    for key, raw in wanted.items():
        try:
            assert torch.equal(store.read(key), raw)
        except (ValueError, KeyError) as error:
            assert str(folder) in str(error)
    assert repair_store(folder) == [damage]
    assert TargetStore(folder).check() == []


def test_keys_of_the_same_hash_are_told_apart(folder, monkeypatch):
    store = TargetStore(folder)
    real = store_module._hash
    monkeypatch.setattr(
        store_module,
        "_hash",
        lambda key: real(key_of(5) if key == "other" else key),
    )
    with pytest.raises(ValueError, match="targets of other are not what was"):
        store.read("other")


# ---------------------------------------------------- processes and their ends


def test_a_pickled_store_opens_anew(folder):
    copy = pickle.loads(pickle.dumps(TargetStore(folder)))
    assert is_sound(copy, range(40))


def read_all(folder):
    return is_sound(TargetStore(folder), range(40))


@pytest.mark.parametrize(
    "method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)]
)
def test_other_processes_read_it(folder, method):
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(read_all, [folder] * 4) == [True] * 4


def test_loader_workers_read_it(folder):
    store = TargetStore(folder)
    is_sound(store, [0])
    data = DynamicItemDataset({key_of(i): {"index": i} for i in range(40)})
    data.add_dynamic_item(store.read, takes="id", provides="targets")
    data.set_output_keys(["index", "targets"])
    seen = 0
    for batch in make_dataloader(data, batch_size=7, num_workers=2):
        raw, relative = batch.targets
        for row, length, index in zip(raw, relative, batch.index, strict=True):
            parts, _ = content(int(index))
            frames = round(length.item() * raw.shape[1])
            assert torch.equal(row[:frames], torch.cat(parts, dim=1))
            assert not row[frames:].any()
            seen += 1
    assert seen == 40


def write_slowly(folder, first):
    """Write for ever, shard by shard."""
    with writing(folder, 2000) as writer:
        for index in range(first, 10**6):
            parts, samples = content(index % 100)
            writer.add(key_of(index), *parts, samples)
            time.sleep(0.0005)


def test_a_killed_writer_leaves_whole_shards_and_nothing_else(folder):
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        before = set(shards(folder))
        writer = context.Process(
            target=write_slowly, args=(folder, 10_000 * (attempt + 1))
        )
        writer.start()
        # However slow the machine is: in the middle of a later shard
        while len(shards(folder)) <= len(before) + attempt:
            time.sleep(0.001)
        time.sleep(0.003 * attempt)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert set(shards(folder)) > before
    store = TargetStore(folder)
    assert store.check() == []
    assert is_sound(store, range(40))
    with filling(folder):
        names = [path.suffix for path in shards(folder)]
    assert set(names) == {".shard"}
    assert len(TargetStore(folder)) == len(store)


def test_several_writers_at_once(folder):
    context = multiprocessing.get_context("fork")
    parts = [range(40 + 20 * i, 60 + 20 * i) for i in range(3)]
    writers = [
        context.Process(target=fill, args=(folder, part)) for part in parts
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    store = TargetStore(folder)
    assert len(store) == 100 and is_sound(store, range(100))


def hold(folder, held, release):
    with filling(folder):
        held.set()
        release.wait(20)


def test_two_fillings_wait_for_each_other(folder, caplog):
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(folder, held, release))
    other.start()
    assert held.wait(20)
    with caplog.at_level("INFO"):
        timer = context.Process(target=time.sleep, args=(0.3,))
        timer.start()
        release_later = context.Process(
            target=lambda: (time.sleep(0.3), release.set())
        )
        release_later.start()
        started = time.monotonic()
        with filling(folder):
            assert time.monotonic() - started > 0.2
    assert "waiting for it" in caplog.text
    other.join()
    timer.join()
    release_later.join()


def test_old_shards_are_closed(folder, monkeypatch):
    monkeypatch.setattr(store_module, "SHARD_SECONDS", 0)
    with writing(folder) as writer:
        for index in (50, 51):
            parts, samples = content(index)
            writer.add(key_of(index), *parts, samples)
            assert is_sound(TargetStore(folder), [index])


def test_a_failing_block_leaves_no_half_shard(folder):
    with pytest.raises(ZeroDivisionError):
        with writing(folder) as writer:
            parts, samples = content(60)
            writer.add(key_of(60), *parts, samples)
            raise ZeroDivisionError
    assert {path.suffix for path in shards(folder)} == {".shard"}
    assert key_of(60) not in TargetStore(folder)


# -------------------------------------------------------------------- no space


class FullDisk:
    """A file on a disk that fills up."""

    def __init__(self, file, room):
        self.file = file
        self.room = room

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        if len(content) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(content)
        return self.file.write(content)


@pytest.mark.parametrize("room", [0, 300, 1990])
def test_a_full_disk_is_a_clear_error_and_the_store_goes_on(
    folder, monkeypatch, room
):
    plain = open

    def narrow(path, mode="r", *args, **kwargs):
        file = plain(path, mode, *args, **kwargs)
        return FullDisk(file, room) if mode == "wb" else file

    with (
        pytest.raises(OSError, match="is full. The 6 utterances") as error,
        writing(folder, 2000) as writer,
    ):
        for index in range(40, 46):
            parts, samples = content(index)
            writer.add(key_of(index), *parts, samples)
        writer.finish()
        before = set(shards(folder))
        monkeypatch.setattr(store_module, "open", narrow, raising=False)
        for index in range(46, 60):
            parts, samples = content(index)
            writer.add(key_of(index), *parts, samples)
    monkeypatch.undo()
    assert isinstance(error.value, InputError)
    assert str(folder) in str(error.value)
    assert set(shards(folder)) == before
    store = TargetStore(folder)
    assert store.check() == [] and is_sound(store, range(46))
    fill(folder, range(46, 60))
    assert is_sound(TargetStore(folder), range(60))


# ------------------------------------------------------------------ mismatches


@pytest.mark.parametrize(
    "change, there, now",
    [
        ({"teacher__weights": "xyz"}, "weights is abc", "xyz"),
        ({"teacher__features": {"n_mels": 80}}, "n_mels is 64", "80"),
        ({"teacher__features": {}}, "n_mels is 64", "nothing"),
        ({"teacher__taps": {"encoder": 8}}, "'encoder': 6", "'encoder': 8"),
        ({"teacher__taps": {"a": 6}}, "taps is {'encoder': 6}", "{'a': 6}"),
        ({"frame_period": 0.04}, "frame_period is 0.02", "0.04"),
        ({"vocabulary": None}, "symbols is .*'s0'", "nothing"),
        ({"vocabulary__map": [0, 2]}, "map is nothing", r"\[0, 2\]"),
        ({"vocabulary__symbols": ["a"]}, r"symbols\[0\] is s0", "a"),
        ({"vocabulary__symbols": ["s0"]}, r"symbols\[1\] is s1", "nothing"),
        ({"encodings__posteriors": "fp16"}, "posteriors is topk", "fp16"),
        ({"encodings__top_k": 5}, "top_k is 4", "5"),
        ({"encodings__code_bytes": 8}, "code_bytes is 4", "8"),
        ({"library": "tutornet_sb 9"}, "library is tutornet_sb 0.1.0", "9"),
        ({"format": 0}, f"format is {FORMAT}", "0"),
    ],
)
def test_a_mismatch_shows_both_sides(folder, change, there, now):
    with pytest.raises(ValueError) as error:
        check_same(folder, TargetStore(folder).what, describe(**change))
    message = str(error.value)
    assert str(folder) in message
    assert re.search(f"there .*{there}", message), message
    assert re.search(f"and now it is .*{now}", message), message


def test_a_run_that_wants_no_layer_takes_the_posteriors(folder):
    what = describe(teacher__taps={})
    what["encodings"] = {"posteriors": "topk", "top_k": 4}
    check_same(folder, TargetStore(folder).what, what)
    check_same(folder, TargetStore(folder).what, describe())


def test_a_folder_of_other_things_is_not_filled(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="holds thesis.tex and no target"):
        create_store(tmp_path, describe(), codebooks=CODEBOOKS)
    with pytest.raises(FileNotFoundError, match="holds no target store"):
        TargetStore(tmp_path)


def test_a_format_of_the_future(folder):
    header = json.loads((folder / "header.json").read_text())
    header["what"]["format"] = FORMAT + 1
    (folder / "header.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match=f"of format {FORMAT + 1}, and this "):
        TargetStore(folder)


# ---------------------------------------------------------------------- damage


def shard_of(folder, index):
    store = TargetStore(folder)
    shard, offset = store._find(key_of(index))
    return store._shards[shard], offset


def spoil(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x40
    path.write_bytes(content)


def repair(folder):
    """As `tutornet targets --repair` does, but for the teacher."""
    damaged = repair_store(folder)
    store = TargetStore(folder)
    missing = [i for i in range(40) if key_of(i) not in store]
    fill(folder, missing)
    assert is_sound(TargetStore(folder), range(40))
    assert TargetStore(folder).check() == []
    return damaged, missing


def held_by(folder, path):
    """Utterances of a shard."""
    return [i for i in range(40) if shard_of(folder, i)[0] == path]


@pytest.mark.parametrize("part, size", [(0, POSTERIOR_BYTES), (1, 1)])
def test_a_damaged_utterance_is_named_and_refilled(folder, part, size):
    path, begin = shard_of(folder, 11)
    frames, held = len(content(11)[0][0]), held_by(folder, path)
    at = begin + RECORD.size + len(key_of(11))
    spoil(path, at + part * frames * POSTERIOR_BYTES + size)
    store = TargetStore(folder)
    with pytest.raises(ValueError, match=f"{path} is damaged: .*0011 are not"):
        store.read(key_of(11))
    assert is_sound(store, [i for i in range(40) if i != 11])
    (damage,) = store.check()
    assert damage.path == path and damage.keys == [key_of(11)]
    assert f"damaged (1 of its {len(held)} utterances)" in str(damage)
    assert len(held) > 1
    assert repair(folder) == ([damage], held)


def test_a_damaged_end(folder):
    path, _ = shard_of(folder, 11)
    held = held_by(folder, path)
    spoil(path, path.stat().st_size - 3)
    with pytest.raises(ValueError, match=f"{path} is damaged .its end is"):
        TargetStore(folder)
    store = TargetStore(folder, partial=True)
    assert is_sound(store, [i for i in range(40) if i not in held])
    assert repair(folder) == (store.check(), held)


@pytest.mark.parametrize("size", [0, 1, 40, 1000])
def test_a_shard_cut_short(folder, size):
    path, _ = shard_of(folder, 11)
    held = held_by(folder, path)
    with open(path, "r+b") as file:
        file.truncate(size)
    with pytest.raises(ValueError, match="is damaged"):
        TargetStore(folder)
    _, missing = repair(folder)
    assert missing == held


def test_a_damaged_index(folder):
    path, _ = shard_of(folder, 11)
    held = held_by(folder, path)
    spoil(path, path.stat().st_size - FOOTER.size - 5)
    with pytest.raises(ValueError, match="its index is damaged"):
        TargetStore(folder)
    damaged, missing = repair(folder)
    assert missing == held and len(damaged) == 1


def test_a_shard_of_another_store_is_not_read(folder, tmp_path):
    other = tmp_path / "other"
    create_store(other, describe(teacher__weights="z"), codebooks=CODEBOOKS)
    fill(other, range(100, 110))
    stranger = shards(other)[0]
    shutil.copy(stranger, folder / "shards" / "stranger.shard")
    with pytest.raises(ValueError, match="stranger.*belongs to another store"):
        TargetStore(folder)
    _, missing = repair(folder)
    assert missing == []
    assert key_of(100) not in TargetStore(folder)


def test_codebooks_are_under_a_checksum(folder):
    spoil(folder / "codebooks.bin", 100)
    with pytest.raises(ValueError, match="codebooks.bin is missing or damaged"):
        TargetStore(folder)
    (folder / "codebooks.bin").unlink()
    with pytest.raises(ValueError, match="codebooks.bin is missing or damaged"):
        TargetStore(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"what": {}, "made": {}}',
        "[" * 100_000,
        "\x00" * 100,
        '{"what": 1e400}',
    ],
)
def test_a_damaged_header(folder, text):
    (folder / "header.json").write_text(text)
    with pytest.raises(ValueError, match="header.json is damaged"):
        TargetStore(folder)


def test_a_header_that_lacks_a_number(folder):
    path = folder / "header.json"
    good = path.read_text()
    path.write_text(good.replace('"code_bytes": 4', '"code_byte": 4'))
    with pytest.raises(ValueError, match="damaged .*'code_bytes'"):
        TargetStore(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seconds": "x"}, "seconds is 'x'"),
        ({"seconds": math.inf}, "seconds is inf"),
        ({"errors": {"encoder": {"uniform": None}, "a": {"b": 1}}}, "a.b is 1"),
        ({"statistics": {"conv": {"mean": [0.0] * 6}}}, "conv"),
        ({"statistics": {"encoder": {"mean": [0.0] * 5}}}, "dimensions"),
        ({"statistics": {"encoder": {"mean": ["a"] * 6}}}, "mean is 'a'"),
    ],
)
def test_a_header_with_statistics_that_are_none(folder, change, message):
    header = json.loads((folder / "header.json").read_text())
    header["made"] |= change
    (folder / "header.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match=f"damaged .*{message}"):
        TargetStore(folder)


def test_the_time_of_all_fillings_is_kept(folder):
    add_seconds(folder, 1.25)
    add_seconds(folder, 2.0)
    made = TargetStore(folder).made
    assert made.pop("seconds") == 6.75
    assert {key: made[key] for key in MADE if key in made} == {
        key: value for key, value in MADE.items() if key != "seconds"
    }


def test_a_header_without_end(folder):
    with open(folder / "header.json", "r+b") as file:
        file.truncate(2**34)
    with pytest.raises(ValueError, match="longer than any header"):
        read_header(folder)


HOSTILE = [None, -1, 0, 2**62, 1e308, True, "x", [], {}, [1], {"a": 1}]


def test_hostile_headers_are_errors_and_nothing_worse(folder):
    """Every value of the header in turn becomes what it must not be."""
    good = (folder / "header.json").read_text()
    seen = 0

    def paths(node, way=()):
        for key, value in node.items():
            yield (*way, key)
            if isinstance(value, dict):
                yield from paths(value, (*way, key))

    for way in list(paths(json.loads(good))):
        for value in HOSTILE:
            header = json.loads(good)
            inner = header
            for key in way[:-1]:
                inner = inner[key]
            inner[way[-1]] = value
            (folder / "header.json").write_text(json.dumps(header))
            try:
                store = TargetStore(folder, partial=True)
                store.check()
                for index in (0, 39):
                    if key_of(index) in store:
                        raw = store.read(key_of(index)).unsqueeze(0)
                        store.codec.decode(raw, torch.tensor([len(raw[0])]))
            except (ValueError, KeyError):
                seen += 1
    assert seen > 100


def forge(path, store_id, count, begin, records):
    """A footer with checksums that are right and numbers that are not."""
    index = records[begin % 2**63 :] if begin < len(records) else b""
    footer = FOOTER.pack(
        b"TUTORNET", FORMAT, store_id, count, begin, zlib.crc32(index), 0
    )[:-4]
    path.write_bytes(records + footer + struct.pack("<I", zlib.crc32(footer)))


def test_forged_shards_cannot_ask_for_memory(folder):
    store_id = bytes.fromhex(read_header(folder)["made"]["id"])
    path = folder / "shards" / "forged.shard"
    numbers = [0, 1, 15, 16, 2**31, 2**40, 2**60, 2**63, 2**64 - 1]
    # A record that claims four billion frames
    records = RECORD.pack(3, 2**32 - 1, 1, 0, 0) + b"abc" + bytes(64)
    refused = 0
    for count in numbers:
        for begin in numbers:
            forge(path, store_id, count, begin, records)
            try:
                TargetStore(folder).check()
            except ValueError as error:
                assert "forged.shard is damaged" in str(error)
                refused += 1
    assert refused > 60
    # An index that points to where no record is
    for offset in (0, 1, 30, 2**33, 2**64 - 1):
        key = struct.pack("<QQ", store_module._hash("abc"), offset)
        forge(path, store_id, 1, len(records), records + key)
        store = TargetStore(folder)
        assert len(store.check()) == 1
        with pytest.raises(ValueError, match="forged.shard is damaged"):
            store.read("abc")


def test_paths_may_be_given_as_text(folder):
    assert len(TargetStore(str(folder))) == 40
    assert isinstance(TargetStore(str(folder)).folder, Path)
