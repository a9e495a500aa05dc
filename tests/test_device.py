"""Number formats, and recorded iterations: how they are chosen, and that the attacks keep their promises in them.

Of recordings: what is copied in, kept apart and given back. A stand-in records where there is no CUDA.
"""

import contextvars
import copy
import threading
import types
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from satlib import attacks, device
from satlib.attacks import attack_loss, attackable, heap_pgd, perturb, success_rates, universal_pgd
from satlib.device import autocast, exact, fastest_dtype
from satlib.errors import SatlibError
from satlib.models import BottleneckResNet, ResNet
from satlib.training import Training, train

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture
def choose(monkeypatch) -> Iterator:
    """choose(value): sets SATLIB_PRECISION (None: unset) and forgets what was measured."""

    def set_to(value: str | None) -> None:
        monkeypatch.delenv("SATLIB_PRECISION", raising=False)
        if value is not None:
            monkeypatch.setenv("SATLIB_PRECISION", value)
        fastest_dtype.cache_clear()

    yield set_to
    fastest_dtype.cache_clear()


@pytest.mark.parametrize(("value", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_environment_variable_overrides_the_measurement(choose, value, dtype):
    choose(value)
    for kind in ("cpu", "cuda", "mps"):
        assert fastest_dtype(kind) is dtype


@pytest.mark.parametrize("value", ["float16", "BFLOAT16", "fastest"])
def test_unknown_format_is_an_error(choose, value):
    choose(value)
    with pytest.raises(SatlibError, match=rf"SATLIB_PRECISION='{value}': expected one of float32, bfloat16, or unset"):
        fastest_dtype("cpu")


def test_choice_is_made_once(choose, monkeypatch):
    choose("bfloat16")
    assert fastest_dtype("cpu") is torch.bfloat16
    monkeypatch.setenv("SATLIB_PRECISION", "float32")
    assert fastest_dtype("cpu") is torch.bfloat16
    fastest_dtype.cache_clear()
    assert fastest_dtype("cpu") is torch.float32


@pytest.mark.parametrize("gradients", [True, False])
def test_measurement_runs_and_decides_for_one_of_the_two(choose, gradients):
    """Scoring under `torch.no_grad` may be what needs the format first."""
    choose(None)
    with torch.set_grad_enabled(gradients):
        assert fastest_dtype("cpu") in (torch.float32, torch.bfloat16)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="float32 without a measurement there")
@pytest.mark.parametrize(
    ("seconds", "dtype"), [(0.5, torch.bfloat16), (0.9, torch.float32), (1.0, torch.float32), (3.0, torch.float32)]
)
def test_bfloat16_only_where_it_is_clearly_faster(choose, monkeypatch, seconds, dtype):
    """With a clock that only the measured passes move on: 1 s in float32, `seconds` in bfloat16."""
    clock = [0.0]

    def passes(*tensors):
        clock[0] += seconds if torch.is_autocast_enabled("cpu") else 1.0

    choose(None)
    monkeypatch.setattr(torch.autograd, "grad", passes)
    monkeypatch.setattr(device.time, "thread_time", lambda: clock[0])
    assert fastest_dtype("cpu") is dtype


def test_devices_that_are_not_measured_stay_in_float32(choose):
    choose(None)
    assert fastest_dtype("meta") is torch.float32


@pytest.mark.parametrize(("value", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_autocast_runs_products_in_the_chosen_format(choose, value, dtype):
    choose(value)
    x = torch.ones(2, 2)
    with autocast(x.device):
        assert (x @ x).dtype is dtype
    assert (x @ x).dtype is torch.float32


def test_exact_overlaps_in_threads_and_overrules_what_the_user_allowed():
    def switches():
        precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        return precision, tf32, torch.backends.mkldnn.matmul.fp32_precision

    before = switches()
    torch.set_float32_matmul_precision("medium")
    allowed = switches()
    first, second = exact(), contextvars.copy_context()
    other = exact()
    first.__enter__()
    second.run(other.__enter__)
    first.__exit__(None, None, None)
    assert switches() == ("highest", False, "ieee")
    second.run(other.__exit__, None, None, None)
    assert switches() == allowed != before
    torch.set_float32_matmul_precision(before[0])


def test_exact_works_where_the_newer_switches_are_set():
    conv, matmul = torch.backends.cudnn.conv, torch.backends.mkldnn.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    conv.fp32_precision, matmul.fp32_precision = "ieee", "bf16"  # the older switches cannot tell the former
    try:
        with exact():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "bf16"
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


def test_attacks_in_bfloat16_succeed_as_in_float32(choose, trained, tiny):
    """Perturbations stay float32 and within the bound, exactly; scored alike, they fool about as many."""
    images, labels, eps = tiny.test.images.float(), tiny.test.labels, 12.3
    found = {}
    for value in ("float32", "bfloat16"):
        choose(value)
        seed = torch.Generator().manual_seed(0)
        heap = heap_pgd(trained, images, labels, eps=eps, sharedness=8, steps=6, step_size=5.0, generator=seed)
        universal = universal_pgd(trained, tiny.val.images, tiny.val.labels, eps=[eps, 25.0], steps=30, generator=seed)
        assert heap.dtype == universal.dtype == torch.float32
        assert heap.abs().max() == torch.tensor(eps)
        assert torch.equal(universal.abs().amax((1, 2, 3)), torch.tensor([eps, 25.0]))
        found[value] = heap, universal
    assert not torch.equal(found["float32"][0], found["bfloat16"][0])  # the format did reach the model
    choose("float32")
    rates = {}
    for value, (heap, universal) in found.items():
        heap_rate = (trained(perturb(images, heap, 8)).argmax(1) != labels).float().mean()
        rates[value] = torch.stack([heap_rate, *success_rates(trained, images, labels, universal)])
    assert (rates["float32"] - rates["bfloat16"]).abs().max() < 0.1
    assert rates["float32"].min() > 0.3


def test_signs_of_gradients_agree_where_they_matter(choose, trained, tiny):
    """PGD steps by signs. Weighed by how much a pixel matters, hardly any sign depends on the format."""
    images, labels, gradients = tiny.test.images.float(), tiny.test.labels, {}
    for value in ("float32", "bfloat16"):
        choose(value)
        with attackable(trained) as net:
            x = images.clone().requires_grad_()
            with autocast(x.device):
                losses = attack_loss(net(x), labels)
            (gradients[value],) = torch.autograd.grad(losses.sum(), x)
    exact, rough = gradients["float32"], gradients["bfloat16"]
    agree = exact.sign() == rough.sign()
    weight = exact.abs() / exact.abs().sum((1, 2, 3), keepdim=True)
    assert not torch.equal(exact, rough) and agree.float().mean() > 0.9
    assert (weight * agree).sum((1, 2, 3)).mean() > 0.98
    large = exact.abs() > exact.abs().flatten(1).median(1).values.view(-1, 1, 1, 1)
    assert agree[large].float().mean() > 0.97


def test_eps_zero_changes_no_prediction_in_bfloat16(choose, trained, tiny):
    choose("bfloat16")
    images, labels = tiny.test.images.float(), tiny.test.labels
    xi = heap_pgd(trained, images, labels, eps=0.0, sharedness=1, steps=1, step_size=1.0)
    assert torch.equal(perturb(images, xi, 1), images)
    assert success_rates(trained, images, labels, xi[:1]) == success_rates(
        trained, images, labels, torch.zeros(1, 3, 8, 8)
    )


def test_training_in_bfloat16_learns(choose, resnet, tiny):
    """The weights stay float32; the loss falls as it does in float32."""
    settings = Training(epochs=2, batch_size=64, learning_rate=0.05, milestones=(), epoch_images=256)
    losses = {}
    for value in ("float32", "bfloat16"):
        choose(value)
        model = resnet()
        losses[value] = [entry["loss"] for entry in train(model, tiny.train, settings)]
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)
    assert losses["bfloat16"][1] < losses["bfloat16"][0]


# ------------------------------------------------------------------------------------------------- recordings


@pytest.fixture(autouse=True)
def forgotten():
    device._recordings.clear()
    yield
    device._recordings.clear()


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


def test_one_recording_serves_a_network_whose_weights_change(resnet, tiny, recorder, monkeypatch):
    def attacked_in_turn():
        model, found = resnet(), []
        for _ in range(3):
            found.append(attack(model, tiny))
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(1.1)
        return found

    recorded = attacked_in_turn()
    assert len(recorder) == 1 and not torch.equal(recorded[0], recorded[1])
    monkeypatch.undo()
    for ours, theirs in zip(recorded, attacked_in_turn(), strict=True):
        assert torch.equal(ours, theirs)


def test_another_shape_setting_or_network_is_another_recording(trained, resnet, tiny, recorder):
    for changes in ({}, {}, {"sharedness": 8}, {"label_smoothing": 0.1}, {"eps": 3.0}, {"steps": 2, "step_size": 1.0}):
        attack(trained, tiny, **changes)
    assert len(recorder) == 3  # eps and steps are contents
    attack(resnet(1), tiny)
    assert len(recorder) == 3, "the same network with other weights"
    attack(ResNet(depth=14, width=4, classes=4), tiny)
    assert len(recorder) == 4


class Scaled(nn.Module):
    """A linear classifier of scaled images; the scale is kept in one of the ways in which networks keep such things."""

    def __init__(self, kept: str, scale: float):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3 * 8 * 8, 4)
        if kept == "buffer":
            self.register_buffer("scale", torch.tensor(scale), persistent=False)
        elif kept == "function":
            self.scale = lambda: scale
        else:
            self.scale = {"number": scale, "tensor": torch.tensor(scale), "dictionary": {"of": [scale]}}[kept]

    def forward(self, x):
        scale = (
            self.scale()
            if callable(self.scale)
            else self.scale["of"][0]
            if isinstance(self.scale, dict)
            else self.scale
        )
        return self.head((x.flatten(1) - 128) * scale)


@pytest.mark.parametrize("kept", ["number", "dictionary", "function", "buffer", "tensor"])
def test_a_recording_serves_no_network_that_computes_something_else(tiny, recorder, monkeypatch, kept):
    """Whatever tells two networks apart: tensors are copied in, anything else asks for a recording of its own."""
    # The second scale drives the losses beyond the threshold: images without a gradient keep the random start.
    networks = [Scaled(kept, scale) for scale in (0.01, -1.0, 0.01)]
    recorded = [attack(net, tiny, loss_threshold=1.6) for net in networks]
    assert len(recorder) == {"function": 3, "buffer": 1, "tensor": 1}.get(kept, 2)
    monkeypatch.undo()
    for net, found in zip(networks, recorded, strict=True):
        assert torch.equal(found, attack(net, tiny, loss_threshold=1.6))
    assert not torch.equal(recorded[0], recorded[1]) and torch.equal(recorded[0], recorded[2])


def product(net, x):
    return (net(x),)


def test_prepared_steps_in_use_at_once_keep_their_own_weights(recorder):
    networks, x = [nn.Linear(3, 3) for _ in range(2)], torch.ones(2, 3)
    steps = [device.prepared(product, net, x) for net in networks]
    for _ in range(2):
        for net, step in zip(networks, steps, strict=True):
            assert torch.equal(step(x)[0], net(x))
    assert len(recorder) == 1


def test_threads_with_networks_of_their_own_do_not_disturb_each_other(recorder):
    x, wrong = torch.ones(2, 3), []

    def use(seed):
        net = nn.Linear(3, 3)
        nn.init.constant_(net.weight, seed)
        for _ in range(100):
            if not torch.equal(device.prepared(product, net, x)(x)[0], net(x)):
                wrong.append(seed)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(recorder) == 1


class Rescaled(nn.Module):
    """Scales by an attribute of its class."""

    scale = 1.0

    def forward(self, x):
        return x * self.scale


def patched(scale):
    net = nn.Identity()
    net.forward = types.MethodType(lambda self, x: x * scale, net)
    return net


def test_methods_closures_and_attributes_of_classes_are_parts_of_a_network(recorder, monkeypatch):
    x, scale = torch.ones(2, 3), [2.0]

    def scaled(net):
        return device.prepared(product, net, x)(x)[0][0, 0].item()

    assert [scaled(patched(2.0)), scaled(patched(3.0))] == [2, 3]
    closed = patched(scale)
    closed.forward = lambda x: x * scale[0]
    assert scaled(closed) == 2
    scale[0] = 4.0
    assert scaled(closed) == 4
    factor = torch.tensor(2.0)
    closed.forward = lambda x: x * factor
    assert scaled(closed) == 2
    kept, factor = factor, torch.tensor(5.0)
    assert scaled(closed) == 5 and kept == 2  # the caller's own tensors are not written to
    assert scaled(Rescaled()) == 1
    monkeypatch.setattr(Rescaled, "scale", 7.0)
    assert scaled(Rescaled()) == 7 and len(recorder) == 8


def test_a_function_that_closes_over_its_network_or_itself_is_no_endless_way(recorder):
    net = nn.Linear(3, 3)

    def forward(x, again=False):
        return nn.functional.linear(x, net.weight) if again else forward(x, True)

    net.forward = forward
    x = torch.ones(2, 3)
    for _ in range(2):
        assert torch.equal(device.prepared(product, net, x)(x)[0], net(x))
        with torch.no_grad():
            net.weight.mul_(2)
    assert len(recorder) == 1


def test_a_plain_function_is_not_recorded(trained, tiny, recorder):
    found = attack(lambda x: trained(x), tiny)
    assert not recorder and torch.equal(found, attack(lambda x: trained(x), tiny))


def test_a_hook_a_class_and_a_shared_weight_are_parts_of_a_network(tiny, recorder):
    def network():
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, 4), nn.Linear(4, 4))

    hooked, tied, other = network(), network(), network()
    hooked[1].register_forward_hook(lambda module, inputs, output: -output)
    tied[3].weight = tied[2].weight
    other[2].__class__ = type("Linear", (nn.Linear,), {"forward": lambda self, x: -nn.Linear.forward(self, x)})
    for index, net in enumerate((network(), hooked, tied, other), start=1):
        for _ in range(2):
            attack(net, tiny)
        assert len(recorder) == index


