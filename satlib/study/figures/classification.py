"""Figures of sections 6.1 and 6.2: Pareto fronts, universal perturbations, and the classes they lead to."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from satlib.study import figures
from satlib.study.claims import Model, front, size_text
from satlib.study.figures import ACCURACY, BLUE, REFERENCE, as_picture, finish, look, show_picture

Reported = Sequence[tuple[float, float, str]]  # the paper's stated points: accuracy, eps_uni, what


def figure3(models: Sequence[Model], reported: Reported, *, delta: float, eps: float, dataset: str) -> Figure:
    """Figure 3: robustness against clean accuracy: eps_uni by the ensemble and by the paper's S-PGD, and accuracy under
    DeepFool perturbations of size eps.

    A step for each family's Pareto front, dominated models faint, seeds as error bars; the reported points are crosses
    beside the paper's attack. Models that no search could break are named there.
    """
    figure, (*_, own, right), free = _draw_universal(models, reported, delta=delta, panels=1)
    named = _draw_fronts(right, models, "deepfool")
    right.set_title("DeepFool universal perturbations")
    right.set(xlabel=ACCURACY, ylabel=f"accuracy under attack (%), $\\varepsilon$ = {eps:g} pixel units")
    figures.name_points(right, named)
    return _finished(figure, own, free, dataset)


def figure4(models: Sequence[Model], reported: Reported, *, delta: float, dataset: str) -> Figure:
    """Figure 4: robustness against clean accuracy, as eps_uni in Figure 3."""
    figure, (*_, own), free = _draw_universal(models, reported, delta=delta)
    return _finished(figure, own, free, dataset)


def _finished(figure: Figure, own: Axes, free: Axes | None, dataset: str) -> Figure:
    """With a legend of what `own` shows: in a free panel if there is one, else below."""
    title = f"Universal robustness against accuracy · {dataset}\n"
    title += (
        "numbers: $\\varepsilon$, $\\sigma$ of training · pale: behind its kind's front · bars: standard deviations"
    )
    if free is None:
        return finish(figure, title, legend=own, ncols=2)
    free.legend(*own.get_legend_handles_labels(), loc="center", frameon=False, labelspacing=0.9)
    return finish(figure, title)


def success_curves(
    curves: Mapping[str, Mapping[float, float]], sizes: Mapping[str, float | None], *, delta: float, dataset: str
) -> Figure:
    """Success of the ensemble on unseen images against eps, for each model; a stroke on the line delta at its eps_uni.

    curves: % by eps in pixel units, by a model's title; sizes: eps_uni, None where nothing reached delta.
    """
    figure, axis = plt.subplots(figsize=(8.4, 4.8))
    for place, (title, curve) in enumerate(curves.items()):
        style = look(title) | {"linestyle": ("-", "--", ":")[[look(t) for t in curves][:place].count(look(title)) % 3]}
        axis.plot(list(curve), list(curve.values()), label=title, markersize=5, **style)
        if sizes[title] is not None:
            axis.plot(sizes[title], 100 * delta, marker="|", markersize=16, color=style["color"], markeredgewidth=2)
    axis.axhline(100 * delta, color="0.4", linestyle=":", linewidth=1.2, label=f"delta = {delta:g}")
    axis.set_xscale("log", base=2)
    figures.plain_ticks(axis.xaxis, sorted({eps for curve in curves.values() for eps in curve}))
    axis.set(xlabel=figures.EPS, ylabel="success on unseen images (%)", ylim=(0, 102))
    return finish(figure, f"Success of the strongest attacks against eps · {dataset}", legend=axis, ncols=3, fontsize=8)


def _draw_universal(
    models: Sequence[Model],
    reported: Reported,
    *,
    delta: float,
    panels: int = 0,
) -> tuple[Figure, list[Axes], Axes | None]:
    """eps_uni by the ensemble, where some model has it, and by the paper's attack, on one scale; then free `panels`.

    All of them are over the same accuracies, in a row or two; with them a panel that stays empty, if any.
    """
    both = any(m.strongest_searches for m in models)
    count = 1 + both + panels
    rows, across = (2, 2) if count == 3 else (1, count)
    size = (max(5.2 * across, 6.4), 4.3 * rows + 1.2)
    figure, drawn = plt.subplots(rows, across, figsize=size, squeeze=False, sharex=True)
    axes, free = list(drawn.flat[:count]), drawn[1, 1] if count == 3 else None
    if free:
        free.axis("off")
    own = axes[both]
    named = {}
    if both:
        asked = [m for m in models if m.strongest_searches]
        named[axes[0]] = _draw_eps_uni(axes[0], asked, "strongest", delta=delta)
        axes[0].set_title("the strongest attack found (ensemble)")
    named[own] = _draw_eps_uni(own, models, "eps_uni", delta=delta)
    own.set_title("the paper's attack (S-PGD)")
    for accuracy, eps_uni, what in reported:
        own.plot(accuracy, eps_uni, **REFERENCE)
        named[own].append((accuracy, eps_uni, what, "0.35"))
    if reported:
        own.plot([], [], label="the paper's own numbers", **REFERENCE)
    for axis in axes:
        axis.margins(0.08, 0.12)
        axis.tick_params(labelbottom=True)  # although they share it
    limits = 0, 1.04 * max(axis.get_ylim()[1] for axis in axes[: 1 + both])
    for axis in axes[: 1 + both]:
        axis.set_ylim(*limits)
    for axis, texts in named.items():
        figures.name_points(axis, texts)
    return figure, axes, free


def _draw_eps_uni(axis: Axes, models: Sequence[Model], measure: str, *, delta: float) -> list[figures.Named]:
    """eps_uni against accuracy, and who needs more than was searched."""
    named = _draw_fronts(axis, models, measure)
    axis.set(xlabel=ACCURACY, ylabel=figures.robustness_label("uni", delta))
    if unbroken := [model.title for model in models if getattr(model, measure) is None]:
        axis.text(0.02, 0.02, f"{size_text(None)}: {'; '.join(unbroken)}", transform=axis.transAxes, fontsize=8)
    return named


def _draw_fronts(axis: Axes, models: Sequence[Model], measure: str) -> list[figures.Named]:
    """Each family's models and its front. Returns what is to be written beside the models: eps and sigma."""
    named = []
    for family in dict.fromkeys(m.family for m in models):
        style, sizes = look(family), (15, 12) if family == "ERM" else (8, 7)
        members = [m for m in models if m.family == family and getattr(m, measure) is not None]
        best = front(members, measure)
        for model in members:
            x, y = model.accuracy, getattr(model, measure)
            place = next((i for i, (other, _) in enumerate(best) if model is other), None)
            spreads = {"xerr": model.spreads.get("accuracy"), "yerr": model.spreads.get(measure), "capsize": 3}
            faint = {"linestyle": "none", "markersize": sizes[0], "alpha": 0.3 if place is None else 1.0}
            axis.errorbar(x, y, **spreads, **faint, **style)
            if model.eps is not None:
                text = f"{model.eps:g}" + (f", {model.sigma:g}" if model.sigma is not None else "")
                named.append((x, y, text, style["color"]))
        if best:
            steps = {"drawstyle": "steps-pre", "linewidth": 1.4, "markersize": sizes[1]}
            accuracies, values = [m.accuracy for m, _ in best], [value for _, value in best]
            label = "ERM (undefended)" if family == "ERM" else family
            axis.plot(accuracies, values, label=label, **steps, **style)
    return named


