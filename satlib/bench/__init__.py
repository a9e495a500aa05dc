"""Speed: ours against torchattacks, Foolbox and ART, in one process, on the same model and data.

`rows` measures, `peers` calls the others as their documentation shows. Here is what all rows share: a trained model,
the clock, and the table. Timings are no tests; what every fast path computes is held by tests.
"""

import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from satlib import files
from satlib.data import Splits
from satlib.device import autocast, fastest_dtype
from satlib.errors import SatlibError
from satlib.paper import Cifar10
from satlib.study import experiments
from satlib.study.provenance import device_name, provenance
from satlib.study.runs import Runner


@dataclass(frozen=True)
class Row:
    """One comparison. ours and peer are medians in `unit`; ratio is how many times better ours is (above 1: better).

    peer is None where nothing of the kind exists or is installed; spread is the range of our repeats, in `unit`.
    """

    row: str
    what: str
    ours: float
    peer: float | None
    peer_name: str
    unit: str
    ratio: float | None
    spread: float
    device: str
    note: str = ""


class Bench:
    """A device with a model trained on the embedded images, and how to time things there.

    On a CPU the network is ResNet-20 of width 16, on CUDA the paper's (width 64). Training is a run of the ledger.
    """

    def __init__(self, *, device: str | None = None, repeats: int = 3) -> None:
        self.runner = Runner(profile="bench", device=device)
        self.device, self.repeats, self.progress = self.runner.device, repeats, self.runner.progress
        self.on_cuda = self.device.type == "cuda"
        threads = "" if self.on_cuda else f", {torch.get_num_threads()} threads"
        self.name = (torch.cuda.get_device_name() if self.on_cuda else device_name()) + threads
        self.settings = Cifar10(
            dataset="shapes32",
            width=64 if self.on_cuda else 16,
            erm_epochs=6,
            erm_batch_size=64,
            erm_learning_rate=0.2,
            erm_schedule="one-cycle",
        )

    @functools.cached_property
    def splits(self) -> Splits:
        return self.runner.splits(self.settings.dataset)

    @functools.cached_property
    def model(self) -> nn.Module:
        return self.runner.model(experiments.erm_run(self.settings))

    def seconds(self, function: Callable[[], object]) -> float:
        """Wall time of one call, with all work on the device done."""
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def race(self, functions: Mapping[str, Callable[[], object]], *, warm_up: bool = True) -> dict[str, list[float]]:
        """Seconds of every function, `repeats` of each, in turn: a slow moment of the machine meets all of them."""
        taken: dict[str, list[float]] = {name: [] for name in functions}
        if warm_up:
            for function in functions.values():
                function()
        for _ in range(self.repeats):
            for name, function in functions.items():
                taken[name].append(self.seconds(function))
                self.progress.update(f"[bench] {name}: {taken[name][-1]:.2f} s")
        return taken

    def row(
        self,
        row: str,
        *,
        what: str,
        unit: str,
        ours: list[float],
        peer: list[float] | None,
        peer_name: str,
        more_is_better: bool,
        note: str,
    ) -> Row:
        """A row from repeated measurements, by their medians."""
        mine, other = statistics.median(ours), statistics.median(peer) if peer else None
        below, above = (other, mine) if more_is_better else (mine, other)
        ratio = above / below if above is not None and below else None
        return Row(row, what, mine, other, peer_name, unit, ratio, max(ours) - min(ours), self.name, note)

    @functools.cached_property
    def peak(self) -> float:
        """FLOP/s of a large matrix product in the format that convolutions use here: what the hardware can do."""
        size = 8192 if self.on_cuda else 2048
        a, b = (torch.randn(size, size, device=self.device, dtype=fastest_dtype(self.device.type)) for _ in range(2))
        a @ b
        return 2 * size**3 / min(self.seconds(lambda: a @ b) for _ in range(10))

    def share_of_peak(self, function: Callable[[], object], seconds: float) -> str:
        """How much of the peak a call reaches that takes `seconds`, counting the FLOPs of its matrix products."""
        with FlopCounterMode(display=False) as counter, autocast(self.device):
            function()
        share = counter.get_total_flops() / seconds / self.peak
        return f"{share:.0%} of the {self.peak / 1e12:.2f} TFLOP/s that a large matrix product reaches here"


def run(
    *, only: str | None = None, device: str | None = None, repeats: int = 3, path: Path | None = None
) -> tuple[list[Row], dict]:
    """Measures the rows (all, or those of `only`: "a,c"), each told when it is done: (rows, what was measured on).

    path: a JSON file of the rows, written anew after each, so that a kill loses the row in progress alone. Raises
    SatlibError for an unknown row, before anything is measured.
    """
    from satlib.bench.rows import ROWS

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
    return found, provenance() | {"device": bench.name, "platform": platform.platform(), "repeats": repeats}


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
