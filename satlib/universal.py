"""Universal attacks as values: what the paper's attack leaves out, the attacks of others, and all of them by name.

A universal attack is any callable like `UniversalAttack`. To add one, write the function and enter it in ATTACKS.
"""

import contextlib
import difflib
import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from satlib.attacks import (
    AT_ONCE,
    annealed_step_sizes,
    attack_loss,
    heap_gradients,
    images_at_once,
    perturb,
    projected_step,
    random_start,
    shuffled,
    source,
    spend,
    stochastic_pgd,
    success_rates,
    universal_pgd,
)
from satlib.checks import (
    check_arguments,
    check_known,
    check_model,
    check_threshold,
    kernel,
    numbers,
    per_heap,
    told,
)
from satlib.data.imageset import IGNORE
from satlib.deepfool import universal_deepfool
from satlib.device import prepared
from satlib.errors import SatlibError
from satlib.network import attackable, logits_of
from satlib.paper import KAPPA, LABEL_SMOOTHING

MOMENTUM = 0.9  # how much of the earlier gradients is kept (Dong et al. 2018 keep all, on one image)
SQUARES = 0.99  # of their squares, in Adam; PyTorch's 0.999 forgets its start slower than an attack ends
Generator: TypeAlias = torch.Generator | None
GIVEN = ("model", "images", "labels", "eps", "generator", "targeted", "start", "progress", "path")  # not its settings


class UniversalAttack(Protocol):
    """Crafts on images (n, C, H, W) in 0..255 with their labels one perturbation for each eps: (len(eps), C, H, W).

    |xi| <= eps, in pixel units; equal generators give equal perturbations, and the model is left as it was. The
    attack's own settings are further keywords with defaults, which it checks before it first asks the model. It also
    takes `targeted` (labels are targets) and `start` (len(eps), C, H, W) where it can use them.
    """

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, eps: Sequence[float], generator: Generator = None
    ) -> Tensor: ...


def margin_loss(logits: Tensor, labels: Tensor, *, loss_threshold: float | None = None) -> Tensor:
    """The highest other logit minus that of the label (Carlini and Wagner 2017), capped; shapes as in `attack_loss`.

    Above 0 where the decision is another, whatever the scale of the logits. It knows no label smoothing.
    """
    counted = labels != (IGNORE if labels.ndim > 1 else -100)
    target = labels.long().clamp(max=logits.shape[1] - 1)[:, None]
    others = logits.float().scatter(1, target, -math.inf).amax(1)
    losses = (others - logits.float().gather(1, target)[:, 0]) * counted
    return losses if loss_threshold is None else losses.clamp(max=loss_threshold)


def cosine_step_sizes(eps: float, steps: int, *, beta: float, gamma: float) -> list[float]:
    """As `annealed_step_sizes`, with (1 + cos(pi k / steps)) / 2 in the place of gamma^k; gamma plays no part."""
    check_arguments(steps=steps, beta=beta, gamma=gamma)
    weights = [(1 + math.cos(math.pi * k / steps)) / 2 for k in range(steps)]
    total = math.fsum(weights)
    return [beta * eps * weight / total for weight in weights]


class Momentum:
    """The sign of a decaying mean of all gradients, each divided by its mean size (Dong et al. 2018).

    In a universal attack it averages over mini-batches, too, which takes out part of their noise.
    """

    def __init__(self) -> None:
        self.mean: Tensor | float = 0.0

    def __call__(self, gradients: Tensor) -> Tensor:
        """What a step follows, from the gradients (heaps, C, H, W) of an iteration; entries of about 1."""
        size = gradients.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-30)
        self.mean = MOMENTUM * self.mean + (1 - MOMENTUM) * gradients / size
        return self.mean.sign()


