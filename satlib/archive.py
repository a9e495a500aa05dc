"""Runs as files: the form of a record, its checks, safe writing, and archives that carry runs to others.

`satlib.ledger` looks runs up and makes them; here is what one looks like on a disk and in a tar file.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import math
import os
import re
import reprlib
import secrets
import shutil
import tarfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import safetensors.torch
from filelock import Timeout
from torch import Tensor

from satlib.errors import SatlibError

if TYPE_CHECKING:
    from satlib.ledger import Ledger

RUN_ID = re.compile(r"[0-9a-f]{64}")
ARTEFACT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,80}\.(safetensors|npz)")


class Damage(Exception):
    """A file of a run is not what its record says; the text names the file."""


# Canonical JSON and the run's id


def check_json(value: object, where: str) -> None:
    """Raise `SatlibError`, naming the place, unless `value` is plain JSON: no tuple, array, tensor or NaN."""
    kind = type(value)
    if isinstance(value, dict) and kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise SatlibError(f"{where}: the key {key!r} is {type(key).__name__}, expected str; quote it")
            check_json(item, f"{where}[{key!r}]")
    elif isinstance(value, list) and kind is list:
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]")
    elif isinstance(value, float) and kind is float and not math.isfinite(value):
        raise SatlibError(f"{where} is {value}, expected a finite number; use None where there is none")
    elif kind not in (str, int, float, bool, NoneType):
        shown = " ".join(reprlib.repr(value).split())
        raise SatlibError(
            f"{where} is {shown} ({kind.__module__}.{kind.__qualname__}), expected plain JSON (dict, list,"
            " str, int, float, bool, None); convert it with list(...), .tolist(), .item() or asdict(...)"
        )


def _integral(value: Any) -> Any:
    """The same JSON value with floats such as 8.0 written as 8, so that both mean the same run."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _integral(item) for key, item in value.items()}
    return [_integral(item) for item in value] if isinstance(value, list) else value


def digest_of(value: object) -> str:
    """SHA-256 (hex) of canonical JSON: keys sorted, no spaces, ASCII, integral floats as integers, no NaN."""
    text = json.dumps(_integral(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class RunSpec:
    """What makes a run: equal specs have equal ids and are computed once.

    `kind` names the computation and `version` is its hand-bumped version; `config` holds every setting as
    plain JSON; `data` is the data set's fingerprint ("" for none); `parents` maps a role to the id of a run
    it builds on.
    """

    kind: str
    config: dict
    version: int
    data: str = ""
    parents: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        expected = {"kind": str, "config": dict, "version": int, "data": str, "parents": dict}
        for name, kind in expected.items():
            value = getattr(self, name)
            if type(value) is not kind:
                raise SatlibError(f"RunSpec.{name} is {reprlib.repr(value)}, expected {kind.__name__}")
            check_json(value, name)
        for role, run_id in self.parents.items():
            if not (isinstance(run_id, str) and RUN_ID.fullmatch(run_id)):
                raise SatlibError(f"parents[{role!r}] is {run_id!r}, expected a run id such as RunSpec.id")
        # A snapshot, so that editing the caller's dict later cannot part the spec from its id.
        object.__setattr__(self, "config", _integral(self.config))
        object.__setattr__(self, "parents", dict(self.parents))

    @functools.cached_property
    def id(self) -> str:
        """64 hex digits."""
        return digest_of({f.name: getattr(self, f.name) for f in dataclass_fields(self)})

    def __hash__(self) -> int:
        return hash(self.id)


# Records


@dataclass(frozen=True)
class Record:
    """One finished run, as read from `path / "record.json"`.

    `metrics` holds numbers as numbers (None where there is none); `artefacts` maps a file name to its
    `sha256` and `bytes`; `labels` (profile, titles, section ...) are not part of the id; `created` is UTC
    in ISO 8601.
    """

    id: str
    kind: str
    version: int
    config: dict
    data: str
    parents: dict[str, str]
    labels: dict
    metrics: dict
    artefacts: dict[str, dict]
    wall_seconds: float
    device: str
    versions: dict[str, str]
    commit: str | None
    dirty: bool | None
    created: str
    digest: str
    path: Path

    @property
    def seed(self) -> int | None:
        """The seed among the config or the labels, None where the run has none."""
        return self.config.get("seed", self.labels.get("seed"))

    def file(self, name: str) -> str | None:
        """File name of the artefact `name` (with or without its ending), None if the run has none such."""
        return next((f for f in (name, f"{name}.safetensors", f"{name}.npz") if f in self.artefacts), None)

    def has(self, name: str) -> bool:
        """Whether the artefact `name` is listed and its file is here."""
        file = self.file(name)
        return file is not None and (self.path / file).is_file()

    def read(self, name: str) -> bytes:
        """Content of the artefact `name`, checked. Raises `SatlibError` if it is absent or damaged."""
        file = self.file(name)
        if file is None:
            listed = ", ".join(self.artefacts) or "none"
            raise SatlibError(f"run {self.id[:12]} ({self.kind}) has no artefact {name!r}; it has: {listed}")
        try:
            content = (self.path / file).read_bytes()
        except FileNotFoundError:
            raise SatlibError(
                f"{self.path / file} is not here: this record was published or packed without it;"
                f" recompute run {self.id[:12]} ({self.kind}) with force=True to have it"
            ) from None
        if hashlib.sha256(content).hexdigest() != self.artefacts[file]["sha256"]:
            raise SatlibError(f"{self.path / file} is damaged (its SHA-256 is not the recorded one); run it again")
        return content

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors (on the CPU) of the artefact saved with `Workspace.save_tensors(name, ...)`."""
        return safetensors.torch.load(self.read(name))

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of the artefact saved with `Workspace.save_arrays(name, ...)`."""
        with np.load(io.BytesIO(self.read(name)), allow_pickle=False) as archive:
            return dict(archive)


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "kind", "data", "device", "created", "digest"), (str,)),
    **dict.fromkeys(("config", "parents", "labels", "metrics", "artefacts", "versions"), (dict,)),
    "version": (int,),
    "wall_seconds": (int, float),
    "commit": (str, NoneType),
    "dirty": (bool, NoneType),
}


