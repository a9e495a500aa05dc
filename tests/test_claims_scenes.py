"""Section 6.3's models judged and drawn, on numbers made up so that the answer is known."""

import types
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from satlib import paper
from satlib.study import results
from satlib.study.claims.scenes import Checkpoint, SceneModel, Strongest, cityscapes_claims, matched
from satlib.study.figures import scenes as drawings


def model(family, iou, eps_uni, *, eps_adv=8.0, untargeted=20.0, epochs=(1, 3)):
    sharedness = int(family.removeprefix("s = ")) if family != "ERM" else None
    curve = tuple(Checkpoint(epoch, iou - epochs[-1] + epoch, eps_uni, eps_adv, 0.5) for epoch in epochs)
    return SceneModel(
        **vars(curve[-1]),
        title=family if family == "ERM" else f"{family}, {iou:g}",
        family=family,
        sharedness=sharedness,
        validation_iou=iou + 10,
        untargeted=untargeted,
        untargeted_adv=2.0,
        untargeted_error=0.1,
        curve=curve,
        run=None,
        training=types.SimpleNamespace(id="t", labels={"dataset": "Made up"}),
        searches=(types.SimpleNamespace(id="u"),),
    )


ERM = model("ERM", 49.0, 20.0, eps_adv=3.0, untargeted=8.0, epochs=(60,))
ONE, MANY = model("s = 1", 45.0, 60.0, eps_adv=11.0, untargeted=25.0), model("s = 5", 44.0, 110.0, eps_adv=6.0)


def test_sound_models_of_equal_performance_are_compared():
    collapsed = [model("s = 1", 6.0, 0.0), model("s = 5", 6.0, None)]  # nearer to each other, but useless
    others = [model("s = 5", 48.9, 200.0), model("s = 1", 47.0, 10.0)]
    assert matched([ERM, *collapsed, ONE, *others, MANY]) == [ERM, ONE, MANY]
    assert matched([ERM, *collapsed]) == [ERM, *collapsed]
    assert matched([ERM, ONE]) == [ERM, ONE] and matched([ERM]) == [ERM]


def test_claims_of_section_6_3():
    def claims(*models):
        """By the paper's attack: clean, targeted, untargeted, image-dependent, beside ERM."""
        clean, *rest = cityscapes_claims(models)
        (aimed, free, beside), image = [c for c in rest if c.attack == "S-PGD"], rest[-1]
        assert {c.verdict for c in rest if c.attack == "ensemble"} == {"not run"} and len(rest) == 7
        return clean, aimed, free, image, beside

    found = claims(ERM, ONE, MANY)
    assert [claim.verdict for claim in found] == ["holds", "holds", "does not hold", "holds", "holds"]
    assert found[2].evidence == "s = 5, 44 20.0, s = 1, 45 25.0 pixel units"
    beyond = model("s = 5", 30.0, None, eps_adv=20.0, untargeted=None)
    found = claims(ERM, ONE, beyond)
    assert [claim.verdict for claim in found] == ["does not hold", "holds", "holds", "does not hold", "holds"]
    assert "> 255" in found[1].evidence
    weak = model("s = 5", 45.0, 10.0, eps_adv=11.5, untargeted=26.0)
    verdicts = [claim.verdict for claim in claims(ERM, ONE, weak)]
    assert verdicts == ["holds", "does not hold", "not decided", "not decided", "does not hold"]
    broken = model("s = 5", 45.0, 0.0)  # clean scenes already look like the target
    assert claims(ERM, ONE, broken)[1].verdict == "does not hold"
    both = [model("s = 1", 45.0, None), model("s = 5", 45.0, None)]
    assert claims(ERM, *both)[1].verdict == "not decided"
    assert [claim.verdict for claim in cityscapes_claims([ERM, ONE])] == ["not run"]


def test_an_order_that_no_full_attack_has_tested_is_not_decided():
    """The answer of a search lies between where its attack missed and what it found."""
    one = replace(ONE, missed={"eps_uni": 55.0})
    coarse, fine = (replace(MANY, missed={"eps_uni": missed}) for missed in (31.9, 102.0))
    claims = [cityscapes_claims([ERM, one, many]) for many in (coarse, fine)]
    found = [next(c for c in each if "larger targeted" in c.claim and c.attack == "S-PGD") for each in claims]
    assert [claim.verdict for claim in found] == ["not decided", "holds"]
    assert "s = 5, 44 110.0 (missed at 31.9), s = 1, 45 60.0 (missed at 55.0)" in found[0].evidence


def strongest(size, *rates):
    search = types.SimpleNamespace(id="e")
    return Strongest(size, dict(zip((8.0, 64.0, 255.0), rates, strict=False)), (search,))


