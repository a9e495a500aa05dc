"""DeepFool and the universal perturbation built on it (Moosavi-Dezfooli et al. 2016, 2017)."""

import contextlib
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from satlib.attacks import perturb, perturb_straight_through, shuffled, spend
from satlib.checks import check_model, kernel, outside, per_heap
from satlib.device import exact
from satlib.network import attackable, logits_of


@functools.partial(kernel, any_range=True)
def deepfool(
    model: nn.Module,
    images: Tensor,
    *,
    classes: int = 10,
    steps: int = 10,
    overshoot: float = 0.02,
    straight_through: bool = True,
) -> tuple[Tensor, Tensor]:
    """DeepFool: for each image a small step, in the l2 norm, over the nearest decision boundary.

    Each iteration linearises the logits at the perturbed image and goes to the nearest of the hyperplanes that part the
    predicted class from its strongest rivals, `classes` in all; the way so far, times 1 + overshoot, is what is added.
    An image stops as soon as its prediction changes. images (d, C, H, W) float32 may lie outside of 0..255, as x + v
    does; they are clamped only before the model sees them. In other units, 0..1 or normalised, they are an error.

    Returns the perturbations (d, C, H, W) in pixel units, and which of them changed the prediction (d,). Runs in
    float32: the way hangs on small differences of logits. Raises SatlibError on classes < 2, steps < 1, overshoot < 0.
    """
    with attackable(model) as net, exact():
        check_model(net, images, torch.zeros(len(images), dtype=torch.long))
        return _deepfool(net, images.float(), classes, steps, overshoot, straight_through)


def _deepfool(
    net: nn.Module, images: Tensor, classes: int, steps: int, overshoot: float, straight_through: bool
) -> tuple[Tensor, Tensor]:
    """As `deepfool`; the images may lie outside of 0..255, and are clamped before the model sees them."""
    seen = perturb_straight_through if straight_through else perturb
    total = torch.zeros_like(images)
    with torch.no_grad():
        logits = logits_of(net, perturb(images, total, 1))
    candidates = logits.topk(min(classes, logits.shape[1]), dim=1).indices
    label, going = candidates[:, 0], torch.arange(len(images), device=images.device)
    for _ in range(steps):
        going = going[_predicted(net, images[going], (1 + overshoot) * total[going]) == label[going]]
        if not len(going):
            break
        way_so_far = (1 + overshoot) * total[going]
        logits, gradients = _linearised(net, seen, images[going], way_so_far, candidates[going])
        normals = gradients[:, 1:] - gradients[:, :1]
        lengths = normals.flatten(2).norm(dim=2).clamp(min=1e-12)
        distances, nearest = ((logits[:, :1] - logits[:, 1:]) / lengths).min(1)  # to the rivals' hyperplanes
        rows = torch.arange(len(going), device=images.device)
        way = (distances + 1e-4) / lengths[rows, nearest]  # a little beyond: 1e-4 pixel units, as its authors do
        total[going] += way.view(-1, 1, 1, 1) * normals[rows, nearest]
    total *= 1 + overshoot
    return total, _predicted(net, images, total) != label


@kernel
def universal_deepfool(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    eps: float | Sequence[float],
    batch_size: int = 1,
    fooling_rate: float = 0.8,
    passes: int = 10,
    classes: int = 10,
    steps: int = 10,
    overshoot: float = 0.02,
    straight_through: bool = True,
    generator: torch.Generator | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Tensor:
    """The universal perturbation of Moosavi-Dezfooli et al. (2017), from DeepFool's steps, for each eps: (n, C, H, W).

    It walks the images in a fresh random order on every pass. Where v does not change an image's prediction yet, the
    step that DeepFool finds from x + v is added to v, which is then projected on [-eps, eps]. It stops when v fools a
    share `fooling_rate` of the images, or after `passes`. No label is used: fooled means that the prediction changes.

    batch_size 1 is the algorithm as published, image by image. A larger batch adds up its images' steps from one v:
    a fraction of the time, and a little more than is needed, since none of them knows of the others. images
    (n, C, H, W), uint8 or float32 in 0..255; eps in pixel units. progress(text, done) follows every pass.
    Raises SatlibError on what is out of range.
    """
    progress = progress and outside(progress)
    bounds = per_heap(eps, None, images.device).flatten().tolist()
    found = []
    with attackable(model) as net, exact():
        check_model(net, images, torch.zeros(len(images), dtype=torch.long))
        nothing = torch.zeros_like(images[:1], dtype=torch.float32)
        clean = _predicted(net, images, nothing)
        for bound in bounds:
            v = nothing
            for done in range(passes):
                order = shuffled(len(images), generator).to(images.device)
                for chosen in order.split(batch_size):
                    going = chosen[_predicted(net, images[chosen], v) == clean[chosen]]
                    if len(going):
                        x = images[going].float() + v
                        steps_found, changed = _deepfool(net, x, classes, steps, overshoot, straight_through)
                        v = (v + steps_found[changed].sum(0, keepdim=True)).clamp(-bound, bound)
                rate = (_predicted(net, images, v) != clean).float().mean().item()
                if progress:
                    share = (len(found) * passes + done + 1) / (len(bounds) * passes)
                    progress(f"pass {done + 1}/{passes}: {rate:.1%} fooled", share)
                if rate >= fooling_rate:
                    break
            found.append(v)
    return torch.cat(found)


@torch.no_grad()
def _predicted(net: nn.Module, images: Tensor, v: Tensor, batch_size: int = 512) -> Tensor:
    """Predicted classes (n,) of images + v, where v is one for all of them or one for each."""
    pairs = zip(images.split(batch_size), v.expand(len(images), -1, -1, -1).split(batch_size), strict=True)
    return torch.cat([logits_of(net, perturb(x.float(), xi, 1)).argmax(1) for x, xi in pairs])


@torch.enable_grad()
def _linearised(
    net: nn.Module, seen: Callable[..., Tensor], images: Tensor, v: Tensor, candidates: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits (d, k) of each image's candidate classes at x + v, and their gradients (d, k, C, H, W)."""
    v = v.detach().requires_grad_()
    logits = logits_of(net, seen(images, v, 1)).float().gather(1, candidates)
    gradients = None
    if _launches_cost(v):
        each = torch.eye(logits.shape[1], device=v.device).unsqueeze(1).expand(-1, len(v), -1)
        with contextlib.suppress(RuntimeError):  # a network with a backward of its own that knows no batches of them
            (gradients,) = torch.autograd.grad(logits, v, each, retain_graph=True, is_grads_batched=True)
    if gradients is None:
        one_by_one = (torch.autograd.grad(one.sum(), v, retain_graph=True)[0] for one in logits.unbind(1))
        gradients = torch.stack(tuple(one_by_one))
    spend(logits.numel())
    return logits.detach(), gradients.transpose(0, 1)


def _launches_cost(v: Tensor) -> bool:
    """Whether one backward pass of all classes is faster than one for each: on CUDA, where a small kernel waits for
    Python longer than it runs; on a CPU it takes 1.4 times as long."""
    return v.is_cuda
