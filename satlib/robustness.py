"""Smallest perturbation that fools a model on a share delta of its inputs (section 5): universal, image-dependent."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from satlib.attacks import attackable, heap_pgd, success_rates, universal_pgd
from satlib.checks import check_model, check_pair, check_universal
from satlib.data.imageset import IGNORE
from satlib.errors import SatlibError

LARGEST = 255.0  # the search interval of section 5.2 is [0, 255]
BELOW = (0.82, 0.92)  # of the smallest success: where the k-ary search asks next
ANYWHERE = (1 / 8, 1 / 4, 1 / 2, 1.0)  # of LARGEST, while there is none: a larger eps is not always easier to fill
SKETCHED = (1 / 32, 1 / 16, 1 / 8, 1 / 4)  # of LARGEST: where its short attack asks
COARSE = 0.04  # how far, as a share of its eps, a winner of the short attack is clipped
CHANCE = 0.05  # how far a success rate may fall, as eps grows, before it counts as more than chance
Labelled = tuple[Tensor, Tensor]  # images (n, C, H, W) in 0..255, and their labels


@dataclass(frozen=True)
class Evaluation:
    """One question of the search: does a perturbation with |xi| <= eps win a share delta?

    how: "crafted" for this eps by the attack at full length, "sketched" by a short attack that only says where to
    look, or "clipped" to eps from a larger perturbation that won.
    """

    eps: float
    magnitude: float  # largest |xi| of the perturbation
    rate: float  # its success rate on the images that the search decides on
    success: bool
    how: str = "crafted"


@dataclass(frozen=True)
class Robustness:
    """Result of a search: an upper bound on the model's robustness, and everything that led to it.

    epsilon: magnitude in pixel units of the smallest perturbation that reached delta; None where none did, which
    prints as "> 255". perturbation: that perturbation, (1, C, H, W); None with it. rate: its success rate on the
    deciding images; report_rate: on images that neither crafting nor search saw. evaluations: in their order.
    closest: where none did, the perturbation of the highest rate; else None.
    """

    delta: float
    epsilon: float | None
    rate: float | None
    report_rate: float | None
    evaluations: list[Evaluation]
    perturbation: Tensor | None = field(repr=False)
    closest: Tensor | None = field(repr=False, default=None)

    def __str__(self) -> str:
        return f"> {LARGEST:g}" if self.epsilon is None else f"{self.epsilon:.1f}"

    @property
    def monotone(self) -> bool:
        """False where a larger eps missed delta by clearly more than a smaller one did: a sign of a weak attack.

        The verdicts alone cannot tell: a binary search asks neither above a success nor below a miss.
        """
        crafted = [e for e in self.evaluations if e.how == "crafted"]
        rates = [min(e.rate, self.delta) for e in sorted(crafted, key=lambda e: e.eps)]
        return all(larger >= smaller - CHANCE for smaller, larger in itertools.combinations(rates, 2))


def universal_robustness(
    model: nn.Module,
    *,
    craft: Labelled,
    choose: Labelled,
    report: Labelled,
    delta: float = 0.75,
    iterations: int = 10,
    search: str = "binary",
    targeted: bool = False,
    restarts: int = 1,
    warm_start: bool = False,
    generator: torch.Generator | None = None,
    progress: Callable[[str, float], None] | None = None,
    **attack: Any,
) -> Robustness:
    """eps_uni(delta) of section 5.2: the smallest perturbation found that wins a share delta of the `choose` images.

    Perturbations are crafted with `universal_pgd` on the `craft` images, to which `attack` goes (steps, batch_size,
    beta, gamma, loss_threshold, label_smoothing, ...). The smallest success of the whole search counts, and its
    rate on the `report` images, which neither saw, is returned beside it. progress(text, done) follows every pass.

    search "binary" is the paper's: `iterations` halvings of [0, 255], an attack for each. "k-ary" is ours: several eps
    are heaps of one pass (`k_ary_search`), and clipping refines to the same resolution of 255 / 2^iterations.

    Beyond the paper: `restarts` perturbations are crafted for each eps, and the best on the crafting images is asked
    about; with warm_start an attack starts from the smallest success so far, clipped to its eps, where there is one.

    Raises SatlibError on delta outside (0, 1), iterations < 1, restarts < 1, an unknown search, and what
    `universal_pgd` raises.
    """
    _check_search(delta, iterations)
    if restarts < 1:
        raise SatlibError(f"restarts={restarts!r}: expected at least 1")
    if search not in SEARCHES:
        raise SatlibError(f"search={search!r}: expected one of {', '.join(SEARCHES)}")
    check_universal(*craft, targeted=targeted, **attack)
    for pair in (choose, report):
        check_pair(*pair)
    with attackable(model) as net:
        check_model(net, *craft)
        options = attack | {"targeted": targeted, "generator": generator}
        hunt = Hunt(net, craft, choose, delta, options, progress, restarts=restarts, warm_start=warm_start)
        if hunt.best is None:  # else the clean images do
            SEARCHES[search](hunt, iterations)
        return Robustness(
            delta=delta,
            epsilon=hunt.smallest if hunt.best is not None else None,
            rate=hunt.best_rate,
            report_rate=None if hunt.best is None else success_rates(net, *report, hunt.best, targeted=targeted).item(),
            evaluations=hunt.evaluations,
            perturbation=hunt.best,
            closest=hunt.closest if hunt.best is None else None,
        )


class Hunt:
    """What a search has asked so far, and the smallest perturbation that won a share delta of the `choose` images."""

    def __init__(
        self,
        net: nn.Module,
        craft: Labelled,
        choose: Labelled,
        delta: float,
        attack: dict[str, Any],
        progress: Callable[[str, float], None] | None,
        *,
        restarts: int = 1,
        warm_start: bool = False,
    ) -> None:
        self.restarts, self.warm_start = restarts, warm_start
        self.net, self.images, self.choose, self.attack = net, craft, choose, attack
        self.delta, self.progress = delta, progress
        self.least = delta - 1e-7  # rates are float32, where 7 of 10 is a little less than 0.7
        self.evaluations: list[Evaluation] = []
        self.best: Tensor | None = None
        self.best_rate: float | None = None
        self.smallest = math.inf
        self.closest: Tensor | None = None
        self.judge(0.0, torch.zeros_like(craft[0][:1], dtype=torch.float32), "crafted")

    def judge(self, eps: float, xi: Tensor, how: str) -> bool:
        """Whether xi (1, C, H, W) wins a share delta; the answer is noted, and the smallest success kept."""
        rate = success_rates(self.net, *self.choose, xi, targeted=self.attack["targeted"]).item()
        evaluation = Evaluation(eps, xi.abs().max().item(), rate, rate >= self.least, how)
        if all(rate > e.rate for e in self.evaluations):
            self.closest = xi
        self.evaluations.append(evaluation)
        if evaluation.success and evaluation.magnitude < self.smallest:
            self.best, self.best_rate, self.smallest = xi, rate, evaluation.magnitude
        return evaluation.success

    def craft(self, epsilons: Sequence[float], how: str = "crafted", **changes: Any) -> Iterator[tuple[float, Tensor]]:
        """One pass of the attack for all `epsilons` at once; (eps, xi) of those that win, judged one by one."""
        if self.warm_start and self.best is not None:
            changes["start"] = torch.cat([self.best.clamp(-eps, eps) for eps in epsilons for _ in range(self.restarts)])
        asked = [eps for eps in epsilons for _ in range(self.restarts)]
        xis = universal_pgd(self.net, *self.images, eps=asked, **self.attack | changes)
        found = xis.split(1)
        if self.restarts > 1:
            rates = success_rates(self.net, *self.images, xis, targeted=self.attack["targeted"])
            best = rates.view(-1, self.restarts).argmax(1).tolist()
            found = [found[i * self.restarts + which] for i, which in enumerate(best)]
        return ((eps, xi) for eps, xi in zip(epsilons, found, strict=True) if self.judge(eps, xi, how))

    def clip(self, xi: Tensor, low: float, resolution: float) -> None:
        """Bisect how far a winner can be clipped, at most to `low`, and still win; only if it undercuts the best."""
        high = min(self.smallest, xi.abs().max().item()) - resolution
        if high <= low or not self.judge(high, xi.clamp(-high, high), "clipped"):
            return
        while high - low > resolution:
            eps = (low + high) / 2
            low, high = (low, eps) if self.judge(eps, xi.clamp(-eps, eps), "clipped") else (eps, high)

    def missed(self, eps: float) -> float:
        """The largest eps below `eps` at which the attack at full length missed delta."""
        return max(e.eps for e in self.evaluations if e.how == "crafted" and not e.success and e.eps < eps)

    def say(self, done: float) -> None:
        """Report the last question."""
        if self.progress:
            last = self.evaluations[-1]
            verdict = "reached" if last.success else "missed"
            self.progress(f"eps {last.eps:.1f} -> success {last.rate:.1%}, {self.delta:.0%} {verdict}", done)


def binary_search(hunt: Hunt, iterations: int) -> None:
    """The paper's search (section 5.2): below the middle of the interval after a success, else above."""
    low, high = 0.0, LARGEST
    for step in range(iterations):
        eps = (low + high) / 2
        low, high = (low, eps) if list(hunt.craft([eps])) else (eps, high)
        hunt.say((step + 1) / iterations)


