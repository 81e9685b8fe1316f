"""New utterances of old ones, for a teacher to label."""

import torch


def splice(wavs, wav_lens, crossings=2):
    """Cut the utterances of a batch and join the pieces anew.

    Each utterance is cut somewhere and goes on with the end of another; this so
    many times. No transcript fits any longer, but a teacher can say what is
    heard. So the student learns from strings of words that nobody said, and not
    the few of the corpus by heart. That distillation may take any input and
    gains by it is shown in "Knowledge distillation: a good teacher is patient
    and consistent" (arXiv 2106.05237).

    Cuts are drawn from torch's generator, between 15 and 85 % of an utterance.
    Pieces are moved, never repeated or lost.

    Arguments
    ---------
    wavs : torch.Tensor
        Padded waveforms, ``(batch, samples)``.
    wav_lens : torch.Tensor
        Lengths relative to the longest, ``(batch,)``.
    crossings : int
        How often the batch is cut.

    Returns
    -------
    wavs : torch.Tensor
        Waveforms as above; the longest may be longer than before.
    wav_lens : torch.Tensor
        Their relative lengths.

    Example
    -------
    >>> wavs = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 0.0]])
    >>> new, lengths = splice(wavs, torch.tensor([1.0, 0.75]))
    >>> sorted(new[new > 0].tolist())
    [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    """
    samples = (wav_lens * wavs.shape[1]).round().long().tolist()
    waves = [wav[:length] for wav, length in zip(wavs, samples, strict=True)]
    for _ in range(crossings):
        places = (0.15 + 0.7 * torch.rand(len(waves))).tolist()
        cuts = [
            round(place * len(wave))
            for place, wave in zip(places, waves, strict=True)
        ]
        others = torch.randperm(len(waves)).tolist()
        waves = [
            torch.cat([wave[:cut], waves[other][cuts[other] :]])
            for wave, cut, other in zip(waves, cuts, others, strict=True)
        ]
    lengths = torch.tensor([len(wave) for wave in waves], device=wavs.device)
    joined = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    return joined, lengths / lengths.max()
