"""The ledger: content-addressed run records, so that nothing is computed twice and no number is typed.

`<root>/runs/<id>/` holds `record.json` beside the run's `*.safetensors` and `*.npz` artefacts;
`<root>/ledger/<id>/`, which is tracked, has the same layout for published records and may lack the larger
artefacts. The id is the SHA-256 of what the run is made of (`RunSpec`). A run appears by one rename of a
complete folder, is written under a lock of its own, and every look-up checks every hash. No pickle is ever
read or written.
"""

import contextlib
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from satlib import files
from satlib.errors import SatlibError
from satlib.paths import project_root
from satlib.study import archive, records
from satlib.study.provenance import provenance
from satlib.study.records import RUN_ID, Damage, DamageWarning, Record, RunSpec, check_json, warn_of_damage
from satlib.study.workspace import Workspace

__all__ = ["DamageWarning", "Ledger", "Record", "RunSpec", "Workspace"]


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
        record = self.find(ids[0]) if ids else None
        if record is None:
            raise SatlibError(f"run {prefix!r}: no sound record in {self.root} starts so; see `ledger status`")
        return record

    def ids(self) -> list[str]:
        """Ids of all runs and published records, sorted; nothing is read or checked."""
        names = (path.name for store in (self.runs, self.ledger) for path in store.glob("*"))
        return sorted({name for name in names if RUN_ID.fullmatch(name)})

    def records(self, *, published: bool = False) -> list[Record]:
        """All sound records, oldest first, each once (runs before published, or published alone); artefacts are not
        hashed."""
        found = []
        for run_id in self.ids():
            folders = (self.ledger,) if published else (self.runs, self.ledger)
            stores = (self._look(folder / run_id, artefacts=False) for folder in folders)
            found += [next((record for record in stores if record is not None), None)]
        return sorted(filter(None, found), key=lambda record: (record.created, record.id))

    def _look(self, folder: Path, *, locked: bool = False, artefacts: bool = True) -> Record | None:
        with contextlib.suppress(Damage):
            return records.read_record(folder, artefacts=artefacts)
        # It may only have been replaced while it was read: look again with nobody else at it.
        try:
            with contextlib.nullcontext() if locked else self.lock(folder.name).acquire(timeout=0):
                try:
                    return records.read_record(folder, artefacts=artefacts)
                except Damage as damage:
                    warn_of_damage(f"damaged: {damage}; {self._set_aside(folder)}")
        except OSError as error:  # the run is being computed (Timeout), or the disk is read-only
            for pause in (0.0, 0.01, 0.1, 1.0):  # the writer may be stopped anywhere on a busy machine
                time.sleep(pause)
                with contextlib.suppress(Damage):
                    return records.read_record(folder, artefacts=artefacts)
            warn_of_damage(f"damaged: {folder}; ignored, and not set aside ({error.strerror or 'in use'})")
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
        labels, needs = dict(labels or {}), tuple(needs)
        check_json(labels, "labels")
        if not force and (record := self.find(spec.id, needs)):
            return record
        with self.holding(spec.id, f"{spec.kind} {labels.get('title', '')}".strip()):
            if not force and (record := self.find(spec.id, needs, locked=True)):
                return record
            return self._compute(spec, compute, labels, needs, force)

    def _compute(
        self,
        spec: RunSpec,
        compute: Callable[[Workspace], dict],
        labels: dict,
        needs: tuple[str, ...],
        force: bool,
    ) -> Record:
        with files.new_folder(self.runs, spec.id) as folder:
            workspace = Workspace(spec, folder, self.runs / ".work" / spec.id)
            if force:
                workspace.drop_checkpoint()
            metrics = compute(workspace)
            if type(metrics) is not dict:
                raise SatlibError(f"run kind {spec.kind!r}: compute returned {type(metrics)}, expected a dict")
            check_json(metrics, "metrics")
            for name in needs:
                if not {name, f"{name}.safetensors", f"{name}.npz"} & set(workspace.artefacts):
                    raise SatlibError(f"run kind {spec.kind!r}: compute saved no artefact {name!r}, expected one")
            text = records.render_record(
                {"id": spec.id, "kind": spec.kind, "version": spec.version, "config": spec.config}
                | {"data": spec.data, "parents": spec.parents, "labels": labels, "metrics": metrics}
                | {"artefacts": workspace.artefacts, "wall_seconds": round(workspace.seconds, 3)}
                | provenance()
            )
            with files.writing(self.runs):
                files.write_file(folder / "record.json", text)
                # Where locks do not hold, as on some network file systems, somebody else may have been faster.
                if not force and (other := self.find(spec.id, needs, locked=True)):
                    return other
                files.install(folder, self.runs / spec.id)
            workspace.drop_checkpoint()
            self.forget_failure(spec.id)
        return records.parse_record(text, self.runs / spec.id)

    def lock(self, run_id: str) -> FileLock:
        """The lock under which a run is written; the system releases it when its process ends."""
        (self.runs / ".locks").mkdir(parents=True, exist_ok=True)
        return FileLock(self.runs / ".locks" / f"{run_id}.lock")

    @contextlib.contextmanager
    def holding(self, run_id: str, title: str = "", *, wait: bool = True) -> Iterator[None]:
        """Hold the run's lock, with what a killed process left of the run cleared away.

        A wait is announced on stderr with the run's id and title; without `wait`, `filelock.Timeout` is raised.
        """
        with files.writing(self.runs):
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
            with files.writing(self.runs):
                self._mend(run_id)
            yield
        finally:
            lock.release()

    def note_failure(self, run_id: str, text: str) -> Path:
        """Keep why a run failed, in `<root>/failed`, until it is computed; the file."""
        path = self.root / "failed" / f"{run_id[:12]}.txt"
        files.write_text(path, text)
        return path

    def forget_failure(self, run_id: str) -> None:
        """The run has been computed."""
        (self.root / "failed" / f"{run_id[:12]}.txt").unlink(missing_ok=True)

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
        if (self.runs / run_id).exists():
            shutil.rmtree(self.runs / ".work" / run_id, ignore_errors=True)

    def _sweep(self) -> None:
        left = {path.name[:64] for store in (self.runs, self.ledger) for path in (store / ".tmp").glob("*")}
        left |= {path.name for path in (self.runs / ".work").glob("*") if (self.runs / path.name).exists()}
        for run_id in filter(RUN_ID.fullmatch, left):
            # OSError: in use (Timeout) or a read-only disk; either way it is not ours to clear.
            with contextlib.suppress(OSError), self.lock(run_id).acquire(timeout=0):
                self._mend(run_id)

    # Sharing

    def publish(self, ids: Iterable[str], artefacts: Iterable[str] = (), *, max_bytes: int = 2_000_000) -> list[Record]:
        """Copy the records that `ids` (or their first digits) name to the tracked ledger.

        Each takes along those of the named `artefacts` that it has. Raises `SatlibError`, before anything
        is written, if an artefact is not here, has more than `max_bytes` bytes, or is known to none of the
        records.
        """
        records = [self.get(run_id) for run_id in ids]
        artefacts = tuple(artefacts)
        for name in artefacts:
            listed = [(record, file) for record in records if (file := record.file(name))]
            if not listed:
                raise SatlibError(f"publish: none of the {len(records)} records has an artefact {name!r}")
            for record, file in listed:
                if (size := len(record.read(file))) > max_bytes:
                    raise SatlibError(f"publish: {record.path / file} has {size:,} bytes; max_bytes is {max_bytes:,}")
        return [self._publish(record, artefacts) for record in records]

    def _publish(self, record: Record, artefacts: tuple[str, ...]) -> Record:
        target = self.ledger / record.id
        with self.holding(record.id, record.kind), files.new_folder(self.ledger, record.id) as folder:
            sources = {file: record for name in artefacts if (file := record.file(name))}
            old = self._look(target, locked=True)
            if old is not None and old.digest == record.digest:  # what it was published with stays
                sources |= {file: old for file in old.artefacts if old.has(file)}
            with files.writing(self.ledger):
                files.write_file(folder / "record.json", (record.path / "record.json").read_bytes())
                for file, source in sources.items():
                    files.write_file(folder / file, source.read(file))
                files.install(folder, target)
        return dataclasses.replace(record, path=target)

    def pack(self, out: Path | str, ids: Iterable[str] | None = None, *, max_mb: float | None = None) -> archive.Packed:
        """Write a plain tar of `runs/` (or of the runs that `ids` or their first digits name), oldest first.

        All of `runs/` includes the checkpoints of unfinished runs, so that another machine goes on from there.
        With `max_mb` (10^6 bytes) a run that does not fit goes without its artefacts over 1 MB; when it
        still does not fit, it and the later ones stay behind. The result says what did. Raises
        `SatlibError` if nothing fits.
        """
        return archive.pack(self, Path(out), ids, max_mb)

    def merge(self, files: Iterable[Path | str], limits: archive.Limits | None = None) -> archive.Merged:
        """Take over the runs of archives that `pack` wrote elsewhere; a run that is here stays as it is.

        Archives are not trusted: only plain files named `<id>/<file>` that their record lists are taken,
        ids and hashes are checked before a run appears, and no artefact is opened. What breaks a rule is
        refused by name; the rest is merged.
        """
        return archive.merge(self, map(Path, files), limits or archive.Limits())

    def status(self) -> dict:
        """Counts and bytes of runs and published records; failed, damaged, and unfinished or running runs."""

        def size(folder: Path) -> int:
            return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

        stores = {}
        for name, store in (("runs", self.runs), ("ledger", self.ledger)):
            folders = [path for path in store.glob("*") if RUN_ID.fullmatch(path.name)]
            stores[name] = {"count": len(folders), "bytes": sum(map(size, folders))}
        begun = {path.name[:64] for part in (".tmp", ".work") for path in (self.runs / part).glob("*")}
        begun = set(filter(RUN_ID.fullmatch, begun))
        return {
            "root": str(self.root),
            **stores,
            "failed": sorted(path.stem for path in (self.root / "failed").glob("*.txt")),
            "damaged": sorted(path.name for path in (self.root / "damaged").glob("*")),
            "unfinished": [{"id": run_id, "running": self.busy(run_id)} for run_id in sorted(begun)],
        }
