"""The attacks: their invariants, their equations against slow references, and the errors they promise."""

import copy
import inspect
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from satlib.attacks import (
    IGNORE,
    annealed_step_sizes,
    attack_loss,
    attackable,
    broadcast,
    heap_means,
    heap_pgd,
    perturb,
    pgd_step,
    random_start,
    success_rates,
    universal_pgd,
)
from satlib.errors import SatlibError
from satlib.models import UnitInputs

pytestmark = pytest.mark.usefixtures("float32")
SHAPE = (3, 4, 4)
KAPPA = -math.log(0.2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_like(count: int, *, low: float = 60.0, high: float = 195.0, seed: int = 1) -> torch.Tensor:
    return torch.empty(count, *SHAPE).uniform_(low, high, generator=seeded(seed))


def uniform(count: int, eps: float, shape=SHAPE, seed: int = 2) -> torch.Tensor:
    return torch.empty(count, *shape).uniform_(-eps, eps, generator=seeded(seed))


@pytest.fixture(scope="module")
def small(tiny):
    """Twelve test images and their labels."""
    return tiny.test.images[:12].float(), tiny.test.labels[:12]


@pytest.fixture(scope="module")
def exact(trained):
    """The trained model in float64: equal computations in another order give equal signs."""
    return copy.deepcopy(trained).double()


@pytest.fixture(scope="module")
def direction():
    """w of a two-class linear model f(x) = (-w x, w x) / 2, without zeros."""
    w = torch.randn(math.prod(SHAPE), generator=seeded(3))
    return w + w.sign() * 0.05


@pytest.fixture(scope="module")
def two_class(linear, direction):
    """Logit difference w (x - 128): every image of uniform grey lies on the boundary."""
    weight = torch.stack([-direction, direction]) / 2
    return linear(weight / 100, bias=-128 * weight.sum(1) / 100)


def slow_pgd(model, images, labels, xi, *, eps, steps, step_size, sharedness=1, loss=F.cross_entropy, sign=1):
    """PGD on each heap by itself: sections 3.2 and 4.2 written down once more, without broadcasting."""
    found = []
    for heap, start in enumerate(range(0, len(images), sharedness)):
        x, y = images[start : start + sharedness], labels[start : start + sharedness]
        delta = xi[heap].clone()
        for _ in range(steps):
            delta.requires_grad_()
            value = loss(model(torch.stack([(image + delta).clamp(0, 255) for image in x])).float(), y)
            (gradient,) = torch.autograd.grad(value, delta)
            delta = torch.minimum(torch.maximum(delta.detach() + sign * step_size * gradient.sign(), -eps), eps)
        found.append(delta)
    return torch.stack(found)


# ---------------------------------------------------------------------------------- bounds, zero, larger eps


@settings(deadline=None, max_examples=25)
@given(
    eps=st.floats(0, 255) | st.floats(0, 1e-3),
    relative=st.floats(0, 3),
    steps=st.integers(1, 5),
    sharedness=st.integers(1, 5),
    outside=st.booleans(),
    keep_best=st.booleans(),
)
def test_bound_holds_exactly(two_class, eps, relative, steps, sharedness, outside, keep_best):
    images, labels = images_like(5, low=0, high=255), torch.tensor([0, 1, 1, 0, 1])
    xi = heap_pgd(
        two_class,
        images,
        labels,
        eps=eps,
        sharedness=sharedness,
        steps=steps,
        step_size=relative * eps,
        start=uniform(-(-5 // sharedness), 3 * eps + 1) if outside else None,
        keep_best=keep_best,
        generator=seeded(),
    )
    assert xi.dtype == torch.float32 and xi.shape == (-(-5 // sharedness), *SHAPE)
    assert xi.abs().max() <= torch.tensor(eps)
    seen = perturb(images, xi, sharedness)
    assert seen.min() >= 0 and seen.max() <= 255


def test_bound_of_each_heap_is_its_own_and_is_reached(trained, small):
    eps = torch.tensor([0.0, 0.1, 7.3, 40.0])
    xi = heap_pgd(trained, *small, eps=eps, sharedness=3, steps=3, step_size=40.0, generator=seeded())
    assert torch.equal(xi.abs().amax((1, 2, 3)), eps)


def test_bound_of_every_eps_of_the_universal_attack(trained, tiny):
    eps = [0.0, 0.1, 7.3, 40.0]
    start = uniform(4, 300.0, (3, 8, 8))
    for first in (None, start):
        xi = universal_pgd(trained, tiny.val.images, tiny.val.labels, eps=eps, steps=3, generator=seeded(), start=first)
        assert torch.equal(xi.abs().amax((1, 2, 3)), torch.tensor(eps))


def test_start_is_projected_and_used(trained, small):
    start = uniform(4, 20.0, (3, 8, 8))
    xi = heap_pgd(trained, *small, eps=8.0, sharedness=3, steps=1, step_size=0.0, start=start)
    assert torch.equal(xi, start.clamp(-8, 8))


def test_random_start_is_uniform_in_the_ball(trained, small):
    eps = torch.tensor([2.0, 8.0, 32.0])
    xi = heap_pgd(trained, *small, eps=eps, sharedness=4, steps=1, step_size=0.0, generator=seeded())
    relative = (xi / eps.view(-1, 1, 1, 1)).flatten(1)
    assert (relative.abs() <= 1).all()
    assert (relative.mean(1).abs() < 0.15).all()  # three standard errors of 192 draws are 0.125
    assert ((relative.std(1) - 3**-0.5).abs() < 0.1).all()


def test_perturbed_images_stay_images():
    images = torch.tensor([0.0, 5.0, 128.0, 250.0, 255.0]).view(5, 1, 1, 1).expand(5, *SHAPE)
    seen = perturb(images, torch.tensor([-10.0, 10.0]).view(2, 1, 1, 1).expand(2, *SHAPE), 3)
    assert seen[:, 0, 0, 0].tolist() == [0.0, 0.0, 118.0, 255.0, 255.0]


def test_eps_zero_changes_no_bit(trained, tiny, small):
    images, labels = small
    for xi, sharedness in (
        (heap_pgd(trained, images, labels, eps=0, sharedness=4, steps=2, step_size=3.0, generator=seeded()), 4),
        (universal_pgd(trained, tiny.val.images, tiny.val.labels, eps=0.0, steps=2, generator=seeded()), 12),
    ):
        assert torch.equal(perturb(images, xi, sharedness), images)
        assert torch.equal(trained(perturb(images, xi, sharedness)), trained(images))


def test_larger_eps_never_lowers_the_loss_found_from_a_warm_start(trained, small):
    """What holds for any model: the ball holds the smaller one, the best iterate is kept, and the start is one."""
    found, start = [], None
    for eps in (1.0, 2.0, 4.0, 8.0, 16.0):
        start = heap_pgd(
            trained,
            *small,
            eps=eps,
            sharedness=4,
            steps=2,
            step_size=eps,
            start=start,
            keep_best=True,
            generator=seeded(),
        )
        losses = attack_loss(trained(perturb(small[0], start, 4)), small[1])
        found.append(heap_means(losses, 4))
    assert all((larger >= smaller).all() for smaller, larger in pairwise(found))
    assert (found[-1] > found[0] + 1).all()


def test_larger_eps_never_lowers_the_success_on_a_linear_model(two_class):
    images, labels = images_like(40), torch.ones(40, dtype=torch.long)
    labels[two_class(images).argmax(1) == 0] = 0
    eps = [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    same = labels == 1  # of one class, so that one direction is best for all
    xi = universal_pgd(
        two_class, images[same], labels[same], eps=eps, steps=20, batch_size=4, generator=seeded(), snapshots=1
    )
    rates = success_rates(two_class, images[same], labels[same], xi).tolist()
    assert rates == sorted(rates) and rates[0] == 0 and rates[-1] == 1


# ------------------------------------------------------------------------------------------- linear models


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("label", [0, 1])
def test_linear_model_optimum_is_eps_times_sign_of_w(two_class, direction, label, targeted):
    images, labels = images_like(6), torch.full((6,), label)
    best = 8.0 * direction.sign().view(SHAPE) * (-1 if label == 1 else 1) * (-1 if targeted else 1)
    for sharedness in (1, 4, 6):
        xi = heap_pgd(
            two_class,
            images,
            labels,
            eps=8.0,
            sharedness=sharedness,
            steps=8,
            step_size=2.0,
            targeted=targeted,
            generator=seeded(),
        )
        assert torch.equal(xi, best.expand_as(xi))
    for steps in (1, 10):
        xi = universal_pgd(
            two_class,
            images,
            labels,
            eps=[8.0, 2.0],
            steps=steps,
            batch_size=2,
            targeted=targeted,
            generator=seeded(),
        )
        assert torch.equal(xi, torch.stack([best, best / 4]))


def test_shared_perturbation_of_mixed_labels_follows_the_summed_gradient(two_class, direction):
    """All images lie on the boundary: every sample weighs the same, and the majority of a heap decides."""
    images, labels = torch.full((6, *SHAPE), 128.0), torch.tensor([0, 0, 1, 1, 0, 1])
    xi = heap_pgd(
        two_class, images, labels, eps=4.0, sharedness=3, steps=2, step_size=4.0, start=torch.zeros(2, *SHAPE)
    )
    optimum = 4 * direction.sign().view(SHAPE)
    assert torch.equal(xi, torch.stack([optimum, -optimum]))
    losses = [heap_means(attack_loss(two_class(perturb(images, sign * xi, 3)), labels), 3) for sign in (1, -1)]
    assert (losses[0] > losses[1]).all()  # convex along w: one of the two ends is best, and this is it


def test_targeted_attack_lowers_the_loss_and_untargeted_raises_it(trained, small):
    images, _ = small
    target = torch.full((len(images),), 2)
    start = attack_loss(trained(images), target)
    zeros = torch.zeros_like(images)
    for targeted in (False, True):
        xi = heap_pgd(
            trained, images, target, eps=16.0, sharedness=1, steps=5, step_size=4.0, targeted=targeted, start=zeros
        )
        end = attack_loss(trained(perturb(images, xi, 1)), target)
        if targeted:
            assert (end < start).all() and success_rates(trained, images, target, xi[:1], targeted=True) < 1
            assert (trained(perturb(images, xi, 1)).argmax(1) == target).float().mean() > 0.9
        else:
            assert (end > start).all()
    xi = universal_pgd(trained, images, target, eps=40.0, steps=20, batch_size=6, targeted=True, generator=seeded())
    assert success_rates(trained, images, target, xi, targeted=True) > 0.9


# -------------------------------------------------------------------------------------- heaps and broadcasting


@given(st.integers(1, 12), st.data())
def test_broadcast_and_heap_means_equal_loops(count, data):
    sharedness = data.draw(st.integers(1, count))
    heaps = -(-count // sharedness)
    xi, values = uniform(heaps, 1.0), torch.randn(count, generator=seeded(4))
    assert torch.equal(broadcast(xi, sharedness, count), torch.stack([xi[i // sharedness] for i in range(count)]))
    slow = [values[start : start + sharedness].mean() for start in range(0, count, sharedness)]
    torch.testing.assert_close(heap_means(values, sharedness), torch.stack(slow))


def test_sharedness_one_attacks_each_image_alone(exact, small):
    images, labels = small
    start, options = uniform(12, 8.0, (3, 8, 8)), {"eps": 8.0, "steps": 4, "step_size": 3.0}
    together = heap_pgd(exact, images, labels, sharedness=1, start=start, **options)
    for i in range(12):
        one = slice(i, i + 1)
        alone = heap_pgd(exact, images[one], labels[one], sharedness=1, start=start[one], **options)
        assert torch.equal(together[one], alone)


@pytest.mark.parametrize("sharedness", [1, 4, 5, 12])
def test_heaps_equal_the_slow_reference(exact, small, sharedness):
    """5 leaves a last heap of 2; 12 is one perturbation for the whole mini-batch."""
    heaps = -(-12 // sharedness)
    start, eps = uniform(heaps, 8.0, (3, 8, 8)), torch.tensor(8.0)
    xi = heap_pgd(exact, *small, eps=8.0, sharedness=sharedness, steps=4, step_size=3.0, start=start)
    slow = slow_pgd(exact, *small, start, eps=eps, steps=4, step_size=3.0, sharedness=sharedness)
    assert torch.equal(xi, slow)


def test_sharedness_d_equals_the_universal_attack_on_these_images(exact, small):
    start = uniform(1, 12.0, (3, 8, 8))
    alphas = annealed_step_sizes(12.0, 6, beta=2.0, gamma=0.8)
    shared = heap_pgd(exact, *small, eps=12.0, sharedness=12, steps=6, step_size=alphas, start=start)
    universal = universal_pgd(
        exact,
        *small,
        eps=12.0,
        steps=6,
        batch_size=12,
        beta=2.0,
        gamma=0.8,
        start=start,
        snapshots=1,
        generator=seeded(),
    )
    torch.testing.assert_close(shared, universal, rtol=0, atol=1e-4)


def test_heaps_do_not_influence_each_other(exact, small):
    images, labels = small
    other_images, other_labels = images.clone(), labels.clone()
    other_images[:4], other_labels[:4] = images[:4].flip(0), (labels[:4] + 1) % 4
    start = uniform(3, 8.0, (3, 8, 8))
    options = {"eps": 8.0, "sharedness": 4, "steps": 4, "step_size": 3.0, "start": start}
    one, other = heap_pgd(exact, images, labels, **options), heap_pgd(exact, other_images, other_labels, **options)
    assert torch.equal(one[1:], other[1:])
    assert not torch.equal(one[0], other[0])


def test_every_eps_of_a_universal_attack_equals_its_own_run(exact, tiny):
    """At equal start and generator, the mini-batches are equal; without a start, drawing it would shift them."""
    eps, start = [4.0, 12.0, 12.0], uniform(3, 4.0, (3, 8, 8))
    options = {"steps": 6, "batch_size": 8, "score_images": 64}
    images, labels = tiny.val.images, tiny.val.labels
    together = universal_pgd(exact, images, labels, eps=eps, start=start, generator=seeded(), **options)
    for i, value in enumerate(eps):
        alone = universal_pgd(exact, images, labels, eps=value, start=start[i : i + 1], generator=seeded(), **options)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-4)
    assert not torch.equal(together[1], together[2])


def test_same_seed_same_result_other_seed_another(trained, tiny, small):
    def heap(seed):
        return heap_pgd(trained, *small, eps=8.0, sharedness=4, steps=2, step_size=2.0, generator=seeded(seed))

    def universal(seed, start=None):
        return universal_pgd(
            trained, tiny.val.images, tiny.val.labels, eps=8.0, steps=4, generator=seeded(seed), start=start
        )

    for attack in (heap, universal, lambda seed: universal(seed, torch.zeros(1, 3, 8, 8))):
        assert torch.equal(attack(1), attack(1))
        assert not torch.equal(attack(1), attack(2))


# ------------------------------------------------------------------------------------------- the model's state


class Spy(nn.Module):
    """A model without `folded`: batch norm, dropout, a frozen part, modes that differ; it notes how it is used."""

    def __init__(self):
        super().__init__()
        self.norm, self.frozen_norm, self.dropout = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.head = nn.Linear(math.prod(SHAPE), 2)
        self.train()
        self.frozen_norm.eval()
        self.head.bias.requires_grad_(False)
        self.calls, self.fails_at = [], None

    def forward(self, x):
        modes = any(module.training for module in self.modules())
        self.calls.append((x.detach().clone(), modes, any(p.requires_grad for p in self.parameters())))
        if self.fails_at == len(self.calls):
            raise RuntimeError("the model fails")
        return self.head(self.dropout(self.frozen_norm(self.norm(x / 64 - 2))).flatten(1))


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def assert_state(model, state):
    modes, flags, gradients, tensors = state
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [parameter.grad for parameter in model.parameters()] == gradients == [None] * len(flags)
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


ATTACKS = {
    "heap": lambda model, x, y: heap_pgd(
        model, x, y, eps=8.0, sharedness=4, steps=2, step_size=4.0, keep_best=True, generator=seeded()
    ),
    "universal": lambda model, x, y: universal_pgd(model, x, y, eps=8.0, steps=4, batch_size=4, generator=seeded()),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_model_without_folding_is_left_as_it_was(attack):
    torch.manual_seed(0)
    model, images, labels = Spy(), images_like(12), torch.arange(12) % 2
    state = state_of(model)
    xi = attack(model, images, labels)
    assert_state(model, state)
    assert [(trains, learns) for _, trains, learns in model.calls] == [(False, False)] * len(model.calls)
    assert torch.equal(xi, attack(model.eval(), images, labels))  # no dropout, no batch statistics


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_model_that_raises_is_left_as_it_was(attack):
    model = Spy()
    model.fails_at = 2
    state = state_of(model)
    with pytest.raises(RuntimeError, match="the model fails"):
        attack(model, images_like(12), torch.arange(12) % 2)
    assert len(model.calls) == 2
    assert_state(model, state)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_model_with_folding_is_left_as_it_was(attack, resnet, small):
    model = resnet().train()
    model.stem.eval()
    model.head.bias.requires_grad_(False)
    state = state_of(model)
    xi = attack(model, *small)
    assert_state(model, state)
    assert torch.equal(xi, attack(model.eval(), *small))


def test_folded_copy_is_frozen_and_what_is_attacked(resnet):
    model = resnet().train()
    with attackable(model) as net:
        assert net is not model and not net.training
        assert not any(parameter.requires_grad for parameter in net.parameters())
        assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def test_attack_works_where_gradients_are_off(trained, small):
    options = {"eps": 8.0, "sharedness": 4, "steps": 2, "step_size": 4.0}
    outside = heap_pgd(trained, *small, generator=seeded(), **options)
    with torch.no_grad():
        inside = heap_pgd(trained, *small, generator=seeded(), **options)
    assert torch.equal(inside, outside) and not inside.requires_grad


# ------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("shape", [(), (2, 3)], ids=["classification", "segmentation"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_cross_entropy_with_soft_targets(shape, smoothing):
    logits = torch.randn(5, 4, *shape, generator=seeded())
    labels = torch.randint(4, (5, *shape), generator=seeded())
    soft = F.one_hot(labels, 4).movedim(-1, 1) * (1 - smoothing) + smoothing / 4
    losses = attack_loss(logits, labels, label_smoothing=smoothing)
    assert losses.shape == labels.shape
    torch.testing.assert_close(losses, -(soft * logits.log_softmax(1)).sum(1))


def test_threshold_caps_each_sample_alone():
    logits = torch.tensor([[3.0, 0.0, 0.0], [-3.0, 0.0, 0.0], [0.5, 0.0, 0.2]], requires_grad=True)
    labels = torch.tensor([0, 0, 0])
    plain, capped = attack_loss(logits, labels), attack_loss(logits, labels, loss_threshold=KAPPA)
    assert plain[1] > KAPPA > plain[[0, 2]].max()
    assert capped[1] == torch.tensor(KAPPA) and torch.equal(capped[[0, 2]], plain[[0, 2]])
    (without,), (within,) = (torch.autograd.grad(losses.sum(), logits) for losses in (plain, capped))
    assert torch.equal(within[1], torch.zeros(3)) and without[1].abs().min() > 0
    assert torch.equal(within[[0, 2]], without[[0, 2]])


def test_capped_sample_pulls_nothing_and_the_others_as_before(exact, small):
    """Sample 1 carries a wrong label, so its loss is far beyond kappa: its heap moves as if it were not there."""
    images, labels = small[0][:4], small[1][:4].clone()
    labels[1] = (labels[1] + 1) % 4
    assert [loss > KAPPA for loss in attack_loss(exact(images), labels)] == [False, True, False, False]
    zeros = torch.zeros(4, 3, 8, 8)
    options = {"eps": 2.0, "steps": 1, "step_size": 1.0, "loss_threshold": KAPPA}
    alone = heap_pgd(exact, images, labels, sharedness=1, start=zeros, **options)
    uncapped = heap_pgd(exact, images, labels, sharedness=1, start=zeros, **options | {"loss_threshold": None})
    assert not alone[1].any() and uncapped[1].abs().min() == 1
    assert torch.equal(alone[[0, 2, 3]], uncapped[[0, 2, 3]]) and alone[[0, 2, 3]].abs().min() == 1
    shared = heap_pgd(exact, images, labels, sharedness=4, start=zeros[:1], **options)
    rest = heap_pgd(exact, images[[0, 2, 3]], labels[[0, 2, 3]], sharedness=3, start=zeros[:1], **options)
    assert torch.equal(shared, rest)


def test_label_smoothing_and_threshold_reach_the_attack(exact, small):
    """Both act on each sample before the sum, in the heap attack and in the universal one."""

    def loss(logits, labels):
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.3).clamp(max=1.0).sum()

    start, eps = uniform(1, 12.0, (3, 8, 8)), torch.tensor(12.0)
    options = {"loss_threshold": 1.0, "label_smoothing": 0.3}
    slow = slow_pgd(exact, *small, start, eps=eps, steps=4, step_size=6.0, sharedness=12, loss=loss)
    xi = heap_pgd(exact, *small, eps=12.0, sharedness=12, steps=4, step_size=6.0, start=start, **options)
    plain = heap_pgd(exact, *small, eps=12.0, sharedness=12, steps=4, step_size=6.0, start=start)
    assert torch.equal(xi, slow) and not torch.equal(xi, plain)
    annealed = {"eps": 12.0, "steps": 4, "batch_size": 12, "beta": 2.0, "gamma": 1.0, "snapshots": 1}
    universal = universal_pgd(exact, *small, start=start, generator=seeded(), **annealed, **options)
    assert torch.equal(universal, slow)


@pytest.mark.parametrize("targeted", [False, True])
def test_ignored_pixels_pull_nothing(targeted):
    torch.manual_seed(0)
    model = nn.Conv2d(3, 5, 3, padding=1).double()
    segment = nn.Sequential(model, nn.Tanh())
    net = DoubleInput(segment)
    images = images_like(4)
    labels = torch.randint(5, (4, *SHAPE[1:]), generator=seeded())
    ignored = torch.rand(labels.shape, generator=seeded(7)) < 0.4
    masked = labels.masked_fill(ignored, IGNORE)
    smoothing = 0.0 if targeted else 0.1

    def loss(logits, y):
        losses = F.cross_entropy(logits, y.clamp(max=4), reduction="none", label_smoothing=smoothing)
        return losses[y != IGNORE].sum()

    start, eps, sign = uniform(2, 8.0), torch.tensor(8.0), -1 if targeted else 1
    options = {"eps": 8.0, "sharedness": 2, "steps": 4, "step_size": 3.0, "start": start, "targeted": targeted}
    xi = heap_pgd(net, images, masked, label_smoothing=smoothing, **options)
    slow = slow_pgd(net, images, masked, start, eps=eps, steps=4, step_size=3.0, sharedness=2, loss=loss, sign=sign)
    assert torch.equal(xi, slow)
    assert not torch.equal(xi, heap_pgd(net, images, labels, label_smoothing=smoothing, **options))


class DoubleInput(nn.Module):
    """Hands a float64 model its input in float64."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.double() / 64 - 2)


def test_heap_whose_pixels_are_all_ignored_stays_where_it_is():
    torch.manual_seed(0)
    net = DoubleInput(nn.Conv2d(3, 5, 1).double())
    labels = torch.zeros(2, *SHAPE[1:], dtype=torch.long)
    labels[0] = IGNORE
    start = uniform(2, 4.0)
    for keep_best in (False, True):
        xi = heap_pgd(
            net,
            images_like(2),
            labels,
            eps=8.0,
            sharedness=1,
            steps=2,
            step_size=3.0,
            start=start,
            label_smoothing=0.1,
            keep_best=keep_best,
        )
        assert torch.equal(xi[0], start[0]) and not torch.equal(xi[1], start[1])


def test_class_255_of_a_classifier_is_not_ignored(linear):
    """255 means ignore only where labels are maps."""
    model = linear(torch.randn(300, math.prod(SHAPE), generator=seeded()) / 100)
    images, labels = images_like(3), torch.tensor([255, 7, 255])
    losses = attack_loss(model(images), labels)
    torch.testing.assert_close(losses, F.cross_entropy(model(images).float(), labels, reduction="none"))
    predicted = model(images).argmax(1)
    labels = torch.where(torch.arange(3) == 0, predicted, 255)
    rate = success_rates(model, images, labels, torch.zeros(1, *SHAPE))
    assert rate.item() == (predicted != labels).float().mean().item() == pytest.approx(2 / 3)


# ----------------------------------------------------------------------------------------------- step sizes


@given(
    eps=st.floats(0, 255),
    steps=st.integers(1, 300),
    beta=st.floats(0.1, 10),
    gamma=st.floats(0.8, 1.2),
)
def test_annealed_steps_sum_to_beta_eps_and_decay_by_gamma(eps, steps, beta, gamma):
    alphas = annealed_step_sizes(eps, steps, beta=beta, gamma=gamma)
    assert len(alphas) == steps
    assert math.fsum(alphas) == pytest.approx(beta * eps, rel=1e-9)
    assert all(later == pytest.approx(gamma * earlier) for earlier, later in pairwise(alphas))


def test_annealed_steps_of_the_paper_decrease_strictly():
    alphas = annealed_step_sizes(255.0, 200, beta=4.0, gamma=0.975)
    assert alphas == sorted(alphas, reverse=True) and len(set(alphas)) == 200
    assert alphas[0] > 100 * alphas[-1]


def test_universal_attack_walks_by_the_annealed_steps(linear):
    """With weight on one pixel only, all else stays, and that pixel's way is the sum of the steps."""
    weight = torch.zeros(2, *SHAPE)
    weight[1, 0, 0, 0] = 0.01
    images, labels = images_like(8), torch.zeros(8, dtype=torch.long)
    start = torch.full((2, *SHAPE), -4.0)
    start[1] *= 5
    trace = [start]
    for steps in range(1, 6):
        alphas = annealed_step_sizes(1.0, 5, beta=1.0, gamma=0.5)
        beta = sum(alphas[:steps])  # the first steps of the longer schedule are this shorter one
        xi = universal_pgd(
            linear(weight),
            images,
            labels,
            eps=[4.0, 20.0],
            steps=steps,
            batch_size=2,
            beta=beta,
            gamma=0.5,
            start=start,
            snapshots=1,
        )
        moved = xi - start
        assert moved[:, 0, 0, 0].tolist() == pytest.approx([4 * beta, 20 * beta])
        assert moved.count_nonzero() == 2
        trace.append(xi)
    assert not any(torch.equal(one, other) for one, other in pairwise(trace))


# ------------------------------------------------------------------------------------------------ clamping


@pytest.mark.parametrize(("straight_through", "depth"), [(False, -2), (True, -6)])
def test_perturbation_is_not_derived_from_clamped_images(two_class, direction, straight_through, depth):
    """Where a pixel of 1 wants to be darker by more than 1, the image cannot follow; xi keeps its steps."""
    dark = direction.view(SHAPE) < 0  # untargeted with label 0: these pixels want to be darker
    images = torch.where(dark, 1.0, 128.0)[None]
    options = {"eps": 8.0, "sharedness": 1, "steps": 3, "step_size": 2.0, "straight_through": straight_through}
    xi = heap_pgd(two_class, images, torch.tensor([0]), start=torch.zeros_like(images), **options)[0]
    assert (xi[dark] == depth).all()  # by the chain rule there is no gradient after the first step
    assert (xi[~dark] == 6).all()
    assert (perturb(images, xi[None], 1)[0][dark] == 0).all()


@pytest.mark.parametrize("straight_through", [False, True])
def test_gradient_is_zero_where_clamped_but_straight_through(two_class, straight_through):
    images = torch.tensor([0.0, 255.0, 128.0]).view(3, 1, 1, 1).expand(3, *SHAPE)
    start = torch.full((3, *SHAPE), -1.0)
    start[1] = 1.0
    options = {"eps": 8.0, "sharedness": 1, "steps": 2, "step_size": 2.0, "straight_through": straight_through}
    xi = heap_pgd(two_class, images, torch.tensor([0, 0, 0]), start=start, **options)
    assert torch.equal(xi[:2], start[:2]) != straight_through
    assert (xi[2] != start[2]).all()
    assert not straight_through or (xi != start).all()


def test_black_and_white_images_are_attacked_as_well_as_by_the_usual_pgd():
    """The usual PGD projects x + xi itself (Madry et al. 2018); by the chain rule, ours stalled far behind it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 196, 10))
    model, images = UnitInputs(net, mean=(0.0,), std=(1.0,)).eval(), (torch.rand(400, 1, 16, 16) > 0.8).float() * 255
    labels = model(images).argmax(1)
    usual = (images + random_start(tuple(images.shape), 16.0, None)).clamp(0, 255)
    for _ in range(10):
        usual.requires_grad_()
        gradient = torch.autograd.grad(F.cross_entropy(model(usual), labels), usual)[0]
        moved = usual.detach() + 4 * gradient.sign()
        usual = torch.minimum(torch.maximum(moved, images - 16), images + 16).clamp(0, 255)
    options = {"eps": 16.0, "sharedness": 1, "steps": 10, "step_size": 4.0}
    ours, stalled = (
        perturb(images, heap_pgd(model, images, labels, straight_through=through, **options), 1)
        for through in (True, False)
    )
    usual, ours, stalled = ((model(x).argmax(1) != labels).float().mean().item() for x in (usual, ours, stalled))
    assert ours >= usual - 0.01 and stalled < usual - 0.1


def test_shared_perturbation_goes_on_for_the_images_that_can_follow(two_class, direction):
    dark = direction.view(SHAPE) < 0
    images = torch.stack([torch.zeros(SHAPE), torch.full(SHAPE, 128.0)])
    xi = heap_pgd(
        two_class,
        images,
        torch.tensor([0, 0]),
        eps=8.0,
        sharedness=2,
        steps=6,
        step_size=2.0,
        start=torch.zeros(1, *SHAPE),
    )[0]
    assert (xi[dark] == -8).all() and (xi[~dark] == 8).all()


# -------------------------------------------------------------------------------------- which iterate is kept


@pytest.mark.parametrize("targeted", [False, True])
def test_keep_best_returns_each_heap_s_best_iterate(exact, small, targeted):
    images, labels = small
    steps, options = 5, {"targeted": targeted, "label_smoothing": 0.1}
    start = uniform(3, 8.0, (3, 8, 8))
    iterates, losses, bound = [start], [], torch.full((1, 1, 1, 1), 8.0)
    for _ in range(steps + 1):
        xi, loss = pgd_step(
            exact, images, labels, iterates[-1], eps=bound, alpha=torch.tensor(12.0), sharedness=5, **options
        )
        losses.append(torch.stack([loss[0:5].mean(), loss[5:10].mean(), loss[10:].mean()]))
        iterates.append(xi)
    losses = torch.stack(losses)
    order = losses.argmin(0) if targeted else losses.argmax(0)
    expected = torch.stack([iterates[k][heap] for heap, k in enumerate(order.tolist())])
    attack = {"eps": 8.0, "sharedness": 5, "steps": steps, "step_size": 12.0, "start": start} | options
    assert torch.equal(heap_pgd(exact, images, labels, keep_best=True, **attack), expected)
    last = heap_pgd(exact, images, labels, keep_best=False, **attack)
    assert torch.equal(last, iterates[steps])
    assert not torch.equal(last, expected)  # steps this large overshoot: the last is not the best for each heap
    assert len(set(order.tolist())) > 1


@pytest.mark.parametrize("micro_batch", [1, 5, 12, 16, 99])
@pytest.mark.parametrize("targeted", [False, True])
def test_gradients_accumulated_over_parts_of_a_mini_batch_give_the_same_attack(exact, tiny, micro_batch, targeted):
    images, labels = tiny.val.images[:64].double(), tiny.val.labels[:64]
    options = {"eps": [4.0, 8.0], "steps": 6, "batch_size": 16, "targeted": targeted, "label_smoothing": 0.1}
    whole, parts = (
        universal_pgd(exact, images, labels, micro_batch=size, generator=seeded(), **options)
        for size in (None, micro_batch)
    )
    assert torch.equal(whole, parts)
    assert (whole[1].abs() > 4).any()


def test_universal_attack_returns_the_most_successful_snapshot(trained, tiny):
    """Large steps that never decay: the last iterate is a matter of luck. All crafting images are scored."""
    images, labels = tiny.val.images[:64], tiny.val.labels[:64]
    eps = [8.0, 12.0, 16.0, 16.0, 16.0, 12.0]
    options = {"eps": eps, "steps": 8, "batch_size": 4, "beta": 40.0, "gamma": 1.0, "score_images": 64}
    start = uniform(len(eps), 16.0, (3, 8, 8))
    rates = {
        (targeted, snapshots): success_rates(
            trained,
            images,
            torch.full_like(labels, 1) if targeted else labels,
            universal_pgd(
                trained,
                images,
                torch.full_like(labels, 1) if targeted else labels,
                start=start,
                generator=seeded(),
                snapshots=snapshots,
                targeted=targeted,
                **options,
            ),
            targeted=targeted,
        )
        for targeted in (False, True)
        for snapshots in (1, 4)
    }
    for targeted in (False, True):
        assert (rates[targeted, 4] >= rates[targeted, 1]).all()
        assert (rates[targeted, 4] > rates[targeted, 1]).any()


def test_minibatches_repeat_no_image_within_a_pass():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, *SHAPE)
    model = Spy()
    universal_pgd(model, images, torch.zeros(10, dtype=torch.long), eps=[0.0, 0.0], steps=9, batch_size=3, snapshots=1)
    seen = torch.stack([x[:, 0, 0, 0] for x, _, _ in model.calls[1:]])  # the first call tries the model
    assert seen.shape == (9, 6) and torch.equal(seen[:, :3], seen[:, 3:])  # the same images for every eps
    passes = seen[:, :3].reshape(3, 9)
    assert all(len(set(one.tolist())) == 9 for one in passes)
    assert len({tuple(one.tolist()) for one in passes}) == 3  # in a new order each time


# ------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_success_rates_equal_a_slow_loop(linear, kind, targeted):
    torch.manual_seed(0)
    images = images_like(7, low=0, high=255).to(torch.uint8)
    if kind == "classification":
        model, labels = linear(torch.randn(3, math.prod(SHAPE), generator=seeded())), torch.arange(7) % 3
    else:
        model = DoubleInput(nn.Conv2d(3, 3, 1).double())
        labels = torch.randint(3, (7, *SHAPE[1:]), generator=seeded())
        labels[torch.rand(labels.shape, generator=seeded(9)) < 0.3] = IGNORE
    perturbations = uniform(3, 60.0)
    slow = []
    for xi in perturbations:
        wins = total = 0
        for image, label in zip(images, labels, strict=True):
            predicted = model((image.float() + xi).clamp(0, 255)[None]).argmax(1)[0]
            for p, y in zip(predicted.flatten().tolist(), label.flatten().tolist(), strict=True):
                if y != IGNORE:
                    total += 1
                    wins += (p == y) if targeted else (p != y)
        slow.append(wins / total)
    rates = success_rates(model, images, labels, perturbations, targeted=targeted, batch_size=3)
    assert rates.tolist() == pytest.approx(slow)
    assert len(set(slow)) > 1


# -------------------------------------------------------------------------------------------------- errors


HEAP = {"eps": 8.0, "sharedness": 2, "steps": 2, "step_size": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": -1.0}, r"eps=-1: expected numbers from 0 to 255"),
        ({"eps": 255.5}, r"eps=255\.5"),
        ({"eps": math.nan}, r"eps=nan"),
        ({"eps": [8.0, 300.0]}, r"eps=300"),
        ({"eps": [1.0, 2.0, 3.0]}, r"eps has 3 values for 2 heaps"),
        ({"sharedness": 0}, r"sharedness=0: expected 1 to the number of images \(4\)"),
        ({"sharedness": 5}, r"sharedness=5"),
        ({"steps": 0}, r"steps=0: expected a whole number of at least 1"),
        ({"step_size": -2.0}, r"step_size=-2: expected"),
        ({"step_size": math.inf}, r"step_size=inf"),
        ({"step_size": torch.tensor([[1.0, 1.0], [1.0, -3.0]])}, r"step_size=-3"),
        ({"step_size": [1.0, 1.0, 1.0]}, r"step_size of shape \(3,\): expected a number, \(2,\) or \(2, 2\)"),
        ({"start": torch.zeros(4, *SHAPE)}, r"start of shape \(4, 3, 4, 4\): expected \(2, 3, 4, 4\)"),
        ({"loss_threshold": 0.0}, r"loss_threshold=0\.0: expected a positive number"),
        ({"loss_threshold": math.nan}, r"loss_threshold=nan"),
        ({"loss_threshold": 1.6, "targeted": True}, r"loss_threshold=1\.6 in a targeted attack"),
        ({"images": torch.zeros(3, 4, 4)}, r"images of shape \(3, 4, 4\): expected \(d, C, H, W\)"),
        ({"images": torch.zeros(0, *SHAPE)}, r"images of shape \(0, 3, 4, 4\)"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels of shape \(3,\)"),
        ({"labels": torch.zeros(4)}, r"labels of shape \(4,\) and type torch\.float32: expected int64"),
        ({"labels": torch.zeros(4, 4, dtype=torch.long)}, r"labels of shape \(4, 4\)"),
    ],
)
def test_heap_attack_names_what_is_wrong(two_class, changes, message):
    arguments = {"images": images_like(4), "labels": torch.zeros(4, dtype=torch.long)} | HEAP | changes
    with pytest.raises(SatlibError, match=message) as error:
        heap_pgd(two_class, arguments.pop("images"), arguments.pop("labels"), **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": -1.0}, r"eps=-1: expected numbers from 0 to 255"),
        ({"eps": [8.0, 256.0]}, r"eps=256"),
        ({"eps": []}, r"eps=\[\]: expected"),
        ({"steps": 0}, r"steps=0: expected a whole number of at least 1"),
        ({"batch_size": 0}, r"batch_size=0: expected a whole number of at least 1"),
        ({"batch_size": 5}, r"batch_size=5"),
        ({"beta": 0.0}, r"beta=0\.0: expected a positive number"),
        ({"beta": math.inf}, r"beta=inf"),
        ({"gamma": -0.9}, r"gamma=-0\.9: expected a positive number"),
        ({"gamma": math.nan}, r"gamma=nan"),
        ({"snapshots": 0}, r"snapshots=0"),
        ({"micro_batch": 0}, r"micro_batch=0: expected None, or a whole number of at least 1"),
        ({"score_images": 0}, r"score_images=0"),
        ({"start": torch.zeros(2, *SHAPE)}, r"start of shape \(2, 3, 4, 4\)"),
        ({"loss_threshold": -1.0}, r"loss_threshold=-1\.0"),
        ({"loss_threshold": 1.6, "targeted": True}, r"loss_threshold=1\.6 in a targeted attack"),
        ({"images": torch.zeros(4, 16)}, r"images of shape \(4, 16\)"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, r"labels of shape \(5,\)"),
    ],
)
def test_universal_attack_names_what_is_wrong(two_class, changes, message):
    arguments = {"images": images_like(4), "labels": torch.zeros(4, dtype=torch.long)}
    arguments |= {"eps": 8.0, "steps": 2, "batch_size": 2} | changes
    with pytest.raises(SatlibError, match=message) as error:
        universal_pgd(two_class, arguments.pop("images"), arguments.pop("labels"), **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("heaps", [1, 3])
def test_perturbations_that_do_not_fit_the_images_are_an_error(heaps):
    with pytest.raises(SatlibError, match=rf"{heaps} perturbations: expected 2, .* 4 images with sharedness=2"):
        perturb(images_like(4), torch.zeros(heaps, *SHAPE), 2)


def test_one_perturbation_is_for_all_images_unless_it_is_said_otherwise():
    images, xi = images_like(4, low=0, high=255), uniform(3, 99.0)
    assert torch.equal(perturb(images, xi[:1]), (images + xi[:1]).clamp(0, 255))
    assert torch.equal(perturb(images, xi[:1]), perturb(images, xi[:1], 4))
    with pytest.raises(SatlibError, match="3 perturbations: expected 1, one a heap of 4 images"):
        perturb(images, xi)


@pytest.mark.parametrize("function", [heap_pgd, universal_pgd, success_rates, pgd_step, attack_loss])
def test_settings_are_keyword_only(function):
    tensors = {"model", "images", "labels", "xi", "logits", "perturbations"}
    tensors |= {"eps", "alpha"} if function is pgd_step else set()
    kinds = {name: parameter.kind for name, parameter in inspect.signature(function).parameters.items()}
    others = {kind for name, kind in kinds.items() if name not in tensors}
    assert others <= {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}


# ----------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_attacks_on_a_gpu_keep_the_bound_and_succeed(trained, tiny):
    model, test = copy.deepcopy(trained).cuda(), tiny.test.to("cuda")
    images, labels = test.images.float(), test.labels
    xi = heap_pgd(model, images, labels, eps=16.0, sharedness=1, steps=5, step_size=6.0, generator=seeded())
    assert xi.device.type == "cuda" and xi.abs().max() <= 16
    assert (model(perturb(images, xi, 1)).argmax(1) != labels).float().mean() > 0.9
    xi = universal_pgd(model, test.images, labels, eps=[8.0, 24.0], steps=30, generator=seeded())
    assert xi.abs().amax((1, 2, 3)).tolist() == [8.0, 24.0]
    assert success_rates(model, test.images, labels, xi)[1] > 0.5
