"""Audio files of any kind and length to text with the times of its words."""

import importlib.util
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import soundfile
import torch
from speechbrain.decoders.ctc import CTCBeamSearcher

from tutornet_sb.corpora.audio import MOST_SAMPLES, SUFFIXES
from tutornet_sb.corpora.librispeech import read_transcript
from tutornet_sb.corpora.tokenizer import split_words, tidy
from tutornet_sb.inference import runner
from tutornet_sb.inference.latency import align_symbols, symbol_runs
from tutornet_sb.inference.runner import (
    WINDOW,
    Joiner,
    find_pause,
    plan_windows,
    windows,
)
from tutornet_sb.networks.streaming import Stream, can_stream, check_streamable
from tutornet_sb.teachers.pseudo_labels import mean_probability, surprise
from tutornet_sb.util.errors import InputError, MissingFileError, one_line

# What is decoded in one piece (seconds), more than a window
_SEGMENT = 60.0
# Batches of audio that are read before the shortest of it is encoded
_POOL = 4
# Chunks of a stream (seconds) with partial transcripts, and without
_CHUNKS = 0.2, 10.0


class Word(NamedTuple):
    """A recognised word, its times (seconds) and its confidence.

    The times are those of its first and last symbol in the alignment, which are
    no phonetic boundaries: CTC models spike within a sound, or after it. The
    confidence is the geometric mean over its symbols of the highest probability
    among the symbol's frames.
    """

    word: str
    start: float
    end: float
    confidence: float


class Transcript(NamedTuple):
    """The transcript of a file and its length in seconds.

    The confidence is ``P(y|x)^(1/n)`` of its ``n`` symbols, as in
    ``pseudo_labels.transcribe``; ``P(y|x)`` is the product over the segments.
    """

    file: str
    text: str
    duration: float
    confidence: float
    words: list[Word]


class Failure(NamedTuple):
    """A file that could not be transcribed, and why, in one line."""

    file: str
    reason: str


# ---------------------------------------------------------------------- audio


def find_audio(paths):
    """List audio files, each once: files as given, folders recursively."""
    found = {}
    for path in map(Path, paths):
        files = _list_folder(path, tuple(SUFFIXES)) if path.is_dir() else [path]
        if not files:
            raise MissingFileError(
                f"{path} holds no audio file ({', '.join(SUFFIXES)})"
            )
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def _list_folder(folder, endings):
    """Files of a folder by their endings, except hidden ones."""

    def refuse(error):
        raise error

    files = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        # File managers leave hidden ones.
        folders[:] = sorted(name for name in folders if name[0] != ".")
        files += [
            Path(parent) / name
            for name in sorted(names)
            if name[0] != "." and name.lower().endswith(endings)
        ]
    return files


def count_seconds(files):
    """Seconds of audio by the headers of files; unreadable ones count 0."""
    seconds = 0.0
    for file in files:
        # Errors are reported when it is to be transcribed.
        with suppress(RuntimeError, OSError, TypeError):
            info = soundfile.info(file)
            if info.frames < MOST_SAMPLES:
                seconds += info.frames / info.samplerate
    return seconds


def read_audio(path, sample_rate):
    """Yield an audio file block by block, ``(samples,)``; see ``runner``."""
    yield from map(torch.from_numpy, runner.read_audio(path, sample_rate))


# ------------------------------------------------------------------- decoding


