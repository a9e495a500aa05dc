"""Perturbations from outside: a bound that anybody may lower."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from satlib.attacks import success_rates
from satlib.data import Splits
from satlib.errors import SatlibError
from satlib.files import replacing, writing
from satlib.paths import project_root
from satlib.robustness import LARGEST
from satlib.study.measurement import Run, measurement
from satlib.study.measurements.robustness import report_images
from satlib.study.records import Workspace


@measurement(version=1, artefacts=("perturbation",))
def bound(
    model: Module,
    data: Splits,
    work: Workspace,
    *,
    perturbation: str,
    author: str,
    delta: float,
    images: dict,
    sets: dict,
) -> dict:
    """What a perturbation from outside does on the images that report: its size, and the share that it wins, in float32
    and clamped to 0..255. perturbation: the SHA-256 of a file in data/bounds/, where `taken` has put it."""
    xi, report = load(stored(perturbation)), report_images(data, sets, images)
    if digest_of(xi) != perturbation:
        raise SatlibError(f"{stored(perturbation)} is damaged: its SHA-256 is another; offer the perturbation again")
    work.save_arrays("perturbation", {"perturbation": xi.numpy()})
    eps, rate = rated(model, data, xi, sets, images)
    return {"eps_uni": eps, "report_rate": rate, "success": rate >= delta - 1e-7, "images": {"report": len(report)}}


def rated(model: Module, data: Splits, xi: Tensor, sets: dict, images: dict) -> tuple[float, float]:
    """The size of a perturbation (1, C, H, W), and the share of the images that report that it wins."""
    report = report_images(data, sets, images)
    if xi.shape[1:] != report.images.shape[1:]:
        raise SatlibError(f"a perturbation of shape {tuple(xi.shape)}: expected {(1, *report.images.shape[1:])}")
    return xi.abs().max().item(), success_rates(model, report.images, report.labels, xi.to(report.device)).item()


def load(path: Path) -> Tensor:
    """A perturbation of a .npy file, (C, H, W) or (1, C, H, W) in pixel units, as float32 (1, C, H, W)."""
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SatlibError(f"cannot read a perturbation from {path} ({reason}); numpy.save writes one") from None
    plain = isinstance(values, np.ndarray) and values.dtype.kind in "fiu" and values.ndim in (3, 4)
    if not plain or not values.size or (values.ndim == 4 and len(values) != 1):
        shape = getattr(values, "shape", type(values).__name__)
        raise SatlibError(f"{path} holds {shape}: expected numbers (C, H, W), or (1, C, H, W), in pixel units")
    xi = torch.from_numpy(values.astype(np.float32)).reshape(1, *values.shape[-3:])
    if not bool(xi.isfinite().all()) or xi.abs().max() > LARGEST:
        raise SatlibError(f"{path}: values up to {xi.abs().max():g}: expected finite ones of at most {LARGEST:g}")
    return xi


def stored(digest: str) -> Path:
    """Where a perturbation from outside is kept."""
    return project_root() / "data" / "bounds" / f"{digest}.npy"


def digest_of(xi: Tensor) -> str:
    """The SHA-256 of its float32 values."""
    return hashlib.sha256(xi.contiguous().numpy().tobytes()).hexdigest()


def taken(xi: Tensor) -> str:
    """Keep a perturbation from outside; returns the SHA-256 that names its file."""
    path = stored(digest := digest_of(xi))
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new, new.open("wb") as file:
            np.save(file, xi.numpy())
    return digest


def bound_run(model: Run, search: Run, digest: str, author: str) -> Run:
    """What the perturbation does on the images on which a search of the model reports."""
    given = {name: search.settings[name] for name in ("delta", "images", "sets")}
    title = f"bound on {model.title} by {author}"
    section = str(model.labels["section"])
    more = {"dataset": model.dataset, "section": section, "perturbation": digest, "author": author}
    return bound.plan(None, title, model=model, **given, **more)
