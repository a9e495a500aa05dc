"""The four risks: slow references, closed forms on a linear model, and the order that section 4.2 states."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from satlib.attacks import annealed_step_sizes, heap_pgd
from satlib.errors import SatlibError
from satlib.risks import Risk, adversarial_risk, expected_risk, heap_risk, risk_under, universal_risk

pytestmark = pytest.mark.usefixtures("float32")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_risk(model, images, labels, perturbations) -> Risk:
    """One image at a time, each with the perturbation at its own place."""
    loss = error = 0.0
    for x, y, xi in zip(images, labels, perturbations, strict=True):
        logits = model((x.float() + xi).clamp(0, 255)[None])
        loss += F.cross_entropy(logits, y[None]).item()
        error += float(logits.argmax(1).item() != y.item())
    return Risk(loss / len(images), error / len(images))


def assert_equal(risk: Risk, expected: Risk) -> None:
    assert risk.loss == pytest.approx(expected.loss, rel=1e-4)
    assert risk.error == expected.error


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [512, 5])
def test_risk_under_equals_a_slow_loop(trained, tiny, batch_size):
    """Heaps of 4 do not divide 18 images, and batches of 5 cut through heaps."""
    images, labels = tiny.test.images[:18].clone(), tiny.test.labels[:18]
    images[::3] = 0  # where x + xi has to be clamped
    xi = torch.empty(5, 3, 8, 8).uniform_(-30, 30, generator=seeded())
    each = torch.stack([xi[i // 4] for i in range(18)])
    expected = slow_risk(trained, images, labels, each)
    assert 0 < expected.error < 1
    assert_equal(risk_under(trained, images, labels, xi, 4, batch_size=batch_size), expected)


@torch.no_grad()
def test_expected_risk_is_the_mean_loss_on_clean_images(trained, tiny):
    images, labels = tiny.test.images, (tiny.test.labels + (torch.arange(96) % 5 == 0)) % 4
    risk = expected_risk(trained, images, labels)
    assert_equal(risk, slow_risk(trained, images, labels, torch.zeros(96, 3, 8, 8)))
    assert risk.error == pytest.approx(20 / 96, abs=0.05)
    assert risk.loss > -math.log(0.2)  # a fifth of the labels are wrong, and no loss is capped


def test_adversarial_risk_is_the_heap_risk_of_sharedness_one(trained, tiny):
    """Steps this large overshoot: the best iterate, which counts, is often not the last."""
    attack = {"eps": 12.0, "steps": 4, "step_size": 24.0}
    x, y = tiny.test.images[:16], tiny.test.labels[:16]
    one = adversarial_risk(trained, x, y, generator=seeded(), **attack)
    assert one == heap_risk(trained, x, y, sharedness=1, generator=seeded(), **attack)
    xi = heap_pgd(trained, x.float(), y, sharedness=1, keep_best=True, generator=seeded(), **attack)
    assert_equal(one, slow_risk(trained, x, y, xi))
    last = heap_pgd(trained, x.float(), y, sharedness=1, generator=seeded(), **attack)
    assert one.loss > risk_under(trained, x, y, last, 1).loss + 0.1


def test_threshold_and_smoothing_shape_the_attack_not_the_risk(trained, tiny):
    """The attack's losses are smoothed and capped at 0.5; the risk under what it found is neither."""
    x, y = tiny.test.images[:16], tiny.test.labels[:16]
    attack = {"eps": 12.0, "steps": 4, "step_size": 6.0, "loss_threshold": 0.5, "label_smoothing": 0.01}
    risk = heap_risk(trained, x, y, sharedness=4, generator=seeded(), **attack)
    xi = heap_pgd(trained, x.float(), y, sharedness=4, keep_best=True, generator=seeded(), **attack)
    assert_equal(risk, slow_risk(trained, x, y, xi.repeat_interleave(4, 0)))
    assert risk.loss > 0.5


def test_linear_model_has_the_risks_of_the_closed_form(linear):
    """rho_adv = E[log(1 + exp(-margin + eps |w|_1))]; for one class, the universal risk equals it."""
    w = torch.randn(1, 3 * 4 * 4, generator=seeded()) / 200
    weight = torch.cat([-w, w]) / 2
    model, eps = linear(weight, bias=-128 * weight.sum(1)), 10.0
    images = torch.empty(24, 3, 4, 4).uniform_(60, 190, generator=seeded(1))
    labels = torch.arange(24) % 2

    def expected(images, labels, eps):
        margins = (2 * labels - 1) * ((images.double() - 128).flatten(1) @ w[0].double())
        losses = F.softplus(-(margins - eps * w.abs().sum()))
        return losses.mean().item(), (margins < eps * w.abs().sum()).double().mean().item()

    heap = {"eps": eps, "steps": 8, "step_size": 4.0}
    clean, adversarial = expected_risk(model, images, labels), adversarial_risk(model, images, labels, **heap)
    assert (clean.loss, clean.error) == pytest.approx(expected(images, labels, 0.0), rel=1e-4)
    assert (adversarial.loss, adversarial.error) == pytest.approx(expected(images, labels, eps), rel=1e-4)
    one = labels == 1
    universal = universal_risk(
        model, images[one], labels[one], craft=(images[one][:6], labels[one][:6]), eps=eps, steps=10, batch_size=3
    )
    assert universal.loss == pytest.approx(expected(images[one], labels[one], eps)[0], rel=1e-4)
    assert clean.error < adversarial.error


