"""How a device runs a step: in which number format (measured, never assumed), and on CUDA recorded as a graph.

A PGD iteration is some two hundred small kernels, a step of shared adversarial training two thousand. Launched one by
one from Python, they leave a fast GPU waiting; as a graph they are one launch. A graph owns its inputs. That of an
attack owns the attacked network's weights, too, so that one recording serves all networks of a kind (`prepared`); that
of a training step changes the trained network's where they are (`recorded`). Where recording fails, or there is no
CUDA, both run as they are: same results, more waiting.
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
import threading
import time
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, backends, nn

from satlib.errors import SatlibError

PAIRS = 9  # timed in each format
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COMPILING, SAVED = 33.0, 0.2  # seconds it takes, and the share of a step that it saves: the paper's network, an H100
KEPT = 32  # recordings of attacks, the least recently used goes first; an ensemble's search has about a dozen shapes
Outputs = tuple[Tensor, ...]
Recorder = Callable[..., tuple[Callable[[], None], Outputs]]  # of a function, and on CUDA of a pool of memory


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
    if device_type != "cpu" or not backends.mkldnn.is_available():
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


# Whose products and convolutions PyTorch may round, each by its own switch; the older switches set several of these.
_ROUNDING = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
_ROUNDING += (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn)
_exact_users: list[tuple] = []  # the switches as the first user found them, once for each user
_exact_lock = threading.Lock()


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """In this context matrix products and convolutions stay in float32, whatever is faster: on CUDA not in TF32, and
    not in what `torch.set_float32_matmul_precision` allows. PyTorch's switches are the whole process's: they go back
    when the last of several threads leaves."""
    token = _forced.set(torch.float32)
    with _exact_lock:
        _exact_users.append(_exact_users[0] if _exact_users else _switches())
        precision, tf32, _ = _exact_users[0]
        _switch(precision and "highest", tf32 and False, ["ieee"] * len(_ROUNDING))
    try:
        yield
    finally:
        _forced.reset(token)
        with _exact_lock:
            before = _exact_users.pop()
            if not _exact_users:
                _switch(*before)


def _switches() -> tuple[str | None, bool | None, list[str]]:
    """The older switches, None for those that PyTorch does not tell beside newer ones, and the newer ones."""
    older: list[Any] = []
    for read in (torch.get_float32_matmul_precision, lambda: backends.cudnn.allow_tf32):
        try:
            older.append(read())
        except RuntimeError:
            older.append(None)
    return older[0], older[1], [each.fp32_precision for each in _ROUNDING]


def _switch(precision: str | None, tf32: bool | None, newer: Sequence[str]) -> None:
    if precision is not None:
        torch.set_float32_matmul_precision(precision)
    if tf32 is not None:
        backends.cudnn.allow_tf32 = tf32
    for each, value in zip(_ROUNDING, newer, strict=True):
        each.fp32_precision = value


def autocast(device: torch.device, *, cache: bool = False) -> contextlib.AbstractContextManager:
    """Context in which matrix products and convolutions on `device` run in its fastest format, or as `exact` says.

    cache: keep the weights in that format until it ends, for several passes; of no use in a single one.
    """
    dtype = _dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32, cache_enabled=cache)


def _dtype(device: torch.device) -> torch.dtype:
    return _forced.get() or fastest_dtype(device.type)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device; on its way to CUDA nobody waits for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def on_cuda(function: Callable[[], Outputs], pool: Any = None) -> tuple[Callable[[], None], Outputs]:
    """Record `function` as a CUDA graph, after three calls that let libraries choose their algorithms.

    In the last of them it must not wait for the device: a capture that fails leaves some versions of PyTorch in
    disorder, so that what would make it fail has to show before. pool: that of graphs of which one runs at a time.
    """
    here, stream, before = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
    stream.wait_stream(here)
    try:
        with torch.cuda.stream(stream):
            for mode in (before, before, "error"):
                torch.cuda.set_sync_debug_mode(mode)
                function()
    finally:
        torch.cuda.set_sync_debug_mode(before)
        here.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may load data
            outputs = function()
    finally:
        torch.cuda.set_stream(here)
    return graph.replay, outputs


COMPILER = "inductor"  # of `torch.compile`
RECORDERS: dict[str, Recorder] = {"cuda": on_cuda}  # by type of device; elsewhere nothing is recorded
_recordings: OrderedDict[tuple, "SharedRecording | None"] = OrderedDict()  # None: recording failed before
_lock = threading.Lock()  # of that table, and of what is being recorded
_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("inside", default=False)  # what is `unrecorded`


def recorder(device: torch.device) -> Recorder | None:
    """What records on that device; None where nothing does, or SATLIB_GRAPHS=0 switches it off (environment)."""
    return None if os.environ.get("SATLIB_GRAPHS") == "0" or _inside.get() else RECORDERS.get(device.type)


def _memory(device: torch.device) -> dict[str, Any]:
    """On CUDA a pool of memory, as an option of `on_cuda`, for recordings of which one runs at a time: all of them
    together take what the largest takes."""
    return {"pool": torch.cuda.graph_pool_handle()} if device.type == "cuda" else {}


_memory_of_attacks = functools.cache(_memory)


_compiling: contextvars.ContextVar[bool] = contextvars.ContextVar("compiling", default=False)


@contextlib.contextmanager
def _set(flag: contextvars.ContextVar[bool], value: bool = True) -> Iterator[None]:
    token = flag.set(value)
    try:
        yield
    finally:
        flag.reset(token)


def unrecorded() -> contextlib.AbstractContextManager[None]:
    """In this context nothing is recorded, and nothing recorded is used."""
    return _set(_inside)


def compiling() -> contextlib.AbstractContextManager[None]:
    """In this context the forward passes of our own networks, and with them the backward ones, are compiled."""
    return _set(_compiling)


def interpreted() -> contextlib.AbstractContextManager[None]:
    """In this context nothing is compiled."""
    return _set(_compiling, False)


def forward_of(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network's forward pass; within `compiling` by the compiler, which makes one kernel of a convolution's bias,
    its ReLU and what is added, and one of a ReLU's mask and what follows it in the backward pass."""
    return functools.partial(_compiled(type(network)), network) if _compiling.get() else network


