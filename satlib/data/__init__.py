"""Data sets by name: `load("cifar10")`, or `load("shapes32")` for an embedded synthetic stand-in."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from satlib.data import cifar10, imagenet, scenes, shapes, streets
from satlib.data.imageset import ImageSet, Splits
from satlib.data.standins import stand_in
from satlib.data.streamed import StreamedSet
from satlib.errors import SatlibError
from satlib.paths import data_root

__all__ = ["NAMES", "ImageSet", "Splits", "StreamedSet", "download", "load", "place", "stand_in", "verify"]

_LOADERS: dict[str, Callable[..., Splits]] = {
    "cifar10": cifar10.load,
    "imagenet200": imagenet.load,
    "imagenet200-224": imagenet.load_large,
    **{name: partial(scenes.load, name) for name in scenes.LAYOUTS},
    **{name: partial(shapes.load, name) for name in shapes.FAMILIES},
    **{name: partial(streets.load, name) for name in streets.FAMILIES},
}
_PLACES: dict[str, Callable[[Path], Path | None]] = {
    "cifar10": cifar10.place,
    "imagenet200": imagenet.place,
    "imagenet200-224": imagenet.place_large,
    **{name: partial(scenes.place, name) for name in scenes.LAYOUTS},
}
_WITH_OPTION = ("imagenet200", "imagenet200-224", *scenes.LAYOUTS)
_DOWNLOADS = {"cifar10": cifar10.download}
NAMES = tuple(_LOADERS)


def load(name: str, *, root: str | Path | None = None, progress: bool = True) -> Splits:
    """The train, val and test sets of the data set `name`, on the CPU.

    "imagenet200:40" is ImageNet with 40 of the 200 classes, "imagenet200:FILE" with those whose wnids the file lists;
    "camvid:240x180" is CamVid at that width and height.
    `root` is the folder of the data sets, by default `satlib.paths.data_root()`; embedded sets need none.
    `progress` shows long decoding on stderr. Raises `SatlibError` for an unknown name, and for data that is
    missing or damaged.
    """
    name, _, option = name.partition(":")
    if name not in _LOADERS:
        raise SatlibError(f"unknown data set {name!r}; expected one of {', '.join(_LOADERS)}")
    if option and name not in _WITH_OPTION:
        raise SatlibError(f"data set {name!r} has no options: {option!r}; only {', '.join(_WITH_OPTION)} have")
    return _LOADERS[name](_resolved(root), *filter(None, [option]), progress=progress)


def place(name: str, *, root: str | Path | None = None) -> Path | None:
    """The folder that `load` would read, without reading it; None where there is none, or for a set made in code."""
    return _PLACES[name](_resolved(root)) if name in _PLACES else None


def verify(name: str, *, root: str | Path | None = None) -> Splits:
    """`load`, and read every image of a set that stays on disk, too. Raises `SatlibError` for the first bad one."""
    splits = load(name, root=root)
    for part in vars(splits).values():
        if isinstance(part, StreamedSet):
            part.check()
    return splits


def download(name: str, *, root: str | Path | None = None) -> None:
    """Fetch the data set `name` into `root` (as for `load`). Raises `SatlibError` where that is not possible."""
    if name not in _DOWNLOADS:
        raise SatlibError(f"cannot download {name!r}; expected one of {', '.join(_DOWNLOADS)}")
    _DOWNLOADS[name](_resolved(root))


def _resolved(root: str | Path | None) -> Path:
    return data_root() if root is None else Path(root).resolve()


def training_images(name: str) -> int:
    base, _, option = name.partition(":")
    known = {"cifar10": 45_000, "imagenet200": 90_000, "imagenet200-224": 234_000, "shapes32": 9_000, "shapes64": 8_000, "cityscapes": 2975, "camvid": 367, "streets128x64": 400, "streets256x128": 400}
    images = known.get(base, 45_000)
    return images * int(option) // 200 if option.isdecimal() else images
