"""Pareto fronts, and the paper's claims on models made up so that the answer is known."""

import types
from dataclasses import replace

import pytest

from satlib import paper
from satlib.study import results
from satlib.study.claims import (
    Claim,
    Model,
    cifar10_claims,
    comparable,
    domination,
    front,
    imagenet_claims,
    most_robust,
    size_text,
    worst,
)


def model(family, accuracy, eps_uni, *, deepfool=None, strongest=None, spread=0.5, eps=8.0, trained=2):
    """A model that was trained twice, unless it is said otherwise."""
    sharedness = int(family.removeprefix("s = ")) if family.startswith("s = ") else None
    title = f"{family}, {accuracy:g}"
    spreads = {} if spread is None else {"eps_uni": spread, "deepfool": spread, "strongest": spread}
    record = types.SimpleNamespace(id=title)
    searches = () if strongest is None else (record,)
    found = Model(title, family, sharedness, eps, 0.5, accuracy, eps_uni, deepfool, spreads, strongest)
    asked = {"eps_uni": trained, "strongest": trained * len(searches), "deepfool": trained * (deepfool is not None)}
    return replace(found, trainings=(record,) * trained, strongest_searches=searches, measured=asked)


def test_a_size_beyond_what_is_searched_is_told_as_such_and_counts_as_larger():
    assert [size_text(None), size_text(3.14), size_text(3.14, 0.25)] == ["> 255", "3.1", "3.1 ± 0.2"]
    assert comparable(None) > comparable(255.0) == 255.0
    assert worst(["holds", "not decided"]) == "not decided" and worst(["not run", "does not hold"]) == "does not hold"


def verdict_of(found: list[Claim], start: str, attack: str | None = None) -> Claim:
    (claim,) = [each for each in found if each.claim.startswith(start) and attack in (None, each.attack)]
    return claim


ERM = model("ERM", 90.0, 15.0, deepfool=30.0, eps=None)


def test_the_front_is_what_nobody_beats():
    points = {(90, 10), (88, 20), (88, 18), (87, 19), (85, 30), (80, 30), (79, 31)}
    best = front([model("s = 1", a, r) for a, r in points])
    assert [(m.accuracy, value) for m, value in best] == [(79, 31), (85, 30), (88, 20), (90, 10)]
    beyond = model("s = 1", 90.0, None)
    assert front([beyond]) == [(beyond, 256.0)] and front([beyond], "strongest") == []
    both = [model("s = 1", 90.0, 5.0, deepfool=10.0), model("s = 1", 89.0, 9.0, deepfool=8.0)]
    assert len(front(both)) == 2 and len(front(both, "deepfool")) == 1
    assert front([*both, ERM], family="s = 1") == front(both) and front(both, family="ERM") == []


def test_the_most_robust_of_each_family_smallest_first():
    models = [model("s = 8", 80.0, 40.0), model("s = 8", 85.0, 30.0), model("s = 1", 70.0, 35.0), ERM]
    best = most_robust([*models, model("s = 64", 70.0, None)])
    assert [(m.family, m.eps_uni) for m in best] == [("ERM", 15.0), ("s = 1", 35.0), ("s = 8", 40.0)]


@pytest.mark.parametrize(
    ("strong", "weak", "spread", "expected", "gaps"),
    [
        ([(88, 40), (85, 55)], [(87, 30), (86, 35)], None, "not decided", "+15.0 (at 86.0 %), +15.0 (at 87.0 %)"),
        ([(88, 40), (85, 55)], [(87, 30), (86, 35)], 0.5, "holds", "+15.0 (at 86.0 %), +15.0 (at 87.0 %)"),
        ([(88, 40), (84, 50)], [(90, 10), (87, 30), (83.6, 45)], 0.5, "holds", "+5.0 (at 83.6 %), +12.5 (at 87.0 %)"),
        ([(88, 40), (84, 50)], [(87, 30), (86, 46)], 0.5, "does not hold", "-1.0 (at 86.0 %), +12.5 (at 87.0 %)"),
        ([(86, 40)], [(86.5, 41)], 2.0, "not decided", "-1.0 (at 86.5 %)"),
        ([(86, 40)], [(86.5, 39)], 2.0, "not decided", "+1.0 (at 86.5 %)"),
        ([(86, 40)], [(86.5, 39)], 0.5, "holds", "+1.0 (at 86.5 %)"),
        ([(86, 40)], [(86.6, 20)], 0.5, "not decided", ""),  # that is another accuracy
        ([(86, 40)], [(85.4, 20)], 0.5, "not decided", ""),  # the more robust one must not be more accurate, either
        ([(88, 40), (85, 55)], [(87, 30), (86, 5)], 0.5, "holds", "+15.0 (at 87.0 %)"),  # the latter is on no front
        ([], [(87, 30)], None, "not run", ""),
        ([(87, None)], [(87, 30)], 0.5, "holds", "+226.0 (at 87.0 %)"),  # nothing up to 255 was enough
        ([(90, 50), (92, 30)], [(90, None), (92, 20)], 0.5, "does not hold", "-206.0 (at 90.0 %), +10.0 (at 92.0 %)"),
        ([(60, 100), (95, 10)], [(80, 40)], 0.5, "not decided", ""),  # too far apart to be interpolated
        ([(86.4, 40), (85.8, 50)], [(86, 30)], 0.5, "holds", "+16.7 (at 86.0 %)"),
    ],
)
def test_domination_compares_at_equal_accuracy(strong, weak, spread, expected, gaps):
    models = [model("s = 64", a, r, spread=spread) for a, r in strong]
    models += [model("s = 1", a, r, spread=spread) for a, r in weak]
    claim = domination(models, "s = 64", "s = 1")
    assert claim.verdict == expected and bool(claim.evidence) == (expected != "not run")
    assert gaps in claim.evidence and ("can be compared" in claim.evidence) == bool(gaps)


