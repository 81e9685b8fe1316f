"""The tokenizer of a corpus, shared by teacher and student."""

import csv
import string
from pathlib import Path

import sentencepiece

from tutornet_sb.util.errors import InputError
from tutornet_sb.util.files import write_atomically

# Index of the blank of CTC, which every tokenizer of ours has first
BLANK = 0

# Of a character model, where nothing else is said
LETTERS = string.ascii_uppercase + "'"


def train_tokenizer(
    manifests, path, model_type="char", vocab_size=29, letters=None
):
    """Train a SentencePiece model on the transcripts of a corpus, once.

    The unknown symbol has index 0 and doubles as the blank of CTC, as in
    SpeechBrain's own LibriSpeech recipes. A character model holds the 26
    letters and the apostrophe of LibriSpeech whatever the transcripts, so that
    the small corpora share their symbols, and their teachers, with it; or the
    letters of a corpus of its own.

    Trained by sentencepiece itself: SpeechBrain's wrapper hands its options
    over as one line and so cannot work in a folder whose name has a space.

    Arguments
    ---------
    manifests : list of pathlib.Path
        Manifests with a column ``wrd``.
    path : str or pathlib.Path
        Model file to write; an existing one is loaded.
    model_type : str
        ``char``, ``bpe`` or ``unigram``.
    vocab_size : int
        Symbols, the blank included.
    letters : str, optional
        Those of a character model.

    Returns
    -------
    sentencepiece.SentencePieceProcessor
        The tokenizer.

    Raises
    ------
    ValueError
        If the model has other symbols than asked for.
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
            f"is {vocab_size}: set it to what the tokenizer has, or delete the "
            "file to train it anew"
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
    """List the symbols of a tokenizer in the order of their indices.

    Arguments
    ---------
    tokenizer : sentencepiece.SentencePieceProcessor
        Any.

    Returns
    -------
    list of str
        Symbols.
    """
    return [tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())]


def _train(manifests, path, model_type, vocab_size, letters):
    options = {"vocab_size": vocab_size}
    if model_type == "char":
        # The vocabulary of a character model is what it is told to hold.
        options = {
            "vocab_size": len(letters) + 2,
            "user_defined_symbols": list(letters),
            "hard_vocab_limit": False,
        }
    with open(path, "wb") as file:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_transcripts(manifests),
                model_writer=file,
                model_type=model_type,
                character_coverage=1.0,
                unk_id=0,
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
    """Find the words in a sequence of symbols.

    Arguments
    ---------
    symbols : list of int
        Indices, without blanks and repetitions.
    pieces : list of str
        Symbols by index; ``|``, ``▁`` and a space bound words.

    Returns
    -------
    list of tuple
        ``(word, first, last)``: the word and the positions of its first and
        last symbol in the sequence.

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
    """Make a function from symbol indices to text, for want of a tokenizer."""

    def decode(symbols):
        return " ".join(word for word, _, _ in split_words(symbols, pieces))

    return decode


def greedy_decode(logits, lengths, blank_index=0):
    """Decode CTC greedily: repetitions and blanks of the best path removed.

    Arguments
    ---------
    logits : torch.Tensor
        Or log-probabilities, ``(batch, frames, symbols)``.
    lengths : torch.Tensor
        Valid frames of each utterance, integers of shape ``(batch,)``.
    blank_index : int
        The blank of CTC.

    Returns
    -------
    list of list of int
        Symbol indices of each utterance.
    """
    decoded = []
    for path, length in zip(logits.argmax(-1).cpu(), lengths, strict=True):
        symbols = path[: int(length)].unique_consecutive()
        decoded.append(symbols[symbols != blank_index].tolist())
    return decoded


def tidy(text):
    """Text with single spaces: word boundaries in a row are one boundary."""
    return " ".join(text.split())
