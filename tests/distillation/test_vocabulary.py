"""Symbols of teacher and student, matched one by one."""

import random
import string

import pytest
import torch

from tutornet_sb.distillation.vocabulary import (
    VocabularyError,
    VocabularyMap,
    match_vocabulary,
)

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


def by_hand(posteriors, pairs, symbols, blank, extra):
    """The same map by plain loops; `pairs` by index of the teacher."""
    batch, frames, theirs = posteriors.shape
    result = torch.zeros(batch, frames, symbols, dtype=posteriors.dtype)
    for b in range(batch):
        for t in range(frames):
            for i in range(theirs):
                value = posteriors[b, t, i]
                if i in pairs:
                    result[b, t, pairs[i]] += value
                elif extra == "blank":
                    result[b, t, blank] += value
            if extra == "renormalise":
                result[b, t] /= result[b, t].sum()
    return result


def test_same_list_costs_nothing():
    vocabulary = match_vocabulary(OURS, list(OURS))
    posteriors = make_posteriors(29).float()
    assert vocabulary.is_identity
    assert vocabulary(posteriors) is posteriors
    assert vocabulary.describe() == []


def test_same_list_is_not_looked_into():
    # Which of two equal pieces is meant is clear where the lists are the same.
    assert match_vocabulary(["_", "a", "a"], ["_", "a", "a"]).is_identity


def test_other_names_at_the_same_indices_cost_nothing():
    theirs = ["<blank>", "|", *LETTERS.lower()]
    vocabulary = match_vocabulary(theirs, OURS)
    posteriors = make_posteriors(29).float()
    assert vocabulary(posteriors) is posteriors
    assert vocabulary.describe()[1] == "blank: '<blank>' 0 -> '<unk>' 0"
    assert "'|' 1 -> '▁' 1, 'a' 2 -> 'A' 2" in vocabulary.describe()[2]


