"""The baselines: what each trains against, when it renews it, and that training with it resumes bit-equal."""

import copy
import dataclasses
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import satlib.defenses
from satlib.attacks import heap_pgd, perturb, success_rates
from satlib.defenses import DEFENSES, DeepFoolUAD, FictitiousPlay, UniversalAdversarialTraining
from satlib.errors import SatlibError
from satlib.training import Training, mixed_loss, train
from satlib.universal import mean_of_signs

pytestmark = pytest.mark.usefixtures("float32")
SETTINGS = Training(epochs=3, batch_size=32, learning_rate=0.02, schedule="one-cycle", epoch_images=96, sigma=0.5)
QUICK = {
    "DeepFool UAD": {"pool_size": 2, "epochs_each": 2, "images_each": 16, "passes": 1, "batch_size": 8},
    "fictitious play": {"steps": 4, "batch_size": 16},
    "meta adversarial training": {"pool_size": 6, "candidates": 2},
    "pooled shared training": {"sharedness": 8, "pool_size": 6, "share": 1.0},
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(name, data, eps=16.0):
    return DEFENSES[name](data, eps=eps, **QUICK.get(name, {}))


@pytest.fixture
def batch(tiny):
    return tiny.train.images[:8].float(), tiny.train.labels[:8]


@pytest.mark.parametrize("name", list(DEFENSES))
def test_training_resumes_bit_equal(name, tiny, trained):
    """Stopped after any epoch and handed its state, in between two renewals of a pool as well."""
    states = []
    whole = copy.deepcopy(trained)
    train(
        whole,
        tiny.train,
        SETTINGS,
        adversary=build(name, tiny.train),
        after_epoch=lambda state, history: states.append(
            ({key: value.clone() for key, value in state.items()}, list(history))
        ),
    )
    for state, history in states[:2]:
        resumed = copy.deepcopy(trained)
        train(resumed, tiny.train, SETTINGS, adversary=build(name, tiny.train), state=state, history=history)
        for key, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), key


def loss_of(adversary, model, x, y, generator):
    return adversary.loss(model, x, y, SETTINGS, *adversary.draw(x, SETTINGS, generator))


@pytest.mark.parametrize("name", list(DEFENSES))
def test_perturbations_stay_within_eps_and_finding_them_leaves_the_model_alone(name, tiny, trained):
    model, adversary = copy.deepcopy(trained).train(), build(name, tiny.train, eps=9.0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adversary.start_epoch(model, 0, seeded())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    x, y = tiny.train.images[:16].float(), tiny.train.labels[:16]
    loss_of(adversary, model, x, y, seeded())
    if not adversary.state():
        pytest.skip("perturbs nothing")
    (found,) = adversary.state().values()
    if name == "class-wise training":  # found in the backward pass
        loss_of(adversary, model, x, y, seeded()).backward()
    assert 1 < found.abs().max() <= 9.0 and found.shape[1:] == x.shape[1:]


@pytest.mark.parametrize("name", ["DeepFool UAD", "fictitious play"])
def test_the_model_learns_to_resist_what_it_trains_against(name, tiny, trained):
    """On images that neither has seen. (Against perturbations found anew it hardly helps: the paper's point.)"""
    model, adversary, generator = copy.deepcopy(trained), build(name, tiny.train, eps=32.0), seeded()
    adversary.start_epoch(model, 0, generator)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.02, momentum=0.9)
    for _ in range(4):
        for x, y in tiny.train.batches(32, generator=generator):
            optimizer.zero_grad()
            loss_of(adversary, model, x, y, generator).backward()
            optimizer.step()
    test = (tiny.test.images, tiny.test.labels)
    before, after = (success_rates(net.eval(), *test, adversary.pool[:1]).item() for net in (trained, model))
    assert after < before / 2 and success_rates(model, *test, torch.zeros(1, 3, 8, 8)).item() < 0.05


# ------------------------------------------------------------------------------------------------ DeepFool UAD


