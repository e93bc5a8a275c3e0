"""Splits read with grain, and their batches for training and evaluation.

Each data set is small, so it is read once into memory. A training batch is then a
pure function of (seed, step), computed by grain's reader thread ahead of the loop.
"""

import contextlib
import functools
import io
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import grain
import numpy as np
import tensorflow_datasets as tfds

from experiments import builders, processes
from experiments.builders import Examples, take
from experiments.configs import Config

# Debian's package dataset-fashion-mnist installs here.
FASHION_MNIST_DIR = pathlib.Path("/usr/share/datasets/fashion-mnist")
# tfds's own fashion_mnist has no validation split; this carves out the same size.
STOCK_SPLITS = {
    "train": "train[:50000]",
    "validation": "train[50000:]",
    "test": "test",
}
_READ_BLOCK = 1000  # examples that a reader thread decodes at a time


class Batch(TypedDict):
    """A batch for training."""

    images: np.ndarray  # [batch, height, width, 1] uint8
    labels: np.ndarray  # [batch] int32


class EvalBatch(Batch):
    """A batch for evaluation: rows with a False mask are padding."""

    mask: np.ndarray  # [batch] bool


class Share(NamedTuple):
    """The rows of every batch that one process gathers: contiguous, its own alone."""

    process: int  # from 0
    processes: int  # divides the batch size

    def rows(self, batch_size: int) -> slice:
        """Where they are in a batch of the whole job."""
        size = batch_size // self.processes
        return slice(self.process * size, (self.process + 1) * size)


WHOLE = Share(0, 1)


class DataUnavailableError(RuntimeError):
    """A data set can be neither found nor prepared here; the message says how."""


