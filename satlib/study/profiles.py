"""Profiles: what each notebook is run with, read from `notebooks/profiles/*.yaml` and checked.

A profile is a YAML file with the keys `description`, `hardware`, `time` (one line of text each), `datasets`
(names for `satlib.data.load`), `common` (parameters for every notebook that declares them) and `notebooks`
(parameters by notebook, e.g. `04_cifar10: {epochs: 10}`). A notebook declares its parameters in the code
cell tagged `parameters`, as annotated literals: `epochs: int = 4`; where that would be long, also in cells above it
tagged `earlier-parameters`. Two names are special: `profile` gets the profile's name, and `dataset` is the data
set that must be there before the notebook starts.
"""

import ast
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from satlib.errors import SatlibError, nearest
from satlib.paths import notebook_paths, project_root

EMBEDDED = ("shapes32", "shapes64", "streets128x64", "streets256x128")  # data sets made in code: never missing
_TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}
_KEYS = {
    "description": str,
    "hardware": str,
    "time": str,
    "datasets": list,
    "common": dict,
    "notebooks": dict,
}


@dataclass(frozen=True)
class Profile:
    """One profile as its file states it; `notebooks` and `common` hold parameter values by name."""

    name: str
    description: str
    hardware: str
    time: str
    datasets: tuple[str, ...]
    common: dict[str, object]
    notebooks: dict[str, dict[str, object]]
    path: Path


@dataclass(frozen=True)
class Parameter:
    """A notebook's parameter: its name, its annotation (as written and as a type) and its default."""

    name: str
    annotation: str
    type: typing.Any
    default: object


# --- which profiles exist (standard library only: told before anything is installed)


def profile_paths() -> dict[str, Path]:
    """The files of all profiles by name."""
    return {path.stem: path for path in sorted((project_root() / "notebooks" / "profiles").glob("*.yaml"))}


def profile_path(name: str) -> Path:
    """The file of the profile `name`. Raises `SatlibError` for an unknown profile, with the nearest name."""
    known = profile_paths()
    if name not in known:
        folder = project_root() / "notebooks" / "profiles"
        raise SatlibError(f"unknown profile {name!r} in {folder}{nearest(name, known)}")
    return known[name]


# --- profiles


def load(name: str) -> Profile:
    """The profile `name`. Raises `SatlibError` naming the file, the key and what was expected."""
    path = profile_path(name)
    content = _read_yaml(path)
    if not isinstance(content, dict):
        raise SatlibError(f"{path}: expected the keys {', '.join(_KEYS)}")
    for key, value in content.items():
        if key not in _KEYS:
            raise SatlibError(f"{path}: unknown key {key!r}{nearest(str(key), _KEYS)}")
        if not isinstance(value, _KEYS[key]):
            raise SatlibError(f"{path}: {key} is {value!r}, expected a {_KEYS[key].__name__}")
    if missing := [key for key in ("description", "hardware", "time", "datasets") if key not in content]:
        raise SatlibError(f"{path}: the key {missing[0]!r} is missing")
    for dataset in content["datasets"]:
        if not isinstance(dataset, str):
            raise SatlibError(f"{path}: datasets holds {dataset!r}, expected names of data sets")
    notebooks = content.get("notebooks", {})
    stems = notebook_paths()
    for stem, values in notebooks.items():
        if stem not in stems:
            raise SatlibError(f"{path}: notebooks: unknown notebook {stem!r}{nearest(str(stem), stems)}")
        if not isinstance(values, dict):
            raise SatlibError(f"{path}: notebooks: {stem} is {values!r}, expected parameters as `name: value`")
    return Profile(
        name=name,
        description=content["description"].strip(),
        hardware=content["hardware"].strip(),
        time=content["time"].strip(),
        datasets=tuple(content["datasets"]),
        common=content.get("common", {}),
        notebooks=notebooks,
        path=path,
    )


def _read_yaml(path: Path) -> object:
    """What the YAML file holds; a key given twice is an error (YAML would keep the last one)."""
    import yaml  # here, so that unknown profiles and notebooks are told before anything is installed

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for index, key in enumerate(keys):
                if key in keys[:index]:
                    raise SatlibError(
                        f"{path}, line {node.value[index][0].start_mark.line + 1}: {key!r} is given twice"
                    )
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SatlibError(f"{path} is not valid YAML: {error}") from error


# --- parameters


