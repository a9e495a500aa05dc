"""Number formats: how one is chosen, and that the attacks keep their promises in the faster one."""

import time
from collections.abc import Iterator

import pytest
import torch

from satlib import precision
from satlib.attacks import attack_loss, attackable, heap_pgd, perturb, success_rates, universal_pgd
from satlib.errors import SatlibError
from satlib.precision import autocast, fastest_dtype
from satlib.training import Training, train

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture
def choose(monkeypatch) -> Iterator:
    """choose(value): sets SATLIB_PRECISION (None: unset) and forgets what was measured."""

    def set_to(value: str | None) -> None:
        monkeypatch.delenv("SATLIB_PRECISION", raising=False)
        if value is not None:
            monkeypatch.setenv("SATLIB_PRECISION", value)
        fastest_dtype.cache_clear()

    yield set_to
    fastest_dtype.cache_clear()


@pytest.mark.parametrize(("value", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_environment_variable_overrides_the_measurement(choose, value, dtype):
    choose(value)
    for device in ("cpu", "cuda", "mps"):
        assert fastest_dtype(device) is dtype


@pytest.mark.parametrize("value", ["float16", "BFLOAT16", "fastest"])
def test_unknown_format_is_an_error(choose, value):
    choose(value)
    with pytest.raises(SatlibError, match=rf"SATLIB_PRECISION='{value}': expected one of float32, bfloat16, or unset"):
        fastest_dtype("cpu")


def test_choice_is_made_once(choose, monkeypatch):
    choose("bfloat16")
    assert fastest_dtype("cpu") is torch.bfloat16
    monkeypatch.setenv("SATLIB_PRECISION", "float32")
    assert fastest_dtype("cpu") is torch.bfloat16
    fastest_dtype.cache_clear()
    assert fastest_dtype("cpu") is torch.float32


@pytest.mark.parametrize("gradients", [True, False])
def test_measurement_runs_and_decides_for_one_of_the_two(choose, gradients):
    """Scoring under `torch.no_grad` may be what needs the format first."""
    choose(None)
    with torch.set_grad_enabled(gradients):
        assert fastest_dtype("cpu") in (torch.float32, torch.bfloat16)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="float32 without a measurement there")
@pytest.mark.parametrize(
    ("seconds", "dtype"), [(0.5, torch.bfloat16), (0.9, torch.float32), (1.0, torch.float32), (3.0, torch.float32)]
)
def test_bfloat16_only_where_it_is_clearly_faster(choose, monkeypatch, seconds, dtype):
    """With a clock that only the measured passes move on: 1 s in float32, `seconds` in bfloat16."""
    clock = [0.0]

    def passes(*tensors):
        clock[0] += seconds if torch.is_autocast_enabled("cpu") else 1.0

    choose(None)
    monkeypatch.setattr(torch.autograd, "grad", passes)
    monkeypatch.setattr(precision.time, "thread_time", lambda: clock[0])
    assert fastest_dtype("cpu") is dtype


def test_devices_that_are_not_measured_stay_in_float32(choose):
    choose(None)
    assert fastest_dtype("meta") is torch.float32


@pytest.mark.parametrize(("value", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_autocast_runs_products_in_the_chosen_format(choose, value, dtype):
    choose(value)
    x = torch.ones(2, 2)
    with autocast(x.device):
        assert (x @ x).dtype is dtype
    assert (x @ x).dtype is torch.float32


def test_measurement_leaves_the_clock_alone():
    assert precision.time.thread_time is time.thread_time


def test_attacks_in_bfloat16_succeed_as_in_float32(choose, trained, tiny):
    """Perturbations stay float32 and within the bound, exactly; scored alike, they fool about as many."""
    images, labels, eps = tiny.test.images.float(), tiny.test.labels, 12.3
    found = {}
    for value in ("float32", "bfloat16"):
        choose(value)
        seed = torch.Generator().manual_seed(0)
        heap = heap_pgd(trained, images, labels, eps=eps, sharedness=8, steps=6, step_size=5.0, generator=seed)
        universal = universal_pgd(trained, tiny.val.images, tiny.val.labels, eps=[eps, 25.0], steps=30, generator=seed)
        assert heap.dtype == universal.dtype == torch.float32
        assert heap.abs().max() == torch.tensor(eps)
        assert torch.equal(universal.abs().amax((1, 2, 3)), torch.tensor([eps, 25.0]))
        found[value] = heap, universal
    assert not torch.equal(found["float32"][0], found["bfloat16"][0])  # the format did reach the model
    choose("float32")
    rates = {}
    for value, (heap, universal) in found.items():
        heap_rate = (trained(perturb(images, heap, 8)).argmax(1) != labels).float().mean()
        rates[value] = torch.stack([heap_rate, *success_rates(trained, images, labels, universal)])
    assert (rates["float32"] - rates["bfloat16"]).abs().max() < 0.1
    assert rates["float32"].min() > 0.3


def test_signs_of_gradients_agree_where_they_matter(choose, trained, tiny):
    """PGD steps by signs. Weighed by how much a pixel matters, hardly any sign depends on the format."""
    images, labels, gradients = tiny.test.images.float(), tiny.test.labels, {}
    for value in ("float32", "bfloat16"):
        choose(value)
        with attackable(trained) as net:
            x = images.clone().requires_grad_()
            with autocast(x.device):
                losses = attack_loss(net(x), labels)
            (gradients[value],) = torch.autograd.grad(losses.sum(), x)
    exact, rough = gradients["float32"], gradients["bfloat16"]
    agree = exact.sign() == rough.sign()
    weight = exact.abs() / exact.abs().sum((1, 2, 3), keepdim=True)
    assert not torch.equal(exact, rough) and agree.float().mean() > 0.9
    assert (weight * agree).sum((1, 2, 3)).mean() > 0.98
    large = exact.abs() > exact.abs().flatten(1).median(1).values.view(-1, 1, 1, 1)
    assert agree[large].float().mean() > 0.97


def test_eps_zero_changes_no_prediction_in_bfloat16(choose, trained, tiny):
    choose("bfloat16")
    images, labels = tiny.test.images.float(), tiny.test.labels
    xi = heap_pgd(trained, images, labels, eps=0.0, sharedness=1, steps=1, step_size=1.0)
    assert torch.equal(perturb(images, xi, 1), images)
    assert success_rates(trained, images, labels, xi[:1]) == success_rates(
        trained, images, labels, torch.zeros(1, 3, 8, 8)
    )


def test_training_in_bfloat16_learns(choose, resnet, tiny):
    """The weights stay float32; the loss falls as it does in float32."""
    settings = Training(epochs=2, batch_size=64, learning_rate=0.05, milestones=(), epoch_images=256)
    losses = {}
    for value in ("float32", "bfloat16"):
        choose(value)
        model = resnet()
        losses[value] = [entry["loss"] for entry in train(model, tiny.train, settings)]
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)
    assert losses["bfloat16"][1] < losses["bfloat16"][0]
