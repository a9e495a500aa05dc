"""What perturbations do to the segmentation of driving scenes: section 6.4, and dynamic targets."""

import time
from typing import TYPE_CHECKING

import torch

from satlib.attacks import annealed_step_sizes, attackable, decisions_won, heap_pgd, perturb, universal_pgd
from satlib.segmentation import (
    class_index,
    repeated,
    scene_target,
    segment,
    share_hidden,
    target_structure,
    weakening,
    without,
)
from satlib.study.kinds.evaluation import perturbation_of
from satlib.study.ledger import Workspace

if TYPE_CHECKING:
    from satlib.study.runs import Run, Runner


def compute_perturbation_structure(runner: "Runner", run: "Run", work: Workspace) -> dict:
    """Image-dependent against universal perturbations of one size, for the same images and target (Figure 6).

    The universal one is crafted on validation scenes, each test scene gets one of its own. For both: how far they
    weaken the edges of their image, how far their edges lie on the boundaries of the target, and the share of the
    target's pixels that they win. Kept as arrays: for the first test image both perturbations in half precision, and
    what the model makes of it; not the image, which may not be passed on.
    """
    config, splits = run.config, runner.splits(run.dataset)
    part, target = splits.test.first(min(config["images"], len(splits.test))), scene_target(splits, config["target"])
    generator, began = torch.Generator().manual_seed(config["seed"]), time.monotonic()
    eps, attack, batch = config["eps"], dict(config["attack"]), config["batch_size"]
    sizes = annealed_step_sizes(eps, attack["steps"], beta=attack["beta"], gamma=attack["gamma"])
    images, aim = part.images.float(), repeated(target, len(part))
    metrics = {"eps": eps, "images": len(part)}
    with attackable(runner.model(run.parents["model"])) as net:
        craft = splits.val
        options = {"eps": eps, "targeted": True, "generator": generator, "batch_size": batch, "score_images": len(part)}
        one = universal_pgd(net, craft.images, repeated(target, len(craft)), **options, **attack)
        own = []
        for start in range(0, len(part), batch):
            x, y = images[start : start + batch], aim[start : start + batch]
            options = {"eps": eps, "sharedness": 1, "targeted": True, "keep_best": True, "generator": generator}
            own.append(heap_pgd(net, x, y, steps=attack["steps"], step_size=sizes, **options))
            runner.report(run, "image-dependent perturbations", (start + len(x)) / len(part), began)
        found = {"own": torch.cat(own), "universal": one.expand(len(part), -1, -1, -1)}
        seen = {"clean": segment(net, images)} | {
            name: segment(net, perturb(images, xi, 1)) for name, xi in found.items()
        }
    for name, xi in found.items():
        won, counted = decisions_won(seen[name], aim, targeted=True)
        metrics[name] = {
            "weakening": weakening(images, xi).tolist(),
            "target_structure": target_structure(xi, target).tolist(),
            "target_accuracy": (won.sum() / counted.sum()).item(),
        }
    kept = {name: xi[0].half() for name, xi in found.items()} | {"target": target}
    kept |= {f"segmented_{name}": predicted[0] for name, predicted in seen.items()}
    work.save_arrays("perturbations", {name: value.cpu().numpy() for name, value in kept.items()})
    return metrics


def compute_hiding(runner: "Runner", run: "Run", work: Workspace) -> dict:
    """One perturbation that hides a class everywhere and keeps all else (the dynamic target of Metzen et al. 2017).

    Targets are the model's own predictions in which the class gives way to what is nearest. Crafted on validation
    scenes for every eps at once, scored on test scenes: the share of the class's predicted pixels that are gone, and
    the share of the others that stay. Kept as arrays: the perturbation of the largest eps, and what the model makes
    with and without it of the test scene with most of the class, whose place among them is `example`.
    """
    config, splits = run.config, runner.splits(run.dataset)
    hidden = class_index(splits, config["hide"])
    model = runner.model(run.parents["model"])
    with attackable(model) as net:
        craft = splits.val
        targets = without(segment(net, craft.images), hidden)
        found = universal_pgd(
            net,
            craft.images,
            targets,
            eps=config["epsilons"],
            targeted=True,
            generator=torch.Generator().manual_seed(config["seed"]),
            **config["attack"],
        )
        test = splits.test.images[: config["images"]]
        clean = segment(net, test)
        seen = [segment(net, perturb(test.float(), xi)) for xi in found.split(1)]
    most = int((clean == hidden).flatten(1).sum(1).argmax())
    arrays = {"perturbation": found[-1].half(), "clean": clean[most], "perturbed": seen[-1][most]}
    work.save_arrays("example", {name: value.cpu().numpy() for name, value in arrays.items()})
    return {
        "hide": config["hide"],
        "example": most,
        "scores": [
            {"eps": eps, **share_hidden(clean, after, hidden)}
            for eps, after in zip(config["epsilons"], seen, strict=True)
        ],
    }


def compute_segmentations(runner: "Runner", run: "Run", work: Workspace) -> dict:
    """What a model makes of the first test scene, clean and under its universal perturbations.

    Kept as arrays (H, W): `clean`, and under the perturbation that each search among the parents found, or that came
    closest, so that pictures need no weights.
    """
    scene, names = runner.splits(run.dataset).test.images[:1].float(), [name for name in run.parents if name != "model"]
    with attackable(runner.model(run.parents["model"])) as net:
        seen = {"clean": segment(net, scene)[0]}
        for name in names:
            xi = perturbation_of(runner.record(run.parents[name])).to(runner.device)
            seen[name] = segment(net, perturb(scene, xi))[0]
    work.save_arrays("segmentations", {name: labels.cpu().numpy() for name, labels in seen.items()})
    return {"scene": 0}
