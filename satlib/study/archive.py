"""Archives that carry runs to other machines: written plain, and read without trust."""

import contextlib
import hashlib
import io
import math
import os
import re
import secrets
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from filelock import Timeout

from satlib.errors import SatlibError
from satlib.files import install, new_folder, write_file, writing
from satlib.study.records import ARTEFACT_NAME, RUN_ID, Damage, Record, parse_record
from satlib.study.workspace import CHECKPOINT, is_checkpoint

if TYPE_CHECKING:
    from satlib.study.ledger import Ledger

_MEMBER = re.compile(rf"({RUN_ID.pattern})/(record\.json|{ARTEFACT_NAME.pattern})")
_SMALL = 1_000_000  # bytes; larger artefacts are the first to stay behind


def _padded(size: int, unit: int = tarfile.BLOCKSIZE) -> int:
    """Bytes that `size` bytes take in a tar file, which counts in whole blocks."""
    return -(-size // unit) * unit


@dataclass(frozen=True)
class Packed:
    """What went into an archive: ids of runs, and of unfinished ones; (name, reason) of what stayed behind; bytes."""

    packed: list[str]
    unfinished: list[str]
    left_out: list[tuple[str, str]]
    bytes: int


@dataclass(frozen=True)
class Merged:
    """What came out of archives: ids merged (unfinished: with their checkpoint alone), already there, and refused."""

    merged: list[str]
    unfinished: list[str]
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
    unfinished = []
    for path in sorted(ledger.runs.glob(f".work/*/{CHECKPOINT}")) if ids is None else ():
        run_id = path.parent.name
        content = path.read_bytes()
        size = tarfile.BLOCKSIZE + _padded(len(content))
        if (ledger.runs / run_id).exists() or not is_checkpoint(content):
            continue
        if _padded(used + size + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE) > limit:
            left_out.append((f"{run_id}/{CHECKPOINT}", f"does not fit in {max_mb} MB"))
            continue
        chosen[f"{run_id}/{CHECKPOINT}"] = content
        unfinished.append(run_id)
        used += size
    if not packed and not unfinished:
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
    return Packed(packed, unfinished, left_out, out.stat().st_size)


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
    result = Merged([], [], [], [])
    for path in files:
        with path.open("rb") as file:
            for run_id, members in _entries(file, path, limits, result.refused).items():
                whole = set(members) != {CHECKPOINT}
                try:
                    new = (_merge_run if whole else _merge_checkpoint)(ledger, file, run_id, members)
                except (Damage, Timeout) as error:
                    reason = "another process works on this run" if isinstance(error, Timeout) else str(error)
                    result.refused.append((run_id, reason))
                else:
                    (result.present if not new else result.merged if whole else result.unfinished).append(run_id)
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


def _merge_checkpoint(ledger: "Ledger", file: BinaryIO, run_id: str, members: dict[str, tuple[int, int]]) -> bool:
    """Check an unfinished run's checkpoint and put it in place; False if the run is known. Raises `Damage`."""
    offset, size = members[CHECKPOINT]
    file.seek(offset)
    content = file.read(size)
    if not is_checkpoint(content):
        raise Damage(f"{CHECKPOINT}: its SHA-256 is not the recorded one")
    target = ledger.runs / ".work" / run_id / CHECKPOINT
    with ledger.holding(run_id, wait=False), writing(ledger.runs):
        if target.exists() or ledger.find(run_id, locked=True) is not None:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(new := target.with_suffix(".new"), content)
        os.replace(new, target)
    return True
