"""Where runs are carried out: looked up in the ledger, or computed after the runs that they build on."""

import functools
import hashlib
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import torch
from torch import nn

from satlib import data
from satlib.attacks import AT_ONCE, heap_pgd
from satlib.errors import SatlibError
from satlib.models import Fitted, build, load_pretrained, take_over
from satlib.paths import named_file
from satlib.progress import Progress, duration
from satlib.study.kinds import KINDS, TRAININGS
from satlib.study.ledger import Ledger, Record, RunSpec, Workspace
from satlib.study.records import file_digest


class BudgetSpent(Exception):
    """The time budget is over: what was finished is kept, the next call goes on from there."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a plan: its kind (a key of `satlib.study.kinds.KINDS`), settings, and the runs it builds on.

    cost: expected work in forward-and-backward passes of one image of the run's model, for estimates alone.
    """

    kind: str
    title: str
    dataset: str
    config: dict
    parents: dict[str, "Run"] = field(default_factory=dict)
    cost: float = 0.0
    labels: dict = field(default_factory=dict)

    def ancestry(self) -> Iterator["Run"]:
        """This run after everything that it builds on, each once."""
        seen = set()
        for run in [r for parent in self.parents.values() for r in parent.ancestry()] + [self]:
            if id(run) not in seen:
                seen.add(id(run))
                yield run


def _trained(run: Run) -> Run:
    """The last training among what a run builds on, itself included."""
    return next(r for r in reversed(list(run.ancestry())) if r.kind in TRAININGS)


def network(run: Run) -> str:
    """What a run's speed depends on: the network, and the size of its images."""
    trained = _trained(run)
    return str(trained.config["architecture"]) + trained.dataset


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

    def stand_in(self, dataset: str) -> str:
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
                version=KINDS[run.kind].version,
                data=self.fingerprint(run.dataset),
                parents={role: self.spec(parent).id for role, parent in run.parents.items()},
            )
        return self._specs[run]

    def _needs(self, run: Run, whole: bool, also: tuple[str, ...]) -> tuple[str, ...]:
        kind = KINDS[run.kind]
        return (kind.artefacts if whole or not kind.on_demand else ()) + also

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
            return KINDS[run.kind].compute(self, run, work)

        labels = {
            "profile": self.profile,
            "title": run.title,
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

    def help_with(self, run: Run, work: Any) -> None:
        """Compute a run as one of several ranks, of which another records it."""
        KINDS[run.kind].compute(self, run, work)

    def carry_out(self, plan: Iterable[Run], *, failed: Callable[[Run], None] | None = None) -> list[Record]:
        """Records of all runs of the plan with what they build on, in its order; progress over the whole plan.

        A run that another process is computing is left to it while there is other work. With `failed`, a run that
        raises is noted and handed to it, and all others are carried out but for those that build on it.
        """
        runs = {self.spec(r).id: r for run in plan for r in run.ancestry()}
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
        """The trained classifier of a `train` run, in eval mode on the runner's device."""
        model = self.new_model(run)
        model.load_state_dict(self.record(run, whole=True).tensors("weights"))
        return model.to(self.device).eval()

    def initial_model(self, run: Run) -> tuple[nn.Module, Fitted | None]:
        """A `train` run's classifier before its first epoch, and what of other weights fitted it; None without any.

        It starts from the model that the run builds on, else from the file that its settings name by digest and its
        labels by path, else from its seed. Where classes differ, the head keeps its random weights.
        """
        model, fitted = self.new_model(run), None
        if "init" in run.parents:
            parent = run.parents["init"]
            weights = self.record(parent, whole=True).tensors("weights")
            fitted = take_over(model, weights, source=parent.title)
        elif digest := run.config.get("pretrained"):
            path = named_file(run.labels["pretrained"])
            if file_digest(path) != digest:
                raise SatlibError(f"pretrained: {path} changed while this ran; start again")
            fitted = load_pretrained(model, path)
        return model, fitted

    def new_model(self, run: Run) -> nn.Module:
        """The untrained classifier of a `train` run, initialised from its seed, on the runner's device."""
        train = self.splits(run.dataset).train
        torch.manual_seed(run.config["training"]["seed"])
        model = build(run.config["architecture"], classes=len(train.classes), mean=train.mean, std=train.std)
        return model.to(self.device)

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
        if run.kind not in TRAININGS:
            return 0
        until, epochs = run.config.get("until"), run.config["training"]["epochs"]
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