def render_record(content: dict) -> bytes:
    """The one text of `record.json` for `content`, whose digest is filled in here."""
    content = {name: value for name, value in content.items() if name != "digest"}
    content["digest"] = digest_of(content)
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def parse_record(text: bytes, folder: Path) -> Record:
    """The record in the bytes of `folder / "record.json"`. Raises `Damage` unless every check passes."""
    where = folder / "record.json"
    try:
        content = json.loads(text)
        for name, kinds in _TYPES.items():
            if type(content[name]) not in kinds:
                raise Damage(f"{where}: {name} has the wrong type")
        # Byte for byte: not even a flip that leaves the JSON value alone (1e-05, 1E-05) goes unseen.
        if render_record(content) != text:
            raise Damage(f"{where}: its digest does not match its content")
        spec = RunSpec(**{f.name: content[f.name] for f in dataclass_fields(RunSpec)})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damage(f"{where}: not a record ({type(error).__name__})") from None
    if not content["id"] == spec.id == folder.name:
        raise Damage(f"{where}: its id is not that of its folder and content")
    for name, entry in content["artefacts"].items():
        listed = type(entry) is dict and type(entry.get("bytes")) is int and type(entry.get("sha256")) is str
        if not (listed and ARTEFACT_NAME.fullmatch(name) and entry["bytes"] >= 0):
            raise Damage(f"{where}: the artefact {name!r} is not listed properly")
    return Record(**{name: content[name] for name in _TYPES}, path=folder)


_seen: dict[Path, tuple[tuple[int, ...], str]] = {}  # file -> (stamp, SHA-256): a look-up hashes a file once


def _file_digest(path: Path) -> str:
    status = path.stat()
    stamp = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if path in _seen and _seen[path][0] == stamp:
        return _seen[path][1]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # Within one tick of the clock a file may change again under the same stamp: remember settled files only.
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > 2_000_000_000:
        _seen[path] = (stamp, digest)
    return digest


