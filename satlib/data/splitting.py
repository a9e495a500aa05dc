"""Train, val and test sets from images that come as train and test."""

import numpy as np
import torch
from torch import Tensor

from satlib.data.datasets import Dataset
from satlib.data.imageset import ImageSet, Splits

VALIDATION_FRACTION = 0.1  # of the training images, class by class
SPLIT_SEED = 20190519
RULE = [VALIDATION_FRACTION, SPLIT_SEED]  # what a split depends on, beside the images


def held_out(
    dataset: Dataset, title: str, classes: tuple[str, ...], decoded: dict[str, tuple[Tensor, Tensor]]
) -> Splits:
    """Splits from the images and labels of "train" and "test": a tenth of each class's training images becomes val.

    All sets are shuffled once, always alike.
    """
    chosen = rows(decoded["train"][1], decoded["test"][1])
    sets = {}
    for split, order in chosen.items():
        images, labels = decoded["test" if split == "test" else "train"]
        sets[split] = ImageSet(images[order], labels[order], classes, dataset.full_name, title, split)
    return Splits(**sets)


def rows(train: Tensor, test: Tensor) -> dict[str, Tensor]:
    """Which images are in which set, in their order, by the labels of those that come as train and test."""
    order = shuffled(len(train), SPLIT_SEED)
    ordered = train[order]
    validation = torch.zeros(len(train), dtype=torch.bool)
    for label in ordered.unique():
        members = torch.nonzero(ordered == label).flatten()
        validation[members[: max(1, round(VALIDATION_FRACTION * len(members)))]] = True
    return {"train": order[~validation], "val": order[validation], "test": shuffled(len(test), SPLIT_SEED + 1)}


def shuffled(n: int, seed: int) -> Tensor:
    """A fixed order of n rows. NumPy guarantees PCG64's raw stream (not what `Generator` makes of it)."""
    keys = np.random.PCG64(seed).random_raw(n)
    return torch.from_numpy(np.argsort(keys, kind="stable"))
