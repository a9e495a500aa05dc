"""A sweep on a Ray cluster: every run that is to be computed becomes a task, and Ray places it.

The runs, their ids and their records are those of the in-process sweep. What is a task's place, retry and transport is
Ray's; here is only the order (`satlib.study.runs.Runner.todo`), what is checked on a node, and what is said.
"""

import contextlib
import ctypes
import importlib.util
import os
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import satlib
from satlib import parallel
from satlib.errors import SatlibError
from satlib.paths import data_root, project_root
from satlib.progress import Progress, duration
from satlib.study import provenance
from satlib.study.archive import merge, pack
from satlib.study.kinds import TRAININGS
from satlib.study.ledger import Ledger
from satlib.study.runs import BudgetSpent, Run, Runner, network

RETRIES = 3  # of a task whose worker or node died
QUEUE = 2  # tasks that are submitted for each that can run: more would only cement their order
SMALL = 32  # images up to so many pixels a side are for small networks, which one process trains best


class Unfit(SatlibError):
    """A node (by its id) cannot carry out runs on a data set, which it lacks or has otherwise, or ("") any run."""

    def __init__(self, node: str, dataset: str, why: str) -> None:
        super().__init__(f"node {why}")
        self.node, self.dataset, self.why = node, dataset, why

    def __reduce__(self) -> tuple:
        return Unfit, (self.node, self.dataset, self.why)


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
        for name, value, least in (("gpus-per-run", self.gpus, 0), ("cpus-per-run", self.cpus, 1)):
            if value is not None and not value >= least:
                raise SatlibError(f"--{name}: {value}, expected at least {least}")
        if self.gpus is not None and self.gpus > 1 and self.gpus != int(self.gpus):
            raise SatlibError(f"--gpus-per-run: {self.gpus}, expected a fraction of one GPU or a whole number of them")
        if self.ranks < 1:
            raise SatlibError(f"--ranks: {self.ranks}, expected at least 1")
        if self.ranks > 1 and self.gpus is not None and 0 < self.gpus < 1:
            raise SatlibError(f"--ranks {self.ranks} --gpus-per-run {self.gpus}: a rank needs a whole GPU, or none")


@dataclass(frozen=True)
class Task:
    """What a worker is told: a run with its id, what its data must be, and how to work."""

    run: Run
    key: str
    whole: bool
    data: dict[str, str]  # data set -> fingerprint
    profile: str
    device: str
    threads: int
    ranks: int
    deadline: float
    forced_at: float
    home: Path  # the project's folder, which has a file named `token` in its `data`, or the scratch folder
    token: str  # "" in a scratch folder
    data_root: Path


# On a worker


@dataclass
class Worker:
    """A worker process: its runner is kept from task to task, with the data that it has loaded."""

    runner: Runner
    task: Task


_worker: Worker | None = None


def _lab(task: Task, progress: Progress) -> Runner:
    global _worker
    same = ("home", "token", "device", "deadline", "forced_at")
    if _worker is None or any(getattr(_worker.task, name) != getattr(task, name) for name in same):
        os.environ["SATLIB_HOME"] = str(task.home)
        os.environ.setdefault("SATLIB_DATA", str(task.data_root))  # a node's own comes first
        ledger = Ledger(task.home / "data")
        _worker = Worker(Runner(profile=task.profile, ledger=ledger, device=task.device, deadline=task.deadline), task)
        _worker.runner.forced_at = task.forced_at
    torch.set_num_threads(task.threads)
    _worker.runner.progress = progress
    return _worker.runner


def _node() -> tuple[str, str]:
    """Id and name of the node that this is."""
    import ray

    context = ray.get_runtime_context()
    return context.get_node_id(), f"{ray.util.get_node_ip_address()} ({context.get_node_id()[:8]})"


