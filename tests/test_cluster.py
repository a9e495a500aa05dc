"""Sweeps on a Ray cluster of two nodes on loopback: the records are those of one process, whatever dies meanwhile."""

import contextlib
import json
import math
import os
import pickle
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_data import write_tree
from tiny_project import write_project

from satlib.cli import main
from satlib.errors import SatlibError
from satlib.progress import Progress
from satlib.study import measurements
from satlib.study.cluster import Options, Sweep, Unfit
from satlib.study.ledger import Ledger
from satlib.study.records import CHECKPOINT, Record
from satlib.study.runs import Runner

# Workers are as urgent as the rest, nobody is told about the tests, and nobody else can join their cluster.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "SATLIB_PRECISION": "float32",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}
os.environ.update({name: value for name, value in ENVIRONMENT.items() if name.startswith("RAY_")})  # read on import
cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray has no wheel for this Python or machine")

EPOCHS = 30
STEMS = {"6.1": "04_cifar10", "6.2": "05_imagenet"}
SETTINGS = {
    "dataset": "cifar10",
    "depth": 8,
    "width": 2,
    "erm_epochs": 2,
    "erm_batch_size": 20,
    "erm_schedule": "one-cycle",
    "finetune_epochs": EPOCHS,
    "finetune_epoch_images": 64,
    "points": [[8, 8.0, 0.5], [1, 4.0, 0.5]],
    "baselines": [],
    "steps": 2,
    "search_steps": 5,
    "search_iterations": 3,
    "search_batch": 8,
    "craft_images": 10,
    "choose_images": 10,
    "report_images": 10,
    "strongest_seeds": 0,
    "deepfool_images": 10,
    "deepfool_passes": 1,
    "cost_images": 20,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The data root: a few images in the layout of CIFAR-10."""
    folder = tmp_path_factory.mktemp("data")
    write_tree(folder)
    return folder


@pytest.fixture(scope="module")
def cluster(root) -> Iterator[Any]:
    """A head without cores, and two nodes of one core; only one of them knows where the data is."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.delenv("SATLIB_DATA", raising=False)
        started = cluster_utils.Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        for _ in range(2):
            started.add_node(num_cpus=1)
        yield started
        started.shutdown()


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory) -> dict[str, Record]:
    """By id, what one process records."""
    home = project(tmp_path_factory.mktemp("alone") / "home")
    with sweep(home, root, "--device", "cpu") as process:
        assert process.wait(200) == 0, said(home)
    return found(home)


def project(home: Path, section: str = "6.1", settings: dict = SETTINGS) -> Path:
    return write_project(home, {STEMS[section]: []}, {section: settings})


def sweep(home: Path, root: Path, *more: str) -> subprocess.Popen:
    environment = os.environ | ENVIRONMENT | {"SATLIB_HOME": str(home), "SATLIB_DATA": str(root)}
    with (home / "out").open("w") as out:
        (notebook,) = (home / "notebooks").iterdir()
        command = [sys.executable, "-m", "satlib", "sweep", "--only", notebook.stem, *more]
        return subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)


def on(cluster: Any) -> list[str]:
    return ["--on", "ray", "--address", cluster.address, "--device", "cpu"]


def said(home: Path) -> str:
    return (home / "out").read_text()


def found(home: Path) -> dict[str, Record]:
    return {record.id: record for record in Ledger(home / "data").records()}


def until(condition, seconds: float = 120.0):
    """What the condition gives once it gives anything."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)
    return value


def assert_same(one: dict[str, Record], other: dict[str, Record]) -> None:
    assert one.keys() == other.keys()
    for key, record in one.items():
        if record.kind != "epoch_cost":  # which measures time
            assert_close(record.metrics, other[key].metrics, record.labels["title"])


def assert_close(one, other, where: str) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_close(value, other[key], f"{where}: {key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for a, b in zip(one, other, strict=True):
            assert_close(a, b, where)
    elif isinstance(one, float) and other is not None:
        assert math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5), where
    else:
        assert one == other, where


def spawned(worker: psutil.Process) -> Iterator[psutil.Process]:
    """Processes of Python's multiprocessing that a worker has started."""
    with contextlib.suppress(psutil.Error):
        for child in worker.children():
            if "spawn_main" in " ".join(child.cmdline()):
                yield child


def epochs(home: Path, key: str) -> int:
    """How many epochs of a run its checkpoint holds; 0 while there is none."""
    try:
        content = (home / "data" / "runs" / ".work" / key / CHECKPOINT).read_bytes()
    except FileNotFoundError:
        return 0
    return len(json.loads(content.split(b"\n", 2)[1])["info"]["history"])  # after the line of the hash


