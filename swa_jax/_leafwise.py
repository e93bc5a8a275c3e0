"""What an average keeps of one leaf, and how a newcomer enters.

All that happens to a leaf is elementwise, and selects with ``where`` instead of
branching: XLA then updates a donated average in place, whereas a branch that captures
the weights copies all of it. Means are kept in float32 when the weights are narrower,
because ``(q - mean) / n`` soon falls below the spacing of bfloat16.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from swa_jax._compensation import by_parts, next_pair
from swa_jax._placement._meeting import Words
from swa_jax._rules import Rule
from swa_jax._validate import is_averaged, mean_dtype

Scalars: TypeAlias = tuple[Array, ...]
#: Whether a model enters; ``None`` for yes.
Sample: TypeAlias = Array | None


class Buffer(NamedTuple):
    """An array that is kept of a leaf: of its shape, or a stack of such."""

    dtype: Any
    rows: int | None = None


Buffers: TypeAlias = tuple[Buffer, *tuple[Buffer | None, ...]]


class Kind(Protocol):
    """A way to keep models, compared by value."""

    def buffers(self, dtype: Any, accumulator_dtype: Any) -> Buffers:
        """What is kept of a leaf of ``dtype``; ``None`` for what is not."""

    def scalars(self, count: Array, dtype: DTypeLike) -> Scalars:
        """What all leaves computed in ``dtype`` share.

        Args:
          count: int32 scalar, the models averaged, the newcomer included.
          dtype: real, of 32 bits or 64.
        """

    def enter(
        self, words: Words, new: Array, scalars: Scalars, sample: Sample
    ) -> Words:
        """The newcomer's effect on one leaf, none where ``sample`` is false."""


@dataclasses.dataclass(frozen=True)
class Mean:
    """A running mean."""

    rule: Rule

    def buffers(self, dtype: Any, accumulator_dtype: Any) -> Buffers:
        """See ``Kind``."""
        return (Buffer(mean_dtype(dtype, accumulator_dtype)),)

    def scalars(self, count: Array, dtype: DTypeLike) -> Scalars:
        """Whether the newcomer replaces the mean, and by what its step is divided."""
        divisor = self.rule.divisor(count, dtype)
        return (count <= 1) | (divisor <= 1), divisor

    def enter(
        self, words: Words, new: Array, scalars: Scalars, sample: Sample
    ) -> Words:
        """See ``Kind``."""
        mean: Any = words[0]
        return (_select(sample, _next_mean(mean, new, *scalars), mean),)


@dataclasses.dataclass(frozen=True)
class CompensatedMean:
    """The equal mean in two words, see ``_compensation``."""

    def buffers(self, dtype: Any, accumulator_dtype: Any) -> Buffers:
        """See ``Kind``."""
        low = Buffer(mean_dtype(dtype, None)) if is_averaged(dtype) else None
        return Buffer(mean_dtype(dtype, accumulator_dtype)), low

    def scalars(self, count: Array, dtype: DTypeLike) -> Scalars:
        """Whether the newcomer is the first, and its number."""
        del dtype
        return count <= 1, count

    def enter(
        self, words: Words, new: Array, scalars: Scalars, sample: Sample
    ) -> Words:
        """See ``Kind``."""
        mean, low = words
        assert mean is not None
        if low is None:
            return _select(sample, _latest(mean, new), mean), None
        return next_pair(mean, low, jnp.asarray(new), *scalars, sample)


@dataclasses.dataclass(frozen=True)
class Window:
    """The latest models themselves, in the order of ``(n - 1) % size``."""

    size: int

    def buffers(self, dtype: Any, accumulator_dtype: Any) -> Buffers:
        """See ``Kind``."""
        asked = accumulator_dtype is not None
        kept = mean_dtype(dtype, accumulator_dtype) if asked else dtype
        return (Buffer(kept, self.size),)

    def scalars(self, count: Array, dtype: DTypeLike) -> Scalars:
        """The newcomer's row."""
        del dtype
        return ((count - 1) % self.size,)

    def enter(
        self, words: Words, new: Array, scalars: Scalars, sample: Sample
    ) -> Words:
        """See ``Kind``."""
        ring: Any = words[0]
        return (_write_row(ring, new, scalars[0], sample),)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """The equal mean, the sum of squares around it, and the latest deviations."""

    rank: int

    def buffers(self, dtype: Any, accumulator_dtype: Any) -> Buffers:
        """See ``Kind``."""
        kept = mean_dtype(dtype, accumulator_dtype)
        if not is_averaged(dtype):
            return Buffer(kept), None, None
        ring = Buffer(kept, self.rank) if self.rank else None
        return Buffer(kept), Buffer(kept), ring

    def scalars(self, count: Array, dtype: DTypeLike) -> Scalars:
        """Whether it is the first, its number, its row, and the weight of its square.

        Welford: ``(q - old mean) * (q - new mean)``, where the first deviation is
        ``n / (n - 1)`` times the second.
        """
        n = count.astype(dtype)
        return count <= 1, n, (count - 1) % max(self.rank, 1), n / jnp.maximum(n - 1, 1)

    def enter(
        self, words: Words, new: Array, scalars: Scalars, sample: Sample
    ) -> Words:
        """See ``Kind``."""
        mean, squares, ring = words
        first, n, row, weight = scalars
        assert mean is not None
        next_mean = _select(sample, _next_mean(mean, new, first, n), mean)
        if squares is None:
            return next_mean, None, None
        # Else XLA would compute all three from the old mean, and copy it.
        next_mean = jax.lax.optimization_barrier(next_mean)
        compute = mean_dtype(mean.dtype, None)
        off = jnp.asarray(new).astype(compute) - next_mean.astype(compute)
        added = by_parts(lambda x: x * x * weight, off)
        squared = jnp.where(first, 0, squares.astype(compute)) + added
        squares = _select(sample, squared.astype(squares.dtype), squares)
        if ring is not None:
            ring = _write_row(ring, off, row, sample)
        return next_mean, squares, ring


