#!/usr/bin/env python3
"""Transcribe audio files with the ONNX model beside this script.

It needs onnxruntime, numpy and soundfile. Files may have any length, sample
rate and number of channels.
"""

# `tutornet export --onnx` puts a copy of this file beside the model, so nothing
# of the package is imported here; `tutornet transcribe` reads audio by it too.

import argparse
import json
import math
import sys
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
import soundfile

METADATA = "tutornet"
FORMAT = "tutornet_sb onnx 1"
ABOUT = "name", "sample_rate", "frame_period", "symbols", "blank_index"
# Audio up to so long is encoded in one piece, longer audio in windows of this
# length (seconds), of which the next one overlaps this part: as by
# `tutornet transcribe`.
WINDOW = 40.0
OVERLAP = 0.25
# Samples that are read at a time, over all channels
BLOCK = 2**19
# Sample rates of audio (Hz)
RATES = 1000, 768_000
# libsndfile reports more samples for "unknown".
MOST_SAMPLES = 2**36


def _refuse_ways_out(path):
    """Refuse weights outside of a graph's folder, as onnxruntime 1.24 does."""
    try:
        from onnx import external_data_helper, load
    except ImportError:
        raise ValueError(
            "the package onnx is needed beside an onnxruntime before 1.24"
        ) from None
    graph = load(path, load_external_data=False)
    for tensor in external_data_helper._get_all_tensors(graph):
        for entry in tensor.external_data:
            if (
                entry.key == "location"
                and Path(entry.value).name != entry.value
            ):
                raise ValueError(
                    f"its weights would be read from {entry.value}"
                )


