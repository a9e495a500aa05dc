"""The command line: `python -m satlib COMMAND`. What a command needs is imported only when it runs."""

import argparse
import contextlib
import importlib
import inspect
import json
import os
import re
import sys
import time
from collections import defaultdict
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
_Function = Callable[[argparse.Namespace], int | None]
_COMMANDS: dict[str, tuple[_Function, tuple[_Option | str, ...]]] = {}


def _option(name: str, **settings: Any) -> _Option:
    return name, settings


def _command(name: str, *options: _Option | str) -> Callable[[_Function], _Function]:
    """Makes a function of the parsed options a command, which returns the exit status, None for 0.

    Its docstring is what --help says. Options after a title are in a group of their own.
    """

    def register(function: _Function) -> _Function:
        _COMMANDS[name] = function, options
        return function

    return register


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SatlibError(f"{message}; --help shows what there is")


def _parser() -> _Parser:
    about = "Shared adversarial training, reproduced step by step."
    parser = _Parser(prog="python -m satlib", description=about, allow_abbrev=False)
    commands = {"": parser.add_subparsers(title="commands", metavar="COMMAND", required=True)}
    for name, (function, options) in _COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if group not in commands:
            within = commands[""].add_parser(group, help=_GROUPS[group])
            commands[group] = within.add_subparsers(title="actions", metavar="ACTION", required=True)
        title, _, text = inspect.cleandoc(function.__doc__ or "").partition("\n\n")
        shown = {"help": title[:1].lower() + title[1:-1], "description": text}
        place = command = commands[group].add_parser(word, allow_abbrev=False, **shown)
        command.set_defaults(function=function)
        for option in options:
            if isinstance(option, str):
                place = command.add_argument_group(option)
            else:
                place.add_argument(option[0], **option[1])
    return parser


