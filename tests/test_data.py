"""CIFAR-10 in both of its layouts, its cache, and every error that reading it promises."""

import hashlib
import os
import pickle
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from satlib import cli, data
from satlib.data import cifar10, imagetree
from satlib.data.cifar10 import BATCHES, BINARY, CLASSES
from satlib.data.imageset import ImageSet
from satlib.data.streamed import middle
from satlib.errors import SatlibError

# ------------------------------------------------------------------------------------------- image trees


def write_tree(root: Path, per_class: int = 10, suffix: str = ".png", seed: int = 0) -> Path:
    """A small CIFAR-10 tree below `root`, with hidden files, which readers pass over."""
    random = np.random.default_rng(seed)
    for split, count in (("train", per_class), ("test", 2)):
        for name in CLASSES:
            folder = root / "cifar10" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:04}{suffix}")
    (root / "cifar10" / ".complete").touch()
    (root / "cifar10" / "train" / "cat" / ".DS_Store").write_bytes(b"x")
    return root / "cifar10"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setenv("SATLIB_HOME", str(tmp_path / "home"))
    return write_tree(tmp_path / "root")


def load(tree: Path) -> data.Splits:
    return data.load("cifar10", root=tree.parent, progress=False)


def pixels_by_class(images: ImageSet) -> dict[str, set[bytes]]:
    return {
        name: {image.numpy().tobytes() for image in images.images[images.labels == label].permute(0, 2, 3, 1)}
        for label, name in enumerate(images.classes)
    }


def test_a_tree_is_read_exactly_and_split_by_class(tree):
    splits = load(tree)
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [90, 10, 20]
    assert splits.train.classes == CLASSES and splits.train.title == "CIFAR-10 (image tree)"
    assert [s.split for s in (splits.train, splits.val, splits.test)] == ["train", "val", "test"]
    assert torch.bincount(splits.val.labels).tolist() == [1] * 10
    train, val, test = (pixels_by_class(s) for s in (splits.train, splits.val, splits.test))
    for name in CLASSES:
        files = {
            split: {np.asarray(Image.open(p)).tobytes() for p in (tree / split / name).glob("[0-9]*")}
            for split in ("train", "test")
        }
        assert train[name] | val[name] == files["train"] and not train[name] & val[name]
        assert test[name] == files["test"]


def test_sets_are_shuffled_so_that_the_first_images_are_a_sample(tree):
    for images in vars(load(tree)).values():
        assert images.labels.tolist() != sorted(images.labels.tolist())


def test_jpeg_trees_say_so_and_decode_as_pillow_does(tmp_path, monkeypatch):
    monkeypatch.setenv("SATLIB_HOME", str(tmp_path / "home"))
    tree = write_tree(tmp_path / "root", per_class=2, suffix=".jpg")
    (tree / "test" / "cat" / "0000.jpg").rename(tree / "test" / "cat" / "0000.JPEG")
    splits = load(tree)
    assert splits.test.title == "CIFAR-10 (JPEG copy)"
    files = {np.asarray(Image.open(p).convert("RGB")).tobytes() for p in (tree / "test" / "cat").iterdir()}
    assert pixels_by_class(splits.test)["cat"] == files


def test_grey_images_become_rgb(tree):
    grey = np.full((32, 32), 77, dtype=np.uint8)
    Image.fromarray(grey).save(tree / "test" / "dog" / "0000.png")
    assert np.full((32, 32, 3), 77, dtype=np.uint8).tobytes() in pixels_by_class(load(tree).test)["dog"]


def test_any_number_of_threads_gives_the_same(tree, monkeypatch):
    scanned = imagetree.scan_tree(tree, splits=("train",), classes=CLASSES)
    monkeypatch.setattr(imagetree.os, "cpu_count", lambda: 1)
    alone = imagetree.read_images(tree, scanned, "train", size=(32, 32), progress=False)
    monkeypatch.setattr(imagetree.os, "cpu_count", lambda: 7)
    several = imagetree.read_images(tree, scanned, "train", size=(32, 32), progress=False)
    assert torch.equal(alone[0], several[0]) and torch.equal(alone[1], several[1])


