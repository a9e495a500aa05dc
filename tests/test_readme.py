"""The README's tables are what the published records say, its example runs, and what it points to is there."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from satlib.attacks import heap_pgd
from satlib.study import measurements, results
from satlib.study.claims import Records

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TEXTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(("text", "tables"), [("README.md", 1), ("docs/results.md", 15), ("docs/scale_out.md", 1)])
def test_tables_are_rendered_from_published_records(text, tables):
    content = (ROOT / text).read_text(encoding="utf-8")
    assert len(results.BLOCK.findall(content)) == tables
    assert results.with_tables(content) == content, "run tools/save_outputs.py"


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1800


def test_the_idea_is_what_the_kernel_does():
    (example,) = re.findall(r"<!-- idea -->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).requires_grad_(False)
    names = {"images": torch.rand(8, 3, 8, 8) * 255, "labels": torch.arange(8) % 4, "model": model}
    names |= {"s": 4, "K": 3, "eps": 9.0, "alpha": 3.0, "start": torch.rand(2, 3, 8, 8) * 18 - 9, "F": F}
    exec(example, names | {"torch": torch}, names)
    options = {"eps": 9.0, "step_size": 3.0, "steps": 3, "start": names["start"], "straight_through": False}
    options |= {"loss_threshold": None, "label_smoothing": 0.0}
    kernel = heap_pgd(model, names["images"], names["labels"], sharedness=4, **options)
    assert torch.equal(names["xi"].detach(), kernel)


def test_the_example_runs_as_it_stands(capsys):
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(example.splitlines()) <= 12
    torch.manual_seed(0)
    images, labels = torch.rand(96, 3, 8, 8) * 255, torch.arange(96) % 4
    names = {"network": nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), "images": images, "labels": labels}
    exec(example, names)
    assert names["xi"].shape == (1, 3, 8, 8) and names["own"].shape == images.shape
    assert capsys.readouterr().out.strip() == str(names["found"]) and names["found"].perturbation.shape == (1, 3, 8, 8)
    segmenter = nn.Conv2d(3, 4, 1)
    names |= {"network": segmenter, "labels": torch.randint(0, 4, (96, 8, 8))}
    exec(example, names)  # an FCN, too
    assert names["xi"].shape == (1, 3, 8, 8)


def test_the_card_is_made_as_the_readme_says(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"<!-- card -->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(example.splitlines()) <= 10 and "budget=600" in example
    torch.manual_seed(0)
    images, labels = torch.rand(96, 3, 8, 8) * 255, torch.arange(96) % 4
    names = {"network": nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), "images": images, "labels": labels}
    exec(example.replace("budget=600", "budget=1"), names)
    assert "mine: Useless rather than robust" in capsys.readouterr().out
    assert {"index.html", "card.json", "card.png"} <= {path.name for path in (tmp_path / "card").iterdir()}


def test_everything_that_the_readme_points_to_is_there():
    for text in TEXTS:
        for path in re.findall(r"\]\(((?!http)[^)#]+)\)", text.read_text(encoding="utf-8")):
            assert (text.parent / path).is_file(), f"{text.name}: {path}"
    text = README.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\d\d_\w+)` \|.*\|([^|]*)\|$", text, flags=re.MULTILINE)
    notebooks = {path.stem: path.read_text() for path in (README.parent / "notebooks").glob("[0-9]*.ipynb")}
    assert {stem for stem, _ in rows} == notebooks.keys()
    for stem, drawn in rows:
        for name in re.findall(r"`(\w+)`", drawn):
            assert name in notebooks[stem], f"{stem} draws no {name}"


def test_a_number_that_no_record_holds_is_replaced():
    text = "before\n<!-- published models of 6.1: laptop -->\n| ERM | 99.9 |\n<!-- end -->\nafter"
    rendered = results.with_tables(text)
    assert "99.9" not in rendered and "| ERM | " in rendered
    text = "<!-- published numbers -->\n| 6.1 | made up | 1.0 |\n<!-- end -->"
    assert "made up" not in results.with_tables(text) and "| 93.25 |" in results.with_tables(text)
    assert rendered.startswith("before\n<!--") and rendered.endswith("<!-- end -->\nafter")


@pytest.mark.parametrize("section", ["6.1", "6.2", "6.3", "checks"])
def test_published_records_save_the_laptop_profile_its_hours(section):
    """All that notebooks 04 to 09 ask for, but for what is needed on demand, is published."""
    plan = measurements.plan(section, "laptop")
    records = Records(published=True)
    for run in {id(r): r for planned in plan.runs for r in planned.ancestry()}.values():
        record, what = records.of(run), run.measurement
        assert record is not None, run.title
        assert what.on_demand or all(record.has(name) for name in what.artefacts), run.title
