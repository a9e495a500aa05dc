"""The command line: `python -m satlib COMMAND`. What a command needs is imported only when it runs."""

import argparse
import inspect
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from satlib.errors import SatlibError

if TYPE_CHECKING:
    from satlib.study.runs import Run, Runner


def budget(text: str) -> float:
    """Seconds in `9m`, `90s`, `1.5h` or `1h30m`, for options that limit the time."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", text)
    seconds = sum(float(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; expected for example 9m, 90s or 1h30m")
    return seconds


def _deadline(text: str) -> float:
    """When the budget is spent, in seconds since the epoch; set-up by a script counts as well."""
    return float(os.environ.get("SATLIB_STARTED", time.time())) + budget(text)


# --- how a function becomes a command

_Option = tuple[str, dict[str, Any]]  # name, settings for argparse
_Function = Callable[..., int | None]
_COMMANDS: dict[str, tuple[_Function, tuple[_Option | str, ...]]] = {}


def _option(name: str, **settings: Any) -> _Option:
    return name, settings


def _command(name: str, *options: _Option | str) -> Callable[[_Function], _Function]:
    """Makes a function a command with these options, those after a title in a group of their own.

    Its docstring is what --help says. It gets the options by name, and returns the exit status, None for 0.
    """

    def register(function: _Function) -> _Function:
        _COMMANDS[name] = function, options
        return function

    return register


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise SatlibError(f"{message}; --help shows what there is")


def _parser() -> _Parser:
    parser = _Parser(prog="python -m satlib", description="Shared adversarial training, reproduced step by step.")
    commands = {"": parser.add_subparsers(title="commands", metavar="COMMAND", required=True)}
    for name, (function, options) in _COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if group not in commands:
            within = commands[""].add_parser(group, help=_GROUPS[group])
            commands[group] = within.add_subparsers(title="actions", metavar="ACTION", required=True)
        title, _, description = inspect.cleandoc(function.__doc__ or "").partition("\n\n")
        place = command = commands[group].add_parser(
            word, help=title[:1].lower() + title[1:-1], description=description
        )
        command.set_defaults(function=function)
        for option in options:
            if isinstance(option, str):
                place = command.add_argument_group(option)
            else:
                place.add_argument(option[0], **option[1])
    return parser


_PROFILE = _option("--profile", default="quick", help="quick, laptop, gpu or paper (default: quick)")
_ONLY = _option("--only", metavar="04,06", help="only these notebooks, by number or name")
_TITLES = _option("--only", metavar="TEXT", default="", help="only trainings with TEXT in their titles")
_BUDGET = _option(
    "--budget", dest="deadline", type=_deadline, metavar="9m", help="stop cleanly before this time is spent"
)
_FORCE = _option("--force", action="store_true", help="compute again what is already known")
_CHECK = _option("--check", action="store_true", help="only check the request; needs nothing installed")
_DEVICE = _option("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
_JSON = {"dest": "path", "type": Path, "metavar": "FILE"}
_COUNT = {"type": int, "metavar": "N", "default": 1}
_GROUPS = {"ledger": "status of the records; pack, merge and publish them"}  # of commands, by their first word


@_command("run", _PROFILE, _ONLY, _BUDGET, _FORCE, _CHECK)
def _run(profile: str, only: str | None, deadline: float | None, force: bool, check: bool) -> int:
    """Execute the notebooks under a profile.

    Executes the notebooks under a profile, into notebooks/executed/PROFILE. Exit status: 0 if every notebook ran,
    1 if one failed, 2 for a request that cannot be met, 3 if the budget was spent before the end.
    """
    from satlib.study import notebooks

    if check:
        notebooks.check(profile, only=only)
        return 0
    return notebooks.run(profile, only=only, deadline=deadline, force=force)


@_command(
    "sweep",
    *(_PROFILE, _ONLY, _BUDGET, _FORCE),
    _option("--dry-run", action="store_true", help="only list the runs, with time (from a measured probe) and disk"),
    _option("--json", **_JSON, help="of a dry run: write what each section costs to FILE"),
    _DEVICE,
    "on a cluster (extra `cluster`)",
    _option("--on", choices=("here", "ray"), default="here", help="in this process (default), or on Ray"),
    _option("--address", metavar="auto|[ray://]HOST:PORT", help="the cluster (default: the one at hand)"),
    _option("--gpus-per-run", dest="gpus", type=float, metavar="0.25", help="default: 1 where the cluster has GPUs"),
    _option("--cpus-per-run", dest="cpus", **_COUNT, help="default: 1"),
    _option("--ranks", **_COUNT, help="trainings on larger images: by torchrun on N GPUs of a node"),
    _option(
        "--scratch", type=Path, metavar="DIR", help="for nodes without this folder: where they keep records meanwhile"
    ),
)
def _sweep(
    profile: str,
    only: str | None,
    deadline: float | None,
    force: bool,
    dry_run: bool,
    path: Path | None,
    device: str | None,
    on: str,
    **of_cluster: Any,
) -> int:
    """Carry out a profile's runs without notebooks.

    Carries out the runs of a profile that have no record yet, most important first. Needs no Jupyter. Exit status:
    0 when all are done, 1 when some failed, 3 when the budget was spent before; the next call goes on.
    """
    from satlib.paths import select_notebooks
    from satlib.study import cluster, measurements
    from satlib.study.runs import BudgetSpent, Runner

    options = cluster.Options(device=device, **of_cluster)
    if on == "here" and options != cluster.Options(device=device):
        raise SatlibError("--address, --gpus-per-run, --cpus-per-run, --ranks and --scratch are for --on ray")
    if force and options.scratch:
        raise SatlibError(
            "--force --scratch: a record that comes back never replaces one that is here; drop one of them"
        )
    if path and not dry_run:
        raise SatlibError("--json is for --dry-run; `python -m satlib results --json` writes results")
    runs = measurements.profile_runs(profile, only=select_notebooks(only) if only else None)
    alone = on == "here" or dry_run  # the driver of a cluster only looks after it
    runner = Runner(profile=profile, device=device if alone else "cpu", force=force, deadline=deadline)
    if dry_run:
        _dry_run(runner, runs, path)
        return 0
    failed: list[Run] = []
    stopped = False
    try:
        if on == "ray":
            state = cluster.sweep(runner, runs, options)
            failed, stopped = list(state.failed.values()), state.stopped
        else:
            runner.carry_out(runs, failed=failed.append)
    except BudgetSpent:
        stopped = True
    left = len(runner.todo(runs)) if stopped else 0
    if left:
        print(f"budget spent: {left} runs are left; the same call goes on from here")
    elif failed:
        print(f"{len(failed)} runs have no record; see {runner.ledger.root / 'failed'}; the same call tries them again")
    else:
        print(f"all runs of{f' {only} in' if only else ''} the profile {profile!r} have a record")
    return 1 if failed else 3 if left else 0


def _dry_run(runner: "Runner", runs: list["Run"], path: Path | None) -> None:
    """Every run of the plan in its order, with an estimate of its time from a measured probe of its model."""
    from satlib.device import device_name
    from satlib.study import costs

    lines, found = costs.estimate(runner, runs)
    print("\n".join(lines))
    for cost in found:
        speeds = ", ".join(f"{speed:,g}" for speed in sorted(cost.speeds))
        print(
            f"section {cost.section}: {cost.runs} runs, {cost.hours:,.1f} h, {cost.weights_mb:,.0f} MB of weights; "
            f"probe: {speeds} attack passes a second"
        )
    count, hours, weights = (sum(getattr(cost, name) for cost in found) for name in ("runs", "hours", "weights_mb"))
    print(f"{count} runs are waiting: about {hours:,.1f} h on {device_name()}; {weights:,.0f} MB of weights on disk")
    if path:
        costs.write(path, found)


@_command("train", _PROFILE, _TITLES, _BUDGET, _DEVICE)
def _train(profile: str, only: str, deadline: float | None, device: str | None) -> int:
    """Carry out trainings of a profile, on several GPUs or nodes by torchrun.

    Carries out the trainings of a profile that have no record yet, data-parallel under torchrun:
    `torchrun --nproc-per-node 2 -m satlib train --profile gpu`. The records are those of one process; rank 0 alone
    writes them, and the same call goes on from the last whole epoch. Evaluations, and the defences that train on one
    process only, are left to `sweep`. Exit status: 0; on one process 3 when the budget was spent before all was done.
    """
    from satlib import parallel
    from satlib.study import measurements
    from satlib.study.runs import BudgetSpent, Runner

    planned = (each for run in measurements.profile_runs(profile) for each in run.ancestry())
    chosen = [run for run in planned if run.is_training and only in run.title]
    if not chosen:
        raise SatlibError(f"--only {only!r}: no training of the profile {profile!r} is called so")
    with parallel.joined(device) as device:
        ranks = parallel.current_ranks()
        if ranks.count > 1:
            chosen = [run for run in chosen if not run.settings["defense"]]
        runner = Runner(profile=profile, device=device, deadline=deadline)
        runs = runner.by_id(chosen)
        try:
            runner.record_together(runs)
        except BudgetSpent:
            print("budget spent; the same call goes on from here")
            return 3 if ranks.count == 1 else 0  # torchrun would call any other status a failure
        if ranks.rank == 0:
            print(f"{len(runs)} trainings of the profile {profile!r} have a record")
    return 0


@_command(
    "results",
    _option("--profile", help="only this profile's (default: for each number the weightiest profile)"),
    _option("--json", dest="as_json", action="store_true", help="a list of rows; numbers as numbers, null for none"),
)
def _results(profile: str | None, as_json: bool) -> None:
    """The paper's numbers beside ours, from the records."""
    from satlib.study import results

    if as_json:
        print(json.dumps([asdict(row) for row in results.rows(profile)], indent=1))
    else:
        print(results.table(profile))


