"""Fashion-MNIST, from Debian's package or from tfds."""

import dataclasses
import gzip
import math
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.data.dataset import Examples, Images, Inputs
from experiments.runtime.errors import DataError

# Debian's package dataset-fashion-mnist installs here.
DEBIAN_DIR = pathlib.Path("/usr/share/datasets/fashion-mnist")
# File name prefix -> number of examples that the published data set holds.
COUNTS = {"train": 60_000, "t10k": 10_000}
# tfds has no validation split: this is the end of train.
STOCK_SPLITS = {"train": "train[:50000]", "validation": "train[50000:]", "test": "test"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FashionMnist(Images):
    """70,000 grey images of 28x28 pixels, of ten kinds of clothes."""

    @property
    def inputs(self) -> Inputs:
        """Grey pixels; mean and deviation are those of the 60,000 training images."""
        return Inputs((28, 28, 1), 10, (72.94,), (90.02,))

    def prepare(self) -> tuple[Any, Mapping[str, str]]:
        """Write Debian's files to tfds's, or let tfds download its own."""
        from experiments.data import tfds

        paths = [path for prefix in COUNTS for path in idx_files(DEBIAN_DIR, prefix)]
        if not all(path.is_file() for path in paths):
            hint = (
                " `apt-get install dataset-fashion-mnist`, which fills"
                f" {DEBIAN_DIR}, or"
            )
            return tfds.stock("fashion_mnist", self.data_dir, hint), STOCK_SPLITS
        features = {"image": ((28, 28, 1), np.uint8), "label": ((), np.int32)}
        return tfds.own(
            "fashion_mnist_idx", features, _rows, self.data_dir
        ), self.splits


def _rows() -> dict[str, Any]:
    """Every 6th training image validates."""
    train, test = (read(DEBIAN_DIR, prefix) for prefix in COUNTS)
    validates = np.arange(len(train.labels)) % 6 == 5
    splits = {
        "train": Examples(train.inputs[~validates], train.labels[~validates]),
        "validation": Examples(train.inputs[validates], train.labels[validates]),
        "test": test,
    }
    return {
        name: (
            (key, {"image": image, "label": label})
            for key, (image, label) in enumerate(zip(*examples, strict=True))
        )
        for name, examples in splits.items()
    }


def idx_files(idx_dir: pathlib.Path, prefix: str) -> tuple[pathlib.Path, pathlib.Path]:
    """Paths of the images and labels whose file names start with `prefix`."""
    return (
        idx_dir / f"{prefix}-images-idx3-ubyte.gz",
        idx_dir / f"{prefix}-labels-idx1-ubyte.gz",
    )


def read_idx(path: pathlib.Path, ndim: int) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes with `ndim` dimensions.

    Raises:
        DataError: The file is not that, or is cut short.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is not a complete gzip file ({error}); reinstall it."
        ) from error
    magic = bytes([0, 0, 8, ndim])  # 8: unsigned bytes
    header = 4 + 4 * ndim
    if content[:4] != magic or len(content) < header:
        raise DataError(
            f"{path} starts with bytes {content[:4].hex()}; an IDX file of unsigned"
            f" bytes in {ndim} dimensions starts with {magic.hex()} and their sizes."
        )
    shape = tuple(np.frombuffer(content[4:header], ">u4").tolist())
    if len(content) - header != math.prod(shape):
        raise DataError(
            f"{path} holds {len(content) - header} bytes of data; its header promises"
            f" {math.prod(shape)} for shape {shape}. The file is damaged: reinstall it."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read(idx_dir: pathlib.Path, prefix: str) -> Examples:
    """Read and check the images and labels whose file names start with `prefix`."""
    image_path, label_path = idx_files(idx_dir, prefix)
    images, labels = read_idx(image_path, 3), read_idx(label_path, 1)
    expected = (COUNTS[prefix], 28, 28)
    if images.shape != expected:
        raise DataError(
            f"{image_path} has shape {images.shape}; Fashion-MNIST has {expected}."
        )
    if len(labels) != len(images) or labels.max() > 9:
        raise DataError(
            f"{label_path} holds {len(labels)} labels up to {labels.max()}; the"
            f" {len(images)} images need one label each, from 0 to 9."
        )
    return Examples(images[..., None], labels.astype(np.int32))
