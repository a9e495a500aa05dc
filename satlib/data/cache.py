"""Decoded image sets on disk: one safetensors file per data set, keyed by the files that it came from."""

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from satlib.data.imageset import ImageSet, Splits
from satlib.errors import SatlibError
from satlib.paths import project_root

FORMAT = 2  # raise it when loaders or this file change what a cache should hold


def cached_splits(name: str, sources: object, root: Path, build: Callable[[], Splits]) -> Splits:
    """The splits that `build` makes, from the cache if they were built from the same `sources` before.

    `sources` (JSON types) is everything that the result depends on, such as paths, sizes and times of files.
    The cache is `root`/.cache/satlib, or `data/cache` of the project where `root` cannot be written. Of several
    processes one builds and the others wait. A damaged file is named in a warning, and rebuilt; where nothing
    can be written, a warning says so.
    """
    key = hashlib.sha256(json.dumps([FORMAT, sources], sort_keys=True).encode()).hexdigest()[:16]
    folders = (root / ".cache" / "satlib", project_root() / "data" / "cache")
    paths = [folder / f"{name}-{key}.safetensors" for folder in folders]
    for path in paths:
        if splits := _load(path):
            return splits
    built, failures = None, []
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f".{name}.lock")):
                if splits := _load(path):  # another process's
                    return splits
                built = built or build()
                _save(built, path, name)
                return built
        except (OSError, NotImplementedError, SafetensorError) as error:
            failures.append(f"{path}: {error}")
    warnings.warn(f"{name} is decoded anew each time, for no cache can be written: {'; '.join(failures)}", stacklevel=2)
    return built or build()


def _load(path: Path) -> Splits | None:
    """The sets in `path`; None if there is no such file, or if it is damaged, which a warning says."""
    if not path.is_file():
        return None
    sets = {}
    try:
        with safe_open(path, framework="pt") as file:
            for split in ("train", "val", "test"):
                about = json.loads(file.metadata()[split])
                fingerprint, names = about.pop("fingerprint"), {k: tuple(about.pop(k)) for k in ("classes", "frames")}
                images = file.get_tensor(f"{split}.images").permute(0, 3, 1, 2)
                sets[split] = ImageSet(images, file.get_tensor(f"{split}.labels"), split=split, **about, **names)
                if sets[split].fingerprint != fingerprint:
                    raise SatlibError(f"{split} has the fingerprint {sets[split].fingerprint}, not {fingerprint}")
    except (SafetensorError, SatlibError, OSError, KeyError, TypeError, ValueError) as error:
        warnings.warn(f"damaged cache {path} ({error}); the images are decoded again", stacklevel=3)
        return None
    return Splits(**sets)


def _save(splits: Splits, path: Path, name: str) -> None:
    """Write `path` whole or not at all, and drop the caches of older states of the files. Needs the lock."""
    tensors, metadata = {}, {}
    for split, images in vars(splits).items():
        tensors[f"{split}.images"] = images.images.permute(0, 2, 3, 1).contiguous()
        tensors[f"{split}.labels"] = images.labels
        about = {"classes": images.classes, "name": images.name, "title": images.title, "frames": images.frames}
        metadata[split] = json.dumps({**about, "fingerprint": images.fingerprint})
    partial = path.with_name(f".{name}.partial")
    try:
        save_file(tensors, partial, metadata)
        partial.chmod(0o644)  # safetensors makes it private, but others may share the data root
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    for old in path.parent.glob(f"{name}-{'?' * 16}.safetensors"):
        if old != path:
            old.unlink(missing_ok=True)