def perturbation_gallery(rows: Sequence[dict], clean: np.ndarray, *, dataset: str) -> Figure:
    """A.4: the universal perturbation of each model at its eps_uni, alone and on test images.

    rows: for each model `title`, `eps_uni`, `perturbation` (C, H, W) in pixel units, and `predictions` (name, is it
    right) for every picture; clean: the pictures (n, C, H, W) in 0..255, undisturbed.
    """
    down, across = len(rows) + 1, len(clean) + 1
    figure, axes = figures.picture_panels(down, across, 1.3 * across + 1.9, 1.4 * down + 0.4)
    axes[0, 0].text(0.5, 0.5, "clean", ha="center", va="center", fontsize=10)
    for axis, image in zip(axes[0, 1:], clean, strict=True):
        show_picture(axis, as_picture(image))
    for row, line in zip(rows, axes[1:], strict=True):
        show_picture(line[0], figures.perturbation_picture(row["perturbation"]))
        figures.name_row(line[0], f"{row['title']}\nε = {row['eps_uni']:.1f}")
        for axis, image, (name, right) in zip(line[1:], clean, row["predictions"], strict=True):
            show_picture(axis, as_picture(image + row["perturbation"]), name, color="0.25" if right else "tab:red")
    axes[1, 0].set_title("perturbation\n(contrast stretched)", fontsize=8)
    title = f"Universal perturbations at $\\varepsilon_{{uni}}$, and the predictions that they cause · {dataset}"
    return finish(figure, title)


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
    random = np.sign(np.random.default_rng(0).standard_normal(next(iter(perturbations.values())).shape))
    figure = plt.figure(figsize=(max(9.0, 1.9 * len(perturbations)), 5.6))
    grid = figure.add_gridspec(2, len(perturbations), height_ratios=(1, 1.5))
    magnitudes = {title: np.log10(spectrum(xi / np.abs(xi).max()) + 1e-3) for title, xi in perturbations.items()}
    shown = {"vmin": 0.0, "vmax": max(m.max() for m in magnitudes.values()), "cmap": "magma"}
    for column, (title, magnitude) in enumerate(magnitudes.items()):
        axis = figure.add_subplot(grid[0, column])
        picture = axis.imshow(magnitude, extent=(-0.5, 0.5, -0.5, 0.5), **shown)
        axis.set(xticks=[-0.5, 0, 0.5], yticks=[-0.5, 0, 0.5] if not column else [])
        axis.tick_params(labelsize=7)
        axis.grid(False)
        axis.set_title(textwrap.fill(title, 18), fontsize=8.5)
    figure.colorbar(picture, ax=figure.axes, location="right", shrink=0.8, label="log10 magnitude", pad=0.01)
    below = figure.add_subplot(grid[1, :])
    for title, xi in perturbations.items():
        below.plot(*energy_below(xi), label=title, linewidth=1.6, color=look(title)["color"])
    below.plot(*energy_below(random), color="0.3", linestyle=":", label="random signs")
    below.set(xlim=(0, 0.71), ylim=(0, 1.02))
    below.set(xlabel="spatial frequency (cycles a pixel)", ylabel="share of energy at or below")
    below.legend(fontsize=8, loc="lower right")
    return finish(figure, f"Spectra of the universal perturbations (axes in cycles a pixel) · {dataset}")


def dominant_labels(
    predictions: Mapping[str, Mapping[str, Any]], classes: Sequence[str], *, dataset: str, shown: int = 8
) -> Figure:
    """A.7: of the images that a universal perturbation fools, the share that each class is predicted for.

    predictions: metrics of a `predictions` record by the title of its model; the `shown` most frequent classes are
    named, what is left is one bar. The entropy of the whole distribution stands in the title of each panel.
    """
    figure, axes = plt.subplots(1, len(predictions), figsize=(4.2 * len(predictions), 3.6), squeeze=False, sharex=True)
    for axis, (title, metrics) in zip(axes[0], predictions.items(), strict=True):
        counts = np.array(metrics["counts"]["fooled"], dtype=float)
        bits = metrics["entropy_bits"]["fooled"]
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
    title = f"Classes predicted under the universal perturbation, where it fools the model · {dataset}"
    return finish(figure, title, size=11)
