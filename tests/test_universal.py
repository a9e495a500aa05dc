"""Universal attacks as values: what each adds to the paper's, what all of them keep, and how another one is added."""

import copy
import functools
import json
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import satlib.universal
from satlib.attacks import (
    annealed_step_sizes,
    attackable,
    heap_gradients,
    perturb,
    perturb_straight_through,
    random_start,
    spend,
    stochastic_pgd,
    success_rates,
    universal_pgd,
)
from satlib.data.imageset import IGNORE
from satlib.errors import SatlibError
from satlib.robustness import universal_robustness
from satlib.universal import (
    ATTACKS,
    MOMENTUM,
    SQUARES,
    UPDATES,
    Adam,
    Momentum,
    aimed_pgd,
    cosine_step_sizes,
    ensemble,
    extended_pgd,
    margin_loss,
    mean_of_signs,
    name_of,
    named,
    options,
)

pytestmark = pytest.mark.usefixtures("float32")
SHAPE = (3, 4, 4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_like(count: int, *, low: float = 60.0, high: float = 195.0, seed: int = 1) -> torch.Tensor:
    return torch.empty(count, *SHAPE).uniform_(low, high, generator=seeded(seed))


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


# --------------------------------------------------------------------- the worked example: an attack of one's own


def noise_signs(model, images, labels, *, eps, share=1.0, generator=None):
    """Random signs of size share * eps: the weakest attack there is."""
    bound = torch.tensor(eps, device=images.device).view(-1, 1, 1, 1)
    return random_start((len(eps), *images.shape[1:]), bound, generator).sign() * share * bound


def test_another_attack_is_one_function_and_one_entry(trained, tiny, monkeypatch):
    monkeypatch.setitem(ATTACKS, "noise", noise_signs)
    test = (tiny.test.images, tiny.test.labels)
    sets = {"craft": (tiny.val.images, tiny.val.labels), "choose": test, "report": test}
    noise, paper = named("noise", share=0.9), named("paper", steps=20)
    alone, both = (
        universal_robustness(attack, trained, delta=0.5, iterations=5, generator=seeded(), **sets)
        for attack in (noise, [paper, ATTACKS["noise"]])
    )
    assert {e.attack for e in alone.evaluations[1:]} == {"noise"} and options(noise) == {"share": 0.9}
    assert {e.attack for e in both.evaluations[1:]} == {"noise", "paper"} and both.epsilon < 0.6 * alone.epsilon


# ------------------------------------------------------------------------------------ what every attack keeps


SMALL = {"mean of signs": {"steps": 5}, "DeepFool": {"passes": 1, "batch_size": 16, "classes": 3, "steps": 3}}


@pytest.mark.parametrize("name", list(ATTACKS))
def test_every_attack_keeps_eps_and_the_model_and_repeats_itself(name, trained, tiny):
    attack = named(name, **SMALL.get(name, {"steps": 12, "batch_size": 8}))
    model = copy.deepcopy(trained).train().requires_grad_()
    model.stem.eval()
    model.head.bias.requires_grad_(False)
    before = copy.deepcopy(model)
    epsilons, part = [0.0, 3.0, 24.0], (tiny.val.images[:64], tiny.val.labels[:64])
    xi, again = (attack(model, *part, eps=epsilons, generator=seeded()) for _ in range(2))
    assert xi.shape == (3, 3, 8, 8) and torch.equal(xi, again) and xi.isfinite().all()
    assert all(each.abs().max() <= eps for each, eps in zip(xi, epsilons, strict=True)) and xi[2].abs().max() > 3
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in model.state_dict().items())


def test_attacks_differ_from_the_papers_and_need_as_many_gradients(trained, tiny):
    """Counted in images that the model sees with gradients: what choosing among iterates takes is left out."""
    part, counts, found = (tiny.val.images[:64], tiny.val.labels[:64]), {}, {}

    def count(module, args):
        counts[name] = counts.get(name, 0) + len(args[0]) * args[0].requires_grad

    for name in set(ATTACKS) - {"mean of signs", "DeepFool", "aimed"}:
        net = trained.folded()
        net.folded = lambda net=net: net
        handle = net.register_forward_pre_hook(count)
        found[name] = named(name, steps=16, batch_size=8)(net, *part, eps=[24.0], generator=seeded())
        handle.remove()
    assert set(counts.values()) == {16 * 8 + 4}  # and four on which it was tried
    distinct = {xi.numpy().tobytes() for xi in found.values()}
    assert len(distinct) >= len(found) - 1  # no pixel leaves its range here: through the clamp is straight through
    assert torch.equal(found["clamped gradient"], found["paper"])


def test_extended_pgd_is_the_papers_by_default(trained, tiny):
    given = {"eps": [4.0, 16.0], "steps": 12, "loss_threshold": 1.6, "label_smoothing": 0.1}
    one, other = (
        attack(trained, tiny.val.images, tiny.val.labels, generator=seeded(), **given)
        for attack in (universal_pgd, extended_pgd)
    )
    assert torch.equal(one, other)


