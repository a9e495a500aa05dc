"""A measurement is one function whose signature is its configuration; a run is one call of it, as a plan states it."""

import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from satlib.data import Splits
from satlib.errors import SatlibError
from satlib.study.records import merge_settings, split_settings

SERVICES = ("data", "work", "progress", "labels")  # what a measurement may ask for beside what it builds on


@dataclass(frozen=True, eq=False)
class Measurement:
    """A function that measures something, and what a runner must know of it.

    Of its parameters those before the `*` are what it gets: `data` (the `Splits` of the run's data set, on the device),
    `work` (a `Workspace` for artefacts and checkpoints), `progress(text, done, needed=0)` (which raises `BudgetSpent`
    where fewer than `needed` seconds are left) and `labels` (the run's); any other is the role of a run that it builds
    on, and gets its model if it is annotated as a module, else its record; a list of either gets several, None stands
    for none. Those after the `*` are its settings. It returns metrics, plain JSON.

    The signature's defaults are frozen for the `version`: an id hashes only what differs from them, so that an option
    may be added whose default does what was done before. Bump `version` when the same settings would give another
    result, or a default is to change. nested: for settings that are themselves dicts of options, their defaults.
    A record without the `artefacts` is computed again; where they are `on_demand`, only for a run that builds on it and
    has to be computed, or a figure that shows them. of_parents: artefacts that the run of a role must have beside its
    own. builds: of a training, the untrained network for (data, settings).
    """

    compute: Callable[..., dict]
    version: int
    artefacts: tuple[str, ...] = ()
    on_demand: bool = False
    of_parents: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    nested: Mapping[str, Callable[[Mapping], Mapping]] = field(default_factory=dict)
    builds: Callable[[Splits, Mapping], nn.Module] | None = None

    @property
    def kind(self) -> str:
        """The function's name, under which its records are kept."""
        return self.compute.__name__

    def __reduce__(self) -> tuple[Callable, tuple]:
        """Other processes find it by its name."""
        return pkgutil.resolve_name, (f"{self.compute.__module__}:{self.kind}",)

    @cached_property
    def _options(self) -> dict[str, Any]:
        """Every setting with its default, or `inspect.Parameter.empty`."""
        parameters = inspect.signature(self.compute).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What the function gets, by name, with its annotation: services, and roles of runs."""
        hints = typing.get_type_hints(self.compute)
        return {name: hint for name, hint in hints.items() if name not in (*self._options, "return")}

    def takes_model(self, role: str) -> bool:
        """Whether the run of this role is handed over as its trained model; else as its record."""
        return self.inputs[role] in (nn.Module, list[nn.Module])

    def takes_several(self, role: str) -> bool:
        """Whether several runs may have this role."""
        return typing.get_origin(self.inputs[role]) is list

    def needs(self, whole: bool) -> tuple[str, ...]:
        """The artefacts without which a record is computed again; whole: also those that are on demand."""
        return self.artefacts if whole or not self.on_demand else ()

    def defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The frozen default of every setting that has one; `given` says which options its nested settings have."""
        stated = {n: _plain(value) for n, value in self._options.items() if value is not inspect.Parameter.empty}
        for name, options in self.nested.items():
            if isinstance(value := given.get(name, stated.get(name)), Mapping):
                stated[name] = _plain(options(value))
        return stated

    def plan(
        self,
        settings: Any,
        title: str,
        cost: float = 0.0,
        *,
        dataset: str = "",
        section: str = "",
        labels: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> "Run":
        """A run for a section's `settings`, which say data set and section where these are not named.

        given: the measurement's settings, and by role the run or runs that it builds on. cost: expected work in
        forward-and-backward passes of one image of the run's model, for estimates alone.
        """
        parents: dict[str, Run] = {}
        for role in [name for name in given if name in self.inputs and name not in SERVICES]:
            runs = given.pop(role)
            parents |= {f"{role} {i}": run for i, run in enumerate(runs)} if self.takes_several(role) else {role: runs}
        chosen = {name: _plain(value) for name, value in given.items()}
        stated = merge_settings(chosen, self.defaults(chosen))
        if wrong := sorted(self._options.keys() ^ stated.keys()):
            expected = sorted(self._options)
            raise SatlibError(f"{self.kind}: the setting {wrong[0]!r} is unknown or missing; expected {expected}")
        labels = {"section": section or settings.section, **(labels or {})}
        return Run(self, title, dataset or settings.dataset, stated, parents, cost, labels)


def measurement(version: int, **options: Any) -> Callable[[Callable[..., dict]], Measurement]:
    """Make a function a `Measurement`."""
    return lambda compute: Measurement(compute, version, **options)


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a plan: what is measured with which settings on which data set, and the runs that it builds on."""

    measurement: Measurement
    title: str
    dataset: str
    settings: dict
    parents: dict[str, "Run"] = field(default_factory=dict)
    cost: float = 0.0
    labels: dict = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.measurement.kind

    @property
    def is_training(self) -> bool:
        """Whether it yields a model."""
        return self.measurement.builds is not None

    @property
    def trained(self) -> "Run":
        """The last training among what it builds on, itself included."""
        return [run for run in self.ancestry() if run.is_training][-1]

    @cached_property
    def _split(self) -> tuple[dict, dict]:
        return split_settings(self.settings, self.measurement.defaults(self.settings))

    @property
    def config(self) -> dict:
        """The settings that differ from the frozen defaults: those that the id hashes."""
        return self._split[0]

    @property
    def defaults(self) -> dict:
        """The other settings."""
        return self._split[1]

    def ancestry(self) -> list["Run"]:
        """This run after everything that it builds on, each once."""
        before = (run for parent in self.parents.values() for run in parent.ancestry())
        return list(dict.fromkeys([*before, self]))


def options_of(function: Callable, *, without: Sequence[str] = ()) -> dict[str, Any]:
    """The options of a function (or class) that are plain values, with their defaults, from its signature."""
    parameters = inspect.signature(function).parameters.values()
    left_out = {"progress", "generator", "start", *without}
    plain = bool | int | float | str | list | tuple | dict | None
    return {p.name: p.default for p in parameters if p.name not in left_out and isinstance(p.default, plain)}


def _plain(value: Any) -> Any:
    """The value as plain JSON types: tuples become lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
