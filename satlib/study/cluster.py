"""A sweep on a Ray cluster: every run without a record is a task, which takes what the tasks of its parents give.

Ray starts a task once these are done, places it, starts it again where its worker or node died, and carries what it
gives. Left for here are what a node must have, what is said, and a window: Ray knows no priorities, so that only so
much of the plan is submitted as keeps the cluster busy, or evaluations would wait for all trainings.
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
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from filelock import FileLock

import satlib
from satlib import parallel
from satlib.errors import SatlibError
from satlib.paths import data_root, project_root
from satlib.progress import Progress, duration
from satlib.study import provenance
from satlib.study.archive import merge, pack
from satlib.study.ledger import Ledger
from satlib.study.measurement import Run
from satlib.study.runs import BudgetSpent, Runner, network

RETRIES = 3  # of a task whose worker or node died
WINDOW = 2  # tasks that are submitted for each that can run, and as many that wait for others
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
        for name, value, fits, expected in (
            ("gpus-per-run", gpus, 0 <= gpus <= 1 or gpus % 1 == 0 < gpus, "a share of one GPU or a number of GPUs"),
            ("cpus-per-run", self.cpus, self.cpus >= 1, "at least 1"),
            ("ranks", self.ranks, self.ranks >= 1, "at least 1"),
        ):
            if not fits:
                raise SatlibError(f"--{name}: {value}, expected {expected}")
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


def carry_out(task: Task, board: Any, *parents: tuple[float, bytes]) -> tuple[float, bytes]:
    """Carry out one run on this node: the seconds that took, and from a scratch folder an archive of its record."""
    import ray

    def tell(text: str) -> None:
        if text.strip():
            board.say.remote(task.key, text.strip().removeprefix("[run] "))

    run, needs, node = task.run, task.needs, ray.get_runtime_context().get_node_id()
    name = f"node {ray.util.get_node_ip_address()} ({node[:8]})"
    tell(f"{run.title}: starts on {name}")
    if task.marker and not task.marker.is_file():
        raise Unfit(node, "", f"{name} does not see {task.marker.parent}; share it, or give workers a --scratch")
    os.environ.setdefault("SATLIB_DATA", str(task.data_root))  # a node's own comes first
    runner = _runner(task.profile, task.device, task.cpus)
    stream: Any = SimpleNamespace(write=tell, flush=lambda: None, isatty=lambda: False)
    runner.progress = Progress(stream, seconds=2.0)
    try:
        key = runner.spec(run).id
    except SatlibError as error:
        raise Unfit(node, needs, f"{name}: {needs}: {error}") from None
    if key != task.key:  # the code is the driver's
        why = "its content (fingerprint) is not the driver's; give all nodes the same"
        raise Unfit(node, needs, f"{name}: {needs} in {data_root()}: {why}")
    for _, archive in parents if task.marker is None else ():
        _unpack(runner.ledger, archive)
    if task.ranks > 1 and runner.find(run, whole=True) is None:
        _train_on_ranks(task)
    record = runner.record(run, whole=True)
    return record.wall_seconds, b"" if task.marker else _pack(runner.ledger, key)


@functools.cache
def _runner(profile: str, device: str, cpus: int) -> Runner:
    """A process's runner, kept with the data that it has loaded. Folder and deadline are in the environment."""
    torch.set_num_threads(cpus)
    return Runner(profile=profile, device=device)


def _train_on_ranks(task: Task) -> None:
    """Carry out a training on several ranks of this node, as torchrun does; they end when this process does."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(1, 1, task.ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    elastic_launch(config, _rank)(task)


def _rank(task: Task) -> None:
    """One rank of a training: as `python -m satlib train` under torchrun."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: be killed when the parent ends, in any way
    with parallel.joined(task.device) as device:
        runner = _runner(task.profile, device or task.device, task.cpus)
        if parallel.current_ranks().rank > 0:
            runner.follow({task.key: task.run})
            return
        try:
            with contextlib.suppress(BudgetSpent):  # the task finds no record, and says so
                runner.record(task.run, whole=True)
        finally:
            parallel.current_ranks().broadcast_object(None)


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


