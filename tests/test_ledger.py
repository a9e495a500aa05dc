"""The ledger keeps what was computed: through kills, company, bit flips and full disks."""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from satlib.errors import SatlibError
from satlib.study import records
from satlib.study.ledger import Ledger
from satlib.study.records import (
    CHECKPOINT,
    DamageWarning,
    RunSpec,
    Workspace,
    digest_of,
    merge_settings,
    read_record,
    split_settings,
)

RUNS, EPOCHS = 12, 5
processes = multiprocessing.get_context("fork")  # real processes to kill, without importing torch in each
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def spec(number=0, **config):
    return RunSpec("toy", {"number": number, **config}, version=1, data="f" * 64)


def note(log, *words):
    """Append one line in one write, so that lines of several processes do not mix and a kill cannot split one."""
    with Path(log).open("ab", buffering=0) as file:
        file.write((" ".join(map(str, words)) + "\n").encode())


def train(log, number, pause=0.0, epochs=EPOCHS):
    """A training run in miniature: epochs that depend on one another, a checkpoint after each, then artefacts."""

    def compute(work):
        weights, done = torch.eye(8) * (number + 1), 0
        if (found := work.load_checkpoint()) is not None:
            weights, done = found[0]["weights"], found[1]["epoch"]
        note(log, "start", number, done)
        for epoch in range(done, epochs):
            noise = torch.randn(8, 8, generator=torch.Generator().manual_seed(epoch))
            weights = torch.tanh(weights @ noise + 0.1 * weights)
            time.sleep(pause)
            work.save_checkpoint({"weights": weights}, {"epoch": epoch + 1})
            note(log, "saved", number, epoch + 1)
        work.save_tensors("weights", {"weights": weights})
        work.save_arrays("history", {"epochs": np.arange(epochs)})
        return {"norm": float(weights.norm()), "epochs": epochs}

    return compute


def sweep(root, pause, order, begin=None):
    torch.set_num_threads(1)  # a forked process has no thread pool
    if begin is not None:
        begin.wait()
    ledger = Ledger(root)
    for number in order:
        ledger.get_or_compute(spec(number), train(Path(root) / "log", number, pause))


def lines(root):
    with contextlib.suppress(FileNotFoundError):
        return [line.split() for line in (Path(root) / "log").read_text().splitlines()]
    return []


def results(root):
    found = [Ledger(root).find(spec(number).id) for number in range(RUNS)]
    return [(record.metrics, record.artefacts) for record in found if record is not None]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    root = tmp_path_factory.mktemp("uninterrupted")
    sweep(root, 0, range(RUNS))
    return results(root)


def leftovers(root):
    return [path for part in (".tmp", ".work") for path in (Path(root) / "runs" / part).glob("*")]


@contextlib.contextmanager
def no_damage():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DamageWarning)
        yield


# Ids


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_id_depends_on_the_config_alone_not_on_its_order_or_its_trip_through_a_file(config):
    backwards = dict(reversed(config.items()))
    again = json.loads(json.dumps(config))
    assert spec(more=config).id == spec(more=backwards).id == spec(more=again).id
    assert len(spec(more=config).id) == 64


def test_id_is_the_sha256_of_canonical_json():
    text = '{"config":{"eps":8,"name":"\\u03b5"},"data":"d","kind":"train","parents":{},"version":2}'
    assert RunSpec("train", {"name": "ε", "eps": 8.0}, 2, "d").id == hashlib.sha256(text.encode()).hexdigest()


def test_every_part_counts_towards_the_id():
    parent = spec().id
    base = RunSpec("kind", {"eps": 8}, 1, "data", {"model": parent})
    others = [
        RunSpec("other", {"eps": 8}, 1, "data", {"model": parent}),
        RunSpec("kind", {"eps": 8.5}, 1, "data", {"model": parent}),
        RunSpec("kind", {"eps": True}, 1, "data", {"model": parent}),
        RunSpec("kind", {"eps": 8}, 2, "data", {"model": parent}),
        RunSpec("kind", {"eps": 8}, 1, "else", {"model": parent}),
        RunSpec("kind", {"eps": 8}, 1, "data", {"start": parent}),
        RunSpec("kind", {"eps": 8}, 1, "data"),
    ]
    assert len({base, *others}) == 8
    assert base == RunSpec("kind", {"eps": 8.0}, 1, "data", {"model": parent})


def test_a_spec_keeps_its_id_when_the_callers_dict_changes():
    config = {"eps": [8, 16]}
    run = RunSpec("kind", config, 1)
    before = run.config["eps"][:]
    config["eps"].append(32)
    assert run.config["eps"] == before and run.id == RunSpec("kind", {"eps": [8, 16]}, 1).id


# Settings: what differs from the defaults makes the id


