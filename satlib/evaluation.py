"""How robust is a network to universal perturbations? One call, which returns a `Card` of everything that it found."""

import contextlib
import hashlib
import math
import platform
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from satlib import checks
from satlib.attacks import heap_gradients, perturb, success_rates
from satlib.card import BY, SHOWN, Card, Examples
from satlib.checks import check_model, kernel
from satlib.data.imageset import IGNORE
from satlib.device import device_name, exact, fastest_dtype
from satlib.errors import SatlibError
from satlib.evaluation_checks import checks as judged
from satlib.evaluation_checks import measure, noises
from satlib.network import Network, attackable, evaluated, logits_of, weights_dtype
from satlib.progress import Progress, duration
from satlib.robustness import (
    Labelled,
    Robustness,
    adversarial_robustness,
    strongest,
    success_curve,
    universal_robustness,
)
from satlib.universal import named

R = TypeVar("R")
LEAST = {"craft": 8, "choose": 4, "report": 4}  # images of each set
PASSES = 650_000  # of one image, forward and backward: about what all parts take at effort 1 with three seeds
EFFORTS = (0.05, 1.0)  # what a budget may ask for
SINGLE = 64  # images that are attacked one by one
DELTA = {False: 0.75, True: 0.95}  # by whether it is segmentation
REACHED = 0.9  # of what a pattern wins that sends everything into the rarest class


class _Spent(Exception):
    """The budget is over."""


class _Clock:
    """The parts of an evaluation, told as they go on, until its budget is spent."""

    def __init__(self, budget: float | None, progress: Callable[[str, float], None], parts: int) -> None:
        self.start, self.budget, self.parts, self.done = time.monotonic(), budget, parts, 0
        self.progress, self.skipped = checks.outside(progress), list[str]()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def part(
        self,
        title: str,
        work: Callable[[Callable[[str, float], None]], R],
        *,
        needed: bool = False,
        short: bool = False,
    ) -> R | None:
        """What the work returns, which is given a function to tell how far it is; None where the budget ends it, or it
        fails and is not `needed`, for then the other parts count. short: so little work that no budget ends it."""

        def tell(text: str, share: float) -> None:
            if self.budget is not None and self.seconds > self.budget and share < 1 and not short:
                raise _Spent
            self.progress(f"{title}: {text}" if text else title, (self.done + share) / self.parts)

        try:
            tell("", 0.0)
            return work(tell)
        except _Spent:
            self.skipped.append(f"{title}: the budget was spent")
        except Exception as error:
            if needed:
                raise
            said = (str(error).splitlines() or [""])[0]
            self.skipped.append(f"{title}: {type(error).__name__}: {said}")
        finally:
            self.done += 1
        return None


