"""Driving scenes: drawn alike everywhere, and read from small trees that the tests write in each layout."""

import gc

import numpy as np
import pytest
import torch
from PIL import Image

from satlib import data
from satlib.data import scenes, streets
from satlib.data.imageset import IGNORE
from satlib.errors import SatlibError

CAMVID_CLASSES = tuple(name for name in scenes.label_values("camvid").values() if name)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("SATLIB_HOME", str(tmp_path / "home"))
    return tmp_path


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def camvid(root, count=3):
    """`count` scenes of 32x24 in each split: left half class 3, right half class 8, a void corner."""
    random = np.random.default_rng(0)
    labels = np.full((24, 32), 3, dtype=np.uint8)
    labels[:, 16:], labels[:4, :4] = 8, 11
    for split in ("train", "val", "test"):
        for i in range(count):
            pixels = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            write(root / "camvid" / split / "images" / f"{split}_{i}.png", pixels)
            write(root / "camvid" / split / "labels" / f"{split}_{i}.png", labels)
    return root / "camvid"


def cityscapes(root):
    """Four training and four validation scenes of 64x32 in two cities; row 0 is void, 1 the own car, the rest road."""
    random = np.random.default_rng(1)
    labels = np.full((32, 64), 7, dtype=np.uint8)
    labels[0], labels[1], labels[2], labels[31] = 0, 1, 255, 33
    for split in ("train", "val"):
        for i in range(4):
            city = ("aachen", "bochum")[i % 2]
            stem = f"{city}_{i:06}_000019"
            pixels = random.integers(0, 256, (32, 64, 3), dtype=np.uint8)
            write(root / "cityscapes" / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", pixels)
            folder = root / "cityscapes" / "gtFine" / split / city
            write(folder / f"{stem}_gtFine_labelIds.png", labels)
            write(folder / f"{stem}_gtFine_color.png", pixels)
    return root / "cityscapes"


def load(name, root):
    return data.load(name, root=root, progress=False)


def test_camvid_is_read_in_its_layout(root):
    folder = camvid(root)
    splits = load("camvid:32x24", root)
    assert [len(s) for s in vars(splits).values()] == [3, 3, 3]
    train = splits.train
    assert set(train.frames) == {"train_0", "train_1", "train_2"} and train.classes == CAMVID_CLASSES
    assert train.images.shape == (3, 3, 24, 32) and train.labels.shape == (3, 24, 32)
    assert set(splits.test.frames) == {f"test_{i}" for i in range(3)}
    first = np.asarray(Image.open(folder / "train" / "images" / f"{train.frames[0]}.png"))
    assert np.array_equal(train.images[0].permute(1, 2, 0).numpy(), first)
    assert train.labels[0].unique().tolist() == [3, 8, IGNORE] and train.labels[0, 0, 0] == IGNORE
    small = load("camvid:16x16", root).test
    assert small.images.shape == (3, 3, 16, 16) and small.labels.unique().tolist() == [3, 8, IGNORE]
    assert small.title == "CamVid (16x16)" and small.name == "camvid:16x16"
    again = load("camvid:32x24", root)
    assert again.train.fingerprint == train.fingerprint and again.train.frames == train.frames


def test_cityscapes_is_read_in_its_layout(root):
    cityscapes(root)
    splits = load("cityscapes:64x32", root)
    assert [len(s) for s in vars(splits).values()] == [4, 2, 2]
    frames = [frame for s in vars(splits).values() for frame in s.frames]
    assert "aachen_000000_000019" in splits.train.frames and len(frames) == 8
    assert set(splits.val.frames) | set(splits.test.frames) == set(splits.train.frames)  # here they have the same names
    assert not set(splits.val.frames) & set(splits.test.frames)
    labels = splits.train.labels[0]
    assert (labels[:3] == IGNORE).all() and (labels[3:31] == 0).all() and (labels[31] == 18).all()
    assert splits.train.classes[18] == "bicycle" and len(splits.train.classes) == 19
    assert data.DATASETS["cityscapes"].shape == (3, 512, 1024)


@pytest.mark.parametrize(
    ("victim", "change", "message"),
    [
        ("images/train_1.png", None, r"labels/train_1\.png has no image in train/images; restore that file"),
        ("labels/train_1.png", None, r"images/train_1\.png has no labels in train/labels"),
        ("labels/train_1.png", np.zeros((24, 30), np.uint8), r"train_1\.png: 30x24 pixels, but its image has 32x24"),
        ("labels/train_1.png", np.full((24, 32), 77, np.uint8), "the value 77 is no label; expected some of 0..11"),
        ("labels/train_1.png", np.zeros((24, 32, 3), np.uint8), "a RGB image; labels are one byte a pixel"),
        ("images/train_1.png", b"broken", r"images/train_1\.png: not a PNG or JPEG image"),
        ("labels/train_1.png", b"broken", r"labels/train_1\.png: not a PNG image"),
    ],
)
def test_what_is_wrong_with_a_scene_is_named(root, victim, change, message):
    path = camvid(root) / "train" / victim
    path.unlink()
    if isinstance(change, bytes):
        path.write_bytes(change)
    elif change is not None:
        write(path, change)
    with pytest.raises(SatlibError, match=message):
        load("camvid", root)


def test_scenes_are_listed_by_the_rule_of_all_images(root):
    folder = camvid(root)
    hidden = folder / "train" / "images" / ".thumbnails"
    write(hidden / "train_9.png", np.zeros((24, 32, 3), np.uint8))
    (folder / "train" / "images" / "train_0.png").rename(folder / "train" / "images" / "train_0.PNG")
    assert len(load("camvid:32x24", root).train) == 3
    (link := folder / "val" / "labels" / "val_9.png").symlink_to("nowhere.png")
    with pytest.raises(SatlibError, match=rf"cannot read {link}: a link to nothing; remove or restore it"):
        load("camvid:32x24", root)
    link.rename(link.with_suffix(".bmp"))
    with pytest.raises(SatlibError, match=r"val_9\.bmp: \.bmp images; convert them to \.png or \.jpg"):
        load("camvid:32x24", root)


def test_linked_cities_are_read_loops_end_and_companions_need_no_word(root, recwarn):
    folder = cityscapes(root)
    plain = load("cityscapes:64x32", root)
    for kind in ("leftImg8bit", "gtFine"):
        city = folder / kind / "train" / "bochum"
        city.rename(root / f"{kind}_bochum")
        city.symlink_to(root / f"{kind}_bochum")
        (folder / kind / "train" / "back").symlink_to(folder)
        (city / "again").symlink_to(city)
        for path in (folder / kind / "val").rglob("*.png"):
            path.rename(path.with_suffix(".PNG"))
    (folder / "gtFine" / "train" / "aachen" / "aachen_000000_000019_gtFine_polygons.json").touch()
    assert load("cityscapes:64x32", root).fingerprint == plain.fingerprint and not recwarn.list
    (folder / "gtFine" / "train" / "aachen" / "notes.txt").touch()
    with pytest.warns(UserWarning, match=r"1 files or folders, gtFine/train/aachen/notes\.txt"):
        load("cityscapes:64x32", root)
    (folder / "leftImg8bit" / "train" / "ulm").symlink_to("gone")
    with pytest.raises(SatlibError, match=r"cannot read .*train/ulm: a link to nothing; remove or restore it"):
        load("cityscapes:64x32", root)


def test_images_without_the_tail_are_named(root):
    folder = cityscapes(root)
    plain = load("cityscapes:64x32", root)
    city = folder / "leftImg8bit" / "train" / "aachen"
    names = ("aachen_000000_000019_leftImg8bit copy.png", "picture.jpg")
    for name in names:
        write(city / name, np.zeros((32, 64, 3), np.uint8))
    with pytest.warns(UserWarning, match=rf"2 files or folders, .*/{names[0]}, .*/picture\.jpg"):
        assert load("cityscapes:64x32", root).fingerprint == plain.fingerprint


@pytest.mark.filterwarnings("error")
def test_an_empty_folder_hides_no_complete_one_and_no_iterator_stays_open(root):
    camvid(root).rename(root / "CamVid")
    (root / "camvid").mkdir()
    assert len(load("camvid:32x24", root).train) == 3
    (root / "cityscapes").mkdir()
    with pytest.raises(SatlibError, match=rf"no folder {root}/cityscapes/leftImg8bit, {root}/cityscapes is empty"):
        load("cityscapes", root)
    gc.collect()


def test_camvid_of_segnets_tutorial_gives_the_same_sets(root):
    folder = camvid(root)
    plain = load("camvid:32x24", root)
    for split in ("train", "val", "test"):
        (folder / split / "labels").rename(folder / f"{split}annot")
        (folder / split / "images").rename(folder / "images")
        (folder / split).rmdir()
        (folder / "images").rename(folder / split)
        (folder / f"{split}.txt").touch()
    labels = folder / "trainannot" / "train_0.png"
    (palette := Image.open(labels).copy()).putpalette(bytes(range(255, -1, -1)) * 3)
    palette.save(labels)
    folder.rename(root / "CamVid")
    assert Image.open(root / "CamVid" / "trainannot" / "train_0.png").mode == "P"
    assert load("camvid:32x24", root).fingerprint == plain.fingerprint
    (root / "CamVid" / "valannot").rename(root / "valannot")
    with pytest.raises(SatlibError, match=rf"no folder {root}/CamVid/valannot; unpack"):
        load("camvid:32x24", root)


def test_a_scene_twice_is_refused(root):
    path = camvid(root) / "train" / "images" / "train_1.png"
    Image.open(path).save(path.with_suffix(".jpg"))
    with pytest.raises(SatlibError, match=r"train_1\.jpg and train/images/train_1\.png are one scene's; remove one"):
        load("camvid", root)


def test_missing_folders_and_bad_sizes_are_named(root):
    with pytest.raises(SatlibError, match=r"no CamVid in .*: looked for camvid/"):
        load("camvid", root)
    with pytest.raises(SatlibError, match=r"no Cityscapes in .*: looked for cityscapes/"):
        load("cityscapes", root)
    folder = camvid(root)
    for option in ("small", "10x10", "5000x100", "32", "32x24x1"):
        with pytest.raises(SatlibError, match=f"camvid:{option}: expected a width and a height from 16 to 4096"):
            load(f"camvid:{option}", root)
    for path in sorted((folder / "val" / "images").iterdir()):
        path.unlink()
    (folder / "val" / "images").rmdir()
    with pytest.raises(SatlibError, match=r"no folder .*val/images; unpack"):
        load("camvid", root)


def test_scenes_are_flipped_with_their_labels(root):
    camvid(root)
    train = load("camvid:32x24", root).train
    seen = set()
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
        ((x, y),) = train.batches(3, generator=generator, augment=True)
        assert y.dtype == torch.int64
        for image, labels, index in zip(x, y, order.tolist(), strict=True):
            own = train.images[index].float()
            flipped = not torch.equal(image, own)
            assert torch.equal(image, own.flip(-1) if flipped else own)
            expected = train.labels[index].long()
            assert torch.equal(labels, expected.flip(-1) if flipped else expected)
            seen.add(flipped)
    assert seen == {False, True}
    part = train.subset([2, 0])
    assert part.frames == (train.frames[2], train.frames[0]) and torch.equal(part.labels, train.labels[[2, 0]])


@pytest.mark.parametrize("name", streets.FINGERPRINTS)
def test_street_scenes_are_the_same_bits_on_every_machine(name):
    drawn = data.Splits(**{split: streets.generate(name, split) for split in streets.COUNTS})
    assert drawn.fingerprint == streets.FINGERPRINTS[name]


def test_label_values_and_classes_of_the_layouts():
    camvid, cityscapes = (scenes.label_values(name) for name in ("camvid", "cityscapes"))
    assert list(camvid) == [*range(12)] and list(cityscapes) == [*range(34), 255]
    assert camvid[8] == "car" and cityscapes[7] == "road" and cityscapes[33] == "bicycle"
    assert camvid[11] == cityscapes[0] == cityscapes[255] == ""
    for name in scenes.SCENES:
        assert len([*filter(None, scenes.label_values(name).values())]) == data.DATASETS[name].classes


def test_street_scenes_are_drawn_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SATLIB_HOME", str(tmp_path))
    drawn = data.load("streets128x64")
    monkeypatch.setattr(streets, "generate", lambda *args: pytest.fail("drawn again"))
    kept = data.load("streets128x64")
    assert kept.fingerprint == streets.FINGERPRINTS["streets128x64"]
    for split, images in vars(drawn).items():
        assert getattr(kept, split).fingerprint == images.fingerprint
        assert getattr(kept, split).frames == images.frames


def test_street_scenes_show_every_class_in_its_place():
    train = data.load("streets128x64").train
    assert train.images.shape == (400, 3, 64, 128) and train.title == "synthetic street scenes (streets128x64)"
    shown = torch.stack([(train.labels == label).flatten(1).any(1) for label in range(len(streets.CLASSES))])
    assert (shown.float().mean(1) > 0.5).all(), "a class that most scenes lack"
    rows = torch.arange(64.0).view(1, -1, 1).expand(len(train), 64, 128)
    height = [rows[train.labels == label].mean().item() for label in range(len(streets.CLASSES))]
    places = dict(zip(streets.CLASSES, height, strict=True))
    assert places["sky"] < places["building"] < places["car"] < places["road"]
    assert places["sign"] < places["person"] < places["pavement"]
    assert rows[train.labels == IGNORE].min() > 40  # the bonnet
    assert len({image.numpy().tobytes() for image in train.images}) == len(train)
