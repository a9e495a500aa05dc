"""What notebooks show of the code, and of the best figures that there are."""

import base64

import pytest
from PIL import Image

from satlib import attacks
from satlib.study import display


def documented(first, *, second: int = 2, **others):
    """Says what it does.

    At length.
    """

    # a comment that explains
    if second:
        return first
    return others


class Shown:
    """Whole."""


def test_the_core_of_a_function_is_its_body():
    assert display.core(documented).splitlines() == [
        "def documented(first, second, **others):",
        "",
        "    # a comment that explains",
        "    if second:",
        "        return first",
        "    return others",
    ]
    assert display.core(Shown) == 'class Shown:\n    """Whole."""'
    step = display.core(attacks.projected_step)
    assert step.count("\n") == 1 and "torch.clamp(xi + " in step
    assert display.core(attacks.heap_pgd).startswith("def heap_pgd(model, images, labels, eps, sharedness, ")


@pytest.fixture
def shown(monkeypatch):
    found = []
    monkeypatch.setattr(display, "display", found.append)
    return found


def test_the_weightiest_figure_is_shown_with_whose_it_is(tmp_path, monkeypatch, shown):
    monkeypatch.setattr(display, "project_root", lambda: tmp_path)
    display.show_best("figure3", caption="What it says.")
    assert shown == []  # nothing is published yet
    for profile, width in (("laptop", 3), ("gpu", 5)):
        (tmp_path / "figures" / profile).mkdir(parents=True)
        Image.new("RGB", (width, 2)).save(tmp_path / "figures" / profile / "figure3.png")
    display.show_best("figure3", caption="What it says.")
    picture, caption = shown
    assert caption.data == "*What it says. (Published records, profile `gpu`.)*"
    png = picture.data if isinstance(picture.data, bytes) else base64.b64decode(picture.data)
    assert int.from_bytes(png[16:20], "big") == 5  # the width in its header
