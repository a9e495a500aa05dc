"""Networks as people have them: each is attacked by the calls of the README, and is afterwards as it was before."""

import copy
import threading
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import segmentation

from satlib import network, risks
from satlib.attacks import heap_pgd, success_rates, universal_pgd
from satlib.checks import check_overlap
from satlib.data import ImageSet
from satlib.defenses import DEFENSES
from satlib.device import autocast, fastest_dtype
from satlib.errors import SatlibError
from satlib.models import UnitInputs
from satlib.network import attackable, evaluated, logits_of
from satlib.robustness import adversarial_robustness, universal_robustness
from satlib.training import Training, accuracy, confusion, train
from satlib.universal import named

pytestmark = pytest.mark.usefixtures("float32")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def pixels(count=12, size=32, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).float()


def three(images, labels):
    return dict(zip(("craft", "choose", "report"), zip(images.chunk(3), labels.chunk(3), strict=True), strict=True))


def classifier(*layers, size=32, classes=10):
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * size * size, classes))


class View(nn.Module):
    """Flattens by `view`, which wants contiguous maps."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 30 * 30, 10)

    def forward(self, x):
        maps = self.conv(x).relu()
        return self.head(maps.view(maps.size(0), -1))


class Overwrites(nn.Module):
    """Normalises in place."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, 10)

    def forward(self, x):
        x -= 127.5
        return self.head(x.div_(64).flatten(1))


class Returns(nn.Module):
    """Returns what `wrap` makes of the logits."""

    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = classifier(), wrap

    def forward(self, x):
        return self.wrap(self.net(x))


class Counting(nn.Module):
    """Counts in buffers what it was asked, in eval mode, too; one is replaced, one is changed in place."""

    def __init__(self):
        super().__init__()
        self.net = classifier(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("changed", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.replaced = self.replaced + 1
        self.changed += 1
        return self.net(x)


def weight_normed():
    net = classifier(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3, padding=1)))
    net(pixels(2) / 255)
    return net


def exported():
    net, batch = classifier(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()).eval(), torch.export.Dim("batch")
    return torch.export.export(net, (pixels(4) / 255,), dynamic_shapes=({0: batch},)).module()


def timm_vit():
    return pytest.importorskip("timm").create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=10)


def transformers_vit():
    t = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return t.ViTForImageClassification(t.ViTConfig(image_size=32, patch_size=8, num_labels=10, **sizes))


def smp_unet():
    smp = pytest.importorskip("segmentation_models_pytorch")
    return smp.Unet("resnet18", encoder_weights=None, classes=10)


def unit(make, **options):
    return lambda: UnitInputs(make(), **options)


NETWORKS = {
    "view": unit(View),
    "in place": Overwrites,
    "counting": unit(Counting),
    "shufflenet": unit(torchvision.models.shufflenet_v2_x0_5, **IMAGENET),
    "googlenet with auxiliary heads": unit(
        lambda: torchvision.models.GoogLeNet(num_classes=10, init_weights=False), **IMAGENET
    ),
    "vision transformer": unit(
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10), **IMAGENET
    ),
    "lraspp": unit(lambda: segmentation.lraspp_mobilenet_v3_large(weights_backbone=None), **IMAGENET),
    "timm": unit(timm_vit),
    "transformers": unit(transformers_vit),
    "segmentation_models_pytorch": unit(smp_unet),
    "traced": unit(lambda: torch.jit.trace(View().eval(), pixels(4) / 255)),
    "scripted": unit(lambda: torch.jit.script(View())),
    "compiled": unit(lambda: torch.compile(View(), backend="eager")),
    "exported": unit(exported),
    "DataParallel": unit(lambda: nn.DataParallel(View())),
    "half precision": unit(lambda: classifier(nn.Conv2d(3, 3, 3, padding=1)).half()),
    "double precision": unit(lambda: View().double()),
    "half precision, pixels": lambda: classifier(nn.LayerNorm(32)).half(),
    "double precision, pixels": lambda: classifier(nn.LayerNorm(32)).double(),
    "weight norm": unit(weight_normed),
    "mapping with logits": unit(lambda: Returns(lambda z: {"loss": z.sum(), "logits": z})),
    "mapping with out": unit(lambda: Returns(lambda z: {"aux": z[:, :2], "out": z})),
    "tuple of one": unit(lambda: Returns(lambda z: (z,))),
    "second of a tuple": unit(lambda: Returns(lambda z: (z.mean(), z)), output=1),
    "by name": unit(lambda: Returns(lambda z: {"features": z[:, :2], "scores": z}), output="scores"),
    "function": lambda: (lambda net: lambda x: net(x / 255))(View().eval()),
}


