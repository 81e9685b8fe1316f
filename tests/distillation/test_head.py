"""The head that a student gets between RKD and the next stage."""

import pytest
import torch
from speechbrain.dataio.batch import PaddedBatch

from tutornet_sb.distillation.alignment import align
from tutornet_sb.distillation.head import fit_head
from tutornet_sb.networks.acoustic_model import (
    AcousticModel,
    LogMelFeatures,
    frame_mask,
)
from tutornet_sb.networks.recurrent import RecurrentEncoder
from tutornet_sb.teachers.teacher import Teacher

SYMBOLS = 5


def make_model(seed, stride=2):
    torch.manual_seed(seed)
    encoder = RecurrentEncoder(8, 8, 12, 1, stride=stride, dropout=0.5)
    head = torch.nn.Linear(encoder.output_size, SYMBOLS)
    # Posteriors that are sure of something.
    head.weight.data *= 10
    return AcousticModel(LogMelFeatures(n_mels=8), encoder, head)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    waves = [torch.randn(n, generator=generator) for n in (9600, 4000, 7000)]
    items = [{"sig": wave} for wave in waves]
    return [PaddedBatch(items[:2]), PaddedBatch(items[2:])]


def weights(module):
    return {key: x.clone() for key, x in module.state_dict().items()}


def plain(student, teacher, batches):
    """Cross-entropy of each utterance alone, averaged over all frames."""
    total, frames = 0.0, 0
    for batch in batches:
        wavs, wav_lens = batch.sig
        for wav, part in zip(wavs, wav_lens, strict=True):
            wav = wav[: round(part.item() * len(wav))].unsqueeze(0)
            one = torch.ones(1)
            with torch.no_grad():
                logits = student(wav, one).logits[0].double()
                p = teacher(wav, one).posteriors[0].double()
            total -= (p * logits.log_softmax(-1)).sum().item()
            frames += len(p)
    return total / frames


def test_a_twin_of_the_teacher_finds_the_teachers_head(batches):
    model, student = make_model(0), make_model(0)
    torch.nn.init.zeros_(student.head.weight)
    teacher = Teacher(model, ())
    fit_head(student, teacher, batches, steps=2000, penalty=0.0)
    for batch in batches:
        wavs, wav_lens = batch.sig
        encoding = student.eval()(wavs, wav_lens)
        mask = frame_mask(encoding.lengths, encoding.logits.shape[1])
        p = encoding.logits.softmax(-1)[mask]
        theirs = teacher(wavs, wav_lens).posteriors[mask]
        torch.testing.assert_close(p, theirs, atol=0.02, rtol=0)


@pytest.mark.parametrize("penalty", [0.0, 1e-3])
def test_the_loss_is_that_of_a_plain_loop_and_at_its_least(batches, penalty):
    student, teacher = make_model(0), Teacher(make_model(1), ())
    weight = student.head.weight

    def penalized():
        norm = sum(w**2 for row in weight.tolist() for w in row)
        return plain(student, teacher, batches) + penalty * norm

    student.eval()
    before = penalized()
    loss = fit_head(student, teacher, batches, steps=500, penalty=penalty)
    assert loss == pytest.approx(plain(student, teacher, batches), rel=1e-4)
    least = penalized()
    assert least < before
    # Convex: no step away from it goes down.
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        noise = torch.randn(weight.shape, generator=generator)
        for scale in (0.05, 0.5):
            with torch.no_grad():
                weight += scale * noise
                assert penalized() > least - 1e-4
                weight -= scale * noise


@pytest.mark.parametrize("training", [True, False])
def test_the_rest_of_the_student_and_the_teacher_stay(batches, training):
    student, teacher = make_model(0).train(training), Teacher(make_model(1), ())
    own, theirs = weights(student), weights(teacher)
    fit_head(student, teacher, batches)
    for key, value in weights(student).items():
        assert key.startswith("head.") or torch.equal(value, own[key]), key
    assert not torch.equal(student.head.weight, own["head.weight"])
    for key, value in weights(teacher).items():
        assert torch.equal(value, theirs[key]), key
    assert student.training == training
    assert all(p.grad is None for p in student.parameters())


def test_no_more_frames_are_taken_than_asked_for(batches):
    student, teacher = make_model(0), Teacher(make_model(1), ())
    twin = make_model(0)
    # The first utterance of the first batch has 31 frames.
    fit_head(student, teacher, batches, frames=31, steps=5)
    first = [PaddedBatch([{"sig": batches[0].sig.data[0]}])]
    fit_head(twin, teacher, first, steps=5)
    torch.testing.assert_close(
        student.head.weight, twin.head.weight, rtol=1e-2, atol=1e-2
    )


def test_frames_of_another_rate_and_a_delay(batches):
    """The student of 40 ms meets the teacher of 20 ms two frames later."""
    teacher = Teacher(make_model(1), ())
    student = make_model(0, stride=4)
    fits = []
    for delay in (0.0, 0.04):
        found = fit_head(student, teacher, batches, delay=delay)
        total, frames, left_out = 0.0, 0, 0
        for batch in batches:
            encoding = student.eval()(*batch.sig)
            targets = align(
                teacher(*batch.sig), encoding.lengths, 0.04, delay=delay
            )
            mask = frame_mask(encoding.lengths, encoding.logits.shape[1])
            valid = int(mask.sum())
            mask &= targets.posterior_mask
            left_out += valid - int(mask.sum())
            log_q = encoding.logits.log_softmax(-1)[mask].detach()
            total -= (targets.posteriors[mask] * log_q).sum().item()
            frames += int(mask.sum())
        assert left_out > 0
        assert found == pytest.approx(total / frames, rel=1e-4)
        fits.append(found)
    assert 0 < fits[0] != fits[1] > 0


def test_hidden_states_that_are_not_finite_are_an_error(batches):
    student, teacher = make_model(0), Teacher(make_model(1), ())
    with torch.no_grad():
        student.encoder.conv.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        fit_head(student, teacher, batches)
