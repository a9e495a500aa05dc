"""Writes a project folder with small notebooks and a profile, for the tests of what executes them."""

from pathlib import Path

import nbformat
from nbformat import v4
from nbformat.notebooknode import NotebookNode

PROFILE = "description: tiny notebooks\nhardware: any\ntime: seconds\ndatasets: [shapes32]\n"


def text(source: str) -> NotebookNode:
    return v4.new_markdown_cell(source)


def code(source: str) -> NotebookNode:
    return v4.new_code_cell(source)


def parameters(source: str, tag: str = "parameters") -> NotebookNode:
    return v4.new_code_cell(source, metadata={"tags": [tag]})


def write_notebook(path: Path, *cells: NotebookNode) -> Path:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(v4.new_notebook(cells=list(cells), metadata={"kernelspec": kernel}), path)
    return path


def write_project(root: Path, notebooks: dict[str, list[NotebookNode]], profile: str = PROFILE) -> Path:
    """Notebooks by stem and the profile `quick` in `root`, laid out as in the checkout."""
    (root / "notebooks" / "profiles").mkdir(parents=True)
    for stem, cells in notebooks.items():
        write_notebook(root / "notebooks" / f"{stem}.ipynb", *cells)
    (root / "notebooks" / "profiles" / "quick.yaml").write_text(profile)
    return root