def test_universal_risk_is_crafted_on_the_craft_images_only(trained, tiny):
    """Other scored images change the score, not the perturbation: two halves average to the whole."""
    craft, x, y = (tiny.val.images, tiny.val.labels), tiny.test.images, tiny.test.labels
    attack = {"craft": craft, "eps": 16.0, "steps": 12}
    whole, first, second = (
        universal_risk(trained, x[part], y[part], generator=seeded(), **attack)
        for part in (slice(None), slice(48), slice(48, 96))
    )
    assert whole.error == pytest.approx((first.error + second.error) / 2)
    assert whole.loss == pytest.approx((first.loss + second.loss) / 2, rel=1e-5)
    assert whole.error > 0.2


def test_risks_are_ordered_as_section_4_2_states(trained, tiny):
    """rho_exp <= rho_uni <= rho_heap(d) <= ... <= rho_heap(2) <= rho_heap(1), here without noticeable slack.

    The universal perturbation is crafted on other images, so that it holds for the whole distribution; the
    heaps' attack has as many steps as it takes to be close to each supremum.
    """
    x, y, eps = tiny.test.images[:32], tiny.test.labels[:32], 8.0
    heap = {"eps": eps, "steps": 30, "step_size": annealed_step_sizes(eps, 30, beta=4.0, gamma=0.9)}
    heaps = [heap_risk(trained, x, y, sharedness=s, generator=seeded(), **heap) for s in (32, 16, 8, 4, 2, 1)]
    universal = universal_risk(
        trained, x, y, craft=(tiny.val.images, tiny.val.labels), eps=eps, steps=60, generator=seeded()
    )
    chain = [expected_risk(trained, x, y), universal, *heaps]
    slack = max(lower.loss - higher.loss for lower, higher in pairwise(chain))
    assert slack <= 0.01
    assert chain[0].loss + 0.5 < universal.loss  # the order is not one of equals
    assert heaps[0].loss + 1 < heaps[-1].loss
    assert chain[0].error < universal.error < heaps[-1].error


@pytest.mark.parametrize("mode", [True, False])
def test_scoring_leaves_the_model_as_it_was(resnet, tiny, mode):
    model = resnet().train(mode)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = tiny.test.images[:8], tiny.test.labels[:8]
    risk = expected_risk(model, x, y)
    assert {module.training for module in model.modules()} == {mode}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert risk == expected_risk(model.eval(), x, y)  # never with batch statistics


def test_perturbations_that_do_not_fit_are_an_error(trained, tiny):
    with pytest.raises(SatlibError, match=r"1 perturbations: expected 4"):
        risk_under(trained, tiny.test.images[:8], tiny.test.labels[:8], torch.zeros(1, 3, 8, 8), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"eps": 256.0}, "eps=256"), ({"steps": 0}, "steps=0"), ({"sharedness": 17}, "sharedness=17")],
)
def test_errors_of_the_attack_come_through(trained, tiny, changes, message):
    attack = {"eps": 8.0, "steps": 1, "step_size": 1.0, "sharedness": 4} | changes
    with pytest.raises(SatlibError, match=message):
        heap_risk(trained, tiny.test.images[:16], tiny.test.labels[:16], **attack)


def test_in_segmentation_the_risk_is_a_mean_over_the_pixels_that_count():
    torch.manual_seed(0)
    model, images = torch.nn.Conv2d(3, 4, 1), torch.rand(6, 3, 8, 8) * 255
    labels = torch.randint(0, 4, (6, 8, 8))
    labels[:, :3] = 255
    with torch.no_grad():
        logits = model(images)
        wrong = (logits.argmax(1) != labels)[labels != 255].float().mean().item()
        loss = F.cross_entropy(logits, labels, ignore_index=255).item()
    for risk in (expected_risk(model, images, labels), risk_under(model, images, labels, torch.zeros(3, 3, 8, 8), 2)):
        assert risk.error == pytest.approx(wrong) and risk.loss == pytest.approx(loss, rel=1e-4)
    assert heap_risk(model, images, labels, sharedness=2, eps=8.0, steps=1, step_size=8.0).error <= 1


def test_crafting_on_the_images_themselves_is_noticed(trained, tiny):
    x, y = tiny.test.images[:8], tiny.test.labels[:8]
    with pytest.warns(UserWarning, match="8 of 8 `images` images are also `craft` images"):
        universal_risk(trained, x, y, craft=(x, y), eps=8.0, steps=1, batch_size=4)
