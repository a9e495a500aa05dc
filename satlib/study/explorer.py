"""Panels to play with: move eps, sharedness or the target, and a trained network answers while you watch.

A panel asks its question (`satlib.study.live`) in a thread of its own and shows each answer as soon as it is there, the
first within a second. A newer question ends an older one, and so does its button: nothing queues up. What goes wrong is
shown in the panel.
"""

import base64
import contextlib
import html
import io
import itertools
import json
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from matplotlib.figure import Figure

from satlib import data
from satlib.card import Card
from satlib.checks import check_whole
from satlib.device import unrecorded
from satlib.errors import SatlibError
from satlib.evaluation import described, evaluate
from satlib.files import writing
from satlib.network import Network, OwnNetwork
from satlib.paths import cards_root, views_root
from satlib.segmentation import scene_target
from satlib.study import measurements
from satlib.study.claims import Model, Records, trained_models
from satlib.study.display import broken_by
from satlib.study.figures import explorer as drawings
from satlib.study.ledger import Ledger
from satlib.study.live import (
    Attack,
    Attacked,
    Cancellable,
    CancellableOwn,
    Shared,
    Sharing,
    Superseded,
    Target,
    attack,
    interval,
    share,
)
from satlib.study.measurement import Run
from satlib.study.measurements.cards import card_of
from satlib.study.records import Record
from satlib.study.runs import Runner
from satlib.study.settings import NOTEBOOKS
from satlib.study.settings import settings as settings_of

Answers = Iterator[tuple[Figure | Card, str]]  # each with what it shows, in words


