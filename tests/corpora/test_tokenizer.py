"""The tokenizer of a corpus."""

import csv
import string

import pytest

from tutornet_sb.corpora.tokenizer import pieces, train_tokenizer

SENTENCES = [
    "ONE TWO THREE",
    "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG",
    "IT'S THE THIRD OF THREE TRANSCRIPTS",
]


def manifest(path, sentences):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["ID", "duration", "wav", "spk_id", "wrd"])
        for index, text in enumerate(sentences):
            writer.writerow([f"u{index}", 1.0, "u.flac", "s", text])
    return path


@pytest.fixture
def transcripts(tmp_path):
    return manifest(tmp_path / "train.csv", SENTENCES)


@pytest.mark.parametrize(
    "sentences", [SENTENCES, ["A"], ["NO", "NO NO"], ["NAÏVE CAFÉ"]]
)
def test_characters_are_the_same_29_whatever_the_transcripts(
    tmp_path, sentences
):
    file = manifest(tmp_path / "train.csv", sentences)
    tokenizer = train_tokenizer([file], tmp_path / "char.model")
    symbols = pieces(tokenizer)
    assert len(symbols) == 29
    assert set(symbols[1:]) == {*string.ascii_uppercase, "'", "\u2581"}


def test_the_order_of_the_symbols_does_not_depend_on_the_transcripts(tmp_path):
    orders = set()
    for index, sentences in enumerate([SENTENCES, ["ZZZ Y"], ["A B C"]]):
        file = manifest(tmp_path / f"{index}.csv", sentences)
        path = tmp_path / f"{index}.model"
        orders.add(tuple(pieces(train_tokenizer([file], path))))
    assert len(orders) == 1


def test_index_0_is_the_unknown_symbol_and_never_encodes_a_letter(
    tmp_path, transcripts
):
    tokenizer = train_tokenizer([transcripts], tmp_path / "char.model")
    assert tokenizer.unk_id() == 0
    assert tokenizer.is_unknown(0)
    ids = tokenizer.encode(string.ascii_uppercase + " 'TIS")
    assert 0 not in ids and len(set(ids)) == 28


@pytest.mark.parametrize("kind, size", [("char", 29), ("bpe", 40)])
def test_what_is_encoded_can_be_decoded(tmp_path, transcripts, kind, size):
    tokenizer = train_tokenizer([transcripts], tmp_path / "m", kind, size)
    assert tokenizer.get_piece_size() == size
    assert tokenizer.bos_id() == tokenizer.eos_id() == -1
    for text in [*SENTENCES, "BROWN THREE'S A CROWD"]:
        ids = tokenizer.encode(text)
        if text in SENTENCES:
            assert 0 not in ids
        assert tokenizer.decode([i for i in ids if i]) == tokenizer.decode(ids)
        if 0 not in ids:
            assert tokenizer.decode(ids) == text


def test_characters_are_one_symbol_each(tmp_path, transcripts):
    tokenizer = train_tokenizer([transcripts], tmp_path / "char.model")
    encoded = [tokenizer.id_to_piece(i) for i in tokenizer.encode("IT'S A")]
    assert encoded == ["\u2581", *"IT'S", "\u2581", "A"]


def test_pieces_of_several_letters_make_texts_shorter(tmp_path, transcripts):
    char = train_tokenizer([transcripts], tmp_path / "char.model")
    bpe = train_tokenizer([transcripts], tmp_path / "bpe.model", "bpe", 40)
    assert len(bpe.encode("THE THREE")) < len(char.encode("THE THREE"))


def test_the_same_transcripts_give_the_same_file(tmp_path, transcripts):
    for kind, size in (("char", 29), ("bpe", 40)):
        paths = [tmp_path / folder / f"{kind}.model" for folder in "ab"]
        for path in paths:
            train_tokenizer([transcripts], path, kind, size)
        first, second = (path.read_bytes() for path in paths)
        assert first == second


def test_all_manifests_are_read(tmp_path):
    files = [
        manifest(tmp_path / "1.csv", ["AAAA BBBB"] * 3),
        manifest(tmp_path / "2.csv", ["CCCC DDDD"] * 3),
    ]
    symbols = pieces(train_tokenizer(files, tmp_path / "m", "bpe", 10))
    assert set("ABCD") <= set("".join(symbols))


def test_folders_may_have_spaces_and_need_not_exist(tmp_path):
    file = manifest(tmp_path / "my data" / "train clean.csv", SENTENCES)
    path = tmp_path / "my results" / "a corpus" / "char 29.model"
    assert train_tokenizer([file], path).get_piece_size() == 29
    assert list(path.parent.iterdir()) == [path]


def test_an_existing_model_is_loaded_and_left_alone(tmp_path, transcripts):
    path = tmp_path / "char.model"
    train_tokenizer([transcripts], path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    again = train_tokenizer([tmp_path / "no such manifest.csv"], path)
    assert again.get_piece_size() == 29
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_a_wrong_size_is_an_error_that_names_both(tmp_path, transcripts):
    path = tmp_path / "char.model"
    with pytest.raises(ValueError, match=r"char\.model has 29 .* is 31"):
        train_tokenizer([transcripts], path, "char", 31)
    train_tokenizer([transcripts], tmp_path / "bpe.model", "bpe", 40)
    with pytest.raises(ValueError, match=r"bpe\.model has 40 .* is 50"):
        train_tokenizer([transcripts], tmp_path / "bpe.model", "bpe", 50)


@pytest.mark.parametrize("sentences", [["A B"], []])
def test_too_few_transcripts_are_an_error_and_leave_nothing(
    tmp_path, sentences
):
    file = manifest(tmp_path / "data" / "train.csv", sentences)
    path = tmp_path / "results" / "bpe.model"
    with pytest.raises(ValueError, match="no bpe tokenizer of 500 symbols"):
        train_tokenizer([file], path, "bpe", 500)
    assert list(path.parent.iterdir()) == []


def test_a_missing_manifest_leaves_nothing(tmp_path):
    path = tmp_path / "results" / "char.model"
    with pytest.raises((OSError, ValueError), match=r"none\.csv"):
        train_tokenizer([tmp_path / "none.csv"], path)
    assert list(path.parent.iterdir()) == []
