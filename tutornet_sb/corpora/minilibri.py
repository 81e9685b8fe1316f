"""MiniLibri: a small corpus of synthetic speech in LibriSpeech's layout."""

import collections
import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import random
import subprocess
import sys
import zlib

import numpy as np
import soundfile
import torch
from ruamel.yaml import YAML
from torchaudio.functional import resample
from tqdm import tqdm

from tutornet_sb.corpora import espeak
from tutornet_sb.util.errors import InputError
from tutornet_sb.util.files import locked, write_folder_atomically, write_json

SAMPLE_RATE = 16000  # Hz
INFO_FILE = "minilibri.json"
# Voices, grammar and words
SOURCES = pathlib.Path(__file__).with_suffix(".yaml")
_VERSION = 2  # raise when the same arguments make another corpus
_CHAPTER = 20  # utterances
_LEVEL = 0.05  # root mean square of an utterance, full scale 1
_FLOOR = 2e-4  # noise under everything, -74 dB full scale
_GAINS = -14.0, 5.0  # of the recordings (dB): RMS -40 to -21 dB full scale
_MARGIN = 0.1  # silence kept around the speech, seconds
_QUIET = 0.01  # frames this far below the loudest (amplitude) are silence
_SHORTEST, _LONGEST = 1.7, 5.7  # estimated seconds, for 1.5 to 6 in truth

Speaker = collections.namedtuple("Speaker", "id voice rate pitch")
# `noise` is None or (kind, signal-to-noise ratio in dB).
Utterance = collections.namedtuple(
    "Utterance", "split id speaker rate pitch range text noise"
)


def make_minilibri(
    folder,
    seed=1,
    train_minutes=40.0,
    dev_minutes=3.0,
    test_minutes=4.0,
    train_speakers=24,
    test_speakers=12,
    noise_snr=(5.0, 20.0),
):
    """Make the corpus by eSpeak NG, unless `folder` holds it already.

    Sentences of a small grammar, none of them twice: train-clean-100, dev-clean
    and test-clean in the training voices, test-other in other voices and with
    white, pink or babble noise. Utterances differ in level. The same arguments
    give the same bytes.

    It appears in one piece, with the arguments, the size of each split and the
    voice of each speaker in ``minilibri.json``.

    ``folder`` will directly hold the splits. ``train_minutes``, ``dev_minutes``
    and ``test_minutes`` of speech are in train-clean-100, in dev-clean, and in
    each of test-clean and test-other, to within a few percent. There are
    ``train_speakers`` voices in the clean splits, and ``test_speakers`` others
    in test-other, whose lowest and highest signal-to-noise ratios (dB) are
    ``noise_snr``. ``seed`` is that of sentences, voices and noise.

    Returns the absolute folder. Raises InputError if eSpeak NG cannot be used,
    `folder` holds anything else, or a value is out of range.
    """
    folder = pathlib.Path(folder).expanduser().resolve()
    parameters = {
        "version": _VERSION,
        "seed": int(seed),
        "train_minutes": float(train_minutes),
        "dev_minutes": float(dev_minutes),
        "test_minutes": float(test_minutes),
        "train_speakers": int(train_speakers),
        "test_speakers": int(test_speakers),
        "noise_snr": [float(limit) for limit in noise_snr],
    }
    _check(parameters)

    def write(partial):
        speakers = _draw_speakers(parameters)
        utterances = _plan(parameters, speakers)
        info = {
            "parameters": parameters,
            "splits": _make_audio(partial, seed, utterances),
            "voices": {speaker.id: speaker.voice for speaker in speakers},
        }
        write_json(partial / INFO_FILE, info)

    if not _is_made(folder, parameters):
        with locked(folder.with_name(f"{folder.name}.lock"), f"makes {folder}"):
            if not _is_made(folder, parameters):
                write_folder_atomically(folder, write)
    return folder


def find_folder(corpus):
    """Folder in which the MiniLibri of a corpus file is made."""
    values = corpus.get("minilibri") or {}
    return values.get("folder") or "data/MiniLibri"


@functools.cache
def _sources():
    return YAML(typ="safe", pure=True).load(SOURCES)


def make_sentence(rng):
    """Draw a sentence: upper-case words of A-Z and apostrophe."""
    words = _expand("sentence", rng)
    for i, word in enumerate(words[:-1]):
        if word == "A" and words[i + 1][0] in "AEIOU":
            words[i] = "AN"
    return " ".join(words)


