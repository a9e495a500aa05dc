"""Figures from records alone: one function for each figure or table, provenance in every file.

This module holds what all of them share. `pictures` and `method` draw sections 3 to 5, `cifar10` section 6.1,
`imagenet` section 6.2, `scenes` sections 6.3 and 6.4 and Figure 1.
Every function takes plain values and records, returns a matplotlib Figure, and is written to disk by `save` alone.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from PIL import Image

from satlib.errors import SatlibError
from satlib.paths import project_root
from satlib.study.ledger import Ledger
from satlib.study.records import Record

# The colour-blind-safe palette of seaborn 0.13.
BLUE, ORANGE, GREEN, VERMILION, PURPLE = PALETTE = ("#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc")
RED = "#b2182b"  # a wrong prediction, a failed attack

# One colour and one marker for each kind of model wherever it appears.
ERM = {"color": "black", "marker": "*"}
BY_SHAREDNESS = {
    1: {"color": VERMILION, "marker": "o"},
    8: {"color": ORANGE, "marker": "s"},
    32: {"color": BLUE, "marker": "D"},  # the large sharedness of section 6.2
    64: {"color": BLUE, "marker": "D"},
}
BY_FAMILY = {"ERM": ERM} | {f"s = {s}": look for s, look in BY_SHAREDNESS.items()}
BY_FAMILY |= {
    "DeepFool UAD": {"color": GREEN, "marker": "^"},
    "fictitious play": {"color": PURPLE, "marker": "v"},
    "universal adversarial training": {"color": "#949494", "marker": "P"},
}
REFERENCE = {"color": "0.45", "linestyle": "none", "marker": "x", "markeredgewidth": 2}  # the paper's own numbers


def use_style() -> None:
    """The one figure style; notebooks call it once."""
    plt.style.use(["default", "seaborn-v0_8-whitegrid", "seaborn-v0_8-notebook"])
    matplotlib.rcParams.update(
        {
            "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
            "figure.dpi": 110,
            "savefig.dpi": 120,
            "figure.constrained_layout.use": True,
            "axes.titlesize": "medium",
            "axes.titleweight": "bold",
            "image.interpolation": "nearest",
            "svg.hashsalt": "satlib",
        }
    )


def as_picture(image: np.ndarray) -> np.ndarray:
    """(C, H, W) in 0..255 -> (H, W, C) uint8, as imshow takes it."""
    return np.clip(np.rint(image), 0, 255).astype(np.uint8).transpose(1, 2, 0)


def perturbation_picture(perturbation: np.ndarray, eps: float | None = None) -> np.ndarray:
    """A perturbation (C, H, W) in pixel units, shown around mid-grey and stretched so that +-eps fills 0..255."""
    eps = float(np.abs(perturbation).max()) if eps is None else eps
    return as_picture(127.5 + perturbation * (127.5 / eps if eps else 0.0))


def save(
    figure: Figure, name: str, *, profile: str, records: Iterable[Record], alt: str = "", root: Path | None = None
) -> Path:
    """Write figures/<profile>/<name>.png and .pdf, both naming the records that they were drawn from.

    The PNG carries the text chunk `satlib`, the PDF the same JSON as its keywords: profile, figure, data sets, and
    the digest of every record by its id; `verify` checks them. alt, what the picture shows in words, stands in the
    PNG's `Description` and the PDF's subject. Returns the PNG's path.
    """
    records = list(records)
    provenance = json.dumps(
        {
            "figure": name,
            "profile": profile,
            "datasets": sorted({record.labels.get("dataset", "") for record in records}),
            "records": {record.id: record.digest for record in records},
        },
        sort_keys=True,
    )
    folder = (root or project_root() / "figures") / profile
    try:
        folder.mkdir(parents=True, exist_ok=True)
        png, pdf = folder / f"{name}.png", folder / f"{name}.pdf"
        figure.savefig(
            png.with_suffix(".png.new"),
            format="png",
            metadata={"satlib": provenance, "Description": alt, "Software": None},
        )
        with PdfPages(
            pdf.with_suffix(".pdf.new"),
            metadata={"Keywords": provenance, "Subject": alt, "CreationDate": None, "Producer": None},
        ) as pages:
            pages.savefig(figure)
        png.with_suffix(".png.new").replace(png)
        pdf.with_suffix(".pdf.new").replace(pdf)
    except OSError as error:
        raise SatlibError(f"cannot write {folder}: {error.strerror}; make it writable, or free some space") from None
    return png


def alt_text(picture: Path) -> str:
    """What a PNG that `save` wrote says it shows; empty where it says nothing."""
    with Image.open(picture) as image:
        return getattr(image, "text", {}).get("Description", "")


def verify(folder: Path, ledger: Ledger | None = None) -> tuple[int, list[str]]:
    """Check every PNG below `folder` against the records that it names: (figures checked, problems found)."""
    digests = {record.id: record.digest for record in (ledger or Ledger()).records()}
    problems = []
    files = sorted(Path(folder).rglob("*.png"))
    if not files:
        raise SatlibError(f"{folder}: no figures (*.png) to verify; draw some with ./run_all.sh first")
    for file in files:
        with Image.open(file) as image:
            text = getattr(image, "text", {}).get("satlib")
        if text is None:
            problems.append(f"{file}: names no records; draw it again")
            continue
        for run_id, digest in json.loads(text)["records"].items():
            if run_id not in digests:
                problems.append(f"{file}: its record {run_id[:12]} is missing or damaged; run ./run_all.sh again")
            elif digests[run_id] != digest:
                problems.append(f"{file}: its record {run_id[:12]} has changed since; draw it again")
    return len(files), problems


def panel_grid(rows: int, columns: int, *, size: float = 1.1) -> tuple[Figure, np.ndarray]:
    """A figure of small square picture panels without ticks; axes (rows, columns)."""
    figure, axes = plt.subplots(rows, columns, figsize=(size * columns, size * rows), squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        for spine in axis.spines.values():
            spine.set_visible(False)
    return figure, axes
