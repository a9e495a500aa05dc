"""What the explorer computes while somebody watches: a first answer at once, better ones after it, and none too late.

`attack` and `share` are generators of answers, the later the better, and call the network through `Cancellable`, so
that a newer question ends them within one pass. No widgets, no files: `satlib.study.explorer` asks, and
`satlib.study.figures.explorer` draws.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from satlib import attacks
from satlib.attacks import heap_pgd, perturb, success_rates
from satlib.checks import as_images, as_labels
from satlib.data import ImageSet, Splits
from satlib.device import exact
from satlib.errors import SatlibError
from satlib.network import Network, OwnNetwork, evaluated, logits_of
from satlib.risks import adversarial_risk, expected_risk, universal_risk
from satlib.segmentation import repeated

GRID = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # eps of the curve, pixel units
QUICK_PASSES = 320  # forward-and-backward passes of images of 32x32 behind a first answer: a fraction of a second
UNSEEN, SHOWN, BATCH = 256, 6, 64  # images that are scored, shown, and in the mini-batch that is shared


class Superseded(BaseException):
    """A newer question was asked, or this one cancelled: nobody waits for the answer any more. Not an Exception, for
    what goes on where a part of it fails is to end, too."""


class Cancellable(nn.Module):
    """A network that asks before every pass whether its answer is still wanted. What is recorded asks but once: attack
    it in `satlib.device.unrecorded`."""

    pixel_dtype = torch.float32  # `logits_of` the network itself gives it what it wants

    def __init__(self, net: Network, superseded: Callable[[], bool]):
        super().__init__()
        self.net, self._superseded = net, superseded

    def forward(self, x: Tensor) -> Tensor:
        if self._superseded():
            raise Superseded
        return logits_of(self.net, x)


class CancellableOwn(Cancellable, OwnNetwork):
    """One of ours, which is folded where it is attacked."""

    def folded(self) -> Any:
        return Cancellable(self.net.folded(), self._superseded)


@dataclass(frozen=True, eq=False)
class Target:
    """A network with the images that it is attacked on. scene: what targeted attacks want to see everywhere, labels
    (H, W), for segmentation models only."""

    title: str
    model: Network
    splits: Splits
    scene: Tensor | None = None
    known: dict[tuple, Any] = field(default_factory=dict)  # answers that do not change while some settings stay

    @classmethod
    def of(
        cls, title: str, model: Network, images: Any, labels: Any, *, class_names: Sequence[str] = (), seed: int = 0
    ) -> "Target":
        """A network of yours, from pixels in 0..255 to logits, on images (n, C, H, W) with labels (n,) or (n, H, W): at
        random by `seed` half of them to craft on, half to score. Raises SatlibError for what the kernels do not take,
        for fewer than two images, and for another number of class_names than the network has classes."""
        x, y = as_images(images)[:], as_labels(labels, images)
        if len(x) < 2:
            raise SatlibError(f"{title}: {len(x)} image: expected at least 2, half of them to craft on")
        with evaluated(model), torch.no_grad():
            count = logits_of(model, x[:1].float()).shape[1]
        if count < 2:
            raise SatlibError(f"{title}: one logit: expected logits of two classes at least")
        names = tuple(map(str, class_names)) or tuple(f"class {number}" for number in range(count))
        if len(names) != count:
            raise SatlibError(f"{title}: {len(names)} class_names for {count} classes; give one each")
        x, y = x.float().round().to(torch.uint8), y.to(torch.uint8) if y.ndim > 1 else y
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
        craft, scored = (
            ImageSet(x[rows], y[rows], names, title, title, split)
            for split, rows in zip(("val", "test"), order.tensor_split(2), strict=True)
        )
        return cls(title, model, Splits(craft, craft, scored))

    @property
    def segments(self) -> bool:
        """Whether the model labels every pixel."""
        return self.splits.test.labels.ndim > 1

    @cached_property
    def net(self) -> Network:
        """What is attacked: of a network of ours a folded copy (`OwnNetwork.folded`), made once; others as they are."""
        return self.model.folded() if isinstance(self.model, OwnNetwork) else self.model

    @property
    def batch_size(self) -> int:
        """Images in a mini-batch of the universal attack."""
        return 4 if self.segments else 16

    def steps_at_once(self, images: int) -> int:
        """Steps on so many images that a first answer has time for; segmentation does more pixels in that time."""
        pixels = self.splits.test.images.shape[2:].numel()
        return max(4, int(QUICK_PASSES * 1024 / pixels / images * (1.25 if self.segments else 1.0)))

    def remembered(self, key: tuple, compute: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What was computed for the settings in the key before, or is now."""
        if key not in self.known:
            self.known[key] = compute(*arguments, **options)
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


