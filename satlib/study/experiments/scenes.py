"""Sections 6.3 and 6.4: segmentation of driving scenes, and universal attacks on it."""

from dataclasses import dataclass, field
from typing import Any

from satlib.data import DATASETS
from satlib.errors import SatlibError
from satlib.paper import Cityscapes
from satlib.study.experiments.classification import Point, pretrained_weights
from satlib.study.runs import Run
from satlib.training import Training

TRAIN_SCENES = {row.name: row.training_images for row in DATASETS.values() if row.segmentation}  # for estimates alone


@dataclass(frozen=True)
class ScenesPlan:
    """The runs of sections 6.3 and 6.4.

    models: by (s, eps, sigma), one part of the training for each of the `epochs` after which it is looked at. targeted,
    adversarial: eps_uni and eps_adv for the target scene, of every model after each of these epochs; untargeted and
    untargeted_adversarial: of the models at their end. structure: what image-dependent and universal perturbations do
    to images (Figure 6); hiding: what a dynamic target reaches; seen: segmentations under universal perturbations.
    """

    epochs: tuple[int, ...]
    erm: Run
    models: dict[Point, list[Run]]
    targeted: dict[Run, Run] = field(default_factory=dict)
    adversarial: dict[Run, Run] = field(default_factory=dict)
    untargeted: dict[Run, Run] = field(default_factory=dict)
    untargeted_adversarial: dict[Run, Run] = field(default_factory=dict)
    structure: dict[Run, Run] = field(default_factory=dict)
    hiding: dict[Run, Run] = field(default_factory=dict)
    seen: dict[Run, Run] = field(default_factory=dict)

    @property
    def final(self) -> list[Run]:
        """The undefended model, and each defended one at its end."""
        return [self.erm, *(parts[-1] for parts in self.models.values())]

    @property
    def runs(self) -> list[Run]:
        """In order of importance: the models at their ends first."""
        kinds = (self.targeted, self.adversarial, self.untargeted, self.untargeted_adversarial)
        kinds += (self.structure, self.hiding, self.seen)
        found = []
        for model in self.final:
            found += [model, *(of[model] for of in kinds if model in of)]
        for parts in self.models.values():
            found += [run for part in parts[:-1] for run in (part, self.targeted[part], self.adversarial[part])]
        return found


def cityscapes(settings: Cityscapes) -> ScenesPlan:
    """Plan of sections 6.3 and 6.4 under the given settings."""
    epochs = settings.evaluated or tuple(range(1, settings.finetune_epochs + 1))
    if list(epochs) != sorted(set(epochs)) or not 1 <= epochs[0] <= epochs[-1] == settings.finetune_epochs:
        raise SatlibError(
            f"evaluated={epochs}: expected epochs in their order, the last of them finetune_epochs "
            f"({settings.finetune_epochs})"
        )
    erm = _erm_run(settings)
    models = {point: _finetune_runs(settings, erm, epochs, *point) for point in settings.points}
    final = [erm, *(parts[-1] for parts in models.values())]
    every = [erm, *(part for parts in models.values() for part in parts)]
    targeted = {model: _universal(settings, model, targeted=True) for model in every}
    adversarial = {model: _adversarial(settings, model, targeted=True) for model in every}
    untargeted = {model: _universal(settings, model, targeted=False) for model in final}
    return ScenesPlan(
        epochs=epochs,
        erm=erm,
        models=models,
        targeted=targeted,
        adversarial=adversarial,
        untargeted=untargeted,
        untargeted_adversarial={model: _adversarial(settings, model, targeted=False) for model in final},
        structure={model: _structure(settings, model) for model in final},
        hiding={model: _hiding(settings, model) for model in final},
        seen={model: _seen(settings, model, targeted[model], untargeted[model]) for model in final},
    )


def _training(settings: Cityscapes, **more: Any) -> Training:
    return Training(
        optimizer="adam",
        batch_size=settings.batch_size,
        label_smoothing=settings.label_smoothing,
        weight_decay=0.0,
        seed=settings.seed,
        **more,
    )


def _run(settings: Cityscapes, kind: str, title: str, parents: dict[str, Run], cost: float, **config: Any) -> Run:
    return Run(
        kind=kind,
        title=title,
        dataset=settings.dataset,
        config={"dataset": settings.dataset, **config},
        parents=parents,
        cost=cost,
        labels={"section": settings.section},
    )


def _scenes(settings: Cityscapes) -> int:
    return TRAIN_SCENES.get(settings.dataset.partition(":")[0], 400)


def _erm_run(settings: Cityscapes) -> Run:
    training = _training(
        settings,
        epochs=settings.erm_epochs,
        learning_rate=settings.erm_learning_rate,
        schedule=settings.erm_schedule,
        milestones=settings.erm_milestones,
    )
    config: dict[str, Any] = {"architecture": settings.architecture, "training": training.config()}
    more, labels = pretrained_weights(settings.pretrained)
    run = _run(settings, "train", "ERM", {}, 1.5 * _scenes(settings) * settings.erm_epochs, **config, **more)
    run.labels.update(labels)
    return run


