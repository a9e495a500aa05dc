"""Can the evaluations be trusted? Audits, attacks stronger than the paper's, seeds, and transfer between models."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import Module

from satlib import evaluation_checks
from satlib.attacks import attackable, perturb, success_rates
from satlib.data import Splits
from satlib.errors import SatlibError
from satlib.paper import Checks, Cifar10
from satlib.robustness import LARGEST
from satlib.study.measurement import Run, measurement
from satlib.study.measurements.classification import Plan, cifar10, erm_run, robustness_run, strongest_run
from satlib.study.measurements.robustness import attack_options, stated
from satlib.study.measurements.scenes import ScenesPlan, perturbation_of
from satlib.study.records import Record
from satlib.universal import ATTACKS, extended_pgd, options

CRAFTED = 4096  # images to craft on, where they come from a large set
SEARCHES: dict[str, dict[str, Any]] = {name: {"attack": name} for name in ATTACKS} | {
    "warm start": {"warm_start": True}
}


@measurement(version=1, nested={"attack": attack_options})
def audit(
    model: Module,
    search: Record | None,
    data: Splits,
    progress: Any,
    *,
    attack: dict,
    eps: float,
    epsilons: list,
    images: int,
    image_steps: int,
    mask: str = "",
    craft: str = "val",
    seed: int = 0,
) -> dict:
    """The numbers of `satlib.evaluation_checks.measure` for a model, or for the same model behind a mask.

    eps and epsilons are in units of the eps_uni that the search found, or of 255 where it found none or needed none;
    without a search in pixel units. craft: the split whose images the attack is crafted on; of training images, of
    which there may be more than can be held, the first ones.
    """
    unit = (search.metrics["eps_uni"] or LARGEST) if search else 1.0
    test, chosen = data.test.first(min(images, len(data.test))), getattr(data, craft)
    if craft == "train":
        chosen = chosen.first(min(CRAFTED, len(chosen)))
    return evaluation_checks.measure(
        evaluation_checks.MASKS[mask](model) if mask else model,
        craft=(chosen.images[:], chosen.labels),
        test=(test.images[:], test.labels),
        eps=min(LARGEST, eps * unit),
        epsilons=list(dict.fromkeys(min(LARGEST, each * unit) for each in epsilons)),
        attack={name: value for name, value in attack.items() if name != "name"},
        image_steps=image_steps,
        seed=seed,
        progress=progress,
    )


@measurement(version=2)
def transfer(
    models: list[Module], searches: list[Record], data: Splits, *, titles: list, images: int, seed: int = 0
) -> dict:
    """Error of every model under the universal perturbation of every other, at the size that its own search found.

    rates[i][j]: share of the test images that model j gets wrong under the perturbation of model i; None where the
    search of i found none. noise[i][j]: the same under random signs of the same size. clean[j]: without any. saved[j]:
    under its own, by what the perturbed images went through: see `after_saving`.
    """
    test = data.test.first(min(images, len(data.test)))
    perturbations = [perturbation_of(search).to(test.device) for search in searches]
    shape, generator = perturbations[0].shape, torch.Generator().manual_seed(seed)
    signs = (torch.rand(shape, generator=generator) * 2 - 1).sign().to(test.device)
    noise, nothing = [signs * xi.abs().max() for xi in perturbations], torch.zeros_like(signs)
    stacked = torch.cat([*perturbations, *noise, nothing])
    columns, saved = [], []
    for model, xi in zip(models, perturbations, strict=True):
        with attackable(model) as net:
            columns.append(success_rates(net, test.images, test.labels, stacked).tolist())
            forms = after_saving(perturb(test.images.float(), xi, len(test)))
            saved.append({name: success_rates(net, x, test.labels, nothing).item() for name, x in forms.items()})
    rows, count = list(zip(*columns, strict=True)), len(models)
    reached = [search.metrics["rate"] is not None for search in searches]
    return {
        "titles": titles,
        "eps": [xi.abs().max().item() for xi in perturbations],
        "rates": [list(row) if known else None for row, known in zip(rows[:count], reached, strict=True)],
        "noise": [list(row) for row in rows[count : 2 * count]],
        "clean": list(rows[-1]),
        "saved": saved,
        "images": len(test),
    }


def after_saving(images: Tensor) -> dict[str, Tensor]:
    """Images (n, 3, H, W) in 0..255, real numbers, as they come back from a file: "exact" as they are, "8 bits" rounded
    as in a PNG, "JPEG" compressed at quality 90."""
    whole, compressed = images.round().to(torch.uint8), []
    for picture in whole.permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=90)
        compressed.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
    return {"exact": images, "8 bits": whole.float(), "JPEG": torch.stack(compressed).to(images.device).float()}


@dataclass(frozen=True)
class ChecksPlan:
    """The runs of notebook 09.

    models: what is audited, by title, the undefended one first. audits: of each; masked: of the undefended one behind a
    mask, which the audit must catch. attacks: eps_uni of each by several attacks. seeds: the paper's search from
    several seeds. strongest: by the ensemble, of all models of section 6.1 that it is asked about, and paper: by the
    paper's attack as there; doubled: of the first audited ones by the ensemble with twice as many steps. transfer: the
    perturbations of all models on all.
    """

    models: dict[str, Run]
    audits: dict[str, Run]
    masked: dict[str, Run]
    attacks: dict[str, dict[str, Run]]
    seeds: dict[str, list[Run]]
    strongest: dict[str, list[Run]]
    paper: dict[str, list[Run]]
    doubled: dict[str, Run]
    transfer: Run

    @property
    def runs(self) -> list[Run]:
        """In order of importance."""
        planned = [*self.models.values(), *self.audits.values(), *self.masked.values()]
        planned += [run for each in self.attacks.values() for run in each.values()]
        planned += [run for name in self.strongest for run in (*self.strongest[name], *self.paper[name])]
        planned += self.doubled.values()
        return [*planned, self.transfer, *(run for each in self.seeds.values() for run in each)]


def checks(settings: Checks, cifar: Cifar10, others: Mapping[str, Plan | ScenesPlan] | None = None) -> ChecksPlan:
    """Plan of notebook 09, for models of section 6.1 under its settings, with audits of other sections' models."""
    plan, own = cifar10(cifar), replace(cifar, search="k-ary")
    models = {"ERM": plan.erm}
    for point in settings.audited:
        if point not in plan.models:
            known = ", ".join(map(str, plan.models))
            raise SatlibError(f"audited: {point} is not among the points of section 6.1, which are {known}")
        models[plan.models[point][0].title] = plan.models[point][0]
    if unknown := [name for name in settings.attacks if name not in SEARCHES]:
        raise SatlibError(f"attacks: {unknown[0]!r} is unknown; expected some of {', '.join(SEARCHES)}")
    units = _units(plan, list(models.values()))
    audits = {title: _audit(settings, model, plan, units) for title, model in models.items()}
    for section, other in (others or {}).items():
        sizes = _units(other, other.audited)
        audits |= {f"{section}: {model.title}": _audit(settings, model, other, sizes) for model in other.audited}
    shorter = {"erm_epochs": settings.depth_epochs, "erm_restart_epochs": 0} if settings.depth_epochs else {}
    networks = {f"ERM, {depth} layers": replace(cifar, depth=depth, **shorter) for depth in settings.depths}
    carried = [*models.values(), *(replace(erm_run(of), title=title) for title, of in networks.items())]
    given = {"models": carried, "searches": [robustness_run(own, model) for model in carried]}
    given |= {"titles": [model.title for model in carried]} | stated(settings, "images", "seed")
    cost, seeds = settings.images * len(carried) ** 2, range(settings.seeds)
    return ChecksPlan(
        models=models,
        audits=audits,
        masked={mask: _audit(settings, plan.erm, plan, units, mask=mask) for mask in settings.masks},
        attacks={title: {name: attack_run(own, m, name) for name in settings.attacks} for title, m in models.items()},
        seeds={title: [robustness_run(own, model, seed=seed) for seed in seeds] for title, model in models.items()},
        strongest={model.title: searches for model, searches in plan.strongest.items()},
        paper={model.title: plan.robustness[model] for model in plan.strongest},
        doubled={
            title: strongest_run(cifar, model, times=2)
            for title, model in list(models.items())[: settings.doubled]
            if plan.strongest.get(model)
        },
        transfer=transfer.plan(settings, "transfer", cost, dataset=plan.erm.dataset, **given),
    )


