"""The card of a network that nobody here trained, on real images: notebook 11."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from satlib import zoo
from satlib.card import Card, Examples
from satlib.data import Splits, imagenet
from satlib.errors import SatlibError
from satlib.evaluation import evaluate
from satlib.study.measurement import Run, measurement
from satlib.study.records import Record, Workspace


@measurement(version=1, artefacts=("perturbation", "examples"))
def card(
    data: Splits,
    work: Workspace,
    progress: Any,
    *,
    network: str,
    images: int,
    size: int = 224,
    epsilons: list | tuple = (10.0, 20.0),
    seeds: int = 3,
    effort: float = 1.0,
    seed: int = 0,
) -> dict:
    """The numbers of `satlib.evaluate` for a network of `satlib.zoo` that decides among the classes of the data.

    images: so many of the test images, drawn at random by `seed` and scaled to size x size pixels.
    """
    wnids = {name: wnid for wnid, name in imagenet.names().items()}
    classes = [imagenet.indices()[wnids[name]] for name in data.test.classes]
    chosen = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(seed))[:images]
    part = data.test.subset(chosen.sort().values)
    x = F.interpolate(part.images[:].float(), size=(size, size), mode="bilinear", antialias=True)
    found = evaluate(
        zoo.pretrained(network, classes).to(data.test.device),
        x.round().clamp(0, 255).to(torch.uint8),
        part.labels,
        class_names=part.classes,
        name=network,
        epsilons=epsilons,
        seeds=seeds,
        effort=effort,
        seed=seed,
        progress=progress,
    )
    if found.perturbation is None or found.examples is None:
        raise SatlibError(f"{network}: {found.verdict} There is no perturbation to keep")
    work.save_arrays("perturbation", {"perturbation": found.perturbation})
    work.save_arrays("examples", {name: np.array(value) for name, value in vars(found.examples).items()})
    return found.numbers()


def card_run(network: str, dataset: str, **settings: Any) -> Run:
    """The card of a network of `satlib.zoo` on a data set; settings: those of `card`."""
    return card.plan(None, f"card of {network}", dataset=dataset, section="11", network=network, **settings)


def card_of(record: Record) -> Card:
    """The card that a record holds."""
    perturbation, examples = record.arrays("perturbation")["perturbation"], record.arrays("examples")
    return Card.of_numbers(record.metrics, perturbation=perturbation, examples=Examples.of(examples))
