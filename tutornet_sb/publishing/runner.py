#!/usr/bin/env python3
"""Transcribe with an exported ONNX model: onnxruntime, numpy and soundfile.

> python transcribe.py AUDIO...

``tutornet export --onnx`` puts a copy of this file beside the model.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile

METADATA = "tutornet"
FORMAT = "tutornet_sb onnx 1"


class OnnxModel:
    """A model from waveform to log-probabilities, with its symbols.

    Arguments
    ---------
    path : str or pathlib.Path
        The ONNX file, written by ``tutornet export --onnx``.
    threads : int
        Threads of onnxruntime; 0 for as many as there are cores.

    Raises
    ------
    ValueError
        If the file is no such model.
    """

    def __init__(self, path, threads=0):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        # Its errors are of a dozen classes below Exception.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is no ONNX model: {reason}") from None
        known = self.session.get_modelmeta().custom_metadata_map
        try:
            about = json.loads(known.get(METADATA, "null"))
            if about["format"] != FORMAT:
                raise ValueError(about["format"])
            self.name = about["name"]
            self.sample_rate = about["sample_rate"]
            self.frame_period = about["frame_period"]
            self.symbols = about["symbols"]
            self.blank_index = about["blank_index"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{path} was not written by tutornet export --onnx: its "
                f"metadata has no {METADATA!r} of {FORMAT!r}"
            ) from None

    def encode(self, wavs, lengths):
        """Compute log-probabilities.

        Arguments
        ---------
        wavs : numpy.ndarray
            Waveforms at the model's sample rate, ``(batch, samples)``.
        lengths : numpy.ndarray
            Valid samples of each, integers of shape ``(batch,)``.

        Returns
        -------
        log_probs : numpy.ndarray
            ``(batch, frames, symbols)``; what stands on padded frames means
            nothing.
        frames : numpy.ndarray
            Valid frames, integers of shape ``(batch,)``.
        """
        return self.session.run(
            ["log_probs", "frames"],
            {
                "wavs": np.asarray(wavs, dtype=np.float32),
                "lengths": np.asarray(lengths, dtype=np.int64),
            },
        )

    def decode(self, log_probs):
        """Transcribe greedily: the likeliest symbol of each frame.

        Arguments
        ---------
        log_probs : numpy.ndarray
            Of the valid frames of one utterance, ``(frames, symbols)``.

        Returns
        -------
        str
            The transcript.
        """
        best = log_probs.argmax(-1)
        starts = np.append(True, best[1:] != best[:-1])
        kept = best[starts & (best != self.blank_index)]
        text = "".join(self.symbols[i] for i in kept)
        return " ".join(text.replace("\u2581", " ").split())

    def transcribe(self, wav):
        """Transcribe one waveform.

        Arguments
        ---------
        wav : numpy.ndarray
            At the model's sample rate, ``(samples,)``.

        Returns
        -------
        str
            The transcript.
        """
        log_probs, frames = self.encode(wav[None], [len(wav)])
        return self.decode(log_probs[0, : frames[0]])


def main(paths):
    """Transcribe files with the model that lies beside this one."""
    if not paths:
        sys.exit(__doc__)
    model = OnnxModel(Path(__file__).with_name("model.onnx"))
    failed = False
    for path in paths:
        try:
            wav, rate = soundfile.read(path, dtype="float32", always_2d=True)
        except (OSError, soundfile.LibsndfileError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed = True
            continue
        if rate != model.sample_rate or not len(wav):
            print(
                f"{path}: {len(wav)} samples at {rate} Hz; the model hears "
                f"{model.sample_rate} Hz: resample it first",
                file=sys.stderr,
            )
            failed = True
            continue
        print(f"{path}\t{model.transcribe(wav.mean(1))}")
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:])
