"""Figures of sections 6.1 and 6.2: every model is there, fronts are steps, spectra are what Fourier says."""

import itertools

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from test_claims import model

from satlib.study.figures import classification, name_points

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def labels_of(axis):
    return [text.get_text() for text in axis.texts]


def test_figure_3_draws_both_attacks_the_fronts_as_steps_and_the_rest_faint():
    models = [
        model("ERM", 90.0, 15.0, deepfool=30.0, eps=None),
        model("s = 64", 88.0, 30.0, deepfool=60.0, eps=14.0),
        model("s = 64", 86.0, 40.0, deepfool=70.0, eps=22.0),
        model("s = 64", 85.0, 35.0, deepfool=65.0, eps=99.0),
        model("fictitious play", 87.0, 20.0, deepfool=None, eps=8.0),
    ]
    figure = classification.figure3(models, [(93.25, 14.9, "ERM")], delta=0.75, eps=20.0, dataset="made up")
    figure.canvas.draw()
    left, right = figure.axes
    steps = {line.get_label(): line for line in left.lines if line.get_drawstyle() == "steps-pre"}
    assert list(steps) == ["ERM (undefended)", "s = 64", "fictitious play"]
    assert list(steps["s = 64"].get_xdata()) == [86, 88] and list(steps["s = 64"].get_ydata()) == [40, 30]
    (shared,) = [line for line in right.lines if line.get_label() == "s = 64"]
    assert list(shared.get_ydata()) == [70, 60]
    assert "fictitious play" not in [line.get_label() for line in right.lines]
    faint = [bars.lines[0] for bars in left.containers if bars.lines[0].get_alpha() == 0.3]
    assert [line.get_xdata()[0] for line in faint] == [85.0]
    assert {"14, 0.5", "22, 0.5", "99, 0.5", "8, 0.5", "ERM"} == set(labels_of(left))
    assert "pixel units" in left.get_ylabel() and "%" in right.get_ylabel() and "%" in right.get_xlabel()
    cross = next(line for line in left.lines if line.get_marker() == "x")
    assert cross.get_markeredgewidth() > 0


def test_a_model_that_no_search_could_break_is_named():
    models = [model("ERM", 90.0, 15.0, eps=None), model("s = 1", 80.0, None)]
    left = classification.figure3(models, [], delta=0.75, eps=20.0, dataset="made up").axes[0]
    assert "> 255: s = 1, 80" in labels_of(left)


def test_the_ensemble_has_a_panel_of_its_own_on_the_same_scale():
    models = [
        model("ERM", 90.0, 15.0, eps=None, strongest=11.0),
        model("s = 64", 88.0, 30.0, eps=14.0, strongest=18.0),
        model("s = 64", 86.0, 40.0, eps=22.0),
    ]
    figure = classification.figure3(models, [(93.25, 14.9, "ERM")], delta=0.75, eps=20.0, dataset="made up")
    figure.canvas.draw()
    ensemble, paper, deepfool, legend = figure.axes
    assert ensemble.get_xlim() == paper.get_xlim() == deepfool.get_xlim()
    names = {text.get_text() for text in legend.get_legend().get_texts()}
    assert names == {"ERM (undefended)", "s = 64", "the paper's own numbers"}
    assert ensemble.get_ylim() == paper.get_ylim() and "ensemble" in ensemble.get_title()
    steps = {line.get_label(): line for line in ensemble.lines if line.get_drawstyle() == "steps-pre"}
    assert list(steps["s = 64"].get_ydata()) == [18] and not any(line.get_marker() == "x" for line in ensemble.lines)
    assert any(line.get_marker() == "x" for line in paper.lines) and "86" not in str(labels_of(ensemble))
    figure = classification.figure4(models, [], delta=0.75, dataset="made up")
    assert len(figure.axes) == 2


def test_success_curves_have_a_line_for_each_model_and_a_stroke_at_its_size():
    curves = {"ERM": {4.0: 10.0, 16.0: 90.0}, "s=64, eps=14": {4.0: 5.0, 16.0: 40.0}, "s=64, eps=26": {4.0: 4.0}}
    sizes = {"ERM": 12.0, "s=64, eps=14": None, "s=64, eps=26": None}
    figure = classification.success_curves(curves, sizes, delta=0.75, dataset="made up")
    (axis,) = figure.axes
    lines = {line.get_label(): line for line in axis.lines}
    assert list(lines["ERM"].get_ydata()) == [10, 90] and "pixel units" in axis.get_xlabel()
    strokes = [line for line in axis.lines if line.get_marker() == "|"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in strokes] == [(12.0, 75.0)]
    assert len({lines[title].get_linestyle() for title in ("s=64, eps=14", "s=64, eps=26")}) == 2


