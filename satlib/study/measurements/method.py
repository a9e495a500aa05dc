"""Sections 3 to 5: the measurements that accompany them, on an undefended and a defended model of section 6.1."""

from dataclasses import asdict, dataclass, replace
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from satlib import attacks
from satlib.data import ImageSet, Splits
from satlib.device import exact
from satlib.paper import Method
from satlib.risks import expected_risk, heap_risk, risk_under, universal_risk
from satlib.study.measurement import Measurement, Run, measurement
from satlib.study.measurements.classification import erm_run, finetune_run, robustness_run
from satlib.study.measurements.robustness import adversarial_search, search_attack, stated
from satlib.study.records import Workspace
from satlib.universal import options

UNIVERSAL = {"universal": lambda given: options(attacks.universal_pgd)}  # the frozen defaults of its settings


def _first(data: Splits, count: int) -> tuple[Tensor, Tensor]:
    """The first test images, float32, and their labels."""
    part = data.test.first(count)
    return part.images.float(), part.labels


def _unseen(data: Splits, images: int, count: int) -> ImageSet:
    """As many of the test images after the first as asked for and there."""
    return data.test.subset(slice(images, images + count))


@measurement(version=2, nested=UNIVERSAL)
def risks(
    model: Module,
    data: Splits,
    *,
    eps: float,
    images: int,
    sharedness: list,
    heap: dict,
    universal: dict,
    seed: int = 0,
) -> dict:
    """The four risks of sections 3.1 and 4.2 on the same test images, and the attack's slack in their order.

    The loss is neither capped nor smoothed here, in the attack as in the risk: the order is one of suprema of L.
    """
    (x, y), craft = _first(data, images), (data.val.images, data.val.labels)
    common = {"eps": eps, "generator": torch.Generator().manual_seed(seed)}
    one = universal_risk(model, x, y, craft=craft, **common, **universal)
    heaps = [heap_risk(model, x, y, sharedness=s, **common, **heap) for s in sharedness]
    expected = expected_risk(model, x, y)
    rising = pairwise([expected, one, *heaps])  # sharedness is listed from the largest to 1
    return {
        "expected": asdict(expected),
        "universal": asdict(one),
        "heap": [{"sharedness": s} | asdict(risk) for s, risk in zip(sharedness, heaps, strict=True)],
        "slack": max(0.0, *(low.loss - high.loss for low, high in rising)),
        "images": len(x),
    }


@measurement(version=2, artefacts=("gallery",), nested=UNIVERSAL)
def gallery(
    model: Module, data: Splits, work: Workspace, *, eps: float, images: int, heap: dict, universal: dict, seed: int = 0
) -> dict:
    """A few test images under perturbations of their own, and under one crafted for all on validation images."""
    (x, y), names = _first(data, images), data.test.classes
    generator = torch.Generator().manual_seed(seed)
    own = attacks.heap_pgd(model, x, y, eps=eps, sharedness=1, generator=generator, **heap)
    one = attacks.universal_pgd(model, data.val.images, data.val.labels, eps=[eps], generator=generator, **universal)
    seen = {"clean": x, "own": attacks.perturb(x, own, 1), "universal": attacks.perturb(x, one, len(x))}
    with torch.no_grad(), exact():
        predicted = {name: model(pictures).argmax(1).tolist() for name, pictures in seen.items()}
    arrays = {"images": x, "own": own, "universal": one}
    work.save_arrays("gallery", {name: value.cpu().numpy() for name, value in arrays.items()})
    return {
        "labels": [names[i] for i in y.tolist()],
        "predictions": {name: [names[i] for i in indices] for name, indices in predicted.items()},
    }


@measurement(version=2, nested=UNIVERSAL)
def error_curves(
    model: Module, data: Splits, *, epsilons: list, images: int, heap: dict, universal: dict, seed: int = 0
) -> dict:
    """Error against eps of image-dependent and universal perturbations, and of noise, on the same test images.

    The image-dependent attack keeps each image's best iterate, the universal ones are crafted on validation images.
    """
    (x, y), craft = _first(data, images), (data.val.images, data.val.labels)
    generator = torch.Generator().manual_seed(seed)
    patterns = attacks.universal_pgd(model, *craft, eps=epsilons, generator=generator, **universal)
    errors: dict[str, list[float]] = {"image-dependent": [], "universal": [], "random noise": []}
    for eps, pattern in zip(epsilons, patterns, strict=True):
        options = {"steps": heap["steps"], "step_size": heap["relative_step_size"] * eps, "generator": generator}
        own = attacks.heap_pgd(model, x, y, eps=eps, sharedness=1, keep_best=True, **options)
        noise = attacks.random_start(x.shape, eps, generator).to(x.device)
        for name, xi, s in zip(errors, (own, pattern[None], noise), (1, len(x), 1), strict=True):
            errors[name].append(risk_under(model, x, y, xi, s).error)
    return {"errors": errors, "clean_error": expected_risk(model, x, y).error, "images": len(x)}


