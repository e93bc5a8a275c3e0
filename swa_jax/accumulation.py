"""One step of the mean, traced into whatever computation it is part of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Sharding

from swa_jax.checks import is_averaged, leaf_dtype, mean_dtype
from swa_jax.compensation import next_pair
from swa_jax.placement import (
    PyTree,
    Targets,
    beside,
    bring,
    follow,
    is_hosted,
    on_device,
    place,
    to_device,
    to_host,
)
from swa_jax.state import State, Words, with_counters, with_words, words_of

#: Leaves of an average in host memory that may be on the device before the first of
#: them is back. Left alone, XLA brings over all: as if the average had never left.
_IN_FLIGHT = 2

# Compiled also where the caller is not: the constants within are then no transfers
# from the host. Inside a trace such functions leave no mark.
inlined = functools.partial(jax.jit, inline=True)


def accumulate(
    state: State,
    params: PyTree,
    sample: jax.Array | None = None,
    *,
    targets: Targets | None = None,
) -> State:
    """One step of the mean, to be traced into a larger computation.

    Args:
      state: the state before; its ``num_updates`` is passed through.
      params: the newcomer ``q``, structured like ``state.avg_params``.
      sample: bool scalar, whether to average; ``None`` means yes. Where it is false
        every leaf keeps its bits.
      targets: where each leaf of the mean lives, from ``placement.resolve``; by
        default beside the parameters.

    Returns:
      The state after.
    """
    # Once, not for each of hundreds of leaves: it shows in the time to compile.
    first, count = _count(state.num_averaged)
    landed: list[jax.Array] = []  # new means that are back in host memory

    def advance(words: Words, new: jax.Array, target: Sharding | None) -> Words:
        hosted = is_hosted(words[0])  # also where no target says so
        if hosted and len(landed) >= _IN_FLIGHT:
            words, _ = jax.lax.optimization_barrier((words, landed[-_IN_FLIGHT]))
        words = jax.tree.map(lambda x: to_device(x, target), words)
        # The newcomer moves, never the mean: each device works on its own part.
        new = bring(to_device(new), target) if target else beside(new, words[0])
        scalars = jax.tree.map(lambda x: follow(x, words[0]), (first, count, sample))
        words = _enter(words, new, *scalars)
        words = jax.tree.map(lambda x: place(x, target), words)
        if hosted and target is None:
            words = jax.tree.map(to_host, words)
        if is_hosted(words[0]):
            landed.append(words[0])
        return words

    words = words_of(state)
    targets = targets or (None,) * len(words)
    new = with_words(state, list(map(advance, words, jax.tree.leaves(params), targets)))
    if sample is not None:
        old, new_count = (follow(x, sample) for x in (state.num_averaged, count))
        count = jnp.where(sample, new_count, old)
    return with_counters(new, state.num_updates, count)


@inlined
def _count(n: jax.Array) -> tuple[jax.Array, jax.Array]:
    return n == 0, optax.safe_increment(n)


@inlined
def _enter(
    words: Words,
    new: jax.Array,
    first: jax.Array,
    count: jax.Array,
    sample: jax.Array | None,
) -> Words:
    """The newcomer's effect on one leaf."""
    mean, low = words
    if low is not None:
        return next_pair(mean, low, jnp.asarray(new), first, count, sample)
    if is_averaged(mean.dtype):
        new = _next_mean(mean, new, first, count)
    elif not jnp.issubdtype(mean.dtype, jax.dtypes.extended):
        new = jnp.asarray(new, mean.dtype)  # not weakly typed, as the mean is not
    return new if sample is None else jnp.where(sample, new, mean), None


def _next_mean(
    mean: jax.Array, new: jax.Array, first: jax.Array, count: jax.Array
) -> jax.Array:
    # An accumulator narrower than float32 was asked for to save memory, not to
    # round in between as well: compute wider, round once.
    compute = mean_dtype(mean.dtype, None)
    old, new = mean.astype(compute), jnp.asarray(new).astype(compute)
    # The first model replaces the mean: old + (new - old) would round, and would
    # carry over a non-finite start.
    step = (new - old) / count.astype(compute)
    return jnp.where(first, new, old + step).astype(mean.dtype)


def all_finite(tree: PyTree) -> jax.Array:
    """Whether a tree is free of NaN and infinity."""
    leaves = (x for x in jax.tree.leaves(tree) if is_averaged(leaf_dtype(x)))
    parts = [_is_finite(on_device(x)) for x in leaves]
    both = lambda x, y: x & follow(y, x)  # noqa: E731
    return functools.reduce(both, parts) if parts else on_device(np.True_)


@inlined
def _is_finite(x: jax.Array) -> jax.Array:
    # Not in eight bits or fewer, some of which have no zero, no sign or no NaN.
    x = x.astype(jnp.float32) if x.dtype.itemsize < 2 else x
    parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
    # By the extremes, which NaN passes through: XLA fuses these two into one reading,
    # but stores a byte for every weight for isfinite(x).all().
    extremes = [f(part, initial=0) for part in parts for f in (jnp.max, jnp.min)]
    return functools.reduce(jnp.logical_and, map(jnp.isfinite, extremes))
