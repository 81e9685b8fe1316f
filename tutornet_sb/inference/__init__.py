"""From audio to text: transcription, word times, error rates, latency."""
