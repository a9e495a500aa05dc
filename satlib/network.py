"""How a network is called, whoever wrote it: pixels in, logits out, and nothing of the network changed."""

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn

from satlib.device import autocast, forward_of
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
    if isinstance(model, OwnNetwork):
        with autocast(images.device):
            return forward_of(model)(images.contiguous(memory_format=model.memory_format))
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

    A tensor alone is taken whatever `output` says, for a network may return several things in training mode only.
    Raises SatlibError where there are none, or it is unclear which of several are meant.
    """
    if isinstance(returned, Tensor):
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


class OwnNetwork(nn.Module):
    """A network of this package: it wants images in its memory format, never writes into them, and returns logits."""

    memory_format = torch.channels_last

    def folded(self) -> Self:
        """A frozen evaluation copy with batch norm folded into the convolutions: the model that is attacked."""
        raise NotImplementedError


@dataclass
class _Loan:
    """How a module or a weight is to be as it was before it was lent to attacks, and to how many it is lent now."""

    restore: Callable[[], None]
    users: int = 0


_loans: dict[int, _Loan] = {}  # by the id of what is lent, which its loan keeps alive
_lock = threading.RLock()


@contextlib.contextmanager
def attackable(model: Network) -> Iterator[Any]:
    """The model as attacks see it: eval mode, weights frozen, batch norm folded where the model is one of our own.

    Any other is used as it is, and `evaluated`.
    """
    if isinstance(model, OwnNetwork):
        yield model.folded()
    elif isinstance(model, nn.Module) and any(weight.is_inference() for weight in model.parameters()):
        yield copy.deepcopy(model).eval().requires_grad_(False)  # made in inference mode, its weights know no gradients
    else:
        with evaluated(model):
            yield model


@contextlib.contextmanager
def evaluated(model: Network) -> Iterator[None]:
    """In this context a module is in eval mode and its weights are frozen, in however many threads it is used.

    Its modes, `requires_grad` and buffers are then as before; those of a part that others use, too, after the last of
    them. A plain function is left alone.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    lent = _lend(model)
    try:
        yield
    finally:
        _take_back(lent)


def _lend(model: nn.Module) -> list[int]:
    """Set a network to eval mode and freeze it. Returns what was lent, for `_take_back`."""
    with _lock:
        modules, weights = list(model.modules()), [weight for weight in model.parameters() if not weight.is_inference()]
        fresh = {id(module): _Loan(_module_as_it_is(module)) for module in modules if id(module) not in _loans}
        for weight in weights:
            if id(weight) not in _loans:
                fresh[id(weight)] = _Loan(functools.partial(weight.requires_grad_, weight.requires_grad))
        _loans.update(fresh)
        lent = [id(each) for each in (*modules, *weights)]
        for each in lent:
            _loans[each].users += 1
        try:
            if fresh:
                _set_eval(model)
            for weight in weights:
                weight.requires_grad_(False)
        except BaseException:
            _take_back(lent)
            raise
    return lent


def _set_eval(model: nn.Module) -> None:
    try:
        model.eval()
    except NotImplementedError:  # an exported graph has one mode only: the other parts have two
        for module in model.modules():
            module.training = False


def _take_back(lent: list[int]) -> None:
    with _lock, contextlib.ExitStack() as restoring:  # which goes on where one of them fails
        for each in lent:
            _loans[each].users -= 1
            if not _loans[each].users:
                restoring.callback(_loans.pop(each).restore)


def _module_as_it_is(module: nn.Module) -> Callable[[], None]:
    """What gives a module, but not its parts, the mode and the buffers back that it has now."""
    training, held = module.training, dict(module._buffers.items())
    temporary = set(getattr(module, "_non_persistent_buffers_set", ()))
    values = {name: buffer.clone() for name, buffer in held.items() if buffer is not None}

    @torch.no_grad()
    def restore() -> None:
        module.training = training
        for name, value in values.items():
            if not torch.equal(held[name], value):
                held[name].copy_(value)
        now = dict(module._buffers.items())
        if [*now] == [*held] and all(now[name] is held[name] for name in held):
            return
        if isinstance(module, torch.jit.ScriptModule):  # its buffers are none of Python's, and have fixed names
            for name in held:
                setattr(module, name, held[name])
            return
        for name in held:
            vars(module).pop(name, None)
        module._buffers.clear()
        module._buffers.update(held)
        module._non_persistent_buffers_set = temporary

    return restore
