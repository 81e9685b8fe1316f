"""A teacher's symbols onto the student's, one by one."""

import unicodedata

import torch

from tutornet_sb.distillation.targets import at_least_float32
from tutornet_sb.networks.acoustic_model import frame_mask
from tutornet_sb.util.errors import InputError

# SentencePiece's sign of a word boundary, which it puts before each word
_BOUNDARY = "▁"
_SPACES = str.maketrans(_BOUNDARY, " ")


class VocabularyError(InputError):
    """A teacher's posteriors cannot teach this vocabulary."""


class VocabularyMap(torch.nn.Module):
    """Posteriors over the teacher's symbols as posteriors over the student's.

    Made by :func:`match_vocabulary`. Several teacher symbols on one student
    symbol add up. Symbols that only the teacher has, such as punctuation, count
    as blank: they are in no transcript of the student, and what little
    probability a frame has besides them is no target. Where both lists are the
    same, posteriors pass unchanged.

    With a word boundary, an utterance begins with one and does not end with
    one, as SentencePiece writes transcripts. The letters of wav2vec 2.0 have
    one after each word instead, the last one too: there CTC would ask for blank
    where the teacher has a boundary. So its probability counts as blank
    after the last letter, and unless there is one before the first letter, that
    of blank counts as boundary at the frame before it.

    Arguments
    ---------
    targets : list of int or None
        For each teacher symbol the index of its student symbol, or None for a
        symbol that only the teacher has.
    symbols : int
        Student's symbols.
    blank_index : int
        The student's blank.
    boundary_index : int, optional
        The student's word boundary, where the teacher's stands elsewhere.

    Example
    -------
    >>> vocabulary = VocabularyMap([1, None, 0], 2, blank_index=0)
    >>> vocabulary(torch.tensor([[[0.3, 0.5, 0.2]]]), torch.tensor([1]))
    tensor([[[0.7000, 0.3000]]])
    """

    def __init__(self, targets, symbols, blank_index, boundary_index=None):
        super().__init__()
        self.is_identity = targets == list(range(symbols))
        self.symbols = symbols
        self.blank_index = blank_index
        self.boundary_index = boundary_index
        index = [
            blank_index if target is None else target for target in targets
        ]
        # Follows from the two vocabularies: no part of a checkpoint.
        self.register_buffer("index", torch.tensor(index), persistent=False)
        self.lines = []

    def describe(self):
        """Tell what becomes of the symbols, for a person to read.

        Returns
        -------
        list of str
            Lines about what differs; none if the vocabularies are the same, or
            if the map was not made by :func:`match_vocabulary`.
        """
        return list(self.lines)

    def forward(self, posteriors, lengths):
        """Map posteriors.

        Arguments
        ---------
        posteriors : torch.Tensor
            Teacher's, ``(batch, frames, teacher symbols)``.
        lengths : torch.Tensor
            Valid frames of each utterance, integers of shape ``(batch,)``.

        Returns
        -------
        torch.Tensor
            ``(batch, frames, student symbols)``, float32 or wider.
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
        boundary, blank = self.boundary_index, self.blank_index
        mask = frame_mask(lengths, posteriors.shape[1])
        best = posteriors.argmax(-1)
        letters = mask & (best != blank) & (best != boundary)
        up_to, from_here = letters.cumsum(1), letters.flip(1).cumsum(1).flip(1)
        is_there = mask & (best == boundary) & (up_to == 0)
        # The frame before the first letter, and those after the last
        first = (up_to == 0) & (up_to.roll(-1, 1) == 1)
        first[:, -1] = False
        first &= ~is_there.any(1, keepdim=True)
        after = from_here == 0
        moved = torch.where(after, posteriors[..., boundary], 0.0)
        moved = torch.where(first, -posteriors[..., blank], moved)
        posteriors = posteriors.clone()
        posteriors[..., blank] += moved
        posteriors[..., boundary] -= moved
        return posteriors


def match_vocabulary(
    teacher_pieces,
    student_pieces,
    teacher_blank=0,
    student_blank=0,
    unused=(),
    teacher_name="teacher",
    student_name="student",
):
    r"""Find each of the student's symbols among the teacher's.

    Symbols meet if they are the same, or else if they are the same but for
    case, Unicode composition, and the sign of the word boundary (``|``, ``▁``
    or a space). The blanks meet whatever they are called. Pieces of several
    letters follow the same rule; they are never taken apart.

    Arguments
    ---------
    teacher_pieces : list of str
        Teacher's symbols by index.
    student_pieces : list of str
        Student's symbols by index.
    teacher_blank : int
        Index of the teacher's blank.
    student_blank : int
        Index of the student's blank.
    unused : list of str
        Student's symbols that the teacher may lack, since no training
        transcript holds them. Those it lacks get probability 0.
    teacher_name : str
        How to call the teacher in messages.
    student_name : str
        How to call the student in messages.

    Returns
    -------
    VocabularyMap
        From teacher to student.

    Raises
    ------
    VocabularyError
        If the teacher lacks a symbol of the student, or a CTC head.
    ValueError
        If a blank is not among the symbols.

    Example
    -------
    >>> vocabulary = match_vocabulary(
    ...     ["<pad>", "<s>", "|", "b", "a"], ["<unk>", "▁", "A", "B"]
    ... )
    >>> print("\n".join(vocabulary.describe()))
    teacher (5 symbols) -> student (4 symbols)
    blank: '<pad>' 0 -> '<unk>' 0
    changed: '|' 2 -> '▁' 1, 'b' 3 -> 'B' 3, 'a' 4 -> 'A' 2
    only in teacher, counted as blank: '<s>'
    word boundary: '▁' before each word instead of '|' after it
    """
    if teacher_pieces is None:
        raise VocabularyError(
            f"{teacher_name} has no CTC head, so there are no symbols to "
            "match: it can teach hidden representations only, by stages: "
            "[rkd, ctc]"
        )
    theirs, ours = list(teacher_pieces), list(student_pieces)
    for name, pieces, blank in (
        (teacher_name, theirs, teacher_blank),
        (student_name, ours, student_blank),
    ):
        if not 0 <= blank < len(pieces):
            raise InputError(
                f"{name} has {len(pieces)} symbols, so index {blank} cannot "
                "be its blank"
            )

    if (theirs, teacher_blank) == (ours, student_blank):
        return VocabularyMap(list(range(len(ours))), len(ours), student_blank)
    exact, alike = {}, {}
    for index, piece in enumerate(ours):
        if index != student_blank:
            exact.setdefault(piece, index)
            alike.setdefault(_normal_form(piece), index)
    targets = [
        exact.get(piece, alike.get(_normal_form(piece))) for piece in theirs
    ]
    targets[teacher_blank] = student_blank

    found = set(targets)
    missing = [i for i in range(len(ours)) if i not in found]
    unknown = [ours[i] for i in missing if ours[i] not in set(unused)]
    if unknown:
        raise VocabularyError(
            f"{len(unknown)} of the {len(ours)} symbols of {student_name} are "
            f"not among the {len(theirs)} of {teacher_name}: {_list(unknown)}. "
            "Its posteriors cannot teach them. Let it teach hidden "
            "representations only, by stages: [rkd, ctc], or transcripts, by "
            "stages: [pseudo]"
        )
    # What is written as SentencePiece writes it stands where it does, too.
    boundary = ours.index(_BOUNDARY) if _BOUNDARY in ours else -1
    signs = [theirs[i] for i, t in enumerate(targets) if t == boundary]
    if not signs or _BOUNDARY in signs:
        boundary = None
    vocabulary = VocabularyMap(targets, len(ours), student_blank, boundary)
    vocabulary.lines = [
        f"{teacher_name} ({len(theirs)} symbols) -> "
        f"{student_name} ({len(ours)} symbols)",
        *_differences(theirs, ours, targets, teacher_blank),
    ]
    if boundary is not None:
        vocabulary.lines.append(
            f"word boundary: {_BOUNDARY!r} before each word instead of "
            f"{_list(signs)} after it"
        )
    return vocabulary


def _normal_form(piece):
    """What a symbol stands for."""
    if piece == "|":
        return " "
    return unicodedata.normalize("NFC", piece.translate(_SPACES)).lower()


def _differences(theirs, ours, targets, blank):
    """Lines about what is not the same."""
    changed = {
        i: f"{piece!r} {i} -> {ours[target]!r} {target}"
        for i, (piece, target) in enumerate(zip(theirs, targets, strict=True))
        if target is not None and (i, piece) != (target, ours[target])
    }
    own = [p for p, t in zip(theirs, targets, strict=True) if t is None]
    never = [p for i, p in enumerate(ours) if i not in targets]
    lines = []
    if blank in changed:
        lines.append(f"blank: {changed.pop(blank)}")
    if changed:
        lines.append(f"changed: {_list(changed.values(), str)}")
    if own:
        lines.append(f"only in teacher, counted as blank: {_list(own)}")
    if never:
        lines.append(f"not in teacher, probability 0: {_list(never)}")
    return lines


def _list(items, write=repr, most=40):
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(write, items[:most])) + more