DEFAULTS = {"eps": 8, "loss": None, "attack": {"steps": 4, "beta": 4, "sizes": [1, 2]}, "sets": {}}


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({}, {}),
        ({"eps": 8.0, "attack": {"steps": 4.0, "beta": 4, "sizes": (1.0, 2)}}, {}),
        ({"eps": 8.5}, {"eps": 8.5}),
        ({"eps": True}, {"eps": True}),
        ({"eps": "8"}, {"eps": "8"}),
        ({"attack": {"steps": 5, "beta": 4, "sizes": [1, 2]}}, {"attack": {"steps": 5}}),
        ({"attack": DEFAULTS["attack"] | {"sizes": [2]}}, {"attack": {"sizes": [2]}}),
        ({"attack": DEFAULTS["attack"] | {"new": {"a": 1}}}, {"attack": {"new": {"a": 1}}}),
        ({"attack": {"steps": 5, "beta": 4}}, {"attack": {"steps": 5, "-sizes": None}}),
        ({"attack": {}}, {"attack": {"-steps": None, "-beta": None, "-sizes": None}}),
        ({"attack": None}, {"attack": None}),
        ({"loss": {"a": 1}, "sets": {"b": 2}}, {"loss": {"a": 1}, "sets": {"b": 2}}),
        ({"unknown": 3, "loss": {}}, {"unknown": 3, "loss": {}}),
    ],
)
def test_settings_are_split_into_what_differs_from_the_defaults_and_the_rest(changes, config):
    settings = DEFAULTS | changes
    differing, equal = split_settings(settings, DEFAULTS)
    assert differing == config and digest_of(differing) == digest_of(config)
    for defaults in (equal, DEFAULTS):
        assert digest_of(merge_settings(differing, defaults)) == digest_of(settings)


names = st.text(alphabet="abc", min_size=1, max_size=2)
some_settings = st.dictionaries(
    names, st.recursive(json_values, lambda inner: st.dictionaries(names, inner, max_size=3), max_leaves=6), max_size=4
)


def with_plain_keys(value):
    """Whether no name in these settings begins with the sign of what is left out."""
    if isinstance(value, dict):
        return all(not name.startswith("-") and with_plain_keys(item) for name, item in value.items())
    return True


@settings(deadline=None)
@given(some_settings.filter(with_plain_keys), some_settings.filter(with_plain_keys))
def test_what_settings_are_split_into_gives_them_back(chosen, defaults):
    config, equal = split_settings(chosen, defaults)
    merged = [merge_settings(config, rest) for rest in (equal, defaults)]
    assert [digest_of(m) for m in merged] == [digest_of(chosen)] * 2
    assert split_settings(chosen, chosen)[0] == {}


def test_settings_that_cannot_be_kept_are_refused_by_name():
    with pytest.raises(SatlibError, match=r"settings\['eps'\].*nan"):
        split_settings({"eps": math.nan}, {})
    with pytest.raises(SatlibError, match="'-eps' starts with '-'"):
        split_settings({"attack": {"-eps": 8}}, {"attack": None})


def test_an_option_that_is_added_with_a_default_leaves_the_records_found(tmp_path):
    def planned(chosen, defaults):
        config, equal = split_settings(chosen, defaults)
        return RunSpec("toy", config, 1, defaults=equal)

    ledger, chosen = Ledger(tmp_path), DEFAULTS | {"eps": 10}
    made = ledger.get_or_compute(planned(chosen, DEFAULTS), lambda work: {})
    assert (made.config, made.settings) == ({"eps": 10}, chosen)
    assert made.defaults == {name: value for name, value in DEFAULTS.items() if name != "eps"}
    longer = DEFAULTS["attack"] | {"schedule": "geometric"}
    later = planned(chosen | {"attack": longer}, DEFAULTS | {"attack": longer})
    assert later == planned(chosen, DEFAULTS) and later.defaults != planned(chosen, DEFAULTS).defaults
    assert ledger.find(later.id) == made
    assert ledger.find(planned(chosen | {"attack": longer | {"schedule": "none"}}, DEFAULTS).id) is None


def test_a_record_without_its_defaults_is_damaged(tmp_path):
    made = Ledger(tmp_path).get_or_compute(spec(eps=8), lambda work: {"value": 1})
    content = json.loads((made.path / "record.json").read_text())
    assert content.pop("defaults") == {}
    (made.path / "record.json").write_bytes(records.render_record(content))
    with pytest.warns(records.DamageWarning, match="not a record"):
        assert Ledger(tmp_path).find(made.id) is None


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ((1, 2), "tuple"),
        (math.nan, "nan"),
        (-math.inf, "inf"),
        (np.float64(1), "numpy.float64"),
        (torch.tensor(1.0), "torch.Tensor"),
        (Path("here"), "Path"),
        ({3: "three"}, "3"),
        (dataclasses.make_dataclass("Settings", ["eps"])(8), "Settings"),
    ],
)
def test_what_is_not_plain_json_is_refused_by_name(tmp_path, value, named):
    with pytest.raises(SatlibError, match=r"config\['outer'\]\[1\].*" + named) as caught:
        spec(outer=[0, value])
    with pytest.raises(SatlibError, match=r"defaults\['outer'\].*" + named):
        RunSpec("toy", {}, 1, defaults={"outer": value})
    assert "\n" not in str(caught.value)
    ledger = Ledger(tmp_path)
    with pytest.raises(SatlibError, match=r"metrics\['accuracy'\].*" + named):
        ledger.get_or_compute(spec(), lambda work: {"accuracy": value})
    with pytest.raises(SatlibError, match=r"labels\['title'\].*" + named):
        ledger.get_or_compute(spec(), lambda work: {}, labels={"title": value})
    assert ledger.records() == [] and leftovers(tmp_path) == []