def differences(name: str) -> dict[str, Any]:
    """How one of SEARCHES differs from the paper's."""
    search = dict(SEARCHES[name])
    attack = options(ATTACKS[search.pop("attack", "paper")])
    papers = options(extended_pgd) | options(ATTACKS["paper"])
    changed = {option: value for option, value in attack.items() if option not in papers or value != papers[option]}
    return changed | search


def attack_run(settings: Cifar10, model: Run, name: str) -> Run:
    """eps_uni of a model by one of SEARCHES, with as many gradients as the paper's takes."""
    run = robustness_run(settings, model, **SEARCHES[name])
    return run if name == "paper" else replace(run, title=f"{run.title}, {name}")


def _units(plan: Plan | ScenesPlan, models: list[Run]) -> dict[Run, Run]:
    """The searches whose eps_uni is the unit of sizes in audits: the ensemble's if it was asked about all models, else
    those by the paper's attack; in section 6.3 without a target."""
    if isinstance(plan, Plan):
        strongest, papers = plan.strongest, {model: plan.robustness[model][0] for model in models}
    else:
        strongest, papers = plan.strongest_untargeted, {model: plan.untargeted[model] for model in models}
    return {model: strongest[model][0] for model in models} if all(map(strongest.get, models)) else papers


def _audit(settings: Checks, model: Run, plan: Plan | ScenesPlan, units: Mapping[Run, Run], *, mask: str = "") -> Run:
    """The audit of the attack that a plan's searches by the paper's attack use on a model."""
    searched = plan.robustness[model][0] if isinstance(plan, Plan) else plan.untargeted[model]
    images = settings.images if isinstance(plan, Plan) else settings.scenes
    search, attack = searched.settings, searched.settings["attack"]
    gradients = attack["steps"] * attack["batch_size"] * (17 + len(settings.epsilons)) + 3 * images * settings.steps
    title = f"audit of {model.title}" + (f", {mask}" if mask else "")
    given = {"attack": attack, "images": images, "image_steps": settings.steps, "mask": mask, "model": model}
    given |= {"craft": search["sets"]["craft"]} | ({"search": units[model]} if settings.relative else {})
    given |= stated(settings, "eps", "epsilons", "seed")
    return audit.plan(settings, title, gradients, dataset=model.dataset, **given)
