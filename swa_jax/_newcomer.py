"""The model that may enter an average: the weights as they will be stored."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import KeyPath

from swa_jax._inlined import inlined
from swa_jax._placement import as_array, follow
from swa_jax._validate import is_averaged, is_weight, leaf_dtype, leaf_dtypes
from swa_jax.typing import PyTree


class _MismatchError(ValueError):
    """An update that does not fit its parameter."""


def weights_of(params: PyTree, like: PyTree) -> PyTree:
    """``params`` without what an average like this passes by, as of a whole module.

    That is, where it holds ``None``: functions, numbers, integer arrays. Weights stay
    there too, for ``check_params`` to refuse.
    """
    treedef: Any  # mypy has no class for it
    treedef = jax.tree.structure(params)
    if treedef == jax.tree.structure(like):
        return params
    slots, treedef = jax.tree.flatten(like, is_leaf=lambda x: x is None)
    try:
        parts = treedef.flatten_up_to(params)
    except ValueError:
        return params

    def kept(slot: Any, part: Any) -> Any:
        if slot is not None:
            return part
        weights = jax.tree.map(lambda x: x if is_weight(x) else None, part)
        return weights if jax.tree.leaves(weights) else None

    return treedef.unflatten(map(kept, slots, parts))


def apply_updates(params: PyTree, updates: PyTree, caller: str) -> PyTree:
    """``optax.apply_updates``, passing on leaves that no gradient step changes."""

    def apply(path: KeyPath, param: Any, update: Any) -> Any:
        no_gradient = jax.tree.leaves(update) == [] or (
            leaf_dtype(update) == jax.dtypes.float0
        )
        if no_gradient or jnp.issubdtype(leaf_dtype(param), jax.dtypes.extended):
            return as_array(param)
        if np.shape(update) != np.shape(param):
            raise _MismatchError(
                f"{caller}: updates{jax.tree_util.keystr(path)} has shape "
                f"{np.shape(update)}, its parameter has {np.shape(param)}; both must "
                "be the same. Fix: pass the updates and the params of one model"
            )
        new = _stored(param, update)
        # Of a sum that is stored in bfloat16, XLA would feed the mean the unrounded
        # float32, and keep a copy of the old weights for it. The barrier makes the mean
        # read what is stored. Wider weights are stored as computed.
        narrow = jnp.issubdtype(new.dtype, jnp.floating) and (
            jnp.finfo(new.dtype).bits < 32
        )
        return jax.lax.optimization_barrier(new) if narrow else new

    leaf_dtypes(updates, caller=caller, name="updates")
    try:
        return jax.tree_util.tree_map_with_path(apply, params, updates)
    except _MismatchError:
        raise
    except ValueError as error:
        raise ValueError(
            f"{caller}: updates must have the structure of params. Fix: pass the "
            f"updates and the params of one model; {error}"
        ) from error


def _stored(param: Any, update: Any) -> jax.Array:
    """The weight after an update: in ``param + update`` the types decide who adds."""
    if _is_of_numpy(param) and _is_of_numpy(update):
        # In float64 perhaps, before JAX makes float32 of it.
        return as_array(np.asarray(param + update)).astype(leaf_dtype(param))
    return optax.apply_updates(as_array(param), as_array(update))


def _is_of_numpy(x: Any) -> bool:
    """Whether NumPy or Python adds it."""
    return isinstance(x, np.ndarray | np.generic | int | float | complex)


def all_finite(tree: PyTree) -> jax.Array:
    """Whether a tree is free of NaN and infinity."""
    leaves = (x for x in jax.tree.leaves(tree) if is_averaged(leaf_dtype(x)))
    parts = [_is_finite(as_array(x)) for x in leaves]
    both = lambda x, y: x & follow(y, x)  # noqa: E731
    return functools.reduce(both, parts) if parts else as_array(np.True_)


@inlined
def _is_finite(x: jax.Array) -> jax.Array:
    # Not in eight bits or fewer, some of which have no zero, no sign or no NaN.
    x = x.astype(jnp.float32) if x.dtype.itemsize < 2 else x
    parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
    # By a sum, which is NaN if any term is: 0 * x is, unless x is finite. Between
    # devices sums keep NaN, and maxima lose it. And XLA for CPUs fuses this into one
    # reading, but stores a byte for every weight for isfinite(x).all().
    return functools.reduce(
        jnp.logical_and, (jnp.isfinite(jnp.sum(0 * part)) for part in parts)
    )
