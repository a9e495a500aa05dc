"""Sections 6.1 and 6.2: the models, how attacks do on each of them, and what an epoch costs."""

import math
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from satlib.attacks import perturb
from satlib.data import Splits
from satlib.defenses import DEFENSES
from satlib.device import exact
from satlib.errors import SatlibError
from satlib.network import attackable, logits_of
from satlib.paper import Cifar10, Classification, ImageNet
from satlib.study.measurement import Run, measurement
from satlib.study.measurements.robustness import (
    search_attack,
    stated,
    strongest_search,
    universal_deepfool,
    universal_search,
)
from satlib.study.measurements.training import epoch_cost, pretrained_weights, train_run, training_settings
from satlib.study.records import Record
from satlib.universal import ATTACKS, options

FIRST = 16  # test images whose predictions are kept one by one
Point = tuple[int, float, float]  # sharedness, eps, sigma
Baseline = tuple[str, float]  # name of the defence, eps


@measurement(version=2)
def predictions(model: Module, search: Record, data: Splits) -> dict:
    """Which classes a model predicts for test images, clean and under its universal perturbation (A.7).

    Counts by class; `fooled`: of images that are right when clean and wrong under the perturbation. Entropies in bits,
    of the shares of the classes; None where there is no perturbation, or nothing is fooled. `first`: the classes
    predicted for the first test images, so that pictures of them need no weights.
    """
    test, names = data.test, ("clean", "perturbed", "fooled")
    xi = search.tensors("perturbation")["perturbation"].to(test.device) if search.metrics["rate"] else None
    first: dict[str, list[int]] = {}
    counts = {name: torch.zeros(len(test.classes), dtype=torch.long) for name in names}
    with torch.no_grad(), exact(), attackable(model) as net:
        for x, y in test.batches(512):
            seen = {"clean": logits_of(net, x).argmax(1)}
            if xi is not None:
                seen["perturbed"] = logits_of(net, perturb(x, xi)).argmax(1)
            first = first or {name: predicted[:FIRST].tolist() for name, predicted in seen.items()}
            if xi is not None:
                seen["fooled"] = seen["perturbed"][(seen["clean"] == y) & (seen["perturbed"] != y)]
            for name, predicted in seen.items():
                counts[name] += torch.bincount(predicted, minlength=len(test.classes)).cpu()
    return {
        "images": len(test),
        "eps_uni": search.metrics["eps_uni"],
        "first": first,
        "counts": {name: values.tolist() for name, values in counts.items()},
        "entropy_bits": {name: entropy_bits(values) for name, values in counts.items()},
    }


def entropy_bits(counts: Tensor) -> float | None:
    """Entropy of the shares of `counts` in bits; None of nothing."""
    shares = counts.double() / counts.sum()
    return -torch.special.xlogy(shares, shares).sum().item() / math.log(2) if counts.any() else None


@dataclass(frozen=True)
class Plan:
    """The runs of section 6.1 or 6.2: the models, how attacks do on each of them, and what an epoch costs.

    models: by (s, eps, sigma), one for each seed of training; baselines: by (name, eps). robustness: of every model,
    one search for each seed by the paper's attack; strongest: by the ensemble; deepfool, predictions: of every model,
    where the section has them.
    """

    erm: Run
    models: dict[Point, list[Run]]
    baselines: dict[Baseline, Run]
    robustness: dict[Run, list[Run]] = field(default_factory=dict)
    strongest: dict[Run, list[Run]] = field(default_factory=dict)
    deepfool: dict[Run, Run] = field(default_factory=dict)
    predictions: dict[Run, Run] = field(default_factory=dict)
    cost: Run | None = None

    @property
    def trained(self) -> list[Run]:
        """All models, the undefended one first, in order of importance: repetitions come last."""
        first = [runs[0] for runs in self.models.values()]
        again = [run for runs in self.models.values() for run in runs[1:]]
        return [self.erm, *first, *self.baselines.values(), *again]

    @property
    def runs(self) -> list[Run]:
        """In order of importance: each model followed by its evaluations."""
        planned = []
        for model in self.trained:
            others = (of[model] for of in (self.deepfool, self.predictions) if model in of)
            planned += [model, *self.robustness[model], *self.strongest.get(model, ()), *others]
        return planned + ([self.cost] if self.cost else [])

    @property
    def audited(self) -> list[Run]:
        """The undefended model, and the first defended one of each sharedness."""
        defended = {sharedness: runs[0] for (sharedness, _, _), runs in reversed(self.models.items())}
        return [self.erm, *(defended[s] for s in sorted(defended))]