@pytest.mark.parametrize(
    ("one", "many", "verdict"),
    [
        (strongest(60.0), strongest(110.0), "holds"),
        (strongest(60.0), strongest(62.0), "not decided"),
        (strongest(110.0), strongest(None, 70.0, 80.0, 90.0), "holds"),
        (strongest(None, 75.0, 85.0, 96.0), strongest(None, 70.0, 80.0, 90.0), "holds"),
        (strongest(None, 75.0, 85.0, 90.0), strongest(None, 78.0, 89.0, 90.5), "does not hold"),
        (strongest(None, 75.0, 85.0, 90.0), strongest(None, 75.5, 85.5, 90.5), "not decided"),
        (strongest(None, 75.0, 85.0, 90.0), strongest(None, 70.0, 80.0, 93.0), "not decided"),  # they cross
        (strongest(60.0), None, "not run"),
    ],
)
def test_the_ensemble_decides_by_its_sizes_or_where_there_are_none_by_its_curves(one, many, verdict):
    models = [replace(ONE, untargeted_ensemble=one), replace(MANY, untargeted_ensemble=many)]
    claim = next(
        c for c in cityscapes_claims([ERM, *models]) if "without a target" in c.claim and c.attack == "ensemble"
    )
    assert claim.verdict == verdict
    curves = many is not None and one.size is many.size is None
    assert ("success in % at 8, 64, 255: s = 5, 44 " in claim.evidence) == curves


def test_the_ensembles_numbers_stand_beside_those_of_the_papers_attack():
    models = [replace(m, ensemble=strongest(size)) for m, size in ((ERM, 10.0), (ONE, 50.0), (MANY, 40.0))]
    found = results.section_rows("6.3", "p", replace(paper.CITYSCAPES, width=8), models)
    rows = dict(zip([r.key for r in paper.REPORTED if r.section == "6.3"], found, strict=True))
    many, free = rows["cityscapes/s5/eps_uni_targeted"], rows["cityscapes/s5/eps_uni"]
    assert (many.ours, many.verdict, many.ensemble) == (110.0, "same direction", 40.0)
    assert many.verdicts == "not reproduced (by the paper's attack: same direction)"
    assert (free.ensemble_verdict, free.ensemble_text, free.verdicts) == ("not run", "–", free.verdict)
    assert rows["cityscapes/s1/eps_adv"].ensemble_verdict == "not run" and "e" in many.ensemble_runs
    table = results.segmenters(paper.CITYSCAPES, models)
    assert table["targeted eps_uni(0.95), ensemble"].tolist() == ["10.0", "50.0", "40.0"]
    assert "untargeted eps_uni(0.95), ensemble" not in table


def test_rows_of_section_6_3_are_judged_as_the_paper_says():
    ours = replace(paper.CITYSCAPES, width=8)

    def rows(*models, settings=ours):
        found = results.section_rows("6.3", "p", settings, list(models))
        keys = [reported.key for reported in paper.REPORTED if reported.section == "6.3"]
        return dict(zip(keys, found, strict=True))

    def judged(*models):
        return {key: (row.ours, row.verdict) for key, row in rows(*models).items()}

    found = judged(ERM, ONE, MANY)
    assert found["cityscapes/erm/iou"] == (49.0, "other setting")
    assert found["cityscapes/s5/eps_uni_targeted"] == (110.0, "same direction")
    assert found["cityscapes/s1/eps_adv"] == (11.0, "same direction")
    exact = rows(ERM, ONE, model("s = 5", 44.0, 110.0, eps_adv=5.5), settings=paper.CITYSCAPES)
    verdicts = {key: row.verdict for key, row in exact.items()}
    assert verdicts["cityscapes/s1/eps_adv"] == "reproduced within spread"  # 11.0 with a spread of 0.5, as in the paper
    assert verdicts["cityscapes/s5/eps_adv"] == "reproduced within spread"  # 5.5 for 5.9
    assert verdicts["cityscapes/erm/eps_uni_targeted"] == "other setting"  # no spread is known
    swapped = judged(ERM, model("s = 1", 45.0, None, eps_adv=3.0), MANY)
    assert swapped["cityscapes/s1/eps_adv"] == (3.0, "not reproduced")
    assert swapped["cityscapes/s5/eps_adv"] == (6.0, "not reproduced")  # the same comparison
    assert swapped["cityscapes/s1/eps_uni_targeted"] == (None, "same direction")
    assert swapped["cityscapes/s5/eps_uni_targeted"] == (110.0, "not reproduced")  # more than ERM, less than s = 1
    alike = judged(ERM, model("s = 1", 45.0, 108.0, eps_adv=6.5), MANY)
    assert (
        alike["cityscapes/s5/eps_uni_targeted"] == (110.0, "not decided") == (110.0, alike["cityscapes/s5/eps_adv"][1])
    )
    found = rows(ERM, ONE, MANY, settings=replace(paper.CITYSCAPES, delta=0.5))
    assert found["cityscapes/erm/iou"].dataset == "Made up"
    assert found["cityscapes/s1/eps_uni"].dataset == "Made up, but delta = 0.5"
    assert found["cityscapes/s1/eps_uni"].runs == ("t", "u", "t", "u") and found["cityscapes/s1/eps_uni"].seeds == 1
    assert judged(ERM, ONE, model("s = 4", 45.0, 90.0))["cityscapes/s5/eps_uni"] == (None, "not run")
    assert {row.verdict for row in rows(ONE, MANY).values()} == {"not run"}  # without ERM nothing is compared


