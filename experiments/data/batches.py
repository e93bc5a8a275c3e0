"""Batches of a split, for training and for evaluation, read ahead by grain.

A training batch is a pure function of (seed, step).
"""

import functools
from collections.abc import Iterator
from typing import Any, NotRequired, Protocol, TypedDict, TypeVar

import grain
import numpy as np

from experiments.data.augment import WHOLE, Share
from experiments.data.dataset import DataSet, Images
from experiments.data.splits import MemorySplit, Split

T = TypeVar("T")


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


@functools.lru_cache(maxsize=4)
def epoch_order(
    num_examples: int, batch_size: int, seed: int, epoch: int
) -> np.ndarray:
    """Rows of an epoch's batches, [steps, batch]: a function of (seed, epoch) alone.

    All batches are full, so that a training step has one shape: where the batch
    size does not divide the number of examples, the last batch is filled up with
    the first rows of the same epoch. No example is ever left out.
    """
    steps = -(-num_examples // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(num_examples)
    batches = np.resize(order, (steps, batch_size))  # repeats the order from its start
    batches.setflags(write=False)  # it is cached
    return batches


class TrainBatches:
    """What training reads of a split."""

    def __init__(self, split: Split, dataset: DataSet, share: Share = WHOLE) -> None:
        """Gather a share of each batch of `dataset.batch_size`, augmented.

        All shares together are the batch that one process would train on.
        """
        self.split, self._dataset, self._share = split, dataset, share
        self.batch_size = dataset.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches that hold every example at least once."""
        return -(-self.split.num_examples // self.batch_size)

    def batch(self, seed: int, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs."""
        epoch, index = divmod(step, self.steps_per_epoch)
        dataset, share, size = self._dataset, self._share, self.batch_size
        order = epoch_order(self.split.num_examples, size, seed, epoch)[index]
        mine = share.rows(size)
        # NumPy ignores trailing zeros, so 0 would repeat epoch_order's stream.
        rng = np.random.default_rng((seed, epoch, index + 1))
        inputs, labels = self.split.read_augmented(order[mine], dataset, rng, share)
        batch = Batch(inputs=inputs, labels=labels)
        if isinstance(dataset, Images) and dataset.mixup_alpha:
            # One weight a batch, as the authors' own code has it.
            mix = rng.beta(dataset.mixup_alpha, dataset.mixup_alpha)
            partners = order[rng.permutation(size)][mine]
            batch["partner_inputs"], batch["partner_labels"] = (
                self.split.read_augmented(partners, dataset, rng, share)
            )
            batch["mix"] = np.full(len(labels), mix, np.float32)
        return batch

    def read(self, seed: int, first_step: int, last_step: int) -> Iterator[Batch]:
        """Iterate over the batches of steps first_step to last_step - 1, ahead of use.

        Args:
            seed: Decides the order, and what augmentation draws.
            first_step: Counted from 0 over all epochs. A later start gives the same
                batches from there on.
            last_step: Where to end.
        """
        steps = grain.MapDataset.range(first_step, last_step)
        batches = steps.map(lambda step: self.batch(seed, step))
        return _read_ahead(batches, self.split.threads, 16)


class _RandomAccess(Protocol[T]):  # type: ignore[misc]
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> T: ...


class _Batches:
    """The first examples of a split in order; may be iterated over again."""

    def __init__(
        self,
        split: Split,
        batch_size: int,
        limit: int | None = None,
        share: Share = WHOLE,
    ) -> None:
        """Take batches of `batch_size`, those with the first `limit` examples."""
        self._split, self._batch_size, self._share = split, batch_size, share
        number = split.num_examples
        wanted = number if limit is None else min(limit, number)
        self._starts = range(0, wanted, batch_size)

    def __len__(self) -> int:
        return len(self._starts)

    def _rows(self, index: int) -> np.ndarray:
        start = self._starts[index]
        stop = min(start + self._batch_size, self._split.num_examples)
        return np.arange(start, stop)


class EvalBatches(_Batches):
    """A split in batches of one shape; the mask marks each example once."""

    def __getitem__(self, index: int) -> EvalBatch:
        """A share of a batch."""
        rows = self._rows(index)
        whole = np.resize(rows, self._batch_size)  # padded with rows seen already
        mine = self._share.rows(self._batch_size)
        inputs, labels = self._split.read(whole[mine])
        mask = (np.arange(self._batch_size) < len(rows))[mine]
        return EvalBatch(inputs=inputs, labels=labels, mask=mask)

    def __iter__(self) -> Iterator[EvalBatch]:
        """In order; what must be decoded first is read ahead."""
        return _in_order(self, self._split)


class InputBatches(_Batches):
    """A split's inputs in batches, the last one ragged: nothing is padded."""

    def __getitem__(self, index: int) -> np.ndarray:
        """A share of a whole batch; a ragged one is everybody's."""
        rows = self._rows(index)
        mine = self._share.rows(len(rows))
        return self._split.read(rows[mine] if self.is_whole(index) else rows).inputs

    def is_whole(self, index: int) -> bool:
        """Whether it has all its rows, of which each process gathers a share."""
        return len(self._rows(index)) == self._batch_size

    def __iter__(self) -> Iterator[np.ndarray]:
        """In order; what must be decoded first is read ahead."""
        return _in_order(self, self._split)


def _in_order(batches: _RandomAccess[T], split: Split) -> Iterator[T]:
    if isinstance(split, MemorySplit):
        return map(batches.__getitem__, range(len(batches)))
    return _read_ahead(grain.MapDataset.source(batches), split.threads, 4)


def _read_ahead(batches: Any, threads: int, buffered: int) -> Iterator[Any]:
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(buffered, threads)
    )
    return iter(batches.to_iter_dataset(options))