def test_domination_rests_on_more_than_one_training_of_each():
    def verdict(strong, weak):
        models = [model("s = 64", a, 40.0 - a / 100, trained=n) for a, n in strong]
        claim = domination(
            [*models, *(model("s = 1", a, 30.0 - a / 100, trained=n) for a, n in weak)], "s = 64", "s = 1"
        )
        assert claim.verdict == "holds" or claim.evidence.endswith("a single training")
        return claim.verdict

    assert verdict([(86, 1)], [(86.2, 2)]) == verdict([(86, 2)], [(86.2, 1)]) == "not decided"
    assert verdict([(86, 2)], [(86.2, 2)]) == "holds"
    assert verdict([(86, 1), (84, 1)], [(86.2, 1)]) == "not decided"
    assert verdict([(86, 1), (84, 1)], [(86.2, 1), (84.1, 1)]) == "holds"
    once = [replace(model(f"s = {s}", 86.0, 40.0 + s, strongest=30.0 + s), measured={"strongest": 1}) for s in (1, 64)]
    assert domination(once, "s = 64", "s = 1", "ensemble").evidence.endswith("a single training")


def test_domination_under_deepfool_looks_at_that_accuracy():
    models = [model("s = 64", 87.2, 1.0, deepfool=60.0, strongest=30.0)]
    models += [model("s = 1", 87, 99.0, deepfool=50.0, strongest=28.0)]
    evidence = "1 of 1 s = 1 models can be compared: +10.0 (at 87.0 %) points"
    expected = Claim("s = 64 dominates s = 1", "holds", evidence, "DeepFool")
    assert domination(models, "s = 64", "s = 1", "DeepFool") == expected
    assert domination(models, "s = 64", "s = 1").verdict == "does not hold"
    assert domination(models, "s = 64", "s = 1", "ensemble").verdict == "holds"


def test_both_attacks_are_asked_and_the_ensemble_is_told_first():
    models = [ERM, model("s = 64", 90.2, 30.0, strongest=12.0), model("s = 1", 90.1, 20.0, strongest=14.0)]
    models[0] = replace(ERM, strongest=11.0)
    found = cifar10_claims(models, None)
    name = "s = 64 dominates s = 1"
    assert (found[0].claim, found[0].attack) == (name, "ensemble")
    by_attack = [verdict_of(found, name, each).verdict for each in ("ensemble", "S-PGD")]
    assert by_attack == ["does not hold", "holds"]
    raised = [claim for claim in found if claim.claim.startswith("s = 64 raises robustness")]
    assert ["11.0 -> 12.0" in raised[0].evidence, "15.0 -> 30.0" in raised[1].evidence] == [True, True]


@pytest.mark.parametrize(
    ("accuracy", "size", "verdict"),
    [(92.8, 30.0, "holds"), (92.7, 30.0, "does not hold"), (92.8, 15.4, "not decided"), (93.0, 14.0, "does not hold")],
)
def test_what_is_gained_without_losing_accuracy_is_clear_of_the_spread(accuracy, size, verdict):
    models = [replace(ERM, accuracy=93.25), model("s = 64", accuracy, size)]
    assert verdict_of(cifar10_claims(models, None), "s = 64 raises robustness").verdict == verdict