def test_loading_leaves_the_global_random_state_alone(tree):
    before = torch.get_rng_state()
    load(tree)
    load(tree)
    assert torch.equal(torch.get_rng_state(), before)


def test_progress_is_lines_where_nobody_watches(tree, monkeypatch, capfd):
    monkeypatch.setattr(imagetree, "SECONDS_PER_LINE", 0)
    scanned = imagetree.scan_tree(tree, splits=("train",), classes=CLASSES)
    imagetree.read_images(tree, scanned, "train", size=(32, 32), progress=True)
    assert "decoding cifar10/train: 50 of 100 images\n" in capfd.readouterr().err
    imagetree.read_images(tree, scanned, "train", size=(32, 32), progress=False)
    assert capfd.readouterr().err == ""


def damage_truncated(tree: Path) -> Path:
    path = tree / "train" / "cat" / "0003.png"
    path.write_bytes(path.read_bytes()[:400])
    return path


def damage_empty(tree: Path) -> Path:
    path = tree / "test" / "cat" / "0001.png"
    path.write_bytes(b"")
    return path


def damage_text(tree: Path) -> Path:
    path = tree / "train" / "ship" / "0000.png"
    path.write_text("<html>not found</html>")
    return path


def damage_size(tree: Path) -> Path:
    path = tree / "train" / "frog" / "0007.png"
    Image.new("RGB", (40, 32)).save(path)
    return path


def damage_depth(tree: Path) -> Path:
    path = tree / "train" / "frog" / "0002.png"
    Image.fromarray(np.zeros((32, 32), dtype=np.uint16)).save(path)
    return path


def damage_kind(tree: Path) -> Path:
    path = tree / "train" / "dog" / "0003.webp"
    path.write_bytes(b"RIFF")
    return path


def damage_link(tree: Path) -> Path:
    path = tree / "train" / "dog" / "9999.png"
    path.symlink_to("nowhere.png")
    return path


def damage_self_link(tree: Path) -> Path:
    path = tree / "train" / "dog" / "9999.png"
    path.symlink_to(path)
    return path


def damage_class_link(tree: Path) -> Path:
    (tree / "train" / "dog").rename(tree / ".dog")
    (tree / "train" / "dog").symlink_to("gone")
    return tree / "train" / "dog"


def damage_class_file(tree: Path) -> Path:
    (tree / "train" / "dog").rename(tree / ".dog")
    (tree / "train" / "dog").write_bytes(b"x")
    return tree / "train" / "dog"


def damage_class_without_images(tree: Path) -> Path:
    (path := damage_empty_class(tree)).joinpath("notes.txt").touch()
    return path


def damage_missing_class(tree: Path) -> Path:
    (tree / "test" / "deer").rename(tree / ".deer")
    return tree / "test" / "deer"


def damage_extra_class(tree: Path) -> Path:
    path = tree / "test" / "zebra"
    path.mkdir()
    return path


def damage_empty_class(tree: Path) -> Path:
    for path in (tree / "train" / "bird").iterdir():
        path.unlink()
    return tree / "train" / "bird"


def damage_empty_split(tree: Path) -> Path:
    (tree / "test").rename(tree / ".test")
    (tree / "test").mkdir()
    return tree / "test"


def damage_missing_split(tree: Path) -> Path:
    (tree / "test").rename(tree / ".test")
    return tree / "test"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncated, "damaged or truncated"),
        (damage_empty, "not a PNG or JPEG image"),
        (damage_text, "not a PNG or JPEG image"),
        (damage_size, "40x32 pixels, expected 32x32"),
        (damage_depth, "16 bits a channel; save it with 8"),
        (damage_kind, "convert them to .png or .jpg"),
        (damage_link, "a link to nothing"),
        (damage_missing_class, "put it back or unpack the data set again"),
        (damage_extra_class, "every split needs the same 10 classes"),
        (damage_self_link, "a link that leads to itself"),
        (damage_class_link, "a link to nothing"),
        (damage_class_file, "is a file, expected a folder; unpack"),
        (damage_class_without_images, "expected *.png, *.jpg or *.jpeg; unpack"),
        (damage_empty_class, "is empty; expected *.png, *.jpg or *.jpeg; unpack the data set again"),
        (damage_empty_split, "is empty; expected test/<class>"),
        (damage_missing_split, "expected train/, test/"),
    ],
)
def test_damage_is_named_with_its_mend(tree, damage, message):
    path = damage(tree)
    with pytest.raises(SatlibError) as caught:
        load(tree)
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tree.parent.rglob("*.safetensors"))


