"""What is measured, a file for each section: measurements, and beside them the plans of their runs."""

from collections.abc import Callable, Collection
from typing import Any

from satlib.study.measurement import Run
from satlib.study.measurements.classification import Plan, cifar10, imagenet
from satlib.study.measurements.evaluation_checks import ChecksPlan, checks, differences
from satlib.study.measurements.method import method
from satlib.study.measurements.scenes import cityscapes
from satlib.study.settings import NOTEBOOKS, settings

__all__ = [
    "Plan",
    "checks_plan",
    "cifar10",
    "cityscapes",
    "differences",
    "imagenet",
    "method",
    "plan",
    "profile_runs",
    "settings",
]

PLANS: dict[str, Callable[[Any], Any]] = {"6.1": cifar10, "6.2": imagenet, "6.3": cityscapes, "method": method}
BY_IMPORTANCE = ("6.1", "6.2", "6.3", "checks", "method")


def plan(section: str, profile: str, **changes: object) -> Any:
    """The plan of a section under a profile; changes: to its settings."""
    chosen = settings(section, profile, **changes)
    return checks_plan(profile, chosen) if section == "checks" else PLANS[section](chosen)


def checks_plan(profile: str, chosen: Any) -> ChecksPlan:
    """The plan of notebook 09 for a profile's models."""
    others = {section: plan(section, profile) for section in ("6.2", "6.3") if section in chosen.sections}
    return checks(chosen, settings("6.1", profile), others)


def profile_runs(profile: str, only: Collection[str] | None = None) -> list[Run]:
    """Every run that a profile's notebooks need (those in `only`: "04_cifar10"), in order of importance."""
    stems = [stem for stem in NOTEBOOKS if only is None or stem in only]
    runs = []
    for section in BY_IMPORTANCE:
        needing = [stem for stem in stems if section in NOTEBOOKS[stem]]
        if needing:
            planned = plan(section, profile)
            runs += [run for stem in needing for run in planned.of(stem)] if section == "method" else planned.runs
    return runs
