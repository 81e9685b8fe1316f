"""The stages of training: losses, schedules, checkpoints, continuation."""

import csv
import itertools
import math
from functools import partial

import pytest
import speechbrain as sb
import torch
from small_runs import stage_hparams
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataloader import make_dataloader
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.decoders.ctc import CTCBeamSearcher
from speechbrain.utils.epoch_loop import EpochCounter
from torch.nn.parallel import DistributedDataParallel

from tutornet_sb.corpora.tokenizer import pieces, train_tokenizer
from tutornet_sb.distillation.intermediate import IntermediateHeads
from tutornet_sb.distillation.losses import RepresentationLoss
from tutornet_sb.distillation.pairs import Pair, Projectors, teacher_taps
from tutornet_sb.distillation.projector import Projector
from tutornet_sb.inference.scores import score
from tutornet_sb.networks.acoustic_model import (
    AcousticModel,
    Encoding,
    LogMelFeatures,
)
from tutornet_sb.networks.recurrent import RecurrentEncoder
from tutornet_sb.teachers.teacher import Teacher
from tutornet_sb.training import brain as stage_module
from tutornet_sb.training.checkpoints import AtomicCheckpointer, Stopwatch
from tutornet_sb.training.ctc import CTCBrain
from tutornet_sb.training.rkd import RKDBrain
from tutornet_sb.training.skd import SKDBrain

