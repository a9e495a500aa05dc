"""The card of a network: everything that `satlib.evaluate` found, as numbers, as a page and as pictures."""

import base64
import html
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from satlib.errors import SatlibError
from satlib.evaluation_checks import OF_WEAKNESS, Check
from satlib.files import replacing, write_text, writing
from satlib.progress import aligned, duration
from satlib.robustness import LARGEST, Robustness

BY = {"ensemble": "the ensemble", "paper": "the paper's attack (S-PGD)"}
SHOWN = 5  # examples
WORDS = """
eps_uni(delta): the largest absolute value (pixel units, 0 to 255) of the smallest single pattern found that, added to
every image, leaves the network wrong on a share delta of the images that decide. Images that it gets wrong without any
pattern count. An upper bound: smaller patterns may exist.

craft, decide, report: three sets without a common image. Patterns are made on the first, the search decides on the
second, and the third, which neither saw, gives the rates. ± of a rate is its binomial standard error; of eps_uni, the
standard deviation over searches from other seeds.

the ensemble, S-PGD: a fixed sequence of universal attacks (stochastic gradient aggregation, aiming at each class in
turn, margin), of which the smallest size counts; and the paper's own attack, stochastic PGD. Effort is the number of
their steps in units of the usual ones; passes are images passed forward and backward.

fell short at: the largest size below the bound at which one whole attack did not reach delta. It says how fine the
search is, and is no lower bound.

random signs: a pattern of values +eps and -eps drawn at random, which has not seen the network.

eps_adv(delta): the same size where every image may have a pattern of its own, which is what the usual attacks measure.
"""  # what a card says, for those who have only that
BELIEVED = 0.5  # share of images with a usable gradient, below which no bound is to be believed


@dataclass(frozen=True)
class Found:
    """One search: eps_uni in pixel units, None beyond 255; success on the images that decide, that report and that the
    perturbation was crafted on; which attack found it; missed: the largest size below at which a whole attack did not
    reach delta; gradients: share of images with a finite gradient other than zero; spent: images passed forward and
    backward."""

    eps_uni: float | None
    rate: float | None
    report_rate: float | None
    craft_rate: float | None
    attack: str | None
    missed: float
    gradients: float
    spent: int

    @classmethod
    def of(cls, found: Robustness) -> "Found":
        own = {each.name: getattr(found, each.name) for each in fields(cls) if each.name != "eps_uni"}
        return cls(eps_uni=found.epsilon, **own)


@dataclass(frozen=True)
class Examples:
    """Images of which a network gets the clean ones right, uint8 (n, C, H, W), and with the perturbation; the labels,
    and what it says of both."""

    clean: np.ndarray
    perturbed: np.ndarray
    labels: list[int]
    said_clean: list[int]
    said_perturbed: list[int]

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "Examples":
        """Those whose attributes these are, as arrays."""
        named = {each.name: arrays[each.name] for each in fields(cls)}
        return cls(**{name: array.tolist() if array.ndim == 1 else array for name, array in named.items()})