@functools.cache
def _compiled(kind: type[nn.Module]) -> Callable[..., Tensor]:
    """Of all networks of that class: those that differ in their weights alone are compiled once. The compiler keeps its
    kernels on disk, below TORCHINDUCTOR_CACHE_DIR (environment), where later processes find them."""
    forward = torch.compile(kind.forward, backend=COMPILER, fullgraph=True, dynamic=False)
    return torch._dynamo.config.patch(recompile_limit=64)(forward)  # for each kind of network, mini-batch and mode


_to_save: dict[tuple, float] = {}  # seconds that compiled steps of these shapes would have saved this process


def pays(shapes: tuple, calls: int, seconds: float) -> bool:
    """Whether compiling a step of so many seconds wins back what it takes: within so many calls, or within these and
    those of all steps of the same shapes before, whose like will come again and find the kernels.

    The environment variable SATLIB_COMPILE overrides it: 1 is always, 0 never; SatlibError for another value.
    """
    wanted = os.environ.get("SATLIB_COMPILE") or ""
    if wanted not in ("", "0", "1"):
        raise SatlibError(f"SATLIB_COMPILE={wanted!r}: expected 1, 0, or unset")
    _to_save[shapes] = _to_save.get(shapes, 0.0) + calls * seconds * SAVED
    return wanted == "1" or (not wanted and _to_save[shapes] > COMPILING)


def recorded(
    function: Callable[..., Outputs], *, changes: Callable[[], Sequence[Tensor]], calls: int = 0
) -> Callable[..., Outputs]:
    """A function of tensors, by a recording for every shape of theirs, where their device has a recorder.

    Whatever else it reads has to stay in its memory, and what it changes there is among the tensors that `changes`
    gives: to record it, it is called a few times, and these go back to what they were. Where they have moved, it is
    recorded anew. A shape that comes once, such as an epoch's last mini-batch, is not worth it. calls: how many will
    come; where that pays (`pays`), what is recorded is compiled.
    """
    recordings: dict[tuple, Recording | None] = {}
    seen: set[tuple] = set()
    kept: list[Tensor] = []
    places: list[int] = []
    memory: dict[str, Any] = {}

    def run(*tensors: Tensor) -> Outputs:
        device, shapes = tensors[0].device, tuple(map(_shape, tensors))
        record = recorder(device)
        if record is None:
            return function(*tensors)
        if places != [tensor.data_ptr() for tensor in kept]:
            recordings.clear()
        if shapes not in recordings and (shapes in seen or not seen):
            memory.update(memory or _memory(device))
            record = functools.partial(record, **memory)
            recordings[shapes] = None  # should the next lines fail, they are not tried again
            kept[:] = changes()
            places[:] = [tensor.data_ptr() for tensor in kept]
            before = []
            try:
                before += [tensor.detach().clone() for tensor in kept]
                with _lock:
                    recordings[shapes] = plain = Recording(function, tensors, record)
                    if not seen and pays(shapes, calls, taken := plain.seconds()):
                        fused = _recorded_compiled(function, tensors, record)
                        recordings[shapes] = fused if fused and fused.seconds() < taken else plain
            except SatlibError:
                raise
            except Exception as error:
                _warn(error, "step")
            finally:
                with torch.no_grad():
                    for tensor, value in zip(kept, before, strict=False):
                        tensor.copy_(value)
        seen.add(shapes)
        if shapes not in recordings:
            with unrecorded():
                return function(*tensors)
        found = recordings[shapes]
        return function(*tensors) if found is None else found(*tensors)

    return run


