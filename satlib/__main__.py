"""The command line: `python -m satlib COMMAND`. What a command needs is imported only when it runs."""

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from satlib.cli import add_bench, add_data, add_ledger, add_results, add_sweep, add_train, add_verify
from satlib.errors import SatlibError


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise SatlibError(f"{message}; --help shows what there is")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 2 for bad input, 130 when stopped by Ctrl-C."""
    parser = _Parser(prog="python -m satlib", description="Shared adversarial training, reproduced step by step.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_run(commands)
    add_sweep(commands, budget, deadline)
    add_train(commands, budget, deadline)
    for add in (add_results, add_bench, add_verify, add_data, add_ledger):
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


def deadline(seconds: float | None) -> float | None:
    """When a budget of `seconds` is spent, in seconds since the epoch; set-up by a script counts as well."""
    if seconds is None:
        return None
    return float(os.environ.get("SATLIB_STARTED", time.time())) + seconds


def add_run(commands: Any) -> None:
    """`run`: execute the notebooks."""
    parser = commands.add_parser(
        "run",
        help="execute the notebooks under a profile",
        description="Executes the notebooks under a profile, into notebooks/executed/PROFILE. "
        "Exit status: 0 if every notebook ran, 1 if one failed, 2 for a request that cannot be met, "
        "3 if the budget was spent before the end.",
    )
    parser.add_argument("--profile", default="quick", help="a file of notebooks/profiles (default: quick)")
    parser.add_argument("--only", metavar="04,06", help="only these notebooks, by number or name")
    parser.add_argument("--budget", type=budget, metavar="9m", help="stop cleanly before this time is spent")
    parser.add_argument("--force", action="store_true", help="compute again what is already known")
    parser.add_argument("--check", action="store_true", help="only check the request; needs nothing installed")
    parser.set_defaults(function=_run)


def _run(arguments: argparse.Namespace) -> int:
    from satlib.study import notebooks

    if arguments.check:
        notebooks.check(arguments.profile, only=arguments.only)
        return 0
    return notebooks.run(
        arguments.profile,
        only=arguments.only,
        deadline=deadline(arguments.budget),
        force=arguments.force,
    )


if __name__ == "__main__":
    sys.exit(main())