@pytest.mark.parametrize("extra", ["renormalise", "blank"])
def test_published_vocabulary(extra):
    vocabulary = match_vocabulary(WAV2VEC2, OURS, extra=extra)
    pairs = {0: 0, 4: 1}
    pairs |= {i: OURS.index(p) for i, p in enumerate(WAV2VEC2) if p in LETTERS}
    posteriors = make_posteriors(len(WAV2VEC2))
    expected = by_hand(posteriors, pairs, 29, 0, extra)
    torch.testing.assert_close(vocabulary(posteriors), expected)
    mapped = vocabulary(posteriors.float())
    assert mapped.dtype == torch.float32
    torch.testing.assert_close(mapped, expected.float())
    torch.testing.assert_close(mapped.sum(-1), torch.ones(2, 5))
    assert "'<s>', '</s>', '<unk>'" in vocabulary.describe()[-1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("extra", ["renormalise", "blank"])
def test_any_order_against_plain_loops(seed, extra):
    rng = random.Random(seed)
    ours = rng.sample(OURS[1:], 28)
    blank = rng.randrange(29)
    ours.insert(blank, "_")
    theirs = [rng.choice((p, p.lower())) for p in OURS[1:]]
    theirs += rng.choices("aAbB012", k=6) + ["|", " "]
    rng.shuffle(theirs)
    their_blank = rng.randrange(len(theirs))
    theirs.insert(their_blank, "<ctc>")
    vocabulary = match_vocabulary(theirs, ours, their_blank, blank, extra)
    names = {p.replace("▁", " "): i for i, p in enumerate(ours) if i != blank}
    pairs = {their_blank: blank}
    for index, piece in enumerate(theirs):
        name = " " if piece in "|▁" else piece.upper()
        if index != their_blank and name in names:
            pairs[index] = names[name]
    posteriors = make_posteriors(len(theirs), seed)
    expected = by_hand(posteriors, pairs, 29, blank, extra)
    torch.testing.assert_close(vocabulary(posteriors), expected)


def test_blanks_meet_by_index_only():
    # Here <unk> is the student's blank and a symbol of the teacher's.
    vocabulary = match_vocabulary(["a", "<unk>", "_"], ["<unk>", "A"], 2)
    posteriors = torch.tensor([[[0.2, 0.4, 0.4]]])
    expected = torch.tensor([[[2 / 3, 1 / 3]]])
    torch.testing.assert_close(vocabulary(posteriors), expected)
    assert vocabulary.describe()[1:] == [
        "blank: '_' 2 -> '<unk>' 0",
        "changed: 'a' 0 -> 'A' 1",
        "only in teacher, dropped and the rest renormalised: '<unk>'",
    ]


def test_exact_spelling_goes_first():
    vocabulary = match_vocabulary(["_", "A", "a"], ["_", "a", "A"])
    posteriors = torch.tensor([[[0.1, 0.3, 0.6]]])
    assert vocabulary(posteriors)[0, 0].tolist() == pytest.approx(
        [0.1, 0.6, 0.3]
    )
    composed, decomposed = "\u00e9", "e\u0301"
    vocabulary = match_vocabulary(["_", decomposed], ["_", composed])
    assert vocabulary.is_identity


def test_nothing_left_is_blank():
    vocabulary = match_vocabulary(
        ["b", "_", "<s>"], ["A", "B", "_"], 1, 2, unused=["A"]
    )
    posteriors = torch.tensor([[[0.0, 0.0, 1.0], [1e-30, 0.0, 1.0]]])
    expected = torch.tensor([[[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
    torch.testing.assert_close(vocabulary(posteriors), expected)


def test_half_precision_is_widened():
    vocabulary = match_vocabulary(WAV2VEC2, OURS)
    posteriors = make_posteriors(len(WAV2VEC2)).bfloat16()
    mapped = vocabulary(posteriors)
    assert mapped.dtype == torch.float32
    torch.testing.assert_close(mapped, vocabulary(posteriors.float()))
    identity = match_vocabulary(OURS, OURS)
    assert identity(posteriors[..., :29]).dtype == torch.float32


def test_gradients_are_those_of_the_plain_loops():
    vocabulary = match_vocabulary(WAV2VEC2, OURS)
    pairs = {0: 0, 4: 1}
    pairs |= {i: OURS.index(p) for i, p in enumerate(WAV2VEC2) if p in LETTERS}
    gradients = []
    for mapping in (
        vocabulary,
        lambda p: by_hand(p, pairs, 29, 0, "renormalise"),
    ):
        posteriors = make_posteriors(len(WAV2VEC2)).requires_grad_()
        mapping(posteriors).square().sum().backward()
        gradients.append(posteriors.grad)
    torch.testing.assert_close(*gradients)


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
        "method: pseudo",
    ]:
        assert word in message


def test_unused_symbols_may_be_missing():
    theirs, ours = ["_", "A"], ["_", "B", "A", "'"]
    with pytest.raises(ValueError, match='1 of the 4 .*: "\'"[.]'):
        match_vocabulary(theirs, ours, unused=["B"])
    vocabulary = match_vocabulary(theirs, ours, unused=["'", "B", "A"])
    mapped = vocabulary(torch.tensor([[[0.25, 0.75]]]))
    assert mapped.tolist() == [[[0.25, 0.0, 0.75, 0.0]]]
    assert vocabulary.describe()[-1] == (
        "not in teacher, probability 0: 'B', \"'\""
    )


def test_pieces_of_several_letters():
    theirs = ["<pad>", "▁the", "ing", "▁a", "s"]
    ours = ["<unk>", "S", "▁A", "▁THE", "ING"]
    vocabulary = match_vocabulary(theirs, ours)
    posteriors = torch.tensor([[[0.1, 0.2, 0.3, 0.15, 0.25]]])
    expected = torch.tensor([[[0.1, 0.25, 0.15, 0.2, 0.3]]])
    torch.testing.assert_close(vocabulary(posteriors), expected)


def test_wrong_calls():
    # Not one that another way of teaching could do without
    wrong = "'drop'; choose from: renorm.*blank"
    with pytest.raises(ValueError, match=wrong) as raised:
        match_vocabulary(["_", "a", "b"], ["_", "a"], extra="drop")
    assert raised.type is ValueError
    with pytest.raises(ValueError, match="big has 2 symbols, so index 2"):
        match_vocabulary(["_", "a"], ["_", "a"], 2, teacher_name="big")
    with pytest.raises(ValueError, match="student has 2 symbols, so index -1"):
        match_vocabulary(["_", "a"], ["_", "a"], 0, -1)
    with pytest.raises(
        VocabularyError, match="whisper has no CTC head.*rkd, ctc"
    ):
        match_vocabulary(None, ["_", "a"], teacher_name="whisper")


def test_made_by_hand_it_checks_too():
    with pytest.raises(ValueError, match="choose from"):
        VocabularyMap([0], 1, 0, extra="")
