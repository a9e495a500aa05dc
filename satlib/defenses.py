"""Rivals of shared adversarial training as adversaries of the one training loop: those that the paper compares with,
one concurrent to it, later ones, and variants of our own."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.nn import Module

from satlib.attacks import attack_loss, heap_pgd, perturb, random_start, shuffled
from satlib.checks import check, check_arguments, check_data, check_eps, check_whole, outside, per_heap
from satlib.data.imageset import ImageSet
from satlib.deepfool import universal_deepfool
from satlib.device import interpreted, sent
from satlib.errors import SatlibError
from satlib.network import attackable, logits_of
from satlib.training import Adversary, Training, clean_loss, mixed_loss, training_loss
from satlib.universal import UniversalAttack, mean_of_signs, name_of, takes


class Pool(Adversary):
    """Perturbations `pool` (n, C, H, W) within eps that stay from mini-batch to mini-batch, and go into checkpoints."""

    weighed = True

    def __init__(self, data: ImageSet, *, eps: float, count: int = 0) -> None:
        check_eps(eps)
        check_data(data, has="images")
        self.data, self.eps = data, float(eps)
        self.pool = torch.zeros(count, *data.images.shape[1:], device=data.device)

    def steps(self, settings: Training) -> dict[str, Any]:
        """What `heap_pgd` takes for the K steps of shared training within these perturbations' eps."""
        return settings.attack() | {"eps": self.eps, "step_size": settings.relative_step_size * self.eps}

    def state(self) -> dict[str, Tensor]:
        return {"pool": self.pool}

    def load(self, state: dict[str, Tensor]) -> None:
        check(
            f"a pool of shape {tuple(self.pool.shape)}", lambda pool: pool.shape == self.pool.shape, state=state["pool"]
        )
        self.pool = state["pool"].clone()


