"""What stronger attacks, seeds, transfer and the sets of images say about an evaluation, from records."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pandas as pd

from satlib.data import Splits
from satlib.evaluation_checks import FALLS, Check
from satlib.study.claims import Claim, average, comparable, missed_at, size_text, verdict, worst
from satlib.study.ledger import Record

Searches = Mapping[str, Mapping[str, Record]]  # by model and attack
Seeds = Mapping[str, Sequence[float | None]]  # by model, eps_uni that the paper's attack finds from each seed
Name = TypeVar("Name", str, int)
SATURATED = 0.03  # share by which twice the effort may lower a bound, and it counts as near its end
SPREAD = 0.1  # share by which eps_uni may differ between seeds


def eps_uni(searches: Mapping[str, Record]) -> dict[str, float | None]:
    """By attack."""
    return {attack: record.metrics["eps_uni"] for attack, record in searches.items()}


def smallest(sizes: Mapping[Name, float | None]) -> tuple[float | None, Name | str]:
    """The smallest eps_uni of several attacks, and whose it is; (None, "") where none won."""
    return min(((size, name) for name, size in sizes.items() if size is not None), default=(None, ""))


def bounds(searches: Searches, seeds: Seeds) -> pd.DataFrame:
    """A column for each model: eps_uni by every attack, the smallest, whose it is, and how far that is below the
    paper's attack, and below the smallest that the paper's finds from several seeds."""

    def below(size: float | None, other: float | None) -> str:
        return "–" if size is None or not other else f"{100 * (1 - size / other):.0f} %"

    columns = {}
    for model, records in searches.items():
        sizes = eps_uni(records)
        size, attack = smallest(sizes)
        again, _ = smallest(dict(enumerate(seeds[model])))
        columns[model] = {name: size_text(each) for name, each in sizes.items()} | {
            "smallest": size_text(size),
            "by": attack,
            "lower than the paper's by": below(size, sizes["paper"]),
            f"lower than its best of {len(seeds[model])} seeds by": below(size, again),
        }
    return pd.DataFrame(columns).rename_axis("attack").reset_index()


def bound_claims(searches: Searches, seeds: Seeds) -> list[Claim]:
    """How far the paper's attack is from the strongest of these, and how it repeats."""

    def steady(sizes: Sequence[float | None]) -> bool:
        known = [size for size in sizes if size is not None]
        return len(known) == len(sizes) and max(known) - min(known) <= SPREAD * statistics.mean(known)

    paper = {model: eps_uni(records)["paper"] for model, records in searches.items()}
    best = {model: smallest(eps_uni(records))[0] for model, records in searches.items()}
    tight = all(comparable(best[model]) >= (1 - SPREAD) * comparable(paper[model]) for model in searches)
    lowered = ", ".join(f"{model} {size_text(paper[model])} -> {size_text(best[model])}" for model in searches)
    repeated = ", ".join(f"{model} {' '.join(map(size_text, sizes))}" for model, sizes in seeds.items())
    evenly = "not run" if any(len(sizes) < 2 for sizes in seeds.values()) else verdict(all(map(steady, seeds.values())))
    others = any(len(records) > 1 for records in searches.values())
    found = verdict(tight) if others else "not run"
    return [
        Claim(f"no attack here lowers the paper's bound by more than {100 * SPREAD:g} %", found, lowered),
        Claim(f"the paper's attack finds the same from every seed, within {100 * SPREAD:g} %", evenly, repeated),
    ]


