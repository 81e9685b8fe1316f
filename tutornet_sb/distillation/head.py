"""A first head for a student whose encoder comes from RKD."""

import torch

from tutornet_sb.distillation.alignment import align
from tutornet_sb.networks.acoustic_model import frame_mask
from tutornet_sb.util.errors import InputError


@torch.no_grad()
def _collect(student, teacher, batches, frames, delay):
    """Student's hidden states and the teacher's posteriors, frame by frame."""
    hidden, posteriors, found = [], [], 0
    device = next(student.parameters()).device
    for batch in batches:
        encoding = student(*batch.to(device).sig)
        targets = align(
            teacher.targets(batch),
            encoding.lengths,
            student.frame_period,
            delay,
            encoding.hidden.shape[1],
        )
        mask = frame_mask(encoding.lengths, encoding.hidden.shape[1])
        if targets.posterior_mask is not None:
            mask = mask & targets.posterior_mask
        hidden.append(encoding.hidden[mask].float())
        posteriors.append(targets.posteriors[mask])
        found += len(hidden[-1])
        if found >= frames:
            break
    return torch.cat(hidden)[:frames], torch.cat(posteriors)[:frames]


def fit_head(
    student,
    teacher,
    batches,
    frames=100_000,
    delay=0.0,
    steps=100,
    penalty=1e-4,
):
    """Fit a student's head to a teacher's posteriors, the encoder fixed.

    Representation-level distillation leaves the encoder trained and the head
    random: the next stage would first degrade the encoder. With hidden states
    ``h_t`` and posteriors ``p_t`` of frames whose posteriors are a target, this
    minimises

        - mean_t sum_k p_t(k) log softmax(head(h_t))_k + penalty * ||W||^2

    which is convex for a linear head with weights ``W``, by L-BFGS, from the
    head's present weights. Few frames are spikes: without the penalty the head
    is overconfident on unseen ones. It is an addition of ours to TutorNet
    (arXiv 2008.00671).

    The teacher needs a CTC head and the student's symbols, the batches ``sig``,
    and ``targets`` if they come from a store, in an order that any part of is a
    fair sample. At most `frames` are used, with the teacher's moved back by
    `delay` seconds, for at most `steps` iterations; biases have no penalty.
    Returns the first term at the end (nats a frame).
    """
    training = student.training
    student.eval()
    try:
        hidden, posteriors = _collect(student, teacher, batches, frames, delay)
    finally:
        student.train(training)
    if not (hidden.isfinite().all() and posteriors.isfinite().all()):
        raise InputError(
            "the head cannot be fitted: hidden states of the student or "
            "posteriors of the teacher are not finite"
        )
    optimizer = torch.optim.LBFGS(
        student.head.parameters(),
        max_iter=steps,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    weights = [p for p in student.head.parameters() if p.dim() > 1]

    def fit():
        logits = student.head(hidden)
        return torch.nn.functional.cross_entropy(logits, posteriors)

    def closure():
        optimizer.zero_grad()
        loss = fit() + penalty * sum(w.square().sum() for w in weights)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()
    with torch.no_grad():
        return fit().item()
