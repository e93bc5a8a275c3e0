"""ImageNet, from tfds; its files are decoded when a batch needs them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from experiments.data.dataset import Images, Inputs
from experiments.runtime.checks import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageNet(Images):
    """1.28 million images; random-resized crops train, the middle is scored."""

    splits: ClassVar[Mapping[str, str]] = {
        "train": "train[:-10000]",
        "validation": "train[-10000:]",
        "test": "validation",
    }
    stored = True

    image_size: int = 224
    """Side of the crops in pixels."""

    def __post_init__(self) -> None:
        """Reject settings that cannot run."""
        super().__post_init__()
        check(
            self.image_size >= 32,
            f"image_size is {self.image_size}; it must be at least 32.",
        )
        check(
            not self.max_shift,
            f"max_shift is {self.max_shift}; ImageNet has random-resized crops instead."
            " Leave it out.",
        )

    @property
    def inputs(self) -> Inputs:
        """Mean and deviation over the train split."""
        shape = self.image_size, self.image_size, 3
        mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
        return Inputs(shape, 1000, mean, std)

    def prepare(self) -> tuple[Any, Mapping[str, str]]:
        """Let tfds prepare the archives that a user put there."""
        from experiments.data import tfds

        manual = (
            f"\n(ImageNet's archives must lie in {tfds.directory(self.data_dir)}"
            "/downloads/manual)"
        )
        return tfds.stock("imagenet2012", self.data_dir, manual=manual), self.splits
