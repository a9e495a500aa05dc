"""The house: kernels above, the study below, and arrows that go one way."""

import ast
import subprocess
import sys
from pathlib import Path

import satlib

ROOT = Path(satlib.__file__).parent
COMMANDS = {"satlib.__main__", "satlib.cli"}  # which need both, inside functions


def modules() -> dict[str, Path]:
    """Every module of satlib by its name."""
    names = {path: path.relative_to(ROOT.parent).with_suffix("").parts for path in ROOT.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of satlib that a file imports anywhere in it: in functions and for types alone, too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (below & known.keys()) | ({node.module} if below - known.keys() else set())
    return names & known.keys()


def test_nothing_above_imports_the_study():
    known = modules()
    for name in known.keys() - COMMANDS:
        if not name.startswith("satlib.study"):
            wrong = {each for each in imported(known[name], known) if each.startswith("satlib.study")}
            assert not wrong, f"{name} imports {wrong}"


def test_no_imports_go_in_a_circle():
    known = modules()
    arrows = {name: imported(path, known) - {name} for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join((*way, name))}"
        if name not in done:
            for other in arrows[name]:
                visit(other, (*way, name))
            done.add(name)

    for name in known:
        visit(name, ())


def test_attacks_need_little():
    code = "import sys, satlib.attacks; print(*sorted(name for name in sys.modules if name.startswith('satlib')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {name for name in loaded if name.startswith("satlib.data")} <= {
        "satlib.data",
        "satlib.data.datasets",
        "satlib.data.imageset",
    }
    assert not any(name.startswith(("satlib.study", "satlib.bench")) for name in loaded) and len(loaded) <= 12
