"""Where runs are carried out: looked up in the ledger, or computed after the runs that they build on."""

import contextlib
import functools
import hashlib
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import torch
from torch import nn

from satlib import data
from satlib.attacks import AT_ONCE, heap_pgd
from satlib.parallel import Stopped, current_ranks
from satlib.progress import Progress, duration
from satlib.study.ledger import Ledger
from satlib.study.measurement import Run
from satlib.study.records import Record, RunSpec, Workspace


class BudgetSpent(Exception):
    """The time budget is over: what was finished is kept, the next call goes on from there."""


def network(run: Run) -> str:
    """What a run's speed depends on: the network, and the size of its images."""
    return str(run.trained.settings["architecture"]) + run.trained.dataset


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
        self._splits: dict[str, data.Splits] = {}
        self._speeds: dict[str, float] = {}  # by network
        self._spent = self._worked = 0.0  # seconds that the runs computed here took, and what `_work` says of them
        # Of the plan in hand: the place of each run, the runs still to do, and whether these have several networks.
        self._order: dict[str, int] = {}
        self._waiting: dict[str, Run] = {}
        self._mixed = False

    def splits(self, dataset: str) -> data.Splits:
        """The data set's splits on the runner's device."""
        if dataset not in self._splits:
            self.use(dataset, data.load(dataset))
        return self._splits[dataset]

    def use(self, dataset: str, splits: data.Splits) -> None:
        """Have these stand for the data set."""
        self._splits[dataset] = splits.to(self.device)

    @functools.cache  # noqa: B019 - a runner lives as long as its process
    def fingerprint(self, dataset: str) -> str:
        """One fingerprint for all three splits."""
        splits = self.splits(dataset)
        prints = (part.fingerprint for part in (splits.train, splits.val, splits.test))
        return hashlib.sha256("".join(prints).encode()).hexdigest()

    @functools.cache  # noqa: B019
    def spec(self, run: Run) -> RunSpec:
        """The run's content address."""
        return RunSpec(
            kind=run.kind,
            config=run.config,
            version=run.measurement.version,
            data=self.fingerprint(run.dataset),
            parents={role: self.spec(parent).id for role, parent in run.parents.items()},
            defaults=run.defaults,
        )

    def by_id(self, plan: Iterable[Run]) -> dict[str, Run]:
        """All runs of a plan with what they build on, by id, in their order; of equal ones the first."""
        runs: dict[str, Run] = {}
        for each in dict.fromkeys(each for run in plan for each in run.ancestry()):
            runs.setdefault(self.spec(each).id, each)
        return runs

    def find(self, run: Run, *, whole: bool = False, also: tuple[str, ...] = ()) -> Record | None:
        """The run's record if it is known; None where it is to be computed. whole, also: as for `record`."""
        record = self.ledger.find(self.spec(run).id, run.measurement.needs(whole) + also)
        if record is not None and datetime.fromisoformat(record.created).timestamp() < self.forced_at:
            return None
        return record

    def record(self, run: Run, *, whole: bool = False, also: tuple[str, ...] = ()) -> Record:
        """The run's record: found, or computed after the runs that it builds on. Raises BudgetSpent.

        whole: with the artefacts that are there on demand, such as a model's weights. also: other artefacts that it
        must have.
        """
        if (known := self.find(run, whole=whole, also=also)) is not None:
            return known
        for parent in run.parents.values():
            self.record(parent, whole=True)
        self.check_budget()

        def compute(work: Workspace) -> dict:
            began = time.monotonic()
            if run.is_training:
                current_ranks().broadcast_object(self.spec(run).id)  # what the others are to help with
            metrics = self._measure(run, work)
            self._spent += time.monotonic() - began
            self._worked += self._work(run)
            self.progress.line(f"[run] {self._place(run)}{run.title}: done in {duration(time.monotonic() - began)}")
            return metrics

        labels = {"profile": self.profile, "title": run.title, "data": run.dataset}
        labels |= {"dataset": self.splits(run.dataset).train.title, **run.labels}
        needs = run.measurement.needs(whole) + also
        return self.ledger.get_or_compute(self.spec(run), compute, labels=labels, force=self.forced_at > 0, needs=needs)

    def _measure(self, run: Run, work: Any) -> dict:
        """Call the run's measurement; a `Helper` gets none of the records that it builds on."""
        began, what = time.monotonic(), run.measurement

        def progress(text: str, done: float, needed: float = 0.0, *, lasting: bool = False) -> None:
            if lasting:
                self.progress.line(f"[run] {run.title}: {text}")
            else:
                self.report(run, text, done, began)
            if needed:
                self.check_budget(needed)

        def handed(role: str) -> Any:
            runs = [parent for name, parent in run.parents.items() if name.partition(" ")[0] == role]
            if isinstance(work, Helper):
                runs = []
            if what.takes_model(role):
                parents: list = [self.model(parent) for parent in runs]
            else:
                also = what.of_parents.get(role, ())
                parents = [self.record(parent, whole=True, also=also) for parent in runs]
            return parents if what.takes_several(role) else next(iter(parents), None)

        services = {"data": self.splits(run.dataset), "work": work, "progress": progress, "labels": run.labels}
        given = {name: services[name] if name in services else handed(name) for name in what.inputs}
        return what.compute(**given, **run.settings)

    def record_together(self, runs: Mapping[str, Run], *, whole: bool = False) -> None:
        """Carry out trainings, by their ids, as one of several ranks: rank 0 records them, the others help it."""
        ranks = current_ranks()
        if ranks.rank == 0:
            try:
                for run in runs.values():
                    self.record(run, whole=whole)
            finally:
                ranks.broadcast_object(None)
            return
        while (key := ranks.broadcast_object("")) is not None:
            with contextlib.suppress(Stopped):
                self._measure(runs[key], Helper())

    def carry_out(self, plan: Iterable[Run], *, failed: Callable[[Run], None] | None = None) -> list[Record]:
        """Records of all runs of the plan with what they build on, in its order; progress over the whole plan.

        A run that another process is computing is left to it while there is other work. With `failed`, a run that
        raises is noted and handed to it, and all others are carried out but for those that build on it.
        """
        runs = self.by_id(plan)
        self._order = {key: place for place, key in enumerate(runs, start=1)}
        self._waiting = waiting = self.todo(runs.values())
        self._mixed = len({network(run) for run in waiting.values()}) > 1
        inner = self.parents_of(waiting.values())
        while waiting:
            ready = (key for key in self.ready(waiting) if not self.ledger.busy(key))
            key = next(ready, next(iter(waiting)))
            try:
                self.record(waiting[key], whole=key in inner)
            except BudgetSpent:
                raise
            except Exception:
                if failed is None:
                    raise
                for other, lost in self.give_up(key, waiting, traceback.format_exc()).items():
                    failed(lost)
                    del runs[other]
            else:
                del waiting[key]
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

        for run in self.by_id(plan).values():
            visit(run, False)
        return found

    def parents_of(self, runs: Iterable[Run]) -> set[str]:
        """Ids of what the runs build on directly."""
        return {self.spec(parent).id for run in runs for parent in run.parents.values()}

    def ready(self, waiting: Mapping[str, Run]) -> Iterator[str]:
        """Ids of those of the waiting runs that build on none of them, in their order."""
        return (key for key, run in waiting.items() if self.parents_of([run]).isdisjoint(waiting))

    def give_up(self, key: str, waiting: dict[str, Run], text: str) -> dict[str, Run]:
        """Take a run that failed and what builds on it from those that wait; these, by id.

        Its traceback is kept in a file, and both are named.
        """
        failed = waiting[key]
        lost = [other for other, run in waiting.items() if any(self.spec(r).id == key for r in run.ancestry())]
        path = self.ledger.note_failure(key, f"{failed.title} ({failed.kind} {key})\n\n{text}")
        why = (text.strip().splitlines() or ["no reason is known"])[-1]
        more = f", and with it {len(lost) - 1} that build on it" if len(lost) > 1 else ""
        self.progress.line(f"[run] failed: {failed.title}{more}: {why}; see {path}")
        return {other: waiting.pop(other) for other in lost}

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
        if (key := network(run)) not in self._speeds:
            train, model, steps = self.splits(run.trained.dataset).train, self.new_model(run.trained), 4
            most = max(1, AT_ONCE // train.images.shape[1:].numel())
            rates = []
            for count in (8, 128, 128, 128, 128):
                part = train.first(min(count, most, len(train)))
                x, start = part.images[:].float(), time.perf_counter()
                attacked = heap_pgd(model, x, part.labels, eps=8.0, sharedness=1, steps=steps, step_size=2.0)
                attacked.sum().item()  # the sum waits for it
                seconds = time.perf_counter() - start
                rates.append(steps * len(part) / seconds)
                if seconds > 2:  # a large network on a slow device: one look is enough
                    break
            self._speeds[key] = max(rates)
        return self._speeds[key]

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

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None