def test_parents_and_look_ups_take_run_ids_only(tmp_path):
    with pytest.raises(SatlibError, match=r"parents.*'model'"):
        RunSpec("kind", {}, 1, "", {"model": "abc"})
    for wrong in ("abc", "../" + "a" * 61, "A" * 64, "a" * 64 + "\n", None):
        with pytest.raises(SatlibError, match="run id"):
            Ledger(tmp_path).find(wrong)


# Records


def test_a_run_is_computed_once_and_found_as_it_was_made(tmp_path):
    weights = {
        "bfloat": torch.randn(3, 4).bfloat16(),
        "view": torch.arange(12.0).reshape(3, 4).T,
        "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(5),
        "int": torch.tensor(7),
    }
    weights["shared"] = weights["view"][:2]

    def compute(work):
        work.save_tensors("weights", weights)
        work.save_arrays("curve", {"x": np.linspace(0, 1, 5)})
        return {"accuracy": 0.1 + 0.2, "eps": None, "list": [1, 2.0, "a"]}

    run = spec(seed=3, eps=8.0)
    made = Ledger(tmp_path).get_or_compute(run, compute, labels={"title": "Größe"})
    found = Ledger(tmp_path).get_or_compute(run, lambda work: pytest.fail("computed twice"))
    assert made == found == Ledger(tmp_path).find(run.id) and Ledger(tmp_path).records() == [made]
    assert found.metrics == {"accuracy": 0.1 + 0.2, "eps": None, "list": [1, 2.0, "a"]}
    assert (found.settings["seed"], found.labels, found.data) == (3, {"title": "Größe"}, "f" * 64)
    assert {"python", "torch", "numpy", "satlib"} <= set(found.versions) and found.device
    assert found.created.endswith("+00:00") and found.wall_seconds >= 0
    for name, tensor in found.tensors("weights").items():
        assert tensor.dtype == weights[name].dtype and torch.equal(tensor, weights[name])
    np.testing.assert_array_equal(found.arrays("curve")["x"], np.linspace(0, 1, 5))
    for file, entry in found.artefacts.items():
        content = (found.path / file).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    with pytest.raises(SatlibError, match=r"no artefact 'nothing'.*weights.safetensors"):
        found.tensors("nothing")


def test_commit_and_dirty_flag_are_those_of_the_project_checkout(tmp_path, monkeypatch):
    from satlib.study import provenance as where

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def provenance(root):
        monkeypatch.setenv("SATLIB_HOME", str(root))
        where.commit.cache_clear()
        return where.commit()

    try:
        assert provenance(tmp_path) == (None, None)
        (tmp_path / "satlib").mkdir()
        (tmp_path / "satlib" / "code.py").write_text("1")
        git("init", "-q")
        git("add", ".")
        git("commit", "-q", "-m", "first")
        assert provenance(tmp_path) == (git("rev-parse", "HEAD"), False)
        (tmp_path / "satlib" / "code.py").write_text("2")
        assert provenance(tmp_path) == (git("rev-parse", "HEAD"), True)
        assert provenance(tmp_path / "satlib") == (None, None)  # a folder of somebody's repository
    finally:
        where.commit.cache_clear()


def test_the_result_of_compute_and_the_names_of_artefacts_are_checked(tmp_path):
    ledger = Ledger(tmp_path)
    with pytest.raises(SatlibError, match="compute returned"):
        ledger.get_or_compute(spec(), lambda work: None)
    for name in ("../outside", "a/b", "", ".hidden", "x" * 200, "line\n"):
        with pytest.raises(SatlibError, match="expected a new name"):
            ledger.get_or_compute(spec(), lambda work, name=name: work.save_tensors(name, {"a": torch.ones(1)}))
    with pytest.raises(SatlibError, match=r"weights\['a'\] is list"):
        ledger.get_or_compute(spec(), lambda work: work.save_tensors("weights", {"a": [1.0]}))
    with pytest.raises(SatlibError, match=r"curve\['a'\]"):
        ledger.get_or_compute(spec(), lambda work: work.save_arrays("curve", {"a": np.array([object()])}))
    with pytest.raises(SatlibError, match="saved no artefact 'weights'"):
        ledger.get_or_compute(spec(), lambda work: {}, needs=["weights"])
    assert ledger.records() == [] and leftovers(tmp_path) == []


