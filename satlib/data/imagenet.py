"""ImageNet with 200 classes (section 6.2): a user's ImageNet at 224x224, or Tiny ImageNet at its own 64x64."""

import hashlib
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from satlib.data.cache import cached_splits
from satlib.data.imageset import ImageSet, Splits
from satlib.data.imagetree import ImageFile, ImageTree, read_images, scan_class, scan_tree, sound_files
from satlib.data.splitting import RULE
from satlib.data.splitting import rows as split_rows
from satlib.data.streamed import StreamedSet
from satlib.errors import SatlibError
from satlib.paths import named_file

SIZE = (64, 64)
FOLDERS = ("imagenet200", "tiny-imagenet-200")
ANNOTATIONS = "val_annotations.txt"


def place(root: Path) -> Path | None:
    """The folder that `load` reads; None where there is none."""
    return next((root / name for name in FOLDERS if (root / name / "train").is_dir()), None)


def place_large(root: Path) -> Path | None:
    """The folder that `load_large` reads; None where there is none."""
    return root / "imagenet" if (root / "imagenet" / "train").is_dir() else None


def load(root: Path, option: str = "", *, progress: bool = True) -> Splits:
    """Tiny ImageNet below `root`: of each class nine tenths of its train/ images as train, the others as val, and
    its val/ images as test; 3x64x64.

    Read from `root`/imagenet200/{train,val}/<wnid>/*.JPEG, or as its authors ship it (`root`/tiny-imagenet-200 with
    train/<wnid>/images/ and val/val_annotations.txt), decoded once and then cached. option: which classes, as
    `wnids` takes it. A damaged image ends it, named; with SATLIB_SKIP_DAMAGED=1 in the environment it is left
    out, with a warning. Raises `SatlibError` if the folders are not there, and for what is damaged.
    """
    chosen, folder = wnids(option), place(root)
    if folder is None:
        raise SatlibError(
            f"no Tiny ImageNet in {root}: looked for {FOLDERS[0]}/{{train,val}}/<wnid>/*.JPEG and {FOLDERS[1]}/ as its "
            "authors ship it; set SATLIB_DATA to the folder that holds it, or place it there"
        )
    tree = _scan(folder, chosen)
    sources = {
        "split": RULE,
        "classes": chosen,
        "skip": _skip(),
        "files": [[file.path, file.size, file.mtime_ns] for files in tree.files.values() for file in files],
    }

    def build() -> Splits:
        files, sets = _split(tree, chosen, progress=progress), {}
        part = ImageTree(folder, chosen, files)
        name = "imagenet200" + (f":{option}" if option else "")
        for split in files:
            images, labels = read_images(part, split, size=SIZE, progress=progress)
            sets[split] = ImageSet(images, labels, tuple(names()[wnid] for wnid in chosen), name, _title(part), split)
        return Splits(**sets)

    which = hashlib.sha256(" ".join(chosen).encode()).hexdigest()[:8]
    return cached_splits(f"imagenet200-{which}", sources, root, build)


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
    labels = {split: torch.tensor([file.label for file in files[split]]) for split in files}
    place = {tree.classes.index(wnid): index for index, wnid in enumerate(chosen)}
    found = {}
    for split, rows in split_rows(labels["train"], labels["val"]).items():
        ordered = (files["val" if split == "test" else "train"][i] for i in rows.tolist())
        found[split] = tuple(replace(file, label=place[file.label]) for file in ordered if file.label in place)
    return found


def _scan_official(folder: Path, chosen: tuple[str, ...]) -> ImageTree:
    """Tiny ImageNet as shipped: the validation images in one folder, their classes in a table beside it."""
    train = []
    for label, wnid in enumerate(chosen):
        if not (folder / "train" / wnid / "images").is_dir():
            raise SatlibError(f"no folder {folder / 'train' / wnid / 'images'}; unpack the data set again")
        train += scan_class(folder, f"train/{wnid}/images", label)
    images = {Path(file.path).name: file for file in scan_class(folder, "val/images", 0)}
    labels = {wnid: label for label, wnid in enumerate(chosen)}
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


def load_large(root: Path, option: str = "", *, progress: bool = True) -> Splits:
    """ImageNet below `root` at 224x224, of which only the chosen classes are looked at; the images stay on disk.

    Looked for in `root`/imagenet/{train,val}/<wnid>/*.JPEG, the validation images in class folders as well. option,
    and the three sets: as for `load`. With SATLIB_SKIP_DAMAGED=1 in the environment every image is read once, before
    all else, and damaged ones are left out, with a warning. Raises `SatlibError` if the folders are not there; a
    damaged image is named when its turn comes.
    """
    chosen, folder = wnids(option), place_large(root)
    if folder is None:
        raise SatlibError(
            f"no ImageNet in {root}: looked for imagenet/{{train,val}}/<wnid>/*.JPEG; "
            "set SATLIB_DATA to the folder that holds imagenet/, or link it there"
        )
    classes = tuple(names()[wnid] for wnid in chosen)
    title = "ImageNet (224x224)" + (f", {len(chosen)} classes" if len(chosen) < len(names()) else ", 200 classes")
    name = "imagenet200-224" + (f":{option}" if option else "")
    sets = {}
    for split, files in _split(_scan(folder, chosen), chosen, progress=progress).items():
        labels = torch.tensor([file.label for file in files])
        sets[split] = StreamedSet(folder, files, labels, 224, classes, name, title, split)
    return Splits(**sets)


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


def _title(tree: ImageTree) -> str:
    count = len(tree.classes)
    return "Tiny ImageNet (64x64)" + (f", {count} of its classes" if count < len(names()) else "")
