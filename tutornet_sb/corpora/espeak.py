"""eSpeak NG by ctypes, as a program that does one job in a fresh process.

The library keeps state in globals that no call resets (noise generator, wave
phase, echo), and it may crash. In a process of its own the same job gives the
same samples, and a crash is a return code. Run by path, it imports the standard
library only, so that it starts in milliseconds.

The job is a JSON object on stdin, see `answer`. The answer is a line of JSON,
then the samples as 16-bit integers, one utterance after the other.
"""

import ctypes
import json
import sys

RETRIEVAL = 1  # AUDIO_OUTPUT_RETRIEVAL: samples go to the callback
DONT_EXIT = 0x8000  # espeakINITIALIZE_DONT_EXIT
RATE, PITCH, RANGE = 1, 3, 4  # espeak_PARAMETER
UTF8 = 1  # espeakCHARS_UTF8
POS_CHARACTER = 1

Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p
)


class Voice(ctypes.Structure):
    """espeak_VOICE of speak_lib.h."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),
        ("identifier", ctypes.c_char_p),
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("xx1", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    ]


class Espeak:
    """The library, initialised, its noise generator seeded.

    Raises RuntimeError if the library or its data cannot be used.
    """

    def __init__(self, seed):
        try:
            import espeakng_loader

            self.library = ctypes.CDLL(espeakng_loader.get_library_path())
            data = espeakng_loader.get_data_path()
        except (ImportError, OSError, RuntimeError) as error:
            raise RuntimeError(str(error)) from error
        if not hasattr(self.library, "espeak_ng_SetRandSeed"):
            raise RuntimeError("eSpeak NG is older than 1.52: no random seed")
        self.sample_rate = self.library.espeak_Initialize(
            RETRIEVAL, 0, data.encode(), DONT_EXIT
        )
        if self.sample_rate <= 0:
            raise RuntimeError(f"eSpeak NG does not start with data in {data}")
        self.chunks = []
        # An attribute, since ctypes does not keep the callback alive
        self.callback = Callback(self._collect)
        self.library.espeak_SetSynthCallback(self.callback)
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(seed))

    def _collect(self, wave, count, events):
        if wave and count > 0:
            self.chunks.append(ctypes.string_at(wave, 2 * count))
        return 0

    def variants(self):
        """Names of the voice variants, such as ``f3``.

        The library takes one that does not exist for the plain accent.
        """
        self.library.espeak_ListVoices.restype = ctypes.POINTER(
            ctypes.POINTER(Voice)
        )
        voices = self.library.espeak_ListVoices(
            ctypes.byref(Voice(languages=b"variant"))
        )
        names = []
        while voices[len(names)]:
            identifier = voices[len(names)].contents.identifier
            names.append(identifier.decode().replace("\\", "/").split("/")[-1])
        return sorted(names)

    def has(self, accent):
        """Whether the library has an accent, such as ``en-us``."""
        return self.library.espeak_SetVoiceByName(accent.encode()) == 0

    def synthesise(self, voice, rate, pitch, range, text):
        """Return 16-bit samples of a text at ``sample_rate``.

        The voice is ``accent+variant``; the rate is in words per minute, pitch
        and range are 0 to 100, 50 being the voice's own.
        """
        status = self.library.espeak_SetVoiceByName(voice.encode())
        for name, value in ((RATE, rate), (PITCH, pitch), (RANGE, range)):
            status = status or self.library.espeak_SetParameter(name, value, 0)
        self.chunks.clear()
        text = text.encode()
        status = status or self.library.espeak_Synth(
            text, len(text) + 1, 0, POS_CHARACTER, 0, UTF8, None, None
        )
        status = status or self.library.espeak_Synchronize()
        if status or not self.chunks:
            raise RuntimeError(f"voice {voice} does not work ({status})")
        return b"".join(self.chunks)


def answer(job):
    """Do a job with a ``seed``; return its JSON and samples.

    With ``accents``: which of them the library has, and its ``variants``. With
    ``utterances``, arguments of `Espeak.synthesise`: ``sample_rate`` and the
    number of ``samples`` of each.
    """
    espeak = Espeak(job["seed"])
    if "utterances" not in job:
        accents = [name for name in job["accents"] if espeak.has(name)]
        return {"accents": accents, "variants": espeak.variants()}, b""
    waves = [espeak.synthesise(**one) for one in job["utterances"]]
    counts = [len(wave) // 2 for wave in waves]
    return {"sample_rate": espeak.sample_rate, "samples": counts}, b"".join(
        waves
    )


if __name__ == "__main__":
    try:
        head, samples = answer(json.load(sys.stdin))
    except RuntimeError as error:
        sys.exit(str(error))
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n" + samples)
