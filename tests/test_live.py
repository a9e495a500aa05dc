"""What the explorer computes: answers that get better, from unseen images, and that end when nobody wants them."""

from dataclasses import replace

import pytest
import torch

from satlib import data
from satlib.attacks import success_rates
from satlib.errors import SatlibError
from satlib.models import UnitInputs, build
from satlib.risks import expected_risk
from satlib.study import live


@pytest.fixture(scope="module")
def classifier():
    """An untrained small network on the embedded images."""
    splits = data.load("shapes32")
    torch.manual_seed(0)
    architecture = {"name": "resnet", "depth": 8, "width": 4}
    model = build(architecture, classes=len(splits.train.classes), mean=splits.train.mean, std=splits.train.std)
    return live.Target("small", model.eval(), splits)


@pytest.fixture(scope="module")
def streets():
    splits = data.load("streets128x64")
    torch.manual_seed(0)
    architecture = {"name": "fcn8s", "width": 2}
    model = build(architecture, classes=len(splits.train.classes), mean=splits.train.mean, std=splits.train.std)
    return live.Target("streets", model.eval(), splits, splits.train.labels[0])


def test_answers_get_better_and_the_last_has_the_curve(classifier):
    answers = list(live.attack(classifier, live.Attack(eps=12.0, steps=40)))
    assert [answer.steps for answer in answers] == [20, 40, 40]
    assert [bool(answer.curve) for answer in answers] == [False, False, True]
    last = answers[-1]
    assert [eps for eps, _ in last.curve] == list(live.GRID)
    assert last.xi.shape == (1, 3, 32, 32) and last.xi.abs().max() <= 12.0
    test = classifier.splits.test.first(live.UNSEEN)
    expected = success_rates(classifier.net, test.images, test.labels, last.xi).item()
    assert last.won.mean().item() == pytest.approx(expected, abs=1e-6) and len(last.won) == live.UNSEEN
    low, high = live.interval(last.won)
    assert low <= expected <= high


def test_an_image_dependent_attack_gives_each_image_its_own(classifier):
    *_, last = live.attack(classifier, live.Attack(eps=8.0, steps=20, own=True))
    assert last.xi.shape == (live.SHOWN, 3, 32, 32) and not last.curve
    assert len({tuple(xi.flatten().tolist()) for xi in last.xi}) == live.SHOWN


def test_targets(classifier, streets):
    *_, toward = live.attack(classifier, live.Attack(eps=32.0, steps=20, target=3))
    test = classifier.splits.test.first(live.UNSEEN)
    rate = success_rates(classifier.net, test.images, torch.full_like(test.labels, 3), toward.xi, targeted=True).item()
    assert toward.won.mean().item() == pytest.approx(rate, abs=1e-6)
    with pytest.raises(SatlibError, match=r"target=99: expected 0 to \d+, or None"):
        list(live.attack(classifier, live.Attack(target=99)))
    *_, scene = live.attack(streets, live.Attack(eps=32.0, steps=5, target=-1))
    assert scene.perturbed[0].shape == (live.SHOWN, 64, 128) and 0 <= scene.won.min() <= scene.won.max() <= 1
    with pytest.raises(SatlibError, match="has no target scene"):
        list(live.attack(live.Target("aimless", streets.model, streets.splits), live.Attack(target=-1)))


@pytest.mark.parametrize(("name", "value"), [("eps", -1.0), ("eps", 256.0), ("steps", 0)])
def test_settings_that_make_no_sense_are_named(classifier, name, value):
    with pytest.raises(SatlibError, match=f"{name}="):
        list(live.attack(classifier, live.Attack(**{name: value})))


