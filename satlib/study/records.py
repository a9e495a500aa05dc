"""Runs as records: what makes a run and its id, where it is written, the form of `record.json` and its checks."""

import contextlib
import functools
import hashlib
import io
import json
import math
import re
import reprlib
import shutil
import time
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from satlib import files
from satlib.errors import SatlibError

RUN_ID = re.compile(r"[0-9a-f]{64}")
ARTEFACT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,80}\.(safetensors|npz)")
CHECKPOINT = "checkpoint"


class Damage(Exception):
    """A file of a run is not what its record says; the text names the file."""


class DamageWarning(UserWarning):
    """A record, artefact or checkpoint failed its checks; the text names it and says what was done."""


# Canonical JSON, settings and the run's id


def check_json(value: Any, where: str) -> None:
    """Raise `SatlibError`, naming the place, unless `value` is plain JSON: no tuple, array, tensor or NaN."""
    kind = type(value)
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise SatlibError(f"{where}: the key {key!r} is {type(key).__name__}, expected str; quote it")
            check_json(item, f"{where}[{key!r}]")
    elif kind is list:
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]")
    elif kind is float and not math.isfinite(value):
        raise SatlibError(f"{where} is {value}, expected a finite number; use None where there is none")
    elif kind not in (str, int, float, bool, NoneType):
        shown = " ".join(reprlib.repr(value).split())
        raise SatlibError(
            f"{where} is {shown} ({kind.__module__}.{kind.__qualname__}), expected plain JSON (dict, list,"
            " str, int, float, bool, None); convert it with list(...), .tolist(), .item() or asdict(...)"
        )


def _canonical(value: Any) -> Any:
    """The same JSON value with 8.0 written as 8 and (8,) as [8], so that both mean the same run."""
    if type(value) is float and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    return [_canonical(item) for item in value] if isinstance(value, list | tuple) else value


