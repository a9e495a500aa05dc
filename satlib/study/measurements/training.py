"""Trainings, and what an epoch of each way of training costs."""

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch.nn import Module

from satlib.data import Splits, training_images
from satlib.defenses import DEFENSES, Crafted
from satlib.errors import SatlibError
from satlib.models import Fitted, build, load_matching, load_pretrained
from satlib.parallel import current_ranks
from satlib.paths import named_file
from satlib.study.measurement import Run, measurement, options_of
from satlib.study.records import Record, Workspace, file_digest
from satlib.training import Training, class_iou, confusion, share_right
from satlib.training import train as fit

DEFAULTS = asdict(Training())
TRAINING = {"training": lambda given: DEFAULTS}  # the frozen defaults of its settings


def untrained(data: Splits, settings: Mapping) -> Module:
    """The network of a training before its first step, initialised from its seed, on the device of the data."""
    torch.manual_seed(settings["training"]["seed"])
    classes, train_set = len(data.train.classes), data.train
    model = build(settings["architecture"], classes=classes, mean=train_set.mean, std=train_set.std)
    return model.to(train_set.device)


@measurement(
    version=1,
    artefacts=("weights",),
    on_demand=True,
    of_parents={"previous": ("optimizer",)},
    builds=untrained,
    nested=TRAINING | {"defense": lambda given: options_of(DEFENSES[given["name"]])},
)
def train(
    data: Splits,
    work: Workspace,
    progress: Any,
    labels: dict,
    init: Record | None,
    previous: Record | None,
    *,
    architecture: dict,
    training: dict = DEFAULTS,
    defense: dict | None = None,
    pretrained: str = "",
    until: int | None = None,
) -> dict:
    """ERM or (shared) adversarial training; continues from its last finished epoch.

    It starts from the weights of the training `init`, else from the file that `pretrained` names by its digest and the
    labels by its path, else from its seed. With `until` it ends after so many of the epochs, and a training that has it
    as `previous` goes on from there, as if it had never stopped: so that models can be looked at along the way
    (Figure 5). defense: name and options of one of `satlib.defenses.DEFENSES`.
    """
    settings = Training.from_config(training)
    model = untrained(data, {"architecture": architecture, "training": training})
    fitted = start(model, init, pretrained, labels)
    if fitted and (fitted.missing or fitted.other_shape or fitted.unused):
        progress(str(fitted), 0.0, lasting=True)
    state, history, last_epoch = {}, [], until or settings.epochs
    if previous:
        state = {f"model.{name}": value for name, value in previous.tensors("weights").items()}
        state |= previous.tensors("optimizer")
        history = previous.metrics["history"]
    if checkpoint := work.load_checkpoint():
        state, history = checkpoint[0], checkpoint[1]["history"]
    began, fresh, last = time.monotonic(), len(history), state

    def report(text: str, done: float, needed: float = 0.0) -> None:
        progress(text, (done * settings.epochs - fresh) / (last_epoch - fresh), needed)

    def after_epoch(state: dict, history: list[dict]) -> None:
        nonlocal last
        last = state
        work.save_checkpoint(state, {"history": history})
        if len(history) < last_epoch:
            each = (time.monotonic() - began) / (len(history) - fresh)
            report(f"epoch {len(history)}/{settings.epochs}", len(history) / settings.epochs, needed=each)

    adversary = None
    if defense:
        kind, options = DEFENSES[defense["name"]], {name: value for name, value in defense.items() if name != "name"}
        if isinstance(kind, type) and issubclass(kind, Crafted):
            options["progress"] = lambda text: report(text, fresh / settings.epochs)
        adversary = kind(data.train, **options)
    given = {"adversary": adversary, "state": state or None, "history": history, "until": last_epoch}
    history = fit(model, data.train, settings, after_epoch=after_epoch, progress=report, **given)
    work.save_tensors("weights", {name: value.cpu() for name, value in model.state_dict().items()})
    if last_epoch < settings.epochs:
        work.save_tensors("optimizer", {k: v for k, v in last.items() if not k.startswith("model.")})
    return _scores(model, data) | {"test_images": len(data.test), "history": history}


