"""Acoustic models: from a waveform to frames of hidden states and logits."""
