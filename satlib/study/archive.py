"""Archives that carry runs to other machines: written plain, and read without trust."""

import contextlib
import io
import math
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from filelock import Timeout

from satlib.checks import check
from satlib.errors import SatlibError
from satlib.files import replacing, writing
from satlib.study.ledger import OLDEST_FIRST, Ledger, new_run
from satlib.study.records import ARTEFACT_NAME, CHECKPOINT, RUN_ID, Damage, is_checkpoint, read_record

MEMBER = re.compile(rf"({RUN_ID.pattern})/(record\.json|{CHECKPOINT}|{ARTEFACT_NAME.pattern})")


@dataclass(frozen=True)
class Packed:
    """What went into archives: ids of runs, and of unfinished ones; (name, reason) of what stayed behind; the files."""

    packed: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Merged:
    """What came out of archives: ids merged (unfinished: with their checkpoint alone), already there, and refused."""

    merged: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)


def pack(ledger: Ledger, out: Path | str, ids: Iterable[str] | None = None, *, max_mb: float | None = None) -> Packed:
    """Write a plain tar of `runs/` (or of the runs that `ids` or their first digits name), oldest first.

    All of `runs/` includes the checkpoints of unfinished runs, so that another machine goes on from there. max_mb:
    write as many archives as it takes, OUT-1.tar and so on, none larger than that (in MB) unless a single run is.
    Raises `SatlibError` where there is nothing to pack.
    """
    check("a positive number of MB", lambda value: value is None or value > 0, max_mb=max_mb)
    out, result, used = Path(out), Packed(), math.inf
    limit = None if max_mb is None else max_mb * 1e6 - tarfile.RECORDSIZE  # which an archive ends with, at most
    with writing(out.parent), contextlib.ExitStack() as part:
        for run_id, members in _contents(ledger, ids, result):
            size = sum(tarfile.BLOCKSIZE * (1 - -len(content) // tarfile.BLOCKSIZE) for content in members.values())
            if not result.files or (limit is not None and used + size > limit):
                part.close()
                number = len(result.files) + 1
                result.files.append(out if limit is None else out.with_name(f"{out.stem}-{number}{out.suffix}"))
                new = part.enter_context(replacing(result.files[-1]))
                tar, used = part.enter_context(tarfile.open(new, "x:", format=tarfile.USTAR_FORMAT)), 0.0
            for name, content in members.items():
                member = tarfile.TarInfo(f"{run_id}/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            used += size
            (result.unfinished if CHECKPOINT in members else result.packed).append(run_id)
    if not result.files:
        raise SatlibError(f"{out}: no run to pack in {ledger.runs} ({len(result.left_out)} left out); run some")
    return result


def _contents(ledger: Ledger, ids: Iterable[str] | None, result: Packed) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The runs to pack, and what each has, by the names of its files; what is damaged is noted in the result."""
    if ids is None:
        records = [record for record in ledger.records() if record.path.parent == ledger.runs]
    else:
        records = sorted({record.id: record for record in map(ledger.get, ids)}.values(), key=OLDEST_FIRST)
    for listed in records:
        if (record := ledger.find(listed.id)) is None:
            result.left_out.append((listed.id, "damaged"))
            continue
        own = {name: record.read(name) for name in sorted(filter(record.has, record.artefacts))}
        yield record.id, {"record.json": (record.path / "record.json").read_bytes()} | own
    for path in sorted(ledger.runs.glob(f".work/*/{CHECKPOINT}")) if ids is None else ():
        run_id, content = path.parent.name, path.read_bytes()
        if is_checkpoint(content) and not (ledger.runs / run_id).exists():
            yield run_id, {CHECKPOINT: content}


def merge(ledger: Ledger, files: Iterable[Path | str]) -> Merged:
    """Take over the runs of archives that `pack` wrote elsewhere; a run that is here stays as it is.

    Archives are not trusted: only plain files named `<id>/<file>` that their record lists are taken,
    ids and hashes are checked before a run appears, and no artefact is opened. What breaks a rule is
    refused by name; the rest is merged.
    """
    paths, result = [Path(file) for file in files], Merged()
    for path in paths:
        if not path.is_file():
            raise SatlibError(f"{path}: no such file, expected an archive made by `ledger pack`")
    for path in paths:
        for run_id, members in _runs_of(path, result.refused).items():
            take, taken = _take_run, result.merged
            if set(members) == {CHECKPOINT}:
                take, taken = _take_checkpoint, result.unfinished
            try:
                with tarfile.open(path, "r:") as tar, ledger.holding(run_id, wait=False), writing(ledger.runs):
                    (taken if take(ledger, tar, run_id, members) else result.present).append(run_id)
            except Timeout:
                result.refused.append((run_id, "another process works on this run"))
            except (Damage, tarfile.TarError) as error:
                result.refused.append((run_id, str(error)))
    return result


def _runs_of(path: Path, refused: list[tuple[str, str]]) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Runs of an archive: id -> file name -> header. What breaks a rule goes to `refused`."""
    runs: dict[str, dict[str, tarfile.TarInfo]] = {}
    bad: dict[str, str] = {}
    run_id = ""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:", encoding="ascii") as tar:
            for header in tar:
                if header.size < 0:
                    raise tarfile.ReadError(f"a file of size {header.size}")
                match = MEMBER.fullmatch(header.name)
                if match is None:
                    refused.append((ascii(header.name), "not the name of a run's file"))
                    continue
                run_id, name = match[1], match[2]
                members = runs.setdefault(run_id, {})
                if not header.isreg() or header.issparse():
                    bad[run_id] = f"{name} is no regular file (type {header.type!r})"
                elif name in members:
                    bad[run_id] = f"{name} comes twice"
                members[name] = header
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a broken header for the end
                raise tarfile.ReadError("no end")
    except tarfile.TarError as error:
        refused.append((str(path), f"not a sound plain tar file, read no further: {error}"))
        if run_id:
            bad.setdefault(run_id, "the archive breaks off in it")
    refused += bad.items()
    return {run_id: members for run_id, members in runs.items() if run_id not in bad}


def _take_run(ledger: Ledger, tar: tarfile.TarFile, run_id: str, members: dict[str, tarfile.TarInfo]) -> bool:
    """Check one run and install it; False if it is already there. Raises `Damage`."""
    if "record.json" not in members:
        raise Damage("has no record.json")
    here = ledger.find(run_id, locked=True)
    # A run that is here stays, unless the archive has all of its artefacts and more.
    if here is not None and not {"record.json", *filter(here.has, here.artefacts)} < members.keys():
        return False
    with new_run(ledger.runs / run_id) as folder:
        for header in members.values():
            tar.extract(header, folder.parent, set_attrs=False, filter="data")
        if (record := read_record(folder)) and (unlisted := members.keys() - {"record.json", *record.artefacts}):
            raise Damage(f"{min(unlisted)} is not listed in the record")
    ledger.forget_failure(run_id)
    return True


def _take_checkpoint(ledger: Ledger, tar: tarfile.TarFile, run_id: str, members: dict[str, tarfile.TarInfo]) -> bool:
    """Check an unfinished run's checkpoint and put it in place; False if the run is known. Raises `Damage`."""
    content = file.read() if (file := tar.extractfile(members[CHECKPOINT])) else b""
    if not is_checkpoint(content):
        raise Damage(f"{CHECKPOINT}: its SHA-256 is not the recorded one")
    target = ledger.runs / ".work" / run_id / CHECKPOINT
    if target.exists() or ledger.find(run_id, locked=True) is not None:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as new:
        new.write_bytes(content)
    return True
