"""What attacks are asked, checked before anything is computed: one line that names the bad value and its mend."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from satlib.data.imageset import IGNORE
from satlib.device import autocast
from satlib.errors import SatlibError
from satlib.updates import UPDATES

LOSSES = ("cross-entropy", "margin")
SCHEDULES = ("geometric", "cosine")
TRIED = 4  # images that a model is tried on


def check_eps(eps: float) -> None:
    """Raises SatlibError where eps is not a number from 0 to 255."""
    if not 0 <= eps <= 255:
        raise SatlibError(f"eps={eps!r}: expected a number from 0 to 255 (pixel units)")


def check_annealing(beta: float, gamma: float) -> None:
    """Raises SatlibError where beta or gamma of `annealed_step_sizes` is not a positive number."""
    for name, value in (("beta", beta), ("gamma", gamma)):
        if not (math.isfinite(value) and value > 0):
            raise SatlibError(f"{name}={value!r}: expected a positive number")


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


def check_range(images: Tensor) -> None:
    """Raises SatlibError where pixels are not finite or lie outside of 0 to 255: normalised inputs, most often."""
    if images.dtype.is_floating_point:  # which streamed images, too, can tell
        low, high = (value.item() for value in images.aminmax())
        if not 0 <= low <= high <= 255:
            raise SatlibError(
                f"images from {low:g} to {high:g}: expected pixel units, 0 to 255; normalise inside the model"
            )


def check_sharedness(sharedness: int, count: int) -> None:
    """Raises SatlibError where heaps of so many images cannot be made of `count` of them."""
    if not 1 <= sharedness <= count:
        raise SatlibError(f"sharedness={sharedness!r}: expected 1 to the number of images ({count})")


def check_threshold(loss_threshold: float | None, targeted: bool) -> None:
    """Raises SatlibError where the loss threshold is no positive number, or is given to a targeted attack."""
    if loss_threshold is not None and targeted:
        raise SatlibError(f"loss_threshold={loss_threshold!r} in a targeted attack: it knows no cap; pass None")
    if loss_threshold is not None and not loss_threshold > 0:
        raise SatlibError(f"loss_threshold={loss_threshold!r}: expected a positive number, or None for no cap")


def check_universal(
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = 1,
    batch_size: int = 1,
    beta: float = 1.0,
    gamma: float = 1.0,
    targeted: bool = False,
    loss_threshold: float | None = None,
    label_smoothing: float = 0.0,
    snapshots: int = 1,
    score_images: int = 1,
    micro_batch: int | None = None,
    update: str = "sign",
    schedule: str = "geometric",
    loss: str = "cross-entropy",
    dominant: bool = False,
    **other: Any,
) -> None:
    """Raises SatlibError for what `universal_pgd` cannot do; other: what it is not asked about here."""
    check_pair(images, labels)
    check_threshold(loss_threshold, targeted)
    check_annealing(beta, gamma)
    if steps < 1:
        raise SatlibError(f"steps={steps!r}: expected at least 1")
    if not 1 <= batch_size <= len(images):
        raise SatlibError(f"batch_size={batch_size!r}: expected 1 to the number of images ({len(images)})")
    if micro_batch is not None and micro_batch < 1:
        raise SatlibError(f"micro_batch={micro_batch!r}: expected at least 1, or None to choose by their size")
    for name, value, known in (("update", update, UPDATES), ("schedule", schedule, SCHEDULES), ("loss", loss, LOSSES)):
        if value not in known:
            raise SatlibError(f"{name}={value!r}: expected one of {', '.join(known)}")
    if loss == "margin" and label_smoothing:
        raise SatlibError(f"label_smoothing={label_smoothing!r} with loss='margin', which has no soft targets; pass 0")
    if dominant and (targeted or labels.ndim > 1):
        raise SatlibError("dominant=True: only for untargeted attacks on classifiers, which have a class to be sent to")
    if snapshots < 1 or score_images < 1:
        raise SatlibError(f"snapshots={snapshots!r}, score_images={score_images!r}: expected at least 1 each")


def per_heap(name: str, value: Any, heaps: int, device: torch.device, *, top: float) -> Tensor:
    """A number, or one for each heap, as a (heaps or 1, 1, 1, 1) tensor on the device; checked on the host."""
    tensor = torch.as_tensor(value, dtype=torch.float32).reshape(-1)
    if len(tensor) not in (1, heaps):
        raise SatlibError(f"{name} has {len(tensor)} values for {heaps} heaps: give one number, or one for each heap")
    if not bool((right := (tensor >= 0) & (tensor <= top)).all()):
        raise SatlibError(f"{name}={tensor[~right][0].item():g}: expected numbers from 0 to {top:g} (pixel units)")
    return tensor.to(device).view(-1, 1, 1, 1)


def per_step(value: Any, steps: int, heaps: int, device: torch.device) -> Sequence[Tensor]:
    """Step sizes as `steps` tensors of shape (heaps or 1, 1, 1, 1)."""
    if steps < 1:
        raise SatlibError(f"steps={steps!r}: expected at least 1")
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
    check_range(images)
    few = images[:TRIED] if images.dtype.is_floating_point else images[:TRIED].float()
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
    if len(known) and not 0 <= int(known.min()) <= int(known.max()) < logits.shape[1]:
        raise SatlibError(
            f"labels from {int(known.min())} to {int(known.max())}: expected 0 to {logits.shape[1] - 1},"
            " the classes of the model"
        )