def test_force_computes_anew_and_replaces_record_and_artefacts(tmp_path):
    ledger = Ledger(tmp_path)

    def attempt(value, name):
        def compute(work):
            assert work.load_checkpoint() is None
            work.save_tensors(name, {"a": torch.full((3,), value)})
            return {"value": value}

        return compute

    ledger.get_or_compute(spec(), attempt(1.0, "first"))
    Workspace(tmp_path, tmp_path / "runs" / ".work" / spec().id).save_checkpoint({}, {"epoch": 1})
    second = ledger.get_or_compute(spec(), attempt(2.0, "second"), force=True)
    assert ledger.find(spec().id) == second and second.metrics == {"value": 2.0}
    assert sorted(path.name for path in second.path.iterdir()) == ["record.json", "second.safetensors"]
    assert leftovers(tmp_path) == []


def test_an_exception_leaves_only_the_checkpoint_and_the_next_attempt_goes_on_from_it(tmp_path):
    ledger, run = Ledger(tmp_path), spec()
    state = torch.randn(5)

    def fails(work):
        work.save_tensors("weights", {"a": torch.ones(3)})
        work.save_checkpoint({"state": state}, {"epoch": 2, "note": '"sha256":"' + "0" * 64})
        raise KeyboardInterrupt

    def goes_on(work):
        tensors, info = work.load_checkpoint()
        assert torch.equal(tensors["state"], state)
        work.save_tensors("weights", {"a": torch.ones(3)})
        return {"epoch": info["epoch"]}

    with pytest.raises(KeyboardInterrupt):
        ledger.get_or_compute(run, fails)
    assert ledger.find(run.id) is None and not ledger.busy(run.id)
    assert [path.name for path in leftovers(tmp_path)] == [run.id]
    assert ledger.status()["unfinished"] == [{"id": run.id, "running": False}]
    assert ledger.get_or_compute(run, goes_on).metrics == {"epoch": 2}
    assert leftovers(tmp_path) == []


