"""The paper's numbers beside ours, from records alone: no data set is needed, and no number is typed by hand."""

import re
import statistics
from dataclasses import asdict, dataclass

import pandas as pd

from satlib import experiments, profiles
from satlib.claims import Claim, Model, Records, cifar10_claims, trained_models
from satlib.ledger import Ledger
from satlib.paper import CIFAR10, REPORTED, Reported

COSTS = {  # a reported time, and the way of training whose epoch it is
    "cifar10/cost/shared": "s = 64",
    "cifar10/cost/standard": "s = 1",
    "cifar10/cost/uad": "DeepFool UAD",
    "cifar10/cost/fictitious-play": "fictitious play",
}
BY_WEIGHT = ("paper", "gpu", "laptop", "quick")  # which profile's result counts for more


@dataclass(frozen=True)
class Row:
    """One number of the paper and ours for it; None where there is none.

    spread: standard deviation over the seeds, of which every model has at least `seeds`. runs: ids of the records that
    `ours` follows from.
    verdict: "same direction" or "not reproduced" for a claim that compares models, "other setting" for a number of
    one model that is smaller, shorter trained or on other data than the paper's, "not run".
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


def cifar10_plan(profile: str) -> experiments.Plan:
    """The plan of section 6.1 under a profile."""
    return experiments.cifar10(experiments.with_parameters(CIFAR10, experiments.parameters(profile, "04_cifar10")))


def published_claims(profile: str) -> list[Claim]:
    """The claims of section 6.1, evaluated on a profile's published records."""
    plan, records = cifar10_plan(profile), Records(published=True)
    return cifar10_claims(trained_models(plan, records), records.of(plan.cost) if plan.cost else None)


def published_models(profile: str) -> pd.DataFrame:
    """The models of section 6.1 in a profile's published records, under both attacks, with the spread over seeds."""
    settings = experiments.with_parameters(CIFAR10, experiments.parameters(profile, "04_cifar10"))
    models = trained_models(experiments.cifar10(settings), Records(published=True))

    def shown(model: Model, value: float | None, name: str) -> str:
        spread = f" ± {model.spreads[name]:.1f}" if name in model.spreads else ""
        return "> 255" if value is None else f"{value:.1f}{spread}"

    rows = [
        {
            "model": m.title,
            "accuracy (%)": shown(m, m.accuracy, "accuracy"),
            f"eps_uni({settings.delta:g})": shown(m, m.eps_uni, "eps_uni"),
            f"accuracy under DeepFool, eps = {settings.deepfool_eps:g} (%)": "-"
            if m.deepfool is None
            else shown(m, m.deepfool, "deepfool"),
            "trainings, searches": f"{len(m.trainings)}, {len(m.searches)}",
        }
        for m in models
    ]
    return pd.DataFrame(rows)


def markdown(frame: pd.DataFrame) -> str:
    """A table of text as GitHub shows it."""
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


