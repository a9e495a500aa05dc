"""The README's tables are what the published records say."""

from pathlib import Path

from satlib import results

README = Path(__file__).resolve().parent.parent / "README.md"


def test_tables_of_the_readme_are_rendered_from_published_records():
    text = README.read_text(encoding="utf-8")
    assert len(results.BLOCK.findall(text)) >= 2
    assert results.with_tables(text) == text, "run tools/save_outputs.py"


def test_a_number_that_no_record_holds_is_replaced():
    text = "before\n<!-- published models of 6.1: laptop -->\n| ERM | 99.9 |\n<!-- end -->\nafter"
    rendered = results.with_tables(text)
    assert "99.9" not in rendered and "| ERM | " in rendered
    text = "<!-- published numbers -->\n| 6.1 | made up | 1.0 |\n<!-- end -->"
    assert "made up" not in results.with_tables(text) and "| 93.25 |" in results.with_tables(text)
    assert rendered.startswith("before\n<!--") and rendered.endswith("<!-- end -->\nafter")
