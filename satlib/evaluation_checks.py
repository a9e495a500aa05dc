"""Was the attack weak? Measurements that a sound evaluation passes (Carlini et al. 2019), and what they say.

`measure` runs them on a model, `checks` judges the numbers. Both are about universal perturbations; where images are
attacked one by one, it is to see whether gradients lead anywhere at all.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from satlib import device
from satlib.attacks import decisions_won, heap_gradients, heap_pgd, images_at_once, perturb, random_start, success_rates
from satlib.checks import as_labelled, per_heap
from satlib.errors import SatlibError
from satlib.network import Network, attackable, logits_of
from satlib.robustness import Labelled
from satlib.universal import extended_pgd

LITTLE = 0.05  # by how much a stronger attack may raise the success rate before the attack counts as too weak
FALLS = 0.03  # by how much a rate may fall where it should rise, before that is more than chance
CAUGHT = 0.99  # of the images, attacked one by one at a large eps
SAME = 0.01  # by how much folding batch norm and the number format may change a rate
ZERO = 0.05  # share of images without any gradient that is still no mask
STRONGER = {  # changes to the attack that should change little
    "three times the steps": lambda attack: {"steps": 3 * attack["steps"]},
    "four times the mini-batch": lambda attack: {"batch_size": 4 * attack["batch_size"]},
    "best of 4 restarts": lambda attack: {"restarts": 4, "steps": 4 * attack["steps"]},
}
OTHER_LOSSES = {
    "without the loss threshold": {"loss_threshold": None},
    "without threshold and smoothing": {"loss_threshold": None, "label_smoothing": 0.0},
    "margin loss": {"loss": "margin", "loss_threshold": None, "label_smoothing": 0.0},
}


class Rounded(nn.Module):
    """The model behind pixels rounded to multiples of 16: no gradient gets through. A mask, no defence."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x / 16).round() * 16)


