"""The card of a network: what it says of sound, useless and masked ones, and what it leaves behind."""

import json
import re
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import satlib
from satlib import evaluation, zoo
from satlib.attacks import success_rates
from satlib.card import Card, Examples
from satlib.cli import main
from satlib.data import Splits, imagenet
from satlib.data.folder import load_folder
from satlib.errors import SatlibError
from satlib.evaluation_checks import Rounded
from satlib.study import runs
from satlib.study.claims import Records
from satlib.study.ledger import Ledger
from satlib.study.measurements.cards import card_of, card_run

pytestmark = pytest.mark.usefixtures("float32")
FEW = {"effort": 0.05, "seeds": 1, "epsilons": (8.0, 24.0)}


@pytest.fixture(scope="module")
def sets(tiny):
    """256 images to craft on, 128 that decide, 96 that report."""
    pairs = (tiny.train.first(256), tiny.val, tiny.test)
    return {name: (data.images, data.labels) for name, data in zip(("craft", "choose", "report"), pairs, strict=True)}


@pytest.fixture(scope="module")
def card(trained, sets):
    noise = torch.full((1, 3, 8, 8), 6.0)
    said: list[tuple[str, float]] = []
    given = FEW | {"seeds": 2, "class_names": ("a", "b", "c", "d"), "name": "ours", "transfer": {"another": noise}}
    found = satlib.evaluate(trained, **sets, **given, progress=lambda text, done: said.append((text, done)))
    assert said and [done for _, done in said] == sorted(done for _, done in said) and 0.8 < said[-1][1] <= 1
    return found


def test_the_card_tells_all_parts(card, trained, sets):
    assert card.name == "ours" and card.images == {"craft": 256, "choose": 128, "report": 96}
    assert card.clean_error < 0.1 and card.chance_error > 0.6 and not card.skipped
    assert set(card.searches) == {"ensemble", "paper"} and all(len(found) == 2 for found in card.searches.values())
    assert set(card.errors) == {8.0, 24.0} and card.errors[8.0] <= card.errors[24.0] + 0.05
    assert set(card.noise) == {8.0, 24.0, card.epsilon} and card.noise[24.0] < card.errors[24.0]
    assert card.transfer["another"]["eps"] == 6.0 and 0 <= card.transfer["another"]["error"] < 0.5
    assert card.eps_adv["images"] == 64 and 0 < card.eps_adv["eps"] < card.epsilon
    assert len(card.checks) == 11
    text = str(card)
    assert "one pattern of size" in text and "eps_uni(0.75) by the ensemble" in text
    assert "found by" in text and "random signs" in text and "a whole attack fell short at" in text
    assert card.precision == "float32" and card.network["class"] == type(trained).__name__
    assert card.network["parameters"] == f"{sum(weight.numel() for weight in trained.parameters()):,}"


def test_the_bound_is_what_its_perturbation_does(card, trained, sets):
    """Recomputed: the kept pattern has that size, and wins that share of the images that decide and that report."""
    xi = torch.from_numpy(card.perturbation)
    assert xi.shape == (1, 3, 8, 8) and xi.abs().max().item() == pytest.approx(card.epsilon)
    best = min((each for found in card.searches.values() for each in found), key=lambda each: each.eps_uni)
    assert best.eps_uni == card.epsilon
    assert success_rates(trained, *sets["choose"], xi).item() == pytest.approx(best.rate) and best.rate >= 0.75
    assert success_rates(trained, *sets["report"], xi).item() == pytest.approx(best.report_rate)
    shown = card.examples
    assert shown.said_clean == shown.labels and len(shown.labels) == 5
    moved = torch.from_numpy(shown.perturbed).float() - torch.from_numpy(shown.clean).float()
    assert moved.abs().max() <= card.epsilon + 0.5


