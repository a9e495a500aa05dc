"""The explorer's panels without a browser: what they ask, what they show, and that only the newest question counts."""

import json
import re
import threading
import time

import ipywidgets as widgets
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from satlib import data
from satlib.card import Card
from satlib.errors import SatlibError
from satlib.models import build
from satlib.study import explorer
from satlib.study.claims import Model
from satlib.study.live import Superseded, Target


def slider(value=1):
    return widgets.IntSlider(value=value, min=0, max=100, description="value")


def shown(panel):
    return re.sub(r"<[^>]*>", "", panel.status.value)


def wait_for(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


def test_a_panel_shows_each_answer_and_then_the_last():
    first_shown = threading.Event()
    seen = []

    def answer(settings, superseded):
        yield Figure(), f"roughly {settings['value']}"
        first_shown.wait(20)
        yield Figure(), f"exactly {settings['value']}"

    panel = explorer.Panel({"value": slider(7)}, answer, lambda settings: [])
    wait_for(lambda: "roughly 7" in shown(panel))
    seen.append(panel.picture.value)
    assert "Refining" in shown(panel) and "⏳" in shown(panel) and 'alt="roughly 7"' in seen[0]
    first_shown.set()
    wait_for(lambda: shown(panel) == "exactly 7")
    assert 'alt="exactly 7"' in panel.picture.value


def test_moving_a_slider_quickly_answers_the_last_place_alone():
    started, asked = threading.Event(), []

    def answer(settings, superseded):
        asked.append(settings["value"])
        started.set()
        while settings["value"] != 60:
            if superseded():
                raise Superseded
            time.sleep(0.01)
        yield Figure(), f"value {settings['value']}"

    panel = explorer.Panel({"value": slider(0)}, answer, lambda settings: [])
    assert started.wait(20)
    for value in range(1, 61):
        panel.controls["value"].value = value
    wait_for(lambda: shown(panel) == "value 60")
    assert asked[0] == 0 and asked[-1] == 60 and len(asked) < 30  # nothing queues up


def test_an_answer_that_comes_too_late_is_not_shown():
    def answer(settings, superseded):
        yield Figure(), "too late"

    panel = explorer.Panel({"value": slider()}, answer, lambda settings: [], start=False)
    panel.answer_once(lambda: True)
    assert "too late" not in panel.picture.value


def test_errors_are_shown_in_the_panel_and_mended_by_the_next_move():
    def answer(settings, superseded):
        if settings["value"] == 1:
            raise SatlibError("value=1: expected <another>")
        if settings["value"] == 2:
            raise ZeroDivisionError("oops")
        yield Figure(), "fine"

    panel = explorer.Panel({"value": slider(1)}, answer, lambda settings: [])
    wait_for(lambda: "That does not work: value=1: expected &lt;another&gt;" in shown(panel))
    panel.controls["value"].value = 2
    wait_for(lambda: "This is a bug: ZeroDivisionError: oops" in shown(panel))
    panel.controls["value"].value = 3
    wait_for(lambda: shown(panel) == "fine")


def test_a_button_cancels_what_is_computed_until_the_next_move():
    started, ended = threading.Event(), threading.Event()

    def answer(settings, superseded):
        started.set()
        while settings["value"] == 1:
            if superseded():
                ended.set()
                raise Superseded
            time.sleep(0.01)
        yield Figure(), "fine"

    panel = explorer.Panel({"value": slider(1)}, answer, lambda settings: [])
    assert started.wait(20) and not panel.cancel.disabled and "<progress" in panel.status.value
    panel.cancel.click()
    assert ended.wait(20)
    time.sleep(0.1)
    assert "Cancelled" in shown(panel) and panel.cancel.disabled and "<progress" not in panel.status.value
    panel.controls["value"].value = 2
    wait_for(lambda: shown(panel) == "fine")
    assert panel.cancel.disabled


def test_a_view_is_saved_with_its_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("SATLIB_HOME", str(tmp_path))
    choice = widgets.Dropdown(options=[("all of <them>", 7)], value=7, description="whom")

    def answer(settings, superseded):
        yield Figure(figsize=(2, 1)), "fine"

    panel = explorer.Panel({"value": slider(5), "choice": choice}, answer, lambda settings: [], start=False)
    assert panel.keep.disabled
    with pytest.raises(SatlibError, match="no figure is shown yet"):
        panel.save_view()
    panel.answer_once(lambda: False)
    assert not panel.keep.disabled
    panel.keep.click()
    (file,) = (tmp_path / "data" / "views").glob("*.png")
    assert file.name in shown(panel)
    with Image.open(file) as picture:
        assert json.loads(picture.info["Description"]) == {"value": 5, "whom": "all of <them>"}
    panel.keep.click()
    assert len(list((tmp_path / "data" / "views").glob("*.png"))) == 2  # none replaces another
    monkeypatch.setenv("SATLIB_HOME", str(file))
    panel.keep.click()
    assert "Saved" not in shown(panel) and "data/views" in shown(panel)


def test_long_work_begins_by_a_button():
    asked = []

    def answer(settings, superseded):
        asked.append(settings["value"])
        panel.report("half of <it>", 0.5)
        assert 'value="0.500"' in panel.status.value and "half of &lt;it&gt;" in panel.status.value
        yield Figure(), "fine"

    panel = explorer.Panel({"value": slider(1)}, answer, lambda settings: [], begin="Begin")
    panel.controls["value"].value = 5
    time.sleep(0.1)
    assert asked == [] and shown(panel) == "Begin starts it."
    panel.begin.click()
    wait_for(lambda: shown(panel) == "fine")
    assert asked == [5]


def test_a_panel_reads_as_text_where_there_are_no_widgets():
    panel = explorer.Panel({"value": slider()}, lambda *_: iter([(Figure(), "")]), lambda settings: [], start=False)
    bundle = panel._repr_mimebundle_()
    assert "run this notebook in Jupyter" in bundle["text/plain"] and "value" in bundle["text/plain"]
    assert isinstance(panel.figure(), Figure)


@pytest.fixture(scope="module")
def zoo():
    """Two untrained models, one of which labels pixels."""
    torch.manual_seed(0)
    targets = []
    for title, name, architecture in (
        ("classifier", "shapes32", {"name": "resnet", "depth": 8, "width": 4}),
        ("segmenter", "streets128x64", {"name": "fcn8s", "width": 2}),
    ):
        splits = data.load(name)
        train = splits.train
        model = build(architecture, classes=len(train.classes), mean=train.mean, std=train.std)
        scene = train.labels[0] if name.startswith("streets") else None
        targets.append(Target(title, model.eval(), splits, scene))
    return explorer.Models(*targets)


def text_of(figure):
    return " ".join(t.get_text() for axis in figure.axes for t in (axis.title, axis.xaxis.label, axis.yaxis.label))


def test_attack_panel_offers_the_targets_of_its_model(zoo):
    panel = explorer.attack_panel(zoo, eps=8.0, steps=10, start=False)
    target = panel.controls["target"]
    assert [name for name, _ in target.options] == ["any wrong answer", *zoo.load("classifier").splits.test.classes]
    assert target.label == "any wrong answer"
    target.value = 2
    figure = panel.figure()
    assert "shown 15.9 times as strong" in text_of(figure) and "target hit" in text_of(figure)
    panel.controls["model"].value = "segmenter"
    assert [name for name, _ in target.options] == [
        "any wrong answer",
        "the target scene",
    ] and target.label == "any wrong answer"
    target.value = explorer.SCENE
    assert "pixels of unseen scenes" in text_of(panel.figure())
    panel.controls["own"].value = True
    assert "the first image's own" in text_of(panel.figure())
    panel.controls["eps"].value = 0.0
    panel.answer_once(lambda: False)
    assert "hit the target" in shown(panel)


def test_sliders_begin_where_they_are_told(zoo):
    panel = explorer.sharedness_panel(zoo, sharedness=24, eps=100.0, start=False)
    assert panel.settings["sharedness"] == 24 and panel.settings["eps"] == 100.0
    assert explorer.attack_panel(zoo, steps=400, start=False).settings["steps"] == 400
    with pytest.raises(SatlibError, match="sharedness=0: expected a whole number of at least 1"):
        explorer.sharedness_panel(zoo, sharedness=0, start=False)
    segmenter = explorer.Models(zoo.load("segmenter"))
    with pytest.raises(SatlibError, match="no classifier is here"):
        explorer.sharedness_panel(segmenter, start=False)


def test_a_model_that_cannot_be_loaded_is_said_in_the_panel(zoo):
    class Broken(explorer.Models):
        def load(self, title):
            raise SatlibError(f"{title}: its weights are damaged")

    panel = explorer.attack_panel(Broken(zoo.load("classifier"), zoo.load("segmenter")), start=False)
    panel.controls["model"].value = "segmenter"
    panel.answer_once(lambda: False)
    assert "segmenter: its weights are damaged" in shown(panel)


def test_sharedness_panel_offers_classifiers_alone(zoo):
    panel = explorer.sharedness_panel(zoo, sharedness=64, eps=8.0, start=False)
    panel.controls["steps"].value = 5
    assert panel.controls["model"].options == ("classifier",)
    assert "1 heap of 64 images share" in text_of(panel.figure())
    panel.controls["sharedness"].value = 1
    assert "16 of them" in text_of(panel.figure())
    panel.answer_once(lambda: False)
    assert "classifier, eps = 8, shared by 1: wrong on" in shown(panel) and "5 of 5 steps" in shown(panel)


def model(family, eps=None, sigma=None):
    title = family if eps is None else f"{family}, {eps:g}, {sigma}"
    return Model(title, family, None, eps, sigma, 80.0, 20.0, None, {})


def test_the_nearest_model_is_one_that_was_run():
    erm, low, high = model("ERM"), model("s = 64", 8.0, 0.3), model("s = 64", 22.0, 0.7)
    models = [erm, low, high]
    assert explorer.nearest_model(models, "s = 64", 10.0, 0.4) is low
    assert explorer.nearest_model(models, "s = 64", 26.0, 0.6) is high
    assert explorer.nearest_model(models, "ERM", 26.0, 0.6) is erm
    with pytest.raises(SatlibError, match="no model of s = 8 was run; there are ERM, s = 64"):
        explorer.nearest_model(models, "s = 8", 10.0, 0.5)


def test_a_zoo_without_weights_says_what_makes_some(tmp_path, monkeypatch):
    from satlib.study.ledger import Ledger
    from satlib.study.runs import Runner

    monkeypatch.setenv("SATLIB_DATA", str(tmp_path))
    with pytest.raises(
        SatlibError, match=r"no trained model has its weights here: .*run_all.sh --profile quick --only"
    ):
        explorer.ModelZoo(Runner(profile="quick", ledger=Ledger(tmp_path)), "quick")


def test_embedded_data_is_always_here(tmp_path, monkeypatch):
    monkeypatch.setenv("SATLIB_DATA", str(tmp_path))
    assert explorer.is_here("shapes32") and not explorer.is_here("cifar10") and not explorer.is_here("camvid:240x180")


class Foreign(torch.nn.Module):
    """A network of somebody else's, in training mode."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.BatchNorm1d(48), torch.nn.Linear(48, 4)
        )

    def forward(self, x):
        return self.layers(x / 255)


@pytest.fixture
def foreign():
    """A network of four classes, with images of which it gets all right."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (96, 3, 32, 32), dtype=torch.uint8)
    network = Foreign()
    network(images.float())
    with torch.no_grad():
        labels = network.eval()(images.float()).argmax(1)
    return network.train(), images, labels


def test_panels_take_networks_of_others_and_leave_them_as_they_are(foreign):
    network = foreign[0]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    mine = explorer.Models(Target.of("mine", *foreign))
    panel = explorer.attack_panel(mine, eps=8.0, steps=10, start=False)
    assert [name for name, _ in panel.controls["target"].options][1:] == [f"class {number}" for number in range(4)]
    assert "unseen images" in text_of(panel.figure()) and panel.records == []
    assert network.training and all(weight.requires_grad for weight in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    target = mine.load("mine")
    val, test = target.splits.val.images, target.splits.test.images
    both = torch.cat([val, test]).flatten(1)
    assert len(val) == len(test) == 48 and len({row.numpy().tobytes() for row in both}) == 96


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ["a", "b"]}, "mine: 2 class_names for 4 classes; give one each"),
        ({"images": torch.zeros(1, 3, 32, 32), "labels": torch.tensor([0])}, "1 image: expected at least 2"),
        ({"images": torch.zeros(4, 32, 32)}, r"expected \(d, C, H, W\)"),
        ({"labels": torch.full((96,), 7)}, r"labels range over 7\.\.7"),
    ],
)
def test_a_network_of_others_is_refused_in_one_line(foreign, change, message):
    network, images, labels = foreign
    given = {"model": network, "images": images, "labels": labels} | change
    with pytest.raises(SatlibError, match=message) as refused:
        Target.of("mine", **given)
    assert "\n" not in str(refused.value)


