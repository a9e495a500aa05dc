"""Can the evaluations be trusted? Audits, attacks stronger than the paper's, seeds, and transfer between models."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from satlib.errors import SatlibError
from satlib.paper import Cifar10, Trust
from satlib.study.experiments.classification import Plan, cifar10, erm_run, robustness_run
from satlib.study.experiments.scenes import ScenesPlan
from satlib.study.runs import Run

# How each attack differs from the paper's. All take the same number of gradients.
HARD = {"loss_threshold": None, "label_smoothing": 0.0}
MARGIN = HARD | {"loss": "margin"}
ATTACKS: dict[str, dict[str, Any]] = {
    "paper": {},
    "uncapped": {"loss_threshold": None},
    "hard targets": HARD,
    "margin": MARGIN,
    "momentum": {"update": "momentum"},
    "Adam": {"update": "adam"},
    "cosine": {"schedule": "cosine"},
    "straight-through": {"straight_through": True},
    "dominant": {"dominant": True},
    "large mini-batches": {"larger": 4},
    "restarts": {"restarts": 4},
    "warm start": {"warm_start": True},
    "momentum, uncapped, dominant": HARD | {"update": "momentum", "dominant": True},
}


@dataclass(frozen=True)
class TrustPlan:
    """The runs of notebook 09.

    models: what is audited, by title, the undefended one first. audits: of each; masked: of the undefended one behind a
    mask, which the audit must catch. attacks: eps_uni of each by the attacks of ATTACKS. seeds: the paper's search from
    several seeds. transfer: the perturbations of all models on all.
    """

    models: dict[str, Run]
    audits: dict[str, Run]
    masked: dict[str, Run]
    attacks: dict[str, dict[str, Run]]
    seeds: dict[str, list[Run]]
    transfer: Run

    @property
    def runs(self) -> list[Run]:
        """In order of importance."""
        found = [*self.models.values(), *self.audits.values(), *self.masked.values()]
        found += [run for each in self.attacks.values() for run in each.values()]
        return [*found, self.transfer, *(run for each in self.seeds.values() for run in each)]


def trust(
    settings: Cifar10, choices: Trust, *, imagenet: Plan | None = None, cityscapes: ScenesPlan | None = None
) -> TrustPlan:
    """Plan of notebook 09, for models of section 6.1 under its `settings`, with audits of other sections' models."""
    plan = cifar10(settings)
    models = {"ERM": plan.erm}
    for point in choices.audited:
        if point not in plan.models:
            known = ", ".join(map(str, plan.models))
            raise SatlibError(f"audited: {point} is not among the points of section 6.1, which are {known}")
        models[plan.models[point][0].title] = plan.models[point][0]
    if unknown := [name for name in choices.attacks if name not in ATTACKS]:
        raise SatlibError(f"attacks: {unknown[0]!r} is unknown; expected some of {', '.join(ATTACKS)}")
    own = replace(settings, search="k-ary")
    attacks = {
        title: {name: attack_run(own, model, name) for name in choices.attacks} for title, model in models.items()
    }
    untargeted = attacks_on(plan, models.values())
    masked = {mask: _audit(choices, plan.erm, untargeted[plan.erm], mask=mask) for mask in choices.masks}
    audits = {title: _audit(choices, model, untargeted[model]) for title, model in models.items()}
    if imagenet is not None and "6.2" in choices.sections:
        defended = {point[0]: runs[0] for point, runs in reversed(imagenet.models.items())}  # the first of each s
        for model in (imagenet.erm, *(defended[s] for s in sorted(defended))):
            audits[f"6.2: {model.title}"] = _audit(choices, model, imagenet.robustness[model][0])
    if cityscapes is not None and "6.3" in choices.sections:
        final = {point[0]: parts[-1] for point, parts in reversed(cityscapes.models.items())}
        for model in (cityscapes.erm, *(final[s] for s in sorted(final))):
            attack = cityscapes.untargeted[model]
            audits[f"6.3: {model.title}"] = _audit(choices, model, attack, images=choices.scenes)
    shorter = {"erm_epochs": choices.depth_epochs, "erm_restart_epochs": 0} if choices.depth_epochs else {}
    others = [
        replace(erm_run(replace(settings, depth=depth, **shorter)), title=f"ERM, {depth} layers")
        for depth in choices.depths
    ]
    carried = [*models.values(), *others]
    parents = {f"model {i}": model for i, model in enumerate(carried)}
    parents |= {f"search {i}": robustness_run(own, model) for i, model in enumerate(carried)}
    return TrustPlan(
        models=models,
        audits=audits,
        masked=masked,
        attacks=attacks,
        seeds={
            title: [robustness_run(own, model, seed=seed) for seed in range(choices.seeds)]
            for title, model in models.items()
        },
        transfer=_run(plan.erm, choices, "transfer", "transfer", parents, choices.images * len(carried) ** 2),
    )


def attack_run(settings: Cifar10, model: Run, name: str) -> Run:
    """eps_uni of a model by one of ATTACKS, with as many gradients as the paper's takes."""
    base, change = robustness_run(settings, model), dict(ATTACKS[name])
    attack = dict(base.config["attack"])
    search = {key: change.pop(key) for key in ("restarts", "warm_start") if key in change}
    if more := change.pop("larger", None):
        attack |= {"steps": attack["steps"] // more, "batch_size": attack["batch_size"] * more}
    attack["steps"] //= search.get("restarts", 1)
    config = base.config | search | {"attack": attack | change}
    title = base.title if name == "paper" else f"{base.title}, {name}"
    return Run(base.kind, title, base.dataset, config, base.parents, base.cost, base.labels)


def attacks_on(plan: Plan, models: Iterable[Run]) -> dict[Run, Run]:
    """The first search of each of the models."""
    return {model: plan.robustness[model][0] for model in models}


def _audit(choices: Trust, model: Run, search: Run, *, mask: str = "", images: int = 0) -> Run:
    """The audit of the attack that a search uses on a model."""
    attack, images = search.config["attack"], images or choices.images
    title = f"audit of {model.title}" + (f", {mask}" if mask else "")
    cost = attack["steps"] * attack["batch_size"] * (17 + len(choices.epsilons)) + 3 * images * choices.steps
    options = {"attack": attack, "eps": choices.eps, "epsilons": list(choices.epsilons)}
    options |= {"images": images, "image_steps": choices.steps} | ({"mask": mask} if mask else {})
    options |= {"sets": {"craft": "train"}} if search.config.get("sets") else {}
    return _run(model, choices, "audit", title, {"model": model}, cost, **options)


def _run(
    model: Run, choices: Trust, kind: str, title: str, parents: Mapping[str, Run], cost: float, **config: Any
) -> Run:
    config = {"dataset": model.dataset, "seed": choices.seed, "images": choices.images} | config
    return Run(kind, title, model.dataset, config, dict(parents), cost, {"section": "trust"})
