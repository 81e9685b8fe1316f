"""Recordings of any format, rate and number of channels, for training."""

import functools
from fractions import Fraction

import soundfile
import torch
from torchaudio.transforms import Resample

from tutornet_sb.util.errors import InputError

# Suffixes of audio files that are looked for in a folder, whatever their case.
# Of several files of one utterance the first in this order is read.
SUFFIXES = (
    ".flac .wav .w64 .rf64 .aif .aiff .au .caf .sph .opus .ogg .oga .mp3"
).split()
# Sample rates that are converted (Hz)
RATES = 8000, 48000
# STREAMINFO counts in 36 bits; libsndfile reports more for "unknown".
MOST_SAMPLES = 2**36
# Enough for every network, also at 1.5 times the speed (seconds)
LEAST_SECONDS = 0.04
# TypeError: of files without a header
_UNREADABLE = OSError, TypeError, soundfile.LibsndfileError


def read_header(path, size, sample_rate, max_seconds):
    """Check a recording of `size` bytes by its header.

    Returns its duration in seconds and None, or None and why it cannot be used.
    """
    if size == 0:
        return None, "empty audio file"
    try:
        info = soundfile.info(path)
    except _UNREADABLE:
        return None, "unreadable audio"
    lowest, highest = RATES
    rate = info.samplerate
    if rate != sample_rate and not lowest <= rate <= highest:
        return None, f"sample rate of {rate} Hz outside {lowest} to {highest}"
    if not 0 < info.frames < MOST_SAMPLES:
        return None, "audio of no or unknown length"
    seconds = info.frames / rate
    if seconds < LEAST_SECONDS:
        return None, f"audio shorter than {LEAST_SECONDS:g} s"
    if seconds > max_seconds:
        return None, f"audio longer than max_seconds={max_seconds:g} allows"
    return seconds, None


def read_utterance(key, path, seconds, sample_rate=16000):
    """Read the waveform ``(samples,)`` of an utterance, as in its manifest.

    Channels are averaged, and the mean is resampled. Raises InputError, with
    the utterance's `key`, if the file is missing, damaged, not of `seconds` or
    has samples that are not finite.
    """
    try:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except _UNREADABLE as error:
        reason = f"cannot be read as audio ({error})"
    else:
        samples = round(seconds * rate)
        waveform = torch.from_numpy(wave).mean(dim=1)
        if len(waveform) != samples:
            reason = (
                f"has {len(waveform)} samples, and its header promised "
                f"{samples}"
            )
        elif not waveform.isfinite().all():
            reason = "holds samples that are not finite"
        elif rate == sample_rate:
            return waveform
        else:
            return resampler(ratio_of(rate, sample_rate))(waveform)
    raise InputError(
        f"utterance {key}: {path} {reason}. Repair the file, or take it out of "
        "the corpus with its transcript, and give the same command again: what "
        "has been computed stays"
    )


def ratio_of(rate, sample_rate):
    """Ratio of two sample rates as a Fraction, to less than 3 in a million.

    Ratios that need more than 640 filters are rounded.
    """
    return Fraction(rate, sample_rate).limit_denominator(640)


@functools.lru_cache(maxsize=16)
def resampler(ratio):
    """Make the Resample transform for a ratio from ``ratio_of``, once."""
    # Made in single precision, the filters are off by up to 1e-4.
    filters = Resample(ratio.numerator, ratio.denominator, dtype=torch.float64)
    return filters.float()
