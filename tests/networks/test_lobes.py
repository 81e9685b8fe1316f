"""SpeechBrain's lobes as encoders: lengths, padding, positions, failures."""

import copy
import pickle
from functools import partial

import pytest
import torch
from speechbrain.lobes.models.ContextNet import ContextNet
from speechbrain.lobes.models.convolution import ConvolutionFrontEnd
from speechbrain.lobes.models.CRDNN import CRDNN
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR
from speechbrain.nnet.CNN import Conv1d, Conv2d
from speechbrain.nnet.RNN import GRU, LSTM, LiGRU

from tutornet_sb.networks.lobes import ContextNetEncoder, CRDNNEncoder
from tutornet_sb.networks.transformer import TransformerEncoder

MELS = 12
# Every remainder of a stride, the shortest possible, and none as long as the
# batch, which has three frames of padding throughout.
LENGTHS = torch.tensor([30, 29, 28, 27, 10, 4, 1])
FRAMES = 33


def front_end(strides=(2, 2), **options):
    options = {
        "num_layers_per_block": 2,
        "kernel_sizes": [3, 5, 3],
        "residuals": [True, False, False],
        **options,
    }
    return ConvolutionFrontEnd(
        [None, None, MELS],
        num_blocks=len(strides),
        out_channels=[6, 4, 4],
        strides=list(strides),
        **options,
    )


def transformer(kind, strides=(2, 2), attention="RelPosMHAXL", **options):
    layers = partial(
        TransformerASR,
        d_model=16,
        nhead=2,
        num_encoder_layers=2,
        d_ffn=24,
        csgu_linear_units=24,
        kernel_size=15,
        encoder_module=kind,
        attention_type=attention,
        normalize_before=True,
        causal=False,
        **options,
    )
    return TransformerEncoder(front_end(strides), layers)


def crdnn(size=4, **options):
    options = {
        "cnn_channels": [4, 6],
        "rnn_class": LSTM,
        "rnn_layers": 2,
        "rnn_neurons": 7,
        "dnn_neurons": 9,
        "time_pooling": size > 1,
        "time_pooling_size": size,
        **options,
    }
    return CRDNNEncoder(CRDNN(input_shape=[None, None, MELS], **options))


def contextnet(strides=(1, 2, 2), **options):
    return ContextNetEncoder(
        ContextNet(
            [1, 64, MELS],
            out_channels=10,
            conv_channels=[8, 8, 12],
            strides=list(strides),
            num_blocks=3,
            num_layers=2,
            kernel_size=5,
            inner_dim=4,
            **options,
        )
    )


ENCODERS = {
    "conformer": partial(transformer, "conformer"),
    "branchformer": partial(transformer, "branchformer"),
    "transformer": partial(transformer, "transformer", attention="regularMHA"),
    "crdnn": crdnn,
    "contextnet": contextnet,
}
VARIANTS = {
    **ENCODERS,
    "conformer 20 ms": partial(transformer, "conformer", (2, 1)),
    "conformer 80 ms": partial(transformer, "conformer", (2, 2, 2)),
    "conformer absolute": partial(
        transformer, "conformer", attention="regularMHA"
    ),
    "conformer rotary": partial(transformer, "conformer", attention="RoPEMHA"),
    "crdnn 10 ms": partial(crdnn, 1),
    "crdnn 30 ms": partial(crdnn, 3),
    "crdnn gru": partial(crdnn, 2, rnn_class=GRU, projection_dim=8),
    "crdnn one way": partial(crdnn, rnn_bidirectional=False),
    "crdnn without dnn": partial(crdnn, dnn_blocks=0),
    "contextnet 80 ms": partial(contextnet, (2, 2, 2)),
}
STRIDES = {
    **dict.fromkeys(VARIANTS, 4),
    "conformer 20 ms": 2,
    "conformer 80 ms": 8,
    "crdnn 10 ms": 1,
    "crdnn 30 ms": 3,
    "crdnn gru": 2,
    "contextnet 80 ms": 8,
}


