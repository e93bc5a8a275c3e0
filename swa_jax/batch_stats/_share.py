"""What a batch did to each running statistic, read from the model's outputs alone.

A running statistic is affine in its old value and in nothing else,

    new = a * old + share * batch,        share = 1 - a,

so the forward pass is run from several old values at once (see ``_forward``): from 0,
from a power of two so far above the statistics that the batch's term rounds away, from
the values the statistics have, and from values of the statistics' own size in some
places and 0 in the others. The first gives ``share * batch``, the second ``a``, all
the others show whether the formula holds: the leaf is affine, and where it stays at 0
nothing that moves elsewhere is seen in it. All of this is NumPy in float64: exact.

From ``a`` to ``share`` is the delicate step, for ``a`` has been rounded to the
statistic's dtype and ``share`` has not. A momentum is written as a short decimal, as
1 - 2**-k or as 1 - 1/n, and those are recognised; else ``1 - a`` is taken if the
rounding leaves it good enough, and refused if not.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

#: Old values that the model is run from; the coded ones follow.
ZERO, FAR, OWN, CODED = 0, 1, 2, 3
#: Roundings, in units of the dtype's epsilon, that a computed line may be off.
ROUNDINGS = 16
#: How many numbers of a family may lie as close to ``a`` by chance.
_CHANCE = 0.1


class Segments(NamedTuple):
    """Where each leaf lies in one long vector of all their elements."""

    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, lengths: list[int]) -> "Segments":
        """Lays leaves of these many elements, none of them 0, end to end."""
        counts = np.asarray(lengths, int)
        return cls(starts=np.cumsum(counts) - counts, lengths=counts)

    def least(self, x: np.ndarray) -> np.ndarray:
        """The smallest element of each leaf, along the last axis."""
        return np.minimum.reduceat(x, self.starts, axis=-1)

    def largest(self, x: np.ndarray) -> np.ndarray:
        """The largest element of each leaf, along the last axis."""
        return np.maximum.reduceat(x, self.starts, axis=-1)

    def spread(self, x: np.ndarray) -> np.ndarray:
        """A value a leaf, given to each of its elements."""
        return np.repeat(x, self.lengths)

    def slice(self, leaf: int) -> slice:
        """The place of one leaf."""
        return slice(self.starts[leaf], self.starts[leaf] + self.lengths[leaf])


def places(mask: np.ndarray) -> list[int]:
    """Where a vector is true."""
    return np.flatnonzero(mask).tolist()


class Momenta(NamedTuple):
    """What two runs, from 0 and from far above, tell about each leaf."""

    old: np.ndarray  # a, shape (leaves,)
    constant: np.ndarray  # bool: one and the same for all elements, from 0 to 1
    idle: np.ndarray  # bool: as if the batch did not pass through the layer


def read_momenta(
    zero: np.ndarray, far: np.ndarray, start: np.ndarray, eps: np.ndarray, at: Segments
) -> Momenta:
    """Reads ``a`` of each leaf.

    Args:
      zero: elements of all leaves, run from old value 0.
      far: the same, run from ``start``.
      start: a power of two for each element.
      eps: spacing of floats at 1 in each leaf's dtype, shape (leaves,).
      at: where the leaves lie.
    """
    slope = (far - zero) / start
    low, high = at.least(slope), at.largest(slope)
    constant = high - low <= ROUNDINGS * eps
    old = high.copy()
    # The batch's term rounds away first where it is smallest.
    for leaf in places(low != high):
        part = at.slice(leaf)
        old[leaf] = slope[part][np.argmin(np.abs(zero[part]))]
    adds = (high >= 1) & (at.largest(np.abs(zero)) > 0)
    return Momenta(
        old=np.clip(old, 0.0, 1.0),
        constant=constant & (low >= -ROUNDINGS * eps) & (high <= 1) & ~adds,
        idle=at.least((far == start) & (zero == 0)),
    )


class Check(NamedTuple):
    """Whether the formula holds for each leaf, as far as can be seen."""

    finite: np.ndarray  # bool, shape (leaves,): the batch's term is a number
    affine: np.ndarray  # bool: on the line where the leaf itself moves
    alone: np.ndarray  # bool: where it stays at 0, it does not move with others
    seen: np.ndarray  # bool, shape (old values, leaves): where it did move with others


def check_rows(
    out: np.ndarray, rows: np.ndarray, momenta: Momenta, eps: np.ndarray, at: Segments
) -> Check:
    """Compares every run with ``a * old`` added to the run from 0.

    Args:
      out: what came out, shape (old values, elements).
      rows: the old values, of the same shape.
      momenta: ``a`` of each leaf.
      eps: spacing of floats at 1 in each leaf's dtype, shape (leaves,).
      at: where the leaves lie.
    """
    zero = out[ZERO]
    off = np.abs(out - zero - at.spread(momenta.old) * rows)
    size = np.abs(out) + np.abs(zero) + np.abs(rows)
    line = ROUNDINGS * at.spread(eps) * size
    # Next to a batch's term alone much less is seen than next to an old value: this is
    # what tells a layer of momentum 0.9999 that follows another from one that does not.
    noise = 2 * np.minimum(eps, np.finfo(np.float32).eps) * at.largest(np.abs(zero))
    still = at.spread(precision(eps)) / 4 * np.abs(zero) + at.spread(noise)
    moved = rows != 0
    bad = ~(off <= np.where(moved, line, still))  # NaN is bad
    bad[ZERO] = bad[FAR] = False
    bad &= np.isfinite(rows)  # an old statistic may be anything
    seen = at.largest(bad & ~moved)
    return Check(
        finite=at.least(np.isfinite(zero)),
        affine=np.logical_not(at.largest(np.any(bad & moved, axis=0))),
        alone=np.logical_not(np.any(seen, axis=0)),
        seen=seen,
    )


def precision(eps: Any) -> Any:
    """How exact a share must be, relative to itself, for statistics of this dtype."""
    return np.select([eps < 1e-12, eps < 1e-6], [1e-9, 1e-5], 1e-3)


def share(old: float, dtype: Any, wider: Any) -> float | None:
    """``1 - a`` from an ``a`` that was rounded; ``None`` if it cannot be told.

    Args:
      old: ``a``, from 0 to 1.
      dtype: the statistic's dtype.
      wider: the dtype that the model computed it in, ``dtype`` or a wider one. If
        ``a`` fits in ``dtype`` all the same, it may have been rounded there.
    """
    narrow = old == float(np.asarray(old).astype(dtype))
    info = jnp.finfo(dtype if narrow else wider)
    if old == 1:
        return None
    # Of floats at `a`, and of 1 - (1 - a) for a smaller one: a rounding of 1.
    spacing = float(info.eps) * 2.0 ** (math.floor(math.log2(max(old, 0.5))))
    candidates = [*_decimal(old, spacing), *_simple(old, spacing)]
    exact = precision(float(info.eps))
    if candidates:
        agree = max(candidates) <= min(candidates) * (1 + exact)
        return candidates[0] if agree else None
    return 1 - old if spacing / 2 <= exact * (1 - old) else None


def _decimal(old: float, spacing: float) -> list[float]:
    """``1 - a`` if a short decimal rounds to ``a``, such as 0.99."""
    for digits in range(1, 17):
        if 10.0**digits * spacing > _CHANCE:
            break
        decimal = round(old, digits)
        if abs(decimal - old) <= 0.51 * spacing:
            return [round(1 - decimal, digits)] if decimal < 1 else []
    return []


def _simple(old: float, spacing: float) -> list[float]:
    """``1 - a`` if a power of two, or the inverse of a whole number, rounds to it."""
    left = 1 - old
    power = 2.0 ** round(math.log2(left))
    inverse = 1 / round(1 / left)
    found = []
    if abs(power - left) <= 0.01 * spacing and spacing / left <= _CHANCE:
        found.append(power)
    if abs(inverse - left) <= 0.51 * spacing and spacing / left**2 <= _CHANCE:
        found.append(inverse)
    return found