def state_of(model):
    if not isinstance(model, nn.Module):
        return {}, {}, {}
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    values = {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    return modes, flags, values


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_attacked_as_it_is(name):
    torch.manual_seed(0)
    model, images = NETWORKS[name](), pixels()
    with torch.no_grad(), attackable(model) as net:
        labels = logits_of(net, images.clone()).argmax(1)
    before, given = state_of(model), images.clone()
    generator = torch.Generator().manual_seed(0)
    own = heap_pgd(model, images, labels, eps=8.0, sharedness=1, steps=2, step_size=2.0, generator=generator)
    xi = universal_pgd(model, images, labels, eps=8.0, steps=2, batch_size=4, generator=generator)
    attack = named("paper", steps=2, batch_size=4)
    found = universal_robustness(attack, model, **three(images, labels), iterations=2, generator=generator)
    assert own.shape == images.shape and xi.shape == (1, *images.shape[1:])
    assert own.abs().max() <= 8 and xi.abs().max() <= 8 and own.any() and found.evaluations[0].rate == 0
    after = state_of(model)
    assert torch.equal(images, given) and before[:2] == after[:2]
    assert all(torch.equal(value, after[2][key]) for key, value in before[2].items())


def test_modes_that_differ_and_frozen_weights_stay():
    model = UnitInputs(Counting()).train()
    model.network.net[1].eval()
    model.network.net[0].weight.requires_grad_(False)
    before = state_of(model)
    adversarial_robustness(model, pixels(), torch.zeros(12).long(), steps=1, iterations=1)
    after = state_of(model)
    assert before[:2] == after[:2] and all(torch.equal(before[2][name], after[2][name]) for name in before[2])


def test_threads_leave_the_network_as_it_was():
    model, labels = UnitInputs(Counting()).train(), torch.arange(12) % 10
    before = state_of(model)
    errors = []

    def attack(steps):
        try:
            universal_pgd(model, pixels(), labels, eps=8.0, steps=steps, batch_size=4)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=attack, args=(5 + 10 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = state_of(model)
    assert not errors and before[:2] == after[:2]
    assert all(torch.equal(value, after[2][name]) for name, value in before[2].items())


def test_wrappers_of_one_network_share_its_state():
    base = Counting().train()
    base.net[0].weight.requires_grad_(False)
    one, other, before = UnitInputs(base), UnitInputs(base), state_of(base)
    first, second = evaluated(one), evaluated(other)
    first.__enter__()
    second.__enter__()
    other(pixels(2))
    first.__exit__(None, None, None)
    assert not base.training and not any(weight.requires_grad for weight in base.parameters())
    second.__exit__(None, None, None)
    after = state_of(base)
    assert before[:2] == after[:2] and all(torch.equal(value, after[2][name]) for name, value in before[2].items())
    assert one.training and other.training and not network._loans


class Rebuilds(nn.Module):
    """Fills, adds and deletes buffers in its forward pass."""

    def __init__(self):
        super().__init__()
        self.net = classifier()
        self.register_buffer("empty", None)
        self.register_buffer("dropped", torch.ones(()), persistent=False)

    def forward(self, x):
        self.empty = x.mean().detach()
        self.register_buffer("added", torch.zeros(()), persistent=False)
        if hasattr(self, "dropped"):
            del self.dropped
        return self.net(x)


def test_buffers_that_come_and_go_are_as_before():
    model, labels = Rebuilds().train(), torch.arange(12) % 10
    dropped = model.dropped
    for _ in range(2):
        universal_pgd(UnitInputs(model), pixels(), labels, eps=8.0, steps=1, batch_size=4)
        assert [*model._buffers] == ["empty", "dropped"] and model.empty is None and model.dropped is dropped
        assert model._non_persistent_buffers_set == {"dropped"} and model.training and not network._loans


class Alike(Overwrites):
    """Has attributes that are called as those of our own networks, writes into its inputs, and returns a mapping."""

    memory_format, folded = torch.channels_last, lambda self: None

    def forward(self, x):
        return {"logits": super().forward(x)}


def test_a_network_whose_attributes_are_called_like_ours_is_none_of_ours():
    images = pixels().contiguous(memory_format=torch.channels_last)
    given = images.clone()
    success_rates(Alike(), images, torch.arange(12) % 10, torch.zeros(1, 3, 32, 32))
    universal_pgd(Alike(), images, torch.arange(12) % 10, eps=8.0, steps=1, batch_size=4)
    assert torch.equal(images, given)


def test_the_other_parts_beside_an_exported_graph_are_in_eval_mode():
    model = nn.Sequential(exported(), nn.Dropout(0.5))
    with attackable(model) as net:
        assert torch.equal(net(pixels(4)), net(pixels(4)))
    assert model.training and model[1].training


def test_the_callers_images_are_never_written_to(tiny):
    images, labels = pixels(), torch.arange(12) % 10
    for layout in (torch.contiguous_format, torch.channels_last):
        given = images.contiguous(memory_format=layout)
        kept = given.clone()
        adversarial_robustness(Overwrites(), given, labels, steps=2, iterations=2)
        success_rates(Overwrites(), given, labels, torch.zeros(1, 3, 32, 32))
        universal_robustness(named("paper", steps=2, batch_size=4), Overwrites(), **three(given, labels), iterations=1)
        assert torch.equal(given, kept)


def test_a_network_that_fails_is_quoted():
    with pytest.raises(SatlibError, match=r"the model fails on 3x32x32 images: RuntimeError: mat1 and mat2 shapes"):
        heap_pgd(classifier(size=16), pixels(), torch.zeros(12).long(), eps=8.0, sharedness=1, steps=1, step_size=1.0)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda z: (z, z), r"returns a tuple of 0, 1: expected logits; choose by UnitInputs\(network, output=...\)"),
        (lambda z: {"scores": z}, r"returns a dict of 'scores': expected logits; choose"),
        (lambda z: None, "returns a NoneType: expected logits"),
        (lambda z: z.detach().numpy(), "returns a ndarray: expected logits"),
        (lambda z: z[:, :1], "returns one logit for each decision: expected one for each class"),
        (lambda z: z.detach(), "have no gradient in its images"),
    ],
    ids=["tuple", "mapping", "nothing", "numpy", "one logit", "detached"],
)
def test_what_is_no_logits_is_named(wrap, message):
    with pytest.raises(SatlibError, match=message) as error:
        universal_pgd(UnitInputs(Returns(wrap)), pixels(), torch.zeros(12).long(), eps=8.0, steps=1, batch_size=4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("output", [5, "none"])
def test_an_output_that_is_not_there_is_named(output):
    model = UnitInputs(Returns(lambda z: (z, z)), output=output)
    with pytest.raises(SatlibError, match=f"output={output!r} is no tensor in it"):
        universal_pgd(model, pixels(), torch.zeros(12).long(), eps=8.0, steps=1, batch_size=4)


@pytest.mark.parametrize(
    "statistics", [{"mean": (127.5,) * 3, "std": (64.0,) * 3}, {"mean": (0.5,) * 3, "std": (57.0,) * 3}]
)
def test_statistics_in_pixel_units_are_an_error(statistics):
    with pytest.raises(SatlibError, match="expected numbers in units of 0 to 1; divide them by 255"):
        UnitInputs(View(), **statistics)


def test_one_number_is_every_channel_s():
    net, x = View(), pixels(2)
    expected = UnitInputs(net, mean=(0.5,) * 3, std=(0.2, 0.2, 0.2))(x)
    assert torch.equal(UnitInputs(net, mean=0.5, std=0.2)(x), expected)
    assert torch.equal(UnitInputs(net, mean=(0.5, 0.5, 0.5), std=0.2)(x), expected)


# ------------------------------------------------------------------ training


def test_networks_that_return_more_are_trained(tiny):
    model = UnitInputs(Returns(lambda z: {"aux": z, "logits": z}))
    model.network.net = classifier(size=8, classes=4)
    before = accuracy(model, tiny.val)
    train(model, tiny.train, Training(epochs=2, batch_size=64, learning_rate=0.1, sigma=0.5, eps=4.0, steps=1))
    assert accuracy(model, tiny.val) > before + 0.2


class Auxiliary(nn.Module):
    """Returns two things in training mode, and logits alone in eval mode."""

    def __init__(self):
        super().__init__()
        self.net = classifier(size=8, classes=4)

    def forward(self, x):
        z = self.net(x)
        return (z, z.mean()) if self.training else z


def test_a_network_that_returns_more_in_training_mode_is_trained(tiny):
    torch.manual_seed(0)
    model = UnitInputs(Auxiliary(), output=0)
    before = accuracy(model, tiny.val)
    train(model, tiny.train, Training(epochs=2, batch_size=64, learning_rate=0.1, sigma=0.5, eps=4.0, steps=1))
    assert accuracy(model, tiny.val) > before + 0.1


def test_an_exported_network_cannot_be_trained(tiny):
    with pytest.raises(SatlibError, match="the model has no training mode: expected the network that it was exported"):
        net = torch.export.export(classifier(size=8, classes=4), (tiny.train.images[:4].float(),)).module()
        train(UnitInputs(net), tiny.train, Training(epochs=1, batch_size=4))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Returns(lambda z: (z, 1)), "returns a tuple of 0, 1: expected logits"),
        (classifier(size=8, classes=3), "labels from 0 to 3: expected 0 to 2, the model's classes"),
        (classifier(size=16, classes=4), "the model fails on 3x8x8 images: RuntimeError"),
    ],
    ids=["tuple", "too few classes", "other size"],
)
def test_what_cannot_be_trained_is_named(tiny, model, message):
    if isinstance(model, Returns):
        model = copy.deepcopy(model)
        model.net = classifier(size=8, classes=4)
    with pytest.raises(SatlibError, match=message):
        train(model, tiny.train, Training(epochs=1, batch_size=32))


