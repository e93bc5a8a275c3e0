"""scikit-learn's handwritten digits."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.data.dataset import Images, Inputs

# The n-th example of every class goes to the split at n mod 6: half of the images
# train, a third test (small test sets hide differences), the rest tune.
SPLIT_CYCLE = ("test", "train", "validation", "train", "test", "train")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(Images):
    """1,797 grey images of 8x8 pixels in three disjoint, stratified splits."""

    @property
    def inputs(self) -> Inputs:
        """Pixels are from 0 to 16."""
        return Inputs((8, 8, 1), 10, pixel_max=16)

    def prepare(self) -> tuple[Any, Mapping[str, str]]:
        """Write the splits to tfds's files."""
        from experiments.data import tfds

        features = {"image": ((8, 8, 1), np.uint8), "label": ((), np.int32)}
        return tfds.own("digits", features, _rows, self.data_dir), self.splits


def _rows() -> dict[str, list[tuple[int, dict[str, Any]]]]:
    import sklearn.datasets  # a second of import time, needed only once

    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    found: dict[str, list[tuple[int, dict[str, Any]]]] = {n: [] for n in SPLIT_CYCLE}
    seen = [0] * 10
    for key, (image, label) in enumerate(zip(images, labels, strict=True)):
        split = SPLIT_CYCLE[seen[label] % len(SPLIT_CYCLE)]
        found[split].append((key, {"image": image, "label": np.int32(label)}))
        seen[label] += 1
    return found
