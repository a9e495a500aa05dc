"""The command line: `python -m satlib COMMAND`. What a command needs is imported only when it runs."""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from satlib.errors import SatlibError

if TYPE_CHECKING:
    from satlib.study.runs import Run, Runner


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise SatlibError(f"{message}; --help shows what there is")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 2 for bad input, 130 when stopped by Ctrl-C."""
    parser = _Parser(prog="python -m satlib", description="Shared adversarial training, reproduced step by step.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_run, _add_sweep, _add_train, _add_results, _add_bench, _add_verify, _add_data, _add_ledger):
        add(commands)
    try:
        try:
            arguments = parser.parse_args(argv)
            return arguments.function(arguments)
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


def budget(text: str) -> float:
    """Seconds in `9m`, `90s`, `1.5h` or `1h30m`, for options that limit the time."""
    units = {"h": 3600, "m": 60, "s": 1}
    if not re.fullmatch(r"(\d+(\.\d+)?[hms])+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; expected for example 9m, 90s or 1h30m")
    seconds = sum(float(number) * units[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)([hms])", text))
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time at all; expected for example 9m, 90s or 1h30m")
    return seconds


def _deadline(arguments: argparse.Namespace) -> float | None:
    """When the budget is spent, in seconds since the epoch; set-up by a script counts as well."""
    started = float(os.environ.get("SATLIB_STARTED", time.time()))
    return None if arguments.budget is None else started + arguments.budget


# Options that mean the same in several commands.
_SHARED: dict[str, dict[str, Any]] = {
    "--profile": {"default": "quick", "help": "a file of notebooks/profiles (default: quick)"},
    "--only": {"metavar": "04,06", "help": "only these notebooks, by number or name"},
    "--budget": {"type": budget, "metavar": "9m", "help": "stop cleanly before this time is spent"},
    "--force": {"action": "store_true", "help": "compute again what is already known"},
    "--device": {"choices": ("cpu", "cuda"), "help": "default: cuda where there is one"},
}


def _command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int], *shared: str, **texts: str
) -> argparse.ArgumentParser:
    """Adds the command `name`, which `function` carries out, with those of the `_SHARED` options that it takes."""
    parser = commands.add_parser(name, **texts)
    parser.set_defaults(function=function)
    for option in shared:
        parser.add_argument(option, **_SHARED[option])
    return parser


# --- run: execute the notebooks


def _add_run(commands: Any) -> None:
    parser = _command(
        commands,
        "run",
        _run,
        *("--profile", "--only", "--budget", "--force"),
        help="execute the notebooks under a profile",
        description="Executes the notebooks under a profile, into notebooks/executed/PROFILE. "
        "Exit status: 0 if every notebook ran, 1 if one failed, 2 for a request that cannot be met, "
        "3 if the budget was spent before the end.",
    )
    parser.add_argument("--check", action="store_true", help="only check the request; needs nothing installed")


def _run(arguments: argparse.Namespace) -> int:
    from satlib.study import notebooks

    if arguments.check:
        notebooks.check(arguments.profile, only=arguments.only)
        return 0
    limits = {"deadline": _deadline(arguments), "force": arguments.force}
    return notebooks.run(arguments.profile, only=arguments.only, **limits)


# --- sweep: a profile's runs without notebooks


def _add_sweep(commands: Any) -> None:
    parser = _command(
        commands,
        "sweep",
        _sweep,
        *("--profile", "--only", "--budget", "--force"),
        help="carry out a profile's runs without notebooks",
        description="Carries out the runs of a profile that have no record yet, most important first. Needs no "
        "Jupyter. Exit status: 0 when all are done, 1 when some failed, 3 when the budget was spent before; the next "
        "call goes on.",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only list the runs, with time (from a measured probe) and disk"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="of a dry run: write what each section costs to FILE")
    parser.add_argument("--device", **_SHARED["--device"])
    group = parser.add_argument_group("on a cluster (extra `cluster`)")
    group.add_argument("--on", choices=("here", "ray"), default="here", help="in this process (default), or on Ray")
    group.add_argument("--address", metavar="auto|[ray://]HOST:PORT", help="the cluster (default: the one at hand)")
    group.add_argument("--gpus-per-run", type=float, metavar="0.25", help="default: 1 where the cluster has GPUs")
    group.add_argument("--cpus-per-run", type=int, metavar="N", default=1, help="default: 1")
    group.add_argument(
        "--ranks", type=int, metavar="N", default=1, help="trainings on larger images: by torchrun on N GPUs of a node"
    )
    group.add_argument(
        "--scratch", type=Path, metavar="DIR", help="for nodes without this folder: where they keep records meanwhile"
    )


def _sweep(arguments: argparse.Namespace) -> int:
    from satlib.study import cluster, experiments
    from satlib.study.runs import BudgetSpent, Runner

    options = cluster.Options(
        address=arguments.address,
        gpus=arguments.gpus_per_run,
        cpus=arguments.cpus_per_run,
        ranks=arguments.ranks,
        scratch=arguments.scratch,
        device=arguments.device,
    )
    if arguments.on == "here" and options != cluster.Options(device=arguments.device):
        raise SatlibError("--address, --gpus-per-run, --cpus-per-run, --ranks and --scratch are for --on ray")
    if arguments.force and arguments.scratch:
        raise SatlibError(
            "--force --scratch: a record that comes back never replaces one that is here; drop one of them"
        )
    if arguments.json and not arguments.dry_run:
        raise SatlibError("--json is for --dry-run; `python -m satlib results --json` writes results")
    runs = experiments.profile_runs(arguments.profile, only=arguments.only)
    alone = arguments.on == "here" or arguments.dry_run  # the driver of a cluster only looks after it
    device = arguments.device if alone else "cpu"
    runner = Runner(profile=arguments.profile, device=device, force=arguments.force, deadline=_deadline(arguments))
    if arguments.dry_run:
        _dry_run(runner, runs, arguments.json)
        return 0
    failed: list[Run] = []
    stopped = False
    try:
        if arguments.on == "ray":
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
        chosen = f"all runs of {arguments.only} in" if arguments.only else "all runs of"
        print(f"{chosen} the profile {arguments.profile!r} have a record")
    return 1 if failed else 3 if left else 0


def _dry_run(runner: "Runner", runs: list["Run"], path: Path | None) -> None:
    """Every run of the plan in its order, with an estimate of its time from a measured probe of its model."""
    from satlib.study import costs
    from satlib.study.provenance import device_name

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


# --- train: trainings of a profile, on one process or on all that torchrun starts


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        _train,
        *("--profile", "--budget", "--device"),
        help="carry out trainings of a profile, on several GPUs or nodes by torchrun",
        description="Carries out the trainings of a profile that have no record yet, data-parallel under torchrun: "
        "`torchrun --nproc-per-node 2 -m satlib train --profile gpu`. The records are those of one process; rank 0 "
        "alone writes them, and the same call goes on from the last whole epoch. Evaluations, and the defences that "
        "train on one process only, are left to `sweep`. Exit status: 0; on one process 3 when the budget was spent "
        "before all was done.",
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="only trainings with TEXT in their titles")


def _train(arguments: argparse.Namespace) -> int:
    from satlib import parallel
    from satlib.study import experiments
    from satlib.study.kinds import TRAININGS
    from satlib.study.runs import BudgetSpent, Runner

    planned = (each for run in experiments.profile_runs(arguments.profile) for each in run.ancestry())
    chosen = [run for run in planned if run.kind in TRAININGS and arguments.only in run.title]
    if not chosen:
        raise SatlibError(f"--only {arguments.only!r}: no training of the profile {arguments.profile!r} is called so")
    with parallel.joined(arguments.device) as device:
        ranks = parallel.here()
        if ranks.count > 1:
            chosen = [run for run in chosen if "defense" not in run.config]
        runner = Runner(profile=arguments.profile, device=device, deadline=_deadline(arguments))
        runs = {runner.spec(r).id: r for run in chosen for r in run.ancestry()}
        if ranks.rank > 0:
            parallel.follow(runner, runs)
            return 0
        try:
            for run in runs.values():
                runner.record(run)
        except BudgetSpent:
            print("budget spent; the same call goes on from here")
            return 3 if ranks.count == 1 else 0  # torchrun would call any other status a failure
        finally:
            ranks.told(None)
        print(f"{len(runs)} trainings of the profile {arguments.profile!r} have a record")
    return 0


# --- results: the paper's numbers beside ours


def _add_results(commands: Any) -> None:
    parser = _command(commands, "results", _results, help="the paper's numbers beside ours, from the records")
    parser.add_argument("--profile", help="only this profile's (default: for each number the weightiest profile)")
    parser.add_argument("--json", action="store_true", help="a list of rows; numbers as numbers, null for none")


def _results(arguments: argparse.Namespace) -> int:
    from satlib.study import results

    if arguments.json:
        print(json.dumps(results.as_json(results.rows(arguments.profile)), indent=1))
    else:
        print(results.table(arguments.profile))
    return 0


# --- bench: how fast are the kernels, beside the peers and the hardware's limit?


def _add_bench(commands: Any) -> None:
    parser = _command(
        commands,
        "bench",
        _bench,
        "--device",
        help="time the kernels against other libraries",
        description="Times the kernels against torchattacks, Foolbox and ART (extra `bench`) in one process, on the "
        "same model and data. Rows: a image-dependent PGD, b universal perturbations, c an epoch of training, d the "
        "search for eps_uni, e the data pipeline, f segmentation, g images on disk. Other work on the machine "
        "falsifies the ratios.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE as well")
    parser.add_argument("--only", metavar="a,c", help="only these rows")
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement (default: 3)")


def _bench(arguments: argparse.Namespace) -> int:
    from satlib import bench

    options = {"only": arguments.only, "device": arguments.device, "repeats": arguments.repeats}
    rows, where = bench.run(**options, path=arguments.json)
    print(f"\n{where['device']}; PyTorch {where['versions']['torch']}; {where['platform']}\n\n{bench.table(rows)}")
    return 0


# --- verify: do figures still show what the records say?


def _add_verify(commands: Any) -> None:
    parser = _command(commands, "verify", _verify, help="check figures against the records that they were drawn from")
    parser.add_argument("folder", type=Path, nargs="?", help="default: figures/ of the project")


def _verify(arguments: argparse.Namespace) -> int:
    from satlib.paths import project_root
    from satlib.study import figures

    count, problems = figures.verify(arguments.folder or project_root() / "figures")
    for problem in problems:
        print(problem)
    print(f"{count} figures checked, {len(problems)} problems")
    return 1 if problems else 0


# --- data: which data sets are here, and are they sound?


def _add_data(commands: Any) -> None:
    parser = _command(
        commands,
        "data",
        _data,
        help="which data sets are here; check them; download CIFAR-10",
        description="status: which data sets are here, without reading them. verify: read and check every image of "
        "those that are here, or of NAME. download: fetch NAME (cifar10).",
    )
    parser.add_argument("action", choices=("status", "verify", "download"))
    parser.add_argument("name", nargs="?", help="a data set (verify: default all that are here; download: cifar10)")


def _data(arguments: argparse.Namespace) -> int:
    from satlib import data
    from satlib.paths import data_root
    from satlib.study import profiles

    if arguments.action == "download":
        data.download(arguments.name or "cifar10")
        return 0
    print(f"data root: {data_root()}")
    status = 0
    for name in [arguments.name] if arguments.name else data.NAMES:
        place = "made in code" if name in profiles.EMBEDDED else data.place(name.partition(":")[0])
        if arguments.action == "status" or (place is None and not arguments.name):
            print(f"{name}: {place or 'not here'}")
            continue
        try:
            splits = data.verify(name)
        except SatlibError as error:
            print(f"{name}: {error}")
            status = 1
            continue
        sizes = ", ".join(f"{len(part)} {part.split}" for part in (splits.train, splits.val, splits.test))
        print(f"{name}: {splits.train.title}; {sizes}; {len(splits.train.classes)} classes")
    return status


# --- ledger: carry runs between machines, and publish them


def _add_ledger(commands: Any) -> None:
    parser = commands.add_parser("ledger", help="status of the records; pack, merge and publish them")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    text = "how many records there are, and what is damaged or in progress"
    _command(actions, "status", _ledger_status, help=text)
    pack = _command(actions, "pack", _ledger_pack, help="put runs into an archive to carry to another machine")
    pack.add_argument("out", type=Path, metavar="OUT.tar")
    pack.add_argument("--max-mb", type=float, metavar="N", help="size limit; large artefacts stay behind first")
    text = "take in archives; every entry is checked, none is trusted"
    merge = _command(actions, "merge", _ledger_merge, help=text)
    merge.add_argument("files", type=Path, nargs="+", metavar="FILE")
    text = "copy records into data/ledger, which is tracked"
    publish = _command(actions, "publish", _ledger_publish, help=text)
    publish.add_argument("runs", nargs="+", metavar="RUN", help="ids or their first digits, or profile:NAME")
    publish.add_argument(
        "--artefacts", default="perturbation", help="artefacts to publish along (default: %(default)s)"
    )


def _ledger_status(arguments: argparse.Namespace) -> int:
    from satlib.study.ledger import Ledger

    status = Ledger().status()
    print(f"ledger: {status['root']}")
    for name, what in (("runs", "computed here"), ("ledger", "published")):
        print(f"  {what}: {status[name]['count']} records, {status[name]['bytes'] / 1e6:.1f} MB")
    for entry in status["unfinished"]:
        print(f"  {'running' if entry['running'] else 'interrupted'}: {entry['id'][:12]}")
    for name in status["damaged"]:
        print(f"  damaged, set aside: {name}")
    return 0


def _ledger_pack(arguments: argparse.Namespace) -> int:
    from satlib.study.ledger import Ledger

    packed = Ledger().pack(arguments.out, max_mb=arguments.max_mb)
    for name, reason in packed.left_out:
        print(f"left out: {name}: {reason}")
    unfinished = f" and {len(packed.unfinished)} unfinished" if packed.unfinished else ""
    print(f"{arguments.out}: {len(packed.packed)} runs{unfinished}, {packed.bytes / 1e6:.1f} MB")
    return 0


def _ledger_merge(arguments: argparse.Namespace) -> int:
    from satlib.study.ledger import Ledger

    merged = Ledger().merge(arguments.files)
    for name, reason in merged.refused:
        print(f"refused: {name}: {reason}")
    new = f"{len(merged.merged)} runs" + (f" and {len(merged.unfinished)} unfinished" if merged.unfinished else "")
    print(f"{new} merged, {len(merged.present)} were already there, {len(merged.refused)} refused")
    return 1 if merged.refused else 0


def _ledger_publish(arguments: argparse.Namespace) -> int:
    from satlib.study.ledger import Ledger

    ledger = Ledger()
    ids = []
    for name in arguments.runs:
        if profile := name.removeprefix("profile:") if name.startswith("profile:") else None:
            found = [record.id for record in ledger.records() if record.labels.get("profile") == profile]
            if not found:
                raise SatlibError(
                    f"publish: no record of the profile {profile!r} in {ledger.root}; see `ledger status`"
                )
            ids += found
        else:
            ids.append(name)
    artefacts = [name for name in arguments.artefacts.split(",") if name]
    published = ledger.publish(ids, artefacts)
    print(f"{len(published)} records published in {ledger.ledger}")
    return 0