def test_more_classes_than_the_data_has_are_named(tiny):
    with pytest.raises(SatlibError, match="the model tells 7 classes apart: the data 4"):
        accuracy(classifier(size=8, classes=7), tiny.val)


@pytest.mark.parametrize("data", [torch.utils.data.DataLoader([1]), [1, 2], None])
def test_data_that_is_no_image_set_is_named(data):
    model = classifier(size=8, classes=4)
    for use in (lambda: train(model, data, Training(epochs=1)), lambda: accuracy(model, data)):
        with pytest.raises(SatlibError, match=f"data is a {type(data).__name__}: expected an ImageSet"):
            use()


@pytest.mark.parametrize("data", [torch.utils.data.DataLoader([1]), [1, 2]])
@pytest.mark.parametrize("make", DEFENSES.values(), ids=DEFENSES)
def test_defences_name_what_is_no_image_set(make, data):
    with pytest.raises(SatlibError, match=f"data is a {type(data).__name__}: expected an ImageSet"):
        make(data, eps=8.0)


def test_settings_that_are_none_are_named(tiny):
    with pytest.raises(SatlibError, match=r"settings={'epochs': 1}: expected a Training, such as Training\(epochs=1\)"):
        train(classifier(size=8, classes=4), tiny.train, {"epochs": 1})


