"""The measurements that accompany sections 3 to 4."""

from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from satlib.attacks import (
    attack_loss,
    attackable,
    broadcast,
    heap_gradients,
    heap_pgd,
    perturb,
    pgd_step,
    success_rates,
    universal_pgd,
)
from satlib.risks import expected_risk, heap_risk, risk_under, universal_risk
from satlib.study.ledger import Workspace

if TYPE_CHECKING:
    from satlib.study.runs import Run, Runner


def compute_risks(runner: "Runner", run: "Run", work: Workspace) -> dict:
    """The four risks of sections 3.1 and 4.2 on the same test images, and the attack's slack in their order.

    The loss is neither capped nor smoothed here, in the attack as in the risk: the order is one of suprema of L.
    """
    config, splits = run.config, runner.splits(run.dataset)
    test, craft = splits.test.first(config["images"]), splits.val
    x, y = test.images.float(), test.labels
    model, generator = runner.model(run.parents["model"]), torch.Generator().manual_seed(config["seed"])
    universal = universal_risk(
        model,
        x,
        y,
        craft=(craft.images, craft.labels),
        eps=config["eps"],
        generator=generator,
        **config["universal"],
    )
    heaps = [
        heap_risk(model, x, y, sharedness=s, eps=config["eps"], generator=generator, **config["heap"])
        for s in config["sharedness"]
    ]
    expected = expected_risk(model, x, y)
    chain = [expected, universal, *heaps]  # sharedness is listed from the largest to 1
    slack = max(0.0, *(low.loss - high.loss for low, high in pairwise(chain)))
    return {
        "expected": asdict(expected),
        "universal": asdict(universal),
        "heap": [{"sharedness": s} | asdict(risk) for s, risk in zip(config["sharedness"], heaps, strict=True)],
        "slack": slack,
        "images": len(test),
    }


def compute_gallery(runner: "Runner", run: "Run", work: Workspace) -> dict:
    """A few test images under perturbations of their own, and under one crafted for all on validation images."""
    config, splits = run.config, runner.splits(run.dataset)
    few, craft, eps = splits.test.first(config["images"]), splits.val, config["eps"]
    x, y = few.images.float(), few.labels
    model, generator = runner.model(run.parents["model"]), torch.Generator().manual_seed(config["seed"])
    own = heap_pgd(model, x, y, eps=eps, sharedness=1, generator=generator, **config["heap"])
    one = universal_pgd(model, craft.images, craft.labels, eps=eps, generator=generator, **config["universal"])
    seen = {"clean": x, "own": perturb(x, own, 1), "universal": perturb(x, one)}
    with torch.no_grad():
        predicted = {name: model(pictures).argmax(1).tolist() for name, pictures in seen.items()}
    arrays = {"images": x, "own": own, "universal": one}
    work.save_arrays("gallery", {name: value.cpu().numpy() for name, value in arrays.items()})
    return {
        "labels": [few.classes[i] for i in y.tolist()],
        "predictions": {name: [few.classes[i] for i in indices] for name, indices in predicted.items()},
    }


def compute_error_curves(runner: "Runner", run: "Run", work: Workspace) -> dict:
    """Error against eps of image-dependent and universal perturbations, and of noise, on the same test images.

    The image-dependent attack keeps each image's best iterate, the universal ones are crafted on validation images.
    """
    config, splits = run.config, runner.splits(run.dataset)
    test, craft = splits.test.first(config["images"]), splits.val
    x, y = test.images.float(), test.labels
    model, generator = runner.model(run.parents["model"]), torch.Generator().manual_seed(config["seed"])
    patterns = universal_pgd(
        model, craft.images, craft.labels, eps=config["epsilons"], generator=generator, **config["universal"]
    )
    errors: dict[str, list[float]] = {"image-dependent": [], "universal": [], "random noise": []}
    steps, relative = config["heap"]["steps"], config["heap"]["relative_step_size"]
    for eps, pattern in zip(config["epsilons"], patterns, strict=True):
        options = {"steps": steps, "step_size": relative * eps, "keep_best": True, "generator": generator}
        own = heap_pgd(model, x, y, eps=eps, sharedness=1, **options)
        noise = ((torch.rand(x.shape, generator=generator) * 2 - 1) * eps).to(x.device)
        for name, xi, s in (
            ("image-dependent", own, 1),
            ("universal", pattern[None], len(x)),
            ("random noise", noise, 1),
        ):
            errors[name].append(risk_under(model, x, y, xi, s).error)
    return {"errors": errors, "clean_error": expected_risk(model, x, y).error, "images": len(test)}


