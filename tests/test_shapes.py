"""The synthetic stand-in: the same bits everywhere, balanced, and of recognisable shapes."""

import hashlib

import numpy as np
import pytest
import torch

from satlib import data
from satlib.data import shapes


def test_shapes_are_the_same_bits_on_every_machine():
    splits = data.load("shapes32")
    assert {split: images.fingerprint for split, images in vars(splits).items()} == shapes.FINGERPRINTS


def test_shapes_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(shapes.os, "cpu_count", lambda: 1)
    assert shapes.generate("val").fingerprint == shapes.FINGERPRINTS["val"]


def test_shapes_are_balanced_shuffled_and_distinct():
    splits = data.load("shapes32")
    assert [len(s) for s in vars(splits).values()] == [9000, 1500, 1500]
    rows = []
    for images in vars(splits).values():
        assert images.images.shape[1:] == (3, 32, 32) and images.title == "synthetic stand-in (shapes32)"
        assert torch.bincount(images.labels).tolist() == [len(images) // 10] * 10
        assert torch.bincount(images.first(300).labels, minlength=10).min() > 10
        rows += [hashlib.sha1(image.numpy().tobytes()).digest() for image in images.images]
    assert len(set(rows)) == 12_000


def test_rotations_lie_on_the_circle_and_go_all_the_way_round():
    c, s = shapes._Draws(4000, 1).turn()
    assert np.allclose(c * c + s * s, 1, atol=1e-6)
    octants = np.floor(np.arctan2(s, c).ravel() / (np.pi / 4)).astype(int) + 4
    assert np.bincount(octants, minlength=8)[:8].min() > 400


def test_shape_noise_has_mean_0_and_standard_deviation_1():
    noise = shapes._Draws(50, 2).noise(32, 32, 3)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


@pytest.mark.parametrize("name", shapes.CLASSES)
def test_each_shape_fills_its_frame_and_no_more(name):
    grid = (np.arange(400, dtype=np.float32) + 0.5) / 160 - 1.25
    inside = shapes.SHAPES[name](grid[None, :], grid[:, None]) < 0
    rows, columns = np.where(inside)
    assert 0.1 < inside.mean() < 0.5
    assert max(abs(grid[rows]).max(), abs(grid[columns]).max()) <= 1.05
    assert max(np.ptp(grid[rows]), np.ptp(grid[columns])) > 1.4