@kernel
def evaluate(
    model: Network,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    craft: Labelled | None = None,
    choose: Labelled | None = None,
    report: Labelled | None = None,
    delta: float | None = None,
    epsilons: Sequence[float] = (10.0, 20.0),
    seeds: int = 3,
    effort: float | None = None,
    budget: float | None = None,
    class_names: Sequence[str] = (),
    name: str = "",
    transfer: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> Card:
    """The card of a network: what is right on clean images, and under universal perturbations of which size how much.

    model: a network, or a function, from pixels (n, C, H, W) in 0..255 to logits (n, classes), or (n, classes, H, W)
    for segmentation; see `satlib.models.UnitInputs` for networks with other inputs. images and their labels are split
    at random by `seed`: half to craft perturbations on, a quarter decides the searches, a quarter reports; or give the
    three sets `craft`, `choose` and `report` as pairs, whose order does not matter. class_names: in the order of the
    classes. name: of the network.

    eps_uni(delta) is searched by the ensemble (`satlib.robustness.strongest`) and by the paper's attack, `seeds` times
    each. delta: by default 75 % of the images, or 95 % of the pixels; where one pattern that sends everything into the
    rarest class wins less, nine tenths of that. epsilons: sizes (pixel units) at which the error is reported. transfer:
    perturbations (1, C, H, W) found on other networks, by name, to see what they do here. effort: steps in units of the
    usual ones, 80 for each attack of the ensemble and 200 for the paper's; three seeds at effort 1 pass some 650,000
    images forward and backward. budget: seconds, after which what is left is left out, and the card says so; without
    `effort` it also cuts the steps (down to 0.05), so that the bound is weaker. progress(text, done) follows; by
    default it is printed.

    What fails after the first search is named on the card. Raises SatlibError for fewer than 8 images to craft on, or 4
    to choose or report on, for bad epsilons and transfer, and what the kernels raise on what they are given.
    """
    sets: dict[str, Any] = {"craft": craft, "choose": choose, "report": report}
    if images is not None and any(given is not None for given in sets.values()):
        raise SatlibError("images and craft, choose or report are given: expected one set of images, or the three")
    one = {"images": images, "labels": labels}
    if missing := [name for name, given in (sets if images is None else one).items() if given is None]:
        expected = "images and labels, or the three sets craft, choose and report"
        raise SatlibError(f"{missing[0]} is missing: expected {expected}")
    checks.check_whole(seeds=seeds)
    checks.check_whole(least=0, seed=seed)
    checks.check("None, or a positive number of seconds", lambda b: b is None or 0 < b < math.inf, budget=budget)
    checks.numbers(epsilons, "epsilons")
    sizes = sorted(set(np.asarray(epsilons, dtype=float).reshape(-1).tolist()))
    within = "numbers above 0, up to 255 (pixel units)"
    checks.check(within, lambda given: 0 < given[0] <= given[-1] <= 255, epsilons=sizes)
    made = "three sets, as given"
    if images is not None and labels is not None:
        sets, made = _split(images, labels, seed), f"{len(images)} images, split at random by seed {seed}"
    sets = {role: _shuffled(pair, seed) for role, pair in sets.items()}
    for role, (x, _) in sets.items():
        if len(x) < LEAST[role]:
            raise SatlibError(f"{len(x)} images to {role}: expected at least {LEAST[role]}, or 16 that are split")
    shape = (1, *sets["report"][0].shape[1:])
    others = {other: _carried(other, xi, shape) for other, xi in (transfer or {}).items()}
    segmentation = sets["craft"][1].ndim > 1
    printed = _Printed(name or "network") if progress is None else None
    clock = _Clock(budget, printed or progress or print, parts=5 + 2 * seeds)
    with _warned() as said:
        with attackable(model) as net:
            for role, (x, y) in sets.items():
                check_model(net, x, y, name=f"{role} labels")
            with torch.no_grad():
                classes = logits_of(net, sets["choose"][0][:1].float()).shape[1]
        reach = 1 - _shares(sets["choose"][1], classes).min().item()
        if delta is None:
            delta = DELTA[segmentation]
            delta = delta if delta < reach or not reach else round(REACHED * reach, 2)
        if effort is None:
            passes = PASSES * (1 + seeds) / 4  # a quarter of them are what is done once
            wanted = 1.0 if budget is None else budget * _passes_per_second(model, sets["craft"]) / passes
            effort = min(max(wanted, EFFORTS[0]), EFFORTS[1])
        card = Card(
            name=str(name or type(model).__name__),
            delta=float(delta),
            segmentation=segmentation,
            classes=tuple(map(str, class_names)),
            images={role: len(x) for role, (x, _) in sets.items()},
            fingerprints={role: _fingerprint(*pair) for role, pair in sets.items()},
            splits=made,
            size=shape[1:],
            clean_error=_rate(model, sets["report"], torch.zeros(shape)),
            chance_error=1 - _shares(sets["report"][1], classes).max().item(),
            epsilons=tuple(sizes),
            effort=float(effort),
            seed=int(seed),
            device=device_name(),
            precision=_precision(model, sets["report"][0].device),
            network=described(model),
            versions=_versions(),
        )
        notes = []
        if delta > reach > 0:
            notes.append(
                f"delta = {delta:g} may be out of reach: a pattern that sends everything into the rarest class wins "
                f"{reach:.2f}"
            )
        if card.useless:
            notes.append("nothing else was measured: a network at chance has nothing to lose")
        else:
            _measure_all(card, model, sets, seeds, others, clock)
    if printed:
        printed.end(clock.seconds)
    card.skipped, card.seconds, card.budget = tuple(clock.skipped), clock.seconds, budget and float(budget)
    unique = {str(each.message): each for each in said}
    card.notes = (*notes, *(text for text, each in unique.items() if issubclass(each.category, UserWarning)))
    for each in unique.values():
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return card


def _measure_all(
    card: Card,
    model: Network,
    sets: dict[str, Labelled],
    seeds: int,
    transfer: Mapping[str, Tensor],
    clock: _Clock,
) -> None:
    """All parts, what matters most first: should the budget end, the card has the bound that one should believe."""
    craft, report = sets["craft"], sets["report"]
    few = report[0][:SINGLE], report[1][:SINGLE]

    def generator(number: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(card.seed + number)

    def search(attack: str, number: int) -> None:
        def work(tell: Callable) -> Robustness:
            given: dict[str, Any] = {**sets, "delta": card.delta, "generator": generator(number), "progress": tell}
            if attack == "ensemble":
                return strongest(model, **given, effort=card.effort)
            steps, batch = max(10, round(200 * card.effort)), min(16, len(craft[0]))
            return universal_robustness(named("paper", steps=steps, batch_size=batch), model, **given, search="k-ary")

        title = f"eps_uni by {BY[attack]}" + (f", seed {card.seed + number}" if number else "")
        found = clock.part(title, work, needed=not card.searches)
        if found is not None:
            card.add(attack, found)

    def at_sizes(tell: Callable) -> None:
        start = torch.from_numpy(card.perturbation) if card.epsilon and card.perturbation is not None else None
        given = {"craft": craft, "report": report, "epsilons": card.epsilons, "start": start}
        curve = success_curve(model, **given, effort=card.effort, generator=generator(), progress=tell)
        rates = (max(each.rate, card.clean_error) for each in curve)  # the pattern of zeros is one of any size
        card.errors = dict(zip(card.epsilons, rates, strict=True))

    def signs(eps: float) -> None:
        card.noise[eps] = _rate(model, report, noises(few[0][:1].float(), eps, card.seed)["sign"])

    def controls(tell: Callable) -> None:
        for done, eps in enumerate(card.epsilons):
            tell("random signs", done / (len(card.epsilons) + len(transfer)))
            signs(eps)
        for other, xi in transfer.items():
            tell(other, 0.99)
            card.transfer[other] = {"eps": xi.abs().max().item(), "error": _rate(model, report, xi)}

    def one_by_one(tell: Callable) -> None:
        own = {"steps": max(10, round(50 * card.effort)), "iterations": 12, "generator": generator()}
        found = adversarial_robustness(model, *few, delta=card.delta, progress=tell, **own)
        card.eps_adv = {"eps": found.epsilon, "images": len(found.epsilons)}

    def audit(tell: Callable) -> None:
        eps, size = card.epsilon or max(card.epsilons), min(16, len(craft[0]) // 4)
        sizes = sorted({*(min(255.0, round(eps * times, 1)) for times in (0.5, 1.0, 2.0, 4.0)), 255.0} - {0.0})
        attack = {"steps": max(10, round(100 * card.effort)), "batch_size": size, "beta": 10.0}
        given: dict[str, Any] = {"eps": eps, "epsilons": sizes, "attack": attack, "sharedness": min(8, len(few[0]))}
        numbers = measure(model, craft=craft, test=few, image_steps=20, seed=card.seed, progress=tell, **given)
        card.checks = tuple(judged(numbers))

    search("ensemble", 0)
    if not card.masked:  # else sizes that attacks by gradients find say nothing: the checks say what is wrong
        search("paper", 0)
        clock.part("error at fixed sizes", at_sizes)
    clock.part("noise and transfer", controls)
    if not card.masked:
        clock.part("images one by one", one_by_one)
    clock.part("checks of the evaluation", audit)
    for number in range(1, 1 if card.masked else seeds):
        search("ensemble", number)
        search("paper", number)

    def shown(tell: Callable) -> None:
        if card.epsilon:
            signs(card.epsilon)
        card.examples = _examples(model, report, card)

    clock.part("images that are shown", shown, short=True)


_heard: dict[int, list[warnings.WarningMessage]] = {}  # by the thread that evaluates
_hearing, _lock = contextlib.ExitStack(), threading.Lock()


@contextlib.contextmanager
def _warned() -> Iterator[list[warnings.WarningMessage]]:
    """The warnings of this thread, which are not shown. How warnings are shown is a matter of the whole process: of
    several threads in this context the first one changes it, and the last one changes it back."""
    me = threading.get_ident()
    with _lock:
        if not _heard:
            _hearing.enter_context(warnings.catch_warnings())
            warnings.simplefilter("always")
            usual = warnings.showwarning

            def note(message: Any, category: type[Warning], filename: str, lineno: int, *more: Any) -> None:
                if (heard := _heard.get(threading.get_ident())) is None:
                    usual(message, category, filename, lineno, *more)
                else:
                    heard.append(warnings.WarningMessage(message, category, filename, lineno))

            warnings.showwarning = note
        heard = _heard[me] = []
    try:
        yield heard
    finally:
        with _lock:
            del _heard[me]
            if not _heard:
                _hearing.close()


def _split(images: Tensor, labels: Tensor, seed: int) -> dict[str, Labelled]:
    """Half of the images to craft on, a quarter to choose, a quarter to report, at random."""
    order = _order(len(images), seed)
    half, quarter = len(images) // 2, len(images) // 4
    parts = order.split([half, quarter, len(images) - half - quarter])
    return {role: _taken(images, labels, part) for role, part in zip(LEAST, parts, strict=True)}


def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _shuffled(pair: Labelled, seed: int) -> Labelled:
    """In any order: the first ones stand for all in some parts, and folders come class by class."""
    return _taken(*pair, _order(len(pair[0]), seed))


def _taken(images: Any, labels: Tensor, rows: Tensor) -> Labelled:
    streamed = hasattr(images, "part")
    return images.part(rows) if streamed else images[rows.to(images.device)], labels[rows.to(labels.device)]


def _carried(name: str, xi: Any, shape: tuple[int, ...]) -> Tensor:
    """A perturbation from another network, (1, C, H, W)."""
    xi = torch.as_tensor(xi).detach().float().cpu()
    if tuple(xi.shape) not in (shape, shape[1:]) or not bool(xi.isfinite().all()):
        raise SatlibError(f"transfer: {name!r} of shape {tuple(xi.shape)}: expected finite values of shape {shape}")
    return xi.reshape(shape)


def _fingerprint(images: Any, labels: Tensor) -> str:
    """What tells a set of images and labels from another, whatever its order; of streamed images their number and
    labels alone."""
    rows = [labels.cpu().numpy()] + ([images.detach().cpu().numpy()] if isinstance(images, Tensor) else [])
    each = sorted(_digest(*(part[row].tobytes() for part in rows)) for row in range(len(labels)))
    return _digest(repr(tuple(images.shape)).encode(), *map(str.encode, each))


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _precision(model: Network, device: torch.device) -> str:
    """The number format that attacks on a model compute in."""
    weights = weights_dtype(model)
    return str(fastest_dtype(device.type) if weights is torch.float32 else weights).removeprefix("torch.")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    with contextlib.suppress(metadata.PackageNotFoundError):  # in a checkout that is not installed
        found["satlib"] = metadata.version("satlib")
    return found


def described(model: Network) -> dict[str, str]:
    """What tells a network from another."""
    if not isinstance(model, torch.nn.Module):
        return {"class": getattr(model, "__name__", type(model).__name__)}
    weights = [weight.detach().cpu().reshape(-1) for weight in model.state_dict().values()]
    content = (weight.contiguous().view(torch.uint8).numpy().tobytes() for weight in weights if weight.numel())
    count = sum(weight.numel() for weight in model.parameters())
    return {"class": type(model).__name__, "parameters": f"{count:,}", "weights": _digest(*content)}


def _passes_per_second(model: Network, craft: Labelled) -> float:
    """Images that the model passes forward and backward in a second, timed once after a first pass."""
    x, y = craft[0][:16].float(), craft[1][:16]
    with attackable(model) as net:
        for _ in range(2):
            start = time.perf_counter()
            gradients, _ = heap_gradients(net, x, y, torch.zeros_like(x[:1]), sharedness=len(x))
            gradients.sum().item()  # waits for the device
    return len(x) / (time.perf_counter() - start)


class _Printed:
    """Progress that is printed."""

    def __init__(self, name: str) -> None:
        self.name, self.progress, self.start = name, Progress(), time.monotonic()

    def __call__(self, text: str, done: float) -> None:
        self.progress.update(f"[{self.name}] {done:4.0%}, {duration(time.monotonic() - self.start)}: {text}")

    def end(self, seconds: float) -> None:
        self.progress.line(f"[{self.name}] done in {duration(seconds)}")


def _rate(model: Network, pair: Labelled, xi: Tensor) -> float:
    with attackable(model) as net:
        return success_rates(net, *pair, xi.to(pair[1].device)).item()


def _shares(labels: Tensor, classes: int) -> Tensor:
    """Share of each class among the decisions."""
    known = labels[labels != IGNORE] if labels.ndim > 1 else labels
    counts = known.flatten().long().bincount(minlength=classes).double()
    return counts / counts.sum()


def _examples(model: Network, report: Labelled, card: Card) -> Examples | None:
    """A few images that the model gets right, and what it says of them with the perturbation."""
    if card.perturbation is None or card.segmentation:
        return None
    x, y = report[0][:256], report[1][:256]
    xi = torch.from_numpy(card.perturbation).to(x.device)
    with torch.no_grad(), exact(), evaluated(model):
        clean = torch.cat([logits_of(model, part.float()).argmax(1) for part in x.split(64)])
        shown = (clean == y).nonzero()[:SHOWN, 0]  # they are in a random order
        if not len(shown):
            shown = torch.arange(min(SHOWN, len(x)), device=x.device)
        perturbed = perturb(x[shown].float(), xi)
        fooled = logits_of(model, perturbed).argmax(1)
    pixels = (x[shown].float(), perturbed)
    before, after = (each.round().to(torch.uint8).cpu().numpy() for each in pixels)
    return Examples(before, after, y[shown].tolist(), clean[shown].tolist(), fooled.tolist())