def test_what_a_callback_asks_is_checked(tiny):
    def after(*_):
        raw(images=pixels() / 255)

    def raw(images):
        success_rates(classifier(), images, torch.arange(12) % 10, torch.zeros(1, 3, 32, 32))

    for callback in ({"after_epoch": after}, {"progress": after}):
        with pytest.raises(SatlibError, match="images from 0 to 1: expected pixel units"):
            train(classifier(size=8, classes=4), tiny.train, Training(epochs=1, batch_size=256), **callback)


# ------------------------------------------------------------------ arguments as people give them


def attacked(images=None, labels=None, **changes):
    torch.manual_seed(0)
    net = UnitInputs(classifier()).eval()
    images = pixels() if images is None else images
    labels = torch.arange(12) % 10 if labels is None else labels
    options = {"eps": 8.0, "steps": 2, "batch_size": 4, "generator": torch.Generator().manual_seed(0)} | changes
    return universal_pgd(net, images, labels, **options)


@pytest.mark.parametrize(
    "given",
    [
        {"images": pixels().double()},
        {"images": pixels().to(torch.uint8)},
        {"images": pixels().long()},
        *({"images": pixels().numpy().astype(kind)} for kind in ("uint16", "uint32", "uint64")),
        {"images": pixels().numpy()},
        {"images": pixels().tolist()},
        {"images": pixels().contiguous(memory_format=torch.channels_last)},
        {"images": pixels().requires_grad_()},
        {"labels": (torch.arange(12) % 10).tolist()},
        {"labels": np.arange(12) % 10},
        {"labels": (torch.arange(12) % 10).int()},
        {"eps": np.array([8.0])},
        {"eps": torch.tensor(8)},
        {"eps": 8},
        {"steps": np.int64(2)},
    ],
    ids=lambda given: f"{next(iter(given))} {type(next(iter(given.values()))).__name__}",
)
def test_other_types_with_a_plain_meaning_are_taken(given):
    assert torch.equal(attacked(**given), attacked())


