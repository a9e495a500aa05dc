"""Whatever is wrong is one SatlibError of one line that names it, before the model computes anything."""

import functools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from satlib import evaluation_checks as audit
from satlib.attacks import heap_pgd, perturb, success_rates, universal_pgd
from satlib.deepfool import universal_deepfool
from satlib.defenses import DeepFoolUAD, FictitiousPlay, UniversalAdversarialTraining
from satlib.errors import SatlibError
from satlib.risks import expected_risk, heap_risk, risk_under, universal_risk
from satlib.robustness import adversarial_robustness, universal_robustness
from satlib.study import settings as settings_module
from satlib.training import Training, train
from satlib.universal import extended_pgd, mean_of_signs

pytestmark = pytest.mark.usefixtures("float32")
SHAPE = (3, 8, 8)


class Counted(nn.Module):
    """Logits of four classes, and how often they were asked for."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(4, math.prod(SHAPE), generator=torch.Generator().manual_seed(0)))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return (x.flatten(1) - 128) @ self.weights.T / 100


def images(count=8, shape=SHAPE):
    return torch.empty(count, *shape).uniform_(0, 255, generator=torch.Generator().manual_seed(1))


def labels(count=8):
    return torch.arange(count) % 4


def heap(model, x, y, **changes):
    return heap_pgd(model, x, y, **{"eps": 8.0, "sharedness": 2, "steps": 2, "step_size": 2.0} | changes)


def universal(model, x, y, **changes):
    return universal_pgd(model, x, y, **{"eps": 8.0, "steps": 2, "batch_size": 4} | changes)


def extended(model, x, y, **changes):
    return extended_pgd(model, x, y, **{"eps": 8.0, "steps": 2, "batch_size": 4} | changes)


def search(model, x, y, **changes):
    given_ = {"craft": (x, y), "choose": (x, y), "report": (x, y), "iterations": 2}
    given_ |= {name: changes.pop(name) for name in ("delta", "iterations", "search") if name in changes}
    attack = functools.partial(extended_pgd, **{"steps": 2, "batch_size": 4} | changes)
    return universal_robustness(attack, model, **given_)


def own_search(model, x, y, **changes):
    return adversarial_robustness(model, x, y, **{"steps": 2, "iterations": 2} | changes)


def shared_risk(model, x, y, **changes):
    return heap_risk(model, x, y, **{"eps": 8.0, "sharedness": 2, "steps": 2, "step_size": 2.0} | changes)


def one_risk(model, x, y, **changes):
    return universal_risk(model, x, y, craft=(x, y), **{"eps": 8.0, "steps": 2, "batch_size": 4} | changes)


def given_risk(model, x, y, *, sharedness=2):
    return risk_under(model, x, y, torch.zeros(4, *SHAPE), sharedness)


def added(model, x, y, *, sharedness=2):
    return perturb(x, torch.zeros(4, *SHAPE), sharedness)


def rates(model, x, y):
    return success_rates(model, x, y, torch.zeros(1, *SHAPE))


def deepfool(model, x, y, **changes):
    return universal_deepfool(model, x, y, **{"eps": 8.0, "passes": 1, "classes": 4, "steps": 2} | changes)


def training(model, x, y, **changes):
    return Training(**{"epochs": 1, "batch_size": 8, "sharedness": 2, "sigma": 0.5, "eps": 8.0} | changes)


class Held:
    """What defences take as data, as far as they look at it before they start."""

    images, labels, device = images(), labels(), torch.device("cpu")

    def __len__(self):
        return len(self.images)


def pooled(model, x, y, **changes):
    return DeepFoolUAD(Held(), **{"eps": 8.0} | changes)


def played(model, x, y, **changes):
    return FictitiousPlay(Held(), **{"eps": 8.0} | changes)


def moved(model, x, y, **changes):
    return UniversalAdversarialTraining((1, *SHAPE), **{"eps": 8.0} | changes)


def voted(model, x, y, **changes):
    return mean_of_signs(model, x, y, **{"eps": 8.0, "steps": 2, "batch_size": 4} | changes)


NOT_FINITE = [math.nan, math.inf, -math.inf]
EPS = st.sampled_from(NOT_FINITE) | st.floats(max_value=-1e-6) | st.floats(min_value=255.001)
NOT_POSITIVE = st.integers(max_value=0)
SHARE = st.sampled_from([*NOT_FINITE, 0.0, 1.0]) | st.floats(max_value=0) | st.floats(min_value=1)
BAD = {
    "eps": (EPS, [heap, universal, extended, shared_risk, one_risk, deepfool, training, pooled, played, voted]),
    "steps": (NOT_POSITIVE, [heap, universal, search, own_search, shared_risk, one_risk, training, deepfool, voted]),
    "sharedness": (NOT_POSITIVE | st.integers(min_value=9), [heap, shared_risk, given_risk, added, training]),
    "batch_size": (NOT_POSITIVE, [universal, search, one_risk, training, deepfool, voted]),
    "delta": (SHARE, [search, own_search]),
    "iterations": (NOT_POSITIVE, [search, own_search]),
    "restarts": (NOT_POSITIVE, [extended, search]),
    "larger": (NOT_POSITIVE, [extended, search]),
    "beta": (st.sampled_from([*NOT_FINITE, 0.0]) | st.floats(max_value=0), [universal, search, own_search]),
    "gamma": (st.sampled_from([*NOT_FINITE, 0.0]) | st.floats(max_value=0), [universal, search, own_search]),
    "loss_threshold": (st.sampled_from([math.nan, 0.0]) | st.floats(max_value=0), [heap, universal, search, training]),
    "sigma": (st.sampled_from(NOT_FINITE) | st.floats(max_value=-1e-6) | st.floats(min_value=1.001), [training]),
    "learning_rate": (st.sampled_from([*NOT_FINITE, 0.0]) | st.floats(max_value=0), [training]),
    "update": (st.text().filter(lambda s: s not in ("sign", "momentum", "adam")), [extended, search]),
    "search": (st.text().filter(lambda s: s not in ("binary", "k-ary")), [search]),
    "pool_size": (NOT_POSITIVE, [pooled]),
    "share": (st.sampled_from([math.nan, -0.1, 1.1]), [pooled]),
    "fooling_rate": (st.sampled_from([math.nan, 0.0, 1.1, -1.0]), [deepfool]),
}
PAIRS = [(name, function) for name, (_, functions) in BAD.items() for function in functions]


@pytest.mark.parametrize(
    ("name", "function"), PAIRS, ids=lambda value: value if isinstance(value, str) else value.__name__
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_bad_number_is_named_before_the_model_is_asked(name, function, data):
    model, value = Counted(), data.draw(BAD[name][0])
    with pytest.raises(SatlibError) as error:
        function(model, images(), labels(), **{name: value})
    assert name in str(error.value) and "\n" not in str(error.value).rstrip("\n")
    assert model.calls == 0


@pytest.mark.parametrize(
    "function", [heap, universal, search, own_search, shared_risk, one_risk, given_risk, expected_risk]
)
@pytest.mark.parametrize(
    ("x", "y"),
    [
        (images()[:0], labels()[:0]),
        (images()[0], labels()),
        (images(), labels()[:3]),
        (images(), labels().float()),
        (images(), labels()[:, None]),
        (images(), labels() + 7),
        (images(), labels() - 1),
    ],
    ids=["nothing", "one image", "too few labels", "float labels", "a column of labels", "unknown class", "class -1"],
)
def test_images_and_labels_that_do_not_fit_are_an_error(function, x, y):
    with pytest.raises(SatlibError) as error:
        function(Counted(), x, y)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("x", "y"), [(images()[:0], labels()[:0]), (images(), labels()[:3]), (images()[0], labels())])
def test_success_rates_need_a_label_for_each_image(x, y):
    with pytest.raises(SatlibError, match="expected"):
        rates(Counted(), x, y)


@pytest.mark.parametrize("function", [heap, universal, search, own_search, shared_risk, one_risk, expected_risk])
@pytest.mark.parametrize("value", [math.nan, math.inf, -2.1, 300.0])
def test_images_that_are_not_in_pixel_units_are_an_error(function, value):
    x, model = images(), Counted()
    x[-1, 0, 0, 0] = value
    with pytest.raises(SatlibError, match="expected pixel units, 0 to 255; normalise inside the model"):
        function(model, x, labels())
    assert model.calls == 0


class Answers(nn.Module):
    """A model that returns what it is told to."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.answer(x * self.scale)


