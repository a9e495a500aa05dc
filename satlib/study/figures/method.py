"""The plots of sections 3 to 5: how an attack grows with eps, the risks in order, the search for an eps.

Models are keyed by their sharedness, None for the undefended one: the key gives name, colour and marker.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

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


def _first(records: Mapping[int | None, Record]) -> Record:
    """One of several records that have their data set and the settings of the measurement in common."""
    return next(iter(records.values()))


# --- sections 3 and 4: risks


def error_curves(record: Record) -> Figure:
    """Misclassification rate of one model against eps, for each kind of perturbation (kind `error_curves`)."""
    metrics, epsilons = record.metrics, [0.0, *record.settings["epsilons"]]
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    for name, errors in metrics["errors"].items():
        axis.plot(epsilons, [metrics["clean_error"], *errors], label=name, **_ATTACKS[name])
    title = f"Undefended model · {record.labels['dataset']}"
    axis.set(xlabel="eps: largest change of a pixel value (pixel units, 0..255)", title=title)
    percent(axis, "misclassified images")
    axis.legend(title="perturbation")
    return figure


def three_risks(record: Record) -> Figure:
    """The three risks of section 3.1 on one scale (kind `risks`): mean cross-entropy, and 0-1 loss."""
    chain = [record.metrics["expected"], record.metrics["universal"], record.metrics["heap"][-1]]
    names = ["expected: no attack", "universal: one\nperturbation for all", "adversarial: one\nfor each image"]
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 2.7), sharey=True)
    colors = ("0.4", PURPLE, GREEN)
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
    eps = record.settings["eps"]
    return finish(figure, f"Undefended model, eps = {eps:g} pixel units · {record.labels['dataset']}")


def risk_chain(records: Mapping[int | None, Record]) -> Figure:
    """The risks of sections 3.1 and 4.2 in the order that theory gives them (kind `risks`): loss, and 0-1 loss."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.2))
    for sharedness, record in records.items():
        metrics = record.metrics
        chain = [metrics["expected"], metrics["universal"], *metrics["heap"]]
        for axis, quantity in zip(axes, ("loss", "error"), strict=True):
            values = [risk[quantity] for risk in chain]
            axis.plot(range(len(chain)), values, label=model_name(sharedness), markersize=8, **look(sharedness))
    sizes = [row["sharedness"] for row in _first(records).metrics["heap"]]
    ticks = ["$\\rho_{exp}$", "$\\rho_{uni}$", *(f"$\\rho_{{heap}}^{{({s})}}$" for s in sizes)]
    if sizes[-1] == 1:
        ticks[-1] = "$\\rho_{adv}$"
    eps = _first(records).settings["eps"]
    for axis in axes:
        axis.set(xlabel="risk, from its lower bound to its upper bounds")
        axis.set_xticks(range(len(ticks)), ticks)
    axes[0].set(yscale="log", ylabel="mean cross-entropy (log scale)", title="loss")
    plain_ticks(axes[0].yaxis, LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes[1].set(title="0-1 loss")
    percent(axes[1], "misclassified images")
    axes[1].legend(loc="lower right")
    return finish(figure, f"Risks at eps = {eps:g} pixel units · {_first(records).labels['dataset']}")


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
    title = f"A shared perturbation fits its heap, eps = {_first(records).settings['eps']:g} pixel units"
    return finish(figure, f"{title} · {_first(records).labels['dataset']}", legend=axes[0][0], fontsize=9)


def loss_threshold(record: Record) -> Figure:
    """Winner takes all (section 4.3): loss of every image under perturbations found with and without kappa."""
    losses, kappa = record.arrays("losses"), record.settings["loss_threshold"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.0), width_ratios=(1.35, 1))
    kinds = {"uncapped": ("without threshold", "0.6", "--"), "capped": ("with threshold $\\kappa$", GREEN, "-")}
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
    counted = ["misclassified:\nown heap", "misclassified:\nunseen images", "loss held by\nthe top tenth"]
    right.set_xticks(range(3), counted, fontsize=9)
    right.set(title="what it buys", xlabel="what the share counts")
    percent(right, "share")
    right.set_ylim(0, 1.12)
    s, eps = record.settings["sharedness"], record.settings["eps"]
    return finish(figure, f"Loss threshold: heaps of {s}, eps = {eps:g} pixel units · {record.labels['dataset']}")


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
    return finish(figure, title)


