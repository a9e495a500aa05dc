"""The subcommands that read and fill the ledger: `sweep`, `train`, `results`, `verify`, `data` and `ledger`."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from satlib.errors import SatlibError

if TYPE_CHECKING:
    from satlib.study.runs import Run, Runner


def add_sweep(commands: Any, budget: Any, deadline: Any) -> None:
    """`sweep`: a profile's runs without notebooks."""
    parser = commands.add_parser(
        "sweep",
        help="carry out a profile's runs without notebooks",
        description="Carries out the runs of a profile that have no record yet, most important first. Needs no "
        "Jupyter. Exit status: 0 when all are done, 1 when some failed, 3 when the budget was spent before; the next "
        "call goes on.",
    )
    parser.add_argument("--profile", default="quick", help="a file of notebooks/profiles (default: quick)")
    parser.add_argument("--budget", type=budget, metavar="9m", help="stop cleanly before this time is spent")
    parser.add_argument("--force", action="store_true", help="compute again what is already known")
    parser.add_argument(
        "--dry-run", action="store_true", help="only list the runs, with time (from a measured probe) and disk"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="of a dry run: write what each section costs to FILE")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
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
    parser.set_defaults(function=lambda arguments: _sweep(arguments, deadline(arguments.budget)))


def _sweep(arguments: argparse.Namespace, deadline: float | None) -> int:
    from satlib.study import cluster, measurements
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
    runs = measurements.profile_runs(arguments.profile)
    here = (
        arguments.device if arguments.on == "here" or arguments.dry_run else "cpu"
    )  # the driver of a cluster only looks after it
    runner = Runner(profile=arguments.profile, device=here, force=arguments.force, deadline=deadline)
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
        print(f"all runs of the profile {arguments.profile!r} have a record")
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


def add_train(commands: Any, budget: Any, deadline: Any) -> None:
    """`train`: trainings of a profile, on one process or on all that torchrun starts."""
    parser = commands.add_parser(
        "train",
        help="carry out trainings of a profile, on several GPUs or nodes by torchrun",
        description="Carries out the trainings of a profile that have no record yet, data-parallel under torchrun: "
        "`torchrun --nproc-per-node 2 -m satlib train --profile gpu`. The records are those of one process; rank 0 "
        "alone writes them, and the same call goes on from the last whole epoch. Evaluations, and the defences that "
        "train on one process only, are left to `sweep`. Exit status: 0; on one process 3 when the budget was spent "
        "before all was done.",
    )
    parser.add_argument("--profile", default="quick", help="a file of notebooks/profiles (default: quick)")
    parser.add_argument("--only", metavar="TEXT", default="", help="only trainings with TEXT in their titles")
    parser.add_argument("--budget", type=budget, metavar="9m", help="stop cleanly before this time is spent")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.set_defaults(function=lambda arguments: _train(arguments, deadline(arguments.budget)))


def _train(arguments: argparse.Namespace, deadline: float | None) -> int:
    from satlib import parallel
    from satlib.study import measurements
    from satlib.study.runs import BudgetSpent, Runner

    planned = (each for run in measurements.profile_runs(arguments.profile) for each in run.ancestry())
    chosen = [run for run in planned if run.is_training and arguments.only in run.title]
    if not chosen:
        raise SatlibError(f"--only {arguments.only!r}: no training of the profile {arguments.profile!r} is called so")
    with parallel.joined(arguments.device) as device:
        ranks = parallel.current_ranks()
        if ranks.count > 1:
            chosen = [run for run in chosen if not run.settings["defense"]]
        runner = Runner(profile=arguments.profile, device=device, deadline=deadline)
        runs = {runner.spec(r).id: r for run in chosen for r in run.ancestry()}
        if ranks.rank > 0:
            runner.follow(runs)
            return 0
        try:
            for run in runs.values():
                runner.record(run)
        except BudgetSpent:
            print("budget spent; the same call goes on from here")
            return 3 if ranks.count == 1 else 0  # torchrun would call any other status a failure
        finally:
            ranks.broadcast_object(None)
        print(f"{len(runs)} trainings of the profile {arguments.profile!r} have a record")
    return 0


def add_results(commands: Any) -> None:
    """`results`: the paper's numbers beside ours."""
    parser = commands.add_parser("results", help="the paper's numbers beside ours, from the records")
    parser.add_argument("--profile", help="only this profile's (default: for each number the weightiest profile)")
    parser.add_argument("--json", action="store_true", help="a list of rows; numbers as numbers, null for none")
    parser.set_defaults(function=_results)


