"""Runs as records: what makes a run and its id, the form of `record.json`, and the checks on reading one."""

import contextlib
import errno
import functools
import hashlib
import io
import json
import math
import re
import reprlib
import time
import warnings
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import safetensors.torch
from torch import Tensor

from satlib.errors import SatlibError

RUN_ID = re.compile(r"[0-9a-f]{64}")
ARTEFACT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,80}\.(safetensors|npz)")


class Damage(Exception):
    """A file of a run is not what its record says; the text names the file."""


class DamageWarning(UserWarning):
    """A record, artefact or checkpoint failed its checks; the text names it and says what was done."""


def warn_of_damage(text: str) -> None:
    """A DamageWarning that points at the caller's caller."""
    warnings.warn(text, DamageWarning, stacklevel=3)


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


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file; a file that did not change since is not read again."""
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
                if file_digest(folder / name) != entry["sha256"]:
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