def test_a_truncated_jpeg_is_named(tmp_path):
    tree = write_tree(tmp_path / "root", per_class=2, suffix=".jpg")
    path = tree / "train" / "cat" / "0001.jpg"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(SatlibError, match=r"cat/0001\.jpg: damaged or truncated"):
        load(tree)


def test_of_several_bad_files_the_first_is_named_and_the_rest_counted(tree):
    for i in (8, 2, 5):
        (tree / "train" / "horse" / f"000{i}.png").write_bytes(b"no image")
    with pytest.raises(SatlibError, match=r"horse/0002\.png: .* \(and 2 more bad files\); replace or remove it"):
        load(tree)


def test_links_are_followed_suffixes_are_taken_in_any_case_and_what_is_left_out_is_named_once(tree, recwarn):
    plain = load(tree)
    cat, elsewhere = tree / "train" / "cat", tree.parent.parent / "elsewhere"
    (tree / "train" / "dog").rename(elsewhere)
    (tree / "train" / "dog").symlink_to(elsewhere)
    (tree / "test" / "dog" / "0000.png").rename(elsewhere.with_name("one.png"))
    (tree / "test" / "dog" / "0000.png").symlink_to(elsewhere.with_name("one.png"))
    (cat / "0001.png").rename(cat / "0001.PNG")
    for name in ("._0001.png", "Thumbs.db", "desktop.ini", ".DS_Store"):
        (cat / name).write_bytes(b"x")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (cat / name).mkdir()
        (tree / "train" / name).mkdir()
    assert load(tree).fingerprint == plain.fingerprint and not recwarn.list
    for path in (cat / "notes.txt", cat / "0001.npy", tree / "test" / "list.csv"):
        path.touch()
    (cat / "more").mkdir()
    assert load(tree).fingerprint == plain.fingerprint
    [warning] = recwarn.list
    expected = (
        "names or places: 4 files or folders, train/cat/0001.npy, train/cat/more/, train/cat/notes.txt, test/list"
    )
    assert expected in str(warning.message)


@pytest.mark.parametrize("victim", ["train", "train/cat", "test/cat/0001.png"])
def test_what_may_not_be_read_is_named_so(tree, monkeypatch, victim):
    path, access, opened = tree / victim, os.access, Image.open

    def forbidden(file, **options):  # the tests' user may be root, who may read everything
        if file == path:
            raise PermissionError(13, "Permission denied")
        return opened(file, **options)

    monkeypatch.setattr(imagetree.os, "access", lambda place, mode: Path(place) != path and access(place, mode))
    monkeypatch.setattr(imagetree.Image, "open", forbidden)
    with pytest.raises(SatlibError, match=rf"{path}: no permission; give it \(`chmod -R u\+rX`\) or ask the owner"):
        load(tree)


# ---------------------------------------------------------------------------------------------- pictures

RGB = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)


def with_alpha(value: int, pixels: np.ndarray = RGB) -> Image.Image:
    alpha = np.full(pixels.shape[:2], 255, dtype=np.uint8)
    alpha[0, 0] = value
    return Image.fromarray(np.dstack([pixels, alpha]))


