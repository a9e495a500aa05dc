"""Section 5: how large must perturbations be? Searches for eps_uni and eps_adv, and DeepFool's of one size."""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from satlib.attacks import success_rates
from satlib.data import ImageSet, Splits
from satlib.deepfool import universal_deepfool as deepfool
from satlib.device import exact
from satlib.network import logits_of
from satlib.paper import Classification
from satlib.robustness import Robustness, success_curve
from satlib.robustness import adversarial_robustness as search_each
from satlib.robustness import strongest as search_strongest
from satlib.robustness import universal_robustness as search_universal
from satlib.segmentation import repeated, scene_target
from satlib.study.measurement import Run, measurement, options_of
from satlib.study.records import Workspace
from satlib.universal import ATTACKS, named, options

EACH = options_of(search_each, without=("delta", "iterations", "targeted")) | {"straight_through": False}
SETS = {"craft": "val", "choose": "test", "report": "test"}  # the split whose images have each role in a search


def attack_options(given: Mapping) -> dict[str, Any]:
    """The frozen defaults of a named universal attack."""
    return {"name": "paper"} | frozen(ATTACKS[given.get("name", "paper")])


def frozen(attack: Callable) -> dict[str, Any]:
    """The frozen defaults of an attack: gradients went through the clamp before they could go straight through it."""
    own = options(attack)
    return own | {"straight_through": False} if "straight_through" in own else own


@measurement(version=2, nested={"attack": attack_options})
def universal_robustness(
    model: Module,
    data: Splits,
    work: Workspace,
    progress: Any,
    *,
    attack: dict,
    delta: float = 0.75,
    search: str = "binary",
    iterations: int = 10,
    warm_start: bool = False,
    images: dict,
    sets: dict = SETS,
    target: str = "",
    seed: int = 0,
) -> dict:
    """eps_uni(delta) by the search of section 5.2: crafted, decided and reported on disjoint images.

    sets: the split that each of the three takes its images from; images: how many at most, 0 for all. attack: a name in
    ATTACKS and options. In segmentation `target` names the training scene that the attack aims at.
    """
    attack, settings = named(**attack), {"iterations": iterations, "search": search, "warm_start": warm_start}
    parts = _disjoint(data, sets, images)
    find = functools.partial(search_universal, attack, model, **_sets(data, parts, target), **settings)
    return _found(find, parts, work, _paced(progress), targeted=bool(target), delta=delta, generator=_seeded(seed))[0]


@measurement(version=3)
def strongest(
    model: Module,
    data: Splits,
    work: Workspace,
    progress: Any,
    *,
    delta: float = 0.75,
    images: dict,
    sets: dict = SETS,
    target: str = "",
    epsilons: list | tuple = (),
    effort: float = 1,
    seed: int = 0,
) -> dict:
    """eps_uni(delta) by the ensemble, `satlib.robustness.strongest`, and success at each of `epsilons` by its attacks.

    effort: so many times as many steps. Everything else as in `universal_robustness`.
    """
    parts, report, half = _disjoint(data, sets, images), _paced(progress), 0.5 if epsilons else 1.0
    given: dict[str, Any] = {"targeted": bool(target), "effort": effort, "generator": _seeded(seed)}
    labelled = _sets(data, parts, target)
    find = functools.partial(search_strongest, model, **labelled)
    metrics, result = _found(find, parts, work, lambda text, done: report(text, half * done), delta=delta, **given)
    if epsilons:
        start = result.closest if result.perturbation is None else result.perturbation
        del labelled["choose"]
        given |= {"start": start if result.epsilon != 0 else None, "epsilons": epsilons}
        given["progress"] = lambda text, done: report(text, half + (1 - half) * done)
        metrics["curve"] = [asdict(point) for point in success_curve(model, **labelled, **given)]
    return metrics


def _sets(data: Splits, parts: Mapping[str, ImageSet], target: str) -> dict[str, Any]:
    """Images of each role, with their labels or targets."""
    return {role: (part.images, aims(data, part, target)) for role, part in parts.items()}


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _paced(progress: Any) -> Callable[[str, float], None]:
    """Progress that says what is needed to the end, at the pace so far: a search is not resumed, all or nothing."""
    began = time.monotonic()
    return lambda text, done: progress(text, done, needed=(time.monotonic() - began) * (1 - done) / done)


def _found(
    find: Callable, parts: Mapping[str, ImageSet], work: Workspace, report: Callable[[str, float], None], **given: Any
) -> tuple[dict, Robustness]:
    """What a search finds, as metrics and as it is; its perturbations go to the workspace."""
    result = find(progress=report, **given)
    for name, xi in (("perturbation", result.perturbation), ("closest", result.closest)):
        if xi is not None:
            work.save_tensors(name, {"perturbation": xi.cpu()})
    told = ("rate", "report_rate", "craft_rate", "attack", "missed", "monotone", "gradients", "spent")
    metrics = {"eps_uni": result.epsilon} | {name: getattr(result, name) for name in told}
    metrics["images"] = {role: len(part) for role, part in parts.items()}
    return metrics | {"evaluations": [asdict(evaluation) for evaluation in result.evaluations]}, result


