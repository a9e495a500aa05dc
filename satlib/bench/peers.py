"""The other libraries, each used as its documentation shows: images in [0, 1], the model as it is, in float32."""

import contextlib
import copy
import importlib.metadata
import importlib.util
import io
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from satlib.data.imageset import ImageSet
from satlib.data.imagetree import workers_here
from satlib.data.streamed import StreamedSet
from satlib.device import autocast

if TYPE_CHECKING:
    from art.estimators.classification import PyTorchClassifier

UNIVERSAL = ("sign-SGD", "torchattacks", "foolbox")  # which `at_equal_gradients` knows
DISTRIBUTIONS = {"torchattacks": "torchattacks", "foolbox": "foolbox", "art": "adversarial-robustness-toolbox"}
AUGMENTED = (v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True))  # after a random crop


class UnitRange(nn.Module):
    """A model of pixels in 0..255 behind the peers' interface: images in [0, 1]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x * 255)


def title(name: str) -> str | None:
    """`torchattacks 3.3.0`; None where it is not installed."""
    if importlib.util.find_spec(name) is None:
        return None
    return f"{'ART' if name == 'art' else name} {importlib.metadata.version(DISTRIBUTIONS[name])}"


def plain(model: nn.Module) -> nn.Module:
    """A copy of the model in PyTorch's default memory layout, as users of the peers have it."""
    return UnitRange(copy.deepcopy(model)).to(memory_format=torch.contiguous_format).eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the peers' progress bars and deprecation warnings."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def image_dependent(name: str, model: nn.Module, x: Tensor, y: Tensor, *, eps: float, steps: int, batch: int) -> Tensor:
    """Adversarial images (n, C, H, W) in 0..255 by the peer's PGD with step size eps / 4 and a random start.

    x (n, C, H, W) in 0..255 as float32, eps in pixel units.
    """
    net, unit = plain(model), x.contiguous() / 255
    with quiet():
        if name == "art":
            from art.attacks.evasion import ProjectedGradientDescent

            sizes = {"eps": eps / 255, "eps_step": eps / 4 / 255, "max_iter": steps, "num_random_init": 1}
            attack = ProjectedGradientDescent(art_classifier(net, x, y), **sizes, batch_size=batch, verbose=False)
            return torch.from_numpy(attack.generate(unit.cpu().numpy(), y.cpu().numpy())).to(x.device) * 255
        parts = zip(unit.split(batch), y.split(batch), strict=True)
        if name == "torchattacks":
            import torchattacks

            attack = torchattacks.PGD(net, eps=eps / 255, alpha=eps / 4 / 255, steps=steps, random_start=True)
            return torch.cat([attack(a, b) for a, b in parts]) * 255
        import foolbox

        wrapped = foolbox.PyTorchModel(net, bounds=(0, 1), device=x.device)
        attack = foolbox.attacks.LinfPGD(rel_stepsize=0.25, steps=steps)
        return torch.cat([attack(wrapped, a, b, epsilons=eps / 255)[1] for a, b in parts]) * 255


