"""Training: both loops against slow references, resuming, schedules, settings and the errors they promise."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from satlib.data import ImageSet
from satlib.errors import SatlibError
from satlib.risks import heap_risk
from satlib.training import (
    ERM,
    Adversary,
    SharedAdversarialTraining,
    Training,
    accuracy,
    heap_starts,
    learning_rate_at,
    shared_adversarial_loss,
    train,
)

pytestmark = pytest.mark.usefixtures("float32")
KAPPA = -math.log(0.2)
SHORT = Training(epochs=3, batch_size=24, learning_rate=0.02, milestones=(2,), epoch_images=60)
SHARED = replace(SHORT, sigma=0.6, eps=8.0, sharedness=5, steps=2, relative_step_size=0.7)


def assert_equal_tensors(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


class Unaugmented:
    """The set as it is: the classes of `tiny` are patterns in their places, which crops and flips would destroy."""

    def __init__(self, data: ImageSet):
        self.data = data

    def __len__(self):
        return len(self.data)

    def batches(self, batch_size, *, augment, **options):
        return self.data.batches(batch_size, **options)


class Recorder(nn.Module):
    """A linear model that notes every batch that it sees in training."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 4)
        self.seen = []

    def forward(self, x):
        if self.training:
            self.seen.append(x.detach().clone())
        return self.head(x.mean((2, 3)) / 64 - 2)


@pytest.fixture
def numbered() -> ImageSet:
    """Image i is all i: whatever the crop, a batch tells which images it holds."""
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(100, 3, 8, 8)
    return ImageSet(images, torch.arange(100) % 4, ("a", "b", "c", "d"), "numbered", "Numbered", "train")


# --------------------------------------------------------------------------------------------- ERM, sigma = 0


