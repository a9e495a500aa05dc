"""Train, val and test sets from decoded images that come as train and test."""

import numpy as np
import torch
from torch import Tensor

from satlib.data.imageset import ImageSet, Splits

VALIDATION_FRACTION = 0.1  # of the training images, class by class
SPLIT_SEED = 20190519
RULE = [VALIDATION_FRACTION, SPLIT_SEED]  # what a split depends on, beside the images


def held_out(name: str, title: str, classes: tuple[str, ...], decoded: dict[str, tuple[Tensor, Tensor]]) -> Splits:
    """Splits from the images and labels of "train" and "test": a tenth of each class's training images becomes val.

    All sets are shuffled once, always alike.
    """
    images, labels = decoded["train"]
    order = shuffled(len(labels), SPLIT_SEED)
    ordered = labels[order]
    validation = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(len(classes)):
        members = torch.nonzero(ordered == label).flatten()
        validation[members[: max(1, round(VALIDATION_FRACTION * len(members)))]] = True
    chosen = {
        "train": (images, labels, order[~validation]),
        "val": (images, labels, order[validation]),
        "test": (*decoded["test"], shuffled(len(decoded["test"][1]), SPLIT_SEED + 1)),
    }
    return Splits(
        **{
            split: ImageSet(images[rows], labels[rows], classes, name, title, split)
            for split, (images, labels, rows) in chosen.items()
        }
    )


def shuffled(n: int, seed: int) -> Tensor:
    """A fixed order of n rows. NumPy guarantees PCG64's raw stream (not what `Generator` makes of it)."""
    keys = np.random.PCG64(seed).random_raw(n)
    return torch.from_numpy(np.argsort(keys, kind="stable"))
