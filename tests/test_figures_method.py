"""Each figure of sections 3 to 5 on tiny made-up records: what was given is drawn, axes are labelled and finite."""

from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import same_color

from satlib.attacks import annealed_step_sizes
from satlib.study.figures import ERM, method, pictures

matplotlib.use("agg")
TITLE = "synthetic stand-in (made up)"


def record(metrics, settings, **arrays):
    labels = {"dataset": TITLE}
    return SimpleNamespace(metrics=metrics, settings=settings, labels=labels, arrays=lambda name: arrays)


def risk_record(scale=1.0):
    losses = [("expected", 0.5), ("universal", 1.0), (4, 1.5), (2, 2.0), (1, 3.0)]
    risks = [{"loss": scale * loss, "error": min(1.0, loss / 3)} for _, loss in losses]
    heaps = [{"sharedness": losses[i][0]} | risks[i] for i in (2, 3, 4)]
    return record({"expected": risks[0], "universal": risks[1], "heap": heaps}, {"eps": 16.0})


def search_record(eps_uni=63.75):
    asked = [(0.0, 0.1, False), (127.5, 0.9, True), (63.75, 0.8, True), (31.875, 0.3, False)]
    evaluations = [{"eps": e, "magnitude": e, "rate": r, "success": s and eps_uni is not None} for e, r, s in asked]
    return record({"eps_uni": eps_uni, "evaluations": evaluations}, {"delta": 0.75})