def _prepare(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetBuilder:
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # tfds announces downloads
        builder.download_and_prepare()
    return builder


def _stock_fashion_mnist(data_dir: pathlib.Path | None) -> tfds.core.DatasetBuilder:
    try:
        return _prepare(
            tfds.builder("fashion_mnist", data_dir=data_dir, file_format="array_record")
        )
    except Exception as error:  # tfds raises many kinds: network, TensorFlow, disk
        raise DataUnavailableError(
            f"Fashion-MNIST is not in {FASHION_MNIST_DIR}, and tensorflow-datasets"
            f" could not prepare it ({type(error).__name__}: {error}). Run one of:\n"
            "  apt-get install dataset-fashion-mnist\n"
            "  pip install tensorflow-cpu &&"
            " tfds build fashion_mnist --file_format=array_record"
        ) from error


def _make_builder(config: Config) -> tuple[tfds.core.DatasetBuilder, Mapping[str, str]]:
    """Return the prepared builder, and our split names -> its splits."""
    own_splits = {name: name for name in STOCK_SPLITS}
    if config.name == "digits":
        builder = builders.Digits(data_dir=config.data_dir, file_format="array_record")
        return _prepare(builder), own_splits
    files = [builders.idx_files(FASHION_MNIST_DIR, p) for p in ("train", "t10k")]
    if all(path.is_file() for pair in files for path in pair):
        builder = builders.FashionMnistIdx(
            idx_dir=FASHION_MNIST_DIR,
            data_dir=config.data_dir,
            file_format="array_record",
        )
        return _prepare(builder), own_splits
    return _stock_fashion_mnist(config.data_dir), STOCK_SPLITS


class _Blocks:
    """Random access to blocks of decoded examples, for grain."""

    def __init__(self, source: Any, num_examples: int) -> None:
        self._source = source
        self._num_examples = num_examples

    def __len__(self) -> int:
        return -(-self._num_examples // _READ_BLOCK)

    def __getitem__(self, index: int) -> Examples:
        start = index * _READ_BLOCK
        stop = min(start + _READ_BLOCK, self._num_examples)
        rows = self._source.__getitems__(range(start, stop))
        images = np.stack([row["image"] for row in rows])
        return Examples(images, np.array([row["label"] for row in rows], np.int32))


def load_splits(config: Config, names: Sequence[str]) -> dict[str, Examples]:
    """Prepare the data set if need be, and read the named splits into memory.

    Args:
        config: Its `train_examples` first examples make up the train split: a
            fixed subset, for tfds stores examples in a fixed, hashed order.
        names: Some of "train", "validation", "test"; no other split is read.

    Raises:
        ValueError: A file is damaged, or `train_examples` exceeds the split.
        DataUnavailableError: The data set is not on this machine.
    """
    with processes.main_first():  # a builder looks only once for prepared data
        builder, splits = _make_builder(config)
    loaded = {}
    for name in names:
        source = builder.as_data_source(splits[name])
        size = len(source)
        if name == "train" and config.train_examples is not None:
            if config.train_examples > size:
                raise ValueError(
                    f"train_examples is {config.train_examples}; the train split of"
                    f" {config.name} has {size}. Ask for at most that many."
                )
            size = config.train_examples
        blocks = grain.MapDataset.source(_Blocks(source, size)).to_iter_dataset(
            grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        )
        loaded[name] = Examples(*map(np.concatenate, zip(*blocks, strict=True)))
    return loaded


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Number of batches that hold every example at least once."""
    return -(-num_examples // batch_size)


@functools.lru_cache(maxsize=4)
def epoch_order(
    num_examples: int, batch_size: int, seed: int, epoch: int
) -> np.ndarray:
    """Rows of an epoch's batches, [steps, batch]: a function of (seed, epoch) alone.

    All batches are full, so that a training step has one shape: where the batch
    size does not divide the number of examples, the last batch is filled up with
    the first rows of the same epoch. No example is ever left out.
    """
    steps = steps_per_epoch(num_examples, batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(num_examples)
    batches = np.resize(order, (steps, batch_size))  # repeats the order from its start
    batches.setflags(write=False)  # it is cached
    return batches


def augment(
    images: np.ndarray,
    rng: np.random.Generator,
    max_shift: int,
    flip: bool,
    share: Share = WHOLE,
) -> np.ndarray:
    """Shift each image by up to `max_shift` pixels, zeros moving in; mirror half.

    Where the images are a share of a batch, they come out as they would within it.
    """
    count, height, width, _ = images.shape
    whole = count * share.processes
    mine = share.rows(whole)
    pad = ((0, 0), (max_shift, max_shift), (max_shift, max_shift), (0, 0))
    padded = np.pad(images, pad)
    top, left = rng.integers(0, 2 * max_shift + 1, (2, whole, 1))[:, mine]
    rows, columns = top + np.arange(height), left + np.arange(width)
    if flip:
        mirrored = rng.random((whole, 1))[mine] < 0.5
        columns = np.where(mirrored, columns[:, ::-1], columns)
    every = np.arange(count)[:, None, None]
    return padded[every, rows[:, :, None], columns[:, None, :]]


class _TrainBatches:
    """Random access to a process's share of a whole run's batches, for grain."""

    def __init__(
        self, examples: Examples, config: Config, seed: int, share: Share
    ) -> None:
        self._examples = examples
        self._config = config
        self._seed = seed
        self._share = share
        self._steps = steps_per_epoch(len(examples.labels), config.batch_size)

    def __len__(self) -> int:
        return self._config.epochs * self._steps

    def __getitem__(self, step: int) -> Batch:
        epoch, index = divmod(step, self._steps)
        config, (images, labels) = self._config, self._examples
        order = epoch_order(len(labels), config.batch_size, self._seed, epoch)
        rows = order[index, self._share.rows(config.batch_size)]
        picked = images[rows]
        if config.max_shift or config.flip:
            # NumPy ignores trailing zeros, so 0 would repeat epoch_order's stream.
            rng = np.random.default_rng((self._seed, epoch, index + 1))
            picked = augment(picked, rng, config.max_shift, config.flip, self._share)
        return Batch(images=picked, labels=labels[rows])


def train_batches(
    examples: Examples, config: Config, seed: int, share: Share = WHOLE
) -> Iterator[Batch]:
    """Iterate over the batches of `config.epochs` epochs, gathered ahead of use.

    Args:
        examples: The train split.
        config: The experiment.
        seed: Decides the order.
        share: The part of each batch to gather. All shares together are the batch
            that one process would train on.
    """
    dataset = grain.MapDataset.source(_TrainBatches(examples, config, seed, share))
    # The data is in memory: one thread keeps ahead, more would fight for the GIL.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)
    return iter(dataset.to_iter_dataset(options))


def eval_batches(examples: Examples, batch_size: int) -> list[EvalBatch]:
    """Cut a split into batches of one shape; the mask marks each example once."""
    batches = []
    for start in range(0, len(examples.labels), batch_size):
        images, labels = take(examples, slice(start, start + batch_size))
        missing = batch_size - len(labels)
        batches.append(
            EvalBatch(
                images=np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))),
                labels=np.pad(labels, (0, missing)),
                mask=np.arange(batch_size) < len(labels),
            )
        )
    return batches


def image_batches(examples: Examples, batch_size: int) -> list[np.ndarray]:
    """Cut a split's images into batches, the last one ragged: nothing is padded."""
    return [
        examples.images[start : start + batch_size]
        for start in range(0, len(examples.images), batch_size)
    ]