BRAINS = {"ctc": CTCBrain, "skd": SKDBrain, "rkd": RKDBrain}
TEXTS = ["ONE TWO", "SIX", "TEN ELEVEN", "A", "ZERO", "NINE", "IT'S", "TWO"]
N_MELS = 16
PAIRS = [Pair("encoder", "encoder")]
# The second teacher layer is (batch, dim, frames), as is the first student's.
SEVERAL = [
    Pair("encoder", "encoder.conv", 0.5),
    Pair("encoder.conv", "encoder", 2.0),
    Pair("encoder", "encoder", 0.25),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    with open(folder / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([["wrd"], *([text] for text in TEXTS)])
    return train_tokenizer([folder / "train.csv"], folder / "char.model")


@pytest.fixture(scope="module")
def data(tokenizer):
    """Noise of 0.4 to 0.8 seconds that claims to be speech."""
    generator = torch.Generator().manual_seed(1)
    items = {}
    for index, text in enumerate(TEXTS):
        samples = 6400 + 900 * index
        items[f"u{index}"] = {
            "sig": 0.1 * torch.randn(samples, generator=generator),
            "duration": samples / 16000,
            "wrd": text,
            "tokens": torch.tensor(tokenizer.encode(text)),
        }
    return DynamicItemDataset(items, output_keys=["id", "sig", "wrd", "tokens"])


def make_model(seed, hidden_size, channels=6):
    torch.manual_seed(seed)
    encoder = RecurrentEncoder(
        N_MELS, channels=channels, hidden_size=hidden_size, layers=1
    )
    head = torch.nn.Linear(encoder.output_size, 29)
    return AcousticModel(LogMelFeatures(N_MELS), encoder, head)


def make_teacher(taps=("encoder",)):
    model = make_model(seed=50, hidden_size=5)
    # Statistics as after training, and posteriors that are not all alike.
    with torch.no_grad():
        model.encoder.norm.running_mean.normal_()
        model.encoder.norm.running_var.uniform_(0.5, 2.0)
        model.head.weight.mul_(8)
    return Teacher(model, taps)


def sampler(data, shuffle=True, seconds=1.5):
    return DynamicBatchSampler(
        data,
        max_batch_length=seconds,
        num_buckets=2,
        length_func=lambda item: item["duration"],
        shuffle=shuffle,
        batch_ordering="random" if shuffle else "descending",
        seed=3,
    )


class Stop(Exception):
    """Stands for kill -9."""


class Run:
    """A stage in a folder, as train.py puts it together."""

    def __init__(
        self,
        name,
        folder,
        data,
        tokenizer,
        epochs=2,
        brain=None,
        pairs=PAIRS,
        intermediate=(),
        skd=(),
        **hparams,
    ):
        self.data = data
        self.teacher = make_teacher(
            teacher_taps(pairs) if name == "rkd" else ()
        )
        self.student = make_model(seed=0, hidden_size=4)
        torch.manual_seed(1)
        if name == "rkd":
            self.projector = Projectors(
                Projector, pairs, self.teacher, self.student
            )
        modules = {"student": self.student}
        if intermediate:
            modules["heads"] = IntermediateHeads(intermediate, self.student, 29)
        if name != "ctc":
            modules["teacher"] = self.teacher
        if name == "rkd":
            modules["projector"] = self.projector
        self.counter = EpochCounter(epochs)
        saved = {k: m for k, m in modules.items() if k != "teacher"}
        saved["counter"] = self.counter
        self.checkpointer = AtomicCheckpointer(folder / "save", saved)
        self.log = folder / "train_log.txt"
        folder.mkdir(exist_ok=True)
        shared = stage_hparams(folder, self.counter, tokenizer, max_lr=0.01)
        hparams = shared | hparams
        hparams["skd"] |= skd
        self.brain = (brain or self.recording(BRAINS[name]))(
            modules,
            hparams=hparams,
            opt_class=partial(torch.optim.AdamW, lr=0.01),
            checkpointer=self.checkpointer,
        )
        self.brain.steps, self.brain.stop_after = [], None

    @staticmethod
    def recording(kind):
        class Recording(kind):
            """Keeps epoch, utterances and learning rate of each step."""

            def fit_batch(self, batch):
                if len(self.steps) == self.stop_after:
                    raise Stop
                lr = self.optimizer.param_groups[0]["lr"]
                self.steps.append((self.epoch, tuple(batch.id), lr))
                return super().fit_batch(batch)

        return Recording

    def fit(self, stop_after=None):
        self.brain.stop_after = stop_after
        self.valid = valid = make_dataloader(
            self.data,
            batch_sampler=sampler(self.data, shuffle=False),
            generator=torch.Generator(),
        )
        arguments = {
            "batch_sampler": sampler(self.data),
            "num_workers": 0,
            "generator": torch.Generator(),
        }
        if stop_after is None:
            self.brain.fit(self.counter, self.data, valid, arguments)
        else:
            with pytest.raises(Stop):
                self.brain.fit(self.counter, self.data, valid, arguments)
        return self


@pytest.fixture
def run(tmp_path, data, tokenizer):
    numbers = itertools.count()

    def make(name, folder=None, **options):
        folder = tmp_path / (folder or str(next(numbers)))
        return Run(name, folder, data, tokenizer, **options)

    return make


def copy(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


# --------------------------------------------------------------------- losses


def alone(model, wav):
    """Encode one utterance without any padding."""
    with torch.no_grad():
        encoding = model.eval()(wav.unsqueeze(0), torch.ones(1))
    return encoding.hidden[0].double(), encoding.logits[0].double()


def some(data, **more):
    """A padded batch of three, with the items that are in it."""
    items = [data[index] for index in (0, 4, 7)]
    for key, values in more.items():
        items = [
            item | {key: value}
            for item, value in zip(items, values, strict=True)
        ]
    return PaddedBatch(items), items


def plain_ctc(model, items):
    losses = []
    for item in items:
        _, logits = alone(model, item["sig"])
        losses.append(
            torch.nn.functional.ctc_loss(
                logits.log_softmax(-1),
                item["tokens"],
                torch.tensor(len(logits)),
                torch.tensor(len(item["tokens"])),
                reduction="sum",
            ).item()
        )
    return sum(losses) / len(losses)


def plain_skd(student, teacher, items):
    losses = []
    for item in items:
        ours = alone(student, item["sig"])[1].softmax(-1)
        theirs = alone(teacher, item["sig"])[1].softmax(-1)
        losses.append(((ours - theirs) ** 2).sum().item())
    return sum(losses) / len(losses)


def plain_rkd(student, projector, teacher, items):
    losses = []
    for item in items:
        ours = projector.double()(alone(student, item["sig"])[0])
        theirs = alone(teacher, item["sig"])[0]
        losses.append(((ours - theirs) ** 2).mean().item())
    projector.float()
    return sum(losses) / len(losses)


def loss_of(brain, data, stage, epoch=1, **more):
    batch, items = some(data, **more)
    brain.modules.eval()
    brain.on_stage_start(stage, epoch)
    outputs = brain.compute_forward(batch, stage)
    return brain.compute_objectives(outputs, batch, stage).item(), items


@pytest.mark.parametrize("stage", [sb.Stage.TRAIN, sb.Stage.VALID])
def test_the_ctc_loss_is_that_of_each_utterance_alone(run, data, stage):
    its = run("ctc")
    loss, items = loss_of(its.brain, data, stage)
    assert loss == pytest.approx(plain_ctc(its.student, items), rel=1e-4)


@pytest.mark.parametrize(
    "weight, ctc_weight", [(0.0, 1.0), (0.25, 1.0), (3.0, 0.5), (2.0, 0.0)]
)
def test_the_skd_loss_is_ctc_and_the_weighted_distance(
    run, data, weight, ctc_weight
):
    its = run(
        "skd",
        skd={
            "weight": weight,
            "weight_final": weight,
            "ctc_weight": ctc_weight,
        },
    )
    loss, items = loss_of(its.brain, data, sb.Stage.TRAIN)
    ctc = plain_ctc(its.student, items)
    skd = plain_skd(its.student, its.teacher.model, items)
    assert skd > 1
    assert loss == pytest.approx(ctc_weight * ctc + weight * skd, rel=1e-4)
    figures = its.brain.figures()
    assert ("ctc" in figures) == (ctc_weight > 0)
    assert figures.get("ctc", ctc) == pytest.approx(ctc, rel=1e-4)
    assert figures["skd"] == pytest.approx(skd, rel=1e-4)


@pytest.mark.parametrize(
    "transcribed", [(True, False, True), (False, True, False), (False,) * 3]
)
@pytest.mark.parametrize("ctc_weight", [0.5, 0.0])
def test_what_is_not_transcribed_is_learnt_from_the_teacher_alone(
    run, data, transcribed, ctc_weight
):
    # In epoch 2 of 3, lambda is between its first and its last value.
    its = run(
        "skd",
        epochs=3,
        skd={"weight": 2.0, "weight_final": 1.0, "ctc_weight": ctc_weight},
    )
    loss, items = loss_of(
        its.brain, data, sb.Stage.TRAIN, epoch=2, transcribed=transcribed
    )
    total = 0.0
    for item, known in zip(items, transcribed, strict=True):
        weight = 1.5 if known else 2.0
        total += weight * plain_skd(its.student, its.teacher.model, [item])
        total += ctc_weight * plain_ctc(its.student, [item]) * known
    assert loss == pytest.approx(total / 3, rel=1e-4)


# The first is (batch, dim, frames).
HEADS = [
    {"student": "encoder.conv", "weight": 0.5},
    {"student": "encoder.layers.outputs.0", "weight": 2.0},
]


def heard_through(its, index):
    """The student with an intermediate head in the place of its own."""
    model = its.student

    class Through(torch.nn.Module):
        def forward(self, wavs, lengths):
            encoding = model(wavs, lengths)
            x, _ = model.features(wavs, lengths)
            x = model.encoder.conv(x.transpose(1, 2))
            if index:
                x = torch.relu(model.encoder.norm(x)).transpose(1, 2)
                layers = model.encoder.layers
                forth, _ = layers.forward_layers[0](x)
                back, _ = layers.backward_layers[0](x.flip(1))
                x = torch.cat([forth, back.flip(1)], -1).transpose(1, 2)
            logits = its.brain.modules.heads[index](x.transpose(1, 2))
            return encoding._replace(logits=logits)

    return Through()


@pytest.mark.parametrize(
    "name, transcribed", [("ctc", None), ("skd", None), ("skd", (1, 0, 1))]
)
def test_intermediate_heads_learn_as_the_students_own_does(
    run, data, name, transcribed
):
    its = run(
        name,
        intermediate=HEADS,
        skd={
            "weight": 1.5,
            "weight_final": 1.5,
            "ctc_weight": 1.0 if name == "ctc" else 0.25,
        },
    )
    more = {} if transcribed is None else {"transcribed": transcribed}
    loss, items = loss_of(its.brain, data, sb.Stage.TRAIN, **more)
    models = [its.student, *(heard_through(its, index) for index in range(2))]
    skds, ctcs = [], []
    for model in models:
        skd, ctc = 0.0, 0.0
        for item, known in zip(items, transcribed or (1, 1, 1), strict=True):
            ctc += known * plain_ctc(model, [item]) / 3
            if name == "skd":
                skd += plain_skd(model, its.teacher.model, [item]) / 3
        skds.append(1.5 * skd)
        ctcs.append((1.0 if name == "ctc" else 0.25) * ctc)
    assert len({round(value, 3) for value in ctcs}) == 3
    expected = sum(
        weight * (skd + ctc)
        for weight, skd, ctc in zip((1, 0.5, 2), skds, ctcs, strict=True)
    )
    assert loss == pytest.approx(expected, rel=1e-4)
    assert {"ctc", "ctc_0", "ctc_1"} <= set(its.brain.figures())
    # Scores and the choice of the best are of the student alone.
    loss, items = loss_of(its.brain, data, sb.Stage.VALID)
    assert loss == pytest.approx(plain_ctc(its.student, items), rel=1e-4)


def test_an_intermediate_head_teaches_what_is_below_it(run, data):
    its = run("ctc", intermediate=HEADS[:1])
    batch, _ = some(data)
    its.brain.on_stage_start(sb.Stage.TRAIN, 1)
    outputs = its.brain.compute_forward(batch, sb.Stage.TRAIN)
    its.brain.ctc(outputs[1], batch).backward()
    reached = {
        n for n, p in its.student.named_parameters() if p.grad is not None
    }
    assert reached == {"encoder.conv.weight"}
    assert all(
        p.grad.abs().sum() > 0 for p in its.brain.modules.heads.parameters()
    )


def test_a_stage_with_intermediate_heads_goes_on_as_if_never_stopped(run):
    whole = run("skd", intermediate=HEADS).fit()
    run("skd", folder="stopped", intermediate=HEADS).fit(stop_after=3)
    rest = run("skd", folder="stopped", intermediate=HEADS).fit()
    assert same(copy(whole.student), copy(rest.student))
    assert same(copy(whole.brain.modules.heads), copy(rest.brain.modules.heads))
    assert "heads" in whole.checkpointer.recoverables


def test_outside_training_the_skd_stage_does_not_ask_the_teacher(run, data):
    its = run("skd", skd={"weight": 100.0})
    its.teacher.forward = None
    loss, items = loss_of(its.brain, data, sb.Stage.VALID)
    assert loss == pytest.approx(plain_ctc(its.student, items), rel=1e-4)


@pytest.mark.parametrize("stage", [sb.Stage.TRAIN, sb.Stage.VALID])
def test_the_rkd_loss_is_that_of_each_utterance_alone(run, data, stage):
    its = run("rkd")
    loss, items = loss_of(its.brain, data, stage)
    plain = plain_rkd(its.student, its.projector[0], its.teacher.model, items)
    assert loss == pytest.approx(plain, rel=1e-4)


def test_the_rkd_stage_uses_the_frame_weights_it_is_given(run, data):
    its = run("rkd", representation_loss=RepresentationLoss("nonblank"))
    # So that the teacher is sure of blank in some frames and not in others
    with torch.no_grad():
        its.teacher.model.head.weight[0].mul_(20)
    found, items = loss_of(its.brain, data, sb.Stage.TRAIN)
    losses = []
    for item in items:
        theirs, logits = alone(its.teacher.model, item["sig"])
        weights = 1 - logits.softmax(-1)[:, 0]
        assert weights.min() < 0.5 < weights.max()
        with torch.no_grad():
            hidden = alone(its.student, item["sig"])[0].float()
            ours = its.projector[0](hidden)
        errors = ((ours - theirs) ** 2).mean(1)
        losses.append((weights * errors).sum().item() / weights.sum().item())
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def conv_of(model, wav):
    """Output of the convolution for one utterance without any padding."""
    with torch.no_grad():
        x, _ = model.eval().features(wav.unsqueeze(0), torch.ones(1))
        return model.encoder.conv(x.transpose(1, 2))[0].T


@pytest.mark.parametrize("weighting", ["uniform", "energy"])
def test_the_rkd_loss_is_the_weighted_sum_over_the_pairs(run, data, weighting):
    its = run(
        "rkd",
        pairs=SEVERAL,
        representation_loss=RepresentationLoss(weighting),
    )
    found, items = loss_of(its.brain, data, sb.Stage.TRAIN)
    means = []
    for index, pair in enumerate(SEVERAL):
        losses = []
        for item in items:
            theirs, ours = (
                conv_of(model, item["sig"]).double()
                if path == "encoder.conv"
                else alone(model, item["sig"])[0]
                for model, path in (
                    (its.teacher.model, pair.teacher),
                    (its.student, pair.student),
                )
            )
            with torch.no_grad():
                ours = its.projector[index](ours.float()).double()
            weights = torch.ones(len(theirs)).double()
            if weighting == "energy":
                weights = theirs.square().mean(1)
            errors = (ours - theirs).square().mean(1)
            losses.append((weights * errors).sum() / weights.sum())
        means.append((sum(losses) / len(losses)).item())
    total = sum(p.weight * m for p, m in zip(SEVERAL, means, strict=True))
    assert found == pytest.approx(total, rel=1e-4)
    figures = its.brain.figures()
    names = [f"rkd_{index}" for index in range(3)]
    relative = [f"{name}_relative" for name in names]
    assert set(figures) == {"loss", *names, *relative}
    for index, mean in enumerate(means):
        assert figures[f"rkd_{index}"] == pytest.approx(mean, rel=1e-4)
    assert len({round(mean, 4) for mean in means}) == 3


@pytest.mark.parametrize("weighting", ["uniform", "nonblank"])
def test_the_relative_rkd_loss_of_the_best_constant_is_one(run, weighting):
    its = run("rkd", representation_loss=RepresentationLoss(weighting))
    targets = []
    for item in its.data:
        states, logits = alone(its.teacher.model, item["sig"])
        weights = torch.ones(len(states)).double()
        if weighting == "nonblank":
            weights = 1 - logits.softmax(-1)[:, 0]
        targets.append((states, weights / weights.sum()))
    mean = sum(weights @ states for states, weights in targets) / len(targets)
    with torch.no_grad():
        its.projector[0].map.weight.zero_()
        its.projector[0].map.bias.copy_(mean)
    its.brain.optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    loader = make_dataloader(
        its.data, batch_sampler=sampler(its.data, shuffle=False)
    )
    its.brain.evaluate(loader)
    figures = its.brain.test_figures
    assert figures["rkd_relative"] == pytest.approx(1, rel=1e-4)
    wanted = sum(
        (weights * (states - mean).square().mean(1)).sum()
        for states, weights in targets
    ) / len(targets)
    assert figures["rkd"] == pytest.approx(wanted.item(), rel=1e-4)
    # Another constant costs more.
    with torch.no_grad():
        its.projector[0].map.bias += 0.1
    its.brain.evaluate(loader)
    assert its.brain.test_figures["rkd_relative"] > 1.001


def test_gradients_come_from_every_pair_and_stop_at_its_layers(run, data):
    """Below its layer a pair teaches all of the student, above it nothing."""
    reached = {}
    for layer in ("encoder.conv", "encoder"):
        its = run("rkd", pairs=[Pair("encoder", layer)])
        batch, _ = some(data)
        its.brain.on_stage_start(sb.Stage.TRAIN, 1)
        outputs = its.brain.compute_forward(batch, sb.Stage.TRAIN)
        its.brain.compute_objectives(outputs, batch, sb.Stage.TRAIN).backward()
        reached[layer] = {
            name
            for name, p in its.student.named_parameters()
            if p.grad is not None and p.grad.abs().sum() > 0
        }
        assert all(p.grad.abs().sum() > 0 for p in its.projector.parameters())
    everything = {name for name, _ in its.student.named_parameters()}
    assert reached["encoder.conv"] == {"encoder.conv.weight"}
    assert reached["encoder"] == {n for n in everything if "head" not in n}


def test_the_student_is_asked_once_for_all_its_layers(run, data):
    its = run("rkd", pairs=SEVERAL)
    calls = []
    for model in (its.student, its.teacher.model):
        model.register_forward_hook(lambda model, *_: calls.append(model))
    loss_of(its.brain, data, sb.Stage.TRAIN)
    assert calls == [its.student, its.teacher.model]


@pytest.mark.parametrize(
    "name, options, more",
    [
        ("rkd", {"pairs": SEVERAL[:1]}, "projector"),
        ("skd", {"intermediate": HEADS}, "heads"),
    ],
)
def test_under_ddp_layers_are_taught_as_without(
    run, data, tmp_path, name, options, more
):
    """What lies above a layer gets no gradient, for which DDP would wait."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    gradients = []
    try:
        for ddp in (False, True):
            its = run(name, **options)
            added = its.brain.modules[more]
            if ddp:
                for part in ("student", more):
                    its.brain.modules[part] = DistributedDataParallel(
                        its.brain.modules[part],
                        find_unused_parameters=part == "student",
                    )
            its.brain.on_stage_start(sb.Stage.TRAIN, 1)
            for _ in range(3):
                batch, _ = some(data)
                outputs = its.brain.compute_forward(batch, sb.Stage.TRAIN)
                loss = its.brain.compute_objectives(
                    outputs, batch, sb.Stage.TRAIN
                )
                loss.backward()
            parameters = [*its.student.parameters(), *added.parameters()]
            gradients.append([p.grad for p in parameters])
    finally:
        torch.distributed.destroy_process_group()
    for plain, wrapped in zip(*gradients, strict=True):
        assert (plain is None) == (wrapped is None)
        if plain is not None:
            torch.testing.assert_close(plain, wrapped)


class NoHead(torch.nn.Module):
    def forward(self, hidden):
        return hidden[..., :0]


def test_a_teacher_without_a_ctc_head_is_refused_before_training(
    run, monkeypatch
):
    make = make_teacher

    def make_headless(taps):
        model = make().model
        model.head = NoHead()
        return Teacher(model, taps)

    monkeypatch.setitem(globals(), "make_teacher", make_headless)
    with pytest.raises(ValueError, match="choose uniform or energy"):
        run("rkd", representation_loss=RepresentationLoss("nonblank"))
    with pytest.raises(ValueError, match="softmax-level distillation needs"):
        run("skd")
    student = copy(run("rkd", epochs=1).student)
    assert not same(copy(run("rkd", epochs=1).fit().student), student)


def test_a_delay_moves_the_teacher_back(run, data):
    its = run("skd", delay=0.04)
    found, items = loss_of(its.brain, data, sb.Stage.TRAIN)
    losses = []
    for item in items:
        ours = alone(its.student, item["sig"])[1].softmax(-1)
        theirs = alone(its.teacher.model, item["sig"])[1].softmax(-1)
        # Two frames of 20 ms later; its first frame stands in before, without
        # a spike. The last two frames are left to CTC.
        first = theirs[:1]
        if first.argmax() != 0:
            first = torch.eye(29)[:1].to(first)
        theirs = torch.cat([first, first, theirs[:-2]])
        losses.append(((ours - theirs) ** 2)[:-2].sum().item())
    skd = sum(losses) / len(losses)
    ctc = plain_ctc(its.student, items)
    assert found == pytest.approx(ctc + skd, rel=1e-4)


@pytest.mark.parametrize("delay", [0.0, 0.2])
def test_symbols_without_an_skd_term_are_logged(run, data, delay):
    """Those that a delay moves into the last frames or beyond the end."""
    its = run("skd", delay=delay)
    found, items = loss_of(its.brain, data, sb.Stage.TRAIN)
    figures = its.brain.figures()
    assert set(figures) >= {"loss", "ctc", "skd"}
    known = in_all = 0
    for item in items:
        best = alone(its.teacher.model, item["sig"])[1].argmax(-1).tolist()
        written = [
            [symbol for symbol, _ in itertools.groupby(part) if symbol != 0]
            # Frames are moved back by 10, and the last 10 have no term.
            for part in (best, best[:-20])
        ]
        in_all += len(written[0])
        known += len(written[1])
    if delay:
        left = 100 * (1 - known / in_all)
        assert figures["skd_left_out"] == pytest.approx(left, abs=1e-3)
        assert 0 < left < 100
    else:
        # Students with the teacher's frames have all of its symbols.
        assert figures.get("skd_left_out", 0.0) == 0.0


@pytest.mark.parametrize(
    "first, last, epochs, weights",
    [
        (3.0, 1.0, 5, [3.0, 2.5, 2.0, 1.5, 1.0]),
        (1.0, 0.0, 2, [1.0, 0.0]),
        (2.0, 2.0, 3, [2.0, 2.0, 2.0]),
        (0.5, 0.0, 1, [0.5]),
    ],
)
def test_the_skd_weight_goes_from_its_first_to_its_last(
    run, first, last, epochs, weights
):
    its = run("skd", epochs=epochs, skd={"weight": first, "weight_final": last})
    found = []
    for epoch in its.counter:
        its.brain.on_stage_start(sb.Stage.TRAIN, epoch)
        found.append(its.brain.skd_weight)
    assert found == pytest.approx(weights)


# ---------------------------------------------------- what is and isn't trained


@pytest.mark.parametrize("name", ["skd", "rkd"])
def test_training_leaves_the_teacher_as_it_was_bit_for_bit(run, name):
    its = run(name)
    teacher, student = copy(its.teacher), copy(its.student)
    assert any("running_mean" in key for key in teacher)
    its.fit()
    assert same(copy(its.teacher), teacher)
    assert not same(copy(its.student), student)
    assert all(p.grad is None for p in its.teacher.parameters())


@pytest.mark.parametrize("name", ["skd", "rkd"])
def test_the_teacher_is_in_no_checkpoint_and_no_optimizer(run, name):
    its = run(name).fit()
    files = {p.name for p in (its.log.parent / "save").rglob("*.ckpt")}
    assert "student.ckpt" in files
    assert ("projector.ckpt" in files) == (name == "rkd")
    assert not any("teacher" in file for file in files)
    optimized = {
        id(p)
        for group in its.brain.optimizer.param_groups
        for p in group["params"]
    }
    ours = set(map(id, its.student.parameters()))
    if name == "rkd":
        ours |= set(map(id, its.projector.parameters()))
    assert optimized == ours


def test_rkd_trains_the_encoder_and_the_projector_but_not_the_head(run):
    its = run("rkd")
    head, encoder = copy(its.student.head), copy(its.student.encoder)
    projector = copy(its.projector)
    its.fit()
    assert same(copy(its.student.head), head)
    assert not same(copy(its.student.encoder), encoder)
    assert not same(copy(its.projector), projector)


def test_training_lowers_the_loss(run):
    its = run("rkd", epochs=8).fit()
    losses = [
        float(line.partition("train loss: ")[2].partition(",")[0])
        for line in its.log.read_text().splitlines()
    ]
    assert len(losses) == 8
    assert losses[-1] < 0.97 * losses[0]


# ------------------------------------------------------- batches, steps, resume


def test_each_epoch_has_its_own_batches_of_all_utterances(run, data):
    its = run("ctc", epochs=3).fit()
    epochs = {}
    for epoch, ids, _ in its.brain.steps:
        epochs.setdefault(epoch, []).append(ids)
    assert list(epochs) == [1, 2, 3]
    for batches in epochs.values():
        assert sorted(sum(batches, ())) == sorted(data.data_ids)
        assert len(batches) > 3
    assert epochs[1] != epochs[2] != epochs[3] != epochs[1]


def test_the_learning_rate_is_one_cycle_over_all_steps(run):
    its = run("ctc", epochs=3).fit()
    lrs = [lr for _, _, lr in its.brain.steps]
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        dummy, max_lr=0.01, total_steps=len(lrs), cycle_momentum=False
    )
    wanted = []
    for _ in lrs:
        wanted.append(dummy.param_groups[0]["lr"])
        dummy.step()
        if len(wanted) < len(lrs):
            cycle.step()
    assert lrs == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("name", ["ctc", "skd", "rkd"])
def test_a_stopped_stage_ends_as_if_it_had_never_stopped(run, name):
    dropout = torch.nn.Dropout(0.2)
    whole = run(name, epochs=3, skd={"weight_final": 0.0})
    whole.student.augment = dropout
    whole.fit()
    steps = whole.brain.steps
    per_epoch = len(steps) // 3
    folder, done = "stopped", []
    # Within an epoch, at the end of one, and within the last
    stops = [2, per_epoch, 2 * per_epoch + 3, None]
    for stop in stops:
        part = run(
            name,
            folder=folder,
            epochs=3,
            skd={"weight_final": 0.0},
            ckpt_interval_steps=1,
        )
        part.student.augment = dropout
        part.fit(None if stop is None else stop - len(done))
        done += part.brain.steps
    assert done == steps
    student, other = copy(part.student), copy(whole.student)
    for key, value in other.items():
        assert torch.equal(student[key], value), key
    assert part.brain.train_figures == whole.brain.train_figures
    lines = part.log.read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "epoch: 1",
        "epoch: 2",
        "epoch: 3",
    ]


def test_a_finished_stage_trains_no_further(run):
    first = run("ctc", folder="one").fit()
    again = run("ctc", folder="one").fit()
    assert again.brain.steps == []
    assert same(copy(again.student), copy(first.student))


def test_the_learning_rate_takes_one_step_for_each_of_the_optimizer(run):
    its = run("ctc", epochs=2, grad_accumulation_factor=4).fit()
    batches = len(its.brain.steps) // 2
    # One more with what is left at the end of an epoch
    assert batches % 4
    steps = 2 * (batches // 4 + 1)
    assert its.brain.lr_schedule.total_steps == steps
    assert its.brain.optimizer_step == steps
    last = its.brain.optimizer.param_groups[0]["lr"]
    assert last == pytest.approx(0.01 / 25 / 1e4)


def test_a_stopped_stage_of_accumulated_steps_ends_as_if_never_stopped(run):
    options = {"grad_accumulation_factor": 4, "ckpt_interval_steps": 1}
    whole = run("ctc", **options).fit()
    # Within the first step, within the next, after that ends the epoch
    for stop in 2, 5, 3, None:
        part = run("ctc", folder="stopped", **options).fit(stop)
    # Learnt again is what was not saved.
    assert part.brain.steps == whole.brain.steps[-len(part.brain.steps) :]
    assert same(copy(part.student), copy(whole.student))
    assert part.brain.train_figures == whole.brain.train_figures


# -------------------------------------------------------------------- stopwatch


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(stage_module.time, "monotonic", lambda: self.now)


def test_a_stopwatch_goes_on_when_it_is_started_again(monkeypatch):
    clock, watch = Clock(monkeypatch), Stopwatch()
    assert watch.seconds == 0
    watch.start()
    clock.now += 5
    assert watch.seconds == 5
    watch.start()
    clock.now += 2
    assert watch.seconds == 7


def test_a_stopwatch_survives_a_checkpoint(monkeypatch, tmp_path):
    clock, watch = Clock(monkeypatch), Stopwatch()
    watch.start()
    clock.now += 5
    AtomicCheckpointer(tmp_path, {"watch": watch}).save_checkpoint()
    clock.now += 100
    other = Stopwatch()
    AtomicCheckpointer(tmp_path, {"watch": other}).recover_if_possible()
    assert other.seconds == 5
    other.start()
    clock.now += 3
    assert other.seconds == 8


def test_the_seconds_of_a_stage_are_those_of_all_epochs_and_parts(
    run, monkeypatch
):
    clock = Clock(monkeypatch)

    class Slow(Run.recording(CTCBrain)):
        def fit_batch(self, batch):
            clock.now += 10
            return super().fit_batch(batch)

    def part():
        return run(
            "ctc", folder="slow", brain=Slow, epochs=3, ckpt_interval_steps=1
        )

    first = part().fit(stop_after=8)
    clock.now += 5000
    second = part().fit()
    assert len(second.brain.steps) > 1
    steps = len(first.brain.steps) + len(second.brain.steps)
    assert second.brain.watch.seconds == pytest.approx(10 * steps)


# ------------------------------------------------------------ best, transcripts


@pytest.mark.parametrize("keep", [1, 2])
def test_the_best_checkpoints_are_those_of_the_lowest_wer(run, keep):
    wers = {1: 50.0, 2: 20.0, 3: 40.0, 4: 60.0}
    states = {}

    class Scripted(Run.recording(CTCBrain)):
        def figures(self):
            figures = super().figures()
            if self.references:
                figures["WER"] = wers[self.epoch]
                states[self.epoch] = copy(self.student)
            return figures

    its = run("ctc", brain=Scripted, epochs=4, avg_checkpoints=keep).fit()
    kept = its.checkpointer.find_checkpoints(min_key="WER")
    epochs = [checkpoint.meta["epoch"] for checkpoint in kept]
    # The best, and the newest to go on from
    assert epochs == {1: [2, 4], 2: [2, 3, 4]}[keep]
    for checkpoint in kept:
        state = torch.load(checkpoint.path / "student.ckpt")
        assert same(state, states[checkpoint.meta["epoch"]])


@pytest.mark.parametrize("wer, averaged", [(19.9, 3), (20.0, 3), (20.1, 1)])
def test_the_mean_of_checkpoints_is_kept_where_it_is_no_worse(
    run, wer, averaged
):
    """By its own figure, which is the one that is recorded."""
    wers = {1: 50.0, 2: 20.0, 3: 40.0, 4: 60.0, None: wer}
    states = {}

    class Scripted(Run.recording(CTCBrain)):
        def figures(self):
            figures = super().figures()
            if self.references:
                figures["WER"] = wers[self.epoch]
                states[self.epoch] = copy(self.student)
            return figures

    its = run("ctc", brain=Scripted, epochs=4, avg_checkpoints=3).fit()
    found = its.brain.load_best(its.valid)
    mean = {
        key: sum(states[epoch][key] for epoch in (1, 2, 3)) / 3
        for key in states[2]
    }
    for key, value in copy(its.student).items():
        if averaged == 1:
            assert torch.equal(value, states[2][key]), key
        elif value.is_floating_point():
            torch.testing.assert_close(value, mean[key], msg=key)
    assert found.pop("valid")["WER"] == min(wer, 20.0)
    assert found == {
        "selected_by": "WER",
        "best": min(wer, 20.0),
        "best_epoch": 2,
        "averaged": averaged,
    }


@pytest.mark.parametrize("name", ["ctc", "rkd"])
@pytest.mark.parametrize("keep", [1, 3])
def test_the_recorded_figures_are_those_of_the_weights(run, name, keep):
    its = run(name, epochs=4, avg_checkpoints=keep).fit()
    found = its.brain.load_best(its.valid)
    assert found["averaged"] in (1, keep)
    for part in its.checkpointer.find_checkpoints(
        min_key=its.brain.selected_by
    ):
        assert found["best"] <= part.meta[its.brain.selected_by]
    its.brain.evaluate(its.valid)
    assert its.brain.test_figures == pytest.approx(found["valid"])
    assert found["best"] == found["valid"][its.brain.selected_by]
    items = [*its.data]
    if name == "rkd":
        loss = plain_rkd(
            its.student, its.projector[0], its.teacher.model, items
        )
    else:
        loss = plain_ctc(its.student, items)
    assert found["valid"]["loss"] == pytest.approx(loss, rel=1e-4)


def test_rkd_selects_by_its_own_loss_on_the_development_set(run, data):
    its = run("rkd").fit()
    (*_, newest) = its.log.read_text().splitlines()
    loss, _ = newest.partition("valid loss: ")[2].split(",", 1)
    checkpoint = its.checkpointer.find_checkpoint()
    assert its.brain.selected_by == "loss"
    assert checkpoint.meta["loss"] == pytest.approx(float(loss), rel=0.01)


class Scripted(torch.nn.Module):
    """Says what it is told, and nonsense on the padding."""

    def __init__(self, tokenizer, texts):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.ids = {key: tokenizer.encode(text) for key, text in texts.items()}
        self.nonsense = tokenizer.encode("Z")[-1]
        self.queue = []

    def forward(self, wavs, wav_lens):
        rows = []
        for key in self.queue.pop(0):
            # A blank between any two, so that doubled letters stay.
            rows.append([x for i in self.ids[key] for x in (i, i, 0)] + [0])
        lengths = torch.tensor([len(row) for row in rows])
        frames = int(lengths.max()) + 2
        symbols = torch.tensor(
            [row + [self.nonsense] * (frames - len(row)) for row in rows]
        )
        logits = 20.0 * torch.nn.functional.one_hot(symbols, 29).float()
        return Encoding(logits, logits, lengths)


def test_evaluation_keeps_the_transcripts_of_all_utterances(data, tokenizer):
    said = dict(zip(data.data_ids, TEXTS, strict=True))
    said |= {"u1": "FIVE", "u2": "TEN", "u3": ""}
    student = Scripted(tokenizer, said)
    searcher = CTCBeamSearcher(
        blank_index=0, vocab_list=pieces(tokenizer), beam_size=5
    )
    brain = CTCBrain(
        {"student": student},
        hparams={
            "tokenizer": tokenizer,
            "blank_index": 0,
            "searcher": searcher,
            "noprogressbar": True,
        },
    )
    # Three batches, the last one smaller than the others
    student.queue = [data.data_ids[i : i + 3] for i in (0, 3, 6)]
    brain.evaluate(make_dataloader(data, batch_size=3))
    assert brain.references == dict(zip(data.data_ids, TEXTS, strict=True))
    assert brain.hypotheses == said
    assert brain.beam_hypotheses == said
    figures = brain.figures()
    # SIX -> FIVE, one word lost of TEN ELEVEN, A lost; of 10 words
    assert figures["WER"] == pytest.approx(100 * 3 / 10)
    wanted = score(brain.references, said)
    assert figures["CER"] == wanted["cer"]


def test_figures_of_an_epoch_are_means_over_its_utterances(run, data):
    its = run("ctc", epochs=1).fit()
    assert len({len(ids) for _, ids, _ in its.brain.steps}) > 1
    loss = plain_ctc(its.student.eval(), [*data])
    line = its.log.read_text()
    for name in "loss", "ctc":
        logged = float(line.partition(f"valid {name}: ")[2].split(",")[0])
        assert logged == pytest.approx(loss, rel=0.001)


def test_the_log_for_tensorboard_has_all_figures(run):
    from tensorboard.backend.event_processing.event_accumulator import (
        EventAccumulator,
    )

    its = run("skd").fit()
    events = EventAccumulator(str(its.log.parent / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss/train", "ctc/train", "skd/train", "loss/valid"} <= tags
    assert {"WER/valid", "CER/valid", "lr"} <= tags
    assert [event.step for event in events.Scalars("lr")] == [1, 2]


# ------------------------------------------- losses that are no finite numbers


def spoiling(kind, spoil, wanted, statistics=True):
    """A stage in which some steps have no finite loss or gradient.

    Those of a batch that spoils the running statistics as well, if wanted.
    """

    class Spoilt(Run.recording(kind)):
        lost = ()

        def compute_objectives(self, outputs, batch, stage):
            loss = super().compute_objectives(outputs, batch, stage)
            if stage == sb.Stage.TRAIN and wanted(len(self.steps)):
                self.lost += (tuple(batch.id),)
                self.before = copy(self.modules)
                if statistics:
                    self.student.encoder.norm.running_mean.data.fill_(torch.nan)
                loss = spoil(loss)
                self.terms.add("ctc", loss)
            return loss

        def fit_batch(self, batch):
            loss = super().fit_batch(batch)
            if wanted(len(self.steps)):
                self.after = copy(self.modules)
            return loss

    return Spoilt


def assert_only_statistics_changed(brain):
    for name, before in brain.before.items():
        after = brain.after[name]
        if "running" in name:
            assert after.isfinite().all(), name
        elif "num_batches" not in name:
            assert torch.equal(before, after), name


@pytest.mark.parametrize(
    "spoil",
    [lambda loss: loss * torch.nan, lambda loss: loss + torch.inf],
    ids=["nan", "infinite, with a finite gradient"],
)
def test_a_step_without_a_finite_loss_changes_nothing(run, spoil, caplog):
    brain = spoiling(CTCBrain, spoil, lambda step: step == 2)
    stage = run("ctc", brain=brain)
    first = copy(stage.brain.modules)
    stage.fit()
    brain = stage.brain
    names = ", ".join(brain.lost[0])
    told = "step 2 is left out, its loss is not finite: " + names
    assert told in caplog.text
    assert_only_statistics_changed(brain)
    # The training goes on, and its figures are those of the other steps.
    assert len(brain.steps) == brain.lr_schedule.total_steps
    last = copy(brain.modules)
    assert not same(first, last)
    assert all(value.isfinite().all() for value in last.values())
    assert all(map(math.isfinite, brain.train_figures.values()))


def test_an_accumulated_step_with_an_infinite_batch_changes_nothing(run):
    spoil = spoiling(CTCBrain, lambda loss: loss * torch.nan, lambda n: n == 2)
    options = {"grad_accumulation_factor": 3, "epochs": 1}
    stage = run("ctc", brain=spoil, **options)
    before = copy(stage.student)
    stage.fit()
    assert len(stage.brain.steps) == 6 and stage.brain.optimizer_step == 1
    # As if the first three batches had not been there
    whole = run("ctc", **options)
    fit_batch = whole.brain.fit_batch

    def without(batch):
        if len(whole.brain.steps) < 3:
            lr = whole.brain.optimizer.param_groups[0]["lr"]
            whole.brain.steps.append((1, tuple(batch.id), lr))
            if len(whole.brain.steps) == 3:
                whole.brain.lr_schedule.step()
            return torch.zeros(())
        return fit_batch(batch)

    whole.brain.fit_batch = without
    whole.fit()
    assert whole.brain.steps == stage.brain.steps
    weights = dict(whole.student.named_parameters())
    for name, value in stage.student.named_parameters():
        torch.testing.assert_close(value, weights[name], msg=name)
    assert not same(before, copy(stage.student))


def test_a_step_without_a_finite_gradient_changes_no_weight(run, caplog):
    class Root(torch.autograd.Function):
        """A loss that is finite, and a gradient that is not."""

        @staticmethod
        def forward(context, loss):
            return loss.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * torch.inf

    brain = spoiling(CTCBrain, Root.apply, lambda step: step == 2, False)
    brain = run("ctc", brain=brain).fit().brain
    assert "step 2 is left out, its gradient is not finite" in caplog.text
    assert_only_statistics_changed(brain)
    assert len(brain.steps) == brain.lr_schedule.total_steps


def test_many_steps_in_a_row_without_a_finite_loss_end_the_training(run):
    brain = spoiling(CTCBrain, lambda loss: loss * torch.nan, lambda n: n > 3)
    stage = run("ctc", brain=brain, epochs=9, nonfinite_patience=2)
    with pytest.raises(ValueError, match="3 steps in a row") as error:
        stage.fit()
    assert len(stage.brain.steps) == 6
    for name in stage.brain.lost[-1]:
        assert name in str(error.value)
    assert "Lower --lr" in str(error.value)
    assert str(stage.checkpointer.checkpoints_dir) in str(error.value)
    state = copy(stage.brain.modules)
    assert all(value.isfinite().all() for value in state.values())


def test_steps_that_are_lost_now_and_then_do_not_end_the_training(run):
    brain = spoiling(
        CTCBrain, lambda loss: loss * torch.nan, lambda n: n % 3 == 0
    )
    stage = run("ctc", brain=brain, epochs=3, nonfinite_patience=1).fit()
    assert len(stage.brain.lost) > 2


def test_an_infinite_loss_of_the_development_set_is_no_best(run, data, caplog):
    class Spoilt(RKDBrain):
        def compute_objectives(self, outputs, batch, stage):
            loss = super().compute_objectives(outputs, batch, stage)
            if stage == sb.Stage.VALID and self.epoch == 2:
                loss = loss * torch.nan
            return loss

    stage = run("rkd", brain=Spoilt, epochs=3).fit()
    assert "Epoch 2: the loss is not finite for these utterances" in caplog.text
    assert data[0]["id"] in caplog.text
    best = stage.checkpointer.find_checkpoint(min_key="loss")
    assert best.meta["epoch"] in (1, 3)
