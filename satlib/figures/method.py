"""The figures of sections 3 to 5: what an attack does, Figure 2, the risks in order, the search for an eps.

Models are keyed by their sharedness, None for the undefended one: the key gives name, colour and marker.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from satlib.figures import BY_SHAREDNESS, ERM, as_picture, panel_grid, perturbation_picture
from satlib.ledger import Record

_GREEN, _PURPLE = (sns.color_palette("colorblind").as_hex()[i] for i in (2, 4))
_RED = "#b2182b"
_ATTACKS = {  # attacks, where they are compared on one model: none of these is a model's colour
    "image-dependent": {"color": _GREEN, "marker": "v", "linestyle": "-"},
    "universal": {"color": _PURPLE, "marker": "P", "linestyle": "-"},
    "random noise": {"color": "0.5", "marker": ".", "linestyle": "--"},
}
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def model_name(sharedness: int | None) -> str:
    """What legends and captions call a model."""
    return "undefended (ERM)" if sharedness is None else f"defended (s = {sharedness})"


def _style(sharedness: int | None) -> dict:
    return ERM if sharedness is None else BY_SHAREDNESS.get(sharedness, {"color": _PURPLE, "marker": "P"})


def _dataset(records: Mapping[int | None, Record]) -> str:
    return next(iter(records.values())).labels["dataset"]


def _percent(axis: Axes, label: str) -> None:
    axis.set(ylim=(-0.03, 1.03), ylabel=label)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))


# --- pictures


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
    figure, axes = panel_grid(len(rows), columns, size=1.35)
    figure.set_size_inches(1.25 * columns + 1.9, 1.45 * len(rows) + 0.5)
    for row, line in zip(rows, axes, strict=True):
        line[0].set_ylabel(row.name, rotation=0, ha="right", va="center", fontsize=10, labelpad=8)
        for axis in line[len(row.pictures) :]:
            axis.set_visible(False)
        for column, (axis, picture) in enumerate(zip(line, row.pictures, strict=False)):
            axis.imshow(picture)
            if row.captions:
                wrong = bool(row.wrong) and bool(row.wrong[column])
                weight = "bold" if wrong else "normal"
                color = _RED if wrong else "0.2"
                axis.set_xlabel(row.captions[column], fontsize=9, color=color, fontweight=weight, labelpad=2)
    figure.suptitle(title, fontsize=12)
    return figure


def shared_training(record: Record) -> Figure:
    """Figure 2 from the record of a real mini-batch (kind `heap_trace`): one lane for each heap, read left to right."""
    arrays, config, names = record.arrays("trace"), record.config, record.metrics
    images, s, eps, steps = arrays["images"], config["sharedness"], config["eps"], config["steps"]
    d, heaps = len(images), len(arrays["perturbations"][0])
    alpha = config["relative_step_size"] * eps
    summed = [np.sign(arrays["gradients"][h * s : (h + 1) * s].sum(0)) for h in range(heaps)]
    broadcast = np.repeat(arrays["perturbations"][-1], s, axis=0)[:d]
    across = math.ceil(math.sqrt(s))
    down = math.ceil(s / across)
    tile, pitch, arrow, left = 0.56, 0.60, 0.66, 0.62
    block, single, lane = across * pitch, 0.86, down * (pitch + 0.15) + 0.2
    widths = [block, block, single, single, block, block]
    starts = [left + sum(widths[:i]) + i * arrow for i in range(len(widths))]
    width, top = starts[-1] + block + 0.34, 0.7 + heaps * (lane + 0.14)
    canvas = _Canvas(width, top + 1.08)
    headings = (
        ("mini-batch", f"$d$ = {d} images in\n$d/s$ = {heaps} heaps of $s$ = {s}"),
        (
            "gradients at $\\xi^{(k)}$",
            "$g_i=\\nabla_{\\xi}\\,L_{adv}(\\theta,\\,x_i+\\xi^{(k)},\\,y_i)$\nhere for $k$ = 0",
        ),
        ("one step", f"$\\alpha_k\\,\\mathrm{{sgn}}\\,\\sum_{{heap}} g_i$\n$\\alpha_k$ = {alpha:g}"),
        ("shared $\\xi$", f"$\\xi^{{(K)}}\\in[-\\varepsilon,\\varepsilon]$\n$\\varepsilon$ = {eps:g}"),
        ("broadcast", f"$d/s$ = {heaps} become\n$d$ = {d} perturbations"),
        ("adversarial images", "$x_i+\\xi$, clamped\nto [0, 255]"),
    )
    for x, extent, (name, formula) in zip(starts, widths, headings, strict=True):
        canvas.text(x + extent / 2, top + 0.56, name, fontsize=10.5, fontweight="bold")
        canvas.text(x + extent / 2, top + 0.22, formula, fontsize=8, color="0.25")
    colors = sns.color_palette("colorblind", max(heaps, 3))
    for heap in range(heaps):
        base = top - 0.1 - (heap + 1) * (lane + 0.14) + 0.14
        middle, members = base + lane / 2, range(heap * s, min((heap + 1) * s, d))
        canvas.box(0.12, base, width - 0.24, lane, colors[heap])
        canvas.text(0.34, middle, f"heap {heap + 1}", rotation=90, fontsize=10, color=colors[heap], fontweight="bold")
        for place, i in enumerate(members):
            dx, y = (place % across) * pitch, base + lane - 0.12 - (place // across) * (pitch + 0.15) - tile
            label, seen = names["labels"][i], names["adversarial_predictions"][i]
            canvas.picture(starts[0] + dx, y, tile, as_picture(images[i]), label)
            canvas.picture(starts[1] + dx, y, tile, perturbation_picture(arrays["gradients"][i]))
            canvas.picture(starts[4] + dx, y, tile, perturbation_picture(broadcast[i], eps))
            adversarial = as_picture(arrays["adversarial"][i])
            canvas.picture(starts[5] + dx, y, tile, adversarial, seen, wrong=seen != label)
        canvas.picture(starts[2], middle - single / 2, single, perturbation_picture(summed[heap], 1.0))
        last = arrays["perturbations"][-1][heap]
        canvas.picture(starts[3], middle - single / 2, single, perturbation_picture(last, eps))
        for i, operation in enumerate(
            ("$\\nabla_{\\xi}$", "$\\sum$, sgn, $\\times\\alpha_k$", "add, clip", f"$\\times\\,{s}$", "$+\\,x_i$")
        ):
            canvas.arrow(starts[i] + widths[i] + 0.04, starts[i + 1] - 0.08, middle)
            canvas.text(starts[i + 1] - arrow / 2 - 0.02, middle + 0.16, operation, fontsize=7)
    floor = top - 0.1 - heaps * (lane + 0.14) + 0.14
    canvas.loop(starts[3] + single / 2, starts[1] + block / 2, floor - 0.04, 0.3)
    update = "$\\xi^{(k+1)}=\\mathrm{clip}(\\xi^{(k)}+\\mathrm{step},\\,-\\varepsilon,\\,\\varepsilon)$"
    canvas.text((starts[3] + single + starts[1] + block) / 2, floor - 0.5, f"$K$ = {steps} times: {update}", fontsize=9)
    canvas.text(
        width - 0.12,
        floor - 0.26,
        "then train on $\\sigma\\,L(\\theta,x+\\xi,y)+(1-\\sigma)\\,L(\\theta,x,y)$",
        fontsize=9,
        ha="right",
    )
    canvas.text(0.12, top + 0.92, f"Shared adversarial training · {record.labels['dataset']}", fontsize=12, ha="left")
    return canvas.figure


class _Canvas:
    """A drawing surface in inches: pictures, lanes, arrows and text on one axis without a frame."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = plt.figure(figsize=(width, height))
        self.figure.set_layout_engine("none")  # not by argument: saving as PDF would then lay it out after all
        self.axis = self.figure.add_axes((0, 0, 1, 1))
        self.axis.set(xlim=(0, width), ylim=(0, height))
        self.axis.axis("off")

    def picture(
        self, x: float, y: float, size: float, picture: np.ndarray, name: str = "", wrong: bool = False
    ) -> None:
        self.axis.imshow(picture, extent=(x, x + size, y, y + size), aspect="auto", zorder=3)
        if name:
            weight = "bold" if wrong else "normal"
            self.text(x + size / 2, y - 0.07, name, fontsize=6.5, color=_RED if wrong else "0.2", fontweight=weight)

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        self.axis.text(x, y, text, zorder=5, **{"ha": "center", "va": "center"} | style)

    def box(self, x: float, y: float, width: float, height: float, color: tuple) -> None:
        style = "round,pad=0,rounding_size=0.1"
        self.axis.add_patch(
            FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=(*color, 0.10), edgecolor=(*color, 0.55))
        )

    def arrow(self, start: float, end: float, y: float) -> None:
        self.axis.add_patch(
            FancyArrowPatch(
                (start, y), (end, y), arrowstyle="-|>", mutation_scale=10, color="0.25", shrinkA=0, shrinkB=0
            )
        )

    def loop(self, start: float, end: float, y: float, depth: float) -> None:
        self.axis.plot([start, start, end], [y, y - depth, y - depth], color="0.25", linewidth=1.3, zorder=2)
        self.axis.add_patch(
            FancyArrowPatch(
                (end, y - depth),
                (end, y + 0.06),
                arrowstyle="-|>",
                mutation_scale=12,
                color="0.25",
                shrinkA=0,
                shrinkB=0,
            )
        )


