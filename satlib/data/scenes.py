"""Driving scenes with a label for every pixel, from disk: Cityscapes in its own layout, and CamVid."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from satlib.data.cache import cached_splits
from satlib.data.imageset import IGNORE, ImageSet, Splits
from satlib.data.imagetree import bad_image, decode, shown
from satlib.data.splitting import shuffled
from satlib.errors import SatlibError

Pair = tuple[str, str, str]  # a scene's name, and the paths of its image and of its labels below the data set's folder

CAMVID = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign symbol",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
# The label ids that are classes, in the order of their train ids; the others up to 33 are none.
CITYSCAPES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
UNKNOWN = 254


@dataclass(frozen=True)
class Layout:
    """How a data set of scenes lies on disk.

    size: (width, height) unless an option says otherwise. values: the class of each value in a file of labels, IGNORE
    for none. pairs: the scenes of each split below a folder; expected: what is looked for, in words.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    size: tuple[int, int]
    values: Mapping[int, int]
    pairs: Callable[[Path], dict[str, list[Pair]]]
    expected: str


def _camvid(folder: Path) -> dict[str, list[Pair]]:
    return {
        split: _pairs(folder, (f"{split}/images", (".jpg", ".jpeg", ".png")), (f"{split}/labels", (".png",)))
        for split in ("train", "val", "test")
    }


def _cityscapes(folder: Path) -> dict[str, list[Pair]]:
    """Of the public validation scenes one half crafts and chooses, and the other one reports."""
    train, public = (
        _pairs(folder, (f"leftImg8bit/{split}", ("_leftImg8bit.png",)), (f"gtFine/{split}", ("_gtFine_labelIds.png",)))
        for split in ("train", "val")
    )
    order, half = shuffled(len(public), 0).tolist(), len(public) // 2
    val, test = ([public[i] for i in sorted(part)] for part in (order[:half], order[half:]))
    return {"train": train, "val": val, "test": test}


def _pairs(folder: Path, images: tuple[str, tuple[str, ...]], labels: tuple[str, tuple[str, ...]]) -> list[Pair]:
    """Scenes by name, from two folders with the endings of their files; what is before the ending is the name."""

    def found(place: str, endings: tuple[str, ...]) -> dict[str, str]:
        if not (folder / place).is_dir():
            raise SatlibError(f"no folder {folder / place}; unpack the data set again")
        paths = sorted(path for path in (folder / place).rglob("*") if not path.name.startswith("."))
        return {
            path.name.removesuffix(ending): str(path.relative_to(folder))
            for path in paths
            for ending in endings
            if path.name.endswith(ending)
        }

    pictures, maps = found(*images), found(*labels)
    for name in sorted(pictures.keys() ^ maps.keys()):
        have, lacks = (pictures, f"labels in {labels[0]}") if name in pictures else (maps, f"image in {images[0]}")
        raise SatlibError(f"{folder / have[name]} has no {lacks}; restore that file, or remove this one")
    if not pictures:
        raise SatlibError(f"no *{images[1][0]} in {folder / images[0]}; unpack the data set again")
    return [(name, pictures[name], maps[name]) for name in pictures]


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            name="camvid",
            title="CamVid",
            classes=CAMVID,
            size=(480, 360),
            values={value: value for value in range(11)} | {11: IGNORE},
            pairs=_camvid,
            expected="camvid/{train,val,test}/{images,labels}/<scene>.{jpg,png}",
        ),
        Layout(
            name="cityscapes",
            title="Cityscapes",
            classes=tuple(CITYSCAPES.values()),
            size=(1024, 512),
            values=dict.fromkeys((*range(34), 255), IGNORE) | {value: index for index, value in enumerate(CITYSCAPES)},
            pairs=_cityscapes,
            expected="cityscapes/{leftImg8bit,gtFine}/{train,val}/<city>/*_{leftImg8bit,gtFine_labelIds}.png",
        ),
    )
}


def place(name: str, root: Path) -> Path | None:
    """The folder that `load` reads; None where there is none."""
    return root / name if (root / name).is_dir() else None


