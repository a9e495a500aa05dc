"""What the tests of the kernels share: exact arithmetic, tiny data, tiny models."""

import contextlib
import os
from collections.abc import Callable, Iterator
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from satlib import device
from satlib.data import ImageSet, Splits
from satlib.data.imageset import IGNORE
from satlib.device import fastest_dtype
from satlib.models import ResNet

if "AVX512" not in torch.backends.cpu.get_cpu_capability():
    # Where the best there is is AVX2, oneDNN 3.12 writes past its memory in the backward pass of a strided 1x1
    # convolution of fewer than 8 channels in channels last (seen with PyTorch 2.14.1), as tests' tiny networks have.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX")  # here and in the processes that tests start

CLASSES = ("a", "b", "c", "d")
BANDS = ("dark", "middle", "bright")


class Linear(nn.Module):
    """f(x) = W x + b on flattened pixels, in float64, so that signs of gradients do not depend on rounding."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight.double().flatten(1))
        self.bias = nn.Parameter(torch.zeros(len(weight)).double() if bias is None else bias.double())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.double().flatten(1), self.weight, self.bias)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from more threads, and on a busy machine lose much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def float32() -> Iterator[None]:
    """All arithmetic of the kernels in float32, whatever is fastest here; on one thread."""
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setenv("SATLIB_PRECISION", "float32")
        fastest_dtype.cache_clear()
        yield
    fastest_dtype.cache_clear()


@pytest.fixture(scope="session")
def linear() -> type[Linear]:
    """The linear model: linear(weight (classes, ...), bias (classes,))."""
    return Linear


def tiny_images() -> Iterator[ImageSet]:
    """Four classes of 3x8x8 images: a smooth pattern for each class under noise, far from 0 and 255.

    No perturbation of up to 40 pixel units reaches a clamp, where implementations of PGD differ.
    """
    generator = torch.Generator().manual_seed(5)
    patterns = F.interpolate(torch.randn(len(CLASSES), 3, 4, 4, generator=generator), size=8, mode="bilinear")

    for name, count in (("train", 512), ("val", 128), ("test", 96), ("craft", 1024), ("report", 2048)):
        labels = torch.randint(len(CLASSES), (count,), generator=generator)
        noise = torch.randn(count, 3, 8, 8, generator=generator)
        images = (128 + 22 * patterns[labels] + 22 * noise).clamp(40, 215).round().to(torch.uint8)
        yield ImageSet(images, labels, CLASSES, "tiny", "Tiny", name)


@pytest.fixture(scope="session")
def tiny() -> Splits:
    """The first three of `tiny_images`."""
    return Splits(*islice(tiny_images(), 3))


@pytest.fixture(scope="session")
def more_tiny() -> tuple[ImageSet, ImageSet]:
    """The other two, so many that a success rate on them owes little to chance."""
    return tuple(islice(tiny_images(), 3, None))


@pytest.fixture(scope="session")
def resnet() -> Callable[..., ResNet]:
    """resnet(seed): an untrained ResNet-8 of width 4 whose batch norm has statistics worth folding."""

    def build(seed: int = 0) -> ResNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = ResNet(depth=8, width=4, classes=len(CLASSES), mean=(128.0,) * 3, std=(30.0,) * 3)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.uniform_(module.bias, -0.5, 0.5)
                    nn.init.uniform_(module.running_mean, -0.5, 0.5)
                    nn.init.uniform_(module.running_var, 0.5, 2.0)
        return model

    return build


@pytest.fixture(scope="session")
def trained(tiny: Splits, resnet: Callable[..., ResNet]) -> ResNet:
    """A ResNet-8 of width 4 in eval mode that classifies nearly all of `tiny`; trained by nothing of satlib's."""
    model = resnet().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    batches = (batch for _ in range(8) for batch in tiny.train.batches(64, generator=generator))
    with one_thread():
        for x, y in islice(batches, 60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


@pytest.fixture(scope="session")
def scenes() -> Splits:
    """Scenes of 3x16x24: three bands of dark, middle and bright pixels, in an order that changes; a void corner."""
    generator = torch.Generator().manual_seed(0)

    def split(name: str, count: int) -> ImageSet:
        order = torch.stack([torch.randperm(3, generator=generator) for _ in range(count)])
        labels = order.repeat_interleave(8, 1)[:, None, :].expand(count, 16, 24).clone()
        noise = 12 * torch.randn(count, 3, 16, 24, generator=generator)
        images = (60 + 65 * labels[:, None] + noise).clamp(0, 255).to(torch.uint8)
        labels[:, :3, :3] = IGNORE
        frames = tuple(f"{name}_{i}" for i in range(count))
        return ImageSet(images, labels.to(torch.uint8), BANDS, "bands", "Bands", name, frames)

    return Splits(split("train", 24), split("val", 12), split("test", 12))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[Callable]:
    """Records on the CPU as CUDA does, after three trial calls; the outputs are always the same memory. Returns what
    was recorded."""
    made: list[Callable] = []

    def record(function: Callable, **_: object) -> tuple[Callable, tuple]:
        for _ in range(3):
            function()
        outputs = function()
        made.append(function)

        def replay() -> None:
            for output, new in zip(outputs, function(), strict=True):
                output.copy_(new)

        return replay, outputs

    monkeypatch.setitem(device.RECORDERS, "cpu", record)
    return made
