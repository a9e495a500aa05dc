"""The synthetic stand-in: the same bits everywhere, balanced, and of recognisable shapes."""

import hashlib

import numpy as np
import pytest
import torch

from satlib import data
from satlib.data import shapes
from satlib.data.shapes import Draws


@pytest.mark.parametrize("name", shapes.FAMILIES)
def test_shapes_are_the_same_bits_on_every_machine(name):
    assert data.load(name).fingerprint == shapes.FAMILIES[name].fingerprint


def test_shapes_do_not_depend_on_the_number_of_threads(monkeypatch):
    drawn = shapes.generate("shapes32", "val")
    monkeypatch.setattr(shapes.os, "cpu_count", lambda: 1)
    assert shapes.generate.__wrapped__("shapes32", "val").fingerprint == drawn.fingerprint


@pytest.mark.parametrize(
    ("name", "size", "counts"), [("shapes32", 32, [9000, 1500, 1500]), ("shapes64", 64, [8000, 1600, 1600])]
)
def test_shapes_are_balanced_shuffled_and_distinct(name, size, counts):
    splits = data.load(name)
    classes = len(shapes.FAMILIES[name].classes)
    assert [len(s) for s in vars(splits).values()] == counts
    rows = []
    for images in vars(splits).values():
        assert images.images.shape[1:] == (3, size, size) and images.title == f"synthetic stand-in ({name})"
        assert torch.bincount(images.labels).tolist() == [len(images) // classes] * classes
        assert torch.bincount(images.first(30 * classes).labels, minlength=classes).min() > 10
        rows += [hashlib.sha1(image.numpy().tobytes()).digest() for image in images.images]
    assert len(set(rows)) == sum(counts)


def test_rotations_lie_on_the_circle_and_go_all_the_way_round():
    c, s = Draws(4000, 1).turn()
    assert np.allclose(c * c + s * s, 1, atol=1e-6)
    octants = np.floor(np.arctan2(s, c).ravel() / (np.pi / 4)).astype(int) + 4
    assert np.bincount(octants, minlength=8)[:8].min() > 400


def test_shape_noise_has_mean_0_and_standard_deviation_1():
    noise = Draws(50, 2).noise(32, 32, 3)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


@pytest.mark.parametrize("name", shapes.FAMILIES["shapes64"].classes)
def test_each_shape_fills_its_frame_and_no_more(name):
    grid = (np.arange(400, dtype=np.float32) + 0.5) / 160 - 1.25
    inside = shapes.FAMILIES["shapes64"].shapes[name](grid[None, :], grid[:, None]) < 0
    rows, columns = np.where(inside)
    assert 0.1 < inside.mean() < 0.5
    assert max(abs(grid[rows]).max(), abs(grid[columns]).max()) <= 1.05
    assert max(np.ptp(grid[rows]), np.ptp(grid[columns])) > 1.4