def test_networks_whose_layers_are_classes_of_their_own_are_recorded(recorder, tiny):
    """Which pickle itself cannot find: those of `BottleneckResNet`."""
    net = BottleneckResNet(layers=(1, 1, 1, 1), group_width=8, expansion=1, stem="full", classes=4)
    for _ in range(2):
        attack(net, tiny)  # on a folded copy, another one each time
    assert len(recorder) == 1


def test_a_network_with_something_that_cannot_be_compared_is_not_recorded(trained, tiny, recorder):
    net = copy.deepcopy(trained)
    net.lock, net.folded = threading.Lock(), lambda: net  # which knows no copy, either
    with pytest.warns(
        UserWarning, match="not recorded as a graph, each iteration is launched by itself: cannot pickle"
    ):
        found = attack(net, tiny)
    assert not recorder
    del net.lock
    assert torch.equal(found, attack(net, tiny))


def test_the_number_format_is_part_of_a_recording(trained, tiny, recorder, choose, monkeypatch):
    choose("bfloat16")
    fast = attack(trained, tiny)
    with exact():
        recorded = attack(trained, tiny)
    assert len(recorder) == 2 and not torch.equal(fast, recorded)
    monkeypatch.delitem(device.RECORDERS, "cpu")
    with exact():
        assert torch.equal(recorded, attack(trained, tiny))