@dataclass
class Card:
    """What was measured on a network. Sizes are in pixel units, 0 to 255; errors are shares of decisions: images, or in
    segmentation labelled pixels.

    network: its class, the number of its parameters and a digest of its weights. precision: the number format that
    attacks compute in; who is fooled is decided in float32. fingerprints: of each set of images, whatever its order.
    searches: by "ensemble" and "paper", one for each seed. errors: by eps, of the ensemble, on images that report;
    noise: by eps, of random signs; transfer: by the name of another network, its perturbation's size and error here.
    checks: None where they were not made. skipped: what the budget left out. perturbation: the smallest that was found,
    float32 (1, C, H, W), or where none was large enough the one that wins most.
    """

    name: str
    delta: float
    segmentation: bool
    classes: tuple[str, ...]
    images: dict[str, int]
    fingerprints: dict[str, str]
    splits: str
    size: tuple[int, ...]
    clean_error: float
    chance_error: float
    epsilons: tuple[float, ...]
    effort: float
    seed: int
    device: str
    precision: str
    network: dict[str, str]
    versions: dict[str, str]
    searches: dict[str, list[Found]] = field(default_factory=dict)
    errors: dict[float, float] = field(default_factory=dict)
    noise: dict[float, float] = field(default_factory=dict)
    transfer: dict[str, dict[str, float]] = field(default_factory=dict)
    eps_adv: dict[str, float | None] | None = None
    checks: tuple[Check, ...] | None = None
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    budget: float | None = None
    perturbation: np.ndarray | None = field(default=None, repr=False, compare=False)
    examples: Examples | None = field(default=None, repr=False, compare=False)
    _kept: tuple[float, float] = field(default=(math.inf, 1.0), repr=False, compare=False)  # size, minus what it wins

    def add(self, attack: str, found: Robustness) -> None:
        """Take in a search, and keep its perturbation if none was smaller, or won more where none wins delta."""
        self.searches.setdefault(attack, []).append(Found.of(found))
        xi = found.closest if found.perturbation is None else found.perturbation
        won = max((each.rate for each in found.evaluations), default=0.0) if found.epsilon is None else 0.0
        rank = (math.inf if found.epsilon is None else found.epsilon, -won)
        if xi is not None and rank < self._kept:
            self._kept, self.perturbation = rank, xi.detach().float().cpu().numpy()

    @property
    def every(self) -> list[Found]:
        """All searches."""
        return [each for searches in self.searches.values() for each in searches]

    @property
    def unit(self) -> str:
        """What is decided."""
        return "labelled pixels" if self.segmentation else "images"

    @property
    def epsilon(self) -> float | None:
        """The smallest eps_uni that any search found: the bound. None where none did."""
        return min((each.eps_uni for each in self.every if each.eps_uni is not None), default=None)

    @property
    def useless(self) -> bool:
        """Whether the network is no better than one that always says the most frequent class; of images also where it
        is, but by no more than a standard error."""
        spread = 0.0 if self.segmentation else self.clean_error * (1 - self.clean_error) / self.images["report"]
        error = math.sqrt(spread)
        return self.chance_error > 0 and self.clean_error >= self.chance_error - error

    @property
    def failed(self) -> list[Check]:
        """The checks of the evaluation that do not pass."""
        return [check for check in self.checks or () if check.verdict != "passes"]

    @property
    def gradients(self) -> float:
        """Share of images with a usable gradient, the least that a search saw."""
        return min((each.gradients for each in self.every), default=1.0)

    @property
    def masked(self) -> bool:
        """Whether so few images have a usable gradient that what attacks by gradients find is not to be believed."""
        return self.gradients < BELIEVED

    @property
    def verdict(self) -> str:
        """In one sentence, what the card says."""
        right = f"{1 - self.clean_error:.1%} of clean {self.unit} are right"
        if self.useless:
            return f"Useless rather than robust: {right}, and always saying one class gets {1 - self.chance_error:.1%}."
        if not self.searches:
            return f"{right}; the budget ended before a search did: nothing is known of its robustness."
        if self.masked:
            few = f"only {self.gradients:.0%} of the images have a usable gradient"
            return f"Not to be believed: {few}, so that attacks by gradients say nothing of the network ({right})."
        if self.epsilon == 0:
            return f"{right}: without any perturbation {self.delta:.0%} of the {self.unit} that decide are wrong."
        said = f"{right}; no pattern was found that makes it wrong on {self.delta:.0%} of the {self.unit} that decide."
        if self.epsilon:
            best = next(each for each in self.every if each.eps_uni == self.epsilon)
            rate = best.rate if best.report_rate is None else best.report_rate
            error = f"{_share(rate or 0.0, self.images['report'])} of unseen {self.unit}"
            said = f"{right}; one pattern of size {self.epsilon:.1f} of 255 makes it wrong on {error}"
            said += f": eps_uni({self.delta:g}) is at most {self.epsilon:.1f}."
        if self.effort < 1:
            said = f"A quick look (effort {self.effort:.2g}): {said}"
        if grave := [check for check in self.failed if not check.check.startswith(OF_WEAKNESS)]:
            return f"With reservations, for a check fails where gradients are hidden ({grave[0].check}): {said}"
        return said

    def rows(self) -> list[tuple[str, str, str]]:
        """What was measured, its value, and what it says; for tables."""
        count = self.images["report"]
        rows = [(f"error on clean {self.unit}", _share(self.clean_error, count), f"{count} report images")]
        for attack, searches in self.searches.items():
            sizes = [each.eps_uni for each in searches]
            known = [size for size in sizes if size is not None]
            smallest = min(searches, key=lambda each: math.inf if each.eps_uni is None else each.eps_uni)
            text = ", ".join(f"> {LARGEST:g}" if size is None else f"{size:.1f}" for size in sizes)
            if len(known) == len(sizes) > 1:
                text = f"{statistics.mean(known):.1f} ± {statistics.stdev(known):.1f} (smallest {min(known):.1f})"
            more = f"{len(sizes)} searches" if len(sizes) > 1 else "1 search, spread unknown"
            if smallest.eps_uni is not None:
                found = f"found by {smallest.attack}; " if smallest.attack and attack == "ensemble" else ""
                rate = (
                    "" if smallest.report_rate is None else f"{smallest.report_rate:.1%} wrong of those that report; "
                )
                more += f"; {found}{rate}a whole attack fell short at {smallest.missed:.1f}"
            more += f"; {statistics.mean(each.spent for each in searches):,.0f} passes each"
            rows.append((f"eps_uni({self.delta:g}) by {BY[attack]}", text, more))
        rows += [
            (f"error at eps = {eps:g}", _share(rate, count), f"the ensemble; random signs: {self._noise_at(eps)}")
            for eps, rate in self.errors.items()
        ]
        if self.epsilon is not None and (noise := self.noise.get(self.epsilon)) is not None:
            rows.append(
                (
                    f"random signs of size {self.epsilon:.1f}",
                    _share(noise, count),
                    "control: noise, blind to the network",
                )
            )
        rows += [
            (f"transferred from {name}", _share(each["error"], count), f"of size {each['eps']:.1f}")
            for name, each in self.transfer.items()
        ]
        if self.eps_adv is not None:
            size = f"> {LARGEST:g}" if self.eps_adv["eps"] is None else f"{self.eps_adv['eps']:.1f}"
            own = f"{self.eps_adv['images']} images, each with a perturbation of its own"
            rows.append((f"eps_adv({self.delta:g})", size, own))
        if self.checks is not None:
            passed = len(self.checks) - len(self.failed)
            weak = [check for check in self.failed if check.check.startswith(OF_WEAKNESS)]
            more = f"{len(weak)} suggest that the attack was too short: raise effort" if weak else "see below"
            rows.append(("checks of the evaluation", f"{passed} of {len(self.checks)} pass", more))
        return rows

    def _noise_at(self, eps: float) -> str:
        return f"{self.noise[eps]:.1%}" if eps in self.noise else "not measured"

    def __str__(self) -> str:
        more = [f"left out: {text}" for text in self.skipped] + [f"note: {text}" for text in self.notes]
        return "\n".join([f"{self.name}: {self.verdict}", "", aligned(self.rows()), *more])

    def figure(self) -> Figure:
        """Error against eps, with the bound; beside it the perturbation, and images with it."""
        figure = Figure(figsize=(9.0, 3.4), layout="constrained", dpi=110)
        halves: Any = figure.subfigures(1, 2, width_ratios=(1.0, 1.25))
        self._draw_errors(halves[0].add_subplot())
        if self.perturbation is not None:
            self._draw_pictures(halves[1])
        return figure

    def _draw_errors(self, axis: Axes) -> None:
        points = {0.0: self.clean_error, **self.errors}
        if self.epsilon:
            points[self.epsilon] = next(e.report_rate or 0.0 for e in self.every if e.eps_uni == self.epsilon)
            axis.axvline(self.epsilon, color="#b2182b", linewidth=1, linestyle="--")
            beyond = self.epsilon > 0.6 * max(points)  # then the words stand to the left of the line
            where = {"xytext": (-4 if beyond else 4, 0), "ha": "right" if beyond else "left", "fontsize": "small"}
            where["color"] = "#b2182b"
            words = f"eps_uni({self.delta:g}) = {self.epsilon:.1f}"
            axis.annotate(words, (self.epsilon, 0.96), textcoords="offset points", **where)
        axis.axhline(self.delta, color="0.3", linewidth=1, linestyle=":", label=f"delta = {self.delta:.0%}")
        sizes = sorted(points)
        rates = [points[eps] for eps in sizes]
        errors = [_standard_error(rate, self.images["report"]) for rate in rates]
        style: Any = {"fmt": "o-", "color": "#0173b2", "capsize": 3, "label": "the strongest found"}
        axis.errorbar(sizes, rates, yerr=errors, **style)
        if self.noise:
            noise = sorted({0.0: self.clean_error, **self.noise}.items())
            axis.plot(*zip(*noise, strict=True), "s--", color="0.4", label="random signs")
        axis.set(
            xlabel="largest value of the pattern (pixel units, 0 to 255)",
            ylabel=f"error on unseen {self.unit}",
            ylim=(-0.02, 1.02),
            xlim=(0, None),
        )
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.legend(loc="upper left", bbox_to_anchor=(0.0, 0.72), fontsize="x-small", frameon=True)
        axis.set_title(self.name, fontsize="medium", parse_math=False)

    def _draw_pictures(self, place: Any) -> None:
        shown = self.examples
        count = min(SHOWN, len(shown.labels)) if shown else 0
        panels = place.subplots(2 if count else 1, 1 + count, squeeze=False)
        for axis in panels.flat:
            axis.axis("off")
        size = np.abs(self.perturbation).max()
        panels[0, 0].imshow(_picture(self.stretched()), interpolation="nearest")
        panels[0, 0].set_title(f"the pattern,\n±{size:.1f} of 255,\nstretched", fontsize="x-small")
        if shown is None:
            return
        fooled = sum(said != label for said, label in zip(shown.said_perturbed, shown.labels, strict=True))
        place.suptitle(f"clean, and with the pattern: {fooled} of these {count} are fooled (red)", fontsize="small")
        for row, (images, said) in enumerate(
            ((shown.clean, shown.said_clean), (shown.perturbed, shown.said_perturbed))
        ):
            for column in range(count):
                axis, wrong = panels[row, 1 + column], said[column] != shown.labels[column]
                axis.imshow(_picture(images[column]), interpolation="nearest")
                title, color = _shortened(self._class(said[column])), "#b2182b" if wrong else "black"
                axis.set_title(title, fontsize="x-small", color=color, parse_math=False)

    def stretched(self) -> np.ndarray:
        """The perturbation as a picture, uint8 (C, H, W): around mid-grey, its largest value to 0 and 255."""
        assert self.perturbation is not None
        xi = self.perturbation[0]
        return np.clip(np.rint(127.5 + xi * (127.5 / max(np.abs(xi).max(), 1e-9))), 0, 255).astype(np.uint8)

    def _class(self, index: int) -> str:
        return self.classes[index] if index < len(self.classes) else f"class {index}"

    def numbers(self) -> dict[str, Any]:
        """Everything but the pictures, as plain JSON types."""
        left_out = ("perturbation", "examples", "_kept")
        card = {name: value for name, value in vars(self).items() if name not in left_out}
        searches = {attack: [asdict(each) for each in found] for attack, found in self.searches.items()}
        checks = None if self.checks is None else [asdict(check) for check in self.checks]
        plain = {"verdict": self.verdict, **card, "searches": searches, "checks": checks}
        return json.loads(json.dumps(plain, allow_nan=False))  # no tuples, and names that are text

    @classmethod
    def of_numbers(cls, numbers: Mapping[str, Any], **pictures: Any) -> "Card":
        """The card whose `numbers` these are, also after a way through JSON; pictures: what they lack."""
        given = {name: value for name, value in numbers.items() if name != "verdict"} | pictures
        given["searches"] = {attack: [Found(**each) for each in all_] for attack, all_ in given["searches"].items()}
        if given["checks"] is not None:
            given["checks"] = tuple(Check(**each) for each in given["checks"])
        for name in ("errors", "noise"):
            given[name] = {float(eps): rate for eps, rate in given[name].items()}
        for name in ("classes", "size", "epsilons", "skipped", "notes"):
            given[name] = tuple(given[name])
        return cls(**given)

    def save(self, folder: str | Path) -> Path:
        """Write the card into a folder, which is made: index.html, card.json, card.png, the images that it shows as
        examples.npz, and the perturbation as perturbation.npy (pixel units) and perturbation.png (8 bits, stretched).
        Returns the page's path; `Card.load` reads it again."""
        folder, page = Path(folder), _PAGE.format(title=html.escape(self.name), body=self._repr_html_())
        write_text(folder / "card.json", json.dumps(self.numbers(), indent=1) + "\n")
        written = {"card.png": lambda file: file.write(_png(self.figure()))}
        if self.perturbation is not None:
            written["perturbation.npy"] = lambda file: np.save(file, self.perturbation)
            written["perturbation.png"] = lambda file: _image(self.stretched()).save(file, "PNG")
        if self.examples is not None:
            written["examples.npz"] = lambda file: np.savez_compressed(file, **vars(self.examples))
        for name in {"perturbation.npy", "perturbation.png", "examples.npz"} - written.keys():
            (folder / name).unlink(missing_ok=True)  # another network's
        for name, write in written.items():
            with writing(folder), replacing(folder / name) as new, new.open("wb") as file:
                write(file)
        write_text(folder / "index.html", page)
        return folder / "index.html"

    @classmethod
    def load(cls, folder: str | Path) -> "Card":
        """The card that was saved into a folder. Raises SatlibError where there is none, or it is damaged."""
        folder, pictures = Path(folder), dict[str, Any]()
        try:
            numbers = json.loads((folder / "card.json").read_text(encoding="utf-8"))
            if (file := folder / "perturbation.npy").exists():
                pictures["perturbation"] = np.load(file, allow_pickle=False)
            if (file := folder / "examples.npz").exists():
                with np.load(file, allow_pickle=False) as arrays:
                    pictures["examples"] = Examples.of(arrays)
            card = cls.of_numbers(numbers, **pictures)
            card._repr_html_()  # that it can be shown says that nothing of it is missing or of another kind
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise SatlibError(f"{folder}: no card can be read from it ({said}); save it anew") from error
        return card

    def _repr_html_(self) -> str:
        """The card as Jupyter shows it."""

        def table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
            cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
            top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
            return f"<table><thead><tr>{top}</tr></thead><tbody><tr>{'</tr><tr>'.join(cells)}</tr></tbody></table>"

        parts = [f"<h2>{html.escape(self.name)}</h2><p><b>{html.escape(self.verdict)}</b></p>"]
        picture = base64.b64encode(_png(self.figure())).decode()
        alt = f"Error of {self.name} against the size of a universal perturbation; the perturbation, and images with it"
        parts.append(f'<img src="data:image/png;base64,{picture}" alt="{html.escape(alt)}" style="max-width: 100%">')
        parts.append(table(self.rows(), ("what", "value", "how")))
        if self.checks is not None:
            rows = [(check.verdict, check.check, check.evidence) for check in self.checks]
            steps = max(10, round(100 * self.effort))
            about = f"By S-PGD of {steps} steps, on up to 64 of the report images: not the ensemble's rates above."
            parts.append(f"<h3>Checks of the evaluation</h3><p>{about}</p>" + table(rows, ("", "check", "evidence")))
        for what, each in (("Left out", self.skipped), ("Notes", self.notes)):
            if each:
                parts.append(f"<h3>{what}</h3><ul>{''.join(f'<li>{html.escape(text)}</li>' for text in each)}</ul>")
        how = ", ".join(f"{count} to {role}" for role, count in self.images.items())
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        told = f"{self.splits}: {how}. Images {'x'.join(map(str, self.size))}; effort {self.effort:.2g}; "
        told += f"seed {self.seed}; attacks in {self.precision}, decisions in float32; "
        told += f"{duration(self.seconds)} on {self.device}; {versions}. "
        told += f"Network: {', '.join(f'{name} {value}' for name, value in self.network.items())}. "
        told += f"Fingerprints: {', '.join(f'{role} {value}' for role, value in self.fingerprints.items())}."
        named = (paragraph.split(": ", 1) for paragraph in WORDS.strip().split("\n\n"))
        words = "".join(f"<dt><b>{name}</b></dt><dd>{text}</dd>" for name, text in named)
        parts.append(f"<details><summary>What the words mean</summary><dl>{words}</dl></details>")
        parts.append(f"<p><small>{html.escape(told)}</small></p>")
        return f'<div class="satlib-card">{"".join(parts)}</div>'


def _standard_error(rate: float, count: int) -> float:
    """Of a share of so many decisions; of none and of all, as if half a decision were otherwise."""
    return math.sqrt(max(rate * (1 - rate), 0.25 / count) / count)


def _share(rate: float, count: int) -> str:
    """A share in %, with its standard error over so many decisions."""
    return f"{rate:.1%} ± {_standard_error(rate, count):.1%}"


def _shortened(text: str, length: int = 14) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _picture(image: np.ndarray) -> np.ndarray:
    """(C, H, W) as imshow takes it: the first three channels as colours; where there are fewer, the first as grey."""
    return (image[:3] if len(image) >= 3 else np.repeat(image[:1], 3, 0)).transpose(1, 2, 0)


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(_picture(pixels))


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: universal robustness</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1060px; margin: 2em auto; padding: 0 1em; }}
  table {{ border-collapse: collapse; font-size: 90%; }} .satlib-card {{ overflow-x: auto; }}
  th, td {{ padding: .25em .7em; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }}
</style>
</head>
<body>{body}</body>
</html>
"""