def start(model: Module, init: Record | None, pretrained: str, labels: dict) -> Fitted | None:
    """Give the model the weights that its training starts from, and say what of them fitted; None without any.

    Where classes differ, the head keeps its random weights.
    """
    if init:
        return load_matching(model, init.tensors("weights"), source=init.labels["title"])
    if not pretrained or current_ranks().rank > 0:  # the others get what rank 0 found
        return None
    path = named_file(labels["pretrained"])
    if file_digest(path) != pretrained:
        raise SatlibError(f"pretrained: {path} changed while this ran; start again")
    return load_pretrained(model, path)


def _scores(model: Module, data: Splits) -> dict:
    """Accuracy on each set, and of segmenters the intersections over union."""
    counts = {
        "": confusion(model, data.test),
        "validation_": confusion(model, data.val),
        "train_": confusion(model, data.train.first(min(5000, len(data.train)))),
    }
    scores: dict[str, Any] = {f"{split}accuracy": share_right(each) for split, each in counts.items()}
    if data.test.labels.ndim > 1:
        iou = {split: class_iou(each) for split, each in counts.items()}
        scores |= {f"{split}mean_iou": each.nanmean().item() for split, each in iou.items()}
        scores["class_iou"] = [None if math.isnan(value) else value for value in iou[""].tolist()]
    return scores


def pretrained_weights(name: str) -> dict[str, Any]:
    """What the plan of a training that starts from a file of weights says of it; nothing for ""."""
    if not name:
        return {}
    path = named_file(name)
    if not path.is_file():
        raise SatlibError(f"pretrained: no file {path}; expected a .safetensors file or a state dict of torch.save")
    return {"pretrained": file_digest(path), "labels": {"pretrained": name}}


@measurement(version=1, nested=TRAINING)
def epoch_cost(
    model: Module,
    data: Splits,
    progress: Any,
    *,
    training: dict = DEFAULTS,
    sharedness: list,
    defenses: dict,
    images: int,
    seed: int = 0,
) -> dict:
    """Seconds an epoch of each way of training takes here, one after the other on the same model.

    Measured on some of the images and scaled to all; what a baseline finds once for several epochs is shared out.
    """
    some = min(images, len(data.train))
    scale, settings = len(data.train) / some, Training.from_config(training)
    ways = {"ERM": replace(settings, sigma=0.0)} | {f"s = {s}": replace(settings, sharedness=s) for s in sharedness}
    ways |= dict.fromkeys(defenses, settings)
    seconds: dict[str, float] = {}
    ended: list[float] = []  # when the epochs did
    for name, each in ways.items():
        trained, finding, adversary = copy.deepcopy(model), 0.0, None
        if options := defenses.get(name):
            crafted, epochs = options.get("pool_size", 1), options.get("epochs_each", 1)
            adversary = DEFENSES[name](data.train, **options | ({"pool_size": 1} if "pool_size" in options else {}))
            start = time.perf_counter()
            adversary.start_epoch(trained, 0, torch.Generator().manual_seed(seed))
            sum(found.sum().item() for found in adversary.state().values())  # waits for the device
            finding = (time.perf_counter() - start) * crafted / epochs
            adversary.start_epoch = lambda *_: None  # it has been found, and is not part of what follows
        two = replace(each, epochs=2, epoch_images=some)  # the first also records the step, where there is a recorder
        fit(trained, data.train, two, adversary=adversary, after_epoch=lambda *_: ended.append(time.perf_counter()))
        seconds[name] = (ended[-1] - ended[-2]) * scale + finding  # a history of numbers has waited for the device
        progress(name, len(seconds) / len(ways))
    return {"seconds": seconds, "images": some, "scaled_to": len(data.train)}


# Plans


def training_settings(section: Any, stage: str, **more: Any) -> Training:
    """The settings of a section's trainings of a stage, "erm" or "finetune": `erm_epochs` are the former's `epochs`."""
    names = DEFAULTS.keys() - {"sigma", "eps", "sharedness"}  # which are of a model, not of a section
    values = {name: getattr(section, f"{stage}_{name}", getattr(section, name, DEFAULTS[name])) for name in names}
    return Training(**values | {"milestones": tuple(values["milestones"])} | more)


def train_run(section: Any, each: Training, title: str, *, epochs: int | None = None, **more: Any) -> Run:
    """A training of a section, or a part of it that takes so many `epochs`."""
    images = each.epoch_images or training_images(section.dataset)
    passes = 1.5 if each.sigma == 0 else each.steps + 3  # the attack's, and those of clean and adversarial images
    cost = passes * images * (each.epochs if epochs is None else epochs)
    return train.plan(section, title, cost, architecture=section.architecture, training=each.config(), **more)
