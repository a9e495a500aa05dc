"""Executed notebooks as HTML files that read well offline: images inside, equations as MathML, no scripts.

nbconvert's own page leaves equations to a script from the network; here latex2mathml turns each one into
MathML, which browsers draw by themselves.
"""

import html
import os
import re
import unicodedata
from itertools import accumulate, pairwise
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

import nbformat
from jinja2 import DictLoader, pass_context
from jinja2.runtime import Context
from latex2mathml import converter
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from traitlets.config import Config

from satlib.errors import SatlibError
from satlib.files import write_text

# nbconvert's page without what it fetches from the network. Not all browsers know `columnalign`: hence CSS.
_TEMPLATE = """{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block html_head_css -%}
<style>
  body.jp-Notebook { --jp-code-font-size: 12px; }
  body.jp-Notebook main { max-width: 1060px; margin: 0 auto; }
  body.jp-Notebook nav { padding: 0 0 1em 80px; }
  math { font-size: 110%; }
  details > summary { color: #888; cursor: pointer; font-size: 12px; margin-left: 80px; }
  .jp-OutputArea-output .highlight pre { font-family: var(--jp-code-font-family, monospace); line-height: 1.35;
    font-size: var(--jp-code-font-size, 13px); }
  mtd[columnalign="left"] { text-align: left; }
  mtd[columnalign="right"] { text-align: right; }
</style>
{%- endblock -%}
{%- block body_header -%}
{{ super() }}
{%- if resources.metadata.contents %}<nav><a href="{{ resources.metadata.contents }}">Contents</a></nav>{% endif -%}
{%- endblock -%}
{%- block input_group scoped -%}
{%- if (cell.metadata.get("jupyter") or {}).get("source_hidden") -%}
<details><summary>code</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock -%}
{%- block data_png scoped -%}
{%- set alt = output | get_metadata('alt', 'image/png') -%}
{{ super() | replace('<img src=', '<img alt="' ~ (alt | escape_html) ~ '" src=', 1) if alt else super() }}
{%- endblock -%}
{%- block data_latex scoped -%}
<div class="jp-RenderedLatex jp-OutputArea-output">{{ output.data['text/latex'] | markdown2html }}</div>
{%- endblock -%}
"""
# What a page without scripts can show, best first.
_MEDIA = [f"text/{kind}" for kind in ("html", "markdown", "latex")]
_MEDIA += [f"image/{kind}" for kind in ("svg+xml", "png", "jpeg")] + ["text/plain"]
_NOTEBOOK = re.compile(r"(\d\d_\w+)\.ipynb(#.*)?")
_CLOSING = (")", "]", "}", "|", "\N{DOUBLE VERTICAL LINE}", "\N{PRIME}", "!")
_LIMITS = ("max", "min", "sup", "inf", "lim", "argmax", "argmin")


def write_html(notebook: Path, target: Path, *, folder: Path, contents: str = "") -> None:
    """Write `notebook` as one HTML file that needs nothing else; `target` appears when it is complete.

    Relative images and links in the notebook are relative to `folder`; links to notebooks become links to
    their pages; contents: where a link at the top leads, such as the first page of a report. Raises `SatlibError`
    naming the cell whose formula cannot be drawn.
    """
    exporter = _OfflineExporter(
        config=Config({"NbConvertBase": {"display_data_priority": _MEDIA}}),
        extra_loaders=[DictLoader({"offline.html.j2": _TEMPLATE})],
        template_file="offline.html.j2",
        embed_images=True,
    )
    metadata = {
        "name": notebook.stem,
        "path": str(folder),
        "to_folder": os.path.relpath(folder, target.parent),
        "contents": contents,
    }
    content = nbformat.read(notebook, as_version=4)
    page, _ = exporter.from_notebook_node(content, resources={"metadata": metadata})
    write_text(target, page)


