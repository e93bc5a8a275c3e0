"""``swa()``: when to average, as an Optax gradient transformation.

The transformation stands last in a chain, where it sees the final updates and passes
them through. It averages the weights *after* the update, computed exactly as the user
computes them, ``optax.apply_updates(params, updates)``: inside one compiled step XLA
merges the two, so neither time nor memory is spent twice. Averaging ``params`` as
received would lag one step behind and cost a copy of all weights.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from swa_jax.averaging import SWAState, accumulate, init_average
from swa_jax.checks import (
    check_accumulator_dtype,
    check_params,
    leaf_dtype,
    mean_dtype,
)
from swa_jax.placement import Placement, PyTree, is_traced, resolve

_MAX_STEP = np.iinfo(np.int32).max


def swa(
    start_step: int = 0,
    period: int = 1,
    *,
    stop_step: int | None = None,
    accumulator_dtype: Any = None,
    sharding: Placement = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Averages the weights along the training trajectory.

    After update number ``t`` (the first is 1) the new weights
    ``q = optax.apply_updates(params, updates)`` enter the mean iff::

        t >= start_step  and  (t - start_step) % period == 0
        and (stop_step is None or t <= stop_step)

    by ``mean += (q - mean) / (num_averaged + 1)``. On all other steps the mean keeps
    its bits. With ``S`` steps an epoch, ``swa(start_step=e * S, period=S)`` averages
    the ends of epochs e, e + 1, ... counted from 1. The initial weights are never
    part of the mean.

    Put it last in the chain: it needs the updates as they will be applied, and hands
    them on unchanged. Read the result with ``swa_params``; a network with batch
    normalisation then needs ``recompute_batch_stats``.

    Args:
      start_step: number of the first update whose weights are averaged, >= 0; 0 and 1
        both average from the first update on, but differ in phase if ``period > 1``.
      period: average every so many updates, >= 1.
      stop_step: number of the last update that may be averaged, >= ``start_step``;
        ``None`` for no end.
      accumulator_dtype: dtype of the mean, see ``init_average``.
      sharding: where the mean lives, see ``init_average``; under ``jax.jit`` only, for
        in ``shard_map`` and ``pmap`` each device has a program of its own. For host
        memory, drive the average with ``update_average`` instead: inside the training
        step every step, also a skipped one, would carry the mean to the device and
        back.
      skip_nonfinite: leave a model with any NaN or infinity out of the mean (it does
        not count in ``num_averaged`` either). Costs one more read of the weights a
        step, and, where parameters are sharded, an all-reduce of scalars. Under
        ``shard_map`` each device looks at its own shard only: use it where parameters
        are replicated, or under ``jit``.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state ``SWAState``.

    Raises:
      ValueError: negative ``start_step``, ``period < 1``, ``stop_step < start_step``,
        any of them too large for int32; at the update, ``params`` missing or other
        than those that the state was created from.
      TypeError: a step that is no integer; see ``init_average`` for the rest.

    Example:
      >>> import jax, jax.numpy as jnp, optax, swa_jax
      >>> tx = optax.chain(optax.sgd(0.1), swa_jax.swa(start_step=3))
      >>> params = {"w": jnp.array([4.0, -2.0])}
      >>> opt_state = tx.init(params)
      >>> for _ in range(5):
      ...     grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
      ...     updates, opt_state = tx.update(grads, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(swa_jax.swa_state(opt_state).num_averaged)
      3
      >>> [round(float(w), 3) for w in swa_jax.swa_params(opt_state, params)["w"]]
      [1.666, -0.833]

    References:
      Izmailov et al., Averaging Weights Leads to Wider Optima and Better
      Generalization, UAI 2018, https://arxiv.org/abs/1803.05407, algorithm 1.
    """
    start_step = _check_step("start_step", start_step, at_least=0)
    period = _check_step("period", period, at_least=1)
    if stop_step is not None:
        stop_step = _check_step("stop_step", stop_step, at_least=0)
        if _known(start_step, stop_step) and stop_step < start_step:
            raise ValueError(
                f"stop_step={stop_step} is before start_step={start_step}: nothing "
                "would ever be averaged; stop_step must be >= start_step, or None"
            )
    accumulator_dtype = check_accumulator_dtype(accumulator_dtype)
    averaged_as = functools.partial(mean_dtype, accumulator_dtype=accumulator_dtype)

    def init_fn(params: PyTree) -> SWAState:
        return init_average(
            params, accumulator_dtype=accumulator_dtype, sharding=sharding
        )

    def update_fn(
        updates: PyTree, state: SWAState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, SWAState]:
        del extra_args
        if params is None:
            raise ValueError(
                "swa: update received params=None, but averages the updated weights; "
                "call tx.update(updates, opt_state, params)"
            )
        check_params(params, state.avg_params, caller="swa", averaged_as=averaged_as)
        new_params = _apply_updates(params, updates)
        t = optax.safe_increment(state.num_updates)
        sample = (t >= start_step) & ((t - start_step) % period == 0)
        if stop_step is not None:
            sample &= t <= stop_step
        if skip_nonfinite:
            sample &= _all_finite(new_params)
        targets = resolve(sharding, state.avg_params)
        new = accumulate(state, new_params, targets=targets, sample=sample)
        return updates, new._replace(num_updates=t)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_step(name: str, value: Any, *, at_least: int) -> Any:
    if is_traced(value) and jnp.issubdtype(value.dtype, jnp.integer):
        return value.astype(jnp.int32)  # from inject_hyperparams: not known yet
    try:
        step = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be an integer, got {value!r} of type {type(value).__name__}; "
            "steps count optimizer updates, so convert epochs or fractions first"
        ) from None
    if not at_least <= step <= _MAX_STEP:
        raise ValueError(
            f"{name} must be between {at_least} and {_MAX_STEP} (int32), got {step}; "
            "steps count optimizer updates"
        )
    return step


