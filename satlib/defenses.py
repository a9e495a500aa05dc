"""The defences that the paper compares with, and one concurrent to it, as adversaries of the one training loop."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from satlib.attacks import attackable, heap_gradients, heap_pgd, perturb
from satlib.checks import check_eps
from satlib.data.imageset import ImageSet
from satlib.deepfool import universal_deepfool
from satlib.device import autocast
from satlib.errors import SatlibError
from satlib.training import Training, mixed_loss


class DeepFoolUAD:
    """Fine-tuning on a pool of DeepFool universal perturbations, made anew every few epochs (Moosavi-Dezfooli 2017).

    Before the first of every `epochs_each` epochs, `pool_size` perturbations within eps (pixel units) are found against
    the model as it is, each on `images_each` training images drawn anew. Every training sample then gets a random
    one of them with probability `share`. `deepfool` goes to `universal_deepfool` (passes, batch_size, ...).
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
        progress: Callable[[str], None] | None = None,
        **deepfool: object,
    ) -> None:
        check_eps(eps)
        _check_whole(pool_size=pool_size, epochs_each=epochs_each, images_each=images_each)
        if not 0 <= share <= 1:
            raise SatlibError(f"share={share!r}: expected a probability")
        self.data, self.eps, self.pool_size, self.epochs_each = data, eps, pool_size, epochs_each
        self.share, self.images_each, self.deepfool, self.progress = share, images_each, deepfool, progress
        self.pool = torch.zeros(0)

    def start_epoch(self, model: nn.Module, epoch: int, generator: torch.Generator) -> None:
        if epoch % self.epochs_each:
            return
        found = []
        for index in range(self.pool_size):
            chosen = torch.randperm(len(self.data), generator=generator)[: self.images_each].to(self.data.device)
            found.append(
                universal_deepfool(model, self.data.images[chosen], eps=self.eps, generator=generator, **self.deepfool)
            )
            if self.progress:
                self.progress(f"universal perturbation {index + 1}/{self.pool_size}")
        self.pool = torch.cat(found)

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, settings: Training, generator: torch.Generator
    ) -> Tensor:
        which = torch.randint(len(self.pool), (len(images),), generator=generator).to(images.device)
        gets = (torch.rand(len(images), generator=generator) < self.share).to(images.device)
        seen = perturb(images, self.pool[which] * gets.view(-1, 1, 1, 1), 1)
        with autocast(images.device):
            logits = model(seen.contiguous(memory_format=torch.channels_last)).float()
        return F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)

    def state(self) -> dict[str, Tensor]:
        return {"pool": self.pool}

    def load(self, state: dict[str, Tensor]) -> None:
        self.pool = state["pool"]


class FictitiousPlay:
    """Training against all universal perturbations found so far (Perolat et al. 2018).

    Before each epoch the best response to the model as it is joins the set; in the epoch, every mini-batch meets one of
    the set, drawn uniformly, beside its clean images (weights sigma and 1 - sigma). `response` goes to `mean_of_signs`.
    """

    def __init__(
        self, data: ImageSet, *, eps: float, progress: Callable[[str], None] | None = None, **response: object
    ) -> None:
        check_eps(eps)
        self.data, self.eps, self.response, self.progress = data, eps, response, progress
        self.pool = torch.zeros(0, *data.images.shape[1:], device=data.device)

    def start_epoch(self, model: nn.Module, epoch: int, generator: torch.Generator) -> None:
        xi = mean_of_signs(model, self.data, eps=self.eps, generator=generator, **self.response)
        self.pool = torch.cat([self.pool, xi])
        if self.progress:
            self.progress(f"best response {epoch + 1}")

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, settings: Training, generator: torch.Generator
    ) -> Tensor:
        drawn = int(torch.randint(len(self.pool), (1,), generator=generator))
        xi = self.pool[drawn : drawn + 1]
        return mixed_loss(model, images, perturb(images, xi, len(images)), labels, settings)

    def state(self) -> dict[str, Tensor]:
        return {"pool": self.pool}

    def load(self, state: dict[str, Tensor]) -> None:
        self.pool = state["pool"]


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
        return mixed_loss(model, images, perturb(images, self.xi, len(images)), labels, settings)

    def state(self) -> dict[str, Tensor]:
        return {"xi": self.xi}

    def load(self, state: dict[str, Tensor]) -> None:
        self.xi = state["xi"]


DEFENSES = {
    "DeepFool UAD": DeepFoolUAD,
    "fictitious play": FictitiousPlay,
    "universal adversarial training": UniversalAdversarialTraining,
}


def mean_of_signs(
    model: nn.Module,
    data: ImageSet,
    *,
    eps: float,
    steps: int = 100,
    batch_size: int = 128,
    relative_step_size: float = 0.25,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The best universal response of Perolat et al. (2018): (1, C, H, W), |xi| <= eps in pixel units.

    xi <- project(xi + alpha * mean over the mini-batch of the *sign* of every sample's gradient): each image has one
    vote a pixel, whatever its loss. alpha = relative_step_size * eps; the start is uniform in [-eps, eps].
    """
    check_eps(eps)
    _check_whole(steps=steps, batch_size=batch_size)
    generator = generator or torch.Generator()
    xi = (torch.rand(1, *data.images.shape[1:], generator=generator) * 2 - 1).to(data.device) * eps
    with attackable(model) as net:
        for _ in range(steps):
            chosen = torch.randint(len(data), (batch_size,), generator=generator).to(data.device)
            x, y = data.images[chosen].float().contiguous(memory_format=torch.channels_last), data.labels[chosen]
            gradients, _ = heap_gradients(net, x, y, xi.expand(batch_size, -1, -1, -1), sharedness=1)
            xi = (xi + relative_step_size * eps * gradients.sign().mean(0, keepdim=True)).clamp(-eps, eps)
    return xi


def _check_whole(**values: int) -> None:
    for name, value in values.items():
        if not (isinstance(value, int) and value >= 1):
            raise SatlibError(f"{name}={value!r}: expected a whole number of at least 1")
