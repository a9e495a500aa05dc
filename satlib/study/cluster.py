"""A sweep on a Ray cluster: every run without a record is a task.

Ray places the tasks, starts one again where its worker or node died, and shows what workers print. It knows no
priorities, so that a run is submitted when all that it builds on has a record, the most important first, and no more
at a time than keep the cluster busy.
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

import satlib
from satlib import parallel
from satlib.errors import SatlibError
from satlib.paths import data_root, project_root
from satlib.progress import duration
from satlib.study import provenance
from satlib.study.archive import merge, pack
from satlib.study.ledger import Ledger
from satlib.study.measurement import Run
from satlib.study.runs import BudgetSpent, Runner

RETRIES = 3  # of a task whose worker or node died
WINDOW = 2  # tasks that are submitted for each that can run
SMALL = 32  # images up to so many pixels a side are for small networks, which one process trains best


@dataclass(frozen=True)
class Options:
    """How a sweep uses a cluster.

    address: of the cluster (`auto`, `ray://HOST:PORT`); None for the one at hand, else one of this machine's own.
    gpus: GPUs of a run, and may be a fraction; None for one where the cluster has any. cpus: cores of a run.
    ranks: trainings on images larger than 32x32 are carried out by torchrun on so many such shares of one node.
    scratch: the folder on each node in which workers keep records, which then come back through Ray; None where
    all nodes see the driver's own folder. device: "cpu", "cuda" or None for CUDA where the cluster has GPUs.
    """

    address: str | None = None
    gpus: float | None = None
    cpus: int = 1
    ranks: int = 1
    scratch: Path | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        gpus = 1.0 if self.gpus is None else self.gpus
        if not (0 <= gpus <= 1 or gpus % 1 == 0 < gpus):
            raise SatlibError(f"--gpus-per-run: {gpus}, expected a share of one GPU or a number of GPUs")
        for name, value in (("cpus-per-run", self.cpus), ("ranks", self.ranks)):
            if value < 1:
                raise SatlibError(f"--{name}: {value}, expected at least 1")
        if self.ranks > 1 and 0 < gpus < 1:
            raise SatlibError(f"--ranks {self.ranks} --gpus-per-run {gpus}: a rank needs a whole GPU, or none")


@dataclass(frozen=True)
class Task:
    """What a worker is told: a run, its id as the driver knows it, and how to work.

    needs: the data sets of the run and of what it builds on, by name. marker: a file that every node sees that shares
    the driver's folder; None where workers keep a scratch folder.
    """

    run: Run
    key: str
    needs: str
    profile: str
    device: str
    cpus: int
    ranks: int
    marker: Path | None
    data_root: Path


class Unfit(SatlibError):
    """A node cannot carry out runs on some data sets, or ("") any. Arguments: the node's id, the data sets, why."""


# On a worker