def cifar10(settings: Cifar10) -> Plan:
    """Plan of section 6.1 under the given settings."""
    erm = erm_run(settings)
    baselines = {(name, eps): baseline_run(settings, erm, name, eps) for name, eps in settings.baselines}
    plan = _searched(settings, erm, baselines)
    deepfool = {model: deepfool_run(settings, model) for model in plan.trained}
    return replace(plan, deepfool=deepfool, cost=cost_run(settings, erm))


def imagenet(settings: ImageNet) -> Plan:
    """Plan of section 6.2 under the given settings."""
    plan = _searched(settings, erm_run(settings), {})
    predicted = {
        model: predictions.plan(settings, f"predictions of {model.title}", 4096, model=model, search=searches[0])
        for model, searches in plan.robustness.items()
    }
    return replace(plan, predictions=predicted)


def _searched(settings: Classification, erm: Run, baselines: dict[Baseline, Run]) -> Plan:
    """What both sections have: all models, and the searches for their eps_uni."""
    grid = product(settings.epsilons, settings.sigmas, settings.sharedness)
    points = settings.points or tuple((s, eps, sigma) for eps, sigma, s in grid)
    if unknown := set(settings.repeated) - set(points):
        raise SatlibError(f"repeated: {sorted(unknown)} are not among the points; add them there, or drop them here")
    models = {}
    for point in points:
        seeds = range(settings.seed, settings.seed + (settings.train_seeds if point in settings.repeated else 1))
        models[point] = [finetune_run(settings, erm, *point, seed=seed) for seed in seeds]
    plan = Plan(erm, models, baselines)
    for model in plan.trained:
        plan.robustness[model] = [robustness_run(settings, model, seed=i) for i in range(settings.search_seeds)]
    titles = {model.title: model for model in plan.trained}
    asked = [title for title in settings.strongest_models or titles if title in titles]  # points may leave some out
    if not asked:
        raise SatlibError(f"strongest_models={settings.strongest_models}: expected some of {', '.join(titles)}")
    for title in asked:
        seeds = range(settings.strongest_seeds)
        plan.strongest[titles[title]] = [strongest_run(settings, titles[title], seed=i) for i in seeds]
    return plan


def erm_run(settings: Classification) -> Run:
    """Pre-training by empirical risk minimisation, with a restart where the settings ask for one."""
    first = training_settings(settings, "erm", nesterov=True)
    if not first.epochs and not settings.pretrained:
        raise SatlibError("erm_epochs: 0 without pretrained weights; name a file of them, or train for some epochs")
    weights = pretrained_weights(settings.pretrained)
    if not settings.erm_restart_epochs:
        if settings.erm_dataset:
            raise SatlibError(
                f"erm_dataset: {settings.erm_dataset!r} is for the first training, but erm_restart_epochs is 0; "
                "set it to the epochs on the data set itself"
            )
        return train_run(settings, first, "ERM", **weights)
    elsewhere = replace(settings, dataset=settings.erm_dataset or settings.dataset)
    title = f"ERM on {settings.erm_dataset}" if settings.erm_dataset else "ERM, first cycle"
    changed = {"schedule": "one-cycle", "seed": settings.seed + 1}  # other mini-batches than in the first epochs
    changed |= {"epochs": settings.erm_restart_epochs, "learning_rate": settings.erm_restart_learning_rate}
    again = replace(first, **changed)
    return train_run(settings, again, "ERM", init=train_run(elsewhere, first, title, **weights))


def finetune_run(
    settings: Classification, erm: Run, sharedness: int, eps: float, sigma: float, *, seed: int | None = None
) -> Run:
    """Fine-tuning of the ERM model by (shared) adversarial training; seed: None for the settings' own."""
    tuning = training_settings(settings, "finetune", sharedness=sharedness, eps=eps, sigma=sigma)
    title = f"s={sharedness}, eps={eps:g}, sigma={sigma:g}"
    if seed is not None and seed != tuning.seed:
        tuning, title = replace(tuning, seed=seed), f"{title}, seed {seed}"
    return train_run(settings, tuning, title, init=erm)


