"""What the explorer shows: one figure for each panel, drawn in a fraction of a second and without pyplot, which is not
safe in the threads that answer."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from satlib.attacks import perturb
from satlib.study.claims import Model, front
from satlib.study.figures import BY_FAMILY, PALETTE, RED, as_picture, perturbation_picture
from satlib.study.figures.scenes import colour
from satlib.study.live import BATCH, Attacked, Shared

GREY = "0.35"


def _figure(height: float) -> Figure:
    """A figure whose axes are placed by hand: to lay them out takes longer than to draw them."""
    figure = Figure(figsize=(11.5, height), dpi=90)
    figure.set_layout_engine("none")  # not by argument: saving as PDF would then lay it out after all
    return figure


def _blank(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    axis = figure.add_axes((left, bottom, width, height))
    axis.axis("off")
    return axis


Caption = tuple[str, str]  # a text and its colour


def _strip(
    figure: Figure,
    box: tuple[float, float, float, float],
    pictures: Sequence[np.ndarray],
    below: Sequence[Caption] = (),
) -> None:
    """Pictures (H, W, C) side by side on one axis, for speed; below: a caption for each."""
    gap = max(2, pictures[0].shape[1] // 12)
    blank = np.full((pictures[0].shape[0], gap, 3), 255, np.uint8)
    row = [part for picture in pictures for part in (picture, blank)][:-1]
    axis = _blank(figure, *box)
    axis.imshow(np.concatenate(row, axis=1), interpolation="nearest", aspect="equal")
    axis.set_anchor("W")
    pitch = pictures[0].shape[1] + gap
    for place, (text, color) in enumerate(below):
        x = place * pitch + pictures[0].shape[1] / 2
        axis.annotate(
            text,
            (x, pictures[0].shape[0]),
            xytext=(0, -3),
            textcoords="offset points",
            va="top",
            ha="center",
            fontsize=8,
            color=color,
            annotation_clip=False,
        )


def attack_figure(answer: Attacked) -> Figure:
    """The perturbation, images without and with it and what is made of them, and success against eps."""
    question, subject = answer.question, answer.subject
    figure = _figure(3.9)
    xi = answer.xi.cpu().numpy()
    factor = 127.5 / question.eps if question.eps else 1.0
    own = "the first image's own" if question.own else "one for all images"
    axis = _blank(figure, 0.005, 0.16, 0.20, 0.60)
    axis.imshow(perturbation_picture(xi[0], question.eps or 1.0), interpolation="nearest")
    axis.set_title(f"perturbation, {own}\nshown {factor:.1f} times as strong", fontsize=9)
    clean, perturbed = (
        answer.images.cpu().numpy(),
        perturb(answer.images, answer.xi, 1 if question.own else None).cpu().numpy(),
    )
    classes = subject.splits.test.classes
    if subject.scenes:
        before, after = ([colour(s.cpu().numpy(), classes) for s in each] for each in (answer.clean, answer.perturbed))
        rows: list[tuple[str, list[np.ndarray], Sequence[Caption]]] = [
            ("clean, and what the model sees", [as_picture(clean[0]), before[0]], ()),
            ("perturbed, and what it sees", [as_picture(perturbed[0]), after[0]], ()),
        ]
    else:
        rows = [
            (name, [as_picture(x) for x in pictures], _named(predicted, confidence, answer.labels, classes))
            for name, pictures, predicted, confidence in (
                ("clean", clean, answer.clean, answer.confidence[0]),
                ("perturbed", perturbed, answer.perturbed, answer.confidence[1]),
            )
        ]
    for place, (name, pictures, below) in enumerate(rows):
        bottom = 0.53 - 0.45 * place
        _strip(figure, (0.235, bottom, 0.47, 0.33), pictures, below=below)
        figure.text(0.235, bottom + 0.34, name, fontsize=9, color=GREY)
    axis = figure.add_axes((0.765, 0.15, 0.225, 0.71))
    goal = "target hit" if question.target is not None else "wrong"
    what = "pixels of unseen scenes" if subject.scenes else "unseen images"
    if answer.curve:
        axis.plot(*np.array([(eps, 100 * rate) for eps, rate in answer.curve]).T, color=PALETTE[0], label="fewer steps")
    low, high = (100 * value for value in answer.interval)
    rate = 100 * answer.rate
    axis.errorbar(
        [question.eps],
        [rate],
        yerr=[[max(0.0, rate - low)], [max(0.0, high - rate)]],
        color=RED,
        marker="o",
        capsize=4,
        linestyle="none",
        label=f"this one: {rate:.0f} %",
    )
    axis.set(xlabel="eps (pixel units of 255)", ylabel=f"{goal}, {what} (%)", ylim=(-3, 103), xlim=(0, 68))
    axis.grid(alpha=0.4)
    axis.legend(loc="lower right", fontsize=8)
    figure.suptitle(f"{subject.title} · eps = {question.eps:g} pixel units, {answer.steps} steps", fontsize=11)
    return figure


def _named(predicted: Tensor, confidence: Tensor, labels: Tensor, classes: Sequence[str]) -> list[Caption]:
    return [
        (f"{classes[p]} {100 * c:.0f} %", GREY if p == y else RED)
        for p, c, y in zip(predicted.tolist(), confidence.tolist(), labels.tolist(), strict=True)
    ]


def shared_figure(answer: Shared) -> Figure:
    """The perturbations that heaps share, whom they fool, and the four risks in their order."""
    question, xi = answer.question, answer.xi.cpu().numpy()
    figure = _figure(4.0)
    shown = xi[:16]
    across = min(4, len(shown))
    tiles = [perturbation_picture(one, question.eps or 1.0) for one in shown]
    gap = max(1, tiles[0].shape[1] // 12)
    canvas = np.full(
        ((tiles[0].shape[0] + gap) * -(-len(tiles) // across) - gap, (tiles[0].shape[1] + gap) * across - gap, 3),
        255,
        np.uint8,
    )
    for place, tile in enumerate(tiles):
        y, x = (place // across) * (tile.shape[0] + gap), (place % across) * (tile.shape[1] + gap)
        canvas[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
    axis = _blank(figure, 0.01, 0.05, 0.29, 0.72)
    axis.imshow(canvas, interpolation="nearest")
    of = f", {len(shown)} of them" if len(shown) < len(xi) else ""
    axis.set_title(
        f"{len(xi)} heap{'s' if len(xi) > 1 else ''} of {question.sharedness} images share\na perturbation each{of}",
        fontsize=9,
    )
    axis = figure.add_axes((0.37, 0.14, 0.24, 0.63))
    names, values = ("no perturbation", "their own heap", "unseen images"), (answer.clean, answer.own, answer.unseen)
    axis.bar(names, [100 * value for value in values], color=("0.7", PALETTE[1], PALETTE[0]))
    for place, value in enumerate(values):
        axis.text(place, 100 * value + 1.5, f"{100 * value:.0f} %", ha="center", fontsize=9)
    axis.set(ylabel="wrong predictions (%)", ylim=(0, 108))
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title("whom the perturbations fool", fontsize=9)
    axis = figure.add_axes((0.70, 0.14, 0.29, 0.63))
    axis.bar(range(len(answer.risks)), [100 * value for value in answer.risks.values()], color=PALETTE[2])
    axis.set_xticks(range(len(answer.risks)), [name.replace(", ", "\n") for name in answer.risks], fontsize=8)
    axis.set(ylabel="0-1 risk (%)", ylim=(0, 108))
    axis.set_title(f"the four risks of these {BATCH} images", fontsize=9)
    figure.suptitle(
        f"{answer.subject.title} · s = {question.sharedness}, eps = {question.eps:g} pixel units, {answer.steps} steps",
        fontsize=11,
    )
    return figure


def trade_figure(
    models: Sequence[Model], chosen: Model, row: dict | None, pictures: np.ndarray | None, *, dataset: str
) -> Figure:
    """The models that were run in accuracy and eps_uni, the chosen one ringed; its perturbation, and what it does.

    row, pictures: the chosen model's row of `notebook.broken_by` and the images (n, C, H, W) in it, where known.
    """
    figure = _figure(4.4)
    axis = figure.add_axes((0.06, 0.13, 0.42, 0.72))
    for family in dict.fromkeys(m.family for m in models):
        look = BY_FAMILY.get(family, {"color": GREY, "marker": "."})
        each = [(m.accuracy, m.eps_uni) for m in models if m.family == family and m.eps_uni is not None]
        if each:
            axis.plot(*np.array(each).T, linestyle="none", markersize=7, label=family, **look)
    best = [(m.accuracy, value) for m, value in front(models)]
    if best:
        axis.plot(*np.array(best).T, color="0.6", linewidth=1, zorder=0, label="Pareto front")
    if chosen.eps_uni is not None:
        ring = {"markersize": 17, "markerfacecolor": "none", "markeredgecolor": RED, "markeredgewidth": 2}
        axis.plot(chosen.accuracy, chosen.eps_uni, marker="o", linestyle="none", label="chosen", **ring)
    axis.set(xlabel="clean accuracy (%)", ylabel="eps_uni(0.75) (pixel units of 255)")
    axis.grid(alpha=0.4)
    axis.legend(fontsize=7, loc="lower left")
    size = "> 255" if chosen.eps_uni is None else f"{chosen.eps_uni:.1f}"
    figure.suptitle(f"{chosen.title}: accuracy {chosen.accuracy:.1f} %, eps_uni {size} · {dataset}", fontsize=11)
    if row is None or pictures is None:
        figure.text(0.74, 0.5, "neither its perturbation nor its weights\nare here: only its numbers", ha="center")
        return figure
    xi = row["perturbation"]
    axis = _blank(figure, 0.52, 0.36, 0.14, 0.42)
    axis.imshow(perturbation_picture(xi), interpolation="nearest")
    axis.set_title(f"its perturbation,\nshown {127.5 / np.abs(xi).max():.1f} times as strong", fontsize=9)
    below = [(name, GREY if right else RED) for name, right in row["predictions"]]
    half = -(-len(below) // 2)
    for place in range(2):
        part = slice(place * half, (place + 1) * half)
        shown = [as_picture(x + xi) for x in pictures[part]]
        if shown:
            _strip(figure, (0.68, 0.48 - 0.40 * place, 0.31, 0.32), shown, below=below[part])
    return figure
