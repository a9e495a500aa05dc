"""Image trees `{split}/<class>/*.{png,jpg,jpeg}`: found, checked, decoded in parallel."""

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from satlib.errors import SatlibError

SUFFIXES = {".png", ".jpg", ".jpeg"}
# Images that people do keep in such trees and that would silently be missing if they were passed over.
UNREADABLE_SUFFIXES = {".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"}
FILES_PER_TASK = 500
MOST_WORKERS = 8  # together they hold two tasks each in shared memory, which containers keep small
SECONDS_PER_LINE = 3.0


@dataclass(frozen=True)
class ImageFile:
    """One image of a tree; `path` is relative to the tree's folder, and `label` indexes its classes."""

    path: str
    label: int
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class ImageTree:
    """The files of `folder`, split by split, in the order of their paths."""

    folder: Path
    classes: tuple[str, ...]
    files: dict[str, tuple[ImageFile, ...]]


def scan_tree(
    folder: Path, *, splits: Sequence[str], classes: Sequence[str] | None = None, others: bool = False
) -> ImageTree:
    """List `folder`/<split>/<class>/*.{png,jpg,jpeg}, without reading the images.

    `classes` are the expected class folders; None takes those of the first split, sorted. `others` passes other
    class folders over; hidden files, and files that are no images by their names, always are. Raises
    `SatlibError` for a missing split, a missing, empty or unexpected class folder, or an image of a kind that is
    not read.
    """
    files = {}
    for split in splits:
        if not (folder / split).is_dir():
            raise SatlibError(f"no folder {folder / split}; expected {'/, '.join(splits)}/ in {folder}")
        found = sorted(e.name for e in os.scandir(folder / split) if e.is_dir() and not e.name.startswith("."))
        if not found:
            raise SatlibError(f"no class folders in {folder / split}; expected {split}/<class>/*.png or *.jpg")
        classes = found if classes is None else classes
        if missing := [name for name in classes if name not in found]:
            raise SatlibError(
                f"no class folder {folder / split / missing[0]} ({len(missing)} of {len(classes)} missing); "
                f"put it back or unpack the data set again"
            )
        if unexpected := [name for name in found if name not in classes and not others]:
            raise SatlibError(
                f"unexpected class folder {folder / split / unexpected[0]} ({len(unexpected)} in all); "
                f"every split needs the same {len(classes)} classes: {', '.join(classes)}"
            )
        files[split] = tuple(
            file for label, name in enumerate(classes) for file in scan_class(folder, f"{split}/{name}", label)
        )
    return ImageTree(folder, tuple(classes), files)


def scan_class(folder: Path, path: str, label: int) -> list[ImageFile]:
    """The images in `folder`/`path`, which are of the class `label`, by name. Raises as `scan_tree` does."""
    files = []
    with os.scandir(folder / path) as entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith(".") or suffix not in SUFFIXES | UNREADABLE_SUFFIXES:
                continue
            if suffix in UNREADABLE_SUFFIXES:
                raise SatlibError(f"cannot read {entry.path}: {suffix} images; convert them to .png or .jpg")
            try:
                status = entry.stat()
            except FileNotFoundError:
                raise SatlibError(f"cannot read {entry.path}: a link to nothing; remove or restore it") from None
            files.append(ImageFile(f"{path}/{entry.name}", label, status.st_size, status.st_mtime_ns))
    if not files:
        raise SatlibError(f"no images in {folder / path}; expected *.png, *.jpg or *.jpeg; unpack the data set again")
    return sorted(files, key=lambda file: file.path)