def carry_out(task: Task, *parents: bytes) -> bytes:
    """Carry out one run on this node; where it has a scratch folder, an archive of the record.

    parents: archives of what the run builds on, for a scratch folder.
    """
    import ray

    node = ray.get_runtime_context().get_node_id()
    name = f"node {ray.util.get_node_ip_address()} ({node[:8]})"
    if task.marker and not task.marker.is_file():
        raise Unfit(node, "", f"{name} does not see {task.marker.parent}; share it, or give workers a --scratch")
    os.environ.setdefault("SATLIB_DATA", str(task.data_root))  # a node's own comes first
    runner = _runner(task.profile, task.device, task.cpus)
    try:
        key = runner.spec(task.run).id
    except SatlibError as error:
        raise Unfit(node, task.needs, f"{name}: {task.needs}: {error}") from None
    if key != task.key:  # the code is the driver's
        why = "its content (fingerprint) is not the driver's; give all nodes the same"
        raise Unfit(node, task.needs, f"{name}: {task.needs} in {data_root()}: {why}")
    for archive in parents:
        _unpack(runner.ledger, archive)
    if task.ranks > 1 and runner.find(task.run, whole=True) is None:  # as torchrun does
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        ranks = LaunchConfig(1, 1, task.ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
        elastic_launch(ranks, _rank)(task)
    runner.record(task.run, whole=True)
    return b"" if task.marker else _pack(runner.ledger, key)


@functools.cache
def _runner(profile: str, device: str, cpus: int) -> Runner:
    """A process's runner, kept with the data that it has loaded. Folder and deadline are in the environment."""
    torch.set_num_threads(cpus)
    return Runner(profile=profile, device=device)


def _rank(task: Task) -> None:
    """One rank of a training, which ends when its task does: as `python -m satlib train` under torchrun."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: be killed when the parent ends, in any way
    with parallel.joined(task.device) as device, contextlib.suppress(BudgetSpent):  # the task finds no record
        runner = _runner(task.profile, device or task.device, task.cpus)
        runner.record_together({task.key: task.run}, whole=True)


def _pack(ledger: Ledger, key: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix=".", dir=ledger.root) as folder:
        pack(ledger, path := Path(folder, "run.tar"), [key])
        return path.read_bytes()


def _unpack(ledger: Ledger, archive: bytes) -> None:
    one_at_a_time = FileLock(ledger.runs / ".locks" / "merging.lock")  # workers of a node may be sent the same
    with one_at_a_time, tempfile.TemporaryDirectory(prefix=".", dir=ledger.root) as folder:
        (path := Path(folder, "run.tar")).write_bytes(archive)
        if refused := merge(ledger, [path]).refused:
            raise SatlibError(f"a record that Ray carried was not taken over: {refused[0]}")


# On the driver


def sweep(runner: Runner, runs: Iterable[Run], options: Options) -> "Sweep":
    """Carry out on a cluster what the runs need; what became of it. One failed run does not stop the others.

    Raises `SatlibError` where Ray is not installed, the cluster cannot be reached, or no run can ever start there.
    """
    if importlib.util.find_spec("ray") is None:
        raise SatlibError("--on ray needs Ray, which is not installed; install satlib[cluster]")
    state = Sweep(runner, runner.todo(runs), options)
    if state.todo:
        runner.progress.line(f"[sweep] {len(state.todo)} runs are waiting")
        (root := runner.ledger.root).mkdir(parents=True, exist_ok=True)
        with _connected(runner, options), tempfile.NamedTemporaryFile(prefix=".", suffix=".sweep", dir=root) as marker:
            state.work(None if options.scratch else Path(marker.name))
    return state


def _connected(runner: Runner, options: Options) -> contextlib.AbstractContextManager:
    """A connection to Ray, whose workers run this very satlib, wherever another one may be installed."""
    if (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as `ray start` does; read when Ray is imported
    import ray

    variables = {name: os.environ[name] for name in ("SATLIB_PRECISION",) if name in os.environ}
    variables |= {"SATLIB_DEADLINE": str(runner.deadline), "SATLIB_FORCE": str(runner.forced_at)}
    variables |= {"SATLIB_HOME": str((options.scratch or project_root()).absolute())}
    name, changed = provenance.commit()
    if name:
        variables["SATLIB_COMMIT"] = f"{name}+changes" if changed else name
    environment = {"py_modules": [str(Path(satlib.__file__).parent)], "env_vars": variables}
    own: dict[str, Any] = {} if options.address or os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
    try:
        return ray.init(options.address, runtime_env=environment, logging_level="warning", **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        why = f"no Ray cluster there ({error}); start one with `ray start`, and share its token"
        raise SatlibError(f"--address {options.address}: {why}") from error


class Sweep:
    """What is to be done on a cluster, and what became of it; ids of runs throughout."""

    def __init__(self, runner: Runner, todo: dict[str, Run], options: Options) -> None:
        self.runner, self.options = runner, options
        self.todo = todo  # without a record, in the order of their importance, parents first
        self.tasks: dict[str, Any] = {}  # of those the submitted, with references to what their tasks give
        self.done: dict[str, Run] = {}
        self.failed: dict[str, Run] = {}
        self.stopped = False
        self._sent: dict[str, Any] = {}  # references to archives of what others build on
        self._unfit: dict[str, dict[str, str]] = defaultdict(dict)  # data sets ("" for all) -> node -> why
        self._began = time.monotonic()

    def due(self, window: int) -> list[str]:
        """What to submit, so that a window of runs is submitted: the first that can start."""
        ready = (key for key in self.runner.ready(self.todo) if key not in self.tasks)
        return list(islice(ready, max(0, window - len(self.tasks))))

    def finish(self, key: str) -> None:
        """A run has its record."""
        self.done[key] = self.todo.pop(key)
        self.tasks.pop(key, None)
        needed = self.runner.parents_of(self.todo.values())
        self._sent = {other: archive for other, archive in self._sent.items() if other in needed}

    def fail(self, key: str, text: str) -> None:
        """A run has failed, and what builds on it is not waited for."""
        self.tasks.pop(key, None)
        self.failed |= self.runner.give_up(key, self.todo, text)

    def line(self, slots: int) -> str:
        """Where the sweep is now, on a cluster that can carry out so many runs at a time."""
        running = min(len(self.tasks), slots)
        text = f"[sweep] {len(self.done)} done, {running} running, {len(self.todo) - running} waiting"
        text += f", {len(self.failed)} failed" if self.failed else ""
        if not (passes := sum(run.cost for run in self.done.values())):
            return text
        left = (time.monotonic() - self._began) * sum(run.cost for run in self.todo.values()) / passes
        return f"{text}, about {duration(left)} left"

    def work(self, marker: Path | None) -> None:
        """Carry out what is to be done, until nothing is left or the time is up. Ray is connected."""
        import ray

        options, have = self.options, ray.cluster_resources()
        on_gpus = have.get("GPU", 0) > 0 if options.gpus is None else options.gpus > 0
        device = options.device or ("cuda" if on_gpus else "cpu")
        gpus = 0.0 if device == "cpu" else options.gpus or 1.0

        def slots() -> int:
            """How many runs the cluster can carry out at a time, now."""
            have = ray.cluster_resources()
            cards = have.get("GPU", 0) / gpus if gpus else float("inf")
            return int(min(have.get("CPU", 0) / options.cpus, cards))

        if slots() < options.ranks:
            raise SatlibError(
                f"a run needs {options.ranks} x ({options.cpus} cores and {gpus:g} GPUs), the cluster has"
                f" {have.get('CPU', 0):g} cores and {have.get('GPU', 0):g} GPUs;"
                " lower --gpus-per-run, --cpus-per-run, --ranks"
            )
        while self.tasks or (self.todo and not self.stopped):
            for key in () if self.stopped else self.due(WINDOW * max(1, slots())):
                self._submit(key, device, gpus, marker)
            keys = {task: key for key, task in self.tasks.items()}
            for task in ray.wait(list(keys), timeout=1.0)[0] if keys else ():
                self._settle(keys[task])
                self.runner.progress.line(self.line(slots()))
            self.stopped |= time.time() > self.runner.deadline

    def _submit(self, key: str, device: str, gpus: float, marker: Path | None) -> None:
        """Have Ray carry out a run, on a node that is not known to be unfit for it."""
        import ray

        run, runner, options = self.todo[key], self.runner, self.options
        needs = ", ".join(dict.fromkeys(each.dataset for each in run.ancestry()))
        unfit = self._unfit[""] | self._unfit[needs]
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")}
        if alive and alive <= unfit.keys():
            self.fail(key, "no node is fit for it:\n" + "\n".join(unfit[node] for node in alive))
            return
        large = runner.splits(run.dataset).train.images.shape[-1] > SMALL
        ranks = options.ranks if run.is_training and not run.settings["defense"] and large else 1
        parents = runner.parents_of([run]) if marker is None else set()
        for parent in parents - self._sent.keys():
            self._sent[parent] = ray.put(_pack(runner.ledger, parent))
        remote = ray.remote(carry_out).options(
            name=run.title,
            num_cpus=options.cpus * ranks,
            num_gpus=gpus * ranks,
            max_retries=RETRIES,
            label_selector={"ray.io/node-id": f"!in({','.join(unfit)})"} if unfit else None,
        )
        task = Task(run, key, needs, runner.profile, device, options.cpus, ranks, marker, data_root())
        self.tasks[key] = remote.remote(task, *(self._sent[parent] for parent in parents))

    def _settle(self, key: str) -> None:
        """What became of a task."""
        import ray

        try:
            if archive := ray.get(self.tasks.pop(key)):
                _unpack(self.runner.ledger, archive)
        except Exception as error:
            match getattr(error, "cause", None):
                case BudgetSpent():
                    self.stopped = True
                case Unfit(args=(node, needs, why)):  # the run goes elsewhere
                    if node not in self._unfit[needs]:
                        self.runner.progress.line(f"[sweep] not used{f' for {needs}' if needs else ''}: {why}")
                    self._unfit[needs][node] = why
                case _:  # the run failed, its worker died again and again, what it sent is damaged, the disk is full
                    self.fail(key, traceback.format_exc())
        else:
            self.finish(key)
