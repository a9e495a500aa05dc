"""Where runs are carried out: looked up in the ledger, or computed after the runs that they build on."""

import contextlib
import functools
import hashlib
import os
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import torch
from torch import nn

from satlib import data
from satlib.attacks import AT_ONCE, heap_pgd
from satlib.errors import SatlibError
from satlib.parallel import Stopped, current_ranks
from satlib.progress import Progress, duration
from satlib.study.ledger import Ledger
from satlib.study.measurement import SERVICES, Run
from satlib.study.records import Record, RunSpec, Workspace


class BudgetSpent(Exception):
    """The time budget is over: what was finished is kept, the next call goes on from there."""


def network(run: Run) -> str:
    """What a run's speed depends on: the network, and the size of its images."""
    trained = _trained(run)
    return str(trained.settings["architecture"]) + trained.dataset


def _trained(run: Run) -> Run:
    """The last training among what a run builds on, itself included."""
    return next(r for r in reversed(list(run.ancestry())) if r.is_training)


class Runner:
    """A ledger, a device, and the data sets that were loaded: everything that a run needs.

    device: "cpu", "cuda" or None for CUDA where there is one. force: what was recorded before now counts as unknown;
    by default before the time (seconds of `time.time()`) in the environment variable SATLIB_FORCE, so that several
    processes compute a run anew just once. deadline (likewise; SATLIB_DEADLINE) raises BudgetSpent before it is passed.
    """

    def __init__(
        self,
        *,
        profile: str = "",
        ledger: Ledger | None = None,
        device: str | None = None,
        force: bool | None = None,
        deadline: float | None = None,
        progress: Progress | None = None,
    ):
        self.profile = profile
        self.ledger = ledger or Ledger()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.forced_at = time.time() if force else float(os.environ.get("SATLIB_FORCE", 0)) if force is None else 0.0
        self.deadline = deadline or float(os.environ.get("SATLIB_DEADLINE", "inf"))
        self.progress = progress or Progress()
        self._done: dict[str, Record] = {}
        self._splits: dict[str, data.Splits] = {}
        self._specs: dict[Run, RunSpec] = {}
        self._spent = self._worked = 0.0  # seconds that the runs computed here took, and what `_work` says of them
        self._mixed = False  # whether the plan in hand has several networks
        self._speeds: dict[str, float] = {}  # by architecture
        self._order: dict[str, int] = {}  # the plan in hand: place of each run, and the runs still to do
        self._waiting: dict[str, Run] = {}

    def splits(self, dataset: str) -> data.Splits:
        """The data set's splits on the runner's device."""
        if dataset not in self._splits:
            self._splits[dataset] = data.load(dataset).to(self.device)
        return self._splits[dataset]

    def dummy_data(self, dataset: str) -> str:
        """Where the data set cannot be loaded, have noise of its geometry in its place, for estimates; and why."""
        try:
            self.splits(dataset)
        except SatlibError as error:
            noise = data.dummy_data(dataset)
            if noise is None:
                raise
            self._splits[dataset] = noise.to(self.device)
            return str(error)
        return ""

    @functools.cache  # noqa: B019 - a runner lives as long as its process
    def fingerprint(self, dataset: str) -> str:
        """One fingerprint for all three splits."""
        splits = self.splits(dataset)
        return hashlib.sha256(
            "".join(s.fingerprint for s in (splits.train, splits.val, splits.test)).encode()
        ).hexdigest()

    def spec(self, run: Run) -> RunSpec:
        """The run's content address."""
        if run not in self._specs:
            self._specs[run] = RunSpec(
                kind=run.kind,
                config=run.config,
                version=run.measurement.version,
                data=self.fingerprint(run.dataset),
                parents={role: self.spec(parent).id for role, parent in run.parents.items()},
                defaults=run.defaults,
            )
        return self._specs[run]

    def by_id(self, plan: Iterable[Run]) -> dict[str, Run]:
        """All runs of a plan with what they build on, by id, in their order; of equal ones the first."""
        runs: dict[str, Run] = {}
        for each in dict.fromkeys(each for run in plan for each in run.ancestry()):
            runs.setdefault(self.spec(each).id, each)
        return runs

    def _needs(self, run: Run, whole: bool, also: tuple[str, ...]) -> tuple[str, ...]:
        what = run.measurement
        return (what.artefacts if whole or not what.on_demand else ()) + also

    def find(self, run: Run, *, whole: bool = False, also: tuple[str, ...] = ()) -> Record | None:
        """The run's record if it is known; None where it is to be computed. whole, also: as for `record`."""
        record = self.ledger.find(self.spec(run).id, self._needs(run, whole, also))
        if record is not None and datetime.fromisoformat(record.created).timestamp() < self.forced_at:
            return None
        return record

    def record(self, run: Run, *, whole: bool = False, also: tuple[str, ...] = ()) -> Record:
        """The run's record: found, or computed after the runs that it builds on. Raises BudgetSpent.

        whole: with the artefacts that are there on demand, such as a model's weights. also: other artefacts that it
        must have.
        """
        spec, needs = self.spec(run), self._needs(run, whole, also)
        if spec.id in self._done and all(self._done[spec.id].has(name) for name in needs):
            return self._done[spec.id]
        known = self.find(run, whole=whole, also=also)
        if known is None:
            for parent in run.parents.values():
                self.record(parent, whole=True)
            self.check_budget()
        began, computed = time.monotonic(), []

        def compute(work: Workspace) -> dict:
            computed.append(run)
            if run.is_training:
                current_ranks().broadcast_object(spec.id)  # what the others, in `follow`, are to help with
            return self._measure(run, work)

        labels = {
            "profile": self.profile,
            "title": run.title,
            "data": run.dataset,
            "dataset": self.splits(run.dataset).train.title,
            **run.labels,
        }
        record = self.ledger.get_or_compute(
            spec, compute, labels=labels, force=self.forced_at > 0 and known is None, needs=needs
        )
        if computed:
            self._spent += time.monotonic() - began
            self._worked += self._work(run)
            self.progress.line(f"[run] {self._place(run)}{run.title}: done in {duration(time.monotonic() - began)}")
        self._done[spec.id] = record
        return record

    def _measure(self, run: Run, work: Any, *, alone: bool = True) -> dict:
        """Call the run's measurement; `alone`: not as a helper, which looks no record up."""
        began, what = time.monotonic(), run.measurement

        def progress(text: str, done: float, needed: float = 0.0, *, lasting: bool = False) -> None:
            if lasting:
                self.progress.line(f"[run] {run.title}: {text}")
            else:
                self.report(run, text, done, began)
            if needed:
                self.check_budget(needed)

        def handed(role: str) -> Any:
            runs = [run.parents[name] for name in run.parents if name == role or name.startswith(f"{role} ")]
            also = what.of_parents.get(role, ())
            parents: list[Any] = []
            if alone and what.takes_model(role):
                parents = [self.model(parent) for parent in runs]
            elif alone:
                parents = [self.record(parent, whole=True, also=also) for parent in runs]
            return parents if what.takes_several(role) else next(iter(parents), None)

        given: dict[str, Any] = {"work": work, "progress": progress, "labels": run.labels}
        for name in what.inputs:
            if name == "data":
                given[name] = self.splits(run.dataset)
            elif name not in SERVICES:
                given[name] = handed(name)
        return what.compute(**{name: given[name] for name in what.inputs}, **run.settings)

    def follow(self, runs: Mapping[str, Run]) -> None:
        """As one of several ranks, help rank 0 with whichever of the trainings it computes, until it says None."""
        while (key := current_ranks().broadcast_object("")) is not None:
            with contextlib.suppress(Stopped):
                self._measure(runs[key], Helper(), alone=False)

    def carry_out(self, plan: Iterable[Run], *, failed: Callable[[Run], None] | None = None) -> list[Record]:
        """Records of all runs of the plan with what they build on, in its order; progress over the whole plan.

        A run that another process is computing is left to it while there is other work. With `failed`, a run that
        raises is noted and handed to it, and all others are carried out but for those that build on it.
        """
        runs = self.by_id(plan)
        self._order = {key: place for place, key in enumerate(runs, start=1)}
        self._waiting = self.todo(runs.values())
        self._mixed = len({network(run) for run in self._waiting.values()}) > 1
        inner = self.parents_of(self._waiting.values())
        while self._waiting:
            ready = (key for key in self._waiting if self._ready(key) and not self.ledger.busy(key))
            key = next(ready, next(iter(self._waiting)))
            try:
                self.record(self._waiting[key], whole=key in inner)
            except BudgetSpent:
                raise
            except Exception as error:
                if failed is None:
                    raise
                lost = self.building_on(key, self._waiting)
                self.note_failure(runs[key], "".join(traceback.format_exception(error)), len(lost) - 1)
                for other in lost:
                    failed(self._waiting.pop(other))
                    del runs[other]
            else:
                del self._waiting[key]
        return [self.record(run) for run in runs.values()]

    def todo(self, plan: Iterable[Run]) -> dict[str, Run]:
        """What has to be computed for all runs of the plan and what they build on, by id, parents first.

        That is what has no record; and where something without a record builds on one that was published without its
        weights, that one, too.
        """
        found: dict[str, Run] = {}
        seen: set[tuple[str, bool]] = set()

        def visit(run: Run, whole: bool) -> None:
            key = self.spec(run).id
            if (key, whole) in seen or key in found:
                return
            seen.add((key, whole))
            if self.find(run, whole=whole) is None:
                for parent in run.parents.values():
                    visit(parent, True)
                found[key] = run

        for run in plan:
            for each in run.ancestry():
                visit(each, False)
        return found

    def _ready(self, key: str) -> bool:
        """Whether nothing that a waiting run builds on is waiting, too."""
        return not any(self.spec(parent).id in self._waiting for parent in self._waiting[key].parents.values())

    def parents_of(self, runs: Iterable[Run]) -> set[str]:
        """Ids of what the runs build on directly."""
        return {self.spec(parent).id for run in runs for parent in run.parents.values()}

    def building_on(self, key: str, runs: Mapping[str, Run]) -> list[str]:
        """Ids of those of the runs that build on one of them, itself included."""
        return [other for other, run in runs.items() if any(self.spec(r).id == key for r in run.ancestry())]

    def model(self, run: Run) -> nn.Module:
        """The trained model of a training, in eval mode on the runner's device."""
        model = self.new_model(run)
        model.load_state_dict(self.record(run, whole=True).tensors("weights"))
        return model.to(self.device).eval()

    def new_model(self, run: Run) -> nn.Module:
        """The untrained model of a training, initialised from its seed, on the runner's device."""
        assert run.measurement.builds is not None, f"{run.kind} is no training"
        return run.measurement.builds(self.splits(run.dataset), run.settings)

    def passes_per_second(self, run: Run) -> float:
        """Measured here: forward-and-backward passes a second of one image of the run's model, in attacks."""
        trained, key = _trained(run), network(run)
        if key not in self._speeds:
            train, model, steps = self.splits(trained.dataset).train, self.new_model(trained), 4
            options = {"eps": 8.0, "sharedness": 1, "steps": steps, "step_size": 2.0}
            rates: list[float] = []
            for count in (8, 128, 128, 128, 128):
                most = max(1, AT_ONCE // train.images.shape[1:].numel())
                part = train.first(min(count, most, len(train)))
                x, start = part.images[:].float(), time.perf_counter()
                heap_pgd(model, x, part.labels, **options).sum().item()  # the sum waits for it
                seconds = time.perf_counter() - start
                rates.append(steps * len(part) / seconds)
                if seconds > 2:  # a large network on a slow device: one look is enough
                    break
            self._speeds[key] = max(rates)
        return self._speeds[key]

    def weight_bytes(self, run: Run) -> int:
        """Bytes that the weights of a `train` run take; 0 of other runs."""
        if not run.is_training:
            return 0
        until, epochs = run.settings["until"], run.settings["training"]["epochs"]
        copies = 1 if until in (None, epochs) else 3  # with both of Adam's means, for the next part to go on with
        return copies * sum(t.nbytes for t in self.new_model(run).state_dict().values())

    def note_failure(self, run: Run, text: str, lost: int = 0) -> None:
        """Keep a run's traceback in a file, and name both. lost: how many runs cannot be carried out without it."""
        key = self.spec(run).id
        path = self.ledger.note_failure(key, f"{run.title} ({run.kind} {key})\n\n{text}")
        why = (text.strip().splitlines() or ["no reason is known"])[-1]
        more = f", and with it {lost} that build on it" if lost else ""
        self.progress.line(f"[run] failed: {run.title}{more}: {why}; see {path}")

    def check_budget(self, needed: float = 0.0) -> None:
        """Raises BudgetSpent where fewer than `needed` seconds are left."""
        if time.time() + needed > self.deadline:
            raise BudgetSpent

    def report(self, run: Run, text: str, done: float, began: float) -> None:
        """Progress within a run: `done` in [0, 1] of it, begun at `began` (time.monotonic())."""
        elapsed, left = time.monotonic() - began, "estimating"
        if done > 0.02:
            left = f"{duration(elapsed * (1 - done) / done)} left in this run"
            work = self._work(run)
            worked = self._worked + work * done
            others = sum(self._work(r) for key, r in self._waiting.items() if key != self.spec(run).id)
            if others and worked:
                total = (others + work * (1 - done)) * (self._spent + elapsed) / worked
                left += f", about {duration(total)} in all"
        self.progress.update(f"[run] {self._place(run)}{run.title}: {text}, {done:.0%}, {left}")

    def _work(self, run: Run) -> float:
        """A run's share of the plan's time, in a unit of its own: passes, or where networks differ their seconds."""
        return run.cost / self.passes_per_second(run) if self._mixed else run.cost

    def _place(self, run: Run) -> str:
        place = self._order.get(self.spec(run).id)
        return f"{place}/{len(self._order)} " if place else ""


class Helper:
    """The workspace of a rank that only helps: rank 0 loads, saves and records."""

    def load_checkpoint(self) -> None:
        return None

    def save_checkpoint(self, tensors: dict[str, Any], info: dict) -> None:
        pass

    def save_tensors(self, name: str, tensors: dict[str, Any], metadata: Any = None) -> None:
        pass
