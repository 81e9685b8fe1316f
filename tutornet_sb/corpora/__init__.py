"""Corpora: LibriSpeech manifests and a small synthetic corpus."""
