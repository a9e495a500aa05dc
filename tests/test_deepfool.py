"""DeepFool: exact on linear models, the universal loop as published, batched, and beside ART's."""

import math

import pytest
import torch
from PIL import Image

from satlib.attacks import success_rates
from satlib.data.imagetree import ImageFile
from satlib.data.streamed import StreamedImages
from satlib.deepfool import deepfool, universal_deepfool
from satlib.errors import SatlibError
from satlib.risks import expected_risk, heap_risk

pytestmark = pytest.mark.usefixtures("float32")
SHAPE = (3, 4, 4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def four_classes(linear):
    """Logits that differ little from class to class on greyish images, so that no step leaves 0..255."""
    weight = torch.randn(4, math.prod(SHAPE), generator=seeded(1)) / 50
    return linear(weight, bias=-128 * weight.sum(1))


@pytest.fixture(scope="module")
def greyish():
    return torch.empty(40, *SHAPE).uniform_(100, 155, generator=seeded(2))


def to_boundary(model, images):
    """For each image the nearest hyperplane between the predicted class and a rival: distance and unit normal."""
    with torch.no_grad():
        logits = model(images)
    label = logits.argmax(1)
    normals = model.weight[None] - model.weight[label][:, None]
    lengths = normals.norm(dim=2)
    distances = (logits.gather(1, label[:, None]) - logits) / lengths
    distances[torch.arange(len(images)), label] = math.inf
    nearest = distances.argmin(1)
    rows = torch.arange(len(images))
    return label, distances[rows, nearest], normals[rows, nearest] / lengths[rows, nearest][:, None]


def test_one_step_crosses_the_nearest_boundary_of_a_linear_model(four_classes, greyish):
    """Exactly: straight along the normal, as far as the boundary is, times 1 + overshoot."""
    label, distance, normal = to_boundary(four_classes, greyish)
    for overshoot in (0.02, 0.5):
        found, changed = deepfool(four_classes, greyish, steps=1, overshoot=overshoot)
        expected = (1 + overshoot) * (distance + 1e-4)[:, None] * normal
        torch.testing.assert_close(found.flatten(1).double(), expected, rtol=1e-4, atol=1e-4)
        assert changed.all()
        with torch.no_grad():
            assert (four_classes(greyish + found).argmax(1) != label).all()
    short, changed = deepfool(four_classes, greyish, steps=1, overshoot=0.02)
    with torch.no_grad():
        assert (four_classes(greyish + 0.97 * short).argmax(1) == label).all(), "it goes no further than it must"


def test_only_the_strongest_rivals_count(four_classes, greyish):
    """With two classes the step crosses to the second strongest, even where a third boundary is nearer."""
    with torch.no_grad():
        second = four_classes(greyish).topk(2, dim=1).indices[:, 1]
    found, changed = deepfool(four_classes, greyish, classes=2, overshoot=0.0)
    everyone, _ = deepfool(four_classes, greyish, classes=99, overshoot=0.0)
    lengths, least = (f.flatten(1).norm(dim=1) for f in (found, everyone))
    assert changed.all() and (lengths >= least - 1e-3).all() and (lengths > least + 1e-2).any()
    with torch.no_grad():
        logits = four_classes(greyish + found)
    gap = (logits.gather(1, second[:, None]) - logits.max(1, keepdim=True).values).abs()
    assert ((gap < 1e-3) | (lengths > least + 1e-2)[:, None]).all()


def test_a_network_is_fooled_by_less_than_any_fixed_sign_pattern(trained, tiny):
    x, y = tiny.test.images.float(), tiny.test.labels
    found, changed = deepfool(trained, x)
    with torch.no_grad():
        before, after = trained(x).argmax(1), trained(x + found).argmax(1)
    assert torch.equal(changed, before != after) and changed.float().mean() > 0.95
    length = found.flatten(1).norm(dim=1).median()
    random = torch.randn(x.shape, generator=seeded())
    random *= length / random.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    with torch.no_grad():
        assert (trained(x + random).argmax(1) != before).float().mean() < 0.2
    few, one = deepfool(trained, x, steps=1)
    assert one.sum() < changed.sum(), "the network is no linear model"
    assert len(y) == len(few)


def test_images_are_attacked_independently_and_from_beyond_0_and_255(trained, tiny):
    x = tiny.test.images[:12].float()
    x[0] -= 90  # as x + v may
    together, _ = deepfool(trained, x)
    for index in range(0, 12, 3):
        alone, _ = deepfool(trained, x[index : index + 1])
        torch.testing.assert_close(together[index], alone[0], rtol=1e-2, atol=0.05)


def test_deepfool_needs_about_as_much_as_art_s(trained, tiny):
    pytest.importorskip("art", reason="comes with the extra `test`")
    from art.attacks.evasion import DeepFool

    from satlib.bench import peers

    x, y = tiny.test.images[:40].float(), tiny.test.labels[:40]
    with peers.quiet():
        attack = DeepFool(peers.art_classifier(peers.plain(trained), x / 255, y), max_iter=10, epsilon=0.02, nb_grads=4)
        attack.set_params(verbose=False)
        theirs = torch.from_numpy(attack.generate((x / 255).numpy())) * 255 - x
    ours, changed = deepfool(trained, x)
    with torch.no_grad():
        fooled = trained(x + theirs).argmax(1) != trained(x).argmax(1)
    both = changed & fooled
    ratio = ours[both].flatten(1).norm(dim=1) / theirs[both].flatten(1).norm(dim=1)
    assert both.float().mean() > 0.9 and 0.8 < ratio.median() < 1.1


def as_published(model, images, eps, generator, passes=10, rate=0.8):
    """The loop of the 2017 paper, written out: one image after the other."""
    with torch.no_grad():
        clean = model(images).argmax(1)
    v = torch.zeros(1, *images.shape[1:])
    for _ in range(passes):
        for index in torch.randperm(len(images), generator=generator).tolist():
            x = images[index : index + 1]
            with torch.no_grad():
                if model((x + v).clamp(0, 255)).argmax(1) != clean[index]:
                    continue
            step, changed = deepfool(model, x + v)
            if changed:
                v = (v + step).clamp(-eps, eps)
        with torch.no_grad():
            if (model((images + v).clamp(0, 255)).argmax(1) != clean).float().mean() >= rate:
                break
    return v


def test_batch_size_1_is_the_published_loop(trained, tiny):
    x = tiny.val.images[:24]
    expected = as_published(trained, x.float(), 12.0, seeded(3), passes=2)
    found = universal_deepfool(trained, x, eps=12.0, passes=2, generator=seeded(3))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0.1)
    assert found.abs().max() == 12.0


