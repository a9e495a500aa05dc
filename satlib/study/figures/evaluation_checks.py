"""Figures of notebook 09: audits, bounds by stronger attacks, transfer."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from satlib.study.claims.evaluation_checks import Searches, Seeds
from satlib.study.figures import EPS, finish, height_of, look, plain_ticks
from satlib.study.records import Record


def audit(measured: Mapping[str, Mapping[str, Any]], *, dataset: str) -> Figure:
    """Success of universal perturbations against eps, and at one eps beside what it has to beat and what beats it.

    measured: what `satlib.evaluation_checks.measure` returned, by a model's title.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(13.0, 4.8), width_ratios=(2, 3))
    for title, numbers in measured.items():
        points = [(point["eps"], 100 * point["rate"]) for point in numbers["curve"]]
        left.plot(*zip(*points, strict=True), label=title, **look(title))
    first = next(iter(measured.values()))
    left.axhline(100 * (1 - 1 / first["classes"]), color="0.4", linestyle=":", linewidth=1.2, label="chance")
    left.set(xscale="log", xlabel=EPS, ylabel="error on test images (%)", ylim=(0, 102))
    asked = [tuple(point["eps"] for point in numbers["curve"]) for numbers in measured.values()]
    plain_ticks(left.xaxis, asked[0] if len(set(asked)) == 1 else LogLocator(2))
    bars = {
        "clean": lambda n: n["clean"],
        "uniform\nnoise": lambda n: n["noise"]["uniform"],
        "sign\nnoise": lambda n: n["noise"]["sign"],
        "smooth\nnoise": lambda n: n["noise"]["low-frequency"],
        "universal,\none step": lambda n: n["universal, one step"],
        "universal": lambda n: n["universal"],
        "best\nstronger": lambda n: max(n["stronger"].values()),
        "best\nother loss": lambda n: max(n["other losses"].values()),
        f"shared\ns = {first['sharedness']}": lambda n: n["shared"],
        "image-\ndependent": lambda n: n["image-dependent"],
    }
    width = 0.8 / len(measured)
    for place, (title, numbers) in enumerate(measured.items()):
        at = np.arange(len(bars)) + (place - (len(measured) - 1) / 2) * width
        heights = [100 * of(numbers) for of in bars.values()]
        right.bar(at, heights, width=width, color=look(title)["color"], label=title)
    right.set_xticks(range(len(bars)), list(bars), fontsize=8)
    sizes = {numbers["eps"] for numbers in measured.values()}
    at = f"eps = {first['eps']:g}" if len(sizes) == 1 else "each model's own eps_uni"
    right.set(ylabel=f"error on test images at {at} (%)", ylim=(0, 102))
    right.grid(axis="x", visible=False)
    return finish(figure, f"Is the attack sound? · {dataset}", legend=left)


def bounds(searches: Searches, seeds: Seeds, *, delta: float, dataset: str) -> Figure:
    """eps_uni of each model by each attack, and by the paper's from several seeds; what none reached stands at 255.

    searches: records by model and attack; seeds: eps_uni of the paper's attack by model.
    """
    attacks = list(next(iter(searches.values())))
    figure, axis = plt.subplots(figsize=(max(8.0, 1.1 * len(attacks) + 2), 4.8))
    for model, by_attack in searches.items():
        values = [height_of(by_attack[attack].metrics["eps_uni"]) for attack in attacks]
        axis.plot(range(len(attacks)), values, linestyle="none", markersize=8, label=model, **look(model))
        if known := [height_of(eps) for eps in seeds.get(model, ())]:
            axis.axhspan(min(known), max(known), color=look(model)["color"], alpha=0.18, linewidth=0)
    axis.set_xticks(range(len(attacks)), [name.replace(" ", "\n") for name in attacks], fontsize=8)
    axis.set(ylabel=f"$\\varepsilon_{{uni}}({delta:g})$ (pixel units of 255)", ylim=(0, None))
    return finish(figure, f"The bound by stronger attacks; bands: the paper's over seeds · {dataset}", legend=axis)


def lowered(
    strongest: Mapping[str, Sequence[Record]], paper: Mapping[str, Sequence[Record]], *, delta: float, dataset: str
) -> Figure:
    """eps_uni of each model by the paper's attack (hollow) and by the ensemble (filled), a point for each search.

    strongest, paper: records of searches by a model's title.
    """
    strongest = {title: searches for title, searches in strongest.items() if searches and paper[title]}
    figure, axis = plt.subplots(figsize=(8.6, 0.55 * len(strongest) + 2.2))
    for place, (title, searches) in enumerate(strongest.items()):
        style = {"linestyle": "none", "markersize": 8, "markeredgewidth": 1.3} | look(title)
        for records, filled in ((paper[title], {"markerfacecolor": "none"}), (searches, {})):
            sizes = [height_of(record.metrics["eps_uni"]) for record in records]
            axis.plot(sizes, [place] * len(sizes), **style | filled)
        ends = [np.mean([height_of(r.metrics["eps_uni"]) for r in each]) for each in (searches, paper[title])]
        axis.plot(ends, [place] * 2, color=style["color"], linewidth=1, alpha=0.5, zorder=0)
    axis.set_yticks(range(len(strongest)), list(strongest), fontsize=9)
    axis.invert_yaxis()
    axis.set(xlabel=f"$\\varepsilon_{{uni}}({delta:g})$ (pixel units of 255)", xlim=(0, None))
    common = {"color": "0.3", "marker": "o", "linestyle": "none", "markersize": 8, "markeredgewidth": 1.3}
    named = (("the ensemble", {}), ("the paper's attack", {"markerfacecolor": "none"}))
    legend = [plt.Line2D([], [], label=label, **common | filled) for label, filled in named]
    return finish(figure, f"The smallest pattern that each search found · {dataset}", legend=legend)


def transfer(metrics: Mapping[str, Any], *, dataset: str) -> Figure:
    """Error of each model (columns) under the universal perturbation of each (rows), in %, on a heat map.

    metrics: those of a `transfer` record.
    """
    titles = [title.replace(", ", "\n") for title in metrics["titles"]]
    rows = [f"{title}\n($\\varepsilon$ = {eps:.1f})" for title, eps in zip(titles, metrics["eps"], strict=True)]
    table = 100 * np.array([row or [np.nan] * len(titles) for row in (*metrics["rates"], metrics["clean"])])
    figure, axis = plt.subplots(figsize=(1.5 * len(titles) + 3.0, 0.9 * len(table) + 2.2))
    image = axis.imshow(table, vmin=0, vmax=100, cmap="viridis")
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            text = "–" if np.isnan(value) else f"{value:.0f}"
            axis.text(j, i, text, ha="center", va="center", color="white" if value < 55 else "black", fontsize=10)
    axis.set_xticks(range(len(titles)), titles, fontsize=8)
    axis.set_yticks(range(len(table)), [*rows, "clean"], fontsize=8)
    axis.set(xlabel="model that is attacked", ylabel="model that the perturbation was crafted on")
    axis.grid(False)
    figure.colorbar(image, label="error on test images (%)")
    return finish(figure, f"Transfer · {dataset}", size=11)