def test_aggregated_gradients_are_those_of_the_parts_on_their_way(trained, tiny):
    """Two steps of SGA by hand; and where gradients have one sign everywhere, it makes the steps of plain PGD."""
    x, y, eps = tiny.val.images.float(), tiny.val.labels, torch.full((1, 1, 1, 1), 12.0)
    minibatches, sizes = torch.arange(16).view(2, 8), torch.tensor([5.0, 3.0]).view(2, 1, 1, 1, 1)
    with attackable(trained) as net:
        start = random_start((1, 3, 8, 8), 12.0, seeded())
        rest = (net, x, y[None], start, minibatches, sizes)
        *_, found = stochastic_pgd(*rest, eps=eps, targeted=False, inner=3)
        xi = start
        for chosen, alpha in zip(minibatches, sizes, strict=True):
            at, total = xi, torch.zeros_like(xi)
            for part in chosen.split(3):
                gradients = heap_gradients(net, x[part], y[part], at, sharedness=len(part))[0]
                at, total = (at + alpha * gradients.sign()).clamp(-12, 12), total + gradients
            xi = (xi + alpha * total.sign()).clamp(-12, 12)
        plain = list(stochastic_pgd(*rest, eps=eps, targeted=False))[-1]
    assert torch.equal(found, xi) and not torch.equal(found, plain)


def test_images_are_counted_once_for_each_perturbation_that_they_move(two_class):
    """Eight images in parts of three, three and two, for two eps; and two steps of which larger batches leave one."""
    given = {"eps": [4.0, 8.0], "steps": 2, "snapshots": 1}
    for changes, count in (({"batch_size": 8, "inner": 3}, 2 * 2 * 8), ({"batch_size": 2, "larger": 4}, 2 * 8)):
        before = spend(0)
        extended_pgd(two_class, images_like(8), torch.zeros(8, dtype=torch.long), **given, **changes)
        assert spend(0) - before == count


def test_aiming_finds_the_class_that_an_untargeted_attack_turns_away_from(linear):
    """Class 1 is near, and a small perturbation never reaches it; class 2 is far, the other way, and won by all."""
    step = torch.ones(math.prod(SHAPE)) / math.prod(SHAPE)  # the logits change by this times the mean of xi
    model = linear(torch.stack([0 * step, 0.01 * step, -step]), bias=torch.tensor([0.0, -3.0, 98.0]))
    x, y = images_like(12, low=125.0, high=131.0), torch.zeros(12, dtype=torch.long)
    options = {"eps": [60.0], "steps": 20, "batch_size": 4, "generator": seeded()}
    untargeted, aimed = (
        success_rates(model, x, y, attack(model, x, y, **options)).item() for attack in (universal_pgd, aimed_pgd)
    )
    assert (untargeted, aimed) == (0.0, 1.0)
    few = aimed_pgd(model, x, y, eps=[20.0, 60.0], aims=1, generator=seeded(), steps=20, batch_size=4)
    assert success_rates(model, x, y, few).tolist() == [0.0, 1.0] and few[0].abs().max() <= 20


@pytest.fixture(scope="module")
def three_class(linear):
    """Class 1 is near, class 2 is far, the other way; the logits change by the mean of xi. Nothing else matters."""
    step = torch.ones(math.prod(SHAPE)) / math.prod(SHAPE)
    return linear(torch.stack([0 * step, step, -step]), bias=torch.tensor([0.0, -148.0, 88.0]))


def classes_under(model, xi):
    predicted = [model(perturb(images_like(12, low=125.0, high=131.0), each)).argmax(1) for each in xi.split(1)]
    assert all((each == each[0]).all() for each in predicted)
    return [int(each[0]) for each in predicted]


def test_aiming_takes_the_targets_that_it_is_told(three_class):
    x, y = images_like(12, low=125.0, high=131.0), torch.zeros(12, dtype=torch.long)
    given = {"eps": [60.0, 70.0], "steps": 10, "batch_size": 4, "generator": seeded()}
    assert [classes_under(three_class, aimed_pgd(three_class, x, y, targets=[k], **given)) for k in (1, 2)] == [
        [1, 1],
        [2, 2],
    ]
    with pytest.raises(SatlibError, match=r"targets=\[3\]: expected classes from 0 to 2"):
        aimed_pgd(three_class, x, y, targets=[3], **given)


@pytest.mark.parametrize("targets", [None, [1, 2]])
def test_aiming_goes_on_towards_where_it_starts(three_class, targets):
    x, y = images_like(12, low=125.0, high=131.0), torch.zeros(12, dtype=torch.long)
    start = torch.cat([torch.full((1, *SHAPE), value) for value in (-45.0, 25.0)])
    before = spend(0)
    given = {"eps": [60.0, 60.0], "steps": 10, "batch_size": 4, "generator": seeded()}
    xi = aimed_pgd(three_class, x, y, targets=targets, start=start, **given)
    assert classes_under(three_class, start) == [2, 1] == classes_under(three_class, xi)
    assert spend(0) - before == 2 * 10 * 4  # nothing is scanned
    assert xi[0].mean() < -55 and xi[1].mean() > 55


@pytest.mark.parametrize("at_once", [2**23, 48])
def test_every_round_of_aiming_goes_on_from_the_one_before(three_class, monkeypatch, at_once):
    """Five quarters of eps in all, of which the last round alone makes one."""
    monkeypatch.setattr("satlib.universal.AT_ONCE", at_once)
    x, y = images_like(12, low=125.0, high=131.0), torch.zeros(12, dtype=torch.long)
    given = {"steps": 8, "scan": 8, "beta": 0.25, "gamma": 1.0, "snapshots": 1, "batch_size": 4}
    xi = aimed_pgd(three_class, x, y, targets=[1], eps=[20.0, 40.0], generator=seeded(), **given)
    assert xi[0].mean() > 12 and xi[1].mean() > 24


