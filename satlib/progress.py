"""Text for terminals; progress of long work: one line written anew for a person, now and then a line in a log."""

import sys
import time
from collections.abc import Sequence
from typing import TextIO


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, each column as wide as it needs."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


class Progress:
    """Writes progress to `stream` (by default stdout); in a log an update at most every `seconds`."""

    def __init__(self, stream: TextIO | None = None, *, seconds: float = 10.0) -> None:
        self.stream = stream or sys.stdout
        self.seconds = seconds
        self._last = time.monotonic()
        self._width = 0  # of what stands in the line that is written anew

    def line(self, text: str) -> None:
        """A line that stays."""
        self._write(text, "\n")
        self._width = 0
        self._last = time.monotonic()

    def update(self, text: str) -> None:
        """Where the work is now; replaces the last update for a person, and is thinned out in a log."""
        if self.stream.isatty():
            self._write(text, "")
            self._width = len(text)
        elif time.monotonic() - self._last >= self.seconds:
            self.line(text)

    def _write(self, text: str, end: str) -> None:
        start = "\r" if self._width else ""
        print(f"{start}{text:{self._width}}", end=end, file=self.stream, flush=True)
