"""The notebooks are executed as the profile says, one failure does not stop the others, and progress is told."""

import contextlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from tiny_project import code, parameters, text, write_project

import satlib
from satlib.cli import budget, main
from satlib.errors import SatlibError
from satlib.paths import notebook_paths, select_notebooks
from satlib.study import measurements, notebooks, results
from satlib.study.notebooks import NotebookProgress
from satlib.study.runs import Runner

CHECKOUT = Path(satlib.__file__).resolve().parent.parent
GOOD = [
    text("# Good\n\n$\\varepsilon$"),
    parameters("profile: str = 'none'\nn: int = 1"),
    code(
        "import os, sys, satlib\n"
        "print('got', profile, n, float(os.environ['SATLIB_FORCE']) > 1e9, os.getcwd())\n"
        "print('python', sys.executable, satlib.__file__)\n"
        "print('[run] 1/2 training: 50%, 3 s left')\n"
        "print('not shown')"
    ),
]
FAILING = [
    text("# Failing"),
    code("1 + 1"),
    code("raise RuntimeError('out of luck\\nlast line')"),
    code("print('never')"),
]
DYING = [code("import os\nos._exit(9)")]
OUT_OF_TIME = [code("class BudgetSpent(Exception): pass\nraise BudgetSpent('call again')")]


def run(root: Path, **settings) -> tuple[int, str]:
    """The exit status of `notebooks.run` and what it printed, with what papermill had to say."""
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(logging.getLogger("papermill"), "handlers", [handler])
        patch.setenv("SATLIB_HOME", str(root))
        patch.delenv("SATLIB_DATA", raising=False)
        patch.setattr(results, "table", lambda profile: f"paper vs ours under {profile}")
        status = notebooks.run("quick", **settings)
    return status, printed.getvalue()


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """One execution of a good, a failing, a dying and another good notebook: folder, exit status, printed text."""
    root = tmp_path_factory.mktemp("project")
    notebooks = {"00_good": GOOD, "01_failing": FAILING, "02_dying": DYING, "03_good": GOOD}
    write_project(root, notebooks)
    status, printed = run(root, force=True)
    return root / "notebooks" / "executed" / "quick", status, printed


def outputs(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


def test_parameters_kernel_and_folder(executed):
    folder, _, _ = executed
    notebooks = folder.parent.parent
    assert f"got quick 1 True {notebooks}\n" in outputs(folder / "00_good.ipynb")
    assert f"got quick 1 True {notebooks}\n" in outputs(folder / "03_good.ipynb")
    assert f"python {sys.executable} {satlib.__file__}\n" in outputs(folder / "00_good.ipynb")


def test_failing_notebook_is_left_readable_and_the_others_run(executed):
    folder, status, printed = executed
    assert status == 1
    failing = nbformat.read(folder / "01_failing.ipynb", as_version=4)
    nbformat.validate(failing)
    (error,) = [output for cell in failing.cells for output in cell.get("outputs", []) if output.output_type == "error"]
    assert error.ename == "RuntimeError"
    assert error.traceback
    assert "out of luck" in (folder / "01_failing.html").read_text()
    assert "never" not in outputs(folder / "01_failing.ipynb")
    assert re.search(r"^  01_failing +failed .*  RuntimeError: last line$", printed, flags=re.MULTILINE)
    assert re.search(r"^  02_dying +failed .* DeadKernelError", printed, flags=re.MULTILINE)
    for stem in ("00_good", "03_good"):
        assert re.search(rf"^  {stem} +done", printed, flags=re.MULTILINE)
        assert "<mi>ε</mi>" in (folder / f"{stem}.html").read_text()


def test_the_report_has_a_page_for_each_notebook(executed):
    folder, _, printed = executed
    report = folder.parents[2] / "figures" / "quick" / "report"
    assert f"Report: {report / 'index.html'}\n" in printed
    stems = {"00_good", "01_failing", "02_dying", "03_good"}
    assert {page.stem for page in report.glob("*.html")} == {"index", *stems}


def test_progress_is_told(executed):
    _, _, printed = executed
    assert "[1/4] 00_good: starts\n" in printed
    assert "[4/4] 03_good: done after" in printed
    assert "  [run] 1/2 training: 50%, 3 s left\n" in printed
    assert "not shown" not in printed
    assert printed.count("unknown parameter: profile") == 2  # papermill's warning, of the notebooks that declare none
    assert printed.endswith("paper vs ours under quick\n")


def test_only_complete_executions_are_timed(executed):
    folder, _, _ = executed
    assert set(json.loads((folder / "timings.json").read_text())) == {"00_good", "03_good"}


def test_sources_and_settings_are_left_alone(executed):
    folder, _, _ = executed
    source = nbformat.read(folder.parent.parent / "00_good.ipynb", as_version=4)
    assert [cell.source for cell in source.cells] == [cell.source for cell in GOOD]
    assert "satlib" not in os.environ.get("JUPYTER_PATH", "")
    assert "SATLIB_FORCE" not in os.environ


def test_spent_budget_stops_cleanly(tmp_path):
    write_project(tmp_path, {"00_out": OUT_OF_TIME})
    status, printed = run(tmp_path, deadline=time.time() + 3600)
    assert status == 3
    assert re.search(r"00_out +stopped .* BudgetSpent: call again", printed)


def test_nothing_starts_after_the_deadline(tmp_path):
    write_project(tmp_path, {"00_good": GOOD})
    status, printed = run(tmp_path, deadline=time.time() - 1)
    assert status == 3
    assert re.search(r"00_good +not started", printed)
    assert not (tmp_path / "notebooks" / "executed" / "quick" / "00_good.ipynb").exists()


def test_formula_that_cannot_be_drawn_fails_the_notebook(tmp_path):
    write_project(tmp_path, {"00_wrong": [text("# Wrong\n\n$\\unknown$")]})
    status, printed = run(tmp_path)
    assert status == 1
    assert re.search(r"00_wrong +failed .* no HTML page: .*`# Wrong`", printed)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"6.1": {"m": 5}}, "there is no setting 'm'"),
        ({"6.1": {"depth": "5"}}, "section 6.1: depth is '5', expected something like 20"),
        ({"6.5": {}}, "unknown section '6.5'"),
    ],
)
def test_wrong_settings_stop_before_anything_runs(tmp_path, sections, expected):
    write_project(tmp_path, {"04_cifar10": GOOD}, sections)
    with pytest.raises(SatlibError, match=expected):
        run(tmp_path)
    assert list((tmp_path / "notebooks" / "executed" / "quick").iterdir()) == []


