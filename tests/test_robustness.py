"""The searches for the smallest perturbation: known thresholds, what the search keeps, what it never sees."""

import functools
import math

import pytest
import torch
from torch import nn

import satlib.robustness
from satlib.attacks import success_rates, universal_pgd
from satlib.errors import SatlibError
from satlib.robustness import (
    CLOSER,
    Evaluation,
    Robustness,
    Search,
    Success,
    adversarial_robustness,
    largest_miss,
    strongest,
    success_curve,
    universal_robustness,
)
from satlib.universal import ATTACKS, ensemble, mean_of_signs, named

pytestmark = pytest.mark.usefixtures("float32")
SHAPE = (3, 4, 4)
GRID = 255 / 2**10  # the resolution of ten iterations


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grey(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, *SHAPE)


@pytest.fixture(scope="module")
def brightness(linear):
    """Class 1 where the mean pixel exceeds 130: an image of grey 130 - t needs eps just above t."""
    ones = torch.ones(1, math.prod(SHAPE)) / math.prod(SHAPE)
    return linear(torch.cat([-ones, ones]) / 20, bias=torch.tensor([130.0, -130.0]) / 20)


def scripted(answer):
    """An attack whose every perturbation is uniformly answer(eps), and the list of all eps that it is asked."""
    asked = []

    def craft(model, images, labels, *, eps, generator=None):
        model(images[:1].float())
        asked.extend(eps)
        return torch.stack([torch.full(SHAPE, float(answer(each))) for each in eps])

    return craft, asked


SEARCHING = ("delta", "iterations", "search", "targeted", "warm_start", "generator", "progress")


def search(model, *, attack=None, label=0, choose=None, report=None, **options):
    """universal_robustness with images that need eps 10, 20, 30 and 40, in equal shares."""
    four = (grey(120, 110, 100, 90), torch.full((4,), label))
    given = {"generator": seeded()} | {name: options.pop(name) for name in SEARCHING if name in options}
    if attack is None:
        attack = functools.partial(universal_pgd, **{"steps": 8, "batch_size": 4} | options)
    return universal_robustness(attack, model, craft=four, choose=choose or four, report=report or four, **given)


# ------------------------------------------------------------------------------------------------ universal


@pytest.mark.parametrize(("delta", "threshold"), [(0.2, 10), (0.5, 20), (0.75, 30), (0.9, 40)])
def test_universal_search_finds_a_known_threshold(brightness, delta, threshold):
    """0.75 of the images, not more than 0.75, has to be fooled."""
    found = search(brightness, delta=delta)
    assert threshold <= found.epsilon <= threshold + GRID
    assert found.rate == found.report_rate == math.ceil(4 * delta) / 4
    assert found.perturbation.shape == (1, *SHAPE)
    assert found.perturbation.abs().max().item() == found.epsilon
    assert str(found) == f"{found.epsilon:.1f}" and found.monotone


def test_fewer_iterations_are_a_coarser_grid(brightness):
    found = search(brightness, iterations=4)
    assert [e.eps for e in found.evaluations] == [0.0, 127.5, 63.75, 31.875, 15.9375]
    assert found.epsilon == 31.875


def test_targeted_search_counts_the_target(brightness):
    """The targets are class 1; the images at 135 are there already."""
    four = (grey(135, 120, 100, 90), torch.ones(4, dtype=torch.long))
    found = search(brightness, label=1, choose=four, report=four, targeted=True, delta=0.5)
    assert 10 <= found.epsilon <= 10 + GRID and found.rate == 0.5
    assert found.evaluations[0].rate == 0.25


def test_evaluations_are_all_there_in_their_order(brightness):
    said = []
    found = search(brightness, progress=lambda text, done: said.append((text, done)))
    assert len(found.evaluations) == 11 and found.evaluations[0] == Evaluation(0.0, 0.0, 0.0, False)
    low, high = 0.0, 255.0
    for evaluation in found.evaluations[1:]:
        assert evaluation.eps == (low + high) / 2
        assert evaluation.magnitude <= evaluation.eps
        assert evaluation.success == (evaluation.rate >= 0.75) == (evaluation.eps > 30)
        low, high = (low, evaluation.eps) if evaluation.success else (evaluation.eps, high)
    assert found.epsilon == min(e.magnitude for e in found.evaluations if e.success)
    assert said[0] == ("eps 127.5 -> success 100.0%, 75% reached", 0.1) and len(said) == 10
    assert said[4] == ("eps 23.9 -> success 50.0%, 75% missed", 0.5) and said[-1][1] == 1


def test_search_that_never_succeeds_is_more_than_255(linear):
    constant = linear(torch.zeros(2, math.prod(SHAPE)), bias=torch.tensor([1.0, 0.0]))
    found = search(constant)
    assert found.epsilon is found.perturbation is found.rate is found.report_rate is None
    assert str(found) == "> 255"
    assert [e.success for e in found.evaluations] == [False] * 11
    assert found.evaluations[-1].eps == 255 - GRID


def test_model_that_fails_on_clean_images_has_robustness_zero(linear):
    wrong = linear(torch.zeros(2, math.prod(SHAPE)), bias=torch.tensor([0.0, 1.0]))
    found = search(wrong)
    assert found.epsilon == 0 and str(found) == "0.0"
    assert not found.perturbation.any() and found.rate == found.report_rate == 1
    assert found.evaluations == [Evaluation(0.0, 0.0, 1.0, True)]


