"""Coloured, textured, rotated, noisy shapes, drawn in code: the embedded stand-ins.

shapes32 has ten classes at 32x32; shapes64 has twenty at 64x64, the same ten each with a close relative.

The same bits on every machine: each value comes from PCG64's raw stream (which NumPy guarantees) by operations that
IEEE 754 rounds exactly (+ - * / sqrt, floor, abs, comparisons), one element at a time; there are no sums over axes,
and no sines. Rotations use the rational points of the circle instead.
"""

import itertools
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial, reduce

import numpy as np
import torch
from numpy import ndarray as Array

from satlib.data.datasets import DATASETS, Dataset
from satlib.data.imageset import ImageSet, Splits

Shape = Callable[[Array, Array], Array]

# What makes the task hard. Contrasts, textures and noise are in pixel units, 0..255.
SCALE = (0.6, 0.88)  # half the size of a shape; 1 is half the image
CONTRAST = (60.0, 130.0)  # between a shape and its background, in the channel where they differ most
SHAPE_TEXTURE = (5.0, 32.0)  # amplitude of the stripes or checks inside the shape
BACKGROUND_TEXTURE = (0.0, 18.0)
GRADIENT = 30.0  # of the background, from its middle to the edge of the image
CLUTTER = 2  # small blobs and lines behind the shape
CLUTTER_CONTRAST = 60.0
BRIGHTNESS = (80.0, 175.0)  # of the background, each channel by itself
OCCLUSION = 0.4  # probability that a line crosses the shape
NOISE = (5.0, 17.0)  # standard deviation for each pixel and channel
TENDENCY = 0.7  # at most this share of colour and texture follows the class (0: none, 1: all)


def union(*distances: Array) -> Array:
    return reduce(np.minimum, distances)


def intersection(*distances: Array) -> Array:
    return reduce(np.maximum, distances)


def circle(x: Array, y: Array, radius: float) -> Array:
    return np.sqrt(x * x + y * y) - radius


def box(x: Array, y: Array, width: float, height: float) -> Array:
    return intersection(np.abs(x) - width, np.abs(y) - height)


