"""How attacks do on a trained model: sections 5 and 6."""

import functools
import math
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from satlib.attacks import attackable, perturb, success_rates
from satlib.data.imageset import ImageSet, Splits
from satlib.deepfool import universal_deepfool
from satlib.precision import autocast
from satlib.robustness import adversarial_robustness, universal_robustness
from satlib.segmentation import repeated, scene_target
from satlib.study.ledger import Record, Workspace
from satlib.universal import extended_pgd

if TYPE_CHECKING:
    from satlib.study.runs import Run, Runner


FIRST = 16  # test images whose predictions are kept one by one


def compute_universal_robustness(runner: "Runner", run: "Run", work: Workspace) -> dict:
    """The search of section 5.2: crafted, decided and reported on disjoint images.

    By default crafted on validation images, decided and reported on two parts of the test images; `sets` in the
    settings names another set for each. The number of images is at most that in the settings, 0 for all. In
    segmentation `target` names the training scene that the attack aims at.
    """
    config, splits = run.config, runner.splits(run.dataset)
    wanted, sets = config["images"], config.get("sets", {"craft": "val", "choose": "test", "report": "test"})
    taken: dict[str, int] = {}  # of each set so far

    def part(role: str) -> ImageSet:
        whole, start = getattr(splits, sets[role]), taken.get(sets[role], 0)
        end = min(start + wanted[role], len(whole)) if wanted[role] else len(whole)
        taken[sets[role]] = end
        return whole.subset(slice(start, end))

    craft, choose, report = part("craft"), part("choose"), part("report")
    model, began = runner.model(run.parents["model"]), time.monotonic()

    def progress(text: str, done: float) -> None:
        runner.report(run, text, done, began)
        runner.check_budget((time.monotonic() - began) * (1 - done) / done)  # a search is not resumed: all or nothing

    restarts = config.get("restarts", 1)  # which the steps were divided by
    steps = config["attack"]["steps"] * restarts
    found = universal_robustness(
        functools.partial(extended_pgd, **config["attack"] | {"steps": steps, "restarts": restarts}),
        model,
        craft=(craft.images, aims(run, splits, craft)),
        choose=(choose.images, aims(run, splits, choose)),
        report=(report.images, aims(run, splits, report)),
        targeted="target" in config,
        delta=config["delta"],
        iterations=config["iterations"],
        search=config["search"],
        generator=torch.Generator().manual_seed(config["seed"]),
        progress=progress,
        warm_start=config.get("warm_start", False),
    )
    for name, xi in (("perturbation", found.perturbation), ("closest", found.closest)):
        if xi is not None:
            work.save_tensors(name, {"perturbation": xi.cpu()})
    return {
        "eps_uni": found.epsilon,
        "rate": found.rate,
        "report_rate": found.report_rate,
        "monotone": found.monotone,
        "images": {"craft": len(craft), "choose": len(choose), "report": len(report)},
        "evaluations": [asdict(evaluation) for evaluation in found.evaluations],
    }


def perturbation_of(search: Record) -> torch.Tensor:
    """The universal perturbation (1, C, H, W) in pixel units that a search found, or that came closest."""
    name = "perturbation" if search.metrics["rate"] is not None else "closest"
    return search.tensors(name)["perturbation"]


def aims(run: "Run", splits: Splits, part: ImageSet) -> torch.Tensor:
    """What the attack of a run is about on these images: their labels, or the target scene for each of them."""
    if "target" not in run.config:
        return part.labels
    return repeated(scene_target(splits, run.config["target"]), len(part))


