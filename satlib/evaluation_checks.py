"""Was the attack weak? Measurements that a sound evaluation passes (Carlini et al. 2019), and what they say.

`measure` runs them on a model, `checks` judges the numbers. Both are about universal perturbations; where images are
attacked one by one, it is to see whether gradients lead anywhere at all.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from satlib.attacks import attackable, heap_gradients, heap_pgd, perturb, random_start, success_rates, universal_pgd
from satlib.device import exact
from satlib.errors import SatlibError
from satlib.robustness import Labelled

LITTLE = 0.05  # by how much a stronger attack may raise the success rate before the attack counts as too weak
FALLS = 0.03  # by how much a rate may fall where it should rise, before that is more than chance
CAUGHT = 0.99  # of the images, attacked one by one at a large eps
SAME = 0.01  # by how much folding batch norm and the number format may change a rate
ZERO = 0.05  # share of images without any gradient that is still no mask
STRONGER = {  # changes to the attack that should change little
    "three times the steps": lambda attack: {"steps": 3 * attack["steps"]},
    "four times the mini-batch": lambda attack: {"batch_size": 4 * attack["batch_size"]},
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


class Saturated(nn.Module):
    """The model with logits times 10,000: the softmax saturates, and most gradients vanish. A mask, no defence."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * 1e4


MASKS: dict[str, Callable[[nn.Module], nn.Module]] = {"rounded": Rounded, "saturated": Saturated}


