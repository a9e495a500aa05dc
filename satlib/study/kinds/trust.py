"""Whether the evaluations can be trusted: audits, and perturbations carried from model to model."""

import io
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from satlib import evaluation_checks as audit
from satlib.attacks import attackable, perturb, success_rates
from satlib.study.kinds.evaluation import perturbation_of
from satlib.study.ledger import Workspace

CRAFTED = 4096  # images to craft on, where they come from a large set

if TYPE_CHECKING:
    from satlib.study.runs import Run, Runner


def compute_audit(runner: "Runner", run: "Run", work: Workspace) -> dict:
    """The numbers of `satlib.evaluation_checks.measure` for a model, or for the same model behind a mask."""
    config, splits, began = run.config, runner.splits(run.dataset), time.monotonic()
    model = runner.model(run.parents["model"])
    if mask := config.get("mask"):
        model = audit.MASKS[mask](model)
    test, craft = splits.test.first(min(config["images"], len(splits.test))), splits.val
    if "sets" in config:  # the data set has few validation images, or may be too large to be held
        craft = getattr(splits, config["sets"]["craft"]).first(min(CRAFTED, len(splits.train)))

    def progress(text: str, done: float) -> None:
        runner.report(run, text, done, began)

    return audit.measure(
        model,
        craft=(craft.images[:], craft.labels),
        test=(test.images[:], test.labels),
        eps=config["eps"],
        epsilons=config["epsilons"],
        attack=config["attack"],
        image_steps=config["image_steps"],
        seed=config["seed"],
        progress=progress,
    )


def compute_transfer(runner: "Runner", run: "Run", work: Workspace) -> dict:
    """Error of every model under the universal perturbation of every other, at the size that its own search found.

    rates[i][j]: share of the test images that model j gets wrong under the perturbation of model i; None where the
    search of i found none. noise[i][j]: the same under random signs of the same size. clean[j]: without any. saved[j]:
    under its own, by what the perturbed images went through: see `after_saving`.
    """
    config, splits = run.config, runner.splits(run.dataset)
    test = splits.test.first(min(config["images"], len(splits.test)))
    count = sum(role.startswith("model") for role in run.parents)
    models = [run.parents[f"model {i}"] for i in range(count)]
    searches = [runner.record(run.parents[f"search {i}"], whole=True) for i in range(count)]
    found = [perturbation_of(search).to(runner.device) for search in searches]
    reached = [search.metrics["rate"] is not None for search in searches]
    generator = torch.Generator().manual_seed(config["seed"])
    signs = (torch.rand(found[0].shape, generator=generator) * 2 - 1).sign().to(runner.device)
    noise = [signs * xi.abs().max() for xi in found]
    stacked = torch.cat([*found, *noise, torch.zeros_like(signs)])
    columns, saved = [], []
    for model, xi in zip(models, found, strict=True):
        with attackable(runner.model(model)) as net:
            columns.append(success_rates(net, test.images, test.labels, stacked).tolist())
            forms = after_saving(perturb(test.images.float(), xi))
            none = torch.zeros_like(signs)
            rates = {name: success_rates(net, x, test.labels, none).item() for name, x in forms.items()}
            saved.append(rates)
    rows = list(zip(*columns, strict=True))
    return {
        "titles": [model.title for model in models],
        "eps": [xi.abs().max().item() for xi in found],
        "rates": [list(row) if known else None for row, known in zip(rows[:count], reached, strict=True)],
        "noise": [list(row) for row in rows[count : 2 * count]],
        "clean": list(rows[-1]),
        "saved": saved,
        "images": len(test),
    }


def after_saving(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Images (n, 3, H, W) in 0..255, real numbers, as they come back from a file: "exact" as they are, "8 bits" rounded
    as in a PNG, "JPEG" compressed at quality 90."""
    whole, compressed = images.round().to(torch.uint8), []
    for picture in whole.permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=90)
        compressed.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
    return {"exact": images, "8 bits": whole.float(), "JPEG": torch.stack(compressed).to(images.device).float()}