def deep(channels: int) -> bytes:
    """A PNG of 16 bits a channel; Pillow writes none in colour."""
    kind = {3: 2, 2: 4, 4: 6}[channels]
    rows = zlib.compress((b"\0" + bytes(range(2 * channels)) * 9) * 6)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 9, 6, 16, kind, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
    parts = (struct.pack(">I", len(b)) + name + b + struct.pack(">I", zlib.crc32(name + b)) for name, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


PALETTE, BITS = Image.fromarray(RGB).quantize(16), Image.fromarray(RGB).convert("1")
UNUSED = bytes([255] * 16)


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (with_alpha(255), {}),
        (with_alpha(255, RGB[..., :1]), {}),
        (Image.fromarray(RGB[..., 0]), {}),
        (Image.fromarray(RGB), {"transparency": (255, 255, 255)}),
        (PALETTE, {}),
        (PALETTE, {"transparency": UNUSED}),
        (BITS, {}),
        (Image.fromarray(RGB).convert("CMYK"), {"format": "JPEG"}),
    ],
)
def test_pictures_of_every_opaque_kind_become_rgb(tmp_path, image, options, recwarn):
    image.save(path := tmp_path / "x.png", **options)
    with Image.open(path) as saved:
        expected = np.array(saved.convert("RGBA"))[..., :3] if saved.mode != "CMYK" else np.array(saved.convert("RGB"))
    assert np.array_equal(imagetree.decode(tmp_path, path.name), expected) and not recwarn.list


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (with_alpha(254), {}),
        (with_alpha(0, RGB[..., :1]), {}),
        (PALETTE, {"transparency": PALETTE.getpixel((0, 0))}),
        (PALETTE, {"transparency": bytes(16)}),
        (Image.fromarray(RGB), {"transparency": tuple(RGB[0, 0].tolist())}),
        (Image.fromarray(RGB[..., 0]), {"transparency": int(RGB[0, 0, 0])}),
        (BITS, {"transparency": 0}),
    ],
)
def test_transparent_pictures_are_refused(tmp_path, image, options):
    image.save(tmp_path / "x.png", **options)
    with pytest.raises(SatlibError, match=r"^x\.png: has transparent pixels; flatten it"):
        imagetree.decode(tmp_path, "x.png")


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_pictures_of_16_bits_a_channel_are_refused(tmp_path, channels):
    (tmp_path / "x.png").write_bytes(deep(channels))
    with pytest.raises(SatlibError, match=r"^x\.png: 16 bits a channel; save it with 8"):
        imagetree.decode(tmp_path, "x.png")


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_pictures_are_read_upright(tmp_path, kind):
    path, exif = tmp_path / f"x.{kind}", Image.Exif()
    Image.fromarray(RGB).save(path)
    plain = imagetree.decode(tmp_path, path.name)
    turned = [plain[:, ::-1], plain[::-1, ::-1], plain[::-1], plain.swapaxes(0, 1)]
    turned += [np.rot90(plain, -1), np.rot90(plain[::-1, ::-1].swapaxes(0, 1), 0), np.rot90(plain)]
    for orientation, expected in enumerate([plain, plain, *turned, plain]):
        exif[0x0112] = orientation
        Image.fromarray(RGB).save(path, exif=exif.tobytes())
        assert np.array_equal(imagetree.decode(tmp_path, path.name), expected), orientation
        part = imagetree.decode(tmp_path, path.name, partial(middle, size=4))  # as of images that stay on disk
        assert np.array_equal(part, np.array(middle(Image.fromarray(np.ascontiguousarray(expected)), 4)))
    for damaged in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0", b"Exif\0\0XX" + bytes(9)):
        Image.fromarray(RGB).save(path, exif=damaged)
        assert np.array_equal(imagetree.decode(tmp_path, path.name), plain)


# ------------------------------------------------------------------------------------------------- cache


def caches(tree: Path) -> list[Path]:
    return sorted((tree.parent / ".cache" / "satlib").glob("*.safetensors"))


def refuse_to_decode(*args, **kwargs):
    raise AssertionError("decoded again")


