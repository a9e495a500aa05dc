"""Settings flow one way: the paper's (`satlib.paper`), what a profile changes, what a reader changes.

A profile is a file `satlib/study/profiles/NAME.yaml`, or one of your own, `profiles/NAME.yaml` in the project's folder:
a line of text each under `description`, `hardware` and `time`, and under `sections` by section only what differs from
the paper, or where the paper is silent from our default.
"""

import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from satlib.errors import SatlibError, nearest
from satlib.paper import CHECKS, CIFAR10, CITYSCAPES, IMAGENET, METHOD
from satlib.paths import project_root

# What each section is asked with in the paper; "method": sections 3 to 5; "checks": whether evaluations can be trusted.
SECTIONS = {"6.1": CIFAR10, "6.2": IMAGENET, "6.3": CITYSCAPES, "method": METHOD, "checks": CHECKS}
BUILDS_ON = {"method": "6.1"}  # whose settings it shares
NOTEBOOKS = {  # the sections whose runs a notebook needs
    **dict.fromkeys(("01_preliminaries", "02_shared_adversarial_training", "03_quantifying_robustness"), ("method",)),
    "04_cifar10": ("6.1",),
    "05_imagenet": ("6.2",),
    "06_cityscapes": ("6.3",),
    "07_discussion": ("6.3",),
    "08_teaser": ("6.2", "6.3"),
    "09_can_we_trust_it": ("checks",),
}
KEYS = {"description": str, "hardware": str, "time": str, "sections": dict}  # of a profile's file


@dataclass(frozen=True)
class Profile:
    """A profile as its file states it: three lines of text, and by section what it changes."""

    name: str
    description: str
    hardware: str
    time: str
    sections: Mapping[str, Mapping[str, object]]


def profile_paths() -> dict[str, Path]:
    """The files of all profiles by name, sorted; needs nothing installed."""
    folders = (Path(__file__).with_name("profiles"), project_root() / "profiles")
    paths = {path.stem: path for folder in folders for path in folder.glob("*.yaml")}  # one's own count
    return dict(sorted(paths.items()))


def profile_path(name: str) -> Path:
    """The file of a profile. Raises `SatlibError` for an unknown one, with the nearest name."""
    if name not in (paths := profile_paths()):
        raise SatlibError(f"unknown profile {name!r}{nearest(name, paths)}")
    return paths[name]


def load(name: str) -> Profile:
    """The profile `name`. Raises `SatlibError` naming the file, the key and what was expected."""
    path = profile_path(name)
    return _loaded(path, path.stat().st_mtime_ns)


@cache
def _loaded(path: Path, changed: int) -> Profile:
    content = _read_yaml(path)
    if not isinstance(content, dict):
        raise SatlibError(f"{path}: expected the keys {', '.join(KEYS)}")
    for key in (*content, *KEYS):
        if key not in KEYS:
            raise SatlibError(f"{path}: unknown key {key!r}{nearest(str(key), KEYS)}")
        if key not in content:
            raise SatlibError(f"{path}: the key {key!r} is missing")
        if not isinstance(content[key], KEYS[key]):
            raise SatlibError(f"{path}: {key} is {content[key]!r}, expected a {KEYS[key].__name__}")
    sections = content.pop("sections")
    for section, changes in sections.items():
        if section not in SECTIONS:
            raise SatlibError(f"{path}: sections: unknown section {section!r}{nearest(str(section), SECTIONS)}")
        if not isinstance(changes, dict):
            raise SatlibError(f"{path}: sections: {section} is {changes!r}, expected settings as `name: value`")
    return Profile(name=path.stem, sections=sections, **{key: text.strip() for key, text in content.items()})


def _read_yaml(path: Path) -> object:
    """What the YAML file holds; a key given twice is an error (YAML would keep the last one)."""
    import yaml  # here, so that profiles can be listed before anything is installed

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            known: list[object] = []
            for key, _ in node.value:
                if (name := self.construct_object(key, deep=True)) in known:
                    raise SatlibError(f"{path}, line {key.start_mark.line + 1}: {name!r} is given twice")
                known.append(name)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SatlibError(f"{path} is not valid YAML: {error}") from error


def settings(section: str, profile: str, **changes: object) -> typing.Any:
    """A section's settings ("6.1", "6.2", "6.3", "method", "checks"): the paper's, as the profile and `changes` say.

    A change to None leaves what the profile says. Lists become tuples. Raises `SatlibError` for an unknown section,
    profile or setting with the nearest name, and for a value of another type.
    """
    if section not in SECTIONS:
        raise SatlibError(f"unknown section {section!r}{nearest(section, SECTIONS)}")
    result, stated = SECTIONS[section], load(profile).sections
    for each in (BUILDS_ON.get(section, section), section):
        result = _changed(result, stated.get(each, {}), f"profile {profile!r}, section {each}")
    return _changed(result, {name: value for name, value in changes.items() if value is not None}, f"section {section}")


def _changed(base: typing.Any, changes: Mapping[str, object], where: str) -> typing.Any:
    hints, values = typing.get_type_hints(type(base)), {}
    for name, value in changes.items():
        if name not in vars(base):
            raise SatlibError(f"{where}: there is no setting {name!r}{nearest(str(name), vars(base))}")
        try:
            values[name] = _converted(value, hints[name])
        except TypeError as error:
            like = getattr(base, name)
            raise SatlibError(f"{where}: {name} is {value!r}, expected something like {like!r}: {error}") from error
    return replace(base, **values)


def _converted(value: typing.Any, wanted: typing.Any) -> typing.Any:
    """`value` as the type `wanted`: int becomes float, a list a tuple. Raises `TypeError` if it does not fit."""
    if wanted is float and type(value) is int:
        return float(value)
    if typing.get_origin(wanted) is tuple and isinstance(value, list | tuple):
        items = typing.get_args(wanted)
        if items[-1] is Ellipsis:
            items = items[:1] * len(value)
        if len(items) != len(value):
            raise TypeError(f"{value!r} has {len(value)} entries, expected {len(items)}")
        return tuple(map(_converted, value, items))
    if type(value) is wanted:
        return value
    hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if isinstance(value, str) and wanted is float else ""
    raise TypeError(f"{value!r} is a {type(value).__name__}{hint}")


def datasets(profile: str, stems: Iterable[str]) -> list[str]:
    """Names of the data sets that the notebooks `stems` need under a profile, sorted."""
    sections = {section for stem in stems for section in NOTEBOOKS.get(stem, ())}
    if "checks" in sections:
        sections = sections - {"checks"} | {"6.1", *settings("checks", profile).sections}
    chosen = [settings(section, profile) for section in sections]
    return sorted({name for each in chosen for name in (each.dataset, getattr(each, "erm_dataset", "")) if name})