@pytest.mark.parametrize("nesterov", [False, True])
def test_erm_equals_a_plain_loop(resnet, tiny, nesterov):
    settings = replace(SHORT, epochs=2, milestones=(1,), weight_decay=1e-3, nesterov=nesterov, epoch_images=0)
    data = tiny.train.first(60)
    model, reference = resnet(), resnet()
    history = train(model, data, settings)

    optimizer = torch.optim.SGD(reference.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3, nesterov=nesterov)
    losses = []
    for epoch in range(2):
        reference.train()
        generator = torch.Generator().manual_seed(epoch)  # settings.seed is 0
        for x, y in data.batches(24, generator=generator, augment=True):
            optimizer.param_groups[0]["lr"] = 0.02 if epoch == 0 else 0.002
            logits = reference(x)
            soft = F.one_hot(y, 4) * 0.9 + 0.1 / 4
            loss = -(soft * logits.log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append((epoch, loss.item() * len(x)))
    for (name, ours), theirs in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    means = [sum(loss for e, loss in losses if e == epoch) / 60 for epoch in range(2)]
    assert [entry["epoch"] for entry in history] == [1, 2]
    assert [entry["loss"] for entry in history] == pytest.approx(means, rel=1e-4)
    assert not torch.equal(model.head.weight, resnet().head.weight)


def test_settings_of_the_attack_mean_nothing_without_sigma(resnet, tiny):
    one, other = resnet(), resnet()
    train(one, tiny.train, replace(SHORT, epochs=1))
    train(other, tiny.train, replace(SHARED, epochs=1, sigma=0.0))
    assert_equal_tensors(one.state_dict(), other.state_dict())


def test_seed_decides_everything(resnet, tiny):
    def weights(seed):
        model = resnet()
        train(model, tiny.train, replace(SHARED, epochs=1, seed=seed))
        return model.state_dict()

    assert_equal_tensors(weights(1), weights(1))
    assert not torch.equal(weights(1)["head.weight"], weights(2)["head.weight"])


# ------------------------------------------------------------------------------------ shared, s heaps, sigma > 0


@pytest.mark.parametrize("sigma", [0.3, 1.0])
@pytest.mark.parametrize("cap", [None, 1.0])
@pytest.mark.parametrize("sharedness", [1, 5, 40])
def test_shared_loss_equals_the_equation(resnet, tiny, sigma, cap, sharedness):
    """sigma L(x + xi, y) + (1 - sigma) L(x, y): the attack on each heap alone, in eval mode, its losses capped;
    then both halves in one forward pass of the model in training mode, and nothing capped."""
    model = resnet().double().train()
    x, y = (tiny.train.images[:12].float() * 2.2 - 154).clamp(0, 255), tiny.train.labels[:12]
    assert ((x == 0) | (x == 255)).float().mean() > 0.02  # x + xi is clamped, there
    s = min(sharedness, 12)  # a last mini-batch can be smaller than the sharedness
    settings = replace(SHARED, sigma=sigma, sharedness=sharedness, loss_threshold=cap, steps=3, batch_size=64)

    attacked, heaps = copy.deepcopy(model).eval(), -(-12 // s)
    start = (torch.rand(heaps, 3, 8, 8, generator=torch.Generator().manual_seed(4)) * 2 - 1) * 8
    each, capped = [], 0
    for heap in range(heaps):
        part, xi = slice(heap * s, (heap + 1) * s), start[heap]
        for _ in range(3):
            xi = xi.detach().requires_grad_()
            logits = attacked((x[part] + xi).clamp(0, 255)).float()
            losses = F.cross_entropy(logits, y[part], reduction="none", label_smoothing=0.1)
            if cap is not None:
                capped += (losses > cap).sum()
                losses = losses.clamp(max=cap)
            (gradient,) = torch.autograd.grad(losses.sum(), xi)
            xi = (xi + 0.7 * 8 * gradient.sign()).clamp(-8, 8)
        each += [xi.detach()] * len(x[part])
    expected_model = copy.deepcopy(model)
    logits = expected_model(torch.cat([(x + torch.stack(each)).clamp(0, 255), x]))
    halves = [F.cross_entropy(half, y, label_smoothing=0.1) for half in (logits[:12], logits[12:])]
    expected = sigma * halves[0] + (1 - sigma) * halves[1]

    loss = shared_adversarial_loss(model, x, y, settings, *heap_starts(x, settings, torch.Generator().manual_seed(4)))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(halves[0].item() - halves[1].item()) > 0.01
    if cap is not None:
        assert capped > 0 and expected > cap  # a capped training loss would show
    loss.backward()
    expected.backward()
    for ours, theirs in zip(model.parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert_equal_tensors(dict(model.named_buffers()), dict(expected_model.named_buffers()))
    assert model.training


def test_shared_training_takes_the_steps_of_the_shared_loss(resnet, tiny):
    settings = replace(SHARED, epochs=2, milestones=(), epoch_images=60)
    model, reference = resnet(), resnet()
    history = train(model, tiny.train, settings)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.02, momentum=0.9)
    for epoch in range(2):
        reference.train()
        generator = torch.Generator().manual_seed(epoch)
        for x, y in tiny.train.batches(24, generator=generator, augment=True, limit=60):
            loss = shared_adversarial_loss(reference, x, y, settings, *heap_starts(x, settings, generator))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for (name, ours), theirs in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    assert len(history) == 2


@pytest.mark.parametrize(("settings", "default"), [(SHORT, ERM), (SHARED, SharedAdversarialTraining)])
def test_the_loss_is_that_of_the_adversary_that_sigma_asks_for(resnet, tiny, settings, default):
    one, other, settings = resnet(), resnet(), replace(settings, epochs=1)
    assert train(one, tiny.train, settings) == train(other, tiny.train, settings, adversary=default())
    assert_equal_tensors(one.state_dict(), other.state_dict())


def test_an_adversary_needs_nothing_but_a_loss(resnet, tiny):
    """Training against it is training on what it makes; of it, nothing is kept."""

    class Darker(Adversary):
        def loss(self, model, images, labels, settings):
            return ERM().loss(model, images - 10, labels, settings)

    class Dark(Unaugmented):
        def batches(self, *args, augment, **options):
            return ((x - 10, y) for x, y in self.data.batches(*args, **options))

    one, other, state = resnet(), resnet(), {}
    keep = {"after_epoch": lambda found, _: state.update(found)}
    train(one, Unaugmented(tiny.train), replace(SHORT, epochs=1), adversary=Darker(), **keep)
    train(other, Dark(tiny.train), replace(SHORT, epochs=1))
    assert_equal_tensors(one.state_dict(), other.state_dict())
    assert {name.partition(".")[0] for name in state} == {"model", "velocity"}


def test_shared_training_makes_a_model_more_robust(trained, tiny):
    """What all of this is for: under the same attack, a smaller risk than after as many steps of ERM."""
    settings = Training(epochs=3, batch_size=64, learning_rate=0.05, milestones=(), eps=10.0, sharedness=16, steps=3)
    attack = {"eps": 10.0, "steps": 10, "step_size": 3.0, "sharedness": 16}
    risks = []
    for sigma in (0.0, 0.7):
        model = copy.deepcopy(trained)
        train(model, Unaugmented(tiny.train), replace(settings, sigma=sigma))
        generator = torch.Generator().manual_seed(0)
        risks.append(heap_risk(model, tiny.test.images, tiny.test.labels, generator=generator, **attack))
        assert accuracy(model, tiny.test) > 0.9
    assert risks[1].loss < 0.8 * risks[0].loss
    assert risks[1].error < risks[0].error


# ----------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("settings", [SHORT, SHARED], ids=["ERM", "shared"])
@pytest.mark.parametrize("stop", [1, 2])
def test_resumed_training_is_bit_equal(resnet, tiny, settings, stop):
    saved = []

    def save(state, history):
        saved.append(({name: value.clone() for name, value in state.items()}, copy.deepcopy(history)))

    whole = resnet()
    history = train(whole, tiny.train, settings, after_epoch=save)
    assert [len(entries) for _, entries in saved] == [1, 2, 3] and history == saved[-1][1]
    full, saved = saved, []
    state, past = full[stop - 1]
    before, resumed = {name: value.clone() for name, value in state.items()}, resnet(seed=9)
    again = train(resumed, tiny.train, settings, state=state, history=past, after_epoch=save)
    assert again == history and len(past) == stop and len(saved) == 3 - stop
    assert_equal_tensors(resumed.state_dict(), whole.state_dict())
    assert_equal_tensors(saved[-1][0], full[-1][0])  # momenta, too
    assert_equal_tensors(state, before)
    assert {name for name in state if name.startswith("velocity.")} == {
        f"velocity.{name}" for name, _ in whole.named_parameters()
    }
    assert any(value.any() for name, value in state.items() if name.startswith("velocity."))


def test_finished_training_has_nothing_left_to_resume(resnet, tiny):
    model, last = resnet(), {}
    history = train(model, tiny.train, SHORT, after_epoch=lambda state, _: last.update(state))
    resumed = resnet(seed=9)
    assert train(resumed, tiny.train, SHORT, state=last, history=history) == history
    assert_equal_tensors(resumed.state_dict(), model.state_dict())
    assert not resumed.training


def test_progress_counts_iterations_up_to_all_of_them(resnet, tiny):
    said = []
    train(resnet(), tiny.train, SHORT, progress=lambda text, done: said.append((text, done)))
    assert [text for text, _ in said] == [f"epoch {epoch}/3" for epoch in (1, 2, 3) for _ in range(3)]
    assert [done for _, done in said] == pytest.approx([k / 9 for k in range(1, 10)])


# ------------------------------------------------------------------------------------------ epochs, schedules


def test_epoch_images_are_drawn_anew_each_epoch(numbered):
    model = Recorder()
    train(model, numbered, Training(epochs=3, batch_size=16, epoch_images=40, milestones=()))
    assert [len(batch) for batch in model.seen] == [16, 16, 8] * 3
    epochs = torch.cat([batch[:, 0, 0, 0] for batch in model.seen]).view(3, 40)
    assert all(len(set(epoch.tolist())) == 40 for epoch in epochs)
    assert len({frozenset(epoch.tolist()) for epoch in epochs}) == 3


@pytest.mark.parametrize("epoch_images", [0, 100, 5000])
def test_epoch_of_all_images_holds_each_once(numbered, epoch_images):
    model = Recorder()
    train(model, numbered, Training(epochs=1, batch_size=16, epoch_images=epoch_images))
    assert sorted(torch.cat(model.seen)[:, 0, 0, 0].tolist()) == list(range(100))


def test_model_ends_in_eval_mode_and_saw_training_mode(resnet, tiny):
    model = resnet().eval()
    before = model.stem[1].running_mean.clone()
    train(model, tiny.train, replace(SHORT, epochs=1))
    assert not any(module.training for module in model.modules())
    assert not torch.equal(model.stem[1].running_mean, before)


def test_learning_rate_by_steps():
    settings = Training(epochs=10, learning_rate=0.5, milestones=(4, 8))
    rates = [learning_rate_at(settings, epoch) for epoch in (0, 3.99, 4, 7.5, 8, 9.9)]
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005, 0.005])


