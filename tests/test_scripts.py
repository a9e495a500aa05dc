"""run_all.sh and run_tests.sh: complete help, one clear line for what cannot be done, and a careful set-up."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_project import code, parameters, text, write_project

from satlib.cli import main

CHECKOUT = Path(__file__).resolve().parent.parent
SCRIPTS = ["run_all.sh", "run_tests.sh"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the scripts need, with a tiny notebook in place of the real ones."""
    root = tmp_path_factory.mktemp("checkout")
    cells = [text("# Tiny"), parameters("n: int = 1"), code("print(n)")]
    write_project(root, {"00_tiny": cells})
    for name in [*SCRIPTS, "pyproject.toml", "constraints.txt"]:
        shutil.copy(CHECKOUT / name, root)
    for name in ("tools", "satlib"):
        shutil.copytree(CHECKOUT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def call(root: Path, *command: str, **changes: str) -> subprocess.CompletedProcess:
    """Runs a script of `root` with this Python, which has everything that is needed."""
    hidden = {"SATLIB_DATA", "SATLIB_HOME", "SATLIB_STARTED", "PYTHONPATH"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PYTHON": sys.executable} | changes
    return subprocess.run(
        ["bash", *command], cwd=root, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def assert_refused(done: subprocess.CompletedProcess, expected: str) -> None:
    """Exit status 2, nothing printed, one line that says what is wrong."""
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"satlib: .+\n", done.stderr), done.stderr
    assert re.search(expected, done.stderr), done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_is_complete_and_needs_no_python(checkout, script, option):
    done = call(checkout, script, "--nonsense", option, PYTHON="/nowhere")
    assert (done.returncode, done.stderr) == (0, "")
    for section in (f"Usage: ./{script}", "Options", "Environment variables", "SATLIB_DATA", "PYTHON", "Exit status"):
        assert section in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_help_of_run_all_lists_what_there_is(checkout, capsys):
    shown = call(checkout, "run_all.sh", "--help").stdout
    for part in (
        "  quick           tiny notebooks\n",
        "  00_tiny\n",
        "notebooks/executed/P/",
        "Examples",
        "SATLIB_HOME",
    ):
        assert part in shown
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    options = set(re.findall(r"--[a-z]+", capsys.readouterr().out)) - {"--check"}  # which run_all.sh uses itself
    assert options == set(re.findall(r"--[a-z]+", shown))


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_valid_for_bash(script):
    assert subprocess.run(["bash", "-n", CHECKOUT / script]).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--bogus"], "--bogus"),
        (["notebook"], "notebook"),
        (["--prof", "quick"], "--prof"),
        (["--profile"], "--profile: expected one argument"),
        (["--profile", "qick"], "unknown profile 'qick'; did you mean 'quick'"),
        (["--only", "07"], "unknown notebook '07'; .* 00_tiny"),
        (["--only", "00,tiny"], "unknown notebook 'tiny'"),
        (["--budget", "soon"], "'soon' is not a time; expected for example 9m"),
    ],
)
def test_wrong_requests(checkout, arguments, expected):
    assert_refused(call(checkout, "run_all.sh", *arguments), expected)


def test_wrong_option_of_run_tests(checkout):
    assert_refused(call(checkout, "run_tests.sh", "--quick"), "unknown option --quick")


def test_missing_data_root(checkout):
    assert_refused(call(checkout, "run_all.sh", SATLIB_DATA="/nowhere"), "SATLIB_DATA is /nowhere, expected a folder")


