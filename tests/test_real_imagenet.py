"""The real Tiny ImageNet, where this machine has it: in the data root, or packed beside the checkout."""

import os
import tarfile
from pathlib import Path

import pytest
import torch

from satlib import data
from satlib.data import imagenet

PACKED = Path(__file__).resolve().parents[2] / "shared" / "data" / "tiny-imagenet-200"
HAS_ROOT = bool(os.environ.get("SATLIB_DATA")) and data.find("imagenet200") is not None

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.slow,
    pytest.mark.skipif(
        not HAS_ROOT and not PACKED.is_dir(), reason=f"no Tiny ImageNet in SATLIB_DATA and none packed in {PACKED}"
    ),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    if HAS_ROOT:
        return Path(os.environ["SATLIB_DATA"])
    folder = tmp_path_factory.mktemp("data")
    wanted = set(imagenet.wnids("20"))
    for name in ("train-0.tar", "val.tar"):
        with tarfile.open(PACKED / name) as archive:
            members = (member for member in archive if len(parts := Path(member.name).parts) > 2 and parts[1] in wanted)
            archive.extractall(folder / "imagenet200", members=members, filter="data")
    return folder


def test_twenty_classes_of_the_real_data_set(root):
    splits = data.load("imagenet200:20", root=root, progress=False)
    assert splits.train.title == "Tiny ImageNet (64x64), 20 of its classes"
    for images in vars(splits).values():
        assert images.images.shape[1:] == (3, 64, 64) and len(images.classes) == 20
        assert len(set(torch.bincount(images.labels, minlength=20).tolist())) == 1
    assert torch.bincount(splits.test.labels).tolist() == [50] * 20
    assert all(90 < mean < 150 for mean in splits.train.mean) and all(50 < std < 90 for std in splits.train.std)
