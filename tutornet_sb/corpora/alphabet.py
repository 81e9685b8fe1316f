"""The symbols of a corpus: a given number, or those of its transcripts."""

from tutornet_sb.corpora.librispeech import read_texts
from tutornet_sb.corpora.tables import name_tables, read_table
from tutornet_sb.util.errors import SettingError


def choose_symbols(
    tokenizer_type, vocab_size, train_csv, data_folder, splits, folder
):
    """Count the symbols of a corpus before its tokenizer exists.

    Used as ``symbols: !applyref:tutornet_sb.corpora.alphabet.choose_symbols``:
    networks are made before their corpus is prepared.

    ``vocab_size`` includes the blank; None, of a character tokenizer (by
    ``tokenizer_type``), is for the letters of the training transcripts, the
    space and the blank. These are in ``train_csv``, tables relative to the
    working folder or to ``folder``, that of the recipe, or else in ``splits``
    of ``data_folder`` in LibriSpeech's layout.

    Returns ``count`` and the ``letters`` as one string, or None. Raises
    SettingError if the corpus has neither a ``vocab_size`` nor transcripts.

    Example
    -------
    >>> choose_symbols("bpe", 500, None, None, None, ".")
    {'count': 500, 'letters': None}
    """
    if vocab_size is not None:
        return {"count": vocab_size, "letters": None}
    if tokenizer_type != "char":
        raise SettingError(
            f"corpus.vocab_size: a {tokenizer_type} tokenizer needs a number "
            'of symbols, as in --corpus_overrides "{tokenizer_type: bpe, '
            'vocab_size: 500}"'
        )
    if train_csv:
        tables = name_tables("train", train_csv, folder).values()
        rows = [row for path in tables for row in read_table(path)]
        texts = [row.text for row in rows if row.fault is None]
    elif data_folder:
        texts = read_texts(data_folder, splits)
    else:
        raise SettingError(
            "the corpus gives no vocab_size, so its symbols are the letters of "
            "its training transcripts: say where they lie by --train_csv FILE "
            "or --data_folder FOLDER"
        )
    # A tokenizer separates words by U+2581.
    letters = sorted(set().union(*texts) - {" ", "\u2581"})
    if not letters:
        raise SettingError(
            f"{train_csv or data_folder} has no training transcript that can "
            "be used"
        )
    return {"count": len(letters) + 2, "letters": "".join(letters)}
