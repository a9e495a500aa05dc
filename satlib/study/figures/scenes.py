"""Figures of sections 6.3 and 6.4, and Figure 1: segmentations, and the perturbations that change them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from satlib.robustness import LARGEST
from satlib.study import figures
from satlib.study.claims import size_text
from satlib.study.claims.scenes import SceneModel
from satlib.study.figures import BLUE, EPS, RED, REFERENCE, as_picture, finish, height_of, look

_SEEN = (  # the colours of Cityscapes' own pictures, and what is drawn in each
    "#804080 road, #f423e8 sidewalk, #f423e8 pavement, #464646 building, #66669c wall, #be9999 fence, #999999 pole,"
    " #faaa1e traffic light, #dcdc00 traffic sign, #dcdc00 sign symbol, #dcdc00 sign, #6b8e23 vegetation, #6b8e23 tree,"
    " #98fb98 terrain, #4682b4 sky, #dc143c person, #dc143c pedestrian, #ff0000 rider, #ff0000 bicyclist, #00008e car,"
    " #000046 truck, #003c64 bus, #005064 train, #0000e6 motorcycle, #770b20 bicycle"
)
COLOURS = {name: color for color, _, name in (each.partition(" ") for each in _SEEN.split(", "))}
UNKNOWN = "white"
MODELS = {"erm": "ERM", "s1": "s = 1", "s5": "s = 5"}  # by their place in the keys of the paper's numbers
HOLLOW = {"markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.5, "linestyle": "none"}
PLUS = {"marker": "P", "markersize": 9, "linestyle": "none"}
SMALL = {"textcoords": "offset points", "fontsize": 8, "color": "0.35"}


def colour(labels: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """A segmentation (H, W) as a picture (H, W, 3) uint8; what has no class is black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(classes)] = np.rint(255 * to_rgba_array([COLOURS.get(name, UNKNOWN) for name in classes])[:, :3])
    return table[labels.astype(np.uint8)]