def _disjoint(data: Splits, sets: Mapping[str, str], images: Mapping[str, int]) -> dict[str, ImageSet]:
    """The images of each role: those of one split follow each other."""
    taken, parts = dict.fromkeys(sets.values(), 0), {}
    for role, name in sets.items():
        whole, start = getattr(data, name), taken[name]
        taken[name] = start + (images[role] or len(whole))
        parts[role] = whole.subset(slice(start, taken[name]))
    return parts


def report_images(data: Splits, sets: Mapping[str, str], images: Mapping[str, int]) -> ImageSet:
    """The images on which a search of these settings reports."""
    return _disjoint(data, sets, images)["report"]


def aims(data: Splits, part: ImageSet, target: str) -> Tensor:
    """What an attack is about on these images: their labels, or the target scene for each of them."""
    return repeated(scene_target(data, target), len(part)) if target else part.labels


@measurement(version=1, nested={"attack": lambda given: frozen(deepfool)})
def universal_deepfool(
    model: Module, data: Splits, work: Workspace, progress: Any, *, eps: float, images: int, attack: dict, seed: int = 0
) -> dict:
    """Accuracy on test images under a DeepFool universal perturbation, found on validation images (Figure 3, right)."""
    craft, test = data.val.first(min(images, len(data.val))), data.test
    generator = torch.Generator().manual_seed(seed)
    given: dict[str, Any] = {"eps": [eps], "generator": generator, "progress": _paced(progress)}
    xi = deepfool(model, craft.images, craft.labels, **given, **attack)
    work.save_tensors("perturbation", {"perturbation": xi.cpu()})
    with torch.no_grad(), exact():
        clean = torch.cat([logits_of(model, x).argmax(1) for x, _ in test.batches(512)])
    both = torch.cat([xi, torch.zeros_like(xi)])
    attacked, unattacked = (1 - success_rates(model, test.images, test.labels, both)).tolist()
    return {
        "accuracy": attacked,
        "clean_accuracy": unattacked,
        "fooling_rate": success_rates(model, test.images, clean, xi).item(),
        "magnitude": xi.abs().max().item(),
        "images": {"craft": len(craft), "report": len(test)},
    }


@measurement(
    version=1,
    artefacts=("epsilons",),
    nested={"attack": lambda given: EACH},
)
def adversarial_robustness(
    model: Module,
    data: Splits,
    work: Workspace,
    progress: Any,
    *,
    delta: float = 0.75,
    iterations: int = 10,
    attack: dict,
    images: int,
    target: str = "",
    seed: int = 0,
) -> dict:
    """eps_adv(delta) of section 5.1 on test images, each with a search of its own; `target` as in universal ones."""
    test = data.test.first(min(images, len(data.test)))
    options = attack | {"delta": delta, "iterations": iterations, "targeted": bool(target)}
    options |= {"generator": _seeded(seed), "progress": _paced(progress)}
    result = search_each(model, test.images, aims(data, test, target), **options)
    work.save_arrays("epsilons", {"epsilons": result.epsilons.numpy()})
    spread = {"standard_error": result.standard_error, "unreached": result.unreached}
    metrics = {"eps_adv": result.epsilon, "images": len(test), "gradients": result.gradients}
    return metrics | (spread if test.labels.ndim > 1 else {})


# Plans


def stated(settings: Any, *names: str) -> dict[str, Any]:
    """What a measurement takes as the section's settings have it, and by their names."""
    return {name: getattr(settings, name) for name in names}


def search_attack(settings: Any) -> dict[str, Any]:
    """Options of a section's universal attack, by the kernels' names."""
    sizes = {"steps": settings.search_steps, "batch_size": settings.search_batch}
    return sizes | stated(settings, "beta", "gamma", "straight_through")


def universal_search(settings: Any, model: Run, title: str, attack: dict[str, Any], **more: Any) -> Run:
    """A section's search for eps_uni of a model."""
    passes = settings.search_iterations if settings.search == "binary" else 5
    cost = passes * settings.search_steps * settings.search_batch
    images = {role: getattr(settings, f"{role}_images") for role in SETS}
    given = stated(settings, "delta", "search") | {"iterations": settings.search_iterations, "images": images} | more
    return universal_robustness.plan(settings, title, cost, model=model, attack=attack, **given)


def strongest_search(settings: Any, model: Run, title: str, *, seed: int = 0, times: int = 1, **more: Any) -> Run:
    """A section's search for eps_uni of a model by the ensemble; the first one also measures success at fixed sizes."""
    images = {role: getattr(settings, f"{role}_images") for role in SETS}
    sizes, effort = () if seed or times > 1 else settings.strongest_epsilons, settings.strongest_effort * times
    given = stated(settings, "delta") | {"images": images, "epsilons": sizes, "seed": seed, "effort": effort} | more
    passes = effort * (64 if isinstance(settings, Classification) else 8) * (900 + 160 * len(sizes))
    return strongest.plan(settings, title, passes, model=model, **given)


def adversarial_search(
    settings: Any, model: Run, title: str, attack: dict[str, Any], *, iterations: int, **more: Any
) -> Run:
    """A section's search for eps_adv of a model; attack: options beside its steps."""
    cost = settings.adversarial_images * settings.adversarial_steps * iterations
    attack = {"steps": settings.adversarial_steps} | stated(settings, "beta", "gamma", "straight_through") | attack
    given = stated(settings, "delta", "seed") | {"iterations": iterations, "images": settings.adversarial_images} | more
    return adversarial_robustness.plan(settings, title, cost, model=model, attack=attack, **given)
