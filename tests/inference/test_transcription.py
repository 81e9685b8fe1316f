"""Audio to text: against plain loops, whole utterances and broken files."""

import json
import math
import resource
import shutil
from types import SimpleNamespace

import jiwer
import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
import torchaudio
from hypothesis import given
from hypothesis import strategies as st
from small_runs import (
    BLOCKS,
    RATE,
    RECURRENT,
    make_speech,
    write_onnx,
    write_run,
)
from typer.testing import CliRunner

from tutornet_sb.cli import app
from tutornet_sb.corpora.audio import ratio_of, resampler
from tutornet_sb.inference import runner, transcription
from tutornet_sb.inference.latency import align_symbols
from tutornet_sb.inference.recogniser import Recogniser, load_recogniser
from tutornet_sb.inference.transcription import (
    Failure,
    FileDecoder,
    find_audio,
    make_searcher,
    read_audio,
    read_references,
    spell,
    transcribe,
)
from tutornet_sb.networks import runs
from tutornet_sb.networks.acoustic_model import SpectralFeatures
from tutornet_sb.publishing.export import export
from tutornet_sb.teachers import pseudo_labels
from tutornet_sb.teachers.sources import load_teacher
from tutornet_sb.training.ctc import CTCBrain

NETWORKS = {
    "lstm": RECURRENT,
    "lstm_streaming": RECURRENT,
    "jasper_mini": {"blocks": BLOCKS, "encoder_size": 8},
}
SECONDS = [0.7, 1.13, 0.42, 0.9, 0.055, 2.0]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Runs, their exports, and speech."""
    folder = tmp_path_factory.mktemp("transcription")
    for name, values in NETWORKS.items():
        write_run(folder / "runs" / name, name, values)
        export(folder / "runs" / name, folder / name)
    audio = folder / "audio"
    audio.mkdir()
    for index, seconds in enumerate(SECONDS):
        write(audio / f"{index}.wav", make_speech(index, seconds))
    return folder


@pytest.fixture(params=NETWORKS)
def its(request, world):
    return SimpleNamespace(
        run=world / "runs" / request.param,
        export=world / request.param,
        audio=sorted((world / "audio").iterdir()),
    )


def write(path, wav, rate=RATE, subtype="FLOAT"):
    soundfile.write(path, np.asarray(wav), rate, subtype=subtype)
    return path


def invoke(*arguments):
    return CliRunner().invoke(app, ["transcribe", *map(str, arguments)])


def refused(*arguments):
    """The only line of standard error."""
    result = invoke(*arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("tutornet transcribe: ")
    assert result.stdout == ""
    return line


def one(*arguments, **options):
    (result,) = transcribe(*arguments, **options)
    return result


# ------------------------------------------------------------------ greedily


@pytest.mark.parametrize("batch_seconds", [0.1, 1.5, 60.0])
def test_the_text_is_that_of_an_evaluation_in_the_recipe(its, batch_seconds):
    model, tokenizer = runs.load_run(its.run)
    hparams = {"tokenizer": tokenizer, "blank_index": 0}
    brain = CTCBrain({"student": model.eval()}, hparams=hparams)
    brain.on_stage_start(sb.Stage.TEST)
    for path in its.audio:
        wav = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        with torch.no_grad():
            encoding = model(wav.unsqueeze(0), torch.ones(1))
        batch = SimpleNamespace(id=[str(path)], wrd=["A"])
        brain.transcribe(encoding, batch, sb.Stage.TEST)
    expected = brain.hypotheses
    assert len(set(expected.values())) == len(expected)
    for model in (its.run, its.export):
        results = list(
            transcribe(load_recogniser(model), its.audio, batch_seconds)
        )
        # In the order given, however they were batched
        assert [r.file for r in results] == [str(path) for path in its.audio]
        assert {r.file: r.text for r in results} == expected
        assert [r.duration for r in results] == pytest.approx(SECONDS)
        for r in results:
            assert r.text == " ".join(word.word for word in r.words)


def test_the_confidence_is_that_of_pseudo_labels(its):
    teacher = load_teacher(its.run)
    results = transcribe(load_recogniser(its.export), its.audio)
    for path, result in zip(its.audio, results, strict=True):
        wav = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        ((_, expected),) = pseudo_labels.transcribe(
            teacher, wav.unsqueeze(0), torch.ones(1)
        )
        assert result.confidence == pytest.approx(expected, rel=1e-3)


PIECES = ["<blank>", "▁", "A", "B", "▁C"]


def recogniser_of(pieces=PIECES, encode=None, **values):
    def decode(ids):
        return "".join(pieces[i] for i in ids).replace("▁", " ").strip()

    values = {"sample_rate": RATE, "frame_period": 0.02} | values
    return Recogniser(
        "made up",
        "onnx",
        pieces=pieces,
        blank_index=0,
        decode=decode,
        encode=encode,
        **values,
    )


def random_frames(seed, frames, symbols=5, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(frames, symbols, generator=generator)
    return logits.log_softmax(-1)


def read_by_hand(log_probs):
    """Words of the greedy path as (word, start, end, confidence), frames."""
    symbols = []
    for frame, row in enumerate(log_probs.tolist()):
        label = row.index(max(row))
        if symbols and symbols[-1][0] == label and symbols[-1][2] == frame - 1:
            symbols[-1][2] = frame
            symbols[-1][3] = max(symbols[-1][3], max(row))
        elif label:
            symbols.append([label, frame, frame, max(row)])
    words = []
    is_new = True
    for label, first, last, log in symbols:
        if PIECES[label] == "▁":
            is_new = True
            continue
        if PIECES[label] == "▁C" or is_new:
            words.append(["", first, last, []])
        is_new = False
        words[-1][0] += PIECES[label].strip("▁")
        words[-1][2] = last
        words[-1][3].append(log)
    return [
        (text, first, last + 1, math.exp(sum(logs) / len(logs)))
        for text, first, last, logs in words
    ]


@pytest.mark.parametrize("seed", range(8))
def test_words_and_their_times_are_read_from_the_path(seed, monkeypatch):
    log_probs = random_frames(seed, frames=90)
    expected = read_by_hand(log_probs)
    assert len(expected) > 5
    # At once; frame by frame; and in segments of 8 frames, so that symbols lie
    # across all borders
    for sizes, segment in (([90], 60), ([1] * 90, 60), ([7, 1, 40, 42], 0.16)):
        monkeypatch.setattr(transcription, "_SEGMENT", segment)
        decoder = FileDecoder(recogniser_of())
        for part in log_probs.split(sizes):
            decoder.accept(part)
        found = decoder.finish("x", duration=1.8)
        assert found.text == " ".join(text for text, *_ in expected)
        for word, (text, start, end, confidence) in zip(
            found.words, expected, strict=True
        ):
            assert word.word == text
            assert word.start == pytest.approx(0.02 * start)
            assert word.end == pytest.approx(0.02 * end)
            assert word.confidence == pytest.approx(confidence, rel=1e-5)


def test_the_greedy_path_is_the_alignment_of_what_it_says():
    for seed in range(20):
        log_probs = random_frames(seed, frames=40)
        decoder = FileDecoder(recogniser_of())
        decoder.accept(log_probs)
        ids = [symbol for symbol, *_ in decoder._greedy]
        spans = [(first, last) for _, first, last, _ in decoder._greedy]
        assert align_symbols(log_probs, ids) == spans


def test_the_confidence_of_segments_is_a_lower_bound(monkeypatch):
    log_probs = random_frames(3, frames=90)

    def confidence():
        decoder = FileDecoder(recogniser_of())
        decoder.accept(log_probs)
        return decoder.finish("x", 1.8).confidence

    whole = confidence()
    monkeypatch.setattr(transcription, "_SEGMENT", 0.5)
    assert 0.5 * whole < confidence() < whole


def test_silence_has_no_words():
    decoder = FileDecoder(recogniser_of())
    decoder.accept(torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1]] * 3).log())
    found = decoder.finish("x", 0.06)
    assert found.text == "" and found.words == []
    assert found.confidence == pytest.approx(0.5**3)


def test_output_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="not finite"):
        FileDecoder(recogniser_of()).accept(torch.full((3, 5), math.nan))


# --------------------------------------------------------------- beam search


def test_a_beam_search_is_that_of_the_searcher_with_times(its):
    recogniser = load_recogniser(its.export)
    searcher = make_searcher(recogniser, beam_size=8)
    for path in its.audio:
        wav = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        log_probs, _ = recogniser.encode(
            wav.unsqueeze(0), torch.tensor([len(wav)])
        )
        found = one(recogniser, [path], searcher=searcher)
        assert found.text == searcher(log_probs)[0][0].text
        assert found.text == " ".join(word.word for word in found.words)
        times = [t for word in found.words for t in (word.start, word.end)]
        assert times == sorted(times) and times[-1:] <= [found.duration]
        assert all(0 < word.confidence <= 1 for word in found.words)
        # Of its letters and the signs between words; before the first there may
        # be one, if that is more likely.
        ids = spell(found.text, recogniser.pieces)
        assert recogniser.decode(ids) == found.text
        lengths = torch.tensor([log_probs.shape[1]])
        ways = [
            (pseudo_labels.surprise(log_probs, lengths, [way])[0], way)
            for way in (ids, ids[1:])
        ]
        cost, ids = min(ways)
        assert found.confidence == pytest.approx(
            math.exp(-cost / max(1, len(ids))), rel=1e-4
        )
        spans = align_symbols(log_probs[0], ids)
        starts = [0.02 * first for first, _ in spans]
        for word in found.words:
            assert any(abs(word.start - start) < 1e-9 for start in starts)


ARPA = """\\data\\
ngram 1=5
ngram 2=2

