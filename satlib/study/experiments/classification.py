"""Sections 6.1 and 6.2: the models, how attacks do on each of them, and what an epoch costs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from satlib.data import DATASETS
from satlib.errors import SatlibError
from satlib.paper import Cifar10, Classification, ImageNet
from satlib.paths import named_file
from satlib.study.records import file_digest
from satlib.study.runs import Run
from satlib.training import Training

# Images in an epoch, for estimates alone: plans are made without loading data.
TRAIN_IMAGES = {row.name: row.training_images for row in DATASETS.values() if not row.segmentation}


Point = tuple[int, float, float]  # sharedness, eps, sigma
Baseline = tuple[str, float]  # name of the defence, eps


@dataclass(frozen=True)
class Plan:
    """The runs of section 6.1 or 6.2: the models, how attacks do on each of them, and what an epoch costs.

    models: by (s, eps, sigma), one for each seed of training; baselines: by (name, eps). robustness: of every model,
    one search for each seed; deepfool, predictions: of every model, where the section has them.
    """

    erm: Run
    models: dict[Point, list[Run]]
    robustness: dict[Run, list[Run]]
    baselines: dict[Baseline, Run] = field(default_factory=dict)
    deepfool: dict[Run, Run] = field(default_factory=dict)
    predictions: dict[Run, Run] = field(default_factory=dict)
    cost: Run | None = None

    @property
    def trained(self) -> list[Run]:
        """All models, the undefended one first, in order of importance: repetitions come last."""
        first = [runs[0] for runs in self.models.values()]
        again = [run for runs in self.models.values() for run in runs[1:]]
        return [self.erm, *first, *self.baselines.values(), *again]

    @property
    def runs(self) -> list[Run]:
        """In order of importance: each model followed by its evaluations."""
        found = []
        for model in self.trained:
            others = (of[model] for of in (self.deepfool, self.predictions) if model in of)
            found += [model, *self.robustness[model], *others]
        return found + ([self.cost] if self.cost else [])


def cifar10(settings: Cifar10) -> Plan:
    """Plan of section 6.1 under the given settings."""
    erm = erm_run(settings)
    models = _models(settings, erm)
    baselines = {(name, eps): baseline_run(settings, erm, name, eps) for name, eps in settings.baselines}
    trained = [erm, *(run for runs in models.values() for run in runs), *baselines.values()]
    return Plan(
        erm=erm,
        models=models,
        baselines=baselines,
        robustness=_searches(settings, trained),
        deepfool={model: deepfool_run(settings, model) for model in trained},
        cost=cost_run(settings, erm),
    )


def imagenet(settings: ImageNet) -> Plan:
    """Plan of section 6.2 under the given settings."""
    erm = erm_run(settings)
    models = _models(settings, erm)
    searches = _searches(settings, [erm, *(run for runs in models.values() for run in runs)])
    predictions = {model: predictions_run(settings, model, each[0]) for model, each in searches.items()}
    return Plan(erm=erm, models=models, robustness=searches, predictions=predictions)


def _models(settings: Classification, erm: Run) -> dict[Point, list[Run]]:
    points = settings.points or tuple(
        (s, eps, sigma) for eps in settings.epsilons for sigma in settings.sigmas for s in settings.sharedness
    )
    if unknown := set(settings.repeated) - set(points):
        raise SatlibError(f"repeated: {sorted(unknown)} are not among the points; add them there, or drop them here")
    return {
        point: [
            finetune_run(settings, erm, *point, seed=settings.seed + i)
            for i in range(settings.train_seeds if point in settings.repeated else 1)
        ]
        for point in points
    }


def _searches(settings: Classification, models: Iterable[Run]) -> dict[Run, list[Run]]:
    return {model: [robustness_run(settings, model, seed=i) for i in range(settings.search_seeds)] for model in models}


def erm_run(settings: Classification) -> Run:
    """Pre-training by empirical risk minimisation, with a restart where the settings ask for one."""
    training = Training(
        epochs=settings.erm_epochs,
        batch_size=settings.erm_batch_size,
        learning_rate=settings.erm_learning_rate,
        schedule=settings.erm_schedule,
        milestones=settings.erm_milestones,
        weight_decay=settings.erm_weight_decay,
        momentum=settings.momentum,
        nesterov=True,
        label_smoothing=settings.label_smoothing,
        seed=settings.seed,
    )
    if not training.epochs and not settings.pretrained:
        raise SatlibError("erm_epochs: 0 without pretrained weights; name a file of them, or train for some epochs")
    more, labels = pretrained_weights(settings.pretrained)
    if settings.erm_dataset and not settings.erm_restart_epochs:
        raise SatlibError(
            f"erm_dataset: {settings.erm_dataset!r} is for the first training, but erm_restart_epochs is 0; "
            "set it to the epochs on the data set itself"
        )
    if not settings.erm_restart_epochs:
        return _train_run(settings, training, "ERM", {}, labels=labels, **more)
    first, title = settings, "ERM, first cycle"
    if settings.erm_dataset:
        first, title = replace(settings, dataset=settings.erm_dataset), f"ERM on {settings.erm_dataset}"
    again = replace(
        training,
        epochs=settings.erm_restart_epochs,
        learning_rate=settings.erm_restart_learning_rate,
        schedule="one-cycle",
        seed=settings.seed + 1,  # other mini-batches than in the first epochs
    )
    return _train_run(settings, again, "ERM", {"init": _train_run(first, training, title, {}, labels=labels, **more)})


def pretrained_weights(name: str) -> tuple[dict[str, str], dict[str, str]]:
    """What a training that starts from a file of weights has in its settings, and in its labels; nothing for ""."""
    if not name:
        return {}, {}
    path = named_file(name)
    if not path.is_file():
        raise SatlibError(f"pretrained: no file {path}; expected a .safetensors file or a state dict of torch.save")
    return {"pretrained": file_digest(path)}, {"pretrained": name}


def finetune_run(
    settings: Classification, erm: Run, sharedness: int, eps: float, sigma: float, *, seed: int | None = None
) -> Run:
    """Fine-tuning of the ERM model by (shared) adversarial training; seed: None for the settings' own."""
    training = _finetuning(settings, sharedness=sharedness, eps=eps, sigma=sigma)
    title = f"s={sharedness}, eps={eps:g}, sigma={sigma:g}"
    if seed is not None and seed != training.seed:
        training, title = replace(training, seed=seed), f"{title}, seed {seed}"
    return _train_run(settings, training, title, {"init": erm})


