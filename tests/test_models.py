"""The models: shape and size, normalisation inside, folding of batch norm, and the errors they promise."""

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from satlib.errors import SatlibError
from satlib.models import BasicBlock, BottleneckResNet, FCN8s, ResNet, build, load_pretrained

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture
def images() -> torch.Tensor:
    return torch.empty(6, 3, 8, 8).uniform_(0, 255, generator=torch.Generator().manual_seed(0))


def weights(inputs: int, outputs: int, kernel: int) -> int:
    """Of a convolution without bias, and of the scale and shift of its batch norm."""
    return inputs * outputs * kernel**2 + 2 * outputs


@pytest.mark.parametrize(("depth", "width", "classes"), [(20, 64, 10), (14, 4, 7), (8, 3, 2)])
def test_size_is_that_of_the_resnet_of_this_depth_and_width(depth, width, classes):
    """A stem, three stages of (depth - 2) / 6 blocks with two 3x3 convolutions each, two 1x1 shortcuts, a head."""
    model = ResNet(depth=depth, width=width, classes=classes)
    count = weights(3, width, 3)
    for stage in range(3):
        maps = width * 2**stage
        inside = 2 * (depth - 2) // 6 - (stage > 0)
        count += inside * weights(maps, maps, 3)
        if stage:
            count += weights(maps // 2, maps, 3) + weights(maps // 2, maps, 1)
    count += (4 * width + 1) * classes
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == depth  # with the head


def test_the_paper_s_network_has_64_128_256_maps_at_falling_resolution():
    model, sizes = ResNet(depth=20, width=64), []
    for block in model.blocks:
        assert isinstance(block, BasicBlock)
        block.register_forward_hook(lambda _, __, output: sizes.append(tuple(output.shape[1:])))
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(64, 32, 32)] * 3 + [(128, 16, 16)] * 3 + [(256, 8, 8)] * 3
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_327_754


def test_default_is_the_paper_s_network():
    assert [block.second[0].out_channels for block in ResNet().blocks] == [64] * 3 + [128] * 3 + [256] * 3


def test_normalisation_is_inside_and_travels_with_the_weights(images):
    torch.manual_seed(0)
    mean, std = (120.0, 100.0, 80.0), (60.0, 50.0, 70.0)
    model = ResNet(depth=8, width=4, mean=mean, std=std).eval()
    plain = ResNet(depth=8, width=4, mean=(0.0,) * 3, std=(1.0,) * 3).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k not in ("mean", "std")}, strict=False)
    normalised = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain(normalised))
        loaded = ResNet(depth=8, width=4).eval()
        assert not torch.allclose(loaded(images), model(images))
        loaded.load_state_dict(model.state_dict())
        assert torch.equal(loaded(images), model(images))
    assert not {"mean", "std"} & {name for name, _ in model.named_parameters()}
    assert model.mean.flatten().tolist() == list(mean) and model.std.flatten().tolist() == list(std)


def test_input_need_not_have_three_channels():
    model = ResNet(depth=8, width=4, classes=3, mean=(100.0,), std=(50.0,))
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_folded_model_computes_the_same(resnet, images, training):
    model = resnet().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = model.folded()(images)
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    logits = model.eval()(images)
    assert (folded - logits).abs().max() < 1e-3 * logits.abs().max()
    assert (logits.std(0) > 0.05).all()


def test_folded_model_is_a_frozen_copy_without_batch_norm(resnet, images):
    model = resnet()
    net = model.folded()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert not net.training and not any(parameter.requires_grad for parameter in net.parameters())
    with torch.no_grad():
        before = net(images)
        for tensor in model.state_dict().values():
            tensor.zero_()
        assert torch.equal(net(images), before)  # nothing is shared with the original
    again = net.folded()
    with torch.no_grad():
        assert torch.equal(again(images), before)  # folding twice changes nothing


def test_forward_leaves_the_images_as_they_were(resnet, images):
    """Its activations are in place, and the images are what an attack goes on with."""
    before = images.clone()
    for model in (resnet().eval(), resnet().folded()):
        model(images)
        assert torch.equal(images, before)


