"""Figures of section 6.2: fronts with the paper's points, and the classes that fooled images are taken for."""

import matplotlib
import matplotlib.pyplot as plt
import pytest
from test_claims import model

from satlib.study.figures import imagenet

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_figure_4_draws_the_fronts_and_the_paper_s_points():
    models = [model("ERM", 77.0, 8.0, eps=None), model("s = 32", 75.0, 15.0), model("s = 1", 70.0, None)]
    figure = imagenet.figure4(models, [(77.57, 8.4, "ERM")], delta=0.75, dataset="made up")
    figure.canvas.draw()
    (axis,) = figure.axes
    steps = {line.get_label(): line for line in axis.lines if line.get_drawstyle() == "steps-pre"}
    assert list(steps) == ["ERM (undefended)", "s = 32"] and list(steps["s = 32"].get_ydata()) == [15]
    assert "> 255: s = 1, 70" in [text.get_text() for text in axis.texts]
    assert "pixel units" in axis.get_ylabel() and "%" in axis.get_xlabel()


def test_dominant_labels_are_named_with_their_shares_and_the_rest_is_one_bar():
    found = {
        "ERM": {"counts": {"fooled": [1, 6, 0, 1]}, "entropy_bits": {"fooled": 1.06}},
        "s = 32": {"counts": {"fooled": [0, 0, 0, 0]}, "entropy_bits": {"fooled": None}},
    }
    figure = imagenet.dominant_labels(found, ["cat", "dog", "fox", "owl"], dataset="made up", shown=2)
    figure.canvas.draw()
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["2 others", "cat", "dog"]
    assert [bar.get_width() for bar in left.patches] == [12.5, 12.5, 75.0]
    assert "1.06 of 2.00 bits" in left.get_title() and "%" in left.get_xlabel()
    assert "nothing is fooled" in right.get_title()
