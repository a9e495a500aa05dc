"""What is measured: one function for each row of the benchmark. Its docstring's first line is the row's title."""

import copy
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from satlib.attacks import attackable, heap_pgd, perturb, pgd_step, spend, success_rates, universal_pgd
from satlib.bench import peers
from satlib.bench.race import Bench, Row
from satlib.checks import kernel
from satlib.data.imageset import ImageSet
from satlib.data.imagetree import ImageFile, workers_here
from satlib.data.streamed import StreamedImages, StreamedSet
from satlib.defenses import DEFENSES, Crafted
from satlib.device import autocast, recorded
from satlib.models import BottleneckResNet, FCN8s
from satlib.paper import CIFAR10
from satlib.parallel import Ranks
from satlib.robustness import LARGEST, Robustness, strongest, success_curve, universal_robustness
from satlib.training import (
    ERM,
    Adversary,
    SharedAdversarialTraining,
    Training,
    changed,
    new_optimizer,
    training_step,
)
from satlib.universal import ATTACKS

CAPPED = {"loss_threshold": CIFAR10.loss_threshold, "label_smoothing": CIFAR10.label_smoothing}
EPOCH = 50_000  # images, as in the paper
NOBODY = "none installed (extra `bench`)"


def first(images: ImageSet, count: int) -> ImageSet:
    """At most `count` images of the set."""
    return images.first(min(count, len(images)))