def test_outputs_are_not_overwritten_by_the_next_call(trained, tiny, recorder):
    first = attack(trained, tiny)
    kept = first.clone()
    attack(trained, tiny, eps=3.0)
    assert torch.equal(first, kept)


def test_the_least_recently_used_recording_goes_first(trained, tiny, recorder, monkeypatch):
    monkeypatch.setattr(device, "KEPT", 2)
    for sharedness in (1, 2, 1, 4, 1):
        attack(trained, tiny, sharedness=sharedness)
    assert len(recorder) == 3 and len(device._recordings) == 2
    attack(trained, tiny, sharedness=2)
    assert len(recorder) == 4


def test_where_recording_fails_the_attack_runs_all_the_same_and_says_so_once(trained, tiny, monkeypatch):
    expected, tries = attack(trained, tiny), []

    def fails(function):
        tries.append(function)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setitem(device.RECORDERS, "cpu", fails)
    with pytest.warns(UserWarning, match="not recorded as a graph.* operation not permitted when stream is capturing"):
        assert torch.equal(attack(trained, tiny), expected)
    assert torch.equal(attack(trained, tiny), expected)
    assert len(tries) == 1


def test_without_cuda_nothing_is_recorded(trained, tiny):
    attack(trained, tiny)
    assert not device._recordings


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
    assert any(recording is not None for recording in device._recordings.values())
    assert (found["1"] - found["0"]).abs().gt(1e-3).float().mean() < 0.01  # sums in another order round otherwise
    assert attacks.success_rates(model, test.images, y, found["1"][-1:]) > 0.4