def test_smallest_success_is_kept_when_later_iterations_fail(brightness):
    attack, asked = scripted(lambda eps: eps if eps in (127.5, 63.75) else 0)
    found = search(brightness, attack=attack)
    assert asked[:4] == [127.5, 63.75, 31.875, 47.8125] and len(asked) == 10
    assert [e.success for e in found.evaluations] == [False, True, True] + [False] * 8
    assert found.epsilon == 63.75 and found.rate == 1
    assert torch.equal(found.perturbation, torch.full((1, *SHAPE), 63.75))


def test_magnitude_of_the_perturbation_counts_not_the_eps_asked(brightness):
    """The first success needs 35 of the 127.5 that it may use; the second all of its 63.75."""
    attack, _ = scripted(lambda eps: {127.5: 35.0, 63.75: 63.75}.get(eps, 0.0))
    found = search(brightness, attack=attack)
    assert [e.success for e in found.evaluations[:4]] == [False, True, True, False]
    assert found.epsilon == 35 and found.rate == 0.75
    assert torch.equal(found.perturbation, torch.full((1, *SHAPE), 35.0))


def test_a_weak_attack_shows_in_the_rates(brightness):
    """Within 31.9 it fools half, within 47.8 nobody: a perturbation for the former would do for the latter."""
    weak, _ = scripted(lambda eps: {31.875: 25.0, 47.8125: 5.0}.get(eps, eps if eps > 60 else 0.0))
    assert not search(brightness, attack=weak).monotone
    strong, _ = scripted(lambda eps: {31.875: 15.0, 47.8125: 25.0}.get(eps, eps if eps > 47 else 0.0))
    assert search(brightness, attack=strong, iterations=4).monotone
    assert search(brightness, attack=[weak, strong], iterations=4).monotone, "what one misses, the other finds"


@pytest.mark.parametrize(
    ("rates", "monotone"),
    [
        ({0: 0.1, 127.5: 0.8, 63.75: 0.5}, True),
        ({0: 0.1, 127.5: 0.8, 63.75: 0.95}, True),  # both beyond delta: nothing was missed
        ({0: 0.1, 127.5: 0.5, 191.25: 0.47}, True),  # within chance
        ({0: 0.1, 127.5: 0.5, 191.25: 0.4}, False),
        ({0: 0.3, 127.5: 0.8, 63.75: 0.1}, False),
        ({0: 0.1, 127.5: 0.5, 191.25: 0.48, 223.125: 0.44}, False),  # not only neighbours
    ],
)
def test_rates_that_fall_as_eps_grows_are_flagged(rates, monotone):
    evaluations = [Evaluation(eps, eps, rate, rate >= 0.75) for eps, rate in rates.items()]
    assert Robustness(0.75, None, None, None, evaluations, None).monotone is monotone


def test_the_largest_miss_is_one_of_full_length_below_the_answer():
    evaluations = [Evaluation(eps, eps, 0.5, False) for eps in (20.0, 10.0, 40.0)]
    evaluations += [Evaluation(22.0, 22.0, 0.5, False, "rescaled"), Evaluation(25.0, 25.0, 0.8, True)]
    assert [largest_miss(evaluations, epsilon) for epsilon in (28.0, 20.0, None)] == [20.0, 10.0, 40.0]
    assert largest_miss([], None) == 0 and Robustness(0.75, 28.0, None, None, evaluations, None).missed == 20


def test_the_attack_of_an_answer_is_that_which_found_it():
    missed = Evaluation(32.0, 30.0, 0.5, False, attack="missed")
    first, best = (Evaluation(64.0, size, 0.8, True, attack=name) for size, name in ((60.0, "first"), (30.0, "best")))
    evaluations = [Evaluation(0.0, 0.0, 0.1, False), first, missed, best]
    assert Robustness(0.75, 30.0, 0.8, None, evaluations, None).attack == "best"
    assert Robustness(0.75, None, None, None, [missed], None).attack is None


def test_what_is_not_finite_counts_as_nothing(brightness):
    attack, _ = scripted(lambda eps: {127.5: math.inf, 191.25: math.nan}.get(eps, eps))
    with pytest.warns(UserWarning, match="attack 'craft' returns NaN or infinite values: they count as 0"):
        found = search(brightness, attack=attack, iterations=3)
    assert [(e.magnitude, e.success) for e in found.evaluations[1:]] == [(0.0, False), (0.0, False), (223.125, True)]


def test_report_images_never_influence_the_search(trained, tiny):
    val = (tiny.val.images, tiny.val.labels)
    choose, report = ((tiny.test.images[part], tiny.test.labels[part]) for part in (slice(48), slice(48, 96)))
    other = (report[0].flip(2), (report[1] + 1) % 4)
    attack, options = functools.partial(universal_pgd, steps=12), {"delta": 0.4, "iterations": 5}
    one, two = (
        universal_robustness(attack, trained, craft=val, choose=choose, report=images, generator=seeded(), **options)
        for images in (report, other)
    )
    assert one.epsilon == two.epsilon and one.evaluations == two.evaluations
    assert torch.equal(one.perturbation, two.perturbation)
    assert one.report_rate != two.report_rate
    for images, found in ((report, one), (other, two), (choose, one)):
        rate = success_rates(trained, *images, found.perturbation).item()
        assert rate == (found.rate if images is choose else found.report_rate)


