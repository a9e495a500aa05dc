"""Figures of section 6.1: the Pareto fronts, and what the universal perturbations look like."""

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from satlib.study.claims import Model, front
from satlib.study.figures import BY_FAMILY, ERM, REFERENCE, as_picture, panel_grid, perturbation_picture

OTHER = {"color": "tab:brown", "marker": "h"}  # a sharedness that the paper does not use


def figure3(
    models: Sequence[Model], reported: Sequence[tuple[float, float, str]], *, delta: float, eps: float, dataset: str
) -> Figure:
    """Figure 3: robustness against clean accuracy, by S-PGD (left) and by DeepFool perturbations of size eps (right).

    A step for each family's Pareto front, dominated models faint, seeds as error bars. reported: the paper's stated
    points (accuracy, eps_uni, what), drawn as crosses at the left. Models that no search could break are named there.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(13.0, 6.0))
    fronts_by_eps_uni(left, models, reported, delta=delta, paper="the paper, CIFAR10")
    draw_fronts(right, models, "deepfool")
    left.set_title("S-PGD")
    right.set(
        xlabel="accuracy on clean test images (%)",
        ylabel=f"accuracy under attack (%), $\\varepsilon$ = {eps:g} pixel units",
        title="DeepFool universal perturbations",
    )
    for axis in (left, right):
        axis.margins(x=0.08, y=0.12)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=10)
    figure.suptitle(
        f"Universal robustness against accuracy · {dataset}\nlabels: $\\varepsilon$, $\\sigma$ of training", fontsize=12
    )
    return figure


def fronts_by_eps_uni(
    axis: Axes, models: Sequence[Model], reported: Sequence[tuple[float, float, str]], *, delta: float, paper: str
) -> None:
    """eps_uni against accuracy, with the `reported` points (accuracy, eps_uni, what) of the paper as crosses."""
    draw_fronts(axis, models, "eps_uni")
    for accuracy, eps_uni, what in reported:
        axis.plot(accuracy, eps_uni, **REFERENCE)
        axis.annotate(
            what.replace(", ", ",\n"),
            (accuracy, eps_uni),
            xytext=(14, 7),
            textcoords="offset points",
            fontsize=8,
            color="0.35",
            ha="right",
        )
    if reported:
        axis.plot([], [], label=paper, **REFERENCE)
    axis.set(
        xlabel="accuracy on clean test images (%)",
        ylabel=rf"$\varepsilon_{{uni}}(\delta={delta:g})$ (pixel units of 255)",
    )
    if missing := [model.title for model in models if model.eps_uni is None]:
        axis.text(0.02, 0.02, f"> 255: {'; '.join(missing)}", transform=axis.transAxes, fontsize=8)


def draw_fronts(axis: Axes, models: Sequence[Model], measure: str) -> None:
    """Each family's models and its front; the front's models are named by eps and sigma."""
    for family in sorted({m.family for m in models}, key=[m.family for m in models].index):
        look = BY_FAMILY.get(family, OTHER)
        members = [m for m in models if m.family == family]
        best = front(members, measure)
        for model in (m for m in members if m.robustness(measure) is not None):
            place = next((i for i, (other, _) in enumerate(best) if model is other), None)
            on_front = place is not None
            axis.errorbar(
                model.accuracy,
                model.robustness(measure),
                xerr=model.spreads.get("accuracy"),
                yerr=model.spreads.get(measure),
                linestyle="none",
                capsize=3,
                markersize=15 if look is ERM else 8,
                alpha=1.0 if on_front else 0.3,
                **look,
            )
            if place is not None and model.eps is not None:
                text = f"{model.eps:g}" + (f", {model.sigma:g}" if model.sigma is not None else "")
                axis.annotate(
                    text,
                    (model.accuracy, model.robustness(measure)),
                    xytext=(6, -12 if place % 2 else 5),  # neighbours on a front get out of each other's way
                    textcoords="offset points",
                    fontsize=7.5,
                    color=look["color"],
                )
        if best:
            xs, ys = [m.accuracy for m, _ in best], [value for _, value in best]
            label = "ERM (undefended)" if family == "ERM" else family
            size = 12 if look is ERM else 7
            axis.plot(xs, ys, drawstyle="steps-pre", linewidth=1.4, markersize=size, label=label, **look)


def perturbation_gallery(rows: Sequence[dict], clean: np.ndarray, *, dataset: str) -> Figure:
    """A.4: the universal perturbation of each model at its eps_uni, alone and on test images.

    rows: for each model `title`, `eps_uni`, `perturbation` (C, H, W) in pixel units, and `predictions` (name, is it
    right) for every picture; clean: the pictures (n, C, H, W) in 0..255, undisturbed.
    """
    figure, axes = panel_grid(len(rows) + 1, len(clean) + 1, size=1.35)
    figure.set_size_inches(1.3 * (len(clean) + 1) + 1.9, 1.4 * (len(rows) + 1) + 0.4)
    axes[0, 0].text(0.5, 0.5, "clean", ha="center", va="center", fontsize=10)
    axes[0, 0].set_axis_off()
    for axis, image in zip(axes[0, 1:], clean, strict=True):
        axis.imshow(as_picture(image))
    for row, line in zip(rows, axes[1:], strict=True):
        line[0].imshow(perturbation_picture(row["perturbation"]))
        line[0].set_ylabel(
            f"{row['title']}\nε = {row['eps_uni']:.1f}", fontsize=9, rotation=0, ha="right", va="center", labelpad=6
        )
        for axis, image, (name, right) in zip(line[1:], clean, row["predictions"], strict=True):
            axis.imshow(as_picture(image + row["perturbation"]))
            axis.set_xlabel(name, fontsize=9, color="0.25" if right else "tab:red", labelpad=2)
    axes[1, 0].set_title("perturbation\n(contrast stretched)", fontsize=8)
    figure.suptitle(
        f"Universal perturbations at $\\varepsilon_{{uni}}$, and the predictions that they cause · {dataset}",
        fontsize=12,
    )
    return figure


def spectrum(perturbation: np.ndarray) -> np.ndarray:
    """Fourier magnitude (H, W) of a perturbation (C, H, W): mean over the channels, zero frequency in the middle."""
    return np.abs(np.fft.fftshift(np.fft.fft2(perturbation), axes=(-2, -1))).mean(0)


def energy_below(perturbation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(radii, share of the energy at or below each): radii in cycles a pixel, 0 to 0.5 times the square root of 2."""
    height, width = perturbation.shape[-2:]
    energy = (np.abs(np.fft.fft2(perturbation)) ** 2).sum(0)
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    order = np.argsort(radius, axis=None)
    return radius.ravel()[order], np.cumsum(energy.ravel()[order]) / energy.sum()