def check_language_model(path):
    """Check that a KenLM file and the packages that read it are available."""
    if not Path(path).is_file():
        raise MissingFileError(f"no language model at {path}")
    missing = [
        name
        for name in ("kenlm", "pygtrie")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise InputError(
            "a language model needs packages that are not installed: "
            f"pip install {' '.join(missing)}"
        )


def make_searcher(recogniser, beam_size=100, language_model=None):
    """Make SpeechBrain's beam searcher for a ``Recogniser``.

    ``language_model`` is a KenLM file (.arpa or .bin) in the model's letters.
    """
    if language_model is not None:
        check_language_model(language_model)
    pieces = recogniser.pieces
    return CTCBeamSearcher(
        blank_index=recogniser.blank_index,
        vocab_list=pieces,
        space_token="|" if "|" in pieces else " ",
        beam_size=beam_size,
        kenlm_model_path=language_model and str(language_model),
    )


def spell(text, pieces):
    """Spell words in as few of a model's symbols as possible.

    ``▁`` begins a word, or ``|`` or a space separates two.

    >>> spell("AN A", ["<blank>", "▁", "A", "N", "AN"])
    [1, 4, 1, 2]
    """
    words = text.split()
    if any(piece.startswith("▁") for piece in pieces):
        text = "".join(f"▁{word}" for word in words)
    else:
        text = ("|" if "|" in pieces else " ").join(words)
    known = {piece: index for index, piece in enumerate(pieces)}
    longest = max(map(len, pieces))
    # Fewest symbols for the first n letters
    best = [[]]
    for end in range(1, len(text) + 1):
        ways = [
            (len(best[start]), text[start:end], best[start])
            for start in range(max(0, end - longest), end)
            if best[start] is not None and text[start:end] in known
        ]
        _, piece, symbols = min(ways, default=(0, None, None))
        best.append([*symbols, known[piece]] if ways else None)
    if best[-1] is None:
        raise InputError(f"the model's symbols cannot spell {text!r}")
    return best[-1]


class FileDecoder:
    """Decodes one file while its frames come in.

    Frames are decoded in segments of up to a minute, cut in pauses, and then
    dropped. Greedy decoding is the same as that of all frames at once, and its
    path is the alignment. A beam searcher (and its language model) starts anew
    in each segment; its result is aligned by ``align_symbols``.
    """

    def __init__(self, recogniser, searcher=None):
        self._recogniser, self._searcher = recogniser, searcher
        self._most = round(_SEGMENT / recogniser.frame_period)
        # For each symbol: index, first and last frame, log-probability
        self._greedy, self._searched = [], []
        self._cost = 0.0
        # Frames that are not decoded, and numbers of those read and decoded
        self._held, self._read, self._done = [], 0, 0
        self._label = recogniser.blank_index

    def accept(self, log_probs):
        """Add the next frames, ``(frames, symbols)``."""
        if not log_probs.isfinite().all():
            raise InputError("the model's output is not finite for it")
        if not len(log_probs):
            return
        self._follow(log_probs)
        self._held.append(log_probs)
        self._read += len(log_probs)
        while self._read - self._done > self._most:
            held = torch.cat(self._held)
            # Within the second half, the first two thirds of it
            first, last = self._most // 2, self._most * 5 // 6
            cut = first + find_pause(self.is_blank(held[first:last]))
            self._close(held[:cut])
            self._held = [held[cut:].clone()]

    def finish(self, file, duration):
        """Return the ``Transcript`` of a file of `duration` seconds."""
        if self._read > self._done:
            self._close(torch.cat(self._held))
        found = self._greedy if self._searcher is None else self._searched
        ids = [symbol for symbol, *_ in found]
        decode, period = self._recogniser.decode, self._recogniser.frame_period
        words = []
        for _, first, last in split_words(ids, self._recogniser.pieces):
            symbols = found[first : last + 1]
            word = tidy(decode(ids[first : last + 1]))
            if word:
                mean = sum(log for *_, log in symbols) / len(symbols)
                start = symbols[0][1] * period
                # The last frame may reach beyond the audio.
                end = min((symbols[-1][2] + 1) * period, duration)
                confidence = min(math.exp(mean), 1.0)
                words.append(Word(word, start, max(start, end), confidence))
        confidence = mean_probability(self._cost, len(ids))
        return Transcript(file, tidy(decode(ids)), duration, confidence, words)

    def latest(self, most=200):
        """Greedy text of the last symbols so far."""
        ids = [symbol for symbol, *_ in self._greedy[-most:]]
        return tidy(self._recogniser.decode(ids))

    def is_blank(self, log_probs):
        """Whether the blank is the most probable, ``(frames,)``."""
        return log_probs.argmax(-1) == self._recogniser.blank_index

    def _follow(self, log_probs):
        """Read the symbols of the most probable path."""
        best, path = log_probs.max(-1)
        before, blank = self._read, self._recogniser.blank_index
        for symbol, first, last in symbol_runs(path, blank):
            log = float(best[first : last + 1].max())
            if first == 0 and symbol == self._label:
                # It began in the frames before.
                _, start, _, earlier = self._greedy.pop()
                first, log = start - before, max(log, earlier)
            self._greedy.append((symbol, before + first, before + last, log))
        self._label = int(path[-1])

    def _close(self, log_probs):
        """End a segment: decode it by the searcher, if any, and score it."""
        blank = self._recogniser.blank_index
        if self._searcher is None:
            runs = symbol_runs(log_probs.argmax(-1), blank)
            self._cost += self._surprise(log_probs, [s for s, _, _ in runs])
        else:
            ids, cost = self._search(log_probs)
            spans = align_symbols(log_probs, ids, blank)
            for symbol, (first, last) in zip(ids, spans, strict=True):
                log = float(log_probs[first : last + 1, symbol].max())
                first, last = self._done + first, self._done + last
                self._searched.append((symbol, first, last, log))
            self._cost += cost
        self._done += len(log_probs)

    def _search(self, log_probs):
        """Symbols of the best hypothesis, and ``-log P(y|x)``."""
        pieces = self._recogniser.pieces
        # Without relative lengths, which it rounds down
        (hypotheses,) = self._searcher(log_probs.unsqueeze(0))
        ids = spell(hypotheses[0].text, pieces)
        ways = [ids]
        if ids and pieces[ids[0]] == "▁":
            # The first word needs no sign of its beginning.
            ways.append(ids[1:])
        cost, ids = min((self._surprise(log_probs, way), way) for way in ways)
        if math.isinf(cost):
            raise InputError("it has more symbols than frames")
        return ids, cost

    def _surprise(self, log_probs, ids):
        lengths = torch.tensor([len(log_probs)])
        blank = self._recogniser.blank_index
        return surprise(log_probs.unsqueeze(0), lengths, [ids], blank)[0]


# ---------------------------------------------------------------------- files


class _Job(FileDecoder):
    """A file in progress."""

    def __init__(self, file, recogniser, searcher, hop):
        super().__init__(recogniser, searcher)
        self.file, self.samples, self.result = str(file), 0, None
        self.joiner = Joiner(hop, self.is_blank)

    def accept_window(self, log_probs, is_last):
        """Add the frames of the next window."""
        self.accept(self.joiner.accept(log_probs))
        if is_last:
            self.accept(self.joiner.pending)
            self.end()

    def end(self):
        seconds = self.samples / self._recogniser.sample_rate
        self.result = self.finish(self.file, seconds)

    def fail(self, error):
        self.result = Failure(self.file, one_line(error))


class _Part(NamedTuple):
    """A window of a file, and how many of its samples are new."""

    job: _Job
    wav: torch.Tensor
    is_last: bool
    samples: int


def transcribe(
    recogniser,
    files,
    batch_seconds=60.0,
    searcher=None,
    stream=False,
    window=WINDOW,
    on_audio=None,
    on_partial=None,
):
    """Transcribe audio files; yields a Transcript or Failure of each, in order.

    Files up to `window` (seconds) long are encoded whole, as in an evaluation
    of the recipe. Longer ones are read, encoded and dropped window by window;
    windows overlap by a quarter and are joined in a pause. Where a model's
    receptive field is at most a sixteenth of a window to either side, the
    frames equal those of the whole file. Long files are streamed through a
    streaming model instead, which is exact; with `stream`, short ones too, or
    an InputError is raised. Memory does not grow with the file, but for its
    words.

    `batch_seconds` of audio, padding included, are encoded at a time. Decoding
    is greedy without a `searcher` from :func:`make_searcher`. Repeatedly,
    `on_audio` is called with the seconds of audio that have been encoded, and
    `on_partial`, while a file is streamed, with its text so far.
    """
    if not batch_seconds > 0:
        raise InputError(f"batch_seconds must be above 0, got {batch_seconds}")
    if stream:
        _require_streamable(recogniser)
    streams = recogniser.model is not None and can_stream(recogniser.model)
    rate, period = recogniser.sample_rate, recogniser.frame_period
    window = min(window, recogniser.max_seconds - 2 * period)
    size, step, hop = plan_windows(window, period, rate)
    on_audio = on_audio or (lambda seconds: None)

    def parts_of(job):
        """Windows to be encoded; none of a file that is streamed."""
        if not stream:
            blocks = runner.read_audio(job.file, rate)
            for wav, is_last in windows(blocks, size, step):
                if streams and not is_last:
                    # Again from its beginning
                    break
                new = len(wav) if is_last else step
                yield _Part(job, torch.from_numpy(wav), is_last, new)
            else:
                return
        _stream(job, recogniser, on_audio, on_partial)

    jobs, pool, waiting = [], [], 0
    for file in files:
        job = _Job(file, recogniser, searcher, hop)
        jobs.append(job)
        try:
            for part in parts_of(job):
                job.samples += part.samples
                pool.append(part)
                waiting += len(part.wav)
                if waiting >= _POOL * batch_seconds * rate:
                    _encode(recogniser, pool, batch_seconds, on_audio)
                    pool, waiting = [], 0
        except (RuntimeError, ValueError) as error:
            job.fail(error)
        while jobs and jobs[0].result is not None:
            yield jobs.pop(0).result
    _encode(recogniser, pool, batch_seconds, on_audio)
    for job in jobs:
        yield job.result


def _require_streamable(recogniser):
    try:
        if recogniser.model is None:
            raise InputError(f"{recogniser.kind} models run whole")
        check_streamable(recogniser.model)
    except InputError as error:
        raise InputError(f"{recogniser.name} cannot stream: {error}") from None


def _stream(job, recogniser, on_audio, on_partial):
    rate, stream = recogniser.sample_rate, Stream(recogniser.model)
    chunk = round(_CHUNKS[on_partial is None] * rate)

    def accept(log_probs):
        if log_probs.shape[1]:
            job.accept(log_probs[0].float().cpu())
            if on_partial is not None:
                on_partial(job.latest())

    for block in read_audio(job.file, rate):
        for samples in block.split(chunk):
            job.samples += len(samples)
            accept(stream.accept(samples.unsqueeze(0)))
            on_audio(len(samples) / rate)
    accept(stream.finish())
    job.end()


def _encode(recogniser, pool, batch_seconds, on_audio):
    """Encode windows in batches of like length, then decode them in order."""
    # Nothing more is needed of a file that turned out to be broken.
    pool = [part for part in pool if part.job.result is None]
    most = batch_seconds * recogniser.sample_rate
    order = sorted(range(len(pool)), key=lambda i: -len(pool[i].wav))
    encoded = [None] * len(pool)
    while order:
        # The first is the longest.
        count = max(1, int(most / len(pool[order[0]].wav)))
        batch, order = order[:count], order[count:]
        found = _encode_batch(recogniser, [pool[i].wav for i in batch])
        for i, log_probs in zip(batch, found, strict=True):
            encoded[i] = log_probs
        on_audio(sum(pool[i].samples for i in batch) / recogniser.sample_rate)
    for part, found in zip(pool, encoded, strict=True):
        job = part.job
        if job.result is not None:
            continue
        try:
            if isinstance(found, Exception):
                raise InputError(f"the model cannot encode it: {found}")
            job.accept_window(found, part.is_last)
        except ValueError as error:
            job.fail(error)


def _encode_batch(recogniser, wavs):
    """Log-probabilities, or the error, of each waveform."""
    lengths = torch.tensor([len(wav) for wav in wavs])
    padded = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    try:
        log_probs, frames = recogniser.encode(padded, lengths)
    except (RuntimeError, ValueError) as error:
        if len(wavs) == 1:
            return [error]
        # Which one is it?
        return [
            found for wav in wavs for found in _encode_batch(recogniser, [wav])
        ]
    return [row[:n] for row, n in zip(log_probs, frames, strict=True)]


# -------------------------------------------------------------------- scoring


def read_references(path):
    """Read transcripts by id: lines ``ID TEXT`` of a file, or of a folder.

    Of a folder, of all ``*.trans.txt`` as in LibriSpeech, except hidden ones.
    """
    path = Path(path)
    files = [path] if path.is_file() else []
    if path.is_dir():
        files = _list_folder(path, ".trans.txt")
    if not files:
        raise MissingFileError(
            f"{path} is no file of references and no folder with *.trans.txt"
        )
    references = {}
    for file in files:
        texts, faults = read_transcript(file)
        for name in texts:
            if name in references:
                faults[name] = "duplicate id"
        if faults:
            name, reason = next(iter(faults.items()))
            raise InputError(f"{file}: {name}: {reason}")
        references |= texts
    return references