class Panel:
    """Controls, and the newest answer to what they say.

    controls: widgets by the names of their settings. answer(settings, superseded): figures or cards with words for
    them, the later the better; it may raise `Superseded` as soon as superseded() is true. records(settings): what they
    stand on. begin: the words on a button that asks, for long work; else every move of a control does. A notebook
    displays the panel itself; start: whether its thread starts.
    """

    def __init__(
        self,
        controls: Mapping[str, widgets.Widget],
        answer: Callable[[dict[str, Any], Callable[[], bool]], Answers],
        records: Callable[[dict[str, Any]], list[Record]],
        *,
        begin: str = "",
        start: bool = True,
    ):
        self.controls, self._answer, self._records = dict(controls), answer, records
        self._asked = 0  # how many questions there were: an answer to an older one is not wanted
        self._cancelled = 0  # the last of them that nobody wants answered
        self._new = threading.Condition()
        self.status, self.picture = widgets.HTML(), widgets.HTML()
        self.cancel = widgets.Button(description="Cancel", icon="stop", disabled=True, tooltip="stop computing")
        self.cancel.on_click(lambda _: self.stop())
        self._view: tuple[Figure, dict[str, Any]] | None = None  # what is shown, and what it answers
        self.keep = widgets.Button(description="Save as PNG", icon="camera", disabled=True, tooltip="with its settings")
        self.keep.on_click(lambda _: self._keep())
        buttons = [self.cancel, self.keep]
        if begin:
            self.begin = widgets.Button(description=begin, icon="play", button_style="primary")
            self.begin.on_click(lambda _: self.ask())
            buttons = [self.begin, self.cancel]  # of cards, which are saved anyway
        rows = widgets.Box([*self.controls.values(), *buttons], layout=widgets.Layout(flex_flow="row wrap"))
        self.widget = widgets.VBox([rows, self.status, self.picture])
        for control in [] if begin else self.controls.values():
            control.observe(lambda change: self.ask(), names="value")
        if start:
            threading.Thread(target=self._work, daemon=True).start()
            self._say(f"<b>{html.escape(begin)}</b> starts it.") if begin else self.ask()

    @property
    def settings(self) -> dict[str, Any]:
        """What the controls say."""
        return {name: control.value for name, control in self.controls.items()}

    @property
    def records(self) -> list[Record]:
        """The records of what is shown under the present settings."""
        return self._records(self.settings)

    def figure(self) -> Figure:
        """The last answer to the present settings, computed here and now: what readers without widgets see."""
        with unrecorded():
            *_, (shown, _) = self._answer(self.settings, lambda: False)
        return shown.figure() if isinstance(shown, Card) else shown

    def save_view(self) -> Path:
        """Write what is shown as a PNG below `satlib.paths.views_root`, its settings in a line below and as JSON in its
        description. Raises SatlibError while no figure is shown."""
        if self._view is None:
            raise SatlibError("no figure is shown yet that could be saved")
        (figure, settings), stamp = self._view, time.strftime("%Y-%m-%d %H.%M.%S")
        names = (f"{stamp}{f' {number}' if number else ''}.png" for number in itertools.count())
        file = next(path for name in names if not (path := views_root() / name).exists())
        line = figure.text(0.005, 0.005, ", ".join(f"{name} {value}" for name, value in settings.items()), fontsize=8)
        described = {"Description": json.dumps(settings), "Software": None}
        try:
            with writing(file.parent):
                file.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(file, dpi=150, bbox_inches="tight", metadata=described)
        finally:
            line.remove()
        return file

    def _keep(self) -> None:
        busy = not self.cancel.disabled
        try:
            self._say(f"Saved as {html.escape(str(self.save_view()))}", busy=busy)
        except SatlibError as error:
            self._say(html.escape(str(error)), busy=busy, failed=not busy)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        named = ", ".join(control.description for control in self.controls.values())
        text = f"A panel with {named}: run this notebook in Jupyter to move them. The figure below is one answer."
        return (self.widget._repr_mimebundle_(**options) or {}) | {"text/plain": text}

    def ask(self) -> None:
        """Have the present settings answered, instead of whatever is being answered."""
        with self._new:
            self._asked += 1
            self.report("computing …")
            self._new.notify()

    def stop(self) -> None:
        """Have nothing answered until the next question."""
        with self._new:
            self._asked += 1
            self._cancelled = self._asked
            self._say("Cancelled: what stands below, if anything, answers an earlier question.")

    def report(self, text: str, done: float | None = None) -> None:
        """Say what is going on, and which share of it is done, where that is known."""
        share = "" if done is None else f' value="{done:.3f}"'
        self._say(
            f'<progress style="width: 7em" aria-label="progress"{share}></progress> {html.escape(text)}', busy=True
        )

    def _work(self) -> None:
        answered = 0
        while True:
            with self._new:
                self._new.wait_for(lambda seen=answered: self._asked > max(seen, self._cancelled))  # type: ignore[misc]
                answered = mine = self._asked
            self.answer_once(lambda mine=mine: self._asked > mine)  # type: ignore[misc]

    def answer_once(self, superseded: Callable[[], bool]) -> None:
        """Answer the present settings, unless superseded() becomes true; what goes wrong is said in the panel."""
        try:
            words, settings = "", {control.description: shown_value(control) for control in self.controls.values()}
            with unrecorded():
                for figure, words in self._answer(self.settings, superseded):
                    if superseded():
                        return
                    drawn = as_html(figure, words)
                    with self._new:  # no newer question and no cancelling comes between
                        if superseded():
                            return
                        self.picture.value = drawn
                        self._view = (figure, settings) if isinstance(figure, Figure) else None
                        self.keep.disabled = self._view is None
                        self._say(f"{html.escape(words)} <em>Refining …</em>", busy=True)
            self._finish(superseded, html.escape(words))
        except Superseded:
            pass
        except SatlibError as error:
            self._finish(superseded, f"<b>That does not work:</b> {html.escape(str(error))}", failed=True)
        except Exception as error:
            text, where = f"{type(error).__name__}: {error}", traceback.format_exc(limit=-2)
            text = f"<b>This is a bug:</b> {html.escape(text)}<pre>{html.escape(where)}</pre>"
            self._finish(superseded, text, failed=True)

    def _finish(self, superseded: Callable[[], bool], text: str, *, failed: bool = False) -> None:
        with self._new:
            if not superseded():
                self._say(text, failed=failed)

    def _say(self, text: str, *, busy: bool = False, failed: bool = False) -> None:
        colour, sign = "#b2182b" if failed else "#0173b2" if busy else "#333", "⏳ " if busy else ""
        self.cancel.disabled = not busy
        self.status.value = f'<div role="status" aria-live="polite" style="color: {colour}">{sign}{text}</div>'


def shown_value(control: widgets.Widget) -> Any:
    """What a control says, as its reader sees it: the name of a choice, the number of a slider."""
    return getattr(control, "label", None) or control.value


def as_html(shown: Figure | Card, words: str) -> str:
    """A figure as an image that needs no file, with what it shows for those who cannot see it; or a card."""
    if isinstance(shown, Card):
        return shown._repr_html_()
    file = io.BytesIO()
    shown.savefig(file, format="png", dpi=90)
    data, alt = base64.b64encode(file.getvalue()).decode(), html.escape(words, quote=True)
    return f'<img alt="{alt}" src="data:image/png;base64,{data}" style="max-width: 100%">'