class OneBackward(torch.autograd.Function):
    """The identity, with a backward pass that takes one gradient at a time."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float(bool(gradient.isfinite().all().item()))


@pytest.mark.parametrize("own_backward", [False, True])
def test_one_backward_pass_of_all_classes_finds_the_same(own_backward, trained, tiny, monkeypatch):
    """As on CUDA; where a network's own backward pass knows no batches of gradients, they are taken one by one."""

    class Net(torch.nn.Module):
        def forward(self, x):
            x = trained(x)
            return OneBackward.apply(x) if own_backward else x

    net, passes, gradients = Net(), [], torch.autograd.grad
    x = tiny.test.images[:16].float()
    expected = deepfool(net, x, steps=3)

    def counted(*args, **options):
        passes.append(options.get("is_grads_batched", False))
        return gradients(*args, **options)

    monkeypatch.setattr("satlib.deepfool._launches_cost", lambda v: True)
    monkeypatch.setattr(torch.autograd, "grad", counted)
    found = deepfool(net, x, steps=3)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert passes.count(True) == 3 and passes.count(False) == (3 * 4 if own_backward else 0)


def test_batched_fools_unseen_images_about_as_often(trained, tiny):
    """Crafted on validation images, scored on test images; random signs of the same size fool far fewer."""
    rates = {}
    for batch_size in (1, 8, 32):
        v = universal_deepfool(trained, tiny.val.images, eps=32.0, passes=4, batch_size=batch_size, generator=seeded())
        assert v.shape == (1, 3, 8, 8) and v.abs().max() <= 32.0
        with torch.no_grad():
            clean = trained(tiny.test.images.float()).argmax(1)
        rates[batch_size] = success_rates(trained, tiny.test.images, clean, v).item()
    noise = 32.0 * torch.randn(1, 3, 8, 8, generator=seeded()).sign()
    floor = success_rates(trained, tiny.test.images, clean, noise).item()
    assert min(rates.values()) > floor + 0.3
    assert max(rates.values()) - min(rates.values()) < 0.25