\\1-grams:
-1.0\t<unk>\t0
-99\t<s>\t0
-1.0\t</s>
-1.0\tAB\t0
-1.0\tBA\t0

\\2-grams:
-0.1\tBA AB
-3.0\tBA BA

\\end\\
"""


def spikes(*rows):
    """Log-probabilities of symbols of PIECES, with a blank after each."""
    frames = []
    for row in rows:
        frame = dict(enumerate([1e-4] * len(PIECES))) | row
        total = sum(frame.values())
        frames.append([frame[i] / total for i in range(len(PIECES))])
        frames.append([0.96, 0.01, 0.01, 0.01, 0.01])
    return torch.tensor(frames).log()


def test_a_language_model_decides_between_words(tmp_path):
    pytest.importorskip("kenlm")
    pytest.importorskip("pygtrie")
    path = tmp_path / "words.arpa"
    path.write_text(ARPA)
    # BA, then BA or AB with a little more for BA
    log_probs = spikes(
        {1: 1.0},
        {3: 1.0},
        {2: 1.0},
        {1: 1.0},
        {2: 0.45, 3: 0.55},
        {2: 0.55, 3: 0.45},
    )
    texts = []
    recogniser = recogniser_of()
    for searcher in (
        None,
        make_searcher(recogniser, 20),
        make_searcher(recogniser, 20, path),
    ):
        decoder = FileDecoder(recogniser, searcher)
        decoder.accept(log_probs)
        found = decoder.finish("x", 0.24)
        texts.append(found.text)
        starts = [round(word.start / 0.02) for word in found.words]
        assert starts == [2, 8]
        assert [round(word.end / 0.02) for word in found.words] == [5, 11]
        if searcher is not None:
            first, second = (word.confidence for word in found.words)
            assert first > 0.99
            share = 0.45 if found.text.endswith("AB") else 0.55
            assert second == pytest.approx(share, abs=0.01)
    assert texts == ["BA BA", "BA BA", "BA AB"]


def test_a_language_model_that_cannot_be_used(world, tmp_path, monkeypatch):
    audio, model = world / "audio" / "0.wav", world / "lstm"
    missing = tmp_path / "no.arpa"
    line = refused(model, audio, "--lm", missing)
    assert f"no language model at {missing}" in line
    missing.write_text(ARPA)
    monkeypatch.setattr(
        transcription.importlib.util, "find_spec", lambda _: None
    )
    line = refused(model, audio, "--lm", missing)
    assert line.endswith("not installed: pip install kenlm pygtrie")


def test_a_damaged_language_model_is_named(world, tmp_path):
    pytest.importorskip("kenlm")
    pytest.importorskip("pygtrie")
    path = tmp_path / "damaged.arpa"
    path.write_text("no such thing")
    line = refused(world / "lstm", world / "audio" / "0.wav", "--lm", path)
    assert "damaged.arpa" in line


def test_the_language_model_is_used_by_the_command(world, tmp_path):
    pytest.importorskip("kenlm")
    pytest.importorskip("pygtrie")
    audio = world / "audio" / "0.wav"
    texts = {}
    for word in ("A", "QQ"):
        path = tmp_path / f"{word}.arpa"
        path.write_text(ARPA.replace("AB", word))
        result = invoke(world / "lstm", audio, "--lm", path, "--beam-size", 8)
        assert result.exit_code == 0, result.stderr
        texts[word] = result.stdout
        recogniser = load_recogniser(world / "lstm")
        searcher = make_searcher(recogniser, 8, path)
        found = one(recogniser, [audio], searcher=searcher)
        assert result.stdout == f"{audio}\t{found.text}\n"
    greedy = invoke(world / "lstm", audio).stdout
    assert texts["A"] != greedy


def test_words_are_spelled_in_as_few_symbols_as_possible():
    pieces = ["<b>", "▁", "A", "B", "AB", "▁A", "ABA", "▁BAB"]
    assert spell("ABA", pieces) == [1, 6]
    assert spell("BABA B", pieces) == [7, 2, 1, 3]
    assert spell("AB A", ["|", "-", "A", "B"]) == [2, 3, 0, 2]
    assert spell("AB A", [" ", "-", "A", "B"]) == [2, 3, 0, 2]
    assert spell("", pieces) == []
    with pytest.raises(ValueError, match="cannot spell '▁AC'"):
        spell("AC", pieces)


# ---------------------------------------------------------------------- audio


@pytest.mark.parametrize(
    "rate", [8000, 11025, 16000, 22050, 24000, 44100, 48000, 96000]
)
@pytest.mark.parametrize("block", [97, 1000, 2**19])
def test_blocks_are_resampled_as_the_whole(rate, block, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "BLOCK", block)
    wav = torch.randn(9001, generator=torch.Generator().manual_seed(0))
    path = write(tmp_path / "x.wav", wav, rate)
    found = torch.cat(list(read_audio(path, RATE)))
    # With filters in double precision
    expected = torchaudio.functional.resample(wav.double(), rate, RATE).float()
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name, subtype",
    [("x.wav", "PCM_16"), ("x.flac", "PCM_24"), ("x.aiff", "PCM_16")],
)
def test_a_tone_at_44_kilohertz_in_stereo_is_that_at_16(
    name, subtype, tmp_path
):
    times = [np.arange(rate) / rate for rate in (44100, RATE)]
    there, here = (0.5 * np.sin(2 * np.pi * 1000 * t) for t in times)
    # What the channels differ in does not count.
    stereo = np.stack([there + 0.2, there - 0.2], axis=1)
    write(tmp_path / name, stereo, 44100, subtype)
    found = torch.cat(list(read_audio(tmp_path / name, RATE))).numpy()
    assert found.shape == here.shape
    # But for the edges, where the filter reaches into nothing
    assert np.abs(found - here)[50:-50].max() < 2e-3


def test_speech_at_another_rate_has_the_same_log_probabilities(world, tmp_path):
    recogniser = load_recogniser(world / "jasper_mini")
    speech = make_speech(1, 1.0)
    other = torchaudio.functional.resample(speech, RATE, 44100)
    path = write(tmp_path / "x.flac", other, 44100, "PCM_24")
    found = torch.cat(list(read_audio(path, RATE)))
    lengths = torch.tensor([RATE])
    ours, theirs = (
        recogniser.encode(wav.unsqueeze(0), lengths)[0].exp()
        for wav in (speech, found)
    )
    assert (ours - theirs).abs().mean() < 0.02


def test_odd_sample_rates_need_few_filters(tmp_path):
    # 16 thousand filters of 44 thousand samples, were it taken exactly
    rate, tone = 44101, 440
    wav = np.sin(2 * np.pi * tone * np.arange(2 * rate) / rate)
    path = write(tmp_path / "x.wav", wav, rate)
    found = torch.cat(list(read_audio(path, RATE))).numpy()
    expected = np.sin(2 * np.pi * tone * np.arange(2 * RATE) / RATE)
    assert abs(len(found) - len(expected)) <= 1
    count = min(len(found), len(expected)) - 50
    assert np.abs(found[50:count] - expected[50:count]).max() < 0.02
    ratio = ratio_of(rate, RATE)
    assert resampler(ratio).kernel.numel() < 2e6


def test_files_are_found_in_folders_and_each_once(tmp_path):
    for name in ("b/2.wav", "b/1.FLAC", "a/x.ogg", "b/note.txt", "b/._1.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b" / "again.wav").symlink_to(tmp_path / "b" / "2.wav")
    last = tmp_path / "b" / "2.wav"
    found = find_audio([tmp_path / "b" / "note.txt", last, tmp_path, last])
    assert found == [
        tmp_path / "b" / "note.txt",
        last,
        tmp_path / "a" / "x.ogg",
        tmp_path / "b" / "1.FLAC",
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no audio file"):
        find_audio([tmp_path / "empty"])


# ----------------------------------------------------------------- long files


def loudness_recogniser(log, jitter=False, max_seconds=math.inf):
    """Recognises the symbol k where the samples of a frame are k / 32.

    Nothing at both edges of a window. With jitter, symbols come a frame
    late in every other window or so.
    """
    pieces = ["<b>", "▁", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]

    def encode(wavs, lengths):
        log.append((tuple(wavs.shape), int(lengths.max())))
        frames = lengths // 320
        levels = wavs[:, : wavs.shape[1] // 320 * 320]
        levels = levels.reshape(len(wavs), -1, 320).mean(-1)
        symbols = (32 * levels).round().long()
        for row, count in zip(symbols, frames, strict=True):
            if jitter and row.sum() % 2:
                row[1:] = row[:-1].clone()
            row[:5] = 0
            row[max(0, count - 5) :] = 0
        hot = torch.nn.functional.one_hot(symbols, len(pieces))
        return (20.0 * hot).log_softmax(-1), frames

    return recogniser_of(pieces, encode, max_seconds=max_seconds), pieces


def say(text, pieces, frames=2):
    """Levels of a text, each symbol so many frames long."""
    rows = []
    for letter in text:
        symbol = pieces.index("▁" if letter == " " else letter)
        rows += [symbol / 32] * frames + [0.0]
    return np.repeat(np.array(rows), 320)


def silence(seconds):
    return np.zeros(round(seconds * RATE))


@pytest.mark.parametrize(
    "window, jitter", [(2.0, False), (2.5, False), (3.99, False), (6.0, True)]
)
def test_a_long_file_of_known_utterances_is_their_transcripts(
    window, jitter, tmp_path
):
    batches = []
    recogniser, pieces = loudness_recogniser(batches, jitter)
    generator = np.random.default_rng(0)
    texts, parts, files = [], [silence(0.2)], []
    for index in range(40):
        letters = generator.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXY"), 9)
        text = "".join(letters[:4]) + " " + "".join(letters[4:])
        # Of one frame, a late symbol would be lost or found twice at a cut.
        frames = 1 if jitter else 2
        wav = say(text, pieces, frames)
        # Also with hardly a pause
        gap = [0.4, 0.12 if jitter else 0.02, 0.12][index % 3]
        alone = np.concatenate([silence(0.2), wav, silence(0.2)])
        files.append(write(tmp_path / f"{index}.wav", alone))
        texts.append(text)
        parts += [wav, say(" ", pieces, frames), silence(gap)]
    path = write(tmp_path / "long.wav", np.concatenate([*parts, silence(0.2)]))
    alone = [result.text for result in transcribe(recogniser, files)]
    assert alone == texts
    batches.clear()
    found = one(recogniser, [path], window=window)
    assert found.text == " ".join(alone)
    assert found.duration == pytest.approx(soundfile.info(path).duration)
    assert max(longest for _, longest in batches) <= window * RATE
    # Where the words begin
    whole = np.concatenate([*parts, silence(0.2)])
    levels = np.round(32 * whole.reshape(-1, 320).mean(1)).astype(int)
    labels = [0, *levels, 0]
    starts = [
        frame
        for frame in range(len(levels))
        if levels[frame] > 1 and first_of_word(labels, frame + 1)
    ]
    assert len(starts) == 80
    for word, start in zip(found.words, starts, strict=True):
        assert 0 <= round(word.start / 0.02) - start <= jitter


def first_of_word(labels, frame):
    if labels[frame] == labels[frame - 1]:
        return False
    before = [label for label in labels[:frame] if label]
    return not before or before[-1] == 1


def test_speech_without_any_pause_is_joined_without_loss(tmp_path):
    batches = []
    recogniser, pieces = loudness_recogniser(batches)
    # Each frame another symbol than the one before, and no blank at all
    generator = np.random.default_rng(1)
    steps = generator.integers(1, 25, 3000)
    symbols = 2 + np.cumsum(steps) % 25
    wav = np.repeat(symbols / 32, 320)
    wav = np.concatenate([silence(0.2), wav, silence(0.2)])
    path = write(tmp_path / "x.wav", wav)
    found = one(recogniser, [path], window=3.0)
    assert found.text == "".join(pieces[symbol] for symbol in symbols)


def test_windows_give_what_the_whole_gives_for_a_small_receptive_field(
    world, tmp_path, monkeypatch
):
    recogniser = load_recogniser(world / "jasper_mini")
    # Each window has a level of its own, which a random network may not bear.
    monkeypatch.setattr(
        SpectralFeatures,
        "level",
        lambda self, frames, mask: torch.full((len(frames), 1), -40.0),
    )
    path = write(tmp_path / "x.flac", make_speech(7, 23.3), subtype="PCM_16")
    whole = one(recogniser, [path])
    assert len(whole.text) > 100
    # It has a receptive field of 0.1 s to either side; another file shares its
    # batches.
    other = write(tmp_path / "y.flac", make_speech(8, 5.1), subtype="PCM_16")
    for window in (2.0, 3.7):
        found, _ = transcribe(recogniser, [path, other], 8.0, window=window)
        assert found.text == whole.text
        assert found.duration == whole.duration
        for ours, theirs in zip(found.words, whole.words, strict=True):
            assert ours[:3] == theirs[:3]
            assert ours.confidence == pytest.approx(theirs.confidence, rel=1e-3)
        assert found.confidence == pytest.approx(whole.confidence, rel=1e-3)


@pytest.mark.parametrize("beam_size", [None, 4])
def test_a_stream_says_what_the_whole_says(world, tmp_path, beam_size):
    recogniser = load_recogniser(world / "lstm_streaming")
    searcher = beam_size and make_searcher(recogniser, beam_size)
    path = write(tmp_path / "x.wav", make_speech(7, 5.7))
    whole = one(recogniser, [path], searcher=searcher)
    partial = []
    streamed = one(
        recogniser,
        [path],
        searcher=searcher,
        stream=True,
        on_partial=partial.append,
    )
    # A long file is streamed anyway.
    windowed = one(recogniser, [path], searcher=searcher, window=2.0)
    for found in (streamed, windowed):
        assert found.text == whole.text
        assert [word[:3] for word in found.words] == [
            word[:3] for word in whole.words
        ]
        assert found.confidence == pytest.approx(whole.confidence, rel=1e-3)
    # Chunk by chunk; of greedy decoding, which takes nothing back
    assert 20 < len(partial) <= 30
    text = one(recogniser, [path]).text
    assert partial[-1] == text
    for earlier, later in zip(partial, partial[1:], strict=False):
        assert later.startswith(earlier)
    assert partial[5] != partial[10]


def test_the_latest_text_is_short():
    decoder = FileDecoder(recogniser_of())
    for row in random_frames(0, frames=90).split(10):
        decoder.accept(row)
    text = decoder.finish("x", 1.8).text
    assert text.endswith(decoder.latest(5))
    assert len(text) > 30 > len(decoder.latest(5)) > 1


def test_a_model_with_a_table_of_positions_gets_shorter_windows(tmp_path):
    batches = []
    recogniser, pieces = loudness_recogniser(batches, max_seconds=3.0)
    wav = [silence(0.2), *[say("ABC ", pieces), silence(0.5)] * 30]
    path = write(tmp_path / "x.wav", np.concatenate(wav))
    assert one(recogniser, [path]).text == " ".join(["ABC"] * 30)
    assert 2.5 * RATE < max(longest for _, longest in batches) < 3.0 * RATE


def test_an_hour_does_not_fill_the_memory(tmp_path):
    batches = []
    recogniser, pieces = loudness_recogniser(batches)
    path = tmp_path / "hour.flac"
    part = np.concatenate([silence(55), say("AB BA ", pieces)])
    part = np.concatenate([part, silence(60 - len(part) / RATE)])
    with soundfile.SoundFile(path, "w", RATE, 1) as file:
        for _ in range(60):
            file.write(part)
    del part
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = one(recogniser, [path])
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert found.duration == 3600
    assert found.text == " ".join(["AB BA"] * 60)
    last = found.words[-2]
    assert last.start == pytest.approx(59 * 60 + 55)
    # The waveform alone has 230 MB. Kilobytes:
    assert after - before < 120_000
    assert max(longest for _, longest in batches) == 40 * RATE
    assert all(batch * samples <= 60 * RATE for (batch, samples), _ in batches)


# ----------------------------------------------------- batches and their order


def test_batches_are_of_like_length_and_bounded(tmp_path):
    batches = []
    recogniser, pieces = loudness_recogniser(batches)
    seconds = [0.4, 3.0, 0.6, 2.9, 0.4, 0.6, 3.1, 0.4]
    files = []
    for index, length in enumerate(seconds):
        wav = silence(length)
        wav[2240:2560] = (index + 2) / 32
        files.append(write(tmp_path / f"{index}.wav", wav))
    results = transcribe(recogniser, files, batch_seconds=4.0)
    assert [result.text for result in results] == list("ABCDEFGH")
    shapes = [shape for shape, _ in batches]
    assert sum(batch for batch, _ in shapes) == 8
    assert all(b == 1 or b * n <= 4 * RATE for b, n in shapes)
    # The long ones one by one, the short ones together
    assert sorted(batch for batch, _ in shapes) == [1, 1, 1, 5]


def test_impossible_batches_are_refused(world):
    for seconds in ("0", "-3", "nan"):
        line = refused(
            world / "lstm",
            world / "audio" / "0.wav",
            "--batch-seconds",
            seconds,
        )
        assert "batch_seconds must be above 0" in line


def test_what_the_model_cannot_encode_is_told_apart(tmp_path):
    batches = []
    good, pieces = loudness_recogniser(batches)

    def encode(wavs, lengths):
        if (wavs == 0.75).any():
            raise RuntimeError("no such sound")
        log_probs, frames = good.encode(wavs, lengths)
        log_probs[(wavs[:, 0] == 0.5)] = math.nan
        return log_probs, frames

    recogniser = good._replace(encode=encode)
    files = [
        write(tmp_path / f"{level}.wav", np.full(6400, level))
        for level in (2 / 32, 0.75, 3 / 32, 0.5, 4 / 32)
    ]
    results = list(transcribe(recogniser, files))
    assert [type(result).__name__ for result in results] == [
        "Transcript",
        "Failure",
        "Transcript",
        "Failure",
        "Transcript",
    ]
    reasons = [r.reason for r in results if isinstance(r, Failure)]
    assert reasons[0] == "the model cannot encode it: no such sound"
    assert "not finite" in reasons[1]


# ---------------------------------------------------------------- broken files


def test_broken_files_are_named_and_the_others_are_done(world, tmp_path):
    good = [
        write(tmp_path / f"{i}.wav", make_speech(i, 0.5)) for i in (0, 1, 2)
    ]
    speech = make_speech(9, 3.0)
    write(tmp_path / "whole.flac", speech, subtype="PCM_16")
    content = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(content[: len(content) // 2])
    spoilt = speech.clone()
    spoilt[999] = math.nan
    write(tmp_path / "nan.wav", spoilt)
    spoilt[999] = math.inf
    write(tmp_path / "inf.wav", spoilt)
    write(tmp_path / "short.wav", [])
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.mp3").write_text("this is no audio\n" * 100)
    (tmp_path / "raw.raw").write_bytes(b"\0" * 100)
    write(tmp_path / "slow.wav", speech, 7, "PCM_16")
    broken = {
        "cut.flac": "it cannot be read as audio: ",
        "nan.wav": "it holds samples that are not finite",
        "inf.wav": "it holds samples that are not finite",
        "short.wav": "it holds no audio",
        "empty.wav": "it cannot be read as audio: ",
        "text.mp3": "it cannot be read as audio: ",
        "raw.raw": "it cannot be read as audio: ",
        "slow.wav": "a sample rate of 7 Hz is not one of audio",
        "missing.wav": "there is no such file",
    }
    files = [good[0]]
    for index, name in enumerate(broken):
        files += [tmp_path / name] + good[1:2] * (index == 3)
    files.append(good[2])
    result = invoke(world / "jasper_mini", *files)
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == len(broken) + 1
    for line, (name, reason) in zip(lines, broken.items(), strict=False):
        file = tmp_path / name
        assert line.startswith(f"tutornet transcribe: {file}: {reason}")
    assert lines[-1].endswith("9 of 12 files could not be transcribed")
    alone = invoke(world / "jasper_mini", *good)
    assert alone.exit_code == 0 and alone.stderr == ""
    assert result.stdout == alone.stdout
    assert [line.split("\t")[0] for line in alone.stdout.splitlines()] == [
        str(path) for path in good
    ]


def test_a_long_file_that_breaks_late_leaves_no_half_transcript(
    tmp_path, monkeypatch
):
    batches = []
    recogniser, pieces = loudness_recogniser(batches)
    wav = np.concatenate([silence(0.2), *[say("ABC ", pieces)] * 200])
    wav[-100] = math.nan
    files = [
        write(tmp_path / "long.wav", wav),
        write(
            tmp_path / "next.wav",
            np.concatenate([silence(0.2), say("A", pieces), silence(0.2)]),
        ),
    ]
    for pool in (0.001, 4):
        monkeypatch.setattr(transcription, "_POOL", pool)
        long, after = transcribe(recogniser, files, window=2.0)
        assert long.reason == "it holds samples that are not finite"
        assert after.text == "A"


# ---------------------------------------------------------------- the command


def test_every_file_has_one_line(world):
    audio = world / "audio"
    result = invoke(world / "lstm", audio, audio / "0.wav", audio)
    assert result.exit_code == 0 and result.stderr == ""
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    recogniser = load_recogniser(world / "lstm")
    files = sorted(audio.iterdir())
    expected = [[r.file, r.text] for r in transcribe(recogniser, files)]
    assert lines == expected


def test_json_lines(world):
    audio = world / "audio"
    result = invoke(world / "lstm", audio, "--json")
    assert result.exit_code == 0
    recogniser = load_recogniser(world / "lstm")
    files = sorted(audio.iterdir())
    for line, expected in zip(
        result.stdout.splitlines(), transcribe(recogniser, files), strict=True
    ):
        found = json.loads(line)
        words = found.pop("words")
        assert list(found) == ["file", "text", "duration", "confidence"]
        assert found["file"] == expected.file
        assert found["text"] == expected.text
        assert found["duration"] == pytest.approx(expected.duration, abs=1e-3)
        assert found["confidence"] == pytest.approx(
            expected.confidence, abs=1e-4
        )
        assert len(words) == len(expected.words)
        for word, wanted in zip(words, expected.words, strict=True):
            assert list(word) == ["word", "start", "end", "confidence"]
            assert word["word"] == wanted.word
            for key in ("start", "end", "confidence"):
                assert word[key] == pytest.approx(
                    getattr(wanted, key), abs=1e-3
                )
            assert 0 <= word["start"] < word["end"] <= found["duration"] + 1e-3


def test_output_goes_into_a_file(world, tmp_path):
    audio = world / "audio"
    to = tmp_path / "to.txt"
    result = invoke(world / "lstm", audio, "--output", to)
    assert result.exit_code == 0 and result.stdout == ""
    assert to.read_text() == invoke(world / "lstm", audio).stdout
    wav = write(tmp_path / "x.wav", make_speech(0, 0.3))
    before = wav.read_bytes()
    line = refused(world / "lstm", wav, "--output", wav)
    assert line.endswith("x.wav is one of the audio files")
    assert wav.read_bytes() == before
    refused(world / "lstm", wav, "--output", tmp_path / "no" / "to.txt")


def test_streaming_by_the_command(world):
    audio = world / "audio"
    plain = invoke(world / "lstm_streaming", audio)
    streamed = invoke(world / "lstm_streaming", audio, "--stream")
    assert streamed.exit_code == 0 and streamed.stderr == ""
    assert streamed.stdout == plain.stdout
    line = refused(world / "lstm", audio, "--stream")
    assert "lstm cannot stream: features: LogMelFeatures cannot stream" in line


def test_an_onnx_file_transcribes_and_cannot_stream(world, tmp_path):
    model = tmp_path / "model.onnx"
    write_onnx(model, PIECES)
    result = invoke(model, world / "audio")
    assert result.exit_code == 0, result.stderr
    recogniser = load_recogniser(model)
    for line, path in zip(
        result.stdout.splitlines(),
        sorted((world / "audio").iterdir()),
        strict=True,
    ):
        wav = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        log_probs, _ = recogniser.encode(
            wav.unsqueeze(0), torch.tensor([len(wav)])
        )
        expected = " ".join(text for text, *_ in read_by_hand(log_probs[0]))
        assert line == f"{path}\t{expected}"
    line = refused(model, world / "audio", "--stream")
    assert "model.onnx cannot stream: onnx models run whole" in line


def test_a_yaml_that_can_run_code_needs_trust(world, tmp_path):
    folder = tmp_path / "theirs"
    shutil.copytree(world / "lstm", folder)
    (folder / "config.json").unlink()
    audio = world / "audio" / "0.wav"
    line = refused(folder, audio)
    assert "can run any code" in line and "--trust-remote-code" in line
    result = invoke(folder, audio, "--trust-remote-code")
    assert result.stdout == invoke(world / "lstm", audio).stdout


def test_what_is_no_model_or_no_audio(world, tmp_path):
    audio = world / "audio"
    assert "neither a folder, a file nor" in refused(
        tmp_path / "x" / "y", audio
    )
    assert "is on this machine" in refused(
        world / "lstm", audio, "--revision", "main"
    )
    (tmp_path / "none").mkdir()
    assert "none holds no audio file" in refused(
        world / "lstm", tmp_path / "none"
    )
    assert "device 'gpu' cannot be used" in refused(
        world / "lstm", audio, "--device", "gpu"
    )


# -------------------------------------------------------------------- scoring


@pytest.fixture
def corpus(world, tmp_path):
    """A folder in LibriSpeech's layout, and its transcripts by id."""
    folder = tmp_path / "LibriSpeech"
    texts = {}
    for speaker in ("1", "2"):
        chapter = folder / "test-clean" / speaker / "7"
        chapter.mkdir(parents=True)
        lines = []
        for index in range(3):
            name = f"{speaker}-7-{index:04}"
            speech = make_speech(10 * int(speaker) + index, 0.6)
            write(chapter / f"{name}.flac", speech, subtype="PCM_16")
            texts[name] = ["ONE TWO", "A", "THREE"][index]
            lines.append(f"{name} {texts[name]}\n")
        (chapter / f"{speaker}-7.trans.txt").write_text("".join(lines))
    return SimpleNamespace(folder=folder, texts=texts)