def declared(path: Path) -> dict[str, Parameter]:
    """The parameters that the notebook at `path` declares in its tagged cells, in order.

    papermill sets the given values after the one cell tagged `parameters`; those tagged `earlier-parameters`
    are above it. Raises `SatlibError` if a tagged cell is below it or holds anything but `name: type = literal`,
    for a default of another type, and for a parameter that is declared twice.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise SatlibError(f"{path} is not a notebook: {error}") from error
    tags = [cell.get("metadata", {}).get("tags", []) for cell in cells]
    tagged = [i for i in range(len(cells)) if {"parameters", "earlier-parameters"}.intersection(tags[i])]
    if tagged and [i for i in tagged if "parameters" in tags[i]] != tagged[-1:]:
        raise SatlibError(
            f"{path}: expected one cell tagged `parameters`, below all that are tagged `earlier-parameters`"
        )
    found: dict[str, Parameter] = {}
    for statement in (line for i in tagged for line in _statements(path, "".join(cells[i]["source"]))):
        parameter = _parameter(path, statement)
        if parameter.name in found:
            raise SatlibError(f"{path}: the parameter `{parameter.name}` is declared twice")
        found[parameter.name] = parameter
    return found


def _statements(path: Path, source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except SyntaxError as error:
        raise SatlibError(f"{path}: the parameters cell is not valid Python: {error}") from error


def _parameter(path: Path, statement: ast.stmt) -> Parameter:
    if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value):
        raise SatlibError(
            f"{path}: the parameters cell holds `{ast.unparse(statement)}`, expected `name: type = literal`"
        )
    name, annotation = statement.target.id, ast.unparse(statement.annotation)
    try:
        type_ = eval(annotation, {"__builtins__": {}}, dict(_TYPES))
        written = ast.literal_eval(statement.value)
        default = _convert(written, type_)
        if repr(written) != repr(default):
            raise ValueError(f"write {default!r}")
    except (NameError, AttributeError, SyntaxError, TypeError, ValueError) as error:
        raise SatlibError(
            f"{path}: the parameter `{ast.unparse(statement)}` is not a literal of a plain type "
            f"({', '.join(_TYPES)}, list[...], dict[...], `| None`): {error}"
        ) from error
    return Parameter(name, annotation, type_, default)


def parameters_for(profile: Profile, stem: str, declarations: dict[str, Parameter]) -> dict[str, object]:
    """The values that `profile` gives to the notebook `stem`, each checked against its declaration.

    `common` values go to the notebooks that declare them; the notebook's own values win. `profile` is the
    profile's name, for the notebooks that declare it. Raises `SatlibError` for an unknown parameter and for
    a value of another type, naming notebook, parameter and the nearest name.
    """
    own = profile.notebooks.get(stem, {})
    values = {name: value for name, value in profile.common.items() if name in declarations} | own
    checked: dict[str, object] = {}
    for name, value in values.items():
        if name not in declarations:
            raise SatlibError(f"{profile.path}: {stem} has no parameter {name!r}{nearest(str(name), declarations)}")
        parameter = declarations[name]
        try:
            checked[name] = _convert(value, parameter.type)
        except TypeError as error:
            raise SatlibError(
                f"{profile.path}: {stem}: {name} is {value!r}, expected {parameter.annotation} "
                f"(like its default {parameter.default!r}): {error}"
            ) from error
    if "profile" in declarations:
        checked["profile"] = profile.name
    return checked


def changed(values: dict[str, object], declarations: dict[str, Parameter]) -> dict[str, object]:
    """Those of a notebook's checked `values` that are not its own defaults."""
    return {name: value for name, value in values.items() if repr(value) != repr(declarations[name].default)}


def check_common(profile: Profile, declarations: dict[str, dict[str, Parameter]]) -> None:
    """Raises `SatlibError` for a common parameter that no notebook declares: a slip of the pen."""
    names = {name for parameters in declarations.values() for name in parameters}
    for name in profile.common:
        if name not in names:
            raise SatlibError(
                f"{profile.path}: common: no notebook has a parameter {name!r}{nearest(str(name), names)}"
            )


def _convert(value: typing.Any, wanted: typing.Any) -> typing.Any:
    """`value` as the type `wanted`, changing int to float only. Raises `TypeError` if it does not fit."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is types.UnionType:
        for choice in sorted(arguments, key=lambda choice: choice is not type(value)):
            try:
                return _convert(value, choice)
            except TypeError:
                continue
    elif wanted is float and type(value) is int:
        return float(value)
    elif origin is list and isinstance(value, list):
        return [_convert(item, arguments[0]) for item in value]
    elif origin is dict and isinstance(value, dict):
        return {_convert(key, arguments[0]): _convert(item, arguments[1]) for key, item in value.items()}
    elif type(value) is (types.NoneType if wanted is None else wanted):
        return value
    hint = ""
    if isinstance(value, str) and wanted is float:
        hint = " (YAML reads 1e-3 as text: write 1.0e-3)"
    raise TypeError(f"{value!r} is a {type(value).__name__}{hint}")
