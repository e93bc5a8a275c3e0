"""The state of an average: two counters, then trees; and the same leaf by leaf."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Sharding

from swa_jax._inlined import inlined
from swa_jax._leafwise import Buffer, Kind, Words
from swa_jax._placement import is_placed, place, resolve, stack
from swa_jax._validate import leaf_dtypes
from swa_jax.typing import Placement, PyTree


def trees_of(state: Any) -> tuple[PyTree, ...]:
    """What a state holds besides its counters; the first has all leaves."""
    if hasattr(state, "average"):  # and what the average lacks
        return (*state.average[2:], *state[1:])
    return tuple(state[2:])


def with_trees(
    state: Any, num_updates: jax.Array, num_averaged: jax.Array, trees: Any
) -> Any:
    """A state of the same type with other content."""
    return _build(type(state), num_updates, num_averaged, *trees)


def with_counters(state: Any, num_updates: jax.Array, num_averaged: jax.Array) -> Any:
    """A state with other counters."""
    return with_trees(state, num_updates, num_averaged, trees_of(state))


def words_of(state: Any) -> list[Words]:
    """Leaf by leaf, what a state holds of it."""
    first, *others = trees_of(state)
    leaves = jax.tree.leaves(first)
    treedef: Any = jax.tree.structure(first)
    columns = [map(_word, treedef.flatten_up_to(tree)) for tree in others]
    return list(zip(leaves, *columns, strict=True))


def with_words(state: Any, words: list[Words]) -> Any:
    """A state with other words."""
    trees = _trees(jax.tree.structure(trees_of(state)[0]), words, len(trees_of(state)))
    return with_trees(state, state.num_updates, state.num_averaged, trees)


def _build(state: type, *fields: Any) -> Any:
    # Where the average stands inside a state, its type knows how to be made.
    return getattr(state, "of", state)(*fields)


def _word(leaf: Any) -> Any:
    return None if isinstance(leaf, optax.MaskedNode) else leaf


def _trees(treedef: Any, words: list[Words], number: int) -> list[PyTree]:
    """One tree for each of the ``number`` words of a leaf."""
    columns = list(zip(*words, strict=True)) if words else [()] * number
    return [
        treedef.unflatten(optax.MaskedNode() if x is None else x for x in column)
        for column in columns
    ]


def models_like(kind: Kind, state: Any) -> PyTree:
    """What a model that may enter must look like."""
    first = trees_of(state)[0]
    if kind.buffers(jnp.dtype(jnp.float32), None)[0].rows is None:
        return first
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), first)


def fresh_state(
    state: type[Any],
    kind: Kind,
    params: PyTree,
    *,
    accumulator_dtype: Any,
    sharding: Placement,
    caller: str,
) -> Any:
    """An average of no model yet, with the data of ``params``, so where they are."""
    leaves = jax.tree.leaves(params)
    treedef: Any = jax.tree.structure(params)
    dtypes = leaf_dtypes(params, caller=caller)
    kept = [kind.buffers(dtype, accumulator_dtype) for dtype in dtypes]
    specs = [
        jax.ShapeDtypeStruct(np.shape(leaf), buffers[0].dtype)
        for leaf, buffers in zip(leaves, kept, strict=True)
    ]
    targets = resolve(sharding, treedef.unflatten(specs))
    words = [
        tuple(buffer and _fresh(leaf, buffer, target) for buffer in buffers)
        for leaf, buffers, target in zip(leaves, kept, targets, strict=True)
    ]
    number = len(kind.buffers(jnp.dtype(jnp.float32), None))
    counters = _zero(), _zero()  # two arrays: counters are donated separately
    return _build(state, *counters, *_trees(treedef, words, number))


@inlined
def _zero() -> jax.Array:
    return jnp.zeros([], jnp.int32)


def _fresh(leaf: Any, buffer: Buffer, target: Sharding | None) -> jax.Array:
    """A buffer of its own with the value of ``leaf``, or with zeros for a shape."""
    dtype, rows = buffer
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shape = leaf.shape if rows is None else (rows, *leaf.shape)
        at = leaf.sharding if rows is None else stack(leaf.sharding)
        zeros = functools.partial(jax.lax.full, shape, 0, dtype)
        return _placed(jax.jit(zeros, out_shardings=at)(), buffer, target)
    if jnp.issubdtype(dtype, jax.dtypes.extended):  # PRNG keys know no cast
        new = jnp.copy(leaf)
    else:
        if not isinstance(leaf, jax.Array):
            leaf = jax.device_put(np.asarray(leaf))
        # A dtype given by name also strips weak types, which would retrace the first
        # update; `copy` makes a buffer of its own.
        new = jnp.array(leaf, dtype=dtype, copy=True)
    if rows is not None:
        # An array that is free to follow others stays so.
        tied = is_placed(new) and new.committed
        at = stack(new.sharding) if tied else None
        new = jax.jit(_repeat, static_argnums=1, out_shardings=at)(new, rows)
    return _placed(new, buffer, target)


def _repeat(x: jax.Array, rows: int) -> jax.Array:
    return jnp.broadcast_to(x, (rows, *x.shape))


def _placed(x: jax.Array, buffer: Buffer, target: Sharding | None) -> jax.Array:
    return place(x, target if buffer.rows is None else stack(target))