def baseline_run(settings: Cifar10, erm: Run, name: str, eps: float) -> Run:
    """Fine-tuning of the ERM model by one of the defences that the paper compares with (section 6.1)."""
    options = baseline_options(settings)
    if name not in options:
        raise SatlibError(f"baselines: {name!r} is no defence; expected one of {', '.join(options)}")
    training = _finetuning(settings, sharedness=1, eps=eps, sigma=settings.baseline_sigma)
    defense = {"name": name, "eps": eps} | options[name]
    rounds = -(-settings.finetune_epochs // settings.uad_epochs)
    finding = {
        "DeepFool UAD": rounds * settings.uad_pool * settings.uad_images * 40,  # 10 gradients, a few times for each
        "fictitious play": settings.finetune_epochs * settings.response_steps * settings.batch_size,
    }
    run = _train_run(settings, training, f"{name}, eps={eps:g}", {"init": erm}, defense=defense)
    return replace(run, cost=run.cost / 2 + finding.get(name, 0))


def baseline_options(settings: Cifar10) -> dict[str, dict[str, Any]]:
    """Settings of each defence of `satlib.defenses`, but for eps."""
    return {
        "DeepFool UAD": {
            "pool_size": settings.uad_pool,
            "epochs_each": settings.uad_epochs,
            "images_each": settings.uad_images,
            "passes": settings.deepfool_passes,
            "batch_size": settings.deepfool_batch,
        },
        "fictitious play": {"steps": settings.response_steps, "batch_size": settings.batch_size},
        "universal adversarial training": {},
    }


def _finetuning(settings: Classification, **attack: Any) -> Training:
    return Training(
        epochs=settings.finetune_epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.finetune_learning_rate,
        schedule=settings.finetune_schedule,
        milestones=settings.finetune_milestones,
        weight_decay=settings.finetune_weight_decay,
        epoch_images=settings.finetune_epoch_images,
        momentum=settings.momentum,
        label_smoothing=settings.label_smoothing,
        steps=settings.steps,
        relative_step_size=settings.relative_step_size,
        loss_threshold=settings.loss_threshold,
        seed=settings.seed,
        **attack,
    )


def _train_run(
    settings: Classification,
    training: Training,
    title: str,
    parents: dict[str, Run],
    *,
    labels: Mapping[str, str] | None = None,
    **more: Any,
) -> Run:
    passes = 1.5 if training.sigma == 0 else training.steps + 3
    name, _, option = settings.dataset.partition(":")
    images = TRAIN_IMAGES.get(name, 45_000)
    if option.isdecimal():  # so many of 200 classes
        images = images * int(option) // 200
    images = training.epoch_images or images
    return Run(
        kind="train",
        title=title,
        dataset=settings.dataset,
        config={
            "dataset": settings.dataset,
            "architecture": settings.architecture,
            "training": training.config(),
            **more,
        },
        parents=parents,
        cost=passes * images * training.epochs,
        labels={"section": settings.section, **(labels or {})},
    )


def robustness_run(settings: Classification, model: Run, *, seed: int = 0) -> Run:
    """eps_uni(delta) of a trained model by stochastic PGD (section 5.2)."""
    passes = settings.search_iterations if settings.search == "binary" else 5
    attack = {
        "steps": settings.search_steps,
        "batch_size": settings.search_batch,
        "beta": settings.beta,
        "gamma": settings.gamma,
        "loss_threshold": settings.loss_threshold,
        "label_smoothing": settings.label_smoothing,
    }
    sets = {}
    if isinstance(settings, ImageNet):  # crafts on training images, and reports on the whole validation set
        sets = {"sets": {"craft": "train", "choose": "val", "report": "test"}}
    return Run(
        kind="universal_robustness",
        title=f"eps_uni of {model.title}" + (f", seed {seed}" if seed else ""),
        dataset=settings.dataset,
        config={
            "dataset": settings.dataset,
            "delta": settings.delta,
            "search": settings.search,
            "iterations": settings.search_iterations,
            "attack": attack,
            "images": {
                "craft": settings.craft_images,
                "choose": settings.choose_images,
                "report": settings.report_images,
            },
            "seed": seed,
            **sets,
        },
        parents={"model": model},
        cost=passes * settings.search_steps * settings.search_batch,
        labels={"section": settings.section},
    )


def predictions_run(settings: Classification, model: Run, search: Run) -> Run:
    """Which classes a model predicts under its universal perturbation (A.7)."""
    return Run(
        kind="predictions",
        title=f"predictions of {model.title}",
        dataset=settings.dataset,
        config={"dataset": settings.dataset},
        parents={"model": model, "search": search},
        cost=4096,
        labels={"section": settings.section},
    )


def deepfool_run(settings: Cifar10, model: Run) -> Run:
    """Accuracy of a trained model under a DeepFool universal perturbation (Figure 3, right)."""
    attack = {"passes": settings.deepfool_passes, "batch_size": settings.deepfool_batch}
    return Run(
        kind="universal_deepfool",
        title=f"DeepFool on {model.title}",
        dataset=settings.dataset,
        config={
            "dataset": settings.dataset,
            "eps": settings.deepfool_eps,
            "images": settings.deepfool_images,
            "attack": attack,
            "seed": settings.seed,
        },
        parents={"model": model},
        cost=settings.deepfool_images * settings.deepfool_passes * 10,
        labels={"section": "6.1"},
    )


def cost_run(settings: Cifar10, model: Run) -> Run:
    """Seconds that an epoch of each way of training takes (section 6.1)."""
    training = _finetuning(settings, sharedness=1, eps=8.0, sigma=0.5)
    defenses = {name: {"eps": 8.0} | options for name, options in baseline_options(settings).items()}
    ways = len(settings.sharedness) + len(defenses) + 1
    return Run(
        kind="epoch_cost",
        title="cost of an epoch",
        dataset=settings.dataset,
        config={
            "dataset": settings.dataset,
            "training": training.config(),
            "sharedness": list(settings.sharedness),
            "defenses": defenses,
            "images": settings.cost_images,
            "seed": settings.seed,
        },
        parents={"model": model},
        cost=ways * settings.cost_images * (settings.steps + 3),
        labels={"section": "6.1"},
    )
