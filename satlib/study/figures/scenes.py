"""Figures of sections 6.3 and 6.4, and Figure 1: segmentations, and the perturbations that change them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from satlib.robustness import LARGEST
from satlib.study.claims.scenes import SceneModel
from satlib.study.figures import BLUE, RED, VERMILION, as_picture, perturbation_picture

# The colours of Cityscapes' own pictures, by what a class shows.
COLOURS = {
    **dict.fromkeys(("road",), (128, 64, 128)),
    **dict.fromkeys(("sidewalk", "pavement"), (244, 35, 232)),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    **dict.fromkeys(("traffic sign", "sign symbol", "sign"), (220, 220, 0)),
    **dict.fromkeys(("vegetation", "tree"), (107, 142, 35)),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    **dict.fromkeys(("person", "pedestrian"), (220, 20, 60)),
    **dict.fromkeys(("rider", "bicyclist"), (255, 0, 0)),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}
LOOKS = {  # the paper's colours and markers in Figure 5
    "ERM": {"color": "black", "marker": "*"},
    "s = 1": {"color": VERMILION, "marker": "o"},
    "s = 5": {"color": BLUE, "marker": "D"},
}
HOLLOW = {"markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.5, "linestyle": "none"}
SMALL = {"textcoords": "offset points", "fontsize": 8, "color": "0.35"}
OTHER = {"color": "tab:brown", "marker": "h"}


def colour(labels: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """A segmentation (H, W) as a picture (H, W, 3) uint8; what has no class is black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    for index, name in enumerate(classes):
        table[index] = COLOURS.get(name, (255, 255, 255))
    return table[labels.astype(np.uint8)]


def figure5(models: Sequence[SceneModel], reported: Mapping[str, float], *, delta: float, dataset: str) -> Figure:
    """Figure 5: mean IoU (left), eps_adv (middle) and eps_uni (right) along the training of each defence.

    The undefended model is a dashed line, untargeted results stand by themselves at the last epoch; what nothing
    reached stands on a dotted line at 255. reported: the paper's numbers by their keys, drawn as crosses beside the
    last epoch.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13.0, 4.6))
    last = max((look.epoch for m in models if m.family != "ERM" for look in m.curve), default=1)
    values = (("iou", None, None), ("eps_adv", "error", "untargeted_adv"), ("eps_uni", None, "untargeted"))
    for axis, (name, error, untargeted) in zip(axes, values, strict=True):
        for m in models:
            look = LOOKS.get(m.family, OTHER)
            if m.family == "ERM":
                level = _shown(getattr(m, name))
                axis.axhline(level, color="black", linestyle="--", linewidth=1.2, label="ERM (undefended)")
            else:
                spread = [getattr(each, error) or 0.0 for each in m.curve] if error else None
                xs, ys = [each.epoch for each in m.curve], [_shown(getattr(each, name)) for each in m.curve]
                axis.errorbar(xs, ys, yerr=spread, capsize=3, linewidth=1.5, markersize=6, label=m.title, **look)
            if untargeted:
                place = 1.06 * last if m.family != "ERM" else 1.11 * last
                axis.plot(place, _shown(getattr(m, untargeted)), **look, **HOLLOW)
        if untargeted and any(
            each is None for m in models for each in (getattr(m, untargeted), *(getattr(e, name) for e in m.curve))
        ):
            axis.axhline(LARGEST, color="0.6", linestyle=":", linewidth=1.0)
            axis.annotate("> 255: never reached", (0.02 * last, LARGEST), xytext=(0, 3), **SMALL)
        axis.set(xlabel="epoch of fine-tuning", xlim=(0, 1.2 * last))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _paper_marks(axes, reported, 1.16 * last)
    axes[0].set(ylabel="mean IoU on clean test scenes (%)", title="clean images")
    axes[1].set(ylabel=f"$\\varepsilon_{{adv}}(\\delta={delta:g})$ (pixel units of 255)", title="image-dependent")
    axes[2].set(ylabel=f"$\\varepsilon_{{uni}}(\\delta={delta:g})$ (pixel units of 255)", title="universal")
    for axis in axes:
        axis.set_ylim(bottom=0)
    handles, labels = axes[2].get_legend_handles_labels()
    handles += [
        plt.Line2D([], [], color="0.3", marker="o", **HOLLOW),
        plt.Line2D([], [], color="0.45", marker="x", linestyle="none", markeredgewidth=2),
    ]
    figure.legend(
        handles, [*labels, "untargeted", "the paper (Cityscapes, delta = 0.95)"], loc="outside lower center", ncols=5
    )
    figure.suptitle(f"Robustness along the training, lines: for the target scene · {dataset}", fontsize=12)
    return figure


def _paper_marks(axes: np.ndarray, reported: Mapping[str, float], place: float) -> None:
    """The paper's numbers, named, at the right edge of the panels that they belong to."""
    marks = (
        (0, "cityscapes/erm/iou", "ERM"),
        (1, "cityscapes/s1/eps_adv", "s = 1"),
        (1, "cityscapes/s5/eps_adv", "s = 5"),
        (2, "cityscapes/erm/eps_uni_targeted", "ERM"),
        (2, "cityscapes/s1/eps_uni_targeted", "s = 1"),
        (2, "cityscapes/s5/eps_uni_targeted", "s = 5"),
    )
    for panel, key, name in marks:
        axes[panel].plot(place, reported[key], color="0.45", marker="x", markeredgewidth=2, linestyle="none")
        axes[panel].annotate(name, (place, reported[key]), xytext=(-6, -3), ha="right", **SMALL)


def _shown(value: float | None) -> float:
    """What nothing reached stands at the end of the interval."""
    return LARGEST if value is None else value