# --- sections 3 and 4: risks


def error_curves(curves: Mapping[str, Sequence[float]], epsilons: Sequence[float], *, title: str) -> Figure:
    """Misclassification rate of one model against eps: by "image-dependent", "universal" and "random noise"."""
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    for name, errors in curves.items():
        axis.plot(epsilons, errors, label=name, **_ATTACKS[name])
    axis.set(xlabel="eps: largest change of a pixel value (pixel units, 0..255)", title=title)
    _percent(axis, "misclassified images")
    axis.legend(title="perturbation")
    return figure


def three_risks(record: Record) -> Figure:
    """The three risks of section 3.1 on one scale (kind `risks`): mean cross-entropy, and 0-1 loss."""
    chain = [record.metrics["expected"], record.metrics["universal"], record.metrics["heap"][-1]]
    names = ["expected: no attack", "universal: one\nperturbation for all", "adversarial: one\nfor each image"]
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 2.7), sharey=True)
    colors = ("0.4", _PURPLE, _GREEN)
    for axis, quantity, form in zip(axes, ("loss", "error"), ("{:.2f}", "{:.1%}"), strict=True):
        for place, (risk, color) in enumerate(zip(chain, colors, strict=True)):
            axis.plot([0, risk[quantity]], [place, place], color=color, linewidth=2)
            axis.plot(risk[quantity], place, "o", color=color, markersize=10)
            label, beside = form.format(risk[quantity]), {"textcoords": "offset points", "va": "center"}
            axis.annotate(label, (risk[quantity], place), (9, 0), **beside)
        axis.set(ylim=(2.7, -0.7), yticks=range(3), yticklabels=names)
        axis.grid(False, axis="y")
    axes[0].set(xlabel="mean cross-entropy", xlim=(0, 1.2 * max(risk["loss"] for risk in chain)))
    axes[1].set(xlabel="misclassified images", xlim=(0, 1.25), xticks=np.linspace(0, 1, 6))
    axes[1].xaxis.set_major_formatter(PercentFormatter(1.0))
    eps = record.config["eps"]
    figure.suptitle(f"Undefended model, eps = {eps:g} pixel units · {record.labels['dataset']}", fontsize=12)
    return figure


