"""The paper's numbers beside ours, from records alone: no data set is needed, and no number is typed by hand."""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from satlib import evaluation_checks as audit
from satlib.paper import CIFAR10, CITYSCAPES, IMAGENET, REPORTED, TRUST, Reported
from satlib.study import costs, experiments, profiles
from satlib.study.claims import Claim, Model, Records, cifar10_claims, domination, imagenet_claims, trained_models
from satlib.study.claims import evaluation as trust
from satlib.study.claims.scenes import SceneModel, cityscapes_claims, larger, matched, scene_models
from satlib.study.ledger import Ledger
from satlib.study.records import Record
from satlib.study.runs import Run

COSTS = {  # a reported time, and the way of training whose epoch it is
    "cifar10/cost/shared": "s = 64",
    "cifar10/cost/standard": "s = 1",
    "cifar10/cost/uad": "DeepFool UAD",
    "cifar10/cost/fictitious-play": "fictitious play",
}
DIRECTION = {"holds": "same direction", "does not hold": "not reproduced", "not decided": "not decided"}  # of claims
BY_WEIGHT = ("paper", "gpu", "laptop", "quick")  # which profile's result counts for more


@dataclass(frozen=True)
class Row:
    """One number of the paper and ours for it; None where there is none.

    spread: standard deviation over the seeds, of which every model has at least `seeds`. runs: ids of the records that
    `ours` follows from.
    verdict: "reproduced within spread" where the settings are the paper's and ours is within two spreads of its number;
    else "same direction", "not reproduced" or "not decided" for a number with which the paper compares models, by the
    same rule as for its claims; "other setting" for a number of one model that is smaller, shorter trained or on other
    data than the paper's; "not run".
    """

    section: str
    quantity: str
    unit: str
    paper: float
    ours: float | None = None
    spread: float | None = None
    seeds: int = 0
    profile: str | None = None
    dataset: str | None = None
    runs: tuple[str, ...] = ()
    verdict: str = "not run"

    @property
    def text(self) -> str:
        """Our number with its spread; where there is none, why."""
        if self.ours is None:
            return "> 255" if self.runs else "no such model"
        return f"{self.ours:.1f}" + (f" ± {self.spread:.1f}" if self.spread else "")


@dataclass(frozen=True)
class Section:
    """A section of the paper that has models to compare: the notebook that reproduces it, and how.

    keys: how the keys of its reported numbers begin; paper: its settings; models: those of a plan that have records;
    claims and table: of these models; fill: its rows.
    """

    keys: str
    stem: str
    paper: Any
    plan: Callable[[Any], Any]
    models: Callable[[Any, Records], list]
    claims: Callable[[list, Any, Records], list[Claim]]
    table: Callable[[Any, list], pd.DataFrame]
    fill: Callable[["_Rows", list, Any, Records], None]

    def settings(self, profile: str) -> Any:
        """The section's settings under a profile."""
        return experiments.with_parameters(self.paper, experiments.parameters(profile, self.stem))


def section_plan(section: str, profile: str) -> Any:
    """The plan of section "6.1", "6.2" or "6.3" under a profile."""
    return SECTIONS[section].plan(SECTIONS[section].settings(profile))


def published_claims(section: str, profile: str) -> list[Claim]:
    """The claims of a section, evaluated on a profile's published records."""
    plan, records = section_plan(section, profile), Records(published=True)
    return SECTIONS[section].claims(SECTIONS[section].models(plan, records), plan, records)


def published_models(section: str, profile: str) -> pd.DataFrame:
    """The models of a section in a profile's published records, as text."""
    models = SECTIONS[section].models(section_plan(section, profile), Records(published=True))
    return SECTIONS[section].table(SECTIONS[section].settings(profile), models)


@dataclass(frozen=True)
class PublishedTrust:
    """What a profile's published records say of its evaluation: see notebook 09. Claims in words, the rest tables."""

    verdicts: pd.DataFrame
    bounds: pd.DataFrame
    claims: list[Claim]