def test_pixels_without_a_class_do_not_count(streets):
    aim = torch.full((1, 4, 4), 255)
    aim[0, 0] = 1
    images = torch.zeros(1, 3, 4, 4)

    class Says(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(torch.zeros(1, 4, 4, dtype=torch.long), 3).permute(0, 3, 1, 2).float()

    assert live._won(Says(), images, aim, targeted=False).tolist() == [1.0]
    assert live._won(Says(), images, aim, targeted=True).tolist() == [0.0]


def test_a_newer_question_ends_an_older_one(classifier):
    asked = []

    def superseded():
        asked.append(True)
        return len(asked) > 30

    answers = []
    with pytest.raises(live.Superseded):
        for answer in live.attack(classifier, live.Attack(steps=200), superseded):
            answers.append(answer.steps)
    assert len(asked) == 31 and answers == [20]  # one pass later it has ended


def test_the_curve_is_computed_once_while_eps_moves(classifier):
    classifier.known.clear()
    *_, first = live.attack(classifier, live.Attack(eps=4.0, steps=20))
    passes = []
    *_, second = live.attack(classifier, live.Attack(eps=9.0, steps=20), lambda: passes.append(1))
    assert second.curve == first.curve and len(passes) < 40
    again = []
    list(live.attack(classifier, live.Attack(eps=9.0, steps=20, seed=1), lambda: again.append(1)))
    assert len(again) > len(passes) + 20  # another seed is another curve


def test_sharing_reports_heaps_and_risks_in_their_order(classifier, streets):
    answers = list(live.share(classifier, live.Sharing(sharedness=16, eps=16.0, steps=10)))
    assert [answer.steps for answer in answers] == [5, 10]
    last = answers[-1]
    assert last.xi.shape == (4, 3, 32, 32)
    assert list(last.risks) == ["expected", "universal", "heap, s = 16", "adversarial"]
    assert last.risks["heap, s = 16"] == last.own
    batch = classifier.splits.test.first(live.BATCH)
    assert last.risks["expected"] == expected_risk(classifier.net, batch.images.float(), batch.labels).error
    assert last.own <= last.risks["adversarial"]
    with pytest.raises(SatlibError, match="sharedness is explored on classifiers"):
        list(live.share(streets, live.Sharing()))
    with pytest.raises(SatlibError, match="sharedness=65"):
        list(live.share(classifier, live.Sharing(sharedness=65)))


def test_few_images_share_and_the_others_of_them_are_unseen(classifier):
    whole = classifier.splits
    few = replace(classifier, splits=replace(whole, test=whole.test.first(20)), known={})
    *_, last = live.share(few, live.Sharing(sharedness=5, steps=5))
    assert last.images == 10 and last.xi.shape[0] == 2 and 0 <= last.unseen <= 1
    with pytest.raises(SatlibError, match="sharedness=16"):
        list(live.share(few, live.Sharing(sharedness=16)))
    alone = replace(few, splits=replace(whole, test=whole.test.first(1)))
    with pytest.raises(SatlibError, match="1 image to score: sharing needs two at least"):
        list(live.share(alone, live.Sharing()))


def test_intervals():
    assert live.interval(torch.zeros(100)) == pytest.approx((0.0, 0.0370), abs=1e-4)  # Wilson's, as in tables
    half = torch.tensor([0.0, 1.0]).repeat(50)
    assert live.interval(half) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    shares = torch.tensor([0.4, 0.6])
    spread = 1.959964 * shares.std().item() / 2**0.5
    assert live.interval(shares) == pytest.approx((0.5 - spread, 0.5 + spread), abs=1e-6)


def test_a_network_with_inputs_in_0_to_1():
    class Mean(torch.nn.Module):
        def forward(self, x):
            return {"out": x.flatten(1).mean(1, keepdim=True)}

    images = torch.full((2, 3, 4, 4), 51.0)
    assert UnitInputs(Mean())(images).flatten().tolist() == pytest.approx([0.2, 0.2])
    wrapped = UnitInputs(Mean(), mean=(0.1, 0.1, 0.1), std=(0.5, 0.5, 0.5))
    assert wrapped(images).flatten().tolist() == pytest.approx([0.2, 0.2])
    with pytest.raises(SatlibError, match="expected one of each a channel"):
        UnitInputs(Mean(), mean=(0.1,), std=(0.0,))
