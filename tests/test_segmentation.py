"""Segmentation: scores and targets by hand, and the plan of section 6.3 in miniature."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from satlib import paper, segmentation
from satlib.attacks import images_at_once
from satlib.data import ImageSet
from satlib.data.imageset import IGNORE
from satlib.errors import SatlibError
from satlib.robustness import adversarial_robustness
from satlib.study import runs as runs_module
from satlib.study.display import segmented
from satlib.study.ledger import Ledger
from satlib.study.measurements import cityscapes
from satlib.study.runs import Runner
from satlib.study.settings import settings
from satlib.training import Training, class_iou, confusion, share_right, train, training_loss

pytestmark = pytest.mark.usefixtures("float32")


class Brightness(nn.Module):
    """Class by brightness, with a logit for each that falls with the distance from 60, 125 and 190."""

    def forward(self, x):
        middle = torch.tensor([60.0, 125.0, 190.0], device=x.device).view(1, 3, 1, 1)
        return -((x.mean(1, keepdim=True) - middle) ** 2) / 200


def test_confusion_counts_every_labelled_pixel_once(scenes):
    model, test = Brightness(), scenes.test
    counts = confusion(model, test, batch_size=5)
    predicted = model(test.images.float()).argmax(1)
    expected = np.zeros((3, 3), dtype=int)
    for truth, guess in zip(test.labels.flatten().tolist(), predicted.flatten().tolist(), strict=True):
        if truth != IGNORE:
            expected[truth, guess] += 1
    assert counts.tolist() == expected.tolist() and counts.sum() == 12 * (16 * 24 - 9)
    assert share_right(counts) == expected.trace() / expected.sum()


def test_iou_is_scikit_learn_s():
    from sklearn.metrics import jaccard_score

    generator = torch.Generator().manual_seed(1)
    truth, guess = (torch.randint(4, (500,), generator=generator) for _ in range(2))
    counts = torch.bincount(truth * 6 + guess, minlength=36).view(6, 6)
    found = class_iou(counts)
    assert found[:4].tolist() == pytest.approx(jaccard_score(truth, guess, average=None).tolist())
    assert found[4:].isnan().all()  # neither there nor predicted


@pytest.mark.parametrize("sigma", [0.0, 0.7])
def test_pixels_without_a_class_change_no_training(scenes, sigma):
    """Whatever the void pixels' labels might be, the same weights come out."""

    def weights(void: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 3, 1))
        with torch.no_grad():
            model[0].weight.div_(50)
        settings = Training(optimizer="adam", epochs=2, batch_size=5, learning_rate=1e-3, milestones=(), seed=1)
        settings = Training(**vars(settings) | {"sigma": sigma, "eps": 8.0, "sharedness": 5, "steps": 2})
        part = scenes.train
        masked = part.labels == IGNORE
        other = part.images.clone()
        other.permute(0, 2, 3, 1)[masked] = void  # seen by nothing but the void pixels: the kernel is 1x1
        train(model, ImageSet(other, part.labels, part.classes, "bands", "Bands", "train"), settings)
        return model[0].weight.detach().flatten()

    # Random starts of the attack are alike, and void pixels have no part in any loss.
    assert torch.equal(weights(0), weights(255))


def test_training_loss_is_the_mean_over_labelled_pixels():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 5, generator=generator), torch.randint(3, (2, 4, 5), generator=generator)
    labels[0, :2] = IGNORE
    known = labels != IGNORE
    expected = F.cross_entropy(logits.permute(0, 2, 3, 1)[known], labels[known], label_smoothing=0.1)
    torch.testing.assert_close(training_loss(logits, labels, Training(label_smoothing=0.1)), expected)


def test_adam_goes_on_where_it_stopped(scenes):
    """Two epochs, then the rest from the state, are all epochs at once, bit by bit."""

    def model() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))

    settings = Training(optimizer="adam", epochs=4, batch_size=5, learning_rate=1e-3, milestones=(3,))
    assert "momentum" not in settings.config() and Training.from_config(settings.config()).optimizer == "adam"
    whole, parts, kept = model(), model(), {}
    train(whole, scenes.train, settings)
    history = train(parts, scenes.train, settings, until=2, after_epoch=lambda s, h: kept.update(s))
    assert len(history) == 2
    state = {name: value.clone() for name, value in kept.items()}
    again = model()
    assert len(train(again, scenes.train, settings, state=state, history=history)) == 4
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_target_is_a_training_scene(scenes):
    target = segmentation.scene_target(scenes, "train_7")
    assert torch.equal(target, scenes.train.labels[7])
    assert segmentation.repeated(target, 3).shape == (3, 16, 24)
    with pytest.raises(SatlibError, match=r"target='nowhere': no training scene of Bands .* train_0, train_1, train_2"):
        segmentation.scene_target(scenes, "nowhere")