@_command(
    "bench",
    _option("--json", **_JSON, help="write the rows to FILE as well"),
    _option("--only", metavar="a,c", help="only these rows"),
    _DEVICE,
    _option("--repeats", type=int, default=3, help="of every measurement (default: 3)"),
)
def _bench(**options: Any) -> None:
    """Time the kernels against other libraries.

    Times the kernels against torchattacks, Foolbox and ART (extra `bench`) in one process, on the same model and data.
    Rows: a image-dependent PGD, b universal perturbations, c an epoch of training, d the search for eps_uni, e the data
    pipeline, f segmentation, g images on disk. Other work on the machine falsifies the ratios.
    """
    from satlib import bench

    rows, where = bench.run(**options)
    print(f"\n{where['device']}; PyTorch {where['versions']['torch']}; {where['platform']}\n\n{bench.table(rows)}")


@_command("verify", _option("folder", type=Path, nargs="?", help="default: figures/ of the project"))
def _verify(folder: Path | None) -> int:
    """Check figures against the records that they were drawn from."""
    from satlib.paths import project_root
    from satlib.study import figures

    count, problems = figures.verify(folder or project_root() / "figures")
    for problem in problems:
        print(problem)
    print(f"{count} figures checked, {len(problems)} problems")
    return 1 if problems else 0