def test_figure_5_has_a_line_for_each_defence_and_what_nothing_reached_at_255():
    reported = {r.key: r.value for r in paper.REPORTED}
    figure = drawings.figure5([ERM, ONE, model("s = 5", 44.0, None)], reported, delta=0.95, dataset="Made up")
    left, middle, right = figure.axes
    assert left.get_ylabel().startswith("mean IoU") and "pixel units" in right.get_ylabel()
    lines = {line.get_label(): line for line in right.get_lines()}
    assert list(lines["ERM (undefended)"].get_ydata()) == [20.0, 20.0]
    containers = {container.get_label(): container for container in middle.containers}
    assert list(containers["s = 1, 45"][0].get_ydata()) == [11.0, 11.0]
    assert list(containers["s = 1, 45"][0].get_xdata()) == [1, 3]
    never = {container.get_label(): container for container in right.containers}["s = 5, 44"]
    assert np.isnan(np.asarray(never[0].get_ydata(), float)).all()  # no line joins what nobody knows
    alone = [line for line in right.get_lines() if line.get_linestyle() == "None" and len(line.get_xdata()) == 2]
    assert [list(line.get_ydata()) for line in alone] == [[255.0, 255.0]]
    assert [[text.get_text() for text in axis.texts if "255" in text.get_text()] for axis in figure.axes] == [
        [],
        [],
        ["> 255: never reached"],
    ]
    plt.close(figure)


def test_segmentations_are_coloured_by_what_they_show():
    labels = np.array([[0, 1], [2, 255]])
    picture = drawings.colour(labels, ("road", "tree", "unheard of"))
    assert picture[0, 0].tolist() == [128, 64, 128] and picture[0, 1].tolist() == [107, 142, 35]
    assert picture[1, 0].tolist() == [255, 255, 255] and picture[1, 1].tolist() == [0, 0, 0]
    rows = [
        {"title": "a", "panels": [("picture", np.zeros((3, 8, 12))), ("labels", np.zeros((8, 12), int))]},
        {"title": "b", "panels": [("perturbation", np.ones((3, 8, 12))), None], "captions": {0: "eps = 1"}},
    ]
    figure = drawings.segmentations(rows, ("road", "sky"), title="t", columns=("left", "right"))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["road"]
    assert figure.axes[2].get_xlabel() == "eps = 1" and not figure.axes[3].images
    plt.close(figure)


def test_structure_and_hiding_show_every_scene_and_size():
    kind = {"weakening": [0.1, 0.3], "target_structure": [0.0, 0.2]}
    figure = drawings.structure({"ERM": {"eps": 40, "own": kind, "universal": kind}}, dataset="Made up")
    bars = [patch.get_height() for patch in figure.axes[0].patches]
    assert bars == pytest.approx([0.2, 0.2]) and "eps = 40" in figure.get_suptitle()
    plt.close(figure)
    scores = [{"eps": 10.0, "hidden": 0.5, "kept": 0.9}, {"eps": 20.0, "hidden": None, "kept": 0.8}]
    figure = drawings.hiding([(ERM, scores)], hide="person", dataset="Made up")
    assert figure.axes[1].get_lines()[0].get_ydata().tolist() == [90.0, 80.0]
    plt.close(figure)


def test_figure_1_shows_what_each_model_takes_the_image_for():
    image, xi, seen = np.full((3, 6, 6), 100.0), np.full((3, 6, 6), 5.0), np.zeros((6, 6), int)
    classified = [
        drawings.Fooled("ERM", image, xi, "eps_uni = 5.0", "cat"),
        drawings.Fooled("s = 32", image, 4 * xi, "eps_uni = 20.0", "dog"),
    ]
    driven = [drawings.Fooled("ERM", image, xi, "eps_uni = 5.0", seen)]
    figure = drawings.figure1(classified, driven, ("road",), datasets=("A", "B"))
    shown = [axis.get_xlabel() for axis in figure.axes if axis.get_visible()]
    assert shown == ["clean", "taken for: cat", "taken for: dog", "clean", "", "what is seen"]
    assert [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()] == ["A", "B"]
    plt.close(figure)
