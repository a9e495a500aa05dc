"""Section 6.3: segmentation models with what attacks do to them, and the paper's claims about them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from satlib.study.claims import Claim, Records
from satlib.study.experiments import ScenesPlan
from satlib.study.records import Record
from satlib.study.runs import Run

NEAR = 3.0  # points of mean IoU within which two models count as equally good on clean images
LOST = 5.0  # points of mean IoU that a defence may lose, as in the paper
CLEAR = 0.1  # share by which one eps_uni must exceed another to count as larger: searches end up to 8 % too high


@dataclass(frozen=True)
class Looked:
    """A model after an epoch: mean IoU in %, eps in pixel units for the target scene, None where nothing reached delta.

    error: the standard error of eps_adv over images.
    """

    epoch: int
    iou: float
    eps_uni: float | None
    eps_adv: float | None
    error: float | None


@dataclass(frozen=True)
class SceneModel:
    """A segmentation model at the end of its training, with all attacks on it; family: "ERM", or "s = 5".

    iou, validation_iou: mean IoU on test and on validation scenes, in %. eps_uni, eps_adv: for the target scene;
    untargeted and untargeted_adv: the same without a target; all in pixel units, None where nothing reached delta.
    error, untargeted_error: standard errors of eps_adv over images. curve: along its training, last epoch included.
    """

    title: str
    family: str
    sharedness: int | None
    iou: float
    validation_iou: float
    eps_uni: float | None
    eps_adv: float | None
    error: float | None
    untargeted: float | None
    untargeted_adv: float | None
    untargeted_error: float | None
    curve: tuple[Looked, ...]
    run: Run
    training: Record
    searches: tuple[Record, ...]

    @property
    def records(self) -> tuple[Record, ...]:
        return (self.training, *self.searches)


def scene_models(plan: ScenesPlan, records: Records) -> list[SceneModel]:
    """The models of a plan that were trained, and attacked in all ways, the undefended one first."""
    described = [(None, [plan.erm]), *((point, parts) for point, parts in plan.models.items())]
    found = []
    for point, parts in described:
        looked, used = [], []
        for part in parts:
            training, uni, adv = (records.of(run) for run in (part, plan.targeted[part], plan.adversarial[part]))
            if training and uni and adv:
                looked.append(
                    Looked(
                        len(training.metrics["history"]),
                        100 * training.metrics["mean_iou"],
                        uni.metrics["eps_uni"],
                        adv.metrics["eps_adv"],
                        adv.metrics["standard_error"],
                    )
                )
                used += [uni, adv]
        run = parts[-1]
        training = records.of(run)
        plain, own = (records.of(of[run]) for of in (plan.untargeted, plan.untargeted_adversarial))
        if not (training and plain and own and looked and looked[-1].epoch == len(training.metrics["history"])):
            continue
        last = looked[-1]
        found.append(
            SceneModel(
                title=run.title,
                family="ERM" if point is None else f"s = {point[0]}",
                sharedness=None if point is None else point[0],
                iou=last.iou,
                validation_iou=100 * training.metrics["validation_mean_iou"],
                eps_uni=last.eps_uni,
                eps_adv=last.eps_adv,
                error=last.error,
                untargeted=plain.metrics["eps_uni"],
                untargeted_adv=own.metrics["eps_adv"],
                untargeted_error=own.metrics["standard_error"],
                curve=tuple(looked),
                run=run,
                training=training,
                searches=(*used, plain, own),
            )
        )
    return found


def matched(models: Sequence[SceneModel]) -> list[SceneModel]:
    """The undefended model, and of each sharedness the one that is compared (s = 1 first).

    The paper compares settings of equal performance on clean images that lose no more than 5 points. Among those that
    do so on validation scenes, this takes the pair of nearest mean IoU there; without such a pair, the pair of all.
    """
    erm = [m for m in models if m.family == "ERM"]
    floor = erm[0].validation_iou - LOST if erm else 0.0
    ones, others = ([m for m in models if m.sharedness is not None and (m.sharedness == 1) == one] for one in (1, 0))
    pairs = [(one, other) for one in ones for other in others]
    kept = [pair for pair in pairs if min(m.validation_iou for m in pair) >= floor] or pairs
    if not kept:
        return [*erm, *ones[:1], *others[:1]]
    return [*erm, *min(kept, key=lambda pair: abs(pair[0].validation_iou - pair[1].validation_iou))]


def cityscapes_claims(models: Sequence[SceneModel]) -> list[Claim]:
    """The claims of section 6.3, on the models that `matched` gives."""
    chosen = matched(models)
    if len(chosen) < 3:
        return [Claim("shared adversarial training is more robust to universal perturbations (6.3)", "not run", "")]
    erm, one, many = chosen
    lost = [erm.iou - m.iou for m in (one, many)]
    equal = abs(one.iou - many.iou) <= NEAR and max(lost) <= LOST
    found = [
        Claim(
            f"both defences segment clean scenes alike (within {NEAR:g} points), and lose at most {LOST:g} points",
            "holds" if equal else "does not hold",
            f"mean IoU: {one.title} {one.iou:.1f} %, {many.title} {many.iou:.1f} %, ERM {erm.iou:.1f} %",
        )
    ]
    for claim, better, worse, measure in (
        (
            "shared training withstands larger targeted universal perturbations (paper: 111.7, 62.5)",
            many,
            one,
            "eps_uni",
        ),
        ("it does so without a target, too (paper: 47.8, 25)", many, one, "untargeted"),
        ("standard training withstands larger image-dependent ones (paper: 11, 5.9)", one, many, "eps_adv"),
    ):
        found.append(Claim(claim, larger(better, worse, measure), _sizes((better, worse), measure)))
    verdicts = [larger(m, erm, "eps_uni") for m in (one, many)]
    verdict = next(v for v in ("does not hold", "not decided", "holds") if v in verdicts)
    claim = "both withstand larger targeted universal perturbations than ERM (paper: 19.92)"
    return [*found, Claim(claim, verdict, _sizes((one, many, erm), "eps_uni"))]


def _sizes(models: Sequence[SceneModel], measure: str) -> str:
    def shown(value: float | None) -> str:
        return "> 255" if value is None else f"{value:.1f}"

    return ", ".join(f"{m.title} {shown(getattr(m, measure))}" for m in models) + " pixel units"


def larger(better: SceneModel, worse: SceneModel, measure: str) -> str:
    """Whether one model needs clearly larger perturbations than another: a verdict. None is beyond 255.

    Clearly: by a share CLEAR of the larger, or for eps_adv by two standard errors of the difference.
    """
    high, low = getattr(better, measure), getattr(worse, measure)
    if high is None and low is None:
        return "not decided"
    high, low = (256.0 if value is None else value for value in (high, low))
    margin = CLEAR * max(high, low)
    if measure == "eps_adv":
        margin = 2 * math.hypot(better.error or 0.0, worse.error or 0.0)
    return "holds" if high - low > margin else "does not hold" if low - high > margin else "not decided"