def figure5(models: Sequence[SceneModel], reported: Mapping[str, float], *, delta: float, dataset: str) -> Figure:
    """Figure 5: mean IoU (left), eps_adv (middle) and eps_uni (right) along the training of each defence.

    The undefended model is a dashed line, untargeted results stand by themselves at the last epoch, and so do those of
    the ensemble, as pluses; what nothing reached stands on a dotted line at 255. reported: the paper's numbers by their
    keys, crosses beside the last epoch.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13.0, 4.6))
    last = max((each.epoch for m in models if m.family != "ERM" for each in m.curve), default=1)
    uni = [f"{model}/eps_uni_targeted" for model in MODELS]
    panels = (  # what a model has to draw, the same without a target, the paper's numbers, and the words for it
        ("iou", "", ["erm/iou"], "mean IoU on clean test scenes (%)", "clean images"),
        (
            "eps_adv",
            "untargeted_adv",
            ["s1/eps_adv", "s5/eps_adv"],
            figures.robustness_label("adv", delta),
            "image-dependent",
        ),
        ("eps_uni", "untargeted", uni, figures.robustness_label("uni", delta), "universal"),
    )
    for axis, (name, untargeted, paper, label, title) in zip(axes, panels, strict=True):
        drawn = [getattr(each, name) for m in models for each in m.curve]
        for m in models:
            if m.family == "ERM":
                level = height_of(getattr(m, name))
                axis.axhline(level, color="black", linestyle="--", linewidth=1.2, label="ERM (undefended)")
            else:
                style = look(m.family) | {"capsize": 3, "linewidth": 1.5, "markersize": 6}
                spread = [each.error or 0.0 for each in m.curve] if name == "eps_adv" else None
                xs, ys = [each.epoch for each in m.curve], [getattr(each, name) for each in m.curve]
                axis.errorbar(xs, [math.nan if y is None else y for y in ys], yerr=spread, label=m.title, **style)
                beyond = [x for x, y in zip(xs, ys, strict=True) if y is None]  # joined to nothing: nobody knows where
                axis.plot(beyond, [LARGEST] * len(beyond), **look(m.family), linestyle="none", markersize=6)
            if untargeted:
                drawn.append(getattr(m, untargeted))
                place = 1.06 * last if m.family != "ERM" else 1.11 * last
                axis.plot(place, height_of(drawn[-1]), **look(m.family), **HOLLOW)
            if name == "eps_uni":
                for each, filled in ((m.ensemble, {}), (m.untargeted_ensemble, {"markerfacecolor": "none"})):
                    if each:
                        drawn.append(each.size)
                        axis.plot(place, height_of(each.size), **look(m.family) | PLUS | filled)
        if None in drawn:
            axis.axhline(LARGEST, color="0.6", linestyle=":", linewidth=1.0)
            axis.annotate(f"{size_text(None)}: never reached", (0.02 * last, LARGEST), xytext=(0, 3), **SMALL)
        for key in paper:
            point = (1.16 * last, reported[f"cityscapes/{key}"])
            axis.plot(*point, **REFERENCE)
            axis.annotate(MODELS[key.partition("/")[0]], point, xytext=(-6, -3), ha="right", **SMALL)
        axis.set(xlabel="epoch of fine-tuning", ylabel=label, title=title, xlim=(0, 1.2 * last))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylim(bottom=0)
    lines, _ = axes[2].get_legend_handles_labels()
    hollow = plt.Line2D([], [], color="0.3", marker="o", label="without a target, at the end", **HOLLOW)
    pluses = plt.Line2D([], [], color="0.3", label="ensemble (hollow: untargeted)", **PLUS)
    crosses = plt.Line2D([], [], label="the paper (Cityscapes, delta = 0.95)", **REFERENCE)
    both = [hollow, pluses] if any(m.ensemble for m in models) else [hollow]
    title = f"Robustness along the training; filled marks and lines: towards the target scene · {dataset}"
    return finish(figure, title, legend=[*lines, *both, crosses], ncols=5)


def segmentations(
    rows: Sequence[Mapping[str, Any]], classes: Sequence[str], *, title: str, columns: Sequence[str]
) -> Figure:
    """Rows of pictures and segmentations, with a legend of the classes that are seen.

    rows: `title`, and `panels`: for each column (kind, array), kind "picture" (C, H, W) in 0..255, "perturbation"
    (C, H, W) in pixel units, "labels" (H, W), or None for an empty one; and `captions` for them, where there are any.
    """
    height, breadth = next(panel for row in rows for panel in row["panels"] if panel)[1].shape[-2:]
    row_height = 2.5 * height / breadth + (0.3 if any(row.get("captions") for row in rows) else 0.1)
    width = 2.5 * len(columns) + 1.2
    figure, axes = figures.picture_panels(len(rows), len(columns), width, row_height * len(rows) + 1.1)
    drawn: dict[str, Any] = {"picture": as_picture, "perturbation": figures.perturbation_picture}
    drawn["labels"] = partial(colour, classes=classes)
    seen: set[int] = set()
    for row, line in zip(rows, axes, strict=True):
        for column, (axis, panel) in enumerate(zip(line, row["panels"], strict=True)):
            if panel:
                kind, array = panel
                seen |= set(array.flat) if kind == "labels" else set()
                figures.show_picture(axis, drawn[kind](array), row.get("captions", {}).get(column, ""), fontsize=8)
        figures.name_row(line[0], row["title"].replace(", ", "\n"))
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name, fontsize=9)
    shown = [classes[i] for i in sorted(seen) if i < len(classes)]
    legend = [Patch(color=COLOURS.get(name, UNKNOWN), label=name) for name in shown]
    ncols = min(len(legend), int(width / 1.1))
    return finish(figure, title, legend=legend, ncols=ncols, fontsize=8, size=11 if width > 7 else 9)


def structure(measured: Mapping[str, Mapping[str, Any]], *, dataset: str) -> Figure:
    """How far perturbations weaken the edges of their image, and how far they add those of the target (section 6.4).

    measured: metrics of `perturbation_structure` by a model's title. Every dot is a test scene, bars are means.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11.0, 4.2))
    labels = {
        "weakening": "weakens the edges of the image\n(minus cosine of both gradients)",
        "target_structure": "has its edges on the target's boundaries\n(correlation)",
    }
    random = np.random.default_rng(0)
    for axis, (name, label) in zip(axes, labels.items(), strict=True):
        for place, metrics in enumerate(measured.values()):
            for middle, kind, hue in ((place - 0.2, "own", RED), (place + 0.2, "universal", BLUE)):
                values = np.asarray(metrics[kind][name])
                axis.bar(middle, values.mean(), width=0.36, color=hue, alpha=0.45)
                jitter = random.uniform(-0.1, 0.1, len(values))
                axis.plot(middle + jitter, values, linestyle="none", marker="o", markersize=3.5, color=hue)
            axis.axhline(0, color="0.3", linewidth=0.8)
        axis.set_xticks(range(len(measured)), [title.replace(", ", "\n") for title in measured], fontsize=9)
        axis.set_ylabel(label)
        axis.grid(axis="x", visible=False)
    legend = [Patch(color=RED, alpha=0.6, label="image-dependent"), Patch(color=BLUE, alpha=0.6, label="universal")]
    eps = next(iter(measured.values()))["eps"]
    title = f"What perturbations of eps = {eps:g} do, each dot a test scene · {dataset}"
    return finish(figure, title, legend=legend, ncols=2)


