"""The paper's numbers beside ours, from records alone: no data set is needed, and no number is typed by hand."""

import functools
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from satlib.evaluation_checks import checks
from satlib.paper import REPORTED
from satlib.progress import aligned
from satlib.study import claims, costs, measurements
from satlib.study.claims import Claim, Model, Records, evaluation_checks, missed_at, scenes, size_text
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
BY_ENSEMBLE = dict(zip(scenes.UNIVERSAL["S-PGD"], scenes.UNIVERSAL["ensemble"], strict=True))  # measures of scenes
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
SUMMARY = (  # the reported numbers that a short table has
    *("cifar10/erm/accuracy", "cifar10/erm/eps_uni", "cifar10/90/eps_uni", "cifar10/gain", "imagenet/good/eps_uni"),
    *("cityscapes/erm/eps_uni_targeted", "cityscapes/s5/eps_uni_targeted", "cityscapes/s5/eps_adv"),
)
BY_WEIGHT = ("paper", "gpu", "laptop", "quick")  # which profile's result counts for more


@dataclass(frozen=True)
class Row:
    """One number of the paper and ours for it; None where there is none.

    ours is by the paper's attack, ensemble by `satlib.robustness.strongest`, with spread, seeds, runs and verdict of
    its own; where the most robust of several models is meant, each has its own.
    spread: standard deviation over the seeds, of which every model has at least `seeds`. runs: ids of the records that
    `ours` follows from. verdict: "reproduced within spread" under the paper's settings within two spreads of its
    number; else "same direction", "not reproduced" or "not decided" for a number with which the paper compares models,
    by the rule of its claims; "other setting" for one model's that is smaller, shorter trained or on other data; or
    "not run".
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
    ensemble: float | None = None
    ensemble_spread: float | None = None
    ensemble_seeds: int = 0
    ensemble_runs: tuple[str, ...] = ()
    ensemble_verdict: str = "not run"

    @property
    def text(self) -> str:
        """Our number with its spread; where there is none, why."""
        return _found(self.ours, self.spread, self.runs, self.verdict)

    @property
    def ensemble_text(self) -> str:
        """The ensemble's number with its spread; "–" where it was not run."""
        return _found(self.ensemble, self.ensemble_spread, self.ensemble_runs, self.ensemble_verdict)

    @property
    def verdicts(self) -> str:
        """The verdict, and the ensemble's where it is another one."""
        same = self.ensemble_verdict in ("not run", self.verdict)
        return self.verdict if same else f"{self.ensemble_verdict} (by the paper's attack: {self.verdict})"


def _found(value: float | None, spread: float | None, runs: Sequence[str], verdict: str) -> str:
    """A number in words; where there is none, why."""
    if verdict == "not run" or (value is None and not runs):
        return "no such model" if verdict == "not reproduced" else "–"
    return size_text(value, spread)


Numbers = dict[str, dict[str, Any]]  # what the rows of reported numbers say of ours, by the numbers' keys


class Section(NamedTuple):
    """What records say of a section of the paper that has models to compare: those that have records, ERM first; of
    them and the record of costs, if any, the claims and our numbers; of the settings and them a table."""

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


def claims_table(found: Iterable[Claim]) -> pd.DataFrame:
    """A row for each claim, with what it rests on."""
    frame = pd.DataFrame([vars(claim) for claim in found], columns=["claim", "attack", "verdict", "evidence"])
    return frame if frame["attack"].any() else frame.drop(columns="attack")


def verdicts(found: Iterable[Claim]) -> pd.DataFrame:
    """A row for each claim, with its verdict by each attack; no column for an attack by which none was evaluated."""
    columns = {
        "ensemble": "by the ensemble",
        "S-PGD": "by the paper's attack",
        "DeepFool": "under DeepFool",
        "": "verdict",
    }
    rows: dict[str, dict[str, str]] = {}
    for claim in found:
        rows.setdefault(claim.claim, {"claim": claim.claim})[columns[claim.attack]] = claim.verdict
    frame = pd.DataFrame(rows.values(), columns=["claim", *columns.values()])
    return frame.dropna(axis="columns", how="all").fillna("–")


def published_models(section: str, profile: str) -> pd.DataFrame:
    """The models of a section in a profile's published records, as text."""
    settings, models, _ = evaluated(section, profile, Records(published=True))
    return SECTIONS[section].table(settings, models)


class PublishedEvaluation(NamedTuple):
    """Audits, bounds by single attacks and by the ensemble, what each of its attacks adds, and claims: notebook 09."""

    verdicts: pd.DataFrame
    bounds: pd.DataFrame
    ensemble: pd.DataFrame
    ablation: pd.DataFrame
    claims: list[Claim]


