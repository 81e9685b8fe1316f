"""eSpeak NG by ctypes, as a program that does one job in a fresh process.

The library keeps state in globals that no call resets (noise generator, wave
phase, echo), and it may crash. In a process of its own the same job gives the
same samples, and a crash is a return code. Run by path, it imports the standard
library only, so that it starts in milliseconds.

The job, a JSON object on stdin, holds the arguments of `synthesise`. The answer
is a line of JSON with ``sample_rate`` and the number of ``samples`` of each
utterance, then the samples as 16-bit integers, one utterance after the other.
"""

import ctypes
import json
import sys
from pathlib import Path

RETRIEVAL = 1  # AUDIO_OUTPUT_RETRIEVAL: samples go to the callback
DONT_EXIT = 0x8000  # espeakINITIALIZE_DONT_EXIT
PARAMETERS = {"rate": 1, "pitch": 3, "range": 4}  # espeak_PARAMETER
UTF8 = 1  # espeakCHARS_UTF8
POS_CHARACTER = 1

Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p
)


def synthesise(seed, utterances):
    """Return the sample rate, and 16-bit samples of each utterance.

    An utterance has a ``voice``, as in ``en-us+f3``, a ``rate`` in words per
    minute, ``pitch`` and ``range`` from 0 to 100, 50 being the voice's own, and
    a ``text``. Raises RuntimeError if the library is too old, does not start or
    lacks a voice.
    """
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data = espeakng_loader.get_data_path()
    if not hasattr(library, "espeak_ng_SetRandSeed"):
        raise RuntimeError("eSpeak NG is older than 1.52: no random seed")
    sample_rate = library.espeak_Initialize(
        RETRIEVAL, 0, data.encode(), DONT_EXIT
    )
    if sample_rate <= 0:
        raise RuntimeError(f"eSpeak NG does not start with data in {data}")
    chunks, waves = [], []

    @Callback
    def collect(wave, count, events):
        if wave and count > 0:
            chunks.append(ctypes.string_at(wave, 2 * count))
        return 0

    library.espeak_SetSynthCallback(collect)
    library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
    for one in utterances:
        voice, text = one["voice"], one["text"].encode()
        # The library takes a variant that does not exist for the plain accent.
        variant = Path(data, "voices", "!v", voice.partition("+")[2])
        status = not variant.is_file()
        status = status or library.espeak_SetVoiceByName(voice.encode())
        for name, parameter in PARAMETERS.items():
            status = status or library.espeak_SetParameter(
                parameter, one[name], 0
            )
        chunks.clear()
        status = status or library.espeak_Synth(
            text, len(text) + 1, 0, POS_CHARACTER, 0, UTF8, None, None
        )
        status = status or library.espeak_Synchronize()
        if status or not chunks:
            raise RuntimeError(f"voice {voice} does not work ({status})")
        waves.append(b"".join(chunks))
    return sample_rate, waves


if __name__ == "__main__":
    try:
        sample_rate, waves = synthesise(**json.load(sys.stdin))
    except (ImportError, OSError, RuntimeError) as error:
        sys.exit(str(error))
    head = {"sample_rate": sample_rate, "samples": [len(w) // 2 for w in waves]}
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n" + b"".join(waves))