def test_of_several_aims_each_keeps_its_eps_and_the_best_is_returned(three_class, monkeypatch):
    x, y = images_like(12, low=125.0, high=131.0), torch.zeros(12, dtype=torch.long)
    given = {"targets": [1, 2], "aims": 2, "steps": 10, "scan": 2, "batch_size": 4, "generator": seeded()}
    before = spend(0)
    found = aimed_pgd(three_class, x, y, eps=[15.0, 60.0], **given)
    assert found[0].abs().max() <= 15 and spend(0) - before == 2 * 4 * (2 * 2 + 2 * 6 + 2 * 10)
    rates = iter([[0.2, 0.1], [0.2, 0.1], [0.1, 0.2]])
    monkeypatch.setattr("satlib.universal.success_rates", lambda *_: torch.tensor(next(rates)))
    assert classes_under(three_class, aimed_pgd(three_class, x, y, eps=[60.0], **given)) == [2]


def test_some_of_the_images_choose_among_targets_and_iterates(three_class, monkeypatch):
    x, y = images_like(12, low=125.0, high=131.0), torch.zeros(12, dtype=torch.long)
    asked = {"universal": [], "attacks": []}
    for module, sizes in asked.items():

        def rated(net, images, labels, xi, *, targeted=False, sizes=sizes):
            sizes.append(len(images))
            return torch.zeros(len(xi))

        monkeypatch.setattr(f"satlib.{module}.success_rates", rated)
    given = {"targets": [1, 2], "steps": 10, "scan": 2, "batch_size": 4, "snapshots": 4, "score_images": 5}
    aimed_pgd(three_class, x, y, eps=[60.0], generator=seeded(), **given)
    assert asked == {"universal": [5] * 3, "attacks": [5] * 4}  # after each round; and the iterates of the last


def test_aiming_takes_gradients_as_it_is_told(three_class):
    """By the chain rule a white pixel does not move on; and of twelve images five are passed at once."""
    x, y, sizes = images_like(12, low=125.0, high=131.0), torch.zeros(12, dtype=torch.long), []
    x[:, 0, 0, 0] = 255.0
    given = {"targets": [1], "steps": 5, "batch_size": 12, "inner": 1, "micro_batch": 5}
    given["start"] = torch.full((1, *SHAPE), 5.0)
    handle = three_class.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]) * args[0].requires_grad))
    clamped, through = (
        aimed_pgd(three_class, x, y, eps=[30.0], straight_through=each, **given)[0] for each in (False, True)
    )
    handle.remove()
    assert clamped[0, 0, 0] == 5 and clamped.flatten()[1:].min() == through.min() == 30 and max(sizes) == 5


def test_targets_that_are_told_are_all_scanned_and_nothing_else(three_class):
    x, y = images_like(12, low=125.0, high=131.0), torch.zeros(12, dtype=torch.long)
    given = {"eps": [60.0], "steps": 10, "scan": 2, "batch_size": 4, "generator": seeded()}
    before = spend(0)
    aimed_pgd(three_class, x, y, targets=[1, 2, 1], candidates=1, **given)
    assert spend(0) - before == 4 * (3 * 2 + 6 + 10)
    aimed_pgd(nn.Conv2d(3, 3, 1), images_like(6), torch.zeros(6, 4, 4, dtype=torch.long), targets=[1, 2, 1], **given)
    assert spend(0) - before == 2 * 4 * (3 * 2 + 6 + 10)


@pytest.mark.parametrize("label", [0, 1])
def test_the_first_class_and_the_last_are_aimed_at(linear, label):
    step = torch.ones(math.prod(SHAPE)) / math.prod(SHAPE)
    model = linear(torch.stack([0 * step, step]), bias=torch.tensor([0.0, [-148.0, -108.0][label]]))
    x, y = images_like(12, low=125.0, high=131.0), torch.full((12,), label)
    xi = aimed_pgd(model, x, y, eps=[60.0], steps=10, batch_size=4, generator=seeded())
    assert classes_under(model, torch.cat([0 * xi, xi])) == [label, 1 - label]


def test_255_is_a_class_among_classes_and_void_in_a_map(linear):
    step = torch.ones(math.prod(SHAPE)) / math.prod(SHAPE)
    weight, bias = torch.zeros(300, math.prod(SHAPE)), torch.full((300,), -900.0)
    weight[255], bias[0], bias[255] = step, 0.0, -148.0
    model, x = linear(weight, bias=bias), images_like(12, low=125.0, high=131.0)
    given = {"eps": [60.0], "steps": 10, "batch_size": 4, "generator": seeded()}
    xi = aimed_pgd(model, x, torch.zeros(12, dtype=torch.long), targets=[255], **given)
    assert classes_under(model, xi) == [255]
    painted = torch.ones(1, 4, 4, dtype=torch.long)
    painted[0, 0, 0] = IGNORE
    brighter = nn.Conv2d(3, 2, 1)
    weight = torch.tensor([[0.0], [1.0]]).expand(2, 3)[..., None, None] / 3
    brighter.load_state_dict({"weight": weight.clone(), "bias": torch.tensor([148.0, 0.0])})
    xi = aimed_pgd(brighter, x, torch.zeros(12, 4, 4, dtype=torch.long), targets=painted, **given)
    assert (brighter(perturb(x, xi)).argmax(1) == 1).flatten(1)[:, 1:].all()


def test_candidates_are_likely_on_clean_images_or_where_a_short_attack_takes_them(linear):
    """Class 2 is likely for a bright image alone, and class 3 for dark ones that are darkened."""
    step = torch.ones(math.prod(SHAPE)) / math.prod(SHAPE)
    bias = torch.tensor([0.0, -5.0, -265.0, 38.0, -400.0])
    model = linear(torch.stack([0 * step, 0 * step, 1.65 * step, -step, 0 * step]), bias=bias)
    x, xi = torch.full((6, *SHAPE), 100.0), torch.full((1, *SHAPE), -60.0)
    x[0] = 160.0
    found = [satlib.universal._likely(model, x, xi, count).tolist() for count in (2, 3, 4)]
    assert found == [[0, 3], [0, 3, 1], [0, 2, 3, 1]]


