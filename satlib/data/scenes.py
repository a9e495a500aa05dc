"""Driving scenes with a label for every pixel, from disk: Cityscapes in its own layout, and CamVid in two."""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from satlib.data.cache import cached_splits
from satlib.data.datasets import DATASETS, Dataset
from satlib.data.imageset import IGNORE, ImageSet, Splits, shuffled
from satlib.data.imagetree import ImageFile, Listing, decode, decode_as_is, problems, refuse
from satlib.errors import SatlibError

Scene = tuple[str, ImageFile, ImageFile]  # its name, its image and its labels

# What Cityscapes ships and makes beside its images and labels.
COMPANIONS = (".json", "_color", "_instanceIds", "_instanceTrainIds", "_labelTrainIds")
UNKNOWN = 254  # for what is no label at all
VALUES = {"camvid": "0..11", "cityscapes": "0..33, 255"}  # those of `label_values`, in words


def _camvid(listing: Listing) -> dict[str, list[Scene]]:
    """In {train,val,test}/{images,labels}/; or as SegNet's tutorial ships it, in {train,val,test}{,annot}/."""
    splits, folder = ("train", "val", "test"), listing.folder
    inside = any(os.path.isdir(folder / split / "images") for split in splits)
    if not inside and any(os.path.lexists(folder / f"{split}annot") for split in splits):
        return {split: _pairs(listing, split, f"{split}annot") for split in splits}
    return {split: _pairs(listing, f"{split}/images", f"{split}/labels") for split in splits}


def _cityscapes(listing: Listing) -> dict[str, list[Scene]]:
    """Of the public validation scenes one half crafts and chooses, and the other one reports."""
    tails = ("_leftImg8bit", "_gtFine_labelIds")
    train, public = (_pairs(listing, f"leftImg8bit/{split}", f"gtFine/{split}", tails) for split in ("train", "val"))
    order, half = shuffled(len(public), 0).tolist(), len(public) // 2
    val, test = ([public[i] for i in sorted(part)] for part in (order[:half], order[half:]))
    return {"train": train, "val": val, "test": test}


def _pairs(listing: Listing, images: str, labels: str, tails: tuple[str, str] = ("", "")) -> list[Scene]:
    """Scenes by name, from the folders of their images and labels; a file's name is the scene's, and then the tail."""
    pictures, maps = (_by_scene(listing, place, tail) for place, tail in zip((images, labels), tails, strict=True))
    for name in sorted(pictures.keys() ^ maps.keys()):
        have, lacks = (pictures, f"labels in {labels}") if name in pictures else (maps, f"image in {images}")
        raise SatlibError(f"{listing.folder / have[name].path} has no {lacks}; restore that file, or remove this one")
    return [(name, picture, maps[name]) for name, picture in pictures.items()]


def _by_scene(listing: Listing, place: str, tail: str) -> dict[str, ImageFile]:
    files: dict[str, ImageFile] = {}
    for file in listing.images(place, tail=tail, nested="*"):
        name = Path(file.path).stem.removesuffix(tail)
        if name in files:
            raise SatlibError(f"{listing.folder}: {files[name].path} and {file.path} are one scene's; remove one")
        files[name] = file
    return files


SCENES = {"camvid": _camvid, "cityscapes": _cityscapes}  # of each split, as listed below a folder


@cache
def label_values(name: str) -> dict[int, str]:
    """What a data set's files of labels may hold: the class of each value, "" for none."""
    lines = Path(__file__).with_name("scenes.tsv").read_text(encoding="utf-8").splitlines()
    return {int(value): label for dataset, value, label in (line.split("\t") for line in lines) if dataset == name}


def load(dataset: Dataset, folder: Path, *, progress: bool = True) -> Splits:
    """Scenes in `folder`, resized once (images bilinear, labels by their nearest pixel), shuffled once, cached.

    `labels` are uint8 (n, H, W), with 255 for no class, and `frames` are the scenes' names. Raises `SatlibError` if
    folders are not there, a scene lacks its image or its labels, these differ in size, or a label has a value that the
    data set does not know.
    """
    (_, height, width), classes = dataset.shape, tuple(filter(None, label_values(dataset.name).values()))
    listing = Listing(folder, companions=COMPANIONS)
    scenes = {
        split: [ordered[i] for i in shuffled(len(ordered), 1).tolist()]
        for split, ordered in SCENES[dataset.name](listing).items()
    }
    listing.warn()
    stamps = [file.stamp for part in scenes.values() for _, *files in part for file in files]
    usual = dataset.shape == DATASETS[dataset.name].shape
    title = dataset.title if usual else f"{dataset.title} ({width}x{height})"

    def build() -> Splits:
        sets = {}
        for split, part in scenes.items():
            images, labels = _read(dataset, folder, part, split, progress)
            frames = tuple(scene for scene, *_ in part)
            sets[split] = ImageSet(images, labels, classes, dataset.full_name, title, split, frames)
        return Splits(**sets)

    sources = {"size": (width, height), "files": stamps}
    return cached_splits(f"{dataset.name}-{width}x{height}", sources, folder.parent, build)


def _read(dataset: Dataset, folder: Path, scenes: Sequence[Scene], split: str, progress: bool) -> tuple[Tensor, Tensor]:
    """Images uint8 (n, 3, H, W) and labels uint8 (n, H, W). Raises `SatlibError` for the first bad file."""
    known, class_of = label_values(dataset.name), np.full(256, UNKNOWN, dtype=np.uint8)
    class_of[list(known)] = IGNORE
    class_of[[value for value, label in known.items() if label]] = range(dataset.classes)
    _, height, width = dataset.shape
    images = np.empty((len(scenes), height, width, 3), dtype=np.uint8)
    labels = np.empty((len(scenes), height, width), dtype=np.uint8)

    def read(row: int) -> None:
        _, picture, label = scenes[row]
        pixels = decode(folder, picture.path)
        values = decode_as_is(folder, label.path, _one_byte, formats=("PNG",))
        if values.shape != pixels.shape[:2]:
            sides = f"{values.shape[1]}x{values.shape[0]} pixels, but its image has {pixels.shape[1]}x{pixels.shape[0]}"
            raise SatlibError(f"{label.path}: {sides}")
        mapped = class_of[values]
        if (mapped == UNKNOWN).any():
            strange, expected = values[mapped == UNKNOWN][0], VALUES[dataset.name]
            raise SatlibError(f"{label.path}: the value {strange} is no label; expected some of {expected}")
        images[row] = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
        labels[row] = Image.fromarray(mapped).resize((width, height), Image.Resampling.NEAREST)

    refuse(folder, problems(read, range(len(scenes)), f"decoding {dataset.name}/{split}", progress))
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)


def _one_byte(image: Image.Image) -> Image.Image:
    """A map of labels as it is, without the palette that it may have."""
    if image.mode not in ("L", "P"):
        raise SatlibError(f"a {image.mode} image; labels are one byte a pixel")
    return image
