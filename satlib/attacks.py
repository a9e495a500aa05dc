"""One heap PGD loop: image-dependent (s = 1), shared (s) and universal (s = d) attacks follow from it."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from satlib.checks import (
    check_model,
    check_pair,
    check_sharedness,
    check_threshold,
    check_universal,
    per_heap,
    per_step,
)
from satlib.data.imageset import IGNORE
from satlib.device import autocast, prepared
from satlib.errors import SatlibError
from satlib.updates import UPDATES

PIXELS_AT_ONCE = 2**22  # of images that are only classified
Gradients = Callable[..., tuple[Tensor, Tensor]]
AT_ONCE = 2**23  # pixel values of perturbed images whose gradients a universal attack computes at once


def attack_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    loss_threshold: float | None = None,
    label_smoothing: float = 0.0,
    loss: str = "cross-entropy",
) -> Tensor:
    """L_adv of section 4.3: min(L(theta, x, y), kappa) for each sample (each pixel, in segmentation).

    logits (d, classes) or (d, classes, H, W), labels (d,) or (d, H, W); returns losses shaped like labels.
    The cap acts on every sample by itself: a sample beyond kappa has zero gradient, the others keep theirs.

    loss "margin" is the highest other logit minus that of the label (Carlini and Wagner 2017): above 0 where the
    decision is another, whatever the scale of the logits. It knows no label smoothing.
    """
    ignored = IGNORE if labels.ndim > 1 else -100  # class 255 of a classifier is a class like any other
    if loss == "margin":
        counted, target = labels != ignored, labels.long().clamp(max=logits.shape[1] - 1)[:, None]
        others = logits.float().scatter(1, target, -math.inf).amax(1)
        losses = (others - logits.float().gather(1, target)[:, 0]) * counted
    else:
        losses = F.cross_entropy(
            logits.float(), labels.long(), reduction="none", label_smoothing=label_smoothing, ignore_index=ignored
        )
    return losses if loss_threshold is None else losses.clamp(max=loss_threshold)


def broadcast(perturbations: Tensor, sharedness: int, count: int) -> Tensor:
    """Repeat each heap's perturbation `sharedness` times (Figure 2): (heaps, C, H, W) -> (count, C, H, W)."""
    check_sharedness(sharedness, count)
    heaps, *shape = perturbations.shape
    if heaps != (expected := -(-count // sharedness)):
        raise SatlibError(
            f"{heaps} perturbations: expected {expected}, one a heap of {count} images with sharedness={sharedness}"
        )
    return perturbations.unsqueeze(1).expand(heaps, sharedness, *shape).reshape(-1, *shape)[:count]


def perturb(images: Tensor, perturbations: Tensor, sharedness: int, *, straight_through: bool = False) -> Tensor:
    """x + xi as every model sees it, in training, attack and evaluation alike: clamped to [0, 255].

    straight_through: pixels that xi drives out of range keep the gradient of the pixel that the model sees, as in
    attacks that project x + xi itself; by the chain rule they have none.
    """
    added = images + broadcast(perturbations, sharedness, len(images))
    clamped = added.clamp(0, 255)
    return added + (clamped - added).detach() if straight_through else clamped


def annealed_step_sizes(
    eps: float, steps: int, *, beta: float, gamma: float, schedule: str = "geometric"
) -> list[float]:
    """alpha_k = beta * eps * gamma^k / sum_j gamma^j of section 5.2, k = 0 .. steps - 1; their sum is beta * eps.

    schedule "cosine" has (1 + cos(pi k / steps)) / 2 in the place of gamma^k.
    """
    if schedule == "cosine":
        weights = [(1 + math.cos(math.pi * k / steps)) / 2 for k in range(steps)]
    else:
        weights = [gamma**k for k in range(steps)]
    return [beta * eps * weight / math.fsum(weights) for weight in weights]


@contextlib.contextmanager
def attackable(model: nn.Module) -> Iterator[nn.Module]:
    """The model as attacks see it: eval mode, weights frozen, batch norm folded where the model can do so.

    A model with a `folded()` method yields that copy. Any other model is switched to eval mode and frozen for
    the duration; its modules' modes and its parameters' `requires_grad` are restored afterwards.
    """
    if hasattr(model, "folded"):
        yield model.folded()
        return
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield model.eval().requires_grad_(False)
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@torch.enable_grad()
def heap_gradients(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    xi: Tensor,
    *,
    sharedness: int,
    straight_through: bool = False,
    **loss: Any,
) -> tuple[Tensor, Tensor]:
    """grad_xi sum_{i in heap} L_adv(x_i + xi, y_i) of every heap, shaped like xi, and the losses (d,) or (d, H, W).

    loss: what `attack_loss` takes; straight_through: see `perturb`.
    """
    xi = xi.detach().requires_grad_()
    with autocast(images.device):
        logits = model(perturb(images, xi, sharedness, straight_through=straight_through))
    losses = attack_loss(logits, labels, **loss)
    return torch.autograd.grad(losses.sum(), xi)[0], losses.detach()


def stepped(xi: Tensor, direction: Tensor, *, eps: Tensor, alpha: Tensor, targeted: bool) -> Tensor:
    """clip(xi + alpha * direction, -eps, eps); a targeted attack descends instead."""
    return torch.clamp(xi + (-alpha if targeted else alpha) * direction, -eps, eps)


def ascend(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    xi: Tensor,
    *,
    eps: Tensor,
    alpha: Tensor,
    sharedness: int,
    targeted: bool = False,
    loss_threshold: float | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One PGD iteration for every heap at once (section 3.2, with L_uni of section 4.2 as each heap's loss).

    eps and alpha are (heaps or 1, 1, 1, 1). Returns the new xi and the losses (d,) or (d, H, W) at the old.
    """
    options = {"loss_threshold": loss_threshold, "label_smoothing": label_smoothing}
    gradients, losses = heap_gradients(model, images, labels, xi, sharedness=sharedness, **options)
    return stepped(xi, gradients.sign(), eps=eps, alpha=alpha, targeted=targeted), losses


def _iteration(
    net: nn.Module, images: Tensor, labels: Tensor, xi: Tensor, eps: Tensor, alpha: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """`ascend`, with all that may change from call to call in one row."""
    return ascend(net, images, labels, xi, eps=eps, alpha=alpha, **options)


def heap_pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Sequence[float] | Tensor,
    sharedness: int,
    steps: int,
    step_size: float | Sequence[float] | Tensor,
    targeted: bool = False,
    loss_threshold: float | None = None,
    label_smoothing: float = 0.0,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    keep_best: bool = False,
) -> Tensor:
    """The heap adversary of section 4.2: one perturbation for every `sharedness` consecutive images.

    images (d, C, H, W) float32 in 0..255; labels (d,), or (d, H, W) with 255 = ignore (for a targeted attack:
    the targets). Returns (ceil(d / sharedness), C, H, W) with |xi| <= eps in pixel units. sharedness 1 is the
    image-dependent attack, sharedness d the universal one on these images.

    eps: a number in [0, 255], or one for each heap. step_size: a number, or one for each step, or a tensor
    (steps, heaps). start: initial perturbations (projected on eps); otherwise uniform in [-eps, eps] from
    `generator`. keep_best: for each heap return the iterate of highest loss (lowest, when targeted) instead of
    the last, for one more forward pass.

    Raises SatlibError on eps outside [0, 255], steps < 1, sharedness outside 1..d, mismatched shapes, and a
    loss_threshold that is not positive, or is given to a targeted attack: high losses are where that starts, and
    capped ones have no gradient.
    """
    count = len(images)
    check_pair(images, labels)
    check_threshold(loss_threshold, targeted)
    check_sharedness(sharedness, count)
    heaps = -(-count // sharedness)
    eps = per_heap("eps", eps, heaps, images.device, top=255.0)
    alphas = per_step(step_size, steps, heaps, images.device)
    xi = _start(start, (heaps, *images.shape[1:]), eps, generator)
    options = {"loss_threshold": loss_threshold, "label_smoothing": label_smoothing, "targeted": targeted}
    best, best_loss = xi, torch.full((heaps,), -math.inf, device=images.device)

    def better(xi: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        loss = heap_means(losses.flatten(1).mean(1) if losses.ndim > 1 else losses, sharedness)
        loss = -loss if targeted else loss
        won = loss > best_loss
        return torch.where(won.view(-1, 1, 1, 1), xi, best), torch.where(won, loss, best_loss)

    with attackable(model) as net:
        if not model.training:  # a training that attacks its own model at every step has no time for it
            check_model(net, images, labels)
        step = prepared(_iteration, net, images, labels, xi, eps, alphas[0], sharedness=sharedness, **options)
        for alpha in alphas:
            previous = xi
            xi, losses = step(images, labels, xi, eps, alpha)
            if keep_best:
                best, best_loss = better(previous, losses)
        if not keep_best:
            return xi
        with torch.no_grad(), autocast(images.device):
            logits = net(perturb(images, xi, sharedness))
        losses = attack_loss(logits, labels, loss_threshold=loss_threshold, label_smoothing=label_smoothing)
        return better(xi, losses)[0]


def universal_pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Sequence[float],
    steps: int = 200,
    batch_size: int = 16,
    beta: float = 4.0,
    gamma: float = 0.975,
    targeted: bool = False,
    loss_threshold: float | None = None,
    label_smoothing: float = 0.0,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    snapshots: int = 4,
    score_images: int = 256,
    micro_batch: int | None = None,
    update: str = "sign",
    schedule: str = "geometric",
    loss: str = "cross-entropy",
    straight_through: bool = False,
    dominant: bool = False,
) -> Tensor:
    """The universal adversary f_uni: stochastic PGD with annealed steps (sections 3.2 and 5.2).

    images (n, C, H, W), uint8 or float32 in 0..255, from which every iteration takes a mini-batch of
    `batch_size`, without repetition until all have been seen; labels (n,) or (n, H, W). `eps` may be a
    sequence: every entry gets its own perturbation, all of them advanced by one pass over the same mini-batch
    (repeat a value for restarts). Returns (number of eps, C, H, W), |xi| <= eps.

    The last iterate is not always the best: `snapshots` iterates spread over the second half of the steps are
    scored on `score_images` of the crafting images, and for each eps the most successful one is returned.

    micro_batch: a mini-batch that does not fit the device is taken in parts of so many images, whose gradients are
    summed before the step is made: the same iteration, in pieces (section 6.2 has mini-batches of 10,000). Each image
    is there once for every eps. None: as many as make AT_ONCE values, all eps together.

    What the paper does not do: `update` "momentum" or "adam" (`satlib.updates`), `schedule` "cosine", `loss` "margin",
    `straight_through` gradients (see `perturb`). dominant: after a quarter of the steps each perturbation aims at the
    class into which it has sent most of the crafting images that it fooled so far: universal perturbations end in
    few classes anyway (classification only).

    Raises SatlibError on bad eps, steps, batch_size, micro_batch, beta, gamma, loss_threshold, mismatched shapes, an
    unknown update, schedule or loss, and where `dominant` meets a targeted attack or segmentation.
    """
    epsilons = [float(e) for e in eps] if isinstance(eps, Sequence) else [float(eps)]
    if not epsilons:
        raise SatlibError(f"eps={eps!r}: expected a number, or at least one")
    check_universal(
        images,
        labels,
        steps=steps,
        batch_size=batch_size,
        beta=beta,
        gamma=gamma,
        targeted=targeted,
        loss_threshold=loss_threshold,
        label_smoothing=label_smoothing,
        snapshots=snapshots,
        score_images=score_images,
        micro_batch=micro_batch,
        update=update,
        schedule=schedule,
        loss=loss,
        dominant=dominant,
    )
    heaps, device = len(epsilons), images.device
    bound = per_heap("eps", epsilons, heaps, device, top=255.0)
    relative = torch.tensor(annealed_step_sizes(1.0, steps, beta=beta, gamma=gamma, schedule=schedule))
    alphas = per_step(relative, steps, 1, device)
    xi = _start(start, (heaps, *images.shape[1:]), bound, generator)
    marks = {round(steps * (0.5 + 0.5 * (i + 1) / snapshots)) for i in range(snapshots)}
    kept = []
    options: dict[str, Any] = {"straight_through": straight_through, "loss": loss}
    capped = options | {"loss_threshold": loss_threshold, "label_smoothing": label_smoothing}
    order = _minibatches(len(images), batch_size, steps, generator).to(device)
    part = min(micro_batch or max(1, AT_ONCE // (heaps * images.shape[1:].numel())), batch_size)

    aims: Tensor | None = None  # a class for each eps, once the attack is dominant
    follow = UPDATES[update]()

    def batch(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """A mini-batch, or a part of one, once for each eps."""
        x, y = images[chosen].float().repeat(heaps, 1, 1, 1), labels[chosen]
        y = y.repeat(heaps, *[1] * (y.ndim - 1)) if aims is None else aims.repeat_interleave(len(chosen))
        return x.contiguous(memory_format=torch.channels_last), y

    def prepare(options: dict[str, Any]) -> tuple[Gradients, Gradients]:
        """The gradients of a part of a mini-batch, and of what is left of it."""
        rest = functools.partial(heap_gradients, net, sharedness=batch_size % part, **options)
        return prepared(heap_gradients, net, *batch(order[0, :part]), xi, sharedness=part, **options), rest

    with attackable(model) as net:
        check_model(net, images, labels)
        whole, rest = prepare(capped)
        for step, (chosen, alpha) in enumerate(zip(order, alphas, strict=True), start=1):
            parts = ((whole if len(piece) == part else rest)(*batch(piece), xi)[0] for piece in chosen.split(part))
            direction = follow(functools.reduce(torch.add, parts))
            xi = stepped(xi, direction, eps=bound, alpha=alpha * bound, targeted=targeted or aims is not None)
            if dominant and aims is None and step >= steps / 4:
                seen = torch.randperm(len(images), generator=generator)[:score_images].to(device)
                aims = torch.stack([_dominant(net, images[seen], labels[seen], each) for each in xi])
                follow = UPDATES[update]()
                whole, rest = prepare(options)
            if step in marks:
                kept.append(xi)
        if len(kept) == 1:
            return xi
        chosen = torch.randperm(len(images), generator=generator)[:score_images].to(device)
        scores = torch.stack([success_rates(net, images[chosen], labels[chosen], xi, targeted=targeted) for xi in kept])
    best = scores.flip(0).argmax(0)  # of equal scores the latest
    return torch.stack(kept[::-1])[best, torch.arange(heaps, device=device)]


@torch.no_grad()
def _dominant(net: nn.Module, images: Tensor, labels: Tensor, xi: Tensor) -> Tensor:
    """The class () into which xi (C, H, W) sends most of the images that it fools; of all, where it fools none."""
    predicted = []
    for x in images.split(images_at_once(images)):
        with autocast(images.device):
            predicted.append(
                net((x.float() + xi).clamp(0, 255).contiguous(memory_format=torch.channels_last)).argmax(1)
            )
    classes = torch.cat(predicted)
    fooled = classes[classes != labels]
    return (fooled if len(fooled) else classes).mode().values


def images_at_once(images: Tensor) -> int:
    """How many of the images (n, C, H, W) are passed through a model together where no gradient is needed."""
    return max(1, PIXELS_AT_ONCE // images.shape[2:].numel())


@torch.no_grad()
def success_rates(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    perturbations: Tensor,
    *,
    targeted: bool = False,
    batch_size: int = 512,
) -> Tensor:
    """Share of decisions that each perturbation wins over all the images: (heaps, C, H, W) -> (heaps,).

    Untargeted: the misclassification rate against `labels`; targeted: the accuracy with respect to `labels` as
    targets. Decisions are images, or in segmentation pixels whose label is not 255. The model is used as given:
    pass it through `attackable`, or in eval mode.
    """
    check_pair(images, labels)
    wins = torch.zeros(len(perturbations), device=images.device)
    total = torch.zeros((), device=images.device)
    count = min(batch_size, images_at_once(images))
    for x, y in zip(images.split(count), labels.split(count), strict=True):
        counted = y != IGNORE if y.ndim > 1 else torch.ones_like(y, dtype=torch.bool)
        total += counted.sum()
        x = x.float().contiguous(memory_format=torch.channels_last)
        for heap, xi in enumerate(perturbations):
            with autocast(images.device):
                predicted = model((x + xi).clamp(0, 255)).argmax(1)
            wins[heap] += (((predicted == y) if targeted else (predicted != y)) & counted).sum()
    return wins / total


def heap_means(values: Tensor, sharedness: int) -> Tensor:
    """Mean of (d,) values over each heap of `sharedness` consecutive ones; the last heap may be smaller."""
    heaps = -(-len(values) // sharedness)
    padded = F.pad(values, (0, heaps * sharedness - len(values)))
    sizes = torch.full((heaps,), sharedness, device=values.device)
    sizes[-1] = len(values) - (heaps - 1) * sharedness
    return padded.view(heaps, sharedness).sum(1) / sizes


def _minibatches(count: int, batch_size: int, steps: int, generator: torch.Generator | None) -> Tensor:
    """Indices (steps, batch_size), drawn without repetition from one shuffled pass after another."""
    passes = -(-steps // (count // batch_size))
    orders = [torch.randperm(count, generator=generator) for _ in range(passes)]
    return torch.cat([order[: count - count % batch_size].view(-1, batch_size) for order in orders])[:steps]


def random_start(shape: tuple[int, ...], eps: float | Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform in [-eps, eps], (heaps, C, H, W); drawn on the generator's device, given on that of eps (or the CPU)."""
    source = generator.device if generator is not None else "cpu"
    drawn = torch.rand(shape, generator=generator, device=source) * 2 - 1
    return drawn.to(eps.device) * eps if isinstance(eps, Tensor) else drawn * eps


def _start(start: Tensor | None, shape: tuple[int, ...], eps: Tensor, generator: torch.Generator | None) -> Tensor:
    """Initial perturbations: as given, projected on eps; otherwise at random."""
    if start is None:
        return random_start(shape, eps, generator)
    if start.shape != shape:
        raise SatlibError(f"start of shape {tuple(start.shape)}: expected {tuple(shape)}, one for each heap")
    return torch.clamp(start.detach().to(eps.device, torch.float32), -eps, eps)
