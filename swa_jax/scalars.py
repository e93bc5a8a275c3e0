"""The numbers that callers give: counts and rates, checked, and shown in messages."""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from swa_jax.placement import is_traced

#: The largest count: counters of updates are int32, as optax's are.
MAX_COUNT = int(np.iinfo(np.int32).max)


def shown(value: Any) -> str:
    """``value`` for a message, in a line: of arrays the shape, not the numbers."""
    kind = type(value).__name__
    if getattr(value, "shape", ()):
        return f"an array of shape {value.shape}"
    if any(getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(value)):
        return f"a {kind} of arrays"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}... (a {kind})"


def known(value: Any) -> Any:
    """A value as the host has it, where it is a JAX array: an explicit transfer."""
    return jax.device_get(value) if isinstance(value, jax.Array) else value


def check_count(name: str, value: Any, *, at_least: int = 1) -> int:
    """Returns ``value`` as an integer that counts something, or raises."""
    try:
        if is_traced(value) or isinstance(value, bool):
            raise TypeError
        count = operator.index(known(value))
    except TypeError:
        raise TypeError(
            f"{name} must be an integer known outside jit, got {shown(value)} of type "
            f"{type(value).__name__}"
        ) from None
    if not at_least <= count <= MAX_COUNT:
        bound = f"least {at_least}" if count < at_least else f"most {MAX_COUNT} (int32)"
        raise ValueError(f"{name} must be at {bound}, got {count}")
    return count


def check_rate(name: str, rate: Any, or_else: str = "") -> None:
    """Raises unless ``rate`` is a learning rate, as far as its value is known.

    Args:
      name: the argument to name in the message.
      rate: what was given for it.
      or_else: what else it could have been, as in ``" or None"``.
    """
    if not _is_real(rate):
        schedule = "give a schedule's value at this step; " if callable(rate) else ""
        raise TypeError(
            f"{name} must be a learning rate{or_else}, got {shown(rate)}; it is one "
            f"number, {schedule}for a rate for each group of parameters there is "
            "optax.partition"
        )
    if is_traced(rate):
        return
    number = float(known(rate))
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(
            f"{name} must be finite and not negative, got {shown(rate)}; it is the "
            f"learning rate as the optimizer gets it{or_else and ','}{or_else}"
        )


def _is_real(value: Any) -> bool:
    """Whether ``value`` is one real number, traced or not."""
    if isinstance(value, bool | str) or np.ndim(value):
        return False
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return hasattr(value, "__float__")
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))