def published_trust(profile: str) -> PublishedTrust:
    """The audits, the bounds by stronger attacks and the claims about them, from a profile's published records."""
    choices = experiments.with_parameters(TRUST, experiments.parameters(profile, "09_can_we_trust_it"))
    plan, known = experiments.trust_plan(profile, choices), Records(published=True)

    def metrics(runs: Mapping[str, Run]) -> dict[str, Record]:
        return {name: record for name, run in runs.items() if (record := known.of(run))}

    audits = metrics(plan.audits | {f"ERM, {mask}": run for mask, run in plan.masked.items()})
    found = {model: each for model, runs in plan.attacks.items() if "paper" in (each := metrics(runs))}
    seeds = {m: [r.metrics["eps_uni"] for run in plan.seeds[m] if (r := known.of(run))] for m in found}
    carried = known.of(plan.transfer)
    return PublishedTrust(
        trust.verdicts({name: audit.checks(record.metrics) for name, record in audits.items()}),
        trust.bounds(found, seeds),
        (trust.claims(found, seeds) if found else [])
        + ([*trust.carried(carried.metrics), trust.saved(carried.metrics)[1]] if carried else []),
    )


def _size(value: float | None, spread: float | None = None) -> str:
    """A size in pixel units with its spread; None is beyond what a search looks at."""
    return "> 255" if value is None else f"{value:.1f}" + ("" if spread is None else f" ± {spread:.1f}")


def classifiers(settings: Any, models: list[Model]) -> pd.DataFrame:
    """A row of text for each model of section 6.1 or 6.2."""
    rows = []
    for m in models:
        row = {
            "model": m.title,
            "accuracy (%)": _size(m.accuracy, m.spreads.get("accuracy")),
            f"eps_uni({settings.delta:g})": _size(m.eps_uni, m.spreads.get("eps_uni")),
        }
        if any(each.deepfool is not None for each in models):
            title = f"accuracy under DeepFool, eps = {settings.deepfool_eps:g} (%)"
            row[title] = "-" if m.deepfool is None else _size(m.deepfool, m.spreads.get("deepfool"))
        if any(each.entropy_bits is not None for each in models):
            row["entropy where fooled (bits)"] = "-" if m.entropy_bits is None else f"{m.entropy_bits:.2f}"
        rows.append(row | {"trainings, searches": f"{len(m.trainings)}, {len(m.searches)}"})
    return pd.DataFrame(rows)


def segmenters(settings: Any, models: list[SceneModel]) -> pd.DataFrame:
    """A row of text for each model of section 6.3."""
    return pd.DataFrame(
        {
            "model": m.title,
            "mean IoU (%)": f"{m.iou:.1f}",
            f"targeted eps_uni({settings.delta:g})": _size(m.eps_uni),
            f"targeted eps_adv({settings.delta:g})": _size(m.eps_adv, m.error),
            f"untargeted eps_uni({settings.delta:g})": _size(m.untargeted),
            f"untargeted eps_adv({settings.delta:g})": _size(m.untargeted_adv, m.untargeted_error),
        }
        for m in models
    )


def markdown(frame: pd.DataFrame) -> str:
    """A table of text as GitHub shows it."""
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


BLOCK = re.compile(
    r"(<!-- published (models|claims|numbers|costs|audits|bounds)(?: of ([\w.]+))?(?:: (\w+))? -->\n).*?(<!-- end -->)",
    re.DOTALL,
)


