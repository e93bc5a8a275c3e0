"""CIFAR-10 and CIFAR-100, from tfds."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from experiments.data.dataset import Images, Inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cifar10(Images):
    """60,000 images of 32x32 pixels; the last 5,000 for training validate."""

    splits: ClassVar[Mapping[str, str]] = {
        "train": "train[:45000]",
        "validation": "train[45000:]",
        "test": "test",
    }
    tfds_name: ClassVar[str] = "cifar10"

    @property
    def inputs(self) -> Inputs:
        """Mean and deviation over the train split."""
        return Inputs((32, 32, 3), 10, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7))

    def prepare(self) -> tuple[Any, Mapping[str, str]]:
        """Let tfds download it."""
        from experiments.data import tfds

        return tfds.stock(self.tfds_name, self.data_dir), self.splits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cifar100(Cifar10):
    """The same with 100 classes."""

    tfds_name = "cifar100"

    @property
    def inputs(self) -> Inputs:
        """Mean and deviation over the train split."""
        return Inputs((32, 32, 3), 100, (129.3, 124.1, 112.4), (68.2, 65.4, 70.4))
