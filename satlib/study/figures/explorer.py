"""What the explorer shows: one figure for each panel, drawn in a fraction of a second and without pyplot, which is not
safe in the threads that answer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from satlib.study.claims import Model, front, size_text
from satlib.study.figures import EPS, PALETTE, RED, as_picture, look, perturbation_picture
from satlib.study.figures.scenes import colour
from satlib.study.live import Attacked, Shared, interval

GREY = "0.35"
Box = tuple[float, float, float, float]  # left, bottom, width and height, in shares of the figure
Caption = tuple[str, str]  # a text and its colour


def _figure(height: float) -> Figure:
    """A figure whose axes are placed by hand: to lay them out takes longer than to draw them."""
    figure = Figure(figsize=(11.5, height), dpi=90)
    figure.set_layout_engine("none")  # not by argument: saving as PDF would then lay it out after all
    return figure


def _titled(figure: Figure, title: str) -> Figure:
    """With a title that may hold anybody's name: it is no formula."""
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def _pictures(figure: Figure, box: Box, pictures: Sequence[np.ndarray], across: int = 1, *, title: str = "") -> Axes:
    """Pictures (H, W, C), `across` of them side by side, as one image on one axis: that is fast."""
    height, width, channels = pictures[0].shape
    gap = max(2, width // 12)
    down = -(-len(pictures) // across)
    canvas = np.full(((height + gap) * down - gap, (width + gap) * across - gap, channels), 255, np.uint8)
    for place, picture in enumerate(pictures):
        top, left = place // across * (height + gap), place % across * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    axis = figure.add_axes(box)
    axis.axis("off")
    axis.imshow(canvas, interpolation="nearest")
    axis.set_title(title, fontsize=9)
    return axis


def _strip(figure: Figure, box: Box, pictures: Sequence[np.ndarray], captions: Sequence[Caption] = ()) -> None:
    """Pictures in a row, with a caption below each."""
    axis = _pictures(figure, box, pictures, len(pictures))
    axis.set_anchor("W")
    height, width, _ = pictures[0].shape
    below = {"xytext": (0, -3), "textcoords": "offset points", "va": "top", "ha": "center", "annotation_clip": False}
    for place, (text, color) in enumerate(captions):
        middle = place * (width + max(2, width // 12)) + width / 2
        axis.annotate(text, (middle, height), fontsize=8, color=color, parse_math=False, **below)


def _bars(figure: Figure, box: Box, shares: dict[str, float], label: str, color: Any) -> Axes:
    """Shares as bars in percent."""
    axis = figure.add_axes(box)
    axis.bar(range(len(shares)), [100 * share for share in shares.values()], color=color)
    axis.set_xticks(range(len(shares)), [name.replace(", ", "\n") for name in shares], fontsize=8)
    axis.set(ylabel=label, ylim=(0, 108))
    return axis


def attack_figure(answer: Attacked) -> Figure:
    """The perturbation, images without and with it and what is made of them, and success against eps."""
    question, target = answer.question, answer.target
    figure, classes = _figure(3.9), target.splits.test.classes
    strength = f"shown {127.5 / question.eps if question.eps else 1.0:.1f} times as strong"
    owner = "the first image's own" if question.own else "one for all images"
    picture = perturbation_picture(answer.xi[0].cpu().numpy(), question.eps or 1.0)
    _pictures(figure, (0.005, 0.16, 0.20, 0.60), [picture], title=f"perturbation, {owner}\n{strength}")
    for bottom, heading, seen, images, (predicted, confidence) in (
        (0.53, "clean", ", and what the model sees", answer.images, answer.clean),
        (0.08, "perturbed", ", and what it sees", answer.seen, answer.perturbed),
    ):
        shown, captions = [as_picture(image) for image in images.cpu().numpy()], []
        if target.segments:
            shown, heading = [shown[0], colour(predicted[0].cpu().numpy(), classes)], heading + seen
        else:
            decisions = zip(predicted.tolist(), confidence.tolist(), answer.labels.tolist(), strict=True)
            captions = [(f"{classes[p]} {100 * c:.0f} %", GREY if p == y else RED) for p, c, y in decisions]
        _strip(figure, (0.235, bottom, 0.47, 0.33), shown, captions)
        figure.text(0.235, bottom + 0.34, heading, fontsize=9, color=GREY)
    axis = figure.add_axes((0.765, 0.15, 0.225, 0.71))
    goal = "target hit" if question.target is not None else "wrong"
    what = "pixels of unseen scenes" if target.segments else "unseen images"
    if answer.curve:
        axis.plot(*np.array([(eps, 100 * rate) for eps, rate in answer.curve]).T, color=PALETTE[0], label="fewer steps")
    rate, (low, high) = 100 * answer.won.mean().item(), (100 * bound for bound in interval(answer.won))
    spread = [[max(0.0, rate - low)], [max(0.0, high - rate)]]
    style = {"color": RED, "marker": "o", "capsize": 4, "linestyle": "none"}
    axis.errorbar([question.eps], [rate], yerr=spread, label=f"this one: {rate:.0f} %", **style)
    axis.set(xlabel=EPS, ylabel=f"{goal}, {what} (%)", ylim=(-3, 103), xlim=(0, max(68.0, 1.06 * question.eps)))
    axis.grid(alpha=0.4)
    axis.legend(loc="lower right", fontsize=8)
    return _titled(figure, f"{target.title} · eps = {question.eps:g} pixel units, {answer.steps} steps")


def shared_figure(answer: Shared) -> Figure:
    """The perturbations that heaps share, whom they fool, and the four risks in their order."""
    question, heaps, shown = answer.question, len(answer.xi), answer.xi[:16].cpu().numpy()
    figure = _figure(4.0)
    heading = f"{heaps} heap{'s' if heaps > 1 else ''} of {question.sharedness} images share\na perturbation each"
    heading += f", {len(shown)} of them" if len(shown) < heaps else ""
    pictures = [perturbation_picture(xi, question.eps or 1.0) for xi in shown]
    _pictures(figure, (0.01, 0.05, 0.29, 0.72), pictures, min(4, len(shown)), title=heading)
    fooled = {"no perturbation": answer.risks["expected"], "their own heap": answer.own, "unseen images": answer.unseen}
    axis = _bars(figure, (0.37, 0.14, 0.24, 0.63), fooled, "wrong predictions (%)", ("0.7", PALETTE[1], PALETTE[0]))
    axis.set_title("whom the perturbations fool", fontsize=9)
    for place, share in enumerate(fooled.values()):
        axis.text(place, 100 * share + 1.5, f"{100 * share:.0f} %", ha="center", fontsize=9)
    axis = _bars(figure, (0.70, 0.14, 0.29, 0.63), answer.risks, "0-1 risk (%)", PALETTE[2])
    axis.set_title(f"the four risks of these {answer.images} images", fontsize=9)
    title = f"{answer.target.title} · s = {question.sharedness}, eps = {question.eps:g} pixel units"
    return _titled(figure, f"{title}, {answer.steps} steps")


def trade_figure(
    models: Sequence[Model], chosen: Model, row: dict | None, pictures: np.ndarray | None, *, dataset: str
) -> Figure:
    """The models that were run in accuracy and eps_uni, the chosen one ringed; its perturbation, and what it does.

    Filled: by the ensemble, where that was run, with a line up to what the paper's attack finds (hollow). row,
    pictures: the chosen model's row of `display.broken_by` and the images (n, C, H, W) in it, where known.
    """
    figure = _figure(4.4)
    axis = figure.add_axes((0.06, 0.13, 0.42, 0.72))
    searched = any(m.strongest is not None for m in models)
    for family in dict.fromkeys(m.family for m in models):
        members, style, label = [m for m in models if m.family == family], look(family), family
        for measure, hollow in (("strongest", False), ("eps_uni", searched)):
            known = [(m.accuracy, size) for m in members if (size := getattr(m, measure)) is not None]
            if known:
                filled = {"markerfacecolor": "none"} if hollow else {}
                axis.plot(*np.array(known).T, linestyle="none", markersize=7, label=label, **style, **filled)
                label = None
        for m in members:
            if m.strongest is not None and m.eps_uni is not None:
                axis.plot([m.accuracy] * 2, [m.strongest, m.eps_uni], color=style["color"], linewidth=0.8, alpha=0.6)
    measure = "strongest" if searched else "eps_uni"
    if best := [(m.accuracy, size) for m, size in front(models, measure) if getattr(m, measure) is not None]:
        axis.plot(*np.array(best).T, color="0.6", linewidth=1, zorder=0, label="Pareto front")
    sizes = [size for size in (chosen.strongest, chosen.eps_uni) if size is not None]
    if sizes:
        ring = {"markersize": 17, "markerfacecolor": "none", "markeredgecolor": RED, "markeredgewidth": 2}
        axis.plot(chosen.accuracy, sizes[0], marker="o", linestyle="none", label="chosen", **ring)
    axis.set(xlabel="clean accuracy (%)", ylabel="eps_uni(0.75) (pixel units of 255)")
    axis.grid(alpha=0.4)
    axis.legend(fontsize=7, loc="lower left")
    found = f"{size_text(chosen.eps_uni)} by the paper's attack"
    if chosen.strongest_searches:
        found = f"{size_text(chosen.strongest)} by the ensemble, {found}"
    title = f"{chosen.title}: accuracy {chosen.accuracy:.1f} %, eps_uni {found} · {dataset}"
    _titled(figure, title)
    if row is None or pictures is None:
        figure.text(0.74, 0.5, "neither its perturbation nor its weights\nare here: only its numbers", ha="center")
        return figure
    xi = row["perturbation"]
    title = f"its perturbation,\nshown {127.5 / np.abs(xi).max():.1f} times as strong"
    _pictures(figure, (0.52, 0.36, 0.14, 0.42), [perturbation_picture(xi)], title=title)
    shown = [as_picture(x + xi) for x in pictures]
    captions = [(name, GREY if right else RED) for name, right in row["predictions"]]
    half = -(-len(shown) // 2)
    for bottom, part in ((0.48, slice(half)), (0.08, slice(half, None))):
        if shown[part]:
            _strip(figure, (0.68, bottom, 0.31, 0.32), shown[part], captions[part])
    return figure