@_command(
    "data",
    _option("action", choices=("status", "verify", "download")),
    _option("name", nargs="?", help="a data set (verify: default all that are here; download: cifar10)"),
)
def _data(action: str, name: str | None) -> int:
    """Which data sets are here; check them; download CIFAR-10.

    status: which data sets are here, without reading them. verify: read and check every image of those that are here,
    or of NAME. download: fetch NAME (cifar10).
    """
    from satlib import data
    from satlib.paths import data_root

    if action == "download":
        data.download(name or "cifar10")
        return 0
    print(f"data root: {data_root()}")
    status = 0
    for each in [name] if name else data.DATASETS:
        place = "made in code" if data.is_embedded(each) else data.find(each)
        if action == "status" or (place is None and not name):
            print(f"{each}: {place or 'not here'}")
            continue
        try:
            splits = data.verify(each)
        except SatlibError as error:
            print(f"{each}: {error}")
            status = 1
            continue
        sizes = ", ".join(f"{len(part)} {part.split}" for part in (splits.train, splits.val, splits.test))
        print(f"{each}: {splits.train.title}; {sizes}; {len(splits.train.classes)} classes")
    return status


@_command("ledger status")
def _ledger_status() -> None:
    """How many records there are, and what is damaged or in progress."""
    from satlib.study.ledger import Ledger

    status = Ledger().status()
    print(f"ledger: {status['root']}")
    for name, what in (("runs", "computed here"), ("ledger", "published")):
        print(f"  {what}: {status[name]['count']} records, {status[name]['bytes'] / 1e6:.1f} MB")
    for entry in status["unfinished"]:
        print(f"  {'running' if entry['running'] else 'interrupted'}: {entry['id'][:12]}")
    for name in status["damaged"]:
        print(f"  damaged, set aside: {name}")


