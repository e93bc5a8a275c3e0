"""Where an average lives: beside the parameters, spread over devices, or on the host.

The one rule for every kind of mesh: an array is moved by the call that binds in its
context. Outside a trace that is ``device_put``. Inside, ``reshard`` under Explicit axes
and a sharding constraint under Auto axes; ``device_put`` then only chooses the
memory.
"""

from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from swa_jax._placement._barrier import stop_propagation
from swa_jax._placement._kinds import (
    device_sharding,
    devices_of,
    in_host_memory,
    is_auto,
    is_explicit,
    is_hosted,
    is_placed,
    is_traced,
)
from swa_jax._placement._targets import unstack


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
    if is_auto(target):
        x = jax.lax.with_sharding_constraint(x, _over(AxisType.Auto, target))
    return to_host(x) if in_host_memory(target) else x


def bring(x: jax.Array, target: Sharding | None) -> jax.Array:
    """Moves one array to the devices of ``target``, leaving ``x`` where it is.

    Each device takes the part that it will work on, if it holds it already without any
    communication.
    """
    if target is None:
        return x
    target = device_sharding(target)
    if is_traced(x) and is_auto(target):
        x = stop_propagation(x)
    return place(x, target)


def to_device(x: jax.Array, target: Sharding | None = None) -> jax.Array:
    """Brings an array that lives in host memory to its devices, to compute on it.

    Args:
      x: the array.
      target: where it lives, as far as its own type does not tell.
    """
    hosted = is_hosted(x) or (target is not None and in_host_memory(target))
    return jax.device_put(x, jax.memory.Space.Device) if hosted else x


def in_device_memory(x: Any) -> Any:
    """The array, or a copy on its devices of one in host memory; outside a trace."""
    hosted = is_placed(x) and in_host_memory(x.sharding)
    return jax.device_put(x, device_sharding(x.sharding)) if hosted else to_device(x)


def to_host(x: jax.Array) -> jax.Array:
    """Takes a value inside a trace from its devices to host memory."""
    return jax.device_put(x, jax.memory.Space.Host)


def beside(x: jax.Array, other: Any, *, stacked: bool = False) -> jax.Array:
    """Moves one array to where ``other`` is, as far as that is known.

    Inside a trace, to the devices: nothing can be computed elsewhere.

    Args:
      x: the array.
      other: what it shall be next to.
      stacked: whether ``other`` has one more axis, in front, than ``x``.
    """
    if not is_traced(x) and not is_traced(other):
        target = getattr(other, "sharding", None)
        return place(x, unstack(target) if stacked else target)
    x = to_device(x)
    if isinstance(other, jax.Array):
        target = jax.typeof(other).sharding
        if is_explicit(target):
            return jax.sharding.reshard(x, unstack(target) if stacked else target)
    return x


def as_array(x: Any) -> jax.Array:
    """A JAX array, for which a NumPy array or a number is moved explicitly."""
    return x if isinstance(x, jax.Array) else jax.device_put(x)


def follow(scalar: jax.Array, other: Any) -> jax.Array:
    """Copies a scalar to the devices of ``other``, where that is not in a trace.

    JAX would do so silently, but only as long as nobody tied the scalar to a device.
    """
    scalar = as_array(scalar)
    if not is_placed(scalar) or not is_placed(other) or scalar.shape:
        return scalar
    if devices_of(scalar) == devices_of(other):
        return scalar
    target = other.sharding
    if isinstance(target, NamedSharding):
        return jax.device_put(scalar, NamedSharding(target.mesh, PartitionSpec()))
    return jax.device_put(scalar, device_sharding(target))


def _over(kind: AxisType, target: Any) -> Any:
    """On the devices, and of the target's axes those of one kind."""
    target = device_sharding(target)
    if not (is_explicit(target) and is_auto(target)):
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
