"""What all tests share."""

import os
import sys

import hypothesis
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