def test_a_worker_is_killed_and_the_records_are_those_of_one_process(cluster, root, alone, tmp_path):
    """The run of the killed worker goes on from its checkpoint, for the folder is shared."""
    home = project(tmp_path / "home")
    (key,) = (record.id for record in alone.values() if record.labels["title"] == "s=8, eps=8, sigma=0.5")
    seen = []
    with sweep(home, root, *on(cluster)) as process:
        until(lambda: epochs(home, key) >= 3 or process.poll() is not None)
        workers = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [""])[0].startswith("ray::s=8")]
        assert workers, said(home)
        before = epochs(home, key)
        for worker in workers:
            worker.kill()
        while process.poll() is None:
            seen.append(epochs(home, key))
            time.sleep(0.01)
    assert process.returncode == 0, said(home)
    after = [count for count in seen if count]
    assert before < EPOCHS and after and min(after) >= before, "it started anew"
    assert_same(alone, found(home))
    assert "all runs of 04_cifar10 in the profile 'quick' have a record" in said(home) and " running, " in said(home)
    assert not list((home / "data").glob(".*"))

    created = {key: record.created for key, record in found(home).items()}
    with sweep(home, root, *on(cluster)) as process:
        assert process.wait(100) == 0
    assert {key: record.created for key, record in found(home).items()} == created


def test_the_driver_is_killed_and_the_next_sweep_goes_on_in_folders_of_the_workers_own(cluster, root, alone, tmp_path):
    """Workers that do not use the driver's folder send their records, and are sent what these build on."""
    home, scratch = project(tmp_path / "home"), tmp_path / "scratch"
    options = [*on(cluster), "--scratch", str(scratch)]
    with sweep(home, root, *options) as process:
        until(lambda: found(home) or process.poll() is not None)
        process.kill()
    created = {key: record.created for key, record in found(home).items()}
    assert 0 < len(created) < len(alone), said(home)
    with sweep(home, root, *options) as process:
        assert process.wait(200) == 0, said(home)
    assert_same(alone, found(home))
    assert all(found(home)[key].created == when for key, when in created.items())
    assert found(scratch).keys() == alone.keys() and (scratch / "data" / "runs").is_dir()


def test_a_node_dies_and_its_runs_are_carried_out_elsewhere(cluster, root, alone, tmp_path):
    home = project(tmp_path / "home")
    (key,) = (record.id for record in alone.values() if record.labels["title"] == "s=8, eps=8, sigma=0.5")
    node = cluster.add_node(num_cpus=3)  # most runs are placed there
    with sweep(home, root, *on(cluster)) as process:
        until(lambda: epochs(home, key) >= 1 or process.poll() is not None)
        assert process.poll() is None, said(home)
        cluster.remove_node(node, allow_graceful=False)
        assert process.wait(200) == 0, said(home)
    assert_same(alone, found(home))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--force", "--scratch", "x", "--on", "ray"], "never replaces one that is here"),
        (["--ranks", "2"], "are for --on ray"),
        (["--json", "x"], "--json is for --dry-run"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, named, capsys):
    assert main(["sweep", *options]) == 2 and named in capsys.readouterr().err


def test_a_node_without_data_is_named_and_the_others_go_on(cluster, root, alone, tmp_path):
    home = project(tmp_path / "home")
    other = tmp_path / "other"
    write_tree(other, seed=1)
    nodes = [cluster.add_node(num_cpus=1, env_vars={"SATLIB_DATA": str(tmp_path / where)}) for where in ("no", "other")]
    try:
        with sweep(home, root, *on(cluster)) as process:
            assert process.wait(200) == 0, said(home)
    finally:
        for node in nodes:
            cluster.remove_node(node)
    assert_same(alone, found(home))
    lines = [line for line in said(home).splitlines() if "not used for cifar10: node " in line]
    assert len(lines) == 2, said(home)
    assert sum("no CIFAR-10 in" in line for line in lines) == 1
    assert sum("is not the driver's" in line and str(other) in line for line in lines) == 1


def test_a_training_on_several_ranks_is_one_run(cluster, root, tmp_path):
    """Its images are larger than 32x32, so that torchrun shares them out."""
    settings = {
        "dataset": "shapes64",
        "group_width": 2,
        "expansion": 1,
        "layers": [1, 1, 1, 1],
        "erm_epochs": 1,
        "finetune_epochs": 1,
        "finetune_epoch_images": 32,
        "points": [[8, 8.0, 0.5]],
        "search_steps": 2,
        "search_iterations": 2,
        "search_batch": 8,
        "craft_images": 16,
        "choose_images": 16,
        "report_images": 16,
        "strongest_seeds": 0,
    }
    home, ranks = project(tmp_path / "home", "6.2", settings), 0
    node = cluster.add_node(num_cpus=2)
    try:
        with sweep(home, root, *on(cluster), "--ranks", "2") as process:
            while process.poll() is None:
                workers = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [""])[0] == "ray::ERM"]
                ranks = max([ranks, *(len(list(spawned(worker))) for worker in workers)])
                time.sleep(0.05)
            assert process.returncode == 0, said(home)
    finally:
        cluster.remove_node(node)
    titles = {record.labels["title"] for record in found(home).values() if record.kind == "train"}
    assert titles == {"ERM", "s=8, eps=8, sigma=0.5"} and ranks == 2