def _finetune_runs(
    settings: Cityscapes, erm: Run, epochs: tuple[int, ...], sharedness: int, eps: float, sigma: float
) -> list[Run]:
    """The parts of one training, which end after these epochs."""
    training = _training(
        settings,
        epochs=settings.finetune_epochs,
        epoch_images=settings.finetune_epoch_images,
        learning_rate=settings.finetune_learning_rate,
        schedule=settings.finetune_schedule,
        milestones=settings.finetune_milestones,
        steps=settings.steps,
        relative_step_size=settings.relative_step_size,
        loss_threshold=settings.loss_threshold,
        sharedness=sharedness,
        eps=eps,
        sigma=sigma,
    )
    title, parts, before = f"s={sharedness}, eps={eps:g}, sigma={sigma:g}", [], 0
    for until in epochs:
        last = until == settings.finetune_epochs
        parts.append(
            _run(
                settings,
                "train_part",
                title + ("" if last else f", epoch {until}"),
                {"previous": parts[-1]} if parts else {"init": erm},
                (settings.steps + 3) * (until - before) * (settings.finetune_epoch_images or _scenes(settings)),
                architecture=settings.architecture,
                training=training.config(),
                until=until,
            )
        )
        before = until
    return parts


def _attack(settings: Cityscapes, *, targeted: bool) -> dict[str, Any]:
    """A targeted attack has neither a loss threshold nor soft targets."""
    capped = {"loss_threshold": settings.loss_threshold, "label_smoothing": settings.label_smoothing}
    return {"beta": settings.beta, "gamma": settings.gamma} | ({} if targeted else capped)


def _target(settings: Cityscapes, *, targeted: bool) -> dict[str, str]:
    return {"target": settings.target} if targeted else {}


def _universal(settings: Cityscapes, model: Run, *, targeted: bool) -> Run:
    steps = settings.search_steps
    attack = {"steps": steps, "batch_size": settings.search_batch, "score_images": settings.choose_images}
    passes = settings.search_iterations if settings.search == "binary" else 5
    return _run(
        settings,
        "universal_robustness",
        f"{'targeted' if targeted else 'untargeted'} eps_uni of {model.title}",
        {"model": model},
        passes * steps * settings.search_batch,
        delta=settings.delta,
        search=settings.search,
        iterations=settings.search_iterations,
        attack=attack | _attack(settings, targeted=targeted),
        images={
            "craft": settings.craft_images,
            "choose": settings.choose_images,
            "report": settings.report_images,
        },
        seed=settings.seed,
        **_target(settings, targeted=targeted),
    )


def _adversarial(settings: Cityscapes, model: Run, *, targeted: bool) -> Run:
    """Without a target the pixels of an image compete for its perturbation, and their losses are capped."""
    attack = {"steps": settings.adversarial_steps} | _attack(settings, targeted=targeted)
    return _run(
        settings,
        "adversarial_robustness",
        f"{'targeted' if targeted else 'untargeted'} eps_adv of {model.title}",
        {"model": model},
        settings.adversarial_images * settings.adversarial_steps * settings.adversarial_iterations,
        delta=settings.delta,
        iterations=settings.adversarial_iterations,
        attack=attack | {"batch_size": 4},
        images=settings.adversarial_images,
        seed=settings.seed,
        **_target(settings, targeted=targeted),
    )


def _structure(settings: Cityscapes, model: Run) -> Run:
    return _run(
        settings,
        "perturbation_structure",
        f"structure of perturbations of {model.title}",
        {"model": model},
        (settings.report_images + settings.search_batch) * settings.adversarial_steps,
        target=settings.target,
        eps=settings.structure_eps,
        batch_size=settings.search_batch,
        images=settings.report_images,
        attack={"steps": settings.adversarial_steps, "beta": settings.beta, "gamma": settings.gamma},
        seed=settings.seed,
    )


def _hiding(settings: Cityscapes, model: Run) -> Run:
    attack = {"steps": settings.search_steps, "batch_size": settings.search_batch}
    return _run(
        settings,
        "hiding",
        f"hiding every {settings.hidden} from {model.title}",
        {"model": model},
        2 * settings.search_steps * settings.search_batch,
        hide=settings.hidden,
        epsilons=list(settings.hiding_epsilons),
        attack=attack | {"score_images": settings.choose_images, "beta": settings.beta, "gamma": settings.gamma},
        images=settings.report_images,
        seed=settings.seed,
    )


def _seen(settings: Cityscapes, model: Run, targeted: Run, untargeted: Run) -> Run:
    parents = {"model": model, "targeted": targeted, "untargeted": untargeted}
    return _run(settings, "segmentations", f"segmentations of {model.title}", parents, 3)
