"""What stronger attacks, seeds and the sets of images say about an evaluation, from records."""

import hashlib
import statistics
from collections.abc import Mapping, Sequence

import pandas as pd
from torch import Tensor

from satlib.data import Splits
from satlib.evaluation_checks import FALLS, Check
from satlib.robustness import LARGEST
from satlib.study.claims import Claim
from satlib.study.records import Record

Found = Mapping[str, Mapping[str, Record]]  # searches by model and attack
SPREAD = 0.1  # share by which eps_uni may differ between seeds


def size(eps: float | None) -> str:
    """An eps_uni as text; None is beyond 255."""
    return "> 255" if eps is None else f"{eps:.1f}"


def _beyond(eps: float | None) -> float:
    """None counts as just above the interval that was searched."""
    return LARGEST + 1 if eps is None else eps


def smallest(searches: Mapping[str, Record]) -> tuple[float | None, str]:
    """The ensemble: the smallest eps_uni of several attacks on a model, and whose it is; (None, "") where none won."""
    known = {name: r.metrics["eps_uni"] for name, r in searches.items() if r.metrics["eps_uni"] is not None}
    return min((eps, name) for name, eps in known.items()) if known else (None, "")


def bounds(found: Found, seeds: Mapping[str, Sequence[float | None]]) -> pd.DataFrame:
    """A column for each model: eps_uni by every attack, the ensemble's, whose it is, and how far that is below the
    paper's attack, and below the smallest that the paper's finds from several seeds: an ensemble of one attack."""

    def below(eps: float | None, other: float | None) -> str:
        return "–" if eps is None or other is None else f"{100 * (1 - eps / other):.0f} %"

    columns = {}
    for model, searches in found.items():
        eps, name = smallest(searches)
        again = min((value for value in seeds[model] if value is not None), default=None)
        columns[model] = {attack: size(record.metrics["eps_uni"]) for attack, record in searches.items()} | {
            "smallest": size(eps),
            "by": name,
            "lower than the paper's by": below(eps, searches["paper"].metrics["eps_uni"]),
            f"lower than its best of {len(seeds[model])} seeds by": below(eps, again),
        }
    return pd.DataFrame(columns).rename_axis("attack").reset_index()


def verdicts(audits: Mapping[str, Sequence[Check]]) -> pd.DataFrame:
    """The checklist: a row for each check, a column with its verdict on each model."""
    names = [check.check for check in next(iter(audits.values()), ())]
    return pd.DataFrame({"check": names} | {model: [each.verdict for each in found] for model, found in audits.items()})


def failed(audits: Mapping[str, Sequence[Check]]) -> str:
    """In words: what each audited model fails, one line for each."""
    lines = []
    for model, found in audits.items():
        fails = [check.check for check in found if check.verdict == "fails"]
        lines.append(f"{model}: {'fails ' + '; '.join(fails) if fails else 'passes all checks'}")
    return "\n".join(lines)


def claims(found: Found, seeds: Mapping[str, Sequence[float | None]]) -> list[Claim]:
    """How far the paper's attack is from the strongest, whether it orders the models alike, and how it repeats."""

    def order(values: Mapping[str, float | None]) -> list[str]:
        return sorted(values, key=lambda name: _beyond(values[name]))

    paper = {model: searches["paper"].metrics["eps_uni"] for model, searches in found.items()}
    best = {model: smallest(searches)[0] for model, searches in found.items()}
    tight = all(
        best[model] == paper[model] or _beyond(best[model]) >= (1 - SPREAD) * _beyond(paper[model]) for model in found
    )
    shown = {model: [eps for eps in values if eps is not None] for model, values in seeds.items() if None not in values}
    steady = len(shown) == len(seeds) and all(max(v) - min(v) <= SPREAD * statistics.mean(v) for v in shown.values())
    return [
        Claim(
            f"no attack here lowers the paper's bound by more than {100 * SPREAD:g} %",
            "holds" if tight else "does not hold",
            ", ".join(f"{model} {size(paper[model])} -> {size(best[model])}" for model in found),
        ),
        Claim(
            "the strongest attacks order the models as the paper's does",
            "holds" if order(paper) == order(best) else "does not hold",
            f"paper's: {' < '.join(order(paper))}; strongest: {' < '.join(order(best))}",
        ),
        Claim(
            f"the paper's attack finds the same from every seed, within {100 * SPREAD:g} %",
            "holds" if steady else "does not hold",
            ", ".join(f"{model} {' '.join(map(size, values))}" for model, values in seeds.items()),
        ),
    ]


