"""What the explorer computes while somebody watches: a first answer at once, better ones after it, and none too late.

Each function here is a generator of answers, the later the better, and calls the network through `Watched`, so that a
newer question ends it within one pass. No widgets, no files: `satlib.study.explorer` asks, and
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
from satlib.data import Splits
from satlib.device import autocast
from satlib.errors import SatlibError
from satlib.risks import expected_risk, heap_risk, universal_risk
from satlib.segmentation import repeated

GRID = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # eps of the curve, pixel units
QUICK_PASSES = 320  # forward-and-backward passes of images of 32x32 behind a first answer: a fraction of a second
UNSEEN, SHOWN, BATCH = 256, 6, 64  # images that are scored, shown, and in the mini-batch that is shared


class Superseded(Exception):
    """A newer question was asked: nobody waits for this answer any more."""


class Watched(nn.Module):
    """A network in eval mode that asks before every pass whether its answer is still wanted."""

    def __init__(self, net: nn.Module, superseded: Callable[[], bool]):
        super().__init__()
        self.net = net
        self._superseded = superseded

    def forward(self, x: Tensor) -> Tensor:
        if self._superseded():
            raise Superseded
        return self.net(x)


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained model with the images that it is attacked on. target: the scene that targeted attacks aim at, labels
    (H, W), for segmentation models only."""

    title: str
    model: nn.Module
    splits: Splits
    target: Tensor | None = None
    known: dict = field(default_factory=dict)  # answers that do not change while some settings stay

    @property
    def scenes(self) -> bool:
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
        return 4 if self.scenes else 16

    def scored(self, *, own: bool = False) -> int:
        """Unseen images that an attack is scored on; fewer where each needs a perturbation of its own."""
        return (8 if self.scenes else 32) if own else (16 if self.scenes else UNSEEN)

    def steps_at_once(self, images: int) -> int:
        """Steps on so many images that a first answer has time for; segmentation does more pixels in that time."""
        pixels = self.splits.test.images.shape[2:].numel()
        return max(4, int(QUICK_PASSES * 1024 / pixels / images * (1.25 if self.scenes else 1.0)))


@dataclass(frozen=True)
class Attack:
    """A question: how does this attack do? eps in pixel units; target: a class, -1 for the subject's scene, or None.

    own: an image-dependent perturbation for every image, instead of one for all.
    """

    eps: float = 16.0
    steps: int = 100
    target: int | None = None
    own: bool = False
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Attacked:
    """An answer. images (n, C, H, W), xi likewise or (1, C, H, W), in pixel units; clean, perturbed: predictions
    (n,) with their confidence (n,), or segmentations (n, H, W) with the mean over their pixels.

    rate: share of decisions won on `scored` unseen images; interval: 95 % of it, over images. curve: (eps, rate) where
    it is known. steps: those that were made; final: whether no better answer follows.
    """

    question: Attack
    subject: Subject
    images: Tensor
    labels: Tensor
    xi: Tensor
    clean: Tensor
    perturbed: Tensor
    confidence: tuple[Tensor, Tensor]
    rate: float
    scored: int
    interval: tuple[float, float]
    curve: tuple[tuple[float, float], ...]
    steps: int
    seconds: float
    final: bool = False


def attack(subject: Subject, question: Attack, superseded: Callable[[], bool] = lambda: False) -> Iterator[Attacked]:
    """Answers: after a few steps, after all of them, and with the curve over eps.

    One perturbation for all is crafted on validation images; what is shown and scored are test images. Raises
    SatlibError on settings that the attack cannot work with, and Superseded.
    """
    net = Watched(subject.net, superseded)
    quick = min(question.steps, subject.steps_at_once(subject.batch_size))
    if quick < question.steps:
        yield _attacked(subject, net, question, quick)
    found = _attacked(subject, net, question, question.steps)
    if question.own:
        yield replace(found, final=True)
    else:
        yield found
        yield replace(found, curve=_curve(subject, net, question), final=True)


