"""The plots of sections 3 to 5: how an attack grows with eps, the risks in order, the search for an eps.

Models are keyed by their sharedness, None for the undefended one: the key gives name, colour and marker.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

from satlib.robustness import LARGEST
from satlib.study.figures import GREEN, PURPLE, RED, finish, look, percent, plain_ticks
from satlib.study.records import Record

_ATTACKS = {  # attacks, where they are compared on one model: none of these is a model's colour
    "image-dependent": {"color": GREEN, "marker": "v", "linestyle": "-"},
    "universal": {"color": PURPLE, "marker": "P", "linestyle": "-"},
    "random noise": {"color": "0.5", "marker": ".", "linestyle": "--"},
}


def model_name(sharedness: int | None) -> str:
    """What legends and captions call a model."""
    return "undefended (ERM)" if sharedness is None else f"defended (s = {sharedness})"


def _common(records: Mapping[int | None, Record], setting: str) -> tuple[float, str]:
    """A setting and the data set of several records that have both in common."""
    first = next(iter(records.values()))
    return first.settings[setting], first.labels["dataset"]


def error_curves(record: Record) -> Figure:
    """Misclassification rate of one model against eps, for each kind of perturbation (kind `error_curves`)."""
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    for name, errors in record.metrics["errors"].items():
        epsilons, errors = [0.0, *record.settings["epsilons"]], [record.metrics["clean_error"], *errors]
        axis.plot(epsilons, errors, label=name, **_ATTACKS[name])
    axis.set(xlabel="eps: largest change of a pixel value (pixel units, 0..255)")
    axis.set_title(f"Undefended model · {record.labels['dataset']}")
    percent(axis, "misclassified images")
    axis.legend(title="perturbation")
    return figure


def three_risks(record: Record) -> Figure:
    """The three risks of section 3.1 on one scale (kind `risks`): mean cross-entropy, and 0-1 loss."""
    chain = [record.metrics["expected"], record.metrics["universal"], record.metrics["heap"][-1]]
    names = ["expected: no attack", "universal: one\nperturbation for all", "adversarial: one\nfor each image"]
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 2.7), sharey=True)
    for axis, quantity, form in zip(axes, ("loss", "error"), (".2f", ".1%"), strict=True):
        for place, (risk, color) in enumerate(zip(chain, ("0.4", PURPLE, GREEN), strict=True)):
            value = risk[quantity]
            axis.plot([0, value], [place, place], color=color, linewidth=2)
            axis.plot(value, place, "o", color=color, markersize=10)
            axis.annotate(f"{value:{form}}", (value, place), (9, 0), textcoords="offset points", va="center")
        axis.set(ylim=(2.7, -0.7), yticks=range(3), yticklabels=names)
        axis.grid(False, axis="y")
    axes[0].set(xlabel="mean cross-entropy", xlim=(0, 1.2 * max(risk["loss"] for risk in chain)))
    axes[1].set(xlabel="misclassified images", xlim=(0, 1.25), xticks=np.linspace(0, 1, 6))
    axes[1].xaxis.set_major_formatter(PercentFormatter(1.0))
    eps = record.settings["eps"]
    return finish(figure, f"Undefended model, eps = {eps:g} pixel units · {record.labels['dataset']}")


def risk_chain(records: Mapping[int | None, Record]) -> Figure:
    """The risks of sections 3.1 and 4.2 in the order that theory gives them (kind `risks`): loss, and 0-1 loss."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.2))
    for sharedness, record in records.items():
        chain = [record.metrics["expected"], record.metrics["universal"], *record.metrics["heap"]]
        for axis, quantity in zip(axes, ("loss", "error"), strict=True):
            values = [risk[quantity] for risk in chain]
            axis.plot(range(len(chain)), values, label=model_name(sharedness), markersize=8, **look(sharedness))
    sizes = [row["sharedness"] for row in next(iter(records.values())).metrics["heap"]]
    heaps = ["$\\rho_{adv}$" if s == 1 else f"$\\rho_{{heap}}^{{({s})}}$" for s in sizes]
    ticks = ["$\\rho_{exp}$", "$\\rho_{uni}$", *heaps]
    for axis in axes:
        axis.set(xlabel="risk, from its lower bound to its upper bounds")
        axis.set_xticks(range(len(ticks)), ticks)
    axes[0].set(yscale="log", ylabel="mean cross-entropy (log scale)", title="loss")
    plain_ticks(axes[0].yaxis, LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes[1].set(title="0-1 loss")
    percent(axes[1], "misclassified images")
    axes[1].legend(loc="lower right")
    eps, dataset = _common(records, "eps")
    return finish(figure, f"Risks at eps = {eps:g} pixel units · {dataset}")


def heap_overfitting(records: Mapping[int | None, Record]) -> Figure:
    """Error on a shared perturbation's own heap and on images it never saw, against the size of the heap."""
    figure, axes = plt.subplots(1, len(records), figsize=(4.8 * len(records), 4.0), sharey=True, squeeze=False)
    for axis, (sharedness, record) in zip(axes[0], records.items(), strict=True):
        rows = sorted(record.metrics["rows"], key=lambda row: row["sharedness"])
        sizes = [row["sharedness"] for row in rows]
        own, unseen = ([row[key] for row in rows] for key in ("own_error", "unseen_error"))
        style = look(sharedness)
        axis.plot(sizes, own, label="its own heap", **style)
        axis.plot(sizes, unseen, label="unseen images", linestyle="--", markerfacecolor="white", **style)
        axis.fill_between(sizes, own, unseen, color=style["color"], alpha=0.12, label="overfit to the heap")
        axis.axhline(record.metrics["clean_error"], color="0.5", linestyle=":", label="unseen images, no perturbation")
        axis.set_xscale("log", base=2)
        plain_ticks(axis.xaxis, sizes)
        axis.set(xlabel="sharedness s (images in the heap, log scale)", title=model_name(sharedness))
        percent(axis, "misclassified images" if axis is axes[0][0] else "")
    eps, dataset = _common(records, "eps")
    title = f"A shared perturbation fits its heap, eps = {eps:g} pixel units · {dataset}"
    return finish(figure, title, legend=axes[0][0], fontsize=9)


def loss_threshold(record: Record) -> Figure:
    """Winner takes all (section 4.3): loss of every image under perturbations found with and without kappa."""
    losses, kappa = record.arrays("losses"), record.settings["loss_threshold"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.0), width_ratios=(1.35, 1))
    for name, label, color, line, offset in (
        ("uncapped", "without threshold", "0.6", "--", -0.19),
        ("capped", "with threshold $\\kappa$", GREEN, "-", 0.19),
    ):
        share = (np.arange(len(losses[name])) + 1) / len(losses[name])
        left.plot(share, np.sort(losses[name])[::-1], color=color, linestyle=line, label=label, linewidth=2)
        heights = [record.metrics[name][share] for share in ("error", "unseen_error", "top_tenth_share")]
        bars = right.bar(np.arange(3) + offset, heights, 0.36, color=color, label=label)
        right.bar_label(bars, [f"{height:.0%}" for height in heights], fontsize=9, padding=1)
    left.axhline(kappa, color="0.3", linestyle=":", linewidth=1.5, label=f"$\\kappa$ = {kappa:.2f}")
    left.xaxis.set_major_formatter(PercentFormatter(1.0))
    left.set(xlabel="images, from the largest loss to the smallest", ylabel="cross-entropy under the perturbation")
    left.set_title("where the attack's loss goes")
    left.legend()
    counted = ["misclassified:\nown heap", "misclassified:\nunseen images", "loss held by\nthe top tenth"]
    right.set_xticks(range(3), counted, fontsize=9)
    right.set(title="what it buys", xlabel="what the share counts")
    percent(right, "share")
    right.set_ylim(0, 1.12)
    s, eps = record.settings["sharedness"], record.settings["eps"]
    return finish(figure, f"Loss threshold: heaps of {s}, eps = {eps:g} pixel units · {record.labels['dataset']}")


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
    return finish(figure, title)