def test_candidates_are_looked_for_within_the_largest_eps(linear):
    step = torch.ones(math.prod(SHAPE)) / math.prod(SHAPE)
    model = linear(torch.stack([0 * step, step]), bias=torch.tensor([0.0, -158.0]))
    x, y = images_like(12, low=125.0, high=131.0), torch.zeros(12, dtype=torch.long)
    given = {"candidates": 1, "steps": 10, "batch_size": 4, "generator": seeded()}
    assert classes_under(model, aimed_pgd(model, x, y, eps=[1.0, 60.0], **given)) == [0, 1]


def test_of_many_classes_those_that_seem_near_are_scanned(linear):
    """Sixty classes, of which only one lies where the mean of xi can reach it; and it is among the few."""
    step, far = torch.ones(math.prod(SHAPE)) / math.prod(SHAPE), torch.full((60,), -900.0)
    weight = torch.zeros(60, math.prod(SHAPE))
    weight[41], far[0], far[41] = step, 0.0, -148.0
    model, x, y = linear(weight, bias=far), images_like(12, low=125.0, high=131.0), torch.zeros(12, dtype=torch.long)
    before = spend(0)
    given = {"steps": 10, "scan": 2, "batch_size": 4, "generator": seeded()}
    xi = aimed_pgd(model, x, y, eps=[60.0], candidates=6, **given)
    assert (model(perturb(x, xi)).argmax(1) == 41).all()
    assert spend(0) - before == 4 * (2 + 6 * 2 + 2 * 6 + 10)  # a short ascent; then all six, two of them, and one


def test_aiming_paints_one_class_or_a_map_over_every_scene():
    """Dark pixels are of class 0, bright ones of 1, and the scenes' halves are either; the map of another scene, in
    which the halves are swapped, wins all pixels, where one class everywhere wins half of them."""
    weight = torch.tensor([[-1.0], [1.0], [-9.0]]).expand(3, 3) / 30
    model = nn.Conv2d(3, 3, 1)
    model.load_state_dict({"weight": weight.view(3, 3, 1, 1), "bias": torch.tensor([12.8, -12.8, 0.0])})
    labels = torch.zeros(6, 4, 4, dtype=torch.long)
    labels[:, :2] = 1
    labels[0, 0, 0] = IGNORE
    x = torch.where(labels == 1, 150.0, 106.0)[:, None].expand(-1, 3, -1, -1)
    given = {"eps": [40.0], "steps": 20, "batch_size": 3}
    painted = aimed_pgd(model, x, labels, scenes=0, generator=seeded(), **given)
    assert 0.4 < success_rates(model, x, labels, painted).item() < 0.6
    turned = 1 - labels[1:2]
    other = torch.cat([turned, labels[1:]])  # the first scene is the other way round, and is aimed at by all
    mapped = aimed_pgd(model, torch.cat([256 - x[:1], x[1:]]), other, scenes=1, generator=seeded(), **given)
    assert success_rates(model, x, labels, mapped).item() > 0.9
    swapped = aimed_pgd(model, x, labels, eps=[60.0], targets=turned, steps=20, batch_size=3, generator=seeded())
    assert success_rates(model, x, labels, swapped).item() == 1
    with pytest.raises(SatlibError, match=r"targets=Tensor of shape .*: expected classes from 0 to 2, or maps"):
        aimed_pgd(model, x, labels, eps=[40.0], targets=turned[:, :3], steps=2, batch_size=3)


def test_maps_of_scenes_are_aimed_at_beside_however_many_classes():
    """Of 24 classes six are scanned, and four maps; in groups of heaps, where they are too many pixels at once."""
    model, sizes = nn.Conv2d(3, 24, 1), []
    x, labels = images_like(6), torch.arange(96).view(6, 4, 4) % 24
    handle = model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    given = {"eps": [8.0], "steps": 2, "scan": 1, "batch_size": 4, "candidates": 6, "generator": seeded()}
    before = spend(0)
    whole = aimed_pgd(model, x, labels, **given)
    assert spend(0) - before == 4 * (1 + 10 * 1 + 4 * 3 + 2) and max(sizes) == 10  # heaps, an image of each
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("satlib.universal.AT_ONCE", 3 * 48)
        patch.setattr("satlib.attacks.AT_ONCE", 3 * 48)
        sizes.clear()
        parts = aimed_pgd(model, x, labels, **given | {"generator": seeded()})
    handle.remove()
    assert max(sizes) <= 6 and parts.shape == whole.shape and parts.abs().max() <= 8


