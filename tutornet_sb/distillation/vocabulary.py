"""A teacher's symbols onto the student's, one by one."""

import unicodedata

import torch

from tutornet_sb.distillation.targets import at_least_float32

# Where the probability of symbols goes that only the teacher has
EXTRA = {
    "renormalise": "dropped and the rest renormalised",
    "blank": "counted as blank",
}
_SPACES = str.maketrans("▁", " ")


class VocabularyError(ValueError):
    """A teacher's posteriors cannot teach this vocabulary."""


class VocabularyMap(torch.nn.Module):
    """Posteriors over the teacher's symbols as posteriors over the student's.

    Made by :func:`match_vocabulary`. Several teacher symbols on one student
    symbol add up. Where both lists are the same, posteriors pass unchanged.

    Arguments
    ---------
    targets : list of int or None
        For each teacher symbol the index of its student symbol, or None for a
        symbol that only the teacher has.
    symbols : int
        Student's symbols.
    blank_index : int
        The student's blank.
    extra : str
        Where the probability of the teacher's own symbols goes, one of
        ``EXTRA``: ``renormalise`` drops it and scales the rest of the frame to
        sum to 1 (a frame with nothing left says blank); ``blank`` adds it to
        the blank.

    Example
    -------
    >>> vocabulary = VocabularyMap([1, None, 0], 2, blank_index=0)
    >>> vocabulary(torch.tensor([[[0.3, 0.5, 0.2]]]))
    tensor([[[0.4000, 0.6000]]])
    """

    def __init__(self, targets, symbols, blank_index, extra="renormalise"):
        super().__init__()
        if extra not in EXTRA:
            raise ValueError(
                f"extra symbols: no {extra!r}; choose from: {', '.join(EXTRA)}"
            )
        self.is_identity = targets == list(range(symbols))
        self.symbols = symbols
        self.blank_index = blank_index
        # What is dropped goes to a column of its own behind the others.
        self.drops = extra == "renormalise" and None in targets
        home = symbols if self.drops else blank_index
        index = [home if target is None else target for target in targets]
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

    def forward(self, posteriors):
        """Map posteriors.

        Arguments
        ---------
        posteriors : torch.Tensor
            Teacher's, ``(batch, frames, teacher symbols)``.

        Returns
        -------
        torch.Tensor
            ``(batch, frames, student symbols)``, float32 or wider.
        """
        posteriors = at_least_float32(posteriors)
        if self.is_identity:
            return posteriors
        columns = self.symbols + self.drops
        mapped = posteriors.new_zeros(*posteriors.shape[:-1], columns)
        mapped = mapped.index_add(-1, self.index, posteriors)
        if not self.drops:
            return mapped
        mapped = mapped[..., : self.symbols]
        total = mapped.sum(-1, keepdim=True)
        tiny = torch.finfo(total.dtype).tiny
        blank = mapped.new_zeros(self.symbols)
        blank[self.blank_index] = 1.0
        return torch.where(total < tiny, blank, mapped / total.clamp(min=tiny))


def match_vocabulary(
    teacher_pieces,
    student_pieces,
    teacher_blank=0,
    student_blank=0,
    extra="renormalise",
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
    extra : str
        ``renormalise`` or ``blank``; see :class:`VocabularyMap`.
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
        If a blank is not among the symbols, or ``extra`` is unknown.

    Example
    -------
    >>> vocabulary = match_vocabulary(
    ...     ["<pad>", "<s>", "|", "b", "a"], ["<unk>", "▁", "A", "B"]
    ... )
    >>> print("\n".join(vocabulary.describe()))
    teacher (5 symbols) -> student (4 symbols)
    blank: '<pad>' 0 -> '<unk>' 0
    changed: '|' 2 -> '▁' 1, 'b' 3 -> 'B' 3, 'a' 4 -> 'A' 2
    only in teacher, dropped and the rest renormalised: '<s>'
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
            raise ValueError(
                f"{name} has {len(pieces)} symbols, so index {blank} cannot "
                "be its blank"
            )

    if (theirs, teacher_blank) == (ours, student_blank):
        return VocabularyMap(
            list(range(len(ours))), len(ours), student_blank, extra
        )
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
            "method: pseudo"
        )
    vocabulary = VocabularyMap(targets, len(ours), student_blank, extra)
    vocabulary.lines = [
        f"{teacher_name} ({len(theirs)} symbols) -> "
        f"{student_name} ({len(ours)} symbols)",
        *_differences(theirs, ours, targets, teacher_blank, extra),
    ]
    return vocabulary


def _normal_form(piece):
    """What a symbol stands for."""
    if piece == "|":
        return " "
    return unicodedata.normalize("NFC", piece.translate(_SPACES)).lower()


def _differences(theirs, ours, targets, blank, extra):
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
        lines.append(f"only in teacher, {EXTRA[extra]}: {_list(own)}")
    if never:
        lines.append(f"not in teacher, probability 0: {_list(never)}")
    return lines


def _list(items, write=repr, most=40):
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(write, items[:most])) + more