def measure(
    model: nn.Module,
    *,
    craft: Labelled,
    test: Labelled,
    eps: float,
    epsilons: Sequence[float],
    attack: Mapping[str, Any],
    image_steps: int,
    sharedness: int = 8,
    restarts: int = 4,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> dict:
    """Success rates, as shares of decisions on the `test` images, of the attack and of its relatives.

    Universal perturbations are crafted on the `craft` images with `attack` (for `universal_pgd`: steps, batch_size,
    beta, gamma, loss_threshold, label_smoothing) at `eps` in pixel units. epsilons: where the curve asks, rising.
    image_steps: of the attacks on the test images themselves, one by one or in heaps of `sharedness`.

    Raises SatlibError where the model's logits on the test images are not finite.
    """
    parts = 7 + len(STRONGER) + len(OTHER_LOSSES)
    done = iter(range(1, parts + 1))

    def say(text: str) -> None:
        if progress:
            progress(text, next(done) / parts)

    (x, y), few = test, test[0].float()
    with attackable(model) as net:

        def crafted(images: Labelled = craft, **changes: Any) -> Tensor:
            options = {"eps": eps, "generator": torch.Generator().manual_seed(seed)} | dict(attack) | changes
            return universal_pgd(net, *images, **options)

        def rates(xi: Tensor) -> list[float]:
            return success_rates(net, x, y, xi).tolist()

        def own(heap: int, size: float, steps: int) -> float:
            """Error under perturbations for heaps of the test images themselves, cross-entropy as it is."""
            found = heap_pgd(
                net,
                few,
                y,
                eps=size,
                sharedness=heap,
                steps=steps,
                step_size=size if steps == 1 else 2.5 * size / steps,
                start=torch.zeros(-(-len(few) // heap), *few.shape[1:]) if steps == 1 else None,
                generator=torch.Generator().manual_seed(seed),
                keep_best=steps > 1,
            )
            return _errors(net, perturb(few, found, heap), y)

        xi = crafted()
        numbers: dict[str, Any] = {"eps": eps, "classes": _classes(net, few), "images": len(few)}
        numbers |= {"clean": rates(torch.zeros_like(xi))[0], "universal": rates(xi)[0]}
        say("the attack itself")
        start = torch.zeros_like(xi)
        numbers["universal, one step"] = rates(crafted(steps=1, beta=1.0, start=start, snapshots=1))[0]
        say("one step")
        numbers["image-dependent"], numbers["shared"] = own(1, eps, image_steps), own(sharedness, eps, image_steps)
        numbers["image-dependent, one step"], numbers["sharedness"] = own(1, eps, 1), sharedness
        say("images one by one")
        numbers["image-dependent, largest eps"] = own(1, max(epsilons), image_steps)
        say("images one by one, at the largest eps")
        curve = crafted(eps=list(epsilons))
        numbers["curve"] = [{"eps": size, "rate": rate} for size, rate in zip(epsilons, rates(curve), strict=True)]
        say("eps")
        numbers["stronger"] = {}
        for name, change in STRONGER.items():
            numbers["stronger"][name] = rates(crafted(**change(attack)))[0]
            say(name)
        several = crafted(eps=[eps] * restarts)
        best = success_rates(net, *craft, several).argmax()  # chosen without the test images
        numbers["stronger"][f"best of {restarts} restarts"] = rates(several[best][None])[0]
        half = len(craft[0]) // 2
        numbers["half the crafting images"] = rates(crafted(images=(craft[0][:half], craft[1][:half])))[0]
        say("restarts and crafting images")
        numbers["other losses"] = {}
        for name, changes in OTHER_LOSSES.items():
            numbers["other losses"][name] = rates(crafted(**changes))[0]
            say(name)
        gradients, _ = heap_gradients(net, few, y, torch.zeros_like(few), sharedness=1)
        numbers["without gradient"] = (gradients.flatten(1).abs().amax(1) == 0).float().mean().item()
        with exact():
            numbers["crafted in float32"] = rates(crafted())[0]
        numbers["noise"] = {name: rates(noise)[0] for name, noise in noises(xi, eps, seed).items()}
        say("noise")
    with exact(), torch.no_grad():
        plain = copy.deepcopy(model)
        for mode in ("eval", "train"):
            numbers[f"{mode} mode, float32"] = success_rates(getattr(plain, mode)(), x, y, xi).item()
    return numbers


@torch.no_grad()
def _errors(net: nn.Module, perturbed: Tensor, labels: Tensor) -> float:
    """Share of decisions that are wrong on images that were perturbed one by one."""
    zero = torch.zeros_like(perturbed[:1])
    return success_rates(net, perturbed, labels, zero).item()


@torch.no_grad()
def _classes(net: nn.Module, images: Tensor) -> int:
    """How many classes the model knows. Raises SatlibError where its logits are not finite."""
    logits = net(images[:16])
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

    def judged(text: str, passes: bool, evidence: str) -> Check:
        return Check(text, "passes" if passes else "fails", evidence)

    base, curve = numbers["universal"], numbers["curve"]
    chance = 1 - 1 / numbers["classes"]
    falls = max(
        (curve[i]["rate"] - curve[j]["rate"] for i in range(len(curve)) for j in range(i + 1, len(curve))), default=0.0
    )
    stronger, losses = numbers["stronger"], numbers["other losses"]
    most = max(stronger, key=stronger.__getitem__)
    other = max(losses, key=losses.__getitem__)
    noise = max(numbers["noise"], key=numbers["noise"].__getitem__)
    order = [numbers["image-dependent"], numbers["shared"], base]
    return [
        judged(
            "many steps do better than one, on single images and in the universal attack",
            numbers["image-dependent"] > numbers["image-dependent, one step"] - FALLS
            and numbers["image-dependent"] > numbers["clean"] + FALLS
            and base > numbers["universal, one step"] - FALLS,
            f"single images {percent(numbers['image-dependent'])}, one step "
            f"{percent(numbers['image-dependent, one step'])}; universal {percent(base)}, one step "
            f"{percent(numbers['universal, one step'])}",
        ),
        judged(
            f"success rises with eps (up to {100 * FALLS:g} points of chance)",
            falls <= FALLS and curve[-1]["rate"] > curve[0]["rate"],
            ", ".join(f"eps {point['eps']:g}: {percent(point['rate'])}" for point in curve),
        ),
        judged(
            "at the largest eps the model is at chance, and single images are all lost",
            curve[-1]["rate"] >= 0.9 * chance and numbers["image-dependent, largest eps"] >= CAUGHT,
            f"eps {curve[-1]['eps']:g}: universal {percent(curve[-1]['rate'])} (chance {percent(chance)}), single ones "
            f"{percent(numbers['image-dependent, largest eps'])}",
        ),
        judged(
            f"more steps, restarts and larger mini-batches gain at most {100 * LITTLE:g} points",
            stronger[most] - base <= LITTLE,
            f"{percent(base)}; {most}: {percent(stronger[most])}",
        ),
        judged(
            f"half the crafting images lose at most {100 * LITTLE:g} points",
            base - numbers["half the crafting images"] <= LITTLE,
            f"{percent(base)}; half: {percent(numbers['half the crafting images'])}",
        ),
        judged(
            f"no other loss gains more than {100 * LITTLE:g} points: threshold and smoothing mask nothing",
            losses[other] - base <= LITTLE,
            f"{percent(base)}; {other}: {percent(losses[other])}",
        ),
        judged(
            f"the model as it is in evaluation mode, in float32, is fooled alike (within {100 * SAME:g} point)",
            abs(numbers["eval mode, float32"] - base) <= SAME,
            f"{percent(base)}; as it is {percent(numbers['eval mode, float32'])} (in training mode it would be "
            f"{percent(numbers['train mode, float32'])})",
        ),
        judged(
            f"crafting in float32 changes at most {100 * LITTLE:g} points",
            abs(numbers["crafted in float32"] - base) <= LITTLE,
            f"{percent(base)}; float32: {percent(numbers['crafted in float32'])}",
        ),
        judged(
            "images have gradients",
            numbers["without gradient"] <= ZERO,
            f"{percent(numbers['without gradient'])} of the images have none",
        ),
        judged(
            "at equal eps: image-dependent >= shared >= universal",
            order[0] >= order[1] - FALLS and order[1] >= order[2] - FALLS,
            f"{percent(order[0])}, {percent(order[1])} (s = {numbers['sharedness']}), {percent(order[2])}",
        ),
        judged(
            "the attack does better than noise of its size",
            base > numbers["noise"][noise] + FALLS,
            f"{percent(base)}; {noise} noise {percent(numbers['noise'][noise])}",
        ),
    ]
