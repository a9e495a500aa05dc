"""ERM, adversarial and shared adversarial training: one loop (section 4.2)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from satlib import parallel
from satlib.attacks import heap_pgd, images_at_once, perturb
from satlib.data.imageset import IGNORE
from satlib.device import autocast
from satlib.errors import SatlibError

# What each optimizer keeps for every weight: its name in a checkpoint, and PyTorch's.
OPTIMIZERS = {
    "sgd": {"velocity": "momentum_buffer"},
    "adam": {"mean": "exp_avg", "square": "exp_avg_sq"},
}


@dataclass(frozen=True)
class Training:
    """Settings of one training. Defaults: the fine-tuning of section 6.1, with our choices where it is silent.

    optimizer: "sgd", or "adam" (section 6.3), which has its own default momenta; `momentum` and `nesterov` are SGD's.
    sigma weighs adversarial against clean loss; 0 is ERM, and needs no attack. eps (pixel units), sharedness,
    steps (K) and relative_step_size (alpha_k / eps) set the heap adversary; sharedness 1 is standard
    adversarial training. schedule "step" divides the learning rate by 10 at the `milestones` (in epochs);
    "one-cycle" warms up linearly over `warm_up` of the iterations and falls linearly to zero. epoch_images
    shortens an epoch to that many images, drawn anew each time; 0 means all.
    """

    optimizer: str = "sgd"
    epochs: int = 65
    batch_size: int = 128
    learning_rate: float = 0.0025
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: str = "step"
    milestones: tuple[int, ...] = (50,)
    warm_up: float = 0.25
    epoch_images: int = 0
    label_smoothing: float = 0.1
    sigma: float = 0.0
    eps: float = 0.0
    sharedness: int = 1
    steps: int = 4
    relative_step_size: float = 0.5
    loss_threshold: float | None = -math.log(0.2)
    seed: int = 0

    def __post_init__(self) -> None:
        def check(name: str, right: bool, expected: str) -> None:
            if not right:
                raise SatlibError(f"{name}={getattr(self, name)!r}: expected {expected}")

        check("epochs", isinstance(self.epochs, int) and self.epochs >= 0, "a whole number of at least 0")
        for name in ("batch_size", "sharedness", "steps"):
            value = getattr(self, name)
            check(name, isinstance(value, int) and value >= 1, "a whole number of at least 1")
        for name in ("learning_rate", "relative_step_size"):
            check(name, 0 < getattr(self, name) < math.inf, "a positive number")
        for name in ("momentum", "label_smoothing", "warm_up"):
            check(name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        check("sigma", 0 <= self.sigma <= 1, "a number in [0, 1]")
        check("eps", 0 <= self.eps <= 255, "a number from 0 to 255 (pixel units)")
        check("weight_decay", 0 <= self.weight_decay < math.inf, "a number of at least 0")
        check("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        check("schedule", self.schedule in ("step", "one-cycle"), "'step' or 'one-cycle'")
        check("sharedness", self.sharedness <= self.batch_size, f"at most batch_size ({self.batch_size})")
        whole = isinstance(self.epoch_images, int) and self.epoch_images >= 0
        check("epoch_images", whole, "a whole number of at least 0 (0: all images)")
        check("nesterov", not self.nesterov or self.momentum > 0, "False, or momentum > 0")
        cap = self.loss_threshold
        check("loss_threshold", cap is None or cap > 0, "a positive number, or None for no cap")

    def config(self) -> dict:
        """The settings as plain JSON types; those of the attack only where there is one (sigma > 0)."""
        config = asdict(self) | {"milestones": list(self.milestones)}
        unused = {"milestones"} if self.schedule == "one-cycle" else {"warm_up"}
        unused |= {"optimizer"} if self.optimizer == "sgd" else {"momentum", "nesterov"}
        if self.sigma == 0:
            unused |= {"eps", "sharedness", "steps", "relative_step_size", "loss_threshold"}
        return {name: value for name, value in config.items() if name not in unused}

    @classmethod
    def from_config(cls, config: dict) -> "Training":
        """The settings that `config()` gave."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(config) - known):
            raise SatlibError(f"unknown training setting {unknown[0]!r}: expected some of {', '.join(sorted(known))}")
        return cls(**config | {"milestones": tuple(config.get("milestones", ()))})


def learning_rate_at(settings: Training, epoch: float) -> float:
    """Learning rate after `epoch` epochs (a fraction within an epoch)."""
    if settings.schedule == "step":
        return settings.learning_rate * 0.1 ** sum(epoch >= milestone for milestone in settings.milestones)
    done = epoch / settings.epochs
    if done < settings.warm_up:
        return settings.learning_rate * done / settings.warm_up
    return settings.learning_rate * (1 - done) / (1 - settings.warm_up)


