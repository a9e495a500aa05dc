"""Executes the notebooks under a profile with papermill and says how far they are.

Each notebook is executed by this very Python, in the folder of the notebooks, into
`notebooks/executed/<profile>/`, as a notebook and as an HTML page. The kernel finds in its environment
`SATLIB_FORCE` (seconds since the epoch) if what was recorded before is to be computed again, and `SATLIB_DEADLINE`
(likewise) if the time is limited: the code that it runs raises `BudgetSpent` when the time is up.
"""

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from satlib.errors import SatlibError
from satlib.paths import data_root, project_root
from satlib.progress import duration
from satlib.study import profiles
from satlib.study.notebook_progress import NotebookProgress, Timings

if TYPE_CHECKING:
    from jupyter_client import AsyncKernelManager

MIN_FREE_BYTES = 1e9
BUDGET_STOP = "BudgetSpent"  # name of the exception by which a notebook's code says that the time is up
KERNEL = "satlib"
PRELOAD = ("satlib.study.runs", "satlib.study.results", "satlib.study.figures.method")  # imported while it waits


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook: status is "done", "failed", "stopped" or "not started"."""

    stem: str
    status: str
    seconds: float = 0.0
    message: str = ""


def check(profile: str, *, only: str | None = None) -> Path:
    """Checks what can be checked with nothing installed; returns the folder for the executed notebooks.

    Raises `SatlibError` for an unknown profile or notebook, a folder that cannot be written, a full disk, and
    a data root that is not there.
    """
    profiles.profile_path(profile)
    profiles.select(only)
    root = project_root()
    folder = root / "notebooks" / "executed" / profile
    for target in (folder, root / "figures" / profile, root / "data"):
        try:
            target.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=target):
                pass
        except OSError as error:
            raise SatlibError(f"cannot write to {target} ({error.strerror}); make it writable") from error
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        raise SatlibError(f"{free / 1e9:.1f} GB free on the disk of {folder}, expected 1 GB; free some space")
    if os.environ.get("SATLIB_DATA") and not data_root().is_dir():
        raise SatlibError(f"SATLIB_DATA is {data_root()}, expected a folder; set it to that of the data sets")
    return folder


def run(profile: str, *, only: str | None = None, deadline: float | None = None, force: bool = False) -> int:
    """Executes the notebooks of `profile` (or those of them in `only`: "04,06") and prints paper vs ours.

    `deadline` (seconds since the epoch): no notebook starts after it. `force`: compute again what is known.
    Returns the exit status: 0 if every notebook ran, 1 if one failed, 3 if the time was spent before the end.
    Raises `SatlibError`, before anything runs, for a request that cannot be met: see `check`, and unknown or
    mistyped parameters, missing or damaged data, missing packages.
    """
    _require_packages()
    folder = check(profile, only=only)
    settings = profiles.load(profile)
    declared = {stem: profiles.declared(path) for stem, path in profiles.notebook_paths().items()}
    profiles.check_common(settings, declared)
    given = {stem: profiles.parameters_for(settings, stem, declared[stem]) for stem in declared}
    parameters = {stem: profiles.changed(given[stem], declared[stem]) for stem in declared}
    selected = profiles.select(only)
    _require_data(settings, [_dataset(declared[stem], parameters[stem]) for stem in selected])

    timings = Timings(folder / "timings.json")
    print(f"satlib: profile {profile}: {settings.description} ({settings.time})", flush=True)
    outcomes, pages = [], {}
    # Kernels work in processes of their own: pages, and what the table at the end imports, are ready meanwhile.
    with (
        ThreadPoolExecutor(1) as meanwhile,
        _kernel(deadline, force),
        _Kernels(len(selected)) as kernels,
        NotebookProgress(list(selected), timings) as progress,
    ):
        results = meanwhile.submit(importlib.import_module, "satlib.study.results")
        for stem, path in selected.items():
            if deadline is not None and time.time() >= deadline:
                outcomes.append(Outcome(stem, "not started", message="the time was spent"))
                continue
            progress.start(stem, path)
            outcome = _execute(path, folder / path.name, parameters[stem], kernels, progress)
            progress.end(outcome.status, outcome.message)
            if outcome.status == "done":
                timings.record(stem, outcome.seconds)
            outcomes.append(outcome)
            pages[stem] = meanwhile.submit(_write_pages, folder / path.name, path.parent, profile)
    outcomes = [_with_page(outcome, pages) for outcome in outcomes]
    _print_summary(outcomes, folder)
    print(f"Report: {_write_index(settings)}", flush=True)
    print(results.result().table(profile), flush=True)
    statuses = {outcome.status for outcome in outcomes}
    return 1 if "failed" in statuses else 0 if statuses == {"done"} else 3


def _require_packages() -> None:
    for name in ("papermill", "nbconvert", "ipykernel", "latex2mathml"):
        if importlib.util.find_spec(name) is None:
            raise SatlibError(
                f"executing notebooks needs {name}, which is not installed; call ./run_all.sh, which sets it up, "
                "or install satlib[notebooks]"
            )


def _dataset(declared: dict[str, profiles.Parameter], given: dict[str, object]) -> object:
    """The data set that a notebook is told to use by its parameter `dataset`, if it has one."""
    return given.get("dataset", declared["dataset"].default) if "dataset" in declared else None


def _require_data(profile: profiles.Profile, used: list[object]) -> None:
    """Raises `SatlibError` for a missing or damaged data set, which each notebook would else find out alone.

    `used`: the values of the notebooks' parameter `dataset`. What has to be decoded is decoded here, with a
    progress bar, and kept for the notebooks.
    """
    for name in sorted({name for name in used if isinstance(name, str)}):
        if name.partition(":")[0] not in profile.datasets:
            raise SatlibError(f"{profile.path}: a notebook uses {name!r}, which `datasets` does not list")
        if name not in profiles.EMBEDDED:
            from satlib import data

            data.load(name)


@contextlib.contextmanager
def _kernel(deadline: float | None, force: bool) -> Iterator[None]:
    """A kernel named `KERNEL` that is this Python with this satlib, known to this process only."""
    here = str(Path(__file__).resolve().parents[2])
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))}
    if deadline is not None:
        environment["SATLIB_DEADLINE"] = repr(deadline)
    if force:
        environment["SATLIB_FORCE"] = repr(time.time())
    imports = [*PRELOAD, "ipykernel.kernelapp"]
    code = f"import {', '.join(imports)}; ipykernel.kernelapp.launch_new_instance()"
    command = [sys.executable, "-Xfrozen_modules=off", "-c", code, "-f", "{connection_file}"]
    # No warning about encryption, no traceback of its end by Ctrl-C, no history of what the notebooks did.
    command += ["--IPKernelApp.log_level=CRITICAL", "--HistoryManager.hist_file=:memory:"]
    specification = {"argv": command, "display_name": KERNEL, "language": "python", "env": environment}
    before = os.environ.get("JUPYTER_PATH")
    with tempfile.TemporaryDirectory(prefix="satlib-") as folder:
        target = Path(folder, "kernels", KERNEL, "kernel.json")
        target.parent.mkdir(parents=True)
        target.write_text(json.dumps(specification))
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [folder, before]))
        try:
            yield
        finally:
            if before is None:
                del os.environ["JUPYTER_PATH"]
            else:
                os.environ["JUPYTER_PATH"] = before


class _Kernels:
    """Running kernels, each started one notebook ahead: when its turn comes, its imports are done.

    count: how many will be asked for. Used in `with`, at whose end none is left.
    """

    def __init__(self, count: int) -> None:
        self._left = count
        self._running: list[AsyncKernelManager] = []

    def __enter__(self) -> "_Kernels":
        return self

    def __exit__(self, *error: object) -> None:
        while self._running:
            self._stop()

    @contextlib.contextmanager
    def next(self) -> Iterator["AsyncKernelManager"]:
        """A kernel for the next notebook."""
        while self._left and len(self._running) < 2:
            self._start()
        try:
            yield self._running[0]
        finally:
            self._stop()

    def _start(self) -> None:
        from jupyter_client import AsyncKernelManager
        from jupyter_core.utils import run_sync

        manager = AsyncKernelManager(kernel_name=KERNEL)
        run_sync(manager.start_kernel)(cwd=str(project_root() / "notebooks"))
        self._running.append(manager)
        self._left -= 1

    def _stop(self) -> None:
        from jupyter_core.utils import run_sync

        run_sync(self._running.pop(0).shutdown_kernel)(now=True)


def _execute(
    source: Path, target: Path, parameters: dict[str, object], kernels: _Kernels, progress: NotebookProgress
) -> Outcome:
    """Executes one notebook. Whatever goes wrong in it is its outcome, so that the others still run."""
    start, status, message = time.monotonic(), "done", ""
    import papermill

    # It looks for names in the last cell of parameters alone and would warn of all others; ours are checked.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        with kernels.next() as kernel:
            papermill.execute_notebook(
                source,
                target,
                parameters,
                kernel_name=KERNEL,
                km=kernel,
                progress_bar=False,
                stdout_file=progress,
                on_cell_start=progress.cell,
            )
    except papermill.PapermillExecutionError as error:
        status = "stopped" if error.ename == BUDGET_STOP else "failed"
        message = f"{error.ename}: {(error.evalue.strip().splitlines() or [''])[-1]}"
    except Exception as error:  # the kernel died, the disk is full
        status, message = "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Outcome(source.stem, status, time.monotonic() - start, message)


def _write_index(profile: profiles.Profile) -> Path:
    from satlib.study import report

    return report.write_index(profile)


def _write_pages(notebook: Path, folder: Path, profile: str) -> str:
    """Writes the HTML page beside the executed notebook, and that of the report; what went wrong, or nothing."""
    from satlib.study import export, report

    try:
        export.write_html(notebook, notebook.with_suffix(".html"), folder=folder)
        in_report = report.folder_of(profile) / f"{notebook.stem}.html"
        export.write_html(notebook, in_report, folder=folder, contents="index.html")
    except (SatlibError, OSError) as error:
        return f"no HTML page: {error}"
    return ""


def _with_page(outcome: Outcome, pages: dict[str, Future[str]]) -> Outcome:
    """The outcome of a notebook with that of its page: without one it has failed."""
    problem = pages[outcome.stem].result() if outcome.stem in pages else ""
    return replace(outcome, status="failed", message=outcome.message or problem) if problem else outcome


def _print_summary(outcomes: list[Outcome], folder: Path) -> None:
    width = max(len(outcome.stem) for outcome in outcomes)
    print(f"\nExecuted notebooks and pages: {folder}")
    for outcome in outcomes:
        time_taken = duration(outcome.seconds) if outcome.seconds else ""
        print(f"  {outcome.stem:{width}}  {outcome.status:11}  {time_taken:>12}  {outcome.message}".rstrip())
    print(flush=True)
