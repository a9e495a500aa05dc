"""The benchmark: what its rows say about what was measured. How fast anything is, no test says."""

import json
import math

import pytest
import torch

from satlib import bench
from satlib.attacks import heap_pgd
from satlib.bench import Bench, peers, rows
from satlib.cli import main
from satlib.data import Splits
from satlib.models import FCN8s

pytestmark = pytest.mark.usefixtures("float32")
KEYS = ["row", "what", "ours", "peer", "peer_name", "unit", "ratio", "spread", "device", "note"]


@pytest.fixture
def small(tiny, trained, tmp_path, monkeypatch):
    """A benchmark on tiny images, with one repeat of everything and a thin FCN-8s."""
    monkeypatch.setenv("SATLIB_HOME", str(tmp_path))
    monkeypatch.setattr(rows, "FCN8s", lambda classes, width: FCN8s(classes=classes, width=2))
    made = Bench(device="cpu", repeats=1)
    made.__dict__.update(splits=Splits(tiny.train, tiny.val, tiny.train), model=trained, peak=1e11)
    return made


def test_a_ratio_above_one_means_that_ours_is_better(small):
    options = {"what": "w", "peer_name": "p", "note": ""}
    rate = small.row("a", unit="images / s", ours=[30.0, 10.0, 20.0], peer=[5.0], more_is_better=True, **options)
    assert (rate.ours, rate.peer, rate.ratio, rate.spread) == (20, 5, 4, 20)
    time = small.row("b", unit="s", ours=[2.0], peer=[8.0, 9.0, 700.0], more_is_better=False, **options)
    assert (time.ours, time.peer, time.ratio, time.spread) == (2, 9, 4.5, 0)
    alone = small.row("e", unit="%", ours=[2.0], peer=None, more_is_better=False, **options)
    assert alone.peer is alone.ratio is None


def test_a_race_takes_turns_after_a_warm_up(small):
    small.repeats, order = 3, []
    taken = small.race({name: lambda name=name: order.append(name) for name in "xy"})
    assert "".join(order) == "xy" + "xyxyxy" and [len(seconds) for seconds in taken.values()] == [3, 3]


@pytest.mark.parametrize("name", ["c", "d", "e", "f", "g", "h"])
def test_rows_without_peers(small, name):
    found = rows.ROWS[name](small)
    assert found and {row.row for row in found} == {name}
    for row in found:
        assert math.isfinite(row.ours) and row.ours > 0 and row.device == small.name
        assert row.ratio is None or row.ratio > 0


@pytest.mark.parametrize("name", list(peers.DISTRIBUTIONS))
def test_a_peer_attacks_the_same_images_within_the_same_bound(name, tiny, trained):
    if peers.title(name) is None:
        pytest.skip(f"{name} is not installed; it comes with the extra `bench`")
    x, y = tiny.train.images[:400].float(), tiny.train.labels[:400]  # random starts differ: many images, so that
    options = {"eps": 8.0, "steps": 6, "batch": 150}  # what they decide by chance is far below the tolerance
    theirs = peers.image_dependent(name, trained, x, y, **options)
    assert theirs.shape == x.shape and 7.9 < (theirs - x).abs().max() <= 8.001
    ours = x + heap_pgd(trained, x, y, eps=8.0, sharedness=1, steps=6, step_size=2.0)
    wrong = [(trained(images).argmax(1) != y).float().mean().item() for images in (x, theirs, ours)]
    assert wrong[1] > wrong[0] + 0.1 and abs(wrong[2] - wrong[1]) < 0.1


@pytest.mark.parametrize("attacker", ["pgd", "deepfool"])
def test_art_s_universal_perturbation_stays_within_the_bound(attacker, tiny, trained):
    if peers.title("art") is None:
        pytest.skip("ART is not installed; it comes with the extra `bench`")
    xi = peers.universal(attacker, trained, tiny.val.images[:24].float(), tiny.val.labels[:24], eps=16.0)
    assert xi.shape == (1, 3, 8, 8) and 1 < xi.abs().max() <= 16.001


def test_row_a_names_every_peer_and_both_successes(small):
    found = rows.image_dependent(small)
    assert len(found) == len(peers.DISTRIBUTIONS)
    for name, row in zip(peers.DISTRIBUTIONS, found, strict=True):
        here = peers.title(name) is not None
        assert (row.ratio is not None) == here and (f"of {name}" in row.note) == here
        assert "% of the" in row.note and row.unit == "images x steps / s"


def test_row_b_compares_at_equal_gradients_at_equal_error_and_at_equal_time(small, monkeypatch):
    """The peer is a stand-in here: a random pattern within the bound."""
    pattern = torch.empty(1, 3, 8, 8).uniform_(-16, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(peers, "title", lambda name: "ART 1.0")
    monkeypatch.setattr(peers, "universal", lambda *_, **__: pattern)
    monkeypatch.setattr(peers, "at_equal_gradients", lambda *_, **__: pattern)
    *equal, first, second, third, fourth = rows.universal(small)
    assert [row.unit for row in (first, second, third, fourth)] == ["s", "%"] * 2
    assert first.peer_name == "ART 1.0 UniversalPerturbation (pgd)" and "scored on 512 others" in first.note
    assert len(equal) == len(peers.UNIVERSAL) and all(row.unit == "%" and row.ours > row.peer for row in equal)
    assert equal[0].peer_name == "ten lines of sign-SGD" and " gradients each, on 128 images" in equal[0].note


def test_the_table_has_a_line_for_each_row_and_the_notes_below(small):
    options = {"what": "w", "unit": "s", "ours": [2.0], "peer_name": "p", "more_is_better": False}
    made = [small.row("c", peer=[5000.0], note="why", **options), small.row("e", peer=None, note="", **options)]
    lines = bench.table(made).splitlines()
    assert (
        "2500.00x" in lines[1] and "5,000" in lines[1] and lines[2].split() == ["e", "w", "2", "±0", "-", "s", "-", "p"]
    )
    assert lines[4] == "c (w): why" and len(lines) == 5


def test_the_command_writes_the_rows_as_json(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "Bench", lambda **_: small)
    assert main(["bench", "--only", "e", "--json", str(tmp_path / "new" / "bench.json")]) == 0
    found = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert [list(row) for row in found] == [KEYS] * 2 and found[0]["row"] == "e"
    assert isinstance(found[0]["ours"], float) and found[1]["peer"] is None
    assert "PyTorch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "a,z"], "--only z: expected some of a, b, c, d, e, f, g"),
        (["--repeats", "0"], "--repeats 0: expected at least 1"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
