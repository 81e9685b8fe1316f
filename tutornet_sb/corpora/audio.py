"""Recordings of any format, rate and number of channels, for training."""

import functools
from fractions import Fraction

import soundfile
import torch
from torchaudio.transforms import Resample

from tutornet_sb.util.errors import InputError

# Endings of audio files that are looked for in a folder, whatever their case.
# Of several files of one utterance the first in this order is read.
SUFFIXES = (
    ".flac .wav .w64 .rf64 .aif .aiff .au .caf .sph .opus .ogg .oga .mp3"
).split()
# Sample rates that are converted (Hz)
RATES = 8000, 48000
# STREAMINFO counts in 36 bits; libsndfile reports more for "unknown".
MOST_SAMPLES = 2**36
# What every network can encode, spoken faster by half (seconds)
LEAST_SECONDS = 0.04


def read_header(path, size, sample_rate, max_seconds):
    """Check a recording by its header alone.

    Arguments
    ---------
    path : str or pathlib.Path
        Any file that soundfile reads.
    size : int
        Its size (bytes).
    sample_rate : int
        Sample rate that it will be converted to (Hz).
    max_seconds : float
        The longest recording that is wanted.

    Returns
    -------
    seconds : float or None
        Its duration.
    conversion : str
        What has to be converted, such as ``8000 Hz, 2 channels``; empty if
        nothing.
    reason : str or None
        Why it cannot be used.
    """
    if size == 0:
        return None, "", "empty audio file"
    try:
        info = soundfile.info(path)
    # TypeError: of files without a header
    except (OSError, TypeError, soundfile.LibsndfileError):
        return None, "", "unreadable audio"
    lowest, highest = RATES
    rate = info.samplerate
    if rate != sample_rate and not lowest <= rate <= highest:
        reason = f"sample rate of {rate} Hz outside {lowest} to {highest}"
        return None, "", reason
    if not 0 < info.frames < MOST_SAMPLES:
        return None, "", "audio of no or unknown length"
    seconds = info.frames / rate
    if seconds < LEAST_SECONDS:
        return None, "", f"audio shorter than {LEAST_SECONDS:g} s"
    if seconds > max_seconds:
        reason = f"audio longer than max_seconds={max_seconds:g} allows"
        return None, "", reason
    conversion = []
    if rate != sample_rate:
        conversion.append(f"{rate} Hz")
    if info.channels != 1:
        conversion.append(f"{info.channels} channels")
    return seconds, ", ".join(conversion), None


def read_utterance(key, path, seconds, sample_rate=16000):
    """Read the waveform of an utterance as its manifest describes it.

    Channels are averaged, and the mean is resampled.

    Arguments
    ---------
    key : str
        Its id.
    path : str
        Its audio file.
    seconds : float
        Its duration.
    sample_rate : int
        Sample rate of the result (Hz).

    Returns
    -------
    torch.Tensor
        The waveform, ``(samples,)``.

    Raises
    ------
    InputError
        If the file is missing, damaged or of another length, or holds what is
        no number.
    """
    try:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, TypeError, soundfile.LibsndfileError) as error:
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
    """Give the ratio by which to resample.

    Arguments
    ---------
    rate, sample_rate : int
        Of the recording and of the result (Hz).

    Returns
    -------
    fractions.Fraction
        Their ratio. One that needs more than 640 filters is rounded, by less
        than three in a million.
    """
    return Fraction(rate, sample_rate).limit_denominator(640)


@functools.lru_cache(maxsize=16)
def resampler(ratio):
    """Make the filters for a ratio of sample rates, once.

    Arguments
    ---------
    ratio : fractions.Fraction
        From :func:`ratio_of`.

    Returns
    -------
    torchaudio.transforms.Resample
        Called with a waveform, ``(samples,)``.
    """
    # Made in single precision, the filters are off by up to 1e-4.
    filters = Resample(ratio.numerator, ratio.denominator, dtype=torch.float64)
    return filters.float()