def test_weights_and_activations_are_channels_last(resnet, images):
    for model in (resnet().eval(), resnet().folded()):
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                assert module.weight.is_contiguous(memory_format=torch.channels_last)
        formats = []
        model.blocks.register_forward_hook(
            lambda _, __, output, into=formats: into.append(output.is_contiguous(memory_format=torch.channels_last))
        )
        model(images.contiguous(memory_format=torch.channels_last))
        assert formats == [True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 10}, r"depth=10: a CIFAR ResNet has depth 6n \+ 2; use 8, 14, 20"),
        ({"depth": 2}, r"depth=2"),
        ({"depth": -4}, r"depth=-4"),
        ({"width": 0}, r"width=0: expected a positive whole number"),
        ({"classes": -1}, r"classes=-1: expected a positive whole number"),
        ({"mean": (), "std": ()}, r"mean=\(\), std=\(\): expected one of each a channel"),
        ({"mean": (0.49, 0.48, 0.45), "std": (0.25, 0.24, 0.26)}, "in pixel units, 0 to 255; multiply them by 255"),
        ({"mean": (1.0, 2.0)}, r"mean=\(1\.0, 2\.0\), std=\(64\.0, 64\.0, 64\.0\)"),
        ({"std": (64.0, 0.0, 64.0)}, r"std=\(64\.0, 0\.0, 64\.0\)"),
    ],
)
def test_model_names_what_is_wrong(changes, message):
    with pytest.raises(SatlibError, match=message):
        ResNet(**({"depth": 8, "width": 4} | changes))


# ------------------------------------------------------------------------------------------------- segmentation


def test_fcn_8s_labels_every_pixel_of_images_of_any_size():
    model = FCN8s(classes=5, width=2).eval()
    with torch.no_grad():
        for height, width in ((64, 96), (45, 60), (33, 31)):
            assert model(torch.zeros(2, 3, height, width)).shape == (2, 5, height, width)


def test_fcn_8s_is_vgg_16_with_two_skips():
    """13 convolutions of VGG-16, the two that were its fully connected layers, and three that score."""
    model = FCN8s(classes=7, width=2)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    maps = [module.out_channels for module in convolutions]
    assert maps == [2] * 2 + [4] * 2 + [8] * 3 + [16] * 6 + [128] * 2 + [7] * 3
    assert [module.in_channels for module in convolutions[-3:]] == [128, 16, 8]
    assert FCN8s(classes=2, width=4).stages[4][0][0].in_channels == 32


@torch.no_grad()
@pytest.mark.parametrize(("kept", "far"), [(0, True), (2, False)])
def test_fcn_8s_adds_far_context_to_near_detail(kept, far):
    """One pixel at a corner reaches the opposite one through the coarsest score alone; the finest stays near it."""
    torch.manual_seed(0)
    model = FCN8s(classes=3, width=4).eval()
    for index, score in enumerate(model.scores):
        if index != kept:
            score.weight.zero_()
    x = torch.full((1, 3, 128, 128), 128.0)
    other = x.clone()
    other[..., 5, 5] = 255.0
    changed = (model(x) - model(other)).abs().sum((0, 1))
    assert changed[:16, :16].max() > 0
    assert (changed[96:, 96:].max() > 0) == far


@torch.no_grad()
def test_folded_fcn_8s_computes_the_same():
    torch.manual_seed(0)
    model = FCN8s(classes=3, width=2).train()
    x = torch.rand(4, 3, 40, 48) * 255
    model(x)  # batch norm gets statistics worth folding
    folded = model.folded()
    logits = model.eval()(x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert (folded(x) - logits).abs().max() < 1e-3 * logits.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, r"width=0: expected a positive whole number"),
        ({"classes": 0}, r"classes=0: expected a positive whole number"),
        ({"std": (64.0, 64.0)}, r"std=\(64\.0, 64\.0\)"),
    ],
)
def test_fcn_8s_names_what_is_wrong(changes, message):
    with pytest.raises(SatlibError, match=message):
        FCN8s(**({"classes": 3, "width": 2} | changes))


# ------------------------------------------------------------------------- torchvision's bottlenecks, pretrained


SMALL = {"layers": (1, 1, 1, 1), "group_width": 8, "expansion": 1, "classes": 5}


@pytest.fixture
def bottleneck() -> BottleneckResNet:
    torch.manual_seed(0)
    model = BottleneckResNet(stem="half", **SMALL)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2), norm.weight.data.uniform_(0.5, 2)
    return model.eval()


def test_default_bottleneck_network_is_wrn_50_2():
    with torch.device("meta"):
        model, peer = BottleneckResNet(classes=1000), torchvision.models.wide_resnet50_2()
    ours = {name.removeprefix("net."): value.shape for name, value in model.state_dict().items()}
    assert ours == {name: value.shape for name, value in peer.state_dict().items()} | {
        name: torch.Size((1, 3, 1, 1)) for name in ("mean", "std")
    }
    assert sum(p.numel() for p in model.parameters()) == 68_883_240  # as torchvision's documentation says


@pytest.mark.parametrize(("stem", "size"), [("large", 2), ("half", 4), ("full", 8)])
def test_stem_decides_the_resolution(stem, size):
    model, seen = BottleneckResNet(stem=stem, **SMALL), []
    model.net.layer4.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape[1:])))
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
    assert seen == [(512, size, size)]


