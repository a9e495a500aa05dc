"""Models with what both attacks say of them, Pareto fronts, and the paper's claims evaluated on records."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from satlib.study import experiments
from satlib.study.kinds import KINDS
from satlib.study.ledger import Ledger
from satlib.study.records import Record, digest_of
from satlib.study.runs import Run


class Records:
    """Finds the records of planned runs by their settings, so that nobody needs the data to look them up."""

    def __init__(self, ledger: Ledger | None = None, *, published: bool = False):
        ledger = ledger or Ledger()
        known = ledger.records(published=published)
        self._by_settings: dict[tuple[str, str], list[Record]] = {}
        for record in sorted(known, key=lambda record: record.created, reverse=True):
            if record.kind in KINDS and record.version == KINDS[record.kind].version:
                self._by_settings.setdefault((record.kind, digest_of(record.config)), []).append(record)

    def of(self, run: Run) -> Record | None:
        """The newest record of the run's kind and settings that builds on records of its parents."""
        return next(iter(self._all(run)), None)

    def _all(self, run: Run) -> list[Record]:
        parents = {role: {r.id for r in self._all(parent)} for role, parent in run.parents.items()}
        return [
            record
            for record in self._by_settings.get((run.kind, digest_of(run.config)), [])
            if record.parents.keys() == parents.keys()
            and all(record.parents[role] in found for role, found in parents.items())
        ]


@dataclass(frozen=True)
class Model:
    """A trained model with its evaluations, as figures and tables take it. accuracy in %, eps_uni in pixel units.

    family: "ERM", "s = 64", or the name of a baseline. sharedness and sigma are None but for (shared) adversarial
    training, eps for ERM. accuracy, eps_uni and deepfool are means over the trainings that were evaluated, eps_uni of
    each over its searches, None where one did not succeed; deepfool: accuracy in % under the DeepFool universal
    perturbation, None if not run. spreads: the standard deviation of each of the three over trainings where there are
    several, else over searches, by name. run: the first training; predictions: those of it.
    """

    title: str
    family: str
    sharedness: int | None
    eps: float | None
    sigma: float | None
    accuracy: float
    eps_uni: float | None
    deepfool: float | None
    spreads: Mapping[str, float]
    run: Run | None = None
    trainings: tuple[Record, ...] = ()
    searches: tuple[Record, ...] = ()
    deepfools: tuple[Record, ...] = ()
    predictions: Record | None = None

    def robustness(self, measure: str) -> float | None:
        """By "eps_uni" (pixel units) or "deepfool" (%)."""
        return {"eps_uni": self.eps_uni, "deepfool": self.deepfool}[measure]

    @property
    def records(self) -> tuple[Record, ...]:
        return (*self.trainings, *self.searches, *self.deepfools, *([self.predictions] if self.predictions else []))

    @property
    def entropy_bits(self) -> float | None:
        """Of the classes predicted where the universal perturbation fools the model (A.7); None where it is unknown."""
        return self.predictions.metrics["entropy_bits"]["fooled"] if self.predictions else None


def trained_models(plan: experiments.Plan, records: Records) -> list[Model]:
    """The models of a plan that have a record, the undefended one first."""
    described: list[tuple[list[Run], str, int | None, float | None, float | None]] = [
        ([plan.erm], "ERM", None, None, None),
        *((runs, f"s = {s}", s, eps, sigma) for (s, eps, sigma), runs in plan.models.items()),
        *(([run], name, None, eps, None) for (name, eps), run in plan.baselines.items()),
    ]
    found = []
    for runs, family, sharedness, eps, sigma in described:
        seeds = []
        for run in runs:
            training, deepfool = records.of(run), records.of(plan.deepfool[run]) if run in plan.deepfool else None
            searches = [r for search in plan.robustness[run] if (r := records.of(search))]
            if training and searches:
                seeds.append((training, searches, deepfool))
        if not seeds:
            continue
        sizes = [[r.metrics["eps_uni"] for r in searches] for _, searches, _ in seeds]
        unbroken = any(size is None for each in sizes for size in each)
        values = {
            "accuracy": [[100 * training.metrics["accuracy"]] for training, _, _ in seeds],
            "eps_uni": [] if unbroken else sizes,
            "deepfool": [[100 * deepfool.metrics["accuracy"]] for *_, deepfool in seeds if deepfool],
        }
        means = {name: statistics.mean(map(statistics.mean, each)) for name, each in values.items() if each}
        found.append(
            Model(
                title=runs[0].title,
                family=family,
                sharedness=sharedness,
                eps=eps,
                sigma=sigma,
                accuracy=means["accuracy"],
                eps_uni=means.get("eps_uni"),
                deepfool=means.get("deepfool"),
                spreads={name: spread for name, each in values.items() if (spread := _spread(each)) is not None},
                run=runs[0],
                trainings=tuple(training for training, _, _ in seeds),
                searches=tuple(search for _, searches, _ in seeds for search in searches),
                deepfools=tuple(deepfool for *_, deepfool in seeds if deepfool),
                predictions=records.of(plan.predictions[runs[0]]) if runs[0] in plan.predictions else None,
            )
        )
    return found