def lowered(strongest: Mapping[str, Sequence[Record]], paper: Mapping[str, Sequence[float | None]]) -> pd.DataFrame:
    """A row for each model: eps_uni by the paper's attack and by the ensemble, each the mean over searches; by how much
    the ensemble's is lower, which of its attacks found it, the largest eps below at which that missed, and how many
    images a search passed forward and backward."""

    rows = []
    for model, searches in strongest.items():
        if not searches or not paper[model]:
            continue
        own, other = average(record.metrics["eps_uni"] for record in searches), average(paper[model])
        less = "–" if own is None or not other else f"{100 * (1 - own / other):.0f} %"
        by = ", ".join(dict.fromkeys(record.metrics["attack"] or "–" for record in searches))
        missed, spent = (statistics.mean(map(of, searches)) for of in (missed_at, lambda each: each.metrics["spent"]))
        row = {"model": model, "paper's attack": size_text(other), "ensemble": size_text(own), "lower by": less}
        row |= {"found by": by, "missed at": f"{missed:.1f}", "passes": f"{spent:,.0f}"}
        rows.append(row | {"searches": len(searches)})
    return pd.DataFrame(rows)


def ablation(strongest: Mapping[str, Sequence[Record]]) -> pd.DataFrame:
    """A row for each model: success in % of each attack of the ensemble on unseen images at the same eps, of those that
    were measured the one nearest to its eps_uni; and what the best loses without the attack that leads."""
    rows = []
    for model, searches in strongest.items():
        points = [point for record in searches for point in record.metrics.get("curve", ())]
        size = searches[0].metrics["eps_uni"] if searches else None
        if not points or size is None:
            continue
        point = min(points, key=lambda each: abs(each["eps"] - size))
        first, second, *_ = [*sorted(point["rates"].values(), reverse=True), 0.0]
        row = {"model": model, "eps": f"{point['eps']:g}"}
        row |= {name: f"{100 * rate:.1f}" for name, rate in point["rates"].items()}
        rows.append(row | {"lost without the best": f"{100 * (first - second):.1f}"})
    return pd.DataFrame(rows)


def saturation_claim(strongest: Mapping[str, Sequence[Record]], doubled: Mapping[str, Record]) -> Claim:
    """That the ensemble with twice as many steps finds nothing smaller by more than SATURATED than it does on average.

    Not decided where that is no smaller than what one of its seeds finds with as many steps as ever."""
    claim = f"twice as many steps lower the ensemble's bound by under {100 * SATURATED:g} %"
    verdicts, evidence = [], []
    for name, record in doubled.items():
        if not strongest.get(name):
            continue
        sizes, twice = [r.metrics["eps_uni"] for r in strongest[name]], comparable(record.metrics["eps_uni"])
        near = twice >= (1 - SATURATED) * statistics.mean(map(comparable, sizes))
        usual = len(sizes) > 1 and twice >= min(map(comparable, sizes))
        verdicts.append(verdict(True) if near else "not decided" if usual else verdict(False))
        evidence.append(f"{name} {' '.join(map(size_text, sizes))} -> {size_text(record.metrics['eps_uni'])}")
    return Claim(claim, worst(verdicts) if verdicts else "not run", ", ".join(evidence))


def order_claim(strongest: Mapping[str, Sequence[Record]], paper: Mapping[str, Sequence[float | None]]) -> Claim:
    """That both attacks order the models alike: no two whose ranges over searches, two at least, are apart swap."""
    claim = "the ensemble orders the models as the paper's attack does"
    both = [name for name, searches in strongest.items() if len(searches) > 1 and len(paper[name]) > 1]
    ours = {name: [comparable(r.metrics["eps_uni"]) for r in strongest[name]] for name in both}
    theirs = {name: [comparable(size) for size in paper[name]] for name in both}
    if len(both) < 2:
        if sum(map(bool, strongest.values())) < 2:
            return Claim(claim, "not run")
        return Claim(claim, "not decided", "two models need two searches each, by both attacks")

    def below(sizes: Mapping[str, Sequence[float]], one: str, other: str) -> bool:
        return max(sizes[one]) < min(sizes[other])

    pairs = [pair for pair in itertools.permutations(both, 2) if below(ours, *pair)]
    swapped = [f"{one} and {other}" for one, other in pairs if below(theirs, other, one)]
    decided = len(swapped) + sum(below(theirs, *pair) for pair in pairs)
    evidence = f"{decided} of {len(both) * (len(both) - 1) // 2} pairs are apart under both"
    if not decided:
        return Claim(claim, "not decided", evidence)
    return Claim(claim, verdict(not swapped), evidence + (f"; swapped: {'; '.join(swapped)}" if swapped else ""))


