"""Figures of section 6.1: the Pareto plot, and what the universal perturbations look like."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from satlib.figures import BY_SHAREDNESS, ERM, REFERENCE, as_picture, panel_grid, perturbation_picture
from satlib.results import Model

_LABEL_OFFSET = {1: 10, 8: -20, 64: 10}  # points; s = 8 below its marker, since it often lies close to s = 64


def _legend_order(label: str) -> tuple[bool, int]:
    """The undefended model first, then by sharedness, the paper's own numbers last."""
    digits = label.removeprefix("s = ")
    return (not digits.isdigit() and "paper" in label, int(digits) if digits.isdigit() else 0)


def look(model: Model) -> dict:
    """Colour and marker of a model: by its sharedness, the undefended one apart."""
    return (
        ERM if model.sharedness is None else BY_SHAREDNESS.get(model.sharedness, {"color": "tab:gray", "marker": "v"})
    )


def robustness_against_accuracy(
    models: Sequence[Model], reported: Sequence[tuple[float, float, str]], *, dataset: str
) -> Figure:
    """Figure 3 (left): eps_uni(0.75) in pixel units against clean accuracy in %, a point for each model.

    reported: the paper's stated points (accuracy, eps_uni, what), drawn as reference marks. A model for which no
    search succeeded is left out and named below the plot.
    """
    figure, axis = plt.subplots(figsize=(8.2, 4.8))
    seen = set()
    for model in models:
        if model.eps_uni is None:
            continue
        label = "ERM (undefended)" if model.sharedness is None else f"s = {model.sharedness}"
        axis.errorbar(
            model.accuracy,
            model.eps_uni,
            yerr=model.spread,
            label=None if label in seen else label,
            linestyle="none",
            markersize=15 if model.sharedness is None else 9,
            capsize=3,
            **look(model),
        )
        seen.add(label)
        if model.sharedness is not None:
            axis.annotate(
                f"ε={model.eps:g}, σ={model.sigma:g}",
                (model.accuracy, model.eps_uni),
                xytext=(0, _LABEL_OFFSET.get(model.sharedness, 10)),
                textcoords="offset points",
                fontsize="small",
                ha="center",
            )
    for accuracy, eps_uni, what in reported:
        axis.plot(accuracy, eps_uni, **REFERENCE)
        axis.annotate(
            what,
            (accuracy, eps_uni),
            xytext=(0, -14),
            textcoords="offset points",
            fontsize="x-small",
            color="0.35",
            ha="center",
        )
    if reported:
        axis.plot([], [], label="the paper, CIFAR10", **REFERENCE)
    axis.set(
        xlabel="accuracy on clean test images (%)",
        ylabel=r"$\varepsilon_{uni}(\delta=0.75)$ (pixel units of 255)",
        title=f"Universal robustness against accuracy · {dataset}",
    )
    axis.margins(x=0.15, y=0.15)
    axis.set_ylim(bottom=0)
    handles, labels = axis.get_legend_handles_labels()
    in_order = sorted(zip(labels, handles, strict=True), key=lambda pair: _legend_order(pair[0]))
    axis.legend([handle for _, handle in in_order], [label for label, _ in in_order], loc="lower left")
    if missing := [model.title for model in models if model.eps_uni is None]:
        figure.supxlabel(f"no universal perturbation up to 255 succeeded for: {'; '.join(missing)}", fontsize="small")
    return figure


def perturbation_gallery(rows: Sequence[dict], clean: np.ndarray, *, dataset: str) -> Figure:
    """The universal perturbation of each model at its eps_uni, alone and on test images.

    rows: for each model `title`, `eps_uni`, `perturbation` (C, H, W) in pixel units, `clean` (accuracy in %) and
    `predictions` (name, is it right) for every picture; clean: the pictures (n, C, H, W) in 0..255, undisturbed.
    """
    figure, axes = panel_grid(len(rows) + 1, len(clean) + 1, size=1.25)
    axes[0, 0].text(0.5, 0.5, "clean", ha="center", va="center", fontsize="medium")
    axes[0, 0].set_axis_off()
    for axis, image in zip(axes[0, 1:], clean, strict=True):
        axis.imshow(as_picture(image))
    for row, line in zip(rows, axes[1:], strict=True):
        line[0].imshow(perturbation_picture(row["perturbation"]))
        line[0].set_ylabel(
            f"{row['title']}\nε = {row['eps_uni']:.1f}", fontsize="x-small", rotation=0, ha="right", va="center"
        )
        for axis, image, (name, right) in zip(line[1:], clean, row["predictions"], strict=True):
            axis.imshow(as_picture(image + row["perturbation"]))
            axis.set_xlabel(name, fontsize="x-small", color="0.25" if right else "tab:red", labelpad=2)
    axes[1, 0].set_title("perturbation\n(contrast stretched)", fontsize="x-small")
    figure.suptitle(
        f"Universal perturbations at $\\varepsilon_{{uni}}(0.75)$, and the predictions that they cause · {dataset}",
        fontsize="medium",
    )
    return figure