class Models:
    """Networks to play with, by title. targets: those that there are, as `Target.of` makes one of yours."""

    def __init__(self, *targets: Target):
        self._loaded = {target.title: target for target in targets}

    @property
    def titles(self) -> list[str]:
        """Of all models."""
        return list(self._loaded)

    def records(self, settings: Mapping[str, Any]) -> list[Record]:
        """The record of the model that a panel's settings name; none of networks of yours."""
        return []

    def segments(self, title: str) -> bool:
        """Whether a model labels every pixel."""
        return self._loaded[title].segments

    def load(self, title: str) -> Target:
        """A model, ready to be attacked."""
        return self._loaded[title]


class ModelZoo(Models):
    """The trained models whose weights are here, by title; each is loaded when it is first asked for.

    They are those of sections 6.1 and 6.3 under `profile` and under "laptop", of the latter's real images where these
    are here. missing: what else there could be, and what is to be done for it. Raises SatlibError where there are none.
    """

    def __init__(self, runner: Runner, profile: str):
        super().__init__()
        self.runner, self.missing = runner, list[str]()
        self._offered: dict[str, tuple[Run, str]] = {}  # run, and the scene at which targeted attacks aim
        self._lock = threading.Lock()
        records = Records(runner.ledger)
        for name, (section, final) in itertools.product(dict.fromkeys((profile, "laptop")), (("6.1", 0), ("6.3", -1))):
            settings, plan = settings_of(section, name), measurements.plan(section, name)
            runs = [plan.erm, *(runs[final] for runs in plan.models.values())]
            trained = [run for run in runs if (record := records.of(run)) and record.has("weights")]
            if not is_here(settings.dataset):
                self.missing.append(f"{settings.dataset}: the data is not here; docs/data.md says where to get it")
            elif not trained:
                stem = next(stem for stem, sections in NOTEBOOKS.items() if section in sections)
                call = f"./run_all.sh --profile {name} --only {stem[:2]}"
                self.missing.append(f"{settings.dataset}: no weights are here; {call} trains them")
            else:
                target = getattr(settings, "target", "")
                for run in trained:
                    title = f"{run.title} · {settings.dataset}"
                    title += f" ({name})" if self._offered.get(title, (run, ""))[0] != run else ""
                    self._offered[title] = run, target
        if not self._offered:
            raise SatlibError(f"no trained model has its weights here: {'; '.join(self.missing)}")

    @property
    def titles(self) -> list[str]:
        return list(self._offered)

    def records(self, settings: Mapping[str, Any]) -> list[Record]:
        return [self.runner.record(self._offered[settings["model"]][0])]

    def segments(self, title: str) -> bool:
        return bool(self._offered[title][1])

    def load(self, title: str) -> Target:
        with self._lock:
            if title not in self._loaded:
                run, frame = self._offered[title]
                splits = self.runner.splits(run.dataset)
                scene = scene_target(splits, frame) if frame else None
                self._loaded[title] = Target(title, self.runner.model(run), splits, scene)
            return self._loaded[title]


def is_here(dataset: str) -> bool:
    """Whether a data set can be loaded: embedded, or found in the data root."""
    return data.is_embedded(dataset) or data.find(dataset) is not None


def _control(kind: Callable[..., widgets.Widget], name: str, value: Any, **options: Any) -> widgets.Widget:
    layout, style = widgets.Layout(width="31em"), {"description_width": "7em"}
    return kind(description=name, value=value, layout=layout, style=style, **options)


def _choice(name: str, options: Iterable[Any], value: Any) -> widgets.Widget:
    return _control(widgets.Dropdown, name, value, options=list(options))


def _slider(name: str, value: float, low: float, high: float, step: float) -> widgets.Widget:
    kind = widgets.IntSlider if isinstance(step, int) else partial(widgets.FloatSlider, readout_format=".4g")
    return _control(kind, name, value, min=min(low, value), max=max(high, value), step=step)


ANY, SCENE = -2, -1  # targets beside classes; a selection's None would be none of its options