def verdicts(audits: Mapping[str, Sequence[Check]]) -> pd.DataFrame:
    """The checklist: a row for each check, a column with its verdict on each model."""
    names = [check.check for check in next(iter(audits.values()), ())]
    columns = {model: [check.verdict for check in checks] for model, checks in audits.items()}
    return pd.DataFrame({"check": names} | columns)


def failed(audits: Mapping[str, Sequence[Check]]) -> str:
    """In words: what each audited model fails, one line for each."""
    fails = {model: "; ".join(c.check for c in checks if c.verdict == "fails") for model, checks in audits.items()}
    return "\n".join(f"{model}: {f'fails {names}' if names else 'passes all checks'}" for model, names in fails.items())


def transfer_claims(metrics: Mapping[str, Any]) -> list[Claim]:
    """Whether own perturbations beat strangers' of no larger size, from the metrics of a `transfer` record."""
    titles, eps, rates, noise = (metrics[name] for name in ("titles", "eps", "rates", "noise"))
    known = [i for i in range(len(titles)) if rates[i] is not None]
    transfer = Claim("white box beats transfer at no larger eps", "not decided", "no two can be compared")
    if margins := {(i, j): rates[j][j] - rates[i][j] for j in known for i in known if i != j and eps[i] <= eps[j]}:
        i, j = min(margins, key=margins.__getitem__)
        evidence = f"{titles[j]}: own {100 * rates[j][j]:.0f} %, at most {100 * rates[i][j]:.0f} % (from {titles[i]})"
        transfer = Claim(transfer.claim, verdict(margins[i, j] >= -FALLS), evidence)
    signs = Claim("own perturbations beat random signs of their size", "not decided")
    if known:
        j = min(known, key=lambda j: rates[j][j] - noise[j][j])
        evidence = f"{titles[j]}: own {100 * rates[j][j]:.0f} %, random signs {100 * noise[j][j]:.0f} %"
        signs = Claim(signs.claim, verdict(rates[j][j] - noise[j][j] > FALLS), evidence)
    return [transfer, signs]


def after_saving(metrics: Mapping[str, Any]) -> tuple[pd.DataFrame, Claim]:
    """What universal perturbations are worth once the images with them went through a file: errors in %, from the
    metrics of a `transfer` record, and whether 8 bits a channel keep them."""
    table = pd.DataFrame({"model": metrics["titles"], "eps": metrics["eps"], "no perturbation": metrics["clean"]})
    table = table.join(pd.DataFrame(metrics["saved"]))
    worst = table.loc[(table["exact"] - table["8 bits"]).idxmax()]
    evidence = f"{worst['model']}: {100 * worst['exact']:.1f} % wrong before, {100 * worst['8 bits']:.1f} % after"
    kept = verdict(worst["exact"] - worst["8 bits"] <= FALLS)
    table.iloc[:, 2:] *= 100
    return table, Claim("perturbations survive being saved as 8-bit images", kept, evidence)


def common_images(splits: Splits, *, choose: int, report: int) -> dict[str, int]:
    """How many images, by their content, each two of the three sets of a search of section 6.1 have in common.

    Crafting takes the validation images, the search decides on the first `choose` test images, and reports on the
    `report` next ones.
    """

    test = splits.test.images
    parts = {"craft": splits.val.images[:], "choose": test[:choose], "report": test[choose : choose + report]}
    seen = {name: {image.cpu().numpy().tobytes() for image in images} for name, images in parts.items()}
    return {f"{one} and {other}": len(seen[one] & seen[other]) for one, other in itertools.combinations(seen, 2)}
