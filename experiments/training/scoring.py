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
import numpy as np
import optax

import swa_jax
from experiments.data.augment import own_share
from experiments.data.batches import EvalBatch, EvalBatches, InputBatches
from experiments.data.splits import Split
from experiments.models import Model
from experiments.training.parallel import Strategy
from experiments.training.plans import ABLATIONS, ALONG, Arm, Weights
from experiments.training.step import TrainState

PyTree = Any
Network = tuple[PyTree, PyTree]  # parameters and batch_stats


class Evaluation(NamedTuple):
    """Means over every label of a split: one an image, one a token of text."""

    accuracy: float  # fraction in [0, 1]
    loss: float  # cross-entropy in nats
    ece: float  # expected calibration error, fraction in [0, 1]; see `_Sums`


# Bins of the calibration error, as in Guo et al., arXiv:1706.04599.
_BINS = 15


class _Sums(NamedTuple):
    """Sums over the real rows of a batch.

    The calibration error is the mean distance of a network's confidence, which is the
    probability of its answer, from its accuracy, among answers of like confidence.
    """

    labels: jax.Array  # how many
    correct: jax.Array
    loss: jax.Array
    gaps: jax.Array  # [bins], confidence less correctness, by confidence


@functools.partial(jax.jit, static_argnames="model")
def _sums(model: nn.Module, networks: PyTree, batch: EvalBatch) -> _Sums:
    """Of the mean prediction of one network or more.

    Args:
        model: Of all of them.
        networks: A list.
        batch: Of evaluation.
    """

    def logits_of(network: Network) -> jax.Array:
        variables = {"params": network[0], "batch_stats": network[1]}
        return jnp.asarray(model.apply(variables, batch["inputs"], train=False))

    if len(networks) == 1:
        logits = logits_of(networks[0])
    else:  # one after the other: compiled once, and activations of one at a time
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)
        each = jax.lax.map(lambda n: jax.nn.log_softmax(logits_of(n)), stacked)
        logits = jax.nn.logsumexp(each, axis=0)
    labels = batch["labels"]
    mask = batch["mask"].reshape(-1, *(1,) * (labels.ndim - 1))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = (jnp.argmax(logits, axis=-1) == labels) & mask
    count = jnp.sum(batch["mask"]) * math.prod(labels.shape[1:])
    confidence = jnp.max(jax.nn.softmax(logits), axis=-1)
    bins = jnp.clip(jnp.ceil(confidence * _BINS).astype(jnp.int32) - 1, 0, _BINS - 1)
    gaps = jnp.where(mask, confidence - correct, 0.0)
    return _Sums(
        count,
        jnp.sum(correct),
        jnp.sum(jnp.where(mask, losses, 0.0)),
        jnp.zeros(_BINS).at[bins.ravel()].add(gaps.ravel()),
    )


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


@functools.partial(jax.jit, static_argnames="which")
def _sample(key: jax.Array, opt_state: PyTree, params: PyTree, which: str) -> PyTree:
    return swa_jax.swag_sample(key, opt_state, params, which=which)


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
        limits: Mapping[str, int],
    ) -> None:
        """Score `model`, a network that is built.

        Args:
            model: The network.
            splits: "train" among them, whose inputs the BatchNorm pass sees.
            batch_size: Of evaluation; rounded up to a multiple of the devices.
            strategy: The devices.
            limits: So many examples of these splits, up to whole batches; of the
                others, all.
        """
        self.model = model
        self._splits, self._limits, self._strategy = splits, limits, strategy
        self._batch_size = -(-batch_size // strategy.devices) * strategy.devices
        self._share = own_share()

    @property
    def examples(self) -> dict[str, int]:
        """How many examples of each split are scored."""
        size = self._batch_size

        def scored(name: str, number: int) -> int:
            wanted = min(number, self._limits.get(name, number))
            return min(number, -(-wanted // size) * size)

        return {n: scored(n, split.num_examples) for n, split in self._splits.items()}

    def networks(self, arm: Arm, state: TrainState, weights: Weights) -> list[Network]:
        """What a readout names: one network, or those that predict together."""
        others = {each.name: each for each in arm.others}
        if weights not in others:
            return [self.network(state, weights)]
        params, opt_state, like = state.params, state.opt_state, state.batch_stats
        samples = others[weights].samples
        if not samples:
            params = swa_jax.averaged_params(opt_state, params, weights)
            return [self.fitted(params, like)]
        # The same draws for every seed of training, whose weights differ.
        keys = jax.random.split(jax.random.key(0), samples)
        drawn = (_sample(key, opt_state, params, weights) for key in keys)
        return [self.fitted(sample, like) for sample in drawn]

    def network(self, state: TrainState, weights: Weights) -> Network:
        """The iterate, or SWA's average with one kind of statistics, on all devices."""
        if weights == "iterate":
            found = state.params, state.batch_stats
        else:
            params, along = averaged_variables(state)
            found = params, along if weights == ALONG else state.batch_stats
        if weights == "iterate" or weights in ABLATIONS:
            return self._strategy.replicate(found)
        return self.fitted(*found)

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
            self._splits["train"],
            self._batch_size,
            self._limits.get("train"),
            self._share,
        )
        for index, inputs in enumerate(batches):
            whole = batches.is_whole(index)
            yield (self._strategy.share if whole else self._strategy.replicate)(inputs)

    def score(
        self,
        network: Network | list[Network],
        split: str,
        limit: int | None = None,
    ) -> Evaluation:
        """Score a network on all examples of a split, each counted once.

        Args:
            network: From `network` or `fitted`; or several, from `networks`, whose
                probabilities are averaged.
            split: Its name.
            limit: As for the scorer, of this split.

        Raises:
            ValueError: The split holds no example.
        """
        batches = EvalBatches(
            self._splits[split],
            self._batch_size,
            limit or self._limits.get(split),
            self._share,
        )
        share = self._strategy.share
        networks = network if isinstance(network, list) else [network]
        sums = [_sums(self.model, networks, share(batch)) for batch in batches]
        if not sums:
            raise ValueError(f"split {split} holds no example; give it at least one.")
        labels, correct, loss, gaps = zip(*jax.device_get(sums), strict=True)
        count = int(sum(labels))
        gap = np.sum(np.asarray(gaps, np.float64), axis=0)
        return Evaluation(
            int(sum(correct)) / count,
            math.fsum(loss) / count,
            float(np.abs(gap).sum() / count),
        )
