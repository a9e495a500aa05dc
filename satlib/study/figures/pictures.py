"""Figures made of images: galleries of attacked images, and the paper's Figure 2."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from satlib.study import figures
from satlib.study.figures import as_picture, perturbation_picture
from satlib.study.records import Record


@dataclass(frozen=True)
class Row:
    """A row of a gallery: its name, pictures (H, W, C) uint8, a caption under each, and which captions are red."""

    name: str
    pictures: Sequence[np.ndarray]
    captions: Sequence[str] = ()
    wrong: Sequence[bool] = ()


def gallery(rows: Sequence[Row], *, title: str) -> Figure:
    """Rows of pictures, one column for each image; a red caption marks a wrong prediction."""
    columns = max(len(row.pictures) for row in rows)
    figure, axes = figures.picture_panels(len(rows), columns, 1.25 * columns + 1.9, 1.45 * len(rows) + 0.5)
    for row, line in zip(rows, axes, strict=True):
        figures.name_row(line[0], row.name, fontsize=10, labelpad=8)
        for axis in line[len(row.pictures) :]:
            axis.set_visible(False)
        for axis, picture, caption, wrong in itertools.zip_longest(line, row.pictures, row.captions, row.wrong):
            if picture is not None:
                figures.show_picture(axis, picture, caption, **_prediction_style(wrong))
    return figures.finish(figure, title)


def _prediction_style(wrong: bool | None) -> dict[str, str]:
    return {"color": figures.RED, "fontweight": "bold"} if wrong else {"color": "0.2", "fontweight": "normal"}


def two_attacks(record: Record) -> Figure:
    """The same images under perturbations of their own and under one for all (kind `gallery`)."""
    arrays, predictions, eps = record.arrays("gallery"), record.metrics["predictions"], record.settings["eps"]
    images = arrays["images"]

    def seen(name: str, pictures: np.ndarray, title: str) -> Row:
        wrong = [a != b for a, b in zip(predictions[name], record.metrics["labels"], strict=True)]
        return Row(title, [as_picture(picture) for picture in pictures], predictions[name], wrong)

    rows = [seen("clean", images, "image")]
    for name, title in (("own", "its own"), ("universal", "one for all")):
        xi = np.broadcast_to(arrays[name], images.shape)
        rows.append(Row(f"perturbation:\n{title}", [perturbation_picture(one, eps) for one in xi]))
        rows.append(seen(name, images + xi, "what the\nmodel sees"))
    title = f"Two attacks on the undefended model, eps = {eps:g} pixel units · {record.labels['dataset']}"
    return gallery(rows, title=title)


def shared_training(record: Record) -> Figure:
    """Figure 2 from the record of a real mini-batch (kind `heap_trace`): one lane for each heap, read left to right.

    It is drawn in inches, by hand, on one axis without a frame.
    """
    arrays, config, names = record.arrays("trace"), record.settings, record.metrics
    images, s, eps, steps = arrays["images"], config["sharedness"], config["eps"], config["steps"]
    d, heaps = len(images), len(arrays["perturbations"][0])
    alpha = config["relative_step_size"] * eps
    broadcast = np.repeat(arrays["perturbations"][-1], s, axis=0)[:d]
    across = math.ceil(math.sqrt(s))
    down = math.ceil(s / across)
    tile, pitch, arrow, left = 0.56, 0.60, 0.66, 0.62
    block, single, lane = across * pitch, 0.86, down * (pitch + 0.15) + 0.2
    widths = [block, block, single, single, block, block]
    starts = [left + sum(widths[:i]) + i * arrow for i in range(len(widths))]
    width, top = starts[-1] + block + 0.34, 0.7 + heaps * (lane + 0.14)
    figure = plt.figure(figsize=(width, top + 1.08))
    figure.set_layout_engine("none")  # not by argument: saving as PDF would then lay it out after all
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(0, top + 1.08))
    axis.axis("off")
    gradient = "$g_i=\\nabla_{\\xi}\\,L_{adv}(\\theta,\\,x_i+\\xi^{(k)},\\,y_i)$"
    headings = (
        ("mini-batch", f"$d$ = {d} images in\n$d/s$ = {heaps} heaps of $s$ = {s}"),
        ("gradients at $\\xi^{(k)}$", f"{gradient}\nhere for $k$ = 0"),
        ("one step", f"$\\alpha_k\\,\\mathrm{{sgn}}\\,\\sum_{{heap}} g_i$\n$\\alpha_k$ = {alpha:g}"),
        ("shared $\\xi$", f"$\\xi^{{(K)}}\\in[-\\varepsilon,\\varepsilon]$\n$\\varepsilon$ = {eps:g}"),
        ("broadcast", f"$d/s$ = {heaps} become\n$d$ = {d} perturbations"),
        ("adversarial images", "$x_i+\\xi$, clamped\nto [0, 255]"),
    )
    for x, extent, (name, formula) in zip(starts, widths, headings, strict=True):
        _text(axis, x + extent / 2, top + 0.56, name, fontsize=10.5, fontweight="bold")
        _text(axis, x + extent / 2, top + 0.22, formula, fontsize=8, color="0.25")
    operations = ("$\\nabla_{\\xi}$", "$\\sum$, sgn, $\\times\\alpha_k$", "add, clip", f"$\\times\\,{s}$", "$+\\,x_i$")
    for heap in range(heaps):
        color, members = figures.PALETTE[heap % len(figures.PALETTE)], range(heap * s, min((heap + 1) * s, d))
        base = top - 0.1 - (heap + 1) * (lane + 0.14) + 0.14
        middle = base + lane / 2
        style = {"boxstyle": "round,pad=0,rounding_size=0.1", "facecolor": (color, 0.10), "edgecolor": (color, 0.55)}
        axis.add_patch(FancyBboxPatch((0.12, base), width - 0.24, lane, **style))
        _text(axis, 0.34, middle, f"heap {heap + 1}", rotation=90, fontsize=10, color=color, fontweight="bold")
        for place, i in enumerate(members):
            dx, y = (place % across) * pitch, base + lane - 0.12 - (place // across) * (pitch + 0.15) - tile
            label, prediction = names["labels"][i], names["adversarial_predictions"][i]
            for column, picture in (
                (0, as_picture(images[i])),
                (1, perturbation_picture(arrays["gradients"][i])),
                (4, perturbation_picture(broadcast[i], eps)),
                (5, as_picture(arrays["adversarial"][i])),
            ):
                _picture(axis, starts[column] + dx, y, tile, picture)
            for column, name in ((0, label), (5, prediction)):
                below = _prediction_style(name != label)
                _text(axis, starts[column] + dx + tile / 2, y - 0.07, name, fontsize=6.5, **below)
        step = np.sign(arrays["gradients"][members].sum(0))
        _picture(axis, starts[2], middle - single / 2, single, perturbation_picture(step, 1.0))
        last = arrays["perturbations"][-1][heap]
        _picture(axis, starts[3], middle - single / 2, single, perturbation_picture(last, eps))
        for i, operation in enumerate(operations):
            _arrow(axis, (starts[i] + widths[i] + 0.04, middle), (starts[i + 1] - 0.08, middle))
            _text(axis, starts[i + 1] - arrow / 2 - 0.02, middle + 0.16, operation, fontsize=7)
    floor = top - 0.1 - heaps * (lane + 0.14) + 0.14
    start, end, below = starts[3] + single / 2, starts[1] + block / 2, floor - 0.34
    axis.plot([start, start, end], [floor - 0.04, below, below], color="0.25", linewidth=1.3, zorder=2)
    _arrow(axis, (end, below), (end, floor + 0.02), head=12)
    update = "$\\xi^{(k+1)}=\\mathrm{clip}(\\xi^{(k)}+\\mathrm{step},\\,-\\varepsilon,\\,\\varepsilon)$"
    _text(axis, (start + single / 2 + end + block / 2) / 2, floor - 0.5, f"$K$ = {steps} times: {update}", fontsize=9)
    objective = "then train on $\\sigma\\,L(\\theta,x+\\xi,y)+(1-\\sigma)\\,L(\\theta,x,y)$"
    _text(axis, width - 0.12, floor - 0.26, objective, fontsize=9, ha="right")
    _text(axis, 0.12, top + 0.92, f"Shared adversarial training · {record.labels['dataset']}", fontsize=12, ha="left")
    return figure


def _picture(axis: Axes, x: float, y: float, size: float, picture: np.ndarray) -> None:
    axis.imshow(picture, extent=(x, x + size, y, y + size), aspect="auto", zorder=3)


def _text(axis: Axes, x: float, y: float, text: str, **style: Any) -> None:
    axis.text(x, y, text, zorder=5, **{"ha": "center", "va": "center"} | style)


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], head: float = 10) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": head, "color": "0.25", "shrinkA": 0, "shrinkB": 0}
    axis.add_patch(FancyArrowPatch(start, end, **style))
