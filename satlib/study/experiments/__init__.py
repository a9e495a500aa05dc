"""What each section needs, as a list of runs."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TypeVar

from satlib.paper import (
    CIFAR10,
    CITYSCAPES,
    IMAGENET,
    METHOD,
    TRUST,
    Cifar10,
    Cityscapes,
    ImageNet,
    Method,
    Trust,
)
from satlib.paths import notebook_paths, select_notebooks
from satlib.study import profiles
from satlib.study.experiments.classification import Plan, cifar10, erm_run, imagenet, robustness_run
from satlib.study.experiments.method import MethodPlan, method
from satlib.study.experiments.scenes import ScenesPlan, cityscapes
from satlib.study.experiments.trust import TrustPlan, trust
from satlib.study.runs import Run

__all__ = [
    "MethodPlan",
    "Plan",
    "ScenesPlan",
    "TrustPlan",
    "cifar10",
    "cityscapes",
    "erm_run",
    "imagenet",
    "method",
    "parameters",
    "profile_runs",
    "robustness_run",
    "trust",
    "trust_plan",
    "with_parameters",
]

Settings = TypeVar("Settings", Cifar10, ImageNet, Cityscapes, Method, Trust)
METHOD_NOTEBOOKS = ("01_preliminaries", "02_shared_adversarial_training", "03_quantifying_robustness")


def parameters(profile: str, stem: str) -> dict[str, object]:
    """What a profile sets for the notebook `stem`, as its execution gets it."""
    return profiles.parameters_for(profiles.load(profile), stem, profiles.declared(notebook_paths()[stem]))


def profile_runs(profile: str, only: str | None = None) -> list[Run]:
    """Every run that a profile's notebooks (or those of them in `only`: "04,06") need, in order of importance."""
    present, found = select_notebooks(only), []
    for stem in ("04_cifar10", "05_imagenet", "06_cityscapes", "09_can_we_trust_it", *METHOD_NOTEBOOKS):
        if stem not in present:
            continue
        given = parameters(profile, stem)
        if stem == "04_cifar10":
            found += cifar10(with_parameters(CIFAR10, given)).runs
        elif stem == "05_imagenet":
            found += imagenet(with_parameters(IMAGENET, given)).runs
        elif stem == "06_cityscapes":
            found += cityscapes(with_parameters(CITYSCAPES, given)).runs
        elif stem == "09_can_we_trust_it":
            found += trust_plan(profile, with_parameters(TRUST, given)).runs
        else:
            found += method(with_parameters(CIFAR10, given), with_parameters(METHOD, given)).of(stem)
    return found


def trust_plan(profile: str, choices: Trust) -> TrustPlan:
    """Plan of notebook 09 for a profile's models."""
    own = with_parameters(CIFAR10, parameters(profile, "04_cifar10"))
    second = imagenet(with_parameters(IMAGENET, parameters(profile, "05_imagenet")))
    third = cityscapes(with_parameters(CITYSCAPES, parameters(profile, "06_cityscapes")))
    return trust(own, choices, imagenet=second, cityscapes=third)


def with_parameters(settings: Settings, parameters: Mapping[str, object]) -> Settings:
    """The settings with those of the `parameters` (of a profile, or a notebook's globals()) that they have.

    Lists become tuples. What the parameters do not name stays as in the paper.
    """

    def frozen(value: object) -> object:
        return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value

    names = {each.name for each in fields(settings)} & set(parameters)
    return replace(settings, **{name: frozen(parameters[name]) for name in names})