def compute_predictions(runner: "Runner", run: "Run", work: Workspace) -> dict:
    """Which classes a model predicts for test images, clean and under its universal perturbation (A.7).

    Counts by class; `fooled`: of images that are right when clean and wrong under the perturbation. Entropies in bits,
    of the shares of the classes; None where there is no perturbation, or nothing is fooled. `first`: the classes
    predicted for the first test images, so that pictures of them need no weights.
    """
    test, model = runner.splits(run.dataset).test, runner.model(run.parents["model"])
    search = runner.record(run.parents["search"])
    found = search.tensors("perturbation")["perturbation"].to(runner.device) if search.metrics["rate"] else None
    first: dict[str, list[int]] = {}
    counts = {name: torch.zeros(len(test.classes), dtype=torch.long) for name in ("clean", "perturbed", "fooled")}
    with torch.no_grad(), attackable(model) as net:
        for x, y in test.batches(512):
            with autocast(x.device):
                clean = net(x).argmax(1)
                perturbed = None if found is None else net(perturb(x, found)).argmax(1)
            seen = {"clean": clean}
            if perturbed is not None:
                seen |= {"perturbed": perturbed, "fooled": perturbed[(clean == y) & (perturbed != y)]}
            first = first or {name: predicted[:FIRST].tolist() for name, predicted in seen.items() if name != "fooled"}
            for name, predicted in seen.items():
                counts[name] += torch.bincount(predicted, minlength=len(test.classes)).cpu()
    return {
        "images": len(test),
        "eps_uni": search.metrics["eps_uni"],
        "first": first,
        "counts": {name: values.tolist() for name, values in counts.items()},
        "entropy_bits": {name: entropy_bits(values) for name, values in counts.items()},
    }


def entropy_bits(counts: torch.Tensor) -> float | None:
    """Entropy of the shares of `counts` in bits; None of nothing."""
    if not counts.sum():
        return None
    shares = counts.double() / counts.sum()
    return -torch.special.xlogy(shares, shares).sum().item() / math.log(2)


def compute_universal_deepfool(runner: "Runner", run: "Run", work: Workspace) -> dict:
    """Accuracy on test images under a DeepFool universal perturbation, found on validation images (Figure 3, right)."""
    config, splits = run.config, runner.splits(run.dataset)
    craft = splits.val.first(min(config["images"], len(splits.val)))
    model, began = runner.model(run.parents["model"]), time.monotonic()

    def progress(text: str, done: float) -> None:
        runner.report(run, text, done, began)

    xi = universal_deepfool(
        model,
        craft.images,
        eps=config["eps"],
        generator=torch.Generator().manual_seed(config["seed"]),
        progress=progress,
        **config["attack"],
    )
    work.save_tensors("perturbation", {"perturbation": xi.cpu()})
    test, nothing = splits.test, torch.zeros_like(xi)
    with torch.no_grad():
        clean = torch.cat([model(x).argmax(1) for x, _ in test.batches(512)])
    both = torch.cat([xi, nothing])
    attacked, unattacked = (1 - success_rates(model, test.images, test.labels, both)).tolist()
    return {
        "accuracy": attacked,
        "clean_accuracy": unattacked,
        "fooling_rate": success_rates(model, test.images, clean, xi).item(),
        "magnitude": xi.abs().max().item(),
        "images": {"craft": len(craft), "report": len(test)},
    }


def compute_adversarial_robustness(runner: "Runner", run: "Run", work: Workspace) -> dict:
    """eps_adv(delta) on test images, each with a search of its own; `target` as for a universal search."""
    config, splits = run.config, runner.splits(run.dataset)
    images = splits.test.first(min(config["images"], len(splits.test)))
    found = adversarial_robustness(
        runner.model(run.parents["model"]),
        images.images,
        aims(run, splits, images),
        targeted="target" in config,
        delta=config["delta"],
        iterations=config["iterations"],
        generator=torch.Generator().manual_seed(config["seed"]),
        **config["attack"],
    )
    work.save_arrays("epsilons", {"epsilons": found.epsilons.numpy()})
    spread = (
        {}
        if images.labels.ndim == 1
        else {
            "standard_error": found.standard_error,
            "unreached": found.unreached,
        }
    )
    return {"eps_adv": found.epsilon, "images": len(images)} | spread