def test_crafting_and_choosing_have_images_of_their_own(trained, tiny):
    """Crafting gets the craft images and nothing else; the verdict is the choose images'."""
    seen = []

    def craft(model, images, labels, *, eps, **attack):
        model(images[:1].float())
        seen.append((images, labels, attack))
        return torch.zeros(len(eps), 3, 8, 8)

    val = (tiny.val.images, tiny.val.labels)
    choose = (tiny.test.images[:8], (tiny.test.labels[:8] + (torch.arange(8) < 3)) % 4)
    generator, attack = seeded(), functools.partial(craft, steps=7, loss_threshold=1.6)
    found = universal_robustness(
        attack, trained, craft=val, choose=choose, report=val, iterations=2, generator=generator
    )
    assert all(images is val[0] and labels is val[1] for images, labels, _ in seen) and len(seen) == 2
    expected = {"steps": 7, "loss_threshold": 1.6, "generator": generator}
    assert all(attack == expected for _, _, attack in seen)
    assert [e.rate for e in found.evaluations] == [3 / 8] * 3


def test_share_of_exactly_delta_counts(linear, brightness):
    """7 of 10 are 0.7, although float32 rounds that down."""
    ten = (grey(*[110.0] * 7, *[60.0] * 3), torch.zeros(10, dtype=torch.long))
    found = search(brightness, choose=ten, report=ten, delta=0.7)
    assert 20 <= found.epsilon <= 20 + GRID
    right = linear(torch.zeros(2, math.prod(SHAPE)), bias=torch.tensor([1.0, 0.0]))
    wrong = (ten[0], (torch.arange(10) < 7).long())
    assert search(right, choose=wrong, report=wrong, delta=0.7).epsilon == 0


# --------------------------------------------------------------------------------------------------- k-ary


@pytest.mark.parametrize(("delta", "threshold"), [(0.2, 10), (0.5, 20), (0.75, 30), (0.9, 40)])
@pytest.mark.parametrize("iterations", [6, 10])
def test_k_ary_search_finds_a_known_threshold_to_the_same_resolution(brightness, delta, threshold, iterations):
    found = search(brightness, delta=delta, search="k-ary", iterations=iterations, steps=40)
    assert threshold <= found.epsilon <= threshold + 255 / 2**iterations
    assert found.rate == found.report_rate == math.ceil(4 * delta) / 4
    assert found.perturbation.abs().max().item() == found.epsilon and found.monotone
    missed = [e.eps for e in found.evaluations if e.how == "full" and not e.success]
    assert max(missed) < found.epsilon <= min(e.magnitude for e in found.evaluations if e.success)
    assert sum(e.how == "full" for e in found.evaluations) < 10


def test_k_ary_search_asks_several_eps_in_one_pass(brightness):
    """A short pass over four eps, then one of full length below what it found; every heap of a pass by one call."""
    calls = []

    def spying(model, images, labels, *, eps, steps=40, snapshots=4, generator=None):
        xis = universal_pgd(model, images, labels, eps=eps, steps=steps, batch_size=4, generator=generator)
        calls.append((list(eps), steps, snapshots))
        return xis

    found = search(brightness, attack=spying, search="k-ary")
    assert calls[0] == ([7.96875, 15.9375, 31.875, 63.75], 8, 1)
    assert calls[1][1:] == (40, 4) and len(calls) == 2
    (low, high) = calls[1][0]
    assert low / high == pytest.approx(0.82 / 0.92) and 0.9 * 30 < high < 30 <= found.epsilon <= 30 + GRID


def test_k_ary_search_goes_on_below_while_the_smallest_eps_wins(brightness):
    """The sketch finds nothing, the attack of full length wins from 30 on."""
    full = iter([False] * 4 + [True] * 1000)
    attack, asked = scripted(lambda eps: eps if next(full) else 0.0)
    found = search(brightness, attack=attack, search="k-ary")
    assert 30 <= found.epsilon <= 30 + GRID
    assert min(asked[4:]) < 30 and found.rate == 0.75


def test_k_ary_search_keeps_the_smallest_success_and_reports_what_is_not_monotone(brightness):
    """The sketch wins, clipped, within 30; of full length 25 fools half of the images, but 28 nobody."""
    script = iter([0.0, 0.0, 60.0, 60.0, 23.4, 5.0])
    attack, asked = scripted(lambda eps: next(script))
    found = search(brightness, attack=attack, search="k-ary")
    assert 30 <= found.epsilon <= 30 + GRID and len(asked) == 6
    crafted = [(e.success, e.rate) for e in found.evaluations if e.how == "full"]
    assert crafted == [(False, 0.0), (False, 0.5), (False, 0.0)]  # the first are the clean images
    assert not found.monotone


def test_k_ary_search_that_never_succeeds_is_more_than_255(linear):
    constant = linear(torch.zeros(2, math.prod(SHAPE)), bias=torch.tensor([1.0, 0.0]))
    found = search(constant, search="k-ary")
    assert found.epsilon is found.perturbation is None and str(found) == "> 255"
    assert [e.eps for e in found.evaluations if e.how == "full"] == [0.0, 31.875, 63.75, 127.5, 255.0]