def test_it_stops_when_enough_are_fooled_and_says_how_far_it_is(trained, tiny):
    said = []
    options = {"eps": 30.0, "batch_size": 16, "progress": lambda text, done: said.append((text, done))}
    universal_deepfool(trained, tiny.val.images, fooling_rate=0.05, generator=seeded(), **options)
    assert len(said) == 1 and said[0][0].startswith("pass 1/10: ") and said[0][1] == 0.1
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    v = universal_deepfool(trained, tiny.val.images, fooling_rate=1.0, passes=2, generator=seeded(), **options)
    again = universal_deepfool(trained, tiny.val.images, fooling_rate=1.0, passes=2, generator=seeded(), **options)
    assert len(said) == 5 and torch.equal(v, again)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_no_label_is_used_and_eps_0_is_no_perturbation(trained, tiny):
    x = tiny.val.images[:16]
    by_labels = [
        universal_deepfool(trained, x, y, eps=9.0, passes=1, generator=seeded()) for y in (None, x[:, 0, 0, 0])
    ]
    assert torch.equal(*by_labels)
    assert not universal_deepfool(trained, x, eps=0.0, passes=1, generator=seeded()).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": -1.0}, r"eps=-1: expected numbers from 0 to 255"),
        ({"eps": math.nan}, r"eps=nan"),
        ({"fooling_rate": 0.0}, r"fooling_rate=0\.0: expected a share in \(0, 1\]"),
        ({"batch_size": 0}, r"batch_size=0: expected a whole number of at least 1"),
        ({"passes": 0}, r"passes=0: expected a whole number of at least 1"),
        ({"classes": 1}, r"classes=1: expected a whole number of at least 2"),
        ({"steps": 0}, r"steps=0: expected a whole number of at least 1"),
        ({"overshoot": -0.1}, r"overshoot=-0\.1: expected at least 0"),
    ],
)
def test_it_names_what_is_wrong(trained, tiny, changes, message):
    with pytest.raises(SatlibError, match=message):
        universal_deepfool(trained, tiny.val.images[:4], **({"eps": 8.0} | changes))
    if set(changes) <= {"classes", "steps", "overshoot"}:
        with pytest.raises(SatlibError, match=message):
            deepfool(trained, tiny.val.images[:4], **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x / 255, "images from .*: expected pixel units, 0 to 255; multiply them by 255"),
        (lambda x: x / 64 - 2, "expected pixel units, 0 to 255; normalise inside the model"),
        (lambda x: x * math.nan, "images from nan to nan: expected pixel units"),
        (lambda x: x + math.inf, "images from inf to inf: expected pixel units"),
    ],
    ids=["unit", "normalised", "nan", "infinite"],
)
def test_images_beyond_the_range_are_taken_but_not_in_other_units(trained, tiny, change, message):
    x = tiny.test.images[:4].float()
    with pytest.raises(SatlibError, match=message):
        deepfool(trained, change(x))
    deepfool(trained, x - 20, steps=1)


def test_streamed_images_are_taken(trained, tiny, tmp_path):
    for index, image in enumerate(tiny.test.images[:6]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.png")
    images = StreamedImages(tmp_path, [ImageFile(f"{index}.png", 0, 0, 0) for index in range(6)], 8)
    labels, options = tiny.test.labels[:6], {"eps": 8.0, "steps": 1}
    found = universal_deepfool(trained, images, passes=1, generator=seeded(), **options)
    assert torch.equal(found, universal_deepfool(trained, images[:], passes=1, generator=seeded(), **options))
    assert expected_risk(trained, images, labels) == expected_risk(trained, images[:], labels)
    options |= {"sharedness": 2, "step_size": 8.0, "start": None}
    heaps = [heap_risk(trained, x, labels, generator=seeded(), **options) for x in (images, images[:])]
    assert heaps[0] == heaps[1]
