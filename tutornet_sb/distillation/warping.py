"""Tolerance: sums over monotone alignments of two CTC models within a band."""

import torch

from tutornet_sb.corpora.tokenizer import BLANK


def warped_loss(frame_loss, p, log_q, mask, selected, tolerance):
    """Sum of frame costs along the cheapest monotone alignment.

    Every frame of either model is compared with some frame of the other, in
    order and no more than `tolerance` frames apart. As in CTC, blanks between
    different symbols are optional: an inserted or dropped one is compared with
    a certain blank instead. So a spike costs nothing if it is early or late
    within the tolerance. If it is missing, inserted, or merged with a spike of
    the same symbol, a frame is compared with one of another symbol, whatever
    the tolerance.

    The loss turns ``(p, log_q)``, both ``(..., symbols)``, into ``(...)``;
    `p` and `log_q` are ``(batch, frames, symbols)``. Valid frames, and those
    whose comparison has a cost, are ``(batch, frames)``, the sum ``(batch,)``.
    """
    # Each teacher frame against the student's frames around it
    outside = ~around(mask, tolerance)
    costs = frame_loss(p.unsqueeze(2), around(log_q, tolerance))
    costs = costs.masked_fill(~selected.unsqueeze(-1), 0.0)
    # Optional blanks
    optional = changes(p, mask)
    blank = torch.zeros_like(p[:1, :1])
    blank[..., BLANK] = 1.0
    inserted = around(frame_loss(blank, log_q), tolerance)
    inserted = inserted.masked_fill(~optional.unsqueeze(-1), torch.inf)
    tiny = torch.finfo(p.dtype).tiny
    dropped = frame_loss(blank, p.clamp(min=tiny).log())
    optional &= p.argmax(-1) == BLANK
    return warped_sum(
        costs.masked_fill(outside, torch.inf),
        inserted.masked_fill(outside, torch.inf),
        dropped.masked_fill(~optional, torch.inf),
        mask,
    )


def around(x, tolerance):
    """Give each frame its neighbours, and itself between them.

    Turns ``(batch, frames, ...)`` into
    ``(batch, frames, 2 * tolerance + 1, ...)``, frame ``t - tolerance + i`` at
    ``t`` and ``i``, zero where there is no such frame.

    Example
    -------
    >>> around(torch.tensor([[1, 2]]), 1)
    tensor([[[0, 1, 2],
             [1, 2, 0]]])
    """
    margins = [0, 0] * (x.dim() - 2) + [tolerance, tolerance]
    x = torch.nn.functional.pad(x, margins)
    return x.unfold(1, 2 * tolerance + 1, 1).movedim(-1, 2)


def changes(p, mask):
    """Frames after which CTC reads another symbol than up to them.

    `p` is ``(batch, frames, symbols)``, both masks are ``(batch, frames)``.
    """
    best = p.argmax(-1)
    spikes = (best != BLANK) & mask
    frames = best.shape[1]
    # A frame before all others and one after them, without a symbol
    best = torch.nn.functional.pad(best, (1, 1), value=-1)
    index = torch.arange(1, frames + 1, device=p.device)
    last = torch.where(spikes, index, 0).cummax(1).values
    following = torch.where(spikes, index, frames + 1)
    following = following.flip(1).cummin(1).values.flip(1)
    following = torch.nn.functional.pad(
        following[:, 1:], (0, 1), value=frames + 1
    )
    return best.gather(1, last) != best.gather(1, following)


def _min_plus(a, b):
    """Product of matrices whose sums are minima and whose products are sums."""
    return (a.unsqueeze(-1) + b.unsqueeze(-3)).amin(-2)


def _chain(costs):
    """Costs of going from each place in the band to each later one."""
    pad = torch.nn.functional.pad
    rows = [
        pad(
            pad(costs[..., i + 1 :].cumsum(-1), (1, 0)), (i, 0), value=torch.inf
        )
        for i in range(costs.shape[-1])
    ]
    return torch.stack(rows, dim=-2)


def warped_sum(costs, inserted, dropped, mask):
    """Add up costs along the cheapest monotone alignment within a band.

    Dynamic time warping in the band of Sakoe and Chiba (1978): an alignment
    leads from both first frames to both last ones, and each step advances the
    teacher, the student or both by one frame. Steps from frame to frame are
    matrices of the min-plus semiring, multiplied pairwise, so that the depth is
    logarithmic in the frames.

    The costs are of the teacher's frame ``t`` and the student's frame
    ``t - tolerance + i``, and if that is inserted after ``t``, both
    ``(batch, frames, 2 * tolerance + 1)``, and if ``t`` is dropped,
    ``(batch, frames)``; they are infinite where that may not be. The sum is
    ``(batch,)``.
    """
    chain = _chain(costs)
    # Both advance, which keeps the place in the band, or only the teacher,
    # which loses one. Then only the student advances.
    both = costs.unsqueeze(-1) + chain
    alone = torch.minimum(costs, dropped.unsqueeze(-1))
    alone = alone.masked_fill(costs.isinf(), torch.inf).unsqueeze(-1) + chain
    alone = torch.nn.functional.pad(
        alone[..., :-1, :], (0, 0, 1, 0), value=torch.inf
    )
    steps = _min_plus(torch.minimum(both, alone), _chain(inserted))
    stay = torch.full_like(steps[0, 0], torch.inf).fill_diagonal_(0.0)
    steps = torch.where(mask[..., None, None], steps, stay)
    while steps.shape[1] > 1:
        even = steps.shape[1] // 2 * 2
        pairs = _min_plus(steps[:, 0:even:2], steps[:, 1:even:2])
        steps = torch.cat([pairs, steps[:, even:]], dim=1)
    middle = costs.shape[-1] // 2
    return steps[:, 0, middle, middle]
