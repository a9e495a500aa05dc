"""How a device runs a step: in which number format (measured, never assumed), and on CUDA recorded as a graph.

A PGD iteration is some two hundred small kernels. Launched one by one from Python, they leave a fast GPU waiting; as a
graph they are one launch. The graph owns its inputs, the attacked network's weights among them, so that one recording
serves every mini-batch of a training whose weights change. Where recording fails, or there is no CUDA, the iteration
runs as it is: same results, more waiting.
"""

import contextlib
import contextvars
import copy
import functools
import io
import os
import pickle
import platform
import re
import statistics
import time
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from satlib.errors import SatlibError

PAIRS = 9  # timed in each format
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KEPT = 8  # recordings, the least recently used goes first; each holds its own activations
Outputs = tuple[Tensor, ...]
Recorder = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]


@functools.cache
def fastest_dtype(device_type: str) -> torch.dtype:
    """bfloat16 where forward and backward passes on this device are really faster with it, else float32.

    A small convolution stack is timed in both formats (under 0.3 s, once a process). The environment variable
    SATLIB_PRECISION (`float32` or `bfloat16`) overrides the measurement; SatlibError for another value.
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
    net.requires_grad_(False).to(memory_format=torch.channels_last)
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


def device_name() -> str:
    """The GPU's name once this process has used it, else the processor's."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        if found := re.search("^model name.*?:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()


def used_dtype() -> torch.dtype | None:
    """The format that this process runs convolutions in, None where it has not run any."""
    device = "cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu"
    return fastest_dtype(device) if fastest_dtype.cache_info().currsize else None


_forced: contextvars.ContextVar[torch.dtype | None] = contextvars.ContextVar("forced", default=None)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """In this context matrix products and convolutions stay in float32 (on CUDA not in TF32), whatever is faster."""
    token, rounded = _forced.set(torch.float32), torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # the matrix products' own switch is off by default
    try:
        yield
    finally:
        _forced.reset(token)
        torch.backends.cudnn.allow_tf32 = rounded


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Context in which matrix products and convolutions on `device` run in its fastest format, or as `exact` says."""
    dtype = _dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)


def _dtype(device: torch.device) -> torch.dtype:
    return _forced.get() or fastest_dtype(device.type)


def on_cuda(function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """Record `function` as a CUDA graph, after three calls that let libraries choose their algorithms."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph.replay, outputs


RECORDERS: dict[str, Recorder] = {"cuda": on_cuda}  # by type of device; elsewhere nothing is recorded
_recordings: OrderedDict[tuple, "Recording | None"] = OrderedDict()  # None: recording failed before


def prepared(
    function: Callable[..., Outputs], net: nn.Module, *tensors: Tensor, **options: Any
) -> Callable[..., Outputs]:
    """`lambda *tensors: function(net, *tensors, **options)`, by a recording where the tensors' device has a recorder.

    The tensors are examples: those of the calls have the same shapes, and are not changed in place between them. The
    network's are as they are now; one recording serves all networks that differ in the values of their tensors alone.
    A plain function is not recorded, for nobody knows what it computes with. SATLIB_GRAPHS=0 switches
    recording off (environment).
    """
    plain = functools.partial(function, net, **options)
    device = tensors[0].device
    record = RECORDERS.get(device.type)
    if record is None or not isinstance(net, nn.Module) or os.environ.get("SATLIB_GRAPHS") == "0":
        return plain
    shapes = tuple((tensor.shape, tensor.is_contiguous(), tensor.dtype, tensor.device) for tensor in tensors)
    try:
        blueprint = Blueprint(net, device)
        key = (function, blueprint.content, shapes, _dtype(device), _forced.get(), *options.items())
        if key not in _recordings:
            _recordings[key] = None  # should the next line fail, it is not tried again
            _recordings[key] = Recording(functools.partial(function, **options), net, tensors, record)
    except Exception as error:  # an operation that graphs do not know, too little memory, a network beyond pickle
        reason = (str(error).splitlines() or [""])[0]
        warnings.warn(f"not recorded as a graph, each iteration is launched by itself: {reason}", stacklevel=2)
        return plain
    _recordings.move_to_end(key)
    if len(_recordings) > KEPT:
        _recordings.popitem(last=False)
    if (recording := _recordings[key]) is not None:
        recording.take(blueprint.tensors)
    return recording or plain


class Blueprint(pickle.Pickler):
    """What makes a network compute what it does, but for the values of its tensors on `device`.

    `content` (bytes) is equal for two networks only where they have the same attributes, hooks among them, and the same
    classes and functions, which are known by identity; `tensors` are its parameters, buffers and others.
    Raises what pickle raises for attributes that it does not know.
    """

    def __init__(self, net: nn.Module, device: torch.device) -> None:
        file = io.BytesIO()
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.device = device
        self.tensors: list[Tensor] = []
        self.dump(net)
        self.content = file.getvalue()

    def reducer_override(self, value: Any) -> Any:
        """Called by pickle for all but plain values: what is to stand for it, as a call that nobody will make."""
        if isinstance(value, nn.Module):  # without the hooks that it has none of, which take most of the time
            attributes = vars(value).items()
            return _known, (type(value),), {k: v for k, v in attributes if type(v) is not OrderedDict or v}
        if isinstance(value, Tensor):
            self.tensors.append(value)
            layout = str((type(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad))
            # A graph holds the value of what is on another device, a number as CUDA sees it.
            return _known, (layout, None if value.device == self.device else value.tolist())
        if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType) and value is not _known:
            return _known, (id(value),)
        return NotImplemented


def _known(*_: Any) -> None:
    """Stands in a blueprint for what is not pickled."""


class Recording:
    """A function of (net, *tensors), recorded with buffers of its own for the network's tensors and for the others."""

    def __init__(self, function: Callable[..., Outputs], net: nn.Module, tensors: Sequence[Tensor], record: Recorder):
        self.net = copy.deepcopy(net)
        self.weights = Blueprint(self.net, tensors[0].device).tensors
        self.buffers = [tensor.detach().clone() for tensor in tensors]
        self.given: list[Tensor | None] = [None] * len(tensors)
        self.replay, self.outputs = record(lambda: function(self.net, *self.buffers))

    @torch.no_grad()
    def take(self, weights: list[Tensor]) -> None:
        """Go on with the tensors of another such network, and with other tensors that were not seen before."""
        torch._foreach_copy_(self.weights, weights)
        self.given = [None] * len(self.buffers)

    @torch.no_grad()
    def __call__(self, *tensors: Tensor) -> Outputs:
        """The outputs for `tensors`, as new tensors. What is the same object as in the last call is not copied."""
        for buffer, tensor, last in zip(self.buffers, tensors, self.given, strict=True):
            if tensor is not last:
                buffer.copy_(tensor)
        self.given = list(tensors)
        self.replay()
        return tuple(output.clone() for output in self.outputs)