def test_one_target_for_all_is_taken():
    same = attacked(labels=torch.full((12,), 3), targeted=True)
    assert torch.equal(attacked(labels=3, targeted=True), same)


def test_attacks_work_inside_inference_mode(tiny):
    expected = attacked()
    with torch.inference_mode():
        images = pixels()
        assert torch.equal(attacked(images), expected)
        own = adversarial_robustness(UnitInputs(classifier()), images, torch.arange(12) % 10, steps=1, iterations=1)
        model = classifier(size=8, classes=4)
    assert own.epsilons.shape == (12,) and model is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": pixels() / 255}, r"images from 0 to 1: expected pixel units, 0 to 255; multiply them by 255"),
        ({"images": pixels() / 64 - 2}, "expected pixel units, 0 to 255; normalise inside the model"),
        ({"images": (pixels() - 128).to(torch.int16)}, "images from -128 to 127: expected pixel units"),
        ({"images": pixels() + 1j}, "images of type torch.complex64: expected uint8 or float32"),
        ({"images": torch.utils.data.DataLoader([1])}, "images is a DataLoader: expected a tensor .* torch.cat"),
        ({"images": "x.png"}, "images is a str: expected a tensor"),
        ({"labels": torch.rand(12)}, "labels of shape .* torch.float32: expected int64"),
        ({"labels": 3}, "labels is a int: expected a tensor"),
        ({"labels": torch.full((12,), 10)}, "labels from 10 to 10: expected 0 to 9, the model's classes"),
        ({"steps": 2.5}, "steps=2.5: expected a whole number of at least 1"),
        ({"steps": True}, "steps=True: expected a whole number"),
        ({"eps": "8"}, "eps='8': expected a number"),
        ({"eps": None}, "eps=None: expected a number"),
        ({"start": torch.full((1, 3, 32, 32), torch.nan)}, "start of shape .* expected finite values"),
        ({"generator": 3}, "generator=3: expected None, or a torch.Generator"),
        ({"targeted": "yes"}, "targeted='yes': expected True or False"),
    ],
)
def test_what_has_no_plain_meaning_is_named(given, message):
    with pytest.raises(SatlibError, match=message) as error:
        attacked(**given)
    assert "\n" not in str(error.value)


def test_an_eps_below_one_grey_level_is_noticed():
    with pytest.warns(UserWarning, match=r"eps=0.0313726: expected pixel units, 0 to 255, where 8/255 is 8"):
        attacked(eps=8 / 255)
    with pytest.warns(UserWarning, match="expected pixel units"):
        Training(sigma=0.5, eps=8 / 255)


def test_images_of_0_and_1_are_noticed_and_a_hair_outside_is_taken():
    black_and_white = (pixels() > 128).float()
    with pytest.warns(UserWarning, match=r"images from 0 to 1: expected pixel units, 0 to 255; if 1 is white"):
        attacked(black_and_white)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hair = pixels()
        hair[0, 0, 0, 0], hair[0, 0, 0, 1] = 255 + 1e-5, -1e-5
        assert attacked(hair).abs().max() <= 8


# ------------------------------------------------------------------ searches


def search(model=None, iterations=2, **changes):
    torch.manual_seed(0)
    model, images = model or UnitInputs(classifier()).eval(), pixels()
    sets = three(images, torch.arange(12) % 10) | changes
    return universal_robustness(named("paper", steps=2, batch_size=4), model, **sets, iterations=iterations)


@pytest.mark.parametrize("name", ["craft", "choose", "report"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: (x / 255, y), "{} images from 0 to .*: expected pixel units"),
        (lambda x, y: (x * torch.nan, y), "{} images from nan to nan: expected pixel units"),
        (lambda x, y: (x, y + 7), "{} labels from .*: expected 0 to 9"),
        (lambda x, y: (x, y[:-1]), "{} labels of shape"),
        (lambda x, y: (x[..., :16], y), "the model fails on 3x32x16 images"),
        (lambda x, y: x, "{} is a Tensor: expected a pair"),
    ],
    ids=["unit", "nan", "class", "count", "size", "no pair"],
)
def test_all_three_sets_are_checked_alike(name, spoil, message):
    sets = three(pixels(), torch.arange(12) % 10)
    with pytest.raises(SatlibError, match=message.format(name)):
        search(**{name: spoil(*sets[name])})


