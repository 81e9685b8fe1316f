"""Targets into a store and out of it, against the teacher itself."""

import logging
import os
import signal
import subprocess
import sys

import pytest
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataloader import make_dataloader
from speechbrain.dataio.dataset import (
    DynamicItemDataset,
    FilteredSortedDynamicItemDataset,
)
from torch.utils.data import DataLoader

from tutornet_sb.distillation.alignment import align
from tutornet_sb.distillation.head import fit_head
from tutornet_sb.distillation.pairs import Pair, Projectors
from tutornet_sb.distillation.projector import Projector
from tutornet_sb.distillation.standardisation import Standardiser
from tutornet_sb.networks.acoustic_model import (
    AcousticModel,
    LogMelFeatures,
    frame_mask,
)
from tutornet_sb.networks.recurrent import RecurrentEncoder
from tutornet_sb.targets import extraction
from tutornet_sb.targets.extraction import (
    StoredTeacher,
    describe,
    fill_store,
    measure_hidden,
    weights_hash,
)
from tutornet_sb.targets.store import TargetStore, _read_index
from tutornet_sb.teachers.pseudo_labels import longest_first
from tutornet_sb.teachers.teacher import Teacher
from tutornet_sb.teachers.vocabulary import VocabularyMap
from tutornet_sb.util import signals

PIECES = ["<b>", "a", "b", "c", "d", "e"]
EXACT = {"posteriors": "fp16", "top_k": 4, "hidden": "fp16", "code_bytes": 4}
SMALL = {"posteriors": "topk", "top_k": 2, "hidden": "rq", "code_bytes": 4}
TAPS = ["encoder.conv", "encoder"]


def make_model(seed=0, size=12, stride=2):
    torch.manual_seed(seed)
    encoder = RecurrentEncoder(16, 8, size, 1, stride=stride)
    head = torch.nn.Linear(encoder.output_size, len(PIECES))
    head.weight.data *= 15
    features = LogMelFeatures(n_mels=16)
    # As after training, in dB
    features.normalize.running_var.fill_(100.0)
    return AcousticModel(features, encoder, head)


