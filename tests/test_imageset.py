"""ImageSet: batches, augmentation, statistics, fingerprint and the errors of bad arguments."""

import numpy as np
import pytest
import torch

from satlib.data.imageset import ImageSet
from satlib.errors import SatlibError


def image_set(n: int = 20, channels: int = 3, height: int = 9, width: int = 7, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, channels, height, width), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(n) % 4, ("a", "b", "c", "d"), "toy", "Toy", "train")


def numbered(n: int) -> ImageSet:
    """Image i is all i, so that a batch tells which images it holds."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 8, 8)
    return ImageSet(images, torch.zeros(n, dtype=torch.int64), ("only",), "toy", "Toy", "train")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def collected(batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_batches_in_order_are_the_images_themselves():
    toy = image_set(n=10)
    batches = list(toy.batches(4))
    assert [len(images) for images, _ in batches] == [4, 4, 2]
    for images, labels in batches:
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.device == labels.device == toy.device
    images, labels = collected(batches)
    assert torch.equal(images, toy.images.float()) and torch.equal(labels, toy.labels)


def test_a_shuffled_pass_holds_every_image_once_and_follows_the_seed():
    toy = numbered(50)
    order = collected(toy.batches(8, generator=seeded(1)))[0][:, 0, 0, 0]
    assert sorted(order.tolist()) == list(range(50))
    assert order.tolist() != list(range(50))
    assert torch.equal(order, collected(toy.batches(8, generator=seeded(1)))[0][:, 0, 0, 0])
    assert not torch.equal(order, collected(toy.batches(8, generator=seeded(2)))[0][:, 0, 0, 0])


def test_two_passes_with_one_generator_differ():
    generator = seeded(0)
    toy = numbered(50)
    first, second = (collected(toy.batches(50, generator=generator))[0] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("augment", [False, True])
def test_limit_and_batch_size_do_not_change_what_is_drawn(augment):
    toy = image_set(n=30)
    whole = collected(toy.batches(7, generator=seeded(3), augment=augment))
    limited = collected(toy.batches(4, generator=seeded(3), augment=augment, limit=13))
    assert len(limited[0]) == 13
    assert torch.equal(limited[0], whole[0][:13]) and torch.equal(limited[1], whole[1][:13])
    assert len(collected(toy.batches(4, limit=99))[0]) == 30


def slow_crop_flip(image: np.ndarray, down: int, right: int, flip: bool) -> np.ndarray:
    """Reference for one image (C, H, W): pad, crop, flip, each as one would do it by hand."""
    _, height, width = image.shape
    p = min(height, width) // 8
    padded = np.pad(image, ((0, 0), (p, p), (p, p)), mode="reflect")
    crop = padded[:, p + down : p + down + height, p + right : p + right + width]
    return crop[:, :, ::-1] if flip else crop


@pytest.mark.parametrize("channels", [1, 3])
def test_every_augmented_image_is_a_flipped_crop_of_its_own_image(channels):
    toy = image_set(n=80, channels=channels, height=26, width=24)
    order = torch.randperm(len(toy), generator=seeded(5))
    images, labels = collected(toy.batches(64, generator=seeded(5), augment=True))
    assert torch.equal(labels, toy.labels[order])
    moves = [(d, r, f) for d in range(-3, 4) for r in range(-3, 4) for f in (False, True)]
    seen = set()
    for image, index in zip(images.numpy(), order.tolist(), strict=True):
        source = toy.images[index].numpy()
        made_by = [move for move in moves if np.array_equal(slow_crop_flip(source, *move), image)]
        assert len(made_by) == 1, f"image {index} is no crop of its source"
        seen.update(made_by)
    assert {d for d, _, _ in seen} == {r for _, r, _ in seen} == set(range(-3, 4))
    assert {f for _, _, f in seen} == {False, True}


def test_augmentation_keeps_range_layout_and_seed():
    toy = image_set()
    (images, _), *_ = toy.batches(20, generator=seeded(0), augment=True)
    (again, _), *_ = toy.batches(20, generator=seeded(0), augment=True)
    assert torch.equal(images, again)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.min() >= 0 and images.max() <= 255 and torch.equal(images, images.round())


def test_batches_leave_the_images_untouched():
    toy = image_set()
    before = toy.images.clone()
    for images, _ in toy.batches(5, generator=seeded(0), augment=True):
        images.zero_()
    for images, _ in toy.batches(5):
        images.zero_()
    assert torch.equal(toy.images, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0; expected at least 1"),
        ({"batch_size": 4, "limit": 0}, "limit = 0; expected at least 1"),
        ({"batch_size": 4, "augment": True}, "augment = True without a generator"),
    ],
)
def test_bad_batch_arguments_raise_at_the_call(arguments, message):
    with pytest.raises(SatlibError, match=message):
        image_set().batches(**arguments)


def test_tiny_images_are_flipped_but_not_moved():
    toy = image_set(n=20, height=4, width=9)
    order = torch.randperm(20, generator=seeded(0))
    for image, index in zip(collected(toy.batches(2, augment=True, generator=seeded(0)))[0], order, strict=True):
        assert torch.equal(image, toy.images[index]) or torch.equal(image, toy.images[index].flip(-1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(20, 3, 9, 7)}, "expected torch.uint8"),
        ({"images": torch.zeros(0, 3, 9, 7, dtype=torch.uint8)}, "the set is empty"),
        ({"labels": torch.zeros(19, dtype=torch.int64)}, r"expected torch.int64 \(20,\)"),
        ({"labels": torch.zeros(20, dtype=torch.int32)}, "labels are torch.int32"),
        ({"classes": ("a", "b", "c")}, r"labels range over 0\.\.3; expected 0\.\.2"),
        ({"labels": torch.arange(20) % 4 - 1}, r"labels range over -1\.\.2"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    good = image_set()
    parts = {"images": good.images, "labels": good.labels, "classes": good.classes}
    with pytest.raises(SatlibError, match=message):
        ImageSet(**{**parts, **change}, name="toy", title="Toy", split="train")


def test_subset_and_first():
    toy = image_set()
    assert torch.equal(toy.subset([3, 1, 3]).images, toy.images[[3, 1, 3]])
    assert torch.equal(toy.subset(slice(2, 9)).labels, toy.labels[2:9])
    assert torch.equal(toy.subset(toy.labels == 2).images, toy.images[toy.labels == 2])
    assert toy.first(5).fingerprint == toy.subset(slice(5)).fingerprint == toy.subset(range(5)).fingerprint
    assert toy.first(5).classes == toy.classes and toy.first(5).title == toy.title
    for bad in (0, 21):
        with pytest.raises(SatlibError, match=f"n = {bad}; .* can give 1..20 images"):
            toy.first(bad)
    with pytest.raises(SatlibError, match=r"indices reach outside .* expected 0\.\.19"):
        toy.subset([20])
    with pytest.raises(SatlibError, match="expected one dimension of int64 or bool"):
        toy.subset([0.5])
    with pytest.raises(SatlibError, match="the set is empty"):
        toy.subset(slice(0))


def test_mean_and_std_are_those_of_the_pixels():
    toy = image_set(n=40)
    pixels = toy.images.double()
    assert toy.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-9)
    assert toy.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-9)
    assert toy.subset(torch.randperm(40)).mean == toy.mean


def test_fingerprint_covers_pixels_labels_classes_and_shape_but_not_memory_order():
    toy = image_set()
    parts = {"name": "toy", "title": "Toy", "split": "train"}
    contiguous = ImageSet(toy.images.contiguous(), toy.labels, toy.classes, "other", "Other", "test")
    assert contiguous.fingerprint == toy.fingerprint
    images, labels = toy.images.clone(), toy.labels.clone()
    images[7, 1, 2, 3] ^= 1
    labels[4] = 3
    reshaped = toy.images.permute(0, 1, 3, 2)
    changed = [
        ImageSet(images, toy.labels, toy.classes, **parts),
        ImageSet(toy.images, labels, toy.classes, **parts),
        ImageSet(toy.images, toy.labels, ("a", "b", "c", "e"), **parts),
        ImageSet(reshaped, toy.labels, toy.classes, **parts),
        toy.first(19),
    ]
    assert len({toy.fingerprint, *(other.fingerprint for other in changed)}) == 6


def test_to_keeps_everything():
    toy = image_set()
    known = toy.fingerprint, toy.mean
    moved = toy.to("cpu")
    assert (moved.fingerprint, moved.mean) == known
    assert torch.equal(moved.images, toy.images) and moved.split == toy.split


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_are_the_same_on_the_gpu():
    toy = image_set(n=30)
    on_gpu = toy.to("cuda")
    assert on_gpu.mean == toy.mean and on_gpu.subset(slice(3, 9)).fingerprint == toy.subset(slice(3, 9)).fingerprint
    for augment in (False, True):
        ours = collected(toy.batches(7, generator=seeded(3), augment=augment))
        theirs = collected(on_gpu.batches(7, generator=seeded(3), augment=augment))
        assert theirs[0].device.type == "cuda" and torch.equal(ours[0], theirs[0].cpu())
        assert torch.equal(ours[1], theirs[1].cpu())
    with pytest.raises(SatlibError, match="expected a CPU generator"):
        on_gpu.batches(7, generator=torch.Generator("cuda"))
