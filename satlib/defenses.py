"""The defences that the paper compares with, and one concurrent to it, as adversaries of the one training loop."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import Module

from satlib.attacks import heap_pgd, perturb, shuffled
from satlib.checks import check, check_data, check_eps, check_whole, outside
from satlib.data.imageset import ImageSet
from satlib.deepfool import universal_deepfool
from satlib.device import sent
from satlib.training import Adversary, Training, clean_loss, mixed_loss
from satlib.universal import UniversalAttack, mean_of_signs, takes


class Pool(Adversary):
    """Universal perturbations (n, C, H, W) within eps that `attack` finds before an epoch; they go into checkpoints.

    Further settings go to the attack (steps or passes, batch_size, ...). progress(text) follows what it finds.
    """

    def __init__(
        self,
        data: ImageSet,
        *,
        eps: float,
        attack: UniversalAttack,
        progress: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> None:
        check_eps(eps)
        check_data(data, has="images")
        self.data, self.progress = data, outside(progress or (lambda text: None))
        through = {"straight_through": False} if takes(attack, "straight_through") else {}  # as published
        self.attack: Callable[..., Tensor] = functools.partial(attack, eps=[eps], **through | settings)
        self.pool = torch.zeros(0, *data.images.shape[1:], device=data.device)

    def state(self) -> dict[str, Tensor]:
        return {"pool": self.pool}

    def load(self, state: dict[str, Tensor]) -> None:
        self.pool = state["pool"]


class DeepFoolUAD(Pool):
    """Fine-tuning on a pool of DeepFool universal perturbations, made anew every few epochs (Moosavi-Dezfooli 2017).

    Before the first of every `epochs_each` epochs, `pool_size` perturbations are found against the model as it is, each
    on `images_each` training images drawn anew. Every training sample then gets a random one with probability `share`.
    """

    recordable = True

    def __init__(
        self,
        data: ImageSet,
        *,
        eps: float,
        pool_size: int = 10,
        epochs_each: int = 5,
        share: float = 0.5,
        images_each: int = 1000,
        attack: UniversalAttack = universal_deepfool,
        **settings: Any,
    ) -> None:
        super().__init__(data, eps=eps, attack=attack, **settings)
        check_whole(pool_size=pool_size, epochs_each=epochs_each, images_each=images_each)
        check("a probability", lambda value: 0 <= value <= 1, share=share)
        self.pool_size, self.epochs_each, self.share, self.images_each = pool_size, epochs_each, share, images_each

    def start_epoch(self, model: Module, epoch: int, generator: Generator) -> None:
        if epoch % self.epochs_each:
            return
        crafted = []
        for index in range(self.pool_size):
            chosen = shuffled(len(self.data), generator)[: self.images_each].to(self.data.device)
            crafted.append(self.attack(model, self.data.images[chosen], self.data.labels[chosen], generator=generator))
            self.progress(f"universal perturbation {index + 1}/{self.pool_size}")
        self.pool = torch.cat(crafted)

    def draw(self, images: Tensor, settings: Training, generator: Generator) -> tuple[Tensor]:
        which = sent(torch.randint(len(self.pool), (len(images),), generator=generator), images.device)
        gets = sent(torch.rand(len(images), generator=generator) < self.share, images.device)
        return (self.pool[which] * gets.view(-1, 1, 1, 1),)

    def loss(self, model: Module, images: Tensor, labels: Tensor, settings: Training, *drawn: Tensor) -> Tensor:
        return clean_loss(model, perturb(images, drawn[0], 1), labels, settings)


class FictitiousPlay(Pool):
    """Training against all universal perturbations found so far (Perolat et al. 2018).

    Before each epoch the best response to the model as it is joins the set; in the epoch, every mini-batch meets one of
    the set, drawn uniformly, beside its clean images (weights sigma and 1 - sigma).
    """

    recordable = True

    def __init__(self, data: ImageSet, *, eps: float, attack: UniversalAttack = mean_of_signs, **settings: Any) -> None:
        super().__init__(data, eps=eps, attack=attack, **settings)

    def start_epoch(self, model: Module, epoch: int, generator: Generator) -> None:
        xi = self.attack(model, self.data.images, self.data.labels, generator=generator)
        self.pool = torch.cat([self.pool, xi])
        self.progress(f"best response {epoch + 1}")

    def draw(self, images: Tensor, settings: Training, generator: Generator) -> tuple[Tensor]:
        drawn = int(torch.randint(len(self.pool), (1,), generator=generator))
        return (self.pool[drawn : drawn + 1],)

    def loss(self, model: Module, images: Tensor, labels: Tensor, settings: Training, *drawn: Tensor) -> Tensor:
        return mixed_loss(model, images, perturb(images, drawn[0]), labels, settings)


class UniversalAdversarialTraining(Adversary):
    """One perturbation for the whole training, one ascent step on it for each descent step (Shafahi et al. 2018).

    Each mini-batch moves the perturbation by `relative_step_size` * eps along the sign of its gradient, each sample's
    loss capped as in section 4.3, and then the weights on the perturbed and the clean images (sigma and 1 - sigma).
    """

    recordable = True

    def __init__(self, data: ImageSet, *, eps: float, relative_step_size: float = 0.25, progress: Any = None) -> None:
        check_eps(eps)
        check_data(data, has="images")
        check("a positive number", lambda value: value > 0, relative_step_size=relative_step_size)
        self.step = {"eps": eps, "steps": 1, "step_size": relative_step_size * eps}
        self.xi = torch.zeros(1, *data.images.shape[1:], device=data.device)

    def loss(self, model: Module, images: Tensor, labels: Tensor, settings: Training, *drawn: Tensor) -> Tensor:
        step = settings.attack() | self.step
        with torch.no_grad():
            self.xi.copy_(heap_pgd(model, images, labels, sharedness=len(images), start=self.xi, **step))
        return mixed_loss(model, images, perturb(images, self.xi), labels, settings)

    def state(self) -> dict[str, Tensor]:
        return {"xi": self.xi}

    def load(self, state: dict[str, Tensor]) -> None:
        self.xi.copy_(state["xi"])


DEFENSES = {
    "DeepFool UAD": DeepFoolUAD,
    "fictitious play": FictitiousPlay,
    "universal adversarial training": UniversalAdversarialTraining,
}
