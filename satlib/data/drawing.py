"""What is drawn in code is drawn from these: random numbers, signed distances, textures.

The same bits on every machine: each value comes from PCG64's raw stream (which NumPy guarantees) by operations that
IEEE 754 rounds exactly (+ - * / sqrt, floor, abs, comparisons), one element at a time; there are no sums over axes,
and no sines. Rotations use the rational points of the circle instead.
"""

import math
from functools import reduce

import numpy as np
from numpy import ndarray as Array


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
