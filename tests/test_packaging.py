"""The files that say what satlib needs agree with each other, and the citation can be read."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import satlib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {extra: [Requirement(line) for line in lines] for extra, lines in PROJECT["optional-dependencies"].items()}
DIRECT = CORE + [requirement for requirements in EXTRAS.values() for requirement in requirements]
PINS = {}
for line in (ROOT / "constraints.txt").read_text().splitlines():
    if line and not line.startswith("#"):
        pin = Requirement(line)
        PINS[canonicalize_name(pin.name)] = pin


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_direct_dependency_is_pinned_within_its_bounds(requirement):
    pin = PINS[canonicalize_name(requirement.name)]
    (version,) = (Version(specifier.version) for specifier in pin.specifier)
    assert requirement.specifier, f"{requirement.name} has no lower bound in pyproject.toml"
    assert version in requirement.specifier


def test_pins_are_exact_and_unique():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in ("", "#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+", line) for line in lines)
    assert len(lines) == len(PINS) > len(DIRECT)


def test_core_needs_no_notebook_or_test_tools():
    core = {canonicalize_name(requirement.name) for requirement in CORE}
    for extra in ("notebooks", "test"):
        assert core.isdisjoint(canonicalize_name(requirement.name) for requirement in EXTRAS[extra])


def test_python_and_torch_versions():
    supported = SpecifierSet(PROJECT["requires-python"])
    assert [minor for minor in range(8, 20) if f"3.{minor}.5" in supported] == [11, 12]
    (torch,) = [requirement for requirement in CORE if requirement.name == "torch"]
    assert Version("2.10.0") in torch.specifier
    assert Version("2.9.1") not in torch.specifier


def test_environment_file_installs_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    (python,) = [entry.partition("=")[2] for entry in conda if entry.startswith("python=")]
    assert f"{python}.5" in SpecifierSet(PROJECT["requires-python"])
    assert "pip" in conda
    assert pip[0] == "-c constraints.txt"
    (editable,) = [entry for entry in pip if entry.startswith("-e ")]
    assert set(re.fullmatch(r"-e \.\[(.+)\]", editable)[1].split(",")) == set(EXTRAS)
    for entry in (entry for entry in [*conda, *pip] if re.match(r"[\w.-]+==?\d", entry)):
        name, _, version = entry.partition("=")
        if name != "python":  # anything else that is named must be what constraints.txt says
            assert version.lstrip("=") in PINS[canonicalize_name(name)].specifier


def test_files_name_no_package_index():
    for name in ("pyproject.toml", "constraints.txt", "environment.yml", "run_all.sh", "run_tests.sh"):
        text = (ROOT / name).read_text()
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links|--trusted-host", text), name


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert satlib.__version__ == PROJECT["version"] == str(citation["version"])


def test_citation_names_software_and_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format demands
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["license"] == PROJECT["license"] == "MIT"
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["type"] == "conference-paper"
    assert paper["title"] == "Defending Against Universal Perturbations With Shared Adversarial Training"
    assert [author["family-names"] for author in paper["authors"]] == ["Mummadi", "Brox", "Metzen"]
    assert paper["year"] == 2019
    assert paper["conference"]["name"]  # an entity, of which the format demands a name


def test_licence_is_mit_by_the_contributors():
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License\n\nCopyright (c) 2026 satlib contributors\n")


def test_continuous_integration_runs_the_tests_of_the_readme():
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("exec ./run_tests.sh")
    for script in (".ci/run", "run_all.sh", "run_tests.sh"):
        assert (ROOT / script).stat().st_mode & 0o111, f"{script} is not executable"