BLOCK = re.compile(r"(<!-- published (models|claims): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """A text with each block between `<!-- published models: PROFILE -->` (or `claims`) and `<!-- end -->` rendered."""

    def render(found: re.Match) -> str:
        opening, what, profile, closing = found.groups()
        if what == "models":
            frame = published_models(profile)
        else:
            frame = pd.DataFrame([vars(claim) for claim in published_claims(profile)])
        return f"{opening}{markdown(frame)}\n{closing}"

    return BLOCK.sub(render, text)


def _best(models: list[Model], *, sharedness: int, accuracy: float) -> Model | None:
    """The most robust model of a sharedness that keeps at least `accuracy` %."""
    kept = [m for m in models if m.sharedness == sharedness and m.accuracy >= accuracy and m.eps_uni is not None]
    return max(kept, key=lambda model: model.eps_uni or 0.0, default=None)


def cifar10_rows(profile: str, records: Records) -> list[Row]:
    """The rows of section 6.1 for a profile's records."""
    plan = cifar10_plan(profile)
    models, cost = trained_models(plan, records), records.of(plan.cost) if plan.cost else None
    reported = {r.key: r for r in REPORTED if r.key.startswith("cifar10/")}
    rows = {key: _row(r) for key, r in reported.items()}
    erm = next((m for m in models if m.family == "ERM"), None)
    if erm is not None:

        def fill(key: str, ours: float | None, used: list[Model], verdict: str, spread: float | None = None) -> None:
            rows[key] = Row(
                **asdict(_row(reported[key]))
                | {
                    "ours": ours,
                    "spread": spread,
                    "seeds": min((len(m.searches) for m in used), default=0),
                    "profile": profile,
                    "dataset": erm.trainings[0].labels.get("dataset"),
                    "runs": tuple(r.id for m in used for r in m.records),
                    "verdict": verdict,
                }
            )

        fill("cifar10/erm/accuracy", erm.accuracy, [erm], "other setting", erm.spreads.get("accuracy"))
        fill("cifar10/erm/eps_uni", erm.eps_uni, [erm], "other setting", erm.spreads.get("eps_uni"))
        if any(m.sharedness == 64 for m in models):
            base = erm.eps_uni or 0.0
            kept = _best(models, sharedness=64, accuracy=erm.accuracy)
            accepted = _best(models, sharedness=64, accuracy=erm.accuracy - (93.25 - 90.0))
            for key, model in (("cifar10/no-loss/eps_uni", kept), ("cifar10/90/eps_uni", accepted)):
                if model is None:
                    fill(key, None, [erm], "not reproduced")
                else:
                    verdict = "same direction" if (model.eps_uni or 0.0) > base else "not reproduced"
                    fill(key, model.eps_uni, [erm, model], verdict, model.spreads.get("eps_uni"))
            if accepted is not None:
                fill("cifar10/90/loss", erm.accuracy - accepted.accuracy, [erm, accepted], "same direction")
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
            fill("cifar10/gain", gain, used, "same direction" if gain > 0 else "not reproduced")
    if cost is not None:
        dataset = cost.labels.get("dataset")
        for key, way in COSTS.items():
            measured = {
                "ours": cost.metrics["seconds"][way],
                "profile": profile,
                "dataset": dataset,
                "runs": (cost.id,),
            }
            rows[key] = Row(**asdict(_row(reported[key])) | measured | {"verdict": "other setting"})
    return list(rows.values())


def _row(reported: Reported) -> Row:
    return Row(reported.section, reported.quantity, reported.unit, reported.value)


def rows(profile: str | None = None, *, ledger: Ledger | None = None, published: bool = False) -> list[Row]:
    """Every number of the paper with ours under `profile`; without one, for each the weightiest profile that has it."""
    records = Records(ledger, published=published)
    names = [profile] if profile else [name for name in BY_WEIGHT if profiles.profile_path(name).is_file()]
    result: list[Row] = []
    for name in names:
        fresh = cifar10_rows(name, records)
        result = [old if old.verdict != "not run" else new for old, new in zip(result or fresh, fresh, strict=True)]
    return result + [_row(r) for r in REPORTED if not r.key.startswith("cifar10/")]


def as_json(found: list[Row]) -> list[dict]:
    """The rows as plain JSON types."""
    return [asdict(row) | {"runs": list(row.runs)} for row in found]


def as_frame(found: list[Row]) -> pd.DataFrame:
    """The rows that were run, for readers: numbers as numbers, None where there is none."""
    columns = ["section", "quantity", "unit", "paper", "ours", "spread", "verdict", "profile", "dataset"]
    ran = [asdict(row) for row in found if row.verdict != "not run"]
    return pd.DataFrame(ran, columns=columns).rename(columns={"dataset": "data set"})


def table(profile: str | None = None) -> str:
    """The rows that were run, as text: what `run_all.sh` ends with."""
    found = [row for row in rows(profile) if row.verdict != "not run"]
    if not found:
        under = f" under the profile {profile!r}" if profile else ""
        return f"no results yet{under}: ./run_all.sh --profile {profile or 'quick'} computes them"
    width = max(len(row.quantity) for row in found)
    lines = [f"section  {'quantity':{width}} {'paper':>8} {'ours':>11}  {'unit':12} {'verdict':15} profile, data set"]
    for row in found:
        ours = "-" if row.ours is None else f"{row.ours:.1f}" + (f" ±{row.spread:.1f}" if row.spread else "")
        lines.append(
            f"{row.section:8} {row.quantity:{width}} {row.paper:8.1f} {ours:>11}  {row.unit:12} {row.verdict:15}"
            f" {row.profile}, {row.dataset}"
        )
    return "\n".join(lines)


def beside(profile: str) -> pd.DataFrame:
    """Three columns side by side for section 6.1: the paper, the weightiest published record, the live run."""
    live = [row for row in rows(profile) if row.section == "6.1"]
    best = [row for row in rows(published=True) if row.section == "6.1"]

    def shown(row: Row) -> str:
        if row.verdict == "not run":
            return "not run"
        value = "none" if row.ours is None else f"{row.ours:.1f}" + (f" ± {row.spread:.1f}" if row.spread else "")
        return f"{value} ({row.profile}: {row.dataset})"

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