def hiding(scores: Sequence[tuple[SceneModel, Sequence[Mapping[str, Any]]]], *, hide: str, dataset: str) -> Figure:
    """The dynamic target: how much of the hidden class is gone, and how much of the rest stays, against eps.

    scores: models, each with those of its `hiding` record.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11.0, 4.2), sharex=True)
    labels = {"hidden": f"pixels of {hide!r} that are gone (%)", "kept": "other pixels that stay as they were (%)"}
    for axis, (measure, label) in zip(axes, labels.items(), strict=True):
        for model, by_eps in scores:
            shares = [np.nan if score[measure] is None else 100 * score[measure] for score in by_eps]
            axis.plot([score["eps"] for score in by_eps], shares, label=model.title, **look(model.family))
        axis.set(ylim=(0, 102), xlabel=EPS, ylabel=label)
    return finish(figure, f"One perturbation that is to hide every {hide} · {dataset}", legend=axes[0])


@dataclass(frozen=True)
class Fooled:
    """What a model makes of an image under a universal perturbation: `seen` is a class's name, or a segmentation.

    clean (C, H, W) in 0..255, xi (C, H, W) in pixel units; words: how large it is, and how far it got.
    """

    title: str
    clean: np.ndarray
    xi: np.ndarray
    words: str
    seen: str | np.ndarray


def figure1(
    classified: Sequence[Fooled], segmented: Sequence[Fooled], classes: Sequence[str], *, datasets: tuple[str, str]
) -> Figure:
    """Figure 1: universal perturbations of undefended and defended models, in classification and in segmentation.

    A row for each of the two: the image, then for each model the image with its perturbation and what is seen.
    """
    columns = 1 + max(len(classified), 2 * len(segmented))
    figure, axes = figures.picture_panels(2, columns, 2.6 * columns, 5.4)
    for line, rows, dataset in zip(axes, (classified, segmented), datasets, strict=True):
        free = iter(line)
        line[0].set_ylabel(dataset, fontsize=9)
        figures.show_picture(next(free), as_picture(rows[0].clean), "clean", labelpad=4)
        for row in rows:
            axis, named = next(free), isinstance(row.seen, str)
            axis.set_title(f"{row.title}\n{row.words}", fontsize=8)
            figures.show_picture(
                axis, as_picture(row.clean + row.xi), f"taken for: {row.seen}" if named else "", labelpad=4
            )
            if not named:
                figures.show_picture(next(free), colour(row.seen, classes), "what is seen", labelpad=4)
        for axis in free:
            axis.set_visible(False)
    return finish(figure, "The universal perturbations that it takes: undefended against defended", size=11)
