"""Smallest perturbation that fools a model on a share delta of its inputs (section 5): universal, image-dependent."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from satlib.attacks import (
    AT_ONCE,
    annealed_step_sizes,
    decisions_won,
    heap_gradients,
    heap_pgd,
    perturb,
    spend,
    success_rates,
)
from satlib.checks import (
    check_known,
    check_model,
    check_overlap,
    check_threshold,
    kernel,
    outside,
    per_heap,
    told,
    warn_of_unit,
)
from satlib.data.imageset import IGNORE
from satlib.device import exact
from satlib.errors import SatlibError
from satlib.network import attackable, logits_of
from satlib.universal import UniversalAttack, check_attack, ensemble, name_of, named, options, takes

LARGEST = 255.0  # the search interval of section 5.2 is [0, 255]
BELOW = (0.82, 0.92)  # of the smallest success: where the k-ary search asks next
CLOSER = (0.95, 0.975)  # and where the best of several attacks do at last
ANYWHERE = (1 / 8, 1 / 4, 1 / 2, 1.0)  # of LARGEST, while there is none: a larger eps is not always easier to fill
COARSE = (1 / 32, 1 / 16, 1 / 8, 1 / 4)  # of LARGEST: where its short attack asks
TOLERANCE = 0.04  # how far, as a share of its eps, a winner of the short attack is clipped
SCORED = 2048  # of the crafting images, at most, whose rate is told
PROBED = 32  # images whose gradients a search looks at first
VANISHING = 1e-20  # what no entry of a usable gradient need exceed: signs do not get lost before
CHANCE = 0.05  # how far a success rate may fall, as eps grows, before it counts as more than chance
Labelled = tuple[Tensor, Tensor]  # images (n, C, H, W) in 0..255, and their labels


@dataclass(frozen=True)
class Evaluation:
    """One question of the search: does a perturbation with |xi| <= eps win a share delta?

    how: crafted for this eps by the attack at "full" length; by a "coarse", short attack that only says where to look;
    or "rescaled", clipped to eps from a larger perturbation that won. attack: its name; "" for the clean images.
    """

    eps: float
    magnitude: float  # largest |xi| of the perturbation
    rate: float  # its success rate on the images that the search decides on
    success: bool
    how: str = "full"
    attack: str = ""


@dataclass(frozen=True)
class Success:
    """The best of several attacks at one eps, on the images they were crafted on: its rate there, and on images that it
    never saw; and the rate of each attack on these."""

    eps: float
    rate: float
    craft_rate: float
    attack: str
    rates: dict[str, float]


Winner = tuple[Evaluation, Tensor]  # and its perturbation (1, C, H, W)


@dataclass(frozen=True)
class Robustness:
    """Result of a search: an upper bound on the model's robustness, and everything that led to it.

    epsilon: magnitude in pixel units of the smallest perturbation that reached delta; None where none did, which
    prints as "> 255". perturbation: that perturbation, (1, C, H, W); None with it. rate: its success rate on the
    deciding images; report_rate: on images that neither crafting nor search saw; craft_rate: on those that it was
    crafted on. evaluations: in their order. closest: where none did, the perturbation of the highest rate; else None.
    gradients: see `usable_gradients`. spent: how many images the attacks passed forward and backward.
    """

    delta: float
    epsilon: float | None
    rate: float | None
    report_rate: float | None
    evaluations: list[Evaluation]
    perturbation: Tensor | None = field(repr=False)
    closest: Tensor | None = field(repr=False, default=None)
    gradients: float = 1.0
    craft_rate: float | None = None
    spent: int = 0

    def __str__(self) -> str:
        return f"> {LARGEST:g}" if self.epsilon is None else f"{self.epsilon:.1f}"

    @property
    def attack(self) -> str | None:
        """The name of the attack that found the perturbation; "" where the clean images do, None where none did."""
        found = (e.attack for e in self.evaluations if e.success and e.magnitude == self.epsilon)
        return next(found, None)

    @property
    def missed(self) -> float:
        """The largest eps below `epsilon` at which an attack at full length missed delta: the answer's resolution."""
        return largest_miss(self.evaluations, self.epsilon)

    @property
    def monotone(self) -> bool:
        """False where an attack won clearly less at a larger eps than at a smaller one, and no other made up for it.

        A sign of a weak attack. The verdicts alone cannot tell: a binary search asks neither above a success nor below
        a miss.
        """
        full = [e for e in self.evaluations if e.how == "full"]
        best: dict[float, float] = {}  # of all attacks at each eps, no more than delta
        for e in full:
            best[e.eps] = max(best.get(e.eps, 0.0), min(e.rate, self.delta))
        pairs = ((small, large) for small, large in itertools.permutations(full, 2) if small.attack == large.attack)
        return all(
            best[large.eps] >= min(small.rate, self.delta) - CHANCE for small, large in pairs if small.eps < large.eps
        )


