"""Evaluation: a split's accuracy and loss, and the averaged network to evaluate."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import swa_jax
from experiments.data import EvalBatch
from experiments.train import TrainState

PyTree = Any


class Evaluation(NamedTuple):
    """Means over every label of a split: one an image, one a token of text."""

    accuracy: float  # fraction in [0, 1]
    loss: float  # cross-entropy in nats


@functools.partial(jax.jit, static_argnames="model")
def _sums(
    model: nn.Module, params: PyTree, batch_stats: PyTree, batch: EvalBatch
) -> tuple[jax.Array, jax.Array]:
    """Number of correct answers and summed loss of the batch's real rows."""
    variables = {"params": params, "batch_stats": batch_stats}
    logits = jnp.asarray(model.apply(variables, batch["inputs"], train=False))
    labels = batch["labels"]
    mask = batch["mask"].reshape(-1, *(1,) * (labels.ndim - 1))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = (jnp.argmax(logits, axis=-1) == labels) & mask
    return jnp.sum(correct), jnp.sum(jnp.where(mask, losses, 0.0))


def evaluate(
    model: nn.Module, params: PyTree, batch_stats: PyTree, batches: Iterable[EvalBatch]
) -> Evaluation:
    """Score a network on all examples of `batches`, each counted once.

    Raises:
        ValueError: The batches hold no example.
    """
    count, sums = 0, []
    for batch in batches:
        count += int(np.sum(batch["mask"])) * math.prod(batch["labels"].shape[1:])
        sums.append(_sums(model, params, batch_stats, batch))
    if count == 0:
        raise ValueError("batches hold no example; evaluation needs at least one.")
    corrects, losses = zip(*jax.device_get(sums), strict=True)
    return Evaluation(int(sum(corrects)) / count, math.fsum(losses) / count)


@functools.cache  # one function object per model, so that it is compiled once
def make_batch_stats_fn(
    model: nn.Module,
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


def fit_batch_stats(
    model: nn.Module,
    params: PyTree,
    batch_stats: PyTree,
    input_batches: Iterable[np.ndarray],
) -> PyTree:
    """BatchNorm statistics that belong to these weights; empty without BatchNorm.

    Args:
        model: The network.
        params: Its weights.
        batch_stats: Of any weights; tells the structure.
        input_batches: Every training input once, not augmented.

    Raises:
        FloatingPointError: The weights lead to statistics that are not finite.
    """
    if not batch_stats:
        return batch_stats
    try:
        return swa_jax.recompute_batch_stats(
            make_batch_stats_fn(model), params, batch_stats, input_batches
        )
    except swa_jax.NonFiniteError as error:
        raise FloatingPointError(str(error)) from error


def averaged_variables(state: TrainState) -> tuple[PyTree, PyTree]:
    """The averaged weights, and the statistics that were averaged along with them.

    Args:
        state: Of an arm that averages.

    Returns:
        Parameters and batch_stats.
    """
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    averaged = swa_jax.swa_params(state.opt_state, variables)
    return averaged["params"], averaged["batch_stats"]


def averaged_network(
    model: nn.Module, state: TrainState, input_batches: Iterable[np.ndarray]
) -> tuple[PyTree, PyTree]:
    """The averaged weights, and BatchNorm statistics that belong to them.

    Args:
        model: The network.
        state: Of an arm that averages.
        input_batches: Every training input once, not augmented.

    Returns:
        Parameters and batch_stats.

    Raises:
        FloatingPointError: The averaged weights lead to statistics that are not finite.
    """
    params, _ = averaged_variables(state)
    return params, fit_batch_stats(model, params, state.batch_stats, input_batches)