def ready(encoder):
    """Put an encoder in eval, no parameter or statistic at its initial zero."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in encoder.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif name.endswith(("bias", "running_mean")):
            tensor.normal_(0, 0.5, generator=generator)
    return encoder.eval()


def batch():
    """Features that are not zero on padded frames, as SpecAugment leaves."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(LENGTHS), FRAMES, MELS, generator=generator)
    x[torch.arange(FRAMES) >= LENGTHS[:, None]] = 9.0
    return x


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_padding_does_not_change_a_result(name):
    encoder = ready(VARIANTS[name]())
    x = batch()
    hidden, lengths = encoder(x, LENGTHS)
    stride = STRIDES[name]
    assert encoder.stride == stride
    assert lengths.tolist() == [-(-n // stride) for n in LENGTHS.tolist()]
    assert hidden.shape == (7, -(-FRAMES // stride), encoder.output_size)
    for index, length in enumerate(LENGTHS):
        alone, out = encoder(x[index : index + 1, :length], length[None])
        # The module's own number of frames is the number of valid frames.
        assert alone.shape[1] == out.item() == lengths[index].item()
        valid = hidden[index, : lengths[index]]
        torch.testing.assert_close(valid, alone[0], rtol=1e-4, atol=1e-5)
        assert not hidden[index, lengths[index] :].any()
        assert valid.std() > 0.01


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_a_full_batch_is_encoded_as_by_the_lobe(name):
    """Hooks change nothing where there is no padding to hide."""
    encoder = ready(ENCODERS[name]())
    x = torch.randn(2, 40, MELS)
    hidden, _ = encoder(x, torch.tensor([40, 40]))
    stock = copy.deepcopy(encoder)
    for module in stock.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    if name == "crdnn":
        expected = stock.crdnn(x)
    elif name == "contextnet":
        expected = stock.contextnet(x)
    else:
        expected = stock.transformer.encode(stock.front_end(x))
    torch.testing.assert_close(hidden, expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_reach_every_parameter_and_no_padding(name):
    encoder = ENCODERS[name]()
    x = batch().requires_grad_()
    hidden, lengths = encoder(x, LENGTHS)
    (hidden * torch.randn_like(hidden)).sum().backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key
    padding = torch.arange(FRAMES) >= LENGTHS[:, None]
    assert x.grad[~padding].any()
    assert not x.grad[padding].any()


@pytest.mark.parametrize("name", ENCODERS)
def test_dropout_is_for_training(name):
    encoder = ENCODERS[name]()
    x = batch()
    one, two = (encoder(x, LENGTHS)[0] for _ in range(2))
    assert not torch.allclose(one, two)
    encoder.eval()
    one, two = (encoder(x, LENGTHS)[0] for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("name", ENCODERS)
def test_bfloat16_is_close_and_finite(name):
    encoder = ready(ENCODERS[name]())
    x = batch()
    expected, _ = encoder(x, LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        hidden, _ = encoder(x, LENGTHS)
    hidden.float().square().sum().backward()
    error = (hidden.float() - expected).norm() / expected.norm()
    assert 0 < error < 0.05
    for key, parameter in encoder.named_parameters():
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ENCODERS)
def test_an_utterance_without_frames_does_not_spoil_the_others(name):
    encoder = ENCODERS[name]()
    lengths = torch.tensor([9, 0])
    hidden, out = encoder(batch()[:2, :9], lengths)
    assert out.tolist() == [-(-9 // encoder.stride), 0]
    assert not hidden[1].any()
    hidden.square().sum().backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ENCODERS)
def test_one_frame_alone(name):
    encoder = ready(ENCODERS[name]())
    hidden, lengths = encoder(batch()[:1, :1], torch.tensor([1]))
    assert hidden.shape == (1, 1, encoder.output_size)
    assert lengths.tolist() == [1]
    assert hidden.isfinite().all()


@torch.no_grad()
def test_a_length_survives_its_way_as_a_fraction():
    # 13 / 22 * 22 is less than 13 in single precision.
    assert int(torch.tensor(13) / 22 * 22) == 12
    encoder = ready(crdnn(1))
    x = torch.randn(1, 22, MELS)
    hidden, _ = encoder(x, torch.tensor([13]))
    alone, _ = encoder(x[:, :13], torch.tensor([13]))
    torch.testing.assert_close(hidden[:, :13], alone, rtol=1e-4, atol=1e-5)


def centre(network, x, frame):
    """Middle of the input frames that one output frame depends on."""
    x = x.requires_grad_()
    y = network(x)[:, frame]
    (grad,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), x)
    seen = grad[0].abs().sum(-1).nonzero().flatten()
    assert len(seen) < x.shape[1] - 2  # not cut off at an end
    return (seen.min() + seen.max()).item() / 2


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_convolutions_keep_the_middle_of_a_frame_at_its_time(stride):
    x = torch.randn(1, 401, MELS)
    strides = {2: (2, 1), 4: (2, 2), 8: (2, 2, 2)}[stride]
    encoder = transformer("conformer", strides).eval()
    assert centre(encoder.front_end, x, 200 // stride) == 200

    strides = {2: (1, 2, 1), 4: (1, 2, 2), 8: (2, 2, 2)}[stride]
    encoder = contextnet(strides, se_activation=torch.nn.Identity).eval()
    for block in ("block_0", "block_1", "block_2"):
        # Without its average over the utterance.
        encoder.contextnet[block].SE = torch.nn.Identity()
    assert centre(encoder.contextnet, x, 200 // stride) == 200


@pytest.mark.parametrize("size", [1, 2, 4])
def test_pooling_moves_the_middle_of_a_frame(size):
    encoder = crdnn(size).eval()
    pooling = encoder.crdnn["time_pooling"] if size > 1 else None
    if pooling is not None:
        # An average depends on all its frames, a maximum on one.
        pooling.pool_layer = torch.nn.AvgPool2d((1, size))
    network = torch.nn.Sequential(encoder.crdnn["CNN"])
    if pooling is not None:
        network.append(pooling)
    frame = 48 // size
    x = torch.randn(1, 101, MELS)
    assert centre(network, x, frame) == 48 + (size - 1) / 2


def test_an_utterance_beyond_the_table_of_positions():
    encoder = transformer(
        "transformer", attention="regularMHA", max_length=5
    ).eval()
    x = torch.randn(1, 21, MELS)
    hidden, _ = encoder(x[:, :20], torch.tensor([20]))
    assert hidden.shape[1] == 5
    with pytest.raises(ValueError, match="6 frames .* raise max_length"):
        encoder(x, torch.tensor([21]))
    # Relative positions have no table.
    encoder = transformer("conformer", max_length=5).eval()
    hidden, _ = encoder(x, torch.tensor([21]))
    assert hidden.shape[1] == 6
    assert not any(".pe" in key for key in encoder.state_dict())


@pytest.mark.parametrize("attention", ["regularMHA", "RelPosMHAXL", "RoPEMHA"])
@torch.no_grad()
def test_positions_matter(attention):
    encoder = ready(transformer("transformer", attention=attention))
    layers = encoder.transformer
    x = torch.randn(1, 6, layers.custom_src_module.layers[0].w.in_features)
    order = [3, 0, 5, 1, 2, 4]
    shuffled = layers.encode(x[:, order])
    assert (layers.encode(x)[:, order] - shuffled).abs().max() > 1e-2


def test_statistics_start_afresh():
    for encoder in (crdnn(), contextnet()):
        found = 0
        for key, tensor in encoder.state_dict().items():
            if key.endswith("running_var"):
                assert (tensor == 1).all(), key
                found += 1
            elif key.endswith(("running_mean", "num_batches_tracked")):
                assert not tensor.any(), key
        assert found


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_copies_hide_their_own_padding(name):
    encoder = ready(ENCODERS[name]())
    x = batch()
    expected, _ = encoder(x, LENGTHS)
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(twin(x, LENGTHS)[0], expected)


def test_an_error_within_leaves_the_encoder_usable():
    encoder = ready(transformer("conformer"))
    x = batch()
    expected, _ = encoder(x, LENGTHS)
    with pytest.raises(RuntimeError):
        encoder(x[:, :, :-1], LENGTHS)
    assert encoder._lengths is None
    assert torch.equal(encoder(x, LENGTHS)[0], expected)


def test_wrong_lobes_are_named():
    with pytest.raises(ValueError, match="LSTM, GRU or RNN, got LiGRU"):
        crdnn(rnn_class=LiGRU)
    with pytest.raises(ValueError, match="using_2d_pooling must be false"):
        crdnn(1, using_2d_pooling=True)
    plain = {"residuals": [False, False], "num_layers_per_block": 1}
    plain["kernel_sizes"] = [3, 3]
    for options in ({"padding": "valid"}, {"dilations": [2, 2]}):
        with pytest.raises(ValueError, match="conv_.: padding must be 'same'"):
            TransformerEncoder(front_end(**plain, **options), None)


def test_every_wide_convolution_is_hooked():
    for build in ENCODERS.values():
        for name, module in build().named_modules():
            if isinstance(module, (Conv1d, Conv2d)):
                wide = module.conv.kernel_size[-1] > 1
                assert module.padding_mode == "constant"
                assert bool(module._forward_pre_hooks) == wide, name
