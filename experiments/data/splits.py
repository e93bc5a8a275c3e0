"""Splits of data sets, to be read by rows.

A small data set is read once into memory; ImageNet's files stay where they are and are
decoded when a batch needs them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grain
import numpy as np
import tensorflow_datasets as tfds

from experiments.data.augment import (
    CROP_DRAWS,
    Share,
    centre_crop,
    decode,
    random_resized_crop,
    shift_and_flip,
)
from experiments.data.dataset import DataSet, Examples, Images
from experiments.runtime import processes
from experiments.runtime.errors import DataError

# Of the labels drawn anew, by split.
_NOISE_SEEDS = {"train": (1806, 5), "validation": (1806, 10)}
_READ_BLOCK = 1000  # examples that a reader thread decodes at a time


class Split(Protocol):
    """A split, to be read by rows."""

    num_examples: int
    threads: int  # that read ahead
    source: str  # full name of the data set and its version, as tfds has it

    def read(self, rows: np.ndarray) -> Examples:
        """The examples in these rows, as evaluation sees them."""

    def read_augmented(
        self, rows: np.ndarray, dataset: DataSet, rng: np.random.Generator, share: Share
    ) -> Examples:
        """The share of a batch with these rows, as training sees it.

        `rows` are those of the share; `rng` draws for the whole batch.
        """


class MemorySplit:
    """A split in memory."""

    # The data is in memory: one thread keeps ahead, more would fight for the GIL.
    threads = 1

    def __init__(self, examples: Examples, source: str = "memory") -> None:
        """Hold `examples`."""
        self.examples, self.source = examples, source
        self.num_examples = len(examples.labels)

    def read(self, rows: np.ndarray) -> Examples:
        """The examples in these rows."""
        return Examples(self.examples.inputs[rows], self.examples.labels[rows])

    def read_augmented(
        self, rows: np.ndarray, dataset: DataSet, rng: np.random.Generator, share: Share
    ) -> Examples:
        """The examples in these rows, shifted and mirrored."""
        inputs, labels = self.read(rows)
        if isinstance(dataset, Images) and (dataset.max_shift or dataset.flip):
            inputs = shift_and_flip(inputs, rng, dataset.max_shift, dataset.flip, share)
        return Examples(inputs, labels)


class StoredSplit:
    """A split of encoded images in files, decoded when they are read."""

    threads = 16

    def __init__(
        self, rows: Any, num_examples: int, size: int, source: str = "memory"
    ) -> None:
        """Read from `rows`, random access to dicts of "image" (bytes) and "label"."""
        self._rows, self._size, self.source = rows, size, source
        self.num_examples = num_examples

    def _read(
        self, rows: np.ndarray, view: Callable[[Any, int], np.ndarray]
    ) -> Examples:
        found = self._rows.__getitems__(rows.tolist())
        images = [view(decode(each["image"]), i) for i, each in enumerate(found)]
        labels = np.array([each["label"] for each in found], np.int32)
        return Examples(np.stack(images), labels)

    def read(self, rows: np.ndarray) -> Examples:
        """The middle of the images in these rows."""
        return self._read(rows, lambda image, _: centre_crop(image, self._size))

    def read_augmented(
        self, rows: np.ndarray, dataset: DataSet, rng: np.random.Generator, share: Share
    ) -> Examples:
        """Random-resized crops of the images in these rows."""
        whole = len(rows) * share.processes
        draws = rng.random((whole, CROP_DRAWS))[share.rows(whole)]
        flip = isinstance(dataset, Images) and dataset.flip

        def view(image: Any, row: int) -> np.ndarray:
            return random_resized_crop(image, draws[row], self._size, flip)

        return self._read(rows, view)


class _Blocks:
    """Random access to blocks of decoded examples, for grain."""

    def __init__(self, source: Any, num_rows: int, dataset: DataSet) -> None:
        self._source, self._num_rows, self._dataset = source, num_rows, dataset

    def __len__(self) -> int:
        return -(-self._num_rows // _READ_BLOCK)

    def __getitem__(self, index: int) -> Examples:
        start = index * _READ_BLOCK
        stop = min(start + _READ_BLOCK, self._num_rows)
        return self._dataset.to_examples(self._source.__getitems__(range(start, stop)))


def load_splits(
    dataset: DataSet, names: Sequence[str], *, hold_out: bool | None = None
) -> dict[str, Split]:
    """Prepare the data set if need be, and read the named splits.

    Args:
        dataset: Its `train_examples` first examples make up the train split: a
            fixed subset, for tfds stores examples in a fixed, hashed order. Without
            `hold_out`, the validation split's follow the train split's.
        names: Some of "train", "validation", "test"; no other split is read.
        hold_out: Instead of the data set's setting.

    Raises:
        DataError: A file is damaged, or `train_examples` exceeds the split.
        DataUnavailableError: The data set is not on this machine.
    """
    with processes.main_first():  # a builder looks only once for prepared data
        builder, splits = dataset.prepare()
    if not (dataset.hold_out if hold_out is None else hold_out):
        splits = {**splits, "train": f"{splits['train']}+{splits['validation']}"}
    wanted = {
        "train": dataset.train_examples,
        "validation": dataset.validation_examples,
    }
    return {
        name: _with_noise(
            dataset, name, _load(dataset, builder, splits[name], name, wanted.get(name))
        )
        for name in names
    }


def _with_noise(dataset: DataSet, name: str, split: Split) -> Split:
    """The split with as many labels drawn anew as the data set's settings say."""
    if not isinstance(dataset, Images) or not dataset.label_noise:
        return split
    if name != "train" and not (name == "validation" and dataset.noisy_validation):
        return split
    assert isinstance(split, MemorySplit)  # a check of the settings
    share = dataset.label_noise
    inputs, labels = split.examples
    rng = np.random.default_rng(_NOISE_SEEDS[name])
    drawn = rng.permutation(len(labels))[: round(share * len(labels))]
    labels = labels.copy()
    labels[drawn] = rng.integers(0, dataset.inputs.num_classes, len(drawn))
    source = f"{split.source}, {share:.0%} of the labels drawn anew"
    return MemorySplit(Examples(inputs, labels), source)


def _load(
    dataset: DataSet, builder: Any, tfds_split: str, name: str, wanted: int | None
) -> Split:
    source = builder.info.full_name
    if dataset.stored:
        undecoded = {"image": tfds.decode.SkipDecoding()}
        rows = builder.as_data_source(tfds_split, decoders=undecoded)
        size = _limited(dataset, name, wanted, len(rows))
        return StoredSplit(rows, size, dataset.inputs.shape[0], source)
    rows = builder.as_data_source(tfds_split)
    # A row may become many examples: they can be counted only once they are read.
    blocks = grain.MapDataset.source(
        _Blocks(rows, min(wanted or len(rows), len(rows)), dataset)
    ).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    inputs, labels = map(np.concatenate, zip(*blocks, strict=True))
    size = _limited(dataset, name, wanted, len(labels))
    return MemorySplit(Examples(inputs[:size], labels[:size]), source)


def _limited(dataset: DataSet, name: str, wanted: int | None, size: int) -> int:
    if wanted is None:
        return size
    if wanted > size:
        raise DataError(
            f"{name}_examples is {wanted}; the {name} split of"
            f" {type(dataset).__name__} has {size}. Ask for at most that many."
        )
    return wanted
