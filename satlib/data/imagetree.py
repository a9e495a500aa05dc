"""Image files below a folder, one layout or another: found, checked, and decoded, by a thread for each core."""

import errno
import os
import stat
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from satlib.errors import SatlibError
from satlib.progress import Progress

SUFFIXES = {".png", ".jpg", ".jpeg"}
# Images that people do keep in such trees and that would silently be missing if they were passed over.
UNREADABLE_SUFFIXES = {".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"}
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx"}  # in lower case, beside what is hidden
UNPACK = "unpack the data set again"
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


class Listing:
    """Finds the images below `folder`, and keeps what it leaves out. One rule for every layout: links to files and
    folders are followed, suffixes are taken in any case, and hidden and system files are passed over; so are names that
    end, with or without the suffix, in one of `companions`, which belong to the data set."""

    def __init__(self, folder: Path, *, companions: tuple[str, ...] = ()) -> None:
        self.folder, self.companions = folder, companions
        self.left_out: list[str] = []

    def entries(self, path: str, mend: str = UNPACK) -> list[os.DirEntry]:
        """What lies in `folder`/`path`, by name. Raises `SatlibError`, with `mend`, unless that is a folder to read."""
        if problem := folder_problem(self.folder / path, mend):
            raise SatlibError(problem)
        with os.scandir(self.folder / path) as found:
            shown = [e for e in found if not (e.name[0] == "." or e.name.lower() in SYSTEM_FILES)]
        return sorted(shown, key=lambda entry: entry.name)

    def images(
        self, path: str, label: int = 0, *, tail: str = "", nested: Collection[str] = (), needed: bool = True
    ) -> list[ImageFile]:
        """The images in `folder`/`path`, all of the class `label`, in the order of their paths; and those in its
        folders that are called as one of `nested`, "*" for any.

        Images are files *{tail}.{png,jpg,jpeg}. Raises `SatlibError` for a folder that cannot be read, one without any
        image if one is `needed`, an image of a kind that is not read, and a link to nothing.
        """
        start = (self.folder / path).resolve()
        files, places, seen = [], [path], {start, *start.parents}  # a link to one of these leads back, or out
        for place in places:
            for entry in self.entries(place):
                stem, suffix = os.path.splitext(entry.name)
                kind, name = suffix.lower(), f"{place}/{entry.name}"
                if is_folder(entry):
                    if not {"*", entry.name} & set(nested):
                        self.left_out.append(f"{name}/")
                    elif (real := Path(entry.path).resolve()) not in seen:
                        seen.add(real)
                        places.append(name)
                elif kind in SUFFIXES | UNREADABLE_SUFFIXES:
                    if stem.endswith(tail):
                        files.append(_image_file(entry, name, kind, label))
                    elif not stem.endswith(self.companions):
                        self.left_out.append(name)
                elif not entry.name.endswith(self.companions):
                    self.left_out.append(name)
        if needed and not files:
            raise self.nothing(path, "images", f"expected *{tail}.png, *{tail}.jpg or *.jpeg; {UNPACK}")
        return sorted(files, key=lambda file: file.path.split("/"))

    def by_class(
        self, split: str, classes: Sequence[str], *, others: bool = False, nested: Collection[str] = ()
    ) -> list[ImageFile]:
        """The images in `folder`/<split>/<class>/, and in its folders in `nested`: class by class, as `classes` are
        given, by name; an image that is there twice counts once. `others` passes other class folders over.

        Raises `SatlibError` for a missing, empty or unexpected class folder, and as `images` does.
        """
        entries, place = self.entries(split, f"expected {split}/<class>/ in {self.folder}"), self.folder / split
        found = [entry.name for entry in entries if is_folder(entry)]
        for path in (place / name for name in classes if os.path.lexists(place / name)):
            if problem := folder_problem(path, UNPACK):
                raise SatlibError(problem)
        if not found:
            raise self.nothing(split, "class folders", f"expected {split}/<class>/*.png or *.jpg")
        if missing := [name for name in classes if name not in found]:
            count, mend = f"({len(missing)} of {len(classes)} missing)", "put it back or unpack the data set again"
            raise SatlibError(f"no class folder {place / missing[0]} {count}; {mend}")
        if unexpected := [name for name in found if name not in classes and not others]:
            mend = f"every split needs the same {len(classes)} classes: {', '.join(classes)}"
            raise SatlibError(f"unexpected class folder {place / unexpected[0]} ({len(unexpected)} in all); {mend}")
        names = [entry.name for entry in entries if entry.name not in found]
        self.left_out += [f"{split}/{name}" for name in names if not name.endswith(self.companions)]
        files = []
        for label, name in enumerate(classes):
            named = {os.path.basename(file.path): file for file in self.images(f"{split}/{name}", label, nested=nested)}
            files += [named[image] for image in sorted(named)]
        return files

    def nothing(self, path: str, what: str, mend: str) -> SatlibError:
        """That there is none of `what` in a folder, or nothing at all."""
        place = self.folder / path
        return SatlibError(f"{place} is empty; {mend}" if _is_empty(place) else f"no {what} in {place}; {mend}")

    def warn(self) -> None:
        """Name what was left out, if anything was."""
        if self.left_out:
            what = f"left out of {self.folder}, for their names or places: {len(self.left_out)} files or folders"
            warnings.warn(f"{what}, {_first(self.left_out)}", stacklevel=2)