def test_wall_time_counts_the_interrupted_attempts(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def fails(work):
        now[0] += 50
        work.save_checkpoint({}, {})
        now[0] += 7  # lost with the attempt
        raise RuntimeError

    def goes_on(work):
        work.load_checkpoint()
        now[0] += 20
        return {}

    with pytest.raises(RuntimeError):
        Ledger(tmp_path).get_or_compute(spec(), fails)
    assert Ledger(tmp_path).get_or_compute(spec(), goes_on).wall_seconds == 70


def test_records_lists_each_run_once_oldest_first(tmp_path):
    ledger = Ledger(tmp_path)
    made = [ledger.get_or_compute(spec(n), train(tmp_path / "log", n)) for n in range(4)]
    ledger.publish([record.id for record in made[:3]])
    shutil.rmtree(made[0].path)
    found = ledger.records()
    assert [record.id for record in found] == [record.id for record in sorted(made, key=lambda r: (r.created, r.id))]
    homes = {record.id: record.path.parent.name for record in found}
    assert [homes[record.id] for record in made] == ["ledger", "runs", "runs", "runs"]


# Published records


def test_a_published_record_serves_without_its_large_artefacts_until_they_are_needed(tmp_path):
    ledger = Ledger(tmp_path)
    made = ledger.get_or_compute(spec(), train(tmp_path / "log", 0))
    (published,) = ledger.publish([made.id[:9]], ["history"])
    shutil.rmtree(made.path)
    found = ledger.get_or_compute(spec(), lambda work: pytest.fail("it is published"), needs=["history"])
    assert found == published and found.metrics == made.metrics and found.artefacts == made.artefacts
    assert found.has("history") and not found.has("weights") and len(found.arrays("history")["epochs"]) == EPOCHS
    with pytest.raises(SatlibError, match=r"weights.safetensors is not here.*force"):
        found.tensors("weights")
    assert ledger.find(made.id, ["weights"]) is None
    again = ledger.get_or_compute(spec(), train(tmp_path / "log", 0), needs=["weights"])
    assert again.path.parent == ledger.runs and again.has("weights")
    assert len([line for line in lines(tmp_path) if line[0] == "start"]) == 2


def test_publish_checks_everything_before_it_writes(tmp_path):
    ledger = Ledger(tmp_path)
    made = [ledger.get_or_compute(spec(n), train(tmp_path / "log", n)) for n in range(2)]
    ids = [record.id for record in made]
    with pytest.raises(SatlibError, match=r"weights.safetensors has \d+ bytes; max_bytes is 10"):
        ledger.publish(ids, ["weights"], max_bytes=10)
    with pytest.raises(SatlibError, match="none of the 2 records has an artefact 'wieghts'"):
        ledger.publish(ids, ["wieghts"])
    with pytest.raises(SatlibError, match="no sound record"):
        ledger.publish([ids[0], "0" * 64])
    with pytest.raises(SatlibError, match="no sound record"):
        ledger.publish([""])
    assert not list(ledger.ledger.glob("*"))
    ledger.publish(ids, ["weights"])
    ledger.publish(ids)  # what was published before stays
    assert sorted(path.name for path in (ledger.ledger / ids[0]).iterdir()) == ["record.json", "weights.safetensors"]
    shutil.rmtree(ledger.runs)
    ledger.publish(ids)
    assert Ledger(tmp_path).find(ids[1], ["weights"]) is not None


def test_weights_are_published_in_half_precision_where_asked(tmp_path):
    """Vectors, such as batch norm's statistics, stay as they are; what half precision cannot hold is refused."""
    ledger = Ledger(tmp_path)

    def compute(work):
        weights = {"kernel": torch.randn(64, 32, 3, 3), "running_var": torch.full((4,), 1e6), "count": torch.tensor(7)}
        work.save_tensors("weights", weights | {"large": torch.full((2, 2), 7e4 if large else 6e4)})
        work.save_tensors("perturbation", {"xi": torch.randn(1, 3, 8, 8)})
        return {}

    large = False
    made = ledger.get_or_compute(spec(1), compute)
    before = made.tensors("weights"), made.tensors("perturbation")
    (published,) = ledger.publish([made.id], ["weights", "perturbation"], half=["weights"])
    shutil.rmtree(ledger.runs)
    found = Ledger(tmp_path).find(made.id, ["weights", "perturbation"])
    assert found == published and found.metrics == made.metrics and found.created == made.created
    weights = found.tensors("weights")
    assert {name: value.dtype for name, value in weights.items()} == {
        "kernel": torch.float16,
        "large": torch.float16,
        "running_var": torch.float32,
        "count": torch.int64,
    }
    assert torch.equal(weights["kernel"], before[0]["kernel"].half())
    assert torch.equal(weights["running_var"], before[0]["running_var"])
    assert torch.equal(found.tensors("perturbation")["xi"], before[1]["xi"])
    assert found.artefacts["weights.safetensors"]["bytes"] < 0.6 * made.artefacts["weights.safetensors"]["bytes"]
    ledger.publish([made.id])  # what it was published with stays, as it was published
    assert torch.equal(Ledger(tmp_path).find(made.id).tensors("weights")["kernel"], weights["kernel"])
    large = True
    other = ledger.get_or_compute(spec(2), compute)
    with pytest.raises(SatlibError, match="large has numbers above 65,504"):
        ledger.publish([other.id], ["weights"], half=["weights"])
    with pytest.raises(SatlibError, match="half names 'weights', which is not among the artefacts"):
        ledger.publish([other.id], half=["weights"])


def test_an_ambiguous_prefix_is_refused(tmp_path):
    for digit in "12":
        (tmp_path / "runs" / ("ab" + digit * 62)).mkdir(parents=True)
    with pytest.raises(SatlibError, match=r"2 runs .* give more digits"):
        Ledger(tmp_path).get("ab")


def test_a_damaged_published_record_is_named_left_in_place_and_not_used(tmp_path):
    ledger = Ledger(tmp_path)
    made = ledger.get_or_compute(spec(), train(tmp_path / "log", 0))
    ledger.publish([made.id], ["weights"])
    shutil.rmtree(made.path)
    flip(ledger.ledger / made.id / "weights.safetensors", 99)
    with pytest.warns(DamageWarning, match=f"{made.id}/weights.safetensors.*git checkout"):
        again = ledger.get_or_compute(spec(), train(tmp_path / "log", 0))
    assert again.path.parent == ledger.runs and (ledger.ledger / made.id / "weights.safetensors").exists()


# Damage


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_found_named_set_aside_and_recomputed(tmp_path):
    ledger, chance = Ledger(tmp_path), random.Random(5)
    first = ledger.get_or_compute(spec(), train(tmp_path / "log", 0))
    files = sorted(path.name for path in first.path.iterdir())
    assert files == ["history.npz", "record.json", "weights.safetensors"]
    count = 0
    for file in files:
        for _ in range(8):
            path = first.path / file
            ledger.find(first.id)
            flip(path, chance.randrange(8 * path.stat().st_size))
            damaged = path.read_bytes()
            with pytest.warns(DamageWarning, match=f"{first.id}/{file}.*set aside in .*damaged"):
                again = ledger.get_or_compute(spec(), train(tmp_path / "log", 0))
            count += 1
            assert (again.metrics, again.artefacts) == (first.metrics, first.artefacts)
            assert (tmp_path / "damaged" / f"{first.id}-{count}" / file).read_bytes() == damaged
            with no_damage():
                assert ledger.find(first.id) == again
    assert ledger.status()["damaged"] == sorted(f"{first.id}-{n + 1}" for n in range(count))


def test_no_single_bit_of_a_record_can_change_unseen(tmp_path):
    made = Ledger(tmp_path).get_or_compute(spec(tiny=1e-5), train(tmp_path / "log", 0), labels={"title": "Größe"})
    text = (made.path / "record.json").read_bytes()
    assert records.parse_record(text, made.path) == made
    for bit in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(records.Damage):
            records.parse_record(bytes(flipped), made.path)


def test_no_bit_of_a_checkpoint_can_change_unseen(tmp_path):
    work = Workspace(tmp_path, tmp_path / "work")
    path = tmp_path / "work" / CHECKPOINT
    work.save_checkpoint({"a": torch.arange(4)}, {"epoch": 3})
    content = path.read_bytes()
    for bit in random.Random(7).sample(range(8 * len(content)), 300):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        flip(path, bit)
        with pytest.warns(DamageWarning, match=str(path)):
            assert work.load_checkpoint() is None
        assert not path.exists()


@pytest.mark.parametrize("harm", ["no record", "a file", "cut short", "empty", "another run's", "no JSON", "deep"])
def test_other_damage_is_set_aside_too(tmp_path, harm):
    ledger = Ledger(tmp_path)
    made = ledger.get_or_compute(spec(), train(tmp_path / "log", 0))
    other = ledger.get_or_compute(spec(1), train(tmp_path / "log", 1))
    record = made.path / "record.json"
    if harm == "no record":
        record.unlink()
    elif harm == "a file":
        shutil.rmtree(made.path)
        made.path.write_text("hello")
    else:
        content = {
            "cut short": record.read_bytes()[:-20],
            "empty": b"",
            "another run's": (other.path / "record.json").read_bytes(),
            "no JSON": b"\xff\xfe",
            "deep": b"[" * 200_000,
        }
        record.write_bytes(content[harm])
    with pytest.warns(DamageWarning, match=f"{made.id}.*set aside"):
        assert ledger.records() == [other]
    assert ledger.find(made.id) is None and (tmp_path / "damaged" / f"{made.id}-1").exists()
    assert ledger.get_or_compute(spec(), train(tmp_path / "log", 0)).metrics == made.metrics


def test_a_record_whose_artefact_is_damaged_later_does_not_hand_it_out(tmp_path):
    made = Ledger(tmp_path).get_or_compute(spec(), train(tmp_path / "log", 0))
    flip(made.path / "weights.safetensors", 1234)
    with pytest.raises(SatlibError, match=r"weights\.safetensors is damaged"):
        made.tensors("weights")


def test_unchanged_artefacts_are_hashed_once(tmp_path, monkeypatch):
    made = Ledger(tmp_path).get_or_compute(spec(), train(tmp_path / "log", 0))
    for path in made.path.iterdir():
        os.utime(path, (1, 1))
    monkeypatch.setattr(records.time, "time_ns", lambda: time.time() * 1e9 + 3e9)  # they have settled
    hashed = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or real(file, name))
    for _ in range(3):
        assert Ledger(tmp_path).find(made.id) == made
    assert len(hashed) == len(made.artefacts)