def test_the_pool_is_made_anew_every_few_epochs_from_images_drawn_anew(tiny, trained):
    seen = []

    def craft(model, images, labels, *, eps, generator, **options):
        assert len(labels) == len(images)
        seen.append((images, eps, options))
        return torch.full((1, 3, 8, 8), float(len(seen)))

    said = []
    options = {"pool_size": 3, "epochs_each": 2, "images_each": 5, "passes": 4}
    adversary = DeepFoolUAD(tiny.train, eps=7.0, attack=craft, progress=said.append, **options)
    pools = []
    for epoch in range(4):
        adversary.start_epoch(trained, epoch, seeded(epoch))
        pools.append(adversary.pool[:, 0, 0, 0].tolist())
    assert pools == [[1, 2, 3], [1, 2, 3], [4, 5, 6], [4, 5, 6]]
    assert all(len(images) == 5 and eps == [7.0] and options == {"passes": 4} for images, eps, options in seen)
    assert not torch.equal(seen[0][0], seen[1][0])
    assert said[:3] == [f"universal perturbation {i}/3" for i in (1, 2, 3)]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_share_is_the_probability_of_being_perturbed(tiny, trained, batch, share):
    x, y = batch
    adversary = DeepFoolUAD(tiny.train, eps=7.0, share=share)
    adversary.pool = torch.full((2, 3, 8, 8), 7.0)
    loss = loss_of(adversary, trained, x, y, seeded())
    expected = F.cross_entropy(trained((x + 7 * share).clamp(0, 255)), y, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_half_of_many_samples_are_perturbed_and_all_of_the_pool_is_used(tiny, trained):
    many, seen = torch.full((4000, 3, 8, 8), 100.0), []
    adversary = DeepFoolUAD(tiny.train, eps=9.0)
    adversary.pool = torch.stack([torch.full((3, 8, 8), float(value)) for value in (2, 4, 6, 8)])

    class Spy(torch.nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.zeros(len(x), 4) + 0 * x.sum()

    loss_of(adversary, Spy(), many, torch.zeros(4000, dtype=torch.long), seeded())
    added = (seen[0][:, 0, 0, 0] - 100).round().int()
    counts = torch.bincount(added, minlength=9)[[0, 2, 4, 6, 8]]
    assert abs(counts[0] / 4000 - 0.5) < 0.04 and (abs(counts[1:] / 4000 - 0.125) < 0.03).all()


# --------------------------------------------------------------------------------------------- fictitious play


def test_every_sample_has_one_vote_a_pixel(linear, tiny):
    """Mean of signs, not sign of the mean: one huge gradient against two small ones loses the vote."""
    weight = torch.zeros(2, 192)
    weight[1] = 1.0
    model = linear(weight / 1000, bias=torch.tensor([0.0, -128 * 192 / 1000]))
    images, labels = tiny.train.images, tiny.train.labels.clamp(max=1)
    options = {"eps": 10.0, "steps": 1, "batch_size": 5}
    start = mean_of_signs(model, images, labels, relative_step_size=1e-9, generator=seeded(), **options)
    two = mean_of_signs(model, images, labels, relative_step_size=0.1, generator=seeded(), **options)
    generator = seeded()
    torch.rand(1, 3, 8, 8, generator=generator)
    chosen = labels[torch.randint(len(images), (5,), generator=generator)]
    votes = (1 - 2 * chosen.float()).mean()  # of a linear model: towards class 1 for class 0, and the other way round
    expected = (start + votes).clamp(-10, 10)
    assert two.shape == (1, 3, 8, 8)
    torch.testing.assert_close(two, expected, rtol=1e-4, atol=1e-4)


def test_the_best_response_fools_unseen_images(tiny, trained):
    xi = mean_of_signs(trained, tiny.val.images, tiny.val.labels, eps=30.0, steps=60, batch_size=32, generator=seeded())
    noise = 30.0 * torch.randn(1, 3, 8, 8, generator=seeded()).sign()
    rates = success_rates(trained, tiny.test.images, tiny.test.labels, torch.cat([xi, noise]))
    assert xi.abs().max() <= 30.0 and rates[0] > rates[1] + 0.3


def test_the_set_grows_by_one_response_an_epoch_and_each_is_met(tiny, trained, batch, monkeypatch):
    def response(model, images, labels, *, eps, generator):
        assert images is tiny.train.images and labels is tiny.train.labels and eps == [16.0]
        return torch.full((1, 3, 8, 8), float(len(added)))

    added, adversary = [], FictitiousPlay(tiny.train, eps=16.0, attack=response)
    for epoch in range(3):
        adversary.start_epoch(trained, epoch, seeded())
        added.append(epoch)
        assert len(adversary.pool) == epoch + 1
    met, generator = [], seeded()
    monkeypatch.setattr(satlib.defenses, "perturb", lambda x, xi: met.append((xi.mean().item(), len(xi))) or x)
    x, y = batch
    for _ in range(60):
        loss_of(adversary, trained, x, y, generator)
    assert {value for value, _ in met} == {0.0, 1.0, 2.0} and {count for _, count in met} == {1}


# -------------------------------------------------------------------------------- universal adversarial training


def test_one_ascent_step_a_mini_batch_on_one_perturbation_that_stays(tiny, trained, batch):
    x, y = batch
    adversary = UniversalAdversarialTraining(tiny.train, eps=8.0, relative_step_size=0.25)
    path = [adversary.pool.clone()]
    for epoch in (0, 0, 1, 1, 1):
        adversary.start_epoch(trained, epoch, seeded())
        loss = loss_of(adversary, trained, x, y, seeded())
        path.append(adversary.pool.clone())
    steps = [(after - before).abs() for before, after in pairwise(path)]
    assert all(step.max() <= 2.0 + 1e-5 for step in steps) and (steps[0] > 1.9).float().mean() > 0.9
    assert path[-1].abs().max() == 8.0
    expected = mixed_loss(trained, x, (x + adversary.pool).clamp(0, 255), y, SETTINGS)
    torch.testing.assert_close(loss, expected)


# ------------------------------------------------------------------------------------------------ later defences


def test_each_class_has_a_perturbation_that_the_training_pass_itself_moves(tiny, trained, batch):
    x, y = batch
    adversary = DEFENSES["class-wise training"](tiny.train, eps=8.0)
    start = 16 * torch.rand(adversary.pool.shape, generator=seeded()) - 8
    adversary.pool.copy_(start)
    seen = start.clone().requires_grad_()
    expected = mixed_loss(trained, x, (x + seen[y]).clamp(0, 255), y, SETTINGS)
    (gradient,) = torch.autograd.grad(expected, seen)
    loss = loss_of(adversary, trained, x, y, seeded())
    torch.testing.assert_close(loss, expected)
    assert torch.equal(adversary.pool, start)
    loss.backward()
    assert torch.equal(adversary.pool, (start + 2 * gradient.sign()).clamp(-8, 8))
    absent = sorted(set(range(len(tiny.train.classes))) - set(y.tolist()))
    assert torch.equal(adversary.pool[absent], start[absent]) and not torch.equal(adversary.pool, start)


def test_each_image_refines_its_worst_candidate_which_follows_by_a_share(tiny, trained, batch):
    x, y = batch
    adversary = DEFENSES["meta adversarial training"](tiny.train, eps=8.0, pool_size=4, rate=0.25)
    before = adversary.pool.clone()
    assert torch.equal(before.abs(), torch.full_like(before, 8.0)) and len(before.unique(dim=0)) == 4
    tried = torch.tensor([[2, 0, 2, 1, 0, 0, 1, 2], [0, 1, 1, 2, 2, 1, 0, 1]])  # two for each image; never the last
    losses = [F.cross_entropy(trained((x + before[each]).clamp(0, 255)), y, reduction="none") for each in tried]
    worst = torch.where(losses[0] > losses[1], *tried)
    assert len(set(worst.tolist())) > 1 and set(worst.tolist()) <= {0, 1, 2}
    xi = heap_pgd(trained, x, y, sharedness=1, start=before[worst], **attack(eps=8.0))
    settings = dataclasses.replace(SETTINGS, eps=8.0)
    loss = adversary.loss(trained, x, y, settings, tried)
    torch.testing.assert_close(loss, mixed_loss(trained, x, (x + xi).clamp(0, 255), y, settings))
    for place, moved in enumerate(adversary.pool):
        mine = xi[worst == place]
        towards = mine.mean(0) if len(mine) else before[place]
        torch.testing.assert_close(moved, before[place] + 0.25 * (towards - before[place]))
    shape = adversary.draw(x, settings, seeded())[0].shape
    assert shape == (5, 8)


def attack(**changes):
    return dataclasses.replace(SETTINGS, **changes).attack()


def test_the_penalty_is_the_jacobians_norm_on_average(linear, tiny, batch):
    x, y = batch
    weight = torch.randn(4, 192, generator=seeded()) / 255
    model = linear(weight)
    adversary = DEFENSES["Jacobian regularisation"](tiny.train, eps=6.0)
    clean = F.cross_entropy(model(x), y, label_smoothing=0.1)
    generator = seeded()
    penalties = [(loss_of(adversary, model, x, y, generator) - clean).item() for _ in range(300)]
    expected = SETTINGS.sigma * 0.5 * 36.0 * weight.square().sum().item()  # of a linear model J is its weights
    assert sum(penalties) / 300 == pytest.approx(expected, rel=0.05)
    model.requires_grad_()
    penalty = loss_of(adversary, model, x, y, generator) - F.cross_entropy(model(x), y, label_smoothing=0.1)
    gradients = torch.autograd.grad(penalty, model.parameters(), allow_unused=True)  # none for the bias
    assert any(each is not None and each.abs().sum() > 0 for each in gradients)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_heaps_go_on_from_the_pool_or_begin_anew(tiny, trained, share):
    x, y = tiny.train.images[:20].float(), tiny.train.labels[:20]
    options = {"sharedness": 8, "pool_size": 2, "share": share}
    adversary = DEFENSES["pooled shared training"](tiny.train, eps=8.0, **options)
    adversary.pool.copy_(16 * torch.rand(adversary.pool.shape, generator=seeded(1)) - 8)
    before, settings = adversary.pool.clone(), dataclasses.replace(SETTINGS, eps=8.0)
    start, places, again, aims = adversary.draw(x, settings, seeded())
    assert len(start) == len(aims) == 3 and sorted(places.tolist()) == [0, 1]
    begun = torch.cat([before[places], start[2:]]) if share else start
    xi = heap_pgd(trained, x, y, sharedness=8, start=begun, **settings.attack())
    loss = adversary.loss(trained, x, y, settings, start, places, again, aims)
    torch.testing.assert_close(loss, mixed_loss(trained, x, perturb(x, xi, 8), y, settings))
    assert torch.equal(adversary.pool[places], xi[:2] if share else before[places])


def test_heaps_may_be_as_strong_as_the_attack_that_measures(tiny, trained):
    x, y = tiny.train.images[:16].float(), tiny.train.labels[:16]
    options = {"sharedness": 8, "share": 0.0, "targeted": True, "straight_through": True}
    adversary = DEFENSES["pooled shared training"](tiny.train, eps=8.0, **options)
    settings = dataclasses.replace(SETTINGS, eps=8.0)
    start, *drawn, aims = adversary.draw(x, settings, seeded())
    strong = settings.attack() | {"straight_through": True, "loss_threshold": None, "targeted": True}
    xi = heap_pgd(trained, x, aims.repeat_interleave(8), sharedness=8, start=start, **strong)
    loss = adversary.loss(trained, x, y, settings, start, *drawn, aims)
    torch.testing.assert_close(loss, mixed_loss(trained, x, perturb(x, xi, 8), y, settings))


# --------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("DeepFool UAD", {"eps": 300.0}, r"eps=300\.0: expected a number from 0 to 255"),
        ("DeepFool UAD", {"share": 1.5}, r"share=1\.5: expected a probability"),
        ("DeepFool UAD", {"pool_size": 0}, r"pool_size=0: expected a whole number of at least 1"),
        ("DeepFool UAD", {"epochs_each": 0.5}, r"epochs_each=0\.5"),
        ("fictitious play", {"eps": -1.0}, r"eps=-1\.0"),
        (
            "universal adversarial training",
            {"relative_step_size": 0.0},
            r"relative_step_size=0\.0: expected a positive",
        ),
        ("class-wise training", {"relative_step_size": -1.0}, r"relative_step_size=-1\.0: expected a positive"),
        ("class-wise training", {"relative_step_size": math.inf}, r"relative_step_size=inf: expected a positive"),
        ("meta adversarial training", {"seed": -1}, r"seed=-1: expected a whole number"),
        ("fictitious play", {"step": 3}, r"step=3: attack 'mean_of_signs' has no such setting"),
        ("fictitious play", {"steps": 0}, r"steps=0: expected a whole number"),
        ("pooled shared training", {"targeted": "no"}, r"targeted='no': expected True or False"),
        ("pooled shared training", {"threshold": "no"}, r"threshold='no': expected True or False"),
        ("meta adversarial training", {"rate": 0.0}, r"rate=0\.0: expected a number in \(0, 1\]"),
        ("Jacobian regularisation", {"eps": -1.0}, r"eps=-1\.0"),
        ("pooled shared training", {"share": 2.0}, r"share=2\.0: expected a probability"),
        ("pooled shared training", {"sharedness": 0}, r"sharedness=0: expected a whole number"),
    ],
)
def test_a_defence_names_what_is_wrong(name, changes, message, tiny):
    with pytest.raises(SatlibError, match=message):
        DEFENSES[name](tiny.train, **({"eps": 8.0} | changes))
    with pytest.raises(SatlibError, match="steps=0: expected a whole number"):
        mean_of_signs(None, tiny.train.images, tiny.train.labels, eps=8.0, steps=0)


