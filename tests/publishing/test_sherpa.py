"""Models as sherpa-onnx loads them, by onnxruntime and by sherpa-onnx."""

import numpy as np
import onnxruntime
import pytest
import torch
from small_runs import RATE, RECURRENT, make_speech, write_run

from tutornet_sb.corpora.tokenizer import pieces
from tutornet_sb.networks import runs
from tutornet_sb.networks.streaming import Stream
from tutornet_sb.publishing.sherpa import (
    PIECE,
    OnlineGraph,
    load_sherpa,
    write_sherpa,
    write_tokens,
)

ONLINE = "OnlineRecognizer.from_t_one_ctc"
OFFLINE = "OfflineRecognizer.from_omnilingual_asr_ctc"
# Kernels, strides, cells and depths: pieces of 15 frames end within a step of
# the convolution or not.
STREAMING = {
    "lstm": {"kernel_size": 11, "stride": 2, "layers": 2, "cell": "lstm"},
    "gru": {"kernel_size": 7, "stride": 2, "layers": 1, "cell": "gru"},
    "third": {"kernel_size": 5, "stride": 3, "layers": 1, "cell": "lstm"},
    "fourth": {"kernel_size": 9, "stride": 4, "layers": 3, "cell": "gru"},
    "every": {"kernel_size": 3, "stride": 1, "layers": 1, "cell": "lstm"},
}


def make_run(folder, name, values, rate=RATE):
    """A model with random weights and its symbols."""
    write_run(folder, name, {**RECURRENT, **values}, rate)
    model, tokenizer = runs.load_run(folder)
    return model.eval(), tokenizer


def in_16_bits(wav):
    """What sherpa-onnx makes of samples: 16 bits, cut off."""
    return np.trunc(np.clip(wav, -1, 1) * 32767).astype(np.int32)


def round_to_16_bits(wav):
    return torch.from_numpy(np.round(wav.numpy() * 32768) / 32768).float()


def stretch(wav):
    """Without the samples that the cut-off makes one with zero."""
    return torch.where(wav.abs() < 1.5 / 32768, 2 / 32768, wav)


# ------------------------------------------------------- the graph of a stream


