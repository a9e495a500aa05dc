"""Plans, profiles and sweeps: the same result whatever interrupts them."""

import json
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from satlib import cli, data, paper
from satlib.cli import main
from satlib.data import Splits
from satlib.errors import SatlibError
from satlib.study import claims, costs, measurements
from satlib.study import runs as runs_module
from satlib.study.ledger import Ledger
from satlib.study.measurement import Measurement, Run
from satlib.study.measurements import cifar10, cityscapes, imagenet, method
from satlib.study.measurements.classification import entropy_bits, erm_run, robustness_run
from satlib.study.measurements.training import start
from satlib.study.runs import BudgetSpent, Runner
from satlib.study.settings import settings as settings_of

SMALL = {
    "dataset": "shapes32",
    "depth": 8,
    "width": 2,
    "erm_epochs": 3,
    "erm_learning_rate": 0.05,
    "erm_schedule": "one-cycle",
    "finetune_epochs": 2,
    "finetune_epoch_images": 96,
    "finetune_learning_rate": 0.01,
    "finetune_schedule": "one-cycle",
    "points": [[8, 10.0, 0.7], [1, 4.0, 0.5]],
    "steps": 2,
    "search_iterations": 3,
    "search_steps": 3,
    "search_batch": 8,
    "craft_images": 32,
    "choose_images": 32,
    "report_images": 16,
    "strongest_seeds": 0,
    "baselines": [["DeepFool UAD", 8.0], ["fictitious play", 8.0], ["universal adversarial training", 8.0]],
    "uad_pool": 2,
    "uad_epochs": 1,
    "uad_images": 8,
    "response_steps": 2,
    "deepfool_images": 16,
    "deepfool_passes": 1,
    "deepfool_batch": 8,
    "cost_images": 64,
}


@pytest.fixture
def small(tiny, monkeypatch, float32):
    """The plan of section 6.1 in miniature, on a data set of a few images that stands in for any name."""
    monkeypatch.setattr(runs_module.data, "load", lambda name: tiny)
    return cifar10(settings_of("6.1", "paper", **SMALL))


def metrics(ledger: Ledger) -> dict[str, dict]:
    """Of all runs but the one whose metrics are times."""
    return {record.id: record.metrics for record in ledger.records() if record.kind != "epoch_cost"}


def weights(ledger: Ledger) -> dict[str, dict]:
    return {r.id: r.tensors("weights") for r in ledger.records() if r.kind == "train"}


def test_plan_is_carried_out_once_and_found_again(small, tmp_path):
    runner = Runner(ledger=Ledger(tmp_path), device="cpu", profile="p")
    records = runner.carry_out(small.runs)
    assert len(records) == len({r.id for r in records}) == len(set(small.runs)) == len(runner.ledger.records())
    assert all(r.labels["profile"] == "p" and r.labels["dataset"] == "Tiny" for r in records)
    created = {r.id: r.created for r in records}
    again = Runner(ledger=Ledger(tmp_path), device="cpu")
    assert again.todo(small.runs) == {}
    assert {r.id: r.created for r in again.carry_out(small.runs)} == created
    forced = Runner(ledger=Ledger(tmp_path), device="cpu", force=True).carry_out(small.runs)
    assert all(r.created > created[r.id] for r in forced)
    times = {"epoch_cost"}
    assert {r.id: r.metrics for r in forced if r.kind not in times} == {
        r.id: r.metrics for r in records if r.kind not in times
    }


def test_weights_are_asked_for_only_where_something_builds_on_them(small, tmp_path):
    """Published without weights, models and what was measured on them are known; another measurement trains again."""
    computed = Runner(ledger=Ledger(tmp_path), device="cpu")
    computed.carry_out(small.runs)
    ids = [record.id for record in computed.ledger.records()]
    computed.ledger.publish(ids, ["perturbation"])
    shutil.rmtree(tmp_path / "runs")
    runner = Runner(ledger=Ledger(tmp_path), device="cpu")
    assert runner.todo(small.runs) == {} and len(runner.carry_out(small.runs)) == len(ids)
    assert not any((tmp_path / "runs").glob("*/record.json"))
    other = robustness_run(settings_of("6.1", "paper", **SMALL), small.erm, seed=7)
    runner.record(other)
    again = {path.parent.name for path in (tmp_path / "runs").glob("*/record.json")}
    assert again == {runner.spec(small.erm).id, runner.spec(other).id}
    assert Runner(ledger=Ledger(tmp_path), device="cpu").model(small.erm) is not None