def _recorded_compiled(
    function: Callable[..., Outputs], tensors: Sequence[Tensor], record: Recorder
) -> "Recording | None":
    """None, with a warning, where the compiler fails: it needs one for C++, and on CUDA Triton."""

    def compiled(*given: Tensor) -> Outputs:
        with compiling():
            return function(*given)

    try:
        return Recording(compiled, tensors, record)
    except Exception as error:
        warnings.warn(f"recorded, but not compiled: {_reason(error)}", stacklevel=4)
        return None


def _shape(tensor: Tensor) -> tuple:
    """What a recording wants of its tensors, but for their values."""
    return tensor.shape, tensor.is_contiguous(), tensor.dtype, tensor.device


def _warn(error: Exception, what: str) -> None:
    """Say that something is not recorded: an operation that graphs do not know, too little memory, ..."""
    warnings.warn(f"not recorded as a graph, each {what} is launched by itself: {_reason(error)}", stacklevel=3)


def _reason(error: BaseException) -> str:
    """The first line of the first error of a chain: a capture that breaks off says only that it did."""
    while error.__context__:
        error = error.__context__
    return (str(error).splitlines() or [""])[0]


def prepared(
    function: Callable[..., Outputs], net: nn.Module, *tensors: Tensor, **options: Any
) -> Callable[..., Outputs]:
    """`lambda *tensors: function(net, *tensors, **options)`, by a recording where the tensors' device has a recorder.

    The tensors are examples: those of the calls have the same shapes, and are not changed in place between them. The
    network's are as they are at the first call; one recording serves all networks that differ in the values of their
    tensors alone, in turns and in threads. A plain function is not recorded, for nobody knows what it computes with.
    SATLIB_GRAPHS=0 switches recording off (environment).
    """
    plain = functools.partial(function, net, **options)
    device = tensors[0].device
    record = recorder(device)
    if record is None or not isinstance(net, nn.Module):
        return plain
    shapes = tuple(map(_shape, tensors))
    try:
        blueprint = Blueprint(net, device)
        with _exact_lock:
            rounding = (_dtype(device), _forced.get(), str(_switches()))
        key = (function, blueprint.content, shapes, rounding, *options.items())
        with _lock:
            if key not in _recordings:
                _recordings[key] = None  # should the next line fail, it is not tried again
                record = functools.partial(record, **_memory_of_attacks(device))
                _recordings[key] = SharedRecording(
                    functools.partial(function, **options), net, tensors, record, blueprint
                )
            _recordings.move_to_end(key)
            if len(_recordings) > KEPT:
                _recordings.popitem(last=False)
            found = _recordings.get(key)
    except Exception as error:  # or a network beyond pickle
        _warn(error, "iteration")
        return plain
    return plain if found is None else Step(found, blueprint.tensors)