class Draws:
    """Random numbers for n images from one stream; each draw is float32 (n, 1, 1), to go with their pixels."""

    def __init__(self, n: int, *key: int) -> None:
        self.n, self.stream = n, np.random.PCG64(np.random.SeedSequence(key))

    def uniform(self, low: float, high: float) -> Array:
        unit = (self.stream.random_raw((self.n, 1, 1)) >> np.uint64(11)) / (1 << 53)
        return (low + (high - low) * unit).astype(np.float32)

    def either(self, probability: float) -> Array:
        """1 with this probability, else 0."""
        return (self.uniform(0, 1) < probability).astype(np.float32)

    def turn(self) -> tuple[Array, Array]:
        """Cosine and sine of a random angle: a rational point within 45 degrees, then quarter turns."""
        t = self.uniform(1 - math.sqrt(2), math.sqrt(2) - 1)
        c, s = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
        swap, sign = self.either(0.5) > 0, 1 - 2 * self.either(0.5)
        return sign * np.where(swap, -s, c), sign * np.where(swap, c, s)

    def noise(self, *shape: int) -> Array:
        """Bell-shaped, float32 (n, *shape): sums of four bytes, scaled to mean 0 and standard deviation 1."""
        count = self.n * math.prod(shape)
        octets = self.stream.random_raw((count + 1) // 2).astype("<u8").view(np.uint8).reshape(-1, 4)[:count]
        a, b, c, d = octets.astype(np.float32).T
        return ((a + b + c + d - 510) / math.sqrt((256**2 - 1) / 3)).reshape(self.n, *shape)


def wave(t: Array) -> Array:
    """Triangular wave of period 1 between -1 and 1."""
    return 4 * np.abs(t - np.floor(t) - 0.5) - 1


def cover(distance: Array, size: int) -> Array:
    """Share of each pixel that lies inside, from the signed distance in half images of `size` pixels."""
    return np.clip(0.5 - distance * (size / 2), 0, 1)


def _star(x: Array, y: Array) -> Array:
    # A pentagram is where at least four of its five edges' half-planes agree: the second largest distance.
    root5 = math.sqrt(5)
    c1, s1 = (root5 - 1) / 4, math.sqrt(10 + 2 * root5) / 4  # cosine and sine of 72 degrees
    c2, s2 = -(root5 + 1) / 4, math.sqrt(10 - 2 * root5) / 4  # and of 144 degrees
    largest = second = np.full_like(x, -np.inf)
    for c, s in ((1.0, 0.0), (c1, s1), (c2, s2), (c2, -s2), (c1, -s1)):
        edge = s * x + c * y - 0.32
        second = np.maximum(second, np.minimum(largest, edge))
        largest = np.maximum(largest, edge)
    return second


# Signed distances (below 0 inside) in the shape's own coordinates, in which it about fills -1..1.
SHAPES: dict[str, Shape] = {
    "disc": lambda x, y: circle(x, y, 0.85),
    "ring": lambda x, y: np.abs(circle(x, y, 0.72)) - 0.22,
    "square": lambda x, y: box(x, y, 0.74, 0.74),
    "triangle": lambda x, y: intersection(y - 0.55, 0.8660254 * np.abs(x) - 0.5 * y - 0.5),
    "star": _star,
    "cross": lambda x, y: union(box(x, y, 0.95, 0.28), box(x, y, 0.28, 0.95)),
    "crescent": lambda x, y: intersection(circle(x, y, 0.95), 0.78 - np.sqrt((x - 0.45) * (x - 0.45) + y * y)),
    "bars": lambda x, y: box(x, np.abs(y) - 0.5, 0.9, 0.24),
    "arrow": lambda x, y: union(
        box(x + 0.4, y, 0.55, 0.2), intersection(-x - 0.05, 0.7071068 * (x + np.abs(y)) - 0.65)
    ),
    "corner": lambda x, y: union(box(x + 0.5, y, 0.3, 0.85), box(x, y - 0.55, 0.8, 0.3)),
}

# Relatives, each hard to tell from the shape that it is named after.
FINER = {
    "ellipse": lambda x, y: circle(x, 1.8 * y, 0.95),
    "target": lambda x, y: union(np.abs(circle(x, y, 0.76)) - 0.16, circle(x, y, 0.26)),
    "rectangle": lambda x, y: box(x, y, 0.92, 0.46),
    "right triangle": lambda x, y: intersection(-x - 0.7, -y - 0.7, 0.7071068 * (x + y) - 0.12),
    "sparkle": lambda x, y: 0.3162278 * union(np.abs(x) + 3 * np.abs(y) - 1, 3 * np.abs(x) + np.abs(y) - 1),
    "tee": lambda x, y: union(box(x, y + 0.65, 0.95, 0.28), box(x, y, 0.28, 0.93)),
    "half moon": lambda x, y: intersection(circle(x - 0.3, y, 0.95), x - 0.2),
    "three bars": lambda x, y: union(box(x, y, 0.9, 0.15), box(x, np.abs(y) - 0.65, 0.9, 0.15)),
    "chevron": lambda x, y: intersection(
        0.7071068 * (x + np.abs(y)) - 0.62, -0.7071068 * (x + np.abs(y)) + 0.2, np.abs(y) - 0.85
    ),
    "bracket": lambda x, y: union(box(x + 0.6, y, 0.25, 0.85), box(x, np.abs(y) - 0.65, 0.8, 0.2)),
}


@dataclass(frozen=True)
class Family:
    """What `generate` draws: in each split so many of each shape, by chunks.

    fingerprint: what they must give on every machine; whoever changes the drawing records it anew.
    """

    shapes: Mapping[str, Shape]
    per_class: Mapping[str, int]  # multiples of chunk, by split
    seed: int
    chunk: int
    fingerprint: str

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.shapes)


FAMILIES = {
    "shapes32": Family(
        SHAPES,
        {"train": 900, "val": 150, "test": 150},
        seed=3203,
        chunk=150,
        fingerprint="78ce30a1c0e4f77cb6c47af6a39871030c0b0f527607ea2e5279c1a2afb2fc02",
    ),
    "shapes64": Family(
        dict(itertools.chain(*zip(SHAPES.items(), FINER.items(), strict=True))),
        {"train": 400, "val": 80, "test": 80},
        seed=6403,
        chunk=40,
        fingerprint="8affb0c7229196c72c266e4acaba5f66e739823d84b203e1c6b57af6a6762c25",
    ),
}


def _texture(draw: Draws, x: Array, y: Array, frequency: Array, slant: Array) -> Array:
    """Stripes or checks between -1 and 1, of `frequency` periods an image, their lines leaning by `slant`."""
    along = wave(frequency / 2 * (x + slant * y) + draw.uniform(0, 1))
    across = wave(frequency / 2 * (y - slant * x) + draw.uniform(0, 1))
    return np.where(draw.either(0.3) > 0, along * across, along)


