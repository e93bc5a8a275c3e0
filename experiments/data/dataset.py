"""What all data sets have: settings, and facts that a network needs.

A data set is a subclass of `DataSet`, in a file of its own; nothing else names it but
the experiments that train on it. It says where tfds finds it or how it is made, and
which of tfds's splits are ours.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from experiments.runtime.checks import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    SHARE,
    check,
    check_settings,
)


class Examples(NamedTuple):
    """Some examples in memory."""

    inputs: np.ndarray  # [num_examples, height, width, channels] or [.., context] uint8
    labels: np.ndarray  # [num_examples] int32, for text [num_examples, context]


class Inputs(NamedTuple):
    """What a network needs to know of the data it is made for."""

    shape: tuple[int, ...]  # of one example; raw bytes
    num_classes: int
    pixel_mean: tuple[float, ...] = (0.0,)  # of each channel, in raw pixels
    pixel_std: tuple[float, ...] = (1.0,)
    pixel_max: int = 255


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """Settings of any data set."""

    data_dir: pathlib.Path | None = None
    """Where prepared data sets live. None: tfds's own, ~/tensorflow_datasets."""

    train_examples: int | None = None
    """Train on a fixed subset of this many examples. None: all of them."""

    hold_out: bool = True
    """Keep the validation split out of training. Without it, training has those
    examples as well, as published results do; tuning holds them out all the same."""

    validation_examples: int | None = None
    """Validate on a fixed subset of this many examples. None: all of them."""

    batch_size: int
    """Examples in a training batch."""

    eval_batch_size: int
    """Examples in a batch of evaluation and of the BatchNorm pass."""

    # Our split names -> tfds's.
    splits: ClassVar[Mapping[str, str]] = {
        name: name for name in ("train", "validation", "test")
    }
    # Scored by accuracy, or by loss.
    scored_by: ClassVar[str] = "accuracy"
    # Examples behind a point of width.png, of which there are hundreds.
    width_examples: ClassVar[Mapping[str, int]] = {"train": 5000}
    # Whether files are decoded when a batch needs them, as is not the case of what
    # fits into memory.
    stored: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Reject settings that cannot run, naming the setting and the rule."""
        check_settings(self, AT_LEAST_1, "batch_size", "eval_batch_size")
        check(
            self.validation_examples is None or self.validation_examples >= 1,
            f"validation_examples is {self.validation_examples}; it must be at least 1."
            " Leave the option out to validate on all of them.",
        )
        check(
            self.train_examples is None or self.train_examples >= 2,
            f"train_examples is {self.train_examples}; BatchNorm needs at least 2"
            " examples. Leave the option out to train on all of them.",
        )

    @property
    def inputs(self) -> Inputs:
        """What a network needs to know."""
        raise NotImplementedError

    def prepare(self) -> tuple[Any, Mapping[str, str]]:
        """Return a tfds builder whose data are prepared, and the splits' names in it.

        Raises:
            DataUnavailableError: The data cannot be had; the message says how to.
        """
        raise NotImplementedError

    def to_examples(self, rows: Sequence[Mapping[str, Any]]) -> Examples:
        """Put what tfds read together."""
        images = np.stack([row["image"] for row in rows])
        return Examples(images, np.array([row["label"] for row in rows], np.int32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images(DataSet):
    """Settings of images."""

    max_shift: int = 0
    """Shift each training image by up to this many pixels. 0: do not."""

    flip: bool = False
    """Mirror half of the training images, chosen at random."""

    mixup_alpha: float = 0.0
    """MixUp: train on pairs of images, mixed by a Beta(alpha, alpha) draw. 0: do not.
    """

    label_noise: float = 0.0
    """Share of the training labels that are drawn anew, uniformly from all classes: the
    same ones for every seed."""

    noisy_validation: bool = False
    """Draw as many labels of the validation split anew. The test split stays clean."""

    def __post_init__(self) -> None:
        """Reject settings that cannot run."""
        super().__post_init__()
        check_settings(self, NOT_NEGATIVE, "max_shift", "mixup_alpha")
        check_settings(self, SHARE, "label_noise")
        check(
            not (self.stored and self.label_noise),
            f"label_noise is {self.label_noise}; it must be 0 for examples that are"
            " read from files while training goes on.",
        )
