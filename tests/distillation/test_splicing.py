"""Utterances that are cut and joined anew."""

import pytest
import torch

from tutornet_sb.distillation.splicing import splice

LENGTHS = (400, 230, 310, 90)


@pytest.fixture
def batch():
    """Every sample a number of its own: 1000 * utterance + place + 1."""
    wavs = torch.zeros(len(LENGTHS), max(LENGTHS))
    for row, length in enumerate(LENGTHS):
        wavs[row, :length] = 1000 * row + torch.arange(length) + 1
    return wavs, torch.tensor(LENGTHS) / max(LENGTHS)


def cut_out(wavs, wav_lens):
    lengths = (wav_lens * wavs.shape[1]).round().int().tolist()
    return [
        wav[:n].int().tolist() for wav, n in zip(wavs, lengths, strict=True)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("crossings", [0, 1, 2, 3])
def test_pieces_are_moved_and_none_is_lost(batch, crossings, seed):
    torch.manual_seed(seed)
    wavs, wav_lens = splice(*batch, crossings=crossings)
    waves = cut_out(wavs, wav_lens)
    before = sorted(sum(cut_out(*batch), []))
    assert sorted(sum(waves, [])) == before
    # Nothing but padding stands behind an utterance.
    assert (wavs != 0).sum() == sum(LENGTHS)
    assert wav_lens.max() == 1
    # Each crossing makes at most one seam in each utterance and in each that
    # it is joined with.
    seams = sum(
        later != earlier + 1
        for wave in waves
        for earlier, later in zip(wave, wave[1:], strict=False)
    )
    assert seams <= crossings * len(LENGTHS)
    if crossings == 0:
        assert torch.equal(wavs, batch[0])


def test_utterances_are_really_mixed(batch):
    torch.manual_seed(0)
    mixed = 0
    for _ in range(20):
        waves = cut_out(*splice(*batch))
        mixed += sum(len({x // 1000 for x in wave}) > 1 for wave in waves)
    assert mixed > 20 * len(LENGTHS) / 2


def test_an_utterance_alone_stays_as_it_is(batch):
    wavs, wav_lens = batch[0][:1], torch.ones(1)
    new, lengths = splice(wavs, wav_lens)
    assert torch.equal(new, wavs) and torch.equal(lengths, wav_lens)


def test_the_same_seed_splices_alike(batch):
    torch.manual_seed(3)
    first, _ = splice(*batch)
    torch.manual_seed(3)
    again, _ = splice(*batch)
    other, _ = splice(*batch)
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
