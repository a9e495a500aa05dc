"""Profiles and parameters are checked before anything runs, and what is wrong is named."""

import nbformat
import pytest
from tiny_project import PROFILE, code, parameters, text, write_notebook, write_project

from satlib.errors import SatlibError
from satlib.study import profiles

DECLARED = (
    "profile: str = 'none'\n"
    "epochs: int = 4  # why\n"
    "eps: float = 8.0\n"
    "sharedness: list[int] = [1, 8]\n"
    "limit: int | None = None\n"
    "augment: bool = True\n"
    "weights: dict[str, float] = {'a': 1.0}"
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose profile is what the test appends to the common start."""
    monkeypatch.setenv("SATLIB_HOME", str(tmp_path))
    cells = [text("# One"), parameters(DECLARED), code("print(epochs)")]
    write_project(tmp_path, {"01_one": cells, "02_two": [text("# Two")]})

    def with_profile(addition: str, start: str = PROFILE) -> dict[str, object]:
        (tmp_path / "notebooks" / "profiles" / "quick.yaml").write_text(start + addition)
        profile = profiles.load("quick")
        declared = {stem: profiles.declared(path) for stem, path in profiles.notebook_paths().items()}
        profiles.check_common(profile, declared)
        return profiles.parameters_for(profile, "01_one", declared["01_one"])

    return with_profile


def test_values_reach_the_notebook_with_their_types(project):
    given = project("common: {epochs: 2, eps: 3}\nnotebooks:\n  01_one: {epochs: 7, limit: 5, sharedness: [64]}\n")
    assert given == {"epochs": 7, "eps": 3.0, "limit": 5, "sharedness": [64], "profile": "quick"}
    assert type(given["eps"]) is float  # 3 and 3.0 would name different runs
    assert project("common: {limit: null}\n") == {"limit": None, "profile": "quick"}
    assert project("") == {"profile": "quick"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("epochs: 2.0", "expected int (like its default 4)"),
        ("epochs: true", "True is a bool"),
        ("epochs: '3'", "'3' is a str"),
        ("epochs: null", "None is a NoneType"),
        ("eps: 1e-3", "write 1.0e-3"),
        ("eps: true", "True is a bool"),
        ("augment: 1", "expected bool"),
        ("sharedness: 8", "expected list[int]"),
        ("sharedness: [8, a]", "'a' is a str"),
        ("limit: many", "expected int | None"),
        ("weights: {a: b}", "expected dict[str, float]"),
    ],
)
def test_value_of_another_type_is_refused(project, value, expected):
    with pytest.raises(SatlibError) as caught:
        project(f"notebooks:\n  01_one: {{{value}}}\n")
    assert expected in str(caught.value)
    assert f"01_one: {value.partition(':')[0]} is" in str(caught.value)


@pytest.mark.parametrize(
    ("addition", "expected"),
    [
        ("notebooks:\n  01_one: {epoch: 1}\n", "01_one has no parameter 'epoch'; did you mean 'epochs'?"),
        ("common: {epoch: 1}\n", "common: no notebook has a parameter 'epoch'; did you mean 'epochs'?"),
        ("notebooks:\n  01_won: {}\n", "unknown notebook '01_won'; did you mean '01_one'?"),
        ("notebook: {}\n", "unknown key 'notebook'; did you mean 'notebooks'?"),
        ("notebooks: [1]\n", "notebooks is [1], expected a dict"),
        ("notebooks: {01_one: 3}\n", "01_one is 3, expected parameters"),
        ("common: {epochs: 1, epochs: 2}\n", "line 5: 'epochs' is given twice"),
        ("common: {epochs: 1\n", "is not valid YAML"),
    ],
)
def test_slips_in_a_profile_are_named(project, addition, expected):
    with pytest.raises(SatlibError) as caught:
        project(addition)
    assert expected in str(caught.value)
    assert "quick.yaml" in str(caught.value)


@pytest.mark.parametrize("key", ["description", "hardware", "time", "datasets"])
def test_missing_key_is_named(project, key):
    start = "".join(line for line in PROFILE.splitlines(keepends=True) if not line.startswith(key))
    with pytest.raises(SatlibError, match=f"the key '{key}' is missing"):
        project("", start)


def test_profile_holds_what_the_file_says(project):
    project("common: {epochs: 2}\n")
    profile = profiles.load("quick")
    assert (profile.name, profile.description, profile.datasets) == ("quick", "tiny notebooks", ("shapes32",))
    assert profile.common == {"epochs": 2}


def test_unknown_profile_suggests_the_nearest(project):
    with pytest.raises(SatlibError, match=r"unknown profile 'qick' in .*; did you mean 'quick'\?"):
        profiles.load("qick")
    with pytest.raises(SatlibError, match=r"unknown profile '\.\./quick'"):
        profiles.load("../quick")


@pytest.mark.parametrize(
    "source",
    [
        "epochs = 4",
        "epochs: int = 2 + 2",
        "import os",
        "epochs: int",
        "epochs: int = 'four'",
        "eps: float = 8",
        "size: tuple = (1, 2)",
    ],
)
def test_parameters_cell_holds_annotated_literals_alone(tmp_path, monkeypatch, source):
    monkeypatch.setenv("SATLIB_HOME", str(tmp_path))
    write_project(tmp_path, {"01_one": [parameters(source)]})
    with pytest.raises(SatlibError, match=r"01_one\.ipynb: the parameter"):
        profiles.declared(tmp_path / "notebooks" / "01_one.ipynb")


def test_what_a_profile_changes_is_told_from_the_defaults(project):
    declared = profiles.declared(profiles.notebook_paths()["01_one"])
    given = project("notebooks:\n  01_one: {epochs: 4, eps: 8, sharedness: [1], augment: true}\n")
    assert profiles.changed(given, declared) == {"sharedness": [1], "profile": "quick"}


def test_parameters_may_begin_in_earlier_cells(tmp_path):
    path = tmp_path / "01_one.ipynb"
    earlier = parameters("# Training\nepochs: int = 4", "earlier-parameters")
    write_notebook(path, text("# One"), earlier, parameters("eps: float = 8.0"), code("print(epochs)"))
    assert {name: parameter.default for name, parameter in profiles.declared(path).items()} == {"epochs": 4, "eps": 8.0}
    for cells in (
        [earlier],
        [parameters("eps: float = 8.0"), earlier],
        [parameters("a: int = 1"), parameters("b: int = 1")],
    ):
        write_notebook(path, *cells)
        with pytest.raises(SatlibError, match=r"01_one\.ipynb: expected one cell tagged `parameters`"):
            profiles.declared(path)
    write_notebook(path, earlier, parameters("epochs: int = 5"))
    with pytest.raises(SatlibError, match=r"the parameter `epochs` is declared twice"):
        profiles.declared(path)


def test_no_cell_of_a_notebook_is_longer_than_25_lines():
    for path in profiles.notebook_paths().values():
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                assert len(cell.source.splitlines()) <= 25, f"{path.name}: {cell.id}"


def test_damaged_notebook_is_named(tmp_path):
    path = tmp_path / "01_one.ipynb"
    path.write_text('{"cells": ')
    with pytest.raises(SatlibError, match=r"01_one\.ipynb is not a notebook"):
        profiles.declared(path)