_PROFILE = _option("--profile", default="quick", help="quick, laptop, gpu or paper (default: quick)")
_ONLY = _option("--only", metavar="04,06", help="only these notebooks, by number or name")
_UNTIL = {"dest": "deadline", "type": _deadline, "metavar": "9m"}
_BUDGET = _option("--budget", **_UNTIL, help="stop cleanly before this time is spent")
_FORCE = _option("--force", action="store_true", help="compute again what is already known")
_DEVICE = _option("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
_JSON = {"dest": "path", "type": Path, "metavar": "FILE"}
_COUNT = {"type": int, "metavar": "N", "default": 1}
_GROUPS = {"ledger": "status of the records; pack, merge and publish them"}  # of commands, by their first word


@_command(
    "run",
    *(_PROFILE, _ONLY, _BUDGET, _FORCE),
    _option("--check", action="store_true", help="only check the request; needs nothing installed"),
)
def _run(options: argparse.Namespace) -> int:
    """Execute the notebooks under a profile.

    Executes the notebooks under a profile, into notebooks/executed/PROFILE. Exit status: 0 if every notebook ran,
    1 if one failed, 2 for a request that cannot be met, 3 if the budget was spent before the end.
    """
    from satlib.study import notebooks

    if options.check:
        notebooks.check(options.profile, only=options.only)
        return 0
    return notebooks.run(options.profile, only=options.only, deadline=options.deadline, force=options.force)


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
def _sweep(options: argparse.Namespace) -> int:
    """Carry out a profile's runs without notebooks.

    Carries out the runs of a profile that have no record yet, most important first. Needs no Jupyter. Exit status:
    0 when all are done, 1 when some failed, 3 when the budget was spent before; the next call goes on.
    """
    from satlib.paths import select_notebooks
    from satlib.study import cluster, measurements
    from satlib.study.runs import BudgetSpent, Runner

    profile, only, device, on_ray = options.profile, options.only, options.device, options.on == "ray"
    names = ("device", "address", "gpus", "cpus", "ranks", "scratch")
    of_cluster = cluster.Options(**{name: getattr(options, name) for name in names})
    if not on_ray and of_cluster != cluster.Options(device=device):
        raise SatlibError("--address, --gpus-per-run, --cpus-per-run, --ranks and --scratch are for --on ray")
    if options.force and options.scratch:
        raise SatlibError(
            "--force --scratch: a record that comes back never replaces one that is here; drop one of them"
        )
    if options.path and not options.dry_run:
        raise SatlibError("--json is for --dry-run; `python -m satlib results --json` writes results")
    runs = measurements.profile_runs(profile, only=select_notebooks(only) if only else None)
    if on_ray and not options.dry_run:
        device = "cpu"  # the driver of a cluster only looks after it
    runner = Runner(profile=profile, device=device, force=options.force, deadline=options.deadline)
    if options.dry_run:
        _dry_run(runner, runs, options.path)
        return 0
    failed: list[Run] = []
    stopped = False
    try:
        if on_ray:
            state = cluster.sweep(runner, runs, of_cluster)
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


@_command(
    "train",
    _PROFILE,
    _option("--only", metavar="TEXT", default="", help="only trainings with TEXT in their titles"),
    *(_BUDGET, _DEVICE),
)
def _train(options: argparse.Namespace) -> int:
    """Carry out trainings of a profile, on several GPUs or nodes by torchrun.

    Carries out the trainings of a profile that have no record yet, data-parallel under torchrun:
    `torchrun --nproc-per-node 2 -m satlib train --profile gpu`. The records are those of one process; rank 0 alone
    writes them, and the same call goes on from the last whole epoch. Evaluations, and the defences that train on one
    process only, are left to `sweep`. Exit status: 0; on one process 3 when the budget was spent before all was done.
    """
    from satlib import parallel
    from satlib.study import measurements
    from satlib.study.runs import BudgetSpent, Runner

    profile, only = options.profile, options.only
    planned = (each for run in measurements.profile_runs(profile) for each in run.ancestry())
    chosen = [run for run in planned if run.is_training and only in run.title]
    if not chosen:
        raise SatlibError(f"--only {only!r}: no training of the profile {profile!r} is called so")
    with parallel.joined(options.device) as device:
        ranks = parallel.current_ranks()
        if ranks.count > 1:
            chosen = [run for run in chosen if not run.settings["defense"]]
        runner = Runner(profile=profile, device=device, deadline=options.deadline)
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
def _results(options: argparse.Namespace) -> None:
    """The paper's numbers beside ours, from the records."""
    from satlib.study import results

    if options.as_json:
        print(json.dumps([asdict(row) for row in results.rows(options.profile)], indent=1))
    else:
        print(results.table(options.profile))


@_command(
    "bench",
    _option("--json", **_JSON, help="write the rows to FILE as well"),
    _option("--only", metavar="a,c", help="only these rows"),
    _DEVICE,
    _option("--repeats", type=int, default=3, help="of every measurement (default: 3)"),
)
def _bench(options: argparse.Namespace) -> None:
    """Time the kernels against other libraries.

    Times the kernels against torchattacks, Foolbox and ART (extra `bench`) in one process, on the same model and data.
    Rows: a image-dependent PGD, b universal perturbations, c an epoch of training, d the search for eps_uni, e the data
    pipeline, f segmentation, g images on disk, h the ensemble. Other work on the machine falsifies the ratios.
    """
    from satlib import bench

    print(bench.run(only=options.only, device=options.device, repeats=options.repeats, path=options.path))


def _numbers(text: str) -> list[float]:
    """The numbers in `0.485,0.456,0.406`."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers, such as 0.485,0.456,0.406") from None


@_command(
    "evaluate",
    _option("model", metavar="MODULE:FUNCTION", help="a function, importable from here, that returns the network"),
    _option("--data", type=Path, required=True, metavar="FOLDER", help="images, in a folder for each class"),
    _option("--classes", type=Path, metavar="FILE", help="the network's classes in order, one folder's name a line"),
    _option("--out", type=Path, metavar="DIR", help="where the card is written (default: data/cards/FUNCTION)"),
    _option("--budget", type=budget, metavar="9m", help="stop when this time is spent"),
    _option("--images", type=int, default=2000, metavar="N", help="so many at most, at random (default: 2000)"),
    _option("--size", type=int, metavar="N", help="scale images to NxN pixels (default: as they are)"),
    _option("--seeds", type=int, default=3, metavar="N", help="searches by each attack (default: 3)"),
    _option("--delta", type=float, help="the share to be fooled (default: 0.75)"),
    _DEVICE,
    "networks whose inputs are not pixels from 0 to 255",
    _option("--unit", action="store_true", help="they are from 0 to 1"),
    _option("--mean", type=_numbers, metavar="R,G,B", help="from 0 to 1, then minus this mean ..."),
    _option("--std", type=_numbers, metavar="R,G,B", help="... and divided by this standard deviation"),
)
def _evaluate(options: argparse.Namespace) -> None:
    """Measure the universal robustness of a network of yours.

    Writes a card: index.html, card.json, card.png and the perturbation. Exit status: 0, or 2 for a request that cannot
    be met.
    """
    import torch

    from satlib.data.folder import load_folder
    from satlib.evaluation import evaluate
    from satlib.files import writing
    from satlib.models import UnitInputs
    from satlib.network import logits_of
    from satlib.paths import cards_root

    network = imported(options.model)
    options.out = options.out or cards_root() / options.model.partition(":")[2]
    if options.unit or options.mean or options.std:
        if not isinstance(network, torch.nn.Module):
            raise SatlibError(f"--unit, --mean, --std: {options.model} returns a {type(network).__name__}, no Module")
        network = UnitInputs(network, mean=options.mean or 0.0, std=options.std or 1.0)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SatlibError("--device cuda: PyTorch sees none here; use --device cpu")
    if isinstance(network, torch.nn.Module):
        network = network.to(device).eval()
    names = options.classes or ""
    data = load_folder(options.data, classes=names, size=options.size, most=options.images).to(device)
    with torch.no_grad():
        known = logits_of(network, data.images[:1].float()).shape[1]
    if known != len(data.classes):
        more = "" if names else "; --classes FILE names them in their order, as its folders are called"
        raise SatlibError(f"{options.model} tells {known} classes apart, {options.data} has {len(data.classes)}{more}")
    with writing(options.out):
        options.out.mkdir(parents=True, exist_ok=True)  # now, not after hours
    given = {"seeds": options.seeds, "budget": options.budget, "class_names": data.classes}
    given |= {"delta": options.delta} if options.delta is not None else {}
    try:
        card = evaluate(network, data.images, data.labels, name=options.model.partition(":")[2], **given)
    except (SatlibError, KeyboardInterrupt) as error:
        with contextlib.suppress(OSError):  # of which it is not empty
            options.out.rmdir()
        raise error if isinstance(error, SatlibError) else SatlibError("stopped; nothing was written") from None
    print(f"\n{card}\n")
    print(card.save(options.out))


def imported(name: str) -> Any:
    """What the function MODULE:FUNCTION returns. Raises SatlibError where it cannot be imported, or fails."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise SatlibError(f"{name}: expected MODULE:FUNCTION, such as mynets:resnet for resnet() in mynets.py")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)  # for good: a network may import more when it is called
    try:
        made = getattr(importlib.import_module(module), function)()
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        raise SatlibError(f"{name} cannot be called: {type(error).__name__}: {said}") from error
    if not callable(made):
        raise SatlibError(f"{name} returns a {type(made).__name__}: expected a network")
    return made


@_command(
    "bound",
    _option("model", metavar="MODEL", help="the title of a published model, such as 's=64, eps=26, sigma=0.5'"),
    _option("file", type=Path, metavar="XI.npy", help="a perturbation (C, H, W) in pixel units, written by numpy.save"),
    _option("--author", required=True, metavar="NAME", help="whose it is"),
    _option("--profile", default="laptop", help="whose model it is (default: laptop)"),
    _option("--section", default="6.1", choices=("6.1", "6.2"), help="of the paper (default: 6.1)"),
    _DEVICE,
)
def _bound(options: argparse.Namespace) -> int:
    """Check a perturbation of yours against a published model.

    Measured on the images on which its searches report, in float32. If it wins the share that they are after at a
    smaller size than all that is known, it is recorded under the author's name, and the tables show it. Exit status: 0
    if so, 1 if not, 2 for a request that cannot be met.
    """
    from satlib.study import bounds

    won, told = bounds.offered(
        options.file,
        options.model,
        author=options.author,
        profile=options.profile,
        section=options.section,
        device=options.device,
    )
    print(told)
    return 0 if won else 1


@_command("verify", _option("folder", type=Path, nargs="?", help="default: figures/ of the project"))
def _verify(options: argparse.Namespace) -> int:
    """Check figures against the records that they were drawn from."""
    from satlib.paths import project_root
    from satlib.study import figures

    count, problems = figures.verify(options.folder or project_root() / "figures")
    print("\n".join([*problems, f"{count} figures checked, {len(problems)} problems"]))
    return 1 if problems else 0


@_command(
    "data",
    _option("action", choices=("status", "verify", "download")),
    _option("name", nargs="?", help="a data set (verify: default all that are here; download: cifar10)"),
)
def _data(options: argparse.Namespace) -> int:
    """Which data sets are here; check them; download CIFAR-10.

    status: which data sets are here, without reading them. verify: read and check every image of those that are here,
    or of NAME. download: fetch NAME (cifar10).
    """
    from satlib import data
    from satlib.paths import data_root

    if options.action == "download":
        data.download(options.name or "cifar10")
        return 0
    print(f"data root: {data_root()}")
    status = 0
    for name in [options.name] if options.name else data.DATASETS:
        place = "made in code" if data.is_embedded(name) else data.find(name)
        if options.action == "status" or (place is None and not options.name):
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


@_command("ledger status")
def _ledger_status(options: argparse.Namespace) -> None:
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


@_command(
    "ledger pack",
    _option("out", type=Path, metavar="OUT.tar"),
    _option("--max-mb", type=float, metavar="15", help="write several archives, OUT-1.tar and so on, none larger"),
)
def _ledger_pack(options: argparse.Namespace) -> None:
    """Put runs into an archive to carry to another machine."""
    from satlib.study.archive import pack
    from satlib.study.ledger import Ledger

    packed = pack(Ledger(), options.out, max_mb=options.max_mb)
    for name, reason in packed.left_out:
        print(f"left out: {name}: {reason}")
    sizes = ", ".join(f"{file} ({file.stat().st_size / 1e6:.1f} MB)" for file in packed.files)
    print(f"{_counted(packed.packed, packed.unfinished)} packed: {sizes}")


@_command("ledger merge", _option("files", type=Path, nargs="+", metavar="FILE"))
def _ledger_merge(options: argparse.Namespace) -> int:
    """Take in archives; every entry is checked, none is trusted."""
    from satlib.study.archive import merge
    from satlib.study.ledger import Ledger

    merged = merge(Ledger(), options.files)
    for name, reason in merged.refused:
        print(f"refused: {name}: {reason}")
    new, present = _counted(merged.merged, merged.unfinished), len(merged.present)
    print(f"{new} merged, {present} were already there, {len(merged.refused)} refused")
    return 1 if merged.refused else 0


def _counted(runs: Sequence, unfinished: Sequence) -> str:
    return f"{len(runs)} runs" + (f" and {len(unfinished)} unfinished" if unfinished else "")


@_command(
    "ledger publish",
    _option("runs", nargs="+", metavar="RUN", help="ids or their first digits, or profile:NAME"),
    _option("--artefacts", default="perturbation", help="artefacts to publish along (default: %(default)s)"),
    _option("--half", metavar="weights", default="", help="those of them to publish in half precision"),
)
def _ledger_publish(options: argparse.Namespace) -> None:
    """Copy records into data/ledger, which is tracked."""
    from satlib.study.ledger import Ledger

    ledger, by_profile = Ledger(), defaultdict(list)
    for record in ledger.records():
        by_profile[f"profile:{record.labels.get('profile')}"].append(record.id)
    for name in options.runs:
        if name.startswith("profile:") and name not in by_profile:
            raise SatlibError(f"publish: no record of the profile {name[8:]!r} in {ledger.root}; see `ledger status`")
    ids = [each for name in options.runs for each in by_profile.get(name, [name])]
    artefacts, half = (list(filter(None, names.split(","))) for names in (options.artefacts, options.half))
    published = ledger.publish(ids, artefacts, half=half)
    print(f"{len(published)} records published in {ledger.ledger}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 2 for bad input, 130 when stopped by Ctrl-C."""
    try:
        try:
            options = _parser().parse_args(argv)
            return options.function(options) or 0
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
