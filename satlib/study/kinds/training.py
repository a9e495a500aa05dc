"""Trainings, and what an epoch of them costs."""

import copy
import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from satlib.defenses import DEFENSES
from satlib.parallel import current_ranks
from satlib.study.ledger import Workspace
from satlib.training import Training, class_iou, confusion, share_right, train

if TYPE_CHECKING:
    from satlib.study.runs import Run, Runner


def compute_train(runner: "Runner", run: "Run", work: Workspace) -> dict:
    """ERM or (shared) adversarial training; continues from its last finished epoch.

    With `until` in the settings it ends after so many of the epochs, and a run that has it as its parent `previous`
    goes on from there, as if it had never stopped: so that models can be looked at along the way (Figure 5).

    On several ranks, rank 0 says which run it computes to the others, in `followers.follow`, and all compute it alike;
    only rank 0 looks anything up, and the others get what it found.
    """
    splits, settings, ranks = runner.splits(run.dataset), Training.from_config(run.config["training"]), current_ranks()
    if ranks.rank == 0:
        ranks.broadcast_object(runner.spec(run).id)
    model, fitted = runner.initial_model(run) if ranks.rank == 0 else (runner.new_model(run), None)
    if fitted and (fitted.missing or fitted.other_shape or fitted.unused):
        runner.progress.line(f"[run] {run.title}: {fitted}")
    state, history, until = None, [], run.config.get("until", settings.epochs)
    if "previous" in run.parents and ranks.rank == 0:
        before = runner.record(run.parents["previous"], whole=True, also=("optimizer",))
        state = {f"model.{name}": value for name, value in before.tensors("weights").items()}
        state |= before.tensors("optimizer")
        history = before.metrics["history"]
    if checkpoint := work.load_checkpoint():
        state, info = checkpoint
        history = info["history"]
    began, fresh, last = time.monotonic(), len(history), state or {}

    adversary = None
    if defense := run.config.get("defense"):
        options = {name: value for name, value in defense.items() if name != "name"}
        adversary = DEFENSES[defense["name"]](
            splits.train, progress=lambda text: progress(text, fresh / settings.epochs), **options
        )

    def after_epoch(state: dict, history: list[dict]) -> None:
        nonlocal last
        last = state
        work.save_checkpoint(state, {"history": history})
        if len(history) < until:
            runner.check_budget((time.monotonic() - began) / (len(history) - fresh))

    def progress(text: str, done: float) -> None:
        runner.report(run, text, (done * settings.epochs - fresh) / (until - fresh), began)

    history = train(
        model,
        splits.train,
        settings,
        adversary=adversary,
        state=state,
        history=history,
        after_epoch=after_epoch,
        progress=progress,
        until=until,
    )
    work.save_tensors("weights", {name: value.cpu() for name, value in model.state_dict().items()})
    if until < settings.epochs:
        work.save_tensors("optimizer", {k: v for k, v in last.items() if not k.startswith("model.")})
    scores = {
        "": confusion(model, splits.test),
        "validation_": confusion(model, splits.val),
        "train_": confusion(model, splits.train.first(min(5000, len(splits.train)))),
    }
    metrics = {f"{split}accuracy": share_right(counts) for split, counts in scores.items()}
    if splits.test.labels.ndim > 1:
        each = {split: class_iou(counts) for split, counts in scores.items()}
        metrics |= {f"{split}mean_iou": iou.nanmean().item() for split, iou in each.items()}
        metrics["class_iou"] = [None if math.isnan(value) else value for value in each[""].tolist()]
    return metrics | {"test_images": len(splits.test), "history": history}


def compute_epoch_cost(runner: "Runner", run: "Run", work: Workspace) -> dict:
    """Seconds an epoch of each way of training takes here, one after the other on the same model.

    Measured on some of the images and scaled to all; what a baseline finds once for several epochs is shared out.
    """
    config, train_set = run.config, runner.splits(run.dataset).train
    base, some = runner.model(run.parents["model"]), min(config["images"], len(train_set))
    scale, began = len(train_set) / some, time.monotonic()
    settings = Training.from_config(config["training"])
    ways = [("ERM", replace(settings, sigma=0.0), None)]
    ways += [(f"s = {s}", replace(settings, sharedness=s), None) for s in config["sharedness"]]
    ways += [(name, settings, options) for name, options in config["defenses"].items()]
    seconds: dict[str, float] = {}
    for index, (name, each, options) in enumerate(ways):
        model, finding = copy.deepcopy(base), 0.0
        adversary = None
        if options is not None:
            epochs, crafted = options.get("epochs_each", 1), options.get("pool_size", 1)
            adversary = DEFENSES[name](train_set, **options | ({"pool_size": 1} if "pool_size" in options else {}))
            start = time.perf_counter()
            adversary.start_epoch(model, 0, torch.Generator().manual_seed(config["seed"]))
            _wait(runner.device)
            finding = (time.perf_counter() - start) * crafted / epochs
            adversary.start_epoch = lambda *_: None  # it has been found, and is not part of what follows
        train(model, train_set, replace(each, epochs=1, epoch_images=settings.batch_size), adversary=adversary)
        start = time.perf_counter()
        train(model, train_set, replace(each, epochs=1, epoch_images=some), adversary=adversary)
        _wait(runner.device)
        seconds[name] = (time.perf_counter() - start) * scale + finding
        runner.report(run, name, (index + 1) / len(ways), began)
    return {"seconds": seconds, "images": some, "scaled_to": len(train_set)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