def read_images(
    tree: ImageTree,
    split: str,
    *,
    size: tuple[int, int] | None = None,
    progress: bool = True,
    skip_damaged: bool = False,
) -> tuple[Tensor, Tensor]:
    """Decode one split: uint8 (n, 3, H, W) in channels_last order, and int64 labels (n,).

    `size` is the expected (H, W); None takes that of the first image. Raises `SatlibError` that names the
    first file that cannot be decoded or has another size, and counts the rest; `skip_damaged` leaves such files out
    instead, and a warning names them.
    """
    files = tree.files[split]
    if size is None:
        first = decode(tree.folder / files[0].path)
        if isinstance(first, str):
            raise SatlibError(bad_image(tree.folder, [(files[0].path, first)]))
        size = (first.shape[0], first.shape[1])
    tasks = [files[start : start + FILES_PER_TASK] for start in range(0, len(files), FILES_PER_TASK)]
    # DataLoader brings what parallel decoding needs: processes (threads gain nothing here: each image is
    # too little work between two takes of Python's lock), shared memory, and results in order.
    # Starting processes takes longer than decoding one task's files. A generator of its own keeps it from
    # drawing on torch's global one, which would make later results depend on whether a cache was there.
    workers = min(os.cpu_count() or 1, MOST_WORKERS) if len(tasks) > 1 else 0
    decoder = _Decoder(tree.folder, tasks, size)
    loader = DataLoader(decoder, batch_size=None, num_workers=workers, generator=torch.Generator())
    images = torch.empty((len(files), *size, 3), dtype=torch.uint8)
    bad: list[tuple[str, str]] = []
    done = 0
    for pixels, problems in shown(loader, len(files), f"decoding {tree.folder.name}/{split}", progress):
        images[done : done + len(pixels)] = pixels
        bad += problems
        done += len(pixels)
    labels = torch.tensor([file.label for file in files])
    if bad:
        if not skip_damaged:
            raise SatlibError(bad_image(tree.folder, bad))
        left_out = _left_out(tree.folder, bad)
        sound = torch.tensor([file.path not in left_out for file in files])
        images, labels = images[sound], labels[sound]
    return images.permute(0, 3, 1, 2), labels


def sound_files(tree: ImageTree, split: str, *, progress: bool = True) -> tuple[ImageFile, ...]:
    """The files of a split that can be decoded, whatever their sizes; a warning names the others."""
    files = tree.files[split]

    def problem(file: ImageFile) -> list[tuple[str, str | None]]:
        image = decode(tree.folder / file.path)
        return [(file.path, image if isinstance(image, str) else None)]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = shown(((each,) for each in pool.map(problem, files)), len(files), f"checking {split}", progress)
        bad = [(path, found) for (((path, found),),) in checked if found is not None]
    left_out = _left_out(tree.folder, bad) if bad else set()
    return tuple(file for file in files if file.path not in left_out)


def _left_out(folder: Path, bad: Sequence[tuple[str, str]]) -> set[str]:
    listed = ", ".join(path for path, _ in bad[:10]) + (", ..." if len(bad) > 10 else "")
    warnings.warn(f"{len(bad)} bad images of {folder} left out: {listed}", stacklevel=3)
    return {path for path, _ in bad}


def bad_image(folder: Path, bad: Sequence[tuple[str, str]]) -> str:
    """What is wrong: the first of `bad` (path below the folder, problem), and how many others there are."""
    (path, problem), others = bad[0], len(bad) - 1
    more = f" (and {others} more bad file{'s' * (others > 1)})" if others else ""
    return f"bad image {folder / path}: {problem}{more}; replace or remove it"


class _Decoder(Dataset):
    """Item i: the i-th task's pixels, uint8 (files, H, W, 3), and what is wrong with which of its files."""

    def __init__(self, folder: Path, tasks: list[tuple[ImageFile, ...]], size: tuple[int, int]) -> None:
        self.folder, self.tasks, self.size = folder, tasks, size

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> tuple[Tensor, list[tuple[str, str]]]:
        files, (height, width) = self.tasks[index], self.size
        pixels = torch.zeros((len(files), height, width, 3), dtype=torch.uint8)
        problems = []
        for row, file in enumerate(files):
            image = decode(self.folder / file.path)
            if isinstance(image, str):
                problems.append((file.path, image))
            elif image.shape[:2] != self.size:
                found = f"{image.shape[1]}x{image.shape[0]}"
                problems.append((file.path, f"{found} pixels, expected {width}x{height} as for the others"))
            else:
                pixels[row] = image
        return pixels, problems


def decode(path: Path, prepare: Callable[[Image.Image], Image.Image] | None = None) -> Tensor | str:
    """The image as uint8 (H, W, 3), or what is wrong with the file. prepare: what to take of it, before it is read."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if image.mode.startswith(("I", "F")):
                return "more than 8 bits a channel"
            return torch.from_numpy(np.array((prepare(image) if prepare else image).convert("RGB")))
    except UnidentifiedImageError:
        return "not a PNG or JPEG image"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"damaged or truncated ({error})"


def shown(batches: Iterable, total: int, what: str, progress: bool) -> Iterator:
    """Pass `batches` through; show how many of `total` images are done: a bar on a terminal, else lines."""
    watched = sys.stderr.isatty()
    done, spoken = 0, time.monotonic()
    with tqdm(total=total, desc=what, unit="image", leave=False, disable=not (progress and watched)) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch[0]))
            done += len(batch[0])
            if progress and not watched and time.monotonic() - spoken >= SECONDS_PER_LINE:
                spoken = time.monotonic()
                print(f"{what}: {done:,} of {total:,} images", file=sys.stderr, flush=True)
