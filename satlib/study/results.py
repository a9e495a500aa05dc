"""The paper's numbers beside ours, from records alone: no data set is needed, and no number is typed by hand."""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pandas as pd

from satlib.evaluation_checks import checks
from satlib.paper import REPORTED
from satlib.study import claims, costs, measurements
from satlib.study.claims import BEYOND, Claim, Model, Records, evaluation_checks, scenes, size_text
from satlib.study.claims.scenes import SceneModel
from satlib.study.measurement import Run
from satlib.study.records import Record
from satlib.study.settings import SECTIONS as STATED
from satlib.study.settings import profile_paths, settings

COSTS = {  # a reported time, and the way of training whose epoch it is
    "cifar10/cost/shared": "s = 64",
    "cifar10/cost/standard": "s = 1",
    "cifar10/cost/uad": "DeepFool UAD",
    "cifar10/cost/fictitious-play": "fictitious play",
}
SCENES = {  # a reported number: whose measure it is, and which model is more robust by it in the paper than which other
    "cityscapes/erm/eps_uni_targeted": ("ERM", "eps_uni", ("ERM",)),
    "cityscapes/s1/eps_uni_targeted": ("s = 1", "eps_uni", ("s = 1", "ERM")),
    "cityscapes/s5/eps_uni_targeted": ("s = 5", "eps_uni", ("s = 5", "s = 1")),
    "cityscapes/erm/eps_uni": ("ERM", "untargeted", ("ERM",)),
    "cityscapes/s1/eps_uni": ("s = 1", "untargeted", ("s = 1", "ERM")),
    "cityscapes/s5/eps_uni": ("s = 5", "untargeted", ("s = 5", "s = 1")),
    "cityscapes/s1/eps_adv": ("s = 1", "eps_adv", ("s = 1", "s = 5")),
    "cityscapes/s5/eps_adv": ("s = 5", "eps_adv", ("s = 1", "s = 5")),
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
            return BEYOND if self.runs else "no such model"
        return size_text(self.ours, self.spread)


Numbers = dict[str, dict[str, Any]]  # what the rows of reported numbers say of ours, by the numbers' keys


@dataclass(frozen=True)
class Section:
    """A section of the paper that has models to compare: its plan under some settings, and what its records become.

    models: those of a plan that have records, ERM first. With the record of costs, if the section has one, they give
    the claims and our numbers; with the settings, a table.
    """

    plan: Callable[[Any], Any]
    models: Callable[[Any, Records], list]
    claims: Callable[[list, Record | None], list[Claim]]
    numbers: Callable[[list, Record | None], Numbers]
    table: Callable[[Any, list], pd.DataFrame]


def evaluated(section: str, profile: str, records: Records) -> tuple[Any, list, Record | None]:
    """A section's settings under a profile, its models that have records, and the record of what training costs."""
    plan = measurements.plan(section, profile)
    models = SECTIONS[section].models(plan, records)
    return settings(section, profile), models, records.of(getattr(plan, "cost", None))


def published_claims(section: str, profile: str) -> list[Claim]:
    """The claims of a section, evaluated on a profile's published records."""
    if section == "checks":
        return published_evaluation(profile).claims
    _, models, cost = evaluated(section, profile, Records(published=True))
    return SECTIONS[section].claims(models, cost)


def published_models(section: str, profile: str) -> pd.DataFrame:
    """The models of a section in a profile's published records, as text."""
    settings, models, _ = evaluated(section, profile, Records(published=True))
    return SECTIONS[section].table(settings, models)


class PublishedEvaluation(NamedTuple):
    """What a profile's published records say of its evaluation: see notebook 09. Claims in words, the rest tables."""

    verdicts: pd.DataFrame
    bounds: pd.DataFrame
    claims: list[Claim]


def published_evaluation(profile: str) -> PublishedEvaluation:
    """The audits, the bounds by stronger attacks and the claims about them, from a profile's published records."""
    plan, records = measurements.plan("checks", profile), Records(published=True)

    def known(runs: Mapping[str, Run]) -> dict[str, Record]:
        return {name: record for name, run in runs.items() if (record := records.of(run))}

    audits = known(plan.audits | {f"ERM, {mask}": run for mask, run in plan.masked.items()})
    searches = {model: each for model, runs in plan.attacks.items() if "paper" in (each := known(runs))}
    seeds = {m: [record.metrics["eps_uni"] for record in records.found(plan.seeds[m])] for m in searches}
    found = evaluation_checks.bound_claims(searches, seeds) if searches else []
    if transfer := records.of(plan.transfer):
        found += evaluation_checks.transfer_claims(transfer.metrics)
        found.append(evaluation_checks.after_saving(transfer.metrics)[1])
    verdicts = evaluation_checks.verdicts({name: checks(record.metrics) for name, record in audits.items()})
    return PublishedEvaluation(verdicts, evaluation_checks.bounds(searches, seeds), found)


def _measured(model: Model | SceneModel, measure: str) -> str:
    return size_text(getattr(model, measure), model.spreads.get(measure))


def classifiers(settings: Any, models: list[Model]) -> pd.DataFrame:
    """A row of text for each model of section 6.1 or 6.2."""
    rows = []
    for m in models:
        row = {"model": m.title, "accuracy (%)": _measured(m, "accuracy")}
        row[f"eps_uni({settings.delta:g})"] = _measured(m, "eps_uni")
        if any(each.deepfool is not None for each in models):
            title = f"accuracy under DeepFool, eps = {settings.deepfool_eps:g} (%)"
            row[title] = "-" if m.deepfool is None else _measured(m, "deepfool")
        if any(each.entropy_bits is not None for each in models):
            row["entropy where fooled (bits)"] = "-" if m.entropy_bits is None else f"{m.entropy_bits:.2f}"
        rows.append(row | {"trainings, searches": f"{len(m.trainings)}, {len(m.searches)}"})
    return pd.DataFrame(rows)


def segmenters(settings: Any, models: list[SceneModel]) -> pd.DataFrame:
    """A row of text for each model of section 6.3."""
    columns = {
        "mean IoU (%)": "iou",
        f"targeted eps_uni({settings.delta:g})": "eps_uni",
        f"targeted eps_adv({settings.delta:g})": "eps_adv",
        f"untargeted eps_uni({settings.delta:g})": "untargeted",
        f"untargeted eps_adv({settings.delta:g})": "untargeted_adv",
    }
    return pd.DataFrame(
        {"model": m.title} | {title: _measured(m, measure) for title, measure in columns.items()} for m in models
    )


def markdown(frame: pd.DataFrame) -> str:
    """A table of text as GitHub shows it."""
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


TABLES: dict[str, Callable[[str, str], pd.DataFrame]] = {  # what texts can show, of a section and a profile
    "models": published_models,
    "claims": lambda section, profile: pd.DataFrame([vars(claim) for claim in published_claims(section, profile)]),
    "numbers": lambda section, profile: scoreboard(rows(published=True)),
    "costs": lambda section, profile: costs.table(profile),
    "audits": lambda section, profile: published_evaluation(profile).verdicts,
    "bounds": lambda section, profile: published_evaluation(profile).bounds,
}
BLOCK = re.compile(
    rf"(<!-- published ({'|'.join(TABLES)})(?: of ([\w.]+))?(?:: (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL
)


def with_tables(text: str) -> str:
    """A text with each block from `<!-- published TABLE of SECTION: PROFILE -->` to `<!-- end -->` rendered, with a
    table of TABLES; section and profile only where it depends on them. Section "checks" is notebook 09's."""

    def render(block: re.Match) -> str:
        opening, table, section, profile, closing = block.groups()
        return f"{opening}{markdown(TABLES[table](section, profile))}\n{closing}"

    return BLOCK.sub(render, text)


def _ours(
    value: float | None, verdict: str, *models: Model | SceneModel, spread: float | None = None
) -> dict[str, Any]:
    """Our number, the verdict on it, and what the models that it follows from say, as a row has them."""
    seeds, runs = min((m.seeds for m in models), default=0), tuple(r.id for m in models for r in m.records)
    return {"ours": value, "spread": spread, "seeds": seeds, "runs": runs, "verdict": verdict}


def _measure_of(model: Any, measure: str, verdict: str = "other setting", compared: Sequence = ()) -> dict[str, Any]:
    """A measure of a model, as `_ours`; compared: the models that the verdict follows from, this one among them."""
    return _ours(getattr(model, measure), verdict, *(compared or [model]), spread=model.spreads.get(measure))


def _beside_erm(model: Model | None, erm: Model) -> dict[str, Any]:
    """The robustness of a model beside that of ERM, as `_ours`."""
    if model is None:
        return _ours(None, "not reproduced")
    larger = claims.comparable(model.eps_uni) > claims.comparable(erm.eps_uni)
    return _measure_of(model, "eps_uni", DIRECTION[claims.verdict(larger)], [erm, model])


def _best(models: list[Model], *, sharedness: int, accuracy: float) -> Model | None:
    """The most robust model of a sharedness that keeps at least `accuracy` %."""
    kept = [m for m in models if m.sharedness == sharedness and m.accuracy >= accuracy and m.eps_uni is not None]
    return max(kept, key=lambda model: model.eps_uni or 0.0, default=None)


def _classifiers_numbers(key: str, models: list[Model], sharedness: int, accepted: Mapping[str, float]) -> Numbers:
    """ERM's, and those of the most robust model of a sharedness that loses at most so many points, by name."""
    erm = models[0]
    numbers = {f"{key}/erm/{measure}": _measure_of(erm, measure) for measure in ("accuracy", "eps_uni")}
    if any(m.sharedness == sharedness for m in models):
        for name, points in accepted.items():
            best = _best(models, sharedness=sharedness, accuracy=erm.accuracy - points)
            numbers[f"{key}/{name}/eps_uni"] = _beside_erm(best, erm)
    return numbers


def _cifar10_numbers(models: list[Model], cost: Record | None) -> Numbers:
    erm, points = models[0], 93.25 - 90.0
    numbers = _classifiers_numbers("cifar10", models, 64, {"no-loss": 0.0, "90": points})
    if accepted := _best(models, sharedness=64, accuracy=erm.accuracy - points):
        numbers["cifar10/90/loss"] = _ours(erm.accuracy - accepted.accuracy, "other setting", erm, accepted)
    standard = [m for m in models if m.sharedness == 1 and m.eps_uni is not None]
    pairs = [(m, other) for m in standard if (other := _best(models, sharedness=64, accuracy=m.accuracy))]
    if pairs:
        gain = statistics.mean((other.eps_uni or 0.0) - (m.eps_uni or 0.0) for m, other in pairs)
        used = {m.title: m for pair in pairs for m in pair}.values()
        numbers["cifar10/gain"] = _ours(gain, DIRECTION[claims.domination(models, "s = 64", "s = 1").verdict], *used)
    if cost:
        for key, way in COSTS.items():
            numbers[key] = _ours(cost.metrics["seconds"][way], "other setting") | {"runs": (cost.id,)}
    return numbers


def _imagenet_numbers(models: list[Model], cost: None = None) -> Numbers:
    erm, numbers = models[0], _classifiers_numbers("imagenet", models, 32, {"no-loss": 0.0})
    if good := next((m for m in models if (m.sharedness, m.eps, m.sigma) == (32, 10, 1)), None):
        lower = DIRECTION[claims.verdict(good.accuracy < erm.accuracy)]
        numbers["imagenet/good/accuracy"] = _measure_of(good, "accuracy", lower, [erm, good])
        numbers["imagenet/good/eps_uni"] = _beside_erm(good, erm)
    return numbers


def _cityscapes_numbers(models: list[SceneModel], cost: None = None) -> Numbers:
    chosen = {m.family: m for m in scenes.matched(models)}
    numbers = {"cityscapes/erm/iou": _measure_of(chosen["ERM"], "iou")}
    for key, (family, measure, order) in SCENES.items():
        if family in chosen:
            compared = [chosen[name] for name in order if name in chosen]
            verdict = "other setting"
            if len(compared) == 2:
                verdict = DIRECTION[scenes.larger(compared[0], compared[1], measure)]
            numbers[key] = _measure_of(chosen[family], measure, verdict, compared)
    return numbers


SECTIONS = {
    "6.1": Section(measurements.cifar10, claims.trained_models, claims.cifar10_claims, _cifar10_numbers, classifiers),
    "6.2": Section(
        measurements.imagenet, claims.trained_models, claims.imagenet_claims, _imagenet_numbers, classifiers
    ),
    "6.3": Section(
        measurements.cityscapes, scenes.scene_models, scenes.cityscapes_claims, _cityscapes_numbers, segmenters
    ),
}


def section_rows(section: str, profile: str, settings: Any, models: list, cost: Record | None = None) -> list[Row]:
    """The rows of a section for what `evaluated` gives under a profile; none of them was run where ERM was not."""
    paper = STATED[section]
    numbers = SECTIONS[section].numbers(models, cost) if models and models[0].family == "ERM" else {}
    rows = []
    for reported in (each for each in REPORTED if each.section == section):
        row = Row(section, reported.quantity, reported.unit, reported.value)
        if reported.key in numbers:
            dataset = models[0].records[0].labels["dataset"]
            if row.unit == "pixel units" and settings.delta != paper.delta:
                dataset += f", but delta = {settings.delta:g}"
            row = replace(row, profile=profile, dataset=dataset, **numbers[reported.key])
            if (
                settings == paper
                and row.spread
                and row.ours is not None
                and abs(row.ours - row.paper) <= 2 * row.spread
            ):
                row = replace(row, verdict="reproduced within spread")
        rows.append(row)
    return rows


def rows(profile: str | None = None, *, published: bool = False) -> list[Row]:
    """Every number of the paper with ours under `profile`; without one, for each the weightiest profile that has it."""
    records = Records(published=published)
    names = [profile] if profile else [name for name in BY_WEIGHT if name in profile_paths()]
    by_profile = [
        [row for section in SECTIONS for row in section_rows(section, name, *evaluated(section, name, records))]
        for name in names
    ]
    ours = zip(*by_profile, strict=True)  # of each number the rows of all profiles
    return [next((row for row in each if row.verdict != "not run"), each[0]) for each in ours]


def as_frame(rows: list[Row]) -> pd.DataFrame:
    """The rows that were run, as text for readers."""
    return scoreboard([row for row in rows if row.verdict != "not run"])


def table(profile: str | None = None) -> str:
    """The rows that were run, as text: what `run_all.sh` ends with."""
    frame = as_frame(rows(profile))
    if frame.empty:
        under = f" under the profile {profile!r}" if profile else ""
        return f"no results yet{under}: ./run_all.sh --profile {profile or 'quick'} computes them"
    lines = [list(frame.columns), *frame.astype(str).to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def scoreboard(rows: list[Row]) -> pd.DataFrame:
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
        for row in rows
    )


def beside(section: str, profile: str) -> pd.DataFrame:
    """Three columns side by side for a section: the paper, the weightiest published record, the live run."""

    def shown(row: Row) -> str:
        return "not run" if row.verdict == "not run" else f"{row.text} ({row.profile}: {row.dataset})"

    live = section_rows(section, profile, *evaluated(section, profile, Records()))
    published = [row for row in rows(published=True) if row.section == section]
    return pd.DataFrame(
        {
            "quantity": own.quantity,
            "unit": own.unit,
            "paper": f"{own.paper:g}",
            "published": shown(best),
            "live": shown(own),
            "verdict, live": own.verdict,
        }
        for own, best in zip(live, published, strict=True)
    )