def with_tables(text: str) -> str:
    """A text with each block from `<!-- published models of SECTION: PROFILE -->` (or `claims`, of a section or of
    `trust`), `<!-- published numbers -->`, or `<!-- published costs: PROFILE -->` (or `audits`, `bounds`), to
    `<!-- end -->` rendered."""

    def render(found: re.Match) -> str:
        opening, what, section, profile, closing = found.groups()
        if what == "numbers":
            frame = scoreboard(rows(published=True))
        elif what == "costs":
            frame = costs.table(profile)
        elif what in ("audits", "bounds"):
            frame = getattr(published_trust(profile), {"audits": "verdicts"}.get(what, what))
        elif section == "trust":
            frame = pd.DataFrame([vars(claim) for claim in published_trust(profile).claims])
        elif what == "models":
            frame = published_models(section, profile)
        else:
            frame = pd.DataFrame([vars(claim) for claim in published_claims(section, profile)])
        return f"{opening}{markdown(frame)}\n{closing}"

    return BLOCK.sub(render, text)


def _best(models: list[Model], *, sharedness: int, accuracy: float) -> Model | None:
    """The most robust model of a sharedness that keeps at least `accuracy` %."""
    kept = [m for m in models if m.sharedness == sharedness and m.accuracy >= accuracy and m.eps_uni is not None]
    return max(kept, key=lambda model: model.eps_uni or 0.0, default=None)


class _Rows:
    """The rows of a section for a profile's records, of which those that were run are filled in."""

    def __init__(self, keys: str, profile: str, dataset: str, *, exact: bool = False) -> None:
        self.exact = exact  # whether the settings are the paper's
        self.reported = {r.key: r for r in REPORTED if r.key.startswith(f"{keys}/")}
        self.rows = {key: _row(r) for key, r in self.reported.items()}
        self.profile, self.dataset = profile, dataset

    def fill(
        self,
        key: str,
        ours: float | None,
        used: Sequence[Model | SceneModel],
        verdict: str,
        spread: float | None = None,
        **more: Any,
    ) -> None:
        """Our number, the models that it follows from, and the verdict, which a number near the paper's improves."""
        if self.exact and ours is not None and spread and abs(ours - self.reported[key].value) <= 2 * spread:
            verdict = "reproduced within spread"
        filled = {
            "ours": ours,
            "spread": spread,
            "seeds": min((len(m.searches) for m in used), default=0),
            "profile": self.profile,
            "dataset": self.dataset,
            "runs": tuple(r.id for m in used for r in m.records),
            "verdict": verdict,
        }
        self.rows[key] = Row(**asdict(_row(self.reported[key])) | filled | more)

    def fill_undefended(self, keys: str, erm: Model) -> None:
        """The accuracy and the robustness of ERM."""
        self.fill(f"{keys}/erm/accuracy", erm.accuracy, [erm], "other setting", erm.spreads.get("accuracy"))
        self.fill(f"{keys}/erm/eps_uni", erm.eps_uni, [erm], "other setting", erm.spreads.get("eps_uni"))

    def fill_robustness(self, key: str, model: Model | None, erm: Model) -> None:
        """The robustness of a model beside that of ERM."""
        if model is None or model.eps_uni is None or erm.eps_uni is None:
            self.fill(key, None, [erm, model] if model else [], "not reproduced")
            return
        verdict = "same direction" if model.eps_uni > erm.eps_uni else "not reproduced"
        self.fill(key, model.eps_uni, [erm, model], verdict, model.spreads.get("eps_uni"))


def _fill_cifar10(rows: _Rows, models: list[Model], plan: experiments.Plan, records: Records) -> None:
    erm = models[0]
    rows.fill_undefended("cifar10", erm)
    if any(m.sharedness == 64 for m in models):
        accepted = _best(models, sharedness=64, accuracy=erm.accuracy - (93.25 - 90.0))
        rows.fill_robustness("cifar10/no-loss/eps_uni", _best(models, sharedness=64, accuracy=erm.accuracy), erm)
        rows.fill_robustness("cifar10/90/eps_uni", accepted, erm)
        if accepted is not None:
            rows.fill("cifar10/90/loss", erm.accuracy - accepted.accuracy, [erm, accepted], "other setting")
    pairs = [
        (m, other)
        for m in models
        if m.sharedness == 1
        and m.eps_uni is not None
        and (other := _best(models, sharedness=64, accuracy=m.accuracy)) is not None
    ]
    if pairs:
        gain = statistics.mean((other.eps_uni or 0.0) - (m.eps_uni or 0.0) for m, other in pairs)
        used = list({m.title: m for pair in pairs for m in pair}.values())
        verdict, _ = domination(models, "s = 64", "s = 1")
        rows.fill("cifar10/gain", gain, used, DIRECTION.get(verdict, verdict))
    if plan.cost and (cost := records.of(plan.cost)):
        for key, way in COSTS.items():
            rows.fill(key, cost.metrics["seconds"][way], [], "other setting", runs=(cost.id,))