def test_learning_rate_in_one_cycle():
    settings = Training(epochs=10, learning_rate=0.8, schedule="one-cycle", warm_up=0.25)
    rates = [learning_rate_at(settings, epoch) for epoch in (0, 1.25, 2.5, 6.25, 10)]
    assert rates == pytest.approx([0, 0.4, 0.8, 0.4, 0])
    cold = replace(settings, warm_up=0.0)
    assert [learning_rate_at(cold, epoch) for epoch in (0, 5, 10)] == pytest.approx([0.8, 0.4, 0])


def test_learning_rate_is_set_for_every_mini_batch(numbered, monkeypatch):
    """One-cycle over 2 epochs of 3 mini-batches: the k-th of the 6 is trained at k / 6 of the way."""
    rates = []
    step = torch.optim.SGD.step

    def spying(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", spying)
    settings = Training(epochs=2, batch_size=40, schedule="one-cycle", warm_up=0.5, learning_rate=0.6, epoch_images=100)
    train(Recorder(), numbered, settings)
    assert rates == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.4, 0.2])


# --------------------------------------------------------------------------------------------- settings, errors


@pytest.mark.parametrize(
    "settings",
    [
        Training(),
        SHORT,
        SHARED,
        replace(SHARED, loss_threshold=None, seed=7, nesterov=True),
        Training(schedule="one-cycle", warm_up=0.1, weight_decay=5e-4),
        replace(SHARED, schedule="one-cycle"),
    ],
)
def test_config_goes_there_and_back(settings):
    again = Training.from_config(settings.config())
    assert again.config() == settings.config()
    assert settings.schedule != "step" or again.milestones == settings.milestones
    assert settings.sigma == 0 or replace(again, milestones=()) == replace(settings, milestones=())


