"""One heap PGD loop: image-dependent (s = 1), shared (s) and universal (s = d) attacks follow from it."""

import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from satlib.checks import (
    check_arguments,
    check_batch,
    check_model,
    check_sharedness,
    check_threshold,
    kernel,
    per_heap,
    per_step,
)
from satlib.data.imageset import IGNORE
from satlib.device import exact, prepared, sent
from satlib.errors import SatlibError
from satlib.network import attackable, evaluated, logits_of

PIXELS_AT_ONCE = 2**22  # of images that are only classified
AT_ONCE = 2**23  # pixel values of perturbed images whose gradients a universal attack computes at once


def attack_loss(
    logits: Tensor, labels: Tensor, *, loss_threshold: float | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """L_adv of section 4.3: min(L(theta, x, y), kappa) for each sample (each pixel, in segmentation).

    logits (d, classes) or (d, classes, H, W), labels (d,) or (d, H, W); returns losses shaped like labels.
    The cap acts on every sample by itself: a sample beyond kappa has zero gradient, the others keep theirs.
    """
    ignored = IGNORE if labels.ndim > 1 else -100  # class 255 of a classifier is a class like any other
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


def perturb(images: Tensor, perturbations: Tensor, sharedness: int | None = None) -> Tensor:
    """x + xi as every model sees it, in training, attack and evaluation alike: clamped to [0, 255].

    images (d, C, H, W); perturbations (1, C, H, W) for all of them, or one for every `sharedness` consecutive ones.
    """
    sharedness = len(images) if sharedness is None else sharedness
    return (images + broadcast(perturbations, sharedness, len(images))).clamp(0, 255)


def perturb_straight_through(images: Tensor, perturbations: Tensor, sharedness: int) -> Tensor:
    """`perturb`, whose gradient passes straight through the clamp: that of the image which the model sees.

    So do attacks that project x + xi itself. By the chain rule, pixels that xi drives out of range have no gradient:
    half of them, where images are black and white.
    """
    added = images + broadcast(perturbations, sharedness, len(images))
    return added.clamp(0, 255).detach() + (added - added.detach())


def annealed_step_sizes(eps: float, steps: int, *, beta: float, gamma: float) -> list[float]:
    """alpha_k = beta * eps * gamma^k / sum_j gamma^j of section 5.2, k = 0 .. steps - 1; their sum is beta * eps.

    Raises SatlibError where steps is no whole number of at least 1, or beta or gamma no positive number.
    """
    check_arguments(steps=steps, beta=beta, gamma=gamma)
    try:
        weights = [gamma**k for k in range(steps)]
        total = math.fsum(weights)
    except OverflowError:
        raise SatlibError(f"gamma={gamma!r}: its powers overflow within {steps} steps; 1 keeps sizes equal") from None
    return [beta * eps * weight / total for weight in weights]


@torch.enable_grad()
def heap_gradients(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    xi: Tensor,
    *,
    sharedness: int,
    loss: Callable[..., Tensor] = attack_loss,
    straight_through: bool = True,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """grad_xi sum_{i in heap} L_adv(x_i + xi, y_i) of every heap, shaped like xi, and the losses (d,) or (d, H, W).

    L_adv is loss(logits, labels, **settings); straight_through: see `perturb_straight_through`.
    """
    xi = xi.detach().requires_grad_()
    seen = (perturb_straight_through if straight_through else perturb)(images, xi, sharedness)
    losses = loss(logits_of(model, seen), labels, **settings)
    return torch.autograd.grad(losses.sum(), xi)[0], losses.detach()


def projected_step(xi: Tensor, direction: Tensor, *, eps: Tensor, alpha: Tensor, targeted: bool) -> Tensor:
    """clip(xi + alpha * direction, -eps, eps); a targeted attack descends instead."""
    return torch.clamp(xi + (-alpha if targeted else alpha) * direction, -eps, eps)


def pgd_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    xi: Tensor,
    eps: Tensor,
    alpha: Tensor,
    *,
    sharedness: int,
    targeted: bool = False,
    **loss: Any,
) -> tuple[Tensor, Tensor]:
    """One PGD iteration for every heap at once (section 3.2, with L_uni of section 4.2 as each heap's loss).

    eps and alpha are (heaps or 1, 1, 1, 1); loss: what `heap_gradients` takes. Returns the new xi and the losses (d,)
    or (d, H, W) at the old.
    """
    gradients, losses = heap_gradients(model, images, labels, xi, sharedness=sharedness, **loss)
    return projected_step(xi, gradients.sign(), eps=eps, alpha=alpha, targeted=targeted), losses


@kernel
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
    straight_through: bool = True,
) -> Tensor:
    """The heap adversary of section 4.2: one perturbation for every `sharedness` consecutive images.

    images (d, C, H, W) float32 in 0..255; labels (d,), or (d, H, W) with 255 = ignore (for a targeted attack:
    the targets). Returns (ceil(d / sharedness), C, H, W) with |xi| <= eps in pixel units. sharedness 1 is the
    image-dependent attack, sharedness d the universal one on these images.

    eps: a number in [0, 255], or one for each heap. step_size: a number, or one for each step, or a tensor
    (steps, heaps). start: initial perturbations (projected on eps); otherwise uniform in [-eps, eps] from
    `generator`. keep_best: for each heap return the iterate of highest loss (lowest, when targeted) instead of
    the last, for one more forward pass. straight_through: see `perturb_straight_through`.

    Raises SatlibError on eps outside [0, 255], steps < 1, sharedness outside 1..d, mismatched shapes, and a
    loss_threshold that is not positive, or is given to a targeted attack: high losses are where that starts, and
    capped ones have no gradient.
    """
    count = len(images)
    check_threshold(loss_threshold, targeted)
    check_sharedness(sharedness, count)
    heaps = -(-count // sharedness)
    bound = per_heap(eps, heaps, images.device)
    alphas = per_step(step_size, steps, heaps, images.device)
    xi = _start(start, (heaps, *images.shape[1:]), bound, generator)
    loss: dict[str, Any] = {"loss_threshold": loss_threshold, "label_smoothing": label_smoothing}
    best, best_loss = xi, torch.full((heaps,), -math.inf, device=images.device)

    def better(xi: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        means = heap_means(losses.flatten(1).mean(1) if losses.ndim > 1 else losses, sharedness)
        means = -means if targeted else means
        won = means > best_loss
        return torch.where(won.view(-1, 1, 1, 1), xi, best), torch.where(won, means, best_loss)

    with attackable(model) as net:
        check_model(net, images, labels)
        options = {"sharedness": sharedness, "targeted": targeted, "straight_through": straight_through} | loss
        step = prepared(pgd_step, net, images, labels, xi, bound, alphas[0], **options)
        for alpha in alphas:
            previous = xi
            xi, losses = step(images, labels, xi, bound, alpha)
            if keep_best:
                best, best_loss = better(previous, losses)
        if not keep_best:
            return xi
        with torch.no_grad():
            return better(xi, attack_loss(logits_of(net, perturb(images, xi, sharedness)), labels, **loss))[0]


@kernel
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
    straight_through: bool = True,
    path: Callable[..., Iterator[Tensor]] | None = None,
) -> Tensor:
    """The universal adversary f_uni: stochastic PGD with annealed steps (sections 3.2 and 5.2).

    images (n, C, H, W), uint8 or float32 in 0..255, from which every iteration takes a mini-batch of
    `batch_size`, without repetition until all have been seen; labels (n,) or (n, H, W). `eps` may be a
    sequence: every entry gets its own perturbation, all of them advanced by one pass over the same mini-batch
    (repeat a value for restarts). Returns (number of eps, C, H, W), |xi| <= eps in pixel units.

    The last iterate is not always the best: `snapshots` iterates spread over the second half of the steps are
    scored on `score_images` of the crafting images, and for each eps the most successful one is returned.

    micro_batch: a mini-batch that does not fit the device is taken in parts of so many images, whose gradients are
    summed before the step is made: the same iteration, in pieces (section 6.2 has mini-batches of 10,000). Each image
    is there once for every eps. None: as many as make AT_ONCE values, all eps together. straight_through: see
    `perturb_straight_through`. path: what gives the iterates instead of `stochastic_pgd`, called as that is: for what
    the paper does not do, see `satlib.universal`.

    Raises SatlibError on bad eps, steps, batch_size, micro_batch, beta, gamma, loss_threshold and mismatched shapes.
    """
    check_threshold(loss_threshold, targeted)
    micro = {} if micro_batch is None else {"micro_batch": micro_batch}
    check_batch(batch_size, len(images))
    device, bound = images.device, per_heap(eps, None, images.device)
    relative = torch.tensor(annealed_step_sizes(1.0, steps, beta=beta, gamma=gamma), device=device)
    xi = _start(start, (len(bound), *images.shape[1:]), bound, generator)
    minibatches = _minibatches(len(images), batch_size, steps, generator).to(device)
    marks = {round(steps * (0.5 + 0.5 * (i + 1) / snapshots)) for i in range(snapshots)}
    options = {"targeted": targeted, "loss_threshold": loss_threshold, "label_smoothing": label_smoothing} | micro
    options |= {"straight_through": straight_through}
    with attackable(model) as net:
        check_model(net, images, labels)
        rows, step_sizes = labels.expand(len(bound), *labels.shape), relative.view(-1, 1, 1, 1, 1) * bound
        iterates = (path or stochastic_pgd)(net, images, rows, xi, minibatches, step_sizes, eps=bound, **options)
        kept = [xi for step, xi in enumerate(iterates, start=1) if step in marks]
        if len(kept) == 1:
            return kept[0]
        chosen = shuffled(len(images), generator)[:score_images].to(device)
        scores = torch.stack([success_rates(net, images[chosen], labels[chosen], xi, targeted=targeted) for xi in kept])
    best = scores.flip(0).argmax(0)  # of equal scores the latest
    return torch.stack(kept[::-1])[best, torch.arange(len(bound), device=device)]


def stochastic_pgd(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    xi: Tensor,
    minibatches: Tensor,
    step_sizes: Tensor,
    *,
    eps: Tensor,
    targeted: bool,
    micro_batch: int | None = None,
    inner: int = 1,
    direction: Callable[[Tensor], Tensor] = torch.sign,
    **gradient: Any,
) -> Iterator[Tensor]:
    """The iterates of universal PGD: every mini-batch moves every perturbation of xi (heaps, C, H, W) by one step.

    images (n, C, H, W); labels (heaps, n) or (heaps, n, H, W), a row for each perturbation; minibatches: indices
    (steps, m); step_sizes (steps, heaps, 1, 1, 1) and eps (heaps, 1, 1, 1) in pixel units. direction: what a step
    follows, from the gradients (heaps, C, H, W); gradient: what `heap_gradients` takes; micro_batch: see there.

    inner: stochastic gradient aggregation (SGA; Liu et al., ICCV 2023). Each mini-batch is cut into so many parts, and
    each of them moves xi; then it goes back, and makes the one step that follows the sum of their gradients.
    """
    heaps, size = len(xi), -(-minibatches.shape[1] // inner)
    part = min(micro_batch or max(1, AT_ONCE // xi.numel()), size)

    def batch(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """A mini-batch, or a part of one, once for each eps."""
        return images[chosen].float().repeat(heaps, 1, 1, 1), labels[:, chosen].flatten(0, 1)

    whole = prepared(heap_gradients, net, *batch(minibatches[0, :part]), xi, sharedness=part, **gradient)

    def gradients_of(chosen: Tensor, xi: Tensor) -> Tensor:
        def of(piece: Tensor) -> Tensor:
            if len(piece) == part:
                return whole(*batch(piece), xi)[0]
            return heap_gradients(net, *batch(piece), xi, sharedness=len(piece), **gradient)[0]

        return functools.reduce(torch.add, map(of, chosen.split(part)))

    for chosen, alpha in zip(minibatches, step_sizes, strict=True):
        step = functools.partial(projected_step, eps=eps, alpha=alpha, targeted=targeted)
        at, gradients = xi, []
        for few in chosen.split(size):
            gradients.append(gradients_of(few, at))
            spend(heaps * len(few))
            at = step(at, gradients[-1].sign()) if inner > 1 else at
        xi = step(xi, direction(functools.reduce(torch.add, gradients)))
        yield xi


_spent: contextvars.ContextVar[int] = contextvars.ContextVar("spent", default=0)


def spend(images: int) -> int:
    """Count so many images, each passed forward and backward by a universal attack; returns all so far."""
    _spent.set(_spent.get() + images)
    return _spent.get()


def images_at_once(images: Tensor) -> int:
    """How many of the images (n, C, H, W) are passed through a model together where no gradient is needed."""
    return max(1, PIXELS_AT_ONCE // images.shape[2:].numel())


def decisions_won(predicted: Tensor, labels: Tensor, *, targeted: bool = False) -> tuple[Tensor, Tensor]:
    """How many of each image's decisions an attack wins, and how many count: both (n,).

    predicted: classes (n,) or (n, H, W). Untargeted, a decision is won that differs from its label; targeted, one that
    is the label, which is then the target. Pixels whose label is 255 do not count.
    """
    counted = labels != IGNORE if labels.ndim > 1 else torch.ones_like(labels, dtype=torch.bool)
    won = ((predicted == labels) if targeted else (predicted != labels)) & counted
    return won.reshape(len(labels), -1).sum(1), counted.reshape(len(labels), -1).sum(1)


@kernel
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
    targets. Decisions are images, or in segmentation pixels whose label is not 255. They are the model's in eval mode,
    and in float32 (or its weights' format), whatever is faster: nobody's verdict hangs on the rounding of a device. A
    model with a `folded()` method is used as it is given, for `attackable` has changed it already, or need not.
    """
    wins = torch.zeros(len(perturbations), dtype=torch.int64, device=images.device)
    total = torch.zeros((), dtype=torch.int64, device=images.device)
    count = min(batch_size, images_at_once(images))
    with evaluated(model), exact():
        check_model(model, images, labels, gradient=False)
        for x, y in zip(images.split(count), labels.split(count), strict=True):
            for heap, xi in enumerate(perturbations.split(1)):
                logits = logits_of(model, perturb(x.float(), xi))
                nothing = logits.isnan().any(1)  # decides nothing, and so is won by nobody
                decided = torch.where(nothing, -1 if targeted else y.long(), logits.argmax(1))
                won, counted = decisions_won(decided, y, targeted=targeted)
                wins[heap] += won.sum()
            total += counted.sum()
    return (wins.double() / total).float()


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
    orders = [shuffled(count, generator) for _ in range(passes)]
    return torch.cat([order[: count - count % batch_size].view(-1, batch_size) for order in orders])[:steps]


def shuffled(count: int, generator: torch.Generator | None) -> Tensor:
    """The numbers below count in any order, drawn on the generator's device."""
    return torch.randperm(count, generator=generator, device=source(generator))


def source(generator: torch.Generator | None) -> torch.device:
    """Where to draw random numbers."""
    return torch.device("cpu") if generator is None else generator.device


def random_start(shape: tuple[int, ...], eps: float | Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform in [-eps, eps], (heaps, C, H, W); drawn on the generator's device, given on that of eps (or the CPU)."""
    drawn = torch.rand(shape, generator=generator, device=source(generator))
    if isinstance(eps, Tensor) and not drawn.is_cuda:
        drawn = sent(drawn, eps.device)
    return (drawn * 2 - 1) * eps


def _start(start: Tensor | None, shape: tuple[int, ...], eps: Tensor, generator: torch.Generator | None) -> Tensor:
    """Initial perturbations: as given, projected on eps; otherwise at random."""
    if start is None:
        return random_start(shape, eps, generator)
    if start.shape != shape:
        raise SatlibError(f"start of shape {tuple(start.shape)}: expected {tuple(shape)}, one for each heap")
    return torch.clamp(start.detach().to(eps.device, torch.float32), -eps, eps)
