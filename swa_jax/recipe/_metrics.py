"""What is measured of weights on their way into the average."""

from typing import Any

import jax
import jax.numpy as jnp

from swa_jax._diagnostics import distance
from swa_jax._placement import beside
from swa_jax._validate import known
from swa_jax.averages.swa import SWAState
from swa_jax.recipe._state import AnyTrainingState
from swa_jax.schedules import scalar_arithmetic
from swa_jax.typing import PyTree


@scalar_arithmetic()
def equal(tree: PyTree, other: PyTree) -> bool:
    """Whether no weight has moved: not by a norm, in which small steps vanish."""
    return bool(known(_equal_leaves(tree, other)))


def metrics(state: AnyTrainingState) -> dict[str, float]:
    """What the logger gets."""
    average: SWAState = state.swa.average  # type: ignore[union-attr]
    return {
        "swa/num_averaged": float(known(average.num_averaged)),
        "swa/learning_rate": float(known(state.learning_rate)),
        "swa/distance": float(known(_distance(average, state.params))),
    }


def _distance(average: SWAState, params: PyTree) -> jax.Array:
    # Where the weights are: the mean may be spread, or in host memory.
    return distance(jax.tree.map(beside, average.avg_params, params), params)


@jax.jit
def _equal_leaves(tree: PyTree, other: PyTree) -> jax.Array:
    same = jnp.array(True)
    for x, y in _floating_pairs(tree, other):
        same &= jnp.all((x == y) | (jnp.isnan(x) & jnp.isnan(y)))
    return same


def _floating_pairs(tree: PyTree, other: PyTree) -> list[tuple[Any, Any]]:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return [(x, y) for x, y in pairs if jnp.issubdtype(x.dtype, jnp.inexact)]