def test_k_ary_search_finds_what_wins_at_a_middling_eps_alone(brightness):
    """Neither the sketch wins, nor the full attack where most pixels are out of range: it still must ask at 1/4."""
    calls = iter(range(1000))
    attack, _ = scripted(lambda eps: 60.0 if next(calls) >= 4 and 50 < eps < 100 else 0.0)
    found = search(brightness, attack=attack, search="k-ary")
    assert 31.875 < found.epsilon <= 31.875 + GRID and not found.monotone  # where it missed it does not look again


def test_k_ary_search_clips_two_winners_of_the_short_pass(brightness):
    """The first fills two pixels of three, and clipped needs 30; the second needs 20, and nothing else wins."""
    calls, two = iter(range(1000)), torch.arange(math.prod(SHAPE)).view(SHAPE) % 3 > 0

    def craft(model, images, labels, *, eps, generator=None):
        model(images[:1].float())
        short = next(calls) == 0
        return torch.stack([torch.full(SHAPE, each * short) * (two | (each > 32)) for each in eps])

    found = search(brightness, attack=craft, search="k-ary", delta=0.5)
    assert 20 <= found.epsilon <= 20 + GRID


def test_clipping_stops_at_what_the_same_attack_missed_and_where_it_does_not_undercut(brightness):
    four = (grey(120, 110, 100, 90), torch.zeros(4, dtype=torch.long))
    asked = Search(brightness, [], four, four, 0.75, False, False, None, None)
    full, two = torch.full((1, *SHAPE), 60.0), torch.arange(math.prod(SHAPE)).view(SHAPE) % 3 > 0
    asked.evaluate(35.0, 0 * full, "full", "one")
    asked.evaluate(40.0, 0 * full, "full", "other")
    asked.rescale((asked.evaluate(60.0, full, "full", "one"), full), 60.0, 1.0)
    assert 35 < asked.smallest <= 36
    before = len(asked.evaluations)
    asked.rescale((asked.evaluate(60.0, full * two, "full", "third"), full * two), 60.0, 1.0)  # which needs 45
    assert len(asked.evaluations) == before + 2 and asked.smallest > 35


def test_k_ary_search_asks_again_below_a_success_at_the_largest_eps(brightness):
    """What wins at 255 can hardly be clipped; full attacks win from 130 on, and must be asked there."""

    def craft(model, images, labels, *, eps, generator=None):
        model(images[:1].float())
        few = torch.zeros(SHAPE).flatten()
        few[:10] = 255.0  # of 48: with what their brightness leaves room for, a mean of a little more than 30
        return torch.stack([few.view(SHAPE) if each == 255 else torch.full(SHAPE, each * (each > 130)) for each in eps])

    found = search(brightness, attack=craft, search="k-ary")
    assert 127.5 < found.epsilon <= 127.5 + GRID and found.missed == 127.5 and found.attack == "craft"


def test_k_ary_answer_is_the_papers_within_its_spread_over_seeds(trained, tiny):
    """On a trained network: never worse than the binary search by more than that differs from seed to seed."""
    val = (tiny.val.images, tiny.val.labels)
    choose, report = ((tiny.test.images[part], tiny.test.labels[part]) for part in (slice(64), slice(64, 96)))

    def answers(name):
        attack = functools.partial(universal_pgd, steps=40, batch_size=16)
        options = {"delta": 0.5, "search": name}
        return torch.tensor(
            [
                universal_robustness(
                    attack, trained, craft=val, choose=choose, report=report, generator=seeded(seed), **options
                ).epsilon
                for seed in range(5)
            ]
        )

    binary, k_ary = answers("binary"), answers("k-ary")
    assert abs(k_ary.mean() - binary.mean()) <= 2 * binary.std() + GRID
    assert k_ary.std() <= 3 * binary.std() + GRID


# -------------------------------------------------------------------------------------------- several attacks


@pytest.mark.parametrize("way", ["binary", "k-ary"])
def test_of_several_attacks_the_smallest_success_counts(brightness, way):
    """One knows nothing between 25 and 40, the other nothing but 35: together they know both."""
    blunt, asked = scripted(lambda eps: eps if eps > 40 else 0.0)
    sharp, also = scripted(lambda eps: min(eps, 35.0))
    alone, both = (search(brightness, attack=attack, search=way) for attack in (blunt, [blunt, sharp]))
    assert alone.epsilon > 30 and 30 <= both.epsilon <= 30 + GRID
    assert set(also) <= set(asked) if way == "binary" else max(also) < alone.epsilon
    assert {e.attack for e in both.evaluations[1:]} == {"craft", "craft #2"} and both.evaluations[0].attack == ""
    assert both.epsilon == min(e.magnitude for e in both.evaluations if e.success)


@pytest.mark.parametrize("way", ["binary", "k-ary"])
def test_evaluations_name_their_attack(brightness, way):
    several = [functools.partial(ATTACKS[name], steps=8, batch_size=4) for name in ("paper", "momentum")]
    found = search(brightness, attack=[*several, ATTACKS["DeepFool"]], search=way, iterations=4)
    assert {e.attack for e in found.evaluations[1:]} == {"paper", "momentum", "DeepFool"}
    assert 30 <= found.epsilon <= 30 + 255 / 2**4 and found.rate >= 0.75
    if way == "binary":
        assert [e.attack for e in found.evaluations[1:4]] == ["paper", "momentum", "DeepFool"]
        assert len(found.evaluations) == 1 + 3 * 4


