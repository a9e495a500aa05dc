"""Which number format the convolutions run in: measured once for each device, never assumed."""

import contextlib
import contextvars
import functools
import os
import statistics
import time
from collections.abc import Iterator

import torch
from torch import nn

from satlib.errors import SatlibError

PAIRS = 9  # timed in each format
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
    x = torch.zeros(16, 16, 32, 32).to(memory_format=torch.channels_last).requires_grad_()

    def seconds(dtype: torch.dtype) -> float:
        start = time.thread_time()
        with torch.enable_grad(), torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            torch.autograd.grad(net(x).float().sum(), x)
        return time.thread_time() - start

    # The processor time of one thread, taking turns: what else runs on the machine hardly changes the ratio. The
    # margin keeps what noise is left from changing the format, and with it all results, between two processes.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratios = [seconds(torch.bfloat16) / seconds(torch.float32) for _ in range(1 + PAIRS)][1:]
    finally:
        torch.set_num_threads(threads)
    return torch.bfloat16 if statistics.median(ratios) < 0.8 else torch.float32


def used_dtype() -> torch.dtype | None:
    """The format that this process runs convolutions in, None where it has not run any."""
    device = "cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu"
    return fastest_dtype(device) if fastest_dtype.cache_info().currsize else None


_forced: contextvars.ContextVar[torch.dtype | None] = contextvars.ContextVar("forced", default=None)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """In this context matrix products and convolutions stay in float32, whatever is faster."""
    token = _forced.set(torch.float32)
    try:
        yield
    finally:
        _forced.reset(token)


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Context in which matrix products and convolutions on `device` run in its fastest format, or as `exact` says."""
    dtype = _forced.get() or fastest_dtype(device.type)
    return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)
