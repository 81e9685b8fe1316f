"""Symbols of teacher and student, matched one by one."""

import random
import string

import pytest
import torch

from tutornet_sb.distillation.frame_weighting import frame_weights
from tutornet_sb.distillation.targets import TeacherTargets
from tutornet_sb.teachers.vocabulary import VocabularyError, match_vocabulary

LETTERS = string.ascii_uppercase + "'"
OURS = ["<unk>", "▁", *LETTERS]
# The vocabulary of the published English wav2vec 2.0 models
WAV2VEC2 = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "|",
    *"ETAONIHSRDLUMWCFGYPBVK'XJQZ",
]


def make_posteriors(symbols, seed=0, shape=(2, 5)):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(*shape, symbols, generator=generator)
    return logits.double().softmax(-1)


def by_hand(posteriors, pairs, symbols, blank, boundary=None):
    """The same map by plain loops; `pairs` by index of the teacher."""
    batch, frames, theirs = posteriors.shape
    result = torch.zeros(batch, frames, symbols, dtype=posteriors.dtype)
    for b in range(batch):
        for t in range(frames):
            for i in range(theirs):
                result[b, t, pairs.get(i, blank)] += posteriors[b, t, i]
        if boundary is None:
            continue
        best = result[b].argmax(-1).tolist()
        letters = [t for t, k in enumerate(best) if k not in (blank, boundary)]
        first = letters[0] if letters else frames + 1
        for t in range(letters[-1] + 1 if letters else 0, frames):
            result[b, t, blank] += result[b, t, boundary].item()
            result[b, t, boundary] = 0.0
        if 0 < first <= frames and boundary not in best[:first]:
            result[b, first - 1, boundary] += result[b, first - 1, blank].item()
            result[b, first - 1, blank] = 0.0
    return result


def all_of(posteriors):
    """Lengths of utterances that are as long as their batch."""
    return torch.full((len(posteriors),), posteriors.shape[1])


def test_same_list_costs_nothing():
    vocabulary = match_vocabulary(OURS, list(OURS))
    posteriors = make_posteriors(29).float()
    assert vocabulary.is_identity
    assert vocabulary(posteriors, all_of(posteriors)) is posteriors
    assert vocabulary.lines == []


def test_same_list_is_not_looked_into():
    # Which of two equal pieces is meant is clear where the lists are the same.
    assert match_vocabulary(["_", "a", "a"], ["_", "a", "a"]).is_identity


def test_other_names_at_the_same_indices_cost_nothing():
    theirs = ["<blank>", "▁", *LETTERS.lower()]
    vocabulary = match_vocabulary(theirs, OURS)
    posteriors = make_posteriors(29).float()
    assert vocabulary(posteriors, all_of(posteriors)) is posteriors
    assert vocabulary.lines == ["teacher (29 symbols) -> student (29 symbols)"]


def test_published_vocabulary():
    vocabulary = match_vocabulary(WAV2VEC2, OURS)
    pairs = {0: 0, 4: 1}
    pairs |= {i: OURS.index(p) for i, p in enumerate(WAV2VEC2) if p in LETTERS}
    posteriors = make_posteriors(len(WAV2VEC2))
    lengths = all_of(posteriors)
    expected = by_hand(posteriors, pairs, 29, 0, 1)
    torch.testing.assert_close(vocabulary(posteriors, lengths), expected)
    mapped = vocabulary(posteriors.float(), lengths)
    assert mapped.dtype == torch.float32
    torch.testing.assert_close(mapped, expected.float())
    torch.testing.assert_close(mapped.sum(-1), torch.ones(2, 5))
    assert "'<s>', '</s>', '<unk>'" in vocabulary.lines[-2]