def test_of_several_attacks_each_goes_on_below_its_own_success(brightness):
    """The first fills every other pixel, and wins from 60 on; the second, asked below that alone, goes on by itself."""
    starts = []
    half = torch.arange(math.prod(SHAPE)).view(SHAPE) % 2

    def weak(model, images, labels, *, eps, generator=None):
        model(images[:1].float())
        return torch.stack([half * each for each in eps])

    def strong(model, images, labels, *, eps, generator=None, start=None):
        model(images[:1].float())
        starts.append((max(eps), start))
        return torch.stack([torch.full(SHAPE, each) for each in eps])

    alone, both = (search(brightness, attack=attacks, search="k-ary") for attacks in ([weak], [weak, strong]))
    assert alone.attack == "weak" and 60 <= alone.epsilon <= 60 + GRID and 0 < alone.missed < 60
    assert both.attack == "strong" and 30 <= both.epsilon <= 30 + GRID
    (first, start), (second, again), _ = starts  # and one that is close
    assert start is None and 0.9 * 60 < first < 60
    assert again.shape == (2, *SHAPE) and again.abs().amax((1, 2, 3)).tolist() == pytest.approx(
        [0.82 / 0.92 * second, second]
    )


def test_at_last_the_best_attack_and_those_that_nearly_won_ask_close_by(brightness):
    """Of 25 images 19 must be won: the best wins from 19 on, and 18.5, which one finds even within 17.8, wins 18."""
    log, most = [], (torch.arange(math.prod(SHAPE)) < 42).view(SHAPE)  # 19 / 42 * 48 = 21.7

    def attack(name, answer):
        def craft(model, images, labels, *, eps, generator=None):
            model(images[:1].float())
            log.append((name, list(eps)))
            return torch.stack([answer(each) * torch.ones(SHAPE) for each in eps])

        craft.__name__ = name
        return craft

    attacks = [
        attack("first", lambda eps: 18.5 if eps == 15.9375 else most * eps),  # nearly, but in its short pass
        attack("near", lambda eps: 18.5),
        attack("larger", lambda eps: 18.5 * (eps > 19)),  # nearly, but within more than it takes at last
        attack("best", lambda eps: eps),
        attack("far", lambda eps: eps / 2),
    ]
    images = (grey(*[129.0 - i for i in range(25)]), torch.zeros(25, dtype=torch.long))
    found = search(brightness, attack=attacks, search="k-ary", choose=images)
    assert found.attack == "best" and 19 <= found.epsilon <= 19 + GRID
    closer = [share * found.epsilon for share in CLOSER]
    assert log[-2:] == [("best", closer), ("near", closer)] and log[-3][0] == "far"


# ------------------------------------------------------------------------------------------------ the ensemble


def sets_of(tiny):
    test = [(tiny.test.images[part], tiny.test.labels[part]) for part in (slice(64), slice(64, 96))]
    return dict(zip(("craft", "choose", "report"), [(tiny.val.images, tiny.val.labels), *test], strict=True))


def test_the_strongest_is_below_the_papers_repeats_itself_and_says_what_it_took(trained, tiny):
    sets, calls, told = sets_of(tiny), [], []
    net = trained.folded()
    net.folded = lambda: net
    handle = net.register_forward_pre_hook(lambda _, args: calls.append(len(args[0]) * args[0].requires_grad))
    found = strongest(net, delta=0.6, generator=seeded(), progress=lambda text, done: told.append(done), **sets)
    handle.remove()
    tried = 4 * (3 + sum(e.how != "rescaled" for e in found.evaluations)) + 32  # by checks, on four; and gradients seen
    assert found.spent <= sum(calls) <= found.spent + tried and found.spent > 10_000
    again = strongest(net, delta=0.6, generator=seeded(), **sets)
    assert again.epsilon == found.epsilon and torch.equal(again.perturbation, found.perturbation)
    paper = universal_robustness(named("paper"), net, delta=0.6, generator=seeded(), **sets)
    assert found.epsilon < paper.epsilon and found.attack in {"SGA", "aimed", "margin"} and found.missed < found.epsilon
    assert found.rate >= 0.6 and min(found.report_rate, found.craft_rate) > 0.4
    assert found.craft_rate == success_rates(net, *sets["craft"], found.perturbation).item()
    assert told == sorted(told) and told[-1] == 1


def test_the_strongest_finds_a_known_threshold(brightness):
    four = (grey(120, 110, 100, 90), torch.zeros(4, dtype=torch.long))
    with pytest.warns(UserWarning, match="are also"):
        found = strongest(brightness, craft=four, choose=four, report=four, generator=seeded())
    assert 30 <= found.epsilon <= 30 + GRID and found.rate == found.report_rate == found.craft_rate == 0.75
    with pytest.warns(UserWarning, match="are also"):
        one = (four[0], torch.ones(4, dtype=torch.long))
        aimed = strongest(brightness, targeted=True, craft=one, choose=one, report=one, generator=seeded())
    assert 30 <= aimed.epsilon <= 30 + GRID
    with pytest.raises(SatlibError, match="effort=0: expected a positive number"):
        strongest(brightness, craft=four, choose=four, report=four, effort=0)