def _fill_imagenet(rows: _Rows, models: list[Model], plan: experiments.Plan, records: Records) -> None:
    erm = models[0]
    rows.fill_undefended("imagenet", erm)
    if any(m.sharedness == 32 for m in models):
        best = _best(models, sharedness=32, accuracy=erm.accuracy)
        rows.fill_robustness("imagenet/no-loss/eps_uni", best, erm)
    good = next((m for m in models if (m.sharedness, m.eps, m.sigma) == (32, 10, 1)), None)
    if good is not None:
        verdict = "same direction" if good.accuracy < erm.accuracy else "not reproduced"
        rows.fill("imagenet/good/accuracy", good.accuracy, [erm, good], verdict, good.spreads.get("accuracy"))
        rows.fill_robustness("imagenet/good/eps_uni", good, erm)


def _fill_cityscapes(rows: _Rows, models: list[SceneModel], plan: experiments.ScenesPlan, records: Records) -> None:
    erm, *defended = matched(models)
    chosen = {m.family: m for m in (erm, *defended)}
    delta = erm.searches[0].settings["delta"]
    where = {} if delta == CITYSCAPES.delta else {"dataset": f"{rows.dataset}, but delta = {delta:g}"}
    rows.fill("cityscapes/erm/iou", erm.iou, [erm], "other setting", seeds=1)
    names, measures = {"erm": "ERM", "s1": "s = 1", "s5": "s = 5"}, ("eps_uni_targeted", "eps_uni", "eps_adv")
    for key in rows.reported:
        _, who, what = key.split("/")
        if what not in measures or names[who] not in chosen:
            continue
        model, measure = chosen[names[who]], {"eps_uni_targeted": "eps_uni", "eps_uni": "untargeted"}.get(what, what)
        # Which one is more robust, in the paper: s = 1 than ERM, s = 5 than s = 1; to image-dependent attacks s = 1.
        pair = ("s1", "s5") if what == "eps_adv" else {"s1": ("s1", "erm"), "s5": ("s5", "s1")}.get(who, (who,))
        compared = [chosen[names[each]] for each in pair if names[each] in chosen]
        verdict = "other setting"
        if len(compared) == 2:
            better, worse = compared
            verdict = DIRECTION[larger(better, worse, measure)]
        spread = model.error if what == "eps_adv" else None
        rows.fill(key, getattr(model, measure), compared, verdict, spread, seeds=1, **where)


SECTIONS = {
    "6.1": Section(
        "cifar10",
        "04_cifar10",
        CIFAR10,
        experiments.cifar10,
        trained_models,
        lambda models, plan, records: cifar10_claims(models, records.of(plan.cost) if plan.cost else None),
        classifiers,
        _fill_cifar10,
    ),
    "6.2": Section(
        "imagenet",
        "05_imagenet",
        IMAGENET,
        experiments.imagenet,
        trained_models,
        lambda models, plan, records: imagenet_claims(models),
        classifiers,
        _fill_imagenet,
    ),
    "6.3": Section(
        "cityscapes",
        "06_cityscapes",
        CITYSCAPES,
        experiments.cityscapes,
        scene_models,
        lambda models, plan, records: cityscapes_claims(models),
        segmenters,
        _fill_cityscapes,
    ),
}


