"""Section 5: how large must perturbations be? Searches for eps_uni and eps_adv, and DeepFool's of one size."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from satlib.attacks import success_rates
from satlib.data import ImageSet, Splits
from satlib.deepfool import universal_deepfool as deepfool
from satlib.robustness import adversarial_robustness as search_each
from satlib.robustness import universal_robustness as search_universal
from satlib.segmentation import repeated, scene_target
from satlib.study.measurement import Run, measurement, options_of
from satlib.study.records import Workspace
from satlib.universal import ATTACKS, named, options

SETS = {"craft": "val", "choose": "test", "report": "test"}  # the split whose images have each role in a search


def attack_options(given: Mapping) -> dict[str, Any]:
    """The frozen defaults of a named universal attack."""
    return {"name": "paper"} | options(ATTACKS[given.get("name", "paper")])


def universal_attack(settings: Mapping[str, Any]) -> Any:
    """The attack that the settings {"name": ..., option: value} mean."""
    return named(settings["name"], **{name: value for name, value in settings.items() if name != "name"})


@measurement(version=2, nested={"attack": attack_options})
def universal_robustness(
    model: nn.Module,
    data: Splits,
    work: Workspace,
    progress: Any,
    *,
    attack: dict = {"name": "paper"},  # noqa: B006 - read only
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

    sets: the split that each of the three takes its images from; images: how many at most, 0 for all. In segmentation
    `target` names the training scene that the attack aims at.
    """
    parts = _disjoint(data, sets, images)
    began = time.monotonic()

    def report(text: str, done: float) -> None:
        # A search is not resumed: all or nothing.
        progress(text, done, needed=(time.monotonic() - began) * (1 - done) / done)

    result = search_universal(
        universal_attack(attack),
        model,
        **{role: (part.images, aims(data, part, target)) for role, part in parts.items()},
        targeted=bool(target),
        delta=delta,
        iterations=iterations,
        search=search,
        warm_start=warm_start,
        generator=torch.Generator().manual_seed(seed),
        progress=report,
    )
    for name, xi in (("perturbation", result.perturbation), ("closest", result.closest)):
        if xi is not None:
            work.save_tensors(name, {"perturbation": xi.cpu()})
    return {
        "eps_uni": result.epsilon,
        "rate": result.rate,
        "report_rate": result.report_rate,
        "monotone": result.monotone,
        "images": {role: len(part) for role, part in parts.items()},
        "evaluations": [asdict(evaluation) for evaluation in result.evaluations],
    }


def _disjoint(data: Splits, sets: Mapping[str, str], images: Mapping[str, int]) -> dict[str, ImageSet]:
    """The images of each role: those of one split follow each other."""
    taken: dict[str, int] = dict.fromkeys(sets.values(), 0)
    parts = {}
    for role, name in sets.items():
        whole, start = getattr(data, name), taken[name]
        taken[name] = min(start + images[role], len(whole)) if images[role] else len(whole)
        parts[role] = whole.subset(slice(start, taken[name]))
    return parts


def aims(data: Splits, part: ImageSet, target: str) -> Tensor:
    """What an attack is about on these images: their labels, or the target scene for each of them."""
    return repeated(scene_target(data, target), len(part)) if target else part.labels


@measurement(version=1, nested={"attack": lambda given: options(deepfool)})
def universal_deepfool(
    model: nn.Module,
    data: Splits,
    work: Workspace,
    progress: Any,
    *,
    eps: float,
    images: int,
    attack: dict = {},  # noqa: B006 - read only
    seed: int = 0,
) -> dict:
    """Accuracy on test images under a DeepFool universal perturbation, found on validation images (Figure 3, right)."""
    craft, test = data.val.first(min(images, len(data.val))), data.test
    generator = torch.Generator().manual_seed(seed)
    xi = deepfool(model, craft.images, craft.labels, eps=[eps], generator=generator, progress=progress, **attack)
    work.save_tensors("perturbation", {"perturbation": xi.cpu()})
    with torch.no_grad():
        clean = torch.cat([model(x).argmax(1) for x, _ in test.batches(512)])
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
    nested={"attack": lambda given: options_of(search_each, without=("delta", "iterations", "targeted"))},
)
def adversarial_robustness(
    model: nn.Module,
    data: Splits,
    work: Workspace,
    *,
    delta: float = 0.75,
    iterations: int = 10,
    attack: dict = {},  # noqa: B006 - read only
    images: int,
    target: str = "",
    seed: int = 0,
) -> dict:
    """eps_adv(delta) of section 5.1 on test images, each with a search of its own; `target` as in universal ones."""
    test = data.test.first(min(images, len(data.test)))
    options = attack | {"delta": delta, "iterations": iterations, "targeted": bool(target)}
    generator = torch.Generator().manual_seed(seed)
    result = search_each(model, test.images, aims(data, test, target), generator=generator, **options)
    work.save_arrays("epsilons", {"epsilons": result.epsilons.numpy()})
    spread = {"standard_error": result.standard_error, "unreached": result.unreached}
    return {"eps_adv": result.epsilon, "images": len(test)} | (spread if test.labels.ndim > 1 else {})


# Plans


def search_run(section: Any, model: Run, title: str, attack: dict[str, Any], **more: Any) -> Run:
    """A section's search for eps_uni of a model."""
    passes = section.search_iterations if section.search == "binary" else 5
    return universal_robustness.plan(
        section,
        title,
        passes * section.search_steps * section.search_batch,
        model=model,
        attack=attack,
        delta=section.delta,
        search=section.search,
        iterations=section.search_iterations,
        images={role: getattr(section, f"{role}_images") for role in SETS},
        **more,
    )