def published_evaluation(profile: str) -> PublishedEvaluation:
    """What a profile's published records say of its evaluation."""
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
    strongest = {name: each for name, runs in plan.strongest.items() if (each := records.found(runs))}
    paper = {name: [r.metrics["eps_uni"] for r in records.found(plan.paper[name])] for name in strongest}
    found += [
        evaluation_checks.order_claim(strongest, paper),
        evaluation_checks.saturation_claim(strongest, known(plan.doubled)),
    ]
    ensemble = evaluation_checks.lowered(strongest, paper), evaluation_checks.ablation(strongest)
    return PublishedEvaluation(verdicts, evaluation_checks.bounds(searches, seeds), *ensemble, found)


def _measured(model: Model | SceneModel, measure: str) -> str:
    return size_text(getattr(model, measure), model.spreads.get(measure))


def _missed(*asked: Sequence[Record]) -> str:
    """Where the searches by each way of searching missed, each the mean over them."""
    return "; ".join(f"{statistics.mean(map(missed_at, searches)):.1f}" for searches in asked if searches)


def classifiers(settings: Any, models: list[Model]) -> pd.DataFrame:
    """A row of text for each model of section 6.1 or 6.2; no column for what no model has."""
    deepfool = f"accuracy under DeepFool, eps = {getattr(settings, 'deepfool_eps', 0):g} (%)"
    rows = [
        {
            "model": m.title,
            "accuracy (%)": _measured(m, "accuracy"),
            f"eps_uni({settings.delta:g}), ensemble": _measured(m, "strongest") if _has(m, "strongest") else None,
            f"eps_uni({settings.delta:g}), paper's attack": _measured(m, "eps_uni"),
            "missed at": _missed(m.strongest_searches, m.searches),
            "from outside": m.bound and f"{m.bound.metrics['eps_uni']:.1f} ({m.bound.config['author']})",
            deepfool: None if m.deepfool is None else _measured(m, "deepfool"),
            "entropy where fooled (bits)": None if m.entropy_bits is None else f"{m.entropy_bits:.2f}",
            "trainings, searches": f"{len(m.trainings)}, {len(m.strongest_searches)} + {len(m.searches)}",
        }
        for m in models
    ]
    return pd.DataFrame(rows).dropna(axis="columns", how="all").fillna("-")


def segmenters(settings: Any, models: list[SceneModel]) -> pd.DataFrame:
    """A row of text for each model of section 6.3."""
    columns = {
        "mean IoU (%)": "iou",
        f"targeted eps_uni({settings.delta:g}), ensemble": "strongest",
        f"targeted eps_uni({settings.delta:g}), paper's attack": "eps_uni",
        f"targeted eps_adv({settings.delta:g})": "eps_adv",
        f"untargeted eps_uni({settings.delta:g}), ensemble": "strongest_untargeted",
        f"untargeted eps_uni({settings.delta:g}), paper's attack": "untargeted",
        f"untargeted eps_adv({settings.delta:g})": "untargeted_adv",
    }
    run = {"strongest": "ensemble", "strongest_untargeted": "untargeted_ensemble"}

    def shown(m: SceneModel, measure: str) -> str | None:
        return _measured(m, measure) if measure not in run or getattr(m, run[measure]) else None

    rows = [{"model": m.title, **{title: shown(m, each) for title, each in columns.items()}} for m in models]
    return pd.DataFrame(rows).dropna(axis="columns", how="all").fillna("-")


def markdown(frame: pd.DataFrame) -> str:
    """A table of text as GitHub shows it."""
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


TABLES: dict[str, Callable[[str, str], pd.DataFrame]] = {  # what texts can show, of a section and a profile
    "models": published_models,
    "verdicts": lambda section, profile: verdicts(published_claims(section, profile)),
    "claims": lambda section, profile: claims_table(published_claims(section, profile)),
    "numbers": lambda section, profile: scoreboard(rows(published=True)),
    "summary": lambda section, profile: summary(),
    "costs": lambda section, profile: costs.table(profile),
    "audits": lambda section, profile: published_evaluation(profile).verdicts,
    "bounds": lambda section, profile: published_evaluation(profile).bounds,
    "ensemble": lambda section, profile: published_evaluation(profile).ensemble,
    "ablation": lambda section, profile: published_evaluation(profile).ablation,
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
    value: float | None, verdict: str, compared: Iterable, spread: float | None = None, measure: str = "eps_uni"
) -> dict[str, Any]:
    """Our number, the verdict on it, and what the models that both follow from say, as a row has them."""
    models = list(compared)
    seeds, runs = min((m.seeds(measure) for m in models), default=0), tuple(r.id for m in models for r in m.records)
    return {"ours": value, "spread": spread, "seeds": seeds, "runs": runs, "verdict": verdict}


