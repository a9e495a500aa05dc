"""CIFAR-10 as its author ships it or from an image tree, split into train, val and test."""

import hashlib
import pickle
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from satlib.data.cache import cached_splits
from satlib.data.datasets import Dataset
from satlib.data.imageset import SPLIT_RULE, ImageSet, Splits, held_out
from satlib.data.imagetree import read_images, scan_tree, stamps
from satlib.errors import SatlibError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = "cifar-10-batches-py"
Read = dict[str, tuple[Tensor, Tensor]]  # for train and test: uint8 images (n, 3, 32, 32) and int64 labels (n,)


def load(dataset: Dataset, folder: Path, *, progress: bool = True) -> Splits:
    """CIFAR-10 in `folder`: 45,000 train, 5,000 val and 10,000 test images of 3x32x32.

    The folder has one of LAYOUTS, or is an image tree, {train,test}/<class>/*.{png,jpg,jpeg} (decoded once, then
    cached). Validation images are taken from the training images. All sets are shuffled once, always alike. Raises
    `SatlibError` if what is there is damaged.
    """

    if read := LAYOUTS.get(folder.name):
        return _splits(dataset, dataset.title, read(folder))
    tree = scan_tree(folder, splits=("train", "test"), classes=CLASSES)

    def build() -> Splits:
        lossless = all(file.path.lower().endswith(".png") for files in tree.values() for file in files)
        # A JPEG copy's pixels are not the official ones.
        title = f"{dataset.title} ({'image tree' if lossless else 'JPEG copy'})"
        size = dataset.shape[1:]
        read = {split: read_images(folder, tree, split, size=size, progress=progress) for split in tree}
        return _splits(dataset, title, read)

    return cached_splits(dataset.name, {"split": SPLIT_RULE, "files": stamps(tree)}, folder.parent, build)


def _splits(dataset: Dataset, title: str, read: Read) -> Splits:
    sets = {}
    for split, rows in held_out(read["train"][1], read["test"][1]).items():
        images, labels = read["test" if split == "test" else "train"]
        sets[split] = ImageSet(images[rows], labels[rows], CLASSES, dataset.name, title, split)
    return Splits(**sets)


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


def read_batches(folder: Path) -> Read:
    """The official python batches.

    They are pickles, and so could run code: only a file with the official checksum is unpickled. Raises `SatlibError`
    for another one, and for one that is missing.
    """
    from torchvision.datasets import CIFAR10 as official

    read = {}
    for split, files in (("train", official.train_list), ("test", official.test_list)):
        batches = [pickle.loads(_checked(folder / name, md5), encoding="bytes") for name, md5 in files]
        pixels, labels = (np.concatenate([batch[key] for batch in batches]) for key in (b"data", b"labels"))
        read[split] = torch.from_numpy(pixels).view(-1, 3, 32, 32), torch.from_numpy(labels)
    return read


def _checked(path: Path, md5: str) -> bytes:
    mend = "unpack the official cifar-10-python.tar.gz again, or run `python -m satlib data download cifar10`"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SatlibError(f"cannot read {path} ({error.strerror}); {mend}") from None
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise SatlibError(f"wrong file {path}: its MD5 is {found}, expected {md5}; {mend}")
    return content


# How each layout of the author's is read, by the name of its folder; `datasets.FOLDERS` says where they may lie.
LAYOUTS = {BATCHES: read_batches}
