"""Where an average lives: beside the parameters, spread over devices, or on the host.

The one rule for every kind of mesh: an array is moved by the call that binds in its
context. Outside a trace that is ``device_put``. Inside, ``reshard`` under Explicit axes
and a sharding constraint under Auto axes; ``device_put`` then only chooses the
memory.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax.sharding import AxisType, NamedSharding, Sharding

from swa_jax.propagation import stop_propagation

PyTree: TypeAlias = Any
#: One sharding for every leaf, a (prefix) pytree of shardings, or a function from a
#: leaf's ``ShapeDtypeStruct`` to its sharding. ``None``, also as the function's result,
#: leaves a leaf where the parameter is.
Placement: TypeAlias = (
    Sharding | PyTree | Callable[[jax.ShapeDtypeStruct], Sharding | None] | None
)
#: For each leaf of a tree, in order, where it lives.
Targets: TypeAlias = tuple[Sharding | None, ...]

_NO_HOST_MEMORY = jax.__version_info__ < (0, 10, 2)


def resolve(sharding: Placement, tree: PyTree) -> Targets:
    """Where ``sharding`` puts each leaf of ``tree``.

    Raises:
      TypeError: a target is neither a sharding nor ``None``.
      ValueError: a pytree of shardings does not fit ``tree``, or this release of jax
        cannot compute with host memory.
    """
    leaves = jax.tree.leaves(tree)
    targets: list[Any]
    if sharding is None or isinstance(sharding, Sharding):
        targets = [sharding] * len(leaves)
    elif callable(sharding):
        specs = (jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
        targets = [sharding(spec) for spec in specs]
    else:
        try:
            whole = jax.tree.broadcast(sharding, tree, is_leaf=_is_target)
        except ValueError as error:
            raise ValueError(
                "sharding: a pytree of shardings must have the structure of params "
                f"(or be a prefix of it); {error}"
            ) from error
        targets = jax.tree.leaves(whole, is_leaf=_is_target)
    for target in targets:
        if not _is_target(target):
            raise TypeError(
                "sharding must be a jax.sharding.Sharding, a pytree of them, or a "
                "function from a ShapeDtypeStruct to one (or to None), got "
                f"{type(target).__name__}: {target!r}"
            )
        if target is not None and _in_host_memory(target) and _NO_HOST_MEMORY:
            raise ValueError(
                f"sharding in host memory needs jax >= 0.10.2, this is "
                f"{jax.__version__}: earlier releases crash on the transfer; update "
                "jax, or keep the average on the devices"
            )
    return tuple(targets)


def _is_target(x: Any) -> bool:
    return x is None or isinstance(x, Sharding)


def place(x: jax.Array, target: Sharding | None) -> jax.Array:
    """Moves one array to ``target``, inside a trace or outside."""
    if target is None:
        return x
    if not is_traced(x):
        return jax.device_put(x, target)
    if is_explicit(target):
        x = jax.sharding.reshard(x, _on_device(target))
    else:
        x = jax.lax.with_sharding_constraint(x, _on_device(target))
    return jax.device_put(x, jax.memory.Space.Host) if _in_host_memory(target) else x


def bring(x: jax.Array, target: Sharding | None) -> jax.Array:
    """Moves one array to the devices of ``target``, leaving ``x`` where it is.

    Each device takes the part that it will work on, if it holds it already without any
    communication.
    """
    if target is None:
        return x
    target = _on_device(target)
    if is_traced(x) and not is_explicit(target):
        x = stop_propagation(x)
    return place(x, target)


def to_device(x: jax.Array, target: Sharding | None) -> jax.Array:
    """Brings an array that lives in host memory to its devices, to compute on it."""
    if target is None or not _in_host_memory(target):
        return x
    return jax.device_put(x, jax.memory.Space.Device)


def beside(x: jax.Array, other: Any) -> jax.Array:
    """Moves one array to where ``other`` is, as far as that is known."""
    if not is_traced(x) and not is_traced(other):
        return place(x, getattr(other, "sharding", None))
    if isinstance(other, jax.Array):
        target = jax.typeof(other).sharding
        if is_explicit(target):
            return jax.sharding.reshard(x, target)
    return x


def is_traced(x: Any) -> bool:
    """Whether ``x`` is a value inside a trace."""
    return isinstance(x, jax.core.Tracer)


def is_explicit(target: Sharding) -> bool:
    """Whether shardings of this mesh are part of an array's type."""
    return isinstance(target, NamedSharding) and AxisType.Explicit in (
        target.mesh.axis_types or ()
    )


def _on_device(target: Sharding) -> Sharding:
    return target.with_memory_kind("device") if _in_host_memory(target) else target


def _in_host_memory(target: Sharding) -> bool:
    return "host" in (target.memory_kind or "")
