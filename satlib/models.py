"""Classifiers that take pixels in 0..255 and normalise inside themselves."""

import copy
from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from satlib.errors import SatlibError


def conv_norm(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, then batch norm: the pair that `folded` merges into one convolution."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


def fold_batch_norm(module: nn.Module) -> None:
    """Merge every `conv_norm` pair below `module` into one convolution, in place (evaluation only)."""
    for child in module.modules():
        if isinstance(child, nn.Sequential) and len(child) == 2 and isinstance(child[1], nn.BatchNorm2d):
            child[0], child[1] = fuse_conv_bn_eval(child[0], child[1]), nn.Identity()


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


class Normalised(nn.Module):
    """A network that takes pixels in 0..255 and normalises them by the training images' statistics, in pixel units.

    `mean` and `std` have one value a channel; they are buffers, so weights carry them. Raises SatlibError where they
    do not fit.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not len(mean) == len(std) >= 1 or min(std) <= 0:
            raise SatlibError(f"mean={tuple(mean)}, std={tuple(std)}: expected one of each a channel, and std positive")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

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


class ResNet(Normalised):
    """CIFAR ResNet of depth 6n + 2 with `width`, 2 `width`, 4 `width` feature maps (section 6.1: depth 20, width 64).

    Input: (n, channels, H, W) float32 in 0..255. Output: logits (n, classes). `mean` and `std`: see
    `Normalised`.

    Raises SatlibError where depth is not 6n + 2, width or classes is not positive, or mean and std do not fit.
    """

    def __init__(
        self,
        *,
        depth: int = 20,
        width: int = 64,
        classes: int = 10,
        mean: Sequence[float] = (127.5, 127.5, 127.5),
        std: Sequence[float] = (64.0, 64.0, 64.0),
    ):
        super().__init__(mean, std)
        if depth < 8 or (depth - 2) % 6:
            raise SatlibError(f"depth={depth!r}: a CIFAR ResNet has depth 6n + 2; use 8, 14, 20, 26, ...")
        for name, value in (("width", width), ("classes", classes)):
            if value < 1:
                raise SatlibError(f"{name}={value!r}: expected a positive whole number")
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


class FCN8s(Normalised):
    """FCN-8s (Long et al. 2015) on a VGG-16 encoder with batch norm, `width` maps in its first stage (VGG-16: 64).

    Input: (n, channels, H, W) float32 in 0..255, of any size. Output: logits (n, classes, H, W).

    Raises SatlibError where width or classes is not positive, or mean and std do not fit.
    """

    def __init__(
        self,
        *,
        classes: int,
        width: int = 64,
        mean: Sequence[float] = (127.5, 127.5, 127.5),
        std: Sequence[float] = (64.0, 64.0, 64.0),
    ):
        super().__init__(mean, std)
        for name, value in (("width", width), ("classes", classes)):
            if value < 1:
                raise SatlibError(f"{name}={value!r}: expected a positive whole number")
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
