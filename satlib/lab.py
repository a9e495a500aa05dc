"""Where runs are carried out: looked up in the ledger, or computed after the runs that they build on."""

import functools
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from satlib import data
from satlib.kinds import KINDS
from satlib.ledger import Ledger, Record, RunSpec, Workspace
from satlib.models import ResNet
from satlib.progress import Progress, duration


class BudgetSpent(Exception):
    """The time budget is over: what was finished is kept, the next call goes on from there."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a plan: its kind (a key of `satlib.kinds.KINDS`), settings, and the runs it builds on.

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


class Lab:
    """A ledger, a device, and the data sets that were loaded: everything that a run needs.

    device: "cpu", "cuda" or None for CUDA where there is one. force computes each run anew, once. deadline (seconds
    of `time.time()`) raises BudgetSpent before it is passed. Progress goes to `progress`.
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
        self.force = bool(os.environ.get("SATLIB_FORCE")) if force is None else force
        self.deadline = deadline or float(os.environ.get("SATLIB_DEADLINE", "inf"))
        self.progress = progress or Progress()
        self._done: dict[str, Record] = {}
        self._rate = 0.0  # passes a second over the runs computed here
        self._spent = self._worked = 0.0
        self._plan: list[Run] = []

    @functools.cache  # noqa: B019 - a lab lives as long as its process
    def splits(self, dataset: str) -> data.Splits:
        """The data set's splits on the lab's device."""
        return data.load(dataset).to(self.device)

    @functools.cache  # noqa: B019
    def fingerprint(self, dataset: str) -> str:
        """One fingerprint for all three splits."""
        splits = self.splits(dataset)
        return hashlib.sha256(
            "".join(s.fingerprint for s in (splits.train, splits.val, splits.test)).encode()
        ).hexdigest()

    def spec(self, run: Run) -> RunSpec:
        """The run's content address."""
        return RunSpec(
            kind=run.kind,
            config=run.config,
            version=KINDS[run.kind].version,
            data=self.fingerprint(run.dataset),
            parents={role: self.spec(parent).id for role, parent in run.parents.items()},
        )

    def record(self, run: Run) -> Record:
        """The run's record: found, or computed after the runs that it builds on. Raises BudgetSpent."""
        spec = self.spec(run)
        if spec.id in self._done:
            return self._done[spec.id]
        if self.force or self.ledger.find(spec.id, KINDS[run.kind].artefacts) is None:
            for parent in run.parents.values():
                self.record(parent)
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
            spec, compute, labels=labels, force=self.force, needs=KINDS[run.kind].artefacts
        )
        if computed:
            self._spent += time.monotonic() - began
            self._worked += run.cost
            self.progress.line(f"[run] {self._place(run)}{run.title}: done in {duration(time.monotonic() - began)}")
        self._done[spec.id] = record
        return record

    def carry_out(self, plan: Iterable[Run]) -> list[Record]:
        """Records of all runs of the plan, in its order, with progress over the whole plan."""
        self._plan = list({self.spec(r).id: r for run in plan for r in run.ancestry()}.values())
        return [self.record(run) for run in self._plan]

    def pending(self, plan: Iterable[Run]) -> list[Run]:
        """The runs of the plan, with what they build on, that have no record yet."""
        runs = {self.spec(r).id: r for run in plan for r in run.ancestry()}
        return [run for key, run in runs.items() if self.ledger.find(key, KINDS[run.kind].artefacts) is None]

    def model(self, run: Run) -> nn.Module:
        """The trained classifier of a `train` run, in eval mode on the lab's device."""
        model = self.new_model(run)
        model.load_state_dict(self.record(run).tensors("weights"))
        return model.to(self.device).eval()

    def new_model(self, run: Run) -> nn.Module:
        """The untrained classifier of a `train` run, initialised from its seed, on the lab's device."""
        train = self.splits(run.dataset).train
        torch.manual_seed(run.config["training"]["seed"])
        model = ResNet(classes=len(train.classes), mean=train.mean, std=train.std, **run.config["architecture"])
        return model.to(self.device)

    def check_budget(self, needed: float = 0.0) -> None:
        """Raises BudgetSpent where fewer than `needed` seconds are left."""
        if time.time() + needed > self.deadline:
            raise BudgetSpent

    def report(self, run: Run, text: str, done: float, began: float) -> None:
        """Progress within a run: `done` in [0, 1] of it, begun at `began` (time.monotonic())."""
        elapsed = time.monotonic() - began
        left = f"{duration(elapsed * (1 - done) / done)} left in this run" if done > 0.02 else "estimating"
        worked, spent = self._worked + run.cost * done, self._spent + elapsed
        if self._plan and worked > 0:
            waiting = sum(r.cost for r in self._plan[self._index(run) + 1 :] if self.spec(r).id not in self._done)
            total = (waiting + run.cost * (1 - done)) * spent / worked
            left += f", about {duration(total)} in all" if waiting else ""
        self.progress.update(f"[run] {self._place(run)}{run.title}: {text}, {done:.0%}, {left}")

    def _index(self, run: Run) -> int:
        key = self.spec(run).id
        return next((i for i, r in enumerate(self._plan) if self.spec(r).id == key), len(self._plan) - 1)

    def _place(self, run: Run) -> str:
        return f"{self._index(run) + 1}/{len(self._plan)} " if self._plan else ""