def test_folder_in_which_nothing_can_be_written(checkout):
    blocked = checkout / "notebooks" / "executed"
    shutil.rmtree(blocked, ignore_errors=True)
    blocked.write_text("a file where the folder should be")
    try:
        assert_refused(call(checkout, "run_all.sh"), r"cannot write to .*executed/quick \(.+\)")
    finally:
        blocked.unlink()


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_python_to_be_found(checkout, script, tmp_path):
    for tool in ("bash", "cat", "date", "dirname", "env"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    old = tmp_path / "python3"
    old.write_text("#!/bin/bash\nexit 1\n")  # as a Python of another version answers
    old.chmod(0o755)
    assert_refused(call(checkout, script, PYTHON="", PATH=str(tmp_path)), "no Python 3.11 or 3.12 with venv found")
    assert_refused(call(checkout, script, PYTHON=str(old)), "PYTHON is .*python3, expected a Python 3.11 or 3.12")


def test_request_is_checked_with_nothing_installed(checkout):
    command = [sys.executable, "-I", "-S", "-c"]  # no site-packages at all
    program = f"import sys; sys.path.insert(0, {str(checkout)!r}); from satlib.cli import main; sys.exit(main())"
    for arguments, status in ((["--profile", "quick"], 0), (["--only", "07"], 2)):
        done = subprocess.run([*command, program, "run", "--check", *arguments], capture_output=True, text=True)
        assert done.returncode == status, done.stderr
    done = subprocess.run([*command, program, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_run_all_with_an_environment_that_serves(checkout):
    done = call(checkout, "run_all.sh", "--only", "00")
    assert done.returncode == 0, done.stderr
    assert "profile quick: tiny notebooks" in done.stdout
    assert (checkout / "notebooks" / "executed" / "quick" / "00_tiny.html").is_file()
    assert not (checkout / ".venv").exists()


# --- the set-up, without installing anything


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """tools/environment.py for a project in `tmp_path`."""
    specification = importlib.util.spec_from_file_location("environment", CHECKOUT / "tools" / "environment.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    (tmp_path / "pyproject.toml").write_text(
        "[project]\n"
        "dependencies = ['pytest>=7']\n"
        "optional-dependencies = {a = ['PyYAML>=6'], b = ['nowhere-to-be-found']}\n"
    )
    (tmp_path / "constraints.txt").write_text("pytest==9.0\n")
    venv = tmp_path / ".venv"
    for name, path in {
        "ROOT": tmp_path,
        "VENV": venv,
        "PYTHON": venv / "bin" / "python",
        "STAMP": venv / "satlib.stamp",
        "LOG": venv / "setup.log",
    }.items():
        monkeypatch.setattr(module, name, path)
    return module


@pytest.fixture
def installed(environment, monkeypatch):
    """The extras that were asked for in each set-up; none of them does anything but leave a Python behind."""
    calls = []

    def set_up(extras: str) -> None:
        calls.append(extras)
        environment.PYTHON.parent.mkdir(exist_ok=True)
        environment.PYTHON.touch(mode=0o755)

    monkeypatch.setattr(environment, "set_up", set_up)
    return calls


def test_environment_that_serves_is_used_as_it_is(environment, capsys):
    environment.main("a")
    assert capsys.readouterr().out == f"{sys.executable}\n"
    assert not environment.VENV.exists()


def test_what_serves(environment):
    assert environment.serves(environment.requirements({"a"}))
    assert not environment.serves(environment.requirements({"a", "b"}))
    assert not environment.serves(["pytest>=1000"])


def test_stamp_makes_the_next_call_instant(environment, installed, capsys):
    for _ in range(2):
        environment.main("b,a")
    environment.main("b")
    assert installed == ["b,a"]
    assert capsys.readouterr().out == f"{environment.PYTHON}\n" * 3


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(environment, installed, file):
    environment.main("b")
    with (environment.ROOT / file).open("a") as project:
        project.write("# changed\n")
    environment.main("b")
    assert installed == ["b", "b"]


def test_more_extras_or_a_lost_python_are_installed(environment, installed):
    environment.main("b")
    environment.main("a,b")
    environment.PYTHON.unlink()
    environment.main("b")
    assert installed == ["b", "a,b", "b"]


def test_interrupted_set_up_is_not_stamped(environment, installed, monkeypatch):
    def interrupted(extras: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(environment, "set_up", interrupted)
        environment.main("b")
    environment.main("b")
    assert installed == ["b"]


def test_half_installed_packages_are_dropped(environment):
    packages = environment.VENV / "lib" / "python3.12" / "site-packages"
    for name in ("whole-1.dist-info", "half-1.dist-info"):
        (packages / name).mkdir(parents=True)
        (packages / name / "METADATA").touch()
    (packages / "whole-1.dist-info" / "INSTALLER").touch()
    environment.drop_half_installed()
    assert [path.name for path in packages.iterdir()] == ["whole-1.dist-info"]


def test_too_little_disk_for_the_set_up(environment, installed, monkeypatch, capsys):
    usage = shutil.disk_usage(environment.ROOT)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: usage._replace(free=3e9))
    with pytest.raises(SystemExit) as caught:
        environment.main("b")
    assert caught.value.code == 2
    assert re.fullmatch(r"satlib: 3\.0 GB free on the disk of .*, expected 8 GB .*\n", capsys.readouterr().err)
    assert not environment.VENV.exists()
    assert installed == []


def test_environment_cannot_be_written(environment, installed, capsys):
    environment.VENV.write_text("a file where the folder should be")
    with pytest.raises(SystemExit) as caught:
        environment.main("b")
    assert caught.value.code == 2
    assert re.fullmatch(r"satlib: cannot write to .*\.venv \(.+\); .*\n", capsys.readouterr().err)


def test_failing_installation_shows_the_end_of_its_log(environment, capsys):
    environment.VENV.mkdir()
    script = "for number in range(50): print('line', number)\nraise SystemExit(1)"
    with pytest.raises(SystemExit) as caught:
        environment.call([sys.executable, "-c", script], 0.0)
    assert caught.value.code == 1
    errors = capsys.readouterr().err
    assert "line 49\n" in errors
    assert "line 20\n" not in errors
    assert errors.endswith(
        f"setting up {environment.VENV} failed; the end of {environment.LOG} is above. The same command tries again\n"
    )


def test_installation_tells_how_far_it_is(environment, monkeypatch, capsys):
    environment.VENV.mkdir()
    monkeypatch.setattr(environment, "EVERY_SECONDS", 0.05)
    script = "import time\nprint('Collecting torch==2', flush=True)\ntime.sleep(1)"
    environment.call([sys.executable, "-c", script], environment.time.monotonic())
    assert "satlib: 0 s: Collecting torch==2\n" in capsys.readouterr().err
