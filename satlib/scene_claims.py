"""Section 6.3: segmentation models with what attacks do to them, and the paper's claims about them."""

from collections.abc import Sequence
from dataclasses import dataclass

from satlib.claims import Claim, Records
from satlib.experiments import ScenesPlan
from satlib.lab import Run
from satlib.ledger import Record

NEAR = 3.0  # points of mean IoU within which two models count as equally good on clean images


@dataclass(frozen=True)
class Looked:
    """A model after an epoch: mean IoU in %, eps in pixel units for the target scene; None where it was not reached.

    error: the standard error of eps_adv over images.
    """

    epoch: int
    iou: float
    eps_uni: float | None
    eps_adv: float | None
    error: float | None


@dataclass(frozen=True)
class SceneModel:
    """A segmentation model at the end of its training; family: "ERM", or "s = 5".

    eps_uni, eps_adv: for the target scene; untargeted and untargeted_adv: the same without a target; error,
    untargeted_error: standard errors of eps_adv over images. curve: along its training, last epoch included.
    """

    title: str
    family: str
    sharedness: int | None
    iou: float
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
    """The models of a plan that were trained and attacked with the target scene, the undefended one first."""
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
        if training is None or not looked or looked[-1].epoch != len(training.metrics["history"]):
            continue
        last = looked[-1]
        found.append(
            SceneModel(
                title=run.title,
                family="ERM" if point is None else f"s = {point[0]}",
                sharedness=None if point is None else point[0],
                iou=last.iou,
                eps_uni=last.eps_uni,
                eps_adv=last.eps_adv,
                error=last.error,
                untargeted=plain.metrics["eps_uni"] if plain else None,
                untargeted_adv=own.metrics["eps_adv"] if own else None,
                untargeted_error=own.metrics["standard_error"] if own else None,
                curve=tuple(looked),
                run=run,
                training=training,
                searches=(*used, *(record for record in (plain, own) if record)),
            )
        )
    return found


def matched(models: Sequence[SceneModel]) -> list[SceneModel]:
    """The undefended model, and of each sharedness one: those whose mean IoUs are nearest to each other's.

    The paper compares settings of equal performance on clean images; this finds them among those that were trained.
    """
    erm = [m for m in models if m.family == "ERM"]
    ones, others = (
        [m for m in models if m.sharedness is not None and (m.sharedness == 1) == one] for one in (True, False)
    )
    pairs = [(abs(a.iou - b.iou), a, b) for a in ones for b in others]
    if not pairs:
        return [*erm, *ones[:1], *others[:1]]
    _, one, other = min(pairs, key=lambda pair: pair[0])
    return [*erm, one, other]


def cityscapes_claims(models: Sequence[SceneModel]) -> list[Claim]:
    """The claims of section 6.3, on the models that `matched` gives."""
    by = {("ERM" if m.family == "ERM" else "s = 1" if m.sharedness == 1 else "shared"): m for m in matched(models)}
    if len(by) < 3:
        return [Claim("shared adversarial training is more robust to universal perturbations (6.3)", "not run", "")]
    erm, one, many = by["ERM"], by["s = 1"], by["shared"]
    gap = many.iou - one.iou
    found = [
        Claim(
            f"both defences keep equal performance on clean images (within {NEAR:g} points of mean IoU)",
            "holds" if abs(gap) <= NEAR else "does not hold",
            f"mean IoU: {one.title} {one.iou:.1f} %, {many.title} {many.iou:.1f} %, ERM {erm.iou:.1f} %",
        )
    ]
    found.append(
        _larger(
            "shared training is more robust to targeted universal perturbations (paper: 62.5, 111.7)",
            many,
            one,
            "eps_uni",
        )
    )
    found.append(_larger("it is so without a target, too (paper: 25, 47.8)", many, one, "untargeted"))
    found.append(
        _larger(
            "standard training is more robust to image-dependent perturbations (paper: 11, 5.9)", one, many, "eps_adv"
        )
    )
    found.append(_larger("both raise eps_uni for the target over ERM's (paper: 19.92)", one, erm, "eps_uni"))
    return found


def _larger(claim: str, better: SceneModel, worse: SceneModel, measure: str) -> Claim:
    """Whether one model needs larger perturbations than another; None is beyond 255."""
    high, low = getattr(better, measure), getattr(worse, measure)

    def shown(value: float | None) -> str:
        return "> 255" if value is None else f"{value:.1f}"

    evidence = f"{better.title} {shown(high)}, {worse.title} {shown(low)} pixel units"
    if high is None and low is None:
        return Claim(claim, "not decided", evidence)
    return Claim(claim, "holds" if (high or 256.0) > (low or 256.0) else "does not hold", evidence)
