"""The report of a profile: a first page with contents and scoreboard, and a page for each executed notebook.

`figures/<profile>/report/` needs no network and no server, and can be copied anywhere as a folder.
"""

import base64
import html
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment

from satlib.files import write_text
from satlib.paths import notebook_paths, project_root
from satlib.study import results
from satlib.study.figures import alt_text

FIRST_PICTURE = "figure1"  # of figures/<profile>/, shown on the first page where it is drawn
_HEADING = re.compile(r'<h([12]) id="([^"]*)">(.*?)<a class="anchor-link"', re.DOTALL)


def folder_of(profile: str) -> Path:
    """Where the report of a profile lies."""
    return project_root() / "figures" / profile / "report"


def write_index(profile: str, description: str) -> Path:
    """Write the first page: what the report holds, the scoreboards of this profile and of all published records.

    description: of the profile, in words. Notebooks that were not executed under it are named, with the call that
    does it. Returns the page's path.
    """
    folder = folder_of(profile)
    pages = [folder / f"{stem}.html" for stem in notebook_paths()]
    picture = folder.parent / f"{FIRST_PICTURE}.png"
    boards = {"live": results.rows(profile), "published": results.rows(published=True)}
    page = _PAGE.render(
        profile=profile,
        description=description,
        chapters=[_chapter(page) for page in pages if page.is_file()],
        missing=[page.stem for page in pages if not page.is_file()],
        picture=base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else "",
        alt=alt_text(picture) if picture.is_file() else "",
        **{name: results.scoreboard(rows).to_html(index=False, border=0) for name, rows in boards.items()},
    )
    write_text(folder / "index.html", page)
    return folder / "index.html"


def _chapter(page: Path) -> dict[str, Any]:
    """What the contents say of a page: its file name, and as HTML its title, and (anchor, text) of its sections."""
    headings = _HEADING.findall(page.read_text(encoding="utf-8"))
    title = next((text for level, _, text in headings if level == "1"), html.escape(page.stem))
    return {"page": page.name, "title": title, "sections": [each[1:] for each in headings if each[0] == "2"]}


_PAGE = Environment(autoescape=False).from_string("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Shared adversarial training: the report of profile {{ profile | e }}</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1060px; margin: 2em auto; padding: 0 1em; }
  h1 { line-height: 1.2; } h2 { margin-top: 2em; border-bottom: 1px solid #ccc; }
  a { color: #0b5394; } img { max-width: 100%; height: auto; }
  ol.contents > li { margin: .6em 0; } ol.contents ul { color: #555; font-size: 90%; columns: 2; }
  .scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 85%; }
  th, td { padding: .25em .7em; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
  td:nth-child(4), td:nth-child(5) { text-align: right; white-space: nowrap; }
</style>
</head>
<body>
<h1>Defending Against Universal Perturbations With Shared Adversarial Training</h1>
<p>The paper by Mummadi, Brox and Metzen (ICCV 2019), reproduced by executed notebooks. This report was made with the
profile <b>{{ profile | e }}</b>: {{ description | e }}. Every number on these pages was computed by the
code beside it, or comes from a published record of such a run.</p>
{%- if picture %}
<p><img src="data:image/png;base64,{{ picture }}" alt="{{ alt | e }}"></p>
{%- endif %}
<h2 id="contents">Contents</h2>
<ol class="contents" start="0">
{%- for chapter in chapters %}
<li value="{{ chapter.page[:2] | int }}"><a href="{{ chapter.page | e }}">{{ chapter.title }}</a>
{%- if chapter.sections %}
<ul>
{%- for anchor, text in chapter.sections %}
<li><a href="{{ chapter.page | e }}#{{ anchor }}">{{ text }}</a></li>
{%- endfor %}
</ul>
{%- endif %}
</li>
{%- endfor %}
</ol>
{%- if missing %}
<p>Not executed under this profile yet: {{ missing | join(", ") | e }}.
<code>./run_all.sh --profile {{ profile | e }}</code> does it.</p>
{%- endif %}
<h2 id="scoreboard">The paper's numbers beside those of this profile</h2>
<div class="scroll">{{ live }}</div>
<h2 id="published">The paper's numbers beside the best published ones</h2>
<p>Each comes from records in <code>data/ledger/</code>. <em>Other setting</em>: one model's number, from a smaller
network, a shorter training or other data than the paper's, so that only comparisons between models say something.</p>
<div class="scroll">{{ published }}</div>
</body>
</html>
""")