# Kills


def watch(root, stop, found):
    """Look every run up over and over: each is either absent or whole, and nothing is ever damaged."""
    with no_damage():
        while not stop.is_set():
            for number in range(RUNS):
                if (record := Ledger(root).find(spec(number).id)) is not None:
                    assert record.tensors("weights")["weights"].shape == (8, 8)
                    assert set(record.metrics) == {"norm", "epochs"}
                    found.value += 1
            Ledger(root).records()


def test_a_sweep_killed_at_random_moments_ends_as_if_nothing_had_happened(tmp_path, uninterrupted):
    chance, kills, resumed, finished = random.Random(11), 0, 0, []
    while kills < 25:
        root = tmp_path / str(len(finished))
        root.mkdir()
        stop, found = processes.Event(), processes.Value("q", 0)
        reader = processes.Process(target=watch, args=(root, stop, found))
        reader.start()
        whole: set[str] = set()
        while True:
            position = len(lines(root))
            begin = processes.Event()
            child = processes.Process(target=sweep, args=(root, 0.002, range(RUNS), begin))
            child.start()
            begin.set()
            deadline = time.monotonic() + 120
            while len(lines(root)) == position and child.is_alive() and time.monotonic() < deadline:
                time.sleep(0.0005)
            if kills < 25:
                time.sleep(chance.uniform(0, 0.12))
                child.kill()
            child.join()
            attempt = lines(root)[position:]
            started = {number for word, number, _ in attempt if word == "start"}
            assert not started & whole, "a finished run was computed again"
            if child.exitcode == 0:
                break
            assert child.exitcode == -signal.SIGKILL
            kills += 1
            with no_damage():
                whole = {str(n) for n in range(RUNS) if Ledger(root).find(spec(n).id) is not None}
        stop.set()
        reader.join()
        assert reader.exitcode == 0 and found.value > 0
        saved: dict[str, int] = {}
        for word, number, epoch in lines(root):
            if word == "start":
                assert int(epoch) >= saved.get(number, 0), "a finished epoch was lost"
                resumed += int(epoch) > 0
            saved[number] = int(epoch)
        assert results(root) == uninterrupted
        assert leftovers(root) == [] and not (root / "damaged").exists()
        finished.append(root)
    assert resumed > 0


