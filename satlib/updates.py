"""What the steps of a universal attack follow: the sign of the last gradient, as in the paper, or several."""

from collections.abc import Callable

import torch
from torch import Tensor

MOMENTUM = 0.9  # how much of the earlier gradients is kept (Dong et al. 2018 keep all, on one image)
SQUARES = 0.99  # of their squares, in Adam; PyTorch's 0.999 forgets its start slower than an attack ends


class Sign:
    """The sign of the gradient (section 3.2)."""

    def __call__(self, gradients: Tensor) -> Tensor:
        """What a step follows, from the gradients (heaps, C, H, W) of an iteration; entries of about 1."""
        return gradients.sign()


class Momentum:
    """The sign of a decaying mean of all gradients, each divided by its mean size (Dong et al. 2018).

    In a universal attack it averages over mini-batches, too, which takes out part of their noise.
    """

    def __init__(self) -> None:
        self.mean: Tensor | float = 0.0

    def __call__(self, gradients: Tensor) -> Tensor:
        """See `Sign`."""
        size = gradients.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-30)
        self.mean = MOMENTUM * self.mean + (1 - MOMENTUM) * gradients / size
        return self.mean.sign()


class Adam:
    """Mean over root mean square of the gradients, with both corrected for their start (Kingma and Ba 2015)."""

    def __init__(self) -> None:
        self.mean: Tensor | float = 0.0
        self.square: Tensor | float = 0.0
        self.count = 0

    def __call__(self, gradients: Tensor) -> Tensor:
        """See `Sign`."""
        self.count += 1
        self.mean = MOMENTUM * self.mean + (1 - MOMENTUM) * gradients
        self.square = SQUARES * self.square + (1 - SQUARES) * gradients.square()
        mean, square = self.mean / (1 - MOMENTUM**self.count), self.square / (1 - SQUARES**self.count)
        return mean / torch.as_tensor(square).sqrt().clamp(min=1e-30)


UPDATES: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {"sign": Sign, "momentum": Momentum, "adam": Adam}
