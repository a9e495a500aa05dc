"""How each kind of run is computed: from its settings and parents to metrics and artefacts."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from satlib import parallel
from satlib.attacks import (
    ascend,
    attack_loss,
    attackable,
    broadcast,
    heap_gradients,
    heap_pgd,
    perturb,
    success_rates,
    universal_pgd,
)
from satlib.data.imageset import ImageSet
from satlib.deepfool import universal_deepfool
from satlib.defenses import DEFENSES
from satlib.ledger import Workspace
from satlib.precision import autocast
from satlib.risks import expected_risk, heap_risk, risk_under, universal_risk
from satlib.robustness import adversarial_robustness, universal_robustness
from satlib.training import Training, accuracy, train

if TYPE_CHECKING:
    from satlib.lab import Lab, Run


@dataclass(frozen=True)
class Kind:
    """How runs of one kind are computed. Bump `version` when the same settings would give another result.

    A record without the `artefacts` is computed again; where they are `inner`, only when a run has to be computed that
    builds on it: so that weights need not be published with every model.
    """

    version: int
    compute: Callable[["Lab", "Run", Workspace], dict]
    artefacts: tuple[str, ...] = ()
    inner: bool = False


def compute_train(lab: "Lab", run: "Run", work: Workspace) -> dict:
    """ERM or (shared) adversarial training; continues from its last finished epoch.

    On several ranks, rank 0 says which run it computes to the others, in `parallel.follow`, and all compute it alike;
    only rank 0 looks anything up, and the others get what it found.
    """
    splits, settings, ranks = lab.splits(run.dataset), Training.from_config(run.config["training"]), parallel.here()
    if ranks.rank == 0:
        ranks.told(lab.spec(run).id)
    model, fitted = lab.initial_model(run) if ranks.rank == 0 else (lab.new_model(run), None)
    if fitted and (fitted.missing or fitted.other_shape or fitted.unused):
        lab.progress.line(f"[run] {run.title}: {fitted}")
    state, history = None, []
    if checkpoint := work.load_checkpoint():
        state, info = checkpoint
        history = info["history"]
    began, first, fresh = time.monotonic(), len(history) / max(1, settings.epochs), len(history)

    adversary = None
    if defense := run.config.get("defense"):
        options = {name: value for name, value in defense.items() if name != "name"}
        adversary = DEFENSES[defense["name"]](splits.train, progress=lambda text: progress(text, first), **options)

    def after_epoch(state: dict, history: list[dict]) -> None:
        work.save_checkpoint(state, {"history": history})
        if len(history) < settings.epochs:
            lab.check_budget((time.monotonic() - began) / (len(history) - fresh))

    def progress(text: str, done: float) -> None:
        lab.report(run, text, (done - first) / (1 - first), began)

    history = train(
        model,
        splits.train,
        settings,
        adversary=adversary,
        state=state,
        history=history,
        after_epoch=after_epoch,
        progress=progress,
    )
    work.save_tensors("weights", {name: value.cpu() for name, value in model.state_dict().items()})
    return {
        "accuracy": accuracy(model, splits.test),
        "validation_accuracy": accuracy(model, splits.val),
        "train_accuracy": accuracy(model, splits.train.first(min(5000, len(splits.train)))),
        "test_images": len(splits.test),
        "history": history,
    }


def compute_universal_robustness(lab: "Lab", run: "Run", work: Workspace) -> dict:
    """The search of section 5.2: crafted, decided and reported on disjoint images.

    By default crafted on validation images, decided and reported on two parts of the test images; `sets` in the
    settings names another set for each. The number of images is at most that in the settings, 0 for all.
    """
    config, splits = run.config, lab.splits(run.dataset)
    wanted, sets = config["images"], config.get("sets", {"craft": "val", "choose": "test", "report": "test"})
    taken: dict[str, int] = {}  # of each set so far

    def part(role: str) -> ImageSet:
        whole, start = getattr(splits, sets[role]), taken.get(sets[role], 0)
        end = min(start + wanted[role], len(whole)) if wanted[role] else len(whole)
        taken[sets[role]] = end
        return whole.subset(slice(start, end))

    craft, choose, report = part("craft"), part("choose"), part("report")
    model, began = lab.model(run.parents["model"]), time.monotonic()

    def progress(text: str, done: float) -> None:
        lab.report(run, text, done, began)
        lab.check_budget((time.monotonic() - began) * (1 - done) / done)  # a search is not resumed: all or nothing

    found = universal_robustness(
        model,
        craft=(craft.images, craft.labels),
        choose=(choose.images, choose.labels),
        report=(report.images, report.labels),
        delta=config["delta"],
        iterations=config["iterations"],
        search=config["search"],
        generator=torch.Generator().manual_seed(config["seed"]),
        progress=progress,
        **config["attack"],
    )
    if found.perturbation is not None:
        work.save_tensors("perturbation", {"perturbation": found.perturbation.cpu()})
    return {
        "eps_uni": found.epsilon,
        "rate": found.rate,
        "report_rate": found.report_rate,
        "monotone": found.monotone,
        "images": {"craft": len(craft), "choose": len(choose), "report": len(report)},
        "evaluations": [asdict(evaluation) for evaluation in found.evaluations],
    }


def compute_predictions(lab: "Lab", run: "Run", work: Workspace) -> dict:
    """Which classes a model predicts for test images, clean and under its universal perturbation (A.7).

    Counts by class; `fooled`: of images that are right when clean and wrong under the perturbation. Entropies in bits,
    of the shares of the classes; None where there is no perturbation, or nothing is fooled.
    """
    test, model = lab.splits(run.dataset).test, lab.model(run.parents["model"])
    search = lab.record(run.parents["search"])
    found = search.tensors("perturbation")["perturbation"].to(lab.device) if search.metrics["rate"] else None
    counts = {name: torch.zeros(len(test.classes), dtype=torch.long) for name in ("clean", "perturbed", "fooled")}
    with torch.no_grad(), attackable(model) as net:
        for x, y in test.batches(512):
            with autocast(x.device):
                clean = net(x).argmax(1)
                perturbed = None if found is None else net(perturb(x, found, len(x))).argmax(1)
            seen = {"clean": clean}
            if perturbed is not None:
                seen |= {"perturbed": perturbed, "fooled": perturbed[(clean == y) & (perturbed != y)]}
            for name, predicted in seen.items():
                counts[name] += torch.bincount(predicted, minlength=len(test.classes)).cpu()
    return {
        "images": len(test),
        "eps_uni": search.metrics["eps_uni"],
        "counts": {name: values.tolist() for name, values in counts.items()},
        "entropy_bits": {name: entropy_bits(values) for name, values in counts.items()},
    }


def entropy_bits(counts: torch.Tensor) -> float | None:
    """Entropy of the shares of `counts` in bits; None of nothing."""
    if not counts.sum():
        return None
    shares = counts.double() / counts.sum()
    return -torch.special.xlogy(shares, shares).sum().item() / math.log(2)


def compute_universal_deepfool(lab: "Lab", run: "Run", work: Workspace) -> dict:
    """Accuracy on test images under a DeepFool universal perturbation, found on validation images (Figure 3, right)."""
    config, splits = run.config, lab.splits(run.dataset)
    craft = splits.val.first(min(config["images"], len(splits.val)))
    model, began = lab.model(run.parents["model"]), time.monotonic()

    def progress(text: str, done: float) -> None:
        lab.report(run, text, done, began)

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


def compute_epoch_cost(lab: "Lab", run: "Run", work: Workspace) -> dict:
    """Seconds an epoch of each way of training takes here, one after the other on the same model.

    Measured on some of the images and scaled to all; what a baseline finds once for several epochs is shared out.
    """
    config, train_set = run.config, lab.splits(run.dataset).train
    base, some = lab.model(run.parents["model"]), min(config["images"], len(train_set))
    scale, began = len(train_set) / some, time.monotonic()
    settings = Training.from_config(config["training"])
    ways = [("ERM", replace(settings, sigma=0.0), None)]
    ways += [(f"s = {s}", replace(settings, sharedness=s), None) for s in config["sharedness"]]
    ways += [(name, settings, options) for name, options in config["defenses"].items()]
    seconds: dict[str, float] = {}
    for index, (name, each, options) in enumerate(ways):
        model, finding = copy.deepcopy(base), 0.0
        adversary = None
        if options is not None:
            epochs, crafted = options.get("epochs_each", 1), options.get("pool_size", 1)
            adversary = DEFENSES[name](train_set, **options | ({"pool_size": 1} if "pool_size" in options else {}))
            start = time.perf_counter()
            adversary.start_epoch(model, 0, torch.Generator().manual_seed(config["seed"]))
            _wait(lab.device)
            finding = (time.perf_counter() - start) * crafted / epochs
            adversary.start_epoch = lambda *_: None  # it has been found, and is not part of what follows
        train(model, train_set, replace(each, epochs=1, epoch_images=settings.batch_size), adversary=adversary)
        start = time.perf_counter()
        train(model, train_set, replace(each, epochs=1, epoch_images=some), adversary=adversary)
        _wait(lab.device)
        seconds[name] = (time.perf_counter() - start) * scale + finding
        lab.report(run, name, (index + 1) / len(ways), began)
    return {"seconds": seconds, "images": some, "scaled_to": len(train_set)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def compute_adversarial_robustness(lab: "Lab", run: "Run", work: Workspace) -> dict:
    """eps_adv(delta) on test images, each with a search of its own."""
    config, test = run.config, lab.splits(run.dataset).test
    images = test.first(min(config["images"], len(test)))
    found = adversarial_robustness(
        lab.model(run.parents["model"]),
        images.images,
        images.labels,
        delta=config["delta"],
        iterations=config["iterations"],
        generator=torch.Generator().manual_seed(config["seed"]),
        **config["attack"],
    )
    work.save_arrays("epsilons", {"epsilons": found.epsilons.numpy()})
    return {"eps_adv": found.epsilon, "images": len(images)}


def compute_risks(lab: "Lab", run: "Run", work: Workspace) -> dict:
    """The four risks of sections 3.1 and 4.2 on the same test images, and the attack's slack in their order.

    The loss is neither capped nor smoothed here, in the attack as in the risk: the order is one of suprema of L.
    """
    config, splits = run.config, lab.splits(run.dataset)
    test, craft = splits.test.first(config["images"]), splits.val
    x, y = test.images.float(), test.labels
    model, generator = lab.model(run.parents["model"]), torch.Generator().manual_seed(config["seed"])
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


def compute_gallery(lab: "Lab", run: "Run", work: Workspace) -> dict:
    """A few test images under perturbations of their own, and under one crafted for all on validation images."""
    config, splits = run.config, lab.splits(run.dataset)
    few, craft, eps = splits.test.first(config["images"]), splits.val, config["eps"]
    x, y = few.images.float(), few.labels
    model, generator = lab.model(run.parents["model"]), torch.Generator().manual_seed(config["seed"])
    own = heap_pgd(model, x, y, eps=eps, sharedness=1, generator=generator, **config["heap"])
    one = universal_pgd(model, craft.images, craft.labels, eps=eps, generator=generator, **config["universal"])
    seen = {"clean": x, "own": perturb(x, own, 1), "universal": perturb(x, one, len(x))}
    with torch.no_grad():
        predicted = {name: model(pictures).argmax(1).tolist() for name, pictures in seen.items()}
    arrays = {"images": x, "own": own, "universal": one}
    work.save_arrays("gallery", {name: value.cpu().numpy() for name, value in arrays.items()})
    return {
        "labels": [few.classes[i] for i in y.tolist()],
        "predictions": {name: [few.classes[i] for i in indices] for name, indices in predicted.items()},
    }


def compute_error_curves(lab: "Lab", run: "Run", work: Workspace) -> dict:
    """Error against eps of image-dependent and universal perturbations, and of noise, on the same test images.

    The image-dependent attack keeps each image's best iterate, the universal ones are crafted on validation images.
    """
    config, splits = run.config, lab.splits(run.dataset)
    test, craft = splits.test.first(config["images"]), splits.val
    x, y = test.images.float(), test.labels
    model, generator = lab.model(run.parents["model"]), torch.Generator().manual_seed(config["seed"])
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


def compute_sharing(lab: "Lab", run: "Run", work: Workspace) -> dict:
    """How far the shared perturbations of a mini-batch fool their own heap, and images that they never saw."""
    config, test = run.config, lab.splits(run.dataset).test
    own, unseen = test.first(config["images"]), test.subset(slice(config["images"], None))
    unseen = unseen.first(min(config["unseen_images"], len(unseen)))
    model, generator = lab.model(run.parents["model"]), torch.Generator().manual_seed(config["seed"])
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


def compute_loss_threshold(lab: "Lab", run: "Run", work: Workspace) -> dict:
    """Winner takes all (section 4.3): one perturbation for a heap, found with and without the loss threshold."""
    config, test = run.config, lab.splits(run.dataset).test
    own, unseen = test.first(config["images"]), test.subset(slice(config["images"], None))
    unseen = unseen.first(min(config["unseen_images"], len(unseen)))
    model, arrays, metrics = lab.model(run.parents["model"]), {}, {"images": len(own)}
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


def compute_heap_trace(lab: "Lab", run: "Run", work: Workspace) -> dict:
    """Everything that Figure 2 shows, from a real mini-batch: images, gradients, shared perturbations, broadcast."""
    config, splits = run.config, lab.splits(run.dataset)
    batch, s, eps = splits.test.first(config["images"]), config["sharedness"], config["eps"]
    x, y = batch.images.float(), batch.labels
    alpha = torch.tensor(config["relative_step_size"] * eps)
    options = {"loss_threshold": config["loss_threshold"], "label_smoothing": config["label_smoothing"]}
    with attackable(lab.model(run.parents["model"])) as net:
        heaps, bound = -(-len(x) // s), torch.tensor(eps).view(1, 1, 1, 1)
        xi = (torch.rand((heaps, *x.shape[1:]), generator=torch.Generator().manual_seed(config["seed"])) * 2 - 1) * eps
        xi, bound = xi.to(x.device), bound.to(x.device)
        gradients, _ = heap_gradients(net, x, y, broadcast(xi, s, len(x)), sharedness=1, **options)
        steps = [xi]
        for _ in range(config["steps"]):
            xi, _ = ascend(net, x, y, xi, eps=bound, alpha=alpha, sharedness=s, **options)
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


KINDS = {
    "train": Kind(1, compute_train, ("weights",), inner=True),
    "universal_robustness": Kind(2, compute_universal_robustness),
    "predictions": Kind(1, compute_predictions),
    "universal_deepfool": Kind(1, compute_universal_deepfool),
    "epoch_cost": Kind(1, compute_epoch_cost),
    "adversarial_robustness": Kind(1, compute_adversarial_robustness, ("epsilons",)),
    "gallery": Kind(1, compute_gallery, ("gallery",)),
    "error_curves": Kind(1, compute_error_curves),
    "risks": Kind(1, compute_risks),
    "sharing": Kind(1, compute_sharing),
    "loss_threshold": Kind(1, compute_loss_threshold, ("losses",)),
    "heap_trace": Kind(1, compute_heap_trace, ("trace",)),
}