class Blueprint(pickle.Pickler):
    """What makes a network compute what it does, but for the values of its tensors on `device`.

    `content` (bytes) is equal for two networks only where they have the same attributes, hooks among them, and the same
    classes and functions. These are known by identity, `known` keeps them; of functions the defaults and what they
    close over count, too, and of classes that are neither PyTorch's nor ours the attributes. What functions read from
    their modules does not. `tensors` are the network's parameters, buffers and others. Raises what pickle raises for
    attributes that it does not know.

    around: the blueprint of the network whose surroundings this is, where copies of a network share all tensors.
    """

    def __init__(self, net: Any, device: torch.device, *, around: "Blueprint | None" = None) -> None:
        file = io.BytesIO()
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.device, self.around = device, around
        self.tensors: list[Tensor] = []
        self.known: dict[int, Any] = around.known if around else {}
        self.dump(net)
        self.content = file.getvalue()

    def reducer_override(self, value: Any) -> Any:
        """Called by pickle for all but plain values: what is to stand for it, as a call that nobody will make."""
        if isinstance(value, nn.Module):  # without the hooks that it has none of, which take most of the time
            attributes = vars(value).items()
            return _known, (type(value),), {k: v for k, v in attributes if type(v) is not OrderedDict or v}
        if isinstance(value, Tensor):
            layout = str((type(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad))
            # A graph holds the value of what is on another device, a number as CUDA sees it.
            held = None if value.device == self.device else value.tolist()
            if self.around:
                self.known[id(value)] = value
                return _known, (layout, held, id(value))
            self.tensors.append(value)
            return _known, (layout, held)
        if isinstance(value, types.MethodType):
            return _known, (value.__func__, value.__self__)
        if isinstance(value, IDENTIFIED) and value is not _known:
            first = id(value) not in self.known
            self.known[id(value)] = value
            return _known, (id(value), self._surroundings(value) if first else b"")
        return NotImplemented

    def _surroundings(self, value: Any) -> bytes:
        """What a function or a class computes with besides its code."""
        parts: Any = ()
        if isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
            parts = (value.__code__, value.__defaults__, value.__kwdefaults__, cells)
        elif isinstance(value, type):
            foreign = [each for each in value.__mro__ if each.__module__.partition(".")[0] not in NOT_FOREIGN]
            parts = [(name, data) for each in foreign for name, data in vars(each).items() if _is_data(name, data)]
        return Blueprint(parts, self.device, around=self).content if parts else b""


IDENTIFIED = (type, types.FunctionType, types.BuiltinFunctionType, types.CodeType, types.ModuleType)
NOT_FOREIGN = {"builtins", "collections", "torch", "satlib"}  # whose classes do not change


def _is_data(name: str, value: Any) -> bool:
    """Whether an attribute of a class is neither a method nor Python's own."""
    return not (name.startswith(("__", "_abc_")) or callable(value) or hasattr(value, "__get__"))


def _known(*_: Any) -> None:
    """Stands in a blueprint for what is not pickled."""


class Recording:
    """A function of tensors, recorded with buffers of its own for them. One thread at a time uses it."""

    def __init__(self, function: Callable[..., Outputs], tensors: Sequence[Tensor], record: Recorder) -> None:
        self.buffers = [tensor.detach().clone() for tensor in tensors]
        self.given: list[Tensor | None] = [None] * len(tensors)

        def call() -> Outputs:
            with unrecorded():
                return function(*self.buffers)

        self.device = device = tensors[0].device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.replay, self.outputs = record(call)

    def seconds(self, replays: int = 3) -> float:
        """What a replay takes."""
        done = functools.partial(torch.cuda.synchronize, self.device) if self.device.type == "cuda" else lambda: None
        done()
        start = time.perf_counter()
        for _ in range(replays):
            self.replay()
        done()
        return (time.perf_counter() - start) / replays

    def __call__(self, *tensors: Tensor) -> Outputs:
        """The outputs for `tensors`, as new tensors. What is as in the last call is not copied."""
        with torch.no_grad():
            for buffer, tensor, last in zip(self.buffers, tensors, self.given, strict=True):
                if tensor is not last:
                    buffer.copy_(tensor, non_blocking=True)
        self.given = list(tensors)
        self.replay()
        return tuple(output.clone() for output in self.outputs)


class SharedRecording(Recording):
    """A function of (net, *tensors), recorded with a copy of the network, whose weights are those of its last user.

    All of them share their memory, so that only one runs at a time, to where its outputs have been copied.
    """

    lock = threading.RLock()

    def __init__(
        self,
        function: Callable[..., Outputs],
        net: nn.Module,
        tensors: Sequence[Tensor],
        record: Recorder,
        blueprint: Blueprint,
    ) -> None:
        self.net = net = copy.deepcopy(net)  # kept with what it makes when it is first called
        self.known = blueprint.known  # kept, so that nothing else gets one of these identities
        self.weights = Blueprint(net, tensors[0].device).tensors
        self.user: Callable[[], Step | None] = lambda: None
        super().__init__(functools.partial(function, net), tensors, record)

    def run(self, user: "Step", tensors: Sequence[Tensor]) -> Outputs:
        """The outputs for a user's weights and `tensors`."""
        with self.lock:
            if self.user() is not user:
                if self.weights:
                    with torch.no_grad():
                        torch._foreach_copy_(self.weights, user.weights)
                self.user, self.given = weakref.ref(user), [None] * len(self.buffers)
            return self(*tensors)


class Step:
    """A recording as one network uses it, whose weights these are: others may use it in between, or at once."""

    def __init__(self, recording: SharedRecording, weights: list[Tensor]) -> None:
        self.recording, self.weights = recording, weights

    def __call__(self, *tensors: Tensor) -> Outputs:
        return self.recording.run(self, tensors)
