"""Where and with what a run was made."""

import functools
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

import satlib
from satlib.device import device_name, used_dtype
from satlib.paths import project_root


@functools.cache
def commit() -> tuple[str | None, bool | None]:
    """The commit of the project's checkout and whether satlib differs from it; (None, None) without one.

    SATLIB_COMMIT (`HASH` or `HASH+changes`) says so where satlib came without its checkout.
    """
    if said := os.environ.get("SATLIB_COMMIT"):
        name, _, changes = said.partition("+")
        return name, bool(changes)
    root = project_root().resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None, None  # a folder inside somebody else's repository
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", "satlib"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def provenance() -> dict:
    """Device, versions and number format, commit (with whether satlib differs from it) and time, as in a record."""
    known, dirty = commit()
    versions = {"satlib": satlib.__version__, "python": platform.python_version()}
    versions |= {"torch": str(torch.__version__), "numpy": np.__version__}
    if used := used_dtype():
        versions["convolutions"] = str(used).removeprefix("torch.")
    created = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {"device": device_name(), "versions": versions, "commit": known, "dirty": dirty, "created": created}