def search_trace(records: Mapping[int | None, Record]) -> Figure:
    """Every question of each binary search (kind `universal_robustness`): its interval, and its success rate."""
    figure, axes = plt.subplots(2, len(records), figsize=(4.8 * len(records), 6.4), sharey="row", squeeze=False)
    for (upper, lower), (sharedness, record) in zip(axes.T, records.items(), strict=True):
        asked, eps_uni = record.metrics["evaluations"][1:], record.metrics["eps_uni"]
        delta, color = record.settings["delta"], look(sharedness)["color"]
        low, high = 0.0, 255.0
        for step, question in enumerate(asked, start=1):
            upper.plot([step, step], [low, high], color="0.75", linewidth=5, solid_capstyle="butt", zorder=1)
            low, high = (low, question["eps"]) if question["success"] else (question["eps"], high)
        for success, style in (
            (True, {"color": GREEN, "marker": "v", "label": f"{delta:.0%} reached: go lower"}),
            (False, {"color": RED, "marker": "^", "label": f"{delta:.0%} missed: go higher"}),
        ):
            answered = [(step, q["eps"], q["rate"]) for step, q in enumerate(asked, 1) if q["success"] == success]
            steps, epsilons, rates = zip(*answered, strict=True) if answered else ((), (), ())
            alone = {"linestyle": "none", "zorder": 3, "clip_on": False}
            upper.plot(steps, epsilons, **style, **alone)
            lower.plot(epsilons, rates, **style, **alone)
        lower.axhline(delta, color="0.4", linestyle=":", label=f"delta = {delta:g}")
        if eps_uni is not None:
            upper.axhline(eps_uni, color=color, linewidth=1.2, label=f"eps_uni = {eps_uni:.1f}")
            lower.axvline(eps_uni, color=color, linewidth=1.2)
        upper.set(xlabel="iteration of the search", title=model_name(sharedness))
        upper.set_yscale("symlog", linthresh=8, base=2)
        upper.set_ylim(0, 290)
        lower.set_xscale("symlog", linthresh=8, base=2)
        lower.set(xlabel="eps that was asked (pixel units, log scale)", xlim=(0, 290))
        for scale in (upper.yaxis, lower.xaxis):
            plain_ticks(scale, [0, 4, 8, 16, 32, 64, 128, 255])
        upper.set_xticks(range(1, len(asked) + 1))
        upper.set_ylabel("eps (pixel units, log scale)" if upper is axes[0][0] else "")
        percent(lower, "success rate" if lower is axes[1][0] else "")
        upper.legend(fontsize=9, loc="upper right")
    axes[1][0].legend(fontsize=9, loc="lower right")
    title = "Binary search for the smallest universal perturbation"
    return finish(figure, f"{title} · {_first(records).labels['dataset']}")


def robustness_curves(adversarial: Mapping[int | None, Record], universal: Mapping[int | None, Record]) -> Figure:
    """Share of images fooled within eps, each by its own perturbation and all by one; delta cuts both curves."""
    figure, axis = plt.subplots(figsize=(8.2, 4.4))
    smallest = 0.25  # where the logarithmic axis begins; what is fooled at eps = 0 is drawn there
    for sharedness, record in adversarial.items():
        style = {"color": look(sharedness)["color"], "linewidth": 2}
        epsilons = np.sort(record.arrays("epsilons")["epsilons"])
        share = np.arange(1, len(epsilons) + 1) / len(epsilons)
        reached = np.isfinite(epsilons)
        later = reached & (epsilons > smallest)
        x = np.concatenate([[smallest], epsilons[later], [255.0]])
        y = np.concatenate([[np.mean(epsilons <= smallest)], share[later], [reached.mean()]])
        axis.step(x, y, where="post", label=f"{model_name(sharedness)}: image-dependent", **style)
        # Without the question eps = 0: a line from there would cross what nobody asked.
        asked = sorted(universal[sharedness].metrics["evaluations"][1:], key=lambda q: q["eps"])
        x, y = [q["eps"] for q in asked], [q["rate"] for q in asked]
        axis.plot(x, y, linestyle="--", marker=".", label=f"{model_name(sharedness)}: universal", **style)
        for value, marker in ((record.metrics["eps_adv"], "o"), (universal[sharedness].metrics["eps_uni"], "D")):
            if value is not None:
                axis.plot(max(value, smallest), record.settings["delta"], marker, markersize=8, **style)
    delta = _first(adversarial).settings["delta"]
    axis.axhline(delta, color="0.4", linestyle=":", zorder=1, label=f"delta = {delta:g}")
    axis.set_xscale("log", base=2)
    plain_ticks(axis.xaxis, [smallest, 1, 4, 16, 64, 255])
    axis.set(xlabel="eps (pixel units, log scale)", xlim=(smallest, 260))
    for name, marker in (("$\\varepsilon_{adv}(\\delta)$", "o"), ("$\\varepsilon_{uni}(\\delta)$", "D")):
        axis.plot([], [], marker, color="0.4", markersize=8, label=name)
    percent(axis, "images fooled within eps")
    axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return finish(figure, f"Robustness to both kinds of perturbation · {_first(adversarial).labels['dataset']}")