def test_going_on_aims_at_where_the_start_leads_however_many_classes():
    weights, x = torch.randn(24, math.prod(SHAPE), generator=seeded(3)), images_like(12, low=125.0, high=131.0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), 24, bias=False))
    model[1].weight.data.copy_(weights)
    given = {"start": 60 * weights[23].sign().view(1, *SHAPE), "candidates": 2, "steps": 2, "batch_size": 4}
    before = spend(0)
    found = aimed_pgd(model, x, torch.zeros(12, dtype=torch.long), eps=[60.0], generator=seeded(), **given)
    assert classes_under(model, found) == [23] and spend(0) - before == 2 * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": [0.7]}, r"targets=\[0.7\]: expected classes from 0 to 2, or maps of them"),
        ({"targets": 3}, "targets=3: expected classes"),
        ({"targets": [-1]}, r"targets=\[-1\]: expected classes"),
        ({"scenes": -1}, "scenes=-1: expected a whole number of at least 0"),
        ({"candidates": 0}, "candidates=0: expected a whole number of at least 1"),
        ({"start": torch.zeros(2, *SHAPE)}, "start of shape"),
    ],
)
def test_aiming_names_what_is_wrong(three_class, changes, message):
    x, y = images_like(12, low=125.0, high=131.0), torch.zeros(12, dtype=torch.long)
    with pytest.raises(SatlibError, match=message):
        aimed_pgd(three_class, x, y, eps=[60.0], steps=2, batch_size=4, **changes)
    found = aimed_pgd(three_class, x, y, targets=2, eps=[60.0], steps=10, batch_size=4, generator=seeded())
    assert classes_under(three_class, found) == [2]


def test_the_ensemble_fits_its_mini_batches_to_the_images_and_its_steps_to_the_effort():
    plain, aimed, margin = ensemble(5000)
    assert [name_of(each) for each in (plain, aimed, margin)] == ["SGA", "aimed", "margin"]
    for each in (plain, aimed, margin):
        own = options(each)
        assert own["batch_size"] == 64 and own["inner"] == 4 and own["straight_through"]
        assert (own["beta"], own["gamma"]) == ((20, 0.975) if each is plain else (40, 0.95))
        assert own.get("loss_threshold") is None and own.get("larger", 1) == 1
    assert options(margin)["loss"] == "margin" and options(plain)["loss"] == "cross-entropy"
    assert [name_of(each) for each in ensemble(20, segmentation=True, targeted=True)] == ["SGA", "margin"]
    assert {options(each)["batch_size"] for each in ensemble(20)} == {20}
    assert [options(each)["steps"] for each in ensemble(5000, effort=0.1)] == [5, 8, 8]
    scored = {
        effort: {options(each)["score_images"] for each in ensemble(5000, effort=effort)}
        for effort in (0.1, 0.25, 1, 2)
    }
    assert scored == {0.1: {64}, 0.25: {128}, 1: {512}, 2: {512}}
    twice = [options(each)["steps"] for each in ensemble(5000, effort=2)]
    assert twice == [2 * options(each)["steps"] for each in (plain, aimed, margin)]
    for each, stretched in zip((plain, aimed, margin), ensemble(5000, effort=2), strict=True):  # between the same sizes
        short, long = (
            annealed_step_sizes(1.0, **{n: options(a)[n] for n in ("steps", "beta", "gamma")})
            for a in (each, stretched)
        )
        assert long[0] == pytest.approx(short[0], rel=0.03) and long[-1] == pytest.approx(short[-1], rel=0.06)


def test_the_ensemble_scans_by_the_effort_and_takes_few_scenes():
    assert [options(ensemble(5000, effort=effort)[1])["scan"] for effort in (0.1, 1, 2)] == [2, 8, 16]
    assert [options(each)["steps"] for each in ensemble(5000, effort=0.001)] == [2, 2, 2]
    assert {options(each)["score_images"] for each in ensemble(5000)} == {512} and options(ensemble(5000)[1])[
        "aims"
    ] == 2
    scenes = [ensemble(images, segmentation=True) for images in (4, 20)]
    assert [{options(each)["batch_size"] for each in attacks} for attacks in scenes] == [{4}, {8}]


def test_restarts_return_the_best_on_the_crafting_images(trained, tiny):
    part, common = (tiny.val.images[:64], tiny.val.labels[:64]), {"steps": 3, "batch_size": 8, "beta": 2.0}
    start = random_start((2, 3, 8, 8), 8.0, seeded(7))
    best = extended_pgd(trained, *part, eps=[8.0, 16.0], restarts=3, generator=seeded(), **common | {"steps": 9})
    each = universal_pgd(trained, *part, eps=[8.0] * 3 + [16.0] * 3, generator=seeded(), **common)
    rates = success_rates(trained, *part, each).view(2, 3)
    assert torch.equal(best, each.view(2, 3, 3, 8, 8)[torch.arange(2), rates.argmax(1)])
    warm = extended_pgd(trained, *part, eps=[8.0, 16.0], restarts=3, start=start, generator=seeded(), **common)
    assert warm.shape == best.shape and rates.std() > 0


# -------------------------------------------------------------------------------------- names and settings


def test_settings_are_plain_values_and_can_be_changed():
    for name, attack in ATTACKS.items():
        own = options(attack)
        assert json.loads(json.dumps(own)) == own and "eps" not in own and "targeted" not in own, name
        assert name_of(attack) == name_of(functools.partial(attack, steps=3)) == name
    assert options(ATTACKS["momentum"])["update"] == "momentum" and "update" not in options(ATTACKS["paper"])
    changed = options(named("momentum", steps=50))
    assert (
        changed
        == options(ATTACKS["momentum"]) | {"steps": 50}
        == options(functools.partial(ATTACKS["momentum"], steps=50))
    )
    assert name_of(named("restarts", steps=8)) == "restarts" and name_of(noise_signs) == "noise_signs"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("momentun", {}, r"attack='momentun': unknown; did you mean 'momentum'\?"),
        ("???", {}, r"attack='\?\?\?': unknown; known: paper, uncapped, hard targets"),
        ("paper", {"step": 3}, r"step=3: attack 'paper' has no such setting; did you mean 'steps'\?"),
        ("paper", {"update": "adam"}, r"update='adam': attack 'paper' has no such setting"),
        ("mean of signs", {"eps": 3}, r"eps=3: attack 'mean of signs' has no such setting; "),
    ],
)
def test_unknown_names_and_settings_are_named(name, changes, message):
    with pytest.raises(SatlibError, match=message) as error:
        named(name, **changes)
    assert "\n" not in str(error.value)


