"""Files that appear whole or not at all, on the disk when a call returns; an unwritable disk is one clear error."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import Timeout

from satlib.errors import SatlibError


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a full, read-only or otherwise unwritable disk into one clear `SatlibError`."""
    try:
        yield
    except Timeout:
        raise
    except OSError as error:
        free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
        raise SatlibError(
            f"{folder} cannot be written ({error.strerror}; {free:,} bytes are free there); free some space,"
            " make it writable, or go elsewhere (the ledger with SATLIB_HOME)"
        ) from error


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file's path; what is written there becomes `path` at the end, so that readers find the old or the new."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        yield new
        sync(new)
        os.replace(new, path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            new.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file, or replace it."""
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            new.write_text(text, encoding="utf-8")
