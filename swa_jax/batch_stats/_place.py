"""Moving arrays between host and devices, always explicitly.

So that the pass works where implicit transfers are forbidden, see
``jax.transfer_guard``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def to_device(tree: Any) -> Any:
    """A copy of the tree with its NumPy arrays and numbers on the default device.

    Never their own memory, as ``jax.device_put`` gives on a CPU: a stream may fill one
    buffer again and again, and a batch is judged when the next one has been read.
    """
    here = jax.process_count() == 1  # else jit takes what is the same for global

    def move(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            leaf = leaf.copy()
        plain = isinstance(leaf, np.ndarray | np.generic | int | float | complex)
        return jax.device_put(leaf) if plain and here else leaf

    return jax.tree.map(move, tree)


def to_host(arrays: list[jax.Array]) -> list[np.ndarray]:
    """The arrays as NumPy's, all transfers under way at once."""
    return send(arrays)()


def send(arrays: list[jax.Array]) -> Callable[[], list[np.ndarray]]:
    """Makes arrays ready for the host now, before the devices get other work.

    Those that lie in one place and have one dtype travel as one: a GPU's small arrays
    take their time one by one, whatever their size.

    Returns:
      A function that waits for them.
    """

    def whole(x: jax.Array) -> jax.Array:
        if x.is_fully_addressable or x.is_fully_replicated:
            return x
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)

    arrays = [whole(x) for x in arrays]
    groups: dict[Any, list[int]] = {}
    for place, x in enumerate(arrays):
        # Where each device holds all of it, nothing has to move to make them one.
        there = (x.sharding, x.dtype) if x.is_fully_replicated else place
        groups.setdefault(there, []).append(place)
    together = [
        _end_to_end([arrays[i] for i in group]) if len(group) > 1 else arrays[group[0]]
        for group in groups.values()
    ]

    def receive() -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        fetched = jax.device_get(together)
        for group, one in zip(groups.values(), fetched, strict=True):
            ends = np.cumsum([arrays[i].size for i in group])
            for i, part in zip(
                group, np.split(one.reshape(-1), ends[:-1]), strict=True
            ):
                found[i] = part.reshape(arrays[i].shape)
        return [found[i] for i in range(len(arrays))]

    return receive


@jax.jit
def _end_to_end(arrays: list[jax.Array]) -> jax.Array:
    return jnp.concatenate([x.reshape(-1) for x in arrays])


def placed_like(value: np.ndarray, like: Any, run: jax.Array | None) -> jax.Array:
    """``value`` on the devices of ``like``, which has its shape.

    Where ``like`` is free to go where others are, the value is free as well; or, as on
    several processes, wherever ``run`` is replicated to, which no process holds alone.
    """
    sharding = None
    if isinstance(like, jax.Array) and like.committed:
        sharding = like.sharding
    elif run is not None and not run.is_fully_addressable and run.is_fully_replicated:
        sharding = run.sharding
    if sharding is None:
        return jax.device_put(value)
    if not sharding.is_fully_addressable:
        return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
    return jax.device_put(value, sharding)