def shared_adversarial_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: Training,
    generator: torch.Generator,
    *,
    start: Tensor | None = None,
    forward: nn.Module | None = None,
) -> Tensor:
    """sigma * L(theta, x + xi, y) + (1 - sigma) * L(theta, x, y), xi from the heap adversary (section 4.2).

    images (d, C, H, W) float32 in 0..255, labels (d,); `settings` are those of the attack and of the loss. start: the
    heaps' initial perturbations, by default random. forward: the model as it is trained, where that is wrapped.
    """
    sharedness = min(settings.sharedness, len(images))
    xi = heap_pgd(
        model,
        images,
        labels,
        eps=settings.eps,
        sharedness=sharedness,
        steps=settings.steps,
        step_size=settings.relative_step_size * settings.eps,
        loss_threshold=settings.loss_threshold,
        label_smoothing=settings.label_smoothing,
        generator=generator,
        start=start,
    )
    return mixed_loss(forward or model, images, perturb(images, xi, sharedness), labels, settings)


def mixed_loss(model: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor, settings: Training) -> Tensor:
    """sigma * L(theta, adversarial, y) + (1 - sigma) * L(theta, images, y), in one forward pass of both halves."""
    both = torch.cat([adversarial, images])
    with autocast(images.device):
        logits = model(both.contiguous(memory_format=torch.channels_last)).float()
    perturbed, clean = (training_loss(half, labels, settings) for half in logits.chunk(2))
    return settings.sigma * perturbed + (1 - settings.sigma) * clean


