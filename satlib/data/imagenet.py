"""ImageNet with 200 classes (section 6.2): a user's ImageNet at 224x224, or Tiny ImageNet at its own 64x64."""

import hashlib
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

from satlib.data.cache import cached_splits
from satlib.data.datasets import Dataset
from satlib.data.imageset import SPLIT_RULE, ImageSet, Splits, held_out
from satlib.data.imagetree import UNPACK, ImageFile, Listing, Tree, labels_of, read_images, reason, sound_files, stamps
from satlib.data.streamed import StreamedImages, StreamedSet
from satlib.errors import SatlibError
from satlib.paths import named_file

ANNOTATIONS = "val_annotations.txt"


def load(dataset: Dataset, folder: Path, *, progress: bool = True) -> Splits:
    """ImageNet in `folder`: of each class nine tenths of its train/ images as train, the others as val, and its val/
    images as test. The dataset's option says which classes, as `wnids` takes it; only these are looked at.

    Both splits: <wnid>/*.JPEG or <wnid>/images/*.JPEG; or, for val/, images/<wnid>/*.JPEG, or as Tiny ImageNet's
    authors ship it, images/*.JPEG and val_annotations.txt. All give the same sets. Tiny ImageNet is decoded once and
    then cached, as 3x64x64; the images of ImageNet stay on disk, and come as 3x224x224.

    A damaged image ends it, named (where images stay on disk, when its turn comes); with SATLIB_SKIP_DAMAGED=1 in the
    environment every image is read once, before all else, and damaged ones are left out, with a warning. Raises
    `SatlibError` for what is missing or damaged.
    """
    chosen, side, skip = wnids(dataset.option), dataset.shape[1], os.environ.get("SATLIB_SKIP_DAMAGED") == "1"
    # Of the 200 classes all that are there are listed, for what is held out follows from all of them: see `_split`.
    there = tuple(wnid for wnid in names() if wnid in chosen or (folder / "train" / wnid).is_dir())
    tree = _scan(folder, there)
    classes, title = tuple(names()[wnid] for wnid in chosen), f"{dataset.title} ({side}x{side})"

    def parts() -> Tree:
        sound = {split: sound_files(folder, tree, split, progress=progress) for split in tree} if skip else tree
        return _split(sound, [there.index(wnid) for wnid in chosen])

    if dataset.name == "imagenet200-224":
        sets, title = {}, f"{title}, {len(chosen)} classes"
        for split, files in parts().items():
            images = StreamedImages(folder, files, side)
            sets[split] = StreamedSet(images, labels_of(files), classes, dataset.full_name, title, split)
        return Splits(**sets)

    def build() -> Splits:
        some = f", {len(chosen)} of its classes" if len(chosen) < len(names()) else ""
        sets, files = {}, parts()
        for split in files:
            images, labels = read_images(folder, files, split, size=(side, side), progress=progress)
            sets[split] = ImageSet(images, labels, classes, dataset.full_name, title + some, split)
        return Splits(**sets)

    sources = {"split": SPLIT_RULE, "classes": chosen, "skip": skip, "files": stamps(tree)}
    which = hashlib.sha256(" ".join(chosen).encode()).hexdigest()[:8]
    return cached_splits(f"{dataset.name}-{which}", sources, folder.parent, build)


def _split(tree: Tree, chosen: list[int]) -> Tree:
    """The chosen classes' files of train, val and test, in their order, labelled by their places in `chosen`.

    Which images are held out follows from all classes that are there: whoever trains on all of them, and then on some,
    has trained on none of the images that are held out of either.
    """
    place, parts = {label: index for index, label in enumerate(chosen)}, {}
    for split, rows in held_out(labels_of(tree["train"]), labels_of(tree["val"])).items():
        ordered = (tree["val" if split == "test" else "train"][row] for row in rows.tolist())
        parts[split] = tuple(replace(file, label=place[file.label]) for file in ordered if file.label in place)
    return parts


def _scan(folder: Path, classes: tuple[str, ...]) -> Tree:
    """The images of train/ and val/, each class by class, by name, whatever the layout."""
    listing, val = Listing(folder, companions=("_boxes.txt", ANNOTATIONS)), folder / "val"
    for split in ("train", "val"):
        listing.entries(split, f"expected train/, val/ in {folder}")
    train = listing.by_class("train", classes, others=True, nested=("images",))
    in_folders, in_place = (any(os.path.isdir(place / wnid) for wnid in classes) for place in (val, val / "images"))
    known = len(listing.left_out)
    loose = listing.images("val/images", needed=False) if os.path.isdir(val / "images") else []
    if in_place and not loose and not in_folders:
        del listing.left_out[known:]  # the class folders
        test = listing.by_class("val/images", classes, others=True, nested=("images",))
        listing.warn()
        return {"train": tuple(train), "val": tuple(test)}
    signs = [bool(loose), (val / ANNOTATIONS).is_file(), not in_folders]  # of val/ as it is shipped
    if sum(signs) >= 2:
        test = _as_shipped(listing, loose, classes, in_folders)
    else:
        listing.left_out += [file.path for file in loose]
        test = listing.by_class("val", classes, others=True, nested=("images",))
    listing.warn()
    return {"train": tuple(train), "val": tuple(test)}


def _as_shipped(
    listing: Listing, loose: list[ImageFile], classes: tuple[str, ...], in_folders: bool
) -> list[ImageFile]:
    """Tiny ImageNet's validation images as shipped: in one folder, their classes in a table beside it."""
    labels, table = {wnid: label for label, wnid in enumerate(classes)}, listing.folder / "val" / ANNOTATIONS
    images = {Path(file.path).name: file for file in loose or listing.images("val/images")}
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        if not os.path.lexists(table):
            raise SatlibError(f"no {table}, which says the classes of val/images/; {UNPACK}") from None
        why = reason(error) if isinstance(error, OSError) else f"{error}; {UNPACK}"
        raise SatlibError(f"cannot read {table}: {why}") from None
    listed = {name: wnid for name, wnid, *_ in ([*line.split("\t"), ""] for line in lines)}
    wanted = {name: labels[wnid] for name, wnid in listed.items() if wnid in labels}
    if missing := sorted(wanted.keys() - images.keys()):
        mend = "sort all of val/ into class folders, or unpack it again" if in_folders else "unpack again"
        raise SatlibError(f"no image {table.parent / 'images' / missing[0]}, which {ANNOTATIONS} lists; {mend}")
    if missing := sorted(labels.keys() - {listed[name] for name in wanted}):
        raise SatlibError(f"{table} lists no image of {missing[0]}; {UNPACK}")
    listing.left_out += [f"val/images/{name}" for name in images if name not in listed]
    return [replace(images[name], label=label) for name, label in sorted(wanted.items(), key=lambda item: item[::-1])]


@cache
def names() -> dict[str, str]:
    """The 200 classes: a name for each wnid, in the order of the wnids."""
    return {wnid: name for wnid, name, _ in _table()}


@cache
def indices() -> dict[str, int]:
    """Where each of the 200 stands among the 1,000 classes of ImageNet, as networks trained on these have them."""
    return {wnid: int(index) for wnid, _, index in _table()}


def _table() -> list[list[str]]:
    lines = Path(__file__).with_name("imagenet200.tsv").read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines]


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