def test_a_network_is_evaluated_while_one_watches_and_its_card_is_offered(foreign, tmp_path, monkeypatch):
    from satlib.study.ledger import Ledger

    monkeypatch.setenv("SATLIB_HOME", str(tmp_path))
    ledger = Ledger(tmp_path / "runs")
    with pytest.raises(SatlibError, match="no card was made yet: notebook 11 makes some"):
        explorer.card_panel(explorer.made_cards(ledger))
    said = []
    whole = explorer.evaluate
    monkeypatch.setattr(explorer, "evaluate", lambda *given, budget, **more: whole(*given, budget=budget / 15, **more))
    panel = explorer.evaluation_panel("mine", *foreign, class_names="abcd", start=False)
    panel.status.observe(lambda change: said.append(change["new"]), names="value")
    panel.controls["budget"].min = 0
    panel.controls["budget"].value = 0
    panel.answer_once(lambda: False)
    assert "budget" in shown(panel)  # which is no positive number
    panel.controls["budget"].value = 1
    panel.answer_once(lambda: False)
    assert "satlib-card" in panel.picture.value and "Saved as" in shown(panel)
    kept = Card.load(tmp_path / "data" / "cards" / "mine")
    assert kept.network["class"] == "Foreign" and kept.network["parameters"] == "292"
    assert any("<progress" in text and "eps_uni by the ensemble" in text for text in said)
    assert list(explorer.made_cards(ledger)) == ["mine"]
    shelf = explorer.card_panel(explorer.made_cards(ledger), start=False)
    shelf.answer_once(lambda: False)
    assert shelf.picture.value == panel.picture.value
    assert isinstance(shelf.figure(), Figure)


def test_an_evaluation_is_cancelled_within_a_pass(foreign, tmp_path, monkeypatch):
    monkeypatch.setenv("SATLIB_HOME", str(tmp_path))
    panel = explorer.evaluation_panel("mine", *foreign)
    panel.begin.click()
    wait_for(lambda: "eps_uni by the ensemble" in shown(panel))
    panel.cancel.click()
    time.sleep(0.5)
    assert "Cancelled" in shown(panel) and not (tmp_path / "data").exists()