def _measure_of(model: Any, measure: str, verdict: str = "other setting", compared: Sequence = ()) -> dict[str, Any]:
    """A measure of a model, as `_ours`; compared: the models that the verdict follows from, this one among them."""
    return _ours(getattr(model, measure), verdict, compared or [model], model.spreads.get(measure), measure)


def _twice(of: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """What `of` says by the paper's attack, with what it says by the ensemble beside it."""
    return _beside(of("eps_uni"), of("strongest"))


def _beside(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Our number by the paper's attack with the ensemble's beside it."""
    both = {"ensemble": other["ours"]} | {
        f"ensemble_{name}": other[name] for name in ("spread", "seeds", "runs", "verdict")
    }
    return ours | both


def _beside_erm(model: Model | None, erm: Model, measure: str, asked: Sequence[Model]) -> dict[str, Any]:
    """The robustness of a model beside that of ERM, as `_ours`; asked: the models among which it was chosen."""
    if not all(_has(each, measure) for each in (erm, *asked)):
        return _ours(None, "not run", [])
    if model is None:
        return _ours(None, "not reproduced", [])
    more = claims.comparable(getattr(model, measure)) - claims.comparable(getattr(erm, measure))
    decided = abs(more) > max(m.spreads.get(measure, 0.0) for m in (erm, model))
    return _measure_of(model, measure, DIRECTION[claims.verdict(more > 0) if decided else "not decided"], [erm, model])


def _best_beside_erm(asked: Sequence[Model], erm: Model, measure: str) -> dict[str, Any]:
    """The most robust of the models, as `_beside_erm`."""
    return _beside_erm(_best(asked, measure), erm, measure, asked)


def _has(model: Model, measure: str) -> bool:
    """Whether a model was searched by the attack of this measure."""
    return model.size(measure) is not None


def _best(models: Sequence[Model], measure: str) -> Model | None:
    """The most robust of the models, of those that were asked."""
    return next((m for m, _ in claims.front(models, measure)), None)


def _classifiers_numbers(key: str, models: list[Model], family: str, accepted: Mapping[str, float]) -> Numbers:
    """ERM's, and by name those of the most robust model of a family that loses at most so many points."""
    erm = models[0]
    numbers = {f"{key}/erm/accuracy": _measure_of(erm, "accuracy")}
    numbers[f"{key}/erm/eps_uni"] = _twice(
        lambda measure: _measure_of(erm, measure, "other setting" if _has(erm, measure) else "not run")
    )
    if any(m.family == family for m in models):
        for name, points in accepted.items():
            kept = [m for m in models if m.family == family and m.accuracy >= erm.accuracy - points]
            best = functools.partial(_best_beside_erm, kept, erm)
            numbers[f"{key}/{name}/eps_uni"] = _twice(best)
    return numbers


def _cifar10_numbers(models: list[Model], cost: Record | None) -> Numbers:
    erm, points = models[0], 93.25 - 90.0
    numbers = _classifiers_numbers("cifar10", models, "s = 64", {"no-loss": claims.NEAR, "90": points})
    kept = [m for m in models if m.family == "s = 64" and m.accuracy >= erm.accuracy - points]
    if accepted := _best(kept, "eps_uni"):
        numbers["cifar10/90/loss"] = _ours(erm.accuracy - accepted.accuracy, "other setting", [erm, accepted])

    def gain(measure: str) -> dict[str, Any]:
        """By how much s = 64 is more robust than s = 1, on average at equal accuracy."""
        attack = next(name for name, each in claims.ATTACKS.items() if each == measure)
        verdict = claims.domination(models, "s = 64", "s = 1", attack).verdict
        if not (compared := claims.at_equal_accuracy(models, "s = 64", "s = 1", measure)):
            return _ours(None, "not run" if verdict == "not run" else "not decided", [])
        used = {m.title: m for each in compared for m in (each.model, *each.others)}.values()
        if any(getattr(m, measure) is None for m in used):  # beyond 255: nobody knows by how much
            return _ours(None, DIRECTION[verdict], [])
        return _ours(statistics.mean(each.gap for each in compared), DIRECTION[verdict], used, measure=measure)

    if any(m.family == "s = 64" for m in models) and any(m.family == "s = 1" for m in models):
        numbers["cifar10/gain"] = _twice(gain)
    if cost:
        for key, way in COSTS.items():
            numbers[key] = _ours(cost.metrics["seconds"][way], "other setting", []) | {"runs": (cost.id,)}
    return numbers


def _imagenet_numbers(models: list[Model], cost: None = None) -> Numbers:
    erm, numbers = models[0], _classifiers_numbers("imagenet", models, "s = 32", {"no-loss": claims.NEAR})
    if good := next((m for m in models if (m.sharedness, m.eps, m.sigma) == (32, 10, 1)), None):
        lower = DIRECTION[claims.verdict(good.accuracy < erm.accuracy)]
        numbers["imagenet/good/accuracy"] = _measure_of(good, "accuracy", lower, [erm, good])
        numbers["imagenet/good/eps_uni"] = _twice(lambda measure: _beside_erm(good, erm, measure, [good]))
    return numbers


def _cityscapes_numbers(models: list[SceneModel], cost: None = None) -> Numbers:
    chosen = {m.family: m for m in scenes.matched(models)}
    numbers = {"cityscapes/erm/iou": _measure_of(chosen["ERM"], "iou")}
    for key, (family, measure, order) in SCENES.items():
        if family not in chosen:
            continue
        compared = [chosen[name] for name in order if name in chosen]

        def judged(measure: str, model: SceneModel = chosen[family], compared: list = compared) -> dict[str, Any]:
            verdict = "other setting" if scenes.known(model, measure) else "not run"
            if len(compared) == 2:
                verdict = DIRECTION.get(found := scenes.larger(compared[0], compared[1], measure), found)
            return _measure_of(model, measure, verdict, compared)

        numbers[key] = judged(measure)
        if measure in BY_ENSEMBLE:
            numbers[key] = _beside(numbers[key], judged(BY_ENSEMBLE[measure]))
    return numbers


SECTIONS = {
    "6.1": Section(claims.trained_models, claims.cifar10_claims, _cifar10_numbers, classifiers),
    "6.2": Section(claims.trained_models, claims.imagenet_claims, _imagenet_numbers, classifiers),
    "6.3": Section(scenes.scene_models, scenes.cityscapes_claims, _cityscapes_numbers, segmenters),
}


def section_rows(section: str, profile: str, settings: Any, models: list, cost: Record | None = None) -> list[Row]:
    """The rows of a section for what `evaluated` gives under a profile; none of them was run where ERM was not."""
    paper = STATED[section]
    numbers = SECTIONS[section].numbers(models, cost) if models and models[0].family == "ERM" else {}
    rows = []
    for reported in (each for each in REPORTED if each.section == section):
        found = numbers.get(reported.key, {})
        if found:
            dataset = models[0].records[0].labels["dataset"]
            if reported.unit == "pixel units" and settings.delta != paper.delta:
                dataset += f", but delta = {settings.delta:g}"
            found |= {"profile": profile, "dataset": dataset}
            ours, spread = found["ours"], found["spread"]
            if settings == paper and spread and ours is not None and abs(ours - reported.value) <= 2 * spread:
                found["verdict"] = "reproduced within spread"
        rows.append(Row(section, reported.quantity, reported.unit, reported.value, **found))
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
    return aligned([list(frame.columns), *frame.astype(str).to_numpy().tolist()])


def scoreboard(rows: list[Row]) -> pd.DataFrame:
    """Every number of the paper's text beside ours, as text."""
    return pd.DataFrame(
        {
            "section": row.section,
            "quantity": row.quantity,
            "unit": row.unit,
            "paper": f"{row.paper:g}",
            "ours": "–" if row.verdict == "not run" else row.text,
            "by the ensemble": row.ensemble_text,
            "profile, data set": f"{row.profile}, {row.dataset}" if row.profile else "",
            "seeds (ensemble)": f"{row.seeds or ''}" + (f" ({row.ensemble_seeds})" if row.ensemble_seeds else ""),
            "verdict": row.verdicts,
        }
        for row in rows
    )


def summary() -> pd.DataFrame:
    """The published numbers of SUMMARY, as text."""
    found = dict(zip((each.key for each in REPORTED), rows(published=True), strict=True))
    frame = scoreboard([found[key] for key in SUMMARY])
    quantity = frame["section"] + ", " + frame["quantity"] + " (" + frame["unit"] + ")"
    kept = frame[["paper", "ours", "by the ensemble", "verdict"]]
    kept.insert(0, "section, quantity (unit)", quantity)
    return kept.rename(columns={"ours": "ours, by the paper's attack"})


def beside(section: str, profile: str) -> pd.DataFrame:
    """Three columns side by side for a section: the paper, the weightiest published record, the live run."""

    def shown(rows: Iterable[Row]) -> list[str]:
        return ["not run" if r.verdict == "not run" else f"{r.text} ({r.profile}: {r.dataset})" for r in rows]

    live = section_rows(section, profile, *evaluated(section, profile, Records()))
    published = shown(row for row in rows(published=True) if row.section == section)
    columns = {"published": published, "live": shown(live), "verdict, live": [row.verdict for row in live]}
    return scoreboard(live)[["quantity", "unit", "paper"]].assign(**columns)
