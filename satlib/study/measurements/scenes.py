"""Sections 6.3 and 6.4: segmentation of driving scenes, universal attacks on it, and what these do to images."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn import Module

from satlib import segmentation
from satlib.attacks import annealed_step_sizes, attackable, heap_pgd, perturb, universal_pgd
from satlib.data import Splits
from satlib.data.imageset import IGNORE
from satlib.errors import SatlibError
from satlib.paper import Cityscapes
from satlib.segmentation import repeated, segment
from satlib.study.measurement import Run, measurement
from satlib.study.measurements.classification import Point
from satlib.study.measurements.robustness import (
    adversarial_search,
    frozen,
    search_attack,
    stated,
    strongest_search,
    universal_search,
)
from satlib.study.measurements.training import pretrained_weights, train_run, training_settings
from satlib.study.records import Record, Workspace
from satlib.training import Training


@measurement(version=2, artefacts=("perturbations",), on_demand=True)
def perturbation_structure(
    model: Module,
    data: Splits,
    work: Workspace,
    progress: Any,
    *,
    target: str,
    eps: float,
    batch_size: int,
    images: int,
    attack: dict,
    straight_through: bool = False,
    seed: int = 0,
) -> dict:
    """Image-dependent against universal perturbations of one size, for the same images and target (Figure 6).

    The universal one is crafted on validation scenes, each test scene gets one of its own. For both: how far they
    weaken the edges of their image, how far their edges lie on the boundaries of the target, and the share of the
    target's pixels that they win. Kept as arrays: for the first test image both perturbations in half precision, and
    what the model makes of it; not the image, which may not be passed on.
    """
    part, aim = data.test.first(min(images, len(data.test))), segmentation.scene_target(data, target)
    x, y, craft = part.images.float(), repeated(aim, len(part)), data.val
    common = {"eps": eps, "targeted": True, "generator": torch.Generator().manual_seed(seed)}
    sizes = annealed_step_sizes(eps, attack["steps"], beta=attack["beta"], gamma=attack["gamma"])
    common["straight_through"] = straight_through
    heaps = common | {"sharedness": 1, "keep_best": True, "steps": attack["steps"], "step_size": sizes}
    with attackable(model) as net:
        options = attack | common | {"batch_size": batch_size, "score_images": len(part)}
        one = universal_pgd(net, craft.images, repeated(aim, len(craft)), **options)
        own = []
        for some, aims in zip(x.split(batch_size), y.split(batch_size), strict=True):
            own.append(heap_pgd(net, some, aims, **heaps))
            progress("image-dependent perturbations", sum(map(len, own)) / len(part))
        perturbations = {"own": torch.cat(own), "universal": one.expand(len(part), -1, -1, -1)}
        seen = {"clean": segment(net, x)}
        seen |= {name: segment(net, perturb(x, xi, 1)) for name, xi in perturbations.items()}
    metrics: dict[str, Any] = {"eps": eps, "images": len(part)}
    for name, xi in perturbations.items():
        metrics[name] = {
            "weakening": segmentation.weakening(x, xi).tolist(),
            "target_structure": segmentation.target_structure(xi, aim).tolist(),
            "target_accuracy": (seen[name] == y)[y != IGNORE].float().mean().item(),
        }
    kept = {name: xi[0].half() for name, xi in perturbations.items()} | {"target": aim}
    kept |= {f"segmented_{name}": predicted[0] for name, predicted in seen.items()}
    work.save_arrays("perturbations", {name: value.cpu().numpy() for name, value in kept.items()})
    return metrics


@measurement(version=2, artefacts=("example",), on_demand=True, nested={"attack": lambda given: frozen(universal_pgd)})
def hiding(
    model: Module,
    data: Splits,
    work: Workspace,
    *,
    hide: str,
    epsilons: list,
    images: int,
    attack: dict,
    seed: int = 0,
) -> dict:
    """One perturbation that hides a class everywhere and keeps all else (the dynamic target of Metzen et al. 2017).

    Targets are the model's own predictions in which the class gives way to what is nearest. Crafted on validation
    scenes for every eps at once, scored on test scenes: the share of the class's predicted pixels that are gone, and
    the share of the others that stay. Kept as arrays: the perturbation of the largest eps, and what the model makes
    with and without it of the test scene with most of the class, whose place among them is `example`.
    """
    hidden, craft = segmentation.class_index(data, hide), data.val.images
    options = attack | {"eps": epsilons, "targeted": True, "generator": torch.Generator().manual_seed(seed)}
    with attackable(model) as net:
        found = universal_pgd(net, craft, segmentation.without(segment(net, craft), hidden), **options)
        test = data.test.images[:images]
        clean = segment(net, test)
        seen = [segment(net, perturb(test.float(), xi[None], len(test))) for xi in found]
    most = int((clean == hidden).flatten(1).sum(1).argmax())
    arrays = {"perturbation": found[-1].half(), "clean": clean[most], "perturbed": seen[-1][most]}
    work.save_arrays("example", {name: value.cpu().numpy() for name, value in arrays.items()})
    shares = [segmentation.share_hidden(clean, after, hidden) for after in seen]
    scores = [{"eps": eps} | each for eps, each in zip(epsilons, shares, strict=True)]
    return {"hide": hide, "example": most, "scores": scores}


@measurement(version=1, artefacts=("segmentations",), on_demand=True)
def segmentations(model: Module, targeted: Record, untargeted: Record, data: Splits, work: Workspace) -> dict:
    """What a model makes of the first test scene, clean and under its universal perturbations.

    Kept as arrays (H, W): `clean`, and under the perturbation that each search found, or that came closest, so that
    pictures need no weights.
    """
    scene = data.test.images[:1].float()
    with attackable(model) as net:
        seen = {"clean": segment(net, scene)[0]}
        for name, search in (("targeted", targeted), ("untargeted", untargeted)):
            seen[name] = segment(net, perturb(scene, perturbation_of(search).to(scene.device), 1))[0]
    work.save_arrays("segmentations", {name: labels.cpu().numpy() for name, labels in seen.items()})
    return {"scene": 0}


def perturbation_of(search: Record) -> torch.Tensor:
    """The perturbation (1, C, H, W) that a search found, or where none won the one that came closest."""
    name = "closest" if search.metrics["rate"] is None else "perturbation"
    return search.tensors(name)["perturbation"]


@dataclass(frozen=True)
class ScenesPlan:
    """The runs of sections 6.3 and 6.4.

    models: by (s, eps, sigma), one part of the training for each of the `epochs` after which it is looked at. targeted,
    adversarial: eps_uni and eps_adv for the target scene, of every model after each of these epochs; untargeted and
    untargeted_adversarial: of the models at their end; strongest and strongest_untargeted: eps_uni of these by the
    ensemble, one search for each seed. structure: what image-dependent and universal perturbations do
    to images (Figure 6); hiding: what a dynamic target reaches; seen: segmentations under universal perturbations.
    """

    epochs: tuple[int, ...]
    erm: Run
    models: dict[Point, list[Run]]
    targeted: dict[Run, Run]
    adversarial: dict[Run, Run]
    untargeted: dict[Run, Run]
    untargeted_adversarial: dict[Run, Run]
    strongest: dict[Run, list[Run]]
    strongest_untargeted: dict[Run, list[Run]]
    structure: dict[Run, Run]
    hiding: dict[Run, Run]
    seen: dict[Run, Run]

    @property
    def final(self) -> list[Run]:
        """The undefended model, and each defended one at its end."""
        return [self.erm, *(parts[-1] for parts in self.models.values())]

    @property
    def runs(self) -> list[Run]:
        """In order of importance: the models at their ends first."""
        kinds = (self.targeted, self.adversarial, self.untargeted, self.untargeted_adversarial)
        kinds += (self.structure, self.hiding, self.seen)
        planned = []
        for model in self.final:
            strongest = (*self.strongest[model], *self.strongest_untargeted[model])
            planned += [model, *strongest, *(of[model] for of in kinds)]
        earlier = [part for parts in self.models.values() for part in parts[:-1]]
        return planned + [run for part in earlier for run in (part, self.targeted[part], self.adversarial[part])]

    @property
    def audited(self) -> list[Run]:
        """The undefended model, and the first defended one of each sharedness."""
        defended = {sharedness: parts[-1] for (sharedness, _, _), parts in reversed(self.models.items())}
        return [self.erm, *(defended[s] for s in sorted(defended))]


def cityscapes(settings: Cityscapes) -> ScenesPlan:
    """Plan of sections 6.3 and 6.4 under the given settings."""
    epochs = settings.evaluated or tuple(range(1, settings.finetune_epochs + 1))
    if list(epochs) != sorted(set(epochs)) or not 1 <= epochs[0] <= epochs[-1] == settings.finetune_epochs:
        raise SatlibError(
            f"evaluated={epochs}: expected epochs in their order, the last of them finetune_epochs "
            f"({settings.finetune_epochs})"
        )
    erm = train_run(settings, _training(settings, "erm"), "ERM", **pretrained_weights(settings.pretrained))
    models = {point: _finetune_runs(settings, erm, epochs, *point) for point in settings.points}
    final = [erm, *(parts[-1] for parts in models.values())]
    every = [erm, *(part for parts in models.values() for part in parts)]
    aimed = {model: _searches(settings, model, targeted=True) for model in every}
    free = {model: _searches(settings, model, targeted=False) for model in final}
    return ScenesPlan(
        epochs=epochs,
        erm=erm,
        models=models,
        targeted={model: universal for model, (universal, _) in aimed.items()},
        adversarial={model: adversarial for model, (_, adversarial) in aimed.items()},
        untargeted={model: universal for model, (universal, _) in free.items()},
        untargeted_adversarial={model: adversarial for model, (_, adversarial) in free.items()},
        strongest={model: _strongest(settings, model, target=settings.target) for model in final},
        strongest_untargeted={model: _strongest(settings, model) for model in final},
        structure={model: _structure(settings, model) for model in final},
        hiding={model: _hiding(settings, model) for model in final},
        seen={model: _seen(settings, model, aimed[model][0], free[model][0]) for model in final},
    )


def _training(settings: Cityscapes, stage: str, **more: Any) -> Training:
    return training_settings(settings, stage, optimizer="adam", weight_decay=0.0, **more)


def _finetune_runs(
    settings: Cityscapes, erm: Run, epochs: tuple[int, ...], sharedness: int, eps: float, sigma: float
) -> list[Run]:
    """The parts of one training, which end after these epochs."""
    each = _training(settings, "finetune", sharedness=sharedness, eps=eps, sigma=sigma)
    title, parts = f"s={sharedness}, eps={eps:g}, sigma={sigma:g}", []
    for before, until in pairwise((0, *epochs)):
        name = title if until == settings.finetune_epochs else f"{title}, epoch {until}"
        builds_on = {"previous": parts[-1]} if parts else {"init": erm}
        parts.append(train_run(settings, each, name, epochs=until - before, until=until, **builds_on))
    return parts


def _searches(settings: Cityscapes, model: Run, *, targeted: bool) -> tuple[Run, Run]:
    """The searches for eps_uni and eps_adv of a model.

    A targeted attack has neither a loss threshold nor soft targets. Without a target the pixels of an image compete for
    its perturbation, and their losses are capped in the paper's universal attack; image-dependent ones have no cap.
    """
    kind, loss, aim = "untargeted", stated(settings, "loss_threshold", "label_smoothing"), stated(settings, "seed")
    if targeted:
        kind, loss, aim = "targeted", {"loss_threshold": None, "label_smoothing": 0.0}, aim | stated(settings, "target")
    universal = {"name": "paper", "score_images": settings.choose_images} | search_attack(settings) | loss
    each = {"iterations": settings.adversarial_iterations} | aim
    own = {"batch_size": 4} | (loss if settings.adversarial_capped else {})
    return (
        universal_search(settings, model, f"{kind} eps_uni of {model.title}", universal, **aim),
        adversarial_search(settings, model, f"{kind} eps_adv of {model.title}", own, **each),
    )


def _strongest(settings: Cityscapes, model: Run, **target: str) -> list[Run]:
    """The ensemble's searches for eps_uni of a model, one for each seed."""
    title = f"strongest {'targeted' if target else 'untargeted'} eps_uni of {model.title}"
    return [
        strongest_search(settings, model, f"{title}, seed {seed}" if seed else title, seed=seed, **target)
        for seed in range(settings.strongest_seeds)
    ]


def _structure(settings: Cityscapes, model: Run) -> Run:
    cost = (settings.report_images + settings.search_batch) * settings.adversarial_steps
    attack = {"steps": settings.adversarial_steps} | stated(settings, "beta", "gamma")
    given = {"model": model, "attack": attack} | stated(settings, "target", "seed", "straight_through")
    given |= {"eps": settings.structure_eps, "batch_size": settings.search_batch, "images": settings.report_images}
    return perturbation_structure.plan(settings, f"structure of perturbations of {model.title}", cost, **given)


def _hiding(settings: Cityscapes, model: Run) -> Run:
    cost = 2 * settings.search_steps * settings.search_batch
    attack = search_attack(settings) | {"score_images": settings.choose_images}
    given = {"model": model, "attack": attack, "images": settings.report_images} | stated(settings, "seed")
    given |= {"hide": settings.hidden, "epsilons": settings.hiding_epsilons}
    return hiding.plan(settings, f"hiding every {settings.hidden} from {model.title}", cost, **given)


def _seen(settings: Cityscapes, model: Run, targeted: Run, untargeted: Run) -> Run:
    given = {"model": model, "targeted": targeted, "untargeted": untargeted}
    return segmentations.plan(settings, f"segmentations of {model.title}", 3, **given)
