"""Drawing weights from the Gaussian that an optimizer state holds."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from swa_jax._compensation import by_parts
from swa_jax._leafwise import Words
from swa_jax._placement import as_array, beside, follow, in_device_memory
from swa_jax._reading import as_params, found_for
from swa_jax._states import words_of
from swa_jax._validate import check_number, mean_dtype, shown
from swa_jax.averages.swag import SWAGState
from swa_jax.typing import PyTree, TreeT, Which


def swag_sample(
    key: jax.Array,
    opt_state: PyTree,
    params: TreeT,
    *,
    scale: float | jax.Array = 1.0,
    which: Which = None,
) -> TreeT:
    """Draws weights from ``swag``'s Gaussian, ready for use in place of ``params``.

    With K the deviations collected (at most ``rank``), D their columns, and standard
    normal z1 (one for each weight) and z2 (K of them, for the whole model)::

        q = mean + sqrt(scale / 2) * (sqrt(variance) * z1 + D @ z2 / sqrt(K - 1))

    so that the covariance is ``scale`` times the mean of the diagonal and the low-rank
    one. With fewer than two deviations the diagonal stands alone, and is not halved.
    Average predictions over several samples, and recompute the statistics of batch
    normalisation for each.

    Works inside ``jax.jit`` and outside. Replicas that lie along a leading axis, as
    under ``jax.pmap``, get the same sample.

    Args:
      key: PRNG key, of ``jax.random.key`` or ``jax.random.PRNGKey``.
      opt_state: optimizer state with a ``SWAGState`` in it, or that state.
      params: the current parameters, see ``swa_params``.
      scale: of the covariance, >= 0; 1 is the paper. The authors' code doubles it: its
        ``scale=0.5``, of the paper's experiments, is 1 here, and its default, 1, is 2.
      which: the name of one of several, see ``average_state``.

    Returns:
      A pytree like ``params``. Leaves that are not floating are as averaged last.

    Raises:
      ValueError: ``scale`` is negative; see ``averaged_params`` for the rest.
      TypeError: ``key`` is no PRNG key, or ``which`` names another average.

    Warns:
      UserWarning: nothing has been averaged, so that the result is ``params``.

    Example:
      See ``swag``.

    References:
      Maddox et al., NeurIPS 2019, https://arxiv.org/abs/1902.02476, equation 1.
    """
    key = _checked_key(key)
    scale = check_number("scale", scale, 0, math.inf, traced=True)
    which = SWAGState if which is None else which
    state = found_for("swag_sample", opt_state, params, which)
    if not isinstance(state, SWAGState):
        raise TypeError(
            f"swag_sample: which={shown(which)} is a {type(state).__name__}, but only "
            "a SWAGState, of swag(), knows how models spread"
        )
    shared, *own = jax.random.split(key, 1 + len(words_of(state)))
    draw = _draw
    for _ in range(np.ndim(state.num_averaged)):
        draw = jax.vmap(draw, (None, None, 0, None, 0))
    words = []
    for one, word in zip(own, words_of(state), strict=True):
        word = jax.tree.map(in_device_memory, word)
        near = functools.partial(follow, other=word[0])
        scalars = map(near, (shared, one, state.num_averaged, as_array(scale)))
        words.append(draw(*scalars, word))
    treedef: Any = jax.tree.structure(state.avg_params)
    return as_params("swag_sample", state, treedef.unflatten(words), params, False)


def _checked_key(key: Any) -> jax.Array:
    if isinstance(key, jax.Array | np.ndarray):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and not key.shape:
            return key  # type: ignore[return-value]
        if key.dtype == np.uint32 and key.ndim == 1:
            return jax.random.wrap_key_data(jnp.asarray(key))
    raise TypeError(
        f"swag_sample: key must be one PRNG key, got {shown(key)}; pass "
        "jax.random.key(seed), the optimizer state comes second"
    )


@jax.jit
def _draw(
    shared: jax.Array, own: jax.Array, count: jax.Array, scale: jax.Array, words: Words
) -> jax.Array:
    """One leaf."""
    mean, squares, deviations = words
    if squares is None:
        return mean
    compute = mean_dtype(mean.dtype, None)
    real = jnp.finfo(compute).dtype
    if deviations is None:
        deviations = mean[None][:0]
    rank = deviations.shape[0]
    columns = jnp.minimum(count, rank)
    z2 = jax.random.normal(shared, (rank,), jnp.result_type(float)).astype(real)
    z2 = jnp.where(jnp.arange(rank) < columns, z2, 0)
    z2 = z2 / jnp.sqrt(jnp.maximum(columns - 1, 1).astype(real))
    both = columns >= 2
    n = jnp.maximum(count, 1).astype(real)
    factor = jnp.sqrt(scale.astype(real) * jnp.where(both, 0.5, 1.0).astype(real))

    def part(
        key: jax.Array, mean: jax.Array, squares: jax.Array, deviations: jax.Array
    ) -> jax.Array:
        z1 = beside(jax.random.normal(key, mean.shape, real), mean)
        along = z2.reshape(rank, *[1] * mean.ndim)
        # Rows that no model has reached may hold anything.
        low = jnp.sum(jnp.where(along != 0, along * deviations, 0), axis=0)
        spread = jnp.sqrt(squares / n) * z1 + jnp.where(both, low, 0)
        return mean + factor * spread

    wide = [x.astype(compute) for x in (mean, squares, deviations)]
    if not jnp.iscomplexobj(mean):
        return part(own, *wide)
    keys = iter(jax.random.split(own))
    return by_parts(lambda *x: part(next(keys), *x), *wide)
