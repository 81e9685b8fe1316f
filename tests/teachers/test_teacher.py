"""The teacher: frozen, tapped where asked, strictly loaded."""

import copy
import zipfile

import pytest
import torch

from tutornet_sb.distillation.alignment import align
from tutornet_sb.distillation.losses import RepresentationLoss, SoftmaxLoss
from tutornet_sb.networks.acoustic_model import AcousticModel, LogMelFeatures
from tutornet_sb.networks.recurrent import RecurrentEncoder
from tutornet_sb.networks.weights import load_model_weights
from tutornet_sb.teachers.teacher import Teacher

SYMBOLS = 11


class Swap(torch.nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.axes = a, b

    def forward(self, x):
        return x.transpose(*self.axes)


class ManyShapes(torch.nn.Module):
    """Layers that put the frames on each axis, or on none."""

    stride = 2
    output_size = 6

    def __init__(self, input_size=8):
        super().__init__()
        self.early = torch.nn.Linear(input_size, 5)
        self.to_channels = Swap(1, 2)
        self.conv = torch.nn.Conv1d(5, 6, 3, stride=2, padding=1)
        self.norm = torch.nn.BatchNorm1d(6)
        self.inplace = torch.nn.ReLU(inplace=True)
        self.dropout = torch.nn.Dropout(0.5)
        self.to_time_first = Swap(0, 1)
        self.gru = torch.nn.GRU(6, 3, bidirectional=True)
        self.unused = torch.nn.Linear(6, 6)
        self.attention = torch.nn.Identity()
        self.summary = torch.nn.AdaptiveAvgPool1d(1)

    def forward(self, x, lengths):
        x = self.conv(self.to_channels(self.early(x)))
        x = self.dropout(self.inplace(self.norm(x)))
        self.summary(x)
        x = x.transpose(1, 2)
        self.attention(x @ x.transpose(1, 2))
        x, _ = self.gru(self.to_time_first(x))
        return x.transpose(0, 1), (lengths - 1) // 2 + 1


def make_model(encoder=None):
    torch.manual_seed(0)
    encoder = encoder or ManyShapes()
    head = torch.nn.Linear(encoder.output_size, SYMBOLS)
    return AcousticModel(LogMelFeatures(n_mels=8), encoder, head)


def make_lstm():
    return make_model(RecurrentEncoder(8, channels=4, hidden_size=3, layers=2))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    wavs = torch.randn(3, 9600, generator=generator)
    return wavs, torch.tensor([1.0, 0.4, 0.75])


def test_targets_are_those_of_the_model(batch):
    model = make_lstm()
    teacher = Teacher(model)
    targets = teacher(*batch)
    encoding = model.eval()(*batch)
    torch.testing.assert_close(targets.hidden, encoding.hidden)
    expected = encoding.logits.softmax(-1)
    torch.testing.assert_close(targets.posteriors, expected)
    assert targets.lengths.tolist() == encoding.lengths.tolist()
    assert targets.frame_period == teacher.frame_period == 0.02
    assert teacher.hidden_sizes == [encoding.hidden.shape[2]]
    assert teacher.symbols == SYMBOLS


@pytest.mark.parametrize(
    "tap, axis, size",
    [
        ("encoder", 1, 6),
        ("encoder.conv", 2, 6),
        ("encoder.norm", 2, 6),
        ("encoder.to_time_first", 0, 6),
        ("encoder.gru", 0, 6),
        ("head", 1, SYMBOLS),
    ],
)
def test_tap_finds_the_time_axis(batch, tap, axis, size):
    teacher = Teacher(make_model(), [tap])
    assert teacher.taps == {tap: (axis, size)}
    assert teacher.hidden_sizes == [size]
    seen = []
    layer = teacher.model.get_submodule(tap)
    layer.register_forward_hook(lambda *args: seen.append(copy.copy(args[2])))
    hidden = teacher(*batch).hidden
    assert hidden.shape == (3, 31, size)
    output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    if tap != "encoder.norm":
        expected = output.movedim(axis, 1)
        torch.testing.assert_close(hidden, expected)


def test_layer_behind_may_work_in_place(batch):
    targets = Teacher(make_model(), ["encoder.norm"])(*batch)
    assert (targets.hidden < 0).any()
    targets = Teacher(make_model(), ["encoder.inplace"])(*batch)
    assert (targets.hidden >= 0).all()


@pytest.mark.parametrize(
    "tap",
    [
        "encoder.early",
        "encoder.to_channels",
        "encoder.unused",
        "encoder.attention",
        "encoder.summary",
        "features",
        "features.normalize",
    ],
)
def test_layer_without_the_models_frames_is_refused(tap):
    with pytest.raises(ValueError) as raised:
        Teacher(make_model(), [tap])
    message = str(raised.value)
    assert f"layer {tap!r} cannot be tapped" in message
    assert "does not have the model's own frames" in message
    assert "encoder." in message.split("nearest by name")[1]


@pytest.mark.parametrize("tap", ["encoder.cov", "", "model.encoder.conv"])
def test_unknown_layer_names_the_nearest(tap):
    with pytest.raises(
        ValueError, match=f"teacher has no layer {tap!r}; near.*[.]"
    ):
        Teacher(make_model(), [tap])


def test_layers_stand_one_after_another_in_the_order_given(batch):
    paths = ["head", "encoder.conv", "encoder"]
    teacher = Teacher(make_model(), paths)
    assert list(teacher.taps) == paths
    assert teacher.hidden_sizes == [SYMBOLS, 6, 6]
    alone = [Teacher(make_model(), [path])(*batch).hidden for path in paths]
    together = teacher(*batch).hidden
    assert together.shape == (3, 31, SYMBOLS + 12)
    assert torch.equal(together, torch.cat(alone, dim=-1))


def test_without_taps_there_is_no_hidden_representation(batch):
    bare, teacher = Teacher(make_model(), taps=()), Teacher(make_model())
    assert bare.hidden_sizes == []
    targets = bare(*batch)
    assert targets.hidden.shape == (3, 31, 0)
    assert targets.hidden.dtype == torch.float32
    assert torch.equal(targets.posteriors, teacher(*batch).posteriors)
    aligned = align(targets, targets.lengths // 2 + 1, 0.04)
    assert aligned.hidden.shape == (3, 16, 0)
    assert aligned.posteriors.shape == (3, 16, SYMBOLS)


class Merge(torch.nn.Module):
    """The teacher's symbols 0 and 1 are one of the student's."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, posteriors, lengths):
        first = posteriors[..., :2].sum(-1, keepdim=True)
        return self.scale * torch.cat([first, posteriors[..., 2:]], dim=-1)


def test_the_vocabulary_is_applied_to_the_posteriors(batch):
    teacher = Teacher(make_model(), vocabulary=Merge())
    assert teacher.symbols == SYMBOLS - 1
    targets, plain = teacher(*batch), Teacher(make_model())(*batch)
    assert torch.equal(targets.hidden, plain.hidden)
    expected = plain.posteriors[..., 0] + plain.posteriors[..., 1]
    torch.testing.assert_close(targets.posteriors[..., 0], expected)
    assert torch.equal(targets.posteriors[..., 1:], plain.posteriors[..., 2:])
    assert not any(p.requires_grad for p in teacher.parameters())


class NoHead(torch.nn.Module):
    """No scores for no symbols."""

    def forward(self, hidden):
        return hidden[..., :0]


def make_headless():
    model = make_model()
    model.head = NoHead()
    return model


@pytest.mark.parametrize("frame_period", [0.01, 0.02, 0.04])
def test_a_teacher_without_a_ctc_head_has_hidden_states(batch, frame_period):
    teacher, usual = Teacher(make_headless()), Teacher(make_model())
    assert teacher.symbols == 0 and teacher.hidden_sizes == [6]
    targets = teacher(*batch)
    assert targets.posteriors.shape == (3, 31, 0)
    lengths = ((targets.lengths - 1) * 0.02 / frame_period).long() + 1
    aligned = align(targets, lengths, frame_period)
    expected = align(usual(*batch), lengths, frame_period)
    assert torch.equal(aligned.hidden, expected.hidden)
    assert aligned.posteriors.shape == (*expected.posteriors.shape[:2], 0)
    projected = torch.zeros_like(aligned.hidden)
    for weighting in ("uniform", "energy"):
        loss = RepresentationLoss(weighting)
        assert loss(projected, aligned) == loss(projected, expected)
    with pytest.raises(ValueError, match="no CTC head.*uniform or energy"):
        RepresentationLoss("nonblank")(projected, aligned)
    with pytest.raises(ValueError, match="no CTC head.*softmax-level"):
        SoftmaxLoss()(torch.zeros_like(expected.posteriors), aligned)


def test_stays_in_evaluation_mode(batch):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    modules = torch.nn.ModuleDict(
        {"teacher": Teacher(model), "student": make_lstm()}
    )
    first = modules["teacher"](*batch)
    modules.train()
    assert modules["student"].training
    assert not any(m.training for m in modules["teacher"].modules())
    second = modules["teacher"](*batch)
    assert torch.equal(first.posteriors, second.posteriors)
    assert torch.equal(first.hidden, second.hidden)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_has_no_gradients_but_takes_part_in_the_students_graph(batch):
    teacher = Teacher(make_model())
    assert not any(p.requires_grad for p in teacher.parameters())
    targets = teacher(*batch)
    assert not targets.hidden.requires_grad
    assert not targets.hidden.is_inference()
    scale = torch.ones((), requires_grad=True)
    # Saves the targets for the backward pass, which inference mode forbids.
    ((scale * targets.hidden).sum() * scale).backward()
    assert scale.grad.isfinite()


def test_does_not_augment(batch):
    model = make_model()
    model.augment = lambda features, lengths: 1 / 0
    Teacher(model).train()(*batch)


def test_construction_leaves_the_seed_alone():
    model = make_model()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    Teacher(model)
    assert torch.equal(torch.rand(1), expected)


def test_leaves_no_hooks_behind(batch):
    teacher = Teacher(make_model(), ["encoder.conv"])
    teacher(*batch)
    with pytest.raises(AttributeError):
        teacher("not", "waveforms")
    assert not any(m._forward_hooks for m in teacher.modules())


def test_copy_is_independent(batch):
    teacher = Teacher(make_model(), ["encoder.conv"])
    twin = copy.deepcopy(teacher)
    with torch.no_grad():
        twin.model.encoder.conv.weight.zero_()
    assert not torch.equal(twin(*batch).hidden, teacher(*batch).hidden)


def test_hidden_survives_replaced_norm_layers(batch):
    teacher = Teacher(make_model(), ["encoder.norm"])
    expected = teacher(*batch).hidden
    teacher = torch.nn.SyncBatchNorm.convert_sync_batchnorm(teacher)
    torch.testing.assert_close(teacher(*batch).hidden, expected)


@pytest.mark.parametrize("tap", ["encoder", "encoder.conv", "head"])
def test_float32_under_autocast(batch, tap):
    teacher = Teacher(make_model(), [tap])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        targets = teacher(*batch)
    assert targets.hidden.dtype == targets.posteriors.dtype == torch.float32
    torch.testing.assert_close(targets.posteriors.sum(-1), torch.ones(3, 31))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_moves_to_the_gpu(batch):
    teacher = Teacher(make_model(), ["encoder.conv"])
    here = teacher(*batch)
    there = teacher.cuda()(*(x.cuda() for x in batch))
    torch.testing.assert_close(
        there.hidden.cpu(), here.hidden, rtol=1e-2, atol=1e-2
    )
    with torch.autocast("cuda", dtype=torch.float16):
        targets = teacher(*(x.cuda() for x in batch))
    assert targets.hidden.dtype == targets.posteriors.dtype == torch.float32


def test_weights_load(tmp_path):
    path = tmp_path / "model.ckpt"
    model, other = make_lstm(), make_lstm()
    with torch.no_grad():
        model.head.bias.fill_(7.0)
    torch.save(model.state_dict(), path)
    assert load_model_weights(other, path) is other
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


def drop_head(weights):
    del weights["head.weight"], weights["head.bias"]


def add_layer(weights):
    weights["encoder.more"] = torch.zeros(1)


def resize_head(weights):
    weights["head.bias"] = torch.zeros(SYMBOLS + 1)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (drop_head, "2 missing: head.weight, head.bias"),
        (add_layer, "1 unexpected: encoder.more"),
        (resize_head, r"1 of another shape: head.bias \(12,\) for \(11,\)"),
    ],
)
def test_weights_of_another_network(tmp_path, spoil, words):
    path = tmp_path / "model.ckpt"
    model = make_lstm()
    weights = copy.deepcopy(model.state_dict())
    for value in weights.values():
        value.zero_()
    spoil(weights)
    torch.save(weights, path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words) as raised:
        load_model_weights(model, path)
    assert str(path) in str(raised.value)
    assert raised.value.__cause__ is None
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_many_faults_are_counted_not_listed(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save(make_model().state_dict(), path)
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more"):
        load_model_weights(make_lstm(), path)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:500])


def make_empty(path):
    path.write_bytes(b"")


def make_text(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\n")


def make_code(path):
    torch.save({"model": Swap(0, 1)}, path)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["head.weight"]
    content[content.index(weight.numpy().tobytes()) + 1] ^= 1
    path.write_bytes(content)


def call_a_folder(path):
    """Of which torch gives what happens to lie in the memory."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        at = archive.start_dir
    # Its flag stands 38 bytes behind the beginning of each entry.
    while (at := content.find(b"PK\1\2", at)) >= 0:
        content[at + 38] |= 0x10
        at += 46
    path.write_bytes(content)


def pack(path):
    """A bomb, were it larger."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def write_long_ago(path):
    """The format before torch 1.6, which has no checksums."""
    weights = torch.load(path, weights_only=True)
    torch.save(weights, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    "spoil",
    [
        *(cut_short, make_empty, make_text, make_code),
        *(flip_a_bit, call_a_folder, pack, write_long_ago),
    ],
)
def test_unreadable_weights(tmp_path, spoil):
    path = tmp_path / "model.ckpt"
    model = make_lstm()
    torch.save(model.state_dict(), path)
    spoil(path)
    with pytest.raises(ValueError, match="cannot be read as model") as raised:
        load_model_weights(model, path)
    assert str(path) in str(raised.value)
    assert raised.value.__suppress_context__


@pytest.mark.parametrize(
    "odd",
    [
        5.0,
        torch.zeros(SYMBOLS, dtype=torch.int32),
        torch.zeros(SYMBOLS, dtype=torch.bool),
        torch.zeros(SYMBOLS, dtype=torch.complex64),
        torch.zeros(SYMBOLS).to_sparse(),
        torch.zeros(SYMBOLS, device="meta"),
    ],
    ids=str,
)
def test_weights_that_are_no_plain_numbers(tmp_path, odd):
    model, path = make_lstm(), tmp_path / "model.ckpt"
    name = "head.bias"
    if not isinstance(odd, torch.Tensor):
        # As a number, it has the right shape.
        name = next(
            k for k, value in model.state_dict().items() if not value.ndim
        )
    torch.save(model.state_dict() | {name: odd}, path)
    before = copy.deepcopy(model.state_dict())
    match = f"else than the numbers of a layer under 1 names: {name}"
    with pytest.raises(ValueError, match=match):
        load_model_weights(model, path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_file_of_something_else(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match="holds a Tensor, not model weights"):
        load_model_weights(make_lstm(), path)


def test_missing_file(tmp_path):
    for path in (tmp_path / "nothing.ckpt", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            load_model_weights(make_lstm(), path)
