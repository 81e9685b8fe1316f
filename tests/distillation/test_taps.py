"""Layers laid open: which can be, what comes out, and who learns from it."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tutornet_sb.distillation.taps import (
    Tap,
    encode_with_taps,
    find_stack,
    find_taps,
    list_layers,
    select_taps,
)
from tutornet_sb.networks.acoustic_model import AcousticModel, LogMelFeatures

SYMBOLS = 7


class Named(torch.nn.Module):
    """Returns a mapping, as the networks of transformers do."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(6, 5)

    def forward(self, x):
        return {"cache": None, "last": self.linear(x)}


class Skipped(torch.nn.Module):
    """Left out of every second pass in training, as under layer dropout."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(5, 5)
        self.passes = 0

    def forward(self, x):
        self.passes += self.training
        return x if self.passes % 2 else self.inner(x)


class Encoder(torch.nn.Module):
    """Frames of 10 ms, then of 40 ms, on each axis and in tuples."""

    stride = 4
    output_size = 5

    def __init__(self):
        super().__init__()
        self.early = torch.nn.Linear(8, 6)
        self.conv = torch.nn.Conv1d(6, 6, 5, stride=4, padding=2)
        self.inplace = torch.nn.ReLU(inplace=True)
        # As many frames as the model at some lengths, one less at others
        self.valid = torch.nn.Conv1d(6, 6, 3, stride=4)
        self.gru = torch.nn.GRU(6, 3, bidirectional=True)
        self.shared = torch.nn.Linear(6, 6)
        self.named = Named()
        self.skipped = Skipped()
        self.list = torch.nn.ModuleList([torch.nn.Linear(5, 5)])
        self.pooled = torch.nn.AdaptiveAvgPool1d(3)

    def forward(self, x, lengths):
        x = self.early(x).transpose(1, 2)
        self.valid(x)
        x = self.inplace(self.conv(x))
        self.pooled(x)
        x, _ = self.gru(x.permute(2, 0, 1))
        x = self.shared(self.shared(x.transpose(0, 1)))
        x = self.skipped(self.named(x)["last"])
        return self.list[0](x), (lengths - 1) // 4 + 1


def make_model():
    torch.manual_seed(0)
    head = torch.nn.Linear(5, SYMBOLS)
    return AcousticModel(LogMelFeatures(n_mels=8), Encoder(), head)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    wavs = torch.randn(3, 9600, generator=generator)
    return wavs, torch.tensor([1.0, 0.4, 0.75])


# ------------------------------------------------------------------ description


def test_taps_are_the_layers_with_the_models_frames_in_order():
    assert find_taps(make_model()) == {
        "encoder": Tap(1, 5),
        "encoder.conv": Tap(2, 6),
        "encoder.inplace": Tap(2, 6),
        "encoder.valid": Tap(2, 6),
        "encoder.gru": Tap(0, 6),
        "encoder.shared": Tap(1, 6),
        "encoder.named": Tap(1, 5),
        "encoder.named.linear": Tap(1, 5),
        "encoder.skipped": Tap(1, 5),
        "encoder.skipped.inner": Tap(1, 5),
        "encoder.list.0": Tap(1, 5),
        "head": Tap(1, SYMBOLS),
    }


def test_layers_are_described_whatever_their_rate():
    layers = {layer.path: layer for layer in list_layers(make_model())}
    described = {
        path: (layer.kind, layer.shape, layer.parameters)
        for path, layer in layers.items()
    }
    for path, expected in {
        "features": ("LogMelFeatures", ("batch", "frames", 8), 0),
        "encoder.early": ("Linear", ("batch", "frames", 6), 54),
        "encoder.conv": ("Conv1d", ("batch", 6, "frames"), 186),
        "encoder.gru": ("GRU", ("frames", "batch", 6), 198),
        "encoder.pooled": ("AdaptiveAvgPool1d", ("batch", 6, 3), 0),
        "encoder.list": ("ModuleList", None, 30),
        "encoder.named": ("Named", ("batch", "frames", 5), 35),
    }.items():
        assert described[path] == expected
    periods = {path: layer.frame_period for path, layer in layers.items()}
    assert periods["features"] == pytest.approx(0.01)
    assert periods["encoder.early"] == pytest.approx(0.01)
    assert periods["encoder.conv"] == pytest.approx(0.04)
    assert periods["encoder"] == pytest.approx(0.04)
    assert periods["encoder.pooled"] is periods["encoder.list"] is None


@pytest.mark.parametrize("sample_rate", [8000, 22050])
def test_other_sample_rates(sample_rate):
    model = make_model()
    model.features = LogMelFeatures(n_mels=8, sample_rate=sample_rate)
    layers = {layer.path: layer for layer in list_layers(model)}
    hop = model.features.hop_samples / sample_rate
    assert layers["encoder.early"].frame_period == pytest.approx(hop)
    assert layers["encoder"].frame_period == pytest.approx(4 * hop)
    assert layers["encoder.conv"].tap == Tap(2, 6)


def test_looking_leaves_modes_statistics_and_seed_as_they_were():
    model = make_model()
    model.encoder.inplace = torch.nn.BatchNorm1d(6)
    model.train()
    model.encoder.gru.eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    find_taps(model)
    assert torch.equal(torch.rand(1), expected)
    assert [module.training for module in model.modules()] == modes
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_without_any_symbol_is_no_tap():
    class NoHead(torch.nn.Module):
        def forward(self, hidden):
            return hidden[..., :0]

    model = make_model()
    model.head = NoHead()
    assert "head" not in find_taps(model)


@pytest.mark.parametrize("owner", ["teacher", "student"])
def test_errors_say_whose_layer_it_is_and_name_the_nearest(owner):
    model = make_model()
    with pytest.raises(ValueError, match=f"{owner} has no layer 'encoder.gur'"):
        select_taps(model, ["encoder.gur"], owner)
    with pytest.raises(ValueError) as raised:
        select_taps(model, ["encoder", "encoder.early"], owner)
    message = str(raised.value)
    assert f"the {owner}'s layer 'encoder.early' cannot be tapped" in message
    assert "encoder.named" in message


# --------------------------------------------------------------------- outputs

PATHS = ["encoder.named", "encoder.conv", "encoder", "encoder.gru", "head"]


def test_outputs_are_those_of_the_layers_frames_second(batch):
    model = make_model().eval()
    taps = select_taps(model, PATHS, "student")
    seen = {}

    def hook(path):
        def keep(layer, inputs, output):
            seen[path] = output

        return keep

    for path in PATHS:
        model.get_submodule(path).register_forward_hook(hook(path))
    encoding, hidden = encode_with_taps(model, taps, *batch)
    # The layer after works in place, so this one is computed again.
    x, _ = model.features(*batch)
    x = model.encoder.conv(model.encoder.early(x).transpose(1, 2))
    expected = {
        "encoder.named": seen["encoder.named"]["last"],
        "encoder.conv": x.transpose(1, 2),
        "encoder": seen["encoder"][0],
        "encoder.gru": seen["encoder.gru"][0].transpose(0, 1),
        "head": seen["head"],
    }
    assert (hidden[1] < 0).any()
    for path, output in zip(PATHS, hidden, strict=True):
        assert torch.equal(output, expected[path]), path
    plain = model(*batch)
    assert all(map(torch.equal, encoding, plain))
    assert torch.equal(hidden[2], plain.hidden)


def test_one_pass_is_enough(batch):
    model = make_model().eval()
    taps = select_taps(model, ["encoder", "encoder.conv"], "student")
    calls = []
    model.features.register_forward_hook(lambda *args: calls.append(args))
    encode_with_taps(model, taps, *batch)
    assert len(calls) == 1
    assert len(model.features._forward_hooks) == 1
    others = [m for m in model.modules() if m is not model.features]
    assert not any(module._forward_hooks for module in others)


def test_of_several_calls_the_last_counts(batch):
    model = make_model().eval()
    taps = select_taps(model, ["encoder.shared"], "student")
    outputs = []
    model.encoder.shared.register_forward_hook(
        lambda layer, inputs, output: outputs.append(output)
    )
    _, (hidden,) = encode_with_taps(model, taps, *batch)
    assert len(outputs) == 2
    assert torch.equal(hidden, outputs[1])


def test_gradients_reach_what_is_below_the_tap_and_nothing_else(batch):
    model = make_model().eval()
    taps = select_taps(model, ["encoder.gru"], "student")
    _, (hidden,) = encode_with_taps(model, taps, *batch)
    hidden.square().sum().backward()
    reached = {
        name.rpartition(".")[0]
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert reached == {"encoder.early", "encoder.conv", "encoder.gru"}


def test_a_layer_left_out_of_a_pass_is_named(batch):
    model = make_model().train()
    taps = select_taps(model, ["encoder.skipped.inner"], "student")
    with pytest.raises(ValueError, match="'encoder.skipped.inner' took no pa"):
        encode_with_taps(model, taps, *batch)
    assert not any(module._forward_hooks for module in model.modules())
    encode_with_taps(model, taps, *batch)


def test_a_layer_with_other_frames_after_all_is_named(batch):
    model = make_model().eval()
    taps = select_taps(model, ["encoder.valid"], "student")
    wavs, wav_lens = batch
    # 59 frames of 10 ms, then 61
    _, (hidden,) = encode_with_taps(model, taps, wavs[:, :9280], wav_lens)
    assert hidden.shape[1] == 15
    with pytest.raises(
        ValueError, match="has 15 frames where the model has 16"
    ):
        encode_with_taps(model, taps, wavs, wav_lens)


# --------------------------------------------------------------- distributed


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_under_ddp_the_gradients_are_the_same_step_after_step(
    batch, process_group
):
    """The layers above the tap get no gradient, which DDP must find out."""
    paths = ["encoder.conv", "encoder.gru"]
    plain, inner = make_model().eval(), make_model().eval()
    wrapped = DistributedDataParallel(inner, find_unused_parameters=True)
    taps = select_taps(inner, paths, "student")
    for step in range(3):
        for model in (plain, wrapped):
            model.zero_grad()
            _, hidden = encode_with_taps(model, taps, step + batch[0], batch[1])
            sum(h.square().sum() for h in hidden).backward()
        for (name, a), b in zip(
            plain.named_parameters(), inner.parameters(), strict=True
        ):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad)
    assert inner.encoder.gru.weight_ih_l0.grad.abs().sum() > 0
    assert inner.head.weight.grad is None


# ----------------------------------------------------------------------- stacks


class Stacked(torch.nn.Module):
    """Named modules, one after the other, each of a row of layers."""

    def __init__(self, **rows):
        super().__init__()
        self.output_size = 8
        self.stride = 1
        for name, layer in rows.items():
            self.add_module(name, layer)

    def forward(self, x, lengths):
        for layer in self.children():
            x = layer(x)
        return x, lengths


def row(*layers):
    return torch.nn.Sequential(*layers)


def stack_of(**rows):
    encoder = Stacked(**rows)
    head = torch.nn.Linear(8, SYMBOLS)
    model = AcousticModel(LogMelFeatures(n_mels=8), encoder, head)
    return find_stack(model)


def linear():
    return torch.nn.Linear(8, 8)


def test_the_row_of_layers_nearest_the_top_is_the_stack():
    inner = [row(linear(), linear(), linear()) for _ in range(2)]
    assert stack_of(blocks=row(*inner)) == [
        "encoder.blocks.0",
        "encoder.blocks.1",
    ]


def test_of_rows_beside_each_other_the_longest_is_the_stack():
    found = stack_of(
        front=row(linear(), linear()),
        layers=row(linear(), linear(), linear()),
        back=row(linear(), linear()),
    )
    assert found == [f"encoder.layers.{index}" for index in range(3)]


def test_of_rows_alike_the_last_is_the_stack():
    found = stack_of(a=row(linear(), linear()), b=row(linear(), linear()))
    assert found == ["encoder.b.0", "encoder.b.1"]


def test_numbers_may_follow_an_underscore_but_no_letter():
    named = {f"block_{index}": linear() for index in range(3)}
    assert stack_of(**named) == [f"encoder.block_{i}" for i in range(3)]
    assert stack_of(norm1=linear(), norm2=linear(), norm3=linear()) == []


def test_a_single_layer_is_no_stack():
    assert stack_of(blocks=row(linear()), conv=linear()) == []
