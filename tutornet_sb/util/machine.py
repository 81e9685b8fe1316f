"""The machine that figures were measured on."""

import os
import platform
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")


def describe_machine(device="cpu"):
    """Describe what decides speed: ``cpu``, ``cores``, ``threads``, ``gpu``.

    Example
    -------
    >>> sorted(describe_machine())
    ['cores', 'cpu', 'threads']
    """
    machine = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    device = torch.device(device)
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def _cpu_model():
    text = CPUINFO.read_text("utf-8") if CPUINFO.is_file() else ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        # Only x86 processors have it.
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