def killed_at(step, root, force):
    """Compute one run, and die just before the given step among all that open, rename, remove or sync its files."""
    count = 0

    def before(event, arguments):
        nonlocal count
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.fsync")
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) and str(root) in str(arguments[0])
        if changes or writes:
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync
    os.fsync = lambda descriptor: before("os.fsync", ()) or fsync(descriptor)  # the one that is not audited
    sys.addaudithook(before)
    Ledger(root).get_or_compute(spec(), train(Path(root) / "log", 0, epochs=1), force=force)


@pytest.mark.parametrize("force", [False, True])
def test_a_kill_at_any_step_leaves_the_run_whole_or_absent(tmp_path, force):
    expected = Ledger(tmp_path / "0").get_or_compute(spec(), train(tmp_path / "log", 0, epochs=1))
    step = 0
    while True:
        step += 1
        root = tmp_path / str(step)
        if force:
            shutil.copytree(tmp_path / "0", root)
        child = processes.Process(target=killed_at, args=(step, root, force))
        child.start()
        child.join()
        with no_damage():
            record = Ledger(root).find(spec().id)
            assert not (force and record is None), f"step {step}: the old record was lost"
            again = Ledger(root).get_or_compute(spec(), train(root / "log", 0, epochs=1))
        assert (again.metrics, again.artefacts) == (expected.metrics, expected.artefacts)
        assert record in (None, again) and leftovers(root) == []
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert step > 20


# Company


@pytest.mark.parametrize("count", [2, 4])
def test_sweeps_at_once_share_the_work(tmp_path, uninterrupted, count):
    begin, chance = processes.Event(), random.Random(count)
    orders = [chance.sample(range(RUNS), RUNS) for _ in range(count)]
    children = [processes.Process(target=sweep, args=(tmp_path, 0.002, order, begin)) for order in orders]
    for child in children:
        child.start()
    begin.set()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * count
    starts = [number for word, number, _ in lines(tmp_path) if word == "start"]
    assert sorted(starts, key=int) == [str(number) for number in range(RUNS)]
    assert results(tmp_path) == uninterrupted and leftovers(tmp_path) == []


def test_a_sweep_takes_over_from_one_that_is_killed_beside_it(tmp_path, uninterrupted):
    begin = processes.Event()
    children = [processes.Process(target=sweep, args=(tmp_path, 0.01, range(RUNS), begin)) for _ in range(2)]
    for child in children:
        child.start()
    begin.set()
    while len(lines(tmp_path)) < 8:
        time.sleep(0.001)
    children[0].kill()
    for child in children:
        child.join()
    assert children[1].exitcode == 0 and results(tmp_path) == uninterrupted


def replace_over_and_over(root, stop):
    count = 0
    while not stop.is_set():
        count += 1

        def compute(work, count=count):
            work.save_tensors("weights", {"a": torch.full((1000,), float(count))})
            return {"count": count}

        Ledger(root).get_or_compute(spec(), compute, force=True)


def test_a_reader_beside_a_writer_that_replaces_sees_no_damage(tmp_path):
    stop = processes.Event()
    writer = processes.Process(target=replace_over_and_over, args=(tmp_path, stop))
    writer.start()
    seen = set()
    with no_damage():
        while len(seen) < 25 and writer.is_alive():
            for record in (Ledger(tmp_path).find(spec().id), *Ledger(tmp_path).records()):
                if record is not None:
                    seen.add(record.metrics["count"])
    stop.set()
    writer.join()
    assert writer.exitcode == 0 and len(seen) >= 25


def test_where_locks_do_not_hold_the_slower_result_is_dropped(tmp_path, monkeypatch):
    """As on some network file systems: a run is computed twice, and the record that came first stays, whole."""
    monkeypatch.setattr(Ledger, "lock", lambda self, run_id: contextlib.nullcontext())
    monkeypatch.setattr(Ledger, "holding", lambda *_, **__: contextlib.nullcontext())
    slow, fast = Ledger(tmp_path), Ledger(tmp_path)

    def compute(work, name):
        work.save_checkpoint({"weights": torch.ones(2)}, {"epoch": 1})
        work.save_tensors("weights", {"weights": torch.full((2,), float(len(name)))})
        return {"by": name}

    def late(work):
        metrics = compute(work, "slow")
        first = fast.get_or_compute(spec(), lambda other: compute(other, "first"))
        assert first.metrics == {"by": "first"}
        return metrics

    record = slow.get_or_compute(spec(), late, needs=["weights"])
    assert record.metrics == {"by": "first"} and record.tensors("weights")["weights"].tolist() == [5.0, 5.0]
    assert fast.find(spec().id).metrics == {"by": "first"}
    assert not list((tmp_path / "runs").glob(".tmp/*")) and not list((tmp_path / "runs").glob(".work/*"))