def test_a_run_that_fails_is_named_and_the_others_are_carried_out(root, alone, tmp_path, monkeypatch):
    """In one process: what builds on it is left out, the traceback is in a file, and the next sweep tries it again."""
    home = project(tmp_path / "home")
    monkeypatch.setenv("SATLIB_HOME", str(home))
    monkeypatch.setenv("SATLIB_DATA", str(root))
    runs, failed = measurements.profile_runs("quick", ["04_cifar10"]), []
    (bad,) = (run for run in runs if run.title == "s=8, eps=8, sigma=0.5")
    bad.settings["training"]["optimizer"] = "none such"
    runner = Runner(ledger=Ledger(home / "data"), device="cpu")
    runner.carry_out(runs, failed=failed.append)
    assert [run.title for run in failed] == [bad.title, f"eps_uni of {bad.title}", f"DeepFool on {bad.title}"]
    assert len(found(home)) == len(alone) - 3
    (file,) = (home / "data" / "failed").iterdir()
    assert file.stem == runner.spec(bad).id[:12] and "Traceback" in file.read_text() and "none such" in file.read_text()
    assert runner.ledger.status()["failed"] == [file.stem]
    assert list(runner.todo(runs).values()) == failed


def test_a_sweep_keeps_account_of_its_runs(root, tmp_path, monkeypatch, capsys):
    home = project(tmp_path / "home")
    monkeypatch.setenv("SATLIB_HOME", str(home))
    monkeypatch.setenv("SATLIB_DATA", str(root))
    runner = Runner(ledger=Ledger(home / "data"), device="cpu", progress=Progress())
    state = Sweep(runner, runner.todo(measurements.profile_runs("quick", ["04_cifar10"])), Options())
    total, plan = len(state.todo), list(state.todo)

    def submit(window: int) -> list[str]:
        """Titles of what is due."""
        return [state.tasks.setdefault(key, state.todo[key].title) for key in state.due(window)]

    assert submit(4) == ["ERM"], "everything builds on the ERM model"
    assert list(state.tasks) == plan[:1] and not submit(4)
    del state.tasks[plan[0]]
    assert submit(4) == ["ERM"], "what was put back is the next"
    state.finish(plan[0])
    ready = [key for key, run in state.todo.items() if runner.parents_of([run]) <= {plan[0]}]
    titles = submit(4)
    assert list(state.tasks) == ready[:4] and not submit(4), "the first of the plan that can start, and no more"
    assert "s=8, eps=8, sigma=0.5" in titles
    line = state.line(2)
    assert f"1 done, 2 running, {total - 3} waiting, about " in line and line.endswith(" left")
    assert f"4 running, {total - 5} waiting" in state.line(9)
    (bad,) = (key for key, run in state.todo.items() if run.title == "s=8, eps=8, sigma=0.5")
    state.fail(bad, "Traceback\nSomeError: no")
    assert len(state.failed) == 3 and "and with it 2 that build on it: SomeError: no" in capsys.readouterr().out
    assert ", 3 failed" in state.line(2) and not state.failed.keys() & (state.todo.keys() | state.tasks.keys())
    for key in list(state.todo):
        state.finish(key)
    assert not state.tasks and len(state.done) == total - 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cpus": 0}, "--cpus-per-run: 0"),
        ({"gpus": -1.0}, "--gpus-per-run: -1.0"),
        ({"gpus": float("nan")}, "--gpus-per-run: nan"),
        ({"gpus": 1.5}, "--gpus-per-run: 1.5"),
        ({"ranks": 0}, "--ranks: 0"),
        ({"ranks": 2, "gpus": 0.25}, "--ranks 2 --gpus-per-run 0.25"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(SatlibError, match=named):
        Options(**options)


def test_what_a_node_lacks_survives_the_way_to_the_driver():
    unfit = pickle.loads(pickle.dumps(Unfit("id", "cifar10", "node it has no data")))
    assert isinstance(unfit, Unfit) and unfit.args == ("id", "cifar10", "node it has no data")
