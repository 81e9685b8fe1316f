"""Knowledge distillation between speech recognisers of any architecture.

Each package stands on those before it: ``util``, ``corpora``, ``networks``
(modules from waveform to frames), ``distillation`` (losses and what they
compare), ``teachers``, ``targets`` (what a teacher computed, kept on disk),
``inference``, ``training`` (one Brain a stage), ``experiments`` (runs side by
side), ``publishing``, and the ``tutornet`` command.
"""

__version__ = "0.3.0"