def risk_chain(records: Mapping[int | None, Record]) -> Figure:
    """The risks of sections 3.1 and 4.2 in the order that theory gives them (kind `risks`): loss, and 0-1 loss."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.2))
    for sharedness, record in records.items():
        metrics = record.metrics
        chain = [metrics["expected"], metrics["universal"], *metrics["heap"]]
        for axis, quantity in zip(axes, ("loss", "error"), strict=True):
            values = [risk[quantity] for risk in chain]
            axis.plot(range(len(chain)), values, label=model_name(sharedness), markersize=8, **_style(sharedness))
    sizes = [row["sharedness"] for row in next(iter(records.values())).metrics["heap"]]
    ticks = ["$\\rho_{exp}$", "$\\rho_{uni}$", *(f"$\\rho_{{heap}}^{{({s})}}$" for s in sizes)]
    if sizes[-1] == 1:
        ticks[-1] = "$\\rho_{adv}$"
    eps = next(iter(records.values())).config["eps"]
    for axis in axes:
        axis.set(xlabel="risk, from its lower bound to its upper bounds")
        axis.set_xticks(range(len(ticks)), ticks)
    axes[0].set(yscale="log", ylabel="mean cross-entropy (log scale)", title="loss")
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes[0].yaxis.set_minor_locator(NullLocator())
    axes[0].yaxis.set_major_formatter(_PLAIN)
    axes[1].set(title="0-1 loss")
    _percent(axes[1], "misclassified images")
    axes[1].legend(loc="lower right")
    figure.suptitle(f"Risks at eps = {eps:g} pixel units · {_dataset(records)}", fontsize=12)
    return figure


def heap_overfitting(records: Mapping[int | None, Record]) -> Figure:
    """Error on a shared perturbation's own heap and on images it never saw, against the size of the heap."""
    figure, axes = plt.subplots(1, len(records), figsize=(4.8 * len(records), 4.0), sharey=True, squeeze=False)
    for axis, (sharedness, record) in zip(axes[0], records.items(), strict=True):
        rows = sorted(record.metrics["rows"], key=lambda row: row["sharedness"])
        sizes = [row["sharedness"] for row in rows]
        own, unseen = ([row[key] for row in rows] for key in ("own_error", "unseen_error"))
        style = _style(sharedness)
        axis.plot(sizes, own, label="its own heap", **style)
        axis.plot(sizes, unseen, label="unseen images", linestyle="--", markerfacecolor="white", **style)
        axis.fill_between(sizes, own, unseen, color=style["color"], alpha=0.12, label="overfit to the heap")
        axis.axhline(record.metrics["clean_error"], color="0.5", linestyle=":", label="unseen images, no perturbation")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set(xlabel="sharedness s (images in the heap, log scale)", title=model_name(sharedness))
        _percent(axis, "misclassified images" if axis is axes[0][0] else "")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    eps = next(iter(records.values())).config["eps"]
    figure.suptitle(
        f"A shared perturbation fits its heap, eps = {eps:g} pixel units · {_dataset(records)}", fontsize=12
    )
    return figure


