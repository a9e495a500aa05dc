"""Can the evaluations be trusted? Audits, attacks stronger than the paper's, seeds, and transfer between models."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from satlib.errors import SatlibError
from satlib.experiments.classification import Plan, erm_run, robustness_run
from satlib.lab import Run
from satlib.paper import Cifar10, Trust

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


def trust(settings: Cifar10, plan: Plan, choices: Trust) -> TrustPlan:
    """Plan of notebook 09, for models of section 6.1 under its `settings`."""
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
    masked = {mask: _audit(settings, choices, plan.erm, mask=mask) for mask in choices.masks}
    others = [
        replace(erm_run(replace(settings, depth=depth)), title=f"ERM, {depth} layers") for depth in choices.depths
    ]
    carried = [*models.values(), *others]
    parents = {f"model {i}": model for i, model in enumerate(carried)}
    parents |= {f"search {i}": robustness_run(own, model) for i, model in enumerate(carried)}
    return TrustPlan(
        models=models,
        audits={title: _audit(settings, choices, model) for title, model in models.items()},
        masked=masked,
        attacks=attacks,
        seeds={
            title: [robustness_run(own, model, seed=seed) for seed in range(choices.seeds)]
            for title, model in models.items()
        },
        transfer=_run(settings, choices, "transfer", "transfer", parents, choices.images * len(carried) ** 2),
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


def _audit(settings: Cifar10, choices: Trust, model: Run, *, mask: str = "") -> Run:
    attack = robustness_run(settings, model).config["attack"]
    title = f"audit of {model.title}" + (f", {mask}" if mask else "")
    cost = attack["steps"] * attack["batch_size"] * (17 + len(choices.epsilons)) + 3 * choices.images * choices.steps
    options = {"attack": attack, "eps": choices.eps, "epsilons": list(choices.epsilons)}
    options |= {"images": choices.images, "image_steps": choices.steps} | ({"mask": mask} if mask else {})
    return _run(settings, choices, "audit", title, {"model": model}, cost, **options)


def _run(
    settings: Cifar10, choices: Trust, kind: str, title: str, parents: Mapping[str, Run], cost: float, **config: Any
) -> Run:
    config = {"dataset": settings.dataset, "seed": choices.seed, "images": choices.images} | config
    return Run(kind, title, settings.dataset, config, dict(parents), cost, {"section": "trust"})
