"""Evaluation: a split's accuracy and loss, and the averaged network to evaluate."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import swa_jax
from experiments.data import EvalBatch
from experiments.models import ConvNet
from experiments.train import TrainState

PyTree = Any


class Evaluation(NamedTuple):
    """Means over every example of a split."""

    accuracy: float  # fraction in [0, 1]
    loss: float  # cross-entropy in nats


@functools.partial(jax.jit, static_argnames="model")
def _sums(
    model: ConvNet, params: PyTree, batch_stats: PyTree, batch: EvalBatch
) -> tuple[jax.Array, jax.Array]:
    """Number of correct answers and summed loss of the batch's real rows."""
    variables = {"params": params, "batch_stats": batch_stats}
    logits = jnp.asarray(model.apply(variables, batch["images"], train=False))
    labels, mask = batch["labels"], batch["mask"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = (jnp.argmax(logits, axis=-1) == labels) & mask
    return jnp.sum(correct), jnp.sum(jnp.where(mask, losses, 0.0))


def evaluate(
    model: ConvNet, params: PyTree, batch_stats: PyTree, batches: Sequence[EvalBatch]
) -> Evaluation:
    """Score a network on all examples of `batches`, each counted once.

    Raises:
        ValueError: The batches hold no example.
    """
    count = sum(int(np.sum(batch["mask"])) for batch in batches)
    if count == 0:
        raise ValueError("batches hold no example; evaluation needs at least one.")
    sums = [_sums(model, params, batch_stats, batch) for batch in batches]
    corrects, losses = zip(*jax.device_get(sums), strict=True)
    return Evaluation(int(sum(corrects)) / count, math.fsum(losses) / count)


@functools.cache  # one function object per model, so that it is compiled once
def make_batch_stats_fn(
    model: ConvNet,
) -> Callable[[PyTree, PyTree, jax.Array], PyTree]:
    """The forward pass that `swa_jax.recompute_batch_stats` repeats."""

    def batch_stats_fn(
        params: PyTree, batch_stats: PyTree, images: jax.Array
    ) -> PyTree:
        variables = {"params": params, "batch_stats": batch_stats}
        _, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return updated["batch_stats"]

    return batch_stats_fn


def averaged_network(
    model: ConvNet, state: TrainState, image_batches: Sequence[np.ndarray] | None
) -> tuple[PyTree, PyTree]:
    """The averaged weights, and BatchNorm statistics that belong to them.

    Args:
        model: The network.
        state: Of an SWA arm.
        image_batches: Every training image once, not augmented. None leaves the
            BatchNorm pass out: the statistics stay those of the last iterate.

    Returns:
        Parameters and batch_stats.
    """
    params = swa_jax.swa_params(state.opt_state, state.params)
    if image_batches is None:
        return params, state.batch_stats
    batch_stats = swa_jax.recompute_batch_stats(
        make_batch_stats_fn(model), params, state.batch_stats, image_batches
    )
    return params, batch_stats
