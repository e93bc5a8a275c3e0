"""Weights and an average that live in different places, before one call takes both."""

from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Sharding

from swa_jax._placement._kinds import devices_of, is_placed, is_traced
from swa_jax._placement._moves import bring
from swa_jax._placement._targets import Targets, stack, unstack

#: The arrays that an average keeps of one leaf, ``None`` where it keeps less. The
#: first is never ``None``, and may have one axis, in front, more than the leaf.
Words: TypeAlias = tuple[Any, ...]


def together(words: list[Words], leaves: list[Any]) -> bool:
    """Whether each leaf lies where what is kept of it does."""
    return len(words) == len(leaves) and all(map(_together, words, leaves))


def meet(
    words: list[Words], leaves: list[Any]
) -> tuple[list[Words], list[Any], Targets]:
    """Moves what must be moved, never what an average keeps, unless it was restored.

    Args:
      words: what is kept of each leaf. NumPy arrays, as from a checkpoint, move to
        their leaves.
      leaves: the weights. Those on other devices than the average move to it.

    Returns:
      Both, and where each leaf must be held, if the weights would pull it away.
    """
    words = list(map(_beside_leaf, words, leaves))
    leaves = list(map(_on_devices_of, words, leaves))
    return words, leaves, tuple(map(_own_target, words, leaves))


def is_scattered(words: list[Words]) -> bool:
    """Whether leaves live on different devices, which no compiled call spans."""
    alike = {kept[0].sharding: kept[0] for kept in words if is_placed(kept[0])}
    return len(set(map(devices_of, alike.values()))) > 1


def _home(words: Words, leaf: Any) -> Sharding | None:
    """Where a model's leaf would lie beside what is kept of it."""
    kept = words[0]
    return unstack(kept.sharding) if kept.ndim > np.ndim(leaf) else kept.sharding


def _together(words: Words, leaf: Any) -> bool:
    kept = words[0]
    if not (is_placed(kept) and is_placed(leaf)):
        return False
    if kept.ndim == leaf.ndim:
        return kept.sharding == leaf.sharding
    return kept.sharding.is_equivalent_to(stack(leaf.sharding), kept.ndim)


def _beside_leaf(words: Words, leaf: Any) -> Words:
    def move(x: Any) -> Any:
        if isinstance(x, jax.Array):
            return x
        target = leaf.sharding if is_placed(leaf) else None
        return jax.device_put(x, stack(target) if x.ndim > np.ndim(leaf) else target)

    return jax.tree.map(move, words)


def _on_devices_of(words: Words, leaf: Any) -> Any:
    """Moves a leaf of the weights that lives on other devices than its average."""
    kept = words[0]
    if not is_placed(kept) or is_traced(leaf):
        return leaf
    same = is_placed(leaf) and devices_of(kept) == devices_of(leaf)
    return leaf if same else bring(leaf, _home(words, leaf))


def _own_target(words: Words, leaf: Any) -> Sharding | None:
    if not is_placed(words[0]) or is_traced(leaf) or _together(words, leaf):
        return None
    return _home(words, leaf)
