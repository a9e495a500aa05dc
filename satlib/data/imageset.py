"""Labelled images that live on one device as uint8 and leave it as augmented float batches."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor

from satlib.errors import SatlibError

IGNORE = 255  # label of pixels that count for nothing
CROP_PADDING = 8  # an image is cropped from itself padded by its shorter side divided by this: 32 pixels by 4
VALIDATION_FRACTION, SPLIT_SEED = 0.1, 20190519
SPLIT_RULE = [VALIDATION_FRACTION, SPLIT_SEED]  # what `held_out` depends on, beside the labels


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with labels, all on one device. To augment is to crop from the image padded by reflected pixels, an eighth
    of its shorter side (4 for one of 32 pixels), and to flip half of them; where every pixel has a label, only to flip.

    `images` is uint8 (n, C, H, W), held in channels_last order; `labels` is int64 (n,), each the index of a name in
    `classes`, or for segmentation uint8 (n, H, W), where 255 is no class. `name` is the key for `satlib.data.load`,
    `title` what figures and tables print, `split` one of train, val and test, and `frames` names each scene, where
    scenes have names. Raises `SatlibError` if these do not fit together.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    title: str
    split: str
    frames: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        images, labels, where = self.images, self.labels, f"{self.name}/{self.split}"
        if images.dtype != torch.uint8 or images.ndim != 4:
            found = f"{images.dtype} {tuple(images.shape)}"
            raise SatlibError(f"{where}: images are {found}; expected torch.uint8 (n, C, H, W)")
        if len(images) == 0:
            raise SatlibError(f"{where}: the set is empty; expected at least one image")
        n, _, *sides = images.shape
        if tuple(labels.shape) != {torch.int64: (n,), torch.uint8: (n, *sides)}.get(labels.dtype):
            raise SatlibError(
                f"{where}: labels are {labels.dtype} {tuple(labels.shape)}; expected torch.int64 ({n},), "
                f"or for every pixel torch.uint8 {(n, *sides)}"
            )
        if labels.device != images.device:
            raise SatlibError(f"{where}: labels are on {labels.device} but images on {images.device}; move one")
        if self.dense:  # part by part, for a copy of all could be large
            low, high = 0, max(int(part.masked_fill(part == IGNORE, 0).max()) for part in labels.split(64))
        else:
            low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.classes):
            raise SatlibError(
                f"{where}: labels range over {low}..{high}; expected 0..{len(self.classes) - 1}, one per class name"
            )
        if self.frames and len(self.frames) != n:
            raise SatlibError(f"{where}: {len(self.frames)} frames for {n} images; expected one each")
        if isinstance(images, Tensor):
            object.__setattr__(self, "images", images.contiguous(memory_format=torch.channels_last))

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        _, channels, height, width = self.images.shape
        images = f"{len(self)} images {channels}x{height}x{width}, {len(self.classes)} classes"
        return f"{type(self).__name__}({self.title!r}, {self.split}, {images}, {self.device})"

    @property
    def device(self) -> torch.device:
        return self.images.device

    @property
    def dense(self) -> bool:
        """Whether every pixel has a label."""
        return self.labels.ndim > 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over shape and class names, then all pixels in (n, H, W, C) order, then all labels."""
        header = json.dumps({"shape": list(self.images.shape), "classes": list(self.classes)})
        digest = hashlib.sha256(header.encode())
        digest.update(self.images.cpu().permute(0, 2, 3, 1).contiguous().numpy())
        digest.update(self.labels.cpu().numpy().astype("<u1" if self.dense else "<i8"))
        return digest.hexdigest()

    @cached_property
    def _sums(self) -> list[tuple[int, ...]]:
        """Of each channel: how many pixels, their sum, and the sum of their squares. Sums of integers are exact in any
        order, so every device and thread count gives the same floats."""
        counts = [torch.bincount(channel.reshape(-1), minlength=256) for channel in self.images.unbind(1)]
        values = torch.arange(256, device=self.device)
        return [tuple(int((each * values**power).sum()) for power in range(3)) for each in counts]

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel over all pixels, in 0..255."""
        return tuple(total / n for n, total, _ in self._sums)

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel over all pixels, in units of 0..255."""
        return tuple(((n * squares - total**2) / n**2) ** 0.5 for n, total, squares in self._sums)

    def to(self, device: torch.device | str) -> Self:
        """The same set on `device`; what was already computed about it (fingerprint, mean, std) goes along."""
        moved = replace(self, images=self.images.to(device), labels=self.labels.to(device))
        moved.__dict__.update({known: vars(self)[known] for known in ("fingerprint", "_sums") if known in vars(self)})
        return moved

    def first(self, n: int) -> Self:
        """The first `n` images, 1 <= n <= len(self). Loaders shuffle once, so they are a fair sample."""
        if not 1 <= n <= len(self):
            raise SatlibError(f"n = {n}; {self!r} can give 1..{len(self)} images")
        return self.subset(slice(n))

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        limit: int | None = None,
        share: Callable[[int], slice] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass in batches of `batch_size` (the last may be smaller), on the set's device.

        Yields images, float32 (b, C, H, W) in 0..255 and channels_last, and labels, int64 (b,) or (b, H, W).
        `generator` (a CPU generator, so that draws do not depend on the device) shuffles; without it the order
        is the set's own. `augment` crops and flips at random, each kind of set in its way; it needs a generator.
        `limit` stops after that many images, the first of the pass without it. `share(size)` says which images of a
        batch of that size to yield, for ranks that train together: what is drawn does not depend on it.
        """
        if batch_size < 1:
            raise SatlibError(f"batch_size = {batch_size}; expected at least 1")
        if limit is not None and limit < 1:
            raise SatlibError(f"limit = {limit}; expected at least 1, or None for all images")
        if augment and generator is None:
            raise SatlibError("augment = True without a generator; pass generator=torch.Generator().manual_seed(...)")
        if generator is not None and generator.device.type != "cpu":
            raise SatlibError(f"generator is on {generator.device}; expected a CPU generator, torch.Generator()")

        # All draws of a pass are made at its start: they do not depend on batch_size or limit.
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        order, parts = order[:limit], []
        for start in range(0, len(order), batch_size):
            own = (share or slice)(min(batch_size, len(order) - start))
            parts.append(slice(start + (own.start or 0), start + own.stop))
        return self._batches(order, parts, generator if augment else None)

    def subset(self, indices: slice | Sequence[int] | Tensor) -> Self:
        """The images at `indices` (a slice, a sequence of integers, or an int64 or bool tensor), in that order."""
        if not isinstance(indices, slice):
            indices = torch.as_tensor(indices, device=self.device)
            if indices.ndim != 1 or indices.dtype not in (torch.bool, torch.int64):
                found = f"{indices.dtype} {tuple(indices.shape)}"
                raise SatlibError(f"indices are {found}; expected one dimension of int64 or bool")
        try:
            rows = torch.arange(len(self), device=self.device)[indices].tolist() if self.frames else []
            frames = tuple(self.frames[row] for row in rows)
            return replace(self, images=self._images_at(indices), labels=self.labels[indices], frames=frames)
        except IndexError:
            raise SatlibError(f"indices reach outside {self!r}; expected 0..{len(self) - 1}") from None

    def _images_at(self, indices: slice | Tensor) -> Tensor:
        return self.images[indices]

    def check(self) -> None:
        """Read every image that stays on disk. Raises `SatlibError` for the first bad one."""

    def _batches(
        self, order: Tensor, parts: list[slice], augmenting: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """A batch for each of `parts` of `order`, the images' indices; augmented by draws from `augmenting`, if any."""
        # What is drawn is moved to the device at the start, so that no batch waits for a copy from the host.
        if augmenting:
            n, most = len(self), 0 if self.dense else min(self.images.shape[2:]) // CROP_PADDING
            shifts = torch.randint(-most, most + 1, (n, 2), generator=augmenting)[: len(order)].to(self.device)
            flips = torch.randint(2, (n,), generator=augmenting).bool()[: len(order)].to(self.device)
        order = order.to(self.device)
        for part in parts:
            indices = order[part]
            labels = self.labels[indices].long()
            if augmenting:
                images = self._crop_flip(indices, shifts[part], flips[part])
                if self.dense:
                    labels = torch.where(flips[part].view(-1, 1, 1), labels.flip(-1), labels)
            else:
                images = self.images[indices]
            yield images.to(torch.float32, memory_format=torch.channels_last), labels

    def _crop_flip(self, indices: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
        """Images at `indices`, moved by `shifts` (b, 2) pixels with reflected borders, then flipped where `flips`.

        One gather of whole pixels does all of it: each output pixel's source row and column follow by arithmetic.
        """
        n, channels, height, width = self.images.shape
        rows = torch.arange(height, device=self.device) + shifts[:, :1]
        columns = torch.arange(width, device=self.device).expand(len(indices), width)
        columns = torch.where(flips[:, None], width - 1 - columns, columns) + shifts[:, 1:]
        rows, columns = _reflect(rows, height), _reflect(columns, width)
        source = (indices[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]
        pixels = self.images.permute(0, 2, 3, 1).reshape(n * height * width, channels)
        taken = pixels.index_select(0, source.reshape(-1))
        return taken.view(len(indices), height, width, channels).permute(0, 3, 1, 2)


def _reflect(positions: Tensor, size: int) -> Tensor:
    """Positions -(size-1)..2(size-1), mirrored at the first and last pixel into 0..size-1."""
    return (size - 1) - ((size - 1) - positions.abs()).abs()


@dataclass(frozen=True, eq=False)
class Splits:
    """The three disjoint sets: `train` fits, `val` crafts and chooses, `test` reports."""

    train: ImageSet
    val: ImageSet
    test: ImageSet

    @property
    def fingerprint(self) -> str:
        """One for all three: SHA-256 (hex) over their fingerprints."""
        return hashlib.sha256("".join(part.fingerprint for part in vars(self).values()).encode()).hexdigest()

    def to(self, device: torch.device | str) -> "Splits":
        """All three on `device`."""
        return Splits(self.train.to(device), self.val.to(device), self.test.to(device))


def held_out(train: Tensor, test: Tensor) -> dict[str, Tensor]:
    """Which images are in which set, by the labels of those that come as train and test: rows of `train` for train and
    val (a tenth of each class), and of `test` for test; each shuffled once, always alike."""
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
