"""TutorNet for SpeechBrain: teach a small speech recogniser of any shape.

The packages stand on each other in this order: ``networks`` (models from
waveform to frames), ``distillation`` (teachers, targets, losses), ``brains``
(one training stage each). ``corpora`` and ``reporting`` stand beside them, and
the recipe in ``recipes/LibriSpeech/TutorNet`` puts them together.
"""

__version__ = "0.2.0"
