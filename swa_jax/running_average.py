"""Recovering the momentum of a running average from its outputs alone.

A running statistic is affine in its old value,

    new = a * old + (1 - a) * batch,

so its values from old = 0 and old = c give ``a``, and ``new(0) / (1 - a)`` is the
batch's own statistic. A third old value between them tells whether it is affine.

Choice of c: ``a = (new(c) - new(0)) / c`` is rounded to about the spacing of floats at
``a``, times ``1 + new(0) / (a * c)``. The second factor must be near 1, or ``1 - a``, a
hundredth say, is lost to cancellation: with c = 1 and variances of pixels (10**3) it
is. So c is a power of two (products with it are exact) so far above ``new(0)`` that
adding ``new(0)`` to ``a * c`` rounds to nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

#: The third old value, as a fraction of c; exact in every floating dtype.
LINE_POINT = 0.75
#: Roundings, in units of the dtype's epsilon, that a computed line may be off.
_TOLERANCE = 16


def far_above(x: jax.Array) -> jax.Array:
    """A power of two, of the dtype of ``x``, next to which ``x`` rounds away."""
    info = jnp.finfo(x.dtype)
    _, exponent = jnp.frexp(jnp.max(jnp.abs(x)).astype(wide(x.dtype)))
    exponent = jnp.minimum(exponent + info.nmant + 3, info.maxexp - 2)
    return jnp.ldexp(jnp.ones([], wide(x.dtype)), exponent).astype(x.dtype)


def probe_row(
    at_zero: jax.Array,
    at_scale: jax.Array,
    between: jax.Array,
    scale: jax.Array,
    *,
    axis_name: str | None,
) -> jax.Array:
    """Sums up a leaf's probes in four scalars, so that one small array is fetched.

    Args:
      at_zero: the leaf computed from old value 0.
      at_scale: from ``scale``.
      between: from ``LINE_POINT * scale``.
      scale: ``far_above(at_zero)``.
      axis_name: a mapped axis to take the extremes over.

    Returns:
      float32, shape (4,): the smallest and the largest ``a`` among the elements, the
      largest magnitude of ``at_zero``, and how far ``between`` is off the line through
      the other two, in roundings.
    """
    epsilon = jnp.finfo(at_zero.dtype).eps
    at_zero, at_scale, between, scale = (
        x.astype(wide(x.dtype)) for x in (at_zero, at_scale, between, scale)
    )
    momentum = (at_scale - at_zero) / scale
    error = jnp.abs(between - (LINE_POINT * scale * momentum + at_zero))
    rounding = epsilon * (jnp.abs(at_scale) + jnp.abs(at_zero))
    off = jnp.max(error / jnp.maximum(rounding, jnp.finfo(rounding.dtype).tiny))
    largest = jnp.max(jnp.abs(at_zero))
    row = jnp.stack([-jnp.min(momentum), jnp.max(momentum), largest, off])
    row = row.astype(jnp.float32)
    if axis_name is not None:
        row = jax.lax.pmax(row, axis_name)
    return row * jnp.array([-1.0, 1.0, 1.0, 1.0], jnp.float32)


def batch_share(row: np.ndarray, dtype: Any, name: str) -> float:
    """``1 - a`` from a leaf's ``probe_row``; 0 for a leaf that keeps its old value.

    Raises:
      ValueError: the leaf, called ``name``, is not finite or no running average.
    """
    low, high, largest, off = (float(x) for x in row)
    if not np.isfinite(row).all():
        raise ValueError(
            f"batch_stats_fn: {name} is not finite after the first batch; check "
            "params and the batch for NaN and infinity"
        )
    spread = _TOLERANCE * float(jnp.finfo(dtype).eps)
    constant = -spread <= low and high - low <= spread
    adds_to_all = high == 1 and largest > 0
    if off > _TOLERANCE or not constant or high > 1 or adds_to_all:
        raise ValueError(
            f"batch_stats_fn: {name} is not a running average, new = a * old + (1 - a) "
            f"* batch with one a, 0 <= a < 1 (probing gave a from {low:.6g} to "
            f"{high:.6g}, {off:.3g} roundings off a straight line); statistics of "
            "another form cannot be recomputed from the forward pass alone"
        )
    return 1 - _shortest_decimal(high, dtype)


def _shortest_decimal(value: float, dtype: Any) -> float:
    """The shortest decimal that is ``value`` in ``dtype``.

    A momentum is written as one, 0.99 say, and the model rounds 0.99 and 1 - 0.99 to
    its dtype separately. Going back to the decimal avoids ``1 - a`` in the dtype, whose
    cancellation costs up to two digits.
    """
    for digits in range(1, 17):
        if np.asarray(round(value, digits), dtype) == np.asarray(value, dtype):
            return round(value, digits)
    return value


def wide(dtype: Any) -> Any:
    """The dtype to compute moments in: float32 for anything narrower."""
    return jnp.promote_types(dtype, jnp.float32)