@measurement(version=2)
def sharing(
    model: Module,
    data: Splits,
    *,
    eps: float,
    images: int,
    unseen_images: int,
    heaps_scored: int,
    sharedness: list,
    heap: dict,
    seed: int = 0,
) -> dict:
    """How far the shared perturbations of a mini-batch fool their own heap, and images that they never saw."""
    (x, y), unseen = _first(data, images), _unseen(data, images, unseen_images)
    generator, rows = torch.Generator().manual_seed(seed), []
    for s in sharedness:
        xi = attacks.heap_pgd(model, x, y, sharedness=s, eps=eps, generator=generator, **heap)
        rates = attacks.success_rates(model, unseen.images, unseen.labels, xi[:heaps_scored])
        error = risk_under(model, x, y, xi, s).error
        rows.append({"sharedness": s, "own_error": error, "unseen_error": rates.mean().item()})
    clean = expected_risk(model, unseen.images, unseen.labels)
    return {"rows": rows, "clean_error": clean.error, "images": len(x), "unseen_images": len(unseen)}


@measurement(version=2, artefacts=("losses",))
def loss_threshold(
    model: Module,
    data: Splits,
    work: Workspace,
    *,
    eps: float,
    images: int,
    unseen_images: int,
    sharedness: int,
    loss_threshold: float,
    heap: dict,
    seed: int = 0,
) -> dict:
    """Winner takes all (section 4.3): one perturbation for a heap, found with and without the loss threshold."""
    (x, y), unseen = _first(data, images), _unseen(data, images, unseen_images)
    arrays, metrics = {}, {"images": len(x)}
    for name, kappa in (("capped", loss_threshold), ("uncapped", None)):
        options = heap | {"eps": eps, "loss_threshold": kappa, "generator": torch.Generator().manual_seed(seed)}
        xi = attacks.heap_pgd(model, x, y, sharedness=sharedness, **options)
        with torch.no_grad(), exact():
            logits = model(attacks.perturb(x, xi, sharedness))
        losses = attacks.attack_loss(logits, y)
        arrays[name] = losses.cpu().numpy()
        metrics[name] = {
            "error": (logits.argmax(1) != y).float().mean().item(),
            "unseen_error": attacks.success_rates(model, unseen.images, unseen.labels, xi).mean().item(),
            "mean_loss": losses.mean().item(),
            "top_tenth_share": (losses.sort().values[-max(1, len(losses) // 10) :].sum() / losses.sum()).item(),
        }
    work.save_arrays("losses", arrays)
    return metrics


@measurement(version=1, artefacts=("trace",))
def heap_trace(
    model: Module,
    data: Splits,
    work: Workspace,
    *,
    eps: float,
    images: int,
    sharedness: int,
    steps: int,
    relative_step_size: float,
    loss_threshold: float | None,
    label_smoothing: float,
    seed: int = 0,
) -> dict:
    """Everything that Figure 2 shows, from a real mini-batch: images, gradients, shared perturbations, broadcast."""
    (x, y), names, s = _first(data, images), data.test.classes, sharedness
    alpha, bound = torch.tensor(relative_step_size * eps), torch.tensor(eps, device=x.device).view(1, 1, 1, 1)
    options = {"loss_threshold": loss_threshold, "label_smoothing": label_smoothing, "straight_through": False}
    start = attacks.random_start((-(-len(x) // s), *x.shape[1:]), eps, torch.Generator().manual_seed(seed))
    iterates = [start.to(x.device)]
    with attacks.attackable(model) as net:
        spread = attacks.broadcast(iterates[0], s, len(x))
        gradients, _ = attacks.heap_gradients(net, x, y, spread, sharedness=1, **options)
        for _ in range(steps):
            xi, _ = attacks.pgd_step(net, x, y, iterates[-1], eps=bound, alpha=alpha, sharedness=s, **options)
            iterates.append(xi)
        adversarial = attacks.perturb(x, iterates[-1], s)
        with torch.no_grad(), exact():
            decided = {"clean_predictions": net(x).argmax(1), "adversarial_predictions": net(adversarial).argmax(1)}
    arrays = {"images": x, "gradients": gradients, "perturbations": torch.stack(iterates), "adversarial": adversarial}
    work.save_arrays("trace", {name: value.detach().cpu().numpy() for name, value in arrays.items()})
    shown = {name: [names[i] for i in indices.tolist()] for name, indices in ({"labels": y} | decided).items()}
    return shown | {"largest": iterates[-1].abs().max().item()}


@dataclass(frozen=True)
class MethodPlan:
    """The runs behind notebooks 01 to 03, on the undefended model and one defended by shared adversarial training."""

    erm: Run
    defended: Run
    gallery: Run
    error_curves: Run
    risks: dict[Run, Run]
    sharing: dict[Run, Run]
    loss_threshold: Run
    trace: Run
    universal: dict[Run, Run]  # the paper's binary search
    k_ary: dict[Run, Run]  # ours
    adversarial: dict[Run, Run]

    @property
    def _by_notebook(self) -> dict[str, list[Run]]:
        both, on_heaps = [self.erm, self.defended], [*self.risks.values(), *self.sharing.values()]
        searches = [run for of in (self.universal, self.k_ary, self.adversarial) for run in of.values()]
        return {
            "01_preliminaries": [self.erm, self.gallery, self.error_curves, self.risks[self.erm]],
            "02_shared_adversarial_training": [*both, *on_heaps, self.loss_threshold, self.trace],
            "03_quantifying_robustness": [*both, *searches],
        }

    def of(self, stem: str) -> list[Run]:
        """The runs that the notebook `stem` draws from."""
        return self._by_notebook[stem]

    @property
    def runs(self) -> list[Run]:
        """Of all three notebooks."""
        return list(chain.from_iterable(self._by_notebook.values()))


def method(settings: Method) -> MethodPlan:
    """Plan of the measurements that accompany sections 3, 4 and 5; models as in section 6.1's plan."""
    erm = erm_run(settings)
    defended = finetune_run(settings, erm, *settings.defended)
    both, steps, size = (erm, defended), settings.heap_steps, settings.heap_relative_step_size
    universal, at_eps = search_attack(settings), stated(settings, "eps", "images")
    stream = universal | {"steps": settings.universal_steps, "batch_size": settings.universal_batch}
    heap = {"steps": steps, "step_size": size * settings.eps}
    heaps = at_eps | {"sharedness": settings.heap_sizes, "heap": heap}
    few = at_eps | {"images": settings.gallery_images, "heap": heap, "universal": stream}
    curves = {"epsilons": settings.curve_epsilons, "images": settings.curve_images, "universal": universal}
    curves |= {"heap": {"steps": steps, "relative_step_size": size}}
    threshold = at_eps | {"sharedness": settings.threshold_sharedness} | stated(settings, "unseen_images")
    threshold |= {"heap": heap | stated(settings, "label_smoothing")} | stated(settings, "loss_threshold")
    trace = {name: getattr(settings, f"trace_{name}") for name in ("images", "sharedness", "eps")}
    trace |= stated(settings, "steps", "relative_step_size", "loss_threshold", "label_smoothing")
    stream_cost = settings.universal_steps * settings.universal_batch
    heaps_cost = settings.images * steps * len(settings.heap_sizes)
    curve_cost = settings.curve_images * steps + settings.search_steps * settings.search_batch
    asked: dict[Measurement, tuple[str, str, float, dict[str, Any]]] = {  # title, section, cost and settings
        gallery: ("gallery", "3", settings.gallery_images * steps + stream_cost, few),
        error_curves: ("error against eps", "3", len(settings.curve_epsilons) * curve_cost, curves),
        risks: ("risks", "4.1", heaps_cost + stream_cost, heaps | {"universal": stream}),
        sharing: ("sharing", "4.2", heaps_cost, heaps | stated(settings, "unseen_images", "heaps_scored")),
        loss_threshold: ("loss threshold", "4.3", 2 * settings.images * steps, threshold),
        heap_trace: ("Figure 2", "4.2", settings.trace_images * settings.steps, trace),
    }

    def planned(what: Measurement, model: Run) -> Run:
        title, section, cost, given = asked[what]
        given = given | {"section": section, "model": model, "seed": settings.seed}
        return what.plan(settings, f"{title} of {model.title}", cost, **given)

    def adversarial(model: Run) -> Run:
        # An image by itself competes with no other: a loss threshold or smoothed targets would only stall its attack.
        iterations = settings.search_iterations
        return adversarial_search(settings, model, f"eps_adv of {model.title}", {}, iterations=iterations, section="5")

    return MethodPlan(
        erm=erm,
        defended=defended,
        gallery=planned(gallery, erm),
        error_curves=planned(error_curves, erm),
        risks={model: planned(risks, model) for model in both},
        sharing={model: planned(sharing, model) for model in both},
        loss_threshold=planned(loss_threshold, erm),
        trace=planned(heap_trace, defended),
        universal={model: robustness_run(replace(settings, search="binary"), model) for model in both},
        k_ary={model: robustness_run(replace(settings, search="k-ary"), model) for model in both},
        adversarial={model: adversarial(model) for model in both},
    )
