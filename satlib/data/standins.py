"""Images of the right size that stand in for a data set that is not here, to time a network on."""

import torch

from satlib.data.imageset import ImageSet, Splits
from satlib.data.scenes import CAMVID, CITYSCAPES

_SIZES = {  # channels, height, width; classes
    "cifar10": (3, 32, 32, 10),
    "imagenet200": (3, 64, 64, 200),
    "imagenet200-224": (3, 224, 224, 200),
    "camvid": (3, 720, 960, len(CAMVID)),
    "cityscapes": (3, 512, 1024, len(CITYSCAPES)),
}
PIXELS = 8_000_000  # in all images of a set together, at most
IMAGES = 128


def stand_in(name: str) -> Splits | None:
    """Noise with the geometry of the data set `name` (as for `load`); None for an unknown one."""
    base, _, option = name.partition(":")
    if base not in _SIZES:
        return None
    channels, height, width, classes = _SIZES[base]
    scenes = base in ("camvid", "cityscapes")
    if scenes and option:
        width, height = map(int, option.split("x"))
    elif option.isdecimal():
        classes = int(option)
    count = max(1, min(IMAGES, PIXELS // (height * width)))
    generator = torch.Generator().manual_seed(0)

    def split(part: str) -> ImageSet:
        images = torch.randint(256, (count, channels, height, width), generator=generator, dtype=torch.uint8)
        shape = (count, height, width) if scenes else (count,)
        labels = torch.randint(classes, shape, generator=generator, dtype=torch.uint8 if scenes else torch.int64)
        return ImageSet(images, labels, tuple(map(str, range(classes))), name, f"stand-in for {name}", part)

    return Splits(split("train"), split("val"), split("test"))