def test_a_hidden_class_gives_way_to_the_nearest_other():
    rows = ["0011122", "0111112", "0011122"]
    labels = torch.tensor([[int(c) for c in row] for row in rows])[None]
    found = segmentation.without(labels, 1)[0]
    assert not (found == 1).any() and torch.equal(found[labels[0] != 1], labels[0][labels[0] != 1])
    assert found[0, 2] == 0 and found[0, 4] == 2 and found[1, 1] == 0 and found[1, 5] == 2
    alone = torch.ones(1, 2, 2, dtype=torch.uint8)
    assert torch.equal(segmentation.without(alone, 1), alone)


def test_what_is_hidden_and_what_is_kept_is_counted():
    clean, after = torch.tensor([[[1, 1, 0, 2]]]), torch.tensor([[[0, 1, 0, 0]]])
    assert segmentation.share_hidden(clean, after, 1) == {"hidden": 0.5, "kept": 0.5}
    assert segmentation.share_hidden(clean, after, 3)["hidden"] is None


def test_edges_that_fade_are_weakened_and_target_lines_are_found():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 20, 30, generator=generator) * 255
    assert segmentation.weakening(images, -0.1 * images).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert segmentation.weakening(images, 0.2 * images).tolist() == pytest.approx([-1, -1], abs=1e-5)
    noise = torch.randn(2, 3, 20, 30, generator=generator)
    assert segmentation.weakening(images, noise).abs().max() < 0.1
    target = torch.zeros(20, 30, dtype=torch.uint8)
    target[8:, 12:] = 4
    like, unlike = target.float().expand(1, 3, 20, 30), noise[:1]
    assert segmentation.target_structure(like, target).item() > 0.95
    assert abs(segmentation.target_structure(unlike, target).item()) < 0.3


@pytest.mark.parametrize("targeted", [False, True])
def test_eps_adv_is_the_mean_over_images_in_segmentation(scenes, targeted):
    test = scenes.test.first(4)
    labels = segmentation.repeated(scenes.train.labels[0], 4) if targeted else test.labels
    options = {"delta": 0.6, "iterations": 6, "steps": 15, "generator": torch.Generator().manual_seed(0)}
    found = adversarial_robustness(Brightness(), test.images, labels, targeted=targeted, **options)
    assert found.epsilons.isfinite().all() and found.epsilon == pytest.approx(found.epsilons.mean().item())
    assert found.standard_error == pytest.approx(found.epsilons.std().item() / math.sqrt(4))
    # A pixel changes its class where its brightness crosses the middle between two classes, 33 away for the next.
    there = (test.labels == labels)[..., 3:].flatten(1).float().mean(1) > 0.6
    there = there if targeted else ~torch.ones_like(there)
    assert (found.epsilons[there] == 0).all() and (found.epsilons[~there] > 20).all() and found.epsilons.max() < 160


def test_large_scenes_are_looked_at_few_at_a_time():
    assert images_at_once(torch.empty(1, 3, 32, 32)) >= 512
    assert images_at_once(torch.empty(1, 3, 512, 1024)) == 8


SMALL = {
    "dataset": "bands",
    "target": "train_3",
    "width": 2,
    "erm_epochs": 2,
    "erm_learning_rate": 0.01,
    "erm_milestones": [1],
    "finetune_epochs": 3,
    "finetune_milestones": [2],
    "evaluated": [1, 3],
    "points": [[1, 8.0, 0.5], [5, 30.0, 0.7]],
    "steps": 2,
    "search": "k-ary",
    "search_iterations": 3,
    "search_steps": 5,
    "choose_images": 4,
    "report_images": 4,
    "adversarial_images": 3,
    "adversarial_iterations": 2,
    "adversarial_steps": 3,
    "hidden": "middle",
    "hiding_epsilons": [10.0, 30.0],
    "strongest_epsilons": [16.0],
}


