"""Generated calls of the public functions with wrong types, shapes, ranges, NaN: a line of error, or a sound result.

SATLIB_EXAMPLES sets how many (default 2,000).
"""

import math
import os
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from satlib import risks
from satlib.attacks import heap_pgd, success_rates, universal_pgd
from satlib.deepfool import deepfool, universal_deepfool
from satlib.errors import SatlibError
from satlib.robustness import adversarial_robustness, universal_robustness
from satlib.training import Training
from satlib.universal import extended_pgd, mean_of_signs, named

pytestmark = pytest.mark.usefixtures("float32")
COUNT, SHAPE, CLASSES = 6, (3, 4, 4), 3


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.Parameter(torch.randn(CLASSES, math.prod(SHAPE), generator=generator))

    def forward(self, x):
        return (x.flatten(1) - 128) @ self.weights.T / 100


def images():
    return torch.empty(COUNT, *SHAPE).uniform_(0, 255, generator=torch.Generator().manual_seed(1)).round()


def labels():
    return torch.arange(COUNT) % CLASSES


def pair():
    return images(), labels()


PGD = {"eps": 8.0, "steps": 2, "batch_size": 3, "beta": 4.0, "gamma": 0.9, "targeted": False, "loss_threshold": None}
PGD |= {"label_smoothing": 0.0, "generator": None, "start": None, "snapshots": 2, "score_images": 4}
PGD |= {"micro_batch": None, "straight_through": True}
HEAP = {"eps": 8.0, "sharedness": 2, "steps": 2, "step_size": 2.0, "targeted": False, "loss_threshold": 1.5}
HEAP |= {"label_smoothing": 0.0, "generator": None, "start": None, "straight_through": True}
MORE = {
    "update": "sign",
    "schedule": "geometric",
    "loss": "cross-entropy",
    "dominant": False,
    "larger": 1,
    "restarts": 1,
}
FOOL = {"eps": 8.0, "batch_size": 2, "fooling_rate": 0.5, "passes": 1, "classes": 3, "steps": 2, "overshoot": 0.02}
EACH = {name: PGD[name] for name in ("steps", "beta", "gamma", "targeted", "loss_threshold", "label_smoothing")}
OURS = {"model": Model(), "images": images(), "labels": labels()}
SETS = {name: pair() for name in ("craft", "choose", "report")}
CALLS = {
    heap_pgd: OURS | HEAP | {"keep_best": False},
    universal_pgd: OURS | PGD,
    extended_pgd: OURS | PGD | MORE,
    mean_of_signs: OURS | {"eps": 8.0, "steps": 2, "batch_size": 3, "relative_step_size": 0.5, "generator": None},
    success_rates: OURS | {"perturbations": torch.zeros(2, *SHAPE), "targeted": False, "batch_size": 4},
    deepfool: {"model": Model(), "images": images(), "classes": 3, "steps": 2, "overshoot": 0.02},
    universal_deepfool: OURS | FOOL | {"generator": None, "progress": None},
    adversarial_robustness: OURS | EACH | {"delta": 0.7, "iterations": 2, "batch_size": 4, "generator": None},
    universal_robustness: {"attack": named("paper", steps=2, batch_size=3), "model": Model()}
    | SETS
    | {"delta": 0.7, "iterations": 2, "search": "k-ary", "targeted": False, "warm_start": False, "progress": None},
    risks.expected_risk: OURS,
    risks.heap_risk: OURS | HEAP,
    risks.universal_risk: OURS | PGD | {"craft": pair()},
    risks.risk_under: OURS | {"perturbations": torch.zeros(3, *SHAPE), "sharedness": 2, "batch_size": 4},
    Training: {"epochs": 1, "batch_size": 4, "learning_rate": 0.1, "momentum": 0.9, "nesterov": False, "sigma": 0.5}
    | {"weight_decay": 0.0, "schedule": "step", "warm_up": 0.2, "epoch_images": 0, "eps": 8.0, "sharedness": 2}
    | {"steps": 2, "relative_step_size": 0.5, "loss_threshold": 1.6, "label_smoothing": 0.1, "optimizer": "sgd"},
}


class Strange:
    """Nothing that anybody asked for."""


NEVER = [math.nan, -math.inf, "nonsense", b"x", "", Strange(), 1j, [math.nan], np.array([]), [], {}, {"a": 1}]
NEVER += [
    torch.tensor(math.nan),
    torch.full((2, 3), math.nan),
    torch.tensor(1j),
    torch.zeros(0),
    np.array(["a"]),
    -7,
    -0.5,
]
NEVER += [images() * math.nan, labels().float() - 0.5, images()[:, :, :2] - 300, (images(), labels()), -1e30]
SOMETIMES = [
    None,
    True,
    False,
    0,
    1,
    2,
    3,
    2.5,
    0.5,
    1e-9,
    255,
    256,
    math.inf,
    np.int64(2),
    np.float32(3),
    lambda *a: None,
]
SOMETIMES += [images(), images() / 255, images().double(), images().tolist(), labels(), labels().tolist(), labels() + 9]
SOMETIMES += [torch.zeros(COUNT, *SHAPE), torch.Generator(), torch.tensor(4.0), [4.0, 8.0], [1], pair(), iter([1])]
UNCHECKED = {(deepfool, "images")}  # pixels of any size
FITS = {"images", "craft", "choose", "report", "perturbations", "start"}  # what some of NEVER may be


def sound(result, arguments):
    """Whether a result can be believed: finite, and within eps."""
    tensors = [result] if isinstance(result, torch.Tensor) else list(result) if isinstance(result, tuple) else []
    for tensor in tensors:
        if not bool(tensor.isfinite().all()):
            return False
    if tensors and "eps" in arguments and "sharedness" not in arguments:
        return bool(tensors[0].abs().max() <= float(np.max(np.asarray(arguments["eps"], dtype=float))) + 1e-4)
    return (
        all(math.isfinite(value) for value in vars(result).values() if isinstance(value, float))
        if not tensors
        else True
    )


@settings(
    max_examples=int(os.environ.get("SATLIB_EXAMPLES", "2000")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_bad_call_is_one_line_of_error(data):
    function = data.draw(st.sampled_from(list(CALLS)))
    arguments = dict(CALLS[function])
    names = data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True))
    never = False
    for name in names:
        pool = [(value, True) for value in NEVER] + [(value, False) for value in SOMETIMES]
        index = data.draw(st.integers(0, len(pool) - 1))
        arguments[name], bad = pool[index]
        never |= bad and name not in FITS and (function, name) not in UNCHECKED
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = function(**arguments)
    except SatlibError as error:
        assert "\n" not in str(error).strip()
        return
    assert not never, f"{function.__name__} took {[(name, arguments[name]) for name in names]}"
    assert sound(result, arguments), f"{function.__name__}: {result} of {[(name, arguments[name]) for name in names]}"
