"""LibriSpeech manifests, tables of recordings, MiniLibri, tokenizers."""
