"""CIFAR-10 as its author ships it or from an image tree, split into train, val and test."""

import hashlib
import pickle
from collections.abc import Mapping
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
BINARY, BATCHES = "cifar-10-batches-bin", "cifar-10-batches-py"
BINARY_MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
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


def read_binary(folder: Path) -> Read:
    """The official binary batches: rows of a label's byte and the 3x32x32 bytes of an image, as in the python batches.

    Raises `SatlibError` for a file that is missing, or not the official one.
    """
    rows: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for name, md5 in BINARY_MD5.items():
        content = _checked(folder / name, md5, known=BINARY_MD5)
        rows["test" if name.startswith("test") else "train"].append(np.frombuffer(content, np.uint8).reshape(-1, 3073))
    both = {split: torch.from_numpy(np.concatenate(parts)) for split, parts in rows.items()}
    return {split: (part[:, 1:].reshape(-1, 3, 32, 32), part[:, 0].long()) for split, part in both.items()}


def read_batches(folder: Path) -> Read:
    """The official python batches.

    They are pickles, and so could run code: only a file with the official checksum is unpickled. Raises `SatlibError`
    for another one, and for one that is missing.
    """
    from torchvision.datasets import CIFAR10 as official

    read = {}
    for split, files in (("train", official.train_list), ("test", official.test_list)):
        batches = [pickle.loads(_checked(folder / name, md5, dict(files)), encoding="bytes") for name, md5 in files]
        pixels, labels = (np.concatenate([batch[key] for batch in batches]) for key in (b"data", b"labels"))
        read[split] = torch.from_numpy(pixels).view(-1, 3, 32, 32), torch.from_numpy(labels)
    return read


def _checked(path: Path, md5: str, known: Mapping[str, str]) -> bytes:
    """The content of a file with this MD5; known: that of all its kind, by name."""
    binary = path.suffix == ".bin"
    mend = f"unpack the official cifar-10-{'binary' if binary else 'python'}.tar.gz again"
    mend += "" if binary else ", or run `python -m satlib data download cifar10`"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SatlibError(f"cannot read {path} ({error.strerror}); {mend}") from None
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        other = next((f" (which is {name} under another name)" for name, each in known.items() if each == found), "")
        raise SatlibError(f"wrong file {path}: its MD5 is {found}{other}, expected {md5}; {mend}")
    return content


# How each layout of the author's is read, by the name of its folder; `datasets.FOLDERS` says where they may lie.
LAYOUTS = {BINARY: read_binary, BATCHES: read_batches}