def test_the_spectrum_of_a_wave_is_two_points_at_its_frequency():
    x = np.arange(32)
    wave = np.cos(2 * np.pi * 4 * x / 32)[None, None, :].repeat(3, 0).repeat(32, 1)
    magnitude = classification.spectrum(wave)
    assert sorted(map(tuple, np.argwhere(magnitude > magnitude.max() / 2))) == [(16, 12), (16, 20)]
    radius, share = classification.energy_below(wave)
    assert share[radius < 4 / 32 - 1e-9].max() < 1e-9 and share[radius <= 4 / 32 + 1e-9].max() == pytest.approx(1)


def test_random_signs_spread_their_energy_and_smooth_patterns_do_not():
    random = np.sign(np.random.default_rng(1).standard_normal((3, 32, 32)))
    smooth = np.ones((3, 32, 32)) * np.sign(np.sin(np.arange(32) / 5))
    low = {}
    for name, xi in (("random", random), ("smooth", smooth)):
        radius, share = classification.energy_below(xi)
        low[name] = share[radius <= 0.125].max()
    assert low["random"] < 0.1 < 0.7 < low["smooth"]
    figure = classification.spectra({"random": random, "smooth": smooth}, dataset="made up")
    figure.canvas.draw()
    *_, below = [axis for axis in figure.axes if axis.get_xlabel().startswith("spatial frequency")]
    assert [line.get_label() for line in below.lines] == ["random", "smooth", "random signs"]


def test_the_gallery_marks_wrong_predictions():
    rows = [
        {"title": "ERM", "eps_uni": 8.0, "perturbation": np.full((3, 4, 4), 8.0)}
        | {"predictions": [("cat", True), ("dog", False)]}
    ]
    figure = classification.perturbation_gallery(rows, np.zeros((2, 3, 4, 4)), dataset="made up")
    figure.canvas.draw()
    named = {axis.get_xlabel(): axis.xaxis.label.get_color() for axis in figure.axes if axis.get_xlabel()}
    assert named == {"cat": "0.25", "dog": "tab:red"}
    shown = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert shown[-1].max() == 8


def test_figure_4_draws_the_fronts_and_the_paper_s_points():
    models = [model("ERM", 77.0, 8.0, eps=None), model("s = 32", 75.0, 15.0), model("s = 1", 70.0, None)]
    figure = classification.figure4(models, [(77.57, 8.4, "ERM")], delta=0.75, dataset="made up")
    figure.canvas.draw()
    (axis,) = figure.axes
    steps = {line.get_label(): line for line in axis.lines if line.get_drawstyle() == "steps-pre"}
    assert list(steps) == ["ERM (undefended)", "s = 32"] and list(steps["s = 32"].get_ydata()) == [15]
    assert "> 255: s = 1, 70" in [text.get_text() for text in axis.texts]
    assert "pixel units" in axis.get_ylabel() and "%" in axis.get_xlabel()


def test_dominant_labels_are_named_with_their_shares_and_the_rest_is_one_bar():
    metrics = {
        "ERM": {"counts": {"fooled": [1, 6, 0, 1]}, "entropy_bits": {"fooled": 1.06}},
        "s = 32": {"counts": {"fooled": [0, 0, 0, 0]}, "entropy_bits": {"fooled": None}},
    }
    figure = classification.dominant_labels(metrics, ["cat", "dog", "fox", "owl"], dataset="made up", shown=2)
    figure.canvas.draw()
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["2 others", "cat", "dog"]
    assert [bar.get_width() for bar in left.patches] == [12.5, 12.5, 75.0]
    assert "1.06 of 2.00 bits" in left.get_title() and "%" in left.get_xlabel()
    assert "nothing is fooled" in right.get_title()


def test_names_of_points_cover_neither_points_nor_each_other():
    figure, axis = plt.subplots()
    spots = [(1.0, 1.0), (1.01, 1.02), (1.02, 1.0), (1.0, 0.98)]
    axis.plot(*zip(*spots, strict=True), "o", markersize=7)
    axis.set(xlim=(0.9, 1.1), ylim=(0.9, 1.1))
    name_points(axis, [(x, y, f"26, 0.{k}", "black") for k, (x, y) in enumerate(spots)])
    name_points(axis, [(1.0995, 1.0995, "in the corner", "black")])
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axis.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert not any(box.contains(*axis.transData.transform(spot)) for box in boxes for spot in spots)
    frame = axis.get_window_extent()
    assert boxes[-1].x1 <= frame.x1 + 2 and boxes[-1].y1 <= frame.y1 + 2
