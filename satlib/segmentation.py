"""What targeted attacks on segmentation aim at, and how it is said what they did."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from satlib.data.imageset import Splits
from satlib.device import exact
from satlib.errors import SatlibError
from satlib.network import logits_of


def scene_target(splits: Splits, frame: str) -> Tensor:
    """The segmentation uint8 (H, W) of a training scene, which a static target wants to see everywhere (section 6.3).

    Raises SatlibError where there is no such scene.
    """
    train = splits.train
    if frame not in train.frames:
        few = ", ".join(train.frames[:3])
        raise SatlibError(f"target={frame!r}: no training scene of {train.title} is called so; there are {few}, ...")
    return train.labels[train.frames.index(frame)]


def class_index(splits: Splits, name: str) -> int:
    """Index of a class by its name. Raises SatlibError where there is none."""
    train = splits.train
    if name not in train.classes:
        raise SatlibError(f"hidden={name!r}: {train.title} has no such class; it has {', '.join(train.classes)}")
    return train.classes.index(name)


def repeated(target: Tensor, count: int) -> Tensor:
    """One target for `count` images: (count, H, W), without a copy."""
    return target.expand(count, *target.shape)


def without(labels: Tensor, hidden: int) -> Tensor:
    """Segmentations (n, H, W) in which the class `hidden` gives way to the nearest other class (Metzen et al. 2017).

    Nearest is counted in steps to one of the eight neighbours. Maps of nothing but the hidden class stay as they are.
    """
    result = labels.clone()
    while True:
        open_ = result == hidden
        known = torch.where(open_, -1, result.long())
        offered = F.max_pool2d(known[:, None].float(), 3, 1, 1)[:, 0].long()
        filled = open_ & (offered >= 0)
        if not filled.any():
            return result
        result = torch.where(filled, offered.to(result.dtype), result)


@torch.no_grad()
def segment(model: nn.Module, images: Tensor, *, batch_size: int = 4) -> Tensor:
    """Predicted classes uint8 (n, H, W) of images (n, C, H, W) in 0..255, by the model as it is given, in float32."""
    with exact():
        return torch.cat([logits_of(model, x.float()).argmax(1).to(torch.uint8) for x in images.split(batch_size)])


def share_hidden(clean: Tensor, perturbed: Tensor, hidden: int) -> dict[str, float | None]:
    """What became of the class `hidden` from one prediction (n, H, W) to the other.

    hidden: share of its pixels that have another class; kept: share of all other pixels that have their class still.
    None where there are no such pixels.
    """

    def share(won: Tensor) -> float | None:
        return won.sum().item() / len(won) if len(won) else None

    there = clean == hidden
    return {"hidden": share(perturbed[there] != hidden), "kept": share((perturbed == clean)[~there])}


def gradients(pictures: Tensor) -> Tensor:
    """Differences to the right and lower neighbour, of pictures (n, C, H, W): (n, C, 2, H - 1, W - 1)."""
    right = pictures[..., :-1, 1:] - pictures[..., :-1, :-1]
    down = pictures[..., 1:, :-1] - pictures[..., :-1, :-1]
    return torch.stack([right, down], 2)


def weakening(images: Tensor, perturbations: Tensor) -> Tensor:
    """How far each perturbation (n, C, H, W) works against the edges of its image (section 6.4): (n,), in [-1, 1].

    Minus the cosine between the gradients of both: 1 would be an image faded towards grey, 0 no relation.
    """
    edges, change = gradients(images.float()).flatten(1), gradients(perturbations.float()).flatten(1)
    return -F.cosine_similarity(edges, change)


def target_structure(perturbations: Tensor, target: Tensor, *, blur: int = 5) -> Tensor:
    """How far the edges of each perturbation (n, C, H, W) lie on the boundaries of the target (H, W): (n,), in [-1, 1].

    Correlation over the pixels of the strength of edges, averaged over `blur` x `blur` pixels, as boundaries are.
    """
    strength = gradients(perturbations.float()).square().sum((1, 2)).sqrt()
    smooth = F.avg_pool2d(strength[:, None], blur, 1, blur // 2)[:, 0].flatten(1)
    boundaries = (gradients(target[None, None].float()) != 0).any(2).float()
    lines = F.avg_pool2d(boundaries, blur, 1, blur // 2).flatten()
    smooth, lines = smooth - smooth.mean(1, keepdim=True), lines - lines.mean()
    return F.cosine_similarity(smooth, lines.expand_as(smooth))