def k_ary_search(hunt: Hunt, iterations: int) -> None:
    """Our search: a short pass says where to look, a full one asks there, and clipping settles the last bits.

    All eps of a pass are heaps of one attack, so that the two passes take the time of little more than one. The
    short attack is weak, but what it finds within a large eps, clipped, wins within a smaller one, too. The full
    attack then asks below that; as long as it wins even at the smallest eps asked, it asks again below.
    """
    resolution = LARGEST / 2**iterations
    steps = max(1, hunt.attack.get("steps", 200) // 5)
    sketches = hunt.craft([share * LARGEST for share in SKETCHED], "sketched", steps=steps, snapshots=1)
    for eps, xi in itertools.islice(sketches, 2):
        hunt.clip(xi, 0.0, max(resolution, COARSE * eps))
    hunt.say(0.3)
    winners: dict[float, Tensor] = {}
    for _ in range(iterations):
        shares = ANYWHERE if hunt.best is None else BELOW
        asked = [share * min(hunt.smallest, LARGEST) for share in shares]
        winners = dict(hunt.craft(asked))
        if winners:
            eps = min(winners)
            hunt.clip(winners[eps], hunt.missed(eps), resolution)
        hunt.say(1.0)
        if asked[0] not in winners:
            break
    if hunt.best is not None and not winners:
        hunt.clip(hunt.best, hunt.missed(hunt.smallest), resolution)  # so far only coarsely


SEARCHES = {"binary": binary_search, "k-ary": k_ary_search}


@dataclass(frozen=True)
class ImageRobustness:
    """Result of the image-dependent search. epsilons (n,): smallest success for each image in pixel units, inf
    where none was found. epsilon: the smallest magnitude at which a share delta is fooled, or in segmentation the mean
    over the images, of which those without success count as 255; None, where none is fooled, prints "> 255"."""

    delta: float
    epsilon: float | None
    epsilons: Tensor = field(repr=False)

    @property
    def standard_error(self) -> float | None:
        """Of the mean of the epsilons, counted as there; None for a single one."""
        known = self.epsilons.clamp(max=LARGEST)
        return (known.std() / math.sqrt(len(known))).item() if len(known) > 1 else None

    @property
    def unreached(self) -> int:
        """Images that nothing fooled."""
        return int(self.epsilons.isinf().sum())

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

    In segmentation, labels (n, H, W), an image is fooled when a share delta of its labelled pixels is won, and eps_adv
    is the mean over the images (section 6.3).

    Raises SatlibError on delta outside (0, 1) or iterations < 1, and what `heap_pgd` raises.
    """
    _check_search(delta, iterations)
    check_universal(
        images,
        labels,
        steps=steps,
        beta=beta,
        gamma=gamma,
        targeted=targeted,
        loss_threshold=loss_threshold,
    )
    relative = torch.tensor([gamma**k for k in range(steps)])
    relative = beta * relative / relative.sum()
    smallest = []
    with attackable(model) as net:
        check_model(net, images, labels)
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            x = x.float().contiguous(memory_format=torch.channels_last)
            fooled = _wins(net, x, y, targeted, delta)
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
                won = _wins(net, (x + xi).clamp(0, 255), y, targeted, delta)
                magnitude = xi.abs().flatten(1).amax(1)
                best = torch.where(won, torch.minimum(best, magnitude), best)
                low, high = torch.where(won, low, eps), torch.where(won, eps, high)
            smallest.append(best)
    epsilons = torch.cat(smallest)
    if labels.ndim > 1:
        mean = epsilons.clamp(max=LARGEST).mean().item() if epsilons.isfinite().any() else None
        return ImageRobustness(delta, mean, epsilons.cpu())
    fewest = max(1, math.ceil(delta * len(epsilons) - 1e-9))  # 0.56 * 25 is a little more than 14
    at_delta = epsilons.sort().values[fewest - 1].item()
    return ImageRobustness(delta, None if math.isinf(at_delta) else at_delta, epsilons.cpu())


@torch.no_grad()
def _wins(model: nn.Module, images: Tensor, labels: Tensor, targeted: bool, delta: float) -> Tensor:
    """Which of the images are fooled: their decision, or in segmentation a share delta of their labelled pixels."""
    predicted = model(images).argmax(1)
    won = predicted == labels if targeted else predicted != labels
    if labels.ndim == 1:
        return won
    counted = labels != IGNORE
    return (won & counted).flatten(1).sum(1) >= (delta - 1e-7) * counted.flatten(1).sum(1)


def _check_search(delta: float, iterations: int) -> None:
    if not 0 < delta < 1:
        raise SatlibError(f"delta={delta!r}: expected a share strictly between 0 and 1")
    if iterations < 1:
        raise SatlibError(f"iterations={iterations!r}: expected at least 1")