def test_config_names_only_what_matters():
    """It is part of a run's identity: what changes nothing must not change it."""
    attack = {"eps", "sharedness", "steps", "relative_step_size", "loss_threshold"}
    assert not attack & Training(eps=4.0).config().keys()
    assert attack < SHARED.config().keys()
    assert Training().config() == replace(SHARED, **{**Training().__dict__, "eps": 3.0, "steps": 9}).config()
    assert "warm_up" not in Training().config() and "milestones" in Training().config()
    one_cycle = Training(schedule="one-cycle").config()
    assert "warm_up" in one_cycle and "milestones" not in one_cycle
    assert isinstance(Training().config()["milestones"], list)  # as JSON has it


def test_unknown_setting_is_an_error():
    with pytest.raises(
        SatlibError, match="unknown training setting 'epoch': expected some of batch_size, epoch_images"
    ):
        Training.from_config({"epoch": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": -1}, r"epochs=-1: expected a whole number of at least 0"),
        ({"epochs": 1.5}, r"epochs=1\.5: expected a whole number"),
        ({"batch_size": 0}, r"batch_size=0"),
        ({"sharedness": 0}, r"sharedness=0"),
        ({"sharedness": 129}, r"sharedness=129: expected at most batch_size \(128\)"),
        ({"steps": -1}, r"steps=-1"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0: expected a positive number"),
        ({"learning_rate": math.nan}, r"learning_rate=nan"),
        ({"relative_step_size": math.inf}, r"relative_step_size=inf"),
        ({"momentum": 1.0}, r"momentum=1\.0: expected a number in \[0, 1\)"),
        ({"label_smoothing": -0.1}, r"label_smoothing=-0\.1"),
        ({"warm_up": 1.0}, r"warm_up=1\.0: expected a number in \[0, 1\)"),
        ({"sigma": 1.1}, r"sigma=1\.1: expected a number in \[0, 1\]"),
        ({"eps": 256.0}, r"eps=256\.0: expected a number from 0 to 255"),
        ({"eps": math.nan}, r"eps=nan"),
        ({"weight_decay": -1e-4}, r"weight_decay=-0\.0001"),
        ({"schedule": "cosine"}, r"schedule='cosine': expected 'step' or 'one-cycle'"),
        ({"epoch_images": -1}, r"epoch_images=-1: expected a whole number of at least 0"),
        ({"nesterov": True, "momentum": 0.0}, r"nesterov=True: expected False, or momentum > 0"),
        ({"loss_threshold": 0.0}, r"loss_threshold=0\.0: expected a positive number, or None"),
    ],
)
def test_settings_name_what_is_wrong(changes, message):
    with pytest.raises(SatlibError, match=message):
        Training(**changes)


def test_divergence_is_an_error_that_names_epoch_and_mend(resnet, tiny):
    after = []
    with pytest.raises(SatlibError, match=r"the loss is (nan|inf) in epoch 1: .* lower learning_rate=1e\+30"):
        train(
            resnet(),
            tiny.train,
            replace(SHORT, learning_rate=1e30),
            after_epoch=lambda *state: after.append(state),
        )
    assert not after  # no state to resume from is handed out


# ------------------------------------------------------------------------------------------------- accuracy


def test_accuracy_equals_a_slow_loop(trained, tiny):
    wrong = replace(tiny.test, labels=(tiny.test.labels + (torch.arange(96) % 3 == 0)) % 4)
    with torch.no_grad():
        hits = [trained(x[None].float()).argmax().item() == y for x, y in zip(wrong.images, wrong.labels, strict=True)]
    for batch_size in (512, 7):
        assert accuracy(trained, wrong, batch_size=batch_size) == pytest.approx(sum(hits) / 96)
    assert 0.5 < sum(hits) / 96 < 0.8


def test_accuracy_leaves_the_model_as_it_was(resnet, tiny):
    model = resnet().train()
    model.stem.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured = accuracy(model, tiny.test)
    assert [module.training for module in model.modules()] == modes
    assert_equal_tensors(model.state_dict(), before)
    assert measured == accuracy(model.eval(), tiny.test)
    model.train()
    model.head = nn.Linear(1, 1)
    with pytest.raises(SatlibError, match="the model fails on 3x8x8 images: RuntimeError"):
        accuracy(model, tiny.test)
    assert all(module.training for module in model.modules())
