"""The folder that a computation writes its artefacts and checkpoints to, before its run appears."""

import hashlib
import io
import json
import os
import re
import secrets
import shutil
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from satlib import files
from satlib.errors import SatlibError
from satlib.study.records import ARTEFACT_NAME, RunSpec, check_json, warn_of_damage


def _serialise(tensors: dict[str, Tensor], metadata: dict[str, str] | None, where: str) -> bytes:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise SatlibError(f"{where}[{name!r}] is {type(tensor).__name__}, expected a torch.Tensor")
    plain = {
        # Always a copy: safetensors refuses views that share memory and anything but contiguous memory.
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return safetensors.torch.save(plain, metadata)


CHECKPOINT = "checkpoint.safetensors"
# A checkpoint carries its own SHA-256, taken with zeros in the place of those 64 digits.
_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')


def is_checkpoint(content: bytes) -> bool:
    """Whether these are the bytes of a checkpoint as `Workspace.save_checkpoint` wrote it."""
    if not (found := _DIGEST.search(content)):
        return False
    blank = content[: found.start(1)] + b"0" * 64 + content[found.end(1) :]
    return hashlib.sha256(blank).hexdigest() == found[1].decode()


class Workspace:
    """What `compute` writes to while it runs; nothing of it is visible before the run is complete."""

    def __init__(self, spec: RunSpec, folder: Path, checkpoints: Path) -> None:
        self.spec = spec
        self.artefacts: dict[str, dict] = {}
        self._folder = folder
        self._checkpoint = checkpoints / CHECKPOINT
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time so far, with that of the interrupted attempt whose checkpoint was loaded."""
        return time.monotonic() - self._began

    def save_tensors(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Keep `tensors` as the artefact `name` (`name.safetensors`)."""
        self._save(f"{name}.safetensors", _serialise(tensors, metadata, name))

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
            files.write_file(self._folder / file, content)
        self.artefacts[file] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}

    def save_checkpoint(self, tensors: dict[str, Tensor], info: dict) -> None:
        """Replace the run's checkpoint atomically; `info` is plain JSON (epoch, metrics so far ...)."""
        check_json(info, "info")
        state = json.dumps({"info": info, "seconds": self.seconds})
        content = _serialise(tensors, {"state": state, "sha256": "0" * 64}, "checkpoint")
        start = content.index(b'"sha256":"' + b"0" * 64) + len('"sha256":"')
        digest = hashlib.sha256(content).hexdigest().encode()
        with files.writing(self._checkpoint.parent):
            self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
            for left in self._checkpoint.parent.glob("*.new"):  # of a killed process
                left.unlink(missing_ok=True)
            new = self._checkpoint.with_suffix(f".{secrets.token_hex(4)}.new")
            try:
                files.write_file(new, content[:start], digest, memoryview(content)[start + 64 :])
                os.replace(new, self._checkpoint)
            finally:
                new.unlink(missing_ok=True)
            files.sync_folder(self._checkpoint.parent)

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict] | None:
        """(tensors on the CPU, info) as last saved by this run, None if there is none or it is damaged."""
        try:
            content = self._checkpoint.read_bytes()
        except FileNotFoundError:
            return None
        if not is_checkpoint(content):
            warn_of_damage(f"damaged: {self._checkpoint}; dropped, the run starts anew")
            self.drop_checkpoint()
            return None
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        state = json.loads(header["__metadata__"]["state"])
        self._began -= state["seconds"]
        return safetensors.torch.load(content), state["info"]

    def drop_checkpoint(self) -> None:
        """Forget the checkpoint, so that the run starts anew."""
        shutil.rmtree(self._checkpoint.parent, ignore_errors=True)
