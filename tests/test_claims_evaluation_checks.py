"""Notebook 09's plan in miniature, and what its records are judged to say."""

import types

import matplotlib.pyplot as plt
import pytest
import torch

from satlib import evaluation_checks as audit
from satlib.data import ImageSet, Splits
from satlib.errors import SatlibError
from satlib.study import runs as runs_module
from satlib.study.claims import evaluation_checks as claims
from satlib.study.figures import evaluation_checks as drawings
from satlib.study.ledger import Ledger
from satlib.study.measurements.evaluation_checks import SEARCHES, after_saving, attack_run, checks, differences
from satlib.study.runs import Runner
from satlib.study.settings import settings

SMALL = {
    "dataset": "shapes32",
    "depth": 8,
    "width": 2,
    "erm_epochs": 2,
    "erm_learning_rate": 0.05,
    "erm_schedule": "one-cycle",
    "finetune_epochs": 1,
    "finetune_epoch_images": 64,
    "finetune_schedule": "one-cycle",
    "points": [[8, 10.0, 0.7]],
    "steps": 2,
    "search_iterations": 3,
    "search_steps": 8,
    "search_batch": 8,
    "craft_images": 32,
    "choose_images": 32,
    "report_images": 16,
    "strongest_seeds": 1,
    "strongest_epsilons": [8.0, 32.0],
    "baselines": [],
}
CHOICES = {
    "audited": [[8, 10.0, 0.7]],
    "masks": ["rounded"],
    "epsilons": [0.5, 1.0, 50.0],
    "images": 32,
    "steps": 2,
    "attacks": list(SEARCHES),
    "depths": [14],
    "seeds": 2,
    "doubled": 1,
}


def plan_of(changes=()):
    cifar10 = settings("6.1", "paper", **SMALL)
    return cifar10, checks(settings("checks", "paper", **CHOICES | dict(changes)), cifar10)


def test_notebook_09_in_miniature(tiny, tmp_path, monkeypatch, float32):
    monkeypatch.setattr(runs_module.data, "load", lambda name: tiny)
    _, plan = plan_of()
    runner = Runner(ledger=Ledger(tmp_path), device="cpu")
    runner.carry_out(plan.runs)
    assert list(plan.models) == ["ERM", "s=8, eps=10, sigma=0.7"]
    for run in (*plan.audits.values(), *plan.masked.values()):
        assert {"universal", "stronger", "noise"} <= runner.record(run).metrics.keys()
    for name, run in (*plan.audits.items(), ("ERM", plan.masked["rounded"])):
        unit = runner.record(plan.strongest[name][0]).metrics["eps_uni"]
        unit, seen = unit or 255.0, runner.record(run).metrics  # none needed, or none found
        sizes = list(dict.fromkeys(min(255.0, each * unit) for each in (0.5, 1.0, 50.0)))
        assert (seen["eps"], [point["eps"] for point in seen["curve"]]) == (min(255.0, unit), sizes)
    masked = runner.record(plan.masked["rounded"]).metrics
    assert masked["without gradient"] == 1 and runner.record(plan.audits["ERM"]).metrics["without gradient"] < 1
    found = {model: {name: runner.record(run) for name, run in runs.items()} for model, runs in plan.attacks.items()}
    assert all(set(runs) == set(SEARCHES) for runs in found.values())
    assert len({record.id for runs in found.values() for record in runs.values()}) == 2 * len(SEARCHES)
    strongest = {name: [runner.record(run) for run in runs] for name, runs in plan.strongest.items()}
    assert list(strongest) == list(plan.models) == list(plan.paper) and list(plan.doubled) == ["ERM"]
    (record,), twice = strongest["ERM"], runner.record(plan.doubled["ERM"])
    assert [point["eps"] for point in record.metrics["curve"]] == [8.0, 32.0] and "curve" not in twice.metrics
    assert twice.settings["effort"] == 2 and twice.metrics["spent"] >= record.metrics["spent"]
    assert claims.saturation_claim(strongest, {"ERM": twice}).verdict != "not run"
    assert claims.ablation(strongest)["model"].tolist() == [
        name for name, (each,) in strongest.items() if each.metrics["eps_uni"] is not None
    ]
    carried = runner.record(plan.transfer).metrics
    assert carried["titles"] == ["ERM", "s=8, eps=10, sigma=0.7", "ERM, 14 layers"]
    assert len(carried["rates"]) == len(carried["noise"]) == len(carried["clean"]) == 3
    assert [set(each) for each in carried["saved"]] == [{"exact", "8 bits", "JPEG"}] * 3
    assert [each["exact"] for each in carried["saved"]] == pytest.approx([carried["rates"][i][i] for i in range(3)])
    assert runner.record(plan.seeds["ERM"][0]).id == found["ERM"]["paper"].id
    assert len({runner.record(run).id for run in plan.seeds["ERM"]}) == 2


