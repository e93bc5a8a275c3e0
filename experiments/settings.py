"""The settings of an experiment, and the rules that they keep."""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, Literal

import tyro

Dataset = Literal[
    "digits", "fashion_mnist", "cifar10", "cifar100", "imagenet2012", "shakespeare"
]
ModelName = Literal[
    "convnet",
    "nnx_convnet",
    "vgg16",
    "vgg16_bn",
    "preresnet110",
    "preresnet164",
    "wide_resnet28_10",
    "resnet50",
    "resnet152",
    "transformer",
]
Protocol = Literal["side_by_side", "fine_tune", "budgets"]
CONVNETS = ("convnet", "nnx_convnet")
WITH_DROPOUT = ("vgg16", "vgg16_bn", "transformer")
TUNE_CONTROL_LRS = (0.001, 0.01)  # stands in every configuration, needed or not


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How this process finds the others of its job, if there are any."""

    distributed: bool
    """Join the cluster that JAX finds in the environment: TPU pod, Slurm, others."""

    coordinator_address: str | None
    """HOST:PORT of process 0, where the environment does not tell."""

    num_processes: int | None
    """Number of processes in the job, with --coordinator-address."""

    process_id: int | None
    """Number of this process, from 0, with --coordinator-address."""


ONE_PROCESS = Cluster(
    distributed=False, coordinator_address=None, num_processes=None, process_id=None
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one experiment.

    A setting that some experiments alone have (the width of a Transformer, say) is None
    in all others; giving it there is an error.
    """

    # What is trained on what, and how arms are compared.

    name: Annotated[str, tyro.conf.Suppress]
    """Name of the experiment on the command line."""

    dataset: Annotated[Dataset, tyro.conf.Suppress]
    """Data set to train on."""

    model: Annotated[ModelName, tyro.conf.Suppress]
    """Network to train."""

    protocol: Annotated[Protocol, tyro.conf.Suppress]
    """Which arms there are, see `experiments.plans`."""

    # Where things are, and how often they are written.

    workdir: pathlib.Path
    """Directory for results, logs, curves and checkpoints."""

    data_dir: pathlib.Path | None = None
    """Where prepared data sets live. None: tfds's own, ~/tensorflow_datasets."""

    checkpoint_every: int = 500
    """Steps between two checkpoints of a run; each end of a run has one too."""

    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep of the run in progress."""

    log_every: int = 50
    """Steps between two losses in metrics.jsonl and TensorBoard."""

    width_plot: bool = True
    """Draw width.png at the end: the loss around the solutions of the first seed."""

    # Data.

    train_examples: int | None = None
    """Train on a fixed subset of this many examples. None: all of them."""

    hold_out: bool = True
    """Keep the validation split out of training. Without it, training has those
    examples as well, as published results do; --tune holds them out all the same."""

    batch_size: int
    """Examples in a training batch."""

    eval_batch_size: int
    """Examples in a batch of evaluation and of the BatchNorm pass."""

    max_shift: int = 0
    """Shift each training image by up to this many pixels. 0: do not."""

    flip: bool = False
    """Mirror half of the training images, chosen at random."""

    image_size: int | None = None
    """Side of ImageNet's crops in pixels."""

    context: int | None = None
    """Tokens in a row of text."""

    # Loss.

    mixup_alpha: float = 0.0
    """MixUp: train on pairs of images, mixed by a Beta(alpha, alpha) draw. 0: do not.
    """

    label_smoothing: float = 0.0
    """Share of each target that is spread evenly over all classes, in [0, 1)."""

    # Network.

    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in; parameters and averages stay float32."""

    pixel_max: Annotated[int | None, tyro.conf.Suppress] = None
    """Largest raw pixel value, by which a small convolutional net scales its input."""

    widths: tuple[int, ...] | None = None
    """Channels of each 3x3 convolution of a small convolutional net."""

    strides: tuple[int, ...] | None = None
    """Stride of each 3x3 convolution of a small convolutional net."""

    layers: int | None = None
    """Blocks of a Transformer."""

    heads: int | None = None
    """Attention heads of a Transformer's block."""

    width: int | None = None
    """Features of a Transformer's token."""

    dropout: float | None = None
    """Share of activations that VGG's classifier or a Transformer drops in training."""

    # Training.

    seeds: int
    """Number of seeds; arms with the same seed share weights and data order."""

    epochs: int
    """Epochs of the plain arm: the whole run, the baseline's way to convergence, or one
    budget, as the protocol has it."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW with decoupled weight decay; in every arm."""

    learning_rate: float
    """Peak learning rate."""

    swa_lr: float
    """Constant learning rate of an SWA arm's averaging window."""

    control_lr: float | None = None
    """Constant learning rate of the arm that trains on without averaging."""

    momentum: float = 0.9
    """Momentum of SGD, and AdamW's beta1; in every arm."""

    weight_decay: float
    """L2 penalty on kernels (AdamW: decoupled decay), in every arm."""

    decay_all: Annotated[bool, tyro.conf.Suppress] = False
    """Whether biases and normalisation are decayed too, as the original code does."""

    swa_epochs: tuple[int, ...] = ()
    """Averaging windows, in epochs: the last ones of an arm with as many epochs as the
    plain one, or, when fine-tuning, epochs on top of the converged baseline."""

    swa_start: int | None = None
    """First epoch, from 1, whose end is averaged, where arms run over several budgets.
    """

    budgets: tuple[float, ...] | None = None
    """Lengths of training, in units of `epochs`."""

    # Devices.

    parallel: Literal["none", "pmap", "shard_map", "jit"] = "none"
    """Train on one device, or on all of the job's by this strategy."""

    cluster: Annotated[Cluster, tyro.conf.arg(name="")] = ONE_PROCESS
    """The processes of a job on many hosts."""

    # Tuning.

    tune: bool = False
    """Choose learning rates on the validation split instead; never reads test."""

    tune_seeds: int = 1
    """Number of seeds behind each cell of the tuning tables."""

    tune_learning_rates: tuple[float, ...] = (0.05, 0.1, 0.2)
    """First grid of the peak rate; grows while its best value is at an edge."""

    tune_weight_decays: tuple[float, ...] = (5e-4, 2e-3)
    """First grid of weight decays, each with its own search for a rate; grows too."""

    tune_swa_lrs: tuple[float, ...] = (0.05, 0.1, 0.2)
    """First grid of `swa_lr`, shared by the SWA arms; grows too."""

    tune_control_lrs: tuple[float, ...] = TUNE_CONTROL_LRS
    """First grid of `control_lr`; grows too."""

    def __post_init__(self) -> None:
        """Reject settings that cannot run, naming the setting and the rule."""
        self._check_ranges()
        self._check_applicable()
        self._check_misplaced()
        if self.model in CONVNETS:
            assert self.widths is not None
            assert self.strides is not None
            _check(
                len(self.widths) == len(self.strides) > 0,
                f"widths is {self.widths} and strides is {self.strides}; give one of"
                " each for every convolution, and at least one.",
            )
        if self.model == "transformer":
            assert self.width is not None
            assert self.heads is not None
            _check(
                self.width % self.heads == 0,
                f"width is {self.width} with heads={self.heads}; each head takes an"
                " equal part of the features.",
            )
        if self.protocol == "budgets":
            self._check_budgets()
        else:
            self._check_windows()
        self._check_cluster()

    def _check_ranges(self) -> None:
        ranges: dict[str, tuple[Callable[[Any], bool], str]] = {
            "seeds epochs batch_size eval_batch_size tune_seeds checkpoint_every"
            " keep_checkpoints log_every layers heads width context": (
                lambda value: value >= 1,
                "be at least 1",
            ),
            "image_size": (lambda value: value >= 32, "be at least 32"),
            "learning_rate swa_lr control_lr": (
                lambda value: 0 < value < math.inf,
                "be above 0",
            ),
            "momentum weight_decay max_shift mixup_alpha": (
                lambda value: 0 <= value < math.inf,
                "not be negative",
            ),
            "label_smoothing dropout": (
                lambda value: 0 <= value < 1,
                "be at least 0 and less than 1",
            ),
            "widths strides": (
                lambda values: all(value >= 1 for value in values),
                "hold numbers of at least 1",
            ),
            "tune_learning_rates tune_weight_decays tune_swa_lrs tune_control_lrs": (
                lambda values: values and all(0 < v < math.inf for v in values),
                "hold at least one number, each above 0",
            ),
        }
        for names, (holds, rule) in ranges.items():
            for name in names.split():
                value = getattr(self, name)
                _check(
                    value is None or bool(holds(value)),
                    f"{name} is {value}; it must {rule}.",
                )
        _check(
            self.train_examples is None or self.train_examples >= 2,
            f"train_examples is {self.train_examples}; BatchNorm needs at least 2"
            " examples. Leave the option out to train on all of them.",
        )

    def _check_applicable(self) -> None:
        text = self.dataset == "shakespeare"
        applies = {
            "image_size": (self.dataset == "imagenet2012", "ImageNet"),
            "context": (text, "text"),
            "widths": (self.model in CONVNETS, "small convolutional nets"),
            "strides": (self.model in CONVNETS, "small convolutional nets"),
            "pixel_max": (self.model in CONVNETS, "small convolutional nets"),
            "layers": (self.model == "transformer", "Transformers"),
            "heads": (self.model == "transformer", "Transformers"),
            "width": (self.model == "transformer", "Transformers"),
            "dropout": (self.model in WITH_DROPOUT, "VGG16 and Transformers"),
            "control_lr": (self.protocol == "fine_tune", "fine-tuning"),
            "swa_start": (self.protocol == "budgets", "arms of several budgets"),
            "budgets": (self.protocol == "budgets", "arms of several budgets"),
        }
        for name, (needed, subject) in applies.items():
            value = getattr(self, name)
            _check(
                needed or value is None,
                f"{name} is {value}; it belongs to {subject}, not to {self.name}."
                " Leave it out.",
            )
            _check(
                not needed or value is not None,
                f"{name} is None; {self.name} needs a value.",
            )

    def _check_misplaced(self) -> None:
        """Settings that all experiments have, but not all may change."""
        images = self.dataset != "shakespeare"
        fine_tune = self.protocol == "fine_tune"
        allowed = {
            "max_shift": (images or not self.max_shift, "images"),
            "flip": (images or not self.flip, "images"),
            "mixup_alpha": (images or not self.mixup_alpha, "images"),
            "swa_epochs": (
                self.protocol != "budgets" or not self.swa_epochs,
                "arms of one budget",
            ),
            "tune_control_lrs": (
                fine_tune or self.tune_control_lrs == TUNE_CONTROL_LRS,
                "fine-tuning",
            ),
        }
        for name, (valid, subject) in allowed.items():
            _check(
                valid,
                f"{name} is {getattr(self, name)}; it belongs to {subject}, not to"
                f" {self.name}. Leave it out.",
            )
        _check(
            not (self.dataset == "imagenet2012" and self.max_shift),
            f"max_shift is {self.max_shift}; ImageNet has random-resized crops instead."
            " Leave it out.",
        )

    def _check_budgets(self) -> None:
        assert self.budgets is not None
        assert self.swa_start is not None
        _check(
            len(self.budgets) > 0 and list(self.budgets) == sorted(set(self.budgets)),
            f"budgets is {self.budgets}; name at least one, in ascending order.",
        )
        first = int(self.budgets[0] * self.epochs)
        _check(
            1 <= self.swa_start <= first,
            f"swa_start is {self.swa_start}, and the smallest of budgets={self.budgets}"
            f" with epochs={self.epochs} ends after epoch {first}; the first epoch to"
            " average must be from 1 to that, as in --epochs 10 --swa-start 8.",
        )

    def _check_windows(self) -> None:
        _check(
            len(self.swa_epochs) > 0,
            "swa_epochs is empty; name at least one averaging window, such as"
            " --swa-epochs 5 10.",
        )
        last = math.inf if self.protocol == "fine_tune" else self.epochs - 1
        for window in self.swa_epochs:
            _check(
                1 <= window <= last,
                f"swa_epochs contains {window} with epochs={self.epochs}; a window"
                " must be at least 1 and leave an epoch before it. Raise --epochs or"
                " shorten the window, as in --epochs 4 --swa-epochs 1 2.",
            )
        _check(
            len(set(self.swa_epochs)) == len(self.swa_epochs),
            f"swa_epochs is {self.swa_epochs}; each window must appear once.",
        )

    def _check_cluster(self) -> None:
        cluster = self.cluster
        address, number = cluster.coordinator_address, cluster.process_id
        if address is None or cluster.num_processes is None or number is None:
            given = address, cluster.num_processes, number
            _check(
                given == (None, None, None),
                "coordinator_address, num_processes and process_id are"
                f" {', '.join(map(str, given))}; give all three, or none of them.",
            )
            return
        _check(
            0 <= number < cluster.num_processes,
            f"process_id is {number} with num_processes={cluster.num_processes};"
            " processes are numbered from 0 to one less than that.",
        )
        _check(
            not cluster.distributed,
            "distributed is set along with coordinator_address; give only one of the"
            " two.",
        )


def _check(valid: bool, message: str) -> None:
    if not valid:
        raise ValueError(message)
