"""Classifiers that take pixels in 0..255 and normalise inside themselves."""

import copy
import functools
import inspect
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from satlib.checks import check, check_known
from satlib.errors import SatlibError
from satlib.network import OwnNetwork, logits_in, weights_dtype

Channels: TypeAlias = Sequence[float]  # one value a channel, in pixel units
MEAN, STD = (127.5, 127.5, 127.5), (64.0, 64.0, 64.0)
STEMS = {"large": (7, 2), "half": (3, 2), "full": (3, 1)}  # kernel and stride


def check_positive(**values: int) -> None:
    """Raises SatlibError for a value that is not positive."""
    check("a positive whole number", lambda value: value >= 1, **values)


def conv_norm(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, then batch norm: the pair that `folded` merges into one convolution."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


def fold_batch_norm(module: nn.Module) -> None:
    """Merge every convolution below `module` with its batch norm, in place (evaluation only).

    Pairs are those of `conv_norm`, and the `convN` and `bnN` of torchvision's residual networks.
    """
    for child in module.modules():
        if isinstance(child, nn.Sequential) and len(child) == 2 and isinstance(child[1], nn.BatchNorm2d):
            child[0], child[1] = fuse_conv_bn_eval(child[0], child[1]), nn.Identity()
        for name, norm in list(child.named_children()):
            if isinstance(norm, nn.BatchNorm2d) and name.startswith("bn"):
                conv = name.replace("bn", "conv")
                setattr(child, conv, fuse_conv_bn_eval(getattr(child, conv), norm))
                setattr(child, name, nn.Identity())


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016); a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = conv_norm(inputs, outputs, stride=stride)
        self.second = conv_norm(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x).relu_()) + self.shortcut(x)).relu_()


class Statistics(nn.Module):
    """The training images' statistics as buffers, so that weights carry them: `mean` and `std`, one value a channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not len(mean) == len(std) >= 1 or min(std) <= 0:
            raise SatlibError(f"mean={tuple(mean)}, std={tuple(std)}: expected one of each a channel, and std positive")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))


class Normalised(Statistics, OwnNetwork):
    """A network that takes images (n, channels, H, W), float32 in 0..255, and normalises them by its statistics.

    It returns logits (n, classes), or for every pixel (n, classes, H, W). Raises SatlibError where one of its settings
    is not as its class says, mean and std do not fit, or both are in units of 0 to 1.
    """

    def __init__(self, mean: Channels, std: Channels) -> None:
        super().__init__(mean, std)
        if 0 < max(mean) <= 1 and max(std) <= 1:
            raise SatlibError(
                f"mean={tuple(mean)}, std={tuple(std)}: expected numbers in pixel units, 0 to 255; multiply them by 255"
            )

    def initialise(self) -> None:
        """Convolutions as in He et al. (2015); channels last, as all images are."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)

    def folded(self) -> Self:
        """A frozen evaluation copy with batch norm folded into the convolutions: the model that is attacked."""
        clone = copy.deepcopy(self).eval().requires_grad_(False)
        fold_batch_norm(clone)
        return clone.to(memory_format=torch.channels_last)


class UnitInputs(Statistics):
    """Any network whose inputs are in [0, 1], as everything here takes it: with pixels in 0..255.

    network: takes (n, C, H, W) and returns logits (n, classes), or for every pixel (n, classes, H, W); if it
    returns several things, those called `logits` or `out`, or the `output` by name or index. mean, std: one value a
    channel, or one number for all, in [0, 1], by which its inputs are to be normalised; leave them out where the
    network does that itself.
    """

    pixel_dtype = torch.float32  # also where the network's weights have another format

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: float | Sequence[float] = (0.0,),
        std: float | Sequence[float] = (1.0,),
        output: str | int | None = None,
    ) -> None:
        mean, std = (each.item() if isinstance(each, Tensor) and not each.ndim else each for each in (mean, std))
        channels = max((len(each) for each in (mean, std) if not isinstance(each, Real)), default=1)
        mean, std = ([float(each)] * channels if isinstance(each, Real) else each for each in (mean, std))
        super().__init__(mean, std)
        if max(mean) > 1 or max(std) > 1:
            raise SatlibError(
                f"mean={tuple(mean)}, std={tuple(std)}: expected numbers in units of 0 to 1; divide them by 255"
            )
        self.network, self.output = network, output

    def forward(self, x: Tensor) -> Tensor:
        inputs = (x / 255 - self.mean) / self.std
        return logits_in(self.network(inputs.to(weights_dtype(self.network))), self.output)


