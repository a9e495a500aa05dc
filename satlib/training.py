"""ERM, adversarial and shared adversarial training: one loop (section 4.2)."""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.nn import Module

from satlib import checks
from satlib.attacks import heap_pgd, images_at_once, perturb, random_start
from satlib.checks import check_data, kernel, outside, per_heap, trusted
from satlib.data.imageset import IGNORE
from satlib.device import exact, recorded, recorder
from satlib.errors import SatlibError
from satlib.network import OwnNetwork, evaluated, logits_of
from satlib.parallel import Ranks, current_ranks, decisions

# Each optimizer, and what it keeps for every weight: its name in a checkpoint, and PyTorch's.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, str]]] = {
    "sgd": (torch.optim.SGD, {"velocity": "momentum_buffer"}),
    "adam": (torch.optim.Adam, {"mean": "exp_avg", "square": "exp_avg_sq"}),
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
        def check(expected: str, right: Callable[[Any], bool], *names: str) -> None:
            checks.check(expected, right, **{name: getattr(self, name) for name in names})

        checks.check_eps(self.eps)
        checks.check_known(OPTIMIZERS, optimizer=self.optimizer)
        checks.check_whole(least=0, epochs=self.epochs, epoch_images=self.epoch_images)
        checks.check_arguments(**vars(self))
        checks.check_whole(sharedness=self.sharedness)
        check("a whole number", lambda value: isinstance(value, Integral) and not isinstance(value, bool), "seed")
        check("a tuple of epochs", lambda value: all(each >= 0 for each in value), "milestones")
        check(f"at most batch_size ({self.batch_size})", lambda value: value <= self.batch_size, "sharedness")
        check("a positive number", lambda value: 0 < value < math.inf, "learning_rate")
        check("a number of at least 0", lambda value: 0 <= value < math.inf, "weight_decay")
        check("a number in [0, 1)", lambda value: 0 <= value < 1, "momentum", "warm_up")
        check("a number in [0, 1]", lambda value: 0 <= value <= 1, "sigma")
        check("'step' or 'one-cycle'", lambda value: value in ("step", "one-cycle"), "schedule")
        check("False, or momentum > 0", lambda value: not value or self.momentum > 0, "nesterov")

    def attack(self) -> dict[str, Any]:
        """What `heap_pgd` takes of these settings; its gradient is that of the clamp, as in all published trainings."""
        own = {name: getattr(self, name) for name in ("eps", "steps", "loss_threshold", "label_smoothing")}
        return own | {"step_size": self.relative_step_size * self.eps, "straight_through": False}

    def config(self) -> dict:
        """The settings as plain JSON types; those of the attack only where there is one (sigma > 0)."""
        unused = {"milestones"} if self.schedule == "one-cycle" else {"warm_up"}
        unused |= {"optimizer"} if self.optimizer == "sgd" else {"momentum", "nesterov"}
        if self.sigma == 0:
            unused |= {"eps", "sharedness", "steps", "relative_step_size", "loss_threshold"}
        config = asdict(self) | {"milestones": list(self.milestones)}
        return {name: value for name, value in config.items() if name not in unused}

    @classmethod
    def from_config(cls, config: dict) -> "Training":
        """The settings that `config()` gave."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(config) - known):
            raise SatlibError(f"unknown training setting {unknown[0]!r}: expected some of {', '.join(sorted(known))}")
        return cls(**config | {"milestones": tuple(config.get("milestones") or ())})


def learning_rate_at(settings: Training, epoch: float) -> float:
    """Learning rate after `epoch` epochs (a fraction within an epoch)."""
    if settings.schedule == "step":
        return settings.learning_rate * 0.1 ** sum(epoch >= milestone for milestone in settings.milestones)
    done = epoch / settings.epochs
    if done < settings.warm_up:
        return settings.learning_rate * done / settings.warm_up
    return settings.learning_rate * (1 - done) / (1 - settings.warm_up)


def heap_starts(images: Tensor, settings: Training, generator: Generator) -> tuple[Tensor]:
    """Where the heaps of a mini-batch (d, C, H, W) begin: uniform in [-eps, eps], (ceil(d / sharedness), C, H, W)."""
    heaps = -(-len(images) // min(settings.sharedness, len(images)))
    return (random_start((heaps, *images.shape[1:]), per_heap(settings.eps, heaps, images.device), generator),)


def shared_adversarial_loss(model: Module, images: Tensor, labels: Tensor, settings: Training, start: Tensor) -> Tensor:
    """sigma * L(theta, x + xi, y) + (1 - sigma) * L(theta, x, y), xi from the heap adversary (section 4.2).

    images (d, C, H, W) float32 in 0..255, labels (d,) or (d, H, W); `settings` are those of the attack and of the
    loss; start: the heaps' initial perturbations, as `heap_starts` draws them.
    """
    sharedness = min(settings.sharedness, len(images))
    xi = heap_pgd(model, images, labels, sharedness=sharedness, start=start, **settings.attack())
    return mixed_loss(model, images, perturb(images, xi, sharedness), labels, settings)


def mixed_loss(model: Module, images: Tensor, adversarial: Tensor, labels: Tensor, settings: Training) -> Tensor:
    """sigma * L(theta, adversarial, y) + (1 - sigma) * L(theta, images, y), in one forward pass of both halves."""
    halves = logits_of(model, torch.cat([adversarial, images])).chunk(2)
    perturbed, clean = (training_loss(half, labels, settings) for half in halves)
    return settings.sigma * perturbed + (1 - settings.sigma) * clean


def clean_loss(model: Module, images: Tensor, labels: Tensor, settings: Training, *_: Any) -> Tensor:
    """L(theta, images, y): what ERM minimises."""
    return training_loss(logits_of(model, images), labels, settings)


def training_loss(logits: Tensor, labels: Tensor, settings: Training) -> Tensor:
    """Mean cross-entropy with soft targets, over images or over the pixels that have a class; never capped."""
    logits, smoothing = logits.float(), settings.label_smoothing
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    losses = F.cross_entropy(logits, labels, label_smoothing=smoothing, ignore_index=IGNORE, reduction="sum")
    return losses / decisions(labels).clamp(min=1)


class Adversary:
    """What a training trains against: the base of all of them. Only `loss` has to be defined.

    `draw` is for what is random in a mini-batch, the rest for what goes on from epoch to epoch. recordable: whether
    `loss` computes with its arguments and the tensors of `state` alone, which stay in their memory: on CUDA a step is
    then recorded once and launched whole. A class that has another `loss` has to say so again. weighed: whether sigma
    weighs what the loss has beside that of clean images; a training with sigma = 0 is then an error.
    """

    recordable: bool = False
    weighed: bool = False

    def start_epoch(self, model: Module, epoch: int, generator: Generator) -> None:
        """Called before each epoch; what it finds now is what `loss` trains against."""
        return

    def draw(self, images: Tensor, settings: Training, generator: Generator) -> tuple[Tensor, ...]:
        """Called with each mini-batch: what its `loss` takes further, on the images' device."""
        return ()

    def loss(self, model: Module, images: Tensor, labels: Tensor, settings: Training, *drawn: Tensor) -> Tensor:
        """The training loss of a mini-batch; arguments as for `shared_adversarial_loss`, then what `draw` drew."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Everything that `load` needs to go on after an epoch."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        return


class ERM(Adversary):
    """Nothing: the loss of clean images."""

    recordable = True
    loss = staticmethod(clean_loss)


class SharedAdversarialTraining(Adversary):
    """Perturbations that the heap adversary finds for each mini-batch (section 4.2)."""

    recordable, weighed = True, True
    draw = staticmethod(heap_starts)
    loss = staticmethod(shared_adversarial_loss)


def recordable(adversary: Adversary) -> bool:
    """Whether the class that has the adversary's `loss` says so."""
    owner = next(each for each in (adversary, *type(adversary).__mro__) if "loss" in vars(each))
    return bool(vars(owner).get("recordable", False))


