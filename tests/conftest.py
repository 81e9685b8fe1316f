"""What all tests share."""

import os
from pathlib import Path

import pytest
import torch

# Small tensors: threads cost more than they bring, the more so on few cores.
torch.set_num_threads(1)
# For the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

DIGITS = (
    Path(__file__).parents[2] / "shared" / "data" / "digits" / "LibriSpeech"
)


@pytest.fixture
def digits():
    """Real speech in LibriSpeech layout, where it lies beside the project."""
    if not DIGITS.is_dir():
        pytest.skip(f"{DIGITS} is not there")
    return DIGITS
