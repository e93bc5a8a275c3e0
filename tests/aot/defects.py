"""Averaging written the obvious, wasteful ways: what the checks must catch.

Each takes the place of ``swa_jax.swa``, keeps the same state and computes a mean
(``lagging`` that of the weights one step earlier). They differ in what XLA makes of
them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import swa_jax

_PERIOD = 10
#: New mean of a state, of the parameters and their updates, and whether to sample.
_Average = Callable[[swa_jax.SWAState, Any, Any, jax.Array], Any]


def _transformation(average: _Average) -> optax.GradientTransformation:
    def update_fn(updates: Any, state: swa_jax.SWAState, params: Any = None) -> Any:
        t = state.num_updates + 1
        sample = t % _PERIOD == 0
        return updates, swa_jax.SWAState(
            num_updates=t,
            num_averaged=state.num_averaged + sample,
            avg_params=average(state, params, updates, sample),
        )

    return optax.GradientTransformation(swa_jax.init_average, update_fn)


def _advance(state: swa_jax.SWAState, params: Any) -> Any:
    n = state.num_averaged
    return jax.tree.map(lambda m, q: m + (q - m) / (n + 1), state.avg_params, params)


def _branching(state: Any, params: Any, updates: Any, sample: jax.Array) -> Any:
    return jax.lax.cond(
        sample,
        lambda: _advance(state, optax.apply_updates(params, updates)),
        lambda: state.avg_params,
    )


def _concatenated(state: Any, params: Any, updates: Any, sample: jax.Array) -> Any:
    mean, unravel = ravel_pytree(state.avg_params)
    new, _ = ravel_pytree(optax.apply_updates(params, updates))
    return unravel(
        jnp.where(sample, mean + (new - mean) / (state.num_averaged + 1), mean)
    )


def _lagging(state: Any, params: Any, updates: Any, sample: jax.Array) -> Any:
    del updates
    new = _advance(state, params)
    return jax.tree.map(lambda a, b: jnp.where(sample, a, b), new, state.avg_params)


def _window(rows: int) -> optax.GradientTransformation:
    """``swa_jax.lawa``, whose row is written in a branch."""
    lawa = swa_jax.lawa(rows)

    def update_fn(updates: Any, state: swa_jax.LAWAState, params: Any = None) -> Any:
        t = state.num_updates + 1
        sample = t % _PERIOD == 0
        new = optax.apply_updates(params, updates)
        row = state.num_averaged % rows
        window = jax.lax.cond(
            sample,
            lambda: jax.tree.map(lambda x, q: x.at[row].set(q), state.window, new),
            lambda: state.window,
        )
        return updates, swa_jax.LAWAState(t, state.num_averaged + sample, window)

    return optax.GradientTransformation(lawa.init, update_fn)


#: A branch that captures the weights, instead of ``where``.
branching = _transformation(_branching)
#: A branch around a stack of models.
branching_window = _window(4)
#: One long vector, instead of leaf by leaf.
concatenated = _transformation(_concatenated)
#: The weights as received, instead of as updated.
lagging = _transformation(_lagging)
