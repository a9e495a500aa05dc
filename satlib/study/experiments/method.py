"""Sections 3 to 5: the measurements that accompany them."""

from dataclasses import dataclass, replace
from typing import Any

from satlib.paper import Cifar10, Method
from satlib.study.experiments.classification import erm_run, finetune_run, robustness_run
from satlib.study.runs import Run


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


def method(settings: Cifar10, choices: Method) -> MethodPlan:
    """Plan of the measurements that accompany sections 3, 4 and 5; models as in section 6.1's plan."""
    erm = erm_run(settings)
    defended = finetune_run(settings, erm, *choices.defended)
    heap = {"steps": choices.heap_steps, "step_size": choices.heap_relative_step_size * choices.eps}
    capped = {"loss_threshold": settings.loss_threshold, "label_smoothing": settings.label_smoothing}
    schedule = {"beta": settings.beta, "gamma": settings.gamma}
    both = (erm, defended)

    def measure(kind: str, what: str, section: str, model: Run, cost: float, **config: Any) -> Run:
        return Run(
            kind=kind,
            title=f"{what} of {model.title}",
            dataset=settings.dataset,
            config={"dataset": settings.dataset, "seed": choices.seed, **config},
            parents={"model": model},
            cost=cost,
            labels={"section": section},
        )

    stream = {"steps": choices.universal_steps, "batch_size": choices.universal_batch} | schedule
    gallery = measure(
        "gallery",
        "gallery",
        "3",
        erm,
        choices.gallery_images * choices.heap_steps + choices.universal_steps * choices.universal_batch,
        heap=heap,
        universal=stream,
        eps=choices.eps,
        images=choices.gallery_images,
    )
    error_curves = measure(
        "error_curves",
        "error against eps",
        "3",
        erm,
        len(choices.curve_epsilons)
        * (choices.curve_images * choices.heap_steps + settings.search_steps * settings.search_batch),
        heap={"steps": choices.heap_steps, "relative_step_size": choices.heap_relative_step_size},
        universal={"steps": settings.search_steps, "batch_size": settings.search_batch} | schedule,
        epsilons=list(choices.curve_epsilons),
        images=choices.curve_images,
    )

    def risks(model: Run) -> Run:
        cost = choices.images * choices.heap_steps * len(choices.heap_sizes)
        cost += choices.universal_steps * choices.universal_batch
        options = {"eps": choices.eps, "images": choices.images, "sharedness": list(choices.heap_sizes)}
        return measure("risks", "risks", "4.1", model, cost, heap=heap, universal=stream, **options)

    def sharing(model: Run) -> Run:
        unseen = {"unseen_images": choices.unseen_images, "heaps_scored": choices.heaps_scored}
        cost = choices.images * choices.heap_steps * len(choices.heap_sizes)
        options = {"eps": choices.eps, "images": choices.images, "sharedness": list(choices.heap_sizes)}
        return measure("sharing", "sharing", "4.2", model, cost, heap=heap, **unseen, **options)

    threshold = measure(
        "loss_threshold",
        "loss threshold",
        "4.3",
        erm,
        2 * choices.images * choices.heap_steps,
        heap=heap | {"label_smoothing": settings.label_smoothing},
        loss_threshold=settings.loss_threshold,
        eps=choices.eps,
        images=choices.images,
        unseen_images=choices.unseen_images,
        sharedness=choices.threshold_sharedness,
    )
    trace = measure(
        "heap_trace",
        "Figure 2",
        "4.2",
        defended,
        choices.trace_images * settings.steps,
        images=choices.trace_images,
        sharedness=choices.trace_sharedness,
        eps=choices.trace_eps,
        steps=settings.steps,
        relative_step_size=settings.relative_step_size,
        **capped,
    )

    def adversarial(model: Run) -> Run:
        # An image by itself competes with no other: a loss threshold or smoothed targets would only stall its attack.
        attack = {"steps": choices.adversarial_steps} | schedule
        cost = choices.adversarial_images * choices.adversarial_steps * settings.search_iterations
        options = {"images": choices.adversarial_images, "iterations": settings.search_iterations}
        return measure(
            "adversarial_robustness", "eps_adv", "5", model, cost, delta=settings.delta, attack=attack, **options
        )

    return MethodPlan(
        erm=erm,
        defended=defended,
        gallery=gallery,
        error_curves=error_curves,
        risks={model: risks(model) for model in both},
        sharing={model: sharing(model) for model in both},
        loss_threshold=threshold,
        trace=trace,
        universal={model: robustness_run(replace(settings, search="binary"), model) for model in both},
        k_ary={model: robustness_run(replace(settings, search="k-ary"), model) for model in both},
        adversarial={model: adversarial(model) for model in both},
    )