def test_a_setting_without_a_default_is_an_error():
    def incomplete(model, images, labels, *, eps, strength, generator=None):
        return images[: len(eps)]

    with pytest.raises(SatlibError, match="strength: attack 'incomplete' needs a default for it"):
        options(incomplete)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"update": "sgd"}, r"update='sgd': expected one of sign, momentum, adam"),
        ({"schedule": "linear"}, r"schedule='linear': expected one of geometric, cosine"),
        ({"loss": "hinge"}, r"loss='hinge': expected one of cross-entropy, margin"),
        ({"loss": "margin", "label_smoothing": 0.1}, r"label_smoothing=0\.1 with loss='margin'"),
        ({"dominant": True, "targeted": True}, r"dominant=True: only for untargeted"),
        ({"loss_threshold": 1.6, "targeted": True}, r"loss_threshold=1\.6 in a targeted attack"),
        ({"restarts": 0}, r"restarts=0: expected a whole number of at least 1"),
        ({"larger": 3}, r"batch_size=6: expected 1 to the number of images \(4\)"),
        ({"steps": 0}, r"steps=0: expected a whole number of at least 1"),
        ({"micro_batch": 0}, r"micro_batch=0: expected None, or a whole number of at least 1"),
        ({"eps": []}, r"eps=\[\]: expected a number, or at least one"),
        ({"eps": [8.0, 256.0]}, r"eps=256"),
    ],
)
def test_extended_pgd_names_what_is_wrong(two_class, changes, message):
    arguments = {"eps": 8.0, "steps": 2, "batch_size": 2} | changes
    with pytest.raises(SatlibError, match=message) as error:
        extended_pgd(two_class, images_like(4), torch.zeros(4, dtype=torch.long), **arguments)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------- beyond the paper's attack


def test_margin_is_positive_exactly_where_the_decision_is_another():
    logits = torch.randn(6, 4, 2, 3, generator=seeded())
    labels = torch.randint(4, (6, 2, 3), generator=seeded(1))
    labels[0, 0, 0] = IGNORE
    losses = margin_loss(logits, labels)
    assert losses[0, 0, 0] == 0
    known = labels != IGNORE
    assert torch.equal((losses > 0)[known], (logits.argmax(1) != labels)[known])
    assert margin_loss(logits, labels, loss_threshold=0.5).max() == 0.5
    by_hand = margin_loss(torch.tensor([[1.0, 4.0, 2.5]]), torch.tensor([2]))
    assert by_hand.tolist() == [1.5]
    many = F.one_hot(torch.tensor([7]), 300)  # of a classifier 255 is a class like any other
    assert margin_loss(many, torch.tensor([255])).tolist() == [1.0]


def test_straight_through_gradient_is_that_of_the_pixel_that_the_model_sees(two_class, direction):
    """x + xi leaves [0, 255] in the first half of the pixels: by the chain rule these have no gradient."""
    xi = torch.zeros(1, *SHAPE)
    outside = torch.arange(math.prod(SHAPE)).view(SHAPE) % 2 == 0
    xi[0, outside] = 200.0
    images, labels = images_like(1), torch.zeros(1, dtype=torch.long)
    options = {"sharedness": 1, "loss": margin_loss}
    exact, through = (
        heap_gradients(two_class, images, labels, xi, straight_through=through, **options)[0]
        for through in (False, True)
    )
    assert not exact[0, outside].any() and torch.equal(exact[0, ~outside], through[0, ~outside])
    torch.testing.assert_close(through[0].flatten(), direction / 100)
    assert torch.equal(perturb(images, xi, 1), perturb_straight_through(images, xi, 1))


def test_cosine_steps_have_the_same_sum_and_end_near_zero():
    sizes = cosine_step_sizes(10.0, 50, beta=4.0, gamma=0.5)
    assert math.fsum(sizes) == pytest.approx(40.0) and all(a > b for a, b in pairwise(sizes))
    assert sizes[25] == pytest.approx(sizes[0] / 2) and sizes[-1] < sizes[0] / 500


def test_adam_follows_what_pytorchs_does():
    weight = nn.Parameter(torch.zeros(2, *SHAPE))
    optimizer = torch.optim.Adam([weight], lr=1.0, betas=(MOMENTUM, SQUARES), eps=0.0, maximize=True)
    follow, place = Adam(), torch.zeros(2, *SHAPE)
    for step in range(5):
        weight.grad = torch.randn(2, *SHAPE, generator=seeded(step))
        optimizer.step()
        place = place + follow(weight.grad)
    torch.testing.assert_close(place, weight.detach())


def test_momentum_remembers_and_does_not_let_one_large_gradient_decide():
    follow, large = Momentum(), torch.full((1, *SHAPE), 1e6)
    assert all((follow(large) == 1).all() for _ in range(3))
    assert (follow(-large / 1e9) == 1).all()
    for _ in range(20):
        last = follow(-large / 1e9)
    assert (last == -1).all() and UPDATES["sign"]()(large - 1e6).abs().max() == 0