@pytest.mark.parametrize("saturated", [False, True])
@pytest.mark.parametrize(("member", "targeted"), [(0, False), (1, False), (2, False), (0, True), (1, True)])
def test_each_member_finds_a_known_threshold(brightness, member, targeted, saturated):
    """Saturated: a quarter of the values is white already, so that the others have to rise by a third more."""
    images, label = grey(120, 110, 100, 90), 1 if targeted else 0
    if saturated:
        white = (torch.arange(math.prod(SHAPE)) % 4 == 0).view(SHAPE)
        images = torch.where(white, 255.0, (images - 255 / 4) / 0.75)  # of the same mean
    four = images, torch.full((4,), label)
    attacks = ensemble(4, targeted=targeted, effort=0.5)
    with pytest.warns(UserWarning, match="are also"):
        found = universal_robustness(
            attacks[member],
            brightness,
            craft=four,
            choose=four,
            report=four,
            search="k-ary",
            targeted=targeted,
            generator=seeded(),
        )
    known = 40 if saturated else 30
    assert known <= found.epsilon <= known + GRID and found.rate == 0.75


@pytest.mark.parametrize("scenes", [False, True])
def test_the_ensemble_is_told_of_the_images_the_targets_and_the_effort(brightness, monkeypatch, scenes):
    told, model = [], nn.Conv2d(3, 2, 1) if scenes else brightness

    def spying(images, **options):
        told.append((images, options))
        return [functools.partial(universal_pgd, steps=5, batch_size=2)]

    def part(*values):
        return grey(*values), torch.ones(len(values), *SHAPE[1:] * scenes, dtype=torch.long)

    if scenes:
        weight = brightness.weight.view(2, 3, 16).sum(2)[..., None, None].float()
        model.load_state_dict({"weight": weight, "bias": brightness.bias.float()})
    monkeypatch.setattr(satlib.robustness, "ensemble", spying)
    sets = {"craft": part(120, 110, 100), "report": part(90, 80)}
    for targeted in (False, True):
        given = {"targeted": targeted, "effort": 3, "generator": seeded()}
        found = strongest(model, choose=part(105, 95), **sets, **given)
        success_curve(model, epsilons=[8.0], **sets, **given)
        expected = (3, {"segmentation": scenes, "targeted": targeted, "effort": 3})
        assert told == [expected] * 2
        told.clear()
    assert {e.how for e in found.evaluations} == {"full", "coarse", "rescaled"}


def curve_by(monkeypatch, answers, model, calls=None, **options):
    """success_curve of attacks whose perturbations are uniformly answer(eps), by name."""

    def attack(name, answer):
        def craft(model, images, labels, *, eps, generator=None, targeted=False, start=None):
            if calls is not None:
                calls[name] = {"generator": generator, "targeted": targeted, "start": start}
            return torch.stack([torch.full(SHAPE, answer(each)) for each in eps])

        craft.__name__ = name
        return craft

    attacks = [attack(name, answer) for name, answer in answers.items()]
    monkeypatch.setattr(satlib.robustness, "ensemble", lambda *_, **__: attacks)
    return success_curve(model, **options)


def test_a_curve_is_of_the_best_on_the_crafting_images_and_tells_the_rates_on_the_others(brightness, monkeypatch):
    """Images to craft on must get brighter, and those to report on darker."""
    craft = grey(120, 110, 100, 90), torch.zeros(4, dtype=torch.long)
    report = grey(140, 150, 160, 170), torch.ones(4, dtype=torch.long)
    answers = {"down": lambda eps: -eps, "up": lambda eps: eps, "none": lambda eps: 0.0}
    options = {"craft": craft, "report": report, "epsilons": [15.0, 35.0]}
    assert curve_by(monkeypatch, answers, brightness, **options) == [
        Success(15.0, 0.0, 0.25, "up", {"down": 0.25, "up": 0.0, "none": 0.0}),
        Success(35.0, 0.0, 0.75, "up", {"down": 0.75, "up": 0.0, "none": 0.0}),
    ]


def test_a_targeted_curve_counts_the_target_and_aiming_goes_on_from_the_scaled_start(brightness, monkeypatch):
    craft = grey(120, 110, 100, 90), torch.ones(4, dtype=torch.long)
    report = grey(125, 115, 105, 80), torch.ones(4, dtype=torch.long)
    calls, generator, start = {}, seeded(), torch.full((1, *SHAPE), -2.0)
    start[0, 0] = 4.0
    options = {"craft": craft, "report": report, "epsilons": [12.0, 36.0], "generator": generator}
    answers = {"SGA": lambda eps: eps, "aimed": lambda eps: 0.0}
    found = curve_by(monkeypatch, answers, brightness, calls, targeted=True, start=start, **options)
    assert [(each.rate, each.craft_rate, each.attack) for each in found] == [(0.25, 0.25, "SGA"), (0.75, 0.75, "SGA")]
    assert all(call["generator"] is generator and call["targeted"] for call in calls.values())
    assert calls["SGA"]["start"] is None
    assert torch.equal(calls["aimed"]["start"], torch.cat([3 * start, 9 * start]))
    with pytest.raises(SatlibError, match=r"start of shape \(2, 3, 4, 4\): expected \(1, 3, 4, 4\)"):
        curve_by(monkeypatch, answers, brightness, start=start.repeat(2, 1, 1, 1), **options)
    with pytest.warns(UserWarning, match="are also"):
        curve_by(monkeypatch, answers, brightness, **options | {"report": craft})


