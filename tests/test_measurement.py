"""A run is known by what makes it differ: settings that equal the frozen defaults are not hashed."""

import inspect
import json
from pathlib import Path

import pytest
from torch import nn

from satlib import universal
from satlib.data import Splits
from satlib.errors import SatlibError
from satlib.paper import CIFAR10
from satlib.study import measurements
from satlib.study.claims import Records
from satlib.study.measurement import Measurement, measurement
from satlib.study.records import Record, merge_settings, split_settings

LEDGER = Path(__file__).resolve().parent.parent / "data" / "ledger"


@measurement(version=1, nested={"attack": lambda given: {"steps": 5, "beta": 4.0}})
def measured(
    model: nn.Module,
    others: list[Record],
    data: Splits,
    *,
    eps: float,
    attack: dict = {},  # noqa: B006
    seed: int = 0,
) -> dict:
    """A measurement that is only planned."""
    return {}


def plan(what: Measurement = measured, **given):
    return what.plan(CIFAR10, "a title", **{"eps": 8.0} | given)


def test_only_what_differs_is_hashed():
    run = plan(attack={"steps": 5})
    assert run.config == {"eps": 8} and run.defaults == {"attack": {"steps": 5, "beta": 4.0}, "seed": 0}
    assert run.settings == {"eps": 8.0, "attack": {"steps": 5, "beta": 4.0}, "seed": 0}
    other = plan(attack={"steps": 6, "beta": 4}, seed=1)
    assert other.config == {"eps": 8, "attack": {"steps": 6}, "seed": 1}
    assert plan(eps=8).config == plan(eps=8.0).config


def test_a_run_knows_what_it_builds_on():
    model = plan()
    run = plan(model=model, others=[model, model])
    assert list(run.parents) == ["model", "others 0", "others 1"] and list(run.ancestry()) == [model, run]
    assert (run.dataset, run.labels, run.kind) == ("cifar10", {"section": "6.1"}, "measured")
    assert measured.takes_model("model") and not measured.takes_model("others") and measured.takes_several("others")


@pytest.mark.parametrize("given", [{"epss": 1.0}, {"eps": 8.0, "sed": 1}])
def test_settings_that_it_does_not_have_are_named(given):
    with pytest.raises(
        SatlibError, match=r"measured: the setting '(epss|sed)' is unknown or missing; expected \['attack'"
    ):
        plan(**given)
    with pytest.raises(SatlibError, match="measured: the setting 'eps' is unknown or missing"):
        measured.plan(CIFAR10, "a title")


def published() -> dict[str, dict]:
    texts = (path.read_text() for path in LEDGER.glob("*/record.json"))
    return {record["id"]: record for record in map(json.loads, texts)}


def planned(profile: str):
    return [r for run in measurements.profile_runs(profile) for r in run.ancestry()]


def found_in_the_ledger(profile: str) -> set[str]:
    records = Records(published=True)
    return {record.id for run in planned(profile) if (record := records.of(run))}


def test_every_published_record_is_found_and_an_option_with_a_default_loses_none(monkeypatch):
    """The attack gets an option whose default does what was done before: ids stay, and every record is found."""
    before = found_in_the_ledger("laptop")
    laptop = {key for key, record in published().items() if record["labels"]["profile"] == "laptop"}
    assert before == laptop and len(before) > 150

    def with_option(attack):
        signature = inspect.signature(attack)
        option = inspect.Parameter("flavour", inspect.Parameter.KEYWORD_ONLY, default="plain")
        changed = lambda *args, **options: attack(*args, **options)  # noqa: E731
        changed.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])
        return changed

    for name, attack in universal.ATTACKS.items():
        monkeypatch.setitem(universal.ATTACKS, name, with_option(attack))
    assert "flavour" in measurements.plan("6.1", "laptop").robustness.popitem()[1][0].settings["attack"]
    assert found_in_the_ledger("laptop") == before


def test_defaults_are_frozen():
    """What is published was made with the defaults of today: one that is to change takes a new version, or a new name.

    The record's id hashes its settings that differed from the defaults of its day, and its other settings are kept
    beside them: split by the defaults of today they must part alike.
    """
    kinds = {run.kind: run.measurement for run in planned("laptop")}
    for record in published().values():
        settings = _merged(record["config"], record["defaults"])
        today = kinds[record["kind"]].defaults(settings)  # with options that came later, which it does not state
        known = split_settings(merge_settings(settings, today), today)[0]
        assert known == record["config"], f"{record['kind']} {record['labels']['title']}: a default has changed"


def _merged(config: dict, defaults: dict) -> dict:
    both = {k: _merged(v, defaults[k]) for k, v in config.items() if isinstance(v, dict) and k in defaults}
    return defaults | config | both
