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

from satlib.bench.race import Bench, Row
from satlib.bench.rows import ROWS
from satlib.errors import SatlibError
from satlib.files import write_text
from satlib.progress import aligned

__all__ = ["Bench", "Row", "run", "table"]


def run(*, only: str | None = None, device: str | None = None, repeats: int = 3, path: Path | None = None) -> str:
    """Measures the rows (all, or those of `only`: "a,c"), each told when it is done; returns them as text.

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
            write_text(path, json.dumps([asdict(row) for row in found], indent=1) + "\n")
        print(f"[bench] {name}: {ROWS[name].__doc__} ({time.monotonic() - start:.0f} s)", flush=True)
    return f"\n{bench.name}; PyTorch {torch.__version__}; {platform.platform()}\n\n{table(found)}"


def table(rows: list[Row]) -> str:
    """The rows as text."""

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

    cells = [("row", "what", "ours", "peer", "unit", "ratio", "peer is")]
    for r in rows:
        ratio = "-" if r.ratio is None else f"{r.ratio:.2f}x"
        ours = f"{shown(r.ours)} ±{shown(r.spread / 2)}"
        cells.append((r.row, r.what, ours, shown(r.peer), r.unit, ratio, r.peer_name))
    return "\n".join([aligned(cells), "", *(f"{r.row} ({r.what}): {r.note}" for r in rows if r.note)])
