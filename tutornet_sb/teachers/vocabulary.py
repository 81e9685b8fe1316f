"""A teacher's symbols mapped onto the student's, one by one."""

import unicodedata

import torch

from tutornet_sb.corpora.tokenizer import BLANK
from tutornet_sb.distillation.targets import at_least_float32
from tutornet_sb.networks.acoustic_model import frame_mask
from tutornet_sb.util.errors import InputError

# SentencePiece's sign of a word boundary, which it puts before each word
_BOUNDARY = "▁"
_SPACES = str.maketrans(_BOUNDARY, " ")


class VocabularyError(InputError):
    """A teacher's posteriors cannot be targets over this vocabulary."""


class VocabularyMap(torch.nn.Module):
    """Map posteriors over the teacher's symbols onto the student's.

    Made by :func:`match_vocabulary`. Several teacher symbols on one student
    symbol add up. Symbols that only the teacher has, such as punctuation, count
    as blank: they are in no transcript of the student, and what little
    probability a frame has besides them is no target. Where both lists are the
    same, posteriors pass unchanged.

    With a word boundary, an utterance begins with one and does not end with
    one, as SentencePiece writes transcripts. The letters of wav2vec 2.0 have
    one after each word instead, the last one too: there CTC requires blank
    where the teacher has a boundary. So its probability counts as blank
    after the last letter, and unless there is one before the first letter, that
    of blank counts as boundary at the frame before it.

    `targets` are the student's symbol for each of the teacher's, or None for
    one that only the teacher has; `boundary_index` is the student's word
    boundary, where the teacher's is elsewhere. ``lines`` are about what
    differs, for a person.
    """

    def __init__(self, targets, symbols, boundary_index=None):
        super().__init__()
        self.is_identity = targets == list(range(symbols))
        self.symbols = symbols
        self.boundary_index = boundary_index
        index = [BLANK if target is None else target for target in targets]
        # Follows from the two vocabularies: no part of a checkpoint.
        self.register_buffer("index", torch.tensor(index), persistent=False)
        self.lines = []

    def forward(self, posteriors, lengths):
        """Map ``(batch, frames, symbols)``, of ``(batch,)`` valid frames.

        Returns float32 or wider.
        """
        mapped = at_least_float32(posteriors)
        if not self.is_identity:
            none = mapped.new_zeros(*mapped.shape[:-1], self.symbols)
            mapped = none.index_add(-1, self.index, mapped)
        if self.boundary_index is None:
            return mapped
        return self._move_boundaries(mapped, lengths)

    def _move_boundaries(self, posteriors, lengths):
        """Put a word boundary before the first letter, none after the last."""
        boundary = self.boundary_index
        mask = frame_mask(lengths, posteriors.shape[1])
        best = posteriors.argmax(-1)
        letters = mask & (best != BLANK) & (best != boundary)
        up_to, from_here = letters.cumsum(1), letters.flip(1).cumsum(1).flip(1)
        is_there = mask & (best == boundary) & (up_to == 0)
        # The frame before the first letter, and those after the last
        first = (up_to == 0) & (up_to.roll(-1, 1) == 1)
        first[:, -1] = False
        first &= ~is_there.any(1, keepdim=True)
        after = from_here == 0
        moved = torch.where(after, posteriors[..., boundary], 0.0)
        moved = torch.where(first, -posteriors[..., BLANK], moved)
        posteriors = posteriors.clone()
        posteriors[..., BLANK] += moved
        posteriors[..., boundary] -= moved
        return posteriors


def match_vocabulary(
    teacher_pieces,
    student_pieces,
    teacher_blank=BLANK,
    unused=(),
    teacher_name="teacher",
    student_name="student",
):
    r"""Find each of the student's symbols among the teacher's.

    Symbols match if they are the same, or else if they are the same but for
    case, Unicode composition, and the sign of the word boundary (``|``, ``▁``
    or a space). The blanks match whatever they are called. Pieces of several
    letters follow the same rule; they are never split.

    Symbols are listed by index; a teacher without a CTC head has None. It may
    lack symbols that are `unused`, in no training transcript, which then get
    probability 0; if it lacks others, a ``VocabularyError`` is raised.

    Example
    -------
    >>> vocabulary = match_vocabulary(
    ...     ["<pad>", "<s>", "|", "b", "a"], ["<unk>", "▁", "A", "B"]
    ... )
    >>> print("\n".join(vocabulary.lines))
    teacher (5 symbols) -> student (4 symbols)
    only in teacher, counted as blank: '<s>'
    word boundary: '▁' before each word instead of '|' after it
    """
    if teacher_pieces is None:
        raise VocabularyError(
            f"{teacher_name} has no CTC head, so there are no symbols to "
            "match: distil its hidden representations only, by stages: "
            "[rkd, ctc]"
        )
    theirs, ours = list(teacher_pieces), list(student_pieces)
    if not 0 <= teacher_blank < len(theirs):
        raise InputError(
            f"{teacher_name} has {len(theirs)} symbols, so index "
            f"{teacher_blank} cannot be its blank"
        )
    if (theirs, teacher_blank) == (ours, BLANK):
        return VocabularyMap(list(range(len(ours))), len(ours))
    exact, alike = {}, {}
    for index, piece in enumerate(ours):
        if index != BLANK:
            exact.setdefault(piece, index)
            alike.setdefault(_normal_form(piece), index)
    targets = [
        exact.get(piece, alike.get(_normal_form(piece))) for piece in theirs
    ]
    targets[teacher_blank] = BLANK

    found = set(targets)
    missing = [piece for i, piece in enumerate(ours) if i not in found]
    unknown = [piece for piece in missing if piece not in set(unused)]
    if unknown:
        raise VocabularyError(
            f"{len(unknown)} of the {len(ours)} symbols of {student_name} are "
            f"not among the {len(theirs)} of {teacher_name}: {_list(unknown)}. "
            "Its posteriors are no targets for them. Distil its hidden "
            "representations only, by stages: [rkd, ctc], or its transcripts, "
            "by stages: [pseudo]"
        )
    # A teacher with SentencePiece's sign has it in the same places.
    boundary = ours.index(_BOUNDARY) if _BOUNDARY in ours else -1
    signs = [theirs[i] for i, t in enumerate(targets) if t == boundary]
    if not signs or _BOUNDARY in signs:
        boundary = None
    vocabulary = VocabularyMap(targets, len(ours), boundary)
    vocabulary.lines = [
        f"{teacher_name} ({len(theirs)} symbols) -> "
        f"{student_name} ({len(ours)} symbols)",
    ]
    own = [p for p, t in zip(theirs, targets, strict=True) if t is None]
    if own:
        vocabulary.lines.append(
            f"only in teacher, counted as blank: {_list(own)}"
        )
    if missing:
        vocabulary.lines.append(
            f"not in teacher, probability 0: {_list(missing)}"
        )
    if boundary is not None:
        vocabulary.lines.append(
            f"word boundary: {_BOUNDARY!r} before each word instead of "
            f"{_list(signs)} after it"
        )
    return vocabulary


def _normal_form(piece):
    """A symbol without case, composition and the kind of its boundary."""
    if piece == "|":
        return " "
    return unicodedata.normalize("NFC", piece.translate(_SPACES)).lower()


def _list(pieces, most=40):
    more = f" and {len(pieces) - most} more" if len(pieces) > most else ""
    return ", ".join(map(repr, pieces[:most])) + more