def test_noise_beside_a_symbol_of_the_teachers_own_is_no_target():
    """A comma was [.60, .30, .10], with a frame weight of .4."""
    vocabulary = match_vocabulary(["_", "A", "B", ","], ["_", "A", "B"])
    posteriors = torch.tensor([[[0.0006, 0.0003, 0.0001, 0.999]]])
    mapped = vocabulary(posteriors, torch.tensor([1]))
    expected = torch.tensor([[[0.9996, 0.0003, 0.0001]]])
    torch.testing.assert_close(mapped, expected)
    both = posteriors.repeat(1, 2, 1)
    both[0, 1] = torch.tensor([0.2, 0.8, 0.0, 0.0])
    mapped = vocabulary(both, torch.tensor([2]))
    targets = TeacherTargets(mapped, mapped, torch.tensor([2]), 0.02)
    weights = frame_weights(targets, "nonblank")[0].tolist()
    assert weights == pytest.approx([0.0005, 0.9995], abs=1e-6)


def spelt(text, pieces):
    """Posteriors of frames, rather sure of each: ``_`` is the blank."""
    rows = torch.eye(len(pieces))[[pieces.index(symbol) for symbol in text]]
    return 0.8 * rows + 0.2 / len(pieces)


@pytest.mark.parametrize("sign", ["|", " "])
@pytest.mark.parametrize(
    "theirs, ours",
    [
        # As wav2vec 2.0 writes, and what CTC asks of the student
        ("__A_|_BB_|_", "_▁A_▁_BB___"),
        ("__A|", "_▁A_"),
        ("_A|B", "▁A▁B"),
        # Nothing moves that is in its place.
        ("|_A__|_B__", "▁_A__▁_B__"),
        # No frame is there before the first letter.
        ("A|_B|", "A▁_B_"),
        ("A", "A"),
        # Silence
        ("_|_", "___"),
    ],
)
def test_word_boundaries_at_the_ends_of_an_utterance(theirs, ours, sign):
    pieces = ["_", sign, "A", "B"]
    vocabulary = match_vocabulary(pieces, ["_", "A", "▁", "B"])
    posteriors = spelt(theirs.replace("|", sign), pieces)
    padded = torch.cat([posteriors, spelt(["A"] * 3, pieces)]).unsqueeze(0)
    lengths = torch.tensor([len(theirs)])
    for batch in (posteriors.unsqueeze(0), padded):
        mapped = vocabulary(batch, lengths)[0, : len(theirs)]
        text = "".join("_A▁B"[symbol] for symbol in mapped.argmax(-1))
        assert text == ours
        torch.testing.assert_close(mapped.sum(-1), torch.ones(len(theirs)))
    pairs = {0: 0, 1: 2, 2: 1, 3: 3}
    expected = by_hand(posteriors.unsqueeze(0), pairs, 4, 0, 2)[0]
    torch.testing.assert_close(mapped, expected)
    assert vocabulary.lines[-1] == (
        f"word boundary: '▁' before each word instead of {sign!r} after it"
    )


@pytest.mark.parametrize("seed", range(4))
def test_any_order_against_plain_loops(seed):
    rng = random.Random(seed)
    ours = ["_", *rng.sample(OURS[1:], 28)]
    theirs = [rng.choice((p, p.lower())) for p in OURS[1:]]
    theirs += rng.choices("aAbB012", k=6) + ["|", " "]
    rng.shuffle(theirs)
    their_blank = rng.randrange(len(theirs))
    theirs.insert(their_blank, "<ctc>")
    vocabulary = match_vocabulary(theirs, ours, their_blank)
    names = {p.replace("▁", " "): i for i, p in enumerate(ours) if i}
    pairs = {their_blank: 0}
    for index, piece in enumerate(theirs):
        name = " " if piece in "|▁" else piece.upper()
        if index != their_blank and name in names:
            pairs[index] = names[name]
    posteriors = make_posteriors(len(theirs), seed)
    # The teacher has SentencePiece's sign of a word boundary too.
    expected = by_hand(posteriors, pairs, 29, 0)
    mapped = vocabulary(posteriors, all_of(posteriors))
    torch.testing.assert_close(mapped, expected)


def test_blanks_meet_by_index_only():
    # Here <unk> is the student's blank and a symbol of the teacher's.
    vocabulary = match_vocabulary(["a", "<unk>", "_"], ["<unk>", "A"], 2)
    posteriors = torch.tensor([[[0.2, 0.4, 0.4]]])
    expected = torch.tensor([[[0.8, 0.2]]])
    mapped = vocabulary(posteriors, torch.tensor([1]))
    torch.testing.assert_close(mapped, expected)
    assert vocabulary.lines[1:] == [
        "only in teacher, counted as blank: '<unk>'"
    ]