def _expand(symbol, rng):
    """Words of a rule, a word class with an ending, or a plain word."""
    grammar, classes = _sources()["grammar"], _sources()["words"]
    if symbol in grammar:
        parts = rng.choice(grammar[symbol]).split()
        return [word for part in parts for word in _expand(part, rng)]
    for ending in ("+S", "'S", ""):
        stem = symbol.removesuffix(ending)
        if symbol.endswith(ending) and stem in classes:
            return [rng.choice(classes[stem].split()) + ending.lstrip("+")]
    return [symbol]


def _check(parameters):
    for name, value in parameters.items():
        if name.endswith(("_minutes", "_speakers")) and not value > 0:
            raise InputError(f"{name} must be above 0, got {value}")
    limits = parameters["noise_snr"]
    if len(limits) != 2 or limits[0] > limits[1]:
        raise InputError(
            f"noise_snr must be a lowest and a highest ratio (dB), got {limits}"
        )


def _is_made(folder, parameters):
    """Whether the corpus exists; raise if there is anything else."""
    if not folder.exists() or (folder.is_dir() and not os.listdir(folder)):
        return False
    made = "no MiniLibri corpus"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        made = json.loads((folder / INFO_FILE).read_text())["parameters"]
    if made != parameters:
        raise InputError(
            f"{folder} holds {made}, and asked for is {parameters}: choose "
            "another folder, or delete this one"
        )
    return True


def _draw_speakers(parameters):
    """Speakers of the clean splits, then those of test-other."""
    accents = _sources()["accents"].split()
    variants = _sources()["variants"].split()
    count = parameters["train_speakers"] + parameters["test_speakers"]
    if count > len(variants):
        raise InputError(
            f"{count} speakers are asked for, and there are {len(variants)} "
            "voices: lower train_speakers or test_speakers"
        )
    rng = random.Random(f"{parameters['seed']} speakers")
    return [
        Speaker(
            id=str(1001 + i),
            voice=f"{rng.choice(accents)}+{variant}",
            rate=rng.randint(145, 180),
            pitch=rng.randint(35, 65),
        )
        for i, variant in enumerate(rng.sample(variants, count))
    ]


def _plan(parameters, speakers):
    """Every utterance of the corpus, before any audio is made."""
    seen = speakers[: parameters["train_speakers"]]
    unseen = speakers[parameters["train_speakers"] :]
    splits = (
        ("dev-clean", "dev", seen),
        ("test-clean", "test", seen),
        ("test-other", "test", unseen),
        ("train-clean-100", "train", seen),
    )
    sentences, utterances, chapters = set(), [], 0
    for split, size, voices in splits:
        rng = random.Random(f"{parameters['seed']} {split}")
        seconds = 60 * parameters[f"{size}_minutes"]
        turns, drawn = list(voices), []
        rng.shuffle(turns)
        while seconds > 0:
            text = make_sentence(rng)
            speaker = turns[len(drawn) % len(turns)]
            rate = speaker.rate + rng.randint(-8, 8)
            # Fitted to the training split made with seed 2
            duration = 0.34 + 8.42 * len(text) / rate
            if text in sentences or not _SHORTEST < duration < _LONGEST:
                continue
            sentences.add(text)
            seconds -= duration
            noise = None
            if split == "test-other":
                kind = rng.choice(("white", "pink", "babble"))
                noise = kind, rng.uniform(*parameters["noise_snr"])
            pitch = speaker.pitch + rng.randint(-5, 5)
            width = rng.randint(40, 70)
            drawn.append(
                Utterance(split, None, speaker, rate, pitch, width, text, noise)
            )
        for speaker in voices:
            members = [one for one in drawn if one.speaker == speaker]
            for i, one in enumerate(members):
                chapters += i % _CHAPTER == 0
                name = f"{speaker.id}-{chapters}-{i % _CHAPTER:04d}"
                utterances.append(one._replace(id=name))
    return utterances


def _make_audio(folder, seed, utterances):
    """Write audio and transcripts; returns the size of each split."""
    by_speaker = collections.defaultdict(list)
    sizes = {}
    for one in utterances:
        by_speaker[one.speaker].append(one)
        sizes[one.split] = {"utterances": 0, "seconds": 0.0}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(
            functools.partial(_make_speaker, folder, seed), by_speaker.values()
        )
        bar = {"desc": "MiniLibri", "unit": "voice", "disable": None}
        for durations in tqdm(made, total=len(by_speaker), **bar):
            for split, seconds in durations:
                sizes[split]["utterances"] += 1
                sizes[split]["seconds"] += seconds
    for size in sizes.values():
        size["seconds"] = round(size["seconds"], 3)
    return sizes