@pytest.mark.parametrize("function", [heap, universal, search, own_search])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Answers(lambda x: x.flatten(1)[:, :4] * math.nan), "returns NaN or infinite logits"),
        (Answers(lambda x: x.flatten(1)[:, :4] * math.inf), "returns NaN or infinite logits"),
        (Answers(lambda x: (x.flatten(1)[:, :4] / 255).softmax(1)), "returns probabilities: expected logits"),
        (
            Answers(lambda x: x.flatten(1)[:, :4].argmax(1)),
            r"returns \(4,\) for a few images: expected logits of shape",
        ),
        (Answers(lambda x: x), r"returns \(4, 3, 8, 8\) for a few images"),
        (nn.Sequential(nn.Flatten(), nn.Linear(5, 4)), "the model fails on 3x8x8 images: RuntimeError: mat1 and mat2"),
    ],
    ids=["nan", "inf", "probabilities", "decisions", "pictures", "other size"],
)
def test_a_model_that_is_no_classifier_of_these_images_is_an_error(function, model, message):
    with pytest.raises(SatlibError, match=message) as error:
        function(model, images(), labels())
    assert "\n" not in str(error.value)


def test_training_stops_where_the_loss_is_not_finite(tiny):
    model = Answers(lambda x: x.flatten(1)[:, :4])
    with pytest.raises(SatlibError, match=r"the loss is (nan|inf) in epoch 1"):
        train(model, tiny.train, Training(epochs=1, batch_size=32, sigma=0.0, learning_rate=1e38))
    with pytest.raises(SatlibError, match="returns NaN or infinite logits"):
        train(Answers(lambda x: x.flatten(1)[:, :4] * math.nan), tiny.train, Training(epochs=1, batch_size=32))


