"""What all tests share."""

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from speechbrain.utils.importutils import LazyModule

# Small tensors: threads cost more than they bring, the more so on few cores.
torch.set_num_threads(1)
# For the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

# Hypothesis asks every module for its file, and these would be loaded.
for module in list(sys.modules.values()):
    if isinstance(module, LazyModule):
        module.__file__ = None
# The same examples each time, and few enough for every run of the tests.
hypothesis.settings.register_profile(
    "few", derandomize=True, deadline=None, max_examples=50, database=None
)
hypothesis.settings.load_profile("few")

DIGITS = (
    Path(__file__).parents[2] / "shared" / "data" / "digits" / "LibriSpeech"
)


@pytest.fixture
def digits():
    """Real speech in LibriSpeech layout, where it lies beside the project."""
    if not DIGITS.is_dir():
        pytest.skip(f"{DIGITS} is not there")
    return DIGITS