def adversarial_training(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], *, eps: float, steps: int
) -> Callable[[], None]:
    """Adversarial training as one writes it by hand, on mini-batches of pixels in 0..255: torchattacks' PGD, autocast,
    channels last, clean images beside the others. Each call goes over the batches once."""
    import torchattacks

    model = copy.deepcopy(model).train()
    attack = torchattacks.PGD(UnitRange(model), eps=eps / 255, alpha=eps / 2 / 255, steps=steps, random_start=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def run() -> None:
        for x, y in batches:
            with autocast(x.device, cache=True):
                adversarial = attack(x / 255, y) * 255
                seen = torch.cat([adversarial, x]).contiguous(memory_format=torch.channels_last)
                perturbed, clean = model(seen).float().chunk(2)
            loss = 0.7 * F.cross_entropy(perturbed, y) + 0.3 * F.cross_entropy(clean, y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return run


def universal(attacker: str, model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    """ART's UniversalPerturbation (Moosavi-Dezfooli et al. 2017) with its own defaults but for eps and passes.

    attacker "pgd" steps by eps / 4, ten times for each image; "deepfool" is ART's default. One pass over the images
    (its default is 20), or until 80 % of them are fooled. x (n, C, H, W) in 0..255 as float32, eps in pixel units.
    """
    from art.attacks.evasion import UniversalPerturbation

    inner = {"pgd": {"eps": eps / 255, "eps_step": eps / 4 / 255, "max_iter": 10, "verbose": False}, "deepfool": {}}
    options = {"attacker": attacker, "attacker_params": inner[attacker], "eps": eps / 255, "max_iter": 1}
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with quiet():
        attack = UniversalPerturbation(art_classifier(plain(model), x, y), **options, verbose=False)
        attack.generate((x.contiguous() / 255).cpu().numpy(), y.cpu().numpy())
    return torch.from_numpy(attack.noise).view(1, *x.shape[1:]).to(x.device) * 255


class Perturbing(nn.Module):
    """A network behind a perturbation as its input, u (n, C, H, W) in [0, 1] for xi in [-eps, eps]: two logits, whose
    cross-entropy for class 0 grows with the mean loss over all images (n, C, H, W) in 0..255."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> None:
        super().__init__()
        self.model, self.images, self.labels, self.eps = model, images, labels, eps

    def forward(self, u: Tensor) -> Tensor:
        seen = (self.images + self.eps * (2 * u - 1)).clamp(0, 255)
        loss = F.cross_entropy(self.model(seen), self.labels)
        return torch.stack([-loss, loss.new_zeros(())])[None].expand(len(u), -1)


def at_equal_gradients(name: str, model: nn.Module, x: Tensor, y: Tensor, *, eps: float, budget: int) -> Tensor:
    """A universal perturbation (1, C, H, W) by so many gradients of images: by the PGD of "torchattacks" or "foolbox"
    with the perturbation as its input, on all images x at once, or by ten lines of "sign-SGD" on mini-batches of 64."""
    middle, first, steps = x.new_full((1, *x.shape[1:]), 0.5), y.new_zeros(1), max(1, budget // len(x))
    torch.manual_seed(0)
    if name == "torchattacks":
        import torchattacks

        net = Perturbing(model, x, y, eps)
        attack = torchattacks.PGD(net, eps=0.5, alpha=0.02, steps=steps, random_start=True)
        return eps * (2 * attack(middle, first) - 1)
    if name == "foolbox":
        import foolbox

        net = foolbox.PyTorchModel(Perturbing(model, x, y, eps).eval(), bounds=(0, 1), device=x.device)
        attack = foolbox.attacks.LinfPGD(abs_stepsize=0.02, steps=steps)
        return eps * (2 * attack(net, middle, first, epsilons=0.5)[1] - 1)
    xi, size = torch.zeros_like(middle), min(64, len(x))
    for k in range(steps := max(1, budget // size)):
        chosen = torch.randperm(len(x))[:size].to(x.device)
        at = xi.clone().requires_grad_()
        loss = F.cross_entropy(model((x[chosen] + at).clamp(0, 255)), y[chosen])
        (gradient,) = torch.autograd.grad(loss, at)
        xi = (xi + eps / 10 * (1 - k / steps) * gradient.sign()).clamp(-eps, eps)
    return xi


def art_classifier(net: nn.Module, x: Tensor, y: Tensor) -> "PyTorchClassifier":
    """ART's wrapper around a model of images in [0, 1]."""
    from art.estimators.classification import PyTorchClassifier

    with torch.no_grad():
        classes = net(x[:1]).shape[1]
    options = {"clip_values": (0.0, 1.0), "device_type": "gpu" if x.is_cuda else "cpu"}
    shape = tuple(x.shape[1:])
    return PyTorchClassifier(net, loss=nn.CrossEntropyLoss(), input_shape=shape, nb_classes=classes, **options)


def loader(images: ImageSet, batch_size: int) -> DataLoader:
    """The usual pipeline: torchvision's transforms on PIL images, in two worker processes that stay."""
    crop = v2.RandomCrop(images.images.shape[-1], padding=4, padding_mode="reflect")
    return _loader(_Pairs(images, v2.Compose([crop, *AUGMENTED])), batch_size, 2, images.device)


def stored_loader(images: StreamedSet, batch_size: int) -> DataLoader:
    """The usual pipeline for files in folders of classes: torchvision's transforms of training on ImageNet, in as many
    workers as ours."""
    transform = v2.Compose([v2.RandomResizedCrop(images.images.size), *AUGMENTED])
    return _loader(ImageFolder(images.images.folder, transform), batch_size, workers_here(), images.device)


def _loader(pairs: Dataset, batch_size: int, workers: int, device: torch.device) -> DataLoader:
    pin = device.type == "cuda"
    return DataLoader(pairs, batch_size, shuffle=True, num_workers=workers, persistent_workers=True, pin_memory=pin)


class _Pairs(Dataset):
    def __init__(self, images: ImageSet, transform: v2.Transform) -> None:
        self.pictures = [Image.fromarray(picture) for picture in images.images.permute(0, 2, 3, 1).cpu().numpy()]
        self.labels, self.transform = images.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[index]), self.labels[index]
