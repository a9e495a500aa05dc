"""Anybody's images: a folder for each class."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from satlib.checks import check
from satlib.data.imageset import ImageSet, shuffled
from satlib.data.imagetree import Listing, decode, is_folder, labels_of, problems, refuse, rgb
from satlib.data.streamed import middle
from satlib.errors import SatlibError


def load_folder(
    folder: str | Path,
    *,
    classes: Sequence[str] | str | Path = (),
    size: int | None = None,
    most: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ImageSet:
    """The images in `folder`/<class>/, and in folders below, as an ImageSet.

    classes: the class folders in the order of the network's classes, of which some may be missing, or a file with one
    in each line; by default (also "") those that are there, by name. size: the middle of each image, its shorter side
    scaled to 8/7 of so many pixels; None: as they are, all of one size. most: so many of them at most, drawn at random
    by `seed`. Raises SatlibError for a folder that is no class, a file that cannot be read, and an image of another
    size.
    """
    check("a folder with a folder for each class", bool, folder=str(folder))
    folder, classes = Path(folder).absolute(), _listed(classes)
    listing = Listing(folder.parent)
    entries = listing.entries(folder.name, "expected a folder for each class, with its images")
    found = [entry.name for entry in entries if is_folder(entry)]
    if classes and (unknown := [name for name in found if name not in classes]):
        listed = f"{', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
        raise SatlibError(f"unexpected class folder {folder / unknown[0]}: expected some of {listed}")
    names = list(classes) or found
    if again := [name for name in names if names.count(name) > 1]:
        raise SatlibError(f"classes: {again[0]!r} is listed twice; expected each once")
    for name, value in (("size", size), ("most", most)):
        check("None, or a whole number of at least 1", lambda v: v is None or v >= 1, **{name: value})
    if not found:
        raise listing.nothing(folder.name, "class folders", "expected a folder for each class, with its images")
    files = [
        file
        for label, name in enumerate(names)
        if name in found
        for file in listing.images(f"{folder.name}/{name}", label, nested="*")
    ]
    listing.warn()
    if most is not None and most < len(files):
        files = [files[row] for row in sorted(shuffled(len(files), seed)[:most].tolist())]
    take = rgb if size is None else partial(middle, size=size)
    first = decode(folder.parent, files[0].path, take) if files else np.zeros((1, 1, 3), np.uint8)
    images = np.empty((len(files), *first.shape), dtype=np.uint8)

    def read(row: int) -> None:
        image = decode(folder.parent, files[row].path, take)
        if image.shape != first.shape:
            (h, w, _), (height, width, _) = image.shape, first.shape
            raise SatlibError(f"{files[row].path}: {w}x{h} pixels, the first has {width}x{height}; scale them by size")
        images[row] = image

    refuse(folder.parent, problems(read, range(len(files)), f"decoding {folder.name}", progress))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    return ImageSet(pixels, labels_of(files), tuple(names), folder.name, folder.name, "test")


def _listed(classes: Sequence[str] | str | Path) -> Sequence[str]:
    """The names, or those in a file."""
    if not isinstance(classes, str | Path) or classes == "":
        return classes or ()
    try:
        lines = Path(classes).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SatlibError(f"classes: cannot read {classes}: {error}") from None
    return [name.strip() for name in lines if name.strip()]
