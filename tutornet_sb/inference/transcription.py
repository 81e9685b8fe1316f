"""Audio files of any kind and length to text with the times of its words."""

import importlib.util
import math
import os
from pathlib import Path
from typing import NamedTuple

import soundfile
import torch
from speechbrain.decoders.ctc import CTCBeamSearcher

from tutornet_sb.corpora.audio import MOST_SAMPLES, SUFFIXES, resampler
from tutornet_sb.corpora.librispeech import read_transcript
from tutornet_sb.inference import runner
from tutornet_sb.inference.latency import (
    align_symbols,
    split_words,
    symbol_runs,
)
from tutornet_sb.inference.runner import OVERLAP, WINDOW, find_pause
from tutornet_sb.networks.streaming import Stream, check_streamable
from tutornet_sb.teachers.pseudo_labels import mean_probability, surprise
from tutornet_sb.util.errors import InputError, MissingFileError

# What is decoded in one piece (seconds), more than a window
_SEGMENT = 60.0
# Audio that is read before the shortest of it is encoded, in batches
_POOL = 4
# A stream is fed such chunks (seconds), where somebody looks on and elsewhere.
_CHUNKS = 0.2, 10.0


class Word(NamedTuple):
    """A word and when it is spoken.

    Attributes
    ----------
    word : str
        The word.
    start, end : float
        Where the frame of its first symbol begins and that of its last symbol
        ends in the alignment (seconds). CTC models spike within a sound, and
        late ones after it: these are no phonetic borders.
    confidence : float
        Geometric mean over its symbols of the highest probability among the
        symbol's frames, 0 to 1.
    """

    word: str
    start: float
    end: float
    confidence: float


class Transcript(NamedTuple):
    """What was heard in a file.

    Attributes
    ----------
    file : str
        The file.
    text : str
        Its words.
    duration : float
        Seconds of audio.
    confidence : float
        ``P(y|x)^(1/n)`` of the ``n`` symbols of the transcript, as
        ``pseudo_labels.transcribe`` defines it. Of a file that is decoded in
        several segments, ``P(y|x)`` is the product over them.
    words : list of Word
        Its words with their times.
    """

    file: str
    text: str
    duration: float
    confidence: float
    words: list[Word]


class Failure(NamedTuple):
    """A file that could not be transcribed.

    Attributes
    ----------
    file : str
        The file.
    reason : str
        Why, in one line.
    """

    file: str
    reason: str


# ---------------------------------------------------------------------- audio


def find_audio(paths):
    """List audio files, each once.

    Arguments
    ---------
    paths : list
        Files, taken as they are, and folders, whose audio files are listed with
        those of their subfolders in the order of their names.

    Returns
    -------
    list of pathlib.Path
        In the order given.

    Raises
    ------
    FileNotFoundError
        If a folder has no audio file.
    """
    found = {}
    for path in map(Path, paths):
        files = _list_folder(path) if path.is_dir() else [path]
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def _list_folder(folder):
    def refuse(error):
        raise error

    files = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        # File managers leave hidden ones.
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted(names):
            if not name.startswith(".") and (
                Path(name).suffix.lower() in SUFFIXES
            ):
                files.append(Path(parent) / name)
    if not files:
        raise MissingFileError(
            f"{folder} holds no audio file ({', '.join(SUFFIXES)})"
        )
    return files


def count_seconds(files):
    """Add up what the headers of audio files say.

    Arguments
    ---------
    files : list of pathlib.Path
        The files. Those that cannot be read count nothing.

    Returns
    -------
    float
        Seconds.
    """
    seconds = 0.0
    for file in files:
        try:
            info = soundfile.info(file)
        except (RuntimeError, OSError, TypeError):
            # It will be reported when it is its turn.
            continue
        if info.frames < MOST_SAMPLES:
            seconds += info.frames / info.samplerate
    return seconds


def read_audio(path, sample_rate):
    """Read an audio file block by block.

    Channels are averaged. The result is that of resampling the whole by
    ``torchaudio.transforms.Resample``, its filters in double precision. Ratios
    of sample rates that need more than 640 filters are rounded, by less than
    three in a million.

    Arguments
    ---------
    path : str or pathlib.Path
        Any file that soundfile reads.
    sample_rate : int
        Sample rate of the result (Hz).

    Yields
    ------
    torch.Tensor
        The next samples, ``(samples,)``.

    Raises
    ------
    ValueError
        If it cannot be read to its end, is empty or holds what is no number.
    """
    yield from runner.read_audio(path, sample_rate, _resample)