class Adam:
    """Mean over root mean square of the gradients, with both corrected for their start (Kingma and Ba 2015)."""

    def __init__(self) -> None:
        self.mean: Tensor | float = 0.0
        self.square: Tensor | float = 0.0
        self.count = 0

    def __call__(self, gradients: Tensor) -> Tensor:
        """See `Momentum`."""
        self.count += 1
        self.mean = MOMENTUM * self.mean + (1 - MOMENTUM) * gradients
        self.square = SQUARES * self.square + (1 - SQUARES) * gradients.square()
        mean, square = self.mean / (1 - MOMENTUM**self.count), self.square / (1 - SQUARES**self.count)
        return mean / torch.as_tensor(square).sqrt().clamp(min=1e-30)


UPDATES: dict[str, Callable[[], Callable[[Tensor], Tensor]]]
UPDATES = {"sign": lambda: torch.sign, "momentum": Momentum, "adam": Adam}
SCHEDULES = {"geometric": annealed_step_sizes, "cosine": cosine_step_sizes}
LOSSES = {"cross-entropy": attack_loss, "margin": margin_loss}


@kernel
def extended_pgd(
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
    straight_through: bool = True,
    dominant: bool = False,
    larger: int = 1,
    restarts: int = 1,
    inner: int = 1,
) -> Tensor:
    """`universal_pgd` with what the paper does not do; as it is by default, and with as many gradients, or fewer where
    the steps do not divide.

    update "momentum" or "adam": see there; schedule "cosine": see `cosine_step_sizes`; loss "margin": `margin_loss`;
    straight_through: as there. dominant: after a quarter of the steps each perturbation aims,
    without a cap, at the class into which it has sent most of the crafting images that it fooled so far: universal
    perturbations end in few classes anyway (classification only). larger: mini-batches of so many times the images,
    in so many times fewer steps. restarts: so many perturbations for each eps, in so many times fewer steps each, of
    which the best on the crafting images is returned. inner: see `stochastic_pgd`.

    Raises SatlibError as `universal_pgd` does, on an unknown update, schedule or loss, on larger or restarts below 1,
    and where `dominant` meets a targeted attack or segmentation.
    """
    check_threshold(loss_threshold, targeted)
    check_known(UPDATES, update=update)
    check_known(SCHEDULES, schedule=schedule)
    check_known(LOSSES, loss=loss)
    if loss == "margin" and label_smoothing:
        raise SatlibError(f"label_smoothing={label_smoothing!r} with loss='margin', which has no soft targets; pass 0")
    if dominant and (targeted or labels.ndim > 1):
        raise SatlibError("dominant=True: only for untargeted attacks on classifiers, which have a class to be sent to")
    fewer = max(1, steps // (larger * restarts))
    sizes = torch.tensor(SCHEDULES[schedule](1.0, fewer, beta=beta, gamma=gamma), device=images.device)
    unused = {"straight_through", "label_smoothing" if loss == "margin" else ""}

    def path(
        net: nn.Module, x: Tensor, rows: Tensor, xi: Tensor, minibatches: Tensor, _: Tensor, *, eps: Tensor, **own: Any
    ) -> Iterator[Tensor]:
        """All iterates; or of a quarter of the steps, then those towards the class that each of these sends most to."""
        step_sizes, first = sizes.view(-1, 1, 1, 1, 1) * eps, -(-fewer // 4) if dominant else fewer
        capped = {name: value for name, value in own.items() if name not in unused}
        pgd: Callable[..., Iterator[Tensor]] = functools.partial(
            stochastic_pgd, net, x, eps=eps, inner=inner, loss=LOSSES[loss], straight_through=straight_through
        )
        ascent = pgd(rows, xi, minibatches[:first], step_sizes[:first], direction=UPDATES[update](), **capped)
        for each in ascent:
            yield (xi := each)
        if first < fewer:
            chosen = shuffled(len(x), generator)[:score_images].to(x.device)
            classes = torch.stack([_dominant_class(net, x[chosen], rows[0, chosen], each) for each in xi.split(1)])
            rest = (classes[:, None].expand(-1, len(x)), xi, minibatches[first:], step_sizes[first:])
            yield from pgd(*rest, direction=UPDATES[update](), targeted=True, micro_batch=micro_batch)

    found = universal_pgd(
        model,
        images,
        labels,
        eps=per_heap(eps, None, torch.device("cpu")).flatten().repeat_interleave(restarts),
        steps=fewer,
        batch_size=batch_size * larger,
        beta=beta,
        gamma=gamma,
        targeted=targeted,
        loss_threshold=loss_threshold,
        label_smoothing=label_smoothing,
        generator=generator,
        start=None if start is None else start.repeat_interleave(restarts, 0),
        snapshots=snapshots,
        score_images=score_images,
        micro_batch=micro_batch,
        straight_through=straight_through,
        path=path,
    )
    if restarts == 1:
        return found
    with attackable(model) as net:
        best = success_rates(net, images, labels, found, targeted=targeted).view(-1, restarts).argmax(1)
    return found.unflatten(0, (-1, restarts))[torch.arange(len(best), device=best.device), best]


@torch.no_grad()
def _outputs(net: nn.Module, images: Tensor, xi: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """What `of` makes of the logits of the images under xi (1, C, H, W), a few at a time: a row for each image."""
    return torch.cat([of(logits_of(net, perturb(x.float(), xi))) for x in images.split(images_at_once(images))])


def _dominant_class(net: nn.Module, images: Tensor, labels: Tensor, xi: Tensor) -> Tensor:
    """The class () into which xi (1, C, H, W) sends most of the images that it fools; of all, where it fools none."""
    classes = _outputs(net, images, xi, lambda logits: logits.argmax(1))
    fooled = classes[classes != labels]
    return (fooled if len(fooled) else classes).mode().values


@kernel
def aimed_pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Sequence[float],
    steps: int = 80,
    batch_size: int = 64,
    inner: int = 4,
    beta: float = 40.0,
    gamma: float = 0.95,
    targets: Sequence[int] | Tensor | None = None,
    scenes: int = 4,
    candidates: int = 20,
    scan: int = 8,
    aims: int = 1,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    snapshots: int = 4,
    score_images: int = 512,
    micro_batch: int | None = None,
    straight_through: bool = True,
) -> Tensor:
    """Universal perturbations that aim: an untargeted attack ends in the nearest class, which need not be the best.

    Each eps gets a perturbation for every one of the `targets`, by `scan` targeted steps; the third of them that win
    most of the crafting images, whatever class they take them to, go on for three times as many, and `aims` of these
    for `steps`: successive halving, for a few steps do not tell the best yet. Fewer steps are annealed between the same
    sizes. They are heaps of one pass each, whose mini-batches have at most all images. With a `start`
    (len(eps), C, H, W), each goes on towards the target that it is nearest to, and none is scanned.

    targets: classes (targets,), of which in segmentation every pixel is to be, or there also label maps (targets, H, W)
    with 255 = ignore; None: all classes, and the maps of the first `scenes` crafting images. Of more than `candidates`
    classes only so many are scanned: those with the highest mean probability, half of them on clean images, and half
    where a short untargeted attack takes them. inner: see `stochastic_pgd`; everything else as in `universal_pgd`.

    Raises SatlibError as `universal_pgd` does, and on targets that are no classes, or maps of another size.
    """
    bound = per_heap(eps, None, torch.device("cpu")).flatten()
    given: dict[str, Any] = {"generator": generator, "micro_batch": micro_batch, "score_images": score_images}
    given |= {"batch_size": min(batch_size, len(images)), "straight_through": straight_through}

    annealed = functools.partial(_stretched, steps=steps, beta=beta, gamma=gamma)
    with attackable(model) as net:
        check_model(net, images, labels)
        chosen = shuffled(len(images), generator)[:score_images].to(images.device)
        few = images[chosen], labels[chosen]
        aimed_at = _targets(net, images, labels, targets)
        if targets is None and start is None and len(aimed_at) > candidates:
            ascent = universal_pgd(net, images, labels, eps=bound.max(), snapshots=1, **given | annealed(scan))
            aimed_at = _likely(net, few[0], ascent, candidates)
        if targets is None and labels.ndim > 1:
            painted = aimed_at.view(-1, 1, 1).expand(-1, *labels.shape[1:])
            aimed_at = torch.cat([painted, labels[:scenes].long()])
        at_once = max(1, AT_ONCE // images[:1].shape.numel())  # heaps

        def aiming(rows: Tensor, *, eps: Tensor, start: Tensor | None, **options: Any) -> Tensor:
            """Perturbations (heaps, C, H, W) that aim at these of the targets (heaps,)."""
            if len(rows) > at_once:
                begun = [None] * len(rows) if start is None else start.split(at_once)
                parts = zip(rows.split(at_once), eps.split(at_once), begun, strict=False)
                return torch.cat([aiming(some, eps=each, start=xi, **options) for some, each, xi in parts])
            aim = aimed_at[rows.to(aimed_at.device)]
            wanted = aim.view(len(aim), 1, *aim.shape[1:], *[1] * (labels.ndim - aim.ndim)).expand(-1, *labels.shape)

            def path(
                net: nn.Module, x: Tensor, _: Tensor, *run: Tensor, targeted: bool, **own: Any
            ) -> Iterator[Tensor]:
                own = {name: own[name] for name in ("eps", "micro_batch", "straight_through") if name in own}
                return stochastic_pgd(net, x, wanted, *run, targeted=True, inner=inner, **own)

            return universal_pgd(net, images, labels, path=path, eps=eps, start=start, **given | options)

        def best_of(rows: Tensor, xi: Tensor, kept: int) -> tuple[Tensor, Tensor]:
            """Of targets (eps, targets) those whose perturbations win most, and these (eps * kept, C, H, W)."""
            best = success_rates(net, *few, xi).view(rows.shape).topk(min(kept, rows.shape[1]), 1).indices
            chosen = xi.unflatten(0, rows.shape).gather(1, best[..., None, None, None].expand(-1, -1, *xi.shape[1:]))
            return rows.gather(1, best.cpu()), chosen.flatten(0, 1)

        if start is not None:
            start = start.to(images.device)
            nearest = torch.stack([_won(net, few[0], xi, aimed_at).argmax() for xi in start.split(1)])
            return aiming(nearest, eps=bound, start=start, snapshots=snapshots, **annealed(steps))
        count = len(aimed_at)
        rows, xi = torch.arange(count).repeat(len(bound), 1), None
        for kept, length, scored in (
            (count, scan, 1),
            (max(aims, -(-count // 3)), 3 * scan, 1),
            (aims, steps, snapshots),
        ):
            rows, xi = (rows, xi) if xi is None else best_of(rows, xi, kept)
            each = bound.repeat_interleave(rows.shape[1])
            xi = aiming(rows.flatten(), eps=each, start=xi, snapshots=scored, **annealed(length))
        return best_of(rows, xi, 1)[1]


def _stretched(length: int, *, steps: int, beta: float, gamma: float) -> dict[str, Any]:
    """Settings of `length` steps that are annealed between the same sizes as `steps` with beta and gamma."""
    return {"steps": length, "beta": beta * length / steps, "gamma": gamma ** (steps / length)}


def _targets(net: nn.Module, images: Tensor, labels: Tensor, targets: Any) -> Tensor:
    """The classes (targets,), or maps of them (targets, H, W), that may be aimed at; None: all classes.

    Raises SatlibError where they are none.
    """
    with torch.no_grad():
        classes = logits_of(net, images[:1].float()).shape[1]
    if targets is None:
        return torch.arange(classes, device=labels.device)
    values = numbers(targets, "targets").to(labels.device)
    given = values.long() if values.ndim else values.long().view(1)
    known = given[given != IGNORE] if given.ndim > 1 else given
    whole = torch.equal(given.float(), values.view(given.shape)) and given.shape[1:] in ((), labels.shape[1:])
    if not whole or not len(known) or not 0 <= known.min() <= known.max() < classes:
        raise SatlibError(f"targets={told(targets)}: expected classes from 0 to {classes - 1}, or maps of them")
    return given


def _won(net: nn.Module, images: Tensor, xi: Tensor, targets: Tensor) -> Tensor:
    """Share of the decisions under xi (1, C, H, W) that are each target's: (targets,)."""
    classes = _outputs(net, images, xi, lambda logits: logits.argmax(1))
    return torch.stack([(classes == target).float().mean() for target in targets])


def _likely(net: nn.Module, images: Tensor, xi: Tensor, count: int) -> Tensor:
    """The classes (count,) of highest mean probability: first of clean images, then of those under xi (1, C, H, W)."""

    def ranked(xi: Tensor) -> Tensor:
        shares = _outputs(net, images, xi, lambda logits: logits.softmax(1).view(*logits.shape[:2], -1).mean(2))
        return shares.mean(0).argsort(descending=True)

    clean, attacked = ranked(torch.zeros_like(xi)), ranked(xi)
    half = clean[: count // 2]
    return torch.cat([half, attacked[~torch.isin(attacked, half)][: count - len(half)]])


@kernel
def mean_of_signs(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Sequence[float],
    steps: int = 100,
    batch_size: int = 128,
    relative_step_size: float = 0.25,
    straight_through: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The best universal response of Perolat et al. (2018): a `UniversalAttack`.

    xi <- project(xi + alpha * mean over the mini-batch of the *sign* of every sample's gradient): each image has one
    vote a pixel, whatever its loss. alpha = relative_step_size * eps; the start is uniform in [-eps, eps].
    straight_through: see `perturb_straight_through`.
    """
    bound = per_heap(eps, None, images.device)
    heaps, rows = len(bound), labels.expand(len(bound), *labels.shape)
    xi = random_start((heaps, *images.shape[1:]), bound, generator)
    with attackable(model) as net:
        check_model(net, images, labels)
        gradients_of = None
        for _ in range(steps):
            drawn = torch.randint(len(images), (batch_size,), generator=generator, device=source(generator))
            chosen = drawn.to(images.device)
            x, y = images[chosen].float().repeat(heaps, 1, 1, 1), rows[:, chosen].flatten(0, 1)
            each, how = xi.repeat_interleave(batch_size, 0), {"sharedness": 1, "straight_through": straight_through}
            gradients_of = gradients_of or prepared(heap_gradients, net, x, y, each, **how)
            gradients, _ = gradients_of(x, y, each)
            spend(len(x))
            votes = gradients.sign().unflatten(0, (heaps, batch_size)).mean(1)
            xi = projected_step(xi, votes, eps=bound, alpha=relative_step_size * bound, targeted=False)
    return xi


def _preset(name: str, attack: UniversalAttack, **changes: Any) -> UniversalAttack:
    """The attack with other defaults, and a name as functions have one: which also keeps partials of it apart."""
    preset = functools.partial(attack, **changes)
    preset.__name__ = name
    return preset


_CAPPED = {"loss_threshold": KAPPA, "label_smoothing": LABEL_SMOOTHING}  # as in the paper (section 4.3)
_PRESETS: dict[str, tuple[UniversalAttack, dict[str, Any]]] = {
    "paper": (universal_pgd, _CAPPED),
    "uncapped": (universal_pgd, {"label_smoothing": LABEL_SMOOTHING}),
    "hard targets": (universal_pgd, {}),
    "margin": (extended_pgd, {"loss": "margin"}),
    "momentum": (extended_pgd, _CAPPED | {"update": "momentum"}),
    "Adam": (extended_pgd, _CAPPED | {"update": "adam"}),
    "cosine": (extended_pgd, _CAPPED | {"schedule": "cosine"}),
    "clamped gradient": (universal_pgd, _CAPPED | {"straight_through": False}),
    "dominant": (extended_pgd, _CAPPED | {"dominant": True}),
    "large mini-batches": (extended_pgd, _CAPPED | {"larger": 4}),
    "restarts": (extended_pgd, _CAPPED | {"restarts": 4}),
    "momentum, uncapped, dominant": (extended_pgd, {"update": "momentum", "dominant": True}),
    "SGA": (extended_pgd, {"larger": 4, "inner": 4}),
    "aimed": (aimed_pgd, {}),
    "mean of signs": (mean_of_signs, {}),
    "DeepFool": (universal_deepfool, {}),
}
ATTACKS: dict[str, UniversalAttack] = {name: _preset(name, f, **changes) for name, (f, changes) in _PRESETS.items()}
_UNIT: dict[str, Any] = {"larger": 1}  # a mini-batch is as large as it is said to be


def ensemble(
    images: int, *, segmentation: bool = False, targeted: bool = False, effort: float = 1
) -> list[UniversalAttack]:
    """The attacks of `satlib.robustness.strongest` for so many crafting images, in their order.

    All pass the gradient straight through the clamp, have no loss threshold, walk far (beta of 20 and 40), and
    aggregate gradients over the four parts of a mini-batch: of 64 images, or 8 scenes. First plain ascent, which finds
    where to look; then aiming, which finds most (not for targeted attacks, which have their aim); then the margin,
    which does not go on where a decision is won by far. effort: so many times as many steps, between the same sizes;
    below 1 also of the images by which targets and iterates are chosen.
    """

    def taken(steps: int, beta: float, gamma: float) -> dict[str, Any]:
        return _stretched(max(2, round(steps * effort)), steps=steps, beta=beta, gamma=gamma)

    common = {"batch_size": min(8 if segmentation else 64, images), "inner": 4}
    common["score_images"] = max(64, round(512 * min(1, effort)))
    plain = named("SGA", **_UNIT | common | taken(50, 20.0, 0.975))
    finer = taken(80, 40.0, 0.95)  # its last steps are 4 % of eps; those of plain ascent 20 %
    aim = [named("aimed", scan=max(2, round(8 * effort)), aims=2, **common | finer)]
    return [plain, *([] if targeted else aim), named("margin", **_UNIT | common | finer)]


def name_of(attack: UniversalAttack) -> str:
    """The name of an attack in ATTACKS, of one that it is a partial of, or else its function's."""
    known = next((name for name, each in ATTACKS.items() if each is attack), getattr(attack, "__name__", None))
    if known is None and isinstance(attack, functools.partial):
        return name_of(attack.func)
    return known or type(attack).__name__


def takes(attack: UniversalAttack, name: str) -> bool:
    """Whether an attack has an argument of that name."""
    return name in inspect.signature(attack).parameters


def options(attack: UniversalAttack) -> dict[str, Any]:
    """The settings of an attack with their defaults: all that it does not get from whoever calls it.

    Raises SatlibError where a setting has no default.
    """
    parameters = inspect.signature(attack).parameters.values()
    further = list(parameters)[3:]  # after the model, the images and their labels
    own = {p.name: p.default for p in further if p.name not in GIVEN and p.kind is not p.VAR_KEYWORD}
    if missing := [name for name, default in own.items() if default is inspect.Parameter.empty]:
        raise SatlibError(f"{missing[0]}: attack {name_of(attack)!r} needs a default for it")
    return own


def named(name: str, **changes: Any) -> UniversalAttack:
    """The attack of that name in ATTACKS, with other settings. Raises SatlibError for an unknown name or setting."""
    if name not in ATTACKS:
        raise SatlibError(f"attack={name!r}: unknown; {_nearest(name, ATTACKS)}")
    own = options(ATTACKS[name])
    for setting, value in changes.items():
        if setting not in own:
            raise SatlibError(f"{setting}={value!r}: attack {name!r} has no such setting; {_nearest(setting, own)}")
    return _preset(name, ATTACKS[name], **changes)


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


class _Asked(BaseException):  # no attack catches it
    """The model was asked."""


class _Silent(nn.Module):
    """The model, up to where something is asked of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        raise _Asked


def check_attack(attack: UniversalAttack, model: nn.Module, images: Tensor, labels: Tensor, **given: Any) -> None:
    """Let an attack check its arguments, up to where it first asks the model. Raises what it raises, and SatlibError
    where it takes other ones."""
    arguments = (_Silent(model), images, labels), {"generator": torch.Generator()} | given
    try:
        inspect.signature(attack).bind(*arguments[0], **arguments[1])
    except TypeError as error:
        named = ", ".join(arguments[1])
        raise SatlibError(f"attack {name_of(attack)!r}: {error}; it gets model, images, labels, {named}") from None
    with contextlib.suppress(_Asked):
        attack(*arguments[0], **arguments[1])
