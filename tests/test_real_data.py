"""The real CIFAR-10, where this machine has it: in the data root, or where a script beside the checkout fetches it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from satlib import data
from satlib.data.cifar10 import CLASSES

SCRIPT = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10.py"
HAS_ROOT = bool(os.environ.get("SATLIB_DATA")) and data.find("cifar10") is not None

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.slow,
    pytest.mark.skipif(
        not HAS_ROOT and not (SCRIPT.is_file() and shutil.which("npm")),
        reason=f"no cifar10 in SATLIB_DATA, and not both npm and {SCRIPT}",
    ),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    if HAS_ROOT:
        return Path(os.environ["SATLIB_DATA"])
    folder = tmp_path_factory.mktemp("data")
    fetched = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"{SCRIPT} could not fetch CIFAR-10: {(fetched.stderr.strip().splitlines() or ['?'])[-1]}")
    return folder


@pytest.fixture(scope="module")
def splits(root) -> data.Splits:
    return data.load("cifar10", root=root, progress=False)


def test_all_60000_images_are_there_class_by_class(splits):
    assert splits.train.classes == CLASSES
    for images, each in ((splits.train, 4500), (splits.val, 500), (splits.test, 1000)):
        assert images.images.shape == (10 * each, 3, 32, 32)
        assert torch.bincount(images.labels).tolist() == [each] * 10


def test_the_moments_are_the_known_ones(splits):
    assert splits.train.mean == pytest.approx((125.3, 123.0, 113.9), abs=0.5)
    assert splits.train.std == pytest.approx((63.0, 62.1, 66.7), abs=1.0)


def test_no_image_is_in_two_sets_more_often_than_in_the_data_set_itself(splits):
    """CIFAR-10 has a few duplicates; a split that overlapped would have thousands."""
    train, val, test = (
        {row.tobytes() for row in images.images.permute(0, 2, 3, 1).numpy()} for images in vars(splits).values()
    )
    assert len(train) > 44_900 and len(val) > 4_980 and len(test) > 9_980
    assert len(train & val) < 20 and len(train & test) < 20 and len(val & test) < 20


def test_files_decode_as_with_pillow(root, splits):
    tree = data.find("cifar10", root=root)
    if not (tree / "test").is_dir():
        pytest.skip("official batches hold no image files")
    held = {
        (row.tobytes(), label)
        for row, label in zip(splits.test.images.permute(0, 2, 3, 1).numpy(), splits.test.labels.tolist(), strict=True)
    }
    for label, name in enumerate(CLASSES):
        for path in sorted((tree / "test" / name).glob("0*.[jp][pn]g"))[::200]:
            with Image.open(path) as image:
                assert (np.asarray(image.convert("RGB")).tobytes(), label) in held, path


def test_a_second_load_gives_the_same_bits(root, splits):
    again = data.load("cifar10", root=root, progress=False)
    for first, second in zip(vars(splits).values(), vars(again).values(), strict=True):
        assert first.fingerprint == second.fingerprint and first.title == second.title


def test_an_augmented_epoch_goes_over_every_image(splits):
    seen = torch.zeros(10, dtype=torch.int64)
    for images, labels in splits.train.batches(512, generator=torch.Generator().manual_seed(0), augment=True):
        assert images.min() >= 0 and images.max() <= 255
        seen += torch.bincount(labels, minlength=10)
    assert seen.tolist() == [4500] * 10
