"""One SpeechBrain Brain for each kind of training stage."""