def _known(*steps: Any) -> bool:
    return not any(map(is_traced, steps))


def _apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """``optax.apply_updates``, passing on leaves that no gradient step changes."""

    def apply(path: Any, param: Any, update: Any) -> Any:
        no_gradient = jax.tree.leaves(update) == [] or (
            leaf_dtype(update) == jax.dtypes.float0
        )
        if no_gradient or jnp.issubdtype(leaf_dtype(param), jax.dtypes.extended):
            return param
        if np.shape(update) != np.shape(param):
            raise ValueError(
                f"swa: updates{jax.tree_util.keystr(path)} has shape "
                f"{np.shape(update)}, its parameter has {np.shape(param)}; both must "
                "be the same. Fix: pass the updates and the params of one model"
            )
        new = optax.apply_updates(param, update)
        # Of a sum that is stored in bfloat16, XLA would feed the mean the unrounded
        # float32, and keep a copy of the old weights for it. The barrier makes the mean
        # read what is stored. Wider weights are stored as computed.
        narrow = jnp.issubdtype(new.dtype, jnp.floating) and (
            jnp.finfo(new.dtype).bits < 32
        )
        return jax.lax.optimization_barrier(new) if narrow else new

    try:
        return jax.tree_util.tree_map_with_path(apply, params, updates)
    except ValueError as error:
        if str(error).startswith("swa: "):
            raise
        raise ValueError(
            "swa: updates must have the structure of params. Fix: pass the updates "
            f"and the params of one model; {error}"
        ) from error


def _all_finite(tree: PyTree) -> jax.Array:
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    parts = [
        y for x in leaves for y in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))
    ]
    # By the extremes, which NaN passes through: XLA fuses these two into one reading,
    # but stores a byte for every weight for isfinite(x).all().
    extremes = [f(x, initial=0) for x in parts for f in (jnp.max, jnp.min)]
    return functools.reduce(
        jnp.logical_and, map(jnp.isfinite, extremes), jnp.array(True)
    )