def _make_speaker(folder, seed, utterances):
    """Write what one speaker says; returns splits and durations (seconds)."""
    speaker = utterances[0].speaker
    sample_rate, raw = _run_espeak(
        zlib.crc32(f"{seed} {speaker.id}".encode()) >> 1,
        [
            {
                "voice": speaker.voice,
                "rate": one.rate,
                "pitch": one.pitch,
                "range": one.range,
                # In capitals some words would be spelled out.
                "text": one.text.lower(),
            }
            for one in utterances
        ],
    )
    waves = [_shape(wave, sample_rate) for wave in raw]
    # Played backwards and on top of itself, speech has no words left.
    babble = np.concatenate(waves)[::-1]
    for one, wave in zip(utterances, waves, strict=True):
        rng = np.random.default_rng(zlib.crc32(f"{seed} {one.id}".encode()))
        if one.noise:
            kind, snr = one.noise
            noise = _noise(kind, len(wave), babble, rng)
            gain = 10 ** (-snr / 20) * _rms(wave) / _rms(noise)
            wave = wave + gain * noise
        wave = wave * min(_LEVEL / _rms(wave), 0.5 / np.abs(wave).max())
        # Digital silence would be minus infinity in log features.
        wave = wave + _FLOOR * rng.standard_normal(len(wave))
        # Recordings differ in level.
        wave = wave * 10 ** (rng.uniform(*_GAINS) / 20)
        prefix = one.id.rpartition("-")[0]
        chapter = folder / one.split / prefix.replace("-", "/")
        chapter.mkdir(parents=True, exist_ok=True)
        path = chapter / f"{one.id}.flac"
        soundfile.write(path, wave, SAMPLE_RATE, subtype="PCM_16")
        with open(chapter / f"{prefix}.trans.txt", "a") as file:
            file.write(f"{one.id} {one.text}\n")
    durations = [len(wave) / SAMPLE_RATE for wave in waves]
    return list(zip([one.split for one in utterances], durations, strict=True))


def _shape(wave, sample_rate):
    """Resample, and leave a margin of silence around the speech."""
    wave = resample(torch.from_numpy(wave), sample_rate, SAMPLE_RATE).numpy()
    frame = SAMPLE_RATE // 100
    frames = np.abs(wave[: len(wave) // frame * frame]).reshape(-1, frame)
    loudness = frames.max(axis=1)
    loud = np.flatnonzero(loudness > _QUIET * loudness.max()) * frame
    margin = round(_MARGIN * SAMPLE_RATE)
    wave = np.pad(wave, margin)
    return wave[loud[0] : loud[-1] + frame + 2 * margin]


def _noise(kind, samples, babble, rng):
    """White, pink or babble noise of any level, ``(samples,)``."""
    if kind == "babble":
        starts = rng.integers(len(babble), size=6)
        return sum(np.resize(np.roll(babble, s), samples) for s in starts)
    white = rng.standard_normal(samples)
    if kind == "white":
        return white
    spectrum = np.fft.rfft(white)
    # Power falls with frequency; below 20 Hz it would only shift the level.
    hertz = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    spectrum *= np.where(hertz < 20, 0, 1 / np.sqrt(np.maximum(hertz, 20)))
    return np.fft.irfft(spectrum, samples)


def _rms(wave):
    return np.sqrt(np.mean(np.square(wave, dtype=np.float64)))


def _run_espeak(seed, utterances):
    """Synthesise in a fresh process: the sample rate, and a wave of each."""
    done = subprocess.run(
        [sys.executable, espeak.__file__],
        input=json.dumps({"seed": seed, "utterances": utterances}).encode(),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip()
        reason = reason or f"exit status {done.returncode}"
        raise InputError(
            f"eSpeak NG cannot be used: {reason}\n"
            "MiniLibri needs it: pip install espeakng-loader"
        )
    head, _, samples = done.stdout.partition(b"\n")
    head = json.loads(head)
    waves = np.frombuffer(samples, np.int16) / np.float32(2**15)
    ends = np.cumsum(head["samples"])[:-1]
    return head["sample_rate"], np.split(waves, ends)
