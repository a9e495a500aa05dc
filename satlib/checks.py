"""What attacks are asked, checked before anything is computed: one line that names the bad value and its mend."""

import math
from collections.abc import Callable, Collection, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from satlib.data.imageset import IGNORE
from satlib.device import autocast
from satlib.errors import SatlibError

TRIED = 4  # images that a model is tried on


def check(expected: str, right: Callable[[Any], bool], **values: Any) -> None:
    """Raises SatlibError where one of the values is not right: its name, the value, and what was expected."""
    for name, value in values.items():
        if not right(value):
            raise SatlibError(f"{name}={value!r}: expected {expected}")


def check_eps(eps: float) -> None:
    """Raises SatlibError where eps is not a number from 0 to 255."""
    check("a number from 0 to 255 (pixel units)", lambda value: 0 <= value <= 255, eps=eps)


def check_whole(*, least: int = 1, **values: Any) -> None:
    """Raises SatlibError where one of the values is not a whole number of at least `least`."""
    expected = f"a whole number of at least {least}"
    check(expected, lambda value: isinstance(value, Integral) and int(value) >= least, **values)


def check_known(known: Collection[str], **values: str) -> None:
    """Raises SatlibError where one of the values is not among the known ones."""
    check(f"one of {', '.join(known)}", lambda value: value in known, **values)


def check_annealing(steps: int, beta: float, gamma: float) -> None:
    """Raises SatlibError for what `annealed_step_sizes` cannot work with."""
    check_whole(steps=steps)
    check("a positive number", lambda value: 0 < value < math.inf, beta=beta, gamma=gamma)


def check_pair(images: Tensor, labels: Tensor) -> None:
    """Raises SatlibError where images and labels (or targets) do not fit each other."""
    if images.ndim != 4 or not len(images):
        raise SatlibError(f"images of shape {tuple(images.shape)}: expected (d, C, H, W) with d at least 1")
    types = (torch.int64, torch.uint8) if labels.ndim == 3 else (torch.int64,)  # an ImageSet keeps pixels' as bytes
    if len(labels) != len(images) or labels.ndim not in (1, 3) or labels.dtype not in types:
        raise SatlibError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype}: expected int64 of shape"
            f" ({len(images)},), or ({len(images)}, H, W) for segmentation"
        )


def check_sharedness(sharedness: int, count: int) -> None:
    """Raises SatlibError where heaps of so many images cannot be made of `count` of them."""
    check(f"1 to the number of images ({count})", lambda value: 1 <= value <= count, sharedness=sharedness)


def check_threshold(loss_threshold: float | None, targeted: bool) -> None:
    """Raises SatlibError where the loss threshold is no positive number, or is given to a targeted attack."""
    if loss_threshold is None:
        return
    if targeted:
        raise SatlibError(f"loss_threshold={loss_threshold!r} in a targeted attack: it knows no cap; pass None")
    check("a positive number, or None for no cap", lambda value: value > 0, loss_threshold=loss_threshold)


def per_heap(eps: float | Sequence[float] | Tensor, heaps: int | None, device: torch.device) -> Tensor:
    """eps for each heap, (heaps or 1, 1, 1, 1) on the device, checked on the host; heaps None: as many as eps has."""
    tensor = torch.as_tensor(eps, dtype=torch.float32).reshape(-1)
    if not len(tensor):
        raise SatlibError(f"eps={eps!r}: expected a number, or at least one")
    if heaps is not None and len(tensor) not in (1, heaps):
        raise SatlibError(f"eps has {len(tensor)} values for {heaps} heaps: give one number, or one for each heap")
    if not bool((right := (tensor >= 0) & (tensor <= 255)).all()):
        raise SatlibError(f"eps={tensor[~right][0].item():g}: expected numbers from 0 to 255 (pixel units)")
    return tensor.to(device).view(-1, 1, 1, 1)


def per_step(value: float | Sequence[float] | Tensor, steps: int, heaps: int, device: torch.device) -> Sequence[Tensor]:
    """Step sizes as `steps` tensors of shape (heaps or 1, 1, 1, 1)."""
    check_whole(steps=steps)
    tensor = torch.as_tensor(value, dtype=torch.float32)
    if not bool((right := tensor.isfinite() & (tensor >= 0)).all()):
        wrong = tensor[~right].flatten()[0].item()
        raise SatlibError(f"step_size={wrong:g}: expected finite numbers of at least 0 (pixel units)")
    if tensor.ndim == 0:
        tensor = tensor.expand(steps)
    if tensor.shape not in ((steps,), (steps, heaps)):
        raise SatlibError(
            f"step_size of shape {tuple(tensor.shape)}: expected a number, ({steps},) or ({steps}, {heaps})"
        )
    return tensor.reshape(steps, -1, 1, 1, 1).to(device).unbind()


@torch.enable_grad()
def check_model(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Try the model on the first images, as attacks will use it.

    Raises SatlibError where images are out of range, and where the model fails, or returns what is no logits of the
    classes that the labels name: another shape, NaN or infinite values, probabilities.
    """
    few = images[:TRIED]
    if not images.dtype.is_floating_point:  # bytes are in range, also where they stay on disk
        few = few.float()
    elif not 0 <= (seen := images.aminmax()).min <= seen.max <= 255:  # normalised inputs, most often
        raise SatlibError(
            f"images from {seen.min:g} to {seen.max:g}: expected pixel units, 0 to 255; normalise inside the model"
        )
    few = few.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    try:
        with autocast(images.device):
            logits = model(few)
    except RuntimeError as error:
        raise SatlibError(
            f"the model fails on {str(few.dtype).removeprefix('torch.')} images of shape {tuple(images.shape[1:])}: "
            f"{str(error).splitlines()[0]}; give it weights of that type (model.float()) and images of its size"
        ) from error
    expected = f"({min(TRIED, len(images))}, classes{''.join(f', {n}' for n in labels.shape[1:])})"
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.ndim != labels.ndim + 1 or logits.shape[2:] != labels.shape[1:]:
        raise SatlibError(f"the model returns {shape} for a few images: expected logits of shape {expected}")
    logits = logits.detach()
    if not bool(logits.isfinite().all()):
        raise SatlibError("the model returns NaN or infinite logits: was its training finite?")
    shares = logits.float()
    if shares.min() >= 0 and (shares.amin(1) > 0).any() and ((shares.sum(1) - 1).abs() < 1e-3).all():
        raise SatlibError("the model returns probabilities: expected logits; leave out its softmax")
    known = labels[labels != IGNORE] if labels.ndim > 1 else labels
    if len(known) and not 0 <= known.min() <= known.max() < logits.shape[1]:
        named = f"labels from {known.min()} to {known.max()}"
        raise SatlibError(f"{named}: expected 0 to {logits.shape[1] - 1}, the classes of the model")
