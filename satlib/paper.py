"""The paper as data: the settings of every section and every number that its text reports.

Mummadi, Brox, Metzen: "Defending Against Universal Perturbations With Shared Adversarial Training", ICCV 2019.
What the paper leaves open is named in `unstated`. Its supplement was not available: no number is from there.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

KAPPA = -math.log(0.2)  # section 4.3: loss threshold of the attack
LABEL_SMOOTHING = 0.1  # section 4.3 says "label smoothing"; the amount is our choice


@dataclass(frozen=True, kw_only=True)
class Classification:
    """The settings that sections 6.1 and 6.2 share, as section 6.1 has them."""

    section: ClassVar[str]
    # Names of the settings that the paper does not state; their defaults are our choice.
    unstated: ClassVar[str] = (
        "seed erm_batch_size erm_weight_decay label_smoothing repeated train_seeds choose_images search_seeds "
        "straight_through strongest_models strongest_seeds strongest_effort strongest_epsilons"
    )

    dataset: str = "cifar10"
    batch_size: int = 128
    momentum: float = 0.9
    seed: int = 0
    # Pre-training by "standard regularized empirical risk minimization".
    pretrained: str = ""  # a file of weights that it starts from, as `satlib.models.load_pretrained` reads it
    erm_dataset: str = ""  # another data set, such as more classes, for its first training; then with a restart
    erm_epochs: int = 164  # 0: the pretrained weights as they are
    erm_batch_size: int = 128
    erm_learning_rate: float = 0.1
    erm_schedule: str = "step"
    erm_milestones: tuple[int, ...] = (82, 123)
    erm_weight_decay: float = 5e-4
    erm_restart_epochs: int = 0  # a second, shorter one-cycle from where the first training ended; 0: none
    erm_restart_learning_rate: float = 0.1
    # Fine-tuning.
    finetune_epochs: int = 65
    finetune_learning_rate: float = 0.0025
    finetune_schedule: str = "step"
    finetune_milestones: tuple[int, ...] = (50,)
    finetune_weight_decay: float = 0.0
    finetune_epoch_images: int = 0  # 0: all training images in every epoch
    sharedness: tuple[int, ...] = (1, 8, 64)
    epsilons: tuple[float, ...] = (2, 4, 6, 8, 10, 14, 18, 22, 26)  # pixel units
    sigmas: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    points: tuple[tuple[int, float, float], ...] = ()  # (s, eps, sigma) instead of the whole grid; () means the grid
    repeated: tuple[tuple[int, float, float], ...] = ()  # the points that are trained from several seeds
    train_seeds: int = 2  # how many
    steps: int = 4  # K of training
    relative_step_size: float = 0.5  # alpha_k / eps
    loss_threshold: float = KAPPA
    label_smoothing: float = LABEL_SMOOTHING
    # Evaluation: eps_uni(delta) by the search of section 5.2.
    delta: float = 0.75
    search: str = "binary"  # the paper's; "k-ary" is ours: an equal bound in a fraction of the time
    search_iterations: int = 10  # b
    search_steps: int = 200  # K
    search_batch: int = 16  # the mini-batch size m_k
    gamma: float = 0.975
    beta: float = 4.0
    straight_through: bool = True  # the gradient of attacks that measure: see `satlib.attacks.perturb_straight_through`
    craft_images: int = 5000  # 0: all
    choose_images: int = 512  # decides the search, apart from the images that report
    report_images: int = 512  # 0: all
    search_seeds: int = 1  # searches of each model, which start from other random numbers
    # Beyond the paper: the same by the ensemble of `satlib.robustness.strongest`, and its success at some sizes.
    strongest_models: tuple[str, ...] = ()  # titles of the models; (): all
    strongest_seeds: int = 3
    strongest_effort: float = 1.0  # so many times as many steps
    strongest_epsilons: tuple[float, ...] = (4, 8, 16, 24, 32, 48)  # pixel units


@dataclass(frozen=True, kw_only=True)
class Cifar10(Classification):
    """Every setting of section 6.1: those that it shares, and its own."""

    section: ClassVar[str] = "6.1"
    unstated: ClassVar[str] = (
        f"{Classification.unstated} erm_epochs erm_learning_rate erm_schedule erm_milestones finetune_weight_decay "
        "baselines baseline_sigma deepfool_images deepfool_passes deepfool_batch uad_pool uad_epochs uad_images "
        "response_steps cost_images"
    )

    depth: int = 20
    width: int = 64
    # Figure 3 (right): DeepFool-based universal perturbations of a fixed size.
    deepfool_eps: float = 20.0
    deepfool_images: int = 1000
    deepfool_passes: int = 10
    deepfool_batch: int = 32
    # Baselines, (name, eps) with a name of `satlib.defenses.DEFENSES`; trained as long as the others.
    baselines: tuple[tuple[str, float], ...] = tuple(
        (name, eps)
        for eps in (14.0, 8.0, 20.0, 26.0)
        for name in ("DeepFool UAD", "fictitious play", "universal adversarial training")
    )
    baseline_sigma: float = 0.5
    uad_pool: int = 10
    uad_epochs: int = 5
    uad_images: int = 1000
    response_steps: int = 100
    # The cost of an epoch is measured on this many training images, and scaled to all of them.
    cost_images: int = 2560

    @property
    def architecture(self) -> dict[str, Any]:
        """What `satlib.models.build` takes."""
        return {"depth": self.depth, "width": self.width}


@dataclass(frozen=True, kw_only=True)
class Method(Cifar10):
    """Settings of the measurements that illustrate sections 3 to 5, on models of section 6.1.

    The paper has no numbers here: what is added to section 6.1's settings is all our choice.
    """

    section: ClassVar[str] = "method"

    defended: tuple[int, float, float] = (64, 14.0, 0.7)  # (s, eps, sigma) of the defended model shown beside ERM
    eps: float = 16.0
    images: int = 512
    heap_sizes: tuple[int, ...] = (512, 64, 16, 8, 4, 2, 1)  # from one heap of all images down to image-dependent
    heap_steps: int = 20
    heap_relative_step_size: float = 0.2
    universal_steps: int = 200
    universal_batch: int = 64
    gallery_images: int = 8
    curve_images: int = 512
    curve_epsilons: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0, 32.0)
    unseen_images: int = 512
    heaps_scored: int = 8
    threshold_sharedness: int = 64
    trace_images: int = 12
    trace_sharedness: int = 4
    trace_eps: float = 22.0
    adversarial_images: int = 256
    adversarial_steps: int = 50


@dataclass(frozen=True, kw_only=True)
class ImageNet(Classification):
    """Every setting of section 6.2.

    It crafts on training images in mini-batches of 10,000, and reports on the whole validation set of ImageNet, our
    test set. What decides the search in between are training images held out.
    """

    section: ClassVar[str] = "6.2"

    dataset: str = "imagenet200-224"
    layers: tuple[int, ...] = (3, 4, 6, 3)  # WRN-50-2-bottleneck
    group_width: int = 128
    expansion: int = 4
    stem: str = "large"
    erm_epochs: int = 100
    erm_milestones: tuple[int, ...] = (30, 60, 90)
    erm_weight_decay: float = 1e-4
    finetune_epochs: int = 30
    finetune_learning_rate: float = 0.01
    finetune_milestones: tuple[int, ...] = (20,)
    finetune_weight_decay: float = 5e-5
    sharedness: tuple[int, ...] = (1, 32)
    sigmas: tuple[float, ...] = (0.5, 1.0)
    steps: int = 5
    relative_step_size: float = 0.4
    search_steps: int = 20
    search_batch: int = 10_000
    craft_images: int = 0
    choose_images: int = 2048
    report_images: int = 0

    @property
    def architecture(self) -> dict[str, Any]:
        wide = {"group_width": self.group_width, "expansion": self.expansion, "stem": self.stem}
        return {"name": "bottleneck", "layers": list(self.layers)} | wide


@dataclass(frozen=True, kw_only=True)
class Cityscapes:
    """Every setting of section 6.3."""

    section: ClassVar[str] = "6.3"
    # Names of the settings that the paper does not state; their defaults are our choice.
    unstated: ClassVar[str] = (
        "width seed label_smoothing erm_epochs erm_learning_rate erm_schedule erm_milestones "
        "craft_images choose_images adversarial_images adversarial_iterations adversarial_steps "
        "straight_through adversarial_capped strongest_seeds strongest_effort strongest_epsilons structure_eps "
        "hidden hiding_epsilons"
    )

    dataset: str = "cityscapes"
    target: str = "monchengladbach_000000_026602"  # the training scene whose segmentation targeted attacks aim at
    width: int = 64  # maps in the first stage of the VGG-16 encoder
    pretrained: str = ""  # a file of weights to start from, such as VGG-16's
    seed: int = 0
    batch_size: int = 5
    label_smoothing: float = LABEL_SMOOTHING
    erm_epochs: int = 60
    erm_learning_rate: float = 1e-4
    erm_schedule: str = "step"
    erm_milestones: tuple[int, ...] = (45,)
    finetune_epochs: int = 20
    finetune_epoch_images: int = 0  # 0: all training images in every epoch
    finetune_learning_rate: float = 1e-4
    finetune_schedule: str = "step"
    finetune_milestones: tuple[int, ...] = (15,)
    # (s, eps, sigma): of several with one sharedness the one whose IoU is nearest to the others' counts.
    points: tuple[tuple[int, float, float], ...] = ((1, 8.0, 0.5), (5, 30.0, 0.7))
    evaluated: tuple[int, ...] = ()  # after which epochs; (): after every one
    steps: int = 5
    relative_step_size: float = 0.4
    loss_threshold: float = KAPPA  # of untargeted attacks
    delta: float = 0.95
    search: str = "binary"
    search_iterations: int = 10
    search_steps: int = 200
    search_batch: int = 5
    gamma: float = 0.99
    beta: float = 2.0
    straight_through: bool = True
    craft_images: int = 0  # of the validation scenes; 0: all
    choose_images: int = 16
    report_images: int = 16
    adversarial_images: int = 16
    adversarial_iterations: int = 10
    adversarial_steps: int = 200
    adversarial_capped: bool = False  # whether untargeted image-dependent attacks have threshold and soft targets, too
    strongest_seeds: int = 1  # beyond the paper: searches by the ensemble of `satlib.robustness.strongest`
    strongest_effort: float = 1.0  # so many times as many steps
    strongest_epsilons: tuple[float, ...] = (8, 16, 32, 64, 128, 255)  # pixel units, at which its success is measured
    structure_eps: float = 40.0  # of the perturbations whose structure is measured (Figure 6)
    hidden: str = "person"  # the class that a dynamic target hides (Metzen et al. 2017)
    hiding_epsilons: tuple[float, ...] = (5.0, 10.0, 20.0, 40.0)

    @property
    def architecture(self) -> dict[str, Any]:
        """What `satlib.models.build` takes."""
        return {"name": "fcn8s", "width": self.width}


@dataclass(frozen=True, kw_only=True)
class Checks:
    """Settings of notebook 09, which asks whether the evaluations can be trusted. None of it is in the paper."""

    section: ClassVar[str] = "checks"

    audited: tuple[tuple[int, float, float], ...] = ((1, 8.0, 0.7), (64, 26.0, 0.9))  # models of 6.1 beside ERM
    sections: tuple[str, ...] = ("6.2", "6.3")  # whose models are audited besides: ERM, and a defended one of each kind
    masks: tuple[str, ...] = ("rounded", "saturated")  # how gradients are hidden from the audit, which must notice
    relative: bool = True  # whether eps and epsilons are in units of each model's own eps_uni, not in pixel units
    eps: float = 1.0
    epsilons: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0)
    images: int = 1024  # test images
    scenes: int = 16  # test scenes, in section 6.3
    steps: int = 20  # of attacks on single images and heaps
    attacks: tuple[str, ...] = (  # names of `satlib.universal.ATTACKS`, and "warm start"
        *("paper", "uncapped", "hard targets", "margin", "momentum", "Adam", "cosine", "clamped gradient", "dominant"),
        *("large mini-batches", "restarts", "warm start", "momentum, uncapped, dominant"),
    )
    depths: tuple[int, ...] = (8, 14)  # other undefended networks, to and from which perturbations are carried
    depth_epochs: int = 0  # for how long those are trained, without a restart; 0: as the undefended network
    seeds: int = 5
    doubled: int = 3  # how many of the models, ERM first, are searched by the ensemble with twice as many steps
    seed: int = 0


CIFAR10, METHOD, IMAGENET, CITYSCAPES, CHECKS = Cifar10(), Method(), ImageNet(), Cityscapes(), Checks()


def differences(settings: Classification | Cityscapes) -> list[dict[str, Any]]:
    """Rows of a table: where the settings differ from the paper's, or where the paper is silent from our default."""

    def shown(value: object) -> str:
        return "all" if value == () else f"{value:g}" if isinstance(value, float) else str(value)

    wanted = type(settings)()
    return [
        {"setting": name, "this run": shown(value), "instead of": shown(other)}
        | {"whose choice": "ours" if name in settings.unstated.split() else "the paper's"}
        for name, value in vars(settings).items()
        if value != (other := getattr(wanted, name))
    ]


