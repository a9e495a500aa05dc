"""Tiny ImageNet: read from small trees that the tests write, its classes chosen, its damaged files named."""

import numpy as np
import pytest
import torch
from PIL import Image

from satlib import data
from satlib.data import imagenet
from satlib.errors import SatlibError

FEW = imagenet.wnids("4")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Of each of the first 4 classes of "4", and one other: 10 training and 3 validation images, JPEG, 64x64."""
    monkeypatch.setenv("SATLIB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SATLIB_SKIP_DAMAGED", raising=False)
    random = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 3)):
        for wnid in (*FEW, "n99999999"):
            (folder := tmp_path / "imagenet200" / split / wnid).mkdir(parents=True)
            for i in range(count):
                grey = i == 0
                pixels = random.integers(0, 256, (64, 64) if grey else (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{wnid}_{i}.JPEG")
    return tmp_path


def load(root, option=":4"):
    return data.load(f"imagenet200{option}", root=root, progress=False)


def test_a_tree_is_read_and_split_and_val_reports(root):
    splits = load(root)
    assert [len(s) for s in vars(splits).values()] == [36, 4, 12]
    assert splits.train.images.shape[1:] == (3, 64, 64) and splits.train.name == "imagenet200:4"
    assert splits.train.classes == tuple(imagenet.names()[wnid] for wnid in FEW)
    assert splits.train.title == "Tiny ImageNet (64x64), 4 of its classes"
    files = {
        split: {
            label: {
                np.asarray(Image.open(path).convert("RGB")).tobytes()
                for path in (root / "imagenet200" / split / wnid).iterdir()
            }
            for label, wnid in enumerate(FEW)
        }
        for split in ("train", "val")
    }
    for label in range(4):
        read = [
            {image.numpy().tobytes() for image in s.images[s.labels == label].permute(0, 2, 3, 1)}
            for s in vars(splits).values()
        ]
        assert read[0] | read[1] == files["train"][label] and not read[0] & read[1]
        assert read[2] == files["val"][label]
    again = load(root)
    assert all(
        torch.equal(a.images, b.images) for a, b in zip(vars(splits).values(), vars(again).values(), strict=True)
    )


def test_classes_are_all_a_number_or_a_file(root, tmp_path):
    assert len(imagenet.wnids()) == len(imagenet.names()) == 200 == len(set(imagenet.names().values()))
    assert imagenet.names()["n02124075"] == "Egyptian cat" and len(imagenet.wnids("40")) == 40
    (listed := tmp_path / "classes.txt").write_text("\n".join(FEW[2:0:-1]))
    splits = load(root, f":{listed}")
    assert splits.test.classes == (imagenet.names()[FEW[2]], imagenet.names()[FEW[1]]) and len(splits.test) == 6


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("1", "1 classes of ImageNet: expected 2 to 200"),
        ("201", "201 classes of ImageNet: expected 2 to 200"),
        ("none.txt", "cannot read the classes in none.txt"),
    ],
)
def test_options_that_name_no_classes(root, option, message):
    with pytest.raises(SatlibError, match=message):
        load(root, f":{option}")


@pytest.mark.parametrize(
    ("text", "message"),
    [("n01443537 n00000000", "'n00000000' is none of the 200"), ("n01443537", "at least two wnids")],
)
def test_lists_of_classes_that_are_none(root, tmp_path, text, message):
    (tmp_path / "c.txt").write_text(text)
    with pytest.raises(SatlibError, match=message):
        load(root, f":{tmp_path / 'c.txt'}")


def test_a_damaged_image_is_named_and_left_out_only_when_asked(root, monkeypatch):
    victim = root / "imagenet200" / "train" / FEW[1] / f"{FEW[1]}_5.JPEG"
    victim.write_bytes(victim.read_bytes()[:500])
    with pytest.raises(SatlibError, match=rf"{victim.name}: damaged or truncated .*; replace or remove it"):
        load(root)
    monkeypatch.setenv("SATLIB_SKIP_DAMAGED", "1")
    with pytest.warns(UserWarning, match=rf"1 bad images of .* left out: train/{FEW[1]}/{victim.name}"):
        splits = load(root)
    assert len(splits.train) + len(splits.val) == 39
    assert torch.bincount(torch.cat([splits.train.labels, splits.val.labels])).tolist() == [10, 9, 10, 10]


def test_missing_data_and_classes_are_named(root, tmp_path):
    with pytest.raises(SatlibError, match=r"no Tiny ImageNet in .*: looked for imagenet200/\{train,val\}/<wnid>"):
        load(tmp_path / "elsewhere")
    with pytest.raises(SatlibError, match=r"no class folder .* \(196 of 200 missing\)"):
        load(root, "")
    with pytest.raises(SatlibError, match="data set 'cifar10' has no options: '4'; only imagenet200 has"):
        data.load("cifar10:4", root=root)
