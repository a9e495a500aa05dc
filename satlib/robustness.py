"""Smallest perturbation that fools a model on a share delta of its inputs (section 5): universal, image-dependent."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from satlib.attacks import attackable, check_annealing, heap_pgd, success_rates, universal_pgd
from satlib.errors import SatlibError

LARGEST = 255.0  # the search interval of section 5.2 is [0, 255]
CHANCE = 0.05  # how far a success rate may fall, as eps grows, before it counts as more than chance
Labelled = tuple[Tensor, Tensor]  # images (n, C, H, W) in 0..255, and their labels


@dataclass(frozen=True)
class Evaluation:
    """One question of the search: was a perturbation with |xi| <= eps found that wins a share delta?"""

    eps: float
    magnitude: float  # largest |xi| of the perturbation that was found
    rate: float  # its success rate on the images that the search decides on
    success: bool


@dataclass(frozen=True)
class Robustness:
    """Result of a search: an upper bound on the model's robustness, and everything that led to it.

    epsilon: magnitude in pixel units of the smallest perturbation that reached delta; None where none did, which
    prints as "> 255". perturbation: that perturbation, (1, C, H, W); None with it. rate: its success rate on the
    deciding images; report_rate: on images that neither crafting nor search saw. evaluations: in their order.
    """

    delta: float
    epsilon: float | None
    rate: float | None
    report_rate: float | None
    evaluations: list[Evaluation]
    perturbation: Tensor | None = field(repr=False)

    def __str__(self) -> str:
        return f"> {LARGEST:g}" if self.epsilon is None else f"{self.epsilon:.1f}"

    @property
    def monotone(self) -> bool:
        """False where a larger eps missed delta by clearly more than a smaller one did: a sign of a weak attack.

        The verdicts alone cannot tell: a binary search asks neither above a success nor below a miss.
        """
        rates = [min(e.rate, self.delta) for e in sorted(self.evaluations, key=lambda e: e.eps)]
        return all(larger >= smaller - CHANCE for smaller, larger in itertools.combinations(rates, 2))


def universal_robustness(
    model: nn.Module,
    *,
    craft: Labelled,
    choose: Labelled,
    report: Labelled,
    delta: float = 0.75,
    iterations: int = 10,
    targeted: bool = False,
    generator: torch.Generator | None = None,
    progress: Callable[[str], None] | None = None,
    **attack: Any,
) -> Robustness:
    """eps_uni(delta): the binary search of section 5.2, `iterations` deep on [0, 255].

    Every iteration crafts a perturbation with `universal_pgd` on the `craft` images at the middle of the
    interval, and goes on below if it wins a share delta of the `choose` images, else above. The smallest
    success of the whole search counts. Its rate on the `report` images, which neither saw, is returned beside it.
    `attack` goes to `universal_pgd` (steps, batch_size, beta, gamma, loss_threshold, label_smoothing, ...).

    Raises SatlibError on delta outside (0, 1) or iterations < 1, and what `universal_pgd` raises.
    """
    _check_search(delta, iterations)
    with attackable(model) as net:

        def rate_on(images: Labelled, xi: Tensor) -> float:
            return success_rates(net, *images, xi, targeted=targeted).item()

        nothing = torch.zeros_like(craft[0][:1], dtype=torch.float32)
        rate = rate_on(choose, nothing)
        least = delta - 1e-7  # rates are float32, where 7 of 10 is a little less than 0.7
        evaluations = [Evaluation(0.0, 0.0, rate, rate >= least)]
        best, best_magnitude, best_rate = (nothing, 0.0, rate) if rate >= least else (None, math.inf, None)
        low, high = 0.0, LARGEST
        for step in range(iterations if best is None else 0):
            eps = (low + high) / 2
            xi = universal_pgd(net, *craft, eps=eps, targeted=targeted, generator=generator, **attack)
            rate, magnitude = rate_on(choose, xi), xi.abs().max().item()
            evaluations.append(Evaluation(eps, magnitude, rate, rate >= least))
            if rate >= least:
                high = eps
                if magnitude < best_magnitude:
                    best, best_magnitude, best_rate = xi, magnitude, rate
            else:
                low = eps
            if progress:
                verdict = "reached" if rate >= least else "missed"
                progress(f"search {step + 1}/{iterations}: eps {eps:.1f} -> success {rate:.1%}, {delta:.0%} {verdict}")
        return Robustness(
            delta=delta,
            epsilon=None if best is None else best_magnitude,
            rate=best_rate,
            report_rate=None if best is None else rate_on(report, best),
            evaluations=evaluations,
            perturbation=best,
        )


@dataclass(frozen=True)
class ImageRobustness:
    """Result of the image-dependent search. epsilons (n,): smallest success for each image in pixel units, inf
    where none was found. epsilon: the smallest magnitude at which a share delta is fooled; None prints "> 255"."""

    delta: float
    epsilon: float | None
    epsilons: Tensor = field(repr=False)

    def __str__(self) -> str:
        return f"> {LARGEST:g}" if self.epsilon is None else f"{self.epsilon:.1f}"


def adversarial_robustness(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    delta: float = 0.75,
    iterations: int = 10,
    steps: int = 200,
    beta: float = 4.0,
    gamma: float = 0.975,
    batch_size: int = 128,
    targeted: bool = False,
    loss_threshold: float | None = None,
    label_smoothing: float = 0.0,
    generator: torch.Generator | None = None,
) -> ImageRobustness:
    """eps_adv(delta) of section 5.1 by the same binary search, every image with an interval of its own.

    A heap of one image can carry its own eps, so one pass of `heap_pgd` asks a whole mini-batch a different
    question for every image. eps_adv(delta) is then the smallest eps within which a share delta of the images
    has been fooled: never above what one common interval would find. images (n, C, H, W), labels (n,).

    Raises SatlibError on delta outside (0, 1) or iterations < 1, and what `heap_pgd` raises.
    """
    _check_search(delta, iterations)
    check_annealing(beta, gamma)
    relative = torch.tensor([gamma**k for k in range(steps)])
    relative = beta * relative / relative.sum()
    smallest = []
    with attackable(model) as net:
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            x = x.float().contiguous(memory_format=torch.channels_last)
            fooled = _wins(net, x, y, targeted)
            low = torch.zeros(len(x), device=x.device)
            high = torch.full_like(low, LARGEST)
            best = torch.where(fooled, 0.0, math.inf)
            for _ in range(iterations):
                eps = (low + high) / 2
                xi = heap_pgd(
                    net,
                    x,
                    y,
                    eps=eps,
                    sharedness=1,
                    steps=steps,
                    step_size=relative[:, None] * eps.cpu()[None],
                    targeted=targeted,
                    loss_threshold=loss_threshold,
                    label_smoothing=label_smoothing,
                    generator=generator,
                    keep_best=True,
                )
                won = _wins(net, (x + xi).clamp(0, 255), y, targeted)
                magnitude = xi.abs().flatten(1).amax(1)
                best = torch.where(won, torch.minimum(best, magnitude), best)
                low, high = torch.where(won, low, eps), torch.where(won, eps, high)
            smallest.append(best)
    epsilons = torch.cat(smallest)
    fewest = max(1, math.ceil(delta * len(epsilons) - 1e-9))  # 0.56 * 25 is a little more than 14
    at_delta = epsilons.sort().values[fewest - 1].item()
    return ImageRobustness(delta, None if math.isinf(at_delta) else at_delta, epsilons.cpu())


@torch.no_grad()
def _wins(model: nn.Module, images: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    predicted = model(images).argmax(1)
    return predicted == labels if targeted else predicted != labels


def _check_search(delta: float, iterations: int) -> None:
    if not 0 < delta < 1:
        raise SatlibError(f"delta={delta!r}: expected a share strictly between 0 and 1")
    if iterations < 1:
        raise SatlibError(f"iterations={iterations!r}: expected at least 1")
