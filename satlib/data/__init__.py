"""Data sets by name: `load("cifar10")`, or `load("shapes32")` for one that is drawn in code.

Importing this imports no reader: a data set's module follows when it is asked for.
"""

import importlib
import os
from pathlib import Path
from types import ModuleType

import torch

from satlib.data.datasets import DATASETS, FOLDERS, LOOKED_FOR, Dataset, described, row_of
from satlib.data.datasets import is_embedded as is_embedded
from satlib.data.datasets import training_images as training_images
from satlib.data.imageset import ImageSet, Splits
from satlib.errors import SatlibError
from satlib.paths import data_root

ARCHIVES = (".tar.gz", ".tgz", ".tar.xz", ".tar", ".zip")
DUMMY_PIXELS, DUMMY_IMAGES = 8_000_000, 128  # in a set of dummy data, at most


def load(name: str, *, root: str | Path | None = None, progress: bool = True) -> Splits:
    """The train, val and test sets of the data set `name`, on the CPU.

    "imagenet200:40" is ImageNet with 40 of the 200 classes, "imagenet200:FILE" with those whose wnids the file lists;
    "camvid:240x180" is CamVid at that width and height.
    `root` is the folder of the data sets, by default `satlib.paths.data_root()`; embedded sets need none.
    `progress` shows long decoding on stderr. Raises `SatlibError` for an unknown name, and for data that is
    missing or damaged.
    """
    dataset, folder = described(name), find(name, root=root)
    if folder is None and not dataset.embedded:
        raise SatlibError(_missing(dataset, _resolved(root)))
    return _module(dataset).load(dataset, folder, progress=progress)


def find(name: str, *, root: str | Path | None = None) -> Path | None:
    """The folder that `load` would read, without reading it; None where there is none, or for a set made in code."""
    base, _, _ = name.partition(":")
    places = {_resolved(root) / folder: holds for folder, holds in FOLDERS.get(base, {}).items()}
    return next((folder for folder, inner in places.items() if _holds(folder, inner)), None)


def _holds(folder: Path, inner: str) -> bool:
    """Whether a folder is there with the inner one; or where that is "", with anything: an empty one hides no other."""
    if inner:
        return os.path.isdir(folder / inner)
    try:
        return bool(os.listdir(folder))
    except OSError:
        return os.path.isdir(folder)


def verify(name: str, *, root: str | Path | None = None) -> Splits:
    """`load`, and read every image of a set that stays on disk, too. Raises `SatlibError` for the first bad one."""
    splits = load(name, root=root)
    for part in vars(splits).values():
        part.check()
    return splits


def download(name: str, *, root: str | Path | None = None) -> None:
    """Fetch the data set `name` into `root` (as for `load`). Raises `SatlibError` where that is not possible."""
    can = [row.name for row in DATASETS.values() if row.downloads]
    if name not in can:
        raise SatlibError(f"cannot download {name!r}; expected one of {', '.join(can)}")
    _module(DATASETS[name]).download(_resolved(root))


def dummy_data(name: str) -> Splits | None:
    """Noise with the geometry of the data set `name` (as for `load`), to time a network on where the set is not here;
    None for an unknown one, and for one that is never missing."""
    row = row_of(name)
    if row is None or row.embedded:
        return None
    dataset = described(name)
    channels, height, width = dataset.shape
    count = max(1, min(DUMMY_IMAGES, DUMMY_PIXELS // (height * width)))
    shape, kind = ((count, height, width), torch.uint8) if dataset.segmentation else ((count,), torch.int64)
    classes, generator = tuple(map(str, range(dataset.classes))), torch.Generator().manual_seed(0)
    sets = {}
    for split in ("train", "val", "test"):
        images = torch.randint(256, (count, channels, height, width), generator=generator, dtype=torch.uint8)
        labels = torch.randint(dataset.classes, shape, generator=generator, dtype=kind)
        sets[split] = ImageSet(images, labels, classes, name, f"dummy data for {name}", split)
    return Splits(**sets)


def _module(dataset: Dataset) -> ModuleType:
    return importlib.import_module(f"satlib.data.{dataset.module}")


def _resolved(root: str | Path | None) -> Path:
    return data_root() if root is None else Path(root).resolve()


def _missing(dataset: Dataset, root: Path) -> str:
    """What was looked for, and what to do about it; of an archive with that name, that it is still packed."""
    from satlib.data.imagetree import UNPACK, folder_problem  # here, for it imports much

    looked_for = LOOKED_FOR[dataset.name]
    wrong = folder_problem(root, "make it")
    for path in () if wrong else (*sorted(root.glob("[!.]*")), *sorted((root / dataset.name).glob("[!.]*"))):
        packed, name = path.name.lower().endswith(ARCHIVES) or not path.suffix, path.name.lower().replace("-", "")
        if packed and os.path.isfile(path) and dataset.name in name:
            mend = f"if it is an archive, unpack it so that {root} holds {looked_for}"
            return f"{path} is a file, expected a folder; {mend}"
    mends = ["set SATLIB_DATA to the folder that holds it", "place it there"]
    if dataset.downloads:
        mends.append(f"run `python -m satlib data download {dataset.name}`")
    there = {root / folder: holds for folder, holds in FOLDERS[dataset.name].items() if os.path.lexists(root / folder)}
    found = [wrong] if wrong else [folder_problem(folder / holds, UNPACK) for folder, holds in there.items()]
    why = "; ".join([f"looked for {looked_for}", *filter(None, found)])
    return f"no {dataset.title} in {root}: {why}; {', '.join(mends[:-1])}, or {mends[-1]}"
