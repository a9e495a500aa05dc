"""Section 6.3: segmentation models with what attacks do to them, and the paper's claims about them."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from satlib.study.claims import Claim, Records, average, comparable, curve_of, missed_at, size_text, verdict, worst
from satlib.study.measurements.scenes import ScenesPlan
from satlib.study.records import Record
from satlib.study.runs import Run

NEAR = 3.0  # points of mean IoU within which two models count as equally good on clean images
LOST = 5.0  # points of mean IoU that a defence may lose, as in the paper
AHEAD = 1.0  # points of success that one curve must be above another
UNIVERSAL = {"ensemble": ("strongest", "strongest_untargeted"), "S-PGD": ("eps_uni", "untargeted")}
CLOSE = 0.02  # share by which the size that was missed may lie below the other model's, and still counts as there
CLEAR = 0.1  # share by which one eps_uni must exceed another to count as larger: searches end up to 8 % too high


@dataclass(frozen=True)
class Checkpoint:
    """A model after an epoch: mean IoU in %, eps in pixel units for the target scene, None where nothing reached delta.

    error: the standard error of eps_adv over images.
    """

    epoch: int
    iou: float
    eps_uni: float | None
    eps_adv: float | None
    error: float | None


@dataclass(frozen=True)
class Strongest:
    """What the ensemble finds: eps_uni in pixel units, None beyond 255; its success in % by eps, if measured; and the
    largest eps below eps_uni at which one of its attacks missed, if known."""

    size: float | None
    curve: Mapping[float, float]
    searches: tuple[Record, ...]
    missed: float | None = None


@dataclass(frozen=True)
class SceneModel(Checkpoint):
    """A segmentation model at the end of its training, with all attacks on it; family: "ERM", or "s = 5".

    iou is of test scenes, validation_iou of validation scenes. untargeted, untargeted_adv and untargeted_error: as
    eps_uni, eps_adv and error, without a target. curve: along its training, last epoch included. ensemble,
    untargeted_ensemble: what the ensemble finds for the target scene and without a target; None where it was not run.
    missed: of eps_uni and untargeted, the largest eps below at which the full attack missed.
    """

    title: str
    family: str
    sharedness: int | None
    validation_iou: float
    untargeted: float | None
    untargeted_adv: float | None
    untargeted_error: float | None
    curve: tuple[Checkpoint, ...]
    run: Run
    training: Record
    searches: tuple[Record, ...]
    ensemble: Strongest | None = None
    untargeted_ensemble: Strongest | None = None
    missed: Mapping[str, float] = field(default_factory=dict)

    def seeds(self, measure: str) -> int:
        """How many searches a measure is the mean of."""
        found = _ensemble(self, measure)
        return len(found.searches) if found else int(known(self, measure))

    @property
    def records(self) -> tuple[Record, ...]:
        strongest = [each for found in (self.ensemble, self.untargeted_ensemble) if found for each in found.searches]
        return (self.training, *self.searches, *strongest)

    @property
    def strongest(self) -> float | None:
        """eps_uni for the target scene by the ensemble; None beyond 255, or where it was not run."""
        return self.ensemble.size if self.ensemble else None

    @property
    def strongest_untargeted(self) -> float | None:
        """The same without a target."""
        return self.untargeted_ensemble.size if self.untargeted_ensemble else None

    @property
    def spreads(self) -> Mapping[str, float | None]:
        """By measure: what stands for the spread over seeds is the standard error over images."""
        return {"eps_adv": self.error, "untargeted_adv": self.untargeted_error}


def scene_models(plan: ScenesPlan, records: Records) -> list[SceneModel]:
    """The models of a plan that were trained, and attacked in all ways, the undefended one first."""
    described = [("ERM", None, [plan.erm]), *((f"s = {s}", s, parts) for (s, _, _), parts in plan.models.items())]
    models = []
    for family, sharedness, parts in described:
        curve, searches = [], []
        for part in parts:
            found = records.found((part, plan.targeted[part], plan.adversarial[part]))
            if len(found) == 3:
                trained, universal, own = (record.metrics for record in found)
                eps = (universal["eps_uni"], own["eps_adv"], own["standard_error"])
                curve.append(Checkpoint(len(trained["history"]), 100 * trained["mean_iou"], *eps))
                searches += found[1:]
        run = parts[-1]
        final = records.found((run, plan.untargeted[run], plan.untargeted_adversarial[run]))
        if len(final) < 3 or not curve or curve[-1].epoch != len(final[0].metrics["history"]):
            continue
        trained, universal, own = (record.metrics for record in final)
        models.append(
            SceneModel(
                **vars(curve[-1]),
                title=run.title,
                family=family,
                sharedness=sharedness,
                validation_iou=100 * trained["validation_mean_iou"],
                untargeted=universal["eps_uni"],
                untargeted_adv=own["eps_adv"],
                untargeted_error=own["standard_error"],
                curve=tuple(curve),
                run=run,
                training=final[0],
                searches=(*searches, *final[1:]),
                ensemble=_strongest(records.found(plan.strongest[run])),
                untargeted_ensemble=_strongest(records.found(plan.strongest_untargeted[run])),
                missed={"eps_uni": missed_at(searches[-2]), "untargeted": missed_at(final[1])},
            )
        )
    return models


def _strongest(searches: Sequence[Record]) -> Strongest | None:
    """What searches by the ensemble found: the mean of their sizes, and the curve of the first."""
    if not searches:
        return None
    size, missed = average(record.metrics["eps_uni"] for record in searches), statistics.mean(map(missed_at, searches))
    return Strongest(size, curve_of(searches), tuple(searches), missed)


def matched(models: Sequence[SceneModel]) -> list[SceneModel]:
    """The undefended model, and of each sharedness the one that is compared (s = 1 first).

    The paper compares settings of equal performance on clean images that lose no more than 5 points. Among those that
    do so on validation scenes, this takes the pair of nearest mean IoU there; without such a pair, the pair of all.
    """
    erm = [m for m in models if m.family == "ERM"]
    floor = erm[0].validation_iou - LOST if erm else 0.0
    ones, others = ([m for m in models if m.sharedness is not None and (m.sharedness == 1) == one] for one in (1, 0))
    pairs = list(itertools.product(ones, others))
    kept = [pair for pair in pairs if min(m.validation_iou for m in pair) >= floor] or pairs
    if not kept:
        return [*erm, *ones[:1], *others[:1]]
    return [*erm, *min(kept, key=lambda pair: abs(pair[0].validation_iou - pair[1].validation_iou))]


def cityscapes_claims(models: Sequence[SceneModel], cost: None = None) -> list[Claim]:
    """The claims of section 6.3, which says nothing of the cost, on the models that `matched` gives."""
    chosen = matched(models)
    if len(chosen) < 3:
        return [Claim("shared adversarial training is more robust to universal perturbations (6.3)", "not run")]
    erm, one, many = chosen
    equal = abs(one.iou - many.iou) <= NEAR and erm.iou - min(one.iou, many.iou) <= LOST

    def compared(claim: str, better: SceneModel, worse: SceneModel, measure: str, attack: str = "") -> Claim:
        found = larger(better, worse, measure)
        return Claim(claim, found, "" if found == "not run" else _sizes((better, worse), measure), attack)

    targeted = "larger targeted universal perturbations"
    claims = [
        Claim(
            f"both defences segment clean scenes alike (within {NEAR:g} points), and lose at most {LOST:g} points",
            verdict(equal),
            f"mean IoU: {', '.join(f'{m.title} {m.iou:.1f} %' for m in (one, many, erm))}",
        )
    ]
    for attack, measures in UNIVERSAL.items():
        aimed, free = measures
        claims += [
            compared(f"shared training withstands {targeted} (paper: 111.7, 62.5)", many, one, aimed, attack),
            compared("it does so without a target, too (paper: 47.8, 25)", many, one, free, attack),
            Claim(
                f"both withstand {targeted} than ERM (paper: 19.92)",
                both := worst(larger(m, erm, aimed) for m in (one, many)),
                "" if both == "not run" else _sizes((one, many, erm), aimed),
                attack,
            ),
        ]
    images = "standard training withstands larger image-dependent ones (paper: 11, 5.9)"
    return [*claims, compared(images, one, many, "eps_adv")]


def _sizes(models: Sequence[SceneModel], measure: str) -> str:
    """In words, for each model; with its success at some sizes, where no size was enough for several of them."""
    words = ", ".join(f"{m.title} {size_text(getattr(m, measure))}{_missed_text(m, measure)}" for m in models)
    words += " pixel units"
    curves = {m.title: found.curve for m in models if (found := _ensemble(m, measure)) and found.size is None}
    if len(curves) < 2:
        return words
    shown = "; ".join(
        f"{title} {', '.join(f'{rate:.1f}' for rate in curve.values())}" for title, curve in curves.items()
    )
    return f"{words}; success in % at {', '.join(f'{eps:g}' for eps in next(iter(curves.values())))}: {shown}"


def _missed(model: SceneModel, measure: str) -> float | None:
    """The largest eps below a universal size at which the full attack missed; None where that is unknown."""
    found = _ensemble(model, measure)
    return found.missed if found else model.missed.get(measure)


def _missed_text(model: SceneModel, measure: str) -> str:
    missed, size = _missed(model, measure), getattr(model, measure)
    return f" (missed at {missed:.1f})" if size is not None and missed else ""


def _ensemble(model: SceneModel, measure: str) -> Strongest | None:
    return {"strongest": model.ensemble, "strongest_untargeted": model.untargeted_ensemble}.get(measure)


def known(model: SceneModel, measure: str) -> bool:
    """Whether a model was searched by the attack of this measure."""
    return measure not in UNIVERSAL["ensemble"] or _ensemble(model, measure) is not None


def larger(better: SceneModel, worse: SceneModel, measure: str) -> str:
    """Whether one model needs clearly larger perturbations than another: a verdict. None is beyond 255.

    Clearly: by a share CLEAR of the larger, or for eps_adv by two standard errors of the difference; and the full
    attack must have missed the larger one's model at the smaller size, for else the order is unknown. Where neither is
    reached by the ensemble, its success at the same sizes decides: lower by more than AHEAD points on average, and
    higher by as much at none.
    """
    high, low = (comparable(getattr(model, measure)) for model in (better, worse))
    if measure in ("strongest", "strongest_untargeted"):
        one, other = (_ensemble(model, measure) for model in (better, worse))
        if one is None or other is None:
            return "not run"
        if one.size is other.size is None:
            gaps = [other.curve[eps] - one.curve[eps] for eps in one.curve if eps in other.curve]
            mean = statistics.mean(gaps) if gaps else 0.0
            mixed = min(gaps, default=0) < -AHEAD and max(gaps, default=0) > AHEAD
            return "not decided" if mixed or abs(mean) <= AHEAD else verdict(mean > 0)
    margin = CLEAR * max(high, low)
    if measure == "eps_adv":
        margin = 2 * math.hypot(better.error or 0.0, worse.error or 0.0)
    if abs(high - low) <= margin:
        return "not decided"
    missed = _missed(better if high > low else worse, measure)
    return "not decided" if missed is not None and missed < min(high, low) * (1 - CLOSE) else verdict(high > low)