class OnnxModel:
    """A model from waveform to log-probabilities, with its symbols.

    ``path`` is a file by ``tutornet export --onnx``, whose metadata become
    ``about`` and attributes; others raise ``ValueError``. 0 ``threads`` of
    onnxruntime are as many as there are cores.
    """

    def __init__(self, path, threads=0, provider="CPUExecutionProvider"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Errors are raised and need not be logged too.
        options.log_severity_level = 4
        release = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
        try:
            if release < (1, 24):
                _refuse_ways_out(path)
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=[provider]
            )
            known = self.session.get_modelmeta().custom_metadata_map
        # Its errors have no class of their own.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{path} cannot be loaded by onnxruntime: {reason}"
            ) from None
        try:
            self.about = json.loads(known.get(METADATA, "{}"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        if not isinstance(self.about, dict) or not self.about:
            raise ValueError(
                f"{path} has no metadata {METADATA!r}: only files by `tutornet "
                "export --onnx` can be used"
            )
        if self.about.get("format") != FORMAT:
            raise ValueError(
                f"{path} is of format {self.about.get('format')!r}, and this "
                f"version reads {FORMAT!r}: export the run again"
            )
        for name in ABOUT:
            if name not in self.about:
                raise ValueError(f"{path} is damaged: it lacks {name!r}")
            setattr(self, name, self.about[name])

    def encode(self, wavs, lengths):
        """Compute log-probabilities and valid frames.

        Of waveforms at the model's sample rate, ``(batch, samples)``, with
        their valid samples, ``(batch,)``: ``(batch, frames, symbols)``, of
        which padded frames are undefined, and ``(batch,)``.
        """
        return self.session.run(
            ["log_probs", "frames"],
            {
                "wavs": np.asarray(wavs, dtype=np.float32),
                "lengths": np.asarray(lengths, dtype=np.int64),
            },
        )

    def decode(self, best):
        """Greedy transcript by the best symbol of each frame."""
        starts = np.append(True, best[1:] != best[:-1])
        kept = best[starts & (best != self.blank_index)]
        text = "".join(self.symbols[i] for i in kept)
        return " ".join(text.replace("\u2581", " ").split())

    def transcribe(self, wav):
        """Transcribe a waveform of any length, ``(samples,)``."""
        return self.transcribe_blocks([wav])

    def transcribe_blocks(self, blocks):
        """Transcribe a waveform from blocks of it, ``(samples,)`` each.

        Beyond ``WINDOW`` seconds it is encoded in overlapping windows, which
        are joined in a pause within the middle half of what they share.
        """
        size, step, hop = plan_windows(
            WINDOW, self.frame_period, self.sample_rate
        )
        joiner = Joiner(hop, lambda best: best == self.blank_index)
        done = []
        for wav, _ in windows(blocks, size, step):
            log_probs, count = self.encode(wav[None], [len(wav)])
            log_probs = log_probs[0, : count[0]]
            if not np.isfinite(log_probs).all():
                raise ValueError("the model's output is not finite for it")
            done.append(joiner.accept(log_probs.argmax(-1)))
        return self.decode(np.concatenate([*done, joiner.pending]))


class Joiner:
    """Joins the frames of windows that begin ``hop`` frames apart.

    The cut is in a pause within the middle half of the frames that two windows
    share, where both have context on either side.
    """

    def __init__(self, hop, is_blank):
        self.hop, self.is_blank = hop, is_blank
        # Frames of the last window from `offset` on
        self.pending, self.offset = None, 0

    def accept(self, frames):
        """Take the next window, and return the frames before the cut."""
        if self.pending is None:
            self.pending = frames
            return frames[:0]
        start = self.hop - self.offset
        shared = min(len(self.pending) - start, len(frames))
        quarter = shared // 4
        middle = slice(quarter, shared - quarter)
        both = frames[middle], self.pending[start:][middle]
        ours, theirs = map(self.is_blank, both)
        self.offset = quarter + find_pause(ours & theirs)
        done = self.pending[: start + self.offset]
        self.pending = frames[self.offset :]
        return done


def find_pause(is_blank):
    """Find where to cut frames: in the middle of the longest pause.

    ``is_blank``, ``(frames,)``, is True in pauses. The frame after the cut is
    returned, the middle one if there is no pause.

    >>> find_pause(np.array([1, 0, 1, 1, 1, 1, 0, 1, 0]) == 1)
    4
    """
    edges = np.diff(np.asarray(is_blank, int), prepend=0, append=0)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    if not len(starts):
        return len(is_blank) // 2
    longest = np.argmax(ends - starts)
    return int(starts[longest] + ends[longest]) // 2


def plan_windows(seconds, frame_period, sample_rate):
    """Samples of a window and of a step to the next one, and frames of a step.

    These are whole frames, so that the frames of all windows are in step.
    """
    frames = max(4, math.floor(seconds / frame_period))
    hop = frames - max(2, round(OVERLAP * frames))
    size, step = (round(n * frame_period * sample_rate) for n in (frames, hop))
    return size, step, hop


def windows(blocks, size, hop):
    """Overlapping windows of a waveform, and whether each is the last."""
    held = np.zeros(0, np.float32)
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) > size:
            yield held[:size].copy(), False
            held = held[hop:]
    yield held, True


def resample(blocks, ratio, zeros=6, rolloff=0.99):
    """Resample a waveform that comes in blocks, ``(samples,)`` each.

    By Hann-windowed sinc functions, as ``torchaudio.transforms.Resample``, with
    `zeros` zero crossings to each side. The ratio is its sample rate over the
    new one, a fraction, and the rolloff that of the lower Nyquist frequency.
    """
    if ratio == 1:
        yield from blocks
        return
    # `group` samples become `result`; the filters reach `width` beyond.
    group, result = ratio.numerator, ratio.denominator
    cut = min(group, result) * rolloff
    width = math.ceil(zeros * group / cut)
    times = np.arange(-width, width + group) / group
    times = times[:, None] - np.arange(result) / result
    times = np.clip(times * cut, -zeros, zeros)
    filters = np.sinc(times) * np.cos(times * np.pi / zeros / 2) ** 2
    filters = (filters * cut / group).astype(np.float32)

    held = np.zeros(width, np.float32)
    read = written = 0
    # After the last one, zeros as before the first one
    for block in chain(blocks, [None]):
        if block is None:
            held = np.append(held, np.zeros(width + group, np.float32))
        else:
            read += len(block)
            held = np.append(held, block)
        count = (len(held) - len(filters)) // group + 1
        if count < 1:
            continue
        found = np.lib.stride_tricks.sliding_window_view(held, len(filters))
        found = np.ascontiguousarray(found[::group]) @ filters
        found = found.ravel()
        held = held[count * group :]
        if block is None:
            found = found[: math.ceil(read / ratio) - written]
        written += len(found)
        yield found


def read_audio(path, sample_rate):
    """Read an audio file block by block, its channels averaged.

    Yields ``(samples,)`` at the sample rate (Hz). Ratios of rates that need
    more than 640 filters are rounded, by less than three in a million. Raises
    ``ValueError`` if the file is missing, damaged, cut off or empty.
    """
    try:
        if not Path(path).is_file():
            raise ValueError("there is no such file")
        with soundfile.SoundFile(path) as file:
            lowest, highest = RATES
            if not lowest <= file.samplerate <= highest:
                raise ValueError(
                    f"a sample rate of {file.samplerate} Hz is not one of "
                    f"audio ({lowest} to {highest} Hz)"
                )
            ratio = Fraction(file.samplerate, sample_rate)
            yield from resample(
                _read_blocks(file), ratio.limit_denominator(640)
            )
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"it cannot be read as audio: {error.error_string}"
        ) from None
    # TypeError: of files without a header
    except (OSError, TypeError) as error:
        raise ValueError(f"it cannot be read as audio: {error}") from None


def _read_blocks(file):
    count = 0
    size = max(1, BLOCK // file.channels)
    while len(block := file.read(size, dtype="float32", always_2d=True)):
        count += len(block)
        block = block.mean(1)
        if not np.isfinite(block).all():
            raise ValueError("it holds samples that are not finite")
        yield block
    if not count:
        raise ValueError("it holds no audio")
    if count < file.frames < MOST_SAMPLES:
        raise ValueError(
            f"it is cut off: {count} of {file.frames} samples can be read"
        )


def main(arguments=None):
    """Transcribe files with the model beside this script; returns 0 or 2."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Prints a line for each file: its name, a tab, the transcript. "
        "The exit code is 2 if a file could not be transcribed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("audio", nargs="+", metavar="AUDIO", help="audio file")
    paths = parser.parse_args(arguments).audio
    try:
        model = OnnxModel(Path(__file__).with_name("model.onnx"))
    except ValueError as error:
        parser.error(str(error))
    failed = False
    for path in paths:
        try:
            blocks = read_audio(path, model.sample_rate)
            print(f"{path}\t{model.transcribe_blocks(blocks)}", flush=True)
        # onnxruntime has its own classes.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"{path}: {reason[:200]}", file=sys.stderr)
            failed = True
    return 2 * failed


if __name__ == "__main__":
    sys.exit(main())
