"""The real Tiny ImageNet, where this machine has it: in the data root, or packed beside the checkout."""

import os
import tarfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from satlib import data, zoo
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


def test_a_network_from_elsewhere_knows_the_real_images(root):
    """EfficientNet-Lite0, which was trained on all of ImageNet, tells 20 of its classes apart at 3.5 times the side."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="comes with the extra `zoo`")
    test = data.load("imagenet200:20", root=root, progress=False).test
    chosen = test.subset(torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:64])
    places = [imagenet.indices()[wnid] for wnid in imagenet.wnids("20")]
    large = F.interpolate(chosen.images.float(), size=224, mode="bilinear", antialias=True)
    with torch.no_grad():
        right = zoo.pretrained("EfficientNet-Lite0", places)(large).argmax(1) == chosen.labels
    assert right.float().mean() > 0.7