def test_an_audit_can_ask_at_sizes_in_pixel_units():
    _, plan = plan_of({"relative": False, "eps": 16.0})
    assert all("search" not in run.parents and run.settings["eps"] == 16.0 for run in plan.audits.values())


def test_variants_of_the_paper_s_attack_take_as_many_gradients():
    cifar10, plan = plan_of()
    for name in SEARCHES.keys() - {"aimed", "mean of signs", "DeepFool"}:
        attack = attack_run(cifar10, plan.models["ERM"], name).settings["attack"]
        larger, restarts = attack.get("larger", 1), attack.get("restarts", 1)
        steps = attack["steps"] // (larger * restarts)
        assert steps * attack["batch_size"] * larger * restarts == 8 * 8, name
    binary = attack_run(cifar10, plan.models["ERM"], "paper").settings
    assert binary == plan.attacks["ERM"]["paper"].settings | {"search": cifar10.search}


def test_what_an_attack_changes_about_the_paper_s_stays_changed():
    cifar10, plan = plan_of()
    of = {name: attack_run(cifar10, plan.models["ERM"], name).settings["attack"] for name in SEARCHES}
    assert of["paper"]["loss_threshold"] == of["momentum"]["loss_threshold"] == cifar10.loss_threshold
    assert of["uncapped"]["loss_threshold"] is None and of["uncapped"]["label_smoothing"] == cifar10.label_smoothing
    assert of["margin"]["loss_threshold"] is None and of["margin"]["label_smoothing"] == 0
    assert differences("paper") == {} and differences("warm start") == {"warm_start": True}
    assert differences("momentum") == {"update": "momentum"} and differences("restarts") == {"restarts": 4}
    assert differences("hard targets") == {"loss_threshold": None, "label_smoothing": 0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"audited": [[3, 1.0, 0.5]]},
            r"audited: \(3, 1.0, 0.5\) is not among the points of section 6.1, which are \(8",
        ),
        ({"attacks": ["paper", "magic"]}, r"attacks: 'magic' is unknown; expected some of paper, "),
    ],
)
def test_what_is_not_there_is_named(changes, message):
    with pytest.raises(SatlibError, match=message):
        plan_of(changes)


def searches(**eps):
    return {name: types.SimpleNamespace(metrics={"eps_uni": value}) for name, value in eps.items()}


FOUND = {
    "ERM": searches(paper=20.0, margin=17.0, momentum=None),
    "s = 8": searches(paper=None, margin=30.0, momentum=29),
}


def test_the_ensemble_is_the_smallest_of_all():
    frame = claims.bounds(FOUND, {"ERM": [20.0, 18.0, None], "s = 8": [None, None, None]})
    assert frame.columns.tolist() == ["attack", "ERM", "s = 8"]
    rows = {name: values for name, *values in frame.itertuples(index=False)}
    assert rows["smallest"] == ["17.0", "29.0"] and rows["by"] == ["margin", "momentum"]
    assert rows["lower than the paper's by"] == ["15 %", "–"] and rows["paper"] == ["20.0", "> 255"]
    assert rows["lower than its best of 3 seeds by"] == ["6 %", "–"]
    assert claims.smallest({"paper": None}) == (None, "")


def test_what_fails_is_said_for_each_model():
    found = [audit.Check("one", "passes", ""), audit.Check("two", "fails", ""), audit.Check("three", "fails", "")]
    assert claims.failed({"a": found, "b": found[:1]}) == "a: fails two; three\nb: passes all checks"
    frame = claims.verdicts({"a": found, "b": found})
    assert frame["check"].tolist() == ["one", "two", "three"] and frame["b"].tolist() == ["passes", "fails", "fails"]