def test_dominant_attack_sends_images_to_fewer_classes_and_fools_as_many(trained, tiny):
    images, labels = tiny.val.images, tiny.val.labels
    found = {}
    for dominant in (False, True):
        xi = extended_pgd(trained, images, labels, eps=12.0, steps=40, dominant=dominant, generator=seeded())
        predicted = trained(perturb(tiny.test.images.float(), xi, len(tiny.test))).argmax(1)
        found[dominant] = (predicted == predicted.mode().values).float().mean().item()
    assert found[True] >= found[False] and found[True] > 0.5
    with pytest.raises(SatlibError, match="dominant=True"):
        extended_pgd(trained, images, labels.view(-1, 1, 1).expand(-1, 8, 8), eps=12.0, steps=4, dominant=True)


@pytest.mark.parametrize(
    "changes", [{"update": "momentum"}, {"update": "adam"}, {"schedule": "cosine"}, {"loss": "margin"}]
)
def test_stronger_attacks_stay_within_eps_and_fool(trained, tiny, changes):
    options = {"eps": [4.0, 16.0], "steps": 40, "generator": seeded()} | changes
    xi = extended_pgd(trained, tiny.val.images, tiny.val.labels, **options)
    assert xi.abs().amax((1, 2, 3)).tolist() == pytest.approx([4.0, 16.0], rel=1e-6)
    noise = torch.cat(
        [
            noise_signs(trained, tiny.val.images, tiny.val.labels, eps=[eps], generator=seeded(2)).sign() * eps
            for eps in (4.0, 16.0)
        ]
    )
    rates, random = (success_rates(trained, tiny.test.images, tiny.test.labels, each) for each in (xi, noise))
    assert rates[1] > random[1] + 0.2 and rates[1] >= rates[0]


# -------------------------------------------------------------------- every option, beside a slow reference of it