class _OfflineExporter(HTMLExporter):
    @pass_context
    def markdown2html(self, context: Context, source: str) -> str:
        """As nbconvert's, with equations as MathML and links that work from the page."""
        cell, metadata = context.get("cell", {}), context["resources"]["metadata"]
        renderer = _OfflineRenderer(
            escape=False,
            attachments=cell.get("attachments", {}),
            embed_images=self.embed_images,
            path=metadata["path"],
        )
        renderer.to_folder = metadata["to_folder"]
        try:
            return MarkdownWithMath(renderer=renderer).render(source)
        except SatlibError as error:
            start = cell.get("source", "").strip().partition("\n")[0][:60]
            raise SatlibError(f"{metadata['name']}: the cell `{start}`: {error}") from error


class _OfflineRenderer(IPythonRenderer):
    to_folder: str  # from the page's folder to the one that relative links start from

    def inline_math(self, body: str) -> str:
        return mathml(body)

    def block_math(self, body: str) -> str:
        return mathml(body, display=True)

    def latex_environment(self, name: str, body: str) -> str:
        return mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", display=True)

    def link(self, text: str, url: str, title: str | None = None) -> str:
        if match := _NOTEBOOK.fullmatch(url):
            url = f"{match[1]}.html{match[2] or ''}"
        elif not re.match(r"[a-z]+:|#|/", url):
            url = f"{self.to_folder}/{url}"
        return super().link(text, url, title)


def mathml(latex: str, *, display: bool = False) -> str:
    """The LaTeX formula (without its dollar signs) as MathML; `display` for one that stands on its own line.

    Raises `SatlibError` for a formula that would come out wrong: unbalanced braces, an unknown command, a
    missing argument.
    """
    source = latex.replace("{aligned}", "{split}").replace(r"\operatorname*", r"\operatorname")
    try:
        bare = re.sub(r"\\.", "", source, flags=re.DOTALL)
        depths = [0, *accumulate((character == "{") - (character == "}") for character in bare)]
        if min(depths) < 0 or depths[-1] != 0:
            raise ValueError("its braces do not match")
        tree = converter.convert_to_element(source, display="block" if display else "inline")
        tree.attrib.pop("xmlns", None)  # HTML knows it; in headings nbconvert would turn it into a prefix
        for element in tree.iter():
            _tidy(element, display)
        for row in tree.iter():
            for before, child in pairwise(row):
                # A minus behind an operator is a sign, not a difference: no space follows it.
                if child.text == "\N{MINUS SIGN}" and before.tag == "mo" and before.text not in _CLOSING:
                    child.set("form", "prefix")
    except Exception as error:  # latex2mathml's exceptions have no common base class
        reason = str(error) or type(error).__name__
        raise SatlibError(f"cannot draw the formula `{' '.join(latex.split())}`: {reason}") from error
    return tostring(tree, encoding="unicode")


def _tidy(element: Element, display: bool) -> None:
    """Mend what browsers would draw differently; `ValueError` for what latex2mathml lets pass in silence."""
    text = html.unescape(element.text or "")
    if text.startswith("\\"):
        raise ValueError(f"the command {text} is not known")
    if element.tag == "mi" and text == "&" and element.text == "&":
        raise ValueError("an `&` stands outside of an aligned environment")
    if element.tag == "mfrac" and len(element) != 2:
        raise ValueError("a fraction needs a numerator and a denominator")
    if element.tag == "mo" and not text:
        raise ValueError(r"an operator's name is plain letters: \operatorname{argmax}")
    if display and element.tag == "msub" and element[0].text in _LIMITS:
        element.tag = "munder"
    if element.get("mathvariant", "normal") != "normal":  # the one font that browsers know by attribute
        style = element.attrib.pop("mathvariant").replace("-", " ").replace("double struck", "double-struck")
        text = "".join(_letter(character, style.upper()) for character in text)
    if text == "~" and element.tag == "mi":  # \sim: the operator, not the raised accent
        element.tag, text = "mo", "\N{TILDE OPERATOR}"
    element.text = text or None


def _letter(character: str, style: str) -> str:
    """The letter or digit in Unicode's mathematical alphabet `style` ("BOLD ITALIC"), where it has one."""
    name = unicodedata.name(character, "").replace("LATIN ", "").replace("GREEK ", "").replace("LETTER ", "")
    try:
        return unicodedata.lookup(f"MATHEMATICAL {style} {name}")
    except KeyError:
        return character
