"""Forward passes that are kept for the next call, so that each is compiled once."""

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

from swa_jax.typing import BatchStatsFn

_kept: weakref.WeakKeyDictionary[Any, tuple[Any, BatchStatsFn]] = (
    weakref.WeakKeyDictionary()
)


def kept(owner: Any, key: Any, make: Callable[[], BatchStatsFn]) -> BatchStatsFn:
    """The pass made last for ``owner``, if it was made for an equal ``key``.

    Args:
      owner: a model or function; the pass is gone when it is.
      key: all that the pass is made from, and holds on to.
      make: makes the pass. It must hold neither ``owner`` nor functions that callers
        made but by ``weak``: for they may hold ``owner``, which would then never go.
    """
    try:
        found = _kept.get(owner)
        if found is not None and found[0] == key:
            return found[1]
        made = make()
        _kept[owner] = key, made
    except (TypeError, ValueError):  # no hash, no weak reference, or arrays in the key
        return make()
    return made


def weak(x: Any) -> Callable[[], Any]:
    """A function that returns ``x``, and does not keep it alive if it is a function.

    Two of them are equal if what they return is.
    """
    try:
        return weakref.ref(x) if callable(x) else _Plain(x)
    except TypeError:  # of a type that knows no weak references
        return _Plain(x)


@dataclasses.dataclass(frozen=True)
class _Plain:
    value: Any

    def __call__(self) -> Any:
        return self.value