@dataclass(frozen=True)
class Sharing:
    """A question: what do heaps of this size share? eps in pixel units."""

    sharedness: int = 8
    eps: float = 16.0
    steps: int = 20
    seed: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Attacked:
    """An answer. images, seen (n, C, H, W): without perturbation and with it, of which xi has n or one, in pixel units;
    clean, perturbed: predictions of both (n,) and their confidence (n,), or segmentations (n, H, W) and the mean over
    their pixels.

    won: the share of its decisions that the attack wins on each unseen image; curve: (eps, share of all of them) where
    it is known. steps: those that were made.
    """

    question: Attack
    target: Target
    images: Tensor
    seen: Tensor
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
    """An answer, for a mini-batch of so many images: BATCH where there are enough. xi: the perturbations of its heaps
    (heaps, C, H, W), pixel units.

    own, unseen: share of images that they fool, of their own heap and of images that they never saw (a mean over some
    of them); risks: mean 0-1 loss by the risk's name, in the order of section 4.2. steps: those that were made.
    """

    question: Sharing
    target: Target
    images: int
    xi: Tensor
    own: float
    unseen: float
    risks: dict[str, float]
    steps: int
    seconds: float


def attack(target: Target, question: Attack, superseded: Callable[[], bool] = lambda: False) -> Iterator[Attacked]:
    """Answers: after a few steps, after all of them, and with the curve over eps, of few steps.

    One perturbation for all is crafted on validation images; what is shown and scored are test images. Raises
    SatlibError on settings that the attack cannot work with, and Superseded.
    """
    net, targeted = Cancellable(target.net, superseded), question.target is not None
    counts = (16, 8) if target.segments else (UNSEEN, 32)  # fewer where each image needs a perturbation of its own
    scored, craft = target.splits.test.subset(slice(counts[question.own])), target.splits.val
    few = target.steps_at_once(target.batch_size)
    x, aim = scored.images.float(), _aim(target, question, scored.labels)

    def universal(eps: Sequence[float], steps: int) -> Tensor:
        options = {"targeted": targeted, "batch_size": min(target.batch_size, len(craft)), "snapshots": 1}
        generator, aims = torch.Generator().manual_seed(question.seed), _aim(target, question, craft.labels)
        return attacks.universal_pgd(net, craft.images, aims, eps=eps, steps=steps, generator=generator, **options)

    def curve(steps: int) -> tuple[tuple[float, float], ...]:
        rates = success_rates(net, scored.images, aim, universal(GRID, steps), targeted=targeted)
        return tuple(zip(GRID, rates.tolist(), strict=True))

    for steps in sorted({min(question.steps, few), question.steps}):
        began, made = time.perf_counter(), max(4, steps // 4) if question.own else steps
        if question.own:  # an image by itself needs fewer steps
            xi = heap_pgd(net, x, aim, sharedness=1, targeted=targeted, **_heap_settings(question, made))
        else:
            xi = universal([question.eps], steps)
        seen = perturb(x, xi, 1 if question.own else None)
        answer = Attacked(
            question=question,
            target=target,
            won=_won(net, seen, aim, targeted=targeted),
            images=x[:SHOWN],
            seen=seen[:SHOWN],
            labels=scored.labels[:SHOWN],
            xi=xi[:SHOWN],
            clean=_predicted(net, x[:SHOWN]),
            perturbed=_predicted(net, seen[:SHOWN]),
            steps=made,
            seconds=time.perf_counter() - began,
        )
        yield answer
    if not question.own:
        steps = min(question.steps, 2 * few)
        key = ("curve", steps, question.target, question.seed)  # it stays while eps moves
        yield replace(answer, curve=target.remembered(key, curve, steps))


def share(target: Target, question: Sharing, superseded: Callable[[], bool] = lambda: False) -> Iterator[Shared]:
    """Answers: after a few steps, then after all of them. The four risks are those of the mini-batch; the universal
    perturbation for it is crafted on validation images. Raises SatlibError, and Superseded."""
    if target.segments:
        raise SatlibError(f"{target.title} labels pixels: sharedness is explored on classifiers; choose one")
    net, test, craft = Cancellable(target.net, superseded), target.splits.test, target.splits.val
    count = min(BATCH, len(test) // 2)  # the others are those that no heap has seen
    if not count:
        raise SatlibError(f"{target.title}: {len(test)} image to score: sharing needs two at least")
    batch, unseen = test.subset(slice(count)), test.subset(slice(count, count + UNSEEN // 2))
    x, y, s = batch.images.float(), batch.labels, question.sharedness
    for steps in sorted({min(question.steps, target.steps_at_once(count)), question.steps}):
        began = time.perf_counter()
        xi = heap_pgd(net, x, y, sharedness=s, keep_best=True, **_heap_settings(question, steps))
        own = _won(net, perturb(x, xi, s), y, targeted=False).mean().item()
        settings, alone = (question.eps, steps, question.seed), _heap_settings(question, steps)
        for_all: dict[str, Any] = {"craft": (craft.images, craft.labels), "batch_size": target.batch_size}
        for_all |= {"eps": question.eps, "steps": 2 * steps, "snapshots": 1}
        for_all["generator"] = torch.Generator().manual_seed(question.seed)
        risks = {
            "expected": target.remembered(("expected",), expected_risk, net, x, y).error,
            "universal": target.remembered(("universal", *settings), universal_risk, net, x, y, **for_all).error,
            f"heap, s = {s}": own,
            "adversarial": target.remembered(("adversarial", *settings), adversarial_risk, net, x, y, **alone).error,
        }
        fooled = success_rates(net, unseen.images, unseen.labels, xi[:4]).mean().item()
        seconds = time.perf_counter() - began
        answer = {"xi": xi, "own": own, "unseen": fooled, "risks": risks, "steps": steps, "seconds": seconds}
        yield Shared(question=question, target=target, images=count, **answer)


def _heap_settings(question: Attack | Sharing, steps: int) -> dict[str, Any]:
    """What `heap_pgd` takes from a question."""
    sizes = attacks.annealed_step_sizes(question.eps, steps, beta=4.0, gamma=0.95)
    return {
        "eps": question.eps,
        "steps": steps,
        "step_size": sizes,
        "generator": torch.Generator().manual_seed(question.seed),
    }


def _won(net: nn.Module, images: Tensor, aim: Tensor, *, targeted: bool) -> Tensor:
    """The share of each image's decisions (n,) that the attack wins; pixels without a class do not count."""
    predicted = torch.cat([_predicted(net, part)[0] for part in images.split(attacks.images_at_once(images))])
    won, counted = attacks.decisions_won(predicted, aim, targeted=targeted)
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
    with exact(), evaluated(net):
        logits = logits_of(net, images).float()
    confidence, classes = logits.softmax(1).max(1)
    return classes, confidence.flatten(1).mean(1) if confidence.ndim > 1 else confidence


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
