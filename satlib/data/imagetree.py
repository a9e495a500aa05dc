"""Image files below a folder, one layout or another: found, checked, decoded in parallel."""

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from satlib.errors import SatlibError
from satlib.progress import Progress

SUFFIXES = {".png", ".jpg", ".jpeg"}
# Images that people do keep in such trees and that would silently be missing if they were passed over.
UNREADABLE_SUFFIXES = {".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"}
FILES_PER_TASK = 500
MOST_WORKERS = 8  # each holds two tasks in shared memory, which containers keep small
SECONDS_PER_LINE = 3.0

Task = Sequence[tuple[str, int | None]]  # images: the path of each below its folder, and the seed of what is drawn
Problem = tuple[str, str]  # the path of a bad image below its folder, and what is wrong with it


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


@dataclass(frozen=True)
class ImageTree:
    """The files of `folder`, split by split, in the order of their paths."""

    folder: Path
    classes: tuple[str, ...]
    files: dict[str, tuple[ImageFile, ...]]

    @property
    def stamps(self) -> list[list[str | int]]:
        return [file.stamp for files in self.files.values() for file in files]


def scan_tree(folder: Path, *, splits: Sequence[str], classes: Sequence[str], others: bool = False) -> ImageTree:
    """List `folder`/<split>/<class>/*.{png,jpg,jpeg}, without reading the images.

    `classes` are the expected class folders. `others` passes other class folders over; hidden ones always are. Raises
    `SatlibError` for a missing split, a missing, empty or unexpected class folder, and as `list_images` does.
    """
    files = {}
    for split in splits:
        if not (folder / split).is_dir():
            raise SatlibError(f"no folder {folder / split}; expected {'/, '.join(splits)}/ in {folder}")
        found = sorted(e.name for e in os.scandir(folder / split) if e.is_dir() and not e.name.startswith("."))
        if not found:
            raise SatlibError(f"no class folders in {folder / split}; expected {split}/<class>/*.png or *.jpg")
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
            file for label, name in enumerate(classes) for file in list_images(folder, f"{split}/{name}", label)
        )
    return ImageTree(folder, tuple(classes), files)


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
        raise SatlibError(
            f"no images in {folder / path}; expected *{tail}.png, *{tail}.jpg or *.jpeg; unpack the data set again"
        )
    return sorted(files, key=lambda file: file.path.split("/"))


def read_images(tree: ImageTree, split: str, *, size: tuple[int, int], progress: bool = True) -> tuple[Tensor, Tensor]:
    """Decode one split, whose images are of `size` (H, W): uint8 (n, 3, H, W) in channels_last order, and int64 labels
    (n,).

    Raises `SatlibError` that names the first file that cannot be decoded or has another size, and counts the rest.
    """
    files = tree.files[split]
    images = torch.empty((len(files), *size, 3), dtype=torch.uint8)
    tasks = [
        [(file.path, None) for file in files[i : i + FILES_PER_TASK]] for i in range(0, len(files), FILES_PER_TASK)
    ]
    # Starting processes takes longer than decoding one task's files.
    decoded = decoding(tree.folder, tasks, size, rgb, workers=workers_here() if len(tasks) > 1 else 0)
    what, bad = f"decoding {tree.folder.name}/{split}", []
    for index, (pixels, problems) in enumerate(shown(decoded, len(files), what, progress, each=FILES_PER_TASK)):
        images[index * FILES_PER_TASK :][: len(pixels)] = pixels
        bad += problems
    if bad:
        raise SatlibError(bad_image(tree.folder, bad))
    return images.permute(0, 3, 1, 2), torch.tensor([file.label for file in files])


def sound_files(tree: ImageTree, split: str, *, progress: bool = True) -> tuple[ImageFile, ...]:
    """The files of a split that can be decoded, whatever their sizes; a warning names the others."""
    files = tree.files[split]
    bad = in_threads(
        lambda file: isinstance(decode(tree.folder / file.path), str), files, f"checking {split}", progress
    )
    if count := sum(bad):
        paths = [file.path for file, is_bad in zip(files, bad, strict=True) if is_bad]
        listed = ", ".join(paths[:10]) + (", ..." if count > 10 else "")
        warnings.warn(f"{count} bad images of {tree.folder} left out: {listed}", stacklevel=2)
    return tuple(file for file, is_bad in zip(files, bad, strict=True) if not is_bad)