def carry_out(task: Task, board: Any, *archives: bytes) -> tuple[float, bytes]:
    """Carry out one run on this node: the seconds that took, and in a scratch folder an archive of its record."""
    node, name = _node()
    progress = _Told(lambda text: board.say.remote(task.key, text))
    board.say.remote(task.key, f"{task.run.title}: starts on {name}")
    if task.token and not (task.home / "data" / task.token).is_file():
        raise Unfit(
            node, "", f"{name} does not see {task.home / 'data'}; share that folder, or give workers a --scratch"
        )
    runner = _lab(task, progress)
    for dataset, expected in task.data.items():
        try:
            found = runner.fingerprint(dataset)
        except SatlibError as error:
            raise Unfit(node, dataset, f"{name}: {dataset}: {error}") from None
        if found != expected:
            text = f"its content (fingerprint {found[:12]}) is not the driver's ({expected[:12]})"
            raise Unfit(node, dataset, f"{name}: {dataset} in {data_root()}: {text}; give all nodes the same")
    if not task.token:
        with _as_files(runner.ledger, archives) as files:
            if refused := merge(runner.ledger, files).refused:
                raise SatlibError(f"what {task.run.title} builds on was not taken over: {refused[0]}")
    began = time.monotonic()
    if task.ranks > 1 and runner.find(task.run, whole=task.whole) is None:
        _by_torchrun(task)
    record = runner.record(task.run, whole=task.whole)
    if record.id != task.key:
        raise SatlibError(f"{task.run.title}: its id here is {record.id[:12]}, the driver's is {task.key[:12]}")
    return time.monotonic() - began, b"" if task.token else _archive(runner.ledger, [task.key])


