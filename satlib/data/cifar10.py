"""CIFAR-10 as its author ships it or from an image tree, split into train, val and test."""

import hashlib
import io
import pickle
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from satlib.data.cache import cached_splits
from satlib.data.datasets import Dataset
from satlib.data.imageset import Splits
from satlib.data.imagetree import read_images, scan_tree
from satlib.data.splitting import RULE, held_out
from satlib.errors import SatlibError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = "cifar-10-batches-py"
LOOKED_FOR = {"cifar10": f"{BATCHES}/, cifar10/{BATCHES}/ or cifar10/{{train,test}}/<class>/*.{{png,jpg,jpeg}}"}


def find(name: str, root: Path) -> Path | None:
    """The folder that `load` reads: the author's batches, else an image tree; None where there is none."""
    tree = root / "cifar10"
    for folder in (place / layout for layout in LAYOUTS for place in (root, tree)):
        if folder.is_dir():
            return folder
    return tree if (tree / "train").is_dir() or (tree / "test").is_dir() else None


def load(dataset: Dataset, folder: Path, *, progress: bool = True) -> Splits:
    """CIFAR-10 in `folder`: 45,000 train, 5,000 val and 10,000 test images of 3x32x32.

    The folder has one of LAYOUTS, or is an image tree, {train,test}/<class>/*.{png,jpg,jpeg} (decoded once, then
    cached). Validation images are taken from the training images. All sets are shuffled once, always alike. Raises
    `SatlibError` if what is there is damaged.
    """
    if read := LAYOUTS.get(folder.name):
        return held_out(dataset, dataset.title, CLASSES, read(folder))
    tree = scan_tree(folder, splits=("train", "test"), classes=CLASSES)

    def build() -> Splits:
        lossless = all(file.path.lower().endswith(".png") for files in tree.files.values() for file in files)
        title = (
            f"{dataset.title} ({'image tree' if lossless else 'JPEG copy'})"  # whose pixels are not the official ones
        )
        size = dataset.shape[1:]
        decoded = {split: read_images(tree, split, size=size, progress=progress) for split in tree.files}
        return held_out(dataset, title, CLASSES, decoded)

    return cached_splits(dataset.name, {"split": RULE, "files": tree.stamps}, folder.parent, build)


def download(root: Path) -> None:
    """Fetch the official archive with torchvision, check it and unpack it to `root`/cifar-10-batches-py."""
    from torchvision.datasets import CIFAR10  # here, for it takes long to import

    try:
        root.mkdir(parents=True, exist_ok=True)
        CIFAR10(root=str(root), download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        raise SatlibError(
            f"could not download CIFAR-10 to {root}: {error}; check the network and the folder, "
            f"or place the image tree {root / 'cifar10'}/{{train,test}}/<class>/*.png"
        ) from error


def read_batches(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The official python batches: for train and test, uint8 images (n, 3, 32, 32) and int64 labels (n,)."""
    from torchvision.datasets import CIFAR10 as official

    read = {}
    for split, files in (("train", official.train_list), ("test", official.test_list)):
        parts = [_read_batch(folder / name, md5) for name, md5 in files]
        read[split] = tuple(torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
    return read


def _read_batch(path: Path, md5: str) -> tuple[np.ndarray, np.ndarray]:
    mend = "unpack the official cifar-10-python.tar.gz again, or run `python -m satlib data download cifar10`"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SatlibError(f"cannot read {path} ({error.strerror}); {mend}") from None
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != md5:
        raise SatlibError(f"wrong file {path}: its MD5 is {found}, expected {md5}; {mend}")
    try:
        batch = _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
        pixels, labels = batch[b"data"], np.asarray(batch[b"labels"])
        images = pixels.reshape(-1, 3, 32, 32)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise SatlibError(f"not a CIFAR-10 batch: {path} ({error!r}); {mend}") from None
    if images.dtype != np.uint8 or labels.dtype.kind != "i" or len(labels) != len(images) or not len(labels):
        raise SatlibError(
            f"not a CIFAR-10 batch: {path} has {len(images)} images ({images.dtype}) and {len(labels)} labels "
            f"({labels.dtype}); {mend}"
        )
    if labels.min() < 0 or labels.max() >= len(CLASSES):
        raise SatlibError(f"labels in {path} range over {labels.min()}..{labels.max()}, expected 0..9; {mend}")
    return images, labels.astype(np.int64)


# How each layout of the author's is read, by the name of its folder; the first that is there is.
LAYOUTS = {BATCHES: read_batches}

# The module of `_reconstruct` has two names: NumPy 1's, which the official files use, and NumPy 2's.
_reconstruct = np.empty(0).__reduce__()[0]
_BATCH_GLOBALS = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
}


class _BatchUnpickler(pickle.Unpickler):
    """Builds dictionaries, lists, numbers, bytes and NumPy arrays; refuses everything else by name."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _BATCH_GLOBALS:
            raise pickle.UnpicklingError(f"refused to build {module}.{name}")
        return _BATCH_GLOBALS[module, name]
