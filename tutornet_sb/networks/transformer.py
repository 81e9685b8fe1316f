"""Conformer, Branchformer and Transformer, from SpeechBrain's lobes."""

import math

from tutornet_sb.networks.lobes import LobeEncoder


class TransformerEncoder(LobeEncoder):
    """Conformer, Branchformer or Transformer behind strided convolutions.

    The layers are ``transformer.encoder.layers.0``, ``.1``, ... The centre of
    frame 0 is that of input frame 0.

    SpeechBrain's relative positions (``RelPosMHAXL``) are the same before and
    after a frame (its issue 3070), so a plain Transformer cannot tell left from
    right with them: use absolute ones (``regularMHA``) there. Conformer and
    Branchformer can by their convolutions.

    Arguments
    ---------
    front_end : speechbrain.lobes.models.convolution.ConvolutionFrontEnd
        Convolutions; the product of their strides is the encoder's.
    transformer : callable
        ``TransformerASR`` with all its arguments but ``input_size``, which
        follows from the front end, ``tgt_vocab`` and ``num_decoder_layers``.
    """

    def __init__(self, front_end, transformer):
        super().__init__()
        self.front_end = front_end
        # Before the hooks, on a dummy batch.
        _, _, bands, channels = front_end.get_output_shape()
        self.stride = 1
        for block in front_end.values():
            self._guard(block, self.stride)
            self.stride *= block.get_filter_properties().stride
        self.transformer = transformer(
            tgt_vocab=None, input_size=bands * channels, num_decoder_layers=0
        )
        # A table of a decoder that does not exist, in every checkpoint.
        self.transformer.positional_encoding_decoder = None
        self._guard(self.transformer, self.stride)
        self.output_size = self.transformer.encoder.norm.norm.weight.numel()
        # Only the absolute positions are a table.
        table = getattr(self.transformer, "positional_encoding", None)
        self.max_length = getattr(table, "max_len", math.inf)

    def encode(self, x):
        """Apply front end and layers."""
        x = self.front_end(x)
        frames = x.shape[1]
        if frames > self.max_length:
            raise ValueError(
                f"an utterance of {frames} frames is longer than the table of "
                f"positions ({self.max_length}): raise max_length of the "
                "transformer, or leave out long utterances"
            )
        # At least one frame: attention to nothing is not a number.
        lengths = self._valid(self.stride).clamp(min=1)
        return self.transformer.encode(x, lengths / frames)