def _by_torchrun(task: Task) -> None:
    """Carry out a training on several ranks of this node, which end when this process does."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=task.ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=secrets.token_hex(8),
        max_restarts=0,
        monitor_interval=0.2,
    )
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    elastic_launch(config, _rank)(task, os.getpid())


def _rank(task: Task, parent: int) -> None:
    """One rank of a training: as `python -m satlib train` under torchrun."""
    _end_with(parent)
    with parallel.joined(task.device) as device:
        runner = _lab(replace(task, device=device or task.device), Progress())
        runs = {task.key: task.run}
        if parallel.current_ranks().rank > 0:
            runner.follow(runs)
            return
        try:
            with contextlib.suppress(BudgetSpent):  # the task finds no record, and says so
                runner.record(task.run, whole=task.whole)
        finally:
            parallel.current_ranks().broadcast_object(None)


def _end_with(parent: int) -> None:
    """Have the system end this process when the one that started it ends, however that happens (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit(1)


class _Told(Progress):
    """Progress that is told to the driver's board, now and then."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(seconds=2.0)
        self._tell = tell

    def line(self, text: str) -> None:
        self._tell(text.removeprefix("[run] "))
        self._last = time.monotonic()

    def update(self, text: str) -> None:
        if time.monotonic() - self._last >= self.seconds:
            self.line(text)


class Board:
    """What each run that is being carried out says of itself (a Ray actor)."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}

    def say(self, key: str, text: str) -> None:
        self.said[key] = text

    def read(self) -> dict[str, str]:
        """The last words of each run, by id."""
        return self.said


# Records on their way


def _archive(ledger: Ledger, keys: Iterable[str]) -> bytes:
    path = ledger.root / f".{secrets.token_hex(8)}.tar"
    try:
        pack(ledger, path, keys)
        return path.read_bytes()
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _as_files(ledger: Ledger, archives: Iterable[bytes]) -> Iterator[list[Path]]:
    """The archives as files, for as long as they are needed."""
    files = []
    try:
        ledger.root.mkdir(parents=True, exist_ok=True)
        for content in archives:
            files.append(ledger.root / f".{secrets.token_hex(8)}.tar")
            files[-1].write_bytes(content)
        yield files
    finally:
        for path in files:
            path.unlink(missing_ok=True)


# On the driver


@dataclass
class Sweep:
    """What is to be done, and what became of it; ids of runs throughout."""

    runner: Runner
    waiting: dict[str, Run]  # in the order of their importance, parents first
    running: dict[str, Run] = field(default_factory=dict)
    done: dict[str, float] = field(default_factory=dict)  # and the seconds that each took
    failed: dict[str, Run] = field(default_factory=dict)
    stopped: bool = False
    began: float = field(default_factory=time.monotonic)
    _work: dict[str, list[float]] = field(default_factory=dict)  # by network: passes and seconds of what is done

    def next(self) -> str | None:
        """The first waiting run that builds on nothing unfinished."""
        for key, run in self.waiting.items():
            parents = [self.runner.spec(parent).id for parent in run.parents.values()]
            if not any(parent in self.waiting or parent in self.running for parent in parents):
                return key
        return None

    def start(self, key: str) -> Run:
        """Move a run from waiting to running."""
        self.running[key] = self.waiting.pop(key)
        return self.running[key]

    def put_back(self, key: str) -> None:
        """A run that was not carried out is the next one."""
        self.waiting = {key: self.running.pop(key)} | self.waiting

    def finish(self, key: str, seconds: float) -> None:
        """A run has its record."""
        run = self.running.pop(key)
        self.done[key] = seconds
        total = self._work.setdefault(network(run), [0.0, 0.0])
        total[0], total[1] = total[0] + run.cost, total[1] + seconds

    def fail(self, key: str, text: str) -> None:
        """A run has failed: it is named with its traceback in a file, and what builds on it is not waited for."""
        self.failed[key] = self.running.pop(key)
        lost = self.runner.building_on(key, self.waiting)
        self.runner.note_failure(self.failed[key], text, len(lost))
        self.failed |= {other: self.waiting.pop(other) for other in lost}

    def line(self, said: dict[str, str]) -> str:
        """Where the sweep is now."""
        busy = [said[key] for key in self.running if key in said]
        counts = (
            f"{len(self.done)} done, {len(busy)} running, {len(self.waiting) + len(self.running) - len(busy)} waiting"
        )
        text = f"[sweep] {counts}" + (f", {len(self.failed)} failed" if self.failed else "")
        if left := self._left():
            text += f", about {duration(left)} left"
        return text + (f": {'; '.join(busy[:4])}" + ("; ..." if len(busy) > 4 else "") if busy else "")

    def _left(self) -> float | None:
        """Seconds to the end, from what runs of each network took and how many ran at a time."""
        spent = sum(self.done.values())
        if not spent:
            return None
        passes = sum(work[0] for work in self._work.values())
        rates = {name: seconds / cost for name, (cost, seconds) in self._work.items() if cost}
        rest = [*self.waiting.values(), *self.running.values()]
        needed = sum(run.cost * rates.get(network(run), spent / passes if passes else 0.0) for run in rest)
        at_once = max(1.0, spent / (time.monotonic() - self.began))
        return needed / at_once


def sweep(runner: Runner, runs: Iterable[Run], options: Options) -> Sweep:
    """Carry out on a cluster what the runs need; what became of it. One failed run does not stop the others.

    Raises `SatlibError` where Ray is not installed, the cluster cannot be reached, or no run can ever start there.
    """
    if importlib.util.find_spec("ray") is None:
        raise SatlibError("--on ray needs Ray, which is not installed; install satlib[cluster]")
    todo = runner.todo(runs)
    state = Sweep(runner, todo)
    if not todo:
        return state
    runner.progress.line(f"[sweep] {len(todo)} runs are waiting")
    token = f".{secrets.token_hex(8)}.sweep"
    runner.ledger.root.mkdir(parents=True, exist_ok=True)
    marker = runner.ledger.root / token
    with _cluster(options.address):
        try:
            marker.touch()
            _Driver(state, options, "" if options.scratch else token).work()
        finally:
            marker.unlink(missing_ok=True)
    return state


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Connected to Ray, whose workers run this very satlib, wherever another one may be installed."""
    if (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as `ray start` does; read when Ray is imported
    import ray

    variables = {name: os.environ[name] for name in ("SATLIB_PRECISION",) if name in os.environ}
    name, changed = provenance.commit()
    if name:
        variables["SATLIB_COMMIT"] = f"{name}+changes" if changed else name
    environment = {"py_modules": [str(Path(satlib.__file__).parent)], "env_vars": variables}
    own: dict[str, Any] = {} if address or os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
    try:
        ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level="warning", **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise SatlibError(
            f"--address {address}: no Ray cluster there ({error}); start one with `ray start`, and share its token"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


class _Driver:
    """Keeps the cluster busy with a sweep's runs."""

    def __init__(self, state: Sweep, options: Options, token: str) -> None:
        import ray

        self.state, self.options, self.token, self.runner = state, options, token, state.runner
        resources = ray.cluster_resources()
        self.gpus = (1.0 if resources.get("GPU") else 0.0) if options.gpus is None else options.gpus
        if options.device:
            self.gpus = 0.0 if options.device == "cpu" else self.gpus or 1.0
        self.device = "cuda" if self.gpus else "cpu"
        share = (f"{self.gpus:g} GPUs and " if self.gpus else "") + f"{options.cpus} cores"
        if (
            resources.get("GPU", 0) < self.gpus * options.ranks
            or resources.get("CPU", 0) < options.cpus * options.ranks
        ):
            have = f"{resources.get('CPU', 0):g} cores and {resources.get('GPU', 0):g} GPUs"
            raise SatlibError(f"a run needs {share}, and the cluster has {have}; lower --gpus-per-run, --cpus-per-run")
        self.board = ray.remote(Board).options(num_cpus=0, max_restarts=-1).remote()
        self.inner = self.runner.parents_of(state.waiting.values())
        self.unfit: dict[str, dict[str, str]] = {}  # data set ("" for all) -> node -> why
        self.refs: dict[Any, str] = {}
        self.archives: dict[str, Any] = {}

    def work(self) -> None:
        """Until nothing is left, or the time is up."""
        import ray

        state, shown = self.state, 0.0
        while state.running or state.waiting:
            while not state.stopped and len(state.running) < QUEUE * self._room() and (key := state.next()):
                self._submit(key)
            if not state.running:
                break
            ready, _ = ray.wait(list(self.refs), num_returns=1, timeout=1.0)
            for ref in ready:
                self._settle(ref, self.refs.pop(ref))
            if time.monotonic() - shown >= 2.0:
                shown, said = time.monotonic(), {}
                with contextlib.suppress(ray.exceptions.RayError):
                    said = ray.get(self.board.read.remote(), timeout=5)
                self.runner.progress.update(state.line(said))
            if time.time() > self.runner.deadline:
                state.stopped = True

    def _room(self) -> int:
        """How many runs the cluster can carry out at a time, now."""
        import ray

        have = ray.cluster_resources()
        room = have.get("CPU", 0) / self.options.cpus
        if self.gpus:
            room = min(room, have.get("GPU", 0) / self.gpus)
        return max(1, int(room))

    def _submit(self, key: str) -> None:
        import ray

        run = self.state.start(key)
        data = {each.dataset: self.runner.fingerprint(each.dataset) for each in run.ancestry()}
        large = self.runner.splits(run.dataset).train.images.shape[-1] > SMALL
        ranks = self.options.ranks if run.kind in TRAININGS and "defense" not in run.config and large else 1
        task = Task(
            run=run,
            key=key,
            whole=key in self.inner,
            data=data,
            profile=self.runner.profile,
            device=self.device,
            threads=self.options.cpus,
            ranks=ranks,
            deadline=self.runner.deadline,
            forced_at=self.runner.forced_at,
            home=(self.options.scratch or project_root()).absolute(),
            token=self.token,
            data_root=data_root(),
        )
        unfit = {node: why for name in ("", *data) for node, why in self.unfit.get(name, {}).items()}
        alive = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        if alive and set(alive) <= unfit.keys():
            self.state.fail(key, "no node is fit for it:\n" + "\n".join(unfit[node] for node in alive))
            return
        placed = {"label_selector": {"ray.io/node-id": f"!in({','.join(unfit)})"}} if unfit else {}
        remote = ray.remote(carry_out).options(
            num_returns=2,
            num_cpus=self.options.cpus * ranks,
            num_gpus=self.gpus * ranks,
            max_retries=RETRIES,
            name=run.title,
            **placed,
        )
        seconds, archive = remote.remote(task, self.board, *self._archives(run))
        self.refs[seconds] = key
        self.archives[key] = archive

    def _archives(self, run: Run) -> list[Any]:
        """For workers that do not see this ledger: the records of what the run builds on."""
        import ray

        if self.token:
            return []
        for each in run.ancestry():
            key = self.runner.spec(each).id
            if each is not run and f"known {key}" not in self.archives and self.runner.find(each) is not None:
                self.archives[f"known {key}"] = ray.put(_archive(self.runner.ledger, [key]))
        names = [f"known {self.runner.spec(each).id}" for each in run.ancestry() if each is not run]
        return [self.archives[name] for name in names if name in self.archives]

    def _settle(self, ref: Any, key: str) -> None:
        """What became of a task."""
        import ray

        archive = self.archives.pop(key)
        try:
            seconds = ray.get(ref)
            if not self.token:
                with _as_files(self.runner.ledger, [ray.get(archive)]) as files:
                    if refused := merge(self.runner.ledger, files).refused:
                        raise SatlibError(f"its record was not taken over: {refused[0]}")
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, BudgetSpent):
                self.state.stopped = True
                self.state.put_back(key)
            elif isinstance(error.cause, Unfit):
                self._avoid(error.cause, key)
            else:
                self.state.fail(key, str(error))
        except Exception:  # the worker died again and again, what it sent is damaged, the disk is full
            self.state.fail(key, traceback.format_exc())
        else:
            self.state.finish(key, seconds)
            self.runner.ledger.forget_failure(key)

    def _avoid(self, unfit: Unfit, key: str) -> None:
        """A node that is unfit for a run gets no other on the same data, and the run goes elsewhere."""
        known = self.unfit.setdefault(unfit.dataset, {})
        if unfit.node not in known:
            known[unfit.node] = unfit.why
            self.runner.progress.line(f"[sweep] not used{f' for {unfit.dataset}' if unfit.dataset else ''}: {unfit}")
        self.state.put_back(key)