def test_section_6_3_in_miniature(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(runs_module.data, "load", lambda name: scenes)
    plan = cityscapes(settings("6.3", "paper", **SMALL))
    assert plan.epochs == (1, 3) and all(len(parts) == 2 for parts in plan.models.values())
    runner = Runner(ledger=Ledger(tmp_path), device="cpu")
    records = runner.carry_out(plan.runs)
    assert len({r.id for r in records}) == len(set(plan.runs)) == len(runner.ledger.records())
    for first, last in plan.models.values():
        assert [len(runner.record(part).metrics["history"]) for part in (first, last)] == [1, 3]
        assert runner.record(last).parents == {"previous": runner.record(first).id}
    metrics = runner.record(plan.erm).metrics
    assert {"accuracy", "mean_iou", "validation_mean_iou", "class_iou"} <= metrics.keys()
    search = runner.record(plan.targeted[plan.erm])
    assert search.settings["attack"]["loss_threshold"] is None and search.settings["target"] == "train_3"
    assert runner.record(plan.untargeted[plan.erm]).settings["attack"]["loss_threshold"] == paper.KAPPA
    structure = runner.record(plan.structure[plan.erm])
    assert len(structure.metrics["universal"]["weakening"]) == 4
    assert structure.arrays("perturbations")["segmented_own"].shape == (16, 24)
    first = scenes.test.images[:1]
    for name in ("own", "universal"):
        xi = torch.from_numpy(structure.arrays("perturbations")[name]).float()
        assert segmentation.weakening(first, xi[None]).item() == pytest.approx(
            structure.metrics[name]["weakening"][0], abs=1e-3
        )
    for attack, searches in (("targeted", plan.targeted), ("untargeted", plan.untargeted)):
        shown = segmented(runner, plan.seen[plan.erm], attack)
        found = runner.record(searches[plan.erm]).metrics
        assert shown.seen.shape == (16, 24) and shown.xi.shape == (3, 16, 24)
        assert ("> 255" in shown.words) == (found["eps_uni"] is None)
        again = segmentation.segment(runner.model(plan.erm), (first + torch.from_numpy(shown.xi)).clamp(0, 255))
        assert np.array_equal(again[0], shown.seen)
    assert [score["eps"] for score in runner.record(plan.hiding[plan.erm]).metrics["scores"]] == [10.0, 30.0]


def test_a_training_in_parts_is_the_whole_one(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(runs_module.data, "load", lambda name: scenes)
    runner = Runner(ledger=Ledger(tmp_path), device="cpu")
    parts, (whole,) = (
        cityscapes(settings("6.3", "paper", **SMALL | {"evaluated": epochs})).models[5, 30.0, 0.7]
        for epochs in ([1, 2, 3], [3])
    )
    one, other = runner.record(parts[-1]), runner.record(whole)
    assert one.id != other.id and one.metrics == other.metrics
    for name, value in one.tensors("weights").items():
        assert torch.equal(value, other.tensors("weights")[name])
    with pytest.raises(SatlibError, match=r"evaluated=\(1, 2\): expected epochs in their order, the last of them"):
        cityscapes(settings("6.3", "paper", **SMALL | {"evaluated": [1, 2]}))


def test_section_6_3_is_the_paper_s():
    plan = cityscapes(paper.CITYSCAPES)
    assert plan.epochs == tuple(range(1, 21)) and set(plan.models) == {(1, 8.0, 0.5), (5, 30.0, 0.7)}
    training = plan.models[5, 30.0, 0.7][-1].settings["training"]
    assert (training["optimizer"], training["batch_size"], training["learning_rate"]) == ("adam", 5, 1e-4)
    assert (training["steps"], training["relative_step_size"], training["milestones"]) == (5, 0.4, [15])
    search = plan.targeted[plan.erm].settings
    assert (search["delta"], search["iterations"], search["images"]["report"]) == (0.95, 10, 16)
    attack = search["attack"]
    assert (attack["steps"], attack["batch_size"], attack["gamma"], attack["beta"]) == (200, 5, 0.99, 2.0)
    assert plan.erm.settings["architecture"] == {"name": "fcn8s", "width": 64}