def read_record(folder: Path, *, artefacts: bool = True) -> Record | None:
    """The record in `folder`, None if there is no folder. Raises `Damage`, naming the file, if unsound.

    With `artefacts` the SHA-256 of each artefact that is here is checked too; one that is not here is no
    damage, because records travel without their large artefacts.
    """
    try:
        record = parse_record((folder / "record.json").read_bytes(), folder)
        for name, entry in record.artefacts.items() if artefacts else ():
            with contextlib.suppress(FileNotFoundError):
                if _file_digest(folder / name) != entry["sha256"]:
                    raise Damage(f"{folder / name}: its SHA-256 is not the recorded one")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        if not folder.exists():
            return None
        raise Damage(f"{error.filename}: {error.strerror}") from None
    except OSError as error:
        if error.errno == errno.EIO:
            raise Damage(f"{error.filename or folder}: {error.strerror}") from None
        raise SatlibError(f"{error.filename or folder} cannot be read ({error.strerror}); mend that") from error
    return record


# Writing


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


# Archives

_MEMBER = re.compile(rf"({RUN_ID.pattern})/(record\.json|{ARTEFACT_NAME.pattern})")
_SMALL = 1_000_000  # bytes; larger artefacts are the first to stay behind


def _padded(size: int, unit: int = tarfile.BLOCKSIZE) -> int:
    """Bytes that `size` bytes take in a tar file, which counts in whole blocks."""
    return -(-size // unit) * unit


@dataclass(frozen=True)
class Packed:
    """What went into an archive: ids, what stayed behind as (name, reason), and the size in bytes."""

    packed: list[str]
    left_out: list[tuple[str, str]]
    bytes: int


@dataclass(frozen=True)
class Merged:
    """What came out of archives: ids merged, ids already there, and (name, reason) of what was refused."""

    merged: list[str]
    present: list[str]
    refused: list[tuple[str, str]]


def pack(ledger: "Ledger", out: Path, ids: Iterable[str] | None, max_mb: float | None) -> Packed:
    """See `Ledger.pack`."""
    if max_mb is not None and not max_mb > 0:
        raise SatlibError(f"max_mb is {max_mb}, expected a positive number of megabytes")
    if ids is None:
        records = [record for record in ledger.records() if record.path.parent == ledger.runs]
    else:
        named = {record.id: record for record in map(ledger.get, ids)}
        records = sorted(named.values(), key=lambda record: (record.created, record.id))
    limit = math.inf if max_mb is None else max_mb * 1_000_000
    chosen: dict[str, bytes | tuple[Record, str]] = {}
    packed: list[str] = []
    left_out: list[tuple[str, str]] = []
    used = 0
    for position, listed in enumerate(records):
        record = ledger.find(listed.id)
        if record is None:
            left_out.append((listed.id, "damaged"))
            continue
        text = (record.path / "record.json").read_bytes()
        files = sorted(file for file in record.artefacts if record.has(file))
        small = [file for file in files if record.artefacts[file]["bytes"] <= _SMALL]
        for kept in (files, small):
            sizes = [len(text), *(record.artefacts[file]["bytes"] for file in kept)]
            size = sum(tarfile.BLOCKSIZE + _padded(size) for size in sizes)  # a header each
            if _padded(used + size + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE) <= limit:
                break
        else:
            left_out += [(later.id, f"does not fit in {max_mb} MB") for later in records[position:]]
            break
        left_out += [(f"{record.id}/{file}", f"does not fit in {max_mb} MB") for file in files if file not in kept]
        chosen[f"{record.id}/record.json"] = text
        chosen |= {f"{record.id}/{file}": (record, file) for file in kept}
        packed.append(record.id)
        used += size
    if not packed:
        raise SatlibError(
            f"{out}: no run to pack in {ledger.runs} ({len(left_out)} left out); raise max_mb or run some"
        )
    new = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        with writing(out.parent), new.open("xb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for name, source in chosen.items():
                    content = source if isinstance(source, bytes) else source[0].read(source[1])
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
            file.flush()
            os.fsync(file.fileno())
            os.replace(new, out)
    finally:
        with contextlib.suppress(OSError):
            new.unlink()
    return Packed(packed, left_out, out.stat().st_size)


@dataclass(frozen=True)
class Limits:
    """Sizes beyond which an archive's content is refused, in bytes (and a count of members)."""

    record: int = 4_000_000
    artefact: int = 4_000_000_000
    total: int = 64_000_000_000
    members: int = 200_000


def _walk(file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """(header, offset of its data) of each member of a plain tar file, without any of tar's extensions.

    tarfile decodes the headers; its own walk would follow extensions and stop silently at a broken header.
    """
    end = os.fstat(file.fileno()).st_size
    while (block := file.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
        header = tarfile.TarInfo.frombuf(block, "ascii", "surrogateescape")
        if header.type not in b"01234567\0" or header.size < 0:
            raise tarfile.ReadError(f"a header of type {header.type!r} and size {header.size} at {file.tell()}")
        start = file.tell()
        yield header, start
        if start + header.size > end:
            raise tarfile.ReadError(f"{header.name!r} is said to have {header.size} bytes, more than there are")
        file.seek(start + _padded(header.size))


def merge(ledger: "Ledger", files: Iterable[Path], limits: Limits) -> Merged:
    """See `Ledger.merge`."""
    files = [Path(file) for file in files]
    for path in files:
        if not path.is_file():
            raise SatlibError(f"{path}: no such file, expected an archive made by `ledger pack`")
    result = Merged([], [], [])
    for path in files:
        with path.open("rb") as file:
            for run_id, members in _entries(file, path, limits, result.refused).items():
                try:
                    new = _merge_run(ledger, file, run_id, members)
                except (Damage, Timeout) as error:
                    reason = "another process works on this run" if isinstance(error, Timeout) else str(error)
                    result.refused.append((run_id, reason))
                else:
                    (result.merged if new else result.present).append(run_id)
    return result


def _entries(file: BinaryIO, path: Path, limits: Limits, refused: list) -> dict[str, dict[str, tuple[int, int]]]:
    """Runs of an archive: id -> file name -> (offset, size). What breaks a rule goes to `refused`."""
    runs: dict[str, dict[str, tuple[int, int]]] = {}
    bad: dict[str, str] = {}
    run_id, total = "", 0
    try:
        for count, (header, offset) in enumerate(_walk(file), 1):
            total += header.size
            if count > limits.members or total > limits.total:
                raise tarfile.ReadError(f"more than {limits.members} members or {limits.total} bytes")
            match = _MEMBER.fullmatch(header.name)
            if match is None:
                refused.append((ascii(header.name), "not the name of a run's file"))
                continue
            run_id, name = match[1], match[2]
            members = runs.setdefault(run_id, {})
            if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                bad[run_id] = f"{name} is no regular file (type {header.type!r})"
            elif name in members:
                bad[run_id] = f"{name} comes twice"
            elif header.size > (limits.record if name == "record.json" else limits.artefact):
                bad[run_id] = f"{name} has {header.size} bytes, too many"
            members[name] = (offset, header.size)
    except tarfile.TarError as error:
        refused.append((str(path), f"not a sound plain tar file, read no further: {error}"))
        if run_id:
            bad.setdefault(run_id, "the archive breaks off in it")
    refused += bad.items()
    return {run_id: members for run_id, members in runs.items() if run_id not in bad}


def _merge_run(ledger: "Ledger", file: BinaryIO, run_id: str, members: dict[str, tuple[int, int]]) -> bool:
    """Check one run and install it; False if it is already there. Raises `Damage`."""
    if "record.json" not in members:
        raise Damage("has no record.json")
    offset, size = members.pop("record.json")
    file.seek(offset)
    text = file.read(size)
    record = parse_record(text, Path(run_id))
    for name, (_, size) in members.items():
        if name not in record.artefacts:
            raise Damage(f"{name} is not listed in the record")
        if size != record.artefacts[name]["bytes"]:
            raise Damage(f"{name} has {size} bytes, the record says {record.artefacts[name]['bytes']}")
    with ledger.holding(run_id, wait=False), new_folder(ledger.runs, run_id) as folder:
        here = ledger.find(run_id, locked=True)
        # A run that is here stays, unless the archive has all of its artefacts and more.
        if here is not None and not {name for name in here.artefacts if here.has(name)} < set(members):
            return False
        with writing(ledger.runs):
            write_file(folder / "record.json", text)
            for name, (offset, size) in members.items():
                file.seek(offset)
                content = file.read(size)
                if hashlib.sha256(content).hexdigest() != record.artefacts[name]["sha256"]:
                    raise Damage(f"{name}: its SHA-256 is not the recorded one")
                write_file(folder / name, content)
            install(folder, ledger.runs / run_id)
    return True