def _line(draw: Draws, x: Array, y: Array, reach: float) -> Array:
    """Signed distance from an endless line at most `reach` from (0, 0)."""
    c, s = draw.turn()
    return np.abs(c * x + s * y - draw.uniform(-reach, reach)) - draw.uniform(0.03, 0.08)


def _blob(draw: Draws, x: Array, y: Array) -> Array:
    """Signed distance from a small rectangle anywhere in the image."""
    c, s = draw.turn()
    x, y = x - draw.uniform(-1, 1), y - draw.uniform(-1, 1)
    return box(c * x + s * y, c * y - s * x, draw.uniform(0.04, 0.45), draw.uniform(0.04, 0.15))


def _render(family: Family, size: int, label: int, draw: Draws) -> Array:
    """Images of one class, uint8 (n, size, size, 3)."""
    covered = partial(cover, size=size)
    grid = (np.arange(size, dtype=np.float32) + 0.5) / (size / 2) - 1
    x, y = grid[None, None, :], grid[None, :, None]

    scale, stretch, (c, s) = draw.uniform(*SCALE), draw.uniform(0.85, 1.18), draw.turn()
    room = np.maximum(1 - scale, 0.1)
    dx, dy = x - room * draw.uniform(-1, 1), y - room * draw.uniform(-1, 1)
    u, v = (c * dx + s * dy) / (scale * stretch), (c * dy - s * dx) / scale * stretch
    shape = covered(scale * family.shapes[family.classes[label]](u, v))

    # A class has a taste in texture and colour, and each image follows it more or less.
    taste, follow = Draws(1, family.seed, len(family.per_class), label), draw.uniform(0, TENDENCY)

    def blend(low: float, high: float) -> Array:
        return follow * taste.uniform(low, high) + (1 - follow) * draw.uniform(low, high)

    texture = draw.uniform(*SHAPE_TEXTURE) * _texture(draw, x, y, blend(2, 9), blend(-1, 1))
    tint = [blend(-1, 1) for _ in range(3)]
    tint_to_contrast = draw.uniform(*CONTRAST) / reduce(np.maximum, map(np.abs, tint))

    relief = draw.uniform(*BACKGROUND_TEXTURE) * _texture(draw, x, y, draw.uniform(2, 9), draw.uniform(-1, 1))
    relief = relief + draw.uniform(-GRADIENT, GRADIENT) * x + draw.uniform(-GRADIENT, GRADIENT) * y
    blobs = [covered(_blob(draw, x, y)) for _ in range(CLUTTER)]
    line = draw.either(OCCLUSION) * covered(_line(draw, dx, dy, 0.4))
    noise = draw.uniform(*NOISE)[..., None] * draw.noise(size, size, 3)

    pixels = np.empty(noise.shape, dtype=np.uint8)
    for channel in range(3):
        base = draw.uniform(*BRIGHTNESS)
        value = base + relief
        for blob in blobs:
            value = value + draw.uniform(-CLUTTER_CONTRAST, CLUTTER_CONTRAST) * blob
        value = value + shape * (base + tint_to_contrast * tint[channel] + texture - value)
        value = value + line * (base + draw.uniform(-CLUTTER_CONTRAST, CLUTTER_CONTRAST) - value)
        pixels[..., channel] = np.clip(np.floor(value + noise[..., channel] + 0.5), 0, 255)
    return pixels


def load(dataset: Dataset, folder: None, *, progress: bool = True) -> Splits:
    """The three sets of a family, balanced and shuffled; no files are needed."""
    return Splits(**{split: generate(dataset.name, split) for split in FAMILIES[dataset.name].per_class})


@cache
def generate(name: str, split: str) -> ImageSet:
    """One split, drawn once in a process (in a second or two) and the same ever after."""
    family, dataset = FAMILIES[name], DATASETS[name]
    key, count = (family.seed, list(family.per_class).index(split)), family.per_class[split]
    # Chunks have streams of their own, so that the images do not depend on how many are drawn at once, and
    # are small enough to stay in the processor's cache.
    tasks = [(label, part) for label in range(len(family.classes)) for part in range(count // family.chunk)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        size = dataset.shape[1]
        chunks = pool.map(lambda task: _render(family, size, task[0], Draws(family.chunk, *key, *task)), tasks)
        pixels = np.concatenate(list(chunks))
    labels = np.repeat(np.arange(len(family.classes)), count)
    order = np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(len(labels)), kind="stable")
    images = torch.from_numpy(pixels[order]).permute(0, 3, 1, 2)
    return ImageSet(images, torch.from_numpy(labels[order]), family.classes, name, dataset.title, split)
