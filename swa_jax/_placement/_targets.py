"""Where each leaf of an average shall live: the argument ``sharding``, leaf by leaf."""

from typing import Any, TypeAlias

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from swa_jax._placement._kinds import NO_HOST_MEMORY, in_host_memory
from swa_jax.typing import Placement, PyTree

#: For each leaf of a tree, in order, where it lives.
Targets: TypeAlias = tuple[Sharding | None, ...]


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
        if target is not None and in_host_memory(target) and NO_HOST_MEMORY:
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


def stack(target: Sharding | None) -> Sharding | None:
    """The sharding of many such arrays along a new first axis, all on each device."""
    if isinstance(target, NamedSharding):
        return target.update(spec=PartitionSpec(None, *target.spec))
    return target  # of one device, whatever the shape


def unstack(target: Sharding | None) -> Sharding | None:
    """The sharding of one array of a stack."""
    if isinstance(target, NamedSharding):
        return target.update(spec=PartitionSpec(*target.spec[1:]))
    return target
