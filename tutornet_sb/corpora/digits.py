"""Connected digits in LibriSpeech's layout, of the Free Spoken Digit Dataset.

Recordings of single digits (Jakobovski et al., CC BY-SA 4.0, a clone of its
repository) are joined to strings of three to seven digits of one speaker, with
short gaps, upsampled to 16 kHz, and given a little noise. The same recordings
make the same corpus, sample for sample. No recording stands in two splits.
"""

import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from scipy.signal import resample_poly

from tutornet_sb.corpora.librispeech import CorpusError
from tutornet_sb.files import write_folder_atomically, write_json

WORDS = "ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE".split()
# Their numbers in the corpus. A sixth speaker is left out.
SPEAKERS = {
    "george": 1001,
    "jackson": 1002,
    "lucas": 1003,
    "nicolas": 1004,
    "yweweler": 1005,
}
SOURCE_RATE, RATE = 8000, 16000  # Hz
DIGITS = 3, 7  # of an utterance
LOUDNESS = 0.06  # root mean square of a digit
# Seconds of silence before the first digit, and after each
BEFORE, AFTER = (0.05, 0.2), (0.02, 0.2)
NOISE = -4.0, -2.6  # decimal logarithm of the noise's standard deviation
DESCRIPTION = "digits.json"


class Split(NamedTuple):
    """What a split is made of.

    Attributes
    ----------
    recordings : range
        Numbers of the recordings, of each digit and speaker.
    uses : int
        How often each is heard.
    seed : int
        Of order, lengths, gaps and noise.
    """

    recordings: range
    uses: int
    seed: int


SPLITS = {
    "train-clean-100": Split(range(10, 50), 2, 11),
    "dev-clean": Split(range(7, 10), 3, 12),
    "test-clean": Split(range(5, 7), 3, 13),
}


def make_digits(recordings, folder):
    """Make the corpus.

    Arguments
    ---------
    recordings : str or pathlib.Path
        The folder ``recordings`` of the data set, with files
        ``DIGIT_SPEAKER_NUMBER.wav``.
    folder : str or pathlib.Path
        Will directly hold the splits; it appears in one piece.

    Returns
    -------
    dict
        By split ``utterances`` and ``seconds``, which ``digits.json`` in the
        folder holds too.

    Raises
    ------
    CorpusError
        If the folder is there already, or a recording is missing or no mono
        or stereo audio at 8 kHz.
    """
    recordings, folder = Path(recordings), Path(folder)
    if folder.exists():
        raise CorpusError(
            f"{folder} is there already: delete it, or name another folder"
        )
    _check(recordings)
    sizes = {}

    def write(unfinished):
        for name, split in SPLITS.items():
            sizes[name] = _write_split(recordings, unfinished / name, split)
        write_json(unfinished / DESCRIPTION, {"splits": sizes})

    write_folder_atomically(folder, write)
    return sizes


def _check(recordings):
    """Name what is missing before anything is made."""
    missing = [
        path.name
        for split in SPLITS.values()
        for speaker in SPEAKERS
        for digit in range(10)
        for number in split.recordings
        if not (path := _file(recordings, digit, speaker, number)).is_file()
    ]
    if missing:
        raise CorpusError(
            f"{recordings} lacks {len(missing)} recordings, the first of them "
            f"{missing[0]}: give the folder 'recordings' of a clone of the "
            "Free Spoken Digit Dataset"
        )


def _file(recordings, digit, speaker, number):
    return recordings / f"{digit}_{speaker}_{number}.wav"


def _write_split(recordings, to, split):
    """Write all utterances of a split; give how many and how long they are."""
    rng = random.Random(split.seed)
    noise = np.random.default_rng(split.seed)
    utterances, samples = 0, 0
    for speaker, number in SPEAKERS.items():
        chapter, lines = to / str(number) / "1", []
        chapter.mkdir(parents=True)
        left = [(d, i) for d in range(10) for i in split.recordings]
        left *= split.uses
        rng.shuffle(left)
        while len(left) >= DIGITS[0]:
            count = min(rng.randint(*DIGITS), len(left))
            said, left = left[:count], left[count:]
            files = [_file(recordings, d, speaker, i) for d, i in said]
            wav = _join(files, rng, noise)
            key = f"{number}-1-{len(lines):04d}"
            soundfile.write(
                chapter / f"{key}.flac", wav, RATE, subtype="PCM_16"
            )
            text = " ".join(WORDS[digit] for digit, _ in said)
            lines.append(f"{key} {text}\n")
            samples += len(wav)
        listing = chapter / f"{number}-1.trans.txt"
        listing.write_text("".join(lines), encoding="utf-8")
        utterances += len(lines)
    return {"utterances": utterances, "seconds": samples / RATE}


def _join(files, rng, noise):
    """Join recordings, with gaps between them and noise over all."""

    def gap(shortest, longest):
        samples = int(RATE * rng.uniform(shortest, longest))
        return np.zeros(samples, np.float32)

    parts = [gap(*BEFORE)]
    for file in files:
        parts += [_read(file), gap(*AFTER)]
    wav = np.concatenate(parts)
    hiss = noise.standard_normal(len(wav)).astype(np.float32)
    return np.clip(wav + hiss * 10 ** rng.uniform(*NOISE), -0.99, 0.99)


def _read(file):
    """Read a digit at the corpus' rate and loudness, ``(samples,)``."""
    try:
        wav, rate = soundfile.read(file, dtype="float32")
    except soundfile.LibsndfileError as error:
        raise CorpusError(f"{file} cannot be read: {error}") from None
    if rate != SOURCE_RATE or not len(wav):
        raise CorpusError(
            f"{file} has {len(wav)} samples at {rate} Hz, not some at "
            f"{SOURCE_RATE} Hz"
        )
    if wav.ndim > 1:
        wav = wav.mean(1)
    wav = resample_poly(wav, RATE // SOURCE_RATE, 1).astype(np.float32)
    return wav / (np.sqrt(np.square(wav).mean()) + 1e-6) * LOUDNESS
