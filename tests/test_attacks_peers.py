"""The attacks against independent implementations, at equal eps, data, start, steps and step size."""

import copy
import functools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from satlib.attacks import heap_pgd, spend, success_rates, universal_pgd
from satlib.bench import peers
from satlib.robustness import success_curve

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


# ---------------------------------------------------------------- at equal gradients, on networks of three kinds


class Resized(nn.Module):
    """A network of torchvision's, with images of 0..255 scaled up to what it expects."""

    def __init__(self, network: nn.Module, size: int):
        super().__init__()
        self.network, self.size = network, size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(F.interpolate((x - 128) / 30, size=self.size, mode="bilinear"))


def fitted(network: nn.Module, tiny) -> nn.Module:
    """Trained for a few epochs, by nothing of satlib's."""
    optimizer = torch.optim.Adam(network.train().parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        for x, y in tiny.train.batches(64, generator=generator):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def networks(trained, tiny):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = {"image_size": 8, "patch_size": 2, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
        transformer = torchvision.models.VisionTransformer(**vit, num_classes=4)
        shuffle = torchvision.models.shufflenet_v2_x0_5(num_classes=4)
        return {
            "resnet": copy.deepcopy(trained).requires_grad_(False),
            "vit": fitted(Resized(transformer, 8), tiny),
            "shufflenet": fitted(Resized(shuffle, 32), tiny),
        }


def by_art(model, images, labels, *, eps, budget):
    from art.attacks.evasion import UniversalPerturbation

    with peers.quiet():
        classifier = peers.art_classifier(UnitRange(model), images / 255, labels)
        inner = {"eps": eps / 255, "eps_step": eps / 4 / 255, "max_iter": 10, "verbose": False}
        passes = {"max_iter": max(1, budget // (10 * len(images))), "delta": 0.0}
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        attack = UniversalPerturbation(classifier, "pgd", inner, eps=eps / 255, **passes, verbose=False)
        attack.generate((images / 255).numpy(), labels.numpy())
    return torch.from_numpy(attack.noise).view(1, 3, 8, 8) * 255


SIZES = {
    "resnet": 14.0,
    "vit": 9.0,
    "shufflenet": 14.0,
}  # pixel units: about half of the images are fooled, far from 3/4


@pytest.mark.parametrize("name", SIZES)
def test_at_equal_gradients_no_peer_finds_a_higher_error(name, networks, more_tiny):
    model, eps = networks[name], SIZES[name]
    craft, report = ((images.images.float(), images.labels) for images in more_tiny)
    before, generator = spend(0), torch.Generator().manual_seed(0)
    (ours,) = success_curve(model, craft=craft, report=report, epsilons=[eps], generator=generator)
    budget = spend(0) - before
    found = {}
    for peer in (*peers.UNIVERSAL, "art"):
        if peer == "art" and name != "resnet":
            continue  # it takes the images one by one: minutes
        pytest.importorskip("torch" if peer == "sign-SGD" else peer, reason=REASON)
        attack = by_art if peer == "art" else functools.partial(peers.at_equal_gradients, peer)
        xi = attack(model, *craft, eps=eps, budget=budget).detach()
        assert xi.abs().max() <= eps + 0.01
        found[peer] = success_rates(model, *report, xi).item()
    clean = success_rates(model, *report, torch.zeros(1, 3, 8, 8)).item()
    assert clean < 0.3 and max(found.values()) > clean + 0.1
    chance = (0.25 / len(report[1])) ** 0.5  # one standard error of a rate on so many unseen images: 1.1 points
    assert ours.rate >= max(found.values()) - chance, (ours, found)


@pytest.mark.parametrize("black_and_white", [False, True])
def test_at_equal_steps_no_peer_fools_more_images(black_and_white, exact, tiny):
    torchattacks = pytest.importorskip("torchattacks", reason=REASON)
    foolbox = pytest.importorskip("foolbox", reason=REASON)
    images, labels = tiny.test.images.float(), tiny.test.labels
    if black_and_white:
        images = (images > 128) * 255.0
    eps, step, steps = 24.0, 6.0, 10
    unit, given = UnitRange(exact), {"eps": eps, "sharedness": 1, "steps": steps, "step_size": step}
    rates = {}

    def fooled(seen):
        return (exact(seen.double()).argmax(1) != labels).float().mean().item()

    generator = torch.Generator().manual_seed(0)
    xi = heap_pgd(exact, images, labels, keep_best=True, generator=generator, **given)
    ours = fooled((images + xi).clamp(0, 255))
    torch.manual_seed(0)
    attack = torchattacks.PGD(unit, eps=eps / 255, alpha=step / 255, steps=steps, random_start=True)
    rates["torchattacks"] = fooled(attack(images / 255, labels) * 255)
    model = foolbox.PyTorchModel(unit.eval(), bounds=(0, 1))
    attack = foolbox.attacks.LinfPGD(abs_stepsize=step / 255, steps=steps)
    rates["Foolbox"] = fooled(attack(model, images / 255, labels, epsilons=eps / 255)[1] * 255)
    assert ours >= max(rates.values()) > fooled(images) + 0.1, rates