def _results(arguments: argparse.Namespace) -> int:
    from satlib.study import results

    if arguments.json:
        print(json.dumps([vars(row) for row in results.rows(arguments.profile)], indent=1))
    else:
        print(results.table(arguments.profile))
    return 0


def add_bench(commands: Any) -> None:
    """`bench`: how fast are the kernels, beside the peers and the hardware's limit?"""
    parser = commands.add_parser(
        "bench",
        help="time the kernels against other libraries",
        description="Times the kernels against torchattacks, Foolbox and ART (extra `bench`) in one process, on the "
        "same model and data. Rows: a image-dependent PGD, b universal perturbations, c an epoch of training, d the "
        "search for eps_uni, e the data pipeline, f segmentation, g images on disk. Other work on the machine "
        "falsifies the ratios.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE as well")
    parser.add_argument("--only", metavar="a,c", help="only these rows")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement (default: 3)")
    parser.set_defaults(function=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    from satlib import bench

    options = {"only": arguments.only, "device": arguments.device, "repeats": arguments.repeats}
    rows, where = bench.run(**options, path=arguments.json)
    print(f"\n{where['device']}; PyTorch {where['versions']['torch']}; {where['platform']}\n\n{bench.table(rows)}")
    return 0


def add_verify(commands: Any) -> None:
    """`verify`: do figures still show what the records say?"""
    parser = commands.add_parser("verify", help="check figures against the records that they were drawn from")
    parser.add_argument("folder", type=Path, nargs="?", help="default: figures/ of the project")
    parser.set_defaults(function=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from satlib.paths import project_root
    from satlib.study import figures

    count, problems = figures.verify(arguments.folder or project_root() / "figures")
    for problem in problems:
        print(problem)
    print(f"{count} figures checked, {len(problems)} problems")
    return 1 if problems else 0


def add_data(commands: Any) -> None:
    """`data`: which data sets are here, and are they sound?"""
    parser = commands.add_parser(
        "data",
        help="which data sets are here; check them; download CIFAR-10",
        description="status: which data sets are here, without reading them. verify: read and check every image of "
        "those that are here, or of NAME. download: fetch NAME (cifar10).",
    )
    parser.add_argument("action", choices=("status", "verify", "download"))
    parser.add_argument("name", nargs="?", help="a data set (verify: default all that are here; download: cifar10)")
    parser.set_defaults(function=_data)


def _data(arguments: argparse.Namespace) -> int:
    from satlib import data
    from satlib.paths import data_root

    if arguments.action == "download":
        data.download(arguments.name or "cifar10")
        return 0
    print(f"data root: {data_root()}")
    status = 0
    for name in [arguments.name] if arguments.name else data.DATASETS:
        place = "made in code" if data.is_embedded(name) else data.find(name)
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


def add_ledger(commands: Any) -> None:
    """`ledger`: carry runs between machines, and publish them."""
    parser = commands.add_parser("ledger", help="status of the records; pack, merge and publish them")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    status = actions.add_parser("status", help="how many records there are, and what is damaged or in progress")
    status.set_defaults(function=_ledger_status)
    pack = actions.add_parser("pack", help="put runs into an archive to carry to another machine")
    pack.add_argument("out", type=Path, metavar="OUT.tar")
    pack.add_argument("--max-mb", type=float, metavar="N", help="size limit; large artefacts stay behind first")
    pack.set_defaults(function=_ledger_pack)
    merge = actions.add_parser("merge", help="take in archives; every entry is checked, none is trusted")
    merge.add_argument("files", type=Path, nargs="+", metavar="FILE")
    merge.set_defaults(function=_ledger_merge)
    publish = actions.add_parser("publish", help="copy records into data/ledger, which is tracked")
    publish.add_argument("runs", nargs="+", metavar="RUN", help="ids or their first digits, or profile:NAME")
    publish.add_argument(
        "--artefacts", default="perturbation", help="artefacts to publish along (default: %(default)s)"
    )
    publish.set_defaults(function=_ledger_publish)


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
    from satlib.study import archive
    from satlib.study.ledger import Ledger

    packed = archive.pack(Ledger(), arguments.out, max_mb=arguments.max_mb)
    for name, reason in packed.left_out:
        print(f"left out: {name}: {reason}")
    unfinished = f" and {len(packed.unfinished)} unfinished" if packed.unfinished else ""
    print(f"{arguments.out}: {len(packed.packed)} runs{unfinished}, {packed.bytes / 1e6:.1f} MB")
    return 0


def _ledger_merge(arguments: argparse.Namespace) -> int:
    from satlib.study import archive
    from satlib.study.ledger import Ledger

    merged = archive.merge(Ledger(), arguments.files)
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