def load(name: str, root: Path, option: str = "", *, progress: bool = True) -> Splits:
    """Scenes of `root`/<name>, resized once (images bilinear, labels by their nearest pixel), shuffled once, cached.

    option: "240x180" for another width and height. `labels` are uint8 (n, H, W), with 255 for no class, and `frames`
    are the scenes' names. Raises `SatlibError` if the folders are not there, a scene lacks its image or its labels,
    these differ in size, or a label has a value that the data set does not know.
    """
    layout, folder = LAYOUTS[name], place(name, root)
    size = _size(name, option) or layout.size
    if folder is None:
        raise SatlibError(
            f"no {layout.title} in {root}: looked for {layout.expected}; "
            "set SATLIB_DATA to the folder that holds it, or place it there"
        )
    pairs = layout.pairs(folder)
    pairs = {split: [scenes[i] for i in shuffled(len(scenes), 1).tolist()] for split, scenes in pairs.items()}
    stamps = [
        [path, status.st_size, status.st_mtime_ns]
        for scenes in pairs.values()
        for _, *paths in scenes
        for path in paths
        for status in [(folder / path).stat()]
    ]
    title = layout.title + (f" ({size[0]}x{size[1]})" if size != layout.size else "")

    def build() -> Splits:
        sets = {}
        for split, scenes in pairs.items():
            images, labels = _read(folder, scenes, size, layout.values, f"decoding {name}/{split}", progress)
            frames = tuple(scene for scene, *_ in scenes)
            whole = name + (f":{option}" if option else "")
            sets[split] = ImageSet(images, labels, layout.classes, whole, title, split, frames)
        return Splits(**sets)

    return cached_splits(f"{name}-{size[0]}x{size[1]}", {"size": size, "files": stamps}, root, build)


def _size(name: str, option: str) -> tuple[int, int] | None:
    if not option:
        return None
    sides = option.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and 16 <= int(side) <= 4096 for side in sides):
        raise SatlibError(f"{name}:{option}: expected a width and a height from 16 to 4096, such as {name}:240x180")
    return int(sides[0]), int(sides[1])


def _read(
    folder: Path, scenes: Sequence[Pair], size: tuple[int, int], values: Mapping[int, int], what: str, progress: bool
) -> tuple[Tensor, Tensor]:
    """Images uint8 (n, 3, H, W) and labels uint8 (n, H, W). Raises `SatlibError` for the first bad file."""
    known = np.full(256, UNKNOWN, dtype=np.uint8)
    known[list(values)] = list(values.values())
    width, height = size
    images = torch.empty((len(scenes), height, width, 3), dtype=torch.uint8)
    labels = torch.empty((len(scenes), height, width), dtype=torch.uint8)

    def one(row: int) -> tuple[str, str] | None:
        _, picture, label = scenes[row]
        seen: list[tuple[int, int]] = []

        def resized(image: Image.Image) -> Image.Image:
            seen.append(image.size)
            return image.convert("RGB").resize(size, Image.Resampling.BILINEAR)

        image = decode(folder / picture, resized)
        if isinstance(image, str):
            return picture, image
        found = _label_values(folder / label)
        if isinstance(found, str):
            return label, found
        if found.size != seen[0]:
            (w, h), (a, b) = found.size, seen[0]
            return label, f"{w}x{h} pixels, but its image has {a}x{b}"
        mapped = known[np.asarray(found)]
        if (mapped == UNKNOWN).any():
            strange = int(np.asarray(found)[mapped == UNKNOWN][0])
            return label, f"the value {strange} is no label; expected some of {_ranges(values)}"
        images[row] = image
        labels[row] = torch.from_numpy(np.array(Image.fromarray(mapped).resize(size, Image.Resampling.NEAREST)))
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = zip(([scene] for scene in scenes), pool.map(one, range(len(scenes))), strict=True)
        if bad := [problem for _, problem in shown(done, len(scenes), what, progress) if problem]:
            raise SatlibError(bad_image(folder, bad))
    return images.permute(0, 3, 1, 2), labels


def _label_values(path: Path) -> Image.Image | str:
    """A map of labels as one byte a pixel, or what is wrong with the file."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.mode not in ("L", "P"):
                return f"a {image.mode} image; labels are one byte a pixel"
            image.load()
            return Image.frombytes("L", image.size, image.tobytes())
    except UnidentifiedImageError:
        return "not a PNG image"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"damaged or truncated ({error})"


def _ranges(values: Mapping[int, int]) -> str:
    """The numbers in words: "0..33, 255"."""
    parts: list[list[int]] = []
    for value in sorted(values):
        if parts and value == parts[-1][-1] + 1:
            parts[-1][1:] = [value]
        else:
            parts.append([value])
    return ", ".join(f"{part[0]}..{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
