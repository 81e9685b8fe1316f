"""The tokenizer of a corpus, shared by teacher and student."""

import csv
import string
from pathlib import Path

import sentencepiece

from tutornet_sb.util.errors import InputError
from tutornet_sb.util.files import write_atomically

# Letters of a character model by default
LETTERS = string.ascii_uppercase + "'"
# Index of the unknown symbol, which doubles as the blank of CTC
BLANK = 0


def train_tokenizer(
    manifests, path, model_type="char", vocab_size=29, letters=None
):
    """Train a SentencePiece model on the transcripts of a corpus, once.

    The unknown symbol doubles as the blank, as in SpeechBrain's LibriSpeech
    recipes. A character model has ``letters`` or, whatever the transcripts, the
    26 letters and the apostrophe of LibriSpeech, so that small corpora share
    symbols, and teachers, with it.

    ``manifests`` have a column ``wrd``; ``model_type`` is ``char``, ``bpe`` or
    ``unigram``; ``vocab_size`` includes the blank. An existing file is loaded.
    Raises InputError if it has other symbols, or cannot be trained.
    """
    path = Path(path)
    if not path.is_file():
        write_atomically(
            path,
            lambda file: _train(
                manifests, file, model_type, vocab_size, letters or LETTERS
            ),
        )
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    if tokenizer.get_piece_size() != vocab_size:
        raise InputError(
            f"{path} has {tokenizer.get_piece_size()} symbols but vocab_size "
            f"is {vocab_size}: set it to that number, or delete the file to "
            "train it anew"
        )
    others = set(letters or ()) - set(pieces(tokenizer))
    if others:
        raise InputError(
            f"{path} lacks {' '.join(sorted(others))}, which the training "
            "transcripts have now: give the changed corpus a name of its own, "
            'as in --corpus_overrides "{name: NAME}", or delete the file to '
            "train it anew"
        )
    return tokenizer


def pieces(tokenizer):
    """List the symbols of a tokenizer in the order of their indices."""
    return [tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())]


def _train(manifests, path, model_type, vocab_size, letters):
    options = {"vocab_size": vocab_size}
    if model_type == "char":
        options = {
            "vocab_size": len(letters) + 2,
            "user_defined_symbols": list(letters),
            "hard_vocab_limit": False,
        }
    # Not read by sentencepiece, whose older versions hide an error meanwhile
    transcripts = list(_transcripts(manifests))
    with open(path, "wb") as file:
        try:
            # SpeechBrain's wrapper fails in folders whose name has a space.
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(transcripts),
                model_writer=file,
                model_type=model_type,
                character_coverage=1.0,
                unk_id=BLANK,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                minloglevel=2,
                **options,
            )
        except RuntimeError as error:
            raise InputError(
                f"no {model_type} tokenizer of {vocab_size} symbols can be "
                f"made from these transcripts: {error}"
            ) from None


def _transcripts(manifests):
    for manifest in manifests:
        with open(manifest, newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                yield row["wrd"]


def split_words(symbols, pieces):
    """Find ``(word, first, last)`` in indices without blanks and repetitions.

    ``pieces`` are symbols by index, of which ``|``, ``▁`` and a space separate
    words; ``first`` and ``last`` are positions in ``symbols``.

    Example
    -------
    >>> split_words([1, 2, 0, 1], ["|", "A", "B"])
    [('AB', 0, 1), ('A', 3, 3)]
    >>> split_words([0, 1, 0], ["▁A", "N"])
    [('AN', 0, 1), ('A', 2, 2)]
    """
    words, within = [], False
    for position, symbol in enumerate(symbols):
        piece = " " if pieces[symbol] == "|" else pieces[symbol]
        for character in piece.replace("▁", " "):
            if character == " ":
                within = False
            elif within:
                word, first, _ = words[-1]
                words[-1] = (word + character, first, position)
            else:
                words.append((character, position, position))
                within = True
    return words


def decoder(pieces):
    """Make a function from symbol indices to text, without a tokenizer."""

    def decode(symbols):
        return " ".join(word for word, _, _ in split_words(symbols, pieces))

    return decode


def greedy_decode(logits, lengths, blank_index=0):
    """Decode CTC greedily: repetitions and blanks of the best path removed.

    From logits or log-probabilities ``(batch, frames, symbols)`` and valid
    frames ``(batch,)`` to a list of symbol indices for each utterance.
    """
    decoded = []
    for path, length in zip(logits.argmax(-1).cpu(), lengths, strict=True):
        symbols = path[: int(length)].unique_consecutive()
        decoded.append(symbols[symbols != blank_index].tolist())
    return decoded


def tidy(text):
    """Text with single spaces: word boundaries in a row are one boundary."""
    return " ".join(text.split())
