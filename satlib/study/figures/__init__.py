"""Figures from records alone: one function for each figure, provenance in every file.

This module holds what all of them share. `method` draws sections 3 to 5, with `pictures` for what is made of images;
`classification` sections 6.1 and 6.2, `scenes` sections 6.3 and 6.4 and Figure 1, `evaluation_checks` notebook 09.
Every function takes plain values and records and returns a matplotlib Figure, which `save` alone writes.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from satlib.errors import SatlibError
from satlib.files import replacing, writing
from satlib.paths import project_root
from satlib.robustness import LARGEST
from satlib.study.ledger import Ledger
from satlib.study.records import Record

# The colour-blind-safe palette of seaborn 0.13.
BLUE, ORANGE, GREEN, VERMILION, PURPLE = PALETTE = ("#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc")
RED = "#b2182b"  # a wrong prediction, a failed attack

# One colour and one marker for each kind of model wherever it appears.
ERM = {"color": "black", "marker": "*"}
BY_FAMILY = {
    "ERM": ERM,
    "s = 1": {"color": VERMILION, "marker": "o"},
    "s = 8": {"color": ORANGE, "marker": "s"},
    **{f"s = {s}": {"color": BLUE, "marker": "D"} for s in (5, 32, 64)},  # what the paper proposes
    "DeepFool UAD": {"color": GREEN, "marker": "^"},
    "fictitious play": {"color": PURPLE, "marker": "v"},
    "universal adversarial training": {"color": "#949494", "marker": "P"},
    "class-wise training": {"color": "#ca9161", "marker": "<"},
    "meta adversarial training": {"color": "#fbafe4", "marker": ">"},
    "Jacobian regularisation": {"color": "#ece133", "marker": "p"},
    "pooled shared training": {"color": "#56b4e9", "marker": "d"},
}
OTHER = {"color": "tab:brown", "marker": "h"}  # a sharedness that the paper does not use
REFERENCE = {"color": "0.45", "linestyle": "none", "marker": "x", "markeredgewidth": 2}  # the paper's own numbers

Named = tuple[float, float, str, str]  # where a point is, what is written beside it, and in which colour

ACCURACY = "accuracy on clean test images (%)"
EPS = "eps (pixel units of 255)"
LARGE = 60_000  # bytes of a PNG, beyond which it gets a palette


def use_style() -> None:
    """The one figure style; notebooks call it once."""
    ours = {"axes.prop_cycle": matplotlib.cycler(color=PALETTE), "figure.dpi": 110, "savefig.dpi": 120}
    ours |= {"figure.constrained_layout.use": True, "image.interpolation": "nearest"}
    ours |= {"axes.titlesize": "medium", "axes.titleweight": "bold"}
    plt.style.use(["default", "seaborn-v0_8-whitegrid", "seaborn-v0_8-notebook", ours])


def look(model: str | int | None) -> dict[str, str]:
    """Colour and marker of a model: by family, by a title that begins with it, or by sharedness (None: undefended)."""
    name = "ERM" if model is None else f"s = {model}" if isinstance(model, int) else model.partition(",")[0]
    return BY_FAMILY.get(name.replace("s=", "s = "), OTHER)


def robustness_label(kind: str, delta: float) -> str:
    """What an axis says for the robustness of `kind` "uni" or "adv" at a success rate delta."""
    return rf"$\varepsilon_{{{kind}}}(\delta={delta:g})$ (pixel units of 255)"


def height_of(eps: float | None) -> float:
    """Where a robustness is drawn: what nothing reached stands at the end of the interval that was searched."""
    return LARGEST if eps is None else eps


def percent(axis: Axes, label: str) -> None:
    """Shares from 0 to 1 on the vertical axis, written in percent."""
    axis.set(ylim=(-0.03, 1.03), ylabel=label)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))


def plain_ticks(scale: Axis, ticks: Sequence[float] | Locator) -> None:
    """Ticks of a logarithmic scale where they are wanted, written as plain numbers."""
    scale.set_major_locator(ticks if isinstance(ticks, Locator) else FixedLocator(ticks))
    scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    scale.set_minor_locator(NullLocator())


def name_points(axis: Axes, texts: Sequence[Named], *, fontsize: float = 8.5) -> None:
    """Write a text beside each point, where it covers least of the points, of other texts, and of what is outside.

    The axis has its limits already, and all points that are to stay visible.
    """
    figure, points = axis.get_figure(), [xy for line in axis.lines for xy in line.get_xydata()]
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # so that the axis has its place
    scale, frame = figure.dpi / 72, axis.get_window_extent()
    centres = axis.transData.transform(np.array(points)) if points else np.zeros((0, 2))
    taken = [Bbox.from_bounds(x - 4 * scale, y - 4 * scale, 8 * scale, 8 * scale) for x, y in centres]
    for x, y, text, color in texts:
        lines = text.replace(", ", ",\n", 1).splitlines() if len(text) > 12 else [text]
        width, height = 0.56 * fontsize * max(map(len, lines)), 1.25 * fontsize * len(lines)  # in points, about
        left, middle, low = -width - 6, -width / 2, -height - 4
        places = [(6, 3), (6, low), (left, 3), (left, low), (middle, 7), (middle, low - 3), (12, 9), (left - 6, 9)]
        centre = axis.transData.transform((x, y))
        boxes = [Bbox.from_bounds(*(*(centre + np.multiply(p, scale)), width * scale, height * scale)) for p in places]
        best = min(range(len(places)), key=[_covered(box, taken, frame) for box in boxes].__getitem__)
        taken.append(boxes[best])
        style = {"fontsize": fontsize, "color": color, "va": "bottom", "ha": "left", "linespacing": 1.1}
        axis.annotate("\n".join(lines), (x, y), places[best], textcoords="offset points", **style)


def _covered(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> float:
    """How much of a box lies outside of a frame or covers what is taken."""

    def common(other: Bbox) -> float:
        shared = Bbox.intersection(box, other)
        return shared.width * shared.height if shared else 0.0

    return box.width * box.height - common(frame) + sum(map(common, taken))


def finish(
    figure: Figure, title: str, *, legend: Axes | Sequence[Artist] = (), size: float = 12, **options: Any
) -> Figure:
    """The figure with its title and, below it, one legend: of what is drawn on those axes, or of labelled artists."""
    handles = legend.get_legend_handles_labels()[0] if isinstance(legend, Axes) else legend
    if handles:
        figure.legend(handles=handles, loc="outside lower center", **{"ncols": 4} | options)
    figure.suptitle(title, fontsize=size)
    return figure


def as_picture(image: np.ndarray) -> np.ndarray:
    """(C, H, W) in 0..255 -> (H, W, C) uint8, as imshow takes it."""
    return np.clip(np.rint(image), 0, 255).astype(np.uint8).transpose(1, 2, 0)


def perturbation_picture(perturbation: np.ndarray, eps: float | None = None) -> np.ndarray:
    """A perturbation (C, H, W) in pixel units, shown around mid-grey and stretched so that +-eps fills 0..255."""
    eps = float(np.abs(perturbation).max()) if eps is None else eps
    return as_picture(127.5 + perturbation * (127.5 / eps if eps else 0.0))


def picture_panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure (inches) of picture panels without ticks or frames, and its axes (rows, columns)."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    return figure, axes


def show_picture(axis: Axes, picture: np.ndarray, caption: str = "", **style: Any) -> None:
    """A picture (H, W, C), with a caption below it."""
    axis.imshow(picture)
    if caption:
        axis.set_xlabel(caption, **{"fontsize": 9, "labelpad": 2} | style)


def name_row(axis: Axes, name: str, *, fontsize: float = 9, labelpad: float = 6) -> None:
    """The name of a row of pictures, to the left of its first."""
    axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=fontsize, labelpad=labelpad)


def save(
    figure: Figure, name: str, *, profile: str, records: Iterable[Record], alt: str = "", root: Path | None = None
) -> Path:
    """Write figures/<profile>/<name>.png and .pdf, both naming the records that they were drawn from.

    The PNG carries the text chunk `satlib`, the PDF the same JSON as its keywords: profile, figure, data sets, and
    the digest of every record by its id; `verify` checks them. alt, what the picture shows in words, stands in the
    PNG's `Description` and the PDF's subject. Returns the PNG's path; raises SatlibError where it cannot be written.
    """
    records = list(records)
    about = {
        "figure": name,
        "profile": profile,
        "datasets": sorted({record.labels.get("dataset", "") for record in records}),
        "records": {record.id: record.digest for record in records},
    }
    provenance = json.dumps(about, sort_keys=True)
    png = (root or project_root() / "figures") / profile / f"{name}.png"
    with writing(png.parent):
        png.parent.mkdir(parents=True, exist_ok=True)
        with replacing(png) as new:
            figure.savefig(new, format="png", metadata={"satlib": provenance, "Description": alt, "Software": None})
            if new.stat().st_size > LARGE:
                to_palette(new)
        with replacing(png.with_suffix(".pdf")) as new:
            words = {"Keywords": provenance, "Subject": alt, "CreationDate": None, "Producer": None}
            figure.savefig(new, format="pdf", metadata=words)
    return png


def to_palette(png: Path) -> None:
    """Write a PNG anew in its 256 best colours, which makes galleries half as large; its texts stay."""
    with Image.open(png) as image:
        texts = PngInfo()
        for name in ("satlib", "Description"):
            texts.add_itxt(name, image.info[name])
        few, dpi = image.convert("RGB").quantize(256), image.info.get("dpi")
    few.save(png, format="PNG", optimize=True, pnginfo=texts, dpi=dpi)


def alt_text(picture: Path) -> str:
    """What a PNG that `save` wrote says it shows; empty where it says nothing."""
    with Image.open(picture) as image:
        return image.info.get("Description", "")


def verify(folder: Path, ledger: Ledger | None = None) -> tuple[int, list[str]]:
    """Check every PNG below `folder` against the records that it names: (figures checked, problems found)."""
    digests = {record.id: record.digest for record in (ledger or Ledger()).records()}
    problems, files = [], sorted(Path(folder).rglob("*.png"))
    if not files:
        raise SatlibError(f"{folder}: no figures (*.png) to verify; draw some with ./run_all.sh first")
    for file in files:
        with Image.open(file) as image:
            text = image.info.get("satlib")
        if text is None:
            problems.append(f"{file}: names no records; draw it again")
        for run_id, digest in json.loads(text)["records"].items() if text else ():
            if run_id not in digests:
                problems.append(f"{file}: its record {run_id[:12]} is missing or damaged; run ./run_all.sh again")
            elif digests[run_id] != digest:
                problems.append(f"{file}: its record {run_id[:12]} has changed since; draw it again")
    return len(files), problems