def compute_sharing(runner: "Runner", run: "Run", work: Workspace) -> dict:
    """How far the shared perturbations of a mini-batch fool their own heap, and images that they never saw."""
    config, test = run.config, runner.splits(run.dataset).test
    own, unseen = test.first(config["images"]), test.subset(slice(config["images"], None))
    unseen = unseen.first(min(config["unseen_images"], len(unseen)))
    model, generator = runner.model(run.parents["model"]), torch.Generator().manual_seed(config["seed"])
    rows = []
    for s in config["sharedness"]:
        xi = heap_pgd(
            model,
            own.images.float(),
            own.labels,
            sharedness=s,
            eps=config["eps"],
            generator=generator,
            **config["heap"],
        )
        rates = success_rates(model, unseen.images, unseen.labels, xi[: config["heaps_scored"]])
        on_own = risk_under(model, own.images, own.labels, xi, s)
        rows.append({"sharedness": s, "own_error": on_own.error, "unseen_error": rates.mean().item()})
    clean = expected_risk(model, unseen.images, unseen.labels)
    return {"rows": rows, "clean_error": clean.error, "images": len(own), "unseen_images": len(unseen)}


def compute_loss_threshold(runner: "Runner", run: "Run", work: Workspace) -> dict:
    """Winner takes all (section 4.3): one perturbation for a heap, found with and without the loss threshold."""
    config, test = run.config, runner.splits(run.dataset).test
    own, unseen = test.first(config["images"]), test.subset(slice(config["images"], None))
    unseen = unseen.first(min(config["unseen_images"], len(unseen)))
    model, arrays, metrics = runner.model(run.parents["model"]), {}, {"images": len(own)}
    for name, kappa in (("capped", config["loss_threshold"]), ("uncapped", None)):
        xi = heap_pgd(
            model,
            own.images.float(),
            own.labels,
            sharedness=config["sharedness"],
            eps=config["eps"],
            loss_threshold=kappa,
            generator=torch.Generator().manual_seed(config["seed"]),
            **config["heap"],
        )
        with torch.no_grad():
            logits = model(perturb(own.images.float(), xi, config["sharedness"]))
        losses = attack_loss(logits, own.labels)
        arrays[name] = losses.cpu().numpy()
        fooled = logits.argmax(1) != own.labels
        metrics[name] = {
            "error": fooled.float().mean().item(),
            "unseen_error": success_rates(model, unseen.images, unseen.labels, xi).mean().item(),
            "mean_loss": losses.mean().item(),
            "top_tenth_share": (losses.sort().values[-max(1, len(losses) // 10) :].sum() / losses.sum()).item(),
        }
    work.save_arrays("losses", arrays)
    return metrics


def compute_heap_trace(runner: "Runner", run: "Run", work: Workspace) -> dict:
    """Everything that Figure 2 shows, from a real mini-batch: images, gradients, shared perturbations, broadcast."""
    config, splits = run.config, runner.splits(run.dataset)
    batch, s, eps = splits.test.first(config["images"]), config["sharedness"], config["eps"]
    x, y = batch.images.float(), batch.labels
    alpha = torch.tensor(config["relative_step_size"] * eps)
    options = {"loss_threshold": config["loss_threshold"], "label_smoothing": config["label_smoothing"]}
    with attackable(runner.model(run.parents["model"])) as net:
        heaps, bound = -(-len(x) // s), torch.tensor(eps).view(1, 1, 1, 1)
        xi = (torch.rand((heaps, *x.shape[1:]), generator=torch.Generator().manual_seed(config["seed"])) * 2 - 1) * eps
        xi, bound = xi.to(x.device), bound.to(x.device)
        gradients, _ = heap_gradients(net, x, y, broadcast(xi, s, len(x)), sharedness=1, **options)
        steps = [xi]
        for _ in range(config["steps"]):
            xi, _ = pgd_step(net, x, y, xi, bound, alpha, sharedness=s, **options)
            steps.append(xi)
        adversarial = perturb(x, xi, s)
        with torch.no_grad():
            clean, fooled = net(x).argmax(1), net(adversarial).argmax(1)
    arrays = {
        "images": x,
        "gradients": gradients,
        "perturbations": torch.stack(steps),
        "adversarial": adversarial,
    }
    work.save_arrays("trace", {name: value.detach().cpu().numpy() for name, value in arrays.items()})
    names = batch.classes
    return {
        "labels": [names[i] for i in y.tolist()],
        "clean_predictions": [names[i] for i in clean.tolist()],
        "adversarial_predictions": [names[i] for i in fooled.tolist()],
        "largest": xi.abs().max().item(),
    }