def digest_of(value: object) -> str:
    """SHA-256 (hex) of canonical JSON: keys sorted, no spaces, ASCII, integral floats as integers, no NaN."""
    text = json.dumps(_canonical(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def split_settings(settings: dict, defaults: dict) -> tuple[dict, dict]:
    """(what differs from the defaults, the rest) of settings in JSON types; `merge_settings` puts them together.

    A dict is split in turn where both have one; 8.0 equals 8, a tuple its list. A setting that the defaults lack
    differs, and one that they alone have is noted among what differs, as `"-name": None`.
    """
    settings = _canonical(settings)
    check_json(settings, "settings")
    differing: dict[str, Any] = {f"-{name}": None for name in defaults if name not in settings}
    equal: dict[str, Any] = {}
    for name, value in settings.items():
        if name.startswith("-"):
            raise SatlibError(f"the setting {name!r} starts with '-', which marks one that is left out; rename it")
        default = defaults.get(name)
        if isinstance(value, dict):
            changed, kept = split_settings(value, default if isinstance(default, dict) else {})
            if changed or not isinstance(default, dict):
                differing[name] = changed
            if kept or name not in differing:
                equal[name] = kept
        else:
            same = name in defaults and digest_of(value) == digest_of(default)
            (equal if same else differing)[name] = value
    return differing, equal


def merge_settings(config: dict, defaults: dict) -> dict:
    """All settings, from those that differ from the defaults and the rest, or all, of the defaults."""
    settings = {name: value for name, value in defaults.items() if f"-{name}" not in config}
    for name, value in config.items():
        if isinstance(value, dict):
            below = settings.get(name)
            settings[name] = merge_settings(value, below if isinstance(below, dict) else {})
        elif not name.startswith("-"):
            settings[name] = value
    return settings


@dataclass(frozen=True)
class RunSpec:
    """What makes a run: equal specs have equal ids and are computed once.

    `kind` names the computation and `version` is its hand-bumped version; `config` holds, as plain JSON, every
    setting that differs from the frozen defaults of that version; `data` is the data set's fingerprint ("" for
    none); `parents` maps a role to the id of a run it builds on. `defaults`, the other settings, are kept for
    readers and not hashed: an option that is added later, with a default, leaves every id as it is.
    """

    kind: str
    config: dict
    version: int
    data: str = ""
    parents: dict[str, str] = field(default_factory=dict)
    defaults: dict = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        types = {"kind": str, "config": dict, "version": int, "data": str, "parents": dict, "defaults": dict}
        for name, kind in types.items():
            if type(value := getattr(self, name)) is not kind:
                raise SatlibError(f"RunSpec.{name} is {reprlib.repr(value)}, expected {kind.__name__}")
            check_json(value, name)
            # A snapshot, so that editing the caller's dict later cannot part the spec from its id.
            object.__setattr__(self, name, _canonical(value))
        for role, run_id in self.parents.items():
            if not (isinstance(run_id, str) and RUN_ID.fullmatch(run_id)):
                raise SatlibError(f"parents[{role!r}] is {run_id!r}, expected a run id such as RunSpec.id")

    @functools.cached_property
    def id(self) -> str:
        """64 hex digits."""
        return digest_of({name: getattr(self, name) for name in ("kind", "config", "version", "data", "parents")})

    def __hash__(self) -> int:
        return hash(self.id)


# Records


@dataclass(frozen=True, kw_only=True)
class Record(RunSpec):
    """One finished run, as read from `path / "record.json"`.

    `metrics` holds numbers as numbers (None where there is none); `artefacts` maps a file name to its
    `sha256` and `bytes`; `labels` (profile, titles, section ...) are not part of the id; `created` is UTC
    in ISO 8601.
    """

    labels: dict
    metrics: dict
    artefacts: dict[str, dict]
    wall_seconds: int | float
    device: str
    versions: dict[str, str]
    commit: str | None
    dirty: bool | None
    created: str
    digest: str
    path: Path

    @property
    def settings(self) -> dict:
        """Every setting, whether it differs from the default or not."""
        return merge_settings(self.config, self.defaults)

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


def artefact_entry(content: bytes) -> dict:
    """How a record lists an artefact."""
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def halved(content: bytes) -> bytes:
    """A file of tensors with its matrices and kernels in half precision; vectors, such as statistics, stay as they are.

    Raises `SatlibError` where a number is too large for it.
    """
    tensors = safetensors.torch.load(content)
    small = {
        name: value.half() if value.ndim > 1 and value.is_floating_point() else value for name, value in tensors.items()
    }
    for name, value in small.items():
        if not torch.equal(value.isfinite(), tensors[name].isfinite()):
            raise SatlibError(f"{name} has numbers above 65,504, too large for half precision; publish it as it is")
    return safetensors.torch.save(small)


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
        # Byte for byte: not even a flip that leaves the JSON value alone (1e-05, 1E-05) goes unseen.
        if render_record(content) != text:
            raise Damage(f"{where}: its digest does not match its content")
        if content.keys() ^ {f.name for f in fields(Record)} != {"id", "path"}:
            raise Damage(f"{where}: not a record (it has other fields)")
        run_id = content.pop("id")
        record = Record(path=folder, **content)
        for name, entry in record.artefacts.items():
            size, digest = entry["bytes"], entry["sha256"]
            if not (ARTEFACT_NAME.fullmatch(name) and type(size) is int and size >= 0 and type(digest) is str):
                raise Damage(f"{where}: the artefact {name!r} is not listed properly")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damage(f"{where}: not a record ({type(error).__name__})") from None
    if not record.id == run_id == folder.name:
        raise Damage(f"{where}: its id is not that of its folder and content")
    return record


@functools.cache
def _digest_of_file(path: Path, *stamp: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file; a file that did not change since is not read again."""
    status = path.stat()
    # Within one tick of the clock a file may change again under the same stamp: remember settled files only.
    settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > 2_000_000_000
    digest = _digest_of_file if settled else _digest_of_file.__wrapped__
    return digest(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def read_record(folder: Path, *, artefacts: bool = True) -> Record | None:
    """The record in `folder`, None if there is no folder. Raises `Damage`, naming the file, if unsound.

    With `artefacts` the size and SHA-256 of each artefact that is here are checked too; one that is not here
    is no damage, because records travel without their large artefacts.
    """
    try:
        record = parse_record((folder / "record.json").read_bytes(), folder)
        for name, entry in record.artefacts.items() if artefacts else ():
            with contextlib.suppress(FileNotFoundError):
                if (size := (folder / name).stat().st_size) != entry["bytes"]:
                    raise Damage(f"{folder / name}: it has {size} bytes, the record says {entry['bytes']}")
                if file_digest(folder / name) != entry["sha256"]:
                    raise Damage(f"{folder / name}: its SHA-256 is not the recorded one")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        if not folder.exists():
            return None
        raise Damage(f"{error.filename}: {error.strerror}") from None
    except OSError as error:
        raise SatlibError(f"{error.filename or folder} cannot be read ({error.strerror}); mend that") from error
    return record


# Writing a run


def _serialise(tensors: dict[str, Tensor], where: str) -> bytes:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise SatlibError(f"{where}[{name!r}] is {type(tensor).__name__}, expected a torch.Tensor")
    plain = {
        # Always a copy: safetensors refuses views that share memory and anything but contiguous memory.
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return safetensors.torch.save(plain)


def is_checkpoint(content: bytes) -> bool:
    """Whether these are the bytes of a sound checkpoint: the SHA-256 of the rest, a line of state, safetensors."""
    return content[:65] == hashlib.sha256(memoryview(content)[65:]).hexdigest().encode() + b"\n"


class Workspace:
    """What a computation writes to while it runs; nothing of it is visible before the run is complete."""

    def __init__(self, folder: Path, checkpoints: Path) -> None:
        self.artefacts: dict[str, dict] = {}
        self._folder = folder
        self._checkpoint = checkpoints / CHECKPOINT
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time so far, with that of the interrupted attempt whose checkpoint was loaded."""
        return time.monotonic() - self._began

    def save_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep `tensors` as the artefact `name` (`name.safetensors`)."""
        self._save(f"{name}.safetensors", _serialise(tensors, name))

    def save_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Keep NumPy `arrays` of numbers as the artefact `name` (`name.npz`)."""
        for key, array in arrays.items():
            if not isinstance(array, np.ndarray) or array.dtype.hasobject:
                raise SatlibError(f"{name}[{key!r}] is {type(array).__name__}, expected an array of numbers")
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        self._save(f"{name}.npz", buffer.getvalue())

    def _save(self, file: str, content: bytes) -> None:
        if not ARTEFACT_NAME.fullmatch(file) or file in self.artefacts:
            raise SatlibError(f"artefact {file!r}: expected a new name of letters, digits, '_', '-' and '.'")
        with files.writing(self._folder):
            (self._folder / file).write_bytes(content)
        self.artefacts[file] = artefact_entry(content)

    def save_checkpoint(self, tensors: dict[str, Tensor], info: dict) -> None:
        """Replace the run's checkpoint atomically; `info` is plain JSON (epoch, metrics so far ...)."""
        check_json(info, "info")
        state = json.dumps({"info": info, "seconds": self.seconds}).encode() + b"\n"
        content = _serialise(tensors, "checkpoint")
        digest = hashlib.sha256(state)
        digest.update(content)
        with files.writing(self._checkpoint.parent):
            self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(self._checkpoint) as new, new.open("xb") as file:
                file.writelines((digest.hexdigest().encode() + b"\n", state, content))

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict] | None:
        """(tensors on the CPU, info) as last saved by this run, None if there is none or it is damaged."""
        try:
            content = self._checkpoint.read_bytes()
        except FileNotFoundError:
            return None
        if not is_checkpoint(content):
            text = f"damaged: {self._checkpoint}; dropped, the run starts anew"
            warnings.warn(text, DamageWarning, stacklevel=2)
            self.drop_checkpoint()
            return None
        _, line, tensors = content.split(b"\n", 2)
        state = json.loads(line)
        self._began -= state["seconds"]
        return safetensors.torch.load(tensors), state["info"]

    def drop_checkpoint(self) -> None:
        """Forget the checkpoint, so that the run starts anew."""
        shutil.rmtree(self._checkpoint.parent, ignore_errors=True)
