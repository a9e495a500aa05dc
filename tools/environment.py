"""Prints the path of a Python that has what satlib needs, setting up `.venv` in this checkout if none has.

Called by run_all.sh and run_tests.sh with the names of the extras (`notebooks,test`), before anything is
installed. The Python that runs this file serves if it has everything already; else `.venv` does, at the
versions of constraints.txt. A stamp in `.venv` makes the next call instant; an installation that was cut off
is resumed. What happens is told on stderr. Exit status: 2 if the machine cannot hold the environment, 1 if
pip fails.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "satlib.stamp"
LOG = VENV / "setup.log"
STEPS = re.compile(r"\s*(Collecting|Downloading|Processing|Installing|Building)\b.{0,60}")
FREE_BYTES = 8e9  # torch with its CUDA libraries, unpacked, and room for what pip unpacks them from
EVERY_SECONDS = 10


def say(text: str) -> None:
    print(f"satlib: {text}", file=sys.stderr, flush=True)


def fail(text: str, status: int = 2) -> None:
    say(text)
    sys.exit(status)


def main(extras: str) -> None:
    wanted = set(extras.split(","))
    if Path(sys.prefix).resolve() != VENV.resolve() and serves(requirements(wanted)):
        print(sys.executable)
        return
    if not is_ready(wanted):
        check_space()
        with locked():
            if not is_ready(wanted):
                set_up(extras)
                STAMP.write_text(f"{fingerprint()} {extras}")
    print(PYTHON)


def requirements(extras: set[str]) -> list[str]:
    """What pyproject.toml asks for, as `name>=version`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    return project["dependencies"] + [each for extra in extras for each in optional[extra]]


def serves(wanted: list[str]) -> bool:
    """Whether this Python has all of `wanted`, at versions that will do."""
    try:
        from packaging.requirements import Requirement  # comes with what is asked for

        for requirement in map(Requirement, wanted):
            if not requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True):
                return False
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return False
    return True


def fingerprint() -> str:
    """Of all that decides what `.venv` holds."""
    files = (ROOT / "pyproject.toml", ROOT / "constraints.txt")
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def is_ready(extras: set[str]) -> bool:
    """Whether `.venv` was set up to the end, with these extras, as the project's files ask for it now."""
    if not (STAMP.is_file() and os.access(PYTHON, os.X_OK)):
        return False
    stamped, _, installed = STAMP.read_text().partition(" ")
    return stamped == fingerprint() and extras <= set(installed.split(","))


def check_space() -> None:
    free = shutil.disk_usage(ROOT).free
    if not has_torch() and free < FREE_BYTES:
        fail(
            f"{free / 1e9:.1f} GB free on the disk of {ROOT}, expected {FREE_BYTES / 1e9:.0f} GB for .venv; "
            "free some, or activate an environment that has what pyproject.toml asks for"
        )


def has_torch() -> bool:
    return any(VENV.glob("lib/python*/site-packages/torch-*.dist-info"))


@contextlib.contextmanager
def locked():
    """One set-up at a time; a second caller waits for the first and then finds its work done."""
    try:
        VENV.mkdir(exist_ok=True)
        lock = open(VENV / "satlib.lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        fail(f"cannot write to {VENV} ({error.strerror}); make it writable, or activate an environment")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"another call is setting up {VENV}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def set_up(extras: str) -> None:
    start = time.monotonic()
    version = ".".join(map(str, sys.version_info[:3]))
    size = "" if has_torch() else " (up to 3 GB to download, 6 GB on disk, a few minutes)"
    say(f"setting up {VENV} with Python {version}{size}")
    LOG.write_text("")
    if not works():
        shutil.rmtree(VENV / "bin", ignore_errors=True)  # a link to a Python that is gone would be kept
        call([sys.executable, "-m", "venv", str(VENV)], start)
    drop_half_installed()
    pip = [str(PYTHON), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    call([*pip, "--progress-bar=off", "-c", "constraints.txt", "-e", f".[{extras}]"], start)
    say(f"set up in {time.monotonic() - start:.0f} s")


def works() -> bool:
    try:
        return subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def drop_half_installed() -> None:
    """A package at which pip was cut off would count as installed; INSTALLER is what pip writes at its end."""
    for folder in VENV.glob("lib/python*/site-packages/*.dist-info"):
        if not (folder / "INSTALLER").exists():
            shutil.rmtree(folder)


def call(command: list[str], start: float) -> None:
    """Runs `command` with its output in the log, telling every few seconds how far it is."""
    state = "starting"

    def follow(lines) -> None:
        nonlocal state
        with LOG.open("a") as file:
            for line in lines:
                print(line, end="", file=file, flush=True)
                if step := STEPS.match(line):
                    state = step[0].strip()

    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    reader = threading.Thread(target=follow, args=(process.stdout,))
    reader.start()
    try:
        while process.poll() is None:
            try:
                process.wait(EVERY_SECONDS)
            except subprocess.TimeoutExpired:
                say(f"{time.monotonic() - start:.0f} s: {state}")
    finally:  # Ctrl-C ends pip as well
        process.terminate()
        process.wait()
        reader.join()
    if process.returncode:
        sys.stderr.write("".join(LOG.read_text().splitlines(keepends=True)[-12:]))
        fail(f"setting up {VENV} failed; the end of {LOG} is above. The same command tries again", 1)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        fail("stopped; the same command goes on from here", 130)
