"""Communication of several processes, and that they train as one."""

import multiprocessing
import os
import re
import time
from datetime import timedelta
from functools import partial
from io import StringIO

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML
from small_runs import MODELS, make_speech, stage_hparams
from speechbrain.dataio.dataloader import make_dataloader
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.epoch_loop import EpochCounter

from tutornet_sb.corpora.tokenizer import train_tokenizer
from tutornet_sb.distillation.pairs import Pair, Projectors, teacher_taps
from tutornet_sb.distillation.projector import Projector
from tutornet_sb.networks.batch_norm import (
    CpuSyncBatchNorm,
    synchronise_batch_norms,
)
from tutornet_sb.teachers.teacher import Teacher
from tutornet_sb.training.checkpoints import AtomicCheckpointer
from tutornet_sb.training.ctc import CTCBrain
from tutornet_sb.training.rkd import RKDBrain
from tutornet_sb.training.skd import SKDBrain
from tutornet_sb.util import processes
from tutornet_sb.util.composition import include

BRAINS = {"ctc": CTCBrain, "skd": SKDBrain, "rkd": RKDBrain}
PAIRS = [Pair("encoder", "encoder")]


def enter(rank, folder, limit, work, args):
    """One of two processes: joins the other and keeps what it has found."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=limit),
    )
    torch.save(work(*args), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def in_two_processes(folder, work, *args, limit=60):
    """Call a function in two processes. Returns what each has returned."""
    folder.mkdir(exist_ok=True)
    # A fork has all imports already.
    context = multiprocessing.get_context("fork")
    both = [
        context.Process(target=enter, args=(rank, folder, limit, work, args))
        for rank in (0, 1)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    for process in both:
        process.kill()
    assert [process.exitcode for process in both] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


# -------------------------------------------------------------- communication


def communicate():
    """Every way of communication."""
    calls = []

    def call(value):
        calls.append(value)
        # What is called may call in turn.
        return processes.run_on_main(lambda: 2 * value)

    def fail():
        raise OSError("disk full")

    found = {
        "count": processes.count(),
        "rank": processes.rank(),
        "result": processes.run_on_main(call, [4]),
        "calls": list(calls),
        "first": processes.main_first(call, [5]),
        "gathered": processes.gather({"rank": processes.rank()}),
        "share": processes.own_share("abcde"),
    }
    for name, called in (("error", fail), ("nested", lambda: call("a") + 1)):
        try:
            processes.run_on_main(called)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def test_every_way_of_communication(tmp_path):
    main, other = in_two_processes(tmp_path, communicate)
    assert (main["count"], other["count"]) == (2, 2)
    assert (main["rank"], other["rank"]) == (0, 1)
    assert main["result"] == other["result"] == 8
    assert (main["calls"], other["calls"]) == ([4], [])
    assert main["first"] == other["first"] == 10
    assert main["gathered"] == other["gathered"] == [{"rank": 0}, {"rank": 1}]
    assert (main["share"], other["share"]) == (["a", "c", "e"], ["b", "d"])
    assert main["error"] == "OSError: disk full"
    assert other["error"] == (
        "OtherProcessError: the main process has failed: OSError: disk full"
    )
    assert main["nested"].startswith("TypeError")
    assert "TypeError" in other["nested"]


def work_long_alone():
    def work():
        time.sleep(1.5)
        return "done"

    started = time.monotonic()
    answers = [processes.run_on_main(work)]
    if processes.rank() == 1:
        time.sleep(1.5)
    processes.wait_for_all()
    return answers, time.monotonic() - started


def test_waiting_has_no_time_limit(tmp_path):
    """The collectives of the default group give up after a second here."""
    for answers, seconds in in_two_processes(
        tmp_path, work_long_alone, limit=1
    ):
        assert answers == ["done"] and seconds > 2.5


def look_for(folder):
    # Each machine has its own.
    folder = folder / str(processes.rank())
    folder.mkdir()
    messages = []
    for text in ("the same", f"of {processes.rank()}", None):
        if text or processes.rank() == 0:
            (folder / "file").write_text(str(text))
        else:
            (folder / "file").unlink()
        try:
            processes.check_shared(folder / "file")
            messages.append(None)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_machines_without_shared_folders_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "SECONDS_FOR_SHARED_FILES", 0.1)
    for messages in in_two_processes(tmp_path, look_for, tmp_path):
        assert messages[0] is None
        for message in messages[1:]:
            assert re.search("process 1 on .* does not see .*share", message)


def test_alone_there_is_nobody_to_ask():
    assert processes.count() == 1 and processes.rank() == 0
    with pytest.raises(OSError, match="no such thing"):
        processes.run_on_main(_raise, [OSError("no such thing")])
    processes.wait_for_all()
    assert processes.gather(3) == [3]


def _raise(error):
    raise error


LOST = RuntimeError("[gloo/transport/tcp/pair.cc:538] Read error")
NCCL = torch.distributed.DistBackendError("NCCL communicator was aborted")
OTHER = processes.OtherProcessError("the main process has failed")
FULL = OSError("disk full")


@pytest.mark.parametrize(
    "rank, error, wanted, waits",
    [
        ("0", FULL, OSError, False),
        ("0", LOST, processes.OtherProcessError, True),
        ("0", NCCL, processes.OtherProcessError, True),
        ("1", OTHER, processes.OtherProcessError, True),
        # The main process finds it too.
        ("1", processes.SettingError("lr is fast"), ValueError, True),
        ("1", FULL, OSError, False),
        ("1", SystemExit(75), SystemExit, False),
    ],
)
def test_the_process_that_failed_first_reports_it(
    monkeypatch, rank, error, wanted, waits
):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(processes, "SECONDS_FOR_MAIN", 0.1)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(wanted), processes.ending_together():
        raise error
    # For torchrun to end this one
    assert (processes.SECONDS_FOR_TORCHRUN in slept) == waits


def fail(failing):
    """Some of the processes fail. How long each waited, and for what."""
    slept, sleep = [], time.sleep
    time.sleep = lambda seconds: slept.append(seconds) or sleep(0.01)
    started = time.monotonic()
    try:
        with processes.ending_together():
            if processes.rank() in failing:
                raise OSError("disk full")
            # As if in a collective
            sleep(2)
            return None
    except OSError:
        waits = processes.SECONDS_FOR_TORCHRUN in slept
        return waits, time.monotonic() - started


def test_beside_the_main_process_an_error_waits_for_its_word(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(processes, "SECONDS_FOR_MAIN", 1.0)
    # No barrier: the other has failed.
    monkeypatch.setattr(processes, "wait_for_all", lambda: None)
    monkeypatch.setattr(
        torch.distributed, "destroy_process_group", lambda: None
    )
    (main, _), (waits, seconds) = in_two_processes(tmp_path, fail, {0, 1})
    assert not main and waits and seconds < 1
    main, (waits, seconds) = in_two_processes(tmp_path / "alone", fail, {1})
    assert main is None and not waits and 1 <= seconds < 2


# -------------------------------------------------------- batch normalisation

# (batch, dim, ...): frames that are valid, frames, spectrograms
SHAPES = [(7, 4), (5, 4, 6), (3, 4, 6, 2)]


def make_inputs(shape):
    """Batches of two sizes for two processes, far from zero."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(*shape, generator=generator, dtype=torch.float64)
    whole = 30 + 3 * whole
    return whole[:2], whole[2:]


