"""On CUDA, the attack's iteration as a graph: recorded once for fixed shapes, then launched whole.

A PGD iteration is some two hundred small kernels. Launched one by one from Python, they leave a fast GPU waiting; as a
graph they are one launch. The graph owns its inputs, the attacked network's weights among them, so that one recording
serves every mini-batch of a training whose weights change. Where recording fails, or there is no CUDA, the iteration
runs as it is: same results, more waiting.
"""

import copy
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

KEPT = 8  # recordings, the least recently used goes first; each holds its own activations
Outputs = tuple[Tensor, ...]
Recorder = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]

_recordings: OrderedDict[tuple, "Recording | None"] = OrderedDict()  # None: recording failed before


class Recording:
    """A function of (net, *tensors), recorded with buffers of its own for the weights and the tensors."""

    def __init__(self, function: Callable[..., Outputs], net: nn.Module, tensors: Sequence[Tensor], record: Recorder):
        self.net = copy.deepcopy(net)
        self.weights = list(self.net.state_dict().values())
        self.buffers = [tensor.detach().clone() for tensor in tensors]
        self.given: list[Tensor | None] = [None] * len(tensors)
        self.replay, self.outputs = record(lambda: function(self.net, *self.buffers))

    @torch.no_grad()
    def take(self, net: nn.Module) -> None:
        """Go on with the weights of `net`, and with tensors that were not seen before."""
        torch._foreach_copy_(self.weights, list(net.state_dict().values()))
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


def prepared(
    function: Callable[..., Outputs], net: nn.Module, *tensors: Tensor, record: Recorder | None = None, **options: Any
) -> Callable[..., Outputs]:
    """`lambda *tensors: function(net, *tensors, **options)`, by a recording where one can be had.

    The tensors are examples: those of the calls have the same shapes, and are not changed in place between the calls.
    The weights of `net` are as they are now. record: how to record; by default as a CUDA graph for tensors on a CUDA
    device, and elsewhere not at all. The environment variable SATLIB_GRAPHS=0 switches recording off.
    """
    plain = partial(function, net, **options)
    if record is None and tensors[0].is_cuda and os.environ.get("SATLIB_GRAPHS") != "0":
        record = on_cuda
    if record is None:
        return plain
    shapes = tuple((tensor.shape, tensor.is_contiguous(), tensor.dtype, tensor.device) for tensor in tensors)
    key = (function, _shape_of(net), shapes, *options.items())
    if key not in _recordings:
        try:
            _recordings[key] = Recording(partial(function, **options), net, tensors, record)
        except RuntimeError as error:  # an operation that graphs do not know, too little memory
            _recordings[key] = None
            reason = (str(error).splitlines() or [""])[0]
            warnings.warn(f"not recorded as a graph, each iteration is launched by itself: {reason}", stacklevel=2)
        if len(_recordings) > KEPT:
            _recordings.popitem(last=False)
    _recordings.move_to_end(key)
    recording = _recordings[key]
    if recording is None:
        return plain
    recording.take(net)
    return recording


def _shape_of(net: nn.Module) -> tuple:
    """What must be equal for two networks to be the same but for their weights."""
    tensors = ((name, value.shape, value.dtype, value.is_contiguous()) for name, value in net.state_dict().items())
    return str(net), *tensors