def largest_miss(evaluations: Iterable[Evaluation], epsilon: float | None) -> float:
    """The largest eps below epsilon, None for infinity, at which an attack at full length missed; 0 where none did."""
    bound = math.inf if epsilon is None else epsilon
    return max((e.eps for e in evaluations if e.how == "full" and not e.success and e.eps < bound), default=0.0)


@kernel
def universal_robustness(
    attack: UniversalAttack | Sequence[UniversalAttack] | nn.Module,
    model: nn.Module | None = None,
    *,
    craft: Labelled,
    choose: Labelled,
    report: Labelled,
    delta: float = 0.75,
    iterations: int = 10,
    search: str = "binary",
    targeted: bool = False,
    warm_start: bool = False,
    generator: torch.Generator | None = None,
    progress: Callable[[str, float], None] | None = None,
    **settings: Any,
) -> Robustness:
    """eps_uni(delta) of section 5.2: the smallest perturbation found that wins a share delta of the `choose` images.

    It is crafted on the `craft` images by `attack`: one of `satlib.universal.ATTACKS`, any other `UniversalAttack`, or
    several, of which one that found the smallest success so far goes on from it, where it takes a `start`. Where only a
    model is given, the paper's attack is meant, with what is further given as its `settings`. Its rate on the `report`
    images, which neither crafting nor search saw, is returned beside it. progress(text, done) follows every pass.

    search "binary" is the paper's: `iterations` halvings of [0, 255]. "k-ary" is ours: several eps are heaps of one
    pass (`k_ary_search`), and clipping refines to the same resolution of 255 / 2^iterations. warm_start, beyond the
    paper: attacks start from the smallest success so far, clipped to their eps.

    Raises SatlibError on delta outside (0, 1), iterations < 1, an unknown search, attacks that take no `targeted` or
    `start` where they get one, and what an attack raises on its arguments: all before the model is asked.
    """
    check_known(SEARCHES, search=search)
    if model is None:
        attack, model = named("paper", **settings), attack
    elif settings:
        raise SatlibError(f"{next(iter(settings))}: unknown; give settings to the attack: named(name, setting=value)")
    attacks = list(attack) if isinstance(attack, list | tuple) else [attack]
    if not attacks or not all(map(callable, attacks)):
        raise SatlibError(f"attack={told(attack)}: expected one like those of satlib.universal.ATTACKS, or several")
    for each in attacks:
        for wanted, name, argument in ((targeted, "targeted", "targeted"), (warm_start, "warm_start", "start")):
            if wanted and not takes(each, argument):
                raise SatlibError(f"{name}=True: attack {name_of(each)!r} takes no {argument}; leave it out")
    sets = {"craft": craft, "choose": choose, "report": report}
    check_overlap(**sets)
    with attackable(model) as net:
        for each in attacks:
            check_attack(each, net, *craft, eps=[LARGEST / 2], **({"targeted": True} if targeted else {}))
        for name, pair in sets.items():
            check_model(net, *pair, name=f"{name} labels")
        gradients = usable_gradients(net, *craft)
        before = spend(0)
        asked = Search(net, attacks, craft, choose, delta, targeted, warm_start, generator, progress)
        if asked.best is None:  # else the clean images do
            SEARCHES[search](asked, iterations)
        evaluation, xi = asked.best or (None, None)
        seen = craft[0][:SCORED], craft[1][:SCORED]
        return Robustness(
            delta=delta,
            epsilon=evaluation and evaluation.magnitude,
            rate=evaluation and evaluation.rate,
            report_rate=None if xi is None else success_rates(net, *report, xi, targeted=targeted).item(),
            evaluations=asked.evaluations,
            perturbation=xi,
            closest=asked.closest if xi is None else None,
            gradients=gradients,
            craft_rate=None if xi is None else success_rates(net, *seen, xi, targeted=targeted).item(),
            spent=spend(0) - before,
        )