def attack_panel(
    zoo: Models, *, model: str | None = None, eps: float = 16.0, steps: int = 100, start: bool = True
) -> Panel:
    """Attack a model: what a perturbation looks like, what it does, and how success grows with eps."""
    anything = ("any wrong answer", ANY)
    kinds = [("one perturbation for all images", False), ("one for each image", True)]
    chosen, aim = _choice("model", zoo.titles, model or zoo.titles[0]), _choice("target", [anything], ANY)

    def offer_aims(change: object = None) -> None:
        """The targets of the chosen model; the old choice stays where there is one of its name."""
        classes, kept = (), aim.label
        with contextlib.suppress(SatlibError):  # the answer then says why it cannot be loaded
            classes = zoo.load(chosen.value).splits.test.classes
        named = [("the target scene", SCENE)] if zoo.segments(chosen.value) else [(c, i) for i, c in enumerate(classes)]
        with aim.hold_trait_notifications():
            aim.options = [anything, *named]
            aim.value = dict(aim.options).get(kept, ANY)

    def answer(settings: dict[str, Any], superseded: Callable[[], bool]) -> Answers:
        target = zoo.load(settings.pop("model"))
        settings["target"] = None if settings["target"] == ANY else settings["target"]
        for each in attack(target, Attack(**settings), superseded):
            yield drawings.attack_figure(each), _attack_words(each)

    offer_aims()
    chosen.observe(offer_aims, names="value")  # before the panel, which then asks with targets that the model has
    controls = {
        "model": chosen,
        "own": _choice("attack", kinds, False),
        "eps": _slider("eps", eps, 0, 64, 1.0),
        "target": aim,
        "steps": _slider("steps", steps, 5, 200, 5),
        "seed": _slider("seed", 0, 0, 9, 1),
    }
    return Panel(controls, answer, zoo.records, start=start)


def _attack_words(answer: Attacked) -> str:
    low, high = (f"{100 * bound:.0f}" for bound in interval(answer.won))
    what = "pixels" if answer.target.segments else "predictions"
    won = "hit the target" if answer.question.target is not None else "are wrong"
    return (
        f"{answer.target.title}, eps = {answer.question.eps:g}: on {len(answer.won)} unseen images"
        f" {100 * answer.won.mean().item():.0f} % of the {what} {won} (95 % interval over images: {low} to {high} %)."
        f" {answer.steps} steps, {answer.seconds:.1f} s."
    )


def sharedness_panel(
    zoo: Models, *, model: str | None = None, sharedness: int = 8, eps: float = 16.0, start: bool = True
) -> Panel:
    """Share perturbations within a mini-batch: what they look like, whom they fool, and the four risks."""
    titles = [title for title in zoo.titles if not zoo.segments(title)]
    if not titles:
        raise SatlibError("no classifier is here, and sharedness is explored on classifiers")
    check_whole(sharedness=sharedness)
    heaps = sorted({sharedness, *(2**k for k in range(7))})
    controls = {
        "model": _choice("model", titles, model or titles[0]),
        "sharedness": _control(widgets.SelectionSlider, "s", sharedness, options=heaps),
        "eps": _slider("eps", eps, 0, 64, 1.0),
        "steps": _slider("steps", 20, 5, 200, 5),
        "seed": _slider("seed", 0, 0, 9, 1),
    }

    def answer(settings: dict[str, Any], superseded: Callable[[], bool]) -> Answers:
        for each in share(zoo.load(settings.pop("model")), Sharing(**settings), superseded):
            yield drawings.shared_figure(each), _shared_words(each)

    return Panel(controls, answer, zoo.records, start=start)


def _shared_words(answer: Shared) -> str:
    question = answer.question
    return (
        f"{answer.target.title}, eps = {question.eps:g}, shared by {question.sharedness}: wrong on"
        f" {100 * answer.own:.0f} % of their own heaps, on {100 * answer.unseen:.0f} % of unseen images."
        f" {answer.steps} of {question.steps} steps, {answer.seconds:.1f} s."
    )


def nearest_model(models: Sequence[Model], family: str, eps: float, sigma: float) -> Model:
    """Of the models that were run, the one of the family that is nearest in eps (per 26) and sigma; the family's only
    one where it has neither. Raises SatlibError for a family of which none was run."""

    def distance(model: Model) -> float:
        far = 0.0 if model.eps is None else abs(model.eps - eps) / 26
        return far + (0.0 if model.sigma is None else abs(model.sigma - sigma))

    if nearest := min((m for m in models if m.family == family), key=distance, default=None):
        return nearest
    raise SatlibError(f"no model of {family} was run; there are {', '.join(sorted({m.family for m in models}))}")