def test_alike_is_that_neither_dominates():
    start = "s = 1 and s = 8 perform similarly: neither dominates the other"
    models = [
        model("s = 1", 86, 30.0),
        model("s = 1", 84, 36.0),
        model("s = 8", 86.5, 30.2),
        model("s = 8", 84.5, 35.9),
    ]
    assert verdict_of(cifar10_claims([ERM, *models], None), start, "S-PGD").verdict == "holds"
    models[2:] = [model("s = 8", 86.5, 40.0), model("s = 8", 84.5, 45.0)]
    assert verdict_of(cifar10_claims([ERM, *models], None), start, "S-PGD").verdict == "does not hold"
    models[2:] = [model("s = 8", 86.5, 40.0, spread=50.0), model("s = 8", 84.5, 45.0, spread=50.0)]
    assert (
        verdict_of(cifar10_claims([ERM, *models], None), start, "S-PGD").verdict == "not decided"
    )  # nor do they differ little
    assert verdict_of(cifar10_claims([ERM, *models[:2]], None), start, "S-PGD").verdict == "not run"
    once = [model("s = 1", 86, 30.0, spread=None), model("s = 8", 86.5, 30.2, spread=None)]
    assert verdict_of(cifar10_claims([ERM, *once], None), start, "S-PGD").verdict == "not decided"


def test_adversarial_training_of_every_sharedness_is_compared_with_a_baseline():
    models = [ERM, model("fictitious play", 85.0, 20.0)]
    models += [model(f"s = {s}", 85.4, 30.0 + s) for s in (1, 8, 64)]

    def verdicts(name="fictitious play"):
        found = cifar10_claims(models, None)
        return [verdict_of(found, f"s = {s} dominates {name}", "S-PGD").verdict for s in (1, 8, 64)]

    assert verdicts() == ["holds"] * 3
    models[2] = model("s = 1", 85.4, 19.0)
    assert verdicts() == ["does not hold", "holds", "holds"]
    assert verdicts("DeepFool UAD") == ["not run"] * 3


@pytest.mark.parametrize(
    ("shared", "verdicts"),
    [
        ([(90.5, 23.0), (87.0, 44.0)], ["holds", "holds", "holds"]),
        ([(89.0, 23.0), (87.0, 31.0)], ["does not hold", "does not hold", "holds"]),
        ([(84.0, 60.0)], ["does not hold", "does not hold", "does not hold"]),
        ([(91.0, 14.0)], ["does not hold", "does not hold", "does not hold"]),
    ],
)
def test_what_is_gained_over_the_undefended_model(shared, verdicts):
    found = cifar10_claims([ERM, *(model("s = 64", a, r) for a, r in shared)], None)
    starts = ("s = 64 raises robustness", "s = 64 is about 3 times", "s = 64 is about 2 times")
    assert [verdict_of(found, start).verdict for start in starts] == verdicts


@pytest.mark.parametrize(("ratio", "verdict"), [(1.02, "holds"), (0.95, "holds"), (1.3, "does not hold")])
def test_the_cost_of_sharing(ratio, verdict):
    cost = types.SimpleNamespace(metrics={"seconds": {"s = 1": 100.0, "s = 64": 100.0 * ratio}})
    claim = verdict_of(cifar10_claims([ERM], cost), "s = 1 and s = 64 cost the same")
    assert claim.verdict == verdict and f"{ratio:.2f}" in claim.evidence
    assert verdict_of(cifar10_claims([ERM], None), "s = 1 and s = 64 cost").verdict == "not run"


@pytest.mark.parametrize(("cheapest", "verdict"), [(300.0, "holds"), (105.0, "does not hold"), (50.0, "does not hold")])
def test_the_cost_of_other_defences(cheapest, verdict):
    seconds = {"s = 1": 100.0, "s = 64": 100.0, "DeepFool UAD": 400.0, "fictitious play": cheapest}
    claim = verdict_of(cifar10_claims([ERM], types.SimpleNamespace(metrics={"seconds": seconds})), "the other defences")
    assert claim.verdict == verdict and f"fictitious play takes {cheapest / 100:.2f} times" in claim.evidence


