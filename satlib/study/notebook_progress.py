"""How far the execution of the notebooks is, in lines for a person or a log, and what is left of it."""

import contextlib
import json
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from satlib.progress import duration

EVERY_SECONDS = 10.0
MARK = "[run"  # lines of a notebook's output that start with this are shown while it runs


class Timings:
    """Seconds that each notebook took when it was last executed under this profile, kept in a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}
        # None yet, or not readable: only estimates are lost.
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            self.seconds = {str(stem): float(value) for stem, value in json.loads(path.read_text()).items()}

    def record(self, stem: str, seconds: float) -> None:
        """Keep the time of the notebook `stem`."""
        self.seconds[stem] = round(seconds, 1)
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.seconds, indent=1))
        temporary.replace(self.path)


class NotebookProgress:
    """Prints where the execution is: at each start and end, and every few seconds in between.

    Passed to papermill as the file for a notebook's output, and its method `cell` as the hook for each cell.
    """

    def __init__(self, stems: list[str], timings: Timings) -> None:
        self._stems, self._timings = stems, timings
        self._stem = ""
        self._lock = threading.Lock()  # of what says which notebook is executed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "NotebookProgress":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def start(self, stem: str, path: Path) -> None:
        """The notebook `stem` at `path` starts."""
        self._cells = sum(cell["cell_type"] == "code" for cell in json.loads(path.read_text())["cells"])
        self._cell, self._heading, self._text = 0, "", ""
        self._started, self._stem = time.monotonic(), stem
        known = self._timings.seconds.get(stem)
        self._say("starts" + (f"; last time it took {duration(known)}" if known is not None else ""))

    def end(self, status: str, message: str) -> None:
        """The notebook that was started has come to its end."""
        with self._lock:
            self._say(f"{status} after {duration(time.monotonic() - self._started)}{message and ': '}{message}")
            self._stem = ""

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
        last, elapsed = self._timings.seconds, time.monotonic() - self._started
        waiting = self._stems[self._stems.index(self._stem) + 1 :]
        unknown = [stem for stem in [self._stem, *waiting] if stem not in last]
        seconds = max(0.0, last.get(self._stem, 0.0) - elapsed) + sum(last.get(stem, 0.0) for stem in waiting)
        if elapsed > last.get(self._stem, elapsed):
            more = f", and {len(waiting)} more after this" if waiting else ""
            return f"longer than last time ({duration(last[self._stem])}){more}"
        if not unknown:
            return f"about {duration(seconds)} left, if it takes as long as last time"
        if seconds:
            return f"at least {duration(seconds)} left ({len(unknown)} not timed yet)"
        return "time left unknown: not timed yet"

    def _tick(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            with self._lock, contextlib.suppress(BrokenPipeError):  # which the main thread meets as well
                if self._stem:
                    where = f"cell {self._cell} of {self._cells}" + (f", {self._heading!r}" if self._heading else "")
                    self._say(f"{where}, {duration(time.monotonic() - self._started)} in; {self.left()}")

    def _say(self, text: str) -> None:
        number = self._stems.index(self._stem) + 1
        print(f"[{number}/{len(self._stems)}] {self._stem}: {text}", flush=True)
