"""A training step as one recording: the same numbers as the plain loop, and nothing in it that a CUDA graph forbids."""

import contextlib
import importlib
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import satlib.network
from satlib import device
from satlib.checks import kernel
from satlib.defenses import DEFENSES, Crafted
from satlib.errors import SatlibError
from satlib.models import BottleneckResNet, FCN8s, ResNet
from satlib.parallel import Ranks
from satlib.training import (
    ERM,
    Adversary,
    SharedAdversarialTraining,
    Training,
    new_optimizer,
    train,
    training_step,
)
from satlib.universal import mean_of_signs

pytestmark = pytest.mark.usefixtures("float32")

KINDS = {  # what is trained, and against which defence's perturbations
    "ERM": ({}, None),
    "shared": ({"sigma": 0.7, "eps": 8, "sharedness": 8, "nesterov": True, "weight_decay": 1e-3}, None),
    "standard": ({"sigma": 0.5, "eps": 4, "sharedness": 1}, None),
    "Adam": ({"sigma": 0.5, "eps": 4, "sharedness": 4, "optimizer": "adam", "learning_rate": 0.0003}, None),
    **{name: ({"sigma": 0.5, "eps": 8}, name) for name in DEFENSES},
}
NETWORKS: dict[str, Callable] = {
    "ResNet": lambda: ResNet(depth=8, width=4, classes=4),
    "bottleneck": lambda: BottleneckResNet(layers=(1, 1, 1, 1), group_width=8, expansion=1, stem="full", classes=4),
    "FCN-8s": lambda: FCN8s(classes=3, width=2),
}
CASES = [("ResNet", kind) for kind in KINDS]
CASES += [(network, kind) for network in ("bottleneck", "FCN-8s") for kind in ("shared", "Adam")]


def settings_for(kind, **changes):
    given = {"epochs": 2, "batch_size": 24, "epoch_images": 60, "learning_rate": 0.02}
    return Training(**given | KINDS[kind][0] | changes)


def data_for(network, tiny, scenes):
    return scenes.train if network == "FCN-8s" else tiny.train.first(60)


def adversary_for(kind, data):
    """That of a kind; None for what `train` has by itself."""
    name = KINDS[kind][1]
    fewer = {"DeepFool UAD": {"pool_size": 2, "images_each": 8, "passes": 1}, "fictitious play": {"steps": 3}}
    return DEFENSES[name](data, eps=8.0, **fewer.get(name, {})) if name else None


def built(network):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETWORKS[network]()


def trained_by(network, kind, data, **resumed):
    net, states = built(network), []
    history = train(
        net,
        data,
        settings_for(kind),
        adversary=adversary_for(kind, data),
        after_epoch=lambda state, _: states.append({name: value.clone() for name, value in state.items()}),
        **resumed,
    )
    return history, states


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("network", "kind"), CASES)
def test_a_recorded_step_trains_as_the_plain_one_does(network, kind, tiny, scenes, recorder, monkeypatch):
    """Also in the last, smaller mini-batch, which is a recording of its own."""
    data = data_for(network, tiny, scenes)
    history, states = trained_by(network, kind, data)
    assert len([each for each in recorder if "Recording." in each.__qualname__]) == len(recorder)
    shapes = 1 if network == "FCN-8s" else 2
    attacked_before_an_epoch = 1 if kind in ("fictitious play", "DeepFool UAD") else 0
    assert shapes <= len(recorder) <= shapes + attacked_before_an_epoch
    monkeypatch.undo()
    plain, expected = trained_by(network, kind, data)
    for ours, theirs in zip(states, expected, strict=True):
        assert_same(ours, theirs)
    assert [each["loss"] for each in history] == pytest.approx([each["loss"] for each in plain], rel=1e-4)


@pytest.mark.parametrize("kind", ["shared", "Adam", "universal adversarial training"])
def test_a_recorded_training_goes_on_where_it_stopped(kind, tiny, scenes, recorder):
    data = data_for("ResNet", tiny, scenes)
    history, states = trained_by("ResNet", kind, data)
    _, resumed = trained_by("ResNet", kind, data, state=states[0], history=history[:1])
    assert len(resumed) == 1
    assert_same(resumed[0], states[1])


def test_the_vote_of_signs_is_recorded_once(tiny, recorder, trained):
    few = tiny.val.images[:32], tiny.val.labels[:32]
    options = {"eps": [4.0, 8.0], "steps": 6, "batch_size": 8}
    found = mean_of_signs(trained, *few, generator=torch.Generator().manual_seed(0), **options)
    assert len(recorder) == 1
    device.RECORDERS.pop("cpu")
    torch.testing.assert_close(
        found, mean_of_signs(trained, *few, generator=torch.Generator().manual_seed(0), **options)
    )