def carried(metrics: Mapping) -> list[Claim]:
    """Whether own perturbations beat strangers' of no larger size, from the metrics of a `transfer` record."""
    titles, eps, rates = metrics["titles"], metrics["eps"], metrics["rates"]
    known = [i for i in range(len(titles)) if rates[i] is not None]
    pairs = [(i, j) for j in known for i in known if i != j and eps[i] <= eps[j]]
    gaps = {(i, j): rates[j][j] - rates[i][j] for i, j in pairs}
    noise = {j: rates[j][j] - metrics["noise"][j][j] for j in known}
    worst = min(gaps, key=gaps.__getitem__) if gaps else None
    text = "no two can be compared"
    if worst is not None:
        (i, j) = worst
        text = f"{titles[j]}: own {100 * rates[j][j]:.0f} %, at most {100 * rates[i][j]:.0f} % (from {titles[i]})"
    weakest = min(noise, key=noise.__getitem__) if noise else None
    return [
        Claim(
            "white box beats transfer at no larger eps",
            "not decided" if worst is None else "holds" if gaps[worst] >= -FALLS else "does not hold",
            text,
        ),
        Claim(
            "own perturbations beat random signs of their size",
            "not decided" if weakest is None else "holds" if noise[weakest] > FALLS else "does not hold",
            ""
            if weakest is None
            else f"{titles[weakest]}: own {100 * rates[weakest][weakest]:.0f} %, random signs "
            f"{100 * metrics['noise'][weakest][weakest]:.0f} %",
        ),
    ]


def saved(metrics: Mapping) -> tuple[pd.DataFrame, Claim]:
    """What universal perturbations are worth once the images with them went through a file: errors in %, from the
    metrics of a `transfer` record, and whether 8 bits a channel keep them."""
    rows = [{"model": title} for title in metrics["titles"]]
    for row, eps, clean, each in zip(rows, metrics["eps"], metrics["clean"], metrics["saved"], strict=True):
        row |= {"eps": eps, "no perturbation": 100 * clean} | {name: 100 * rate for name, rate in each.items()}
    before, after, worst = max(
        (
            (each["exact"], each["8 bits"], title)
            for title, each in zip(metrics["titles"], metrics["saved"], strict=True)
        ),
        key=lambda each: each[0] - each[1],
    )
    verdict = "holds" if before - after <= FALLS else "does not hold"
    text = f"{worst}: {100 * before:.1f} % wrong before, {100 * after:.1f} % after"
    return pd.DataFrame(rows), Claim("perturbations survive being saved as 8-bit images", verdict, text)


def common_images(splits: Splits, *, choose: int, report: int) -> dict[str, int]:
    """How many images, by their content, each two of the three sets of a search of section 6.1 have in common.

    Crafting takes the validation images, the search decides on the first `choose` test images, and reports on the
    `report` next ones.
    """

    def digests(images: Tensor) -> set[str]:
        return {hashlib.sha256(image.cpu().numpy().tobytes()).hexdigest() for image in images}

    test = splits.test.images
    sets = {
        "craft": digests(splits.val.images[:]),
        "choose": digests(test[:choose]),
        "report": digests(test[choose : choose + report]),
    }
    pairs = (("craft", "choose"), ("craft", "report"), ("choose", "report"))
    return {f"{one} and {other}": len(sets[one] & sets[other]) for one, other in pairs}
