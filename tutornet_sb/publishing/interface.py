"""SpeechBrain's interface to an exported model, copied into the export."""

import functools

import torch
from speechbrain.inference.ASR import EncoderASR


class CustomInterface(EncoderASR):
    """An ``EncoderASR`` around an ``AcousticModel``, made by ``foreign_class``.

    ``EncoderASR`` gives its decoder the relative lengths of the waveforms,
    which in a padded batch may round to one frame more or less than an
    utterance has. Here they are the valid frames of the model.
    """

    def encode_batch(self, wavs, wav_lens):
        """Log-probabilities ``(batch, frames, symbols)``."""
        return self._encode(wavs, wav_lens)[0]

    def transcribe_batch(self, wavs, wav_lens):
        """Transcripts, and what the decoder returned: symbols or hypotheses."""
        with torch.no_grad():
            hypotheses = self.decoding_function(*self._encode(wavs, wav_lens))
        if isinstance(self.hparams.decoding_function, functools.partial):
            texts = self.tokenizer.decode(hypotheses)
        else:
            texts = [hyps[0].text for hyps in hypotheses]
        # Word boundaries in a row are one boundary.
        return [" ".join(text.split()) for text in texts], hypotheses

    def _encode(self, wavs, wav_lens):
        wavs, wav_lens = wavs.to(self.device), wav_lens.to(self.device)
        encoding = self.mods.encoder(wavs.float(), wav_lens)
        log_probs = encoding.logits.float().log_softmax(dim=-1)
        return log_probs, encoding.lengths / log_probs.shape[1]