def test_warm_starts_begin_at_the_smallest_success_so_far(brightness):
    starts = []

    def craft(model, images, labels, *, eps, generator=None, start=None):
        model(images[:1].float())
        starts.append(start)
        return torch.stack([torch.full(SHAPE, each) for each in eps])

    found = search(brightness, attack=craft, warm_start=True, iterations=4)
    assert starts[0] is None and [start.abs().max().item() for start in starts[1:]] == [63.75, 31.875, 15.9375]
    assert found.epsilon == 31.875
    starts.clear()
    for way in ("binary", "k-ary"):
        search(brightness, attack=craft, search=way)
    assert len(starts) > 10 and not any(start is not None for start in starts), "one attack alone begins anew"


@pytest.mark.parametrize(
    ("attack", "options", "message"),
    [
        ([], {}, r"attack=\[\]: expected one like those of satlib\.universal\.ATTACKS, or several"),
        ("paper", {}, r"attack='paper': expected one like those of satlib\.universal\.ATTACKS"),
        (mean_of_signs, {"targeted": True}, r"targeted=True: attack 'mean_of_signs' takes no targeted"),
        (ATTACKS["mean of signs"], {"warm_start": True}, r"warm_start=True: attack 'mean of signs' takes no start"),
        (
            [named(name, batch_size=4) for name in ("hard targets", "paper")],
            {"targeted": True},
            r"loss_threshold=1\.6\d* in a targeted",
        ),
        ([functools.partial(mean_of_signs, steps=2), functools.partial(mean_of_signs, steps=0)], {}, r"steps=0"),
        (lambda model, images, labels, *, eps, generator: images[:2].float(), {}, r"returns shape \(2, 3, 4, 4\)"),
    ],
)
def test_an_attack_that_cannot_do_it_is_refused_before_anything_is_computed(brightness, attack, options, message):
    asked = []
    handle = brightness.register_forward_hook(lambda *_: asked.append(1))
    with pytest.raises(SatlibError, match=message):
        search(brightness, attack=attack, label=1 if options.get("targeted") else 0, **options)
    handle.remove()
    assert not asked or "shape" in message


# -------------------------------------------------------------------------------------------------- hygiene


def test_searches_leave_the_model_as_it_was(tiny):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 4)).train()
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    part = (tiny.val.images[:16], tiny.val.labels[:16])
    attack, sets = functools.partial(universal_pgd, steps=2), {"craft": part, "choose": part, "report": part}
    universal = universal_robustness(attack, model, iterations=2, generator=seeded(), **sets)
    adversarial = adversarial_robustness(model, *part, iterations=2, steps=2, generator=seeded())
    assert [module.training for module in model.modules()] == [True, False, True, True, True]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    again = universal_robustness(attack, model, iterations=2, generator=seeded(), **sets)
    assert again.evaluations == universal.evaluations
    also = adversarial_robustness(model, *part, iterations=2, steps=2, generator=seeded())
    assert torch.equal(also.epsilons, adversarial.epsilons)


# ------------------------------------------------------------------------------------------ image-dependent


@pytest.fixture(scope="module")
def two_class(linear):
    w = torch.randn(1, math.prod(SHAPE), generator=seeded(3))
    weight = torch.cat([-w, w]) / 200
    return linear(weight, bias=-128 * weight.sum(1))


@pytest.mark.parametrize("targeted", [False, True])
def test_image_dependent_epsilon_is_margin_over_l1_norm(two_class, targeted):
    """|w x + b| / |w|_1, for every image; 0 where the goal is reached from the start."""
    images = torch.empty(21, *SHAPE).uniform_(80, 175, generator=seeded(4))
    with torch.no_grad():
        difference = two_class(images) @ torch.tensor([-1.0, 1.0]).double()
    labels = torch.arange(21) % 2
    goal = labels if targeted else 1 - labels
    short = -(2 * goal - 1) * difference
    exact = (short / (two_class.weight[1] - two_class.weight[0]).abs().sum()).clamp(min=0)
    assert 0 < (exact == 0).sum() < 15 and exact.max() < 40
    found = adversarial_robustness(
        two_class, images, labels, steps=8, targeted=targeted, batch_size=8, generator=seeded(), delta=0.75
    )
    assert found.epsilons.shape == (21,)
    assert (found.epsilons >= exact - 1e-3).all() and (found.epsilons <= exact + GRID + 1e-3).all()
    assert torch.equal(found.epsilons == 0, exact == 0)
    assert found.epsilon == found.epsilons.sort().values[15]  # 16 of 21 are the fewest that make 0.75
    assert str(found) == f"{found.epsilon:.1f}"


@pytest.mark.parametrize(
    ("delta", "fewest"), [(0.01, 1), (0.04, 1), (0.041, 2), (0.5, 13), (0.56, 14), (0.76, 19), (0.77, 20), (0.99, 25)]
)
def test_epsilon_at_delta_is_the_quantile(brightness, delta, fewest):
    """Image i of 25 needs i + 1; 0.56 * 25 is not 14 in floating point."""
    images = grey(*[129.0 - i for i in range(25)])
    found = adversarial_robustness(
        brightness, images, torch.zeros(25, dtype=torch.long), delta=delta, steps=6, generator=seeded()
    )
    assert fewest <= found.epsilon <= fewest + GRID


