"""Speed: ours against torchattacks, Foolbox and ART, in one process, on the same model and data.

`rows` measures, `peers` calls the others as their documentation shows, `race` has the model and the clock. Timings are
no tests; what every fast path computes is held by tests.
"""

import json
import platform
import time
from dataclasses import asdict
from pathlib import Path

import torch

from satlib import files
from satlib.bench.race import Bench, Row
from satlib.bench.rows import ROWS
from satlib.errors import SatlibError

__all__ = ["Bench", "Row", "run", "table", "write"]


def run(
    *, only: str | None = None, device: str | None = None, repeats: int = 3, path: Path | None = None
) -> tuple[list[Row], dict]:
    """Measures the rows (all, or those of `only`: "a,c"), each told when it is done: (rows, what was measured on).

    path: a JSON file of the rows, written anew after each, so that a kill loses the row in progress alone. Raises
    SatlibError for an unknown row, before anything is measured.
    """
    wanted = list(ROWS) if only is None else [name.strip() for name in only.split(",")]
    for name in wanted:
        if name not in ROWS:
            raise SatlibError(f"--only {name}: expected some of {', '.join(ROWS)}")
    if repeats < 1:
        raise SatlibError(f"--repeats {repeats}: expected at least 1")
    bench, found = Bench(device=device, repeats=repeats), []
    for name in wanted:
        start = time.monotonic()
        found += ROWS[name](bench)
        if path:
            write(path, found)
        print(f"[bench] {name}: {ROWS[name].__doc__} ({time.monotonic() - start:.0f} s)", flush=True)
    where = {"device": bench.name, "platform": platform.platform(), "versions": {"torch": str(torch.__version__)}}
    return found, where | {"repeats": repeats}


def table(rows: list[Row]) -> str:
    """The rows as text."""

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

    cells = [("row", "what", "ours", "peer", "unit", "ratio", "peer is")]
    for r in rows:
        ratio = "-" if r.ratio is None else f"{r.ratio:.2f}x"
        cells.append(
            (r.row, r.what, f"{shown(r.ours)} ±{shown(r.spread / 2)}", shown(r.peer), r.unit, ratio, r.peer_name)
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    notes = [f"{r.row} ({r.what}): {r.note}" for r in rows if r.note]
    return "\n".join([*lines, "", *notes])


def write(path: Path, rows: list[Row]) -> None:
    """The rows as a JSON list of objects, numbers as numbers; the file appears when it is complete."""
    with files.writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        part.replace(path)