@kernel
def strongest(
    model: nn.Module,
    *,
    craft: Labelled,
    choose: Labelled,
    report: Labelled,
    delta: float = 0.75,
    targeted: bool = False,
    effort: float = 1,
    generator: torch.Generator | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Robustness:
    """eps_uni(delta) by a fixed sequence of attacks, `satlib.universal.ensemble`: the bound that one should believe.

    There is nothing to tune. The attacks take turns: each is asked only below the smallest success so far, and goes on
    below its own, by the k-ary search. effort: how many times as many steps as usual; what 2 gains over 1 says how far
    from its end the search is. Everything else as in `universal_robustness`; of the result, `attack` names what found
    the perturbation, and `spent` says what it took.
    """
    attacks = ensemble(len(craft[0]), segmentation=craft[1].ndim > 1, targeted=targeted, effort=effort)
    sets: dict[str, Any] = {"craft": craft, "choose": choose, "report": report, "delta": delta, "targeted": targeted}
    return universal_robustness(attacks, model, search="k-ary", generator=generator, progress=progress, **sets)


@kernel
def success_curve(
    model: nn.Module,
    *,
    craft: Labelled,
    report: Labelled,
    epsilons: Sequence[float],
    start: Tensor | None = None,
    targeted: bool = False,
    effort: float = 1,
    generator: torch.Generator | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> list[Success]:
    """Success of the ensemble's attacks at full length at each of `epsilons`: the best of them on the crafting images,
    and its rate on the `report` images.

    start (1, C, H, W): a perturbation such as `strongest` finds, from which, scaled to each eps, the attack that aims
    goes on, where it is asked: not with targets. progress(text, done) follows each attack. The curve orders models also
    where no search succeeds, and shows what a single number hides.
    """
    bound = per_heap(epsilons, None, craft[0].device)
    warn_of_unit(epsilons)
    check_overlap(craft=craft, report=report)
    if start is not None and start.shape != (expected := (1, *craft[0].shape[1:])):
        raise SatlibError(f"start of shape {tuple(start.shape)}: expected {expected}")
    few = craft[0][:SCORED], craft[1][:SCORED]
    attacks = ensemble(len(craft[0]), segmentation=craft[1].ndim > 1, targeted=targeted, effort=effort)
    given: dict[str, Any] = {"eps": bound.flatten().tolist(), "generator": generator}
    given |= {"targeted": True} if targeted else {}
    begun = None if start is None else (start / start.abs().max().clamp(min=1e-30)).to(bound.device) * bound
    seen: dict[str, list[float]] = {}
    unseen: dict[str, list[float]] = {}
    with attackable(model) as net:
        for name, pair in (("craft", craft), ("report", report)):
            check_model(net, *pair, name=f"{name} labels")
        for attack in attacks:
            goes_on = begun is not None and name_of(attack) == "aimed"
            xi = attack(net, *craft, **given | ({"start": begun} if goes_on else {}))
            seen[name_of(attack)] = success_rates(net, *few, xi, targeted=targeted).tolist()
            unseen[name_of(attack)] = success_rates(net, *report, xi, targeted=targeted).tolist()
            if progress:
                outside(progress)(f"success at {len(bound)} sizes by {name_of(attack)}", len(seen) / len(attacks))
    curve = []
    for i, eps in enumerate(given["eps"]):
        best = max(seen, key=lambda name: seen[name][i])
        rates = {name: each[i] for name, each in unseen.items()}
        curve.append(Success(eps, rates[best], seen[best][i], best, rates))
    return curve


@dataclass
class Search:
    """What has been asked so far, and the smallest perturbation that won a share delta of the `choose` images."""

    net: nn.Module
    attacks: Sequence[UniversalAttack]
    images: Labelled  # to craft on
    choose: Labelled
    delta: float
    targeted: bool
    warm_start: bool
    generator: torch.Generator | None
    progress: Callable[[str, float], None] | None
    evaluations: list[Evaluation] = field(default_factory=list)
    best: Winner | None = None
    closest: Tensor | None = None
    names: list[str] = field(default_factory=list)  # of the attacks; of several with one name the others are numbered

    def __post_init__(self) -> None:
        for name in map(name_of, self.attacks):
            again = sum(each.rpartition(" #")[0] == name or each == name for each in self.names)
            self.names.append(f"{name} #{again + 1}" if again else name)
        self.evaluate(0.0, torch.zeros_like(self.images[0][:1], dtype=torch.float32), "full")

    @property
    def smallest(self) -> float:
        """The magnitude of the smallest success so far, infinite where there is none."""
        return self.best[0].magnitude if self.best else math.inf

    def evaluate(self, eps: float, xi: Tensor, how: str, attack: str = "") -> Evaluation:
        """Whether xi (1, C, H, W) wins a share delta; the answer is noted, and the smallest success kept."""
        rate = success_rates(self.net, *self.choose, xi, targeted=self.targeted).item()
        success = rate >= self.delta - 1e-7  # rates are float32, where 7 of 10 is a little less than 0.7
        evaluation = Evaluation(eps, xi.abs().max().item(), rate, success, how, attack)
        if all(rate > e.rate for e in self.evaluations):
            self.closest = xi
        self.evaluations.append(evaluation)
        if success and evaluation.magnitude < self.smallest:
            self.best = evaluation, xi
        return evaluation

    def craft(self, number: int, epsilons: Sequence[float], how: str = "full") -> Iterator[Winner]:
        """One pass of an attack for all `epsilons` at once; those that win, evaluated one by one.

        A "coarse" pass has a fifth of the attack's steps and no snapshots, where it has such settings. One of several
        attacks goes on from the smallest success, where that is its own.
        """
        attack, name = self.attacks[number], self.names[number]
        given: dict[str, Any] = {"targeted": True} if self.targeted else {}
        own = len(self.attacks) > 1 and takes(attack, "start") and self.best and self.best[0].attack == name
        if self.best and (self.warm_start or own):
            given["start"] = torch.cat([self.best[1].clamp(-eps, eps) for eps in epsilons])
        if how == "coarse":
            known = options(attack)
            short = {"steps": max(1, known.get("steps", 0) // 5), "snapshots": 1}
            given |= {setting: value for setting, value in short.items() if setting in known}
        xis = attack(self.net, *self.images, eps=list(epsilons), generator=self.generator, **given)
        if xis.shape != (expected := (len(epsilons), *self.images[0].shape[1:])):
            raise SatlibError(f"attack {name!r} returns shape {tuple(xis.shape)}: expected {tuple(expected)}")
        if not bool(xis.isfinite().all()):
            warnings.warn(f"attack {name!r} returns NaN or infinite values: they count as 0", stacklevel=4)
            xis = xis.nan_to_num(0.0, 0.0, 0.0)
        asked = ((self.evaluate(eps, xi, how, name), xi) for eps, xi in zip(epsilons, xis.split(1), strict=True))
        return (winner for winner in asked if winner[0].success)

    def rescale(self, winner: Winner, below: float, resolution: float) -> None:
        """Bisect how far a winner can be clipped and still win; only if it undercuts the best.

        At most to the largest eps under `below` at which the same attack at full length missed delta.
        """
        evaluation, xi = winner
        own = (e for e in self.evaluations if e.attack in ("", evaluation.attack))  # what others missed says nothing
        full = [e for e in own if e.how == "full" and e.eps < below]
        low = max({e.eps for e in full} - {e.eps for e in full if e.success})

        def wins(eps: float) -> bool:
            return self.evaluate(eps, xi.clamp(-eps, eps), "rescaled", evaluation.attack).success

        high = min(self.smallest, evaluation.magnitude) - resolution
        if high <= low or not wins(high):
            return
        while high - low > resolution:
            eps = (low + high) / 2
            low, high = (low, eps) if wins(eps) else (eps, high)

    def nearly(self) -> list[int]:
        """The attack that found the smallest success, then those that at a smaller eps came within CHANCE of one."""
        missed = [e for e in self.evaluations if e.how == "full" and e.eps < self.smallest]
        near = {e.attack for e in missed if e.rate >= self.delta - CHANCE}
        first = self.best[0].attack if self.best else ""
        numbers = [number for number, name in enumerate(self.names) if name == first or name in near]
        return sorted(numbers, key=lambda number: self.names[number] != first)

    def report(self, done: float) -> None:
        """Report the last question, by the attack that did best."""
        if self.progress:
            eps = self.evaluations[-1].eps
            best = max((e for e in self.evaluations if e.eps == eps), key=lambda e: e.rate)
            verdict = "reached" if best.success else "missed"
            outside(self.progress)(f"eps {eps:.1f} -> success {best.rate:.1%}, {self.delta:.0%} {verdict}", done)


def binary_search(search: Search, iterations: int) -> None:
    """The paper's search (section 5.2): below the middle of the interval after a success, else above."""
    low, high = 0.0, LARGEST
    for step in range(iterations):
        eps = (low + high) / 2
        won = [winner for number in range(len(search.attacks)) for winner in search.craft(number, [eps])]
        low, high = (low, eps) if won else (eps, high)
        search.report((step + 1) / iterations)


def k_ary_search(search: Search, iterations: int) -> None:
    """Our search: a short pass says where to look, a full one asks there, and clipping settles the last bits.

    All eps of a pass are heaps of one attack, so that the two passes take the time of little more than one. The
    short attack is weak, but what it finds within a large eps, clipped, wins within a smaller one, too. The full
    attack then asks below that; as long as it wins even at the smallest eps asked, it asks again below. Of several
    attacks the first one looks, and then each in turn asks below what those before it have found; the one that found
    most, and those that nearly did, ask once more, close by.
    """

    def settle(number: int, asked: list[float]) -> float | None:
        """Ask an attack, and clip what wins at the smallest eps, which is returned; None where nothing wins."""
        winners = list(search.craft(number, asked))
        lowest = min((evaluation.eps for evaluation, _ in winners), default=None)
        for evaluation, xi in winners:
            if evaluation.eps == lowest:
                search.rescale((evaluation, xi), lowest, resolution)
        return lowest

    resolution = LARGEST / 2**iterations
    coarse = search.craft(0, [share * LARGEST for share in COARSE], "coarse")
    for evaluation, xi in itertools.islice(coarse, 2):
        search.rescale((evaluation, xi), evaluation.eps, max(resolution, TOLERANCE * evaluation.eps))
    parts = len(search.attacks) + (len(search.attacks) > 1)
    for turn in range(len(search.attacks)):
        search.report((turn + 0.3) / parts)
        for _ in range(iterations):
            known = search.best is not None
            asked = [share * min(search.smallest, LARGEST) for share in (BELOW if known else ANYWHERE)]
            lowest = settle(turn, asked)
            search.report((turn + 1) / parts)
            if lowest is None or (known and lowest != asked[0]):
                break
        if search.best and lowest is None:
            search.rescale(search.best, search.smallest, resolution)  # so far only coarsely
    if search.best and len(search.attacks) > 1:
        for number in search.nearly():
            settle(number, [share * search.smallest for share in CLOSER])
    if len(search.attacks) > 1:
        search.report(1.0)


SEARCHES = {"binary": binary_search, "k-ary": k_ary_search}


@dataclass(frozen=True)
class ImageRobustness:
    """Result of the image-dependent search. epsilons (n,): smallest success for each image with a label that counts, in
    pixel units, inf where none was found. epsilon: the smallest magnitude at which a share delta is fooled, or in
    segmentation the mean over the images, of which those without success count as 255; None, where none is fooled,
    prints "> 255". gradients: see `usable_gradients`."""

    delta: float
    epsilon: float | None
    epsilons: Tensor = field(repr=False)
    gradients: float = 1.0

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


@kernel
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
    straight_through: bool = True,
    generator: torch.Generator | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> ImageRobustness:
    """eps_adv(delta) of section 5.1 by the same binary search, every image with an interval of its own.

    A heap of one image can carry its own eps, so one pass of `heap_pgd` asks a whole mini-batch a different
    question for every image. eps_adv(delta) is then the smallest eps within which a share delta of the images
    has been fooled: never above what one common interval would find. images (n, C, H, W), labels (n,). In segmentation,
    labels (n, H, W), an image is fooled when a share delta of its labelled pixels is won, and eps_adv is the mean over
    the images (section 6.3). progress(text, done) follows every question.

    Raises SatlibError on delta outside (0, 1) or iterations < 1, and what `heap_pgd` raises.
    """
    check_threshold(loss_threshold, targeted)
    relative = torch.tensor(annealed_step_sizes(1.0, steps, beta=beta, gamma=gamma))[:, None]
    attack: dict[str, Any] = {"sharedness": 1, "steps": steps, "targeted": targeted, "keep_best": True}
    attack |= {"loss_threshold": loss_threshold, "label_smoothing": label_smoothing, "generator": generator}
    attack["straight_through"] = straight_through
    smallest = []
    with attackable(model) as net:
        check_model(net, images, labels)
        images, labels = _labelled(images, labels)
        gradients = usable_gradients(net, images, labels)
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            x = x.float()
            low = torch.zeros(len(x), device=x.device)
            high = torch.full_like(low, LARGEST)
            best = torch.where(_fooled(net, x, y, targeted, delta), 0.0, math.inf)
            for asked in range(iterations):
                eps = (low + high) / 2
                xi = heap_pgd(net, x, y, eps=eps, step_size=relative * eps.cpu(), **attack)
                won = _fooled(net, perturb(x, xi, 1), y, targeted, delta)
                magnitude = xi.abs().flatten(1).amax(1)
                best = torch.where(won, torch.minimum(best, magnitude), best)
                low, high = torch.where(won, low, eps), torch.where(won, eps, high)
                if progress:
                    done = (batch_size * len(smallest) + len(x) * (asked + 1) / iterations) / len(images)
                    outside(progress)(f"a perturbation for each of {len(images)} images, question {asked + 1}", done)
            smallest.append(best)
    epsilons = torch.cat(smallest)
    if labels.ndim > 1:
        mean = epsilons.clamp(max=LARGEST).mean().item() if epsilons.isfinite().any() else None
        return ImageRobustness(delta, mean, epsilons.cpu(), gradients)
    fewest = max(1, math.ceil(delta * len(epsilons) - 1e-9))  # 0.56 * 25 is a little more than 14
    at_delta = epsilons.sort().values[fewest - 1].item()
    return ImageRobustness(delta, None if math.isinf(at_delta) else at_delta, epsilons.cpu(), gradients)


def _labelled(images: Tensor, labels: Tensor) -> Labelled:
    """Those of the images with a label that counts: in segmentation all pixels may be ignored. Warns of others."""
    counted = (labels != IGNORE).flatten(1).any(1) if labels.ndim > 1 else torch.ones(len(labels), dtype=torch.bool)
    if bool(counted.all()):
        return images, labels
    warnings.warn(f"{int((~counted).sum())} of {len(labels)} images have no labelled pixel: left out", stacklevel=4)
    return images[counted], labels[counted]


@torch.no_grad()
def _fooled(model: nn.Module, images: Tensor, labels: Tensor, targeted: bool, delta: float) -> Tensor:
    """Which of the images are fooled: their decision, or in segmentation a share delta of their labelled pixels."""
    with exact():
        won, counted = decisions_won(logits_of(model, images).argmax(1), labels, targeted=targeted)
    return won >= (delta - 1e-7) * counted


@torch.enable_grad()
def usable_gradients(net: Any, images: Tensor, labels: Tensor) -> float:
    """Share of the first images whose loss has a usable gradient: finite, and nowhere near zero in all pixels.

    Without one, an attack by gradients does not move, and what it does not find says nothing. Warns where fewer than
    half of the images have one, and where two passes of the same images differ, as a network's own noise makes them.
    """
    size = min(PROBED, max(1, AT_ONCE // images[:1].shape.numel()))
    usable = []
    counted = (labels != IGNORE).flatten(1).any(1).nonzero()[:PROBED, 0] if labels.ndim > 1 else slice(PROBED)
    for x, y in zip(images[counted].split(size), labels[counted].split(size), strict=True):
        nothing = torch.zeros_like(x, dtype=torch.float32)
        largest = heap_gradients(net, x.float(), y, nothing, sharedness=1)[0].abs().flatten(1).amax(1)
        usable.append((largest > VANISHING) & largest.isfinite())
    share = torch.cat(usable).float().mean().item()
    if share < 0.5:
        few = f"{share:.0%} of the images have a usable gradient"
        warnings.warn(f"{few}, neither zero nor infinite: what no attack finds here may well exist", stacklevel=4)
    with torch.no_grad(), exact():
        one, other = logits_of(net, x.float()), logits_of(net, x.float())
    if (one - other).abs().max() > 1e-3 * one.abs().max():
        warnings.warn("two passes of the same images give different logits: success rates are random", stacklevel=4)
    return share