def training_loss(logits: Tensor, labels: Tensor, settings: Training) -> Tensor:
    """Mean cross-entropy with soft targets, over images or over the pixels that have a class; never capped."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
    options = {"label_smoothing": settings.label_smoothing, "ignore_index": IGNORE, "reduction": "sum"}
    return F.cross_entropy(logits, labels, **options) / decisions(labels).clamp(min=1)


def decisions(labels: Tensor) -> Tensor:
    """How many decisions labels (n,) or (n, H, W) are about: images, or pixels that have a class."""
    return (labels != IGNORE).sum() if labels.ndim > 1 else torch.tensor(len(labels), device=labels.device)


def _optimizer(weights: Sequence[nn.Parameter], settings: Training) -> torch.optim.Optimizer:
    options = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adam":
        return torch.optim.Adam(weights, **options)
    return torch.optim.SGD(weights, momentum=settings.momentum, nesterov=settings.nesterov, **options)


def _at_least_one(share: slice) -> slice:
    """A rank without images of its own takes part in a step with one that does not count."""
    return share if share.stop > share.start else slice(0, 1)


class Adversary(Protocol):
    """A defence that trains against perturbations of its own making, in place of the heap adversary."""

    def start_epoch(self, model: nn.Module, epoch: int, generator: torch.Generator) -> None:
        """Called before each epoch; what it finds now is what `loss` trains against."""

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, settings: Training, generator: torch.Generator
    ) -> Tensor:
        """The training loss of a mini-batch."""

    def state(self) -> dict[str, Tensor]:
        """Everything that `load` needs to go on after an epoch."""

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""


def train(
    model: nn.Module,
    data: Any,
    settings: Training,
    *,
    adversary: Adversary | None = None,
    state: dict[str, Tensor] | None = None,
    history: list[dict] | None = None,
    after_epoch: Callable[[dict[str, Tensor], list[dict]], None] | None = None,
    progress: Callable[[str, float], None] | None = None,
    until: int | None = None,
) -> list[dict]:
    """Train `model` in place on `data` (an ImageSet on the model's device); returns the history, an entry an epoch.

    The loss is that of the `adversary` if one is given, else shared adversarial training's where sigma > 0, else ERM's.

    after_epoch(state, history) is called with everything that resuming needs; handed back as `state` and
    `history` it continues as if never stopped: each epoch draws its randomness from (seed, epoch) alone. until: stop
    after so many of the epochs.
    progress(text, done) is called after every mini-batch with the share of all iterations done, in [0, 1].

    Where PyTorch's process group is initialised (`torchrun`), every rank calls this alike, on the same data: each takes
    its heaps of every mini-batch, the attack is on the bare model, gradients are averaged, and all go on from rank 0's
    state and history. Only rank 0 calls `after_epoch` and `progress`; what the former raises there stops all of them.

    Raises SatlibError for an adversary on several ranks, for more ranks than heaps in a mini-batch, and where the loss
    is not finite after an epoch, naming the epoch and the mend.
    """
    names, weights = zip(*model.named_parameters(), strict=True)
    kept = OPTIMIZERS[settings.optimizer]
    memory = [{slot: torch.zeros_like(weight) for slot in kept} for weight in weights]
    ranks = parallel.here()
    if adversary is not None and ranks.count > 1:
        raise SatlibError(f"{type(adversary).__name__} trains on one rank, not {ranks.count}; run it without torchrun")
    sharedness = settings.sharedness if settings.sigma > 0 else 1
    if ranks.count > (heaps := -(-settings.batch_size // sharedness)):
        raise SatlibError(f"{ranks.count} ranks for {heaps} heaps in a mini-batch: some would have none; use fewer")
    history = list(history or [])
    if state is not None:
        model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
        for name, slots in zip(names, memory, strict=True):
            for slot, buffer in slots.items():
                buffer.copy_(state[f"{slot}.{name}"])  # which stays in the weight's memory format, as on other ranks
        if adversary is not None:
            found = {k.removeprefix("adversary."): v for k, v in state.items() if k.startswith("adversary.")}
            adversary.load({name: value.to(weights[0].device) for name, value in found.items()})
    optimizer = _optimizer(weights, settings)
    history = ranks.told(history)
    ranks.agree([*model.state_dict().values(), *(buffer for slots in memory for buffer in slots.values())])
    wrapped = ranks.wrapped(model)
    images_each = min(settings.epoch_images or len(data), len(data))
    batches_each = math.ceil(images_each / settings.batch_size)
    for weight, slots in zip(weights, memory, strict=True):
        optimizer.state[weight].update({kept[slot]: buffer for slot, buffer in slots.items()})
        if settings.optimizer == "adam":
            optimizer.state[weight]["step"] = torch.tensor(float(len(history) * batches_each))
    for epoch in range(len(history), settings.epochs if until is None else until):
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
        total = torch.zeros((), device=weights[0].device)
        if adversary is not None:
            adversary.start_epoch(model, epoch, generator)
        model.train()
        batches = data.batches(
            settings.batch_size,
            generator=generator,
            augment=True,
            limit=images_each,
            share=lambda size: _at_least_one(ranks.share(size, sharedness)),
        )
        for batch, (x, y) in enumerate(batches):
            optimizer.param_groups[0]["lr"] = learning_rate_at(settings, epoch + batch / batches_each)
            size = min(settings.batch_size, images_each - batch * settings.batch_size)
            own = ranks.share(size, sharedness)
            ranks.agree(model.buffers())  # the attack is on the same model on every rank
            if adversary is not None:
                loss = adversary.loss(model, x, y, settings, generator)
            elif settings.sigma > 0:
                start = ranks.start(size, sharedness, x.shape[1:], settings.eps, generator) if ranks.count > 1 else None
                if own.start == own.stop:
                    start = torch.zeros_like(x)  # not trained on
                loss = shared_adversarial_loss(model, x, y, settings, generator, start=start, forward=wrapped)
            else:
                with autocast(x.device):
                    logits = wrapped(x).float()
                loss = training_loss(logits, y, settings)
            if ranks.count > 1:  # gradients are averaged over ranks, losses are means over decisions
                known = decisions(y).float() * (own.stop > own.start)
                loss = loss * (known * ranks.count / ranks.total(known.clone()).clamp(min=1))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * (size / ranks.count)
            if progress and ranks.rank == 0:
                progress(
                    f"epoch {epoch + 1}/{settings.epochs}",
                    (epoch + (batch + 1) / batches_each) / settings.epochs,
                )
        mean_loss = ranks.total(total).item() / images_each
        if not math.isfinite(mean_loss):
            raise SatlibError(
                f"the loss is {mean_loss} in epoch {epoch + 1}: training diverged;"
                f" lower learning_rate={settings.learning_rate!r}"
            )
        history.append({"epoch": epoch + 1, "loss": round(mean_loss, 6)})
        stopped: Exception | None = None
        if after_epoch and ranks.rank == 0:
            momenta = {
                f"{slot}.{n}": optimizer.state[w][name]
                for n, w in zip(names, weights, strict=True)
                for slot, name in kept.items()
            }
            found = {f"adversary.{k}": v for k, v in adversary.state().items()} if adversary is not None else {}
            try:
                after_epoch({f"model.{k}": v for k, v in model.state_dict().items()} | momenta | found, history)
            except Exception as error:
                stopped = error
        if ranks.told(stopped is not None):
            raise stopped or parallel.Stopped
    model.eval()
    return history


@torch.no_grad()
def accuracy(model: nn.Module, data: Any, *, batch_size: int = 512) -> float:
    """Share of `data` (an ImageSet; of its labelled pixels, in segmentation) that the model, in eval mode, classifies
    correctly."""
    return share_right(confusion(model, data, batch_size=batch_size))


@torch.no_grad()
def confusion(model: nn.Module, data: Any, *, batch_size: int = 512) -> Tensor:
    """How often each class (row) is taken for which (column) by the model in eval mode: int64 (classes, classes).

    Counted are images, or in segmentation pixels whose label is not 255.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    classes = len(data.classes)
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=data.device)
    try:
        for x, y in data.batches(min(batch_size, images_at_once(data.images))):
            with autocast(x.device):
                predicted = model(x).argmax(1)
            known = y != IGNORE if y.ndim > 1 else torch.ones_like(y, dtype=torch.bool)
            counts += torch.bincount(y[known] * classes + predicted[known], minlength=classes * classes)
    finally:
        for module, training in modes:
            module.training = training
    return counts.view(classes, classes)


def share_right(counts: Tensor) -> float:
    """Share of decisions that are right, from `confusion`."""
    return counts.diagonal().sum().item() / counts.sum().item()


def class_iou(counts: Tensor) -> Tensor:
    """Intersection over union of each class, from `confusion`; nan of a class that is neither there nor predicted."""
    hits = counts.diagonal().double()
    return hits / (counts.sum(0) + counts.sum(1) - hits)
