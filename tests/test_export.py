"""Pages made of notebooks need nothing from the network, and their equations are drawn by the browser."""

import base64
import re
from xml.etree import ElementTree

import pytest
from nbformat import v4
from tiny_project import text, write_notebook

from satlib.errors import SatlibError
from satlib.study import export

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def page(tmp_path, *cells):
    (tmp_path / "executed" / "quick").mkdir(parents=True, exist_ok=True)
    notebook = write_notebook(tmp_path / "executed" / "quick" / "01_one.ipynb", *cells)
    target = notebook.with_suffix(".html")
    export.write_html(notebook, target, folder=tmp_path)
    assert [path.name for path in target.parent.iterdir() if path.name.endswith("part")] == []
    return target.read_text()


def test_page_needs_no_network(tmp_path):
    (tmp_path / "dot.png").write_bytes(PIXEL)
    output = v4.new_output("display_data", {"image/png": base64.b64encode(PIXEL).decode(), "text/plain": "dot"})
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": "a slider"}
    shown = v4.new_code_cell("show()", outputs=[output, v4.new_output("display_data", widget)])
    html = page(tmp_path, text("# Heading\n\n$\\varepsilon$ ![a dot](dot.png)\n\n$$\\rho = \\frac{1}{2}$$"), shown)
    assert not re.search(r"<script|<link|@import|<iframe|<object", html)
    assert not re.search(r"""(src|srcset|data)\s*=\s*["']?(?!data:image)(https?:)?//""", html)
    assert not re.search(r"""url\(\s*["']?(https?:)?//""", html)
    assert html.count('src="data:image/png;base64,') == 2
    assert "a slider" in html
    assert "show" in html  # code is shown
    assert html.count("<math") == 2
    assert 'display="block"' in html
    assert "$" not in re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)


def test_pictures_say_what_they_show(tmp_path):
    data = {"image/png": base64.b64encode(PIXEL).decode(), "text/plain": "dot"}
    named = {"image/png": {"alt": 'a "dot" & more', "width": 20}}
    outputs = [v4.new_output("display_data", data, metadata=named), v4.new_output("display_data", data)]
    html = page(tmp_path, v4.new_code_cell("show()", outputs=outputs))
    first, second = re.findall(r"<img[^>]*>", html)
    assert "alt='a \"dot\" &amp; more'" in first or 'alt="a &quot;dot&quot; &amp; more"' in first
    assert "No description" in second


def test_latex_and_markdown_outputs_are_drawn_too(tmp_path):
    outputs = [v4.new_output("display_data", {kind: "$\\delta$"}) for kind in ("text/latex", "text/markdown")]
    assert page(tmp_path, v4.new_code_cell("x", outputs=outputs)).count("<mi>δ</mi>") == 2


def test_hidden_code_is_folded_and_its_output_is_not(tmp_path):
    cells = [v4.new_code_cell(f"code{n}()", outputs=[v4.new_output("stream", text=f"said{n}")]) for n in (1, 2)]
    cells[0].metadata["jupyter"] = {"source_hidden": True}
    html = page(tmp_path, *cells)
    folded = re.search(r"<details><summary>code</summary>(.*?)</details>", html, flags=re.DOTALL)
    assert html.count("<details>") == 1 and "code1" in folded[1] and "said1" not in folded[1] and "said1" in html


def test_links_work_from_the_page(tmp_path):
    html = page(tmp_path, text("[a](02_two.ipynb#b) [c](../satlib/attacks.py) [d](#e) [f](https://example.org/)"))
    for link in ("02_two.html#b", "../../../satlib/attacks.py", "#e", "https://example.org/"):
        assert f'href="{link}"' in html


def test_formula_that_cannot_be_drawn_names_its_cell(tmp_path):
    with pytest.raises(SatlibError, match=r"01_one: the cell `## Risk`: cannot draw the formula `\\rhoo`"):
        page(tmp_path, text("# Title $x$"), text("## Risk\n\n$\\rhoo$"))
    assert not (tmp_path / "executed" / "quick" / "01_one.html").exists()


@pytest.mark.parametrize(
    "latex",
    [r"\unknown x", r"\frac{1}", r"x_{a", r"x}", r"a & b", r"\left( x", "x^", "x^2^3", r"\begin{cases} a"],
)
def test_wrong_latex_is_refused(latex):
    with pytest.raises(SatlibError, match="cannot draw the formula"):
        export.mathml(latex)


@pytest.mark.parametrize(
    "latex",
    [
        r"\rho_{\mathrm{adv}} = \mathbb{E}_{x\sim\mathcal{D}}\left[\max_{\|\xi\|_\infty\le\varepsilon} L(x)\right]",
        r"\begin{aligned} a &= b \\ &\le c \end{aligned}",
        r"\begin{cases} 1 & \text{if } x > 0 \\ 0 & \text{otherwise} \end{cases}",
        r"\operatorname*{argmax}_{\xi \in S} \sum_{i=1}^{\lceil d/s \rceil} L(x_i + \xi)",
        r"\{x : \|x\|_2 < 1\} \setminus \{0\}",
    ],
)
def test_usual_formulas_become_wellformed_mathml(latex):
    tree = ElementTree.fromstring(export.mathml(latex, display=True))
    assert tree.tag == "math"  # without a name space, which HTML does not need
    assert "\\" not in "".join(tree.itertext())


def test_what_browsers_would_draw_differently_is_mended():
    assert "<mi>𝝃</mi>" in export.mathml(r"\boldsymbol{\xi}")  # not by an attribute that they ignore
    assert "<mo>∼</mo>" in export.mathml(r"x \sim y")
    assert "<munder><mo>max</mo>" in export.mathml(r"\max_x", display=True)
    assert "<msub><mo>max</mo>" in export.mathml(r"\max_x")
    assert "<mo>&lt;</mo>" in export.mathml("a < b")
    assert export.mathml("[-x, (y) - z]").count('<mo form="prefix">−</mo>') == 1