def make_data(count=12, first=0):
    generator = torch.Generator().manual_seed(1)
    items = {}
    for index in range(count):
        samples = 3200 + 1111 * ((5 * index) % count)
        wave = 0.1 * torch.randn(samples, generator=generator)
        # Loud and soft by turns, for frames that differ
        loudness = torch.randn(samples // 800 + 1, generator=generator).exp()
        wave *= loudness.repeat_interleave(800)[:samples]
        items[f"u{first + index}"] = {"sig": wave, "duration": samples / 16000}
    return DynamicItemDataset(items, output_keys=["id", "sig"])


@pytest.fixture
def teacher():
    return Teacher(make_model(), TAPS)


def fill(folder, teacher, data, encodings=EXACT, **options):
    what = describe(teacher, PIECES, encodings)
    options = {"batch_seconds": 3.0, "progressbar": False} | options
    return fill_store(folder, what, teacher, data, **options)


def standardised(teacher, store):
    """The teacher as a store has it."""
    standardise = Standardiser(store.made["statistics"], teacher.taps)
    return Teacher(teacher.model, teacher.taps, None, standardise)


def with_targets(data, stored):
    data_with_targets = DynamicItemDataset(data.data)
    data_with_targets.add_dynamic_item(
        lambda key, sig: stored.read(key, len(sig)),
        takes=["id", "sig"],
        provides="targets",
    )
    data_with_targets.set_output_keys(["id", "sig", "targets"])
    return data_with_targets


# ------------------------------------------------- as if the teacher were there


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_returns_the_targets_of_the_teacher(teacher, tmp_path, workers):
    data = make_data()
    stored = StoredTeacher(fill(tmp_path / "s", teacher, data), TAPS)
    teacher = standardised(teacher, stored.store)
    assert stored.taps.keys() == teacher.taps.keys()
    assert stored.hidden_sizes == teacher.hidden_sizes == [8, 24]
    assert stored.symbols == teacher.symbols == len(PIECES)
    assert stored.frame_period == teacher.frame_period
    loader = make_dataloader(
        with_targets(data, stored), batch_size=5, num_workers=workers
    )
    seen = 0
    for batch in loader:
        ours, theirs = stored.targets(batch), teacher.targets(batch)
        assert torch.equal(ours.lengths, theirs.lengths)
        assert len(set(ours.lengths.tolist())) > 1
        # On the frames of a student that is slower, and pads more
        frames = theirs.hidden.shape[1] // 2 + 4
        lengths = (theirs.lengths + 1) // 2
        pair = [align(t, lengths, 0.04, frames=frames) for t in (ours, theirs)]
        for a, b in ((ours, theirs), pair):
            for row, length in enumerate(b.lengths.tolist()):
                for name in ("hidden", "posteriors"):
                    torch.testing.assert_close(
                        getattr(a, name)[row, :length],
                        getattr(b, name)[row, :length],
                        rtol=2e-3,
                        atol=2e-4,
                    )
        seen += len(batch.id)
    assert seen == len(data)


def test_small_encodings_are_near(teacher, tmp_path):
    data = make_data(40)
    stored = StoredTeacher(fill(tmp_path / "s", teacher, data, SMALL), TAPS)
    teacher = standardised(teacher, stored.store)
    batch = PaddedBatch([with_targets(data, stored)[i] for i in range(8)])
    ours, theirs = stored.targets(batch), teacher.targets(batch)
    states = torch.cat(states_of(teacher, data))
    assert states.square().mean() == pytest.approx(1, abs=0.01)
    for row, length in enumerate(theirs.lengths.tolist()):
        a, b = (t.hidden[row, :length, 8:] for t in (ours, theirs))
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
        assert cosine.mean() > 0.8
        a, b = (t.posteriors[row, :length] for t in (ours, theirs))
        assert (a - b).abs().max() < 0.15
        assert (a - b).abs().mean() < 0.03


def test_fewer_layers_can_be_wanted_than_there_are(teacher, tmp_path):
    data = make_data()
    store = fill(tmp_path / "s", teacher, data)
    both = StoredTeacher(store, TAPS)
    batches = {
        name: PaddedBatch([with_targets(data, t)[i] for i in range(4)])
        for name, t in (
            ("both", both),
            ("last", StoredTeacher(store, ["encoder"])),
            ("none", StoredTeacher(store)),
        )
    }
    hidden = both.targets(batches["both"]).hidden
    last = StoredTeacher(store, ["encoder"]).targets(batches["last"])
    none = StoredTeacher(store).targets(batches["none"])
    assert torch.equal(last.hidden, hidden[..., 8:])
    assert none.hidden.shape[-1] == 0
    assert torch.equal(none.posteriors, last.posteriors)
    # The hidden states are not even read.
    assert batches["none"].targets.data.shape[-1] == 2 + 2 * 5


def test_a_teacher_of_other_symbols(tmp_path):
    mapping = VocabularyMap([1, 0, None, 2, 3, 3], 4)
    teacher = Teacher(make_model(), [], mapping)
    what = describe(teacher, ["<b>", "a", "c", "d"], EXACT)
    assert what["vocabulary"]["map"] == [1, 0, 0, 2, 3, 3]
    data = make_data()
    stored = StoredTeacher(
        fill_store(tmp_path / "s", what, teacher, data, progressbar=False)
    )
    batch = PaddedBatch([with_targets(data, stored)[i] for i in range(3)])
    ours, theirs = stored.targets(batch), teacher.targets(batch)
    length = int(theirs.lengths[0])
    torch.testing.assert_close(
        ours.posteriors[0, :length],
        theirs.posteriors[0, :length],
        rtol=2e-3,
        atol=2e-4,
    )


def test_the_head_of_a_student_is_fitted_from_a_store(teacher, tmp_path):
    data = make_data()
    stored = StoredTeacher(fill(tmp_path / "s", teacher, data))
    losses, heads = [], []
    for source in (teacher, stored):
        student = make_model(seed=5, size=7)
        batches = make_dataloader(with_targets(data, stored), batch_size=4)
        losses.append(fit_head(student, source, batches, steps=30))
        heads.append(student.head.weight.detach())
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    torch.testing.assert_close(*heads, rtol=0.05, atol=0.02)


def test_projectors_fit_a_stored_teacher(teacher, tmp_path):
    stored = StoredTeacher(fill(tmp_path / "s", teacher, make_data()), TAPS)
    pairs = [Pair(path, "encoder") for path in TAPS]
    student = make_model(seed=5, size=7)
    ours = Projectors(Projector, pairs, stored, student)
    theirs = Projectors(Projector, pairs, teacher, student)
    assert ours.parts == theirs.parts
    assert [p.map.out_features for p in ours] == [8, 24]


# ---------------------------------------------------------------------- filling


def count_encoded(teacher, monkeypatch):
    """Utterances the teacher encodes, once for each time."""
    encoded = []
    targets = Teacher.targets

    def count(self, batch):
        encoded.extend(batch.id)
        return targets(self, batch)

    monkeypatch.setattr(Teacher, "targets", count)
    return encoded


def test_only_what_is_missing_is_encoded(teacher, tmp_path, monkeypatch):
    encoded = count_encoded(teacher, monkeypatch)
    fill(tmp_path / "s", teacher, make_data(5))
    # Once for the statistics, once for the store
    assert sorted(encoded) == [f"u{i // 2}" for i in range(10)]
    encoded.clear()
    fill(tmp_path / "s", teacher, make_data(5))
    assert encoded == []
    store = fill(tmp_path / "s", teacher, make_data(4, first=3))
    assert sorted(encoded) == ["u5", "u6"] and len(store) == 7


def test_an_interrupted_filling_resumes(teacher, tmp_path, monkeypatch):
    encoded = count_encoded(teacher, monkeypatch)
    write, batches = extraction._write, []

    def stop(writer, codec, batch, *args):
        write(writer, codec, batch, *args)
        writer.finish()
        batches.append(batch.id)
        if len(batches) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(extraction, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "s", teacher, make_data())
    done = set(sum(batches, []))
    assert 0 < len(done) < 12 and len(TargetStore(tmp_path / "s")) == len(done)
    encoded.clear()
    monkeypatch.setattr(extraction, "_write", write)
    store = fill(tmp_path / "s", teacher, make_data())
    assert set(encoded) == {f"u{i}" for i in range(12)} - done
    assert len(store) == 12 and store.check() == []


def test_a_filling_that_has_to_stop_keeps_what_it_has(
    teacher, tmp_path, monkeypatch
):
    write, told = extraction._write, []

    def tell(*args):
        write(*args)
        told.append(signal.SIGTERM)

    monkeypatch.setattr(extraction, "_write", tell)
    monkeypatch.setitem(signals._state, "received", told)
    with pytest.raises(signals.Stopped):
        fill(tmp_path / "s", teacher, make_data())
    assert 0 < len(TargetStore(tmp_path / "s")) < 12


def test_what_is_done_stays_in_its_batch_while_others_are_missing():
    data = make_data()
    whole = [batch.id for batch in longest_first(data, 3.0)]
    half = {key for batch in whole[1:] for key in batch} | {whole[0][0]}
    assert len(whole) > 2 and len(whole[0]) > 1
    rest = [batch.id for batch in longest_first(data, 3.0, done=half)]
    assert rest == whole[:1]
    assert [*longest_first(data, 3.0, done=data.data_ids)] == []


def test_an_utterance_missing_from_a_full_batch_is_filled_as_before(
    teacher, tmp_path
):
    # Statistics are of what is there at first.
    teacher = Teacher(teacher.model, [])
    whole = fill(tmp_path / "whole", teacher, make_data())
    # All but one of each batch of the whole
    batches = [batch.id for batch in longest_first(make_data(), 3.0)]
    some = FilteredSortedDynamicItemDataset(
        make_data(), [key for batch in batches for key in batch[1:]]
    )
    fill(tmp_path / "s", teacher, some)
    store = fill(tmp_path / "s", teacher, make_data())
    for batch in batches:
        assert torch.equal(store.read(batch[0]), whole.read(batch[0]))
    records = [_read_index(path, store._store)[0] for path in store._shards]
    assert sum(map(len, records)) == len(store) == 12


def test_the_rest_of_a_store_with_more_layers(teacher, tmp_path):
    """A run that taps no layer adds what a run that does will want."""
    fill(tmp_path / "s", teacher, make_data(5))
    fill(tmp_path / "s", Teacher(teacher.model, []), make_data(9))
    data = make_data(9)
    stored = StoredTeacher(fill(tmp_path / "s", teacher, data), TAPS)
    batch = PaddedBatch([with_targets(data, stored)[8]])
    teacher = standardised(teacher, stored.store)
    torch.testing.assert_close(
        stored.targets(batch).hidden,
        teacher.targets(batch).hidden,
        rtol=2e-3,
        atol=2e-4,
    )


def test_filling_leaves_the_random_numbers_as_they_were(teacher, tmp_path):
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    fill(tmp_path / "s", teacher, make_data(), SMALL)
    assert torch.equal(torch.rand(3), wanted)


def states_of(teacher, data):
    """Hidden states of all frames, utterance by utterance, in float64."""
    states = []
    for index in range(len(data)):
        batch = PaddedBatch([data[index]])
        states.append(teacher.targets(batch).hidden[0].double())
    return states


@pytest.mark.parametrize("encodings", [EXACT, SMALL])
def test_a_store_is_standardised_by_the_statistics_in_its_header(
    teacher, tmp_path, encodings
):
    data = make_data()
    states = torch.cat(states_of(teacher, data))
    made = fill(tmp_path / "s", teacher, data, encodings).made
    assert list(made["statistics"]) == TAPS
    for name, wanted in (
        ("mean", states.mean(0)),
        ("deviation", states.std(0, correction=0)),
    ):
        values = sum((made["statistics"][path][name] for path in TAPS), [])
        torch.testing.assert_close(
            torch.tensor(values).double(), wanted, rtol=1e-4, atol=1e-5
        )
    # An online teacher is measured alike, and no random number is drawn.
    torch.manual_seed(7)
    wanted = torch.rand(1)
    torch.manual_seed(7)
    assert measure_hidden(teacher, data, 3.0) == made["statistics"]
    assert torch.equal(torch.rand(1), wanted)


@pytest.mark.parametrize("encodings", [EXACT, SMALL])
def test_the_error_of_the_codes_is_that_of_what_is_read(
    teacher, tmp_path, encodings
):
    # Many more frames than centroids
    data = make_data(40)
    stored = StoredTeacher(fill(tmp_path / "s", teacher, data, encodings), TAPS)
    data_with_targets = with_targets(data, stored)
    given = states_of(standardised(teacher, stored.store), data)
    wanted = {path: {"uniform": 0.0, "energy": 0.0} for path in TAPS}
    for index, states in enumerate(given):
        found = (
            stored.targets(PaddedBatch([data_with_targets[index]]))
            .hidden[0]
            .double()
        )
        for path, part in zip(TAPS, (slice(8), slice(8, None)), strict=True):
            errors = (found - states)[:, part].square().mean(1)
            weights = states[:, part].square().mean(1)
            weighted = (errors * weights).sum() / weights.sum()
            wanted[path]["uniform"] += errors.mean().item() / len(given)
            wanted[path]["energy"] += weighted.item() / len(given)
    for path in TAPS:
        found = stored.errors[path]
        assert found.keys() == {"uniform", "energy", "nonblank"}
        for name, value in wanted[path].items():
            assert found[name] == pytest.approx(value, rel=0.02, abs=1e-6)
        assert (found["uniform"] > 3e-4) == (encodings is SMALL)


def test_more_code_bytes_leave_less_error(teacher, tmp_path):
    errors = []
    for count in (1, 2, 4):
        encodings = SMALL | {"code_bytes": count}
        store = fill(tmp_path / str(count), teacher, make_data(40), encodings)
        errors.append(store.made["errors"]["encoder"]["nonblank"])
    assert errors[0] > 1.5 * errors[1] > 1.5**2 * errors[2] > 0


def test_the_time_of_filling_is_in_the_header(teacher, tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(extraction.time, "monotonic", lambda: clock[0])
    targets = Teacher.targets

    def slowly(self, batch):
        clock[0] += 10
        return targets(self, batch)

    monkeypatch.setattr(Teacher, "targets", slowly)
    store = fill(tmp_path / "s", teacher, make_data())
    sample = 10 * len(list(longest_first(make_data(), 3.0)))
    assert store.made["seconds"] == 2 * sample
    # Nothing is missing, then something is.
    assert fill(tmp_path / "s", teacher, make_data()).made == store.made
    more = fill(tmp_path / "s", teacher, make_data(4, first=20))
    added = 10 * len(list(longest_first(make_data(4), 3.0)))
    assert more.made["seconds"] == 2 * sample + added


def test_codebooks_are_made_once(teacher, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        first = fill(tmp_path / "s", teacher, make_data(6), SMALL)
        assert "Codebooks are trained on" in caplog.text
        caplog.clear()
        second = fill(tmp_path / "s", teacher, make_data(8), SMALL)
    assert "Codebooks" not in caplog.text
    books = [s.codec.states["encoder"].codebooks for s in (first, second)]
    assert torch.equal(*books)


def test_half_precision_of_the_teacher(teacher, tmp_path):
    data = make_data(4)
    fine = fill(tmp_path / "fine", teacher, data)
    half = fill(tmp_path / "half", teacher, data, precision="bf16")
    assert half.made["precision"] == "bf16"
    pair = []
    for store in (fine, half):
        stored = StoredTeacher(store, TAPS)
        batch = PaddedBatch([with_targets(data, stored)[0]])
        pair.append(stored.targets(batch).hidden)
    assert not torch.equal(*pair)
    torch.testing.assert_close(*pair, rtol=0.1, atol=0.05)


def test_a_teacher_that_breaks_is_named_with_its_utterance(teacher, tmp_path):
    data = make_data(6)
    data.data["u4"]["sig"][100] = torch.nan
    with pytest.raises(ValueError, match="utterance u4: .* not finite"):
        fill(tmp_path / "s", teacher, data)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_shown_in_a_terminal_alone(
    teacher, tmp_path, capsys, monkeypatch, is_terminal
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    fill(tmp_path / "s", teacher, make_data(), SMALL, progressbar=True)
    error = capsys.readouterr().err
    assert ("targets: 100%" in error) == is_terminal


# --------------------------------------------------------------- fingerprints


def test_any_weight_changes_the_hash():
    model = make_model()
    before = weights_hash(model)
    assert weights_hash(make_model()) == before
    assert weights_hash(make_model().train()) == before
    with torch.no_grad():
        model.head.bias[0] += 1e-6
    changed = weights_hash(model)
    assert changed != before
    model.encoder.norm.running_mean[0] += 1
    assert weights_hash(model) not in (before, changed)


def test_another_teacher_is_refused(teacher, tmp_path):
    fill(tmp_path / "s", teacher, make_data(3))
    other = Teacher(make_model(seed=1), TAPS)
    hashes = [weights_hash(t.model) for t in (teacher, other)]
    with pytest.raises(
        ValueError, match=f"weights is {hashes[0]}, and now it is {hashes[1]}"
    ):
        fill(tmp_path / "s", other, make_data(3))


def test_other_features_are_refused(teacher, tmp_path):
    fill(tmp_path / "s", teacher, make_data(3))
    model = make_model()
    model.features = LogMelFeatures(n_mels=16, win_length=25)
    model.features.normalize.running_var.fill_(100.0)
    with pytest.raises(
        ValueError, match="win_length is 320, and now it is 400"
    ):
        fill(tmp_path / "s", Teacher(model, TAPS), make_data(3))


def test_encoding_changes_no_fingerprint(teacher):
    before = describe(teacher, PIECES, EXACT)
    teacher(torch.randn(2, 9000), torch.tensor([1.0, 0.5]))
    assert describe(teacher, PIECES, EXACT) == before


def test_a_teacher_without_targets():
    model = make_model()
    model.head = torch.nn.Linear(24, 0)
    with pytest.raises(ValueError, match="no layer is tapped"):
        describe(Teacher(model, []), PIECES, EXACT)


# ------------------------------------------------------------ several processes

FILL = """
import sys
import speechbrain as sb, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
import test_extraction as t
from tutornet_sb.teachers.teacher import Teacher
run_opts = {{"distributed_backend": "gloo"}}
sb.utils.distributed.ddp_init_group(run_opts)
teacher = Teacher(t.make_model(), t.TAPS)
write = t.extraction._write
def slowly(*args):
    write(*args)
    if {kill}:
        args[0].finish()
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
t.extraction._write = slowly
store = t.fill({folder!r}, teacher, t.make_data(), t.SMALL)
sys.stdout.write(f"FILLED {{len(store)}} ")
"""


def run_fill(folder, ranks=1, kill=False):
    tests = os.path.dirname(__file__)
    script = folder.parent / "fill.py"
    script.write_text(FILL.format(tests=tests, folder=str(folder), kill=kill))
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone"]
        start += [f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [*start, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_two_ranks_share_the_work_and_a_killed_filling_resumes(tmp_path):
    folder = tmp_path / "s"
    killed = run_fill(folder, kill=True)
    assert killed.returncode == -9
    first = len(TargetStore(folder))
    assert 0 < first < 12
    done = run_fill(folder, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("FILLED 12") == 2
    store = TargetStore(folder)
    assert len(store) == 12 and store.check() == []
    # Nothing twice, and a shard of each rank
    shards = sorted((folder / "shards").iterdir())
    assert len(shards) == 3
    found = [len(store._shard_of[store._shard_of == i]) for i in range(3)]
    assert sum(found) == 12 and min(found) > 0
    data, teacher = make_data(), Teacher(make_model(), TAPS)
    stored = StoredTeacher(store, TAPS)
    loader = DataLoader(
        with_targets(data, stored), batch_size=4, collate_fn=PaddedBatch
    )
    for batch in loader:
        ours, theirs = stored.targets(batch), teacher.targets(batch)
        assert torch.equal(ours.lengths, theirs.lengths)
        mask = frame_mask(theirs.lengths, theirs.hidden.shape[1])
        error = ours.posteriors[mask] - theirs.posteriors[mask]
        assert error.abs().max() < 0.15