def _attacked(subject: Subject, net: nn.Module, question: Attack, steps: int) -> Attacked:
    began = time.perf_counter()
    test = subject.splits.test
    shown, scored = test.first(SHOWN), test.first(min(subject.scored(own=question.own), len(test)))
    aim, targeted = _aim(subject, question, scored.labels), question.target is not None
    if question.own:
        found = _own(net, scored.images.float(), aim, question, steps)
    else:
        found = _universal(subject, net, question, [question.eps], steps)
    won = _won(net, perturb(scored.images.float(), found, 1 if question.own else None), aim, targeted=targeted)
    x, xi, rate = shown.images.float(), found[:SHOWN], won.mean().item()
    before, after = (_predicted(net, images) for images in (x, perturb(x, xi, 1 if question.own else None)))
    return Attacked(
        question=question,
        subject=subject,
        images=x,
        labels=shown.labels,
        xi=xi,
        clean=before[0],
        perturbed=after[0],
        confidence=(before[1], after[1]),
        rate=rate,
        scored=len(scored),
        interval=interval(won),
        curve=(),
        steps=steps,
        seconds=time.perf_counter() - began,
    )


def _universal(subject: Subject, net: nn.Module, question: Attack, epsilons: list[float], steps: int) -> Tensor:
    craft = subject.splits.val
    return universal_pgd(
        net,
        craft.images,
        _aim(subject, question, craft.labels),
        eps=epsilons,
        steps=steps,
        batch_size=min(subject.batch_size, len(craft)),
        targeted=question.target is not None,
        generator=torch.Generator().manual_seed(question.seed),
        snapshots=1,
    )


