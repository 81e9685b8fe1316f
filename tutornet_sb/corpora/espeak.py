"""eSpeak NG by ctypes, as a program that speaks one job and ends.

The library keeps its state in globals that no call resets (noise generator,
wave phase, echo), and it can take its process down with it. Run by path, one
fresh process a job, it gives the same samples for the same job, and a crash
is a return code. Only the standard library is imported, so that a start
costs a few milliseconds.

The job is a JSON object on stdin. Without ``utterances`` the answer names the
voices; with them it is spoken: one JSON line, then the samples as 16-bit
integers of the machine's byte order, one utterance after the other.
"""

import ctypes
import json
import sys

RETRIEVAL = 1  # AUDIO_OUTPUT_RETRIEVAL: samples come to the callback
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
    """The library, initialised and seeded.

    Arguments
    ---------
    seed : int
        Seed of the library's noise generator, which otherwise takes the
        clock.

    Raises
    ------
    RuntimeError
        If the library or its data cannot be used.
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
        # Kept as an attribute: ctypes does not keep the callback alive.
        self.callback = Callback(self._collect)
        self.library.espeak_SetSynthCallback(self.callback)
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(seed))

    def _collect(self, wave, count, events):
        if wave and count > 0:
            self.chunks.append(ctypes.string_at(wave, 2 * count))
        return 0

    def variants(self):
        """Names of the voice variants, such as ``f3``.

        A variant that does not exist is no error to the library, which
        then speaks with the plain accent: so ask here first.
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
        """Whether the library knows an accent, such as ``en-us``."""
        return self.library.espeak_SetVoiceByName(accent.encode()) == 0

    def speak(self, voice, rate, pitch, range, text):
        """Speak a text.

        Arguments
        ---------
        voice : str
            ``accent+variant``.
        rate : int
            Words per minute.
        pitch, range : int
            0 to 100, where 50 is the voice's own.
        text : str
            What to say.

        Returns
        -------
        bytes
            16-bit samples at ``sample_rate``.
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
            raise RuntimeError(f"voice {voice} does not speak ({status})")
        return b"".join(self.chunks)


def answer(job):
    """Do one job.

    Arguments
    ---------
    job : dict
        ``seed``; and either ``accents`` (list of str) to ask about or
        ``utterances``, a list of the arguments of `Espeak.speak`.

    Returns
    -------
    dict
        ``sample_rate`` and ``samples`` (one count an utterance), or
        ``accents`` and ``variants``.
    bytes
        The samples.
    """
    espeak = Espeak(job["seed"])
    if "utterances" not in job:
        accents = [name for name in job["accents"] if espeak.has(name)]
        return {"accents": accents, "variants": espeak.variants()}, b""
    spoken = [espeak.speak(**utterance) for utterance in job["utterances"]]
    counts = [len(wave) // 2 for wave in spoken]
    head = {"sample_rate": espeak.sample_rate, "samples": counts}
    return head, b"".join(spoken)


if __name__ == "__main__":
    try:
        head, samples = answer(json.load(sys.stdin))
    except RuntimeError as error:
        sys.exit(str(error))
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n" + samples)
