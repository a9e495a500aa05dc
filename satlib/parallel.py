"""Training on several ranks (`torchrun`): how they share out a mini-batch, and what they must agree on."""

import contextlib
import gc
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from satlib.attacks import random_start

if TYPE_CHECKING:
    from satlib.study.runs import Run, Runner

Plain = TypeVar("Plain")


class Stopped(Exception):
    """Rank 0 has stopped the training, and says why; this is another rank."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; a process on its own is the only rank of one.

    The result is the same whatever their number, but for batch norm: in training it takes the statistics of each rank's
    images, and keeps those of rank 0, which always has some.
    """

    rank: int = 0
    count: int = 1

    def share(self, images: int, sharedness: int) -> slice:
        """Which images of a mini-batch this rank takes: whole heaps, as evenly as that can be. It may be empty."""
        first, last = self._heaps(images, sharedness)
        return slice(min(first * sharedness, images), min(last * sharedness, images))

    def _heaps(self, images: int, sharedness: int) -> tuple[int, int]:
        heaps = -(-images // sharedness)
        return -(-self.rank * heaps // self.count), -(-(self.rank + 1) * heaps // self.count)

    def start(
        self, images: int, sharedness: int, shape: tuple[int, ...], eps: float, generator: torch.Generator
    ) -> Tensor:
        """Initial perturbations of this rank's heaps: those that a process on its own would draw for them."""
        heaps = -(-images // sharedness)
        drawn = random_start((heaps, *shape), eps, generator)
        return drawn[slice(*self._heaps(images, sharedness))]

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model as it is trained: its gradients are averaged over the ranks, its weights are rank 0's."""
        return model if self.count == 1 else DistributedDataParallel(model)

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks the tensors of rank 0, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def told(self, value: Plain) -> Plain:
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


def here() -> Ranks:
    """The ranks that this process belongs to."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


@contextlib.contextmanager
def joined(device: str | None = None) -> Iterator[str | None]:
    """The ranks that `torchrun` started, joined by NCCL on CUDA and gloo on CPUs; yields this rank's device.

    device: "cpu", "cuda" or None for CUDA where there is one. A process that torchrun did not start is on its own.
    """
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
        gc.collect()  # a wrapped model that outlives the process group can abort the process
        dist.destroy_process_group()


def follow(runner: "Runner", runs: Mapping[str, "Run"]) -> None:
    """Help rank 0 with whichever of the runs it computes, until it says None."""
    while (key := here().told("")) is not None:
        with contextlib.suppress(Stopped):
            runner.help_with(runs[key], Follower())


class Follower:
    """The workspace of a rank that only helps: rank 0 loads, saves and records."""

    def load_checkpoint(self) -> None:
        return None

    def save_checkpoint(self, tensors: dict[str, Tensor], info: dict) -> None:
        pass

    def save_tensors(self, name: str, tensors: dict[str, Tensor], metadata: Any = None) -> None:
        pass
