"""Labelled images that stay on disk: decoded in worker processes, batch by batch, and augmented on the device."""

import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from satlib.data.imageset import Passes
from satlib.data.imagetree import ImageFile, bad_image, decode
from satlib.errors import SatlibError

# Of ImageNet, times 255: the normalisation that its pretrained weights expect.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SHORT_SIDE = 256 / 224  # an image is resized so that its shorter side is this times the crop's
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random crop: share of the image, width to height
CHUNK = 16  # images that a worker decodes at a time; AHEAD of them in advance, in shared memory, which containers keep
AHEAD = 2  # small
MOST_WORKERS = 8


class StreamedImages:
    """Images on disk as a tensor would give them: uint8 (n, 3, size, size), decoded when they are asked for.

    Every image is resized to a shorter side of 8/7 size, and cropped in the middle; a thread for each core decodes.
    """

    def __init__(self, folder: Path, files: np.ndarray, size: int, device: torch.device) -> None:
        self.folder, self.files, self.size, self.device = folder, files, size, device
        self.shape = torch.Size((len(files), 3, size, size))
        self.ndim, self.dtype = 4, torch.uint8

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: slice | Tensor) -> Tensor:
        chosen = self.files[indices if isinstance(indices, slice) else indices.cpu().numpy()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            take = partial(middle, size=self.size)
            decoded = list(pool.map(lambda path: decode(self.folder / path, take), chosen))
        if bad := [(path, found) for path, found in zip(chosen, decoded, strict=True) if isinstance(found, str)]:
            raise SatlibError(bad_image(self.folder, bad))
        return torch.stack(decoded).to(self.device).permute(0, 3, 1, 2)

    def split(self, count: int) -> "list[StreamedImages]":
        """Parts of `count` images, not decoded yet."""
        parts = (self.files[start : start + count] for start in range(0, len(self), count))
        return [StreamedImages(self.folder, part, self.size, self.device) for part in parts]

    def float(self) -> Tensor:
        """All of them, decoded, as float32."""
        return self[:].float()


@dataclass(frozen=True, eq=False)
class StreamedSet(Passes):
    """An `ImageSet` whose images stay on disk; the same names mean the same. To augment is to take a random resized
    crop, and flip half of them. Memory does not grow with their number.

    files: paths below `folder`; labels int64 (n,) on the device. The fingerprint is that of paths and file sizes, not
    of pixels, and mean and std are ImageNet's own.
    """

    folder: Path
    files: tuple[ImageFile, ...]
    labels: Tensor
    size: int
    classes: tuple[str, ...]
    name: str
    title: str
    split: str

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        shape = f"{len(self)} images 3x{self.size}x{self.size}"
        return f"StreamedSet({self.title!r}, {self.split}, {shape}, {len(self.classes)} classes, {self.device})"

    @property
    def device(self) -> torch.device:
        return self.labels.device

    @property
    def mean(self) -> tuple[float, ...]:
        return MEAN

    @property
    def std(self) -> tuple[float, ...]:
        return STD

    @cached_property
    def images(self) -> StreamedImages:
        """As a tensor would give them, cropped in the middle."""
        return StreamedImages(self.folder, np.array([file.path for file in self.files]), self.size, self.device)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over size and class names, then path, size and label of every file."""
        described = [self.size, list(self.classes), [[file.path, file.size, file.label] for file in self.files]]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def to(self, device: torch.device | str) -> "StreamedSet":
        return replace(self, labels=self.labels.to(device))

    def subset(self, indices: slice | Sequence[int] | Tensor) -> "StreamedSet":
        """The images at `indices`, in that order."""
        if isinstance(indices, slice):
            rows = torch.arange(len(self))[indices]
        else:
            rows = torch.as_tensor(indices).cpu()
            rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        if len(rows) and not -len(self) <= int(rows.min()) <= int(rows.max()) < len(self):
            raise SatlibError(f"indices reach outside {self!r}; expected 0..{len(self) - 1}")
        files = tuple(self.files[i] for i in rows.tolist())
        return replace(self, files=files, labels=self.labels[rows.to(self.device)])

    def check(self) -> None:
        """Read every image. Raises `SatlibError` for the first bad one."""
        for part in self.images.split(CHUNK * MOST_WORKERS):
            part[:]

    def _batches(
        self,
        batch_size: int,
        generator: torch.Generator | None,
        augment: bool,
        limit: int | None,
        share: Callable[[int], slice],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self)
        order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
        seeds = torch.randint(2**62, (n,), generator=generator) if augment else None
        flips = torch.randint(2, (n,), generator=generator).bool() if augment else torch.zeros(n, dtype=torch.bool)
        order = order[:limit]
        rows = []
        for start in range(0, len(order), batch_size):
            own = share(min(batch_size, len(order) - start))
            rows.append(range(start + (own.start or 0), start + own.stop))
        # A batch is decoded in chunks, so that what is under way takes the same memory whatever the batches' size.
        chunks = [part[i : i + CHUNK] for part in rows for i in range(0, len(part), CHUNK)]
        indices = order.tolist()
        tasks = [
            [(self.files[indices[row]].path, None if seeds is None else int(seeds[row])) for row in c] for c in chunks
        ]
        workers = min(workers_here(), len(tasks))
        loader = iter(
            DataLoader(
                _Decoder(self.folder, tasks, self.size),
                batch_size=None,
                num_workers=workers,
                prefetch_factor=AHEAD if workers else None,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),  # of its own, so that it draws nothing from torch's global one
            )
        )
        for part in rows:
            decoded = [next(loader) for _ in range(0, len(part), CHUNK)]
            if bad := [tuple(found) for found in decoded if not isinstance(found, Tensor)]:
                raise SatlibError(bad_image(self.folder, bad))
            pixels = torch.cat([found.to(self.device, non_blocking=True) for found in decoded])
            images, own = pixels.permute(0, 3, 1, 2), slice(part.start, part.stop)
            if augment:
                images = torch.where(flips[own].to(self.device).view(-1, 1, 1, 1), images.flip(-1), images)
            yield images.to(torch.float32, memory_format=torch.channels_last), self.labels[order[own].to(self.device)]


def workers_here() -> int:
    """Processes that decode: a share of the cores for each rank that trains on this node."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


class _Decoder(Dataset):
    """Item i: the pixels of the i-th task, uint8 (n, size, size, 3), or (path, problem) of a bad image in it."""

    def __init__(self, folder: Path, tasks: list[list[tuple[str, int | None]]], size: int) -> None:
        self.folder, self.tasks, self.size = folder, tasks, size

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Tensor | tuple[str, str]:
        task = self.tasks[index]
        pixels = torch.empty((len(task), self.size, self.size, 3), dtype=torch.uint8)
        for row, (path, seed) in enumerate(task):
            take = partial(middle, size=self.size) if seed is None else partial(anywhere, size=self.size, seed=seed)
            image = decode(self.folder / path, take)
            if isinstance(image, str):
                return path, image
            pixels[row] = image
        return pixels


def middle(image: Image.Image, size: int) -> Image.Image:
    """The middle of an image, size x size: its shorter side resized to 8/7 size, then cropped."""
    short = round(size * SHORT_SIDE)
    image.draft("RGB", (2 * short, 2 * short))  # JPEG: decoded at a fraction of the resolution that is still enough
    scale = short / min(image.size)
    width, height = (max(short, round(side * scale)) for side in image.size)
    image = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def anywhere(image: Image.Image, size: int, seed: int) -> Image.Image:
    """A random part of an image, resized to size x size: a share AREA of it, RATIO wide to high, drawn from `seed`."""
    draw = random.Random(seed)
    width, height = image.size
    w = h = min(width, height)
    for _ in range(10):
        area = width * height * draw.uniform(*AREA)
        ratio = math.exp(draw.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        wanted = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wanted[0] <= width and 0 < wanted[1] <= height:
            w, h = wanted
            break
    left, top = draw.randint(0, width - w), draw.randint(0, height - h)
    box = (left, top, left + w, top + h)
    return image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box)