def spectra(perturbations: Mapping[str, np.ndarray], *, dataset: str) -> Figure:
    """Fourier magnitudes of universal perturbations, and how their energy is spread over frequencies.

    perturbations: (C, H, W) in pixel units, by the family of the model. Random signs are drawn for comparison.
    """
    shape = next(iter(perturbations.values())).shape
    random = np.sign(np.random.default_rng(0).standard_normal(shape))
    columns = len(perturbations)
    figure = plt.figure(figsize=(max(9.0, 1.9 * columns), 5.6))
    grid = figure.add_gridspec(2, columns, height_ratios=(1, 1.5))
    magnitudes = {title: np.log10(spectrum(xi / np.abs(xi).max()) + 1e-3) for title, xi in perturbations.items()}
    top, bottom = max(m.max() for m in magnitudes.values()), 0.0
    for column, (title, magnitude) in enumerate(magnitudes.items()):
        axis = figure.add_subplot(grid[0, column])
        extent = (-0.5, 0.5, -0.5, 0.5)
        picture = axis.imshow(magnitude, vmin=bottom, vmax=top, cmap="magma", extent=extent)
        axis.set(xticks=[-0.5, 0, 0.5], yticks=[-0.5, 0, 0.5] if not column else [])
        axis.tick_params(labelsize=7)
        axis.grid(False)
        axis.set_title(textwrap.fill(title, 18), fontsize=8.5)
    axis.figure.colorbar(picture, ax=figure.axes, location="right", shrink=0.8, label="log10 magnitude", pad=0.01)
    below = figure.add_subplot(grid[1, :])
    for title, xi in perturbations.items():
        color = BY_FAMILY.get(title, OTHER)["color"]
        below.plot(*energy_below(xi), label=title, linewidth=1.6, color=color)
    below.plot(*energy_below(random), color="0.3", linestyle=":", label="random signs")
    below.set(
        xlabel="spatial frequency (cycles a pixel)",
        ylabel="share of energy at or below",
        ylim=(0, 1.02),
        xlim=(0, 0.71),
    )
    below.legend(fontsize=8, loc="lower right")
    figure.suptitle(f"Spectra of the universal perturbations (axes in cycles a pixel) · {dataset}", fontsize=12)
    return figure
