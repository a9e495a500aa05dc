"""How a network is called, whoever wrote it: pixels in, logits out, and nothing of the network changed."""

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from satlib.device import autocast
from satlib.errors import SatlibError

Network: TypeAlias = Callable[[Tensor], Any]  # a module, or any function from pixels to logits
OUTPUTS = (
    "logits",
    "out",
)  # what the logits are called in networks that return several things by name


def logits_of(model: Network, images: Tensor) -> Tensor:
    """The logits of a model for images (n, C, H, W) in 0..255, in the fastest format of their device.

    Our own networks get them in their memory format. Any other gets a contiguous copy, which it may overwrite, in its
    weights' format, if that is not float32; of what it returns, `logits_in` takes the logits.
    """
    if layout := getattr(model, "memory_format", None):
        with autocast(images.device):
            return model(images.contiguous(memory_format=layout))
    weights = weights_dtype(model)
    wanted = getattr(model, "pixel_dtype", weights)
    with autocast(images.device) if weights is torch.float32 else contextlib.nullcontext():
        return logits_in(model(images.to(wanted).clone(memory_format=torch.contiguous_format)))


def weights_dtype(model: Network) -> torch.dtype:
    """Format of the first weights of a network; float32 where it has none, or is a plain function."""
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    return next(
        (weight.dtype for weight in weights if weight.is_floating_point()),
        torch.float32,
    )


def logits_in(returned: Any, output: str | int | None = None) -> Tensor:
    """The logits in what a network returns: the tensor, `output` of several, or the one that is called as in OUTPUTS.

    Raises SatlibError where there are none, or it is unclear which of several are meant.
    """
    if output is None and isinstance(returned, Tensor):
        return returned
    named = returned if isinstance(returned, Mapping) else getattr(returned, "_asdict", dict)()
    known = OUTPUTS if output is None else (output,)
    chosen = next((named[name] for name in known if name in named), None)
    if isinstance(returned, tuple | list) and (isinstance(output, int) or len(returned) == 1):
        with contextlib.suppress(IndexError):
            chosen = returned[output if isinstance(output, int) else 0]
    if isinstance(chosen, Tensor):
        return chosen
    several = (
        [repr(name) for name in named] or [str(index) for index in range(len(returned))]
        if (isinstance(returned, Mapping | tuple | list))
        else []
    )
    what = f"a {type(returned).__name__}" + (f" of {', '.join(several)}" if several else "")
    given = "" if output is None else f", and output={output!r} is no tensor in it"
    raise SatlibError(f"the network returns {what}{given}: expected logits; choose by UnitInputs(network, output=...)")


@dataclass
class _Loan:
    """What a network was before it was lent to attacks, and to how many it is lent now."""

    modes: list[tuple[nn.Module, bool]]
    flags: list[tuple[nn.Parameter, bool]]
    buffers: list[tuple[nn.Module, str, Tensor, Tensor]]  # where, its name, itself, and a copy
    users: int = 0


_loans: weakref.WeakKeyDictionary[nn.Module, _Loan] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextlib.contextmanager
def attackable(model: Network) -> Iterator[Any]:
    """The model as attacks see it: eval mode, weights frozen, batch norm folded where the model can do so.

    A model with a `folded()` method yields that copy; any other is used as it is, and `evaluated`.
    """
    if hasattr(model, "folded"):
        yield model.folded()
    elif isinstance(model, nn.Module) and any(weight.is_inference() for weight in model.parameters()):
        yield copy.deepcopy(model).eval().requires_grad_(False)  # made in inference mode, its weights know no gradients
    else:
        with evaluated(model):
            yield model


@contextlib.contextmanager
def evaluated(model: Network) -> Iterator[None]:
    """In this context a module is in eval mode and its weights are frozen, in however many threads it is used.

    Its modes, `requires_grad` and buffers are then as before. A plain function is left alone.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    _lend(model)
    try:
        yield
    finally:
        _take_back(model)


def _lend(model: nn.Module) -> None:
    with _lock:
        if model not in _loans:
            modules = list(model.modules())
            held = [(module, *named) for module in modules for named in module.named_buffers(recurse=False)]
            _loans[model] = _Loan(
                modes=[(module, module.training) for module in modules],
                flags=[(weight, weight.requires_grad) for weight in model.parameters() if not weight.is_inference()],
                buffers=[(module, name, buffer, buffer.clone()) for module, name, buffer in held],
            )
            with contextlib.suppress(NotImplementedError):  # an exported graph has one mode only
                model.eval()
            for weight, _ in _loans[model].flags:
                weight.requires_grad_(False)
        _loans[model].users += 1


@torch.no_grad()
def _take_back(model: nn.Module) -> None:
    with _lock:
        loan = _loans[model]
        loan.users -= 1
        if loan.users:
            return
        for module, training in loan.modes:
            module.training = training
        for weight, flag in loan.flags:
            weight.requires_grad_(flag)
        for module, name, buffer, value in loan.buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)
        del _loans[model]