def tradeoff_panel(zoo: ModelZoo, profile: str, *, start: bool = True) -> Panel:
    """Choose a point of section 6.1: the nearest model that was really run is shown, with its perturbation."""
    records, runs = Records(zoo.runner.ledger), {}
    for name in dict.fromkeys((profile, "laptop")):
        if models := trained_models(measurements.plan("6.1", name), records):
            runs[f"{name}: {models[0].records[0].labels['dataset']}"] = (settings_of("6.1", name).dataset, models)
    if not runs:
        raise SatlibError("no model of section 6.1 has a record here; ./run_all.sh --only 04 makes some")
    families = list(dict.fromkeys(m.family for _, models in runs.values() for m in models))
    controls = {
        "runs": _choice("runs", runs, next(iter(runs))),
        "family": _choice("defence", families, "s = 64" if "s = 64" in families else families[0]),
        "eps": _slider("eps", 22.0, 2, 26, 2.0),
        "sigma": _slider("sigma", 0.7, 0.1, 1.0, 0.1),
    }

    def nearest(settings: Mapping[str, Any]) -> Model:
        _, models = runs[settings["runs"]]
        return nearest_model(models, settings["family"], settings["eps"], settings["sigma"])

    def answer(settings: dict[str, Any], superseded: Callable[[], bool]) -> Answers:
        (dataset, models), chosen, row, pictures = runs[settings["runs"]], nearest(settings), None, None
        if is_here(dataset) and chosen.searches[0].has("perturbation") and chosen.trainings[0].has("weights"):
            test = zoo.runner.splits(dataset).test.first(8)
            (row,) = broken_by(zoo.runner, [chosen], test)
            pictures = test.images.float().cpu().numpy()
        words = f"You asked for {settings['family']}, eps = {settings['eps']:g}, sigma = {settings['sigma']:.1f};"
        words += f" the nearest model that was run is {chosen.title}."
        yield drawings.trade_figure(models, chosen, row, pictures, dataset=settings["runs"]), words

    return Panel(controls, answer, lambda settings: list(nearest(settings).records), start=start)


def evaluation_panel(
    name: str,
    model: Network,
    images: Any,
    labels: Any,
    *,
    class_names: Sequence[str] = (),
    minutes: int = 2,
    start: bool = True,
) -> Panel:
    """Evaluate a network of yours by `satlib.evaluate`, while you watch: a button starts it, another one cancels it.

    The card is also saved, into the folder `name` of `satlib.paths.cards_root`, from which `made_cards` offers it.
    """
    controls = {
        "budget": _slider("minutes", minutes, 1, 120, 1),
        "seeds": _slider("seeds", 1, 1, 5, 1),
        "seed": _slider("first seed", 0, 0, 9, 1),
    }

    def answer(settings: dict[str, Any], superseded: Callable[[], bool]) -> Answers:
        def follow(text: str, done: float) -> None:
            if superseded():
                raise Superseded
            panel.report(f"{done:.0%}: {text}", done)

        net = (CancellableOwn if isinstance(model, OwnNetwork) else Cancellable)(model, superseded)
        options = settings | {"budget": 60.0 * settings["budget"], "class_names": class_names, "name": name}
        card = evaluate(net, images, labels, **options, progress=follow)
        card.network = described(model)
        if superseded():
            raise Superseded
        yield card, f"{card.verdict} Saved as {card.save(cards_root() / name)}"

    panel = Panel(controls, answer, lambda settings: [], begin="Evaluate", start=start)
    return panel


def made_cards(ledger: Ledger) -> dict[str, Callable[[], Card]]:
    """Every card that was made, by title, each to be read when it is called for: those of records, published ones among
    them, and those saved below `satlib.paths.cards_root`."""
    found: dict[str, Callable[[], Card]] = {}
    for record in ledger.records():
        if record.kind == "card" and record.has("perturbation") and record.has("examples"):
            title = f"{record.metrics['name']} · {record.labels['dataset']}"
            found[f"{title} ({record.id[:8]})" if title in found else title] = partial(card_of, record)
    root = cards_root()
    for file in sorted(root.glob("**/card.json")):
        found[str(file.parent.relative_to(root))] = partial(Card.load, file.parent)
    return found


def card_panel(cards: Mapping[str, Callable[[], Card]], *, start: bool = True) -> Panel:
    """Look at the cards that were made. Raises SatlibError where there are none."""
    if not cards:
        raise SatlibError("no card was made yet: notebook 11 makes some, and python -m satlib evaluate yours")
    controls = {"card": _choice("card", cards, next(iter(cards)))}

    def answer(settings: dict[str, Any], superseded: Callable[[], bool]) -> Answers:
        card = cards[settings["card"]]()
        yield card, f"{card.name}: {card.verdict}"

    return Panel(controls, answer, lambda settings: [], start=start)