def segmentations(
    rows: Sequence[Mapping[str, Any]], classes: Sequence[str], *, title: str, columns: Sequence[str]
) -> Figure:
    """Rows of pictures and segmentations, with a legend of the classes that are seen.

    rows: `title`, and `panels`: for each column (kind, array), kind "picture" (C, H, W) in 0..255, "perturbation"
    (C, H, W) in pixel units, "labels" (H, W), or None for an empty one; and `captions` for them, where there are any.
    """
    shape = next(array.shape[-2:] for row in rows for panel in row["panels"] if panel for array in [panel[1]])
    width = 2.5
    height = width * shape[0] / shape[1]
    captions = any(row.get("captions") for row in rows)
    size = (width * len(columns) + 1.2, (height + (0.3 if captions else 0.1)) * len(rows) + 1.1)
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False)
    seen: set[int] = set()
    for row, line in zip(rows, axes, strict=True):
        for column, (axis, panel) in enumerate(zip(line, row["panels"], strict=True)):
            _bare(axis)
            if panel is None:
                continue
            kind, array = panel
            if kind == "labels":
                seen |= set(np.unique(array).tolist())
                axis.imshow(colour(array, classes))
            else:
                axis.imshow(as_picture(array) if kind == "picture" else perturbation_picture(array))
            if caption := row.get("captions", {}).get(column):
                axis.set_xlabel(caption, fontsize=8, labelpad=2)
        line[0].set_ylabel(
            row["title"].replace(", ", "\n"), fontsize=9, rotation=0, ha="right", va="center", labelpad=6
        )
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name, fontsize=9)
    shown = [(classes[i], COLOURS.get(classes[i], (255, 255, 255))) for i in sorted(seen) if i < len(classes)]
    handles = [Patch(color=tuple(value / 255 for value in rgb), label=name) for name, rgb in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), int(size[0] / 1.1)), fontsize=8)
    figure.suptitle(title, fontsize=11 if size[0] > 7 else 9)
    return figure


def _bare(axis: Axes) -> None:
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def structure(measured: Mapping[str, Mapping[str, Any]], *, dataset: str) -> Figure:
    """How far perturbations weaken the edges of their image, and how far they add those of the target (section 6.4).

    measured: metrics of `perturbation_structure` by a model's title. Every dot is a test scene, bars are means.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11.0, 4.2))
    labels = (
        ("weakening", "weakens the edges of the image\n(minus cosine of both gradients)"),
        ("target_structure", "has its edges on the target's boundaries\n(correlation)"),
    )
    random = np.random.default_rng(0)
    for axis, (name, text) in zip(axes, labels, strict=True):
        for place, metrics in enumerate(measured.values()):
            for shift, kind, hue in ((-0.2, "own", RED), (0.2, "universal", BLUE)):
                values = np.asarray(metrics[kind][name])
                axis.bar(place + shift, values.mean(), width=0.36, color=hue, alpha=0.45)
                jitter = random.uniform(-0.1, 0.1, len(values))
                axis.plot(place + shift + jitter, values, linestyle="none", marker="o", markersize=3.5, color=hue)
            axis.axhline(0, color="0.3", linewidth=0.8)
        axis.set_xticks(range(len(measured)), [name.replace(", ", "\n") for name in measured], fontsize=9)
        axis.set_ylabel(text)
        axis.grid(axis="x", visible=False)
    handles = [Patch(color=RED, alpha=0.6, label="image-dependent"), Patch(color=BLUE, alpha=0.6, label="universal")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    eps = next(iter(measured.values()))["eps"]
    figure.suptitle(f"What perturbations of eps = {eps:g} do, each dot a test scene · {dataset}", fontsize=12)
    return figure


def hiding(scores: Sequence[tuple[SceneModel, Sequence[Mapping[str, Any]]]], *, hide: str, dataset: str) -> Figure:
    """The dynamic target: how much of the hidden class is gone, and how much of the rest stays, against eps.

    scores: models, each with those of its `hiding` record.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11.0, 4.2), sharex=True)
    for model, found in scores:
        eps = [score["eps"] for score in found]
        for axis, name in zip(axes, ("hidden", "kept"), strict=True):
            shares = [np.nan if score[name] is None else 100 * score[name] for score in found]
            axis.plot(eps, shares, label=model.title, **LOOKS.get(model.family, OTHER))
    axes[0].set(ylabel=f"pixels of {hide!r} that are gone (%)", ylim=(0, 102), xlabel="eps (pixel units of 255)")
    axes[1].set(ylabel="other pixels that stay as they were (%)", ylim=(0, 102), xlabel="eps (pixel units of 255)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"One perturbation that hides every {hide} · {dataset}", fontsize=12)
    return figure


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
    figure, axes = plt.subplots(2, columns, figsize=(2.6 * columns, 5.4), squeeze=False)
    for axis in axes.flat:
        _bare(axis)
    for line, rows, dataset in zip(axes, (classified, segmented), datasets, strict=True):
        line[0].imshow(as_picture(rows[0].clean))
        line[0].set_xlabel(f"clean\n{dataset}", fontsize=8)
        place = 1
        for row in rows:
            line[place].imshow(as_picture(row.clean + row.xi))
            line[place].set_title(f"{row.title}\n{row.words}", fontsize=8)
            if isinstance(row.seen, str):
                line[place].set_xlabel(f"taken for: {row.seen}", fontsize=9)
            else:
                place += 1
                line[place].imshow(colour(row.seen, classes))
                line[place].set_xlabel("what is seen", fontsize=9)
            place += 1
        for axis in line[place:]:
            axis.set_visible(False)
    axes[0, 0].set_ylabel("classification", fontsize=10)
    axes[1, 0].set_ylabel("segmentation", fontsize=10)
    figure.suptitle("The universal perturbations that it takes: undefended against defended", fontsize=11)
    return figure