def test_it_leaves_a_page_numbers_and_the_perturbation(card, tmp_path):
    page = card.save(tmp_path / "new" / "card")
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>") and "{" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    for expected in ("<h2>ours</h2>", 'alt="Error of ours', "Checks of the evaluation", "256 to craft", "seed 0"):
        assert expected in text
    numbers = json.loads((page.parent / "card.json").read_text())
    assert numbers["verdict"] == card.verdict and numbers["searches"]["ensemble"][0]["eps_uni"]
    assert np.array_equal(np.load(page.parent / "perturbation.npy"), card.perturbation)
    with Image.open(page.parent / "perturbation.png") as picture:
        assert picture.size == (8, 8) and picture.mode == "RGB" and 255 in np.array(picture)
    with Image.open(page.parent / "card.png") as picture:
        assert min(picture.size) > 300
    assert card._repr_html_() in text and "What the words mean" in text and "decisions in float32" in text
    assert Card.load(page.parent) == card and np.array_equal(Card.load(page.parent).examples.clean, card.examples.clean)
    (page.parent / "examples.npz").write_bytes(b"no archive")
    with pytest.raises(SatlibError, match="no card can be read from it"):
        Card.load(page.parent)
    with pytest.raises(SatlibError, match="no card can be read from it"):
        Card.load(tmp_path)
    for damaged in ([], numbers | {"errors": {"8.0": "much"}}, numbers | {"searches": {"ensemble": 3}}):
        (tmp_path / "card.json").write_text(json.dumps(damaged))
        with pytest.raises(SatlibError, match=r"no card can be read from it \(\w+: "):
            Card.load(tmp_path)
    pictures = {"perturbation": card.perturbation, "examples": card.examples}
    assert Card.of_numbers(numbers, **pictures) == card


def test_any_name_and_number_of_channels_can_be_drawn(card):
    two = Examples(*(np.zeros((2, 2, 8, 8), np.uint8) for _ in range(2)), [0, 1], [0, 1], [1, 1])
    odd = {"name": "$5 net$ _{", "classes": ("$a_$", "b$", "c", "d"), "examples": two}
    odd["perturbation"] = np.ones((1, 2, 8, 8), np.float32)
    assert "$5 net$" in replace(card, **odd)._repr_html_()


def test_a_network_at_chance_is_useless_rather_than_robust(resnet, sets):
    card = satlib.evaluate(resnet(3).eval(), **sets, **FEW)
    assert card.useless and card.verdict.startswith("Useless rather than robust: ")
    assert not card.searches and card.notes == ("nothing else was measured: a network at chance has nothing to lose",)
    assert "nothing else was measured" in card._repr_html_()


def test_a_mask_is_flagged(trained, sets):
    with pytest.warns(UserWarning, match="0% of the images have a usable gradient"):
        card = satlib.evaluate(Rounded(trained), **sets, **FEW)
    assert card.noise
    assert card.gradients == 0 and card.verdict.startswith("Not to be believed: only 0% of the images have a usable")
    assert "have a usable gradient" in " ".join(card.notes) and "have a usable gradient" in str(card)
    assert "images have gradients" in [check.check for check in card.failed]
    assert set(card.searches) == {"ensemble"} and not card.errors, "sizes would say nothing"


def test_one_set_is_split_and_a_budget_leaves_out_the_rest(trained, tiny):
    card = satlib.evaluate(trained, tiny.train.images, tiny.train.labels, budget=1e-6, seed=4)
    assert card.images == {"craft": 256, "choose": 128, "report": 128} and card.effort == 0.05
    assert card.splits == "512 images, split at random by seed 4" and not card.searches
    assert card.skipped[0] == "eps_uni by the ensemble: the budget was spent" and len(card.skipped) == 10
    assert "the budget ended before a search did" in card.verdict
    page = card._repr_html_()
    assert "<h3>Left out</h3>" in page and "eps_uni by the paper&#x27;s attack (S-PGD), seed 6" in page


def test_what_fails_after_the_first_search_is_named_and_the_rest_counts(trained, sets, monkeypatch):
    def fails(*args, **options):
        raise ValueError("no memory\nand more")

    monkeypatch.setattr("satlib.evaluation.success_curve", fails)
    card = satlib.evaluate(trained, **sets, **FEW)
    assert card.skipped == ("error at fixed sizes: ValueError: no memory",) and card.checks and not card.errors
    with monkeypatch.context() as patched:
        patched.setattr("satlib.evaluation._examples", fails)
        shown = satlib.evaluate(trained, **sets, **FEW)
    assert shown.skipped[1:] == ("images that are shown: ValueError: no memory",) and shown.examples is None
    monkeypatch.setattr("satlib.evaluation.strongest", fails)
    with pytest.raises(ValueError, match="no memory"):
        satlib.evaluate(trained, **sets, **FEW)


def test_the_order_of_images_does_not_matter(trained, sets):
    """Sorted by class, as folders are: single images and the checks still see all classes."""
    by_class = {name: (x[y.argsort()], y.sort().values) for name, (x, y) in sets.items()}
    card = satlib.evaluate(trained, **by_class, **FEW)
    assert len(set(card.examples.labels)) > 1 and "all are lost" not in card.verdict
    other = satlib.evaluate(trained, **sets, **FEW, budget=1e-6)
    assert card.fingerprints == other.fingerprints and card.network == other.network
    changed = sets | {"report": (sets["report"][0] ^ 1, sets["report"][1])}
    prints = satlib.evaluate(trained, **changed, **FEW, budget=1e-6).fingerprints
    assert [prints[role] == other.fingerprints[role] for role in ("craft", "choose", "report")] == [True, True, False]


def test_what_is_wrong_without_any_perturbation_is_said_so(trained, tiny):
    """A delta below the clean error: the bound is 0, and nothing starts from it."""
    labels = torch.where(torch.arange(96) % 2 == 0, tiny.test.labels, (tiny.test.labels + 1) % 4)
    pairs = dict.fromkeys(("choose", "report"), (tiny.test.images, labels))
    craft = (tiny.val.images, tiny.val.labels)
    with pytest.warns(UserWarning, match="are also"):
        card = satlib.evaluate(trained, craft=craft, **pairs, **FEW, delta=0.3)
    assert card.epsilon == 0 and "without any perturbation 30% of the images that decide are wrong" in card.verdict
    assert "are also" in " ".join(card.notes) and card.save


def test_a_delta_out_of_reach_is_noted_and_none_is_chosen_by_itself():
    """Two classes of equal size: a pattern that sends everything into one of them wins half."""
    labels = torch.arange(400) % 2
    noise = 20 * torch.randn(400, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = (120 + 15 * labels.view(-1, 1, 1, 1) + noise).clamp(0, 255)

    def model(x):
        brighter = (x.mean((1, 2, 3)) - 127.5) / 5
        return torch.stack([-brighter, brighter], 1)

    card = satlib.evaluate(model, images, labels, **FEW)
    assert 0.3 < card.delta < 0.75 and card.epsilon and not card.useless
    wanted = satlib.evaluate(model, images, labels, **FEW, delta=0.75, budget=1e-6)
    assert "delta = 0.75 may be out of reach" in wanted.notes[0]

    def of_three(x):  # a pattern that sends everything into the third class wins all
        return torch.cat([model(x), x.new_full((len(x), 1), -9.0)], 1)

    assert satlib.evaluate(of_three, images, labels, **FEW, budget=1e-6).delta == 0.75


def test_a_budget_counts_the_seeds(trained, tiny, monkeypatch):
    monkeypatch.setattr("satlib.evaluation._passes_per_second", lambda model, craft: 650_000.0)
    given = {"model": trained, "images": tiny.val.images, "labels": tiny.val.labels, "budget": 1e-6}
    monkeypatch.setattr("satlib.evaluation.EFFORTS", (1e-9, 1.0))
    efforts = [satlib.evaluate(**given, seeds=seeds).effort for seeds in (1, 3, 7)]
    assert efforts == pytest.approx([2e-6, 1e-6, 5e-7])


def test_pixels_are_not_independent_decisions(card):
    better = replace(card, clean_error=0.70, chance_error=0.71, images=card.images | {"report": 32})
    assert better.useless and not replace(better, segmentation=True).useless
    assert replace(better, segmentation=True, clean_error=0.71).useless


def test_warnings_of_other_threads_are_theirs():
    before, filters = warnings.showwarning, list(warnings.filters)
    inside, both = threading.Event(), threading.Event()
    heard = {}

    def other():
        with evaluation._warned() as said:
            inside.set()
            both.wait(10)
            warnings.warn("of the other", stacklevel=1)
            heard["other"] = [str(each.message) for each in said]

    thread = threading.Thread(target=other)
    with evaluation._warned() as said:
        thread.start()
        assert inside.wait(10)
        warnings.warn("of this one", stacklevel=1)
    both.set()
    thread.join()
    assert [str(each.message) for each in said] == ["of this one"] and heard["other"] == ["of the other"]
    assert warnings.showwarning is before and warnings.filters == filters
    with pytest.warns(UserWarning, match="afterwards"):
        warnings.warn("afterwards", stacklevel=1)


def test_few_images_all_right_are_not_useless(trained, tiny):
    card = satlib.evaluate(trained, tiny.train.images[:16], tiny.train.labels[:16], budget=1e-6)
    assert card.clean_error == 0 and not card.useless


def test_random_numbers_are_as_before(trained, sets):
    torch.manual_seed(3)
    net = torch.nn.Sequential(trained, torch.nn.Dropout(0.5)).eval()
    before = torch.get_rng_state()
    card = satlib.evaluate(net, **sets, **FEW)
    assert torch.equal(torch.get_rng_state(), before) and card.checks
    assert card.checks == satlib.evaluate(net, **sets, **FEW).checks


def test_sizes_are_told_as_they_were_given(trained, sets, tmp_path):
    card = satlib.evaluate(trained, **sets, effort=0.05, seeds=1, epsilons=5.1)
    assert set(card.errors) == {5.1} and 5.1 in card.noise and "not measured" not in str(card)
    card.save(tmp_path)
    bare = satlib.evaluate(trained, **sets, **FEW, budget=1e-6)
    bare.save(tmp_path)
    assert not (tmp_path / "perturbation.npy").exists() and not (tmp_path / "perturbation.png").exists()


def test_a_record_of_a_card_gives_it_back(card, trained, tiny, tmp_path, monkeypatch):
    """The measurement of notebook 11, on images that stand in for ImageNet's."""
    names = imagenet.names()
    data = replace(tiny.test, classes=tuple(list(names.values())[:4]))
    splits = Splits(tiny.train, tiny.val, data)
    monkeypatch.setattr(runs.data, "load", lambda name: splits)
    monkeypatch.setattr(zoo, "pretrained", lambda name, classes: trained if classes == [1, 25, 30, 32] else None)
    run = card_run("stand-in", "imagenet200", images=64, size=8, seeds=1, effort=0.05, epsilons=(8.0,))
    runner = runs.Runner(ledger=Ledger(tmp_path), device="cpu")
    record = runner.record(run)
    again = card_of(Records(runner.ledger).of(run))
    assert again.name == "stand-in" and again.images == {"craft": 32, "choose": 16, "report": 16}
    assert again.epsilon == record.metrics["searches"]["ensemble"][0]["eps_uni"] or again.epsilon
    assert again.perturbation.shape == (1, 3, 8, 8) and again.examples.clean.shape[1:] == (3, 8, 8)
    assert "stand-in" in again._repr_html_() and again.classes == data.classes


def test_a_segmentation_network_gets_a_card(scenes, tmp_path):
    def by_brightness(x):
        return torch.stack([-((x.mean(1) - level) ** 2) / 1000 for level in (40.0, 128.0, 215.0)], 1)

    images, labels = scenes.train.images, scenes.train.labels
    card = satlib.evaluate(by_brightness, images, labels, **FEW, name="brightness")
    assert card.segmentation and card.delta == 0.61, "nine tenths of two thirds and a little: three bands and a corner"
    assert card.epsilon and "labelled pixels" in card.verdict and not card.skipped
    assert set(card.errors) == {8.0, 24.0} and card.examples is None
    assert card.save(tmp_path).is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "labels is missing: expected images and labels, or the three sets"),
        ({"images": None, "labels": None}, "craft is missing: expected images and labels"),
        ({"craft": 1}, "craft is a int: expected a pair"),
        ({"seeds": 0}, "seeds=0: expected a whole number of at least 1"),
        ({"budget": -1.0}, r"budget=-1\.0: expected None, or a positive number of seconds"),
        ({"delta": 1.5}, r"delta=1\.5: expected a share strictly between 0 and 1"),
        ({"effort": 0}, "effort=0: expected a positive number"),
        ({"few": 12}, "6 images to craft: expected at least 8, or 16 that are split"),
        ({"epsilons": (300.0,)}, r"epsilons=\[300\.0\]: expected numbers above 0, up to 255"),
        ({"epsilons": ()}, r"epsilons=\(\): expected a number, or at least one"),
        (
            {"transfer": {"a": torch.ones(8, 8, 3)}},
            r"transfer: 'a' of shape \(8, 8, 3\): expected finite values of shape",
        ),
        ({"transfer": {"a": torch.full((3, 8, 8), torch.nan)}}, "transfer: 'a' of shape"),
        ({"seed": None}, "seed=None: expected a whole number of at least 0"),
        ({"model": torch.nn.Identity()}, r"the model returns \(4, 3, 8, 8\) for a few images: expected logits"),
    ],
)
def test_it_names_what_is_wrong(trained, tiny, changes, message):
    few = changes.pop("few", 40)
    given = {"model": trained, "images": tiny.val.images[:few], "labels": tiny.val.labels[:few]} | FEW | changes
    with pytest.raises(SatlibError, match=message):
        satlib.evaluate(**given)


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
    """40 images by class, and a module that gives a network, in the current folder."""
    for row, (image, label) in enumerate(zip(tiny.test.images[:40], tiny.test.labels[:40].tolist(), strict=True)):
        place = tmp_path / "images" / "dcba"[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{row:03}.png")
    (tmp_path / "classes.txt").write_text("d\nc\nb\na\n")
    code = "import torch\ndef net():\n    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))\n"
    code += "    torch.nn.init.normal_(net[1].weight, generator=torch.Generator().manual_seed(0))\n    return net\n"
    (tmp_path / "mynets.py").write_text(code + "def broken():\n    raise ValueError('no weights')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_of_classes_is_read_in_the_order_that_is_wanted(folder, tiny):
    data = load_folder(folder / "images", classes=["d", "c", "b", "a"], progress=False)
    assert torch.equal(data.labels.bincount(), tiny.test.labels[:40].bincount()) and data.classes == (
        "d",
        "c",
        "b",
        "a",
    )
    assert {image.numpy().tobytes() for image in data.images} == {x.numpy().tobytes() for x in tiny.test.images[:40]}
    by_name = load_folder(folder / "images", size=7, most=9, progress=False)
    assert by_name.images.shape == (9, 3, 7, 7) and by_name.classes == ("a", "b", "c", "d")
    assert load_folder(folder / "images", classes=["x", "d", "c", "b", "a"], progress=False).labels.min() == 1


def test_a_network_is_evaluated_from_a_shell(folder, capsys):
    options = ["--data", "images", "--classes", "classes.txt", "--out", "out/card", "--budget", "1s", "--seeds", "1"]
    assert main(["evaluate", "mynets:net", *options, "--unit"]) == 0
    said = capsys.readouterr().out
    assert "net: " in said and "error on clean images" in said and (folder / "out" / "card" / "index.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mynets"], "mynets: expected MODULE:FUNCTION"),
        (["nowhere:net"], "nowhere:net cannot be called: ModuleNotFoundError: No module named 'nowhere'"),
        (["mynets:none"], "mynets:none cannot be called: AttributeError"),
        (["mynets:broken"], "mynets:broken cannot be called: ValueError: no weights"),
        (["os:getcwd"], "os:getcwd returns a str: expected a network"),
        (["mynets:net", "--mean", "a"], "'a': expected numbers, such as 0.485,0.456,0.406"),
        (["mynets:net", "--classes", "none.txt"], "classes: cannot read none.txt"),
        (["mynets:net", "--data", "none"], "no folder"),
        (["mynets:net", "--classes", "other.txt"], "unexpected class folder"),
        (["mynets:net", "--images", "8"], "4 images to craft: expected at least 8"),
        (["mynets:net", "--images", "0"], "most=0: expected None, or a whole number of at least 1"),
        (["mynets:net", "--size", "0"], "size=0: expected None, or a whole number of at least 1"),
        (["mynets:net", "--classes", "five.txt"], "mynets:net tells 4 classes apart, images has 5"),
        (["mynets:net", "--classes", "twice.txt"], "classes: 'a' is listed twice"),
        (["mynets:net", "--out", "classes.txt"], "classes.txt cannot be written"),
    ],
)
def test_a_shell_gets_one_line(folder, capsys, arguments, message):
    (folder / "other.txt").write_text("a\nb\nc\n")
    (folder / "five.txt").write_text("a\nb\nc\nd\ne\n")
    (folder / "twice.txt").write_text("a\nb\nc\nd\na\n")
    assert main(["evaluate", "--data", "images", "--out", "card", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("satlib: ")]
    assert message in line and not (folder / "card").exists()
