"""Which number format the convolutions run in: measured once for each device, never assumed."""

import contextlib
import functools
import os
import time

import torch
from torch import nn

from satlib.errors import SatlibError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@functools.cache
def fastest_dtype(device_type: str) -> torch.dtype:
    """bfloat16 where forward and backward passes on this device are really faster with it, else float32.

    A small convolution stack is timed in both formats (under 0.3 s, once a process). The environment
    variable SATLIB_PRECISION (`float32` or `bfloat16`) overrides the measurement.

    Raises SatlibError for another value of SATLIB_PRECISION.
    """
    if wanted := os.environ.get("SATLIB_PRECISION"):
        if wanted not in PRECISIONS:
            raise SatlibError(f"SATLIB_PRECISION={wanted!r}: expected one of {', '.join(PRECISIONS)}, or unset")
        return PRECISIONS[wanted]
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return torch.float32
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    net = net.requires_grad_(False).to(memory_format=torch.channels_last)
    x = torch.zeros(32, 16, 32, 32).to(memory_format=torch.channels_last).requires_grad_()

    def seconds(dtype: torch.dtype) -> float:
        best = float("inf")
        for _ in range(4):
            start = time.perf_counter()
            with torch.enable_grad(), torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
                torch.autograd.grad(net(x).float().sum(), x)
            best = min(best, time.perf_counter() - start)
        return best

    # The margin keeps a noisy measurement from changing the format between two runs on one machine.
    return torch.bfloat16 if seconds(torch.bfloat16) < 0.8 * seconds(torch.float32) else torch.float32


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Context in which matrix products and convolutions on `device` run in its fastest format."""
    dtype = fastest_dtype(device.type)
    return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)
