"""Image files below a folder, one layout or another: found, checked, and decoded, by a thread for each core."""

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from satlib.errors import SatlibError
from satlib.progress import Progress

SUFFIXES = {".png", ".jpg", ".jpeg"}
# Images that people do keep in such trees and that would silently be missing if they were passed over.
UNREADABLE_SUFFIXES = {".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"}
MOST_WORKERS = 8  # each holds two tasks in shared memory, which containers keep small
SECONDS_PER_LINE = 3.0


@dataclass(frozen=True)
class ImageFile:
    """One image; `path` is relative to the data set's folder, and `label` indexes its classes."""

    path: str
    label: int
    size: int
    mtime_ns: int

    @property
    def stamp(self) -> list[str | int]:
        """What a cache of the decoded image depends on."""
        return [self.path, self.size, self.mtime_ns]


Tree = dict[str, tuple[ImageFile, ...]]  # the files of each split, in the order of their paths


def stamps(tree: Tree) -> list[list[str | int]]:
    return [file.stamp for files in tree.values() for file in files]


def labels_of(files: Iterable[ImageFile]) -> Tensor:
    """int64 (n,)."""
    return torch.tensor([file.label for file in files])


def scan_tree(folder: Path, *, splits: Sequence[str], classes: Sequence[str], others: bool = False) -> Tree:
    """List `folder`/<split>/<class>/*.{png,jpg,jpeg}, without reading the images.

    `classes` are the expected class folders. `others` passes other class folders over; hidden ones always are. Raises
    `SatlibError` for a missing split, a missing, empty or unexpected class folder, and as `list_images` does.
    """
    tree = {}
    for split in splits:
        if not (folder / split).is_dir():
            raise SatlibError(f"no folder {folder / split}; expected {'/, '.join(splits)}/ in {folder}")
        found = sorted(e.name for e in os.scandir(folder / split) if e.is_dir() and not e.name.startswith("."))
        if not found:
            raise SatlibError(f"no class folders in {folder / split}; expected {split}/<class>/*.png or *.jpg")
        if missing := [name for name in classes if name not in found]:
            count, mend = f"({len(missing)} of {len(classes)} missing)", "put it back or unpack the data set again"
            raise SatlibError(f"no class folder {folder / split / missing[0]} {count}; {mend}")
        if unexpected := [name for name in found if name not in classes and not others]:
            mend = f"every split needs the same {len(classes)} classes: {', '.join(classes)}"
            raise SatlibError(
                f"unexpected class folder {folder / split / unexpected[0]} ({len(unexpected)} in all); {mend}"
            )
        listed = (list_images(folder, f"{split}/{name}", label) for label, name in enumerate(classes))
        tree[split] = tuple(file for files in listed for file in files)
    return tree


def list_images(folder: Path, path: str, label: int = 0, *, tail: str = "", nested: bool = False) -> list[ImageFile]:
    """The images in `folder`/`path`, all of the class `label`, in the order of their paths; nested: and in its folders.

    Images are files *{tail}.{png,jpg,jpeg}; hidden ones, and what is no image by its name, are passed over. Raises
    `SatlibError` if there is no such folder or no image in it, for an image of a kind that is not read, and for a link
    to nothing.
    """
    if not (folder / path).is_dir():
        raise SatlibError(f"no folder {folder / path}; unpack the data set again")
    files = []
    for place, folders, names in os.walk(folder / path):
        folders[:] = [name for name in folders if nested and not name.startswith(".")]
        below = os.path.relpath(place, folder)
        for name in names:
            stem, suffix = os.path.splitext(name)
            kind = suffix.lower()
            if name.startswith(".") or not stem.endswith(tail) or kind not in SUFFIXES | UNREADABLE_SUFFIXES:
                continue
            if kind in UNREADABLE_SUFFIXES:
                raise SatlibError(f"cannot read {place}/{name}: {kind} images; convert them to .png or .jpg")
            try:
                status = os.stat(f"{place}/{name}")
            except FileNotFoundError:
                raise SatlibError(f"cannot read {place}/{name}: a link to nothing; remove or restore it") from None
            files.append(ImageFile(f"{below}/{name}", label, status.st_size, status.st_mtime_ns))
    if not files:
        expected = f"*{tail}.png, *{tail}.jpg or *.jpeg"
        raise SatlibError(f"no images in {folder / path}; expected {expected}; unpack the data set again")
    return sorted(files, key=lambda file: file.path.split("/"))