def test_claims_about_bounds():
    seeds = {"ERM": [20.0, 20.5], "s = 8": [40.0, 41.0]}
    assert [claim.verdict for claim in claims.bound_claims(FOUND, seeds)] == ["does not hold", "holds"]
    tight = {"ERM": searches(paper=20.0, margin=19.0), "s = 8": searches(paper=None, margin=None)}
    turned = {"ERM": searches(paper=20.0, margin=19.0), "s = 8": searches(paper=30.0, margin=10.0)}
    assert claims.bound_claims(tight, seeds)[0].verdict == "holds"
    verdicts = [claim.verdict for claim in claims.bound_claims(turned, {"ERM": [20.0, 24.0], "s = 8": [40.0, 40.0]})]
    assert verdicts == ["does not hold", "does not hold"]
    assert claims.bound_claims(tight, {"ERM": [20.0, None]})[1].verdict == "does not hold"
    assert claims.bound_claims(tight, {"ERM": [20.0, 20.0], "s = 8": [40.0]})[1].verdict == "not run"
    nothing = claims.bounds({"ERM": searches(paper=0.0, margin=0.0)}, {"ERM": []})
    assert nothing["ERM"].tolist()[-2:] == ["–", "–"]


def strongest(*sizes, curve=(), attack="aimed", missed=9.0):
    """Searches in which another attack missed at a larger eps than the one that found the smallest perturbation."""
    points = [{"eps": eps, "rates": rates} for eps, rates in curve]
    asked = [
        {"eps": eps, "magnitude": eps, "rate": 0.5, "success": False, "how": "full", "attack": by}
        for eps, by in ((missed - 2, attack or "SGA"), (missed, attack or "SGA"), (missed + 1, "another"))
    ]
    metrics = {"attack": attack, "evaluations": asked, "spent": 1500} | ({"curve": points} if curve else {})
    return [types.SimpleNamespace(metrics=metrics | {"eps_uni": size}) for size in sizes]


def test_what_the_ensemble_lowers_is_told_for_each_model():
    found = {"ERM": strongest(11.0, 13.0), "s = 8": strongest(None, attack=None)}
    frame = claims.lowered(found, {"ERM": [20.0, 20.0], "s = 8": [40.0]})
    rows = {name: values for name, *values in frame.itertuples(index=False)}
    assert rows["ERM"] == ["20.0", "12.0", "40 %", "aimed", "9.0", "1,500", 2]
    assert rows["s = 8"] == ["40.0", "> 255", "–", "–", "10.0", "1,500", 1], "where none wins, what any missed counts"


def test_the_ablation_is_at_the_size_nearest_to_eps_uni():
    curve = [(8.0, {"SGA": 0.3, "aimed": 0.35, "margin": 0.2}), (16.0, {"SGA": 0.7, "aimed": 0.8, "margin": 0.75})]
    frame = claims.ablation({"ERM": strongest(13.0, curve=curve), "s = 8": strongest(11.0, curve=curve), "x": []})
    assert frame["eps"].tolist() == ["16", "8"] and frame["aimed"].tolist() == ["80.0", "35.0"]
    assert frame["lost without the best"].tolist() == ["5.0", "5.0"]


@pytest.mark.parametrize(
    ("twice", "verdict"), [(19.5, "holds"), (19.3, "does not hold"), (25.0, "holds"), (None, "holds")]
)
def test_saturation_is_that_twice_the_effort_gains_little(twice, verdict):
    claim = claims.saturation_claim({"ERM": strongest(20.0)}, {"ERM": strongest(twice)[0]})
    assert claim.verdict == verdict and claim.evidence.startswith("ERM 20.0 -> ")
    assert claims.saturation_claim({"ERM": strongest(20.0)}, {}).verdict == "not run"


@pytest.mark.parametrize(("twice", "verdict"), [(19.5, "holds"), (18.2, "not decided"), (17.9, "does not hold")])
def test_what_a_seed_finds_anyway_is_no_gain_of_twice_the_effort(twice, verdict):
    claim = claims.saturation_claim({"ERM": strongest(22.0, 18.0, 20.0)}, {"ERM": strongest(twice)[0]})
    assert claim.verdict == verdict and claim.evidence == f"ERM 22.0 18.0 20.0 -> {twice}"


def test_the_order_changes_where_two_that_are_apart_swap_places():
    paper = {"a": [20.0, 21.0], "b": [30.0, 31.0]}
    apart = {"a": strongest(15.0, 16.0), "b": strongest(10.0, 11.0)}
    found = claims.order_claim(apart, paper)
    assert found.verdict == "does not hold" and found.evidence.endswith(
        "1 pairs are apart under both; swapped: b and a"
    )
    mixed = claims.order_claim({"a": strongest(10.0, 12.0), "b": strongest(11.0, 9.0)}, paper)
    assert mixed.verdict == "not decided" and mixed.evidence == "0 of 1 pairs are apart under both"
    assert claims.order_claim({"a": strongest(10.0, 10.0), "b": strongest(None, None)}, paper).verdict == "holds"
    assert claims.order_claim({"a": strongest(10.0), "b": strongest(None)}, paper).verdict == "not decided"
    assert claims.order_claim({"a": strongest(10.0)}, paper).verdict == "not run"
    assert (
        claims.order_claim({"a": strongest(10.0), "b": strongest(9.0)}, {"a": [1.0], "b": []}).verdict == "not decided"
    )
    assert claims.lowered({"a": [], "b": strongest(9.0)}, {"a": [1.0], "b": []}).empty


