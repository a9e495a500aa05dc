"""Models with what both attacks say of them, Pareto fronts, and the paper's claims evaluated on records."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mean, stdev

from satlib.robustness import LARGEST, Evaluation, largest_miss
from satlib.study.ledger import Ledger
from satlib.study.measurement import Run
from satlib.study.measurements import Plan
from satlib.study.records import Record, digest_of

ATTACKS = {
    "S-PGD": "eps_uni",
    "ensemble": "strongest",
    "DeepFool": "deepfool",
}  # the measure of robustness under each attack
UNIVERSAL = ("ensemble", "S-PGD")  # those that eps_uni is searched by: what to believe, and what the paper has
FEW = ("one seed each", "a single training")  # why a comparison decides nothing
BEYOND = f"> {LARGEST:g}"  # of a size in pixel units: no perturbation of the interval that is searched was enough
Gain = tuple[float, float, str]  # so many times the robustness of ERM, at less than so many points, who says so
APART = 5.0  # points of accuracy between two models on a front that may be interpolated
NEAR = 0.5  # points of accuracy that two models may differ by, and count as equally accurate
ALIKE = 0.1  # share of a model's size by which two families may differ, and count as alike
MORE_EVENLY = 1.1  # times the bits of the undefended model that count as substantially more


def size_text(size: float | None, spread: float | None = None) -> str:
    """A number with its spread, if any, as tables and figures show it; a size of None is beyond what is searched."""
    return BEYOND if size is None else f"{size:.1f}" + ("" if spread is None else f" ± {spread:.1f}")


def comparable(size: float | None) -> float:
    """A size as a number that can be compared: None counts as just above the interval that is searched."""
    return LARGEST + 1 if size is None else size


def _shown(value: float) -> str:
    """A number from `comparable` as text."""
    return size_text(None if value > LARGEST else value)


def curve_of(searches: Iterable[Record]) -> dict[float, float]:
    """Success in % by eps, from the first search by the ensemble that measured it; else empty."""
    curves = (record.metrics["curve"] for record in searches if "curve" in record.metrics)
    return {point["eps"]: 100 * point["rate"] for point in next(curves, ())}


def missed_at(search: Record) -> float:
    """The largest eps below its eps_uni at which the attack that found it missed at full length, of several attacks:
    in between, nobody knows."""
    asked, by = [Evaluation(**each) for each in search.metrics["evaluations"]], search.metrics.get("attack")
    return largest_miss((each for each in asked if not by or each.attack in ("", by)), search.metrics["eps_uni"])


def average(sizes: Iterable[float | None]) -> float | None:
    """The mean of sizes; None, which is beyond what is searched, where one of them is, and of none."""
    asked = list(sizes)
    known = [size for size in asked if size is not None]
    return mean(known) if known and len(known) == len(asked) else None


class Records:
    """Finds the records of planned runs by their settings and the name of their data, which nobody needs to have."""

    def __init__(self, ledger: Ledger | None = None, *, published: bool = False):
        known = (ledger or Ledger()).records(published=published)
        self._by_settings: dict[tuple, list[Record]] = {}
        for record in sorted(known, key=lambda record: record.created, reverse=True):
            key = (record.kind, record.version, record.labels.get("data"), digest_of(record.config))
            self._by_settings.setdefault(key, []).append(record)

    def of(self, run: Run | None) -> Record | None:
        """The newest record of the run's kind and settings that builds on records of its parents; None for no run."""
        return next(iter(self._all(run)), None) if run else None

    def bounds(self, run: Run, search: Run) -> list[Record]:
        """Perturbations from outside that win on a training's model what a search is after, on the images on which that
        reports; the smallest first."""
        ids = {record.id for record in self._all(run)}
        every = (record for alike in self._by_settings.values() for record in alike if record.kind == "bound")
        own = {name: search.settings[name] for name in ("delta", "images", "sets")}
        won = [
            each
            for each in every
            if each.parents.get("model") in ids and each.metrics["success"] and own.items() <= each.settings.items()
        ]
        return sorted(won, key=lambda record: record.metrics["eps_uni"])

    def found(self, runs: Iterable[Run | None]) -> list[Record]:
        """The records of those of the runs that have one."""
        return [record for run in runs if (record := self.of(run))]

    def _all(self, run: Run) -> list[Record]:
        key = (run.kind, run.measurement.version, run.dataset, digest_of(run.config))
        alike = self._by_settings.get(key, [])
        parents = {role: {r.id for r in self._all(parent)} for role, parent in run.parents.items()} if alike else {}
        alike = [record for record in alike if record.parents.keys() == parents.keys()]
        return [record for record in alike if all(record.parents[role] in ids for role, ids in parents.items())]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, evaluated on records: "holds", "does not hold", "not decided" or "not run".

    attack: the one of ATTACKS by which it was evaluated, where that matters.
    """

    claim: str
    verdict: str
    evidence: str = ""
    attack: str = ""


def verdict(holds: bool) -> str:
    """In words."""
    return "holds" if holds else "does not hold"


def worst(verdicts: Iterable[str]) -> str:
    """The verdict on a claim of several parts."""
    order = ("does not hold", "not run", "not decided", "holds")
    return min(verdicts, key=order.index)


@dataclass(frozen=True)
class Model:
    """A trained model with its evaluations, as figures and tables take it. accuracy in %, eps_uni in pixel units.

    family: "ERM", "s = 64", or the name of a baseline. sharedness and sigma are None but for (shared) adversarial
    training, eps for ERM. accuracy, eps_uni (by the paper's attack), strongest (eps_uni by the ensemble) and deepfool
    (accuracy in % under that universal perturbation) are means over the trainings that were evaluated, sizes of each
    over its searches, None where one did not succeed or none was run. spreads: the standard deviation of each of the
    four over trainings where there are several, else over searches, by name. measured: by a measure, on how many of the
    trainings it was. run: the first training; predictions: those of it.
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
    strongest: float | None = None
    measured: Mapping[str, int] = field(default_factory=dict)
    run: Run | None = None
    trainings: tuple[Record, ...] = ()
    searches: tuple[Record, ...] = ()
    strongest_searches: tuple[Record, ...] = ()
    deepfools: tuple[Record, ...] = ()
    predictions: Record | None = None
    bound: Record | None = None  # the smallest perturbation from outside that wins on the first training's model

    @property
    def records(self) -> tuple[Record, ...]:
        evaluations = (*self.searches, *self.strongest_searches, *self.deepfools)
        evaluations += (self.bound,) if self.bound else ()
        return (*self.trainings, *evaluations, *([self.predictions] if self.predictions else []))

    def seeds(self, measure: str) -> int:
        """How many searches of all its trainings a measure is the mean of; of others, those by the paper's attack."""
        return len(self.strongest_searches if measure == ATTACKS["ensemble"] else self.searches)

    @property
    def curve(self) -> dict[float, float]:
        """Success of the ensemble in % by eps in pixel units, on images that report; empty where not measured."""
        return curve_of(self.strongest_searches)

    def size(self, measure: str) -> float | None:
        """Its robustness by a measure of ATTACKS as a number that can be compared; None where that was not asked."""
        value = getattr(self, measure)
        return comparable(value) if value is not None or self.measured.get(measure) else None

    @property
    def entropy_bits(self) -> float | None:
        """Of the classes predicted where the universal perturbation fools the model (A.7); None where it is unknown."""
        return self.predictions.metrics["entropy_bits"]["fooled"] if self.predictions else None


def trained_models(plan: Plan, records: Records) -> list[Model]:
    """The models of a plan that have a record, the undefended one first."""
    described: list[tuple[list[Run], str, int | None, float | None, float | None]] = [
        ([plan.erm], "ERM", None, None, None),
        *((runs, f"s = {s}", s, eps, sigma) for (s, eps, sigma), runs in plan.models.items()),
        *(([run], name, None, eps, None) for (name, eps), run in plan.baselines.items()),
    ]
    models = []
    for runs, family, sharedness, eps, sigma in described:
        evaluated = [run for run in runs if records.of(run) and records.found(plan.robustness[run])]
        if not evaluated:
            continue
        trainings, deepfools = records.found(evaluated), records.found(map(plan.deepfool.get, evaluated))
        searches = [records.found(plan.robustness[run]) for run in evaluated]
        strong = [found for run in evaluated if (found := records.found(plan.strongest.get(run, ())))]
        values = {  # of each measure, a list for each training
            "accuracy": [[100 * record.metrics["accuracy"]] for record in trainings],
            "eps_uni": _sizes(searches),
            "strongest": _sizes(strong),
            "deepfool": [[100 * record.metrics["accuracy"]] for record in deepfools],
        }
        models.append(
            Model(
                runs[0].title,
                family,
                sharedness,
                eps,
                sigma,
                **{name: mean(map(mean, each)) if each else None for name, each in values.items()},
                measured={"eps_uni": len(searches), "strongest": len(strong), "deepfool": len(deepfools)},
                spreads={name: spread for name, each in values.items() if (spread := _spread(each)) is not None},
                run=runs[0],
                trainings=tuple(trainings),
                searches=tuple(itertools.chain(*searches)),
                strongest_searches=tuple(itertools.chain(*strong)),
                deepfools=tuple(deepfools),
                predictions=records.of(plan.predictions.get(runs[0])),
                bound=next(iter(records.bounds(runs[0], plan.robustness[runs[0]][0])), None),
            )
        )
    return models


def _sizes(searches: Sequence[Sequence[Record]]) -> list[list[float]]:
    """eps_uni of each search of each training; nothing where one of them did not succeed."""
    sizes = [[record.metrics["eps_uni"] for record in each] for each in searches]
    return [] if any(None in each for each in sizes) else sizes


def _spread(values: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation over trainings, of each the mean over its searches; of a single training, over these."""
    over = [mean(each) for each in values] if len(values) > 1 else [x for each in values for x in each]
    return stdev(over) if len(over) > 1 else None


def front(models: Iterable[Model], measure: str = "eps_uni", *, family: str | None = None) -> list[tuple[Model, float]]:
    """The Pareto front with each model's robustness, as `Model.size` gives it: those that no other beats in both.

    measure: "eps_uni", "strongest" or "deepfool"; models without it are left out, as are those that are not of the
    `family`, if one is given. The most accurate one is the last.
    """
    those = ((model, model.size(measure)) for model in models if family in (None, model.family))
    known = [(model, value) for model, value in those if value is not None]
    best: list[tuple[Model, float]] = []
    for model, value in sorted(known, key=lambda pair: (-pair[0].accuracy, -pair[1])):
        if not best or value > best[-1][1]:
            best.append((model, value))
    return best[::-1]


def most_robust(models: Iterable[Model]) -> list[Model]:
    """Of each family the model with the largest eps_uni, smallest first; models that nothing broke are left out."""
    broken = sorted((m for m in models if m.eps_uni is not None), key=lambda model: model.eps_uni or 0.0)
    best = {model.family: model for model in broken}  # the last of a family stays
    return [model for model in broken if best[model.family] is model]


@dataclass(frozen=True)
class Compared:
    """A model beside a family at its accuracy: by how much the family is more robust there, and by which models."""

    model: Model
    gap: float
    others: tuple[Model, ...]


def at_equal_accuracy(models: Sequence[Model], better: str, worse: str, measure: str = "eps_uni") -> list[Compared]:
    """Each model on the front of `worse` beside the front of `better` at the same accuracy.

    That is interpolated between two neighbours on the front that are at most APART points of accuracy apart, or the
    robustness of its nearest model, if that is within NEAR points; models without either cannot be compared, and are
    left out. What is beyond 255 counts as 256.
    """
    strong, weak = (front(models, measure, family=family) for family in (better, worse))
    compared = []
    for model, value in weak:
        above = next((each for each in strong if each[0].accuracy >= model.accuracy), None)
        below = next((each for each in strong[::-1] if each[0].accuracy <= model.accuracy), None)
        if above and below and above is not below and above[0].accuracy - below[0].accuracy <= APART:
            (right, high), (left, low) = above, below
            share = (model.accuracy - left.accuracy) / (right.accuracy - left.accuracy)
            compared.append(Compared(model, low + share * (high - low) - value, (left, right)))
            continue
        near = [each for each in (above, below) if each and abs(each[0].accuracy - model.accuracy) <= NEAR]
        if near:
            nearest, other = min(near, key=lambda each: abs(each[0].accuracy - model.accuracy))
            compared.append(Compared(model, other - value, (nearest,)))
    return compared


def domination(models: Sequence[Model], better: str, worse: str, attack: str = "S-PGD") -> Claim:
    """That family `better` dominates `worse` under an attack of ATTACKS: more robust at equal accuracy.

    It holds if all that can be compared (`at_equal_accuracy`) are beaten by more than the largest spread over seeds of
    the models compared; it does not hold if one of them is more robust by as much. Not decided are smaller differences,
    and what rests on a single training of either family under this attack, or on models with one seed each.
    """
    measure = ATTACKS[attack]
    weak = front(models, measure, family=worse)
    claim = partial(Claim, f"{better} dominates {worse}", attack=attack)
    if not weak or not front(models, measure, family=better):
        return claim("not run")
    compared = at_equal_accuracy(models, better, worse, measure)
    if not compared:
        return claim("not decided", f"no {better} model is as accurate as one of {worse}, within {NEAR:g} points")
    sides = [each.model for each in compared], list({id(m): m for each in compared for m in each.others}.values())
    spreads = [m.spreads[measure] for m in itertools.chain(*sides) if measure in m.spreads]
    unit = "points" if measure == "deepfool" else "pixel units"
    listed = ", ".join(f"{each.gap:+.1f} (at {each.model.accuracy:.1f} %)" for each in compared)
    evidence = f"{len(compared)} of {len(weak)} {worse} models can be compared: {listed} {unit}"
    if not spreads:
        return claim("not decided", f"{evidence}; {FEW[0]}")
    if any(sum(m.measured.get(measure, 1) for m in side) < 2 for side in sides):
        return claim("not decided", f"{evidence}; {FEW[1]}")
    gaps = [each.gap for each in compared]
    beaten, lost = min(gaps) > max(spreads), min(gaps) < -max(spreads)
    return claim(verdict(beaten) if beaten or lost else "not decided", evidence)


def cifar10_claims(models: Sequence[Model], cost: Record | None) -> list[Claim]:
    """The claims of section 6.1; those on eps_uni by the ensemble first, then by the paper's attack."""
    gains = ((3.0, 3.5, "paper: 14.9 -> 44.1"), (2.0, 5.0, "our weaker form of it"))
    claims = []
    for attack in UNIVERSAL:
        claims += [
            domination(models, "s = 64", "s = 1", attack),
            domination(models, "s = 64", "s = 8", attack),
            _alike(models, "s = 1", "s = 8", attack),
            *(
                domination(models, f"s = {s}", name, attack)
                for name in ("DeepFool UAD", "fictitious play")
                for s in (1, 8, 64)
            ),
            *_against_erm(models, "s = 64", "14.9 -> 22.7", gains, attack),
        ]
    return [
        *claims,
        domination(models, "s = 64", "s = 1", "DeepFool"),
        domination(models, "s = 1", "DeepFool UAD", "DeepFool"),
        domination(models, "s = 64", "fictitious play", "DeepFool"),
        *_cost_claims(cost),
    ]


def _alike(models: Sequence[Model], one: str, other: str, attack: str) -> Claim:
    """That neither of two families dominates the other, and that they differ little wherever they can be compared.

    Not decided unless both ways can be compared, and all that can be differ by at most a share ALIKE."""
    measure, pairs = ATTACKS[attack], ((one, other), (other, one))
    ways = [domination(models, *pair, attack) for pair in pairs]
    verdicts = [way.verdict for way in ways]
    compared = [at_equal_accuracy(models, *pair, measure) for pair in pairs]
    little = all(abs(each.gap) <= ALIKE * (each.model.size(measure) or 0.0) for each in itertools.chain(*compared))
    known = all(compared) and not any(way.evidence.endswith(FEW) for way in ways)
    found = "not run" if "not run" in verdicts else "does not hold" if "holds" in verdicts else ""
    claim = f"{one} and {other} perform similarly: neither dominates the other"
    evidence = "; ".join(way.evidence for way in ways if way.evidence)
    return Claim(claim, found or ("holds" if known and little else "not decided"), evidence, attack)


def _against_erm(models: Sequence[Model], family: str, free: str, gains: Iterable[Gain], attack: str) -> list[Claim]:
    """What a family gains over the undefended model at what accuracy; free: what the paper gains without losing any."""
    measure = ATTACKS[attack]
    undefended, defended = (front(models, measure, family=name) for name in ("ERM", family))
    if not undefended or not defended or not undefended[0][1]:
        return []
    erm, base = undefended[0]
    model, value = defended[-1]
    claim = f"{family} raises robustness without loss of accuracy, within {NEAR:g} points (paper: {free})"
    kept = [(each, size - base) for each, size in defended if each.accuracy >= erm.accuracy - NEAR]
    clear = [gap > max(m.spreads.get(measure, 0.0) for m in (erm, each)) for each, gap in kept]
    found = verdict(any(clear)) if any(clear) or all(gap <= 0 for _, gap in kept) else "not decided"
    evidence = f"{model.title} loses {erm.accuracy - model.accuracy:.2f} points, eps_uni {base:.1f} -> {_shown(value)}"
    claims = [Claim(claim, found, evidence, attack)]
    for factor, points, source in gains:
        times, evidence = 0.0, f"every {family} model loses more than {points:g} points"
        near = [(value / base, model) for model, value in defended if erm.accuracy - model.accuracy < points]
        if near:
            times, model = max(near, key=lambda pair: pair[0])
            least = "over " if times * base > LARGEST else ""
            evidence = f"{model.title}: {least}{times:.2f} times at {erm.accuracy - model.accuracy:.1f} points"
        claim = f"{family} is about {factor:g} times as robust at under {points:g} points of accuracy"
        claims.append(Claim(f"{claim} ({source})", verdict(times >= 0.95 * factor), evidence, attack))
    return claims


def _cost_claims(cost: Record | None) -> list[Claim]:
    """What an epoch costs."""
    same, dear = "s = 1 and s = 64 cost the same", "the other defences cost more (paper: 16 and 20 times as much)"
    if cost is None:
        return [Claim(same, "not run"), Claim(dear, "not run")]
    seconds = cost.metrics["seconds"]
    ratio = seconds["s = 64"] / seconds["s = 1"]
    times = {name: seconds[name] / seconds["s = 64"] for name in ("DeepFool UAD", "fictitious play") if name in seconds}
    listed = ", ".join(f"{name} takes {value:.2f} times s = 64's" for name, value in times.items())
    equal = Claim(same, verdict(abs(ratio - 1) <= 0.1), f"an epoch of s = 64 takes {ratio:.2f} times s = 1's")
    return [equal, Claim(dear, verdict(min(times.values()) > 1.1) if times else "not run", listed)]


def imagenet_claims(models: Sequence[Model], cost: None = None) -> list[Claim]:
    """The claims of section 6.2, which says nothing of the cost."""
    gains = ((3.0, 5.0, "paper: 8.4 -> 25.64"), (2.0, 5.0, "our weaker form of it"))
    claims = []
    for attack in UNIVERSAL:
        claims += [domination(models, "s = 32", "s = 1", attack)]
        claims += _against_erm(models, "s = 32", "8.4 -> 15.0", gains, attack)
    claim = "defended models predict substantially more evenly where they are fooled (A.7)"
    erm = next((m.entropy_bits for m in models if m.family == "ERM"), None)
    defended = {m.title: bits for m in models if m.family != "ERM" and (bits := m.entropy_bits) is not None}
    if erm is None or not defended:
        return [*claims, Claim(claim, "not run")]
    fewest = min(defended.values())
    found = "holds" if fewest >= MORE_EVENLY * erm else "not decided" if fewest > erm else "does not hold"
    evidence = f"ERM {erm:.2f} bits; {', '.join(f'{title}: {bits:.2f}' for title, bits in defended.items())}"
    return [*claims, Claim(claim, found, evidence)]
