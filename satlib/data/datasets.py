"""The table of data sets: what is known of each before it is loaded. A new one is a row here, and a module."""

from dataclasses import dataclass, replace

from satlib.errors import SatlibError


@dataclass(frozen=True)
class Dataset:
    """A row of the table; as `described` gives it, under the option that was asked for.

    title: what error messages call it, and figures at the least. shape: channels, height and width of an image.
    classes, training_images: how many. module: the one of `satlib.data` that reads or draws it, by its
    `load(dataset, folder, *, progress)`, and that `downloads` it, by `download(root)`. takes: what may follow the name
    and a colon, "classes" as in "imagenet200:40", or "size" as in "camvid:240x180"; option: what did. embedded: drawn
    in code, and so never missing.
    """

    name: str
    title: str
    shape: tuple[int, int, int]
    classes: int
    training_images: int
    module: str
    takes: str = ""
    segmentation: bool = False
    downloads: bool = False
    embedded: bool = False
    option: str = ""

    @property
    def full_name(self) -> str:
        """The name with the option, as `satlib.data.load` takes it."""
        return f"{self.name}:{self.option}" if self.option else self.name


_STREETS = {"module": "streets", "segmentation": True, "embedded": True}
_ROWS = (
    Dataset("cifar10", "CIFAR-10", (3, 32, 32), 10, 45_000, "cifar10", downloads=True),
    Dataset("imagenet200", "Tiny ImageNet", (3, 64, 64), 200, 90_000, "imagenet", takes="classes"),
    Dataset("imagenet200-224", "ImageNet", (3, 224, 224), 200, 234_000, "imagenet", takes="classes"),
    Dataset("camvid", "CamVid", (3, 360, 480), 11, 367, "scenes", takes="size", segmentation=True),
    Dataset("cityscapes", "Cityscapes", (3, 512, 1024), 19, 2975, "scenes", takes="size", segmentation=True),
    Dataset("shapes32", "synthetic stand-in (shapes32)", (3, 32, 32), 10, 9_000, "shapes", embedded=True),
    Dataset("shapes64", "synthetic stand-in (shapes64)", (3, 64, 64), 20, 8_000, "shapes", embedded=True),
    Dataset("streets128x64", "synthetic street scenes (streets128x64)", (3, 64, 128), 9, 400, **_STREETS),
    Dataset("streets256x128", "synthetic street scenes (streets256x128)", (3, 128, 256), 9, 400, **_STREETS),
)
DATASETS = {row.name: row for row in _ROWS}

# Where a set may lie below the data root: the first of these folders is read that holds the other one ("": any does).
FOLDERS = {
    "cifar10": {f"{place}cifar-10-batches-{kind}": "" for kind in ("bin", "py") for place in ("", "cifar10/")}
    | {"cifar10": "train"},
    "imagenet200": {"imagenet200": "train", "tiny-imagenet-200": "train"},
    "imagenet200-224": {"imagenet": "train"},
    "camvid": {"camvid": "train", "CamVid": "train"},
    "cityscapes": {"cityscapes": "leftImg8bit"},
}
LOOKED_FOR = {  # the same in words, with what is expected in them
    "cifar10": "cifar-10-batches-bin/ or cifar-10-batches-py/, either also in cifar10/, or "
    "cifar10/{train,test}/<class>/*.{png,jpg,jpeg}",
    "imagenet200": "imagenet200/{train,val}/<wnid>/*.JPEG or tiny-imagenet-200/, so or as its authors ship it",
    "imagenet200-224": "imagenet/{train,val}/<wnid>/*.JPEG",
    "camvid": "camvid/{train,val,test}/{images,labels}/<scene>.{jpg,png} or CamVid/{train,val,test}{,annot}/*.png",
    "cityscapes": "cityscapes/{leftImg8bit,gtFine}/{train,val}/<city>/*_{leftImg8bit,gtFine_labelIds}.png",
}


def row_of(name: str) -> Dataset | None:
    """The row of a data set, whatever option follows its name; None for an unknown one."""
    return DATASETS.get(name.partition(":")[0])


def described(name: str) -> Dataset:
    """The row of a data set, changed as the option in `name` says: "camvid:240x180" has another shape, and
    "imagenet200:40" other counts.

    Raises `SatlibError` for an unknown name, an option of a set that takes none, or a size outside 16..4096.
    """
    base, _, option = name.partition(":")
    row = row_of(name)
    if row is None:
        raise SatlibError(f"unknown data set {base!r}; expected one of {', '.join(DATASETS)}")
    if not option:
        return row
    if not row.takes:
        others = ", ".join(other.name for other in DATASETS.values() if other.takes)
        raise SatlibError(f"data set {base!r} has no options: {option!r}; only {others} have")
    if row.takes == "size":
        sides = option.split("x")
        if len(sides) != 2 or not all(side.isdecimal() and 16 <= int(side) <= 4096 for side in sides):
            raise SatlibError(f"{name}: expected a width and a height from 16 to 4096, such as {base}:240x180")
        return replace(row, option=option, shape=(row.shape[0], int(sides[1]), int(sides[0])))
    if not option.isdecimal():  # a file that lists the classes: how many is known when it is read
        return replace(row, option=option)
    images = row.training_images * int(option) // row.classes
    return replace(row, option=option, classes=int(option), training_images=images)


def is_embedded(name: str) -> bool:
    """Whether a data set is drawn in code, and so never missing."""
    row = row_of(name)
    return row is not None and row.embedded


def training_images(name: str, *, unknown: int = 45_000) -> int:
    """Images in an epoch on a data set (as for `load`), for estimates; `unknown` for one that is not in the table."""
    return described(name).training_images if row_of(name) else unknown