def test_exact_spelling_goes_first():
    vocabulary = match_vocabulary(["_", "A", "a"], ["_", "a", "A"])
    posteriors = torch.tensor([[[0.1, 0.3, 0.6]]])
    mapped = vocabulary(posteriors, torch.tensor([1]))
    assert mapped[0, 0].tolist() == pytest.approx([0.1, 0.6, 0.3])
    composed, decomposed = "\u00e9", "e\u0301"
    vocabulary = match_vocabulary(["_", decomposed], ["_", composed])
    assert vocabulary.is_identity


def test_half_precision_is_widened():
    vocabulary = match_vocabulary(WAV2VEC2, OURS)
    posteriors = make_posteriors(len(WAV2VEC2)).bfloat16()
    lengths = all_of(posteriors)
    mapped = vocabulary(posteriors, lengths)
    assert mapped.dtype == torch.float32
    torch.testing.assert_close(mapped, vocabulary(posteriors.float(), lengths))
    identity = match_vocabulary(OURS, OURS)
    assert identity(posteriors[..., :29], lengths).dtype == torch.float32


def test_buffer_moves_but_is_not_saved():
    vocabulary = match_vocabulary(WAV2VEC2, OURS)
    assert vocabulary.to("meta").index.device.type == "meta"
    assert vocabulary.state_dict() == {}


@pytest.mark.parametrize(
    "theirs, ours, words",
    [
        (["_", "a"], ["_", "a", "b", "9"], ["2 of the 4", "'b', '9'"]),
        (["_", "a", "b"], ["_", "ab"], ["1 of the 2", "'ab'"]),
        # One of two that mean the same stays without a teacher.
        (["_", "|"], ["_", "▁", " "], ["1 of the 3", "' '"]),
        (["_", "a"], ["_", "a", "a"], ["1 of the 3", "'a'"]),
        (["_"], ["_", *map(str, range(50))], ["'39' and 10 more"]),
        # The teacher's blank is no letter.
        (["a", "b"], ["_", "a", "b"], ["1 of the 3", "'a'"]),
    ],
)
def test_symbols_without_a_teacher(theirs, ours, words):
    with pytest.raises(VocabularyError) as raised:
        match_vocabulary(theirs, ours, teacher_name="big", student_name="small")
    message = str(raised.value)
    for word in [
        *words,
        "small",
        "big",
        "stages: [rkd, ctc]",
        "stages: [pseudo]",
    ]:
        assert word in message


def test_unused_symbols_may_be_missing():
    theirs, ours = ["_", "A"], ["_", "B", "A", "'"]
    with pytest.raises(ValueError, match='1 of the 4 .*: "\'"[.]'):
        match_vocabulary(theirs, ours, unused=["B"])
    vocabulary = match_vocabulary(theirs, ours, unused=["'", "B", "A"])
    mapped = vocabulary(torch.tensor([[[0.25, 0.75]]]), torch.tensor([1]))
    assert mapped.tolist() == [[[0.25, 0.0, 0.75, 0.0]]]
    assert vocabulary.lines[-1] == ("not in teacher, probability 0: 'B', \"'\"")


def test_pieces_of_several_letters():
    theirs = ["<pad>", "▁the", "ing", "▁a", "s"]
    ours = ["<unk>", "S", "▁A", "▁THE", "ING"]
    vocabulary = match_vocabulary(theirs, ours)
    posteriors = torch.tensor([[[0.1, 0.2, 0.3, 0.15, 0.25]]])
    expected = torch.tensor([[[0.1, 0.25, 0.15, 0.2, 0.3]]])
    mapped = vocabulary(posteriors, torch.tensor([1]))
    torch.testing.assert_close(mapped, expected)


def test_wrong_calls():
    with pytest.raises(ValueError, match="big has 2 symbols, so index 2"):
        match_vocabulary(["_", "a"], ["_", "a"], 2, teacher_name="big")
    with pytest.raises(
        VocabularyError, match="whisper has no CTC head.*rkd, ctc"
    ):
        match_vocabulary(None, ["_", "a"], teacher_name="whisper")