def test_an_audit_of_a_broken_model_stops_at_once():
    options = {"eps": 8.0, "epsilons": [8.0], "attack": {"steps": 2, "batch_size": 2}, "image_steps": 2}
    with pytest.raises(SatlibError, match="finite"):
        audit.measure(
            Answers(lambda x: x.flatten(1)[:, :4] * math.nan),
            craft=(images(), labels()),
            test=(images(), labels()),
            **options,
        )


# Profiles: whatever a file holds, it is read or refused by name.

YAML = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The file of a profile in a project of its own, and what `quick` has in it."""
    text = settings_module.profile_path("quick").read_text()
    (tmp_path / "profiles").mkdir()
    monkeypatch.setenv("SATLIB_HOME", str(tmp_path))
    return tmp_path / "profiles" / "quick.yaml", text


def reads(path):
    """Read the profile as a run does; True where it was accepted."""
    settings_module._loaded.cache_clear()  # two texts may be written within one tick of the clock
    try:
        for section in settings_module.SECTIONS:
            settings_module.settings(section, "quick")
    except SatlibError as error:
        assert path.name in str(error) or "profile 'quick', section " in str(error)
        return False
    return True


def test_a_sound_profile_is_read(project):
    path, text = project
    path.write_text(text)
    assert reads(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mangled_profile_is_read_or_refused_by_name(project, data):
    path, text = project
    lines = text.splitlines()
    at = data.draw(st.integers(0, len(lines) - 1))
    change = data.draw(st.sampled_from(["drop", "double", "indent", "type", "value"]))
    if change == "drop":
        del lines[at]
    elif change == "double":
        lines.insert(at, lines[at])
    elif change == "indent":
        lines[at] = " " + lines[at]
    elif change == "type":
        lines[at] = lines[at].replace(":", ": [", 1)
    else:
        lines[at] = lines[at].split(":")[0] + ": " + repr(data.draw(YAML))
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    reads(path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_bytes_that_are_no_profile_are_refused(project, content):
    path, _ = project
    path.write_bytes(content)
    assert not reads(path)