def scores(texts, lines):
    found = {}
    for line in lines:
        file, _, text = line.partition("\t")
        found[file.rpartition("/")[2].partition(".")[0]] = text
    keys = sorted(found)
    pair = [texts[key] for key in keys], [found[key] for key in keys]
    return 100 * jiwer.wer(*pair), 100 * jiwer.cer(*pair)


def test_a_folder_is_scored_by_its_own_transcripts(world, corpus):
    model = world / "lstm"
    result = invoke(model, corpus.folder, "--score", corpus.folder)
    assert result.exit_code == 0 and result.stderr == ""
    *lines, last = result.stdout.splitlines()
    assert len(lines) == 6
    wer, cer = scores(corpus.texts, lines)
    assert last == f"WER {wer:.2f} %, CER {cer:.2f} % (6 utterances, 8 words)"
    result = invoke(model, corpus.folder, "--score", corpus.folder, "--json")
    found = json.loads(result.stdout.splitlines()[-1])
    assert found == {
        "wer": pytest.approx(wer),
        "cer": pytest.approx(cer),
        "utterances": 6,
        "words": 8,
    }


def test_files_are_scored_by_a_list_and_what_has_none_is_counted(
    world, corpus, tmp_path
):
    names = sorted(corpus.texts)
    reference = tmp_path / "mine.txt"
    reference.write_text(
        "".join(f"{name} {corpus.texts[name]}\n" for name in names[1:3])
        + "not-here SEVEN\n"
    )
    broken = tmp_path / "2-7-0009.flac"
    broken.write_bytes(b"")
    to = tmp_path / "to.txt"
    result = invoke(
        world / "lstm",
        corpus.folder,
        broken,
        "--score",
        reference,
        "--output",
        to,
    )
    assert result.exit_code == 2
    lines = to.read_text().splitlines()
    assert len(lines) == 6
    wer, cer = scores(corpus.texts, lines[1:3])
    assert result.stdout == (
        f"WER {wer:.2f} %, CER {cer:.2f} % (2 utterances, 2 words)\n"
    )
    errors = result.stderr.splitlines()
    assert len(errors) == 3
    assert errors[1].endswith(
        f"4 of 6 transcripts have no reference in {reference} and are not "
        "scored"
    )