def test_images_are_told_apart_by_little():
    """By 16 bytes each, in whatever type they are."""
    images = torch.arange(1000).view(-1, 1, 1, 1).expand(-1, 3, 64, 64)
    tracemalloc.start()
    with pytest.warns(UserWarning, match="500 of 500 `other` images are also `one` images"):
        check_overlap(one=(images.float(), None), other=(images[500:].float(), None))
    assert tracemalloc.get_traced_memory()[1] < images.numel()
    tracemalloc.stop()


def test_sets_that_share_images_are_noticed():
    sets = three(pixels(), torch.arange(12) % 10)
    with pytest.warns(UserWarning, match="4 of 4 `report` images are also `craft` images"):
        search(report=sets["craft"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search()


@pytest.mark.parametrize(
    ("wrap", "share"),
    [(lambda x: x, 1.0), (lambda x: x.round(), 0.0), (lambda x: ((x + 1) * 1e4).tanh(), 0.0)],
    ids=["usable", "rounded", "saturated"],
)
def test_searches_look_at_their_gradients(wrap, share):
    net = classifier()

    class Wrapped(nn.Module):
        def forward(self, x):
            return net(wrap(x) / 255)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = search(Wrapped())
        own = adversarial_robustness(Wrapped(), pixels(), torch.arange(12) % 10, steps=1, iterations=1)
    assert found.gradients == own.gradients == share
    assert any("of the images have a usable gradient" in str(each.message) for each in said) == (share < 0.5)


def test_searches_notice_outputs_that_are_random():
    net = classifier()

    class Noisy(nn.Module):
        def forward(self, x):
            return net(x / 255) + torch.randn(len(x), 10)

    with pytest.warns(UserWarning, match="two passes of the same images give different logits"):
        search(Noisy())


def test_nothing_but_ignored_pixels_is_an_error():
    model = UnitInputs(nn.Conv2d(3, 10, 1))
    with pytest.raises(SatlibError, match="labels: all are 255, which is ignored"):
        universal_pgd(model, pixels(), torch.full((12, 32, 32), 255), eps=8.0, steps=1, batch_size=4)


def undecided():
    """Images, and a network that has no preference between ten classes: rounding moves what it decides."""
    torch.manual_seed(0)
    head = nn.Linear(3 * 32 * 32, 10, bias=False)
    with torch.no_grad():
        head.weight.copy_(head.weight[:1] + 1e-3 * head.weight)
    return UnitInputs(nn.Sequential(nn.Flatten(), head)).eval(), pixels(48)


def test_verdicts_are_those_of_float32_whatever_the_attack_computes_in(monkeypatch):
    model, images = undecided()
    with torch.no_grad():
        labels = logits_of(model, images).argmax(1)
    monkeypatch.setenv("SATLIB_PRECISION", "bfloat16")
    fastest_dtype.cache_clear()
    with torch.no_grad():
        assert (logits_of(model, images).argmax(1) != labels).float().mean() > 0.2  # what a verdict must not hang on
    with torch.no_grad(), autocast(images.device):
        assert torch.mm(images.flatten(1), images.flatten(1).T).dtype is torch.bfloat16
    nothing = torch.zeros(1, 3, 32, 32)
    assert success_rates(model, images, labels, nothing) == 0
    assert success_rates(model, images, labels, nothing, targeted=True) == 1
    assert risks.expected_risk(model, images, labels).error == 0
    assert risks.risk_under(model, images, labels, nothing, len(images)).error == 0
    given = ImageSet(images.byte(), labels, tuple("abcdefghij"), "pixels", "Pixels", "test")
    assert accuracy(model, given) == 1 and confusion(model, given).trace() == 48
    found = universal_robustness(named("paper", steps=1, batch_size=4), model, **three(images, labels), iterations=1)
    assert found.evaluations[0].eps == found.evaluations[0].rate == 0
    own = adversarial_robustness(model, images, labels, steps=1, iterations=1)
    assert (own.epsilons > 0).all()
    fastest_dtype.cache_clear()