def test_the_ensemble_is_drawn_beside_the_papers_attack():
    figure = drawings.lowered(
        {"ERM": strongest(11.0, 13.0), "s = 8": strongest(None)},
        {"ERM": strongest(20.0), "s = 8": strongest(40.0)},
        delta=0.75,
        dataset="Made up",
    )
    (axis,) = figure.axes
    lines = [line.get_xdata().tolist() for line in axis.get_lines()]
    assert lines[0] == [20.0] and lines[1] == [11.0, 13.0] and lines[2] == [12.0, 20.0] and lines[4] == [255.0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["ERM", "s = 8"]
    plt.close(figure)


CARRIED = {
    "titles": ["a", "b"],
    "eps": [10.0, 12.0],
    "rates": [[0.75, 0.4], [0.5, 0.76]],
    "noise": [[0.1, 0.1], [0.1, 0.2]],
    "clean": [0.1, 0.1],
    "saved": [{"exact": 0.75, "8 bits": 0.74, "JPEG": 0.6}, {"exact": 0.76, "8 bits": 0.76, "JPEG": 0.7}],
}


def test_what_perturbations_are_worth_after_saving():
    frame, claim = claims.after_saving(CARRIED)
    assert frame.columns.tolist() == ["model", "eps", "no perturbation", "exact", "8 bits", "JPEG"]
    assert claim.verdict == "holds" and claim.evidence == "a: 75.0 % wrong before, 74.0 % after"
    lost = CARRIED | {"saved": [{"exact": 0.75, "8 bits": 0.4, "JPEG": 0.3}, CARRIED["saved"][1]]}
    assert claims.after_saving(lost)[1].verdict == "does not hold"


def test_files_round_pixels_and_jpegs_lose_more():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 255
    forms = after_saving(images)
    assert torch.equal(forms["exact"], images) and torch.equal(forms["8 bits"], images.round())
    assert (forms["8 bits"] - images).abs().max() <= 0.5 < (forms["JPEG"] - images).abs().max()


def test_claims_about_transfer():
    assert [claim.verdict for claim in claims.transfer_claims(CARRIED)] == ["holds", "holds"]
    better = CARRIED | {"rates": [[0.75, 0.9], [0.5, 0.76]]}
    found = claims.transfer_claims(better)
    assert found[0].verdict == "does not hold" and found[0].evidence == "b: own 76 %, at most 90 % (from a)"
    assert claims.transfer_claims(CARRIED | {"noise": [[0.8, 0.1], [0.1, 0.2]]})[1].verdict == "does not hold"
    nothing = claims.transfer_claims(CARRIED | {"rates": [None, None]})
    assert [claim.verdict for claim in nothing] == ["not decided", "not decided"]


def test_common_images_are_counted_by_content():
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 3, 4, 4).clone()

    def split(name, part):
        return ImageSet(images[part], torch.zeros(len(images[part]), dtype=torch.long), ("a", "b"), "x", "X", name)

    apart = Splits(split("train", slice(0, 5)), split("val", slice(5, 10)), split("test", slice(10, 20)))
    assert not any(claims.common_images(apart, choose=4, report=4).values())
    mixed = Splits(apart.train, split("val", slice(5, 12)), apart.test)
    assert claims.common_images(mixed, choose=4, report=4) == {
        "craft and choose": 2,
        "craft and report": 0,
        "choose and report": 0,
    }


def test_figures_show_every_model_and_attack():
    figure = drawings.bounds(FOUND, {"ERM": [20.0, 20.5]}, delta=0.75, dataset="Made up")
    (axis,) = figure.axes
    assert [line.get_label() for line in axis.get_lines()] == ["ERM", "s = 8"]
    assert list(axis.get_lines()[1].get_ydata()) == [255.0, 30.0, 29.0]
    plt.close(figure)
    figure = drawings.transfer(CARRIED | {"rates": [[0.75, 0.4], None]}, dataset="Made up")
    assert [text.get_text() for text in figure.axes[0].texts] == ["75", "40", "–", "–", "10", "10"]
    plt.close(figure)