class Crafted(Pool):
    """Universal perturbations that `attack` finds before an epoch.

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
        super().__init__(data, eps=eps)
        self.progress = outside(progress or (lambda text: None))
        further = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(attack).parameters.values())
        for name in settings:
            if not (further or takes(attack, name)):
                raise SatlibError(f"{name}={settings[name]!r}: attack {name_of(attack)!r} has no such setting")
        check_arguments(**settings)
        through = {"straight_through": False} if takes(attack, "straight_through") else {}  # as published
        self.attack: Callable[..., Tensor] = functools.partial(attack, eps=[eps], **through | settings)

    def load(self, state: dict[str, Tensor]) -> None:
        self.pool = state["pool"].clone()  # however large it has grown


class DeepFoolUAD(Crafted):
    """Fine-tuning on a pool of DeepFool universal perturbations, made anew every few epochs (Moosavi-Dezfooli 2017).

    Before the first of every `epochs_each` epochs, `pool_size` perturbations are found against the model as it is, each
    on at most `images_each` training images drawn anew. Every training sample then gets a random one with probability
    `share`, which stands in for sigma.
    """

    recordable, weighed = True, False

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


class FictitiousPlay(Crafted):
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


class UniversalAdversarialTraining(Pool):
    """One perturbation for the whole training, one ascent step on it for each descent step (Shafahi et al. 2018).

    Each mini-batch moves the perturbation by `relative_step_size` * eps along the sign of its gradient, each sample's
    loss capped as in section 4.3, and then the weights on the perturbed and the clean images (sigma and 1 - sigma).
    Theirs moves the weights first, and sees perturbed images alone.
    """

    recordable = True

    def __init__(self, data: ImageSet, *, eps: float, relative_step_size: float = 0.25) -> None:
        super().__init__(data, eps=eps, count=1)
        check_arguments(relative_step_size=relative_step_size)
        self.step = {"eps": eps, "steps": 1, "step_size": relative_step_size * eps}

    def loss(self, model: Module, images: Tensor, labels: Tensor, settings: Training, *drawn: Tensor) -> Tensor:
        step = settings.attack() | self.step
        with torch.no_grad():
            self.pool.copy_(heap_pgd(model, images, labels, sharedness=len(images), start=self.pool, **step))
        return mixed_loss(model, images, perturb(images, self.pool), labels, settings)


class ClassWiseTraining(Pool):
    """One perturbation for each class, moved by the training pass's own gradient (Benz et al. 2021).

    An image meets that of its class. The weights see perturbed and clean images (sigma and 1 - sigma), and in the same
    backward pass each perturbation takes a step of `relative_step_size` * eps along the sign of its gradient.
    """

    recordable = True

    def __init__(self, data: ImageSet, *, eps: float, relative_step_size: float = 0.25) -> None:
        _check_classes(data)
        super().__init__(data, eps=eps, count=len(data.classes))
        check_arguments(relative_step_size=relative_step_size)
        self.step_size = relative_step_size * eps

    def loss(self, model: Module, images: Tensor, labels: Tensor, settings: Training, *drawn: Tensor) -> Tensor:
        shared = self.pool.clone().requires_grad_()
        shared.register_hook(self._ascend)
        return mixed_loss(model, images, perturb(images, shared[labels], 1), labels, settings)

    @torch.no_grad()
    def _ascend(self, gradient: Tensor) -> None:
        self.pool.add_(self.step_size * gradient.sign()).clamp_(-self.eps, self.eps)


class MetaAdversarialTraining(Pool):
    """A pool of perturbations from which each image's own is made in a few steps (Metzen et al. 2021).

    Of `candidates` drawn from the pool for an image, the one with the highest loss on it is refined by K steps with
    s = 1, and each that was refined moves by `rate` towards the mean of what came out (Reptile). The pool starts in
    random corners of the box, drawn from `seed`. Theirs has 1,000 perturbations with step sizes and, on request,
    targets of their own, and trains on perturbed images alone; here clean ones are seen, too (sigma and 1 - sigma).
    """

    recordable = True

    def __init__(
        self,
        data: ImageSet,
        *,
        eps: float,
        pool_size: int = 20,
        candidates: int = 5,
        rate: float = 0.25,
        seed: int = 0,
    ) -> None:
        check_whole(pool_size=pool_size, candidates=candidates)
        check_whole(least=0, seed=seed)
        check("a number in (0, 1]", lambda value: 0 < value <= 1, rate=rate)
        super().__init__(data, eps=eps, count=pool_size)
        self.candidates, self.rate = candidates, rate
        drawn = random_start(self.pool.shape, per_heap(eps, None, data.device), Generator().manual_seed(seed))
        self.pool.copy_(drawn.sign() * eps)

    def draw(self, images: Tensor, settings: Training, generator: Generator) -> tuple[Tensor]:
        tried = torch.randint(len(self.pool), (self.candidates, len(images)), generator=generator)
        return (sent(tried, images.device),)

    def loss(self, model: Module, images: Tensor, labels: Tensor, settings: Training, *drawn: Tensor) -> Tensor:
        (tried,) = drawn
        with torch.no_grad(), attackable(model) as net:
            losses = [attack_loss(logits_of(net, perturb(images, self.pool[each], 1)), labels) for each in tried]
        means = torch.stack([each.flatten(1).mean(1) if each.ndim > 1 else each for each in losses])
        worst = tried.gather(0, means.argmax(0, keepdim=True))[0]
        start = self.pool[worst]
        xi = heap_pgd(model, images, labels, sharedness=1, start=start, **self.steps(settings))
        with torch.no_grad():
            moves = torch.zeros_like(self.pool).index_add_(0, worst, xi - start)
            times = moves.new_zeros(len(self.pool)).index_add_(0, worst, moves.new_ones(len(worst)))
            self.pool.add_(self.rate * moves / times.clamp(min=1).view(-1, 1, 1, 1))
        return mixed_loss(model, images, perturb(images, xi, 1), labels, settings)


class JacobianRegularisation(Adversary):
    """No perturbation, but a penalty on the Jacobian of the logits, estimated by one random projection for each image
    (Hoffman et al. 2019).

    The penalty, weighed by sigma, is half the mean squared change of the logits under white noise of standard deviation
    eps (pixel units) on a network that were linear: eps^2 ||J||_F^2 / 2.
    """

    recordable, weighed = True, True

    def __init__(self, data: ImageSet, *, eps: float) -> None:
        check_eps(eps)
        _check_classes(data)
        self.eps, self.classes = float(eps), len(data.classes)

    def draw(self, images: Tensor, settings: Training, generator: Generator) -> tuple[Tensor]:
        return (sent(F.normalize(torch.randn(len(images), self.classes, generator=generator)), images.device),)

    def loss(self, model: Module, images: Tensor, labels: Tensor, settings: Training, *drawn: Tensor) -> Tensor:
        x = images.detach().requires_grad_()
        with interpreted():  # the compiler knows no second derivatives
            logits = logits_of(model, x)
        if logits.shape != drawn[0].shape:
            raise SatlibError(f"the model returns {tuple(logits.shape)}: expected {tuple(drawn[0].shape)}, one a class")
        (gradients,) = torch.autograd.grad((logits.float() * drawn[0]).sum(), x, create_graph=True)
        penalty = 0.5 * self.eps**2 * self.classes * gradients.square().sum() / len(images)
        return training_loss(logits, labels, settings) + settings.sigma * penalty


class PooledSharedTraining(Pool):
    """Ours: shared adversarial training whose heaps go on from earlier perturbations, so that K steps refine a pattern
    instead of beginning anew.

    Each of the first `pool_size` heaps of `sharedness` images (at most a mini-batch) starts, with probability `share`,
    from one of `pool_size` perturbations, and takes its place in the pool afterwards; the others start at random, as in
    shared training. threshold: whether each sample's loss is capped as there. straight_through: see
    `satlib.attacks.perturb_straight_through`. targeted: each heap goes for a class drawn at random instead of away from
    its labels, without the cap.
    """

    recordable = True

    def __init__(
        self,
        data: ImageSet,
        *,
        eps: float,
        sharedness: int = 64,
        pool_size: int = 32,
        share: float = 0.5,
        threshold: bool = True,
        straight_through: bool = False,
        targeted: bool = False,
    ) -> None:
        check_whole(sharedness=sharedness, pool_size=pool_size)
        check("a probability", lambda value: 0 <= value <= 1, share=share)
        check_arguments(straight_through=straight_through, targeted=targeted)
        check("True or False", lambda value: isinstance(value, bool), threshold=threshold)
        _check_classes(data) if targeted else check_data(data, has="images")
        super().__init__(data, eps=eps, count=pool_size)
        self.sharedness, self.share, self.targeted = sharedness, share, targeted
        self.changed: dict[str, Any] = {"straight_through": straight_through, "targeted": targeted}
        self.changed |= {} if threshold and not targeted else {"loss_threshold": None}
        self.classes = len(data.classes)

    def draw(self, images: Tensor, settings: Training, generator: Generator) -> tuple[Tensor, ...]:
        heaps = -(-len(images) // min(self.sharedness, len(images)))
        start = random_start((heaps, *images.shape[1:]), per_heap(self.eps, heaps, images.device), generator)
        places = shuffled(len(self.pool), generator)[:heaps]  # of the first heaps, where there are more than places
        again = torch.rand(len(places), generator=generator) < self.share
        aims = torch.randint(self.classes, (heaps,), generator=generator)
        return start, *(sent(each, images.device) for each in (places, again, aims))

    def loss(self, model: Module, images: Tensor, labels: Tensor, settings: Training, *drawn: Tensor) -> Tensor:
        (start, places, again, aims), sharedness = drawn, min(self.sharedness, len(images))
        again, count = again.view(-1, 1, 1, 1), len(places)
        start = torch.cat([torch.where(again, self.pool[places], start[:count]), start[count:]])
        aim = aims.repeat_interleave(sharedness)[: len(images)] if self.targeted else labels
        options = self.steps(settings) | self.changed
        xi = heap_pgd(model, images, aim, sharedness=sharedness, start=start, **options)
        with torch.no_grad():
            self.pool.index_copy_(0, places, torch.where(again, xi[:count], self.pool[places]))
        return mixed_loss(model, images, perturb(images, xi, sharedness), labels, settings)


def _check_classes(data: ImageSet) -> None:
    check_data(data, has="images")
    check("one for each image: this defence is for classification", lambda value: value.ndim == 1, labels=data.labels)


DEFENSES: dict[str, Callable[..., Adversary]] = {
    "DeepFool UAD": DeepFoolUAD,
    "fictitious play": FictitiousPlay,
    "universal adversarial training": UniversalAdversarialTraining,
    "class-wise training": ClassWiseTraining,
    "meta adversarial training": MetaAdversarialTraining,
    "Jacobian regularisation": JacobianRegularisation,
    "pooled shared training": PooledSharedTraining,
}
