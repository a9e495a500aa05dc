"""What notebooks need beside the kernels: a kernel's own code shown in place, and figures saved as they are shown."""

import ast
import inspect
import io
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import torch
from IPython.display import Code, Image, Markdown, display
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from satlib.attacks import perturb
from satlib.data import ImageSet
from satlib.device import exact
from satlib.paths import project_root
from satlib.study import figures
from satlib.study.claims import Model
from satlib.study.measurements.scenes import perturbation_of
from satlib.study.records import Record
from satlib.study.results import BY_WEIGHT
from satlib.study.runs import Run, Runner


def show_source(*functions: Callable) -> None:
    """Display the code of satlib functions as it stands in the module, never a copy that could go stale: of each its
    name and arguments, and its body without the docstring. Classes are shown whole."""
    display(Code("\n\n\n".join(map(core, functions)), language="python"))


def core(function: Callable) -> str:
    """The source of a function without docstring, decorators, types and defaults; of a class all of it."""
    source = textwrap.dedent(inspect.getsource(function)).rstrip()
    node = ast.parse(source).body[0]
    if not isinstance(node, ast.FunctionDef):
        return source
    told = ast.get_docstring(node) is not None and len(node.body) > 1
    first = node.body[0].end_lineno if told else node.body[0].lineno - 1  # so that comments at the top stay
    given = ", ".join(argument.arg for argument in (*node.args.args, *node.args.kwonlyargs))
    given += f", **{node.args.kwarg.arg}" if node.args.kwarg else ""
    name = f"def {node.name}({given}):"
    return "\n".join([name, *source.splitlines()[first:]])


def show(figure: Figure, name: str, *, alt: str, profile: str, records: Iterable[Record], caption: str = "") -> None:
    """Save the figure under figures/<profile>/ with its provenance, and display a copy of it, with a caption below.

    alt: what the picture shows, in words, for readers who cannot see it; caption: what it says, in Markdown.
    """
    path = figures.save(figure, name, profile=profile, records=records, alt=alt)
    plt.close(figure)
    _display_picture(path, int(figure.get_size_inches()[0] * 96), caption)


def show_best(name: str, *, caption: str, width: int = 1000) -> None:
    """Display the figure of that name from the best published records that there are, with a caption that also says
    which: those of the weightiest profile that has one."""
    folders = (project_root() / "figures" / profile for profile in BY_WEIGHT)
    if path := next((file for folder in folders if (file := folder / f"{name}.png").is_file()), None):
        _display_picture(path, width, f"{caption} (Published records, profile `{path.parent.name}`.)")


def _display_picture(path: Path, width: int, caption: str) -> None:
    """A copy in 256 colours, so that notebooks stay small."""
    copy = io.BytesIO()
    with PIL.Image.open(path) as picture:
        picture.convert("RGB").quantize(256).save(copy, "PNG", optimize=True)
    display(Image(data=copy.getvalue(), format="png", width=width, alt=figures.alt_text(path)))
    if caption:
        display(Markdown(f"*{caption}*"))


def broken_by(runner: Runner, models: Iterable[Model], pictures: ImageSet) -> list[dict]:
    """Rows of `classification.perturbation_gallery`: each model's universal perturbation, and what it predicts of the
    pictures, the first of the test set, under it. Weights are needed only where no `predictions` were recorded."""
    rows = []
    for model in models:
        xi = model.searches[0].tensors("perturbation")["perturbation"].to(runner.device)
        if model.predictions:
            predicted = model.predictions.metrics["first"]["perturbed"][: len(pictures)]
        else:
            with torch.no_grad(), exact():
                logits = runner.model(model.run)(perturb(pictures.images[:].float(), xi, len(pictures)))
            predicted = logits.argmax(1).tolist()
        pairs = zip(predicted, pictures.labels.tolist(), strict=True)
        rows.append(
            {
                "title": model.title,
                "eps_uni": model.searches[0].metrics["eps_uni"],
                "perturbation": xi[0].cpu().numpy(),
                "predictions": [(pictures.classes[p], p == y) for p, y in pairs],
            }
        )
    return rows


class Segmented(NamedTuple):
    """What a model sees under a universal perturbation: xi (C, H, W) in pixel units, seen (H, W), eps its size, and in
    words how far it got."""

    xi: np.ndarray
    seen: np.ndarray
    eps: float
    words: str


def segmented(runner: Runner, seen: Run, attack: str) -> Segmented:
    """What a model makes of the first test scene under its "targeted" or "untargeted" universal perturbation, from a
    run of kind `segmentations`."""
    search = runner.record(seen.parents[attack])
    xi, reached = perturbation_of(search)[0].numpy(), search.metrics["rate"] is not None
    eps, rate = float(abs(xi).max()), max(e["rate"] for e in search.metrics["evaluations"])
    words = f"eps_uni = {eps:.1f}" if reached else f"eps_uni > 255; eps = {eps:.0f} wins {100 * rate:.0f} %"
    return Segmented(xi, runner.record(seen, whole=True).arrays("segmentations")[attack], eps, words)


def table(frame: pd.DataFrame, *, caption: str = "", precision: int = 1) -> Styler:
    """The frame as a cell's last value shows it: text to the left, numbers to the right, no index, None as a dash."""
    words = [name for name in frame.columns if not pd.api.types.is_numeric_dtype(frame[name].dropna().infer_objects())]
    left = {name: [{"selector": "th, td", "props": "text-align: left"}] for name in words}
    styler = frame.style.hide(axis="index").format(precision=precision, na_rep="–").set_table_styles(left)
    return styler.set_caption(caption) if caption else styler
