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


def write_file(path: Path, *parts: bytes | memoryview) -> None:
    """Write a new file and have it on the disk when this returns."""
    with path.open("xb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file, or replace it, so that readers find the old or the new one whole."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            new.write_text(text, encoding="utf-8")
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_folder(store: Path, run_id: str) -> Iterator[Path]:
    """A temporary folder beside the runs of `store`; gone at the end unless it was installed."""
    folder = store / ".tmp" / f"{run_id}.{secrets.token_hex(4)}"
    with writing(store):
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def install(folder: Path, target: Path) -> None:
    """Make the complete `folder` appear as `target`, in place of what is there. The caller holds the lock."""
    sync_folder(folder)
    replaced = folder.parent / f"{target.name}.replaced"
    if target.exists():
        os.rename(target, replaced)  # Ledger._mend puts it back if a kill comes before the next line is done
    os.rename(folder, target)
    sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