@pytest.mark.parametrize("name", ["class-wise training", "Jacobian regularisation", "pooled shared training"])
def test_a_defence_of_classes_takes_no_scenes(name, scenes):
    options = {"targeted": True} if name == "pooled shared training" else {}
    with pytest.raises(SatlibError, match=r"labels=Tensor of shape .*: expected one for each image"):
        DEFENSES[name](scenes.train, eps=8.0, **options)


def test_a_head_with_other_classes_is_named(tiny, trained):
    adversary = DEFENSES["Jacobian regularisation"](tiny.train, eps=8.0)
    x, y = tiny.train.images[:3].float(), tiny.train.labels[:3]
    with pytest.raises(SatlibError, match=r"the model returns \(3, 9\): expected \(3, 4\), one a class"):
        loss_of(adversary, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 9)), x, y, seeded())


def test_a_training_goes_on_only_from_its_own_state(tiny, trained):
    kept, settings = [], dataclasses.replace(SETTINGS, eps=8.0)
    options = {"adversary": build("meta adversarial training", tiny.train)}
    train(copy.deepcopy(trained), tiny.train, settings, **options, after_epoch=lambda *each: kept.append(each), until=1)
    ((state, history),) = kept
    for adversary in (None, DEFENSES["meta adversarial training"](tiny.train, eps=16.0, pool_size=7)):
        with pytest.raises(SatlibError, match="state"):
            train(copy.deepcopy(trained), tiny.train, settings, adversary=adversary, state=state, history=history)
    adam = dataclasses.replace(settings, optimizer="adam")
    with pytest.raises(SatlibError, match=r"state: mean.* does not fit"):
        train(copy.deepcopy(trained), tiny.train, adam, **options, state=state, history=history)
    for part in ({"state": state}, {"history": history}):
        with pytest.raises(SatlibError, match="state and history: expected both"):
            train(copy.deepcopy(trained), tiny.train, settings, **options, **part)


def test_what_would_not_defend_is_an_error(tiny, trained):
    for name in sorted(DEFENSES.keys() - {"DeepFool UAD"}):
        with pytest.raises(SatlibError, match=r"sigma=0.0: expected more than 0"):
            train(trained, tiny.train, Training(epochs=1), adversary=build(name, tiny.train))
    with pytest.raises(SatlibError, match=r"eps=0.0: expected more than 0"):
        train(trained, tiny.train, Training(epochs=1, sigma=0.5))
    settings = dataclasses.replace(SETTINGS, eps=8.0)
    for until in (-1, 4, 1.5):
        with pytest.raises(SatlibError, match=f"until={until}: expected"):
            train(trained, tiny.train, settings, until=until)
    with pytest.raises(SatlibError, match="adversary='fictitious play': expected an Adversary"):
        train(trained, tiny.train, settings, adversary="fictitious play")