def same(a: data.Splits, b: data.Splits) -> bool:
    return all(
        torch.equal(x.images, y.images)
        and torch.equal(x.labels, y.labels)
        and (x.fingerprint, x.classes, x.name, x.title, x.split) == (y.fingerprint, y.classes, y.name, y.title, y.split)
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def test_the_second_load_comes_from_the_cache(tree, monkeypatch):
    first = load(tree)
    assert len(caches(tree)) == 1
    monkeypatch.setattr(cifar10, "read_images", refuse_to_decode)
    second = load(tree)
    assert same(first, second)
    assert second.train.images.is_contiguous(memory_format=torch.channels_last)


def test_nothing_but_the_cache_is_written_below_the_root(tree, tmp_path):
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    load(tree)
    written = {p for p in tmp_path.rglob("*") if p.is_file()} - before
    assert all(p.parent == tree.parent / ".cache" / "satlib" for p in written)
    assert not [p for p in written if p.suffix == ".partial"]


@pytest.mark.parametrize("change", ["time", "content", "new file", "name"])
def test_changed_files_are_decoded_again_and_the_old_cache_goes(tree, change):
    old, [cache] = load(tree), caches(tree)
    path = tree / "train" / "cat" / "0000.png"
    if change == "time":
        os.utime(path, ns=(1, 1))
    elif change == "content":
        Image.new("RGB", (32, 32)).save(path)
    elif change == "new file":
        Image.new("RGB", (32, 32)).save(path.with_name("0010.png"))
    else:
        path.rename(path.with_name("a.png"))
    new = load(tree)
    assert caches(tree) != [cache] and len(caches(tree)) == 1
    if change == "time":
        assert same(old, new)
    if change == "new file":
        assert len(new.train) == len(old.train) + 1


@pytest.mark.parametrize("position", [0.0, 0.001, 0.3, 0.97])
def test_a_flipped_bit_in_the_cache_is_named_and_mended(tree, position):
    good, [cache] = load(tree), caches(tree)
    content = bytearray(cache.read_bytes())
    content[int(position * len(content))] ^= 64
    cache.write_bytes(content)
    with pytest.warns(UserWarning, match=f"damaged cache {cache}"):
        assert same(load(tree), good)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(load(tree), good)


@pytest.mark.parametrize("kept", [0, 5, 300, 100_000])
def test_a_truncated_cache_is_named_and_mended(tree, kept):
    good, [cache] = load(tree), caches(tree)
    cache.write_bytes(cache.read_bytes()[:kept])
    with pytest.warns(UserWarning, match=f"damaged cache {cache}"):
        assert same(load(tree), good)


def test_a_half_written_cache_is_never_used(tree, monkeypatch):
    """A process that is killed while it writes leaves a partial file; the next one writes over it."""
    good = load(tree)
    [cache] = caches(tree)
    partial = cache.with_name(".cifar10.partial")
    cache.rename(partial)
    partial.write_bytes(partial.read_bytes()[:5000])
    assert same(load(tree), good)
    assert caches(tree) == [cache] and not partial.exists()


def test_where_the_root_cannot_be_written_the_project_keeps_the_cache(tree, tmp_path, monkeypatch):
    (tree.parent / ".cache").write_text("a file in the folder's place, which even root cannot write into")
    good = load(tree)
    assert [p.suffix for p in (tmp_path / "home" / "data" / "cache").glob("cifar10*")] == [".safetensors"]
    monkeypatch.setattr(cifar10, "read_images", refuse_to_decode)
    assert same(load(tree), good)


def test_where_nothing_can_be_written_a_warning_says_so(tree, tmp_path):
    for folder in (tree.parent, tmp_path / "home"):
        folder.mkdir(exist_ok=True)
    (tree.parent / ".cache").write_text("")
    (tmp_path / "home" / "data").write_text("")
    with pytest.warns(UserWarning, match="decoded anew each time"):
        assert len(load(tree).test) == 20


def test_a_full_disk_costs_the_cache_only(tree, monkeypatch):
    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("satlib.data.cache.save_file", fail)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert len(load(tree).test) == 20
    assert not caches(tree) and not list(tree.parent.rglob("*.partial"))


# ------------------------------------------------------------------------------------- official batches


def python2_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A batch in the opcodes of Python 2, in which the official files are written: byte strings as `str`."""

    def string(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n(" + string(b"u1") + integer(0) + integer(1) + b"tR"
    dtype += b"(" + integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + integer(0) + b"t" + string(b"b") + b"tR"
    array += b"(" + integer(1) + b"(" + b"".join(map(integer, pixels.shape)) + b"t" + dtype + b"\x89"
    array += string(pixels.tobytes()) + b"tb"
    listed = b"](" + b"".join(map(integer, labels)) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + listed + b"u."


def place(path: Path, content: bytes) -> tuple[str, str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path.name, hashlib.md5(content).hexdigest()


@pytest.fixture
def batches(tmp_path, monkeypatch) -> Path:
    """A small copy of the official layout: two training batches of 50 images, one test batch of 20."""
    folder = tmp_path / "root" / BATCHES
    random = np.random.default_rng(0)
    listed = []
    for name, n in (("data_batch_1", 50), ("data_batch_2", 50), ("test_batch", 20)):
        pixels = random.integers(0, 256, (n, 3072), dtype=np.uint8)
        listed.append(place(folder / name, python2_batch(pixels, [i % 10 for i in range(n)])))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", listed[:2])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", listed[2:])
    return folder


def test_official_batches_are_read_exactly(batches):
    splits = data.load("cifar10", root=batches.parent, progress=False)
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [90, 10, 20]
    assert splits.test.title == "CIFAR-10" and splits.test.classes == CLASSES
    ours = {
        (image.numpy().tobytes(), int(label))
        for image, label in zip(splits.test.images, splits.test.labels, strict=True)
    }
    official = pickle.loads((batches / "test_batch").read_bytes(), encoding="bytes")
    assert ours == {(row.tobytes(), label) for row, label in zip(official[b"data"], official[b"labels"], strict=True)}


def test_official_batches_may_lie_in_the_folder_of_the_tree_and_come_first(batches):
    root = batches.parent
    write_tree(root, per_class=2)
    batches.rename(root / "cifar10" / BATCHES)
    assert data.load("cifar10", root=root, progress=False).test.title == "CIFAR-10"


def test_a_changed_batch_is_refused_by_its_checksum(batches):
    path = batches / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SatlibError, match=f"wrong file {path}: its MD5 is .* unpack the official"):
        data.load("cifar10", root=batches.parent)


def test_a_missing_batch_is_named(batches):
    (batches / "data_batch_1").unlink()
    with pytest.raises(SatlibError, match=f"cannot read {batches / 'data_batch_1'}"):
        data.load("cifar10", root=batches.parent)


@pytest.fixture
def binary(batches, monkeypatch) -> Path:
    """The same images in the official binary layout, beside the other one."""
    folder, sums = batches.parent / BINARY, {}
    for path in sorted(batches.iterdir()):
        batch = pickle.loads(path.read_bytes(), encoding="bytes")
        rows = np.concatenate([np.array(batch[b"labels"], np.uint8)[:, None], batch[b"data"]], 1)
        name, md5 = place(folder / f"{path.name}.bin", rows.tobytes())
        sums[name] = md5
    monkeypatch.setattr(cifar10, "BINARY_MD5", sums)
    return folder


def test_the_binary_version_holds_the_same_splits_and_comes_first(batches, binary, capsys, monkeypatch):
    root = binary.parent
    assert data.find("cifar10", root=root) == binary
    ours = data.load("cifar10", root=root, progress=False)
    hidden = binary.rename(root / "elsewhere")
    theirs = data.load("cifar10", root=root, progress=False)
    for one, other in zip(vars(ours).values(), vars(theirs).values(), strict=True):
        assert one.fingerprint == other.fingerprint and one.title == other.title == "CIFAR-10"
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    hidden.rename((root / "cifar10").mkdir() or root / "cifar10" / BINARY)
    monkeypatch.setenv("SATLIB_DATA", str(root))
    shutil.rmtree(batches)
    batches.mkdir()  # what is empty hides nothing
    assert cli.main(["data", "status", "cifar10"]) == 0
    assert capsys.readouterr().out.endswith(f"cifar10: {root / 'cifar10' / BINARY}\n")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda a, b: b.write_bytes(b.read_bytes()[:-1]), r"wrong file .*data_batch_2\.bin: its MD5 is \w+, expected"),
        (lambda a, b: b.write_bytes(b"\x00" + b.read_bytes()[1:-1] + b"\x07"), r"wrong file .*data_batch_2\.bin: its"),
        (lambda a, b: b.unlink(), r"cannot read .*data_batch_2\.bin \(No such file"),
        (lambda a, b: a.replace(b), r"cannot read .*data_batch_1\.bin \(No such file"),
        (lambda a, b: b.write_bytes(a.read_bytes()), r"\(which is data_batch_1\.bin under another name\)"),
    ],
    ids=["truncated", "damaged", "missing", "renamed", "copied"],
)
def test_a_wrong_binary_batch_is_one_line_with_its_mend(binary, harm, message):
    harm(binary / "data_batch_1.bin", binary / "data_batch_2.bin")
    with pytest.raises(SatlibError, match=message) as caught:
        data.load("cifar10", root=binary.parent)
    assert str(caught.value).endswith("; unpack the official cifar-10-binary.tar.gz again")
    assert "\n" not in str(caught.value)


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_batch_that_would_run_code_does_not(batches, tmp_path):
    marker = tmp_path / "it ran"
    path = batches / "test_batch"
    path.write_bytes(pickle.dumps({b"data": Payload(marker), b"labels": []}))
    with pytest.raises(SatlibError, match=f"wrong file {path}: its MD5 is"):
        data.load("cifar10", root=batches.parent)
    assert not marker.exists()


# -------------------------------------------------------------------------- nothing there, and downloads


def test_an_empty_root_says_what_was_looked_for_and_the_three_mends(tmp_path):
    with pytest.raises(SatlibError) as caught:
        data.load("cifar10", root=tmp_path)
    message = str(caught.value)
    for part in (str(tmp_path), BATCHES, "{train,test}", "SATLIB_DATA", "place it", "data download cifar10"):
        assert part in message
    assert "\n" not in message


def test_of_a_data_set_that_is_not_found_what_is_there_is_named(tmp_path):
    def message(name: str) -> str:
        with pytest.raises(SatlibError) as caught:
            data.load(name, root=tmp_path / "root")
        return str(caught.value)

    root = tmp_path / "root"
    assert f"; no folder {root}, {tmp_path} is empty; make it; set SATLIB_DATA" in message("imagenet200")
    (root / "tiny-imagenet-200" / "val").mkdir(parents=True)
    (root / "imagenet200").symlink_to("gone")
    expected = f"; cannot read {root}/imagenet200: a link to nothing; remove or restore it; no folder "
    assert f"{expected}{root}/tiny-imagenet-200/train; unpack the data set again; set" in message("imagenet200:20")
    (root / "cifar10").mkdir()
    (root / "cifar10" / "train").touch()
    assert f"{root}/cifar10/train is a file, expected a folder; unpack" in message("cifar10")
    (root / "camvid").mkdir()
    assert f"; no folder {root}/camvid/train, {root}/camvid is empty; unpack the data set again" in message("camvid")
    (root / "camvid").rmdir()
    (root / "camvid").symlink_to("camvid")
    assert f"cannot read {root}/camvid: a link that leads to itself" in message("camvid")


def test_the_data_root_is_the_default(tree, monkeypatch):
    monkeypatch.setenv("SATLIB_DATA", str(tree.parent))
    assert same(data.load("cifar10", progress=False), load(tree))


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar10-images.tar.xz", BATCHES, "cifar10"])
def test_a_file_where_a_folder_should_be_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SatlibError, match=f"{tmp_path / name} is a file, expected a folder; .* unpack it"):
        data.load("cifar10", root=tmp_path)


def test_an_archive_inside_the_folder_is_named(tmp_path):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "cifar-10-python.tar.gz").write_bytes(b"x")
    with pytest.raises(SatlibError, match=r"cifar10/cifar-10-python\.tar\.gz is a file"):
        data.load("cifar10", root=tmp_path)


def test_download_hands_over_to_torchvision(tmp_path, monkeypatch):
    asked = []

    class Official(torchvision.datasets.CIFAR10):
        def __init__(self, root, download):
            asked.append((root, download))

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Official)
    data.download("cifar10", root=tmp_path / "new")
    assert asked == [(str(tmp_path / "new"), True)] and (tmp_path / "new").is_dir()


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("File not found or corrupted.")])
def test_a_failed_download_is_one_clear_line(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    with pytest.raises(SatlibError, match=f"could not download CIFAR-10 to {tmp_path}: {error}; check the network"):
        data.download("cifar10", root=tmp_path)


def test_unknown_names():
    with pytest.raises(
        SatlibError,
        match="unknown data set 'mnist'; expected one of cifar10, imagenet200, imagenet200-224, camvid, cityscapes",
    ):
        data.load("mnist")
    with pytest.raises(SatlibError, match="cannot download 'shapes32'; expected one of cifar10"):
        data.download("shapes32")


# --------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("statement", ["import satlib.data", "from satlib.data.imageset import IGNORE"])
def test_an_import_of_the_package_or_of_a_constant_brings_no_loader(statement):
    script = f"import sys\n{statement}\nprint(*(name for name in sys.modules if name.startswith('satlib.data.')))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) <= {"satlib.data.datasets", "satlib.data.imageset"}


def test_what_the_table_says_of_the_embedded_sets_is_so():
    assert [name for name in data.DATASETS if data.is_embedded(name)] == [
        "shapes32",
        "shapes64",
        "streets128x64",
        "streets256x128",
    ]
    for name in filter(data.is_embedded, data.DATASETS):
        row, train = data.DATASETS[name], data.load(name).train
        assert train.images.shape == (row.training_images, *row.shape) and len(train.classes) == row.classes
        assert (train.name, train.title, train.dense) == (row.name, row.title, row.segmentation)
        assert data.find(name) is None and data.dummy_data(name) is None
    assert not data.is_embedded("cifar10") and not data.is_embedded("mnist")


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("cifar10", 45_000),
        ("imagenet200", 90_000),
        ("imagenet200:20", 9_000),
        ("imagenet200:7", 3_150),
        ("imagenet200:classes.txt", 90_000),
        ("imagenet200-224", 234_000),
        ("imagenet200-224:33", 38_610),
        ("camvid:240x180", 367),
        ("cityscapes", 2_975),
        ("shapes64", 8_000),
        ("streets128x64", 400),
        ("mnist", 45_000),
    ],
)
def test_training_images_are_known_without_reading_any(name, images):
    assert data.training_images(name) == images
    assert data.training_images("mnist", unknown=400) == 400


def test_a_data_set_is_found_whatever_option_follows_its_name(tmp_path):
    assert data.find("camvid:240x180", root=tmp_path) is None and data.find("mnist", root=tmp_path) is None
    (tmp_path / "camvid").mkdir()
    assert data.find("camvid", root=tmp_path) is None  # nothing is in it
    (tmp_path / "camvid" / "train").mkdir()
    (tmp_path / "imagenet200" / "train").mkdir(parents=True)
    assert data.find("camvid:240x180", root=tmp_path) == data.find("camvid", root=tmp_path) == tmp_path / "camvid"
    assert data.find("imagenet200:20", root=tmp_path) == tmp_path / "imagenet200"
    assert data.find("imagenet200-224", root=tmp_path) is data.find("cifar10", root=tmp_path) is None


def test_an_archive_of_any_data_set_is_named(tmp_path):
    (tmp_path / "CamVid.tar.xz").write_bytes(b"x")
    with pytest.raises(
        SatlibError, match=r"CamVid\.tar\.xz is a file, expected a folder; .* unpack it so that .*camvid/\{"
    ):
        data.load("camvid:32x24", root=tmp_path)
    with pytest.raises(SatlibError, match=r"no Cityscapes in .*: looked for cityscapes/"):
        data.load("cityscapes", root=tmp_path)


def test_dummy_data_follows_the_options_and_their_errors():
    assert data.dummy_data("camvid").train.images.shape[1:] == (3, 360, 480)
    assert len(data.dummy_data("imagenet200:20").test.classes) == 20
    with pytest.raises(SatlibError, match="camvid:small: expected a width and a height from 16 to 4096"):
        data.dummy_data("camvid:small")
