"""Settings flow one way, and what is wrong in them is named before anything runs."""

import ast
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import nbformat
import pytest

from satlib import paper
from satlib.errors import SatlibError
from satlib.study import measurements
from satlib.study import settings as module
from satlib.study.settings import NOTEBOOKS, SECTIONS, load, profile_paths, settings

START = "description: tiny\nhardware: any\ntime: seconds\n"
NOTEBOOK_PATHS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("[0-9][0-9]_*.ipynb"))
ALL = [pytest.param(path, id=path.stem) for path in NOTEBOOK_PATHS]
WITH_SETTINGS = [pytest.param(path, id=path.stem) for path in NOTEBOOK_PATHS if path.stem in NOTEBOOKS]


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """The settings of a section under a profile whose file is what the test appends to the common start."""
    monkeypatch.setenv("SATLIB_HOME", str(tmp_path))
    (tmp_path / "profiles").mkdir()

    def of(sections: str, section: str = "6.1", start: str = START, **changes: object):
        (tmp_path / "profiles" / "quick.yaml").write_text(start + sections)
        return settings(section, "quick", **changes)

    return of


# What a profile and a reader change


def test_values_arrive_with_their_types(profile):
    of = profile('sections:\n  "6.1": {steps: 3, gamma: 1, sharedness: [4], points: [[8, 10, 0.7]], search: k-ary}\n')
    assert (of.steps, of.gamma, of.sharedness, of.search) == (3, 1.0, (4,), "k-ary")
    assert type(of.gamma) is float  # 3 and 3.0 would name different runs
    assert of.points == ((8, 10.0, 0.7),) and type(of.points[0][1]) is float
    assert of == replace(paper.CIFAR10, steps=3, gamma=1.0, sharedness=(4,), points=of.points, search="k-ary")


def test_what_a_profile_leaves_out_is_the_paper_s(profile):
    assert profile("sections: {}\n") == paper.CIFAR10
    assert profile('sections: {"6.2": {steps: 3}}\n') == paper.CIFAR10


def test_a_reader_s_changes_come_last_and_none_changes_nothing(profile):
    text = 'sections: {"6.1": {steps: 3, width: 16}}\n'
    of = profile(text, steps=5, width=None, points=[[1, 2.0, 0.5]])
    assert (of.steps, of.width, of.points) == (5, 16, ((1, 2.0, 0.5),))


def test_sections_3_to_5_share_the_models_of_section_6_1(profile):
    of = profile('sections: {"6.1": {width: 16, steps: 3}, method: {steps: 2, eps: 8}}\n', "method")
    assert (of.width, of.steps, of.eps) == (16, 2, 8.0) and isinstance(of, paper.Method)


def test_the_paper_profile_is_the_paper():
    for section, stated in SECTIONS.items():
        assert settings(section, "paper") == stated
    assert load("paper").sections == {} and len(module.profile_path("paper").read_text().splitlines()) <= 30
    assert len(measurements.plan("6.1", "paper").models) == 9 * 4 * 3
    assert len(measurements.plan("6.3", "paper").epochs) == 20


@pytest.mark.parametrize("name", ["quick", "laptop", "gpu", "paper"])
def test_profiles_hold_only_what_differs(name):
    for section, changes in load(name).sections.items():
        chosen, base = settings(section, name), SECTIONS[section]
        below = settings(module.BUILDS_ON[section], name) if section in module.BUILDS_ON else base
        for key in changes:
            default = getattr(below if hasattr(below, key) else base, key)
            assert getattr(chosen, key) != default, f"{name}: {section}: {key} is no change"


@pytest.mark.parametrize("wanted", [paper.CIFAR10, paper.IMAGENET, paper.CITYSCAPES])
def test_differences_say_whose_the_other_value_is(wanted):
    assert paper.differences(wanted) == [] and set(wanted.unstated.split()) <= vars(wanted).keys()
    rows = paper.differences(replace(wanted, delta=0.5, seed=3, points=((1, 2.0, 0.5),)))
    assert {row["setting"]: row["whose choice"] for row in rows} == {"delta": "the paper's", "seed": "ours"} | {
        "points": "the paper's"
    }
    assert {row["setting"]: row["this run"] for row in rows}["delta"] == "0.5"