def test_what_a_trial_call_changes_goes_back(tiny, recorder):
    """One epoch of one step, with a trial before it: the weights have moved by one step only."""
    few, settings = tiny.train.first(24), settings_for("shared", epochs=1, epoch_images=24)
    nets = built("ResNet"), built("ResNet")
    train(nets[0], few, settings)
    assert len(recorder) == 1
    device.RECORDERS.pop("cpu")
    train(nets[1], few, settings)
    assert_same(nets[0].state_dict(), nets[1].state_dict())
    assert nets[0].stem[1].num_batches_tracked == 1


def test_where_a_step_cannot_be_recorded_it_runs_as_it_is_and_says_why(tiny, monkeypatch):
    tries = []

    def fails(function):
        function()
        tries.append(function)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    few, settings = tiny.train.first(48), settings_for("shared", epoch_images=48)
    nets = built("ResNet"), built("ResNet")
    train(nets[1], few, settings)
    monkeypatch.setitem(device.RECORDERS, "cpu", fails)
    with pytest.warns(UserWarning, match="not recorded as a graph, each (step|iteration) .*: operation not permitted"):
        train(nets[0], few, settings)
    assert_same(nets[0].state_dict(), nets[1].state_dict())


class Counting(Adversary):
    """Computes with what no recording sees."""

    calls = 0

    def loss(self, model, images, labels, settings):
        self.calls += 1
        return ERM().loss(model, images + self.calls, labels, settings)


def test_what_computes_with_more_than_tensors_is_not_recorded(tiny, recorder):
    adversary = Counting()
    by_itself = "each step is launched by itself: "
    with pytest.warns(UserWarning, match=f"{by_itself}Counting does not say that its loss is recordable"):
        train(built("ResNet"), tiny.train.first(48), settings_for("ERM", epoch_images=48), adversary=adversary)
    foreign = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    with pytest.warns(UserWarning, match=f"{by_itself}Sequential is no OwnNetwork"):
        train(foreign, tiny.train.first(48), settings_for("ERM", epoch_images=48))
    assert not recorder and adversary.calls == 4


def test_another_loss_has_to_say_again_that_it_can_be_recorded(tiny, recorder):
    class Own(SharedAdversarialTraining):
        def loss(self, model, images, labels, settings, *drawn):
            return 2 * super().loss(model, images, labels, settings, *drawn)

    class Stated(Own):
        recordable = True
        loss = Own.loss

    class Drawing(SharedAdversarialTraining):
        def draw(self, images, settings, generator):
            return tuple(each / 2 for each in super().draw(images, settings, generator))

    found = {}
    for kind in (Own, Stated, Drawing):
        before = len(recorder)
        said = pytest.warns(UserWarning, match="Own does not say") if kind is Own else contextlib.nullcontext()
        with said:
            train(built("ResNet"), tiny.train.first(24), settings_for("shared", epoch_images=24), adversary=kind())
        found[kind] = len(recorder) - before
    assert found[Own] <= 1 and "Recording." in recorder[-1].__qualname__  # at most its attack's iteration
    assert found[Stated] == found[Drawing] == 1


def test_a_step_is_recorded_anew_where_weights_have_moved(tiny, recorder):
    """As they do when a network visits another device between two epochs."""
    few, settings = tiny.train.first(24), settings_for("shared", epochs=3, epoch_images=24)

    def moved(net):
        def after_epoch(state, history):
            for weight in net.parameters():
                weight.data = weight.data.clone()

        return after_epoch

    nets = built("ResNet"), built("ResNet")
    train(nets[0], few, settings, after_epoch=moved(nets[0]))
    assert len(recorder) == 3
    device.RECORDERS.pop("cpu")
    train(nets[1], few, settings)
    assert_same(nets[0].state_dict(), nets[1].state_dict())


# --------------------------- what a graph forbids, on PyTorch's device "meta", whose tensors have no values to ask for