def normalise(norm, parts):
    """Outputs, gradients and statistics after two batches."""
    found = {}
    for step in range(2):
        outputs = []
        for part in parts:
            x = (part * (1 + step)).requires_grad_()
            y = norm(x)
            y.sin().sum().backward()
            outputs.append((y.detach(), x.grad))
        found[step] = outputs
    found["statistics"] = {k: v.clone() for k, v in norm.named_buffers()}
    found["gradients"] = [p.grad for p in norm.parameters()]
    # And as it normalises afterwards
    found["later"] = norm.eval()(parts[0]).detach()
    return found


def make_norm(shape, affine, momentum):
    kind = [torch.nn.BatchNorm1d, torch.nn.BatchNorm2d][len(shape) == 4]
    norm = kind(shape[1], affine=affine, momentum=momentum)
    if affine:
        torch.nn.init.normal_(norm.weight, generator=torch.manual_seed(3))
    return norm.double()


def normalise_share(cases):
    found = []
    for shape, affine, momentum in cases:
        norm = CpuSyncBatchNorm(make_norm(shape, affine, momentum))
        part = make_inputs(shape)[processes.rank()]
        found.append(normalise(norm, [part]))
    return found


def test_batch_norm_sees_the_batches_of_all_processes(tmp_path):
    cases = [
        (shape, affine, momentum)
        for shape in SHAPES
        for affine, momentum in ((True, 0.1), (False, None))
    ]
    both = in_two_processes(tmp_path, normalise_share, cases)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    for case, main, other in zip(cases, *both, strict=True):
        norm, parts = make_norm(*case), make_inputs(case[0])
        wanted = normalise(norm, [torch.cat(parts)])
        for step in range(2):
            shares = [found[step][0] for found in (main, other)]
            for ours, whole in zip(
                zip(*shares, strict=True), wanted[step][0], strict=True
            ):
                close(torch.cat(ours), whole)
        for ours, theirs in zip(
            main["gradients"], other["gradients"], strict=True
        ):
            # DDP adds those up.
            close(ours + theirs, wanted["gradients"].pop(0))
        for found in main, other:
            assert found["statistics"].keys() == wanted["statistics"].keys()
            for name, value in wanted["statistics"].items():
                close(found["statistics"][name], value)
        close(main["later"], norm.eval()(parts[0]))


