"""A bound that anybody may lower: a perturbation from outside, checked against a published model, and recorded."""

import re
from pathlib import Path

from satlib.checks import check
from satlib.errors import SatlibError
from satlib.progress import Progress
from satlib.study import measurements
from satlib.study.claims import Records
from satlib.study.measurements.bounds import bound_run, load, rated, taken
from satlib.study.runs import Runner


def offered(
    file: Path, title: str, *, author: str, profile: str, section: str, device: str | None = None
) -> tuple[bool, str]:
    """Whether the perturbation in a file is the smallest that is known to win on the model of that title, and in words
    what it does; if so, it is recorded under its author's name.

    Measured are the images on which the model's searches report. Raises SatlibError for an unknown model, one whose
    weights are not there for the images that are here, and what is no perturbation of that shape.
    """
    check(
        "up to 60 letters, digits, spaces and . , ' ( ) @ -", re.compile(r"[\w .,'()@-]{1,60}").fullmatch, author=author
    )
    plan, xi = measurements.plan(section, profile), load(file)
    models = {run.title: run for run in plan.trained}
    if title not in models:
        known = ", ".join(map(repr, models))
        raise SatlibError(f"no model {title!r} in section {section} of profile {profile!r}: expected one of {known}")
    model = models[title]
    searches = [*plan.robustness[model], *plan.strongest.get(model, ())]
    runner, settings = Runner(profile=profile, device=device, progress=Progress()), searches[0].settings
    data = runner.splits(model.dataset)
    if (record := runner.find(model, whole=True)) is None or not record.has("weights"):
        raise SatlibError(f"no weights of {title!r} for these images ({data.train.title}): expected the published ones")
    eps, rate = rated(runner.model(model), data, xi, settings["sets"], settings["images"])
    records = Records(runner.ledger)
    sizes = [each.metrics["eps_uni"] for each in (*records.found(searches), *records.bounds(model, searches[0]))]
    smallest = min((size for size in sizes if size is not None), default=None)
    told = f"{file}: size {eps:.2f}, wins {rate:.1%} of the images that report; "
    told += "none is known to win" if smallest is None else f"the smallest known to win has size {smallest:.2f}"
    if rate < settings["delta"] - 1e-7 or (smallest is not None and eps >= smallest):
        return False, f"{told}. No new bound: expected {settings['delta']:.0%} of the images, at a smaller size"
    record = runner.record(bound_run(model, searches[0], taken(xi), author))
    return True, f"{told}. A new bound, by {author}: record {record.id}; `ledger publish` has it tracked"
