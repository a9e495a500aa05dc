"""Labelled images that stay on disk: decoded in worker processes, batch by batch, and augmented on the device."""

import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from satlib.data.imageset import ImageSet
from satlib.data.imagetree import MOST_WORKERS, ImageFile, decode, problems, refuse, workers_here
from satlib.errors import SatlibError

# Of ImageNet, times 255: the normalisation that its pretrained weights expect.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SHORT_SIDE = 256 / 224  # an image is resized so that its shorter side is this times the crop's
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random crop: share of the image, width to height
CHUNK = 16  # images that a worker decodes at a time


class StreamedImages:
    """Images on disk as a tensor would give them: uint8 (n, 3, size, size), decoded when they are asked for.

    Every image is resized to a shorter side of 8/7 size, and cropped in the middle; a thread for each core decodes.
    files: of ImageFile, below `folder`.
    """

    def __init__(self, folder: Path, files: Sequence[ImageFile], size: int, device: torch.device | str = "cpu") -> None:
        self.folder, self.files, self.size = folder, np.asarray(files, dtype=object), size
        self.device = torch.empty(0, device=device).device  # "cuda" is "cuda:0"
        self.shape = torch.Size((len(files), 3, size, size))
        self.ndim, self.dtype = 4, torch.uint8

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: slice | Tensor) -> Tensor:
        files = self.part(indices).files
        pixels = np.empty((len(files), self.size, self.size, 3), dtype=np.uint8)

        def read(row: int) -> None:
            pixels[row] = decode(self.folder, files[row].path, partial(middle, size=self.size))

        refuse(self.folder, problems(read, range(len(files))))
        return torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)

    def part(self, indices: slice | Tensor) -> "StreamedImages":
        """The images at `indices`, not decoded yet."""
        rows = indices if isinstance(indices, slice) else indices.cpu().numpy()
        return StreamedImages(self.folder, self.files[rows], self.size, self.device)

    def split(self, count: int) -> "list[StreamedImages]":
        """Parts of `count` images, not decoded yet."""
        return [self.part(slice(start, start + count)) for start in range(0, len(self), count)]

    def float(self) -> Tensor:
        """All of them, decoded, as float32."""
        return self[:].float()

    def to(self, device: torch.device | str) -> "StreamedImages":
        """The same images, for a device: what is decoded goes there."""
        return StreamedImages(self.folder, self.files, self.size, device)


class StreamedSet(ImageSet):
    """An `ImageSet` whose images stay on disk. To augment is to take a random resized crop, and flip half of them.

    Memory does not grow with their number. The fingerprint is that of paths and file sizes, not of pixels, and mean and
    std are ImageNet's own.
    """

    images: StreamedImages

    @property
    def mean(self) -> tuple[float, ...]:
        return MEAN

    @property
    def std(self) -> tuple[float, ...]:
        return STD

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over size and class names, then path, size and label of every file."""
        files = [[file.path, file.size, file.label] for file in self.images.files]
        described = [self.images.size, list(self.classes), files]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def check(self) -> None:
        for part in self.images.split(CHUNK * MOST_WORKERS):
            part[:]

    def _images_at(self, indices: slice | Tensor) -> StreamedImages:
        return self.images.part(indices)

    def _batches(
        self, order: Tensor, parts: list[slice], augmenting: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        seeds: Sequence[int | None] = [None] * len(order)
        if augmenting:
            seeds = torch.randint(2**62, (len(self),), generator=augmenting)[: len(order)].tolist()
            flips = torch.randint(2, (len(self),), generator=augmenting).bool()[: len(order)].to(self.device)
        folder, files = self.images.folder, self.images.files
        images = [(files[index].path, seed) for index, seed in zip(order.tolist(), seeds, strict=True)]
        # A batch is decoded in chunks, so that what is under way takes the same memory whatever the batches' size.
        tasks = [images[i : min(i + CHUNK, part.stop)] for part in parts for i in range(part.start, part.stop, CHUNK)]
        # Processes, for threads wait for each other at every small step. A generator of its own keeps the loader from
        # drawing on torch's global one.
        loader = DataLoader(
            tasks,
            batch_size=None,
            collate_fn=partial(_decoded, folder, self.images.size),
            num_workers=min(workers_here(), len(tasks)),
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
        )
        decoded = iter(loader)
        for part in parts:
            chunks, bad = zip(*(next(decoded) for _ in range(part.start, part.stop, CHUNK)), strict=True)
            refuse(folder, [problem for found in bad for problem in found])
            pixels = torch.cat([chunk.to(self.device, non_blocking=True) for chunk in chunks]).permute(0, 3, 1, 2)
            if augmenting:
                pixels = torch.where(flips[part].view(-1, 1, 1, 1), pixels.flip(-1), pixels)
            yield pixels.to(torch.float32, memory_format=torch.channels_last), self.labels[order[part].to(self.device)]


def _decoded(folder: Path, size: int, images: Sequence[tuple[str, int | None]]) -> tuple[Tensor, list[str]]:
    """Of images, by path and seed: their middles, or parts drawn from the seeds, as pixels uint8 (n, size, size, 3),
    and what is wrong with them."""
    pixels, problems = torch.zeros((len(images), size, size, 3), dtype=torch.uint8), []
    for row, (path, seed) in enumerate(images):
        take = partial(middle, size=size) if seed is None else partial(anywhere, size=size, seed=seed)
        try:
            pixels[row] = torch.from_numpy(decode(folder, path, take))
        except SatlibError as error:
            problems.append(str(error))
    return pixels, problems


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