def test_the_layers_keep_their_parameters_and_names():
    network = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.BatchNorm1d(3)),
        torch.nn.Linear(3, 3),
        torch.nn.BatchNorm1d(3, affine=False, momentum=None),
    )
    before = dict(network.state_dict(keep_vars=True))
    found = synchronise_batch_norms(network)
    assert found is network
    after = dict(network.state_dict(keep_vars=True))
    assert before.keys() == after.keys()
    assert all(after[name] is value for name, value in before.items())
    kinds = [type(layer) for layer in (network[0][0], network[2])]
    assert kinds == [CpuSyncBatchNorm] * 2
    assert isinstance(
        synchronise_batch_norms(torch.nn.BatchNorm1d(2)), CpuSyncBatchNorm
    )


# ----------------------------------------------- two train as one, step by step

TEXTS = ["ONE TWO", "SIX", "TEN", "A", "ZERO", "NINE", "TWO", "AND"]
# Of two and of four utterances, each with one of the greatest length: padding
# counts in batch normalisation.
BATCHES = [[0, 1], [2, 3, 5, 7], [4, 1], [6, 5, 3, 7]]
VALID = [[0, 1], [2, 3, 4], [5, 6]]
STUDENTS = {
    "transformer": {"channels": [2, 2]}
    | {"d_model": 8, "nhead": 2, "num_encoder_layers": 1, "d_ffn": 8},
    # With batch normalisation, and statistics of the features
    "lstm": {"channels": 6, "hidden_size": 4},
}


def make_network(name, seed):
    content = include(
        MODELS / f"{name}.yaml",
        ".",
        "small",
        STUDENTS[name] | {"n_mels": 20, "dropout": 0.0},
    )
    text = StringIO()
    YAML().dump(content, text)
    torch.manual_seed(seed)
    model = load_hyperpyyaml(text.getvalue())["model"]
    with torch.no_grad():
        model.head.weight.mul_(4)
    return model