def _spread(values: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation over trainings, of each the mean over its searches; of a single training, over these."""
    over = [statistics.mean(each) for each in values] if len(values) > 1 else [x for each in values for x in each]
    return statistics.stdev(over) if len(over) > 1 else None


ATTACKS = {"S-PGD": "eps_uni", "DeepFool": "deepfool"}  # the measure of robustness under each attack


def front(models: Sequence[Model], measure: str = "eps_uni") -> list[tuple[Model, float]]:
    """The Pareto front with each model's robustness: those that no other beats in accuracy and robustness.

    measure: "eps_uni" or "deepfool"; models without it are left out. The most accurate one is the last.
    """
    known = [(model, value) for model in models if (value := model.robustness(measure)) is not None]
    best: list[tuple[Model, float]] = []
    for model, value in sorted(known, key=lambda pair: (-pair[0].accuracy, -pair[1])):
        if not best or value > best[-1][1]:
            best.append((model, value))
    return best[::-1]


def most_robust(models: Sequence[Model]) -> list[Model]:
    """Of each family the model with the largest eps_uni, smallest first; models that nothing broke are left out."""
    broken = [(model.eps_uni, model) for model in models if model.eps_uni is not None]
    best = {model.family: model for _, model in sorted(broken, key=lambda pair: pair[0])}  # the last of a family stays
    return sorted(best.values(), key=lambda model: model.eps_uni or 0.0)


def domination(models: Sequence[Model], better: str, worse: str, measure: str = "eps_uni") -> tuple[str, str]:
    """Whether family `better` dominates `worse`, by the fronts of both: (verdict, what it rests on).

    Each model on the worse front is compared with the most robust one of `better` that is at least as accurate. It
    holds if all that can be compared are beaten, and at least one can; it does not hold if one of them is more robust
    by more than the largest spread over seeds on both fronts; with none to compare, differences within it, or no model
    with several seeds, it is not decided.
    """
    strong, weak = (front([m for m in models if m.family == family], measure) for family in (better, worse))
    if not strong or not weak:
        return "not run", ""
    gaps = []
    for model, value in weak:
        above = [other for m, other in strong if m.accuracy >= model.accuracy]
        gaps += [max(above) - value] if above else []
    if not gaps:
        return "not decided", f"no {better} model is as accurate as one of {worse}"
    spreads = [m.spreads[measure] for m, _ in (*strong, *weak) if measure in m.spreads]
    unit = "pixel units" if measure == "eps_uni" else "points"
    listed = ", ".join(f"{gap:+.1f}" for gap in gaps)
    evidence = f"{len(gaps)} of {len(weak)} {worse} models can be compared: {listed} {unit}"
    if not spreads:
        return "not decided", f"{evidence}; one seed each"
    if all(gap > max(spreads) for gap in gaps):
        return "holds", evidence
    return ("does not hold" if any(gap < -max(spreads) for gap in gaps) else "not decided"), evidence


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, evaluated on records: "holds", "does not hold", "not decided" or "not run"."""

    claim: str
    verdict: str
    evidence: str


def cifar10_claims(models: Sequence[Model], cost: Record | None) -> list[Claim]:
    """The claims of section 6.1."""
    found = [Claim(f"s = 64 dominates s = {s} (S-PGD)", *domination(models, "s = 64", f"s = {s}")) for s in (1, 8)]
    found.append(_alike(models, "s = 1", "s = 8"))
    for name in ("DeepFool UAD", "fictitious play"):
        each = {s: domination(models, f"s = {s}", name) for s in (1, 8, 64)}
        verdicts = {verdict for verdict, _ in each.values()}
        order = ("does not hold", "not run", "not decided", "holds")
        text = "; ".join(f"s = {s}: {verdict} ({evidence})" for s, (verdict, evidence) in each.items() if evidence)
        worst = next(verdict for verdict in order if verdict in verdicts)
        found.append(Claim(f"all (shared) adversarial training dominates {name} (S-PGD)", worst, text))
    for better, worse in (("s = 64", "s = 1"), ("s = 1", "DeepFool UAD"), ("s = 64", "fictitious play")):
        found.append(
            Claim(f"{better} dominates {worse} (DeepFool)", *domination(models, better, worse, ATTACKS["DeepFool"]))
        )
    gains = ((3.0, 3.5, "paper: 14.9 -> 44.1"), (2.0, 5.0, "our weaker form of it"))
    found += _against_erm(models, "s = 64", "14.9 -> 22.7", gains)
    return found + _cost_claims(cost)


def _cost_claims(cost: Record | None) -> list[Claim]:
    """What an epoch costs."""
    same, dear = "s = 1 and s = 64 cost the same", "the other defences cost more (paper: 16 and 20 times as much)"
    if cost is None:
        return [Claim(same, "not run", ""), Claim(dear, "not run", "")]
    seconds = cost.metrics["seconds"]
    ratio = seconds["s = 64"] / seconds["s = 1"]
    verdict = "holds" if abs(ratio - 1) <= 0.1 else "does not hold"
    found = [Claim(same, verdict, f"an epoch of s = 64 takes {ratio:.2f} times s = 1's")]
    others = {n: seconds[n] / seconds["s = 64"] for n in ("DeepFool UAD", "fictitious play") if n in seconds}
    if not others:
        return [*found, Claim(dear, "not run", "")]
    text = ", ".join(f"{name} takes {times:.2f} times s = 64's" for name, times in others.items())
    return [*found, Claim(dear, "holds" if min(others.values()) > 1.1 else "does not hold", text)]


def _alike(models: Sequence[Model], one: str, other: str) -> Claim:
    """Whether neither of two families dominates the other; not decided unless both ways can be compared."""
    ways = [domination(models, *pair) for pair in ((one, other), (other, one))]
    verdicts = [verdict for verdict, _ in ways]
    known = all(" can be compared: " in text and not text.endswith("one seed each") for _, text in ways)
    verdict = "not run" if "not run" in verdicts else "does not hold" if "holds" in verdicts else ""
    verdict = verdict or ("holds" if known else "not decided")
    text = "; ".join(evidence for _, evidence in ways if evidence)
    return Claim(f"{one} and {other} perform similarly: neither dominates the other (S-PGD)", verdict, text)


def _against_erm(
    models: Sequence[Model], family: str, free: str, gains: Sequence[tuple[float, float, str]]
) -> list[Claim]:
    """What a family gains over the undefended model, and what that costs in accuracy.

    free: what the paper gains without loss of accuracy; gains: (times the robustness, under so many points, who says).
    """
    undefended, shared = (front([m for m in models if m.family == name]) for name in ("ERM", family))
    if not undefended or not shared:
        return []
    erm, base = undefended[0]
    closest, value = shared[-1]
    verdict = "holds" if any(m.accuracy >= erm.accuracy and value > base for m, value in shared) else "does not hold"
    text = f"{closest.title} loses {erm.accuracy - closest.accuracy:.1f} points, eps_uni {base:.1f} -> {value:.1f}"
    claims = [Claim(f"{family} raises robustness without loss of accuracy (paper: {free})", verdict, text)]
    for factor, points, said in gains:
        claim = f"{family} is about {factor:g} times as robust at under {points:g} points of accuracy ({said})"
        within = [(value / base, m) for m, value in shared if erm.accuracy - m.accuracy < points]
        if not within or not base:
            claims.append(Claim(claim, "does not hold", f"every {family} model loses more than {points:g} points"))
            continue
        times, model = max(within, key=lambda pair: pair[0])
        text = f"{model.title}: {times:.2f} times at {erm.accuracy - model.accuracy:.1f} points"
        claims.append(Claim(claim, "holds" if times >= 0.95 * factor else "does not hold", text))
    return claims


MORE_EVENLY = 1.1  # times the bits of the undefended model that count as substantially more


def imagenet_claims(models: Sequence[Model]) -> list[Claim]:
    """The claims of section 6.2."""
    gains = ((3.0, 5.0, "paper: 8.4 -> 25.64"), (2.0, 5.0, "our weaker form of it"))
    found = [Claim("s = 32 dominates s = 1 (S-PGD)", *domination(models, "s = 32", "s = 1"))]
    found += _against_erm(models, "s = 32", "8.4 -> 15.0", gains)
    claim = "defended models predict substantially more evenly where they are fooled (A.7)"
    base = next((m.entropy_bits for m in models if m.family == "ERM"), None)
    defended = {m.title: bits for m in models if m.family != "ERM" and (bits := m.entropy_bits) is not None}
    if base is None or not defended:
        return [*found, Claim(claim, "not run", "")]
    fewest = min(defended.values())
    verdict = "holds" if fewest >= MORE_EVENLY * base else "not decided" if fewest > base else "does not hold"
    text = f"ERM {base:.2f} bits; {', '.join(f'{title}: {bits:.2f}' for title, bits in defended.items())}"
    return [*found, Claim(claim, verdict, text)]
