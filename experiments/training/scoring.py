"""Scores: which network a state holds, and how good it is on a split.

One scorer for runs, tuning and pictures. It uses all devices of the job: batches are
shared among them, weights are on each.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import swa_jax
from experiments.data.augment import own_share
from experiments.data.batches import EvalBatch, EvalBatches, InputBatches
from experiments.data.splits import Split
from experiments.models import Model
from experiments.training.parallel import Strategy
from experiments.training.plans import Weights
from experiments.training.step import TrainState

PyTree = Any
Network = tuple[PyTree, PyTree]  # parameters and batch_stats


class Evaluation(NamedTuple):
    """Means over every label of a split: one an image, one a token of text."""

    accuracy: float  # fraction in [0, 1]
    loss: float  # cross-entropy in nats


@functools.partial(jax.jit, static_argnames="model")
def _sums(
    model: nn.Module, params: PyTree, batch_stats: PyTree, batch: EvalBatch
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Labels, correct answers and summed loss of the batch's real rows."""
    variables = {"params": params, "batch_stats": batch_stats}
    logits = jnp.asarray(model.apply(variables, batch["inputs"], train=False))
    labels = batch["labels"]
    mask = batch["mask"].reshape(-1, *(1,) * (labels.ndim - 1))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = (jnp.argmax(logits, axis=-1) == labels) & mask
    count = jnp.sum(batch["mask"]) * math.prod(labels.shape[1:])
    return count, jnp.sum(correct), jnp.sum(jnp.where(mask, losses, 0.0))


@functools.cache  # one function object per model, so that it is compiled once
def make_batch_stats_fn(
    model: Model,
) -> Callable[[PyTree, PyTree, jax.Array], PyTree]:
    """The forward pass that `swa_jax.recompute_batch_stats` repeats."""
    # Dropout stays off: what BatchNorm follows in VGG16 comes before it, and the pass
    # is then a function of weights and data alone.
    dry = model.clone(dropout=0.0) if getattr(model, "dropout", 0) else model

    def batch_stats_fn(
        params: PyTree, batch_stats: PyTree, inputs: jax.Array
    ) -> PyTree:
        variables = {"params": params, "batch_stats": batch_stats}
        _, updated = dry.apply(variables, inputs, train=True, mutable=["batch_stats"])
        return updated["batch_stats"]

    return batch_stats_fn


def averaged_variables(state: TrainState) -> Network:
    """The averaged weights, and the statistics that were averaged along with them.

    Args:
        state: Of an arm that averages.
    """
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    averaged = swa_jax.swa_params(state.opt_state, variables)
    return averaged["params"], averaged["batch_stats"]


class Scorer:
    """Scores networks on splits."""

    def __init__(
        self,
        model: Model,
        splits: Mapping[str, Split],
        batch_size: int,
        strategy: Strategy,
        limit: int | None = None,
    ) -> None:
        """Score `model`, a network that is built.

        Args:
            model: The network.
            splits: "train" among them, whose inputs the BatchNorm pass sees.
            batch_size: Of evaluation; rounded up to a multiple of the devices.
            strategy: The devices.
            limit: Use so many examples of each split, up to whole batches. None: all.
        """
        self.model = model
        self._splits, self._limit, self._strategy = splits, limit, strategy
        self._batch_size = -(-batch_size // strategy.devices) * strategy.devices
        self._share = own_share()

    @property
    def examples(self) -> dict[str, int]:
        """How many examples of each split are scored."""
        size = self._batch_size

        def scored(number: int) -> int:
            wanted = number if self._limit is None else min(number, self._limit)
            return min(number, -(-wanted // size) * size)

        return {n: scored(split.num_examples) for n, split in self._splits.items()}

    def network(self, state: TrainState, weights: Weights) -> Network:
        """The parameters and statistics that a readout names, on all devices."""
        if weights == "iterate":
            found = state.params, state.batch_stats
        else:
            params, along = averaged_variables(state)
            left = weights != "average, statistics averaged along"
            found = params, state.batch_stats if left else along
        found = self._strategy.replicate(found)
        return (found[0], self._fit(*found)) if weights == "average" else found

    def fitted(self, params: PyTree, like: PyTree) -> Network:
        """Any parameters with BatchNorm statistics that belong to them.

        Args:
            params: On one device.
            like: The structure of the statistics; empty without BatchNorm.

        Raises:
            FloatingPointError: The weights lead to statistics that are not finite.
        """
        params, like = self._strategy.replicate((params, like))
        return params, self._fit(params, like)

    def _fit(self, params: PyTree, batch_stats: PyTree) -> PyTree:
        """Statistics over every training input once, not augmented."""
        if not batch_stats:
            return batch_stats
        try:
            return swa_jax.recompute_batch_stats(
                make_batch_stats_fn(self.model), params, batch_stats, self._inputs()
            )
        except swa_jax.NonFiniteError as error:
            raise FloatingPointError(str(error)) from error

    def _inputs(self) -> Iterator[PyTree]:
        batches = InputBatches(
            self._splits["train"], self._batch_size, self._limit, self._share
        )
        for index, inputs in enumerate(batches):
            whole = batches.is_whole(index)
            yield (self._strategy.share if whole else self._strategy.replicate)(inputs)

    def score(
        self, network: Network, split: str, limit: int | None = None
    ) -> Evaluation:
        """Score a network on all examples of a split, each counted once.

        Args:
            network: From `network` or `fitted`.
            split: Its name.
            limit: As for the scorer, of this split.

        Raises:
            ValueError: The split holds no example.
        """
        batches = EvalBatches(
            self._splits[split], self._batch_size, limit or self._limit, self._share
        )
        share = self._strategy.share
        sums = [_sums(self.model, *network, share(batch)) for batch in batches]
        if not sums:
            raise ValueError(f"split {split} holds no example; give it at least one.")
        counts, corrects, losses = zip(*jax.device_get(sums), strict=True)
        count = int(sum(counts))
        return Evaluation(int(sum(corrects)) / count, math.fsum(losses) / count)