@pytest.mark.parametrize(
    ("gain", "offset"),
    [pytest.param(1, 0, marks=pytest.mark.slow), (0.05, 0.05)],
)
@pytest.mark.parametrize("name", STREAMING)
def test_pieces_are_those_of_a_stream(name, gain, offset, tmp_path):
    model, _ = make_run(tmp_path / "run", "lstm_streaming", STREAMING[name])
    assert write_sherpa(model, tmp_path / "m.onnx") == ONLINE
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    known = session.get_modelmeta().custom_metadata_map
    state = np.zeros((1, int(known["state_dim"])), dtype=np.float16)
    assert known["frame_length_ms"] == "300"
    wav = stretch(round_to_16_bits(gain * make_speech(3, 3.2) + offset))
    stream, count = Stream(model), 0
    steps = -(-15 // model.encoder.stride)
    for start in range(0, len(wav) - PIECE + 1, PIECE):
        piece = wav[start : start + PIECE]
        expected = stream.accept(piece.unsqueeze(0))[0]
        found, state = session.run(
            None,
            {
                "samples": in_16_bits(piece.numpy())[None, :, None],
                "state": state,
            },
        )
        assert found.shape == (1, steps, 29) and state.dtype == np.float16
        fresh, repeated = found[0][: len(expected)], found[0][len(expected) :]
        np.testing.assert_allclose(fresh, expected.numpy(), atol=2e-3)
        # What fills the piece is its last frame once more.
        np.testing.assert_allclose(
            repeated, np.repeat(fresh[-1:], len(repeated), 0), atol=1e-6
        )
        count += len(expected)
    assert count > 40


def test_streams_of_a_batch_do_not_mix(tmp_path):
    model, _ = make_run(tmp_path / "run", "gru_streaming", {})
    graph = OnlineGraph(model).eval()
    pieces_of = [
        torch.from_numpy(in_16_bits(make_speech(seed, 0.6).numpy()))
        .int()
        .view(-1, PIECE, 1)
        for seed in range(2)
    ]
    expected = []
    with torch.no_grad():
        for pieces in pieces_of:
            state = torch.zeros(1, graph.state_size).half()
            outputs = []
            for piece in pieces:
                output, state = graph(piece.unsqueeze(0), state)
                outputs.append(output)
            expected.append(outputs)
        # The second stream begins a piece later.
        state = torch.zeros(2, graph.state_size).half()
        first, state[:1] = graph(pieces_of[0][:1], state[:1])
        assert torch.equal(first, expected[0][0])
        for step in range(1, 4):
            piece = torch.stack([pieces_of[0][step], pieces_of[1][step - 1]])
            output, state = graph(piece, state)
            for row, outputs in enumerate(expected):
                torch.testing.assert_close(
                    output[row], outputs[step - row][0], atol=1e-4, rtol=0
                )


def test_the_graph_leaves_the_model_as_it_was(tmp_path):
    model, _ = make_run(tmp_path / "run", "lstm_streaming", {})
    wav = make_speech(1, 0.5).unsqueeze(0)
    before = model(wav, torch.ones(1)).logits
    OnlineGraph(model)
    assert torch.equal(model(wav, torch.ones(1)).logits, before)


def test_what_does_not_fit_the_pieces_is_refused(tmp_path):
    model, _ = make_run(tmp_path / "run", "lstm_streaming", {})
    model.features.stft.hop_length = 161
    with pytest.raises(ValueError, match="161 samples.* do not fit"):
        OnlineGraph(model)
    model, _ = make_run(tmp_path / "8k", "lstm_streaming", {}, 8000)
    # Windows of 25 ms every 10 ms
    with pytest.raises(ValueError, match="reach 100 samples"):
        OnlineGraph(model)
    with pytest.raises(ValueError, match="got 8000 Hz"):
        write_sherpa(model, tmp_path / "m.onnx")


# ------------------------------------------------- the graph of an utterance


@pytest.mark.parametrize("gain", [0.02, 0.3, 1.0])
def test_scaling_and_centring_of_utterances_makes_no_difference(gain, tmp_path):
    model, _ = make_run(tmp_path / "run", "lstm", {})
    assert write_sherpa(model, tmp_path / "m.onnx") == OFFLINE
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    wav = gain * make_speech(4, 1.3) + 0.05
    with torch.no_grad():
        logits = model(wav.unsqueeze(0), torch.ones(1)).logits
    # As the recogniser does, in single precision
    x = wav.numpy()
    x = (x - x.mean()) / np.sqrt(x.var() + np.float32(1e-5))
    (found,) = session.run(None, {"x": x[None]})
    np.testing.assert_allclose(found, logits.log_softmax(-1).numpy(), atol=2e-3)


# ----------------------------------------------------------- sherpa-onnx itself


@pytest.mark.parametrize(
    "network", ["lstm_streaming", "gru_streaming", "lstm", "jasper_mini"]
)
def test_sherpa_says_the_same(network, tmp_path):
    values = {} if network.startswith("jasper") else RECURRENT
    write_run(tmp_path / "run", network, values)
    model, tokenizer = runs.load_run(tmp_path / "run")
    model.eval()
    constructor = write_sherpa(model, tmp_path / "m.onnx")
    symbols = pieces(tokenizer)
    write_tokens(tmp_path / "tokens.txt", symbols, 0)
    transcribe = load_sherpa(
        constructor, tmp_path / "m.onnx", tmp_path / "tokens.txt"
    )
    is_online = constructor == ONLINE
    assert is_online == network.endswith("streaming")
    same, texts = 0, set()
    for seed in range(8):
        wav = stretch(round_to_16_bits(make_speech(seed, 0.9 + 0.1 * seed)))
        if is_online:
            # Beyond the end a stream goes on with silence.
            tail = torch.zeros(3 * PIECE)
            whole = torch.cat([wav, tail])
            whole = whole[: len(whole) // PIECE * PIECE - PIECE]
            log_probs = Stream(model).accept(whole.unsqueeze(0))[0]
        else:
            with torch.no_grad():
                log_probs = model(wav.unsqueeze(0), torch.ones(1)).logits[0]
        best = log_probs.argmax(-1).unique_consecutive().tolist()
        expected = "".join(symbols[i] for i in best if i)
        expected = " ".join(expected.replace("▁", " ").split())
        found = transcribe(wav.numpy())
        same += found == expected
        texts.add(expected)
    assert len(texts) > 2
    # Random networks are sensitive to differences that trained ones tolerate.
    assert same >= 6