def test_data_of_the_notebooks_asked_for_must_be_there(tmp_path):
    write_project(tmp_path, {"00_a": GOOD, "04_cifar10": GOOD}, {"6.1": {"dataset": "cifar10"}})
    with pytest.raises(SatlibError, match="CIFAR-10"):
        run(tmp_path)
    assert run(tmp_path, only="00", force=True)[0] == 0


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("SATLIB_HOME", str(write_project(tmp_path, {"00_good": GOOD})))
    (tmp_path / "figures").write_text("in the way")
    with pytest.raises(SatlibError, match=r"cannot write to .*figures/quick \(.+\); make it writable"):
        notebooks.check("quick")


def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("SATLIB_HOME", str(write_project(tmp_path, {"00_good": GOOD})))
    usage = notebooks.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(notebooks.shutil, "disk_usage", lambda path: usage._replace(free=4e8))
    with pytest.raises(SatlibError, match=r"0\.4 GB free on the disk of .*, expected 1 GB"):
        notebooks.check("quick")


def test_interrupt_ends_the_kernel(tmp_path):
    slow = [code("import os, time\nprint(f'[run] {os.getpid()}', flush=True)\ntime.sleep(600)")]
    write_project(tmp_path, {"00_slow": [parameters("profile: str = 'none'"), *slow]})
    environment = os.environ | {"SATLIB_HOME": str(tmp_path), "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-m", "satlib", "run"]
    # A shell that runs this in the background has SIGINT ignored, which children inherit: a person's Ctrl-C is not.
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        kernel = next(int(line.split()[1]) for line in process.stdout if line.startswith("  [run]"))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.strip() == "satlib: stopped; the same command goes on from here"
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)


@pytest.mark.parametrize(("words", "seconds"), [("9m", 540), ("90s", 90), ("1h30m", 5400), ("1.5h", 5400)])
def test_budget_in_words(words, seconds):
    assert budget(words) == seconds


@pytest.mark.parametrize("words", ["", "9", "m", "9 m", "-9m", "0s", "9x", "1e3s"])
def test_wrong_budget_is_one_line(words, capsys):
    assert main(["run", f"--budget={words}"]) == 2
    errors = capsys.readouterr().err
    assert re.fullmatch(r"satlib: argument --budget: .* expected for example 9m, 90s or 1h30m; .*\n", errors)