def test_waiting_is_announced_and_ends_with_the_others_record(tmp_path, monkeypatch):
    started, release = threading.Event(), threading.Event()

    class Screen(io.StringIO):
        def write(self, text):
            release.set()  # the other run goes on once the wait was announced
            return super().write(text)

    def slow(work):
        started.set()
        assert release.wait(60)
        return {"by": "the other"}

    ledger = Ledger(tmp_path)
    other = threading.Thread(target=ledger.get_or_compute, args=(spec(), slow))
    other.start()
    assert started.wait(60)
    assert ledger.busy(spec().id) and not ledger.busy(spec(1).id)
    assert ledger.status()["unfinished"] == [{"id": spec().id, "running": True}]
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    found = ledger.get_or_compute(spec(), lambda work: pytest.fail("computed twice"), labels={"title": "ERM"})
    other.join()
    assert found.metrics == {"by": "the other"} and not ledger.busy(spec().id)
    assert screen.getvalue().count("\n") == 1
    assert f"waiting for run {spec().id[:12]} (toy ERM)" in screen.getvalue()


# Full and read-only disks


def fails_with(number):
    def fail(*arguments, **keywords):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", ["ENOSPC", "EROFS", "EACCES", "EDQUOT", "EIO"])
@pytest.mark.parametrize("where", ["fsync", "rename", "replace"])
def test_a_disk_that_fails_ends_the_run_cleanly(tmp_path, monkeypatch, number, where):
    import errno

    ledger = Ledger(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(os, where, fails_with(getattr(errno, number)))
        with pytest.raises(SatlibError, match=r"cannot be written .* bytes are free.*SATLIB_HOME") as caught:
            ledger.get_or_compute(spec(), train(tmp_path / "log", 0))
    assert "\n" not in str(caught.value)
    assert ledger.find(spec().id) is None and not ledger.busy(spec().id)
    assert not list((tmp_path / "runs" / ".tmp").glob("*")) and not list((tmp_path / "runs").rglob("*.new"))
    assert ledger.get_or_compute(spec(), train(tmp_path / "log", 0)).metrics["epochs"] == EPOCHS


def test_an_error_of_compute_is_not_taken_for_one_of_the_ledgers_disk(tmp_path):
    def compute(work):
        raise PermissionError(13, "the data set is not readable")

    with pytest.raises(PermissionError, match="data set"):
        Ledger(tmp_path).get_or_compute(spec(), compute)


def test_a_root_that_cannot_hold_folders_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SatlibError, match="cannot be written"):
        Ledger(tmp_path / "file").get_or_compute(spec(), lambda work: pytest.fail("too late"))


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 128 KiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_really_full_disk_ends_cleanly_and_serves_again_when_it_has_room(small_disk):
    ledger = Ledger(small_disk)
    kept = ledger.get_or_compute(spec(), train(small_disk / "log", 0))

    def large(work):
        work.save_tensors("large", {"a": torch.zeros(100_000)})
        return {}

    with pytest.raises(SatlibError, match=r"No space left on device; [\d,]+ bytes are free"):
        ledger.get_or_compute(spec(1), large)
    assert ledger.find(spec(1).id) is None and ledger.find(kept.id) == kept and leftovers(small_disk) == []
    assert ledger.get_or_compute(spec(2), train(small_disk / "log", 2)).metrics["epochs"] == EPOCHS


def test_a_read_only_disk_can_be_read_and_says_so_when_it_should_be_written(small_disk):
    kept = Ledger(small_disk).get_or_compute(spec(), train(small_disk / "log", 0))
    harmed = Ledger(small_disk).get_or_compute(spec(1), train(small_disk / "log", 1))
    flip(harmed.path / "weights.safetensors", 77)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    ledger = Ledger(small_disk)
    assert ledger.find(kept.id) == kept and len(ledger.records()) == 2
    with pytest.warns(DamageWarning, match="not set aside"):
        assert ledger.find(harmed.id) is None
    with pytest.raises(SatlibError, match="Read-only file system"):
        ledger.get_or_compute(spec(2), lambda work: pytest.fail("too late"))


def test_digest_and_reading_are_those_of_the_documentation(tmp_path):
    made = Ledger(tmp_path).get_or_compute(spec(), train(tmp_path / "log", 0))
    content = json.loads((made.path / "record.json").read_text())
    assert content.pop("digest") == digest_of(content)
    assert read_record(made.path) == made and read_record(tmp_path / "nothing") is None