@torch.no_grad()
def test_folded_bottleneck_network_computes_the_same(bottleneck):
    images = torch.empty(3, 3, 32, 32).uniform_(0, 255, generator=torch.Generator().manual_seed(0))
    folded = bottleneck.folded()
    torch.testing.assert_close(folded(images), bottleneck(images), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in bottleneck.modules())


@pytest.mark.parametrize("form", ["safetensors", "plain", "checkpoint", "parallel"])
def test_pretrained_weights_are_taken_as_far_as_they_fit(bottleneck, tmp_path, form):
    torch.manual_seed(1)
    other = BottleneckResNet(stem="half", **SMALL | {"classes": 9})
    weights = {
        name.removeprefix("net."): value.contiguous()
        for name, value in other.state_dict().items()
        if name not in ("mean", "std")
    }
    head = bottleneck.net.fc.weight.clone()
    if form == "safetensors":
        save_file(weights, path := tmp_path / "w.safetensors")
    else:
        named = {f"module.{name}": value for name, value in weights.items()} if form == "parallel" else weights
        torch.save({"state_dict": named, "epoch": 3} if form == "checkpoint" else named, path := tmp_path / "w.pt")
    fitted = load_pretrained(bottleneck, path)
    assert set(fitted.other_shape) == {"net.fc.weight", "net.fc.bias"} and not fitted.unused
    assert set(fitted.missing) == {"mean", "std"} and len(fitted.taken) == len(weights) - 2
    assert torch.equal(bottleneck.net.layer1[0].conv1.weight, other.net.layer1[0].conv1.weight)
    assert torch.equal(bottleneck.net.fc.weight, head)
    assert "net.fc.weight (9, 512) in the file, (5, 512) here" in str(fitted)


class Mischief:
    def __reduce__(self):
        return (print, ("run",))


def test_weights_that_do_not_fit_are_named(bottleneck, tmp_path, capsys):
    path = tmp_path / "w.pt"
    with pytest.raises(SatlibError, match=r"no weights at .*w\.pt"):
        load_pretrained(bottleneck, path)
    for content, message in (
        ({"weights": Mischief()}, r"cannot read weights from .*w\.pt"),
        ([1, 2], "holds no state dict"),
        ({"a": torch.zeros(2)}, r"nothing in .*w\.pt fits: it has a"),
        ({"bn1.num_batches_tracked": torch.tensor(3)}, r"nothing in .*w\.pt fits: it has bn1"),
    ):
        torch.save(content, path)
        with pytest.raises(SatlibError, match=message):
            load_pretrained(bottleneck, path)
    path.write_bytes(b"not weights")
    with pytest.raises(SatlibError, match=r"cannot read weights from .*w\.pt"):
        load_pretrained(bottleneck, path)
    assert "run" not in capsys.readouterr().out


def test_torchvision_s_vgg_becomes_the_encoder_of_fcn8s(tmp_path):
    from torchvision.models import vgg16_bn

    torch.manual_seed(0)
    theirs = vgg16_bn(num_classes=3).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        elif isinstance(module, nn.Conv2d):
            nn.init.uniform_(module.bias, -0.5, 0.5)
    torch.save(theirs.state_dict(), tmp_path / "vgg.pt")
    model = FCN8s(classes=3, width=64).eval()
    fitted = load_pretrained(model, tmp_path / "vgg.pt")
    assert not fitted.unused and not fitted.other_shape and len(fitted.taken) == 13 * 6
    assert all(not name.startswith("stages") for name in fitted.missing)
    x = torch.rand(1, 3, 64, 64)
    own = x
    for stage in model.stages:
        own = stage(own)
    torch.testing.assert_close(own, theirs.features(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"name": "transformer"}, "architecture 'transformer': expected one of resnet, bottleneck, fcn8s"),
        ({"name": "resnet", "layers": 3}, "resnet has no setting 'layers': expected some of depth, width"),
        ({"name": "bottleneck", "layers": (1, 1)}, r"layers=\(1, 1\): expected the number of blocks"),
        ({"name": "bottleneck", "stem": "tiny"}, "stem='tiny': expected one of large, half, full"),
        ({"name": "bottleneck", "expansion": 0}, "expansion=0: expected a positive whole number"),
    ],
)
def test_architectures_name_what_is_wrong(architecture, message):
    with pytest.raises(SatlibError, match=message):
        build(architecture, classes=3)


def test_architecture_without_a_name_is_the_resnet():
    assert isinstance(build({"depth": 8, "width": 2}, classes=3), ResNet)
    assert isinstance(build({"name": "bottleneck", "layers": [1, 1, 1, 1], "group_width": 8}), BottleneckResNet)