def loss_threshold(record: Record) -> Figure:
    """Winner takes all (section 4.3): loss of every image under perturbations found with and without kappa."""
    losses, kappa = record.arrays("losses"), record.config["loss_threshold"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.0), width_ratios=(1.35, 1))
    kinds = {"uncapped": ("without threshold", "0.6", "--"), "capped": ("with threshold $\\kappa$", _GREEN, "-")}
    for offset, (name, (label, color, line)) in enumerate(kinds.items()):
        share = (np.arange(len(losses[name])) + 1) / len(losses[name])
        left.plot(share, np.sort(losses[name])[::-1], color=color, linestyle=line, label=label, linewidth=2)
        metrics = record.metrics[name]
        heights = [metrics["error"], metrics["unseen_error"], metrics["top_tenth_share"]]
        bars = right.bar(np.arange(3) + 0.38 * offset - 0.19, heights, 0.36, color=color, label=label)
        right.bar_label(bars, [f"{height:.0%}" for height in heights], fontsize=9, padding=1)
    left.axhline(kappa, color="0.3", linestyle=":", linewidth=1.5, label=f"$\\kappa$ = {kappa:.2f}")
    left.set(xlabel="images, from the largest loss to the smallest", ylabel="cross-entropy under the perturbation")
    left.xaxis.set_major_formatter(PercentFormatter(1.0))
    left.set(title="where the attack's loss goes")
    left.legend()
    right.set_xticks(
        range(3),
        ["misclassified:\nown heap", "misclassified:\nunseen images", "loss held by\nthe top tenth"],
        fontsize=9,
    )
    right.set(title="what it buys", xlabel="what the share counts")
    _percent(right, "share")
    right.set_ylim(0, 1.12)
    s, eps = record.config["sharedness"], record.config["eps"]
    figure.suptitle(
        f"Loss threshold: heaps of {s}, eps = {eps:g} pixel units · {record.labels['dataset']}", fontsize=12
    )
    return figure


# --- section 5: robustness


