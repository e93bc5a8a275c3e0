"""The data of a pass: what may be a batch, and how much each batch weighs."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from swa_jax.typing import BatchWeight, PyTree


def check_batches(batches: Any) -> None:
    """Raises unless ``batches`` can be a stream of batches.

    Raises:
      TypeError: it is one array, one batch, or a function.
    """
    if isinstance(batches, jax.Array | np.ndarray | np.generic):
        found, fix = (
            f"one array of shape {np.shape(batches)}",
            "which would be read example by example; wrap one batch in a list, "
            "[batch], or split the array into batches",
        )
    elif isinstance(batches, Mapping | str | bytes):
        found, fix = (
            f"one {type(batches).__name__}",
            "which is a batch, or no data at all; wrap one batch in a list, [batch]",
        )
    elif not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        call = "call it: pass batches()" if callable(batches) else "pass a list of them"
        found, fix = f"{type(batches).__name__}", f"which yields no batches; {call}"
    else:
        return
    raise TypeError(f"batches must be an iterable of batches, got {found}, {fix}")


def weights_of(
    batch: PyTree, devices: int | None, batch_weight: BatchWeight | None
) -> np.ndarray:
    """How much a batch weighs on each device: by default, its number of examples.

    Args:
      batch: the batch; with ``devices``, its arrays have them as their leading axis.
      devices: devices of this process along a mapped axis; ``None`` without one.
      batch_weight: the caller's own rule.

    Returns:
      float64, shape (devices,), or (1,) without any.

    Raises:
      ValueError: no arrays or no examples in it, arrays that disagree about the number
        of examples, or a weight that is not a positive number.
    """
    shape = (devices or 1,)
    if batch_weight is None:
        return np.full(shape, float(_num_examples(batch, devices)))
    given = np.asarray(jax.device_get(batch_weight(batch)))
    fits = given.shape in ((), shape) and np.issubdtype(given.dtype, np.number)
    given = given.astype(np.float64) if fits else given
    if not (fits and np.isfinite(given).all() and (given >= 0).all() and given.any()):
        raise ValueError(
            "batch_weight must give one positive number for a batch"
            + (f", or {devices}, one a device" if devices else "")
            + f", got {given!r:.80}; leave batches without any valid example out"
        )
    if given.shape == ():
        given = given / shape[0]
    return np.broadcast_to(given, shape)


def _num_examples(batch: PyTree, devices: int | None) -> int:
    axis = 0 if devices is None else 1
    found: dict[int, tuple[str, tuple[int, ...]]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        shape = np.shape(leaf)
        if devices is not None and shape[:1] != (devices,):
            raise ValueError(
                f"batches: with axis_name, every array of a batch must have the "
                f"{devices} devices as its leading axis, as params and batch_stats do, "
                f"got shape {shape}; reshape it to ({devices}, examples, ...)"
            )
        if len(shape) > axis and not _is_key(leaf, shape[axis:]):
            name = f"batch{jax.tree_util.keystr(path)}"
            found.setdefault(shape[axis], (name, shape))
    if not found:
        raise ValueError(
            f"batches: a batch must hold an array whose axis {axis} counts its "
            f"examples, got {jax.tree.map(np.shape, batch)!s:.200} (shapes)"
        )
    if 0 in found:
        raise ValueError(
            "batches: a batch must hold at least one example, got an array of shape "
            f"{found[0][1]}; leave empty batches out"
        )
    if len(found) > 1:
        sizes = ", ".join(f"{name} has {n}" for n, (name, _) in found.items())
        raise ValueError(
            f"batches: the arrays of a batch must agree on axis {axis}, which counts "
            f"the examples, but {sizes}; pass batch_weight=, a function from the batch "
            "to its weight (valid rows, tokens)"
        )
    return next(iter(found))


def _is_key(leaf: Any, shape: tuple[int, ...]) -> bool:
    """Whether it is a PRNG key, of the new kind or of the raw one."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return True
    return dtype == np.uint32 and shape in ((2,), (4,))
