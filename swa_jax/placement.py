"""Where an average lives: beside the parameters, spread over devices, or on the host.

The one rule for every kind of mesh: an array is moved to its sharding by the call that
binds in its context. ``device_put`` does outside a trace and under Explicit axes; under
Auto axes it is only a hint inside a trace, so there a sharding constraint fixes the
layout and ``device_put`` the memory.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax.sharding import AxisType, NamedSharding, Sharding

PyTree: TypeAlias = Any
#: One sharding for every leaf, a (prefix) pytree of shardings, or a function from a
#: leaf's ``ShapeDtypeStruct`` to its sharding. ``None``, also as the function's result,
#: leaves a leaf where the parameter is.
Placement: TypeAlias = (
    Sharding | PyTree | Callable[[jax.ShapeDtypeStruct], Sharding | None] | None
)


def place_tree(tree: PyTree, sharding: Placement) -> PyTree:
    """Moves every leaf to where ``sharding`` says, inside a trace or outside."""
    if sharding is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    if isinstance(sharding, Sharding):
        targets: list[Any] = [sharding] * len(leaves)
    elif callable(sharding):
        specs = (jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
        targets = [sharding(spec) for spec in specs]
    else:
        try:
            targets = jax.tree.leaves(
                jax.tree.broadcast(sharding, tree, is_leaf=_is_target),
                is_leaf=_is_target,
            )
        except ValueError as error:
            raise ValueError(
                "sharding: a pytree of shardings must have the structure of params "
                f"(or be a prefix of it); {error}"
            ) from error
    for target in targets:
        if not _is_target(target):
            raise TypeError(
                "sharding must be a jax.sharding.Sharding, a pytree of them, or a "
                "function from a ShapeDtypeStruct to one (or to None), got "
                f"{type(target).__name__}: {target!r}"
            )
    return jax.tree.unflatten(treedef, map(place, leaves, targets))


def _is_target(x: Any) -> bool:
    return x is None or isinstance(x, Sharding)


def place(x: jax.Array, target: Sharding | None) -> jax.Array:
    """Moves one array to ``target``, inside a trace or outside."""
    if target is None:
        return x
    if not isinstance(x, jax.core.Tracer) or _is_explicit(target):
        return jax.device_put(x, target)
    # Under Auto axes only a constraint binds the layout, only device_put the memory.
    x = jax.lax.with_sharding_constraint(x, _on_device(target))
    return jax.device_put(x, target) if _in_host_memory(target) else x


def to_device(x: jax.Array, target: Sharding | None) -> jax.Array:
    """Brings an array that lives in host memory to its devices, to compute on it."""
    if target is None or not _in_host_memory(target):
        return x
    return jax.device_put(x, _on_device(target))


def _is_explicit(target: Sharding) -> bool:
    return isinstance(target, NamedSharding) and AxisType.Explicit in (
        target.mesh.axis_types or ()
    )


def _on_device(target: Sharding) -> Sharding:
    return target.with_memory_kind("device") if _in_host_memory(target) else target


def _in_host_memory(target: Sharding) -> bool:
    return "host" in (target.memory_kind or "")