def section_rows(section: str, profile: str, records: Records) -> list[Row]:
    """The rows of a section for a profile's records; without its notebook none of them was run."""
    if SECTIONS[section].stem not in profiles.notebook_paths():
        return [_row(reported) for reported in REPORTED if reported.section == section]
    plan = section_plan(section, profile)
    models = SECTIONS[section].models(plan, records)
    title = models[0].records[0].labels["dataset"] if models else ""
    exact = SECTIONS[section].settings(profile) == SECTIONS[section].paper
    found = _Rows(SECTIONS[section].keys, profile, title, exact=exact)
    if models and models[0].family == "ERM":
        SECTIONS[section].fill(found, models, plan, records)
    return list(found.rows.values())


def _row(reported: Reported) -> Row:
    return Row(reported.section, reported.quantity, reported.unit, reported.value)


def rows(profile: str | None = None, *, ledger: Ledger | None = None, published: bool = False) -> list[Row]:
    """Every number of the paper with ours under `profile`; without one, for each the weightiest profile that has it."""
    records = Records(ledger, published=published)
    names = [profile] if profile else [name for name in BY_WEIGHT if name in profiles.profile_paths()]
    result: list[Row] = []
    for name in names:
        fresh = [row for section in SECTIONS for row in section_rows(section, name, records)]
        result = [old if old.verdict != "not run" else new for old, new in zip(result or fresh, fresh, strict=True)]
    return result + [_row(r) for r in REPORTED if r.section not in SECTIONS]


def as_json(found: list[Row]) -> list[dict]:
    """The rows as plain JSON types."""
    return [asdict(row) | {"runs": list(row.runs)} for row in found]


def as_frame(found: list[Row]) -> pd.DataFrame:
    """The rows that were run, as text for readers."""
    return scoreboard([row for row in found if row.verdict != "not run"])


def table(profile: str | None = None) -> str:
    """The rows that were run, as text: what `run_all.sh` ends with."""
    found = [row for row in rows(profile) if row.verdict != "not run"]
    if not found:
        under = f" under the profile {profile!r}" if profile else ""
        return f"no results yet{under}: ./run_all.sh --profile {profile or 'quick'} computes them"
    width = max(len(row.quantity) for row in found)
    lines = [f"section  {'quantity':{width}} {'paper':>8} {'ours':>13}  {'unit':12} {'verdict':15} profile, data set"]
    for row in found:
        lines.append(
            f"{row.section:8} {row.quantity:{width}} {row.paper:8.1f} {row.text:>13}  {row.unit:12} {row.verdict:15}"
            f" {row.profile}, {row.dataset}"
        )
    return "\n".join(lines)


def scoreboard(found: list[Row]) -> pd.DataFrame:
    """Every number of the paper's text beside ours, as text."""

    return pd.DataFrame(
        {
            "section": row.section,
            "quantity": row.quantity,
            "unit": row.unit,
            "paper": f"{row.paper:g}",
            "ours": "–" if row.verdict == "not run" else row.text,
            "profile, data set": f"{row.profile}, {row.dataset}" if row.profile else "",
            "seeds": row.seeds or "",
            "verdict": row.verdict,
        }
        for row in found
    )


def beside(section: str, profile: str) -> pd.DataFrame:
    """Three columns side by side for a section: the paper, the weightiest published record, the live run."""
    live = [row for row in rows(profile) if row.section == section]
    best = [row for row in rows(published=True) if row.section == section]

    def shown(row: Row) -> str:
        if row.verdict == "not run":
            return "not run"
        return f"{row.text} ({row.profile}: {row.dataset})"

    return pd.DataFrame(
        {
            "quantity": [row.quantity for row in live],
            "unit": [row.unit for row in live],
            "paper": [f"{row.paper:g}" for row in live],
            "published": [shown(row) for row in best],
            "live": [shown(row) for row in live],
            "verdict, live": [row.verdict for row in live],
        }
    )