def test_every_image_is_attacked_with_an_eps_and_steps_of_its_own(brightness, monkeypatch):
    """Steps annealed to beta eps for each image, heaps of one, and the best iterate: what the answers rest on."""
    asked, attack = [], satlib.robustness.heap_pgd

    def spying(model, images, labels, *, eps, step_size, **options):
        asked.append((eps, step_size, options))
        return attack(model, images, labels, eps=eps, step_size=step_size, **options)

    monkeypatch.setattr(satlib.robustness, "heap_pgd", spying)
    images = grey(120, 90, 125)
    options = {"steps": 5, "beta": 3.0, "gamma": 0.5, "iterations": 4, "label_smoothing": 0.01, "loss_threshold": 1.6}
    adversarial_robustness(
        brightness, images, torch.zeros(3, dtype=torch.long), generator=(seed := seeded()), **options
    )
    assert [eps.tolist() for eps, _, _ in asked] == [
        [127.5] * 3,
        [63.75] * 3,
        [31.875] * 3,
        [15.9375, 47.8125, 15.9375],
    ]
    for eps, step_size, others in asked:
        assert step_size.shape == (5, 3)
        torch.testing.assert_close(step_size.sum(0), 3 * eps)
        torch.testing.assert_close(step_size[1:], 0.5 * step_size[:-1])
        assert others == {
            "sharedness": 1,
            "steps": 5,
            "targeted": False,
            "loss_threshold": 1.6,
            "straight_through": True,
            "label_smoothing": 0.01,
            "generator": seed,
            "keep_best": True,
        }


def test_images_that_nothing_fools_are_infinitely_robust(linear):
    """Class 1 needs a mean of more than 255.5, which no image has; the last one's label is wrong from the start."""
    weight = torch.cat([torch.zeros(1, 48), torch.ones(1, 48) / 48])
    model = linear(weight, bias=torch.tensor([255.5, 0.0]))
    images, labels = grey(50, 100, 150, 200), torch.tensor([0, 0, 0, 1])
    found = adversarial_robustness(model, images, labels, delta=0.5, steps=4, iterations=3)
    assert found.epsilons.tolist() == [math.inf, math.inf, math.inf, 0.0]
    assert found.epsilon is None and str(found) == "> 255"
    reached = adversarial_robustness(model, images, labels, delta=0.25, steps=4, iterations=3)
    assert reached.epsilon == 0 and str(reached) == "0.0"


def test_scenes_that_nothing_fools_count_as_255_in_the_mean(linear):
    """Pixels turn to class 1 above 128, but in the second scene nothing can: what it is labelled is out of reach."""
    model = torch.nn.Conv2d(3, 3, 1)
    weight = torch.tensor([[-1.0], [1.0], [0.0]]).expand(3, 3)[..., None, None] / 3
    model.load_state_dict({"weight": weight.clone(), "bias": torch.tensor([256.0, 0.0, -1000.0])})
    images, labels = torch.full((2, 3, 4, 4), 100.0), torch.zeros(2, 4, 4, dtype=torch.long)
    targets = torch.stack([labels[0] + 1, labels[1] + 2])
    found = adversarial_robustness(model, images, targets, targeted=True, delta=0.9, steps=20, iterations=8)
    assert found.epsilons[0] == pytest.approx(28, abs=1.1) and found.epsilons[1] == math.inf and found.unreached == 1
    assert found.epsilon == pytest.approx((found.epsilons[0].item() + 255) / 2)


def test_image_dependent_search_needs_less_than_the_universal_one(trained, tiny):
    """rho_uni <= rho_adv at every eps, so eps_adv <= eps_uni at equal delta."""
    part = (tiny.test.images[:32], tiny.test.labels[:32])
    options = {"delta": 0.5, "iterations": 7}
    adversarial = adversarial_robustness(trained, *part, steps=15, generator=seeded(), **options)
    attack = functools.partial(universal_pgd, steps=15)
    universal = universal_robustness(
        attack, trained, craft=part, choose=part, report=part, generator=seeded(), **options
    )
    assert 2 < adversarial.epsilon < universal.epsilon < 40
    again = adversarial_robustness(trained, *part, steps=15, generator=seeded(), **options)
    assert torch.equal(again.epsilons, adversarial.epsilons)


# --------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta": 0.0}, r"delta=0\.0: expected a share strictly between 0 and 1"),
        ({"delta": 1.0}, r"delta=1\.0"),
        ({"delta": -0.5}, r"delta=-0\.5"),
        ({"delta": math.nan}, r"delta=nan"),
        ({"iterations": 0}, r"iterations=0: expected a whole number of at least 1"),
        ({"search": "ternary"}, r"search='ternary': expected one of binary, k-ary"),
        ({"steps": 0}, r"steps=0: expected a whole number of at least 1"),
        ({"beta": -1.0}, r"beta=-1\.0: expected a positive number"),
        ({"gamma": 0.0}, r"gamma=0\.0: expected a positive number"),
        ({"targeted": True, "loss_threshold": 1.6}, r"loss_threshold=1\.6 in a targeted attack"),
    ],
)
def test_searches_name_what_is_wrong(brightness, changes, message):
    label = 1 if changes.get("targeted") else 0  # dark images of class 0: no goal is reached from the start
    with pytest.raises(SatlibError, match=message):
        search(brightness, label=label, **changes)
    if "search" in changes:  # the image-dependent search knows one way alone
        return
    part = (grey(120, 110, 100, 90), torch.full((4,), label))
    with pytest.raises(SatlibError, match=message):
        adversarial_robustness(brightness, *part, **({"steps": 2} | changes))
