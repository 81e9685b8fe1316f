"""Acoustic models: from waveform to frames of hidden states and logits."""
