"""What the explorer computes while somebody watches: a first answer at once, better ones after it, and none too late.

`attack` and `share` are generators of answers, the later the better, and call the network through `Cancellable`, so
that a newer question ends them within one pass. No widgets, no files: `satlib.study.explorer` asks, and
`satlib.study.figures.explorer` draws.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from satlib.attacks import (
    annealed_step_sizes,
    decisions_won,
    heap_pgd,
    images_at_once,
    perturb,
    success_rates,
    universal_pgd,
)
from satlib.data import ImageSet, Splits
from satlib.device import autocast
from satlib.errors import SatlibError
from satlib.risks import expected_risk, heap_risk, universal_risk
from satlib.segmentation import repeated

GRID = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # eps of the curve, pixel units
QUICK_PASSES = 320  # forward-and-backward passes of images of 32x32 behind a first answer: a fraction of a second
UNSEEN, SHOWN, BATCH = 256, 6, 64  # images that are scored, shown, and in the mini-batch that is shared


class Superseded(Exception):
    """A newer question was asked: nobody waits for this answer any more."""


class Cancellable(nn.Module):
    """A network in eval mode that asks before every pass whether its answer is still wanted."""

    def __init__(self, net: nn.Module, superseded: Callable[[], bool]):
        super().__init__()
        self.net, self._superseded = net, superseded

    def forward(self, x: Tensor) -> Tensor:
        if self._superseded():
            raise Superseded
        return self.net(x)


@dataclass(frozen=True, eq=False)
class Target:
    """A trained model with the images that it is attacked on. scene: what targeted attacks want to see everywhere,
    labels (H, W), for segmentation models only."""

    title: str
    model: nn.Module
    splits: Splits
    scene: Tensor | None = None
    known: dict = field(default_factory=dict)  # answers that do not change while some settings stay

    @property
    def segments(self) -> bool:
        """Whether the model labels every pixel."""
        return self.splits.test.labels.ndim > 1

    @cached_property
    def net(self) -> nn.Module:
        """The frozen model with batch norm folded, made once."""
        model = self.model
        return model.folded() if hasattr(model, "folded") else model.eval().requires_grad_(False)

    @property
    def batch_size(self) -> int:
        """Images in a mini-batch of the universal attack."""
        return 4 if self.segments else 16

    def scored(self, *, own: bool = False) -> ImageSet:
        """The test images that an attack is scored on; fewer where each needs a perturbation of its own."""
        return self.splits.test.subset(slice((8 if own else 16) if self.segments else (32 if own else UNSEEN)))

    def steps_at_once(self, images: int) -> int:
        """Steps on so many images that a first answer has time for; segmentation does more pixels in that time."""
        pixels = self.splits.test.images.shape[2:].numel()
        return max(4, int(QUICK_PASSES * 1024 / pixels / images * (1.25 if self.segments else 1.0)))

    def remembered(self, key: tuple, compute: Callable[[], Any]) -> Any:
        """What was computed for these settings before, or is now."""
        if key not in self.known:
            self.known[key] = compute()
        return self.known[key]


@dataclass(frozen=True)
class Attack:
    """A question: how does this attack do? eps in pixel units; target: a class, -1 for the target scene, or None.

    own: an image-dependent perturbation for every image, instead of one for all.
    """

    eps: float = 16.0
    steps: int = 100
    target: int | None = None
    own: bool = False
    seed: int = 0

    def sharedness(self, images: int) -> int:
        """How many of so many images share a perturbation."""
        return 1 if self.own else images


@dataclass(frozen=True)
class Sharing:
    """A question: what do heaps of this size share? eps in pixel units."""

    sharedness: int = 8
    eps: float = 16.0
    steps: int = 20
    seed: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Attacked:
    """An answer. images (n, C, H, W), xi likewise or (1, C, H, W), in pixel units; clean, perturbed: predictions (n,)
    and their confidence (n,), or segmentations (n, H, W) and the mean over their pixels.

    won: the share of its decisions that the attack wins on each unseen image; curve: (eps, share of all of them) where
    it is known. steps: those that were made.
    """

    question: Attack
    target: Target
    images: Tensor
    labels: Tensor
    xi: Tensor
    clean: tuple[Tensor, Tensor]
    perturbed: tuple[Tensor, Tensor]
    won: Tensor
    curve: tuple[tuple[float, float], ...] = ()
    steps: int
    seconds: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Shared:
    """An answer, for a mini-batch of BATCH images. xi: the perturbations of its heaps (heaps, C, H, W), pixel units.

    own, unseen: share of images that they fool, of their own heap and of images that they never saw (a mean over some
    of them); risks: mean 0-1 loss by the risk's name, in the order of section 4.2. steps: those that were made.
    """

    question: Sharing
    target: Target
    xi: Tensor
    own: float
    unseen: float
    risks: dict[str, float]
    steps: int
    seconds: float


def attack(target: Target, question: Attack, superseded: Callable[[], bool] = lambda: False) -> Iterator[Attacked]:
    """Answers: after a few steps, after all of them, and with the curve over eps.

    One perturbation for all is crafted on validation images; what is shown and scored are test images. Raises
    SatlibError on settings that the attack cannot work with, and Superseded.
    """
    net = Cancellable(target.net, superseded)
    for steps in sorted({min(question.steps, target.steps_at_once(target.batch_size)), question.steps}):
        answer = _attacked(target, net, question, steps)
        yield answer
    if not question.own:
        yield replace(answer, curve=_curve(target, net, question))


def _attacked(target: Target, net: nn.Module, question: Attack, steps: int) -> Attacked:
    began, scored = time.perf_counter(), target.scored(own=question.own)
    x, aim, targeted = scored.images.float(), _aim(target, question, scored.labels), question.target is not None
    if question.own:  # an image by itself needs fewer steps
        xi = heap_pgd(net, x, aim, sharedness=1, targeted=targeted, **_heap_settings(question, max(4, steps // 4)))
    else:
        xi = _universal(target, net, question, [question.eps], steps)
    won = _won(net, perturb(x, xi, question.sharedness(len(x))), aim, targeted=targeted)
    x, xi = x[:SHOWN], xi[:SHOWN]
    return Attacked(
        question=question,
        target=target,
        images=x,
        labels=scored.labels[:SHOWN],
        xi=xi,
        clean=_predicted(net, x),
        perturbed=_predicted(net, perturb(x, xi, question.sharedness(len(x)))),
        won=won,
        steps=steps,
        seconds=time.perf_counter() - began,
    )


def _universal(target: Target, net: nn.Module, question: Attack, epsilons: list[float], steps: int) -> Tensor:
    craft = target.splits.val
    return universal_pgd(
        net,
        craft.images,
        _aim(target, question, craft.labels),
        eps=epsilons,
        steps=steps,
        batch_size=min(target.batch_size, len(craft)),
        targeted=question.target is not None,
        generator=torch.Generator().manual_seed(question.seed),
        snapshots=1,
    )


def _heap_settings(question: Attack | Sharing, steps: int) -> dict[str, Any]:
    """What `heap_pgd` takes from a question."""
    sizes = annealed_step_sizes(question.eps, steps, beta=4.0, gamma=0.95)
    generator = torch.Generator().manual_seed(question.seed)
    return {"eps": question.eps, "steps": steps, "step_size": sizes, "generator": generator}


def _won(net: nn.Module, images: Tensor, aim: Tensor, *, targeted: bool) -> Tensor:
    """The share of each image's decisions (n,) that the attack wins; pixels without a class do not count."""
    predicted = torch.cat([_predicted(net, part)[0] for part in images.split(images_at_once(images))])
    won, counted = decisions_won(predicted, aim, targeted=targeted)
    return won / counted.clamp(min=1)


