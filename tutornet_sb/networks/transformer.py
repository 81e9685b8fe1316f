"""Conformer, Branchformer and Transformer, from SpeechBrain's lobes."""

import math

from tutornet_sb.networks.lobes import LobeEncoder


class TransformerEncoder(LobeEncoder):
    """Conformer, Branchformer or Transformer behind strided convolutions.

    The layers are ``transformer.encoder.layers.0``, ``.1``, ... The centre of
    frame 0 is that of input frame 0.

    SpeechBrain's relative positions (``RelPosMHAXL``) are the same before and
    after a frame (its issue 3070), so that in a plain Transformer nothing tells
    left from right: take absolute ones (``regularMHA``) there. In Conformer and
    Branchformer the convolutions tell.

    Arguments
    ---------
    front_end : speechbrain.lobes.models.convolution.ConvolutionFrontEnd
        Convolutions; the product of their strides is the encoder's.
    transformer : callable
        ``TransformerASR`` with all its arguments but ``input_size``, which
        follows from the front end, ``tgt_vocab`` and ``num_decoder_layers``.

    Raises
    ------
    ValueError
        If a convolution has another padding than "same"; in ``forward``, if an
        utterance is longer than the table of absolute positions.

    Example
    -------
    >>> from functools import partial
    >>> import torch
    >>> from speechbrain.lobes.models.convolution import ConvolutionFrontEnd
    >>> from speechbrain.lobes.models.transformer.TransformerASR import (
    ...     TransformerASR,
    ... )
    >>> front_end = ConvolutionFrontEnd(
    ...     [None, None, 80],
    ...     num_blocks=2,
    ...     num_layers_per_block=1,
    ...     out_channels=[8, 4],
    ...     kernel_sizes=[3, 3],
    ...     strides=[2, 2],
    ...     residuals=[False, False],
    ... )
    >>> transformer = partial(
    ...     TransformerASR,
    ...     d_model=16,
    ...     nhead=2,
    ...     num_encoder_layers=1,
    ...     d_ffn=32,
    ...     encoder_module="conformer",
    ...     attention_type="RelPosMHAXL",
    ...     normalize_before=True,
    ...     causal=False,
    ... )
    >>> encoder = TransformerEncoder(front_end, transformer)
    >>> hidden, lengths = encoder(torch.randn(2, 9, 80), torch.tensor([9, 4]))
    >>> tuple(hidden.shape), lengths.tolist(), encoder.stride
    ((2, 3, 16), [3, 1], 4)
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
        # A table for the decoder, which there is not, in every checkpoint.
        self.transformer.positional_encoding_decoder = None
        self._guard(self.transformer, self.stride)
        self.output_size = self.transformer.encoder.norm.norm.weight.numel()
        # Only the absolute positions are a table.
        table = getattr(self.transformer, "positional_encoding", None)
        self.max_length = getattr(table, "max_len", math.inf)

    def encode(self, x):
        """Apply front end and layers.

        Arguments
        ---------
        x : torch.Tensor
            Features, ``(batch, frames, dim)``.

        Returns
        -------
        torch.Tensor
            ``(batch, frames / stride, output_size)``.
        """
        x = self.front_end(x)
        frames = x.shape[1]
        if frames > self.max_length:
            raise ValueError(
                f"an utterance of {frames} frames is longer than the table of "
                f"positions ({self.max_length}): raise max_length of the "
                "transformer, or leave out long utterances"
            )
        # Of an utterance without a valid frame the first is kept: attention to
        # nothing is not a number.
        lengths = self._valid(self.stride).clamp(min=1)
        return self.transformer.encode(x, lengths / frames)
