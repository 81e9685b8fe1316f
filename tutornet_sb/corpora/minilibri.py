"""MiniLibri: a small corpus of synthetic speech in LibriSpeech's layout.

eSpeak NG reads sentences of a small grammar, in as many voices as wanted. It
is made once, in seconds, and the same bytes come from the same arguments.

==================  =======================================================
train-clean-100     the training voices
dev-clean           the training voices, other sentences
test-clean          the training voices, other sentences
test-other          other voices, other sentences, and noise
==================  =======================================================

No sentence occurs twice in the corpus. Utterances differ in level, as
recordings do.
"""

import collections
import concurrent.futures
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import zlib

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample
from tqdm import tqdm

from tutornet_sb.corpora import espeak
from tutornet_sb.corpora.librispeech import CorpusError

SAMPLE_RATE = 16000  # Hz
INFO_FILE = "minilibri.json"
_VERSION = 2  # raise when the same arguments make another corpus
_CHAPTER = 20  # utterances
_LEVEL = 0.05  # root mean square of an utterance, full scale 1
_FLOOR = 2e-4  # noise that stands under everything, -74 dB full scale
_GAINS = -14.0, 5.0  # of the recordings (dB): RMS -40 to -21 dB full scale
_MARGIN = 0.1  # silence kept around the speech, seconds
_QUIET = 0.01  # frames this far below the loudest (amplitude) are silence
_SHORTEST, _LONGEST = 1.7, 5.7  # estimated seconds, for 1.5 to 6 in truth

ACCENTS = (
    "en",
    "en-us",
    "en-gb-scotland",
    "en-gb-x-rp",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-029",
    "en-us-nyc",
)
# Left out: whispers, robots, echoes, stutters, plain duplicates, and those
# whose cepstra lie as far from the plain voices as a whisper's.
VARIANTS = (
    "Alex Andrea Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Mario "
    "Michael Mike Nguyen Reed RicishayMax Storm Tweaky adam aunty "
    "belinda benjamin boris caleb ed edward edward2 f1 f2 f3 f4 f5 "
    "grandma grandpa gustave iven iven2 iven3 iven4 john klatt2 klatt3 "
    "linda m1 m2 m3 m4 m5 m6 m7 m8 marcelo max michel miguel mike2 "
    "pablo paul pedro quincy rob robert sandro steph steph2 steph3 "
    "travis victor"
).split()