@dataclass(frozen=True)
class Reported:
    """A number of the paper's text: where it stands, what it is, and for which model."""

    key: str
    section: str
    quantity: str
    unit: str
    value: float


PIXELS = "pixel units"
_REPORTED = (
    ("cifar10/erm/accuracy", "6.1", "ERM: clean accuracy", "%", 93.25),
    ("cifar10/erm/eps_uni", "6.1", "ERM: eps_uni(0.75)", PIXELS, 14.9),
    ("cifar10/no-loss/eps_uni", "6.1", "s=64, no accuracy lost: eps_uni(0.75)", PIXELS, 22.7),
    ("cifar10/90/eps_uni", "6.1", "s=64, accuracy of 90 % (3.25 points lost) accepted: eps_uni(0.75)", PIXELS, 44.1),
    ("cifar10/90/loss", "6.1", "s=64, the same model: accuracy lost, less than", "points", 3.5),
    ("cifar10/gain", "6.1", "s=64 against s=1 at equal accuracy: eps_uni(0.75) gained, about", PIXELS, 5.0),
    ("cifar10/cost/shared", "6.1", "Shared adversarial training: time per epoch", "s", 189.0),
    ("cifar10/cost/standard", "6.1", "Standard adversarial training: time per epoch", "s", 189.0),
    ("cifar10/cost/uad", "6.1", "DeepFool UAD: time per epoch", "s", 3118.0),
    ("cifar10/cost/fictitious-play", "6.1", "Fictitious play: time per epoch", "s", 3840.0),
    ("imagenet/erm/accuracy", "6.2", "ERM: top-1 accuracy", "%", 77.57),
    ("imagenet/erm/eps_uni", "6.2", "ERM: eps_uni(0.75)", PIXELS, 8.4),
    ("imagenet/no-loss/eps_uni", "6.2", "s=32, no accuracy lost: eps_uni(0.75)", PIXELS, 15.0),
    ("imagenet/good/accuracy", "6.2", "s=32, eps=10, sigma=1: top-1 accuracy", "%", 72.74),
    ("imagenet/good/eps_uni", "6.2", "s=32, eps=10, sigma=1: eps_uni(0.75)", PIXELS, 25.64),
    ("cityscapes/erm/iou", "6.3", "ERM: class-wise IoU", "%", 49.3),
    ("cityscapes/erm/eps_uni_targeted", "6.3", "ERM: targeted eps_uni(0.95)", PIXELS, 19.92),
    ("cityscapes/s1/eps_uni_targeted", "6.3", "s=1: targeted eps_uni(0.95)", PIXELS, 62.5),
    ("cityscapes/s5/eps_uni_targeted", "6.3", "s=5: targeted eps_uni(0.95)", PIXELS, 111.7),
    ("cityscapes/erm/eps_uni", "6.3", "ERM: untargeted eps_uni(0.95)", PIXELS, 8.5),
    ("cityscapes/s1/eps_uni", "6.3", "s=1: untargeted eps_uni(0.95)", PIXELS, 25.0),
    ("cityscapes/s5/eps_uni", "6.3", "s=5: untargeted eps_uni(0.95)", PIXELS, 47.8),
    ("cityscapes/s1/eps_adv", "6.3", "s=1: eps_adv(0.95)", PIXELS, 11.0),
    ("cityscapes/s5/eps_adv", "6.3", "s=5: eps_adv(0.95)", PIXELS, 5.9),
)
REPORTED = tuple(Reported(*row) for row in _REPORTED)