def _is_empty(folder: Path) -> bool:
    with os.scandir(folder) as found:
        return not any(found)


def is_folder(entry: os.DirEntry) -> bool:
    try:
        if entry.is_symlink() and "." not in entry.name:
            entry.stat()  # a link to nothing, of a name like this, may have been a folder of images
        return entry.is_dir()
    except OSError as error:
        raise SatlibError(f"cannot read {entry.path}: {reason(error)}") from None


def _image_file(entry: os.DirEntry, name: str, kind: str, label: int) -> ImageFile:
    if kind in UNREADABLE_SUFFIXES:
        raise SatlibError(f"cannot read {entry.path}: {kind} images; convert them to .png or .jpg")
    try:
        status = entry.stat()
    except OSError as error:
        raise SatlibError(f"cannot read {entry.path}: {reason(error)}") from None
    return ImageFile(name, label, status.st_size, status.st_mtime_ns)


def folder_problem(path: Path, mend: str) -> str:
    """Why a folder cannot be read, by the first on the way to it that cannot, and the mend; "" for one that can."""
    way = (*reversed(path.parents), path)
    first = next((place for place in way if not (os.path.isdir(place) and os.access(place, os.X_OK))), path)
    try:
        if not stat.S_ISDIR(os.stat(first).st_mode):
            return f"{first} is a file, expected a folder; {mend}"
        if not os.access(first, os.R_OK | os.X_OK):
            raise PermissionError
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not os.path.islink(first):
            bare = os.access(first.parent, os.R_OK) and _is_empty(first.parent)
            return f"no folder {first}, {first.parent} is empty; {mend}" if bare else f"no folder {first}; {mend}"
        return f"cannot read {first}: {reason(error)}"
    return ""


def reason(error: OSError) -> str:
    """Why something that is there cannot be read, and the mend."""
    if isinstance(error, PermissionError):
        return "no permission; give it (`chmod -R u+rX`) or ask the owner"
    if isinstance(error, FileNotFoundError):
        return "a link to nothing; remove or restore it"
    return "a link that leads to itself; remove or restore it" if error.errno == errno.ELOOP else f"{error.strerror}"


def _first(names: Sequence[str], count: int = 10) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def scan_tree(folder: Path, *, splits: Sequence[str], classes: Sequence[str]) -> Tree:
    """List `folder`/<split>/<class>/*.{png,jpg,jpeg}, without reading the images.

    `classes` are the class folders. Raises `SatlibError` for a missing split, and as `Listing.by_class` does.
    """
    listing = Listing(folder)
    for split in splits:
        listing.entries(split, f"expected {'/, '.join(splits)}/ in {folder}")
    tree = {split: tuple(listing.by_class(split, classes)) for split in splits}
    listing.warn()
    return tree


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
        warnings.warn(f"{len(bad)} bad images of {folder} left out: {_first(bad)}", stacklevel=2)
    return tuple(file for file, problem in zip(files, wrong, strict=True) if not problem)


def rgb(image: Image.Image) -> Image.Image:
    """All of an image."""
    return image.convert("RGB")


def decode(folder: Path, path: str, take: Callable = rgb) -> np.ndarray:
    """The picture `folder`/`path` as uint8 (H, W, 3), upright as its EXIF data say; `take(image)` says what of it,
    before it is read. Raises `SatlibError`, `path` and what is wrong with it, for a file that cannot be read so, and
    for a picture that 8 bits in each of three channels do not hold."""
    return decode_as_is(folder, path, lambda image: take(_upright(_opaque(image))), formats=("PNG", "JPEG"))


def decode_as_is(folder: Path, path: str, take: Callable, *, formats: Sequence[str]) -> np.ndarray:
    """What `take` makes of the image in a file, as an array; errors as for `decode`."""
    try:
        with Image.open(folder / path, formats=formats) as image:
            return np.array(take(image))
    except UnidentifiedImageError:
        problem = f"not a {' or '.join(formats)} image"
    except SatlibError as error:
        problem = str(error)
    except (PermissionError, FileNotFoundError) as error:
        problem = reason(error)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        problem = f"damaged or truncated ({error})"
    raise SatlibError(f"{path}: {problem}")


def _opaque(image: Image.Image) -> Image.Image:
    """The image, if conversion to RGB shows it as it is."""
    # Pillow drops half of 16 bits in colour without a word: only how it is about to decode them tells.
    if image.mode.startswith(("I", "F")) or any("16" in str(tile[3]) for tile in image.tile):
        raise SatlibError("16 bits a channel; save it with 8")
    if image.has_transparency_data and np.array(image.convert("RGBA"))[..., 3].min() < 255:
        raise SatlibError("has transparent pixels; flatten it")
    image.info.pop("transparency", None)  # of none of its pixels; Pillow would warn
    return image


def _upright(image: Image.Image) -> Image.Image:
    if image.format == "PNG":
        image.load()  # its EXIF data may follow its pixels
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    except Exception:  # Pillow raises all sorts for damaged EXIF data; the picture may be sound
        turned = False
    if not turned:  # and so not decoded in full, which `take` may not need
        return image
    for key in ("exif", "Raw profile type exif"):
        image.info.pop(key, None)  # or Pillow would write them anew, and fail where some of them are damaged
    return ImageOps.exif_transpose(image)


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