def bad_image(folder: Path, bad: Sequence[Problem]) -> str:
    """What is wrong: the first of `bad`, and how many others there are."""
    (path, problem), others = bad[0], len(bad) - 1
    more = f" (and {others} more bad file{'s' * (others > 1)})" if others else ""
    return f"bad image {folder / path}: {problem}{more}; replace or remove it"


# --- decoding


def rgb(image: Image.Image, seed: int | None = None) -> Image.Image:
    """All of an image."""
    return image.convert("RGB")


def decode(path: Path, take: Callable = rgb, *, formats: Sequence[str] = ("PNG", "JPEG")) -> Tensor | str:
    """The image as uint8 (H, W, 3), or what is wrong with the file.

    `take(image)` says what of it, before it is read; (H, W) if that has one channel; what it raises is wrong, too.
    """
    try:
        with Image.open(path, formats=formats) as image:
            if image.mode.startswith(("I", "F")):
                return "more than 8 bits a channel"
            return torch.from_numpy(np.array(take(image)))
    except UnidentifiedImageError:
        return f"not a {' or '.join(formats)} image"
    except SatlibError as error:
        return str(error)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"damaged or truncated ({error})"


def decoding(
    folder: Path, tasks: Sequence[Task], size: tuple[int, int], take: Callable, *, workers: int, pin: bool = False
) -> DataLoader:
    """For each task in turn: what `take(image, seed=...)` takes of its images, as pixels, uint8 (images, H, W, 3), and
    what is wrong with which of its files. At most `workers` processes decode, each two tasks in advance."""
    # DataLoader brings what parallel decoding needs: processes (threads gain nothing here: each image is
    # too little work between two takes of Python's lock), shared memory, and results in order. A generator of its own
    # keeps it from drawing on torch's global one, which would make later results depend on whether a cache was there.
    return DataLoader(
        tasks,
        batch_size=None,
        collate_fn=partial(_decoded, folder, size, take),
        num_workers=min(workers, len(tasks)),
        pin_memory=pin,
        generator=torch.Generator(),
    )


def _decoded(folder: Path, size: tuple[int, int], take: Callable, task: Task) -> tuple[Tensor, list[Problem]]:
    pixels, problems = torch.zeros((len(task), *size, 3), dtype=torch.uint8), []
    for row, (path, seed) in enumerate(task):
        image = decode(folder / path, partial(take, seed=seed))
        if isinstance(image, str):
            problems.append((path, image))
        elif image.shape[:2] != size:
            (height, width), (h, w) = size, image.shape[:2]
            problems.append((path, f"{w}x{h} pixels, expected {width}x{height} as for the others"))
        else:
            pixels[row] = image
    return pixels, problems


def workers_here() -> int:
    """Processes that decode: a share of the cores for each rank that trains on this node."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def in_threads(function: Callable, items: Sequence, what: str = "", progress: bool = False) -> list:
    """`function` of each item, by a thread for each core; shown as `shown` does."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(shown(pool.map(function, items), len(items), what, progress))


def shown(items: Iterable[Any], total: int, what: str, progress: bool, *, each: int = 1) -> Iterator[Any]:
    """Pass `items` of `each` images through; show how many of `total` are done: a bar on a terminal, else lines."""
    watched, log = sys.stderr.isatty(), Progress(sys.stderr, seconds=SECONDS_PER_LINE)
    with tqdm(total=total, desc=what, unit="image", leave=False, disable=not (progress and watched)) as bar:
        for index, item in enumerate(items):
            yield item
            bar.update(min(each, total - index * each))
            if progress and not watched:
                log.update(f"{what}: {min(total, (index + 1) * each):,} of {total:,} images")
