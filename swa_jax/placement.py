"""Where an average lives: beside the parameters, spread over devices, or on the host.

The one rule for every kind of mesh: an array is moved by the call that binds in its
context. Outside a trace that is ``device_put``. Inside, ``reshard`` under Explicit axes
and a sharding constraint under Auto axes; ``device_put`` then only chooses the
memory.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

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
      ValueError: a pytree of shardings does not fit ``tree``, a sharding does not
        divide a leaf, or this release of jax cannot compute with host memory.
    """
    if isinstance(sharding, Mesh):  # which could be called
        raise TypeError(
            "sharding must say how arrays lie on a mesh, got the Mesh alone; pass "
            "jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(...))"
        )
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [leaf for _, leaf in flat]
    targets: list[Any]
    if sharding is None or isinstance(sharding, Sharding):
        targets = [sharding] * len(leaves)
    elif callable(sharding):
        specs = (jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
        targets = [sharding(spec) for spec in specs]
    else:
        try:
            # No leaves: optax.tree_map_params asks with a tree of its own.
            sharding = _visible(sharding, tree) if leaves else tree
            whole = jax.tree.broadcast(sharding, tree, is_leaf=_is_target)
        except ValueError as error:
            raise ValueError(
                "sharding: a pytree of shardings must have the structure of params "
                f"(or be a prefix of it); {error}"
            ) from error
        targets = jax.tree.leaves(whole, is_leaf=_is_target)
    for (path, leaf), target in zip(flat, targets, strict=True):
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
        if target is not None:
            _check_divides(target, leaf.shape, jax.tree_util.keystr(path))
    return tuple(targets)


def _visible(sharding: PyTree, tree: PyTree) -> PyTree:
    """The shardings less those of what ``optax.masked`` hid, a leaf or a subtree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_masked)
    hidden = {path for path, leaf in flat if _is_masked(leaf)}
    return jax.tree_util.tree_map_with_path(
        lambda path, part: optax.MaskedNode() if path in hidden else part,
        sharding,
        is_leaf=lambda path, part: path in hidden or _is_target(part),
        is_leaf_takes_path=True,
    )


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _check_divides(target: Sharding, shape: tuple[int, ...], name: str) -> None:
    try:
        target.shard_shape(shape)
    except ValueError as error:
        raise ValueError(
            f"sharding does not divide params{name} of shape {shape}: {error} Fix: "
            "pass a function from a leaf's ShapeDtypeStruct to a sharding, which "
            "answers None, or another sharding, for such a leaf"
        ) from error


def _is_target(x: Any) -> bool:
    return x is None or isinstance(x, Sharding)


def place(x: jax.Array, target: Sharding | None) -> jax.Array:
    """Moves one array to ``target``, inside a trace or outside."""
    if target is None:
        return x
    if not is_traced(x):
        return jax.device_put(x, target)
    _check_not_manual(target)
    # Each axis of a mesh has a kind of its own.
    if is_explicit(target):
        x = jax.sharding.reshard(x, _over(AxisType.Explicit, target))
    if _is_auto(target):
        x = jax.lax.with_sharding_constraint(x, _over(AxisType.Auto, target))
    return to_host(x) if _in_host_memory(target) else x


def bring(x: jax.Array, target: Sharding | None) -> jax.Array:
    """Moves one array to the devices of ``target``, leaving ``x`` where it is.

    Each device takes the part that it will work on, if it holds it already without any
    communication.
    """
    if target is None:
        return x
    target = _on_device(target)
    if is_traced(x) and _is_auto(target):
        x = stop_propagation(x)
    return place(x, target)


def to_device(x: jax.Array, target: Sharding | None = None) -> jax.Array:
    """Brings an array that lives in host memory to its devices, to compute on it.

    Args:
      x: the array.
      target: where it lives, as far as its own type does not tell.
    """
    hosted = is_hosted(x) or (target is not None and _in_host_memory(target))
    return jax.device_put(x, jax.memory.Space.Device) if hosted else x


def to_host(x: jax.Array) -> jax.Array:
    """Takes a value inside a trace from its devices to host memory."""
    return jax.device_put(x, jax.memory.Space.Host)


def is_hosted(x: Any) -> bool:
    """Whether ``x`` is a value inside a trace that lives in host memory."""
    if not is_traced(x) or _NO_HOST_MEMORY:
        return False
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def beside(x: jax.Array, other: Any) -> jax.Array:
    """Moves one array to where ``other`` is, as far as that is known.

    Inside a trace, to the devices: nothing can be computed elsewhere.
    """
    if not is_traced(x) and not is_traced(other):
        return place(x, getattr(other, "sharding", None))
    x = to_device(x)
    if isinstance(other, jax.Array):
        target = jax.typeof(other).sharding
        if is_explicit(target):
            return jax.sharding.reshard(x, target)
    return x


def on_device(x: Any) -> jax.Array:
    """A JAX array, for which a NumPy array or a number is moved explicitly."""
    return x if isinstance(x, jax.Array) else jax.device_put(x)


def follow(scalar: jax.Array, other: Any) -> jax.Array:
    """Copies a scalar to the devices of ``other``, where that is not in a trace.

    JAX would do so silently, but only as long as nobody tied the scalar to a device.
    """
    scalar = on_device(scalar)
    if not is_placed(scalar) or not is_placed(other) or scalar.shape:
        return scalar
    if devices_of(scalar) == devices_of(other):
        return scalar
    target = other.sharding
    if isinstance(target, NamedSharding):
        return jax.device_put(scalar, NamedSharding(target.mesh, PartitionSpec()))
    return jax.device_put(scalar, _on_device(target))


def devices_of(x: jax.Array) -> tuple[jax.Device, ...]:
    """The devices of an array outside a trace, in the order of its mesh.

    JAX computes with two arrays only where these are the same.
    """
    if isinstance(x.sharding, NamedSharding):
        return tuple(x.sharding.mesh.devices.flat)
    return tuple(sorted(x.sharding.device_set, key=lambda device: device.id))


def is_placed(x: Any) -> bool:
    """Whether ``x`` is a JAX array outside a trace, not a NumPy array."""
    return isinstance(x, jax.Array) and not is_traced(x)


def is_traced(x: Any) -> bool:
    """Whether ``x`` is a value inside a trace."""
    return isinstance(x, jax.core.Tracer)


def is_explicit(target: Sharding) -> bool:
    """Whether shardings of this mesh are part of an array's type."""
    return isinstance(target, NamedSharding) and AxisType.Explicit in (
        target.mesh.axis_types or ()
    )


def _is_auto(target: Sharding) -> bool:
    """Whether the compiler chooses shardings, over some axes at least."""
    if not isinstance(target, NamedSharding):
        return True
    types = target.mesh.axis_types or ()
    return not types or AxisType.Auto in types


def _over(kind: AxisType, target: Any) -> Any:
    """On the devices, and of the target's axes those of one kind."""
    target = _on_device(target)
    if not (is_explicit(target) and _is_auto(target)):
        return target
    kinds = dict(zip(target.mesh.axis_names, target.mesh.axis_types, strict=True))

    def kept(part: Any) -> Any:
        axes = part if isinstance(part, tuple) else (part,)
        return tuple(axis for axis in axes if kinds.get(axis) == kind) or None

    return target.update(spec=PartitionSpec(*map(kept, target.spec)))


def _check_not_manual(target: Sharding) -> None:
    """Raises where each device runs a program of its own: JAX would say so later."""
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    if not manual:
        return
    if isinstance(target, NamedSharding) and manual <= set(target.mesh.axis_names):
        parts = (part if isinstance(part, tuple) else (part,) for part in target.spec)
        if manual.isdisjoint(axis for part in parts for axis in part):
            return  # over other axes of the same mesh
    raise ValueError(
        f"sharding={target} has no meaning inside jax.shard_map or jax.pmap, where "
        "each device runs a program of its own. Fix: leave sharding out there, average "
        "under jax.jit with sharded arrays, or call update_average outside"
    )


def _on_device(target: Sharding) -> Sharding:
    return target.with_memory_kind("device") if _in_host_memory(target) else target


def _in_host_memory(target: Sharding) -> bool:
    return "host" in (target.memory_kind or "")