def test_ids_follow_settings_and_parents(small, tmp_path):
    runner = Runner(ledger=Ledger(tmp_path), device="cpu")
    ids = {runner.spec(run).id for run in small.runs}
    other = cifar10(settings_of("6.1", "paper", **SMALL | {"erm_epochs": 4}))
    assert ids.isdisjoint(runner.spec(run).id for run in other.runs), "everything builds on the ERM model"
    same = cifar10(settings_of("6.1", "paper", **SMALL))
    assert ids == {runner.spec(run).id for run in same.runs}


def test_interrupted_training_resumes_bit_equal(small, tmp_path, monkeypatch):
    whole, parts = Ledger(tmp_path / "whole"), Ledger(tmp_path / "parts")
    Runner(ledger=whole, device="cpu").carry_out(small.runs)
    epochs = []

    def stop(self, needed=0.0):
        epochs.append(needed)
        if len(epochs) % 2 == 0:
            raise BudgetSpent

    monkeypatch.setattr(Runner, "check_budget", stop)
    for _ in range(60):
        try:
            Runner(ledger=parts, device="cpu").carry_out(small.runs)
            break
        except BudgetSpent:
            continue
    else:
        pytest.fail("the plan never ended")
    assert len(epochs) > 6, "nothing was interrupted"
    assert metrics(parts) == metrics(whole)
    for key, tensors in weights(whole).items():
        for name, value in tensors.items():
            assert torch.equal(value, weights(parts)[key][name]), name


def test_deadline_stops_before_any_work(small, tmp_path):
    runner = Runner(ledger=Ledger(tmp_path), device="cpu", deadline=time.time() - 1)
    with pytest.raises(BudgetSpent):
        runner.carry_out(small.runs)
    assert runner.ledger.records() == []


def test_search_record_is_what_it_says(small, tmp_path):
    runner = Runner(ledger=Ledger(tmp_path), device="cpu")
    (search,) = small.robustness[small.erm]
    record = runner.record(search)
    assert record.metrics["images"] == {"craft": 32, "choose": 32, "report": 16}
    evaluations = record.metrics["evaluations"]
    assert evaluations[0]["eps"] == 0
    if record.metrics["eps_uni"]:
        xi = record.tensors("perturbation")["perturbation"]
        assert xi.abs().max().item() == pytest.approx(record.metrics["eps_uni"])
        assert record.metrics["eps_uni"] == min(e["magnitude"] for e in evaluations if e["success"])