def search_trace(records: Mapping[int | None, Record]) -> Figure:
    """Every question of each binary search (kind `universal_robustness`): its interval, and its success rate."""
    figure, axes = plt.subplots(2, len(records), figsize=(4.8 * len(records), 6.4), sharey="row", squeeze=False)
    for (upper, lower), (sharedness, record) in zip(axes.T, records.items(), strict=True):
        asked, eps_uni = record.metrics["evaluations"][1:], record.metrics["eps_uni"]
        delta, own = record.settings["delta"], {"color": look(sharedness)["color"], "linewidth": 1.2}
        low, high = 0.0, LARGEST
        for step, question in enumerate(asked, start=1):
            upper.plot([step, step], [low, high], color="0.75", linewidth=5, solid_capstyle="butt", zorder=1)
            low, high = (low, question["eps"]) if question["success"] else (question["eps"], high)
        for success, color, marker, label in (
            (True, GREEN, "v", f"{delta:.0%} reached: go lower"),
            (False, RED, "^", f"{delta:.0%} missed: go higher"),
        ):
            style = {"color": color, "marker": marker, "label": label, "linestyle": "none", "clip_on": False}
            answers = [(step, q["eps"], q["rate"]) for step, q in enumerate(asked, start=1) if q["success"] == success]
            upper.plot([step for step, _, _ in answers], [eps for _, eps, _ in answers], zorder=3, **style)
            lower.plot([eps for _, eps, _ in answers], [rate for _, _, rate in answers], zorder=3, **style)
        lower.axhline(delta, color="0.4", linestyle=":", label=f"delta = {delta:g}")
        if eps_uni is not None:
            upper.axhline(eps_uni, label=f"eps_uni = {eps_uni:.1f}", **own)
            lower.axvline(eps_uni, **own)
        upper.set_yscale("symlog", linthresh=8, base=2)
        lower.set_xscale("symlog", linthresh=8, base=2)
        upper.set(xlabel="iteration of the search", title=model_name(sharedness), ylim=(0, 290))
        lower.set(xlabel="eps that was asked (pixel units, log scale)", xlim=(0, 290))
        for scale in (upper.yaxis, lower.xaxis):
            plain_ticks(scale, [0, 4, 8, 16, 32, 64, 128, 255])
        upper.set_xticks(range(1, len(asked) + 1))
        upper.set_ylabel("eps (pixel units, log scale)" if upper is axes[0][0] else "")
        percent(lower, "success rate" if lower is axes[1][0] else "")
        upper.legend(fontsize=9, loc="upper right")
    axes[1][0].legend(fontsize=9, loc="lower right")
    _, dataset = _common(records, "delta")
    return finish(figure, f"Binary search for the smallest universal perturbation · {dataset}")