@functools.partial(jax.jit, inline=True)  # else with copies of the stack in between
def mean_of_rows(ring: Array, count: Array) -> Array:
    """The mean of the latest models in a stack, of ``count`` that ever entered.

    Args:
      ring: ``(*replicas, rows, *shape)``; without floats, the latest row is returned.
      count: int32, of shape ``replicas``, such as a leading axis under ``jax.pmap``.

    Returns:
      An array ``(*replicas, *shape)``, of float32 or wider.
    """
    if np.ndim(count):
        return jax.vmap(mean_of_rows)(ring, count)
    rows = ring.shape[0]
    if not is_averaged(ring.dtype):
        row = jnp.maximum(count - 1, 0) % rows
        return jax.lax.dynamic_index_in_dim(ring, row, keepdims=False)
    wide = ring.astype(mean_dtype(ring.dtype, None))
    # Around one of them: sums of small differences round less than those of weights.
    some, number = wide[0], jnp.minimum(count, rows)
    there = (jnp.arange(rows) < number).reshape(rows, *[1] * (ring.ndim - 1))
    total = jnp.sum(jnp.where(there, wide - some[None], 0), axis=0)
    return some + total / jnp.maximum(number, 1).astype(total.dtype)


def _next_mean(mean: Array, new: Array, replaces: Array, divisor: Array) -> Array:
    if not is_averaged(mean.dtype):
        return _latest(mean, new)
    # An accumulator narrower than float32 was asked for to save memory, not to
    # round in between as well: compute wider, round once.
    compute = mean_dtype(mean.dtype, None)
    old, new = mean.astype(compute), jnp.asarray(new).astype(compute)
    # The first model replaces the mean: old + (new - old) would round, and would
    # carry over a non-finite start.
    step = (new - old) / divisor.astype(compute)
    return jnp.where(replaces, new, old + step).astype(mean.dtype)


def _latest(kept: Array, new: Array) -> Array:
    """The newcomer as it is, in the dtype of what is kept."""
    if jnp.issubdtype(kept.dtype, jax.dtypes.extended):
        return new
    return jnp.asarray(new, kept.dtype)  # not weakly typed, as what is kept is not


def _select(sample: Sample, new: Array, old: Array) -> Array:
    return new if sample is None else jnp.where(sample, new, old)


def _write_row(ring: Array, new: Array, row: Array, sample: Sample) -> Array:
    """Writes one row of a stack in place, none where ``sample`` is false.

    No one way is in place for every compiler. Writing past the end, which drops the
    row, costs TPUs a temporary of up to the parameters' size; selecting between the new
    row and the old one, CPUs and GPUs. And for a scatter of 16 bits or fewer, XLA for
    CPUs copies the whole stack: there all rows are written, each with its own value.
    """

    def drop(ring: Array, new: Array) -> Array:
        past_the_end = ring.shape[0]
        index = row if sample is None else jnp.where(sample, row, past_the_end)
        return ring.at[index].set(_latest(ring, new), mode="drop")

    def blend(ring: Array, new: Array) -> Array:
        new = _latest(ring, new)
        if sample is not None:
            old = jax.lax.dynamic_index_in_dim(ring, row, keepdims=False)
            new = jnp.where(sample, new, old)
        return jax.lax.dynamic_update_index_in_dim(ring, new, row, 0)

    def rewrite(ring: Array, new: Array) -> Array:
        shape = (ring.shape[0],) + (1,) * new.ndim
        rows = jax.lax.broadcasted_iota(row.dtype, shape, 0)
        here = rows == row if sample is None else (rows == row) & sample
        # Selected twice, or XLA would store the rounded newcomer first.
        rounded = jnp.where(here, new[None], jnp.zeros_like(new)).astype(ring.dtype)
        return jnp.where(here, rounded, ring)

    if jnp.issubdtype(ring.dtype, jax.dtypes.extended):
        return drop(ring, new)
    narrow = jnp.issubdtype(ring.dtype, jnp.floating) and ring.dtype.itemsize < 4
    return jax.lax.platform_dependent(
        ring, new, cpu=rewrite if narrow else drop, tpu=blend, default=drop
    )
