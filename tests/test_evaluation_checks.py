"""The audit: sound evaluations pass, each check fails on what is made to fail it, and masks are caught."""

import copy

import pytest
import torch
from torch import nn

from satlib import evaluation_checks as audit
from satlib.errors import SatlibError

pytestmark = pytest.mark.usefixtures("float32")
ATTACK = {"steps": 40, "batch_size": 16, "beta": 4.0, "gamma": 0.95, "loss_threshold": 1.6, "label_smoothing": 0.1}
SOUND = {
    "eps": 16.0,
    "classes": 4,
    "images": 100,
    "clean": 0.05,
    "universal": 0.6,
    "universal, one step": 0.3,
    "image-dependent": 0.95,
    "image-dependent, one step": 0.7,
    "image-dependent, largest eps": 1.0,
    "shared": 0.8,
    "sharedness": 8,
    "curve": [{"eps": 4.0, "rate": 0.1}, {"eps": 16.0, "rate": 0.6}, {"eps": 255.0, "rate": 0.76}],
    "stronger": {"three times the steps": 0.62, "best of 4 restarts": 0.64},
    "half the crafting images": 0.57,
    "other losses": {"margin loss": 0.63},
    "eval mode, float32": 0.605,
    "train mode, float32": 0.4,
    "crafted in float32": 0.58,
    "without gradient": 0.0,
    "noise": {"uniform": 0.06, "low-frequency": 0.2},
}


def failing(numbers):
    return [check.check for check in audit.checks(numbers) if check.verdict == "fails"]


def test_a_sound_evaluation_passes_every_check():
    found = audit.checks(SOUND)
    assert len(found) == 11 and failing(SOUND) == []
    assert all(check.verdict == "passes" and "%" in check.evidence for check in found)
    assert found[3].evidence == "60.0 %; best of 4 restarts: 64.0 %"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"image-dependent, one step": 0.99}, "many steps"),
        ({"universal, one step": 0.64}, "many steps"),
        ({"image-dependent": 0.07}, "many steps"),
        ({"curve": [{"eps": 4.0, "rate": 0.8}, {"eps": 255.0, "rate": 0.75}]}, "success never falls"),
        ({"curve": [{"eps": 4.0, "rate": 0.1}, {"eps": 255.0, "rate": 0.5}]}, "at the largest eps"),
        ({"image-dependent, largest eps": 0.9}, "at the largest eps"),
        ({"stronger": {"three times the steps": 0.66}}, "more steps"),
        ({"half the crafting images": 0.5}, "half the crafting"),
        ({"other losses": {"margin loss": 0.7}}, "no other loss"),
        ({"eval mode, float32": 0.62}, "evaluation mode"),
        ({"crafted in float32": 0.54}, "crafting in float32"),
        ({"without gradient": 0.5}, "images have gradients"),
        ({"shared": 0.5}, "at equal eps"),
        ({"image-dependent": 0.7}, "at equal eps"),
        ({"noise": {"uniform": 0.06, "low-frequency": 0.6}}, "better than noise"),
    ],
)
def test_each_check_fails_where_its_numbers_say_so(changes, text):
    assert any(text in check for check in failing(SOUND | changes))


def measured(model, tiny):
    craft, test = (tiny.val.images, tiny.val.labels), (tiny.test.images[:64], tiny.test.labels[:64])
    options = {"eps": 12.0, "epsilons": [4.0, 12.0, 255.0], "image_steps": 10, "attack": ATTACK}
    return audit.measure(model, craft=craft, test=test, **options)


def test_a_trained_model_is_attacked_soundly_and_the_same_model_masked_is_caught(trained, tiny):
    steps = []
    numbers = measured(trained, tiny)
    assert numbers["image-dependent"] > numbers["universal"] > numbers["clean"]
    assert numbers["without gradient"] == 0 and numbers["image-dependent, largest eps"] == 1
    sound = set(failing(numbers))
    assert not any(text in check for check in sound for text in ("have gradients", "at equal eps", "than noise"))
    for mask in audit.MASKS.values():
        masked = measured(mask(copy.deepcopy(trained)), tiny)
        steps.append(set(failing(masked)) - sound)
    rounded, saturated = steps
    assert any("have gradients" in check for check in rounded) and any("many steps" in check for check in rounded)
    assert any("have gradients" in check for check in saturated)


def test_gradients_of_nan_are_none(tiny):
    class Rooted(nn.Module):
        """Its logits are finite, the derivative of its square root at 0 is not."""

        def forward(self, x):
            flat = x.flatten(1)
            return flat[:, :4] + (0 * flat).square().sum(1, keepdim=True).sqrt()

    numbers = measured(Rooted(), tiny)
    assert numbers["without gradient"] == 1 and any("have gradients" in check for check in failing(numbers))


def test_train_mode_is_train_mode_and_other_types_with_a_plain_meaning_are_taken(tiny):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 4))
    net[1].running_var.fill_(1e9)  # in eval mode it says one class for all
    short = {"eps": 8.0, "epsilons": [4.0, 8.0], "image_steps": 1, "attack": {"steps": 1, "batch_size": 2}}
    sets = {
        "craft": (tiny.val.images[:16], tiny.val.labels[:16]),
        "test": (tiny.test.images[:16], tiny.test.labels[:16]),
    }
    numbers = audit.measure(net, **sets, **short)
    assert numbers["eval mode, float32"] != numbers["train mode, float32"]
    arrays = {name: (images.numpy(), labels.numpy()) for name, (images, labels) in sets.items()}
    assert audit.measure(net, **arrays, **short) == numbers
    plain = audit.measure(lambda x: net.eval()(x), **sets, **short)
    assert plain["train mode, float32"] == plain["eval mode, float32"] == numbers["eval mode, float32"]


def test_noise_has_its_size_and_repeats():
    like = torch.zeros(1, 3, 20, 24)
    found, again = audit.noises(like, 7.0, 3), audit.noises(like, 7.0, 3)
    assert set(found) == {"uniform", "sign", "low-frequency"}
    for name, noise in found.items():
        assert noise.shape == like.shape and torch.equal(noise, again[name])
        assert noise.abs().max() <= 7 + 1e-5
    assert torch.equal(found["sign"].abs(), torch.full_like(like, 7.0))
    assert found["low-frequency"].diff().abs().mean() < found["uniform"].diff().abs().mean() / 3


def test_a_model_that_returns_nan_is_an_error(tiny):
    class Broken(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :4] * float("nan")

    with pytest.raises(SatlibError, match="finite"):
        measured(Broken(), tiny)