def make_data(tokenizer):
    items = {}
    for index, text in enumerate(TEXTS):
        seconds = 0.6 if index % 2 else 0.9
        items[f"u{index}"] = {
            "sig": make_speech(index, seconds),
            "wrd": text,
            "tokens": torch.tensor(tokenizer.encode(text)),
        }
    return DynamicItemDataset(items, output_keys=["id", "sig", "wrd", "tokens"])


def fit(
    name,
    student_name,
    folder,
    tokenizer,
    batches,
    epochs=2,
    accumulate=1,
    settled=False,
):
    """Train a stage by given batches; returns all there is to compare.

    The statistics of settled features move no more.
    """
    folder = folder / "stage"
    student, teacher = make_network(student_name, 0), make_network("lstm", 7)
    if settled:
        norm = student.features.normalize
        norm.running_var.fill_(100.0)
        norm.num_batches_tracked.fill_(10**9)
    modules = {"student": student}
    if name != "ctc":
        taps = teacher_taps(PAIRS) if name == "rkd" else ()
        modules["teacher"] = Teacher(teacher, taps)
    if name == "rkd":
        torch.manual_seed(1)
        modules["projector"] = Projectors(
            Projector, PAIRS, modules["teacher"], student
        )
    counter = EpochCounter(epochs)
    checkpointer = AtomicCheckpointer(
        folder / "save",
        {key: m for key, m in modules.items() if key != "teacher"}
        | {"counter": counter},
    )
    found = {"steps": [], "figures": []}

    class Recording(BRAINS[name]):
        def fit_batch(self, batch):
            found["steps"].append(list(batch.id))
            return super().fit_batch(batch)

        def figures(self):
            figures = super().figures()
            found["figures"].append(figures)
            return figures

    brain = Recording(
        modules,
        hparams=stage_hparams(folder, counter, tokenizer, max_lr=0.02)
        | {
            "skd": {"ctc_weight": 1.0, "weight": 1.0, "weight_final": 0.5},
            "max_grad_norm": 5.0,
            "avg_checkpoints": 2,
            "find_unused_parameters": name == "rkd",
        },
        # Adam would blow differences of rounding up.
        opt_class=partial(torch.optim.SGD, lr=0.02),
        run_opts={
            "distributed_backend": "gloo",
            "device": "cpu",
            "grad_accumulation_factor": accumulate,
        },
        checkpointer=checkpointer,
    )
    data = make_data(tokenizer)
    valid = make_dataloader(data, batch_sampler=processes.own_share(VALID))
    brain.fit(counter, data, valid, {"batch_sampler": batches})
    found["best"] = brain.load_best(valid)
    brain.evaluate(valid)
    found["weights"] = dict(brain.student.state_dict())
    found["hypotheses"] = getattr(brain, "hypotheses", None)
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    manifest = tmp_path_factory.mktemp("tokenizer") / "train.csv"
    manifest.write_text("\n".join(["wrd", *TEXTS]) + "\n")
    return train_tokenizer([manifest], manifest.with_name("char.model"))