def robustness_curves(adversarial: Mapping[int | None, Record], universal: Mapping[int | None, Record]) -> Figure:
    """Share of images fooled within eps, each by its own perturbation and all by one; delta cuts both curves."""
    figure, axis = plt.subplots(figsize=(8.2, 4.4))
    smallest = 0.25  # where the logarithmic axis begins; what is fooled at eps = 0 is drawn there
    for sharedness, record in adversarial.items():
        style = {"color": look(sharedness)["color"], "linewidth": 2}
        epsilons = np.sort(record.arrays("epsilons")["epsilons"])
        x = [smallest, *epsilons[(epsilons > smallest) & np.isfinite(epsilons)], LARGEST]
        shares = [np.mean(epsilons <= eps) for eps in x]
        axis.step(x, shares, where="post", label=f"{model_name(sharedness)}: image-dependent", **style)
        # Without the question eps = 0: a line from there would cross what nobody asked.
        asked = sorted(universal[sharedness].metrics["evaluations"][1:], key=lambda q: q["eps"])
        x, y = [q["eps"] for q in asked], [q["rate"] for q in asked]
        axis.plot(x, y, linestyle="--", marker=".", label=f"{model_name(sharedness)}: universal", **style)
        for value, marker in ((record.metrics["eps_adv"], "o"), (universal[sharedness].metrics["eps_uni"], "D")):
            if value is not None:
                axis.plot(max(value, smallest), record.settings["delta"], marker, markersize=8, **style)
    delta, dataset = _common(adversarial, "delta")
    axis.axhline(delta, color="0.4", linestyle=":", zorder=1, label=f"delta = {delta:g}")
    axis.set_xscale("log", base=2)
    plain_ticks(axis.xaxis, [smallest, 1, 4, 16, 64, 255])
    axis.set(xlabel="eps (pixel units, log scale)", xlim=(smallest, 260))
    for name, marker in (("$\\varepsilon_{adv}(\\delta)$", "o"), ("$\\varepsilon_{uni}(\\delta)$", "D")):
        axis.plot([], [], marker, color="0.4", markersize=8, label=name)
    percent(axis, "images fooled within eps")
    axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return finish(figure, f"Robustness to both kinds of perturbation · {dataset}")