def trace_record(images=5, sharedness=2, size=4):
    random = np.random.default_rng(0)
    heaps = -(-images // sharedness)
    x = random.uniform(0, 255, (images, 3, size, size)).astype(np.float32)
    xi = random.uniform(-8, 8, (3, heaps, 3, size, size)).astype(np.float32)
    labels = [f"class{i}" for i in range(images)]
    names = {"labels": labels, "adversarial_predictions": ["class0"] * images}
    config = {"sharedness": sharedness, "eps": 8.0, "steps": 2, "relative_step_size": 0.5}
    return record(names, config, images=x, gradients=x - 128, perturbations=xi, adversarial=x)


def text_of(figure):
    return " ".join(artist.get_text() for artist in figure.findobj(plt.Text))


def check(figure, *, panels):
    """Common to all plots: so many panels, each labelled, with finite limits and something drawn in it."""
    figure.canvas.draw()
    assert len(figure.axes) == panels
    for axis in figure.axes:
        assert axis.get_xlabel()
        assert np.isfinite([*axis.get_xlim(), *axis.get_ylim()]).all()
        assert axis.lines or axis.patches
    assert any(axis.get_ylabel() for axis in figure.axes) or figure.axes[0].get_yticklabels()
    return figure


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_the_gallery_shows_every_picture_and_marks_wrong_predictions():
    picture = np.zeros((4, 4, 3), np.uint8)
    rows = [
        pictures.Row("clean", [picture] * 3, ["cat", "dog", "cat"], [False, True, False]),
        pictures.Row("perturbation", [picture] * 2),
    ]
    figure = pictures.gallery(rows, title=TITLE)
    figure.canvas.draw()
    assert sum(len(axis.images) for axis in figure.axes) == 5
    assert [axis.get_visible() for axis in figure.axes] == [True] * 5 + [False]
    captions = [axis.xaxis.label for axis in figure.axes[:3]]
    assert [caption.get_text() for caption in captions] == ["cat", "dog", "cat"]
    assert same_color(captions[0].get_color(), captions[2].get_color())
    assert not same_color(captions[0].get_color(), captions[1].get_color())
    assert TITLE in text_of(figure)


def test_figure_2_shows_each_image_its_gradient_its_copy_and_its_adversarial_image():
    figure = pictures.shared_training(trace_record(images=5, sharedness=2))
    figure.canvas.draw()
    (axis,) = figure.axes
    assert len(axis.images) == 4 * 5 + 2 * 3  # four blocks of five images; two pictures for each of three heaps
    text = text_of(figure)
    for words in ("heap 3", "$d$ = 5", "$s$ = 2", "$\\alpha_k$ = 4", "$\\varepsilon$ = 8", "$K$ = 2", TITLE):
        assert words in text
    assert text.count("class0") == 1 + 5  # one label, five predictions
    left, right, bottom, top = (*axis.get_xlim(), *axis.get_ylim())
    for image in axis.images:
        x0, x1, y0, y1 = image.get_extent()
        assert left <= x0 < x1 <= right
        assert bottom <= y0 < y1 <= top


def test_error_curves_draw_one_line_for_each_attack():
    errors = {"image-dependent": [0.5, 0.9], "universal": [0.3, 0.5], "random noise": [0.1, 0.2]}
    figure = check(method.error_curves(record({"errors": errors, "clean_error": 0.1}, {"epsilons": [4, 8]})), panels=1)
    drawn = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert drawn == {name: [0.1, *values] for name, values in errors.items()}
    assert all(list(line.get_xdata()) == [0, 4, 8] for line in figure.axes[0].lines)
    assert "pixel units" in figure.axes[0].get_xlabel()
    assert TITLE in text_of(figure)


def test_two_attacks_show_each_image_clean_and_under_both():
    random = np.random.default_rng(0)
    x, own = random.uniform(0, 255, (3, 3, 4, 4)), random.uniform(-8, 8, (3, 3, 4, 4))
    metrics = {
        "labels": ["cat", "dog", "cat"],
        "predictions": {"clean": ["cat", "dog", "dog"], "own": ["dog"] * 3, "universal": ["cat"] * 3},
    }
    made = record(metrics, {"eps": 8.0}, images=x, own=own, universal=own[:1])
    figure = pictures.two_attacks(made)
    figure.canvas.draw()
    rows = [[axis.images[0].get_array() for axis in figure.axes[start : start + 3]] for start in range(0, 15, 3)]
    assert np.array_equal(rows[2][1], np.rint(np.clip(x[1] + own[1], 0, 255)).transpose(1, 2, 0))
    assert np.array_equal(rows[4][1], np.rint(np.clip(x[1] + own[0], 0, 255)).transpose(1, 2, 0))
    assert np.array_equal(rows[3][0], rows[3][2])
    assert not np.array_equal(rows[1][0], rows[1][2])
    wrong = [same_color(axis.xaxis.label.get_color(), "#b2182b") for axis in figure.axes if axis.get_xlabel()]
    assert wrong == [False, False, True, True, False, True, False, True, False]
    assert TITLE in text_of(figure)


def test_three_risks_are_drawn_at_their_values():
    figure = check(method.three_risks(risk_record()), panels=2)
    points = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert points == [0.5, 1.0, 3.0]
    assert TITLE in text_of(figure)


def test_risk_chain_runs_from_the_expected_to_the_adversarial_risk():
    figure = check(method.risk_chain({None: risk_record(), 64: risk_record(0.5)}), panels=2)
    undefended, defended = figure.axes[0].lines
    assert list(undefended.get_ydata()) == [0.5, 1.0, 1.5, 2.0, 3.0]
    assert list(defended.get_ydata()) == [0.25, 0.5, 0.75, 1.0, 1.5]
    assert same_color(undefended.get_color(), ERM["color"])
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert ticks[0] == "$\\rho_{exp}$"
    assert ticks[2] == "$\\rho_{heap}^{(4)}$"
    assert ticks[-1] == "$\\rho_{adv}$"
    assert TITLE in text_of(figure)


def test_heap_overfitting_draws_both_errors_in_the_order_of_sharedness():
    rows = [{"sharedness": s, "own_error": own, "unseen_error": 1 - own} for s, own in ((4, 0.6), (1, 0.9))]
    metrics = {"rows": rows, "clean_error": 0.05}
    figure = check(method.heap_overfitting({None: record(metrics, {"eps": 16.0})}), panels=1)
    own, unseen, clean = figure.axes[0].lines
    assert list(own.get_xdata()) == [1, 4]
    assert list(own.get_ydata()) == [0.9, 0.6]
    assert list(unseen.get_ydata()) == pytest.approx([0.1, 0.4])
    assert set(clean.get_ydata()) == {0.05}
    assert TITLE in text_of(figure)


def test_loss_threshold_sorts_losses_and_names_the_shares():
    shares = {"error": 0.5, "unseen_error": 0.25, "top_tenth_share": 0.4}
    config = {"loss_threshold": 1.6, "sharedness": 64, "eps": 16.0}
    losses = {"capped": np.array([1.0, 3.0, 2.0]), "uncapped": np.array([9.0, 0.0, 5.0])}
    figure = check(method.loss_threshold(record({"capped": shares, "uncapped": shares}, config, **losses)), panels=2)
    drawn = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert drawn["without threshold"] == [9.0, 5.0, 0.0]
    assert drawn["with threshold $\\kappa$"] == [3.0, 2.0, 1.0]
    assert [bar.get_height() for bar in figure.axes[1].patches] == [0.5, 0.25, 0.4] * 2
    assert TITLE in text_of(figure)


def test_step_schedules_end_at_the_same_total():
    schedules = {str(gamma): annealed_step_sizes(16.0, 10, beta=4.0, gamma=gamma) for gamma in (0.9, 1.0)}
    figure = check(method.step_schedule(schedules, total=64.0, title=TITLE), panels=2)
    ends = [line.get_ydata()[-1] for line in figure.axes[1].lines]
    assert ends == pytest.approx([64.0, 64.0, 64.0])


def test_search_trace_draws_the_shrinking_interval_and_every_rate():
    figure = check(method.search_trace({None: search_record(), 8: search_record()}), panels=4)
    upper, lower = figure.axes[0], figure.axes[2]
    intervals = [sorted(line.get_ydata()) for line in upper.lines if len(line.get_ydata()) == 2]
    assert intervals[:2] == [[0.0, 255.0], [0.0, 127.5]]
    rates = {rate for line in lower.lines if line.get_linestyle() == "None" for rate in line.get_ydata()}
    assert rates == {0.9, 0.8, 0.3}
    assert "eps_uni = 63.8" in text_of(figure)
    assert TITLE in text_of(figure)


def test_search_trace_of_a_search_that_never_succeeds_draws_no_result():
    figure = check(method.search_trace({None: search_record(eps_uni=None)}), panels=2)
    assert "eps_uni =" not in text_of(figure)


def test_robustness_curves_rise_to_the_share_that_can_be_fooled():
    epsilons = np.array([0.0, 2.0, np.inf, 4.0], dtype=np.float32)
    own = record({"eps_adv": 4.0}, {"delta": 0.75}, epsilons=epsilons)
    figure = check(method.robustness_curves({None: own}, {None: search_record()}), panels=1)
    steps, one = figure.axes[0].lines[:2]
    assert list(steps.get_ydata()) == [0.25, 0.5, 0.75, 0.75]
    assert max(steps.get_xdata()) == 255
    assert list(one.get_ydata()) == [0.3, 0.8, 0.9]
    assert TITLE in text_of(figure)
