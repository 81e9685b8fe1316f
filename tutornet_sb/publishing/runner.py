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
ABOUT = "name", "sample_rate", "frame_period", "symbols", "blank_index"


class OnnxModel:
    """A model from waveform to log-probabilities, with its symbols.

    Arguments
    ---------
    path : str or pathlib.Path
        The ONNX file, written by ``tutornet export --onnx``.
    threads : int
        Threads of onnxruntime; 0 for as many as there are cores.
    provider : str
        What onnxruntime computes with.

    Attributes
    ----------
    about : dict
        What the file says of itself.

    Raises
    ------
    ValueError
        If the file is no such model.
    """

    def __init__(self, path, threads=0, provider="CPUExecutionProvider"):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Errors are raised and need not be logged too.
        options.log_severity_level = 4
        try:
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
                f"{path} does not say what it is (metadata {METADATA!r}): only "
                "files by `tutornet export --onnx` can be transcribed with"
            )
        if self.about.get("format") != FORMAT:
            raise ValueError(
                f"{path} is of format {self.about.get('format')!r}, and this "
                f"version reads {FORMAT!r}: export the run again"
            )
        missing = [name for name in ABOUT if name not in self.about]
        if missing:
            raise ValueError(f"{path} is damaged: it lacks {missing[0]!r}")
        for name in ABOUT:
            setattr(self, name, self.about[name])

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
