"""Figures of section 6.2: the Pareto front, and which classes a universal perturbation leads to."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from satlib.study.claims import Model
from satlib.study.figures import BLUE
from satlib.study.figures.cifar10 import fronts_by_eps_uni


def figure4(
    models: Sequence[Model], reported: Sequence[tuple[float, float, str]], *, delta: float, dataset: str
) -> Figure:
    """Figure 4: robustness against clean accuracy, a step for each family's front; reported: as for Figure 3."""
    figure, axis = plt.subplots(figsize=(7.2, 5.2))
    fronts_by_eps_uni(axis, models, reported, delta=delta, paper="the paper, ImageNet with 200 classes")
    axis.margins(x=0.12, y=0.2)
    axis.set_ylim(bottom=0)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=10)
    figure.suptitle(f"Universal robustness against accuracy · {dataset}", fontsize=12)
    return figure


def dominant_labels(
    predictions: Mapping[str, Mapping[str, Any]], classes: Sequence[str], *, dataset: str, shown: int = 8
) -> Figure:
    """A.7: of the images that a universal perturbation fools, the share that each class is predicted for.

    predictions: metrics of a `predictions` record by the title of its model; the `shown` most frequent classes are
    named, what is left is one bar. The entropy of the whole distribution stands in the title of each panel.
    """
    figure, axes = plt.subplots(1, len(predictions), figsize=(4.2 * len(predictions), 3.6), squeeze=False, sharex=True)
    for axis, (title, found) in zip(axes[0], predictions.items(), strict=True):
        counts = np.array(found["counts"]["fooled"], dtype=float)
        bits = found["entropy_bits"]["fooled"]
        if bits is None:
            axis.set_title(f"{title}\nnothing is fooled", fontsize=9)
            axis.set_axis_off()
            continue
        order = np.argsort(-counts, kind="stable")[:shown]
        names = [classes[i] for i in order] + [f"{len(counts) - len(order)} others"]
        shares = np.append(counts[order], counts.sum() - counts[order].sum()) / counts.sum()
        axis.barh(names[::-1], 100 * shares[::-1], color=["0.75"] + [BLUE] * len(order))
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("share of fooled images (%)", fontsize=9)
        axis.set_title(f"{title}\n{bits:.2f} of {np.log2(len(counts)):.2f} bits", fontsize=9)
    figure.suptitle(
        f"Classes predicted under the universal perturbation, where it fools the model · {dataset}", fontsize=11
    )
    return figure
