"""Executes the notebooks under a profile with papermill and tells how far they are.

Each is executed by this very Python, in the notebooks' folder, into `notebooks/executed/<profile>/`, as a notebook and
as an HTML page. Its kernel finds in its environment, in seconds since the epoch, `SATLIB_FORCE` if what was recorded
before is to be computed again, and `SATLIB_DEADLINE` if the time is limited: its code raises `BudgetSpent` then.

A request is checked before anything is installed: what lies outside the standard library is imported when it is used.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from satlib.errors import SatlibError
from satlib.paths import data_root, project_root, select_notebooks
from satlib.progress import duration
from satlib.study import settings

MIN_FREE_BYTES = 1e9
BUDGET_STOP = "BudgetSpent"  # name of the exception by which a notebook's code says that the time is up
EVERY_SECONDS = 10.0
MARK = "[run"  # lines of a notebook's output that start with this are shown while it runs


class Outcome(NamedTuple):
    """What became of one notebook: it is "done", "failed", "stopped" or "not started"."""

    status: str
    message: str = ""
    seconds: float = 0.0


def check(profile: str, *, only: str | None = None) -> Path:
    """Checks what can be checked with nothing installed; returns the folder for the executed notebooks.

    Raises `SatlibError` for an unknown profile or notebook, a folder that cannot be written, a full disk, and
    a data root that is not there.
    """
    settings.profile_path(profile)
    select_notebooks(only)
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
    Raises `SatlibError`, before anything runs, for a request that cannot be met: see `check`, and settings that are
    unknown or mistyped, missing or damaged data, missing packages.
    """
    for name in ("papermill", "nbconvert", "ipykernel", "latex2mathml"):
        if importlib.util.find_spec(name) is None:
            raise SatlibError(
                f"executing notebooks needs {name}, which is not installed; call ./run_all.sh, which sets it up, "
                "or install satlib[notebooks]"
            )
    folder, selected = check(profile, only=only), select_notebooks(only)
    from satlib import data

    stated = settings.load(profile)
    for name in settings.datasets(profile, selected):
        if not data.is_embedded(name):
            data.load(name)  # each notebook would find out alone what is missing; what is decoded is kept for them
    print(f"satlib: profile {profile}: {stated.description} ({stated.time})", flush=True)
    outcomes, pages = {}, {}
    # Kernels work in processes of their own: pages are written meanwhile.
    with ThreadPoolExecutor(1) as writer, NotebookProgress(list(selected), folder / "timings.json") as progress:
        kernels = _kernels(deadline, force)
        for stem, path in selected.items():
            if deadline is not None and time.time() >= deadline:
                outcomes[stem] = Outcome("not started", "the time was spent")
                continue
            outcomes[stem] = _execute(path, folder / path.name, profile, kernels, progress)
            pages[stem] = writer.submit(_write_pages, folder / path.name, path.parent, profile)
    for stem, page in pages.items():
        if problem := page.result():
            _, message, seconds = outcomes[stem]
            outcomes[stem] = Outcome("failed", message or problem, seconds)
    from satlib.study import report, results

    print(f"\nExecuted notebooks and pages: {folder}")
    width = max(map(len, outcomes))
    for stem, (status, message, seconds) in outcomes.items():
        print(f"  {stem:{width}}  {status:11}  {duration(seconds) if seconds else '':>12}  {message}".rstrip())
    print(f"\nReport: {report.write_index(profile, stated.description)}", flush=True)
    print(results.table(profile), flush=True)
    statuses = {outcome.status for outcome in outcomes.values()}
    return 1 if "failed" in statuses else 0 if statuses == {"done"} else 3


