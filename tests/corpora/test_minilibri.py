"""MiniLibri: what it promises, measured on tiny corpora."""

import json
import random
import re

import numpy as np
import pytest
import soundfile

from tutornet_sb.corpora import espeak, minilibri
from tutornet_sb.corpora.librispeech import prepare_librispeech
from tutornet_sb.corpora.minilibri import make_minilibri, make_sentence
from tutornet_sb.util.errors import InputError

SPLITS = ("train-clean-100", "dev-clean", "test-clean", "test-other")
TINY = {
    "train_minutes": 0.5,
    "dev_minutes": 0.3,
    "test_minutes": 0.5,
    "train_speakers": 3,
    "test_speakers": 2,
}


def content(folder):
    """Every file by its relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def transcripts(folder, split):
    lines = []
    for path in sorted((folder / split).rglob("*.trans.txt")):
        lines += path.read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines)


def speakers(folder, split):
    return {path.name for path in (folder / split).iterdir()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora") / "mini"
    return make_minilibri(folder, seed=3, **TINY)


def test_splits(corpus, tmp_path):
    info = json.loads((corpus / "minilibri.json").read_text())
    manifests = prepare_librispeech(corpus, tmp_path, max_skipped=0)
    assert set(manifests) == set(SPLITS)
    for split in SPLITS:
        files = list((corpus / split).rglob("*.flac"))
        size = info["splits"][split]
        assert len(files) == size["utterances"] == len(set(files))
        seconds = [soundfile.info(file).duration for file in files]
        assert size["seconds"] == pytest.approx(sum(seconds), abs=1e-3)
        # The last utterance may be as long as 6 s.
        minutes = TINY[f"{split[: split.index('-')]}_minutes"]
        assert sum(seconds) == pytest.approx(60 * minutes, rel=0.2, abs=6)
    assert not list(corpus.parent.glob("*.partial*"))


def test_voices_and_sentences_are_disjoint(corpus):
    info = json.loads((corpus / "minilibri.json").read_text())
    seen = speakers(corpus, "train-clean-100")
    other = speakers(corpus, "test-other")
    assert len(seen) == 3 and len(other) == 2 and not seen & other
    assert speakers(corpus, "dev-clean") <= seen
    assert speakers(corpus, "test-clean") <= seen
    variants = [voice.split("+")[1] for voice in info["voices"].values()]
    assert len(set(variants)) == 5
    texts = [t for s in SPLITS for t in transcripts(corpus, s).values()]
    assert len(texts) == len(set(texts))


def test_audio(corpus):
    levels = []
    for path in corpus.rglob("*.flac"):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels) == (16000, 1)
        assert (info.format, info.subtype) == ("FLAC", "PCM_16")
        assert 1.4 < info.duration < 6.5
        wave, _ = soundfile.read(path)
        assert np.abs(wave).max() < 0.99
        levels.append(10 * np.log10(np.mean(wave**2)))
        # No 10 ms of digital silence, for log-mel features.
        frames = wave[: len(wave) // 160 * 160].reshape(-1, 160)
        assert frames.std(axis=1).min() > 2e-5
    # Recordings differ in level (dB full scale).
    assert -44 < min(levels) < -38 and -24 < max(levels) < -20
    assert np.std(levels) > 4


def test_silence_around_the_speech_is_short(corpus):
    for path in (corpus / "train-clean-100").rglob("*.flac"):
        wave, _ = soundfile.read(path)
        frames = np.abs(wave[: len(wave) // 160 * 160]).reshape(-1, 160)
        loud = np.flatnonzero(frames.max(axis=1) > 0.03 * np.abs(wave).max())
        assert 0.08 <= loud[0] * 0.01 < 0.25
        assert 0.08 <= (len(frames) - loud[-1]) * 0.01 < 0.35


def test_same_seed_same_bytes(corpus, tmp_path):
    again = make_minilibri(tmp_path / "mini", seed=3, **TINY)
    assert content(again) == content(corpus)


def test_other_seed_other_sentences(corpus, tmp_path):
    other = make_minilibri(tmp_path / "mini", seed=4, **TINY)
    one = set(transcripts(corpus, "train-clean-100").values())
    assert not one & set(transcripts(other, "train-clean-100").values())


def test_noise_level_of_test_other(corpus, tmp_path):
    # The same corpus all but without noise is the reference: what of the
    # noisy wave does not lie along the clean one is noise.
    options = {**TINY, "noise_snr": (90, 90)}
    clean = make_minilibri(tmp_path / "clean", seed=3, **options)
    ratios = []
    for path in sorted((corpus / "test-other").rglob("*.flac")):
        noisy, _ = soundfile.read(path)
        speech, _ = soundfile.read(clean / path.relative_to(corpus))
        part = speech * (noisy @ speech) / (speech @ speech)
        rest = noisy - part
        ratios.append(10 * np.log10((part @ part) / (rest @ rest)))
    assert 4.5 < min(ratios) < max(ratios) < 20.5
    assert np.std(ratios) > 2
    name = "train-clean-100"
    assert content(corpus / name) == content(clean / name)


@pytest.mark.parametrize(
    "kind, slope", [("white", 0.0), ("pink", -3.01), ("babble", None)]
)
def test_noise_colour(kind, slope):
    rng = np.random.default_rng(0)
    babble = rng.standard_normal(5000)
    noise = minilibri._noise(kind, 160000, babble, rng)
    assert noise.shape == (160000,) and np.isfinite(noise).all()
    if slope is not None:
        power = np.abs(np.fft.rfft(noise)) ** 2
        octaves = [power[b : 2 * b].mean() for b in 500 * 2 ** np.arange(7)]
        fall = np.diff(10 * np.log10(octaves)).mean()
        assert fall == pytest.approx(slope, abs=0.3)


def test_sentences():
    rng = random.Random(0)
    sentences = [make_sentence(rng) for _ in range(20000)]
    words = {word for sentence in sentences for word in sentence.split()}
    assert 250 <= len(words) <= 400
    assert all(re.fullmatch("[A-Z']+", word) for word in words)
    assert len(set(sentences)) > 0.99 * len(sentences)
    text = " ".join(sentences)
    assert re.search(r"\bAN [AEIOU]", text)
    assert not re.search(r"\bA [AEIOU]|\bAN [^AEIOU]", text)


def test_second_call_returns_at_once(corpus, monkeypatch):
    monkeypatch.setattr(minilibri, "_run_espeak", None)
    assert make_minilibri(corpus, seed=3, **TINY) == corpus


def test_occupied_folder(corpus, tmp_path):
    with pytest.raises(InputError, match="'seed': 3.*'seed': 5"):
        make_minilibri(corpus, seed=5, **TINY)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="no MiniLibri corpus.*choose"):
        make_minilibri(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dev_minutes": 0}, "dev_minutes must be above 0, got 0.0"),
        ({"train_speakers": -1}, "train_speakers must be above 0, got -1"),
        ({"noise_snr": (20, 5)}, "noise_snr"),
        ({"test_speakers": 1000}, "1024 speakers are asked for"),
    ],
)
def test_senseless_values(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        make_minilibri(tmp_path / "mini", **options)


def test_without_the_library(tmp_path, monkeypatch):
    (tmp_path / "espeakng_loader.py").write_text("raise ImportError('none')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(InputError, match="pip install espeakng-loader"):
        make_minilibri(tmp_path / "mini", **TINY)


def test_crash_leaves_nothing_behind(tmp_path, monkeypatch):
    crash = tmp_path / "crash.py"
    crash.write_text("import os; os.abort()")
    monkeypatch.setattr(espeak, "__file__", str(crash))
    with pytest.raises(InputError, match="exit status -6"):
        make_minilibri(tmp_path / "deep" / "mini", **TINY)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [
        "mini.lock"
    ]


@pytest.mark.parametrize("voice", ["xx+f3", "en+f33", "en"])
def test_an_unknown_voice_is_an_error(voice):
    job = {"voice": voice, "rate": 160, "pitch": 50, "range": 50}
    with pytest.raises(InputError, match=re.escape(f"voice {voice} does not")):
        minilibri._run_espeak(1, [{**job, "text": "hello"}])
