"""The ledger: content-addressed run records, so that nothing is computed twice and no number is typed.

`<root>/runs/<id>/` holds `record.json` beside the run's `*.safetensors` and `*.npz` artefacts;
`<root>/ledger/<id>/`, which is tracked, has the same layout for published records and may lack the larger
artefacts. The id is the SHA-256 of what the run is made of (`RunSpec`). A run appears by one rename of a
complete folder, is written under a lock of its own, and every look-up checks every hash. No pickle is ever
read or written.
"""

import contextlib
import json
import os
import secrets
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from pathlib import Path

from filelock import FileLock, Timeout

from satlib.errors import SatlibError
from satlib.files import sync, write_text, writing
from satlib.paths import project_root
from satlib.study import records
from satlib.study.provenance import provenance
from satlib.study.records import (
    RUN_ID,
    Damage,
    DamageWarning,
    Record,
    RunSpec,
    Workspace,
    artefact_entry,
    check_json,
    halved,
    parse_record,
    render_record,
)

OLDEST_FIRST = attrgetter("created", "id")


@contextlib.contextmanager
def new_run(target: Path) -> Iterator[Path]:
    """A temporary folder beside the runs that becomes `target`, in place of what is there, if it has a record.

    Without `record.json`, or after an exception, nothing of it stays. The caller holds the run's lock.
    """
    scratch = target.parent / ".tmp" / f"{target.name}.{secrets.token_hex(4)}"
    folder, replaced = scratch / target.name, scratch.with_name(f"{target.name}.replaced")
    with writing(target.parent):
        folder.mkdir(parents=True)
    try:
        yield folder
        if (folder / "record.json").exists():
            with writing(target.parent):
                for path in (*folder.iterdir(), folder):
                    sync(path)
                if target.exists():
                    os.rename(target, replaced)  # Ledger._mend puts it back if a kill comes before the next line
                os.rename(folder, target)
                sync(target.parent)
                shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class Ledger:
    """The runs under `root` (default: the project's `data` folder)."""

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = Path(root).absolute() if root is not None else project_root() / "data"
        self.runs = self.root / "runs"
        self.ledger = self.root / "ledger"
        self._sweep()

    def __repr__(self) -> str:
        return f"Ledger({str(self.root)!r})"

    # Looking up

    def find(self, run_id: str, artefacts: Iterable[str] = (), *, locked: bool = False) -> Record | None:
        """The record of `run_id` that has all `artefacts` here, checked; None if there is none.

        Runs come before published records. Damage is named in a `DamageWarning` and never used: a damaged
        run is moved to `<root>/damaged`; a damaged published record stays, since it is tracked. `locked`:
        the caller holds `lock(run_id)`.
        """
        if not (isinstance(run_id, str) and RUN_ID.fullmatch(run_id)):
            raise SatlibError(f"run id {run_id!r}: expected 64 hex digits; Ledger.get takes the first few")
        artefacts = tuple(artefacts)
        for store in (self.runs, self.ledger):
            record = self._look(store / run_id, locked=locked)
            if record is not None and all(record.has(name) for name in artefacts):
                return record
        return None

    def get(self, prefix: str) -> Record:
        """The one record whose id starts with `prefix`. Raises `SatlibError` unless there is exactly one."""
        ids = [run_id for run_id in self.ids() if prefix and run_id.startswith(prefix)]
        if len(ids) > 1:
            raise SatlibError(f"run {prefix!r}: {len(ids)} runs in {self.root} start so; give more digits")
        if not ids or (record := self.find(ids[0])) is None:
            raise SatlibError(f"run {prefix!r}: no sound record in {self.root} starts so; see `ledger status`")
        return record

    def ids(self) -> list[str]:
        """Ids of all runs and published records, sorted; nothing is read or checked."""
        names = (path.name for store in (self.runs, self.ledger) for path in store.glob("*"))
        return sorted({name for name in names if RUN_ID.fullmatch(name)})

    def records(self, *, published: bool = False) -> list[Record]:
        """All sound records, oldest first, each once (runs before published, or published alone); artefacts are not
        hashed."""
        stores = (self.ledger,) if published else (self.runs, self.ledger)
        looks = ((self._look(store / run_id, artefacts=False) for store in stores) for run_id in self.ids())
        return sorted(filter(None, (next(filter(None, look), None) for look in looks)), key=OLDEST_FIRST)

    def _look(self, folder: Path, *, locked: bool = False, artefacts: bool = True) -> Record | None:
        with contextlib.suppress(Damage):
            return records.read_record(folder, artefacts=artefacts)
        # It may only have been replaced while it was read: look again with nobody else at it.
        try:
            with contextlib.nullcontext() if locked else self.lock(folder.name).acquire(timeout=0):
                try:
                    return records.read_record(folder, artefacts=artefacts)
                except Damage as damage:
                    text = f"damaged: {damage}; {self._set_aside(folder)}"
        except OSError as error:  # the run is being computed (Timeout), or the disk is read-only
            for pause in (0.0, 0.01, 0.1, 1.0):  # the writer may be stopped anywhere on a busy machine
                time.sleep(pause)
                with contextlib.suppress(Damage):
                    return records.read_record(folder, artefacts=artefacts)
            text = f"damaged: {folder}; ignored, and not set aside ({error.strerror or 'in use'})"
        warnings.warn(text, DamageWarning, stacklevel=3)
        return None

    def _set_aside(self, folder: Path) -> str:
        if folder.parent == self.ledger:
            return "ignored; mend it with git checkout, or publish the run again"
        number = 1
        while (aside := self.root / "damaged" / f"{folder.name}-{number}").exists():
            number += 1
        aside.parent.mkdir(exist_ok=True)
        os.rename(folder, aside)
        return f"set aside in {aside}"

    # Computing

    def get_or_compute(
        self,
        spec: RunSpec,
        compute: Callable[[Workspace], dict],
        *,
        labels: dict | None = None,
        force: bool = False,
        needs: Iterable[str] = (),
    ) -> Record:
        """The record of `spec`: looked up, or made by `compute(workspace) -> metrics` (plain JSON) and kept.

        One process computes a run; others that want it wait and then find it. `force` computes anew and
        replaces. `needs` names the artefacts that must be here: a record without them is computed again.
        `labels` (plain JSON) are kept beside the metrics; the label `title` also names the run to those who
        wait for it. An exception in `compute` leaves only the checkpoint, for the next attempt to go on from.
        """
        labels, needs, target = dict(labels or {}), tuple(needs), self.runs / spec.id
        check_json(labels, "labels")
        if not force and (record := self.find(spec.id, needs)):
            return record
        with self.holding(spec.id, f"{spec.kind} {labels.get('title', '')}".strip()):
            if not force and (record := self.find(spec.id, needs, locked=True)):
                return record
            with new_run(target) as folder:
                workspace = Workspace(folder, self.runs / ".work" / spec.id)
                if force:
                    workspace.drop_checkpoint()
                metrics = compute(workspace)
                if type(metrics) is not dict:
                    raise SatlibError(f"run kind {spec.kind!r}: compute returned {type(metrics)}, expected a dict")
                check_json(metrics, "metrics")
                text = records.render_record(
                    {"id": spec.id, "kind": spec.kind, "version": spec.version, "config": spec.config}
                    | {"defaults": spec.defaults, "data": spec.data, "parents": spec.parents, "labels": labels}
                    | {"metrics": metrics, "artefacts": workspace.artefacts}
                    | {"wall_seconds": round(workspace.seconds, 3)}
                    | provenance()
                )
                record = records.parse_record(text, target)
                for name in needs:
                    if record.file(name) is None:
                        raise SatlibError(f"run kind {spec.kind!r}: compute saved no artefact {name!r}, expected one")
                # Where locks do not hold, as on some network file systems, somebody else may have been faster.
                if not force and (other := self.find(spec.id, needs, locked=True)):
                    return other
                with writing(self.runs):
                    (folder / "record.json").write_bytes(text)
            workspace.drop_checkpoint()
            self.forget_failure(spec.id)
            return record

    def lock(self, run_id: str) -> FileLock:
        """The lock under which a run is written; the system releases it when its process ends."""
        (self.runs / ".locks").mkdir(parents=True, exist_ok=True)
        return FileLock(self.runs / ".locks" / f"{run_id}.lock")

    @contextlib.contextmanager
    def holding(self, run_id: str, title: str = "", *, wait: bool = True) -> Iterator[None]:
        """Hold the run's lock, with what a killed process left of the run cleared away.

        A wait is announced on stderr with the run's id and title; without `wait`, `filelock.Timeout` is raised.
        """
        with writing(self.runs):
            lock = self.lock(run_id)
            try:
                lock.acquire(timeout=0.2)  # a look-up that found damage, or `busy`, holds it for an instant
            except Timeout:
                if not wait:
                    raise
                text = f"satlib: waiting for run {run_id[:12]} ({title}), which another process is working on"
                print(text, file=sys.stderr, flush=True)
                lock.acquire()
        try:
            with writing(self.runs):
                self._mend(run_id)
            yield
        finally:
            lock.release()

    def note_failure(self, run_id: str, text: str) -> Path:
        """Keep why a run failed, in `<root>/failed`, until it is computed; the file."""
        write_text(path := self._failure(run_id), text)
        return path

    def forget_failure(self, run_id: str) -> None:
        """The run has been computed."""
        self._failure(run_id).unlink(missing_ok=True)

    def _failure(self, run_id: str) -> Path:
        return self.root / "failed" / f"{run_id[:12]}.txt"

    def busy(self, run_id: str) -> bool:
        """Whether a process computes this run right now; a sweep may do another one first."""
        if not (self.runs / ".locks" / f"{run_id}.lock").exists():
            return False
        try:
            with self.lock(run_id).acquire(timeout=0):
                return False
        except Timeout:
            return True

    def _mend(self, run_id: str) -> None:
        """Clear what a killed process left of `run_id`. The caller holds the lock."""
        for store in (self.runs, self.ledger):
            for left in (store / ".tmp").glob(f"{run_id}.*"):
                if left.suffix == ".replaced" and not (store / run_id).exists():
                    os.rename(left, store / run_id)
                else:
                    shutil.rmtree(left, ignore_errors=True)
        for left in (self.runs / ".work" / run_id).glob(".*.new"):
            left.unlink(missing_ok=True)
        if (self.runs / run_id).exists():
            shutil.rmtree(self.runs / ".work" / run_id, ignore_errors=True)

    def _sweep(self) -> None:
        """Clear what killed processes left of runs that nobody works on."""
        left = {path.name[:64] for store in (self.runs, self.ledger) for path in (store / ".tmp").glob("*")}
        left |= {path.name for path in (self.runs / ".work").glob("*") if (self.runs / path.name).exists()}
        for run_id in filter(RUN_ID.fullmatch, left):
            # OSError: in use (Timeout) or a read-only disk; either way it is not ours to clear.
            with contextlib.suppress(OSError), self.lock(run_id).acquire(timeout=0):
                self._mend(run_id)

    # Sharing

    def publish(
        self,
        ids: Iterable[str],
        artefacts: Iterable[str] = (),
        *,
        max_bytes: int = 2_000_000,
        half: Iterable[str] = (),
    ) -> list[Record]:
        """Copy the records that `ids` (or their first digits) name to the tracked ledger.

        Each takes along those of the named `artefacts` that it has, and those of them that `half` names in half
        precision (`halved`). Raises `SatlibError`, before anything is written, if an artefact is not here, has more
        than `max_bytes` bytes, or is known to none of the records.
        """
        records, artefacts, half = [self.get(run_id) for run_id in ids], tuple(artefacts), tuple(half)
        if unknown := sorted(set(half) - set(artefacts)):
            raise SatlibError(f"publish: half names {unknown[0]!r}, which is not among the artefacts to publish")
        taken: dict[str, dict[str, bytes]] = {record.id: {} for record in records}
        for name in artefacts:
            listed = [(record, file) for record in records if (file := record.file(name))]
            if not listed:
                raise SatlibError(f"publish: none of the {len(records)} records has an artefact {name!r}")
            for record, file in listed:
                content = halved(record.read(file)) if name in half else record.read(file)
                if (size := len(content)) > max_bytes:
                    raise SatlibError(f"publish: {record.path / file} has {size:,} bytes; max_bytes is {max_bytes:,}")
                taken[record.id][file] = content
        published = []
        for record in records:
            target = self.ledger / record.id
            with self.holding(record.id, record.kind), new_run(target) as folder, writing(self.ledger):
                old = self._look(target, locked=True)
                if old is not None and old.created == record.created:  # what it was published with stays
                    taken[record.id] = {f: old.read(f) for f in old.artefacts if old.has(f)} | taken[record.id]
                text = json.loads((record.path / "record.json").read_bytes())
                for file, content in taken[record.id].items():
                    (folder / file).write_bytes(content)
                    text["artefacts"][file] = artefact_entry(content)
                (folder / "record.json").write_bytes(rendered := render_record(text))
            published.append(parse_record(rendered, target))
        return published

    def status(self) -> dict:
        """Counts and bytes of runs and published records; failed, damaged, and unfinished or running runs."""
        begun = {path.name[:64] for part in (".tmp", ".work") for path in (self.runs / part).glob("*")}
        status = {
            "root": str(self.root),
            "failed": sorted(path.stem for path in (self.root / "failed").glob("*.txt")),
            "damaged": sorted(path.name for path in (self.root / "damaged").glob("*")),
            "unfinished": [{"id": key, "running": self.busy(key)} for key in sorted(filter(RUN_ID.fullmatch, begun))],
        }
        for store in (self.runs, self.ledger):
            folders = [path for path in store.glob("*") if RUN_ID.fullmatch(path.name)]
            sizes = (path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
            status[store.name] = {"count": len(folders), "bytes": sum(sizes)}
        return status