# What is wrong is named


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("erm_epochs: 2.0", "2.0 is a float"),
        ("erm_epochs: true", "True is a bool"),
        ("erm_epochs: '3'", "'3' is a str"),
        ("erm_epochs: null", "None is a NoneType"),
        ("gamma: 1e-3", "write 1.0e-3"),
        ("gamma: true", "True is a bool"),
        ("search: 1", "expected something like 'binary'"),
        ("sharedness: 8", "expected something like (1, 8, 64)"),
        ("sharedness: [8, a]", "'a' is a str"),
        ("points: [[8, 10.0]]", "[8, 10.0] has 2 entries, expected 3"),
        ("baselines: [[8.0, DeepFool UAD]]", "8.0 is a float"),
    ],
)
def test_a_value_of_another_type_is_refused(profile, value, expected):
    with pytest.raises(SatlibError) as caught:
        profile(f'sections:\n  "6.1": {{{value}}}\n')
    name = value.partition(":")[0]
    assert expected in str(caught.value) and f"profile 'quick', section 6.1: {name} is" in str(caught.value)


def test_a_reader_s_wrong_change_is_named(profile):
    with pytest.raises(SatlibError, match=r"section 6\.1: there is no setting 'widht'; did you mean 'width'\?"):
        profile("sections: {}\n", widht=3)
    with pytest.raises(SatlibError, match=r"section 6\.1: width is 'wide', expected something like 64"):
        profile("sections: {}\n", width="wide")
    with pytest.raises(SatlibError, match=r"unknown section '6\.4'; did you mean '6\.3'\?"):
        profile("sections: {}\n", "6.4")


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ('sections: {"6.1": {erm_epoch: 1}}\n', "there is no setting 'erm_epoch'; did you mean 'erm_epochs'?"),
        ('sections: {"6.4": {}}\n', "unknown section '6.4'; did you mean '6.3'?"),
        ("section: {}\n", "unknown key 'section'; did you mean 'sections'?"),
        ("sections: [1]\n", "sections is [1], expected a dict"),
        ('sections: {"6.1": 3}\n', "6.1 is 3, expected settings"),
        ('sections: {"6.1": {seed: 1, seed: 2}}\n', "line 4: 'seed' is given twice"),
        ('sections: {"6.1": {seed: 1\n', "is not valid YAML"),
    ],
)
def test_slips_in_a_profile_are_named(profile, sections, expected):
    with pytest.raises(SatlibError) as caught:
        profile(sections)
    assert expected in str(caught.value) and "quick" in str(caught.value)


@pytest.mark.parametrize("key", ["description", "hardware", "time", "sections"])
def test_a_missing_key_is_named(profile, key):
    lines = (START + "sections: {}\n").splitlines(keepends=True)
    with pytest.raises(SatlibError, match=f"the key '{key}' is missing"):
        profile("", start="".join(line for line in lines if not line.startswith(key)))


def test_an_unknown_profile_suggests_the_nearest():
    with pytest.raises(SatlibError, match=r"unknown profile 'qick'; did you mean 'quick'\?"):
        load("qick")
    with pytest.raises(SatlibError, match=r"unknown profile '\.\./quick'"):
        load("../quick")
    assert list(profile_paths()) == ["gpu", "laptop", "paper", "quick"]


def test_data_sets_are_those_of_the_notebooks_asked_for():
    assert module.datasets("laptop", ["04_cifar10"]) == ["cifar10"]
    assert module.datasets("laptop", ["05_imagenet"]) == ["imagenet200", "imagenet200:20"]
    assert module.datasets("laptop", ["09_can_we_trust_it"]) == module.datasets("laptop", NOTEBOOKS)
    assert module.datasets("quick", ["00_start_here"]) == []


