"""What is known of where an array is, and of what a sharding asks for."""

from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, Sharding

#: Earlier releases of jax crash on transfers to host memory.
NO_HOST_MEMORY = jax.__version_info__ < (0, 10, 2)


def is_hosted(x: Any) -> bool:
    """Whether ``x`` is a value inside a trace that lives in host memory."""
    if not is_traced(x) or NO_HOST_MEMORY:
        return False
    return jax.typeof(x).memory_space == jax.memory.Space.Host


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


def unwrapped(x: Any) -> Any:
    """The array in a variable of another library, such as Keras's; others as is."""
    array = getattr(x, "__jax_array__", None)
    return x if array is None else array()


def is_traced(x: Any) -> bool:
    """Whether ``x`` is a value inside a trace."""
    return isinstance(x, jax.core.Tracer)


def is_explicit(target: Sharding) -> bool:
    """Whether shardings of this mesh are part of an array's type."""
    return isinstance(target, NamedSharding) and AxisType.Explicit in (
        target.mesh.axis_types or ()
    )


def is_auto(target: Sharding) -> bool:
    """Whether the compiler chooses shardings, over some axes at least."""
    if not isinstance(target, NamedSharding):
        return True
    types = target.mesh.axis_types or ()
    return not types or AxisType.Auto in types


def device_sharding(target: Sharding) -> Sharding:
    """The same, in the memory of the devices."""
    return target.with_memory_kind("device") if in_host_memory(target) else target


def in_host_memory(target: Sharding) -> bool:
    """Whether ``target`` is in host memory."""
    return "host" in (target.memory_kind or "")
