"""Batch statistics of Haiku's models."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import swa_jax
from swa_jax.frameworks._kept import kept, weak
from swa_jax.typing import BatchWeight, Keep, Mode, PyTree

#: Of a long average: ``1 - decay**counter`` is 1 for any float32 decay below 1, and
#: no training after it takes it beyond int32.
_FAR_ALONG = 2**30
#: What ``hk.ExponentialMovingAverage`` keeps.
_FIELDS = {"hidden", "average", "counter"}
#: Beside the statistics: which averages turned out not to be debiased.
_BIASED = "(not debiased)"


def recompute_batch_stats(
    apply: Callable[[PyTree, PyTree, PyTree], tuple[Any, PyTree]],
    params: PyTree,
    state: Mapping[str, Mapping[str, Any]],
    batches: Iterable[PyTree],
    *,
    mode: Mode = "pooled",
    axis_name: str | None = None,
    keep: Keep = None,
    pairs: Mapping[str, str] | None = None,
    batch_weight: BatchWeight | None = None,
) -> dict[str, dict[str, Any]]:
    """Computes the state of a Haiku model whose weights are an average.

    ``hk.BatchNorm`` keeps ``hk.ExponentialMovingAverage``, of which inference reads
    ``average``, that is ``hidden`` divided by ``1 - decay**counter``. After one batch
    from counter 0 it is that batch's own statistic at any decay, and so each batch is
    run. In the result ``average`` and ``hidden`` are the statistics of ``batches``, and
    ``counter`` is that of a long average, which training goes on from. Whatever else
    is in ``state`` is treated as by ``swa_jax.recompute_batch_stats``.

    Args:
      apply: ``(params, state, batch) -> (output, state)``, the transformed model in
        training mode. The output is not used. Mostly::

            def apply(params, state, batch):
                return model.apply(params, state, None, batch["image"], True)

      params: the weights to compute statistics for.
      state: of the model, as training left it, at any counter.
      batches: see ``swa_jax.recompute_batch_stats``, like all that follows.
      mode: how batches are combined.
      axis_name: of a ``jax.pmap``, if the pass is to run under ``pmap``; params, state
        and batches then carry its leading device axis.
      keep: what stays as it is, by name, such as ``"net/batch_norm/~/mean_ema"``.
      pairs: names of variances with those of their means.
      batch_weight: how much a batch counts.

    Returns:
      A new state, as dicts.

    Raises:
      TypeError: ``apply`` is no function, or ``state`` is no mapping of mappings.
      ValueError: ``apply`` returns no state; an average without zero-debiasing, which
        does not tell what a batch contributed; see ``swa_jax.recompute_batch_stats``
        for the rest.

    Example:
      >>> import haiku as hk, jax, jax.numpy as jnp
      >>> def network(x, is_training):
      ...     return hk.BatchNorm(True, True, 0.99)(x, is_training)
      >>> model = hk.transform_with_state(network)
      >>> batches = [jnp.arange(4.0)[:, None], jnp.array([[10.0], [14.0]])]
      >>> params, state = model.init(jax.random.key(0), batches[0], True)
      >>> def apply(params, state, x):
      ...     return model.apply(params, state, None, x, True)
      >>> state = recompute_batch_stats(apply, params, state, batches)
      >>> for name in ("mean_ema", "var_ema"):
      ...     print(f"{state[f'batch_norm/~/{name}']['average'].item():.2f}")
      5.00
      26.67
    """
    if not callable(apply):
        raise TypeError(
            "apply must be a function (params, state, batch) -> (output, state), got "
            f"{type(apply).__name__}; call the apply of hk.transform_with_state in it"
        )
    if not (
        isinstance(state, Mapping)
        and all(isinstance(part, Mapping) for part in state.values())
    ):
        raise TypeError(
            "state must be Haiku's, a mapping from modules to mappings of arrays, got "
            f"{type(state).__name__}; pass the second of what init or apply returned"
        )
    # Integers, which the pass hands on from batch to batch.
    biased = {
        module: jnp.zeros_like(part["counter"])
        for module, part in state.items()
        if _is_average(part)
    }
    recomputed = swa_jax.recompute_batch_stats(
        kept(apply, None, lambda: functools.partial(_run, weak(apply))),
        (params, state),
        {**_read(state), _BIASED: biased},
        batches,
        mode=mode,
        axis_name=axis_name,
        keep=keep,
        pairs=pairs,
        batch_weight=batch_weight,
    )
    for module, flag in recomputed[_BIASED].items():
        if jax.device_get(flag).any():
            raise ValueError(
                f"state[{module!r}] is an average without zero-debiasing (or of decay "
                "0), which does not tell what a batch contributed; make its "
                "hk.ExponentialMovingAverage with zero_debias=True, as hk.BatchNorm "
                "does, and a decay above 0"
            )
    return _write(state, recomputed, done=True)


def _run(
    apply: Callable[[], Any], given: PyTree, stats: PyTree, batch: PyTree
) -> PyTree:
    params, state = given
    result = apply()(params, _write(state, stats, done=False), batch)
    if not (isinstance(result, tuple) and isinstance(result[-1], Mapping)):
        raise ValueError(
            "apply must return (output, state), as Haiku's does with "
            f"hk.transform_with_state, got {type(result).__name__}"
        )
    new = result[-1]
    seen = {m: old | _is_biased(new[m]) for m, old in stats[_BIASED].items()}
    return {**_read(new), _BIASED: seen}


def _is_average(part: Mapping[str, Any]) -> bool:
    return set(part) == _FIELDS


def _read(state: PyTree) -> dict[str, Any]:
    """What the pass computes: what inference reads, and all else."""
    stats: dict[str, Any] = {}
    for module, part in state.items():
        if _is_average(part):
            parent, _, own = module.rpartition("/")
            stats.setdefault(parent, {})[own] = part["average"]
        else:
            stats.setdefault(module, {}).update(part)
    return stats


def _write(state: PyTree, stats: PyTree, done: bool) -> dict[str, dict[str, Any]]:
    """The state with these statistics, to run the pass from, or to be read."""

    def average(part: Mapping[str, Any], value: Any) -> dict[str, Any]:
        counter = jnp.full_like(part["counter"], _FAR_ALONG if done else 0)
        hidden = value if done else jnp.zeros_like(value)
        return {"hidden": hidden, "average": value, "counter": counter}

    new: dict[str, dict[str, Any]] = {}
    for module, part in state.items():
        parent, _, own = module.rpartition("/")
        if _is_average(part):
            new[module] = average(part, stats[parent][own])
        else:
            new[module] = {name: stats[module][name] for name in part}
    return new


def _is_biased(part: Mapping[str, Any]) -> jax.Array:
    """Whether an average that moved on from zero has not been debiased, as an int."""
    moved = part["counter"] != 0
    same = jnp.all(part["average"] == part["hidden"]) & jnp.any(part["hidden"] != 0)
    return jnp.asarray(moved & same, part["counter"].dtype)