def training_step(
    model: Module, adversary: Adversary, settings: Training, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> Callable[..., tuple[Tensor]]:
    """One step of the training, as a function of tensors: the images and labels of a mini-batch, what this rank's loss
    weighs, and what the adversary drew; it returns the loss. On CUDA it is recorded whole."""

    def step(images: Tensor, labels: Tensor, weight: Tensor, *drawn: Tensor) -> tuple[Tensor]:
        with trusted():
            loss = weight * adversary.loss(model, images, labels, settings, *drawn)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        ranks.sum_gradients(model)
        optimizer.step()
        return (loss.detach(),)

    return step


@kernel
def train(
    model: Module,
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

    adversary: by default SharedAdversarialTraining where sigma > 0, else ERM. until: stop after so many of the epochs.
    after_epoch(state, history) is called with everything that resuming needs; handed back as `state` and
    `history` it continues as if never stopped: each epoch draws its randomness from (seed, epoch) alone. The tensors
    are the training's own: clone them to keep them.
    progress(text, done) is called after every mini-batch with the share of all iterations done, in [0, 1].

    Under `torchrun` every rank calls this alike, on the same data: each takes its heaps of every mini-batch, gradients
    are summed, and all go on from rank 0's state and history. Only rank 0 calls `after_epoch` and `progress`; what the
    former raises stops all. Raises SatlibError for an adversary on several ranks, for more ranks than heaps in a
    mini-batch, and where the loss is not finite after an epoch.
    """
    checks.check("a network", lambda value: isinstance(value, Module), model=model)
    checks.check("a Training, such as Training(epochs=1)", lambda value: isinstance(value, Training), settings=settings)
    with evaluated(model):
        check_data(data, model)
    progress, after_epoch = (each and outside(each) for each in (progress, after_epoch))
    heap = settings.sharedness if settings.sigma > 0 else None
    ranks = current_ranks()
    ranks.check(settings.batch_size, heap, adversary)
    checks.check(
        "an Adversary, or None", lambda value: value is None or isinstance(value, Adversary), adversary=adversary
    )
    if heap and adversary is None:
        checks.check("more than 0, the size of perturbations", lambda value: value > 0, eps=settings.eps)
    adversary = adversary or (SharedAdversarialTraining() if heap else ERM())
    if adversary.weighed:
        checks.check("more than 0, the weight of this defence", lambda value: value > 0, sigma=settings.sigma)
    if until is not None:
        checks.check_whole(least=0, until=until)
        checks.check(f"at most epochs ({settings.epochs})", lambda value: value <= settings.epochs, until=until)
    last = settings.epochs if until is None else until
    size = min(settings.epoch_images or len(data), len(data))
    steps = math.ceil(size / settings.batch_size)
    if ranks.rank == 0 and (state is None) != (not history):
        raise SatlibError("state and history: expected both of them, or neither")
    history = ranks.broadcast_object(list(history or []))
    whole = ranks.count == 1 and isinstance(model, OwnNetwork) and recordable(adversary)
    optimizer = new_optimizer(model, settings, steps=len(history) * steps, recorded=whole)
    if state is not None:
        load_state(state, model, optimizer, adversary)
    ranks.sync(tensors_of(model, optimizer).values())
    update = training_step(model, adversary, settings, optimizer, ranks)
    if whole:
        to_go = steps * (last - len(history))
        update = recorded(update, changes=lambda: [*changed(model, optimizer, adversary)], calls=to_go)
    elif ranks.rank == 0 and recorder(next(model.parameters()).device) is not None:
        reason = f"{type(adversary).__name__} does not say that its loss is recordable"
        reason = reason if isinstance(model, OwnNetwork) else f"{type(model).__name__} is no OwnNetwork"
        reason = f"there are {ranks.count} ranks" if ranks.count > 1 else reason
        warnings.warn(f"not recorded as a graph, each step is launched by itself: {reason}", stacklevel=3)

    for epoch in range(len(history), last):
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
        adversary.start_epoch(model, epoch, generator)
        _train_mode(model)
        total = 0.0
        batches = ranks.batches(data, settings.batch_size, images=size, heap=heap, generator=generator)
        for step, (images, labels, weight) in enumerate(batches):
            set_learning_rate(optimizer, learning_rate_at(settings, epoch + step / steps))
            (loss,) = update(images, labels, weight, *adversary.draw(images, settings, generator))
            total += loss * min(settings.batch_size, size - step * settings.batch_size)
            if progress and ranks.rank == 0:
                progress(f"epoch {epoch + 1}/{settings.epochs}", (epoch + (step + 1) / steps) / settings.epochs)
        mean = ranks.total(total).item() / size
        if not math.isfinite(mean):
            lower = f"lower learning_rate={settings.learning_rate!r}"
            raise SatlibError(f"the loss is {mean} in epoch {epoch + 1}: training diverged; {lower}")
        history.append({"epoch": epoch + 1, "loss": round(mean, 6)})
        if after_epoch:
            ranks.on_first(lambda: after_epoch(state_of(model, optimizer, adversary), list(history)))
    optimizer.zero_grad(set_to_none=True)  # what a recording made of them goes with it
    model.eval()
    return history


def _train_mode(model: Module) -> None:
    """Raises SatlibError where a part of the model knows no such mode."""
    try:
        model.train()
    except NotImplementedError:
        raise SatlibError("the model has no training mode: expected the network that it was exported from") from None


def new_optimizer(model: Module, settings: Training, *, steps: int, recorded: bool = False) -> torch.optim.Optimizer:
    """The optimizer after so many steps, but for its momenta, which are zero.

    recorded: where steps can be recorded on the device, its learning rate is a tensor there, and so are its counters.
    """
    kind, kept = OPTIMIZERS[settings.optimizer]
    sgd, counted_on = settings.optimizer == "sgd", torch.device("cpu")
    own: dict[str, Any] = {"momentum": settings.momentum, "nesterov": settings.nesterov} if sgd else {}
    if recorded and (recorded := recorder(device := next(model.parameters()).device) is not None):
        own |= {"fused": True} if sgd else {"fused": True, "capturable": True}
    optimizer = kind(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, **own)
    if recorded:
        counted_on, optimizer.param_groups[0]["lr"] = (
            device,
            torch.tensor(settings.learning_rate, dtype=torch.float32, device=device),
        )
    for weight in model.parameters():
        optimizer.state[weight].update({theirs: torch.zeros_like(weight) for theirs in kept.values()})
        if not sgd:
            optimizer.state[weight]["step"] = torch.tensor(float(steps), device=counted_on)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give it the learning rate, in place where that is a tensor."""
    (group,) = optimizer.param_groups
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(value)
    else:
        group["lr"] = value


def tensors_of(model: Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors that training changes, by their names in a checkpoint: `model.NAME`, and of SGD `velocity.NAME`."""
    momenta = {
        f"{ours}.{name}": optimizer.state[weight][theirs]
        for name, weight in model.named_parameters()
        for _, kept in OPTIMIZERS.values()
        for ours, theirs in kept.items()
        if theirs in optimizer.state[weight]
    }
    return {f"model.{name}": value for name, value in model.state_dict().items()} | momenta


def changed(model: Module, optimizer: torch.optim.Optimizer, adversary: Adversary) -> Iterator[Tensor]:
    """All tensors that a step changes, in place."""
    yield from model.parameters()
    yield from model.buffers()
    for kept in optimizer.state.values():
        yield from kept.values()
    yield from adversary.state().values()


def state_of(model: Module, optimizer: torch.optim.Optimizer, adversary: Adversary) -> dict[str, Tensor]:
    """Everything that a training needs to go on after an epoch."""
    return tensors_of(model, optimizer) | {f"adversary.{name}": value for name, value in adversary.state().items()}


@torch.no_grad()
def load_state(state: dict[str, Tensor], model: Module, optimizer: torch.optim.Optimizer, adversary: Adversary) -> None:
    """Go on from what `state_of` gave. Each tensor stays in its memory format, as on other ranks.

    Raises SatlibError where it is the state of a training with other settings."""
    kept = {name: value for name, value in state.items() if name.startswith("adversary.")}
    own = tensors_of(model, optimizer)
    for name in sorted(own.keys() | {f"adversary.{each}" for each in adversary.state()} ^ kept.keys()):
        if name not in own or name not in state or state[name].shape != own[name].shape:
            raise SatlibError(f"state: {name} does not fit; go on with the settings that it was made with")
    for name, tensor in own.items():
        tensor.copy_(state[name])
    device = next(model.parameters()).device
    adversary.load({name.removeprefix("adversary."): value.to(device) for name, value in kept.items()})


def accuracy(model: Module, data: Any, *, batch_size: int = 512) -> float:
    """Share of an ImageSet's images, in segmentation of its labelled pixels, that the model in eval mode gets right."""
    return share_right(confusion(model, data, batch_size=batch_size))


@kernel
@torch.no_grad()
def confusion(model: Module, data: Any, *, batch_size: int = 512) -> Tensor:
    """How often each class (row) is taken for which (column) by the model in eval mode: int64 (classes, classes).

    Counted are images, or in segmentation pixels whose label is not 255.
    """
    with evaluated(model), exact():
        check_data(data, model, gradient=False)
        classes = len(data.classes)
        counts = torch.zeros(classes * classes, dtype=torch.int64, device=data.device)
        for x, y in data.batches(min(batch_size, images_at_once(data.images))):
            if (logits := logits_of(model, x)).shape[1] > classes:
                raise SatlibError(f"the model tells {logits.shape[1]} classes apart: the data {classes}")
            predicted = logits.argmax(1)
            known = y != IGNORE if y.ndim > 1 else torch.ones_like(y, dtype=torch.bool)
            counts += torch.bincount(y[known] * classes + predicted[known], minlength=classes * classes)
    return counts.view(classes, classes)


def share_right(counts: Tensor) -> float:
    """Share of decisions that are right, from `confusion`."""
    return counts.diagonal().sum().item() / counts.sum().item()


def class_iou(counts: Tensor) -> Tensor:
    """Intersection over union of each class, from `confusion`; nan of a class that is neither there nor predicted."""
    hits = counts.diagonal().double()
    return hits / (counts.sum(0) + counts.sum(1) - hits)