def read_images(
    folder: Path, tree: Tree, split: str, *, size: tuple[int, int], progress: bool = True
) -> tuple[Tensor, Tensor]:
    """Decode one split, whose images are of `size` (H, W): uint8 (n, 3, H, W) in channels_last order, and int64 labels
    (n,).

    Raises `SatlibError` that names the first file that cannot be decoded or has another size, and counts the rest.
    """
    files, (height, width) = tree[split], size
    images = np.empty((len(files), height, width, 3), dtype=np.uint8)

    def read(row: int) -> None:
        path = files[row].path
        image = decode(folder, path)
        if image.shape[:2] != size:
            h, w, _ = image.shape
            raise SatlibError(f"{path}: {w}x{h} pixels, expected {width}x{height} as for the others")
        images[row] = image

    refuse(folder, problems(read, range(len(files)), f"decoding {folder.name}/{split}", progress))
    return torch.from_numpy(images).permute(0, 3, 1, 2), labels_of(files)


def sound_files(folder: Path, tree: Tree, split: str, *, progress: bool = True) -> tuple[ImageFile, ...]:
    """The files of a split that can be decoded, whatever their sizes; a warning names the others."""
    files = tree[split]
    wrong = problems(lambda file: decode(folder, file.path), files, f"checking {split}", progress)
    if bad := [file.path for file, problem in zip(files, wrong, strict=True) if problem]:
        listed = ", ".join(bad[:10]) + (", ..." if len(bad) > 10 else "")
        warnings.warn(f"{len(bad)} bad images of {folder} left out: {listed}", stacklevel=2)
    return tuple(file for file, problem in zip(files, wrong, strict=True) if not problem)


def rgb(image: Image.Image) -> Image.Image:
    """All of an image."""
    return image.convert("RGB")


def decode(folder: Path, path: str, take: Callable = rgb, *, formats: Sequence[str] = ("PNG", "JPEG")) -> np.ndarray:
    """The image `folder`/`path` as uint8 (H, W, 3); `take(image)` says what of it, before it is read, (H, W) if that
    has one channel. Raises `SatlibError`, `path` and what is wrong with it, for a file that cannot be read so."""
    try:
        with Image.open(folder / path, formats=formats) as image:
            if image.mode.startswith(("I", "F")):
                raise SatlibError("more than 8 bits a channel")
            return np.array(take(image))
    except UnidentifiedImageError:
        problem = f"not a {' or '.join(formats)} image"
    except SatlibError as error:
        problem = str(error)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        problem = f"damaged or truncated ({error})"
    raise SatlibError(f"{path}: {problem}")


def problems(read: Callable[[Any], object], items: Sequence, what: str = "", progress: bool = False) -> list[str]:
    """What `read` says is wrong with each item, by a `SatlibError`; "" for nothing. A thread for each core reads."""

    def problem(item: Any) -> str:
        try:
            read(item)
        except SatlibError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(shown(pool.map(problem, items), len(items), what, progress))


def refuse(folder: Path, found: Iterable[str]) -> None:
    """Raise `SatlibError` for the first of `problems` found with files in `folder`, if any, and count the others."""
    if bad := [problem for problem in found if problem]:
        others = len(bad) - 1
        more = f" (and {others} more bad file{'s' * (others > 1)})" if others else ""
        raise SatlibError(f"bad image {folder}/{bad[0]}{more}; replace or remove it")


def workers_here() -> int:
    """Processes that decode: a share of the cores for each rank that trains on this node."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def shown(items: Iterable[Any], total: int, what: str, progress: bool) -> Iterator[Any]:
    """Pass items through, and show how many of `total` are done: a bar on a terminal, else lines."""
    watched, log = sys.stderr.isatty(), Progress(sys.stderr, seconds=SECONDS_PER_LINE)
    bar = tqdm(items, desc=what, total=total, unit="image", leave=False, disable=not (progress and watched))
    for done, item in enumerate(bar, 1):
        yield item
        if progress and not watched:
            log.update(f"{what}: {done:,} of {total:,} images")