def _aim(target: Target, question: Attack, labels: Tensor) -> Tensor:
    """What an attack works on: the labels, or its targets for as many images."""
    if question.target is None:
        return labels
    if target.segments:
        if target.scene is None:
            raise SatlibError(f"target={question.target}: {target.title} has no target scene; attack it without one")
        return repeated(target.scene, len(labels))
    if not 0 <= question.target < len(target.splits.test.classes):
        raise SatlibError(f"target={question.target}: expected 0 to {len(target.splits.test.classes) - 1}, or None")
    return torch.full_like(labels, question.target)


@torch.no_grad()
def _predicted(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Classes (n,) with the probability of each (n,), or segmentations (n, H, W) with each image's mean of those."""
    with autocast(images.device):
        logits = net(images.contiguous(memory_format=torch.channels_last)).float()
    confidence, classes = logits.softmax(1).max(1)
    return classes, confidence.flatten(1).mean(1) if confidence.ndim > 1 else confidence


def _curve(target: Target, net: nn.Module, question: Attack) -> tuple[tuple[float, float], ...]:
    """Success against eps, with few steps: one pass for all eps, remembered while only eps changes."""
    steps = min(question.steps, 2 * target.steps_at_once(target.batch_size))

    def compute() -> tuple[tuple[float, float], ...]:
        xi, scored = _universal(target, net, question, list(GRID), steps), target.scored()
        aim = _aim(target, question, scored.labels)
        rates = success_rates(net, scored.images, aim, xi, targeted=question.target is not None)
        return tuple(zip(GRID, rates.tolist(), strict=True))

    return target.remembered(("curve", steps, question.target, question.seed), compute)


def interval(won: Tensor) -> tuple[float, float]:
    """The 95 % interval of the mean of images' shares (n,): Wilson's (1927) where each is 0 or 1, else of the normal
    distribution."""
    count, share, z = len(won), won.mean().item(), 1.959964
    if ((won == 0) | (won == 1)).all():
        centre, shrunk = share + z * z / (2 * count), 1 + z * z / count
        spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    else:
        centre, shrunk, spread = share, 1.0, z * won.std().item() / math.sqrt(count)
    return max(0.0, (centre - spread) / shrunk), min(1.0, (centre + spread) / shrunk)


def share(target: Target, question: Sharing, superseded: Callable[[], bool] = lambda: False) -> Iterator[Shared]:
    """Answers: after a few steps, then after all of them. The four risks are those of the mini-batch; the universal
    perturbation for it is crafted on validation images. Raises SatlibError, and Superseded."""
    if target.segments:
        raise SatlibError(f"{target.title} labels pixels: sharedness is explored on classifiers; choose one")
    net = Cancellable(target.net, superseded)
    for steps in sorted({min(question.steps, target.steps_at_once(BATCH)), question.steps}):
        yield _shared(target, net, question, steps)


def _shared(target: Target, net: nn.Module, question: Sharing, steps: int) -> Shared:
    began, test, craft = time.perf_counter(), target.splits.test, target.splits.val
    batch = test.subset(slice(BATCH))
    unseen = test.subset(slice(len(batch), len(batch) + UNSEEN // 2))
    x, y, own = batch.images.float(), batch.labels, f"heap, s = {question.sharedness}"

    def universal() -> float:
        options = {"eps": question.eps, "steps": 2 * steps, "batch_size": target.batch_size, "snapshots": 1}
        options["generator"] = torch.Generator().manual_seed(question.seed)
        return universal_risk(net, x, y, craft=(craft.images, craft.labels), **options).error

    def adversarial() -> float:
        return heap_risk(net, x, y, sharedness=1, **_heap_settings(question, steps)).error

    xi = heap_pgd(net, x, y, sharedness=question.sharedness, keep_best=True, **_heap_settings(question, steps))
    settings = (question.eps, steps, question.seed)
    risks = {
        "expected": target.remembered(("expected",), lambda: expected_risk(net, x, y).error),
        "universal": target.remembered(("universal", *settings), universal),
        own: _won(net, perturb(x, xi, question.sharedness), y, targeted=False).mean().item(),
        "adversarial": target.remembered(("adversarial", *settings), adversarial),
    }
    fooled = success_rates(net, unseen.images, unseen.labels, xi[:4]).mean().item()
    numbers = {"own": risks[own], "unseen": fooled, "risks": risks, "steps": steps}
    return Shared(question=question, target=target, xi=xi, seconds=time.perf_counter() - began, **numbers)
