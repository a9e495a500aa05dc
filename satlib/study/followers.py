"""Ranks that only help to train: rank 0 looks runs up, keeps their records, and says which to compute."""

import contextlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from satlib.parallel import Stopped, current_ranks
from satlib.study.runs import Run, Runner


def follow(runner: Runner, runs: Mapping[str, Run]) -> None:
    """Help rank 0 with whichever of the runs (by id) it computes, until it says None."""
    while (key := current_ranks().broadcast_object("")) is not None:
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