@_command("ledger pack", _option("out", type=Path, metavar="OUT.tar"))
def _ledger_pack(out: Path) -> None:
    """Put runs into an archive to carry to another machine."""
    from satlib.study.archive import pack
    from satlib.study.ledger import Ledger

    packed = pack(Ledger(), out)
    for name, reason in packed.left_out:
        print(f"left out: {name}: {reason}")
    unfinished = f" and {len(packed.unfinished)} unfinished" if packed.unfinished else ""
    print(f"{out}: {len(packed.packed)} runs{unfinished}, {packed.bytes / 1e6:.1f} MB")


@_command("ledger merge", _option("files", type=Path, nargs="+", metavar="FILE"))
def _ledger_merge(files: list[Path]) -> int:
    """Take in archives; every entry is checked, none is trusted."""
    from satlib.study.archive import merge
    from satlib.study.ledger import Ledger

    merged = merge(Ledger(), files)
    for name, reason in merged.refused:
        print(f"refused: {name}: {reason}")
    new = f"{len(merged.merged)} runs" + (f" and {len(merged.unfinished)} unfinished" if merged.unfinished else "")
    print(f"{new} merged, {len(merged.present)} were already there, {len(merged.refused)} refused")
    return 1 if merged.refused else 0


@_command(
    "ledger publish",
    _option("runs", nargs="+", metavar="RUN", help="ids or their first digits, or profile:NAME"),
    _option("--artefacts", default="perturbation", help="artefacts to publish along (default: %(default)s)"),
)
def _ledger_publish(runs: list[str], artefacts: str) -> None:
    """Copy records into data/ledger, which is tracked."""
    from satlib.study.ledger import Ledger

    ledger = Ledger()
    ids = []
    for name in runs:
        profile = name.removeprefix("profile:")
        if profile == name:
            ids.append(name)
            continue
        ids += (of_profile := [record.id for record in ledger.records() if record.labels.get("profile") == profile])
        if not of_profile:
            raise SatlibError(f"publish: no record of the profile {profile!r} in {ledger.root}; see `ledger status`")
    published = ledger.publish(ids, [name for name in artefacts.split(",") if name])
    print(f"{len(published)} records published in {ledger.ledger}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 2 for bad input, 130 when stopped by Ctrl-C."""
    try:
        try:
            arguments = vars(_parser().parse_args(argv))
            return arguments.pop("function")(**arguments) or 0
        finally:
            sys.stdout.flush()
    except SatlibError as error:
        print(f"satlib: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsatlib: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough: no traceback, nor one when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