class ResNet(Normalised):
    """CIFAR ResNet of depth 6n + 2 with `width`, 2 `width`, 4 `width` maps (section 6.1: depth 20, width 64)."""

    def __init__(
        self, *, depth: int = 20, width: int = 64, classes: int = 10, mean: Channels = MEAN, std: Channels = STD
    ):
        super().__init__(mean, std)
        if depth < 8 or (depth - 2) % 6:
            raise SatlibError(f"depth={depth!r}: a CIFAR ResNet has depth 6n + 2; use 8, 14, 20, 26, ...")
        check_positive(width=width, classes=classes)
        self.stem = conv_norm(len(mean), width)
        blocks, inputs = [], width
        for stage in range(3):
            for block in range((depth - 2) // 6):
                outputs = width * 2**stage
                blocks.append(BasicBlock(inputs, outputs, stride=2 if stage and not block else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)
        self.initialise()

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        x = self.blocks(self.stem(x).relu_())
        return self.head(x.mean((2, 3)))


class BottleneckResNet(Normalised):
    """torchvision's residual network of bottleneck blocks; by default WRN-50-2 (section 6.2), 224x224 or larger.

    layers: blocks in each of the four stages; group_width: inner maps of the first stage's blocks, doubled from each to
    the next (ResNet-50: 64, WRN-50-2: 128); expansion: a stage's maps, in units of 64, 128, 256, 512. stem: "large", a
    7x7 convolution and a pooling that leave a quarter of the resolution; for small images "half", a 3x3 convolution
    with stride 2, or "full", without. The weights' names below `net.` are torchvision's: see `load_pretrained`.
    """

    def __init__(
        self,
        *,
        layers: Sequence[int] = (3, 4, 6, 3),
        group_width: int = 128,
        expansion: int = 4,
        stem: str = "large",
        classes: int = 200,
        mean: Channels = MEAN,
        std: Channels = STD,
    ):
        from torchvision.models import resnet  # here, for it takes long to import

        super().__init__(mean, std)
        if len(layers) != 4 or min(layers) < 1:
            raise SatlibError(f"layers={tuple(layers)}: expected the number of blocks of each of four stages")
        check_positive(group_width=group_width, expansion=expansion, classes=classes)
        check_known(STEMS, stem=stem)
        block = bottleneck(expansion)
        self.net = resnet.ResNet(block, list(layers), num_classes=classes, width_per_group=group_width)
        if stem != "large" or len(mean) != 3:
            kernel, stride = STEMS[stem]
            self.net.conv1 = nn.Conv2d(len(mean), 64, kernel, stride, padding=kernel // 2, bias=False)
        if stem != "large":
            self.net.maxpool = nn.Identity()
        self.initialise()

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.std)


class FCN8s(Normalised):
    """FCN-8s (Long et al. 2015) on a VGG-16 encoder with batch norm, `width` maps in its first stage (VGG-16: 64).

    Images may be of any size; the logits are every pixel's.
    """

    def __init__(self, *, classes: int, width: int = 64, mean: Channels = MEAN, std: Channels = STD):
        super().__init__(mean, std)
        check_positive(width=width, classes=classes)
        stages, inputs = [], len(mean)
        for depth, factor in ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8)):
            layers = []
            for _ in range(depth):
                layers += [conv_norm(inputs, factor * width), nn.ReLU(inplace=True)]
                inputs = factor * width
            stages.append(nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True)))
        self.stages = nn.ModuleList(stages)
        self.context = nn.Sequential(
            conv_norm(inputs, 64 * width, kernel=7),
            nn.ReLU(inplace=True),
            conv_norm(64 * width, 64 * width, kernel=1),
            nn.ReLU(inplace=True),
        )
        self.scores = nn.ModuleList(nn.Conv2d(maps, classes, 1) for maps in (64 * width, 8 * width, 4 * width))
        self.initialise()

    def forward(self, x: Tensor) -> Tensor:
        size, maps = x.shape[2:], []
        x = (x - self.mean) / self.std
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        logits = self.scores[0](self.context(x))
        for score, skip in zip(self.scores[1:], (maps[3], maps[2]), strict=True):
            logits = F.interpolate(logits, skip.shape[2:], mode="bilinear") + score(skip)
        return F.interpolate(logits.float(), size, mode="bilinear")

    def translated(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights of torchvision's VGG-16 with batch norm under our names; others as they are.

        Its convolutions have a bias, ours have none: batch norm takes it off the mean that it subtracts. What VGG-16
        has beyond its encoder is left out.
        """
        layers = [name for name, value in weights.items() if value.ndim == 4 or name.endswith(".running_mean")]
        if len(layers) != 2 * 13 or not all("features." in name for name in layers):
            return weights
        kinds = (nn.Conv2d, nn.BatchNorm2d)
        ours = [name for name, module in self.stages.named_modules(prefix="stages") if isinstance(module, kinds)]
        theirs = sorted((name.rpartition(".")[0] for name in layers), key=lambda layer: int(layer.rpartition(".")[2]))
        names, encoder = dict(zip(theirs, ours, strict=True)), {}
        for name, value in weights.items():
            layer, _, part = name.rpartition(".")
            if layer in names:
                encoder[f"{names[layer]}.{part}"] = value
        for convolution, norm in zip(ours[::2], ours[1::2], strict=True):
            mean = f"{norm}.running_mean"
            encoder[mean] = encoder[mean] - encoder.pop(f"{convolution}.bias", 0)
        return encoder


@functools.cache
def bottleneck(expansion: int) -> type[nn.Module]:
    """torchvision's block, whose last convolution has `expansion` times as many maps as the others: one class for all
    networks, so that what is recorded or compiled for one serves the next."""
    from torchvision.models.resnet import Bottleneck

    return type("Bottleneck", (Bottleneck,), {"expansion": expansion})


ARCHITECTURES = {"resnet": ResNet, "bottleneck": BottleneckResNet, "fcn8s": FCN8s}


def build(architecture: Mapping[str, Any], **data: Any) -> nn.Module:
    """The network of that `name`, a key of ARCHITECTURES ("resnet" if missing), and settings. data: classes, mean, std.

    Raises SatlibError for an unknown name or setting, and what the network raises.
    """
    settings = dict(architecture)
    name = settings.pop("name", "resnet")
    if name not in ARCHITECTURES:
        raise SatlibError(f"architecture {name!r}: expected one of {', '.join(ARCHITECTURES)}")
    known = inspect.signature(ARCHITECTURES[name]).parameters
    if unknown := sorted(set(settings) - set(known)):
        raise SatlibError(f"{name} has no setting {unknown[0]!r}: expected some of {', '.join(known)}")
    return ARCHITECTURES[name](**settings, **data)


@dataclass(frozen=True)
class Fitted:
    """What of a file of weights fitted a model: the names of the tensors taken, and of those that were not, and why."""

    taken: tuple[str, ...]
    missing: tuple[str, ...]  # of the model, not in the file: left as they were
    unused: tuple[str, ...]  # of the file, not in the model
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # name: (the file's, the model's)

    def __str__(self) -> str:
        lines = [f"{len(self.taken)} tensors taken"]
        if self.other_shape:
            listed = (f"{name} {a} in the file, {b} here" for name, (a, b) in sorted(self.other_shape.items()))
            lines.append(f"other shapes, left as they were: {'; '.join(listed)}")
        for what, names in (("not in the file, left as they were", self.missing), ("of no use here", self.unused)):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                lines.append(f"{what}: {', '.join(names[:5])}{more}")
        return "\n".join(lines)


def load_pretrained(model: nn.Module, path: str | Path) -> Fitted:
    """Load the weights of a file as far as they fit; the result says what did, and what did not.

    path: a .safetensors file, or a state dict as torch.save writes it (no code in it is run), on its own or below the
    key `state_dict` or `model`. Names may begin with `module.` or `net.`, or lack the latter. A head for other classes
    is left as it was. Raises SatlibError where the file cannot be read, or nothing in it fits.
    """
    path, expected = Path(path), "expected a .safetensors file or a state dict of torch.save"
    try:
        safe = path.suffix == ".safetensors"
        weights = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SatlibError(f"no weights at {path}; {expected}") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SatlibError(f"cannot read weights from {path} ({reason}); {expected}") from None
    for key in ("state_dict", "model"):
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise SatlibError(f"{path} holds no state dict; expected tensors by name")
    return load_matching(model, weights, source=str(path))


@torch.no_grad()
def load_matching(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> Fitted:
    """As `load_pretrained`, of tensors by name; source says where they are from."""
    if hasattr(model, "translated"):
        weights = model.translated(weights)
    wanted = model.state_dict()
    plain = {name.removeprefix("net."): name for name in wanted}
    taken, unused, other_shape = [], [], {}
    for name, value in weights.items():
        own = plain.get(name.removeprefix("module.").removeprefix("net."))
        if own is None:
            unused.append(name)
        elif wanted[own].shape != value.shape:
            other_shape[own] = (tuple(value.shape), tuple(wanted[own].shape))
        else:
            wanted[own].copy_(value)
            taken.append(own)
    if not any(wanted[name].ndim > 1 and name not in ("mean", "std") for name in taken):  # no layer, but a counter
        raise SatlibError(
            f"nothing in {source} fits: it has {', '.join(list(weights)[:3])}, ...; expected {list(plain)[:3]}"
        )
    missing = (name for name in wanted if name not in taken and name not in other_shape)
    return Fitted(tuple(taken), tuple(missing), tuple(unused), other_shape)
