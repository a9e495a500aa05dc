"""Writes a project folder with small notebooks and a profile, for the tests of what executes them."""

import json
from pathlib import Path

import nbformat
from nbformat import v4
from nbformat.notebooknode import NotebookNode

PROFILE = "description: tiny notebooks\nhardware: any\ntime: seconds\nsections:"  # and what a test gives them


def text(source: str) -> NotebookNode:
    return v4.new_markdown_cell(source)


def code(source: str) -> NotebookNode:
    return v4.new_code_cell(source)


def parameters(source: str) -> NotebookNode:
    return v4.new_code_cell(source, metadata={"tags": ["parameters"]})


def write_notebook(path: Path, *cells: NotebookNode) -> Path:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(v4.new_notebook(cells=list(cells), metadata={"kernelspec": kernel}), path)
    return path


def write_project(
    root: Path, notebooks: dict[str, list[NotebookNode]], sections: dict[str, dict] | None = None
) -> Path:
    """Notebooks by stem in `root`, and a profile `quick` of its own that changes the settings of these sections."""
    (root / "notebooks").mkdir(parents=True)
    (root / "profiles").mkdir()
    for stem, cells in notebooks.items():
        write_notebook(root / "notebooks" / f"{stem}.ipynb", *cells)
    (root / "profiles" / "quick.yaml").write_text(f"{PROFILE} {json.dumps(sections or {})}\n")  # JSON is YAML
    return root