@torch.no_grad()
def wrong(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Misclassification rate in float32, by the model as it was trained."""
    return (model(images).argmax(1) != labels).float().mean().item()


def image_dependent(bench: Bench) -> list[Row]:
    """Image-dependent PGD: gradient steps a second, and success at equal steps"""
    eps, steps, batch, model = 8.0, 10, 512 if bench.on_cuda else 128, bench.model
    few = first(bench.splits.test, 1024 if bench.on_cuda else 512)
    x, y = few.images.float(), few.labels

    def ours() -> Tensor:
        parts = zip(x.split(batch), y.split(batch), strict=True)
        options = {"eps": eps, "sharedness": 1, "steps": steps, "step_size": eps / 4}
        return torch.cat([perturb(a, heap_pgd(model, a, b, **options), 1) for a, b in parts])

    theirs = functools.partial(peers.image_dependent, model=model, x=x, y=y, eps=eps, steps=steps, batch=batch)
    here = [name for name in peers.DISTRIBUTIONS if peers.title(name)]
    attacks = {"ours": ours} | {name: functools.partial(theirs, name) for name in here}
    rates = {name: [len(x) * steps / s for s in seconds] for name, seconds in bench.race(attacks).items()}
    success = {name: f"{wrong(model, attack(), y):.1%}" for name, attack in attacks.items()}
    a, b = x[:batch].contiguous(memory_format=torch.channels_last), y[:batch]
    bound = torch.full((1, 1, 1, 1), eps, device=a.device)
    with attackable(model) as net:
        share = bench.share_of_peak(
            lambda: pgd_step(net, a, b, torch.zeros_like(a), bound, bound / 4, sharedness=1),
            batch / statistics.median(rates["ours"]),
        )
    compared = functools.partial(
        bench.row, "a", "PGD, eps 8, 10 steps", unit="images x steps / s", ours=rates["ours"], more_is_better=True
    )
    note, found = f"{share}; success {success['ours']}", []
    for name in peers.DISTRIBUTIONS:
        against = f" against {success[name]} of {name}" if name in here else ""
        found.append(compared(peer=rates.get(name), peer_name=peers.title(name) or NOBODY, note=note + against))
    return found


def universal(bench: Bench) -> list[Row]:
    """Universal perturbation, eps 16: error at equal gradients; seconds to ART's final error, error at its own time"""
    eps, model = 16.0, bench.model
    craft, unseen = first(bench.splits.val, 400), first(bench.splits.test, 1000)
    x, y = craft.images.float(), craft.labels

    def ours(steps: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return universal_pgd(model, craft.images, y, eps=eps, steps=steps, batch_size=32, generator=generator)

    def error(xi: Tensor) -> float:
        return success_rates(model, unseen.images, unseen.labels, xi).item()

    def seconds(steps: int) -> list[float]:
        return bench.race({"ours": lambda: ours(steps)})["ours"]

    before = spend(0)
    sets = {"craft": (x, y), "report": (unseen.images, unseen.labels)}
    (best,) = success_curve(model, **sets, epsilons=[eps], generator=torch.Generator().manual_seed(0))
    budget, found = spend(0) - before, []
    for name in peers.UNIVERSAL:
        if name != "sign-SGD" and not peers.title(name):
            continue
        xi = peers.at_equal_gradients(name, copy.deepcopy(model).eval(), x, y, eps=eps, budget=budget).detach()
        title = peers.title(name) if name != "sign-SGD" else "ten lines of sign-SGD"
        errors = {"ours": [100 * best.rate], "peer": [100 * error(xi)], "more_is_better": True}
        note = f"{budget:,} gradients each, on {len(craft)} images; scored on {len(unseen)} others; by {best.attack}"
        what = "universal, eps 16: error of the ensemble at equal gradients"
        found.append(bench.row("b", what, unit="%", **errors, peer_name=title, note=note))
    if not peers.title("art"):
        what, note = "universal, eps 16, 200 steps", f"error {error(ours(200)):.1%}"
        return [*found, bench.row("b", what, unit="s", ours=seconds(200), peer_name=NOBODY, note=note)]
    for attacker in ("pgd", "deepfool"):
        bench.progress.line(f"[bench] ART's UniversalPerturbation ({attacker}) on {len(craft)} images: minutes")
        start = bench.now()
        xi = peers.universal(attacker, model, x, y, eps=eps)
        taken, goal = bench.now() - start, error(xi)
        name = f"{peers.title('art')} UniversalPerturbation ({attacker})"
        note = f"one pass of ART over {len(craft)} images, measured once; scored on {len(unseen)} others"
        steps = next((k for k in (2**i for i in range(2, 12)) if error(ours(k)) >= goal), None)
        if steps is not None:
            what, text = (
                f"universal, eps 16: to the {goal:.1%} error that ART ends with",
                f"{steps} steps of ours; {note}",
            )
            found.append(bench.row("b", what, unit="s", ours=seconds(steps), peer=[taken], peer_name=name, note=text))
        each = bench.seconds(lambda: ours(100)) / 100
        many = min(2000, max(1, int(taken / each)))
        what = "universal, eps 16: error at ART's own time"
        text = f"{many} steps of ours in {many * each:.0f} s of its {taken:.0f} s; {note}"
        errors = {"ours": [100 * error(ours(many))], "peer": [100 * goal], "more_is_better": True}
        found.append(bench.row("b", what, unit="%", **errors, peer_name=name, note=text))
    return found


def training(bench: Bench) -> list[Row]:
    """An epoch of each way of training, K = 4: against a loop by hand, s = 1 and as many passes of ERM"""
    size, count = 128, 40 if bench.on_cuda else 4
    generator = torch.Generator().manual_seed(0)
    batches = list(itertools.islice(bench.splits.train.batches(size, generator=generator, augment=True), count))

    def steps_of(adversary: Adversary, **own: Any) -> Callable[[], None]:
        """The steps of `satlib.training.train` on all mini-batches."""
        model, settings = copy.deepcopy(bench.model).train(), Training(learning_rate=1e-4, steps=4, **own)
        optimizer = new_optimizer(model, settings, steps=0, recorded=True)
        step = training_step(model, adversary, settings, optimizer, Ranks())
        ten = 10 * EPOCH // size  # epochs: whether compiling pays is decided as for a training of so many
        step = recorded(step, changes=lambda: [*changed(model, optimizer, adversary)], calls=ten)
        weight = torch.ones((), device=bench.device)

        @kernel
        def run() -> None:
            for x, y in batches:
                step(x, y, weight, *adversary.draw(x, settings, generator))

        return run

    attacked = {"sigma": 0.7, "eps": 8.0}
    ways = {f"s = {s}": steps_of(SharedAdversarialTraining(), sharedness=s, **attacked) for s in (1, 8, 64)}
    ways["ERM"] = steps_of(ERM())
    for name, defense in DEFENSES.items():
        adversary = defense(bench.splits.train, eps=8.0)
        if isinstance(adversary, Crafted):  # which it fills before an epoch: not part of this
            adversary.pool = torch.zeros_like(bench.splits.train.images[:2], dtype=torch.float32)
        ways[name] = steps_of(adversary, **attacked)
    library = peers.title("torchattacks")
    if library:
        ways["by hand"] = peers.adversarial_training(bench.model, batches, eps=8.0, steps=4)
    taken = bench.race(ways)
    epoch = {name: [each * EPOCH / (size * count) for each in seconds] for name, seconds in taken.items()}
    epoch["passes"] = [6 * each for each in epoch["ERM"]]
    share = {name: bench.share_of_peak(ways[name], statistics.median(taken[name])) for name in ("s = 64", "ERM")}
    row = functools.partial(bench.row, "c", unit="s")
    found = [
        row(
            f"epoch of {EPOCH:,} images, {name}",
            ours=epoch[name],
            peer=epoch["s = 1"],
            peer_name="ours, s = 1",
            note=share.get(name, ""),
        )
        for name in ways
        if name not in ("s = 1", "by hand")
    ]
    passes = {"peer": epoch["passes"], "peer_name": "six ERM epochs: as many passes"}
    found.append(row(f"epoch of {EPOCH:,} images, s = 64", ours=epoch["s = 64"], **passes))
    by_hand = {"peer": epoch.get("by hand"), "peer_name": f"a loop by hand, {library}'s PGD" if library else NOBODY}
    return [*found, row(f"epoch of {EPOCH:,} images, s = 1", ours=epoch["s = 1"], **by_hand)]


def searched(bench: Bench, ways: Mapping[str, Callable[..., Robustness]]) -> tuple[dict[str, list[float]], str]:
    """Seconds of each way of searching for eps_uni(0.75), once for each seed, and their answers in words."""
    test = bench.splits.test
    half = min(512, len(test) // 2)
    parts = {
        "craft": bench.splits.val,
        "choose": test.subset(slice(half)),
        "report": test.subset(slice(half, 2 * half)),
    }
    sets = {name: (part.images, part.labels) for name, part in parts.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[Robustness]] = {name: [] for name in ways}
    for seed in range(bench.repeats):
        for name, way in ways.items():
            start, generator = bench.now(), torch.Generator().manual_seed(seed)
            answers[name].append(way(bench.model, generator=generator, **sets))
            seconds[name].append(bench.now() - start)

    def shown(found: list[Robustness]) -> str:
        sizes, spent = [LARGEST if each.epsilon is None else each.epsilon for each in found], [e.spent for e in found]
        listed = ", ".join(map(str, found))
        return f"{statistics.mean(sizes):.1f} ({listed}) by {statistics.mean(spent):,.0f} gradients"

    told = ", ".join(f"{name} {shown(found)}" for name, found in answers.items())
    return seconds, f"answers over {bench.repeats} seeds: {told}"


PAPER = functools.partial(universal_robustness, ATTACKS["paper"], search="binary")


def search(bench: Bench) -> list[Row]:
    """eps_uni(0.75): the paper's binary search against the k-ary one, wall time and answer"""
    ways = {"k-ary": functools.partial(universal_robustness, ATTACKS["paper"], search="k-ary"), "binary": PAPER}
    seconds, note = searched(bench, ways)
    what, taken = "eps_uni(0.75), K = 200, b = 10, m = 16", {"ours": seconds["k-ary"], "peer": seconds["binary"]}
    return [bench.row("d", what, unit="s", **taken, peer_name="the paper's binary search", note=note)]


def by_ensemble(bench: Bench) -> list[Row]:
    """eps_uni(0.75): the ensemble's search against the paper's binary one, wall time and answer"""
    seconds, note = searched(bench, {"ensemble": strongest, "binary": PAPER})
    taken = {"ours": seconds["ensemble"], "peer": seconds["binary"]}
    name = "the paper's binary search"
    return [bench.row("h", "eps_uni(0.75) by the ensemble", unit="s", **taken, peer_name=name, note=note)]


def data(bench: Bench) -> list[Row]:
    """Data: augmented images a second, and the share of a training epoch spent waiting for them"""
    train, what = bench.splits.train, "random crop + flip, batches of 128"
    loader = peers.loader(first(train, 2560), 128)
    note = {"peer_name": "torchvision transforms, DataLoader, 2 workers"}
    return fed("e", bench, train, loader, copy.deepcopy(bench.model), what=what, limit=2560, **note)


def stored(bench: Bench) -> list[Row]:
    """Data on disk: images decoded, cropped and flipped a second, and the share of a training epoch spent waiting"""
    size, count, layers, width = (128, 8192, (3, 4, 6, 3), 128) if bench.on_cuda else (32, 2048, (1, 1, 1, 1), 64)
    model = BottleneckResNet(layers=layers, group_width=width, expansion=4 if bench.on_cuda else 1).to(bench.device)
    with tempfile.TemporaryDirectory() as folder:
        train = on_disk(Path(folder), first(bench.splits.train, count)).to(bench.device)
        kilobytes = statistics.mean(file.size for file in train.images.files) / 1000
        note = f"JPEG of 500x375, {kilobytes:.0f} kB on average, {workers_here()} workers"
        options = {"peer_name": "torchvision transforms, DataLoader, as many workers", "note": note}
        loader = peers.stored_loader(train, size)
        return fed("g", bench, train, loader, model, what="random resized crop + flip", **options)


def fed(
    row: str,
    bench: Bench,
    train: ImageSet,
    loader: DataLoader,
    model: nn.Module,
    *,
    limit: int | None = None,
    **named: str,
) -> list[Row]:
    """Augmented images a second beside the peer's loader, and the share of an ERM epoch of the model spent waiting.

    limit: of the images in that epoch. named: what, and the peer's name.
    """
    batches = functools.partial(
        train.batches, loader.batch_size, generator=torch.Generator().manual_seed(0), augment=True
    )

    def ours() -> None:
        for _ in batches():
            pass

    def theirs() -> None:
        for x, y in loader:
            x.to(bench.device), y.to(bench.device)

    taken = bench.race({"ours": ours, "theirs": theirs})
    rates = {
        "ours": [len(train) / s for s in taken["ours"]],
        "peer": [len(loader.dataset) / s for s in taken["theirs"]],
    }
    waited = {"ours": [share_waited(bench, model, batches(limit=limit))], "peer_name": "(goal: under 2 %)"}
    return [
        bench.row(row, unit="images / s", more_is_better=True, **rates, **named),
        bench.row(row, "share of an ERM epoch spent waiting for data", unit="%", **waited),
    ]


def share_waited(bench: Bench, model: nn.Module, batches: Iterator) -> float:
    """Percent of an ERM epoch of the model over the batches that passes in waiting for them."""
    model.train()
    waited, start = 0.0, time.perf_counter()
    asked = start
    for x, y in batches:
        waited += time.perf_counter() - asked
        with autocast(bench.device):
            loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        asked = time.perf_counter()
    return 100 * waited / (bench.now() - start)


def on_disk(folder: Path, images: ImageSet) -> StreamedSet:
    """Images of a set as JPEGs of the size that ImageNet's usually have, with noise, so that files are as large."""
    noise, files = np.random.default_rng(0), []
    for index, (pixels, label) in enumerate(zip(images.images.cpu(), images.labels.tolist(), strict=True)):
        large = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((500, 375), Image.Resampling.BICUBIC)
        noisy = np.asarray(large, dtype=np.float32) + noise.normal(0, 7, (375, 500, 1))
        path = folder / str(label) / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        files.append(ImageFile(f"{label}/{index}.jpg", label, path.stat().st_size, 0))
    return StreamedSet(
        StreamedImages(folder, files, 224), images.labels.cpu(), images.classes, "stored", "Stored", "train"
    )


def segmentation(bench: Bench) -> list[Row]:
    """Segmentation: forward and backward passes of FCN-8s, as attacks need them"""
    width, height, size, count = (64, 512, 1024, 5) if bench.on_cuda else (16, 180, 240, 5)
    model = FCN8s(classes=19, width=width).to(bench.device).eval()
    x = (torch.rand(count, 3, height, size) * 255).to(bench.device)
    y = torch.randint(19, (count, height, size), device=bench.device)
    bound = torch.full((1, 1, 1, 1), 8.0, device=bench.device)
    zero = torch.zeros(1, *x.shape[1:], device=bench.device)
    packed = x.contiguous(memory_format=torch.channels_last)

    def plain() -> None:
        xi = zero.clone().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model((x + xi).clamp(0, 255)), y), xi)

    with attackable(model) as net:

        def ours() -> None:
            pgd_step(net, packed, y, zero, bound, bound, sharedness=count, **CAPPED)

        taken = bench.race({"ours": ours, "peer": plain})
        share = bench.share_of_peak(ours, statistics.median(taken["ours"]))
    rates = {name: [count / each for each in seconds] for name, seconds in taken.items()}
    what, name = f"FCN-8s (width {width}), {size}x{height}", "PyTorch, float32, as it comes"
    return [bench.row("f", what, unit="images / s", more_is_better=True, **rates, peer_name=name, note=share)]


ROWS: dict[str, Callable[[Bench], list[Row]]] = {
    "a": image_dependent,
    "b": universal,
    "c": training,
    "d": search,
    "e": data,
    "f": segmentation,
    "g": stored,
    "h": by_ensemble,
}