# A rule is a list of alternatives; lower-case words are rules in their turn.
# "+S" joins on as a plural and "'S" as a possessive.
GRAMMAR = {
    "sentence": [
        "clause",
        "clause",
        "clause time",
        "time clause",
        "clause LINK clause",
        "clause BECAUSE clause",
        "clause WHEN clause",
        "NAME SAID THAT clause",
        "NAME ASKED WHETHER clause",
        "IF NAME will BARE thing-phrase we will BARE thing-phrase",
        "THERE WERE count-phrase place-phrase",
        "THERE WAS single-phrase place-phrase",
        "question",
        "I will BARE thing-phrase time",
        "IT WAS clock WHEN clause",
    ],
    "clause": [
        "person VERBED thing-phrase",
        "person VERBED thing-phrase place-phrase",
        "person VERBED thing-phrase MANNER",
        "person WENT MANNER TO THE PLACE",
        "person MOVED place-phrase",
        "creature MOVED place-phrase",
        "creature MOVED MANNER",
        "person didnt BARE thing-phrase",
        "person GAVE person thing-phrase",
        "person COULD BARE thing-phrase",
        "thing-phrase place-phrase WAS VERY ADJ",
        "creature WAS QUALITY THAN creature",
    ],
    "question": [
        "DID person BARE thing-phrase",
        "WHERE DID person BARE thing-phrase",
        "WHY DID person BARE thing-phrase",
        "WILL NAME BARE thing-phrase time",
        "HOW MANY THING+S DID person BARE",
    ],
    "person": ["NAME", "NAME", "THE PERSON", "THE ADJ PERSON", "owner PERSON"],
    "creature": ["THE ANIMAL", "THE ADJ ANIMAL", "owner ANIMAL"],
    "owner": ["NAME'S", "NAME'S", "MY", "OUR", "HER", "HIS"],
    "thing-phrase": [
        "single-phrase",
        "count-phrase",
        "THE THING",
        "THE ADJ THING",
        "owner THING",
        "owner ADJ THING",
        "THE THING OF THE PERSON",
    ],
    "single-phrase": ["A THING", "A ADJ THING", "A ADJ ANIMAL"],
    "count-phrase": ["NUM THING+S", "NUM ADJ THING+S"],
    "place-phrase": ["PREP THE PLACE", "PREP THE PLACE", "PREP THE ADJ PLACE"],
    "time": [
        "ON DAY",
        "ON DAY DAYTIME",
        "BEFORE SUNRISE",
        "AFTER THE STORM",
        "EVERY DAY",
        "IN THE DAYTIME",
        "LAST SEASON",
        "AT HOUR O'CLOCK",
        "NUM PERIOD+S AGO",
        "FOR NUM PERIOD+S",
    ],
    "clock": ["HOUR O'CLOCK", "HALF PAST HOUR", "QUARTER TO HOUR"],
    "didnt": ["DIDN'T", "COULDN'T", "WOULDN'T"],
    "will": ["WILL", "CAN", "WON'T", "CAN'T"],
    "we": ["WE", "THEY", "YOU"],
}
WORDS = {
    "NAME": "ALICE ARTHUR BEATRICE CHARLES DOROTHY EDWIN FLORENCE GEORGE "
    "HELEN HENRY JULIA MARTIN OLIVER ROSE THOMAS WALTER",
    "PERSON": "AUNT BAKER BOY BROTHER CAPTAIN DOCTOR FARMER FISHERMAN "
    "GARDENER GIRL JUDGE KING NEIGHBOR PAINTER PRINCESS QUEEN SAILOR SISTER "
    "SOLDIER STRANGER TEACHER UNCLE",
    "ANIMAL": "BEAR BIRD CAT COW DOG DUCK GOAT HORSE LION MONKEY PIG RABBIT "
    "SPIDER TIGER",
    "THING": "APPLE BASKET BELL BLANKET BOAT BOOK BOTTLE CANDLE CHAIR CLOCK "
    "COAT COIN EGG FLAG FLOWER HAMMER HAT KEY LAMP LETTER MAP MIRROR ORANGE "
    "PAINTING RING ROPE SHOE STONE SWORD TABLE WAGON",
    "PLACE": "BARN BRIDGE CASTLE CHURCH CITY CORNER FIELD FOREST GARDEN GATE "
    "HILL HOUSE ISLAND KITCHEN LAKE LIBRARY MARKET MOUNTAIN OCEAN RIVER ROAD "
    "SCHOOL TOWER VALLEY VILLAGE WINDOW",
    "ADJ": "ANCIENT ANGRY BEAUTIFUL BLACK BLUE BRAVE BRIGHT BROKEN BROWN "
    "CLEAN DARK EMPTY ENORMOUS FAMOUS GOLDEN GREEN GREY HEAVY HUNGRY LITTLE "
    "LONELY NARROW OLD PURPLE QUIET RED SILVER STRANGE TALL THIRSTY TINY "
    "WHITE WOODEN YELLOW YOUNG",
    "VERBED": "ADMIRED BORROWED BOUGHT BROUGHT CARRIED CHOSE CLEANED "
    "COLLECTED DELIVERED DISCOVERED DROPPED EXAMINED FOLLOWED FORGOT FOUND "
    "GUARDED KEPT LIFTED LOST NOTICED PAINTED POLISHED PROMISED PUSHED "
    "REMEMBERED REPAIRED SOLD STOLE TOOK WATCHED WRAPPED",
    "BARE": "BORROW BRING BUY CARRY CHOOSE CLEAN COLLECT EXAMINE FIND FOLLOW "
    "FORGET KEEP LIFT NOTICE PAINT PROMISE REMEMBER REPAIR SELL SHARE STEAL "
    "TAKE WATCH",
    "MOVED": "CLIMBED DANCED HURRIED JUMPED LAUGHED RAN RESTED SLEPT STOOD "
    "TRAVELED WAITED WALKED WANDERED",
    "MANNER": "ALONE BADLY CAREFULLY CHEERFULLY GENTLY PROUDLY QUICKLY "
    "SECRETLY SLOWLY SUDDENLY TOGETHER",
    "PREP": "ABOVE ACROSS AROUND BEHIND BESIDE INSIDE NEAR UNDER",
    "QUALITY": "BIGGER FASTER OLDER SMALLER STRONGER TALLER WISER",
    "NUM": "TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN ELEVEN TWELVE "
    "THIRTEEN FIFTEEN TWENTY FORTY SIXTY",
    "HOUR": "ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN ELEVEN TWELVE",
    "DAY": "MONDAY TUESDAY WEDNESDAY THURSDAY FRIDAY SATURDAY SUNDAY",
    "DAYTIME": "MORNING AFTERNOON EVENING",
    "SEASON": "SPRING SUMMER AUTUMN WINTER WEEK",
    "PERIOD": "DAY WEEK MONTH YEAR",
    "LINK": "AND BUT WHILE",
}

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
    workers=None,
):
    """Make the corpus, unless `folder` holds it already.

    It appears in one piece: what is being made stands beside `folder` until
    it is complete. ``minilibri.json`` keeps the arguments, the size of each
    split, and the voice of each speaker.

    Arguments
    ---------
    folder : str or pathlib.Path
        Will directly hold the splits.
    seed : int
        Of sentences, voices and noise.
    train_minutes, dev_minutes : float
        Speech in train-clean-100 and dev-clean, to within a few percent.
    test_minutes : float
        Speech in test-clean, and as much again in test-other.
    train_speakers, test_speakers : int
        Voices of the clean splits, and others for test-other.
    noise_snr : tuple of float
        Lowest and highest signal-to-noise ratio of test-other, in dB. The
        noise of an utterance is white, pink or babble.
    workers : int, optional
        Speakers made at a time; one a processor by default. No influence on
        the corpus.

    Returns
    -------
    pathlib.Path
        `folder`, absolute.

    Raises
    ------
    CorpusError
        If eSpeak NG cannot be used, if `folder` holds anything else, or if
        a value makes no sense.

    Example
    -------
    >>> folder = make_minilibri("results/minilibri")  # doctest: +SKIP
    >>> sorted(path.name for path in folder.iterdir())  # doctest: +SKIP
    ['dev-clean', 'minilibri.json', 'test-clean', 'test-other', ...]
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
    if _is_made(folder, parameters):
        return folder
    speakers = _draw_speakers(parameters)
    utterances = _plan(parameters, speakers)

    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _write_transcripts(partial, utterances)
        info = {"parameters": parameters}
        info["splits"] = _make_audio(partial, seed, utterances, workers)
        info["voices"] = {speaker.id: speaker.voice for speaker in speakers}
        text = json.dumps(info, indent=2) + "\n"
        (partial / INFO_FILE).write_text(text)
        try:
            partial.rename(folder)
        except OSError:
            # Someone else may have finished the same corpus meanwhile.
            if not _is_made(folder, parameters):
                raise
    except OSError as error:
        raise CorpusError(f"Cannot make {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def find_folder(corpus):
    """Say where the MiniLibri of a corpus file is made.

    Arguments
    ---------
    corpus : dict
        What the file says.

    Returns
    -------
    str
        The ``folder`` of its ``minilibri``, or ``data/MiniLibri``, of the
        working folder. MiniLibris of other sizes need other folders.

    Example
    -------
    >>> find_folder({"minilibri": {"seed": 1, "folder": "data/large"}})
    'data/large'
    """
    values = corpus.get("minilibri") or {}
    return values.get("folder") or "data/MiniLibri"


def make_sentence(rng):
    """Draw a sentence of the grammar.

    Arguments
    ---------
    rng : random.Random
        Where chance comes from.

    Returns
    -------
    str
        Upper-case words of A-Z and apostrophe.

    Example
    -------
    >>> make_sentence(random.Random(5)) == make_sentence(random.Random(5))
    True
    """
    words = _expand("sentence", rng)
    for i, word in enumerate(words[:-1]):
        if word == "A" and words[i + 1][0] in "AEIOU":
            words[i] = "AN"
    return " ".join(words)


def _expand(symbol, rng):
    """Words of a rule, a word class with an ending, or a plain word."""
    if symbol in GRAMMAR:
        parts = rng.choice(GRAMMAR[symbol]).split()
        return [word for part in parts for word in _expand(part, rng)]
    for ending in ("+S", "'S", ""):
        stem = symbol.removesuffix(ending)
        if symbol.endswith(ending) and stem in WORDS:
            return [rng.choice(WORDS[stem].split()) + ending.lstrip("+")]
    return [symbol]


def _check(parameters):
    """Refuse values that make no corpus."""
    for name, value in parameters.items():
        if name.endswith(("_minutes", "_speakers")) and not value > 0:
            raise CorpusError(f"{name} is {value}, but must be above 0.")
    limits = parameters["noise_snr"]
    if len(limits) != 2 or limits[0] > limits[1]:
        raise CorpusError(
            f"noise_snr is {limits}, not a lowest and a highest ratio in dB."
        )


def _is_made(folder, parameters):
    """Whether the corpus is there; anything else there is an error."""
    if not folder.exists() or (folder.is_dir() and not os.listdir(folder)):
        return False
    advice = "Choose another folder, or delete this one."
    try:
        made = json.loads((folder / INFO_FILE).read_text())["parameters"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CorpusError(
            f"{folder} exists, and is no MiniLibri corpus. {advice}"
        ) from None
    if made != parameters:
        raise CorpusError(
            f"{folder} holds another MiniLibri corpus. {advice}\n"
            f"there: {json.dumps(made)}\nasked: {json.dumps(parameters)}"
        )
    return True


def _draw_speakers(parameters):
    """Speakers of the clean splits, then those of test-other."""
    known, _ = _run_espeak({"seed": 0, "accents": ACCENTS})
    variants = [name for name in VARIANTS if name in known["variants"]]
    count = parameters["train_speakers"] + parameters["test_speakers"]
    if count > len(variants) or not known["accents"]:
        raise CorpusError(
            f"{count} speakers are asked for, but this eSpeak NG has "
            f"{len(variants)} voices in {len(known['accents'])} accents."
        )
    rng = random.Random(f"{parameters['seed']} speakers")
    return [
        Speaker(
            id=str(1001 + i),
            voice=f"{rng.choice(known['accents'])}+{variant}",
            rate=rng.randint(145, 180),
            pitch=rng.randint(35, 65),
        )
        for i, variant in enumerate(rng.sample(variants, count))
    ]


def _plan(parameters, speakers):
    """Every utterance of the corpus, before a sound is made."""
    trained = speakers[: parameters["train_speakers"]]
    unheard = speakers[parameters["train_speakers"] :]
    splits = (
        ("dev-clean", "dev", trained),
        ("test-clean", "test", trained),
        ("test-other", "test", unheard),
        ("train-clean-100", "train", trained),
    )
    sentences = set()
    utterances = []
    chapters = 0
    for split, size, voices in splits:
        rng = random.Random(f"{parameters['seed']} {split}")
        seconds = 60 * parameters[f"{size}_minutes"]
        by_speaker = {speaker: [] for speaker in voices}
        turns = list(voices)
        rng.shuffle(turns)
        while seconds > 0:
            text = make_sentence(rng)
            speaker = turns[0]
            rate = speaker.rate + rng.randint(-8, 8)
            duration = _estimate(text, rate)
            if text in sentences or not _SHORTEST < duration < _LONGEST:
                continue
            sentences.add(text)
            seconds -= duration
            noise = None
            if split == "test-other":
                kind = rng.choice(("white", "pink", "babble"))
                noise = kind, rng.uniform(*parameters["noise_snr"])
            utterance = Utterance(
                split=split,
                id=None,
                speaker=speaker,
                rate=rate,
                pitch=speaker.pitch + rng.randint(-5, 5),
                range=rng.randint(40, 70),
                text=text,
                noise=noise,
            )
            by_speaker[speaker].append(utterance)
            turns.append(turns.pop(0))
        for speaker, spoken in by_speaker.items():
            for i, utterance in enumerate(spoken):
                chapters += i % _CHAPTER == 0
                name = f"{speaker.id}-{chapters}-{i % _CHAPTER:04d}"
                utterances.append(utterance._replace(id=name))
    return utterances


def _estimate(text, rate):
    """Seconds that a text takes at a rate in words per minute."""
    # Fitted to the training split made with seed 2.
    return 0.34 + 8.42 * len(text) / rate


def _flac(folder, utterance):
    """Where an utterance goes."""
    chapter = utterance.id.split("-")[1]
    place = folder / utterance.split / utterance.speaker.id / chapter
    return place / f"{utterance.id}.flac"


def _write_transcripts(folder, utterances):
    chapters = collections.defaultdict(list)
    for utterance in utterances:
        chapters[_flac(folder, utterance).parent].append(utterance)
    for chapter, spoken in chapters.items():
        chapter.mkdir(parents=True)
        lines = [f"{utterance.id} {utterance.text}\n" for utterance in spoken]
        name = spoken[0].id.rpartition("-")[0] + ".trans.txt"
        (chapter / name).write_text("".join(lines))


def _make_audio(folder, seed, utterances, workers):
    """Write all audio; returns the size of each split."""
    by_speaker = collections.defaultdict(list)
    sizes = {}
    for utterance in utterances:
        by_speaker[utterance.speaker].append(utterance)
        size = {"utterances": 0, "seconds": 0.0}
        sizes.setdefault(utterance.split, size)["utterances"] += 1
    workers = workers or os.cpu_count()
    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        tqdm(
            desc="MiniLibri",
            total=len(utterances),
            unit="utt",
            disable=None,
        ) as bar,
    ):
        jobs = [
            pool.submit(_make_speaker, folder, seed, spoken)
            for spoken in by_speaker.values()
        ]
        try:
            for job, spoken in zip(jobs, by_speaker.values(), strict=True):
                for utterance, seconds in zip(
                    spoken, job.result(), strict=True
                ):
                    sizes[utterance.split]["seconds"] += seconds
                bar.update(len(spoken))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for size in sizes.values():
        size["seconds"] = round(size["seconds"], 3)
    return sizes


def _make_speaker(folder, seed, utterances):
    """Speak and write the utterances of one speaker.

    Arguments
    ---------
    folder : pathlib.Path
        Holds the splits, with the chapters' folders.
    seed : int
        Of the corpus.
    utterances : list of Utterance
        All of one speaker.

    Returns
    -------
    list of float
        Their durations in seconds.
    """
    speaker = utterances[0].speaker
    job = {
        "seed": zlib.crc32(f"{seed} {speaker.id}".encode()) >> 1,
        "utterances": [
            {
                "voice": speaker.voice,
                "rate": utterance.rate,
                "pitch": utterance.pitch,
                "range": utterance.range,
                # In capitals some words would be spelled out.
                "text": utterance.text.lower(),
            }
            for utterance in utterances
        ],
    }
    head, samples = _run_espeak(job)
    spoken = np.split(
        np.frombuffer(samples, np.int16) / np.float32(2**15),
        np.cumsum(head["samples"])[:-1],
    )
    waves = [_shape(wave, head["sample_rate"]) for wave in spoken]
    # Played backwards and on top of itself, speech has no words left.
    babble = np.concatenate(waves)[::-1]
    for utterance, wave in zip(utterances, waves, strict=True):
        name = f"{seed} {utterance.id}".encode()
        rng = np.random.default_rng(zlib.crc32(name))
        if utterance.noise:
            kind, snr = utterance.noise
            noise = _noise(kind, len(wave), babble, rng)
            gain = 10 ** (-snr / 20) * _rms(wave) / _rms(noise)
            wave = wave + gain * noise
        wave = wave * min(_LEVEL / _rms(wave), 0.5 / np.abs(wave).max())
        # Digital silence would be minus infinity in log features.
        wave = wave + _FLOOR * rng.standard_normal(len(wave))
        # Recordings differ in level.
        wave = wave * 10 ** (rng.uniform(*_GAINS) / 20)
        path = _flac(folder, utterance)
        soundfile.write(path, wave, SAMPLE_RATE, subtype="PCM_16")
    return [len(wave) / SAMPLE_RATE for wave in waves]


def _shape(wave, sample_rate):
    """Resample, and leave a margin of silence around the speech.

    Arguments
    ---------
    wave : numpy.ndarray
        Shape (samples,), float32.
    sample_rate : int
        In Hz.

    Returns
    -------
    numpy.ndarray
        Shape (samples at 16 kHz,), float32.
    """
    wave = resample(torch.from_numpy(wave), sample_rate, SAMPLE_RATE).numpy()
    frame = SAMPLE_RATE // 100
    frames = np.abs(wave[: len(wave) // frame * frame]).reshape(-1, frame)
    loudness = frames.max(axis=1)
    loud = np.flatnonzero(loudness > _QUIET * loudness.max()) * frame
    margin = round(_MARGIN * SAMPLE_RATE)
    wave = np.pad(wave, margin)
    return wave[loud[0] : loud[-1] + frame + 2 * margin]


def _noise(kind, samples, babble, rng):
    """White, pink or babble noise, shape (samples,), of any level."""
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


def _run_espeak(job):
    """Do a job in a fresh process; see `tutornet_sb.corpora.espeak`."""
    done = subprocess.run(
        [sys.executable, espeak.__file__],
        input=json.dumps(job).encode(),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip()
        reason = reason or f"exit status {done.returncode}"
        raise CorpusError(
            f"eSpeak NG cannot be used: {reason}\n"
            "MiniLibri needs it: pip install espeakng-loader"
        )
    head, _, samples = done.stdout.partition(b"\n")
    return json.loads(head), samples