# Notebooks


def cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def parameters(path: Path) -> str:
    (source,) = [cell.source for cell in cells(path) if "parameters" in cell.metadata.get("tags", [])]
    return source


def assigned(source: str) -> set[str]:
    """Names that running the source binds in its own scope."""

    class Binds(ast.NodeVisitor):
        def __init__(self) -> None:
            self.names: set[str] = set()

        def visit_FunctionDef(self, node):
            self.names.add(node.name)

        visit_ClassDef = visit_FunctionDef

        def visit_Lambda(self, node):
            pass

        def visit_GeneratorExp(self, node):
            pass

        visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp

        def visit_Name(self, node):
            if not isinstance(node.ctx, ast.Load):
                self.names.add(node.id)

        def visit_Import(self, node):
            self.names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}

        visit_ImportFrom = visit_Import

    binds = Binds()
    binds.visit(ast.parse(source))
    return binds.names


@pytest.mark.parametrize("path", WITH_SETTINGS)
def test_running_any_cell_again_changes_no_setting(path):
    """Run the cells that make the settings, let all other cells bind their names to something else, and run them again.

    The parameters' cell is run once: a reader runs any cell again, in any order.
    """
    making = [cell.source for cell in cells(path) if "measurements.settings(" in cell.source]
    assert len(making) == (path.stem != "08_teaser"), "one cell makes settings; notebook 08 has plans alone"
    for source in making:
        statements = [node for node in ast.parse(source).body if isinstance(node, ast.Assign | ast.AugAssign)]
        last = max(i for i, node in enumerate(statements) if "measurements.settings(" in ast.unparse(node))
        code = "\n".join(map(ast.unparse, statements[: last + 1]))
        given = {"measurements": measurements}
        exec(parameters(path), given)
        exec(code, given)
        first = {name: given[name] for name in assigned(code)}
        for other in (cell.source for cell in cells(path) if cell.source not in (source, parameters(path))):
            assert "globals()" not in other and not assigned(other) & first.keys()
            given |= dict.fromkeys(assigned(other) - {"measurements"}, "something else")
        exec(code, given)
        assert {name: given[name] for name in first} == first


@pytest.mark.parametrize("path", ALL)
def test_parameter_cells_are_short_and_cells_are_not_long(path):
    assert len(parameters(path).splitlines()) <= 15
    for cell in cells(path):
        assert len(cell.source.splitlines()) <= 25, f"{path.name}: {cell.id}"


@pytest.mark.parametrize("path", WITH_SETTINGS)
def test_parameters_are_settings_whose_profile_s_value_stays_unless_they_are_given(path):
    """The cell declares `profile`, and where there is more `changes` and settings of the section that are None."""
    declared = {node.target.id: ast.literal_eval(node.value) for node in ast.parse(parameters(path)).body}
    names = {field.name for section in NOTEBOOKS[path.stem] for field in fields(SECTIONS[section])}
    assert declared.pop("profile") == "quick" and declared.pop("changes", {}) == {}
    assert declared.keys() <= names and set(declared.values()) <= {None} and len(declared) <= 8
    assert all(f'"{name}": {name}' in "".join(cell.source for cell in cells(path)) for name in declared)


@pytest.mark.parametrize("path", ALL)
def test_papermill_knows_every_parameter(path):
    """Also those with a default of None: they are listed by `--help-notebook`, and set without a warning."""
    papermill = pytest.importorskip("papermill")
    known = papermill.inspect_notebook(str(path))
    assert list(known) == [node.target.id for node in ast.parse(parameters(path)).body]
    assert all(each["inferred_type_name"] != "None" for each in known.values())


def test_profiles_and_notebooks_are_known_without_packages(tmp_path):
    """`run_all.sh` checks a request before anything is installed."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'numpy', 'yaml', 'pandas'))\n"
        "from satlib.study.settings import profile_paths; import json; print(json.dumps(list(profile_paths())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["gpu", "laptop", "paper", "quick"]
