"""Street scenes drawn in code, with a label for every pixel: the embedded stand-in for Cityscapes and CamVid.

A canyon of houses and hedges in perspective, seen from a car: road and pavements, traffic, trees, people, poles and
signs at all distances, lit from one side, textured and noisy. The own bonnet, where it is in sight, has no class (label
255). Lengths are in units of the camera's height over the road, which is about 1.4 m. The same images, bit by bit, on
every machine: see `satlib.data.shapes`.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numpy import ndarray as Array

from satlib.data.cache import cached_splits
from satlib.data.datasets import DATASETS, Dataset
from satlib.data.imageset import IGNORE, ImageSet, Splits
from satlib.data.shapes import Draws, box, circle, cover, intersection, union, wave
from satlib.paths import project_root

CLASSES = ("sky", "building", "vegetation", "road", "pavement", "car", "person", "pole", "sign")
SKY, BUILDING, VEGETATION, ROAD, PAVEMENT, CAR, PERSON, POLE, SIGN = range(len(CLASSES))
VOID, KEEP = IGNORE, -1  # labels: of no class, and whatever it was
COUNTS = {"train": 400, "val": 80, "test": 80}
EVERYWHERE = (slice(None), slice(None))
FAR = 14.0  # where walls end, and the farthest objects stand
HOUSES = 24  # on each side, at most
NOISE = (3.0, 9.0)  # standard deviation for each pixel and channel, in pixel units
Colour = Array | tuple[float, float, float]
Window = tuple[slice, slice]  # rows and columns

SEEDS = {"streets128x64": 12864, "streets256x128": 25612}
FINGERPRINTS = {  # what drawing must give on every machine; whoever changes it records them anew
    "streets128x64": "cf196befefc9ff26fb7c3ec74295f9740f60b358f05ee9c32a0745d645c8c35b",
    "streets256x128": "82a907268a5fac3e8ce4c72739710b12b0c4f2a6bdc3a81f76543d862e989ad1",
}


class _Scene:
    """A picture in the making: colours (H, W, 3), labels (H, W), and the camera that everything is seen by.

    Picture coordinates are in half heights, u to the right and v down, 0 in the middle. What is at height h (1 is the
    camera's) and X to the right, z ahead, is seen at (u0 + X / z, v0 + (1 - h) / z) times the focal length.
    """

    def __init__(self, width: int, height: int, draw: Draws) -> None:
        self.size, self.side, self.draw = height, width / height, draw
        self.colours = np.zeros((height, width, 3), dtype=np.float32)
        self.labels = np.full((height, width), VOID, dtype=np.uint8)
        half = np.float32(height / 2)
        self.u = ((np.arange(width, dtype=np.float32) + 0.5) / half - self.side)[None, :]
        self.v = ((np.arange(height, dtype=np.float32) + 0.5) / half - 1)[:, None]
        self.focal = self.one(1.5, 1.9)
        self.u0, self.v0 = self.one(-0.35, 0.35), self.one(-0.25, 0.05)
        self.light = self.one(0.75, 1.15)
        self.cast = tuple(self.one(0.95, 1.05) for _ in range(3))

    def one(self, low: float, high: float) -> float:
        """A number drawn between low and high."""
        return self.draw.uniform(low, high).item()

    def chance(self, probability: float) -> bool:
        return self.one(0, 1) < probability

    def colour(self, low: float, high: float, tint: float = 25.0, plus: Colour = (0, 0, 0)) -> Array:
        """Of this brightness, each channel off by at most `tint`; and then some."""
        return self.one(low, high) + np.array([self.one(-tint, tint) for _ in range(3)]) + np.asarray(plus)

    def paint(self, label: int, distance: Array, colour: Colour, where: Window = EVERYWHERE) -> None:
        """Cover what lies inside (signed distance in half heights, below 0) with a colour; its pixels get the label."""
        share = cover(distance, self.size)
        colours = self.colours[where]
        colours += share[..., None] * (np.asarray(colour, dtype=np.float32) - colours)
        if label != KEEP:
            self.labels[where][share > 0.5] = label

    def at(self, x: float, z: float, half: float, height: float, foot: float = 0) -> tuple[Array, Array, float, Window]:
        """For what stands on the ground at (x, z), so wide to either side and so high: coordinates from the point
        `foot` above that place, how large one unit of length is there, and the pixels that may show it."""
        scale = self.focal / z
        u, v = self.u0 + x * scale, self.v0 + scale
        where = self._pixels(v - height * scale, v, 1), self._pixels(u - half * scale, u + half * scale, self.side)
        return self.u[:, where[1]] - u, self.v[where[0]] - (v - foot * scale), scale, where

    def _pixels(self, low: float, high: float, middle: float) -> slice:
        """The rows or columns from `low` to `high`, with two to spare."""
        first, last = (int(np.floor((edge + middle) * (self.size / 2))) for edge in (low, high))
        return slice(max(first - 2, 0), max(last + 3, 0))


def _sky(scene: _Scene) -> None:
    above, below = scene.colour(150, 215, 10), scene.colour(195, 245, 8).astype(np.float32)
    blue = scene.one(0, 45)
    height = np.clip((scene.v + 1) / (scene.v0 + 1), 0, 1)[..., None]
    colours = (above - (blue, blue / 3, 0)).astype(np.float32)
    colours = colours + height * (below - colours)
    slant, fine = scene.one(-0.4, 0.4), scene.one(1, 2.5)
    clouds = wave(fine * scene.u + slant * scene.v + scene.one(0, 1)) * wave(2 * fine * scene.v + scene.one(0, 1))
    colours = colours + scene.one(0, 14) * clouds[..., None]
    scene.colours += np.broadcast_to(colours, scene.colours.shape)
    scene.labels[:] = SKY


def _ground(scene: _Scene, road: float, pavement: float, middle: float) -> None:
    """The road with its markings, and a pavement on either side; beyond them, grass."""
    below = np.maximum(scene.v - scene.v0, np.float32(1e-3))
    z = scene.focal / below  # of what is seen on the ground
    x = scene.u - scene.u0
    across = x * z / scene.focal - middle
    edge = below / scene.focal  # a length of one, there, in half heights

    def strip(label: int, half: float, colour: Colour, relief: Array) -> None:
        distance = np.maximum((np.abs(across) - half) * edge, -(scene.v - scene.v0))
        scene.paint(label, distance, np.asarray(colour, dtype=np.float32) + relief[..., None])

    near = np.minimum(edge * 6, 1)  # textures fade with distance, as they become finer than pixels
    rough = near * wave(across * scene.one(2, 4)) * wave(z * scene.one(1, 3))
    strip(VEGETATION, 60.0, scene.colour(60, 95, 6, plus=(0, 35, -15)), 14 * rough)
    tiles = near * np.maximum(wave(across * 2), wave(z * 1.3))
    strip(PAVEMENT, road + pavement, scene.colour(120, 175, 10), scene.one(3, 12) * tiles)
    asphalt = scene.colour(70, 125, 6)
    strip(ROAD, road, asphalt, scene.one(2, 9) * rough)
    dash = np.maximum(np.abs(across) - 0.07, 0.6 * wave(z * 0.35 + scene.one(0, 1)))
    scene.paint(KEEP, np.maximum(dash * edge, 0.02 - (scene.v - scene.v0)), asphalt + 80)
    kerb = np.abs(np.abs(across) - road) - 0.06
    scene.paint(KEEP, np.maximum(kerb * edge, 0.01 - (scene.v - scene.v0)), scene.colour(150, 200, 5))


def _side(scene: _Scene, sign: int, distance: float, lit: float) -> None:
    """Houses and hedges along one side of the street, `distance` from the camera's path."""
    near = sign * (scene.u - scene.u0) / distance
    scale = np.maximum(near, np.float32(scene.focal / FAR))  # one unit of length, at the wall of that column
    z = scene.focal / scale
    length = scene.one(1.8, 3.2)
    place = np.minimum(np.floor(z / length + scene.one(0, 1)).astype(np.int64), HOUSES - 1)

    def each(draw: Callable[[], float | Array]) -> Array:
        """Of each house, by the column that shows it."""
        return np.array([draw() for _ in range(HOUSES)], dtype=np.float32)[place]

    green = each(lambda: scene.chance(0.22)) > 0
    height, hedge = each(lambda: scene.one(2.6, 7.0)), each(lambda: scene.one(1.0, 2.6))
    walls, leaves = each(lambda: scene.colour(85, 190, 20)), each(lambda: scene.colour(45, 80, 8))
    leaves = leaves + np.array([-8, 32, -20], dtype=np.float32)
    along, up = z, 1 - (scene.v - scene.v0) / scale  # coordinates on the wall
    ragged = hedge + 0.35 * wave(along * 1.1) * wave(along * 2.3)
    top = np.where(green, ragged, height)
    inside = np.maximum(up - top, -up) * scale
    inside = np.where(sign * (scene.u - scene.u0) > 0, inside, np.float32(1))
    column = scene.one(0.8, 1.3)
    windows = np.maximum(np.abs(wave(along * column / 2) * 0.5) - 0.26, np.abs(wave(up * 0.5 + 0.3) * 0.5) - 0.22)
    glass = scene.colour(40, 110, 12).astype(np.float32)
    fine = np.minimum(scale * 4, 1)
    colours = walls * np.float32(lit) + np.zeros_like(inside)[..., None]
    colours = colours + (fine * (windows < 0) * (up > 0.35))[..., None] * (glass - colours)
    foliage = leaves + (20 * fine * wave(along * 3.1) * wave(up * 2.7))[..., None]
    colours = np.where(green[..., None], foliage * np.float32(lit), colours)
    scene.paint(KEEP, inside, colours)
    scene.labels[:] = np.where(inside < 0, np.where(green, VEGETATION, BUILDING), scene.labels)


def _tree(scene: _Scene, x: float, z: float) -> None:
    height, radius = scene.one(2.2, 3.6), scene.one(0.8, 1.4)
    du, dv, scale, where = scene.at(x, z, 1.3 * radius, height + 1.3 * radius, foot=height)  # from the crown's middle
    trunk = box(du, dv - height * scale / 2, 0.1 * scale, height * scale / 2)
    scene.paint(VEGETATION, trunk, scene.colour(55, 90, 10), where)
    bumps = 0.14 * wave(du / scale * scene.one(0.8, 1.4)) * wave(dv / scale * scene.one(0.8, 1.4))
    crown = circle(du, dv * scene.one(0.85, 1.15), radius * scale) + scale * bumps
    leaf = scene.colour(45, 85, 8, plus=(-5, 35, -20))
    texture = 22 * wave(du / scale * 2.2) * wave(dv / scale * 1.9) - 14 * (dv / (radius * scale))
    scene.paint(VEGETATION, crown, leaf.astype(np.float32) + texture[..., None], where)


def _car(scene: _Scene, x: float, z: float) -> None:
    half, height = scene.one(0.58, 0.72), scene.one(0.95, 1.25)
    du, dv, scale, where = scene.at(x, z, half, height)
    du, dv = du / scale, dv / scale  # in units of length, from the ground
    scene.paint(KEEP, box(du, dv + 0.03, half * 1.02, 0.06) * scale, (35, 35, 38), where)  # the shadow
    body = box(du, dv + 0.42, half, 0.26)
    cabin = intersection(np.abs(du) + 0.35 * (-dv - 0.6) - 0.82 * half, -dv - height, dv + 0.5)
    wheels = box(np.abs(du) - 0.75 * half, dv + 0.13, 0.13, 0.13)
    colour = scene.colour(45, 215, 45) * scene.light
    scene.paint(CAR, wheels * scale, (28, 28, 30), where)
    scene.paint(CAR, union(body, cabin) * scale, colour, where)
    glass = np.maximum(cabin + 0.09, dv + 0.7)
    scene.paint(KEEP, glass * scale, scene.colour(35, 95, 10), where)
    lamps = box(np.abs(du) - 0.8 * half, dv + 0.5, 0.1, 0.06) * scale
    scene.paint(KEEP, lamps, (190, 30, 25) if scene.chance(0.6) else (235, 230, 200), where)


def _person(scene: _Scene, x: float, z: float) -> None:
    height, half = scene.one(1.05, 1.3), scene.one(0.15, 0.21)
    du, dv, scale, where = scene.at(x, z, 1.5 * half, height)
    du, dv = du / scale, dv / scale
    stride = scene.one(0.02, 0.12)
    legs = box(np.abs(du) - stride * (-dv / 0.5), dv + 0.25, 0.055, 0.28)
    torso = box(du, dv + 0.74, half, 0.26)
    head = circle(du, dv + height - 0.1, 0.105)
    scene.paint(PERSON, legs * scale, scene.colour(30, 110, 20), where)
    scene.paint(PERSON, torso * scale, scene.colour(50, 210, 60), where)
    skin = scene.one(90, 200)
    scene.paint(PERSON, head * scale, (skin + 25, skin, skin - 20), where)


def _pole(scene: _Scene, x: float, z: float) -> None:
    """A pole, with a sign on it more often than not."""
    height = scene.one(2.0, 3.2)
    du, dv, scale, where = scene.at(x, z, 0.4, height + 0.4)
    du, dv = du / scale, dv / scale
    scene.paint(POLE, box(du, dv + height / 2, 0.055, height / 2) * scale, scene.colour(90, 170, 6), where)
    if scene.chance(0.75):
        dv = dv + height - 0.1
        triangle = intersection(dv - 0.24, np.abs(du) * 0.87 - 0.5 * dv - 0.18)
        plate = (circle(du, dv, 0.3), box(du, dv, 0.27, 0.27), triangle)[int(scene.one(0, 3) * 0.999)]
        rim = ((200, 35, 40), (35, 70, 180), (215, 180, 40))[int(scene.one(0, 3) * 0.999)]
        scene.paint(SIGN, plate * scale, rim, where)
        scene.paint(KEEP, (plate + 0.09) * scale, (235, 235, 230), where)


def render(width: int, height: int, draw: Draws) -> tuple[Array, Array]:
    """One scene: pixels uint8 (height, width, 3), and labels uint8 (height, width), indices of CLASSES or VOID."""
    scene = _Scene(width, height, draw)
    road, pavement, middle = scene.one(2.2, 3.4), scene.one(1.0, 2.0), scene.one(-0.9, 0.9)
    _sky(scene)
    _ground(scene, road, pavement, middle)
    sun = 1 if scene.chance(0.5) else -1
    for sign in (-1, 1):
        wall = road + pavement + sign * middle + scene.one(0.0, 0.8)
        _side(scene, sign, wall, 1.1 if sign == sun else 0.72)
    bands = (11.0, 8.5, 6.5, 5.0, 3.9, 3.0, 2.3)  # from far to near, each with room for its things
    for z in bands:
        for side in (-1, 1):
            kerb, behind = middle + side * (road + 0.25), middle + side * (road + 0.75 * pavement)
            if scene.chance(0.16):
                _tree(scene, behind, z * scene.one(0.95, 1.05))
            if scene.chance(0.25):
                _pole(scene, kerb, z * scene.one(0.95, 1.05))
            if scene.chance(0.22):
                _person(scene, middle + side * (road + scene.one(0.3, 0.9) * pavement), z * scene.one(0.95, 1.05))
            if scene.chance(0.34) and z > 2.5:
                lane = scene.one(0.3, 0.7) if scene.chance(0.5) else 0.85
                _car(scene, middle + side * lane * (road - 0.5), z * scene.one(0.95, 1.05))
        if scene.chance(0.06):
            _person(scene, middle + scene.one(-1, 1) * road, z)  # someone crosses
    if scene.chance(0.6):
        top = scene.one(0.78, 0.95)
        bonnet = circle((scene.u - scene.one(-0.1, 0.1)) * 0.45, scene.v - top - 1, 1.0)
        scene.paint(VOID, bonnet, scene.colour(30, 120, 20))
    noise = scene.one(*NOISE) * scene.draw.noise(height, width, 3)[0]
    gain = np.asarray([scene.light * cast for cast in scene.cast], dtype=np.float32)
    pixels = np.clip(np.floor(scene.colours * gain + noise + 0.5), 0, 255).astype(np.uint8)
    return pixels, scene.labels


def load(dataset: Dataset, folder: None, *, progress: bool = True) -> Splits:
    """400, 80 and 80 scenes: drawn once, then kept in the project's `data/.cache` by the fingerprint they must have."""
    name, sources = dataset.name, {"fingerprint": FINGERPRINTS[dataset.name]}
    kept = project_root() / "data"
    return cached_splits(name, sources, kept, lambda: Splits(**{split: generate(name, split) for split in COUNTS}))


@cache
def generate(name: str, split: str) -> ImageSet:
    """One split, drawn once in a process (in a few seconds) and the same ever after."""
    dataset, count = DATASETS[name], COUNTS[split]
    (_, height, width), key = dataset.shape, (SEEDS[name], list(COUNTS).index(split))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        drawn = list(pool.map(lambda i: render(width, height, Draws(1, *key, i)), range(count)))
    pixels, labels = (torch.from_numpy(np.stack(each)) for each in zip(*drawn, strict=True))
    frames = tuple(f"{split}_{i:03}" for i in range(count))
    return ImageSet(pixels.permute(0, 3, 1, 2), labels, CLASSES, name, dataset.title, split, frames)
