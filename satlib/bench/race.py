"""What all rows of the benchmark share: a trained model, the clock, and the form of a row."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from satlib import data
from satlib.data import Splits
from satlib.device import autocast, device_name, fastest_dtype, unrecorded
from satlib.models import build
from satlib.progress import Progress
from satlib.training import Training, train


@dataclass(frozen=True)
class Row:
    """One comparison. ours and peer are medians in `unit`; ratio is how many times better ours is (above 1: better).

    peer is None where nothing of the kind exists or is installed; spread is the range of our repeats, in `unit`.
    """

    row: str
    what: str
    ours: float
    peer: float | None
    peer_name: str
    unit: str
    ratio: float | None
    spread: float
    device: str
    note: str = ""


class Bench:
    """A device with a model trained on the embedded images, and how to time things there.

    On a CPU the network is ResNet-20 of width 16, on CUDA the paper's (width 64), trained by ERM for six epochs.
    """

    def __init__(self, *, device: str | None = None, repeats: int = 3) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.repeats, self.progress, self.on_cuda = repeats, Progress(), self.device.type == "cuda"
        threads = "" if self.on_cuda else f", {torch.get_num_threads()} threads"
        self.name = (torch.cuda.get_device_name() if self.on_cuda else device_name()) + threads

    @functools.cached_property
    def splits(self) -> Splits:
        return data.load("shapes32").to(self.device)

    @functools.cached_property
    def model(self) -> nn.Module:
        images = self.splits.train
        torch.manual_seed(0)
        network = {"depth": 20, "width": 64 if self.on_cuda else 16}
        model = build(network, classes=len(images.classes), mean=images.mean, std=images.std).to(self.device)
        options = {"schedule": "one-cycle", "weight_decay": 5e-4, "nesterov": True}
        settings = Training(epochs=6, batch_size=64, learning_rate=0.2, **options)

        def progress(text: str, done: float) -> None:
            self.progress.update(f"[bench] the model: {text}, {done:.0%}")

        train(model, images, settings, progress=progress)
        return model

    def now(self) -> float:
        """Seconds on a clock, when all work on the device is done."""
        if self.on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, function: Callable[[], object]) -> float:
        """Wall time of one call."""
        start = self.now()
        function()
        return self.now() - start

    def race(self, functions: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of every function, `repeats` of each, in turn: a slow moment of the machine meets all of them."""
        taken: dict[str, list[float]] = {name: [] for name in functions}
        for function in functions.values():
            function()  # warm-up
        for _ in range(self.repeats):
            for name, function in functions.items():
                taken[name].append(self.seconds(function))
                self.progress.update(f"[bench] {name}: {taken[name][-1]:.2f} s")
        return taken

    def row(
        self,
        row: str,
        what: str,
        *,
        unit: str,
        ours: list[float],
        peer: list[float] | None = None,
        peer_name: str,
        more_is_better: bool = False,
        note: str = "",
    ) -> Row:
        """A row from repeated measurements, by their medians."""
        mine, other = statistics.median(ours), statistics.median(peer) if peer else None
        below, above = (other, mine) if more_is_better else (mine, other)
        ratio = above / below if above is not None and below else None
        return Row(row, what, mine, other, peer_name, unit, ratio, max(ours) - min(ours), self.name, note)

    @functools.cached_property
    def peak(self) -> float:
        """FLOP/s of a large matrix product in the format that convolutions use here: what the hardware can do."""
        size = 8192 if self.on_cuda else 2048
        a, b = (torch.randn(size, size, device=self.device, dtype=fastest_dtype(self.device.type)) for _ in range(2))
        a @ b
        return 2 * size**3 / min(self.seconds(lambda: a @ b) for _ in range(10))

    def share_of_peak(self, function: Callable[[], object], seconds: float) -> str:
        """How much of the peak a call reaches that takes `seconds`, counting the FLOPs of its matrix products."""
        with FlopCounterMode(display=False) as counter, autocast(self.device), unrecorded():
            function()
        share = counter.get_total_flops() / seconds / self.peak
        return f"{share:.0%} of the {self.peak / 1e12:.2f} TFLOP/s that a large matrix product reaches here"
