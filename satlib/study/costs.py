"""What the runs of a profile will cost here: from a probe of each network that is timed, and counts of the work."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd

from satlib import data
from satlib.device import device_name
from satlib.errors import SatlibError
from satlib.files import write_text
from satlib.paths import project_root
from satlib.progress import duration
from satlib.study.runs import Run, Runner


@dataclass
class Cost:
    """What is still to be computed for a section: runs, hours on one device, MB of weights on disk.

    speeds: attack passes (forward and backward, of one image) a second of each of its networks, as timed.
    """

    section: str
    device: str
    runs: int = 0
    hours: float = 0.0
    weights_mb: float = 0.0
    speeds: list[float] = field(default_factory=list)


def estimate(runner: Runner, runs: Iterable[Run]) -> tuple[list[str], list[Cost]]:
    """A line for every run of the plan, in its order, and what each section will cost.

    Of a data set that is not here, noise of its geometry is timed, and nothing is looked up; a line says so.
    """
    runs = list(runs)
    lines, costs = [], {}
    for dataset in dict.fromkeys(each.dataset for run in runs for each in run.ancestry()):
        try:
            runner.splits(dataset)
        except SatlibError as error:
            if (noise := data.dummy_data(dataset)) is None:
                raise
            runner.use(dataset, noise)
            lines.append(f"{dataset}: not here, so that none of its records can be looked up: {error}")
    waiting = runner.todo(runs)
    for key, run in runner.by_id(runs).items():
        state = "done"
        if key in waiting:
            speed = runner.passes_per_second(run)
            section = str(run.labels["section"])
            cost = costs.setdefault(section, Cost(section, device_name()))
            cost.runs += 1
            cost.hours += run.cost / speed / 3600
            cost.weights_mb += weight_bytes(runner, run) / 1e6
            cost.speeds = sorted({*cost.speeds, float(f"{speed:.3g}")})
            state = f"about {duration(run.cost / speed)}"
        lines.append(f"{key[:12]}  {state:20}  {run.kind:22}  {run.title}")
    return lines, list(costs.values())


def weight_bytes(runner: Runner, run: Run) -> int:
    """Bytes that the weights of a training take; 0 of other runs."""
    if not run.is_training:
        return 0
    until, epochs = run.settings["until"], run.settings["training"]["epochs"]
    copies = 1 if until in (None, epochs) else 3  # with both of Adam's means, for the next part to go on with
    return copies * sum(tensor.nbytes for tensor in runner.new_model(run).state_dict().values())


def write(path: Path, costs: Iterable[Cost]) -> None:
    """The estimate as JSON."""
    write_text(path, json.dumps([asdict(cost) for cost in costs], indent=1) + "\n")


def table(profile: str) -> pd.DataFrame:
    """The published estimates for a profile, `data/ledger/bench/costs-PROFILE-*.json`, by device and section."""
    names = ["device", "section", "runs", "hours", "weights (GB)", "timed: attack passes a second"]
    rows = []
    for path in sorted((project_root() / "data" / "ledger" / "bench").glob(f"costs-{profile}-*.json")):
        costs = [Cost(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
        sums = (sum(getattr(cost, name) for cost in costs) for name in ("runs", "hours", "weights_mb"))
        for cost in (*costs, Cost("all", costs[0].device, *sums)):
            speeds = ", ".join(f"{speed:,g}" for speed in sorted(cost.speeds))
            sizes = (f"{cost.runs:,}", f"{cost.hours:,.1f}", f"{cost.weights_mb / 1000:,.1f}")
            rows.append((cost.device, cost.section, *sizes, speeds))
    return pd.DataFrame(rows, columns=names)
