"""Training on several ranks (`torchrun`): how they share out a mini-batch, and what they must agree on."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from satlib.data.imageset import IGNORE
from satlib.errors import SatlibError

Plain = TypeVar("Plain")


class Stopped(Exception):
    """Rank 0 has stopped the training, and says why; this is another rank."""


def decisions(labels: Tensor) -> Tensor:
    """How many decisions labels (n,) or (n, H, W) are about: images, or pixels that have a class."""
    return (labels != IGNORE).sum() if labels.ndim > 1 else torch.tensor(len(labels), device=labels.device)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; a process on its own is the only rank of one.

    The result is the same whatever their number, but for batch norm: in training it takes the statistics of each rank's
    images, and keeps those of rank 0, which always has some.
    """

    rank: int = 0
    count: int = 1

    def check(self, batch_size: int, heap: int | None, adversary: object | None) -> None:
        """Raises SatlibError for an adversary on several ranks, and for more ranks than heaps in a mini-batch."""
        if adversary is not None and self.count > 1:
            name = type(adversary).__name__
            raise SatlibError(f"{name} trains on one rank, not {self.count}; run it without torchrun")
        if self.count > (heaps := -(-batch_size // (heap or 1))):
            raise SatlibError(f"{self.count} ranks for {heaps} heaps in a mini-batch: some would have none; use fewer")

    def share(self, images: int, sharedness: int) -> slice:
        """Which images of a mini-batch this rank takes: whole heaps, as evenly as that can be. It may be empty."""
        first, last, _ = self._heaps(images, sharedness)
        return slice(min(first * sharedness, images), min(last * sharedness, images))

    def _heaps(self, images: int, sharedness: int) -> tuple[int, int, int]:
        """The first of this rank's heaps, the first that is not, and how many there are."""
        heaps = -(-images // sharedness)
        return -(-self.rank * heaps // self.count), -(-(self.rank + 1) * heaps // self.count), heaps

    @contextlib.contextmanager
    def drawing(self, images: int, sharedness: int, numbers: int, generator: torch.Generator) -> Iterator[None]:
        """What is drawn in this context, uniformly and so many `numbers` for each of this rank's heaps of a mini-batch,
        is what a process on its own would draw for them; afterwards the generator is where that one's is."""
        first, last, heaps = self._heaps(images, sharedness)
        torch.rand(first * numbers, generator=generator)
        yield
        torch.rand((heaps - last) * numbers, generator=generator)

    def batches(
        self, data: Any, batch_size: int, *, images: int, heap: int | None, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """An epoch of so many augmented images of an ImageSet: of each mini-batch this rank's images, their labels, and
        how much their mean loss weighs in that of the mini-batch.

        heap: how many images share a random start, which the loss draws; None where it draws nothing.
        """
        sharedness = heap or 1

        def some(size: int) -> slice:
            own = self.share(size, sharedness)
            return own if own.stop > own.start else slice(0, 1)  # one that weighs nothing

        passing = data.batches(batch_size, generator=generator, augment=True, limit=images, share=some)
        for step, (x, y) in enumerate(passing):
            size = min(batch_size, images - step * batch_size)
            own = self.share(size, sharedness)
            with self.drawing(size, sharedness, x[0].numel() if heap else 0, generator):
                weight = torch.ones((), device=x.device)
                if self.count > 1:
                    mine = decisions(y if own.stop > own.start else y[:0])
                    weight = mine / self.total(mine.clone()).clamp(min=1)
                yield x, y, weight

    def sum_gradients(self, model: nn.Module) -> None:
        """Give every rank the sum of all ranks' gradients, and rank 0's buffers: the next attack is on one model."""
        if self.count > 1:
            gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
            summed = self.total(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, summed.split([each.numel() for each in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
            self.sync(model.buffers())

    def sync(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks the tensors of rank 0, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def broadcast_object(self, value: Plain) -> Plain:
        """Rank 0's value (plain Python) on every rank."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def total(self, value: Tensor) -> Tensor:
        """Sum of a tensor over all ranks, in place."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def on_first(self, function: Callable[[], None]) -> None:
        """Call `function` on rank 0 alone; what it raises there stops the others, too, by `Stopped`."""
        error: Exception | None = None
        if self.rank == 0:
            try:
                function()
            except Exception as raised:
                error = raised
        if self.broadcast_object(error is not None):
            raise error or Stopped


def current_ranks() -> Ranks:
    """The ranks that this process belongs to."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


@contextlib.contextmanager
def joined(device: str | None = None) -> Iterator[str | None]:
    """The ranks that `torchrun` started, joined by NCCL on CUDA and gloo on CPUs; yields this rank's device.

    device: "cpu", "cuda" or None for CUDA where there is one. A process that torchrun did not start is on its own.
    """
    if device not in (None, "cpu", "cuda"):
        raise SatlibError(f"device={device!r}: expected 'cpu', 'cuda' or None")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    on_cuda = torch.cuda.is_available() if device is None else device == "cuda"
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield "cuda" if on_cuda else "cpu"
        dist.barrier()  # nobody leaves while another still waits for what was said last
    finally:
        dist.destroy_process_group()