def slow_pgd(net, images, labels, *, eps, seed, steps=8, batch_size=4, **options):
    """`extended_pgd` for one eps and one snapshot, from the words of its docstring."""
    own = {"update": "sign", "schedule": "geometric", "loss": "cross-entropy", "straight_through": True} | options
    generator = seeded(seed)
    xi = own.get("start")
    xi = (torch.rand((1, *images.shape[1:]), generator=generator) * 2 - 1) * eps if xi is None else xi
    larger, inner = own.get("larger", 1), own.get("inner", 1)
    steps, batch_size = steps // larger, batch_size * larger
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(steps)])  # whole passes
    geometric = own["schedule"] == "geometric"
    weights = [0.9**k if geometric else 1 + math.cos(math.pi * k / steps) for k in range(steps)]
    mean, square, aim, since = 0.0, 0.0, None, 0
    for k, chosen in enumerate(order.split(batch_size)[:steps]):
        if own.get("dominant") and k == -(-steps // 4):  # aim where most of what is fooled so far goes
            few = torch.randperm(len(images), generator=generator)[:64]
            predicted = net((images[few] + xi).clamp(0, 255)).argmax(1)
            aim, mean, square, since = predicted[predicted != labels[few]].mode().values, 0.0, 0.0, 0
        alpha = 3.0 * eps * weights[k] / sum(weights)
        at, gradients = xi, []
        for part in chosen.split(-(-batch_size // inner)):
            seen = (images[part] + at).clamp(0, 255).requires_grad_()
            logits = net(seen)
            goal = labels[part] if aim is None else aim.expand(len(part))
            if own["loss"] == "margin":
                shown = F.one_hot(goal, logits.shape[1]).bool()
                losses = logits.masked_fill(shown, -math.inf).amax(1) - logits[shown]
            else:
                smoothing = own.get("label_smoothing", 0.0) if aim is None else 0.0
                losses = F.cross_entropy(logits, goal, reduction="none", label_smoothing=smoothing)
            if own.get("loss_threshold") and aim is None:
                losses = losses.clamp(max=own["loss_threshold"])
            losses = losses if aim is None and not own.get("targeted") else -losses
            (each,) = torch.autograd.grad(losses.sum(), seen)
            inside = (images[part] + at >= 0) & (images[part] + at <= 255)
            gradients.append((each if own["straight_through"] else each * inside).sum(0, keepdim=True))
            at = (at + alpha * gradients[-1].sign()).clamp(-eps, eps)
        direction, since = sum(gradients), since + 1
        if own["update"] == "momentum":
            mean = 0.9 * mean + 0.1 * direction / direction.abs().mean()
            direction = mean
        if own["update"] == "adam":
            mean, square = 0.9 * mean + 0.1 * direction, 0.99 * square + 0.01 * direction**2
            direction = (mean / (1 - 0.9**since)) / (square / (1 - 0.99**since)).sqrt()
        else:
            direction = direction.sign()
        xi = (xi + alpha * direction).clamp(-eps, eps)
    return xi


OPTIONS = {
    "as it is": {},
    "momentum": {"update": "momentum"},
    "Adam": {"update": "adam"},
    "cosine": {"schedule": "cosine"},
    "margin": {"loss": "margin"},
    "through the clamp": {"straight_through": False},
    "capped": {"loss_threshold": 1.2},
    "soft targets": {"label_smoothing": 0.3},
    "dominant": {"dominant": True},
    "dominant, the cap gone": {"dominant": True, "loss_threshold": 1.2},
    "dominant, momentum anew": {"dominant": True, "update": "momentum"},
    "dominant, hard targets": {"dominant": True, "label_smoothing": 0.3},
    "dominant, margin": {"dominant": True, "loss": "margin"},
    "dominant, through the clamp": {"dominant": True, "straight_through": False},
    "dominant, inner": {"dominant": True, "inner": 2},
    "targeted": {"targeted": True},
    "targeted, margin": {"targeted": True, "loss": "margin"},
    "start": {"start": torch.full((1, 3, 8, 8), 30.0)},
    "larger": {"larger": 2},
    "inner": {"inner": 3},
    "margin, capped, inner": {"loss": "margin", "loss_threshold": 0.5, "inner": 2},
    "momentum, inner": {"update": "momentum", "inner": 2},
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_every_option_changes_what_it_says(name, trained, tiny):
    """Images near black and white, so that it matters how the clamp is passed."""
    images = ((tiny.val.images[:64].float() - 128) * 3 + 128).clamp(0, 255)
    labels, given = tiny.val.labels[:64], {"eps": 40.0, "steps": 8, "batch_size": 4}
    with attackable(trained) as net:
        expected, plain = (slow_pgd(net, images, labels, seed=5, **given, **more) for more in (OPTIONS[name], {}))
    more = OPTIONS[name] | {"beta": 3.0, "gamma": 0.9, "snapshots": 1, "score_images": 64}
    found = extended_pgd(trained, images, labels, generator=seeded(5), **given, **more)
    far = 0.05  # share of the pixels whose gradient is so small that rounding may turn its sign

    def apart(one, other):
        return ((one - other).abs() > 1e-3).float().mean().item()

    assert apart(found, expected) < far
    assert not OPTIONS[name] or apart(expected, plain) > 2 * far


def test_each_size_goes_on_from_its_own_start_towards_its_own_dominant_class(trained, tiny):
    """Two sizes at once are what each is alone: their starts send images into different classes."""
    part, given = (tiny.val.images[:64], tiny.val.labels[:64]), {"steps": 16, "batch_size": 8, "dominant": True}
    starts = [
        aimed_pgd(trained, *part, targets=aim, eps=[24.0], steps=20, batch_size=16, generator=seeded())
        for aim in (0, 1)
    ]
    sent = [trained(perturb(part[0].float(), xi)).argmax(1).mode().values.item() for xi in starts]
    assert sent == [0, 1]
    both = extended_pgd(
        trained, *part, eps=[24.0, 30.0], start=torch.cat(starts), generator=seeded(3), restarts=2, **given
    )
    for xi, eps, begun in zip(both.split(1), (24.0, 30.0), starts, strict=True):
        alone = given | {"steps": 8}
        expected = extended_pgd(trained, *part, eps=[eps], start=begun, generator=seeded(3), **alone)
        assert ((xi - expected).abs() > 1e-3).float().mean() < 0.05
    assert ((both[0] - both[1]).abs() > 1e-3).float().mean() > 0.2


def test_the_dominant_class_is_that_of_as_many_images_as_are_scored(trained, tiny, monkeypatch):
    seen, given = [], {"steps": 4, "batch_size": 8, "dominant": True, "score_images": 20}

    def counted(net, images, labels, xi):
        seen.append((len(images), len(labels)))
        return torch.tensor(0)

    monkeypatch.setattr("satlib.universal._dominant_class", counted)
    extended_pgd(trained, tiny.val.images, tiny.val.labels, eps=[8.0, 12.0], generator=seeded(), **given)
    assert seen == [(20, 20)] * 2


def test_restarts_of_a_targeted_attack_are_chosen_by_what_hits_the_target(trained, tiny):
    x, aim = tiny.val.images[:64], torch.full((64,), 2)
    common = {"steps": 3, "batch_size": 8, "beta": 2.0, "targeted": True}
    best = extended_pgd(trained, x, aim, eps=[9.0], restarts=3, generator=seeded(), **common | {"steps": 9})
    each = universal_pgd(trained, x, aim, eps=[9.0] * 3, generator=seeded(), **common)
    hits = success_rates(trained, x, aim, each, targeted=True)
    assert hits.std() > 0 and torch.equal(best[0], each[hits.argmax()])


def test_votes_pass_the_clamp_only_where_they_are_told(two_class):
    """All pixels are white: where the start is above 0, nothing can be voted but straight through."""
    white, labels = images_like(6, low=255.0, high=255.0), torch.zeros(6, dtype=torch.long)
    start = random_start((1, *SHAPE), 40.0, seeded())
    for through in (False, True):
        given = {"eps": [40.0], "steps": 1, "batch_size": 3, "generator": seeded()}
        moved = mean_of_signs(two_class, white, labels, straight_through=through, **given) != start
        assert moved[start < 0].all() and bool(moved[start > 0].any()) == through


def test_a_preset_goes_through_the_clamp(two_class):
    white, start = images_like(6, low=255.0, high=255.0), torch.full((1, *SHAPE), 40.0)
    labels, moved = two_class(white).argmax(1), {}
    for name in ("paper", "clamped gradient"):
        attack = named(name, steps=4, batch_size=3, snapshots=1)
        moved[name] = not torch.equal(attack(two_class, white, labels, eps=[40.0], start=start), start)
    assert moved == {"paper": True, "clamped gradient": False}


def test_snapshots_are_spread_over_the_second_half_and_the_best_and_latest_returned(two_class, monkeypatch):
    scored, rates = [], iter([0.5, 0.75, 0.75, 0.25])

    def rated(net, images, labels, xi, *, targeted=False):
        scored.append(xi.mean().item())
        return torch.tensor([next(rates)])

    def path(net, images, labels, xi, minibatches, step_sizes, **options):
        yield from (torch.full_like(xi, float(k)) for k in range(1, 1 + len(minibatches)))

    monkeypatch.setattr("satlib.attacks.success_rates", rated)
    given = {"eps": 50.0, "steps": 40, "batch_size": 2, "snapshots": 4, "path": path}
    found = universal_pgd(two_class, images_like(4), torch.zeros(4, dtype=torch.long), **given)
    assert scored == [25.0, 30.0, 35.0, 40.0] and (found == 35).all()