@pytest.mark.parametrize(
    "name, student",
    [
        ("ctc", "transformer"),
        ("skd", "lstm"),
        ("rkd", "lstm"),
        pytest.param("ctc", "lstm", marks=pytest.mark.slow),
        pytest.param("skd", "transformer", marks=pytest.mark.slow),
        pytest.param("rkd", "transformer", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one_by_their_joint_batches(
    tmp_path, tokenizer, name, student
):
    # What that imports is there for both.
    make_network(student, 0)
    folder = tmp_path / "two"
    main, other = in_two_processes(
        folder, fit, name, student, folder, tokenizer, BATCHES
    )
    assert main["figures"] == other["figures"]
    assert main["best"] == other["best"]
    for key, value in main["weights"].items():
        assert torch.equal(value, other["weights"][key]), key
    assert main["hypotheses"] == other["hypotheses"]
    # Each batch in one process, each epoch in another order
    halves = zip(main["steps"], other["steps"], strict=True)
    joint = [[int(key[1]) for key in a + b] for a, b in halves]
    assert sorted(sum(joint[:2], [])) == sorted(sum(BATCHES, []))
    assert joint[:2] != joint[2:]
    alone = fit(name, student, tmp_path / "one", tokenizer, Epochs(joint, 2))
    assert_alike(main, alone)
    assert main["hypotheses"] == alone["hypotheses"]


# Of three and of one utterances, and of a number that three leave one of
UNEVEN = [[0, 1, 2], [5], [3, 4], [6, 7]]


@pytest.mark.parametrize("name", ["ctc", "skd", "rkd"])
def test_accumulated_gradients_are_those_of_the_joint_batch(
    tmp_path, tokenizer, name
):
    make = partial(fit, name, "transformer", tokenizer=tokenizer, settled=True)
    joint = [[0, 1, 2, 5, 3, 4], [6, 7]]
    ours = make(tmp_path / "ours", batches=UNEVEN, accumulate=3)
    theirs = make(tmp_path / "theirs", batches=joint)
    assert_alike(ours, theirs)
    # All at once, though that is more than an epoch has
    ours = make(tmp_path / "all", batches=UNEVEN, accumulate=100)
    assert_alike(ours, make(tmp_path / "one", batches=[[*range(8)]]))


@pytest.mark.parametrize("name", ["ctc", "rkd"])
def test_accumulated_gradients_of_two_processes_are_those_of_the_joint_batch(
    tmp_path, tokenizer, name
):
    make_network("transformer", 0)
    folder, batches = tmp_path / "two", [*UNEVEN, [1, 5, 6], [2]]
    both = in_two_processes(
        *(folder, fit, name, "transformer", folder, tokenizer, batches),
        *(2, 2, True),
    )
    for key, value in both[0]["weights"].items():
        assert torch.equal(value, both[1]["weights"][key]), key
    # Of each process two batches, then the third, in each epoch
    parts = [slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 6)]
    batches = [
        [int(key[1]) for one in both for key in sum(one["steps"][part], [])]
        for part in parts
    ]
    assert {len(batch) for batch in batches} != {len(batches[0])}
    alone = tmp_path / "one"
    alone = fit(
        *(name, "transformer", alone, tokenizer, Epochs(batches, 2)),
        settled=True,
    )
    assert_alike(both[0], alone)


def assert_alike(ours, theirs):
    """Two trainings have ended alike, with the same figures."""
    for mine, other in zip(ours["figures"], theirs["figures"], strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    assert ours["best"]["averaged"] == theirs["best"]["averaged"]
    for key, value in theirs["weights"].items():
        torch.testing.assert_close(
            ours["weights"][key], value, rtol=1e-3, atol=1e-5, msg=key
        )


class Epochs:
    """Other batches in each epoch."""

    def __init__(self, batches, size):
        self.batches, self.size, self.epoch = batches, size, 1

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.size

    def __iter__(self):
        return iter(self.batches[(self.epoch - 1) * self.size :][: self.size])


def fit_twice(folder, tokenizer, batches):
    """Go on after an epoch, or say why not."""
    try:
        fit("ctc", "lstm", folder, tokenizer, batches, epochs=2)
    except ValueError as error:
        return str(error)


def test_a_stage_goes_on_with_as_many_processes_as_it_was_begun_with(
    tmp_path, tokenizer
):
    fit("ctc", "lstm", tmp_path, tokenizer, BATCHES, epochs=1)
    for message in in_two_processes(
        tmp_path, fit_twice, tmp_path, tokenizer, BATCHES
    ):
        assert "begun with processes: 1, and now it is 2" in message
        assert str(tmp_path / "stage" / "save") in message


def test_batches_too_few_for_the_processes_are_an_error(tmp_path, tokenizer):
    for message in in_two_processes(
        tmp_path, fit_twice, tmp_path, tokenizer, BATCHES[:2]
    ):
        assert message.startswith("2 processes are too many for the 8 utt")