class Capturing(TorchDispatchMode):
    """Fails where a CUDA graph would: at a copy between the devices; tensors of "meta" refuse to tell their values.

    The fused optimizers, which know no such device, change nothing here.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        fused = "_fused_" in str(func)
        result = None if fused else func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        assert len(devices) < 2 and not (fused and "cpu" in devices), f"{func} between {devices}"
        return result


@pytest.mark.parametrize(("network", "kind"), CASES)
def test_a_step_neither_asks_the_device_nor_copies_to_it(network, kind, tiny, scenes, monkeypatch):
    for module in map(importlib.import_module, ("torch.optim.sgd", "torch.optim.adam")):
        monkeypatch.setattr(module, "_device_dtype_check_for_fused", lambda *_: None)
    monkeypatch.setattr(satlib.network, "autocast", lambda _: contextlib.nullcontext())
    monkeypatch.setitem(device.RECORDERS, "meta", lambda function: pytest.fail("a recording within a recording"))

    settings, data = settings_for(kind), data_for(network, tiny, scenes)
    adversary = adversary_for(kind, data) or (SharedAdversarialTraining() if settings.sigma else ERM())
    if isinstance(adversary, Crafted):
        adversary.pool = torch.zeros(2, *data.images.shape[1:])
    x, y = data.images[:8].float(), data.labels[:8].long()
    drawn = adversary.draw(x, settings, torch.Generator().manual_seed(0))
    x, y, *drawn = (each.to("meta") for each in (x, y, *drawn))
    for name, value in vars(adversary).items():
        if isinstance(value, torch.Tensor):
            setattr(adversary, name, value.to("meta"))
    net = built(network).to("meta").train()
    optimizer = new_optimizer(net, settings, steps=0, recorded=True)
    before = [id(each) for each in optimizer.state.values()]
    step = training_step(net, adversary, settings, optimizer, Ranks())
    weight = torch.ones((), device="meta")
    with device.unrecorded(), Capturing():  # and within `train`, which has checked its arguments
        (loss,) = kernel(lambda: step(x, y, weight, *drawn))()
    assert loss.is_meta and loss.shape == () and before == [id(each) for each in optimizer.state.values()]


@pytest.fixture
def compiler(monkeypatch):
    """Traces as torch.compile does, and runs as it is; returns what was compiled, a graph each time."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(device, "COMPILER", backend)
    device._compiled.cache_clear()
    yield graphs
    device._compiled.cache_clear()
    torch.compiler.reset()


@pytest.mark.parametrize(("network", "kind"), [(network, "shared") for network in NETWORKS] + [("ResNet", "ERM")])
def test_a_compiled_step_trains_as_the_plain_one_does(network, kind, tiny, scenes, recorder, compiler, monkeypatch):
    """The attacked network and the trained one, each traced whole and once; the next network finds them."""
    data = data_for(network, tiny, scenes)
    monkeypatch.setenv("SATLIB_COMPILE", "1")
    _, states = trained_by(network, kind, data)
    assert len(compiler) == (1 if kind == "ERM" else 2)
    trained_by(network, kind, data)
    assert len(compiler) == (1 if kind == "ERM" else 2)
    monkeypatch.undo()
    _, expected = trained_by(network, kind, data)
    for ours, theirs in zip(states, expected, strict=True):
        assert_same(ours, theirs)


def test_a_step_is_compiled_where_that_pays(tiny, recorder, compiler, monkeypatch):
    data, settings = tiny.train.first(48), settings_for("shared", epoch_images=48)
    monkeypatch.setattr(device, "_to_save", {})
    monkeypatch.setattr(device.Recording, "seconds", lambda self: device.COMPILING / device.SAVED / 3.9)
    train(built("ResNet"), data, settings, until=1)
    assert not compiler, "2 steps are left of this call"
    train(built("ResNet"), data, settings_for("ERM", epoch_images=48, epochs=1))
    assert not compiler, "another kind of step"
    train(built("ResNet"), data, settings, until=1)
    assert len(compiler) == 2, "2 more: such steps come again"
    compiler.clear()
    monkeypatch.setenv("SATLIB_COMPILE", "0")
    torch.compiler.reset()
    train(built("ResNet"), data, settings)
    assert not compiler
    monkeypatch.setenv("SATLIB_COMPILE", "yes")
    with pytest.raises(SatlibError, match="SATLIB_COMPILE='yes': expected 1, 0, or unset"):
        train(built("ResNet"), data, settings)


def test_where_a_step_cannot_be_compiled_it_is_recorded_and_says_why(tiny, recorder, monkeypatch):
    def fails(graph, inputs):
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(device, "COMPILER", fails)
    monkeypatch.setenv("SATLIB_COMPILE", "1")
    device._compiled.cache_clear()
    few, settings = tiny.train.first(48), settings_for("shared", epoch_images=48)
    nets = built("ResNet"), built("ResNet")
    with pytest.warns(UserWarning, match="recorded, but not compiled: .*no compiler found"):
        train(nets[0], few, settings)
    assert len(recorder) == 1
    device._compiled.cache_clear()
    monkeypatch.undo()
    train(nets[1], few, settings)
    assert_same(nets[0].state_dict(), nets[1].state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", ["0", "1"])
@pytest.mark.parametrize(("network", "kind"), CASES)
def test_a_step_recorded_by_cuda_trains_as_the_plain_one_does(
    network, kind, compiled, tiny, scenes, monkeypatch, recwarn
):
    monkeypatch.setenv("SATLIB_COMPILE", compiled)
    data, found = data_for(network, tiny, scenes).to("cuda"), {}
    for switch in ("1", "0"):
        monkeypatch.setenv("SATLIB_GRAPHS", switch)
        net = built(network).cuda()
        history = train(net, data, settings_for(kind), adversary=adversary_for(kind, data))
        found[switch] = [each["loss"] for each in history]
    assert found["1"] == pytest.approx(found["0"], rel=1e-2)  # an update fused rounds otherwise
    assert not [each for each in recwarn if "recorded" in str(each.message)]
