"""The attacks against independent implementations, at equal eps, data, start, steps and step size."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from satlib.attacks import heap_pgd, success_rates, universal_pgd

pytestmark = pytest.mark.usefixtures("float32")
EPS, STEP, STEPS = 8.0, 2.0, 7
REASON = "comes with the extra `test`"


class UnitRange(nn.Module):
    """The model behind the peers' interface: images in [0, 1]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x * 255)


@pytest.fixture(scope="module")
def exact(trained):
    """The trained model in float64, so that hardly a gradient is so small that rounding decides its sign."""
    return copy.deepcopy(trained).double()


@pytest.fixture(scope="module")
def batch(tiny):
    return tiny.test.images[:32].float(), tiny.test.labels[:32]


def start_for(images: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(images).uniform_(-EPS, EPS, generator=torch.Generator().manual_seed(0))


def ours(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, start: torch.Tensor, targeted: bool = False):
    attack = {"eps": EPS, "sharedness": 1, "steps": STEPS, "step_size": STEP, "targeted": targeted}
    return images + heap_pgd(model, images, labels, start=start, **attack)


def assert_same(images: torch.Tensor, peers: torch.Tensor) -> None:
    """Equal but for rounding: [0, 1] is not [0, 255], so an almost zero gradient may get the other sign.

    From there on an image's path is another one: a pixel's difference is then whole steps. The images are far
    from 0 and 255 on purpose: there the peers derive the perturbation from the clamped image, and satlib does not.
    """
    differs = (images - peers).abs() > 1e-3
    assert differs.float().mean() < 0.002


def test_image_dependent_attack_equals_torchattacks(exact, batch):
    torchattacks = pytest.importorskip("torchattacks", reason=REASON)
    images, labels = batch
    attack = torchattacks.PGD(UnitRange(exact), eps=EPS / 255, alpha=STEP / 255, steps=STEPS, random_start=False)
    theirs = attack(images / 255, labels) * 255
    assert (theirs - images).abs().amax((1, 2, 3)).min() > EPS - 0.01
    assert_same(ours(exact, images, labels, torch.zeros_like(images)), theirs)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("random_start", [False, True])
def test_image_dependent_attack_equals_foolbox(exact, batch, random_start, targeted):
    foolbox = pytest.importorskip("foolbox", reason=REASON)
    images, labels = batch
    start = start_for(images) if random_start else torch.zeros_like(images)

    class HandedStart(foolbox.attacks.LinfPGD):
        """Foolbox's own random start would be another one."""

        def get_random_start(self, x0, epsilon):
            return x0 + type(x0)(start / 255)

    peer = foolbox.PyTorchModel(UnitRange(exact).eval(), bounds=(0, 1))
    attack = HandedStart(abs_stepsize=STEP / 255, steps=STEPS, random_start=random_start)
    if targeted:
        labels = (labels + 1) % 4
        criterion = foolbox.criteria.TargetedMisclassification(labels)
    else:
        criterion = foolbox.criteria.Misclassification(labels)
    theirs, _, _ = attack(peer, images / 255, criterion, epsilons=EPS / 255)
    assert_same(ours(exact, images, labels, start, targeted), theirs * 255)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_universal_attack_reaches_the_error_of_art(trained, tiny):
    """ART's UniversalPerturbation with PGD inside, at equal eps on equal images; also scored on unseen ones."""
    pytest.importorskip("art", reason=REASON)
    from art.attacks.evasion import UniversalPerturbation
    from art.estimators.classification import PyTorchClassifier

    eps, craft, unseen = 12.0, tiny.val.first(64), tiny.test
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    classifier = PyTorchClassifier(
        copy.deepcopy(trained),
        loss=nn.CrossEntropyLoss(),
        input_shape=(3, 8, 8),
        nb_classes=4,
        clip_values=(0.0, 255.0),
        device_type="cpu",
    )
    attack = UniversalPerturbation(
        classifier,
        attacker="pgd",
        attacker_params={"eps": eps, "eps_step": eps / 4, "max_iter": 5, "verbose": False},
        delta=0.0,  # go on to the end, whatever the fooling rate
        max_iter=2,
        eps=eps,
        verbose=False,
    )
    attack.generate(craft.images.float().numpy(), craft.labels.numpy())
    theirs = torch.from_numpy(attack.noise).view(1, 3, 8, 8)
    assert eps - 0.01 < theirs.abs().max() < eps + 0.01

    generator = torch.Generator().manual_seed(0)
    found = universal_pgd(trained, craft.images, craft.labels, eps=eps, steps=60, batch_size=16, generator=generator)
    for images in (craft, unseen):
        rates = success_rates(trained, images.images, images.labels, torch.cat([found, theirs]))
        clean = success_rates(trained, images.images, images.labels, torch.zeros(1, 3, 8, 8))
        assert rates[0] >= rates[1] > clean