class Board:
    """What each run said last, by its id (a Ray actor)."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}

    def say(self, key: str, text: str) -> None:
        self.said[key] = text

    def read(self) -> dict[str, str]:
        return self.said


class Sweep:
    """What is to be done, and what became of it; ids of runs throughout."""

    def __init__(self, runner: Runner, todo: dict[str, Run]) -> None:
        self.runner = runner
        self.todo = todo  # without a record, in the order of their importance, parents first
        self.tasks: dict[str, Any] = {}  # references to what tasks give: of submitted runs, and of others' parents
        self.done: dict[str, Run] = {}
        self.failed: dict[str, Run] = {}
        self.stopped = False
        self._began = time.monotonic()
        self._passes, self._seconds = Counter[str](), Counter[str]()  # of what is done, by network

    def due(self, window: int) -> Iterator[str]:
        """What to submit: the first runs that can start, and the first that build on those, a window of each."""
        unfinished = {key: self.runner.parents_of([run]) & self.todo.keys() for key, run in self.todo.items()}
        submitted = Counter(bool(parents) for key, parents in unfinished.items() if key in self.tasks)
        for key, parents in unfinished.items():
            if key not in self.tasks and submitted[bool(parents)] < window and parents <= self.tasks.keys():
                submitted[bool(parents)] += 1
                yield key

    def finish(self, key: str, seconds: float) -> None:
        """A run has its record; what its task gave is kept while others build on it."""
        self.done[key] = run = self.todo.pop(key)
        self._passes[network(run)] += run.cost
        self._seconds[network(run)] += seconds
        self.runner.ledger.forget_failure(key)
        needed = self.runner.parents_of(self.todo.values()) | self.todo.keys()
        self.tasks = {other: task for other, task in self.tasks.items() if other in needed}

    def fail(self, key: str, text: str) -> None:
        """A run has failed: it is named with its traceback in a file, and what builds on it is not waited for."""
        lost = self.runner.building_on(key, self.todo)
        self.runner.note_failure(self.todo[key], text, len(lost) - 1)
        for other in lost:
            self.failed[other] = self.todo.pop(other)
            self.tasks.pop(other, None)

    def line(self, said: dict[str, str]) -> str:
        """Where the sweep is now."""
        busy = [text for key, text in said.items() if key in self.todo and key in self.tasks]
        text = f"[sweep] {len(self.done)} done, {len(busy)} running, {len(self.todo) - len(busy)} waiting"
        text += f", {len(self.failed)} failed" if self.failed else ""
        text += f", about {duration(self._left())} left" if self.done else ""
        return text + (f": {'; '.join(busy[:4])}" + ("; ..." if len(busy) > 4 else "") if busy else "")

    def _left(self) -> float:
        """Seconds to the end, from what runs of each network took and how many ran at a time."""
        spent, passes = self._seconds.total(), self._passes.total()
        rates = defaultdict(lambda: spent / passes if passes else 0.0)
        rates |= {name: self._seconds[name] / count for name, count in self._passes.items() if count}
        needed = sum(run.cost * rates[network(run)] for run in self.todo.values())
        return needed / max(1.0, spent / (time.monotonic() - self._began))


def sweep(runner: Runner, runs: Iterable[Run], options: Options) -> Sweep:
    """Carry out on a cluster what the runs need; what became of it. One failed run does not stop the others.

    Raises `SatlibError` where Ray is not installed, the cluster cannot be reached, or no run can ever start there.
    """
    if importlib.util.find_spec("ray") is None:
        raise SatlibError("--on ray needs Ray, which is not installed; install satlib[cluster]")
    state = Sweep(runner, runner.todo(runs))
    if state.todo:
        runner.progress.line(f"[sweep] {len(state.todo)} runs are waiting")
        (root := runner.ledger.root).mkdir(parents=True, exist_ok=True)
        with _connected(runner, options), tempfile.NamedTemporaryFile(prefix=".", suffix=".sweep", dir=root) as marker:
            _Driver(state, options, None if options.scratch else Path(marker.name)).work()
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
        return ray.init(options.address, runtime_env=environment, log_to_driver=False, logging_level="warning", **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        why = f"no Ray cluster there ({error}); start one with `ray start`, and share its token"
        raise SatlibError(f"--address {options.address}: {why}") from error


class _Driver:
    """Submits a sweep's runs, and collects what becomes of them."""

    def __init__(self, state: Sweep, options: Options, marker: Path | None) -> None:
        import ray

        self.ray, self.state, self.runner, self.options, self.marker = ray, state, state.runner, options, marker
        have = ray.cluster_resources()
        on_gpus = have.get("GPU", 0) > 0 if options.gpus is None else options.gpus > 0
        self.device = options.device or ("cuda" if on_gpus else "cpu")
        self.gpus = 0.0 if self.device == "cpu" else options.gpus or 1.0
        if self.slots() < options.ranks:
            need = f"{options.ranks} x ({options.cpus} cores and {self.gpus:g} GPUs)"
            has = f"{have.get('CPU', 0):g} cores and {have.get('GPU', 0):g} GPUs"
            raise SatlibError(
                f"a run needs {need}, the cluster has {has}; lower --gpus-per-run, --cpus-per-run, --ranks"
            )
        self.board = ray.remote(Board).options(num_cpus=0, max_restarts=-1).remote()
        self.unfit: dict[str, dict[str, str]] = defaultdict(dict)  # data sets ("" for all) -> node -> why

    def slots(self) -> int:
        """How many runs the cluster can carry out at a time, now."""
        have = self.ray.cluster_resources()
        cards = have.get("GPU", 0) / self.gpus if self.gpus else float("inf")
        return int(min(have.get("CPU", 0) / self.options.cpus, cards))

    def work(self) -> None:
        """Until nothing is left, or the time is up."""
        state, shown = self.state, 0.0
        while True:
            for key in () if state.stopped else state.due(WINDOW * max(1, self.slots())):
                self.submit(key)
            keys = {state.tasks[key]: key for key in state.todo if key in state.tasks}
            if not keys:
                break
            ready, _ = self.ray.wait(list(keys), timeout=1.0)  # the first of the plan: before those that fail with it
            for task in ready:
                self.settle(keys[task])
            if time.monotonic() - shown >= 2.0:
                shown, said = time.monotonic(), {}
                with contextlib.suppress(self.ray.exceptions.RayError):
                    said = self.ray.get(self.board.read.remote(), timeout=5)
                self.runner.progress.update(state.line(said))
            state.stopped |= time.time() > self.runner.deadline

    def submit(self, key: str) -> None:
        """Have Ray carry out a run after its parents, on a node that is not known to be unfit for it."""
        tasks, runner, options, run = self.state.tasks, self.runner, self.options, self.state.todo[key]
        needs = ", ".join(dict.fromkeys(each.dataset for each in run.ancestry()))
        unfit = self.unfit[""] | self.unfit[needs]
        alive = {node["NodeID"] for node in self.ray.nodes() if node["Alive"] and node["Resources"].get("CPU")}
        if alive and alive <= unfit.keys():
            self.state.fail(key, "no node is fit for it:\n" + "\n".join(unfit[node] for node in alive))
            return
        large = runner.splits(run.dataset).train.images.shape[-1] > SMALL
        ranks = options.ranks if run.is_training and not run.settings["defense"] and large else 1
        task = Task(run, key, needs, runner.profile, self.device, options.cpus, ranks, self.marker, data_root())
        parents = runner.parents_of([run])
        for parent in parents - tasks.keys() if self.marker is None else ():
            tasks[parent] = self.ray.put((0.0, _pack(runner.ledger, parent)))
        remote = self.ray.remote(carry_out).options(
            name=run.title,
            num_cpus=options.cpus * ranks,
            num_gpus=self.gpus * ranks,
            max_retries=RETRIES,
            label_selector={"ray.io/node-id": f"!in({','.join(unfit)})"} if unfit else None,
        )
        tasks[key] = remote.remote(task, self.board, *(tasks[parent] for parent in parents & tasks.keys()))

    def settle(self, key: str) -> None:
        """What became of a task; those that wait for what it gives fail with it, in the same way."""
        try:
            seconds, archive = self.ray.get(self.state.tasks[key])
            if archive:
                _unpack(self.runner.ledger, archive)
        except Exception as error:
            match getattr(error, "cause", None):
                case BudgetSpent():
                    self.state.stopped = True
                    del self.state.tasks[key]
                case Unfit(args=(node, needs, why)):  # the run goes elsewhere
                    if node not in self.unfit[needs]:
                        self.runner.progress.line(f"[sweep] not used{f' for {needs}' if needs else ''}: {why}")
                    self.unfit[needs][node] = why
                    del self.state.tasks[key]
                case _:  # the run failed, its worker died again and again, what it sent is damaged, the disk is full
                    self.state.fail(key, traceback.format_exc())
        else:
            self.state.finish(key, seconds)