def _kernels(deadline: float | None, force: bool) -> type:
    """The class of the notebooks' kernels: this Python with this satlib, whatever kernels are installed here."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    satlib = str(Path(__file__).resolve().parents[2])
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [satlib, os.environ.get("PYTHONPATH")]))}
    if deadline is not None:
        environment["SATLIB_DEADLINE"] = repr(deadline)
    if force:
        environment["SATLIB_FORCE"] = repr(time.time())
    command = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    command.append("--IPKernelApp.log_level=CRITICAL")  # no warning about encryption
    specification = KernelSpec(argv=command, env=environment, language="python", display_name="satlib")
    return type("Kernels", (AsyncKernelManager,), {"kernel_spec": specification})


def _execute(source: Path, target: Path, profile: str, kernels: type, progress: "NotebookProgress") -> Outcome:
    """Executes one notebook. Whatever goes wrong in it is its outcome, so that the others still run."""
    import papermill

    progress.start(source)
    status, message = "done", ""
    try:
        papermill.execute_notebook(
            source,
            target,
            {"profile": profile},
            cwd=source.parent,
            kernel_name="python3",
            kernel_manager_class=kernels,
            shutdown_kernel="immediate",
            progress_bar=False,
            stdout_file=progress,
            on_cell_start=progress.cell,
        )
    except papermill.PapermillExecutionError as error:
        status = "stopped" if error.ename == BUDGET_STOP else "failed"
        message = f"{error.ename}: {(error.evalue.strip().splitlines() or [''])[-1]}"
    except Exception as error:  # the kernel died, the disk is full
        status, message = "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
    return progress.end(status, message)


def _write_pages(notebook: Path, folder: Path, profile: str) -> str:
    """Writes the HTML page beside the executed notebook, and that of the report; what went wrong, or nothing."""
    from satlib.study import export, report

    page = notebook.with_suffix(".html")
    try:
        export.write_html(notebook, page, folder=folder)
        export.write_html(notebook, report.folder_of(profile) / page.name, folder=folder, contents="index.html")
    except (SatlibError, OSError) as error:
        return f"no HTML page: {error}"
    return ""


class NotebookProgress:
    """Prints where the execution of the notebooks `stems` is: at each start and end, and every few seconds in between.

    For papermill it is the file for a notebook's output, and `cell` the hook for each cell. The JSON file `timings`
    keeps how many seconds each notebook took when it was last executed under the profile.
    """

    def __init__(self, stems: list[str], timings: Path) -> None:
        self._stems, self._timings = stems, timings
        self.seconds: dict[str, float] = {}
        # None yet, or not readable: only estimates are lost.
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            self.seconds = {str(stem): float(value) for stem, value in json.loads(timings.read_text()).items()}
        self._stem = ""
        self._lock = threading.Lock()  # of what says which notebook is executed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "NotebookProgress":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def start(self, path: Path) -> None:
        """The notebook at `path` starts."""
        self._cells = sum(cell["cell_type"] == "code" for cell in json.loads(path.read_text())["cells"])
        self._cell, self._heading, self._text = 0, "", ""
        self._started, self._stem = time.monotonic(), path.stem
        last = self.seconds.get(path.stem)
        self._print("starts" + (f"; last time it took {duration(last)}" if last is not None else ""))

    def end(self, status: str, message: str = "") -> Outcome:
        """The notebook that was started has come to its end; its time is kept if it was executed whole."""
        seconds = time.monotonic() - self._started
        with self._lock:
            self._print(f"{status} after {duration(seconds)}{message and ': '}{message}")
            stem, self._stem = self._stem, ""
        if status == "done":
            from satlib.files import write_text

            self.seconds[stem] = round(seconds, 1)
            write_text(self._timings, json.dumps(self.seconds, indent=1))
        return Outcome(status, message, seconds)

    def cell(self, cell: Any, cell_index: int) -> None:
        """A cell starts: a heading names those that follow it."""
        if cell.cell_type == "code":
            self._cell += "injected-parameters" not in cell.metadata.get("tags", [])
        for line in cell.source.splitlines() if cell.cell_type == "markdown" else ():
            if line.startswith("#"):
                self._heading = line.lstrip("# ")

    def write(self, text: str) -> None:
        """A piece of the notebook's output; whole lines that start with `MARK` are shown."""
        *lines, self._text = (self._text + text).replace("\r", "\n").split("\n")
        for line in lines:
            if line.startswith(MARK):
                print(f"  {line}", flush=True)

    def flush(self) -> None:
        """Part of what papermill expects of a file; lines are shown as they come."""

    def left(self) -> str:
        """What is left by the last execution's times, or that it is not known."""
        current, *waiting = self._stems[self._stems.index(self._stem) :]
        last, elapsed = self.seconds.get(current), time.monotonic() - self._started
        if last is not None and elapsed > last:
            more = f", and {len(waiting)} more after this" if waiting else ""
            return f"longer than last time ({duration(last)}){more}"
        known = [self.seconds[stem] for stem in waiting if stem in self.seconds]
        known += [] if last is None else [last - elapsed]
        if not known:
            return "time left unknown: not timed yet"
        if unknown := len(waiting) + 1 - len(known):
            return f"at least {duration(sum(known))} left ({unknown} not timed yet)"
        return f"about {duration(sum(known))} left, if it takes as long as last time"

    def _tick(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            with self._lock, contextlib.suppress(BrokenPipeError):  # which the main thread meets as well
                if self._stem:
                    where = f"cell {self._cell} of {self._cells}" + (f", {self._heading!r}" if self._heading else "")
                    self._print(f"{where}, {duration(time.monotonic() - self._started)} in; {self.left()}")

    def _print(self, text: str) -> None:
        print(f"[{self._stems.index(self._stem) + 1}/{len(self._stems)}] {self._stem}: {text}", flush=True)
