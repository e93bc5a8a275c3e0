"""What an average is made of, and how far it is from the weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from swa_jax._finding import average_state
from swa_jax._leafwise import Window
from swa_jax._loop import plan_of
from swa_jax._reading import averaged_params
from swa_jax._validate import check_count, is_averaged, leaf_dtype, mean_dtype
from swa_jax.averages.lawa import LAWAState
from swa_jax.typing import PyTree, Which


def average_distance(
    opt_state: PyTree, params: PyTree, which: Which = None
) -> jax.Array:
    """The Euclidean distance between an average and the weights.

    Over all floating leaves, complex ones included, computed in float32 or wider.
    Leaves that are hidden from the average add nothing.

    Args:
      opt_state: optimizer state, or an average's own, see ``swa_state``.
      params: the current parameters.
      which: one of several averages, see ``average_state``.

    Returns:
      A float scalar; 0 while nothing has been averaged. Under ``jax.pmap``, call it
      inside.

    Raises:
      ValueError: see ``averaged_params``.
      TypeError: see ``averaged_params``.

    Example:
      >>> import jax.numpy as jnp, swa_jax
      >>> state = swa_jax.init_average(jnp.zeros(2))
      >>> state = swa_jax.update_average(state, jnp.ones(2))
      >>> print(swa_jax.average_distance(state, jnp.array([4.0, 5.0])))
      5.0
    """
    average = averaged_params(opt_state, params, which, allow_empty=True)
    pairs = zip(jax.tree.leaves(average), jax.tree.leaves(params), strict=True)
    averaged = [(x, y) for x, y in pairs if x is not y]  # functions are passed by
    return distance([x for x, _ in averaged], [y for _, y in averaged])


def models_in_average(opt_state: PyTree, which: Which = None) -> jax.Array:
    """How many models an average is of.

    Args:
      opt_state: optimizer state, or an average's own, see ``swa_state``.
      which: one of several averages, see ``average_state``.

    Returns:
      An int32 array of the counters' shape: ``num_averaged``, for ``lawa`` at most its
      window. How many of them count for much is ``effective_window``.

    Raises:
      ValueError: see ``average_state``.
      TypeError: see ``average_state``.

    Example:
      >>> import jax.numpy as jnp, swa_jax
      >>> average = swa_jax.lawa(2)
      >>> state = swa_jax.init_average(jnp.zeros(2), average)
      >>> for _ in range(3):
      ...     state = swa_jax.update_average(state, jnp.zeros(2), average)
      >>> print(swa_jax.models_in_average(state))
      2
    """
    state = average_state(opt_state, which)
    count = jnp.asarray(state.num_averaged)
    if not isinstance(state, LAWAState):
        return count
    rings = jax.tree.leaves(state.window)
    return jnp.minimum(count, rings[0].shape[count.ndim]) if rings else count


def averaging_weights(
    average: optax.GradientTransformationExtraArgs, n: int
) -> np.ndarray:
    """What each of n sampled models counts for in an average.

    Args:
      average: a transformation, such as ``swa_jax.ema(0.999)``.
      n: models averaged, >= 1.

    Returns:
      Weights, float64 of shape (n,), the oldest model first; their sum is 1.

    Raises:
      ValueError: ``n < 1``.
      TypeError: ``average`` is none of swa_jax's, or ``n`` is no integer.

    Example:
      >>> import swa_jax
      >>> print(swa_jax.averaging_weights(swa_jax.ema(0.5), 3) * 7)
      [1. 2. 4.]
    """
    kind = plan_of(average, "averaging_weights").kind
    check_count("n", n, hint="it is a number of models")
    if isinstance(kind, Window):
        count = min(n, kind.size)
        return np.where(np.arange(n) < n - count, 0.0, 1 / count)
    rule: Any = getattr(kind, "rule", None)
    if rule is None:  # of the equal mean
        return np.full(n, 1 / n)
    rates = 1 / rule.divisor(np.arange(1, n + 1, dtype=np.int32), np.float64)
    rates = np.clip(np.asarray(rates, np.float64) * np.ones(n), 0, 1)
    rates[0] = 1
    kept = np.append(np.cumprod((1 - rates[1:])[::-1])[::-1], 1.0)
    return rates * kept


def effective_window(average: optax.GradientTransformationExtraArgs, n: int) -> float:
    """How many models, all alike, an average of n is as good as.

    ``sum(w)**2 / sum(w**2)`` of its weights: noise that is independent from model to
    model has a variance so many times smaller in the average. ``swa`` has n, ``ema``
    tends to ``(1 + decay) / (1 - decay)``, ``lawa`` has its window.

    Args:
      average: see ``averaging_weights``.
      n: models averaged, >= 1.

    Returns:
      The number, from 1 to ``n``.

    Raises:
      ValueError: see ``averaging_weights``.
      TypeError: see ``averaging_weights``.

    Example:
      >>> import swa_jax
      >>> print(round(swa_jax.effective_window(swa_jax.ema(0.999), 10**5)))
      1999
    """
    weights = averaging_weights(average, n)
    return float(weights.sum() ** 2 / (weights**2).sum())


@jax.jit
def distance(tree: PyTree, other: PyTree) -> jax.Array:
    """Euclidean, over all floating leaves."""
    total = jnp.zeros([])
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        if is_averaged(leaf_dtype(x)):
            compute = mean_dtype(leaf_dtype(x), None)
            apart = jnp.abs(jnp.asarray(x, compute) - jnp.asarray(y, compute))
            square = jnp.sum(apart**2)
            total += jnp.asarray(square, total.dtype)
    return jnp.sqrt(total)
