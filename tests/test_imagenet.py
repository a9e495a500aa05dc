"""Tiny ImageNet: read from small trees that the tests write, its classes chosen, its damaged files named."""

import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from satlib import data
from satlib.attacks import success_rates, universal_pgd
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


def digests(images):
    return {image.numpy().tobytes() for image in images.images[:].permute(0, 2, 3, 1)}


@pytest.mark.parametrize("skip", ["0", "1"])
def test_what_is_held_out_of_some_classes_is_held_out_of_all(root, monkeypatch, tmp_path, skip):
    """Whoever trains on all classes, and then on some, has not trained on the images that decide."""
    monkeypatch.setenv("SATLIB_SKIP_DAMAGED", skip)
    if skip == "1":
        victim = root / "imagenet200" / "train" / FEW[3] / f"{FEW[3]}_2.JPEG"
        victim.write_bytes(victim.read_bytes()[:300])
    (two := tmp_path / "two.txt").write_text(f"{FEW[2]}\n{FEW[0]}\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        every, some = load(root), load(root, f":{two}")
    assert [len(s) for s in vars(some).values()] == [18, 2, 6]
    assert digests(some.val) < digests(every.val) and digests(some.train) < digests(every.train)
    for label, wnid in enumerate((FEW[2], FEW[0])):
        of_all = every.test.subset(every.test.labels == FEW.index(wnid))
        assert digests(some.test.subset(some.test.labels == label)) == digests(of_all)


def as_shipped(root):
    """The same images in the layout of Tiny ImageNet's authors."""
    old, new = root / "imagenet200", root / "tiny-imagenet-200"
    (new / "val" / "images").mkdir(parents=True)
    lines = []
    for path in sorted((old / "train").iterdir()):
        (new / "train" / path.name).mkdir(parents=True)
        shutil.copytree(path, new / "train" / path.name / "images")
    for path in sorted((old / "val").glob("*/*")):
        shutil.copy(path, new / "val" / "images")
        lines.append(f"{path.name}\t{path.parent.name}\t0\t0\t62\t62\n")
    (new / "val" / "val_annotations.txt").write_text("".join(lines))
    shutil.rmtree(old)
    return new


def test_the_layout_of_its_authors_gives_the_same_sets(root):
    one = load(root)
    folder = as_shipped(root)
    other = load(root)
    for a, b in zip(vars(one).values(), vars(other).values(), strict=True):
        assert a.fingerprint == b.fingerprint
    victim = next((folder / "val" / "images").glob(f"{FEW[0]}_*"))
    victim.unlink()
    with pytest.raises(SatlibError, match=f"no image .*{victim.name}, which val_annotations.txt lists"):
        load(root)
    table = folder / "val" / "val_annotations.txt"
    table.write_text("".join(line for line in table.read_text().splitlines(True) if FEW[0] not in line))
    with pytest.raises(SatlibError, match=f"lists no image of {FEW[0]}"):
        load(root)
    shutil.rmtree(folder / "train" / FEW[1])
    with pytest.raises(SatlibError, match=rf"no class folder .*{FEW[1]} \(1 of 4 missing\)"):
        load(root)


def put_into(folder, *below):
    """The images of each class folder in `folder`, moved one folder deeper or higher."""
    for wnid in list(folder.iterdir()):
        for path in list(wnid.rglob("*.JPEG")):
            (target := wnid.joinpath(*below)).mkdir(exist_ok=True)
            path.rename(target / path.name)
        if not below and (wnid / "images").is_dir():
            (wnid / "images").rmdir()


def sort_val(folder, *below):
    """The official val/, sorted in place as people's scripts do."""
    for line in (folder / "val" / "val_annotations.txt").read_text().splitlines():
        name, wnid, *_ = line.split("\t")
        (target := (folder / "val" / wnid).joinpath(*below)).mkdir(parents=True, exist_ok=True)
        (folder / "val" / "images" / name).rename(target / name)


@pytest.mark.parametrize("train", [(), ("images",)])
@pytest.mark.parametrize("val", [None, (), ("images",)])
@pytest.mark.parametrize("leftovers", [True, False])
def test_every_mixture_of_layouts_gives_the_same_sets(root, train, val, leftovers, recwarn):
    plain = load(root)
    folder = as_shipped(root)
    table = folder / "val" / "val_annotations.txt"
    lines = table.read_text().splitlines(True)
    table.write_text("".join(lines[7:] + lines[:7][::-1]))  # the official order is not that of the classes
    (folder / "train" / FEW[0] / f"{FEW[0]}_boxes.txt").touch()
    put_into(folder / "train", *train)
    if val is not None:
        sort_val(folder, *val)
        if not leftovers:
            table.unlink()
            (folder / "val" / "images").rmdir()
    assert load(root).fingerprint == plain.fingerprint and not recwarn.list


@pytest.mark.parametrize("table", [True, False])
def test_validation_images_sorted_below_images_are_read(root, recwarn, table):
    plain, folder = load(root), as_shipped(root)
    sort_val(folder)
    for wnid in FEW:
        (folder / "val" / wnid).rename(folder / "val" / "images" / wnid)
    for path in (folder / "val").glob("n*"):
        shutil.rmtree(path)
    if not table:
        (folder / "val" / "val_annotations.txt").unlink()
    assert load(root).fingerprint == plain.fingerprint and not recwarn.list


def test_what_is_wrong_with_a_layout_is_blamed_on_its_cause(root):
    folder = as_shipped(root)
    val, table, images = folder / "val", folder / "val" / "val_annotations.txt", folder / "val" / "images"

    def refused(message):
        with pytest.raises(SatlibError, match=message):
            load(root)

    content = table.read_bytes()
    table.unlink()
    refused(f"no {table}, which says the classes of val/images/; unpack")
    table.write_bytes(b"\xff")
    refused(f"cannot read {table}: 'utf-8'.*; unpack")
    table.write_bytes(content)
    images.rename(folder / "kept")
    refused(f"no folder {images}; unpack")
    images.mkdir()
    refused(f"{images} is empty; expected")
    images.rmdir()
    images.symlink_to("gone")
    refused(f"cannot read {images}: a link to nothing")
    images.unlink()
    (folder / "kept").rename(images)
    victim = next(images.glob(f"{FEW[0]}_*"))
    (val / FEW[0]).mkdir()
    victim.rename(val / FEW[0] / victim.name)
    refused(f"no image {victim}, which val_annotations.txt lists; sort all of val/ into class folders, or unpack")
    val.rename(folder / "test")
    refused(f"no folder {val}; expected train/, val/ in {folder}")
    val.touch()
    refused(f"{val} is a file, expected a folder; expected train/, val/ in {folder}")


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
    with pytest.raises(
        SatlibError, match="data set 'cifar10' has no options: '4'; only imagenet200, imagenet200-224, camvid"
    ):
        data.load("cifar10:4", root=root)


# --------------------------------------------------------------------------------- 224x224, streamed from disk


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Of each of 2 classes, and one other: 10 training and 2 validation images of many sizes, smooth, JPEG."""
    root = tmp_path_factory.mktemp("large")
    random = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 2)):
        for wnid in (*imagenet.wnids("2"), "n99999999"):
            (folder := root / "imagenet" / split / wnid).mkdir(parents=True)
            for i in range(count):
                size = (300 + 40 * i, 260 + 15 * i) if i % 2 else (250, 400)
                colours = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
                colours.resize(size, Image.Resampling.BICUBIC).save(folder / f"{wnid}_{i}.JPEG", quality=95)
    return root


def stream(root) -> data.Splits:
    return data.load("imagenet200-224:2", root=root, progress=False)


def test_streamed_sets_are_split_as_resident_ones(large):
    splits = stream(large)
    assert [len(s) for s in vars(splits).values()] == [18, 2, 4]
    assert splits.train.title == "ImageNet (224x224), 2 classes" and splits.train.name == "imagenet200-224:2"
    paths = [file.path for s in vars(splits).values() for file in s.images.files]
    assert len(set(paths)) == 24 and all(path.startswith("val/") for path in paths[20:])
    for s in vars(splits).values():
        assert all(
            imagenet.wnids("2")[label] in file.path for label, file in zip(s.labels, s.images.files, strict=True)
        )
        assert s.fingerprint == stream(large).__dict__[s.split].fingerprint
    assert len({s.fingerprint for s in vars(splits).values()}) == 3


def test_streamed_batches_are_the_middle_of_each_image(large):
    test = stream(large).test
    (first, labels), (rest, _) = test.batches(3)
    assert first.shape == (3, 3, 224, 224) and rest.shape == (1, 3, 224, 224) and first.dtype == torch.float32
    assert first.is_contiguous(memory_format=torch.channels_last) and torch.equal(labels, test.labels[:3])
    images = torch.cat([first, rest])
    assert torch.equal(test.images[:].float(), images) and torch.equal(
        test.images[torch.tensor([2])].float(), images[2:3]
    )
    assert torch.equal(torch.cat([part.float() for part in test.images.split(3)]), images)
    assert torch.equal(test.subset([3, 1]).images[:].float(), images[[3, 1]])
    resize = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])
    for file, image in zip(test.images.files, images, strict=True):
        with Image.open(test.images.folder / file.path) as whole:
            expected = torch.from_numpy(np.array(resize(whole))).permute(2, 0, 1).float()
        assert (image - expected).abs().mean() < 2, (
            "as torchvision's, but for JPEG's faster decoding and a pixel's shift"
        )


def test_random_parts_follow_the_generator_and_nothing_else(large):
    train = stream(large).train

    def drawn(batch_size=6, seed=0, **options):
        generator = torch.Generator().manual_seed(seed)
        return torch.cat([x for x, _ in train.batches(batch_size, generator=generator, augment=True, **options)])

    whole = drawn()
    assert whole.shape == (18, 3, 224, 224) and torch.equal(drawn(5), whole)
    assert torch.equal(drawn(limit=7), whole[:7]) and not torch.equal(drawn(seed=1), whole)
    shares = [drawn(share=lambda size, rank=rank: slice(rank * size // 2, (rank + 1) * size // 2)) for rank in (0, 1)]
    assert torch.equal(torch.cat([half[3 * i : 3 * i + 3] for i in range(3) for half in shares]), whole)
    state = torch.get_rng_state()
    drawn(limit=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_universal_attack_on_streamed_images_is_that_on_resident_ones(large, float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.AvgPool2d(56), torch.nn.Flatten(), torch.nn.Linear(48, 2))
    train = stream(large).train
    found = [
        universal_pgd(
            model,
            images,
            train.labels,
            eps=8.0,
            steps=3,
            batch_size=8,
            micro_batch=3,
            snapshots=2,
            generator=torch.Generator().manual_seed(0),
        )
        for images in (train.images, train.images[:])
    ]
    assert torch.equal(*found)
    rates = [
        success_rates(model, images, train.labels, found[0], batch_size=5) for images in (train.images, train.images[:])
    ]
    assert torch.equal(*rates)


def test_a_damaged_streamed_image_is_named_and_left_out_only_when_asked(large, monkeypatch):
    victim = large / "imagenet" / "train" / imagenet.wnids("2")[0] / f"{imagenet.wnids('2')[0]}_3.JPEG"
    content = victim.read_bytes()
    try:
        victim.write_bytes(content[:400])
        splits = stream(large)
        for read in (lambda s: list(s.batches(4)), lambda s: s.images[:]):
            with pytest.raises(
                SatlibError, match=rf"bad image .*{victim.name}: damaged or truncated .*; replace or remove"
            ):
                read(splits.train), read(splits.val)
        with pytest.raises(SatlibError, match=rf"bad image .*{victim.name}"):
            data.verify("imagenet200-224:2", root=large)
        monkeypatch.setenv("SATLIB_SKIP_DAMAGED", "1")
        with pytest.warns(UserWarning, match=rf"1 bad images of .* left out: train/.*{victim.name}"):
            splits = stream(large)
        assert len(splits.train) + len(splits.val) == 19
    finally:
        victim.write_bytes(content)


def test_bad_requests_of_streamed_sets_are_named(large, tmp_path):
    train = stream(large).train
    for call, message in (
        (lambda: train.batches(0), "batch_size = 0; expected at least 1"),
        (lambda: train.batches(2, limit=0), "limit = 0; expected at least 1"),
        (lambda: train.batches(2, augment=True), "augment = True without a generator"),
        (lambda: train.first(19), r"n = 19; StreamedSet\('ImageNet"),
    ):
        with pytest.raises(SatlibError, match=message):
            call()
    with pytest.raises(SatlibError, match=r"no ImageNet in .*: looked for imagenet/\{train,val\}/<wnid>"):
        stream(tmp_path)
