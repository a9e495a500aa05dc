"""Sections 3 to 5: the measurements that accompany them, on an undefended and a defended model of section 6.1."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from satlib.attacks import (
    attack_loss,
    attackable,
    broadcast,
    heap_gradients,
    heap_pgd,
    perturb,
    pgd_step,
    random_start,
    success_rates,
    universal_pgd,
)
from satlib.data import ImageSet, Splits
from satlib.paper import Method
from satlib.risks import expected_risk, heap_risk, risk_under, universal_risk
from satlib.study.measurement import Measurement, Run, measurement
from satlib.study.measurements.classification import erm_run, finetune_run, robustness_run
from satlib.study.measurements.robustness import adversarial_robustness
from satlib.study.records import Workspace
from satlib.universal import options

UNIVERSAL = {"universal": lambda given: options(universal_pgd)}  # the frozen defaults of its settings


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _crafted(model: nn.Module, craft: ImageSet, eps: Any, generator: torch.Generator, options: Mapping) -> Tensor:
    return universal_pgd(model, craft.images, craft.labels, eps=eps, generator=generator, **options)


@measurement(version=1, nested=UNIVERSAL)
def risks(
    model: nn.Module,
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
    test, craft, generator = data.test.first(images), (data.val.images, data.val.labels), _seeded(seed)
    x, y = test.images.float(), test.labels
    one = universal_risk(model, x, y, craft=craft, eps=eps, generator=generator, **universal)
    heaps = [heap_risk(model, x, y, sharedness=s, eps=eps, generator=generator, **heap) for s in sharedness]
    expected = expected_risk(model, x, y)
    chain = [expected, one, *heaps]  # sharedness is listed from the largest to 1
    return {
        "expected": asdict(expected),
        "universal": asdict(one),
        "heap": [{"sharedness": s} | asdict(risk) for s, risk in zip(sharedness, heaps, strict=True)],
        "slack": max(0.0, *(low.loss - high.loss for low, high in pairwise(chain))),
        "images": len(test),
    }


@measurement(version=1, artefacts=("gallery",), nested=UNIVERSAL)
def gallery(
    model: nn.Module,
    data: Splits,
    work: Workspace,
    *,
    eps: float,
    images: int,
    heap: dict,
    universal: dict,
    seed: int = 0,
) -> dict:
    """A few test images under perturbations of their own, and under one crafted for all on validation images."""
    few, generator = data.test.first(images), _seeded(seed)
    x, y = few.images.float(), few.labels
    own = heap_pgd(model, x, y, eps=eps, sharedness=1, generator=generator, **heap)
    one = _crafted(model, data.val, [eps], generator, universal)
    seen = {"clean": x, "own": perturb(x, own, 1), "universal": perturb(x, one, len(x))}
    with torch.no_grad():
        predicted = {name: model(pictures).argmax(1).tolist() for name, pictures in seen.items()}
    arrays = {"images": x, "own": own, "universal": one}
    work.save_arrays("gallery", {name: value.cpu().numpy() for name, value in arrays.items()})
    return {
        "labels": [few.classes[i] for i in y.tolist()],
        "predictions": {name: [few.classes[i] for i in indices] for name, indices in predicted.items()},
    }


@measurement(version=1, nested=UNIVERSAL)
def error_curves(
    model: nn.Module, data: Splits, *, epsilons: list, images: int, heap: dict, universal: dict, seed: int = 0
) -> dict:
    """Error against eps of image-dependent and universal perturbations, and of noise, on the same test images.

    The image-dependent attack keeps each image's best iterate, the universal ones are crafted on validation images.
    """
    test, generator = data.test.first(images), _seeded(seed)
    x, y = test.images.float(), test.labels
    patterns = _crafted(model, data.val, epsilons, generator, universal)
    errors: dict[str, list[float]] = {"image-dependent": [], "universal": [], "random noise": []}
    for eps, pattern in zip(epsilons, patterns, strict=True):
        options = {"steps": heap["steps"], "step_size": heap["relative_step_size"] * eps, "generator": generator}
        own = heap_pgd(model, x, y, eps=eps, sharedness=1, keep_best=True, **options)
        noise = random_start(x.shape, eps, generator).to(x.device)
        for name, xi, s in zip(errors, (own, pattern[None], noise), (1, len(x), 1), strict=True):
            errors[name].append(risk_under(model, x, y, xi, s).error)
    return {"errors": errors, "clean_error": expected_risk(model, x, y).error, "images": len(test)}


def _own_and_unseen(data: Splits, images: int, unseen_images: int) -> tuple[ImageSet, ImageSet]:
    """The first test images, and as many of the others as asked for and there."""
    unseen = data.test.subset(slice(images, None))
    return data.test.first(images), unseen.first(min(unseen_images, len(unseen)))


@measurement(version=1)
def sharing(
    model: nn.Module,
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
    (own, unseen), generator, rows = _own_and_unseen(data, images, unseen_images), _seeded(seed), []
    x, y = own.images.float(), own.labels
    for s in sharedness:
        xi = heap_pgd(model, x, y, sharedness=s, eps=eps, generator=generator, **heap)
        rates = success_rates(model, unseen.images, unseen.labels, xi[:heaps_scored])
        error = risk_under(model, own.images, y, xi, s).error
        rows.append({"sharedness": s, "own_error": error, "unseen_error": rates.mean().item()})
    clean = expected_risk(model, unseen.images, unseen.labels)
    return {"rows": rows, "clean_error": clean.error, "images": len(own), "unseen_images": len(unseen)}


@measurement(version=1, artefacts=("losses",))
def loss_threshold(
    model: nn.Module,
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
    own, unseen = _own_and_unseen(data, images, unseen_images)
    x, y, arrays, metrics = own.images.float(), own.labels, {}, {"images": len(own)}
    for name, kappa in (("capped", loss_threshold), ("uncapped", None)):
        options = heap | {"eps": eps, "loss_threshold": kappa, "generator": _seeded(seed)}
        xi = heap_pgd(model, x, y, sharedness=sharedness, **options)
        with torch.no_grad():
            logits = model(perturb(x, xi, sharedness))
        losses = attack_loss(logits, y)
        arrays[name] = losses.cpu().numpy()
        metrics[name] = {
            "error": (logits.argmax(1) != y).float().mean().item(),
            "unseen_error": success_rates(model, unseen.images, unseen.labels, xi).mean().item(),
            "mean_loss": losses.mean().item(),
            "top_tenth_share": (losses.sort().values[-max(1, len(losses) // 10) :].sum() / losses.sum()).item(),
        }
    work.save_arrays("losses", arrays)
    return metrics


@measurement(version=1, artefacts=("trace",))
def heap_trace(
    model: nn.Module,
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
    batch = data.test.first(images)
    x, y, s, names = batch.images.float(), batch.labels, sharedness, batch.classes
    alpha, bound = torch.tensor(relative_step_size * eps), torch.tensor(eps, device=x.device).view(1, 1, 1, 1)
    options = {"loss_threshold": loss_threshold, "label_smoothing": label_smoothing}
    with attackable(model) as net:
        xi = random_start((-(-len(x) // s), *x.shape[1:]), eps, _seeded(seed)).to(x.device)
        gradients, _ = heap_gradients(net, x, y, broadcast(xi, s, len(x)), sharedness=1, **options)
        iterates = [xi]
        for _ in range(steps):
            xi, _ = pgd_step(net, x, y, xi, eps=bound, alpha=alpha, sharedness=s, **options)
            iterates.append(xi)
        adversarial = perturb(x, xi, s)
        with torch.no_grad():
            clean, fooled = net(x).argmax(1), net(adversarial).argmax(1)
    arrays = {"images": x, "gradients": gradients, "perturbations": torch.stack(iterates), "adversarial": adversarial}
    work.save_arrays("trace", {name: value.detach().cpu().numpy() for name, value in arrays.items()})
    return {
        "labels": [names[i] for i in y.tolist()],
        "clean_predictions": [names[i] for i in clean.tolist()],
        "adversarial_predictions": [names[i] for i in fooled.tolist()],
        "largest": xi.abs().max().item(),
    }


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

    def of(self, stem: str) -> list[Run]:
        """The runs that the notebook `stem` draws from."""
        return {
            "01_preliminaries": [self.erm, self.gallery, self.error_curves, self.risks[self.erm]],
            "02_shared_adversarial_training": [
                *(self.erm, self.defended, *self.risks.values(), *self.sharing.values()),
                *(self.loss_threshold, self.trace),
            ],
            "03_quantifying_robustness": [
                *(self.erm, self.defended, *self.universal.values(), *self.k_ary.values()),
                *self.adversarial.values(),
            ],
        }[stem]

    @property
    def runs(self) -> list[Run]:
        """Of all three notebooks."""
        stems = ("01_preliminaries", "02_shared_adversarial_training", "03_quantifying_robustness")
        return [run for stem in stems for run in self.of(stem)]


def method(settings: Method) -> MethodPlan:
    """Plan of the measurements that accompany sections 3, 4 and 5; models as in section 6.1's plan."""
    erm = erm_run(settings)
    defended = finetune_run(settings, erm, *settings.defended)
    both, steps = (erm, defended), settings.heap_steps
    heap = {"steps": steps, "step_size": settings.heap_relative_step_size * settings.eps}
    schedule = {"beta": settings.beta, "gamma": settings.gamma}
    stream = {"steps": settings.universal_steps, "batch_size": settings.universal_batch} | schedule
    stream_cost = settings.universal_steps * settings.universal_batch
    search_cost = settings.search_steps * settings.search_batch
    at_eps = {"eps": settings.eps, "images": settings.images}

    def planned(what: Measurement, title: str, section: str, model: Run, cost: float, **given: Any) -> Run:
        given = {"seed": settings.seed, "model": model, "section": section} | given
        return what.plan(settings, f"{title} of {model.title}", cost, **given)

    def on_heaps(what: Measurement, title: str, section: str, model: Run, cost: float = 0.0, **given: Any) -> Run:
        cost += settings.images * steps * len(settings.heap_sizes)
        given = at_eps | {"sharedness": settings.heap_sizes, "heap": heap} | given
        return planned(what, title, section, model, cost, **given)

    def adversarial(model: Run) -> Run:
        # An image by itself competes with no other: a loss threshold or smoothed targets would only stall its attack.
        attack = {"steps": settings.adversarial_steps} | schedule
        cost = settings.adversarial_images * settings.adversarial_steps * settings.search_iterations
        options = {"images": settings.adversarial_images, "iterations": settings.search_iterations}
        return planned(
            adversarial_robustness, "eps_adv", "5", model, cost, delta=settings.delta, attack=attack, **options
        )

    unseen = {"unseen_images": settings.unseen_images}
    return MethodPlan(
        erm=erm,
        defended=defended,
        gallery=planned(
            gallery,
            "gallery",
            "3",
            erm,
            settings.gallery_images * steps + stream_cost,
            heap=heap,
            universal=stream,
            eps=settings.eps,
            images=settings.gallery_images,
        ),
        error_curves=planned(
            error_curves,
            "error against eps",
            "3",
            erm,
            len(settings.curve_epsilons) * (settings.curve_images * steps + search_cost),
            heap={"steps": steps, "relative_step_size": settings.heap_relative_step_size},
            universal={"steps": settings.search_steps, "batch_size": settings.search_batch} | schedule,
            epsilons=settings.curve_epsilons,
            images=settings.curve_images,
        ),
        risks={m: on_heaps(risks, "risks", "4.1", m, stream_cost, universal=stream) for m in both},
        sharing={m: on_heaps(sharing, "sharing", "4.2", m, heaps_scored=settings.heaps_scored, **unseen) for m in both},
        loss_threshold=planned(
            loss_threshold,
            "loss threshold",
            "4.3",
            erm,
            2 * settings.images * steps,
            heap=heap | {"label_smoothing": settings.label_smoothing},
            loss_threshold=settings.loss_threshold,
            sharedness=settings.threshold_sharedness,
            **at_eps,
            **unseen,
        ),
        trace=planned(
            heap_trace,
            "Figure 2",
            "4.2",
            defended,
            settings.trace_images * settings.steps,
            images=settings.trace_images,
            sharedness=settings.trace_sharedness,
            eps=settings.trace_eps,
            steps=settings.steps,
            relative_step_size=settings.relative_step_size,
            loss_threshold=settings.loss_threshold,
            label_smoothing=settings.label_smoothing,
        ),
        universal={model: robustness_run(replace(settings, search="binary"), model) for model in both},
        k_ary={model: robustness_run(replace(settings, search="k-ary"), model) for model in both},
        adversarial={model: adversarial(model) for model in both},
    )
