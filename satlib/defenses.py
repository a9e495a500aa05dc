"""The defences that the paper compares with, and one concurrent to it, as adversaries of the one training loop."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from satlib.attacks import heap_pgd, perturb
from satlib.checks import check_eps, check_whole
from satlib.data.imageset import ImageSet
from satlib.deepfool import universal_deepfool
from satlib.device import autocast
from satlib.errors import SatlibError
from satlib.training import Training, mixed_loss
from satlib.universal import UniversalAttack, mean_of_signs


class Pool:
    """Universal perturbations (n, C, H, W) that a training meets; they go into its checkpoints."""

    pool: Tensor

    def state(self) -> dict[str, Tensor]:
        return {"pool": self.pool}

    def load(self, state: dict[str, Tensor]) -> None:
        self.pool = state["pool"]


class DeepFoolUAD(Pool):
    """Fine-tuning on a pool of DeepFool universal perturbations, made anew every few epochs (Moosavi-Dezfooli 2017).

    Before the first of every `epochs_each` epochs, `pool_size` perturbations within eps (pixel units) are found against
    the model as it is by `attack`, to which the `settings` go (passes, batch_size, ...), each on `images_each` training
    images drawn anew. Every training sample then gets a random one of them with probability `share`.
    """

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
        progress: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> None:
        check_eps(eps)
        check_whole(pool_size=pool_size, epochs_each=epochs_each, images_each=images_each)
        if not 0 <= share <= 1:
            raise SatlibError(f"share={share!r}: expected a probability")
        self.data, self.pool_size, self.epochs_each = data, pool_size, epochs_each
        self.share, self.images_each, self.progress = share, images_each, progress
        self.attack: Callable[..., Tensor] = functools.partial(attack, eps=[eps], **settings)
        self.pool = torch.zeros(0)

    def start_epoch(self, model: nn.Module, epoch: int, generator: torch.Generator) -> None:
        if epoch % self.epochs_each:
            return
        crafted = []
        for index in range(self.pool_size):
            chosen = torch.randperm(len(self.data), generator=generator)[: self.images_each].to(self.data.device)
            crafted.append(self.attack(model, self.data.images[chosen], self.data.labels[chosen], generator=generator))
            if self.progress:
                self.progress(f"universal perturbation {index + 1}/{self.pool_size}")
        self.pool = torch.cat(crafted)

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, settings: Training, generator: torch.Generator
    ) -> Tensor:
        which = torch.randint(len(self.pool), (len(images),), generator=generator).to(images.device)
        gets = (torch.rand(len(images), generator=generator) < self.share).to(images.device)
        seen = perturb(images, self.pool[which] * gets.view(-1, 1, 1, 1), 1)
        with autocast(images.device):
            logits = model(seen.contiguous(memory_format=torch.channels_last)).float()
        return F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)


class FictitiousPlay(Pool):
    """Training against all universal perturbations found so far (Perolat et al. 2018).

    Before each epoch the best response to the model as it is, by `attack` with the `settings` (steps, batch_size, ...),
    joins the set; in the epoch, every mini-batch meets one of the set, drawn uniformly, beside its clean images
    (weights sigma and 1 - sigma).
    """

    def __init__(
        self,
        data: ImageSet,
        *,
        eps: float,
        attack: UniversalAttack = mean_of_signs,
        progress: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> None:
        check_eps(eps)
        self.data, self.progress = data, progress
        self.attack: Callable[..., Tensor] = functools.partial(attack, eps=[eps], **settings)
        self.pool = torch.zeros(0, *data.images.shape[1:], device=data.device)

    def start_epoch(self, model: nn.Module, epoch: int, generator: torch.Generator) -> None:
        xi = self.attack(model, self.data.images, self.data.labels, generator=generator)
        self.pool = torch.cat([self.pool, xi])
        if self.progress:
            self.progress(f"best response {epoch + 1}")

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, settings: Training, generator: torch.Generator
    ) -> Tensor:
        drawn = int(torch.randint(len(self.pool), (1,), generator=generator))
        return mixed_loss(model, images, perturb(images, self.pool[drawn : drawn + 1]), labels, settings)


class UniversalAdversarialTraining:
    """One perturbation for the whole training, one ascent step on it for each descent step (Shafahi et al. 2018).

    Each mini-batch moves the perturbation by `relative_step_size` * eps along the sign of its gradient, each sample's
    loss capped as in section 4.3, and then the weights on the perturbed and the clean images (sigma and 1 - sigma).
    """

    def __init__(
        self,
        data: ImageSet,
        *,
        eps: float,
        relative_step_size: float = 0.25,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        check_eps(eps)
        if not relative_step_size > 0:
            raise SatlibError(f"relative_step_size={relative_step_size!r}: expected a positive number")
        self.eps, self.relative_step_size = eps, relative_step_size
        self.xi = torch.zeros(1, *data.images.shape[1:], device=data.device)

    def start_epoch(self, model: nn.Module, epoch: int, generator: torch.Generator) -> None:
        """Nothing to do: the perturbation goes on from where it is."""

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, settings: Training, generator: torch.Generator
    ) -> Tensor:
        self.xi = heap_pgd(
            model,
            images,
            labels,
            eps=self.eps,
            sharedness=len(images),
            steps=1,
            step_size=self.relative_step_size * self.eps,
            loss_threshold=settings.loss_threshold,
            label_smoothing=settings.label_smoothing,
            start=self.xi,
        )
        return mixed_loss(model, images, perturb(images, self.xi), labels, settings)

    def state(self) -> dict[str, Tensor]:
        return {"xi": self.xi}

    def load(self, state: dict[str, Tensor]) -> None:
        self.xi = state["xi"]


DEFENSES = {
    "DeepFool UAD": DeepFoolUAD,
    "fictitious play": FictitiousPlay,
    "universal adversarial training": UniversalAdversarialTraining,
}