class Saturated(Rounded):
    """The model with logits times 10,000: the softmax saturates, and most gradients vanish. A mask, no defence."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * 1e4


# How the checks begin that fail where an attack is merely weak; the others fail where gradients are hidden, too.
OF_WEAKNESS = ("success never falls", "more steps, restarts", "half the crafting", "no other loss gains", "crafting in")
MASKS: dict[str, Callable[[nn.Module], nn.Module]] = {"rounded": Rounded, "saturated": Saturated}


def measure(
    model: Network,
    *,
    craft: Labelled,
    test: Labelled,
    eps: float,
    epsilons: Sequence[float],
    attack: Mapping[str, Any],
    image_steps: int,
    sharedness: int = 8,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> dict:
    """Success rates, as shares of decisions on the `test` images, of the attack and of its relatives.

    Universal perturbations are crafted on the `craft` images with `attack` (settings of `extended_pgd`, steps and
    batch_size at least) at `eps` in pixel units. epsilons: where the curve asks, rising. image_steps: of the attacks on
    the test images themselves, one by one or in heaps of `sharedness`.

    A plain function is taken to be in eval mode always. Raises SatlibError where the model's logits on the test images
    are not finite.
    """
    craft, test = as_labelled(craft, "craft"), as_labelled(test, "test")
    per_heap(epsilons, None, test[0].device)
    if len(craft[0]) < (least := 4 * attack["batch_size"]):
        raise SatlibError(
            f"{len(craft[0])} crafting images: expected {least}, for mini-batches of four times batch_size"
        )
    done, parts = itertools.count(1), 6 + len(STRONGER) + len(OTHER_LOSSES)

    def report(text: str) -> None:
        if progress:
            progress(text, next(done) / parts)

    (x, y), few, half = test, test[0].float(), len(craft[0]) // 2
    with attackable(model) as net:

        def crafted(images: Labelled = craft, **changes: Any) -> Tensor:
            options = {"eps": eps, "generator": torch.Generator().manual_seed(seed)} | dict(attack) | changes
            return extended_pgd(net, *images, **options)

        def rate(xi: Tensor, seen: Tensor = x) -> float:
            return success_rates(net, seen, y, xi).item()

        def own(size: float, heap: int = 1, steps: int = image_steps) -> float:
            """Error under perturbations for heaps of the test images themselves, cross-entropy as it is."""
            options: dict[str, Any] = {"step_size": 2.5 * size / steps, "keep_best": True}
            if steps == 1:
                options = {"step_size": size, "start": torch.zeros(-(-len(few) // heap), *few.shape[1:])}
            options["straight_through"] = attack.get("straight_through", True)
            options |= {"eps": size, "sharedness": heap, "generator": torch.Generator().manual_seed(seed)}
            return rate(nothing, perturb(few, heap_pgd(net, few, y, steps=steps, **options), heap))

        nothing, xi = torch.zeros_like(few[:1]), crafted()
        numbers: dict[str, Any] = {"eps": eps, "classes": _classes(net, few), "images": len(few)}
        numbers |= {"clean": rate(nothing), "universal": rate(xi)}
        report("the attack itself")
        numbers["universal, one step"] = rate(crafted(steps=1, beta=1.0, start=nothing, snapshots=1))
        report("one step")
        numbers |= {"image-dependent": own(eps), "shared": own(eps, sharedness)}
        numbers |= {"image-dependent, one step": own(eps, steps=1), "sharedness": sharedness}
        report("images one by one")
        numbers["image-dependent, largest eps"] = own(max(epsilons))
        report("images one by one, at the largest eps")
        curve = success_rates(net, x, y, crafted(eps=list(epsilons))).tolist()
        numbers["curve"] = [{"eps": size, "rate": each} for size, each in zip(epsilons, curve, strict=True)]
        report("eps")
        stronger = {name: change(attack) for name, change in STRONGER.items()}
        for group, changes in (("stronger", stronger), ("other losses", OTHER_LOSSES)):
            numbers[group] = {}
            for name, change in changes.items():
                numbers[group][name] = rate(crafted(**change))
                report(name)
        numbers["half the crafting images"] = rate(crafted((craft[0][:half], craft[1][:half])))
        gradients, _ = heap_gradients(net, few, y, torch.zeros_like(few), sharedness=1)
        largest = gradients.flatten(1).abs().amax(1)  # NaN where one of them is
        numbers["without gradient"] = (~((largest > 0) & largest.isfinite())).float().mean().item()
        with device.exact():
            numbers["crafted in float32"] = rate(crafted())
        numbers["noise"] = {name: rate(noise) for name, noise in noises(xi, eps, seed).items()}
        report("half the crafting images, float32 and noise")
    numbers["eval mode, float32"] = success_rates(model, x, y, xi).item()
    numbers["train mode, float32"] = _rate_in_training_mode(model, x, y, xi, seed)
    return numbers


def _rate_in_training_mode(model: Network, x: Tensor, y: Tensor, xi: Tensor, seed: int) -> float | None:
    """The success rate on a copy in training mode, with random numbers of its own; None where it has no such mode."""
    with contextlib.suppress(Exception), torch.random.fork_rng():
        torch.manual_seed(seed)
        plain = copy.deepcopy(model) if isinstance(model, nn.Module) else model
        if isinstance(plain, nn.Module):
            with contextlib.suppress(NotImplementedError):  # an exported graph has one mode
                plain.train()
        return _rate_as_it_is(plain, x, y, xi)
    return None


@torch.no_grad()
def _rate_as_it_is(model: Network, images: Tensor, labels: Tensor, xi: Tensor, batch_size: int = 512) -> float:
    """As `success_rates`, of one perturbation, but in the mode that the model is in."""
    won = counted = 0
    with device.exact():
        parts = -(-len(images) // min(batch_size, images_at_once(images)))  # all alike: batch norm wants several images
        for x, y in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):
            wins, counts = decisions_won(logits_of(model, perturb(x.float(), xi)).argmax(1), y)
            won, counted = won + int(wins.sum()), counted + int(counts.sum())
    return won / counted


@torch.no_grad()
def _classes(net: nn.Module, images: Tensor) -> int:
    """How many classes the model knows. Raises SatlibError where its logits are not finite."""
    logits = logits_of(net, images[:16])
    if not logits.isfinite().all():
        raise SatlibError("the model's logits are not finite on clean images; mend that before it is attacked")
    return logits.shape[1]


def noises(like: Tensor, eps: float, seed: int) -> dict[str, Tensor]:
    """Perturbations of size eps shaped like (1, C, H, W) that know nothing of the model.

    uniform in [-eps, eps]; sign: each value -eps or eps; low-frequency: uniform on an eighth of the resolution, scaled
    up smoothly, its largest value eps.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = random_start(tuple(like.shape), torch.tensor(eps, device=like.device), generator)
    small = random_start((1, like.shape[1], *(-(-n // 8) for n in like.shape[2:])), 1.0, generator)
    smooth = F.interpolate(small, like.shape[2:], mode="bicubic").to(like.device)
    sign = random_start(tuple(like.shape), 1.0, generator).to(like.device).sign() * eps
    return {"uniform": uniform, "sign": sign, "low-frequency": smooth * eps / smooth.abs().max()}


@dataclass(frozen=True)
class Check:
    """One statement about an evaluation, whether it holds, and the numbers that say so."""

    check: str
    verdict: str  # "passes" or "fails"
    evidence: str


def checks(numbers: Mapping[str, Any]) -> list[Check]:
    """What `measure` found, judged. A check that fails says that the attack, not the model, may be what is weak."""

    def percent(value: float) -> str:
        return f"{100 * value:.1f} %"

    def beside(what: str, value: float) -> str:
        return f"{percent(base)}; {what}: {percent(value)}"

    base, clean, one, shared = (numbers[name] for name in ("universal", "clean", "image-dependent", "shared"))
    one_step, universal_step = numbers["image-dependent, one step"], numbers["universal, one step"]
    exact, plain, training = (numbers[f"{name} float32"] for name in ("crafted in", "eval mode,", "train mode,"))
    largest, half = numbers["image-dependent, largest eps"], numbers["half the crafting images"]
    without, chance = numbers["without gradient"], 1 - 1 / numbers["classes"]
    curve = [(point["eps"], point["rate"]) for point in numbers["curve"]]
    (_, first), (top, last) = curve[0], curve[-1]
    full = next((rank for rank, (_, rate) in enumerate(curve) if rate >= 0.9 * chance), len(curve))  # then it saturates
    rises = itertools.combinations(curve[: full + 1], 2)
    falls = max((before - after for (_, before), (_, after) in rises), default=0.0)
    (most, stronger), (other, loss), (kind, noise) = (
        max(numbers[group].items(), key=lambda item: item[1]) for group in ("stronger", "other losses", "noise")
    )
    little = f"{100 * LITTLE:g} points"
    judged = [
        (
            "many steps do better than one, on single images and in the universal attack",
            one > one_step - FALLS and one > clean + FALLS and base > universal_step - FALLS,
            f"single images {percent(one)}, one step {percent(one_step)}; universal {percent(base)}, one step "
            f"{percent(universal_step)}",
        ),
        (
            f"success never falls by more than {100 * FALLS:g} points as eps grows, up to 90 % of chance",
            falls <= FALLS and last > first,
            ", ".join(f"eps {size:g}: {percent(rate)}" for size, rate in curve),
        ),
        (
            "at the largest eps the model is at chance, and single images are all lost",
            last >= 0.9 * chance and largest >= CAUGHT,
            f"eps {top:g}: universal {percent(last)} (uniform guess {percent(chance)}), single ones {percent(largest)}",
        ),
        (
            f"more steps, restarts and larger mini-batches gain at most {little}",
            stronger - base <= LITTLE,
            beside(most, stronger),
        ),
        (f"half the crafting images lose at most {little}", base - half <= LITTLE, beside("half", half)),
        (
            f"no other loss gains more than {little}: threshold and smoothing mask nothing",
            loss - base <= LITTLE,
            beside(other, loss),
        ),
        (
            f"the model as it is in evaluation mode, in float32, is fooled alike (within {100 * SAME:g} point)",
            abs(plain - base) <= SAME,
            f"{percent(base)}; as it is {percent(plain)}"
            + (f" (in training mode it would be {percent(training)})" if training is not None else ""),
        ),
        (f"crafting in float32 changes at most {little}", abs(exact - base) <= LITTLE, beside("float32", exact)),
        ("images have gradients", without <= ZERO, f"{percent(without)} of the images have none"),
        (
            "at equal eps: image-dependent >= shared >= universal",
            one >= shared - FALLS and shared >= base - FALLS,
            f"{percent(one)}, {percent(shared)} (s = {numbers['sharedness']}), {percent(base)}",
        ),
        (
            "the attack does better than noise of its size",
            base > noise + FALLS,
            f"{percent(base)}; {kind} noise {percent(noise)}",
        ),
    ]
    return [Check(check, "passes" if passes else "fails", evidence) for check, passes, evidence in judged]
