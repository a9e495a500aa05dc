"""How each kind of run is computed: from its settings and parents to metrics and artefacts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from satlib.study.kinds import evaluation, method, scenes, training, trust
from satlib.study.records import Workspace

if TYPE_CHECKING:
    from satlib.study.runs import Run, Runner


@dataclass(frozen=True)
class Kind:
    """How runs of one kind are computed. Bump `version` when the same settings would give another result.

    A record without the `artefacts` is computed again; where they are `on_demand`, only for a run that builds on it
    and has to be computed, or a figure that shows them: weights and pictures need not be published with every model.
    """

    version: int
    compute: Callable[["Runner", "Run", Workspace], dict]
    artefacts: tuple[str, ...] = ()
    on_demand: bool = False


TRAININGS = ("train", "train_part")
KINDS = {
    "train": Kind(1, training.compute_train, ("weights",), on_demand=True),
    "train_part": Kind(1, training.compute_train, ("weights",), on_demand=True),
    "universal_robustness": Kind(2, evaluation.compute_universal_robustness),
    "predictions": Kind(2, evaluation.compute_predictions),
    "universal_deepfool": Kind(1, evaluation.compute_universal_deepfool),
    "epoch_cost": Kind(1, training.compute_epoch_cost),
    "adversarial_robustness": Kind(1, evaluation.compute_adversarial_robustness, ("epsilons",)),
    "gallery": Kind(1, method.compute_gallery, ("gallery",)),
    "error_curves": Kind(1, method.compute_error_curves),
    "risks": Kind(1, method.compute_risks),
    "sharing": Kind(1, method.compute_sharing),
    "loss_threshold": Kind(1, method.compute_loss_threshold, ("losses",)),
    "heap_trace": Kind(1, method.compute_heap_trace, ("trace",)),
    "perturbation_structure": Kind(2, scenes.compute_perturbation_structure, ("perturbations",), on_demand=True),
    "hiding": Kind(2, scenes.compute_hiding, ("example",), on_demand=True),
    "audit": Kind(1, trust.compute_audit),
    "transfer": Kind(2, trust.compute_transfer),
    "segmentations": Kind(1, scenes.compute_segmentations, ("segmentations",), on_demand=True),
}
