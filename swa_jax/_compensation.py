"""A running mean in two words: what one float32 cannot hold, a second one carries.

The mean of many models is one long sum, and a float32 sum stops to follow: near 1, a
step below 2**-25 is lost, and with 10**6 models most steps are. So the exact mean is
kept as ``mean + low``, where ``mean`` is what readers see and ``low`` is below its last
place. A step ``s = (q - mean) / n`` enters as

    b + e  = mean + s            exactly (Knuth's two-sum),
    low   <- e + low - G j       with j = floor((e + low) / G + 1/2),
    mean  <- b + G j.

``G``, a power of two, is the spacing of floating point numbers at ``b``. (That ``s``
leaves ``low`` out adds the mean of all ``low`` to the result: less than half a last
place.)

The difficulty is to do it in place. Both words need both old words, so whichever is
written first is missing for the other, and a compiler without fusions of several
results, such as XLA's for CPUs, then copies the whole average. But here ``mean`` can
be had from the *new* ``low``: since

    (e - low_new) / G  =  j - low_old / G    and    -G/2 <= low_old < G/2,

the left side, less 1/2 and rounded up, is j. Hence ``low`` is written first, in place,
then ``mean``, in place. The inequality fails where ``G`` has just halved, as ``mean``
fell below a power of two; there ``2 G`` is used, and the lowest bit of ``low`` says so.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@jax.custom_jvp
def next_pair(
    mean: jax.Array,
    low: jax.Array,
    new: jax.Array,
    first: jax.Array,
    count: jax.Array,
    sample: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """One step of the mean and of what it leaves over.

    Args:
      mean: the mean, of a floating or complex dtype, rounded.
      low: the exact mean less ``mean``; at least as wide as ``mean`` and float32.
      new: the newcomer, of any dtype that casts to ``low``'s.
      first: bool scalar, whether the newcomer is the first and replaces the mean.
      count: integer scalar, the models in the mean, the newcomer included.
      sample: bool scalar, whether to average; ``None`` means yes.

    Returns:
      The new mean and what it leaves over. Differentiable, as the plain mean is.
    """
    dtype = jnp.finfo(mean.dtype).dtype
    wide, new = mean.astype(low.dtype), new.astype(low.dtype)
    divisor = count.astype(jnp.finfo(low.dtype).dtype)

    def write_low(mean: jax.Array, low: jax.Array, new: jax.Array) -> jax.Array:
        b, e, spacing = _step(mean, new, divisor, dtype)
        doubled = (low < -spacing / 2) | (low >= spacing / 2)
        spacing = jnp.where(doubled, 2 * spacing, spacing)
        b, e = _onto(spacing, b, e)
        left = e + low
        left = left - spacing * jnp.floor(left / spacing + 0.5)
        left = jnp.where(first, 0, left)
        return _with_flag(left, doubled & ~first)

    def write_mean(mean: jax.Array, low: jax.Array, new: jax.Array) -> jax.Array:
        b, e, spacing = _step(mean, new, divisor, dtype)
        spacing = jnp.where(_flag(low), 2 * spacing, spacing)
        b, e = _onto(spacing, b, e)
        steps = jnp.ceil((e - low) / spacing - 0.5)
        return jnp.where(first, new, b + spacing * steps)

    new_low = by_parts(write_low, wide, low, new)
    new_low = new_low if sample is None else jnp.where(sample, new_low, low)
    # Else XLA would compute both words from intermediate results, which it stores.
    new_low, mean = jax.lax.optimization_barrier((new_low, mean))
    new_mean = by_parts(write_mean, mean.astype(low.dtype), new_low, new)
    new_mean = new_mean.astype(mean.dtype)
    return new_mean if sample is None else jnp.where(sample, new_mean, mean), new_low


@next_pair.defjvp
def _next_pair_jvp(primals: Any, tangents: Any) -> Any:
    mean, low, _, first, count, sample = primals
    mean_dot, _, new_dot, *_ = tangents
    step = (new_dot.astype(low.dtype) - mean_dot) / count.astype(low.dtype)
    dot = jnp.where(first, new_dot, mean_dot + step).astype(mean.dtype)
    dot = dot if sample is None else jnp.where(sample, dot, mean_dot)
    return next_pair(*primals), (dot, jnp.zeros_like(low))


def _step(
    mean: jax.Array, new: jax.Array, divisor: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The mean one step on, rounded, its exact error, and the spacing there."""
    step = (new - mean) / divisor
    b = mean + step
    part = b - mean
    e = (mean - (b - part)) + (step - part)
    narrow, own = jnp.finfo(dtype), jnp.finfo(b.dtype)
    mantissa = own.nmant
    scaled = _bits(jnp.abs(b) * 2.0**-narrow.nmant)
    power = _floats(scaled >> mantissa << mantissa, b.dtype)
    least = max(float(own.tiny), float(narrow.smallest_subnormal))
    return b, e, jnp.maximum(power, least)


def _onto(spacing: jax.Array, b: jax.Array, e: jax.Array) -> tuple[Any, Any]:
    """``b + e`` with ``b`` a multiple of the spacing."""
    multiple = spacing * jnp.round(b / spacing)
    return multiple, (b - multiple) + e


def _with_flag(x: jax.Array, flag: jax.Array) -> jax.Array:
    # A choice between two arrays: XLA for CPUs, which drops barriers before it fuses,
    # would compute a function of one array a second time for the mean.
    cleared = _bits(x) >> 1 << 1
    return jnp.where(flag, _floats(cleared | 1, x.dtype), _floats(cleared, x.dtype))


def _flag(x: jax.Array) -> jax.Array:
    return _bits(x) & 1 == 1


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _floats(bits: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, dtype)


def by_parts(f: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """``f`` of real and imaginary parts, which are numbers of their own."""
    if not jnp.iscomplexobj(arrays[0]):
        return f(*arrays)
    return jax.lax.complex(f(*(x.real for x in arrays)), f(*(x.imag for x in arrays)))