def test_method_plan_measures_what_the_notebooks_draw(small, tmp_path):
    choices = {
        "defended": [8, 10.0, 0.7],
        "images": 16,
        "heap_sizes": [16, 4, 1],
        "heap_steps": 3,
        "threshold_sharedness": 8,
        "universal_steps": 4,
        "universal_batch": 8,
        "unseen_images": 32,
        "heaps_scored": 2,
        "gallery_images": 3,
        "curve_images": 16,
        "curve_epsilons": [8, 64],
        "trace_images": 6,
        "trace_sharedness": 4,
        "adversarial_images": 8,
        "adversarial_steps": 3,
    }
    settings = settings_of("method", "paper", **SMALL | choices)
    plan = method(settings)
    runner = Runner(ledger=Ledger(tmp_path), device="cpu")
    stems = ("01_preliminaries", "02_shared_adversarial_training", "03_quantifying_robustness")
    kinds = {record.kind for stem in stems for record in runner.carry_out(plan.of(stem))}
    others = (imagenet(paper.IMAGENET), cityscapes(paper.CITYSCAPES), measurements.plan("checks", "paper"))
    kinds |= {run.kind for run in (*small.runs, *(run for other in others for run in other.runs))}
    files = (
        import_module(each.name) for each in pkgutil.iter_modules(measurements.__path__, "satlib.study.measurements.")
    )
    known = {value.kind for file in files for value in vars(file).values() if isinstance(value, Measurement)}
    assert kinds == known - {"card", "bound"}, "every other measurement is carried out by a notebook's plan"
    risks = runner.record(plan.risks[plan.erm]).metrics
    assert [row["sharedness"] for row in risks["heap"]] == [16, 4, 1]
    chain = [risks["expected"]["loss"], risks["universal"]["loss"], *(row["loss"] for row in risks["heap"])]
    assert risks["slack"] == pytest.approx(max(0.0, *(a - b for a, b in pairwise(chain))))
    made = runner.record(plan.gallery).arrays("gallery")
    assert made["own"].shape == made["images"].shape == (3, *made["universal"].shape[1:])
    assert all(0 < abs(made[name]).max() <= settings.eps for name in ("own", "universal"))
    curves = runner.record(plan.error_curves).metrics
    test = runner.splits("tiny").test.first(curves["images"])
    with torch.no_grad():
        predicted = runner.model(plan.erm)(test.images.float()).argmax(1)
    assert curves["clean_error"] == pytest.approx((predicted != test.labels).float().mean().item())
    clean = runner.record(plan.gallery).metrics["predictions"]["clean"]
    assert clean == [test.classes[i] for i in predicted[:3]]
    assert all(len(errors) == 2 and max(errors) <= 1 for errors in curves["errors"].values())
    assert sum(curves["errors"]["image-dependent"]) >= sum(curves["errors"]["random noise"])
    trace = runner.record(plan.trace)
    arrays = trace.arrays("trace")
    assert arrays["perturbations"].shape[:2] == (settings.steps + 1, 2)  # 6 images in heaps of 4
    assert trace.metrics["largest"] <= settings.trace_eps


# Estimates


