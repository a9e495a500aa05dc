"""ImageNet with 200 classes (section 6.2): a user's ImageNet at 224x224, or Tiny ImageNet at its own 64x64."""

import hashlib
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from satlib.data.cache import cached_splits
from satlib.data.datasets import Dataset
from satlib.data.imageset import ImageSet, Splits
from satlib.data.imagetree import ImageFile, ImageTree, list_images, read_images, scan_tree, sound_files
from satlib.data.splitting import RULE
from satlib.data.splitting import rows as split_rows
from satlib.data.streamed import StreamedImages, StreamedSet
from satlib.errors import SatlibError
from satlib.paths import named_file

# The folders of each set, the first that is there is read: Tiny ImageNet may lie as its authors ship it.
FOLDERS = {"imagenet200": ("imagenet200", "tiny-imagenet-200"), "imagenet200-224": ("imagenet",)}
LOOKED_FOR = {
    "imagenet200": "imagenet200/{train,val}/<wnid>/*.JPEG or tiny-imagenet-200/ as its authors ship it",
    "imagenet200-224": "imagenet/{train,val}/<wnid>/*.JPEG",
}
ANNOTATIONS = "val_annotations.txt"


def find(name: str, root: Path) -> Path | None:
    """The folder that `load` reads; None where there is none."""
    return next((root / folder for folder in FOLDERS[name] if (root / folder / "train").is_dir()), None)


def load(dataset: Dataset, folder: Path, *, progress: bool = True) -> Splits:
    """ImageNet in `folder`: of each class nine tenths of its train/ images as train, the others as val, and its val/
    images as test. The dataset's option says which classes, as `wnids` takes it; only these are looked at.

    Tiny ImageNet: {train,val}/<wnid>/*.JPEG, or as its authors ship it (train/<wnid>/images/ and
    val/val_annotations.txt), decoded once and then cached; 3x64x64. ImageNet: {train,val}/<wnid>/*.JPEG, the validation
    images in class folders as well; the images stay on disk, and come as 3x224x224.

    A damaged image ends it, named (where images stay on disk, when its turn comes); with SATLIB_SKIP_DAMAGED=1 in the
    environment every image is read once, before all else, and damaged ones are left out, with a warning. Raises
    `SatlibError` for what is missing or damaged.
    """
    chosen, side = wnids(dataset.option), dataset.shape[1]
    tree, classes = _scan(folder, chosen), tuple(names()[wnid] for wnid in chosen)
    title = f"{dataset.title} ({side}x{side})"
    if dataset.name == "imagenet200-224":
        sets, title = {}, f"{title}, {len(chosen)} classes"
        for split, files in _split(tree, chosen, progress=progress).items():
            images = StreamedImages(folder, files, side)
            sets[split] = StreamedSet(images, _labels(files), classes, dataset.full_name, title, split)
        return Splits(**sets)

    def build() -> Splits:
        part = ImageTree(folder, chosen, _split(tree, chosen, progress=progress))
        some = f", {len(chosen)} of its classes" if len(chosen) < len(names()) else ""
        sets = {}
        for split in part.files:
            images, labels = read_images(part, split, size=(side, side), progress=progress)
            sets[split] = ImageSet(images, labels, classes, dataset.full_name, title + some, split)
        return Splits(**sets)

    sources = {"split": RULE, "classes": chosen, "skip": _skip(), "files": tree.stamps}
    which = hashlib.sha256(" ".join(chosen).encode()).hexdigest()[:8]
    return cached_splits(f"{dataset.name}-{which}", sources, folder.parent, build)


def _scan(folder: Path, chosen: tuple[str, ...]) -> ImageTree:
    """The files of all classes that are there, of the 200, and in any case of the chosen ones."""
    there = tuple(wnid for wnid in names() if wnid in chosen or (folder / "train" / wnid).is_dir())
    if (folder / "val" / ANNOTATIONS).is_file():
        return _scan_official(folder, there)
    return scan_tree(folder, splits=("train", "val"), classes=there, others=True)


def _split(tree: ImageTree, chosen: tuple[str, ...], *, progress: bool) -> dict[str, tuple[ImageFile, ...]]:
    """The chosen classes' files of train, val and test, in their order, labelled by their places in `chosen`.

    Which images are held out follows from all classes that are there: whoever trains on all of them, and then on some,
    has trained on none of the images that are held out of either.
    """
    files = {
        split: sound_files(tree, split, progress=progress) if _skip() else tree.files[split] for split in tree.files
    }
    place = {tree.classes.index(wnid): index for index, wnid in enumerate(chosen)}
    parts = {}
    for split, rows in split_rows(_labels(files["train"]), _labels(files["val"])).items():
        ordered = (files["val" if split == "test" else "train"][i] for i in rows.tolist())
        parts[split] = tuple(replace(file, label=place[file.label]) for file in ordered if file.label in place)
    return parts


def _labels(files: tuple[ImageFile, ...]) -> Tensor:
    return torch.tensor([file.label for file in files])


def _scan_official(folder: Path, chosen: tuple[str, ...]) -> ImageTree:
    """Tiny ImageNet as shipped: the validation images in one folder, their classes in a table beside it."""
    labels = {wnid: label for label, wnid in enumerate(chosen)}
    train = [file for wnid, label in labels.items() for file in list_images(folder, f"train/{wnid}/images", label)]
    images = {Path(file.path).name: file for file in list_images(folder, "val/images")}
    val = []
    for line in (folder / "val" / ANNOTATIONS).read_text(encoding="utf-8").splitlines():
        name, wnid, *_ = [*line.split("\t"), ""]
        if wnid in labels:
            if name not in images:
                raise SatlibError(
                    f"no image {folder / 'val' / 'images' / name}, which {ANNOTATIONS} lists; unpack again"
                )
            val.append(replace(images[name], label=labels[wnid]))
    if missing := [wnid for wnid in chosen if labels[wnid] not in {file.label for file in val}]:
        raise SatlibError(f"{folder / 'val' / ANNOTATIONS} lists no image of {missing[0]}; unpack the data set again")
    return ImageTree(folder, chosen, {"train": tuple(train), "val": tuple(val)})


def _skip() -> bool:
    return os.environ.get("SATLIB_SKIP_DAMAGED") == "1"


@cache
def names() -> dict[str, str]:
    """The 200 classes: a name for each wnid, in the order of the wnids."""
    lines = Path(__file__).with_name("imagenet200.tsv").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t", 1) for line in lines)


def wnids(option: str = "") -> tuple[str, ...]:
    """The classes that `option` stands for: all 200; evenly spaced ones, for a number; those listed in a text file,
    one wnid a line, for its path (from the project's folder, if relative).

    Raises `SatlibError` for a number outside 2..200, a file that cannot be read, or a wnid that is not of the 200.
    """
    known = tuple(names())
    if not option:
        return known
    if option.isdecimal():
        if not 2 <= int(option) <= len(known):
            raise SatlibError(f"{option} classes of ImageNet: expected 2 to {len(known)}")
        return tuple(known[i * len(known) // int(option)] for i in range(int(option)))
    try:
        listed = tuple(named_file(option).read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise SatlibError(f"cannot read the classes in {option} ({error}); expected one wnid a line") from None
    if unknown := [wnid for wnid in listed if wnid not in known]:
        raise SatlibError(f"{option}: {unknown[0]!r} is none of the {len(known)} wnids of Tiny ImageNet")
    if len(set(listed)) != len(listed) or len(listed) < 2:
        raise SatlibError(f"{option}: expected at least two wnids, each once")
    return listed