def step_schedule(schedules: Mapping[str, Sequence[float]], *, total: float, title: str) -> Figure:
    """Step sizes alpha_k and their running sum, for each named schedule; `total` is beta * eps (pixel units)."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.4))
    for name, alphas in schedules.items():
        axes[0].plot(range(len(alphas)), alphas, label=name, linewidth=2)
        axes[1].plot(range(1, len(alphas) + 1), np.cumsum(alphas), label=name, linewidth=2)
    axes[1].axhline(total, color="0.4", linestyle=":", label="$\\beta\\varepsilon$")
    axes[0].set(xlabel="iteration k", ylabel="$\\alpha_k$ (pixel units)", title="step size", ylim=(0, None))
    axes[1].set(xlabel="iterations done", ylabel="sum of steps (pixel units)", title="way travelled", ylim=(0, None))
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1].legend(loc="lower right")
    figure.suptitle(title, fontsize=12)
    return figure


def search_trace(records: Mapping[int | None, Record]) -> Figure:
    """Every question of each binary search (kind `universal_robustness`): its interval, and its success rate."""
    figure, axes = plt.subplots(2, len(records), figsize=(4.8 * len(records), 6.4), sharey="row", squeeze=False)
    for (upper, lower), (sharedness, record) in zip(axes.T, records.items(), strict=True):
        asked, found = record.metrics["evaluations"][1:], record.metrics["eps_uni"]
        delta = record.config["delta"]
        low, high = 0.0, 255.0
        for step, question in enumerate(asked, start=1):
            upper.plot([step, step], [low, high], color="0.75", linewidth=5, solid_capstyle="butt", zorder=1)
            low, high = (low, question["eps"]) if question["success"] else (question["eps"], high)
        for success, color, marker, label in (
            (True, _GREEN, "v", f"{delta:.0%} reached: go lower"),
            (False, _RED, "^", f"{delta:.0%} missed: go higher"),
        ):
            of_kind = [(i, q) for i, q in enumerate(asked, start=1) if q["success"] == success]
            style = {
                "color": color,
                "marker": marker,
                "linestyle": "none",
                "label": label,
                "zorder": 3,
                "clip_on": False,
            }
            upper.plot([i for i, _ in of_kind], [q["eps"] for _, q in of_kind], **style)
            lower.plot([q["eps"] for _, q in of_kind], [q["rate"] for _, q in of_kind], **style)
        lower.axhline(delta, color="0.4", linestyle=":", label=f"delta = {delta:g}")
        if found is not None:
            upper.axhline(found, color=_style(sharedness)["color"], linewidth=1.2, label=f"eps_uni = {found:.1f}")
            lower.axvline(found, color=_style(sharedness)["color"], linewidth=1.2)
        upper.set(xlabel="iteration of the search", title=model_name(sharedness))
        upper.set_yscale("symlog", linthresh=8, base=2)
        upper.set_ylim(0, 290)
        lower.set_xscale("symlog", linthresh=8, base=2)
        lower.set(xlabel="eps that was asked (pixel units, log scale)", xlim=(0, 290))
        for scale in (upper.yaxis, lower.xaxis):
            scale.set_ticks([0, 4, 8, 16, 32, 64, 128, 255])
            scale.set_major_formatter(_PLAIN)
            scale.set_minor_locator(NullLocator())
        upper.set_xticks(range(1, len(asked) + 1))
        upper.set_ylabel("eps (pixel units, log scale)" if upper is axes[0][0] else "")
        _percent(lower, "success rate" if lower is axes[1][0] else "")
        upper.legend(fontsize=9, loc="upper right")
    axes[1][0].legend(fontsize=9, loc="lower right")
    figure.suptitle(f"Binary search for the smallest universal perturbation · {_dataset(records)}", fontsize=12)
    return figure


def robustness_curves(adversarial: Mapping[int | None, Record], universal: Mapping[int | None, Record]) -> Figure:
    """Share of images fooled within eps, each by its own perturbation and all by one; delta cuts both curves."""
    figure, axis = plt.subplots(figsize=(8.2, 4.4))
    smallest = 0.25  # where the logarithmic axis begins; what is fooled at eps = 0 is drawn there
    for sharedness, record in adversarial.items():
        style = {"color": _style(sharedness)["color"], "linewidth": 2}
        epsilons = np.sort(record.arrays("epsilons")["epsilons"])
        share = np.arange(1, len(epsilons) + 1) / len(epsilons)
        reached = np.isfinite(epsilons)
        later = reached & (epsilons > smallest)
        x = np.concatenate([[smallest], epsilons[later], [255.0]])
        y = np.concatenate([[np.mean(epsilons <= smallest)], share[later], [reached.mean()]])
        axis.step(x, y, where="post", label=f"{model_name(sharedness)}: image-dependent", **style)
        # Without the question eps = 0: a line from there would cross what nobody asked.
        found = sorted(universal[sharedness].metrics["evaluations"][1:], key=lambda q: q["eps"])
        x, y = [q["eps"] for q in found], [q["rate"] for q in found]
        axis.plot(x, y, linestyle="--", marker=".", label=f"{model_name(sharedness)}: universal", **style)
        for value, marker in ((record.metrics["eps_adv"], "o"), (universal[sharedness].metrics["eps_uni"], "D")):
            if value is not None:
                axis.plot(max(value, smallest), record.config["delta"], marker, markersize=8, **style)
    delta = next(iter(adversarial.values())).config["delta"]
    axis.axhline(delta, color="0.4", linestyle=":", zorder=1, label=f"delta = {delta:g}")
    axis.set_xscale("log", base=2)
    axis.set_xticks([0.25, 1, 4, 16, 64, 255])
    axis.xaxis.set_major_formatter(_PLAIN)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel="eps (pixel units, log scale)", xlim=(smallest, 260))
    for name, marker in (("$\\varepsilon_{adv}(\\delta)$", "o"), ("$\\varepsilon_{uni}(\\delta)$", "D")):
        axis.plot([], [], marker, color="0.4", markersize=8, label=name)
    figure.suptitle(f"Robustness to both kinds of perturbation · {_dataset(adversarial)}", fontsize=12)
    _percent(axis, "images fooled within eps")
    axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure
