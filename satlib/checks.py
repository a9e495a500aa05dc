"""What the kernels are asked, checked before anything is computed: one line that names the bad value and its mend.

Where another type has a plain meaning (a list, a NumPy array, float64 pixels), it is taken.
"""

import contextlib
import contextvars
import functools
import hashlib
import inspect
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import combinations
from numbers import Integral
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from satlib.data.imageset import IGNORE
from satlib.errors import SatlibError
from satlib.network import logits_of

P = ParamSpec("P")
R = TypeVar("R")
TRIED = 4  # images that a model is tried on
DIGESTED = 256  # images at a time
SLACK = 0.01  # how far a pixel may lie outside of 0 to 255: a float's way to another unit and back
UNSIGNED = {torch.uint16, torch.uint32, torch.uint64}  # which PyTorch hardly computes with
NORMALISED = 5  # by mean and standard deviation, images have no larger values


def check(expected: str, right: Callable[[Any], Any], **values: Any) -> None:
    """Raises SatlibError where one of the values is not right: its name, the value, and what was expected."""
    for name, value in values.items():
        try:
            fine = bool(right(value))
        except (TypeError, ValueError, RuntimeError):  # it is not even of a type that can be compared
            fine = False
        if not fine:
            raise SatlibError(f"{name}={told(value)}: expected {expected}")


def told(value: Any) -> str:
    """What a message says of a value, in a few words on one line."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    line = " ".join(repr(value).split())
    return line if len(line) <= 80 else f"{line[:60]}..."


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def check_whole(*, least: int = 1, **values: Any) -> None:
    """Raises SatlibError where one of the values is not a whole number of at least `least`."""
    check(f"a whole number of at least {least}", lambda value: _is_whole(value, least), **values)


def check_known(known: Collection[str], **values: str) -> None:
    """Raises SatlibError where one of the values is not among the known ones."""
    check(f"one of {', '.join(known)}", lambda value: isinstance(value, str) and value in known, **values)


WHOLE = ("a whole number of at least 1", lambda value: _is_whole(value, 1))
POSITIVE = ("a positive number", lambda value: 0 < value < math.inf)
FLAG = ("True or False", lambda value: isinstance(value, bool | np.bool_))
RULES: dict[str, tuple[str, Callable[[Any], Any]]] = {  # a name means the same wherever it occurs
    **dict.fromkeys(["steps", "batch_size", "snapshots", "score_images", "iterations"], WHOLE),
    **dict.fromkeys(["restarts", "larger", "passes", "inner", "scan", "aims", "candidates"], WHOLE),
    **dict.fromkeys(["beta", "gamma", "relative_step_size", "effort"], POSITIVE),
    **dict.fromkeys(["targeted", "keep_best", "warm_start", "dominant", "straight_through", "nesterov"], FLAG),
    "scenes": ("a whole number of at least 0", lambda value: _is_whole(value, 0)),
    "classes": ("a whole number of at least 2", lambda value: _is_whole(value, 2)),
    "micro_batch": ("None, or a whole number of at least 1", lambda value: value is None or _is_whole(value, 1)),
    "loss_threshold": ("a positive number, or None for no cap", lambda value: value is None or 0 < value < math.inf),
    "label_smoothing": ("a number in [0, 1)", lambda value: 0 <= value < 1),
    "delta": ("a share strictly between 0 and 1", lambda value: 0 < value < 1),
    "fooling_rate": ("a share in (0, 1]", lambda value: 0 < value <= 1),
    "overshoot": ("at least 0", lambda value: 0 <= value < math.inf),
    "generator": ("None, or a torch.Generator", lambda value: value is None or isinstance(value, torch.Generator)),
    "progress": ("None, or a function", lambda value: value is None or callable(value)),
    "model": ("a network, or a function from pixels to logits", callable),
}
_nested: contextvars.ContextVar[bool] = contextvars.ContextVar("nested", default=False)
_trusted: contextvars.ContextVar[bool] = contextvars.ContextVar("trusted", default=False)


@contextlib.contextmanager
def trusted() -> Iterator[None]:
    """In this context models are not tried: a training that attacks its own at every step has no time for it."""
    token = _trusted.set(True)
    try:
        yield
    finally:
        _trusted.reset(token)


def kernel(function: Callable[P, R], *, any_range: bool = False) -> Callable[P, R]:
    """A public function whose arguments are checked by RULES, and taken as tensors, where it is called from outside.

    What one such function asks of another is not checked again. Inference mode, which knows no gradients, is left.
    any_range: images may lie outside of 0..255.
    """
    signature = inspect.signature(function)
    optional = {name for name, parameter in signature.parameters.items() if parameter.default is None} | {"start"}
    further = [name for name, parameter in signature.parameters.items() if parameter.kind is parameter.VAR_KEYWORD]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        given = [bound.arguments, *(bound.arguments.get(name, {}) for name in further)]
        for arguments in given:
            check_arguments(**arguments)
            arguments.update({name: int(value) for name, value in arguments.items() if isinstance(value, np.integer)})
        if _nested.get():
            return function(*args, **kwargs)
        token = _nested.set(True)
        try:
            with torch.inference_mode(False):
                for arguments in given:
                    stated = {name for name, value in arguments.items() if value is not None or name not in optional}
                    arguments.update(_settled({name: arguments[name] for name in stated}, any_range))
                return function(*bound.args, **bound.kwargs)
        finally:
            _nested.reset(token)

    return checked


def outside(callback: Callable[P, R]) -> Callable[P, R]:
    """A user's function as it is called from within one of ours: what it asks of others of ours is checked anew."""

    @functools.wraps(callback)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        token = _nested.set(False)
        try:
            return callback(*args, **kwargs)
        finally:
            _nested.reset(token)

    return called


def _settled(given: dict[str, Any], any_range: bool) -> dict[str, Any]:
    """The arguments with tensors in the place of what stands for them. Raises SatlibError where none is meant."""
    if "images" in given:
        given["images"] = as_images(given["images"], any_range=any_range)
    if "labels" in given and "images" in given:
        given["labels"] = as_labels(given["labels"], given["images"], targeted=given.get("targeted", False))
    for name in [name for name in ("craft", "choose", "report") if name in given]:
        given[name] = as_labelled(given[name], name, targeted=given.get("targeted", False))
    for name in ("perturbations", "start"):
        if name in given:
            xi = _as_tensor(given[name], name, "(heaps, C, H, W)").float()
            given[name] = xi.to(given["images"].device) if "images" in given else xi
            right = xi.ndim == 4 and ("images" not in given or xi.shape[1:] == given["images"].shape[1:])
            if not right or not bool(xi.isfinite().all()):
                raise SatlibError(f"{name} of shape {tuple(xi.shape)}: expected finite values (heaps, C, H, W)")
    if "eps" in given:
        warn_of_unit(given["eps"])
    return given


def check_arguments(**values: Any) -> None:
    """Raises SatlibError for a value that RULES do not allow under its name; for other names there are none."""
    for name, (expected, right) in RULES.items():
        if name in values:
            check(expected, right, **{name: values[name]})


def _as_tensor(value: Any, name: str, shape: str) -> Tensor:
    """The value as a tensor that has left inference mode and asks for no gradient."""
    if not isinstance(value, Tensor | np.ndarray | Sequence) or isinstance(value, str | bytes):
        mend = "; put its batches together by torch.cat" if hasattr(value, "__iter__") else ""
        raise SatlibError(f"{name} is a {type(value).__name__}: expected a tensor {shape}{mend}")
    try:
        tensor = torch.as_tensor(np.asarray(value) if isinstance(value, list | tuple) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SatlibError(f"{name}: expected a tensor {shape}; {str(error).splitlines()[0]}") from None
    tensor = tensor.detach() if tensor.requires_grad else tensor
    tensor = tensor.long() if tensor.dtype in UNSIGNED else tensor
    return tensor.clone() if tensor.is_inference() else tensor


def as_images(images: Any, name: str = "images", *, any_range: bool = False) -> Any:
    """Images as uint8 or float32 (n, C, H, W) in 0..255; streamed ones as they are. Raises SatlibError for others."""
    if not isinstance(images, Tensor) and hasattr(images, "split") and hasattr(images, "shape"):
        return images
    tensor = _as_tensor(images, name, "(n, C, H, W)")
    if tensor.dtype.is_complex or tensor.dtype is torch.bool:
        raise SatlibError(f"{name} of type {tensor.dtype}: expected uint8 or float32, pixels from 0 to 255")
    if tensor.ndim != 4 or not tensor.numel():
        raise SatlibError(f"{name} of shape {tuple(tensor.shape)}: expected (d, C, H, W) with d at least 1")
    check_range(tensor, name, any_range=any_range)
    return tensor if tensor.dtype is torch.uint8 else tensor.float()


def as_labels(labels: Any, images: Any, *, targeted: bool = False, name: str = "labels") -> Tensor:
    """Labels as int64 (n,), or uint8 or int64 (n, H, W). One number for a targeted attack is everybody's target."""
    if targeted and _is_whole(labels, 0):
        return torch.full((len(images),), int(labels), device=images.device)
    tensor = _as_tensor(labels, name, "(n,), or (n, H, W) for segmentation")
    whole = not tensor.dtype.is_floating_point and not tensor.dtype.is_complex and tensor.dtype is not torch.bool
    if whole and tensor.dtype is not torch.int64 and not (tensor.ndim == 3 and tensor.dtype is torch.uint8):
        tensor = tensor.long()
    check_pair(images, tensor, name)
    return tensor.to(images.device)


def as_labelled(pair: Any, name: str, *, targeted: bool = False) -> tuple[Any, Tensor]:
    """Images and their labels, of a pair or of an ImageSet."""
    if hasattr(pair, "images") and hasattr(pair, "labels"):
        pair = pair.images, pair.labels
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise SatlibError(f"{name} is a {type(pair).__name__}: expected a pair (images, labels), or an ImageSet")
    images = as_images(pair[0], f"{name} images")
    return images, as_labels(pair[1], images, targeted=targeted, name=f"{name} labels")


def check_pair(images: Tensor, labels: Tensor, name: str = "labels") -> None:
    """Raises SatlibError where images and labels (or targets) do not fit each other, or no label counts."""
    if images.ndim != 4 or not len(images):
        raise SatlibError(f"images of shape {tuple(images.shape)}: expected (d, C, H, W) with d at least 1")
    types = (torch.int64, torch.uint8) if labels.ndim == 3 else (torch.int64,)  # an ImageSet keeps pixels' as bytes
    right = labels.shape[1:] in ((), images.shape[2:]) and labels.dtype in types
    if labels.ndim not in (1, 3) or len(labels) != len(images) or not right:
        raise SatlibError(
            f"{name} of shape {tuple(labels.shape)} and type {labels.dtype}: expected int64 of shape ({len(images)},), "
            f"or {(len(images), *images.shape[2:])} for segmentation"
        )


def check_range(images: Tensor, name: str = "images", *, any_range: bool = False) -> None:
    """Raises SatlibError where pixels are not finite, or lie outside of 0 to 255, or between 0 and 1 only.

    Images of nothing but 0 and 1 could be black: they get a warning. any_range: a perturbation may have been added,
    and outside are only those that are all as small as normalised ones, some of them negative.
    """
    low, high = (float(value) for value in images.aminmax())
    seen, expected = (f"{name} from {low:g} to {high:g}", "expected pixel units, 0 to 255")
    added = any_range and math.isfinite(high - low) and (low >= 0 or max(-low, high) > NORMALISED)
    if not (added or -SLACK <= low <= high <= 255 + SLACK):
        raise SatlibError(f"{seen}: {expected}; normalise inside the model")
    if low >= -SLACK and 0 < high <= 1:
        if images.dtype.is_floating_point and not torch.equal(images, images.round()):
            raise SatlibError(f"{seen}: {expected}; multiply them by 255")
        warnings.warn(f"{seen}: {expected}; if 1 is white, multiply them by 255", stacklevel=4)


def check_data(data: Any, model: Any = None, *, has: str = "batches", **options: Any) -> None:
    """Raises SatlibError where data is no ImageSet, nor like one, in what it `has`, or a model does not fit it: see
    `check_model`."""
    if not hasattr(data, has):
        made = "satlib.data.ImageSet(images, labels, classes, name, title, split)"
        raise SatlibError(f"data is a {type(data).__name__}: expected an ImageSet; make one by {made}")
    if model is not None and hasattr(data, "images") and hasattr(data, "labels"):
        check_model(model, data.images, data.labels, **options)


def numbers(value: Any, name: str) -> Tensor:
    """One or more numbers as float32 of any shape. Raises SatlibError for what are none."""
    try:
        tensor = (value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")).detach()
        fine = tensor.numel() and not tensor.is_complex() and tensor.dtype is not torch.bool
    except (TypeError, ValueError, RuntimeError):
        fine = False
    if not fine:
        raise SatlibError(f"{name}={told(value)}: expected a number, or at least one")
    return tensor.float()


def check_eps(eps: float) -> None:
    """Raises SatlibError where eps is not a number from 0 to 255; warns where it is as one in units of 0..1."""
    check("a number from 0 to 255 (pixel units)", lambda value: 0 <= value <= 255, eps=eps)
    warn_of_unit(eps)


def warn_of_unit(eps: Any) -> None:
    """Warn where no eps reaches one of 255 grey levels."""
    largest = numbers(eps, "eps").max().item()
    if 0 < largest < 1:
        warnings.warn(f"eps={largest:g}: expected pixel units, 0 to 255, where 8/255 is 8", stacklevel=5)


def check_sharedness(sharedness: int, count: int) -> None:
    """Raises SatlibError where heaps of so many images cannot be made of `count` of them."""
    if not (_is_whole(sharedness, 1) and sharedness <= count):
        raise SatlibError(f"sharedness={told(sharedness)}: expected 1 to the number of images ({count})")


def check_batch(batch_size: int, count: int) -> None:
    """Raises SatlibError where a mini-batch would have more images than there are."""
    check(f"1 to the number of images ({count})", lambda value: 1 <= value <= count, batch_size=batch_size)


def check_threshold(loss_threshold: float | None, targeted: bool) -> None:
    """Raises SatlibError where a targeted attack gets a loss threshold."""
    if loss_threshold is not None and targeted:
        raise SatlibError(f"loss_threshold={loss_threshold!r} in a targeted attack: it knows no cap; pass None")


def _digests(images: Tensor) -> set[bytes]:
    """What tells images apart, whatever type their pixels have."""
    few = (image for part in images.split(DIGESTED) for image in part.cpu().float().numpy())
    return {hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in few}


def check_overlap(**sets: tuple[Any, Tensor]) -> None:
    """Warn where two of the sets of images have some in common, as far as they lie in memory."""
    known = {name: _digests(images) for name, (images, _) in sets.items() if isinstance(images, Tensor)}
    for (one, first), (other, second) in combinations(known.items(), 2):
        if common := len(first & second):
            warnings.warn(f"{common} of {len(second)} `{other}` images are also `{one}` images", stacklevel=4)


def per_heap(eps: float | Sequence[float] | Tensor, heaps: int | None, device: torch.device) -> Tensor:
    """eps for each heap, (heaps or 1, 1, 1, 1) on the device, checked on the host; heaps None: as many as eps has."""
    tensor = numbers(eps, "eps").reshape(-1)
    if heaps is not None and len(tensor) not in (1, heaps):
        raise SatlibError(f"eps has {len(tensor)} values for {heaps} heaps: give one number, or one for each heap")
    if not bool((right := (tensor >= 0) & (tensor <= 255)).all()):
        raise SatlibError(f"eps={tensor[~right][0].item():g}: expected numbers from 0 to 255 (pixel units)")
    return _placed(tensor, device).view(-1, 1, 1, 1)


def _placed(values: Tensor, device: torch.device) -> Tensor:
    """Values on the device; a single one without a copy from the host, which nothing can be recorded with."""
    if values.numel() > 1:
        return values.to(device)
    return torch.full((1,), values.item(), dtype=values.dtype, device=device)


def per_step(value: float | Sequence[float] | Tensor, steps: int, heaps: int, device: torch.device) -> Sequence[Tensor]:
    """Step sizes as `steps` tensors of shape (heaps or 1, 1, 1, 1)."""
    tensor = numbers(value, "step_size")
    if not bool((right := tensor.isfinite() & (tensor >= 0)).all()):
        wrong = tensor[~right].flatten()[0].item()
        raise SatlibError(f"step_size={wrong:g}: expected finite numbers of at least 0 (pixel units)")
    if tensor.ndim == 0:
        return [_placed(tensor, device).view(-1, 1, 1, 1)] * steps
    if tensor.shape not in ((steps,), (steps, heaps)):
        raise SatlibError(
            f"step_size of shape {tuple(tensor.shape)}: expected a number, ({steps},) or ({steps}, {heaps})"
        )
    return tensor.reshape(steps, -1, 1, 1, 1).to(device).unbind()


@torch.enable_grad()
def check_model(model: Any, images: Any, labels: Tensor, *, gradient: bool = True, name: str = "labels") -> None:
    """Try the model, as `attackable` gives it, on the first images, and compare its classes with the labels.

    Raises SatlibError where the model fails, in its own words; where it returns what is no logits of the classes that
    the labels name (another shape, NaN or infinite values, probabilities); where no label counts; and, if a `gradient`
    is needed, where there is none.
    """
    if _trusted.get():
        return
    few = images[:TRIED].float().requires_grad_(gradient)
    try:
        logits = logits_of(model, few)
    except SatlibError:
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise SatlibError(
            f"the model fails on {'x'.join(map(str, few.shape[1:]))} images: {type(error).__name__}: {said}"
        ) from error
    shape = tuple(logits.shape)
    if len(shape) != labels.ndim + 1 or shape[0] != len(few) or shape[2:] != labels.shape[1:]:
        expected = f"({len(few)}, classes{''.join(f', {n}' for n in labels.shape[1:])})"
        raise SatlibError(f"the model returns {shape} for a few images: expected logits of shape {expected}")
    if shape[1] == 1:
        mend = "return torch.cat([-z, z], 1) / 2 for its logit z"
        raise SatlibError(f"the model returns one logit for each decision: expected one for each class; {mend}")
    if gradient and not logits.requires_grad:
        mend = "let it compute without torch.no_grad, detach, argmax or NumPy"
        raise SatlibError(f"the model's logits have no gradient in its images: {mend}")
    shares = logits.detach().float()
    if not bool(shares.isfinite().all()):
        raise SatlibError("the model returns NaN or infinite logits: was its training finite?")
    if shares.min() >= 0 and (shares.amin(1) > 0).any() and ((shares.sum(1) - 1).abs() < 1e-3).all():
        raise SatlibError("the model returns probabilities: expected logits; leave out its softmax")
    known = labels[labels != IGNORE] if labels.ndim > 1 else labels
    if not len(known):
        raise SatlibError(f"{name}: all are {IGNORE}, which is ignored; expected some pixels with a class")
    if not 0 <= int(known.min()) <= int(known.max()) < shape[1]:
        raise SatlibError(
            f"{name} from {int(known.min())} to {int(known.max())}: expected 0 to {shape[1] - 1}, the model's classes"
        )