def test_a_dry_run_lists_every_run_with_its_time_and_the_disk_it_takes(
    tiny, scenes, tmp_path, monkeypatch, capsys, float32
):
    monkeypatch.setattr(runs_module.data, "load", lambda name: scenes if name.startswith("streets") else tiny)
    monkeypatch.setattr(runs_module, "Ledger", lambda: Ledger(tmp_path))
    plan = {title: f"{key:.12}" for key, title in _planned("quick", tmp_path)}
    assert main(["sweep", "--profile", "quick", "--dry-run"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    sections = [line for line in lines if line.startswith("section ")]
    lines = lines[: -len(sections)]
    counts = [int(line.partition(": ")[2].partition(" runs, ")[0]) for line in sections]
    assert sum(counts) == len(lines) and sections[0].startswith("section 6.1: ") and " MB of weights" in sections[0]
    assert [line[:12] for line in lines] == list(plan.values()) and all("  about " in line for line in lines)
    assert total.startswith(f"{len(lines)} runs are waiting: about ") and "MB of weights" in total
    assert " attack passes a second" in sections[0] and not list(tmp_path.glob("runs/*/record.json"))


def test_a_dry_run_estimates_without_the_data(tmp_path, monkeypatch, capsys):
    """On noise of the data set's geometry; what is known of it cannot be looked up, and it says so."""
    monkeypatch.setenv("SATLIB_DATA", str(tmp_path))
    runner, settings = Runner(ledger=Ledger(tmp_path), device="cpu"), settings_of("6.1", "paper", **SMALL)
    erm = erm_run(replace(settings, dataset="cifar10"))
    cli._dry_run(runner, [erm], tmp_path / "costs.json")
    first, run, section, total = capsys.readouterr().out.splitlines()
    assert first.startswith("cifar10: not here") and str(tmp_path) in first
    assert (
        run.startswith(runner.spec(erm).id[:12]) and "  about " in run and section.startswith("section 6.1: 1 runs, ")
    )
    assert total.startswith("1 runs are waiting: about ")
    (cost,) = json.loads((tmp_path / "costs.json").read_text())
    assert cost["runs"] == 1 and cost["hours"] == pytest.approx(erm.cost / cost["speeds"][0] / 3600, rel=0.01)
    assert cost["weights_mb"] == pytest.approx(costs.weight_bytes(runner, erm) / 1e6)


@pytest.mark.parametrize("name", ["cifar10", "imagenet200:20", "imagenet200-224", "camvid:240x180", "cityscapes"])
def test_dummy_data_has_the_geometry_of_its_data_set(name):
    train = data.dummy_data(name).train
    scenes = name.startswith("c") and name != "cifar10"
    wanted = {"cifar10": (32, 32, 10), "imagenet200:20": (64, 64, 20), "imagenet200-224": (224, 224, 200)}
    wanted |= {"camvid:240x180": (180, 240, 11), "cityscapes": (512, 1024, 19)}
    assert (*train.images.shape[2:], len(train.classes)) == wanted[name]
    assert train.labels.ndim == (3 if scenes else 1) and data.dummy_data("mnist") is None


def test_time_left_counts_each_network_by_its_own_speed(tiny, tmp_path, monkeypatch, float32):
    """A minute was spent on half of a fast network's passes; the slow one's, as many, take ten times as long."""
    monkeypatch.setattr(runs_module.data, "load", lambda name: tiny)
    settings = settings_of("6.1", "paper", **SMALL)
    fast, slow = (erm_run(replace(settings, width=width)) for width in (2, 3))
    runner = Runner(ledger=Ledger(tmp_path), device="cpu")
    speeds = {runs_module.network(fast): 100.0, runs_module.network(slow): 10.0}
    monkeypatch.setattr(runner, "passes_per_second", lambda run: speeds[runs_module.network(run)])
    seen = []
    monkeypatch.setattr(runner.progress, "update", seen.append)
    for run, mixed in ((fast, False), (slow, True)):
        runner._waiting, runner._mixed = {runner.spec(r).id: r for r in (fast, run)}, mixed
        runner.report(fast, "half", 0.5, time.monotonic() - 60)
    assert "60 s left in this run" in seen[0].replace("1 min 0 s", "60 s") and "in all" not in seen[0]
    assert "about 21 min 0 s in all" in seen[1]


def _planned(profile, root):
    runner = Runner(ledger=Ledger(root), device="cpu")
    runs = [r for run in measurements.profile_runs(profile) for r in run.ancestry()]
    return {runner.spec(run).id: f"{run.kind} {run.title} {runner.spec(run).id}" for run in runs}.items()


# Results


def test_results_find_records_without_data(small, tmp_path, monkeypatch):
    ledger = Ledger(tmp_path)
    Runner(ledger=ledger, device="cpu", profile="quick").carry_out(small.runs)
    monkeypatch.setattr(runs_module.data, "load", lambda name: pytest.fail("results need no data"))
    models = claims.trained_models(small, claims.Records(ledger))
    assert [m.title for m in models[:3]] == ["ERM", "s=8, eps=10, sigma=0.7", "s=1, eps=4, sigma=0.5"]
    assert [m.title for m in models[3:]] == [f"{name}, eps=8" for name, _ in SMALL["baselines"]]
    assert [m.family for m in models] == ["ERM", "s = 8", "s = 1", *(name for name, _ in SMALL["baselines"])]
    for m in models:
        assert m.deepfool == 100 * m.deepfools[0].metrics["accuracy"] and len(m.records) == 3 and not m.spreads
    cost = claims.Records(ledger).of(small.cost)
    ways = ["ERM", "s = 1", "s = 8", "s = 64", *(name for name, _ in SMALL["baselines"])]
    assert list(cost.metrics["seconds"]) == ways and min(cost.metrics["seconds"].values()) > 0
    other = cifar10(settings_of("6.1", "paper", **SMALL | {"erm_epochs": 4}))
    assert claims.trained_models(other, claims.Records(ledger)) == []


def test_seeds_of_a_point_make_one_model_with_spread(small, tmp_path):
    seeds = {"repeated": [[8, 10.0, 0.7]], "train_seeds": 2, "search_seeds": 2, "baselines": []}
    plan = cifar10(settings_of("6.1", "paper", **SMALL | seeds))
    again = plan.trained[-1]
    assert again.title == "s=8, eps=10, sigma=0.7, seed 1" and len(plan.trained) == 4
    assert {"eps_uni of ERM", "eps_uni of ERM, seed 1"} < {run.title for run in plan.runs}
    runner = Runner(ledger=Ledger(tmp_path), device="cpu")
    runner.carry_out(plan.runs)
    _, repeated, once = claims.trained_models(plan, claims.Records(runner.ledger))
    accuracies = [100 * record.metrics["accuracy"] for record in repeated.trainings]
    assert len(accuracies) == 2 and len(repeated.searches) == 4 and len(once.searches) == 2
    assert repeated.accuracy == pytest.approx(sum(accuracies) / 2)
    assert repeated.spreads["accuracy"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    assert "accuracy" not in once.spreads and set(repeated.spreads) >= {"accuracy", "deepfool"}
    first, second = (runner.record(run).tensors("weights")["head.weight"] for run in plan.models[8, 10.0, 0.7])
    assert not torch.equal(first, second)


def test_a_repeated_point_that_is_not_planned_is_named():
    with pytest.raises(SatlibError, match=r"repeated: \[\(8, 9.0, 0.5\)\] are not among the points"):
        cifar10(settings_of("6.1", "paper", repeated=[[8, 9.0, 0.5]]))


def test_deepfool_runs_score_unseen_images_under_the_perturbation_that_they_keep(small, tiny, tmp_path):
    runner = Runner(ledger=Ledger(tmp_path), device="cpu")
    record = runner.record(small.deepfool[small.erm])
    xi, model = record.tensors("perturbation")["perturbation"], runner.model(small.erm)
    assert xi.abs().max().item() == record.metrics["magnitude"] <= 20.0
    x, y = tiny.test.images.float(), tiny.test.labels
    with torch.no_grad():
        clean, attacked = model(x).argmax(1), model((x + xi).clamp(0, 255)).argmax(1)
    for name, value in {
        "accuracy": (attacked == y).float().mean(),
        "clean_accuracy": (clean == y).float().mean(),
        "fooling_rate": (attacked != clean).float().mean(),
    }.items():
        assert record.metrics[name] == pytest.approx(value.item()), name


def test_a_baseline_that_nobody_knows_is_named():
    with pytest.raises(SatlibError, match="baselines: 'magic' is no defence; expected one of DeepFool UAD, "):
        cifar10(settings_of("6.1", "paper", baselines=[["magic", 8.0]]))


IMAGENET_SMALL = {
    "dataset": "shapes64",
    "layers": [1, 1, 1, 1],
    "group_width": 8,
    "expansion": 1,
    "stem": "full",
    "batch_size": 32,
    "erm_epochs": 1,
    "erm_batch_size": 32,
    "finetune_epochs": 1,
    "points": [[4, 10.0, 1.0]],
    "search": "k-ary",
    "search_iterations": 4,
    "search_steps": 5,
    "search_batch": 24,
    "choose_images": 16,
    "strongest_seeds": 1,
    "strongest_epsilons": [8.0],
}


def test_section_6_2_crafts_on_training_images_and_reports_on_all_test_images(tiny, tmp_path, monkeypatch, float32):
    monkeypatch.setattr(runs_module.data, "load", lambda name: tiny)
    plan = imagenet(settings_of("6.2", "paper", **IMAGENET_SMALL))
    runner = Runner(ledger=Ledger(tmp_path), device="cpu", profile="p")
    runner.carry_out(plan.runs)
    erm, shared = claims.trained_models(plan, claims.Records(runner.ledger))
    assert (erm.family, shared.family, shared.sharedness) == ("ERM", "s = 4", 4) and shared.deepfool is None
    for m in (erm, shared):
        (search,) = m.searches
        assert search.metrics["images"] == {"craft": len(tiny.train), "choose": 16, "report": len(tiny.test)}
        assert m.trainings[0].labels["section"] == "6.2"
        predictions = runner.record(plan.predictions[m.run])
        counts, entropy = predictions.metrics["counts"], predictions.metrics["entropy_bits"]
        assert sum(counts["clean"]) == sum(counts["perturbed"]) == len(tiny.test)
        for name, classes in predictions.metrics["first"].items():
            assert len(classes) == 16 and max(classes) < len(tiny.test.classes) and name in ("clean", "perturbed")
        xi = search.tensors("perturbation")["perturbation"]
        with torch.no_grad():
            seen = runner.model(m.run)((tiny.test.images[:16].float() + xi).clamp(0, 255)).argmax(1)
        assert predictions.metrics["first"]["perturbed"] == seen.tolist()
        wrong = round(search.metrics["report_rate"] * len(tiny.test))
        clean = round((1 - m.accuracy / 100) * len(tiny.test))
        assert wrong - clean <= sum(counts["fooled"]) <= wrong
        shares = np.array([count for count in counts["clean"] if count]) / len(tiny.test)
        assert entropy["clean"] == pytest.approx(-(shares * np.log2(shares)).sum())
    assert runner.model(plan.erm).net.layer1[0].conv2.weight.shape == (8, 8, 3, 3)


def two_sets(tiny):
    """By name: "few" has the first two of `tiny`'s classes, all else is `tiny`."""

    def few(part):
        rows = part.labels < 2
        return replace(part, images=part.images[rows], labels=part.labels[rows], classes=part.classes[:2], name="few")

    return lambda name: Splits(*map(few, vars(tiny).values())) if name == "few" else tiny


def test_erm_starts_from_more_classes_and_keeps_all_but_the_head(tiny, tmp_path, monkeypatch, float32, capsys):
    monkeypatch.setattr(runs_module.data, "load", two_sets(tiny))
    small = IMAGENET_SMALL | {"dataset": "few", "erm_dataset": "many", "erm_restart_epochs": 1}
    plan = imagenet(settings_of("6.2", "paper", **small))
    runner = Runner(ledger=Ledger(tmp_path), device="cpu")
    first = plan.erm.parents["init"]
    assert (first.title, first.dataset, plan.erm.dataset) == ("ERM on many", "many", "few")
    begun = runner.new_model(plan.erm)
    fitted = start(begun, runner.record(first, whole=True), "", {})
    assert set(fitted.other_shape) == {"net.fc.weight", "net.fc.bias"} and not fitted.missing and not fitted.unused
    parent = runner.record(first, whole=True).tensors("weights")
    for name, value in begun.state_dict().items():
        assert value.shape[0] == 2 if name.startswith("net.fc") else torch.equal(value, parent[name])
    runner.record(plan.erm)
    out, err = capsys.readouterr()
    assert "other shapes, left as they were: net.fc.bias (4,) in the file, (2,) here; net.fc.weight (4, " in out + err
    assert runner.model(plan.erm).net.fc.weight.shape[0] == 2
    with pytest.raises(SatlibError, match="erm_dataset: 'many' is for the first training, but erm_restart_epochs is 0"):
        imagenet(settings_of("6.2", "paper", **small | {"erm_restart_epochs": 0}))


def test_pretrained_weights_are_named_by_their_content(tiny, tmp_path, monkeypatch, float32):
    monkeypatch.setattr(runs_module.data, "load", lambda name: tiny)
    monkeypatch.setenv("SATLIB_HOME", str(tmp_path))
    small = IMAGENET_SMALL | {"pretrained": "mine.pt", "erm_epochs": 0}

    def erm() -> Run:
        return imagenet(settings_of("6.2", "paper", **small)).erm

    with pytest.raises(SatlibError, match=r"pretrained: no file .*mine\.pt; expected a \.safetensors"):
        erm()
    runner = Runner(ledger=Ledger(tmp_path / "ledger"), device="cpu")
    random = runner.new_model(imagenet(settings_of("6.2", "paper", **IMAGENET_SMALL)).erm)
    mine = {f"module.{name}": value.float() for name, value in random.net.state_dict().items()}
    mine["module.fc.bias"] += 1
    torch.save({"state_dict": mine}, tmp_path / "mine.pt")
    run = erm()
    record = runner.record(run)
    assert record.labels["pretrained"] == "mine.pt" and record.metrics["history"] == []
    found = runner.model(run).net.state_dict()
    assert all(torch.equal(value, found[name.removeprefix("module.")]) for name, value in mine.items())
    (tmp_path / "mine.pt").rename(tmp_path / "moved.pt")
    small["pretrained"] = "moved.pt"
    assert runner.find(erm()).id == record.id  # by what they are, not where
    torch.save({name: value + 1 for name, value in mine.items()}, tmp_path / "moved.pt")
    assert erm().settings["pretrained"] != run.settings["pretrained"] and runner.find(erm()) is None
    with pytest.raises(SatlibError, match="erm_epochs: 0 without pretrained weights"):
        imagenet(settings_of("6.2", "paper", **IMAGENET_SMALL | {"erm_epochs": 0}))


def test_section_6_2_is_the_paper_s():
    plan = imagenet(paper.IMAGENET)
    assert len(plan.models) == 9 * 2 * 2 and (32, 10, 1.0) in plan.models
    assert plan.erm.dataset == "imagenet200-224"
    wide = {"layers": [3, 4, 6, 3], "group_width": 128, "expansion": 4, "stem": "large"}
    assert plan.erm.settings["architecture"] == {"name": "bottleneck"} | wide
    attack = plan.robustness[plan.erm][0].settings["attack"]
    assert (attack["steps"], attack["batch_size"], attack["beta"], attack["gamma"]) == (20, 10_000, 4.0, 0.975)
    (run,) = plan.models[32, 10, 1.0]
    training = run.settings["training"]
    assert (training["steps"], training["relative_step_size"], training["weight_decay"]) == (5, 0.4, 5e-5)


@pytest.mark.parametrize(("counts", "bits"), [([4, 4], 1.0), ([8, 0], 0.0), ([2, 2, 2, 2], 2.0), ([0, 0], None)])
def test_entropy_in_bits(counts, bits):
    assert entropy_bits(torch.tensor(counts)) == bits


def test_results_json_has_every_number_of_the_paper(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(claims, "Ledger", lambda: Ledger(tmp_path))
    assert main(["results", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    keys = {"section", "quantity", "unit", "paper", "ours", "spread", "seeds", "profile", "dataset", "runs", "verdict"}
    keys |= {"ensemble", "ensemble_spread", "ensemble_seeds", "ensemble_runs", "ensemble_verdict"}
    assert all(set(row) == keys for row in rows)
    assert [row["paper"] for row in rows] == [r.value for r in paper.REPORTED]
    assert all(row["ours"] is None and row["verdict"] == "not run" for row in rows)


# A real sweep, really killed


SWEEP = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from conftest import tiny
from test_runs import SMALL
from satlib.study import measurements, runs as runner
from satlib.study.ledger import Ledger
splits = tiny.__wrapped__() if hasattr(tiny, "__wrapped__") else tiny._get_wrapped_function()()
runner.data.load = lambda name: splits
plan = measurements.plan("6.1", "paper", **SMALL)
print("ready", flush=True)
runner.Runner(ledger=Ledger({root!r}), device="cpu").carry_out(plan.runs)
"""


def start_sweep(root: Path) -> subprocess.Popen:
    code = SWEEP.format(tests=str(Path(__file__).parent), root=str(root))
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env=os.environ | {"SATLIB_PRECISION": "float32", "OMP_NUM_THREADS": "1"},
    )


def test_a_restart_goes_on_from_the_first_cycle_s_weights(small, tmp_path):
    settings = settings_of("6.1", "paper", **SMALL | {"erm_restart_epochs": 1})
    erm, runner = erm_run(settings), Runner(ledger=Ledger(tmp_path), device="cpu")
    (first,) = erm.parents.values()
    assert (first.title, erm.title) == ("ERM, first cycle", "ERM") and not first.parents
    assert runner.spec(first).id == runner.spec(small.erm).id, "a plan without restart trains the same first cycle"
    before, after = (runner.record(run).tensors("weights")["head.weight"] for run in (first, erm))
    assert 0 < (before - after).norm() < before.norm()
    assert len(runner.record(erm).metrics["history"]) == 1
    plan = cifar10(settings)
    assert all(runner.spec(run.parents["init"]).id == runner.spec(erm).id for run in plan.trained[1:])


def test_killed_sweep_ends_as_an_uninterrupted_one(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start_sweep(whole).wait() == 0
    chance = random.Random(3)
    kills = 0
    for _ in range(6):
        process = start_sweep(killed)
        process.stdout.readline()  # it is at work
        try:
            process.wait(chance.uniform(0.0, 0.4))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills, "no sweep was killed"
    twins = [start_sweep(killed), start_sweep(killed)]
    assert [process.wait() for process in twins] == [0, 0]
    assert metrics(Ledger(killed)) == metrics(Ledger(whole))
    for key, tensors in weights(Ledger(whole)).items():
        assert all(torch.equal(value, weights(Ledger(killed))[key][name]) for name, value in tensors.items())