def test_a_sweep_of_some_notebooks_needs_only_their_data(monkeypatch, capsys):
    carried_out = []
    monkeypatch.setattr(Runner, "carry_out", lambda runner, runs, failed: carried_out.extend(runs))
    whole = measurements.profile_runs("laptop")
    assert main(["sweep", "--profile", "laptop", "--only", "06,04_cifar10"]) == 0
    assert capsys.readouterr().out == "all runs of 06,04_cifar10 in the profile 'laptop' have a record\n"
    assert {run.labels["section"] for run in carried_out} == {"6.1", "6.3"}
    parts = [measurements.profile_runs("laptop", only=[stem]) for stem in ("04_cifar10", "06_cityscapes")]
    assert [run.title for run in carried_out] == [run.title for part in parts for run in part]
    datasets = {run.dataset for each in carried_out for run in each.ancestry()}
    assert datasets == {"cifar10", "camvid:240x180"} < {run.dataset for run in whole}
    assert main(["sweep", "--only", "0x"]) == 2
    assert "unknown notebook '0x'; --only takes numbers or names of 00_start_here" in capsys.readouterr().err


def test_reader_that_stops_reading_gets_no_traceback():
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment["PYTHONPATH"] = str(CHECKOUT)
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "satlib", "run", "--help"],
        env=environment,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_selection_by_number_and_name(tmp_path, monkeypatch):
    monkeypatch.setenv("SATLIB_HOME", str(tmp_path))
    write_project(tmp_path, {"00_a": [], "01_b": [], "10_c": []})
    assert list(select_notebooks(None)) == ["00_a", "01_b", "10_c"]
    assert list(select_notebooks("10, 00_a")) == ["00_a", "10_c"]
    for wrong in ("02", "0", "b", "", "00,", "01_"):
        with pytest.raises(SatlibError, match="unknown notebook"):
            select_notebooks(wrong)


def test_no_notebooks_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("SATLIB_HOME", str(tmp_path))
    with pytest.raises(SatlibError, match="no notebooks"):
        notebook_paths()


# --- progress


@pytest.fixture
def progress(tmp_path, monkeypatch):
    """A `NotebookProgress` that started the first of three notebooks a minute ago."""
    now = [1000.0]
    monkeypatch.setattr(notebooks.time, "monotonic", lambda: now[0])
    progress = NotebookProgress(["00_a", "01_b", "02_c"], tmp_path / "timings.json")
    root = write_project(tmp_path / "project", {"00_a": GOOD})
    progress.start(root / "notebooks" / "00_a.ipynb")
    now[0] += 60.04
    return progress


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, "time left unknown: not timed yet"),
        ({"00_a": 90, "01_b": 20, "02_c": 10}, "about 1 min 0 s left, if it takes as long as last time"),
        ({"00_a": 90, "01_b": 20}, "at least 50 s left (1 not timed yet)"),
        ({"00_a": 30, "01_b": 20, "02_c": 10}, "longer than last time (30 s), and 2 more after this"),
        ({"01_b": 20}, "at least 20 s left (2 not timed yet)"),
    ],
)
def test_estimate_is_honest(progress, known, expected):
    progress.seconds.update(known)
    assert progress.left() == expected


def test_place_in_the_notebook_is_told_every_few_seconds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notebooks, "EVERY_SECONDS", 0.01)
    root = write_project(tmp_path, {"00_a": GOOD})
    with NotebookProgress(["00_a"], tmp_path / "timings.json") as told:
        told.start(root / "notebooks" / "00_a.ipynb")
        injected = code("n = 5")
        injected.metadata.tags = ["injected-parameters"]
        for index, cell in enumerate([*GOOD[:-1], injected, GOOD[-1]]):
            told.cell(cell=cell, cell_index=index)
        seen, until = "", time.monotonic() + 60
        while "cell 2 of 2" not in seen and time.monotonic() < until:
            seen += capsys.readouterr().out
    assert "[1/1] 00_a: cell 2 of 2, 'Good', 0 s in; time left unknown" in seen


def test_only_marked_lines_are_shown_and_only_whole_ones(progress, capsys):
    capsys.readouterr()
    for piece in ("[ru", "n] one\nother\n[run] t", "wo\r[run] three", "\nx [run] no\n"):
        progress.write(piece)
    assert capsys.readouterr().out.splitlines() == ["  [run] one", "  [run] two", "  [run] three"]


def test_timings_survive_and_damaged_ones_are_forgotten(progress, tmp_path):
    path = tmp_path / "timings.json"
    assert progress.end("done") == ("done", "", pytest.approx(60.04))
    assert NotebookProgress([], path).seconds == {"00_a": 60.0}
    for damage in ("", "[1]", '{"00_a": "x"}', '{"00_a": null}', "\x00"):
        path.write_text(damage)
        assert NotebookProgress([], path).seconds == {}
    assert {entry.name for entry in tmp_path.iterdir()} == {"timings.json", "project"}