def _own(net: nn.Module, x: Tensor, aim: Tensor, question: Attack, steps: int) -> Tensor:
    steps = max(4, steps // 4)  # an image by itself needs fewer
    sizes = annealed_step_sizes(question.eps, steps, beta=4.0, gamma=0.95)
    generator = torch.Generator().manual_seed(question.seed)
    targeted = question.target is not None
    return heap_pgd(
        net,
        x,
        aim,
        eps=question.eps,
        sharedness=1,
        steps=steps,
        step_size=sizes,
        targeted=targeted,
        generator=generator,
    )


def _won(net: nn.Module, images: Tensor, aim: Tensor, *, targeted: bool) -> Tensor:
    """The share of each image's decisions (n,) that the attack wins; pixels without a class do not count."""
    predicted = torch.cat([_predicted(net, part)[0] for part in images.split(images_at_once(images))])
    won, counted = decisions_won(predicted, aim, targeted=targeted)
    return won / counted.clamp(min=1)


def _aim(subject: Subject, question: Attack, labels: Tensor) -> Tensor:
    """What an attack works on: the labels, or its targets for as many images."""
    if question.target is None:
        return labels
    if subject.scenes:
        if subject.target is None:
            raise SatlibError(f"target={question.target}: {subject.title} has no target scene; attack it without one")
        return repeated(subject.target, len(labels))
    if not 0 <= question.target < len(subject.splits.test.classes):
        raise SatlibError(f"target={question.target}: expected 0 to {len(subject.splits.test.classes) - 1}, or None")
    return torch.full_like(labels, question.target)


@torch.no_grad()
def _predicted(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Classes (n,) with the probability of each (n,), or segmentations (n, H, W) with each image's mean of those."""
    with autocast(images.device):
        logits = net(images.contiguous(memory_format=torch.channels_last)).float()
    confidence, classes = logits.softmax(1).max(1)
    return classes, confidence.flatten(1).mean(1) if confidence.ndim > 1 else confidence


def _curve(subject: Subject, net: nn.Module, question: Attack) -> tuple[tuple[float, float], ...]:
    """Success against eps, with few steps: one pass for all eps, remembered while only eps changes."""
    steps = min(question.steps, 2 * subject.steps_at_once(subject.batch_size))

    def compute() -> tuple[tuple[float, float], ...]:
        xi = _universal(subject, net, question, list(GRID), steps)
        scored = subject.splits.test.first(min(subject.scored(), len(subject.splits.test)))
        aim = _aim(subject, question, scored.labels)
        rates = success_rates(net, scored.images, aim, xi, targeted=question.target is not None)
        return tuple(zip(GRID, rates.tolist(), strict=True))

    return _remembered(subject, ("curve", steps, question.target, question.seed), compute)


def _remembered(subject: Subject, key: tuple, compute: Callable[[], Any]) -> Any:
    """What was computed for these settings before, or is now."""
    if key not in subject.known:
        subject.known[key] = compute()
    return subject.known[key]


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


@dataclass(frozen=True)
class Sharing:
    """A question: what do heaps of this size share? eps in pixel units."""

    sharedness: int = 8
    eps: float = 16.0
    steps: int = 20
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Shared:
    """An answer, for a mini-batch of BATCH images. xi: the perturbations of its heaps (heaps, C, H, W), pixel units.

    own, unseen: share of images that they fool, of their own heap and of images that they never saw (a mean over some
    of them); clean: share that is wrong anyway. risks: mean 0-1 loss by the risk's name, in the order of section 4.2.
    """

    question: Sharing
    subject: Subject
    xi: Tensor
    own: float
    unseen: float
    clean: float
    risks: dict[str, float]
    steps: int
    seconds: float
    final: bool = False


def share(subject: Subject, question: Sharing, superseded: Callable[[], bool] = lambda: False) -> Iterator[Shared]:
    """Answers: after a few steps, then after all of them. The four risks are those of the mini-batch; the universal
    perturbation for it is crafted on validation images. Raises SatlibError, and Superseded."""
    if subject.scenes:
        raise SatlibError(f"{subject.title} labels pixels: sharedness is explored on classifiers; choose one")
    net = Watched(subject.net, superseded)
    for steps in sorted({min(question.steps, subject.steps_at_once(BATCH)), question.steps}):
        yield replace(_shared(subject, net, question, steps), final=steps == question.steps)


def _shared(subject: Subject, net: nn.Module, question: Sharing, steps: int) -> Shared:
    began, test = time.perf_counter(), subject.splits.test
    own = test.first(min(BATCH, len(test)))
    unseen = test.subset(slice(len(own), len(own) + UNSEEN // 2))
    x, y = own.images.float(), own.labels

    def heaps(sharedness: int) -> dict:
        sizes = annealed_step_sizes(question.eps, steps, beta=4.0, gamma=0.95)
        generator = torch.Generator().manual_seed(question.seed)
        options = {"eps": question.eps, "sharedness": sharedness, "steps": steps, "step_size": sizes}
        return options | {"generator": generator}

    def universal() -> float:
        craft, generator = subject.splits.val, torch.Generator().manual_seed(question.seed)
        options = {"eps": question.eps, "steps": 2 * steps, "batch_size": subject.batch_size, "generator": generator}
        return universal_risk(net, x, y, craft=(craft.images, craft.labels), snapshots=1, **options).error

    settings = (question.eps, steps, question.seed)
    xi = heap_pgd(net, x, y, keep_best=True, **heaps(question.sharedness))
    predicted = _predicted(net, perturb(x, xi, question.sharedness))[0]
    error = (predicted != y).float().mean().item()
    clean = _remembered(subject, ("expected",), lambda: expected_risk(net, x, y).error)
    risks = {"expected": clean, "universal": _remembered(subject, ("universal", *settings), universal)}
    risks[f"heap, s = {question.sharedness}"] = error
    risks["adversarial"] = _remembered(
        subject, ("adversarial", *settings), lambda: heap_risk(net, x, y, **heaps(1)).error
    )
    return Shared(
        question=question,
        subject=subject,
        xi=xi,
        own=error,
        unseen=success_rates(net, unseen.images, unseen.labels, xi[:4]).mean().item(),
        clean=clean,
        risks=risks,
        steps=steps,
        seconds=time.perf_counter() - began,
    )