def test_references_that_do_not_serve(world, corpus, tmp_path):
    model, folder = world / "lstm", corpus.folder
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (empty, tmp_path / "missing.txt"):
        line = refused(model, folder, "--score", path)
        assert f"{path} is no file of references and no folder" in line
    other = tmp_path / "other.txt"
    other.write_text("x A\ny B\nx C\n")
    with pytest.raises(ValueError, match=r"other\.txt: x: duplicate id"):
        read_references(other)
    other.write_text("x A\ny\n")
    with pytest.raises(ValueError, match=r"other\.txt: y: empty transcript"):
        read_references(other)
    again = folder / "again.trans.txt"
    again.write_text("1-7-0000 ONE\n")
    with pytest.raises(ValueError, match="1-7-0000: duplicate id"):
        read_references(folder)
    again.unlink()
    other.write_text("x A\n")
    result = invoke(model, folder, "--score", other)
    assert result.exit_code == 2
    assert f"no file has a reference in {other}" in result.stderr
    twin = write(tmp_path / "1-7-0000.wav", make_speech(0, 0.3))
    line = refused(model, folder, twin, "--score", folder)
    assert "have the same id, 1-7-0000" in line


def test_hidden_files_and_byte_order_marks_are_no_references(tmp_path):
    folder = tmp_path / "corpus"
    for name in ("1/1-1.trans.txt", "1/._1-1.trans.txt", ".1/1-1.trans.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("1-1-0000 ONE\n", encoding="utf-8-sig")
    (folder / "1" / "._1-1.trans.txt").write_bytes(b"\0\5\x16\7 \0")
    for path in (folder, folder / "1" / "1-1.trans.txt"):
        assert read_references(path) == {"1-1-0000": "ONE"}
    write(folder / "1" / "1-1-0000.wav", make_speech(0, 0.3))
    for name in ("1/._1-1-0000.wav", ".1/1-1-0000.wav"):
        (folder / name).write_bytes(b"\0")
    assert find_audio([folder]) == [folder / "1" / "1-1-0000.wav"]


LINES = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "1-7-0000", "é", "$x"]),
        st.sampled_from(["", "ONE", "ONE  TWO", "$", "\ufffd", "C'EST ÉTÉ"]),
    ),
    max_size=5,
)


@given(st.lists(LINES, min_size=1, max_size=3), st.booleans())
def test_references_are_all_read_or_the_first_fault_is_named(
    tmp_path_factory, parts, as_folder
):
    folder = tmp_path_factory.mktemp("references")
    if not as_folder:
        parts = parts[:1]
    for number, lines in enumerate(parts):
        text = "".join(f"{key} {text}\n" for key, text in lines)
        (folder / f"{number}.trans.txt").write_text(text, encoding="utf-8")
    path = folder if as_folder else folder / "0.trans.txt"
    every = [line for lines in parts for line in lines]
    names = [key for key, _ in every]
    is_sound = len(set(names)) == len(names) and not any(
        not text or "$" in key + text or "\ufffd" in text for key, text in every
    )
    if is_sound:
        expected = {key: " ".join(text.split()) for key, text in every}
        assert read_references(path) == expected
    else:
        with pytest.raises(ValueError, match="trans.txt: ") as raised:
            read_references(path)
        assert any(f": {key}: " in str(raised.value) for key in names)