def baseline_run(settings: Cifar10, erm: Run, name: str, eps: float) -> Run:
    """Fine-tuning of the ERM model by one of the defences that the paper compares with (section 6.1)."""
    known = baseline_options(settings)
    if name not in known:
        raise SatlibError(f"baselines: {name!r} is no defence; expected one of {', '.join(known)}")
    tuning = training_settings(settings, "finetune", sharedness=1, eps=eps, sigma=settings.baseline_sigma)
    rounds = -(-settings.finetune_epochs // settings.uad_epochs)
    finding = {
        "DeepFool UAD": rounds * settings.uad_pool * settings.uad_images * 40,  # 10 gradients, a few times for each
        "fictitious play": settings.finetune_epochs * settings.response_steps * settings.batch_size,
    }
    defense = {"name": name, "eps": eps} | known[name]
    run = train_run(settings, tuning, f"{name}, eps={eps:g}", init=erm, defense=defense)
    return replace(run, cost=run.cost / 2 + finding.get(name, 0))


def baseline_options(settings: Cifar10) -> dict[str, dict[str, Any]]:
    """Settings of each defence of `satlib.defenses`, but for eps."""
    pool = {"pool_size": settings.uad_pool, "epochs_each": settings.uad_epochs, "images_each": settings.uad_images}
    return {
        "DeepFool UAD": pool | _deepfool_options(settings),
        "fictitious play": {"steps": settings.response_steps, "batch_size": settings.batch_size},
        **{name: {} for name in DEFENSES if name not in ("DeepFool UAD", "fictitious play")},
    }


def _deepfool_options(settings: Cifar10) -> dict[str, Any]:
    return {"passes": settings.deepfool_passes, "batch_size": settings.deepfool_batch}


def attack_settings(settings: Classification, name: str) -> dict[str, Any]:
    """The section's attack as the one of ATTACKS of this name: what that changes about the paper's stays changed."""
    chosen = search_attack(settings) | stated(settings, "loss_threshold", "label_smoothing")
    own, papers = options(ATTACKS[name]), options(ATTACKS["paper"])
    return {"name": name} | {key: value for key, value in chosen.items() if key in own and own[key] == papers[key]}


def robustness_run(settings: Classification, model: Run, *, attack: str = "paper", seed: int = 0, **more: Any) -> Run:
    """eps_uni(delta) of a trained model by an attack of ATTACKS; by default the paper's (section 5.2)."""
    title = f"eps_uni of {model.title}" + (f", seed {seed}" if seed else "")
    more = _roles(settings) | more
    return universal_search(settings, model, title, attack_settings(settings, attack), seed=seed, **more)


def strongest_run(settings: Classification, model: Run, *, seed: int = 0, times: int = 1) -> Run:
    """eps_uni(delta) of a trained model by the ensemble; times: with so many times the steps that the settings say."""
    title = f"strongest eps_uni of {model.title}" + (f", {times} times the steps" if times > 1 else "")
    title += f", seed {seed}" if seed else ""
    return strongest_search(settings, model, title, seed=seed, times=times, **_roles(settings))


def _roles(settings: Classification) -> dict[str, Any]:
    """Section 6.2 crafts on training images, and reports on the whole validation set."""
    imagenet = isinstance(settings, ImageNet)
    return {"sets": {"craft": "train", "choose": "val", "report": "test"}} if imagenet else {}


def deepfool_run(settings: Cifar10, model: Run) -> Run:
    """Accuracy of a trained model under a DeepFool universal perturbation (Figure 3, right)."""
    cost = settings.deepfool_images * settings.deepfool_passes * 10
    attack = _deepfool_options(settings) | stated(settings, "straight_through")
    given = {"model": model, "attack": attack, "seed": settings.seed}
    given |= {"eps": settings.deepfool_eps, "images": settings.deepfool_images}
    return universal_deepfool.plan(settings, f"DeepFool on {model.title}", cost, **given)


def cost_run(settings: Cifar10, model: Run) -> Run:
    """Seconds that an epoch of each way of training takes (section 6.1)."""
    known = baseline_options(settings)
    defenses = {name: {"eps": 8.0} | known[name] for name, _ in settings.baselines}
    cost = (len(settings.sharedness) + len(defenses) + 1) * settings.cost_images * (settings.steps + 3)
    training = training_settings(settings, "finetune", sharedness=1, eps=8.0, sigma=0.5).config()
    given = {"training": training, "defenses": defenses, "images": settings.cost_images}
    given |= stated(settings, "sharedness", "seed")
    return epoch_cost.plan(settings, "cost of an epoch", cost, model=model, **given)