def _resample(blocks, ratio):
    """Resample as if the blocks were one waveform."""
    blocks = map(torch.from_numpy, blocks)
    if ratio == 1:
        yield from blocks
        return
    filters, group = resampler(ratio), ratio.numerator
    # A group of samples becomes one of the result; the filters reach so far:
    margin = -(-filters.width // group) * group
    held, before = torch.zeros(0), 0

    def compute(samples, first, last):
        first, last = (n // group * ratio.denominator for n in (first, last))
        return filters(samples)[first:last]

    for block in blocks:
        held = torch.cat([held, block])
        count = (len(held) - before - margin) // group * group
        if count > 0:
            known = before + count
            yield compute(held[: known + margin], before, known)
            start = max(0, known - margin)
            held, before = held[start:], known - start
    yield filters(held)[before // group * ratio.denominator :]


def _windows(blocks, size, hop):
    """Overlapping windows of a waveform, and whether each is the last."""
    held = torch.zeros(0)
    for block in blocks:
        held = torch.cat([held, block])
        while len(held) > size:
            yield held[:size].clone(), False
            held = held[hop:].clone()
    yield held, True


# ------------------------------------------------------------------- hearing


def check_language_model(path):
    """See that a language model is there, and what reads it.

    Arguments
    ---------
    path : str or pathlib.Path
        A KenLM file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the packages for it are missing.
    """
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
    """Make SpeechBrain's beam searcher for a model.

    Arguments
    ---------
    recogniser : Recogniser
        The model.
    beam_size : int
        Hypotheses that are kept.
    language_model : str or pathlib.Path, optional
        A KenLM file (.arpa or .bin), in the letters of the model.

    Returns
    -------
    speechbrain.decoders.ctc.CTCBeamSearcher
        The searcher.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the packages for it are missing, or it is damaged.
    """
    if language_model is not None:
        check_language_model(language_model)
        language_model = str(language_model)
    pieces = recogniser.pieces
    return CTCBeamSearcher(
        blank_index=recogniser.blank_index,
        vocab_list=pieces,
        space_token="|" if "|" in pieces else " ",
        beam_size=beam_size,
        kenlm_model_path=language_model,
    )


def spell(text, pieces):
    """Write words in a model's symbols, in as few as possible.

    Arguments
    ---------
    text : str
        Words of letters that the symbols have.
    pieces : list of str
        Symbols by index; ``▁`` begins a word, or ``|`` or a space parts two.

    Returns
    -------
    list of int
        Indices.

    Raises
    ------
    ValueError
        If the symbols cannot spell the text.

    Example
    -------
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
    # Fewest symbols for the first n letters, and the last of them
    best = [(0, None)]
    for end in range(1, len(text) + 1):
        ways = [
            (best[start][0] + 1, text[start:end])
            for start in range(max(0, end - longest), end)
            if text[start:end] in known
        ]
        best.append(min(ways, default=(math.inf, None)))
    if math.isinf(best[-1][0]):
        raise InputError(f"the model's symbols cannot spell {text!r}")
    symbols, end = [], len(text)
    while end:
        piece = best[end][1]
        symbols.append(known[piece])
        end -= len(piece)
    return symbols[::-1]


class Hearing:
    """What is heard in one file, while its frames come in.

    Frames are decoded in segments of up to a minute, cut in pauses; their
    log-probabilities are then forgotten. Greedy decoding is the same as that of
    all frames at once. A beam searcher, and a language model with it, begins
    anew in each segment.

    The most probable path is the alignment of what greedy decoding reads from
    it; what a beam search finds is aligned by ``align_symbols``.

    Arguments
    ---------
    recogniser : Recogniser
        Whose frames they are.
    searcher : CTCBeamSearcher, optional
        Decodes instead of greedy decoding.
    """

    def __init__(self, recogniser, searcher=None):
        self._recogniser, self._searcher = recogniser, searcher
        self._most = round(_SEGMENT / recogniser.frame_period)
        # For each symbol: index, first and last frame, log-probability
        self._greedy, self._searched = [], []
        self._cost = 0.0
        self._held, self._held_count, self._done = [], 0, 0
        self._label = recogniser.blank_index

    def accept(self, log_probs):
        """Take the next frames.

        Arguments
        ---------
        log_probs : torch.Tensor
            ``(frames, symbols)``.

        Raises
        ------
        ValueError
            If they are not finite.
        """
        if not log_probs.isfinite().all():
            raise InputError("the model's output is not finite for it")
        if not len(log_probs):
            return
        self._follow(log_probs)
        self._held.append(log_probs)
        self._held_count += len(log_probs)
        while self._held_count > self._most:
            held = torch.cat(self._held)
            # Within the second half, the first two thirds of it
            first, last = self._most // 2, self._most * 5 // 6
            cut = first + find_pause(self.is_blank(held[first:last]))
            self._close(held[:cut])
            self._held = [held[cut:].clone()]
            self._held_count = len(held) - cut

    def finish(self, file, duration):
        """Say that there are no more frames.

        Arguments
        ---------
        file : str
            The file.
        duration : float
            Its seconds.

        Returns
        -------
        Transcript
            All that was heard.
        """
        if self._held_count:
            self._close(torch.cat(self._held))
            self._held, self._held_count = [], 0
        found = self._greedy if self._searcher is None else self._searched
        ids = [symbol for symbol, *_ in found]
        decode, period = self._recogniser.decode, self._recogniser.frame_period
        words = []
        for _, first, last in split_words(ids, self._recogniser.pieces):
            symbols = found[first : last + 1]
            word = _tidy(decode([symbol for symbol, *_ in symbols]))
            if word:
                mean = sum(log for *_, log in symbols) / len(symbols)
                end = (symbols[-1][2] + 1) * period
                words.append(
                    Word(
                        word,
                        symbols[0][1] * period,
                        # The last frame may reach beyond the audio.
                        max(symbols[0][1] * period, min(end, duration)),
                        min(math.exp(mean), 1.0),
                    )
                )
        confidence = mean_probability(self._cost, len(ids))
        return Transcript(file, _tidy(decode(ids)), duration, confidence, words)

    def latest(self, most=200):
        """Decode greedily what was heard so far.

        Arguments
        ---------
        most : int
            No more than so many symbols at the end.

        Returns
        -------
        str
            The text.
        """
        ids = [symbol for symbol, *_ in self._greedy[-most:]]
        return _tidy(self._recogniser.decode(ids))

    def is_blank(self, log_probs):
        """Tell which frames have no symbol.

        Arguments
        ---------
        log_probs : torch.Tensor
            ``(frames, symbols)``.

        Returns
        -------
        torch.Tensor
            True where the blank is the most probable, ``(frames,)``.
        """
        return log_probs.argmax(-1) == self._recogniser.blank_index

    def _follow(self, log_probs):
        """Read the symbols of the most probable path."""
        best, path = log_probs.max(-1)
        before = self._done + self._held_count
        runs = symbol_runs(path, self._recogniser.blank_index)
        for symbol, first, last in runs:
            log = float(best[first : last + 1].max())
            if first == 0 and symbol == self._label:
                # It began in the frames before.
                _, start, _, earlier = self._greedy.pop()
                first, log = start - before, max(log, earlier)
            self._greedy.append((symbol, before + first, before + last, log))
        self._label = int(path[-1])

    def _close(self, log_probs):
        """Decode a segment if that is not done, and tell how likely it is."""
        if self._searcher is None:
            runs = symbol_runs(
                log_probs.argmax(-1), self._recogniser.blank_index
            )
            ids = [symbol for symbol, _, _ in runs]
            cost = self._surprise(log_probs, ids)
        else:
            ids, cost = self._search(log_probs)
            spans = align_symbols(log_probs, ids, self._recogniser.blank_index)
            for symbol, (first, last) in zip(ids, spans, strict=True):
                log = float(log_probs[first : last + 1, symbol].max())
                first, last = self._done + first, self._done + last
                self._searched.append((symbol, first, last, log))
        self._cost += cost
        self._done += len(log_probs)

    def _search(self, log_probs):
        """Symbols of the best hypothesis, and how unlikely they are."""
        pieces = self._recogniser.pieces
        # Not by relative lengths, which it rounds down.
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


def _tidy(text):
    """Two signs of a word boundary in a row are one boundary."""
    return " ".join(text.split())


# ---------------------------------------------------------------------- files


class _Part(NamedTuple):
    """A window of a file, and how many of its samples are new."""

    job: object
    wav: torch.Tensor
    is_last: bool
    samples: int


class _Job:
    """A file on its way to its transcript."""

    def __init__(self, file, recogniser, searcher, hop_frames):
        self.file = str(file)
        self.hearing = Hearing(recogniser, searcher)
        self.result = None
        self.samples = 0
        self._recogniser = recogniser
        self._hop_frames = hop_frames
        # Frames of the last window from _offset on
        self._pending, self._offset = None, 0

    def accept(self, log_probs, is_last):
        """Take the frames of the next window, and join them to those before.

        Both windows have the frames that they share; the cut is in a pause
        within the middle half of them, where both have heard what is around.
        """
        if self._pending is not None:
            start = self._hop_frames - self._offset
            shared = min(len(self._pending) - start, len(log_probs))
            quarter = shared // 4
            middle = slice(quarter, shared - quarter)
            both = log_probs[middle], self._pending[start:][middle]
            ours, theirs = map(self.hearing.is_blank, both)
            self._offset = quarter + find_pause(ours & theirs)
            self.hearing.accept(self._pending[: start + self._offset])
            log_probs = log_probs[self._offset :]
        self._pending = log_probs
        if is_last:
            self.hearing.accept(log_probs)
            self.finish()

    def finish(self):
        duration = self.samples / self._recogniser.sample_rate
        self.result = self.hearing.finish(self.file, duration)

    def fail(self, error):
        reason = " ".join(str(error).split()) or type(error).__name__
        self.result = Failure(self.file, reason)


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
    """Transcribe audio files.

    Files up to `window` long are encoded whole: the result is that of an
    evaluation in the recipe. Longer ones are read, encoded and forgotten window
    by window. Windows overlap by a quarter and are joined in a pause; so no
    word is cut, each frame has heard what is around it, and where a model hears
    no more than a sixteenth of a window to either side of a frame, the frames
    are those of the whole file. A model that streams is streamed through a long
    file instead, which is exact. Memory does not grow with the file, but for
    its words.

    Arguments
    ---------
    recogniser : Recogniser
        The model.
    files : list of pathlib.Path
        The files; see :func:`find_audio`.
    batch_seconds : float
        Audio encoded at a time, padding included (seconds).
    searcher : CTCBeamSearcher, optional
        From :func:`make_searcher`; by default, decoding is greedy.
    stream : bool
        Stream through short files too.
    window : float
        Seconds.
    on_audio : callable, optional
        Called with the seconds of audio that have been encoded, over and over.
    on_partial : callable, optional
        While a file is streamed, called with what is heard so far.

    Yields
    ------
    Transcript or Failure
        Of each file, in the order given.

    Raises
    ------
    ValueError
        If the model cannot stream though it should, or an option has an
        impossible value.
    """
    if not batch_seconds > 0:
        raise InputError(f"batch_seconds must be above 0, got {batch_seconds}")
    can_stream = _can_stream(recogniser, stream)
    rate, period = recogniser.sample_rate, recogniser.frame_period
    window = min(window, recogniser.max_seconds - 2 * period)
    # In whole frames, so that frames of all windows stand where they would.
    frames = max(4, math.floor(window / period))
    hop = frames - max(2, round(OVERLAP * frames))
    size, hop_samples = (round(n * period * rate) for n in (frames, hop))
    on_audio = on_audio or (lambda seconds: None)

    def listen(job):
        """Windows to be encoded; none of a file that is streamed."""
        if not stream:
            windows = _windows(read_audio(job.file, rate), size, hop_samples)
            for wav, is_last in windows:
                if can_stream and not is_last:
                    # Again from its beginning
                    break
                new = len(wav) if is_last else hop_samples
                yield _Part(job, wav, is_last, new)
            else:
                return
        _stream(job, recogniser, on_audio, on_partial)

    jobs, pool, waiting = [], [], 0
    for file in files:
        job = _Job(file, recogniser, searcher, hop)
        jobs.append(job)
        try:
            for part in listen(job):
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


def _can_stream(recogniser, must):
    if recogniser.model is None:
        reason = f"{recogniser.kind} models run whole"
    else:
        try:
            check_streamable(recogniser.model)
            return True
        except ValueError as error:
            reason = str(error)
    if must:
        raise InputError(f"{recogniser.name} cannot stream: {reason}")
    return False


def _stream(job, recogniser, on_audio, on_partial):
    rate, stream = recogniser.sample_rate, Stream(recogniser.model)
    chunk = round(_CHUNKS[on_partial is None] * rate)

    def hear(log_probs):
        if log_probs.shape[1]:
            job.hearing.accept(log_probs[0].float().cpu())
            if on_partial is not None:
                on_partial(job.hearing.latest())

    for block in read_audio(job.file, rate):
        for samples in block.split(chunk):
            job.samples += len(samples)
            hear(stream.accept(samples.unsqueeze(0)))
            on_audio(len(samples) / rate)
    hear(stream.finish())
    job.finish()


def _encode(recogniser, pool, batch_seconds, on_audio):
    """Encode windows in batches of like length, then hear them in order."""
    # Of a file that turned out to be broken, nothing more is needed.
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
            job.accept(found, part.is_last)
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
    """Read transcripts to score by.

    Arguments
    ---------
    path : str or pathlib.Path
        A file of lines ``ID TEXT``, or a folder: all ``*.trans.txt`` in it and
        in its subfolders, as in LibriSpeech, hidden ones aside.

    Returns
    -------
    dict
        Transcript by id.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If a line is damaged or an id stands twice.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = [
            file
            for file in sorted(path.rglob("*.trans.txt"))
            if not any(p.startswith(".") for p in file.relative_to(path).parts)
        ]
    if not files or not files[0].is_file():
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
