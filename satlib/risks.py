"""Estimators of the four risks of sections 3.1 and 4.2 on a finite set of images."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from satlib.attacks import attack_loss, broadcast, decisions_won, heap_pgd, perturb, universal_pgd
from satlib.checks import check_model, check_overlap, kernel
from satlib.device import exact
from satlib.network import attackable, logits_of


@dataclass(frozen=True)
class Risk:
    """Mean loss L (cross-entropy, never capped) and mean 0-1 loss under the perturbations that were found.

    An attack finds a lower bound of the supremum in a risk's definition: the estimate is one, too.
    """

    loss: float
    error: float


@kernel
def expected_risk(model: nn.Module, images: Tensor, labels: Tensor) -> Risk:
    """rho_exp = E[L(theta, x, y)] over images (n, C, H, W) in 0..255 and labels (n,) or (n, H, W)."""
    return risk_under(model, images, labels, torch.zeros_like(images[:1], dtype=torch.float32), len(images))


@kernel
def adversarial_risk(model: nn.Module, images: Tensor, labels: Tensor, **attack: Any) -> Risk:
    """rho_adv = E[sup_{xi(x)} L(theta, x + xi(x), y)]: the heap risk of sharedness 1."""
    return heap_risk(model, images, labels, sharedness=1, **attack)


@kernel
def heap_risk(model: nn.Module, images: Tensor, labels: Tensor, *, sharedness: int, **attack: Any) -> Risk:
    """rho_heap^(s): every `sharedness` consecutive images share one perturbation found for them by `heap_pgd`.

    `attack`: eps, steps, step_size, generator and the other arguments of `heap_pgd`. The best iterate counts.
    """
    xi = heap_pgd(model, images.float(), labels, sharedness=sharedness, keep_best=True, **attack)
    return risk_under(model, images, labels, xi, sharedness)


@kernel
def universal_risk(
    model: nn.Module, images: Tensor, labels: Tensor, *, craft: tuple[Tensor, Tensor], **attack: Any
) -> Risk:
    """rho_uni = sup_xi E[L(theta, x + xi, y)]: one perturbation, found on the `craft` images, scored on these.

    `attack`: eps, steps and the other arguments of `universal_pgd`. That the images differ is what separates
    it from the heap risk of a heap that holds all of them; a warning counts those that do not.
    """
    check_overlap(craft=craft, images=(images, labels))
    xi = universal_pgd(model, *craft, **attack)
    return risk_under(model, images, labels, xi, len(images))


@kernel
@torch.no_grad()
def risk_under(
    model: nn.Module, images: Tensor, labels: Tensor, perturbations: Tensor, sharedness: int, *, batch_size: int = 512
) -> Risk:
    """Risk under given perturbations (heaps, C, H, W), each added to `sharedness` consecutive images.

    Means are over decisions: images, or in segmentation pixels whose label is not 255.
    """
    loss = error = 0.0
    counted = 0
    added = broadcast(perturbations, sharedness, len(images))
    with attackable(model) as net, exact():
        check_model(net, images, labels)
        for x, y, xi in zip(images.split(batch_size), labels.split(batch_size), added.split(batch_size), strict=True):
            logits = logits_of(net, perturb(x.float(), xi, 1))
            wins, counts = decisions_won(logits.argmax(1), y)
            loss += attack_loss(logits, y).sum().item()
            error, counted = error + wins.sum().item(), counted + int(counts.sum())
    return Risk(loss / counted, error / counted)