def test_rows_of_sections_6_1_and_6_2_are_judged_beside_erm():
    record = types.SimpleNamespace(id="t", labels={"dataset": "Made up"})

    def rows(section, *models):
        settings = {"6.1": replace(paper.CIFAR10, width=8), "6.2": replace(paper.IMAGENET, expansion=1)}[section]
        found = results.section_rows(section, "p", settings, [replace(m, trainings=(record,) * 2) for m in models])
        return dict(zip([r.key for r in paper.REPORTED if r.section == section], found, strict=True))

    shared = model("s = 64", 88.0, 40.0)
    found = rows("6.1", ERM, shared, model("s = 1", 88.4, 30.0))
    free, accepted, gain = (found[f"cifar10/{key}"] for key in ("no-loss/eps_uni", "90/eps_uni", "gain"))
    assert (free.text, free.verdict) == ("no such model", "not reproduced")
    assert (accepted.text, accepted.verdict) == ("40.0 ± 0.5", "same direction")
    assert (gain.ours, gain.verdict, set(gain.runs)) == (10.0, "same direction", {"t"})
    assert gain.ensemble_text == "–"
    assert (gain.ensemble, gain.ensemble_verdict, gain.verdicts) == (None, "not run", "same direction")
    assert found["cifar10/90/loss"].ours == 2.0 and found["cifar10/cost/uad"].verdict == "not run"
    asked = {"eps_uni": 2, "strongest": 2}
    searched = {"strongest_searches": (record,), "strongest": 14.0, "measured": asked}
    half = rows("6.1", replace(ERM, **searched), replace(shared, **searched), model("s = 64", 87.5, 42.0))
    assert half["cifar10/90/eps_uni"].ensemble_text == "–"  # of those that it could be, one was not asked
    both = rows("6.1", replace(ERM, **searched), replace(shared, **searched | {"strongest": 13.0}))
    assert both["cifar10/no-loss/eps_uni"].ensemble_text == "no such model" == both["cifar10/no-loss/eps_uni"].text
    accepted = both["cifar10/90/eps_uni"]
    assert (accepted.ours, accepted.verdict, accepted.ensemble) == (40.0, "same direction", 13.0)
    assert accepted.verdicts == "not reproduced (by the paper's attack: same direction)"
    assert accepted.ensemble_text == "13.0 ± 0.5" and both["cifar10/erm/eps_uni"].ensemble == 14.0
    weak = rows("6.1", ERM, replace(shared, eps_uni=12.0))["cifar10/90/eps_uni"]
    assert (weak.ours, weak.verdict) == (12.0, "not reproduced")
    unbroken = replace(model("s = 32", 85.0, None, eps=10), sigma=1)
    found = rows("6.2", ERM, unbroken)
    good = found["imagenet/good/eps_uni"]
    assert (good.text, good.verdict) == ("> 255", "same direction")
    assert found["imagenet/good/accuracy"].verdict == "same direction"


def with_entropy(model, bits):
    return replace(model, predictions=types.SimpleNamespace(metrics={"entropy_bits": {"fooled": bits}}))


def test_claims_of_section_6_2():
    models = [model("ERM", 77.0, 8.0, eps=None), model("s = 32", 77.5, 15.0), model("s = 32", 73.0, 25.0)]
    models += [model("s = 1", 72.6, 20.0)]
    found = imagenet_claims([with_entropy(m, bits) for m, bits in zip(models, (2.0, 3.0, 4.0, None), strict=True)])
    assert [claim.verdict for claim in found] == ["not run", *["holds"] * 5]
    assert found[-1].evidence == "ERM 2.00 bits; s = 32, 77.5: 3.00, s = 32, 73: 4.00"
    found = imagenet_claims([with_entropy(m, bits) for m, bits in zip(models, (3.5, 3.0, 4.0, None), strict=True)])
    assert found[-1].verdict == "does not hold"
    found = imagenet_claims([with_entropy(m, bits) for m, bits in zip(models, (2.9, 3.0, 4.0, None), strict=True)])
    assert found[-1].verdict == "not decided"
    found = imagenet_claims([models[0], model("s = 32", 70.0, 30.0)])
    assert [claim.verdict for claim in found] == ["not run"] * 2 + ["does not hold"] * 3 + ["not run"]


def test_verdicts_by_all_attacks_stand_in_one_row():
    found = [Claim("a", "holds", "", "ensemble"), Claim("b", "not run"), Claim("a", "not decided", "", "S-PGD")]
    assert results.verdicts(found).to_dict("records") == [
        {"claim": "a", "by the ensemble": "holds", "by the paper's attack": "not decided", "verdict": "–"},
        {"claim": "b", "by the ensemble": "–", "by the paper's attack": "–", "verdict": "not run"},
    ]
    assert list(results.claims_table(found)) == ["claim", "attack", "verdict", "evidence"]
    assert list(results.claims_table(found[1:2])) == ["claim", "verdict", "evidence"]
