"""Recorded iterations: what is copied in, kept apart and given back. A stand-in records where there is no CUDA."""

import copy

import pytest
import torch

from satlib import attacks, graphs
from satlib.attacks import heap_pgd, universal_pgd
from satlib.models import ResNet
from satlib.training import Training, train

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(autouse=True)
def forgotten():
    graphs._recordings.clear()
    yield
    graphs._recordings.clear()


@pytest.fixture
def recorder(monkeypatch):
    """Records on any device as a graph would: the outputs are always the same memory. Returns the calls made."""
    made = []

    def record(function):
        outputs = function()
        made.append(function)

        def replay():
            for output, new in zip(outputs, function(), strict=True):
                output.copy_(new)

        return replay, outputs

    prepared = graphs.prepared
    monkeypatch.setattr(graphs, "prepared", lambda *a, **k: prepared(*a, record=record, **k))
    return made


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def attack(model, tiny, **changes):
    x, y = tiny.test.images[:24].float(), tiny.test.labels[:24]
    options = {"eps": 12.0, "sharedness": 4, "steps": 6, "step_size": [5.0, 4.0, 3.0, 2.0, 1.0, 1.0]} | changes
    return heap_pgd(model, x, y, generator=seeded(), **options)


@pytest.mark.parametrize("changes", [{}, {"keep_best": True}, {"targeted": True}, {"loss_threshold": 1.6}])
def test_a_recorded_heap_attack_is_the_same_attack(trained, tiny, recorder, monkeypatch, changes):
    recorded = attack(trained, tiny, **changes)
    assert len(recorder) == 1
    monkeypatch.undo()
    assert torch.equal(recorded, attack(trained, tiny, **changes))


def test_a_recorded_universal_attack_is_the_same_attack(trained, tiny, recorder, monkeypatch):
    def found():
        val = (tiny.val.images, tiny.val.labels)
        return universal_pgd(trained, *val, eps=[8.0, 20.0], steps=30, batch_size=16, generator=seeded())

    recorded = found()
    assert len(recorder) == 1
    monkeypatch.undo()
    assert torch.equal(recorded, found())


def test_one_recording_serves_a_training_whose_weights_change(resnet, tiny, recorder, monkeypatch):
    settings = Training(epochs=2, batch_size=32, epoch_images=128, learning_rate=0.05, sigma=0.7, eps=8, sharedness=8)
    one = resnet()
    train(one, tiny.train, settings)
    assert len(recorder) == 1
    monkeypatch.undo()
    other = resnet()
    train(other, tiny.train, settings)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_another_shape_setting_or_network_is_another_recording(trained, resnet, tiny, recorder):
    for changes in ({}, {}, {"sharedness": 8}, {"label_smoothing": 0.1}, {"eps": 3.0}, {"steps": 2, "step_size": 1.0}):
        attack(trained, tiny, **changes)
    assert len(recorder) == 3  # eps and steps are contents
    attack(resnet(1), tiny)
    assert len(recorder) == 3, "the same network with other weights"
    attack(ResNet(depth=14, width=4, classes=4), tiny)
    assert len(recorder) == 4


def test_outputs_are_not_overwritten_by_the_next_call(trained, tiny, recorder):
    first = attack(trained, tiny)
    kept = first.clone()
    attack(trained, tiny, eps=3.0)
    assert torch.equal(first, kept)


def test_the_least_recently_used_recording_goes_first(trained, tiny, recorder, monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    for sharedness in (1, 2, 1, 4, 1):
        attack(trained, tiny, sharedness=sharedness)
    assert len(recorder) == 3 and len(graphs._recordings) == 2
    attack(trained, tiny, sharedness=2)
    assert len(recorder) == 4


def test_where_recording_fails_the_attack_runs_all_the_same_and_says_so_once(trained, tiny, monkeypatch):
    expected, tries = attack(trained, tiny), []

    def fails(function):
        tries.append(function)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    prepared = graphs.prepared
    monkeypatch.setattr(graphs, "prepared", lambda *a, **k: prepared(*a, record=fails, **k))
    with pytest.warns(UserWarning, match="not recorded as a graph.* operation not permitted when stream is capturing"):
        assert torch.equal(attack(trained, tiny), expected)
    assert torch.equal(attack(trained, tiny), expected)
    assert len(tries) == 1


def test_without_cuda_nothing_is_recorded(trained, tiny):
    attack(trained, tiny)
    assert not graphs._recordings


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_is_the_same_attack(trained, tiny, monkeypatch):
    model, test = copy.deepcopy(trained).cuda(), tiny.test.to("cuda")
    x, y = test.images.float(), test.labels
    found = {}
    for switch in ("1", "0"):
        monkeypatch.setenv("SATLIB_GRAPHS", switch)
        options = {"eps": 12.0, "steps": 8, "step_size": 3.0, "generator": seeded()}
        heaps = heap_pgd(model, x, y, sharedness=8, **options)
        one = universal_pgd(model, test.images, y, eps=[8.0, 16.0], steps=40, batch_size=16, generator=seeded())
        found[switch] = torch.cat([heaps, one])
    assert any(recording is not None for recording in graphs._recordings.values())
    assert (found["1"] - found["0"]).abs().gt(1e-3).float().mean() < 0.01  # sums in another order round otherwise
    assert attacks.success_rates(model, test.images, y, found["1"][-1:]) > 0.4
