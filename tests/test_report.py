"""The report of a profile: its first page leads to every page and section, and needs nothing else."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image
from tiny_project import text, write_notebook, write_project

from satlib.paper import REPORTED
from satlib.study import export, figures, report

CELLS = {
    "00_start": [text("# Start"), text("## First part\n\n## The size $\\varepsilon$ & more")],
    "01_more": [text("# More"), text("[back](00_start.ipynb#First-part)")],
    "02_later": [text("# Later")],
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A project of three notebooks, of which two have pages, and its report."""
    write_project(tmp_path, CELLS)
    monkeypatch.setenv("SATLIB_HOME", str(tmp_path))
    executed = tmp_path / "notebooks" / "executed" / "quick"
    executed.mkdir(parents=True)
    for stem in ("00_start", "01_more"):
        notebook = write_notebook(executed / f"{stem}.ipynb", *CELLS[stem])
        page = report.folder_of("quick") / f"{stem}.html"
        export.write_html(notebook, page, folder=tmp_path / "notebooks", contents="index.html")
    return tmp_path


def links_of(page: Path) -> list[str]:
    return re.findall(r'<a [^>]*href="([^"]*)"', page.read_text())


def test_every_link_leads_to_a_page_and_a_place_on_it(written):
    index = report.write_index("quick", "tiny notebooks")
    pages = sorted(index.parent.glob("*.html"))
    assert [page.name for page in pages] == ["00_start.html", "01_more.html", "index.html"]
    checked = 0
    for page in pages:
        for link in links_of(page):
            name, _, anchor = link.partition("#")
            there = (page.parent / name if name else page).read_text()
            assert not anchor or f'id="{anchor}"' in there, link
            checked += 1
    assert checked >= 8
    assert {"00_start.html", "00_start.html#First-part", "01_more.html"} <= set(links_of(index))
    assert "index.html" in links_of(pages[0])
    assert "<math" in index.read_text()  # a section's formula
    assert "profile <b>quick</b>: tiny notebooks. " in " ".join(index.read_text().split())
    assert "Not executed under this profile yet: 02_later." in index.read_text()
    assert not re.search(r"<script|<link|@import|https?://(?!www.w3.org)", index.read_text())


def test_first_page_shows_both_scoreboards_and_figure_1(written):
    figures.save(plt.figure(), "figure1", profile="quick", records=[], alt='two rows, "clean" and fooled')
    plt.close("all")
    page = report.write_index("quick", "tiny notebooks").read_text()
    assert page.count("<table") == 2
    for reported in REPORTED:
        assert page.count(f"<td>{reported.quantity}</td>") >= 2
    (image,) = re.findall(r"<img[^>]*>", page)
    assert 'src="data:image/png;base64,' in image
    assert 'alt="two rows, &#34;clean&#34; and fooled"' in image


def test_a_large_gallery_gets_a_palette_and_keeps_its_texts(tmp_path):
    figure, axis = plt.subplots(figsize=(6, 6))
    axis.imshow(np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8), interpolation="nearest")
    path = figures.save(figure, "noise", profile="quick", records=[], alt="noise – of 256 colours", root=tmp_path)
    plt.close("all")
    with Image.open(path) as picture:
        assert picture.mode == "P" and "dpi" in picture.info
    assert figures.alt_text(path) == "noise – of 256 colours"
    assert figures.verify(tmp_path) == (1, [])
